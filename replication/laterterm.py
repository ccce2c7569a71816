"""A later term of the same primary: for a leg that has promised one to a candidate that came to nothing.

Such a leg takes nothing of the primary's term any more, for good: its promise can't be taken back, since a record of
the candidate's may still be on its way. Only a term above that one frees it. So when a leg that is wanted back has
refused the primary's term for a while, the primary begins one, by the proof of any candidate (`promotion.promote`).

Clients aren't disconnected, and nothing fails: they wait at a barrier while all legs are let go, the promises asked
for, the record made to count, and the legs connected and made equal as at any beginning. If the proof isn't had,
nothing was promised as a rule, and the old term goes on; it is tried again after twice the time.

The same is done where it is the last leg in sync that refuses, and nothing is served any more (`Records.govern`), and
where so many voters have promised a later term that there is no lease any more, though no leg may refuse. A term is
begun only from a record of the primary's own, of this term or of a later one that wasn't heard to count: where others
have gone on since, it is deposed.

**While a leg is being excluded**, and where a resize or a demotion waits for its record, the gate is shut. If that
record is refused since a later term was promised, perhaps none of this term ever counts again, and the gate would stay
shut. Then no barrier is needed: all legs are let go as they are, once each write in flight is on all that are left.
These writes go on waiting: they are acknowledged when a record counts by which all legs in sync have them, if the
mirror begins with a leg that has (see `Mirror.let_go`).

The task that writes records (`replication.records`) does the middle of it, as nobody else may change the record.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Final, Protocol

import trio

from replication.barriers import Barriers
from replication.commonflush import CommonFlush
from replication.records import Records
from replication.site import Gate

log = logging.getLogger("replication.mirror")

LONGEST_PAUSE_S: Final = 60.0


class Renewed(Gate, Protocol):
    """What it needs of the mirror."""

    lease_is_refused: Callable[[], bool]
    """Whether so many voters have promised a later term that this one can't be served any more."""

    def is_at_rest(self) -> bool:
        """Whether nothing is in flight but what is on all legs that are left, and waits for a record."""

    def let_go(self) -> None:
        """Of all legs, at rest: everything begins anew."""


class LaterTerm:
    """See the module. `run` has to be run."""

    def __init__(self, site: Renewed, records: Records, barriers: Barriers, flushes: CommonFlush) -> None:
        self._site = site
        self._records = records
        self._barriers = barriers
        self._flushes = flushes
        self._since: dict[str, float] = {}
        """By the leg's id, or empty for the voters, since when it refuses."""

    async def run(self) -> None:
        """The task."""
        pause_s = timeout_s = self._site.membership.options.timeout_s
        while True:
            await trio.sleep(timeout_s / 8)
            timeout_s = self._site.membership.options.timeout_s
            if not self._is_due(pause_s):
                pause_s = pause_s if self._since else timeout_s
                continue
            try:
                await self._begin(timeout_s)
            except OSError as error:
                log.warning("%s: no later term can be begun: %s", self._site.name, error.strerror)
            self._since.clear()
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _is_due(self, pause_s: float) -> bool:
        """Whether a leg that the record doesn't call in sync has refused the term for so long, or the voters have.

        True at this very moment: no checkpoint between it and the use of that.
        """
        now, required = trio.current_time(), self._records.required()
        refusing = [
            member.info.id
            for member in self._site.members.values()
            if member.leg is None and member.error is not None and member.error.errno == errno.ESTALE
            if member.info.id not in required and member.info.kind == "terrace"
        ]
        if self._site.lease_is_refused() or self._records.outdated:
            refusing.append("")
        self._since = {leg_id: self._since.get(leg_id, now) for leg_id in refusing}
        if self._is_stuck():
            # A leg that refuses is no reason: the record that is being written may count, and clients go on by that.
            return self._site.is_at_rest() and now - self._since.get("", now) >= pause_s
        return not self._site.shut and any(now - since >= pause_s for since in self._since.values())

    def _is_stuck(self) -> bool:
        """Whether the gate is shut for as long as no record counts: for a leg's exclusion, a resize, or a demotion."""
        if self._site.lost or self._site.end is not None:
            return False
        return bool(self._site.excluding) or (self._site.shut and self._records.outdated)

    async def _begin(self, timeout_s: float) -> None:
        if self._is_stuck():
            return await self._begin_anew("as no record of this one counts any more")
        with trio.move_on_after(timeout_s) as patience:
            # Without a lease as well: these voters may be the ones that refuse it.
            async with self._barriers.barrier(leased=False):
                await self._flushes.until_idle()
                await self._flushes.round()
                if self._site.excluding or self._site.lost:
                    return
                patience.deadline = float("inf")
                await self._begin_anew("for a leg that has promised one")

    async def _begin_anew(self, why: str) -> None:
        """In a later term or, where that isn't proven, in this one."""
        log.info("%s: a later term is begun, %s", self._site.name, why)
        self._records.renewal = self._records.prove
        self._site.let_go()
        while self._records.renewal is not None and self._site.end is None:
            await self._site.changed()
