"""What every `ClusterStore` promises, as tests: a module that brings a `clusters` fixture imports them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import pytest
import trio

from replication.cluster import ClusterStore
from replication.membership import Membership, Options, Term
from tests.replication.stores import MIRROR, first_record


class World(Protocol):
    """Nodes a, b, c with one truth."""

    options: Options
    """Of its mirror."""

    def cluster(self, node: str) -> ClusterStore:
        """The truth, seen and changed from there."""

    def cut(self) -> None:
        """Nobody can be reached any more."""

    def heal(self) -> None: ...


Clusters = Callable[[], AbstractAsyncContextManager[World]]


def errno_of(refused: pytest.ExceptionInfo[OSError]) -> str:
    assert refused.value.strerror
    return errno.errorcode[refused.value.errno or 0]


async def begun(world: World) -> Membership:
    first = first_record("abc", options=world.options)
    await world.cluster("a").create(first)
    return first


def test_what_was_committed_is_found_by_everybody(clusters: Clusters) -> None:
    async def main() -> None:
        async with clusters() as world:
            with pytest.raises(OSError, match=MIRROR) as refused:
                await world.cluster("b").newest(MIRROR)
            assert errno_of(refused) == "ENOENT"
            first = await begun(world)
            assert await world.cluster("b").newest(MIRROR) == first
            second = first.next_epoch(in_sync=frozenset("ab"))
            await world.cluster("a").commit(second, expected=first)
            third = second.next_term(Term(2, "2" * 16), "b", frozenset("ab"))
            await world.cluster("b").commit(third, expected=second)
            for node in "abc":
                assert await world.cluster(node).newest(MIRROR) == third

    trio.run(main)


def test_a_mirror_is_created_once(clusters: Clusters) -> None:
    async def main() -> None:
        async with clusters() as world:
            first = await begun(world)
            await world.cluster("a").create(first)  # the answer was lost
            with pytest.raises(OSError, match="already") as refused:
                await world.cluster("b").create(first_record("abc", primary="b", options=world.options))
            assert errno_of(refused) == "EEXIST"

    trio.run(main)


def test_the_same_record_may_be_committed_again_and_another_one_not(clusters: Clusters) -> None:
    async def main() -> None:
        async with clusters() as world:
            first = await begun(world)
            second = first.next_epoch(in_sync=frozenset("ab"))
            for _ in range(2):
                await world.cluster("a").commit(second, expected=first)
            with pytest.raises(OSError, match="record") as refused:
                await world.cluster("a").commit(first.next_epoch(in_sync=frozenset("ac")), expected=first)
            assert errno_of(refused) == "ESTALE"
            assert await world.cluster("c").newest(MIRROR) == second

    trio.run(main)


def test_an_older_term_is_refused(clusters: Clusters) -> None:
    async def main() -> None:
        async with clusters() as world:
            first = await begun(world)
            await world.cluster("b").commit(first.next_term(Term(3, "3" * 16), "b", frozenset("abc")), expected=first)
            for late in (first.next_term(Term(2, "2" * 16), "c", frozenset("abc")), first.next_epoch()):
                with pytest.raises(OSError, match=r"record|promised term 3") as refused:
                    await world.cluster("c").commit(late, expected=first)
                assert errno_of(refused) == "ESTALE"

    trio.run(main)


def test_of_two_that_go_on_from_the_same_record_at_most_one_succeeds(clusters: Clusters) -> None:
    async def main() -> None:
        async with clusters() as world:
            first = await begun(world)
            won = []

            async def go_on(node: str, record: Membership) -> None:
                try:
                    await world.cluster(node).commit(record, expected=first)
                    won.append(record)
                except OSError as error:
                    assert error.errno in (errno.ESTALE, errno.ETIMEDOUT)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(go_on, "b", first.next_term(Term(2, "b" * 16), "b", frozenset("abc")))
                nursery.start_soon(go_on, "c", first.next_term(Term(2, "c" * 16), "c", frozenset("abc")))
            assert len(won) <= 1
            if won:
                assert await world.cluster("a").newest(MIRROR) == won[0]

    trio.run(main)


def test_what_does_not_follow_is_refused(clusters: Clusters) -> None:
    async def main() -> None:
        async with clusters() as world:
            first = await begun(world)
            other = first_record("abc", primary="b", options=world.options).next_epoch()
            only_b = first.next_epoch(in_sync=frozenset("b"))
            with pytest.raises(OSError, match="successor") as refused:
                await world.cluster("a").commit(other, expected=first)
            assert errno_of(refused) == "EINVAL"
            await world.cluster("a").commit(only_b, expected=first)
            with pytest.raises(OSError, match="at least one leg") as refused:
                await world.cluster("a").commit(only_b.next_epoch(in_sync=frozenset("ac")), expected=only_b)
            assert errno_of(refused) == "EINVAL"

    trio.run(main)


def test_when_nobody_answers_it_is_in_doubt_and_the_same_may_be_tried_again(clusters: Clusters) -> None:
    async def main() -> None:
        async with clusters() as world:
            first = await begun(world)
            second = first.next_epoch(in_sync=frozenset("ab"))
            world.cut()
            with pytest.raises(OSError, match="answered") as refused:
                await world.cluster("a").commit(second, expected=first)
            assert errno_of(refused) == "ETIMEDOUT"
            with pytest.raises(OSError, match="answered") as refused:
                await world.cluster("c").newest(MIRROR)
            assert errno_of(refused) == "ETIMEDOUT"
            world.heal()
            await world.cluster("a").commit(second, expected=first)
            assert await world.cluster("c").newest(MIRROR) == second

    trio.run(main)
