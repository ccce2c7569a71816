"""Bringing legs up to date, comparing them, and how fast that may go."""

from __future__ import annotations

import errno
import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import trio

from replication.leg import BLOCK_BYTES, EXTENT_BYTES, RECENT, Leg, LegState, missing_tracker
from replication.members import Member
from replication.resync import Pace, Resync, ResyncSettings
from replication.site import MirrorSettings
from replication.verify import VerifyReport, verify
from tests.replication.fakes import MemoryExtents, trackers_matching
from tests.replication.rig import SIZE, Rig, Told, run
from tests.replication.test_mirror import block


async def filled(rig: Rig, every: int = 1) -> None:
    for at in range(0, SIZE, EXTENT_BYTES * every):
        await rig.mirror.write(at, block(1 + at // EXTENT_BYTES % 200, 16))


def member(rig: Rig, node: str) -> Member:
    return rig.mirror.members[f"leg{node}"]


def test_a_leg_that_was_away_gets_what_it_missed_and_little_else() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await filled(rig)
            await mirror.flush()
            await trio.sleep(5)
            rig.nodes["b"].link.cut()
            await mirror.write(0, block(77))
            await mirror.trim(7 * EXTENT_BYTES, EXTENT_BYTES)
            assert trackers_matching(rig.store("a"), missing_tracker("legb")) == {0, 7}
            reads = rig.store("a").read_bytes
            rig.nodes["b"].link.mend()
            await rig.whole()
            progress = member(rig, "b").resync.progress  # type: ignore[union-attr]
            assert progress.copied_bytes == BLOCK_BYTES + EXTENT_BYTES
            assert progress.total_bytes == progress.done_bytes == 2 * EXTENT_BYTES
            assert rig.store("a").read_bytes - reads == BLOCK_BYTES, "what is zeros is not read"
            assert rig.store("a").image == rig.store("b").image
            assert missing_tracker("legb") not in rig.store("a").trackers

    run(body)


def test_a_leg_of_unknown_history_is_compared_in_full_and_only_what_differs_is_read() -> None:
    async def body() -> None:
        rig = Rig(2, in_sync=["lega"])
        rig.known = False
        for node in "ab":
            rig.store(node).image[: 4 * EXTENT_BYTES] = bytes([5]) * (4 * EXTENT_BYTES)
        rig.store("b").image[EXTENT_BYTES : EXTENT_BYTES + 10] = b"0123456789"
        rig.store("b").image[-10:] = b"0123456789"
        async with rig.running():
            await rig.whole()
            assert rig.store("a").image == rig.store("b").image
            assert rig.store("a").read_bytes == BLOCK_BYTES

    run(body)


def test_a_resync_goes_on_where_it_was_after_the_link_broke() -> None:
    async def body() -> None:
        settings = ResyncSettings(ceiling_bytes_s=1 << 20, flush_bytes=EXTENT_BYTES, workers=1)
        rig = Rig(2, in_sync=["lega"], settings=MirrorSettings(resync=settings))
        rig.known = False
        rig.store("a").image[:] = b"".join(bytes([1 + n % 250]) * EXTENT_BYTES for n in range(SIZE // EXTENT_BYTES))
        async with rig.running():
            await rig.until(lambda: member(rig, "b").state is LegState.SYNCING)
            first = member(rig, "b").resync
            assert first is not None
            await rig.until(lambda: first.progress.done_bytes >= SIZE // 2)
            seen = first.progress.seen(trio.current_time())
            assert 0.5 * (1 << 20) < seen.rate_bytes_s < 2 * (1 << 20)
            assert seen.eta_s is not None and seen.eta_s < 5
            rig.known = True
            rig.nodes["b"].link.cut()
            await trio.sleep(0.1)
            rig.nodes["b"].link.mend()
            await rig.whole()
            again = member(rig, "b").resync
            assert again is not None and again is not first
            # What the leg got since the last common flush is compared once more, and found equal.
            assert again.progress.copied_bytes <= SIZE // 2
            assert again.progress.total_bytes < SIZE
            assert rig.store("a").image == rig.store("b").image

    run(body)


def test_an_extent_is_missing_until_the_leg_has_made_it_durable() -> None:
    async def body() -> None:
        settings = ResyncSettings(ceiling_bytes_s=1 << 20, flush_bytes=EXTENT_BYTES, workers=1)
        rig = Rig(2, in_sync=["lega"], settings=MirrorSettings(resync=settings, flush_every_s=1000))
        rig.known = False
        rig.store("a").image[:] = b"".join(bytes([1 + n % 250]) * EXTENT_BYTES for n in range(SIZE // EXTENT_BYTES))
        async with rig.running():
            name = missing_tracker("legb")
            await rig.until(lambda: 0 < len(trackers_matching(rig.store("a"), name)) < 40)
            left = trackers_matching(rig.store("a"), name)
            for extent in set(range(SIZE // EXTENT_BYTES)) - left:
                at = slice(extent * EXTENT_BYTES, (extent + 1) * EXTENT_BYTES)
                assert rig.store("b")._durable[at] == rig.store("a").image[at]

    run(body)


LOST = {EXTENT_BYTES, EXTENT_BYTES + 3 * BLOCK_BYTES, 9 * EXTENT_BYTES}


@pytest.mark.parametrize("is_in_the_map", [False, True])
def test_what_no_leg_can_read_is_lost_at_the_leg_too_and_all_else_is_mirrored_again(is_in_the_map: bool) -> None:
    async def body() -> None:
        rig = Rig(3, in_sync=["lega", "legc"])
        rig.known = False
        image = b"".join(bytes([1 + n % 250]) * BLOCK_BYTES for n in range(SIZE // BLOCK_BYTES))
        for node in "ac":
            rig.store(node).image[:] = image
            (rig.store(node).lost if is_in_the_map else rig.store(node).bad).update(LOST)
        rig.store("a").bad.add(20 * EXTENT_BYTES)  # the other one has it
        rig.store("b").image[EXTENT_BYTES : EXTENT_BYTES + BLOCK_BYTES] = block(9)  # from when the leg was away
        async with rig.running() as mirror:
            await rig.whole()
            assert rig.store("b").lost == LOST
            found = bytearray(rig.store("b").image)
            for at in LOST:
                with pytest.raises(OSError, match="no leg can read"):
                    await mirror.read(at, BLOCK_BYTES, memoryview(bytearray(BLOCK_BYTES)))
                found[at : at + BLOCK_BYTES] = image[at : at + BLOCK_BYTES]
            assert found == image
            progress = member(rig, "b").resync.progress  # type: ignore[union-attr]
            assert progress.lost_blocks == 3 and mirror.status().unmendable_blocks == 3
            # The way out is what it is without a mirror: write it anew.
            for at in LOST:
                await mirror.write(at, block(77))
            assert not rig.store("b").lost

    run(body)


def test_a_write_that_comes_while_a_block_is_given_up_comes_after_that() -> None:
    async def body() -> None:
        rig = Rig(2, in_sync=["lega"])
        rig.known = False
        rig.store("a").image[:] = bytes([5]) * SIZE
        rig.store("a").lost.update((0, 7 * BLOCK_BYTES))
        async with rig.running() as mirror, trio.open_nursery() as writers:
            tries: Counter[int] = Counter()

            async def stays(resync: Resync, offset: int) -> bool:
                tries[offset] += 1
                if tries[offset] == 1 + len(ResyncSettings().reread_s):  # the last one, before it is given up
                    writers.start_soon(mirror.write, offset, block(99))
                    await trio.sleep(0.1)
                return False

            with mock.patch.object(Resync, "_stays", stays):
                await rig.whole()
            assert rig.store("b").image[0] == rig.store("a").image[0] == 99
            assert not rig.store("b").lost and not rig.store("a").lost
            assert rig.store("a").image == rig.store("b").image

    run(body)


def test_more_blocks_that_no_leg_can_read_than_are_remembered_are_given_up_beside_busy_writers() -> None:
    async def body() -> None:
        settings = ResyncSettings(workers=6, reread_s=(0.05,))
        rig = Rig(2, in_sync=["lega"], settings=MirrorSettings(resync=settings))
        rig.known = False
        rig.store("a").image[:] = bytes([5]) * SIZE
        bad = set(range(0, SIZE, 2 * BLOCK_BYTES))
        rig.store("a").lost.update(bad)
        async with rig.running() as mirror:
            written: set[int] = set()

            async def write(first: int) -> None:
                for at in [*range(first, SIZE, 5 * BLOCK_BYTES)] * 3:
                    written.add(at)
                    await mirror.write(at, block(99))

            with mock.patch("replication.resync.MAX_UNREAD", 8):
                async with trio.open_nursery() as writers:
                    for first in range(4):
                        writers.start_soon(write, first * BLOCK_BYTES)
                    await rig.whole()
            assert rig.store("b").lost == rig.store("a").lost == bad - written
            for at in set(range(0, SIZE, BLOCK_BYTES)) - rig.store("a").lost:
                assert rig.store("a").image[at] == rig.store("b").image[at]

    run(body)


def test_a_disk_that_fails_for_a_moment_makes_no_loss_of_what_it_has() -> None:
    async def body() -> None:
        rig = Rig(2, in_sync=["lega"])
        rig.known = False
        rig.store("a").image[:] = bytes([5]) * SIZE
        rig.store("a").bad.update(range(0, SIZE, 3 * BLOCK_BYTES))
        async with rig.running() as mirror:
            await rig.until(lambda: rig.store("b").image.count(5) > SIZE // 2)
            await trio.sleep(1)
            assert member(rig, "b").state is LegState.SYNCING
            await mirror.write(0, block(6))
            rig.store("a").bad.clear()
            await rig.whole()
            assert rig.store("a").image == rig.store("b").image and not rig.store("b").lost

    run(body)


def test_a_leg_keeps_what_it_has_where_it_is_only_told_what_third_legs_miss() -> None:
    async def body() -> None:
        rig = Rig(3)
        async with rig.running() as mirror:
            at = 5 * EXTENT_BYTES
            await mirror.write(at, block(7))
            await mirror.flush()
            await trio.sleep(5)
            for node in "bc":
                rig.nodes[node].link.cut()
            await mirror.write(at + BLOCK_BYTES, block(9))
            rig.store("a").bad.add(at)  # which isn't different there
            rig.nodes["b"].link.mend()
            await rig.until(lambda: member(rig, "b").state is LegState.UP_TO_DATE)
            assert not rig.store("b").lost and rig.store("b").image[at] == 7
            assert 5 in trackers_matching(rig.store("b"), missing_tracker("legc"))

    run(body)


@pytest.mark.parametrize("has_data", [False, True])
def test_a_leg_is_told_at_once_that_third_legs_miss_a_trim_of_all(has_data: bool) -> None:
    async def body() -> None:
        rig = Rig(3)
        async with rig.running() as mirror:
            for node in "bc":
                rig.nodes[node].link.cut()
            await mirror.trim(0, SIZE)
            if has_data:
                await mirror.write(20 * EXTENT_BYTES, block(5))
            given: list[tuple[int, int]] = []
            copy_to = mirror.copy_to

            async def counted(member: Member, offset: int, data: Any, *, length: int = 0, lost: bool = False) -> bool:
                given.append((offset, length))
                return await copy_to(member, offset, data, length=length, lost=lost)

            with mock.patch.object(mirror, "copy_to", counted):
                rig.nodes["b"].link.mend()
                await rig.until(lambda: member(rig, "b").state is LegState.UP_TO_DATE)
            assert trackers_matching(rig.store("b"), missing_tracker("legc")) == set(range(SIZE // EXTENT_BYTES))
            assert rig.store("b").image == rig.store("a").image
            assert len(given) == (3 if has_data else 1)

    run(body)


def test_of_what_is_huge_only_what_is_mapped_on_either_side_is_compared() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await mirror.write(3 * EXTENT_BYTES, block(1))
            await mirror.write(40 * EXTENT_BYTES, block(2))
            await mirror.flush()
            await trio.sleep(5)
            rig.nodes["b"].link.cut()
            await mirror.trim(0, SIZE)
            await mirror.write(20 * EXTENT_BYTES, block(5))
            with mock.patch("replication.resync.SPARSE_BYTES", SIZE - 1):
                rig.nodes["b"].link.mend()
                await rig.whole()
            progress = member(rig, "b").resync.progress  # type: ignore[union-attr]
            assert progress.total_bytes == progress.done_bytes == 3 * EXTENT_BYTES
            assert rig.store("a").image == rig.store("b").image and rig.store("b").image.count(5) == BLOCK_BYTES
            assert missing_tracker("legb") not in rig.store("a").trackers

    run(body)


def test_what_was_given_up_and_can_be_read_after_all_heals_the_others() -> None:
    async def body() -> None:
        rig = Rig(2, in_sync=["lega"])
        rig.known = False
        rig.store("a").image[:] = bytes([5]) * SIZE
        rig.store("a").bad.update((0, 7 * BLOCK_BYTES))
        async with rig.running() as mirror:
            await rig.whole()
            assert rig.store("b").lost == {0, 7 * BLOCK_BYTES}
            rig.store("a").bad.clear()
            await trio.sleep(70)
            assert not rig.store("b").lost and rig.store("a").image == rig.store("b").image
            assert mirror.status().unmendable_blocks == 0

    run(body)


@pytest.mark.parametrize("seed", range(12))
def test_writers_of_a_block_that_no_leg_can_read_are_never_undone_by_its_loss(seed: int) -> None:
    async def body() -> None:
        rng = random.Random(seed)
        rig = Rig(2, in_sync=["lega"])
        rig.known = False
        rig.nodes["b"].link.delay_s = 0.002
        rig.store("a").rng = rng
        rig.store("a").image[:] = bytes([5]) * SIZE
        rig.store("a").lost.update(range(0, SIZE, 2 * BLOCK_BYTES))
        async with rig.running() as mirror:
            await rig.until(lambda: member(rig, "b").state is LegState.SYNCING)
            written = set()
            while member(rig, "b").state is LegState.SYNCING:
                at = rng.randrange(0, SIZE, BLOCK_BYTES)
                written.add(at)
                await mirror.write(at, block(99))
                await trio.sleep(0.003)
            await rig.whole()
            assert rig.store("b").lost == rig.store("a").lost == set(range(0, SIZE, 2 * BLOCK_BYTES)) - written
            assert written and all(rig.store("b").image[at] == 99 for at in written)

    run(body)


def test_what_a_leg_gets_during_a_flush_stays_missing_where_it_is_lost_as_the_flush_is_answered() -> None:
    async def body() -> None:
        settings = MirrorSettings(resync=ResyncSettings(ceiling_bytes_s=1 << 20), flush_every_s=1000)
        rig = Rig(2, in_sync=["lega"], settings=settings)
        rig.known = False
        rig.store("a").image[:] = bytes([3]) * SIZE
        async with rig.running() as mirror:
            await rig.until(lambda: member(rig, "b").state is LegState.SYNCING)
            target = member(rig, "b").leg
            assert target is not None
            flush = target.flush
            told = Told()

            async def lost_with_its_answer() -> None:
                assert mirror.write_later([(0, block(9))], told)
                await flush()
                rig.nodes["b"].link.cut()  # the write is perhaps not durable there
                mirror.look()

            target.flush = lost_with_its_answer  # type: ignore[method-assign]
            await rig.until(lambda: member(rig, "b").leg is not target)
            assert told.outcomes == [None], "it was acknowledged"
            assert 0 in trackers_matching(rig.store("a"), missing_tracker("legb"))

    run(body)


def test_batches_that_were_in_flight_when_a_leg_came_back_are_copied_to_it() -> None:
    async def body() -> None:
        rig = Rig(3, in_sync=["lega", "legb"])
        rig.nodes["c"].link.cut()
        async with rig.running() as mirror:
            rig.store("a").stuck = stuck = trio.Event()
            rig.nodes["b"].link.stall()
            told = Told()
            assert mirror.write_later([(0, block(9))], told)
            rig.nodes["c"].link.mend()
            await rig.until(lambda: member(rig, "c").state is LegState.SYNCING)
            await trio.sleep(0.2)
            rig.store("a").stuck = None
            stuck.set()
            rig.nodes["b"].link.resume()
            await rig.whole()
            assert told.outcomes == [None]
            assert rig.store("c").image[0] == 9

    run(body)


def test_writes_go_on_while_a_leg_is_brought_up_to_date_and_none_is_overwritten_by_older_bytes() -> None:
    async def body() -> None:
        rig = Rig(2, in_sync=["lega"])
        rig.known = False
        rig.nodes["b"].link.delay_s = 0.002
        rig.store("a").image[:] = bytes([3]) * SIZE
        async with rig.running() as mirror:
            await rig.until(lambda: member(rig, "b").state is LegState.SYNCING)
            for number in range(300):
                await mirror.write(number % 5 * EXTENT_BYTES + number % 16 * BLOCK_BYTES, block(10 + number % 100))
            assert member(rig, "b").resync is not None
            await rig.whole()
            assert rig.store("a").image == rig.store("b").image

    run(body)


@pytest.mark.parametrize("touched", [0, SIZE - EXTENT_BYTES])  # one of them is the second worker's
def test_what_is_touched_is_copied_anew_also_by_a_worker_that_only_works_while_clients_are_idle(touched: int) -> None:
    async def body() -> None:
        resync = ResyncSettings(workers=2, workers_beside_clients=1, idle_s=0.2)
        rig = Rig(2, settings=MirrorSettings(resync=resync))
        last = SIZE - EXTENT_BYTES
        async with rig.running() as mirror:
            rig.nodes["b"].link.cut()
            await mirror.write(0, block(7))
            await mirror.write(last, block(8))
            source = member(rig, "a").leg
            assert source is not None
            reads, is_touched = source.read, trio.Event()

            async def read(offset: int, length: int, into: memoryview) -> None:
                await reads(offset, length, into)
                if offset == touched and not is_touched.is_set():
                    await trio.sleep(0.1)  # the other worker has nothing left to do
                    await mirror.write(touched + BLOCK_BYTES, block(9))
                    is_touched.set()

            def read_now(offset: int, length: int, into: memoryview) -> bool:
                return False

            source.read, source.read_now = read, read_now  # type: ignore[method-assign]
            await trio.sleep(1)
            rig.nodes["b"].link.mend()
            await rig.whole()
            assert is_touched.is_set()
            assert rig.store("b").image == rig.store("a").image

    run(body)


def test_what_was_read_before_the_mirror_was_shrunk_is_not_copied_after_it_has_grown_again() -> None:
    async def body() -> None:
        rig = Rig(2, in_sync=["lega"], settings=MirrorSettings(resync=ResyncSettings(workers=1)))
        rig.known = False
        last = SIZE - EXTENT_BYTES
        rig.store("a").image[last:] = bytes([3]) * EXTENT_BYTES
        async with rig.running() as mirror:
            source = member(rig, "a").leg
            assert source is not None
            resized: list[int] = []

            def read_now(offset: int, length: int, into: memoryview) -> bool:
                return False

            reads = source.read

            async def read(offset: int, length: int, into: memoryview) -> None:
                await reads(offset, length, into)
                if offset + length > last and not resized:
                    resized.append(offset)
                    await mirror.resize(last)
                    await mirror.resize(SIZE)

            source.read_now = read_now  # type: ignore[method-assign]
            source.read = read  # type: ignore[method-assign]
            await rig.whole()
            assert resized
            assert rig.store("a").image[last:] == bytes(EXTENT_BYTES)
            assert rig.store("b").image == rig.store("a").image

    run(body)


def test_what_the_source_has_yet_to_apply_is_waited_for_before_it_is_copied() -> None:
    async def body() -> None:
        rig = Rig(2, in_sync=["lega"])
        rig.known = False
        rig.nodes["b"].link.delay_s = 0.02
        rig.store("a").image[:] = bytes([3]) * SIZE
        async with rig.running() as mirror:
            while (resync := member(rig, "b").resync) is None or resync.progress.state != "copying":
                await trio.sleep(0.001)
            last = SIZE - EXTENT_BYTES
            assert rig.store("b").image[last] != 3
            rig.store("a").held = held = trio.Event()
            told = Told()
            assert mirror.write_later([(last, block(9))], told)
            await rig.until(lambda: rig.store("b").image[last] == 9)
            await trio.sleep(0.5)
            assert not told.outcomes
            rig.store("a").held = None
            held.set()
            await rig.whole()
            assert told.outcomes == [None]
            assert rig.store("a").image == rig.store("b").image

    run(body)


def test_several_legs_are_brought_up_to_date_at_once() -> None:
    async def body() -> None:
        rig = Rig(3, settings=MirrorSettings(resync=ResyncSettings(ceiling_bytes_s=1 << 20)))
        async with rig.running() as mirror:
            for node in "bc":
                rig.nodes[node].link.cut()
            await filled(rig, 3)
            for node in "bc":
                rig.nodes[node].link.mend()
            await rig.until(lambda: all(member(rig, node).state is LegState.SYNCING for node in "bc"))
            await rig.whole()
            assert rig.store("a").image == rig.store("b").image == rig.store("c").image
            assert mirror.membership.in_sync == {"lega", "legb", "legc"}

    run(body)


def test_a_resync_without_progress_is_given_up_and_begun_again() -> None:
    async def body() -> None:
        settings = ResyncSettings(stalled_s=2.0, ceiling_bytes_s=1 << 20)
        rig = Rig(2, in_sync=["lega"], settings=MirrorSettings(resync=settings))
        rig.known = False
        rig.store("a").image[:] = bytes([3]) * SIZE
        async with rig.running():
            await rig.until(lambda: member(rig, "b").state is LegState.SYNCING)
            rig.store("a").stuck = stuck = trio.Event()
            await rig.until(lambda: member(rig, "b").counters.failures > 0)
            assert "made no progress for 2 s" in str(member(rig, "b").error)
            assert member(rig, "b").state is not LegState.UP_TO_DATE
            rig.store("a").stuck = None
            stuck.set()
            await rig.whole()
            assert rig.store("b").image == rig.store("a").image

    run(body)


def test_a_slow_nbd_server_of_unknown_history_is_compared_in_pieces_that_the_watchdog_sees_the_end_of() -> None:
    async def body() -> None:
        size = 32 << 20
        settings = MirrorSettings(resync=ResyncSettings(workers=2, stalled_s=4.0))
        rig = Rig(2, in_sync=["lega"], size=size, settings=settings)
        rig.known = False
        server = replace(rig.record.legs[1], kind="nbd")
        rig.record = rig.cluster.truth = replace(rig.record, legs=(rig.record.legs[0], server))

        class Site:
            async def open(self, nursery: trio.Nursery, size_bytes: int, *, timeout_s: float) -> Leg:
                leg = await rig.nodes["b"].open(rig.record.term, primary=nursery)
                checks = leg.checks

                async def slow(offset: int, length: int) -> bytes:
                    await trio.sleep(length / (1 << 20))  # 2 MiB/s by two workers
                    return await checks(offset, length)

                leg.checks = slow  # type: ignore[method-assign]
                return leg

        rig.servers["legb"] = Site()  # type: ignore[assignment]
        rig.store("a").image[:] = b"x" * size
        async with rig.running() as mirror:
            await rig.whole()
            assert mirror.members["legb"].counters.resyncs == 1
            assert rig.store("b").image == rig.store("a").image

    run(body)


def test_it_goes_slower_when_clients_suffer_not_below_the_floor_and_freely_when_they_are_idle() -> None:
    pace = Pace(ResyncSettings(floor_bytes_s=100.0, ceiling_bytes_s=math.inf))
    pace.judge(idle=False, latency_s=0.001, measured_bytes_s=10_000)
    assert pace.rate == math.inf
    pace.judge(idle=False, latency_s=0.004, measured_bytes_s=10_000)
    assert pace.rate == 5000
    for _ in range(20):
        pace.judge(idle=False, latency_s=0.01, measured_bytes_s=5000)
    assert pace.rate == 100
    pace.judge(idle=False, latency_s=0.001, measured_bytes_s=100)
    assert pace.rate == 125
    pace.judge(idle=True, latency_s=1, measured_bytes_s=100)
    assert pace.rate == math.inf


def test_verify_reports_what_differs_repairs_it_and_reads_no_data() -> None:
    async def body() -> None:
        rig = Rig(3)
        async with rig.running() as mirror:
            await filled(rig)
            assert (await verify(mirror)).equal
            rig.store("b").image[3 * EXTENT_BYTES + 5] ^= 1
            rig.store("c").image[2 * BLOCK_BYTES : 4 * BLOCK_BYTES] = bytes(2 * BLOCK_BYTES)
            reads = [rig.store(node).read_bytes for node in "abc"]
            report = await verify(mirror)
            assert [rig.store(node).read_bytes for node in "abc"] == reads
            assert report.finished and report.compared[0] == "lega"
            assert report.differing == {
                "legb": [(3 * EXTENT_BYTES, BLOCK_BYTES)], "legc": [(2 * BLOCK_BYTES, 2 * BLOCK_BYTES)],
            }  # fmt: skip
            assert report.differing_bytes == 3 * BLOCK_BYTES
            assert (await verify(mirror, full=True)).differing == report.differing
            assert (await verify(mirror, repair=True)).repaired_bytes == 3 * BLOCK_BYTES
            assert (await verify(mirror, full=True)).equal
            assert rig.store("a").image == rig.store("b").image == rig.store("c").image

    run(body)


def test_a_full_verify_finds_blocks_that_cant_be_read_and_repairs_them() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await filled(rig)
            rig.store("b").bad = {EXTENT_BYTES}
            assert (await verify(mirror)).equal
            report = await verify(mirror, full=True, repair=True)
            assert report.unreadable == {"legb": [(EXTENT_BYTES, BLOCK_BYTES)]}
            assert (report.unreadable_bytes, report.healed_bytes, report.left_bytes) == (BLOCK_BYTES, BLOCK_BYTES, 0)
            assert (await verify(mirror, full=True)).equal

    run(body)


def test_a_verify_goes_on_where_only_the_order_of_the_legs_by_their_nearness_changes() -> None:
    async def body() -> None:
        rig = Rig(2, diskless=True)
        async with rig.running() as mirror:
            await filled(rig)
            rig.store("b").image[0] ^= 1
            before = [m.info.id for m in mirror.readable()]

            async def read() -> None:
                while True:
                    await mirror.read(EXTENT_BYTES, BLOCK_BYTES, memoryview(bytearray(BLOCK_BYTES)))
                    await trio.sleep(0.001)

            async with trio.open_nursery() as clients:
                clients.start_soon(read)
                await trio.sleep(0.1)
                rig.nodes[mirror.readable()[0].info.node].link.delay_s = 0.02
                report = await verify(mirror, full=True, rate_bytes_s=SIZE)
                clients.cancel_scope.cancel()
            assert [m.info.id for m in mirror.readable()] != before
            assert report.finished and report.differing_bytes == BLOCK_BYTES
            assert sorted(report.compared) == sorted(before)

    run(body)


def test_a_leg_that_is_lost_while_an_extent_is_compared_and_is_being_brought_up_to_date_is_not_said_to_differ() -> None:
    async def body() -> None:
        rig = Rig(2, settings=MirrorSettings(flush_every_s=1000))
        rig.known = False
        async with rig.running() as mirror:
            await mirror.flush()
            await mirror.write(0, block(7))
            rig.store("b").bad = {BLOCK_BYTES}  # so that this extent is looked at
            source = member(rig, "a").leg
            assert source is not None
            reads = source.read

            async def read(offset: int, length: int, into: memoryview) -> None:
                await reads(offset, length, into)
                if length == BLOCK_BYTES and member(rig, "b").counters.failures == 0:
                    rig.nodes["b"].link.cut()
                    await rig.until(lambda: member(rig, "b").leg is None)
                    rig.store("b").image[:BLOCK_BYTES] = bytes(BLOCK_BYTES)  # its machine went down
                    source.checks = never  # type: ignore[method-assign]
                    rig.nodes["b"].link.mend()
                    await rig.until(lambda: member(rig, "b").state is LegState.SYNCING)

            async def never(offset: int, length: int) -> bytes:
                await trio.sleep_forever()
                return b""

            source.read = read  # type: ignore[method-assign]
            report = VerifyReport()
            with pytest.raises(OSError) as refused:
                await verify(mirror, full=True, report=report)
            assert refused.value.errno == errno.ENOTCONN
            assert not report.differing_bytes

    run(body)


@pytest.mark.parametrize("full", [False, True])
def test_a_repair_goes_on_where_the_first_leg_cant_read_what_differs_or_has_lost_it(full: bool) -> None:
    async def body() -> None:
        rig = Rig(3)
        async with rig.running() as mirror:
            await filled(rig)
            right = bytes(rig.store("b").image)
            rotten, lost = EXTENT_BYTES - BLOCK_BYTES, 4 * EXTENT_BYTES
            rig.store("a").image[rotten : rotten + BLOCK_BYTES] = bytes(BLOCK_BYTES)
            rig.store("c").image[0] ^= 1
            rig.store("a").bad = {rotten, EXTENT_BYTES}
            rig.store("a").lost = {lost, lost + BLOCK_BYTES}
            report = await verify(mirror, full=full, repair=True)
            assert report.left_bytes == 0 and report.healed_bytes >= 3 * BLOCK_BYTES
            assert sum(report.unreadable["lega"][0]) >= EXTENT_BYTES
            assert report.differing["legc"] == [(0, BLOCK_BYTES), *([] if full else [(rotten, BLOCK_BYTES)])]
            assert rig.store("a").lost == set()
            await mirror.heal("lega", EXTENT_BYTES, BLOCK_BYTES)
            assert [bytes(rig.store(node).image) for node in "abc"] == [right] * 3
            assert (await verify(mirror, full=True)).equal

    run(body)


def test_what_is_only_in_flight_is_not_reported() -> None:
    async def body() -> None:
        rig = Rig(2)
        rig.nodes["b"].link.delay_s = 0.003
        async with rig.running() as mirror:
            await filled(rig)
            report = VerifyReport()
            async with trio.open_nursery() as nursery:

                async def write() -> None:
                    number = 0
                    while not report.finished:
                        number += 1
                        await mirror.write(number % 64 * EXTENT_BYTES, block(number % 250))

                nursery.start_soon(write)
                nursery.start_soon(write)
                await verify(mirror, report=report)
            assert report.equal

    run(body)


def test_verify_needs_two_legs_in_sync() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            rig.nodes["b"].link.cut()
            await mirror.write(0, block(1))
            with pytest.raises(OSError, match="no two legs in sync") as refused:
                await verify(mirror)
            assert refused.value.errno == errno.ENOTCONN

    run(body)


def test_a_leg_that_is_taken_out_of_the_record_is_let_go() -> None:
    async def body() -> None:
        rig = Rig(3)
        async with rig.running() as mirror:
            left = tuple(leg for leg in mirror.membership.legs if leg.node != "c")
            rig.nodes["c"].link.cut()
            await mirror.write(0, block(1))
            await mirror.reconfigure(legs=left, voters=("a", "b"))
            assert set(mirror.members) == {"lega", "legb"}
            assert rig.cluster.truth.legs == left
            again = replace(rig.record.leg("legc"))
            rig.nodes["c"].link.mend()
            await mirror.reconfigure(legs=(*left, again))
            await rig.whole()
            assert rig.store("c").image == rig.store("a").image

    run(body)


def _written_lately(rig: Rig, node: str, extent: int) -> None:
    """As a crash leaves it: one leg has a block that others may lack, and remembers the extent."""
    rig.store(node).image[extent * EXTENT_BYTES : extent * EXTENT_BYTES + 8] = b"lately.."
    recent = MemoryExtents()
    recent.add(extent * EXTENT_BYTES, BLOCK_BYTES)
    rig.store(node).trackers[RECENT] = recent


def test_a_leg_that_isnt_there_when_a_primary_begins_gets_what_was_written_last_before_the_crash() -> None:
    async def body() -> None:
        rig = Rig(3)
        for node in "ac":
            _written_lately(rig, node, 5)
        rig.nodes["b"].link.cut()
        async with rig.running():
            await rig.until(lambda: "legb" not in rig.mirror.membership.in_sync)
            await trio.sleep(5)
            rig.nodes["b"].link.mend()
            await rig.whole()
            assert rig.store("b").image == rig.store("a").image == rig.store("c").image
            assert all(rig.nodes[node].keeper.settled_saved for node in "ac")

    run(body)


def test_a_leg_in_resync_when_the_primary_crashed_gets_what_was_written_last() -> None:
    async def body() -> None:
        rig = Rig(2, in_sync=["lega"])
        # The resync had brought the extent before it was written again: it is missing no more, but recent.
        rig.store("a").trackers[missing_tracker("legb")] = MemoryExtents()
        _written_lately(rig, "a", 5)
        rig.nodes["b"].link.cut()
        async with rig.running():
            await trio.sleep(5)
            rig.nodes["b"].link.mend()
            await rig.whole()
            assert rig.store("b").image == rig.store("a").image

    run(body)


def test_what_a_leg_in_resync_got_and_lost_before_a_common_flush_is_brought_again() -> None:
    async def body() -> None:
        settings = ResyncSettings(ceiling_bytes_s=1 << 20, flush_bytes=EXTENT_BYTES, workers=1)
        rig = Rig(2, in_sync=["lega"], settings=MirrorSettings(resync=settings, flush_every_s=1000))
        rig.known = False
        rig.store("a").image[:] = bytes([3]) * SIZE
        async with rig.running() as mirror:
            name = missing_tracker("legb")
            await rig.until(lambda: 0 < len(trackers_matching(rig.store("a"), name)) < 40)
            rig.known = True
            # What was brought is neither missing nor recent any more, here and there.
            for _ in range(3):
                await mirror.flush()
            rig.store("b").checkpoint()
            for node in "ab":
                assert 0 not in trackers_matching(rig.store(node), "*")
            flushes = rig.store("b").flushes
            await mirror.write(0, block(9))
            # As in the middle of a flush of the resync: the write is at the leg, and the flush doesn't cover it.
            rig.store("a").trackers[name].discard(0, EXTENT_BYTES)
            assert rig.store("b").flushes == flushes
            with mock.patch("random.randint", lambda least, most: least):
                await rig.nodes["b"].stop(power=True)
            assert rig.store("b").image[0] == 3
            assert 0 not in trackers_matching(rig.store("b"), "*"), "the leg doesn't know what it has lost"
            await rig.until(lambda: member(rig, "b").state is LegState.STALE)
            async with trio.open_nursery() as nursery:
                await nursery.start(rig.nodes["b"].run)
                await rig.whole()
                assert rig.store("b").image == rig.store("a").image
                nursery.cancel_scope.cancel()

    run(body)


def test_less_is_under_way_at_once_while_clients_are_busy_and_it_ends_all_the_same() -> None:
    async def body() -> None:
        settings = ResyncSettings(workers=6, workers_beside_clients=2)
        rig = Rig(2, in_sync=["lega"], settings=MirrorSettings(resync=settings))
        rig.known = True
        most: dict[str, int] = {}
        now = "busy"  # or idle

        async with rig.running() as mirror:
            leg_b = rig.store("b")
            checks = leg_b.checks

            async def watched(offset: int, length: int) -> bytes:
                most[now] = max(most.get(now, 0), len(mirror.inflight._watches))
                await trio.sleep(0.2)
                return await checks(offset, length)

            leg_b.checks = watched  # type: ignore[method-assign]

            async def client() -> None:
                while now == "busy":
                    mirror.client_at = trio.current_time()
                    await trio.sleep(0.05)

            for clients_are in ("busy", "idle"):
                now = clients_are
                rig.nodes["b"].link.cut()
                await filled(rig, 7)
                await trio.sleep(3)
                rig.nodes["b"].link.mend()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(client)
                    await rig.whole()
                    nursery.cancel_scope.cancel()
        assert most == {"busy": 2, "idle": 6}

    run(body)


def test_a_leg_that_is_lost_again_as_soon_as_it_is_in_sync_is_tried_again_ever_more_seldom() -> None:
    """A pool that has room for what the leg missed, and not for what clients write next."""

    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            store = rig.store("b")
            for _ in range(600):
                is_up = rig.state("b") is LegState.UP_TO_DATE
                store.failing = OSError(errno.ENOSPC, "the pool is full") if is_up else None
                await mirror.write(0, block(7))
                await trio.sleep(0.1)
            assert 8 <= member(rig, "b").counters.resyncs <= 20, "a minute; in the end it is tried every 5 s"
            store.failing = None
            await rig.whole()
            await trio.sleep(10)
            rig.nodes["b"].link.cut()
            rig.nodes["b"].link.mend()
            await mirror.write(0, block(8))
            began = trio.current_time()
            await rig.whole()
            assert trio.current_time() - began < 1, "it had come to stay"

    run(body)


@pytest.mark.parametrize("where", ["first", "other"])
def test_what_a_leg_has_by_the_map_of_one_in_sync_is_not_lost_there_though_nobody_else_can_read_it(where: str) -> None:
    async def body() -> None:
        rig = Rig(3, in_sync=["lega", "legc"])
        rig.known = False
        for node in "abc":
            rig.store(node).image[:] = bytes([5]) * SIZE
        if where == "other":  # the first one asked doesn't know any more what was there
            rig.store("a").lost.add(EXTENT_BYTES)
            rig.store("c").bad.add(EXTENT_BYTES)
        else:
            rig.store("a").bad.add(EXTENT_BYTES)
            rig.store("c").lost.add(EXTENT_BYTES)
        async with rig.running() as mirror:
            await rig.whole()
            into = memoryview(bytearray(BLOCK_BYTES))
            await mirror.read(EXTENT_BYTES, BLOCK_BYTES, into)
            assert into == bytes([5]) * BLOCK_BYTES and not rig.store("b").lost

    run(body)


def test_to_be_told_what_third_legs_miss_costs_a_leg_no_block_that_it_alone_can_read() -> None:
    async def body() -> None:
        rig = Rig(3)
        async with rig.running() as mirror:
            await filled(rig)
            await mirror.flush()
            await trio.sleep(5)
            for node in "bc":
                rig.nodes[node].link.cut()
            data = block(7, 16)
            await mirror.write(2 * EXTENT_BYTES, data)
            for node in "b":  # it has it all the same, by a copy whose end nobody has heard
                rig.store(node).image[2 * EXTENT_BYTES : 3 * EXTENT_BYTES] = data
            rig.store("a").bad.add(2 * EXTENT_BYTES)
            rig.nodes["b"].link.mend()
            await rig.until(lambda: member(rig, "b").state is LegState.UP_TO_DATE)
            assert 2 in trackers_matching(rig.store("b"), missing_tracker("legc"))
            assert not rig.store("b").lost
            into = memoryview(bytearray(BLOCK_BYTES))
            await mirror.read(2 * EXTENT_BYTES, BLOCK_BYTES, into)
            assert into == data[:BLOCK_BYTES]

    run(body)


def test_a_source_that_takes_its_time_for_each_block_that_it_cant_read_is_no_resync_without_progress() -> None:
    async def body() -> None:
        rig = Rig(
            2,
            in_sync=["lega"],
            settings=MirrorSettings(resync=ResyncSettings(stalled_s=2.0, workers=1, reread_s=(0.1,))),
        )
        rig.known = False
        store = rig.store("a")
        store.image[:] = bytes([3]) * SIZE
        store.bad.update(range(0, EXTENT_BYTES, BLOCK_BYTES))
        read = store.read

        async def slow(offset: int, length: int, into: memoryview) -> None:
            if offset in store.bad:
                await trio.sleep(0.2)
            await read(offset, length, into)

        with mock.patch.object(store, "read", slow), mock.patch.object(store, "read_now", lambda *_: False):
            async with rig.running():
                await rig.whole()
                assert not member(rig, "b").counters.failures
                assert len(rig.store("b").lost) == EXTENT_BYTES // BLOCK_BYTES

    run(body)
