"""Promotion: what clients read from base comes to the fast tier, and no byte of any volume changes by it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
import trio

from tests.simulation.corruption import move_everything
from tests.simulation.machine import Disk, Machine, PowerCutError
from tests.simulation.oracle import OracleError, read_all, require_sound
from tiers import Pool, Volume
from tiers.layout import BLOCK_BYTES, SLOT_BITS
from tiers.promotion import BATCH_BLOCKS, LARGEST_READ_BLOCKS, QUEUE_BLOCKS, Promoter

BLOCKS = 200


def content(seed: int, block: int) -> bytes:
    return (seed << 32 | block + 1).to_bytes(8, "little") * (BLOCK_BYTES // 8)


def whole(seed: int) -> bytes:
    return b"".join(content(seed, block) for block in range(BLOCKS))


@contextlib.asynccontextmanager
async def demoted(machine: Machine) -> AsyncIterator[tuple[Pool, Volume, Promoter]]:
    """A pool whose one volume lies on base, and whose promoter takes everything."""
    async with machine.open() as pool:
        volume = await pool.create_volume("v", BLOCKS * BLOCK_BYTES)
        await volume.write(0, whole(1))
        await seal(pool)
        await move_everything(pool, "base")
        assert tiers_of(volume) == {"base"}
        promoter = pool._engine.promoter = Promoter(pool._engine, lambda volume, block: True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(promoter.run)
            yield pool, volume, promoter
            nursery.cancel_scope.cancel()


async def seal(pool: Pool) -> None:
    """Leave the log's head, so that everything written can be moved."""
    pool._engine.log.roll()
    await pool.checkpoint()


def tiers_of(volume: Volume, blocks: range = range(BLOCKS)) -> set[str]:
    found: set[str] = set()
    for block in blocks:
        entry = volume.entry_now(block)
        assert entry is not None
        found.add(volume._segments[entry[0] >> SLOT_BITS].device.tier)
    return found


async def read(volume: Volume, block: int, count: int = 1) -> bytes:
    into = bytearray(count * BLOCK_BYTES)
    await volume.read(block * BLOCK_BYTES, len(into), memoryview(into))
    return bytes(into)


def machine_of(*disks: Disk, seed: int = 1) -> Machine:
    return Machine(disks or (Disk("fast", 40), Disk("base", 40)), seed=seed)


def test_a_block_that_is_read_from_base_comes_to_the_fast_tier() -> None:
    machine = machine_of()

    async def main() -> None:
        async with demoted(machine) as (pool, volume, promoter):
            written = pool._engine.client_written_bytes
            for block in (3, 4, 77):
                assert await read(volume, block) == content(1, block)
            await trio.sleep(1)
            assert promoter.promoted_blocks == 3 and promoter.promoted_bytes == 3 * BLOCK_BYTES
            assert all(tiers_of(volume, range(block, block + 1)) == {"fast"} for block in (3, 4, 77))
            assert tiers_of(volume, range(5, 77)) == {"base"}
            assert pool._engine.client_written_bytes == written
            assert await read_all(volume) == whole(1)
            await require_sound(pool)
        async with machine.open() as pool:
            assert await read_all(pool.volume("v")) == whole(1)

    machine.run(main)


def test_a_block_that_is_served_from_a_kept_frame_comes_to_the_fast_tier_too() -> None:
    machine = machine_of()

    async def main() -> None:
        async with demoted(machine) as (pool, volume, promoter):
            asked: list[int] = []

            def judge(volume: Volume, block: int) -> bool:
                asked.append(block)
                return block in (5, 6, 7)

            promoter._judge = judge
            assert await read(volume, 3) == content(1, 3)  # brings the frame
            into = memoryview(bytearray(3 * BLOCK_BYTES))
            assert volume.read_now(5 * BLOCK_BYTES, BLOCK_BYTES, into[:BLOCK_BYTES])
            assert volume.read_now(6 * BLOCK_BYTES, 2 * BLOCK_BYTES, into[BLOCK_BYTES:])
            assert into == content(1, 5) + content(1, 6) + content(1, 7)
            assert asked == [3, 5, 6, 7]
            await trio.sleep(1)
            assert promoter.promoted_blocks == 3
            assert tiers_of(volume, range(5, 8)) == {"fast"}
            assert tiers_of(volume, range(5)) == {"base"}
            await require_sound(pool)

    machine.run(main)


def test_a_log_that_went_to_base_is_led_back_for_promotion_where_there_is_room_again() -> None:
    machine = machine_of()

    async def main() -> None:
        async with demoted(machine) as (pool, volume, promoter):
            log = pool._engine.log
            base = next(device for device in pool._engine.devices if device.tier == "base")
            pick, log.pick_device = log.pick_device, lambda: base
            log.roll()
            assert not promoter.has_room(), "as long as only base is to be had"
            await read(volume, 3)
            log.pick_device = pick
            before = log.head.device.tier
            assert await read(volume, 4) == content(1, 4)
            await trio.sleep(1)
            assert (before, log.head.device.tier, promoter.promoted_blocks) == ("base", "fast", 1)
            assert tiers_of(volume, range(4, 5)) == {"fast"}
            await require_sound(pool)
        async with machine.open() as pool:
            assert await read_all(pool.volume("v")) == whole(1)

    machine.run(main)


def test_a_block_that_was_overwritten_meanwhile_stays_overwritten() -> None:
    machine = machine_of()

    async def main() -> None:
        async with demoted(machine) as (_pool, volume, promoter):
            await read(volume, 9)
            assert volume.write_now([(9 * BLOCK_BYTES, content(2, 9))])
            await trio.sleep(1)
            assert promoter.promoted_blocks == 0
            assert await read(volume, 9) == content(2, 9)

    machine.run(main)


def test_a_volume_that_was_deleted_meanwhile_stays_deleted() -> None:
    machine = machine_of()

    async def main() -> None:
        async with demoted(machine) as (pool, volume, promoter):
            await read(volume, 9)
            await pool.delete_volume("v")
            await trio.sleep(1)
            assert promoter.promoted_blocks == 0 and not pool.volumes()
            await require_sound(pool)

    machine.run(main)


def test_large_reads_and_what_the_judge_refuses_stay_on_base() -> None:
    machine = machine_of()

    async def main() -> None:
        async with demoted(machine) as (pool, volume, promoter):
            await read(volume, 0, LARGEST_READ_BLOCKS + 1)
            pool._engine.promoter = refusing = Promoter(pool._engine, lambda volume, block: False)
            await read(volume, 50)
            await trio.sleep(1)
            assert promoter.promoted_blocks == refusing.dropped_offers == 0
            assert tiers_of(volume) == {"base"}

    machine.run(main)


def test_the_queue_is_bounded_and_says_what_it_dropped() -> None:
    machine = machine_of()

    async def main() -> None:
        async with demoted(machine) as (_pool, volume, promoter):
            entry = volume.entry_now(7)
            assert entry is not None
            for _ in range(QUEUE_BLOCKS + 5):  # the task can't run in between
                promoter.offer(volume, 7, entry, content(1, 7))
            assert promoter.dropped_offers == 5
            await trio.sleep(1)
            assert promoter.promoted_blocks <= QUEUE_BLOCKS // BATCH_BLOCKS
            assert await read(volume, 7) == content(1, 7)

    machine.run(main)


def test_a_pool_that_is_short_of_room_promotes_nothing() -> None:
    machine = machine_of()

    async def main() -> None:
        async with demoted(machine) as (pool, volume, promoter):
            await read(volume, 7)
            pool._engine.space.read_only = "for a test"
            await read(volume, 8)  # not even offered
            await trio.sleep(1)
            assert (promoter.promoted_blocks, promoter.dropped_offers) == (0, 1)
            pool._engine.space.read_only = None

    machine.run(main)


@pytest.mark.parametrize("seed", range(12))
def test_a_power_cut_among_promotions_changes_no_byte(seed: int) -> None:
    machine = machine_of(seed=seed)

    async def main() -> None:
        with contextlib.suppress(PowerCutError):
            async with demoted(machine) as (pool, volume, _):
                await pool._engine.flusher.flush()
                machine.countdown = 5 + 9 * seed
                async with trio.open_nursery() as nursery:

                    async def client() -> None:
                        for _ in range(200):
                            block = machine.rng.randrange(BLOCKS)
                            assert await read(volume, block) == content(1, block)
                            await trio.sleep(0.005)

                    nursery.start_soon(client)
                    nursery.start_soon(client)
        assert machine.is_off
        machine.power_cut()
        async with machine.open() as pool:
            assert await read_all(pool.volume("v")) == whole(1)
            await require_sound(pool)

    machine.run(main)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_written_among_promotions_is_what_is_read(seed: int) -> None:
    write_among_promotions(seed)


def write_among_promotions(seed: int) -> None:
    """Blocks are read from base, and written before they can be promoted, or not."""
    machine = machine_of(seed=seed)
    machine.cold_share = 0.5

    async def main() -> None:
        async with demoted(machine) as (pool, volume, promoter):
            known = dict.fromkeys(range(BLOCKS), 1)
            for round_ in range(2, 60):
                for block in machine.rng.sample(range(BLOCKS), 8):
                    await read(volume, block)
                    if machine.rng.random() < 0.5:
                        assert volume.write_now([(block * BLOCK_BYTES, content(round_, block))])
                        known[block] = round_
                await trio.sleep(machine.rng.random() * 0.05)
            await trio.sleep(1)
            assert promoter.promoted_blocks
            for block, version in known.items():
                if await read(volume, block) != content(version, block):
                    raise OracleError(f"block {block} is not what was written last")
            await require_sound(pool)

    machine.run(main)
