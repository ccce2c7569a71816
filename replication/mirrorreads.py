"""Reads of a mirror that can't be answered at once: from any leg in sync, and held until they may be answered.

What was read is on all legs when it is returned: a read that overlaps a batch in flight waits for that batch, else a
fail-over could take back what was read. It fails where the batch was refused and isn't settled. A leg that can't read
what another one can is healed (`replication.healing`).

Where no leg that could tell has a readable map, all is said to be data: that is true of holes too, and whoever reads
there finds out which bytes can't be had. So a damaged map ends nobody's walk over a volume.

An NBD server is read only where no Terrace leg in sync can, and only what a leg's checksums prove is taken from it: it
has none of its own, and may have been changed or replaced by anybody.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from typing import Final, Protocol

import trio

from nbd.wire import STATE_HOLE, STATE_ZERO
from replication.inflight import InFlight
from replication.leg import BLOCK_BYTES, Leg, LegState
from replication.members import Member, readable
from replication.nbdleg import checks_of
from replication.reconcile import UnreadableError
from replication.site import Gate
from replication.unreadable import first_step

LEAF_BYTES: Final = 1 << 20
"""So much is told to be data at a time where no map can be read; a leaf of the engine's maps covers it."""
MOST_PIECES: Final = 256
"""So often legs are asked for one answer, which may be about a part of the range: below a page that is no leaf much may
be damaged."""
PROVEN_TRIES: Final = 4
"""So often a read of an NBD server is tried, if writes come in between."""


class Readable(Gate, Protocol):
    """What reads need of the mirror."""

    inflight: InFlight
    client_at: float
    losses: int
    """How often the last leg in sync was lost."""
    may_serve: Callable[[], bool]

    @property
    def size_bytes(self) -> int: ...

    def look(self) -> None:
        """Whether legs have failed."""

    def unreadable(self, member: Member, offset: int, length: int) -> None:
        """This leg couldn't read that; another one could."""

    def nowhere(self, offset: int) -> None:
        """No leg could read the block there."""


class Reads:
    """See the module."""

    def __init__(self, site: Readable) -> None:
        self._site = site

    async def read(self, offset: int, length: int, into: memoryview) -> None:
        """Read; what was read is on all legs when this returns."""
        while True:
            losses = self._site.losses
            await self.read_any(offset, length, into)
            # What was read may be of a batch that isn't on all legs yet. Later batches can't be in it.
            await self._site.inflight.settle_for_client(offset, length)
            self._site.check()
            # Begun anew meanwhile, what was read may have been taken back; with the lease over, another primary may
            # have begun, and written.
            if losses == self._site.losses and self._site.may_serve():
                return

    async def read_for_copy(self, offset: int, length: int, into: memoryview) -> None:
        """From any leg in sync. Not a client's read. Raises UnreadableError for what none of them can read."""
        await self.read_any(offset, length, into, for_client=False)

    async def read_any(self, offset: int, length: int, into: memoryview, *, for_client: bool = True) -> None:
        """From the first leg in sync that can; what another one couldn't read is healed."""
        while True:
            await self._site.admitted(reading=True)
            if for_client:
                self._site.client_at = trio.current_time()
            if offset + length > self._site.size_bytes:
                # No leg is to be blamed for that, nor healed.
                raise OSError(errno.EINVAL, f"{self._site.name}: the mirror was shrunk; that lies behind its end now")
            bad: list[Member] = []
            for member in readable(self._site.members.values()):
                if await self.read_from(member, offset, length, into, for_client=for_client):
                    for other in bad:
                        self._site.unreadable(other, offset, length)
                    return
                if member.leg is not None:
                    bad.append(member)
            self._site.look()
            if bad and all(m in bad for m in readable(self._site.members.values())):
                middle = _block_in(offset, length)
                if middle is not None:  # what one leg lacks another one may have, and the other way round
                    for at, stop in ((offset, middle), (middle, offset + length)):
                        await self.read_any(at, stop - at, into[at - offset : stop - offset], for_client=for_client)
                    return
                self._site.nowhere(offset // BLOCK_BYTES * BLOCK_BYTES)
                what = f"{length:,} bytes at {offset:,}: {bad[0].error}"
                step = first_step([m.info for m in self._site.members.values() if m.is_away])
                raise UnreadableError(f"{self._site.name}: no leg can read {what}; {step}")
            await trio.lowlevel.checkpoint()

    async def read_from(
        self, member: Member, offset: int, length: int, into: memoryview, *, for_client: bool = True
    ) -> bool:
        """Whether this leg could. What an NBD server says counts only where a Terrace leg's checksums prove it."""
        leg = member.leg
        if leg is None or member.state is not LegState.UP_TO_DATE:
            return False
        began = trio.current_time()
        try:
            if member.info.kind == "nbd":
                await self._read_proven(leg, offset, length, into)
            elif for_client or not leg.read_now(offset, length, into):  # a client's read has tried that already
                await leg.read(offset, length, into)
        except OSError as error:
            if leg.failure is None:
                member.counters.read_errors += 1
                member.error = error
            else:
                self._site.look()
            return False
        took = trio.current_time() - began
        member.latency_s = took if member.latency_s is None else member.latency_s * 0.9 + took * 0.1
        member.counters.reads += 1
        member.counters.read_bytes += length
        # A leg that was dropped while it read may be behind by now.
        return member.leg is leg and member.state is LegState.UP_TO_DATE

    async def _read_proven(self, leg: Leg, offset: int, length: int, into: memoryview) -> None:
        """From an NBD server. Raises OSError EIO for a block of which no leg's map has the checksum of what it says."""
        start = offset // BLOCK_BYTES * BLOCK_BYTES
        data = memoryview(bytearray(-(-(offset + length) // BLOCK_BYTES) * BLOCK_BYTES - start))
        for _ in range(PROVEN_TRIES):
            with self._site.inflight.watching(start, len(data)) as watch:
                await self._site.inflight.settle(start, len(data))
                await leg.read(start, len(data), data)
                if await self._is_proven(start, data):
                    into[:] = data[offset - start : offset - start + length]
                    return
                if not watch.touched:
                    break  # else a write came in between, and may be in one of the two only
        raise OSError(errno.EIO, f"{leg.info.export} has bytes at {offset} that no leg's checksums prove")

    async def _is_proven(self, start: int, data: memoryview) -> bool:
        found = checks_of(data)
        for member in readable(self._site.members.values()):
            if member.leg is not None and member.is_proof:
                with contextlib.suppress(OSError):
                    if await member.leg.checks(start, len(data)) == found:
                        return True
        return False

    async def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """What is mapped, of a leg in sync; as true as what is read, since who copies leaves holes out."""
        while True:
            losses = self._site.losses
            found = await self._extents(offset, length, limit)
            await self._site.inflight.settle_for_client(offset, length)
            self._site.check()
            if losses == self._site.losses and self._site.may_serve():
                return found

    async def _extents(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        await self._site.admitted(reading=True)
        found: list[tuple[int, int]] = []

        def add(size: int, flags: int) -> None:
            if size and found and found[-1][1] == flags:
                found[-1] = found[-1][0] + size, flags
            elif size:
                found.append((size, flags))

        at = looked = offset
        asked = 0
        while looked < offset + length and len(found) <= limit and asked < MOST_PIECES:
            asked += 1
            mapped = await self._mapped_any(looked, offset + length - looked)
            for start, size in mapped:
                begin, stop = max(start, at), min(start + size, offset + length)
                if begin < stop:
                    add(begin - at, STATE_HOLE | STATE_ZERO)
                    add(stop - begin, 0)
                    at = stop
            looked = max(looked + 1, sum(mapped[-1])) if mapped else offset + length
        add(min(looked, offset + length) - at, STATE_HOLE | STATE_ZERO)
        return found[:limit]

    async def _mapped_any(self, offset: int, length: int) -> list[tuple[int, int]]:
        """As `Leg.mapped`, maybe of a part from `offset` on, in whole blocks: a leg on a peer takes nothing else."""
        stop = -(-(offset + length) // BLOCK_BYTES) * BLOCK_BYTES
        offset = offset // BLOCK_BYTES * BLOCK_BYTES
        while True:
            await self._site.admitted(reading=True)
            length = stop - offset
            is_damaged = False
            for member in readable(self._site.members.values()):
                leg = member.leg
                if leg is None or member.info.kind == "nbd":  # of whose holes nothing is proven
                    continue
                try:
                    mapped = await leg.mapped(offset, length)
                except OSError as error:
                    if leg.failure is None:
                        if error.errno == errno.ENOTSUP:
                            return [(offset, length)]
                        is_damaged = True  # a page of its map; another leg has its own
                    else:
                        self._site.look()
                    continue
                # A leg that was dropped meanwhile may be behind by now.
                if member.leg is leg and member.state is LegState.UP_TO_DATE:
                    return mapped
            if is_damaged:
                leaf_end = offset // LEAF_BYTES * LEAF_BYTES + LEAF_BYTES
                if stop <= leaf_end:
                    return [(offset, length)]
                stop = max(leaf_end, (offset + length // 2) // LEAF_BYTES * LEAF_BYTES)  # what is before it can be told
            await trio.lowlevel.checkpoint()


def _block_in(offset: int, length: int) -> int | None:
    """Where a block begins, near the middle of a range; None if all of it is in one block."""
    middle = (offset + length // 2) // BLOCK_BYTES * BLOCK_BYTES
    if middle <= offset:
        middle = offset // BLOCK_BYTES * BLOCK_BYTES + BLOCK_BYTES
    return middle if middle < offset + length else None
