"""What clients of a mirror may find, whatever happens to its nodes.

Every 512 bytes that a client writes carry a number of their own, and the order of a primary's batches is the truth: a
number stands for one place in the order of (term, sequence). What a primary had in flight when its term ended is there
in the next term or is gone for ever, since the legs are made equal before anything is served. So

- no sector is found older than an acknowledged write, or than what a read has returned before;
- a batch is acknowledged only when each leg that didn't get it has its extents in `missing:ID` at all legs in sync that
  are on machines which have kept their memory since the legs were last equal;
- a snapshot is one point of that order.

Two things let the promise be weaker, and the judge knows them without asking the mirror:

- When no leg that is in sync by all records is on a machine that has kept its memory since the legs were last equal,
  what wasn't flushed may be gone: `lose_unflushed`.
- An operator's force takes what it finds: `forgive`. From then on only the side that was forced is judged.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from replication.leg import EXTENT_BYTES, Change, Done

SECTOR: Final = 512
TERM_PLACES: Final = 10**9


class ViolationError(AssertionError):
    """A promise was broken."""


@dataclass
class Sector:
    """What is known of 512 bytes."""

    numbers: dict[int, int] = field(default_factory=lambda: {0: 0})
    """Place in the order of each number that was ever submitted; of zeros, the latest."""
    acknowledged: int = 0
    read: int = 0
    flushed: int = 0

    @property
    def floor(self) -> int:
        """Nothing older may be found."""
        return max(self.acknowledged, self.read)


class Judge:
    """See the module. What it says raises `ViolationError`."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        """By the last resize that was acknowledged."""
        self.sectors = [Sector() for _ in range(size_bytes // SECTOR)]
        self.counts: Counter[str] = Counter()
        self.violation: ViolationError | None = None
        """Found where nothing may be raised; whoever comes next does."""
        self._numbers = itertools.count(1)

    def check(self) -> None:
        """Raise what was found meanwhile."""
        if self.violation is not None:
            raise self.violation

    def found(self, text: str) -> None:
        """A violation, where nothing may be raised."""
        self.violation = self.violation or ViolationError(text)

    def data(self, sectors: int) -> bytes:
        """Bytes that nobody has written before."""
        return b"".join(
            next(self._numbers).to_bytes(8, "little") + bytes([number & 255]) * (SECTOR - 8)
            for number in range(sectors)
        )

    # -- writes --------------------------------------------------------------------------------------------------------

    def submitted(self, place: int, changes: Sequence[Change], *, is_judged: bool = True) -> list[int]:
        """A batch has got its place. Returns the sectors that it makes new.

        All zeros have one number: those of a side that isn't judged, after a force, are not what is found on the other.
        """
        fresh: list[int] = []
        for change in changes:
            for at in range(change.offset, change.offset + change.length, SECTOR):
                sector = self.sectors[at // SECTOR]
                number = 0
                if change.data is not None:
                    number = int.from_bytes(change.data[at - change.offset : at - change.offset + 8], "little")
                if number == 0:
                    if is_judged:
                        sector.numbers[0] = place
                    if change.data is None:
                        fresh.append(at // SECTOR)
                elif number not in sector.numbers:
                    sector.numbers[number] = place
                    fresh.append(at // SECTOR)
        return fresh

    def acknowledged(self, place: int, fresh: Iterable[int]) -> None:
        """A batch was."""
        for index in fresh:
            sector = self.sectors[index]
            sector.acknowledged = max(sector.acknowledged, place)
        self.counts["acknowledged"] += 1

    # -- reads ---------------------------------------------------------------------------------------------------------

    def floors(self, first: int, count: int) -> list[int]:
        """Before a read."""
        return [sector.floor for sector in self.sectors[first : first + count]]

    def read(self, first: int, data: memoryview | bytes, floors: Sequence[int], where: str) -> None:
        """A read has returned."""
        for index, floor in enumerate(floors, first):
            number = int.from_bytes(data[(index - first) * SECTOR : (index - first) * SECTOR + 8], "little")
            place = self.judge(index, number, where, floor)
            self.sectors[index].read = max(self.sectors[index].read, place)
        self.counts["reads"] += 1

    def judge(self, index: int, number: int, where: str, floor: int) -> int:
        """The place of what was found in a sector."""
        place = self.sectors[index].numbers.get(number)
        if place is None:
            raise ViolationError(f"{where}: sector {index} holds {number}, which nobody wrote there")
        if place < floor:
            raise ViolationError(f"{where}: sector {index} holds {number} of {named(place)}, older than {named(floor)}")
        return place

    def image(self, data: bytes | bytearray, where: str, unreadable: Collection[int] = ()) -> None:
        """What a leg holds when nothing is under way."""
        for index in range(min(len(data), self.size_bytes) // SECTOR):
            if index not in unreadable:
                number = int.from_bytes(data[index * SECTOR : index * SECTOR + 8], "little")
                self.judge(index, number, where, self.sectors[index].floor)

    # -- durability ----------------------------------------------------------------------------------------------------

    def flushing(self) -> list[int]:
        """A flush begins: what is to be given to `flushed` when it has ended."""
        return [sector.acknowledged for sector in self.sectors]

    def flushed(self, before: Sequence[int]) -> None:
        """It has."""
        for sector, place in zip(self.sectors, before, strict=True):
            sector.flushed = max(sector.flushed, place)
        self.counts["flushes"] += 1

    def lose_unflushed(self) -> None:
        """All who had it have lost their memory."""
        self.counts["unflushed lost"] += 1
        for sector in self.sectors:
            sector.acknowledged = min(sector.acknowledged, sector.flushed)
            sector.read = min(sector.read, sector.flushed)

    def forgive(self) -> None:
        """Somebody has forced a promotion."""
        self.counts["forgiven"] += 1
        for sector in self.sectors:
            sector.acknowledged = sector.read = sector.flushed = 0

    # -- resizes -------------------------------------------------------------------------------------------------------

    def resizing(self, size_bytes: int) -> None:
        """What a resize cuts off may be gone from now on."""
        for sector in self.sectors[size_bytes // SECTOR :]:
            sector.acknowledged = sector.read = sector.flushed = 0

    def resized(self, size_bytes: int, place: int) -> None:
        """It was: what was cut off is gone for ever."""
        for sector in self.sectors[min(size_bytes, self.size_bytes) // SECTOR :]:
            sector.numbers = {0: place}
            sector.acknowledged = sector.read = sector.flushed = 0
        self.size_bytes = size_bytes
        self.counts["resizes"] += 1


def place_of(term: int, sequence: int) -> int:
    """In the order of all batches of all terms."""
    return term * TERM_PLACES + sequence


def named(place: int) -> str:
    """As TERM:SEQUENCE."""
    return f"{place // TERM_PLACES}:{place % TERM_PLACES}"


def extents_of(sectors: Iterable[int]) -> set[int]:
    """The extents that these sectors are in."""
    return {index * SECTOR // EXTENT_BYTES for index in sectors}


__all__ = ["SECTOR", "Done", "Judge", "ViolationError", "extents_of", "named", "place_of"]
