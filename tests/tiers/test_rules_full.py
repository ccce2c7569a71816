"""Rule 8 of the design: a full pool refuses cleanly and goes on working, whatever happens to it."""

from __future__ import annotations

import errno

import pytest
import trio

from tests.simulation.machine import Disk, Machine
from tests.simulation.oracle import BLOCK, read_all, require_sound
from tests.tiers.test_rules_log import block, crash
from tests.tiers.test_rules_space import idle
from tiers import PoolSettings, Volume

MIB = 1 << 20
ONE = (Disk("fast", 32, MIB),)
TWO = (Disk("fast", 32, MIB), Disk("base", 32, MIB))


async def fill(volume: Volume) -> int:
    """Write until the pool is full; return how many blocks that were. Block i holds the byte 1 + i % 250."""
    written = 0
    for count in (64, 8, 1):
        with pytest.raises(OSError) as caught, trio.fail_after(600):
            while True:
                await volume.write(
                    written * BLOCK, b"".join(block(1 + i % 250) for i in range(written, written + count))
                )
                written += count
        assert caught.value.errno == errno.ENOSPC
    return written


@pytest.mark.parametrize(
    "disks", [(Disk("fast", 32, MIB),), (Disk("fast", 32, MIB), Disk("base", 32, MIB))], ids=["one", "two"]
)
def test_a_full_pool_still_reads_overwrites_trims_and_deletes(disks: tuple[Disk, ...]) -> None:
    # Without compression: where packing made room that was filled, what is packed can't be overwritten in its place.
    machine = Machine(disks, seed=3, settings=PoolSettings(overlay_entries=2048, compression_level=0))
    machine.pauses = 0

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 64 << 20)
            written = await fill(volume)
            assert written > 0.39 * sum(disk.segments for disk in disks) * MIB // BLOCK
            with trio.fail_after(2000):
                for i in range(3000):  # for ever, in the same place
                    at = i * 7 % written
                    await volume.write(at * BLOCK, block(251))
            content = await read_all(volume)
            new = {i * 7 % written for i in range(3000)}
            assert all(content[i * BLOCK] == (251 if i in new else 1 + i % 250) for i in range(written))
            for _ in range(3):
                with pytest.raises(OSError), trio.fail_after(600):
                    await volume.write(written * BLOCK, block(9) * 64)
            with trio.fail_after(600):
                await volume.trim(0, written // 2 * BLOCK)
                await idle(pool)
                await volume.write(0, block(5) * 32)
                await pool.create_volume("w", 1 << 20)
                await pool.delete_volume("w")
                await pool.delete_volume("v")
                await idle(pool)
            assert pool.status().used_bytes == 0
            await require_sound(pool)

    machine.run(main)


def test_a_full_pool_opens_again_after_crash_upon_crash() -> None:
    machine = Machine(
        (Disk("fast", 32, MIB), Disk("base", 32, MIB)),
        seed=4,
        settings=PoolSettings(overlay_entries=2048, compression_level=0),
    )
    machine.pauses = 0

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 64 << 20)
            written = await fill(volume)
            await volume.flush()
            await crash(machine)
        for life in range(40):
            machine.power_cut()
            async with machine.open() as pool:
                volume = pool.volume("v")
                with trio.fail_after(100):
                    await volume.write(life % written * BLOCK, block(1 + life % written % 250))
                    await volume.flush()
                await crash(machine)
        machine.kill()
        async with machine.open() as pool:
            volume = pool.volume("v")
            content = await read_all(volume)
            assert all(content[i * BLOCK] == 1 + i % 250 for i in range(written))
            with trio.fail_after(100):
                await volume.trim(0, 64 << 20)
                await pool.delete_volume("v")
            await require_sound(pool)

    machine.run(main)


@pytest.mark.parametrize("segment_bytes", [MIB // 2, MIB], ids=lambda n: f"{n >> 10} KiB segments")
def test_the_cleaner_of_a_full_and_idle_pool_comes_to_rest(segment_bytes: int) -> None:
    machine = Machine((Disk("fast", 36, segment_bytes),), seed=5, settings=PoolSettings(overlay_entries=2048))
    machine.pauses = 0

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 64 << 20)
            written = await fill(volume)
            for i in range(0, written, 3):
                await volume.write(i * BLOCK, block(251))
            for i in range(1, written, 5):
                await volume.trim(i * BLOCK, BLOCK)
            await pool.checkpoint()
            moved, limit = pool._engine.moved_blocks, 20 * written
            for _ in range(30):
                pool._engine.space.kick_cleaner.set()
                rounds = 0
                while rounds < 500 and pool._engine.moved_blocks - moved < limit:
                    await trio.lowlevel.checkpoint()
                    rounds += 1
            assert pool._engine.moved_blocks - moved < limit
            await require_sound(pool)

    machine.run(main)
