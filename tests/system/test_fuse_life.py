"""Mounting and unmounting, and daemons that die or are restarted beneath files that are in use."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from terrace.fuse.device import MountError, mount, unmount
from terrace.fuse.session import require_mountpoint
from tests.system.daemon import REPOSITORY, ApiError, Daemon, environment, program
from tests.system.mount import Mount, is_mounted, opened, take_away, until
from tests.system.nbdclient import Connection

pytestmark = pytest.mark.system
MIB = 1 << 20


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """With the volume p/v of 64 MiB, and a socket that lies elsewhere. Tests may kill and restart it."""
    base: Path = tmp_path_factory.mktemp("life")
    with Daemon(base / "home", 'socket = "other.sock"\n[pool]\nunsynced_cap = "8M"\n') as running:
        running.cli("pool", "create", "p", "--fast", f"{base}/p=512M")
        create(running, "v", 64 * MIB)
        yield running


def create(daemon: Daemon, name: str, size: int) -> None:
    daemon.api("POST", "/v1/pools/p/volumes", {"name": name, "size": size})


def delete(daemon: Daemon, name: str) -> None:
    daemon.api("DELETE", f"/v1/pools/p/volumes/{name}")


@pytest.fixture(scope="module")
def mounted(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """Shared by the tests that leave it as it is."""
    with Mount(daemon.home, tmp_path_factory.mktemp("mounted") / "mnt") as mount:
        yield mount


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "mnt"
    take_away(tmp_path / "mnt")


@contextmanager
def fails(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == number, caught.value


# --- terrace mount, from its first moment to its last ---


def test_ctrl_c_unmounts_and_leaves_an_empty_directory(daemon: Daemon, directory: Path) -> None:
    with Mount(daemon.home, directory) as mount:
        assert (directory / "p/v").stat().st_size == 64 * MIB
        mount.interrupt()
        assert mount.ended() == (0, "")
        assert not is_mounted(directory) and not list(directory.iterdir())


def test_what_is_in_use_stays_and_names_its_users_and_a_second_ctrl_c_takes_it_away(
    daemon: Daemon, directory: Path
) -> None:
    with Mount(daemon.home, directory) as mount, opened(directory / "p/v") as fd:
        mount.interrupt()
        assert mount.process.stderr is not None
        said = mount.process.stderr.readline()
        assert f"(process {os.getpid()})" in said and "Ctrl-C again" in said
        assert os.pwrite(fd, b"still there", 0) == 11
        mount.interrupt()
        assert mount.ended()[0] == 0
        assert not is_mounted(directory)
        with fails(errno.ENOTCONN):
            os.pread(fd, 10, 0)
    with Connection(daemon.home / "other.sock", "p/v") as client:
        assert client.read(0, 11) == b"still there"


def test_unmounted_from_outside_it_ends_well(daemon: Daemon, directory: Path) -> None:
    with Mount(daemon.home, directory) as mount:
        subprocess.run(["fusermount3", "-u", str(directory)], check=True)
        assert mount.ended() == (0, "")


def test_what_a_killed_one_has_left_is_cleaned_up_by_the_next(daemon: Daemon, directory: Path) -> None:
    with Mount(daemon.home, directory) as mount, opened(directory / "p/v") as fd:
        mount.process.kill()
        mount.process.wait()
        with fails(errno.ENOTCONN):
            list(directory.iterdir())
        with fails(errno.ENOTCONN):
            os.pread(fd, 1, 0)
        with Mount(daemon.home, directory) as second:
            assert (directory / "p/v").stat().st_size == 64 * MIB
            second.interrupt()
            assert second.ended()[0] == 0


def test_an_administrator_may_cut_it_off(daemon: Daemon, directory: Path, tmp_path: Path) -> None:
    with Mount(daemon.home, directory) as mount:
        control = tmp_path / "control"
        control.mkdir()
        subprocess.run(["mount", "-t", "fusectl", "none", str(control)], check=True)
        try:
            (control / str(os.minor(directory.stat().st_dev)) / "abort").write_text("1")
        finally:
            subprocess.run(["umount", str(control)], check=True)
        assert mount.ended()[0] == 0


def test_read_only_files_are_read_only(daemon: Daemon, directory: Path) -> None:
    with Mount(daemon.home, directory, "--read-only"):
        with fails(errno.EROFS):
            os.open(directory / "p/v", os.O_RDWR)
        with opened(directory / "p/v", os.O_RDONLY) as fd:
            assert len(os.pread(fd, 4096, 0)) == 4096


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "No such file or directory; make it first with mkdir"),
        ("file", "it is not a directory"),
        ("full", "it is not empty; choose an empty directory"),
        ("closed", "Permission denied"),
    ],
)
def test_a_mount_point_that_cant_be_had_is_refused_by_name(name: str, words: str) -> None:
    with tempfile.TemporaryDirectory(prefix="mountpoint-") as parent:
        Path(parent).chmod(0o755)
        place = Path(parent).resolve() / name
        if name == "file":
            place.write_text("x")
        elif name != "missing":
            place.mkdir()
            (place / "x").write_text("x")
            place.chmod(0o700 if name == "closed" else 0o755)
        if name == "closed":
            os.seteuid(65534)
        try:
            with pytest.raises(MountError) as refused:
                trio.run(require_mountpoint, place)
        finally:
            os.seteuid(os.getuid())
        assert str(refused.value) == f"can't mount on {place}: {words}"


def test_terrace_mount_says_in_one_line_what_is_wrong(daemon: Daemon, tmp_path: Path) -> None:
    said = daemon.cli("mount", str(tmp_path / "missing"), status=1).stderr
    assert said == f"Error: can't mount on {tmp_path}/missing: No such file or directory; make it first with mkdir\n"


def test_it_asks_for_a_daemon_and_for_pyfuse3_before_it_begins(daemon: Daemon, tmp_path: Path) -> None:
    directory = tmp_path / "mnt"
    directory.mkdir()
    nobody = subprocess.run(
        [*program("terrace", "terrace.cli"), "--home", str(tmp_path / "none"), "mount", str(directory)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert nobody.returncode == 1 and "terraced" in nobody.stderr and nobody.stderr.count("\n") == 1
    without = "import sys; sys.modules['pyfuse3'] = None; from terrace.cli import main; main()"
    missing = subprocess.run(
        [sys.executable, "-c", without, "--home", str(daemon.home), "mount", str(directory)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert missing.returncode == 1 and "pip install 'pyfuse3>=" in missing.stderr
    assert missing.stderr.count("\n") == 1 and not is_mounted(directory)


# --- [fuse] mountpoint ---


def test_a_daemon_with_a_mount_point_that_cant_be_had_doesnt_start(tmp_path: Path) -> None:
    (tmp_path / "mnt").write_text("a file")
    configured = Daemon(tmp_path / "home", f'[fuse]\nmountpoint = "{tmp_path}/mnt"\n')
    with pytest.raises(AssertionError, match="exit status 1"):
        configured.start()
    assert configured.log.read_text() == f"terraced: can't mount on {tmp_path}/mnt: it is not a directory\n"


def test_the_daemons_own_files_go_with_it_and_come_back(tmp_path: Path, directory: Path) -> None:
    directory.mkdir()
    with Daemon(tmp_path / "home", f'[fuse]\nmountpoint = "{directory}"\n') as own:
        device = {"path": f"{tmp_path}/p", "tier": "fast", "size": "64M"}
        own.api("POST", "/v1/pools", {"name": "p", "devices": [device]})
        create(own, "v", 8 * MIB)
        until("it is mounted", lambda: is_mounted(directory))
        with opened(directory / "p/v") as fd:
            os.pwrite(fd, b"before the kill", 0)
            own.kill()
            with fails(errno.ENOTCONN):
                os.pread(fd, 15, 0)
        own.start()  # what the killed one has left is in the way
        until("it is mounted", lambda: (directory / "p/v").exists())
        with opened(directory / "p/v") as fd:
            assert os.pread(fd, 15, 0) == b"before the kill"
            assert own.stop() == 0, "users don't hold it up"
            with fails(errno.ENOTCONN):
                os.pread(fd, 15, 0)
        assert not is_mounted(directory)
        own.start()
        until("it is mounted", lambda: (directory / "p/v").exists())
        subprocess.run(["fusermount3", "-u", str(directory)], check=True)
        with Connection(own.socket, "p/v") as client:
            assert client.read(0, 15) == b"before the kill"
        until("it says so", lambda: "was unmounted from outside" in own.log.read_text())
        assert own.stop() == 0


def test_a_pool_on_a_volume_of_the_same_daemon_is_refused_for_it_would_wait_for_itself(
    tmp_path: Path, directory: Path
) -> None:
    directory.mkdir()
    with Daemon(tmp_path / "home", f'[fuse]\nmountpoint = "{directory}"\n') as own:
        own.api(
            "POST", "/v1/pools", {"name": "p", "devices": [{"path": f"{tmp_path}/p", "tier": "fast", "size": "64M"}]}
        )
        create(own, "v", 64 * MIB)
        until("it is mounted", lambda: (directory / "p/v").exists())
        link = tmp_path / "link"
        link.symlink_to(directory / "p/v")
        attach = ["losetup", "--find", "--show", str(directory / "p/v")]
        loop = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
        try:
            for path in (directory / "p/v", link, Path(loop)):
                with pytest.raises(ApiError, match="is a volume of Terrace: a pool on it would wait for itself"):
                    own.api(
                        "POST",
                        "/v1/pools",
                        {"name": "q", "devices": [{"path": str(path), "tier": "fast"}], "force": True},
                    )
        finally:
            subprocess.run(["losetup", "--detach", loop], check=True)
        with pytest.raises(ApiError, match="Operation not permitted"):
            new = {"path": f"{directory}/p/new", "tier": "fast", "size": "64M"}
            own.api("POST", "/v1/pools", {"name": "q", "devices": [new]})
        assert (directory / "p/v").stat().st_size == 64 * MIB, "it lives"
        assert own.stop() == 0


# --- daemons that come and go ---


def test_what_was_answered_is_there_and_nobody_sees_an_error_while_daemons_die_and_stop(
    daemon: Daemon, mounted: Mount
) -> None:
    directory = mounted.directory
    slots, size = 8, 256 << 10
    over = threading.Event()
    problems: list[str] = []
    turns = [0] * slots
    last = [b""] * slots

    def work(slot: int) -> None:
        chosen = random.Random(slot)
        model = bytearray(size)
        try:
            with opened(directory / "p/v") as fd:
                os.pwrite(fd, model, slot * size)
                while not over.is_set():
                    turns[slot] += 1
                    length = chosen.choice([512, 4096, 20_000, 100_000])
                    at = chosen.randrange(size - length)
                    if chosen.random() < 0.6:
                        data = chosen.randbytes(length)
                        assert os.pwrite(fd, data, slot * size + at) == length
                        model[at : at + length] = data
                    else:
                        assert os.pread(fd, length, slot * size + at) == model[at : at + length]
                    if chosen.random() < 0.05:
                        os.fsync(fd)
        except (OSError, AssertionError) as error:
            problems.append(f"slot {slot}: {error!r}")
        last[slot] = bytes(model)

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(slots)]
    for thread in threads:
        thread.start()
    for end in (daemon.kill, daemon.stop):
        time.sleep(0.3)
        before = sum(turns)
        end()
        daemon.start()
        until("they go on", lambda: sum(turns) > before + 100)  # noqa: B023
    over.set()
    for thread in threads:
        thread.join(20)
    assert not problems
    content = b"".join(last)
    with Connection(daemon.home / "other.sock", "p/v") as client:
        found = b"".join(client.read(offset, MIB) for offset in range(0, len(content), MIB))
    assert found == content
    assert (directory / "p/v").read_bytes()[: len(content)] == content


def test_names_and_holes_wait_for_a_daemon_that_is_restarted(daemon: Daemon, mounted: Mount) -> None:
    directory = mounted.directory
    with opened(directory / "p/v") as fd:
        os.pwrite(fd, b"x", 0)
        daemon.kill()
        found: list[int] = []
        calls: list[Callable[[], int]] = [
            lambda: (directory / "p/v").stat().st_size,
            lambda: os.lseek(fd, 0, os.SEEK_DATA),
            lambda: len(os.listdir(directory / "p")),  # noqa: PTH208
        ]
        threads = [threading.Thread(target=lambda call=call: found.append(call())) for call in calls]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        daemon.start()
        for thread in threads:
            thread.join(20)
        assert sorted(found) == [0, 1, 64 * MIB]


def test_a_volume_that_was_replaced_while_nobody_was_connected_is_stale_and_a_deleted_one_too(
    daemon: Daemon, directory: Path
) -> None:
    for name in ("old", "gone"):
        create(daemon, name, 8 * MIB)
    with Mount(daemon.home, directory) as mount:
        with opened(directory / "p/old") as old, opened(directory / "p/gone") as gone:
            os.pwrite(old, b"old", 0)
            # A child closes what it inherits, which asks the server. The kernel learns from the first answer not to.
            os.close(os.dup(old))
            mount.process.send_signal(signal.SIGSTOP)
            daemon.kill()
            daemon.start()
            for name in ("old", "gone"):
                delete(daemon, name)
            create(daemon, "old", 8 * MIB)
            mount.process.send_signal(signal.SIGCONT)
            for fd in (old, gone):
                with fails(errno.ESTALE):
                    os.pwrite(fd, b"must not get there", 0)
                with fails(errno.ESTALE):
                    os.pread(fd, 1, 0)
            assert (directory / "p/old").read_bytes()[:18] == bytes(18)
            with opened(directory / "p/old") as new:
                os.pwrite(new, b"new", 0)
                assert os.pread(new, 3, 0) == b"new"
        mount.interrupt()
        status, said = mount.ended()
        assert status == 0 and "p/old was deleted or rolled back" in said and "p/gone was deleted" in said
    delete(daemon, "old")


# --- many snapshots ---

LIST = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
fd, size, total = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY), 4 << 20, 0
buffer = ctypes.create_string_buffer(size)
names = set()
while True:
    got = libc.syscall(int(sys.argv[2]), fd, buffer, size)
    assert got >= 0, ctypes.get_errno()
    if not got:
        break
    at, raw = 0, buffer.raw[:got]
    while at < got:
        length = int.from_bytes(raw[at + 16 : at + 18], sys.byteorder)
        names.add(raw[at + 19 : at + length].split(b"\\0")[0])
        at += length
print(len(names - {b".", b".."}))
"""


def test_ten_thousand_snapshots_are_listed_by_many_at_once_in_bounded_time(directory: Path) -> None:
    """With buffers of 4 MiB: what libfuse replies never fills its socket, which would stop the server for good."""
    directory.mkdir()
    getdents = {"x86_64": "217", "aarch64": "61"}[os.uname().machine]
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.system.manysnapshots", str(directory), "10000"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=REPOSITORY,
    )
    assert server.stdout is not None
    try:
        assert server.stdout.readline()
        start_s = time.monotonic()
        listing = [sys.executable, "-c", LIST, str(directory / "p"), getdents]
        clients = [subprocess.Popen(listing, stdout=subprocess.PIPE, text=True) for _ in range(6)]
        try:
            assert [client.communicate(timeout=20)[0] for client in clients] == ["10000\n"] * 6
        finally:
            for client in clients:
                client.kill()
                client.wait()
        assert time.monotonic() - start_s < 15
    finally:
        server.kill()
        server.communicate()


# --- a file system over a loop device over a file ---


@contextmanager
def loop_over(path: Path) -> Iterator[str]:
    device = run("losetup", "--find", "--show", "--direct-io=on", str(path)).strip()
    try:
        assert Path(f"/sys/block/{device[5:]}/loop/dio").read_text() == "1\n"
        yield device
    finally:
        run("losetup", "--detach", device)


def run(*command: str) -> str:
    path = os.environ["PATH"] + ":/usr/local/sbin:/usr/sbin:/sbin"
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=os.environ | {"PATH": path}
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    return result.stdout


def digest(tree: Path) -> dict[str, str]:
    return {
        str(path.relative_to(tree)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(tree.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_file_system_over_a_loop_device_outlives_daemons_and_gives_its_space_back(
    daemon: Daemon, mounted: Mount, tmp_path: Path, kind: str
) -> None:
    create(daemon, kind, 320 * MIB)
    inside = tmp_path / "inside"
    inside.mkdir()
    sources = [REPOSITORY / name for name in ("nbd", "terrace", "docs")]
    ignore = shutil.ignore_patterns("__pycache__")
    with loop_over(mounted.directory / "p" / kind) as device:
        run(f"mkfs.{kind}", "-q", device)
        run("mount", device, str(inside))
        try:
            for source in sources:
                shutil.copytree(source, inside / "first" / source.name, ignore=ignore)
            run("sync", "-f", str(inside))  # not sync(2): that waits for every file system of the host
            writing = threading.Thread(target=load, args=(inside, over := threading.Event()))
            writing.start()
            time.sleep(0.25)
            daemon.kill()
            daemon.start()
            over.set()
            writing.join(30)
            assert not writing.is_alive()
            for source in sources:
                shutil.copytree(source, inside / "second" / source.name, ignore=ignore)
            run("sync", "-f", str(inside))
            before = allocated(daemon, kind)
            shutil.rmtree(inside / "second")
            (inside / "load").unlink()

            def given_back() -> bool:
                run("sync", "-f", str(inside))
                run("fstrim", str(inside))
                return allocated(daemon, kind) < before - 24 * MIB

            until("what was deleted is given back", given_back)  # xfs frees it in the background
        finally:
            run("umount", str(inside))
        check = ["fsck.ext4", "-fn"] if kind == "ext4" else ["xfs_repair", "-n"]
        run(*check, device)
        run("mount", "-o", "ro", device, str(inside))
        try:
            found = digest(inside / "first")
        finally:
            run("umount", str(inside))
    expected = {
        f"{source.name}/{name}": value
        for source in sources
        for name, value in digest(source).items()
        if "__pycache__" not in name
    }
    assert found == expected
    until("the loop device has let go", lambda: not daemon.api("GET", f"/v1/pools/p/volumes/{kind}")["open_count"])
    delete(daemon, kind)


def load(inside: Path, over: threading.Event) -> None:
    """Writes 32 MiB, over and over."""
    data = random.Random(5).randbytes(MIB)
    with (inside / "load").open("wb") as file:
        for turn in itertools.count():
            if turn >= 32 and over.is_set():
                return
            os.pwrite(file.fileno(), data, turn % 32 * MIB)
            os.fdatasync(file.fileno())


def allocated(daemon: Daemon, name: str) -> int:
    daemon.api("POST", "/v1/pools/p/checkpoint")
    return int(daemon.api("GET", f"/v1/pools/p/exports/{name}")["allocated_bytes"])


def test_no_process_that_is_started_later_gets_the_descriptor_of_a_mount(directory: Path) -> None:
    directory.mkdir()

    async def test() -> None:
        descriptor = await mount(directory, "fsname=terrace,subtype=terrace")
        try:
            assert not os.get_inheritable(descriptor)
        finally:
            os.close(descriptor)
            assert await unmount(directory, lazy=True) == ""

    trio.run(test)
