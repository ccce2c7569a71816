"""The cleaner: overwriting goes on for ever in a pool hardly larger than its volume, and every byte stays right."""

import errno
import random
from array import array
from pathlib import Path
from unittest import mock

import pytest

import tiers.checkpoint
import tiers.cleaner
from tests.tiers.helpers import QUIET, assert_sound, flip, fresh_pool, make_pool, read, refusal, run, settle
from tests.tiers.test_evacuate import TWO, filled, machine_with
from tiers import Pool, Volume
from tiers.layout import BLOCK_BYTES, MIB, SLOT_MASK
from tiers.mover import Mover
from tiers.record import Kind

NOISE = random.Random(9).randbytes(BLOCK_BYTES - 16)
BATCH = 128


class Overwriter:
    """Writes random blocks of a volume, and knows which version of each must be there."""

    def __init__(self, volume: Volume, places: list[int], seed: int) -> None:
        self.volume = volume
        self.places = places
        self.overwritable = list(range(len(places)))
        self.versions = array("Q", bytes(8 * len(places)))
        self.rng = random.Random(seed)

    def content(self, i: int) -> bytes:
        version = self.versions[i]
        return i.to_bytes(8, "little") + version.to_bytes(8, "little") + NOISE if version else bytes(BLOCK_BYTES)

    async def write(self, chosen: list[int]) -> None:
        """One batch of blocks; a batch that must wait goes block by block."""
        writes = []
        for i in chosen:
            self.versions[i] += 1
            writes.append((self.places[i] * BLOCK_BYTES, self.content(i)))
        if not self.volume.write_now(writes):
            for offset, data in writes:
                await self.volume.write(offset, data)

    async def fill(self) -> None:
        """Every place once, in order."""
        for start in range(0, len(self.places), BATCH):
            await self.write(list(range(start, min(start + BATCH, len(self.places)))))

    async def overwrite(self, times: float) -> None:
        """As many blocks as the volume has, times `times`, at random."""
        for _ in range(int(len(self.places) * times / BATCH)):
            await self.write(self.rng.choices(self.overwritable, k=BATCH))

    async def verify(self) -> None:
        """Every block holds its newest version."""
        at = 0
        while at < len(self.places):
            run_length = 1
            while (
                run_length < 256
                and at + run_length < len(self.places)
                and self.places[at + run_length] == self.places[at] + run_length
            ):
                run_length += 1
            found = await read(self.volume, self.places[at] * BLOCK_BYTES, run_length * BLOCK_BYTES)
            assert found == b"".join(self.content(i) for i in range(at, at + run_length))
            at += run_length


@pytest.mark.parametrize(
    ("pool_mib", "share", "times"), [(224, 0.85, 0.1), (128, 0.6, 0.8)], ids=["nearly full", "many times over"]
)
def test_a_volume_is_overwritten_at_random_in_a_pool_hardly_larger(
    tmp_path: Path, pool_mib: int, share: float, times: float
) -> None:
    size = int(pool_mib * MIB * share) // MIB * MIB

    async def body() -> None:
        home = await make_pool(tmp_path, fast_mib=pool_mib)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await pool.create_volume("v", size)
            writer = Overwriter(volume, list(range(size // BLOCK_BYTES)), 1)
            await writer.fill()
            await writer.overwrite(times)
            await writer.verify()
            assert pool.status().blocks_moved > 0
            await assert_sound(pool)
            assert pool.status().used_bytes == size
        async with Pool.open(home, settings=QUIET) as pool:
            writer.volume = pool.volume("v")
            await writer.overwrite(0.02)
            await writer.verify()
            await assert_sound(pool)

    run(body)


def test_it_goes_on_over_two_tiers(tmp_path: Path) -> None:
    size = 100 * MIB

    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=48, base_mib=112) as pool:
            volume = await pool.create_volume("v", size)
            writer = Overwriter(volume, list(range(size // BLOCK_BYTES)), 2)
            await writer.fill()
            await writer.overwrite(0.4)
            await writer.verify()
            assert min(device.live_bytes for device in pool.status().devices) > 0
            await assert_sound(pool)

    run(body)


def test_trims_and_deletes_between_the_writes_are_not_undone_by_moves(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=64) as pool:
            volume = await pool.create_volume("v", 32 * MIB)
            writer = Overwriter(volume, list(range(8192)), 5)
            await writer.fill()
            for number in range(5):
                start = writer.rng.randrange(8192 - 64)
                await volume.trim(start * BLOCK_BYTES, 64 * BLOCK_BYTES)
                for i in range(start, start + 64):
                    writer.versions[i] = 0
                passing = await pool.create_volume(f"passing{number}", 4 * MIB)
                await passing.write(0, NOISE * 256)
                await writer.overwrite(0.3)
                await pool.delete_volume(f"passing{number}")
            await writer.verify()
            await assert_sound(pool)

    run(body)


def test_a_damaged_block_moves_as_bad_and_pins_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path, fast_mib=64)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await pool.create_volume("v", 30 * MIB)
            writer = Overwriter(volume, list(range(30 * MIB // BLOCK_BYTES)), 6)
            await writer.fill()
            await pool.checkpoint()
            (address,), _ = await volume.entries(100, 1)
            segment = pool._engine.segments.by_id[address >> 24]
            flip(tmp_path / "fast.img", segment.offset(address & SLOT_MASK) + 50)
            kept = range(90, 110)  # the damaged one and its neighbours are not written again
            writer.overwritable = [i for i in range(len(writer.places)) if i not in kept]
            for _ in range(20):
                await writer.overwrite(0.25)
                if segment.id not in pool._engine.segments.by_id:
                    break
            assert segment.id not in pool._engine.segments.by_id, "the damage doesn't pin it"
            for block in (99, 101):
                assert await read(volume, block * BLOCK_BYTES, BLOCK_BYTES) == writer.content(block)
            error = await refusal(lambda: read(volume, 100 * BLOCK_BYTES, 1))
            assert error.errno == errno.EIO
            report = await pool.check(True)
            assert len(report.problems) == 1
            assert f"p/v at byte {100 * BLOCK_BYTES}" in report.problems[0]
        async with Pool.open(home, settings=QUIET) as pool:
            volume = pool.volume("v")
            assert (await refusal(lambda: read(volume, 100 * BLOCK_BYTES, 1))).errno == errno.EIO
            await volume.write(100 * BLOCK_BYTES, b"n" * BLOCK_BYTES)
            assert await read(volume, 100 * BLOCK_BYTES, 3) == b"nnn"
            await assert_sound(pool)

    run(body)


def test_an_idle_pool_with_room_moves_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=64) as pool:
            volume = await pool.create_volume("v", 8 * MIB)
            writer = Overwriter(volume, list(range(2048)), 7)
            await writer.fill()
            await writer.overwrite(0.5)
            pool._engine.space.kick_cleaner.set()
            await settle(pool)
            assert pool.status().blocks_moved == 0

    run(body)


def test_a_victim_whose_blocks_a_deleted_volume_still_counts_is_no_leak() -> None:
    machine = machine_with(TWO)

    async def main() -> None:
        async with filled(machine) as (pool, _):
            engine, cleaner = pool._engine, pool._cleaner
            engine.log.roll()
            await pool.checkpoint()
            with (
                mock.patch.object(tiers.checkpoint, "DEAD_PAGES_A_CHECKPOINT", 0),
                mock.patch.object(tiers.cleaner, "UNREUSED_DIVISOR", 1 << 30),
                mock.patch.object(engine.space, "rest_ratio", lambda: 1.0),
            ):
                await pool.delete_volume("v")
                victims = [s for s in engine.segments.by_id.values() if s.kind is Kind.LOG and not s.open and s.live]
                for victim in victims:
                    await cleaner.mover.move_segment(victim, "fast")
                await cleaner.mover.apply_staged()
                cleaner._emptied = victims
                await cleaner._give_back(pressed=False)
                assert engine.dead, "a long list, which takes more than one checkpoint"
                assert victims and not any(victim.leaks for victim in victims)
            await settle(pool)
            assert not engine.dead and engine.segments.live == 0
            await assert_sound(pool)

    machine.run(main)


def test_a_few_blocks_of_many_victims_wait_without_keeping_all_that_was_read(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=128, settings=QUIET) as pool:
            volume = await pool.create_volume("v", 16 * MIB)
            writer = Overwriter(volume, list(range(4096)), seed=3)
            await writer.fill()
            await writer.write([i for i in range(4096) if i % 100])  # what stays is scattered over all segments
            await pool.checkpoint()
            engine = pool._engine
            victims = [
                s for s in engine.segments.by_id.values() if s.kind is Kind.LOG and not s.open and 0 < s.live < 9
            ]
            assert len(victims) > 10
            mover = Mover(engine)
            for victim in victims:
                await mover.move_segment(victim, "fast")
            waiting = [view for group in mover._gathered.values() for _, view in group]
            kept = {id(held): memoryview(held).nbytes for held in (memoryview(view).obj for view in waiting)}
            assert len(waiting) == sum(victim.live for victim in victims)
            assert sum(kept.values()) <= len(waiting) * BLOCK_BYTES
            await mover.apply_staged()
            mover.seal_all()
            await pool.checkpoint()
            assert all(victim.id not in engine.segments.by_id for victim in victims)
            await writer.verify()
            await assert_sound(pool)

    run(body)
