"""Copying what a clone shares with its origin, so that it needs it no more.

Block by block it is the rule for all that is prepared outside: read, and write what was read if the map says nothing
else by then and the block is still the origin's. So clients may write meanwhile, and an interruption costs nothing:
what was copied is the clone's own. No leaf is left before nothing in it is the origin's.
"""

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from tiers.errors import TierError
from tiers.failpoint import hit
from tiers.layout import BAD, BLOCK_MASK, BLOCK_SHIFT, FIRST_ADDRESS
from tiers.losses import lost_in_words
from tiers.maptree import FANOUT, FANOUT_BITS, FANOUT_MASK

if TYPE_CHECKING:
    from tiers.volume import Volume


async def flatten(volume: "Volume", progress: Callable[[int], None]) -> None:
    """Copy all that is the origin's. `progress`: how many blocks were. Raises TierError EIO for what can't be read."""
    end = volume.size_bytes + BLOCK_MASK >> BLOCK_SHIFT
    block = done = 0
    while block < end and volume.origin is not None:
        hole = await volume.origin.hole_at(block)
        if hole:
            block += hole
            continue
        stop = min(end, (block | FANOUT_MASK) + 1)
        while (run := await _shared_run(volume, block, stop)) is not None:
            done += await volume.copy_up(*run)
            hit("flatten.copied")
            progress(done)
            await trio.lowlevel.checkpoint()
        block = stop
        await trio.lowlevel.checkpoint()


async def _shared_run(volume: "Volume", block: int, stop: int) -> tuple[int, int] | None:
    """The next blocks from `block` to before `stop`, within a leaf, that are the origin's: (first, count)."""
    leaf = block >> FANOUT_BITS
    addresses, _ = await volume.entries(leaf << FANOUT_BITS, FANOUT)
    await volume.tree.load(0, [leaf])
    start = None
    for at in range(block, stop):
        address = addresses[at & FANOUT_MASK]
        if address == BAD and not volume.owns_now(at):
            raise TierError(
                errno.EIO,
                f"{volume.name} at byte {at << BLOCK_SHIFT}: {lost_in_words(volume)}; it can't be copied: write or "
                "trim it first",
            )
        shared = address >= FIRST_ADDRESS and not volume.owns_now(at)
        if shared and start is None:
            start = at
        elif not shared and start is not None:
            return start, at - start
    return None if start is None else (start, stop - start)
