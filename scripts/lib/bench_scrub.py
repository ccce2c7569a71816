"""The bench's section about scrubs: as fast as the device, and what clients notice of it."""

from __future__ import annotations

import json
import statistics
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from bench_fio import fio
from bench_sections import GIB, Result, running, stall
from bench_servers import Terrace

SCRUB_TARGET_PERCENT = 80.0
SCRUB_ROUNDS = 5


def scrub(directory: Path, size_bytes: int) -> list[Result]:
    """Scrubs of a full volume, and fio reading the very same device past the page cache, in turn.

    The volume was written in 1 MiB pieces, and then an eighth of it by 4k writes at random, which make small batches.
    """
    section = "scrub"
    config = "[pool]\ncheckpoint_interval_s = 1\n"
    speeds: list[float] = []
    devices: list[float] = []
    cpu_s = read_bytes = 0.0
    with running(Terrace(directory / "scrub", size_bytes, 2 * size_bytes, config)) as server:
        daemon = server.daemon
        device = directory / "scrub" / "fast"
        fio(server.uri(), "--rw=write", "--bs=1M", "--iodepth=4", "--end_fsync=1")
        fio(
            *(server.uri(), "--rw=randwrite", "--bs=4k", "--iodepth=32", "--norandommap"),
            *(f"--io_size={size_bytes // 8}", "--end_fsync=1"),
        )
        daemon.api("POST", "/v1/pools/bench/checkpoint")
        time.sleep(2)  # the cleaner and the kernel's write-back
        server.stall_ms()
        for _ in range(SCRUB_ROUNDS):
            devices.append(fio_device(device, size_bytes))
            before = server.process().cpu_times()
            found = scrub_once(server)
            after = server.process().cpu_times()
            cpu_s += after.user + after.system - before.user - before.system
            read_bytes += found["last"]["done_bytes"]
            speeds.append(found["last"]["done_bytes"] / found["last"]["active_s"])
            if found["errors"]:
                raise RuntimeError(f"the scrub found {found['errors']} errors: {found['damage'][:3]}")
        stalled = stall(section, "a scrub", server)
        with Load(server, 4.0) as load:
            busy = scrub_once(server)
            while load.lasts:
                busy = scrub_once(server)
        shares = [100 * speed / rate for speed, rate in zip(speeds, devices, strict=True)]
        return [
            Result(
                section, "device, fio: sequential 1 MiB reads QD4, direct", statistics.median(devices) / 1e6, "MB/s"
            ),
            Result(section, "scrub", statistics.median(speeds) / 1e6, "MB/s"),
            Result(section, "share of the device's rate", statistics.median(shares), "%", least=SCRUB_TARGET_PERCENT),
            Result(section, "CPU for each GiB read", cpu_s / (read_bytes / GIB), "s"),
            stalled,
            Result(
                section,
                "scrub beside 4k random reads QD1",
                busy["last"]["done_bytes"] / busy["last"]["active_s"] / 1e6,
                "MB/s",
            ),
            Result(section, "their rate without the scrub", load.before.iops, "IOPS"),
            Result(section, "their rate with it", load.during.iops, "IOPS"),
        ]


def scrub_once(server: Terrace) -> Any:
    """A whole scrub; its status."""
    daemon = server.daemon
    daemon.api("POST", "/v1/pools/bench/scrub", {"action": "start"})
    while (found := daemon.api("GET", "/v1/pools/bench/scrub"))["state"] == "running":
        time.sleep(0.2)
    return found


def fio_device(device: Path, size_bytes: int) -> float:
    """Bytes a second of one sequential reader that always has four requests with the device."""
    command = ["fio", "--name=device", f"--filename={device}", "--readonly", "--rw=read", "--bs=1M", "--iodepth=4"]
    command += ["--ioengine=libaio", "--direct=1", f"--size={size_bytes}", "--output-format=json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    if result.returncode:
        raise RuntimeError(f"fio can't read {device}: {result.stderr.strip()}")
    return float(json.loads(result.stdout[result.stdout.index("{") :])["jobs"][0]["read"]["bw_bytes"])


class Load:
    """4k random reads, measured by themselves and then while the block runs."""

    def __init__(self, server: Terrace, seconds: float) -> None:
        self._options = (
            *(server.uri(), "--rw=randread", "--bs=4k", "--iodepth=1", "--norandommap", "--time_based"),
            f"--runtime={1000 * seconds:.0f}ms",
        )
        self.before = fio(*self._options)
        self.during = self.before
        self._thread = threading.Thread(target=self._run)

    @property
    def lasts(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        self.during = fio(*self._options)

    def __enter__(self) -> Load:
        self._thread.start()
        time.sleep(1)  # fio's start-up
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.join()
