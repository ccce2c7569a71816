"""A leg: one complete copy of a mirrored volume, local or on a peer, behind an ordered connection.

`Leg` is what a mirror uses, and all that it knows of where a copy is. `LegStore` is what a node offers to have a leg
in: a volume of the engine, seen through an adapter of the application's.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from replication.membership import LegInfo, Membership, Term

BLOCK_BYTES: Final = 4096
EXTENT_BYTES: Final = 64 << 10
"""What is remembered of what was written, and what a read waits for, goes by extents of this size."""

RECENT: Final = "recent"
RECENT_OLD: Final = "recent-old"
"""Names of trackers: what was written since the last flush that all legs have done is in one of the two."""
MISSING: Final = "missing:"
LOST_CHECK: Final = b"\xff" * 8
"""In `Leg.checks`: the block is lost there, which needs no read to be known."""


def missing_tracker(leg_id: str) -> str:
    """Name of the tracker of what a leg misses."""
    return MISSING + leg_id


Done = Callable[[OSError | None], None]
"""Called once, on the trio thread, never from within the call that it was given to."""


class LegState(enum.Enum):
    """What one leg is worth to the mirror."""

    UP_TO_DATE = "UpToDate"  # has every acknowledged write
    SYNCING = "Syncing"  # receives new writes and the missing old ones; not read
    STALE = "Stale"  # durably known to miss an acknowledged write
    UNPROVEN = "Unproven"  # lost its primary; may or may not have every acknowledged write
    OFFLINE = "Offline"  # can't be reached


class MirrorState(enum.Enum):
    """What the mirror as a whole can do."""

    ONLINE = "Online"  # every leg is up to date
    DEGRADED = "Degraded"  # serves, with fewer legs than it should have
    FAULTED = "Faulted"  # nothing is served: no leg may be, or this node may not, as its lease is over
    UNKNOWN = "Unknown"  # at a node that isn't the primary, which can't be asked


def mirror_state(legs: Iterable[LegState], *, is_served: bool) -> MirrorState:
    """Of a mirror whose state is known. The one rule, for whoever says it: commands, events, metrics.

    `is_served`: reads are answered. Writes may wait for a moment all the same, until a leg is left behind.
    """
    if not is_served:
        return MirrorState.FAULTED
    return MirrorState.ONLINE if all(leg is LegState.UP_TO_DATE for leg in legs) else MirrorState.DEGRADED


class Change(NamedTuple):
    """One write or trim of whole blocks. `data` None: the range reads as zeros and needs no space."""

    offset: int
    length: int
    data: memoryview | None
    """Valid only during the call that it is given to."""
    lasting: bool = False
    """The data stay as they are until `done` is called, so that they need not be copied."""
    lost: bool = False
    """Neither data nor zeros: nobody has what should be there, so reading it is EIO until it is written. Such a change
    is a batch of its own, and for Terrace legs only."""


@dataclass(frozen=True)
class Position:
    """The last batch that a leg has applied, of the session of one term."""

    term: Term
    sequence: int


class Extents(Protocol):
    """A set of extents of a volume, sparse; `tiers.changes.ChangedExtents` is one."""

    def add(self, offset: int, length: int) -> None:
        """All extents that the bytes touch."""

    def discard(self, offset: int, length: int) -> None:
        """Only the extents that lie wholly in there."""

    def runs(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """(offset, length) in bytes of maximal runs from `start` on, in order."""

    def update(self, other: Extents) -> None: ...

    def clear(self) -> None: ...

    def encode(self) -> bytes: ...

    @property
    def count(self) -> int:
        """How many extents are in it."""

    def __bool__(self) -> bool: ...


class Leg(Protocol):
    """One copy, in one session of one term. A leg that has failed stays failed: a new session is another object.

    Each awaited call raises OSError. All changes are applied in the order in which they were submitted.
    """

    info: LegInfo

    @property
    def failure(self) -> OSError | None:
        """Why it can't be used any more; then each `done` that was due has been called with it."""

    @property
    def is_local(self) -> bool: ...

    @property
    def queued_bytes(self) -> int:
        """Of what was submitted and isn't done."""

    @property
    def silent_since(self) -> float | None:
        """trio's clock when it should have begun to answer what it hasn't yet; None if it owes nothing."""

    def submit(self, sequence: int, changes: Sequence[Change], done: Done) -> None:
        """Apply these; `done(None)` when the leg's kernel has them. Never waits; the caller bounds `queued_bytes`."""

    def read_now(self, offset: int, length: int, into: memoryview) -> bool:
        """As `nbd.export.Export.read_now`; a leg on a peer always says False."""

    async def read(self, offset: int, length: int, into: memoryview) -> None:
        """Fill `into` with verified bytes that have all that was done before; EIO rather than anything else."""

    async def flush(self) -> None:
        """All that was submitted before is durable."""

    def flushed_by_all(self, sequence: int) -> None:
        """Each leg has made durable what was submitted up to `sequence`: older changes need not be remembered.

        0: those that are there are equal and have flushed, but one in sync isn't there: all is to be remembered.
        """

    async def checks(self, offset: int, length: int) -> bytes:
        """8 bytes for each block: its checksum as the map has it; 0 where nothing is mapped. No data is read."""

    async def mapped(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(offset, length) of what isn't a hole: at least one that reaches the end of what was looked at."""

    async def changed(self, trackers: Iterable[str]) -> Extents:
        """The union of these sets; a name may end in `*`. One that isn't there is empty."""

    async def accept(self, membership: Membership, *, inconsistent: bool) -> None:
        """Store the record, durably. ESTALE: the leg knows of a later one."""

    async def resize(self, size_bytes: int) -> None: ...

    async def snapshot(self, name: str) -> None: ...

    def close(self) -> None:
        """Synchronous. What isn't done fails with ECANCELED."""


class LegStore(Protocol):
    """A volume in which a node has a leg. Changes are whole blocks."""

    export_name: str
    """POOL/VOL."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def no_writes(self) -> str | None:
        """Why nothing is stored any more, for as long as the process lives at least; None where that isn't known."""

    @property
    def record(self) -> bytes:
        """What `save` was given last, durable; empty if nothing."""

    async def save(self, record: bytes, trackers: dict[str, Extents] | None = None) -> None:
        """Store both, durably and together, after all writes that returned. `trackers` replace those there are.

        A tracker that is in the store grows by each write from the moment of the call on.
        """

    @property
    def trackers(self) -> dict[str, Extents]:
        """Live: each write is added to all of them. May be changed in place; that is durable some time later."""

    def empty_extents(self) -> Extents: ...

    def decode_extents(self, data: bytes) -> Extents:
        """Raises OSError EPROTO."""

    def write_now(self, writes: list[tuple[int, memoryview]]) -> bool: ...

    def trim_now(self, ranges: list[tuple[int, int]]) -> bool: ...

    def read_now(self, offset: int, length: int, into: memoryview) -> bool: ...

    async def write(self, offset: int, data: memoryview | bytes) -> None: ...

    async def trim(self, offset: int, length: int) -> None:
        """Zeros afterwards, surely: unlike a hint."""

    async def lose(self, offset: int, length: int) -> None:
        """Reading any of these blocks is EIO afterwards, until it is written or trimmed."""

    async def read(self, offset: int, length: int, into: memoryview) -> None: ...

    async def flush(self) -> None: ...

    async def checks(self, offset: int, length: int) -> bytes: ...

    async def mapped(self, offset: int, length: int) -> list[tuple[int, int]]: ...

    async def resize(self, size_bytes: int) -> None: ...

    async def snapshot(self, name: str) -> None: ...
