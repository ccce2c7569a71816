"""Records of a mirror's primary: the one task that makes the newest `Membership` be what the legs are.

A record that was tried and not seen to count may be stored somewhere, and count for who comes next. Until a later one
counts, a leg that any of them calls in sync is treated as if it were (`required`), and each new record comes after all
that were tried.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import trio

from replication.cluster import ClusterStore, NotStoredError
from replication.leg import Leg, LegState
from replication.members import Member
from replication.membership import Membership
from replication.site import Gate

log = logging.getLogger("replication.mirror")

Prove = Callable[[], Awaitable[Membership]]
"""The record with which this node begins a later term, which counts. Raises OSError."""


class Recorded(Gate, Protocol):
    """What writing records needs of the mirror."""

    started: trio.Event

    def fail_parked(self) -> None:
        """Writes that wait for a record fail with `failing`."""

    def release(self, error: OSError | None) -> None:
        """Answer writes that wait for a record."""

    def leg_failed(self, leg: Leg, error: OSError) -> None:
        """It is out."""

    def legs_unable(self, unable: Mapping[str, OSError]) -> bool:
        """Legs on these nodes can't store a record that has them in sync: they are out, if another one is left.

        Whether any is.
        """

    def depose(self, error: OSError) -> None:
        """Another node is primary, or will be."""

    async def begin(self) -> None:
        """Begin anew. Raises OSError."""


class Records:
    """See the module. `govern` has to be run. Nobody else sets the mirror's `membership`."""

    def __init__(self, site: Recorded, cluster: ClusterStore, *, retry_s: float) -> None:
        self._site = site
        self._cluster = cluster
        self._retry_s = retry_s
        self.attempts: list[Membership] = []
        """Records of ours of which it isn't known whether they count."""
        self.outdated = False
        """The last one was refused, since a later term was promised, or a record of it is stored, somewhere."""
        self.wanted: dict[str, Any] = {}
        """What `reconfigure` wants in the record."""
        self._refused: dict[str, OSError] = {}
        """Of that, what can't be had, and why."""
        self.problem: OSError | None = None
        """Why the record that was tried last isn't known to count."""
        self.renewal: Prove | None = None
        """With all legs let go: what begins a later term (`replication.laterterm`). None again when all has begun."""
        self._is_renewed = False
        """It has begun one. All that is left is to begin with its legs, as often as that takes."""
        self.prove: Prove | None = None
        """What a renewal asks, where this primary may begin later terms by itself."""
        self._commit_scope: trio.CancelScope | None = None

    def interrupt(self) -> None:
        """The record that is being written may need a leg that is gone: another one is wanted."""
        if self._commit_scope is not None:
            self._commit_scope.cancel()

    def required(self) -> frozenset[str]:
        """Legs that a record calls in sync, or may."""
        return self._site.membership.in_sync.union(*(attempt.in_sync for attempt in self.attempts))

    def is_size_decided(self) -> bool:
        """No record that isn't known to count has another size: of a resize that was given up, perhaps."""
        return all(attempt.size_bytes == self._site.membership.size_bytes for attempt in self.attempts)

    def may_be_smaller(self) -> bool:
        """A record that isn't known to count is of a smaller size.

        Who goes on by it cuts off what is behind that, so nothing may be acknowledged there: it is a shrink that was
        given up, or the record that was to undo a growth that has come to count first.
        """
        return any(attempt.size_bytes < self._site.membership.size_bytes for attempt in self.attempts)

    async def size_decided(self) -> None:
        """Until it is."""
        while not self.is_size_decided():
            self._site.check()
            await self._site.changed()

    def problem_in_words(self) -> str:
        """Why the last record isn't known to count, behind a sentence; empty where there is no problem."""
        return "" if self.problem is None else f": {self.problem.strerror}"

    def _desired(self) -> Membership | None:
        """The record that says what is; None: the newest one does."""
        if self._site.lost or self._site.end is not None or not self._site.started.is_set():
            return None
        in_sync = frozenset(
            m.info.id
            for m in self._site.members.values()
            if m.leg is not None and (m.state is LegState.UP_TO_DATE or m.ready)
        )
        if "legs" in self.wanted:
            in_sync &= {info.id for info in self.wanted["legs"]}
        if not in_sync & self._site.membership.terrace_ids or (
            in_sync == self._site.membership.in_sync and not self.wanted and not self.attempts
        ):
            return None
        newest = max([self._site.membership, *self.attempts], key=lambda record: record.epoch)
        return replace(self._site.membership, epoch=newest.epoch).next_epoch(in_sync=in_sync, **self.wanted)

    async def govern(self) -> None:
        """The one task that writes records, and that begins anew when all legs are lost."""
        delay = self._retry_s
        while self._site.end is None:
            if self._site.lost:
                with contextlib.suppress(OSError):
                    await self._renew()
                    if self._site.end is None:
                        await self._site.begin()
                        self._end_renewal()
                    continue
                if self._is_refused():
                    self.renewal, self._is_renewed = self.prove, False
                await trio.sleep(self._retry_s)
                continue
            record = self._desired()
            if record is None:
                delay = self._retry_s
                await self._site.changed()
                continue
            if await self._commit(record):
                delay = self._retry_s
            elif self._site.end is None:
                with trio.move_on_after(delay):
                    await self._site.changed()
                delay = min(delay * 2, 1.0)

    async def _renew(self) -> None:
        """Begin a later term, where that is wanted. If it can't be proven, the old one may go on."""
        if self.renewal is None or self._is_renewed:
            return
        try:
            record = await self.renewal()
        except OSError as error:
            log.warning("%s: no later term can be begun: %s", self._site.name, error.strerror)
            if error.errno == errno.ESTALE:
                self._site.depose(error)
            return
        self.attempts, self._is_renewed = [], True
        self._adopt(record)

    def _is_refused(self) -> bool:
        """Whether it can't begin since a leg in sync takes nothing of this term any more: another one has begun one, or
        has failed to."""
        members = [self._site.members[one] for one in self._site.membership.in_sync if one in self._site.members]
        return any(m.leg is None and m.error is not None and m.error.errno == errno.ESTALE for m in members)

    def _end_renewal(self) -> None:
        if self.renewal is not None:
            self.renewal, self._is_renewed = None, False
            self._site.change()

    async def _commit(self, record: Membership) -> bool:
        self.attempts.append(record)
        error: OSError | None = None
        with trio.CancelScope() as self._commit_scope:
            try:
                await self._cluster.commit(record, expected=self._site.membership)
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
        self.outdated = error.errno == errno.ESTALE
        if self.outdated:
            try:
                newest = await self._cluster.newest(self._site.membership.mirror)
            except OSError as unheard:
                error = unheard
            else:
                if newest in self.attempts:
                    self._adopt(newest)
                    return True
                self._site.depose(error)
                return False
        # Tried each second or so, perhaps for days: said once, and again when it is for another reason.
        is_known = self.problem is not None and self.problem.errno == error.errno
        level = logging.DEBUG if is_known else logging.WARNING
        log.log(level, "%s: the record of which legs are in sync can't be written: %s", self._site.name, error)
        self.problem = error
        # While it waits for the record nothing is written or flushed that could tell that these have failed.
        if isinstance(error, NotStoredError) and self._site.legs_unable(error.unable):
            return True  # the next one, without them, is wanted at once
        waits = bool(self._site.excluding) or self.may_be_smaller()
        if self._site.membership.options.below_quorum == "fail" and waits:
            self._site.failing = OSError(errno.EIO, f"{self._site.name}: below quorum: {error.strerror}")
            self._site.fail_parked()
            self._site.change()
        return False

    async def _tell_syncing(self, record: Membership) -> None:
        """Legs that are being brought up to date must know who has left, as what that one misses is noted by each leg
        that may be in sync some day. Before anything that it misses is acknowledged."""
        if self._site.membership.in_sync <= record.in_sync:
            return
        for member in list(self._site.members.values()):
            leg = member.leg
            if leg is not None and member.info.id not in record.in_sync and leg.failure is None:
                try:
                    await leg.accept(record, inconsistent=True)
                except OSError as error:
                    self._site.leg_failed(leg, error)

    def stale_beside(self, member: Member) -> list[str]:
        """Ids of other legs that aren't in sync."""
        record = self._site.membership
        return [leg.id for leg in record.legs if leg.id not in record.in_sync | {member.info.id}]

    def _adopt(self, record: Membership) -> None:
        """It counts."""
        if self.problem is not None:
            log.warning("%s: a record of which legs are in sync counts again", self._site.name)
        self._site.membership, self.problem = record, None
        self.outdated = False
        # What was tried later may be stored somewhere: the next record has to come after it.
        self.attempts = [attempt for attempt in self.attempts if attempt.epoch > record.epoch]
        if all(getattr(record, name) == value for name, value in self.wanted.items()):
            self.wanted = {}
        for member in self._site.members.values():
            if member.leg is not None and member.state is LegState.SYNCING and member.fitted_bytes < record.size_bytes:
                # It has come back since the resize, which was given up, and what is new wasn't brought to it.
                self._site.leg_failed(member.leg, OSError(errno.EAGAIN, "the mirror has grown meanwhile"))
            if member.info.id in record.in_sync and member.ready and member.leg is not None:
                member.ready = False
                member.become(LegState.UP_TO_DATE)
                log.info("%s: the leg on %s is in sync", self._site.name, member.info.place)
            elif member.info.id not in record.in_sync and member.leg is None:
                member.become(LegState.STALE)
        now = trio.current_time()
        for info in record.legs:
            self._site.members.setdefault(info.id, Member(info, now))
        for leg_id in [leg_id for leg_id in self._site.members if not record.has(leg_id)]:
            gone = self._site.members.pop(leg_id)
            gone.abandoned.set()
            if gone.leg is not None:
                gone.leg.close()
        members = self._site.members
        # Also by those that were tried later: who goes on by one of them may do so with a leg that is gone here.
        self._site.excluding = {one for one in self.required() if one in members and members[one].leg is None}
        if not self._site.excluding:
            self._site.release(None)
            if not self.may_be_smaller():
                self._site.failing = None
        self._site.change()

    def refuse(self, name: str, error: OSError) -> None:
        """This can't be had, and no record with it was tried: who waits for it, if anybody does still, hears why."""
        self.wanted.pop(name, None)
        self._refused[name] = error
        self._site.change()

    async def reconfigure(self, **changes: Any) -> None:
        """Write a record with other fields (`legs`, `voters`, `options`, `size_bytes`); returns when it counts."""
        self._site.check()
        self._refused = {name: error for name, error in self._refused.items() if name not in changes}
        self.wanted |= changes
        self._site.change()
        try:
            while not all(getattr(self._site.membership, name) == value for name, value in changes.items()):
                self._site.check()
                for refused in [self._refused[name] for name in changes if name in self._refused]:
                    raise OSError(refused.errno, refused.strerror)
                await self._site.changed()
        finally:
            # Who has given up waiting doesn't want it any more. What was tried already may come to count all the same.
            self.wanted = {
                name: value for name, value in self.wanted.items() if name not in changes or value is not changes[name]
            }
