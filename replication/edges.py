"""Writes that can't be submitted at once: they wait for the gate, for room or for locks, or have edges within a block.

Legs get whole blocks only. A part of a block is merged with what is there, under a lock of its extent: held from before
the old bytes are read until the merged block is submitted, so that nothing that comes between is lost.
"""

from __future__ import annotations

import errno
from typing import Final, Protocol

import trio

from replication.inflight import InFlight, Locks, Outcome, touched
from replication.leg import BLOCK_BYTES, EXTENT_BYTES, Change, Done
from replication.mirrorreads import Reads
from replication.site import Gate

MASK: Final = BLOCK_BYTES - 1


class Writable(Gate, Protocol):
    """What a write that waits needs of the mirror."""

    inflight: InFlight
    locks: Locks

    @property
    def size_bytes(self) -> int: ...

    def has_room(self, size: int) -> bool:
        """Whether all queues take so many bytes more."""

    async def room(self) -> None:
        """Until some queue may have become shorter."""

    def unlocked(self, extents: set[int], wide: list[tuple[int, int]] | None) -> bool:
        """Whether none of these extents is locked."""

    def submit(
        self, changes: list[Change], extents: set[int], wide: list[tuple[int, int]] | None, size: int, done: Done
    ) -> None:
        """To all legs, in one step."""


class Edges:
    """The waiting forms of a mirror's requests that change something."""

    def __init__(self, site: Writable, reads: Reads) -> None:
        self._site = site
        self._reads = reads

    async def write(self, offset: int, data: memoryview | bytes) -> None:
        """Write; may wait. Parts of blocks at its edges are merged with what is there."""
        view = memoryview(data)
        if not len(view):
            return
        start, stop = offset & ~MASK, -(-(offset + len(view)) // BLOCK_BYTES) * BLOCK_BYTES
        if start == offset and stop == offset + len(view):
            await self._put([Change(offset, len(view), view)])
            return
        # The first and the last extent are held from before their old bytes are read until the merged blocks are
        # submitted, so that nothing that comes between is lost; a short write has but one.
        middle_start = max(start, offset + -offset % EXTENT_BYTES)
        middle_stop = min(stop, (offset + len(view)) // EXTENT_BYTES * EXTENT_BYTES)
        if middle_start >= middle_stop:
            pieces = [(offset, len(view))]
        else:
            pieces = [
                (offset, middle_start - offset),
                (middle_start, middle_stop - middle_start),
                (middle_stop, offset + len(view) - middle_stop),
            ]
        for at, length in pieces:
            if length:
                await self._merge(at, view[at - offset : at - offset + length])

    async def _merge(self, offset: int, data: memoryview) -> None:
        start, stop = offset & ~MASK, -(-(offset + len(data)) // BLOCK_BYTES) * BLOCK_BYTES
        if start == offset and stop == offset + len(data):
            await self._put([Change(offset, len(data), data)])
            return
        outcome = Outcome()
        async with self._site.locks.holding(start, stop - start):
            await self._site.inflight.settle_for_client(start, stop - start)
            self._judge_end(stop)
            whole = bytearray(stop - start)
            await self._reads.read_any(start, len(whole), memoryview(whole))
            whole[offset - start : offset - start + len(data)] = data
            change = Change(start, len(whole), memoryview(whole))
            await self._until_submitted([change], outcome, holding=True)
        await outcome.wait()

    async def _put(self, changes: list[Change]) -> None:
        outcome = Outcome()
        await self._until_submitted(changes, outcome)
        await outcome.wait()

    async def _until_submitted(self, changes: list[Change], outcome: Outcome, *, holding: bool = False) -> None:
        """Wait for the gate, for room, for locks; `holding`: the locks are ours."""
        extents, wide = touched(changes)
        size = sum(change.length for change in changes if change.data is not None)
        while True:
            await self._site.admitted()
            if not holding and not self._site.unlocked(extents, wide):
                for first, stop in [*((extent, extent + 1) for extent in extents), *(wide or ())]:
                    await self._site.locks.wait(first, stop)
                continue
            if not self._site.has_room(size):
                await self._site.room()
                continue
            self._judge_end(max(change.offset + change.length for change in changes))
            self._site.submit(changes, extents, wide, size, outcome)  # no checkpoint since all that was found to be so
            return

    def _judge_end(self, stop: int) -> None:
        if stop > self._site.size_bytes:
            raise OSError(errno.ENOSPC, f"{self._site.name}: the mirror was shrunk; that lies behind its end now")

    async def trim(self, offset: int, length: int) -> None:
        """Forget the range, rounded inwards to whole blocks; it reads as zeros afterwards."""
        start, stop = -(-offset // BLOCK_BYTES) * BLOCK_BYTES, (offset + length) & ~MASK
        if start < stop:
            await self._put([Change(start, stop - start, None)])
        else:
            self._site.check()
            await trio.lowlevel.checkpoint()

    async def write_zeroes(self, offset: int, length: int, *, no_hole: bool, fast: bool) -> None:
        """Zeros; without space, unless `no_hole`: then they are written as data."""
        if no_hole and fast:
            raise OSError(errno.ENOTSUP, "zeros that keep their space are written as data, which is no faster")
        start, stop = -(-offset // BLOCK_BYTES) * BLOCK_BYTES, (offset + length) & ~MASK
        if no_hole or start >= stop:
            zeros = bytes(min(length, 1 << 20))
            for at in range(offset, offset + length, 1 << 20):
                await self.write(at, memoryview(zeros)[: min(1 << 20, offset + length - at)])
            return
        if offset < start:
            await self.write(offset, bytes(start - offset))
        await self._put([Change(start, stop - start, None)])
        if stop < offset + length:
            await self.write(stop, bytes(offset + length - stop))
