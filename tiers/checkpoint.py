"""The checkpoint: turns what the log has done since the last one into map pages, and commits that as one transaction.

1. Freeze, without a checkpoint of trio in between: the log's sequence and position, and every volume's overlay.
   What was asked of snapshots and clones (`tiers.lineage`) happens in this step too.
2. Merge the frozen overlays into copies of the pages they touch (`tiers.merge`). Readers go on with the frozen overlay
   over the old tree.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import trio

from tiers.catalog import Change, DeadRow, MarkRow, Position, SegmentRow, SnapshotRow, VolumeRow, device_row
from tiers.changes import encode_trackers
from tiers.copies import CopyWriter
from tiers.errors import TierError, ends_writing
from tiers.failpoint import hit
from tiers.layout import FIRST_ADDRESS
from tiers.maptree import FANOUT, ROOT_LEVEL, Page, read_pages
from tiers.mapwriter import MapWriter
from tiers.merge import SLICE_ENTRIES, U64, FrozenVolume, Merge, Merger, arrays_of, forget_patches
from tiers.overlay import Overlay
from tiers.relocation import Relocation
from tiers.segments import Segment, is_free
from tiers.snapshot import Snapshot
from tiers.volume import Volume

if TYPE_CHECKING:
    from tiers.engine import Engine
    from tiers.lineage import Request

logger = logging.getLogger(__name__)

DEAD_SLICE_PAGES = 64
"""Dead pages walked without a checkpoint of trio in between: an inner one yields up to 256 more."""
DEAD_PAGES_A_CHECKPOINT = 8192
RETRY_S = 1.0
IDLE_S = 0.005
MAX_FAILURES = 3


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
    relocations: list[tuple[int, Relocation]]
    forced: list[tuple[Snapshot, set[int]]]
    """Pages of snapshots that must be written elsewhere."""
    requests: "list[Request]"
    """What was asked of snapshots and clones, and was not refused."""
    taken: list[Snapshot] = field(default_factory=list)
    """New snapshots."""
    made: list[Volume] = field(default_factory=list)
    """New volumes that clients can't see yet."""
    retiring: set[Volume] = field(default_factory=set)
    renamed: dict[Volume, str] = field(default_factory=dict)
    origins: dict[Volume, Snapshot | None] = field(default_factory=dict)
    changed: set[Snapshot] = field(default_factory=set)
    """Snapshots whose rows are others now."""
    on_commit: list[Callable[[], None]] = field(default_factory=list)


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
        self._more_deleted = True
        """Deleted snapshots may have something left to be sorted out."""
        self._sorted_out = False
        """And the next checkpoint will get on with it, for this one did."""
        self._taken_changes: set[int] = set()
        self._taken_gone: set[int] = set()

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
            space.read_only = ends_writing(self._engine.pool_name, "its checkpoints fail", error)
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
            or engine.lineage.requests
            or engine.relocations
            or self._more_deleted
            or self.copies.behind
            or any(volume.marks_differ for volume in engine.volumes.values())
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
        kept_ids: U64 | None = None
        if any(device.state == "lost" for device in segments.devices):
            # All that frozen overlays and committed trees may name is there by now.
            kept = [segment.id for segment in segments.by_id.values() if segment.device.state != "lost"]
            kept_ids = np.array(sorted(kept), np.uint64)
        merger = Merger(self._engine, self.writer, merge, kept_ids)
        # What is made independent in this very checkpoint needs its origin no more.
        merge.origins |= {volume.id: origin for volume, origin in frozen.origins.items()}
        for item in frozen.volumes:
            item.volume.tree.loaded = set()
            merge.mapped[item.volume.id] = item.volume.tree.mapped_blocks
        committing = False
        try:
            await merger.run(frozen.volumes, frozen.relocations, frozen.forced)
            hit("checkpoint.merged")
            for volume in frozen.graveyard:
                await self._bury(volume, merge)
            await self._walk_dead(merge)
            hit("checkpoint.walked")
            await self._engine.flusher.flush_all()
            hit("checkpoint.flushed")
            await self._engine.save_losses()  # what of them is only in the log won't be replayed any more
            marks = await self._marks(frozen, merge)
            self.copies.prepare(len(self._engine.dead) + len(merge.dead), len(frozen.taken) + len(frozen.made), marks)
            change = self._change(frozen, merge)
            change.marks = marks
            committing = True
            with trio.CancelScope(shield=True):
                await self._engine.offload(self._engine.catalog.commit, change)
        except BaseException as error:
            for item in frozen.volumes:
                item.volume.tree.forget()
            for owner_id in merge.roots:
                if (snapshot := self._engine.lineage.snapshots.get(owner_id)) is not None:
                    snapshot.tree.forget()
            self._engine.segments.changed |= self._taken_changes
            self._engine.segments.gone |= self._taken_gone
            self._engine.space.kick_checkpoint.set()
            if not committing or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
                # Surely not committed. After another failure of a commit it isn't certain: its pages stay.
                self.writer.give_up()
            if isinstance(error, OSError):
                self._failed(error)
            raise
        finally:
            merger.close()
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
            item = FrozenVolume(
                volume, volume.size_bytes, volume.policy_name, volume.filling, overlay, forced, volume.heir
            )
            item.record, item.trackers = volume.freeze_marks()
            item.keeper = next((s for s in reversed(volume.snapshots) if s.state != "deleted"), None)
            if item.keeper is not None:
                item.blockers = volume.snapshots[volume.snapshots.index(item.keeper) + 1 :]
            volumes.append(item)
        there = engine.lineage.snapshots
        forced_snapshots = [(there[i], keys) for i, keys in engine.forced.items() if i in there]
        engine.forced.clear()
        graveyard, engine.graveyard = engine.graveyard, []
        space = engine.space
        space.frozen_weight, space.active_weight = space.active_weight, 0
        space.frozen_charge, space.active_charge = space.active_charge, 0
        space.frozen_pages, space.active_pages = space.active_pages, 0
        frozen = Frozen(
            log.seq,
            log.head.id,
            log.head.used,
            log.prev_check,
            log.appended_bytes,
            engine.next_volume_id,
            volumes,
            graveyard,
            was_broken,
            engine.relocations.freeze(),
            forced_snapshots,
            [],
        )
        engine.lineage.obey(frozen)
        frozen.next_volume_id = engine.next_volume_id
        return frozen

    # -- giving space back ---------------------------------------------------------------------------------------

    async def _bury(self, volume: Volume, merge: Merge) -> None:
        """A volume was deleted: its map goes on the dead list, its overlay entries cease to count."""
        _, addresses, _ = await arrays_of(volume.active)
        merge.count_pending(addresses, -1)
        forget_patches(volume.active, merge)
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
                used = np.flatnonzero(words[:FANOUT] >= np.uint64(FIRST_ADDRESS))
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
            self._volume_rows(frozen, merge),
        )
        there = engine.lineage.snapshots
        snapshots = {s.id: s for s in [*frozen.changed, *frozen.taken]}
        snapshots |= {i: there[i] for i in merge.roots.keys() | merge.mapped.keys() if i in there}
        gone = {snapshot.id for snapshot in merge.gone}
        change.snapshots = [self._snapshot_row(s, frozen, merge) for i, s in snapshots.items() if i not in gone]
        change.snapshots_removed = sorted(gone)
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

    async def _marks(self, frozen: Frozen, merge: Merge) -> list[MarkRow]:
        """What volumes had for who follows their changes, at the freeze; encoded in a worker, for it may be long."""
        buried = {volume.id for volume in merge.buried}
        there = [
            item
            for item in frozen.volumes
            if (item.record or item.trackers)
            and not item.volume.retired
            and item.volume not in frozen.retiring
            and item.volume.id not in buried
        ]
        rows: list[MarkRow] = []
        for item in there:
            encoded = await self._engine.offload(encode_trackers, item.trackers) if item.trackers else b""
            rows.append(MarkRow(item.volume.id, item.record, encoded))
        return rows

    def _volume_rows(self, frozen: Frozen, merge: Merge) -> list[VolumeRow]:
        buried = {volume.id for volume in merge.buried}
        # As of the freeze: a volume that was deleted since has a row, and its deletion may never be durable.
        heirs = {item.volume.id: item.heir for item in frozen.volumes} | merge.heirs
        rows: list[VolumeRow] = []
        for volume, size_bytes, policy_name, filling in [
            *((item.volume, item.size_bytes, item.policy_name, item.filling) for item in frozen.volumes),
            *((volume, volume.size_bytes, volume.policy_name, volume.filling) for volume in frozen.made),
        ]:
            if volume.id in buried:
                continue
            root = merge.roots.get(volume.id, volume.tree.root)
            origin = merge.origins.get(volume.id, volume.origin)
            heir = heirs.get(volume.id)
            if heir is not None and heir.id in buried:
                heir = None
            retired = volume.retired or volume in frozen.retiring
            rows.append(
                VolumeRow(
                    volume.id,
                    "" if retired else frozen.renamed.get(volume, volume.short_name),
                    size_bytes,
                    root[0],
                    root[1],
                    # Below zero only if the catalog was damaged, which `pool check` tells of; nothing rests on it.
                    max(0, merge.mapped.get(volume.id, volume.tree.mapped_blocks)),
                    volume.created_at,
                    policy_name,
                    volume.family,
                    0 if origin is None else origin.id,
                    volume.layered,
                    retired,
                    0 if heir is None else heir.id,
                    max(0, merge.referenced.get(volume.id, volume.referenced_blocks)),
                    filling and not retired,
                )
            )
        return rows

    @staticmethod
    def _snapshot_row(snapshot: Snapshot, frozen: Frozen, merge: Merge) -> SnapshotRow:
        root = merge.root_of(snapshot)
        referenced = snapshot.referenced_blocks
        if snapshot in frozen.taken:
            referenced = merge.referenced.get(snapshot.volume.id, snapshot.volume.referenced_blocks)
        return SnapshotRow(
            snapshot.id,
            snapshot.volume.id,
            snapshot.short_name,
            snapshot.size_bytes,
            root[0],
            root[1],
            max(0, merge.mapped.get(snapshot.id, snapshot.tree.mapped_blocks)),
            max(0, referenced),
            snapshot.created_at,
            snapshot.state,
            snapshot.held,
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
            volume.tree.mapped_blocks = merge.mapped.get(volume.id, volume.tree.mapped_blocks)
            volume.referenced_blocks = merge.referenced.get(volume.id, volume.referenced_blocks)
            if volume.id in merge.detached:
                volume.tree.forget()  # cached leaves may lie below what was cut off
            root = merge.roots.get(volume.id, volume.tree.root)
            volume.tree.commit(root, merge.inner.get(volume.id, {}), merge.stale.get(volume.id, ()))
            if volume.frozen is not None:
                overlays.append(volume.frozen)
                volume.frozen = None
        for volume in frozen.graveyard:
            overlays.append(volume.active)
            volume.tree.close()
        engine.lineage.committed(frozen, merge)
        begun = bool(frozen.retiring or frozen.origins)
        self._more_deleted = merge.more_deleted or begun
        self._sorted_out = merge.sorted_out or begun
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
        engine.space.frozen_weight = engine.space.frozen_charge = engine.space.frozen_pages = 0
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
        if engine.dead or self._sorted_out:
            engine.space.kick_checkpoint.set()


def _dead_row(address: int, value: tuple[int, int, int]) -> DeadRow:
    return address, *value


async def _dispose(overlays: Iterable[Overlay]) -> None:
    """Take big dictionaries apart in slices: freeing 100,000 entries at once would stall the loop."""
    for overlay in overlays:
        points = overlay.points
        while points:
            for _ in range(min(SLICE_ENTRIES, len(points))):
                points.popitem()
            await trio.lowlevel.checkpoint()
