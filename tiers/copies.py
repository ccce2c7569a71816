"""Writing copies of the catalog to the devices, and giving space back when that has been done.

A checkpoint goes on here when its transaction is committed:

1. its change is appended to a CATALOG segment, as a delta to the copy before it, or as a full copy where there is none
   in this life, where the segment is a fresh one, or where the deltas have become longer than the whole;
2. a flush makes the copy durable;
3. only then are the segments that the checkpoint found free given out again, and those of older copies with them, and
   the labels told of the checkpoint.

So at any moment the newest durable copy has all that it names, and the log after it. A crash between the commit and 3
leaves the copy before: nothing of what that one needs has been reused. The next life can't reuse it either, for the
catalog keeps the rows of segments that a checkpoint found free until the transaction after their place was given out;
at the next open they are still there, with no live block, and are freed once a copy is durable (`settle`: at once, if
that of the catalog's own checkpoint is).

The segment for a copy is opened before the commit, so that the catalog knows it. Otherwise a life that begins with that
catalog would take it for a free place. What an earlier life left is never appended to.
"""

import errno
import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tiers.catalog import Change, MarkRow, Position, State, device_row
from tiers.catalogcopy import (
    BadCopyError,
    Copy,
    CopyKind,
    Link,
    Mirror,
    TableChange,
    blocks_of_copy,
    bound_bytes,
    decode_copy,
    encode_copy,
    newest_chain,
    tables_of,
)
from tiers.device import Device
from tiers.errors import TierError
from tiers.layout import BLOCK_BYTES, BLOCK_SHIFT
from tiers.names import NAME_LIMIT
from tiers.reader import checks_of
from tiers.record import (
    BadRecordError,
    Batch,
    Kind,
    Op,
    decode_batch,
    decode_segment_header,
    encode_batch,
    peek_header_slots,
)
from tiers.segments import Segment, is_free

if TYPE_CHECKING:
    from tiers.engine import Engine

logger = logging.getLogger(__name__)

MAX_BATCH_BLOCKS = 512
READ_SLOTS = 256
VOLUME_BYTES = 256
"""More than the row of a volume or snapshot takes, whatever its name."""
DELTA_OVERHEAD = 400
"""Bytes at most of a copy without its rows, or slightly more."""


class CopyWriter:
    """The CATALOG segments of an open pool, and the segments that wait for a copy to be durable."""

    def __init__(self, engine: "Engine") -> None:
        self.full_copies = 0
        self.deltas = 0
        self.written_slots = 0
        self._engine = engine
        self._mirror: Mirror
        self._open: list[Segment] = []
        self._chain: set[int] = set()
        self._last: Link | None = None
        self._full_slots = 0
        self._delta_slots = 0
        self._delta: list[TableChange] = []
        self._retired: list[int] = []
        self._behind = False
        self._bound = 0

    @property
    def behind(self) -> bool:
        """Whether the newest checkpoint, or a device that joined after it, is in no durable copy."""
        engine = self._engine
        return self._behind or len(self._mirror.tables[0]) != len(engine.devices) + len(engine.removed_devices)

    def begin(self, state: State) -> None:
        """A life begins with this catalog."""
        self._mirror = Mirror(state)

    # -- a checkpoint ------------------------------------------------------------------------------------------------

    def prepare(self, dead: int, more: int = 0, marks: Sequence[MarkRow] = ()) -> None:
        """Before a commit: have room for a full copy, in segments that the commit will tell of. Raises ENOSPC.

        `dead`: the rows of the dead list; `more`: volumes and snapshots that are about to be committed;
        `marks`: as they are about to be.
        """
        engine = self._engine
        blocks = self._bound_blocks(len(engine.segments.by_id) + len(self._open) + 1, dead, more, marks)
        self._bound = blocks
        self._reserve(blocks)
        if any(segment.device.state != "online" for segment in self._open):
            self._seal()
        if sum(_room(segment.slots - segment.used) for segment in self._open) >= blocks:
            return
        self._seal()
        room = 0
        while room < blocks:
            device = engine.space.pick_device(Kind.CATALOG)
            if device is None:
                raise TierError(
                    errno.ENOSPC,
                    f"the pool {engine.pool_name} has no free segment for the copies of its catalog: grow it",
                )
            segment = engine.log.open_segment(device, Kind.CATALOG)
            self._open.append(segment)
            room += _room(segment.slots - segment.used)

    def _bound_blocks(self, segments: int, dead: int, more: int, marks: Sequence[MarkRow]) -> int:
        engine = self._engine
        names = ((volume.short_name, volume.policy_name) for volume in engine.volumes.values())
        devices = [*map(device_row, engine.devices), *engine.removed_devices]
        snapshots = len(engine.lineage.snapshots)
        length = bound_bytes(engine.pool_name, devices, names, segments, dead, snapshots, marks)
        length += VOLUME_BYTES * (len(engine.graveyard) + more)  # deleted since the freeze: the copy still has them
        length += 2 * NAME_LIMIT * len(engine.volumes)  # given another name or policy: the copy still has the old one
        return -(-length // BLOCK_BYTES)

    def _reserve(self, blocks: int) -> None:
        """Tell admission what a fresh set of segments for a full copy takes."""
        space = self._engine.space
        largest = space.largest_segment_slots
        online = [device.segment_bytes for device in self._engine.devices if device.state == "online"]
        smallest = min(online, default=largest * BLOCK_BYTES) // BLOCK_BYTES
        space.copy_slots = max(largest, -(-blocks // _room(smallest - 1)) * smallest)

    def committed(self, change: Change, retired: list[int]) -> None:
        """The catalog has committed a checkpoint, which found the segments `retired` free. No checkpoint of trio."""
        if self._behind:
            self._last = None  # the copy before is missing: this one must be full
        self._delta = self._mirror.apply(change)
        self._retired = retired
        self._behind = True

    async def write(self) -> None:
        """Make the copy durable, then give out what may be given out. Raises TierError; then nothing is."""
        engine = self._engine
        try:
            await self._append()
        except BaseException:
            self._seal()  # with `used` before what may be garbage
            self._last = None
            raise
        await engine.flusher.flush()
        # From here on no checkpoint of trio.
        self._behind = False
        segments = engine.segments
        for segment_id in self._retired:
            segment = segments.by_id.get(segment_id)
            if segment is not None and not segment.pins:  # else a reader came; it is freed by the next checkpoint
                segments.release(segment)
        self._retired = []
        held = self._chain | {segment.id for segment in self._open}
        for segment in [s for s in segments.by_id.values() if s.kind is Kind.CATALOG and s.id not in held]:
            segments.release(segment)

    async def _append(self) -> None:
        mirror = self._mirror
        kind, tables, before = CopyKind.FULL, self._delta, self._last
        if before is not None:
            length = sum(8 * len(removed) + sum(map(len, rows)) for removed, rows in tables)
            slots = 2 + (length + DELTA_OVERHEAD) // BLOCK_BYTES
            if self._delta_slots + slots <= self._full_slots and slots <= self._bound:
                kind = CopyKind.DELTA
        if kind is CopyKind.FULL:
            tables, before = mirror.whole(), None
        data, check = await self._engine.offload(
            encode_copy, kind, mirror.pool_name, mirror.position, tables, before or Link()
        )
        slots, places = await self._write_blocks(memoryview(data), mirror.position.checkpoint_seq)
        if kind is CopyKind.FULL:
            self._chain = places
            self._full_slots, self._delta_slots = slots, 0
            self.full_copies += 1
        else:
            self._chain |= places
            self._delta_slots += slots
            self.deltas += 1
        self._last = Link(mirror.position.checkpoint_seq, check)
        self.written_slots += slots

    async def _write_blocks(self, data: memoryview, seq: int) -> tuple[int, set[int]]:
        """Append the blocks of one copy; return the slots that they took and the segments that they are in."""
        engine = self._engine
        total = len(data) >> BLOCK_SHIFT
        at = taken = 0
        places: set[int] = set()
        while at < total:
            while not _room(self._open[0].slots - self._open[0].used):
                self._leave(self._open.pop(0))
            segment = self._open[0]
            count = min(total - at, MAX_BATCH_BLOCKS, _room(segment.slots - segment.used))
            part = data[at << BLOCK_SHIFT : at + count << BLOCK_SHIFT]
            header, _ = encode_batch(
                Kind.CATALOG,
                engine.pool_uuid,
                segment.id,
                segment.used,
                engine.log.incarnation,
                engine.log.seq,
                0,
                engine.flusher.durable_seq,
                [Op.CATALOG << 56 | at, seq, count],
                checks_of(part),
                [],
            )
            await segment.device.write_behind(segment.offset(segment.used), [header, part])
            slots = (len(header) >> BLOCK_SHIFT) + count
            segment.used += slots
            engine.segments.changed.add(segment.id)
            places.add(segment.id)
            at += count
            taken += slots
        return taken, places

    def _seal(self) -> None:
        """Leave the open segments. The next copy is a full one, in fresh ones."""
        for segment in self._open:
            self._leave(segment)
        self._open = []
        self._last = None

    def _leave(self, segment: Segment) -> None:
        segment.open = False
        self._engine.segments.changed.add(segment.id)

    # -- opening and checking ------------------------------------------------------------------------------------------

    async def settle(self, position: Position) -> None:
        """After the replay: give back what neither the newest copy nor the catalog's checkpoint needs.

        That is every segment of superseded copies; and, if the catalog's own checkpoint has its copy, what it found
        free. Without that a full pool that crashes again and again would find no place for the log of its next life.
        """
        segments = self._engine.segments
        parts: dict[int, list[Part]] = {}
        try:
            for segment in [s for s in segments.by_id.values() if s.kind is Kind.CATALOG and s.device.state != "lost"]:
                parts[segment.id] = await read_parts(segment.device, segment.index, self._engine.pool_uuid)
            chain = newest_chain(copies_in([part for found in parts.values() for part in found]))
        except (OSError, BadCopyError) as error:
            logger.warning("the copies of the catalog of pool %s: %s", self._engine.pool_name, error)
            return
        if chain is None:
            return
        needed = {copy.key for copy in chain}
        for segment_id, found in parts.items():
            if needed.isdisjoint(key for key, _, _ in found):
                segments.forget(segments.by_id[segment_id])
        if chain[-1].key != (position.incarnation, position.checkpoint_seq):
            return
        for segment in list(segments.by_id.values()):
            if segment.id != position.log_segment and is_free(segment, position.checkpoint_seq):
                segments.forget(segment)

    async def verify(self) -> list[str]:
        """Read the copies of this life back; say what is wrong with them. While no checkpoint runs."""
        if self._last is None or self._behind:
            return []
        engine = self._engine
        held = [segment for segment in engine.segments.by_id.values() if segment.id in self._chain]
        places = ", ".join(f"{segment.device.path} at {segment.base}" for segment in held)
        try:
            chain = newest_chain(await self._read(held))
            sound = (
                chain is not None
                and chain[-1].key == (self._mirror.position.incarnation, self._mirror.position.checkpoint_seq)
                and tuple(tables_of(chain)) == self._mirror.tables
            )
            why = "it isn't what was written"
        except (OSError, BadCopyError) as error:
            sound, why = False, str(error)
        if sound:
            return []
        self._seal()
        self._behind = True
        return [f"the copy of the catalog on {places} is damaged ({why}): the next checkpoint writes another one"]

    async def _read(self, held: Iterable[Segment]) -> list[Copy]:
        parts: list[Part] = []
        for segment in held:
            parts += await read_parts(segment.device, segment.index, self._engine.pool_uuid)
        return copies_in(parts)


def _room(slots: int) -> int:
    """At least so many blocks of a copy fit in so many slots, batch headers included."""
    return max(0, slots - 2 * (slots // MAX_BATCH_BLOCKS + 1))


# -- reading -----------------------------------------------------------------------------------------------------------

Part = tuple[tuple[int, int], int, memoryview]
"""(incarnation and sequence, first block of the copy, bytes) of what one batch brings."""


async def read_parts(device: Device, index: int, pool_uuid: bytes) -> list[Part]:
    """Read the batches of a CATALOG segment as far as they are sound. Raises TierError; EPROTO for newer ones."""
    window = _Window(device, index)
    try:
        header = decode_segment_header(await window.slots(0, 1), pool_uuid)
    except BadRecordError as error:
        return _refuse_newer(device, error)
    parts: list[Part] = []
    slot = 1
    while header.kind is Kind.CATALOG and slot < window.slot_count:
        try:
            count = peek_header_slots(await window.slots(slot, 1))
            if slot + count > window.slot_count:
                break
            batch = decode_batch(await window.slots(slot, max(1, count)), pool_uuid, header.segment_id, slot)
        except BadRecordError as error:
            _refuse_newer(device, error)
            break
        if batch.kind is not Kind.CATALOG or batch.incarnation != header.incarnation:
            break
        if slot + batch.slots > window.slot_count:
            break
        data = await window.slots(slot + batch.header_slots, len(batch.checks))
        parts += _parts_of(batch, data)
        slot += batch.slots
    return parts


def _refuse_newer(device: Device, error: BadRecordError) -> list[Part]:
    if error.newer:
        raise TierError(errno.EPROTO, f"{device.path}: {error}: use the release that wrote it")
    return []


def _parts_of(batch: Batch, data: memoryview) -> list[Part]:
    """A batch's parts, none if one of its blocks is damaged."""
    if checks_of(data) != batch.checks:
        return []
    parts: list[Part] = []
    at = 0
    for op, first, seq, count in batch.operations():
        if op is Op.CATALOG:
            parts.append(((batch.incarnation, seq), first, data[at << BLOCK_SHIFT : at + count << BLOCK_SHIFT]))
            at += count
    return parts


class _Window:
    """Slots of one segment, read a MiB at a time."""

    def __init__(self, device: Device, index: int) -> None:
        self.slot_count = device.segment_bytes // BLOCK_BYTES
        self._device = device
        self._base = device.segment_offset(index)
        self._first = 0
        self._data = memoryview(b"")

    async def slots(self, slot: int, count: int) -> memoryview:
        """Raises TierError where the device can't be read."""
        end = min(slot + count, self.slot_count)
        if slot < self._first or end > self._first + (len(self._data) >> BLOCK_SHIFT):
            length = min(max(count, READ_SLOTS), self.slot_count - slot)
            try:
                data = await self._device.read(self._base + (slot << BLOCK_SHIFT), length << BLOCK_SHIFT)
            except OSError:  # perhaps behind what is wanted
                length = end - slot
                data = await self._device.read(self._base + (slot << BLOCK_SHIFT), length << BLOCK_SHIFT)
            self._first, self._data = slot, memoryview(data)
        return self._data[slot - self._first << BLOCK_SHIFT : end - self._first << BLOCK_SHIFT]


def copies_in(parts: Iterable[Part]) -> list[Copy]:
    """The complete copies among these parts. Raises BadCopyError for a sound one of a newer version."""
    by_key: dict[tuple[int, int], dict[int, memoryview]] = {}
    for key, first, data in parts:
        by_key.setdefault(key, {})[first] = data
    copies = []
    for pieces in by_key.values():
        whole = b"".join(pieces[first] for first in sorted(pieces))
        try:
            if 0 < blocks_of_copy(whole) <= len(whole) >> BLOCK_SHIFT:
                copies.append(decode_copy(whole))
        except BadCopyError as error:
            if error.newer:
                raise
    return copies
