"""Small pools in a test's own directory, and the few things that most tests of the engine do with them."""

import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from tiers import DeviceSpec, Pool, PoolSettings, TierError, Volume
from tiers.layout import BLOCK_BYTES, MIB
from tiers.snapshot import Snapshot

QUIET = PoolSettings(checkpoint_interval_s=3600.0)
"""No checkpoint unless a test, or need, asks for one."""


def run(body: Callable[[], Awaitable[Any]]) -> Any:
    """Run one async test body; a bound on time turns a hang into a failure."""

    async def bounded() -> Any:
        with trio.fail_after(60):
            return await body()

    return trio.run(bounded)


def specs(directory: Path, *, fast_mib: int = 0, base_mib: int = 0) -> list[DeviceSpec]:
    """Devices to be made as sparse files."""
    devices = []
    if fast_mib:
        devices.append(DeviceSpec(directory / "fast.img", "fast", fast_mib * MIB))
    if base_mib:
        devices.append(DeviceSpec(directory / "base.img", "base", base_mib * MIB))
    return devices


async def make_pool(directory: Path, *, fast_mib: int = 64, base_mib: int = 0, name: str = "p") -> Path:
    """Create a pool on sparse files and return its directory."""
    home = directory / f"pool-{name}"
    await Pool.create(home, name, specs(directory, fast_mib=fast_mib, base_mib=base_mib))
    return home


@contextlib.asynccontextmanager
async def fresh_pool(
    directory: Path, *, fast_mib: int = 64, base_mib: int = 0, settings: PoolSettings = QUIET
) -> AsyncIterator[Pool]:
    """Create a pool, and keep it open while the context lasts."""
    home = await make_pool(directory, fast_mib=fast_mib, base_mib=base_mib)
    async with Pool.open(home, settings=settings) as pool:
        yield pool


async def refusal(action: Callable[[], Awaitable[Any]]) -> TierError:
    """The TierError that `action` raises; the test fails if it raises none, or something else."""
    try:
        await action()
    except TierError as error:
        assert "\n" not in str(error)
        assert str(error)
        return error
    raise AssertionError("nothing was refused")


async def open_refusal(home: Path, *, give_up_map: bool = False) -> TierError:
    """The TierError with which this pool refuses to open."""

    async def action() -> None:
        async with Pool.open(home, settings=QUIET, give_up_map=give_up_map):
            pass

    return await refusal(action)


async def read(volume: Volume | Snapshot, offset: int, length: int) -> bytes:
    """Read through the slow path, which can do all."""
    into = bytearray(b"\xee" * length)
    await volume.read(offset, length, memoryview(into))
    return bytes(into)


def block(seed: int) -> bytes:
    """A block of bytes that no other seed has, never all zero."""
    return random.Random(seed).randbytes(BLOCK_BYTES)


def flip(path: Path, offset: int, mask: int = 0x40) -> None:
    """Damage one byte of a device."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


async def settle(pool: Pool, rounds: int = 8) -> None:
    """Checkpoints until deleted subtrees are walked and what they held is free."""
    for _ in range(rounds):
        await pool.checkpoint()


async def assert_sound(pool: Pool) -> None:
    """The full check finds nothing."""
    report = await pool.check(True)
    assert report.problems == []
    assert report.ok
