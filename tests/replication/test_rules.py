"""The rules hold under crashes and cuts, and a rule with a mistake doesn't: each mutant is caught."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.replication import test_keeper, test_orders, test_promotion, test_voters
from tests.replication.model import Violated, explore
from tests.replication.rule_mutants import MUTANTS, mutated

SEEDS = int(os.environ.get("TERRACE_RULE_SEEDS", "40"))


def in_home(test: Callable[[Path], None]) -> Callable[[], None]:
    def run() -> None:
        with tempfile.TemporaryDirectory() as home:
            test(Path(home))

    return run


CAUGHT_BY: dict[str, Callable[[], None]] = {
    "promise-in-memory": test_keeper.test_a_promise_is_durable_before_it_is_given_and_fences_lower_terms,
    "majority-without-legs": test_voters.test_a_record_counts_at_a_majority_and_at_each_of_its_legs,
    "own-copy-last": test_promotion.test_a_demotion_that_got_lost_leaves_no_two_that_may_go_on,
    "alone-whatever-promised": (
        test_promotion.test_a_restarted_primary_goes_on_alone_unless_it_has_promised_or_lost_something
    ),
    "not-intact": test_keeper.test_a_leg_is_intact_after_a_kill_and_a_clean_close_and_not_after_another_boot,
    "intact-by-taking-part": (
        test_keeper.test_a_leg_is_intact_after_a_kill_and_a_clean_close_and_not_after_another_boot
    ),
    "inconsistent-forgotten": (test_keeper.test_a_leg_that_rejoins_keeps_what_it_has_differently_until_it_is_in_sync),
    "lease-after-promise": in_home(test_voters.test_a_voter_promises_nothing_while_the_primary_may_serve),
    "lease-lost-by-restart": in_home(
        lambda home: test_voters.test_nor_does_its_restart_take_that_lease_from_it(home, "a")
    ),
    "no-lease": in_home(test_voters.test_a_voter_promises_nothing_while_the_primary_may_serve),
    "one-number-ordered": (
        test_promotion.test_two_terms_of_one_number_have_no_order_and_who_has_heard_of_the_other_that_serves_needs_force
    ),
    "anybody-supersedes": test_promotion.test_a_primary_that_was_fenced_makes_nobody_give_up,
    "highest-place-wins": (
        test_promotion.test_a_side_that_was_left_behind_by_force_does_not_go_on_once_it_has_heard_of_the_other_that_serves
    ),
    "obeys-anybody": test_orders.test_a_primary_that_is_none_any_more_has_nothing_given_up,
    "apart-forgotten": test_promotion.test_what_a_returning_leg_is,
}
"""What a run finds too seldom: its smallest case. The others are found by runs."""
BEGIN = {
    "legs-without-majority": 60,
    "token-for-two": 45,
    "forks-harmless": 130,
    "superseded-forgotten": 180,
    "retired-forgets": 500,
    "tried-counts": 50,
}
"""Seeds shortly before one that does; if the rules change, a later one does."""


@pytest.mark.parametrize("first", range(0, SEEDS, 20))
def test_nothing_acknowledged_is_lost_and_nobody_else_acknowledges(first: int) -> None:
    promotions = sum(explore(seed).promotions for seed in range(first, first + 20))
    assert promotions > 20


def test_nor_where_the_primary_may_be_a_node_with_neither_a_leg_nor_a_say() -> None:
    promotions = sum(explore(seed, without=True).promotions for seed in range(20))
    assert promotions > 20


@pytest.mark.parametrize("name", MUTANTS)
def test_a_rule_with_a_mistake_is_caught(name: str) -> None:
    with mutated(MUTANTS[name]):
        if name in CAUGHT_BY:
            with pytest.raises((AssertionError, pytest.fail.Exception, OSError)):
                CAUGHT_BY[name]()
        else:
            with pytest.raises(Violated):
                for seed in range(BEGIN.get(name, 0), BEGIN.get(name, 0) + 150):
                    explore(seed)
