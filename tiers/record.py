"""The codecs of everything that is appended to a segment: the segment header, and batches of records.

Bytes from a device are untrusted until `decode_segment_header` or `decode_batch` has judged them; what these return
is sound. All integers are little-endian.

Segment header: slot 0 of every segment, written when the segment is opened.

    offset size type  field
      0     8   bytes  magic "TRCSEGM1"
      8     2   u16    format version (1); another version is refused
     10     2   u16    kind: 1 log, 2 moved data, 3 map pages, 4 copies of the catalog, 5 packed data
     12     4   u32    device index
     16    16   bytes  pool uuid
     32     8   u64    segment id
     40     8   u64    physical index of the segment on its device
     48     8   u64    incarnation of the pool that opened it
     56     8   u64    sequence of the newest checkpoint committed by then
     64     8   u64    sequence of the last batch before it
     72     8   u64    XXH3-64 of bytes 0-71
     80  4016          zeros

Batch: one or more header slots, then the data blocks it brings, in slots that follow. In a batch of packed data these
are compressed, into frames that take slots of their own number (see frames); each block has its check all the same.

    offset size type  field
      0     8   bytes  magic "TRCBATC1"
      8     2   u16    format version (1)
     10     2   u16    kind: as the segment's
     12     2   u16    header slots (1 ... 64)
     14     2   u16    0
     16    16   bytes  pool uuid
     32     8   u64    segment id            } where the batch believes itself to be:
     40     8   u64    slot of this header   } catches misdirected and stale writes
     48     8   u64    incarnation
     56     8   u64    sequence; grows along the log, gaps are failed writes
     64     8   u64    XXH3-64 of the header of the batch before it in the log (0 outside the log)
     72     8   u64    durable_seq: the highest sequence that a finished flush had covered
     80     4   u32    number of operations
     84     4   u32    number of data blocks
     88     4   u32    number of extra words
     92     4   u32    0
     96     8   u64    XXH3-64 of all header slots with this field zero
    104  24 n   u64x3  operations
    ...   8 n   u64    check of each data block, in order
    ...   8 n   u64    extra words; in a batch of packed data the frame table
    ...                zeros to the end of the slot

Operations are (kind << 56 | id, a, b):

    1 WRITE   volume, first block, count: takes the next `count` data blocks
    2 UNMAP   volume, first block, count: these blocks read as zeros
    3 RESIZE  volume, new size in bytes
    4 CREATE  volume, size in bytes, creation time (s since 1970) << 8 | length of the UTF-8 name in the extra words
    5 DELETE  volume
    6 LINK    next log segment's id, device index << 32 | physical index
    7 MOVE    moved-data segment's id, slot of its batch << 32 | block count, check of that batch's header;
              extra words: device index << 32 | physical index, then a bitmap of the blocks that took effect
    8 PAGE    volume, level << 48 | index: one data block, a map page
    9 BAD     volume, first block, count: these blocks were found damaged when they had to move, and read as EIO
   10 CATALOG first of the copy's blocks that follow, sequence of the checkpoint, count: takes the next `count` data
              blocks, which are a part of a copy of the catalog (see catalogcopy)
   11 POLICY  volume, length of the UTF-8 name in the extra words: the policy that the volume has; 0: the default one
   12 RELOCATE as MOVE, for volumes that may have snapshots; the old address of each copy that takes effect follows the
              bitmap in the extra words: whoever names that one, the volume or a snapshot, names the copy from now on
   13 LOST    volume, block, address: what lay there, for the volume or a snapshot, was found damaged when moved
   14 REWRITE volume, first block, count: takes the next `count` data blocks, as WRITE, which are what lay at the
              addresses in the extra words, one a block: who names one of these names the new place from now on
   15 FILLING volume, 1: it is being filled, and not complete before that has ended; 0: that has ended

Log batches hold all of these but PAGE, batches of moved and packed data only WRITE, batches of map pages only PAGE. An
operation that no release can have written (a block past the largest volume, a segment id past the 40 bits of an
address) makes the batch unreadable, even if its check is right.

A torn or lost batch fails its check, or one of its blocks does, and ends the log unless a later batch proves by its
durable_seq that it had been durable (see recovery).
"""

import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tiers.errors import TierError
from tiers.frames import FIRST_SLOT_LIMIT, MAX_FRAME_BLOCKS, Frame, Packed, place_in_frame
from tiers.layout import BLOCK_BYTES, BLOCK_SHIFT, MAX_SEGMENT_BYTES, MAX_SEGMENT_ID, MAX_SEQ, check_of
from tiers.names import MAX_VOLUME_BYTES, validate_name, validate_volume_size

FORMAT_VERSION = 1
SEGMENT_MAGIC = b"TRCSEGM1"
BATCH_MAGIC = b"TRCBATC1"

_SEGMENT = struct.Struct("<8sHHI16sQQQQQQ")
_BATCH = struct.Struct("<8sHHHH16sQQQQQQIIIIQ")
assert _SEGMENT.size == 80
assert _BATCH.size == 104
_CHECK_OFFSET = 96
_U64 = struct.Struct("<Q")

MAX_HEADER_SLOTS = 64
OP_WORDS = 3
ID_MASK = (1 << 56) - 1
_U32 = (1 << 32) - 1
MAX_BLOCKS = MAX_VOLUME_BYTES >> BLOCK_SHIFT
MAX_SLOTS = MAX_SEGMENT_BYTES >> BLOCK_SHIFT
MAX_TIME_S = 253_402_300_799
"""The end of the year 9999."""


class Kind(IntEnum):
    """What a segment, and every batch in it, holds."""

    LOG = 1
    MOVED = 2
    MAP = 3
    CATALOG = 4
    PACKED = 5


_MAX_KIND = max(Kind)


class Op(IntEnum):
    """The operations of a batch; their operands are in the table above."""

    WRITE = 1
    UNMAP = 2
    RESIZE = 3
    CREATE = 4
    DELETE = 5
    LINK = 6
    MOVE = 7
    PAGE = 8
    BAD = 9
    CATALOG = 10
    POLICY = 11
    RELOCATE = 12
    LOST = 13
    REWRITE = 14
    FILLING = 15


WRITE_WORD = Op.WRITE << 56
UNMAP_WORD = Op.UNMAP << 56


class BadRecordError(Exception):
    """The bytes are not the record that should be there; the text says in what way.

    `newer`: a sound record of a format version that this release doesn't read.
    """

    def __init__(self, why: str, *, newer: bool = False) -> None:
        super().__init__(why)
        self.newer = newer


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """A segment header that passed its check."""

    kind: Kind
    device_index: int
    segment_id: int
    physical_index: int
    incarnation: int
    checkpoint_seq: int
    first_seq: int


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch header that passed its check. `check` identifies it to the batch that follows."""

    kind: Kind
    header_slots: int
    segment_id: int
    slot: int
    incarnation: int
    seq: int
    prev_check: int
    durable_seq: int
    ops: list[int]
    checks: list[int]
    extra: list[int]
    check: int

    @property
    def slots(self) -> int:
        """Slots that the batch takes, header and data."""
        if self.kind is Kind.PACKED:
            return self.header_slots + sum(word & _U32 for word in self.extra[::2])
        return self.header_slots + len(self.checks)

    def frames(self) -> list[Frame]:
        """The frame table of a batch of packed data."""
        words = self.extra
        return [Frame(words[i] >> 32, words[i] & _U32, words[i + 1]) for i in range(0, len(words), 2)]

    def places(self) -> list[int]:
        """The slot part of the address of each data block, in order."""
        first = self.slot + self.header_slots
        return places_of(first, len(self.checks), self.frames() if self.kind is Kind.PACKED else None)

    def operations(self) -> Iterator[tuple[Op, int, int, int]]:
        """Yield (op, id, a, b) for each operation."""
        ops = self.ops
        for i in range(0, len(ops), OP_WORDS):
            yield Op(ops[i] >> 56), ops[i] & ID_MASK, ops[i + 1], ops[i + 2]


def encode_segment_header(
    kind: Kind,
    device_index: int,
    pool: bytes,
    segment_id: int,
    physical_index: int,
    incarnation: int,
    checkpoint_seq: int,
    first_seq: int,
) -> bytes:
    """Return the block that opens a segment."""
    body = _SEGMENT.pack(
        SEGMENT_MAGIC,
        FORMAT_VERSION,
        kind,
        device_index,
        pool,
        segment_id,
        physical_index,
        incarnation,
        checkpoint_seq,
        first_seq,
        0,
    )
    return (body[:72] + _U64.pack(check_of(body[:72]))).ljust(BLOCK_BYTES, b"\0")


def decode_segment_header(block: bytes | bytearray | memoryview, pool: bytes) -> SegmentHeader:
    """Judge slot 0 of a segment. Raises BadRecordError."""
    if len(block) < _SEGMENT.size:
        raise BadRecordError("no segment header")
    magic, version, kind, device, uuid, segment, index, incarnation, checkpoint, first, check = _SEGMENT.unpack_from(
        block
    )
    if magic != SEGMENT_MAGIC:
        raise BadRecordError("no segment header")
    if check != check_of(bytes(block[:72])):
        raise BadRecordError("the segment header fails its check")
    if version != FORMAT_VERSION:
        raise BadRecordError(f"segment format {version}, this release reads {FORMAT_VERSION}", newer=True)
    if uuid != pool:
        raise BadRecordError("a segment of another pool")
    if not 1 <= kind <= _MAX_KIND:
        raise BadRecordError(f"unknown segment kind {kind}")
    if not 1 <= segment <= MAX_SEGMENT_ID or max(incarnation, checkpoint, first) > MAX_SEQ:
        raise BadRecordError("a segment header with impossible values")
    return SegmentHeader(Kind(kind), device, segment, index, incarnation, checkpoint, first)


def header_slots_for(op_count: int, block_count: int, extra_count: int = 0) -> int:
    """Slots that a batch's header takes."""
    return -(-(_BATCH.size + 8 * (OP_WORDS * op_count + block_count + extra_count)) // BLOCK_BYTES)


def encode_batch(
    kind: Kind,
    pool: bytes,
    segment_id: int,
    slot: int,
    incarnation: int,
    seq: int,
    prev_check: int,
    durable_seq: int,
    ops: list[int],
    checks: list[int],
    extra: list[int],
) -> tuple[bytearray, int]:
    """Return the header slots of a batch and the header's check. `ops` is flat, three words an operation."""
    slots = -(-(_BATCH.size + 8 * (len(ops) + len(checks) + len(extra))) // BLOCK_BYTES)
    assert slots <= MAX_HEADER_SLOTS
    header = bytearray(slots * BLOCK_BYTES)
    _BATCH.pack_into(
        header,
        0,
        BATCH_MAGIC,
        FORMAT_VERSION,
        kind,
        slots,
        0,
        pool,
        segment_id,
        slot,
        incarnation,
        seq,
        prev_check,
        durable_seq,
        len(ops) // OP_WORDS,
        len(checks),
        len(extra),
        0,
        0,
    )
    words = array("Q", ops + checks + extra).tobytes()
    header[_BATCH.size : _BATCH.size + len(words)] = words
    check = check_of(header)
    _U64.pack_into(header, _CHECK_OFFSET, check)
    return header, check


def peek_header_slots(block: bytes | bytearray | memoryview) -> int:
    """How many slots the header that begins in `block` claims to have; 0 if it isn't the beginning of one."""
    if len(block) < _BATCH.size or bytes(block[:8]) != BATCH_MAGIC:
        return 0
    slots: int = _BATCH.unpack_from(block)[3]
    return slots if 1 <= slots <= MAX_HEADER_SLOTS else 0


def decode_batch(header: bytes | bytearray | memoryview, pool: bytes, segment_id: int, slot: int) -> Batch:
    """Judge the header slots of a batch that should be at `slot` of `segment_id`. Raises BadRecordError."""
    raw, fields = _judge_header(header, pool, segment_id, slot)
    (_, _, kind, slots, _, _, segment, own_slot, incarnation, seq, prev_check, durable_seq) = fields[:12]
    op_count, block_count, extra_count, _, check = fields[12:]
    word_count = OP_WORDS * op_count + block_count + extra_count
    if max(incarnation, seq, durable_seq) > MAX_SEQ:
        raise BadRecordError("a batch header with impossible values")
    words = memoryview(raw)[_BATCH.size : _BATCH.size + 8 * word_count].cast("Q").tolist()
    ops = words[: OP_WORDS * op_count]
    batch = Batch(
        Kind(kind),
        slots,
        segment,
        own_slot,
        incarnation,
        seq,
        prev_check,
        durable_seq,
        ops,
        words[len(ops) : len(ops) + block_count],
        words[len(ops) + block_count :],
        check,
    )
    _validate_ops(batch)
    return batch


def decode_checks(
    header: bytes | bytearray | memoryview, pool: bytes, segment_id: int, slot: int
) -> tuple[int, list[int], list[Frame]]:
    """As `decode_batch`, for who only verifies: header slots, the data blocks' checks, frames. Raises BadRecordError.

    For a fraction of its cost: the operations are not looked at. Where there are frames they are to be verified, by
    their own checks.
    """
    raw, fields = _judge_header(header, pool, segment_id, slot)
    start = _BATCH.size + 8 * OP_WORDS * fields[12]
    words = memoryview(raw)[start : start + 8 * (fields[13] + fields[14])].cast("Q").tolist()
    checks, extra = words[: fields[13]], words[fields[13] :]
    frames = _judge_frames(extra, len(checks), slot + fields[3]) if fields[2] == Kind.PACKED else []
    return fields[3], checks, frames


def places_of(first_slot: int, block_count: int, frames: Iterable[Frame] | None) -> list[int]:
    """The slot parts of the addresses of data blocks that begin at `first_slot`: in these frames, if there are any."""
    if frames is None:
        return list(range(first_slot, first_slot + block_count))
    places: list[int] = []
    for frame in frames:
        start = place_in_frame(first_slot, frame.slots, 0)
        places += range(start, start + frame.blocks)
        first_slot += frame.slots
    return places


def frames_that_fit(frames: Sequence[Packed], room: int) -> int:
    """How many of these frames, from the first on, a batch of at most `room` slots holds, whatever their blocks are."""
    count = slots = blocks = 0
    for frame in frames:
        slots, blocks = slots + frame.slots, blocks + frame.blocks
        if slots + header_slots_for(blocks, blocks, 2 * (count + 1)) > room:
            break
        count += 1
    return count


def frame_words(frames: Iterable[Frame]) -> list[int]:
    """The extra words of a batch with these frames."""
    return [word for frame in frames for word in (frame.blocks << 32 | frame.slots, frame.check)]


def _judge_frames(words: list[int], block_count: int, first_slot: int) -> list[Frame]:
    """The frame table of a batch whose frames begin at `first_slot`. Raises BadRecordError."""
    frames = [Frame(head >> 32, head & _U32, check) for head, check in zip(words[::2], words[1::2], strict=False)]
    if (
        len(words) % 2
        or sum(frame.blocks for frame in frames) != block_count
        or any(not (1 <= f.blocks <= MAX_FRAME_BLOCKS and 1 <= f.slots <= MAX_FRAME_BLOCKS) for f in frames)
        or first_slot + sum(frame.slots for frame in frames) > FIRST_SLOT_LIMIT
    ):
        raise BadRecordError("a frame table that does not match the batch's blocks")
    return frames


def _judge_header(
    header: bytes | bytearray | memoryview, pool: bytes, segment_id: int, slot: int
) -> tuple[bytearray, tuple[Any, ...]]:
    """A batch header's slots, its check field zeroed, and its fixed fields. Raises BadRecordError."""
    if len(header) < _BATCH.size:
        raise BadRecordError("a batch header cut short")
    fields = _BATCH.unpack_from(header)
    magic, version, kind, slots, _, uuid, segment, own_slot = fields[:8]
    op_count, block_count, extra_count, _, check = fields[12:]
    if magic != BATCH_MAGIC:
        raise BadRecordError("no batch header")
    if not 1 <= slots <= MAX_HEADER_SLOTS or len(header) < slots * BLOCK_BYTES:
        raise BadRecordError("a batch header cut short")
    raw = bytearray(header[: slots * BLOCK_BYTES])
    _U64.pack_into(raw, _CHECK_OFFSET, 0)
    if check != check_of(raw):
        raise BadRecordError("the batch header fails its check")
    if version != FORMAT_VERSION:
        raise BadRecordError(f"batch format {version}, this release reads {FORMAT_VERSION}", newer=True)
    if uuid != pool or segment != segment_id or own_slot != slot:
        raise BadRecordError("a batch that belongs elsewhere")
    word_count = OP_WORDS * op_count + block_count + extra_count
    if _BATCH.size + 8 * word_count > len(raw) or not 1 <= kind <= _MAX_KIND:
        raise BadRecordError("a batch header with impossible counts")
    return raw, fields


def _validate_ops(batch: Batch) -> None:
    """Check that the operations account for exactly the data blocks and extra words, and name what may exist."""
    kind = batch.kind
    blocks = extra = 0
    heads, starts, counts = (batch.ops[i::OP_WORDS] for i in range(OP_WORDS))
    if kind is Kind.PACKED:
        _judge_frames(batch.extra, len(batch.checks), batch.slot + batch.header_slots)
    if (
        kind in (Kind.LOG, Kind.MOVED, Kind.PACKED)
        and {word >> 56 for word in heads} == {Op.WRITE}
        and max(starts) + max(counts) <= MAX_BLOCKS
    ):
        # Nearly all of them.
        if sum(counts) != len(batch.checks) or (batch.extra and kind is not Kind.PACKED):
            raise BadRecordError("operations that do not match the batch's blocks")
        return
    for word, a, b in zip(heads, starts, counts, strict=True):
        op = word >> 56
        if op == Op.WRITE and kind in (Kind.LOG, Kind.MOVED, Kind.PACKED):
            blocks += b
            if a + b > MAX_BLOCKS:
                raise BadRecordError(f"a write of blocks from {a} on, which no volume has")
        elif op == Op.REWRITE and kind is Kind.LOG:
            blocks += b
            extra += b
            if a + b > MAX_BLOCKS or b > MAX_SLOTS:
                raise BadRecordError(f"a write of blocks from {a} on, which no volume has")
        elif op == Op.PAGE and kind is Kind.MAP:
            blocks += 1
        elif op == Op.CATALOG and kind is Kind.CATALOG:
            blocks += b
        elif not Op.WRITE <= op <= Op.FILLING:
            raise BadRecordError(f"unknown operation {op}")
        elif kind is not Kind.LOG or op in (Op.PAGE, Op.CATALOG):
            raise BadRecordError(f"the operation {Op(op).name} in a batch of kind {kind.name}")
        else:
            extra += _validate_log_op(Op(op), word & ID_MASK, a, b, batch.extra, extra)
    if blocks != len(batch.checks) or (extra != len(batch.extra) and kind is not Kind.PACKED):
        raise BadRecordError("operations that do not match the batch's blocks")


def _validate_log_op(op: Op, subject: int, a: int, b: int, words: list[int], at: int) -> int:
    """Judge an operation without data, whose extra words begin at `at`; return how many it takes."""
    if op is Op.CREATE:
        count = -(-(b & 0xFF) // 8)
        if b >> 8 > MAX_TIME_S:
            raise BadRecordError(f"a volume created {b >> 8} seconds after 1970")
        _require_size(a)
        try:
            validate_name("volume", name_from_words(words[at : at + count], b & 0xFF))
        except (TierError, UnicodeDecodeError) as error:
            raise BadRecordError(f"a volume's name is damaged: {error}") from None
        return count
    if op in (Op.MOVE, Op.RELOCATE):
        if not 1 <= subject <= MAX_SEGMENT_ID or a >> 32 >= MAX_SLOTS or a & 0xFFFFFFFF > MAX_SLOTS:
            raise BadRecordError(f"a move into segment {subject}, slot {a >> 32}, which can't be")
        return extra_words_of_move(op, a & 0xFFFFFFFF, words, at)
    if op is Op.LINK:
        if not 1 <= subject <= MAX_SEGMENT_ID:
            raise BadRecordError(f"a link to segment {subject}, which can't be")
    elif op is Op.RESIZE:
        _require_size(a)
    elif op is Op.POLICY and a:
        count = -(-a // 8)
        try:
            validate_name("policy", name_from_words(words[at : at + count], a))
        except (TierError, UnicodeDecodeError) as error:
            raise BadRecordError(f"a policy's name is damaged: {error}") from None
        return count
    elif op is Op.FILLING and a > 1:
        raise BadRecordError(f"a mark of being filled that is {a}, which can't be")
    elif op is Op.LOST and a >= MAX_BLOCKS:
        raise BadRecordError(f"a lost block {a}, which no volume has")
    elif op is Op.BAD and (a + b > MAX_BLOCKS or b > MAX_SLOTS):
        raise BadRecordError(f"{b} bad blocks from {a} on, which no volume has")
    return 0


def extra_words_of_move(op: Op, count: int, words: list[int], at: int) -> int:
    """How many extra words a record of `count` copies takes, the first of which is words[at]."""
    length = 1 + -(-count // 64)
    if op is Op.RELOCATE:
        length += sum(word.bit_count() for word in words[at + 1 : at + length])
    return length


def _require_size(size_bytes: int) -> None:
    try:
        validate_volume_size(size_bytes)
    except TierError as error:
        raise BadRecordError(str(error)) from None


def words_from_name(name: str) -> list[int]:
    """The extra words that hold a name."""
    encoded = name.encode()
    return [int.from_bytes(encoded[i : i + 8], "little") for i in range(0, len(encoded), 8)]


def name_from_words(words: list[int], length: int) -> str:
    """The name of `length` bytes that the extra words of a CREATE or POLICY hold. Raises UnicodeDecodeError."""
    return b"".join(word.to_bytes(8, "little") for word in words)[:length].decode()
