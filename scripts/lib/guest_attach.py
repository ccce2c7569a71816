"""`terrace attach` in the guest of lib/guest.py: filesystems over restarts of the daemon, resize, trim, LUKS, takeover.

The guest is emulated, and Python takes 20 s to import what the daemon and the command line need. So this process
imports it once and every command is a fork of it; they are the real programs otherwise, each in a process of its own,
that can be killed. It waits for /run/go, so that the importing can be done while something else runs.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx  # noqa: F401 - see above
import trio  # noqa: F401

from terrace.cli.root import root
from terrace.daemon import main as daemon_main

HOME = Path("/var/lib/terrace")
MIB = 1 << 20
WRITTEN_BYTES = 8 * MIB
STOPPED_S = 6.0
SOURCES = ("nbd", "docs")


class Failed(Exception):
    """The guest's story ends here."""


def say(text: str) -> None:
    uptime = Path("/proc/uptime").read_text().split()[0]
    print(f"guest: {uptime} {text}", flush=True)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 40.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise Failed(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)
    return found


def forked(run: Callable[[], int | None], output: Path) -> int:
    """The process id of a child that runs it, with its output in a file."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.setsid()
        fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        try:
            status = run() or 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def cli(*arguments: str, status: int = 0) -> str:
    """`terrace ARGUMENTS`; what it says."""
    output = Path("/tmp/cli")
    output.unlink(missing_ok=True)
    pid = forked(lambda: root(list(arguments)), output)
    found = ended(pid)
    said = output.read_text()
    if found != status:
        raise Failed(f"terrace {' '.join(arguments)}: exit status {found}: {said}")
    return said


def tool(*command: str, stdin: bytes = b"") -> str:
    done = subprocess.run(command, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(command)}: exit status {done.returncode}: {done.stdout.decode()}")
    return done.stdout.decode()


class Daemon:
    """terraced on the guest's home."""

    def __init__(self) -> None:
        self.output = Path("/tmp/terraced.out")
        self.pid = 0

    def start(self) -> None:
        self.output.unlink(missing_ok=True)
        self.pid = forked(lambda: daemon_main(["--home", str(HOME)]), self.output)
        wait_for(lambda: "is ready" in self.output.read_text() if self.output.exists() else False, "terraced is ready")

    def end(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)
        status = ended(self.pid)
        if status not in (0, -signal.SIGKILL):
            raise Failed(f"terraced ended with {status}: {self.output.read_text()}")


class Keeper:
    """`terrace attach --foreground`."""

    def __init__(self, name: str, *options: str) -> None:
        self.name = name
        self.output = Path("/tmp/keeper-" + name.replace("/", "-"))
        self.output.unlink(missing_ok=True)
        self.pid = forked(lambda: root(["attach", name, "--foreground", *options]), self.output)
        self.device: str = wait_for(self._device, f"{name} is attached")

    def _device(self) -> str | None:
        if os.waitpid(self.pid, os.WNOHANG)[0]:
            raise Failed(f"the keeper of {self.name} ended: {self.output.read_text()}")
        lines = self.output.read_text().splitlines() if self.output.exists() else []
        return next((line for line in lines if line.startswith("/dev/nbd")), None)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        ended(self.pid)

    def has_ended(self) -> None:
        if status := ended(self.pid):
            raise Failed(f"the keeper of {self.name} ended with {status}: {self.output.read_text()}")


class Writer:
    """A process that writes a file of noise and syncs it often; and what must be read from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = os.urandom(WRITTEN_BYTES)
        self.pid = forked(self._write, Path("/tmp/writer"))

    def _write(self) -> None:
        with self.path.open("wb", buffering=0) as file:
            for at in range(0, len(self.data), 65536):
                file.write(self.data[at : at + 65536])
                if at % (512 << 10) == 0:
                    os.fsync(file.fileno())
            os.fsync(file.fileno())

    def wait_until_at(self, length: int) -> None:
        wait_for(lambda: self.path.exists() and self.path.stat().st_size >= length, f"{length} bytes are written")
        if os.waitpid(self.pid, os.WNOHANG)[0]:
            raise Failed("the writer was done too soon for this test: write more")

    def finish(self) -> None:
        if status := ended(self.pid):
            raise Failed(f"the writer ended with {status}: {Path('/tmp/writer').read_text()}")

    def verify(self) -> None:
        if self.path.read_bytes() != self.data:
            raise Failed(f"{self.path} is not what was written")


def digest_of(directory: Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            whole.update(str(path.relative_to(directory)).encode() + path.read_bytes())
    return whole.hexdigest()


def unpack_sources(into: Path) -> None:
    checkout = Path(__file__).resolve().parents[2]
    for name in SOURCES:
        shutil.copytree(checkout / name, into / name, ignore=shutil.ignore_patterns("__pycache__"))


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def mapped_bytes(name: str) -> int:
    return int(json.loads(cli("volume", "show", name, "-o", "json"))["mapped_bytes"])


def ext4_over_two_connections(daemon: Daemon) -> None:
    cli("volume", "create", "guest/ext4", "256M")
    where = Path("/tmp/ext4")
    where.mkdir()
    keeper = Keeper("guest/ext4", "--connections", "2", "--mkfs", "ext4", "--mount", str(where))
    if cli("attach", "guest/ext4").strip() != keeper.device:
        raise Failed("attaching it again gave another device")
    if os.path.realpath("/dev/terrace/guest/ext4") != keeper.device:
        raise Failed("there is no link /dev/terrace/guest/ext4 to the device")
    say(f"guest/ext4 is {keeper.device}, with ext4, mounted by terrace attach")
    writer = Writer(where / "noise")
    writer.wait_until_at(WRITTEN_BYTES // 6)
    daemon.end(signal.SIGTERM)
    daemon.start()
    writer.wait_until_at(WRITTEN_BYTES // 2)
    # Long enough for the kernel to give up connections that live, and send again: see nbd/fence.py.
    os.kill(daemon.pid, signal.SIGSTOP)
    time.sleep(STOPPED_S)
    os.kill(daemon.pid, signal.SIGCONT)
    writer.finish()
    say("the daemon was restarted, then stopped for a while, in mid-write; the writer has seen no error")
    cli("volume", "resize", "guest/ext4", "320M")
    tool("resize2fs", keeper.device)
    if os.statvfs(where).f_blocks * 4096 < 270 * MIB:
        raise Failed("the filesystem has not grown")
    unpack_sources(where)
    wanted = digest_of(where)
    drop_caches()
    writer.verify()
    if digest_of(where) != wanted:
        raise Failed("the sources are not what was written")
    before = mapped_bytes("guest/ext4")
    (where / "noise").unlink()
    os.sync()
    tool("fstrim", str(where))
    freed = before - mapped_bytes("guest/ext4")
    if freed < 0.95 * WRITTEN_BYTES:
        raise Failed(f"fstrim gave back {freed} bytes of {WRITTEN_BYTES}")
    say(f"grown online, read back, trimmed: {freed >> 20} MiB came back")
    refusal = cli("detach", "guest/ext4", status=1)
    if f"mounted at {where}: unmount it first" not in refusal:
        raise Failed(f"a mounted device was not refused as it should be: {refusal}")
    tool("umount", str(where))
    tool("e2fsck", "-fn", keeper.device)
    cli("detach", "guest/ext4")
    keeper.has_ended()
    say("unmounted, e2fsck finds nothing, detached")


def xfs_taken_over(daemon: Daemon) -> None:
    cli("volume", "create", "guest/xfs", "320M")
    where = Path("/tmp/xfs")
    where.mkdir()
    keeper = Keeper("guest/xfs", "--mkfs", "xfs", "--mount", str(where))
    unpack_sources(where)
    wanted = digest_of(where)
    writer = Writer(where / "noise")
    writer.wait_until_at(WRITTEN_BYTES // 6)
    keeper.kill()
    daemon.end(signal.SIGKILL)
    # The device waits in the kernel; a new keeper finds it before there is a daemon.
    second = Keeper("guest/xfs")
    daemon.start()
    writer.finish()
    if second.device != keeper.device:
        raise Failed(f"{second.device} was made where {keeper.device} should have been taken over")
    say(f"keeper and daemon were killed in mid-write; {second.device} was taken over, the writer has seen no error")
    tool("umount", str(where))
    tool("mount", "/dev/terrace/guest/xfs", str(where))
    drop_caches()
    writer.verify()
    (where / "noise").unlink()
    if digest_of(where) != wanted:
        raise Failed("the sources are not what was written")
    cli("detach", "guest/xfs", "--unmount")
    second.has_ended()
    again = Keeper("guest/xfs", "--read-only")
    tool("xfs_repair", "-n", again.device)
    cli("detach", again.device)
    again.has_ended()
    say("xfs: unmounted by detach, attached read-only, xfs_repair finds nothing")


def ext4_on_luks(daemon: Daemon) -> None:
    cli("volume", "create", "guest/luks", "64M")
    keeper = Keeper("guest/luks", "--connections", "2")
    quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "-"]
    small = ["--luks2-metadata-size", "16k", "--luks2-keyslots-size", "512k"]
    tool("cryptsetup", "luksFormat", "--batch-mode", *quick, *small, keeper.device, stdin=b"key")
    refusal = cli("attach", "guest/luks", "--mkfs", "ext4", status=1)
    if "carries crypto_LUKS" not in refusal:
        raise Failed(f"--mkfs over LUKS was not refused as it should be: {refusal}")
    tool("cryptsetup", "open", "--key-file", "-", keeper.device, "safe", stdin=b"key")
    tool("mkfs.ext4", "-q", "/dev/mapper/safe")
    where = Path("/tmp/luks")
    where.mkdir()
    tool("mount", "/dev/mapper/safe", str(where))
    shutil.copytree(Path(__file__).parent, where / "lib")
    wanted = digest_of(where / "lib")
    if "in use by /dev/mapper/safe" not in cli("detach", "guest/luks", status=1):
        raise Failed("a device beneath LUKS was not refused as it should be")
    tool("umount", str(where))
    tool("mount", "/dev/mapper/safe", str(where))
    if digest_of(where / "lib") != wanted:
        raise Failed("the files on LUKS are not what was written")
    tool("umount", str(where))
    tool("e2fsck", "-fn", "/dev/mapper/safe")
    tool("cryptsetup", "close", "safe")
    cli("detach", "guest/luks")
    keeper.has_ended()
    say("ext4 on LUKS: written, read back, e2fsck finds nothing")


def no_io_errors(daemon: Daemon) -> None:
    bad = re.compile(r"I/O error|EXT4-fs.*(error|warning)|XFS.*(error|orrupt)")
    found = [line for line in tool("dmesg").splitlines() if bad.search(line)]
    if found:
        raise Failed("the kernel's log has errors:\n" + "\n".join(found))
    say("the kernel's log has no I/O error")


def gone_for_good(daemon: Daemon) -> None:
    keeper = Keeper("guest/luks", "--connections", "2")
    # I/O waits for a daemon that may come back, and detach --force ends that.
    daemon.end(signal.SIGKILL)
    reader = forked(lambda: os.pread(os.open(keeper.device, os.O_RDONLY), 1 << 20, 32 << 20) and 0, Path("/tmp/reader"))
    time.sleep(0.5)
    if os.waitpid(reader, os.WNOHANG)[0]:
        raise Failed("a read did not wait for the daemon")
    cli("detach", "guest/luks", "--force")
    if ended(reader) != 70 or "Input/output error" not in Path("/tmp/reader").read_text():
        raise Failed("a read that waited for a daemon that is gone did not fail when its device was detached by force")
    if ended(keeper.pid) != -signal.SIGKILL or json.loads(cli("attach", "--list", "-o", "json")):
        raise Failed("something is still attached")
    say("with the daemon gone for good, detach --force has ended what waited")


def rolled_back_beneath(daemon: Daemon) -> None:
    """What the kernel holds of a volume must never reach the one that a rollback has put in its place."""
    cli("volume", "create", "guest/rolled", "32M")
    keeper = Keeper("guest/rolled")
    before = os.urandom(4096)
    device = os.open(keeper.device, os.O_RDWR | os.O_DIRECT)
    page = mmap.mmap(-1, 4096)
    page[:] = before
    os.pwrite(device, page, 0)
    cli("snapshot", "create", "guest/rolled@s")
    cli("snapshot", "rollback", "guest/rolled@s", "--force", "--yes")
    cli("volume", "resize", "guest/rolled", "48M")  # which has the keeper look at its volume at once
    page[:] = os.urandom(4096)

    def refused() -> bool:
        try:
            os.pwrite(device, page, 0)
        except OSError:
            return True
        return False

    wait_for(refused, "a device whose volume was rolled back takes no write")
    wait_for(lambda: "was deleted or rolled back" in keeper.output.read_text(), "its keeper says so")
    os.close(device)
    cli("detach", "guest/rolled")
    keeper.has_ended()
    again = Keeper("guest/rolled")
    with open(again.device, "rb") as file:  # noqa: PTH123 - a device
        found = file.read(4096)
    if found != before:
        raise Failed("the volume is not what it was rolled back to")
    cli("detach", "guest/rolled")
    again.has_ended()
    say("the device of a volume that was rolled back takes no write, and its keeper says why")


def main() -> int:
    say("Python has imported terrace")
    wait_for(lambda: Path("/run/go").exists(), "the other test is over", 120)
    daemon = Daemon()
    try:
        daemon.start()
        cli("pool", "create", "guest", "--fast", "/dev/vda")
        chapters = (ext4_over_two_connections, xfs_taken_over, ext4_on_luks, no_io_errors, rolled_back_beneath)
        for chapter in (*chapters, gone_for_good):
            chapter(daemon)
    except Failed as failure:
        say(str(failure).strip().replace("\n", "\nguest: | "))
        for log in Path("/tmp").glob("keeper-*"):
            say(f"{log.name}:\nguest: | " + log.read_text().strip().replace("\n", "\nguest: | "))
        say("terraced:\nguest: | " + daemon.output.read_text().strip().replace("\n", "\nguest: | "))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
