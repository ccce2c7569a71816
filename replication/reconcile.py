"""How a primary begins: the legs in sync are made equal before anything is served.

What was in flight when the last primary ended is on some legs and not on others, and a power cut may have taken from
one what it had not made durable. Both lie within the legs' `recent` and `recent-old`. So the union of these is compared
by checks, what differs is copied from one leg, the source, to the others, and all are flushed. After a clean end the
sets are empty, and it costs nothing.

The source has to have every acknowledged write. A leg that is *intact* (the same boot as when it was in sync, or closed
cleanly) has. If none of those heard is, all legs in sync must have been heard, and the local one is the source: then
nothing that was flushed is lost, as on a single disk after a power cut.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import trio

from replication.leg import BLOCK_BYTES, EXTENT_BYTES, LOST_CHECK, RECENT, RECENT_OLD, Change, Extents, Leg

log = logging.getLogger("replication.mirror")

REREAD_S = (0.2, 0.4, 0.8)
"""Pauses before blocks that no leg could read are tried again."""

PIECE_BYTES = 1 << 20
COMPARE_BYTES = 16 << 20
"""Of Terrace legs so much is compared at a time: 32 KiB of checks from each side. Clients wait while a primary begins,
and a disk that was just trimmed as a whole is all recent."""


SPARSE_BYTES = 64 << 30
"""From here on only what is mapped somewhere is compared: asking for that costs less than comparing holes."""
NBD_MAPPED_BYTES = 1 << 30
"""A server's answers are gathered for so much at a time."""


class UnreadableError(OSError):
    """EIO: no leg in sync can read a block, though each was there to be asked."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.EIO, text)


class LegError(OSError):
    """What one leg has failed with."""

    def __init__(self, leg: Leg, error: OSError) -> None:
        super().__init__(error.errno, error.strerror)
        self.leg = leg


@contextlib.contextmanager
def told_of(leg: Leg) -> Iterator[None]:
    """An OSError within is that leg's."""
    try:
        yield
    except LegError:
        raise
    except OSError as error:
        raise LegError(leg, error) from error


def choose_source(legs: Sequence[Leg], intact: frozenset[str], *, all_heard: bool) -> Leg:
    """A pure decision. Raises OSError ENODATA if it can't be proven that one of them has every acknowledged write."""
    by_nearness = sorted(legs, key=lambda leg: (not leg.is_local, leg.info.id))
    for leg in by_nearness:
        if leg.info.id in intact:
            return leg
    if all_heard:
        return by_nearness[0]
    nodes = ", ".join(leg.info.node for leg in by_nearness)
    raise OSError(
        errno.ENODATA,
        f"after a power cut {nodes} may lack acknowledged writes: start the other nodes in sync, or use --force",
    )


def pieces(extents: Extents, size_bytes: int, piece_bytes: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """(offset, length) of all that is in the set, in order, each at most `piece_bytes`, cut at its multiples."""
    for offset, length in extents.runs():
        stop = min(offset + length, size_bytes)
        while offset < stop:
            until = min(stop, (offset // piece_bytes + 1) * piece_bytes)
            yield offset, until - offset
            offset = until


def covered_bytes(extents: Extents, size_bytes: int) -> int:
    """How much of a volume is in the set. A volume of hundreds of TiB may be as a whole, in one run."""
    return sum(min(offset + length, size_bytes) - offset for offset, length in extents.runs() if offset < size_bytes)


async def mapped_of(extents: Extents, legs: Sequence[Leg], size_bytes: int, into: Extents) -> None:
    """Add to `into` what is in the set and mapped on any of the legs, at least. All else of it is zeros on each.

    Where a leg can't say it, that counts as mapped. Raises LegError for one that has failed.
    """
    for leg in legs:
        longest = NBD_MAPPED_BYTES if leg.info.kind == "nbd" else size_bytes
        for offset, length in extents.runs():
            at, stop = offset, min(offset + length, size_bytes)
            while at < stop:
                size = min(longest, stop - at)
                try:
                    found = await leg.mapped(at, size)
                except OSError:
                    if leg.failure is not None:
                        with told_of(leg):
                            raise
                    found = [(at, size)]
                for start, count in found:
                    if count:
                        into.add(start, count)
                at = max(at + EXTENT_BYTES, sum(found[-1])) if found else at + size


def cut(offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of pieces of a range, each at most `most` bytes."""
    for at in range(offset, offset + length, most):
        yield at, min(most, offset + length - at)


async def differing(source: Leg, target: Leg, offset: int, length: int) -> list[tuple[int, int, bool]]:
    """(offset, length, whether the source has nothing there) of runs of blocks whose checks differ.

    All of it, as if there were data, where a leg has no checks. (One on an NBD server reads its data for them.)
    """
    sides: list[bytes] = [b"", b""]

    async def ask(side: int, leg: Leg) -> None:
        with told_of(leg):
            sides[side] = await leg.checks(offset, length)

    try:
        with ungrouped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, 0, source)
                nursery.start_soon(ask, 1, target)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        return [(offset, length, False)]
    if sides[0] == sides[1]:
        return []
    ours, theirs = (np.frombuffer(side, np.uint64) for side in sides)
    differ = ours != theirs
    kinds = differ.astype(np.uint8) + (differ & (ours == 0))  # 0: equal, 1: data differ, 2: the source has nothing
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    return [
        (offset + first * BLOCK_BYTES, min(stop * BLOCK_BYTES, length) - first * BLOCK_BYTES, bool(kinds[first] == 2))
        for first, stop in itertools.pairwise(edges)
        if kinds[first]
    ]


@contextlib.contextmanager
def ungrouped() -> Iterator[None]:
    """The first OSError of a nursery in place of its group.

    Also where there are cancellations beside it: they come again at the next checkpoint.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        own, rest = group.split(OSError)
        if own is None or (rest is not None and rest.split(trio.Cancelled)[1] is not None):
            raise
        first: BaseException = own
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from group


async def reconcile(
    source: Leg,
    others: Sequence[Leg],
    sequence: int,
    size_bytes: int,
    *,
    forget: bool,
    good: frozenset[str] = frozenset(),
) -> int:
    """Make `others` equal to `source` where they may differ. Returns the last sequence that was used.

    `good`: ids of legs that have all that the source has to have, so any of them may stand in where the source can't
    read a block, which gets it anew. What differs between them was in flight when the last primary ended: either is
    right.
    `forget`: these are all legs that a record calls in sync, so what is recent is forgotten. Else a record without
    those that aren't here comes next, and with it what is recent becomes what they miss. Nothing else is submitted
    meanwhile. Raises LegError, which says whose it is; another OSError for a block that no good leg can read.
    """
    with told_of(source):
        extents = await source.changed([RECENT, RECENT_OLD])
    for leg in others:
        with told_of(leg):
            extents.update(await leg.changed([RECENT, RECENT_OLD]))
    if covered_bytes(extents, size_bytes) > SPARSE_BYTES:
        everything, extents = extents, await source.changed([])
        await mapped_of(everything, [source, *others], size_bytes, extents)
    legs = _Legs([leg for leg in others if leg.info.id in good], others, forget)
    for offset, length in pieces(extents, size_bytes, COMPARE_BYTES):
        for leg in others:
            for start, size, hole in await differing(source, leg, offset, length):
                for at, count in cut(start, size, size if hole else PIECE_BYTES):
                    data = None
                    if not hole:
                        data = memoryview(bytearray(count))
                        if not await _read(source, at, count, data):
                            sequence = await _copy_blocks(source, leg, legs, sequence, at, count)
                            continue
                    sequence += 1
                    await submitted(leg, sequence, Change(at, count, data))
    if legs.lost:
        what = f"{len(legs.lost):,} block(s), the first at {legs.lost[0]:,}"
        log.error("no leg can read %s; write them anew, or restore them", what)
    for leg in (source, *others):
        with told_of(leg):
            await leg.flush()
    sequence += 1  # of the flush: 0 would say that nothing may be forgotten
    for _ in range(2):  # the first makes what is left of `recent` old
        for leg in (source, *others):
            leg.flushed_by_all(sequence if forget else 0)
    return sequence


async def _read(leg: Leg, offset: int, length: int, into: memoryview) -> bool:
    """False for blocks that the leg can't read. Raises OSError if it has failed."""
    try:
        await leg.read(offset, length, into)
    except OSError:
        if leg.failure is not None:
            with told_of(leg):
                raise
        return False
    return True


@dataclass(frozen=True)
class _Legs:
    """Who has what, where the source can't read a block."""

    good: list[Leg]
    """Each but the source has all that was acknowledged."""
    others: Sequence[Leg]
    are_all: bool
    """No other leg is in sync."""
    lost: list[int] = field(default_factory=list)
    """Offsets of blocks that none of them can read."""
    pauses_s: list[float] = field(default_factory=lambda: [*REREAD_S])
    """That are left, before what can't be read is tried again: clients wait."""


async def _copy_blocks(source: Leg, target: Leg, legs: _Legs, sequence: int, offset: int, length: int) -> int:
    """Block by block, as the source can't read some of them. Returns the last sequence that was used.

    What another good leg can read is written anew at the source. What none of all legs can, though that is tried for a
    moment, is lost at the target: what it has there might be read later, and be older than what was acknowledged.
    """
    data = memoryview(bytearray(BLOCK_BYTES))
    for at in range(offset, offset + length, BLOCK_BYTES):
        change = Change(at, BLOCK_BYTES, data)
        stand_in = await _who_reads([source, *legs.good], at, data)
        while stand_in is None and legs.pauses_s:
            await trio.sleep(legs.pauses_s.pop(0))
            stand_in = await _who_reads([source, *legs.good], at, data)
        if stand_in is not source:
            if stand_in is not None:
                sequence += 1
                await submitted(source, sequence, change)
                where = f"the block at {at} of the leg on {source.info.node}"
                log.warning("%s couldn't be read, and is the one of %s now", where, stand_in.info.node)
            elif await check_at(target, at) == LOST_CHECK:
                continue  # neither of the two hands out anything there: they are equal
            elif legs.are_all and await _who_reads(legs.others, at, memoryview(bytearray(BLOCK_BYTES))) is None:
                legs.lost.append(at)
                change = Change(at, BLOCK_BYTES, None, lost=True)
            else:
                raise OSError(
                    errno.EIO,
                    f"the block at {at:,} of the leg on {source.info.node} can't be read, and no other leg certainly "
                    "has all that was acknowledged there: start the nodes of the other legs, or go on from another one "
                    "with `terrace volume mirror promote --force` there",
                )
        sequence += 1
        await submitted(target, sequence, change)
    return sequence


async def _who_reads(legs: Sequence[Leg], offset: int, into: memoryview) -> Leg | None:
    for leg in legs:
        if await _read(leg, offset, len(into), into):
            return leg
    return None


async def check_at(leg: Leg, offset: int) -> bytes | None:
    """Of one block; None where the leg can't say it. Raises OSError if the leg has failed."""
    try:
        return bytes(await leg.checks(offset, BLOCK_BYTES))
    except OSError:
        if leg.failure is not None:
            with told_of(leg):
                raise
        return None


async def submitted(leg: Leg, sequence: int, change: Change) -> None:
    """Submit one change to one leg, and wait for it."""
    event = trio.Event()
    outcome: list[OSError | None] = []

    def done(error: OSError | None) -> None:
        outcome.append(error)
        event.set()

    leg.submit(sequence, [change], done)
    await event.wait()
    if outcome[0] is not None:
        raise LegError(leg, outcome[0])
