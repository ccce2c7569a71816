"""`when_full = "queue"`: writes that find no room wait aside, get some when there is, and are told when time is up."""

from __future__ import annotations

import errno
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.simulation.machine import Disk, Machine
from tests.simulation.oracle import require_sound
from tests.tiers.helpers import block, read, refusal
from tiers import DeviceSpec, Policy, Pool, TierError, Volume
from tiers.layout import BLOCK_BYTES

QUEUE = {"patient": Policy("patient", when_full="queue", queue_timeout_s=60.0)}
BLOCKS = 2048


def simulated(body: Callable[[Pool, Volume, int], Awaitable[Any]]) -> None:
    """Run on a full pool, by a simulated clock: (pool, volume `v` that takes no more, how many blocks it has)."""
    machine = Machine((Disk("fast", 48),), seed=1)

    async def main() -> None:
        with trio.fail_after(3600):
            async with machine.open() as pool:
                pool.define_policies(QUEUE)
                volume = await pool.create_volume("v", BLOCKS * BLOCK_BYTES)
                await body(pool, volume, await fill(volume))
                await require_sound(pool)

    machine.run(main)
    assert not machine.is_off  # as it would be if tasks woke each other up for ever


async def fill(volume: Volume) -> int:
    """Write block after block, until even the cleaner can make no room for another."""
    refusals = 0
    number = 0
    while number < BLOCKS:
        try:
            await volume.write(number * BLOCK_BYTES, block(number))
        except TierError as error:
            assert error.errno == errno.ENOSPC
            refusals += 1
            if refusals == 20:
                return number
            await trio.sleep(1)
        else:
            refusals = 0
            number += 1
    raise AssertionError("it never got full")


async def make_some_room(pool: Pool, volume: Volume) -> bytes:
    """Trim a little, so that overwrites go on; return data that are too much for it all the same."""
    await volume.trim(0, 200 * BLOCK_BYTES)
    await pool.checkpoint()
    available = pool.status().available_bytes
    assert 100 * BLOCK_BYTES < available < 254 * BLOCK_BYTES
    return random.Random(1).randbytes(255 * BLOCK_BYTES)


class Writer:
    """A write on its way."""

    def __init__(self, volume: Volume, number: int, data: bytes | None = None) -> None:
        self.volume, self.offset, self.data = volume, number * BLOCK_BYTES, data or block(number)
        self.done_at: float | None = None
        self.error: TierError | None = None

    async def run(self) -> None:
        try:
            await self.volume.write(self.offset, self.data)
        except TierError as error:
            self.error = error
        self.done_at = trio.current_time()


def test_by_default_a_full_pool_says_so_at_once() -> None:
    async def body(pool: Pool, volume: Volume, filled: int) -> None:
        begun = trio.current_time()
        error = await refusal(lambda: volume.write(filled * BLOCK_BYTES, block(1)))
        assert error.errno == errno.ENOSPC
        assert "is full" in str(error)
        assert "delete or trim something" in str(error)
        assert trio.current_time() - begun < 5

    simulated(body)


def test_a_write_without_room_waits_and_is_told_when_its_time_is_up() -> None:
    async def body(pool: Pool, volume: Volume, filled: int) -> None:
        await pool.set_policy("v", "patient")
        begun = trio.current_time()
        error = await refusal(lambda: volume.write(filled * BLOCK_BYTES, block(1)))
        assert error.errno == errno.ENOSPC
        assert "waited for room for 60 s, which is the queue_timeout of the policy 'patient'" in str(error)
        assert "delete or trim something, or grow" in str(error)
        assert trio.current_time() - begun == pytest.approx(60, abs=2)
        assert volume.queued == 0

    simulated(body)


async def trim(pool: Pool, volume: Volume, filled: int) -> None:
    await volume.trim(0, 200 * BLOCK_BYTES)


async def trim_now(pool: Pool, volume: Volume, filled: int) -> None:
    assert volume.trim_now([(0, 200 * BLOCK_BYTES)])


async def zero(pool: Pool, volume: Volume, filled: int) -> None:
    await volume.write_zeroes(0, 200 * BLOCK_BYTES, no_hole=False)


async def shrink(pool: Pool, volume: Volume, filled: int) -> None:
    await pool.resize_volume("w", 4 * BLOCK_BYTES)


async def delete(pool: Pool, volume: Volume, filled: int) -> None:
    await pool.delete_volume("w")


@pytest.mark.parametrize("relief", [trim, trim_now, zero, shrink, delete], ids=lambda relief: relief.__name__)
def test_room_that_appears_goes_to_those_who_wait(relief: Callable[[Pool, Volume, int], Awaitable[None]]) -> None:
    machine = Machine((Disk("fast", 48),), seed=2)

    async def main() -> None:
        with trio.fail_after(3600):
            async with machine.open() as pool:
                pool.define_policies(QUEUE)
                other = await pool.create_volume("w", 300 * BLOCK_BYTES)
                for number in range(250):
                    await other.write(number * BLOCK_BYTES, block(number))
                volume = await pool.create_volume("v", BLOCKS * BLOCK_BYTES, "patient")
                pool.define_policies({"patient": Policy("patient")})
                filled = await fill(volume)
                pool.define_policies(QUEUE)
                writers = [Writer(volume, filled + number) for number in range(20)]
                async with trio.open_nursery() as nursery:
                    for writer in writers:
                        nursery.start_soon(writer.run)
                    await trio.sleep(10.5)  # between two looks
                    assert [writer.done_at for writer in writers] == [None] * 20
                    assert (volume.queued, pool.status().volumes[0].queued) == (20, 20)
                    relieved = trio.current_time()
                    await relief(pool, volume, filled)
                assert all(writer.error is None for writer in writers)
                assert max(writer.done_at or 0 for writer in writers) - relieved < 2
                for number in range(20):
                    assert await read(volume, (filled + number) * BLOCK_BYTES, BLOCK_BYTES) == block(filled + number)
                await require_sound(pool)

    machine.run(main)
    assert not machine.is_off  # as it would be if tasks woke each other up for ever


def test_who_waits_holds_up_neither_overwrites_nor_reads_and_may_be_cancelled() -> None:
    async def body(pool: Pool, volume: Volume, filled: int) -> None:
        too_large = await make_some_room(pool, volume)
        await pool.set_policy("v", "patient")
        async with trio.open_nursery() as nursery:
            for number in range(60):
                # Each begins within a block, so that it prepares a merge again and again.
                writer = Writer(volume, filled + number, too_large)
                writer.offset += 100
                nursery.start_soon(writer.run)
            await trio.sleep(1)
            rng = random.Random(1)
            begun = trio.current_time()
            for _ in range(400):
                number = rng.randrange(200, filled)
                await volume.write(number * BLOCK_BYTES, block(number))
                assert await read(volume, number * BLOCK_BYTES, BLOCK_BYTES) == block(number)
                await trio.sleep(0.01)
            assert trio.current_time() - begun < 20
            assert volume.queued > 50
            nursery.cancel_scope.cancel()
        assert volume.queued == 0
        await volume.trim(200 * BLOCK_BYTES, 200 * BLOCK_BYTES)
        await pool.checkpoint()
        await volume.write(filled * BLOCK_BYTES, too_large[: 100 * BLOCK_BYTES])

    simulated(body)


def test_waiting_costs_a_full_pool_few_checkpoints() -> None:
    async def body(pool: Pool, volume: Volume, filled: int) -> None:
        too_large = await make_some_room(pool, volume)
        await pool.set_policy("v", "patient")
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(Writer(volume, filled + number, too_large).run)
            await trio.sleep(5)
            before = pool.status().checkpoints
            for number in range(200, 400):
                await volume.write(number * BLOCK_BYTES, block(number))
                await volume.flush()  # which wakes whoever waits for a change
                await trio.sleep(0.1)
            # Of the writers some look each second, and find something to count.
            assert pool.status().checkpoints - before < 20 * 25
            nursery.cancel_scope.cancel()

    simulated(body)


def test_another_policy_counts_at_once_for_those_who_wait() -> None:
    async def body(pool: Pool, volume: Volume, filled: int) -> None:
        await pool.set_policy("v", "patient")
        writer = Writer(volume, filled)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            await trio.sleep(20)
            pool.define_policies({"patient": Policy("patient", when_full="queue", queue_timeout_s=300)})
            await trio.sleep(100)
            assert writer.done_at is None
            changed = trio.current_time()
            await pool.set_policy("v", "default")
        assert writer.error is not None
        assert writer.error.errno == errno.ENOSPC
        assert "queue_timeout" not in str(writer.error)
        assert writer.done_at is not None
        assert writer.done_at - changed < 2

    simulated(body)


def test_who_waits_does_not_hold_up_the_end_of_the_pool() -> None:
    machine = Machine((Disk("fast", 48),), seed=3)

    async def main() -> None:
        with trio.fail_after(3600):
            async with trio.open_nursery() as nursery, machine.open() as pool:
                volume = await pool.create_volume("v", BLOCKS * BLOCK_BYTES)
                filled = await fill(volume)
                pool.define_policies({"default": Policy(when_full="queue", queue_timeout_s=3000)})
                writer = Writer(volume, filled)
                nursery.start_soon(writer.run)
                await trio.sleep(5.5)  # between two looks
                assert volume.queued == 1
            assert writer.error is not None
            assert writer.error.errno == errno.EROFS
            assert trio.current_time() < 1000

    machine.run(main)
    assert not machine.is_off  # as it would be if tasks woke each other up for ever


def test_a_write_waits_for_a_device_to_be_added(tmp_path: Path) -> None:
    async def main() -> None:
        with trio.fail_after(60):
            home = tmp_path / "pool"
            await Pool.create(home, "p", [DeviceSpec(tmp_path / "one", "fast", 40 << 20)])
            async with Pool.open(home) as pool:
                volume = await pool.create_volume("v", 1 << 30)
                large = random.Random(1).randbytes(1 << 20)
                with pytest.raises(TierError):
                    for number in range(40):
                        await volume.write(number << 20, large)
                pool.define_policies({"default": Policy(when_full="queue")})
                writer = Writer(volume, 1 << 16, large)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(writer.run)
                    await trio.sleep(0.2)
                    assert volume.queued == 1
                    await pool.grow([DeviceSpec(tmp_path / "two", "base", 64 << 20)])
                assert writer.error is None
                assert await read(volume, 1 << 28, 1 << 20) == large

    trio.run(main)
