"""The checkpoint: turns what the log has done since the last one into map pages, and commits that as one transaction.

1. Freeze, without a checkpoint of trio in between: the log's sequence and position, and every volume's overlay.
2. For each volume, merge the frozen overlay into copies of the pages it touches, level by level up to the root, in
   chunks of 256 pages. Readers go on with the frozen overlay over the old tree.
3. Flush: everything that the new trees point to is durable.
4. Commit the catalog.
5. Without a checkpoint in between: switch the roots, drop the frozen overlays, apply the counts, free the segments
   that nothing needs any more.

A crash before 4 leaves the old checkpoint and the log after it; after 4, the new one. A failure at any step leaves the
frozen state as it is, and the next try starts again from the old trees with the same frozen state. Counts change only
at 5, so a failed try costs nothing but dead slots.

Trimmed ranges detach whole subtrees: their root pages go on the dead list, which is part of the checkpoint, and are
walked afterwards in slices to give back what lies below. So trimming terabytes costs as much as trimming a block.
"""

import errno
import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import trio

from tiers.catalog import Change, DeadRow, DeviceRow, Position, SegmentRow, VolumeRow
from tiers.maptree import (
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
    read_pages,
)
from tiers.mapwriter import MapWriter
from tiers.overlay import UNSET, Overlay, Patch
from tiers.segments import Segment
from tiers.volume import Volume

if TYPE_CHECKING:
    from tiers.engine import Engine

logger = logging.getLogger(__name__)

U64 = Any
"""A NumPy array of uint64."""

CHUNK_PAGES = 256
SLICE_ENTRIES = 4096
DEAD_PAGES_A_CHECKPOINT = 8192
RETRY_S = 1.0
MAX_FAILURES = 3


@dataclass
class FrozenVolume:
    """One volume at the moment of the freeze."""

    volume: Volume
    size_bytes: int
    overlay: Overlay | None
    forced: set[int]


@dataclass
class Frozen:
    """The moment that a checkpoint records."""

    seq: int
    log_segment: int
    log_slot: int
    log_prev_check: int
    log_mark: int
    next_volume_id: int
    volumes: list[FrozenVolume]
    graveyard: list[Volume]
    log_was_broken: bool


@dataclass
class Merge:
    """What a try has worked out so far; takes effect at the commit."""

    live: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    pending: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    dead: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """Subtrees that come on the dead list."""
    dead_removed: list[int] = field(default_factory=list)
    roots: dict[int, tuple[int, int]] = field(default_factory=dict)
    mapped: dict[int, int] = field(default_factory=dict)
    inner: dict[int, dict[int, Page]] = field(default_factory=dict)
    detached: set[int] = field(default_factory=set)

    def count_live(self, addresses: U64, sign: int) -> None:
        """Count each address that lies in a segment as one live block more or less."""
        _count(self.live, addresses, sign)

    def count_pending(self, addresses: U64, sign: int) -> None:
        """The same for overlay entries."""
        _count(self.pending, addresses, sign)


def _count(counts: dict[int, int], addresses: U64, sign: int) -> None:
    ids, numbers = np.unique(addresses >> np.uint64(24), return_counts=True)
    for segment_id, number in zip(ids.tolist(), numbers.tolist(), strict=True):
        if segment_id:
            counts[segment_id] += sign * number


class Checkpointer:
    """Runs the checkpoints of one pool, one at a time."""

    def __init__(self, engine: "Engine") -> None:
        self.writer = MapWriter(engine)
        self.count = 0
        self.failure: str | None = None
        self._engine = engine
        self._lock = trio.Lock()
        self._frozen: Frozen | None = None
        self._begun = 0
        self._committed = 0
        self._last_seq = -1
        self._failures = 0
        self._taken_changes: set[int] = set()

    async def run(self) -> None:
        """The task: a checkpoint when one is asked for, and at the interval while there is something to record."""
        engine = self._engine
        while True:
            with trio.move_on_after(engine.settings.checkpoint_interval_s):
                await engine.space.kick_checkpoint.wait()
            engine.space.kick_checkpoint = trio.Event()
            if not self.needed():
                engine.space.changed()
                continue
            try:
                await self.checkpoint()
            except OSError as error:
                logger.error("checkpoint of pool %s: %s", engine.pool_name, error)
                self._judge_failure(error)
                engine.space.changed()
                await trio.sleep(RETRY_S)
                engine.space.kick_checkpoint.set()

    def _judge_failure(self, error: OSError) -> None:
        """Decide what writers get: a full disk may be emptied, but what fails again and again ends in read-only."""
        space = self._engine.space
        if error.errno == errno.ENOSPC or space.read_only is not None:
            return
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            space.read_only = (
                f"the pool {self._engine.pool_name} takes no writes, since its checkpoints fail: {error}; "
                "mend that and restart"
            )
            logger.error("%s", space.read_only)

    def needed(self) -> bool:
        """Whether a checkpoint would record anything or free any segment."""
        engine = self._engine
        if engine.space.read_only is not None:
            return False
        return bool(
            self._frozen is not None
            or engine.log.seq != self._last_seq
            or engine.log.broken
            or engine.graveyard
            or engine.dead
            or engine.forced
            or any(_is_free(segment, self._last_seq) for segment in engine.segments.idle())
        )

    async def checkpoint(self) -> None:
        """Commit a checkpoint that begins after this call. Raises TierError if it can't be."""
        ticket = self._begun
        async with self._lock:
            if self._committed > ticket:
                return
            self._engine.space.require_writable()
            # A frozen state that an earlier failure left is committed first; it may be older than this call.
            retry = self._frozen is not None
            await self._attempt()
            if retry:
                await self._attempt()

    @property
    def burying(self) -> bool:
        """Whether the checkpoint that is under way gives up the map of a volume."""
        return self._frozen is not None and bool(self._frozen.graveyard)

    async def hold(self) -> None:
        """Keep checkpoints from happening until `let_go`: the roots, and what they point to, stay."""
        await self._lock.acquire()

    def let_go(self) -> None:
        """End a `hold`."""
        self._lock.release()

    async def _attempt(self) -> None:
        self.writer.begin()
        if self._frozen is None:
            self._begun += 1
            try:
                self._frozen = self._freeze()
            except OSError as error:
                self._failed(error)
                raise
        frozen = self._frozen
        merge = Merge()
        self._taken_changes = set()
        for item in frozen.volumes:
            item.volume.tree.loaded = set()
            merge.mapped[item.volume.id] = item.volume.tree.mapped_blocks
        committing = False
        try:
            for item in frozen.volumes:
                if item.overlay is not None or item.forced:
                    await self._merge_volume(item, merge)
            for volume in frozen.graveyard:
                await self._bury(volume, merge)
            await self._walk_dead(merge)
            await self._engine.flusher.flush()
            change = self._change(frozen, merge)
            committing = True
            with trio.CancelScope(shield=True):
                await self._engine.offload(self._engine.catalog.commit, change)
        except BaseException as error:
            for item in frozen.volumes:
                item.volume.tree.forget()
            self._engine.segments.changed |= self._taken_changes
            self._engine.space.kick_checkpoint.set()
            if not committing or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
                # Surely not committed. After another failure of a commit it isn't certain: its pages stay.
                self.writer.give_up()
            if isinstance(error, OSError):
                self._failed(error)
            raise
        self._committed = self._begun
        await self._apply(frozen, merge, change)

    def _failed(self, error: OSError) -> None:
        self.failure = str(error)
        self._engine.space.checkpoint_failure = error

    def _freeze(self) -> Frozen:
        """Take the moment. No checkpoint of trio in here."""
        engine = self._engine
        log = engine.log
        was_broken = log.broken
        if was_broken and log.head.used > 1:
            # What follows the failed write can't be found from the log: the new head must be in the catalog.
            left = log.head
            log.start()
            left.open = False
        # A sequence of its own: no two checkpoints have the same, so an older catalog is always told from a newer one.
        log.seq += 1
        volumes = []
        for volume in engine.volumes.values():
            overlay = None
            if volume.active:
                overlay, volume.active = volume.active, volume.new_overlay()
                volume.frozen = overlay
            volumes.append(FrozenVolume(volume, volume.size_bytes, overlay, engine.forced.pop(volume.id, set())))
        engine.forced.clear()
        graveyard, engine.graveyard = engine.graveyard, []
        space = engine.space
        space.frozen_weight, space.active_weight = space.active_weight, 0
        space.frozen_charge, space.active_charge = space.active_charge, 0
        return Frozen(
            log.seq,
            log.head.id,
            log.head.used,
            log.prev_check,
            log.appended_bytes,
            engine.next_volume_id,
            volumes,
            graveyard,
            was_broken,
        )

    # -- merging -------------------------------------------------------------------------------------------------

    async def _merge_volume(self, item: FrozenVolume, merge: Merge) -> None:
        """Work out the new tree of one volume, writing its new pages."""
        volume = item.volume
        overlay = item.overlay or Overlay(small=True)
        keys, addresses, checks = await _arrays_of(overlay)
        merge.count_pending(addresses, -1)
        self._forget_patches(overlay, merge)
        tombs, detached = await self._engine.offload(decompose_ranges, overlay)
        if detached:
            merge.detached.add(volume.id)
        keys, addresses, checks = await self._engine.offload(_combine, tombs, keys, addresses, checks)
        forced: dict[int, set[int]] = defaultdict(set)
        for key in item.forced:
            forced[key >> LEVEL_SHIFT].add(key & ((1 << LEVEL_SHIFT) - 1))
        merge.inner[volume.id] = {}
        for level in range(ROOT_LEVEL + 1):
            patches = overlay.patches if level == 0 else {}
            keys, addresses, checks = await self._merge_level(
                volume, level, keys, addresses, checks, patches, detached, forced[level], merge
            )
        old_root = volume.tree.root
        if len(keys):
            root = (int(addresses[0]), int(checks[0]))
            if old_root[0]:
                merge.live[old_root[0] >> 24] -= 1
            merge.roots[volume.id] = root

    async def _merge_level(
        self,
        volume: Volume,
        level: int,
        keys: U64,
        addresses: U64,
        checks: U64,
        patches: dict[int, Patch],
        detached: dict[int, set[int]],
        forced: set[int],
        merge: Merge,
    ) -> tuple[U64, U64, U64]:
        """Apply sorted updates, then patches, to the pages of one level; return the updates for the level above."""
        indices = np.unique(keys >> np.uint64(FANOUT_BITS)) if len(keys) else keys
        cut = detached.get(level, set()) if level else set()
        more = forced | {key >> FANOUT_BITS for key in cut} | patches.keys()
        if more:
            indices = np.union1d(indices, np.fromiter(more, np.uint64, len(more)))
        up_keys: list[int] = []
        up_entries: list[tuple[int, int]] = []
        for start in range(0, len(indices), CHUNK_PAGES):
            chunk = indices[start : start + CHUNK_PAGES]
            lo = int(np.searchsorted(keys, chunk[0] << np.uint64(FANOUT_BITS)))
            hi = int(np.searchsorted(keys, (chunk[-1] + np.uint64(1)) << np.uint64(FANOUT_BITS)))
            page_indices = chunk.tolist()
            matrix = await self._base_pages(volume.tree, level, page_indices, detached)
            if cut:
                self._detach(volume, level, cut, page_indices, matrix, merge)
            rows = np.searchsorted(chunk, keys[lo:hi] >> np.uint64(FANOUT_BITS))
            columns = (keys[lo:hi] & np.uint64(FANOUT_MASK)).astype(np.int64)
            old = matrix[rows, columns]
            matrix[rows, columns] = addresses[lo:hi]
            matrix[rows, FANOUT + columns] = checks[lo:hi]
            merge.count_live(old, -1)
            merge.count_live(addresses[lo:hi], +1)
            if level == 0:
                merge.mapped[volume.id] += int(np.count_nonzero(addresses[lo:hi])) - int(np.count_nonzero(old))
            if patches:
                self._apply_patches(volume, patches, page_indices, matrix, merge)
            kept = [i for i, used in enumerate(matrix[:, :FANOUT].any(axis=1).tolist()) if used]
            pages = [matrix[i].tobytes() for i in kept]
            for i in set(range(len(page_indices))).difference(kept):
                self._remember(volume, level, page_indices[i], EMPTY_PAGE, merge)
            entries = await self._write_pages(volume, level, [page_indices[i] for i in kept], pages, merge)
            up_keys += page_indices
            found = dict(zip(kept, entries, strict=True))
            up_entries += [found.get(i, (0, 0)) for i in range(len(page_indices))]
            await trio.lowlevel.checkpoint()
        flat = np.fromiter(itertools.chain.from_iterable(up_entries), np.uint64, 2 * len(up_entries)).reshape(-1, 2)
        return np.array(up_keys, np.uint64), flat[:, 0], flat[:, 1]

    async def _base_pages(self, tree: MapTree, level: int, indices: list[int], detached: dict[int, set[int]]) -> U64:
        """The present pages as a matrix of 512 columns; zeros for holes and for what a trim detached."""
        wanted = indices
        if detached:
            wanted = [i for i in indices if not _is_detached(level, i, detached)]
        pages = await tree.load(level, wanted)
        matrix = np.zeros((len(indices), 2 * FANOUT), np.uint64)
        for row, index in enumerate(indices):
            page = pages.get(index, EMPTY_PAGE)
            if page is not EMPTY_PAGE:
                matrix[row] = page
        return matrix

    @staticmethod
    def _forget_patches(overlay: Overlay, merge: Merge) -> None:
        """The entries of a frozen overlay's patches cease to be pending."""
        patches = list(overlay.patches.values())
        for start in range(0, len(patches), CHUNK_PAGES):
            words = np.array(patches[start : start + CHUNK_PAGES], np.uint64)
            merge.count_pending(words[:, :FANOUT].ravel(), -1)

    @staticmethod
    def _apply_patches(
        volume: Volume, patches: dict[int, Patch], indices: list[int], matrix: U64, merge: Merge
    ) -> None:
        """Lay patches over leaf pages: every entry that isn't UNSET."""
        rows = [row for row, index in enumerate(indices) if index in patches]
        if not rows:
            return
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
        merge.mapped[volume.id] += int(np.count_nonzero(new)) - int(np.count_nonzero(old))

    @staticmethod
    def _detach(volume: Volume, level: int, cut: set[int], indices: list[int], matrix: U64, merge: Merge) -> None:
        """Zero the entries of detached subtrees; their roots go on the dead list."""
        rows = {index: row for row, index in enumerate(indices)}
        for key in cut:
            row = rows.get(key >> FANOUT_BITS)
            if row is not None:
                column = key & FANOUT_MASK
                address = int(matrix[row, column])
                if address:
                    merge.dead[address] = (int(matrix[row, FANOUT + column]), level - 1, volume.id)
                matrix[row, column] = matrix[row, FANOUT + column] = 0

    async def _write_pages(
        self, volume: Volume, level: int, indices: list[int], pages: list[bytes], merge: Merge
    ) -> list[tuple[int, int]]:
        entries = await self.writer.write(volume.id, level, indices, pages)
        for index, page in zip(indices, pages, strict=True):
            self._remember(volume, level, index, page_of(page), merge)
        if level == ROOT_LEVEL:
            # Below the root the level above counts its children; nobody is above the root.
            for address, _ in entries:
                merge.live[address >> 24] += 1
        return entries

    @staticmethod
    def _remember(volume: Volume, level: int, index: int, page: Page, merge: Merge) -> None:
        """Cache a new page: a leaf at once (the frozen overlay agrees with it), an inner page at the commit."""
        if level == 0:
            volume.tree.replace_page(0, index, page)
        else:
            merge.inner[volume.id][page_key(level, index)] = page

    # -- giving space back ---------------------------------------------------------------------------------------

    async def _bury(self, volume: Volume, merge: Merge) -> None:
        """A volume was deleted: its map goes on the dead list, its overlay entries cease to count."""
        _, addresses, _ = await _arrays_of(volume.active)
        merge.count_pending(addresses, -1)
        self._forget_patches(volume.active, merge)
        address, check = volume.tree.root
        if address:
            merge.dead[address] = (check, ROOT_LEVEL, volume.id)

    async def _walk_dead(self, merge: Merge) -> None:
        """Take a slice of pages off the dead list: what leaves point to ceases to be live, inner pages yield more."""
        budget = DEAD_PAGES_A_CHECKPOINT
        # The list may be millions long, so it is not copied: it changes at the commit. The newest go first, for what
        # is found below a page is then gone before the next page.
        listed = reversed(self._engine.dead.items())
        while budget > 0:
            slice_ = [merge.dead.popitem() for _ in range(min(CHUNK_PAGES, len(merge.dead)))]
            if not slice_:
                slice_ = list(itertools.islice(listed, CHUNK_PAGES))
                merge.dead_removed += [address for address, _ in slice_]
            if not slice_:
                return
            budget -= len(slice_)
            pages = await self._read_dead(slice_)
            for (address, (_, level, volume_id)), page in zip(slice_, pages, strict=True):
                if page is None:
                    continue
                merge.live[address >> 24] -= 1
                words = np.frombuffer(page, np.uint64)
                used = np.flatnonzero(words[:FANOUT])
                if level == 0:
                    merge.count_live(words[used], -1)
                    if volume_id in merge.mapped:
                        merge.mapped[volume_id] -= len(used)
                else:
                    for slot in used.tolist():
                        merge.dead[int(words[slot])] = (int(words[FANOUT + slot]), level - 1, volume_id)
            await trio.lowlevel.checkpoint()

    async def _read_dead(self, items: list[tuple[int, tuple[int, int, int]]]) -> list[Page | None]:
        """Read dead pages.

        One that can't be read is dropped with what lies below it: that space is lost until repair.
        """
        try:
            return await read_pages(
                self._engine.segments, [(address, check) for address, (check, _, _) in items], "of a deleted range"
            )
        except OSError:
            pages: list[Page | None] = []
            for address, (check, _, _) in items:
                try:
                    pages += await read_pages(self._engine.segments, [(address, check)], "of a deleted range")
                except OSError as error:
                    logger.error("%s; the space below it is not given back", error)
                    pages.append(None)
            return pages

    # -- committing ----------------------------------------------------------------------------------------------

    def _change(self, frozen: Frozen, merge: Merge) -> Change:
        """The transaction. `pending` entries of the frozen overlays are about to become `live` ones."""
        engine = self._engine
        segments = engine.segments
        change = Change(
            Position(
                engine.log.incarnation,
                frozen.seq,
                frozen.log_segment,
                frozen.log_slot,
                frozen.log_prev_check,
                segments.next_id,
                frozen.next_volume_id,
            ),
            [self._volume_row(item, merge) for item in frozen.volumes],
        )
        # What changes while the transaction runs belongs to the next one.
        changed = self._taken_changes = segments.changed | segments.opened()
        segments.changed = set()
        idle = {segment.id for segment in segments.idle()}
        for segment_id in sorted(changed | idle | merge.live.keys() | merge.pending.keys()):
            segment = segments.by_id.get(segment_id)
            if segment is None:
                continue
            live = merge.live.get(segment.id, 0)
            pending = merge.pending.get(segment.id, 0)
            if segment.id != frozen.log_segment and _is_free(segment, frozen.seq, live=live, pending=pending):
                change.freed_segments.append(segment.id)
            elif live or segment.id in changed:
                change.segments.append(
                    SegmentRow(
                        segment.id,
                        segment.device.index,
                        segment.index,
                        segment.kind,
                        segment.open,
                        segment.used,
                        segment.live + live,
                        segment.last_seq,
                    )
                )
        change.dead_added = [_dead_row(address, value) for address, value in merge.dead.items()]
        change.dead_removed = merge.dead_removed
        change.devices = [device_row(device) for device in engine.devices]
        return change

    @staticmethod
    def _volume_row(item: FrozenVolume, merge: Merge) -> VolumeRow:
        volume = item.volume
        root = merge.roots.get(volume.id, volume.tree.root)
        return VolumeRow(
            volume.id, volume.short_name, item.size_bytes, root[0], root[1], merge.mapped[volume.id], volume.created_at
        )

    async def _apply(self, frozen: Frozen, merge: Merge, change: Change) -> None:
        """The commit succeeded: make memory say what the catalog says.

        No checkpoint of trio before the slow disposal.
        """
        engine = self._engine
        segments = engine.segments
        self._frozen = None
        self._last_seq = frozen.seq
        self.count += 1
        self.failure = None
        self._failures = 0
        engine.space.checkpoint_failure = None
        overlays = []
        for item in frozen.volumes:
            volume = item.volume
            volume.tree.mapped_blocks = merge.mapped[volume.id]
            if volume.id in merge.detached:
                volume.tree.forget()  # cached leaves may lie below what was cut off
            volume.tree.commit(merge.roots.get(volume.id, volume.tree.root), merge.inner.get(volume.id, {}))
            if volume.frozen is not None:
                overlays.append(volume.frozen)
                volume.frozen = None
        for volume in frozen.graveyard:
            overlays.append(volume.active)
            volume.tree.close()
        for segment_id, count in merge.pending.items():
            segments.ceased_pending(segment_id, -count)
        for segment_id, count in merge.live.items():
            if count:
                segments.add_live(segment_id, count)
        for segment_id in change.freed_segments:
            segment = segments.by_id[segment_id]
            if segment.pins:
                segments.changed.add(segment_id)  # a reader came; it is freed by the next checkpoint
            else:
                segments.release(segment)
        for address in merge.dead_removed:
            del engine.dead[address]
        engine.dead.update(merge.dead)
        if not engine.dead:
            engine.dead = {}  # one that was emptied piece by piece keeps its memory: 80 MiB after a million
        engine.checkpoint_log_mark = frozen.log_mark
        if frozen.log_was_broken:
            engine.log.broken = False
        space = engine.space
        space.frozen_weight = space.frozen_charge = 0
        engine.log.checkpoint_seq = frozen.seq
        for device in engine.devices:
            if not device.poisoned:
                try:
                    device.write_label(device.label.next(checkpoint_seq=frozen.seq))
                except OSError as error:
                    logger.error("%s", error)
        space.changed()
        if engine.dead:
            space.kick_checkpoint.set()
        await _dispose(overlays)


def _is_free(segment: Segment, seq: int, *, live: int = 0, pending: int = 0) -> bool:
    """Whether a checkpoint at `seq`, which changes its counts by `live` and `pending`, may free a segment."""
    return (
        not segment.open
        and not segment.pins
        and segment.live + live == 0
        and segment.pending + pending == 0
        and segment.last_seq <= seq
    )


def device_row(device: Any) -> DeviceRow:
    """What the catalog keeps of a device."""
    label = device.label
    return DeviceRow(
        label.device_index,
        label.device_uuid,
        device.path,
        label.tier,
        label.size_bytes,
        label.segment_bytes,
        device.poisoned,
    )


def _dead_row(address: int, value: tuple[int, int, int]) -> DeadRow:
    return address, *value


def decompose_ranges(overlay: Overlay) -> tuple[U64, dict[int, set[int]]]:
    """Split unmapped ranges by what of the tree they cover: single blocks, and whole subtrees by level.

    Returns the blocks (sorted, none twice) and, for each level from 1 up, the entries (child indices) to be detached
    in pages of that level.
    """
    singles: list[U64] = []
    detached: dict[int, set[int]] = {}
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


def _is_detached(level: int, index: int, detached: dict[int, set[int]]) -> bool:
    """Whether a page lies in a subtree that is being detached.

    Entries of level j are children, pages of level j - 1.
    """
    return any(
        (index >> FANOUT_BITS * (upper - 1 - level)) in keys for upper, keys in detached.items() if upper > level
    )


async def _arrays_of(overlay: Overlay) -> tuple[U64, U64, U64]:
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


async def _dispose(overlays: Iterable[Overlay]) -> None:
    """Take big dictionaries apart in slices: freeing 100,000 entries at once would stall the loop."""
    for overlay in overlays:
        points = overlay.points
        while points:
            for _ in range(min(SLICE_ENTRIES, len(points))):
                points.popitem()
            await trio.lowlevel.checkpoint()
