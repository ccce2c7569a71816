"""What a backup must do with each part of a volume, worked out from what the server says of it. Pure.

Two descriptions come from NBD's block status: `base:allocation` (where nothing is stored, or zeros are) and, for an
incremental backup, `terrace:diff:A` (what changed since A). Each is a list of lengths with flags, and the two need not
break at the same places nor reach equally far.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from typing import NamedTuple

READS_ZERO = 1 << 1
"""NBD_STATE_ZERO of `base:allocation` (doc/proto.md, "base:allocation metadata context")."""
CHANGED = 1 << 0
"""Of `terrace:diff:A`: the range may be different from what it was in A."""

Described = Sequence[tuple[int, int]]
"""(length, flags) of consecutive ranges."""


class Need(Enum):
    """What becomes of a range."""

    SAME = "is as in the base, so the stream leaves it out"
    ZEROS = "reads as zeros, so it is not read"
    DATA = "has to be read"


class Extent(NamedTuple):
    offset: int
    length: int
    need: Need

    @property
    def end(self) -> int:
        return self.offset + self.length


def combine(offset: int, length: int, allocation: Described, changed: Described | None) -> list[Extent]:
    """Extents from `offset` on, as far as both descriptions reach and not beyond `length`. Without `changed`: all is.

    Neighbours of one need are one extent.
    """
    limit = min([length, _reach(allocation), *([] if changed is None else [_reach(changed)])])
    extents: list[Extent] = []
    everything = [(limit, CHANGED)]
    for start, end, allocated, different in _overlay(limit, allocation, everything if changed is None else changed):
        need = Need.SAME if not different & CHANGED else Need.ZEROS if allocated & READS_ZERO else Need.DATA
        if extents and extents[-1].need is need:
            extents[-1] = Extent(extents[-1].offset, extents[-1].length + end - start, need)
        else:
            extents.append(Extent(offset + start, end - start, need))
    return extents


def _reach(described: Described) -> int:
    return sum(length for length, _ in described)


def _overlay(limit: int, one: Described, other: Described) -> Iterator[tuple[int, int, int, int]]:
    """(start, end, flags of one, flags of the other) of the ranges that neither breaks."""
    ones, others = _ends(one), _ends(other)
    start = 0
    (end, flags), (other_end, other_flags) = next(ones, (0, 0)), next(others, (0, 0))
    while start < limit:
        stop = min(end, other_end, limit)
        if stop > start:
            yield start, stop, flags, other_flags
            start = stop
        if end <= start < limit:
            end, flags = next(ones)
        if other_end <= start < limit:
            other_end, other_flags = next(others)


def _ends(described: Described) -> Iterator[tuple[int, int]]:
    end = 0
    for length, flags in described:
        end += length
        yield end, flags


def pieces(extents: Iterable[Extent], size: int) -> Iterator[Extent]:
    """The same with what has to be read in pieces that don't cross a multiple of `size`."""
    for extent in extents:
        if extent.need is not Need.DATA:
            yield extent
            continue
        start = extent.offset
        while start < extent.end:
            end = min(extent.end, (start // size + 1) * size)
            yield Extent(start, end - start, Need.DATA)
            start = end
