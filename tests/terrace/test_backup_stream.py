"""The backup stream: what goes in comes out, and whatever happens to its bytes is noticed, and said where."""

from __future__ import annotations

import io
import os
import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from terrace.backup.errors import BackupError, BadStreamError, Fault
from terrace.backup.stream import (
    END_BYTES,
    MAX_DATA_BYTES,
    RECORD_BYTES,
    Data,
    Encoding,
    Record,
    StreamEncoder,
    Zeros,
    encode_header,
    read_end,
    verify,
)
from tests.terrace.backupstreams import encoded, parts_of, resealed
from tests.terrace.fakevolume import BLOCK, header, reader, stream_of

GOLDEN = Path(__file__).with_name("golden") / "v1-backup.hex"
TEXT = b"".join(b"line %d of many\n" % i for i in range(1000))[: 2 * BLOCK]
NOISE = random.Random(7).randbytes(BLOCK)


def example() -> bytes:
    """A full stream of 28 KiB with each kind of record."""
    return encoded(
        7 * BLOCK, None, Data(0, TEXT), Zeros(2 * BLOCK, 3 * BLOCK), Data(5 * BLOCK, NOISE), Data(24576, NOISE)
    )


def increment() -> bytes:
    return encoded(
        7 * BLOCK, 1, Data(BLOCK, NOISE), Data(3 * BLOCK, NOISE), Zeros(4 * BLOCK, BLOCK), Data(24576, TEXT[:BLOCK])
    )


def fault(stream: bytes) -> BadStreamError:
    with pytest.raises(BadStreamError) as caught:
        verify(io.BytesIO(stream), "FILE")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("FILE ")
    assert 0 <= caught.value.offset <= len(stream)
    return caught.value


def test_what_goes_in_comes_out() -> None:
    records: list[Record] = [Data(0, TEXT), Zeros(2 * BLOCK, 3 * BLOCK), Data(5 * BLOCK, NOISE), Data(6 * BLOCK, NOISE)]
    stream = encoded(7 * BLOCK, None, *records)
    found = reader(stream)
    assert found.header == header(7 * BLOCK, 1)
    assert list(found.records()) == records
    report = verify(io.BytesIO(stream), "FILE")
    assert (report.totals.data_bytes, report.totals.zero_bytes) == (4 * BLOCK, 3 * BLOCK)
    assert report.totals.stream_bytes == len(stream)
    assert report.ratio > 1
    assert read_end(stream[-RECORD_BYTES - END_BYTES :], report.header, len(stream)) == report.totals


def test_version_1_has_the_bytes_that_it_always_had() -> None:
    """Written raw, so that it doesn't depend on the release of zstd."""
    encoder = StreamEncoder(header(3 * BLOCK, 2, 1))
    records = [encoder.begin(), encoder.data(512, NOISE[:512], Encoding.RAW, NOISE[:512]), encoder.zeros(BLOCK, BLOCK)]
    stream = b"".join([*records, encoder.end()[0]])
    assert stream == bytes.fromhex(GOLDEN.read_text())
    assert list(reader(stream).records()) == [Data(512, NOISE[:512]), Zeros(BLOCK, BLOCK)]


def test_a_source_that_gives_a_byte_at_a_time_is_read_as_well() -> None:
    class Trickle(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(1, size or 0))

    assert verify(Trickle(example()), "-").totals.data_records == 3


@pytest.mark.parametrize("stream", [example(), increment()], ids=["full", "incremental"])
def test_every_flipped_bit_is_noticed(stream: bytes) -> None:
    """Each bit of the structures, and one of each 8th byte of the payloads."""
    at, places = 0, set[int]()
    for part in parts_of(stream):
        structure = len(part) if not at or len(part) == RECORD_BYTES + END_BYTES else RECORD_BYTES
        places |= {8 * at + bit for bit in range(8 * structure)}
        places |= {8 * at + bit for bit in range(8 * structure, 8 * len(part), 67)}
        at += len(part)
    for place in places:
        flipped = bytearray(stream)
        flipped[place // 8] ^= 1 << place % 8
        found = fault(bytes(flipped))
        # Within a record of it: 48 bytes of header, and what follows is read before it is judged.
        assert found.fault in (Fault.DAMAGED, Fault.NOT_A_BACKUP, Fault.CUT_SHORT)
        assert found.fault is not Fault.CUT_SHORT or place // 8 in range(12, 16)


@pytest.mark.parametrize("stream", [example(), increment()], ids=["full", "incremental"])
def test_every_truncation_is_noticed_at_its_byte(stream: bytes) -> None:
    boundaries = {sum(map(len, parts_of(stream)[:i])) for i in range(len(parts_of(stream)))}
    for end in {*range(1, 200), *range(200, len(stream), 97), *boundaries - {0}, len(stream) - 1}:
        found = fault(stream[:end])
        assert (found.fault, found.offset) == (Fault.CUT_SHORT, end), found
        assert f"cut short at byte {end}" in str(found)
    assert fault(b"").fault is Fault.EMPTY


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_dropped_doubled_or_moved_record_is_noticed(data: st.DataObject) -> None:
    parts = parts_of(data.draw(st.sampled_from([example(), increment()])))
    which = data.draw(st.integers(1, len(parts) - 1))
    other = data.draw(st.integers(1, len(parts) - 1))
    how = data.draw(st.sampled_from(["drop", "double", "move", "swap"]))
    changed = list(parts)
    if how == "drop":
        del changed[which]
    elif how == "double":
        changed.insert(other, parts[which])
    elif how == "move":
        changed.insert(other, changed.pop(which))
    else:
        changed[which], changed[other] = changed[other], changed[which]
    if changed != parts:
        assert fault(b"".join(changed)).fault in (Fault.DAMAGED, Fault.CUT_SHORT, Fault.TRAILING)


def test_a_record_of_another_stream_is_noticed() -> None:
    ours, theirs = parts_of(increment()), parts_of(stream_of(TEXT + bytes(BLOCK) + NOISE, 3))
    assert fault(b"".join([*ours[:2], theirs[1], *ours[3:]])).fault is Fault.DAMAGED
    assert fault(b"".join([*ours[:-1], theirs[-1]])).fault is Fault.DAMAGED


def test_what_is_behind_the_end_is_noticed() -> None:
    stream = example()
    for more in (b"\0", stream, b"garbage" * 100):
        found = fault(stream + more)
        assert (found.fault, found.offset) == (Fault.TRAILING, len(stream))
        assert f"from byte {len(stream)}" in str(found)


def test_a_newer_version_is_told_from_a_damaged_one() -> None:
    raw = bytearray(encode_header(header(7 * BLOCK, 1)))
    raw[8] = 2
    assert fault(bytes(raw)).fault is Fault.DAMAGED
    body = bytes(raw[:-16]) + b"whatever a newer one has here"
    body = body[:12] + struct.pack("<I", len(body) + 16) + body[16:]
    found = fault(body + xxhash.xxh3_128_digest(body) + b"and so on")
    assert (found.fault, found.offset) == (Fault.NEWER, 8)
    assert "version 2" in str(found) and "release that wrote it" in str(found)


@pytest.mark.parametrize("raw", [b"x", b"\x1f\x8b\x08" + bytes(5000), b"TERRACE\0" + bytes(504), bytes(1 << 16)])
def test_what_is_no_backup_is_called_so(raw: bytes) -> None:
    found = fault(raw)
    assert (found.fault, found.offset) == (Fault.NOT_A_BACKUP, 0)
    assert "is not a backup" in str(found)


@pytest.mark.parametrize("length", [0, 31, 4097, 1 << 31, (1 << 32) - 1])
def test_a_header_of_impossible_length_is_not_read(length: int) -> None:
    stream = example()
    assert fault(stream[:12] + struct.pack("<I", length) + stream[16:]).fault is Fault.DAMAGED


class Counting(io.BytesIO):
    """What was asked for at once, at most."""

    asked = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.asked = max(self.asked, size or 0)
        return super().read(size)


@pytest.mark.parametrize(
    ("place", "format", "value"),
    [
        *((4, "<I", value) for value in (MAX_DATA_BYTES + 1, 1 << 31, (1 << 32) - 1, 0)),
        *((8, "<Q", value) for value in (1, 1 << 50, (1 << 64) - 512)),
        *((16, "<Q", value) for value in (0, 511, MAX_DATA_BYTES + 512, 1 << 63)),
        *((0, "<B", value) for value in (0, 4, 255)),
        (1, "<B", 2),
        (2, "<H", 1),
    ],
)
def test_impossible_values_with_right_checksums_are_refused_before_anything_is_allocated(
    place: int, format: str, value: int
) -> None:
    parts = parts_of(example())
    raw = bytearray(parts[1])
    struct.pack_into(format, raw, place, value)
    chain = xxhash.xxh3_128_digest(parts[0][-16:] + bytes(raw[:32]))
    source = Counting(parts[0] + bytes(raw[:32]) + chain + bytes(raw[RECORD_BYTES:]) + b"".join(parts[2:]))
    with pytest.raises(BadStreamError) as caught:
        verify(source, "FILE")
    assert caught.value.fault is Fault.DAMAGED
    assert source.asked <= MAX_DATA_BYTES


@pytest.mark.parametrize(
    "payload",
    [
        zstandard.ZstdCompressor().compress(bytes(1 << 26)),  # a bomb: its frame says 64 MiB
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2 * BLOCK)),
        zstandard.ZstdCompressor().compress(bytes(BLOCK)),  # half of what the record says
        zstandard.ZstdCompressor().compress(bytes(2 * BLOCK)) + b"more",
        b"\x50\x2a\x4d\x18\4\0\0\0skip",
        b"\x28\xb5\x2f\xfd",
        bytes(100),
    ],
)
def test_a_payload_that_unpacks_to_something_else_is_refused(payload: bytes) -> None:
    encoder = StreamEncoder(header(2 * BLOCK, 1))
    stream = encoder.begin() + encoder.data(0, bytes(2 * BLOCK), Encoding.ZSTD, payload) + encoder.end()[0]
    found = fault(stream)
    assert found.fault is Fault.DAMAGED and "unpacked" in str(found)


def test_a_full_stream_must_account_for_every_byte() -> None:
    for records in ([Zeros(0, BLOCK)], [Zeros(BLOCK, BLOCK)], [Zeros(0, BLOCK), Data(2 * BLOCK, NOISE)], []):
        assert fault(encoded(3 * BLOCK, None, *records)).fault is Fault.DAMAGED
    assert verify(io.BytesIO(encoded(3 * BLOCK, 1)), "an increment without a change").totals.data_bytes == 0


@pytest.mark.parametrize(
    "records",
    [
        [Zeros(BLOCK, BLOCK), Zeros(0, BLOCK)],
        [Data(0, NOISE), Data(512, NOISE)],
        [Zeros(2 * BLOCK, 2 * BLOCK)],
        [Zeros(1 << 49, BLOCK)],
    ],
)
def test_records_that_overlap_go_back_or_pass_the_end_are_refused(records: list[Record]) -> None:
    assert fault(encoded(3 * BLOCK, 1, *records)).fault is Fault.DAMAGED


def test_totals_that_are_not_those_of_the_stream_are_refused() -> None:
    for byte in range(END_BYTES):
        parts = parts_of(example())
        end = bytearray(parts[-1])
        end[RECORD_BYTES + byte] ^= 1
        found = fault(resealed(b"".join([*parts[:-1], bytes(end)])))
        assert found.fault is Fault.DAMAGED and "totals" in str(found)


def test_a_source_that_fails_is_named_with_the_byte() -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 1000:
                raise OSError(5, "Input/output error")
            return super().read(min(400, size or 0))

    with pytest.raises(BackupError, match=r"FILE can't be read at byte 1[0-9]{3}: Input/output error"):
        verify(Failing(example()), "FILE")


def test_a_pipe_that_does_not_wait_is_not_taken_for_one_that_ended() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.write(writing, example()[:100])
    with os.fdopen(reading, "rb", buffering=0) as source, pytest.raises(BackupError, match=r"byte 100: .*O_NONBLOCK"):
        verify(source, "FILE")
    os.close(writing)


@pytest.mark.parametrize("level", [1, 3, 19])
def test_every_level_of_compression_is_read(level: int) -> None:
    content = (TEXT * 200)[:MAX_DATA_BYTES]
    stream = encoded(MAX_DATA_BYTES, None, Data(0, content), level=level)
    assert list(reader(stream).records()) == [Data(0, content)]
    assert len(stream) < MAX_DATA_BYTES // 4


def test_a_name_that_is_too_long_is_refused_when_written() -> None:
    with pytest.raises(BackupError, match="more than 255 bytes"):
        encode_header(replace(header(BLOCK, 1), volume_id="x" * 256))
    long = "y" * 255
    encode_header(replace(header(BLOCK, 1), pool=long, volume=long, volume_id=long, tool=long))
