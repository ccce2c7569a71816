"""The etcd in memory that the model uses keeps the contract that the real one keeps."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from replication.etcd import EtcdCluster, EtcdLease
from replication.membership import Membership, Options, Term
from tests.replication.cluster_contract import *  # noqa: F403
from tests.replication.cluster_contract import Clusters, World
from tests.replication.fakeetcd import FakeEtcd
from tests.replication.nodes import Nodes
from tests.replication.stores import MIRROR, first_record


class FakeWorld(Nodes):
    def __init__(self) -> None:
        super().__init__("abc", timeout_s=0.3)
        self.etcd = FakeEtcd()
        self.options = Options(arbiter="etcd")

    def cluster(self, node: str) -> EtcdCluster:  # type: ignore[override]
        return EtcdCluster(node, self.etcd, super().cluster(node))

    def cut(self) -> None:
        super().cut()
        self.etcd.is_cut = True

    def heal(self) -> None:
        super().heal()
        self.etcd.is_cut = False


@pytest.fixture
def clusters() -> Clusters:
    @asynccontextmanager
    async def begin() -> AsyncIterator[World]:
        yield FakeWorld()

    return begin


async def before_a_later_term(world: FakeWorld) -> tuple[Membership, Membership, EtcdLease]:
    """Node a is primary by the first record, and has its lease; the second one is of its next term."""
    first = first_record("abc", options=world.options)
    await world.cluster("a").create(first)
    lease = EtcdLease("a", world.etcd, MIRROR, 3.0)
    await lease.renew(first)
    return first, first.next_term(Term(2, "2" * 16), "a", frozenset("abc")), lease


def test_a_primary_that_begins_a_later_term_is_at_no_time_without_its_key() -> None:
    """It relies on its lease meanwhile: if another one's record got in, it would answer what is old."""

    async def main() -> None:
        world = FakeWorld()
        first, later, lease = await before_a_later_term(world)
        await world.cluster("a").commit(later, expected=first)
        theirs = later.next_term(Term(3, "3" * 16), "b", frozenset("abc"))
        with pytest.raises(OSError, match="node a is primary and alive"):
            await world.cluster("b").commit(theirs, expected=later)
        await lease.renew(later)
        await trio.sleep(3.1)  # without it nobody is kept out
        await world.cluster("b").commit(theirs, expected=later)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_primary_is_not_deposed_by_its_own_later_term_of_which_it_does_not_know_whether_it_counts() -> None:
    async def main() -> None:
        world = FakeWorld()
        first, later, lease = await before_a_later_term(world)
        world.all["c"].up = False
        with pytest.raises(OSError, match=r"record 2\.0 .* isn't stored") as refused:
            await world.cluster("a").commit(later, expected=first)
        assert refused.value.errno == errno.ETIMEDOUT
        with pytest.raises(OSError, match="this node has begun term 2") as refused:
            await lease.renew(first)
        assert refused.value.errno == errno.EAGAIN, "ESTALE ends what it serves"
        await lease.renew(later)
        theirs = later.next_term(Term(3, "3" * 16), "b", frozenset("ab"))
        await lease.release()
        await world.cluster("b").commit(theirs, expected=later)
        for mine in (first, later):
            with pytest.raises(OSError, match="node b is primary by the record") as refused:
                await lease.renew(mine)
            assert refused.value.errno == errno.ESTALE

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_the_fakes_leases_end_and_are_taken_over_as_those_of_the_real_one() -> None:
    async def main() -> None:
        world = FakeWorld()
        first = first_record("abc", options=world.options)
        await world.cluster("a").create(first)
        a, b = (EtcdLease(node, world.etcd, MIRROR, 1.2) for node in "ab")
        await a.renew(first)
        await trio.sleep(1.9)
        with pytest.raises(OSError, match="another node is primary"):
            await b.renew(first)
        await a.renew(first)
        await trio.sleep(1.9)
        new = first.next_term(Term(2, "2" * 16), "b", frozenset("abc"))
        with pytest.raises(OSError, match="node a is primary and alive"):
            await world.cluster("b").commit(new, expected=first)
        await trio.sleep(0.2)
        await world.cluster("b").commit(new, expected=first)
        with pytest.raises(OSError, match="node b is primary by the record"):
            await a.renew(first)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
