"""Snapshots, clones, rollbacks and images with the real daemon and clients that are not ours."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import Run
from tests.system.daemon import ApiError, Daemon, environment, program
from tests.system.nbdclient import READ, TRIM, WRITE, Connection
from tests.terrace.test_cli import on_a_terminal

pytestmark = pytest.mark.system
MIB = 1 << 20
SIZE = 16 * MIB

SLOW = """
[policy.slow]
bandwidth_limit = "8M"
"""
"""So slow that an import is surely under way when it is interrupted."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("snapshots")
    with Daemon(directory / "home", SLOW) as daemon:
        devices = ["--fast", f"{directory}/fast={256 * MIB}", "--base", f"{directory}/base={512 * MIB}"]
        daemon.cli("pool", "create", "p", *devices)
        yield daemon
        assert daemon.api("POST", "/v1/pools/p/checkpoint")["state"] == "online"
        assert "is sound" in daemon.cli("pool", "check", "p", "--full").stdout
        assert daemon.stop() == 0


@pytest.fixture
def volumes(daemon: Daemon) -> Iterator[Daemon]:
    """The daemon; every volume is deleted afterwards, with its snapshots."""
    yield daemon
    for found in daemon.api("GET", "/v1/pools/p/volumes"):
        wait_until_unused(daemon, found["name"])
        daemon.api("DELETE", f"/v1/pools/p/volumes/{found['name'][2:]}?snapshots=1")


def wait_until_unused(daemon: Daemon, export: str) -> None:
    while any(one["export"].split("@")[0] == export for one in daemon.api("GET", "/v1/status")["nbd"]["connections"]):
        time.sleep(0.01)


def create(daemon: Daemon, *names: str, size_bytes: int = SIZE) -> None:
    for name in names:
        daemon.api("POST", "/v1/pools/p/volumes", {"name": name, "size": size_bytes})


def take(daemon: Daemon, name: str, *volumes: str) -> None:
    daemon.api("POST", "/v1/pools/p/snapshots", {"name": name, "volumes": list(volumes)})


def snapshot(daemon: Daemon, volume: str, name: str) -> Any:
    return daemon.api("GET", f"/v1/pools/p/volumes/{volume}/snapshots/{name}")


def fill(daemon: Daemon, volume: str, seed: int, offset: int = 0, length: int = MIB) -> None:
    with Connection(daemon.socket, f"p/{volume}") as connection:
        connection.write(offset, random.Random(seed).randbytes(length))
        connection.flush()
    wait_until_unused(daemon, f"p/{volume}")


def has(daemon: Daemon, export: str, seed: int, offset: int = 0, length: int = MIB) -> bool:
    with Connection(daemon.socket, f"p/{export}") as connection:
        found = connection.read(offset, length) == random.Random(seed).randbytes(length)
    wait_until_unused(daemon, f"p/{export}".split("@")[0])
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- what a snapshot shows -----------------------------------------------------------------------------------


def test_a_snapshot_stays_what_it_was_while_its_volume_is_written_to(volumes: Daemon, run: Run, tmp_path: Path) -> None:
    create(volumes, "v")
    live, old = volumes.uri("p/v"), volumes.uri("p/v@s", tcp=True)
    qemu_io = ("qemu-io", "-f", "raw", "-t", "writeback")
    run(*qemu_io, "-c", "write -P 0x11 0 4M", "-c", "write -P 0x22 8M 64k", live)
    assert "p/v@s" in volumes.cli("snapshot", "create", "p/v@s").stdout
    stop = threading.Event()

    def churn() -> None:
        rng = random.Random(1)
        with Connection(volumes.socket, "p/v") as connection:
            while not stop.is_set():
                at = rng.randrange(SIZE >> 12) << 12
                connection.write(at, b"\xee" * 4096)
                if rng.random() < 0.1:
                    connection.trim(at, 65536 if at + 65536 <= SIZE else 4096)

    writer = threading.Thread(target=churn)
    writer.start()
    try:
        for _ in range(3):
            reads = ["read -P 0x11 0 4M", "read -P 0 4M 4M", "read -P 0x22 8M 64k", "read -P 0 9M 7M"]
            said = run(*qemu_io, "-r", *(part for read in reads for part in ("-c", read)), old)
            assert "verification failed" not in said, said
            run("nbdcopy", old, tmp_path / "old")
            volumes.api("POST", "/v1/pools/p/checkpoint")
    finally:
        stop.set()
        writer.join()
    expected = b"\x11" * 4 * MIB + bytes(4 * MIB) + b"\x22" * 65536 + bytes(8 * MIB - 65536)
    assert (tmp_path / "old").read_bytes() == expected
    wait_until_unused(volumes, "p/v")
    shown = snapshot(volumes, "v", "s")
    assert shown["referenced_bytes"] == 4 * MIB + 65536
    assert 0 < shown["exclusive_bytes"] <= shown["referenced_bytes"]


def test_an_ext4_in_a_snapshot_is_clean_and_has_its_files(volumes: Daemon, run: Run, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    text = random.Random(7).randbytes(300_000)
    (tmp_path / "files" / "letter").write_bytes(text)
    for name, content in (("first", "files"), ("second", None)):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, SIZE)
        run("/sbin/mke2fs", "-q", "-t", "ext4", *(["-d", content] if content else []), tmp_path / name)
    volumes.cli("volume", "import", str(tmp_path / "first"), "p/v")
    volumes.cli("snapshot", "create", "p/v@first")
    run("nbdcopy", tmp_path / "second", volumes.uri("p/v"))
    wait_until_unused(volumes, "p/v")
    volumes.cli("volume", "export", "p/v@first", str(tmp_path / "back"))
    volumes.cli("volume", "export", "p/v", str(tmp_path / "now"))
    run("/sbin/e2fsck", "-f", "-n", tmp_path / "back")
    run("/sbin/debugfs", "-R", f"dump letter {tmp_path}/out", tmp_path / "back")
    assert (tmp_path / "out").read_bytes() == text
    assert "letter" not in run("/sbin/debugfs", "-R", "ls", tmp_path / "now")


def test_a_snapshot_that_was_told_of_survives_a_kill(tmp_path: Path) -> None:
    with Daemon(tmp_path / "home") as daemon:
        daemon.cli("pool", "create", "p", "--fast", f"{tmp_path}/fast={128 * MIB}")
        create(daemon, "v", "w")
        for number in range(6):
            with Connection(daemon.socket, "p/v") as connection:
                connection.write(0, random.Random(number).randbytes(MIB))  # without a flush
                take(daemon, f"s{number}", "v", "w")
                connection.write(0, bytes(MIB))
                daemon.kill()
            daemon.start()
            assert len(daemon.api("GET", "/v1/pools/p/snapshots")) == 2 * (number + 1)
            for kept in range(number + 1):
                assert has(daemon, f"v@s{kept}", kept)
        daemon.api("POST", "/v1/pools/p/volumes/v/snapshots/s2/rollback", {"keep_as": "was"})
        daemon.api("DELETE", "/v1/pools/p/volumes/v/snapshots/s4")
        daemon.kill()
        daemon.start()
        names = [one["snapshot"] for one in daemon.api("GET", "/v1/pools/p/volumes/v/snapshots")]
        assert names == ["s0", "s1", "s2", "s3", "s5", "was"]
        assert has(daemon, "v", 2)
        assert "is sound" in daemon.cli("pool", "check", "p", "--full").stdout


def test_a_group_is_of_one_instant_under_a_writer_in_lockstep(volumes: Daemon) -> None:
    create(volumes, "a", "b")
    stop = threading.Event()

    def lockstep() -> None:
        with Connection(volumes.socket, "p/a") as a, Connection(("127.0.0.1", volumes.port), "p/b") as b:
            step = 0
            while not stop.is_set():
                step += 1
                for connection in (a, b):
                    connection.write(step % 64 * 4096, struct.pack(">Q", step) * 512)
                    connection.write(SIZE - 4096, struct.pack(">Q", step) * 512)

    writer = threading.Thread(target=lockstep)
    writer.start()
    try:
        for number in range(20):
            time.sleep(random.Random(number).random() / 50)
            volumes.api("POST", "/v1/pools/p/snapshots", {"name": f"g{number}", "volumes": ["b", "a"]})
    finally:
        stop.set()
        writer.join()
    wait_until_unused(volumes, "p/a")
    pairs = []
    for number in range(20):
        with (
            Connection(volumes.socket, f"p/a@g{number}") as a,
            Connection(volumes.socket, f"p/b@g{number}") as b,
        ):
            pairs.append([struct.unpack(">Q", one.read(SIZE - 4096, 8))[0] for one in (a, b)])
    assert all(a - b in (0, 1) for a, b in pairs), pairs
    assert pairs[-1][0] > pairs[0][0]


def test_a_snapshot_has_the_size_that_its_volume_had(volumes: Daemon) -> None:
    create(volumes, "v")
    fill(volumes, "v", 1, offset=8 * MIB)
    take(volumes, "large", "v")
    volumes.cli("volume", "resize", "p/v", "4M", "--shrink")
    take(volumes, "small", "v")
    volumes.cli("volume", "resize", "p/v", "32M")
    fill(volumes, "v", 2, offset=8 * MIB)
    assert [snapshot(volumes, "v", name)["size_bytes"] for name in ("large", "small")] == [SIZE, 4 * MIB]
    assert has(volumes, "v@large", 1, offset=8 * MIB)
    said = volumes.cli("snapshot", "rollback", "p/v@large").stdout
    assert "It has 16 MiB again, as then; it had 32 MiB." in said
    assert has(volumes, "v", 1, offset=8 * MIB)
    volumes.cli("snapshot", "rollback", "p/v@small")
    assert volumes.api("GET", "/v1/pools/p/volumes/v")["size_bytes"] == 4 * MIB


# -- clones, rollbacks, deletions ----------------------------------------------------------------------------


def test_clones_of_clones_live_on_whatever_is_deleted(volumes: Daemon) -> None:
    create(volumes, "v0")
    for depth in range(4):
        fill(volumes, f"v{depth}", depth, offset=depth * MIB)
        take(volumes, "s", f"v{depth}")
        said = volumes.cli("volume", "clone", f"p/v{depth}@s", f"p/v{depth + 1}").stdout
        assert f"a clone of p/v{depth}@s" in said
    fill(volumes, "v4", 99, offset=2 * MIB)

    def check() -> None:
        for depth in (0, 1, 3):
            assert has(volumes, "v4", depth, offset=depth * MIB)
        assert has(volumes, "v4", 99, offset=2 * MIB)

    check()
    assert "stay for p/v3" in volumes.cli("snapshot", "delete", "p/v2@s", "--yes").stdout
    volumes.cli("volume", "delete", "p/v1", "--snapshots", "--yes")
    check()
    volumes.cli("volume", "delete", "p/v0", "--snapshots", "--yes")
    volumes.cli("volume", "delete", "p/v2", "--yes")
    volumes.api("POST", "/v1/pools/p/checkpoint")
    check()
    assert has(volumes, "v3", 2, offset=2 * MIB)
    volumes.cli("volume", "delete", "p/v3", "--snapshots", "--yes")
    check()
    assert [one["name"] for one in volumes.api("GET", "/v1/pools/p/volumes")] == ["p/v4"]
    assert "is sound" in volumes.cli("pool", "check", "p", "--full").stdout


def test_promoting_is_refused_for_the_snapshots_that_are_in_its_way_and_no_others(volumes: Daemon) -> None:
    create(volumes, "v")
    fill(volumes, "v", 1)
    for name in ("old", "older"):
        take(volumes, name, "v")
    volumes.cli("snapshot", "rollback", "p/v@old", "--no-safety", "--yes")
    take(volumes, "since", "v")
    told = volumes.cli("volume", "promote", "p/v", status=1).stderr
    assert "has 1 snapshot taken since" in told
    assert "(since)" in told
    volumes.cli("volume", "clone", "p/v@since", "p/c")
    volumes.cli("snapshot", "delete", "p/v@since", "--yes")
    assert "promote or delete these first" in volumes.cli("volume", "promote", "p/v", status=1).stderr
    volumes.cli("volume", "promote", "p/c")
    volumes.cli("volume", "promote", "p/v")
    assert [one["snapshot"] for one in volumes.api("GET", "/v1/pools/p/volumes/v/snapshots")] == ["old", "older"]


def test_deleting_a_volume_asks_with_all_that_it_shows(volumes: Daemon) -> None:
    """What a clone has of its snapshot is gone with it as well."""
    create(volumes, "v")
    fill(volumes, "v", 1)
    take(volumes, "s", "v")
    volumes.cli("volume", "clone", "p/v@s", "p/c")
    assert volumes.api("GET", "/v1/pools/p/volumes/c")["mapped_bytes"] == 0
    _, written = on_a_terminal(volumes.home, "volume", "delete", "p/c", answer="n\n")
    assert "Delete volume p/c with 1 MiB of data for good?" in written


def test_an_image_for_a_directory_that_is_not_there_is_refused_by_its_name(volumes: Daemon, tmp_path: Path) -> None:
    create(volumes, "v")
    fill(volumes, "v", 1)
    told = volumes.cli("volume", "export", "p/v", str(tmp_path / "none" / "image"), status=1).stderr
    assert told == f"Error: {tmp_path}/none is not a directory that exists; make it, or name another FILE\n"


def test_a_clone_that_is_promoted_needs_nobody(volumes: Daemon) -> None:
    create(volumes, "v")
    fill(volumes, "v", 1, length=4 * MIB)
    take(volumes, "s", "v")
    volumes.cli("volume", "clone", "p/v@s", "p/c")
    fill(volumes, "c", 2, offset=2 * MIB)
    assert "4 MiB are its own" in volumes.cli("volume", "promote", "p/c").stdout
    found = volumes.api("GET", "/v1/pools/p/volumes/c")
    assert (found["origin"], found["mapped_bytes"]) == (None, 4 * MIB)
    volumes.cli("volume", "delete", "p/v", "--snapshots", "--yes")
    assert has(volumes, "c", 2, offset=2 * MIB)
    with Connection(volumes.socket, "p/c") as connection:
        assert connection.read(0, 2 * MIB) == random.Random(1).randbytes(4 * MIB)[: 2 * MIB]
    assert "no clone" in volumes.cli("volume", "promote", "p/c", status=1).stderr


def test_a_rollback_brings_the_old_bytes_back_and_can_be_undone(volumes: Daemon) -> None:
    create(volumes, "v")
    fill(volumes, "v", 1)
    take(volumes, "s", "v")
    fill(volumes, "v", 2)
    said = volumes.cli("snapshot", "rollback", "p/v@s").stdout
    assert has(volumes, "v", 1)
    kept = said.split("What it was before is p/")[1].split(":")[0]
    assert kept.startswith("v@before-rollback-")
    assert has(volumes, kept, 2)
    volumes.cli("snapshot", "rollback", f"p/{kept}", "--no-safety", "--yes")
    assert has(volumes, "v", 2)
    names = [one["snapshot"] for one in volumes.api("GET", "/v1/pools/p/volumes/v/snapshots")]
    assert names == ["s", kept.partition("@")[2]]
    fill(volumes, "v", 3)
    assert has(volumes, "v", 3)
    assert has(volumes, "v@s", 1)


def test_a_rollback_under_a_client_is_refused_and_forced_it_fails_its_requests(volumes: Daemon) -> None:
    create(volumes, "v")
    fill(volumes, "v", 1)
    take(volumes, "s", "v")
    with Connection(("127.0.0.1", volumes.port), "p/v") as connection:
        peer = "{}:{}".format(*connection.socket.getsockname())
        line = volumes.cli("snapshot", "rollback", "p/v@s", status=1).stderr
        assert f"p/v is in use by {peer}" in line
        assert "--force" in line
        connection.write(0, b"x" * 4096)
        volumes.cli("snapshot", "rollback", "p/v@s", "--force", "--yes")
        for _ in range(3):  # not even when others have taken over what it had
            for command, data in ((READ, b""), (WRITE, b"y" * 4096), (TRIM, b"")):
                with pytest.raises(OSError):
                    connection.call(command, 0, 4096, data)
            volumes.api("POST", "/v1/pools/p/checkpoint")
        connection.flush()  # what was acknowledged is durable, in the safety snapshot
        assert has_now(volumes, "v", 1)


def has_now(daemon: Daemon, export: str, seed: int) -> bool:
    with Connection(daemon.socket, f"p/{export}") as connection:
        return connection.read(0, MIB) == random.Random(seed).randbytes(MIB)


def test_a_snapshot_in_use_is_not_deleted_and_its_reader_is_named(volumes: Daemon) -> None:
    create(volumes, "v")
    take(volumes, "s", "v")
    with Connection(volumes.socket, "p/v@s"):
        assert "in use" in volumes.cli("snapshot", "delete", "p/v@s", "--yes", status=1).stderr
        with pytest.raises(ApiError, match=rf"unix client \d+ \(process {os.getpid()}\)"):
            volumes.api("DELETE", "/v1/pools/p/volumes/v/snapshots/s")
        assert "p/v@s" in volumes.cli("volume", "delete", "p/v", "--snapshots", "--yes", status=1).stderr
        assert "p/v@s" in volumes.cli("pool", "delete", "p", "--yes", status=1).stderr


def test_what_only_a_snapshot_has_comes_back_with_it(volumes: Daemon) -> None:
    create(volumes, "v")
    fill(volumes, "v", 1, length=4 * MIB)
    take(volumes, "s", "v")
    fill(volumes, "v", 2, length=3 * MIB)
    before = volumes.api("GET", "/v1/pools/p")["used_bytes"]
    assert snapshot(volumes, "v", "s")["exclusive_bytes"] == 3 * MIB
    assert "3 MiB come back" in volumes.cli("snapshot", "delete", "p/v@s", "--yes").stdout
    deadline_s = time.monotonic() + 10
    while before - volumes.api("GET", "/v1/pools/p")["used_bytes"] < 3 * MIB:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def test_a_full_pool_takes_no_snapshot_and_says_what_is_missing_but_deletes_them(tmp_path: Path) -> None:
    with Daemon(tmp_path / "home") as daemon:
        daemon.cli("pool", "create", "p", "--fast", f"{tmp_path}/fast={64 * MIB}")
        create(daemon, "v", size_bytes=128 * MIB)
        fill(daemon, "v", 0)
        take(daemon, "s", "v")
        with Connection(daemon.socket, "p/v") as connection, pytest.raises(OSError, match="No space"):
            for at in range(0, 128 * MIB, MIB):
                connection.write(at, random.Random(at).randbytes(MIB))
        line = daemon.cli("snapshot", "create", "p/v@t", status=1).stderr
        assert "are missing" in line
        assert "too full for a snapshot" in line
        daemon.cli("snapshot", "delete", "p/v@s", "--yes")


# -- what changed --------------------------------------------------------------------------------------------


def test_a_stock_client_sees_what_changed_between_two_snapshots(volumes: Daemon, run: Run) -> None:
    create(volumes, "v")
    fill(volumes, "v", 1, length=2 * MIB)
    take(volumes, "monday", "v")
    fill(volumes, "v", 2, offset=MIB, length=65536)
    with Connection(volumes.socket, "p/v") as connection:
        connection.trim(0, 8192)
        connection.flush()
    take(volumes, "tuesday", "v")
    fill(volumes, "v", 3, offset=8 * MIB, length=4096)
    take(volumes, "wednesday", "v")

    def changes(version: str, since: str) -> list[tuple[int, int]]:
        told = run("nbdinfo", "--json", f"--map=terrace:diff:{since}", volumes.uri(f"p/v@{version}"))
        return [(one["offset"], one["length"]) for one in json.loads(told) if one["type"]]

    assert changes("tuesday", "monday") == [(0, 8192), (MIB, 65536)]
    assert changes("wednesday", "tuesday") == [(8 * MIB, 4096)]
    assert changes("wednesday", "monday") == [(0, 8192), (MIB, 65536), (8 * MIB, 4096)]
    assert changes("monday", "tuesday") == changes("tuesday", "monday")
    offered = run("nbdinfo", volumes.uri("p/v@tuesday"))
    assert "terrace:diff:monday" in offered
    assert "terrace:diff:tuesday" not in offered
    refused = subprocess.run(
        ["nbdinfo", "--map=terrace:diff:none", volumes.uri("p/v@tuesday")], capture_output=True, text=True, check=False
    )
    assert refused.returncode


def test_nbdinfo_lists_volumes_and_their_newest_snapshots(volumes: Daemon, run: Run) -> None:
    create(volumes, "v")
    for number in range(70):
        take(volumes, f"s{number}", "v")
    listed = json.loads(run("nbdinfo", "--list", "--json", f"nbd+unix:///?socket={volumes.socket}"))
    names = [export["export-name"] for export in listed["exports"]]
    assert names == ["p/v", *(f"p/v@s{number}" for number in range(6, 70))]
    assert [export["is_read_only"] for export in listed["exports"][:2]] == [False, True]


def test_a_backup_of_a_snapshot_becomes_another_volume(volumes: Daemon, tmp_path: Path) -> None:
    create(volumes, "v")
    fill(volumes, "v", 1)
    take(volumes, "monday", "v")
    fill(volumes, "v", 2, offset=4 * MIB)
    take(volumes, "tuesday", "v")
    volumes.cli("backup", "p/v@monday", str(tmp_path / "full"))
    volumes.cli("backup", "p/v@tuesday", str(tmp_path / "more"), "--since", "monday")
    volumes.cli("restore", "p/w", str(tmp_path / "full"), str(tmp_path / "more"))
    assert has(volumes, "w", 1)
    assert has(volumes, "w", 2, offset=4 * MIB)


# -- images --------------------------------------------------------------------------------------------------


def sparse_image(path: Path, size_bytes: int = SIZE) -> str:
    with path.open("wb") as image:
        image.truncate(size_bytes)
        image.write(random.Random(1).randbytes(MIB))
        image.seek(5 * MIB)
        image.write(random.Random(2).randbytes(MIB))
    return digest(path)


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "vmdk"])
def test_an_image_comes_in_without_its_holes_and_goes_out_as_it_came(
    volumes: Daemon, run: Run, tmp_path: Path, image_format: str
) -> None:
    wanted = sparse_image(tmp_path / "raw")
    run("qemu-img", "convert", "-O", image_format, tmp_path / "raw", tmp_path / "image")
    made = volumes.cli_json("volume", "import", str(tmp_path / "image"), "p/v")
    assert (made["name"], made["size_bytes"], made["mapped_bytes"]) == ("p/v", SIZE, 2 * MIB)
    volumes.cli("volume", "export", "p/v", str(tmp_path / "out"))
    assert digest(tmp_path / "out") == wanted
    assert (tmp_path / "out").stat().st_blocks * 512 < 3 * MIB
    told = volumes.cli_json("volume", "export", "p/v", str(tmp_path / "out.qcow2"), "--format", "qcow2")
    assert (told["format"], told["size_bytes"]) == ("qcow2", SIZE)
    run("qemu-img", "compare", tmp_path / "raw", tmp_path / "out.qcow2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image", "out", "out.qcow2", "raw"]


@pytest.mark.parametrize("program", ["nbdcopy", "qemu-img"])
def test_either_program_copies_raw_images(volumes: Daemon, tmp_path: Path, program: str) -> None:
    wanted = sparse_image(tmp_path / "raw")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / program).symlink_to(str(shutil.which(program)))
    only = {"PATH": str(tmp_path / "bin"), "TERRACE_HOME": str(volumes.home)}
    for arguments in (["import", f"{tmp_path}/raw", "p/v", "--format", "raw"], ["export", "p/v", f"{tmp_path}/out"]):
        command = [sys.executable, "-m", "terrace.cli", "volume", *arguments]
        subprocess.run(command, check=True, capture_output=True, env=environment() | only)
    assert digest(tmp_path / "out") == wanted
    assert volumes.api("GET", "/v1/pools/p/volumes/v")["mapped_bytes"] == 2 * MIB
    assert (tmp_path / "out").stat().st_blocks * 512 < 3 * MIB


def test_of_a_volume_that_is_being_imported_no_snapshot_is_taken_and_a_failed_one_is_deleted(
    volumes: Daemon, tmp_path: Path
) -> None:
    sparse_image(tmp_path / "raw")
    (tmp_path / "bin").mkdir()
    failing = tmp_path / "bin" / "nbdcopy"
    failing.write_text(f"#!/bin/sh\n{sys.executable} -m terrace.cli snapshot create p/v@hourly && exit 0\nexit 1\n")
    failing.chmod(0o755)
    variables = environment() | {"PATH": str(failing.parent), "TERRACE_HOME": str(volumes.home)}
    command = [sys.executable, "-m", "terrace.cli", "volume", "import", str(tmp_path / "raw"), "p/v", "--format", "raw"]
    result = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert result.returncode == 1
    assert "the half-filled volume p/v was deleted" in result.stderr
    assert volumes.api("GET", "/v1/pools/p/volumes") == []


def test_an_image_of_an_odd_size_gets_a_volume_that_holds_it(volumes: Daemon, tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(random.Random(3).randbytes(10_001))
    (tmp_path / "tiny").write_bytes(b"tiny")
    assert volumes.cli_json("volume", "import", str(tmp_path / "tiny"), "p/w", "--format", "raw")["size_bytes"] == 4096
    made = volumes.cli_json("volume", "import", str(tmp_path / "odd"), "p/v", "--format", "raw")
    assert made["size_bytes"] == 10_240
    with Connection(volumes.socket, "p/v") as connection:
        assert connection.read(0, 10_240) == (tmp_path / "odd").read_bytes() + bytes(239)


def test_an_export_goes_into_a_pipe_but_to_no_terminal(volumes: Daemon, tmp_path: Path) -> None:
    wanted = sparse_image(tmp_path / "raw")
    volumes.cli("volume", "import", str(tmp_path / "raw"), "p/v")
    volumes.cli("snapshot", "create", "p/v@s")
    command = [*program("terrace", "terrace.cli"), "--home", str(volumes.home), "volume", "export", "p/v@s", "-"]
    whole = subprocess.run(command, capture_output=True, env=environment(), check=True)
    assert hashlib.sha256(whole.stdout).hexdigest() == wanted
    assert whole.stderr == b""
    cut = subprocess.run(["bash", "-c", f"{' '.join(command)} | head -c 1000 | wc -c"], capture_output=True, check=True)
    assert (cut.stdout.strip(), cut.stderr) == (b"1000", b"")
    outside, inside = pty.openpty()
    refused = subprocess.run(command, stdout=inside, stderr=subprocess.PIPE, text=True, env=environment(), check=False)
    os.close(inside)
    os.close(outside)
    assert refused.returncode == 2
    assert "doesn't belong on a terminal" in refused.stderr


def test_an_export_replaces_nothing_unless_it_is_told_to(volumes: Daemon, tmp_path: Path) -> None:
    create(volumes, "v")
    (tmp_path / "out").write_text("precious")
    assert "--force" in volumes.cli("volume", "export", "p/v", str(tmp_path / "out"), status=1).stderr
    assert "no snapshot" in volumes.cli("volume", "export", "p/v@s", str(tmp_path / "out"), "--force", status=1).stderr
    assert (tmp_path / "out").read_text() == "precious"
    volumes.cli("volume", "export", "p/v", str(tmp_path / "out"), "--force")
    assert (tmp_path / "out").stat().st_size == SIZE
    assert "no regular file" in volumes.cli("volume", "export", "p/v", str(tmp_path), "--force", status=1).stderr
    assert volumes.cli("volume", "export", "p/v", str(tmp_path / "none" / "out"), status=1).stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_volume_in_use_is_exported_with_a_warning(volumes: Daemon, tmp_path: Path) -> None:
    create(volumes, "v")
    with Connection(volumes.socket, "p/v"):
        result = volumes.cli("volume", "export", "p/v", str(tmp_path / "out"))
    assert "export a snapshot" in result.stderr


def test_an_import_that_fails_leaves_no_volume_unless_that_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(random.Random(4).randbytes(100 * MIB))
    with Daemon(tmp_path / "home") as daemon:
        daemon.cli("pool", "create", "p", "--fast", f"{tmp_path}/fast={64 * MIB}")
        for image_format in ("raw", "qcow2"):
            image = tmp_path / "large"
            if image_format == "qcow2":
                image = tmp_path / "large.qcow2"
                subprocess.run(["qemu-img", "convert", "-O", "qcow2", tmp_path / "large", image], check=True)
            line = daemon.cli("volume", "import", str(image), "p/v", status=1).stderr
            assert line.count("\n") == 1
            assert "the half-filled volume p/v was deleted" in line
            assert "No space left on device" in line
            assert daemon.api("GET", "/v1/pools/p/volumes") == []
        line = daemon.cli("volume", "import", str(tmp_path / "large"), "p/v", "--keep", status=1).stderr
        assert "p/v is kept, half filled" in line
        assert [one["name"] for one in daemon.api("GET", "/v1/pools/p/volumes")] == ["p/v"]


def test_an_import_that_is_interrupted_leaves_no_volume(volumes: Daemon, tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as image:
        for _ in range(64):
            image.write(os.urandom(MIB))
    process = subprocess.Popen(
        [
            *program("terrace", "terrace.cli"),
            "volume",
            "import",
            str(tmp_path / "large"),
            "p/v",
            "--format",
            "raw",
            "--policy",
            "slow",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | {"TERRACE_HOME": str(volumes.home)},
        start_new_session=True,
    )
    while not any(one["counters"]["writes"] for one in volumes.api("GET", "/v1/status")["nbd"]["connections"]):
        assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Traceback" not in said
    assert volumes.api("GET", "/v1/pools/p/volumes") == []


def test_images_that_can_not_be_read_or_ask_for_others_are_refused(volumes: Daemon, run: Run, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret" * 1000)
    os.truncate(tmp_path / "secret", MIB)
    run("qemu-img", "create", "-f", "qcow2", "-b", tmp_path / "secret", "-F", "raw", tmp_path / "backed")
    (tmp_path / "empty").touch()
    (tmp_path / "broken").write_bytes(b"QFI\xfb\0\0\0\2" + b"\xff" * 600)
    create(volumes, "there")
    for arguments, status, words in (
        (("backed", "p/v"), 1, f"takes data from {tmp_path}/secret"),
        (("empty", "p/v"), 1, "is empty"),
        (("broken", "p/v"), 1, "qemu-img can't read"),
        (("secret", "p/v", "--format", "qcow2"), 1, "qemu-img can't read"),
        (("none", "p/v"), 2, "does not exist"),
        (("secret", "p/v", "--format", "tar"), 2, "tar"),
        (("secret", "p/v@s"), 2, "has an @"),
        (("secret", "p/there"), 1, "p/there"),
        (("secret", "q/v"), 1, "no pool 'q'"),
    ):
        line = volumes.cli("volume", "import", str(tmp_path / arguments[0]), *arguments[1:], status=status).stderr
        assert line.count("\n") == 1
        assert words in line
    assert [one["name"] for one in volumes.api("GET", "/v1/pools/p/volumes")] == ["p/there"]


def test_a_missing_tool_is_named_with_its_package(volumes: Daemon, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(MIB))
    create(volumes, "v")
    only_python = {"PATH": str(tmp_path), "TERRACE_HOME": str(volumes.home)}

    def refused(*arguments: str) -> str:
        command = [sys.executable, "-m", "terrace.cli", "volume", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, env=environment() | only_python, check=False)
        assert result.returncode == 1
        return result.stderr

    assert "qemu-img (Debian package qemu-utils)" in refused("import", f"{tmp_path}/raw", "p/w")
    assert "qemu-img (Debian package qemu-utils) or nbdcopy (Debian package libnbd-bin)" in refused(
        "import", f"{tmp_path}/raw", "p/w", "--format", "raw"
    )
    assert "nbdcopy (Debian package libnbd-bin)" in refused("export", "p/v", "-")
    assert [one["name"] for one in volumes.api("GET", "/v1/pools/p/volumes")] == ["p/v"]
