"""Schedules carried out: over a fake pool with a clock of its own, and over real pools."""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from terrace.config import parse_config
from terrace.events import Events
from terrace.pools import open_pools
from terrace.schedule import Schedule, parse_schedule
from terrace.scheduler import keep_schedules
from terrace.snapshots import Direct, Through
from tests.tiers.helpers import specs
from tiers import PoolSettings, TierError

START_S = datetime(2026, 11, 29, 12, 0, tzinfo=UTC).timestamp()
HOUR_S, DAY_S = 3600.0, 86400.0


@dataclass
class FakeSnapshot:
    name: str
    short_name: str
    held: bool = False
    open_count: int = 0


@dataclass
class FakeVolume:
    short_name: str
    policy: Any
    policy_missing: bool = False
    filling: bool = False


@dataclass
class FakePool:
    """As much of a pool as a schedule needs; `refusal` is what it refuses everything with."""

    name: str
    fakes: dict[str, FakeVolume] = field(default_factory=dict)
    taken: dict[str, list[FakeSnapshot]] = field(default_factory=dict)
    calls: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    looks: int = 0
    refusal: TierError | None = None
    gate: trio.Event | None = None

    def add(self, *names: str, policy: str = "default", missing: bool = False) -> None:
        for name in names:
            self.fakes[name] = FakeVolume(name, SimpleNamespace(name=policy), missing)
            self.taken.setdefault(name, [])

    def volumes(self) -> list[FakeVolume]:
        return list(self.fakes.values())

    def snapshots(self) -> list[FakeSnapshot]:
        self.looks += 1
        return [snapshot for volume in self.fakes for snapshot in self.taken[volume]]

    def names(self, volume: str) -> list[str]:
        return [snapshot.short_name for snapshot in self.taken[volume]]

    async def take_snapshots(self, wanted: Sequence[tuple[str, str]]) -> None:
        await self._called("take", wanted)
        for volume, name in wanted:
            self.taken[volume].append(FakeSnapshot(f"{self.name}/{volume}@{name}", name))

    async def delete_snapshots(self, wanted: Sequence[tuple[str, str]]) -> None:
        await self._called("delete", wanted)
        for volume, name in wanted:
            self.taken[volume] = [snapshot for snapshot in self.taken[volume] if snapshot.short_name != name]

    async def _called(self, what: str, wanted: Sequence[tuple[str, str]]) -> None:
        self.calls.append((what, list(wanted)))
        await trio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        if self.refusal is not None:
            raise self.refusal


class FakePools:
    def __init__(self, *pools: FakePool) -> None:
        self.known = {pool.name: SimpleNamespace(name=pool.name, pool=pool) for pool in pools}
        self.in_hand = 0

    def slots(self) -> list[Any]:
        return list(self.known.values())

    def slot(self, name: str) -> Any:
        return self.known[name]

    @contextmanager
    def using(self, name: str) -> Iterator[FakePool]:
        self.in_hand += 1
        try:
            yield self.known[name].pool
        finally:
            self.in_hand -= 1


class Scene:
    """A daemon's part: pools, the schedules in force, events, and a wall clock that follows trio's."""

    def __init__(self, home: Path, *pools: FakePool, **schedules: str) -> None:
        self.pools = FakePools(*pools)
        self.schedules: dict[str, Schedule] = {}
        self.define(**schedules)
        self.events = Events(home)
        self.ahead_s = 0.0

    def define(self, **schedules: str) -> None:
        self.schedules = {name: parse_schedule(text) for name, text in schedules.items()}

    def texts(self) -> list[str]:
        return [event.text for event in self.events.after(0)]

    def run(self, course: Callable[[], Awaitable[None]], through: Through | None = None) -> None:
        async def main() -> None:
            began_s = trio.current_time()

            def now_s() -> float:
                return START_S + trio.current_time() - began_s + self.ahead_s

            async with trio.open_nursery() as nursery:
                pools = cast(Any, self.pools)
                nursery.start_soon(
                    lambda: keep_schedules(pools, lambda: self.schedules, self.events, through, now_s=now_s)
                )
                await trio.sleep(0.5)
                await course()
                nursery.cancel_scope.cancel()

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
        assert self.pools.in_hand == 0


def fake(name: str, *volumes: str) -> FakePool:
    pool = FakePool(name)
    pool.add(*volumes)
    return pool


def test_volumes_of_a_pool_are_taken_as_one_group_for_each_kind(tmp_path: Path) -> None:
    pool = fake("p", "a", "b", "c")
    pool.add("c", policy="none")
    pool.add("d", policy="gold")
    scene = Scene(tmp_path, pool, default="hourly=24", gold="hourly=2 daily=7")

    async def course() -> None:
        assert pool.calls == [
            ("take", [(volume, "hourly-20261129T1200Z") for volume in ("a", "b", "d")]),
            ("take", [("d", "daily-20261129T1200Z")]),
        ]
        await trio.sleep(HOUR_S)
        assert pool.calls[2:] == [("take", [(volume, "hourly-20261129T1300Z") for volume in ("a", "b", "d")])]
        await trio.sleep(HOUR_S)
        assert pool.calls[4:] == [("delete", [("d", "hourly-20261129T1200Z")])]

    scene.run(course)


def test_a_new_volume_and_a_new_schedule_are_seen_at_once_and_an_idle_pool_is_looked_at_once_a_minute(
    tmp_path: Path,
) -> None:
    pool = fake("p", "a")
    scene = Scene(tmp_path, pool)

    async def course() -> None:
        await trio.sleep(HOUR_S)
        assert pool.looks == 0
        scene.define(default="daily=2")
        await trio.sleep(1)
        assert pool.names("a") == ["daily-20261129T1300Z"]
        pool.add("b")
        await trio.sleep(1)
        assert pool.names("b") == ["daily-20261129T1300Z"]
        before = pool.looks
        await trio.sleep(HOUR_S)
        assert 60 <= pool.looks - before <= 122
        assert len(pool.calls) == 2

    scene.run(course)


def test_a_full_pool_is_told_of_once_and_tried_each_minute_and_its_recovery_is_told(tmp_path: Path) -> None:
    pool = fake("p", "a", "b", "c", "d")
    pool.refusal = TierError(errno.ENOSPC, "the pool p is too full for a snapshot")
    scene = Scene(tmp_path, pool, default="hourly=24 daily=7")

    async def course() -> None:
        await trio.sleep(10 * 60)
        assert scene.texts() == [
            "pool p: hourly snapshots of a, b, c and 1 more can't be taken, which is tried again each minute: "
            "the pool p is too full for a snapshot"
        ]
        assert len(pool.calls) == 2 * 11
        pool.refusal = TierError(errno.EROFS, "the pool p is read-only")
        await trio.sleep(30 * 60)
        assert scene.texts()[1:] == [
            "pool p: hourly snapshots of a, b, c and 1 more can't be taken, which is tried again each minute: "
            "the pool p is read-only"
        ]
        pool.refusal = None
        await trio.sleep(60)
        assert scene.texts()[2:] == ["pool p: scheduled snapshots are taken again"]
        assert pool.names("a") == ["hourly-20261129T1241Z", "daily-20261129T1241Z"]

    scene.run(course)


def test_a_group_that_is_always_too_large_beside_one_that_fits_is_told_of_once(tmp_path: Path) -> None:
    pool = fake("p", "a", "b")
    pool.add("c", policy="often")
    scene = Scene(tmp_path, pool, default="hourly=24", often="5min=100")
    take = pool.take_snapshots

    async def only_small_ones(wanted: Sequence[tuple[str, str]]) -> None:
        if len(wanted) > 1:
            raise TierError(errno.ENOSPC, "too full")
        await take(wanted)

    pool.take_snapshots = only_small_ones  # type: ignore[method-assign]

    async def course() -> None:
        await trio.sleep(6 * HOUR_S)
        assert len(pool.names("c")) == 73
        assert len(scene.texts()) == 1

    scene.run(course)


def test_what_passes_is_no_event(tmp_path: Path) -> None:
    pool = fake("p", "a")
    pool.refusal = TierError(errno.EBUSY, "another snapshot of p/a is being taken: try again")
    scene = Scene(tmp_path, pool, default="hourly=24")

    async def course() -> None:
        await trio.sleep(60)
        pool.refusal = None
        await trio.sleep(60)
        assert pool.names("a") == ["hourly-20261129T1202Z"]
        assert scene.texts() == []

    scene.run(course)


def test_deletions_are_told_once_a_day_and_at_the_end(tmp_path: Path) -> None:
    pool = fake("p", "a", "b")
    scene = Scene(tmp_path, pool, default="hourly=2")

    async def course() -> None:
        await trio.sleep(2 * HOUR_S)
        assert scene.texts() == ["pool p: 2 expired snapshots were deleted (2 hourly)"]
        await trio.sleep(DAY_S + HOUR_S)
        assert scene.texts()[1:] == ["pool p: 48 expired snapshots were deleted (48 hourly)"]

    scene.run(course)
    assert scene.texts()[2:] == ["pool p: 2 expired snapshots were deleted (2 hourly)"]


def test_many_expired_ones_go_a_group_at_a_time_and_a_hold_that_comes_meanwhile_counts(tmp_path: Path) -> None:
    pool = fake("p", "a")
    names = [f"5min-20260101T{hour:02}{minute:02}Z" for hour in range(24) for minute in range(0, 60, 5)]
    pool.taken["a"] = [FakeSnapshot(f"p/a@{name}", name) for name in names]
    scene = Scene(tmp_path, pool, default="5min=10")
    delete = pool.delete_snapshots

    async def then_hold(wanted: Sequence[tuple[str, str]]) -> None:
        await delete(wanted)
        pool.taken["a"][0].held = True

    pool.delete_snapshots = then_hold  # type: ignore[method-assign]

    async def course() -> None:
        sizes = [len(wanted) for what, wanted in pool.calls if what == "delete"]
        assert (max(sizes), len(sizes)) == (64, 5)
        assert pool.names("a")[:1] == names[64:65]
        assert pool.names("a")[-10:] == [*names[-9:], "5min-20261129T1200Z"]
        assert len(pool.names("a")) == 10 + sum(snapshot.held for snapshot in pool.taken["a"])

    scene.run(course)


def test_a_volume_whose_policy_went_missing_loses_no_history(tmp_path: Path) -> None:
    pool = fake("p", "b")
    pool.add("a", missing=True)
    scene = Scene(tmp_path, pool, default="hourly=2")

    async def course() -> None:
        await trio.sleep(9 * HOUR_S)
        assert (len(pool.names("a")), len(pool.names("b"))) == (10, 2)
        pool.add("a")
        await trio.sleep(60)
        assert len(pool.names("a")) == 2

    scene.run(course)


def test_a_volume_that_is_being_filled_is_left_out_until_it_is_complete_and_then_taken_at_once(tmp_path: Path) -> None:
    pool = fake("p", "a")
    pool.add("new")
    pool.fakes["new"].filling = True
    pool.taken["new"] = [FakeSnapshot(f"p/new@{name}", name) for name in ("hourly-20261129T0900Z",) * 3]
    scene = Scene(tmp_path, pool, default="hourly=1")

    async def course() -> None:
        await trio.sleep(2 * HOUR_S)
        assert len(pool.names("a")) == 1 and "hourly-20261129T1400Z" in pool.names("a")
        assert pool.names("new") == ["hourly-20261129T0900Z"] * 3, "neither taken nor deleted"
        pool.fakes["new"].filling = False
        await trio.sleep(2)
        assert pool.names("new") == ["hourly-20261129T1400Z"]

    scene.run(course)


def test_a_pool_that_hangs_holds_no_other_up_and_ends_with_the_daemon(tmp_path: Path) -> None:
    stuck, sound = fake("p", "a"), fake("q", "a")
    scene = Scene(tmp_path, stuck, sound, default="hourly=3")

    async def course() -> None:
        await trio.sleep(3 * HOUR_S)
        assert len(sound.names("a")) == 3
        assert len(stuck.calls) == 1

    stuck.gate = trio.Event()
    scene.run(course)
    assert stuck.names("a") == []


def test_a_pool_that_closes_or_goes_is_left_alone_and_taken_up_again(tmp_path: Path) -> None:
    pool = fake("p", "a")
    scene = Scene(tmp_path, pool, default="hourly=9")

    async def course() -> None:
        scene.pools.known["p"].pool = None
        await trio.sleep(HOUR_S)
        scene.pools.known["p"].pool = pool
        await trio.sleep(1)
        assert pool.names("a") == ["hourly-20261129T1200Z", "hourly-20261129T1300Z"]
        del scene.pools.known["p"]
        await trio.sleep(HOUR_S)
        assert len(pool.calls) == 2

    scene.run(course)


def test_a_clock_that_jumps_takes_one_and_deletes_one(tmp_path: Path) -> None:
    pool = fake("p", "a")
    scene = Scene(tmp_path, pool, default="hourly=3")

    async def course() -> None:
        await trio.sleep(5 * HOUR_S)
        assert [name[-6:] for name in pool.names("a")] == ["T1500Z", "T1600Z", "T1700Z"]
        scene.ahead_s = 365 * DAY_S
        await trio.sleep(30)
        assert [name[-6:] for name in pool.names("a")] == ["T1600Z", "T1700Z", "T1700Z"]
        scene.ahead_s = 0
        await trio.sleep(HOUR_S / 2)
        assert [name[-6:] for name in pool.names("a")] == ["T1600Z", "T1700Z", "T1700Z"]
        await trio.sleep(HOUR_S / 2)
        assert [name[-6:] for name in pool.names("a")] == ["T1700Z", "T1700Z", "T1800Z"]

    scene.run(course)


# -- over the engine ---------------------------------------------------------------------------------------------------


def test_real_pools_are_kept_by_their_schedules(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "terrace.scheduler")
    config = parse_config('[policy.default]\nsnapshots = "hourly=2"\n[policy.scratch]\n', "t.toml")
    clock = {"now": START_S}
    events = Events(tmp_path)

    async def main() -> None:
        with trio.fail_after(60):
            opened = open_pools(tmp_path / "pools", PoolSettings(), policies=config.policies(), events=events.add)
            async with opened as pools, trio.open_nursery() as nursery:
                for name in ("p", "q"):
                    (tmp_path / name).mkdir()
                    pool = await pools.create(name, specs(tmp_path / name, fast_mib=64), force=False)
                    await pool.create_volume("a", 1 << 20)
                    await pool.create_volume("b", 1 << 20)
                    await pool.create_volume("c", 1 << 20, "scratch")
                    await pool.take_snapshots([("a", "mine")])

                async def until(count: int) -> None:
                    while sum(len(pools.pool(name).snapshots()) for name in ("p", "q")) != count:
                        await trio.sleep(0.01)
                    await trio.sleep(1.1)
                    assert sum(len(pools.pool(name).snapshots()) for name in ("p", "q")) == count

                schedules = config.schedules()
                nursery.start_soon(lambda: keep_schedules(pools, lambda: schedules, events, now_s=lambda: clock["now"]))
                await until(2 + 4)
                clock["now"] += HOUR_S
                await until(2 + 8)
                await pools.pool("p").change_snapshot("b", "hourly-20261129T1200Z", held=True)
                clock["now"] += 3 * HOUR_S
                await until(2 + 8 + 1)
                for name in ("p", "q"):
                    found = [snapshot.short_name for snapshot in pools.pool(name).snapshots("a")]
                    assert found == ["mine", "hourly-20261129T1300Z", "hourly-20261129T1600Z"]
                assert len({snapshot.created_at for snapshot in pools.pool("q").snapshots()}) == 3
                nursery.cancel_scope.cancel()

    (tmp_path / "pools").mkdir()
    trio.run(main)
    assert "pool q: took hourly-20261129T1300Z of a, b" in caplog.messages
    assert "pool q: deleted the expired a@hourly-20261129T1200Z, b@hourly-20261129T1200Z" in caplog.messages
    told = [event.text for event in events.after(0) if event.kind == "snapshot"]
    assert sorted(told) == [
        "pool p: 1 expired snapshot was deleted (1 hourly)",
        "pool q: 2 expired snapshots were deleted (2 hourly)",
    ]


class Mirrored(Direct):
    """Volumes in `mirrored` have another leg, with `there`; those in `others` are served by another node."""

    def __init__(self, mirrored: Sequence[str] = (), others: Sequence[str] = ()) -> None:
        self.there: dict[str, list[FakeSnapshot]] = {name: [] for name in mirrored}
        self.others = others
        self.is_away = False

    def is_mine(self, volume: Any) -> bool:
        return volume.short_name not in self.others

    async def take(self, pool: Any, wanted: Sequence[tuple[str, str]], **how: bool) -> dict[str, dict[str, str]]:
        await pool.take_snapshots(wanted)
        for volume, name in wanted:
            if volume in self.there and not self.is_away:
                self.there[volume].append(FakeSnapshot(f"{pool.name}/{volume}@{name}", name))
        return {volume: {"b": "it is Stale"} for volume in self.there if self.is_away}

    async def delete(self, pool: Any, wanted: Sequence[tuple[str, str]], **how: bool) -> list[str]:
        assert how == {"remember": False}
        await pool.delete_snapshots(wanted)
        if not self.is_away:
            for volume, name in wanted:
                self.there[volume] = [one for one in self.there.get(volume, []) if one.short_name != name]
        return []

    async def elsewhere(self, pool: Any, volume: str) -> dict[str, list[FakeSnapshot]]:
        await trio.lowlevel.checkpoint()
        return {"legb": self.there[volume]} if volume in self.there and not self.is_away else {}

    async def expire(self, pool: Any, volume: str, leg: str, names: Sequence[str]) -> None:
        await trio.lowlevel.checkpoint()
        self.there[volume] = [one for one in self.there[volume] if one.short_name not in names]


def test_the_schedule_of_a_node_that_isnt_primary_takes_and_deletes_nothing(tmp_path: Path) -> None:
    pool = fake("p", "leg", "own")
    names = [f"hourly-20261129T{hour:02}00Z" for hour in range(9)]
    pool.taken["leg"] = [FakeSnapshot(f"p/leg@{name}", name) for name in names]
    before = list(pool.taken["leg"])
    scene = Scene(tmp_path, pool, default="hourly=2")

    async def course() -> None:
        await trio.sleep(3 * HOUR_S)

    scene.run(course, Mirrored(others=["leg"]))
    assert pool.taken["leg"] == before and len(pool.taken["own"]) == 2


def test_a_leg_that_was_away_doesnt_keep_expired_snapshots_for_ever(tmp_path: Path) -> None:
    pool = fake("p", "v")
    scene, mirrored = Scene(tmp_path, pool, default="hourly=4"), Mirrored(mirrored=["v"])

    async def course() -> None:
        await trio.sleep(6 * HOUR_S)
        assert [one.short_name for one in mirrored.there["v"]] == pool.names("v")
        mirrored.is_away = True
        await trio.sleep(3 * HOUR_S)
        left = [one.short_name for one in mirrored.there["v"]]
        assert len(left) == 4 and left != pool.names("v")
        mirrored.is_away = False
        for _ in range(8):
            await trio.sleep(HOUR_S)
            assert len(mirrored.there["v"]) <= 4
        assert [one.short_name for one in mirrored.there["v"]] == pool.names("v")

    scene.run(course, mirrored)
