"""The bench's section about the nbdkit plugin: against one of ten lines that reads and writes a flat file.

Both are Python plugins of the same nbdkit, with its threads; each request of either passes through Python's lock. Ours
has besides all that the engine does. They are measured in turn, each first as often as the other, everything warm.
"""

from __future__ import annotations

import statistics
import subprocess
from pathlib import Path

from bench_fio import fio
from bench_sections import Result
from bench_servers import Peer, nbdkit_servers

LEAST_RATIO = 1.0
WARM_PASSES = 3
# Sequential writes come first: they also put the volume back in order after the random ones of the round before.
LOADS = (
    ("1 MiB write QD4", ("--rw=write", "--bs=1M", "--iodepth=4"), False),
    ("1 MiB read QD4", ("--rw=read", "--bs=1M", "--iodepth=4"), False),
    ("4k random read QD1", ("--rw=randread", "--bs=4k", "--iodepth=1"), True),
    ("4k random read QD32", ("--rw=randread", "--bs=4k", "--iodepth=32"), True),
    ("4k random write QD1", ("--rw=randwrite", "--bs=4k", "--iodepth=1"), True),
    ("4k random write QD32", ("--rw=randwrite", "--bs=4k", "--iodepth=32"), True),
)
"""What is measured, and whether the target holds for it."""


def nbdkit(directory: Path, seconds: float, rounds: int, size_bytes: int) -> list[Result]:
    """For each load both rates, and the median of the rounds' ratios."""
    section = "nbdkit"
    servers = nbdkit_servers(directory, size_bytes)
    rates: dict[tuple[str, str], list[float]] = {}
    results: list[Result] = []
    try:
        for server in servers:
            server.start()
            for _ in range(WARM_PASSES):
                fio(server.uri(), "--rw=write", "--bs=1M", "--iodepth=4")
        # Twice as many rounds of half the length: each pair is measured close together, and both orders occur.
        for number in range(2 * rounds):
            turn = servers[number % 2 :] + servers[: number % 2]
            for title, options, _ in LOADS:
                for server in turn:
                    rates.setdefault((title, server.label), []).append(_iops(server, options, seconds / 2, directory))
    finally:
        for server in servers:
            server.stop()
    for title, _, is_target in LOADS:
        ours, theirs = (rates[title, server.label] for server in servers)
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        for server in servers:
            median = statistics.median(rates[title, server.label])
            results.append(Result(section, f"{title}, {server.label}", median, "IOPS"))
        least = LEAST_RATIO if is_target else None
        results.append(Result(section, f"{title}, terrace to ten lines", ratio, "x", least=least))
    return results


def _iops(server: Peer, options: tuple[str, ...], seconds: float, directory: Path) -> float:
    measured = fio(server.uri(), *options, "--time_based", f"--runtime={1000 * seconds:.0f}ms")
    if "write" in options[0]:
        subprocess.run(["sync", "--file-system", directory], check=False)  # so that the next one doesn't pay for it
    return measured.iops
