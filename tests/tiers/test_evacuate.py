"""Evacuation: a device is emptied and removed while the pool is in use; what can't be read is lost and listed."""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio

from tests.simulation.machine import Disk, Machine, PowerCutError
from tests.simulation.oracle import read_all, read_what_can_be
from tests.tiers.helpers import QUIET, assert_sound, fresh_pool, refusal, run
from tiers import DeviceSpec, EvacuationStatus, Pool, PoolSettings, TierError
from tiers.device import open_device
from tiers.failpoint import watching
from tiers.label import BadLabelError
from tiers.layout import BLOCK_BYTES, MIB
from tiers.probe import read_label
from tiers.record import Kind

TWO = (Disk("fast", 40), Disk("base", 60))
THREE = (Disk("fast", 30), Disk("fast", 30), Disk("base", 60))
SETTINGS = PoolSettings(checkpoint_interval_s=1e6, overlay_entries=4096, unsynced_cap_bytes=8 << 20)


async def dawdle(offset: int, length: int) -> None:
    """A device that takes its time to read."""
    await trio.sleep(50)


async def finished(pool: Pool, path: str) -> EvacuationStatus:
    """Wait until an evacuation is over."""
    with trio.fail_after(600):
        while True:
            (found,) = [status for status in pool.evacuator.status() if status.path == path]
            if found.state in ("removed", "cancelled", "stuck"):
                return found
            await trio.sleep(0.05)


async def fill(pool: Pool, name: str = "v", blocks: int = 300, seed: int = 1) -> bytes:
    """A volume with content in several segments; returns it."""
    rng = random.Random(seed)
    volume = await pool.create_volume(name, blocks * BLOCK_BYTES)
    content = rng.randbytes(blocks * BLOCK_BYTES)
    for at in range(0, len(content), 16 * BLOCK_BYTES):
        await volume.write(at, content[at : at + 16 * BLOCK_BYTES])
    await pool.checkpoint()
    return content


def machine_with(disks: Sequence[Disk], seed: int = 1) -> Machine:
    return Machine(disks, seed=seed, settings=SETTINGS)


@contextlib.asynccontextmanager
async def filled(machine: Machine) -> AsyncIterator[tuple[Pool, bytes]]:
    async with machine.open() as pool:
        yield pool, await fill(pool)


# -- sound devices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_device_is_emptied_and_removed_and_everything_is_still_there(index: int) -> None:
    machine = machine_with(THREE)
    path = machine.media[index].path

    async def main() -> None:
        async with filled(machine) as (pool, content):
            began = await pool.evacuator.start(path)
            assert began.state == "running"
            assert (await pool.evacuator.start(path)).path == path, "asking twice is no error"
            ended = await finished(pool, path)
            assert (ended.state, ended.done_bytes, ended.problem) == ("removed", ended.total_bytes, None)
            assert [device.path for device in pool.status().devices] == [
                medium.path for medium in machine.media if medium.path != path
            ]
            assert machine.media[index].durable[:8] == bytes(8), "the label is wiped"
            machine.media[index].missing = True
            assert await read_all(pool.volume("v")) == content
            await assert_sound(pool)
        async with machine.open() as pool:
            assert len(pool.status().devices) == 2
            assert await read_all(pool.volume("v")) == content
            await assert_sound(pool)

    machine.run(main)


def test_a_real_device_is_removed_and_its_index_is_never_given_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_pool(tmp_path, fast_mib=64, base_mib=64) as pool:
            content = await fill(pool, blocks=2000)
            first, second = (device.path for device in pool.status().devices)
            await pool.evacuator.start(second)
            assert (await finished(pool, second)).state == "removed"
            with pytest.raises(Exception, match="label"):
                read_label(Path(second))
            await pool.grow([DeviceSpec(Path(second), "base")])
            await pool.grow([DeviceSpec(tmp_path / "more", "fast", 64 * MIB)])
            assert [device.index for device in pool._engine.devices] == [0, 2, 3]
            await pool.evacuator.start(first)
            assert (await finished(pool, first)).state == "removed"
            assert await read_all(pool.volume("v")) == content
            await assert_sound(pool)
        async with Pool.open(tmp_path / "pool-p", settings=QUIET) as pool:
            assert await read_all(pool.volume("v")) == content
            assert [device.index for device in pool._engine.devices] == [2, 3]

    run(main)


def test_a_pool_that_closes_while_a_device_is_removed_lets_go_of_it(tmp_path: Path) -> None:
    async def main() -> None:
        async def open_until_removed() -> None:
            async with fresh_pool(tmp_path, fast_mib=64, base_mib=64) as pool:
                paths.extend(device.path for device in pool.status().devices)
                await fill(pool)
                await pool.evacuator.start(paths[1])
                await finished(pool, paths[1])

        paths: list[str] = []
        with trio.CancelScope() as scope, watching(lambda name: scope.cancel() if name == "evacuate.removed" else None):
            await open_until_removed()
        assert scope.cancelled_caught
        with pytest.raises(BadLabelError):  # wiped, and nobody holds its lock
            open_device(Path(paths[1]))

    run(main)


def test_clients_go_on_while_a_device_is_emptied() -> None:
    machine = machine_with(THREE)
    rng = random.Random(5)

    async def main() -> None:
        async with filled(machine) as (pool, old):
            content = bytearray(old)
            path = machine.media[0].path
            await pool.evacuator.start(path)
            volume = pool.volume("v")
            while (await_status := pool.evacuator.status()[0]).state != "removed":
                block = rng.randrange(300)
                data = rng.randbytes(BLOCK_BYTES)
                await volume.write(block * BLOCK_BYTES, data)
                content[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = data
                if rng.random() < 0.2:
                    await volume.flush()
                await trio.sleep(0.01)
            assert await_status.problem is None
            assert await read_all(volume) == content
            await assert_sound(pool)

    machine.run(main)


def test_what_was_moved_is_told_before_a_checkpoint_has_counted_it_and_after_cancelling() -> None:
    machine = machine_with(TWO)
    path = machine.media[0].path

    async def main() -> None:
        async with filled(machine) as (pool, content):
            evacuator = pool.evacuator
            await evacuator.start(path)
            apply, applied = evacuator._apply, trio.Event()

            async def stop_after(*args: Any) -> None:
                await apply(*args)
                applied.set()
                await trio.sleep(60)

            with mock.patch.object(evacuator, "_apply", stop_after):
                await applied.wait()
                checkpoints = pool.status().checkpoints
                await trio.sleep(6)
                during = evacuator.status()[0]
                assert pool.status().checkpoints == checkpoints
                assert 0 < during.done_bytes <= during.total_bytes and during.bytes_per_s > 0
                assert during.eta_s is not None
                cancelled = await evacuator.cancel(path)
            assert cancelled.state == "cancelled" and cancelled.done_bytes == during.done_bytes
            assert await read_all(pool.volume("v")) == content

    machine.run(main)


def test_nothing_new_is_put_on_a_device_that_is_being_emptied_and_cancelling_lets_it_be_used_again() -> None:
    machine = machine_with(TWO)
    path = machine.media[1].path

    async def main() -> None:
        async with filled(machine) as (pool, content):
            before = pool.status()
            machine.media[1].before_read = dawdle
            engine = pool._engine
            engine.space.kick_cleaner.set()
            base = engine.devices[1]
            await pool.evacuator.start(path)
            during = pool.status()
            assert during.capacity_bytes < before.capacity_bytes and during.size_bytes < before.size_bytes
            assert [device.state for device in during.devices] == ["online", "evacuating"]
            assert all(engine.space.pick_device(kind, "base") is not base for kind in Kind)
            assert (await pool.evacuator.cancel(path)).state == "cancelled"
            machine.media[1].before_read = None
            after = pool.status()
            assert (after.capacity_bytes, after.size_bytes) == (before.capacity_bytes, before.size_bytes)
            assert engine.space.pick_device(Kind.MOVED, "base") is base
            error = await refusal(lambda: pool.evacuator.cancel(path))
            assert error.errno == errno.ENOENT and path in str(error)
            assert await read_all(pool.volume("v")) == content
            await assert_sound(pool)

    machine.run(main)


def test_what_cannot_be_is_refused_with_the_figures_and_nothing_changes() -> None:
    machine = machine_with((Disk("fast", 60), Disk("base", 24)))

    async def main() -> None:
        async with filled(machine) as (pool, _):
            fast, base = (medium.path for medium in machine.media)
            error = await refusal(lambda: pool.evacuator.start("/nowhere"))
            assert error.errno == errno.ENOENT and fast in str(error)
            volume = await pool.create_volume("more", 400 * BLOCK_BYTES)
            await volume.write(0, random.Random(3).randbytes(400 * BLOCK_BYTES))
            error = await refusal(lambda: pool.evacuator.start(fast))
            assert error.errno == errno.ENOSPC and "KiB" in str(error) and fast in str(error)
            assert [device.state for device in pool.status().devices] == ["online", "online"]
            await pool.evacuator.start(base)
            assert (await finished(pool, base)).state == "removed"
            error = await refusal(lambda: pool.evacuator.start(fast))
            assert error.errno == errno.EINVAL and "last device" in str(error)
            await assert_sound(pool)

    machine.run(main)


def test_an_evacuation_that_a_restart_interrupts_goes_on_by_itself() -> None:
    machine = machine_with(THREE)
    path = machine.media[0].path

    async def main() -> None:
        async with filled(machine) as (pool, content):
            machine.media[0].before_read = dawdle
            await pool.evacuator.start(path)
        machine.media[0].before_read = None
        async with machine.open() as pool:
            assert (await finished(pool, path)).state == "removed"
            assert await read_all(pool.volume("v")) == content
            await assert_sound(pool)

    machine.run(main)


def crash_while_evacuating(countdown: int, *, ending: bool = False) -> None:
    """The machine goes down after so many operations of an evacuation (or of its end); the next life completes it."""
    machine = machine_with(THREE, seed=countdown)
    path = machine.media[countdown % 3].path
    content = b""

    async def main() -> None:
        nonlocal content
        async with filled(machine) as (_, content):
            pass
        began = False
        with contextlib.suppress(PowerCutError):
            async with machine.open() as pool:
                if ending:
                    machine.on_hit["evacuate.removing"] = lambda: setattr(machine, "countdown", countdown)
                else:
                    machine.countdown = countdown
                await pool.evacuator.start(path)
                began = True
                await finished(pool, path)
        machine.countdown = None
        machine.on_hit.clear()
        if machine.is_off:
            machine.power_cut()
        async with machine.open() as pool:
            if path in [device.path for device in pool.status().devices]:
                if not began:
                    await pool.evacuator.start(path)
                assert (await finished(pool, path)).state == "removed"
            assert await read_all(pool.volume("v")) == content
            await assert_sound(pool)
        medium = next(medium for medium in machine.media if medium.path == path)
        assert medium.cache[:8] == bytes(8), "the label is wiped, by this life or the next"

    machine.run(main)


@pytest.mark.parametrize("countdown", range(1, 16))
def test_a_crash_while_a_device_is_removed_is_sound(countdown: int) -> None:
    crash_while_evacuating(countdown, ending=True)


@pytest.mark.parametrize("countdown", range(5, 300, 12))
def test_a_crash_at_any_point_is_sound_and_the_evacuation_goes_on(countdown: int) -> None:
    crash_while_evacuating(countdown)


@pytest.mark.parametrize("seed", range(12))
def test_a_flush_ends_though_the_device_that_it_waits_for_is_removed(seed: int) -> None:
    machine = machine_with(THREE, seed=seed)
    path = machine.media[seed % 2].path

    async def main() -> None:
        async with filled(machine) as (pool, _), trio.open_nursery() as nursery:
            volume = pool.volume("v")
            machine.on_hit["checkpoint.labelled"] = lambda: nursery.start_soon(volume.flush)
            await pool.evacuator.start(path)
            assert (await finished(pool, path)).state == "removed"
            machine.on_hit.clear()
            with trio.fail_after(600):
                while nursery.child_tasks:
                    await trio.sleep(1)
            await assert_sound(pool)

    machine.run(main)


# -- failing devices ---------------------------------------------------------------------------------------------------


def places_of(pool: Pool, index: int, kinds: Sequence[Kind]) -> list[int]:
    """Byte offsets of the written slots of a device's segments of some kinds, headers included."""
    return [
        segment.offset(slot)
        for segment in pool._engine.segments.by_id.values()
        if segment.device.index == index and segment.kind in kinds and segment.live
        for slot in range(segment.used)
    ]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kinds", [(Kind.LOG, Kind.MOVED), (Kind.MAP,), (Kind.LOG, Kind.MOVED, Kind.MAP)])
def test_a_failing_device_is_emptied_of_what_still_reads_and_the_rest_is_listed(
    kinds: tuple[Kind, ...], seed: int
) -> None:
    machine = machine_with((Disk("fast", 60), Disk("fast", 60)), seed=seed)
    rng = random.Random(seed)

    async def main() -> None:
        async with filled(machine) as (pool, content):
            index = max((0, 1), key=lambda i: len(places_of(pool, i, kinds)))
            places = places_of(pool, index, kinds)
            unreadable = set(rng.sample(places, max(1, len(places) // 5)))
            medium = machine.media[index]
            medium.on_read = lambda offset, length: (
                errno.EIO if any(at in unreadable for at in range(offset, offset + length, BLOCK_BYTES)) else None
            )
            for at in unreadable:
                medium.flip(at + 8)
        async with machine.open() as pool:
            await pool.evacuator.start(medium.path)
            ended = await finished(pool, medium.path)
            assert ended.state == "removed", ended.problem
            volume = pool.volume("v")
            found, lost = await read_what_can_be(volume)
            for block in set(range(300)) - lost:
                at = block * BLOCK_BYTES
                assert found[at : at + BLOCK_BYTES] == content[at : at + BLOCK_BYTES]
            named = {
                at // BLOCK_BYTES
                for loss in await pool.losses()
                for at in range(loss.offset, loss.offset + loss.length, BLOCK_BYTES)
            }
            assert named == lost
            report = await pool.check(True)
            assert all("lost to a device error" in problem for problem in report.problems), report.problems
            await volume.write(0, content)
            assert await pool.losses() == []
            await assert_sound(pool)

    machine.run(main)


def test_a_map_page_that_fails_while_a_damaged_segment_is_searched_does_not_end_the_pool() -> None:
    machine = machine_with((Disk("fast", 60), Disk("fast", 60)))

    async def main() -> None:
        async with filled(machine) as (pool, content):
            engine, volume, mover = pool._engine, pool.volume("v"), pool.evacuator.mover
            index = max((0, 1), key=lambda i: len(places_of(pool, i, (Kind.LOG,))))
            medium = machine.media[index]
            segment = next(s for s in engine.segments.on_device(engine.devices[index]) if s.kind is Kind.LOG and s.live)
            medium.flip(segment.offset(1) + 8)  # its first batch header: only the map tells what is in it
            move_blocks, failures = mover.move_blocks, 0

            async def fail_once(*args: Any) -> None:
                """The page cache is too small, and the device with the map fails for once."""
                nonlocal failures
                failures += 1
                places = [frozenset(places_of(pool, i, (Kind.MAP,))) for i in (0, 1)]
                if failures == 1:
                    volume.tree.forget()
                    for one, there in zip(machine.media, places, strict=True):
                        one.on_read = lambda offset, length, there=there: errno.EIO if offset in there else None
                try:
                    await move_blocks(*args)
                finally:
                    for one in machine.media:
                        one.on_read = lambda offset, length: None

            with mock.patch.object(mover, "move_blocks", fail_once):
                await pool.evacuator.start(medium.path)
                ended = await finished(pool, medium.path)
            assert failures and ended.state == "removed", ended.problem
            assert await read_all(volume) == content
            await assert_sound(pool)

    machine.run(main)


# -- lost devices ------------------------------------------------------------------------------------------------------


def lose_a_device(seed: int) -> None:
    """A pool that was left in good order loses a device for good."""
    disks = (TWO, THREE, (Disk("fast", 60), Disk("fast", 60)))[seed % 3]
    machine = machine_with(disks, seed=seed)
    rng = random.Random(seed)

    async def main() -> None:
        async with filled(machine) as (pool, content):
            engine = pool._engine
            await fill(pool, "deleted", 60, seed=9)
            await fill(pool, "trimmed", 60, seed=8)
            if seed % 2 or len(disks) == 2:
                # So that base devices have data, and map pages.
                for segment in list(engine.segments.by_id.values()):
                    if segment.kind is Kind.LOG and not segment.open and rng.random() < 0.6:
                        await pool._cleaner.mover.move_segment(segment, "base")
                await pool._cleaner.mover.apply_staged()
                await pool.checkpoint()
        head = machine.state.position.log_segment
        head_device = next(row.device for row in machine.state.segments if row.id == head)
        index = rng.choice([i for i in range(len(disks)) if i != head_device])
        medium = machine.media[index]
        there = {row.id for row in machine.state.segments if row.device == index}
        medium.missing = True
        error: TierError | None = None
        try:
            async with machine.open():
                pass
        except TierError as refused:
            error = refused
        assert error is not None and medium.path in str(error) and "--lost" in str(error)
        async with machine.open(give_up=[medium.path]) as pool:
            assert pool.status().state == "online"
            volume = pool.volume("v")
            await volume.write(0, content[:BLOCK_BYTES])
            await pool.volume("trimmed").trim(0, 60 * BLOCK_BYTES)
            await pool.delete_volume("deleted")
            assert (await finished(pool, medium.path)).state == "removed"
            found, lost = await read_what_can_be(volume)
            assert 0 not in lost, "a write makes it good"
            assert lost or not there or index == 2
            for block in set(range(300)) - lost:
                at = block * BLOCK_BYTES
                assert found[at : at + BLOCK_BYTES] == content[at : at + BLOCK_BYTES]
            named = {
                at // BLOCK_BYTES
                for loss in await pool.losses()
                for at in range(loss.offset, loss.offset + loss.length, BLOCK_BYTES)
            }
            assert named == lost
            assert await read_all(pool.volume("trimmed")) == bytes(60 * BLOCK_BYTES)
            report = await pool.check(True)
            assert all("lost to a device error" in problem for problem in report.problems), report.problems
        medium.missing = False  # it is back, and too late
        async with machine.open() as pool:
            assert medium.path not in [device.path for device in pool.status().devices]
            volume = pool.volume("v")
            assert (await read_what_can_be(volume))[1] == lost
            await volume.write(0, content)
            await assert_sound(pool)
            assert await read_all(volume) == content
        assert medium.cache[:8] != bytes(8), "nobody touches it"

    machine.run(main)


@pytest.mark.parametrize("seed", range(18))
def test_a_device_lost_for_good_costs_what_was_only_there_and_everything_else_lives(seed: int) -> None:
    lose_a_device(seed)


def test_a_device_that_held_the_newest_log_is_given_up_only_with_the_log() -> None:
    machine = machine_with(THREE)

    async def main() -> None:
        with contextlib.suppress(PowerCutError):
            async with filled(machine) as (pool, _):
                await pool.volume("v").write(0, b"x" * BLOCK_BYTES)
                await pool.volume("v").flush()
                index = pool._engine.log.head.device.index
                machine.stop()
                await trio.lowlevel.checkpoint()
        machine.power_cut()
        medium = machine.media[index]
        medium.missing = True

        async def give_up() -> None:
            async with machine.open(give_up=[medium.path]):
                pass

        error = await refusal(give_up)
        assert "newest part of the log" in str(error) and "--truncate-log" in str(error) and medium.path in str(error)
        medium.missing = False
        async with machine.open() as pool:  # nothing was changed by the refusal
            assert (await read_all(pool.volume("v")))[:BLOCK_BYTES] == b"x" * BLOCK_BYTES
            assert {device.state for device in pool.status().devices} == {"online"}

    machine.run(main)


def test_with_the_log_that_was_there_a_device_can_be_given_up_and_what_is_left_is_an_earlier_state() -> None:
    machine = machine_with(THREE)

    async def main() -> None:
        with contextlib.suppress(PowerCutError):
            async with filled(machine) as (pool, content):
                await pool.volume("v").write(0, b"x" * BLOCK_BYTES)
                await pool.volume("v").flush()
                index = pool._engine.log.head.device.index
                machine.stop()
                await trio.lowlevel.checkpoint()
        machine.power_cut()
        medium = machine.media[index]
        medium.missing = True
        async with machine.open(give_up=[medium.path], truncate_log=True) as pool:
            assert pool.status().state == "online"
            assert (await finished(pool, medium.path)).state == "removed"
            volume = pool.volume("v")
            found, lost = await read_what_can_be(volume)
            for block in set(range(300)) - lost:
                at = block * BLOCK_BYTES
                assert found[at : at + BLOCK_BYTES] == content[at : at + BLOCK_BYTES]
            await volume.write(0, content)
            await assert_sound(pool)

    machine.run(main)


def test_a_poisoned_device_can_be_given_up_and_the_pool_takes_writes_again() -> None:
    machine = machine_with(THREE)

    async def main() -> None:
        async with filled(machine) as (pool, content):
            head = pool._engine.log.head.device.index
        index = next(i for i in range(3) if i != head)
        machine.media[index].failing_syncs = 1
        async with machine.open() as pool:
            assert pool.status().state == "read-only"
        path = machine.media[index].path
        async with machine.open(give_up=[path]) as pool:
            assert pool.status().state == "online", pool.status().problem
            assert (await finished(pool, path)).state == "removed"
            volume = pool.volume("v")
            found, lost = await read_what_can_be(volume)
            for block in set(range(300)) - lost:
                at = block * BLOCK_BYTES
                assert found[at : at + BLOCK_BYTES] == content[at : at + BLOCK_BYTES]
            await volume.write(0, content)
            await assert_sound(pool)
        async with machine.open() as pool:
            assert pool.status().state == "online"

    machine.run(main)


def test_what_may_not_be_given_up_is_refused() -> None:
    machine = machine_with(TWO)

    async def main() -> None:
        async with filled(machine):
            pass

        async def give_up(*paths: str) -> None:
            async with machine.open(give_up=paths):
                pass

        error = await refusal(lambda: give_up(machine.media[1].path))
        assert error.errno == errno.EEXIST and "without --lost" in str(error)
        error = await refusal(lambda: give_up("/nowhere"))
        assert error.errno == errno.ENOENT
        for medium in machine.media:
            medium.missing = True
        error = await refusal(lambda: give_up(*(medium.path for medium in machine.media)))
        assert error.errno == errno.EINVAL and "pool delete" in str(error)

    machine.run(main)
