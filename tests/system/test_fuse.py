"""Volumes and snapshots as files, with the real daemon and the real kernel: in the daemon, and in `terrace mount`."""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system.daemon import ApiError, Daemon
from tests.system.mount import Mount, opened, take_away, until
from tests.system.nbdclient import Connection

pytestmark = pytest.mark.system
MIB = 1 << 20
SIZE = 8 * MIB
PATTERN = random.Random(1).randbytes(SIZE)


@dataclass
class Files:
    """A daemon whose exports are files below `directory`."""

    daemon: Daemon
    directory: Path
    device: Path
    names: Iterator[int]

    def volume(self, size: int = SIZE, *, pool: str = "p") -> Path:
        """A new one."""
        name = f"v{next(self.names)}"
        self.daemon.api("POST", f"/v1/pools/{pool}/volumes", {"name": name, "size": size})
        return self.directory / pool / name

    def export(self, path: Path) -> str:
        return str(path.relative_to(self.directory))

    def snapshot(self, path: Path, name: str) -> Path:
        self.daemon.api("POST", f"{volume(path)}/snapshots", {"name": name})
        return path.with_name(f"{path.name}@{name}")

    def nbd(self, path: Path) -> Connection:
        return Connection(self.daemon.socket, self.export(path))


@pytest.fixture(scope="module", params=["in the daemon", "terrace mount"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    """Shared by the tests that leave the daemon running."""
    base: Path = tmp_path_factory.mktemp("fuse")
    directory = base / "mnt"
    directory.mkdir()
    inside = request.param == "in the daemon"
    config = f'[fuse]\nmountpoint = "{directory}"\n' if inside else ""
    with ExitStack() as stack:
        stack.callback(take_away, directory)
        daemon = stack.enter_context(Daemon(base / "home", config))
        daemon.cli("pool", "create", "p", "--fast", f"{base}/p=256M")
        daemon.cli("pool", "create", "small", "--fast", f"{base}/small=32M")
        if not inside:
            stack.enter_context(Mount(daemon.home, directory))
        until("it is mounted", lambda: (directory / "p").is_dir())
        yield Files(daemon, directory, base / "p", iter(range(1, 1000)))
        assert daemon.alive(), daemon.tail()


def volume(path: Path) -> str:
    return f"/v1/pools/p/volumes/{path.name}"


@contextmanager
def fails(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == number, (
        f"{errno.errorcode.get(caught.value.errno or 0)}, not {errno.errorcode[number]}"
    )


def test_every_volume_and_snapshot_is_listed_with_its_size_and_what_it_holds(files: Files) -> None:
    path = files.volume()
    assert {entry.name for entry in files.directory.iterdir()} == {"p", "small"}
    with opened(path) as fd:
        assert os.pwrite(fd, PATTERN[:MIB], 0) == MIB
        os.fsync(fd)
    shot = files.snapshot(path, "one")
    files.daemon.api("POST", "/v1/pools/p/checkpoint")
    assert {path, shot} <= set((files.directory / "p").iterdir())
    time.sleep(1.1)
    for entry in os.scandir(files.directory / "p"):
        if entry.name in (path.name, shot.name):
            status = entry.stat()
            assert stat.S_ISREG(status.st_mode) and status.st_size == SIZE and status.st_blocks == MIB // 512
            assert stat.S_IMODE(status.st_mode) == (0o600 if entry.name == path.name else 0o400)
            assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())
    space = os.statvfs(files.directory)
    assert space.f_blocks * space.f_frsize == sum(
        pool["capacity_bytes"] for pool in files.daemon.api("GET", "/v1/pools")
    )
    for wrong in (b"none", b"v@", b"\xff\xfe", b"p%2Fv", b"a b\n", b"x" * 200, "ä".encode()):
        for parent in (b"", b"p/"):
            with fails(errno.ENOENT):
                Path(os.fsdecode(os.fsencode(files.directory) + b"/" + parent + wrong)).stat()
    with fails(errno.ENOTDIR):
        (path / "x").stat()


def test_a_resize_is_seen_within_two_seconds_and_a_snapshot_at_once(files: Files) -> None:
    path = files.volume()
    with opened(path) as fd:
        assert os.fstat(fd).st_size == SIZE
        files.daemon.api("PATCH", volume(path), {"size": 2 * SIZE})
        until("the new size", lambda: os.fstat(fd).st_size == 2 * SIZE, 2.0)
        assert os.pwrite(fd, b"behind the old end", SIZE) == 18
        shot = files.snapshot(path, "now")
        assert shot.stat().st_size == 2 * SIZE
    with opened(shot, os.O_RDONLY) as fd:
        assert os.pread(fd, 18, SIZE) == b"behind the old end"
    shrunk = {"size": SIZE, "shrink": True}
    until("nobody has it open", lambda: not files.daemon.api("GET", volume(path))["open_count"], 2.0)
    files.daemon.api("PATCH", volume(path), shrunk)
    until("the old size", lambda: path.stat().st_size == SIZE, 2.0)
    with opened(path) as fd:
        assert os.pread(fd, 4096, SIZE) == b""


def test_a_snapshot_is_read_only_and_can_be_mapped(files: Files) -> None:
    path = files.volume()
    with opened(path) as fd:
        os.pwrite(fd, PATTERN, 0)
        shot = files.snapshot(path, "kept")
        os.pwrite(fd, bytes(SIZE), 0)
    for flags in (os.O_RDWR, os.O_WRONLY):
        with fails(errno.EROFS):
            os.open(shot, flags)
    assert shot.read_bytes() == PATTERN
    with opened(shot, os.O_RDONLY) as fd, mmap.mmap(fd, SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == PATTERN
    with opened(path, os.O_RDONLY) as fd, mmap.mmap(fd, SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == bytes(SIZE)


@pytest.mark.parametrize("seed", [1, 2])
def test_random_reads_writes_holes_and_zeroes_agree_with_a_model(files: Files, seed: int) -> None:
    """As fsx does it, with the file's end fixed."""
    chosen = random.Random(seed)
    path = files.volume(2 * MIB)
    model = bytearray(2 * MIB)
    with opened(path) as fd, opened(path, os.O_RDWR | os.O_DIRECT) as direct, files.nbd(path) as client:
        arena = mmap.mmap(-1, 2 * MIB)
        for turn in range(300):
            kind, length = chosen.random(), chosen.choice([1, 100, 512, 4096, 10_000, 131_072, 1_300_000])
            offset = chosen.randrange(len(model) - length)
            if chosen.random() < 0.5:
                offset, length = offset // 512 * 512, -(-length // 512) * 512
            at = chosen.choice([fd, direct])
            if kind < 0.45:
                data = chosen.randbytes(length)
                arena[:length] = data
                with memoryview(arena)[:length] as view:
                    assert os.pwritev(at, [view], offset) == length, turn
                model[offset : offset + length] = data
            elif kind < 0.85:
                with memoryview(arena)[:length] as view:
                    assert os.preadv(at, [view], offset) == length, turn
                assert arena[:length] == model[offset : offset + length], (turn, offset, length)
            elif kind < 0.95:
                how = chosen.choice(["-p", "-z"])
                fallocate(how, path, offset, length)
                model[offset : offset + length] = bytes(length)
            elif kind < 0.98:
                os.fsync(fd)
            else:
                assert client.read(offset, length) == model[offset : offset + length], turn
        assert path.read_bytes() == model
        assert client.read(0, len(model)) == model


def fallocate(how: str, path: Path, offset: int, length: int) -> None:
    subprocess.run(["fallocate", how, "-o", str(offset), "-l", str(length), str(path)], check=True)


def test_what_an_nbd_client_writes_beneath_is_seen_at_once(files: Files) -> None:
    path = files.volume()
    with opened(path) as fd, files.nbd(path) as client:
        for number in range(1, 50):
            client.write(4096, bytes([number]) * 4096)
            assert os.pread(fd, 4096, 4096) == bytes([number]) * 4096
            os.pwrite(fd, bytes([number, number]), 100)
            assert client.read(100, 2) == bytes([number, number])


def test_holes_are_found_made_and_given_back(files: Files) -> None:
    path = files.volume()
    with opened(path) as fd:
        with fails(errno.ENXIO):
            os.lseek(fd, 0, os.SEEK_DATA)
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
        os.pwrite(fd, PATTERN[: 2 * MIB], MIB)
        assert os.lseek(fd, 0, os.SEEK_DATA) == MIB
        assert os.lseek(fd, MIB, os.SEEK_HOLE) == 3 * MIB
        fallocate("-p", path, 2 * MIB, 64 << 10)
        assert os.lseek(fd, MIB, os.SEEK_HOLE) == 2 * MIB
        assert os.lseek(fd, 2 * MIB, os.SEEK_DATA) == 2 * MIB + (64 << 10)
        with fails(errno.ENXIO):
            os.lseek(fd, SIZE, os.SEEK_HOLE)
        assert os.lseek(fd, -1, os.SEEK_END) == SIZE - 1
        fallocate("-z", path, MIB, MIB)
        assert os.pread(fd, SIZE, 0) == bytes(2 * MIB + (64 << 10)) + PATTERN[MIB + (64 << 10) : 2 * MIB] + bytes(
            SIZE - 3 * MIB
        )
        fallocate("-p", path, 0, SIZE)
        assert os.pread(fd, SIZE, 0) == bytes(SIZE)
    promise = subprocess.run(["fallocate", "-l", "1M", path], capture_output=True, text=True, check=False)
    assert promise.returncode and "not supported" in promise.stderr
    collapse = subprocess.run(["fallocate", "-c", "-l", "1M", path], capture_output=True, text=True, check=False)
    assert collapse.returncode and "not supported" in collapse.stderr


def test_nothing_is_made_removed_renamed_or_resized_through_files(files: Files) -> None:
    path = files.volume()
    with opened(path) as fd:
        os.pwrite(fd, b"still here", 0)
        with fails(errno.EPERM):
            os.ftruncate(fd, 0)
        os.ftruncate(fd, SIZE)  # as it is
    with fails(errno.EPERM):
        os.open(path, os.O_RDWR | os.O_TRUNC)
    with fails(errno.EPERM):
        os.truncate(path, 4096)
    with fails(errno.EPERM):
        os.open(path.with_name("new"), os.O_RDWR | os.O_CREAT)
    with fails(errno.EPERM):
        path.unlink()
    with fails(errno.EPERM):
        path.parent.joinpath("directory").mkdir()
    with fails(errno.EPERM):
        path.parent.rmdir()
    with fails(errno.EPERM):
        path.rename(path.with_name("other"))
    with fails(errno.EPERM):
        path.with_name("link").symlink_to("x")
    with fails(errno.EPERM):
        path.with_name("link").hardlink_to(path)
    with fails(errno.EPERM):
        path.chmod(0o777)
    with fails(errno.EPERM):
        os.chown(path, 1, 1)
    path.chmod(0o600)
    os.utime(path)
    assert path.read_bytes()[:10] == b"still here"


def test_a_file_ends_where_the_volume_does(files: Files) -> None:
    path = files.volume()
    with opened(path) as fd:
        assert os.pwrite(fd, PATTERN[:8192], SIZE - 100) == 100
        assert os.pread(fd, 8192, SIZE - 100) == PATTERN[:100]
        for offset in (SIZE, SIZE + 4096, 1 << 40):
            with fails(errno.ENOSPC):
                os.pwrite(fd, b"x", offset)
            assert os.pread(fd, 10, offset) == b""
        assert os.fstat(fd).st_size == SIZE


def test_a_volume_in_use_is_not_deleted_and_a_new_one_of_its_name_is_another_file(files: Files) -> None:
    path = files.volume()
    old = path.stat().st_ino
    with opened(path):
        with pytest.raises(ApiError) as refused:
            files.daemon.api("DELETE", volume(path))
        assert refused.value.errno == "EBUSY"

    def delete() -> bool:
        try:
            files.daemon.api("DELETE", volume(path))
        except ApiError as error:
            assert error.errno == "EBUSY"  # close(2) doesn't wait for a FUSE server
            return False
        return True

    until("deleted once it is closed", delete, 2.0)
    files.daemon.api("POST", "/v1/pools/p/volumes", {"name": path.name, "size": 2 * SIZE})
    until("it is another file", lambda: path.stat().st_ino != old, 2.0)
    assert path.stat().st_size == 2 * SIZE and path.read_bytes() == bytes(2 * SIZE)


def test_after_a_forced_rollback_what_was_open_is_stale_and_the_new_state_untouched(files: Files) -> None:
    path = files.volume()
    with opened(path) as fd:
        os.pwrite(fd, PATTERN[:MIB], 0)
        files.snapshot(path, "good")
        os.pwrite(fd, bytes(MIB), 0)
        body = {"force": True, "safety": False}
        files.daemon.api("POST", f"{volume(path)}/snapshots/good/rollback", body)
        with fails(errno.ESTALE):
            os.pwrite(fd, b"for what is no more", 0)
        with fails(errno.ESTALE):
            os.pread(fd, 4096, 0)
        with fails(errno.ESTALE):
            os.lseek(fd, 0, os.SEEK_DATA)
        with opened(path) as new:
            assert os.pread(new, MIB, 0) == PATTERN[:MIB]
            os.pwrite(new, b"new", 0)
            with fails(errno.ESTALE):
                os.pread(fd, 4096, 0)
            assert os.pread(new, 3, 0) == b"new"


def test_a_full_pool_is_enospc_and_room_that_is_given_back_can_be_written(files: Files) -> None:
    path = files.volume(64 * MIB, pool="small")
    with opened(path) as fd:
        written = 0
        with fails(errno.ENOSPC):
            while written < 64 * MIB:
                assert os.pwrite(fd, PATTERN[written % 4096 :][:MIB], written) == MIB
                written += MIB
        for offset in range(0, written, MIB):
            assert os.pread(fd, MIB, offset) == PATTERN[offset % 4096 :][:MIB]
        fallocate("-p", path, 0, 64 * MIB)
        os.fsync(fd)

        def fits() -> bool:
            try:
                return os.pwrite(fd, PATTERN[:MIB], 0) == MIB
            except OSError as error:
                assert error.errno == errno.ENOSPC
                return False

        until("there is room again", fits)
    fallocate("-p", path, 0, 64 * MIB)


def test_a_damaged_block_is_eio_and_its_neighbours_are_read(files: Files) -> None:
    path = files.volume()
    block = random.Random(77).randbytes(4096)
    with opened(path) as fd:
        os.pwrite(fd, PATTERN[:4096] + block + PATTERN[4096:8192], 0)
        os.fsync(fd)
        with files.device.open("r+b") as device:
            place = device.read().find(block)
            assert place > 0
            os.pwrite(device.fileno(), b"rot", place + 1000)
        with fails(errno.EIO):
            os.pread(fd, 4096, 4096)
        assert os.pread(fd, 4096, 0) == PATTERN[:4096]
        assert os.pread(fd, 4096, 8192) == PATTERN[4096:8192]
        os.pwrite(fd, block, 4096)
        assert os.pread(fd, 4096, 4096) == block
