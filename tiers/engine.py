"""The parts of an open pool, wired together: what volumes, the checkpoint, the cleaner and recovery share.

The engine owns no policy. It knows the devices, the segment table, the log, the flusher, the volumes and the space
accounting, and offers the few operations that need several of them at once. `pool.py` builds one and runs its tasks.
"""

import difflib
import errno
import logging
from collections.abc import Awaitable, Callable, Mapping

import trio

from tiers.bypass import Bypass
from tiers.catalog import DeviceRow
from tiers.device import Device, Offload
from tiers.errors import NoRoomError, TierError
from tiers.failpoint import hit
from tiers.flush import Flusher
from tiers.frames import FrameCache
from tiers.heat import Heat
from tiers.host import CatalogStore, Preadv
from tiers.layout import BAD, BLOCK_MASK, BLOCK_SHIFT
from tiers.lineage import Lineage
from tiers.log import Log
from tiers.losses import Losses
from tiers.maptree import FANOUT_BITS, ROOT_LEVEL, MapTree, PageCache
from tiers.migration import Migration
from tiers.policy import DEFAULT, DEFAULT_NAME, Policy
from tiers.promotion import Promoter
from tiers.record import Kind, Op
from tiers.relocation import Relocations
from tiers.segments import Segment, SegmentTable
from tiers.settings import PoolSettings
from tiers.snapshot import Snapshot, Views
from tiers.space import Space
from tiers.temperature import Temperature, judge_of
from tiers.volume import Volume

logger = logging.getLogger(__name__)


MOST_CHECKPOINTS = 2
"""So many are made to find room for map pages before it is given up."""
VIEWS_DIVISOR = 4
"""Leaves that snapshots and clones were composed of may take this part of the map's cache, besides it."""

Dead = tuple[int, int, int]
"""(check, level, volume) of the root page of a detached subtree."""


class Engine:
    """See the module. All of it belongs to the trio thread."""

    def __init__(
        self,
        pool_name: str,
        pool_uuid: bytes,
        devices: list[Device],
        catalog: CatalogStore,
        settings: PoolSettings,
        offload: Offload,
        preadv: Preadv,
        now: Callable[[], float],
        *,
        incarnation: int,
        seq: int,
        prev_check: int,
    ) -> None:
        self.pool_name = pool_name
        self.pool_uuid = pool_uuid
        self.devices = devices
        self.catalog = catalog
        self.settings = settings
        self.offload = offload
        self.preadv = preadv
        self.segments = SegmentTable(devices, pool_name)
        self.segments.clock = trio.current_time
        self.log = Log(self.segments, pool_uuid, incarnation, seq, prev_check)
        self.removed_devices: list[DeviceRow] = []
        """What the catalog remembers of devices that are no longer part of the pool."""
        self.losses = Losses()
        self.flusher = Flusher(
            self.devices,
            lambda: self.log.appended_seq,
            cap_bytes=settings.unsynced_cap_bytes,
            on_poison=self.poisoned,
            on_round=lambda: self.space.changed(),
        )
        self.space = Space(self.segments, self.log, self.flusher, settings)
        self.log.durable_seq = lambda: self.flusher.durable_seq
        self.log.pick_device = lambda: self.space.pick_device(Kind.LOG)
        self.log.pick_first_device = self._pick_first_device
        self.log.on_broken = lambda: self.space.kick_checkpoint.set()
        self.cache = PageCache(settings.map_cache_bytes)
        self.views = Views(settings.map_cache_bytes // VIEWS_DIVISOR)
        self.relocations = Relocations(self.segments)
        self.lineage = Lineage(self)
        self.policies: dict[str, Policy] = {}
        """What the names of policies mean; a name that isn't here means the default."""
        self.heat = Heat(settings.heat_bytes, sum(d.segment_count * d.segment_bytes >> BLOCK_SHIFT for d in devices))
        self.volumes: dict[int, Volume] = {}
        self.graveyard: list[Volume] = []
        self.next_volume_id = 1
        self.dead: dict[int, Dead] = {}
        """Detached subtrees by the address of their root page."""
        self.frames = FrameCache()
        self.forced: dict[int, set[int]] = {}
        """Map pages that the next checkpoint must write elsewhere: volume -> page keys."""
        self.checkpoint: Callable[[], Awaitable[None]]
        self.reuse: Callable[[list[Segment]], Awaitable[int]]
        self.save_losses: Callable[[], Awaitable[None]]
        self.temperature = Temperature(self.heat)
        self.migration = Migration(now)
        self.promoter = Promoter(self, judge_of(self.temperature))
        self.bypass = Bypass(self)
        self.client_written_bytes = 0
        self.moved_blocks = 0
        self.checkpoint_log_mark = 0

    # -- volumes -------------------------------------------------------------------------------------------------

    def volume_named(self, name: str) -> Volume | None:
        """The volume of that short name."""
        volumes = self.volumes.values()
        return next((volume for volume in volumes if volume.short_name == name and not volume.retired), None)

    def add_volume(
        self, volume_id: int, name: str, size_bytes: int, root: tuple[int, int], created_at: float
    ) -> Volume:
        """Enter a volume into the tables: created, or told of by the catalog or the log."""
        volume = self.make_volume(volume_id, name, size_bytes, root, created_at)
        self.enter_volume(volume)
        return volume

    def make_volume(
        self, volume_id: int, name: str, size_bytes: int, root: tuple[int, int], created_at: float
    ) -> Volume:
        """A volume that isn't in the tables yet; its id is taken."""
        tree = MapTree(f"{self.pool_name}/{name}", self.segments, self.cache, root)
        self.next_volume_id = max(self.next_volume_id, volume_id + 1)
        return Volume(self, volume_id, name, size_bytes, tree, created_at)

    def enter_volume(self, volume: Volume) -> None:
        """Enter a volume into the tables."""
        self.volumes[volume.id] = volume
        self.apply_policy(volume)
        self.count_leaf_pages()

    def owner_of(self, owner_id: int) -> Volume | Snapshot | None:
        """The volume or snapshot of that id, whose tree has the pages that bear it."""
        return self.volumes.get(owner_id) or self.lineage.snapshots.get(owner_id)

    def owners(self) -> list[Volume | Snapshot]:
        """All that have a tree."""
        return [*self.volumes.values(), *self.lineage.snapshots.values()]

    def relocate(self, volume: Volume, block: int, old: int, address: int, check: int) -> None:
        """A block lies elsewhere, whoever of the volume and its snapshots names it. Also the replay's way in.

        No checkpoint of trio since the record was logged.
        """
        space = self.space
        entry = volume.active.get(block)
        if entry is not None and entry[0] == old:
            before = volume.active.weight
            volume.active.put(block, address, check)
            self.segments.drop_pending([old])
            if address != BAD:
                self.segments.add_pending(address, 1)
            space.active_weight += volume.active.weight - before
        else:
            space.active_weight += self.relocations.add(volume, block, old, address, check)

    def remove_volume(self, volume: Volume) -> None:
        """Take a volume out of the tables; the next checkpoint gives its map to the dead list."""
        volume.deleted = volume.gone = True
        del self.volumes[volume.id]
        self.lineage.disinherit(volume)
        self.heat.extents.forget(volume.id)
        self.migration.forget(volume.id)
        self.graveyard.append(volume)
        self.count_leaf_pages()

    def resized(self, volume: Volume, size_bytes: int) -> None:
        """A RESIZE record took effect."""
        if size_bytes < volume.size_bytes:
            self.heat.extents.forget(volume.id, size_bytes + BLOCK_MASK >> BLOCK_SHIFT)
        volume.size_bytes = size_bytes
        self.count_leaf_pages()

    def require_policy(self, name: str) -> str:
        """How a policy of that name is recorded: as itself, the default one as nothing. Raises ENOENT."""
        if name in ("", DEFAULT_NAME):
            return ""
        if name not in self.policies:
            near = difflib.get_close_matches(name, self.policies, n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise TierError(
                errno.ENOENT,
                f"there is no policy {name!r}: {meant}`terrace policy list` shows those that exist; a new one is "
                "written into the configuration and comes with `terrace policy reload`",
            )
        return name

    def define_policies(self, policies: Mapping[str, Policy]) -> None:
        """What the names of policies mean from now on. No checkpoint of trio in here."""
        self.policies = dict(policies)
        for volume in self.volumes.values():
            self.apply_policy(volume)
            if volume.policy_missing:
                logger.warning(
                    "volume %s has the policy %r, which is not defined: it runs with the default policy; define it, "
                    "or give the volume another with `terrace volume policy`",
                    volume.name,
                    volume.policy_name,
                )

    def apply_policy(self, volume: Volume) -> None:
        """Let a volume obey the policy that it has by name."""
        default = self.policies.get(DEFAULT_NAME, DEFAULT)
        policy = self.policies.get(volume.policy_name, default) if volume.policy_name else default
        volume.policy_missing = volume.policy_name not in ("", *self.policies)
        if policy != volume.policy:
            volume.obey(policy)
            self.space.changed()
            self.space.kick_cleaner.set()

    def compression_of(self, volume: Volume) -> int:
        """The zstd level for a volume's blocks on the base tier; 0: they are not compressed."""
        level = self.settings.compression_level
        return volume.policy.compression_level if level is None else level

    def count_leaf_pages(self) -> None:
        total = 0
        for volume in self.volumes.values():
            leaves = (volume.size_bytes >> 20) + 1
            pages = leaves + leaves // 200 + 5
            total += pages
            if volume.has_history:  # what keeps what was there; and what moves in the trees of others
                kept = pages if volume.kept is None else len(volume.kept)
                total += pages + kept + kept // 64 + (ROOT_LEVEL + 1) * len(volume.snapshots)
        self.space.leaf_pages = total
        self.space.trees_touched = 2 if any(volume.has_history for volume in self.volumes.values()) else 1

    # -- the log -------------------------------------------------------------------------------------------------

    def log_room(self) -> int:
        """Slots for the next batch, after rolling to a fresh segment if only scraps are left. Raises ENOSPC."""
        if self.log.head_room < 2:
            self.log.roll()
            if self.space.cleaning_needed() is not None:
                self.space.kick_cleaner.set()
        return self.log.head_room

    def append_record(self, op: Op, subject: int, a: int = 0, b: int = 0, extra: list[int] | None = None) -> None:
        """Append a batch of one operation without data."""
        self.append_records([op << 56 | subject, a, b], extra)

    def append_records(self, ops: list[int], extra: list[int] | None = None) -> None:
        """Append a batch of operations without data: all of them happen, or none."""
        self.log_room()
        self.log.append(ops, [], [], extra)
        hit("record.appended")
        self.appended()

    def appended(self) -> None:
        """After each append: ask for a checkpoint when enough has gathered for one."""
        space = self.space
        if (
            space.active_weight * 2 > self.settings.overlay_entries
            or self.log.appended_bytes - self.checkpoint_log_mark > self.settings.checkpoint_log_bytes
        ):
            space.kick_checkpoint.set()

    async def admit_release(self, pages: int = 0, *, kept_anyway: bool = False) -> None:
        """Wait until a trim, delete or the like may be logged. Raises EROFS.

        `pages`: so many map pages it may take besides, and not give back; raises NoRoomError if there is no room for
        them, for then it would not help anybody, and what does help would have to wait. `kept_anyway`: they are among
        those that the next checkpoint has by its entries. When this returns nothing has happened since that was found.
        """
        checkpoints = 0
        while True:
            self.space.require_writable()
            if self.may_release():
                if not pages:
                    return
                if self.space.has_room_for_pages(pages):
                    self.space.active_pages += 0 if kept_anyway else pages
                    return
            elif not (pages and self.space.stuck):
                await self.space.wait(for_release=True)
                continue
            if checkpoints == MOST_CHECKPOINTS:
                raise NoRoomError(
                    f"the pool {self.pool_name} has no room for the map of what snapshots keep of so long a range "
                    f"({pages} pages): delete snapshots, or grow it (`terrace pool grow`)"
                )
            checkpoints += 1
            await self.checkpoint()

    def may_release(self) -> bool:
        """Whether a trim, delete or the like may be logged now."""
        space = self.space
        return space.active_weight + space.frozen_weight < self.settings.overlay_entries and space.admit_release()

    # -- the end -------------------------------------------------------------------------------------------------

    def retire(self) -> None:
        """The devices are about to be closed: whoever still has a volume gets errors, never another file's bytes."""
        closed = f"the pool {self.pool_name} was closed"
        self.space.read_only = self.space.read_only or closed
        self.flusher.fail(TierError(errno.EIO, closed))
        for segment in self.segments.by_id.values():
            segment.fd = -1
        self.frames.clear()
        for volume in self.volumes.values():
            volume.obey(DEFAULT)  # nobody waits for limits any more
        self.space.changed()

    def _pick_first_device(self) -> Device | None:
        """Where a life's log begins: what the checkpoint after it needs must remain free."""
        space = self.space
        device = space.pick_device(Kind.LOG, keep_slots=space.first_keep_slots())
        if device is None:
            # The usual bound counts weights, and is far too high for patches: so count the pages themselves.
            device = space.pick_device(Kind.LOG, keep_slots=self._dirty_pages() + space.copy_slots)
        return device

    def _dirty_pages(self) -> int:
        """Slots at most that a checkpoint of what the overlays hold takes for map pages."""
        pages = sum(map(len, self.forced.values()))
        for volume in self.volumes.values():
            for layer in (volume.active, volume.frozen):
                if layer is None:
                    continue
                indices = layer.named_leaves()
                for _ in range(ROOT_LEVEL + 1):
                    pages += len(indices)
                    indices = {index >> FANOUT_BITS for index in indices}
                pages += 2 * (ROOT_LEVEL + 1) * len(layer.ranges)
        return pages + pages // 16 + 2 * (ROOT_LEVEL + 1) * len(self.volumes)

    # -- failures ------------------------------------------------------------------------------------------------

    async def poisoned(self, device: Device) -> None:
        """A device failed a flush: no more writes to the pool, and the other devices and the catalog remember why."""
        self.space.read_only = (
            f"the pool {self.pool_name} takes no writes: {device.path} is poisoned, {device.poisoned}; "
            "copy what you need and replace it"
        )
        bits = frozenset(d.index for d in self.devices if d.poisoned)
        hit("poison.found")
        try:
            await self.offload(self.catalog.mark_poisoned, device.index, str(device.poisoned))
        except TierError as error:
            logger.error("%s", error)
        hit("poison.recorded")
        for other in list(self.devices):
            if not other.poisoned and other.state != "lost":
                try:
                    other.write_label(other.label.next(poisoned=bits))
                    await other.sync()
                except OSError as error:
                    logger.error("%s", error)
                    other.poisoned = f"a flush failed ({error})"
        hit("poison.labelled")
        self.space.changed()

    def device_by_index(self, index: int) -> Device:
        """The device of that index. Raises TierError EIO if the pool has none such."""
        for device in self.devices:
            if device.index == index:
                return device
        raise TierError(errno.EIO, f"the pool {self.pool_name} has no device {index}: run `terrace pool check`")
