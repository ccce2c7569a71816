"""Segments: who holds which part of which device, and how many of its blocks are still wanted.

For each segment two counts: `live`, the blocks that map pages as of the last committed checkpoint point to, and
`pending`, the blocks that overlays (newer than those pages) point to. A segment may be reused when both are zero, it
is sealed, no reader pins it, and a checkpoint that has passed the last record that it holds has a durable copy on the
devices (`tiers.copies`). Freed means: its physical place becomes available; its id never comes back.

A victim that the cleaner has emptied may be reused before the checkpoint that would show it: once the records that
moved or killed its blocks are durable, every replay finds them, and nobody looks where the checkpoint's map still
points (`reuse`). A segment that such a place is given to then replaces the victim wherever the replay meets it.

Both counts are blocks. In a segment of packed data these are more than slots, so where space is counted they stand for
a share of the slots written (`Segment.live_slots`): the mean over the segment. Which of its blocks were the large ones
is known only when they are moved.
"""

import errno
from collections import defaultdict
from collections.abc import Callable, Iterable

from tiers.device import Buffer, Device, DeviceState
from tiers.errors import TierError
from tiers.failpoint import hit
from tiers.frames import block_at, slots_of, unpack_all
from tiers.layout import BLOCK_BYTES, MAX_SEGMENT_ID, SLOT_MASK
from tiers.record import BadRecordError, Kind, decode_segment_header

MAX_DAMAGED = 1 << 16
"""So many damaged blocks are remembered, in order to count each once."""


class Segment:
    """One segment in use. `used` is the first slot not written yet; `last_seq` the newest log record that it serves."""

    __slots__ = (
        "base",
        "blocks",
        "damaged",
        "device",
        "fd",
        "given_out",
        "id",
        "index",
        "kind",
        "last_seq",
        "leaks",
        "live",
        "open",
        "opened_at",
        "pending",
        "pins",
        "saved",
        "slots",
        "used",
    )

    def __init__(self, segment_id: int, device: Device, index: int, kind: Kind) -> None:
        self.id = segment_id
        self.device = device
        self.fd = -1 if kind is Kind.PACKED else device.fd
        """For reading a block by itself without waiting; -1 where there is no such thing."""
        self.index = index
        self.base = device.segment_offset(index)
        self.slots = device.segment_bytes // BLOCK_BYTES
        self.kind = kind
        self.open = True
        self.opened_at = 0.0
        """When it was taken, by trio's clock; 0 if that was before the pool was opened."""
        self.used = 1
        self.blocks = 0
        """Blocks written into frames, which are more than the slots that these take; 0 in other segments."""
        self.live = 0
        self.pending = 0
        self.saved = 0
        """Slots that `live` would take more if nothing were packed, as they are counted in the table's sums."""
        self.last_seq = 0
        self.pins = 0
        self.damaged = False
        self.leaks = False
        """It was emptied, and yet some of its blocks are counted as live."""
        self.given_out = False
        """A later segment stands in its place: only dead leaves name it, until they are walked."""

    def offset(self, slot: int) -> int:
        """Byte offset of a slot on the device."""
        return self.base + slot * BLOCK_BYTES

    def span(self, address: int) -> tuple[int, int]:
        """(first slot, slots) of what must be read for the block with that address: itself, or its frame."""
        return slots_of(address) if self.kind is Kind.PACKED else (address & SLOT_MASK, 1)

    def place(self, address: int) -> tuple[int, int]:
        """The same in bytes: (offset on the device, length)."""
        first, count = self.span(address)
        return self.base + first * BLOCK_BYTES, count * BLOCK_BYTES

    async def read_direct(self, address: int) -> Buffer:
        """The bytes on the medium of the block with that address, unverified; none where its frame is damaged.

        Raises OSError. The caller pins the segment.
        """
        offset, length = self.place(address)
        if self.kind is not Kind.PACKED:
            return await self.device.read_direct(offset, length)
        (content,) = await self.device.read_then([(offset, length)], unpack_all, direct=True)
        return block_at(content, address)

    def slots_for(self, blocks: int) -> int:
        """Slots that so many of its blocks stand for."""
        return min(blocks, -(-blocks * self.used // self.blocks)) if self.blocks else blocks

    @property
    def live_slots(self) -> int:
        """Slots that `live` stands for."""
        return self.slots_for(self.live)

    @property
    def wanted_slots(self) -> int:
        """Slots that `live` and `pending` stand for: what emptying the segment costs, the rest is what it gains."""
        return self.slots_for(self.live + self.pending)


class SegmentTable:
    """All segments in use, by id, and the free places of each device."""

    def __init__(self, devices: list[Device], pool_name: str = "POOL") -> None:
        self.devices = devices
        self.pool_name = pool_name
        """For what is said of its damage."""
        self.by_id: dict[int, Segment] = {}
        self.next_id = 1
        self.clock: Callable[[], float] = lambda: 0.0
        self.changed: set[int] = set()
        self.gone: set[int] = set()
        """Given back since the last commit: their rows leave the catalog with the next one."""
        self.reused: set[int] = set()
        """Those of them that the checkpoint's map still names: see `reuse`."""
        self._by_place: dict[tuple[int, int], Segment] = {}
        self.free_slots = 0
        self.total_slots = 0
        self.live = 0
        self.pending = 0
        self.saved = 0
        """Of `live`, what being packed saves: `live - saved` is slots."""
        self.map_live = 0
        self.map_slots = 0
        self.tier_live: dict[str, int] = {"fast": 0, "base": 0}
        """Slots that live blocks stand for."""
        self.gained_slots = 0
        """Slots ever freed, less those ever taken for copies and map pages: what cleaning has gained."""
        self.device_live: dict[int, int] = defaultdict(int)
        """Slots that live blocks stand for by device index, map pages included."""
        self.device_saved: dict[int, int] = defaultdict(int)
        """By device index, what being packed saves: with `device_live`, blocks."""
        self._idle: set[int] = set()
        """All segments without live and pending blocks, and some that have some: so that nobody looks at all."""
        self._opened: set[int] = set()
        """All segments that are open, and some that were."""
        self._damaged: set[int] = set()
        self.substitutes: dict[int, memoryview] = {}
        """What to take for map pages, by address, that their device doesn't give: see `tiers.evacuate`."""

    def open_places(self, device: Device) -> None:
        """Let segments be taken from a new, empty device, which the catalog must know by now."""
        device.free = list(range(device.segment_count - 1, -1, -1))
        self._count_places(device, 1)

    def set_state(self, device: Device, state: DeviceState) -> None:
        """Only places of online devices are there to be taken, or count as the pool's size."""
        if (device.state == "online") != (state == "online"):
            self._count_places(device, 1 if state == "online" else -1)
        device.state = state

    def _count_places(self, device: Device, sign: int) -> None:
        slots = device.segment_bytes // BLOCK_BYTES
        self.total_slots += sign * device.segment_count * slots
        self.free_slots += sign * len(device.free) * (slots - 1)

    def on_device(self, device: Device) -> list[Segment]:
        """The segments that lie on a device."""
        return [segment for segment in self.by_id.values() if segment.device is device]

    def rebuild_free(self) -> None:
        """Recompute the free places: all that no segment in use holds. Low places come first."""
        taken: dict[int, set[int]] = {device.index: set() for device in self.devices}
        self.live = self.pending = self.saved = self.map_live = self.map_slots = 0
        self.tier_live = {"fast": 0, "base": 0}
        self.device_live.clear()
        self.device_saved.clear()
        for segment in self.by_id.values():
            taken[segment.device.index].add(segment.index)
            segment.saved = 0
            self._count(segment, segment.live, segment.pending)
            if segment.kind is Kind.MAP:
                self.map_slots += segment.slots
        self.free_slots = self.total_slots = 0
        for device in self.devices:
            held = taken[device.index]
            device.free = [i for i in range(device.segment_count - 1, -1, -1) if i not in held]
            if device.state == "online":
                self._count_places(device, 1)

    def _count(self, segment: Segment, live: int, pending: int) -> None:
        self.tier_live[segment.device.tier] += live
        self.device_live[segment.device.index] += live
        if segment.kind is Kind.MAP:
            self.map_live += live
        else:
            self.live += live
            self.pending += pending
        if segment.blocks:
            self.settle_saved(segment)

    def settle_saved(self, segment: Segment) -> None:
        """Count what a segment saves now: its live blocks are others, or frames were written to it."""
        more = segment.live - segment.live_slots - segment.saved
        if more:
            segment.saved += more
            self.saved += more
            self.tier_live[segment.device.tier] -= more
            self.device_live[segment.device.index] -= more
            self.device_saved[segment.device.index] += more

    def take(self, device: Device, kind: Kind) -> Segment:
        """Open a new segment in the most recently freed place of `device` (whose pages the kernel may still have)."""
        if self.next_id > MAX_SEGMENT_ID:
            raise TierError(
                errno.EIO, f"{device.path}: all segment ids are used up: copy the volumes to a new pool (nbdcopy)"
            )
        index = device.free.pop()
        segment = Segment(self.next_id, device, index, kind)
        segment.opened_at = self.clock()
        self.next_id += 1
        self.by_id[segment.id] = segment
        self._by_place[device.index, index] = segment
        self._idle.add(segment.id)
        self._opened.add(segment.id)
        self.free_slots -= segment.slots - 1
        if kind in (Kind.MOVED, Kind.PACKED, Kind.MAP):
            self.gained_slots -= segment.slots
        if kind is Kind.MAP:
            self.map_slots += segment.slots
        self.changed.add(segment.id)
        hit("segment.taken")
        return segment

    def adopt(self, segment_id: int, device: Device, index: int, kind: Kind) -> Segment:
        """Enter a segment that the catalog tells of. The free lists and totals are rebuilt after the replay."""
        segment = Segment(segment_id, device, index, kind)
        segment.open = False
        self.by_id[segment_id] = segment
        self._by_place[device.index, index] = segment
        self._idle.add(segment_id)
        self.next_id = max(self.next_id, segment_id + 1)
        self.changed.add(segment_id)
        return segment

    def adopt_from_log(self, segment_id: int, device: Device, index: int, kind: Kind) -> Segment:
        """Enter a segment that a log record tells of, if it isn't known yet.

        What the checkpoint has at that place was reused before the next one: the new segment replaces it.
        """
        known = self.by_id.get(segment_id)
        if known is not None:
            return known
        former = self._by_place.get((device.index, index))
        if former is not None:
            assert not former.pending, f"segment {former.id} was reused, but the log after the checkpoint names it"
            self.forget(former)
            self.reused.add(former.id)
        return self.adopt(segment_id, device, index, kind)

    def kind_of(self, segment_id: int, unknown: Kind) -> Kind:
        """The kind of a segment; `unknown` if there is no such segment yet."""
        segment = self.by_id.get(segment_id)
        return unknown if segment is None else segment.kind

    def release(self, segment: Segment) -> None:
        """Give a segment's place back."""
        self.forget(segment)
        segment.device.free.append(segment.index)
        if segment.device.state == "online":
            self.free_slots += segment.slots - 1
        if segment.kind is not Kind.CATALOG:
            self.gained_slots += segment.slots
        if segment.kind is Kind.MAP:
            self.map_slots -= segment.slots

    def forget(self, segment: Segment) -> None:
        """Take a segment out of the table, whose sums and free places are worked out anew after it."""
        del self.by_id[segment.id]
        self.changed.discard(segment.id)
        place = segment.device.index, segment.index
        if self._by_place.get(place) is segment:
            del self._by_place[place]
        self._idle.discard(segment.id)
        self._opened.discard(segment.id)
        self.gone.add(segment.id)
        if self.substitutes:
            for address in [address for address in self.substitutes if address >> 24 == segment.id]:
                del self.substitutes[address]
        hit("segment.freed")

    def reuse(self, segment: Segment) -> None:
        """Give the place of an emptied segment back although the checkpoint's map names it. See the module."""
        live, segment.live = segment.live, 0
        self._count(segment, -live, 0)
        self.release(segment)
        self.reused.add(segment.id)

    def idle(self) -> list[Segment]:
        """The segments that neither pages nor overlays point to; costs as much as there are of them."""
        by_id = self.by_id
        self._idle = {i for i in self._idle if not by_id[i].live and not by_id[i].pending}
        return [by_id[i] for i in self._idle]

    def opened(self) -> set[int]:
        """The segments that are open, or were when this was asked last."""
        opened = self._opened
        self._opened = {i for i in opened if self.by_id[i].open}
        return opened

    def ceased_pending(self, segment_id: int, count: int) -> None:
        """`count` overlay entries of a segment have become live ones, or are gone with their volume."""
        segment = self.by_id.get(segment_id)
        if segment is not None:
            segment.pending -= count
            self.pending -= count
            if not segment.pending:
                self._idle.add(segment_id)

    def count_damage(self, address: int) -> None:
        """Count a damaged block as an error of its device: once, however often it is met."""
        segment = self.by_id.get(address >> 24)
        if segment is not None and address not in self._damaged:
            if len(self._damaged) < MAX_DAMAGED:
                self._damaged.add(address)
            segment.device.error_count += 1

    def add_pending(self, address: int, count: int) -> None:
        """`count` consecutive addresses from `address` came into (or, negative, left) an overlay."""
        self.by_id[address >> 24].pending += count
        self.pending += count

    def drop_pending(self, addresses: Iterable[int]) -> None:
        """These overlay entries are gone; addresses that lie in no segment are passed over."""
        by_id = self.by_id
        count = 0
        for address in addresses:
            segment = by_id.get(address >> 24)
            if segment is not None:
                segment.pending -= 1
                count += 1
                if not segment.pending:
                    self._idle.add(segment.id)
        self.pending -= count

    def add_live(self, segment_id: int, count: int) -> None:
        """Map pages point to `count` more (or fewer) blocks of a segment."""
        segment = self.by_id.get(segment_id)
        if segment is None:
            return  # it was reused before this checkpoint (or the catalog is damaged, which `check` tells of)
        segment.live += count
        if not segment.live:
            self._idle.add(segment_id)
        assert segment.live >= 0, f"segment {segment_id} would have {segment.live} live blocks"
        self.changed.add(segment_id)
        self._count(segment, count, 0)


def is_free(segment: Segment, seq: int, *, live: int = 0, pending: int = 0) -> bool:
    """Whether a checkpoint at `seq`, which changes its counts by `live` and `pending`, finds a segment free.

    Copies of the catalog have no counts: `tiers.copies` alone knows when they are superseded.
    """
    return (
        not segment.open
        and not segment.pins
        and segment.kind is not Kind.CATALOG
        and segment.live + live == 0
        and segment.pending + pending == 0
        and segment.last_seq <= seq
    )


def is_given_out(segment: Segment, block: bytes | bytearray | memoryview, pool_uuid: bytes) -> bool:
    """Whether what is in slot 0 of a segment's place is the header of a later one: it was reused before a crash."""
    try:
        header = decode_segment_header(block[:BLOCK_BYTES], pool_uuid)
    except BadRecordError:
        return False
    place = header.device_index, header.physical_index
    return header.segment_id > segment.id and place == (segment.device.index, segment.index)
