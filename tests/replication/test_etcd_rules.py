"""With etcd as the arbiter the rules hold under crashes and cuts, and a rule with a mistake doesn't."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
import trio
import trio.testing

from replication.membership import Options, Term
from tests.replication import test_fake_etcd_cluster
from tests.replication.etcdmodel import MUTANTS, EtcdWorld
from tests.replication.model import Violated, explore
from tests.replication.nodes import Nodes
from tests.replication.rule_mutants import mutated
from tests.replication.stores import MIRROR, first_record
from tests.terrace import test_arbiter


def test_a_leg_of_a_mirror_with_etcd_promises_nothing_while_the_primary_may_serve_by_its_answers() -> None:
    """Nor for a lease after its start, when it can't know whom it has answered before."""

    async def main() -> None:
        nodes = Nodes("ab")
        first = first_record("ab", options=Options(lease_s=3.0, arbiter="etcd"))
        await nodes.all["b"].keeper.accept(first)
        nodes.all["b"].restart()
        voter = nodes.all["b"].voter
        for answered in (False, True):
            if answered:
                await voter.heartbeat(MIRROR, first.term)
            await trio.sleep(2.9)
            with pytest.raises(OSError, match="may promise nothing") as refused:
                await voter.prepare(MIRROR, Term(2, "2" * 16), "b")
            assert refused.value.errno == errno.EBUSY
        await trio.sleep(0.2)
        await voter.prepare(MIRROR, Term(2, "2" * 16), "b")

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("first", [0, 20])
def test_nothing_acknowledged_is_lost_and_nobody_else_acknowledges(first: int) -> None:
    promotions = sum(explore(seed, kind=EtcdWorld).promotions for seed in range(first, first + 20))
    assert promotions > 15


def test_nor_where_the_primary_may_be_a_node_with_neither_a_leg_nor_a_say() -> None:
    promotions = sum(explore(seed, kind=EtcdWorld, without=True).promotions for seed in range(20))
    assert promotions > 15


CAUGHT_BY: dict[str, Callable[[], None]] = {
    "no-key": test_fake_etcd_cluster.test_the_fakes_leases_end_and_are_taken_over_as_those_of_the_real_one,
    "some-leg-answers": test_arbiter.test_a_primary_may_serve_while_etcd_or_all_legs_in_sync_answer,
    "promise-at-once": (test_a_leg_of_a_mirror_with_etcd_promises_nothing_while_the_primary_may_serve_by_its_answers),
}
"""What a run finds too seldom: its smallest case. The others are found by runs."""
BEGIN = {"no-compare": 60, "etcd-alone": 90}
"""Seeds shortly before one that does; if the rules change, a later one does."""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_rule_with_a_mistake_is_caught(name: str) -> None:
    with mutated(MUTANTS[name]):
        if name in CAUGHT_BY:
            with pytest.raises((AssertionError, pytest.fail.Exception, OSError)):
                CAUGHT_BY[name]()
        else:
            with pytest.raises(Violated):
                for seed in range(BEGIN.get(name, 0), BEGIN.get(name, 0) + 150):
                    explore(seed, kind=EtcdWorld)
