"""Healing: blocks that one leg can't read come from another, and are written anew where they are bad.

Whoever reads gets its answer from another leg and goes on; it may hold a lock of the extent. So what was found bad is
noted, and one task heals it afterwards.
"""

from __future__ import annotations

import logging
from typing import Final, Protocol

from replication.inflight import InFlight, Locks
from replication.leg import BLOCK_BYTES, EXTENT_BYTES, LegState
from replication.members import Member, readable
from replication.mirrorreads import Reads
from replication.site import Gate

log = logging.getLogger("replication.mirror")

MAX_BAD: Final = 1024
"""So many ranges wait to be healed; another one waits for its next reader, or for a scrub."""


class Healed(Gate, Protocol):
    """What healing needs of the mirror."""

    inflight: InFlight
    locks: Locks

    @property
    def size_bytes(self) -> int: ...

    async def copy_to(self, member: Member, offset: int, data: memoryview | None, *, length: int = 0) -> bool:
        """To one leg only, in its order; whether it has it."""


class Healing:
    """See the module. `run` has to be run."""

    def __init__(self, site: Healed, reads: Reads) -> None:
        self._site = site
        self._reads = reads
        self.healed_blocks = 0
        self._bad: dict[tuple[str, int, int], None] = {}
        """(leg, offset, length) that it couldn't read and another one could."""

    def later(self, member: Member, offset: int, length: int) -> None:
        """Not by who reads: it may hold a lock of the extent, and has what it wanted."""
        if len(self._bad) < MAX_BAD:
            self._bad[member.info.id, offset, length] = None
            self._site.change()

    async def run(self) -> None:
        """The task."""
        while True:
            while self._bad:
                leg_id, offset, length = next(iter(self._bad))
                del self._bad[leg_id, offset, length]
                await self.heal(leg_id, offset, length)
            await self._site.changed()

    async def heal(self, leg_id: str, offset: int, length: int) -> int:
        """Write anew on one leg the blocks in this range that it can't read; how many. They come from another leg."""
        member = self._site.members.get(leg_id)
        if member is None or member.state is not LegState.UP_TO_DATE:
            return 0
        healed = 0
        start = offset // BLOCK_BYTES * BLOCK_BYTES
        stop = min(-(-(offset + length) // BLOCK_BYTES) * BLOCK_BYTES, self._site.size_bytes)
        for at in range(start, stop, EXTENT_BYTES):
            piece = min(EXTENT_BYTES - at % EXTENT_BYTES, stop - at)
            async with self._site.locks.holding(at, piece):
                await self._site.inflight.settle(at, piece)
                for block in await self._unreadable(member, at, piece):
                    data = memoryview(bytearray(BLOCK_BYTES))
                    for source in [m for m in readable(self._site.members.values()) if m is not member]:
                        if await self._reads.read_from(source, block, BLOCK_BYTES, data):
                            healed += await self._site.copy_to(member, block, data)
                            break
        if healed:
            member.counters.healed_blocks += healed
            self.healed_blocks += healed
            log.warning("%s: %d blocks at %d of the leg on %s couldn't be read, and were written anew from another leg",
                        self._site.name, healed, offset, member.info.node)  # fmt: skip
        return healed

    async def _unreadable(self, member: Member, offset: int, length: int) -> list[int]:
        """Offsets of blocks, by halves."""
        leg = member.leg
        if leg is None:
            return []
        try:
            await leg.read(offset, length, memoryview(bytearray(length)))
        except OSError:
            if leg.failure is not None:
                return []
            if length <= BLOCK_BYTES:
                return [offset]
            half = length // 2 // BLOCK_BYTES * BLOCK_BYTES
            first = await self._unreadable(member, offset, half)
            return first + await self._unreadable(member, offset + half, length - half)
        return []
