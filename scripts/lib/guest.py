"""The Linux kernel's NBD client against a server: boots a guest and lets it use a volume as a user's machine would.

The host needs no nbd module, no root and no KVM for this: Debian's kernel package is downloaded through apt as the
machine is configured, unpacked into `.cache/guest` (never installed), put with busybox, nbd-client and e2fsprogs into
an initramfs, and booted by qemu-system-x86_64 in user-mode networking, where the host is 10.0.2.2. `guest_init.sh` is
what runs inside: first nbd-client, over TCP against a daemon on the host, and then the same over TLS, which nbd-client
has in a process of its own. Then, unless --stock, `terrace attach` against a daemon in the guest: for that the host's
file system is shared with it, read-only, so that it has this Python and this checkout, and `guest_attach.py` is run
there.

By default it starts a `terraced` of its own on a free port, with a sparse pool in a temporary home. While the guest's
kernel writes back, another terraced takes over, of which it must see a pause and nothing else; and afterwards this
looks at what the volume holds: trimmed space must be gone. With --host-port and --export it uses a server that is
already there.
Exit status 0: everything passed; 1: something did not, and the last lines say what.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terrace.certificates import make_authority, make_client, make_server
from tests.system.daemon import REPOSITORY, Daemon, DaemonError

CACHE = REPOSITORY / ".cache" / "guest"
INIT = Path(__file__).with_name("guest_init.sh")

METAPACKAGE = "linux-image-amd64"
# libcrc32c and jbd2 ask for a crc32c by its crypto name when they start; without modprobe it has to be there first.
MODULES = (
    *("virtio_pci", "virtio_net", "virtio_blk", "crc32c_generic", "nbd", "ext4", "xfs"),
    *("9p", "9pnet_virtio", "overlay", "dm_crypt", "xts", "ecb", "algif_skcipher"),
)
PROGRAMS = ("nbd-client", "mke2fs", "e2fsck")
SHARED_PROGRAMS = ("mkfs.ext4", "mkfs.xfs", "xfs_repair", "resize2fs", "fstrim", "blkid", "cryptsetup")
VOLUME_BYTES = 1 << 30
TLS_VOLUME_BYTES = 128 << 20
POOL_BYTES = 1280 << 20
DISK_BYTES = 1 << 30
"""Of the pool in the guest."""
KEPT_BYTES = 64 << 20  # what guest_init.sh writes and keeps,
TRIMMED_BYTES = 32 << 20  # and what it writes and deletes again before fstrim; ext4's own blocks take less than this
TIMEOUT_S = 150.0
UNDER_LOAD = "wrote 64 MiB to keep"
"""After this line of guest_init.sh the guest's kernel writes it back."""


class GuestError(Exception):
    """The test could not run or did not pass; the message names what and the next step."""


def main() -> int:
    parser = argparse.ArgumentParser(description="The Linux kernel's NBD client in a guest, against an NBD server.")
    parser.add_argument("--host-port", type=int, metavar="PORT", help="of 127.0.0.1 here (default: start terraced)")
    parser.add_argument("--export", default="", metavar="NAME", help="for --host-port; what it holds is overwritten")
    parser.add_argument("--connections", type=int, default=2, help="connections of the kernel's client (default 2)")
    parser.add_argument("--accel", default="tcg", help="QEMU accelerator (default tcg; kvm where it works)")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="S", help="default %(default)s")
    parser.add_argument("--stock", action="store_true", help="only nbd-client, without terrace attach")
    parser.add_argument("--verbose", action="store_true", help="show the whole serial console")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that guest, daemon and files are cleared away
    start_s = time.monotonic()
    try:
        require_programs()
        kernel = kernel_directory()
        with server(options.host_port, options.export) as served:
            initramfs = build_initramfs(kernel, served.certificates)
            print(f"guest ready: {kernel.name}, initramfs {initramfs.stat().st_size >> 20} MiB", flush=True)
            boot(kernel / "vmlinuz", initramfs, served, options)
            served.check_after()
    except (GuestError, DaemonError) as error:
        print(f"FAIL: {error}", file=sys.stderr)
        return 1
    print(f"PASS: the Linux kernel's client did all of it in {time.monotonic() - start_s:.0f} s")
    return 0


# The server under test


@dataclass
class Served:
    """What the guest is to use."""

    port: int
    export: str
    certificates: Path | None = None
    """A directory with those of a client."""
    daemon: Daemon | None = None
    """Where it is ours."""
    _upgrade: Future[dict[str, Any]] | None = None

    def under_load(self) -> None:
        """The guest writes, and goes on while another process takes over."""
        if self.daemon is not None:
            executor = ThreadPoolExecutor(1)
            self._upgrade = executor.submit(self.daemon.upgrade)
            executor.shutdown(wait=False)

    def check_after(self) -> None:
        """When the guest has finished."""
        if self.daemon is None:
            return
        if self._upgrade is None:
            raise GuestError(f"there was no upgrade: the guest never said {UNDER_LOAD!r}")
        how = self._upgrade.result()["succession"]
        print(f"an upgrade under load: {how['clients']} connections of the kernel waited for {how['pause_s']:.3f} s")
        if not how["clients"]:
            raise GuestError("the upgrade came when the guest was not connected")
        self.daemon.api("POST", "/v1/pools/guest/checkpoint")  # between two of them the count is an upper bound
        mapped_bytes = self.daemon.api("GET", "/v1/pools/guest/volumes/disk")["mapped_bytes"]
        print(f"the volume holds {mapped_bytes >> 20} MiB: {KEPT_BYTES >> 20} MiB of files and ext4's own blocks")
        if not KEPT_BYTES <= mapped_bytes < KEPT_BYTES + TRIMMED_BYTES:
            raise GuestError(f"the volume maps {mapped_bytes} bytes after the trim; see TRIM in nbd and tiers")


@contextmanager
def server(host_port: int | None, export: str) -> Iterator[Served]:
    """A daemon of ours, or that of the options."""
    if host_port is not None:
        yield Served(host_port, export)
        return
    with tempfile.TemporaryDirectory(prefix="terrace-guest-") as temporary:
        home = Path(temporary) / "home"
        # As `terrace tls init` and `terrace tls client` make them.
        make_authority(home / "tls", "guest", 2)
        make_server(home / "tls", [], 2)
        certificates = make_client(home / "tls", "guest", 2)
        with Daemon(home, '[nbd.tls]\nmode = "allowed"\n') as daemon:
            daemon.cli("pool", "create", "guest", "--fast", f"{temporary}/fast={POOL_BYTES}")
            daemon.cli("volume", "create", "guest/disk", str(VOLUME_BYTES))
            daemon.cli("volume", "create", "guest/tls", str(TLS_VOLUME_BYTES))
            yield Served(daemon.port, "guest/disk", certificates, daemon)


# The guest: kernel, modules, programs


def require_programs() -> None:
    """Raises GuestError that names what isn't installed."""
    wanted = ("busybox", "qemu-system-x86_64", "dpkg", "apt-get", *PROGRAMS, *SHARED_PROGRAMS)
    missing = [tool for tool in wanted if find(tool) is None]
    if missing:
        raise GuestError(f"not installed: {', '.join(missing)}; run scripts/install-tools")


def find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin")


def kernel_directory() -> Path:
    """The cache directory with `vmlinuz`, the modules, and `order`: their names, each after those it depends on."""
    depends = subprocess.run(["apt-cache", "depends", METAPACKAGE], capture_output=True, text=True, check=False).stdout
    match = re.search(r"Depends: (linux-image-\S+)", depends)
    if match is None:
        raise GuestError(f"apt knows no {METAPACKAGE}; run apt-get update (this test needs Debian on amd64)")
    package = match[1]
    directory = CACHE / package
    wanted = directory / "wanted"
    if wanted.exists() and wanted.read_text().split() == list(MODULES):
        return directory
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="unpack-") as temporary:
        scratch = Path(temporary)
        print(f"downloading {package} (once, into {CACHE})", flush=True)
        deb = download(package, scratch)
        tree = scratch / "tree"
        subprocess.run(["dpkg", "-x", deb, tree], check=True)
        chosen = scratch / "chosen"
        chosen.mkdir()
        shutil.copy(next((tree / "boot").glob("vmlinuz-*")), chosen / "vmlinuz")
        ordered = in_dependency_order(next(iter(tree.glob("**/lib/modules/*"))))
        for module in ordered:
            shutil.copy(module, chosen)
        (chosen / "order").write_text("".join(f"{module.name}\n" for module in ordered))
        (chosen / "wanted").write_text("".join(f"{module}\n" for module in MODULES))
        shutil.rmtree(directory, ignore_errors=True)
        chosen.rename(directory)
    return directory


def download(package: str, into: Path) -> Path:
    command = ["apt-get", "download", "-q", package]
    result = subprocess.run(command, cwd=into, capture_output=True, text=True, check=False)
    if result.returncode != 0 and os.geteuid() == 0:  # most often package lists that have grown old
        subprocess.run(["apt-get", "update", "-q"], capture_output=True, check=False)
        result = subprocess.run(command, cwd=into, capture_output=True, text=True, check=False)
    debs = list(into.glob("*.deb"))
    if result.returncode != 0 or not debs:
        said = result.stderr.strip()
        raise GuestError(f"apt-get download {package} failed; run apt-get update as root. It said:\n{said}")
    return debs[0]


def in_dependency_order(modules: Path) -> list[Path]:
    """MODULES and all that they need, each after its needs, which a module names in `.modinfo` (so: no depmod)."""
    files = {path.name.split(".")[0].replace("-", "_"): path for path in modules.rglob("*.ko*")}
    ordered: dict[str, Path] = {}

    def add(name: str) -> None:
        if name in ordered:
            return
        path = files.get(name)
        if path is None:
            if name in MODULES and name not in built_in:
                raise GuestError(f"{modules.name} has no module {name}")
            return
        needs = re.findall(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for need in b",".join(needs).decode().split(","):
            if need:
                add(need.replace("-", "_"))
        ordered[name] = path

    built_in = {Path(line).stem.replace("-", "_") for line in (modules / "modules.builtin").read_text().split()}
    for name in MODULES:
        add(name)
    return list(ordered.values())


def build_initramfs(kernel: Path, certificates: Path | None) -> Path:
    """Built anew each time, for it holds this machine's programs, and takes well under a second."""
    archive = Cpio()
    for directory in ("bin", "sbin", "dev", "modules"):
        archive.directory(directory)
    archive.device("dev/console", 5, 1)
    archive.file("init", INIT.read_bytes(), 0o755)
    archive.file("bin/busybox", program_path("busybox").read_bytes(), 0o755)
    for name in PROGRAMS:
        archive.file(f"sbin/{name}", program_path(name).read_bytes(), 0o755)
    libraries = sorted({library for name in PROGRAMS for library in libraries_of(program_path(name))})
    for library in libraries:
        archive.file(library.lstrip("/"), Path(library).read_bytes(), 0o755)
    for module in [*(kernel / "order").read_text().split(), "order"]:
        archive.file(f"modules/{module}", (kernel / module).read_bytes(), 0o644)
    if certificates is not None:
        for file in certificates.iterdir():
            archive.file(f"tls/{file.name}", file.read_bytes(), 0o600)
    path = kernel / "initramfs"
    path.write_bytes(gzip.compress(archive.finish(), compresslevel=1))
    return path


def program_path(name: str) -> Path:
    return Path(find(name) or "")


def libraries_of(program: Path) -> list[str]:
    """What ldd lists for it, the loader included, under the names that the loader will look for."""
    output = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return re.findall(r"(/\S+) \(0x", output)


class Cpio:
    """An archive in the kernel's initramfs format ("newc"): written here because device nodes then need no root."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._directories: set[str] = set()
        self._inode = 0

    def directory(self, name: str) -> None:
        if name in self._directories:
            return
        self._parents(name)
        self._directories.add(name)
        self._entry(name, 0o040755)

    def file(self, name: str, content: bytes, mode: int) -> None:
        self._parents(name)
        self._entry(name, 0o100000 | mode, content)

    def device(self, name: str, major: int, minor: int) -> None:
        self._parents(name)
        self._entry(name, 0o020600, major=major, minor=minor)

    def finish(self) -> bytes:
        self._entry("TRAILER!!!", 0)
        return bytes(self._data)

    def _parents(self, name: str) -> None:
        parent = str(Path(name).parent)
        if parent != ".":
            self.directory(parent)

    def _entry(self, name: str, mode: int, content: bytes = b"", *, major: int = 0, minor: int = 0) -> None:
        self._inode += 1
        # inode, mode, uid, gid, links, mtime, size, device major, minor, rdev major, minor, name size, check
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(name) + 1, 0)
        self._data += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        self._pad()
        self._data += content
        self._pad()

    def _pad(self) -> None:
        self._data += bytes(-len(self._data) % 4)


# Running it


def boot(kernel: Path, initramfs: Path, served: Served, options: argparse.Namespace) -> None:
    """Runs the guest to its end, shows its story, and raises GuestError unless it passed."""
    if re.search(r"[\s\"=]", served.export):
        raise GuestError(f"export name {served.export!r} can't be put on a kernel command line")
    settings = f"terrace_port={served.port} terrace_export={served.export} terrace_connections={options.connections}"
    if served.certificates is not None:
        settings += " terrace_tls=guest/tls"
    shared: list[str] = []
    with tempfile.TemporaryDirectory(prefix="terrace-guest-disk-") as temporary:
        if not options.stock:
            settings += f" terrace_python={sys.executable} terrace_checkout={REPOSITORY}"
            if re.search(r"[\s\"]", settings.replace(" terrace_", "")):
                raise GuestError(
                    f"{sys.executable} or {REPOSITORY} can't be put on a kernel command line: use a path without spaces"
                )
            disk = Path(temporary) / "disk"
            with disk.open("wb") as file:
                file.truncate(DISK_BYTES)
            shared = [
                *("-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"),
                *("-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
                *("-drive", f"file={disk},format=raw,if=virtio,cache=unsafe,discard=unmap"),
            ]
        run_guest(kernel, initramfs, settings, shared, served, options)


def run_guest(
    kernel: Path, initramfs: Path, settings: str, shared: list[str], served: Served, options: argparse.Namespace
) -> None:
    command = [
        *("qemu-system-x86_64", "-accel", options.accel, "-cpu", "max", "-M", "q35", "-m", "1024", "-smp", "2"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"),
        *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="),
        *shared,
        *("-kernel", str(kernel), "-initrd", str(initramfs)),
        *("-append", f"console=ttyS0 quiet panic=-1 net.ifnames=0 random.trust_cpu=on {settings}"),
    ]
    console: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as qemu:
        assert qemu.stdout is not None
        deadline = threading.Timer(options.timeout, qemu.kill)
        deadline.start()
        try:
            for line in qemu.stdout:
                console.append(line.rstrip())
                if options.verbose or "guest: " in line:
                    print(f"  {line.rstrip()}", flush=True)
                if UNDER_LOAD in line:
                    served.under_load()
        finally:
            timed_out = deadline.finished.is_set()
            deadline.cancel()
            qemu.kill()
    if any(line.endswith("guest: PASS") for line in console):
        return
    if any(line.endswith("guest: FAIL") for line in console):
        raise GuestError("a step failed in the guest; the lines before show it")
    if not options.verbose:
        print("\n".join(f"  | {line}" for line in console[-30:]))
    how = f"did not finish in {options.timeout:.0f} s" if timed_out else f"ended early (qemu: {qemu.returncode})"
    raise GuestError(f"the guest {how}; its console's last lines are above")


if __name__ == "__main__":
    sys.exit(main())
