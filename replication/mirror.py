"""The mirror: one block device over several legs, for as long as this node is its primary in one term.

**Writes.** Each batch gets a sequence and is submitted to every leg that counts, in one synchronous step, so that each
leg has the same order. It counts down; when all legs have it, the client is answered. Only whole blocks are submitted:
a part of a block is merged first, under a lock of its extent.

**A leg that fails**, or is silent for too long, is dropped in the same step in which that is noticed; the gate shuts,
and nothing that it misses is acknowledged before a `Membership` without it counts (`ClusterStore.commit`). Whoever
stores that record copies what was written recently into the set of what the leg misses. One task alone writes records
(`_govern`): it makes the record be what the legs are.

**When the last leg in sync fails** what is in flight fails with it, and the mirror begins anew as at a start: it waits
for those legs, makes them equal (`replication.reconcile`), and opens the gate.

**Reads** come from a leg in sync, the local one first. A read that overlaps a batch in flight is answered when that
batch is on all legs, else a fail-over could take back what was read.

**Deposed**: a record of ours is refused because of a later term. All in flight fails with ESTALE, and everything else
from then on.

A leg that is away is sought again, brought up to date (`replication.resync`), and admitted by a record.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

import trio

from nbd.wire import STATE_HOLE, STATE_ZERO
from replication.cluster import ClusterStore
from replication.inflight import EXTENT_SHIFT, WIDE_EXTENTS, Batch, InFlight, Locks, extents_of
from replication.leg import (
    BLOCK_BYTES,
    EXTENT_BYTES,
    RECENT,
    RECENT_OLD,
    Change,
    Done,
    Leg,
    LegState,
    LegStore,
    MirrorState,
    missing_tracker,
)
from replication.membership import LegInfo, Membership
from replication.reconcile import choose_source, reconcile
from replication.resync import Progress, Resync, ResyncSettings

log = logging.getLogger("replication.mirror")

MASK: Final = BLOCK_BYTES - 1
MAX_BAD: Final = 1024
"""So many ranges wait to be healed; another one waits for its next reader, or for a scrub."""


@dataclass(frozen=True)
class LegFacts:
    """What the node knows of a leg that it has just connected to."""

    intact: bool = True
    """It can't have lost anything since it was in sync: the same boot, or a clean close."""
    known: bool = True
    """It comes from a record in our history, so that `missing:ID` of the legs in sync, and its own trackers, are all
    that it may lack. Else it is compared in full."""


class Connect(Protocol):
    """Makes a leg. Raises OSError; of a leg that must stay out (split brain) too, with the sentence."""

    async def __call__(self, info: LegInfo, membership: Membership) -> Leg: ...


@dataclass(frozen=True)
class MirrorSettings:
    """What may be tuned."""

    queue_bytes: int = 32 << 20
    """What one leg may have queued before clients wait."""
    flush_every_s: float = 1.0
    """How long what was written may lack a common flush."""
    retry_s: float = 0.05
    """The first wait before a leg is sought again, or a record committed again; it doubles."""
    retry_max_s: float = 5.0
    resync: ResyncSettings = field(default_factory=ResyncSettings)


@dataclass
class LegCounters:
    """Since the primary has been started."""

    reads: int = 0
    read_bytes: int = 0
    read_errors: int = 0
    healed_blocks: int = 0
    failures: int = 0
    resyncs: int = 0


@dataclass(frozen=True)
class LegStatus:
    """One leg, as `terrace volume mirror list` shows it."""

    info: LegInfo
    state: LegState
    for_s: float
    """Since when it has had that state."""
    is_local: bool
    queued_bytes: int
    latency_s: float | None
    """Of its reads, lately."""
    error: str | None
    """Why it isn't connected."""
    resync: Progress | None
    counters: LegCounters


@dataclass(frozen=True)
class MirrorStatus:
    """The mirror as its primary sees it."""

    membership: Membership
    state: MirrorState
    legs: tuple[LegStatus, ...]
    waiting: str | None
    """Why writes wait, or None."""
    deposed: str | None
    sequence: int
    in_flight: int
    healed_blocks: int


class Member:
    """One leg's place in the mirror; the leg itself comes and goes."""

    def __init__(self, info: LegInfo, now: float) -> None:
        self.info = info
        self.leg: Leg | None = None
        self.state = LegState.OFFLINE
        self.since = now
        self.ready = False
        """Has all that it missed; a record with it is wanted."""
        self.error: OSError | None = None
        self.resync: Resync | None = None
        self.latency_s: float | None = None
        self.counters = LegCounters()
        self.abandoned = trio.Event()
        """Of the present leg: it isn't used any more."""

    def become(self, state: LegState) -> None:
        """With the time."""
        if state is not self.state:
            self.state = state
            self.since = trio.current_time()


def _yes() -> bool:
    return True


async def _no_facts(info: LegInfo, membership: Membership) -> LegFacts:
    await trio.lowlevel.checkpoint()
    return LegFacts()


class Mirror:
    """See the module. An `nbd.export.Export` that acknowledges later.

    `membership` is the record with which this primary has begun its term: it counts already. `store` is where the local
    leg is, if there is one. `run` has to be run; nothing is served before `started`.
    """

    read_only = False
    can_multi_conn = True
    minimum_block_size = 1
    preferred_block_size = BLOCK_BYTES
    maximum_payload = 32 << 20

    def __init__(
        self,
        name: str,
        membership: Membership,
        cluster: ClusterStore,
        connect: Connect,
        *,
        store: LegStore | None = None,
        facts: Callable[[LegInfo, Membership], Awaitable[LegFacts]] = _no_facts,
        may_serve: Callable[[], bool] = _yes,
        until_may_serve: Callable[[], Awaitable[None]] | None = None,
        description: str = "",
        rotational: bool = False,
        settings: MirrorSettings | None = None,
    ) -> None:
        self.name = name
        self.description = description
        self.rotational = rotational
        self.membership = membership
        self.settings = settings or MirrorSettings()
        self.started = trio.Event()
        self.ended = trio.Event()
        """Deposed: the export must go."""
        self.inflight = InFlight()
        self.locks = Locks()
        self.healed_blocks = 0
        self.client_at = -1e9
        """When a client last asked for something, by trio's clock."""
        self.reads = 0
        """How often a read was tried at once."""
        self.latency_s = 0.0
        """How long batches take, lately."""
        self._cluster = cluster
        self._connect = connect
        self._store = store
        self._facts = facts
        self._may_serve = may_serve
        self._until_may_serve = until_may_serve
        now = trio.current_time()
        self.members: dict[str, Member] = {info.id: Member(info, now) for info in membership.legs}
        self._writers: tuple[Leg, ...] = ()
        self._reader: Leg | None = None
        """The local leg, if it may be read."""
        self._sequence = 0
        self._shut = True
        """A batch may not be submitted now: the one thing that the fast path asks."""
        self._barriers = 0
        self._lost = True
        """No leg in sync is connected: everything begins anew."""
        self._losses = 0
        self._failing: OSError | None = None
        """With the option `fail`, below quorum: what clients get."""
        self._end: OSError | None = None
        self._closing = False
        self._excluding: set[str] = set()
        """Legs that a record calls in sync, or may, and that are gone."""
        self._parked: list[Batch] = []
        """Done on all legs that are left, and waiting for a record without the one that is gone."""
        self._attempts: list[Membership] = []
        """Records of ours of which it isn't known whether they count."""
        self._wanted: dict[str, Any] = {}
        """What `reconfigure` wants in the record."""
        self._commit_scope: trio.CancelScope | None = None
        self._changed = trio.Event()
        """Replaced each time that something changes which tasks here may wait for."""
        self._room: trio.Event | None = None
        self._rounds_begun = 0
        self._rounds_done = 0
        self._flushing = False
        self._flushed_sequence = 0
        self._bad: dict[tuple[str, int, int], None] = {}
        """(leg, offset, length) that it couldn't read and another one could."""

    # -- the gate ----------------------------------------------------------------------------------------------------

    @property
    def size_bytes(self) -> int:
        return self.membership.size_bytes

    def _change(self) -> None:
        """Something has: decide anew whether the gate is open, and wake all that wait."""
        self._shut = bool(
            self._lost or self._excluding or self._barriers or self._end is not None or not self.started.is_set()
        )
        in_sync = [m for m in self.members.values() if m.state is LegState.UP_TO_DATE and m.leg is not None]
        self._reader = next((m.leg for m in in_sync if m.leg is not None and m.leg.is_local), None)
        if self._lost or self._end is not None or not self.started.is_set():
            self._reader = None
        self._writers = tuple(
            m.leg
            for m in self.members.values()
            if m.leg is not None and m.state in (LegState.UP_TO_DATE, LegState.SYNCING)
        )
        self._tell_room()
        self._changed.set()
        self._changed = trio.Event()

    async def changed(self) -> None:
        """Until something has changed."""
        await self._changed.wait()

    def check(self) -> None:
        """Raises what every request gets from now on, if there is such a thing."""
        if self._end is not None:
            raise OSError(self._end.errno, self._end.strerror)

    async def _admitted(self, *, reading: bool = False) -> None:
        """Until a request may go on. True at this very moment: no checkpoint between it and the use of that."""
        while True:
            self.check()
            if not self._may_serve():
                if self._until_may_serve is not None:
                    await self._until_may_serve()
                else:
                    await trio.sleep(0.01)
                continue
            if reading and self.started.is_set() and not self._lost:
                return
            if not self._shut:
                return
            if self._failing is not None:
                raise OSError(self._failing.errno, self._failing.strerror)
            await self._changed.wait()

    # -- writes ------------------------------------------------------------------------------------------------------

    def write_later(self, writes: list[tuple[int, memoryview]], done: Done) -> bool:
        """See `nbd.export.AcknowledgesLater`. False also for a part of a block: `write` merges it."""
        if self._shut or not self._may_serve():
            self.check()
            return False
        changes = []
        extents: set[int] = set()
        size = 0
        for offset, data in writes:
            length = len(data)
            if (offset | length) & MASK:
                return False
            size += length
            first = offset >> EXTENT_SHIFT
            last = (offset + length - 1) >> EXTENT_SHIFT
            if first == last:
                extents.add(first)
            else:
                extents.update(range(first, last + 1))
            changes.append(Change(offset, length, data))
        held = self.locks.held
        if held and not extents.isdisjoint(held):
            return False
        if not self._has_room(size):
            return False
        self._submit(changes, extents, None, size, done)
        return True

    def trim_later(self, ranges: list[tuple[int, int]], done: Done) -> bool:
        """See `nbd.export.AcknowledgesLater`. Rounds inwards, to whole blocks."""
        if self._shut or not self._may_serve():
            self.check()
            return False
        changes = []
        for offset, length in ranges:
            start, stop = -(-offset // BLOCK_BYTES) * BLOCK_BYTES, (offset + length) & ~MASK
            if start < stop:
                changes.append(Change(start, stop - start, None))
        if not changes or not self._has_room(0):
            return False
        extents, wide = _touched(changes)
        if self.locks.held and not self._unlocked(extents, wide):
            return False
        self._submit(changes, extents, wide, 0, done)
        return True

    def _unlocked(self, extents: set[int], wide: list[tuple[int, int]] | None) -> bool:
        return extents.isdisjoint(self.locks.held) and not any(not self.locks.free(a, b) for a, b in wide or ())

    def write_now(self, writes: list[tuple[int, memoryview]]) -> bool:
        """Never: a write is acknowledged later."""
        return False

    def trim_now(self, ranges: list[tuple[int, int]]) -> bool:
        """Never: a trim is acknowledged later."""
        return False

    def _has_room(self, size: int) -> bool:
        bound = self.settings.queue_bytes - size
        return all(leg.queued_bytes <= bound or not leg.queued_bytes for leg in self._writers)

    def _submit(
        self, changes: list[Change], extents: set[int], wide: list[tuple[int, int]] | None, size: int, done: Done
    ) -> None:
        """To all legs, in this one step."""
        writers = self._writers
        self._sequence = sequence = self._sequence + 1
        self.client_at = now = trio.current_time()
        batch = Batch(sequence, len(writers), size, now, done, self._completed)
        batch.extents = extents
        batch.wide = wide
        self.inflight.add(batch)
        for leg in writers:
            leg.submit(sequence, changes, batch)

    def _completed(self, batch: Batch) -> None:
        """Each leg has said what became of it."""
        if batch.failures:
            self._look()
        if batch.doomed is not None:
            self._settle(batch, batch.doomed)
        elif not batch.failures:
            self._settle(batch, None)
        elif self._excluding:
            self._parked.append(batch)
            if self._failing is not None:
                self._fail_parked()
        else:
            self._settle(batch, None)

    def _settle(self, batch: Batch, error: OSError | None) -> None:
        """Answer."""
        self.inflight.remove(batch)
        took = trio.current_time() - batch.began
        self.latency_s += (took - self.latency_s) * 0.05
        self._tell_room()
        batch.done(error)

    def _tell_room(self) -> None:
        """Some queue may have become shorter."""
        if self._room is not None:
            self._room.set()
            self._room = None

    def _release(self, error: OSError | None) -> None:
        parked, self._parked = self._parked, []
        for batch in parked:
            self._settle(batch, error)

    def _fail_parked(self) -> None:
        assert self._failing is not None
        self._release(self._failing)

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
        outcome = _Outcome()
        async with self.locks.holding(start, stop - start):
            await self.inflight.settle(start, stop - start)
            whole = bytearray(stop - start)
            await self._read_any(start, len(whole), memoryview(whole))
            whole[offset - start : offset - start + len(data)] = data
            change = Change(start, len(whole), memoryview(whole))
            await self._until_submitted([change], outcome, holding=True)
        await outcome.wait()

    async def _put(self, changes: list[Change]) -> None:
        outcome = _Outcome()
        await self._until_submitted(changes, outcome)
        await outcome.wait()

    async def _until_submitted(self, changes: list[Change], outcome: _Outcome, *, holding: bool = False) -> None:
        """Wait for the gate, for room, for locks; `holding`: the locks are ours."""
        extents, wide = _touched(changes)
        size = sum(change.length for change in changes if change.data is not None)
        while True:
            await self._admitted()
            if not holding and not self._unlocked(extents, wide):
                for first, stop in [*((extent, extent + 1) for extent in extents), *(wide or ())]:
                    await self.locks.wait(first, stop)
                continue
            if not self._has_room(size):
                if self._room is None:
                    self._room = trio.Event()
                await self._room.wait()
                continue
            if any(change.offset + change.length > self.size_bytes for change in changes):
                raise OSError(errno.ENOSPC, f"{self.name}: the mirror was shrunk; that lies behind its end now")
            self._submit(changes, extents, wide, size, outcome)  # no checkpoint since all that was found to be so
            return

    async def trim(self, offset: int, length: int) -> None:
        """Forget the range, rounded inwards to whole blocks; it reads as zeros afterwards."""
        start, stop = -(-offset // BLOCK_BYTES) * BLOCK_BYTES, (offset + length) & ~MASK
        if start < stop:
            await self._put([Change(start, stop - start, None)])
        else:
            self.check()
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

    async def cache(self, offset: int, length: int) -> None:
        """Nothing to be done ahead."""
        self.check()
        await trio.lowlevel.checkpoint()

    # -- reads -------------------------------------------------------------------------------------------------------

    def read_now(self, offset: int, length: int, into: memoryview) -> bool:
        """False where a batch in flight is in the way, or the local leg isn't in sync."""
        leg = self._reader
        if leg is None or not self._may_serve():
            return False
        self.reads += 1
        inflight = self.inflight
        if inflight.batches and inflight.overlaps(offset, length):
            return False
        try:
            return leg.read_now(offset, length, into)
        except OSError:
            return False  # `read` sees to it: it may be answered by another leg

    async def read(self, offset: int, length: int, into: memoryview) -> None:
        """Read; what was read is on all legs when this returns."""
        while True:
            losses = self._losses
            await self._read_any(offset, length, into)
            # What was read may be of a batch that isn't on all legs yet. Later batches can't be in it.
            await self.inflight.settle(offset, length)
            self.check()
            # Begun anew meanwhile, what was read may have been taken back; with the lease over, another primary may
            # have begun, and written.
            if losses == self._losses and self._may_serve():
                return

    def readable(self) -> list[Member]:
        """The local leg, then the nearest; one that was never measured counts as near."""
        found = [m for m in self.members.values() if m.leg is not None and m.state is LegState.UP_TO_DATE]
        return sorted(found, key=lambda m: (m.leg is not None and not m.leg.is_local, m.latency_s or 0.0, m.info.id))

    async def _read_any(self, offset: int, length: int, into: memoryview) -> None:
        """From the first leg in sync that can; what another one couldn't read is healed."""
        while True:
            await self._admitted(reading=True)
            self.client_at = trio.current_time()
            bad: list[Member] = []
            for member in self.readable():
                if await self._read_from(member, offset, length, into):
                    for other in bad:
                        self._heal_later(other, offset, length)
                    return
                if member.leg is not None:
                    bad.append(member)
            self._look()
            if bad and all(m in bad for m in self.readable()):
                what = f"{length:,} bytes at {offset:,}: {bad[0].error}"
                raise OSError(errno.EIO, f"{self.name}: no leg can read {what}; write them anew, or restore them")
            await trio.lowlevel.checkpoint()

    async def _read_from(self, member: Member, offset: int, length: int, into: memoryview) -> bool:
        leg = member.leg
        if leg is None or member.state is not LegState.UP_TO_DATE:
            return False
        began = trio.current_time()
        try:
            await leg.read(offset, length, into)
        except OSError as error:
            if leg.failure is None:
                member.counters.read_errors += 1
                member.error = error
            else:
                self._look()
            return False
        took = trio.current_time() - began
        member.latency_s = took if member.latency_s is None else member.latency_s * 0.9 + took * 0.1
        member.counters.reads += 1
        member.counters.read_bytes += length
        # A leg that was dropped while it read may be behind by now.
        return member.leg is leg and member.state is LegState.UP_TO_DATE

    def _heal_later(self, member: Member, offset: int, length: int) -> None:
        """Not by who reads: it may hold a lock of the extent, and has what it wanted."""
        if len(self._bad) < MAX_BAD:
            self._bad[member.info.id, offset, length] = None
            self._change()

    async def _heal(self) -> None:
        while True:
            while self._bad:
                leg_id, offset, length = next(iter(self._bad))
                del self._bad[leg_id, offset, length]
                await self.heal(leg_id, offset, length)
            await self._changed.wait()

    async def heal(self, leg_id: str, offset: int, length: int) -> int:
        """Write anew on one leg the blocks in this range that it can't read; how many. They come from another leg."""
        member = self.members.get(leg_id)
        if member is None or member.state is not LegState.UP_TO_DATE:
            return 0
        healed = 0
        start, stop = offset & ~MASK, min(-(-(offset + length) // BLOCK_BYTES) * BLOCK_BYTES, self.size_bytes)
        for at in range(start, stop, EXTENT_BYTES):
            piece = min(EXTENT_BYTES - at % EXTENT_BYTES, stop - at)
            async with self.locks.holding(at, piece):
                await self.inflight.settle(at, piece)
                for block in await self._unreadable(member, at, piece):
                    data = memoryview(bytearray(BLOCK_BYTES))
                    for source in [m for m in self.readable() if m is not member]:
                        if await self._read_from(source, block, BLOCK_BYTES, data):
                            healed += await self.copy_to(member, block, data)
                            break
        if healed:
            member.counters.healed_blocks += healed
            self.healed_blocks += healed
            log.warning("%s: %d blocks at %d of the leg on %s couldn't be read, and were written anew from another leg",
                        self.name, healed, offset, member.info.node)  # fmt: skip
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

    async def copy_to(self, member: Member, offset: int, data: memoryview | None, *, length: int = 0) -> bool:
        """Submit bytes (None: zeros) to one leg only, in its order; whether it has them.

        The caller has made sure that no batch has touched them since they were read: nothing waits before `submit`.
        """
        leg = member.leg
        if leg is None:
            return False
        outcome = _Outcome()
        self._sequence += 1
        leg.submit(self._sequence, [Change(offset, length if data is None else len(data), data)], outcome)
        try:
            await outcome.wait()
        except OSError:
            self._look()
            return False
        finally:
            self._tell_room()
        return True

    async def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """What is mapped, of a leg in sync."""
        await self._admitted(reading=True)
        found: list[tuple[int, int]] = []

        def add(size: int, flags: int) -> None:
            if size and found and found[-1][1] == flags:
                found[-1] = found[-1][0] + size, flags
            elif size:
                found.append((size, flags))

        at = looked = offset
        while looked < offset + length and len(found) <= limit:
            mapped = await self._mapped_any(looked, offset + length - looked)
            for start, size in mapped:
                begin, stop = max(start, at), min(start + size, offset + length)
                if begin < stop:
                    add(begin - at, STATE_HOLE | STATE_ZERO)
                    add(stop - begin, 0)
                    at = stop
            looked = max(looked + 1, sum(mapped[-1])) if mapped else offset + length
        if looked >= offset + length:
            add(offset + length - at, STATE_HOLE | STATE_ZERO)
        await self.inflight.settle(offset, length)
        self.check()
        return found[:limit]

    async def _mapped_any(self, offset: int, length: int) -> list[tuple[int, int]]:
        while True:
            await self._admitted(reading=True)
            for member in self.readable():
                if member.leg is None:
                    continue
                try:
                    return await member.leg.mapped(offset, length)
                except OSError as error:
                    if member.leg is not None and member.leg.failure is None:
                        if error.errno == errno.ENOTSUP:
                            return [(offset, length)]
                        raise
                    self._look()
            await trio.lowlevel.checkpoint()

    # -- durability --------------------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Everything acknowledged before is durable on all legs that count. Joins the next common flush."""
        target = self._rounds_begun + 1
        while self._rounds_done < target:
            await self._admitted()
            if self._rounds_done >= target:
                break
            if self._flushing:
                await self._changed.wait()
                continue
            self._flushing = True
            try:
                await self._flush_all()
            finally:
                self._flushing = False
                self._change()
        self.check()

    async def _flush_all(self) -> None:
        self._rounds_begun = number = self._rounds_begun + 1
        sequence = self._sequence
        writers = self._writers
        failed = False

        async def flush_one(leg: Leg) -> None:
            nonlocal failed
            try:
                await leg.flush()
            except OSError as error:
                failed = True
                self.leg_failed(leg, error)

        async with trio.open_nursery() as nursery:
            for leg in writers:
                nursery.start_soon(flush_one, leg)
        while failed and self._excluding and self._end is None and not self._lost:
            if self._failing is not None:
                raise OSError(self._failing.errno, self._failing.strerror)
            await self._changed.wait()
        self.check()
        if self._lost:
            raise OSError(errno.EIO, f"{self.name}: the last leg in sync failed while it was flushed")
        if not self._excluding:
            # A leg that is gone and isn't excluded yet needs to be told of all this by `recent`.
            for leg in self._writers:
                if leg in writers:
                    leg.flushed_by_all(sequence)
            self._flushed_sequence = max(self._flushed_sequence, sequence)
        self._rounds_done = max(self._rounds_done, number)

    async def _flush_now_and_then(self) -> None:
        clean = 0
        while True:
            await trio.sleep(self.settings.flush_every_s)
            if self._shut:
                continue
            # Some more after the last write: what one round has rotated is forgotten with the next.
            clean = 0 if self._sequence != self._flushed_sequence else clean + 1
            if clean <= 3 and self._sequence:
                try:
                    await self.flush()
                except OSError as error:
                    log.info("%s: the common flush failed: %s", self.name, error)

    # -- legs that fail ----------------------------------------------------------------------------------------------

    def leg_failed(self, leg: Leg, error: OSError) -> None:
        """It is good for nothing any more, whatever it says itself."""
        for member in self.members.values():
            if member.leg is leg:
                self._drop(member, leg.failure or error)

    def _look(self) -> None:
        """Whether legs have failed."""
        for member in self.members.values():
            if member.leg is not None and member.leg.failure is not None:
                self._drop(member, member.leg.failure)

    def _drop(self, member: Member, error: OSError) -> None:
        """In one step: the leg is out, the gate is shut where it has to be, and those who must see to it are awake."""
        leg = member.leg
        assert leg is not None
        was = member.state
        member.leg = None
        member.error = error
        member.ready = False
        member.counters.failures += 1
        member.abandoned.set()
        leg.close()
        member.become(LegState.STALE if was is LegState.SYNCING else LegState.OFFLINE)
        log.warning("%s: the leg on %s is out: %s", self.name, member.info.node, error)
        if leg.is_local and error.errno == errno.ESTALE:
            self._depose(error)
        # Also of a leg that a record being written calls in sync: who hasn't stored that sees no leg leave by the next.
        self._remember(member)
        if member.info.id in self._required():
            self._excluding.add(member.info.id)
        if not any(m.state is LegState.UP_TO_DATE and m.leg is not None for m in self.members.values()):
            self._lose(error)
        if self._commit_scope is not None:
            self._commit_scope.cancel()  # the record that is being written may need that leg
        self._change()

    def _required(self) -> frozenset[str]:
        """Legs that a record calls in sync, or may."""
        return self.membership.in_sync.union(*(attempt.in_sync for attempt in self._attempts))

    def _remember(self, member: Member) -> None:
        """A leg that was brought up to date may lose what it has got since the last common flush: nobody else notes."""
        trackers = self._store.trackers if self._store is not None else {}
        missing = trackers.get(missing_tracker(member.info.id))
        if missing is not None:
            for name in (RECENT, RECENT_OLD):
                if name in trackers:
                    missing.update(trackers[name])

    def _lose(self, error: OSError) -> None:
        if self._lost:
            return
        log.error("%s: no leg in sync is left: %s; nothing is served until one is back", self.name, error)
        self._lost = True
        self._losses += 1
        self._doom(error)
        for member in self.members.values():
            if member.leg is not None:
                self._drop(member, OSError(errno.EIO, "the leg that it was copied from is gone"))

    def _doom(self, error: OSError) -> None:
        """All in flight fails, now or when its legs have let go of it."""
        for batch in self.inflight.batches.values():
            batch.doomed = error
        self._release(error)

    def _depose(self, error: OSError) -> None:
        """Another node is primary, or will be: nothing is acknowledged any more."""
        if self._end is not None:
            return
        self._end = OSError(errno.ESTALE, f"{self.name}: this node is not the primary any more: {error.strerror}")
        log.error("%s", self._end.strerror)
        self._shut = True
        self._reader = None
        self.ended.set()
        self._doom(self._end)
        for member in self.members.values():
            if member.leg is not None:
                member.leg.close()
                member.abandoned.set()
                member.leg = None
                member.become(LegState.UNPROVEN)
        self._change()

    def fence(self, error: OSError) -> None:
        """The node has promised a later term: stop at once."""
        self._depose(error)

    async def _watch(self) -> None:
        """Legs that are silent, or have failed with nothing in flight."""
        timeout_s = self.membership.options.timeout_s
        while True:
            await trio.sleep(timeout_s / 20)
            timeout_s = self.membership.options.timeout_s
            self._look()
            now = trio.current_time()
            silent = []
            for member in self.members.values():
                since = None if member.leg is None else member.leg.silent_since
                if since is not None and now - since >= timeout_s:
                    silent.append(member)
            others = any(
                m.leg is not None and m.state is LegState.UP_TO_DATE and m not in silent for m in self.members.values()
            )
            for member in silent:
                # Without another leg there is nobody to go on with: it is waited for.
                if others and member.leg is not None:
                    self._drop(member, OSError(errno.ETIMEDOUT, f"no progress for {timeout_s:g} s"))

    # -- records -----------------------------------------------------------------------------------------------------

    def _desired(self) -> Membership | None:
        """The record that says what is; None: the newest one does."""
        if self._lost or self._end is not None or not self.started.is_set():
            return None
        in_sync = frozenset(
            m.info.id
            for m in self.members.values()
            if m.leg is not None and (m.state is LegState.UP_TO_DATE or m.ready)
        )
        if "legs" in self._wanted:
            in_sync &= {info.id for info in self._wanted["legs"]}
        if not in_sync or (in_sync == self.membership.in_sync and not self._wanted and not self._attempts):
            return None
        newest = max([self.membership, *self._attempts], key=lambda record: record.epoch)
        return replace(self.membership, epoch=newest.epoch).next_epoch(in_sync=in_sync, **self._wanted)

    async def _govern(self) -> None:
        """The one task that writes records, and that begins anew when all legs are lost."""
        delay = self.settings.retry_s
        while self._end is None:
            if self._lost:
                with contextlib.suppress(OSError):
                    await self._begin()
                    continue
                await trio.sleep(self.settings.retry_s)
                continue
            record = self._desired()
            if record is None:
                delay = self.settings.retry_s
                await self._changed.wait()
                continue
            if await self._commit(record):
                delay = self.settings.retry_s
            elif self._end is None:
                with trio.move_on_after(delay):
                    await self._changed.wait()
                delay = min(delay * 2, 1.0)

    async def _commit(self, record: Membership) -> bool:
        self._attempts.append(record)
        error: OSError | None = None
        with trio.CancelScope() as self._commit_scope:
            try:
                await self._cluster.commit(record, expected=self.membership)
            except OSError as failed:
                error = failed
            else:
                self._commit_scope = None
                await self._tell_syncing(record)
                self._adopt(record)
                return True
        cancelled = self._commit_scope is not None and self._commit_scope.cancelled_caught
        self._commit_scope = None
        if cancelled:
            return True  # the next one is wanted at once
        assert error is not None
        if error.errno == errno.ESTALE:
            try:
                newest = await self._cluster.newest(self.membership.mirror)
            except OSError as unheard:
                error = unheard
            else:
                if newest in self._attempts:
                    self._adopt(newest)
                    return True
                self._depose(error)
                return False
        log.warning("%s: the record of which legs are in sync can't be written: %s", self.name, error)
        if self.membership.options.below_quorum == "fail" and self._excluding:
            self._failing = OSError(errno.EIO, f"{self.name}: below quorum: {error.strerror}")
            self._fail_parked()
            self._change()
        return False

    async def _tell_syncing(self, record: Membership) -> None:
        """Legs that are being brought up to date must know who has left, as what that one misses is noted by each leg
        that may be in sync some day. Before anything that it misses is acknowledged."""
        if self.membership.in_sync <= record.in_sync:
            return
        for member in list(self.members.values()):
            leg = member.leg
            if leg is not None and member.info.id not in record.in_sync and leg.failure is None:
                try:
                    await leg.accept(record, inconsistent=True)
                except OSError as error:
                    self.leg_failed(leg, error)

    def stale_beside(self, member: Member) -> list[str]:
        """Ids of other legs that aren't in sync."""
        return [leg.id for leg in self.membership.legs if leg.id not in self.membership.in_sync | {member.info.id}]

    def _adopt(self, record: Membership) -> None:
        """It counts."""
        self.membership = record
        # What was tried later may be stored somewhere: the next record has to come after it.
        self._attempts = [attempt for attempt in self._attempts if attempt.epoch > record.epoch]
        if all(getattr(record, name) == value for name, value in self._wanted.items()):
            self._wanted = {}
        for member in self.members.values():
            if member.info.id in record.in_sync and member.ready and member.leg is not None:
                member.ready = False
                member.become(LegState.UP_TO_DATE)
                log.info("%s: the leg on %s is in sync", self.name, member.info.node)
            elif member.info.id not in record.in_sync and member.leg is None:
                member.become(LegState.STALE)
        now = trio.current_time()
        for info in record.legs:
            self.members.setdefault(info.id, Member(info, now))
        for leg_id in [leg_id for leg_id in self.members if not record.has(leg_id)]:
            gone = self.members.pop(leg_id)
            gone.abandoned.set()
            if gone.leg is not None:
                gone.leg.close()
        self._excluding = {
            leg_id for leg_id in record.in_sync if leg_id in self.members and self.members[leg_id].leg is None
        }
        if not self._excluding:
            self._failing = None
            self._release(None)
        self._change()

    async def reconfigure(self, **changes: Any) -> None:
        """Write a record with other fields (`legs`, `voters`, `options`, `size_bytes`); returns when it counts."""
        self.check()
        self._wanted |= changes
        self._change()
        try:
            while not all(getattr(self.membership, name) == value for name, value in changes.items()):
                self.check()
                await self._changed.wait()
        finally:
            # Who has given up waiting doesn't want it any more. What was tried already may come to count all the same.
            self._wanted = {
                name: value for name, value in self._wanted.items() if name not in changes or value is not changes[name]
            }

    # -- the beginning -----------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        """Connect the legs in sync, make them equal, open the gate. Raises OSError: it can't be proven what is true."""
        eligible = self.membership.in_sync
        for attempt in self._attempts:
            eligible &= attempt.in_sync
        members = [self.members[leg_id] for leg_id in sorted(eligible)]
        with trio.move_on_after(self.membership.options.timeout_s):
            async with trio.open_nursery() as nursery:
                for member in members:
                    nursery.start_soon(self._connect_member, member)
        for member in members:
            if member.leg is not None and member.leg.failure is not None:
                member.error, member.leg = member.leg.failure, None  # gone again: it is excluded like one never heard
        here = [m for m in members if m.leg is not None]
        try:
            legs = [m.leg for m in here if m.leg is not None]
            if not legs:
                why = next((m.error.strerror for m in members if m.error is not None), "nobody answers")
                raise OSError(errno.EHOSTUNREACH, f"{self.name}: no leg in sync can be reached: {why}")
            intact = set()
            for member in here:
                try:
                    if (await self._facts(member.info, self.membership)).intact:
                        intact.add(member.info.id)
                except OSError as error:
                    member.error = error
            source = choose_source(legs, frozenset(intact), all_heard=len(legs) == len(self.membership.in_sync))
            others = [leg for leg in legs if leg is not source]
            self._note_missing()  # of what is recent, before that is forgotten
            # A leg that is in sync and isn't here learns what it misses by the record that excludes it.
            all_here = self._required() <= {member.info.id for member in here}
            self._sequence = await reconcile(source, others, self._sequence, self.size_bytes, forget=all_here)
            for leg in legs:
                # Durable with it is that the leg lacks nothing now, whatever it had lost (`LegKeeper.settled`).
                await self._store_at(leg)
            self._check_all(legs)
        except OSError:
            for member in here:
                if member.leg is not None:
                    member.leg.close()
                    member.leg = None
            raise
        for member in here:
            member.error = None
            member.become(LegState.UP_TO_DATE)
        self._lost = False
        self._excluding = {leg_id for leg_id in self._required() if self.members[leg_id].leg is None}
        self.started.set()
        self._change()

    async def _store_at(self, leg: Leg) -> None:
        """Have the leg store its record again: the newest, or one of ours that it has, and perhaps never counts.

        From the oldest on, so that none is stored anew: it would have to be refused at all before to get there.
        """
        for record in sorted([self.membership, *self._attempts], key=lambda record: record.epoch):
            try:
                return await leg.accept(record, inconsistent=False)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                stale = error
        raise stale

    def _check_all(self, legs: Sequence[Leg]) -> None:
        for leg in legs:
            if leg.failure is not None:
                raise OSError(leg.failure.errno, leg.failure.strerror)

    def _note_missing(self) -> None:
        """Before `recent` is forgotten: a leg that was being brought up to date may have lost that much of it."""
        for member in self.members.values():
            if member.info.id not in self._required():
                self._remember(member)

    async def _connect_member(self, member: Member) -> None:
        delay = self.settings.retry_s
        while True:
            try:
                member.leg = await self._connect(member.info, self.membership)
                member.abandoned = trio.Event()
                return
            except OSError as error:
                member.error = error
                await trio.sleep(delay)
                delay = min(delay * 2, self.settings.retry_max_s)

    # -- legs that come back -----------------------------------------------------------------------------------------

    async def _tend(self) -> None:
        """A task for each leg of the mirror."""
        tended: set[Member] = set()
        async with trio.open_nursery() as nursery:
            while True:
                for member in self.members.values():
                    if member not in tended:
                        tended.add(member)
                        nursery.start_soon(self._tend_one, member)
                await self._changed.wait()

    async def _tend_one(self, member: Member) -> None:
        delay = self.settings.retry_s
        while self.members.get(member.info.id) is member and self._end is None:
            if member.leg is not None or self._shut or member.info.id in self._required():
                delay = self.settings.retry_s if member.state is LegState.UP_TO_DATE else delay
                await self._changed.wait()
                continue
            try:
                leg = await self._connect(member.info, self.membership)
            except OSError as error:
                member.error = error
            else:
                if member.leg is not None or self._shut or self.members.get(member.info.id) is not member:
                    leg.close()
                    continue
                await self.admit(leg)
                if member.state is LegState.UP_TO_DATE:
                    continue
            await trio.sleep(delay)
            delay = min(delay * 2, self.settings.retry_max_s)

    async def admit(self, leg: Leg) -> None:
        """Bring a leg up to date and put it into the record. Returns when it is in sync, or has failed."""
        member = self.members[leg.info.id]
        try:
            known = (await self._facts(leg.info, self.membership)).known
            await leg.accept(self.membership, inconsistent=True)
        except OSError as error:
            member.error = error
            leg.close()
            return
        if member.leg is not None or self._shut or self._lost or self._end is not None:
            leg.close()
            return
        member.leg = leg
        member.abandoned = abandoned = trio.Event()
        member.counters.resyncs += 1
        member.become(LegState.SYNCING)
        member.resync = Resync(self, member, known=known, store=self._local_store(), settings=self.settings.resync)
        self._change()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def give_up() -> None:
                await abandoned.wait()
                nursery.cancel_scope.cancel()

            try:
                await member.resync.run()
            except OSError as error:
                member.resync.progress.state = f"failed: {error.strerror}"
                if member.leg is leg:
                    self._drop(member, error)
            else:
                if member.leg is leg:
                    member.ready = True
                    self._change()
                    while member.leg is leg and member.ready:
                        await self._changed.wait()
            nursery.cancel_scope.cancel()
        if member.state is LegState.UP_TO_DATE:
            member.error = None

    def _local_store(self) -> LegStore | None:
        """The primary's own store, if its leg is in sync."""
        return self._store if self._reader is not None else None

    def sources(self) -> list[Leg]:
        """The legs in sync; the first one is to be copied from."""
        return [m.leg for m in self.readable() if m.leg is not None]

    async def read_for_copy(self, offset: int, length: int, into: memoryview) -> None:
        """From any leg in sync. Not a client's read."""
        at = self.client_at
        await self._read_any(offset, length, into)
        self.client_at = at

    # -- barriers ----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def barrier(self) -> AsyncIterator[None]:
        """No batch is in flight, and none begins."""
        await self._admitted()
        self._barriers += 1
        self._change()
        try:
            await self.inflight.settle_all()
            self.check()
            yield
        finally:
            self._barriers -= 1
            self._change()

    async def _on_all(self, what: str, members: list[Member], action: Callable[[Leg], Awaitable[None]]) -> None:
        """On all of these. One that fails where another one doesn't is dropped; if all fail, nothing has changed."""
        failures: list[tuple[Leg, OSError]] = []
        legs = [m.leg for m in members if m.leg is not None]

        async def one(leg: Leg) -> None:
            try:
                await action(leg)
            except OSError as error:
                failures.append((leg, error))

        async with trio.open_nursery() as nursery:
            for leg in legs:
                nursery.start_soon(one, leg)
        if len(failures) == len(legs):
            raise failures[0][1] if failures else OSError(errno.EIO, f"{self.name}: no leg is there to {what}")
        for leg, error in failures:
            self.leg_failed(leg, error)
        while self._excluding and not self._lost:
            self.check()
            await self._changed.wait()

    async def snapshot(self, name: str) -> None:
        """At the same place in the order of writes on every leg in sync. A leg that isn't in sync doesn't get it."""
        async with self.barrier():
            in_sync = [m for m in self.members.values() if m.state is LegState.UP_TO_DATE]
            await self._on_all("take a snapshot", in_sync, lambda leg: leg.snapshot(name))

    async def resize(self, size_bytes: int) -> None:
        """A leg is never smaller than the record says: it grows before, and shrinks after it is written."""
        async with self.barrier():
            grows = size_bytes > self.size_bytes
            connected = [m for m in self.members.values() if m.state in (LegState.UP_TO_DATE, LegState.SYNCING)]
            if grows:
                await self._on_all("resize", connected, lambda leg: leg.resize(size_bytes))
            await self.reconfigure(size_bytes=size_bytes)
            if not grows:
                await self._on_all("resize", connected, lambda leg: leg.resize(size_bytes))

    async def demote(self, token: str | None = None) -> None:
        """End cleanly: everything durable on all legs, and a record that names no primary, and who may be next."""
        await self.flush()
        async with self.barrier():
            await self._flush_all()
            await self._flush_all()
            try:
                await self.reconfigure(primary=None, token=token)
            finally:
                # Also where it was given up: the record may be stored somewhere, and the next primary go on by it.
                self._depose(OSError(errno.ESTALE, "it was demoted"))

    async def stop(self) -> None:
        """End without a new record, everything durable: this node goes on later."""
        if self._end is None and not self._shut:
            await self.flush()
            async with self.barrier():
                await self._flush_all()
                await self._flush_all()

    # -- running -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled or deposed. Raises OSError if it can't begin."""
        try:
            await self._begin()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._govern)
                nursery.start_soon(self._watch)
                nursery.start_soon(self._flush_now_and_then)
                nursery.start_soon(self._tend)
                nursery.start_soon(self._heal)
                await self.ended.wait()
                nursery.cancel_scope.cancel()
        finally:
            if self._end is None:
                self._end = OSError(errno.ESHUTDOWN, f"{self.name}: the mirror was stopped")
            self._doom(self._end)  # legs may be gone already without having been excluded
            for member in self.members.values():
                if member.leg is not None:
                    member.leg.close()
                    member.leg = None
                    member.become(LegState.OFFLINE)
            self._change()

    def status(self) -> MirrorStatus:
        """Now."""
        now = trio.current_time()
        legs = []
        for member in self.members.values():
            leg = member.leg
            error = member.error.strerror if member.error is not None and leg is None else None
            legs.append(
                LegStatus(
                    info=member.info,
                    state=member.state,
                    for_s=now - member.since,
                    is_local=leg is not None and leg.is_local,
                    queued_bytes=0 if leg is None else leg.queued_bytes,
                    latency_s=member.latency_s,
                    error=error,
                    resync=None if member.resync is None else member.resync.progress.seen(now),
                    counters=replace(member.counters),
                )
            )
        if self._end is not None or self._lost:
            state = MirrorState.FAULTED
        elif all(leg.state is LegState.UP_TO_DATE for leg in legs):
            state = MirrorState.ONLINE
        else:
            state = MirrorState.DEGRADED
        waiting = None
        if self._lost and self._end is None:
            waiting = "no leg in sync is connected"
        elif self._excluding:
            nodes = ", ".join(sorted(self.members[leg_id].info.node for leg_id in self._excluding))
            waiting = f"a record without the leg on {nodes} doesn't count yet"
        elif self._barriers:
            waiting = "a snapshot or a resize is being made"
        return MirrorStatus(
            membership=self.membership,
            state=state,
            legs=tuple(legs),
            waiting=waiting,
            deposed=None if self._end is None else self._end.strerror,
            sequence=self._sequence,
            in_flight=len(self.inflight.batches),
            healed_blocks=self.healed_blocks,
        )


class _Outcome:
    """A `Done` to wait for."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._error: OSError | None = None

    def __call__(self, error: OSError | None) -> None:
        self._error = error
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()
        if self._error is not None:
            raise OSError(self._error.errno, self._error.strerror)


def _touched(changes: Sequence[Change]) -> tuple[set[int], list[tuple[int, int]] | None]:
    """The extents of changes: singly, and as ranges (first, behind the last) where they are long."""
    extents: set[int] = set()
    wide: list[tuple[int, int]] = []
    for change in changes:
        first, stop = extents_of(change.offset, change.length)
        if stop - first > WIDE_EXTENTS:
            wide.append((first, stop))
        else:
            extents.update(range(first, stop))
    return extents, wide or None
