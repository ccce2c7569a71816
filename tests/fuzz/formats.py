"""Fuzz targets of what is read from devices and from the catalog, one function at a time.

An input may ask that checksums be put right after it was mutated: else nothing but the checksum would be tested.
"""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import struct
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import trio

from tests.fuzz.engine import Target
from tiers.catalog import CATALOG_NAME, Catalog, Change, DeviceRow, Position, SegmentRow, State, VolumeRow
from tiers.changes import EXTENT_BYTES, ChangedExtents, decode_trackers, encode_trackers
from tiers.device import Device
from tiers.errors import TierError
from tiers.frames import FIRST_SLOT_LIMIT, MAX_FRAME_BYTES, BadFrameError, pack, slots_of, unpack
from tiers.heat import ROW_BYTES, Extents, Sketch
from tiers.heatfile import END, EXTENTS, SKETCH, BadHeatError, decode, encode_header, encode_section
from tiers.label import (
    LABEL_BYTES,
    BadLabelError,
    Label,
    decode_label,
    encode_label,
    newest_label,
)
from tiers.layout import BLOCK_BYTES, FIRST_ADDRESS, LABEL_AREA_BYTES, MAX_SEGMENT_BYTES, MIB, check_of
from tiers.maptree import BAD_PAGE, EMPTY_PAGE, FANOUT, ROOT_LEVEL, MapTree, PageCache
from tiers.names import MAX_VOLUME_BYTES
from tiers.probe import read_label
from tiers.record import (
    BATCH_MAGIC,
    MAX_HEADER_SLOTS,
    SEGMENT_MAGIC,
    BadRecordError,
    Kind,
    Op,
    decode_batch,
    decode_checks,
    decode_segment_header,
    encode_batch,
    encode_segment_header,
    peek_header_slots,
)
from tiers.segments import SegmentTable

POOL = bytes(range(16))
SEALED, ADDRESSED = 1, 2
"""Bits of an input's first byte: the checksum is put right; so are magic, version, pool and place."""


def seal_label(sector: bytearray) -> None:
    sector[504:512] = struct.pack("<Q", check_of(bytes(sector[:504])))


def seal_segment(block: bytearray) -> None:
    block[72:80] = struct.pack("<Q", check_of(bytes(block[:72])))


def seal_batch(header: bytearray) -> None:
    slots = min(max(1, int.from_bytes(header[12:14], "little")), len(header) // BLOCK_BYTES)
    header[96:104] = bytes(8)
    header[96:104] = struct.pack("<Q", check_of(bytes(header[: slots * BLOCK_BYTES])))


# -- labels ------------------------------------------------------------------------------------------------------------

LABEL = Label("base", 2, POOL, POOL[::-1], 5 << 30, 5 << 20, 41, 123, frozenset({0, 9, 255}), "demo")


def run_label(data: bytes) -> None:
    """Two copies of a label: one is chosen, or `BadLabelError` says why not, on a file too."""
    flags, body = data[:1] or b"\0", data[1:]
    sectors = []
    for start in (0, LABEL_BYTES):
        raw = bytearray(body[start : start + LABEL_BYTES].ljust(LABEL_BYTES, b"\0"))
        if flags[0] & SEALED:
            seal_label(raw)
        sectors.append(bytes(raw))
    found: list[Label] = []
    for sector in sectors:
        with contextlib.suppress(BadLabelError):
            found.append(decode_label(sector))
    for label in found:
        assert decode_label(encode_label(label)) == label
        assert 1 <= (label.size_bytes - LABEL_AREA_BYTES) // label.segment_bytes <= max(2048, label.size_bytes >> 26)
    try:
        newest = newest_label(sectors)
        assert newest.generation == max(label.generation for label in found)
    except BadLabelError as error:
        assert error.newer or not found
    path = scratch() / "device"
    path.write_bytes(b"".join(sector.ljust(4096, b"\0") for sector in sectors)[: 8192 - 512 * (flags[0] >> 4)])
    with contextlib.suppress(BadLabelError):
        read_label(path)


# -- segment headers and batches ---------------------------------------------------------------------------------------


def run_segment(data: bytes) -> None:
    """Slot 0 of a segment."""
    flags, body = data[:1] or b"\0", bytearray(data[1:])
    if not flags[0] & 4:
        body = body.ljust(BLOCK_BYTES, b"\0")
    if flags[0] & ADDRESSED and len(body) >= 80:
        body[:10] = SEGMENT_MAGIC + b"\1\0"
        body[16:32] = POOL
    if flags[0] & SEALED and len(body) >= 80:
        seal_segment(body)
    with contextlib.suppress(BadRecordError):
        header = decode_segment_header(body, POOL)
        assert header.kind in Kind and 1 <= header.segment_id < 1 << 40


def run_batch(data: bytes) -> None:
    """The header slots of a batch; what passes names nothing that can't be."""
    flags, body = data[:1] or b"\0", bytearray(data[1:])
    if not flags[0] & 4:
        body = body.ljust(-(-max(1, len(body)) // BLOCK_BYTES) * BLOCK_BYTES, b"\0")
    if flags[0] & ADDRESSED and len(body) >= BLOCK_BYTES:
        body[:10] = BATCH_MAGIC + b"\1\0"
        body[16:48] = POOL + struct.pack("<QQ", 9, 4)
    if flags[0] & SEALED and len(body) >= BLOCK_BYTES:
        seal_batch(body)
    assert 0 <= peek_header_slots(body) <= MAX_HEADER_SLOTS
    try:
        batch = decode_batch(body, POOL, 9, 4)
    except BadRecordError:
        return
    blocks = extra = 0
    for op, subject, a, b in batch.operations():
        assert batch.kind is {Op.PAGE: Kind.MAP}.get(op, batch.kind)
        if op is Op.WRITE:
            blocks += b
            assert a + b <= MAX_VOLUME_BYTES // BLOCK_BYTES
        elif op is Op.PAGE:
            blocks += 1
        elif op is Op.BAD:
            assert b <= MAX_SEGMENT_BYTES // BLOCK_BYTES and a + b <= MAX_VOLUME_BYTES // BLOCK_BYTES
        elif op is Op.CREATE:
            extra += -(-(b & 0xFF) // 8)
        elif op is Op.POLICY:
            assert a <= 64
            extra += -(-a // 8)
        elif op is Op.FILLING:
            assert a <= 1
        elif op is Op.MOVE:
            extra += 1 + -(-(a & 0xFFFFFFFF) // 64)
        if op in (Op.CREATE, Op.RESIZE):
            assert 0 < a <= MAX_VOLUME_BYTES
        if op in (Op.LINK, Op.MOVE):
            assert 0 < subject < 1 << 40
    places = batch.places()
    assert len(set(places)) == len(places) == len(batch.checks)
    if batch.kind is Kind.PACKED:
        assert sum(frame.blocks for frame in batch.frames()) == blocks
        for first, count in map(slots_of, places):
            assert 4 + batch.header_slots <= first and first + count <= 4 + batch.slots <= FIRST_SLOT_LIMIT
        extra = 2 * len(batch.frames())
    assert (blocks, extra) == (len(batch.checks), len(batch.extra))
    assert decode_checks(body, POOL, 9, 4)[:2] == (batch.header_slots, batch.checks)


def _batch(kind: Kind, ops: list[int], checks: list[int], extra: list[int]) -> bytes:
    header, _ = encode_batch(kind, POOL, 9, 4, 2, 1001, 0xDEADBEEF, 990, ops, checks, extra)
    return bytes([SEALED | ADDRESSED]) + bytes(header).rstrip(b"\0")


def _batch_seeds() -> list[bytes]:
    name = int.from_bytes(b"vol-1\0\0\0", "little")
    every = [
        ([Op.WRITE << 56 | 5, 4096, 2], [1, 2], []),
        ([Op.UNMAP << 56 | 5, 4096, 1 << 30], [], []),
        ([Op.RESIZE << 56 | 5, 10 << 40, 0], [], []),
        ([Op.CREATE << 56 | 6, 2 << 30, 1_700_000_000 << 8 | 5], [], [name]),
        ([Op.DELETE << 56 | 4, 0, 0], [], []),
        ([Op.LINK << 56 | 10, 3 << 32 | 17, 0], [], []),
        ([Op.MOVE << 56 | 99, 33 << 32 | 70, 5], [], [1 << 32 | 8, 3, 0x3F]),
        ([Op.BAD << 56 | 5, 12, 1], [], []),
        ([Op.POLICY << 56 | 5, 5, 0], [], [name]),
        ([Op.POLICY << 56 | 5, 0, 0], [], []),
        ([Op.FILLING << 56 | 5, 1, 0], [], []),
    ]
    long = list(range(600))
    table = [3 << 32 | 1, 7, 2 << 32 | 1, 8]
    return [
        *(_batch(Kind.LOG, *parts) for parts in every),
        _batch(Kind.LOG, *([word for parts in every for word in parts[i]] for i in range(3))),
        _batch(Kind.MOVED, [Op.WRITE << 56 | 5, 100, 3], [1, 2, 3], []),
        _batch(Kind.PACKED, [Op.WRITE << 56 | 5, 100, 3, Op.WRITE << 56 | 6, 9, 2], [1, 2, 3, 4, 5], table),
        _batch(Kind.PACKED, [Op.WRITE << 56 | 5, 0, 64], list(range(64)), [32 << 32 | 28, 9, 32 << 32 | 1, 10]),
        _batch(Kind.MAP, [Op.PAGE << 56 | 5, 900, 0, Op.PAGE << 56 | 5, 4 << 48, 0], [10, 11], []),
        _batch(Kind.LOG, [Op.WRITE << 56 | 5, 0, len(long)], long, []),
    ]


# -- frames ------------------------------------------------------------------------------------------------------------


def run_frame(data: bytes) -> None:
    """The slots of a frame: whole blocks come out of it, or `BadFrameError`."""
    flags, body = data[:1] or b"\0", data[1:]
    if not flags[0] & 4:
        body = body.ljust(-(-max(1, len(body)) // BLOCK_BYTES) * BLOCK_BYTES, b"\0")
    with contextlib.suppress(BadFrameError):
        content = unpack(body)
        assert 0 < len(content) <= MAX_FRAME_BYTES and len(content) % BLOCK_BYTES == 0


def _frame_seeds() -> list[bytes]:
    rng = random.Random(5)
    letters = bytes(b"etaoinsh"[i % 8] for i in range(256))
    contents = [
        bytes(2 * BLOCK_BYTES),
        rng.randbytes(2 * BLOCK_BYTES).translate(letters),
        rng.randbytes(100) * 80,
        rng.randbytes(BLOCK_BYTES) + bytes(7 * BLOCK_BYTES),
        b"".join(b"line %d of many\n" % i for i in range(1000)),
    ]
    seeds = []
    for content in contents:
        whole = content.ljust(-(-len(content) // BLOCK_BYTES) * BLOCK_BYTES, b"\0")
        frame = pack([whole[at : at + BLOCK_BYTES] for at in range(0, len(whole), BLOCK_BYTES)], 3)
        if frame is not None:
            seeds += [bytes([flags]) + frame.data.rstrip(b"\0") for flags in (0, 4)]
    return seeds


# -- map pages ---------------------------------------------------------------------------------------------------------


class PageDevice:
    """As much of a device as the map tree asks for: blocks by number."""

    path = "pages"
    index = 0
    tier = "fast"
    state = "online"
    fd = -1
    segment_bytes = MIB
    segment_count = 1
    error_count = 0

    def __init__(self) -> None:
        self.blocks: list[bytes] = [bytes(BLOCK_BYTES)]

    def segment_offset(self, physical_index: int) -> int:
        return physical_index * MIB

    async def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytearray]:
        await trio.lowlevel.checkpoint()
        blocks = []
        for offset, length in ranges:
            number = offset // BLOCK_BYTES
            if number >= len(self.blocks):
                raise TierError(5, f"the device ends before {offset}")
            blocks.append(bytearray(self.blocks[number][:length]))
        return blocks


def run_pages(data: bytes) -> None:
    """A map tree of arbitrary pages: each is found as it is, or TierError names the damage.

    Input: levels and indices to ask for, then pages, each an entry count and entries of position, page that it points
    to (0: none, below the page's own number: that one with its right check, else a wild address) and a flag byte.
    """
    device = PageDevice()
    segments = SegmentTable([cast(Device, device)])
    segments.adopt(1, cast(Device, device), 0, Kind.MAP)
    level, index = data[0] % (ROOT_LEVEL + 1) if data else 0, int.from_bytes(data[1:6], "little")
    at = 6
    while at < len(data) and len(device.blocks) < 64:
        words = [0] * (2 * FANOUT)
        for _ in range(data[at] % 9):
            position, target, flags = data[at + 1 : at + 4].ljust(3, b"\0")
            at += 3
            if 0 < target < len(device.blocks):
                words[position] = FIRST_ADDRESS | target
                words[FANOUT + position] = check_of(device.blocks[target]) ^ (flags == 0xFF)
            elif target:
                words[position] = int.from_bytes(data[at : at + 8], "little") << (flags & 7) & (1 << 64) - 1
                words[FANOUT + position] = flags
        at += 1
        device.blocks.append(struct.pack(f"<{2 * FANOUT}Q", *words))
    root = len(device.blocks) - 1
    tree = MapTree("fuzz", segments, PageCache(0), (FIRST_ADDRESS | root, check_of(device.blocks[root])))
    indices = sorted({(index >> shift) % (1 << 8 * (ROOT_LEVEL - level)) for shift in (0, 8, 16, 24)})

    async def main() -> None:
        with contextlib.suppress(TierError):
            pages = await tree.load(level, indices)
            assert set(pages) == set(indices)
            for page in pages.values():
                assert page is EMPTY_PAGE or page is BAD_PAGE or bytes(page) in device.blocks
        assert all(segment.pins == 0 for segment in segments.by_id.values())

    trio.run(main)


def _pages_seeds() -> list[bytes]:
    chain = bytes([1, 7, 40, 0]) + b"".join(bytes([1, 0, number, 0]) for number in (1, 2, 3, 4))
    return [
        bytes(6) + chain,
        bytes([4, 0, 0, 0, 0, 0]) + chain,
        bytes([1, 0, 1, 2, 3, 0]) + chain,
        bytes(6) + bytes([2, 0, 1, 0, 9, 200, 3]) * 3 + bytes([1, 0, 1, 0xFF]),
    ]


# -- the catalog -------------------------------------------------------------------------------------------------------

_SCRATCH: list[tempfile.TemporaryDirectory[str]] = []


def scratch() -> Path:
    """A directory for this process, removed at its end; in memory if possible, where a flush costs nothing."""
    if not _SCRATCH:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        _SCRATCH.append(tempfile.TemporaryDirectory(prefix="terrace-fuzz-", dir=memory))
    return Path(_SCRATCH[0].name)


@cache
def _catalog_template() -> bytes:
    directory = scratch() / "template"
    device = DeviceRow(0, POOL, "/dev/null", "fast", 64 * MIB, MIB // 2, None)
    base = DeviceRow(1, POOL[::-1], "/dev/zero", "base", 64 * MIB, MIB // 2, "it failed a flush", "lost")
    position = Position(3, 41, 7, 12, (1 << 64) - 2, 9, 4)
    Catalog.create(directory, "demo", POOL, [device, base], position)
    catalog = Catalog(directory)
    volumes = [
        VolumeRow(i, f"v{i}", MIB << i, FIRST_ADDRESS | i, (1 << 64) - i, 9, 1.7e9 + i, "p" * i) for i in (1, 2, 3)
    ]
    segments = [SegmentRow(i, i % 2, i, i % 3 + 1, i == 7, 20, 9, 40, 99) for i in range(1, 9)]
    catalog.commit(Change(position, volumes, segments, dead_added=[(FIRST_ADDRESS | 9, 1 << 63, 2, 8)]))
    catalog.close()
    return (directory / CATALOG_NAME).read_bytes()


TABLES = ("meta", "devices", "volumes", "segments", "dead")
STATEMENTS = (
    "DROP TABLE dead",
    "ALTER TABLE volumes ADD COLUMN more",
    "ALTER TABLE meta RENAME TO other; CREATE VIEW meta AS SELECT key, value FROM other",
    "DROP TABLE segments; CREATE VIEW segments AS WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n)"
    " SELECT i AS id, 0 AS device, i AS idx, 1 AS kind, 0 AS open, 1 AS used, 0 AS live, 0 AS last_seq FROM n",
    "DROP TABLE meta; CREATE VIEW meta AS WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n)"
    " SELECT i AS key, i AS value FROM n",
    "CREATE TRIGGER t AFTER INSERT ON meta BEGIN DELETE FROM volumes; END",
    "CREATE TABLE extra (x)",
    "CREATE INDEX i ON segments (device)",
    "INSERT INTO segments SELECT id + 100, device, idx, kind, open, used, live, last_seq, blocks FROM segments",
    "INSERT INTO volumes SELECT id + 100, name || 'x', size_bytes, root_address, root_check, mapped_blocks,"
    " created_at, policy FROM volumes",
    "UPDATE meta SET value = 99 WHERE key = 'format_version'",
    "UPDATE volumes SET name = CAST(X'ff' AS TEXT)",
    "PRAGMA user_version = 7; PRAGMA journal_mode = DELETE",
    "VACUUM",
)


class Reader:
    """Takes an input apart; at its end there are zeros."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def __bool__(self) -> bool:
        return self.at < len(self.data)

    def take(self, length: int) -> bytes:
        part = self.data[self.at : self.at + length]
        self.at += length
        return part.ljust(length, b"\0")

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "little")

    def value(self) -> Any:
        """A value of any of SQLite's types."""
        kind = self.number(1) % 8
        if kind <= 2:
            return int.from_bytes(self.take((1, 4, 8)[kind]), "little", signed=True)
        if kind == 3:
            return None
        if kind == 4:
            return cast(float, struct.unpack("<d", self.take(8))[0])
        raw = self.take(self.number(1))
        return raw if kind == 5 else raw.decode("latin-1")


def edit_catalog(path: Path, reader: Reader) -> None:
    """Carry out one edit of the input on a catalog file, if SQLite lets us."""
    kind = reader.number(1) % 6
    if kind == 0:
        data = bytearray(path.read_bytes())
        at = reader.number(3) % (len(data) + 1)
        new = reader.take(reader.number(1))
        data[at : at + len(new)] = new
        path.write_bytes(data)
    elif kind == 1:
        data = bytearray(path.read_bytes())
        path.write_bytes(data[: reader.number(3) % (len(data) + 1)])
    elif kind == 2:
        path.with_name(path.name + "-wal").write_bytes(reader.take(reader.number(2) % 5000))
    else:
        with (
            contextlib.suppress(sqlite3.Error, UnicodeDecodeError),
            contextlib.closing(sqlite3.connect(path, timeout=0)) as db,
        ):
            db.execute("PRAGMA synchronous=OFF")
            db.set_progress_handler(lambda: 1, 200_000)  # an edit may ask an endless view that an earlier one made
            table, column, row = TABLES[reader.number(1) % len(TABLES)], reader.number(1), reader.number(1)
            value = reader.value()
            if kind == 3:
                db.executescript(STATEMENTS[(column | row << 8) % len(STATEMENTS)])
            else:
                columns = [name for _, name, *_ in db.execute(f"PRAGMA table_info({table})")]
                key = columns[0]
                keys = [found for (found,) in db.execute(f"SELECT {key} FROM {table} ORDER BY 1")]
                if kind == 4:
                    name = columns[column % len(columns)]
                    where = keys[row % len(keys)]
                    db.execute(f"UPDATE {table} SET {name} = ? WHERE {key} = ?", (value, where))
                else:
                    db.execute(f"DELETE FROM {table} WHERE {key} = ?", (keys[row % len(keys)],))
            db.commit()


def run_catalog(data: bytes) -> None:
    """A catalog after some edits: its state, every value of which may be used, or TierError."""
    directory = scratch() / "catalog"
    directory.mkdir(exist_ok=True)
    for path in directory.iterdir():
        path.unlink()
    path = directory / CATALOG_NAME
    path.write_bytes(_catalog_template())
    reader = Reader(data)
    edits = 0
    while reader and edits < 8:
        with contextlib.suppress(ZeroDivisionError, IndexError):  # no row, no column left to edit
            edit_catalog(path, reader)
        edits += 1
    try:
        catalog = Catalog(directory)
        try:
            require_sane(catalog.load())
        finally:
            catalog.close()
    except TierError as error:
        assert str(path) in str(error) and "\n" not in str(error), str(error)


def require_sane(state: State) -> None:
    """What the engine relies on."""
    Label("fast", 0, state.pool_uuid, POOL, 1, 1, 0, state.position.checkpoint_seq, frozenset(), state.pool_name)
    places = {row.index: (row.size_bytes - LABEL_AREA_BYTES) // row.segment_bytes for row in state.devices}
    for device in state.devices:
        assert "\0" not in device.path and device.tier in ("fast", "base") and len(device.uuid) == 16
    for segment in state.segments:
        assert 0 <= segment.index < places[segment.device] and Kind(segment.kind) and segment.id < 1 << 40
        assert 0 <= segment.live <= max(segment.blocks, MAX_SEGMENT_BYTES // BLOCK_BYTES)
    for volume in state.volumes:
        struct.pack("<QQQ", volume.id, volume.root_address, volume.root_check)
        assert 0 < volume.size_bytes <= MAX_VOLUME_BYTES and volume.name.isprintable() and volume.created_at >= 0
    for address, check, level, volume_id in state.dead:
        struct.pack("<QQQ", address, check, volume_id)
        assert 0 <= level <= ROOT_LEVEL


def _catalog_seeds() -> list[bytes]:
    rng = random.Random(0)
    seeds = [b"", bytes([1, 0, 32, 0]), bytes([2, 32, 0]) + rng.randbytes(32), bytes([0, 200, 16, 0, 4, 1, 2, 3, 4])]
    seeds += [bytes([3, 0, number, 0, 3]) for number in range(len(STATEMENTS))]
    for table, columns in zip(range(len(TABLES)), (2, 7, 7, 8, 4), strict=True):
        for column in range(columns):
            for value in (b"\2" + b"\xff" * 8, b"\2" + b"\xff" * 7 + b"\x7f", b"\3", b"\6\3a\0b", b"\5\2\xff\xff"):
                seeds.append(bytes([4, table, column, column]) + value)
        seeds.append(bytes([5, table, 0, 0, 3]))
    seeds += [bytes([4, 0, 1, row]) + b"\6\3abc" for row in range(10)]
    return seeds


# -- heat --------------------------------------------------------------------------------------------------------------


def seal_heat(file: bytearray) -> None:
    """Put the header's check right, and those of the sections as far as their lengths hold."""
    if len(file) < 64:
        return
    file[56:64] = struct.pack("<Q", check_of(bytes(file[:56])))
    at = 64
    while len(file) - at >= 24:
        stored = int.from_bytes(file[at + 12 : at + 16], "little")
        body = bytes(file[at + 24 : at + 24 + stored])
        file[at + 16 : at + 24] = struct.pack("<Q", check_of(bytes(file[at : at + 16]) + body))
        at += 24 + stored


def run_heat(data: bytes) -> None:
    """What a heat file says is taken over by the counters, within their bound, or `BadHeatError` says why not."""
    flags, file = data[:1] or b"\0", bytearray(data[1:])
    if flags[0] & SEALED:
        seal_heat(file)
    try:
        saved = decode(bytes(file), POOL, max_chunks=6)
    except BadHeatError as error:
        assert str(error)
        return
    extents = Extents(5 * ROW_BYTES)
    for keys, rows in saved.extents:
        extents.restore(keys, rows)
    assert len(extents) <= 5
    for volume_id in extents.volumes():
        for chunk, row in extents.chunks(volume_id):
            assert chunk >= 0 and row.shape == (2, ROW_BYTES // 2)
        extents.forget(volume_id)
    assert len(extents) == 0
    assert all(len(row) == 1 << saved.bits for rows in saved.sketches for row in rows)


def _heat_seeds() -> list[bytes]:
    header = encode_header(POOL, 10, 1e9, (5, 6))
    two = struct.pack("<QQ", 7 << 22, 7 << 22 | 3) + b"\1\2" * ROW_BYTES
    parts = [
        [encode_section(EXTENTS, 0, 2, two), encode_section(END, 0, 0, b"")],
        [encode_section(SKETCH, which, 0, bytes([which]) * 1024) for which in range(2 * Sketch.ROWS)],
        [encode_section(SKETCH, 5, 1, bytes(1024)), encode_section(9, 0, 0, b"")],
        [encode_section(EXTENTS, 0, 3, two), encode_section(EXTENTS, 0, 2, two[::-1])],
    ]
    return [bytes([SEALED]) + header + b"".join(sections) for sections in parts]


# -- trackers ----------------------------------------------------------------------------------------------------------


def run_trackers(data: bytes) -> None:
    """What is accepted is what it says, and can be encoded again."""
    with contextlib.suppress(TierError):
        found = decode_trackers(data)
        assert decode_trackers(encode_trackers(found)) == found
        for tracker in found.values():
            runs = list(tracker.runs())
            assert sum(length for _, length in runs) == tracker.count * EXTENT_BYTES


def _trackers_seeds() -> list[bytes]:
    changes = ChangedExtents()
    changes.add(5 << 30, 7 << 30)
    changes.add(1 << 40, 1)
    return [encode_trackers({"recent": changes, "missing:b": ChangedExtents()}), b"\1\0\0\0"]


FORMATS = [
    Target("trackers", run_trackers, _trackers_seeds, [b"\x28\xb5\x2f\xfd", struct.pack("<HHII", 1, 0, 1, 1)]),
    Target(
        "label",
        run_label,
        lambda: [bytes([SEALED]) + (encode_label(LABEL) + encode_label(LABEL.next())).rstrip(b"\0"), b"\1TERRACE\0\2"],
        [b"TERRACE\0"],
    ),
    Target(
        "segment",
        run_segment,
        lambda: [
            bytes([flags]) + encode_segment_header(Kind.LOG, 3, POOL, 9, 77, 5, 100, 107)[:80] for flags in (0, 3, 4, 7)
        ],
        [SEGMENT_MAGIC, POOL],
    ),
    Target(
        "batch", run_batch, _batch_seeds, [BATCH_MAGIC, POOL, *(struct.pack("<QQQ", op << 56 | 5, 1, 1) for op in Op)]
    ),
    Target("frame", run_frame, _frame_seeds, [b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18"]),
    Target("pages", run_pages, _pages_seeds),
    Target("heat", run_heat, _heat_seeds, [b"TRC-HEAT", POOL, encode_section(END, 0, 0, b"")]),
    Target("catalog", run_catalog, _catalog_seeds, [b"\5", b"\4", b"\3", b"format_version"], examples=60),
]
