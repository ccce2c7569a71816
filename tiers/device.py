"""A device: bytes at offsets, on a file or a block device, and what is known about their safety.

Three ways in and out. `write` and `read_now` are synchronous calls for the trio thread: a buffered write, and a read
that succeeds only if the page cache has the bytes. `read`, `read_direct` and `sync` are awaited; their work happens in
worker threads, in few large calls. The simulation brings another class with the same methods and no threads.

`unsynced_bytes` counts what a power cut could still take. A device whose fdatasync failed once is *poisoned* for good:
the page cache may go on showing bytes that never reached the medium (DESIGN: a failed fsync is final), so nothing is
written to it any more, whatever a later fdatasync says.
"""

import errno
import fcntl
import logging
import mmap
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeVar, TypeVarTuple, get_args

import trio

from tiers.errors import TierError
from tiers.label import LABEL_BYTES, LABEL_OFFSETS, Label, Tier, encode_label, newest_label
from tiers.layout import BLOCK_BYTES, LABEL_AREA_BYTES
from tiers.probe import size_of
from tiers.rotational import rotates

logger = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview

_WORKERS = 16
_DIRECT_CHUNK = 4 << 20

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


DeviceState = Literal["online", "evacuating", "lost", "removed"]
"""`evacuating`: nothing new is put there. `lost`: it is gone for good, and the operator has accepted that. `removed`:
only the catalog remembers it, so that its index is given to no other device and it isn't taken for a new one."""
DEVICE_STATES: tuple[DeviceState, ...] = get_args(DeviceState)


class Offload(Protocol):
    """Runs a function that blocks, or computes for long without the GIL: in a worker thread, or simulated."""

    def __call__(self, function: Callable[[*Ts], T], *args: *Ts) -> Awaitable[T]: ...


class Device(Protocol):
    """What the engine needs of a device."""

    path: str
    label: Label
    fd: int
    segment_count: int
    free: list[int]
    unsynced_bytes: int
    unnamed_bytes: int
    """Of the unsynced bytes, copies that no record names yet: see `tiers.flush`."""
    written_bytes: int
    poisoned: str | None
    state: DeviceState
    error_count: int
    rotational: bool
    """What it lies on rotates, so far as that can be told."""

    @property
    def index(self) -> int: ...
    @property
    def tier(self) -> Tier: ...
    @property
    def segment_bytes(self) -> int: ...
    def segment_offset(self, physical_index: int) -> int: ...
    def write(self, offset: int, buffers: Sequence[Buffer]) -> None: ...
    def read_now(self, offset: int, into: memoryview) -> bool: ...
    async def write_behind(self, offset: int, buffers: Sequence[Buffer]) -> None: ...
    async def read(self, offset: int, length: int) -> bytearray: ...
    async def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytearray]: ...
    async def read_then(
        self, ranges: Sequence[tuple[int, int]], function: Callable[[list[bytearray]], T], *, direct: bool = False
    ) -> T: ...
    async def read_direct(self, offset: int, length: int) -> bytearray: ...
    async def read_direct_into(self, offset: int, into: memoryview) -> None: ...
    async def sync(self) -> None: ...
    def write_label(self, label: Label) -> None: ...
    def erase_label_now(self) -> None: ...
    def close(self) -> None: ...


async def read_what_can_be_read(
    device: Device, offset: int, length: int, *, direct: bool = False
) -> tuple[bytearray, list[int]]:
    """Read a range of whole blocks, past the page cache if `direct`.

    Returns the bytes, zeros for blocks that can't be read, and which blocks (of the range) these are.
    """
    read = device.read_direct if direct else device.read
    try:
        return await read(offset, length), []
    except OSError as error:
        logger.error("%s; reading %d KiB from %d on block by block", error, length >> 10, offset)
    data = bytearray(length)
    unreadable: list[int] = []
    for block in range(length // BLOCK_BYTES):
        at = block * BLOCK_BYTES
        try:
            data[at : at + BLOCK_BYTES] = await read(offset + at, BLOCK_BYTES)
        except OSError:
            unreadable.append(block)
    return data, unreadable


class LabelledDevice:
    """What every device is by its label, and what is counted of it; who does the IO adds that."""

    def __init__(self, path: str, label: Label) -> None:
        self.path = path
        self.label = label
        self.segment_count = (label.size_bytes - LABEL_AREA_BYTES) // label.segment_bytes
        self.free: list[int] = []
        self.unsynced_bytes = 0
        self.unnamed_bytes = 0
        self.written_bytes = 0
        self.poisoned: str | None = None
        self.state: DeviceState = "online"
        self.error_count = 0
        self.rotational = False

    @property
    def index(self) -> int:
        """Position among the pool's devices; never reused."""
        return self.label.device_index

    @property
    def tier(self) -> Tier:
        """`fast` or `base`."""
        return self.label.tier

    @property
    def segment_bytes(self) -> int:
        """Size of every segment of this device."""
        return self.label.segment_bytes

    def segment_offset(self, physical_index: int) -> int:
        """Byte offset of a segment."""
        return LABEL_AREA_BYTES + physical_index * self.label.segment_bytes


class FileDevice(LabelledDevice):
    """A device on a file or block device of this host. Open it with `open_device`."""

    def __init__(self, path: str, fd: int, direct_fd: int | None, label: Label, offload: Offload) -> None:
        super().__init__(path, label)
        self.fd = fd
        self._direct_fd = direct_fd
        self._offload = offload
        self._bounces: list[mmap.mmap] = []

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write `buffers` (at most 1,023) one after the other at `offset`, into the page cache.

        Raises OSError; a short write counts as EIO. After an error any part of the range may have changed.
        """
        expected = self._check_writable(buffers)
        self.unsynced_bytes += expected
        self.written_bytes += expected
        self._pwritev(offset, buffers, expected)

    def _check_writable(self, buffers: Sequence[Buffer]) -> int:
        if self.poisoned:
            raise TierError(errno.EIO, f"{self.path} takes no writes: {self.poisoned}")
        return sum(map(len, buffers))

    def _pwritev(self, offset: int, buffers: Sequence[Buffer], expected: int) -> None:
        try:
            written = os.pwritev(self.fd, buffers, offset)
        except OSError as error:
            self.error_count += 1
            raise TierError(_errno_of(error), f"writing {self.path} at {offset}: {error.strerror}") from error
        if written != expected:
            self.error_count += 1
            raise TierError(
                errno.EIO, f"writing {self.path} at {offset}: only {written} of {expected} bytes were taken"
            )

    async def write_behind(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """`write`, in a worker thread: for large writes that nobody waits for in the loop.

        The bytes count as unsynced from when they are all written: a sync that began earlier may have missed some.
        """
        expected = self._check_writable(buffers)
        try:
            await self._offload(self._pwritev, offset, buffers, expected)
        finally:
            self.unsynced_bytes += expected
            self.written_bytes += expected

    def read_now(self, offset: int, into: memoryview) -> bool:
        """Fill `into` from the page cache; False if that would have to wait for the device."""
        try:
            return os.preadv(self.fd, [into], offset, os.RWF_NOWAIT) == len(into)
        except OSError:
            return False

    async def read(self, offset: int, length: int) -> bytearray:
        """Read `length` bytes. Raises OSError; the end of the device counts as EIO."""
        return (await self.read_many([(offset, length)]))[0]

    async def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytearray]:
        """Read several (offset, length) ranges in one worker."""
        return await self._offload(self._read_blocking, ranges)

    async def read_then(
        self, ranges: Sequence[tuple[int, int]], function: Callable[[list[bytearray]], T], *, direct: bool = False
    ) -> T:
        """Read several ranges and work on what was read, in the same worker. `direct`: past the page cache."""
        return await self._offload(self._read_then_blocking, ranges, function, direct)

    def _read_then_blocking(
        self, ranges: Sequence[tuple[int, int]], function: Callable[[list[bytearray]], T], direct: bool
    ) -> T:
        if direct:
            return function([self._read_direct_blocking(offset, length) for offset, length in ranges])
        return function(self._read_blocking(ranges))

    def _read_blocking(self, ranges: Sequence[tuple[int, int]]) -> list[bytearray]:
        buffers = []
        for offset, length in ranges:
            buffer = bytearray(length)
            self._fill(self.fd, memoryview(buffer), offset)
            buffers.append(buffer)
        return buffers

    def _fill(self, fd: int, into: memoryview, offset: int) -> None:
        done = 0
        while done < len(into):
            try:
                count = os.preadv(fd, [into[done:]], offset + done)
            except OSError as error:
                self.error_count += 1
                raise TierError(
                    _errno_of(error), f"reading {self.path} at {offset + done}: {error.strerror}"
                ) from error
            if count == 0:
                raise TierError(errno.EIO, f"{self.path} ends at {offset + done}, inside a segment: it was truncated")
            done += count

    async def read_direct(self, offset: int, length: int) -> bytearray:
        """Read past the page cache: what the medium holds, not what the kernel remembers. Block-aligned."""
        return await self._offload(self._read_direct_blocking, offset, length)

    def _read_direct_blocking(self, offset: int, length: int) -> bytearray:
        fd = self._direct_fd
        if fd is None:
            os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_DONTNEED)
            fd = self.fd
        # O_DIRECT wants aligned memory. One such buffer is kept: fresh memory costs more than the read.
        bounce = self._bounces.pop() if self._bounces else mmap.mmap(-1, _DIRECT_CHUNK)
        result = bytearray()
        try:
            with memoryview(bounce) as view:
                for start in range(0, length, _DIRECT_CHUNK):
                    with view[: min(_DIRECT_CHUNK, length - start)] as part:
                        self._fill(fd, part, offset + start)
                        result += part
        finally:
            self._bounces[:] = [bounce]
        return result

    async def read_direct_into(self, offset: int, into: memoryview) -> None:
        """`read_direct` without a copy, for much and often: `into` must be page-aligned memory of whole blocks."""
        await self._offload(self._read_direct_into_blocking, offset, into)

    def _read_direct_into_blocking(self, offset: int, into: memoryview) -> None:
        fd = self._direct_fd
        if fd is not None:
            self._fill(fd, into, offset)
            return
        # Nor should what is read here push out of the page cache what clients read.
        os.posix_fadvise(self.fd, offset, len(into), os.POSIX_FADV_DONTNEED)
        self._fill(self.fd, into, offset)
        os.posix_fadvise(self.fd, offset, len(into), os.POSIX_FADV_DONTNEED)

    async def sync(self) -> None:
        """Make everything written before the call durable. Raises OSError; the caller must then poison the device."""
        try:
            await self._offload(os.fdatasync, self.fd)
        except OSError as error:
            self.error_count += 1
            raise TierError(_errno_of(error), f"fdatasync of {self.path}: {error.strerror}") from error

    def write_label(self, label: Label) -> None:
        """Write a newer label over the older copy; durable at the next `sync`."""
        self.write(LABEL_OFFSETS[label.generation % 2], [encode_label(label).ljust(4096, b"\0")])
        self.label = label

    def erase_label_now(self) -> None:
        """Wipe both copies of the label, durably: the device is no longer part of the pool. Blocks; raises OSError."""
        erase_labels(self.fd)

    def close(self) -> None:
        """Close the descriptors and give up the lock. A later use is EBADF: the numbers may be another's by then."""
        fd, self.fd = self.fd, -1
        direct_fd, self._direct_fd = self._direct_fd, -1 if self._direct_fd is not None else None
        os.close(fd)
        if direct_fd is not None:
            os.close(direct_fd)


def _errno_of(error: OSError) -> int:
    """As it is, but for ESTALE: an image on NFS says so that its server has lost it; a leg, that its term is over."""
    return errno.EIO if error.errno in (None, errno.ESTALE) else error.errno


def erase_labels(fd: int) -> None:
    """Wipe both copies of a label, durably. Raises OSError."""
    for offset in LABEL_OFFSETS:
        os.pwrite(fd, bytes(4096), offset)
    os.fsync(fd)


def lock_or_refuse(fd: int, path: str) -> None:
    """Take the exclusive lock of an open device, pool or home; EBUSY if somebody else has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno != errno.EWOULDBLOCK:
            raise
        raise TierError(
            errno.EBUSY, f"{path} is open in another process: stop that terraced or command first"
        ) from None


def open_device(path: Path) -> FileDevice:
    """Open and lock a labelled device. Raises BadLabelError if its label can't be used, TierError for the rest.

    It gets workers of its own: who waits for a slow device must not delay what a fast one does.
    """
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        raise TierError(
            errno.ENOENT,
            f"the device {path} is missing: attach it again, or restore it, then open the pool; if it has another path "
            "now, tell it with `terrace pool check NAME --rebuild-catalog --device PATH`; if it is gone for good, "
            f"`terrace pool evacuate NAME {path} --lost` opens the pool without it",
        ) from None
    except OSError as error:
        raise TierError(error.errno or errno.EIO, f"opening {path}: {error.strerror}") from error
    try:
        lock_or_refuse(fd, str(path))
        label = newest_label([os.pread(fd, LABEL_BYTES, offset) for offset in LABEL_OFFSETS])
        if size_of(fd) < label.size_bytes:
            raise TierError(
                errno.EIO,
                f"{path} was truncated: {size_of(fd)} bytes are left of {label.size_bytes}; restore it from "
                f"where it was copied",
            )
        try:
            direct_fd = os.open(path, flags | os.O_DIRECT)
        except OSError:
            direct_fd = None  # tmpfs before Linux 6.6, some FUSE filesystems
        device = FileDevice(str(path), fd, direct_fd, label, new_workers())
        device.rotational = rotates(fd)
        return device
    except BaseException:
        os.close(fd)
        raise


def new_workers() -> Offload:
    """Worker threads of a pool or of a device, at most 16 at a time."""
    limiter = trio.CapacityLimiter(_WORKERS)

    def offload(function: Callable[[*Ts], T], *args: *Ts) -> Awaitable[T]:
        return trio.to_thread.run_sync(function, *args, limiter=limiter)

    return offload
