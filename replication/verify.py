"""Verify: compare the legs in sync while clients go on, and say which byte ranges differ.

By checks, as the maps have them: nothing is read from disk, and what is compared is what was meant to be stored; each
leg's scrub sees to it that it is. A leg on an NBD server has no map: its data are read, and their checks computed. Or
`full`: the data themselves are read from every leg, hashed with a secret seed (XXH3-128), and the hashes are compared,
a mebibyte at a time.

Legs differ for a moment wherever a batch is in flight. So what differs is looked at again by single extents, with their
writers waiting and nothing in flight there; only what differs then is reported. With `repair` the block of the first
leg that can read it is written to the others; the first one is where reads come from. Legs that can't read it get it
anew (`replication.healing`). A block that is lost on a leg, as its map knows, can't be read there, `full` or not; nor
can what lies below a damaged page of its map, where nothing is written either.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio
import xxhash

from replication.healing import has_map
from replication.inflight import EXTENT_SHIFT
from replication.leg import BLOCK_BYTES, EXTENT_BYTES, LOST_CHECK, Leg, LegState
from replication.reconcile import COMPARE_BYTES, PIECE_BYTES, ungrouped

if TYPE_CHECKING:
    from replication.members import Member
    from replication.mirror import Mirror

MAX_RANGES: Final = 10_000
"""A report names so many ranges a leg; it counts all bytes."""


@dataclass
class VerifyReport:
    """What was found; also while it is under way."""

    total_bytes: int = 0
    done_bytes: int = 0
    differing: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By leg id: (offset, length) of what isn't as on the first leg, in order."""
    differing_bytes: int = 0
    unreadable: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By leg id: (offset, length) of what couldn't be read there."""
    unreadable_bytes: int = 0
    map_damaged: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By leg id: (offset, length) of extents that have such bytes because the leg's map can't be read there."""
    repaired_bytes: int = 0
    """Of those that differed."""
    healed_bytes: int = 0
    """Of those that couldn't be read."""
    compared: tuple[str, ...] = ()
    """Ids of the legs, the first one first."""
    finished: bool = False

    @property
    def equal(self) -> bool:
        """Whether all that was compared is the same everywhere and can be read."""
        return not self.differing_bytes and not self.unreadable_bytes

    @property
    def left_bytes(self) -> int:
        """What isn't as it should be afterwards."""
        return self.differing_bytes - self.repaired_bytes + self.unreadable_bytes - self.healed_bytes


async def verify(
    mirror: Mirror,
    *,
    full: bool = False,
    repair: bool = False,
    rate_bytes_s: float | None = None,
    report: VerifyReport | None = None,
) -> VerifyReport:
    """Compare all legs in sync. `report` is filled while it goes on, for who shows progress.

    Raises OSError ENOTCONN when fewer than two legs are in sync, or no longer are; EAGAIN if the mirror is shrunk.
    """
    report = report if report is not None else VerifyReport()
    report.total_bytes = mirror.size_bytes
    seed = secrets.randbits(64)
    members = _members(mirror)
    report.compared = tuple(member.info.id for member in members)
    for offset, length in _pieces(mirror, full):
        await trio.lowlevel.checkpoint()
        began = trio.current_time()
        if set(_members(mirror)) != set(members):  # their order is that of nearness now, which changes
            raise OSError(errno.ENOTCONN, f"{mirror.name}: the legs in sync have changed; verify again")
        for at in await _suspects(members, offset, length, seed if full else None):
            await _judge(mirror, members, at, min(EXTENT_BYTES, offset + length - at), report, full, repair)
        report.done_bytes = min(offset + length, report.total_bytes)
        if rate_bytes_s is not None:
            await trio.sleep_until(began + length / rate_bytes_s)
    report.done_bytes = report.total_bytes
    report.finished = True
    return report


def _members(mirror: Mirror) -> list[Member]:
    members = mirror.readable()
    if len(members) < 2:
        why = f"`terrace volume mirror explain {mirror.name}` says which leg is out, and why"
        raise OSError(errno.ENOTCONN, f"{mirror.name}: there are no two legs in sync to compare; {why}")
    return members


def _leg(member: Member) -> Leg:
    if member.leg is None or member.state is not LegState.UP_TO_DATE:
        raise OSError(errno.ENOTCONN, f"the leg on {member.info.node} is gone; verify again")
    return member.leg


def _require_size(mirror: Mirror, stop: int) -> None:
    """What legs say of what is behind their end is no damage. Raises OSError EAGAIN."""
    if stop > mirror.size_bytes:
        raise OSError(errno.EAGAIN, f"{mirror.name}: the mirror was shrunk; verify again")


def _pieces(mirror: Mirror, full: bool) -> Iterator[tuple[int, int]]:
    step = PIECE_BYTES if full else COMPARE_BYTES
    offset = 0
    while offset < mirror.size_bytes:
        yield offset, min(step, mirror.size_bytes - offset)
        offset += step


async def _suspects(members: list[Member], offset: int, length: int, seed: int | None) -> list[int]:
    """Offsets of extents in which legs differ now, or one can't be read."""
    found: dict[str, list[bytes]] = {}

    async def ask(member: Member) -> None:
        found[member.info.id] = await _fingerprints(_leg(member), offset, length, seed)

    with ungrouped():
        async with trio.open_nursery() as nursery:
            for member in members:
                nursery.start_soon(ask, member)
    first, *others = found.values()
    if all(other == first and b"" not in first for other in others):
        return []
    extents = (offset >> EXTENT_SHIFT, (offset + length - 1 >> EXTENT_SHIFT) + 1)
    return [
        extent << EXTENT_SHIFT
        for index, extent in enumerate(range(*extents))
        if first[index] == b"" or any(other[index] != first[index] for other in others)
    ]


async def _fingerprints(leg: Leg, offset: int, length: int, seed: int | None) -> list[bytes]:
    """One for each extent; empty if it can't be read. `offset` is at an extent's beginning."""
    if seed is None:
        try:
            checks = await leg.checks(offset, length)
        except OSError:
            if leg.failure is not None:
                raise
            return [b""] * -(-length // EXTENT_BYTES)
        step = EXTENT_BYTES // BLOCK_BYTES * 8
        extents = [checks[at : at + step] for at in range(0, len(checks), step)]
        return [b"" if LOST_CHECK in one else one for one in extents]
    data = memoryview(bytearray(length))
    try:
        await leg.read(offset, length, data)
    except OSError:
        if leg.failure is not None:
            raise
        return [b""] * -(-length // EXTENT_BYTES)
    return [xxhash.xxh3_128_digest(data[at : at + EXTENT_BYTES], seed) for at in range(0, length, EXTENT_BYTES)]


async def _judge(
    mirror: Mirror, members: list[Member], offset: int, length: int, report: VerifyReport, full: bool, repair: bool
) -> None:
    """With the extent's writers waiting: what differs now does."""
    async with mirror.locks.holding(offset, length):
        await mirror.inflight.settle_for_client(offset, length)  # who waits for the lock is to get the same error
        _require_size(mirror, offset + length)
        blocks = range(offset, offset + length, BLOCK_BYTES)
        sides: dict[str, list[bytes]] = {}
        for member in members:
            if full:
                sides[member.info.id] = [await _block(_leg(member), at, report, member) for at in blocks]
            else:
                sides[member.info.id] = await _known(_leg(member), blocks, report, member)
        _require_size(mirror, offset + length)
        no_map: set[str] = set()
        for member in members:
            if b"" in sides[member.info.id] and not await has_map(member, offset, length):
                _require_size(mirror, offset + length)
                no_map.add(member.info.id)
                mirror.healing.no_map(member, offset, "found by a verify")
                _add(report.map_damaged, member.info.id, offset, length)
        for index, at in enumerate(blocks):
            there = {member.info.id: member for member in members if sides[member.info.id][index]}
            checks = {leg_id: sides[leg_id][index] for leg_id in there}
            wrong = [leg_id for leg_id in there if checks[leg_id] != next(iter(checks.values()))]
            report.differing_bytes += BLOCK_BYTES * len(wrong)
            for leg_id in wrong:
                _add(report.differing, leg_id, at)
            sound = [leg_id for leg_id in wrong if leg_id not in no_map]
            if repair and sound and await _repair(mirror, list(there.values()), checks, at, report, no_map):
                report.repaired_bytes += BLOCK_BYTES * len(sound)
    if repair:
        for leg_id, ranges in report.unreadable.items():
            for at, size in ranges:
                start, stop = max(at, offset), min(at + size, offset + length)
                if start < stop:
                    report.healed_bytes += BLOCK_BYTES * await mirror.heal(leg_id, start, stop - start)


async def _repair(
    mirror: Mirror, there: list[Member], checks: dict[str, bytes], at: int, report: VerifyReport, no_map: set[str]
) -> bool:
    """Write the block of the first leg that can read it where another one differs; whether that was done.

    Its writers wait. `no_map`: ids of legs to which nothing is written there.
    """
    data = memoryview(bytearray(BLOCK_BYTES))
    for source in there:
        try:
            await _leg(source).read(at, BLOCK_BYTES, data)
        except OSError:
            if source.leg is None or source.leg.failure is not None:
                raise
            _note_unreadable(report, source, at)  # which its check didn't show; it is healed from those that are right
            del checks[source.info.id]
            continue
        right = checks[source.info.id]
        others = [m for m in there if checks.get(m.info.id, right) != right and m.info.id not in no_map]
        return all([await mirror.copy_to(member, at, data) for member in others])
    return False


async def _known(leg: Leg, blocks: range, report: VerifyReport, member: Member) -> list[bytes]:
    """The checks of blocks; empty for one that is lost, or of which the map can't be read."""
    try:
        checks = await leg.checks(blocks.start, blocks.stop - blocks.start)
    except OSError:
        if leg.failure is not None:
            raise
        checks = LOST_CHECK * len(blocks)
    found = [checks[at : at + 8] for at in range(0, len(checks), 8)]
    for at, check in zip(blocks, found, strict=True):
        if check == LOST_CHECK:
            _note_unreadable(report, member, at)
    return [b"" if check == LOST_CHECK else check for check in found]


async def _block(leg: Leg, offset: int, report: VerifyReport, member: Member) -> bytes:
    data = memoryview(bytearray(BLOCK_BYTES))
    try:
        await leg.read(offset, BLOCK_BYTES, data)
    except OSError:
        if leg.failure is not None:
            raise
        _note_unreadable(report, member, offset)
        return b""
    return bytes(data)


def _note_unreadable(report: VerifyReport, member: Member, offset: int) -> None:
    report.unreadable_bytes += BLOCK_BYTES
    _add(report.unreadable, member.info.id, offset)


def _add(ranges: dict[str, list[tuple[int, int]]], leg_id: str, offset: int, length: int = BLOCK_BYTES) -> None:
    found = ranges.setdefault(leg_id, [])
    if found and sum(found[-1]) == offset:
        found[-1] = found[-1][0], found[-1][1] + length
    elif len(found) < MAX_RANGES:
        found.append((offset, length))
