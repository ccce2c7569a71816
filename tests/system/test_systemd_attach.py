"""A volume in /etc/fstab, under a real systemd: attached and mounted, kept over restarts of the daemon, taken down."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.system.booted import Machine, require_in_order

pytestmark = pytest.mark.system

UNIT = r"terrace-attach@my\x2dpool-vol.service"
FSTAB = f"/dev/terrace/my-pool/vol /srv/data ext4 defaults,x-systemd.requires={UNIT} 0 2\n"


def test_a_volume_in_fstab_is_mounted_survives_restarts_of_the_daemon_and_goes_in_order(tmp_path: Path) -> None:
    with Machine(tmp_path / "machine") as machine:
        machine.terrace("install-units")
        machine.run("systemctl", "daemon-reload")
        machine.run("udevadm", "control", "--reload")
        machine.run("systemctl", "enable", "--now", "terraced.socket", "terraced.service")
        machine.terrace("pool", "create", "my-pool", "--fast", "/var/lib/terrace/fast.img=300M")
        machine.terrace("volume", "create", "my-pool/vol", "100M")
        machine.terrace("attach", "my-pool/vol", "--mkfs", "ext4")
        machine.terrace("detach", "my-pool/vol")
        machine.run("systemctl", "stop", "terraced.socket", "terraced.service")

        # What fstab becomes at boot: in a container the generator would pass over devices.
        machine.path("/tmp/fstab").write_text(FSTAB)
        outside = ("env", "-u", "container", "SYSTEMD_FSTAB=/tmp/fstab", "SYSTEMD_VIRTUALIZATION=vm:kvm")
        generator = "/lib/systemd/system-generators/systemd-fstab-generator"
        machine.run(*outside, generator, *["/run/systemd/system"] * 3)
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "start", "local-fs.target")
        assert machine.show("srv-data.mount", "ActiveState") == "active"
        assert machine.show("terraced.service", "ActiveState") == "active"

        # Writes and syncs while the daemon is restarted, then killed.
        machine.run("sh", "-c", "head -c 1M /dev/urandom >/tmp/content")
        write = "for i in $(seq 40); do cp /tmp/content /srv/data/$i && sync /srv/data/$i || exit; done"
        with subprocess.Popen(machine.command("sh", "-c", write)) as writer:
            machine.run("systemctl", "restart", "terraced.service")
            machine.run("systemctl", "kill", "--signal=KILL", "terraced.service")
            assert writer.wait(60) == 0
        assert machine.show(UNIT, "NRestarts") == "0"
        machine.run("systemctl", "restart", "srv-data.mount")  # so that it is read anew
        machine.run("sh", "-c", "for i in $(seq 40); do cmp /tmp/content /srv/data/$i || exit; done")

        said = machine.power_off()
    steps = (
        "Unmounted srv-data.mount",
        "terrace.attach: my-pool/vol is detached",
        "terrace.pools: pool my-pool is closed",
        "Closed terraced.socket",
    )
    require_in_order(said, steps)
