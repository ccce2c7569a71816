"""The codecs of everything that is appended to a segment: the segment header, and batches of records.

Bytes from a device are untrusted until `decode_segment_header` or `decode_batch` has judged them; what these return
is sound. All integers are little-endian.

Segment header: slot 0 of every segment, written when the segment is opened.

    offset size type  field
      0     8   bytes  magic "TRCSEGM1"
      8     2   u16    format version (1); another version is refused
     10     2   u16    kind: 1 log, 2 moved data, 3 map pages, 4 copies of the catalog
     12     4   u32    device index
     16    16   bytes  pool uuid
     32     8   u64    segment id
     40     8   u64    physical index of the segment on its device
     48     8   u64    incarnation of the pool that opened it
     56     8   u64    sequence of the newest checkpoint committed by then
     64     8   u64    sequence of the last batch before it
     72     8   u64    XXH3-64 of bytes 0-71
     80  4016          zeros

Batch: one or more header slots, then the data blocks it brings, in slots that follow.

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
    ...   8 n   u64    extra words
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

A torn or lost batch fails its check, or one of its blocks does, and ends the log unless a later batch proves by its
durable_seq that it had been durable (see recovery).
"""

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from tiers.layout import BLOCK_BYTES, check_of

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


class Kind(IntEnum):
    """What a segment, and every batch in it, holds."""

    LOG = 1
    MOVED = 2
    MAP = 3
    CATALOG = 4


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
        return self.header_slots + len(self.checks)

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
    if kind not in (1, 2, 3, 4):
        raise BadRecordError(f"unknown segment kind {kind}")
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
    if len(header) < _BATCH.size:
        raise BadRecordError("a batch header cut short")
    (
        magic,
        version,
        kind,
        slots,
        _,
        uuid,
        segment,
        own_slot,
        incarnation,
        seq,
        prev_check,
        durable_seq,
        op_count,
        block_count,
        extra_count,
        _,
        check,
    ) = _BATCH.unpack_from(header)
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
    if _BATCH.size + 8 * word_count > len(raw) or kind not in (1, 2, 3, 4):
        raise BadRecordError("a batch header with impossible counts")
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


def _validate_ops(batch: Batch) -> None:
    """Check that the operations account for exactly the data blocks and extra words that the batch has."""
    blocks = extra = 0
    if {word >> 56 for word in batch.ops[::OP_WORDS]} == {Op.WRITE}:  # nearly all of them
        if sum(batch.ops[2::OP_WORDS]) != len(batch.checks) or batch.extra:
            raise BadRecordError("operations that do not match the batch's blocks")
        return
    for word, a, b in zip(batch.ops[::3], batch.ops[1::3], batch.ops[2::3], strict=True):
        op = word >> 56
        if op in (Op.WRITE, Op.CATALOG):
            blocks += b
        elif op == Op.PAGE:
            blocks += 1
        elif op == Op.CREATE:
            extra += -(-(b & 0xFF) // 8)
        elif op == Op.MOVE:
            extra += 1 + -(-(a & 0xFFFFFFFF) // 64)
        elif op not in (Op.UNMAP, Op.RESIZE, Op.DELETE, Op.LINK, Op.BAD):
            raise BadRecordError(f"unknown operation {op}")
    if blocks != len(batch.checks) or extra != len(batch.extra):
        raise BadRecordError("operations that do not match the batch's blocks")
