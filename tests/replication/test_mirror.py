"""The mirror's rules, one by one."""

from __future__ import annotations

import contextlib
import errno
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import trio

from nbd.export import LendsReads
from nbd.wire import STATE_HOLE, STATE_ZERO
from replication.leg import BLOCK_BYTES, EXTENT_BYTES, RECENT, Leg, LegState, MirrorState, missing_tracker
from replication.members import LegFacts
from replication.membership import LegInfo, Membership, Options
from replication.mirror import Mirror
from replication.reconcile import choose_source
from replication.resync import ResyncSettings
from replication.site import MirrorSettings
from tests.replication.fakes import FakeKeeper, MemoryExtents, MemoryLegStore, trackers_matching
from tests.replication.reads import read_as_clients_do
from tests.replication.rig import SIZE, TERM, Rig, Told, run, with_options


def block(value: int, blocks: int = 1) -> memoryview:
    return memoryview(bytes([value]) * (BLOCK_BYTES * blocks))


async def make_leg_stores(rig: Rig) -> None:
    """The stores of legs in sync, with their trackers, before it runs: what is written to them then is recent."""
    for node in "ab":
        rig.nodes[node].keeper = FakeKeeper(rig.store(node), f"leg{node}")
        await rig.nodes[node].keeper.accept(rig.record)


async def read(rig: Rig, offset: int, length: int) -> bytes:
    into = memoryview(bytearray(length))
    await read_as_clients_do(rig.mirror, offset, into)
    return bytes(into)


def test_a_write_is_acknowledged_when_every_leg_has_it_and_not_before() -> None:
    async def body() -> None:
        rig = Rig(3)
        async with rig.running() as mirror:
            rig.nodes["c"].link.stall()
            told = Told()
            assert mirror.write_later([(0, block(1)), (BLOCK_BYTES, block(2))], told)
            assert told.outcomes == []
            await rig.until(lambda: rig.store("b").image[0] == 1)
            await trio.sleep(0.1)
            assert told.outcomes == []
            rig.nodes["c"].link.resume()
            await rig.until(lambda: bool(told.outcomes))
            assert told.outcomes == [None]
            assert all(rig.store(node).image[BLOCK_BYTES] == 2 for node in "abc")

    run(body)


def test_each_leg_has_stored_that_it_lacks_nothing_before_the_mirror_serves() -> None:
    async def body() -> None:
        rig = Rig(3)
        async with rig.running():
            assert [node.keeper.settled_saved for node in rig.nodes.values()] == [True] * 3

    run(body)


def test_a_read_that_overlaps_a_write_in_flight_waits_for_it() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            rig.nodes["b"].link.stall()
            assert mirror.write_later([(0, block(1))], Told())
            into = memoryview(bytearray(BLOCK_BYTES))
            assert not mirror.read_now(EXTENT_BYTES - BLOCK_BYTES, BLOCK_BYTES, into)
            assert mirror.read_now(EXTENT_BYTES, BLOCK_BYTES, into)
            assert mirror.lend_reads() is None
            with trio.move_on_after(0.3) as scope:
                await mirror.read(0, BLOCK_BYTES, into)
            assert scope.cancelled_caught
            rig.nodes["b"].link.resume()
            assert await read(rig, 0, BLOCK_BYTES) == bytes(block(1))

    run(body)


def test_reads_are_lent_while_this_node_may_serve_and_its_leg_is_in_sync() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await mirror.write(0, block(1))
            into = memoryview(bytearray(BLOCK_BYTES))
            assert isinstance(mirror, LendsReads)
            lent = mirror.lend_reads()
            assert lent is not None and lent(0, BLOCK_BYTES, into) and into == block(1)
            mirror.took_reads(3, 3 * BLOCK_BYTES)
            counted = next(leg.counters for leg in mirror.status().legs if leg.is_local)
            assert (counted.reads, counted.read_bytes) == (3, 3 * BLOCK_BYTES)
            with mock.patch.object(mirror, "may_serve", lambda: False):
                assert mirror.lend_reads() is None
            leg = mirror.members["lega"].leg
            assert leg is not None
            mirror.leg_failed(leg, OSError(errno.EIO, "it is broken"))
            assert mirror.lend_reads() is None
            assert await read(rig, 0, BLOCK_BYTES) == bytes(block(1))  # by the other one

    run(body)


def test_parts_of_blocks_are_merged_and_two_writers_of_one_block_lose_nothing() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await mirror.write(0, block(9, 40))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mirror.write, 100, b"a" * 100)
                nursery.start_soon(mirror.write, 200, b"b" * 100)
                nursery.start_soon(mirror.write, 4000, b"c" * 70_000)
            expected = bytearray(block(9, 40))
            expected[100:300] = b"a" * 100 + b"b" * 100
            expected[4000:74_000] = b"c" * 70_000
            assert await read(rig, 0, len(expected)) == expected
            assert rig.store("a").image == rig.store("b").image

    run(body)


def test_zeros_and_trims_are_on_every_leg_and_partial_blocks_of_a_trim_stay() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await mirror.write(0, block(9, 32))
            await mirror.trim(100, 2 * BLOCK_BYTES)
            await mirror.write_zeroes(8 * BLOCK_BYTES + 5, 3 * BLOCK_BYTES, no_hole=False, fast=True)
            await mirror.write_zeroes(20 * BLOCK_BYTES + 5, 10, no_hole=True, fast=False)
            expected = bytearray(block(9, 32))
            expected[BLOCK_BYTES : 2 * BLOCK_BYTES] = bytes(BLOCK_BYTES)
            expected[8 * BLOCK_BYTES + 5 : 11 * BLOCK_BYTES + 5] = bytes(3 * BLOCK_BYTES)
            expected[20 * BLOCK_BYTES + 5 : 20 * BLOCK_BYTES + 15] = bytes(10)
            assert await read(rig, 0, len(expected)) == expected
            assert rig.store("a").image == rig.store("b").image
            with pytest.raises(OSError, match="no faster") as refused:
                await mirror.write_zeroes(0, BLOCK_BYTES, no_hole=True, fast=True)
            assert refused.value.errno == errno.ENOTSUP
            assert await mirror.extents(0, 4 * BLOCK_BYTES, 9) == [
                (BLOCK_BYTES, 0), (BLOCK_BYTES, STATE_HOLE | STATE_ZERO), (2 * BLOCK_BYTES, 0),
            ]  # fmt: skip
            told = Told()
            assert mirror.trim_later([(0, SIZE)], told)
            await rig.until(lambda: bool(told.outcomes))
            assert not any(rig.store("b").image)

    run(body)


def test_a_silent_leg_is_excluded_by_a_record_before_what_it_misses_is_acknowledged() -> None:
    async def body() -> None:
        rig = Rig(3)
        async with rig.running() as mirror:
            rig.nodes["c"].link.stall()
            rig.cluster.quorum = False
            began = trio.current_time()
            told = Told()
            assert mirror.write_later([(0, block(1))], told)
            await rig.until(lambda: rig.state("c") is LegState.OFFLINE)
            assert trio.current_time() - began < 1.2
            await trio.sleep(3)
            assert told.outcomes == [], "acknowledged without a record"
            assert not mirror.write_later([(0, block(1))], Told())
            waiting = "a record without the leg on c doesn't count yet: too few voters answer"
            assert mirror.status().waiting == waiting
            rig.cluster.quorum = True
            await rig.until(lambda: bool(told.outcomes))
            assert told.outcomes == [None]
            assert rig.cluster.truth.in_sync == {"lega", "legb"}
            for node in "ab":
                assert trackers_matching(rig.store(node), missing_tracker("legc")) == {0}
            await rig.until(lambda: rig.state("c") is LegState.STALE)
            assert mirror.status().state is MirrorState.DEGRADED
            rig.nodes["c"].link.mend()
            await rig.whole()
            assert rig.store("c").image[0] == 1

    run(body)


@pytest.mark.parametrize("unable", ["a", "b"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_a_leg_that_cant_store_the_record_without_another_one_is_left_out_too(unable: str, number: int) -> None:
    """Nothing is written or flushed meanwhile, which would fail at that leg."""

    async def body() -> None:
        rig = Rig(3)
        async with rig.running() as mirror:
            rig.nodes["c"].link.stall()
            told = Told()
            assert mirror.write_later([(0, block(1))], told)
            rig.cluster.quorum = False
            await rig.until(lambda: bool(mirror.excluding))
            rig.store(unable).failing = OSError(number, "it takes no writes")
            rig.cluster.quorum = True
            left = "b" if unable == "a" else "a"
            await rig.until(lambda: bool(told.outcomes))
            assert told.outcomes == [None]
            assert rig.cluster.truth.in_sync == {f"leg{left}"}
            assert mirror.status().waiting is None
            status = {leg.info.node: leg for leg in mirror.status().legs}
            assert status[unable].state is LegState.STALE and status[unable].error == "it takes no writes"
            assert bytes(await read(rig, 0, 4096)) == bytes(block(1))
            rig.store(unable).failing = None
            rig.nodes["c"].link.mend()
            await rig.whole()
            assert rig.store(unable).image[0] == rig.store("c").image[0] == 1

    run(body)


def test_the_last_leg_that_cant_store_the_record_without_another_one_stays_and_it_is_said_what_is_waited_for() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            rig.nodes["b"].link.stall()
            told = Told()
            assert mirror.write_later([(0, block(1))], told)
            rig.cluster.quorum = False
            await rig.until(lambda: bool(mirror.excluding))
            rig.store("a").failing = OSError(errno.ENOSPC, "the pool is full")
            rig.cluster.quorum = True
            await trio.sleep(3)
            assert rig.state("a") is LegState.UP_TO_DATE and not told.outcomes
            assert mirror.status().waiting == (
                "a record without the leg on b doesn't count yet: the record isn't stored: the pool is full"
            )
            rig.store("a").failing = None
            await rig.until(lambda: bool(told.outcomes))
            assert told.outcomes == [None] and mirror.status().waiting is None

    run(body)


def test_writes_that_wait_for_a_silent_leg_are_said_to_and_when_it_is_left_out_before_it_is() -> None:
    async def body() -> None:
        rig = Rig(2, options=Options(timeout_s=30.0))
        async with rig.running() as mirror:
            rig.nodes["b"].link.stall()
            told = Told()
            assert mirror.write_later([(0, block(1))], told)
            await trio.sleep(0.9)
            assert mirror.status().waiting is None, "each write takes a while"
            await trio.sleep(2.1)
            seen = mirror.status()
            assert seen.waiting == "the leg on node b has been silent for 3 s; it is left out after 30 s"
            assert seen.waits_for_leg and seen.state is MirrorState.ONLINE and not told.outcomes
            rig.nodes["b"].link.resume()
            await rig.until(lambda: bool(told.outcomes))
            assert told.outcomes == [None] and mirror.status().waiting is None and not mirror.status().waits_for_leg

    run(body)


def test_a_silent_leg_that_no_other_one_can_go_on_without_is_not_said_to_be_left_out() -> None:
    async def body() -> None:
        rig = Rig(2, diskless=True, options=Options(timeout_s=30.0))
        async with rig.running() as mirror:
            for node in "bc":
                rig.nodes[node].link.stall()
            assert mirror.write_later([(0, block(1))], Told())
            await trio.sleep(3)
            waiting = mirror.status().waiting
            assert waiting is not None
            assert waiting.endswith("has been silent for 3 s, and no other leg is there to go on without it")

    run(body)


def test_below_quorum_writes_fail_where_the_mirror_says_so() -> None:
    async def body() -> None:
        rig = Rig(2)
        with_options(rig, below_quorum="fail")
        async with rig.running() as mirror:
            rig.cluster.quorum = False
            rig.nodes["b"].link.cut()
            with pytest.raises(OSError, match="below quorum") as failed:
                await mirror.write(0, block(1))
            assert failed.value.errno == errno.EIO
            assert mirror.status().is_failing and not mirror.status().is_lost
            rig.cluster.quorum = True
            rig.nodes["b"].link.mend()
            await rig.whole()
            assert not mirror.status().is_failing
            await mirror.write(0, block(2))
            assert rig.store("b").image[0] == 2

    run(body)


def test_a_write_that_failed_below_quorum_isnt_read_before_a_record_counts_and_stays_once_it_was_read() -> None:
    async def body() -> None:
        rig = Rig(2)
        with_options(rig, below_quorum="fail")
        async with rig.running() as mirror:
            await mirror.write(0, block(7, 32))
            rig.cluster.quorum = False
            rig.nodes["b"].link.cut()
            with pytest.raises(OSError, match="below quorum"):
                await mirror.write(0, block(1))
            assert rig.store("a").image[0] == 1 and rig.store("b").image[0] == 7
            # Node b may become primary now, with the old bytes.
            with trio.fail_after(5), pytest.raises(OSError, match="below quorum") as failed:
                await mirror.read(0, BLOCK_BYTES, memoryview(bytearray(BLOCK_BYTES)))
            assert failed.value.errno == errno.EIO
            with trio.fail_after(5), pytest.raises(OSError, match="below quorum"):
                await mirror.extents(0, BLOCK_BYTES, 9)
            assert not mirror.read_now(0, BLOCK_BYTES, memoryview(bytearray(BLOCK_BYTES)))
            assert await read(rig, EXTENT_BYTES, BLOCK_BYTES) == bytes(block(7)), "others are as they were"
            rig.cluster.quorum = True
            await rig.until(lambda: not mirror.shut)
            assert await read(rig, 0, BLOCK_BYTES) == bytes(block(1))
            assert 0 in trackers_matching(rig.store("a"), missing_tracker("legb"))
            rig.nodes["b"].link.mend()
            await rig.whole()
            assert rig.store("b").image == rig.store("a").image
            assert not mirror.inflight.batches

    run(body)


def test_a_read_that_waits_for_a_write_fails_with_it_below_quorum() -> None:
    async def body() -> None:
        rig = Rig(2)
        with_options(rig, below_quorum="fail")
        async with rig.running() as mirror:
            rig.cluster.quorum = False
            rig.nodes["b"].link.stall()
            told = Told()
            assert mirror.write_later([(0, block(1))], told)
            with trio.fail_after(5), pytest.raises(OSError, match="below quorum"):
                await mirror.read(0, BLOCK_BYTES, memoryview(bytearray(BLOCK_BYTES)))
            assert len(told.outcomes) == 1
            rig.cluster.quorum = True
            rig.nodes["b"].link.mend()
            await rig.whole()
            assert len(told.outcomes) == 1, "it is answered once"

    run(body)


def test_what_a_primary_begins_with_isnt_read_while_a_record_calls_a_leg_in_sync_that_isnt_there() -> None:
    async def body() -> None:
        rig = Rig(2)
        await rig.nodes["a"].keeper.accept(rig.record)
        # As a crash leaves it: written here, not there, and never acknowledged.
        rig.store("a").write_now([(0, block(1))])
        rig.nodes["b"].link.cut()
        rig.cluster.quorum = False
        async with rig.running() as mirror:
            into = memoryview(bytearray(BLOCK_BYTES))
            assert not mirror.read_now(0, BLOCK_BYTES, into)
            with trio.move_on_after(3) as scope:
                await mirror.read(0, BLOCK_BYTES, into)
            assert scope.cancelled_caught
            rig.cluster.quorum = True
            await mirror.read(0, BLOCK_BYTES, into)
            assert into == block(1)
            assert mirror.membership.in_sync == {"lega"}

    run(body)


def test_a_primary_whose_record_is_refused_is_deposed_and_everything_fails_with_estale() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            rig.nodes["b"].link.stall()
            told = Told()
            assert mirror.write_later([(0, block(1))], told)
            rig.cluster.truth = rig.record.next_term(type(TERM)(9, "9" * 16), "b", frozenset({"legb"}))
            await mirror.ended.wait()
            await rig.until(lambda: bool(told.outcomes))
            assert told.outcomes[0] is not None and told.outcomes[0].errno == errno.ESTALE
            for refused in (mirror.write(0, block(1)), mirror.flush(), read(rig, 0, 512)):
                with pytest.raises(OSError, match="not the primary any more") as failed:
                    await refused
                assert failed.value.errno == errno.ESTALE
            with pytest.raises(OSError, match="not the primary any more"):
                mirror.write_later([(0, block(1))], Told())

    run(body)


def test_a_promise_on_the_primarys_own_node_ends_it_at_once() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await rig.nodes["a"].keeper.promise(type(TERM)(9, "9" * 16))
            told = Told()
            if mirror.write_later([(0, block(1))], told):
                await rig.until(lambda: bool(told.outcomes))
                assert told.outcomes[0] is not None
            await mirror.ended.wait()

    run(body)


def test_what_a_leg_may_have_queued_is_bounded() -> None:
    async def body() -> None:
        rig = Rig(2, settings=MirrorSettings(queue_bytes=64 << 10))
        async with rig.running() as mirror:
            rig.nodes["b"].link.stall()
            told = Told()
            assert mirror.write_later([(0, block(1, 16))], told)
            assert not mirror.write_later([(0, block(2))], told)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mirror.write, 0, block(3))
                await trio.sleep(0.1)
                assert rig.store("a").image[0] == 1
                rig.nodes["b"].link.resume()
            assert told.outcomes == [None]
            assert rig.store("b").image[0] == 3

    run(body)


def test_when_the_last_leg_fails_its_error_is_the_clients_and_the_mirror_begins_anew() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            rig.nodes["b"].link.cut()
            await mirror.write(0, block(1))
            rig.store("a").failing = OSError(errno.ENOSPC, "the pool is full")
            with pytest.raises(OSError, match="the pool is full") as failed:
                await mirror.write(0, block(2))
            assert failed.value.errno == errno.ENOSPC
            assert mirror.status().is_lost
            rig.store("a").failing = None
            await mirror.write(0, block(3))
            assert not mirror.status().is_lost
            assert await read(rig, 0, BLOCK_BYTES) == bytes(block(3))
            rig.nodes["b"].link.mend()
            await rig.whole()
            assert rig.store("b").image == rig.store("a").image

    run(body)


def test_a_flush_reaches_every_leg_and_a_common_one_comes_by_itself() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            before = [rig.store(node).flushes for node in "ab"]
            await mirror.flush()
            assert all(rig.store(node).flushes > was for node, was in zip("ab", before, strict=True))
            await mirror.write(0, block(1))
            assert trackers_matching(rig.store("a"), "recent*") == {0}
            await trio.sleep(4)
            for node in "ab":
                assert trackers_matching(rig.store(node), "recent*") == set()
                lost = rig.store(node).power_cut()
                assert lost == 0 and rig.store(node).image[0] == 1

    run(body)


@pytest.mark.parametrize("what", ["flush", "read", "write"])
def test_the_primarys_own_disk_that_never_answers_is_dropped_within_the_timeout(what: str) -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await mirror.write(0, block(1))
            with rig.store("a").hung():
                began = trio.current_time()
                into = memoryview(bytearray(BLOCK_BYTES))
                with trio.fail_after(5):
                    if what == "flush":
                        await mirror.flush()
                    elif what == "read":
                        await mirror.read(0, BLOCK_BYTES, into)
                        assert into == block(1), "another leg has it"
                    else:
                        await mirror.write(0, block(2))
                        await mirror.flush()
                assert 0.9 < trio.current_time() - began < 1.2
                await rig.until(lambda: mirror.membership.in_sync == {"legb"})
                assert rig.state("a") is LegState.STALE
                assert await read(rig, 0, BLOCK_BYTES) == bytes(block(2 if what == "write" else 1))
            await rig.whole()
            assert rig.store("a").image == rig.store("b").image

    run(body)


def test_recent_is_forgotten_after_some_common_flushes_though_clients_write_all_the_time() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            for number in range(80):
                await mirror.write(number % 64 * EXTENT_BYTES, block(1))
                await trio.sleep(0.1)
            for node in "ab":
                assert 0 < len(trackers_matching(rig.store(node), "recent*")) <= 32

    run(body)


def test_without_a_local_leg_reads_come_from_the_nearest() -> None:
    async def body() -> None:
        rig = Rig(3, diskless=True)
        rig.nodes["b"].link.delay_s, rig.nodes["c"].link.delay_s, rig.nodes["d"].link.delay_s = 0.03, 0.001, 0.02
        async with rig.running() as mirror:
            await mirror.write(0, block(1))
            for _ in range(20):
                assert await read(rig, 0, BLOCK_BYTES) == bytes(block(1))
            reads = {leg.info.node: leg.counters.reads for leg in mirror.status().legs}
            assert reads == {"b": 1, "c": 18, "d": 1}

    run(body)


def test_a_primary_without_a_leg_waits_for_its_first_one_and_then_a_moment_for_the_others() -> None:
    async def body() -> None:
        rig = Rig(3, diskless=True, settings=MirrorSettings(first_leg_s=10.0))
        links = {name: rig.nodes[name].link for name in "bcd"}
        for link in links.values():
            link.stalled = trio.Event()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def comes_back() -> None:
                for name, after_s in (("b", 3.0), ("c", 0.4), ("d", 0.4)):  # the mirror's timeout is 1 s
                    await trio.sleep(after_s)
                    stalled, links[name].stalled = links[name].stalled, None
                    assert stalled is not None
                    stalled.set()

            began = trio.current_time()
            async with rig.running() as mirror:
                assert 3.0 <= trio.current_time() - began < 5.0
                assert [rig.state(name) for name in "bc"] == [LegState.UP_TO_DATE] * 2
                await mirror.write(0, block(1))
                await rig.whole()

    run(body)


def test_a_local_leg_that_isnt_in_sync_is_not_read() -> None:
    async def body() -> None:
        rig = Rig(2, in_sync=["legb"])
        rig.store("b").image[:5] = b"truth"
        rig.known = False
        async with rig.running():
            assert await read(rig, 0, 5) == b"truth"
            await rig.whole()
            assert rig.store("a").image[:5] == b"truth"

    run(body)


def test_nothing_is_read_or_written_without_the_lease() -> None:
    async def body() -> None:
        serving = True
        again = trio.Event()
        rig = Rig(2, may_serve=lambda: serving, until_may_serve=lambda: again.wait())
        async with rig.running() as mirror:
            await mirror.write(0, block(1))
            serving = False
            into = memoryview(bytearray(BLOCK_BYTES))
            assert not mirror.read_now(0, BLOCK_BYTES, into)
            assert not mirror.write_later([(0, block(2))], Told())
            with trio.move_on_after(1) as scope:
                await mirror.read(0, BLOCK_BYTES, into)
            assert scope.cancelled_caught
            serving = True
            again.set()
            await mirror.read(0, BLOCK_BYTES, into)
            assert into == block(1)

    run(body)


def test_a_mirror_whose_lease_is_over_is_faulted_and_one_whose_writes_wait_for_a_record_is_degraded() -> None:
    async def body() -> None:
        lapsed: str | None = None
        rig = Rig(2, lapsed=lambda: lapsed)
        async with rig.running() as mirror:
            assert (mirror.status().state, mirror.status().waiting) == (MirrorState.ONLINE, None)
            lapsed = "a majority of the voters has not answered this node lately"
            assert (mirror.status().state, mirror.status().waiting) == (MirrorState.FAULTED, lapsed)
            lapsed = None
            rig.cluster.quorum = False
            rig.nodes["b"].link.cut()
            mirror.write_later([(0, block(1))], Told())
            await rig.until(lambda: bool(mirror.excluding))
            waiting = "a record without the leg on b doesn't count yet: too few voters answer"
            assert (mirror.status().state, mirror.status().waiting) == (MirrorState.DEGRADED, waiting)
            lapsed = "a majority of the voters has not answered this node lately"
            assert (mirror.status().state, mirror.status().waiting) == (MirrorState.FAULTED, waiting)

    run(body)


def test_a_resize_is_on_every_leg_and_in_the_record() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            for size in (SIZE * 2, SIZE // 2):
                await mirror.resize(size)
                assert mirror.size_bytes == rig.cluster.truth.size_bytes == size
                assert [rig.store(node).size_bytes for node in "ab"] == [size, size]

    run(body)


def test_what_an_interrupted_shrink_has_left_on_a_leg_is_never_seen_again() -> None:
    async def body() -> None:
        rig = Rig(2)
        rig.store("b").image = bytearray(bytes([7]) * (SIZE * 2))  # a crash came between the record and this leg
        async with rig.running() as mirror:
            assert rig.store("b").size_bytes == SIZE
            await mirror.resize(SIZE * 2)
            assert bytes(rig.store("b").image[SIZE:]) == bytes(SIZE)
        rig = Rig(2)
        async with rig.running() as mirror:
            await mirror.write(SIZE - BLOCK_BYTES, block(9))

            async def never(size_bytes: int) -> None:
                await trio.sleep_forever()

            with mock.patch.object(rig.store("b"), "resize", never):
                with trio.move_on_after(0.2) as given_up:  # less than it takes to leave the leg behind
                    await mirror.resize(SIZE // 2)
            assert given_up.cancelled_caught and mirror.size_bytes == SIZE // 2
            await mirror.resize(SIZE)
            for node in "ab":
                assert bytes(rig.store(node).image[SIZE // 2 :]) == bytes(SIZE // 2)

    run(body)


def test_a_leg_that_was_away_during_a_resize_has_the_right_size_when_it_is_in_sync() -> None:
    async def body() -> None:
        for size in (SIZE * 2, SIZE // 2):
            rig = Rig(2)
            async with rig.running() as mirror:
                rig.nodes["b"].link.cut()
                await mirror.write(0, block(1))
                await mirror.resize(size)
                assert rig.store("b").size_bytes == SIZE
                rig.nodes["b"].link.mend()
                await rig.whole()
                await mirror.write(size - BLOCK_BYTES, block(2))
                assert rig.store("b").size_bytes == size
                assert rig.store("a").image == rig.store("b").image
                assert [member.counters.failures for member in mirror.members.values()] == [0, 1]

    run(body)


def test_a_leg_that_comes_back_has_the_size_of_a_resize_that_was_given_up_and_counts_later() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            rig.nodes["b"].link.cut()
            await mirror.write(0, block(1))
            goes_on = rig.hold_resizes()
            rig.store("b").image[SIZE:] = block(7)  # a shrink that was given up has left it there
            with trio.move_on_after(0.2) as given_up:
                await mirror.resize(2 * SIZE)
            assert given_up.cancelled_caught and mirror.size_bytes == SIZE
            rig.nodes["b"].link.mend()
            await rig.until(lambda: rig.state("b") is LegState.SYNCING)
            goes_on[2 * SIZE].set()
            await rig.whole()
            assert mirror.size_bytes == rig.store("a").size_bytes == rig.store("b").size_bytes == 2 * SIZE
            await mirror.write(2 * SIZE - BLOCK_BYTES, block(2))
            assert rig.store("a").image == rig.store("b").image
            assert rig.state("b") is LegState.UP_TO_DATE

    run(body)


def test_a_resize_begins_when_it_is_known_what_came_of_one_that_was_given_up() -> None:
    """Else a leg that is there keeps what lies behind the end of a shrink that counts after all."""

    async def body() -> None:
        rig = Rig(2, size=2 * SIZE)
        async with rig.running() as mirror:
            await mirror.write(SIZE, block(9))
            rig.nodes["b"].link.cut()
            await mirror.write(0, block(1))
            goes_on = rig.hold_resizes()
            with trio.move_on_after(0.2) as given_up:
                await mirror.resize(SIZE)
            assert given_up.cancelled_caught
            with pytest.raises(OSError, match="isn't known yet whether another resize") as refused, trio.fail_after(9):
                await mirror.size_decided()
            assert refused.value.errno == errno.EBUSY and mirror.size_bytes == 2 * SIZE
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mirror.size_decided)
                await trio.sleep(0.1)
                goes_on[SIZE].set()
            assert mirror.size_bytes == SIZE
            with trio.move_on_after(0.2) as given_up:
                await mirror.resize(3 * SIZE)
            assert given_up.cancelled_caught and mirror.size_bytes == SIZE
            rig.nodes["b"].link.mend()
            await rig.until(lambda: rig.state("b") is LegState.SYNCING)
            goes_on[3 * SIZE].set()
            await rig.whole()
            assert mirror.size_bytes == 3 * SIZE
            assert rig.store("a").image == rig.store("b").image == bytes(block(1)) + bytes(3 * SIZE - BLOCK_BYTES)

    run(body)


@pytest.mark.parametrize("option", ["suspend", "fail"])
def test_clients_do_not_wait_for_long_for_a_resize_whose_record_can_not_count(option: str) -> None:
    async def body() -> None:
        rig = Rig(2)
        with_options(rig, below_quorum=option)
        async with rig.running() as mirror:
            rig.cluster.quorum = False
            async with trio.open_nursery() as nursery:

                async def grow() -> None:
                    with pytest.raises(OSError, match=r"bytes after 5 s: too few voters.* get them later: see") as late:
                        await mirror.resize(2 * SIZE)
                    assert late.value.errno == errno.ETIMEDOUT

                nursery.start_soon(grow)
                await trio.sleep(1)
                assert mirror.status().waiting == "a snapshot or a resize is being made: too few voters answer"
                with trio.fail_after(5):
                    await mirror.write(SIZE - BLOCK_BYTES, block(3))
            assert mirror.size_bytes == SIZE
            with pytest.raises(OSError, match="isn't known yet whether another resize") as refused:
                await mirror.resize(3 * SIZE)
            assert refused.value.errno == errno.EBUSY
            await mirror.write(0, block(4))  # clients go on
            rig.cluster.quorum = True
            await mirror.size_decided()
            await mirror.resize(3 * SIZE)
            assert mirror.size_bytes == rig.store("a").size_bytes == rig.store("b").size_bytes == 3 * SIZE

    run(body)


@pytest.mark.parametrize("option", ["suspend", "fail"])
def test_nothing_is_acknowledged_that_a_shrink_that_was_given_up_may_cut_off(option: str) -> None:
    """Its record is stored somewhere, perhaps: who is primary next goes on by it."""

    async def body() -> None:
        rig = Rig(2)
        with_options(rig, below_quorum=option)
        async with rig.running() as mirror:
            rig.cluster.quorum = False
            with pytest.raises(OSError, match="later, and nothing is written to it until that is known") as late:
                await mirror.resize(SIZE // 2)
            assert late.value.errno == errno.ETIMEDOUT
            outcomes: list[OSError | None] = []

            async def write() -> None:
                try:
                    await mirror.write(SIZE - BLOCK_BYTES, block(3))
                except OSError as error:
                    outcomes.append(error)
                else:
                    outcomes.append(None)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                await trio.sleep(10)
                failed = [error for error in outcomes if error is not None]
                assert len(outcomes) == len(failed) == (option == "fail")
                waiting = mirror.status().waiting
                assert waiting is not None and waiting.startswith(
                    "whether it is smaller, by a resize that was given up"
                )
                assert waiting.endswith(": too few voters answer")
                rig.cluster.quorum = True
            await rig.until(lambda: mirror.status().waiting is None)
            assert mirror.size_bytes == rig.cluster.truth.size_bytes == SIZE  # the record after it says so
            await write()
            assert outcomes[-1] is None and mirror.status().waiting is None

    run(body)


def test_nothing_is_acknowledged_behind_the_end_that_a_record_after_a_growth_that_counts_may_have() -> None:
    """The growth was given up, and the record after it, of the old size, is stored somewhere, perhaps."""

    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            commit, goes_on = rig.cluster.commit, trio.Event()
            growths: list[Membership] = []

            async def commits(new: Membership, *, expected: Membership) -> None:
                if new.size_bytes > SIZE and not growths:
                    growths.append(new)
                    await trio.sleep_forever()
                if rig.cluster.truth not in growths:
                    rig.cluster.truth = growths[0]  # it counts after all, which this one finds out
                    raise OSError(errno.ESTALE, "another record is newer")
                await goes_on.wait()
                await commit(new, expected=expected)

            rig.cluster.commit = commits  # type: ignore[method-assign]
            with trio.move_on_after(0.2):
                await mirror.resize(2 * SIZE)
            mirror.records.interrupt()
            await rig.until(lambda: mirror.size_bytes == 2 * SIZE)
            told = Told()
            assert not mirror.write_later([(SIZE, block(3))], told)
            with trio.move_on_after(30) as waited:
                await mirror.write(SIZE, block(3))
            assert waited.cancelled_caught
            goes_on.set()
            with trio.fail_after(5):
                await mirror.write(SIZE, block(3))
            assert mirror.size_bytes == rig.cluster.truth.size_bytes == 2 * SIZE

    run(body)


def test_a_resize_waits_for_a_mirror_that_begins_anew_while_its_barrier_waits() -> None:
    async def body() -> None:
        for size_bytes in (SIZE // 2, 2 * SIZE):
            rig = Rig(2)
            async with rig.running() as mirror:
                rig.nodes["b"].link.stall()
                told = Told()
                assert mirror.write_later([(0, block(1))], told)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(mirror.resize, size_bytes)
                    await trio.sleep(0.1)
                    for node in "ba":
                        leg = mirror.members[f"leg{node}"].leg
                        assert leg is not None
                        mirror.leg_failed(leg, OSError(errno.EIO, "it is broken for a moment"))
                    assert mirror.lost
                    rig.nodes["b"].link.resume()
                await rig.whole()
                assert mirror.size_bytes == size_bytes
                assert rig.store("a").size_bytes == rig.store("b").size_bytes == size_bytes

    run(body)


@pytest.mark.parametrize("option", ["suspend", "fail"])
def test_a_resize_ends_within_its_time_though_a_leg_fails_at_it_and_no_record_leaves_that_out(option: str) -> None:
    async def body() -> None:
        rig = Rig(2)
        with_options(rig, below_quorum=option)
        async with rig.running() as mirror:
            rig.cluster.quorum = False

            async def is_full(size_bytes: int) -> None:
                raise OSError(errno.ENOSPC, "the pool is full")

            refused = pytest.raises(OSError, match=f"It has {SIZE} bytes as before: resize it again")
            with mock.patch.object(rig.store("b"), "resize", is_full), trio.fail_after(6), refused as late:
                await mirror.resize(2 * SIZE)
            assert late.value.errno == errno.ETIMEDOUT and not mirror.barriers.held
            rig.cluster.quorum = True
            await rig.whole()
            await mirror.write(0, block(3))
            await mirror.resize(2 * SIZE)
            assert mirror.size_bytes == rig.store("a").size_bytes == rig.store("b").size_bytes == 2 * SIZE

    run(body)


def test_legs_grow_again_where_the_mirror_has_begun_anew_before_the_record_of_it_was_wanted() -> None:
    """Between the two an NBD server's leg is let go, which takes a record; a later term may be needed for that."""

    async def body() -> None:
        rig = Rig(2)
        rig.record = replace(rig.record, legs=(*rig.record.legs, LegInfo("nbd", "a", "nbd://nowhere/x", "nbd")))
        rig.cluster.truth = rig.record
        nowhere = mock.Mock()
        nowhere.open.side_effect = OSError(errno.ECONNREFUSED, "no server")
        rig.servers["nbd"] = nowhere
        async with rig.running() as mirror:
            await mirror.write(0, block(1))
            miss, misses = mirror.barriers._miss, 0

            async def interrupted(*about: Any) -> None:
                nonlocal misses
                misses += 1
                if misses == 1:
                    rig.cluster.quorum = False
                    rig.nodes["b"].link.cut()
                    leg = mirror.members["legb"].leg
                    assert leg is not None
                    mirror.leg_failed(leg, OSError(errno.EIO, "gone"))
                await miss(*about)

            async with trio.open_nursery() as nursery:
                with mock.patch.object(mirror.barriers, "_miss", interrupted):
                    nursery.start_soon(mirror.resize, 2 * SIZE)
                    await trio.sleep(2)
                    assert mirror.excluding and rig.store("a").size_bytes == 2 * SIZE
                    mirror.let_go()  # as `replication.laterterm` does
                    rig.nodes["b"].link.mend()
                    rig.cluster.quorum = True
                    await rig.until(lambda: mirror.size_bytes == 2 * SIZE)
            assert misses == 2
            await rig.until(lambda: rig.state("b") is LegState.UP_TO_DATE)
            assert rig.store("a").size_bytes == rig.store("b").size_bytes == 2 * SIZE
            await mirror.write(2 * SIZE - BLOCK_BYTES, block(3))
            assert rig.store("a").image == rig.store("b").image

    run(body)


def test_what_was_judged_by_the_size_before_a_shrink_is_not_written_behind_the_end() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await mirror.write(0, block(1))
            goes_on = rig.hold_resizes()
            with trio.move_on_after(0.2) as given_up:
                await mirror.resize(SIZE // 2)
            assert given_up.cancelled_caught
            goes_on[SIZE // 2].set()
            await rig.until(lambda: mirror.size_bytes == SIZE // 2)
            told = Told()
            assert not mirror.write_later([(0, block(2)), (SIZE // 2, block(2))], told)
            assert not mirror.trim_later([(SIZE // 2, EXTENT_BYTES)], told)
            for refused in (mirror.write(SIZE // 2, block(2)), mirror.trim(SIZE // 2, EXTENT_BYTES)):
                with pytest.raises(OSError, match="the mirror was shrunk") as behind:
                    await refused
                assert behind.value.errno == errno.ENOSPC
            assert rig.store("a").size_bytes == SIZE  # nobody has cut it yet: who asks again does
            await mirror.resize(SIZE // 2)
            assert rig.store("a").size_bytes == rig.store("b").size_bytes == SIZE // 2
            assert mirror.write_later([(0, block(2)), (SIZE // 2 - BLOCK_BYTES, block(2))], told)
            await rig.until(lambda: told.outcomes == [None])

    run(body)


def test_what_a_leg_kept_of_a_shrink_that_passed_it_by_is_gone_when_it_is_back_after_a_growth() -> None:
    """The shrink was given up and counted later, so nobody cut that leg; it was away when the mirror grew again."""

    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await mirror.write(SIZE - BLOCK_BYTES, block(7))
            await mirror.flush()
            goes_on = rig.hold_resizes()
            with trio.move_on_after(0.2):
                await mirror.resize(SIZE // 2)
            for event in (goes_on[SIZE // 2], goes_on[SIZE]):
                event.set()
            await rig.until(lambda: mirror.size_bytes == SIZE // 2)
            leg = mirror.members["lega"].leg
            assert leg is not None
            mirror.leg_failed(leg, OSError(errno.EIO, "gone"))
            await rig.whole()
            assert (rig.store("a").size_bytes, rig.store("b").size_bytes) == (SIZE // 2, SIZE)
            await trio.sleep(5)  # what is recent is forgotten
            rig.nodes["b"].link.cut()
            await mirror.write(0, block(1))
            await mirror.resize(SIZE)
            rig.nodes["b"].link.mend()
            await rig.whole()
            assert rig.store("a").image == rig.store("b").image

    run(body)


def test_a_size_that_no_leg_may_have_is_refused_before_any_record_says_so() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            record = mirror.membership
            for size_bytes in (0, -BLOCK_BYTES, SIZE - 512):
                with pytest.raises(OSError, match="whole blocks only") as refused:
                    await mirror.resize(size_bytes)
                assert refused.value.errno == errno.EINVAL
            assert mirror.membership == record == rig.cluster.truth

    run(body)


def test_a_block_that_one_leg_cant_read_is_answered_by_another_and_written_anew() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await mirror.write(0, block(5, 16))
            rig.store("a").bad = {BLOCK_BYTES, 7 * BLOCK_BYTES}
            assert await read(rig, 0, 16 * BLOCK_BYTES) == bytes(block(5, 16))
            await rig.until(lambda: not rig.store("a").bad)
            assert mirror.status().healed_blocks == 2
            assert mirror.members["lega"].counters.read_errors == 1
            rig.store("a").bad = rig.store("b").bad = {0}
            with pytest.raises(OSError, match="no leg can read") as failed:
                await read(rig, 0, BLOCK_BYTES)
            assert failed.value.errno == errno.EIO
            assert mirror.status().state is MirrorState.ONLINE

    run(body)


def test_a_block_that_the_source_cant_read_is_taken_from_another_leg_that_is_as_good() -> None:
    async def body() -> None:
        for intact in ("ab", ""):
            rig = Rig(2)
            rig.intact = intact
            for node, fill in (("a", 1), ("b", 2)):
                store = rig.store(node)
                store.image[: 4 * BLOCK_BYTES] = bytes([fill]) * (4 * BLOCK_BYTES)
                store.trackers[RECENT] = MemoryExtents({0})
            rig.store("a").bad = {BLOCK_BYTES}
            async with rig.running():
                assert not rig.store("a").bad and rig.store("a").image == rig.store("b").image
                found = [rig.store("a").image[at * BLOCK_BYTES] for at in range(4)]
                assert found == [1, 2, 1, 1]

    run(body)


def test_legs_that_differ_after_a_crash_are_equal_before_anything_is_served() -> None:
    async def body() -> None:
        rig = Rig(2)
        await make_leg_stores(rig)
        rig.store("a").write_now([(0, block(1))])
        rig.store("b").write_now([(9 * EXTENT_BYTES, block(2))])
        async with rig.running():
            assert rig.store("a").image == rig.store("b").image
            assert rig.store("b").image[0] == 1
            assert trackers_matching(rig.store("a"), "recent*") == set()

    run(body)


def test_a_start_asks_little_of_the_legs_where_a_whole_disk_was_written_lately_and_copies_all_that_differs() -> None:
    async def body() -> None:
        size = 64 << 20
        rig = Rig(2, size=size)
        await make_leg_stores(rig)
        for node in "ab":
            rig.store(node).trim_now([(0, size)])
        rig.store("a").write_now([(3 << 20, block(1, 3 << 8))])
        rig.store("b").write_now([(40 << 20, block(2, 3 << 8))])
        checks, asked = rig.store("b").checks, []

        async def counted(offset: int, length: int) -> bytes:
            asked.append(length)
            return await checks(offset, length)

        rig.store("b").checks = counted  # type: ignore[method-assign]
        async with rig.running():
            assert rig.store("a").image == rig.store("b").image
            assert rig.store("b").image[3 << 20] == 1 and not any(rig.store("b").image[40 << 20 :])
            assert len(asked) <= 4 and sum(asked) == size

    run(body)


@pytest.mark.parametrize("intact", ["ab", "", "a"])
def test_a_block_that_the_source_of_a_start_cant_read_is_had_from_a_leg_as_good_or_nothing_is_served(
    intact: str,
) -> None:
    async def body() -> None:
        rig = Rig(2)
        rig.intact = intact
        await make_leg_stores(rig)
        rig.store("a").write_now([(0, block(1, 2))])
        rig.store("b").write_now([(0, block(2, 3))])
        rig.store("a").bad = {0}
        async with rig.running() as mirror:
            found = await read(rig, 0, 3 * BLOCK_BYTES)
            assert found == bytes(block(2)) + bytes(block(1)) + bytes(BLOCK_BYTES)
            assert rig.store("a").image == rig.store("b").image and not rig.store("a").bad
            assert mirror.status().state is MirrorState.ONLINE

    if intact != "a":
        run(body)
    else:
        with pytest.raises(BaseExceptionGroup) as refused:
            run(body)
        assert refused.group_contains(OSError, match="can't be read, and no other leg certainly has all", depth=None)


def test_of_a_huge_disk_that_was_trimmed_as_a_whole_only_what_is_mapped_is_compared_at_the_start() -> None:
    async def body() -> None:
        rig = Rig(2)
        await make_leg_stores(rig)
        rig.store("a").trim_now([(0, rig.record.size_bytes)])
        rig.store("b").write_now([(9 * EXTENT_BYTES, block(2))])
        rig.store("a").write_now([(12 * EXTENT_BYTES, block(3))])
        asked: list[int] = []
        checks = MemoryLegStore.checks

        async def counted(store: MemoryLegStore, offset: int, length: int) -> bytes:
            asked.append(offset)
            return await checks(store, offset, length)

        with (
            mock.patch.object(MemoryLegStore, "checks", counted),
            mock.patch("replication.reconcile.SPARSE_BYTES", rig.record.size_bytes - 1),
            mock.patch("replication.reconcile.COMPARE_BYTES", EXTENT_BYTES),
        ):
            async with rig.running():
                assert rig.store("a").image == rig.store("b").image
                assert rig.store("b").image[12 * EXTENT_BYTES] == 3 and not rig.store("b").image[9 * EXTENT_BYTES]
        assert sorted(asked) == [9 * EXTENT_BYTES] * 2 + [12 * EXTENT_BYTES] * 2

    run(body)


@pytest.mark.parametrize("intact", ["ab", "", "a"])
def test_a_block_that_no_leg_in_sync_can_read_keeps_nothing_else_from_being_served(intact: str) -> None:
    async def body() -> None:
        rig = Rig(2)
        rig.intact = intact
        await make_leg_stores(rig)
        rig.store("a").write_now([(0, block(1, 3))])
        rig.store("b").write_now([(0, block(2, 4))])
        rig.store("a").lost = {0, 2 * BLOCK_BYTES}
        rig.store("b").bad = {0, 2 * BLOCK_BYTES}
        async with rig.running() as mirror:
            assert mirror.status().state is MirrorState.ONLINE
            # What the other one has there may be older than what was acknowledged, and readable one day.
            assert rig.store("b").lost == {0, 2 * BLOCK_BYTES} and not rig.store("b").bad
            assert await read(rig, BLOCK_BYTES, BLOCK_BYTES) == bytes(block(1))
            with pytest.raises(OSError, match="no leg can read"):
                await read(rig, 0, BLOCK_BYTES)
            await mirror.write(0, block(3))
            assert await read(rig, 0, BLOCK_BYTES) == bytes(block(3))

    run(body)


def test_a_block_that_is_lost_on_the_legs_that_are_there_keeps_nobody_waiting_for_the_others() -> None:
    async def body() -> None:
        rig = Rig(3)
        for node in "abc":
            rig.nodes[node].keeper = FakeKeeper(rig.store(node), f"leg{node}")
            await rig.nodes[node].keeper.accept(rig.record)
            rig.store(node).write_now([(0, block(1, 3))])
        rig.store("a").bad = {0}
        rig.store("b").lost = {0}
        rig.nodes["c"].link.cut()
        async with rig.running() as mirror:
            assert mirror.status().state is MirrorState.DEGRADED
            assert await read(rig, BLOCK_BYTES, BLOCK_BYTES) == bytes(block(1))
            rig.nodes["c"].link.mend()  # which has it, after all
            await rig.whole()
            assert await read(rig, 0, BLOCK_BYTES) == bytes(block(1))

    run(body)


def test_the_source_has_every_acknowledged_write_or_the_mirror_doesnt_start() -> None:
    class Named:
        def __init__(self, name: str, is_local: bool) -> None:
            self.info = type("Info", (), {"id": name, "node": name})()
            self.is_local = is_local

    here: Any
    there: Any
    here, there = Named("b", True), Named("a", False)
    legs: list[Any] = [there, here]
    assert choose_source(legs, frozenset("ab"), all_heard=False) is here
    assert choose_source(legs, frozenset("a"), all_heard=True) is there
    assert choose_source(legs, frozenset(), all_heard=True) is here
    with pytest.raises(OSError, match="may lack acknowledged writes") as unproven:
        choose_source(legs, frozenset(), all_heard=False)
    assert unproven.value.errno == errno.ENODATA


def test_after_a_clean_demotion_nothing_is_remembered_and_the_record_names_the_next() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await mirror.write(0, block(1))
            await mirror.demote("b")
            assert rig.cluster.truth.primary is None and rig.cluster.truth.token == "b"
            for node in "ab":
                assert trackers_matching(rig.store(node), "*") == set()
            with pytest.raises(OSError, match="demoted"):
                await mirror.write(0, block(2))

    run(body)


def test_a_demotion_that_is_given_up_while_its_record_is_written_ends_the_mirror_all_the_same() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            rig.cluster.quorum = False
            with trio.move_on_after(0.5):
                await mirror.demote("b")
            rig.cluster.quorum = True
            await trio.sleep(3)
            # The next primary may go on by that record: nothing may be acknowledged here.
            with pytest.raises(OSError, match="demoted"):
                await mirror.write(0, block(2))

    run(body)


def test_a_change_of_legs_that_is_given_up_is_not_made_later() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            rig.nodes["b"].link.stall()
            with trio.move_on_after(0.01):
                await mirror.reconfigure(voters=("a", "b", "t"))
            assert not mirror.records.wanted

    run(body)


def test_a_mirror_begins_anew_though_a_leg_has_stored_a_record_that_never_counted() -> None:
    async def body() -> None:
        rig = Rig(2, in_sync=["lega"])
        rig.known = False

        async def commit(new: Membership, *, expected: Membership) -> None:
            for node in rig.nodes.values():
                await node.keeper.accept(new)
            raise OSError(errno.ETIMEDOUT, "too few voters answer")

        whole, rig.cluster.commit = rig.cluster.commit, commit  # type: ignore[method-assign]
        async with rig.running() as mirror:
            await rig.until(lambda: "legb" in rig.nodes["a"].keeper.accepted.in_sync)  # type: ignore[union-attr]
            rig.store("a").failing = OSError(errno.ENOSPC, "full")
            with pytest.raises(OSError, match="full"):
                await mirror.write(0, block(1))
            rig.store("a").failing = None
            rig.cluster.commit = whole  # type: ignore[method-assign]
            with trio.fail_after(60):
                await mirror.write(0, block(2))
            await rig.whole()
            assert rig.store("a").image == rig.store("b").image

    run(body)


def test_a_mirror_begins_anew_with_a_leg_that_only_a_record_in_doubt_leaves_out() -> None:
    """The arbiter was away when the record was written; then the other leg's machine went down, and lost something."""

    async def body() -> None:
        rig = Rig(2)

        async def commit(new: Membership, *, expected: Membership) -> None:
            await trio.sleep(0.1)
            raise OSError(errno.ETIMEDOUT, "the arbiter is away")

        whole = rig.cluster.commit
        async with rig.running() as mirror:
            await mirror.write(BLOCK_BYTES, block(9))
            rig.cluster.commit = commit  # type: ignore[method-assign]
            rig.store("a").failing = OSError(errno.EIO, "slow")
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def client() -> None:
                    with pytest.raises(OSError, match="cut"):
                        await mirror.write(0, block(1))

                await rig.until(lambda: any(one.in_sync == {"legb"} for one in mirror.records.attempts))
                rig.nodes["b"].link.cut()
            rig.store("b").image[BLOCK_BYTES] = 0
            rig.store("a").failing, rig.intact = None, "a"
            rig.cluster.commit = whole  # type: ignore[method-assign]
            await trio.sleep(3)
            assert mirror.lost, "whoever goes on by the record in doubt needs b: so does this one"
            rig.nodes["b"].link.mend()
            with trio.fail_after(60):
                await mirror.write(0, block(2))
            await rig.whole()
            assert rig.store("a").image[0] == 2 and rig.store("a").image[BLOCK_BYTES] == 9
            assert rig.store("a").image == rig.store("b").image
            assert mirror.membership.in_sync == {"lega", "legb"} and not mirror.records.attempts

    run(body)


def test_nothing_is_written_without_a_leg_that_a_record_in_doubt_calls_in_sync_though_one_before_that_counts() -> None:
    """A record without b was written, and one with c after it, of which it isn't known whether they count. c is lost,
    and the first of the two is seen to count: c may still be who a later primary goes on with, by the second."""

    async def body() -> None:
        rig = Rig(3, in_sync=["lega", "legb"], options=Options(timeout_s=30.0))
        rig.known = False
        tried: list[Membership] = []
        whole, is_whole = rig.cluster.commit, trio.Event()

        async def commit(new: Membership, *, expected: Membership) -> None:
            await trio.lowlevel.checkpoint()
            if tried and expected == tried[0]:
                await is_whole.wait()
                return await whole(new, expected=expected)
            tried.append(new)
            if "legc" in new.in_sync:
                await rig.nodes["c"].keeper.accept(new)
            elif any("legc" in one.in_sync for one in tried):
                rig.cluster.truth = tried[0]
                raise OSError(errno.ESTALE, "a voter has promised a later term")
            raise OSError(errno.ETIMEDOUT, "too few voters answer")

        for node in "ab":
            rig.store(node).image[0] = 5
        rig.store("c").held = held = trio.Event()
        rig.cluster.commit = commit  # type: ignore[method-assign]
        async with rig.running() as mirror:
            await rig.until(lambda: rig.state("c") is LegState.SYNCING)
            rig.nodes["b"].link.cut()
            await rig.until(lambda: bool(tried))
            rig.store("c").held = None
            held.set()
            await rig.until(lambda: "legc" in tried[-1].in_sync)
            rig.nodes["c"].link.cut()
            await rig.until(lambda: mirror.membership == tried[0])
            told = Told()
            assert not mirror.write_later([(0, block(1))], told)
            is_whole.set()
            with trio.fail_after(60):
                await mirror.write(0, block(1))
            assert mirror.membership.in_sync == {"lega"} and not mirror.records.attempts

    run(body)


def test_a_write_that_waited_while_the_mirror_was_shrunk_is_refused_and_no_leg_is_lost() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            rig.nodes["b"].link.stall()
            assert mirror.write_later([(0, block(1))], Told())
            errors: list[OSError] = []

            async def write() -> None:
                try:
                    await mirror.write(SIZE - BLOCK_BYTES, block(2))
                except OSError as error:
                    errors.append(error)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(mirror.resize, SIZE // 2)
                await trio.sleep(0.1)
                nursery.start_soon(write)
                await trio.sleep(0.1)
                rig.nodes["b"].link.resume()
            assert [error.errno for error in errors] == [errno.ENOSPC]
            await mirror.write(0, block(3))
            assert [member.counters.failures for member in mirror.members.values()] == [0, 0]

    run(body)


def test_a_part_of_a_block_that_waited_while_the_mirror_was_shrunk_is_refused_and_nothing_is_read_for_it() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            errors: list[OSError] = []

            async def write() -> None:
                try:
                    await mirror.write(SIZE - 100, b"lost")
                except OSError as error:
                    errors.append(error)

            async with trio.open_nursery() as nursery, mirror.locks.holding(SIZE - EXTENT_BYTES, EXTENT_BYTES):
                nursery.start_soon(write)
                await trio.sleep(0.1)
                await mirror.resize(SIZE // 2)
            assert [error.errno for error in errors] == [errno.ENOSPC]
            with pytest.raises(OSError, match="behind its end") as refused:
                await mirror.read(SIZE - BLOCK_BYTES, BLOCK_BYTES, memoryview(bytearray(BLOCK_BYTES)))
            assert refused.value.errno == errno.EINVAL
            for member in mirror.members.values():
                assert member.counters.read_errors == member.counters.failures == member.counters.reads == 0

    run(body)


@pytest.mark.parametrize("broken", ["a", "b"])
@pytest.mark.parametrize("at", ["flush", "resize"])
def test_a_leg_that_is_there_and_cant_be_made_equal_is_left_out_of_a_beginning(broken: str, at: str) -> None:
    async def main() -> None:
        rig = Rig(2)
        store, times = rig.store(broken), 0

        async def fails() -> None:
            nonlocal times
            await trio.lowlevel.checkpoint()
            times += 1
            raise OSError(errno.EIO, "broken")

        async def is_refused(size_bytes: int) -> None:
            await fails()

        if at == "flush":
            store.flush = fails  # type: ignore[method-assign]
        else:
            store.resize = is_refused  # type: ignore[method-assign]
        async with rig.running() as mirror:
            assert times == 2, "once may be chance"
            await rig.until(lambda: mirror.membership.in_sync == {"lega", "legb"} - {f"leg{broken}"})
            await mirror.write(0, block(1))
            assert rig.state(broken) is not LegState.UP_TO_DATE

    run(main)


def test_a_beginning_whose_only_good_leg_fails_says_what_that_failed_with() -> None:
    async def main() -> None:
        rig = Rig(2)
        rig.intact = "b"

        async def fails() -> None:
            await trio.lowlevel.checkpoint()
            raise OSError(errno.EIO, "the disk of b is broken")

        rig.store("b").flush = fails  # type: ignore[method-assign]
        with pytest.raises(ExceptionGroup) as failed:
            async with rig.running():
                pass
        assert failed.group_contains(OSError, match="the disk of b is broken")

    run(main)


def test_a_leg_that_falls_silent_while_a_mirror_begins_holds_it_up_for_the_timeout_where_another_one_goes_on() -> None:
    """Its connection would be kept for an hour, where the primary has no leg itself."""

    async def body() -> None:
        rig = Rig(2, diskless=True)

        async def falls_silent(info: LegInfo, membership: Membership) -> LegFacts:
            await trio.lowlevel.checkpoint()
            rig.nodes["b"].link.stalled = trio.Event()
            return LegFacts(intact=True)

        async with trio.open_nursery() as nursery:
            for node in rig.nodes.values():
                await nursery.start(node.run)
                await node.keeper.accept(rig.record)

            async def connect(info: LegInfo, membership: Membership) -> Leg:
                return await rig.nodes[info.node].open(membership.term, primary=nursery)

            mirror = Mirror("pool/vol", rig.record, rig.cluster, connect, facts=falls_silent)
            with trio.fail_after(4):  # the mirror's timeout is 1 s, and the leg is sought once more
                await mirror.begin()
            assert mirror.started.is_set() and mirror.excluding == {"legb"}
            nursery.cancel_scope.cancel()

    run(body)


def filled_slowly() -> Rig:
    """Two legs, of which a's alone is in sync and has data; b's is brought up to date as long as a test may need."""
    slowly = MirrorSettings(resync=ResyncSettings(ceiling_bytes_s=1 << 20, workers=1))
    rig = Rig(2, in_sync=["lega"], settings=slowly)
    rig.known = False
    rig.store("a").image[:] = b"x" * SIZE
    return rig


def test_a_leg_that_was_lost_while_it_should_grow_has_the_size_of_the_record_when_all_begins_anew() -> None:
    """It was the only one in sync; the other one has grown."""

    async def main() -> None:
        rig = filled_slowly()
        async with rig.running() as mirror:
            await rig.until(lambda: rig.state("b") is LegState.SYNCING)
            resize, failed = rig.store("a").resize, False

            async def fails_once(size_bytes: int) -> None:
                nonlocal failed
                if size_bytes > SIZE and not failed:
                    failed = True
                    await trio.sleep(0.1)
                    raise OSError(errno.EIO, "its disk is broken for a moment")
                await resize(size_bytes)

            rig.store("a").resize = fails_once  # type: ignore[method-assign]
            with contextlib.suppress(OSError):
                await mirror.resize(2 * SIZE)
            await rig.whole()
            assert failed
            assert rig.store("a").size_bytes == rig.store("b").size_bytes == mirror.size_bytes

    run(main)


def test_what_a_leg_has_behind_the_end_is_not_seen_when_it_was_lost_before_it_grew() -> None:
    """A shrink that was given up has left it there; the leg is the only one in sync, and all begins anew."""

    async def main() -> None:
        rig = filled_slowly()
        async with rig.running() as mirror:
            await rig.until(lambda: rig.state("b") is LegState.SYNCING)
            resize, does = rig.store("a").resize, "hangs"

            async def ends_badly(size_bytes: int) -> None:
                nonlocal does
                if does == "hangs":
                    await trio.sleep_forever()
                if does == "fails":
                    does = "works"
                    await trio.sleep(0.1)
                    raise OSError(errno.EIO, "its disk is broken for a moment")
                await resize(size_bytes)

            rig.store("a").resize = ends_badly  # type: ignore[method-assign]
            with trio.move_on_after(1):
                await mirror.resize(SIZE // 2)
            assert mirror.size_bytes == SIZE // 2 and rig.store("a").size_bytes == SIZE
            does = "fails"
            with contextlib.suppress(OSError):
                await mirror.resize(SIZE)
            await rig.whole()
            assert does == "works" and mirror.size_bytes == SIZE
            into = memoryview(bytearray(SIZE // 2))
            await mirror.read(SIZE // 2, SIZE // 2, into)
            assert into == bytes(SIZE // 2)
        assert rig.store("a").image == rig.store("b").image

    run(main)


@pytest.mark.parametrize("waits", [True, False])
def test_a_mirror_whose_only_leg_in_sync_can_not_grow_is_served_at_its_old_size_and_the_resize_is_refused(
    waits: bool,
) -> None:
    """The other leg has grown, and the one in sync was lost at that: nobody else could be waited for.

    Who wanted it may have given up, as the daemon stops.
    """

    async def main() -> None:
        rig = filled_slowly()
        async with rig.running() as mirror:
            await rig.until(lambda: rig.state("b") is LegState.SYNCING)
            resize = rig.store("a").resize
            gives_up = trio.CancelScope()
            attempts = 0

            async def is_full(size_bytes: int) -> None:
                nonlocal attempts
                if size_bytes > SIZE:
                    await trio.sleep(0.1)
                    attempts += 1
                    if attempts == 2 and not waits:  # the mirror begins anew, and tries it then
                        gives_up.cancel()
                        await trio.sleep(0.1)
                    raise OSError(errno.ENOSPC, "the pool is full")
                await resize(size_bytes)

            rig.store("a").resize = is_full  # type: ignore[method-assign]
            if waits:
                with trio.fail_after(20), pytest.raises(OSError, match="the pool is full") as refused:
                    await mirror.resize(2 * SIZE)
                assert refused.value.errno == errno.ENOSPC
            else:
                with gives_up:
                    await mirror.resize(2 * SIZE)
                assert gives_up.cancelled_caught
            into = memoryview(bytearray(BLOCK_BYTES))
            with trio.fail_after(5):
                await mirror.read(0, BLOCK_BYTES, into)
            assert into == b"x" * BLOCK_BYTES
            await rig.whole()
            assert rig.store("a").size_bytes == rig.store("b").size_bytes == mirror.size_bytes == SIZE

    run(main)
