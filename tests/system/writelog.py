"""Power cuts on real files, in the manner of dm-log-writes and ALICE: record what a pool writes, then rebuild what a
crash at any moment may have left.

While a pool runs, a `WriteLog` notes in order: each write of each device when it is called and when it has returned,
each flush of a device that has succeeded and which writes it covers, each commit of the catalog with a copy of its
files, and what the load was told (operations begun and returned, flushes returned). `crashes` walks that log. At each
point the device holds every write that a completed flush covers, and of the others any subset, torn at 512 bytes.

SQLite's commit counts as atomic: it is there, or it isn't, and while it runs it may be either. That it survives a
power cut when it returns is SQLite's promise (synchronous=FULL), which is not tested here.
"""

from __future__ import annotations

import contextlib
import copy
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import tiers.device
import tiers.host
import tiers.newdevices
from tests.simulation.oracle import Model, Op
from tiers import DeviceSpec, Pool
from tiers.catalog import CATALOG_NAME, Catalog, Change
from tiers.device import Buffer, FileDevice
from tiers.layout import LABEL_AREA_BYTES

SECTOR = 512
CHUNK = 64 << 10
SEGMENT_BYTES = 128 << 10


@dataclass(eq=False)
class Write:
    """A write of a device, noted when it is called."""

    path: str
    offset: int
    data: bytes
    returned: bool = False


@dataclass(eq=False)
class Flushed:
    """A flush of a device has succeeded: these writes had returned before it was called."""

    path: str
    covered: list[Write]


@dataclass(eq=False)
class CommitBegun:
    """From here on the catalog may be the next one."""


@dataclass(eq=False)
class Committed:
    """The catalog's files after a commit."""

    files: dict[str, bytes]


@dataclass(eq=False)
class Told:
    """What the load knows: `apply` changes the models of the volumes."""

    what: str
    volume: str = ""
    op: Op | None = None
    size: int = 0
    marks: dict[str, int] = field(default_factory=dict)


Entry = Write | Flushed | CommitBegun | Committed | Told


class WriteLog:
    """The log of one pool's life, or of several in a row."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.entries: list[Entry] = []
        self.start: dict[str, bytes] = {}
        """What the devices held when recording began."""
        self.lying = False
        """For the proof that this finds something: flushes are noted as if they covered nothing."""

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Let every pool that is opened inside be noted."""
        log = self

        class LoggedDevice(FileDevice):
            def _pwritev(self, offset: int, buffers: Sequence[Buffer], expected: int) -> None:
                entry = Write(self.path, offset, b"".join(bytes(buffer) for buffer in buffers))
                log.entries.append(entry)
                super()._pwritev(offset, buffers, expected)
                entry.returned = True

            async def sync(self) -> None:
                covered = [
                    entry
                    for entry in log.entries
                    if isinstance(entry, Write) and entry.path == self.path and entry.returned
                ]
                await super().sync()
                log.entries.append(Flushed(self.path, [] if log.lying else covered))

        class LoggedCatalog(Catalog):
            def _commit(self, change: Change) -> None:
                log.entries.append(CommitBegun())
                super()._commit(change)
                log.entries.append(Committed(catalog_files(log.home)))

        with (
            mock.patch.object(tiers.device, "FileDevice", LoggedDevice),
            mock.patch.object(tiers.host, "Catalog", LoggedCatalog),
        ):
            yield

    def note(self, what: str, volume: str = "", **more: Any) -> None:
        """The load tells what it begins, or what it was answered."""
        self.entries.append(Told(what, volume, **more))


def catalog_files(home: Path) -> dict[str, bytes]:
    """The catalog and its write-ahead log."""
    names = (CATALOG_NAME, CATALOG_NAME + "-wal")
    return {name: (home / name).read_bytes() for name in names if (home / name).exists()}


async def create_small_pool(home: Path, sizes: dict[Path, tuple[str, int]]) -> None:
    """A pool with segments of 128 KiB, on which everything happens often. `sizes`: tier and number of segments."""
    specs = [
        DeviceSpec(path, tier, LABEL_AREA_BYTES + segments * SEGMENT_BYTES)  # type: ignore[arg-type]
        for path, (tier, segments) in sizes.items()
    ]
    with (
        mock.patch.object(tiers.newdevices, "MIN_DEVICE_BYTES", 1),
        mock.patch.object(tiers.newdevices, "segment_bytes_for", lambda size: SEGMENT_BYTES),
    ):
        await Pool.create(home, "cut", specs)


# -- what a crash may leave --------------------------------------------------------------------------------------------


class Medium:
    """One device at a point of the log: what is durable, and the writes that may or may not be."""

    def __init__(self, path: Path, start: bytes) -> None:
        self.path = path
        self.durable = bytearray(start)
        self.pending: list[Write] = []
        self._used = {at for at in range(0, len(start), CHUNK) if any(start[at : at + CHUNK])}

    def flushed(self, covered: Sequence[Write]) -> None:
        """These writes are on the medium for good."""
        gone = set(map(id, covered))
        for write in self.pending:
            if id(write) in gone:
                end = write.offset + len(write.data)
                self.durable[write.offset : end] = write.data
                self._used.update(range(write.offset // CHUNK * CHUNK, end, CHUNK))
        self.pending = [write for write in self.pending if id(write) not in gone]

    def build(self, rng: random.Random, share: float, tear: float) -> str:
        """Make the file what a power cut may leave: each pending write stays with chance `share`, or in part."""
        kept = torn = 0
        with self.path.open("wb") as file:
            file.truncate(len(self.durable))
            for at in self._used:
                file.seek(at)
                file.write(self.durable[at : at + CHUNK])
            for write in self.pending:  # in order: of two on one place the later one wins, if it stays
                if rng.random() < tear:
                    torn += 1
                    for at in range(0, len(write.data), SECTOR):
                        if rng.random() < 0.5:
                            file.seek(write.offset + at)
                            file.write(write.data[at : at + SECTOR])
                elif rng.random() < share:
                    kept += 1
                    file.seek(write.offset)
                    file.write(write.data)
        return f"{self.path.name}: {kept} and parts of {torn} of {len(self.pending)} unflushed writes"


@dataclass
class Crash:
    """A moment of the log: the media, which catalogs there may be, and what the volumes may hold."""

    at: int
    home: Path
    media: list[Medium]
    catalogs: list[dict[str, bytes]]
    models: dict[str, Model]
    uncertain: dict[str, Model]
    """Volumes whose creation or deletion was under way."""

    def build(self, rng: random.Random, choices: Sequence[tuple[float, float]]) -> str:
        """Write one of the images that this crash may leave to the pool's own places; return what was chosen.

        `choices`: (share of the unflushed writes that stay, share that is torn); devices may fare differently.
        """
        which = rng.randrange(len(self.catalogs))
        shutil.rmtree(self.home)
        self.home.mkdir()
        for name, data in self.catalogs[which].items():
            (self.home / name).write_bytes(data)
        same = rng.choice(choices) if rng.random() < 0.6 else None
        parts = [medium.build(rng, *(same or rng.choice(choices))) for medium in self.media]
        return f"crash before entry {self.at}, catalog {which + 1} of {len(self.catalogs)}; " + "; ".join(parts)

    def judged(self) -> tuple[dict[str, Model], dict[str, Model]]:
        """The models, to be judged without changing this crash."""
        return copy.deepcopy((self.models, self.uncertain))


def crashes(log: WriteLog, first: dict[str, bytes]) -> Iterator[Crash]:
    """Every crash between two entries; each is valid until the next is asked for. `first`: the catalog at the start."""
    media = {path: Medium(Path(path), data) for path, data in log.start.items()}
    catalogs = [first]
    following = [entry.files for entry in log.entries if isinstance(entry, Committed)]
    models: dict[str, Model] = {}
    uncertain: dict[str, Model] = {}
    for at, entry in enumerate([*log.entries, None]):
        yield Crash(at, log.home, list(media.values()), catalogs, models, uncertain)
        if isinstance(entry, Write):
            media[entry.path].pending.append(entry)
        elif isinstance(entry, Flushed):
            media[entry.path].flushed(entry.covered)
        elif isinstance(entry, CommitBegun) and following:
            catalogs = [catalogs[0], following[0]]
        elif isinstance(entry, Committed):
            catalogs = [following.pop(0)]
        elif isinstance(entry, Told):
            _hear(entry, models, uncertain)


def _hear(told: Told, models: dict[str, Model], uncertain: dict[str, Model]) -> None:
    name = told.volume
    if told.what == "creating":
        uncertain[name] = Model(told.size)
    elif told.what == "created":
        models[name] = uncertain.pop(name)
    elif told.what == "deleting":
        uncertain[name] = models.pop(name)
    elif told.what == "deleted":
        del uncertain[name]
    elif told.what == "begun":
        models[name].in_flight = told.op
    elif told.what == "returned":
        model = models[name]
        assert model.in_flight is told.op and told.op is not None
        model.in_flight = None
        model.returned(told.op)
    else:
        assert told.what == "flushed"
        for volume, mark in told.marks.items():
            if volume in models:
                models[volume].flushed(mark)
