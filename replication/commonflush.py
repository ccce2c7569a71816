"""Common flushes: rounds in which every leg that counts makes durable what it has.

A client's flush is answered by a round that began after it was asked for. Each round also tells the legs how far all of
them are durable, so that older changes need not be remembered (`Leg.flushed_by_all`); so there is one now and then
without any client, too.
"""

from __future__ import annotations

import errno
import logging
from typing import Protocol

import trio

from replication.leg import Leg
from replication.site import Gate

log = logging.getLogger("replication.mirror")


class Flushed(Gate, Protocol):
    """What a common flush needs of the mirror."""

    sequence: int
    writers: tuple[Leg, ...]
    losses: int
    """How often it has begun anew, or will."""
    breaks: int
    """How often that was, or will be, without a leg that is known to have all that was acknowledged, flushed or not."""

    def leg_failed(self, leg: Leg, error: OSError) -> None:
        """It is out."""


class CommonFlush:
    """See the module. `now_and_then` has to be run."""

    def __init__(self, site: Flushed) -> None:
        self._site = site
        self._rounds_begun = 0
        self._rounds_done = 0
        self._flushing = False
        self._flushed_sequence = 0
        self._flushed_at: float | None = None

    @property
    def age_s(self) -> float | None:
        """How long ago all legs had flushed last; None if nothing was submitted since, or it never was."""
        if self._flushed_at is None or self._site.sequence == self._flushed_sequence:
            return None
        return trio.current_time() - self._flushed_at

    async def flush(self) -> None:
        """Everything acknowledged before is durable on all legs that count. Joins the next common flush."""
        target = self._rounds_begun + 1
        while self._rounds_done < target:
            await self._site.admitted()
            if self._rounds_done >= target:
                break
            if self._flushing:
                await self._site.changed()
                continue
            self._flushing = True
            try:
                await self.round()
            finally:
                self._flushing = False
                self._site.change()
        self._site.check()

    async def until_idle(self) -> None:
        """Until no client's flush is under way. While a barrier is held none begins."""
        while self._flushing:
            await self._site.changed()

    async def round(self) -> None:
        """One round, whoever else flushes; also while a barrier is held. Another one if all begins anew meanwhile."""
        breaks = self._site.breaks
        while not await self._round(breaks):
            while self._site.lost and self._site.end is None and self._site.breaks == breaks:
                await self._site.changed()

    async def _round(self, breaks: int) -> bool:
        """False: all legs have been let go of, and nothing is lost by that."""
        self._rounds_begun = number = self._rounds_begun + 1
        sequence = self._site.sequence
        writers, losses = self._site.writers, self._site.losses
        failed = False

        async def flush_one(leg: Leg) -> None:
            nonlocal failed
            try:
                await leg.flush()
            except OSError as error:
                failed = True
                self._site.leg_failed(leg, error)

        async with trio.open_nursery() as nursery:
            for leg in writers:
                nursery.start_soon(flush_one, leg)
        while failed and self._site.excluding and self._site.end is None and self._site.losses == losses:
            if self._site.failing is not None:
                raise OSError(self._site.failing.errno, self._site.failing.strerror)
            await self._site.changed()
        self._site.check()
        if self._site.breaks != breaks:
            raise OSError(errno.EIO, f"{self._site.name}: the last leg in sync failed while it was flushed")
        if self._site.lost or self._site.losses != losses:
            return False
        if not self._site.excluding:
            # A leg that is gone and isn't excluded yet needs to be told of all this by `recent`.
            for leg in self._site.writers:
                if leg in writers:
                    leg.flushed_by_all(sequence)
            self._flushed_sequence = max(self._flushed_sequence, sequence)
            self._flushed_at = trio.current_time()
        self._rounds_done = max(self._rounds_done, number)
        return True

    async def now_and_then(self, every_s: float) -> None:
        """The task."""
        clean = 0
        while True:
            await trio.sleep(every_s)
            if self._site.shut:
                continue
            # Some more after the last write: what one round has rotated is forgotten with the next.
            clean = 0 if self._site.sequence != self._flushed_sequence else clean + 1
            if clean <= 3 and self._site.sequence:
                try:
                    await self.flush()
                except OSError as error:
                    log.info("%s: the common flush failed: %s", self._site.name, error)
