"""After any crash a pool whose catalog is lost as well is rebuilt from its devices, as good as with the catalog."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import trio

from tests.simulation.machine import Disk, Machine, PowerCutError, SimDevice
from tests.simulation.oracle import BLOCK, OracleError, read_all, require_sound
from tests.simulation.workload import LAYOUTS, NO_CRASH, TIGHT_LAYOUTS, Driver, random_machine
from tiers import PoolSettings, TierError
from tiers.copies import CopyWriter
from tiers.rebuild import reconcile, scan_devices
from tiers.record import Kind

SEEDS = range(300, 316)


async def lose_catalog(machine: Machine) -> None:
    """Forget the catalog, and put in its place what the devices say."""
    devices = [SimDevice(machine, medium) for medium in machine.media]
    machine.state = reconcile(await scan_devices(devices), devices)
    for device in devices:
        device.close()


def crash_behind_commit(machine: Machine, rng: random.Random, commits: int, within: int = 7) -> None:
    """Arrange for a crash between a commit (so many from now) and its copy, or soon after."""

    def step(kind: str) -> None:
        nonlocal commits
        if kind == "commit":
            commits -= 1
            if commits == 0:
                machine.countdown = rng.randrange(2, within)

    machine.on_step = step


def search(seed: int, *, lives: int = 6, count: int = 40, loss: float = 0.7, tight: bool = False) -> Driver:
    """A seeded run of several lives, most of which end with a crash and the loss of the catalog.

    `tight`: the pool is too small, so that places are reused before the next checkpoint.
    """
    machine = random_machine(seed, layouts=TIGHT_LAYOUTS if tight else LAYOUTS)
    rng = random.Random(seed ^ 0xC0B1)
    driver = Driver(machine, volume_bytes=rng.choice((512 << 10, 1 << 20, 3 << 19)))
    driver.may_be_full = tight

    async def main() -> None:
        async with machine.open():  # from here on there is a copy
            pass
        for _ in range(lives):
            crash = rng.choice((None, rng.randrange(1, 60), rng.randrange(1, 60), rng.randrange(1, 1500)))
            if rng.random() < 0.5:
                crash = None
                crash_behind_commit(machine, rng, rng.choice((1, 1, 2, 3, rng.randrange(1, 20))))
            with trio.fail_after(3600):
                await driver.life(count=count, crash=(crash, None, None))
            machine.on_step = lambda kind: None
            driver.after()
            if rng.random() < loss:
                await lose_catalog(machine)
        with trio.fail_after(3600):
            async with machine.open() as pool:
                await driver.judge(pool)

    machine.run(main)
    return driver


@pytest.mark.parametrize("seed", SEEDS)
def test_after_any_crash_a_rebuilt_pool_holds_a_prefix_and_is_sound(seed: int) -> None:
    search(seed)


@pytest.mark.parametrize("seed", range(400, 408))
def test_after_any_crash_a_rebuilt_pool_that_was_full_holds_a_prefix_and_is_sound(seed: int) -> None:
    search(seed, tight=True)


def two_lives_without_a_copy(seed: int) -> None:
    """A life ends between a commit and its copy, so does the recovery after it, and then the catalog is lost.

    A small volume that is overwritten fast: the log of one checkpoint holds segments that the next one frees.
    """
    settings = PoolSettings(checkpoint_interval_s=0.03, overlay_entries=4096, unsynced_cap_bytes=4 << 20)
    machine = Machine((Disk("fast", 40, 64 << 10),), seed=seed, settings=settings)
    rng = random.Random(seed ^ 0xC0B2)
    driver = Driver(machine, volumes=1, volume_bytes=128 << 10)

    async def main() -> None:
        with trio.fail_after(3600):
            await driver.life(count=10, crash=NO_CRASH)
            driver.after()
            for commits in (rng.randrange(3, 12), 1):
                crash_behind_commit(machine, rng, commits, within=3)
                await driver.life(count=300, crash=NO_CRASH)
                machine.on_step = lambda kind: None
                driver.after()
            await lose_catalog(machine)
            async with machine.open() as pool:
                await driver.judge(pool)

    machine.run(main)


@pytest.mark.parametrize("seed", range(24))
def test_lives_that_end_before_their_first_copy_leave_the_last_one_true(seed: int) -> None:
    two_lives_without_a_copy(seed)


@pytest.mark.parametrize("seed", range(8))
def test_recoveries_that_crash_again_and_again_lose_nothing_when_the_catalog_goes_each_time(seed: int) -> None:
    machine = Machine((Disk("fast", 30), Disk("base", 30)), seed=seed)
    rng = random.Random(seed)
    content = bytes([7]) * (40 * BLOCK)

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 96 * BLOCK)
            await volume.write(BLOCK + 3, content)
            await volume.trim(2 * BLOCK, 3 * BLOCK)
            await volume.flush()
            machine.stop()
            await trio.lowlevel.checkpoint()
        machine.power_cut()
        for _ in range(25):
            if rng.random() < 0.4:
                await lose_catalog(machine)
            machine.countdown = rng.randrange(1, 60)
            with contextlib.suppress(PowerCutError):
                async with machine.open():
                    machine.countdown = None
                    machine.stop()
                    await trio.lowlevel.checkpoint()
            machine.power_cut()
        await lose_catalog(machine)
        async with machine.open() as pool:
            expected = bytearray(96 * BLOCK)
            expected[BLOCK + 3 : BLOCK + 3 + len(content)] = content
            expected[2 * BLOCK : 5 * BLOCK] = bytes(3 * BLOCK)
            assert await read_all(pool.volume("v")) == expected
            await require_sound(pool)

    machine.run(main)


# -- the search can say no ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _free_before_the_copy() -> Iterator[None]:
    """A copy only after every third checkpoint, but space given out after each."""
    honest = CopyWriter._append
    count = 0

    async def append(self: CopyWriter) -> None:
        nonlocal count
        count += 1
        if count % 3 == 0 or self._last is None:
            await honest(self)

    async def verify(self: CopyWriter) -> list[str]:
        return []  # it would tell at once

    with mock.patch.object(CopyWriter, "_append", append), mock.patch.object(CopyWriter, "verify", verify):
        yield


@contextlib.contextmanager
def _forget_what_was_freed() -> Iterator[None]:
    """The next life takes what the catalog's checkpoint found free for free, whether its copy is durable or not."""

    async def settle(self: CopyWriter, position: Any) -> None:
        segments = self._engine.segments
        for segment in list(segments.by_id.values()):
            if segment.kind is Kind.CATALOG:
                continue
            if not segment.live and not segment.pending and segment.id != position.log_segment:
                segments.forget(segment)

    with mock.patch.object(CopyWriter, "settle", settle):
        yield


@contextlib.contextmanager
def _copies_without_a_flush() -> Iterator[None]:
    """Space is given out while the copy may still be lost."""
    honest = CopyWriter.write

    async def write(self: CopyWriter) -> None:
        async def nothing() -> None:
            await trio.lowlevel.checkpoint()

        with mock.patch.object(self._engine.flusher, "flush", nothing):
            await honest(self)

    with mock.patch.object(CopyWriter, "write", write):
        yield


MUTANTS: dict[str, tuple[Callable[[], Any], Callable[[int], Any]]] = {
    "space given out before the copy": (_free_before_the_copy, search),
    "a life that takes what an earlier one needs": (_forget_what_was_freed, two_lives_without_a_copy),
    "copies that are not flushed": (_copies_without_a_flush, search),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_search_finds(name: str) -> None:
    mutant, seeded = MUTANTS[name]
    with mutant(), pytest.raises((OracleError, TierError, AssertionError)):
        for seed in range(300, 360):
            seeded(seed)
