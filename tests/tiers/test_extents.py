"""Extents: the truth about what is mapped, merged, bounded, and cheap for terabytes of nothing."""

import itertools
import random
import time
from pathlib import Path

import pytest

from tests.tiers.helpers import block, fresh_pool, run
from tiers import Volume
from tiers.extents import EXTENT_HOLE, EXTENT_ZERO
from tiers.layout import BLOCK_BYTES, MIB

HOLE = EXTENT_HOLE | EXTENT_ZERO
ANY = 1 << 20


def brute_force(mapped: set[int], offset: int, length: int, limit: int) -> list[tuple[int, int]]:
    """Extents, byte by block boundary, from a set of mapped blocks."""
    result: list[tuple[int, int]] = []
    at, end = offset, offset + length
    while at < end:
        stop = min(end, (at // BLOCK_BYTES + 1) * BLOCK_BYTES)
        flags = 0 if at // BLOCK_BYTES in mapped else HOLE
        if result and result[-1][1] == flags:
            result[-1] = (result[-1][0] + stop - at, flags)
        elif len(result) == limit:
            break
        else:
            result.append((stop - at, flags))
        at = stop
    return result


def assert_honest(found: list[tuple[int, int]], expected: list[tuple[int, int]], length: int, limit: int) -> None:
    """The contract: a prefix of the truth, at least one, at most `limit`, never past the range, neighbours differ."""
    assert 1 <= len(found) <= limit
    assert all(size > 0 for size, _ in found)
    assert sum(size for size, _ in found) <= length
    assert all(before[1] != after[1] for before, after in itertools.pairwise(found))
    assert found[:-1] == expected[: len(found) - 1]
    assert found[-1][1] == expected[len(found) - 1][1]
    assert found[-1][0] <= expected[len(found) - 1][0]


async def everything(volume: Volume, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
    """Ask until the range is covered, as a client does; merge what meets."""
    result: list[tuple[int, int]] = []
    end = offset + length
    while offset < end:
        for size, flags in await volume.extents(offset, end - offset, limit):
            offset += size
            if result and result[-1][1] == flags:
                result[-1] = (result[-1][0] + size, flags)
            else:
                result.append((size, flags))
    assert offset == end
    return result


@pytest.mark.parametrize("size", [6 * MIB, 5 << 40], ids=["small", "huge"])
@pytest.mark.parametrize("checkpoints", [False, True], ids=["in the overlay", "mixed with pages"])
def test_extents_are_what_brute_force_finds(tmp_path: Path, size: int, checkpoints: bool) -> None:
    async def body() -> None:
        rng = random.Random(5)
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", size)
            mapped: set[int] = set()
            blocks = 6 * MIB // BLOCK_BYTES
            for step in range(60):
                first = rng.randrange(blocks)
                count = min(rng.choice([1, 2, 20, 300, 700]), blocks - first)
                if rng.random() < 0.6:
                    await volume.write(first * BLOCK_BYTES, block(step) * count)
                    mapped |= set(range(first, first + count))
                else:
                    await volume.trim(first * BLOCK_BYTES, count * BLOCK_BYTES)
                    mapped -= set(range(first, first + count))
                if checkpoints and step % 9 == 0:
                    await pool.checkpoint()
                offset = rng.randrange(6 * MIB - 1)
                length = rng.randrange(1, 6 * MIB - offset)
                if step % 5 == 0:
                    offset, length = 0, 6 * MIB
                limit = rng.choice([1, 2, 3, 1000])
                expected = brute_force(mapped, offset, length, ANY)
                assert_honest(await volume.extents(offset, length, limit), expected, length, limit)
                assert await everything(volume, offset, length, limit) == expected

    run(body)


def test_an_empty_petabyte_is_one_extent_at_once(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 1 << 50)
            begun = time.thread_time()
            assert await volume.extents(0, 1 << 50, 1) == [(1 << 50, HOLE)]
            assert await volume.extents(12345, 1 << 45, 7) == [(1 << 45, HOLE)]
            assert time.thread_time() - begun < 0.05

    run(body)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["in the overlay", "in pages"])
def test_a_sparse_volume_costs_by_what_it_holds_not_by_its_size(tmp_path: Path, checkpoint: bool) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 10 << 40)
            places = [0, 1, 700, 1 << 16, 1 << 24, (1 << 24) + 3, (10 << 28) - 1]
            for place in places:
                await volume.write(place * BLOCK_BYTES, block(place))
            if checkpoint:
                await pool.checkpoint()
                volume.tree.forget()
            begun = time.thread_time()
            found = await everything(volume, 0, 10 << 40, ANY)
            assert time.thread_time() - begun < 0.5
            expected: list[tuple[int, int]] = [(2 * BLOCK_BYTES, 0)]
            for before, place in itertools.pairwise(places[1:]):
                expected += [((place - before - 1) * BLOCK_BYTES, HOLE), (BLOCK_BYTES, 0)]
            assert found == expected

    run(body)


def test_many_scattered_blocks_are_described_without_looking_at_each_for_each(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=256) as pool:
            volume = await pool.create_volume("v", 10 << 40)
            for start in range(0, 6000, 100):
                assert volume.write_now([(number << 30, b"x" * BLOCK_BYTES) for number in range(start, start + 100)])
            begun = time.thread_time()
            found = await everything(volume, 0, 6000 << 30, ANY)
            assert time.thread_time() - begun < 2
            assert len(found) == 12000

    run(body)


def test_requests_of_32_bits_over_blocks_that_no_page_tells_of_cost_by_what_is_there(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=1024) as pool:
            volume = await pool.create_volume("v", 10 << 40)
            rng = random.Random(3)
            for _ in range(100):
                places = [rng.randrange(10 << 28) * BLOCK_BYTES for _ in range(100)]
                assert volume.write_now([(place, b"x" * BLOCK_BYTES) for place in places])
            begun = time.thread_time()
            for offset in range(0, 10 << 40, 4 << 30):
                await volume.extents(offset, (4 << 30) - 1, 1)
            assert time.thread_time() - begun < 2, "sorting all of them for each request takes 4 s, this 0.06"

    run(body)


def test_a_trim_of_all_is_described_at_once_although_pages_still_tell_of_what_was(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=256) as pool:
            volume = await pool.create_volume("v", 10 << 40)
            for start in range(0, 3000, 100):
                assert volume.write_now([(number << 30, b"x" * BLOCK_BYTES) for number in range(start, start + 100)])
            await pool.checkpoint()
            volume.tree.forget()
            assert volume.trim_now([(0, 10 << 40)])
            await volume.write(7 << 30, block(1))
            assert await volume.extents(0, 10 << 40, ANY) == [
                (7 << 30, HOLE),
                (BLOCK_BYTES, 0),
                ((10 << 40) - (7 << 30) - BLOCK_BYTES, HOLE),
            ]
            assert len(volume.tree._young) < 200, "of 3,000 leaves"

    run(body)


def test_zeros_that_stay_allocated_are_data_and_zeros_that_do_not_are_holes(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", MIB)
            await volume.write(0, block(1) * 16)
            await volume.write_zeroes(0, 4 * BLOCK_BYTES, no_hole=True)
            await volume.write_zeroes(4 * BLOCK_BYTES, 4 * BLOCK_BYTES, no_hole=False)
            await volume.write(8 * BLOCK_BYTES, bytes(4 * BLOCK_BYTES))
            assert await volume.extents(0, MIB, ANY) == [
                (4 * BLOCK_BYTES, 0),
                (8 * BLOCK_BYTES, HOLE),
                (4 * BLOCK_BYTES, 0),
                (MIB - 16 * BLOCK_BYTES, HOLE),
            ]

    run(body)


def test_the_last_partial_block_of_a_volume_is_described_to_its_last_byte(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 8192 + 512)
            assert await volume.extents(0, 8704, ANY) == [(8704, HOLE)]
            await volume.write(8192, b"y" * 512)
            assert await volume.extents(0, 8704, ANY) == [(8192, HOLE), (512, 0)]
            assert await volume.extents(8703, 1, ANY) == [(1, 0)]
            assert await volume.extents(8191, 2, ANY) == [(1, HOLE), (1, 0)]
            await volume.trim(8192, 512)
            assert await volume.extents(0, 8704, 1) == [(8704, HOLE)]

    run(body)
