"""Flushes: what a client's waits for, and what it need not. The slow device here is held by hand."""

from __future__ import annotations

from typing import cast

import pytest
import trio
import trio.testing

from tests.simulation.machine import Disk, Machine
from tests.simulation.oracle import BLOCK
from tests.tiers.helpers import QUIET
from tests.tiers.test_rules_log import block, crash, get, opened, put
from tiers import Pool, PoolSettings
from tiers.device import Device
from tiers.flush import Flusher
from tiers.record import Kind

TIERS = (Disk("fast", 48), Disk("base", 48))


class Hold:
    """Syncs of one device wait until they are let go."""

    def __init__(self, machine: Machine, index: int) -> None:
        self.begun = trio.Event()
        self._gate = trio.Event()
        self._medium = machine.media[index]
        self._medium.before_sync = self._wait

    async def _wait(self) -> None:
        self.begun.set()
        await self._gate.wait()

    def let_go(self) -> None:
        self._medium.before_sync = None
        self._gate.set()


async def demote(pool: Pool) -> None:
    """Stage copies on base of all that is sealed on fast, and make them true."""
    mover = pool._cleaner.mover
    for segment in list(pool._engine.segments.by_id.values()):
        if not segment.open and segment.kind is Kind.LOG and segment.live + segment.pending:
            await mover.move_segment(segment, "base")
    await mover.apply_staged()


async def sealed(pool: Pool) -> None:
    """What is in the log so far can be moved."""
    pool._engine.log.roll()
    await pool.checkpoint()


def test_a_flush_does_not_wait_for_copies_that_no_record_names() -> None:
    machine = Machine(TIERS, seed=2, settings=QUIET)

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            for at in range(40):
                put(volume, at, block(1 + at))
            await sealed(pool)
            base = Hold(machine, 1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(demote, pool)
                await base.begun.wait()
                moved = pool._engine.moved_blocks
                put(volume, 50, block(99))
                with trio.fail_after(1):
                    await volume.flush()
                assert pool._engine.moved_blocks == moved, "no record before its copies are durable"
                base.let_go()
            assert pool._engine.moved_blocks > moved
            await volume.flush()
            await crash(machine)
        machine.power_cut()
        async with opened(machine) as (_, volume):
            assert [await get(volume, at) for at in (0, 39, 50)] == [1, 40, 99]

    machine.run(main)


def test_a_flush_waits_for_base_where_the_log_lies_there() -> None:
    machine = Machine((Disk("base", 48),), seed=2, settings=QUIET)

    async def main() -> None:
        async with opened(machine) as (_, volume):
            await volume.flush()
            put(volume, 1, block(7))
            base = Hold(machine, 0)
            done = trio.Event()

            async def flush() -> None:
                await volume.flush()
                done.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(flush)
                await base.begun.wait()
                await trio.testing.wait_all_tasks_blocked()
                assert not done.is_set()
                base.let_go()
            await crash(machine)
        machine.power_cut()
        async with opened(machine) as (_, volume):
            assert await get(volume, 1) == 7

    machine.run(main)


def test_writers_go_on_while_base_is_at_its_cap_with_copies_and_the_mover_waits_there() -> None:
    machine = Machine(TIERS, seed=3, settings=PoolSettings(checkpoint_interval_s=1e6, unsynced_cap_bytes=256 << 10))

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            for at in range(40):
                await volume.write(at * BLOCK, block(1 + at))
            await sealed(pool)
            device = pool._engine.devices[1]
            base = Hold(machine, 1)
            before = device.written_bytes
            device.unsynced_bytes += 256 << 10
            device.unnamed_bytes += 256 << 10
            async with trio.open_nursery() as nursery:
                nursery.start_soon(demote, pool)
                await base.begun.wait()
                await trio.testing.wait_all_tasks_blocked()
                assert device.written_bytes - before <= BLOCK, "the header of an output, no copies"
                assert volume.write_now([(60 * BLOCK, block(3))])
                base.let_go()
            await crash(machine)

    machine.run(main)


@pytest.mark.parametrize("everything", [False, True])
def test_unnamed_bytes_are_synced_by_who_asks_for_all(everything: bool) -> None:
    machine = Machine(TIERS, seed=4, settings=QUIET)

    async def main() -> None:
        async with opened(machine) as (pool, _):
            flusher, device = pool._engine.flusher, pool._engine.devices[1]
            await flusher.flush_all()
            device.write(device.segment_offset(device.segment_count - 1), [bytes(BLOCK)])
            device.unnamed_bytes += BLOCK
            count = machine.media[1].sync_count
            await (flusher.flush_all() if everything else flusher.flush())
            assert machine.media[1].sync_count == count + everything
            assert (device.unsynced_bytes == 0) == everything
            await crash(machine)

    machine.run(main)


class Disc:
    """As much of a device as its rounds look at, with a rate."""

    def __init__(self, index: int, bytes_a_second: int) -> None:
        self.index = index
        self.path = f"disc{index}"
        self.unsynced_bytes = self.unnamed_bytes = 0
        self.poisoned: str | None = None
        self._rate = bytes_a_second
        self._pending = 0

    def write(self, length: int) -> None:
        self.unsynced_bytes += length
        self._pending += length

    async def sync(self) -> None:
        pending, self._pending = self._pending, 0
        await trio.sleep(pending / self._rate)


def test_a_slow_device_may_have_only_what_it_syncs_soon_and_a_fast_one_all_of_the_cap() -> None:
    slow, fast = Disc(0, 50 << 20), Disc(1, 1 << 30)

    async def poisoned(_: object) -> None:
        raise AssertionError

    async def main() -> None:
        devices = cast(list[Device], [slow, fast])
        flusher = Flusher(devices, lambda: 0, cap_bytes=128 << 20, on_poison=poisoned, on_round=lambda: None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flusher.run)
            longest_s, most = 0.0, {slow: 0, fast: 0}
            for number in range(60):
                for disc in (slow, fast):
                    while flusher.room():
                        disc.write(1 << 20)
                        if disc.unsynced_bytes >= most[disc]:
                            most[disc] = disc.unsynced_bytes
                    begun_s = trio.current_time()
                    await flusher.flush()
                    longest_s = max(longest_s, trio.current_time() - begun_s) if number > 20 else 0.0
                if number == 20:
                    most = {slow: 0, fast: 0}
            nursery.cancel_scope.cancel()
        assert longest_s < 0.25, longest_s
        assert 8 << 20 <= most[slow] <= 12 << 20, most[slow]
        assert most[fast] == 128 << 20, most[fast]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
