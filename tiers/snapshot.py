"""Snapshots: what a volume was at some moment, kept as *reverse deltas*.

A volume keeps its whole map in one tree, as if there were no snapshots. A snapshot has a tree of its own, empty at
first; when a checkpoint writes an overwritten block's new entry into the volume's map, it puts the old one into the
tree of the newest snapshot, unless that has one for this block already (`tiers.merge`). So a snapshot is read through
its own tree, then through those of the snapshots after it, oldest first, then through the volume's: the first entry
that says something is what the block was.

    oldest ---> ... ---> newest ---> volume ---> the snapshot that the volume is a clone of ---> ...

Each block on a device is named by exactly one entry in all of these trees together. That is why everything that the
engine proves by counting (what is live, what may be given back, what a check must find) holds as it did without
snapshots, and why taking one costs nothing: no block and no page of a map is copied, at any size.

Entries of such trees say one of: an address; nothing (0), look further; ZEROED, there was nothing; INHERITED, there was
what the volume's origin has; BAD.

**Taking** one happens at the freeze of a checkpoint, in one step for any number of volumes, and is true when that
checkpoint commits. **Deleting** one moves its entries to the next older snapshot where that one has none, and frees the
others, in slices, a few thousand map pages in each checkpoint; no step changes what any other snapshot reads, so it may
be interrupted anywhere. The oldest one's tree is given back as a whole. A snapshot that clones were made of is only
*hidden* by its deletion, and goes when the last of them has gone, or takes over what it keeps (`tiers.lineage`).

A volume that is deleted although clones need its snapshots, or that a rollback replaced, is *retired*: it stays in the
tables, without a name, and its map moves to its newest snapshot as if it were one that was deleted.

What a snapshot shows are committed trees only: nothing of the log, and nothing that overlays say, concerns it.
"""

import errno
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from tiers.extents import load_ahead
from tiers.history import changed_extents
from tiers.layout import INHERITED, ZEROED
from tiers.maptree import EMPTY_PAGE, FANOUT, FANOUT_BITS, FANOUT_MASK, MapTree, Page, page_of, read_pages
from tiers.overlay import Entry
from tiers.policy import Placement
from tiers.reader import Reader, at_one_moment, entries_in, hole_in

if TYPE_CHECKING:
    from tiers.engine import Engine
    from tiers.volume import Volume

DIFF_CONTEXT = "terrace:diff:"
"""The metadata context of NBD that tells what has changed since the snapshot whose name follows."""

SnapshotState = Literal["visible", "hidden", "deleted"]


def compose(layers: Sequence[Page], below: Page) -> Page:
    """The leaf that these layers, the first of which counts most, show over what the origin has. Runs in 10-30 us.

    The result has only addresses, holes and BAD.
    """
    layers = [page for page in layers if page is not EMPTY_PAGE]
    if not layers:
        return below
    words = np.array(layers[0], np.uint64)
    addresses, checks = words[:FANOUT], words[FANOUT:]
    for page in layers[1:]:
        more = np.frombuffer(page, np.uint64)
        says_nothing = addresses == 0
        addresses[says_nothing] = more[:FANOUT][says_nothing]
        checks[says_nothing] = more[FANOUT:][says_nothing]
    inherited = (addresses == 0) | (addresses == INHERITED)
    if below is EMPTY_PAGE:
        addresses[inherited] = checks[inherited] = 0
    else:
        more = np.frombuffer(below, np.uint64)
        addresses[inherited] = more[:FANOUT][inherited]
        checks[inherited] = more[FANOUT:][inherited]
    addresses[addresses == ZEROED] = 0
    return page_of(words.tobytes())


class Views:
    """Leaves as they were composed, by snapshot or clone; the bound on their memory, over a whole pool.

    `forget` when a checkpoint has changed a tree that others are seen through. Two generations: what is used stays.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.moment = 0
        """Another one after each `forget`: what was gathered over a wait is of one moment if this is the same."""
        self._limit = max(64, limit_bytes // 4600 // 2)
        self._young: dict[tuple[int, int], Page] = {}
        self._old: dict[tuple[int, int], Page] = {}

    def get(self, owner_id: int, index: int) -> Page | None:
        """The composed leaf, if it is kept."""
        key = owner_id, index
        page = self._young.get(key)
        if page is None and (page := self._old.get(key)) is not None:
            self.put(owner_id, index, page)
        return page

    def put(self, owner_id: int, index: int, page: Page) -> Page:
        """Keep a leaf; returns it."""
        if len(self._young) >= self._limit:
            self._old, self._young = self._young, {}
        self._young[owner_id, index] = page
        return page

    def forget(self) -> None:
        """Trees have changed."""
        self.moment += 1
        self._young = {}
        self._old = {}


class Snapshot(Reader):
    """A volume as it was: read-only. Implements nbd's `Export` structurally."""

    read_only = True

    def __init__(
        self,
        engine: "Engine",
        snapshot_id: int,
        volume: "Volume",
        short_name: str,
        size_bytes: int,
        tree: MapTree,
        created_at: float,
    ) -> None:
        super().__init__(engine, snapshot_id, "", size_bytes, tree, created_at)
        self.volume = volume
        """Whose snapshot it is, by its blocks. By its name it is that of the family's present volume."""
        self.short_name = short_name
        self.state: SnapshotState = "visible"
        self.held = False
        """Not to be deleted, by schedules or by hand, until it is released."""
        self.referenced_blocks = 0
        """Blocks with data that it shows."""
        self.thinned: tuple[int, int] | None = None
        """A hidden one was last looked through for what clones need no more when they had so many blocks of their own,
        and it kept so many."""
        self.thinning: int | None = None
        """The leaf where that goes on, while it is under way."""
        self.exclusive_blocks: int | None = None
        """Of those, the ones that would be given back with it, when that was counted last; None if it has changed."""

    @property
    def of_mirror(self) -> bool:
        """Whether it is a leg's, or has been handed down from one."""
        return self.volume.of_mirror

    @property
    def shown_blocks(self) -> int:
        """Blocks with data that its clients see."""
        return self.referenced_blocks

    @property
    def placement(self) -> Placement:
        """Where its volume's policy wants its blocks."""
        return self.volume.policy.placement

    # -- what is seen ----------------------------------------------------------------------------------------------

    def layers(self) -> list[MapTree]:
        """The trees that it is seen through, in order. Once it is gone nothing that is found there means anything."""
        volume = self.volume
        if self.gone:
            return [volume.tree]
        later = volume.snapshots[volume.snapshots.index(self) :]
        return [*(snapshot.tree for snapshot in later if snapshot.tree.root[0]), volume.tree]

    def layers_at(self, index: int) -> list[MapTree]:
        """Those of them that may say something of a leaf."""
        volume = self.volume
        if volume.kept is None:
            return self.layers()
        return [*(snapshot.tree for snapshot in volume.snapshots_at(index) if snapshot.id >= self.id), volume.tree]

    def leaf_now(self, index: int) -> Page | None:
        """A leaf as the snapshot shows it; None if a page has to be loaded first."""
        views = self._engine.views
        page = views.get(self.id, index)
        if page is None:
            pages: list[Page] = []
            for tree in self.layers_at(index):
                found = tree.leaf_now(index)
                if found is None:
                    return None
                pages.append(found)
            origin = self.volume.origin
            below = EMPTY_PAGE if origin is None else origin.leaf_now(index)
            if below is None:
                return None
            page = views.put(self.id, index, compose(pages, below))
        return page

    async def leaf(self, index: int) -> Page:
        """The same, reading what is missing. Raises TierError EIO for a damaged page."""
        views = self._engine.views
        while (page := self.leaf_now(index)) is None:
            moment = views.moment
            try:
                pages = await self._read_leaf(self.layers_at(index), index)
            except OSError:
                if moment == views.moment:
                    raise
                continue  # a checkpoint may have freed what an older page named
            origin = self.volume.origin
            below = EMPTY_PAGE if origin is None else await origin.leaf(index)
            if moment == views.moment:
                return views.put(self.id, index, compose(pages, below))
        return page

    async def _read_leaf(self, trees: list[MapTree], index: int) -> list[Page]:
        """One leaf of several trees, with one read for all that isn't cached."""
        pages = {tree: tree.leaf_now(index) for tree in trees}
        missing: dict[MapTree, tuple[int, int]] = {}
        for tree in [tree for tree, page in pages.items() if page is None]:
            parent = (await tree.load(1, [index >> FANOUT_BITS]))[index >> FANOUT_BITS]
            slot = index & FANOUT_MASK
            missing[tree] = parent[slot], parent[FANOUT + slot]
        what = f"that {self.name} is seen through, index {index}"
        found = await read_pages(self._engine.segments, list(missing.values()), what)
        return [page or EMPTY_PAGE for page in (pages | dict(zip(missing, found, strict=True))).values()]

    def entry_now(self, block: int) -> Entry | None:
        page = self.leaf_now(block >> FANOUT_BITS)
        if page is None:
            return None
        slot = block & FANOUT_MASK
        address = page[slot]
        return self._moved.get(address, address), page[FANOUT + slot]

    def entries_now(self, block: int, count: int) -> tuple[list[int], list[int]] | None:
        found = entries_in(self.leaf_now, block, count)
        if found is not None and self._moved:
            return [self._moved.get(address, address) for address in found[0]], found[1]
        return found

    async def load_leaves(self, first: int, last: int) -> None:
        for index in range(first, last + 1):
            await self.leaf(index)

    async def load_ahead(self, first: int, last: int, end: int) -> None:
        await load_ahead(self.volume.tree, first, last, end)
        await self.load_leaves(first, last)

    async def hole_at(self, block: int) -> int:
        hole = await at_one_moment(self._engine.views, partial(self.hole_in_trees, block))
        return 0 if self.gone else hole

    async def hole_in_trees(self, block: int) -> int:
        """The same, which only means something if no tree has changed by the end."""
        hole = await hole_in(self.volume.tree, block)
        if not hole:
            return 0
        kept = self.volume.kept
        if kept is not None:
            leaf = kept.next_leaf(block >> FANOUT_BITS)
            if leaf is not None:
                hole = min(hole, max(0, (leaf << FANOUT_BITS) - block))
        else:
            for tree in self.layers()[:-1]:
                hole = min(hole, await hole_in(tree, block))
        if not hole:
            return 0
        origin = self.volume.origin
        return hole if origin is None else min(hole, await origin.hole_in_trees(block))

    # -- what changed ----------------------------------------------------------------------------------------------

    def contexts(self, prefix: str) -> Iterator[str]:
        """The metadata contexts that begin with `prefix`: what differs from each other snapshot, too."""
        yield from super().contexts(prefix)
        for other in self._engine.lineage.of_family(self.volume):
            name = DIFF_CONTEXT + other.short_name
            if other is not self and name.startswith(prefix):
                yield name

    def has_context(self, name: str) -> bool:
        """Whether there is such a context now."""
        return super().has_context(name) or self._compared(name) is not None

    def _compared(self, context: str) -> "Snapshot | None":
        if not context.startswith(DIFF_CONTEXT):
            return None
        name = context[len(DIFF_CONTEXT) :]
        family = self._engine.lineage.of_family(self.volume)
        return next((other for other in family if other.short_name == name and other is not self), None)

    async def context_extents(self, context: str, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """What has changed since another snapshot: (bytes, 1 for changed, else 0). FileNotFoundError: it is gone."""
        if super().has_context(context):
            return await super().context_extents(context, offset, length, limit)
        other = self._compared(context)
        if other is None:
            raise FileNotFoundError(errno.ENOENT, f"{self.name} offers no {context!r}: that snapshot is gone")
        other.acquire()  # what is deleted meanwhile is seen through other trees than those that are compared
        try:
            return await changed_extents(other, self, offset, length, limit)
        finally:
            other.release()

    # -- what it refuses -------------------------------------------------------------------------------------------

    def write_now(self, writes: object) -> bool:
        """Never: the server refuses writes to what is read-only."""
        raise self._refused()

    async def write(self, offset: int, data: object) -> None:
        """Refused."""
        raise self._refused()

    def trim_now(self, ranges: object) -> bool:
        """Refused."""
        raise self._refused()

    async def trim(self, offset: int, length: int) -> None:
        """Refused."""
        raise self._refused()

    async def write_zeroes(self, offset: int, length: int, *, no_hole: bool, fast: bool = False) -> None:
        """Refused."""
        raise self._refused()

    async def flush(self) -> None:
        """All of it is durable."""

    def _refused(self) -> PermissionError:
        return PermissionError(f"{self.name} is a snapshot: it can't be written; clone it to have a volume like it")
