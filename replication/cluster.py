"""The cluster's truth behind one small interface: who is primary, in which term, and which legs are in sync.

A node alone, or one that people promote by hand, keeps it in a local store; nodes that must decide by themselves keep
it in etcd. Both must satisfy the same contract, so the mirror can't tell them apart.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from replication.leg import Term


@dataclass(frozen=True)
class Membership:
    """One mirror's truth at one revision."""

    mirror: str
    term: Term
    primary: str | None  # node name; None after a clean demotion
    in_sync: frozenset[str]  # names of the legs that have every acknowledged write
    revision: int


class ClusterStore(Protocol):
    """Linearizable and durable: what `propose` returned survives every crash and is what every later `read` sees."""

    arbiter: bool
    """True when a majority decides, so that a node may promote itself; False when only a person may."""

    async def read(self, mirror: str) -> Membership:
        """The newest membership. ENOENT: no such mirror. ETIMEDOUT: the store can't prove what is newest."""

    async def propose(self, new: Membership, *, expected_revision: int) -> Membership:
        """Replace the membership if it is still at `expected_revision`, else ESTALE and nothing has changed.

        A term never goes back, and `in_sync` never becomes empty: EINVAL.
        """

    def watch(self, mirror: str) -> AsyncIterator[Membership]:
        """Each newer membership, in order; may skip one that was replaced at once."""
