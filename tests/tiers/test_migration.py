"""Windows and rates of migration: when a volume's blocks may move, and how much a second."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import trio
import trio.testing

from tiers.migration import Migration
from tiers.policy import MIN_RATE_BYTES, Policy

NOON = time.mktime((2026, 5, 4, 12, 0, 0, 0, 0, -1))


def volume_of(**fields: Any) -> Any:
    return SimpleNamespace(id=1, policy=Policy("p", **fields))


def test_outside_its_window_nothing_moves() -> None:
    volume = volume_of(migration_window=(22 * 60, 6 * 60))
    for hour, expected in ((12, False), (21, False), (22, True), (2, True), (6, False)):
        moment = NOON + (hour - 12) * 3600
        assert Migration(lambda moment=moment: moment).allows(volume, 4096) is expected  # type: ignore[misc]


def test_without_a_rate_anything_may_move() -> None:
    migration = Migration(lambda: NOON)
    assert all(migration.allows(volume_of(), 1 << 30) for _ in range(5))


def test_a_rate_holds_on_average_and_a_change_takes_effect_at_once() -> None:
    rate = 16 * MIN_RATE_BYTES

    async def moved_in(migration: Migration, volume: Any, seconds: float) -> int:
        moved = 0
        end = trio.current_time() + seconds
        while trio.current_time() < end:
            if migration.allows(volume, 64 << 10):
                moved += 64 << 10
            await trio.sleep(0.01)
        return moved

    async def main() -> None:
        migration = Migration(lambda: NOON)
        volume = volume_of(migration_rate_bytes=rate)
        first = await moved_in(migration, volume, 20)
        assert 20 * rate <= first <= 21.2 * rate  # a second's worth was saved up
        volume.policy = Policy("q", migration_rate_bytes=4 * rate)
        assert 0.9 * 80 * rate <= await moved_in(migration, volume, 20) <= 1.1 * 84 * rate
        volume.policy = Policy("r")
        assert migration.allows(volume, 1 << 40)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_more_than_a_burst_is_debt_that_is_waited_for() -> None:
    async def main() -> None:
        migration = Migration(lambda: NOON)
        volume = volume_of(migration_rate_bytes=MIN_RATE_BYTES)
        assert migration.allows(volume, 10 * MIN_RATE_BYTES)
        await trio.sleep(9)
        assert not migration.allows(volume, 4096)
        await trio.sleep(1.5)
        assert migration.allows(volume, 4096)
        migration.forget(1)
        assert migration.allows(volume, MIN_RATE_BYTES)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
