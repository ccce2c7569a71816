"""The daemon's own volumes as files: no socket between the kernel's request and the engine."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVarTuple

import trio

from nbd.export import Export
from terrace.exports import ExportRecord, Mirrored, PoolExports, find_export, record_of, records_of
from terrace.fuse.device import Device
from terrace.fuse.files import OpenFile
from terrace.fuse.seek import seek
from terrace.fuse.wire import LONGEST_BYTES, REPLY
from terrace.pools import Pools
from tiers import TierError

Ts = TypeVarTuple("Ts")

BATCH_BYTES: Final = 2 << 20
BATCH_WRITES: Final = 256
"""So much goes to the engine in one batch. It takes no more than 4 MiB without waiting."""


class PoolDirectory:
    """Implements `terrace.fuse.files.Directory`. What has to wait becomes a task of `nursery`."""

    def __init__(self, pools: Pools, nursery: trio.Nursery, mirrored: Mirrored | None = None) -> None:
        self._pools = pools
        self._mirrored = mirrored
        self._exports = PoolExports(pools, mirrored)
        self._nursery = nursery
        self._arena = memoryview(bytearray(REPLY.size + LONGEST_BYTES))
        """For replies to READs that need no waiting; each is sent before the next begins."""

    async def pools(self) -> Sequence[str]:
        await trio.lowlevel.checkpoint()
        return [*(pool.name for pool in self._pools.open_pools()), *self._diskless_pools()]

    def _diskless_pools(self) -> list[str]:
        return [] if self._mirrored is None else self._mirrored.diskless.pools()

    async def exports(self, pool: str) -> Sequence[ExportRecord]:
        await trio.lowlevel.checkpoint()
        if self._mirrored is not None and pool in self._diskless_pools():
            return [one.record for one in self._mirrored.diskless.in_pool(pool)]
        try:
            return records_of(self._pools.pool(pool))
        except TierError as error:
            raise _plain(error) from None

    async def export(self, name: str) -> ExportRecord:
        await trio.lowlevel.checkpoint()
        if self._mirrored is not None and (without_leg := self._mirrored.diskless.named(name)) is not None:
            return without_leg.record
        pool_name, _, rest = name.partition("/")
        try:
            pool = self._pools.pool(pool_name)
            return record_of(pool, find_export(pool, rest))
        except TierError as error:
            raise _plain(error) from None

    async def space(self) -> tuple[int, int]:
        await trio.lowlevel.checkpoint()
        statuses = [pool.status() for pool in self._pools.open_pools()]
        return sum(status.capacity_bytes for status in statuses), sum(status.available_bytes for status in statuses)

    async def open(self, record: ExportRecord, device: Device) -> OpenFile:
        export = await self._exports.acquire(record.name)
        # No checkpoint from the look-up of the name to here, so both ask about the same one.
        if self._exports.identity(export) != record.identity:
            self._exports.release(export)
            raise OSError(errno.ESTALE, f"another export is called {record.name} now")
        return PoolFile(export, self._exports.release, device, self._nursery, self._arena)


def _plain(error: TierError) -> OSError:
    return FileNotFoundError(errno.ENOENT, str(error)) if error.errno == errno.ENOENT else error


class PoolFile:
    """Implements `terrace.fuse.files.OpenFile` over an export of this process."""

    def __init__(
        self,
        export: Export,
        release: Callable[[Export], None],
        device: Device,
        nursery: trio.Nursery,
        arena: memoryview,
    ) -> None:
        self.export = export
        self._release = release
        self._device = device
        self._nursery = nursery
        self._arena = arena
        self._writes: list[tuple[int, memoryview]] = []
        self._uniques: list[int] = []
        self._batch_bytes = 0
        self._waiting = 0  # tasks that use the export
        self._closed = False

    @property
    def size_bytes(self) -> int:
        return self.export.size_bytes

    def close(self) -> None:
        """The export is given back when nothing uses it any more: requests may still wait whose users were cut off.

        What is in nobody's use may be shrunk, and a pool of such be closed.
        """
        self._closed = True
        if not self._waiting:
            self._release(self.export)

    def read(self, unique: int, offset: int, length: int) -> None:
        length = min(length, self.export.size_bytes - offset, LONGEST_BYTES)
        if length <= 0:
            self._device.done(unique)
            return
        frame = self._arena[: REPLY.size + length]
        try:
            at_once = self.export.read_now(offset, length, frame[REPLY.size :])
        except OSError as error:
            self._device.failed(unique, error.errno or errno.EIO)
            return
        if at_once:
            self._device.framed(unique, frame)
        else:
            self._start(self._read, unique, offset, length)

    def write(self, unique: int, offset: int, data: memoryview, *, durable: bool) -> None:
        if self.export.read_only:
            self._device.failed(unique, errno.EROFS)
            return
        data = data[: max(0, self.export.size_bytes - offset)]
        if not data:
            self._device.failed(unique, errno.ENOSPC)
        elif durable:
            self._start(self._write, unique, offset, data, True)
        else:
            self._writes.append((offset, data))
            self._uniques.append(unique)
            self._batch_bytes += len(data)
            if self._batch_bytes >= BATCH_BYTES or len(self._writes) >= BATCH_WRITES:
                self.push()

    def push(self) -> None:
        if not self._writes:
            return
        writes, uniques = self._writes, self._uniques
        self._writes, self._uniques, self._batch_bytes = [], [], 0
        try:
            at_once = self.export.write_now(writes)
        except OSError as error:
            if len(writes) == 1:
                self._device.failed(uniques[0], error.errno or errno.EIO)
                return
            at_once = False  # one of them is bad: alone, each of the others may still succeed
        for unique, (offset, data) in zip(uniques, writes, strict=True):
            if at_once:
                self._device.written(unique, len(data))
            else:
                self._start(self._write, unique, offset, data, False)

    def flush(self, unique: int) -> None:
        self._start(self._flush, unique)

    def zero(self, unique: int, offset: int, length: int, *, keep_space: bool) -> None:
        self._start(self._zero, unique, offset, length, keep_space)

    def seek(self, unique: int, offset: int, *, data: bool) -> None:
        self._start(self._seek, unique, offset, data)

    # --- what waits: each is a task, and answers once ---

    def _start(self, function: Callable[[*Ts], Awaitable[None]], *args: *Ts) -> None:
        self._waiting += 1
        self._nursery.start_soon(self._run, function, *args)

    async def _run(self, function: Callable[[*Ts], Awaitable[None]], *args: *Ts) -> None:
        try:
            await function(*args)
        finally:
            self._waiting -= 1
            if self._closed and not self._waiting:
                self._release(self.export)

    async def _read(self, unique: int, offset: int, length: int) -> None:
        frame = memoryview(bytearray(REPLY.size + length))
        try:
            await self.export.read(offset, length, frame[REPLY.size :])
        except OSError as error:
            self._device.failed(unique, error.errno or errno.EIO)
        else:
            self._device.framed(unique, frame)

    async def _write(self, unique: int, offset: int, data: memoryview, durable: bool) -> None:
        try:
            await self.export.write(offset, data)
            if durable:
                await self.export.flush()
        except OSError as error:
            self._device.failed(unique, error.errno or errno.EIO)
        else:
            self._device.written(unique, len(data))

    async def _flush(self, unique: int) -> None:
        try:
            await self.export.flush()
        except OSError as error:
            self._device.failed(unique, error.errno or errno.EIO)
        else:
            self._device.done(unique)

    async def _zero(self, unique: int, offset: int, length: int, keep_space: bool) -> None:
        length = min(length, self.export.size_bytes - offset)
        try:
            if self.export.read_only:
                raise OSError(errno.EROFS, "it is read-only")
            if length > 0:
                await self.export.write_zeroes(offset, length, no_hole=keep_space, fast=False)
        except OSError as error:
            self._device.failed(unique, error.errno or errno.EIO)
        else:
            self._device.done(unique)

    async def _seek(self, unique: int, offset: int, data: bool) -> None:
        async def extents(at: int, length: int) -> list[tuple[int, int]]:
            return await self.export.extents(at, length, 1 << 10)

        try:
            found = await seek(extents, self.export.size_bytes, offset, data=data)
        except OSError as error:
            self._device.failed(unique, error.errno or errno.EIO)
        else:
            self._device.found(unique, found)
