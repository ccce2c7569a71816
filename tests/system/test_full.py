"""No room: a full pool or disk says ENOSPC and keeps what it acknowledged, and space given back can be used."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.daemon import Daemon
from tests.system.nbdclient import WRITE, Connection

pytestmark = pytest.mark.system
MIB = 1 << 20
PATTERN = random.Random(1).randbytes(64 << 10)


def fill(connection: Connection, chunk: int = MIB) -> int:
    """Writes random data from the start until ENOSPC; returns the bytes that were acknowledged before it."""
    data = random.Random(3).randbytes(chunk + 4096)
    for index, offset in enumerate(range(0, connection.size_bytes, chunk)):
        try:
            connection.write(offset, memoryview(data)[index % 4096 :][:chunk])
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            return offset
    raise AssertionError(f"{connection.size_bytes} bytes fitted: the pool never got full")


def check_filled(connection: Connection, length: int, chunk: int = MIB) -> None:
    data = random.Random(3).randbytes(chunk + 4096)
    for index, offset in enumerate(range(0, length, chunk)):
        assert connection.read(offset, chunk) == data[index % 4096 :][:chunk], f"at {offset}"


def until(what: str, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.1)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon for one test, which may do to it what it likes."""
    with Daemon(tmp_path / "home") as daemon:
        yield daemon


def test_a_full_pool_says_enospc_serves_reads_and_gets_its_space_back(own: Daemon, tmp_path: Path) -> None:
    own.cli("pool", "create", "p", "--fast", f"{tmp_path}/fast=64M", "--base", f"{tmp_path}/base=96M")
    for name in ("a", "b"):
        own.cli("volume", "create", f"p/{name}", "10G")
    with Connection(own.socket, "p/a") as a, Connection(own.socket, "p/b") as b:
        b.write(0, PATTERN)
        filled = fill(a)
        assert filled >= 0.75 * 160 * MIB, f"only {filled >> 20} MiB of 160 fitted"
        assert b.read(0, len(PATTERN)) == PATTERN
        with pytest.raises(OSError, match="No space left"):
            for number in range(64):  # what a MiB was too large for may still take a few of these
                b.write(512 * MIB + number * len(PATTERN), PATTERN)
        for connection in (a, b):
            connection.flush()
        check_filled(a, filled)

        a.write_zeroes(0, filled // 2)
        a.trim(filled // 2, filled // 4 // 4096 * 4096)

        def writable() -> bool:
            try:
                b.write(512 * MIB, PATTERN * 16)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                return False
            return True

        until("space trimmed from one volume can be written in the other", writable)
        assert b.read(512 * MIB, len(PATTERN) * 16) == PATTERN * 16
        assert not any(a.read(0, MIB))
        refilled = 0
        a.write(0, PATTERN * 16)
        for offset in range(0, filled // 2, MIB):
            a.write(offset, PATTERN * 16)
            refilled += MIB
        assert refilled >= filled // 2
    own.cli("volume", "delete", "p/a", "--yes")
    assert len(own.api("GET", "/v1/pools/p/volumes")) == 1
    own.kill()
    own.start()
    own.cli("volume", "create", "p/c", "1G")
    with Connection(own.socket, "p/c") as c, Connection(own.socket, "p/b") as b:
        until("a deleted volume's space is back", lambda: own.pool("p")["available_bytes"] > 80 * MIB)
        for offset in range(0, 64 * MIB, MIB):
            c.write(offset, PATTERN * 16)
        assert b.read(0, len(PATTERN)) == PATTERN
    own.cli("pool", "check", "p", "--full")


def test_a_full_pool_that_is_killed_opens_again_and_can_be_trimmed(own: Daemon, tmp_path: Path) -> None:
    own.cli("pool", "create", "p", "--fast", f"{tmp_path}/fast=96M")
    own.cli("volume", "create", "p/a", "1G")
    for _ in range(3):
        with Connection(own.socket, "p/a") as a:
            filled = fill(a)
            own.kill()
        own.start()
        with Connection(own.socket, "p/a") as a:
            check_filled(a, filled)
            a.trim(0, a.size_bytes)
            assert not any(a.read(filled - MIB, MIB))
    own.cli("pool", "check", "p", "--full")


def test_a_full_volume_is_overwritten_at_random_in_a_pool_of_its_size_over_085(own: Daemon, tmp_path: Path) -> None:
    size_bytes = 256 * MIB
    own.cli("pool", "create", "p", "--fast", f"{tmp_path}/fast={int(size_bytes / 0.85)}")
    own.cli("volume", "create", "p/v", str(size_bytes))
    rng = random.Random(4)
    data = memoryview(rng.randbytes(MIB + 4096))
    blocks = size_bytes // 4096
    holds = [0] * blocks  # where in `data` a block's bytes begin
    waiting: dict[int, int] = {}  # cookie -> block
    with Connection(own.socket, "p/v", timeout_s=30) as connection:

        def take_reply() -> None:
            reply = connection.reply()
            block = waiting.pop(reply.cookie)
            assert reply.error == 0, f"block {block}: {os.strerror(reply.error)}; {own.pool('p')}"

        for number in range(2 * blocks):
            block = number if number < blocks else rng.randrange(blocks)
            while len(waiting) == 32 or block in waiting.values():
                take_reply()
            holds[block] = rng.randrange(MIB)
            waiting[connection.send(WRITE, block * 4096, 4096, data[holds[block] :][:4096])] = block
        while waiting:
            take_reply()
        for start in range(0, blocks, 256):
            expected = b"".join(data[holds[block] :][:4096] for block in range(start, start + 256))
            assert connection.read(start * 4096, MIB) == expected, f"at {start * 4096}"
    own.cli("pool", "check", "p", "--full")


def test_a_full_disk_under_a_sparse_device_harms_only_its_own_pool(tmp_path: Path) -> None:
    """A tmpfs of 48 MiB under a device of 256 MiB, in a mount namespace of the daemon's own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=48m none {disk} && exec "$@"'
    wrap = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c", mount, "sh"]
    with Daemon(tmp_path / "home", wrap=wrap) as daemon:
        daemon.cli("pool", "create", "small", "--fast", f"{disk}/device=256M")
        daemon.cli("pool", "create", "fine", "--fast", f"{tmp_path}/device=64M")
        for name in ("small/a", "fine/b"):
            daemon.cli("volume", "create", name, "1G")
        with Connection(daemon.socket, "small/a") as a, Connection(daemon.socket, "fine/b") as b:
            b.write(0, PATTERN)
            offset = 0
            refused = None
            while refused is None and offset < 256 * MIB:
                try:
                    a.write(offset, PATTERN * 16)
                    offset += MIB
                except OSError as error:
                    refused = error.errno
            assert refused in (errno.ENOSPC, errno.EIO), f"{offset >> 20} MiB fitted on a disk of 48"
            for start in range(0, offset, MIB):
                assert a.read(start, MIB) == PATTERN * 16, f"acknowledged data at {start} is gone"
            assert b.read(0, len(PATTERN)) == PATTERN
            b.write(MIB, PATTERN)
            b.flush()
        assert daemon.alive()
        shown = {pool["name"]: pool for pool in daemon.api("GET", "/v1/pools")}
        assert shown["fine"]["state"] == "online"
        daemon.cli("pool", "check", "fine", "--full")
