"""The catalog: a SQLite file that is the newest checkpoint of a pool's log.

One transaction is one consistent state at one log sequence: devices, volumes with the roots of their map trees,
segments with their live counts, subtrees still to be given back, and where the log goes on. Opening a pool is this
plus the replay of the log after it. The file is in WAL mode with synchronous=FULL, so a committed checkpoint survives
a power cut; it is written only after the data that it names was made durable.

    meta      key, value          format_version, pool_name, pool_uuid, incarnation, checkpoint_seq, log_segment,
                                  log_slot, log_prev_check, next_segment_id, next_volume_id
    devices   idx, uuid, path, tier, size_bytes, segment_bytes, poisoned, state
    volumes   id, name, size_bytes, root_address, root_check, mapped_blocks, created_at, policy, family, origin,
              layered, retired, heir, referenced, filling
    snapshots id, volume, name, size_bytes, root_address, root_check, mapped_blocks, referenced, created_at, state,
              held
    segments  id, device, idx, kind, open, used, live, last_seq, blocks
    dead      address, check_value, level, volume   subtrees that no volume has any more, to be walked in slices
    marks     id, record, trackers                  of volumes that have them: `tiers.changes`

64-bit values are stored as SQLite's signed integers. A ballast file lies beside the catalog, because it may share a
file system with sparse devices that fill up: when a commit finds the disk full the ballast goes, and the commit is
tried again.
"""

import contextlib
import errno
import itertools
import os
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tiers.changes import MAX_RECORD_BYTES, decode_trackers
from tiers.device import DEVICE_STATES, Device, DeviceState
from tiers.errors import TierError
from tiers.label import MAX_DEVICES
from tiers.layout import (
    BLOCK_BYTES,
    LABEL_AREA_BYTES,
    MAX_DEVICE_BYTES,
    MAX_SEGMENT_BYTES,
    MAX_SEGMENT_ID,
    MAX_SEQ,
    SLOT_BITS,
    SLOT_MASK,
)
from tiers.names import MAX_VOLUME_BYTES, validate_name, validate_volume_size
from tiers.record import MAX_TIME_S, Kind

FORMAT_VERSION = 5
SNAPSHOT_STATES = ("visible", "hidden", "deleted")
CATALOG_NAME = "catalog.sqlite"
BALLAST_NAME = "ballast"
BALLAST_BYTES = 4 << 20

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE devices (idx INTEGER PRIMARY KEY, uuid BLOB NOT NULL, path TEXT NOT NULL, tier TEXT NOT NULL,
    size_bytes INTEGER NOT NULL, segment_bytes INTEGER NOT NULL, poisoned TEXT,
    state TEXT NOT NULL);
CREATE TABLE volumes (id INTEGER PRIMARY KEY, name TEXT NOT NULL, size_bytes INTEGER NOT NULL,
    root_address INTEGER NOT NULL, root_check INTEGER NOT NULL, mapped_blocks INTEGER NOT NULL,
    created_at REAL NOT NULL, policy TEXT NOT NULL, family INTEGER NOT NULL, origin INTEGER NOT NULL,
    layered INTEGER NOT NULL, retired INTEGER NOT NULL, heir INTEGER NOT NULL, referenced INTEGER NOT NULL,
    filling INTEGER NOT NULL);
CREATE TABLE snapshots (id INTEGER PRIMARY KEY, volume INTEGER NOT NULL, name TEXT NOT NULL,
    size_bytes INTEGER NOT NULL, root_address INTEGER NOT NULL, root_check INTEGER NOT NULL,
    mapped_blocks INTEGER NOT NULL, referenced INTEGER NOT NULL, created_at REAL NOT NULL, state TEXT NOT NULL,
    held INTEGER NOT NULL);
CREATE TABLE segments (id INTEGER PRIMARY KEY, device INTEGER NOT NULL, idx INTEGER NOT NULL, kind INTEGER NOT NULL,
    open INTEGER NOT NULL, used INTEGER NOT NULL, live INTEGER NOT NULL, last_seq INTEGER NOT NULL,
    blocks INTEGER NOT NULL);
CREATE TABLE dead (address INTEGER PRIMARY KEY, check_value INTEGER NOT NULL, level INTEGER NOT NULL,
    volume INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE marks (id INTEGER PRIMARY KEY, record BLOB NOT NULL, trackers BLOB NOT NULL);
"""

_TABLES = {statement.split()[2]: statement.strip() for statement in _SCHEMA.split(";") if statement.strip()}
"""What SQLite says of the catalog's tables, if they are as `_SCHEMA` makes them."""


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """A device as the catalog knows it."""

    index: int
    uuid: bytes
    path: str
    tier: str
    size_bytes: int
    segment_bytes: int
    poisoned: str | None
    state: DeviceState = "online"


@dataclass(frozen=True, slots=True)
class VolumeRow:
    """A volume and the root of its map."""

    id: int
    name: str
    size_bytes: int
    root_address: int
    root_check: int
    mapped_blocks: int
    created_at: float
    policy: str = ""
    """The name of its policy; empty: the default."""
    family: int = 0
    """The id of the first volume of its name; 0: this one."""
    origin: int = 0
    """The id of the snapshot that it is a clone of; 0: none."""
    layered: bool = False
    """Its map may have entries that only mean something with an origin."""
    retired: bool = False
    """No client sees it, and it has no name."""
    heir: int = 0
    """The volume that has its blocks now; 0: none."""
    referenced: int = 0
    """Blocks with data that clients see."""
    filling: bool = False
    """It is not complete: somebody is filling it, or has begun to."""


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    """A snapshot and the root of what it keeps."""

    id: int
    volume: int
    name: str
    size_bytes: int
    root_address: int
    root_check: int
    mapped_blocks: int
    referenced: int
    created_at: float
    state: str
    held: bool


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """A segment in use."""

    id: int
    device: int
    index: int
    kind: int
    open: bool
    used: int
    live: int
    last_seq: int
    blocks: int = 0
    """Blocks that were written into it, where they are more than slots (frames); else 0."""


@dataclass(frozen=True, slots=True)
class MarkRow:
    """What is saved with a volume for whoever follows its changes."""

    id: int
    record: bytes
    trackers: bytes
    """As `tiers.changes.encode_trackers` makes it."""


DeadRow = tuple[int, int, int, int]
"""(address, check, level, volume) of the root page of a detached subtree."""


@dataclass(slots=True)
class Position:
    """Where the log goes on: everything before is in the checkpoint."""

    incarnation: int
    checkpoint_seq: int
    log_segment: int
    log_slot: int
    log_prev_check: int
    next_segment_id: int
    next_volume_id: int


@dataclass(slots=True)
class Change:
    """What one checkpoint changes, to be committed as one transaction."""

    position: Position
    volumes: list[VolumeRow]
    segments: list[SegmentRow] = field(default_factory=list)
    freed_segments: list[int] = field(default_factory=list)
    dead_added: list[DeadRow] = field(default_factory=list)
    dead_removed: list[int] = field(default_factory=list)
    devices: list[DeviceRow] = field(default_factory=list)
    snapshots: list[SnapshotRow] = field(default_factory=list)
    """Those that are new or have changed."""
    snapshots_removed: list[int] = field(default_factory=list)
    marks: list[MarkRow] = field(default_factory=list)
    """All that there are."""


@dataclass(frozen=True, slots=True)
class State:
    """The whole catalog."""

    pool_name: str
    pool_uuid: bytes
    position: Position
    devices: list[DeviceRow]
    volumes: list[VolumeRow]
    segments: list[SegmentRow]
    dead: list[DeadRow]
    snapshots: list[SnapshotRow] = field(default_factory=list)
    marks: list[MarkRow] = field(default_factory=list)


def judge_state(state: State) -> None:
    """Raise ValueError (TierError for a name or a size) unless the engine may rely on every value. SQLite checks none.

    What lies on the devices is checked elsewhere: pages by their checks, counts by `terrace pool check`.
    """
    validate_name("pool", _text("the pool's name", state.pool_name))
    _uuid("the pool", state.pool_uuid)
    position = state.position
    _within("incarnation", position.incarnation, 0, MAX_SEQ)
    _within("checkpoint_seq", position.checkpoint_seq, 0, MAX_SEQ)
    _within("log_segment", position.log_segment, 0, MAX_SEGMENT_ID)
    _within("log_slot", position.log_slot, 0, SLOT_MASK)
    _within("log_prev_check", position.log_prev_check, 0, _U64)
    _within("next_segment_id", position.next_segment_id, 0, MAX_SEGMENT_ID + 1)
    _within("next_volume_id", position.next_volume_id, 0, 1 << 56)
    if all(device.state == "removed" for device in state.devices):
        raise ValueError("it names no device")
    places: dict[int, int] = {}
    slots: dict[int, int] = {}
    for device in state.devices:
        _within("a device's index", device.index, 0, MAX_DEVICES - 1)
        what = f"device {device.index}"
        _uuid(what, device.uuid)
        if not _text(f"{what}: the path", device.path):
            raise ValueError(f"{what} has no path")
        if device.tier not in ("fast", "base"):
            raise ValueError(f"{what}: the tier {device.tier!r} is unknown")
        if device.state not in DEVICE_STATES:
            raise ValueError(f"{what}: the state {device.state!r:.80} is unknown")
        if device.poisoned is not None:
            _text(f"{what}: the reason of the poison", device.poisoned)
        _within(f"{what}: segment_bytes", device.segment_bytes, BLOCK_BYTES, MAX_SEGMENT_BYTES)
        _within(f"{what}: size_bytes", device.size_bytes, LABEL_AREA_BYTES, MAX_DEVICE_BYTES)
        if device.state == "removed":
            continue  # nothing may lie there
        places[device.index] = (device.size_bytes - LABEL_AREA_BYTES) // device.segment_bytes
        slots[device.index] = device.segment_bytes // BLOCK_BYTES
    names: set[str] = set()
    snapshot_ids = {snapshot.id for snapshot in state.snapshots}
    volume_ids = {volume.id for volume in state.volumes}
    for volume in state.volumes:
        _within("a volume's id", volume.id, 1, (1 << 56) - 1)
        what = f"volume {volume.id}"
        for name, flag in (("layered", volume.layered), ("retired", volume.retired), ("filling", volume.filling)):
            _within(f"{what}: {name}", flag, 0, 1)
        if volume.retired:
            if _text(f"{what}: the name", volume.name):
                raise ValueError(f"{what} is retired and has a name")
        else:
            validate_name("volume", _text(f"{what}: the name", volume.name))
            if volume.name in names:
                raise ValueError(f"two volumes are named {volume.name}")
            names.add(volume.name)
        _within(f"{what}: family", volume.family, 0, (1 << 56) - 1)
        _within(f"{what}: referenced", volume.referenced, 0, MAX_VOLUME_BYTES // BLOCK_BYTES)
        if volume.origin and (volume.origin not in snapshot_ids or not volume.layered):
            raise ValueError(f"{what} is a clone of snapshot {volume.origin!r:.80}, which isn't there")
        if volume.heir and (volume.heir not in volume_ids or volume.heir == volume.id or not volume.retired):
            raise ValueError(f"{what} has the heir {volume.heir!r:.80}, which can't be")
        _within(f"{what}: size_bytes", volume.size_bytes, 0, MAX_VOLUME_BYTES)
        validate_volume_size(volume.size_bytes)
        _within(f"{what}: root_address", volume.root_address, 0, _U64)
        _within(f"{what}: root_check", volume.root_check, 0, _U64)
        _within(f"{what}: mapped_blocks", volume.mapped_blocks, 0, MAX_VOLUME_BYTES // BLOCK_BYTES)
        if _text(f"{what}: the policy", volume.policy):
            validate_name("policy", volume.policy)
        if not isinstance(volume.created_at, int | float) or not 0 <= volume.created_at <= MAX_TIME_S:
            raise ValueError(f"{what}: created_at is {volume.created_at!r}")
    _judge_snapshots(state, volume_ids)
    _judge_descent(state)
    for mark in state.marks:
        if mark.id not in volume_ids:
            raise ValueError(f"there are marks of volume {mark.id!r:.80}, which isn't there")
        for what, value in (("record", mark.record), ("trackers", mark.trackers)):
            if not isinstance(value, bytes):
                raise ValueError(f"volume {mark.id}: {what} is {value!r:.80}, which can't be")
        if len(mark.record) > MAX_RECORD_BYTES:
            raise ValueError(f"volume {mark.id} has a record of {len(mark.record)} bytes")
        decode_trackers(mark.trackers)
    for segment in state.segments:
        _within("a segment's id", segment.id, 1, MAX_SEGMENT_ID)
        what = f"segment {segment.id}"
        if segment.device not in places:
            raise ValueError(f"{what} lies on device {segment.device!r}, which it doesn't have")
        _within(f"{what}: idx", segment.index, 0, places[segment.device] - 1)
        _within(f"{what}: kind", segment.kind, 1, max(Kind))
        _within(f"{what}: used", segment.used, 0, slots[segment.device])
        _within(f"{what}: blocks", segment.blocks, 0, MAX_PACKED_BLOCKS if segment.kind == Kind.PACKED else 0)
        _within(f"{what}: live", segment.live, 0, max(segment.blocks, slots[segment.device]))
        _within(f"{what}: last_seq", segment.last_seq, 0, MAX_SEQ)
    for address, check, level, volume_id in state.dead:
        _within("the address of a dead subtree", address, 0, _U64)
        _within("the check of a dead subtree", check, 0, _U64)
        _within("the level of a dead subtree", level, 0, 4)
        _within("the volume of a dead subtree", volume_id, 0, (1 << 56) - 1)


def _judge_snapshots(state: State, volume_ids: set[int]) -> None:
    families = {volume.id: volume.family or volume.id for volume in state.volumes}
    names: set[tuple[int, str]] = set()
    for snapshot in state.snapshots:
        _within("a snapshot's id", snapshot.id, 1, (1 << 56) - 1)
        what = f"snapshot {snapshot.id}"
        if snapshot.id in volume_ids:
            raise ValueError(f"{what} has the id of a volume")
        if snapshot.volume not in families:
            raise ValueError(f"{what} is one of volume {snapshot.volume!r:.80}, which isn't there")
        validate_name("snapshot", _text(f"{what}: the name", snapshot.name))
        if snapshot.state not in SNAPSHOT_STATES:
            raise ValueError(f"{what}: the state {snapshot.state!r:.80} is unknown")
        if snapshot.state == "visible":
            name = families[snapshot.volume], snapshot.name
            if name in names:
                raise ValueError(f"two snapshots of one volume are named {snapshot.name}")
            names.add(name)
        _within(f"{what}: size_bytes", snapshot.size_bytes, 0, MAX_VOLUME_BYTES)
        validate_volume_size(snapshot.size_bytes)
        _within(f"{what}: root_address", snapshot.root_address, 0, _U64)
        _within(f"{what}: root_check", snapshot.root_check, 0, _U64)
        _within(f"{what}: mapped_blocks", snapshot.mapped_blocks, 0, MAX_VOLUME_BYTES // BLOCK_BYTES)
        _within(f"{what}: referenced", snapshot.referenced, 0, MAX_VOLUME_BYTES // BLOCK_BYTES)
        _within(f"{what}: held", snapshot.held, 0, 1)
        if not isinstance(snapshot.created_at, int | float) or not 0 <= snapshot.created_at <= MAX_TIME_S:
            raise ValueError(f"{what}: created_at is {snapshot.created_at!r}")


def _judge_descent(state: State) -> None:
    """Nothing descends from itself, or inherits from itself."""
    home = {snapshot.id: snapshot.volume for snapshot in state.snapshots}
    for name, parents in (
        ("origin", {volume.id: home.get(volume.origin, 0) for volume in state.volumes}),
        ("heir", {volume.id: volume.heir for volume in state.volumes}),
    ):
        sound: set[int] = {0}
        for start in parents:
            path: list[int] = []
            at = start
            while at not in sound:
                if at in path:
                    raise ValueError(f"volume {start} is its own {name}")
                path.append(at)
                at = parents[at]
            sound.update(path)


_U64 = (1 << 64) - 1
MAX_PACKED_BLOCKS = 1 << SLOT_BITS
"""More than addresses can tell apart."""


def _within(what: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{what} is {value!r:.80}, which can't be")


def _text(what: str, value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{what} is {value!r:.80}, which can't be")
    return value


def _uuid(what: str, value: object) -> None:
    if not isinstance(value, bytes) or len(value) != 16:
        raise ValueError(f"the uuid of {what} is {value!r:.80}, which can't be")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _unsigned(value: int) -> int:
    return value & 0xFFFFFFFFFFFFFFFF


class Catalog:
    """An open catalog. Its methods block: call them in a worker thread while clients are served."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / CATALOG_NAME
        self._ballast = directory / BALLAST_NAME
        self._next_step = f"rebuild it with `terrace pool check {directory.name} --rebuild-catalog --device DEV`"
        if not self._path.exists():
            raise TierError(errno.ENOENT, f"there is no catalog at {self._path}: {self._next_step}")
        self._lock = threading.Lock()
        self._db = self._connect()

    def _connect(self) -> sqlite3.Connection:
        try:
            db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=5.0)
        except sqlite3.Error as error:
            raise self._damaged(error) from error
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.execute("PRAGMA cache_size=-2048")
        except (sqlite3.Error, UnicodeDecodeError) as error:  # SQLite's message may quote the damage
            db.close()
            raise self._damaged(error) from error
        return db

    def _damaged(self, error: Exception | str) -> TierError:
        return TierError(errno.EIO, f"the catalog {self._path} can't be used ({error}): {self._next_step}")

    @staticmethod
    def create(directory: Path, name: str, uuid: bytes, devices: Sequence[DeviceRow], position: Position) -> None:
        """Write the catalog of a new pool. The file appears under its name only when it is complete."""
        directory.mkdir(parents=True, exist_ok=True)
        final = directory / CATALOG_NAME
        if final.exists():
            raise TierError(
                errno.EEXIST, f"there is a pool in {directory} already: choose another name, or delete that pool first"
            )
        _build(directory, State(name, uuid, position, list(devices), [], [], []))
        (directory / (CATALOG_NAME + ".new")).rename(final)
        sync_directory(directory)
        sync_directory(directory.parent)

    @staticmethod
    def replace(directory: Path, state: State) -> Path | None:
        """Write a catalog that says `state`; return the name under which one that was there is kept.

        It is complete and durable before the old one is moved. A crash between the two leaves no catalog, which
        another run mends.
        """
        _build(directory, state)
        final = directory / CATALOG_NAME
        aside = next(
            path
            for path in (directory / f"{CATALOG_NAME}.old-{number}" for number in itertools.count(1))
            if not path.exists()
        )
        existed = final.exists()
        for suffix in ("", "-wal", "-shm"):  # an old WAL must not be taken for the new catalog's
            with contextlib.suppress(FileNotFoundError):
                Path(f"{final}{suffix}").rename(f"{aside}{suffix}")
        (directory / (CATALOG_NAME + ".new")).rename(final)
        sync_directory(directory)
        sync_directory(directory.parent)
        return aside if existed else None

    def load(self) -> State:
        """Read everything. Raises TierError for a catalog that is damaged or of another version."""
        db = self._db
        try:
            objects = dict(db.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL"))
            if db.execute("SELECT type FROM sqlite_schema WHERE name = 'meta'").fetchone() != ("table",):
                raise ValueError("it has no table of its state")
            meta = dict(db.execute("SELECT key, value FROM meta"))
            version = meta.get("format_version")
            if version != FORMAT_VERSION:
                raise TierError(
                    errno.EPROTO,
                    f"the catalog {self._path} has format version {version} and this release reads "
                    f"{FORMAT_VERSION}: use the release that wrote it",
                )
            # Nothing but our own tables is asked: a view or a virtual table could be anything.
            if objects != _TABLES:
                raise ValueError("its tables are not those of this format version")
            if (found := db.execute("PRAGMA quick_check(1)").fetchone()) != ("ok",):
                raise ValueError(str(found and found[0]).replace("\n", " "))
            position = Position(
                meta["incarnation"],
                meta["checkpoint_seq"],
                meta["log_segment"],
                meta["log_slot"],
                _unsigned(meta["log_prev_check"]),
                meta["next_segment_id"],
                meta["next_volume_id"],
            )
            state = State(
                meta["pool_name"],
                meta["pool_uuid"],
                position,
                [DeviceRow(*row) for row in db.execute("SELECT * FROM devices ORDER BY idx")],
                [
                    VolumeRow(i, name, size, _unsigned(address), _unsigned(check), *more)
                    for i, name, size, address, check, *more in db.execute("SELECT * FROM volumes ORDER BY id")
                ],
                [
                    SegmentRow(i, device, index, kind, bool(is_open), used, live, last, blocks)
                    for i, device, index, kind, is_open, used, live, last, blocks in db.execute(
                        "SELECT * FROM segments"
                    )
                ],
                [
                    (_unsigned(address), _unsigned(check), level, volume)
                    for address, check, level, volume in db.execute("SELECT * FROM dead")
                ],
                [
                    SnapshotRow(i, volume, name, size, _unsigned(address), _unsigned(check), *more)
                    for i, volume, name, size, address, check, *more in db.execute(
                        "SELECT * FROM snapshots ORDER BY id"
                    )
                ],
                [MarkRow(*row) for row in db.execute("SELECT * FROM marks ORDER BY id")],
            )
        except KeyError as error:
            raise self._damaged(f"{error} is not in it") from error
        except (sqlite3.Error, TypeError, ValueError) as error:
            raise self._damaged(error) from error
        try:
            judge_state(state)
        except (TierError, ValueError) as error:
            raise self._damaged(error) from None
        return state

    def commit(self, change: Change) -> None:
        """Make a checkpoint true. Raises TierError; then nothing of it is."""
        try:
            self._commit(change)
        except sqlite3.OperationalError as error:
            if (
                error.sqlite_errorcode not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)
                or not self._drop_ballast()
            ):
                raise TierError(
                    errno.ENOSPC if error.sqlite_errorcode == sqlite3.SQLITE_FULL else errno.EIO,
                    f"the catalog {self._path}: {error}",
                ) from error
            try:
                self._commit(change)
            except sqlite3.Error as again:
                # ENOSPC is a promise that nothing was committed, which another error isn't (a failed fsync of the WAL).
                full = again.sqlite_errorcode == sqlite3.SQLITE_FULL
                raise TierError(
                    errno.ENOSPC if full else errno.EIO,
                    f"the catalog {self._path}: {again}: free space on its file system",
                ) from again
        except sqlite3.Error as error:
            raise TierError(errno.EIO, f"the catalog {self._path}: {error}") from error

    def _commit(self, change: Change) -> None:
        with self._lock:
            self._transact(self._db, change)

    @staticmethod
    def _transact(db: sqlite3.Connection, change: Change) -> None:
        db.execute("BEGIN IMMEDIATE")
        try:
            _write_change(db, change)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def add_devices(self, devices: Sequence[DeviceRow]) -> None:
        """Record new devices, before anything is put on them. Raises TierError.

        ENOSPC: none of them is recorded. Another error (a failed fsync of the WAL) leaves that to the next open, which
        finds all or none, unless something was committed in between.
        """
        try:
            with self._lock:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    _write_devices(self._db, devices)
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
        except sqlite3.Error as error:
            code = errno.ENOSPC if error.sqlite_errorcode == sqlite3.SQLITE_FULL else errno.EIO
            raise TierError(code, f"the catalog {self._path}: {error}") from error

    def mark_poisoned(self, index: int, why: str) -> None:
        """Record at once that a device is poisoned. Best effort: the labels of the other devices say it too."""
        try:
            with self._lock:
                self._db.execute("UPDATE devices SET poisoned = ? WHERE idx = ?", (why, index))
        except sqlite3.Error as error:
            raise TierError(errno.EIO, f"the catalog {self._path}: {error}") from error

    def _drop_ballast(self) -> bool:
        if not self._ballast.exists():
            return False
        self._ballast.unlink()
        return True

    def lay_ballast(self) -> None:
        """Reserve the ballast, if the file system has the room for it."""
        if self._ballast.exists():
            return
        with contextlib.suppress(OSError):
            fd = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, BALLAST_BYTES)
            except OSError:
                self._ballast.unlink()
            finally:
                os.close(fd)

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def _build(directory: Path, state: State) -> None:
    """Write a whole catalog, durably, under a name of its own beside the place where it belongs."""
    temporary = directory / (CATALOG_NAME + ".new")
    temporary.unlink(missing_ok=True)
    db = sqlite3.connect(temporary, isolation_level=None)
    try:
        db.execute("PRAGMA synchronous=FULL")
        db.executescript(_SCHEMA)
        db.execute("BEGIN IMMEDIATE")
        db.executemany(
            "INSERT INTO meta VALUES (?, ?)",
            [("format_version", FORMAT_VERSION), ("pool_name", state.pool_name), ("pool_uuid", state.pool_uuid)],
        )
        change = Change(
            state.position,
            state.volumes,
            state.segments,
            dead_added=state.dead,
            devices=state.devices,
            snapshots=state.snapshots,
            marks=state.marks,
        )
        _write_change(db, change)
        db.execute("COMMIT")
    finally:
        db.close()


def device_row(device: Device) -> DeviceRow:
    """What the catalog keeps of a device."""
    label = device.label
    return DeviceRow(
        label.device_index,
        label.device_uuid,
        device.path,
        label.tier,
        label.size_bytes,
        label.segment_bytes,
        device.poisoned,
        device.state,
    )


def _write_change(db: sqlite3.Connection, change: Change) -> None:
    _write_position(db, change.position)
    db.execute("DELETE FROM volumes")
    db.executemany(
        "INSERT INTO volumes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                v.id,
                v.name,
                v.size_bytes,
                _signed(v.root_address),
                _signed(v.root_check),
                v.mapped_blocks,
                v.created_at,
                v.policy,
                v.family,
                v.origin,
                int(v.layered),
                int(v.retired),
                v.heir,
                v.referenced,
                int(v.filling),
            )
            for v in change.volumes
        ],
    )
    db.executemany("DELETE FROM snapshots WHERE id = ?", [(i,) for i in change.snapshots_removed])
    db.executemany(
        "INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                s.id,
                s.volume,
                s.name,
                s.size_bytes,
                _signed(s.root_address),
                _signed(s.root_check),
                s.mapped_blocks,
                s.referenced,
                s.created_at,
                s.state,
                int(s.held),
            )
            for s in change.snapshots
        ],
    )
    db.executemany("DELETE FROM segments WHERE id = ?", [(i,) for i in change.freed_segments])
    db.executemany(
        "INSERT OR REPLACE INTO segments VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [(s.id, s.device, s.index, s.kind, int(s.open), s.used, s.live, s.last_seq, s.blocks) for s in change.segments],
    )
    db.executemany("DELETE FROM dead WHERE address = ?", [(_signed(address),) for address in change.dead_removed])
    db.executemany(
        "INSERT OR REPLACE INTO dead VALUES (?, ?, ?, ?)",
        [(_signed(address), _signed(check), level, volume) for address, check, level, volume in change.dead_added],
    )
    _write_marks(db, change.marks)
    _write_devices(db, change.devices)


def _write_marks(db: sqlite3.Connection, marks: Sequence[MarkRow]) -> None:
    there = {mark.id for mark in marks}
    gone = [(i,) for (i,) in db.execute("SELECT id FROM marks") if i not in there]
    db.executemany("DELETE FROM marks WHERE id = ?", gone)
    # They may be long: what is as it was isn't written.
    db.executemany(
        "INSERT INTO marks VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET record = excluded.record,"
        " trackers = excluded.trackers WHERE record <> excluded.record OR trackers <> excluded.trackers",
        [(mark.id, mark.record, mark.trackers) for mark in marks],
    )


def _write_position(db: sqlite3.Connection, position: Position) -> None:
    db.executemany(
        "INSERT OR REPLACE INTO meta VALUES (?, ?)",
        [
            ("incarnation", position.incarnation),
            ("checkpoint_seq", position.checkpoint_seq),
            ("log_segment", position.log_segment),
            ("log_slot", position.log_slot),
            ("log_prev_check", _signed(position.log_prev_check)),
            ("next_segment_id", position.next_segment_id),
            ("next_volume_id", position.next_volume_id),
        ],
    )


def _write_devices(db: sqlite3.Connection, devices: Iterable[DeviceRow]) -> None:
    db.executemany(
        "INSERT INTO devices VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (idx) DO UPDATE SET"
        " path = excluded.path, state = excluded.state,"
        " poisoned = coalesce(poisoned, excluded.poisoned)",  # poison is never lifted
        [(d.index, d.uuid, d.path, d.tier, d.size_bytes, d.segment_bytes, d.poisoned, d.state) for d in devices],
    )


def sync_directory(directory: Path) -> None:
    """Make names that were added to a directory, or removed, durable. Blocks."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
