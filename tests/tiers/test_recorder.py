"""From clients' requests to heat: what is recorded, what fades, and what is kept over restarts."""

import contextlib
import logging
import random
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing

from tests.tiers.helpers import QUIET, fresh_pool, make_pool, read, run
from tiers import DeviceSpec, Pool, PoolSettings, Volume
from tiers.heat import Touch
from tiers.heatfile import FILE_NAME
from tiers.host import RealHost
from tiers.layout import BLOCK_BYTES, MIB
from tiers.policy import Policy
from tiers.reader import RUN_MASK
from tiers.recorder import _slices
from tiers.volume import MAX_RECORDED


async def filled(pool: Pool, name: str = "v", size: int = 16 * MIB) -> Volume:
    """A volume full of data, which nothing is known of yet."""
    volume = await pool.create_volume(name, size)
    for offset in range(0, size, MIB):
        await volume.write(offset, random.Random(offset).randbytes(MIB))
    volume.writes.clear()
    return volume


def estimates(pool: Pool, volume: Volume, *blocks: int) -> list[int]:
    return pool.recorder.heat.estimates(volume.id, np.array(blocks)).tolist()


def read_now(volume: Volume, block: int, count: int = 1) -> bool:
    return volume.read_now(block * BLOCK_BYTES, count * BLOCK_BYTES, memoryview(bytearray(count * BLOCK_BYTES)))


def test_reads_and_writes_are_counted_once_each_on_the_fast_path_and_on_the_slow(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            assert read_now(volume, 7)
            assert read_now(volume, 100, 3)
            await read(volume, 101 * BLOCK_BYTES, BLOCK_BYTES)
            await read(volume, 200 * BLOCK_BYTES + 5, 10)
            assert volume.write_now(
                [(7 * BLOCK_BYTES, b"x" * BLOCK_BYTES), (300 * BLOCK_BYTES, b"y" * 3 * BLOCK_BYTES)]
            )
            await pool.recorder.drain()
            assert estimates(pool, volume, 6, 7, 100, 101, 102, 103, 200, 300, 302, 303) == [
                0,
                2,
                1,
                2,
                1,
                0,
                1,
                1,
                1,
                0,
            ]
            heat = pool.recorder.heat
            assert heat.write_estimates(volume.id, np.array([7, 100, 301])).tolist() == [1, 0, 1]
            levels = heat.extents.levels(volume.id, np.array([7, 100, 200, 300]))
            assert levels.tolist() == [[1, 2, 1, 0], [1, 0, 0, 1]]

    run(body)


def test_trims_and_what_is_unmapped_earn_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 16 * MIB)
            assert read_now(volume, 5)
            assert volume.trim_now([(0, MIB)])
            await volume.write_zeroes(MIB, MIB, no_hole=False)
            await pool.recorder.drain()
            assert pool.recorder.heat.extents.volumes() == set()

    run(body)


def test_the_task_counts_by_itself(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            assert read_now(volume, 7)
            while estimates(pool, volume, 7) != [1]:
                await trio.sleep(0.05)

    run(body)


def test_a_stream_earns_nothing_unless_the_policy_has_no_cutoff(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            for cutoff, expected in ((MIB, [0, 0]), (0, [1, 1])):
                volume.policy = Policy(stream_cutoff_bytes=cutoff)
                for block in range(0, 1024, 16):
                    assert read_now(volume, block, 16)
                await pool.recorder.drain()
                assert estimates(pool, volume, 3, 1000) == expected

    run(body)


def test_the_queues_are_bounded_and_so_is_what_a_drain_counts(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            rng = random.Random(4)
            for _ in range(MAX_RECORDED + 5000):
                volume.reads.append(rng.randrange(4096))
            assert len(volume.reads) == MAX_RECORDED
            await pool.recorder.drain()
            assert not volume.reads
            assert pool.recorder.heat.sketches[Touch.READ].noted == 8192
            operation = [volume._write_word, 3, 1]
            for _ in range(MAX_RECORDED + 5000):
                volume.writes.extend(operation)
            assert len(volume.writes) == 3 * MAX_RECORDED
            await pool.recorder.drain()
            assert estimates(pool, volume, 3) == [255]

    run(body)


def test_requests_are_counted_in_slices_that_don_t_hold_the_loop() -> None:
    rng = np.random.default_rng(1)
    for top in (2, 300, RUN_MASK):
        counts = rng.integers(1, top, 3000)
        starts = np.arange(3000)
        parts = list(_slices(starts, counts))
        assert np.concatenate([part for part, _ in parts]).tolist() == starts.tolist()
        assert all(int(part.sum()) <= 16384 for _, part in parts)


def test_deleted_and_shrunk_volumes_lose_their_heat(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            one, two = await filled(pool, "one"), await filled(pool, "two")
            for volume in (one, two):
                assert read_now(volume, 5) and read_now(volume, 2000)
            await pool.recorder.drain()
            extents = pool.recorder.heat.extents
            await pool.resize_volume("two", 4 * MIB)
            assert extents.levels(two.id, np.array([5, 2000]))[0].tolist() == [1, 0]
            assert read_now(one, 9)
            await pool.delete_volume("one")
            await pool.recorder.drain()
            assert extents.volumes() == {two.id}

    run(body)


class ClockHost(RealHost):
    """This machine, at another time."""

    ahead_s = 0.0

    def now(self) -> float:
        return super().now() + self.ahead_s


def test_heat_is_halved_each_half_life_and_survives_a_clock_that_is_put_back(tmp_path: Path) -> None:
    async def body() -> None:
        host = ClockHost()
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET, host=host) as pool:
            volume = await filled(pool)
            for _ in range(8):
                assert read_now(volume, 7)
            await pool.recorder.drain()
            assert estimates(pool, volume, 7) == [8]
            for ahead, expected in ((3500, 8), (3700, 4), (4000, 4), (-9000, 4), (-5500, 4), (-5000, 2)):
                host.ahead_s = ahead
                await pool.recorder.drain()
                assert estimates(pool, volume, 7) == [expected], ahead
                assert pool.recorder.heat.extents.levels(volume.id, np.array([7]))[0].tolist() == [expected]

    run(body)


def test_the_hit_ratio_tells_where_reads_were_answered(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=64, base_mib=64) as pool:
            assert pool.recorder.hit_ratio is None
            volume = await filled(pool)
            for block in range(50):
                assert read_now(volume, block * 37)
            await pool.recorder.drain()
            assert pool.recorder.hit_ratio == 1.0
        (tmp_path / "q").mkdir()
        home = await make_pool(tmp_path / "q", fast_mib=0, base_mib=64)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await filled(pool)
            assert read_now(volume, 3)
            await pool.recorder.drain()
            assert pool.recorder.hit_ratio == 0.0

    run(body)


def test_reads_that_wait_count_for_the_tier_where_they_were_read(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=64, base_mib=64) as pool:
            volume = await filled(pool)
            for block in range(30):
                await read(volume, block * BLOCK_BYTES, BLOCK_BYTES)
            assert volume.slow_reads == {"fast": 30, "base": 0}
            volume.slow_reads["base"] = 10  # as if that many had been promoted since
            for block in range(20):
                assert read_now(volume, block)
            await pool.recorder.drain()
            assert pool.recorder.hit_ratio == pytest.approx(50 / 60)
            assert volume.slow_reads == {"fast": 0, "base": 0}
            assert estimates(pool, volume, 25, 5) == [1, 2]

    run(body)


# -- over restarts -----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def warm(home: Path) -> AsyncIterator[Pool]:
    """A pool with a volume `v` whose block 7 has been read three times, closed and open again."""
    async with Pool.open(home, settings=QUIET) as pool:
        volume = await filled(pool)
        for _ in range(3):
            assert read_now(volume, 7)
    async with Pool.open(home, settings=QUIET) as pool:
        yield pool


def test_heat_outlives_a_restart(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with warm(home) as pool:
            volume = pool.volume("v")
            assert estimates(pool, volume, 7, 8) == [3, 0]
            assert pool.recorder.heat.extents.levels(volume.id, np.array([7]))[0].tolist() == [3]
            await read(volume, 7 * BLOCK_BYTES, BLOCK_BYTES)
        async with Pool.open(home, settings=QUIET) as pool:
            assert estimates(pool, pool.volume("v"), 7) == [4]

    run(body)


def test_heat_outlives_a_change_of_the_pool_s_size(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with warm(home) as pool:
            bits = pool.recorder.heat.sketches[0].bits
            await pool.grow([DeviceSpec(tmp_path / "more", "fast", 256 * MIB)])
            await read(pool.volume("v"), 8 * BLOCK_BYTES, BLOCK_BYTES)
        async with Pool.open(home, settings=QUIET) as pool:
            assert pool.recorder.heat.sketches[0].bits > bits
            assert estimates(pool, pool.volume("v"), 7, 8, 900) == [3, 1, 0]

    run(body)


def test_heat_is_saved_while_the_pool_is_open(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        settings = PoolSettings(checkpoint_interval_s=3600.0, heat_save_interval_s=0.01)
        async with Pool.open(home, settings=settings) as pool:
            volume = await filled(pool)
            assert read_now(volume, 7)
            while not (home / FILE_NAME).exists():
                await trio.sleep(0.05)

    run(body)


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "a directory", "another pool's"])
def test_a_heat_file_of_no_use_is_a_cold_start(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with warm(home):
            pass
        file = home / FILE_NAME
        data = file.read_bytes()
        file.unlink()
        if damage == "cut":
            file.write_bytes(data[:-30])
        elif damage == "flipped":
            file.write_bytes(data[:80] + bytes([data[80] ^ 1]) + data[81:])
        elif damage == "a directory":
            file.mkdir()
        elif damage == "another pool's":
            other = await make_pool(tmp_path, fast_mib=0, base_mib=64, name="other")
            async with warm(other):
                pass
            file.write_bytes((other / FILE_NAME).read_bytes())
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            async with Pool.open(home, settings=QUIET) as pool:
                assert estimates(pool, pool.volume("v"), 7) == [0]
        told = [record.message for record in caplog.records if str(file) in record.message]
        if damage == "gone":
            assert not told
        else:
            assert "nothing is known to be warm" in told[0]

    run(body)


def test_what_is_saved_of_volumes_that_are_gone_is_not_taken_over(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with warm(home) as pool:
            volume_id = pool.volume("v").id
        saved = (home / FILE_NAME).read_bytes()
        async with Pool.open(home, settings=QUIET) as pool:
            await pool.delete_volume("v")
            await filled(pool, "new", MIB)
        (home / FILE_NAME).write_bytes(saved)
        async with Pool.open(home, settings=QUIET) as pool:
            assert volume_id not in pool.recorder.heat.extents.volumes()

    run(body)


def test_a_file_that_can_not_be_saved_is_told_of_once_and_harms_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        (home / f"{FILE_NAME}.new").mkdir()
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await filled(pool)
            for _ in range(3):
                assert read_now(volume, 7)
                await pool.recorder.drain()
                await pool.recorder.save()
        assert sum("its pool starts cold" in record.message for record in caplog.records) == 1

    run(body)
