"""Copies of the catalog: the codec, and which of the copies that devices hold is the newest one that can be used.

After each commit of the catalog the same change is appended to a segment of the kind CATALOG: as a *full* copy, or as
a *delta* to the copy before it. A copy is written only after the commit, and nothing that the checkpoint freed is given
out before the copy is durable (see `tiers.copies`). Two things follow. A complete copy is true: all that it names was
durable before it was written. And what the newest durable copy names is still there, with the log after it.

A copy is a header and a body, padded with zeros to whole blocks, which go out as the data blocks of CATALOG batches.
Little-endian.

    offset size type  field
      0     8   bytes  magic "TRCCATA1"
      8     2   u16    format version (5); another version is refused
     10     2   u16    kind: 1 full, 2 delta
     12     4   u32    0
     16     8   u64    incarnation of the pool that wrote it
     24     8   u64    sequence of the checkpoint that it is a copy of
     32     8   u64    delta: sequence of the copy it builds on, of the same incarnation; full: 0
     40     8   u64    delta: check field of that copy; full: 0
     48     8   u64    length of header and body, without the padding
     56     8   u64    XXH3-64 of header and body with this field zero
     64     7 x u64    position: incarnation, checkpoint_seq, log_segment, log_slot, log_prev_check, next_segment_id,
                       next_volume_id
    120     2   u16    length of the pool's name, which follows in UTF-8
    ...                six tables: devices, volumes, segments, dead, snapshots, marks

    table:   u32 removed keys (0 in a full copy), u32 rows, then the keys (u64 each), then the rows
    device:  u16 index, u16 tier (1 fast, 2 base), u32 state (0 online, 1 evacuating, 2 lost), u64 size, u64 segment
             size, 16 bytes uuid, u16 length of the path, u16 length of why it is poisoned (65535: it isn't), then both
             in UTF-8
    volume:  u64 id, u64 size, u64 root address, u64 root check, u64 mapped blocks, f64 creation time, u64 family, u64
             origin, u64 heir, u64 referenced blocks, u16 flags (1 layered, 2 retired, 4 filling), u16 length of the
             name, u16 length of the policy's name, then both in UTF-8
    segment: u64 id, u32 device, u32 place, u16 kind, u16 open, u32 used, u32 live, u32 blocks, u64 last_seq
    dead:    u64 address, u64 check, u64 level, u64 volume
    snapshot: u64 id, u64 volume, u64 size, u64 root address, u64 root check, u64 mapped blocks, u64 referenced blocks,
             f64 creation time, u16 state (0 visible, 1 hidden, 2 deleted), u16 held, u16 length of the name, which
             follows in UTF-8
    marks:   u64 volume id, u32 length of the record, u32 length of the trackers, then both (`tiers.changes`)

Rows replace those of the same key (device index, volume id, segment id, address, snapshot id, volume id). A copy whose
write was torn lacks blocks, or fails its check; then the copy before it counts, whose time has not passed.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from tiers.catalog import (
    SNAPSHOT_STATES,
    Change,
    DeadRow,
    DeviceRow,
    MarkRow,
    Position,
    SegmentRow,
    SnapshotRow,
    State,
    VolumeRow,
)
from tiers.device import DEVICE_STATES
from tiers.layout import BLOCK_BYTES, check_of
from tiers.names import NAME_LIMIT

MAGIC = b"TRCCATA1"
COPY_VERSION = 5

_HEADER = struct.Struct("<8sHHIQQQQQQ")
_POSITION = struct.Struct("<7Q")
_COUNTS = struct.Struct("<II")
_LENGTH = struct.Struct("<H")
_CHECK = struct.Struct("<Q")
_DEVICE = struct.Struct("<HHIQQ16sHH")
_VOLUME = struct.Struct("<QQQQQdQQQQHHH")
_SEGMENT = struct.Struct("<QIIHHIIIQ")
_DEAD = struct.Struct("<QQQQ")
_SNAPSHOT = struct.Struct("<QQQQQQQdHHH")
_MARK = struct.Struct("<QII")
assert _HEADER.size == 64
assert _POSITION.size == 56
assert (_DEVICE.size, _VOLUME.size, _SEGMENT.size, _DEAD.size, _SNAPSHOT.size, _MARK.size) == (44, 86, 40, 32, 70, 16)
_CHECK_OFFSET = 56
_SOUND = 0xFFFF
_LAYERED, _RETIRED, _FILLING = 1, 2, 4
_TIERS = ("fast", "base")

Table = dict[int, bytes]
"""Packed rows by key."""
TableChange = tuple[list[int], list[bytes]]
"""Removed keys, and rows to be put in."""


class CopyKind(IntEnum):
    """Everything, or what is different from the copy before."""

    FULL = 1
    DELTA = 2


class BadCopyError(Exception):
    """The bytes are no copy that this release can use. `newer`: a sound one of another version."""

    def __init__(self, why: str, *, newer: bool = False) -> None:
        super().__init__(why)
        self.newer = newer


@dataclass(frozen=True, slots=True)
class Link:
    """What a delta says of the copy that it builds on."""

    seq: int = 0
    check: int = 0


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy that passed its check."""

    kind: CopyKind
    before: Link
    check: int
    pool_name: str
    position: Position
    removed: tuple[list[int], ...]
    rows: tuple[Table, ...]

    @property
    def key(self) -> tuple[int, int]:
        """Incarnation and sequence: later copies have higher ones."""
        return self.position.incarnation, self.position.checkpoint_seq


# -- rows --------------------------------------------------------------------------------------------------------------


def _pack_device(row: DeviceRow) -> bytes:
    path = row.path.encode("utf-8", "surrogateescape")
    why = b"" if row.poisoned is None else row.poisoned.encode()[: _SOUND - 1]
    length = _SOUND if row.poisoned is None else len(why)
    tier = _TIERS.index(row.tier) + 1
    return (
        _DEVICE.pack(
            row.index,
            tier,
            DEVICE_STATES.index(row.state),
            row.size_bytes,
            row.segment_bytes,
            row.uuid,
            len(path),
            length,
        )
        + path
        + why
    )


def _pack_volume(row: VolumeRow) -> bytes:
    name, policy = row.name.encode(), row.policy.encode()
    return (
        _VOLUME.pack(
            row.id,
            row.size_bytes,
            row.root_address,
            row.root_check,
            row.mapped_blocks,
            float(row.created_at),
            row.family,
            row.origin,
            row.heir,
            row.referenced,
            bool(row.layered) * _LAYERED | bool(row.retired) * _RETIRED | bool(row.filling) * _FILLING,
            len(name),
            len(policy),
        )
        + name
        + policy
    )


def _pack_snapshot(row: SnapshotRow) -> bytes:
    name = row.name.encode()
    return (
        _SNAPSHOT.pack(
            row.id,
            row.volume,
            row.size_bytes,
            row.root_address,
            row.root_check,
            row.mapped_blocks,
            row.referenced,
            float(row.created_at),
            SNAPSHOT_STATES.index(row.state),
            row.held,
            len(name),
        )
        + name
    )


def _pack_mark(row: MarkRow) -> bytes:
    return _MARK.pack(row.id, len(row.record), len(row.trackers)) + row.record + row.trackers


def _pack_segment(row: SegmentRow) -> bytes:
    return _SEGMENT.pack(
        row.id, row.device, row.index, row.kind, row.open, row.used, row.live, row.blocks, row.last_seq
    )


def _unpack_device(data: bytes) -> DeviceRow:
    index, tier, state, size, segment, uuid, path_length, why_length = _DEVICE.unpack_from(data)
    end = _DEVICE.size + path_length
    why = None if why_length == _SOUND else data[end:].decode("utf-8", "replace")
    path = data[_DEVICE.size : end].decode("utf-8", "surrogateescape")
    if tier not in (1, 2):
        raise BadCopyError(f"a device of an unknown tier {tier}")
    if state >= len(DEVICE_STATES):
        raise BadCopyError(f"a device in an unknown state {state}")
    return DeviceRow(index, uuid, path, _TIERS[tier - 1], size, segment, why, DEVICE_STATES[state])


def _unpack_volume(data: bytes) -> VolumeRow:
    number, size, address, check, mapped, created, family, origin, heir, referenced, flags, length, _ = (
        _VOLUME.unpack_from(data)
    )
    end = _VOLUME.size + length
    name, policy = data[_VOLUME.size : end].decode(), data[end:].decode()
    if flags & ~(_LAYERED | _RETIRED | _FILLING):
        raise BadCopyError(f"a volume with unknown flags {flags:#x}")
    return VolumeRow(
        number,
        name,
        size,
        address,
        check,
        mapped,
        created,
        policy,
        family,
        origin,
        layered=bool(flags & _LAYERED),
        retired=bool(flags & _RETIRED),
        heir=heir,
        referenced=referenced,
        filling=bool(flags & _FILLING),
    )


def _unpack_snapshot(data: bytes) -> SnapshotRow:
    number, volume, size, address, check, mapped, referenced, created, state, held, _ = _SNAPSHOT.unpack_from(data)
    if state >= len(SNAPSHOT_STATES):
        raise BadCopyError(f"a snapshot in an unknown state {state}")
    name = data[_SNAPSHOT.size :].decode()
    return SnapshotRow(
        number, volume, name, size, address, check, mapped, referenced, created, SNAPSHOT_STATES[state], bool(held)
    )


def _unpack_segment(data: bytes) -> SegmentRow:
    number, device, index, kind, is_open, used, live, blocks, last_seq = _SEGMENT.unpack(data)
    return SegmentRow(number, device, index, kind, bool(is_open), used, live, last_seq, blocks)


def _unpack_mark(data: bytes) -> MarkRow:
    number, record_length, _ = _MARK.unpack_from(data)
    end = _MARK.size + record_length
    return MarkRow(number, data[_MARK.size : end], data[end:])


def _device_length(data: memoryview, at: int) -> int:
    *_, path_length, why_length = _DEVICE.unpack_from(data, at)
    return int(_DEVICE.size + path_length + (0 if why_length == _SOUND else why_length))


def _volume_length(data: memoryview, at: int) -> int:
    *_, name_length, policy_length = _VOLUME.unpack_from(data, at)
    return int(_VOLUME.size + name_length + policy_length)


def _segment_length(data: memoryview, at: int) -> int:
    return _SEGMENT.size


def _dead_length(data: memoryview, at: int) -> int:
    return _DEAD.size


def _snapshot_length(data: memoryview, at: int) -> int:
    *_, name_length = _SNAPSHOT.unpack_from(data, at)
    return int(_SNAPSHOT.size + name_length)


def _mark_length(data: memoryview, at: int) -> int:
    _, record_length, trackers_length = _MARK.unpack_from(data, at)
    return int(_MARK.size + record_length + trackers_length)


_KEY_OF_DEVICE = struct.Struct("<H")
_LENGTHS = (_device_length, _volume_length, _segment_length, _dead_length, _snapshot_length, _mark_length)
_KEYS = (_KEY_OF_DEVICE, _CHECK, _CHECK, _CHECK, _CHECK, _CHECK)


# -- the catalog in memory ---------------------------------------------------------------------------------------------


class Mirror:
    """The catalog's rows as they are written to a copy, kept up with each commit."""

    def __init__(self, state: State) -> None:
        self.pool_name = state.pool_name
        self.position = state.position
        self.tables: tuple[Table, Table, Table, Table, Table, Table] = (
            {row.index: _pack_device(row) for row in state.devices},
            {row.id: _pack_volume(row) for row in state.volumes},
            {row.id: _pack_segment(row) for row in state.segments},
            {row[0]: _dead(row) for row in state.dead},
            {row.id: _pack_snapshot(row) for row in state.snapshots},
            {row.id: _pack_mark(row) for row in state.marks},
        )
        self._poisoned = {row.index: row.poisoned for row in state.devices}

    def apply(self, change: Change) -> list[TableChange]:
        """Do what a commit did; return what is different now, by table."""
        devices, volumes, segments, dead, snapshots, marks = self.tables
        self.position = change.position
        delta: list[TableChange] = []
        rows = []
        for device in change.devices:
            why = self._poisoned.get(device.index) or device.poisoned  # poison is never lifted
            self._poisoned[device.index] = why
            rows.append(
                (
                    device.index,
                    _pack_device(replace(device, poisoned=why)),
                )
            )
        delta.append(([], _put(devices, rows)))
        there = {volume.id for volume in change.volumes}
        gone = [number for number in volumes if number not in there]
        delta.append(
            (_remove(volumes, gone), _put(volumes, ((volume.id, _pack_volume(volume)) for volume in change.volumes)))
        )
        delta.append(
            (
                _remove(segments, change.freed_segments),
                _put(segments, ((row.id, _pack_segment(row)) for row in change.segments)),
            )
        )
        added = ((row[0], _dead(row)) for row in change.dead_added)
        delta.append((_remove(dead, change.dead_removed), _put(dead, added)))
        rows = [(row.id, _pack_snapshot(row)) for row in change.snapshots]
        delta.append((_remove(snapshots, change.snapshots_removed), _put(snapshots, rows)))
        there = {mark.id for mark in change.marks}
        gone = [number for number in marks if number not in there]
        delta.append((_remove(marks, gone), _put(marks, ((mark.id, _pack_mark(mark)) for mark in change.marks))))
        return delta

    def whole(self) -> list[TableChange]:
        """Everything, as a full copy has it."""
        return [([], list(table.values())) for table in self.tables]


def _dead(row: DeadRow) -> bytes:
    address, check, level, volume = row
    return _DEAD.pack(address, check, level, volume)


def _put(table: Table, rows: Iterable[tuple[int, bytes]]) -> list[bytes]:
    different = []
    for key, data in rows:
        if table.get(key) != data:
            table[key] = data
            different.append(data)
    return different


def _remove(table: Table, keys: Iterable[int]) -> list[int]:
    return [key for key in keys if table.pop(key, None) is not None]


# -- copies ------------------------------------------------------------------------------------------------------------


def bound_bytes(
    name: str,
    devices: Iterable[DeviceRow],
    volumes: Iterable[tuple[str, str]],
    segments: int,
    dead: int,
    snapshots: int,
    marks: Iterable[MarkRow] = (),
) -> int:
    """At most so long is a full copy of a catalog with these rows. `volumes`: names, and those of their policies."""
    return (
        _HEADER.size
        + _POSITION.size
        + _LENGTH.size
        + len(name.encode())
        + len(_KEYS) * _COUNTS.size
        + sum(len(_pack_device(row)) for row in devices)
        + sum(_VOLUME.size + len(name.encode()) + len(policy.encode()) for name, policy in volumes)
        + segments * _SEGMENT.size
        + dead * _DEAD.size
        + snapshots * (_SNAPSHOT.size + NAME_LIMIT)
        + sum(_MARK.size + len(mark.record) + len(mark.trackers) for mark in marks)
    )


def encode_copy(
    kind: CopyKind, pool_name: str, position: Position, tables: Sequence[TableChange], before: Link
) -> tuple[bytes, int]:
    """Return a copy, padded to whole blocks, and its check. Runs in a worker."""
    name = pool_name.encode()
    parts = [
        b"",
        _POSITION.pack(
            position.incarnation,
            position.checkpoint_seq,
            position.log_segment,
            position.log_slot,
            position.log_prev_check,
            position.next_segment_id,
            position.next_volume_id,
        ),
        _LENGTH.pack(len(name)),
        name,
    ]
    for removed, rows in tables:
        parts.append(_COUNTS.pack(len(removed), len(rows)))
        parts.append(struct.pack(f"<{len(removed)}Q", *removed))
        parts += rows
    length = _HEADER.size + sum(map(len, parts))

    def header(check: int) -> bytes:
        return _HEADER.pack(
            MAGIC,
            COPY_VERSION,
            kind,
            0,
            position.incarnation,
            position.checkpoint_seq,
            before.seq,
            before.check,
            length,
            check,
        )

    parts[0] = header(0)
    check = check_of(b"".join(parts))
    parts[0] = header(check)
    parts.append(bytes(-length % BLOCK_BYTES))
    return b"".join(parts), check


def blocks_of_copy(first_block: bytes | bytearray | memoryview) -> int:
    """How many blocks the copy that begins with this block claims to have; 0 if none begins there."""
    if len(first_block) < _HEADER.size or bytes(first_block[:8]) != MAGIC:
        return 0
    return -(-int(_HEADER.unpack_from(first_block)[8]) // BLOCK_BYTES)


def decode_copy(data: bytes | bytearray | memoryview) -> Copy:
    """Judge a copy. Raises BadCopyError; what this returns is sound."""
    view = memoryview(bytes(data))
    if len(view) < _HEADER.size or bytes(view[:8]) != MAGIC:
        raise BadCopyError("no copy of a catalog")
    _, version, kind, _, incarnation, seq, before_seq, before_check, length, check = _HEADER.unpack_from(view)
    if not _HEADER.size <= length <= len(view):
        raise BadCopyError("a copy of a catalog cut short")
    raw = bytearray(view[:length])
    raw[_CHECK_OFFSET : _CHECK_OFFSET + 8] = bytes(8)
    if check != check_of(raw):
        raise BadCopyError("the copy of the catalog fails its check")
    if version != COPY_VERSION:
        raise BadCopyError(
            f"the copy of the catalog has format version {version} and this release reads {COPY_VERSION}", newer=True
        )
    try:
        copy = _decode_body(view[:length], CopyKind(kind), Link(before_seq, before_check), check)
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise BadCopyError(f"a copy of a catalog with impossible values ({error})") from None
    if copy.key != (incarnation, seq):
        raise BadCopyError("a copy of a catalog that contradicts itself")
    return copy


def _decode_body(view: memoryview, kind: CopyKind, before: Link, check: int) -> Copy:
    at = _HEADER.size
    position = Position(*_POSITION.unpack_from(view, at))
    at += _POSITION.size
    (name_length,) = _LENGTH.unpack_from(view, at)
    at += _LENGTH.size
    name = bytes(view[at : at + name_length]).decode()
    at += name_length
    removed: list[list[int]] = []
    tables: list[Table] = []
    for length_at, key in zip(_LENGTHS, _KEYS, strict=True):
        removed_count, row_count = _COUNTS.unpack_from(view, at)
        at += _COUNTS.size
        if at + 8 * removed_count > len(view):
            raise BadCopyError("a copy of a catalog with impossible counts")
        removed.append(list(struct.unpack_from(f"<{removed_count}Q", view, at)))
        at += 8 * removed_count
        table: Table = {}
        for _ in range(row_count):
            length = length_at(view, at)
            if at + length > len(view):
                raise BadCopyError("a copy of a catalog with impossible counts")
            table[key.unpack_from(view, at)[0]] = bytes(view[at : at + length])
            at += length
        tables.append(table)
    if at != len(view):
        raise BadCopyError("a copy of a catalog with impossible counts")
    return Copy(kind, before, check, name, position, tuple(removed), tuple(tables))


def chain_of(copies: dict[tuple[int, int], Copy], newest: Copy) -> list[Copy] | None:
    """The full copy that `newest` builds on, and each delta after it; None if one of them is missing."""
    chain = [newest]
    while chain[-1].kind is CopyKind.DELTA:
        last = chain[-1]
        found = copies.get((last.key[0], last.before.seq))
        if found is None or found.check != last.before.check or found.key >= last.key:
            return None
        chain.append(found)
    return chain[::-1]


def newest_chain(copies: Iterable[Copy]) -> list[Copy] | None:
    """The chain of the newest copy whose chain is complete."""
    by_key = {copy.key: copy for copy in copies}
    for key in sorted(by_key, reverse=True):
        chain = chain_of(by_key, by_key[key])
        if chain is not None:
            return chain
    return None


def tables_of(chain: Sequence[Copy]) -> list[Table]:
    """What a chain amounts to."""
    tables: list[Table] = [{} for _ in _KEYS]
    for copy in chain:
        for table, removed, rows in zip(tables, copy.removed, copy.rows, strict=True):
            for key in removed:
                table.pop(key, None)
            table.update(rows)
    return tables


def state_of(chain: Sequence[Copy], pool_uuid: bytes) -> State:
    """The catalog that a chain of copies describes. Raises BadCopyError."""
    newest = chain[-1]
    devices, volumes, segments, dead, snapshots, marks = tables_of(chain)
    try:
        return State(
            newest.pool_name,
            pool_uuid,
            newest.position,
            [_unpack_device(devices[index]) for index in sorted(devices)],
            [_unpack_volume(volumes[number]) for number in sorted(volumes)],
            [_unpack_segment(data) for data in segments.values()],
            [_DEAD.unpack(data) for data in dead.values()],
            [_unpack_snapshot(snapshots[number]) for number in sorted(snapshots)],
            [_unpack_mark(marks[number]) for number in sorted(marks)],
        )
    except (struct.error, UnicodeDecodeError) as error:
        raise BadCopyError(f"a copy of a catalog with impossible values ({error})") from None
