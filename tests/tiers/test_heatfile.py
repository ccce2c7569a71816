"""The heat file: what is saved comes back, and nothing else does."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiers.heat import ROW_BYTES
from tiers.heatfile import END, EXTENTS, SKETCH, BadHeatError, HeatFile, decode, encode_header, encode_section
from tiers.layout import check_of

POOL = bytes(range(16))
KEYS = struct.pack("<QQ", 3 << 22 | 9, 4 << 22)
ROWS = np.random.default_rng(1).integers(0, 4, 2 * ROW_BYTES, np.uint8).tobytes()


def image() -> bytes:
    return (
        encode_header(POOL, 10, 1234.5, (7, 8))
        + encode_section(EXTENTS, 0, 2, KEYS + ROWS)
        + encode_section(SKETCH, 3, 0, b"\5" * 1024)
        + encode_section(END, 0, 0, b"")
    )


def test_what_is_written_is_read() -> None:
    saved = decode(image(), POOL, 100)
    assert (saved.bits, saved.saved_at, saved.noted) == (10, 1234.5, (7, 8))
    ((keys, rows),) = saved.extents
    assert keys.tolist() == [3 << 22 | 9, 4 << 22]
    assert rows.tobytes() == ROWS
    assert [[int(row[0]) for row in rows] for rows in saved.sketches] == [[0, 0], [0, 5]]


@settings(max_examples=200)
@given(st.integers(0, len(image()) - 1), st.integers(1, 255))
def test_every_changed_byte_and_every_torn_end_is_noticed(at: int, change: int) -> None:
    data = bytearray(image())
    data[at] ^= change
    with pytest.raises(BadHeatError):
        decode(bytes(data), POOL, 100)
    with pytest.raises(BadHeatError):
        decode(image()[:at], POOL, 100)


def sealed(**changes: tuple[str, int]) -> bytes:
    header = bytearray(encode_header(POOL, 10, 1234.5, (7, 8))[:56])
    for at, (form, value) in changes.items():
        struct.pack_into(form, header, int(at[1:]), value)
    return bytes(header) + struct.pack("<Q", check_of(bytes(header)))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is no heat file"),
        (b"x" * 100, "is no heat file"),
        (sealed(_8=("<I", 2)), "has version 2, this release reads 1"),
        (sealed(_12=("<I", 30)), r"has sketches of 2\^30 bytes"),
        (sealed(_16=("<I", 99)), "is another pool's"),
        (sealed(), "ends too soon"),
        (sealed() + encode_section(7, 0, 0, b""), "unknown kind 7"),
        (sealed() + encode_section(EXTENTS, 0, 3, KEYS + ROWS), "bytes for 3 chunks"),
        (sealed() + encode_section(EXTENTS, 0, 2, KEYS[8:] + KEYS[:8] + ROWS), "names chunks that can't be"),
        (sealed() + encode_section(SKETCH, 4, 0, bytes(1024)), "unknown sketch, 4"),
        (sealed() + encode_section(SKETCH, 0, 1, bytes(1024)), "no such place, 1"),
        (sealed() + encode_section(SKETCH, 0, 0, bytes(10)), "no such place, 0"),
    ],
)
def test_what_can_not_be_used_is_named(data: bytes, why: str) -> None:
    with pytest.raises(BadHeatError, match=why):
        decode(data, POOL, 100)


def test_a_bomb_is_not_inflated() -> None:
    section = bytearray(encode_section(SKETCH, 0, 0, bytes(64 << 20)))
    section[8:12] = struct.pack("<I", 1024)
    section[16:24] = struct.pack("<Q", check_of(bytes(section[:16]) + bytes(section[24:])))
    with pytest.raises(BadHeatError, match="length is wrong"):
        decode(sealed() + bytes(section), POOL, 100)


def test_more_chunks_than_are_wanted_are_left_out() -> None:
    more = sealed() + encode_section(EXTENTS, 0, 2, KEYS + ROWS) * 3 + encode_section(END, 0, 0, b"")
    assert len(decode(more, POOL, 4).extents) == 2


def test_a_save_that_is_abandoned_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = HeatFile(tmp_path, POOL)
    file.begin(10, 1.0, (0, 0))
    file.finish()
    before = file.path.read_bytes()
    file.begin(10, 2.0, (0, 0))
    file.add(EXTENTS, 0, 2, KEYS + ROWS)
    file.abandon()
    assert file.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["heat"]
    saved = file.load(10)
    assert saved is not None and saved.saved_at == 1.0
