"""Clients that are not ours, over TCP and the Unix socket: qemu-io, qemu-img, nbdcopy, nbdinfo, fio."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.conftest import Run
from tests.system.daemon import Daemon

pytestmark = pytest.mark.system
MIB = 1 << 20

Uri = Callable[[int], str]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("interop")
    with Daemon(directory / "home") as daemon:
        devices = ["--fast", f"{directory}/fast={256 * MIB}", "--base", f"{directory}/base={512 * MIB}"]
        daemon.cli("pool", "create", "p", *devices)
        yield daemon
        assert daemon.stop() == 0


@pytest.fixture(params=["unix", "tcp"])
def volume(daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[Uri]:
    """Makes a volume of so many bytes and returns its URI. It is deleted afterwards, which fails while in use."""
    made: list[str] = []

    def make(size_bytes: int) -> str:
        name = f"v{len(made)}"
        daemon.api("POST", "/v1/pools/p/volumes", {"name": name, "size": size_bytes})
        made.append(name)
        return daemon.uri(f"p/{name}", tcp=request.param == "tcp")

    yield make
    for name in made:
        daemon.api("DELETE", f"/v1/pools/p/volumes/{name}")


def random_file(path: Path, size_bytes: int) -> str:
    """Random bytes with a hole of zeroes in the middle; returns their SHA-256."""
    data = bytearray(random.Random(size_bytes).randbytes(size_bytes))
    third = size_bytes // 3
    data[third : 2 * third] = bytes(third)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_qemu_io_reads_back_the_patterns_that_it_wrote(volume: Uri, run: Run) -> None:
    uri = volume(64 * MIB)
    writing = [
        "write -P 0x11 0 1M",
        "write -P 0x22 512k 4k",
        "write -f -P 0x33 1M 64k",
        "write -P 0x44 2000000 12345",
        "aio_write -P 0x55 8M 1M",
        "aio_write -P 0x66 9M 1M",
        "aio_flush",
        "write -z 256k 128k",
        "discard 768k 64k",
        "flush",
    ]
    reading = [
        "read -P 0x11 0 256k",
        "read -P 0 256k 128k",
        "read -P 0x11 384k 128k",
        "read -P 0x22 512k 4k",
        "read -P 0x11 516k 252k",
        "read -P 0 768k 64k",
        "read -P 0x11 832k 192k",
        "read -P 0x33 1M 64k",
        "read -P 0x44 2000000 12345",
        "read -P 0 2012345 1000000",
        "read -P 0x55 8M 1M",
        "read -P 0x66 9M 1M",
        "read -P 0 63M 1M",
    ]
    for commands in (writing, reading):
        arguments = [argument for command in commands for argument in ("-c", command)]
        output = run("qemu-io", "-f", "raw", "-d", "unmap", "-t", "writeback", *arguments, uri)
        assert "verification failed" not in output, output


def test_qemu_io_fails_past_the_end_and_the_connection_survives(volume: Uri, tmp_path: Path) -> None:
    uri = volume(4 * MIB)
    commands = ["-c", "read 4M 4k", "-c", "write -P 7 4190208 4k", "-c", "read -P 7 4190208 4k"]
    result = subprocess.run(
        ["qemu-io", "-f", "raw", *commands, uri], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert "read 4096/4096 bytes at offset 4190208" in result.stdout, result.stdout + result.stderr


def test_nbdcopy_in_and_out_keeps_every_byte(volume: Uri, run: Run, tmp_path: Path) -> None:
    size_bytes = 24 * MIB
    expected = random_file(tmp_path / "in", size_bytes)
    uri = volume(size_bytes)
    run("nbdcopy", "--flush", tmp_path / "in", uri)
    run("nbdcopy", uri, tmp_path / "out")
    assert digest(tmp_path / "out") == expected


def test_nbdcopy_from_volume_to_volume_keeps_every_byte(volume: Uri, run: Run, tmp_path: Path) -> None:
    size_bytes = 8 * MIB + 512
    expected = random_file(tmp_path / "in", size_bytes)
    source, target = volume(size_bytes), volume(size_bytes)
    run("nbdcopy", tmp_path / "in", source)
    run("nbdcopy", "--flush", source, target)
    run("nbdcopy", target, tmp_path / "out")
    assert digest(tmp_path / "out") == expected


def test_nbdinfo_shows_what_the_volume_is(volume: Uri, run: Run) -> None:
    uri = volume(32 * MIB)
    shown = json.loads(run("nbdinfo", "--json", uri))
    assert shown["protocol"] == "newstyle-fixed"
    assert shown["structured"] is True
    (export,) = shown["exports"]
    assert export["export-size"] == 32 * MIB
    assert "base:allocation" in export["contexts"]
    can = {name: export[name] for name in export if name.startswith(("can_", "is_"))}
    true = {"can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero", "can_fast_zero", "can_cache", "can_df"}
    assert {name for name in true if not can[name]} == set()
    assert can["is_read_only"] is False
    assert tuple(export[f"block_size_{what}"] for what in ("minimum", "preferred", "maximum")) == (1, 4096, 32 * MIB)


def test_nbdinfo_lists_every_volume(daemon: Daemon, volume: Uri, run: Run) -> None:
    uris = [volume(MIB), volume(2 * MIB)]
    listed = json.loads(run("nbdinfo", "--json", "--list", uris[0].replace("p/v0", "")))
    names = {export["export-name"]: export["export-size"] for export in listed["exports"]}
    assert names == {"p/v0": MIB, "p/v1": 2 * MIB}


def test_nbdinfo_maps_data_and_holes_block_by_block(volume: Uri, run: Run) -> None:
    uri = volume(16 * MIB)

    def extents() -> list[tuple[int, int, bool]]:
        rows = json.loads(run("nbdinfo", "--map", "--json", uri))
        assert sum(row["length"] for row in rows) == 16 * MIB
        merged: list[tuple[int, int, bool]] = []
        for row in rows:
            zero = bool(row["type"] & 2)
            if merged and merged[-1][2] == zero:
                start, length, _ = merged.pop()
                merged.append((start, length + row["length"], zero))
            else:
                merged.append((row["offset"], row["length"], zero))
        return merged

    assert extents() == [(0, 16 * MIB, True)]
    run("qemu-io", "-f", "raw", "-c", "write -P 1 4M 1M", "-c", "write -P 1 8M 4k", "-c", "write -P 0 12M 1M", uri)
    holes_between = [
        (0, 4 * MIB, True),
        (4 * MIB, MIB, False),
        (5 * MIB, 3 * MIB, True),
        (8 * MIB, 4096, False),
        (8 * MIB + 4096, 8 * MIB - 4096, True),
    ]
    assert extents() == holes_between
    run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 4M 1M", "-c", "discard 8M 4k", uri)
    assert extents() == [(0, 16 * MIB, True)]


def test_nbdinfo_maps_the_tier_of_each_range_and_what_snapshots_share(
    daemon: Daemon, volume: Uri, run: Run, tmp_path: Path
) -> None:
    uri = volume(16 * MIB)

    def tiers(uri: str) -> list[tuple[int, int, int]]:
        rows = json.loads(run("nbdinfo", "--map=terrace:tier", "--json", uri))
        assert sum(row["length"] for row in rows) == 16 * MIB
        return [(row["offset"] // 4096, row["length"] // 4096, row["type"]) for row in rows]

    (export,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
    assert export["contexts"] == ["base:allocation", "terrace:tier"]
    assert tiers(uri) == [(0, 4096, 0)]
    (tmp_path / "in").write_bytes(random.Random(1).randbytes(MIB))
    run("qemu-io", "-f", "raw", "-c", f"write -s {tmp_path / 'in'} 4M 1M", uri)
    assert tiers(uri) == [(0, 1024, 0), (1024, 256, 1), (1280, 2816, 0)]
    daemon.api("POST", "/v1/pools/p/volumes/v0/snapshots", {"name": "s"})
    run("qemu-io", "-f", "raw", "-c", f"write -s {tmp_path / 'in'} 4M 512k", uri)
    assert tiers(uri) == [(0, 1024, 0), (1024, 128, 1), (1152, 128, 9), (1280, 2816, 0)]
    assert tiers(uri.replace("p/v0", "p/v0@s")) == [(0, 1024, 0), (1024, 256, 1), (1280, 2816, 0)]
    daemon.api("DELETE", "/v1/pools/p/volumes/v0/snapshots/s")


def test_fio_verifies_its_random_writes(volume: Uri, run: Run) -> None:
    uri = volume(32 * MIB)
    common = ["fio", "--name=v", "--ioengine=nbd", f"--uri={uri}", "--size=32M", "--output-format=json"]
    for mix in (
        ["--rw=randwrite", "--bs=4k", "--iodepth=32", "--fsync=500"],
        ["--rw=randwrite", "--bsrange=512-128k", "--bs_unaligned", "--iodepth=16", "--norandommap", "--loops=1"],
    ):
        output = run(*common, *mix, "--verify=crc32c", "--verify_fatal=1", "--randseed=7")
        (job,) = json.loads(output[output.index("{") :])["jobs"]
        assert job["error"] == 0
        assert job["read"]["io_bytes"] > 0, "nothing was verified"


def test_fio_on_four_connections_verifies(volume: Uri, run: Run) -> None:
    uri = volume(32 * MIB)
    jobs = ["--numjobs=4", "--size=8M", "--offset_increment=8M", "--rw=randrw", "--bs=4k", "--iodepth=16"]
    run("fio", "--name=v", "--ioengine=nbd", f"--uri={uri}", *jobs, "--verify=crc32c", "--verify_fatal=1")


def test_qemu_img_converts_in_and_out_and_compares_equal(volume: Uri, run: Run, tmp_path: Path) -> None:
    size_bytes = 24 * MIB
    expected = random_file(tmp_path / "in", size_bytes)
    uri = volume(size_bytes)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", tmp_path / "in", uri)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", tmp_path / "in", uri)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, tmp_path / "out.qcow2")
    assert "identical" in run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", tmp_path / "out.qcow2", uri)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", tmp_path / "out.qcow2", tmp_path / "out")
    assert digest(tmp_path / "out") == expected
    shown = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", uri))
    assert shown["virtual-size"] == size_bytes


def test_qemu_img_on_a_stopped_and_restarted_daemon_sees_the_same(daemon: Daemon, run: Run, tmp_path: Path) -> None:
    size_bytes = 8 * MIB
    random_file(tmp_path / "in", size_bytes)
    daemon.cli("volume", "create", "p/kept", "8M")
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", tmp_path / "in", daemon.uri("p/kept"))
    assert daemon.stop() == 0
    daemon.start()
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", tmp_path / "in", daemon.uri("p/kept"))
    daemon.cli("volume", "delete", "p/kept", "--yes")
