"""Mending: a damaged block is had from another copy of its volume, and put in a new place here.

The engine knows of no other copies: `Volume.elsewhere` is whoever does. What that gives is taken only if it has the
check that the map has for the block. Then it is what was written, whoever it comes from and however long it took, and
nothing of it depends on an order with the writes of clients: a block that they have changed meanwhile has another
place, and what was had is dropped. All who name the damaged place, snapshots too, name the new one in the same step.

A block that is lost (BAD in the map) has no check any more. What was there can't be told from anything else, so it is
nothing for this module: it has to be written anew, in the order of the writes, by who knows that order.

A crash in between leaves the damaged block, or the new one: it is logged as any rewrite.
"""

import logging
from typing import Protocol

import trio

from tiers.layout import BLOCK_BYTES, BLOCK_SHIFT, check_of
from tiers.snapshot import Snapshot
from tiers.volume import Volume

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Another copy may have a write already that comes here in a moment, or still lack the one that was damaged."""
PAUSE_S = 0.05


class Elsewhere(Protocol):
    """Other copies of one volume and of its snapshots."""

    async def fetch(self, snapshot: str | None, block: int, check: int) -> bytes | None:
        """A block of the volume, or of its snapshot of that name, from a copy where it has this check.

        None: no copy has it so. Raises OSError if copies can't be asked.
        """

    def damaged(self, offset: int, length: int) -> None:
        """These bytes of the volume, whole blocks, can't be read and weren't mended. Never waits, never raises."""


async def mend(holder: Volume | Snapshot, block: int, address: int, check: int) -> bool:
    """Put a block that its holder's map names at `address`, with this check, anew. Whether it can be read now."""
    volume = holder.volume if isinstance(holder, Snapshot) else holder
    if volume.elsewhere is None:
        return False
    names: list[str | None] = [None]
    if isinstance(holder, Snapshot) and holder.state == "visible":
        names.insert(0, holder.short_name)  # the other copy may have overwritten it since, or lack that snapshot
    what = f"{holder.name} at byte {block << BLOCK_SHIFT}"
    try:
        data = await _had(volume.elsewhere, names, what, block, check)
        if data is None or not await volume.put_anew(block, address, check, data):
            return False
    except OSError as error:
        # Not louder: the scrub tells of the damage, as ranges.
        logger.debug("%s: damaged, and can't be mended from another copy: %s", what, error.strerror or error)
        return False
    volume.healed_blocks += 1
    logger.info("%s: a damaged block was had from another copy", what)
    return True


async def _had(elsewhere: Elsewhere, names: list[str | None], what: str, block: int, check: int) -> bytes | None:
    for attempt in range(ATTEMPTS):
        if attempt:
            await trio.sleep(PAUSE_S)
        for name in names:
            data = await elsewhere.fetch(name, block, check)
            if data is None:
                continue
            if len(data) == BLOCK_BYTES and check_of(data) == check:
                return data
            logger.error("%s: what came from another copy isn't what was written", what)
    return None
