"""Space: who may take how much of a pool, and what is kept back so that a full pool still works.

Two questions are asked before a client's write is logged.

Is there *capacity*? Blocks that are live, counted exactly at each checkpoint, plus an upper bound (`charged`) on what
has come since, must stay under the pool's capacity: its slots less a margin in which the cleaner can always make
progress. A write over space that the volume already owns charges nothing when the pool is tight, so overwriting goes on
in a full pool. No capacity means ENOSPC.

Is there *room* now? Free slots must cover the write and a reserve that clients never get: the cleaner's open segments,
the map pages that the next checkpoint may have to write, and one segment for trims and deletes. No room means waiting:
the cleaner and the checkpoint are making some. Where that takes them long, writes that there is room for are held to a
pace (`tiers.pace`), so that none has to wait for all of it.
"""

import errno
from collections.abc import Callable, Sequence

import trio

from tiers.device import Device
from tiers.errors import NoRoomError, TierError
from tiers.flush import Flusher
from tiers.layout import BLOCK_BYTES, BLOCK_SHIFT, MIN_SEGMENT_BYTES
from tiers.log import Log
from tiers.pace import Pace
from tiers.placement import FAST_BEGIN_SHARE, Move, TierUse, decide, rest_ratio
from tiers.record import Kind
from tiers.segments import SegmentTable
from tiers.settings import PoolSettings

CAPACITY_SHARE = 0.93
"""Live blocks over slots: the headers of full segments take 1.2 %, and cleaning needs victims that aren't full."""

MAP_SLACK_SEGMENTS = 5
"""Dead slots that map segments may hold beyond as many as live ones, in segments."""
ALWAYS_KEPT_DIVISOR = 64
OPEN_SEGMENTS = 4
"""The log's head, the cleaner's outputs and the copy of the catalog: neither free nor full. See `packed_outputs`."""
MARGIN_DIVISOR = 128
"""The cleaner begins so much of the pool before its clients would have to wait: each slot that isn't used adds to what
has to be moved. In a pool of few segments the smallest round needs more."""
BASE_KEEPS_SEGMENTS = 3
"""Free base segments that demotion leaves to the compaction of base."""
LOG_KEEPS_SEGMENTS = 2
"""Fast segments that clients' writes leave, while the cleaner is making more: for its records and copies."""

QUEUE_PAUSE_S = 0.02
QUEUE_LOOK_S = 1.0
"""How long a write that found no room waits before it is tried again: at least, and by itself."""


class Space:
    """Admission and placement for one pool. All of it is arithmetic on counters; nothing here waits but `wait`."""

    def __init__(self, segments: SegmentTable, log: Log, flusher: Flusher, settings: PoolSettings) -> None:
        self.read_only: str | None = None
        self.stuck = False
        """The cleaner can't help: set by it, in force while the last admission failed for want of room."""
        self.short = False
        self.spilling = False
        """The cleaner can't free fast segments: the log goes on to base rather than have writers wait for nothing."""
        self.cleaning = False
        """The cleaner is at work: it goes on beyond the mark at which it began."""
        self.checkpoint_failure: OSError | None = None
        self.active_weight = 0
        self.frozen_weight = 0
        self.active_charge = 0
        self.frozen_charge = 0
        self.active_pages = 0
        self.frozen_pages = 0
        """Map pages besides: what long trims may make of what snapshots keep."""
        self.passing_charge = 0
        """Of streams on their way to base: a freeze doesn't cover them, the map doesn't name them yet."""
        self.staged_entries = 0
        """Blocks that the cleaner is about to move: entries to come."""
        self.evacuated_entries = 0
        """The same for evacuations, and the map pages that are to be written elsewhere."""
        self.trees_touched = 1
        """Trees in which an entry may touch pages: two where there are snapshots, which keep what was there."""
        self.leaf_pages = 0
        """Leaf pages that all volumes together could have: a bound on what a checkpoint writes."""
        self.wanted_slots = 0
        """Free slots that an evacuation waits for: the cleaner works until there are so many."""
        self.kick_checkpoint = trio.Event()
        self.kick_cleaner = trio.Event()
        self._segments = segments
        self._log = log
        self._flusher = flusher
        self._settings = settings
        self._changed = trio.lowlevel.ParkingLot()
        self.pace = Pace()
        self._line = trio.Lock()
        """Those who are out of pace, in the order in which they go."""
        self._out_of_pace = False
        """The last admission failed for that alone."""
        self._paid_bytes = 0
        """How long the log was when the pace was told of it."""
        self.waiters = 0
        self.queued = 0
        """Writes that found the pool full and wait for room, as their volumes' policies say."""
        self.largest_segment_slots = 0
        self.packed_outputs = 0
        """Segments of packed data that may be open besides the cleaner's other outputs."""
        self.copy_slots = 0
        """What a fresh set of segments for a copy of the catalog takes: without the copy nothing is ever freed."""
        self.measure_devices()

    # -- arithmetic --------------------------------------------------------------------------------------------

    def measure_devices(self) -> None:
        """Take the devices' sizes in: when the pool is opened, and when it grew or a device's state has changed."""
        online = [device.segment_bytes for device in self._segments.devices if device.state == "online"]
        self.largest_segment_slots = max(online, default=MIN_SEGMENT_BYTES) // BLOCK_BYTES
        self.copy_slots = max(self.copy_slots, self.largest_segment_slots)
        tiers = {device.tier for device in self._segments.devices if device.state == "online"}
        self.packed_outputs = int("base" in tiers)

    def next_pages(self, more_entries: int = 0) -> int:
        """Slots that the next checkpoints take for map pages at the worst, once `more_entries` have been added.

        An entry may touch a leaf of its own and an inner page, in each of the trees that it concerns; no more pages can
        be touched than there are. Entries come after the space was given out, so as many pages as all volumes have
        (within reason) are kept always.
        """
        entries = self.active_weight + self.frozen_weight + self.staged_entries + self.evacuated_entries + more_entries
        always = self._segments.total_slots // ALWAYS_KEPT_DIVISOR
        pages = min(max(2 * self.trees_touched * entries, always), self.leaf_pages) + 64
        return pages + pages // 16 + self.active_pages + self.frozen_pages

    def map_reserve(self, more_entries: int = 0) -> int:
        """Slots that map segments may still come to take in the long run.

        They hold up to as much dead as live (the cleaner sees to that) and some segments more; what they hold already
        isn't free any more, so it needs no reserve.
        """
        pages = self.next_pages(more_entries)
        segments = self._segments
        quota = 2 * segments.map_live + pages + MAP_SLACK_SEGMENTS * self.largest_segment_slots
        return max(pages, quota - segments.map_slots)

    @property
    def reserve(self) -> int:
        """Slots that clients' writes never get, besides the map's: what the smallest round of the cleaner needs.

        An output segment and the rounding to it, the map pages that its moves touch (two segments), one segment for
        the log, one for the log of a recovery, and one for trims; and what the next copy of the catalog needs. Where
        there is a base tier, an output segment of packed data too.
        """
        return (7 + self.packed_outputs) * self.largest_segment_slots + self.copy_slots

    def keep_slots(self, kind: Kind) -> int:
        """Free slots that must remain after a segment of this kind was taken.

        Without a checkpoint nothing is ever freed, so its copy comes first, and its map pages before all the rest. A
        crash costs the rest of the open segments, and recovery takes one for the log. The cleaner leaves one more, for
        its own MOVE records and trims.
        """
        if kind is Kind.CATALOG:
            return 0
        if kind is Kind.MAP:
            return self.copy_slots
        return self.first_keep_slots() + (1 if kind is Kind.LOG else 2) * self.largest_segment_slots

    def first_keep_slots(self) -> int:
        """The same for the first segment of a life's log: what the checkpoint that ends the recovery needs."""
        return self.next_pages() + self.copy_slots

    @property
    def capacity(self) -> int:
        """How many slots of live data the pool admits."""
        segments = self._segments
        open_segments = OPEN_SEGMENTS + self.packed_outputs
        kept = self.reserve + (MAP_SLACK_SEGMENTS + open_segments) * self.largest_segment_slots
        return max(0, int(segments.total_slots * CAPACITY_SHARE) - kept - 2 * segments.map_live)

    @property
    def charged(self) -> int:
        """Upper bound of the slots that live data blocks stand for."""
        logged = self.active_charge + self.frozen_charge + self.passing_charge
        return self._segments.live - self._segments.saved + logged

    @property
    def available(self) -> int:
        """Blocks that new data may still take."""
        return max(0, self.capacity - self.charged)

    def low_slots(self) -> int:
        """Below this many free slots in all, the cleaner works."""
        return max(self.reserve + self.map_reserve() + self._margin(), self.wanted_slots)

    def _margin(self) -> int:
        return max(self._segments.total_slots // MARGIN_DIVISOR, 4 * self.largest_segment_slots)

    # -- admission ----------------------------------------------------------------------------------------------

    def admit(self, blocks: int, new_blocks: int, *, spare: int = 0) -> bool:
        """Whether `blocks` may be logged now, of which `new_blocks` (at most) are not the volume's yet.

        `spare`: so many more there must be room for.
        """
        self._out_of_pace = False
        if (
            self.read_only is not None
            or self.active_weight + blocks > self._settings.overlay_entries - self.frozen_weight
            or (new_blocks and self.charged + new_blocks > self.capacity)
            or not self._flusher.room()
        ):
            return False
        reserve = self.reserve + self.map_reserve(blocks)
        return self._room_for(blocks + spare, reserve) and self._fast_room_for(blocks) and self._keeps_pace(reserve)

    def admit_release(self) -> bool:
        """Whether a trim or delete may be logged now: these may use the last segment."""
        kept = self.keep_slots(Kind.LOG) + 64
        return self.read_only is None and self._flusher.room() and self._room_for(1, kept)

    def has_room_for_pages(self, pages: int) -> bool:
        """Whether the next checkpoint may take so many more slots for map pages."""
        kept = self.keep_slots(Kind.LOG) + pages // 16 + 2 * self.largest_segment_slots
        return self._segments.free_slots - kept >= pages

    def _room_for(self, blocks: int, reserve: int) -> bool:
        self.short = not self._has_slots(blocks, reserve)
        if self._log.broken:
            self.kick_checkpoint.set()
            return False
        if self.short:
            self.kick_cleaner.set()  # which asks for a checkpoint if that is what helps
            return False
        return True

    def _has_slots(self, blocks: int, reserve: int) -> bool:
        headers = 2 + blocks // 128
        return self._room(reserve) >= blocks + headers

    def _room(self, reserve: int) -> int:
        """Slots that clients may take before they reach what is kept from them."""
        return self._segments.free_slots + self._log.head_room - reserve

    def _keeps_pace(self, reserve: int) -> bool:
        """Whether a write that there is room for keeps the pace, where there is one."""
        room = self._room(reserve)
        self._pay(room)
        self._out_of_pace = self._is_paced(room) and not self.pace.may_go(trio.current_time())
        return not self._out_of_pace

    def _pay(self, room: int) -> None:
        """Tell the pace what was logged since this was asked last; what came while there was none is free."""
        logged = self._log.appended_bytes
        slots, self._paid_bytes = logged - self._paid_bytes >> BLOCK_SHIFT, logged
        if slots and self._is_paced(room):
            self.pace.took(slots, room + slots, self._margin(), trio.current_time())

    def _is_paced(self, room: int) -> bool:
        """Whether so little room is left that the cleaner works to make more, and its rounds are long."""
        return room < self._margin() and self.pace.spread_s > 0

    def _fast_room_for(self, blocks: int) -> bool:
        """Whether the log can stay on the fast tier: base is slow, and clients' flushes should not need it."""
        if self.spilling or blocks + 2 + blocks // 128 <= self._log.head_room:
            return True
        fast = free = 0
        for device in self._segments.devices:
            if device.tier == "fast":
                fast += 1
                slots = device.segment_bytes >> BLOCK_SHIFT
                free += max(0, len(device.free) - LOG_KEEPS_SEGMENTS) * slots
        if not fast or free > blocks:
            return True
        self.kick_cleaner.set()
        return False

    def require_writable(self) -> None:
        """Raise EROFS if the pool takes no writes any more."""
        if self.read_only is not None:
            raise TierError(errno.EROFS, self.read_only)

    async def wait(self, *, for_release: bool = False) -> None:
        """Wait until a flush, a checkpoint or the cleaner has changed the answer. Raises ENOSPC if none will.

        A trim or delete (`for_release`) is never told that it is hopeless: it is what would help.
        """
        failure = self.checkpoint_failure
        if failure is not None and failure.errno == errno.ENOSPC and not for_release:
            raise NoRoomError(f"nothing can be freed, since checkpoints fail: {failure}")
        if self.stuck and self.short and not for_release:
            raise NoRoomError(
                "the pool is full and nothing in it can be cleaned: delete or trim something, or grow the pool"
            )
        if self.active_weight * 2 > self._settings.overlay_entries:
            self.kick_checkpoint.set()
        if self._out_of_pace and not for_release:
            await self._wait_for_turn()
            return
        self.waiters += 1
        try:
            await self._changed.park()
        finally:
            self.waiters -= 1

    async def _wait_for_turn(self) -> None:
        """Wait in the line of those who keep the pace. When this returns, nothing has happened since the turn came."""
        pace = self.pace
        pace.waiting += 1
        try:
            async with self._line:
                while self._is_paced(room := self._room(self.reserve + self.map_reserve())):
                    self._pay(room)
                    left_s = pace.turn_in_s(trio.current_time())
                    if left_s <= 0:
                        break
                    with trio.move_on_after(left_s):
                        await self._changed.park()
                pace.take_turn(trio.current_time())
        finally:
            pace.waiting -= 1

    async def wait_in_queue(self, blocks: int, at_most_s: float, wanted: Callable[[], bool]) -> None:
        """Wait until there may be room for `blocks` that were refused, for `at_most_s`, while it is `wanted`.

        Not each change is worth a look: a look at a full pool may take two checkpoints. So those who wait look when
        the counts say that they fit, and else now and then, the more rarely the more they are. A refusal costs a pause
        in any case: what refused may see more than these counts, and wake who waits here by that.
        """
        self.queued += 1
        try:
            with trio.move_on_after(min(at_most_s, QUEUE_LOOK_S * self.queued)):
                await trio.sleep(QUEUE_PAUSE_S)
                while self.read_only is None and wanted() and not self._may_fit(blocks):
                    await self._changed.park()
        finally:
            self.queued -= 1

    def _may_fit(self, blocks: int) -> bool:
        failure = self.checkpoint_failure
        if failure is not None and failure.errno == errno.ENOSPC:
            return False
        return self.available >= blocks and self._has_slots(blocks, self.reserve + self.map_reserve(blocks))

    def released(self) -> None:
        """Blocks were trimmed or deleted: who waits in the queue for their room wants them counted now."""
        if self.queued:
            self.kick_checkpoint.set()

    def changed(self) -> None:
        """Let everybody who waits look again."""
        self._changed.unpark_all()

    # -- placement ----------------------------------------------------------------------------------------------

    def pick_device(self, kind: Kind, prefer: str = "fast", *, keep_slots: int | None = None) -> Device | None:
        """The device for a new segment: of the preferred tier if it has a free one, the emptiest within a tier.

        None if taking one would eat into what must remain (`keep_slots`, by default the kind's).
        """
        keep_all = self.keep_slots(kind) if keep_slots is None else keep_slots
        spare = self._segments.free_slots - keep_all
        fast_keep = 0 if kind is not Kind.LOG else 1  # the last fast segment is the cleaner's

        def best(devices: Sequence[Device], keep: int) -> Device | None:
            usable = [
                d
                for d in devices
                if len(d.free) > keep
                and d.state == "online"
                and not d.poisoned
                and d.segment_bytes >> BLOCK_SHIFT <= spare + 1
            ]
            return max(usable, key=lambda device: len(device.free) / device.segment_count, default=None)

        devices = self._segments.devices
        first = [device for device in devices if device.tier == prefer]
        other = [device for device in devices if device.tier != prefer]
        return best(first, fast_keep) or best(other, 0) or best(first, 0)

    def tier_use(self, tier: str) -> TierUse:
        """How full a tier is."""
        total = free = 0
        live = self._segments.tier_live[tier]
        for device in self._segments.devices:
            if device.tier == tier and device.state == "online":
                slots = device.segment_bytes // BLOCK_BYTES
                total += device.segment_count * slots
                free += len(device.free) * slots
            elif device.tier == tier:
                live -= self._segments.device_live[device.index]
        return TierUse(total, free, live)

    def room_to_move(self, blocks: int) -> bool:
        """Whether an evacuation may move so many blocks (or map pages) now: clients and the cleaner keep theirs.

        If it may not, the cleaner is called.
        """
        needed = self.reserve + self.map_reserve(blocks) + self.largest_segment_slots + blocks + blocks // 64
        if self._segments.free_slots >= needed:
            self.wanted_slots = 0
            return True
        self.wanted_slots = needed + 1
        self.kick_cleaner.set()
        return False

    def cleaning_needed(self) -> Move | None:
        """What the cleaner should do now, if anything."""
        low = self.low_slots() + (self._margin() // 2 if self.cleaning else 0)
        return decide(
            self.tier_use("fast"),
            self.tier_use("base"),
            total_low=self._segments.free_slots < low,
            keep_slots=BASE_KEEPS_SEGMENTS * self.largest_segment_slots,
            active=self.cleaning,
        )

    def rest_ratio(self) -> float:
        """How long the cleaner should rest for the time it works: nothing while a writer waits."""
        if self.waiters or self.pace.holds_back(trio.current_time()):
            return 0.0
        low = self.low_slots()
        ratio = rest_ratio(self._segments.free_slots, low, low - self._margin())
        fast = self.tier_use("fast")
        if fast.total and fast.total < self._segments.total_slots:
            begin = int(fast.total * FAST_BEGIN_SHARE)
            ratio = min(ratio, rest_ratio(fast.free, begin, LOG_KEEPS_SEGMENTS * self.largest_segment_slots))
        return ratio
