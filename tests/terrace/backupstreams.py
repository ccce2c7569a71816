"""Backup streams made by hand, and taken apart and put together again with every checksum right, as by a forger."""

from __future__ import annotations

import struct

import xxhash
import zstandard

from terrace.backup.stream import (
    CHECK_BYTES,
    END_BYTES,
    MAX_DATA_BYTES,
    RECORD_BYTES,
    Data,
    Encoding,
    Kind,
    Record,
    StreamEncoder,
    encode_payload,
)
from tests.terrace.fakevolume import header


def encoded(size: int, base: int | None, *records: Record, level: int = 1) -> bytes:
    """A stream of snapshot 1, or of the one after `base`."""
    encoder = StreamEncoder(header(size, 1 if base is None else base + 1, base))
    parts = [encoder.begin()]
    for record in records:
        if isinstance(record, Data):
            parts.append(encoder.data(record.offset, record.data, *encode_payload(record.data, level)))
        else:
            parts.append(encoder.zeros(record.offset, record.length))
    parts.append(encoder.end()[0])
    return b"".join(parts)


def parts_of(stream: bytes) -> list[bytes]:
    """The header, and each record with its payload, as far as lengths make sense."""
    length = int.from_bytes(stream[12:16], "little")
    parts, at = [stream[:length]], length
    while at < len(stream):
        end = at + RECORD_BYTES + int.from_bytes(stream[at + 4 : at + 8], "little")
        parts.append(stream[at:end])
        at = end
    return parts


def resealed(stream: bytes, *, totals: bool = False) -> bytes:
    """The same with every check right; with `totals` the end record counts what is there, too."""
    first, *records = parts_of(stream)
    chain = xxhash.xxh3_128_digest(first[:-CHECK_BYTES])
    out = first[:-CHECK_BYTES] + chain
    content, counts = xxhash.xxh3_128(), [0, 0, 0, 0, 0]
    for record in records:
        payload = record[RECORD_BYTES:]
        body = record[:24].ljust(24, b"\0")
        kind, encoding = body[0], body[1]
        if kind == Kind.DATA:
            length = int.from_bytes(body[16:24], "little")
            counts = [counts[0] + length, counts[1], counts[2] + 1, counts[3], counts[4] + len(payload)]
            content.update(payload if encoding == Encoding.RAW else _unpacked(payload))
        elif kind == Kind.ZEROS:
            length = int.from_bytes(body[16:24], "little")
            counts = [counts[0], counts[1] + length, counts[2], counts[3] + 1, counts[4]]
        elif totals and len(payload) == END_BYTES:
            numbers = [count % (1 << 64) for count in counts]
            payload = struct.pack("<6Q", *numbers, len(out) + RECORD_BYTES + END_BYTES)
            payload += content.digest() + xxhash.xxh3_128_digest(out) + out[16:32]
        body += struct.pack("<Q", xxhash.xxh3_64_intdigest(payload) if payload else 0)
        chain = xxhash.xxh3_128_digest(chain + body)
        out += body + chain + payload
    return out


def _unpacked(payload: bytes) -> bytes:
    try:
        if zstandard.get_frame_parameters(payload).content_size > MAX_DATA_BYTES:
            return b""
        return zstandard.ZstdDecompressor(max_window_size=MAX_DATA_BYTES).decompress(payload, MAX_DATA_BYTES)
    except zstandard.ZstdError:
        return b""
