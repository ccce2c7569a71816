"""Recovery: the state of a pool = the catalog's checkpoint + the log after it.

Before anything is read, every device is synced. What the log itself proves to have been durable may be read through
the page cache; every batch above that is read past it: after a failed fsync the kernel may show bytes that the medium
never got.

The log is followed batch by batch; each must name the place where it stands, this incarnation, a higher sequence, and
the hash of the header before it. Where the chain breaks the log ends, unless something later proves by its durable_seq
that the missing batch had been durable: then it was not a crash but corruption, and the pool is refused rather than
rolled back silently. Batches above the highest durable_seq seen must be on the medium with their data intact; the
first that isn't is the end of the log. Below it, a damaged block is a damaged block: its readers get EIO.

Recovery ends with a new incarnation, a fresh log segment and a checkpoint. Nothing is ever appended to a segment of an
earlier life, so a batch that survived where its predecessor was lost can't come back.
"""

import errno
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import trio

from tiers.catalog import State
from tiers.changes import decode_trackers
from tiers.device import Device, read_what_can_be_read
from tiers.errors import TierError
from tiers.failpoint import hit
from tiers.layout import BAD, BLOCK_BYTES, BLOCK_SHIFT, SLOT_BITS
from tiers.maptree import MapTree
from tiers.mover import put_moved
from tiers.reader import checks_of
from tiers.record import (
    ID_MASK,
    MAX_BLOCKS,
    MAX_HEADER_SLOTS,
    OP_WORDS,
    BadRecordError,
    Batch,
    Kind,
    Op,
    SegmentHeader,
    decode_batch,
    decode_segment_header,
    extra_words_of_move,
    name_from_words,
    peek_header_slots,
)
from tiers.snapshot import Snapshot, SnapshotState
from tiers.volume import Volume

if TYPE_CHECKING:
    from tiers.engine import Engine

logger = logging.getLogger(__name__)

HEADERS_A_READ = 1024


@dataclass(slots=True)
class Found:
    """A batch that is part of the log, and the segment it stands in."""

    batch: Batch
    device: Device
    physical_index: int


@dataclass(slots=True)
class Replayed:
    """What recovery did, for the log and for tests."""

    batches: int = 0
    blocks: int = 0
    first_seq: int = 0
    last_seq: int = 0
    dropped: str = ""
    problems: list[str] = field(default_factory=list)
    packed_batches: dict[int, set[int]] = field(default_factory=dict)
    """Segment id -> slots of the batches of frames whose blocks are counted, which several records may name."""
    given_up: str | None = None
    """What the operator gave up by `truncate_log`, in words."""


@dataclass(slots=True)
class Lost:
    """Sound batches beyond the end of the log."""

    batches: int = 0
    blocks: int = 0
    first_seq: int = 0
    last_seq: int = 0
    volume_ids: set[int] = field(default_factory=set)

    def add(self, batch: Batch) -> None:
        """Count one."""
        self.batches += 1
        self.blocks += len(batch.checks)
        self.first_seq = min(self.first_seq or batch.seq, batch.seq)
        self.last_seq = max(self.last_seq, batch.seq)
        self.volume_ids |= {
            subject for op, subject, _, _ in batch.operations() if op not in (Op.LINK, Op.MOVE, Op.RELOCATE)
        }


def _given_up(engine: "Engine", lost: Lost, end_seq: int, proof: int) -> str:
    """What `truncate_log` costs, as far as it can be known."""
    text = f"given up: all after sequence {end_seq} of the log, which had been durable up to {proof}"
    if not lost.batches:
        return text + "; nothing of it can be read, so what it was isn't known"
    known = sorted(engine.volumes[i].name for i in lost.volume_ids if i in engine.volumes)
    unknown = len(lost.volume_ids) - len(known)
    if unknown:
        known.append(f"{unknown} that only this part of the log knew")
    return (
        f"{text}; of that {lost.batches} batches (sequences {lost.first_seq} to {lost.last_seq}, "
        f"{lost.blocks * BLOCK_BYTES} bytes of data) can still be read, volumes concerned: "
        f"{', '.join(known) or 'none'}; what the damaged part held isn't known"
    )


def restore(engine: "Engine", state: State) -> None:
    """Enter the catalog's checkpoint into the engine's tables."""
    engine.log.checkpoint_seq = state.position.checkpoint_seq
    for row in state.segments:
        segment = engine.segments.adopt(row.id, engine.device_by_index(row.device), row.index, Kind(row.kind))
        segment.used = row.used
        segment.blocks = row.blocks
        segment.live = row.live
        segment.last_seq = row.last_seq
    for volume_row in state.volumes:
        volume = engine.add_volume(
            volume_row.id,
            volume_row.name,
            volume_row.size_bytes,
            (volume_row.root_address, volume_row.root_check),
            volume_row.created_at,
        )
        volume.tree.mapped_blocks = volume_row.mapped_blocks
        volume.referenced_blocks = volume_row.referenced or volume_row.mapped_blocks
        volume.policy_name = volume_row.policy
        volume.family = volume_row.family or volume_row.id
        volume.layered = bool(volume_row.layered)
        volume.retired = volume.deleted = bool(volume_row.retired)
        volume.filling = bool(volume_row.filling)
    for mark in state.marks:
        volume = engine.volumes[mark.id]
        volume.mirror_record = mark.record
        volume.trackers = decode_trackers(mark.trackers)  # the catalog was judged
        volume.freeze_marks()
    _restore_snapshots(engine, state)
    engine.dead = {address: (check, level, volume_id) for address, check, level, volume_id in state.dead}
    engine.next_volume_id = max(engine.next_volume_id, state.position.next_volume_id)
    engine.segments.next_id = max(engine.segments.next_id, state.position.next_segment_id)


def _restore_snapshots(engine: "Engine", state: State) -> None:
    snapshots = engine.lineage.snapshots
    for row in state.snapshots:
        volume = engine.volumes[row.volume]
        tree = MapTree(row.name, engine.segments, engine.cache, (row.root_address, row.root_check))
        tree.mapped_blocks = row.mapped_blocks
        snapshot = Snapshot(engine, row.id, volume, row.name, row.size_bytes, tree, row.created_at)
        snapshot.state = cast(SnapshotState, row.state)  # the catalog was judged
        snapshot.held = bool(row.held)
        snapshot.referenced_blocks = row.referenced
        volume.snapshots.append(snapshot)  # ids rise
        volume.kept = None  # to be made, when there is time
        snapshots[row.id] = snapshot
        engine.next_volume_id = max(engine.next_volume_id, row.id + 1)
    for volume_row in state.volumes:
        volume = engine.volumes[volume_row.id]
        volume.origin = snapshots.get(volume_row.origin)
        volume.heir = engine.volumes.get(volume_row.heir)
    for family in {volume.family for volume in engine.volumes.values()}:
        engine.lineage.name_family(family)


async def replay(engine: "Engine", state: State, *, truncate_log: bool = False) -> Replayed:
    """Apply the log after the checkpoint. Raises TierError for a log that was damaged, not just cut.

    `truncate_log`: the operator accepts the loss of what follows the damage.
    """
    position = state.position
    result = Replayed(first_seq=position.checkpoint_seq, last_seq=position.checkpoint_seq)
    if position.log_segment == 0:
        return result
    reader = _LogReader(engine, position.incarnation, truncate_log=truncate_log)
    chain = await reader.follow(
        position.log_segment, position.log_slot, position.checkpoint_seq, position.log_prev_check
    )
    hit("recovery.followed")
    durable = max((found.batch.durable_seq for found in chain), default=0)
    result.dropped = reader.end_reason
    end_seq = chain[-1].batch.seq if chain else position.checkpoint_seq
    proof = await reader.proof_beyond(end_seq)
    if proof > end_seq:
        message = (
            f"the log of pool {engine.pool_name} is damaged after sequence {end_seq} ({reader.end_reason}), "
            f"although it was durable up to "
            f"{proof}: restore the device from a copy, or give up what follows with `terrace pool check "
            f"--truncate-log {engine.pool_name}`"
        )
        if not truncate_log:
            raise TierError(errno.EIO, message)
        result.problems.append(message)
    durable = max(durable, min(proof, end_seq))
    for found in chain:
        batch = found.batch
        if batch.seq > durable and not await reader.is_on_medium(found):
            result.dropped = f"batch {batch.seq} was torn"
            break
        try:
            await _apply(engine, found, result, truncate_log=truncate_log)
        except _LostCopiesError as error:
            result.dropped = str(error)
            result.given_up = f"given up: all from sequence {batch.seq} of the log on, to {end_seq}; {error}"
            break
        hit("recovery.applied")
        result.batches += 1
        result.blocks += len(batch.checks)
        result.last_seq = batch.seq
        if result.batches % 64 == 0:
            await trio.lowlevel.checkpoint()
    if proof > end_seq:
        result.given_up = _given_up(engine, reader.lost, end_seq, proof)
    engine.log.seq = max(engine.log.seq, end_seq, proof)
    return result


def require_place(device: Device, index: int) -> None:
    """Raise TierError unless the device has a segment at this place."""
    if index >= device.segment_count:
        raise TierError(
            errno.EIO,
            f"{device.path} has {device.segment_count} places for segments and the log names place {index}: "
            "restore the devices from a copy",
        )


class _LostCopiesError(Exception):
    """A record names copies on a lost device, and the operator gives up what follows."""


def _lost_log(engine: "Engine", device: Device) -> TierError:
    pool = engine.pool_name
    return TierError(
        errno.EIO,
        f"some of the newest part of the log of pool {pool} was on {device.path}: what was written, in any volume, "
        f"after checkpoint {engine.log.checkpoint_seq} and from there on in the log is lost with it; bring the device "
        f"back, or give that up too with `terrace pool evacuate {pool} {device.path} --lost --truncate-log`",
    )


class _LogReader:
    """Reads the log: its headers, from the page cache where it has them, else whole segments, each once."""

    def __init__(self, engine: "Engine", incarnation: int, *, truncate_log: bool) -> None:
        self.end_reason = ""
        self._truncate_log = truncate_log
        self.lost = Lost()
        self._engine = engine
        self._incarnation = incarnation
        self._data_id = 0
        self._data = memoryview(b"")
        self._unreadable: set[int] = set()
        self._last: tuple[Device, int, int] | None = None
        self._scratch = memoryview(bytearray(MAX_HEADER_SLOTS * BLOCK_BYTES))
        self._direct_id = 0
        self._direct = bytearray()
        self._direct_unreadable: set[int] = set()
        self._visited: set[tuple[int, int]] = set()

    async def follow(self, segment_id: int, slot: int, seq: int, prev_check: int) -> list[Found]:
        """Collect the batches from (segment, slot) on, as far as the chain holds."""
        segments = self._engine.segments
        segment = segments.by_id.get(segment_id)
        if segment is None:
            raise TierError(
                errno.EIO,
                f"the catalog of pool {self._engine.pool_name} names log segment {segment_id} but doesn't "
                f"know it: restore it from a backup",
            )
        device, index = segment.device, segment.index
        chain: list[Found] = []
        steps = 0
        while True:
            if not await self._enter(device, index, segment_id, fresh=bool(chain)):
                return chain
            batch = await self._batch_at(device, segment_id, slot)
            if batch is None:
                return chain
            if batch.incarnation != self._incarnation or batch.seq <= seq or batch.prev_check != prev_check:
                self.end_reason = "a batch of an earlier life follows"
                return chain
            if batch.slot + batch.slots > device.segment_bytes // BLOCK_BYTES:
                self.end_reason = f"batch {batch.seq} overruns its segment"
                return chain
            chain.append(Found(batch, device, index))
            seq, prev_check = batch.seq, batch.check
            slot += batch.slots
            steps += 1
            if steps % 64 == 0:
                await trio.lowlevel.checkpoint()
            if batch.ops and batch.ops[0] >> 56 == Op.LINK:
                _, segment_id, a, _ = next(batch.operations())
                device, index = self._engine.device_by_index(a >> 32), a & 0xFFFFFFFF
                require_place(device, index)
                slot = 1

    async def _enter(self, device: Device, index: int, segment_id: int, *, fresh: bool) -> bool:
        """Go on in a segment; False (and the reason) if it isn't the one that it should be."""
        if self._last is not None and self._last[2] == segment_id:
            return True
        self._last = (device, index, segment_id)
        self._visited.add((device.index, index))
        if not fresh:
            return True
        try:
            header = decode_segment_header(await self._slots(0, 1), self._engine.pool_uuid)
        except BadRecordError as error:
            if error.newer:
                raise TierError(errno.EPROTO, f"the log of pool {self._engine.pool_name}: {error}") from None
            self.end_reason = f"segment {segment_id} was never begun: {error}"
            return False
        if header.segment_id != segment_id:
            self.end_reason = f"segment {segment_id} was never begun"
            return False
        return True

    async def _slots(self, slot: int, count: int) -> memoryview:
        """Slots of the segment in hand, valid until the next call: from the page cache, else read with all of it."""
        assert self._last is not None
        device, index, segment_id = self._last
        if self._data_id != segment_id:
            part = self._scratch[: count << BLOCK_SHIFT]
            if device.read_now(device.segment_offset(index) + (slot << BLOCK_SHIFT), part):
                return part
            await self._read_all()
        if not self._unreadable.isdisjoint(range(slot, slot + count)):
            if self._truncate_log:
                raise BadRecordError(f"{device.path} can't be read there")
            raise self._refused(device, index, slot)
        return self._data[slot << BLOCK_SHIFT : slot + count << BLOCK_SHIFT]

    def _refused(self, device: Device, index: int, slot: int) -> TierError:
        """What is at an unreadable place may be a batch that was acknowledged: it isn't taken for the log's end."""
        pool = self._engine.pool_name
        if device.state == "lost":
            return _lost_log(self._engine, device)
        return TierError(
            errno.EIO,
            f"{device.path} at {device.segment_offset(index) + (slot << BLOCK_SHIFT)} can't be read, and the log of "
            f"pool {pool} goes on or ends there: restore the device from a copy, or give up what follows with "
            f"`terrace pool check --truncate-log {pool}`",
        )

    async def _read_all(self) -> None:
        assert self._last is not None
        device, index, segment_id = self._last
        if self._data_id != segment_id:
            data, unreadable = await read_what_can_be_read(device, device.segment_offset(index), device.segment_bytes)
            self._data, self._unreadable = memoryview(data), set(unreadable)
            self._data_id = segment_id

    async def _batch_at(self, device: Device, segment_id: int, slot: int) -> Batch | None:
        room = device.segment_bytes // BLOCK_BYTES - slot
        if room <= 0:
            self.end_reason = "the segment is full and names no next one"
            return None
        try:
            header = await self._slots(slot, 1)
            slots = peek_header_slots(header)
            if slots > 1:
                header = await self._slots(slot, min(slots, room))
            return decode_batch(header, self._engine.pool_uuid, segment_id, slot)
        except BadRecordError as error:
            if error.newer:
                raise TierError(errno.EPROTO, f"the log of pool {self._engine.pool_name}: {error}") from None
            self.end_reason = str(error)
            return None

    async def proof_beyond(self, end_seq: int) -> int:
        """The highest durable_seq that any batch after the end of the chain claims."""
        proof = 0
        if self._last is not None:
            await self._read_all()
            proof = self._scan(self._data, self._data_id, end_seq)
        for device in self._engine.devices:
            if device.state == "lost":
                continue
            for start in range(0, device.segment_count, HEADERS_A_READ):
                places = range(start, min(start + HEADERS_A_READ, device.segment_count))
                headers = await self._headers(device, [device.segment_offset(i) for i in places])
                for index, block in zip(places, headers, strict=True):
                    header = self._log_segment_header(block)
                    if header is None or (device.index, index) in self._visited or header.first_seq < end_seq:
                        continue
                    data, _ = await read_what_can_be_read(
                        device, device.segment_offset(index), device.segment_bytes, direct=True
                    )
                    proof = max(proof, self._scan(data, header.segment_id, end_seq))
        return proof

    @staticmethod
    async def _headers(device: Device, offsets: list[int]) -> list[bytearray]:
        """A block at each offset; one that can't be read is zeros."""
        try:
            return await device.read_many([(offset, BLOCK_BYTES) for offset in offsets])
        except OSError:
            return [(await read_what_can_be_read(device, offset, BLOCK_BYTES))[0] for offset in offsets]

    def _log_segment_header(self, block: bytearray) -> SegmentHeader | None:
        try:
            header = decode_segment_header(block, self._engine.pool_uuid)
        except BadRecordError:
            return None
        return header if header.kind is Kind.LOG and header.incarnation == self._incarnation else None

    def _scan(self, data: bytearray | memoryview, segment_id: int, end_seq: int) -> int:
        """Look at every slot for a sound batch beyond `end_seq`; return the highest durable_seq among them."""
        proof = 0
        for slot in range(1, len(data) >> BLOCK_SHIFT):
            start = slot << BLOCK_SHIFT
            slots = peek_header_slots(memoryview(data)[start : start + BLOCK_BYTES])
            if not slots:
                continue
            try:
                batch = decode_batch(
                    memoryview(data)[start : start + (slots << BLOCK_SHIFT)], self._engine.pool_uuid, segment_id, slot
                )
            except BadRecordError:
                continue
            if batch.incarnation == self._incarnation and batch.seq > end_seq:
                proof = max(proof, batch.durable_seq)
                self.lost.add(batch)
        return proof

    async def is_on_medium(self, found: Found) -> bool:
        """Whether a batch is there past the page cache: the very header, and data that is what it says.

        A sector that can't be read speaks neither for nor against it: the batch may have been flushed. Its blocks
        stand, and their readers get EIO; but without its header nobody may go on. Raises TierError.
        """
        batch, device = found.batch, found.device
        if self._direct_id != batch.segment_id:
            self._direct, unreadable = await read_what_can_be_read(
                device, device.segment_offset(found.physical_index), device.segment_bytes, direct=True
            )
            self._direct_unreadable = set(unreadable)
            self._direct_id = batch.segment_id
        start = batch.slot << BLOCK_SHIFT
        data = start + (batch.header_slots << BLOCK_SHIFT)
        view = memoryview(self._direct)
        first = batch.slot + batch.header_slots
        if not self._direct_unreadable.isdisjoint(range(batch.slot, first)) and not self._truncate_log:
            raise self._refused(device, found.physical_index, batch.slot)
        try:
            header = decode_batch(view[start:data], self._engine.pool_uuid, batch.segment_id, batch.slot)
        except BadRecordError:
            return False
        if header.check != batch.check:
            return False
        checks = checks_of(view[data : data + (len(batch.checks) << BLOCK_SHIFT)])
        return checks == batch.checks or all(
            there == wanted or first + i in self._direct_unreadable
            for i, (there, wanted) in enumerate(zip(checks, batch.checks, strict=True))
        )


async def _apply(engine: "Engine", found: Found, result: Replayed, *, truncate_log: bool) -> None:
    """Let one batch of the log take effect, just as it did when it was written."""
    batch = found.batch
    segments = engine.segments
    segment = segments.adopt_from_log(batch.segment_id, found.device, found.physical_index, Kind.LOG)
    segment.used = max(segment.used, batch.slot + batch.slots)
    segment.last_seq = max(segment.last_seq, batch.seq)
    address = segment.id << SLOT_BITS | batch.slot + batch.header_slots
    if len(kinds := set(batch.ops[::OP_WORDS])) == 1 and (word := kinds.pop()) >> 56 == Op.WRITE:
        # The commonest batch by far: writes of one volume.
        volume = engine.volumes.get(word & ID_MASK)
        if volume is not None:
            volume.apply_batch(batch.ops, batch.checks, address)
        return
    group: list[int] = []
    group_volume: Volume | None = None
    group_start = at = extra_at = 0

    def flush_group() -> None:
        nonlocal group
        if group_volume is not None and group:
            group_volume.apply_batch(group, batch.checks[group_start:at], address + group_start)
        group = []

    for op, subject, a, b in batch.operations():
        if op in (Op.WRITE, Op.UNMAP):
            volume = engine.volumes.get(subject)
            if volume is not group_volume:
                flush_group()
                group_volume, group_start = volume, at
            if volume is not None:
                # What is unmapped may reach past the largest volume; the map doesn't.
                group += (op << 56 | subject, min(a, MAX_BLOCKS), min(b, max(0, MAX_BLOCKS - a)))
            if op is Op.WRITE:
                at += b
            continue
        flush_group()
        if op is Op.REWRITE:
            olds = batch.extra[extra_at : extra_at + b]
            extra_at += b
            volume = engine.volumes.get(subject)
            for i, old in enumerate(olds if volume is not None else ()):
                engine.relocate(cast(Volume, volume), a + i, old, address + at + i, batch.checks[at + i])
            at += b
        group_start = at
        if op is Op.CREATE:
            length = b & 0xFF
            words = batch.extra[extra_at : extra_at + -(-length // 8)]
            extra_at += len(words)
            name = name_from_words(words, length)
            if subject in engine.volumes or engine.volume_named(name) is not None:
                raise TierError(
                    errno.EIO,
                    f"the log of pool {engine.pool_name} creates volume {name!r} a second time (batch {batch.seq}): "
                    "restore the devices from a copy",
                )
            engine.add_volume(subject, name, a, (0, 0), b >> 8)
        elif op is Op.RESIZE and subject in engine.volumes:
            engine.resized(engine.volumes[subject], a)
        elif op is Op.POLICY:
            words = batch.extra[extra_at : extra_at + -(-a // 8)]
            extra_at += len(words)
            if subject in engine.volumes:
                engine.volumes[subject].policy_name = name_from_words(words, a)
        elif op is Op.FILLING and subject in engine.volumes:
            engine.volumes[subject].filling = bool(a)
        elif op is Op.DELETE and subject in engine.volumes:
            volume = engine.volumes[subject]
            if volume.snapshots:
                engine.lineage.give_up(volume)
            else:
                engine.remove_volume(volume)
        elif op is Op.BAD and subject in engine.volumes:
            put_moved(engine, [(engine.volumes[subject], block, BAD, 0) for block in range(a, a + b)])
            engine.losses.add(subject, a, b)
        elif op is Op.LOST and subject in engine.volumes:
            engine.relocate(engine.volumes[subject], a, b, BAD, 0)
            engine.losses.add(subject, a)
        elif op in (Op.MOVE, Op.RELOCATE):
            count = a & 0xFFFFFFFF
            length = extra_words_of_move(op, count, batch.extra, extra_at)
            words = batch.extra[extra_at : extra_at + length]
            extra_at += length
            try:
                await _apply_move(engine, op, subject, a >> 32, count, b, words, batch.seq, result.packed_batches)
            except (OSError, BadRecordError) as error:
                # The old places may have been given out since: what was moved may be nowhere but in these copies. And
                # they may be a stream that went past the log (`tiers.bypass`): then the old places hold old bytes. So
                # nothing after this record counts either: what is left is a prefix.
                message = f"what was moved or written into segment {subject} of {engine.pool_name} can't be followed"
                home = engine.device_by_index(words[0] >> 32)
                if truncate_log:
                    raise _LostCopiesError(f"{message} ({error})") from error
                if home.state == "lost":
                    raise _lost_log(engine, home) from error
                raise TierError(
                    errno.EIO,
                    f"{message} ({error}): restore the device from a copy, or give up all from there on with `terrace "
                    f"pool check --truncate-log {engine.pool_name}`",
                ) from error
    flush_group()


async def _read_in_some_way(device: Device, offset: int, length: int) -> bytearray:
    """Read, and if that fails try once more, past the page cache. Raises OSError."""
    try:
        return await device.read(offset, length)
    except OSError:
        return await device.read_direct(offset, length)


async def _apply_move(
    engine: "Engine",
    op: Op,
    segment_id: int,
    slot: int,
    count: int,
    header_check: int,
    words: list[int],
    seq: int,
    packed_batches: dict[int, set[int]],
) -> None:
    device = engine.device_by_index(words[0] >> 32)
    index = words[0] & 0xFFFFFFFF
    require_place(device, index)
    offset = device.segment_offset(index) + (slot << BLOCK_SHIFT)
    room = device.segment_bytes - (slot << BLOCK_SHIFT)
    block = await _read_in_some_way(device, offset, BLOCK_BYTES)
    slots = max(1, peek_header_slots(block))
    header = await _read_in_some_way(device, offset, min(slots << BLOCK_SHIFT, room))
    batch = decode_batch(header, engine.pool_uuid, segment_id, slot)
    if (
        batch.check != header_check
        or len(batch.checks) != count
        or batch.kind not in (Kind.MOVED, Kind.PACKED)
        or engine.segments.kind_of(segment_id, batch.kind) is not batch.kind
    ):
        raise BadRecordError("the copies are not the ones that were logged")
    segment = engine.segments.adopt_from_log(segment_id, device, index, batch.kind)
    hit("recovery.moved")
    if batch.kind is Kind.PACKED:
        # What the checkpoint knew of the segment has its blocks counted; the records come in any order.
        known = packed_batches.setdefault(segment_id, set(range(segment.used)))
        segment.blocks += 0 if slot in known else count
        known.add(slot)
    segment.used = max(segment.used, slot + batch.slots)
    segment.last_seq = max(segment.last_seq, seq)
    base = segment_id << SLOT_BITS
    places = batch.places()
    moves: list[tuple[Volume, int, int, int]] = []
    olds = iter(words[1 + -(-count // 64) :])
    at = 0
    for _, volume_id, start, run in batch.operations():
        volume = engine.volumes.get(volume_id)
        for i in range(run):
            if words[1 + at // 64] >> at % 64 & 1:
                old = next(olds, 0)
                if volume is None:
                    pass
                elif op is Op.RELOCATE:
                    engine.relocate(volume, start + i, old, base | places[at], batch.checks[at])
                else:
                    moves.append((volume, start + i, base | places[at], batch.checks[at]))
                    # It may be a stream that went past the log: no record tells it from what was only moved.
                    volume.mark([0, start + i, 1])
            at += 1
    put_moved(engine, moves)
