"""Backups of the real daemon's snapshots, and what comes back of them."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system import nbdclient
from tests.system.daemon import Daemon, environment, program
from tiers.layout import BLOCK_BYTES

pytestmark = pytest.mark.system

MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path / "home") as daemon:
        daemon.cli("pool", "create", "p", "--fast", f"{tmp_path}/fast=512M")
        daemon.cli("volume", "create", "p/v", str(SIZE))
        yield daemon


def write(daemon: Daemon, export: str, *pieces: tuple[int, bytes]) -> None:
    with nbdclient.Connection(daemon.socket, export) as connection:
        for offset, data in pieces:
            connection.write(offset, data)


def content(daemon: Daemon, export: str) -> bytes:
    with nbdclient.Connection(daemon.socket, export) as connection:
        return b"".join(connection.read(at, MIB) for at in range(0, SIZE, MIB))


def test_a_full_backup_and_its_increments_come_back_after_the_volume_is_gone(daemon: Daemon, tmp_path: Path) -> None:
    rng = random.Random(1)
    write(daemon, "p/v", (0, rng.randbytes(8 * MIB)), (40 * MIB, b"text " * 100_000))
    daemon.cli("snapshot", "create", "p/v@a")
    write(daemon, "p/v", (MIB, rng.randbytes(MIB)), (60 * MIB + 512, b"x" * 1000))
    daemon.cli("snapshot", "create", "p/v@b")
    with nbdclient.Connection(daemon.socket, "p/v") as connection:
        connection.trim(2 * MIB, 3 * MIB)
        connection.flush()
    daemon.cli("snapshot", "create", "p/v@c")
    expected = {name: content(daemon, f"p/v@{name}") for name in "abc"}
    streams = [str(tmp_path / name) for name in ("full", "one", "two")]
    daemon.cli("backup", "p/v@a", streams[0])
    daemon.cli("backup", "p/v@b", streams[1], "--since", "a")
    daemon.cli("backup", "p/v@c", streams[2], "--since", "b")
    daemon.cli("volume", "delete", "--snapshots", "--yes", "p/v")
    for stream in streams:
        daemon.cli("backup", "verify", stream)
    refused = daemon.cli("restore", "p/new", streams[0], streams[2], status=1)
    assert "based on" in refused.stderr
    daemon.cli("restore", "p/new", *streams[:2])
    assert content(daemon, "p/new") == expected["b"]
    daemon.cli("restore", "p/new", streams[2])
    assert content(daemon, "p/new") == expected["c"]
    daemon.cli("pool", "check", "p", "--full")


def test_an_increment_is_what_has_changed_and_goes_through_a_pipe(daemon: Daemon, tmp_path: Path) -> None:
    rng = random.Random(2)
    write(daemon, "p/v", *((at, rng.randbytes(MIB)) for at in range(0, SIZE, MIB)))
    daemon.cli("snapshot", "create", "p/v@a")
    blocks = rng.sample(range(SIZE // BLOCK_BYTES), SIZE // BLOCK_BYTES // 100)
    write(daemon, "p/v", *((block * BLOCK_BYTES, rng.randbytes(BLOCK_BYTES)) for block in blocks))
    daemon.cli("snapshot", "create", "p/v@b")
    env = environment() | {"TERRACE_HOME": str(daemon.home)}
    terrace = program("terrace", "terrace.cli")
    increment = subprocess.run(
        [*terrace, "backup", "p/v@b", "-", "--since", "a"], env=env, capture_output=True, check=True, timeout=60
    ).stdout
    assert SIZE // 100 * 0.98 < len(increment) < SIZE * 0.015
    full = subprocess.Popen([*terrace, "backup", "p/v@a", "-"], env=env, stdout=subprocess.PIPE)
    with full:
        subprocess.run([*terrace, "restore", "p/new", "-"], env=env, stdin=full.stdout, check=True, timeout=60)
    assert full.wait() == 0
    subprocess.run([*terrace, "restore", "p/new", "-"], env=env, input=increment, check=True, timeout=60)
    assert content(daemon, "p/new") == content(daemon, "p/v@b")


def test_a_directory_keeps_a_chain_over_a_rollback_and_a_restart(daemon: Daemon, tmp_path: Path) -> None:
    rng = random.Random(3)
    there = str(tmp_path / "backups")
    Path(there).mkdir()
    write(daemon, "p/v", (0, rng.randbytes(4 * MIB)))
    daemon.cli("backup", "p/v", "--to", there)
    write(daemon, "p/v", (MIB, rng.randbytes(MIB)))
    daemon.cli("snapshot", "create", "p/v@mark")
    daemon.cli("backup", "p/v", "--to", there)
    write(daemon, "p/v", (0, b"y" * MIB))
    daemon.kill()
    daemon.start()
    daemon.cli("snapshot", "rollback", "--no-safety", "--yes", "p/v@mark")
    write(daemon, "p/v", (20 * MIB, b"z" * MIB))
    expected = content(daemon, "p/v")
    daemon.cli("backup", "p/v", "--to", there)
    kinds = sorted(path.name.split(".")[-2] for path in Path(there).glob("*.tbk"))
    assert kinds == ["full", "inc", "inc"]
    daemon.cli("backup", "verify", there)
    daemon.cli("restore", "p/again", there)
    assert content(daemon, "p/again") == expected
