"""A backup from beginning to end: which snapshot, on what base, into what, and what goes afterwards.

Into a directory a backup takes these steps, and a crash between any two of them leaves what the next one copes with:

1. Take a snapshot of the volume, unless one was named. (Left behind: a snapshot `backup-TIME` without a file.)
2. Write the file under a temporary name, sync, rename. (A temporary file; from here on the backup is there.)
3. Drop the snapshots `backup-TIME` that this directory has a file of, but the newest: the next increment's base.
4. Remove the files of chains that are not to be kept any more, those first that nothing hangs on.

A snapshot that a person has named is never dropped.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import trio

from terrace.backup.chain import DEFAULT_INCREMENTS, Catalogue, decide, expired, file_name
from terrace.backup.directory import free_path, locked, read_directory, remove, remove_leftovers
from terrace.backup.errors import BackupError
from terrace.backup.files import write_file
from terrace.backup.stream import Header, Snapshot, Totals, new_stream_id
from terrace.backup.write import DEFAULT_LEVEL, Progress, Sink, Source, write_stream

_AUTOMATIC = re.compile(r"backup-[0-9]{8}T[0-9]{6}Z(-[0-9]+)?")
_TIDY_S = 10.0
"""How long dropping a snapshot may take behind a backup that failed."""


class Origin(Protocol):
    """A volume with its snapshots, where backups come from. Raises OSError with a sentence."""

    @property
    def pool(self) -> str: ...

    @property
    def volume(self) -> str: ...

    @property
    def volume_id(self) -> str:
        """Never another volume's, whatever the name."""

    async def snapshots(self) -> Sequence[Snapshot]: ...

    async def take(self, name: str) -> Snapshot: ...

    async def drop(self, name: str) -> None: ...

    def open(self, snapshot: Snapshot, base: Snapshot | None) -> AbstractAsyncContextManager[Source]:
        """A snapshot to be read, described against `base` if there is one."""


def find(snapshots: Sequence[Snapshot], name: str, volume: str) -> Snapshot:
    """The snapshot of that name. Raises BackupError that says which there are."""
    for snapshot in snapshots:
        if snapshot.name == name:
            return snapshot
    names = [snapshot.name for snapshot in snapshots]
    shown = ", ".join(names[-5:]) or "none"
    what = shown if len(names) <= 5 else f"{len(names)}, the newest: {shown}"
    raise BackupError(errno.ENOENT, f"{volume} has no snapshot {name} (it has {what}); name one that it has")


async def back_up(
    origin: Origin,
    snapshot: Snapshot,
    base: Snapshot | None,
    sink: Sink,
    *,
    level: int = DEFAULT_LEVEL,
    progress: Progress | None = None,
) -> tuple[Header, Totals]:
    """Write one stream. Raises BackupError, before anything is written if the two snapshots can't be used."""
    if base is not None and base.taken_us >= snapshot.taken_us:
        raise BackupError(
            errno.EINVAL,
            f"{base.name} is no older than {snapshot.name}, so that can't be based on it; --since takes an older one",
        )
    async with origin.open(snapshot, base) as source:
        header = Header(
            *(origin.pool, origin.volume, origin.volume_id, snapshot, base, source.size_bytes),
            *(int(time.time() * 1e6), _tool(), new_stream_id()),
        )
        return header, await write_stream(source, sink, header, level=level, progress=progress)


def _tool() -> str:
    try:
        return f"terrace {version('terrace')}"
    except PackageNotFoundError:
        return "terrace"


@dataclass(frozen=True)
class Outcome:
    """What a backup into a directory has done. `why`: the reason for a full one. `problems` are not its own."""

    path: Path
    header: Header
    totals: Totals
    why: str
    removed: Sequence[Path]
    problems: Sequence[str]


async def back_up_to_directory(
    origin: Origin,
    directory: Path,
    name: str | None = None,
    *,
    keep: int | None = None,
    increments: int = DEFAULT_INCREMENTS,
    full: bool = False,
    level: int = DEFAULT_LEVEL,
    progress: Progress | None = None,
) -> Outcome:
    """Back up the snapshot `name`, or a new one, as the next file of a directory; then remove what isn't kept.

    `keep`: how many chains, None: all; `increments`: how many a chain may have. Raises BackupError.
    """
    with locked(directory):
        await trio.to_thread.run_sync(remove_leftovers, directory)
        before = await trio.to_thread.run_sync(read_directory, directory)
        snapshots = await origin.snapshots()
        volume = f"{origin.pool}/{origin.volume}"
        snapshot = find(snapshots, name, volume) if name is not None else await origin.take(_new_name(snapshots))
        try:
            there = before.catalogue.restorable((origin.volume_id, snapshot.id))
            if there is not None and not full:
                raise BackupError(errno.EEXIST, f"{there.path} is a backup of {volume}@{snapshot.name} already")
            kept = {one.id for one in snapshots}
            chosen = decide(before.catalogue, origin.volume_id, snapshot, kept, increments, full=full)
            base = chosen.base.header.snapshot if chosen.base is not None else None
            if base is not None:
                # Its name may have changed since; the identity is what counts.
                base = next(one for one in snapshots if one.id == base.id)
            # The header's own time is not known yet, and its name doesn't need it.
            path = free_path(directory, file_name(origin.volume, snapshot, full=base is None))

            async def write(sink: Sink) -> tuple[Header, Totals]:
                return await back_up(origin, snapshot, base, sink, level=level, progress=progress)

            header, totals = await write_file(path, write)
        except BaseException:
            if name is None:
                await _tidy(origin, snapshot)
            raise
        after = await trio.to_thread.run_sync(read_directory, directory)
        problems = [*after.problems, *await _drop_automatic(origin, after.catalogue, snapshots, snapshot)]
        gone = expired(after.catalogue, origin.volume_id, keep) if keep is not None else []
        await trio.to_thread.run_sync(remove, directory, gone)
        return Outcome(path, header, totals, chosen.why, [one.path for one in gone], problems)


def _new_name(snapshots: Sequence[Snapshot]) -> str:
    stem = time.strftime("backup-%Y%m%dT%H%M%SZ", time.gmtime())
    taken = {snapshot.name for snapshot in snapshots}
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    return name


async def _tidy(origin: Origin, snapshot: Snapshot) -> None:
    """Drop the snapshot that was taken for a backup that failed, as far as that can be: the failure is what counts."""
    with trio.move_on_after(_TIDY_S, shield=True):
        try:
            await origin.drop(snapshot.name)
        except OSError:
            return


async def _drop_automatic(
    origin: Origin, catalogue: Catalogue, snapshots: Sequence[Snapshot], newest: Snapshot
) -> list[str]:
    """Drop the snapshots of earlier backups into this directory; the sentences of those that can't be."""
    problems = []
    for one in snapshots:
        mine = _AUTOMATIC.fullmatch(one.name) and catalogue.restorable((origin.volume_id, one.id)) is not None
        if mine and one.taken_us < newest.taken_us:
            try:
                await origin.drop(one.name)
            except OSError as error:
                problems.append(f"snapshot {one.name} of an earlier backup can't be deleted: {error}")
    return problems
