"""Clients, faults and crashes by seed, against the oracle of `tests.replication.world`; and wrong mirrors, all caught.

A failure names its seed: `run_seeded(SEED, World(SEED).run)` is the same run.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator

import pytest
import trio

from tests.replication.fakes import run_seeded
from tests.replication.mutants import MUTANTS, SEEDS
from tests.replication.world import World


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def life(seed: int) -> Counter[str]:
    async def body() -> Counter[str]:
        return await World(seed).run()

    found: Counter[str] = run_seeded(seed, body)
    return found


@pytest.mark.parametrize("first", range(0, 32, 8))
def test_no_fault_loses_an_acknowledged_write_or_lets_a_read_go_back(first: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(first, first + 8):
        try:
            seen += life(seed)
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error
    assert seen["acknowledged"] > 500 and seen["reads"] > 500


def test_the_same_seed_is_the_same_run() -> None:
    assert life(11) == life(11)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mirror_that_is_wrong_is_caught(name: str) -> None:
    seed = SEEDS[name]
    life(seed)
    with MUTANTS[name](), contextlib.ExitStack() as caught:
        caught.enter_context(pytest.raises((AssertionError, trio.TooSlowError, BaseExceptionGroup)))
        life(seed)
