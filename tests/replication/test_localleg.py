"""The leg on this node: its queue, its trackers, its fence."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Awaitable, Callable

import pytest
import trio

from replication.leg import BLOCK_BYTES, EXTENT_BYTES, RECENT, RECENT_OLD, Change
from replication.localleg import LocalLeg, LocalSite
from replication.membership import LegInfo, Term
from tests.replication.fakes import FakeKeeper, MemoryExtents, MemoryLegStore, trackers_matching
from tests.replication.linked import Told
from tests.replication.rig import SIZE, TERM, run

INFO = LegInfo("lega", "a", "pool/vol")


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await trio.sleep(0.001)


def stored() -> tuple[MemoryLegStore, FakeKeeper]:
    store = MemoryLegStore(SIZE)
    store.trackers = {RECENT: MemoryExtents(), RECENT_OLD: MemoryExtents()}
    return store, FakeKeeper(store, INFO.id)


def change(block: int, value: int) -> Change:
    return Change(block * BLOCK_BYTES, BLOCK_BYTES, memoryview(bytes([value]) * BLOCK_BYTES))


def test_what_would_block_holds_up_what_comes_behind_it_and_data_are_copied() -> None:
    async def body() -> None:
        store, keeper = stored()
        async with trio.open_nursery() as nursery:
            leg = await LocalSite(keeper).open(nursery, INFO, TERM)
            told = Told()
            store.stuck = stuck = trio.Event()
            buffer = bytearray(b"\1" * BLOCK_BYTES)
            leg.submit(1, [Change(0, BLOCK_BYTES, memoryview(buffer))], told.of(1))
            buffer[:] = b"\7" * BLOCK_BYTES
            await until(lambda: leg.silent_since is not None)
            store.stuck = None
            leg.submit(2, [change(0, 2)], told.of(2))
            assert store.image[0] == 0 and leg.queued_bytes == 2 * BLOCK_BYTES
            stuck.set()
            await until(lambda: told.done == [1, 2])
            assert store.image[0] == 2 and leg.queued_bytes == 0 and leg.silent_since is None
            assert [entry[2][:1] for entry in store._log if entry[2]] == [b"\1", b"\2"]
            leg.close()

    run(body)


def test_a_change_that_fails_fails_the_leg_and_everything_behind_it() -> None:
    async def body() -> None:
        store, keeper = stored()
        async with trio.open_nursery() as nursery:
            leg = await LocalSite(keeper).open(nursery, INFO, TERM)
            store.failing = OSError(errno.ENOSPC, "the pool is full")
            told = Told()
            leg.submit(1, [change(0, 1)], told.of(1))
            leg.submit(2, [change(0, 2)], told.of(2))
            await until(lambda: len(told.calls) == 2)
            assert told.done == []
            assert leg.failure is not None and leg.failure.errno == errno.ENOSPC
            with pytest.raises(OSError, match="the pool is full"):
                await leg.flush()

    run(body)


def test_a_later_term_stops_it_at_once() -> None:
    async def body() -> None:
        store, keeper = stored()
        async with trio.open_nursery() as nursery:
            site = LocalSite(keeper)
            leg = await site.open(nursery, INFO, TERM)
            await keeper.promise(Term(TERM.number + 1, "b" * 16))
            assert leg.failure is not None and leg.failure.errno == errno.ESTALE
            told = Told()
            leg.submit(1, [change(0, 1)], told.of(1))
            await until(lambda: len(told.calls) == 1)
            assert told.done == [] and not any(store.image)
            with pytest.raises(OSError, match="later term"):
                await site.open(nursery, INFO, TERM)

    run(body)


def test_a_new_leg_waits_for_what_the_last_one_is_just_doing() -> None:
    async def body() -> None:
        store, keeper = stored()
        async with trio.open_nursery() as nursery:
            site = LocalSite(keeper)
            old = await site.open(nursery, INFO, TERM)
            store.stuck = stuck = trio.Event()
            old.submit(1, [change(0, 1)], Told().of(1))
            await until(lambda: old.silent_since is not None)
            await trio.sleep(0.01)
            store.stuck = None
            old.close()
            with trio.move_on_after(0.05) as scope:
                await site.open(nursery, INFO, TERM)
            assert scope.cancelled_caught
            stuck.set()
            new = await site.open(nursery, INFO, TERM)
            told = Told()
            new.submit(2, [change(0, 2)], told.of(2))
            await until(lambda: told.done == [2])
            assert store.image[0] == 2
            new.close()

    run(body)


def test_what_was_written_after_a_flush_began_is_remembered_when_it_has_ended_everywhere() -> None:
    async def body() -> None:
        store, keeper = stored()
        async with trio.open_nursery() as nursery:
            leg: LocalLeg = await LocalSite(keeper).open(nursery, INFO, TERM)
            told = Told()
            leg.submit(1, [change(0, 1)], told.of(1))
            await leg.flush()
            leg.submit(2, [change(EXTENT_BYTES // BLOCK_BYTES, 2)], told.of(2))
            leg.flushed_by_all(0)
            assert trackers_matching(store, "recent*") == {0, 1}
            leg.flushed_by_all(1)
            assert trackers_matching(store, "recent*") == {1}
            leg.flushed_by_all(2)
            assert trackers_matching(store, "recent*") == {1}, "it has not flushed that"
            await leg.flush()
            leg.submit(3, [change(2 * EXTENT_BYTES // BLOCK_BYTES, 3)], told.of(3))
            await leg.flush()
            leg.flushed_by_all(1)
            assert trackers_matching(store, "recent*") == {1, 2}, "another leg hasn't got so far"
            leg.flushed_by_all(3)
            assert trackers_matching(store, "recent*") == {2}
            await leg.flush()
            leg.flushed_by_all(3)
            assert trackers_matching(store, "recent*") == set()
            leg.close()

    run(body)


ASKS: dict[str, Callable[[LocalLeg], Awaitable[object]]] = {
    "flush": lambda leg: leg.flush(),
    "read": lambda leg: leg.read(0, BLOCK_BYTES, memoryview(bytearray(BLOCK_BYTES))),
    "checks": lambda leg: leg.checks(0, BLOCK_BYTES),
    "mapped": lambda leg: leg.mapped(0, BLOCK_BYTES),
    "resize": lambda leg: leg.resize(2 * SIZE),
    "snapshot": lambda leg: leg.snapshot("one"),
}


@pytest.mark.parametrize("what", ASKS)
def test_who_waits_for_a_disk_that_never_answers_is_told_when_the_leg_is_closed(what: str) -> None:
    async def body() -> None:
        store, keeper = stored()
        async with trio.open_nursery() as nursery:
            site = LocalSite(keeper)
            leg = await site.open(nursery, INFO, TERM)
            errors: list[OSError] = []

            async def ask() -> None:
                try:
                    await ASKS[what](leg)
                except OSError as error:
                    errors.append(error)

            with store.hung():
                async with trio.open_nursery() as asking:
                    asking.start_soon(ask)
                    asking.start_soon(ask)
                    await trio.sleep(1)
                    assert not errors and leg.silent_since is not None
                    leg.close()
                assert [error.errno for error in errors] == [errno.ECANCELED] * 2
                assert leg.silent_since is None
                # What is under way there can still land: no leg is opened before.
                with trio.move_on_after(1) as scope:
                    await site.open(nursery, INFO, TERM)
                assert scope.cancelled_caught
            (await site.open(nursery, INFO, TERM)).close()

    run(body)


def test_bytes_that_a_disk_gives_too_late_are_in_nobodys_buffer() -> None:
    async def body() -> None:
        store, keeper = stored()
        store.image[:BLOCK_BYTES] = b"L" * BLOCK_BYTES
        async with trio.open_nursery() as nursery:
            leg = await LocalSite(keeper).open(nursery, INFO, TERM)
            into = memoryview(bytearray(BLOCK_BYTES))
            with store.hung():
                nursery.start_soon(_after, 1, leg.close)
                with pytest.raises(OSError, match="was closed"):
                    await leg.read(0, BLOCK_BYTES, into)
            await trio.sleep(1)
            assert not any(into)

    run(body)


async def _after(seconds: float, action: Callable[[], None]) -> None:
    await trio.sleep(seconds)
    action()


def test_a_cancelled_read_ends_at_once_and_a_leg_that_isnt_run_yet_answers_when_it_is() -> None:
    async def body() -> None:
        store, keeper = stored()
        leg = LocalLeg(keeper, INFO, TERM)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leg.flush)
            await trio.sleep(1)
            assert store.flushes == 0
            nursery.start_soon(leg.run)
            await trio.sleep(1)
            assert store.flushes == 1
            store.stuck = stuck = trio.Event()
            for ask in (ASKS["read"], ASKS["snapshot"]):
                with trio.move_on_after(1) as scope:
                    await ask(leg)
                assert scope.cancelled_caught and leg.silent_since is None
            stuck.set()
            store.stuck = None
            await trio.sleep(1)
            assert not store.snapshots, "what changes the leg is cut short"
            with store.hung(), trio.move_on_after(1) as scope:
                nursery.start_soon(_after, 5, leg.close)
                began = trio.current_time()
                await leg.snapshot("two")
            assert scope.cancelled_caught
            assert trio.current_time() - began == pytest.approx(5), "and waited for, as long as the leg lasts"

    run(body)


def test_who_asks_while_the_leg_is_being_stopped_hears_that_it_is() -> None:
    async def body() -> None:
        for _ in range(30):  # the order in which tasks run is random
            leg = LocalLeg(stored()[1], INFO, TERM)

            async def ask(leg: LocalLeg = leg) -> None:
                while leg.failure is None:
                    with contextlib.suppress(OSError):
                        await leg.read(0, BLOCK_BYTES, memoryview(bytearray(BLOCK_BYTES)))
                    await trio.lowlevel.checkpoint()

            async with trio.open_nursery() as outer, trio.open_nursery() as nursery:
                nursery.start_soon(leg.run)
                outer.start_soon(ask)
                outer.start_soon(ask)
                for _ in range(20):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            assert leg.failure is not None and leg.failure.errno == errno.ECANCELED

    run(body)


def test_a_leg_that_is_closed_tells_all_that_is_due_though_its_disk_never_answers() -> None:
    async def body() -> None:
        store = MemoryLegStore(SIZE)
        store.stuck = trio.Event()
        leg = LocalLeg(FakeKeeper(store, "lega"), INFO, TERM)
        told = Told()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leg.run)
            leg.submit(1, [Change(0, BLOCK_BYTES, memoryview(bytes(BLOCK_BYTES)))], told.of(1))
            await trio.sleep(0.1)
            leg.close()
            assert told.calls == []
            await trio.sleep(0.1)
            assert [sequence for sequence, _ in told.calls] == [1]
            nursery.cancel_scope.cancel()

    run(body)
