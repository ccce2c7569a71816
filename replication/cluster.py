"""The cluster's truth behind one small interface: a mirror's newest `Membership` that counts.

Without an arbiter it is what the legs' nodes, and tie-breakers, have stored (`Voter`); with etcd it is there. Both are
used through `ClusterStore`, so that a mirror can't tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from replication.membership import Membership, Term


@dataclass(frozen=True)
class VoterState:
    """What a node says of a mirror."""

    node: str
    promised: Term | None
    accepted: Membership | None
    candidates: frozenset[str] = frozenset()
    """Nodes that it has promised a term since it accepted the record; in the answer of `prepare`, before that one."""
    primary_here: bool = False
    """It is the primary itself, and serves."""
    heard_s: float | None = None
    """How long ago it has heard the primary; None: not since it was started."""
    intact: bool = True
    """Its leg can't have lost anything since it was in sync."""
    inconsistent: bool = False
    """Its leg was being resynced, and is no state that the volume ever had."""
    recent_bytes: int = 0
    superseded: Membership | None = None
    """A record that it has heard of, and hasn't accepted, by which it must not go on from its own any more."""
    no_writes: str | None = None
    """Why its leg can store nothing now, not even a record that has it in sync: its disk has failed, or is full."""


class NotStoredError(OSError):
    """A record isn't stored wherever it has to be."""

    def __init__(self, number: int, sentence: str, unable: Mapping[str, OSError]) -> None:
        super().__init__(number, sentence)
        self.unable = unable
        """By node, what legs that the record has in sync have failed with: their disks, not the way there."""


class Voter(Protocol):
    """A node's say, here or over the network. Every call raises OSError, ETIMEDOUT when it can't be heard."""

    node: str

    async def state(self, mirror: str) -> VoterState:
        """ENOENT: it knows nothing of that mirror."""

    async def prepare(self, mirror: str, term: Term, candidate: str, *, force: bool = False) -> VoterState:
        """Promise to take nothing of lower terms any more, durably; sessions of lower terms are fenced on return.

        ESTALE: a term as high was promised. EBUSY: the primary is alive.
        """

    async def accept(self, membership: Membership) -> None:
        """Store it, durably. ESTALE: a higher term was promised, or a later record stored. EUCLEAN: split brain."""

    async def heartbeat(self, mirror: str, term: Term) -> None:
        """The primary of this term is alive: for a lease from now on, no other is promised a term. ESTALE."""


class ClusterStore(Protocol):
    """Makes records count. ETIMEDOUT: it isn't known whether one does."""

    async def newest(self, mirror: str) -> Membership:
        """ETIMEDOUT: the store can't prove what is newest."""

    async def create(self, first: Membership) -> None:
        """The first record of a new mirror. EEXIST: it has another already."""

    async def judge_candidate(self, mirror: str) -> None:
        """Before any promise is asked for, since a promise fences a primary that may be well: whether no new term would
        be made to count, whatever comes of the promises, but by force. Then it raises OSError EUCLEAN.
        """

    async def commit(self, new: Membership, *, expected: Membership) -> None:
        """Make `new` the truth if `expected` still is: on return it survives, and everybody finds it.

        ESTALE: somebody else went on. After ETIMEDOUT the same may be tried again, or a record made from `new`; but
        none made from `expected`, since `new` may count. EINVAL: it doesn't follow. EUCLEAN: split brain.
        """
