"""Victims of the cleaner that are reused before the checkpoint that shows them empty (design rule 7).

A pool so full that writers wait for the cleaner all the time, crashed at random: whatever the checkpoint's map still
names in a reused place, the log after it must make good.
"""

from __future__ import annotations

import contextlib
import errno
import random
from unittest import mock

import pytest

from tests.simulation.machine import Disk, Machine, PowerCutError
from tests.simulation.oracle import BLOCK, Model, Op, require_sound
from tests.simulation.workload import Driver
from tiers import TierError, checkpoint, recovery
from tiers.device import Device
from tiers.record import Kind
from tiers.segments import Segment, SegmentTable
from tiers.settings import PoolSettings

LAYOUTS = ((Disk("fast", 96),), (Disk("fast", 48), Disk("base", 64)), (Disk("fast", 40), Disk("fast", 56)))
FILLED_SHARE = 0.72
RUN = 16 * BLOCK


def crowded(seed: int) -> tuple[Driver, random.Random]:
    """A machine, and the load for it: one volume that fills its pool, and no checkpoint unless somebody needs one."""
    rng = random.Random(seed)
    disks = rng.choice(LAYOUTS)
    settings = PoolSettings(
        checkpoint_interval_s=30.0,
        checkpoint_log_bytes=1 << 30,
        overlay_entries=4096,
        unsynced_cap_bytes=4 << 20,
        map_cache_bytes=rng.choice((0, 1 << 20)),
        small_volume_leaves=rng.choice((0, 8192)),
        compression_level=0,  # else it would not be crowded
    )
    machine = Machine(disks, seed=seed, settings=settings)
    slots = sum(disk.segments * disk.segment_bytes // BLOCK for disk in disks)
    return Driver(machine, volumes=1, volume_bytes=int(slots * FILLED_SHARE) * BLOCK // RUN * RUN), rng


async def fill(driver: Driver) -> None:
    """A life in which the volume is made and written from end to end."""
    async with driver.machine.open() as pool:
        volume = await pool.create_volume("v0", driver.volume_bytes)
        model = driver.models["v0"] = Model(driver.volume_bytes)
        for at in range(0, driver.volume_bytes, RUN):
            op = Op("fill", [(at, driver._bytes(RUN))])
            await volume.write(*op.changes[0])
            model.returned(op)
    model.flushed(model.mark)


def lives(driver: Driver, rng: random.Random, count: int) -> int:
    """Fill the volume, then overwrite it at random, with crashes mostly soon after a victim was reused.

    Returns how many were. Raises OracleError where the promise is broken.
    """
    machine = driver.machine
    reused = 0
    reuse = SegmentTable.reuse

    def about_to_crash(table: SegmentTable, segment: Segment) -> None:
        nonlocal reused
        reused += 1
        reuse(table, segment)
        if rng.random() < 0.1 and not machine.is_off:
            machine.countdown = rng.randrange(1, 60)

    async def main() -> None:
        await fill(driver)
        with mock.patch.object(SegmentTable, "reuse", about_to_crash):
            for _ in range(count):
                await driver.life(count=150, crash=(rng.choice((None, rng.randrange(1, 200))), None, None))
                driver.after()
        async with machine.open() as pool:
            await driver.judge(pool)

    machine.run(main)
    return reused


@pytest.mark.parametrize("seed", range(6))
def test_no_crash_shows_that_a_victim_was_reused(seed: int) -> None:
    assert lives(*crowded(seed), count=8)


def test_a_replay_meets_segments_in_places_that_were_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[int] = []
    adopt = SegmentTable.adopt_from_log

    def counted(table: SegmentTable, segment_id: int, device: Device, index: int, kind: Kind) -> Segment:
        before = set(table.gone)
        segment = adopt(table, segment_id, device, index, kind)
        replaced.extend(table.gone - before)
        return segment

    monkeypatch.setattr(SegmentTable, "adopt_from_log", counted)
    for seed in (103, 106, 107):
        lives(*crowded(seed), count=8)
    assert replaced


def test_a_move_that_cannot_be_read_back_is_refused_and_costs_nothing_once_it_can() -> None:
    refused = 0

    async def unreadable(*_: object) -> None:
        raise TierError(errno.EIO, "a sector that can't be read")

    def crash_soon(table: SegmentTable, segment: Segment) -> None:
        reuse(table, segment)
        driver.machine.countdown = driver.machine.countdown or 40

    async def main() -> None:
        nonlocal refused
        await fill(driver)
        with mock.patch.object(SegmentTable, "reuse", crash_soon):
            await driver.life(count=400)
        machine.kill()
        with mock.patch.object(recovery, "_apply_move", unreadable):
            try:
                async with machine.open():
                    pass
            except TierError as error:
                refused += 1
                assert "can't be followed" in str(error) and "--truncate-log" in str(error)
        async with machine.open() as pool:
            await driver.judge(pool)

    for seed in range(4):
        driver, _ = crowded(seed)
        machine, reuse = driver.machine, SegmentTable.reuse
        machine.run(main)
    assert refused


@pytest.mark.parametrize("crashes", [False, True])
def test_what_dead_leaves_go_on_naming_is_no_damage(crashes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deleted volume's map may outlive checkpoints, while the cleaner reuses the segments that it names."""
    monkeypatch.setattr(checkpoint, "DEAD_PAGES_A_CHECKPOINT", 2)
    monkeypatch.setattr(checkpoint, "DEAD_SLICE_PAGES", 2)
    machine = Machine((Disk("fast", 200),), seed=1, settings=PoolSettings(checkpoint_interval_s=3600))
    rng = random.Random(1)

    async def main() -> None:
        with contextlib.suppress(PowerCutError):
            async with machine.open() as pool:
                engine = pool._engine
                kept = await pool.create_volume("kept", 1 << 30)
                dropped = await pool.create_volume("dropped", 64 << 20)
                for i in range(60):  # their blocks share segments, and each of those dropped has a leaf of its own
                    await dropped.write(i << 20, rng.randbytes(BLOCK))
                    await kept.write(4 * i << 20, rng.randbytes(4 * BLOCK))
                for i in range(40):
                    await kept.write((600 << 20) + i * RUN, rng.randbytes(RUN))
                await pool.checkpoint()
                await pool.delete_volume("dropped")
                await pool.checkpoint()
                victims = [
                    segment
                    for segment in engine.segments.by_id.values()
                    if segment.kind is Kind.LOG and not segment.open and segment.live
                ][:3]
                for victim in victims:
                    await pool._cleaner.mover.move_segment(victim, "fast")
                await pool._cleaner.mover.apply_staged()
                assert await engine.reuse(victims) == 3
                if crashes:
                    machine.crash_at = ("checkpoint.flushed", 0)  # map pages stand in the victims' places by then
                await pool.checkpoint()
                assert len(engine.dead) > 20
                await require_sound(pool)
        machine.kill()
        async with machine.open() as pool:
            await require_sound(pool)
            for _ in range(30):
                await pool.checkpoint()
            assert not pool._engine.dead
            await require_sound(pool)

    machine.run(main)
