"""How long a primary may serve by itself, and for how long its voters promise nobody else a term. Pure arithmetic.

A primary that is paused or cut off must not answer a read with what is old by then. With three voters or more, or with
etcd, it serves only until `lease_s` after the *start* of the last heartbeat that a majority has answered; a voter
refuses candidates until `lease_s` after it has *heard* one, which is later. So no term begins while the one before it
still serves, as long as both clocks run equally fast: the primary takes `DRIFT` off its own lease.

The clock is CLOCK_BOOTTIME, which counts time in which the machine was suspended, so that a laptop or a paused guest
wakes up with an expired lease. (trio's clock and CLOCK_MONOTONIC stand still then.) A hypervisor that pauses a guest
hides that from both; its guest's voters run on, and the check before each answer is then as late as the guest's clock.

A voter that was just started can't know whom it heard before: it promises nothing for a lease after its start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

DRIFT = 0.05
"""How much of a lease is given up, since two machines' clocks don't run equally fast, and answers take time."""

Clock = Callable[[], float]
"""Seconds, from anywhere, never backwards."""


def boottime() -> float:
    """Seconds since the machine was started, suspended ones included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class VoterLease:
    """What a voter has heard of the primaries of all its mirrors."""

    def __init__(self, clock: Clock = boottime) -> None:
        self._clock = clock
        self._started = clock()
        self._heard: dict[str, float] = {}
        self._terms: dict[str, int] = {}

    def heard(self, mirror: str, term: int | None = None) -> None:
        """The primary, of the term of that number if one is given, is alive."""
        self._heard[mirror] = self._clock()
        if term is not None:
            self._terms[mirror] = term

    def forget(self, mirror: str) -> None:
        """It is gone, or none of this voter's affair any more."""
        self._heard.pop(mirror, None)
        self._terms.pop(mirror, None)

    def term(self, mirror: str) -> int:
        """Number of the term whose primary was heard last; 0: of none since the start."""
        return self._terms.get(mirror, 0)

    def heard_s(self, mirror: str) -> float | None:
        """How long ago that was; None: not since the start."""
        return self._clock() - self._heard[mirror] if mirror in self._heard else None

    def left_s(self, mirror: str, lease_s: float, *, since_start: bool) -> float:
        """How long it may promise nothing; 0 or less: it may."""
        since = self._heard.get(mirror, self._started if since_start else None)
        return 0.0 if since is None else since + lease_s - self._clock()


class PrimaryLease:
    """What a primary knows of its own lease, from the heartbeats that its voters have answered."""

    def __init__(self, lease_s: float, voters: Mapping[str, object] | tuple[str, ...], clock: Clock = boottime) -> None:
        self._clock = clock
        self._lease_s = lease_s * (1 - DRIFT)
        self._voters = tuple(voters)
        self._begun: dict[str, float] = {}
        self._refused: set[str] = set()

    def begin(self) -> float:
        """A round of heartbeats begins: what is to be given to `answered`."""
        return self._clock()

    def answered(self, node: str, begun: float) -> None:
        """A voter, this node itself for instance, has answered the heartbeat that began then."""
        if node in self._voters:
            self._begun[node] = max(begun, self._begun.get(node, begun))
            self._refused.discard(node)

    def refused(self, node: str) -> None:
        """A voter has promised a later term: it answers no heartbeat of this one any more."""
        if node in self._voters:
            self._refused.add(node)

    @property
    def is_refused(self) -> bool:
        """Whether so many have that there will be no lease in this term any more."""
        return len(self._voters) - len(self._refused) < len(self._voters) // 2 + 1

    def renewed(self, begun: float) -> None:
        """etcd, which stands for all voters, has renewed the lease in a call that began then."""
        for node in self._voters:
            self.answered(node, begun)

    @property
    def until(self) -> float:
        """On this clock, when it ends."""
        majority = len(self._voters) // 2 + 1
        newest = sorted(self._begun.values(), reverse=True)
        return newest[majority - 1] + self._lease_s if len(newest) >= majority else float("-inf")

    @property
    def has_begun(self) -> bool:
        """A majority has answered once."""
        return self.until != float("-inf")

    @property
    def left_s(self) -> float:
        """How long it may still serve."""
        return self.until - self._clock()

    @property
    def may_serve(self) -> bool:
        """Asked before each answer to a read, and before each acknowledgement."""
        return self._clock() < self.until
