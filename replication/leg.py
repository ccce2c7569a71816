"""A leg: one complete copy of a mirrored volume, local or on a peer, behind an ordered connection.

The mirror acknowledges a write when every in-sync leg has it. Everything else follows from who may write to a leg
(terms), and from what a leg knows about its own past (position, stale mark).
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol


class LegState(enum.Enum):
    """What one leg is worth to the mirror."""

    UP_TO_DATE = "UpToDate"  # has every acknowledged write
    SYNCING = "Syncing"  # receives new writes and the missing old ones; not readable
    STALE = "Stale"  # durably known to miss an acknowledged write
    UNPROVEN = "Unproven"  # lost its primary; may or may not have every acknowledged write
    OFFLINE = "Offline"  # can't be reached


class MirrorState(enum.Enum):
    """What the mirror as a whole can do."""

    ONLINE = "Online"  # every leg is up to date
    DEGRADED = "Degraded"  # serves, with fewer legs than it should have
    FAULTED = "Faulted"  # no leg may be served


@dataclass(frozen=True)
class Term:
    """One start of one primary. Two terms with the same number and different ids are split brain, not a tie."""

    number: int
    id: bytes  # 16 random bytes


@dataclass(frozen=True, order=True)
class Position:
    """How far a leg has come: the sequence of the last write it has, within the term that wrote it."""

    term_number: int
    sequence: int


class Leg(Protocol):
    """One copy. Every method raises OSError; a leg that raised anything is out of sync until a resync says otherwise.

    A leg applies the calls of one session in the order in which they were made, and applies none of an older session
    once `begin` of a newer one has returned, not even what was still in a socket buffer.
    """

    name: str
    size_bytes: int

    async def begin(self, term: Term, session: int) -> Position:
        """Raise the leg to `term`, durably, before returning, and fence every older term and session.

        ESTALE: the leg has seen a later term. EEXIST: it has seen another term of the same number (split brain).
        """

    async def history(self) -> Sequence[tuple[Term, int]]:
        """Each term this leg has seen with the sequence at which it began, oldest first."""

    async def read(self, offset: int, length: int, into: memoryview) -> None:
        """Fill `into` with verified bytes; EIO rather than anything else."""

    async def write(self, sequence: int, offset: int, data: memoryview) -> None:
        """Whole blocks only. Returns when the leg's kernel has them. ESTALE: this session is fenced."""

    async def trim(self, sequence: int, offset: int, length: int) -> None:
        """As `write`, with zeros that need no space."""

    async def flush(self) -> None:
        """Everything whose call has returned is durable on this leg."""

    async def mark_stale(self, leg_name: str, sequence: int) -> None:
        """Record, durably, that `leg_name` misses writes from `sequence` on. Precedes that write's acknowledgement."""

    def changed_since(self, position: Position) -> AsyncIterator[tuple[int, int]]:
        """Extents (offset, length) written after `position`: a superset, never a subset, across crashes too."""
