"""Trims of what snapshots keep, in pools with little room: no checkpoint fails for the map pages that they take."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Awaitable, Callable

import pytest

from tests.simulation.machine import Disk, Machine
from tests.tiers.test_snapshots import write
from tiers import Pool, PoolSettings, TierError, Volume
from tiers.failpoint import watching
from tiers.layout import BLOCK_BYTES
from tiers.maptree import FANOUT
from tiers.merge import PAGES_A_LEAF, STEP_PAGES, Merger

LEAVES = 600
LEAF_BYTES = FANOUT * BLOCK_BYTES
SEGMENTS = range(80, 125, 5)


def in_a_pool(segments: int, body: Callable[[Pool, Volume], Awaitable[None]]) -> None:
    """A pool with a volume that has one block in each of many leaves."""
    settings = PoolSettings(
        overlay_entries=1 << 16, unsynced_cap_bytes=64 << 20, small_volume_leaves=0, checkpoint_interval_s=3600.0
    )
    machine = Machine((Disk("fast", segments),), seed=1, settings=settings)

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", LEAVES * LEAF_BYTES)
            for leaf in range(LEAVES):
                await write(volume, leaf * FANOUT, leaf + 1)
            await pool.checkpoint()
            try:
                await pool.take_snapshots([("v", "s")])
            except TierError as error:
                assert error.errno == errno.ENOSPC
            else:
                await body(pool, volume)

    machine.run(main)
    assert not machine.goes_in_circles


@pytest.mark.parametrize("segments", SEGMENTS)
def test_a_clone_with_snapshots_is_zeroed_or_there_is_no_room_for_it(segments: int) -> None:
    async def main(pool: Pool, volume: Volume) -> None:
        clone = await pool.clone("v", "s", "c")
        with contextlib.suppress(TierError):
            await pool.take_snapshots([("c", "t")])
        try:
            await clone.write_zeroes(0, clone.size_bytes, no_hole=False)
        except TierError as error:
            assert error.errno == errno.ENOSPC
        for _number in range(3):
            await pool.checkpoint()

    in_a_pool(segments, main)


@pytest.mark.parametrize("segments", SEGMENTS)
def test_trims_that_come_together_wait_for_room_as_one_does(segments: int) -> None:
    async def main(pool: Pool, volume: Volume) -> None:
        clone = await pool.clone("v", "s", "c")
        with contextlib.suppress(TierError):
            await pool.take_snapshots([("c", "t")])
        length = 15 * LEAF_BYTES
        ranges = [(at, length) for at in range(0, clone.size_bytes, length + LEAF_BYTES)]
        if not clone.trim_now(ranges):
            for offset, length in ranges:
                await clone.trim(offset, length)
        # What gives room has room itself.
        await pool.create_volume("other", LEAF_BYTES)
        await pool.delete_volume("other")
        for _number in range(3):
            await pool.checkpoint()

    in_a_pool(segments, main)


def test_a_trim_of_what_is_trimmed_already_takes_no_pages() -> None:
    async def main(pool: Pool, volume: Volume) -> None:
        clone = await pool.clone("v", "s", "c")
        for number in range(3):
            before = pool._checkpointer.writer.written_pages
            await clone.trim(0, clone.size_bytes)
            await pool.checkpoint()
            written = pool._checkpointer.writer.written_pages - before
            assert (written > LEAVES) if number == 0 else (written == 0)

    in_a_pool(200, main)


def test_the_oldest_snapshot_goes_however_little_room_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(pool: Pool, volume: Volume) -> None:
        await write(volume, 0, 1000)
        await pool.take_snapshots([("v", "t")])
        monkeypatch.setattr(Merger, "_leaves_that_fit", lambda merger: -1)
        await pool.delete_snapshot("v", "s")
        assert len(volume.snapshots) == 1

    in_a_pool(200, main)


def test_what_a_clones_snapshots_take_over_takes_no_more_pages_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    most = 30

    async def main(pool: Pool, volume: Volume) -> None:
        origin = await pool.create_volume("w", 16 * LEAF_BYTES)
        for leaf in range(16):
            await write(origin, leaf * FANOUT, leaf + 1, 20)
        await pool.take_snapshots([("w", "s")])
        clone = await pool.clone("w", "s", "c")
        for number in range(20):
            await pool.take_snapshots([("c", f"t{number}")])
            for leaf in range(16):
                await write(clone, leaf * FANOUT + number, 1)
        await pool.checkpoint()
        monkeypatch.setattr(Merger, "_leaves_that_fit", lambda merger: most)
        written: list[int] = []
        absorbed: list[int] = []
        writer = pool._checkpointer.writer

        def on(name: str) -> None:
            if name == "checkpoint.frozen":
                written.append(writer.written_pages)
            elif name == "checkpoint.absorbed":
                absorbed.append(writer.written_pages - written[-1])
                written.append(writer.written_pages)

        with watching(on):
            await pool.delete_volume("w", snapshots=True)
            for _number in range(20):
                await pool.checkpoint()
        assert clone.origin is None
        assert max(absorbed) <= most * PAGES_A_LEAF + STEP_PAGES

    in_a_pool(400, main)
