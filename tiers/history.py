"""What snapshots share, and what changed between them: both from their trees alone, without reading any data.

A snapshot is seen through a chain of trees (`tiers.snapshot`): its own, those of later snapshots, its volume's, those
of the volume's origin. The chains of two snapshots that are related end in the same trees, and in those nothing can
differ. So only leaves that exist in the other trees are looked at: the cost is that of the changes, not of the size.
"""

import errno
from bisect import bisect_left
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

import numpy as np
import trio

from tiers.errors import TierError
from tiers.extents import add_extent
from tiers.layout import BAD, BLOCK_SHIFT, FIRST_ADDRESS
from tiers.maptree import BAD_PAGE, EMPTY_PAGE, FANOUT, FANOUT_BITS, ROOT_LEVEL, MapTree, Page
from tiers.reader import at_one_moment, hole_in

if TYPE_CHECKING:
    from tiers.snapshot import Snapshot

CHANGED = 1
"""The flag of a changed extent."""
CHUNK_LEAVES = 64


def chain_of(snapshot: "Snapshot") -> list[MapTree]:
    """All trees that it is seen through, in order, those of the origin's too."""
    trees = snapshot.layers()
    origin = snapshot.volume.origin
    return trees if origin is None else trees + chain_of(origin)


def differing_trees(one: "Snapshot", other: "Snapshot") -> list[MapTree]:
    """The trees that only one of two snapshots is seen through."""
    first, second = chain_of(one), chain_of(other)
    while first and second and first[-1] is second[-1]:
        first.pop()
        second.pop()
    return first + second


async def changed_extents(
    before: "Snapshot", after: "Snapshot", offset: int, length: int, limit: int
) -> list[tuple[int, int]]:
    """Describe a prefix of the range as (bytes, CHANGED or 0): what `after` has that `before` hadn't.

    At most `limit` extents, neighbours differ. Raises TierError EIO for a damaged map page.
    """
    result: list[tuple[int, int]] = []
    end = offset + length
    at = offset
    look = _look_out(before, after, offset >> BLOCK_SHIFT, (end - 1 >> BLOCK_SHIFT) + 1)
    while at < end:
        block = at >> BLOCK_SHIFT
        hole = await look(block)
        if hole:
            runs = [(hole, 0)]
        else:
            index = block >> FANOUT_BITS
            changed = _differences(await before.leaf(index), await after.leaf(index))
            runs = _runs(changed[block - (index << FANOUT_BITS) :])
        for count, flags in runs:
            block += count
            stop = min(end, block << BLOCK_SHIFT)
            if not add_extent(result, stop - at, flags, limit):
                return result
            at = stop
            if at >= end:
                break
        await trio.lowlevel.checkpoint()
    return result


def _look_out(before: "Snapshot", after: "Snapshot", start: int, end: int) -> Callable[[int], Awaitable[int]]:
    """A function that tells how many blocks from one on, of those from `start` to before `end`, surely don't differ."""
    kept = after.volume.kept
    if before.volume is after.volume and kept is not None:
        first, last = sorted((before.id, after.id))
        leaves = kept.leaves_of(first, last, start >> FANOUT_BITS, (end >> FANOUT_BITS) + 1)

        async def by_index(block: int) -> int:
            at = bisect_left(leaves, block >> FANOUT_BITS)
            return max(0, (leaves[at] << FANOUT_BITS) - block) if at < len(leaves) else end - block

        return by_index

    async def by_trees(block: int) -> int:
        async def look() -> int:
            trees = differing_trees(before, after)
            return min([await hole_in(tree, block) for tree in trees], default=end - block)

        return await at_one_moment(after._engine.views, look)

    return by_trees


def _differences(before: Page, after: Page) -> list[bool]:
    """Which blocks of a leaf differ. One that is lost counts as changed, in both too: what they were isn't known."""
    old, new = np.frombuffer(before, np.uint64), np.frombuffer(after, np.uint64)
    differs: list[bool] = ((old[:FANOUT] != new[:FANOUT]) | (new[:FANOUT] == BAD)).tolist()
    return differs


def _runs(values: list[bool]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for value in values:
        flags = CHANGED if value else 0
        if runs and runs[-1][1] == flags:
            runs[-1] = (runs[-1][0] + 1, flags)
        else:
            runs.append((1, flags))
    return runs


async def exclusive_blocks(snapshot: "Snapshot", *, has_clones: bool | None = None) -> int:
    """Blocks that no other version has: what its deletion would give back. 0 while clones need it.

    `has_clones`: for who asks of many snapshots, and knows. Remembered until a checkpoint changes what it is counted
    from. Raises TierError EIO for a damaged map page.
    """
    engine = snapshot._engine
    if engine.lineage.clones_of(snapshot) if has_clones is None else has_clones:
        return 0
    while True:
        if snapshot.gone:
            return 0
        if snapshot.exclusive_blocks is not None:
            return snapshot.exclusive_blocks
        moment = engine.views.moment
        snapshots = snapshot.volume.snapshots
        older = snapshots[: snapshots.index(snapshot)] if snapshot in snapshots else []
        try:
            count = await _count(snapshot.tree, older[-1].tree if older else None)
        except OSError:
            if moment == engine.views.moment:
                raise
            continue  # a checkpoint has given one of them up
        if moment == engine.views.moment:
            snapshot.exclusive_blocks = count


async def _count(tree: MapTree, older: MapTree | None) -> int:
    """Entries with data, but for those that the older snapshot sees too, since it has none of its own there."""
    if older is None:
        return tree.mapped_blocks
    count = 0
    async with aclosing(leaves_of(tree)) as found:
        async for indices in found:
            own = await tree.load(0, indices)
            below = await older.load(0, indices)
            for index in indices:
                if below[index] is not EMPTY_PAGE:
                    data = np.frombuffer(own[index], np.uint64)[:FANOUT] >= np.uint64(FIRST_ADDRESS)
                    count += int(np.count_nonzero(data & (np.frombuffer(below[index], np.uint64)[:FANOUT] != 0)))
            await trio.lowlevel.checkpoint()
    return count


async def leaves_of(tree: MapTree, *, all_of_them: bool = False) -> AsyncGenerator[list[int], None]:
    """The leaves of a tree, in order, some at a time. What lies below lost pages is left out.

    `all_of_them`: raises TierError EIO instead.
    """
    stack = [(ROOT_LEVEL, 0)] if tree.root[0] else []
    while stack:
        level, index = stack.pop()
        page = (await tree.load(level, [index]))[index]
        if all_of_them and (page is BAD_PAGE or BAD in page[:FANOUT].tolist()):
            raise TierError(errno.EIO, f"pages of the map of {tree.name} were lost to a device error")
        if page is not BAD_PAGE:
            slots = np.flatnonzero(np.frombuffer(page, np.uint64)[:FANOUT] >= np.uint64(FIRST_ADDRESS))
            below = [index << FANOUT_BITS | slot for slot in slots.tolist()]
            if level == 1:
                for start in range(0, len(below), CHUNK_LEAVES):
                    yield below[start : start + CHUNK_LEAVES]
            else:
                stack += [(level - 1, child) for child in reversed(below)]
        await trio.lowlevel.checkpoint()
