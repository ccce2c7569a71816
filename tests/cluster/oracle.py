"""What a volume may show to whom, whatever happens to the nodes behind it. Pure: a load tells it what it sees.

The volume is divided into *units*. A unit is written whole, by one writer, one write at a time, each with the next
number; its bytes tell which one they are, and of which unit. Zeroing is a write too, whose bytes tell nothing.

- A read never returns a write older than the newest that was acknowledged before the read began, nor older than what
  a read that had ended by then returned. So what is acknowledged is never lost, and no value ever goes back, that of a
  write that failed neither: it happened or it didn't.
- A read never returns what nobody wrote there: no part of a write, no other unit's bytes.

In the end every copy is judged as a read is, and the copies have to be the same.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Final

_CELL: Final = struct.Struct(">8sQQQ")  # magic, seed, the unit's offset, number
_MAGIC: Final = b"written:"


class Violation(AssertionError):
    """A promise was broken; the message says which unit, what was found and what had to be there."""


@dataclass(frozen=True)
class Region:
    """The units of one writer: `count` of `unit_bytes`, one behind the other, from `offset` on."""

    writer: int
    offset: int
    unit_bytes: int
    """A multiple of 32."""
    count: int

    @property
    def end(self) -> int:
        return self.offset + self.count * self.unit_bytes


@dataclass
class _Unit:
    issued: int = 0
    """The number of the newest write that was begun."""
    floor: int = 0
    """What must be there at least: acknowledged, or read."""
    was_read: bool = False
    """`floor` is of a read, and may never have been acknowledged."""
    zeroes: list[int] = field(default_factory=lambda: [0])
    """The numbers of which were zeroing; at the start all is zero."""


class Oracle:
    """See the module. `seed` tells this run's bytes from another's. Units are named by region and index."""

    def __init__(self, regions: list[Region], seed: int) -> None:
        self.regions = regions
        self.seed = seed & (1 << 64) - 1
        self._units = {(region.writer, i): _Unit() for region in regions for i in range(region.count)}
        self.acknowledged_writes = 0
        self.reads = 0

    def content(self, region: Region, index: int, number: int) -> bytes:
        """What write `number` of a unit puts there."""
        offset = region.offset + index * region.unit_bytes
        return _CELL.pack(_MAGIC, self.seed, offset, number) * (region.unit_bytes // _CELL.size)

    def begin(self, region: Region, index: int, *, zero: bool = False) -> int:
        """A write begins; its number. From now on it may be seen."""
        unit = self._units[region.writer, index]
        unit.issued += 1
        if zero:
            unit.zeroes.append(unit.issued)
        return unit.issued

    def acknowledge(self, region: Region, index: int, number: int) -> None:
        """It was answered without an error: from now on nobody sees an older one."""
        unit = self._units[region.writer, index]
        if number > unit.floor:
            unit.floor, unit.was_read = number, False
        self.acknowledged_writes += 1

    def floors(self, region: Region, start: int, count: int) -> list[int]:
        """For a read that begins now: what each of these units must show at least."""
        return [self._units[region.writer, i].floor for i in range(start, start + count)]

    def judge(self, region: Region, start: int, floors: list[int], data: bytes, where: str = "a read") -> None:
        """The read has ended with `data`. Raises Violation; else what it saw must be seen from now on."""
        size = region.unit_bytes
        self.reads += 1
        for i, floor in enumerate(floors):
            found = self._number(region, start + i, floor, data[i * size : (i + 1) * size], where)
            unit = self._units[region.writer, start + i]
            if found > unit.floor:
                unit.floor, unit.was_read = found, True

    def judge_copies(self, copies: dict[str, bytes]) -> None:
        """The whole volume as each leg has it, after everything. Raises Violation."""
        for name, data in copies.items():
            for region in self.regions:
                floors = self.floors(region, 0, region.count)
                self.judge(region, 0, floors, data[region.offset : region.end], name)
        (first, expected), *others = copies.items()
        for name, data in others:
            if data != expected:
                at = next((i for i in range(0, len(expected), 512) if data[i : i + 512] != expected[i : i + 512]), None)
                raise Violation(f"the copies {first} and {name} differ, first at byte {at}")

    def _number(self, region: Region, index: int, floor: int, data: bytes, where: str) -> int:
        unit = self._units[region.writer, index]
        offset = region.offset + index * region.unit_bytes
        place = f"{where}: unit {index} of writer {region.writer}, at {offset}+{region.unit_bytes}"
        if not any(data) and len(data) == region.unit_bytes:
            # The oldest zeroing that may be there: what is remembered of it holds whichever it was.
            later = unit.zeroes[bisect_right(unit.zeroes, floor - 1) :]
            if not later:
                raise Violation(f"{place}: zeros, from before what {self._why(unit, floor)}")
            return later[0]
        magic, seed, said_offset, number = _CELL.unpack_from(data)
        if data != data[: _CELL.size] * (region.unit_bytes // _CELL.size):
            raise Violation(f"{place}: parts of several writes, {data[: _CELL.size].hex()} first")
        if magic != _MAGIC or seed != self.seed:
            raise Violation(f"{place}: {data[: _CELL.size].hex()}, which this run never wrote")
        if said_offset != offset:
            raise Violation(f"{place}: what was written to {said_offset}")
        if not 0 < number <= unit.issued or number in unit.zeroes:
            raise Violation(f"{place}: write {number}, which never was")
        if number < floor:
            raise Violation(f"{place}: write {number}, from before what {self._why(unit, floor)}")
        return int(number)

    @staticmethod
    def _why(unit: _Unit, floor: int) -> str:
        how = "was read before" if unit.was_read and unit.floor == floor else "was acknowledged before"
        return f"{how}: write {floor}"
