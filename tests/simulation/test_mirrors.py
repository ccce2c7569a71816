"""Lives of mirrors with the real engine and rules on simulated machines: fixed seeds, fresh ones, and wrong mirrors.

A failure names its seed and shows the schedule; `python -m tests.simulation.mirrors --seed N` lives it once more.
"""

from __future__ import annotations

import gc
import logging
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator

import pytest
import trio

from tests.simulation.mirrors.__main__ import first_line
from tests.simulation.mirrors.life import live
from tests.simulation.mirrors.mutants import CAUGHT_BY, MUTANTS

FIXED = range(10)
FRESH_CPU_S = 4.0


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    gc.collect()


def test_fixed_lives_break_no_promise_and_are_rich() -> None:
    seen: Counter[str] = Counter()
    for seed in FIXED:
        print(f"seed {seed}")  # the last one shown is the one that failed
        seen += live(seed).counts
    assert seen["acknowledged"] > 400 and seen["reads"] > 200 and seen["inspected"] > 40
    for happened in (
        "promotions",
        "demotions",
        "snapshots",
        "flushes",
        "kill",
        "power",
        "partition",
        "refused writes",
        "taken over",
    ):
        assert seen[happened] > 0, happened


def test_fresh_lives_break_no_promise() -> None:
    first = random.SystemRandom().randrange(1 << 40)
    end_s, count = time.process_time() + FRESH_CPU_S, 0
    while time.process_time() < end_s:
        print(f"seed {first + count}")
        live(first + count)
        count += 1
    assert count


def test_the_same_seed_is_the_same_life_in_another_process() -> None:
    command = [sys.executable, "-m", "tests.simulation.mirrors", "--seed", "3"]
    one, other = (subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2))
    assert "digest" in one and one == other


def test_every_wrong_mirror_can_be_planted() -> None:
    for plant in MUTANTS.values():
        with plant():
            pass  # LookupError if its passage isn't there any more


@pytest.mark.parametrize("name", CAUGHT_BY)
def test_a_mirror_that_is_wrong_is_caught(name: str) -> None:
    with MUTANTS[name]():
        for seed in CAUGHT_BY[name]:
            try:
                live(seed)
            except (AssertionError, OSError, trio.TooSlowError, BaseExceptionGroup) as error:
                print(f"seed {seed}: {first_line(error)}")
                return
    raise AssertionError(f"{name}: not noticed")
