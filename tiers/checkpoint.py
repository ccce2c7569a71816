"""The checkpoint: turns what the log has done since the last one into map pages, and commits that as one transaction.

1. Freeze, without a checkpoint of trio in between: the log's sequence and position, and every volume's overlay.
2. For each volume, merge the frozen overlay into copies of the pages it touches, level by level up to the root, in
   chunks of 256 pages. Readers go on with the frozen overlay over the old tree.
3. Flush: everything that the new trees point to is durable.
4. Commit the catalog.
5. Without a checkpoint in between: switch the roots, drop the frozen overlays, apply the counts.
6. Append a copy of what was committed to the devices and flush it; then free the segments that nothing needs any more
   (`tiers.copies`).

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

from tiers.catalog import Change, DeadRow, Position, SegmentRow, VolumeRow, device_row
from tiers.copies import CopyWriter
from tiers.errors import TierError
from tiers.failpoint import hit
from tiers.layout import BAD, BLOCK_BYTES, FIRST_ADDRESS, SLOT_BITS
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
from tiers.segments import Segment, is_free
from tiers.volume import Volume

if TYPE_CHECKING:
    from tiers.engine import Engine

logger = logging.getLogger(__name__)

U64 = Any
"""A NumPy array of uint64."""

CHUNK_PAGES = 256
DEAD_SLICE_PAGES = 64
"""Dead pages walked without a checkpoint of trio in between: an inner one yields up to 256 more."""
SLICE_ENTRIES = 4096
DEAD_PAGES_A_CHECKPOINT = 8192
RETRY_S = 1.0
IDLE_S = 0.005
MAX_FAILURES = 3


@dataclass
class FrozenVolume:
    """One volume at the moment of the freeze."""

    volume: Volume
    size_bytes: int
    policy_name: str
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
    free: list[int] = field(default_factory=list)

    def count_live(self, addresses: U64, sign: int) -> None:
        """Count each address that lies in a segment as one live block more or less."""
        _count(self.live, addresses, sign)

    def count_pending(self, addresses: U64, sign: int) -> None:
        """The same for overlay entries."""
        _count(self.pending, addresses, sign)


def _copied_page(data: memoryview, row: int) -> Page:
    """One page out of many, in memory of its own: a cached page must not keep its neighbours."""
    return page_of(bytes(data[row * BLOCK_BYTES : (row + 1) * BLOCK_BYTES]))


def _mapped(addresses: U64) -> int:
    """How many of these entries have data: not those of holes and of lost blocks."""
    return int(np.count_nonzero(addresses > np.uint64(BAD)))


def _count(counts: dict[int, int], addresses: U64, sign: int) -> None:
    ids, numbers = np.unique(addresses >> np.uint64(24), return_counts=True)
    for segment_id, number in zip(ids.tolist(), numbers.tolist(), strict=True):
        if segment_id:
            counts[segment_id] += sign * number


class Checkpointer:
    """Runs the checkpoints of one pool, one at a time."""

    def __init__(self, engine: "Engine") -> None:
        self.writer = MapWriter(engine)
        self.copies = CopyWriter(engine)
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
        self._taken_gone: set[int] = set()
        self._kept_ids: U64 | None = None
        """While a device is lost: the segments that are not on it."""
        self._writing: trio.Nursery

    async def run(self) -> None:
        """The task: a checkpoint when one is asked for, and at the interval while there is something to record."""
        engine = self._engine
        while True:
            with trio.move_on_after(engine.settings.checkpoint_interval_s):
                await engine.space.kick_checkpoint.wait()
            engine.space.kick_checkpoint = trio.Event()
            if not self.needed():
                engine.space.changed()
                await trio.sleep(IDLE_S)  # who waits for space asks again at once: a busy loop while the cleaner rests
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
            or self.copies.behind
            or any(is_free(segment, self._last_seq) for segment in engine.segments.idle())
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

    async def reuse(self, emptied: list[Segment]) -> int:
        """Free the cleaner's emptied victims before the next checkpoint, which would do it otherwise; return how many.

        The records that moved or killed what was in them are made durable first, so every replay of the log finds
        these; no checkpoint may be half-way, since it works from the trees that name the old places, and the copy of
        the last one must be durable, since what the copy before needs must stay. (Design rule 7.)
        Raises TierError if the flush fails.
        """
        engine = self._engine
        await engine.flusher.flush()
        async with self._lock:
            if self._frozen is not None or self.copies.behind or engine.space.read_only is not None:
                return 0
            count = 0
            for segment in emptied:
                if (
                    engine.segments.by_id.get(segment.id) is segment
                    and not (segment.open or segment.pins or segment.pending or segment.damaged)
                    and segment.last_seq <= engine.log.checkpoint_seq
                ):
                    # What it held is somewhere else by now, and counts there only from the next checkpoint on.
                    engine.space.active_charge += segment.live_slots
                    engine.segments.reuse(segment)
                    count += 1
                    hit("segment.reused")
            engine.space.changed()
            return count

    def waiting_deletes(self) -> list[Volume]:
        """Deleted volumes that no committed checkpoint has buried yet."""
        return [*self._engine.graveyard, *(self._frozen.graveyard if self._frozen else [])]

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
        hit("checkpoint.frozen")
        merge = Merge()
        self._taken_changes, self._taken_gone = set(), set()
        segments = self._engine.segments
        self._kept_ids = None
        if any(device.state == "lost" for device in segments.devices):
            # All that frozen overlays and committed trees may name is there by now.
            kept = [segment.id for segment in segments.by_id.values() if segment.device.state != "lost"]
            self._kept_ids = np.array(sorted(kept), np.uint64)
        for item in frozen.volumes:
            item.volume.tree.loaded = set()
            merge.mapped[item.volume.id] = item.volume.tree.mapped_blocks
        committing = False
        try:
            await self._merge_volumes(frozen, merge)
            hit("checkpoint.merged")
            for volume in frozen.graveyard:
                await self._bury(volume, merge)
            await self._walk_dead(merge)
            hit("checkpoint.walked")
            await self._engine.flusher.flush_all()
            hit("checkpoint.flushed")
            self.copies.prepare(len(self._engine.dead) + len(merge.dead))
            change = self._change(frozen, merge)
            committing = True
            with trio.CancelScope(shield=True):
                await self._engine.offload(self._engine.catalog.commit, change)
        except BaseException as error:
            for item in frozen.volumes:
                item.volume.tree.forget()
            self._engine.segments.changed |= self._taken_changes
            self._engine.segments.gone |= self._taken_gone
            self._engine.space.kick_checkpoint.set()
            if not committing or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
                # Surely not committed. After another failure of a commit it isn't certain: its pages stay.
                self.writer.give_up()
            if isinstance(error, OSError):
                self._failed(error)
            raise
        self._committed = self._begun
        hit("checkpoint.committed")
        await self._apply(frozen, merge, change)
        try:
            await self.copies.write()
        except OSError as error:
            self._engine.space.kick_checkpoint.set()
            self._failed(error)
            raise
        self._finish(frozen)

    def _failed(self, error: OSError) -> None:
        hit("checkpoint.failed")
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
            forced = engine.forced.pop(volume.id, set())
            volumes.append(FrozenVolume(volume, volume.size_bytes, volume.policy_name, overlay, forced))
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

    async def _merge_volumes(self, frozen: Frozen, merge: Merge) -> None:
        """Work out the new trees. When this returns their pages are written."""
        failure: OSError | None = None
        try:
            async with trio.open_nursery() as self._writing:
                try:
                    for item in frozen.volumes:
                        if item.overlay is not None or item.forced:
                            await self._merge_volume(item, merge)
                    await self.writer.settle()
                except OSError as error:
                    failure = error  # raised outside the nursery, which would wrap it in a group
        finally:
            self.writer.settled()
        if failure is not None:
            raise failure

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
        up_addresses, up_checks = np.zeros(len(indices), np.uint64), np.zeros(len(indices), np.uint64)
        cached = volume.tree.holds_leaves(len(indices))
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
                merge.mapped[volume.id] += _mapped(addresses[lo:hi]) - _mapped(old)
            if patches:
                self._apply_patches(volume, patches, page_indices, matrix, merge)
            if self._kept_ids is not None and level == 0:
                self._give_up_lost(volume, matrix, merge)
            kept = np.flatnonzero(matrix[:, :FANOUT].any(axis=1))
            indices_kept = page_indices
            if len(kept) < len(page_indices):
                matrix = matrix[kept]
                indices_kept = [page_indices[i] for i in kept.tolist()]
            data = memoryview(matrix.reshape(-1)).cast("B") if indices_kept else memoryview(b"")
            new_addresses, new_checks = await self.writer.write(self._writing, volume.id, level, indices_kept, data)
            up_addresses[start + kept] = np.array(new_addresses, np.uint64)
            up_checks[start + kept] = np.array(new_checks, np.uint64)
            if level:
                for row, index in enumerate(indices_kept):
                    merge.inner[volume.id][page_key(level, index)] = _copied_page(data, row)
                for index in set(page_indices).difference(indices_kept):
                    merge.inner[volume.id][page_key(level, index)] = EMPTY_PAGE
            else:
                self._cache_leaves(volume.tree, page_indices, indices_kept, data, all_of_them=cached)
            if level == ROOT_LEVEL:
                # Below the root the level above counts its children; nobody is above the root.
                for address in new_addresses:
                    merge.live[address >> 24] += 1
            await trio.lowlevel.checkpoint()
        return indices, up_addresses, up_checks

    @staticmethod
    def _cache_leaves(
        tree: MapTree, indices: list[int], kept: list[int], data: memoryview, *, all_of_them: bool
    ) -> None:
        """Cache new leaves at once (the frozen overlay agrees with them), or only those whose old version is cached."""
        for row, index in enumerate(kept):
            if all_of_them or tree.has_leaf(index):
                tree.replace_page(0, index, _copied_page(data, row))
        if len(kept) < len(indices):
            for index in set(indices).difference(kept):
                tree.replace_page(0, index, EMPTY_PAGE)

    async def _base_pages(self, tree: MapTree, level: int, indices: list[int], detached: dict[int, set[int]]) -> U64:
        """The present pages as a matrix of 512 columns; zeros for holes and for what a trim detached."""
        if not tree.root[0]:
            return np.zeros((len(indices), 2 * FANOUT), np.uint64)
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
        merge.mapped[volume.id] += _mapped(new) - _mapped(old)

    def _give_up_lost(self, volume: Volume, matrix: U64, merge: Merge) -> None:
        """While a device is lost: leaf entries that name a place on it, or a segment that isn't there, become BAD."""
        assert self._kept_ids is not None
        addresses, checks = matrix[:, :FANOUT], matrix[:, FANOUT:]
        lost = (addresses >= np.uint64(FIRST_ADDRESS)) & ~np.isin(addresses >> np.uint64(SLOT_BITS), self._kept_ids)
        if lost.any():
            merge.count_live(addresses[lost], -1)
            merge.mapped[volume.id] -= int(np.count_nonzero(lost))
            addresses[lost] = BAD
            checks[lost] = 0
            hit("checkpoint.given_up")

    @staticmethod
    def _detach(volume: Volume, level: int, cut: set[int], indices: list[int], matrix: U64, merge: Merge) -> None:
        """Zero the entries of detached subtrees; their roots go on the dead list."""
        rows = {index: row for row, index in enumerate(indices)}
        for key in cut:
            row = rows.get(key >> FANOUT_BITS)
            if row is not None:
                column = key & FANOUT_MASK
                address = int(matrix[row, column])
                if address >= FIRST_ADDRESS:
                    merge.dead[address] = (int(matrix[row, FANOUT + column]), level - 1, volume.id)
                    hit("checkpoint.detached")
                matrix[row, column] = matrix[row, FANOUT + column] = 0

    # -- giving space back ---------------------------------------------------------------------------------------

    async def _bury(self, volume: Volume, merge: Merge) -> None:
        """A volume was deleted: its map goes on the dead list, its overlay entries cease to count."""
        _, addresses, _ = await _arrays_of(volume.active)
        merge.count_pending(addresses, -1)
        self._forget_patches(volume.active, merge)
        address, check = volume.tree.root
        if address >= FIRST_ADDRESS:
            merge.dead[address] = (check, ROOT_LEVEL, volume.id)

    async def _walk_dead(self, merge: Merge) -> None:
        """Take a slice of pages off the dead list: what leaves point to ceases to be live, inner pages yield more."""
        budget = DEAD_PAGES_A_CHECKPOINT
        # The list may be millions long, so it is not copied: it changes at the commit. The newest go first, for what
        # is found below a page is then gone before the next page.
        listed = reversed(self._engine.dead.items())
        while budget > 0:
            slice_ = [merge.dead.popitem() for _ in range(min(DEAD_SLICE_PAGES, len(merge.dead)))]
            if not slice_:
                slice_ = list(itertools.islice(listed, DEAD_SLICE_PAGES))
                merge.dead_removed += [address for address, _ in slice_]
            if not slice_:
                return
            budget -= len(slice_)
            pages = await self._read_dead(slice_)
            for (address, (_, level, volume_id)), page in zip(slice_, pages, strict=True):
                merge.live[address >> 24] -= 1
                if page is None:
                    continue
                words = np.frombuffer(page, np.uint64)
                used = np.flatnonzero(words[:FANOUT] > np.uint64(BAD))
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
        for segment_id, count in merge.live.items():
            known = segments.by_id.get(segment_id)
            if known is not None and known.live + count < 0:
                raise TierError(
                    errno.EIO,
                    f"the catalog of pool {engine.pool_name} counts {known.live} live blocks in segment {segment_id} "
                    f"on {known.device.path}, and {-count} cease to be: it is damaged; see `terrace pool check`, and "
                    "copy the volumes to another pool (nbdcopy)",
                )
        # What changes while the transaction runs belongs to the next one.
        changed = self._taken_changes = segments.changed | segments.opened()
        segments.changed = set()
        self._taken_gone, segments.gone = segments.gone, set()
        change.freed_segments = sorted(self._taken_gone)
        idle = {segment.id for segment in segments.idle()}
        for segment_id in sorted(changed | idle | merge.live.keys() | merge.pending.keys()):
            segment = segments.by_id.get(segment_id)
            if segment is None:
                continue
            live = merge.live.get(segment.id, 0)
            pending = merge.pending.get(segment.id, 0)
            free = segment.id != frozen.log_segment and is_free(segment, frozen.seq, live=live, pending=pending)
            if free:
                merge.free.append(segment.id)
            if free or live or segment.id in changed:
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
                        segment.blocks,
                    )
                )
        change.dead_added = [_dead_row(address, value) for address, value in merge.dead.items()]
        change.dead_removed = merge.dead_removed
        change.devices = [*map(device_row, engine.devices), *engine.removed_devices]
        return change

    @staticmethod
    def _volume_row(item: FrozenVolume, merge: Merge) -> VolumeRow:
        volume = item.volume
        root = merge.roots.get(volume.id, volume.tree.root)
        # Below zero only if the catalog was damaged, which `pool check` tells of; nothing rests on this count.
        mapped = max(0, merge.mapped[volume.id])
        return VolumeRow(
            volume.id,
            volume.short_name,
            item.size_bytes,
            root[0],
            root[1],
            mapped,
            volume.created_at,
            item.policy_name,
        )

    async def _apply(self, frozen: Frozen, merge: Merge, change: Change) -> None:
        """The commit succeeded: make memory say what the catalog says.

        No checkpoint of trio before the slow disposal. Nothing is given out yet: the copy on the devices is older.
        """
        engine = self._engine
        segments = engine.segments
        self._frozen = None
        self._last_seq = frozen.seq
        self.count += 1
        self.copies.committed(change, merge.free)
        segments.reused.clear()
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
        for address in merge.dead_removed:
            del engine.dead[address]
        engine.dead.update(merge.dead)
        if not engine.dead:
            engine.dead = {}  # one that was emptied piece by piece keeps its memory: 80 MiB after a million
        engine.checkpoint_log_mark = frozen.log_mark
        engine.space.frozen_weight = engine.space.frozen_charge = 0
        engine.log.checkpoint_seq = frozen.seq
        await _dispose(overlays)

    def _finish(self, frozen: Frozen) -> None:
        """The copy is durable too. No checkpoint of trio in here."""
        engine = self._engine
        self.failure = None
        self._failures = 0
        engine.space.checkpoint_failure = None
        if frozen.log_was_broken:
            engine.log.broken = False  # not before: the older copy doesn't lead to the new head
        for device in engine.devices:
            if not device.poisoned and device.state != "lost":
                before = device.unsynced_bytes
                try:
                    device.write_label(device.label.next(checkpoint_seq=frozen.seq))
                except OSError as error:
                    logger.error("%s", error)
                if device.tier == "base" and any(other.tier == "fast" for other in engine.devices):
                    # The fast devices' labels tell the same: no client's flush should wait for base because of it.
                    device.unnamed_bytes += device.unsynced_bytes - before
        hit("checkpoint.labelled")
        engine.space.changed()
        if engine.dead:
            engine.space.kick_checkpoint.set()


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
