"""Barriers of a mirror: what is done to all legs at the same place in the order of writes.

While one is held no batch is in flight, and none begins.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, Protocol

import trio

from replication.commonflush import CommonFlush
from replication.inflight import InFlight
from replication.leg import BLOCK_BYTES, Change, Leg, LegState
from replication.members import Member
from replication.reconcile import submitted
from replication.records import Records
from replication.site import Gate

LEAST_PATIENCE_S: Final = 5.0
"""So long at least, and thrice the timeout of a leg, a resize may take while clients wait for it."""


class Barred(Gate, Protocol):
    """What a barrier needs of the mirror."""

    inflight: InFlight
    sequence: int
    losses: int
    """How often no leg in sync was connected."""

    @property
    def size_bytes(self) -> int: ...

    def leg_failed(self, leg: Leg, error: OSError) -> None:
        """It is out."""

    def depose(self, error: OSError) -> None:
        """Nothing is acknowledged any more."""


async def fit(leg: Leg, size_bytes: int) -> None:
    """Give a leg the size of the record: a resize may have been interrupted before it, or have passed it by.

    What such a leg has behind that size is not what the others have, and would be seen when the mirror grows.
    """
    try:
        await leg.resize(size_bytes)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise


class Barriers:
    """See the module."""

    def __init__(self, site: Barred, flushes: CommonFlush, records: Records) -> None:
        self._site = site
        self._flushes = flushes
        self._records = records
        self.held = 0
        """How many there are: the gate is shut."""

    @contextlib.asynccontextmanager
    async def barrier(self, *, leased: bool = True) -> AsyncIterator[None]:
        """No batch is in flight, and none begins. `leased`: see `Gate.admitted`."""
        await self._site.admitted(leased=leased)
        self.held += 1
        self._site.change()
        try:
            await self._site.inflight.settle_all_for_client()
            self._site.check()
            yield
        finally:
            self.held -= 1
            self._site.change()

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
            raise failures[0][1] if failures else OSError(errno.EIO, f"{self._site.name}: no leg is there to {what}")
        for leg, error in failures:
            self._site.leg_failed(leg, error)
        await self._excluded()

    async def _excluded(self) -> None:
        """Until a record without the legs that are gone counts; or none is left, and all begins anew."""
        while self._site.excluding and not self._site.lost:
            self._site.check()
            await self._site.changed()

    @property
    def _patience_s(self) -> float:
        return max(3 * self._site.membership.options.timeout_s, LEAST_PATIENCE_S)

    async def size_decided(self) -> None:
        """Until it is known what came of a resize that was given up. Clients go on meanwhile, unless it was a shrink.

        Raises EBUSY where that takes long.
        """
        with trio.move_on_after(self._patience_s):
            await self._records.size_decided()
        self._require_size_decided()

    def _require_size_decided(self) -> None:
        if not self._records.is_size_decided():
            raise OSError(
                errno.EBUSY,
                f"{self._site.name}: it isn't known yet whether another resize, which was given up, has come to count"
                f"{self._records.problem_in_words()}. Nothing has changed: resize it again later",
            )

    async def resize(self, size_bytes: int) -> None:
        """A leg is never smaller than the record says: it grows before, and shrinks after it is written.

        Raises OSError. EINVAL: no mirror can have that. ENOSPC: an NBD server has no room for it. EBUSY: see
        `size_decided`, which is to be waited for first. So far nothing has changed. ETIMEDOUT: it takes too long, as
        clients wait for it. If its record was tried it may come to count later, and after a shrink nothing is written
        until that is known.
        """
        name = self._site.name
        if size_bytes <= 0 or size_bytes % BLOCK_BYTES:  # each leg would refuse what the record says
            raise OSError(errno.EINVAL, f"{name}: a mirror can't have {size_bytes} bytes: whole blocks only")
        async with self.barrier():
            self._require_size_decided()
            before, patience_s = self._site.size_bytes, self._patience_s
            with trio.move_on_after(patience_s):
                await self._resize(size_bytes)
            if self._site.size_bytes == size_bytes:
                return  # who isn't as small yet is cut by the next growth, or is brought zeros
            what = f"{name} hasn't {size_bytes} bytes after {patience_s:g} s{self._records.problem_in_words()}"
            if self._records.is_size_decided():
                raise OSError(errno.ETIMEDOUT, f"{what}. It has {before} bytes as before: resize it again")
            writes = "" if size_bytes > before else ", and nothing is written to it until that is known"
            raise OSError(
                errno.ETIMEDOUT,
                f"{what}. It may get them later{writes}: see `terrace volume mirror show {name}`, and resize it again",
            )

    async def _resize(self, size_bytes: int) -> None:
        while True:
            # What begins anew before the record is wanted makes its legs fit the old one.
            await self._whole()
            losses, before = self._site.losses, self._site.size_bytes
            self._site.inflight.resized()
            if size_bytes > before:
                await self._grow(before, size_bytes)
            if losses == self._site.losses:
                break
        await self._records.reconfigure(size_bytes=size_bytes)
        if size_bytes <= before and (connected := self._connected()):
            await self._on_all("resize", connected, lambda leg: leg.resize(size_bytes))

    async def _whole(self) -> None:
        """Until no leg is gone that a record calls in sync."""
        while self._site.lost or self._site.excluding:
            self._site.check()
            if self._site.failing is not None:
                raise OSError(self._site.failing.errno, self._site.failing.strerror)
            await self._site.changed()

    def _connected(self) -> list[Member]:
        """The legs, but those on NBD servers, that are written to."""
        return [
            m
            for m in self._site.members.values()
            if m.leg is not None and m.state in (LegState.UP_TO_DATE, LegState.SYNCING) and m.info.kind == "terrace"
        ]

    async def _grow(self, before: int, size_bytes: int) -> None:
        """All legs, ahead of the record."""
        for member in list(self._site.members.values()):
            if member.info.kind == "nbd" and member.leg is not None:
                await member.leg.resize(size_bytes)  # it can't resize anything, but says whether there is room
        connected = self._connected()

        async def grow(leg: Leg) -> None:
            await fit(leg, before)  # a shrink that was given up has left what must not be seen again
            await leg.resize(size_bytes)

        await self._on_all("resize", connected, grow)
        for member in connected:
            member.fitted_bytes = size_bytes
        connected = self._connected()
        if 0 < len(connected) < len(self._site.members):
            await self._miss(before, size_bytes, connected)

    async def _miss(self, before: int, size_bytes: int, members: list[Member]) -> None:
        """Let legs that are away, or on NBD servers, be brought what is new, zeros, as something that they missed.

        What such a leg has behind the mirror's end is anything: an export may be larger, or a shrink passed it by.
        It may take hours to set that right, so clients don't wait for it.
        """
        sequence = self._site.sequence = self._site.sequence + 1

        async def note(leg: Leg) -> None:
            # A change of zeros, which it is in each set of what others miss.
            await submitted(leg, sequence, Change(before, size_bytes - before, None))

        await self._on_all("grow", members, note)
        grown = OSError(errno.EAGAIN, "the mirror has grown, and what the export has there is compared")
        for member in list(self._site.members.values()):
            if member.info.kind == "nbd" and member.leg is not None:
                self._site.leg_failed(member.leg, grown)
        await self._excluded()
        for _ in range(2):  # else it would all be compared before anything is served, if this node went down now
            await self._flushes.round()

    async def demote(self, token: str | None = None) -> None:
        """End cleanly: everything durable on all legs, and a record that names no primary, and who may be next."""
        await self._flushes.flush()
        async with self.barrier():
            await self._flushes.round()
            await self._flushes.round()
            try:
                await self._records.reconfigure(primary=None, token=token)
            finally:
                # Also where it was given up: the record may be stored somewhere, and the next primary go on by it.
                self._site.depose(OSError(errno.ESTALE, "it was demoted"))

    async def stop(self) -> None:
        """End without a new record, everything durable unless writes wait just now: this node goes on later."""
        if self._site.end is None and not self._site.shut:
            await self._flushes.flush()
            async with self.barrier():
                await self._flushes.round()
                await self._flushes.round()
