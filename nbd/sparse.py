"""Which parts of a long READ are told as holes, and which are read: pure but for the questions it asks an export.

A hole chunk costs both sides a few bytes, where zeroes cost a copy for each of them; but cutting data into many short
chunks costs more than it saves. So a run of zeroes counts from ``HOLE_BYTES`` on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from nbd.export import Export, TellsHoles

CHUNK_BYTES: Final = 256 << 10
"""A longer READ is answered in chunks of this, where replies are structured: what was just read is still in the CPU's
cache when it is sent, and the client receives one chunk while the next is read (a quarter more bytes a second)."""
HOLE_BYTES: Final = 64 << 10
"""Shorter runs of zeroes are sent as data."""


Teller = Callable[[int, int, int], list[tuple[int, int]] | None]


class Piece(NamedTuple):
    """A part of a READ: bytes from ``start`` to before ``end``."""

    start: int
    end: int
    is_hole: bool


def teller_of(export: Export) -> Teller | None:
    """Its ``holes_now``, if it has one. Once for a READ: looking whether it has costs as much as asking."""
    return export.holes_now if isinstance(export, TellsHoles) else None


def next_pieces(tell: Teller | None, offset: int, end: int, step: int = CHUNK_BYTES) -> list[Piece]:
    """The next pieces, in order and without a gap, of a READ that is still to be answered from ``offset`` to ``end``.

    No more than ``step`` bytes of them are data, and they end on a multiple of it, but for the READ's own end; a hole
    may be as long as the READ. Holds now: until the caller has read the data there must be no checkpoint. OSError as
    the export's.
    """
    stop = min(end, (offset // step + 1) * step)
    if tell is None:
        return [Piece(offset, stop, False)]
    pieces = _pieces_of(tell, offset, stop)
    # A hole that reaches the end of a chunk is followed further: one chunk tells of all of it.
    while pieces[-1].is_hole and stop < end:
        start, stop = stop, min(end, stop + step)
        first, *more = _pieces_of(tell, start, stop, goes_on=True)
        if not first.is_hole:
            break
        pieces[-1] = Piece(pieces[-1].start, first.end, True)
        if more:
            break
    return pieces


def _pieces_of(tell: Teller, offset: int, stop: int, *, goes_on: bool = False) -> list[Piece]:
    """``goes_on``: a hole ends at ``offset``, so one that begins there may be short."""
    pieces = []
    at = offset
    for start, length in tell(offset, stop - offset, HOLE_BYTES) or ():
        if length < HOLE_BYTES and not (goes_on and start == offset):
            continue
        if at < start:
            pieces.append(Piece(at, start, False))
        at = start + length
        pieces.append(Piece(start, at, True))
    if at < stop:
        pieces.append(Piece(at, stop, False))
    return pieces
