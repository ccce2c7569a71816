"""Barriers of a mirror: what is done to all legs at the same place in the order of writes.

While one is held no batch is in flight, and none begins.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

import trio

from replication.commonflush import CommonFlush
from replication.inflight import InFlight
from replication.leg import Change, Leg, LegState
from replication.members import Member
from replication.reconcile import submitted
from replication.records import Records
from replication.site import Gate


class Barred(Gate, Protocol):
    """What a barrier needs of the mirror."""

    inflight: InFlight
    sequence: int

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
        while self._site.excluding and not self._site.lost:
            self._site.check()
            await self._site.changed()

    async def resize(self, size_bytes: int) -> None:
        """A leg is never smaller than the record says: it grows before, and shrinks after it is written.

        Raises OSError ENOSPC, and nothing has changed, where an NBD server has no room for it.
        """
        async with self.barrier():
            await self._records.size_decided()
            self._site.inflight.resized()
            before = self._site.size_bytes
            grows = size_bytes > before
            for member in list(self._site.members.values()):
                if grows and member.info.kind == "nbd" and member.leg is not None:
                    await member.leg.resize(size_bytes)  # it can't resize anything, but says whether there is room
            connected = [
                m
                for m in self._site.members.values()
                if m.state in (LegState.UP_TO_DATE, LegState.SYNCING) and m.info.kind == "terrace"
            ]

            async def grow(leg: Leg) -> None:
                await fit(leg, before)  # a shrink that was given up has left what must not be seen again
                await leg.resize(size_bytes)

            if grows:
                await self._on_all("resize", connected, grow)
                for member in connected:
                    member.fitted_bytes = size_bytes
                if any(member.info.kind == "nbd" for member in self._site.members.values()):
                    await self._miss(before, size_bytes, connected)
            await self._records.reconfigure(size_bytes=size_bytes)
            if not grows:
                await self._on_all("resize", connected, lambda leg: leg.resize(size_bytes))

    async def _miss(self, before: int, size_bytes: int, members: list[Member]) -> None:
        """Let legs on NBD servers be brought what is new, zeros, as something that they missed.

        What an export has behind the mirror's end is anything: it was larger, or the mirror was once. It may take hours
        to set that right, so clients don't wait for it.
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
        while self._site.excluding and not self._site.lost:
            self._site.check()
            await self._site.changed()
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
        """End without a new record, everything durable: this node goes on later."""
        if self._site.end is None and not self._site.shut:
            await self._flushes.flush()
            async with self.barrier():
                await self._flushes.round()
                await self._flushes.round()
