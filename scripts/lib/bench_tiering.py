"""The bench's section about tiering: a fast device over a base device that is slowed to a hard disk's pace.

Parts, each of which runs alone (`--parts`):

- `wa`: write amplification, in this process (`bench_wa`).
- `space`: what text-like and incompressible data take on base.
- `reads`: Zipf(1.1) 4k reads, hot blocks scattered; the hit ratio against what an offline optimal placement gets.
- `writes`: random 4k writes over data four times the fast tier, against the slowed device's own random writes.
- `latency`: a client's p99 at half load while migration runs, against the p99 without.

`--full` takes the lengths and sizes of the targets: 8 GiB with 1 GiB fast, ten minutes of writes. By default a quarter
of that, and `--seconds` for each measurement.
"""

from __future__ import annotations

import math
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_fio import Measurement, fio
from bench_sections import GIB, MIB, Result
from bench_wa import SHARES, amplification
from slow_disk import Head, merged

from tests.system import nbdclient
from tests.system.daemon import REPOSITORY, Daemon

PARTS = ("wa", "space", "reads", "writes", "latency")
HIT_TARGET = 90.0
STALL_TARGET_S = 1.0
SPEED_TARGET = 20.0
TEXT_TARGET = 45.0
NOISE_TARGET = 101.0
LATENCY_TARGET = 3.0
ZIPF = 1.1
SETTLED_ROUNDS, SETTLED = 3, 0.005
"""The hit ratio has settled when it gained less than this in so many rounds."""
BLOCK_BYTES = 4096
EXTENT_BLOCKS = 16
DEVICE_WRITES = 2048
QUEUE_DEPTH = 32
SLOW_DAEMON = (sys.executable, str(Path(__file__).with_name("slow_daemon.py")))


@dataclass(frozen=True)
class Scale:
    """How large and how long."""

    fast_bytes: int
    data_bytes: int
    seconds: float
    write_seconds: float
    wa_mib: int
    wa_overwrites: int
    wa_shares: Sequence[float]
    warm_rounds: int
    """Of `seconds`, at most; each read from base warms one block, at a disk's pace."""


def scale_of(seconds: float, *, full: bool) -> Scale:
    """The targets' sizes and lengths, or a quarter: with less, segments are small and each move is all seeks."""
    if full:
        return Scale(GIB, 8 * GIB, 60.0, 600.0, 1024, 3, SHARES, 40)
    return Scale(256 * MIB, 2 * GIB, seconds, 4 * seconds, 512, 3, (0.6, 0.8), 12)


def tiering(directory: Path, parts: Sequence[str], scale: Scale, say: Callable[[str], None]) -> list[Result]:
    """All parts that were asked for."""
    sections: dict[str, Callable[[], list[Result]]] = {
        "wa": lambda: amplification(directory, scale.wa_mib, scale.wa_overwrites, scale.wa_shares),
        "space": lambda: space(directory, scale),
        "reads": lambda: reads(directory, scale),
        "writes": lambda: writes(directory, scale),
        "latency": lambda: latency(directory, scale),
    }
    results: list[Result] = []
    for part in PARTS:
        if part in parts:
            say(f"tiering, {part} ...")
            results += sections[part]()
    return results


@contextmanager
def pool(directory: Path, name: str, *, fast_bytes: int, base_bytes: int, size_bytes: int) -> Iterator[Daemon]:
    """A daemon with a pool `bench` of these devices (0: none of that tier) and a volume `bench/volume`."""
    place = directory / name.replace(" ", "-")
    place.mkdir()
    with Daemon(place / "home", program=SLOW_DAEMON) as daemon:
        devices = [
            part
            for tier, size in (("fast", fast_bytes), ("base", base_bytes))
            if size
            for part in (f"--{tier}", f"{place}/{tier}={size}")
        ]
        daemon.cli("pool", "create", "bench", *devices)
        daemon.cli("volume", "create", "bench/volume", str(size_bytes))
        yield daemon
    shutil.rmtree(place)


def fill(daemon: Daemon, *more: str, timeout_s: float = 3600.0) -> Measurement:
    """Write all of the volume in order."""
    options = ("--rw=write", "--bs=1M", "--iodepth=4", "--end_fsync=1", *more)
    return fio(daemon.uri("bench/volume"), *options, timeout_s=timeout_s)


# Zipf reads


def optimal_hit_ratio(blocks: int, fast_blocks: int, granularity: int) -> float:
    """The share of Zipf reads that the best `fast_blocks` of `blocks` take, placed in units of `granularity` blocks.

    The ranks are scattered over the volume, so a unit holds blocks of any rank.
    """
    weights = np.arange(1, blocks + 1, dtype=np.float64) ** -ZIPF
    weights /= weights.sum()
    np.random.default_rng(1).shuffle(weights)
    units = weights[: blocks // granularity * granularity].reshape(-1, granularity).sum(axis=1)
    return float(np.sort(units)[::-1][: fast_blocks // granularity].sum())


def reads(directory: Path, scale: Scale) -> list[Result]:
    """Warm up with Zipf reads until the ratio stays, then measure it by the engine's counters."""
    section = "tiering, Zipf(1.1) 4k reads"
    zipf = ("--rw=randread", "--bs=4k", f"--iodepth={QUEUE_DEPTH}", f"--random_distribution=zipf:{ZIPF}")
    zipf += ("--norandommap", "--time_based", "--randseed=1")
    results: list[Result] = []
    rates: dict[str, float] = {}
    for name, fast_bytes in (("two tiers", scale.fast_bytes), ("base only", 0)):
        base_bytes = scale.data_bytes * 5 // 4
        with pool(directory, name, fast_bytes=fast_bytes, base_bytes=base_bytes, size_bytes=scale.data_bytes) as daemon:
            uri = daemon.uri("bench/volume")
            fill(daemon)
            ratios = [0.0]
            count = 0.0
            for _ in range(scale.warm_rounds if fast_bytes else 1):
                warm = fio(uri, *zipf, f"--runtime={scale.seconds:.0f}s", timeout_s=600)
                ratios.append(daemon.pool("bench")["hit_ratio"] or 0.0)
                rates[name] = warm.iops
                count += warm.iops * scale.seconds
                if len(ratios) > SETTLED_ROUNDS and ratios[-1] - ratios[-1 - SETTLED_ROUNDS] < SETTLED:
                    break
            ratio = ratios[-1]
            if fast_bytes:
                status = daemon.pool("bench")
                usable = sum(d["live_bytes"] for d in status["devices"] if d["tier"] == "fast") // BLOCK_BYTES
                blocks = scale.data_bytes // BLOCK_BYTES
                fine = optimal_hit_ratio(blocks, usable, 1)
                coarse = optimal_hit_ratio(blocks, usable, EXTENT_BLOCKS)
                results += [
                    Result(section, f"hit ratio after {count / 1e6:.1f} million reads", 100 * ratio, "%"),
                    Result(section, "best possible by 4 KiB blocks (what is promoted)", 100 * fine, "%"),
                    Result(section, "best possible by 64 KiB extents", 100 * coarse, "%"),
                    Result(section, "share of the best by blocks", 100 * ratio / fine, "%", least=HIT_TARGET),
                ]
    results += [Result(section, f"reads, {name}", rate, "IOPS") for name, rate in rates.items()]
    return results


# Random writes


def device_rate(base_bytes: int) -> float:
    """Random 4k writes a second of the slowed device by itself: QUEUE_DEPTH at a time, each group synced."""
    head, rng = Head(), random.Random(1)
    start_s = time.monotonic()
    count = 0
    while time.monotonic() - start_s < 3 and count < DEVICE_WRITES:
        places = [(rng.randrange(base_bytes // BLOCK_BYTES) * BLOCK_BYTES, BLOCK_BYTES) for _ in range(QUEUE_DEPTH)]
        head.serve(merged(places))
        count += QUEUE_DEPTH
    return count / (time.monotonic() - start_s)


def writes(directory: Path, scale: Scale) -> list[Result]:
    """Sustained random writes over data four times the fast tier."""
    section = "tiering, 4k random writes over 4x the fast tier"
    size_bytes = 4 * scale.fast_bytes
    base_bytes = size_bytes * 3 // 2
    rate = device_rate(base_bytes)
    results = [Result(section, "the slowed device by itself, 32 at a time, synced", rate, "IOPS")]
    for name, fast_bytes in (("two tiers", scale.fast_bytes), ("base only", 0)):
        with pool(directory, name, fast_bytes=fast_bytes, base_bytes=base_bytes, size_bytes=size_bytes) as daemon:
            fill(daemon)
            before = daemon.pool("bench")
            logs = directory / name.replace(" ", "-") / "iops"
            seconds = scale.write_seconds if fast_bytes else min(30.0, scale.write_seconds)
            found = fio(
                *(daemon.uri("bench/volume"), "--rw=randwrite", "--bs=4k", f"--iodepth={QUEUE_DEPTH}"),
                *("--norandommap", "--time_based", f"--runtime={seconds:.0f}s", "--refill_buffers"),
                *(f"--write_iops_log={logs}", "--log_avg_msec=1000"),
                timeout_s=seconds + 600,
            )
            after = daemon.pool("bench")
            each = iops_a_second(logs.with_name("iops_iops.1.log"))
            written = after["client_written_bytes"] - before["client_written_bytes"]
            device = after["device_written_bytes"] - before["device_written_bytes"]
            first = name == "two tiers"
            results += [
                Result(section, f"{name}: sustained for {seconds:.0f} s", found.iops, "IOPS"),
                Result(section, f"{name}: slowest second", min(each, default=math.nan), "IOPS"),
                Result(
                    section,
                    f"{name}: longest stall",
                    found.longest_ms / 1000,
                    "s",
                    most=STALL_TARGET_S if first else None,
                ),
                Result(
                    section,
                    f"{name}: over the device's own",
                    found.iops / rate,
                    "x",
                    least=SPEED_TARGET if first else None,
                ),
                Result(section, f"{name}: bytes to devices for each of the client's", device / max(1, written), "x"),
            ]
    return results


def iops_a_second(log: Path) -> list[float]:
    """fio's log of the mean of each second; the last may be cut short and is left out."""
    return [float(line.split(",")[1]) for line in log.read_text().splitlines()][:-1]


# Space


def space(directory: Path, scale: Scale) -> list[Result]:
    """Twice as much data as the fast tier takes: what the part that has to go to base takes there."""
    section = "tiering, space on base"
    size_bytes = 2 * scale.fast_bytes
    results = []
    for what, data, target in (
        ("text (this repository's sources)", sources(), TEXT_TARGET),
        ("incompressible data", random.Random(1).randbytes(64 * MIB), NOISE_TARGET),
    ):
        with pool(
            directory, "space", fast_bytes=scale.fast_bytes, base_bytes=2 * size_bytes, size_bytes=size_bytes
        ) as daemon:
            with nbdclient.Connection(daemon.socket, "bench/volume") as connection:
                for at in range(0, size_bytes, MIB):
                    start = at % (len(data) - MIB)
                    connection.write(at, data[start : start + MIB])
                connection.flush()
            daemon.api("POST", "/v1/pools/bench/checkpoint")
            status = daemon.pool("bench")
            live = sum(d["live_bytes"] for d in status["devices"])
            fast = sum(d["live_bytes"] for d in status["devices"] if d["tier"] == "fast")
            share = 100 * (live - fast) / max(1, size_bytes - fast)
            results.append(Result(section, f"{what}: of its size", share, "%", most=target))
    return results


def sources() -> bytes:
    """Some megabytes of text as people write it."""
    files = sorted(path for pattern in ("*.py", "*.md") for path in REPOSITORY.glob(f"*/**/{pattern}"))
    text = b"".join(path.read_bytes() for path in files if ".venv" not in path.parts)
    return text if len(text) > 2 * MIB else text * (2 * MIB // len(text) + 1)


# Latency


def latency(directory: Path, scale: Scale) -> list[Result]:
    """p99 of 4k random writes at half the rate that the pool sustains, without and with migration under way."""
    section = "tiering, a client's p99 at half load"
    size_bytes = 4 * scale.fast_bytes
    results: list[Result] = []
    load = ("--rw=randwrite", "--bs=4k", "--iodepth=8", "--norandommap", "--time_based", "--refill_buffers")

    def run(daemon: Daemon, *more: str, area: int) -> Measurement:
        return fio(
            *(daemon.uri("bench/volume"), *load, f"--runtime={scale.seconds:.0f}s", f"--size={area}", *more),
            timeout_s=scale.seconds + 600,
        )

    with pool(
        directory, "latency", fast_bytes=scale.fast_bytes, base_bytes=size_bytes * 3 // 2, size_bytes=size_bytes
    ) as daemon:
        small = scale.fast_bytes // 8
        run(daemon, area=small)
        calm_most = run(daemon, area=small)
        fill(daemon)
        busy_most = run(daemon, area=size_bytes)
        rate = int(min(calm_most.iops, busy_most.iops) / 2)
        moved = daemon.pool("bench")["blocks_moved"]
        busy = run(daemon, f"--rate_iops={rate}", area=size_bytes)
        moved = daemon.pool("bench")["blocks_moved"] - moved
    with pool(
        directory, "calm", fast_bytes=scale.fast_bytes, base_bytes=size_bytes * 3 // 2, size_bytes=size_bytes
    ) as daemon:
        run(daemon, area=small)
        calm = run(daemon, f"--rate_iops={rate}", area=small)
    results += [
        Result(section, "the load", rate, "IOPS"),
        Result(section, "p99 without migration", calm.p99_ms, "ms"),
        Result(section, "p99 while migration runs", busy.p99_ms, "ms"),
        Result(section, "blocks moved meanwhile", moved, ""),
        Result(section, "over that without", busy.p99_ms / max(0.001, calm.p99_ms), "x", most=LATENCY_TARGET),
    ]
    return results
