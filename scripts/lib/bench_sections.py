"""What the bench measures without peers: a huge volume, reopening after a kill, and a pool with no room to spare."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_fio import fio
from bench_servers import Terrace

from tests.system import nbdclient

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

STALL_TARGET_MS = 50.0
ANSWER_TARGET_S = 0.1
MEMORY_TARGET_MIB = 120.0
CPU_TARGET_PERCENT = 1.0
REOPEN_TARGET_S = 3.0
LONGEST_TRIM_BYTES = (1 << 32) - 4096
"""NBD's lengths have 32 bits: a 10 TiB volume is trimmed by 2,561 requests, all sent at once."""


@dataclass(frozen=True)
class Result:
    """One line of the second table. `most` or `least` is the target; without, the value is only for information."""

    section: str
    what: str
    value: float
    unit: str
    most: float | None = None
    least: float | None = None

    @property
    def passed(self) -> bool | None:
        if self.least is not None:
            return self.value >= self.least
        return None if self.most is None else self.value < self.most

    @property
    def target(self) -> str:
        if self.least is not None:
            return f">= {self.least:g} {self.unit}"
        return "" if self.most is None else f"< {self.most:g} {self.unit}"


def timed(action: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    action()
    return time.perf_counter() - start_s


@contextmanager
def running(server: Terrace) -> Iterator[Terrace]:
    try:
        server.start()
        yield server
    finally:
        server.stop()


def stall(section: str, what: str, server: Terrace) -> Result:
    return Result(section, f"longest stall of the loop: {what}", server.stall_ms(), "ms", STALL_TARGET_MS)


# A volume of 10 TiB


def big(directory: Path, seconds: float, pool_bytes: int) -> list[Result]:
    """Create, fill a little, trim and delete 10 TiB; the idle daemon before and after."""
    results: list[Result] = []
    size_bytes = 10 * TIB

    def report(what: str, value: float, unit: str = "s", most: float | None = None) -> None:
        results.append(Result("10 TiB", what, value, unit, most))

    with running(Terrace(directory / "big", 0, pool_bytes)) as server:
        daemon = server.daemon
        volumes = "/v1/pools/bench/volumes"
        body = {"name": "volume", "size": size_bytes}
        report("create, control API", timed(lambda: daemon.api("POST", volumes, body)), most=ANSWER_TARGET_S)
        report("create, `terrace volume create`", timed(lambda: daemon.cli("volume", "create", "bench/second", "10T")))
        report("trim all of it, empty", trim_all(server), most=ANSWER_TARGET_S)
        results += idle("10 TiB", "idle daemon", server, seconds, with_targets=True)

        server.stall_ms()
        written = fio(
            *(server.uri(), "--rw=randwrite", "--bs=4k", "--iodepth=32", "--norandommap", f"--size={size_bytes}"),
            *("--time_based", f"--runtime={seconds * 1000:.0f}ms"),
        )
        report("4k random writes all over it", written.iops, "IOPS")
        results.append(stall("10 TiB", "4k random writes all over it", server))
        mapped_bytes = daemon.api("GET", f"{volumes}/volume")["mapped_bytes"]
        available_bytes = daemon.pool("bench")["available_bytes"]
        what = f"trim all of it, {mapped_bytes / MIB:.0f} MiB in it"
        report(what, trim_all(server), most=ANSWER_TARGET_S)
        report("until its space is available again", until_available(server, available_bytes + mapped_bytes * 0.9))
        results.append(stall("10 TiB", "trim of all of it", server))
        results += idle("10 TiB", "idle daemon after all that", server, seconds, with_targets=False)
        report("delete, control API", timed(lambda: daemon.api("DELETE", f"{volumes}/volume")), most=ANSWER_TARGET_S)
    return results


def trim_all(server: Terrace) -> float:
    """Seconds from the first request until the last reply; connecting is not counted."""
    with nbdclient.Connection(server.daemon.socket, "bench/volume") as connection:
        starts = range(0, connection.size_bytes, LONGEST_TRIM_BYTES)
        requests = b"".join(
            connection.encode(nbdclient.TRIM, start, min(LONGEST_TRIM_BYTES, connection.size_bytes - start))[1]
            for start in starts
        )

        def send_and_wait() -> None:
            connection.socket.sendall(requests)
            for _ in starts:
                if connection.reply().error:
                    raise RuntimeError("a trim failed")

        return timed(send_and_wait)


def until_available(server: Terrace, wanted_bytes: float, timeout_s: float = 60.0) -> float:
    start_s = time.monotonic()
    while server.daemon.pool("bench")["available_bytes"] < wanted_bytes:
        if time.monotonic() - start_s > timeout_s:
            raise RuntimeError(f"trimmed space was not available again within {timeout_s:.0f} s")
        time.sleep(0.05)
    return time.monotonic() - start_s


def idle(section: str, what: str, server: Terrace, seconds: float, *, with_targets: bool) -> list[Result]:
    """Memory and CPU of a daemon that nobody asks anything for max(5, seconds) seconds."""
    process = server.process()
    time.sleep(1)  # what came before has its echo
    process.cpu_percent()
    time.sleep(max(5.0, seconds))
    cpu_percent = process.cpu_percent()
    memory_mib = process.memory_info().rss / MIB
    return [
        Result(section, f"{what}: resident memory", memory_mib, "MiB", MEMORY_TARGET_MIB if with_targets else None),
        Result(section, f"{what}: CPU", cpu_percent, "%", CPU_TARGET_PERCENT if with_targets else None),
    ]


# Reopening after a kill


def reopen(directory: Path, written_bytes: int) -> list[Result]:
    """SIGKILL with random 4k writes since the last checkpoint, then the time until a first read is answered."""
    config = '[pool]\ncheckpoint_interval_s = 86400\ncheckpoint_log = "1T"\n'
    section = "reopen"
    results: list[Result] = []
    with running(Terrace(directory / "reopen", 100 * GIB, 4 * written_bytes, config)) as server:
        daemon = server.daemon
        daemon.kill()
        results.append(Result(section, "start with an empty volume", daemon.start(), "s"))
        server.stall_ms()
        before = daemon.pool("bench")
        fio(
            *(server.uri(), "--rw=randwrite", "--bs=4k", "--iodepth=32", "--norandommap"),
            *(f"--size={100 * GIB}", f"--io_size={written_bytes}"),
        )
        results.append(stall(section, "4k random writes to 100 GiB", server))
        after = daemon.pool("bench")
        daemon.kill()
        # A sequence number is a batch of writes, so this is the share of them that must be replayed.
        batches = after["log_seq"] - before["log_seq"]
        share = min(1.0, (after["log_seq"] - after["checkpoint_seq"]) / max(1, batches))

        def first_read() -> None:
            daemon.start()
            with nbdclient.Connection(daemon.socket, "bench/volume") as connection:
                connection.read(0, 4096)

        what = f"kill -9, start, first read; {share * written_bytes / MIB:.0f} MiB of 4k writes to replay"
        results.append(Result(section, what, timed(first_read), "s", REOPEN_TARGET_S))
        results.append(
            Result(section, "checkpoints in spite of the setting", after["checkpoints"] - before["checkpoints"], "")
        )
        results.append(stall(section, "replay", server))
    return results


# No room to spare


def pressure(directory: Path, seconds: float, size_bytes: int) -> list[Result]:
    """Random overwrites of a full volume whose pool is only volume / 0.85, with checkpoints forced meanwhile."""
    section = "pressure"
    config = "[pool]\ncheckpoint_interval_s = 1\n"
    with running(Terrace(directory / "pressure", size_bytes, int(size_bytes / 0.85), config)) as server:
        daemon = server.daemon
        fill = fio(server.uri(), "--rw=write", "--bs=1M", "--iodepth=4")
        before = daemon.pool("bench")
        server.stall_ms()
        load = fio(
            *(server.uri(), "--rw=randwrite", "--bs=4k", "--iodepth=32", "--norandommap"),
            *("--time_based", f"--runtime={4000 * seconds:.0f}ms"),
        )
        results = [stall(section, "4k random writes, cleaner and checkpoints at work", server)]
        after = daemon.pool("bench")
        client_bytes, device_bytes, moved = (
            after[key] - before[key] for key in ("client_written_bytes", "device_written_bytes", "blocks_moved")
        )
        results += [
            Result(section, "filling it with 1 MiB writes", fill.bytes_per_s / 1e6, "MB/s"),
            Result(section, "4k random writes QD32", load.iops, "IOPS"),
            Result(section, "their 99th percentile", load.p99_ms, "ms"),
            Result(section, "rewritten since it was filled", client_bytes / size_bytes, "times"),
            Result(
                section, "written to the device for each byte written", device_bytes / max(1, client_bytes), "times"
            ),
            Result(section, "blocks moved by the cleaner", moved, ""),
            Result(section, "checkpoints meanwhile", after["checkpoints"] - before["checkpoints"], ""),
        ]
        server.stop()
        reopened = timed(daemon.start)
        results.append(Result(section, "start after kill -9 under it", reopened, "s"))
        results.append(Result(section, "resident memory then", server.process().memory_info().rss / MIB, "MiB"))
    return results
