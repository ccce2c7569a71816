#!/bin/busybox sh
# /init of the guest that lib/guest.py boots. Its arguments come on the kernel's command line as environment variables:
# terrace_port, terrace_export, terrace_connections, terrace_tls where there is a volume for that, and unless there is only nbd-client to be tested terrace_python and
# terrace_checkout, which lie on the host's file system. Speaks to the host in lines that start with "guest: "; the last one is
# "guest: PASS" or "guest: FAIL". Data is random and the checksum is taken before anything reaches the device.

/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt /etc
/bin/busybox --install -s /bin
export PATH=/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
ln -sf /proc/mounts /etc/mtab

say() { echo "guest: $(cut -d' ' -f1 /proc/uptime) $*"; }

finish() {
  echo "guest: $1"
  sync
  poweroff -f
}

# Runs one step; its output is shown only when it fails.
step() {
  title=$1
  shift
  if "$@" >/tmp/step.log 2>&1; then
    say "$title"
  else
    code=$?
    say "$title: exit status $code from: $*"
    sed 's/^/guest: | /' /tmp/step.log
    dmesg | tail -n 25 | sed 's/^/guest: | /'
    finish FAIL
  fi
}

modules() { while read -r module; do insmod "/modules/$module" || return; done </modules/order; }

network() {
  ip link set lo up && ip link set eth0 up &&
    ip addr add 10.0.2.15/24 dev eth0 && ip route add default via 10.0.2.2
}

write_files() {
  dd if=/dev/urandom of=/tmp/data bs=1M count=64 && (cd /tmp && md5sum data >/tmp/sum) || return
  cp /tmp/data /mnt/data && dd if=/tmp/data of=/mnt/scratch bs=1M count=32 && rm /tmp/data
}

trim_scratch() { rm /mnt/scratch && sync && fstrim -v /mnt; }

verify() { echo 3 >/proc/sys/vm/drop_caches && (cd /mnt && md5sum -c /tmp/sum); }

no_io_errors() { ! dmesg | grep -E 'I/O error|EXT4-fs (error|warning)|nbd[01]: .*(error|timed out|failed|reset|[Dd]ead)'; }

write_over_tls() {
  dd if=/dev/urandom of=/tmp/data bs=1M count=8 && (cd /tmp && md5sum data >/tmp/sum) &&
    cp /tmp/data /mnt/data && rm /tmp/data && sync
}

# nbd-client's own TLS: a process of it stands between the kernel and the connection.
# shellcheck disable=SC2154
attach_over_tls() {
  /sbin/nbd-client -N "$terrace_tls" 10.0.2.2 "$terrace_port" /dev/nbd1 -timeout 60 \
    -certfile /tls/client-cert.pem -keyfile /tls/client-key.pem -cacertfile /tls/ca-cert.pem -tlshostname localhost
}

# shellcheck disable=SC2154
# The host's files with a layer of our own over them, in which Python and the checkout are where they are on the host.
share_host() {
  mkdir /host /layer /shared &&
    mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576,cache=loose,ro host /host &&
    mount -t tmpfs tmpfs /layer && mkdir /layer/upper /layer/work &&
    mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work overlay /shared || return
  for each in proc sys dev; do mount --bind "/$each" "/shared/$each" || return; done
  for each in run tmp var/lib; do mount -t tmpfs tmpfs "/shared/$each" || return; done
  # A checkout, or its environment, may lie where these are now.
  for each in "$terrace_checkout" "${terrace_python%/bin/*}"; do
    [ -e "/shared/$each" ] || { mkdir -p "/shared/$each" && mount --bind "/host/$each" "/shared/$each"; } || return
  done
}

# shellcheck disable=SC2154
start_attach() {
  chroot /shared /usr/bin/env -i HOME=/root OPENBLAS_NUM_THREADS=1 PYTHONPATH="$terrace_checkout" \
    PATH="${terrace_python%/*}:/usr/sbin:/usr/bin:/sbin:/bin" \
    "$terrace_python" "$terrace_checkout/scripts/lib/guest_attach.py"
  echo $? >/tmp/attach.status
}

wait_for_attach() {
  touch /shared/run/go
  while [ ! -e /tmp/attach.status ]; do sleep 0.1; done
  [ "$(cat /tmp/attach.status)" = 0 ]
}

step "modules loaded" modules
step "network up" network
# Python takes its time here to import what it needs; it does that on the second processor.
if [ -n "${terrace_python-}" ]; then
  step "the host's files are here" share_host
  start_attach &
fi
# shellcheck disable=SC2154  # the three variables come from the kernel's command line
step "nbd-client attached $terrace_export" \
  /sbin/nbd-client -N "$terrace_export" 10.0.2.2 "$terrace_port" /dev/nbd0 -timeout 60 -connections "$terrace_connections"
say "size $(blockdev --getsize64 /dev/nbd0), discard_max $(cat /sys/block/nbd0/queue/discard_max_bytes), fua $(cat /sys/block/nbd0/queue/fua), cache '$(cat /sys/block/nbd0/queue/write_cache)'"
step "mkfs.ext4" /sbin/mke2fs -q -F -t ext4 /dev/nbd0
step "mounted" mount -t ext4 /dev/nbd0 /mnt
step "wrote 64 MiB to keep and 32 MiB to throw away" write_files
step "sync" sync
step "deleted the 32 MiB and trimmed" trim_scratch
say "$(cat /tmp/step.log)"
step "unmounted" umount /mnt
step "mounted again" mount -t ext4 /dev/nbd0 /mnt
step "read 64 MiB back, checksum right" verify
step "unmounted" umount /mnt
step "e2fsck -fn finds nothing" /sbin/e2fsck -fn /dev/nbd0
step "nbd-client detached" /sbin/nbd-client -d /dev/nbd0
if [ -n "${terrace_tls-}" ]; then
  step "nbd-client attached $terrace_tls over TLS" attach_over_tls
  step "mkfs.ext4" /sbin/mke2fs -q -F -t ext4 /dev/nbd1
  step "mounted" mount -t ext4 /dev/nbd1 /mnt
  step "wrote 8 MiB" write_over_tls
  step "unmounted" umount /mnt
  step "mounted again" mount -t ext4 /dev/nbd1 /mnt
  step "read 8 MiB back, checksum right" verify
  step "unmounted" umount /mnt
  step "e2fsck -fn finds nothing" /sbin/e2fsck -fn /dev/nbd1
  step "nbd-client detached" /sbin/nbd-client -d /dev/nbd1
fi
step "kernel log has no I/O error" no_io_errors
if [ -n "${terrace_python-}" ]; then
  step "terrace attach did all of it" wait_for_attach
fi
finish PASS
