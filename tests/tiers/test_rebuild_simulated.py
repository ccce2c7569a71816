"""After any crash a pool whose catalog is lost as well is rebuilt from its devices, as good as with the catalog."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import trio

from tests.tiers.faults import Disk, Machine, PowerCutError, SimDevice
from tests.tiers.oracle import BLOCK, Driver, OracleError, random_machine, read_all, require_sound
from tiers import PoolSettings, TierError
from tiers.copies import CopyWriter
from tiers.rebuild import reconcile, scan_devices

SEEDS = range(300, 316)


async def lose_catalog(machine: Machine) -> None:
    """Forget the catalog, and put in its place what the devices say."""
    devices = [SimDevice(medium) for medium in machine.media]
    machine.state = reconcile(await scan_devices(devices), devices)
    for device in devices:
        device.close()


def search(seed: int, *, lives: int = 6, count: int = 40, loss: float = 0.7) -> Driver:
    """A seeded run of several lives, most of which end with a crash and the loss of the catalog."""
    machine = random_machine(seed)
    rng = random.Random(seed ^ 0xC0B1)
    driver = Driver(machine, volume_bytes=rng.choice((512 << 10, 1 << 20, 3 << 19)))

    async def main() -> None:
        async with machine.open():  # from here on there is a copy
            pass
        for _ in range(lives):
            crash = rng.choice((None, rng.randrange(1, 60), rng.randrange(1, 60), rng.randrange(1, 1500)))
            with trio.fail_after(3600):
                await driver.life(count=count, crash_after=crash)
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
