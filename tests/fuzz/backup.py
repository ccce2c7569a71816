"""The fuzz target of backup streams, which may come from anywhere.

An input's first byte may ask that checksums, and totals, be put right after it was mutated: else nothing but the
checksums would be tested.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from terrace.backup.errors import BadStreamError
from terrace.backup.stream import (
    END_BYTES,
    MAGIC,
    MAX_DATA_BYTES,
    RECORD_BYTES,
    Data,
    Encoding,
    StreamEncoder,
    StreamReader,
    Zeros,
    encode_header,
    read_end,
)
from tests.fuzz.engine import Target
from tests.terrace.backupstreams import encoded, resealed
from tests.terrace.fakevolume import STREAM_ID, header

SEALED, TOTALLED = 1, 2
"""Bits of an input's first byte: all checks are put right; so are the end's totals."""
BLOCK = 4096


class Bounded:
    """The bytes of a stream; nobody needs more of it at a time than a record may have."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._at = 0

    def read(self, size: int, /) -> bytes:
        assert 0 < size <= MAX_DATA_BYTES
        part = self._raw[self._at : self._at + size]
        self._at += len(part)
        return part


def run_backup(data: bytes) -> None:
    """A stream is refused with its byte, or all of it is of the form that we write."""
    flags, raw = data[0] if data else 0, data[1:]
    if flags & SEALED:
        raw = resealed(raw, totals=bool(flags & TOTALLED))
    try:
        reader = StreamReader(Bounded(raw), "fuzz")
        records = list(reader.records())
    except BadStreamError as error:
        assert 0 <= error.offset <= len(raw) and str(error)
        return
    totals = reader.totals
    assert totals is not None and totals.stream_bytes == len(raw)
    assert read_end(raw[-RECORD_BYTES - END_BYTES :], reader.header, len(raw)) == totals
    encoder = StreamEncoder(reader.header)
    assert raw.startswith(encoder.begin()) and raw.startswith(encode_header(reader.header))
    at = 0
    for record in records:
        assert at <= record.offset and record.length > 0
        at = record.offset + record.length
        if isinstance(record, Data):
            encoder.data(record.offset, record.data, Encoding.RAW, record.data)
        else:
            encoder.zeros(record.offset, record.length)
    assert at <= reader.header.size_bytes
    _, again = encoder.end()
    assert (again.data_bytes, again.zero_bytes, again.content_check) == (
        *(totals.data_bytes, totals.zero_bytes),
        totals.content_check,
    )


def _seeds() -> Sequence[bytes]:
    text = b"".join(b"line %d of many\n" % i for i in range(300))[:BLOCK]
    noise = random.Random(5).randbytes(512)
    streams = [
        encoded(BLOCK, None, Zeros(0, BLOCK)),
        encoded(2 * BLOCK, None, Data(0, text), Zeros(BLOCK, BLOCK)),
        encoded(BLOCK + 512, None, Data(0, text), Data(BLOCK, noise)),
        encoded(1 << 50, 1, Zeros(1 << 40, 1 << 45), Data((1 << 50) - 512, noise)),
        encoded(BLOCK, 1),
    ]
    newer = bytearray(streams[0])
    newer[8] = 2
    return [bytes([flags]) + stream for stream in [*streams, bytes(newer)] for flags in (0, 3)]


BACKUP = [
    Target(
        "backup",
        run_backup,
        _seeds,
        [MAGIC, STREAM_ID, b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18", encode_header(header(BLOCK, 2, 1))],
        examples=200,
    )
]
