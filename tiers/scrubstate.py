"""What is remembered of a pool's scrubs, and the file that keeps it: `scrub.json` in the pool's directory.

The file is advice, not truth: nothing in the pool depends on it. It is replaced as a whole (written beside, synced,
renamed), so a crash leaves the older or the newer one. A file that is missing, damaged, of another version or another
pool's means that no scrub is known of; the next one starts at the beginning.

    {"version": 1, "pool": uuid, "since": s, "run": RUN or null, "last": RESULT or null}

`since`: when the pool's scrubs began to be remembered (seconds since 1970). RUN and RESULT are the classes below, field
by field; `devices` has the device's index as key.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from tiers.catalog import sync_directory
from tiers.layout import BLOCK_BYTES

logger = logging.getLogger(__name__)

FILE_NAME = "scrub.json"
VERSION = 1
MAX_DAMAGE = 1000
"""So many damaged ranges are kept by name; the rest is counted."""
MAX_FILE_BYTES = 16 << 20

State = Literal["running", "paused", "waiting", "interrupted", "stopped", "finished"]
"""`waiting`: paused by the schedule, outside its hours. `interrupted`: the pool was closed, or died, under it."""


@dataclass
class Damage:
    """A damaged range. `kind` says of what: `data`, `map` (a map page: everything below it), `header` (no volume)."""

    kind: str
    volume: str | None
    offset: int
    length: int
    device: str
    device_offset: int
    blocks: int
    reason: str

    def joins(self, other: "Damage") -> bool:
        """Whether `other` goes on where this ends."""
        return (
            self.volume is not None
            and self.offset + self.length == other.offset
            and (self.kind, self.volume, self.device, self.reason)
            == (other.kind, other.volume, other.device, other.reason)
        )

    def holds(self, other: "Damage") -> bool:
        """Whether `other` is a part of this."""
        if (self.kind, self.volume, self.device) != (other.kind, other.volume, other.device):
            return False
        if self.volume is None:
            return self.device_offset == other.device_offset
        return self.offset <= other.offset and other.offset + other.length <= self.offset + self.length

    def sentence(self) -> str:
        """For the log and for people."""
        where = f"on {self.device} at {self.device_offset}"
        if self.volume is None:
            return f"{where}: {self.reason}"
        what = "the data" if self.kind == "data" else "the map"
        return f"{self.volume} bytes {self.offset}-{self.offset + self.length - 1}: {what} {where} {self.reason}"


@dataclass
class DeviceRun:
    """How far a scrub is on one device: segments at places below `position` are done."""

    position: int = 0
    partial_bytes: int = 0
    """Of `done_bytes`: read of the segment at `position`, which a resumed scrub reads from its beginning."""
    done_bytes: int = 0
    left_bytes: int = 0
    errors: int = 0
    repaired: int = 0
    """Damaged blocks that were had from another copy; they are no errors."""


@dataclass
class Run:
    """The newest scrub. Segments with an id of `limit` or above were opened after it started."""

    state: State
    scheduled: bool
    started_at: float
    limit: int
    rate: int | None = None
    """Bytes a second that were asked for; None: as the settings say."""
    finished_at: float | None = None
    active_s: float = 0.0
    devices: dict[int, DeviceRun] = field(default_factory=dict)
    damage: list[Damage] = field(default_factory=list)
    damage_omitted: int = 0
    gaps: list[tuple[int, int, int]] = field(default_factory=list)
    """(segment id, first slot, end): slots whose headers are damaged, to be looked for in the map at the end."""

    @property
    def done_bytes(self) -> int:
        """Read so far, over all devices."""
        return sum(device.done_bytes for device in self.devices.values())

    @property
    def errors(self) -> int:
        """Damaged blocks, pages and headers found so far, over all devices."""
        return sum(device.errors for device in self.devices.values())

    @property
    def repaired(self) -> int:
        """Damaged blocks that were had from another copy, over all devices."""
        return sum(device.repaired for device in self.devices.values())

    def mended(self, volume: str, offset: int, length: int, index_of: Callable[[str], int | None]) -> int:
        """Blocks of a volume that are listed as damaged were written anew; how many. `index_of`: a device by path."""
        stop = offset + length
        kept: list[Damage] = []
        count = 0
        for item in self.damage:
            end = item.offset + item.length
            if item.kind != "data" or item.volume != volume or end <= offset or stop <= item.offset:
                kept.append(item)
                continue
            left = item.blocks
            for first, last in ((item.offset, offset), (stop, end)):
                if first < last:
                    rest = replace(
                        item,
                        offset=first,
                        length=last - first,
                        device_offset=item.device_offset + first - item.offset,
                        blocks=-(-(last - first) // BLOCK_BYTES),
                    )
                    left -= rest.blocks
                    kept.append(rest)
            count += left
            index = index_of(item.device)
            if index in self.devices:
                self.devices[index].errors -= left
                self.devices[index].repaired += left
        self.damage = kept
        return count

    def note(self, damage: Damage) -> bool:
        """Remember a damaged range, joined to its neighbour; False if there was no room for its name."""
        for known in reversed(self.damage[-16:]):
            if known.joins(damage):
                known.length += damage.length
                known.blocks += damage.blocks
                return True
        if len(self.damage) >= MAX_DAMAGE:
            self.damage_omitted += 1
            return False
        self.damage.append(damage)
        return True


@dataclass
class Result:
    """The last scrub that came to its end. Seconds since 1970; `active_s` without the pauses."""

    started_at: float
    finished_at: float
    active_s: float
    done_bytes: int
    errors: int
    repaired: int = 0


@dataclass
class History:
    """All that is remembered."""

    since: float
    run: Run | None = None
    last: Result | None = None


class ScrubFile:
    """The file of one pool. Blocking: for worker threads."""

    def __init__(self, directory: Path, pool_uuid: bytes) -> None:
        self._path = directory / FILE_NAME
        self._pool = pool_uuid.hex()

    def load(self) -> History | None:
        """What is remembered; None if nothing can be."""
        try:
            with self._path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("%s can't be read (%s): no earlier scrub is known of", self._path, error.strerror)
            return None
        try:
            return decode(data, self._pool)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            logger.warning("%s is no use (%s): no earlier scrub is known of", self._path, error or type(error).__name__)
            return None

    def save(self, text: bytes) -> None:
        """Replace the file; durable when this returns. Raises OSError."""
        replace_file(self._path, text)

    def encode(self, history: History) -> bytes:
        """The file's content."""
        run = history.run
        body = {
            "version": VERSION,
            "pool": self._pool,
            "since": history.since,
            # Not `asdict`: with a thousand damaged ranges it would hold the loop up for ten milliseconds.
            "run": run
            and vars(run)
            | {
                "devices": {str(index): vars(device) for index, device in run.devices.items()},
                "damage": [vars(damage) for damage in run.damage],
            },
            "last": history.last and vars(history.last),
        }
        return json.dumps(body).encode() + b"\n"


def replace_file(path: Path, text: bytes) -> None:
    """Put a file in place of another, or of none; durable when this returns. Blocks; raises OSError."""
    beside = path.with_suffix(".new")
    try:
        with beside.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def decode(data: bytes, pool: str) -> History:
    """Judge a file's content. Raises ValueError, TypeError or KeyError."""
    if len(data) > MAX_FILE_BYTES:
        raise ValueError("it is too large")
    body = json.loads(data)
    if body["version"] != VERSION:
        raise ValueError(f"it has version {body['version']!r}, this release reads {VERSION}")
    if body["pool"] != pool:
        raise ValueError("it is another pool's")
    last = None if body["last"] is None else Result(**body["last"])
    history = History(float(body["since"]), None if body["run"] is None else _run(body["run"]), last)
    if last is not None:
        _require_numbers(last.started_at, last.finished_at, last.active_s, last.done_bytes, last.errors, last.repaired)
    return history


def _run(body: Any) -> Run:
    devices = {int(index): DeviceRun(**device) for index, device in body.pop("devices").items()}
    damage = [Damage(**item) for item in body.pop("damage")]
    gaps = [(int(segment), int(first), int(end)) for segment, first, end in body.pop("gaps")]
    run = Run(**body, devices=devices, damage=damage, gaps=gaps)
    if run.state not in get_args(State) or not isinstance(run.scheduled, bool):
        raise ValueError(f"it has the state {run.state!r}")
    _require_numbers(run.started_at, run.limit, run.rate or 0, run.finished_at or 0, run.active_s, run.damage_omitted)
    for device in devices.values():
        _require_numbers(*vars(device).values())
    for item in damage:
        _require_numbers(item.offset, item.length, item.device_offset, item.blocks)
        if not all(isinstance(text, str) for text in (item.kind, item.device, item.reason, item.volume or "")):
            raise ValueError("it names damage that is none")
    return run


def _require_numbers(*values: object) -> None:
    for value in values:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1 << 63:
            raise ValueError(f"it has {value!r} for a number")
