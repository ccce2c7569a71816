"""The mirror: one block device over several legs, for as long as this node is its primary in one term.

**Writes.** Each batch gets a sequence and is submitted to every leg that counts, in one synchronous step, so that each
leg has the same order. It counts down; when all legs have it, the client is answered. Only whole blocks are submitted:
a part of a block is merged first, under a lock of its extent.

**A leg that fails**, or is silent for too long, is dropped in the same step in which that is noticed; the gate shuts,
and nothing that it misses is acknowledged before a `Membership` without it counts (`ClusterStore.commit`). Whoever
stores that record copies what was written recently into the set of what the leg misses. One task alone writes records
(`replication.records`): it makes the record be what the legs are.

**When the last leg in sync fails**, not counting those on NBD servers, what is in flight fails with it, and the mirror
begins anew as at a start: it waits for those legs, makes them equal (`replication.reconcile`), and opens the gate.

**Reads** come from a leg in sync, the local one first. A read that overlaps a batch in flight is answered when that
batch is on all legs, else a fail-over could take back what was read. So too when the batch was answered with an error
(the option `fail`, below quorum): it may be there or not, but once it was read it must stay.

**Deposed**: a record of ours is refused because of a later term. All in flight fails with ESTALE, and everything else
from then on.

A leg that is away is sought again, brought up to date (`replication.resync`), and admitted by a record.

This module owns the gate: whether a batch may be submitted, to whom, and who is told what became of it; which legs have
failed; and the beginning. Each other idea has a module of its own, with a Protocol that says what it needs of the
mirror: writes that wait (`edges`), reads that wait (`mirrorreads`), healing, common flushes (`commonflush`), records,
legs that come back (`returning`), barriers, and a later term where a leg can't come back in this one (`laterterm`).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

import trio

from replication.barriers import Barriers, fit
from replication.cluster import ClusterStore
from replication.commonflush import CommonFlush
from replication.edges import Edges
from replication.healing import Healing
from replication.inflight import EXTENT_SHIFT, Batch, InFlight, Locks, Outcome, touched
from replication.laterterm import LaterTerm
from replication.leg import (
    BLOCK_BYTES,
    RECENT,
    RECENT_OLD,
    Change,
    Done,
    Leg,
    LegState,
    LegStore,
    mirror_state,
    missing_tracker,
)
from replication.members import Connect, LegCounters, LegFacts, Member, MirrorStatus, readable
from replication.membership import LegInfo, Membership
from replication.mirrorreads import Reads
from replication.reconcile import LegError, choose_source, reconcile, told_of
from replication.records import Prove, Records
from replication.returning import Returning
from replication.site import MirrorSettings, Waits
from replication.slowlegs import waited_for

log = logging.getLogger("replication.mirror")

MASK: Final = BLOCK_BYTES - 1


def _yes() -> bool:
    return True


def _never_lapsed() -> str | None:
    return None


def _no() -> bool:
    return False


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
        lease_is_refused: Callable[[], bool] = _no,
        until_may_serve: Callable[[], Awaitable[None]] | None = None,
        lapsed: Callable[[], str | None] = _never_lapsed,
        prove: Prove | None = None,
        description: str = "",
        rotational: bool = False,
        settings: MirrorSettings | None = None,
    ) -> None:
        self.name = name
        self.description = description
        self.rotational = rotational
        self.membership = membership
        """The newest record that counts. `records` replaces it, nobody else."""
        self.settings = settings or MirrorSettings()
        self.started = trio.Event()
        self.ended = trio.Event()
        """Deposed: the export must go."""
        self.inflight = InFlight()
        self.locks = Locks()
        self.client_at = -1e9
        """When a client last asked for something, by trio's clock."""
        self.batches = 0
        """Of clients' writes and trims."""
        self.written_bytes = 0
        self.waits = Waits()
        self._local_counters = LegCounters()
        """Of the leg that `reader` is."""
        self.latency_s = 0.0
        """How long batches take, lately."""
        self._connect = connect
        self._store = store
        self._facts = facts
        self.may_serve = may_serve
        self.lease_is_refused = lease_is_refused
        self._until_may_serve = until_may_serve
        self._lapsed = lapsed
        """Why `may_serve` says no, for people."""
        now = trio.current_time()
        self.members: dict[str, Member] = {info.id: Member(info, now) for info in membership.legs}
        self.writers: tuple[Leg, ...] = ()
        self.reader: Leg | None = None
        """The local leg, if it may be read."""
        self.sequence = 0
        self.shut = True
        """A batch may not be submitted now: the one thing that the fast path asks."""
        self.lost = True
        """No leg in sync is connected: everything begins anew."""
        self.losses = 0
        self.breaks = 0
        """How often it was that, or has begun anew, without a leg that is known to have all that was acknowledged."""
        self._undecided = False
        """Begun without a leg that the record calls in sync: what the others were made equal to isn't read before a
        record without it counts, as a primary that begins with that leg would take it back."""
        self.failing: OSError | None = None
        """With the option `fail`, below quorum: what clients get."""
        self.end: OSError | None = None
        self.excluding: set[str] = set()
        """Legs that a record calls in sync, or may, and that are gone."""
        self._parked: list[Batch] = []
        """Done on all legs that are left, and waiting for a record without the one that is gone."""
        self._holders: frozenset[str] = frozenset()
        """With all legs let go: those, by their ids, that have all that is acknowledged or parked."""
        self._changed = trio.Event()
        """Replaced each time that something changes which tasks here may wait for."""
        self._room: trio.Event | None = None
        self.reading = Reads(self)
        self.healing = Healing(self, self.reading)
        self.edges = Edges(self, self.reading)
        self.flushes = CommonFlush(self)
        self.records = Records(self, cluster, retry_s=self.settings.retry_s)
        self.records.prove = prove
        self.barriers = Barriers(self, self.flushes, self.records)
        self.returning = Returning(self, self.records, connect, facts, store, self.settings)
        self._later_term = LaterTerm(self, self.records, self.barriers, self.flushes) if prove else None

    # -- the gate ----------------------------------------------------------------------------------------------------

    @property
    def size_bytes(self) -> int:
        return self.membership.size_bytes

    def change(self) -> None:
        """Something has: decide anew whether the gate is open, and wake all that wait."""
        self.shut = bool(
            self.lost
            or self.excluding
            or self.barriers.held
            or self.end is not None
            or not self.started.is_set()
            or self.records.may_be_smaller()
        )
        self._undecided = self._undecided and bool(self.excluding)
        self.reader = None
        if not self.lost and not self._undecided and self.end is None and self.started.is_set():
            for m in self.members.values():
                if m.state is LegState.UP_TO_DATE and m.leg is not None and m.leg.is_local:
                    assert self._store is not None
                    self.reader, self._local_counters = m.leg, m.counters
                    # What `LocalLeg.read_now` comes to, without two calls for each read.
                    self._read_here = self._store.read_now
                    break
        writers = [
            m.leg
            for m in self.members.values()
            if m.leg is not None and m.state in (LegState.UP_TO_DATE, LegState.SYNCING)
        ]
        # The local one behind other nodes': they work on a batch while it is applied here. NBD servers last: what they
        # may get must be known to the trackers here (`replication.nbdleg`).
        self.writers = tuple(sorted(writers, key=lambda leg: (leg.info.kind == "nbd", leg.is_local)))
        given = self.batches, self.written_bytes
        for member in self.members.values():
            member.takes(member.leg is not None and member.leg in self.writers, given)
        self.waits.gate(shut=self.shut and self.started.is_set() and self.end is None)
        self._tell_room()
        self._changed.set()
        self._changed = trio.Event()

    async def changed(self) -> None:
        """Until something has changed."""
        await self._changed.wait()

    def check(self) -> None:
        """Raises what every request gets from now on, if there is such a thing."""
        if self.end is not None:
            raise OSError(self.end.errno, self.end.strerror)

    async def admitted(self, *, reading: bool = False, leased: bool = True) -> None:
        """Until a request may go on. True at this very moment: no checkpoint between it and the use of that."""
        while True:
            self.check()
            if leased and not self.may_serve():
                if self._until_may_serve is not None:
                    await self._until_may_serve()
                else:
                    await trio.sleep(0.01)
                continue
            if reading and self.started.is_set() and not self.lost and not self._undecided:
                return
            if not self.shut:
                return
            if self.failing is not None:
                raise OSError(self.failing.errno, self.failing.strerror)
            await self._changed.wait()

    # -- writes ------------------------------------------------------------------------------------------------------

    def write_later(self, writes: list[tuple[int, memoryview]], done: Done) -> bool:
        """See `nbd.export.AcknowledgesLater`. False also for a part of a block: `write` merges it."""
        if self.shut or not self.may_serve():
            self.check()
            return False
        changes = []
        extents: set[int] = set()
        size, end = 0, self.membership.size_bytes
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
            if offset + length > end:
                return False  # the mirror was shrunk since it was judged: `write` says so
            changes.append(Change(offset, length, data))
        held = self.locks.held
        if held and not extents.isdisjoint(held):
            return False
        if not self.has_room(size):
            return False
        self.submit(changes, extents, None, size, done)
        return True

    def trim_later(self, ranges: list[tuple[int, int]], done: Done) -> bool:
        """See `nbd.export.AcknowledgesLater`. Rounds inwards, to whole blocks."""
        if self.shut or not self.may_serve():
            self.check()
            return False
        changes = []
        for offset, length in ranges:
            start, stop = -(-offset // BLOCK_BYTES) * BLOCK_BYTES, (offset + length) & ~MASK
            if stop > self.membership.size_bytes:
                return False  # see `write_later`
            if start < stop:
                changes.append(Change(start, stop - start, None))
        if not changes or not self.has_room(0):
            return False
        extents, wide = touched(changes)
        if self.locks.held and not self.unlocked(extents, wide):
            return False
        self.submit(changes, extents, wide, 0, done)
        return True

    def unlocked(self, extents: set[int], wide: list[tuple[int, int]] | None) -> bool:
        """Whether none of these extents is locked."""
        return extents.isdisjoint(self.locks.held) and not any(not self.locks.free(a, b) for a, b in wide or ())

    def write_now(self, writes: list[tuple[int, memoryview]]) -> bool:
        """Never: a write is acknowledged later."""
        return False

    def trim_now(self, ranges: list[tuple[int, int]]) -> bool:
        """Never: a trim is acknowledged later."""
        return False

    def has_room(self, size: int) -> bool:
        """Whether all queues take so many bytes more."""
        bound = self.settings.queue_bytes - size
        return all(leg.queued_bytes <= bound or not leg.queued_bytes for leg in self.writers)

    def submit(
        self, changes: list[Change], extents: set[int], wide: list[tuple[int, int]] | None, size: int, done: Done
    ) -> None:
        """To all legs, in this one step."""
        writers = self.writers
        self.sequence = sequence = self.sequence + 1
        self.batches += 1
        self.written_bytes += size
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
            self.look()
        if batch.doomed is not None:
            self._settle(batch, batch.doomed)
        elif not batch.failures:
            self._settle(batch, None)
        elif self.excluding:
            self._parked.append(batch)
            if self.failing is not None:
                self.fail_parked()
        else:
            self._settle(batch, None)

    def _settle(self, batch: Batch, error: OSError | None) -> None:
        """Answer, unless it was refused before."""
        self.inflight.remove(batch)
        took = trio.current_time() - batch.began
        if took > self.waits.longest_s:
            self.waits.longest_s = took
        self.latency_s += (took - self.latency_s) * 0.05
        self._tell_room()
        if batch.refused is None:
            batch.done(error)

    def _tell_room(self) -> None:
        """Some queue may have become shorter."""
        if self._room is not None:
            self._room.set()
            self._room = None

    def release(self, error: OSError | None) -> None:
        """Answer what waits for a record."""
        parked, self._parked = self._parked, []
        for batch in parked:
            self._settle(batch, error)

    def fail_parked(self) -> None:
        """What waits for a record fails with `failing`.

        The legs that are left have it, and one that the record calls in sync hasn't: a later primary may begin with
        either. So it goes on being in flight, and nobody reads it, until a record counts.
        """
        assert self.failing is not None
        for batch in self._parked:
            if batch.refused is None:
                batch.refuse(self.failing)

    async def room(self) -> None:
        """Until some queue may have become shorter."""
        if self._room is None:
            self._room = trio.Event()
        await self._room.wait()

    async def write(self, offset: int, data: memoryview | bytes) -> None:
        """Write; may wait. Parts of blocks at its edges are merged with what is there."""
        await self.edges.write(offset, data)

    async def trim(self, offset: int, length: int) -> None:
        """Forget the range, rounded inwards to whole blocks; it reads as zeros afterwards."""
        await self.edges.trim(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, no_hole: bool, fast: bool) -> None:
        """Zeros; without space, unless `no_hole`: then they are written as data."""
        await self.edges.write_zeroes(offset, length, no_hole=no_hole, fast=fast)

    async def copy_to(
        self, member: Member, offset: int, data: memoryview | None, *, length: int = 0, lost: bool = False
    ) -> bool:
        """Submit bytes (None: zeros, or `lost`) to one leg only, in its order; whether it has them.

        The caller has made sure that no batch has touched them since they were read: nothing waits before `submit`. It
        doesn't change the data before this returns.
        """
        leg = member.leg
        if leg is None:
            return False
        outcome = Outcome()
        self.sequence += 1
        change = Change(offset, length if data is None else len(data), data, lasting=True, lost=lost)
        leg.submit(self.sequence, [change], outcome)
        try:
            await outcome.wait()
        except OSError:
            self.look()
            return False
        finally:
            self._tell_room()
        return True

    async def cache(self, offset: int, length: int) -> None:
        """Nothing to be done ahead."""
        self.check()
        await trio.lowlevel.checkpoint()

    # -- reads -------------------------------------------------------------------------------------------------------

    def read_now(self, offset: int, length: int, into: memoryview) -> bool:
        """False where a batch in flight is in the way, or the local leg isn't in sync."""
        leg = self.reader
        if leg is None or leg.failure is not None or not self.may_serve():
            return False
        inflight = self.inflight
        if inflight.batches and inflight.overlaps(offset, length):
            return False
        try:
            if not self._read_here(offset, length, into):
                return False
        except OSError:
            return False  # `read` sees to it: it may be answered by another leg
        self.took_reads(1, length)
        return True

    def lend_reads(self) -> Callable[[int, int, memoryview], bool] | None:
        """See `nbd.export.LendsReads`: the local leg's store, while no batch is in flight.

        Nothing is written before the next checkpoint, so what is read is what was there at this moment, when this node
        may serve: the lease need not be looked at again for each read.
        """
        leg = self.reader
        if self.inflight.batches or leg is None or leg.failure is not None or not self.may_serve():
            return None
        return self._read_here

    def took_reads(self, reads: int, read_bytes: int) -> None:
        """Clients have read so much of the local leg."""
        counters = self._local_counters
        counters.reads += reads
        counters.read_bytes += read_bytes

    async def read(self, offset: int, length: int, into: memoryview) -> None:
        """Read; what was read is on all legs when this returns."""
        await self.reading.read(offset, length, into)

    async def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """What is mapped, of a leg in sync."""
        return await self.reading.extents(offset, length, limit)

    def readable(self) -> list[Member]:
        """The legs in sync: the local one, then the nearest."""
        return readable(self.members.values())

    def sources(self) -> list[Leg]:
        """The legs in sync; the first one is to be copied from."""
        return [m.leg for m in self.readable() if m.leg is not None]

    async def read_for_copy(self, offset: int, length: int, into: memoryview) -> None:
        """From any leg in sync. Not a client's read."""
        await self.reading.read_for_copy(offset, length, into)

    def unreadable(self, member: Member, offset: int, length: int) -> None:
        """This leg couldn't read that; another one could."""
        self.healing.later(member, offset, length)

    def nowhere(self, offset: int) -> None:
        """No leg could read the block there."""
        self.healing.nowhere(offset)

    async def heal(self, leg_id: str, offset: int, length: int) -> int:
        """Write anew on one leg the blocks in this range that it can't read; how many. They come from another leg."""
        return await self.healing.heal(leg_id, offset, length)

    async def flush(self) -> None:
        """Everything acknowledged before is durable on all legs that count. Joins the next common flush."""
        await self.flushes.flush()

    # -- legs that fail ----------------------------------------------------------------------------------------------

    def leg_failed(self, leg: Leg, error: OSError) -> None:
        """It is good for nothing any more, whatever it says itself."""
        for member in self.members.values():
            if member.leg is leg:
                self.drop(member, leg.failure or error)

    def legs_unable(self, unable: Mapping[str, OSError]) -> bool:
        """Legs on these nodes can't store a record that has them in sync: they are out, if another one is left.

        Whether any is.
        """
        if not any(m.is_proof and m.info.node not in unable for m in self.members.values()):
            return False
        failed = [
            m
            for m in self.members.values()
            if m.leg is not None and (m.is_proof or m.ready) and m.info.kind == "terrace" and m.info.node in unable
        ]
        for member in failed:
            self.drop(member, unable[member.info.node])
        return bool(failed)

    def look(self) -> None:
        """Whether legs have failed."""
        for member in self.members.values():
            if member.leg is not None and member.leg.failure is not None:
                self.drop(member, member.leg.failure)

    def drop(self, member: Member, error: OSError) -> None:
        """In one step: the leg is out, the gate is shut where it has to be, and those who must see to it are awake."""
        leg = member.leg
        assert leg is not None
        was = member.state
        # By its own failure: what its resync was refused by another leg says nothing of this node.
        is_fenced = leg.is_local and leg.failure is not None and leg.failure.errno == errno.ESTALE
        member.leg = None
        member.error = error
        member.ready = False
        member.counters.failures += 1
        member.abandoned.set()
        leg.close()
        member.become(LegState.STALE if was is LegState.SYNCING else LegState.OFFLINE)
        log.warning("%s: the leg on %s is out: %s", self.name, member.info.place, error)
        if is_fenced:
            self.depose(error)
        # Also of a leg that a record being written calls in sync: who hasn't stored that sees no leg leave by the next.
        self._remember(member)
        if member.info.id in self.records.required():
            self.excluding.add(member.info.id)
        if not any(m.is_proof for m in self.members.values()):
            self._lose(error)
        self.records.interrupt()  # the one that is being written may need that leg
        self.change()

    def _remember(self, member: Member) -> None:
        """A leg that was brought up to date may lose what it has got since the last common flush: nobody else notes."""
        trackers = self._store.trackers if self._store is not None else {}
        missing = trackers.get(missing_tracker(member.info.id))
        if missing is not None:
            for name in (RECENT, RECENT_OLD):
                if name in trackers:
                    missing.update(trackers[name])

    def _lose(self, error: OSError) -> None:
        if self.lost:
            return
        log.error("%s: no leg in sync is left: %s; nothing is served until one is back", self.name, error)
        self.lost = True
        self.losses += 1
        self.breaks += 1
        self._holders = frozenset()
        self._doom(error)
        for member in self.members.values():
            if member.leg is not None:
                self.drop(member, OSError(errno.EIO, "the leg that it was copied from is gone"))

    def is_at_rest(self) -> bool:
        """Whether nothing is in flight but what is on all legs that are left, and waits for a record."""
        return len(self.inflight.batches) == len(self._parked)

    def let_go(self) -> None:
        """Of all legs, at rest: everything begins anew.

        What is parked stays so. When a leg that has it is what the others are made equal to, it is on all of them as it
        was on those that were left; else it fails, as what is in flight does where the last leg in sync is lost.
        """
        assert self.is_at_rest()
        self._holders = frozenset(m.info.id for m in self.members.values() if m.is_proof)
        self.lost = True
        self.losses += 1
        for member in self.members.values():
            if member.leg is not None:
                member.leg.close()
                member.leg, member.ready = None, False
                member.abandoned.set()
                member.become(LegState.STALE if member.state is LegState.SYNCING else LegState.OFFLINE)
        self.records.interrupt()
        self.change()

    def _doom(self, error: OSError) -> None:
        """All in flight fails, now or when its legs have let go of it."""
        for batch in self.inflight.batches.values():
            batch.doomed = error
        self.release(error)

    def depose(self, error: OSError) -> None:
        """Another node is primary, or will be: nothing is acknowledged any more."""
        if self.end is not None:
            return
        self.end = OSError(errno.ESTALE, f"{self.name}: this node is not the primary any more: {error.strerror}")
        log.error("%s", self.end.strerror)
        self.shut = True
        self.reader = None
        self.ended.set()
        self._doom(self.end)
        for member in self.members.values():
            if member.leg is not None:
                member.leg.close()
                member.abandoned.set()
                member.leg = None
                member.become(LegState.UNPROVEN)
        self.change()

    def fence(self, error: OSError) -> None:
        """The node has promised a later term: stop at once."""
        self.depose(error)

    async def _watch(self) -> None:
        """Legs that are silent, or have failed with nothing in flight."""
        timeout_s = self.membership.options.timeout_s
        while True:
            await trio.sleep(timeout_s / 20)
            timeout_s = self.membership.options.timeout_s
            self.look()
            now = trio.current_time()
            silent = []
            for member in self.members.values():
                since = None if member.leg is None else member.leg.silent_since
                if since is not None and now - since >= timeout_s:
                    silent.append(member)
            others = any(m.is_proof and m not in silent for m in self.members.values())
            for member in silent:
                # Without another leg that stores records there is nobody to go on with: it is waited for.
                if others and member.leg is not None:
                    self.drop(member, OSError(errno.ETIMEDOUT, f"no progress for {timeout_s:g} s"))

    def stale_beside(self, member: Member) -> list[str]:
        """Ids of other legs that aren't in sync."""
        return self.records.stale_beside(member)

    async def reconfigure(self, **changes: Any) -> None:
        """Write a record with other fields (`legs`, `voters`, `options`, `size_bytes`); returns when it counts."""
        await self.records.reconfigure(**changes)

    # -- the beginning -----------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Connect the legs in sync, make them equal, open the gate. Raises OSError: it can't be proven what is true.

        A leg that is there, and fails again while they are made equal, is one that isn't there: else a node whose disk
        is broken, and which answers, would keep all others from being served.
        """
        failed: list[str] = []
        unfit: OSError | None = None
        while True:
            left_out = frozenset(one for one in failed if failed.count(one) > 1)
            try:
                return await self._begin_without(left_out)
            except LegError as error:
                failed.append(error.leg.info.id)
                unfit = error
                if not self.membership.in_sync & self.membership.terrace_ids - {*left_out, error.leg.info.id}:
                    raise
            except OSError as error:
                raise unfit if left_out and unfit is not None else error from None

    async def _begin_without(self, left_out: frozenset[str]) -> None:
        # All of these have what was acknowledged, also those that a record leaves out that isn't known to count. But
        # whoever comes next may go on by that one: a leg that it has in sync, too, must be there, and stay.
        needed = self.membership.in_sync
        for attempt in self.records.attempts:
            needed &= attempt.in_sync
        # An NBD server proves nothing: a record without it comes next, and it gets what is recent by a resync.
        needed &= self.membership.terrace_ids
        proof = self.membership.in_sync & self.membership.terrace_ids
        members = [self.members[leg_id] for leg_id in sorted(proof - left_out)]
        timeout_s = self.membership.options.timeout_s
        until = trio.current_time() + timeout_s
        with trio.move_on_after(max(timeout_s, self.settings.first_leg_s)) as patience:

            async def connect(member: Member) -> None:
                await self._connect_member(member)
                # The others have what is left of the time, and a moment more where the first one was late.
                patience.deadline = min(patience.deadline, max(until, trio.current_time() + timeout_s / 2))

            async with trio.open_nursery() as nursery:
                for member in members:
                    nursery.start_soon(connect, member)
        for member in members:
            if member.leg is not None and member.leg.failure is not None:
                member.error, member.leg = member.leg.failure, None  # gone again: it is excluded like one never heard
        here = [m for m in members if m.leg is not None]
        try:
            if not needed & {m.info.id for m in here}:
                lacking = [m for m in members if m.info.id in needed and m.error is not None]
                why = next((m.error.strerror for m in lacking if m.error is not None), "nobody answers")
                raise OSError(errno.EHOSTUNREACH, f"{self.name}: no leg in sync can be reached: {why}")
            refusal: OSError | None = None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_beginning, [m.leg for m in here if m.leg is not None])
                try:
                    await self._make_equal(here)
                except OSError as error:
                    refusal = error  # raised outside: a nursery would put it into a group
                nursery.cancel_scope.cancel()
            if refusal is not None:
                raise refusal
        except OSError as error:
            for member in here:
                if member.leg is not None:
                    if isinstance(error, LegError) and error.leg is member.leg:
                        member.error = OSError(error.errno, error.strerror)
                    member.leg.close()
                    member.leg = None
            raise
        for member in here:
            member.error = None
            self.healing.opened_anew(member)
            member.become(LegState.UP_TO_DATE)
        self.lost = False
        self.excluding = {leg_id for leg_id in self.records.required() if self.members[leg_id].leg is None}
        self._undecided = bool(self.excluding)
        self.started.set()
        if not self.excluding:
            if not self.records.may_be_smaller():
                self.failing = None
            self.release(None)  # what was parked is on all of them
        self.change()

    async def _make_equal(self, here: Sequence[Member]) -> None:
        """These have the same, and durably the record, when this returns. Raises OSError."""
        legs = [m.leg for m in here if m.leg is not None]
        intact = set()
        for member in here:
            try:
                if (await self._facts(member.info, self.membership)).intact:
                    intact.add(member.info.id)
            except OSError as error:
                member.error = error
        proof = self.membership.in_sync & self.membership.terrace_ids
        source = choose_source(legs, frozenset(intact), all_heard=len(legs) == len(proof))
        if source.info.id not in self._holders & intact:
            # Before anything is copied: those that have it may be without it then, and make the others equal later.
            self._holders = frozenset()
            self.breaks += 1
            self._doom(OSError(errno.EIO, f"{self.name}: it has begun anew, without a leg that is known to have this"))
        others = [leg for leg in legs if leg is not source]
        size_bytes = max(record.size_bytes for record in (self.membership, *self.records.attempts))
        for leg in legs:
            with told_of(leg):
                await fit(leg, size_bytes)
        # For the record that is wanted next, too: the last leg in sync may have been lost while legs were grown for it.
        # From the size before that on, as there: what a leg has behind it must not be seen again.
        if (wanted_bytes := self.records.wanted.get("size_bytes", 0)) > size_bytes:
            await self._grow_for(wanted_bytes, legs)
        self._note_missing()  # of what is recent, before that is forgotten
        # A leg that is in sync and isn't here learns what it misses by the record that excludes it.
        all_here = self.records.required() <= {member.info.id for member in here}
        # Where none is intact, what counts is what was flushed, and that each of them has.
        good = frozenset(intact or {leg.info.id for leg in legs})
        self.sequence = await reconcile(source, others, self.sequence, self.size_bytes, forget=all_here, good=good)
        for leg in legs:
            # Durable with it is that the leg lacks nothing now, whatever it had lost (`LegKeeper.settled`).
            with told_of(leg):
                await self._store_at(leg)
        self._check_all(legs)

    async def _grow_for(self, size_bytes: int, legs: Sequence[Leg]) -> None:
        """A leg that is well and refuses it ends the wish: nobody else may be there to begin with. Raises OSError."""
        for leg in legs:
            try:
                await fit(leg, size_bytes)
            except OSError as error:
                if leg.failure is None:
                    self.records.refuse("size_bytes", error)
                raise LegError(leg, error) from error

    async def _watch_beginning(self, legs: Sequence[Leg]) -> None:
        """A leg that falls silent is let go, so that it is begun anew without it, where another one goes on.

        Its connection may be kept for much longer than the timeout (`terrace.diskless`), for when all are away.
        """
        timeout_s = self.membership.options.timeout_s
        while True:
            await trio.sleep(timeout_s / 20)
            now = trio.current_time()
            since = {leg: leg.silent_since for leg in legs if not leg.is_local}
            silent = [leg for leg, at in since.items() if at is not None and now - at >= timeout_s]
            if len(silent) < len(legs):
                for leg in silent:
                    leg.close()

    async def _store_at(self, leg: Leg) -> None:
        """Have the leg store its record again: the newest, or one of ours that it has, and perhaps never counts.

        From the oldest on, so that none is stored anew: it would have to be refused at all before to get there.
        """
        for record in sorted([self.membership, *self.records.attempts], key=lambda record: record.epoch):
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
                raise LegError(leg, leg.failure)

    def _note_missing(self) -> None:
        """Before `recent` is forgotten: a leg that was being brought up to date may have lost that much of it."""
        for member in self.members.values():
            if member.info.id not in self.records.required():
                self._remember(member)

    async def _connect_member(self, member: Member) -> None:
        delay = self.settings.retry_s
        while True:
            try:
                member.leg = await self._connect(member.info, self.membership)
                member.error = None
                member.abandoned = trio.Event()
                return
            except OSError as error:
                member.error = error
                await trio.sleep(delay)
                delay = min(delay * 2, self.settings.retry_max_s)

    # -- all legs at the same place in the order ---------------------------------------------------------------------

    def barrier(self) -> AbstractAsyncContextManager[None]:
        """No batch is in flight, and none begins."""
        return self.barriers.barrier()

    async def size_decided(self) -> None:
        """Before a resize is judged: see `Barriers.size_decided`."""
        await self.barriers.size_decided()

    async def resize(self, size_bytes: int) -> None:
        """See `Barriers.resize`."""
        await self.barriers.resize(size_bytes)

    async def demote(self, token: str | None = None) -> None:
        """End cleanly: everything durable on all legs, and a record that names no primary, and who may be next."""
        await self.barriers.demote(token)

    async def stop(self) -> None:
        """End without a new record, everything durable: this node goes on later."""
        await self.barriers.stop()

    # -- running -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled or deposed. Raises OSError if it can't begin."""
        try:
            await self.begin()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.records.govern)
                nursery.start_soon(self._watch)
                nursery.start_soon(self.flushes.now_and_then, self.settings.flush_every_s)
                nursery.start_soon(self.returning.tend)
                nursery.start_soon(self.healing.run)
                if self._later_term is not None:
                    nursery.start_soon(self._later_term.run)
                await self.ended.wait()
                nursery.cancel_scope.cancel()
        finally:
            if self.end is None:
                self.end = OSError(errno.ESHUTDOWN, f"{self.name}: the mirror was stopped")
            self._doom(self.end)  # legs may be gone already without having been excluded
            for member in self.members.values():
                if member.leg is not None:
                    member.leg.close()
                    member.leg = None
                    member.become(LegState.OFFLINE)
            self.change()

    def status(self) -> MirrorStatus:
        """Now."""
        now = trio.current_time()
        given = self.batches, self.written_bytes
        legs = tuple(member.status(now, given) for member in self.members.values())
        waited_s, longest_s = self.waits.so_far()
        lapsed = self._lapsed()
        is_served = self.end is None and not self.lost and lapsed is None
        waiting = None
        if self.lost and self.end is None:
            waiting = "no leg in sync is connected"
        elif self.excluding:
            places = ", ".join(sorted(self.members[leg_id].info.place for leg_id in self.excluding))
            waiting = f"a record without the leg on {places} doesn't count yet{self.records.problem_in_words()}"
        elif self.barriers.held:
            waiting = f"a snapshot or a resize is being made{self.records.problem_in_words()}"
        elif self.records.may_be_smaller():
            why = self.records.problem_in_words()
            waiting = f"whether it is smaller, by a resize that was given up, isn't known yet{why}"
        elif self.end is None:
            waiting = lapsed
        slow = None
        if waiting is None and self.end is None:
            batches = self.inflight.batches.values()
            slow = waited_for(batches, self.members.values(), self.membership.options.timeout_s, now)
        return MirrorStatus(
            membership=self.membership,
            state=mirror_state((leg.state for leg in legs), is_served=is_served),
            legs=legs,
            waiting=waiting or slow,
            deposed=None if self.end is None else self.end.strerror,
            sequence=self.sequence,
            in_flight=len(self.inflight.batches),
            healed_blocks=self.healing.healed_blocks,
            flush_age_s=self.flushes.age_s,
            waited_s=waited_s,
            longest_wait_s=longest_s,
            unmendable_blocks=len(self.healing.unmendable),
            map_damaged=frozenset(leg_id for leg_id, extents in self.healing.map_damage.items() if extents),
            is_lost=self.lost and self.end is None,
            is_failing=self.failing is not None and self.shut,
            is_stopped=self.end is not None and self.end.errno == errno.ESHUTDOWN,
            waits_for_leg=slow is not None,
        )
