"""One fio run against one NBD URI or one file, and what of its report the bench uses."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class FioError(Exception):
    """fio failed; the message is what it said."""


@dataclass(frozen=True)
class Measurement:
    """Of one run. `seconds` is what fio counted, its start-up not included."""

    iops: float
    bytes_per_s: float
    p50_ms: float
    p99_ms: float
    seconds: float
    operations: int
    longest_ms: float
    """The longest that a request took."""


def fio(uri: str, *options: str, timeout_s: float = 180.0) -> Measurement:
    """Runs one job with these options. A request that fails, or is never answered, fails the run."""
    return _run("--ioengine=nbd", f"--uri={uri}", *options, timeout_s=timeout_s)


def fio_file(path: Path, *options: str, timeout_s: float = 180.0) -> Measurement:
    """The same on a file or block device, with direct asynchronous IO."""
    return _run("--ioengine=libaio", "--direct=1", f"--filename={path}", *options, timeout_s=timeout_s)


def _run(*options: str, timeout_s: float) -> Measurement:
    command = ["fio", "--name=bench", "--output-format=json", *options]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise FioError(f"{' '.join(command)}\nnot finished in {timeout_s:.0f} s: requests are not answered") from None
    if result.returncode != 0:
        raise FioError(f"{' '.join(command)}\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    (job,) = json.loads(result.stdout[result.stdout.index("{") :])["jobs"]
    sides = [job["read"], job["write"]]
    (side,) = [side for side in sides if side["total_ios"]] or sides[:1]
    percentile = side["clat_ns"].get("percentile", {})
    return Measurement(
        iops=side["iops"],
        bytes_per_s=side["bw_bytes"],
        p50_ms=_ms(percentile, "50.000000"),
        p99_ms=_ms(percentile, "99.000000"),
        seconds=side["runtime"] / 1000,
        operations=side["total_ios"],
        longest_ms=side["clat_ns"]["max"] / 1e6,
    )


def _ms(percentile: dict[str, Any], key: str) -> float:
    return float(percentile.get(key, 0)) / 1e6
