"""Merging: what a checkpoint makes of frozen overlays, relocations and deleted snapshots: new map pages, new counts.

Pages are never changed in place, so a tree gets a new root, and what is written here is true when the checkpoint
commits that root. Nothing in memory changes before (`Checkpointer._apply`), so a try that fails costs dead slots.

It goes in passes, each of which is left out where there is nothing for it. A later pass starts from the roots that an
earlier one has written, which must be on the device by then.

1. Relocations: entries that name an old place get the new one, in whichever tree of the volume they are. Pages of
   snapshots that have to be written elsewhere.
2. Overlays: for each volume, leaf by leaf and then level by level. What an entry replaces goes to the newest snapshot,
   if that has none for the block yet (`tiers.snapshot`); else it is dead.
3. Deleted snapshots, a slice of each: their entries move to the next older one where that has none, or are dead. The
   map of a retired volume likewise. What only one clone needs of a retired volume becomes the clone's own.
"""

import itertools
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import trio

from tiers.changes import ChangedExtents
from tiers.failpoint import hit
from tiers.layout import BAD, BLOCK_BYTES, FIRST_ADDRESS, INHERITED, SLOT_BITS, ZEROED
from tiers.maptree import (
    BAD_PAGE,
    EMPTY_PAGE,
    FANOUT,
    FANOUT_BITS,
    FANOUT_MASK,
    LEVEL_SHIFT,
    ROOT_LEVEL,
    MapTree,
    Page,
    page_key,
    page_of,
)
from tiers.mapwriter import MapWriter
from tiers.overlay import UNSET, Overlay, Patch
from tiers.record import Kind
from tiers.relocation import Relocation
from tiers.snapshot import Snapshot
from tiers.volume import Volume

if TYPE_CHECKING:
    from tiers.engine import Engine

U64 = Any
"""A NumPy array of uint64."""

CHUNK_PAGES = 256
SLICE_ENTRIES = 4096
DELETED_LEAVES = 2048
"""Leaves of deleted snapshots that one checkpoint sorts out at most."""
STEP_SEGMENTS = 2
PAGES_A_LEAF = 4
STEP_PAGES = 64
"""What a step may take: for each leaf, in all trees; for the inner pages above; and segments that are left unfilled."""
THIN_BLOCKS = 1024
"""A hidden snapshot is looked through for what its clones need no more when so many blocks are others."""
DELETED_SNAPSHOTS = 64
"""Deleted snapshots that one checkpoint looks at, for each volume."""

Owner = Volume | Snapshot
"""Whose tree it is."""
Detached = dict[int, set[int]]
Edit = Callable[[U64, list[int], U64], Awaitable[None]]
"""(leaf indices, the same as a list, their pages as a matrix of 512 columns): changes the matrix, and counts."""


@dataclass
class FrozenVolume:
    """One volume at the moment of the freeze."""

    volume: Volume
    size_bytes: int
    policy_name: str
    filling: bool
    overlay: Overlay | None
    forced: set[int]
    heir: Volume | None
    """Of a retired volume."""
    record: bytes = b""
    trackers: dict[str, ChangedExtents] = field(default_factory=dict)
    """Copies."""
    keeper: Snapshot | None = None
    """The snapshot that what is overwritten goes to."""
    blockers: list[Snapshot] = field(default_factory=list)
    """Deleted snapshots newer than the keeper: where one of them has an entry, the keeper doesn't see the volume's."""


@dataclass
class Merge:
    """What a try has worked out so far; takes effect at the commit. Keys are ids of volumes and snapshots."""

    live: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    pending: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    dead: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """Subtrees that come on the dead list."""
    dead_removed: list[int] = field(default_factory=list)
    roots: dict[int, tuple[int, int]] = field(default_factory=dict)
    mapped: dict[int, int] = field(default_factory=dict)
    referenced: dict[int, int] = field(default_factory=dict)
    inner: dict[int, dict[int, Page]] = field(default_factory=dict)
    stale: dict[int, list[U64]] = field(default_factory=lambda: defaultdict(list))
    """Leaves whose cached versions the commit makes old."""
    detached: set[int] = field(default_factory=set)
    free: list[int] = field(default_factory=list)
    gone: set[Snapshot] = field(default_factory=set)
    """Snapshots that are no more: their trees are empty, or on the dead list."""
    buried: list[Volume] = field(default_factory=list)
    """Retired volumes that are no more."""
    origins: dict[int, Snapshot | None] = field(default_factory=dict)
    """Clones that have another origin now."""
    heirs: dict[int, Volume] = field(default_factory=dict)
    """Who takes over the blocks of a retired volume, by its id."""
    more_deleted: bool = False
    """Something is left for a later checkpoint to sort out."""
    sorted_out: bool = False
    """And something was sorted out, so the next one may come at once."""

    def count_live(self, addresses: U64, sign: int) -> None:
        """Count each address that lies in a segment as one live block more or less."""
        _count(self.live, addresses, sign)

    def count_pending(self, addresses: U64, sign: int) -> None:
        """The same for overlay entries."""
        _count(self.pending, addresses, sign)

    def root_of(self, owner: Owner) -> tuple[int, int]:
        """The root of a tree as it is by now."""
        return self.roots.get(owner.id, owner.tree.root)

    def mapped_in(self, owner: Owner, difference: int) -> None:
        """So many more blocks with data are named by the tree of `owner`."""
        self.mapped[owner.id] = self.mapped.get(owner.id, owner.tree.mapped_blocks) + difference


def mapped_count(addresses: U64) -> int:
    """How many of these entries have data: not those of holes and of lost blocks."""
    return int(np.count_nonzero(addresses >= np.uint64(FIRST_ADDRESS)))


def _count(counts: dict[int, int], addresses: U64, sign: int) -> None:
    ids, numbers = np.unique(addresses >> np.uint64(SLOT_BITS), return_counts=True)
    for segment_id, number in zip(ids.tolist(), numbers.tolist(), strict=True):
        if segment_id:
            counts[segment_id] += sign * number


def _copied_page(data: memoryview, row: int) -> Page:
    """One page out of many, in memory of its own: a cached page must not keep its neighbours."""
    return page_of(bytes(data[row * BLOCK_BYTES : (row + 1) * BLOCK_BYTES]))


class Merger:
    """The merging of one try of a checkpoint."""

    def __init__(self, engine: "Engine", writer: MapWriter, merge: Merge, kept_ids: U64 | None) -> None:
        self._engine = engine
        self._writer = writer
        self._merge = merge
        self._kept_ids = kept_ids
        """While a device is lost: the segments that are not on it."""
        self._trees: dict[int, MapTree] = {}
        """Trees as an earlier pass has written them."""
        self._changed: dict[int, Owner] = {}
        """Whose trees this pass has changed."""
        self._volumes: dict[int, FrozenVolume] = {}
        """Those that the checkpoint records, also where one is deleted meanwhile: its record may not be durable yet."""
        self._nursery: trio.Nursery

    def close(self) -> None:
        """The try is over."""
        for tree in self._trees.values():
            tree.close()
        self._trees.clear()

    async def run(
        self,
        volumes: list[FrozenVolume],
        relocations: list[tuple[int, Relocation]],
        forced: list[tuple[Snapshot, set[int]]],
    ) -> None:
        """All passes. When this returns the pages of the new trees are written. Raises OSError."""
        self._volumes = {item.volume.id: item for item in volumes}
        by_volume: dict[Volume, list[tuple[int, int, int, int]]] = defaultdict(list)
        for old, moved in relocations:
            by_volume[moved.volume].append((moved.block, old, moved.address, moved.check))
        for volume, rows in by_volume.items():  # a pass each: a volume and its heir share a tree
            await self._pass(partial(self._relocate, volume, rows))
        if forced:

            async def elsewhere() -> None:
                for snapshot, keys in forced:
                    await self._rewrite_forced(snapshot, keys)

            await self._pass(elsewhere)

        async def overlays() -> None:
            for item in volumes:
                if item.overlay is not None or item.forced:
                    await self._merge_volume(item)

        await self._pass(overlays)
        await self._sort_out_deleted()

    async def _pass(self, body: Callable[[], Awaitable[None]]) -> None:
        """Run a pass; what it wrote is on the devices afterwards (but for a flush)."""
        failure: OSError | None = None
        try:
            async with trio.open_nursery() as self._nursery:
                try:
                    await body()
                    await self._writer.settle()
                except OSError as error:
                    failure = error  # raised outside the nursery, which would wrap it in a group
        finally:
            self._writer.settled()
        if failure is not None:
            raise failure
        for owner in self._changed.values():
            former = self._trees.pop(owner.id, None)
            if former is not None:
                former.close()
            engine = self._engine
            self._trees[owner.id] = MapTree(owner.name, engine.segments, engine.cache, self._merge.roots[owner.id])
        self._changed.clear()

    def _tree(self, owner: Owner) -> MapTree:
        return self._trees.get(owner.id, owner.tree)

    # -- overlays --------------------------------------------------------------------------------------------------

    async def _merge_volume(self, item: FrozenVolume) -> None:
        """Work out the new tree of one volume, writing its new pages."""
        volume, merge = item.volume, self._merge
        overlay = item.overlay or Overlay(small=True)
        keys, addresses, checks = await arrays_of(overlay)
        merge.count_pending(addresses, -1)
        forget_patches(overlay, merge)
        tombs, detached = await self._engine.offload(decompose_ranges, overlay)
        keys, addresses, checks = await self._engine.offload(_combine, tombs, keys, addresses, checks)
        forced = _by_level(item.forced)
        merge.inner.setdefault(volume.id, {})
        tree = self._tree(volume)
        leaves = np.unique(keys >> np.uint64(FANOUT_BITS)) if len(keys) else keys
        for more in (forced[0], overlay.patches.keys()):
            if more:
                leaves = np.union1d(leaves, np.fromiter(more, np.uint64, len(more)))
        if not volume.snapshots and not volume.layered:
            if detached:
                merge.detached.add(volume.id)

            async def overwrite(chunk: U64, indices: list[int], matrix: U64) -> None:
                rows, columns, lo, hi = _places(keys, chunk)
                old = matrix[rows, columns]
                matrix[rows, columns] = addresses[lo:hi]
                matrix[rows, FANOUT + columns] = checks[lo:hi]
                merge.count_live(old, -1)
                merge.count_live(addresses[lo:hi], +1)
                merge.mapped_in(volume, mapped_count(addresses[lo:hi]) - mapped_count(old))
                self._apply_patches(volume, overlay.patches, indices, matrix)

            written = await self._rewrite_leaves(volume, tree, leaves, overwrite, detached=detached)
            await self._rewrite_inner(volume, tree, written, forced, detached)
            merge.referenced[volume.id] = merge.mapped.get(volume.id, volume.tree.mapped_blocks)
            return
        trimmed = await self._existing_leaves(volume, detached)
        keeping = _Keeping(self, item, trimmed, (keys, addresses, checks), overlay.patches)
        leaves = np.union1d(leaves, trimmed)
        # A trim of what is trimmed already changes nothing, and takes no pages.
        written = await self._rewrite_leaves(volume, tree, leaves, keeping.edit, always=forced[0])
        await self._rewrite_inner(volume, tree, written, forced, {})
        await keeping.finish()

    async def _existing_leaves(self, volume: Volume, detached: Detached) -> U64:
        """The leaves below these subtrees that the volume has, or the origin under it."""
        if not detached:
            return np.empty(0, np.uint64)
        found = [await leaves_below(self._tree(volume), detached)]
        origin = volume.origin
        while origin is not None:
            found += [await leaves_below(tree, detached) for tree in origin.layers()]
            origin = origin.volume.origin
        return np.unique(np.concatenate(found))

    def _apply_patches(self, volume: Volume, patches: dict[int, Patch], indices: list[int], matrix: U64) -> None:
        """Lay patches over leaf pages, every entry that isn't UNSET, and count."""
        rows = [row for row, index in enumerate(indices) if index in patches]
        if not rows:
            return
        merge = self._merge
        words = np.array([patches[indices[row]] for row in rows], np.uint64)
        says = words[:, :FANOUT] != UNSET
        new = words[:, :FANOUT][says]
        addresses, checks = matrix[rows, :FANOUT], matrix[rows, FANOUT:]
        old = addresses[says]
        addresses[says] = new
        checks[says] = words[:, FANOUT:][says]
        matrix[rows, :FANOUT], matrix[rows, FANOUT:] = addresses, checks
        merge.count_live(old, -1)
        merge.count_live(new, +1)
        merge.mapped_in(volume, mapped_count(new) - mapped_count(old))

    # -- pages, whoever's they are ---------------------------------------------------------------------------------

    async def _rewrite_leaves(
        self,
        owner: Owner,
        tree: MapTree,
        leaves: U64,
        edit: Edit,
        *,
        detached: Detached | None = None,
        always: set[int] | None = None,
    ) -> tuple[U64, U64, U64]:
        """Let `edit` change these leaves (in order) and write them; return what their parents are to say of them.

        `always`: only those that it has changed, and these, are written.
        """
        written = np.ones(len(leaves), bool)
        addresses, checks = np.zeros(len(leaves), np.uint64), np.zeros(len(leaves), np.uint64)
        is_plain = isinstance(owner, Volume) and not owner.snapshots and not owner.layered and tree is owner.tree
        cached = is_plain and tree.holds_leaves(len(leaves))
        for start in range(0, len(leaves), CHUNK_PAGES):
            chunk = leaves[start : start + CHUNK_PAGES]
            indices = chunk.tolist()
            matrix = await base_pages(tree, 0, indices, detached or {})
            before = None if always is None else matrix.copy()
            await edit(chunk, indices, matrix)
            if self._kept_ids is not None:
                self._give_up_lost(owner, matrix)
            places = np.arange(start, start + len(chunk))
            if always is not None:
                part = (matrix != before).any(axis=1) | np.array([index in always for index in indices])
                written[places] = part
                chunk, matrix, places = chunk[part], matrix[part], places[part]
                indices = chunk.tolist()
            kept, data = await self._write(owner, 0, indices, matrix, places, addresses, checks)
            if is_plain:
                _cache_leaves(tree, indices, kept, data, all_of_them=cached)
            else:
                self._merge.stale[owner.id].append(chunk)
            await trio.lowlevel.checkpoint()
        return leaves[written], addresses[written], checks[written]

    async def _rewrite_inner(
        self,
        owner: Owner,
        tree: MapTree,
        written: tuple[U64, U64, U64],
        forced: dict[int, set[int]],
        detached: Detached,
    ) -> None:
        """Put what was written of the leaves into the pages above them, up to a new root."""
        merge = self._merge
        keys, addresses, checks = written
        inner = merge.inner.setdefault(owner.id, {})
        for level in range(1, ROOT_LEVEL + 1):
            pages = np.unique(keys >> np.uint64(FANOUT_BITS)) if len(keys) else keys
            cut = detached.get(level, set())
            more = forced.get(level, set()) | {key >> FANOUT_BITS for key in cut}
            if more:
                pages = np.union1d(pages, np.fromiter(more, np.uint64, len(more)))
            up_addresses, up_checks = np.zeros(len(pages), np.uint64), np.zeros(len(pages), np.uint64)
            for start in range(0, len(pages), CHUNK_PAGES):
                chunk = pages[start : start + CHUNK_PAGES]
                indices = chunk.tolist()
                matrix = await base_pages(tree, level, indices, detached)
                if cut:
                    _detach(owner, level, cut, indices, matrix, merge)
                rows, columns, lo, hi = _places(keys, chunk)
                merge.count_live(matrix[rows, columns], -1)
                merge.count_live(addresses[lo:hi], +1)
                matrix[rows, columns] = addresses[lo:hi]
                matrix[rows, FANOUT + columns] = checks[lo:hi]
                places = np.arange(start, start + len(chunk))
                kept, data = await self._write(owner, level, indices, matrix, places, up_addresses, up_checks)
                for row, index in enumerate(kept):
                    inner[page_key(level, index)] = _copied_page(data, row)
                for index in set(indices).difference(kept):
                    inner[page_key(level, index)] = EMPTY_PAGE
                await trio.lowlevel.checkpoint()
            keys, addresses, checks = pages, up_addresses, up_checks
        if len(keys):
            # Below the root the level above counts its children; nobody is above the root.
            root = (int(addresses[0]), int(checks[0]))
            for (address, _), sign in ((tree.root, -1), (root, +1)):
                if address >= FIRST_ADDRESS:
                    merge.live[address >> SLOT_BITS] += sign
            merge.roots[owner.id] = root
            self._changed[owner.id] = owner

    async def _write(
        self, owner: Owner, level: int, indices: list[int], matrix: U64, places: U64, addresses: U64, checks: U64
    ) -> tuple[list[int], memoryview]:
        """Write those of the pages that aren't empty; note where they are, each at its place in `addresses`."""
        kept = np.flatnonzero(matrix[:, :FANOUT].any(axis=1))
        kept_indices = indices
        if len(kept) < len(indices):
            matrix = matrix[kept]
            kept_indices = [indices[i] for i in kept.tolist()]
        data = memoryview(matrix.reshape(-1)).cast("B") if kept_indices else memoryview(b"")
        found = await self._writer.write(self._nursery, owner.id, level, kept_indices, data)
        addresses[places[kept]] = np.array(found[0], np.uint64)
        checks[places[kept]] = np.array(found[1], np.uint64)
        return kept_indices, data

    def _give_up_lost(self, owner: Owner, matrix: U64) -> None:
        """While a device is lost: leaf entries that name a place on it, or a segment that isn't there, become BAD."""
        assert self._kept_ids is not None
        addresses, checks = matrix[:, :FANOUT], matrix[:, FANOUT:]
        lost = (addresses >= np.uint64(FIRST_ADDRESS)) & ~np.isin(addresses >> np.uint64(SLOT_BITS), self._kept_ids)
        if lost.any():
            self._merge.count_live(addresses[lost], -1)
            self._merge.mapped_in(owner, -int(np.count_nonzero(lost)))
            addresses[lost] = BAD
            checks[lost] = 0
            hit("checkpoint.given_up")

    async def _rewrite_forced(self, snapshot: Snapshot, keys: set[int]) -> None:
        """Write pages of a snapshot's tree elsewhere, as they are."""

        async def as_it_is(chunk: U64, indices: list[int], matrix: U64) -> None:
            pass

        tree = self._tree(snapshot)
        forced = _by_level(keys)
        leaves = np.array(sorted(forced[0]), np.uint64)
        written = await self._rewrite_leaves(snapshot, tree, leaves, as_it_is)
        await self._rewrite_inner(snapshot, tree, written, forced, {})

    # -- relocations -------------------------------------------------------------------------------------------------

    async def _relocate(self, volume: Volume, rows: list[tuple[int, int, int, int]]) -> None:
        """Let whoever names these (block, old address, address, check) name the new places."""
        columns = np.array(sorted(rows), np.uint64)
        self._merge.count_pending(columns[:, 2], -1)
        if volume.id not in self._volumes:
            return  # it was deleted before the freeze
        leaves = columns[:, 0] >> np.uint64(FANOUT_BITS)
        there: dict[int, tuple[Owner, list[int]]] = {}
        for leaf in np.unique(leaves).tolist():
            for owner in self._owners_at(volume, leaf):
                there.setdefault(owner.id, (owner, []))[1].append(leaf)
        left = np.ones(len(columns), bool)
        for owner, indices in there.values():
            rows_there = np.flatnonzero(left & np.isin(leaves, np.array(indices, np.uint64)))
            found = await self._naming(self._tree(owner), columns[rows_there])
            if found.any():
                await self._relocate_in(owner, columns[rows_there[found]])
                left[rows_there[found]] = False
            if not left.any():
                return
        # What is left over was overwritten, or deleted, since: its copies are dead.

    def _owners_at(self, volume: Volume, leaf: int) -> list[Owner]:
        """`Volume.owners_at`, as of the freeze."""
        found: list[Owner] = [volume, *reversed(volume.snapshots_at(leaf))]
        heir = self._volumes[volume.id].heir
        return found if heir is None else [*self._owners_at(heir, leaf), *found]

    async def _naming(self, tree: MapTree, columns: U64) -> U64:
        """Which of these rows (block, old address, ...) have their old address in the tree."""
        found = np.zeros(len(columns), bool)
        if not tree.root[0]:
            return found
        blocks = columns[:, 0]
        leaves = np.unique(blocks >> np.uint64(FANOUT_BITS))
        for start in range(0, len(leaves), CHUNK_PAGES):
            chunk = leaves[start : start + CHUNK_PAGES]
            matrix = await base_pages(tree, 0, chunk.tolist(), {})
            rows, slots, lo, hi = _places(blocks, chunk)
            found[lo:hi] = matrix[rows, slots] == columns[lo:hi, 1]
            await trio.lowlevel.checkpoint()
        return found

    async def _relocate_in(self, owner: Owner, columns: U64) -> None:
        merge = self._merge
        blocks = columns[:, 0]

        async def move(chunk: U64, indices: list[int], matrix: U64) -> None:
            rows, slots, lo, hi = _places(blocks, chunk)
            merge.count_live(matrix[rows, slots], -1)
            matrix[rows, slots] = columns[lo:hi, 2]
            lost = columns[lo:hi, 2] == BAD
            matrix[rows, FANOUT + slots] = np.where(lost, 0, columns[lo:hi, 3])
            merge.count_live(columns[lo:hi, 2], +1)
            merge.mapped_in(owner, -int(np.count_nonzero(lost)))

        tree = self._tree(owner)
        written = await self._rewrite_leaves(owner, tree, np.unique(blocks >> np.uint64(FANOUT_BITS)), move)
        await self._rewrite_inner(owner, tree, written, {}, {})
        hit("checkpoint.relocated")

    # -- deleted snapshots ---------------------------------------------------------------------------------------------

    async def _sort_out_deleted(self) -> None:
        """A slice of the work that deleted snapshots and retired volumes leave, each step in a pass of its own."""
        budget = DELETED_LEAVES
        for volume in [item.volume for item in self._volumes.values()]:
            if not volume.retired and all(snapshot.state == "visible" for snapshot in volume.snapshots):
                continue
            for _ in range(DELETED_SNAPSHOTS):
                if budget <= 0:
                    self._merge.more_deleted = True
                    return
                done = await self._sort_out(volume, max(0, min(budget, self._leaves_that_fit())))
                if done is None:
                    break
                await trio.lowlevel.checkpoint()
                budget -= done + 1
                self._merge.more_deleted = self._merge.sorted_out = True

    def _leaves_that_fit(self) -> int:
        """How many leaves a step may take, so that what it writes leaves enough for the rest of the checkpoint.

        What is written comes back with a later checkpoint, so in a full pool it goes in small steps. None of this may
        make a checkpoint fail: it would fail again and again.
        """
        space, segments = self._engine.space, self._engine.segments
        room = segments.free_slots - space.keep_slots(Kind.MAP) - STEP_SEGMENTS * space.largest_segment_slots
        return (room - STEP_PAGES) // PAGES_A_LEAF

    def _wait_for_room(self, leaves: int) -> bool:
        """Whether not even one leaf can be sorted out now: a later checkpoint will."""
        if leaves <= 0:
            self._merge.more_deleted = True
        return leaves <= 0

    async def _sort_out(self, volume: Volume, budget: int) -> int | None:
        """One step for a volume; returns how many leaves it took, None if there is nothing that can be done."""
        merge = self._merge
        there = [snapshot for snapshot in volume.snapshots if snapshot not in merge.gone]
        for number, snapshot in enumerate(there):
            if snapshot.state == "deleted":
                if number == 0:
                    self._drop(snapshot)  # takes no pages, however little room there is
                    return 0
                return await self._fold(snapshot, there[number - 1], budget)
        for number, snapshot in enumerate(there):
            if (
                snapshot.state == "hidden"
                and (clones := self._clones_of(snapshot))
                and self._may_thin(snapshot, clones)
            ):
                return await self._thin(snapshot, there[number - 1] if number else None, clones, budget)
        if not volume.retired or volume in merge.buried:
            return None
        if not there:
            if self._volumes[volume.id].heir is None and volume.id not in merge.heirs:
                self._drop(volume)
            return None
        if merge.root_of(volume)[0]:
            return await self._fold(volume, there[-1], budget)
        clones = self._clones_of(there[-1])
        if len(there) == 1 and there[0].state == "hidden" and len(clones) == 1:
            return await self._absorb(there[0], clones[0], budget)
        return None

    def _clones_of(self, snapshot: Snapshot) -> list[Volume]:
        volumes = [item.volume for item in self._volumes.values()]
        return [v for v in volumes if self._origin_of(v) is snapshot and v not in self._merge.buried]

    def _may_thin(self, snapshot: Snapshot, clones: list[Volume]) -> bool:
        """Whether clones have made so much their own, or the snapshot has come to keep so much, that a look pays."""
        if snapshot.thinning is not None or snapshot.thinned is None:
            return True
        own, kept = snapshot.thinned
        return self._own_blocks(clones) > own + max(THIN_BLOCKS, own // 8) or (
            snapshot.tree.mapped_blocks > kept + max(THIN_BLOCKS, kept // 8)
        )

    def _own_blocks(self, clones: list[Volume]) -> int:
        return sum(self._merge.mapped.get(clone.id, clone.tree.mapped_blocks) for clone in clones)

    async def _thin(self, snapshot: Snapshot, older: Snapshot | None, clones: list[Volume], budget: int) -> int | None:
        """What none of its clones needs of a hidden snapshot goes to the next older one that has none, or is dead."""
        merge = self._merge
        if self._wait_for_room(budget):
            return None
        start = snapshot.thinning or 0
        leaves = await first_leaves(self._tree(snapshot), budget, start)
        if leaves is None:
            return None
        dropped: dict[int, U64] = {}
        for at in range(0, len(leaves), CHUNK_PAGES):
            indices = leaves[at : at + CHUNK_PAGES].tolist()
            own = (await base_pages(self._tree(snapshot), 0, indices, {}))[:, :FANOUT]
            needed = np.zeros(own.shape, bool)
            for clone in clones:
                needed |= (await base_pages(self._tree(clone), 0, indices, {}))[:, :FANOUT] == 0
                for later in [later for later in clone.snapshots if later not in merge.gone]:
                    needed |= (await base_pages(self._tree(later), 0, indices, {}))[:, :FANOUT] == INHERITED
            drop = (own != 0) & ~needed
            dropped.update((index, drop[row]) for row, index in enumerate(indices) if drop[row].any())
            await trio.lowlevel.checkpoint()
        if dropped:
            touched = np.array(sorted(dropped), np.uint64)

            async def drop_them(chunk: U64, indices: list[int], matrix: U64) -> None:
                drop = np.array([dropped[index] for index in indices])
                addresses, checks = matrix[:, :FANOUT], matrix[:, FANOUT:]
                merge.mapped_in(snapshot, -mapped_count(addresses[drop]))
                if older is None:
                    merge.count_live(addresses[drop], -1)
                addresses[drop] = checks[drop] = 0

            async def take(chunk: U64, indices: list[int], matrix: U64) -> None:
                drop = np.array([dropped[index] for index in indices])
                more = await base_pages(self._tree(snapshot), 0, indices, {})
                addresses, checks = matrix[:, :FANOUT], matrix[:, FANOUT:]
                taken = drop & (addresses == 0)
                merge.count_live(more[:, :FANOUT][drop & ~taken], -1)
                addresses[taken], checks[taken] = more[:, :FANOUT][taken], more[:, FANOUT:][taken]
                merge.mapped_in(_owner(older), mapped_count(addresses[taken]))

            async def body() -> None:
                for owner, edit in ((older, take), (snapshot, drop_them)):
                    if owner is not None:
                        tree = self._tree(owner)
                        written = await self._rewrite_leaves(owner, tree, touched, edit)
                        await self._rewrite_inner(owner, tree, written, {}, {})

            await self._pass(body)
            hit("checkpoint.thinned")
        if len(leaves) < budget:
            snapshot.thinning = None
            kept = merge.mapped.get(snapshot.id, snapshot.tree.mapped_blocks)
            snapshot.thinned = self._own_blocks(clones), kept
        else:
            snapshot.thinning = int(leaves[-1]) + 1
        return len(leaves)

    def _origin_of(self, volume: Volume) -> Snapshot | None:
        return self._merge.origins.get(volume.id, volume.origin)

    def _drop(self, owner: Owner) -> None:
        """Nobody sees any of it: the whole tree goes on the dead list."""
        merge = self._merge
        address, check = merge.root_of(owner)
        if address >= FIRST_ADDRESS:
            merge.dead[address] = (check, ROOT_LEVEL, owner.id)
        merge.mapped.pop(owner.id, None)
        if isinstance(owner, Snapshot):
            merge.gone.add(owner)
        else:
            merge.buried.append(owner)
            merge.more_deleted = merge.sorted_out = True  # another may have had it as its heir
        hit("checkpoint.dropped")

    async def _fold(self, source: Owner, target: Snapshot, budget: int) -> int | None:
        """Move entries of `source` to the next older snapshot, where that has none; the others are dead."""
        merge = self._merge
        if self._wait_for_room(budget):
            return None
        leaves = await first_leaves(self._tree(source), budget)
        if leaves is None:
            return None  # pages above some were lost with a device, so what lies below isn't known: it stays as it is
        if len(leaves):

            async def take(chunk: U64, indices: list[int], matrix: U64) -> None:
                from_source = await base_pages(self._tree(source), 0, indices, {})
                more, more_checks = from_source[:, :FANOUT], from_source[:, FANOUT:]
                addresses, checks = matrix[:, :FANOUT], matrix[:, FANOUT:]
                taken = (addresses == 0) & (more != 0)
                merge.count_live(more[(addresses != 0) & (more != 0)], -1)
                addresses[taken], checks[taken] = more[taken], more_checks[taken]
                merge.mapped_in(target, mapped_count(more[taken]))
                merge.mapped_in(source, -mapped_count(more))

            await self._move_leaves(source, leaves, [(target, leaves, take)])
            hit("checkpoint.folded")
        if isinstance(source, Snapshot) and not merge.root_of(source)[0]:
            merge.mapped.pop(source.id, None)
            merge.gone.add(source)
        return len(leaves)

    async def _absorb(self, source: Snapshot, clone: Volume, budget: int) -> int | None:
        """Nobody but one clone sees a snapshot: what it keeps becomes the clone's own, or its snapshots'."""
        merge = self._merge
        # Each of a leaf's blocks may go to another of these, with all the pages above it.
        targets = min(FANOUT, sum(snapshot not in merge.gone for snapshot in clone.snapshots))
        budget = budget * PAGES_A_LEAF // (PAGES_A_LEAF + (ROOT_LEVEL + 1) * targets)
        if self._wait_for_room(budget):
            return None
        leaves = await first_leaves(self._tree(source), budget)
        if leaves is None:
            return None  # pages above some were lost with a device, so what lies below isn't known: it stays as it is
        merge.heirs[source.volume.id] = clone
        if len(leaves):
            wanted: dict[int, tuple[Snapshot, list[U64]]] = {}

            async def take(chunk: U64, indices: list[int], matrix: U64) -> None:
                from_source = await base_pages(self._tree(source), 0, indices, {})
                more, more_checks = from_source[:, :FANOUT], from_source[:, FANOUT:]
                addresses, checks = matrix[:, :FANOUT], matrix[:, FANOUT:]
                merge.mapped_in(source, -mapped_count(more))
                # INHERITED: what the origin of the snapshot's volume has, which is about to be the clone's origin.
                left = (more != 0) & (more != INHERITED)
                # First those that say so. (A retired clone's own map may have moved to its snapshots already.)
                for snapshot in [snapshot for snapshot in clone.snapshots if snapshot not in merge.gone]:
                    kept = await base_pages(self._tree(snapshot), 0, indices, {})
                    inherits = left & (kept[:, :FANOUT] == INHERITED)
                    if inherits.any():
                        rows, slots = np.nonzero(inherits)
                        found = np.stack(
                            [
                                chunk[rows] << np.uint64(FANOUT_BITS) | slots.astype(np.uint64),
                                more[inherits],
                                more_checks[inherits],
                            ],
                            axis=1,
                        )
                        wanted.setdefault(snapshot.id, (snapshot, []))[1].append(found)
                        left &= ~inherits
                taken = left & (addresses == 0)
                addresses[taken], checks[taken] = more[taken], more_checks[taken]
                merge.mapped_in(clone, mapped_count(more[taken]))
                merge.count_live(more[left & ~taken], -1)

            await self._move_leaves(source, leaves, [(clone, leaves, take)])

            async def inherit() -> None:
                for snapshot, parts in wanted.values():
                    columns = np.concatenate(parts)

                    async def put(chunk: U64, indices: list[int], matrix: U64) -> None:
                        rows, slots, lo, hi = _places(columns[:, 0], chunk)  # noqa: B023
                        matrix[rows, slots] = columns[lo:hi, 1]  # noqa: B023
                        matrix[rows, FANOUT + slots] = columns[lo:hi, 2]  # noqa: B023
                        merge.mapped_in(snapshot, mapped_count(columns[lo:hi, 1]))  # noqa: B023

                    tree = self._tree(snapshot)
                    indices = np.unique(columns[:, 0] >> np.uint64(FANOUT_BITS))
                    await self._rewrite_inner(
                        snapshot, tree, await self._rewrite_leaves(snapshot, tree, indices, put), {}, {}
                    )

            await self._pass(inherit)
            hit("checkpoint.absorbed")
        if not merge.root_of(source)[0]:
            merge.origins[clone.id] = self._origin_of(source.volume)
            merge.origins[source.volume.id] = None  # it has nothing left to be read, and stays only for its heir's sake
            merge.mapped.pop(source.id, None)
            merge.gone.add(source)
        return len(leaves)

    async def _move_leaves(self, source: Owner, leaves: U64, targets: list[tuple[Owner, U64, Edit]]) -> None:
        """Let the targets take what these leaves of `source` hold, and take the leaves out of it."""

        async def body() -> None:
            for target, indices, edit in targets:
                tree = self._tree(target)
                await self._rewrite_inner(target, tree, await self._rewrite_leaves(target, tree, indices, edit), {}, {})
            nothing = np.zeros(len(leaves), np.uint64)
            self._merge.stale[source.id].append(leaves)
            await self._rewrite_inner(source, self._tree(source), (leaves, nothing, nothing), {}, {})

        await self._pass(body)


class _Keeping:
    """The merging of an overlay into the map of a volume that has snapshots, or an origin."""

    def __init__(
        self, merger: Merger, item: FrozenVolume, trimmed: U64, points: tuple[U64, U64, U64], patches: dict[int, Patch]
    ) -> None:
        self._merger = merger
        self._merge = merger._merge
        self._volume = item.volume
        self._keeper = item.keeper
        self._blockers = item.blockers
        self._trimmed = trimmed
        self._keys, self._addresses, self._checks = points
        self._patches = patches
        self._written: list[tuple[U64, U64, U64]] = []
        """What was written of the keeper's leaves."""
        self._merge.referenced[self._volume.id] = self._volume.referenced_blocks

    async def edit(self, chunk: U64, indices: list[int], matrix: U64) -> None:
        """Change a chunk of the volume's leaves, and put what they held into the keeper's."""
        merge, volume = self._merge, self._volume
        addresses, checks = matrix[:, :FANOUT], matrix[:, FANOUT:]
        old, old_checks = addresses.copy(), checks.copy()
        said = np.zeros(addresses.shape, bool)
        trimmed = np.isin(chunk, self._trimmed)
        said[trimmed] = True
        addresses[trimmed] = checks[trimmed] = 0
        rows, columns, lo, hi = _places(self._keys, chunk)
        said[rows, columns] = True
        addresses[rows, columns] = self._addresses[lo:hi]
        checks[rows, columns] = self._checks[lo:hi]
        for row, index in enumerate(indices):
            patch = self._patches.get(index)
            if patch is not None:
                words = np.array(patch, np.uint64)
                says = words[:FANOUT] != UNSET
                said[row] |= says
                addresses[row][says] = words[:FANOUT][says]
                checks[row][says] = words[FANOUT:][says]
        below = np.zeros(addresses.shape, bool)
        """Where the origin has data, or has lost some."""
        data_below = np.zeros(addresses.shape, bool)
        if volume.origin is not None:
            for row, index in enumerate(indices):
                page = await volume.origin.leaf(index)
                if page is not EMPTY_PAGE:
                    # What is lost there must stay in sight, like data; only it doesn't count as data.
                    words = np.frombuffer(page, np.uint64)[:FANOUT]
                    below[row] = words != 0
                    data_below[row] = words >= FIRST_ADDRESS
            # What was its own once never becomes nothing again: a snapshot may say INHERITED there, and only one entry
            # can take over what the origin has (`_absorb`).
            zeroed = said & (addresses == 0) & (below | (old != 0))
            addresses[zeroed] = ZEROED
        changed = addresses != old
        data_before = np.where(old == 0, data_below, old >= FIRST_ADDRESS)
        merge.referenced[volume.id] += int(np.count_nonzero(changed & (addresses >= FIRST_ADDRESS)))
        merge.referenced[volume.id] -= int(np.count_nonzero(changed & data_before))
        merge.mapped_in(volume, mapped_count(addresses[changed]) - mapped_count(old[changed]))
        merge.count_live(addresses[changed], +1)
        if self._keeper is None:
            merge.count_live(old[changed], -1)
        else:
            await self._keep(self._keeper, indices, changed, old, old_checks)

    async def _keep(self, keeper: Snapshot, indices: list[int], changed: U64, old: U64, old_checks: U64) -> None:
        merger, merge = self._merger, self._merge
        matrix = await base_pages(merger._tree(keeper), 0, indices, {})
        kept, kept_checks = matrix[:, :FANOUT], matrix[:, FANOUT:]
        hidden = kept != 0
        for blocker in self._blockers:
            hidden |= (await base_pages(merger._tree(blocker), 0, indices, {}))[:, :FANOUT] != 0
        merge.count_live(old[changed & hidden], -1)
        push = changed & ~hidden
        # Nothing there was zeros, or what the origin has: the volume is about to say something else.
        nothing = ZEROED if self._volume.origin is None else INHERITED
        kept[push] = np.where(old[push] == 0, np.uint64(nothing), old[push])
        kept_checks[push] = old_checks[push]
        merge.mapped_in(keeper, mapped_count(old[push]))
        rows = np.flatnonzero(push.any(axis=1))
        if len(rows):
            chosen = [indices[row] for row in rows.tolist()]
            part = matrix[rows]
            addresses, checks = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.uint64)
            if merger._kept_ids is not None:
                merger._give_up_lost(keeper, part)
            await merger._write(keeper, 0, chosen, part, np.arange(len(rows)), addresses, checks)
            self._written.append((np.array(chosen, np.uint64), addresses, checks))

    async def finish(self) -> None:
        """Write the keeper's pages above its leaves."""
        if self._keeper is not None and self._written:
            written = tuple(np.concatenate(column) for column in zip(*self._written, strict=True))
            leaves, addresses, checks = written
            self._merge.stale[self._keeper.id].append(leaves)
            tree = self._merger._tree(self._keeper)
            await self._merger._rewrite_inner(self._keeper, tree, (leaves, addresses, checks), {}, {})
            hit("checkpoint.kept")


# -- pages and places --------------------------------------------------------------------------------------------------


def _places(keys: U64, chunk: U64) -> tuple[U64, U64, int, int]:
    """Rows and columns, within the pages `chunk`, of those sorted keys that lie in them, which are keys[lo:hi]."""
    lo = int(np.searchsorted(keys, chunk[0] << np.uint64(FANOUT_BITS)))
    hi = int(np.searchsorted(keys, (chunk[-1] + np.uint64(1)) << np.uint64(FANOUT_BITS)))
    rows = np.searchsorted(chunk, keys[lo:hi] >> np.uint64(FANOUT_BITS))
    return rows, (keys[lo:hi] & np.uint64(FANOUT_MASK)).astype(np.int64), lo, hi


def _by_level(keys: Iterable[int]) -> dict[int, set[int]]:
    levels: dict[int, set[int]] = defaultdict(set)
    for key in keys:
        levels[key >> LEVEL_SHIFT].add(key & ((1 << LEVEL_SHIFT) - 1))
    return levels


async def base_pages(tree: MapTree, level: int, indices: list[int], detached: Detached) -> U64:
    """The present pages as a matrix of 512 columns; zeros for holes and for what a trim detached."""
    matrix = np.zeros((len(indices), 2 * FANOUT), np.uint64)
    if not tree.root[0]:
        return matrix
    wanted = indices
    if detached:
        wanted = [i for i in indices if not _is_detached(level, i, detached)]
    pages = await tree.load(level, wanted)
    for row, index in enumerate(indices):
        page = pages.get(index, EMPTY_PAGE)
        if page is not EMPTY_PAGE:
            matrix[row] = page
    return matrix


def _cache_leaves(tree: MapTree, indices: list[int], kept: list[int], data: memoryview, *, all_of_them: bool) -> None:
    """Cache new leaves at once (the frozen overlay agrees with them), or only those whose old version is cached."""
    for row, index in enumerate(kept):
        if all_of_them or tree.has_leaf(index):
            tree.replace_page(0, index, _copied_page(data, row))
    if len(kept) < len(indices):
        for index in set(indices).difference(kept):
            tree.replace_page(0, index, EMPTY_PAGE)


async def leaves_below(tree: MapTree, detached: Detached) -> U64:
    """The leaves that a tree has in these subtrees (entries of pages by their level), in order.

    What lies below lost pages is left out.
    """
    found = [np.empty(0, np.uint64)]
    if tree.root[0] < FIRST_ADDRESS:
        return found[0]
    for level, children in detached.items():
        wanted = np.array(sorted(children), np.uint64)
        parents = np.unique(wanted >> np.uint64(FANOUT_BITS))
        for start in range(0, len(parents), CHUNK_PAGES):
            chunk = parents[start : start + CHUNK_PAGES]
            pages = await tree.load(level, chunk.tolist())
            there = [_children(pages[index], index) for index in chunk.tolist()]
            below = np.intersect1d(np.concatenate(there), wanted)
            for lower in range(level - 1, 0, -1):
                below = await _descend(tree, lower, below)
            found.append(below)
            await trio.lowlevel.checkpoint()
    return np.unique(np.concatenate(found))


async def _descend(tree: MapTree, level: int, indices: U64) -> U64:
    below = [np.empty(0, np.uint64)]
    for start in range(0, len(indices), CHUNK_PAGES):
        chunk = indices[start : start + CHUNK_PAGES].tolist()
        pages = await tree.load(level, chunk)
        below += [_children(pages[index], index) for index in chunk]
        await trio.lowlevel.checkpoint()
    return np.concatenate(below)


def _children(page: Page, index: int) -> U64:
    """The indices of the pages below an inner one."""
    slots = np.flatnonzero(np.frombuffer(page, np.uint64)[:FANOUT] >= np.uint64(FIRST_ADDRESS))
    return np.uint64(index << FANOUT_BITS) | slots.astype(np.uint64)


def _owner(snapshot: Snapshot | None) -> Snapshot:
    assert snapshot is not None
    return snapshot


async def first_leaves(tree: MapTree, most: int, start: int = 0) -> U64 | None:
    """The first leaves of a tree from `start` on, at most so many; None if pages above some of them are lost."""
    if not tree.root[0]:
        return np.empty(0, np.uint64)
    if tree.root[0] < FIRST_ADDRESS:
        return None
    level, indices = ROOT_LEVEL, np.zeros(1, np.uint64)
    while level:
        # Each page of this level leads to at least one leaf, but for the first: to one from `start` on.
        indices = indices[: most + 1]
        pages = await tree.load(level, indices.tolist())
        if any(page is BAD_PAGE or BAD in page[:FANOUT].tolist() for page in pages.values()):
            return None
        indices = np.concatenate([_children(pages[index], index) for index in indices.tolist()])
        level -= 1
        indices = indices[indices >= np.uint64(start >> FANOUT_BITS * level)]
        if not len(indices):
            break
        await trio.lowlevel.checkpoint()
    return indices[:most]


def _detach(owner: Owner, level: int, cut: set[int], indices: list[int], matrix: U64, merge: Merge) -> None:
    """Zero the entries of detached subtrees; their roots go on the dead list."""
    rows = {index: row for row, index in enumerate(indices)}
    for key in cut:
        row = rows.get(key >> FANOUT_BITS)
        if row is not None:
            column = key & FANOUT_MASK
            address = int(matrix[row, column])
            if address >= FIRST_ADDRESS:
                merge.dead[address] = (int(matrix[row, FANOUT + column]), level - 1, owner.id)
                hit("checkpoint.detached")
            matrix[row, column] = matrix[row, FANOUT + column] = 0


def _is_detached(level: int, index: int, detached: Detached) -> bool:
    """Whether a page lies in a subtree that is being detached.

    Entries of level j are children, pages of level j - 1.
    """
    return any(
        (index >> FANOUT_BITS * (upper - 1 - level)) in keys for upper, keys in detached.items() if upper > level
    )


# -- overlays as arrays ------------------------------------------------------------------------------------------------


def forget_patches(overlay: Overlay, merge: Merge) -> None:
    """The entries of a frozen overlay's patches cease to be pending."""
    patches = list(overlay.patches.values())
    for start in range(0, len(patches), CHUNK_PAGES):
        words = np.array(patches[start : start + CHUNK_PAGES], np.uint64)
        merge.count_pending(words[:, :FANOUT].ravel(), -1)


def decompose_ranges(overlay: Overlay) -> tuple[U64, Detached]:
    """Split unmapped ranges by what of the tree they cover: single blocks, and whole subtrees by level.

    Returns the blocks (sorted, none twice) and, for each level from 1 up, the entries (child indices) to be detached
    in pages of that level.
    """
    singles: list[U64] = []
    detached: Detached = {}
    for start, end in zip(overlay.ranges.starts, overlay.ranges.ends, strict=True):
        level = 0
        while start < end:
            lower, upper = -(-start // FANOUT) * FANOUT, end // FANOUT * FANOUT
            if lower >= upper or level == ROOT_LEVEL:
                edges = [(start, end)]
                start = end = 0
            else:
                edges = [(start, lower), (upper, end)]
                start, end = lower >> FANOUT_BITS, upper >> FANOUT_BITS
            for lo, hi in edges:
                if level == 0:
                    singles.append(np.arange(lo, hi, dtype=np.uint64))
                elif lo < hi:
                    detached.setdefault(level, set()).update(range(lo, hi))
            level += 1
    return (np.concatenate(singles) if singles else np.empty(0, np.uint64)), detached


async def arrays_of(overlay: Overlay) -> tuple[U64, U64, U64]:
    """The points of a frozen overlay as arrays, taken in slices so that the loop goes on."""
    count = len(overlay.points)
    keys = np.empty(count, np.uint64)
    entries = np.empty((count, 2), np.uint64)
    source = iter(overlay.points.items())
    at = 0
    while at < count:
        part = list(itertools.islice(source, SLICE_ENTRIES))
        keys[at : at + len(part)] = np.fromiter((key for key, _ in part), np.uint64, len(part))
        flat = itertools.chain.from_iterable(entry for _, entry in part)
        entries[at : at + len(part)] = np.fromiter(flat, np.uint64, 2 * len(part)).reshape(-1, 2)
        at += len(part)
        await trio.lowlevel.checkpoint()
    return keys, entries[:, 0], entries[:, 1]


def _combine(tombs: U64, keys: U64, addresses: U64, checks: U64) -> tuple[U64, U64, U64]:
    """Sort the points, with zero entries for the tombs that no point overrides. Runs in a worker."""
    if len(tombs):
        tombs = tombs[~np.isin(tombs, keys)]
        zeros = np.zeros(len(tombs), np.uint64)
        keys = np.concatenate([keys, tombs])
        addresses = np.concatenate([addresses, zeros])
        checks = np.concatenate([checks, zeros])
    order = np.argsort(keys, kind="stable")
    return keys[order], addresses[order], checks[order]
