"""Terrace against its peers in one run, then the costs that have targets of their own.

- `throughput`: fio's nbd engine, one job on one connection, against every server in turn, in rounds that begin with
  another server each time. A cell of the table is the median of the rounds, a ratio the median of each round's ratio,
  so that a machine which slows down slows both sides of it. Everything is warm: first each volume is overwritten until
  that gets no faster (the first touch of memory is slow on virtual machines).
- `big`: a 10 TiB volume: create, trim, delete; memory and CPU of the idle daemon that has it.
- `reopen`: the daemon is killed with 1 GiB of random writes in its log since the last checkpoint.
- `pressure`: random writes for ever into a pool of volume / 0.85: the cleaner and checkpoints at work.
- `scrub`: scrubs against fio's sequential read of the same device, in turn; then one beside a client.
- `snapshots`: what they cost, and what asking for changes costs (`bench_snapshots`); not among the default ones.
- `fuse`: volumes as files against nbdfuse (`bench_fuse`); not among the default ones.
- `nbdkit`: our nbdkit plugin against one of ten lines on a flat file (`bench_nbdkit`); not among the default ones.
- `mirror`: a mirrored volume against a plain one and QEMU's mirror (`bench_mirror`); not among the default ones.
- `upgrade`: the daemon is replaced under a verified load (`bench_upgrade`); not among the default ones.
- `tiering`: a fast tier over a base device slowed to a hard disk's pace (`bench_tiering`); not among the default ones.

The daemon itself reports the longest stall of its event loop, which is shown for each load. Absolute numbers tell about
the machine: quote ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from bench_fio import FioError, Measurement, fio
from bench_fuse import fuse
from bench_mirror import PARTS as MIRROR_PARTS
from bench_mirror import mirror
from bench_nbd import protocol
from bench_nbdkit import nbdkit
from bench_scrub import scrub
from bench_sections import STALL_TARGET_MS, Result, big, pressure, reopen
from bench_servers import Server, Terrace, all_servers
from bench_snapshots import PARTS as SNAPSHOT_PARTS
from bench_snapshots import snapshots
from bench_tiering import PARTS, scale_of, tiering
from bench_upgrade import upgrade
from rich.console import Console
from rich.table import Table

from terrace.sizes import parse_size
from tests.system.daemon import REPOSITORY, DaemonError

MIB = 1 << 20
BASELINE = "qemu-nbd raw"
SECTIONS = ("throughput", "big", "reopen", "pressure", "scrub")
ALL_SECTIONS = (*SECTIONS, "tiering", "snapshots", "fuse", "nbdkit", "nbd", "upgrade", "mirror")
WARM_PASSES = (3, 7)  # at least, at most
console = Console(width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True)
class Workload:
    """One row: fio options, whether it writes, and the least ratio to the baseline that the issue asks for."""

    title: str
    options: tuple[str, ...]
    least_ratio: float | None = None
    in_bytes: bool = False

    @property
    def writes(self) -> bool:
        return "write" in self.options[0]

    def value(self, measurement: Measurement) -> float:
        return measurement.bytes_per_s if self.in_bytes else measurement.iops

    def shown(self, value: float) -> str:
        return f"{value / 1e6:,.0f} MB/s" if self.in_bytes else f"{value / 1e3:,.1f} k"


# Sequential writes come first: they also put the volume back in order after the random ones of the round before.
WORKLOADS = (
    Workload("1 MiB write QD4", ("--rw=write", "--bs=1M", "--iodepth=4"), 1.0, in_bytes=True),
    Workload("1 MiB read QD4", ("--rw=read", "--bs=1M", "--iodepth=4"), 2.0, in_bytes=True),
    Workload("4k random read QD32", ("--rw=randread", "--bs=4k", "--iodepth=32"), 2.0),
    Workload("4k random read QD1", ("--rw=randread", "--bs=4k", "--iodepth=1"), 1.2),
    Workload("64k random read QD8", ("--rw=randread", "--bs=64k", "--iodepth=8")),
    Workload("4k random write QD32", ("--rw=randwrite", "--bs=4k", "--iodepth=32"), 1.5),
    Workload("1 MiB read QD4, after random writes", ("--rw=read", "--bs=1M", "--iodepth=4"), in_bytes=True),
)


@dataclass
class Row:
    """One workload's measurements: a list per server, one entry per round."""

    workload: Workload
    rounds: dict[str, list[Measurement]] = field(default_factory=dict)
    cpu_us: dict[str, list[float]] = field(default_factory=dict)
    stalls_ms: list[float] = field(default_factory=list)

    def median(self, label: str) -> float | None:
        values = [self.workload.value(measurement) for measurement in self.rounds.get(label, [])]
        return statistics.median(values) if values else None

    def ratio(self, label: str) -> float | None:
        """Terrace to `label`."""
        ours, theirs = self.rounds.get("terrace", []), self.rounds.get(label, [])
        value = self.workload.value
        pairs = [value(a) / value(b) for a, b in zip(ours, theirs, strict=False)]
        return statistics.median(pairs) if pairs else None

    @property
    def passed(self) -> bool | None:
        ratio = self.ratio(BASELINE)
        return None if self.workload.least_ratio is None or ratio is None else ratio >= self.workload.least_ratio

    @property
    def stall_ms(self) -> float | None:
        return max(self.stalls_ms, default=None)


def main() -> int:
    options = arguments()
    missing = [tool for tool in ("fio", "qemu-nbd", "qemu-img", "nbdkit") if not has(tool)]
    if missing:
        sys.exit(f"error: not installed: {', '.join(missing)}; run scripts/install-tools")
    options.dir.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that servers and files are cleared away
    start_s = time.monotonic()
    rows: list[Row] = []
    results: list[Result] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.dir) as temporary:
        directory = Path(temporary)
        parts: dict[str, Callable[[], None]] = {
            "throughput": lambda: throughput(directory, options, rows),
            "big": lambda: results.extend(big(directory, options.seconds, options.pool_bytes)),
            "reopen": lambda: results.extend(reopen(directory, options.reopen_bytes)),
            "pressure": lambda: results.extend(pressure(directory, options.seconds, options.size // 2)),
            "scrub": lambda: results.extend(scrub(directory, options.size)),
            "nbd": lambda: results.extend(protocol(directory, options.seconds)),
            "nbdkit": lambda: results.extend(nbdkit(directory, options.seconds, options.rounds, options.size)),
            "snapshots": lambda: results.extend(
                snapshots(directory, options.snapshot_parts, options.seconds, options.rounds, full=options.full)
            ),
            "fuse": lambda: results.extend(fuse(directory, options.seconds, options.rounds, options.size // 2, say)),
            "mirror": lambda: results.extend(
                mirror(directory, options.mirror_parts, options.seconds, options.rounds, options.size // 2, say)
            ),
            "upgrade": lambda: results.extend(upgrade(directory, options.upgrades, options.size // 16, say)),
            "tiering": lambda: results.extend(
                tiering(directory, options.parts, scale_of(options.seconds, full=options.full), say)
            ),
        }
        for name in options.only:
            say(f"{name} ...")
            try:
                parts[name]()
            except (DaemonError, FioError, RuntimeError) as failure:
                failures.append(f"{name}: {failure}")
                console.print(f"[red]FAILED[/red] {name}", highlight=False)
                console.print(str(failure), markup=False, highlight=False)
    if any(row.rounds for row in rows):
        console.print(throughput_table(rows))
    if results:
        console.print(results_table(results))
    verdicts = [row.passed for row in rows] + [stall < STALL_TARGET_MS for row in rows for stall in row.stalls_ms]
    verdicts += [result.passed for result in results]
    missed = verdicts.count(False)
    console.print(
        f"{verdicts.count(True)} targets reached, {missed} missed, {len(failures)} parts failed, "
        f"in {time.monotonic() - start_s:.0f} s"
    )
    if options.json:
        options.json.write_text(json.dumps(document(options, rows, results) | {"failures": failures}, indent=2) + "\n")
    return 1 if failures or (missed and options.strict) else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure Terrace against qemu-nbd and nbdkit, and against its targets."
    )
    parser.add_argument("--seconds", type=float, help="of each measurement (default 3)")
    parser.add_argument("--rounds", type=int, help="of all measurements (default 3)")
    parser.add_argument("--size", type=parse_size, help="of the volumes (default 2G)")
    parser.add_argument("--quick", action="store_true", help="a look: 1 s, one round, 512 MiB, 128 MiB to replay")
    parser.add_argument(
        "section", nargs="*", metavar="SECTION", help="the same as --only, as in `scripts/bench tiering`"
    )
    parser.add_argument(
        "--only", nargs="+", choices=ALL_SECTIONS, default=SECTIONS, help=f"default: {', '.join(SECTIONS)}"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of tiering (default: all)")
    parser.add_argument(
        "--mirror-parts", nargs="+", choices=MIRROR_PARTS, default=MIRROR_PARTS, help="of mirror (default: all)"
    )
    parser.add_argument("--upgrades", type=int, help="of upgrade (default 20)")
    parser.add_argument(
        "--snapshot-parts",
        nargs="+",
        choices=SNAPSHOT_PARTS,
        default=SNAPSHOT_PARTS,
        help="of snapshots (default: all)",
    )
    parser.add_argument(
        "--full", action="store_true", help="tiering and snapshots with the sizes and lengths of its targets: hours"
    )
    parser.add_argument("--servers", nargs="+", metavar="LABEL", help="only these columns, as 'terrace' 'qemu-nbd raw'")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument(
        "--strict", action="store_true", help="exit status 1 when a target is missed, not only when a part fails"
    )
    parser.add_argument("--dir", type=Path, default=REPOSITORY / ".cache", help="where the data goes (default .cache)")
    options = parser.parse_args()
    unknown = [section for section in options.section if section not in ALL_SECTIONS]
    if unknown:
        parser.error(f"there is no section {unknown[0]!r}: choose from {', '.join(ALL_SECTIONS)}")
    options.only = options.section or options.only
    quick = options.quick
    options.seconds = options.seconds or (1.0 if quick else 3.0)
    options.rounds = options.rounds or (1 if quick else 3)
    options.size = options.size or (512 * MIB if quick else 2048 * MIB)
    options.upgrades = options.upgrades or (5 if quick else 20)
    options.reopen_bytes = 128 * MIB if quick else 1024 * MIB
    options.pool_bytes = 2 * options.size
    return options


def has(tool: str) -> bool:
    return subprocess.run(["which", tool], capture_output=True, check=False).returncode == 0


def say(what: str) -> None:
    console.print(f"[dim]{what}[/dim]")


# Throughput


def throughput(directory: Path, options: argparse.Namespace, rows: list[Row]) -> None:
    """Measures all workloads on all servers into `rows`."""
    servers = [
        server
        for server in all_servers(directory, options.size)
        if not options.servers or server.label in options.servers
    ]
    if not servers:
        sys.exit(f"error: no server is called {' or '.join(options.servers)}")
    needed_bytes = (len(servers) + 1) * options.size
    if psutil.virtual_memory().available < needed_bytes:
        say(f"less than {needed_bytes >> 30} GiB of memory are available: not everything will stay in the page cache")
    rows += [Row(workload) for workload in WORKLOADS]
    try:
        for server in servers:
            server.start()
            say(f"{server.label}: overwriting until warm: {', '.join(warm(server))} MB/s")
        for number in range(options.rounds):
            turn = servers[number % len(servers) :] + servers[: number % len(servers)]
            for row in rows:
                say(f"round {number + 1} of {options.rounds}: {row.workload.title}")
                for server in turn:
                    measure(row, server, options)
    finally:
        for server in servers:
            server.stop()


def warm(server: Server) -> Iterable[str]:
    """Overwrites all of the volume until a pass is less than a tenth faster than the best before; yields MB/s."""
    least, most = WARM_PASSES
    best = 0.0
    for number in range(1, most + 1):
        speed = fio(server.uri(), "--rw=write", "--bs=1M", "--iodepth=4").bytes_per_s
        yield f"{speed / 1e6:.0f}"
        if number >= least and speed < best * 1.1:
            return
        best = max(best, speed)


def measure(row: Row, server: Server, options: argparse.Namespace) -> None:
    """One cell of one round. Written data is on the disk before the next cell begins, so nobody pays for another."""
    if isinstance(server, Terrace):
        server.stall_ms()
    process = server.process()
    before = process.cpu_times()
    measurement = fio(server.uri(), *row.workload.options, "--time_based", f"--runtime={options.seconds * 1000:.0f}ms")
    after = process.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    row.rounds.setdefault(server.label, []).append(measurement)
    row.cpu_us.setdefault(server.label, []).append(cpu_s * 1e6 / max(1, measurement.operations))
    if isinstance(server, Terrace):
        row.stalls_ms.append(server.stall_ms())
    if row.workload.writes:
        subprocess.run(["sync", "--file-system", options.dir], check=False)


# Reports


def throughput_table(rows: list[Row]) -> Table:
    labels = [label for label in rows[0].rounds if label != "terrace"]
    if "terrace" in rows[0].rounds:
        labels = ["terrace", *labels]
    labels.sort(key=lambda label: [server.label for server in all_servers(Path(), 1)].index(label))
    table = Table(title="Terrace and its peers: medians; ratios are Terrace to the other", title_justify="left")
    table.add_column("workload")
    for label in labels:
        table.add_column(label, justify="right")
    for title in ("/ qemu raw", "/ nbdkit", "target", "", "p99 ms", "stall ms"):
        table.add_column(title, justify="right")
    for row in rows:
        target = row.workload.least_ratio
        ours = row.rounds.get("terrace", [])
        p99_ms = statistics.median(measurement.p99_ms for measurement in ours) if ours else None
        stall_ms = row.stall_ms
        table.add_row(
            row.workload.title,
            *(row.workload.shown(row.median(label) or 0) for label in labels),
            number(row.ratio(BASELINE), "x"),
            number(row.ratio("nbdkit file"), "x"),
            f">= {target:g}x" if target else "",
            verdict(row.passed),
            number(p99_ms),
            number(stall_ms) if stall_ms is None or stall_ms < STALL_TARGET_MS else f"[red]{stall_ms:.1f}[/red]",
        )
    return table


def results_table(results: list[Result]) -> Table:
    table = Table(title="Targets of their own", title_justify="left")
    table.add_column("part")
    table.add_column("what")
    table.add_column("measured", justify="right")
    table.add_column("target", justify="right")
    table.add_column("")
    for result in results:
        measured = f"{amount(result)} {result.unit}"
        table.add_row(result.section, result.what, measured, result.target, verdict(result.passed))
    return table


def amount(result: Result) -> str:
    return f"{result.value:,.0f}" if result.value >= 1000 else f"{result.value:.3g}"


def number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.2f}{unit}"


def verdict(passed: bool | None) -> str:
    return {None: "", True: "[green]PASS[/green]", False: "[red]MISS[/red]"}[passed]


def document(options: argparse.Namespace, rows: list[Row], results: list[Result]) -> dict[str, Any]:
    return {
        "machine": {
            "kernel": platform.release(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "seconds": options.seconds,
        "rounds": options.rounds,
        "size_bytes": options.size,
        "throughput": [
            {
                "workload": row.workload.title,
                "target_ratio": row.workload.least_ratio,
                "passed": row.passed,
                "ratio": {label: row.ratio(label) for label in row.rounds if label != "terrace"},
                "stall_max_ms": row.stall_ms,
                "servers": {
                    label: {"rounds": [asdict(m) for m in rounds], "server_cpu_us_per_operation": row.cpu_us[label]}
                    for label, rounds in row.rounds.items()
                },
            }
            for row in rows
        ],
        "results": [asdict(result) | {"passed": result.passed} for result in results],
    }


if __name__ == "__main__":
    sys.exit(main())
