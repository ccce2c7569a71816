"""Space: a full pool says so cleanly, goes on serving what it holds, and takes back what is given back."""

import errno
import random
from pathlib import Path

import pytest

from tests.tiers.helpers import QUIET, assert_sound, fresh_pool, make_pool, read, refusal, run, settle, specs
from tests.tiers.test_cleaner import Overwriter
from tiers import Pool, PoolSettings, TierError, Volume
from tiers.layout import BLOCK_BYTES, MIB

PIECE = MIB // 4
NOISE = random.Random(3).randbytes(PIECE)


def piece(number: int) -> bytes:
    """A quarter of a MiB that no other number has; each of its blocks is different."""
    data = bytearray(NOISE)
    for at in range(0, PIECE, BLOCK_BYTES):
        data[at : at + 8] = (number << 16 | at >> 12).to_bytes(8, "little")
    return bytes(data)


async def fill(volume: Volume, *, until: int) -> int:
    """Write pieces in a row until the pool is full; return how many were taken."""
    for number in range(until):
        try:
            await volume.write(number * PIECE, piece(number))
        except TierError as error:
            assert error.errno == errno.ENOSPC
            assert "full" in str(error)
            return number
    raise AssertionError("the pool never got full")


async def assert_pieces(volume: Volume, numbers: range, version: int = 0) -> None:
    for number in numbers:
        assert await read(volume, number * PIECE, PIECE) == piece(number + version), number


def test_the_capacity_of_an_empty_pool_can_really_be_written_and_no_more(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=96) as pool:
            volume = await pool.create_volume("v", 1 << 30)
            capacity = pool.status().capacity_bytes
            assert 96 * MIB * 0.75 < capacity < 96 * MIB
            assert pool.status().available_bytes == capacity
            taken = await fill(volume, until=4096) * PIECE
            assert capacity - 2 * MIB <= taken <= capacity
            status = pool.status()
            assert status.available_bytes < 2 * PIECE
            assert taken <= status.used_bytes <= taken + PIECE
            await assert_pieces(volume, range(taken // PIECE))
            await assert_sound(pool)

    run(body)


def test_zeroing_a_full_pool_gives_all_of_it_back(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=64) as pool:
            volume = await pool.create_volume("v", 1 << 30)
            capacity = pool.status().capacity_bytes
            taken = await fill(volume, until=4096)
            await volume.write_zeroes(0, 1 << 30, no_hole=False)
            await settle(pool)
            assert pool.status().used_bytes == 0
            assert pool.status().capacity_bytes == capacity
            # A piece more or less goes in, depending on when a checkpoint counts the map's new pages.
            assert abs(await fill(volume, until=4096) - taken) <= 1

    run(body)


def test_a_pool_that_grew_takes_what_it_refused_before(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=48) as pool:
            volume = await pool.create_volume("v", 1 << 30)
            taken = await fill(volume, until=4096)
            await pool.grow(specs(tmp_path, base_mib=64))
            more = await pool.create_volume("more", 1 << 30)
            for number in range(150):
                await more.write(number * PIECE, piece(number + 300))
            await assert_pieces(more, range(150), 300)
            await assert_pieces(volume, range(taken))
            await assert_sound(pool)

    run(body)


def test_data_goes_to_base_when_the_fast_tier_is_full(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=40, base_mib=160) as pool:
            volume = await pool.create_volume("v", 1 << 30)
            for number in range(500):
                await volume.write(number * PIECE, piece(number))
            await settle(pool, 2)
            fast, base = pool.status().devices
            assert base.live_bytes > 80 * MIB
            assert fast.live_bytes <= 40 * MIB
            await assert_pieces(volume, range(500))
            await assert_sound(pool)

    run(body)


@pytest.mark.parametrize("tier", ["fast", "base"])
def test_a_pool_of_one_tier_only_works(tmp_path: Path, tier: str) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=48 * (tier == "fast"), base_mib=48 * (tier == "base")) as pool:
            volume = await pool.create_volume("v", 1 << 30)
            taken = await fill(volume, until=4096)
            await assert_pieces(volume, range(taken))
            assert [device.tier for device in pool.status().devices] == [tier]
            await assert_sound(pool)

    run(body)


def test_a_pool_full_of_dead_blocks_whose_map_is_large_can_be_cleaned(tmp_path: Path) -> None:
    async def body() -> None:
        settings = PoolSettings(checkpoint_interval_s=3600)
        async with fresh_pool(tmp_path, fast_mib=64, settings=settings) as pool:
            volume = await pool.create_volume("v", 1 << 40)
            writer = Overwriter(volume, sorted(random.Random(4).sample(range(1 << 28), 1200)), 3)
            await writer.fill()
            await writer.overwrite(8)
            await writer.verify()
            await assert_sound(pool)

    run(body)


def test_a_full_pool_overwrites_reads_trims_and_deletes(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path, fast_mib=80)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await pool.create_volume("v", 1 << 30)
            other = await pool.create_volume("other", 1 << 30)
            await other.write(0, piece(7777))
            taken = await fill(volume, until=4096)
            assert (await refusal(lambda: other.write(1 << 28, piece(1)))).errno == errno.ENOSPC

            for version in (1000, 2000):  # overwriting what is there: more than once the free space
                for number in range(taken):
                    await volume.write(number * PIECE, piece(number + version))
            await assert_pieces(volume, range(taken), 2000)
            assert not other.write_now([(1 << 28, piece(1))]), "no room without waiting"

            await volume.trim(0, 8 * PIECE)  # and what was given back can be written again
            for number in range(6):
                await other.write((1 << 28) + number * PIECE, piece(number))
            assert await read(volume, 0, 8 * PIECE) == bytes(8 * PIECE)
            await assert_pieces(volume, range(8, taken), 2000)

            await pool.delete_volume("v")
            third = await pool.create_volume("third", 1 << 30)
            for number in range(taken - 12):
                await third.write(number * PIECE, piece(number + 5000))
            await assert_pieces(third, range(taken - 12), 5000)
            assert await read(other, 0, PIECE) == piece(7777)
            await assert_sound(pool)
        async with Pool.open(home, settings=QUIET) as pool:
            await assert_pieces(pool.volume("third"), range(taken - 12), 5000)
            await assert_sound(pool)

    run(body)


def test_the_smallest_pool_takes_a_little(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=32) as pool:
            volume = await pool.create_volume("v", 1 << 30)
            taken = await fill(volume, until=4096)
            assert taken >= 8 * MIB // PIECE
            for number in range(taken):
                await volume.write(number * PIECE, piece(number + 50))
            await assert_pieces(volume, range(taken), 50)
            await assert_sound(pool)

    run(body)


def test_what_is_idle_open_and_live_is_known_without_looking_at_every_segment(tmp_path: Path) -> None:
    async def body() -> None:
        rng = random.Random(5)
        async with fresh_pool(tmp_path, fast_mib=64, base_mib=64) as pool:
            table = pool._engine.segments

            def judge() -> None:
                segments = table.by_id.values()
                assert {s.id for s in table.idle()} == {s.id for s in segments if not s.live and not s.pending}
                assert {s.id for s in segments if s.open} <= table._opened
                for device in pool._engine.devices:
                    assert table.device_live[device.index] == sum(s.live for s in segments if s.device is device)

            freed = 0
            for number in range(4):
                volume = await pool.create_volume(f"v{number}", 64 * MIB)
                for step in range(60):
                    at = rng.randrange(48) * MIB
                    if step % 3 == 2:
                        await volume.trim(at, 8 * MIB)
                    else:
                        await volume.write(at, piece(step) * 2)
                    judge()
                    if rng.random() < 0.2:
                        before = table.gained_slots
                        await pool.checkpoint()
                        freed += table.gained_slots > before
                        judge()
                if number % 2:
                    await pool.delete_volume(f"v{number}")
                    await settle(pool)
                    judge()
            assert freed > 3
            assert len(table.idle()) < 10 < len(table.by_id)
            report = await pool.check(True)
            assert report.problems == []

    run(body)
