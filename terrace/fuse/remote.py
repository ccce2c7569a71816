"""A daemon's volumes as files, in a process of its own that outlives the daemon.

Names and sizes come over the control API, bytes over NBD: a channel for each export that is open (`nbd.channel`), which
waits while the daemon is gone and sends again what it had not answered. Metadata waits too, but not for ever: after
`PATIENCE_S` the caller gets an error.

A volume that a rollback or a new volume has replaced is another one, though it has the same name; what was open stays
the old one, and fails with ESTALE (`terrace.daemonexports`).
"""

from __future__ import annotations

import errno
import math
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import trio

from nbd import wire as nbd_wire
from nbd.channel import Channel, GoneError
from nbd.client import Client, connect
from nbd.negotiate import Terms
from terrace.daemonexports import PATIENCE_S, PAUSE_S, DaemonExports, daemon_exports, gone
from terrace.exports import ExportRecord
from terrace.fuse.device import Device
from terrace.fuse.files import OpenFile
from terrace.fuse.seek import seek
from terrace.fuse.wire import LONGEST_BYTES
from terrace.home import Home

LONG_WRITE_BYTES: Final = 256 << 10
ZERO_PIECE_BYTES: Final = 1 << 30
_ALLOCATION: Final = nbd_wire.META_ALLOCATION


class DaemonDirectory:
    """Implements `terrace.fuse.files.Directory`; `daemon_directory` makes it. `only`: the one export that is shown."""

    def __init__(self, exports: DaemonExports, nursery: trio.Nursery, only: str | None, patience_s: float) -> None:
        self._exports = exports
        self._nursery = nursery
        self._only = only
        self._patience_s = patience_s
        self._open: dict[str, DaemonFile] = {}  # by identity

    async def pools(self) -> Sequence[str]:
        if self._only is not None:
            return [self._only.partition("/")[0]]
        return await self._exports.pools()

    async def exports(self, pool: str) -> Sequence[ExportRecord]:
        if self._only is not None:
            return [await self.export(self._only)] if self._only.startswith(f"{pool}/") else []
        return [self._known(record) for record in await self._exports.exports(pool)]

    async def export(self, name: str) -> ExportRecord:
        if self._only is not None and name != self._only:
            raise FileNotFoundError(errno.ENOENT, f"{name} is not shown here")
        return self._known(await self._exports.export(name))

    def _known(self, record: ExportRecord) -> ExportRecord:
        if (file := self._open.get(record.identity)) is not None:
            file.size_bytes = record.size_bytes
        return record

    async def space(self) -> tuple[int, int]:
        return await self._exports.space()

    async def open(self, record: ExportRecord, device: Device) -> OpenFile:
        file = self._open.get(record.identity)
        if file is None:
            file = DaemonFile(self._exports, record, device, self._nursery, self._closed, self._patience_s)
            try:
                await self._nursery.start(file.run)
            except GoneError as error:
                raise OSError(error.errno, str(error)) from None
            # Two may have opened it at the same time; the other's goes.
            file, spare = self._open.setdefault(record.identity, file), file
            if file is not spare:
                spare.cancel()
        file.users += 1
        return file

    def _closed(self, file: DaemonFile) -> None:
        del self._open[file.record.identity]


@asynccontextmanager
async def daemon_directory(
    home: Home, *, only: str | None = None, patience_s: float = math.inf
) -> AsyncIterator[DaemonDirectory]:
    """The exports of the daemon at `home`, which need not be running yet.

    `only`: the one that is shown. `patience_s`: how long reads and writes wait for a daemon that is gone.
    """
    failure: Exception | None = None
    async with daemon_exports(home) as exports, trio.open_nursery() as nursery:
        try:
            yield DaemonDirectory(exports, nursery, only, patience_s)
        except Exception as error:
            failure = error  # raised behind the nursery, which would wrap it
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class DaemonFile:
    """Implements `terrace.fuse.files.OpenFile` over a channel to the daemon."""

    def __init__(
        self,
        exports: DaemonExports,
        record: ExportRecord,
        device: Device,
        nursery: trio.Nursery,
        closed: Callable[[DaemonFile], None],
        patience_s: float,
    ) -> None:
        self.record = record
        self.size_bytes = record.size_bytes
        self.users = 0
        self._closed = closed
        self._exports = exports
        self._device = device
        self._nursery = nursery
        self._lengths: dict[int, int] = {}  # of WRITEs without an answer
        self._channel = Channel(record.name, self._dial, patience_s=patience_s)
        self._scope = trio.CancelScope()
        self._submit = self._channel.submit

    async def run(self, *, task_status: trio.TaskStatus[Terms] = trio.TASK_STATUS_IGNORED) -> None:
        """Be connected until cancelled. Raises what the first attempt to connect raises."""
        with self._scope:
            await self._channel.run(task_status=task_status)
            await trio.sleep_forever()  # gone for good: every request is told so until the file is closed

    def cancel(self) -> None:
        """End `run`."""
        self._scope.cancel()

    def close(self) -> None:
        self.users -= 1
        if not self.users:
            self._closed(self)
            self.cancel()

    async def _dial(self) -> tuple[socket.socket, Terms]:
        sock, terms = await self._exports.connect(self.record.name, self.record.identity)
        self.size_bytes = terms.size_bytes
        return sock, terms

    async def _gone(self) -> GoneError:
        try:
            now = (await self._exports.export(self.record.name)).identity
        except OSError:
            now = None
        return gone(self.record.name, self.record.identity, now)

    async def _is_gone(self) -> bool:
        return await self._exports.is_gone(self.record.name, self.record.identity)

    # --- what failed ---

    def _failed(self, unique: int, error: int) -> None:
        if error == errno.EIO:
            self._nursery.start_soon(self._explain, unique)
        else:
            self._device.failed(unique, error)

    async def _explain(self, unique: int) -> None:
        """NBD has no ESTALE: the daemon answers EIO for what a rollback has replaced."""
        self._device.failed(unique, errno.ESTALE if await self._is_gone() else errno.EIO)

    # --- the data path ---

    def push(self) -> None:
        self._channel.push()

    def read(self, unique: int, offset: int, length: int) -> None:
        length = min(length, self.size_bytes - offset, LONGEST_BYTES)
        if length <= 0:
            self._device.done(unique)
        else:
            self._submit(nbd_wire.CMD_READ, 0, offset, length, b"", self._have_read, unique)

    def _have_read(self, unique: int, error: int, data: memoryview) -> None:
        if error:
            self._failed(unique, error)
        else:
            self._device.data(unique, data)

    def write(self, unique: int, offset: int, data: memoryview, *, durable: bool) -> None:
        if self.record.read_only:
            self._device.failed(unique, errno.EROFS)
            return
        length = min(len(data), self.size_bytes - offset)
        if length <= 0:
            self._device.failed(unique, errno.ENOSPC)
            return
        self._lengths[unique] = length
        flags = nbd_wire.CMD_FLAG_FUA if durable else 0
        self._submit(nbd_wire.CMD_WRITE, flags, offset, length, data[:length], self._have_written, unique)
        if length >= LONG_WRITE_BYTES:
            self._channel.push()  # the daemon works on it while the next one is read from the kernel

    def _have_written(self, unique: int, error: int, _: memoryview) -> None:
        length = self._lengths.pop(unique)
        if error:
            self._failed(unique, error)
        else:
            self._device.written(unique, length)

    def flush(self, unique: int) -> None:
        self._submit(nbd_wire.CMD_FLUSH, 0, 0, 0, b"", self._have_done, unique)

    def _have_done(self, unique: int, error: int, _: memoryview) -> None:
        if error:
            self._failed(unique, error)
        else:
            self._device.done(unique)

    def zero(self, unique: int, offset: int, length: int, *, keep_space: bool) -> None:
        length = min(length, self.size_bytes - offset)
        if self.record.read_only:
            self._device.failed(unique, errno.EROFS)
        elif length <= 0:
            self._device.done(unique)
        else:
            self._zero_from(offset, offset + length, nbd_wire.CMD_FLAG_NO_HOLE if keep_space else 0, unique, 0, b"")

    def _zero_from(self, at: int, end: int, flags: int, unique: int, error: int, _: object) -> None:
        """Zero the next piece; called with the answer to the last one."""
        if error or at == end:
            self._have_done(unique, error, memoryview(b""))
            return
        length = min(end - at, ZERO_PIECE_BYTES)
        then = partial(self._zero_from, at + length, end, flags)
        self._submit(nbd_wire.CMD_WRITE_ZEROES, flags, at, length, b"", then, unique)
        self._channel.push()

    def seek(self, unique: int, offset: int, *, data: bool) -> None:
        self._nursery.start_soon(self._seek, unique, offset, data)

    async def _seek(self, unique: int, offset: int, data: bool) -> None:
        try:
            found = await self._look_for(offset, data)
        except OSError as error:
            self._device.failed(unique, error.errno or errno.EIO)
        else:
            self._device.found(unique, found)

    async def _look_for(self, offset: int, data: bool) -> int:
        """As metadata, it waits for a daemon that is away, but not for ever."""
        with trio.move_on_after(PATIENCE_S):
            while True:
                try:
                    # Block status needs structured replies, which the channel doesn't speak: a connection of its own.
                    async with connect(
                        await self._exports.address(), self.record.name, contexts=[_ALLOCATION]
                    ) as client:
                        if await self._is_gone():
                            raise await self._gone()
                        return await self._seek_with(client, offset, data)
                except OSError as error:
                    if error.errno in (errno.ENXIO, errno.ESTALE, errno.EIO):
                        raise
                    if isinstance(error, FileNotFoundError) and await self._is_gone():
                        raise await self._gone() from None
                    await trio.sleep(PAUSE_S)
        raise OSError(errno.ETIMEDOUT, f"nobody could tell the extents of {self.record.name} for {PATIENCE_S:g} s")

    async def _seek_with(self, client: Client, offset: int, data: bool) -> int:
        async def extents(at: int, length: int) -> list[tuple[int, int]]:
            return (await client.block_status(at, length))[_ALLOCATION]

        return await seek(extents, client.size_bytes, offset, data=data)
