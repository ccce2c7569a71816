"""A minute of seeds that were never used before. What fails prints its seed, and the command that replays it."""

from __future__ import annotations

import random
import time

from tests.simulation.workload import Run

WALL_S = 60.0


def test_a_minute_of_fresh_seeds_breaks_no_promise() -> None:
    first = random.SystemRandom().randrange(1 << 40)
    end = time.monotonic() + WALL_S
    cycles = seeds = 0
    while time.monotonic() < end:
        run = Run.of(first + seeds)
        print(run.command())  # the last one shown is the one that failed
        cycles += run.live().cycles
        seeds += 1
    assert seeds and cycles
