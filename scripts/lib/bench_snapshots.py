"""The bench's section about snapshots: what they cost those who read and write, and those who ask what has changed.

- `taken`: a writer of a 10 TiB volume with much mapped, while a snapshot is taken each 50 ms: the longest that its loop
  stood still, which is what a client would notice, and how long a snapshot took to be durable. In this process, so that
  nothing but the engine is measured. The data compresses well and goes past the log, so that 100 GiB (`--full`) fit.
- `many`: two volumes, one with 1,000 snapshots, in turn: 4k random reads and overwrites by fio, once each has its map
  pages to itself; then one of the thousand is deleted under a client's load.
- `diff`: what differs between two snapshots of a 1 TiB volume with 1,000 changed extents, over NBD; and what a backup
  after a change of 1 % reads.
"""

from __future__ import annotations

import gc
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import trio
from bench_fio import fio
from bench_sections import GIB, MIB, TIB, Result, timed

from nbd.client import connect
from terrace.collector import GC_THRESHOLDS
from tests.system import nbdclient
from tests.system.daemon import Daemon
from tiers import DeviceSpec, Policy, Pool, PoolSettings
from tiers.layout import BLOCK_BYTES

PARTS = ("taken", "many", "diff")
PAUSE_TARGET_MS = 10.0
SPEED_TARGET = 0.9
DELETE_TARGET_S = 1.0
STALL_TARGET_MS = 20.0
DIFF_TARGET_S = 0.5
READ_TARGET_PERCENT = 1.5
SNAPSHOTS = 1000
TAKEN = 100
PIECE = b"".join(random.Random(i).randbytes(64) * 64 for i in range(MIB // BLOCK_BYTES))
"""1 MiB that compresses to a sixtieth."""


def snapshots(directory: Path, parts: Sequence[str], seconds: float, rounds: int, *, full: bool) -> list[Result]:
    """All parts that were asked for."""
    sections: dict[str, Callable[[], list[Result]]] = {
        "taken": lambda: taken(directory, (100 if full else 4) * GIB),
        "many": lambda: many(directory, seconds, rounds, GIB if full else GIB // 4),
        "diff": lambda: diff(directory),
    }
    # As the daemon does: a full collection takes 40 ms here, and is not what is to be measured.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    results: list[Result] = []
    for part in parts:
        results += sections[part]()
    return results


# Taking


def taken(directory: Path, mapped_bytes: int) -> list[Result]:
    """Snapshots under a writer."""
    place = directory / "taken"
    place.mkdir()
    found: dict[str, Any] = trio.run(_taken, place, mapped_bytes)
    shutil.rmtree(place)
    section = f"snapshots, 10 TiB with {found['mapped'] / GIB:.0f} GiB mapped"
    return [
        Result(section, f"longest pause of writers, {TAKEN} taken", found["pause"] * 1e3, "ms", most=PAUSE_TARGET_MS),
        Result(section, "longest pause without", found["calm"] * 1e3, "ms"),
        Result(section, "from asked to durable, median", found["took"] * 1e3, "ms"),
    ]


async def _taken(place: Path, mapped_bytes: int) -> dict[str, Any]:
    devices = [
        DeviceSpec(place / "fast", "fast", 2 * GIB),
        DeviceSpec(place / "base", "base", max(4 * GIB, mapped_bytes // 8)),
    ]
    await Pool.create(place / "home", "bench", devices)
    async with Pool.open(place / "home", settings=PoolSettings(compression_level=1)) as pool:
        pool.define_policies({"stream": Policy("stream", stream_cutoff_bytes=MIB)})
        volume = await pool.create_volume("volume", 10 * TIB, "stream")
        spread = 10 * TIB // (mapped_bytes // (64 * MIB)) // BLOCK_BYTES * BLOCK_BYTES
        for start in range(0, mapped_bytes // (64 * MIB)):
            for at in range(0, 64 * MIB, MIB):
                await volume.write(start * spread + at, PIECE)
        await pool.checkpoint()
        rng = random.Random(1)
        pauses: list[float] = []

        async def writer() -> None:
            """Batches of 32 random blocks, as a connection has them; how long each turn of the loop took."""
            last = time.perf_counter()
            while True:
                writes = [(rng.randrange(mapped_bytes // BLOCK_BYTES) * BLOCK_BYTES, PIECE[:BLOCK_BYTES])] * 32
                if not volume.write_now(writes):
                    for offset, data in writes:
                        await volume.write(offset, data)
                await trio.sleep(0.001)
                now = time.perf_counter()
                pauses.append(now - last)
                last = now

        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer)
            await trio.sleep(3)
            pauses.clear()
            await trio.sleep(0.05 * TAKEN)
            calm = max(pauses)
            pauses.clear()
            took = []
            for i in range(TAKEN):
                begin = time.perf_counter()
                await pool.take_snapshots([("volume", f"s{i}")])
                took.append(time.perf_counter() - begin)
                await trio.sleep(0.05)
            pause = max(pauses)
            nursery.cancel_scope.cancel()
        mapped = volume.tree.mapped_blocks * BLOCK_BYTES
    return {"pause": pause, "calm": calm, "took": statistics.median(took), "mapped": mapped}


# A thousand


def many(directory: Path, seconds: float, rounds: int, size_bytes: int) -> list[Result]:
    """A volume with a thousand snapshots beside one with none."""
    place = directory / "many"
    place.mkdir()
    section = f"snapshots, {SNAPSHOTS} of one volume"
    rates: dict[str, dict[str, list[float]]] = {"reads": {}, "overwrites": {}}
    with Daemon(place / "home") as daemon:
        daemon.cli("pool", "create", "bench", "--fast", f"{place}/fast={8 * size_bytes}")
        for name in ("none", "many"):
            daemon.cli("volume", "create", f"bench/{name}", str(size_bytes))
            fio(daemon.uri(f"bench/{name}"), "--rw=write", "--bs=1M", "--iodepth=4")
        began_s = time.monotonic()
        with nbdclient.Connection(daemon.socket, "bench/many") as connection:
            rng = random.Random(1)
            for i in range(SNAPSHOTS):
                for _ in range(8):
                    connection.write(rng.randrange(size_bytes // BLOCK_BYTES) * BLOCK_BYTES, rng.randbytes(BLOCK_BYTES))
                daemon.api("POST", "/v1/pools/bench/snapshots", {"name": f"s{i}", "volumes": ["many"]})
        results = [Result(section, "taken a second, each of 8 writes", SNAPSHOTS / (time.monotonic() - began_s), "")]
        for _ in range(3):  # until both have their map pages, and warm segments, to themselves
            for name in ("none", "many"):
                fio(daemon.uri(f"bench/{name}"), "--rw=write", "--bs=1M", "--iodepth=4")
        load = ("--bs=4k", "--iodepth=32", "--norandommap", "--time_based", f"--runtime={seconds * 1000:.0f}ms")
        for number in range(2 * max(2, rounds // 2)):  # an even number: each is as often the first one
            for what, kind in (("reads", "randread"), ("overwrites", "randwrite")):
                for name in ("none", "many") if number % 2 else ("many", "none"):
                    found = fio(daemon.uri(f"bench/{name}"), f"--rw={kind}", *load)
                    rates[what].setdefault(name, []).append(found.iops)
                    daemon.api("POST", "/v1/pools/bench/checkpoint")  # so that nobody pays for another
                    subprocess.run(["sync", "--file-system", place], check=False)
        for what, found_rates in rates.items():
            pairs = zip(found_rates["many"], found_rates["none"], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            results.append(
                Result(section, f"4k random {what} QD32, over those with none", ratio, "x", least=SPEED_TARGET)
            )
        results += _deleted(daemon, section, size_bytes)
    shutil.rmtree(place)
    return results


def _deleted(daemon: Daemon, section: str, size_bytes: int) -> list[Result]:
    """One of the thousand is deleted while a client reads and writes; what its requests took at the longest."""
    calm = _probed(daemon, size_bytes, lambda: time.sleep(1))[1]
    path = f"/v1/pools/bench/volumes/many/snapshots/s{SNAPSHOTS // 2}"
    took, longest = _probed(daemon, size_bytes, lambda: daemon.api("DELETE", path))
    return [
        Result(section, "one of them is deleted in", took, "s", most=DELETE_TARGET_S),
        Result(section, "longest request meanwhile", longest * 1e3, "ms", most=STALL_TARGET_MS),
        Result(section, "longest request of a second without", calm * 1e3, "ms"),
    ]


def _probed(daemon: Daemon, size_bytes: int, action: Callable[[], Any]) -> tuple[float, float]:
    """How long `action` took, and the longest of a client's requests from then to a second later."""
    longest = 0.0

    async def main() -> float:
        nonlocal longest
        rng = random.Random(2)
        async with connect(daemon.uri("bench/many")) as client, trio.open_nursery() as nursery:

            async def probe() -> None:
                nonlocal longest
                while True:
                    offset = rng.randrange(size_bytes // BLOCK_BYTES) * BLOCK_BYTES
                    begin = time.perf_counter()
                    await client.write(offset, PIECE[:BLOCK_BYTES])
                    await client.read(offset, BLOCK_BYTES)
                    longest = max(longest, time.perf_counter() - begin)
                    await trio.sleep(0.0005)

            nursery.start_soon(probe)
            await trio.sleep(0.5)
            longest = 0.0
            took = await trio.to_thread.run_sync(timed, action)
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
        return took

    return trio.run(main), longest


# Differences


def diff(directory: Path) -> list[Result]:
    """Two snapshots of a large volume; a backup of the difference."""
    place = directory / "diff"
    place.mkdir()
    section = "snapshots, differences"
    with Daemon(place / "home") as daemon:
        daemon.cli("pool", "create", "bench", "--fast", f"{place}/fast={4 * GIB}")
        daemon.cli("volume", "create", "bench/large", str(TIB))
        rng = random.Random(3)
        places = rng.sample(range(TIB // (64 << 10)), 2500)
        with nbdclient.Connection(daemon.socket, "bench/large") as connection:
            for at in places[:2000]:
                connection.write(at * (64 << 10), rng.randbytes(64 << 10))
            daemon.cli("snapshot", "create", "bench/large@before")
            for at in places[1500:]:
                connection.write(at * (64 << 10) + 8192, rng.randbytes(16 << 10))
            daemon.cli("snapshot", "create", "bench/large@after")
        spans = trio.run(_changed, daemon.uri("bench/large@after"), "before")
        took = min(timed(lambda: trio.run(_changed, daemon.uri("bench/large@after"), "before")) for _ in range(3))
        results = [
            Result(section, f"of 1 TiB, {len(spans):,} changed extents", took, "s", most=DIFF_TARGET_S),
        ]
        results += _backup(daemon, place, section)
    shutil.rmtree(place)
    return results


async def _changed(uri: str, since: str) -> list[tuple[int, int]]:
    context = f"terrace:diff:{since}"
    async with connect(uri, contexts=[context]) as client:
        return [(offset, length) async for offset, length, flags in client.extents(context) if flags & 1]


def _backup(daemon: Daemon, place: Path, section: str) -> list[Result]:
    """What `terrace backup --since` reads after 1 % of a volume has changed, by the daemon's count."""
    size_bytes = GIB // 2
    daemon.cli("volume", "create", "bench/data", str(size_bytes))
    rng = random.Random(4)
    fio(daemon.uri("bench/data"), "--rw=write", "--bs=1M", "--iodepth=4")
    daemon.cli("snapshot", "create", "bench/data@a")
    with nbdclient.Connection(daemon.socket, "bench/data") as connection:
        for block in rng.sample(range(size_bytes // BLOCK_BYTES), size_bytes // BLOCK_BYTES // 100):
            connection.write(block * BLOCK_BYTES, rng.randbytes(BLOCK_BYTES))
    daemon.cli("snapshot", "create", "bench/data@b")
    stream = place / "increment.tbk"
    took = timed(lambda: daemon.cli("backup", "bench/data@b", "--since", "a", str(stream)))
    found = daemon.cli_json("backup", "verify", str(stream))
    (report,) = found if isinstance(found, list) else [found]
    share = 100 * report["data_bytes"] / size_bytes
    return [
        Result(section, "an increment after 1 % of change: read", share, "% of the data", most=READ_TARGET_PERCENT),
        Result(section, "the same: stream", 100 * stream.stat().st_size / size_bytes, "% of the data"),
        Result(section, "the same: took", took, "s"),
    ]
