"""Extents: what is where in a volume or snapshot, told from its map alone. No data is read.

Two descriptions over one walk: `base:allocation`, as NBD defines it, and `terrace:tier`, as is defined here. A walk
looks at what the map has, not at what it could have: inner pages tell of terabytes in which nothing is, and the next
leaf in which something may be is asked for by number.

One call looks at `WALK_LEAVES` map pages at most, and lets others have their turn after each few: who wants to know
more asks again from there, as clients of NBD do anyway.
"""

import contextlib
import sys
from array import array
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import trio

from tiers.layout import BAD, BLOCK_SHIFT, FIRST_ADDRESS, SLOT_BITS, UNMAPPED, ZERO_CHECK
from tiers.maptree import FANOUT, FANOUT_BITS, FANOUT_MASK, MapTree
from tiers.record import Kind

if TYPE_CHECKING:
    from tiers.reader import Reader

EXTENT_HOLE = 1
EXTENT_ZERO = 2
"""The flags of `base:allocation` (doc/proto.md, "`base:allocation` metadata context"). Blocks with data have neither.

HOLE clear promises that a write won't fail with ENOSPC "unless for reasons specified in the definition of another
context"; that one is `terrace:tier`. HOLE alone would promise less, but the text calls the contents of such a range
undefined, and clients take it at its word: from an export that says so of data, qemu 7.2's `blockdev-mirror` and
`qemu-img convert -B` copy nothing (`qemu-img compare` finds it equal to zeroes). See docs/nbd.md, "Contexts".
"""

TIER_CONTEXT = "terrace:tier"

LOST_CHECK = (1 << 64) - 1
"""Among checks, a block that is lost: whoever compares must not take it for equal to anything, to itself neither."""
MOST_EXTENTS = 4096
"""Asked for at once."""

# Flags of `terrace:tier`. 0: nothing is stored there, it reads as zeroes, and a write takes space.
#
#   bit   value   name     meaning
#   0     1       FAST     on a device of the fast tier
#   1     2       BASE     on a device of the base tier
#   2     4       PACKED   compressed, in a frame with others: a write over it takes a whole block of space
#   3     8       SHARED   a snapshot, or the snapshot that a clone was made of, has it too: a write over it takes space
#   4     16      LOST     a device has lost it: reading is EIO; no other bit but SHARED is set with it
#
# Bits 5 to 31 are 0 now; who reads them must ignore those that it doesn't know.
TIER_FAST = 1
TIER_BASE = 2
TIER_PACKED = 4
TIER_SHARED = 8
TIER_LOST = 16

WALK_LEAVES = 4096
"""As many as a request of 32 bits covers, 4 GiB: 40 ms from memory (`scripts/lib/bench_extents.py`)."""
STRIDE_LEAVES = 8
STEPS_A_TURN = 16
"""Leaves and holes that are looked at before others have their turn: half a millisecond."""
AHEAD_LEAVES = 64
AHEAD_PAGES = 32
"""Leaves, and pages above them, that are read at once where they aren't in memory."""

Runs = list[tuple[int, int]]
"""(blocks, flags) of consecutive runs."""
Describe = Callable[[int, list[int]], Runs | None]
"""Describes the blocks from the first argument on, which lie at these addresses; None if a page must be loaded first.
It has no checkpoint in it, so what the addresses name can't go meanwhile."""


async def allocation_of(reader: "Reader", offset: int, length: int, limit: int) -> list[tuple[int, int]]:
    """Describe a prefix of the range as (bytes, flags): HOLE|ZERO where nothing is mapped, 0 where data is.

    At most `limit` of them, neighbours differ. Raises TierError EIO for a damaged map page.
    """
    return await _walk(reader, offset, length, limit, _allocation, EXTENT_HOLE | EXTENT_ZERO)


async def tiers_of(reader: "Reader", offset: int, length: int, limit: int) -> list[tuple[int, int]]:
    """The same with the flags of `terrace:tier`."""

    def describe(block: int, addresses: list[int]) -> Runs | None:
        shared = reader.shared_now(block, addresses)
        return None if shared is None else _tiers(reader, addresses, shared)

    return await _walk(reader, offset, length, limit, describe, 0)


async def _walk(
    reader: "Reader", offset: int, length: int, limit: int, describe: Describe, hole_flags: int
) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    at, end = offset, offset + length
    looked = steps = 0
    stride = 1
    while at < end and looked < WALK_LEAVES:
        block = at >> BLOCK_SHIFT
        most = (end - 1 >> BLOCK_SHIFT) + 1 - block
        hole = min(await _hole_at(reader, block), most) if most > FANOUT else 0
        runs: Runs | None
        if hole > FANOUT:
            runs = [(hole, hole_flags)]
            stride = 1
        else:
            count = min(most, (stride << FANOUT_BITS) - (block & FANOUT_MASK))
            first, last = block >> FANOUT_BITS, block + count - 1 >> FANOUT_BITS
            while True:
                found = reader.entries_now(block, count)
                runs = None if found is None else describe(block, found[0])
                if runs is not None:
                    break
                await reader.load_ahead(first, last, end - 1 >> BLOCK_SHIFT + FANOUT_BITS)
            looked += last - first + 1
            steps += last - first + 1
            stride = min(2 * stride, STRIDE_LEAVES)  # where one leaf is, more may follow
        reader._require_alive()
        at = _add_runs(result, runs, at, end, limit)
        if at < min(end, block + sum(blocks for blocks, _ in runs) << BLOCK_SHIFT):
            break
        steps += 1
        if steps >= STEPS_A_TURN:
            steps = 0
            await trio.lowlevel.checkpoint()
    await trio.lowlevel.checkpoint()
    return result


def _add_runs(extents: list[tuple[int, int]], runs: Runs, at: int, end: int, limit: int) -> int:
    """Add runs of blocks, the first of which byte `at` lies in, up to `end`; return where what fits in `limit` ends."""
    block = at >> BLOCK_SHIFT
    for blocks, flags in runs:
        block += blocks
        stop = min(end, block << BLOCK_SHIFT)
        if not add_extent(extents, stop - at, flags, limit):
            break
        at = stop
    return at


async def mapped_in(reader: "Reader", offset: int, length: int) -> list[tuple[int, int]]:
    """(offset, length) of what isn't a hole, of the whole range. Raises TierError EIO for a damaged map page.

    The last one reaches the end of the range: where a hole is there, it has no length.
    """
    found: list[tuple[int, int]] = []
    at, end = offset, offset + length
    while at < end:
        for size, flags in await allocation_of(reader, at, end - at, MOST_EXTENTS):
            if not flags & EXTENT_HOLE:
                if found and sum(found[-1]) == at:
                    found[-1] = (found[-1][0], found[-1][1] + size)
                else:
                    found.append((at, size))
            at += size
    if not found or sum(found[-1]) < end:
        found.append((end, 0))
    return found


async def checks_of_map(reader: "Reader", offset: int, length: int) -> bytes:
    """8 bytes for each block that the range touches, little-endian: what its map says of it. No data is read.

    The check of the block; 0 for a hole and for a block of zeros, which read the same; `LOST_CHECK` for one that is
    lost. What is told of each map page is of one moment. Raises TierError EIO for a damaged map page.
    """
    found: list[bytes] = []
    block = offset >> BLOCK_SHIFT
    end = (offset + length - 1 >> BLOCK_SHIFT) + 1 if length else block
    steps = 0
    stride = 1
    while block < end:
        hole = min(await _hole_at(reader, block), end - block) if end - block > FANOUT else 0
        if hole > FANOUT:
            found.append(bytes(8 * hole))
            block += hole
            stride = 1
        else:
            count = min(end - block, (stride << FANOUT_BITS) - (block & FANOUT_MASK))
            first, last = block >> FANOUT_BITS, block + count - 1 >> FANOUT_BITS
            while (entries := reader.entries_now(block, count)) is None:
                await reader.load_ahead(first, last, end - 1 >> FANOUT_BITS)
            found.append(_checks(*entries))
            block += count
            steps += last - first
            stride = min(2 * stride, STRIDE_LEAVES)
        reader._require_alive()
        steps += 1
        if steps >= STEPS_A_TURN:
            steps = 0
            await trio.lowlevel.checkpoint()
    await trio.lowlevel.checkpoint()
    return b"".join(found)


def _checks(addresses: list[int], checks: list[int]) -> bytes:
    if ZERO_CHECK in checks or BAD in addresses:
        checks = [
            LOST_CHECK if address == BAD else 0 if check == ZERO_CHECK else check
            for address, check in zip(addresses, checks, strict=True)
        ]
    words = array("Q", checks)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


async def _hole_at(reader: "Reader", block: int) -> int:
    """How many blocks from `block` on are surely unmapped. No checkpoint after it has been found out."""
    hole = reader.unmapped_now(block) or await reader.hole_at(block)
    if hole > FANOUT:
        # Pages don't tell what came after them, and what was unmapped as a whole may have been written since.
        leaf = reader.next_named(block >> FANOUT_BITS)
        if leaf is not None:
            hole = min(hole, (leaf << FANOUT_BITS) - block)
    return hole


def _allocation(_block: int, addresses: list[int]) -> Runs:
    if UNMAPPED not in addresses:
        return [(len(addresses), 0)]
    mapped = bytes(map(bool, addresses))
    runs: Runs = []
    at = 0
    while at < len(mapped):
        stop = mapped.find(not mapped[at], at)
        stop = len(mapped) if stop < 0 else stop
        runs.append((stop - at, 0 if mapped[at] else EXTENT_HOLE | EXTENT_ZERO))
        at = stop
    return runs


def _tiers(reader: "Reader", addresses: list[int], shared: list[bool]) -> Runs:
    """The flags of `terrace:tier`. What lies in one segment and is shared alike is looked up once."""
    words = np.array(addresses, np.uint64)
    places = np.where(words < FIRST_ADDRESS, words, words >> np.uint64(SLOT_BITS) << np.uint64(SLOT_BITS))
    differs = places[1:] != places[:-1]
    if shared:
        marks = np.array(shared)
        differs |= marks[1:] != marks[:-1]
    cuts = [0, *(np.flatnonzero(differs) + 1).tolist(), len(addresses)]
    return [
        (end - start, _tier_flags(reader, addresses[start], is_shared=bool(shared) and shared[start]))
        for start, end in pairwise(cuts)
    ]


def _tier_flags(reader: "Reader", address: int, *, is_shared: bool) -> int:
    if address == UNMAPPED:
        return 0
    flags = TIER_SHARED if is_shared else 0
    segment = None if address == BAD else reader._segments.get(address >> SLOT_BITS)
    if segment is None or segment.device.state == "lost":
        return flags | TIER_LOST
    flags |= TIER_FAST if segment.device.tier == "fast" else TIER_BASE
    return flags | TIER_PACKED if segment.kind is Kind.PACKED else flags


def add_extent(extents: list[tuple[int, int]], length: int, flags: int, limit: int) -> bool:
    """Append (bytes, flags), or make the last one longer. False: it would be one more than `limit`, and isn't there."""
    if extents and extents[-1][1] == flags:
        extents[-1] = (extents[-1][0] + length, flags)
    elif len(extents) == limit:
        return False
    else:
        extents.append((length, flags))
    return True


async def load_ahead(tree: MapTree, first: int, last: int, end: int) -> None:
    """Load leaves `first` to `last`, and some of those that follow them up to `end`, in few reads.

    Raises TierError EIO for a damaged page, if it is one of those that must be there.
    """
    if tree.holds_leaves(2 * (AHEAD_LEAVES + AHEAD_PAGES)):
        with contextlib.suppress(OSError):  # what is only ahead may be damaged
            await tree.load(0, await _leaves_ahead(tree, first, end))
    await tree.load(0, range(first, last + 1))


async def _leaves_ahead(tree: MapTree, first: int, end: int) -> list[int]:
    """The next leaves that there are from `first` up to `end`, of those below the same page of level 2."""
    upper = first >> 2 * FANOUT_BITS
    page = (await tree.load(2, [upper]))[upper]
    start = first >> FANOUT_BITS & FANOUT_MASK
    parents = [upper << FANOUT_BITS | start + slot for slot in _present(page[start:FANOUT])[:AHEAD_PAGES]]
    pages = await tree.load(1, [parent for parent in parents if parent <= end >> FANOUT_BITS])
    leaves = [parent << FANOUT_BITS | slot for parent in sorted(pages) for slot in _present(pages[parent][:FANOUT])]
    return [leaf for leaf in leaves if first <= leaf <= end][:AHEAD_LEAVES]


def _present(addresses: memoryview) -> list[int]:
    slots: list[int] = np.flatnonzero(np.frombuffer(addresses, np.uint64)).tolist()
    return slots
