"""How a stream gets into a file: there whole and durable under its name, or not there at all.

It is written under a temporary name in the same directory, synced, renamed, and the directory synced. A crash leaves
the old state and a `.NAME.PID.part`, which no reader takes for a backup and the next backup into that directory
removes. What is no regular file (a FIFO, a tape) is written as it is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Awaitable, Callable
from enum import Enum
from pathlib import Path
from typing import TypeVar

import trio

from terrace.backup.errors import BackupError
from terrace.backup.write import Sink
from tiers.catalog import sync_directory

BUFFER_BYTES = 1 << 20
PART_SUFFIX = ".part"

ResultT = TypeVar("ResultT")


class FileSink:
    """Writes to a descriptor from a worker thread, 1 MiB at a time. `name` is what errors call it."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        self._buffered: list[bytes] = []
        self._buffered_bytes = self._written_bytes = 0

    async def write(self, data: bytes) -> None:
        self._buffered.append(data)
        self._buffered_bytes += len(data)
        if self._buffered_bytes >= BUFFER_BYTES:
            await self.flush()
        else:
            await trio.lowlevel.checkpoint()

    async def flush(self) -> None:
        """Hand on what is buffered. Not a sync."""
        data, self._buffered, self._buffered_bytes = b"".join(self._buffered), [], 0
        # A pipe may block for as long as its reader likes; whoever stops the program doesn't wait for that.
        await trio.to_thread.run_sync(self._write_all, data, abandon_on_cancel=True)

    def _write_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                written = os.write(self._descriptor, view)
            except OSError as error:
                raise _cannot_write(self._name, error, f" at byte {self._written_bytes}") from None
            self._written_bytes += written
            view = view[written:]


async def write_file(path: Path, write: Callable[[Sink], Awaitable[ResultT]]) -> ResultT:
    """What `write` returns, once all that it wrote is durable in `path`. Raises BackupError if `path` exists."""
    kind = await trio.to_thread.run_sync(_kind, path)
    if kind is _Kind.SPECIAL:
        return await _write_special(path, write)
    if kind is _Kind.THERE:
        raise BackupError(errno.EEXIST, f"{path} exists; remove it, or name another file")
    part = path.with_name(f".{path.name}.{os.getpid()}{PART_SUFFIX}")
    descriptor = _open(part, os.O_CREAT | os.O_TRUNC, str(path))
    try:
        try:
            sink = FileSink(descriptor, str(path))
            result = await write(sink)
            await sink.flush()
            await trio.to_thread.run_sync(_sync, descriptor, path)
        finally:
            os.close(descriptor)
        await trio.to_thread.run_sync(_put_in_place, part, path)
        return result
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


async def _write_special(path: Path, write: Callable[[Sink], Awaitable[ResultT]]) -> ResultT:
    descriptor = _open(path, 0, str(path))
    try:
        if os.isatty(descriptor):
            raise BackupError(errno.EINVAL, f"{path} is a terminal; a backup goes to a file or a pipe")
        sink = FileSink(descriptor, str(path))
        result = await write(sink)
        await sink.flush()
        return result
    finally:
        os.close(descriptor)


class _Kind(Enum):
    MISSING, THERE, SPECIAL = range(3)


def _kind(path: Path) -> _Kind:
    """Blocks."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return _Kind.MISSING
    except OSError as error:
        raise _cannot_write(str(path), error) from None
    if stat.S_ISDIR(mode):
        raise BackupError(errno.EISDIR, f"{path} is a directory; --to {path} keeps a chain of backups there")
    return _Kind.THERE if stat.S_ISREG(mode) else _Kind.SPECIAL


def _open(path: Path, flags: int, name: str) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o600)
    except OSError as error:
        raise _cannot_write(name, error) from None


def _sync(descriptor: int, path: Path) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise _cannot_write(str(path), error) from None


def _put_in_place(part: Path, path: Path) -> None:
    try:
        part.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        raise _cannot_write(str(path), error) from None


def _cannot_write(name: str, error: OSError, where: str = "") -> OSError:
    if error.errno == errno.EPIPE:
        return error
    step = "make room or name another place" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see that it can"
    return BackupError(error.errno or errno.EIO, f"{name} can't be written{where}: {error.strerror}; {step}")
