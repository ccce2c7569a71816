"""The members of a mirror: what its primary knows of each leg, and what it says of them.

A `Member` is a leg's place in the record. The leg itself comes and goes; what it is worth, and since when, stays.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import trio

from replication.leg import Leg, LegState, MirrorState
from replication.membership import LegInfo, Membership
from replication.resync import Progress, Resync


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


@dataclass
class LegCounters:
    """Since the primary has been started."""

    reads: int = 0
    read_bytes: int = 0
    read_errors: int = 0
    healed_blocks: int = 0
    failures: int = 0
    resyncs: int = 0
    writes: int = 0
    """Batches of clients' writes and trims that it was given."""
    written_bytes: int = 0


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
    kept_out: str | None = None
    """Why it is not in sync though it is there, and has all else: blocks that no leg can read. Also while that is tried
    again."""


@dataclass(frozen=True)
class MirrorStatus:
    """The mirror as its primary sees it."""

    membership: Membership
    state: MirrorState
    legs: tuple[LegStatus, ...]
    waiting: str | None
    """Why writes wait, or None."""
    deposed: str | None
    """Why it ended here, or None."""
    sequence: int
    in_flight: int
    healed_blocks: int
    flush_age_s: float | None
    """Since the last common flush ended; None if nothing has been written since, or none ever did."""
    waited_s: float
    """How long writes waited at the gate, all in all."""
    longest_wait_s: float
    """How long a batch of writes ever took, or the gate was ever shut."""
    unmendable_blocks: int
    map_damaged: frozenset[str] = frozenset()
    """Ids of legs whose map is known to be damaged somewhere, so that nothing is healed there."""
    is_lost: bool = False
    """No leg in sync is connected, so nothing is read either; it begins anew when one is back."""
    is_failing: bool = False
    """Writes are not only waiting: they fail."""
    is_stopped: bool = False
    """It ended as this node stopped serving it by itself, and may go on later."""
    waits_for_leg: bool = False
    """The gate is open: what waits is in flight, for a leg that is silent or slow (`replication.slowlegs`)."""


class Member:
    """One leg's place in the mirror; the leg itself comes and goes."""

    def __init__(self, info: LegInfo, now: float) -> None:
        self.info = info
        self.leg: Leg | None = None
        self.state = LegState.OFFLINE
        self.since = now
        self.ready = False
        """Has all that it missed; a record with it is wanted."""
        self.fitted_bytes = 0
        """While it is brought up to date: the size that it was given."""
        self.error: OSError | None = None
        self.kept_out: OSError | None = None
        """See `LegStatus`: from the end of a resync until it is in sync, is out for another reason, or is to be
        tried at once."""
        self.resync: Resync | None = None
        self.latency_s: float | None = None
        self.counters = LegCounters()
        self.abandoned = trio.Event()
        """Of the present leg: it isn't used any more."""
        self._taking: tuple[int, int] | None = None
        """What the mirror had been given, batches and bytes, when this leg began to take it."""

    def takes(self, taking: bool, given: tuple[int, int]) -> None:
        """Whether it gets the writes from now on; the mirror has been `given` so much, batches and bytes."""
        if taking and self._taking is None:
            self._taking = given
        elif not taking and self._taking is not None:
            counted = self._counted(given)
            # In place: the mirror has the local leg's at hand.
            self.counters.writes, self.counters.written_bytes = counted.writes, counted.written_bytes
            self._taking = None

    def _counted(self, given: tuple[int, int]) -> LegCounters:
        begun = self._taking or given
        counters = self.counters
        return replace(
            counters,
            writes=counters.writes + given[0] - begun[0],
            written_bytes=counters.written_bytes + given[1] - begun[1],
        )

    @property
    def is_proof(self) -> bool:
        """It has every acknowledged write and stores records: an NBD server has nowhere to store them."""
        return self.leg is not None and self.state is LegState.UP_TO_DATE and self.info.kind == "terrace"

    @property
    def is_away(self) -> bool:
        """It isn't in sync, nor being brought up to date, and what it has is to be kept."""
        is_split = self.error is not None and self.error.errno == errno.EUCLEAN
        return self.state in (LegState.OFFLINE, LegState.STALE) and not is_split and self.kept_out is None

    def become(self, state: LegState) -> None:
        """With the time."""
        if state is not self.state:
            self.state = state
            self.since = trio.current_time()

    def status(self, now: float, given: tuple[int, int]) -> LegStatus:
        """Now, by trio's clock. `given`: as for `takes`."""
        leg = self.leg
        return LegStatus(
            info=self.info,
            state=self.state,
            for_s=now - self.since,
            is_local=leg is not None and leg.is_local,
            queued_bytes=0 if leg is None else leg.queued_bytes,
            latency_s=self.latency_s,
            error=self.error.strerror if self.error is not None and leg is None else None,
            resync=None if self.resync is None else self.resync.progress.seen(now),
            counters=self._counted(given),
            kept_out=self.kept_out.strerror if self.kept_out and self.state is not LegState.UP_TO_DATE else None,
        )


def readable(members: Iterable[Member]) -> list[Member]:
    """Those in sync: the local leg, then the nearest; one that was never measured counts as near. NBD servers last."""
    found = [m for m in members if m.leg is not None and m.state is LegState.UP_TO_DATE]
    return sorted(found, key=_nearness)


def _nearness(member: Member) -> tuple[bool, bool, float, str]:
    is_far = member.leg is not None and not member.leg.is_local
    return member.info.kind == "nbd", is_far, member.latency_s or 0.0, member.info.id
