"""Map pages that can't be read any more: seeing that they really can't, and giving them up when an operator says so.

A damaged page makes what lies below it unreadable, and ends a pool's writing as soon as a checkpoint has to change it.
Nobody but an operator decides that what it named is lost: the damage may be the controller's, not the medium's. Then,
while the pool is being opened and nothing else uses it (`Pool.open(give_up_map=True)`):

1. All trees are walked (`give_up_pages`). A page that can't be read, past the page cache either, reads as BAD_PAGE from
   then on (`SegmentTable.substitutes`); one that can is taken from there. Both are forced: the next checkpoint, the
   one that ends the recovery, writes them elsewhere, and the blocks below are BAD, which is EIO until they are written.
2. What the lost pages named stays counted. So the counts are made anew (`recount`), which lists what is lost as well.

A crash before that checkpoint has committed leaves all as it was; after it, some space counts as used that isn't, until
this is done again.
"""

from __future__ import annotations

import errno
import logging
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from tiers.check import Leaks, find_leaks
from tiers.errors import TierError
from tiers.kept import forget_index
from tiers.label import LABEL_OFFSETS
from tiers.layout import BLOCK_BYTES, FIRST_ADDRESS, SLOT_BITS, SLOT_MASK, check_of
from tiers.maptree import BAD_PAGE, FANOUT, FANOUT_BITS, ROOT_LEVEL, Page, page_key, page_of, read_pages
from tiers.snapshot import Snapshot

if TYPE_CHECKING:
    from tiers.checkpoint import Checkpointer
    from tiers.engine import Engine
    from tiers.merge import Owner
    from tiers.segments import Segment

logger = logging.getLogger(__name__)

CHUNK_PAGES = 64
MAX_GIVEN_UP = 65536
"""Pages at once: more than that is a device that is lost, and a set of a few MB."""
RECOUNT_CHECKPOINTS = 64
"""So many slices of what was deleted are given back before the counts are made anew."""


async def read_past_cache(segment: Segment, address: int, check: int) -> Page | None:
    """A page that failed its check, as the medium has it; None if it can't be had there either."""
    segment.pins += 1
    try:
        data = await segment.device.read_direct(segment.offset(address & SLOT_MASK), BLOCK_BYTES)
    except OSError:
        return None
    finally:
        segment.pins -= 1
    return page_of(data) if check_of(data) == check else None


def give_up(engine: Engine, owner: Owner, level: int, index: int, address: int) -> None:
    """What was below this page is lost."""
    segment = engine.segments.by_id.get(address >> SLOT_BITS)
    logger.error(
        "%s: a page of its map (level %d, index %d) on %s can't be read; what was below it is lost",
        owner.name,
        level,
        index,
        segment.device.path if segment is not None else f"segment {address >> SLOT_BITS}, which is not in use",
    )
    engine.segments.substitutes[address] = BAD_PAGE
    if level and isinstance(owner, Snapshot):
        forget_index(owner.volume)


async def give_up_pages(engine: Engine) -> Counter[str]:
    """Give up all pages of all maps that can't be read, while nothing else uses the pool; how many, by owner's name.

    Nothing has happened before the next checkpoint commits. Raises TierError EIO where not even a device's label can be
    read, since then it is the device that doesn't answer; E2BIG if there are more than 65,536.
    """
    given_up: Counter[str] = Counter()
    for owner in engine.owners():
        address, check = owner.tree.root
        if address >= FIRST_ADDRESS:
            await _walk(engine, owner, ROOT_LEVEL, [(0, address, check)], given_up)
    return given_up


async def _walk(
    engine: Engine, owner: Owner, level: int, entries: list[tuple[int, int, int]], given_up: Counter[str]
) -> None:
    """Look at these pages (index, address, check) of one level, and at all that lies below."""
    for start in range(0, len(entries), CHUNK_PAGES):
        part = entries[start : start + CHUNK_PAGES]
        for (index, _, _), page in zip(part, await _pages(engine, owner, level, part, given_up), strict=True):
            if page is BAD_PAGE or not level:
                continue
            words = np.frombuffer(page, np.uint64)
            slots = np.flatnonzero(words[:FANOUT] >= np.uint64(FIRST_ADDRESS)).tolist()
            below = [(index << FANOUT_BITS | slot, int(words[slot]), int(words[FANOUT + slot])) for slot in slots]
            await _walk(engine, owner, level - 1, below, given_up)


async def _pages(
    engine: Engine, owner: Owner, level: int, part: list[tuple[int, int, int]], given_up: Counter[str]
) -> list[Page]:
    segments = engine.segments
    what = f"of {owner.name}, level {level}"
    try:
        found = await read_pages(segments, [(address, check) for _, address, check in part], what)
        return [page or BAD_PAGE for page in found]
    except OSError:
        pass
    pages: list[Page] = []
    for index, address, check in part:
        try:
            pages += [page or BAD_PAGE for page in await read_pages(segments, [(address, check)], what)]
            continue
        except OSError:
            pass
        segment = segments.by_id.get(address >> SLOT_BITS)
        page = None
        if segment is not None:
            page = await read_past_cache(segment, address, check)
            if page is None:
                await _require_answers(segment)
        if page is not None:
            segments.substitutes[address] = page
        else:
            give_up(engine, owner, level, index, address)
            given_up[owner.name] += 1
            if given_up.total() > MAX_GIVEN_UP:
                raise TierError(
                    errno.E2BIG,
                    f"more than {MAX_GIVEN_UP} map pages of pool {engine.pool_name} can't be read, and none was "
                    f"given up: if a device is gone, `terrace pool evacuate {engine.pool_name} DEV --lost` goes on "
                    "without it",
                )
        engine.forced.setdefault(owner.id, set()).add(page_key(level, index))
        pages.append(page or BAD_PAGE)
    return pages


async def _require_answers(segment: Segment) -> None:
    """A device that answers nothing has not lost its pages."""
    device = segment.device
    try:
        await device.read_direct(LABEL_OFFSETS[0], BLOCK_BYTES)
    except OSError as error:
        raise TierError(
            errno.EIO,
            f"{device.path} can't be read at all ({error}), so no map page was given up: see that it is attached; if "
            "it is gone for good, `terrace pool evacuate POOL DEV --lost` goes on without it",
        ) from error


async def recount(engine: Engine, checkpointer: Checkpointer) -> bool:
    """Take back what is counted and isn't there, durably. False if that can't be told before more was given back."""
    for _ in range(RECOUNT_CHECKPOINTS):
        leaks = await find_leaks(engine, checkpointer)
        if leaks is not None:
            await take_back(engine, checkpointer, leaks)
            await checkpointer.checkpoint()
            return True
        if not engine.dead and not checkpointer.waiting_deletes():
            return False
    return False


async def take_back(engine: Engine, checkpointer: Checkpointer, leaks: Leaks) -> None:
    """Count it no more; the next checkpoint makes that durable."""
    await checkpointer.hold()
    try:
        for segment_id, count in leaks.live.items():
            if count > 0:
                engine.segments.add_live(segment_id, -count)
        for owner, count in leaks.mapped:
            owner.tree.mapped_blocks -= count
            if isinstance(owner, Snapshot):
                engine.lineage.recounted.add(owner)
    finally:
        checkpointer.let_go()


def in_words(pool_name: str, given_up: Counter[str], *, recounted: bool, most_names: int = 20) -> str:
    """For the operator: what was given up."""
    if given_up:
        which = ", ".join(f"{count} of {name}" for name, count in sorted(given_up.items())[:most_names])
        more = f" and of {len(given_up) - most_names} more" if len(given_up) > most_names else ""
        text = f"{given_up.total()} damaged map page(s) were given up, {which}{more}, with all that lay below them"
    else:
        text = "all its map pages can be read, none was given up"
    if not recounted:
        text += (
            "; what they named is counted as used still, as what was deleted isn't given back yet: run `terrace pool "
            f"check {pool_name} --give-up-map` again later"
        )
    return text
