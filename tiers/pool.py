"""A pool: devices, a catalog, volumes, and the tasks that keep them going. The engine's public face.

A pool lives in a directory that holds its catalog and a lock; its devices are wherever they are. `Pool.open` recovers
it, runs its tasks while the context lasts, and leaves it with a checkpoint, so that the next open has nothing to
replay. A `kill -9` at any moment is as good as that, only slower to open.
"""

import contextlib
import errno
import logging
import shutil
import time
import uuid as uuids
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import trio

from tiers import lostpages
from tiers.catalog import CATALOG_NAME, Catalog, DeviceRow, Position, State
from tiers.changes import MAX_RECORD_BYTES, ChangedExtents, require_trackers
from tiers.check import CheckReport, check_pool
from tiers.checkpoint import Checkpointer, Frozen
from tiers.cleaner import Cleaner
from tiers.device import Device, Offload
from tiers.engine import Engine
from tiers.errors import TierError, ends_writing
from tiers.evacuate import EvacuationStatus, Evacuator, Events, no_events
from tiers.failpoint import hit
from tiers.flatten import flatten
from tiers.heatfile import HeatFile
from tiers.heatmap import HeatMap, heat_map
from tiers.history import exclusive_blocks
from tiers.host import REAL_HOST, CatalogStore, Host, locked
from tiers.kept import index_of
from tiers.label import BadLabelError, Label
from tiers.layout import BLOCK_BYTES, BLOCK_MASK, BLOCK_SHIFT
from tiers.losses import Loss
from tiers.lost import LostDevice
from tiers.names import validate_name, validate_volume_size
from tiers.newdevices import DeviceSpec, label_devices, wipe_labels
from tiers.overlay import HOLE
from tiers.packer import Packer
from tiers.policy import DEFAULT_NAME, Policy
from tiers.probe import read_label
from tiers.record import Op, words_from_name
from tiers.recorder import Recorder
from tiers.recovery import replay, restore
from tiers.scrub import Scrubber, ScrubStatus
from tiers.scrubstate import ScrubFile
from tiers.segments import is_free
from tiers.settings import PoolSettings
from tiers.snapshot import Snapshot
from tiers.units import format_size
from tiers.volume import Volume

logger = logging.getLogger(__name__)

T = TypeVar("T")

STATUS_STEP = 50
"""Snapshots whose status is told before others have their turn: 1 ms."""
SNAPSHOT_ROOM_SLOTS = 256
"""1 MiB: so much must be available in a pool for each snapshot that is taken."""
SHOWN_DAMAGE = 10
"""Damaged ranges in a pool's status; `Pool.scrubber.status()` has all that are kept."""


@dataclass(frozen=True)
class DeviceStatus:
    """A device as `terrace pool show` tells it."""

    path: str
    tier: str
    uuid: str
    size_bytes: int
    segment_bytes: int
    segments: int
    free_segments: int
    live_bytes: int
    state: str
    errors: int
    used_bytes: int = 0
    """Segments that are not free: what is live in them, what is dead, and what was not written yet."""
    logical_bytes: int = 0
    """What is live, before it was packed."""
    written_bytes: int = 0


@dataclass(frozen=True)
class VolumeStatus:
    """A volume as `terrace volume list` tells it; `mapped_bytes` as of the last checkpoint."""

    name: str
    size_bytes: int
    mapped_bytes: int
    open_count: int
    policy: str = DEFAULT_NAME
    policy_missing: bool = False
    """No policy of that name is defined, so the default one holds."""
    throttled: int = 0
    """Requests that wait for the limits of the policy."""
    queued: int = 0
    """Writes that wait for room in the pool."""
    id: int = 0
    """Never another volume's of this pool, and the same after a rollback."""
    origin: str | None = None
    """The snapshot that it is a clone of."""
    snapshots: int = 0
    referenced_bytes: int = 0
    """What its clients see; for a clone `mapped_bytes` is what is its own."""
    filling: bool = False
    """It is not complete: somebody is filling it, or has begun to and is gone."""
    healed_blocks: int = 0
    """Blocks that couldn't be read here and were had from another copy, since the pool was opened."""


@dataclass(frozen=True)
class SnapshotStatus:
    """A snapshot as `terrace snapshot list` tells it. Bytes, before they were packed."""

    name: str
    volume: str
    snapshot: str
    id: int
    size_bytes: int
    referenced_bytes: int
    """What it shows."""
    exclusive_bytes: int
    """Of that, what nobody else has: its deletion gives back so much."""
    shared_bytes: int
    created_at: float
    held: bool
    open_count: int
    clones: list[str]


@dataclass(frozen=True)
class PoolStatus:
    """A pool as `terrace pool show` tells it. Bytes; counts since the pool was opened."""

    name: str
    uuid: str
    state: Literal["online", "read-only"]
    problem: str | None
    block_size: int
    size_bytes: int
    capacity_bytes: int
    used_bytes: int
    available_bytes: int
    metadata_bytes: int
    reserve_bytes: int
    nominal_bytes: int
    pending_free_bytes: int
    log_seq: int
    durable_seq: int
    checkpoint_seq: int
    checkpoints: int
    checkpoint_failure: str | None
    blocks_moved: int
    client_written_bytes: int
    device_written_bytes: int
    replayed_batches: int
    scrub: ScrubStatus
    given_up: str | None = None
    """What `truncate_log` and `give_up_map` gave up when the pool was opened."""
    evacuations: list[EvacuationStatus] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    """Lost byte ranges by volume; the first of them."""
    lost_bytes: int = 0
    uncounted_frees: bool = False
    """Trims or deletions have come whose space no checkpoint has counted yet, in `pending_free_bytes` or elsewhere."""
    metadata_total_bytes: int = 0
    """Segments that hold map pages, live ones or not."""
    overcommit_limit: float = 0.0
    """Nominal size of all volumes over the capacity, at most; 0: no limit."""
    hit_ratio: float | None = None
    """The share of clients' reads that lay on the fast tier; None if there were none, or there is but one tier."""
    devices: list[DeviceStatus] = field(default_factory=list)
    volumes: list[VolumeStatus] = field(default_factory=list)


class Pool:
    """An open pool. Get one from `Pool.open`."""

    def __init__(
        self,
        engine: Engine,
        checkpointer: Checkpointer,
        cleaner: Cleaner,
        scrubber: Scrubber,
        recorder: Recorder,
        host: Host,
        directory: Path,
        events: Events,
    ) -> None:
        self.name = engine.pool_name
        self.uuid = str(uuids.UUID(bytes=engine.pool_uuid))
        self._engine = engine
        self._checkpointer = checkpointer
        self._cleaner = cleaner
        self._host = host
        self.scrubber = scrubber
        self.recorder = recorder
        self.evacuator = Evacuator(engine, checkpointer, cleaner, events)
        self._packer = Packer(engine)
        self._directory = directory
        self._events = events
        self._ddl = trio.Lock()
        self._growth = trio.Lock()  # of its own: it is what helps where a delete waits for room
        self.replayed_batches = 0
        self.given_up: str | None = None
        self._lost_pages: Counter[str] = Counter()

    # -- making and ending -----------------------------------------------------------------------------------------

    @staticmethod
    async def create(directory: Path, name: str, devices: Sequence[DeviceSpec], *, force: bool = False) -> None:
        """Label the devices and write the catalog. Raises TierError; then no device was changed unless it says so."""
        validate_name("pool", name)
        if not devices:
            raise TierError(errno.EINVAL, f"the pool {name} needs at least one device: give --fast or --base")
        await trio.to_thread.run_sync(_create_blocking, directory, name, list(devices), force)

    @staticmethod
    async def destroy(directory: Path) -> None:
        """Wipe the labels of a pool that nobody has open, and remove its directory. Device files stay."""
        await trio.to_thread.run_sync(_destroy_blocking, directory)

    @staticmethod
    @contextlib.asynccontextmanager
    async def open(
        directory: Path,
        *,
        settings: PoolSettings | None = None,
        truncate_log: bool = False,
        give_up: Collection[str] = (),
        give_up_map: bool = False,
        events: Events = no_events,
        host: Host = REAL_HOST,
    ) -> AsyncIterator["Pool"]:
        """Recover the pool and serve it while the context lasts. Raises TierError naming what stands in the way.

        `give_up`: paths of devices that are gone for good, which the operator accepts. What was only there is lost; if
        the pool can't be opened without one, it stays as it was. `give_up_map`: map pages that can't be read are given
        up with all below them (`tiers.lostpages`). `events`: is told what operators should hear of.
        """
        settings = settings or PoolSettings()
        with contextlib.ExitStack() as stack:
            stack.enter_context(host.lock(directory))
            offload = host.workers()
            catalog = await offload(host.open_catalog, directory)
            stack.callback(catalog.close)
            state = await offload(catalog.load)
            devices = await offload(_open_devices, host, state, give_up)
            stack.callback(_close_devices, devices)
            pool = await _recover(
                directory,
                state,
                devices,
                catalog,
                settings,
                host,
                offload,
                truncate_log=truncate_log,
                give_up_map=give_up_map,
                events=events,
            )
            await offload(catalog.lay_ballast)
            await pool.scrubber.load()
            await pool.recorder.load()
            if give_up_map:
                await pool._recount()
            if pool._engine.space.read_only is None:
                await offload(_wipe_removed, host, pool._engine.removed_devices)
            pool.evacuator.resume()
            failure: Exception | None = None
            try:
                async with trio.open_nursery() as nursery:
                    pool._start_tasks(nursery)
                    try:
                        yield pool
                    except Exception as error:
                        failure = error  # raised outside the nursery, which would wrap it in a group
                    nursery.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):
                    try:
                        await pool._close()
                    finally:
                        pool._engine.retire()
            if failure is not None:
                raise failure

    def _start_tasks(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._engine.flusher.run)
        nursery.start_soon(self.scrubber.run)
        nursery.start_soon(self.recorder.run)
        if self._engine.space.read_only is None:
            nursery.start_soon(self._checkpointer.run)
            nursery.start_soon(self._cleaner.run)
            nursery.start_soon(self._packer.run)
            nursery.start_soon(self._engine.promoter.run)
            nursery.start_soon(self._engine.bypass.run)
            nursery.start_soon(self.evacuator.run)
        nursery.start_soon(self._index_snapshots)

    async def _index_snapshots(self) -> None:
        """Learn which snapshots have something of which leaf. Without that all of them are asked."""
        for volume in list(self._engine.volumes.values()):
            if volume.kept is None:
                try:
                    await index_of(volume)
                except OSError as error:
                    logger.error("the snapshots of %s are not indexed: %s", volume.name, error)

    async def _close(self) -> None:
        """Leave nothing to replay."""
        await self.scrubber.close()
        await self.recorder.close()
        await self._save_losses()
        if self._engine.space.read_only is not None:
            return
        try:
            await self._alone(self._seal_and_checkpoint)
        except OSError as error:
            logger.error("closing pool %s: %s; the next open replays its log", self.name, error)

    async def _seal_and_checkpoint(self) -> None:
        await self._checkpointer.hold()  # until one is done that somebody else has asked for
        try:
            self._checkpointer.writer.seal()
            self._cleaner.mover.seal_all()
            self._engine.bypass.seal()
            self.evacuator.mover.seal_all()
        finally:
            self._checkpointer.let_go()
        hit("close.sealed")
        await self._checkpointer.checkpoint()

    async def _checkpoint_alone(self) -> None:
        """A checkpoint while the pool's tasks don't run."""
        await self._alone(self._checkpointer.checkpoint)

    async def _recount(self) -> None:
        """Count anew what given up map pages named, before the pool's tasks run."""
        engine = self._engine
        if engine.space.read_only is not None:
            text = f"no map page was given up: {engine.space.read_only}"
        else:
            if self._lost_pages:  # before anything else may fail: the checkpoint that gave them up is committed
                told = lostpages.in_words(self.name, self._lost_pages, recounted=True, most_names=5)
                self._events(
                    "pool", self.name, f"pool {self.name}: {told}: `terrace pool check {self.name}` lists what is lost"
                )
            is_done = await self._alone(partial(lostpages.recount, engine, self._checkpointer))
            await self._save_losses()
            text = lostpages.in_words(self.name, self._lost_pages, recounted=is_done)
        self.given_up = f"{self.given_up}; {text}" if self.given_up else text

    async def _alone(self, work: Callable[[], Awaitable[T]]) -> T:
        """Something that makes checkpoints, while the pool's tasks don't run."""
        failure: OSError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._engine.flusher.run)
            try:
                found = await work()
            except OSError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return found

    # -- volumes -----------------------------------------------------------------------------------------------------

    def volumes(self) -> list[Volume]:
        """All volumes, by name."""
        there = [volume for volume in self._engine.volumes.values() if not volume.retired]
        return sorted(there, key=lambda volume: volume.short_name)

    def volume(self, name: str) -> Volume:
        """The volume of that name (without the pool's). Raises TierError ENOENT."""
        volume = self._engine.volume_named(name)
        if volume is None:
            raise TierError(
                errno.ENOENT, f"the pool {self.name} has no volume {name!r}: see `terrace volume list {self.name}`"
            )
        return volume

    async def create_volume(self, name: str, size_bytes: int, policy: str = "", *, filling: bool = False) -> Volume:
        """Create a thin volume; it is durable when this returns. Costs the same at any size.

        `policy`: the name of one that is defined; empty: the default. Raises ENOENT. `filling`: see `set_filling`.
        """
        validate_name("volume", name)
        validate_volume_size(size_bytes)
        async with self._ddl:
            await self._engine.admit_release()
            coming = any(volume.short_name == name for volume in self._engine.lineage.coming)
            if coming or self._engine.volume_named(name) is not None:
                raise TierError(
                    errno.EEXIST,
                    f"there is a volume {self.name}/{name} already: choose another name, or delete it first",
                )
            policy = self._engine.require_policy(policy)
            self._require_commitment(size_bytes, f"a volume {self.name}/{name} of {format_size(size_bytes)}")
            volume_id = self._engine.next_volume_id
            created_at = int(self._host.now())
            ops = [Op.CREATE << 56 | volume_id, size_bytes, created_at << 8 | len(name)]
            if policy:
                ops += (Op.POLICY << 56 | volume_id, len(policy), 0)
            if filling:  # in the same batch: there is no moment at which it is there and complete
                ops += (Op.FILLING << 56 | volume_id, 1, 0)
            self._engine.append_records(ops, words_from_name(name) + words_from_name(policy))
            volume = self._engine.add_volume(volume_id, name, size_bytes, (0, 0), created_at)
            volume.policy_name = policy
            volume.filling = filling
            self._engine.apply_policy(volume)
            hit("create.logged")
            await self._engine.flusher.flush()
            hit("create.durable")
            return volume

    def define_policies(self, policies: Mapping[str, Policy]) -> None:
        """What the names of policies mean from now on, also for requests that wait; "default" is every other volume's.

        A volume whose policy isn't among them runs with the default, and `status` says so.
        """
        self._engine.define_policies(policies)

    async def set_policy(self, name: str, policy: str) -> Volume:
        """Give a volume the policy of that name (empty: the default); durable when this returns. Raises ENOENT."""
        engine = self._engine
        async with self._ddl:
            volume = self.volume(name)
            engine.require_policy(policy)
            await engine.admit_release()
            # Asked again, since others may have been defined meanwhile. No checkpoint of trio from here to the record.
            policy = engine.require_policy(policy)
            engine.append_record(Op.POLICY, volume.id, len(policy), extra=words_from_name(policy))
            volume.policy_name = policy
            engine.apply_policy(volume)
            hit("policy.logged")
            await engine.flusher.flush()
            hit("policy.durable")
            return volume

    async def set_filling(self, name: str, filling: bool) -> Volume:
        """Mark a volume as being filled, or as complete; durable when this returns. Raises TierError ENOENT.

        Who fills it marks it before the first byte, and as complete when the last one was acknowledged. The mark is a
        record in the log, so the order is kept by every crash: a volume that is complete holds what was written before
        it was said to be.
        """
        engine = self._engine
        async with self._ddl:
            self.volume(name)
            await engine.admit_release()
            # No checkpoint of trio from here to the record: a rollback puts another volume in this one's place.
            volume = self.volume(name)
            if volume.filling != filling:
                engine.append_record(Op.FILLING, volume.id, int(filling))
                volume.filling = filling
                hit("filling.logged")
            await engine.flusher.flush()
            hit("filling.durable")
            return volume

    async def set_mirror(
        self, volume: Volume, record: bytes, trackers: Mapping[str, ChangedExtents] | None = None
    ) -> None:
        """Save a record with a volume, and replace its trackers unless they are None: durable, both or none.

        What it says holds after all writes that had returned. It is a checkpoint, which this waits for, and for one
        that is under way. A tracker grows by every change from the moment of the call on; it is the very object, which
        its owner may change in place: a later checkpoint saves that. `record`: at most 64 KiB; empty, with no trackers:
        nobody follows the volume any more.

        Raises TierError: EINVAL, ESTALE for a volume that is gone; if no checkpoint can be committed, after which the
        volume has what was given, and the next one that succeeds, or none, makes it durable.
        """
        if len(record) > MAX_RECORD_BYTES:
            raise TierError(errno.EINVAL, f"a record of {len(record)} bytes is too long: at most {MAX_RECORD_BYTES}")
        if trackers is not None:
            require_trackers(trackers)
        if volume.deleted or self._engine.volumes.get(volume.id) is not volume:
            raise TierError(errno.ESTALE, f"{volume.name} was deleted or rolled back")
        self._engine.space.require_writable()
        # No checkpoint of trio until the volume has both.
        volume.mirror_record = bytes(record)
        if trackers is not None:
            volume.trackers = dict(trackers)
        await self._checkpointer.checkpoint()
        if volume.deleted:
            raise TierError(errno.ESTALE, f"{volume.name} was deleted or rolled back meanwhile")

    @staticmethod
    def _require_plain(volume: Volume, done: str, *, mirrored: bool) -> None:
        if volume.mirror_record and not mirrored:
            raise TierError(
                errno.EBUSY,
                f"{volume.name} is mirrored and can't be {done} by itself: see `terrace volume mirror show "
                f"{volume.name}`; `terrace volume mirror remove {volume.name} NODE`, of each other node, ends the "
                "mirror",
            )

    async def heat_map(self, name: str, ranges: int) -> HeatMap:
        """What of a volume lies on which tier, and how hot it is. Raises TierError ENOENT."""
        volume = self.volume(name)
        await self.recorder.drain()
        return await heat_map(self._engine, volume, ranges)

    async def resize_volume(self, name: str, size_bytes: int, *, mirrored: bool = False) -> Volume:
        """Grow or shrink a volume; durable when this returns. Shrinking discards the tail, and needs it unused.

        `mirrored`: even one that has a record (`set_mirror`), for its owner sees to the other copies; else EBUSY.
        """
        validate_volume_size(size_bytes)
        async with self._ddl:
            volume = self.volume(name)
            self._require_plain(volume, "resized", mirrored=mirrored)
            if size_bytes < volume.size_bytes:
                await self._shrink(volume, size_bytes)
            else:
                await self._engine.admit_release()
                more = size_bytes - volume.size_bytes
                self._require_commitment(more, f"{volume.name} with {format_size(more)} more")
                self._engine.append_record(Op.RESIZE, volume.id, size_bytes)
                self._engine.resized(volume, size_bytes)
            hit("resize.logged")
            await self._engine.flusher.flush()
            hit("resize.durable")
            return volume

    def require_growth(self, name: str, size_bytes: int) -> None:
        """Raise what `resize_volume` would raise of a volume that is to have so much: ENOENT, EINVAL, ENOSPC."""
        volume = self.volume(name)
        validate_volume_size(size_bytes)
        more = size_bytes - volume.size_bytes
        self._require_commitment(more, f"{volume.name} with {format_size(more)} more")

    def _require_commitment(self, more_bytes: int, what: str) -> None:
        """Raise ENOSPC if all volumes together would have more than the limit lets be promised."""
        engine = self._engine
        limit = engine.settings.overcommit_limit
        nominal = sum(volume.size_bytes for volume in self.volumes())
        capacity = engine.space.capacity * BLOCK_BYTES
        if limit and more_bytes > 0 and nominal + more_bytes > limit * capacity:
            raise TierError(
                errno.ENOSPC,
                f"{what} would be more than pool {self.name} may promise: its volumes have {format_size(nominal)} of "
                f"at most {format_size(int(limit * capacity))}, {limit:g} times its capacity of "
                f"{format_size(capacity)} (overcommit_limit under [pool] in the configuration): grow the pool, or "
                "delete or shrink a volume",
            )

    def use(self) -> tuple[int, int]:
        """Bytes in use by data and the capacity for it: what `status` says, for who asks often."""
        space, segments = self._engine.space, self._engine.segments
        used = min(space.charged, segments.live - segments.saved + segments.pending)
        return used * BLOCK_BYTES, space.capacity * BLOCK_BYTES

    async def _shrink(self, volume: Volume, size_bytes: int) -> None:
        """Discard the tail. One batch does it, so that no crash leaves the old size without the old bytes."""
        block = size_bytes >> BLOCK_SHIFT
        partial = size_bytes & BLOCK_MASK
        while True:
            self._require_unused(volume, "shrunk")
            entry, data = await volume.edge(block) if partial else (HOLE, b"")
            await volume.admit_unmap((volume.size_bytes >> BLOCK_SHIFT) - block)
            self._require_unused(volume, "shrunk")
            # No checkpoint of trio from here on.
            if not partial or volume.entry_now(block) == entry:
                last = data[:partial].ljust(BLOCK_BYTES, b"\0") if partial and entry != HOLE else None
                volume.shrink_logged(size_bytes, last)
                return

    async def delete_volume(self, name: str, *, snapshots: bool = False, mirrored: bool = False) -> None:
        """Delete a volume that nobody uses; durable when this returns, its space comes back afterwards in slices.

        `snapshots`: and all its snapshots; without this a volume that has some isn't deleted (EBUSY). Clones live on.
        `mirrored`: even one that has a record (`set_mirror`); else EBUSY.
        """
        async with self._ddl:
            volume = self.volume(name)
            family = self._require_deletable(volume, snapshots=snapshots, mirrored=mirrored)
            if volume.has_history or volume.deleted or family:
                act = partial(self._retire_all, name, snapshots=snapshots, mirrored=mirrored)
                await self._engine.lineage.ask(act)
                return
            await self._engine.admit_release()
            self._require_deletable(volume, snapshots=snapshots, mirrored=mirrored)
            self._engine.append_record(Op.DELETE, volume.id)
            self._engine.remove_volume(volume)
            self._engine.space.kick_checkpoint.set()
            hit("delete.logged")
            await self._engine.flusher.flush()
            hit("delete.durable")

    def _retire_all(self, name: str, frozen: Frozen, *, snapshots: bool, mirrored: bool) -> None:
        # Looked for anew: a rollback whose checkpoint was under way has put another volume in its place.
        volume = self.volume(name)
        self._delete_all(self._require_deletable(volume, snapshots=snapshots, mirrored=mirrored), frozen)
        self._engine.lineage.retire(frozen, volume)

    def _require_deletable(self, volume: Volume, *, snapshots: bool, mirrored: bool) -> list[Snapshot]:
        """Raise TierError unless a volume may be deleted; returns its snapshots, which go with it."""
        self._require_plain(volume, "deleted", mirrored=mirrored)
        self._require_unused(volume, "deleted")
        family = self._engine.lineage.of_family(volume)
        if family and not snapshots:
            raise TierError(
                errno.EBUSY,
                f"{volume.name} has {len(family)} snapshot{'s' * (len(family) > 1)}: delete them first, or with it "
                f"(`terrace volume delete --snapshots {volume.name}`)",
            )
        return family

    def _delete_all(self, snapshots: list[Snapshot], frozen: Frozen) -> None:
        for snapshot in snapshots:
            self._require_free(snapshot)
        for snapshot in snapshots:
            self._engine.lineage.delete(frozen, snapshot)

    @staticmethod
    def _require_unused(volume: Volume, done: str) -> None:
        if volume.open_count:
            raise TierError(
                errno.EBUSY,
                f"{volume.name} is in use by {volume.open_count} connection{'s' * (volume.open_count > 1)} "
                f"and can't be {done}: disconnect its clients first",
            )

    # -- snapshots and clones ------------------------------------------------------------------------------------------

    def snapshots(self, volume: str | None = None) -> list[Snapshot]:
        """The snapshots that can be seen, of one volume or of all; by volume, then oldest first. Raises ENOENT."""
        if volume is not None:
            return self._engine.lineage.of_family(self.volume(volume))
        by_family = self._engine.lineage.by_family()
        return [snapshot for one in self.volumes() for snapshot in by_family.get(one.family, ())]

    def snapshot(self, volume: str, name: str) -> Snapshot:
        """The snapshot of that name. Raises TierError ENOENT."""
        found = self._snapshot_of(self.volume(volume), name)
        if found is None:
            raise TierError(
                errno.ENOENT,
                f"{self.name}/{volume} has no snapshot {name!r}: see `terrace snapshot list {self.name}/{volume}`",
            )
        return found

    def _snapshot_of(self, volume: Volume, name: str) -> Snapshot | None:
        return next((s for s in self._engine.lineage.of_family(volume) if s.short_name == name), None)

    async def snapshot_status(self, volume: str | None = None, name: str | None = None) -> list[SnapshotStatus]:
        """What `snapshots` lists, or one, with their sizes: metadata only, and remembered. Raises ENOENT."""
        lineage = self._engine.lineage
        found: list[SnapshotStatus] = []
        of = self.snapshots(volume) if volume is None or name is None else [self.snapshot(volume, name)]
        clones: dict[Snapshot | None, list[Volume]] = {}
        for index, snapshot in enumerate(of):
            if not index % STATUS_STEP:
                await trio.lowlevel.checkpoint()
                clones = lineage.clones_by_origin()
            if snapshot.state != "visible":
                continue
            over = clones.get(snapshot, [])
            exclusive = await exclusive_blocks(snapshot, has_clones=bool(over))
            head = lineage.head_of(snapshot.volume)
            found.append(
                SnapshotStatus(
                    name=snapshot.name,
                    volume=head.name,
                    snapshot=snapshot.short_name,
                    id=snapshot.id,
                    size_bytes=snapshot.size_bytes,
                    referenced_bytes=snapshot.referenced_blocks * BLOCK_BYTES,
                    exclusive_bytes=exclusive * BLOCK_BYTES,
                    shared_bytes=max(0, snapshot.referenced_blocks - exclusive) * BLOCK_BYTES,
                    created_at=snapshot.created_at,
                    held=snapshot.held,
                    open_count=snapshot.open_count,
                    clones=[clone.name for clone in over if not clone.retired],
                )
            )
        return found

    async def take_snapshots(self, wanted: Sequence[tuple[str, str]], *, by_filler: bool = False) -> list[Snapshot]:
        """Snapshots (volume, name) of one instant: all of them, or none. They are durable when this returns.

        Raises TierError: ENOENT, EEXIST, EINVAL for a name, ENOSPC for a pool that is too full to keep what its
        clients will overwrite, EBUSY for a volume that is being filled. `by_filler`: who fills it asks, and knows that
        what it holds at this moment is whole.
        """
        for _, name in wanted:
            validate_name("snapshot", name)
        taken: list[Snapshot] = []

        def act(frozen: Frozen) -> None:
            # Clients wait, and there may be many of both: each is found in one pass.
            heads = {volume.short_name: volume for volume in self.volumes()}
            volumes = [heads.get(volume) or self.volume(volume) for volume, _ in wanted]
            known = self._engine.lineage.by_name()
            for volume, (_, name) in zip(volumes, wanted, strict=True):
                self._require_new_snapshot(volume, name, known)
                if not by_filler:
                    self._require_complete(volume)
            if len({volume.id for volume in volumes}) < len(volumes):
                raise TierError(errno.EINVAL, "a volume is named twice: one snapshot of it is enough")
            now = self._host.now()
            for volume, (_, name) in zip(volumes, wanted, strict=True):
                taken.append(self._engine.lineage.take(frozen, volume, name, now))
            self._engine.count_leaf_pages()

        async with self._ddl:
            self._require_snapshot_room(len(wanted))
            await self._engine.lineage.ask(act)
        return taken

    @staticmethod
    def _require_complete(volume: Volume) -> None:
        """So that every snapshot is of something whole, and what is made of one is."""
        if volume.filling:
            raise TierError(
                errno.EBUSY,
                f"{volume.name} is being filled and not complete, so no snapshot of it can be taken: wait until that "
                f"has ended; if nobody fills it any more, `terrace volume show {volume.name}` says what to do",
            )

    def _require_new_snapshot(
        self, volume: Volume, name: str, known: Mapping[tuple[int, str], Snapshot] | None = None
    ) -> None:
        found = self._snapshot_of(volume, name) if known is None else known.get((volume.family, name))
        if found is not None:
            raise TierError(
                errno.EEXIST,
                f"there is a snapshot {volume.name}@{name} already: choose another name, or delete it first",
            )
        if volume.taking is not None:
            raise TierError(errno.EBUSY, f"another snapshot of {volume.name} is being taken: try again")

    def _require_snapshot_room(self, count: int) -> None:
        """A snapshot takes no space by itself, but in a full pool the next overwrite would be refused."""
        space = self._engine.space
        needed = SNAPSHOT_ROOM_SLOTS * count
        if space.available < needed:
            raise TierError(
                errno.ENOSPC,
                f"the pool {self.name} is too full for a snapshot: what is overwritten from then on takes space, and "
                f"{format_size(space.available * BLOCK_BYTES)} of the {format_size(needed * BLOCK_BYTES)} that must be "
                f"there are left, so {format_size((needed - space.available) * BLOCK_BYTES)} are missing: delete "
                "snapshots or volumes, trim, or grow it",
            )

    async def delete_snapshot(self, volume: str, name: str) -> None:
        """Delete a snapshot; durable when this returns. Its space comes back afterwards, in slices.

        Raises TierError: ENOENT, EBUSY while somebody reads it or it is held.
        """
        await self.delete_snapshots([(volume, name)])

    async def delete_snapshots(self, wanted: Sequence[tuple[str, str]]) -> None:
        """Delete snapshots (volume, name) with one checkpoint: all of them, or none. Else as `delete_snapshot`."""

        def act(frozen: Frozen) -> None:
            heads = {volume.short_name: volume.family for volume in self.volumes()}
            known = self._engine.lineage.by_name()
            # What isn't known is refused by `snapshot`.
            found = [known.get((heads.get(volume, -1), name)) or self.snapshot(volume, name) for volume, name in wanted]
            self._delete_all(found, frozen)

        async with self._ddl:
            await self._engine.lineage.ask(act)

    @staticmethod
    def _require_free(snapshot: Snapshot) -> None:
        if snapshot.held:
            raise TierError(
                errno.EBUSY,
                f"{snapshot.name} is held and can't be deleted: release it with `terrace snapshot release "
                f"{snapshot.name}`",
            )
        if snapshot.open_count:
            raise TierError(
                errno.EBUSY,
                f"{snapshot.name} is in use by {snapshot.open_count} connection{'s' * (snapshot.open_count > 1)} "
                "and can't be deleted: disconnect its clients first",
            )

    async def change_snapshot(
        self, volume: str, name: str, *, new_name: str | None = None, held: bool | None = None
    ) -> Snapshot:
        """Rename a snapshot, or have it held (not to be deleted) or released; durable when this returns."""
        if new_name is not None:
            validate_name("snapshot", new_name)
        changed: list[Snapshot] = []

        def act(frozen: Frozen) -> None:
            snapshot = self.snapshot(volume, name)
            if new_name is not None and new_name != name:
                self._require_new_snapshot(snapshot.volume, new_name)
                snapshot.short_name = new_name
            if held is not None:
                snapshot.held = held
            frozen.changed.add(snapshot)
            self._engine.lineage.name_family(snapshot.volume.family)
            changed.append(snapshot)

        async with self._ddl:
            await self._engine.lineage.ask(act)
        return changed[0]

    async def clone(self, volume: str, name: str, new_volume: str, policy: str = "") -> Volume:
        """A writable volume that begins as a snapshot is; durable when this returns. Costs the same at any size."""
        validate_name("volume", new_volume)
        made: list[Volume] = []

        def act(frozen: Frozen) -> None:
            snapshot = self.snapshot(volume, name)
            if self._engine.volume_named(new_volume) is not None:
                raise TierError(
                    errno.EEXIST,
                    f"there is a volume {self.name}/{new_volume} already: choose another name, or delete it first",
                )
            self._engine.lineage.require_descent(snapshot)
            self._require_commitment(snapshot.size_bytes, f"a clone {self.name}/{new_volume}")
            recorded = self._engine.require_policy(policy)
            made.append(self._engine.lineage.clone(frozen, snapshot, new_volume, int(self._host.now()), recorded))

        async with self._ddl:
            await self._engine.lineage.ask(act)
        return made[0]

    async def rollback(
        self, volume: str, name: str, *, keep_as: str | None, force: bool = False, mirrored: bool = False
    ) -> Volume:
        """Let a volume be again what it was at a snapshot; durable when this returns. Costs the same at any size.

        `keep_as`: a snapshot of this name keeps what it was before, unless that was being filled (EBUSY). `force`: even
        while it is in use, whose connections get ESTALE from then on. What it is then is complete, as every snapshot
        is; it has neither record nor trackers, and one that has a record (`set_mirror`) is rolled back only with
        `mirrored`. Raises TierError: ENOENT, EEXIST, EBUSY.
        """
        if keep_as is not None:
            validate_name("snapshot", keep_as)
        made: list[Volume] = []

        def act(frozen: Frozen) -> None:
            lineage = self._engine.lineage
            snapshot = self.snapshot(volume, name)
            old = self.volume(volume)
            self._require_plain(old, "rolled back", mirrored=mirrored)
            if not force:
                self._require_unused(old, "rolled back")
            self._engine.lineage.require_descent(snapshot)
            now = self._host.now()
            if keep_as is not None:
                self._require_new_snapshot(old, keep_as)
                self._require_complete(old)
                lineage.take(frozen, old, keep_as, now)
                self._engine.count_leaf_pages()
            new = lineage.clone(frozen, snapshot, old.short_name, old.created_at, old.policy_name)
            new.family = old.family
            lineage.retire(frozen, old)
            made.append(new)

        async with self._ddl:
            await self._engine.lineage.ask(act)
        return made[0]

    async def promote(self, name: str, progress: Callable[[int, int], None] = lambda done, total: None) -> Volume:
        """Make a clone independent of its origin: what it shares is copied, which takes that much space; durable then.

        Clients go on meanwhile; one that was interrupted goes on where it was when it is called again. `progress`:
        bytes copied, of how many. Raises TierError: EINVAL, EBUSY while it has snapshots, ENOSPC.
        """
        volume = self.volume(name)
        if volume.origin is None:
            raise TierError(errno.EINVAL, f"{volume.name} is no clone: it doesn't depend on any snapshot")
        if volume.snapshots:
            # Those from before a rollback are of the family too, but don't stand in the way.
            since = [one for one in self._engine.lineage.of_family(volume) if one in volume.snapshots]
            if not since:
                raise TierError(
                    errno.EBUSY,
                    f"a deleted snapshot of {volume.name} has clones, which depend on its origin as well: promote or "
                    "delete these first",
                )
            shown = ", ".join(one.short_name for one in since[:5]) + f" and {len(since) - 5} more" * (len(since) > 5)
            raise TierError(
                errno.EBUSY,
                f"{volume.name} has {len(since)} snapshot{'s' * (len(since) > 1)} taken since it depends on its "
                f"origin, which depend on that as well: delete them first ({shown}), or promote it before any is taken",
            )
        shared = max(0, volume.referenced_blocks - volume.tree.mapped_blocks)
        if self._engine.space.available < shared:
            missing = shared - self._engine.space.available
            raise TierError(
                errno.ENOSPC,
                f"the pool {self.name} has no room for the {format_size(shared * BLOCK_BYTES)} that {volume.name} "
                f"shares with its origin: {format_size(missing * BLOCK_BYTES)} are missing; delete or trim something, "
                "or grow it",
            )
        volume.acquire()
        try:
            await flatten(volume, lambda done: progress(done * BLOCK_BYTES, shared * BLOCK_BYTES))

            def act(frozen: Frozen) -> None:
                if volume.has_history:
                    raise TierError(
                        errno.EBUSY, f"a snapshot of {volume.name} was taken meanwhile, which depends on its origin"
                    )
                frozen.origins[volume] = None

            async with self._ddl:
                await self._engine.lineage.ask(act)
        finally:
            volume.release()
        return volume

    # -- the pool itself -----------------------------------------------------------------------------------------------

    async def grow(self, devices: Sequence[DeviceSpec], *, force: bool = False) -> None:
        """Add devices to the open pool; they are part of it, durably, when this returns."""
        engine = self._engine
        async with self._growth:
            engine.space.require_writable()
            # Indices are given once: an old log or copy, or the device itself, could still name one.
            used = [device.index for device in engine.devices] + [row.index for row in engine.removed_devices]
            added = await engine.offload(
                partial(
                    self._host.label_devices,
                    engine.pool_name,
                    engine.pool_uuid,
                    list(devices),
                    max(used) + 1,
                    [Path(d.path) for d in engine.devices],
                    force=force,
                )
            )
            hit("grow.labelled")
            opened: list[Device] = []
            try:
                for row in added:
                    device = await engine.offload(self._host.open_device, Path(row.path))
                    opened.append(device)
            except BaseException:
                for device in opened:
                    device.close()
                self._host.wipe_labels([Path(row.path) for row in added])
                raise
            # Nothing may lie on a device that the catalog doesn't know. A transaction of its own, not a checkpoint: the
            # devices that are there may be too full for one.
            try:
                with trio.CancelScope(shield=True):
                    await engine.offload(engine.catalog.add_devices, added)
            except OSError as error:
                _close_devices(opened)
                if error.errno == errno.ENOSPC:
                    self._host.wipe_labels([Path(row.path) for row in added])
                    raise
                # The catalog may know them after a restart: without their labels the pool could not be opened then.
                raise TierError(
                    error.errno or errno.EIO,
                    f"{error.strerror}; after a restart `terrace pool show {self.name}` tells whether "
                    f"{', '.join(row.path for row in added)} became part of it: if not, add it again with --force",
                ) from error
            hit("grow.committed")
            engine.devices.extend(opened)
            for device in opened:
                engine.segments.open_places(device)
            engine.space.measure_devices()
            engine.space.stuck = False
            engine.space.changed()
            engine.space.kick_checkpoint.set()  # the copy of the catalog should know the devices too

    async def checkpoint(self) -> None:
        """Commit a checkpoint now."""
        await self._checkpointer.checkpoint()

    async def check(self, full: bool, progress: Callable[[int, int], None] = lambda done, total: None) -> CheckReport:
        """Verify every invariant of the pool, and the data of a sample or (`full`) of all. Clients go on meanwhile."""
        report = await check_pool(self._engine, self._checkpointer, full=full, progress=progress)
        await self._save_losses()
        return report

    async def losses(self) -> list[Loss]:
        """The byte ranges of volumes that are known to be lost now."""
        await self._engine.losses.refresh(self._engine.owners())
        await self._save_losses()
        return self._engine.losses.listed(self._engine.owners())

    def losses_of(self, volume: Volume) -> list[Loss]:
        """Those of one volume, as they were known last."""
        losses = self._engine.losses
        return losses.listed([volume]) if losses else []

    def lost_blocks(self) -> dict[str, int]:
        """How many blocks of which volumes and snapshots are lost, by name, as it was known last."""
        found: dict[str, int] = {}
        for loss in self._engine.losses.listed(self._engine.owners()):
            found[loss.volume] = found.get(loss.volume, 0) + (loss.length + BLOCK_BYTES - 1) // BLOCK_BYTES
        return found

    async def _save_losses(self) -> None:
        engine = self._engine
        if engine.losses.changed:
            await engine.offload(engine.losses.save, self._directory, engine.losses.encoded(engine.pool_uuid))

    @property
    def no_writes(self) -> str | None:
        """Why the pool takes no writes until it is opened again, or for good; None: it takes them."""
        return self._engine.space.read_only

    def status(self) -> PoolStatus:
        """The numbers of the moment."""
        engine = self._engine
        space = engine.space
        segments = engine.segments
        losses = engine.losses.listed(engine.owners())
        snapshots = engine.lineage.by_family()
        pending_free = sum(segment.slots for segment in segments.idle() if is_free(segment, engine.log.seq))
        return PoolStatus(
            name=self.name,
            uuid=self.uuid,
            state="online" if space.read_only is None else "read-only",
            problem=space.read_only,
            block_size=BLOCK_BYTES,
            size_bytes=segments.total_slots * BLOCK_BYTES,
            capacity_bytes=space.capacity * BLOCK_BYTES,
            used_bytes=self.use()[0],
            available_bytes=space.available * BLOCK_BYTES,
            metadata_bytes=segments.map_live * BLOCK_BYTES,
            reserve_bytes=space.reserve * BLOCK_BYTES,
            nominal_bytes=sum(volume.size_bytes for volume in self.volumes()),
            pending_free_bytes=pending_free * BLOCK_BYTES,
            log_seq=engine.log.seq,
            durable_seq=engine.flusher.durable_seq,
            checkpoint_seq=engine.log.checkpoint_seq,
            checkpoints=self._checkpointer.count,
            checkpoint_failure=self._checkpointer.failure,
            blocks_moved=engine.moved_blocks,
            client_written_bytes=engine.client_written_bytes,
            device_written_bytes=sum(device.written_bytes for device in engine.devices),
            replayed_batches=self.replayed_batches,
            given_up=self.given_up,
            evacuations=self.evacuator.status(),
            losses=losses[:SHOWN_DAMAGE],
            lost_bytes=sum(loss.length for loss in losses),
            scrub=self.scrubber.status(most_damage=SHOWN_DAMAGE),
            uncounted_frees=bool(
                engine.dead
                or self._checkpointer.waiting_deletes()
                or any(v.active.ranges or (v.frozen and v.frozen.ranges) for v in engine.volumes.values())
            ),
            metadata_total_bytes=segments.map_slots * BLOCK_BYTES,
            overcommit_limit=engine.settings.overcommit_limit,
            hit_ratio=self.recorder.hit_ratio if len({d.tier for d in engine.devices}) > 1 else None,
            devices=[
                _device_status(device, segments.device_live[device.index], segments.device_saved[device.index])
                for device in engine.devices
            ],
            volumes=[
                VolumeStatus(
                    v.name,
                    v.size_bytes,
                    min(v.tree.mapped_blocks * BLOCK_BYTES, v.size_bytes),
                    v.open_count,
                    v.policy_name or DEFAULT_NAME,
                    v.policy_missing,
                    v.throttled,
                    v.queued,
                    v.family,
                    _origin_name(v),
                    len(snapshots.get(v.family, ())),
                    v.shown_blocks * BLOCK_BYTES,
                    v.filling,
                    v.healed_blocks,
                )
                for v in self.volumes()
            ],
        )


def _origin_name(volume: Volume) -> str | None:
    """The snapshot below a clone; one that is hidden has no name that anybody knows."""
    origin = volume.origin
    if origin is None:
        return None
    return origin.name if origin.state == "visible" else "(a deleted snapshot)"


def _device_status(device: Device, live: int, saved: int) -> DeviceStatus:
    return DeviceStatus(
        device.path,
        device.tier,
        str(uuids.UUID(bytes=device.label.device_uuid)),
        device.label.size_bytes,
        device.segment_bytes,
        device.segment_count,
        len(device.free),
        live * BLOCK_BYTES,
        "poisoned" if device.poisoned else device.state,
        device.error_count,
        (device.segment_count - len(device.free)) * device.segment_bytes,
        (live + saved) * BLOCK_BYTES,
        device.written_bytes,
    )


# -- opening -------------------------------------------------------------------------------------------


def _close_devices(devices: list[Device]) -> None:
    """Close what the pool has by now: it may have grown."""
    for device in devices:
        device.close()


def _open_devices(host: Host, state: State, give_up: Collection[str]) -> list[Device]:
    """Open every device of the catalog, or none; but not those that were given up as lost, or are given up now."""
    rows = [row for row in state.devices if row.state != "removed"]
    for path in give_up:
        _require_lost(host, state, rows, path)
    if all(row.state == "lost" or row.path in give_up for row in rows):
        raise TierError(
            errno.EINVAL,
            f"the pool {state.pool_name} has no other device: without it nothing is left; `terrace pool delete "
            f"{state.pool_name}` deletes the pool",
        )
    opened: list[Device] = []
    try:
        for row in rows:
            if row.state == "lost" or row.path in give_up:
                if row.state == "lost":
                    _warn_if_back(host, row)
                opened.append(LostDevice(row, state.pool_name, state.pool_uuid))
                continue
            try:
                device = host.open_device(Path(row.path))
            except BadLabelError as error:
                raise TierError(
                    errno.EIO, f"{row.path} can't be opened as device {row.index} of pool {state.pool_name}: {error}"
                ) from None
            opened.append(device)
            device.state = row.state
            _judge_label(device.label, row, state)
            poisoned_by = next((d for d in opened if row.index in d.label.poisoned), None)
            if row.poisoned or poisoned_by:
                device.poisoned = row.poisoned or "it failed a flush in an earlier run"
    except BaseException:
        for device in opened:
            device.close()
        raise
    for device in opened:
        if device.state != "lost" and any(device.index in other.label.poisoned for other in opened):
            device.poisoned = device.poisoned or "it failed a flush in an earlier run"
    return opened


def _require_lost(host: Host, state: State, rows: list[DeviceRow], path: str) -> None:
    """Raise TierError unless a device of the pool may be given up: who can still read it evacuates it."""
    row = next((row for row in rows if row.path == path), None)
    if row is None:
        known = ", ".join(row.path for row in rows)
        raise TierError(errno.ENOENT, f"the pool {state.pool_name} has no device {path}: its devices are {known}")
    if row.poisoned or row.state == "lost":
        return
    try:
        device = host.open_device(Path(path))
    except (BadLabelError, OSError):
        return
    uuid = device.label.device_uuid
    device.close()
    if uuid == row.uuid:
        raise TierError(
            errno.EEXIST,
            f"{path} is there: evacuate it without --lost, which saves what can be read; to give it up nevertheless "
            "detach it first",
        )


def _warn_if_back(host: Host, row: DeviceRow) -> None:
    with contextlib.suppress(BadLabelError, OSError):
        device = host.open_device(Path(row.path))
        uuid = device.label.device_uuid
        device.close()
        if uuid == row.uuid:
            logger.warning(
                "%s is there again, but was given up as lost: it isn't used, since the pool has gone on without it",
                row.path,
            )


def _wipe_removed(host: Host, rows: Sequence[DeviceRow]) -> None:
    """A crash may have come between the checkpoint that removed an empty device and the wiping of its label."""
    for row in rows:
        if row.poisoned is not None:
            continue
        with contextlib.suppress(BadLabelError, OSError):
            device = host.open_device(Path(row.path))
            try:
                if device.label.device_uuid == row.uuid:
                    device.erase_label_now()
            finally:
                device.close()


def _judge_label(label: Label, row: DeviceRow, state: State) -> None:
    if label.pool_uuid != state.pool_uuid:
        raise TierError(
            errno.EIO,
            f"{row.path} belongs to another pool ({label.pool_name!r}), not to {state.pool_name}: attach the "
            f"right device there",
        )
    if label.device_index != row.index or label.device_uuid != row.uuid:
        raise TierError(
            errno.EIO,
            f"{row.path} is device {label.device_index} of pool {state.pool_name}, not device {row.index}: "
            f"it is attached twice or under another's path",
        )
    if (label.size_bytes, label.segment_bytes, label.tier) != (row.size_bytes, row.segment_bytes, row.tier):
        raise TierError(
            errno.EIO,
            f"{row.path}: its label says {label.size_bytes} bytes, segments of {label.segment_bytes}, {label.tier}; "
            f"the catalog of pool {state.pool_name} says {row.size_bytes}, {row.segment_bytes}, {row.tier}: one of "
            "them is damaged; restore it from a copy",
        )
    if label.checkpoint_seq > state.position.checkpoint_seq:
        raise TierError(
            errno.ESTALE,
            f"the catalog of pool {state.pool_name} is older than its devices (checkpoint "
            f"{state.position.checkpoint_seq}, {row.path} knows "
            f"{label.checkpoint_seq}): it was restored from a backup; put the newest catalog back, or rebuild "
            f"it with `terrace pool check {state.pool_name} --rebuild-catalog`",
        )


async def _recover(
    directory: Path,
    state: State,
    devices: list[Device],
    catalog: CatalogStore,
    settings: PoolSettings,
    host: Host,
    offload: Offload,
    *,
    truncate_log: bool,
    give_up_map: bool,
    events: Events,
) -> Pool:
    position = state.position
    engine = Engine(
        state.pool_name,
        state.pool_uuid,
        devices,
        catalog,
        settings,
        offload,
        host.preadv,
        host.now,
        incarnation=position.incarnation + 1,
        seq=position.checkpoint_seq,
        prev_check=0,
    )
    checkpointer = Checkpointer(engine)
    engine.checkpoint = checkpointer.checkpoint
    engine.reuse = checkpointer.reuse
    await offload(engine.losses.load, directory, state.pool_uuid)  # a replay adds to them
    scrubber = Scrubber(engine, ScrubFile(directory, state.pool_uuid))
    recorder = Recorder(engine, HeatFile(directory, state.pool_uuid), host)
    pool = Pool(engine, checkpointer, Cleaner(engine), scrubber, recorder, host, directory, events)
    engine.save_losses = pool._save_losses
    engine.removed_devices = [row for row in state.devices if row.state == "removed"]
    restore(engine, state)
    hit("recovery.restored")
    checkpointer.copies.begin(state)
    for device in devices:
        if not device.poisoned:
            try:
                await device.sync()
            except OSError as error:
                device.poisoned = f"it failed a flush when the pool was opened ({error})"
                await engine.poisoned(device)
    hit("recovery.synced")
    poisoned = [device for device in devices if device.poisoned]
    begun = time.monotonic()
    result = await replay(engine, state, truncate_log=truncate_log)
    pool.replayed_batches = result.batches
    pool.given_up = result.given_up
    for problem in result.problems:
        logger.warning("%s", problem)
    await checkpointer.copies.settle(position)
    engine.segments.rebuild_free()
    hit("recovery.replayed")
    # Ids that were given out after the checkpoint and are not in the log must not be used again either.
    engine.segments.next_id += sum(device.segment_count for device in devices) + 1
    if poisoned:
        engine.space.read_only = (
            f"the pool {state.pool_name} takes no writes: {poisoned[0].path} is poisoned, {poisoned[0].poisoned}; "
            "copy what you need and replace it"
        )
        return pool
    if give_up_map:
        pool._lost_pages = await lostpages.give_up_pages(engine)
    try:
        engine.log.start()
        hit("recovery.started")
        await pool._checkpoint_alone()
        hit("recovery.checkpointed")
    except OSError as error:
        engine.space.read_only = ends_writing(state.pool_name, "the checkpoint after its recovery failed", error)
        logger.error("%s", engine.space.read_only)
    if result.batches:
        logger.info(
            "pool %s: replayed %d batches (%d blocks) in %.2f s; the log ended: %s",
            state.pool_name,
            result.batches,
            result.blocks,
            time.monotonic() - begun,
            result.dropped,
        )
    return pool


# -- making devices --------------------------------------------------------------------------------------


def _create_blocking(directory: Path, name: str, specs: list[DeviceSpec], force: bool) -> None:
    if (directory / CATALOG_NAME).exists():
        raise TierError(errno.EEXIST, f"there is a pool {name} already: choose another name, or delete that pool first")
    pool_uuid = uuids.uuid4().bytes
    rows = label_devices(name, pool_uuid, specs, 0, [], force)
    existed = directory.exists()
    try:
        Catalog.create(directory, name, pool_uuid, rows, Position(0, 0, 0, 0, 0, 1, 1))
    except BaseException:
        if not existed:
            shutil.rmtree(directory, ignore_errors=True)
        wipe_labels([Path(row.path) for row in rows])
        raise


def _destroy_blocking(directory: Path) -> None:
    with locked(directory):
        paths: list[Path] = []
        try:
            catalog = Catalog(directory)
            try:
                state = catalog.load()
                for row in [row for row in state.devices if row.state != "removed"]:
                    with contextlib.suppress(OSError, BadLabelError):
                        label = read_label(Path(row.path))
                        if (label.pool_uuid, label.device_uuid) == (state.pool_uuid, row.uuid):
                            paths.append(Path(row.path))
            finally:
                catalog.close()
        except TierError as error:
            logger.warning("%s; its devices keep their labels", error)
        wipe_labels(paths)
        shutil.rmtree(directory)
