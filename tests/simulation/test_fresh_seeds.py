"""A minute of seeds that were never used before. What fails prints its seed, and the command that replays it.

A minute of this process's CPU time, so that as much is searched when other tests run beside it.
"""

from __future__ import annotations

import random
import time

import pytest

from tests.simulation.workload import Run

CPU_S = 60.0


@pytest.mark.long
def test_a_minute_of_fresh_seeds_breaks_no_promise() -> None:
    first = random.SystemRandom().randrange(1 << 40)
    end_s = time.process_time() + CPU_S
    cycles = seeds = 0
    while time.process_time() < end_s:
        run = Run.of(first + seeds)
        print(run.command())  # the last one shown is the one that failed
        cycles += run.live().cycles
        seeds += 1
    assert seeds and cycles
