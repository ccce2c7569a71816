"""The last consistent state of a leg that is resynced: kept in time, given up for space, and named where it helps."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from replication.keeper import LegKeeper, LegRecord
from terrace.keptstate import KeptState, is_kept_state
from tests.replication.stores import MemoryStore, first_record
from tiers import TierError


@dataclass
class OnePool:
    """With the snapshots of one volume."""

    name: str = "p"
    taken: list[Any] = field(default_factory=list)
    free: int = 100
    refusal: TierError | None = None
    taking_s: float = 0.0
    """From when one can be seen until it is durable."""

    def snapshots(self, volume: str) -> list[Any]:
        return list(self.taken)

    def use(self) -> tuple[int, int]:
        return 100 - self.free, 100

    async def take_snapshots(self, wanted: Sequence[tuple[str, str]]) -> None:
        await trio.lowlevel.checkpoint()
        if self.refusal is not None:
            raise self.refusal
        for volume, name in wanted:
            self.taken.append(SimpleNamespace(short_name=name, name=f"p/{volume}@{name}", held=False, open_count=0))
        await trio.sleep(self.taking_s)

    async def delete_snapshots(self, wanted: Sequence[tuple[str, str]]) -> None:
        await trio.lowlevel.checkpoint()
        if self.refusal is not None:
            raise self.refusal
        self.taken = [one for one in self.taken if ("v", one.short_name) not in wanted]


class Scene:
    """A leg on node b that missed something."""

    def __init__(self, *, wanted: bool = True) -> None:
        self.pool = OnePool()
        self.told: list[str] = []
        self.store = MemoryStore()
        record = first_record("ab").next_epoch(in_sync=frozenset("a"))
        self.membership = record
        self.keeper = LegKeeper(self.store, LegRecord("b", accepted=first_record("ab")), node="b", boot="boot")
        volume: Any = SimpleNamespace(name="p/v", short_name="v")
        pool: Any = self.pool
        self.kept = KeptState(
            pool, volume, lambda kind, subject, text: self.told.append(text),
            lambda: self.keeper.record.inconsistent, wanted=wanted,
        )  # fmt: skip
        self.keeper.before_overwritten = self.kept.take
        self.keeper.whole_again = self.kept.served

    async def begin(self) -> None:
        await self.keeper.accept(self.membership, inconsistent=True)

    async def end(self) -> None:
        await self.keeper.accept(self.membership.next_epoch(in_sync=frozenset("ab")))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.kept.run)
            yield
            nursery.cancel_scope.cancel()


def run(body: Any) -> None:
    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))


def test_it_is_taken_before_the_record_says_inconsistent_and_deleted_when_it_says_in_sync() -> None:
    async def main() -> None:
        scene = Scene()
        saved: list[int] = []
        save = scene.store.save

        async def watched(record: bytes, trackers: Any = None) -> None:
            if LegRecord.decode(record).inconsistent:
                saved.append(len(scene.pool.taken))
            await trio.sleep(10)
            await save(record, trackers)

        scene.store.save = watched  # type: ignore[method-assign]
        async with scene.running():
            await scene.begin()
            assert saved == [1] and is_kept_state(scene.pool.taken[0].short_name)
            await scene.begin()  # the resync was interrupted: what it has now is no state to keep
            await trio.sleep(60)
            assert len(scene.pool.taken) == 1
            await scene.end()
            await trio.sleep(1)
            assert scene.pool.taken == [] and scene.told == []

    run(main)


def test_a_leg_that_is_new_or_in_sync_keeps_nothing() -> None:
    async def main() -> None:
        scene = Scene()
        scene.keeper.record = LegRecord("b", inconsistent=True)
        await scene.begin()
        await scene.end()
        assert scene.pool.taken == []

    run(main)


def test_a_full_pool_is_told_and_keeps_no_leg_from_being_resynced() -> None:
    async def main() -> None:
        scene = Scene()
        scene.pool.refusal = TierError(errno.ENOSPC, "p is too full")
        await scene.begin()
        assert scene.keeper.record.inconsistent
        assert len(scene.told) == 1 and "without keeping" in scene.told[0]

    run(main)


def test_why_none_can_be_taken_is_told_once_until_it_is_another_reason_or_has_worked() -> None:
    async def main() -> None:
        scene = Scene()

        async def tries(refusal: TierError | None) -> int:
            """How often it is told in a minute of attempts."""
            before, scene.pool.refusal = len(scene.told), refusal
            for _ in range(12):
                await scene.kept.take()
                await trio.sleep(5)
            return len(scene.told) - before

        read_only, full = TierError(errno.EROFS, "p takes no writes"), TierError(errno.ENOSPC, "p is too full")
        assert [await tries(one) for one in (read_only, full, read_only)] == [1, 1, 1]
        assert await tries(None) == 0 and await tries(read_only) == 1
        await scene.begin()  # the leg becomes whole without
        await scene.end()
        assert await tries(read_only) == 1

    run(main)


def test_it_is_given_up_when_the_pool_fills_up_while_the_leg_is_resynced() -> None:
    async def main() -> None:
        scene = Scene()
        async with scene.running():
            await scene.begin()
            scene.pool.free = 4
            await trio.sleep(5)
            assert scene.pool.taken == [] and "nearly full" in scene.told[0]

    run(main)


def test_one_that_is_left_by_a_crash_goes_at_the_next_start_and_one_in_use_when_it_is_free() -> None:
    async def main() -> None:
        scene = Scene()
        await scene.begin()
        await scene.end()
        await scene.kept._pool.take_snapshots([("v", "mine"), ("v", "resync-notours")])
        scene.pool.taken[0].open_count = 1
        async with scene.running():
            await trio.sleep(60)
            assert len(scene.pool.taken) == 3
            assert scene.told == []
            scene.pool.taken[0].open_count = 0
            await trio.sleep(60)
            assert [one.short_name for one in scene.pool.taken] == ["mine", "resync-notours"]
            assert len(scene.told) == 1 and " is deleted: the leg lacks nothing any more" in scene.told[0], (
                "it may have stayed for what was lost, which was written meanwhile"
            )

    run(main)


def test_a_leg_whose_resync_fails_to_begin_again_and_again_keeps_but_the_newest_state() -> None:
    async def main() -> None:
        scene = Scene()
        save = scene.store.save

        async def refused(record: bytes, trackers: Any = None) -> None:
            raise TierError(errno.EIO, "the checkpoint failed")

        async with scene.running():
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(3):
                scene.store.save = refused  # type: ignore[method-assign]
                with pytest.raises(TierError):
                    await scene.begin()
                await trio.sleep(30)
                (newest,) = scene.pool.taken
            scene.store.save = save  # type: ignore[method-assign]
            await scene.begin()
            assert newest in scene.pool.taken and scene.pool.taken[-1] is not newest

    run(main)


def test_one_that_can_be_seen_while_it_is_taken_is_not_taken_for_an_old_one() -> None:
    async def main() -> None:
        scene = Scene()
        await scene.begin()
        await scene.end()
        (old,) = scene.pool.taken
        old.open_count = 1  # it stays, so that there is something to look at all the time
        scene.pool.taking_s = 30
        async with scene.running():
            await scene.kept.take()
            assert len(scene.pool.taken) == 2 and scene.pool.taken[0] is old
            with trio.move_on_after(1):
                await scene.kept.take()
            await trio.sleep(60)  # given up: it is none of now any more than the one before
            assert len(scene.pool.taken) == 2 and scene.pool.taken[0] is old

    run(main)


def test_one_whose_taking_was_given_up_goes_when_it_is_there_all_the_same() -> None:
    async def main() -> None:
        scene = Scene()
        scene.pool.taking_s = 30
        async with scene.running():
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(1):
                await scene.kept.take()
            await trio.sleep(1)
            assert scene.pool.taken == []

    run(main)


def test_where_it_isnt_wanted_none_is_taken() -> None:
    async def main() -> None:
        scene = Scene(wanted=False)
        await scene.begin()
        assert scene.pool.taken == [] and scene.told == []

    run(main)


@pytest.mark.parametrize("name", ["resync", "resync-2026", "resync-20261130-1", "x-resync-20261130-120000", "daily"])
def test_what_people_call_their_snapshots_is_theirs(name: str) -> None:
    assert not is_kept_state(name)
    assert is_kept_state("resync-20261130-120000") and is_kept_state("resync-20261130-120000-2")


def test_it_stays_while_the_leg_lacks_what_no_leg_could_read_and_the_pool_has_room() -> None:
    async def main() -> None:
        for ends_by in ("healed", "full"):
            scene, lost = Scene(), 0

            async def has_lost(snapshot: Any) -> bool:
                await trio.lowlevel.checkpoint()
                return bool(lost)  # noqa: B023

            scene.kept._has_lost = has_lost
            async with scene.running():
                for _ in range(6):  # each resync takes one
                    await scene.begin()
                    await trio.sleep(5)
                    lost = 4096
                    await scene.end()
                    await trio.sleep(100)
                    scene.membership = scene.keeper.record.accepted.next_epoch(in_sync=frozenset("a"))  # type: ignore[union-attr]
                    if len(scene.pool.taken) == 1:
                        oldest = scene.pool.taken[0].short_name
                assert len(scene.pool.taken) == 4 and scene.pool.taken[0].short_name == oldest
                assert len(scene.told) == 1 and f"p/v@{oldest} stays" in scene.told[0]
                assert "deleted when that is written anew or healed, or pool p is nearly full: " in scene.told[0]
                assert f"`terrace snapshot hold --local p/v@{oldest}` keeps it" in scene.told[0]
                kept = [one.name for one in scene.pool.taken]
                scene.pool.taken[0].held = True  # as that command does
                if ends_by == "healed":
                    lost = 0
                else:
                    scene.pool.free = 4
                await trio.sleep(20)
                assert [one.short_name for one in scene.pool.taken] == [oldest]
                scene.pool.taken[0].held = False
                await trio.sleep(20)
                assert scene.pool.taken == []
                gone = scene.told[1:]
                assert [text.split(",")[0] for text in gone] == [*kept[1:], f"p/v@{oldest}"], "each once, when it goes"
                why = "the leg lacks nothing any more" if ends_by == "healed" else "no leg could read: pool p is nearly"
                assert all(why in text for text in gone)

    run(main)
