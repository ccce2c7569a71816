"""Snapshots of mirrors: one instant on all legs, of several mirrors too, and what becomes of a leg that lacks one."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest
import trio

from replication.leg import BLOCK_BYTES, LegState, MirrorState
from replication.mirror import Mirror
from replication.snapshots import Lacking, take_at_once
from tests.replication.rig import Rig, run


def block(value: int) -> memoryview:
    return memoryview(bytes([value]) * BLOCK_BYTES)


async def take(rigs: Sequence[Rig], name: str) -> dict[Mirror, Lacking]:
    """Of all these, whose local legs are on one node."""

    async def here(mirrors: Sequence[Mirror]) -> None:
        going = [rig for rig in rigs if rig.mirror in mirrors]
        for rig in going:
            if name in rig.store("a").snapshots:
                raise OSError(errno.EEXIST, f"{name} is there already")
        for rig in going:
            await rig.store("a").snapshot(name)

    return await take_at_once({rig.mirror: name for rig in rigs}, here)


def test_a_snapshot_is_taken_at_the_same_place_in_the_order_on_every_leg() -> None:
    async def body() -> None:
        rig = Rig(3)
        rig.nodes["b"].link.delay_s = 0.01
        async with rig.running() as mirror:
            stop = False

            async def write() -> None:
                for number in range(10_000):
                    if stop:
                        return
                    await mirror.write(number % 16 * BLOCK_BYTES, block(number % 251))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                nursery.start_soon(write)
                await trio.sleep(0.2)
                assert await take([rig], "one") == {mirror: {}}
                await trio.sleep(0.2)
                stop = True
            first, second, third = (rig.store(node).snapshots["one"] for node in "abc")
            assert first == second == third
            assert any(first)
            with pytest.raises(OSError, match="already"):
                await take([rig], "one")
            assert mirror.status().state is MirrorState.ONLINE, "what fails here excludes nobody"

    run(body)


def test_a_leg_that_refuses_a_snapshot_lacks_it_and_stays_in_sync() -> None:
    async def body() -> None:
        rig = Rig(3)
        async with rig.running() as mirror:
            await mirror.write(0, block(1))
            rig.store("c").snapshots["one"] = b"another one of that name"
            lacking = await take([rig], "one")
            assert list(lacking[mirror]) == ["legc"] and "already" in lacking[mirror]["legc"]
            assert rig.store("b").snapshots["one"][:1] == b"\x01"
            assert rig.store("c").snapshots["one"] == b"another one of that name"
            assert mirror.status().state is MirrorState.ONLINE

    run(body)


@contextlib.asynccontextmanager
async def two() -> AsyncIterator[tuple[Rig, Rig]]:
    """Two mirrors of one node."""
    first, second = Rig(2), Rig(2)
    second.record = replace(second.record, mirror="e" * 32)
    second.cluster.truth = second.record
    async with first.running(), second.running():
        yield first, second


def test_a_group_over_mirrors_has_every_write_that_a_later_one_came_from_and_none_that_came_later() -> None:
    async def body() -> None:
        async with two() as (first, second):
            second.nodes["b"].link.delay_s = 0.005
            stop = False

            async def ping_pong() -> None:
                for number in range(1, 250):
                    if stop:
                        return
                    await first.mirror.write(0, block(number))
                    await second.mirror.write(0, block(number))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ping_pong)
                for turn in range(8):
                    await trio.sleep(0.037)
                    await take([first, second], f"s{turn}")
                stop = True
            for turn in range(8):
                for node in "ab":
                    ahead, behind = (rig.store(node).snapshots[f"s{turn}"][0] for rig in (first, second))
                    assert ahead in (behind, behind + 1), (turn, node, ahead, behind)

    run(body)


def test_groups_that_name_the_same_mirrors_in_another_order_never_wait_for_each_other_for_ever() -> None:
    async def body() -> None:
        async with two() as rigs:
            with trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    for number in range(10):
                        nursery.start_soon(take, rigs[:: 1 if number % 2 else -1], f"s{number}")
            assert all(len(rig.store(node).snapshots) == 10 for rig in rigs for node in "ab")

    run(body)


def test_a_leg_that_hangs_is_dropped_and_holds_no_mirror_of_the_group_up_for_longer_than_two_timeouts() -> None:
    async def body() -> None:
        async with two() as (first, second):
            longest_s, stop = 0.0, False

            async def write() -> None:
                nonlocal longest_s
                while not stop:
                    begun = trio.current_time()
                    await first.mirror.write(0, block(7))
                    longest_s = max(longest_s, trio.current_time() - begun)
                    await trio.sleep(0.01)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                second.nodes["b"].link.delay_s = 1e6  # nothing comes through any more
                nursery.start_soon(second.mirror.write, 0, block(3))
                await trio.sleep(0.1)
                lacking = await take([first, second], "one")
                stop = True
            assert lacking[first.mirror] == {} and list(lacking[second.mirror]) == ["legb"]
            assert second.state("b") is not LegState.UP_TO_DATE
            assert longest_s <= 2 * second.record.options.timeout_s + 0.5
            assert second.store("a").snapshots["one"][:1] == b"\x03"

    run(body)


def test_a_snapshot_on_a_disk_that_never_answers_holds_up_clients_for_a_while_only() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            with rig.store("a").hung(), trio.fail_after(40):
                with pytest.raises(OSError, match="within 10 s") as caught:
                    await take([rig], "one")
                assert caught.value.errno == errno.ETIMEDOUT
                await mirror.write(0, block(1))
            assert not rig.store("b").snapshots
            await rig.whole()

    run(body)


def test_where_the_plain_volumes_of_a_group_refuse_no_mirror_has_a_snapshot() -> None:
    async def body() -> None:
        async with two() as rigs:

            async def here(mirrors: Sequence[Mirror]) -> None:
                raise OSError(errno.ENOSPC, "the pool is too full")

            with pytest.raises(OSError, match="too full"):
                await take_at_once({rig.mirror: "one" for rig in rigs}, here)
            assert not any(rig.store(node).snapshots for rig in rigs for node in "ab")
            await rigs[0].mirror.write(0, block(1))  # nothing is held up any more

    run(body)


def test_a_leg_that_is_away_is_told_as_lacking_and_gets_no_snapshot_later() -> None:
    async def body() -> None:
        rig = Rig(2, in_sync=["lega"])
        rig.nodes["b"].link.cut()
        async with rig.running() as mirror:
            lacking = await take([rig], "one")
            assert list(lacking[mirror]) == ["legb"]
            rig.nodes["b"].link.mend()
            await rig.whole()
            assert rig.store("b").snapshots == {}

    run(body)


def test_a_mirror_whose_writes_wait_refuses_a_group_and_holds_no_other_up_meanwhile() -> None:
    async def body() -> None:
        async with two() as (first, second):
            second.cluster.quorum = False
            longest_s, stop = 0.0, False

            async def write() -> None:
                nonlocal longest_s
                while not stop:
                    begun = trio.current_time()
                    await first.mirror.write(0, block(7))
                    longest_s = max(longest_s, trio.current_time() - begun)
                    await trio.sleep(0.01)

            async with trio.open_nursery() as nursery:
                second.nodes["b"].link.cut()
                nursery.start_soon(second.mirror.write, 0, block(3))
                await trio.sleep(0.5)
                nursery.start_soon(write)
                with pytest.raises(OSError, match="a record without the leg on b doesn't count yet"):
                    await take([first, second], "one")
                stop = True
                nursery.cancel_scope.cancel()
            assert longest_s < 0.1
            assert not first.store("a").snapshots

    run(body)
