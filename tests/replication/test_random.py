"""Clients, faults and crashes by seed, against the oracle of `tests.replication.world`; and wrong mirrors, all caught.

A failure names its seed: `run_seeded(SEED, World(SEED).run)` is the same run.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import trio

from tests.replication import (
    test_keeper,
    test_localleg,
    test_mirror,
    test_mirrorreads,
    test_nbdleg_mirror,
    test_replica,
    test_resync,
)
from tests.replication.fakes import run_seeded
from tests.replication.mutants import AT_RANDOM, MUTANTS
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


@pytest.mark.parametrize("first", range(0, 16, 8))
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


@pytest.mark.parametrize("name", AT_RANDOM)
def test_a_mirror_that_is_wrong_is_caught_by_random_runs(name: str) -> None:
    with MUTANTS[name](), pytest.raises((AssertionError, trio.TooSlowError, BaseExceptionGroup)):
        for seed in range(100):
            life(seed)


SINGLE: dict[str, Callable[[], None]] = {
    "resync doesn't wait for batches that the leg didn't get": (
        test_resync.test_batches_that_were_in_flight_when_a_leg_came_back_are_copied_to_it
    ),
    "resync reads while older batches are in flight": (
        test_resync.test_what_the_source_has_yet_to_apply_is_waited_for_before_it_is_copied
    ),
    "reads don't wait": test_mirror.test_a_read_that_overlaps_a_write_in_flight_waits_for_it,
    "what a resize that was given up may cut off is written": (
        test_mirror.test_nothing_is_acknowledged_behind_the_end_that_a_record_after_a_growth_that_counts_may_have
    ),
    "reads are lent beside batches in flight": test_mirror.test_a_read_that_overlaps_a_write_in_flight_waits_for_it,
    "extents leave the tracker before the flush": (
        test_resync.test_an_extent_is_missing_until_the_leg_has_made_it_durable
    ),
    "legs aren't reconciled at the start": (
        test_mirror.test_legs_that_differ_after_a_crash_are_equal_before_anything_is_served
    ),
    "recent is forgotten though a leg hasn't flushed": (
        test_localleg.test_what_was_written_after_a_flush_began_is_remembered_when_it_has_ended_everywhere
    ),
    "a closed leg keeps those who wait for its disk": lambda: (
        test_mirror.test_the_primarys_own_disk_that_never_answers_is_dropped_within_the_timeout("flush")
    ),
    "a disk that never answers a read isn't silent": lambda: (
        test_mirror.test_the_primarys_own_disk_that_never_answers_is_dropped_within_the_timeout("read")
    ),
    "a session begins while a primary on the node is still writing": (
        test_replica.test_a_session_waits_for_what_a_deposed_primary_of_this_node_is_just_writing
    ),
    "what a leg misses is dropped though a record without it may be stored": lambda: (
        test_keeper.test_a_mark_of_a_record_that_may_be_stored_is_kept_whatever_is_flushed_meanwhile("before")
    ),
    "what a leg in resync has got lately isn't noted when it fails": (
        test_resync.test_what_a_leg_in_resync_got_and_lost_before_a_common_flush_is_brought_again
    ),
    "parts of blocks are merged without a lock": (
        test_mirror.test_parts_of_blocks_are_merged_and_two_writers_of_one_block_lose_nothing
    ),
    "what failed below quorum is read": (
        test_mirror.test_a_write_that_failed_below_quorum_isnt_read_before_a_record_counts_and_stays_once_it_was_read
    ),
    "who waits for a write that fails below quorum reads it": (
        test_mirror.test_a_read_that_waits_for_a_write_fails_with_it_below_quorum
    ),
    "what a primary begins with is read before a record counts": (
        test_mirror.test_what_a_primary_begins_with_isnt_read_while_a_record_calls_a_leg_in_sync_that_isnt_there
    ),
    "what an NBD server has behind the end isn't missed when the mirror grows": lambda: (
        test_nbdleg_mirror.test_what_an_export_has_behind_the_end_is_zeros_when_the_mirror_has_grown(False)
    ),
    "what is mapped is told though the lease was over": (
        test_mirrorreads.test_no_hole_is_told_by_a_primary_whose_lease_was_over_when_it_looked
    ),
    "a batch of before the last leg was lost is acknowledged": (
        test_mirror.test_when_the_last_leg_fails_its_error_is_the_clients_and_the_mirror_begins_anew
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_wrong_mirror_is_caught_by_something(name: str) -> None:
    assert (name in AT_RANDOM) != (name in SINGLE)
    if name in SINGLE:
        with MUTANTS[name](), pytest.raises((AssertionError, trio.TooSlowError, BaseExceptionGroup)):
            SINGLE[name]()
