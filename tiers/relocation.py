"""Moves of blocks that committed trees name, in volumes that have snapshots: true for readers at once, and in the trees
with the next checkpoint.

Without snapshots a move is a new entry in the volume's overlay, like a write. With them it can't be: a write means that
the old entry is history, and goes to a snapshot; a move means that the block is elsewhere, whichever tree names it now
or will by then (the volume's own, or one of its snapshots'). So it is kept as what it is: an old address and a new one.
Addresses are never used twice, so there is no need to say whose entry it is. Each reader of a committed entry asks
`moved`, which is nearly always empty.

The record in the log (RELOCATE) has the old addresses too, so a replay comes to the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiers.layout import BAD

if TYPE_CHECKING:
    from tiers.segments import SegmentTable
    from tiers.volume import Volume


@dataclass(slots=True)
class Relocation:
    """One block's move. `address` may be BAD: it could not be read."""

    volume: "Volume"
    block: int
    address: int
    check: int


class Relocations:
    """Those that no committed tree has yet. All of it belongs to the trio thread."""

    def __init__(self, segments: "SegmentTable") -> None:
        self.moved: dict[int, int] = {}
        """Old address -> the present one. The same dictionary for ever: readers keep it."""
        self._segments = segments
        self._active: dict[int, Relocation] = {}
        self._frozen: dict[int, Relocation] = {}
        self._active_source: dict[int, int] = {}
        """New address -> the old one, for each of `_active`."""
        self._frozen_source: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._active) + len(self._frozen)

    def add(self, volume: "Volume", block: int, old: int, address: int, check: int) -> int:
        """A block of a volume or its snapshots that lay at `old` lies at `address`. Returns how many more there are."""
        if address != BAD:
            self._segments.add_pending(address, 1)
        before = len(self._active)
        root = self._active_source.pop(old, None)
        if root is None:
            root = old
        else:
            self._segments.drop_pending([old])  # it had been moved there since the freeze
        self._active[root] = Relocation(volume, block, address, check)
        if address != BAD:
            self._active_source[address] = root
        self.moved[root] = address
        first = self._frozen_source.get(root)
        if first is not None:
            self.moved[first] = address
        return len(self._active) - before

    def freeze(self) -> list[tuple[int, Relocation]]:
        """Hand those over that the next checkpoint makes true. No checkpoint of trio in here."""
        assert not self._frozen
        self._frozen, self._active = self._active, {}
        self._frozen_source, self._active_source = self._active_source, {}
        return list(self._frozen.items())

    def committed(self) -> None:
        """The frozen ones are in the trees now."""
        for old in self._frozen:
            del self.moved[old]
        self._frozen = {}
        self._frozen_source = {}

    def of(self, volume: "Volume") -> Iterator[tuple[int, Relocation]]:
        """(old address, relocation) of a volume's, in no order."""
        for found in (self._frozen, self._active):
            for old, relocation in found.items():
                if relocation.volume is volume:
                    yield old, relocation
