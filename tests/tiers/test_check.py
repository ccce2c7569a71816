"""The check: each kind of planted damage is seen and named, and costs nobody more than it must."""

import contextlib
import errno
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio

from tests.tiers.helpers import QUIET, assert_sound, block, flip, fresh_pool, make_pool, read, refusal, run
from tiers import Pool, Volume, check, checkpoint, maptree
from tiers.layout import BAD, BLOCK_BYTES, MIB, SLOT_MASK
from tiers.mover import put_moved
from tiers.record import Op, encode_segment_header
from tiers.segments import Segment
from tiers.snapshot import Snapshot

BLOCKS = 300
ONE = "id = (SELECT id FROM segments WHERE kind = 1 AND live > 10 LIMIT 1)"


async def filled(pool: Pool, name: str = "v") -> Volume:
    """A volume of 300 blocks in a row, in pages."""
    volume = await pool.create_volume(name, 4 * MIB)
    await volume.write(0, b"".join(block(i) for i in range(BLOCKS)))
    await pool.checkpoint()
    return volume


async def place_of(volume: Volume, index: int) -> tuple[Path, int]:
    """Where a block of a volume lies: device and offset."""
    (address,), _ = await volume.entries(index, 1)
    segment = volume._engine.segments.by_id[address >> 24]
    return Path(segment.device.path), segment.offset(address & SLOT_MASK)


async def place_of_page(volume: Volume | Snapshot, level: int, index: int) -> tuple[Path, int]:
    """Where a map page lies."""
    if level < 4:
        await volume.tree.load(level + 1, [index >> 8])
    entry = volume.tree.entry_of_page_now(level, index)
    assert entry is not None
    segment = volume._engine.segments.by_id[entry[0] >> 24]
    return Path(segment.device.path), segment.offset(entry[0] & SLOT_MASK)


def sqlite(home: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(home / "catalog.sqlite")) as db, db:
        assert db.execute(statement).rowcount > 0


def test_a_sound_pool_has_no_problems_and_the_report_counts_what_was_looked_at(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, base_mib=64) as pool:
            empty = await pool.check(True)
            assert (empty.ok, empty.problems, empty.volumes, empty.blocks_mapped) == (True, [], 0, 0)
            await filled(pool)
            await filled(pool, "w")
            seen: list[tuple[int, int]] = []
            report = await pool.check(True, lambda done, total: seen.append((done, total)))
            assert (report.ok, report.problems, report.volumes) == (True, [], 2)
            assert report.blocks_mapped == 2 * BLOCKS
            assert report.bytes_checked == 2 * BLOCKS * BLOCK_BYTES
            assert report.pages_checked == 2 * (2 + 4)
            assert seen == sorted(seen)
            assert seen[-1][0] == seen[-1][1] > 0
            sample = await pool.check(False)
            assert sample.ok
            assert 0 < sample.bytes_checked < report.bytes_checked

    run(body)


@pytest.mark.parametrize("reopened", [False, True], ids=["in the page cache", "after reopening"])
def test_a_flipped_bit_of_data_costs_exactly_its_block_and_is_named_by_volume_and_offset(
    tmp_path: Path, reopened: bool
) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await filled(pool)
            await filled(pool, "other")
            device, offset = await place_of(volume, 123)
            if not reopened:
                flip(device, offset + 1000)
                await damaged(pool, device, offset)
        if reopened:
            flip(device, offset + 1000)
            async with Pool.open(home, settings=QUIET) as pool:
                await damaged(pool, device, offset)

    async def damaged(pool: Pool, device: Path, offset: int) -> None:
        volume = pool.volume("v")
        for length, start in ((BLOCK_BYTES, 123 * BLOCK_BYTES), (1, 123 * BLOCK_BYTES + 7), (BLOCKS * BLOCK_BYTES, 0)):
            error = await refusal(lambda start=start, length=length: read(volume, start, length))
            assert error.errno == errno.EIO
            assert f"p/v at byte {123 * BLOCK_BYTES}" in str(error)
        for index in range(BLOCKS):
            if index != 123:
                assert await read(volume, index * BLOCK_BYTES, BLOCK_BYTES) == block(index)
        assert not volume.read_now(123 * BLOCK_BYTES, BLOCK_BYTES, memoryview(bytearray(BLOCK_BYTES)))
        report = await pool.check(True)
        assert not report.ok
        assert report.problems == [
            f"p/v at byte {123 * BLOCK_BYTES}: the block on {device} at {offset} fails its checksum"
        ]
        assert pool.status().devices[0].errors == 1, "one damaged block, met many times"
        await volume.write(123 * BLOCK_BYTES, block(999))
        assert await read(volume, 123 * BLOCK_BYTES, BLOCK_BYTES) == block(999)
        await assert_sound(pool)

    run(body)


def test_a_partial_write_into_a_damaged_block_is_refused_and_does_not_launder_it(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            device, offset = await place_of(volume, 5)
            flip(device, offset)
            error = await refusal(lambda: volume.write(5 * BLOCK_BYTES + 10, b"part"))
            assert error.errno == errno.EIO
            assert (await refusal(lambda: read(volume, 5 * BLOCK_BYTES, 1))).errno == errno.EIO
            assert await read(volume, 6 * BLOCK_BYTES, BLOCK_BYTES) == block(6)

    run(body)


def test_blocks_that_were_swapped_on_the_device_are_seen(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            places = [await place_of(volume, index) for index in (10, 200)]
            with places[0][0].open("r+b") as file:
                for (_, offset), index in zip(places, (200, 10), strict=True):
                    file.seek(offset)
                    file.write(block(index))
            report = await pool.check(True)
            assert [problem.split(":")[0] for problem in report.problems] == [
                f"p/v at byte {10 * BLOCK_BYTES}",
                f"p/v at byte {200 * BLOCK_BYTES}",
            ]

    run(body)


@pytest.mark.parametrize("level", [0, 1, 2, 3, 4])
def test_a_flipped_bit_of_a_map_page_is_named_and_stays_within_its_volume(tmp_path: Path, level: int) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await filled(pool)
            await filled(pool, "other")
            device, offset = await place_of_page(volume, level, 0)
        flip(device, offset + 9)
        async with Pool.open(home, settings=QUIET) as pool:
            error = await refusal(lambda: read(pool.volume("v"), 0, BLOCK_BYTES))
            assert error.errno == errno.EIO
            assert f"{device} at {offset}" in str(error)
            assert await read(pool.volume("other"), 0, BLOCK_BYTES) == block(0)
            if level == 0:
                assert await read(pool.volume("v"), 256 * BLOCK_BYTES, BLOCK_BYTES) == block(256)
            report = await pool.check(True)
            assert not report.ok
            assert any(
                f"p/v, level {level}" in problem and f"{device} at {offset}" in problem for problem in report.problems
            )
            assert not any("p/other" in problem for problem in report.problems)

    run(body)


def test_a_wrong_live_count_is_reported(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            await filled(pool)
        sqlite(home, f"UPDATE segments SET live = live + 3 WHERE {ONE}")
        async with Pool.open(home, settings=QUIET) as pool:
            report = await pool.check(False)
            assert len(report.problems) == 1
            assert "are counted as live" in report.problems[0]

    run(body)


def test_a_wrong_count_of_mapped_blocks_is_reported(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            await filled(pool)
        sqlite(home, "UPDATE volumes SET mapped_blocks = mapped_blocks - 1")
        async with Pool.open(home, settings=QUIET) as pool:
            report = await pool.check(False)
            assert report.problems == [f"p/v: the catalog counts {BLOCKS - 1} mapped blocks, its map has {BLOCKS}"]

    run(body)


def test_two_segments_in_one_place_are_reported(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            await filled(pool)
        sqlite(
            home,
            "INSERT INTO segments SELECT id + 100000, device, idx, kind, 0, used, live, last_seq, blocks FROM segments",
        )
        async with Pool.open(home, settings=QUIET) as pool:
            report = await pool.check(False)
            assert any("two segments claim place" in problem for problem in report.problems)

    run(body)


def test_two_entries_that_share_a_place_are_reported(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            (address,), (check,) = await volume.entries(0, 1)
            volume.active.points[700] = (address, check)
            volume._engine.segments.add_pending(address, 1)
            volume._engine.space.active_weight += 1
            await volume.write(800 * BLOCK_BYTES, block(1))
            report = await pool.check(False)
            assert any("two map entries share a place" in problem for problem in report.problems)

    run(body)


def test_an_entry_past_what_was_written_is_reported(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            await filled(pool)
        sqlite(home, f"UPDATE segments SET used = 5 WHERE {ONE}")
        async with Pool.open(home, settings=QUIET) as pool:
            report = await pool.check(False)
            assert any("past what was written" in problem for problem in report.problems)

    run(body)


def test_the_check_runs_while_clients_write(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            done = False

            async def client() -> None:
                index = 0
                while not done:
                    await volume.write(index % BLOCKS * BLOCK_BYTES, block(index))
                    index += 1
                    await trio.lowlevel.checkpoint()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(client)
                for _ in range(5):
                    report = await pool.check(True)
                    assert report.problems == []
                done = True

    run(body)


def test_a_segment_that_the_catalog_forgot_is_reported_and_its_readers_get_eio(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await filled(pool)
            (address,), _ = await volume.entries(0, 1)
        sqlite(home, f"DELETE FROM segments WHERE id = {address >> 24}")
        async with Pool.open(home, settings=QUIET) as pool:
            report = await pool.check(False)
            assert not report.ok
            assert any(f"segment {address >> 24}, which is not in use" in problem for problem in report.problems)
            error = await refusal(lambda: read(pool.volume("v"), 0, BLOCK_BYTES))
            assert error.errno == errno.EIO

    run(body)


@contextlib.contextmanager
def during_the_walk(act: Callable[[], Awaitable[None]]) -> Iterator[None]:
    """Do something each time before the check reads map pages."""

    async def read_pages(*args: Any) -> Any:
        await act()
        return await maptree.read_pages(*args)

    with mock.patch.object(check, "read_pages", read_pages):
        yield


def test_checkpoints_go_on_and_map_segments_are_emptied_while_the_map_is_walked(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            await filled(pool, "w")
            acts = 0

            async def overwrite() -> None:
                nonlocal acts
                for _ in range(30):
                    await volume.write(acts % BLOCKS * BLOCK_BYTES, block(1000 + acts))
                    await pool.checkpoint()
                    acts += 1

            before = pool.status().checkpoints
            with during_the_walk(overwrite):
                report = await pool.check(True)
            assert (report.problems, report.blocks_mapped) == ([], 2 * BLOCKS)
            assert pool.status().checkpoints - before >= acts > 100
            assert not any(segment.pins for segment in pool._engine.segments.by_id.values())

    run(body)


def test_a_walk_gives_way_to_writers_who_need_its_space_twice_and_then_holds_checkpoints_off(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            space = pool._engine.space
            walks: list[bool] = []

            async def press() -> None:
                space.waiters = 0
                free = not pool._checkpointer._lock.locked()
                walks.append(free)
                if free:
                    await empty_map_segments()
                space.short, space.waiters = True, 1

            async def empty_map_segments() -> None:
                for i in range(60):
                    await volume.write(i % 2 * 299 * BLOCK_BYTES, block(len(walks) * 1000 + i))
                    await pool.checkpoint()

            with during_the_walk(press):
                report = await pool.check(False)
            space.waiters = 0
            assert walks[:3] == [True, True, False]
            assert not any(walks[2:])
            assert (report.problems, report.volumes, report.blocks_mapped) == ([], 1, BLOCKS)
            await pool.checkpoint()
            assert not any(segment.pins for segment in pool._engine.segments.by_id.values())

    run(body)


@pytest.mark.parametrize("bitmap_bytes", [16, 100, 4096])
def test_a_pool_too_large_for_the_bitmap_is_walked_in_parts(tmp_path: Path, bitmap_bytes: int) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            await filled(pool, "w")
            whole = await pool.check(True)
            with mock.patch.object(check, "BITMAP_BYTES", bitmap_bytes):
                assert await pool.check(True) == whole
                (address,), (block_check,) = await volume.entries(299, 1)
                volume.active.points[700] = (address, block_check)
                volume._engine.segments.add_pending(address, 1)
                volume._engine.space.active_weight += 1
                await volume.write(800 * BLOCK_BYTES, block(1))
                report = await pool.check(False)
            assert report.problems == [f"p/v: two map entries share a place in segment {address >> 24}"]

    run(body)


async def sealed_place(pool: Pool, volume: Volume) -> tuple[Segment, Path]:
    """A sealed log segment with live blocks, and its device."""
    while True:
        await volume.write(0, b"".join(block(i) for i in range(200)))
        await pool.checkpoint()
        (address,), _ = await volume.entries(0, 1)
        segment = volume._engine.segments.by_id[address >> 24]
        if not segment.open:
            return segment, Path(segment.device.path)


def test_a_damaged_batch_header_is_named_by_the_full_check_and_only_where_data_depends_on_it(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            segment, device = await sealed_place(pool, await pool.create_volume("v", 4 * MIB))
            await assert_sound(pool)
            flip(device, segment.offset(1) + 40)
            report = await pool.check(True)
            assert report.problems == [
                f"{device} at {segment.offset(1)}: the batch header fails its check; segment {segment.id} has a "
                "damaged header and can't be cleaned"
            ]
            await pool.volume("v").trim(0, 4 * MIB)
            await pool.checkpoint()
            await assert_sound(pool)

    run(body)


def test_a_segment_that_cannot_be_cleaned_is_told_while_it_holds_anything_and_not_while_that_is_given_back(
    tmp_path: Path,
) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            segment, device = await sealed_place(pool, await pool.create_volume("v", 4 * MIB))
            segment.damaged = True  # as the cleaner finds where another one's first batch lies since a crash
            report = await pool.check(False)
            assert report.problems == [
                f"{device} at {segment.base}: segment {segment.id} has a damaged header and can't be cleaned"
            ]
            with mock.patch.object(checkpoint, "DEAD_PAGES_A_CHECKPOINT", 0):
                await pool.volume("v").trim(0, 4 * MIB)
                await pool.checkpoint()
                assert segment.live, "what was trimmed counts until its pages are walked"
                assert (await pool.check(False)).problems == []
            await pool.checkpoint()
            assert segment.id not in pool._engine.segments.by_id

    run(body)


def test_a_segment_header_that_is_damaged_or_newer_than_the_catalog_is_named(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            segment, device = await sealed_place(pool, await pool.create_volume("v", 4 * MIB))
            flip(device, segment.base + 48)
            report = await pool.check(False)
            where = f"{device} at {segment.base}: the header of segment {segment.id}"
            assert report.problems == [f"{where}: the segment header fails its check"]
            flip(device, segment.base + 48)
            await assert_sound(pool)
            engine = pool._engine
            newer = encode_segment_header(
                segment.kind, 0, engine.pool_uuid, segment.id, segment.index, 1, engine.log.checkpoint_seq + 1000, 0
            )
            with device.open("r+b") as file:
                file.seek(segment.base)
                file.write(newer)
            report = await pool.check(False)
            assert len(report.problems) == 1
            assert f"{where}: it was written after checkpoint" in report.problems[0]
            assert "put the newest catalog back" in report.problems[0]

    run(body)


def test_a_map_page_with_nothing_but_bad_blocks_is_checked_like_any_other(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", MIB)
            await volume.write(5 * BLOCK_BYTES, block(1))
            await pool.checkpoint()
            engine = pool._engine
            engine.append_record(Op.BAD, volume.id, 5, 1)
            put_moved(engine, [(volume, 5, BAD, 0)])
            report = await pool.check(True)
            assert report.blocks_mapped == 0, "what is lost takes no space"
            assert report.problems == ["p/v at byte 20480: the block was lost to a device error"]

    run(body)


def test_a_catalog_that_counts_too_few_live_blocks_fails_the_checkpoint_and_not_the_daemon(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            await filled(pool)
        sqlite(home, f"UPDATE segments SET live = 1 WHERE {ONE}")
        async with Pool.open(home, settings=QUIET) as pool:
            volume = pool.volume("v")
            await volume.trim(0, BLOCKS * BLOCK_BYTES)
            error = await refusal(pool.checkpoint)
            assert error.errno == errno.EIO
            assert "counts 1 live blocks" in str(error) and "terrace pool check" in str(error)
            assert await read(volume, 0, 2 * BLOCK_BYTES) == bytes(2 * BLOCK_BYTES)

    run(body)
