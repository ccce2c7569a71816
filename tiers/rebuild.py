"""Rebuilding a pool's catalog from its devices: for a pool whose catalog is lost, or that comes from another host.

The newest complete copy on the devices (`tiers.catalogcopy`) becomes the catalog again; opening the pool then replays
the log after it, as always. That gives all that was acknowledged, for the newest durable copy has all that it names,
and the log from there on (`tiers.copies`).

It is refused where it could give less: if a device of the pool is missing, if the labels know of a newer checkpoint
than any copy that is complete, or if something on the devices is of a newer format. A catalog that is there is kept
aside under another name, and one that is sound is replaced only if that is forced.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import sqlite3
import uuid as uuids
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from tiers.catalog import CATALOG_NAME, Catalog, DeviceRow, State, device_row, judge_state
from tiers.catalogcopy import BadCopyError, newest_chain, state_of
from tiers.copies import Part, copies_in, read_parts
from tiers.device import Device, FileDevice, lock_or_refuse, open_device
from tiers.errors import TierError
from tiers.host import LOCK_NAME
from tiers.label import BadLabelError
from tiers.layout import BLOCK_BYTES
from tiers.names import validate_name
from tiers.record import BadRecordError, Kind, SegmentHeader, decode_segment_header

logger = logging.getLogger(__name__)

HEADERS_A_READ = 1024

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Rebuilt:
    """What was done. `kept_as`: where the catalog is that was there before, if one was."""

    name: str
    checkpoint_seq: int
    devices: list[str]
    volumes: int
    kept_as: str | None


async def rebuild_catalog(
    directory: Path,
    name: str,
    paths: Sequence[Path],
    *,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Rebuilt:
    """Write the catalog of the pool `name` into `directory`, which is made where there is none.

    `paths`: devices of the pool; those that an old catalog or the copy itself names are found without being given.
    `force`: replace a catalog that is sound. Raises TierError; then nothing was changed.
    """
    validate_name("pool", name)
    with _directory_for(directory, name), contextlib.ExitStack() as stack:
        old = await trio.to_thread.run_sync(_load_old, directory)
        found = _Devices(name, old)
        stack.callback(found.close)
        state = await _gather(found, old, paths, progress)
        if old is not None and not force and not found.is_stale(old):
            raise TierError(
                errno.EEXIST,
                f"{directory / CATALOG_NAME} is there and sound (checkpoint {old.position.checkpoint_seq}): move it "
                "away, or give --force to replace it",
            )
        kept = await trio.to_thread.run_sync(_write, directory, state)
    paths_now = [row.path for row in state.devices]
    return Rebuilt(name, state.position.checkpoint_seq, paths_now, len(state.volumes), str(kept) if kept else None)


@contextlib.contextmanager
def _directory_for(directory: Path, name: str) -> Iterator[None]:
    """Hold the pool's lock, in a directory that is made where there is none and removed again after a failure."""
    made = not directory.exists()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise TierError(error.errno or errno.EIO, f"{directory} can't hold a pool: {error.strerror}") from None
    try:
        lock_or_refuse(fd, f"the pool {name}")
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                (directory / LOCK_NAME).unlink()
                directory.rmdir()
        raise
    finally:
        os.close(fd)


def _load_old(directory: Path) -> State | None:
    """What the catalog that is there says; None if there is none or it is damaged. Raises EPROTO for a newer one."""
    if not (directory / CATALOG_NAME).exists():
        return None
    try:
        catalog = Catalog(directory)
        try:
            return catalog.load()
        finally:
            catalog.close()
    except TierError as error:
        if error.errno == errno.EPROTO:
            raise
        logger.info("%s", error)
        return None


def _write(directory: Path, state: State) -> Path | None:
    try:
        return Catalog.replace(directory, state)
    except (sqlite3.Error, OSError) as error:
        number = error.errno if isinstance(error, OSError) else None
        raise TierError(number or errno.EIO, f"writing {directory / CATALOG_NAME}: {error}") from error


class _Devices:
    """The devices that were found, open and locked."""

    def __init__(self, name: str, old: State | None) -> None:
        self.name = name
        self.uuid = old.pool_uuid if old is not None else b""
        self.opened: list[FileDevice] = []
        self._old_uuid = self.uuid
        self._seen: set[Path] = set()

    def close(self) -> None:
        for device in self.opened:
            device.close()

    def is_stale(self, old: State) -> bool:
        """Whether the labels know of a newer checkpoint than this catalog."""
        return max(device.label.checkpoint_seq for device in self.opened) > old.position.checkpoint_seq

    async def add(self, path: Path, *, given: bool) -> None:
        """Open a device. What wasn't `given` by the operator is passed over if it isn't of this pool."""
        real = await trio.to_thread.run_sync(path.resolve)
        if real in self._seen:
            return
        self._seen.add(real)
        try:
            device = await trio.to_thread.run_sync(self._open, path)
        except BadLabelError as error:
            if error.newer:
                raise TierError(errno.EPROTO, f"{path} can't be used: {error}") from None
            if given:
                raise TierError(
                    errno.EINVAL, f"{path} is not a usable device of a Terrace pool ({error}): give the pool's devices"
                ) from None
            return
        except TierError as error:
            if given or error.errno == errno.EBUSY:
                raise
            return
        try:
            kept = self._judge(device, path, given=given)
        except BaseException:
            device.close()
            raise
        if kept:
            self.opened.append(device)
        else:
            device.close()

    def _open(self, path: Path) -> FileDevice:
        return open_device(path.absolute())  # not resolved: /dev/disk/by-id outlives /dev/sdb

    def _judge(self, device: FileDevice, path: Path, *, given: bool) -> bool:
        label = device.label
        if label.pool_name != self.name or (self.uuid and label.pool_uuid != self.uuid):
            if not given:
                return False
            if label.pool_name == self.name and self.uuid == self._old_uuid:
                raise TierError(
                    errno.EINVAL,
                    f"{path} belongs to another pool {self.name!r} than the catalog that is there: choose another "
                    "--home for it, or move that catalog away",
                )
            raise TierError(
                errno.EINVAL,
                f"{path} belongs to another pool, {label.pool_name!r}"
                f"{' too, but not the same one' if label.pool_name == self.name else ''}: "
                f"give the devices of {self.name!r} only",
            )
        for other in self.opened:
            if other.index == device.index:
                raise TierError(
                    errno.EINVAL,
                    f"{path} and {other.path} are both device {device.index} of pool {self.name}, so one is a copy: "
                    "give the right one, and detach the other",
                )
        self.uuid = label.pool_uuid
        return True


def _present(state: State) -> list[DeviceRow]:
    """The devices that a pool should have."""
    return [row for row in state.devices if row.state in ("online", "evacuating")]


async def _gather(found: _Devices, old: State | None, paths: Sequence[Path], progress: Progress) -> State:
    """The state that the devices hold, once all of them are there."""
    for path in paths:
        await found.add(path, given=True)
    for row in _present(old) if old is not None else []:
        await found.add(Path(row.path), given=False)
    if not found.opened:
        raise TierError(
            errno.EINVAL,
            f"the catalog of pool {found.name} can't tell its devices: name them with --device",
        )
    while True:
        before = len(found.opened)
        scan = await scan_devices(found.opened, progress)
        for row in _present(scan.state):
            await found.add(Path(row.path), given=False)
        if len(found.opened) == before:
            return reconcile(scan, found.opened)


# -- over any devices, the simulated ones too --------------------------------------------------------------------------


@dataclass(frozen=True)
class Scan:
    """The newest complete copy on some devices, and the highest segment id that any header has."""

    state: State
    highest_segment_id: int


async def scan_devices(devices: Sequence[Device], progress: Progress = lambda done, total: None) -> Scan:
    """Look at the header of every segment, and at every copy of the catalog. Raises TierError if none is complete."""
    pool_uuid = devices[0].label.pool_uuid
    name = devices[0].label.pool_name
    total = sum(device.segment_count for device in devices) * BLOCK_BYTES
    done = highest = 0
    parts: list[Part] = []
    for device in devices:
        for start in range(0, device.segment_count, HEADERS_A_READ):
            places = range(start, min(start + HEADERS_A_READ, device.segment_count))
            for index, header in await _headers(device, places, pool_uuid):
                highest = max(highest, header.segment_id)
                if header.kind is Kind.CATALOG:
                    try:
                        parts += await read_parts(device, index, pool_uuid)
                    except TierError as error:
                        if error.errno == errno.EPROTO:
                            raise
                        logger.warning("%s", error)
            done += len(places) * BLOCK_BYTES
            progress(done, total)
    try:
        chain = newest_chain(copies_in(parts))
        state = state_of(chain, pool_uuid) if chain is not None else None
    except BadCopyError as error:
        if error.newer:
            raise TierError(errno.EPROTO, f"pool {name}: {error}: use the release that wrote it") from None
        raise TierError(errno.EIO, f"pool {name}: {error}: restore the catalog from a copy of its directory") from None
    if state is None:
        where = ", ".join(device.path for device in devices)
        raise TierError(
            errno.ENOENT,
            f"no complete copy of the catalog of pool {name} is on {where}: name its other devices with --device; a "
            "pool that was never opened has none",
        )
    return Scan(state, highest)


async def _headers(device: Device, places: range, pool_uuid: bytes) -> list[tuple[int, SegmentHeader]]:
    """The sound segment headers of this pool at these places."""
    ranges = [(device.segment_offset(index), BLOCK_BYTES) for index in places]
    try:
        blocks: list[bytearray | None] = list(await device.read_many(ranges))
    except OSError:
        blocks = []
        for one in ranges:
            try:
                blocks += await device.read_many([one])
            except OSError as error:
                logger.warning("%s", error)
                blocks.append(None)
    headers = []
    for index, block in zip(places, blocks, strict=True):
        try:
            if block is not None:
                headers.append((index, decode_segment_header(block, pool_uuid)))
        except BadRecordError as error:
            if error.newer:
                raise TierError(errno.EPROTO, f"{device.path}: {error}: use the release that wrote it") from None
    return headers


def reconcile(scan: Scan, devices: Sequence[Device]) -> State:
    """The copy's state with what the labels know. Raises TierError unless they are all there and agree with it."""
    state = scan.state
    name = state.pool_name
    by_index = {device.index: device for device in devices}
    former = {row.index: row for row in state.devices if row.state in ("lost", "removed")}
    for one in devices:
        if one.index in former:
            raise TierError(
                errno.EINVAL,
                f"{one.path} is no longer a device of pool {name}: it was evacuated, or given up as lost; detach it",
            )
    for row in state.devices:
        if row.index in former:
            continue
        device = by_index.get(row.index)
        if device is None:
            raise TierError(
                errno.ENOENT,
                f"device {row.index} of pool {name} is missing ({row.path}, {row.tier}, {row.size_bytes} bytes, uuid "
                f"{uuids.UUID(bytes=row.uuid)}): attach it, and name it with --device if it has another path now",
            )
        if device.label.device_uuid != row.uuid:
            raise TierError(
                errno.EINVAL,
                f"{device.path} is not device {row.index} of pool {name} (its uuid is "
                f"{uuids.UUID(bytes=device.label.device_uuid)}, not {uuids.UUID(bytes=row.uuid)}): give the right one",
            )
    newest = max(devices, key=lambda device: device.label.checkpoint_seq)
    if newest.label.checkpoint_seq > state.position.checkpoint_seq:
        raise TierError(
            errno.EIO,
            f"the newest copy of the catalog of pool {name} is damaged: {newest.path} knows of checkpoint "
            f"{newest.label.checkpoint_seq}, the newest complete copy is of {state.position.checkpoint_seq}: restore "
            "the device, or the catalog, from a copy",
        )
    known = {row.index: row for row in state.devices}
    poisoned = frozenset().union(*(device.label.poisoned for device in devices))
    rows = []
    for index in sorted(by_index):  # one that joined after the copy was written is empty, or the log leads to it
        row = dataclasses.replace(known.get(index) or device_row(by_index[index]), path=by_index[index].path)
        if index in poisoned and row.poisoned is None:
            row = dataclasses.replace(row, poisoned="it failed a flush in an earlier run")
        rows.append(row)
    rows = sorted([*rows, *former.values()], key=lambda row: row.index)
    # Lives that left no copy used ids too. What they wrote must not be mistaken for what is written from now on.
    next_id = max(state.position.next_segment_id, scan.highest_segment_id + 1)
    state = dataclasses.replace(
        state, devices=rows, position=dataclasses.replace(state.position, next_segment_id=next_id)
    )
    try:
        judge_state(state)
    except (ValueError, TierError) as error:
        raise TierError(errno.EIO, f"the copy of the catalog of pool {name} can't be used: {error}") from None
    return state
