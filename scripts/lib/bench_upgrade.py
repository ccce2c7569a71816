"""The daemon replaced under a verified load: no error, no wrong byte, and how long clients wait.

fio writes at random at queue depth 32 and reads back what it wrote, while `terrace upgrade` is done again and again.
The longest pause is that of the slowest request of all, so it is never too small: a slow disk or a busy machine counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from bench_sections import Result, running
from bench_servers import Terrace

from tests.system.fioload import Fio, LoadError

PAUSE_TARGET_S = 1.0
SERVING_S = 0.3
"""Between two upgrades."""


def upgrade(directory: Path, upgrades: int, size_bytes: int, say: Callable[[str], None]) -> list[Result]:
    """Raises RuntimeError where fio meets an error or a wrong byte."""
    section = "upgrade"
    pauses: list[float] = []
    took: list[float] = []
    with running(Terrace(directory / "upgrade", size_bytes, 2 * size_bytes)) as server:
        with Fio(server.uri(), str(size_bytes)) as load:
            time.sleep(2)  # fio's start-up
            for number in range(upgrades):
                start_s = time.monotonic()
                told = server.daemon.upgrade()["succession"]
                took.append(time.monotonic() - start_s)
                if told["clients"] != 1:
                    raise RuntimeError(f"fio was disconnected by upgrade {number + 1}:\n{server.daemon.tail()}")
                pauses.append(told["pause_s"])
                say(f"upgrade {number + 1} of {upgrades}: a pause of {told['pause_s']:.3f} s")
                time.sleep(SERVING_S)
            try:
                report = load.stop()
            except LoadError as error:
                raise RuntimeError(str(error)) from None
        if server.daemon.stop() != 0:
            raise RuntimeError(f"the last daemon did not stop in order:\n{server.daemon.tail()}")
    return [
        Result(section, f"errors and wrong bytes of fio, 4k random writes QD32, {upgrades} upgrades", 0, "", most=1),
        Result(section, "written, and as many verified", report.writes, "requests"),
        Result(section, "longest pause as the client sees it", report.longest_s, "s", PAUSE_TARGET_S),
        Result(section, "longest pause as the daemons say", max(pauses), "s", PAUSE_TARGET_S),
        Result(section, "an upgrade, with the start of the new process", sum(took) / len(took), "s"),
    ]
