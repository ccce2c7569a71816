"""The backup stream: what a snapshot holds, or what changed since another one, as bytes for a file or a pipe.

A stream is a header, records in ascending order of offset, and an end record. It is written and read front to back
and never sought in, so it goes through ssh as well as into a file. What it may promise and how it notices damage:

- A full stream accounts for every byte of the snapshot, with data or with zeros. An incremental one accounts for what
  changed since its base, and says which one that was; everything else is as there.
- Each record's check covers the check before it. So a record that is removed, doubled, or moved elsewhere breaks the
  chain at its place, and nothing behind a break is believed.
- What a length may be is judged before anything is read or allocated for it: `decode_header`, `_decode_record_header`
  and `_decode_payload` are the only ones that meet untrusted bytes.
- Checks are XXH3: they find damage, and are no protection against forgery.

Little-endian. Header:

    offset size type  field
      0     8   bytes  magic "TRCBKUP1"
      8     2   u16    format version: 1
     10     2   u16    kind: 1 full, 2 incremental
     12     4   u32    length of the header with its check, h: at most 4096
     16    16   bytes  id of this stream, a random uuid
     32     8   u64    size of the volume at the snapshot, in bytes: 4096 to 1 PiB, a multiple of 512
     40     4   u32    block size: 4096
     44     4   u32    0
     48     8   u64    when the stream was begun; times are in microseconds since 1970
     56     8   u64    when the snapshot was taken
     64     8   u64    when the base was taken; full: 0
     72   8 x 2 u16    length in bytes of eight strings, at most 255 each, which follow in UTF-8 in this order:
     88     n   bytes  pool, volume, id of the volume, snapshot, id of the snapshot, base, id of the base, tool version
    h - 16  16  bytes  XXH3-128 of bytes 0 to h - 17

Magic, version, length and check stand there in every version, so that a newer one can be told from a damaged one.

Record header, 48 bytes, and behind it the payload:

      0     1   u8     kind: 1 data, 2 zeros, 3 end
      1     1   u8     encoding of the payload: 0 as it is, 1 one zstd frame (RFC 8878)
      2     2   u16    0
      4     4   u32    stored length of the payload, p: data at most 1 MiB; zeros 0; end 96
      8     8   u64    offset in the volume; a multiple of 512; end: 0
     16     8   u64    length there; data at most 1 MiB; a multiple of 512; end: 0
     24     8   u64    XXH3-64 of the payload as stored; without one 0
     32    16   bytes  XXH3-128 of the check before this one (of the header, or of the record before), then bytes 0-31

Payload of the end record, 96 bytes:

      0     8   u64    bytes in data records, as in the volume
      8     8   u64    bytes in zeros records
     16     8   u64    number of data records
     24     8   u64    number of zeros records
     32     8   u64    bytes of payload stored in data records
     40     8   u64    bytes of the whole stream, this record included
     48    16   bytes  XXH3-128 of the contents of all data records, uncompressed, in order
     64    16   bytes  XXH3-128 of all bytes of the stream before the end record
     80    16   bytes  id of this stream, as in the header

A stream counts only as a whole: one without its end record is cut short, whatever it holds.
"""

from __future__ import annotations

import errno
import struct
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from typing import NamedTuple, Protocol

import xxhash
import zstandard

from terrace.backup.errors import BackupError, BadStreamError, Fault
from tiers.names import MAX_VOLUME_BYTES, MIN_VOLUME_BYTES, SECTOR_BYTES

MAGIC = b"TRCBKUP1"
VERSION = 1
BLOCK_BYTES = 4096
MAX_HEADER_BYTES = 4096
MAX_DATA_BYTES = 1 << 20
"""The most that one data record holds, stored and unpacked."""
MAX_TEXT_BYTES = 255

_PREFIX = struct.Struct("<8sHHI")
_HEADER = struct.Struct("<8sHHI16sQIIQQQ8H")
_RECORD = struct.Struct("<BBHIQQQ")
_END = struct.Struct("<6Q16s16s16s")
CHECK_BYTES = 16
RECORD_BYTES = _RECORD.size + CHECK_BYTES
END_BYTES = _END.size
assert (_PREFIX.size, _HEADER.size, RECORD_BYTES, END_BYTES) == (16, 88, 48, 96)
assert _HEADER.size + 8 * MAX_TEXT_BYTES + CHECK_BYTES <= MAX_HEADER_BYTES
_MAX_TIME_US = 253_402_300_799_000_000
"""The end of the year 9999, behind which no calendar goes."""


class StreamKind(IntEnum):
    """Everything, or what is different from the base."""

    FULL = 1
    INCREMENTAL = 2


class Kind(IntEnum):
    """What a record is."""

    DATA = 1
    ZEROS = 2
    END = 3


class Encoding(IntEnum):
    """How a payload is stored."""

    RAW = 0
    ZSTD = 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One version of a volume. `id` is its source's word for it: never given to another one, whatever the name."""

    name: str
    id: str
    taken_us: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a stream says of itself. `base` is the snapshot that an incremental one builds on."""

    pool: str
    volume: str
    volume_id: str
    snapshot: Snapshot
    base: Snapshot | None
    size_bytes: int
    begun_us: int
    tool: str
    stream_id: bytes

    @property
    def kind(self) -> StreamKind:
        return StreamKind.FULL if self.base is None else StreamKind.INCREMENTAL

    @property
    def title(self) -> str:
        """`demo/vol@monday`."""
        return f"{self.pool}/{self.volume}@{self.snapshot.name}"


def new_stream_id() -> bytes:
    return uuid.uuid4().bytes


def time_text(time_us: int) -> str:
    """`2026-11-29 19:41:06 UTC`."""
    return datetime.fromtimestamp(time_us // 1_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


class Data(NamedTuple):
    """Bytes that stand at `offset`."""

    offset: int
    data: bytes

    @property
    def length(self) -> int:
        return len(self.data)


class Zeros(NamedTuple):
    """A range that must read as zeros."""

    offset: int
    length: int


Record = Data | Zeros


@dataclass(frozen=True, slots=True)
class Totals:
    """What the end record says, all of it verified by whoever hands it out."""

    data_bytes: int
    zero_bytes: int
    data_records: int
    zero_records: int
    stored_bytes: int
    stream_bytes: int
    content_check: bytes
    stream_check: bytes


# -- header ------------------------------------------------------------------------------------------------------------


def encode_header(header: Header) -> bytes:
    """The bytes of a header. Raises BackupError if the names of its parts can't be written."""
    base = header.base or Snapshot("", "", 0)
    snapshot = header.snapshot
    texts = [
        text.encode()
        for text in (
            *(header.pool, header.volume, header.volume_id, snapshot.name, snapshot.id),
            *(base.name, base.id, header.tool),
        )
    ]
    if any(len(text) > MAX_TEXT_BYTES for text in texts):
        raise BackupError(
            errno.ENAMETOOLONG, f"a name of {header.title} has more than {MAX_TEXT_BYTES} bytes; use a shorter one"
        )
    length = _HEADER.size + sum(map(len, texts)) + CHECK_BYTES
    fixed = _HEADER.pack(
        *(MAGIC, VERSION, header.kind, length, header.stream_id, header.size_bytes, BLOCK_BYTES, 0),
        *(header.begun_us, snapshot.taken_us, base.taken_us, *map(len, texts)),
    )
    body = fixed + b"".join(texts)
    return body + _check(body)


def decode_header(raw: bytes, stream: str) -> Header:
    """Judge the bytes of a whole header, whose length `header_length` has said. Raises BadStreamError."""

    def damaged(why: str) -> BadStreamError:
        return BadStreamError(stream, Fault.DAMAGED, 0, f"is damaged in its header (bytes 0 to {len(raw) - 1}): {why}")

    if _check(raw[:-CHECK_BYTES]) != raw[-CHECK_BYTES:]:
        raise damaged("the checksum is wrong")
    version = int.from_bytes(raw[8:10], "little")
    if version != VERSION:
        raise BadStreamError(
            stream, Fault.NEWER, 8, f"has format version {version} (byte 8) and this release knows {VERSION}"
        )
    if len(raw) < _HEADER.size + CHECK_BYTES:
        raise damaged("it is too short")
    _, _, kind, _, stream_id, size, block, zero, begun_us, taken_us, base_us, *lengths = _HEADER.unpack_from(raw)
    if _HEADER.size + sum(lengths) + CHECK_BYTES != len(raw) or max(lengths) > MAX_TEXT_BYTES:
        raise damaged("its strings don't fit")
    texts, at = [], _HEADER.size
    for length in lengths:
        try:
            texts.append(raw[at : at + length].decode())
        except UnicodeDecodeError:
            raise damaged("a name in it is not UTF-8") from None
        at += length
    if not all(text.isprintable() for text in texts):
        raise damaged("a name in it can't be printed")
    pool, volume, volume_id, name, snapshot_id, base_name, base_id, tool = texts
    if not (pool and volume and volume_id and name and snapshot_id):
        raise damaged("it names no snapshot")
    if kind not in (StreamKind.FULL, StreamKind.INCREMENTAL) or block != BLOCK_BYTES or zero:
        raise damaged(f"kind {kind}, block size {block}")
    if not MIN_VOLUME_BYTES <= size <= MAX_VOLUME_BYTES or size % SECTOR_BYTES:
        raise damaged(f"no volume has {size} bytes")
    if max(begun_us, taken_us, base_us) > _MAX_TIME_US:
        raise damaged("a time in it is impossible")
    has_base = kind == StreamKind.INCREMENTAL
    if has_base != bool(base_id) or has_base != bool(base_name) or (base_us and not has_base):
        raise damaged("kind and base don't agree")
    if base_id == snapshot_id:
        raise damaged("it is its own base")
    base = Snapshot(base_name, base_id, base_us) if has_base else None
    snapshot = Snapshot(name, snapshot_id, taken_us)
    return Header(pool, volume, volume_id, snapshot, base, size, begun_us, tool, stream_id)


def _header_length(prefix: bytes, stream: str) -> int:
    """How long the header is, by its first 16 bytes. Raises BadStreamError if it is none."""
    if not prefix:
        raise BadStreamError(stream, Fault.EMPTY, 0, "is empty")
    if not MAGIC.startswith(prefix[: len(MAGIC)]):
        raise BadStreamError(stream, Fault.NOT_A_BACKUP, 0, "is not a backup: it doesn't begin with Terrace's mark")
    if len(prefix) < _PREFIX.size:
        raise BadStreamError(stream, Fault.CUT_SHORT, len(prefix), f"is cut short at byte {len(prefix)}, in its header")
    length: int = _PREFIX.unpack(prefix)[3]
    if not _PREFIX.size + CHECK_BYTES <= length <= MAX_HEADER_BYTES:
        raise BadStreamError(
            stream, Fault.DAMAGED, 12, f"is damaged at byte 12: a header of {length} bytes is impossible"
        )
    return length


# -- writing -----------------------------------------------------------------------------------------------------------


class StreamEncoder:
    """The bytes of one stream: `begin`, then `data` and `zeros` in ascending order, then `end`. No IO."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._chain = b""
        self._stream = xxhash.xxh3_128()
        self._content = xxhash.xxh3_128()
        self._data_bytes = self._zero_bytes = self._data_records = self._zero_records = self._stored_bytes = 0
        self.stream_bytes = 0

    def begin(self) -> bytes:
        encoded = encode_header(self._header)
        self._chain = encoded[-CHECK_BYTES:]
        self._stream.update(encoded)
        self.stream_bytes = len(encoded)
        return encoded

    def data(self, offset: int, content: bytes, encoding: Encoding, payload: bytes) -> bytes:
        """A data record: `payload` is `content`, encoded by `encode_payload`. Followed by the payload itself."""
        assert 0 < len(payload) <= len(content) <= MAX_DATA_BYTES
        self._content.update(content)
        self._data_bytes += len(content)
        self._data_records += 1
        self._stored_bytes += len(payload)
        return self._record(Kind.DATA, encoding, offset, len(content), payload)

    def zeros(self, offset: int, length: int) -> bytes:
        self._zero_bytes += length
        self._zero_records += 1
        return self._record(Kind.ZEROS, Encoding.RAW, offset, length, b"")

    def end(self) -> tuple[bytes, Totals]:
        stream_bytes = self.stream_bytes + RECORD_BYTES + END_BYTES
        totals = Totals(
            *(self._data_bytes, self._zero_bytes, self._data_records, self._zero_records, self._stored_bytes),
            *(stream_bytes, self._content.digest(), self._stream.digest()),
        )
        return self._record(Kind.END, Encoding.RAW, 0, 0, _encode_end(totals, self._header.stream_id)), totals

    def _record(self, kind: Kind, encoding: Encoding, offset: int, length: int, payload: bytes) -> bytes:
        body = _RECORD.pack(kind, encoding, 0, len(payload), offset, length, _payload_check(payload))
        self._chain = _check(self._chain + body)
        encoded = b"".join((body, self._chain, payload))
        self._stream.update(encoded)
        self.stream_bytes += len(encoded)
        return encoded


def encode_payload(content: bytes, level: int) -> tuple[Encoding, bytes]:
    """How `content` is stored: compressed if that makes it smaller. For worker threads."""
    compressed = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True).compress(content)
    return (Encoding.ZSTD, compressed) if len(compressed) < len(content) else (Encoding.RAW, content)


def _encode_end(totals: Totals, stream_id: bytes) -> bytes:
    return _END.pack(
        *(totals.data_bytes, totals.zero_bytes, totals.data_records, totals.zero_records, totals.stored_bytes),
        *(totals.stream_bytes, totals.content_check, totals.stream_check, stream_id),
    )


# -- reading -----------------------------------------------------------------------------------------------------------


class ByteSource(Protocol):
    """A file or pipe: `read` gives up to so many bytes, none at the end. It blocks: None, would block, is refused."""

    def read(self, size: int, /) -> bytes | None: ...


class _RecordHeader(NamedTuple):
    kind: Kind
    encoding: Encoding
    stored: int
    offset: int
    length: int
    check: int


class StreamReader:
    """Reads one stream front to back, and hands out nothing that wasn't verified. Blocks where its source does.

    `stream` is what errors call it. Raises BadStreamError, and BackupError where the source can't be read.
    """

    def __init__(self, source: ByteSource, stream: str) -> None:
        self._source = source
        self.stream = stream
        self.position = 0
        self.totals: Totals | None = None
        """Known once `records` has ended."""
        self._hash = xxhash.xxh3_128()
        prefix = self._read_some(_PREFIX.size)
        length = _header_length(prefix, stream)
        raw = prefix + self._read(length - len(prefix), "its header")
        self.header = decode_header(raw, stream)
        self._chain = raw[-CHECK_BYTES:]

    def records(self) -> Iterator[Record]:
        """Each record; ends only behind a sound end record that is the last there is. To be called once."""
        covered = data_bytes = zero_bytes = data_records = zero_records = stored_bytes = 0
        content = xxhash.xxh3_128()
        size, full = self.header.size_bytes, self.header.base is None
        while True:
            start, stream_check = self.position, self._hash.digest()
            head = self._record_header(start)
            if head.kind is Kind.END:
                break
            if head.offset < covered or head.offset + head.length > size or (full and head.offset != covered):
                raise self._damaged(start, f"a record for {head.offset} + {head.length} comes after {covered}")
            covered = head.offset + head.length
            if head.kind is Kind.ZEROS:
                zero_bytes += head.length
                zero_records += 1
                yield Zeros(head.offset, head.length)
                continue
            payload = self._payload(head, start)
            try:
                data = _decode_payload(head, payload)
            except zstandard.ZstdError as error:
                raise self._damaged(start, f"its data can't be unpacked ({error})") from None
            content.update(data)
            data_bytes += head.length
            data_records += 1
            stored_bytes += head.stored
            yield Data(head.offset, data)
        payload = self._payload(head, start)
        totals = Totals(
            *(data_bytes, zero_bytes, data_records, zero_records, stored_bytes),
            *(self.position, content.digest(), stream_check),
        )
        if payload != _encode_end(totals, self.header.stream_id):
            raise self._damaged(start, "the end record's totals are not those of the stream")
        if full and covered != size:
            raise self._damaged(start, f"the end comes after {covered} of {size} bytes of the volume")
        if self._read_some(1):
            at = totals.stream_bytes
            raise BadStreamError(
                self.stream, Fault.TRAILING, at, f"has something behind its end, from byte {at} on, that isn't of it"
            )
        self.totals = totals

    def _record_header(self, start: int) -> _RecordHeader:
        raw = self._read(RECORD_BYTES, "the header of a record")
        check = _check(self._chain + raw[: _RECORD.size])
        if check != raw[_RECORD.size :]:
            raise self._damaged(start, "the header of a record is wrong, or isn't that of the one that belongs here")
        head = _decode_record_header(raw)
        if head is None:
            raise self._damaged(start, "a record that no release writes")
        self._chain = check
        return head

    def _payload(self, head: _RecordHeader, start: int) -> bytes:
        payload = self._read(head.stored, "a record")
        if _payload_check(payload) != head.check:
            raise self._damaged(start, "the data of a record has a wrong checksum")
        return payload

    def _damaged(self, offset: int, why: str) -> BadStreamError:
        return BadStreamError(self.stream, Fault.DAMAGED, offset, f"is damaged at byte {offset}: {why}")

    def _read(self, length: int, inside: str) -> bytes:
        raw = self._read_some(length)
        if len(raw) < length:
            raise BadStreamError(
                self.stream, Fault.CUT_SHORT, self.position, f"is cut short at byte {self.position}, in {inside}"
            )
        return raw

    def _read_some(self, length: int) -> bytes:
        """`length` bytes, or as many as there are."""
        parts, missing = [], length
        while missing:
            try:
                part = self._source.read(missing)
                if part is None:
                    raise BlockingIOError(errno.EAGAIN, "it doesn't wait for data (O_NONBLOCK)")
            except OSError as error:
                at = self.position + length - missing
                raise BackupError(
                    error.errno or errno.EIO,
                    f"{self.stream} can't be read at byte {at}: {error.strerror or error}; see that it can",
                ) from None
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        raw = b"".join(parts)
        self.position += len(raw)
        self._hash.update(raw)
        return raw


def _decode_record_header(raw: bytes) -> _RecordHeader | None:
    """Judge a record's header whose check is right. None if it can't be."""
    kind, encoding, zero, stored, offset, length, check = _RECORD.unpack_from(raw)
    if zero or kind not in tuple(Kind) or encoding not in tuple(Encoding):
        return None
    if kind == Kind.END:
        sound = encoding == Encoding.RAW and stored == END_BYTES and not offset and not length
    else:
        sound = length > 0 and offset % SECTOR_BYTES == 0 and length % SECTOR_BYTES == 0
        if kind == Kind.ZEROS:
            sound = sound and encoding == Encoding.RAW and stored == 0 and check == 0 and length <= MAX_VOLUME_BYTES
        elif encoding == Encoding.RAW:
            sound = sound and stored == length <= MAX_DATA_BYTES
        else:
            sound = sound and 0 < stored < length <= MAX_DATA_BYTES
    return _RecordHeader(Kind(kind), Encoding(encoding), stored, offset, length, check) if sound else None


def _decode_payload(head: _RecordHeader, payload: bytes) -> bytes:
    """The content of a data record. Raises ZstdError unless it is one frame of exactly that length."""
    if head.encoding is Encoding.RAW:
        return payload
    parameters = zstandard.get_frame_parameters(payload)
    # Memory is taken for what the frame says, so that is judged first.
    if parameters.content_size != head.length or parameters.window_size > MAX_DATA_BYTES or parameters.dict_id:
        raise zstandard.ZstdError("a frame that no release writes")
    unpacked = zstandard.ZstdDecompressor(max_window_size=MAX_DATA_BYTES).decompress(
        payload, max_output_size=head.length, allow_extra_data=False
    )
    if len(unpacked) != head.length:
        raise zstandard.ZstdError("a frame of another length")
    return unpacked


def read_end(raw: bytes, header: Header, stream_bytes: int) -> Totals | None:
    """The totals in the last `RECORD_BYTES + END_BYTES` of a file of so many bytes; None if it has no end of this one.

    Quick, for lists: it says that the file is complete, not that it is sound.
    """
    if len(raw) != RECORD_BYTES + END_BYTES:
        return None
    head, payload = _decode_record_header(raw), raw[RECORD_BYTES:]
    if head is None or head.kind is not Kind.END or head.check != _payload_check(payload):
        return None
    *numbers, content_check, stream_check, stream_id = _END.unpack(payload)
    data, zero, data_records, zero_records, stored, whole = numbers
    totals = Totals(data, zero, data_records, zero_records, stored, whole, content_check, stream_check)
    return totals if stream_id == header.stream_id and totals.stream_bytes == stream_bytes else None


# -- verifying ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Report:
    """What a sound stream is."""

    header: Header
    totals: Totals

    @property
    def ratio(self) -> float:
        """How many times smaller the data is in the stream."""
        return self.totals.data_bytes / self.totals.stored_bytes if self.totals.stored_bytes else 1.0


def verify(source: ByteSource, stream: str, advance: Callable[[int], None] | None = None) -> Report:
    """Read a whole stream and check everything. `advance` hears of the bytes read. Blocks; raises BadStreamError."""
    reader = StreamReader(source, stream)
    for _ in reader.records():
        if advance is not None:
            advance(reader.position)
    assert reader.totals is not None
    return Report(reader.header, reader.totals)


# -- checks ------------------------------------------------------------------------------------------------------------


def _check(raw: bytes) -> bytes:
    return xxhash.xxh3_128_digest(raw)


def _payload_check(payload: bytes) -> int:
    return xxhash.xxh3_64_intdigest(payload) if payload else 0
