"""A load of fio's that goes on until it is told to stop, and whose every byte is verified."""

from __future__ import annotations

import json
import signal
import subprocess
from dataclasses import dataclass

from tests.system.daemon import environment

STOP_TIMEOUT_S = 60.0


class LoadError(AssertionError):
    """fio met an error or a wrong byte; the message is what it said."""


@dataclass(frozen=True)
class Report:
    reads: int
    """Most of them to verify what was written."""
    writes: int
    longest_s: float
    """The longest that a request took."""


class Fio:
    """fio's NBD engine, which writes at random at depth 32, verifying soon what it wrote, until it is told to stop."""

    def __init__(self, uri: str, size: str = "32M") -> None:
        self.process = subprocess.Popen(
            [
                *("fio", "--name=v", "--ioengine=nbd", f"--uri={uri}", "--output-format=json", "--rw=randwrite"),
                *("--bs=4k", "--iodepth=32", f"--size={size}", "--time_based", "--runtime=86400", "--thread"),
                *("--verify=crc32c", "--verify_backlog=256", "--verify_fatal=1"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            env=environment(),
        )

    def __enter__(self) -> Fio:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()

    def stop(self) -> Report:
        """What it has done. Raises LoadError if anything failed or any byte was wrong until now."""
        ended = self.process.poll() is not None
        self.process.send_signal(signal.SIGINT)
        try:
            said, errors = self.process.communicate(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise LoadError(f"fio hasn't ended in {STOP_TIMEOUT_S:g} s: requests are not answered") from None
        complaints = [line for line in errors.splitlines() if "verify" in line or "err" in line.lower()]
        if ended or complaints:
            raise LoadError(f"fio has ended before it was told to:\n{errors}\n{said[-2000:]}")
        (job,) = json.loads(said[said.index("{") :])["jobs"]
        if job["error"]:
            raise LoadError(f"fio's job ended with error {job['error']}:\n{errors}")
        sides = job["read"], job["write"]
        return Report(
            reads=job["read"]["total_ios"],
            writes=job["write"]["total_ios"],
            longest_s=max(side["clat_ns"]["max"] for side in sides) / 1e9,
        )
