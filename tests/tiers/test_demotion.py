"""Demotion: what leaves the fast tier when it fills up is what is cold, as policies want it."""

from __future__ import annotations

import random
from pathlib import Path

import trio

from tests.tiers.helpers import QUIET, assert_sound, fresh_pool, read, run
from tiers import Policy, Pool, Volume
from tiers.layout import BLOCK_BYTES, MIB, SLOT_BITS

CHUNK = 64 << 10


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


async def fill(volume: Volume, start: int, end: int) -> None:
    """Write [start, end) in small pieces, so that no stream is seen in it."""
    for offset in range(start, end, CHUNK):
        await volume.write(offset, noise(offset, CHUNK))


async def cleaned(pool: Pool) -> None:
    """Let the cleaner do what it thinks is needed."""
    space = pool._engine.space
    with trio.fail_after(60):
        while True:
            await pool.checkpoint()
            if space.cleaning_needed() is None and not space.cleaning:
                return
            space.kick_cleaner.set()
            await trio.sleep(0.05)


def share_on_fast(volume: Volume, start: int, end: int) -> float:
    blocks = range(start // BLOCK_BYTES, end // BLOCK_BYTES)
    on_fast = 0
    for block in blocks:
        found = volume.entries_now(block, 1)
        assert found is not None
        on_fast += volume._segments[found[0][0] >> SLOT_BITS].device.tier == "fast"
    return on_fast / len(blocks)


async def touch(pool: Pool, volume: Volume, start: int, end: int, times: int) -> None:
    offsets = [offset for offset in range(start, end, BLOCK_BYTES) for _ in range(times)]
    random.Random(5).shuffle(offsets)
    for number, offset in enumerate(offsets):
        await read(volume, offset, BLOCK_BYTES)
        if number % 4096 == 0:
            await pool.recorder.drain()
    await pool.recorder.drain()


def test_the_hot_part_stays_on_fast_and_the_cold_part_goes_to_base(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=96, base_mib=256, settings=QUIET) as pool:
            pool.define_policies({"default": Policy("default", stream_cutoff_bytes=0, demote_idle_s=0)})
            volume = await pool.create_volume("v", 120 * MIB)
            await fill(volume, 0, 40 * MIB)
            await touch(pool, volume, 8 * MIB, 12 * MIB, 6)
            await fill(volume, 40 * MIB, 100 * MIB)
            await cleaned(pool)
            for entry in range(0, 100 * MIB // BLOCK_BYTES, 256):
                await volume.entries(entry, 1)
            hot = share_on_fast(volume, 8 * MIB, 12 * MIB)
            cold = share_on_fast(volume, 0, 8 * MIB)
            assert hot > 0.9 and cold < 0.4, (hot, cold)
            for offset in range(0, 100 * MIB, 7 * CHUNK):
                assert await read(volume, offset, CHUNK) == noise(offset, CHUNK)
            await assert_sound(pool)

    run(body)


def test_a_volume_of_placement_base_leaves_first_and_one_of_placement_fast_last(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=96, base_mib=256, settings=QUIET) as pool:
            pool.define_policies(
                {
                    "cold": Policy("cold", placement="base", stream_cutoff_bytes=0),
                    "gold": Policy("gold", placement="fast", stream_cutoff_bytes=0),
                }
            )
            cold = await pool.create_volume("cold", 40 * MIB, policy="cold")
            gold = await pool.create_volume("gold", 40 * MIB, policy="gold")
            plain = await pool.create_volume("plain", 40 * MIB)
            for start in range(0, 33 * MIB, CHUNK):
                for volume in (cold, gold, plain):
                    await volume.write(start, noise(start, CHUNK))
            await cleaned(pool)
            for volume in (cold, gold, plain):
                for block in range(0, 33 * MIB // BLOCK_BYTES, 256):
                    await volume.entries(block, 1)
            shares = [share_on_fast(volume, 0, 33 * MIB) for volume in (cold, plain, gold)]
            assert shares[0] < shares[1] < shares[2] + 0.001, shares
            assert shares[2] > 0.8
            await assert_sound(pool)

    run(body)


def test_outside_the_window_nothing_leaves_unless_clients_are_about_to_wait(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=96, base_mib=256, settings=QUIET) as pool:
            volume = await pool.create_volume("v", 200 * MIB)
            engine = pool._engine
            live = [(volume, block, (1 << SLOT_BITS) + block, 0) for block in range(64)]
            engine.space.rest_ratio = lambda: 1.0  # type: ignore[method-assign]
            assert sum(pool._cleaner._survivors(live)) == 48
            volume.obey(Policy("night", migration_window=(0, 1)))
            engine.migration._now = lambda: 12 * 3600.0
            assert all(pool._cleaner._survivors(live))
            engine.space.rest_ratio = lambda: 0.0  # type: ignore[method-assign]
            assert not any(pool._cleaner._survivors(live))

    run(body)
