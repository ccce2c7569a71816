"""The file that keeps a pool's heat over restarts: `heat` in the pool's directory.

It is advice, not truth: nothing in the pool depends on it. It is replaced as a whole (written beside, synced, renamed),
so a crash leaves the older or the newer one, and what is in it is as old as the last save. A file that is missing,
damaged, of another version or another pool's means that nothing is known to be warm.

All numbers are little-endian. The header, 64 bytes:

    offset  size  type   field
    0       8     bytes  magic "TRC-HEAT"
    8       4     u32    version: 1; any other is refused
    12      4     u32    bits: a sketch has two rows of 2^bits bytes
    16      16    bytes  pool uuid
    32      8     f64    when it was saved, seconds since 1970
    40      8     u64    touches that the sketch of reads noted since it was last halved
    48      8     u64    the same of writes
    56      8     u64    XXH3-64 of bytes 0-55

and then sections until the END section, each of a head of 24 bytes and what it says to follow:

    0       2     u16    kind: 1 EXTENTS, 2 SKETCH, 3 END
    2       2     u16    of a SKETCH: touch * 2 + row (touch 0 reads, 1 writes); else 0
    4       4     u32    of EXTENTS: how many chunks; of a SKETCH: its place in the row, in MiB; else 0
    8       4     u32    raw length in bytes, at most 2 MiB
    12      4     u32    stored length in bytes
    16      8     u64    XXH3-64 of bytes 0-15 and then the stored bytes

What is stored is a zlib stream of the raw bytes. EXTENTS: the keys of the chunks (u64: volume << 22 | chunk of 256
MiB of it), then for each the 4,096 bytes of reads by extent and the 4,096 of writes (levels: `tiers.heat.TOUCHES`).
SKETCH: a MiB of a row, or all of a shorter one. A file that ends before its END section is damaged.
"""

import contextlib
import logging
import os
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tiers.catalog import sync_directory
from tiers.heat import KEY_BITS, MAX_SKETCH_BITS, MIN_SKETCH_BITS, ROW_BYTES, SLICE_ROWS, Bytes, Ints, Sketch, Touch
from tiers.layout import MIB, check_of

logger = logging.getLogger(__name__)

FILE_NAME = "heat"
MAGIC = b"TRC-HEAT"
VERSION = 1
EXTENTS, SKETCH, END = 1, 2, 3
_HEADER = struct.Struct("<8sII16sdQQ")
_HEADER_BYTES = 64
_SECTION = struct.Struct("<HHIII")
_SECTION_BYTES = 24
_CHECK = struct.Struct("<Q")
assert _HEADER.size + _CHECK.size == _HEADER_BYTES
assert _SECTION.size + _CHECK.size == _SECTION_BYTES

MAX_RAW_BYTES = 2 * MIB
assert SLICE_ROWS * (ROW_BYTES + 8) <= MAX_RAW_BYTES


class BadHeatError(ValueError):
    """A heat file that can't be used; says why, as the rest of "it ..."."""


@dataclass
class SavedHeat:
    """What a heat file holds. `extents`: (keys, rows of (reads, writes) by extent)."""

    bits: int
    saved_at: float
    noted: tuple[int, int]
    extents: list[tuple[Ints, Bytes]] = field(default_factory=list)
    sketches: list[list[Bytes]] = field(default_factory=list)


def encode_header(pool_uuid: bytes, bits: int, saved_at: float, noted: tuple[int, int]) -> bytes:
    """The first 64 bytes."""
    header = _HEADER.pack(MAGIC, VERSION, bits, pool_uuid, saved_at, *noted)
    return header + _CHECK.pack(check_of(header))


def encode_section(kind: int, which: int, number: int, raw: bytes) -> bytes:
    """One section. Compresses: for a worker."""
    stored = zlib.compress(raw, 1)
    head = _SECTION.pack(kind, which, number, len(raw), len(stored))
    return head + _CHECK.pack(check_of(head + stored)) + stored


def decode(data: bytes, pool_uuid: bytes, max_chunks: int) -> SavedHeat:
    """Judge a file's content. Raises BadHeatError."""
    if len(data) < _HEADER_BYTES or data[:8] != MAGIC:
        raise BadHeatError("is no heat file")
    magic_to_noted, (check,) = data[: _HEADER.size], _CHECK.unpack_from(data, _HEADER.size)
    _, version, bits, pool, saved_at, reads, writes = _HEADER.unpack(magic_to_noted)
    if check_of(magic_to_noted) != check:
        raise BadHeatError("has a damaged header")
    if version != VERSION:
        raise BadHeatError(f"has version {version}, this release reads {VERSION}")
    if pool != pool_uuid:
        raise BadHeatError("is another pool's")
    if not MIN_SKETCH_BITS <= bits <= MAX_SKETCH_BITS:
        raise BadHeatError(f"has sketches of 2^{bits} bytes")
    saved = SavedHeat(bits, saved_at, (reads, writes))
    saved.sketches = [[np.zeros(1 << bits, np.uint8) for _ in range(Sketch.ROWS)] for _ in Touch]
    at = _HEADER_BYTES
    chunks = 0
    while True:
        if len(data) - at < _SECTION_BYTES:
            raise BadHeatError("ends too soon")
        head = data[at : at + _SECTION.size]
        kind, which, number, raw_bytes, stored_bytes = _SECTION.unpack(head)
        (check,) = _CHECK.unpack_from(data, at + _SECTION.size)
        stored = data[at + _SECTION_BYTES : at + _SECTION_BYTES + stored_bytes]
        if len(stored) != stored_bytes or raw_bytes > MAX_RAW_BYTES or check_of(head + stored) != check:
            raise BadHeatError(f"is damaged at byte {at}")
        at += _SECTION_BYTES + stored_bytes
        if kind == END:
            return saved
        raw = _inflated(stored, raw_bytes)
        if kind == EXTENTS:
            chunks += number
            if chunks > max_chunks:
                return saved  # it was saved with a larger bound: what is left over is cold
            saved.extents.append(_extents(raw, number))
        elif kind == SKETCH:
            _put_part(saved.sketches, which, number, raw)
        else:
            raise BadHeatError(f"has a section of the unknown kind {kind}")


def _inflated(stored: bytes, raw_bytes: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(stored, raw_bytes + 1)
    except zlib.error as error:
        raise BadHeatError(f"has a section that can't be decompressed ({error})") from None
    if len(raw) != raw_bytes or not inflater.eof:
        raise BadHeatError("has a section whose length is wrong")
    return raw


def _extents(raw: bytes, count: int) -> tuple[Ints, Bytes]:
    if len(raw) != count * (8 + ROW_BYTES):
        raise BadHeatError(f"has {len(raw)} bytes for {count} chunks")
    keys = np.frombuffer(raw, np.dtype("<u8"), count)
    if count and (int(keys.max()) >> 62 or not (keys[1:] > keys[:-1]).all() or not int(keys.min()) >> KEY_BITS):
        raise BadHeatError("names chunks that can't be")
    return keys.astype(np.int64), np.frombuffer(raw, np.uint8, offset=8 * count).reshape(count, ROW_BYTES)


def _put_part(sketches: list[list[Bytes]], which: int, number: int, raw: bytes) -> None:
    touch, row = divmod(which, Sketch.ROWS)
    if touch >= len(sketches):
        raise BadHeatError(f"has a part of an unknown sketch, {which}")
    cells = sketches[touch][row]
    first = number * MIB
    if len(raw) != min(MIB, len(cells)) or first + len(raw) > len(cells):
        raise BadHeatError(f"has a part of a sketch that has no such place, {number}")
    cells[first : first + len(raw)] = np.frombuffer(raw, np.uint8)


class HeatFile:
    """The file of one pool. Blocking: for worker threads. One save at a time: `begin`, `add`, `finish` or `abandon`."""

    def __init__(self, directory: Path, pool_uuid: bytes) -> None:
        self.path = directory / FILE_NAME
        self.pool_uuid = pool_uuid
        self._beside = directory / f"{FILE_NAME}.new"
        self._file: BinaryIO | None = None

    def load(self, max_chunks: int) -> SavedHeat | None:
        """What was saved; None if there is nothing, or nothing of use."""
        limit = max_chunks * (ROW_BYTES + 64) + (MAX_RAW_BYTES << 4)
        try:
            with self.path.open("rb") as file:
                # Not more than there is: what is asked for is allocated.
                data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("%s can't be read (%s): nothing is known to be warm", self.path, error.strerror)
            return None
        try:
            return decode(data, self.pool_uuid, max_chunks)
        except BadHeatError as error:
            logger.warning("%s %s: nothing is known to be warm", self.path, error)
            return None

    def begin(self, bits: int, saved_at: float, noted: tuple[int, int]) -> None:
        """Start the file that will take the place of the present one. Raises OSError, as the others do."""
        self._file = self._beside.open("wb")
        self._file.write(encode_header(self.pool_uuid, bits, saved_at, noted))

    def add(self, kind: int, which: int, number: int, raw: bytes) -> None:
        """Compress and write a section."""
        assert self._file is not None
        self._file.write(encode_section(kind, which, number, raw))

    def finish(self) -> None:
        """Put it in place; durable when this returns."""
        assert self._file is not None
        self._file.write(encode_section(END, 0, 0, b""))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._beside.replace(self.path)
        sync_directory(self.path.parent)

    def abandon(self) -> None:
        """Leave the present file as it is."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
            with contextlib.suppress(OSError):
                self._beside.unlink(missing_ok=True)
