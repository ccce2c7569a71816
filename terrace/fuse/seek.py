"""lseek(2) with SEEK_DATA and SEEK_HOLE, over extents."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence

from nbd.wire import STATE_ZERO

Extents = Callable[[int, int], Awaitable[Sequence[tuple[int, int]]]]
"""(offset, length) to (length, flags of `base:allocation`) of consecutive extents from there, at least one."""


async def seek(extents: Extents, size_bytes: int, offset: int, *, data: bool) -> int:
    """Where the next data begins at or behind `offset`, or the next hole; the end counts as a hole.

    A hole is what reads as zeroes: a client skips it. NBD's HOLE alone says only that a write may find no room.

    Raises OSError ENXIO at and behind the end, and where no data follows.
    """
    if not 0 <= offset < size_bytes:
        raise OSError(errno.ENXIO, f"{offset} is not inside of {size_bytes} bytes")
    at = offset
    while at < size_bytes:
        for length, flags in await extents(at, size_bytes - at):
            if bool(flags & STATE_ZERO) is not data:
                return at
            at += length
    if data:
        raise OSError(errno.ENXIO, f"no data follows {offset}")
    return size_bytes
