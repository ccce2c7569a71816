"""A simulated machine for the engine: devices that lie only where real ones do, an atomic catalog, no threads.

What a device holds is kept in two layers. `cache` is what the kernel shows; `durable` is what a power cut can't take.
A write changes the cache and is remembered as unsynced; `sync` makes durable what had been written before it was
called. A power cut keeps an arbitrary (seeded) subset of the unsynced 512-byte sectors, whatever their order. A sync
that fails forgets what was dirty, as Linux does: the cache goes on showing bytes that the medium never gets.

`Machine.countdown` crashes the machine at the n-th operation on any device or the catalog, before, in the middle of or
after it. From then on nothing can be changed, so that the engine's own clean-up code can't help.

Everything is a function of the seed: `Machine.run` makes trio's scheduler deterministic, and its clock jumps.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import random
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import trio
import trio.testing

import tiers.overlay
import tiers.pool
import tiers.volume
from tiers.catalog import CATALOG_NAME, Catalog, Change, DeviceRow, Position, State
from tiers.errors import TierError
from tiers.label import LABEL_BYTES, LABEL_OFFSETS, Label, Tier, encode_label, newest_label
from tiers.layout import LABEL_AREA_BYTES
from tiers.pool import Pool
from tiers.settings import PoolSettings

Buffer = bytes | bytearray | memoryview

SECTOR = 512
SEGMENT_BYTES = 128 << 10
POOL_UUID = bytes(range(16))

_fds = itertools.count(1000)


class PowerCutError(TierError):
    """The machine is off."""

    def __init__(self) -> None:
        super().__init__(errno.EIO, "the simulated machine is off")


class Medium:
    """The bytes of one device, which outlive every process and power cut."""

    def __init__(self, machine: Machine, path: str, label: Label) -> None:
        self.machine = machine
        self.path = path
        self.size = label.size_bytes
        self.cache = mmap.mmap(-1, self.size)
        self.durable = mmap.mmap(-1, self.size)
        self.unsynced: list[tuple[int, bytes]] = []
        self.lost: set[int] = set()
        """Sectors that a failed sync dropped: the cache shows other bytes than the medium has."""
        self.sync_count = 0
        # Faults, off unless a test sets them.
        self.failing_syncs = 0
        self.lying_syncs = False
        self.on_write: Callable[[int, int], tuple[int, int] | None] = lambda offset, length: None
        """(offset, length) -> None, or (errno, bytes that are taken nevertheless); errno 0 is a short write."""
        self.on_read: Callable[[int, int], int | None] = lambda offset, length: None
        self.before_read: Callable[[int, int], Awaitable[None]] | None = None
        self.before_sync: Callable[[], Awaitable[None]] | None = None
        for offset in LABEL_OFFSETS:
            sector = encode_label(label)
            self.cache[offset : offset + len(sector)] = self.durable[offset : offset + len(sector)] = sector

    def write(self, offset: int, data: bytes) -> None:
        """Into the cache."""
        assert offset >= 0 and offset + len(data) <= self.size, "a write past the end of the device"
        self.cache[offset : offset + len(data)] = data
        self.unsynced.append((offset, data))
        if self.lost:
            self.lost.difference_update(range(offset // SECTOR, -(-(offset + len(data)) // SECTOR)))

    def make_durable(self, count: int) -> None:
        """The oldest `count` unsynced writes reach the medium."""
        for offset, data in self.unsynced[:count]:
            self.durable[offset : offset + len(data)] = data
        del self.unsynced[:count]

    def drop_dirty(self, count: int) -> None:
        """A sync failed: the oldest `count` writes are marked clean without having reached the medium."""
        for offset, data in self.unsynced[:count]:
            self.lost.update(range(offset // SECTOR, -(-(offset + len(data)) // SECTOR)))
        del self.unsynced[:count]

    def power_cut(self, rng: random.Random) -> None:
        """Keep some of the unsynced sectors, lose the rest and the cache."""
        touched = [(sector * SECTOR, SECTOR) for sector in self.lost]
        keep_write = rng.choice((0.0, 0.2, 0.5, 0.8, 0.95, 1.0))
        tear = rng.choice((0.0, 0.1, 0.5))
        for offset, data in self.unsynced:
            touched.append((offset, len(data)))
            kept = rng.random() < keep_write
            torn = rng.random() < tear
            if not torn:
                if kept:
                    self.durable[offset : offset + len(data)] = data
                continue
            share = rng.random()
            for at in range(0, len(data), SECTOR):
                if rng.random() < share:
                    self.durable[offset + at : offset + at + len(data[at : at + SECTOR])] = data[at : at + SECTOR]
        for offset, length in touched:
            self.cache[offset : offset + length] = self.durable[offset : offset + length]
        self.unsynced.clear()
        self.lost.clear()

    def flip(self, offset: int, bit: int = 0) -> None:
        """Rot: one bit, on the medium and in the cache."""
        for layer in (self.cache, self.durable):
            layer[offset] ^= 1 << bit

    def direct(self, offset: int, length: int) -> bytearray:
        """What a read past the page cache gives: dirty pages are written back first, lost ones can't be."""
        result = bytearray(self.cache[offset : offset + length])
        if self.lost:
            for sector in range(offset // SECTOR, -(-(offset + length) // SECTOR)):
                if sector in self.lost:
                    at = sector * SECTOR - offset
                    result[at : at + SECTOR] = self.durable[sector * SECTOR : sector * SECTOR + SECTOR]
        return result


class SimDevice:
    """`tiers.device.Device` over a medium, for as long as one process has it open."""

    def __init__(self, medium: Medium) -> None:
        self.medium = medium
        self.machine = medium.machine
        self.path = medium.path
        self.label = newest_label([medium.cache[o : o + LABEL_BYTES] for o in LABEL_OFFSETS])
        self.fd = -next(_fds)
        self.segment_count = (self.label.size_bytes - LABEL_AREA_BYTES) // self.label.segment_bytes
        self.free: list[int] = []
        self.unsynced_bytes = 0
        self.written_bytes = 0
        self.poisoned: str | None = None
        self.error_count = 0
        self.machine.by_fd[self.fd] = self

    @property
    def index(self) -> int:
        return self.label.device_index

    @property
    def tier(self) -> Tier:
        return self.label.tier

    @property
    def segment_bytes(self) -> int:
        return self.label.segment_bytes

    def segment_offset(self, physical_index: int) -> int:
        return LABEL_AREA_BYTES + physical_index * self.label.segment_bytes

    def _check_writable(self) -> None:
        if self.poisoned:
            raise TierError(errno.EIO, f"{self.path} takes no writes: {self.poisoned}")

    def _take(self, offset: int, data: bytes) -> None:
        """One write arrives at the kernel; the machine may go down in the middle."""
        when = self.machine.step("write")
        if when == "middle":
            data = data[: self.machine.rng.randrange(len(data) + 1)]
        fault = self.medium.on_write(offset, len(data))
        if fault is not None:
            number, taken = fault
            self.medium.write(offset, data[:taken])
            self.error_count += 1
            raise TierError(number or errno.EIO, f"writing {self.path} at {offset}: {taken} bytes were taken")
        if when != "before":
            self.medium.write(offset, data)
        if when is not None:
            self.machine.off()

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._check_writable()
        assert 0 < len(buffers) <= 1023
        data = b"".join(bytes(buffer) for buffer in buffers)
        self.unsynced_bytes += len(data)
        self.written_bytes += len(data)
        self._take(offset, data)

    async def write_behind(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._check_writable()
        data = b"".join(bytes(buffer) for buffer in buffers)
        half = len(data) // 2 // SECTOR * SECTOR
        try:
            await self.machine.pause()
            self._take(offset, data[:half])
            await self.machine.pause()
            self._take(offset + half, data[half:])
            await self.machine.pause()
        finally:
            self.unsynced_bytes += len(data)
            self.written_bytes += len(data)

    def read_now(self, offset: int, into: memoryview) -> bool:
        if self.machine.rng.random() < self.machine.cold_share or self.medium.on_read(offset, len(into)):
            return False
        into[:] = self.medium.cache[offset : offset + len(into)]
        return True

    async def read(self, offset: int, length: int) -> bytearray:
        return (await self.read_many([(offset, length)]))[0]

    async def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytearray]:
        buffers = []
        for offset, length in ranges:
            await self._about_to_read(offset, length)
            buffers.append(bytearray(self.medium.cache[offset : offset + length]))
        await self.machine.pause()
        return buffers

    async def read_direct(self, offset: int, length: int) -> bytearray:
        await self._about_to_read(offset, length)
        return self.medium.direct(offset, length)

    async def _about_to_read(self, offset: int, length: int) -> None:
        assert offset >= 0 and offset + length <= self.medium.size, "a read past the end of the device"
        await self.machine.pause()
        if self.medium.before_read is not None:
            await self.medium.before_read(offset, length)
        if self.machine.step("read") is not None:
            self.machine.off()
        number = self.medium.on_read(offset, length)
        if number is not None:
            self.error_count += 1
            raise TierError(number, f"reading {self.path} at {offset}: {os.strerror(number)}")

    async def sync(self) -> None:
        medium = self.medium
        covered = len(medium.unsynced)
        await self.machine.pause()
        if medium.before_sync is not None:
            await medium.before_sync()
        when = self.machine.step("sync")
        medium.sync_count += 1
        if medium.failing_syncs:
            medium.failing_syncs -= 1
            medium.drop_dirty(covered)
            self.error_count += 1
            raise TierError(errno.EIO, f"fdatasync of {self.path}: {os.strerror(errno.EIO)}")
        if medium.lying_syncs:
            covered = 0
        if when == "middle":
            covered = self.machine.rng.randrange(covered + 1)
        if when != "before":
            medium.make_durable(covered)
        if when is not None:
            self.machine.off()
        await self.machine.pause()

    def write_label(self, label: Label) -> None:
        self.write(LABEL_OFFSETS[label.generation % 2], [encode_label(label).ljust(4096, b"\0")])
        self.label = label

    def close(self) -> None:
        self.machine.by_fd.pop(self.fd, None)


class MemoryCatalog:
    """Stands in for `tiers.catalog.Catalog`: a commit is one atomic, durable event."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def load(self) -> State:
        return self._machine.state

    def commit(self, change: Change) -> None:
        machine = self._machine
        when = machine.step("commit")
        if when != "before":
            machine.state = _changed(machine.state, change)
            machine.commits += 1
        if when is not None:
            machine.off()

    def mark_poisoned(self, index: int, why: str) -> None:
        self._machine.step("commit")
        state = self._machine.state
        devices = [replace(row, poisoned=why) if row.index == index else row for row in state.devices]
        self._machine.state = replace(state, devices=devices)

    def lay_ballast(self) -> None:
        """There is no file system to run full."""

    def close(self) -> None:
        """Nothing is held."""


def _changed(state: State, change: Change) -> State:
    segments = {row.id: row for row in state.segments if row.id not in set(change.freed_segments)}
    segments.update((row.id, row) for row in change.segments)
    removed = set(change.dead_removed)
    dead = {row[0]: row for row in state.dead if row[0] not in removed}
    dead.update((row[0], row) for row in change.dead_added)
    devices = {row.index: row for row in state.devices}
    for row in change.devices:
        old = devices.get(row.index)
        devices[row.index] = replace(row, poisoned=(old and old.poisoned) or row.poisoned)
    return State(
        state.pool_name,
        state.pool_uuid,
        replace(change.position),
        [devices[index] for index in sorted(devices)],
        sorted(change.volumes, key=lambda row: row.id),
        list(segments.values()),
        list(dead.values()),
    )


@dataclass(frozen=True)
class Disk:
    """A device to be simulated."""

    tier: Tier = "fast"
    segments: int = 48
    segment_bytes: int = SEGMENT_BYTES


class Machine:
    """Devices, a catalog, and what may happen to them."""

    def __init__(
        self, disks: Sequence[Disk] = (Disk(),), *, seed: int = 0, settings: PoolSettings | None = None
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.settings = settings or PoolSettings(overlay_entries=2048, unsynced_cap_bytes=4 << 20)
        self.by_fd: dict[int, SimDevice] = {}
        self.is_off = False
        self.countdown: int | None = None
        """Operations until the crash."""
        self.on_off: Callable[[], None] = lambda: None
        self.on_step: Callable[[str], None] = lambda kind: None
        self.steps = 0
        self.commits = 0
        self.catalog_directory: Path | None = None
        """Where to keep a real catalog in place of the simulated one."""
        self.small_volume_leaves = tiers.overlay.SMALL_VOLUME_LEAVES
        self.cold_share = 0.0
        """How often a read that could be served from the cache is not."""
        self.pauses = 2
        """An operation yields to the other tasks up to so many times."""
        self.media: list[Medium] = []
        rows = []
        for index, disk in enumerate(disks):
            size = LABEL_AREA_BYTES + disk.segments * disk.segment_bytes
            label = Label(
                disk.tier, index, POOL_UUID, bytes([index + 1] * 16), size, disk.segment_bytes, 1, 0, frozenset(), "sim"
            )
            path = f"/simulated/{disk.tier}{index}"
            self.media.append(Medium(self, path, label))
            rows.append(DeviceRow(index, label.device_uuid, path, disk.tier, size, disk.segment_bytes, None))
        self.state = State("sim", POOL_UUID, Position(0, 0, 0, 0, 0, 1, 1), rows, [], [], [])

    # -- faults ------------------------------------------------------------------------------------------------------

    def step(self, kind: str) -> str | None:
        """An operation is about to happen: None, or where in it ("before", "middle", "after") the machine goes down."""
        if self.is_off:
            raise PowerCutError
        self.steps += 1
        self.on_step(kind)
        if self.countdown is not None:
            self.countdown -= 1
            if self.countdown <= 0:
                return self.rng.choice(("before", "middle", "after"))
        return None

    def off(self) -> None:
        """Down. Raises, so that the operation in hand never returns."""
        self.stop()
        raise PowerCutError

    def stop(self) -> None:
        """Down, from outside."""
        self.is_off = True
        self.countdown = None
        self.on_off()

    def power_cut(self) -> None:
        """What the media hold when the power is back."""
        self.is_off = False
        for medium in self.media:
            medium.power_cut(self.rng)

    def kill(self) -> None:
        """Only the process died: the kernel still has everything."""
        self.is_off = False

    async def pause(self) -> None:
        """Yield, a few times or not at all; at least trio's checkpoint."""
        await trio.lowlevel.checkpoint()
        for _ in range(self.rng.randrange(self.pauses + 1)):
            await trio.lowlevel.checkpoint()

    # -- running -----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def open(self, *, truncate_log: bool = False, settings: PoolSettings | None = None) -> AsyncIterator[Pool]:
        """`Pool.open` over the simulated devices. A crash ends the body by cancelling it."""
        opened = False
        with trio.CancelScope() as scope:
            self.on_off = scope.cancel
            try:
                with self._ungrouped():
                    async with Pool.open(
                        Path("/simulated"), settings=settings or self.settings, truncate_log=truncate_log
                    ) as pool:
                        opened = True
                        yield pool
            except PowerCutError:
                if not opened:
                    raise
            finally:
                self.on_off = lambda: None
        if not opened:
            raise PowerCutError

    @contextlib.contextmanager
    def _ungrouped(self) -> Iterator[None]:
        """Unwrap the group that a nursery puts around an error; when the machine is off that is all there is to say."""
        try:
            yield
        except (BaseExceptionGroup, OSError) as error:
            real = [e for e in _leaves(error) if not isinstance(e, trio.Cancelled)]
            if self.is_off:
                real = [e for e in real if not isinstance(e, OSError)]
            if real:
                raise real[0] from error
            raise PowerCutError from None

    def run(self, body: Callable[[], Awaitable[Any]]) -> Any:
        """Run `body` on this machine in a trio of its own."""
        return run(self, body)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


async def _inline(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
    """In place of `trio.to_thread.run_sync`: other tasks run before and after, as with a real worker."""
    await trio.lowlevel.checkpoint()
    result = function(*args)
    await trio.lowlevel.cancel_shielded_checkpoint()
    return result


def run(machine: Machine, body: Callable[[], Awaitable[Any]]) -> Any:
    """`trio.run` with everything that isn't a function of the seed replaced."""

    def open_devices(state: State, limiter: object) -> list[SimDevice]:
        devices = [SimDevice(medium) for medium in machine.media]
        for device, row in zip(devices, state.devices, strict=True):
            tiers.pool._judge_label(device.label, row, state)
            if row.poisoned or any(row.index in other.label.poisoned for other in devices):
                device.poisoned = row.poisoned or "it failed a flush in an earlier run"
        return devices

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        (into,) = buffers
        if not machine.by_fd[fd].read_now(offset, into):
            raise BlockingIOError(errno.EAGAIN, "not in the cache")
        return len(into)

    def catalog(directory: Path) -> Catalog | MemoryCatalog:
        real = machine.catalog_directory
        if real is None:
            return MemoryCatalog(machine)
        if not (real / CATALOG_NAME).exists():
            state = machine.state
            Catalog.create(real, state.pool_name, state.pool_uuid, state.devices, state.position)
        return Catalog(real)

    @contextlib.contextmanager
    def unlocked(directory: Path) -> Iterator[None]:
        yield

    async def main() -> Any:
        core = trio._core._run
        core._r.seed(machine.seed)  # type: ignore[attr-defined]
        return await body()

    fake_os = types.SimpleNamespace(preadv=preadv, RWF_NOWAIT=os.RWF_NOWAIT)
    with (
        mock.patch.object(tiers.pool, "_open_devices", open_devices),
        mock.patch.object(tiers.pool, "_locked", unlocked),
        mock.patch.object(tiers.pool, "Catalog", catalog),
        mock.patch.object(tiers.volume, "os", fake_os),
        mock.patch.object(tiers.volume, "SMALL_VOLUME_LEAVES", machine.small_volume_leaves),
        mock.patch.object(trio.to_thread, "run_sync", _inline),
        mock.patch.object(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
    ):
        return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
