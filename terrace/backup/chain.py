"""What a directory of backups amounts to: which increments hang on which full backup, what comes next, what may go.

Pure: everything is worked out from the headers of the files that are there, so no index can disagree with them. An
increment hangs on a backup of the snapshot that is its base. Where there are several of that snapshot it hangs on
the one with the fewest increments below it; so each backup has one path down to a full one, or a gap in it.
"""

from __future__ import annotations

import errno
import re
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from terrace.backup.errors import BackupError
from terrace.backup.stream import Header, Snapshot, Totals, time_text

FULL_SUFFIX = ".full.tbk"
INCREMENT_SUFFIX = ".inc.tbk"
SUFFIXES = (FULL_SUFFIX, INCREMENT_SUFFIX)
DEFAULT_INCREMENTS = 30


@dataclass(frozen=True, slots=True)
class Backup:
    """A file of a directory. `totals` are None if its end isn't there: it is cut short, or still being copied."""

    path: Path
    header: Header
    totals: Totals | None
    file_bytes: int

    @property
    def key(self) -> Key:
        """Which version of which volume it is."""
        return self.header.volume_id, self.header.snapshot.id


@dataclass(frozen=True)
class Gap:
    """A backup that can't be restored, since what it is based on is not there."""

    backup: Backup
    missing: Snapshot

    def __str__(self) -> str:
        base = self.missing
        return (
            f"{self.backup.path.name} needs a backup of {self.backup.header.volume}@{base.name} (id {base.id}, of "
            f"{time_text(base.taken_us)}), which is not there"
        )


Key = tuple[str, str]
"""Id of a volume, id of a snapshot of it."""


@dataclass(frozen=True)
class Catalogue:
    """All backups of a directory, and how they hang together. Files without an end hang nowhere."""

    backups: Sequence[Backup]

    @cached_property
    def whole(self) -> Sequence[Backup]:
        """Those whose end is there, by the time of their snapshots."""
        return sorted((backup for backup in self.backups if backup.totals is not None), key=_age)

    @cached_property
    def _standing(self) -> Mapping[Key, Backup]:
        """For each snapshot that can be restored the backup that increments on it hang on: breadth first from the
        full ones, so no circle of bases is ever walked."""
        by_base: dict[Key, list[Backup]] = {}
        standing: dict[Key, Backup] = {}
        for backup in sorted(self.whole, key=lambda backup: backup.header.begun_us, reverse=True):
            if backup.header.base is None:
                standing.setdefault(backup.key, backup)
            else:
                by_base.setdefault(_base_key(backup), []).append(backup)
        reached = deque(standing)
        while reached:
            for backup in by_base.get(reached.popleft(), ()):
                if backup.key not in standing:
                    standing[backup.key] = backup
                    reached.append(backup.key)
        return standing

    def restorable(self, key: Key) -> Backup | None:
        """The backup of a snapshot to restore it with, if there is one without a gap."""
        return self._standing.get(key)

    def path(self, backup: Backup) -> list[Backup] | Gap:
        """What has to be restored for it, in order and with itself; or why that can't be."""
        path, seen = [backup], {backup.path}
        while (base := path[-1].header.base) is not None:
            parent = self._standing.get(_base_key(path[-1])) or self._fallen.get(_base_key(path[-1]))
            if parent is None or parent.path in seen:
                return Gap(path[-1], base)
            path.append(parent)
            seen.add(parent.path)
        return path[::-1]

    @cached_property
    def _fallen(self) -> Mapping[Key, Backup]:
        """Backups with a gap below them, by what they are of: the way to say what is missing."""
        return {backup.key: backup for backup in self.whole if backup.key not in self._standing}

    def chains(self) -> list[list[Backup]]:
        """Each full backup with all that hangs on it, by age; oldest chain first."""
        chains: dict[Path, list[Backup]] = {b.path: [b] for b in self.whole if b.header.base is None}
        for backup in self.whole:
            if backup.header.base is not None and not isinstance(path := self.path(backup), Gap):
                chains[path[0].path].append(backup)
        return list(chains.values())

    def gaps(self) -> list[Gap]:
        """What can't be restored, each with what is missing."""
        found = (self.path(backup) for backup in self.whole)
        return [path for path in found if isinstance(path, Gap)]

    def of_volume(self, volume_id: str) -> Catalogue:
        return Catalogue([backup for backup in self.backups if backup.header.volume_id == volume_id])


def _age(backup: Backup) -> tuple[int, int, str]:
    return backup.header.snapshot.taken_us, backup.header.begun_us, backup.path.name


def _base_key(backup: Backup) -> Key:
    assert backup.header.base is not None
    return backup.header.volume_id, backup.header.base.id


# -- what comes next ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Next:
    """The backup to be made: an increment on `base`, or a full one. `why` completes "a full backup, because ..."."""

    base: Backup | None
    why: str


def decide(
    catalogue: Catalogue, volume_id: str, snapshot: Snapshot, kept: Collection[str], increments: int, *, full: bool
) -> Next:
    """What the backup of `snapshot` becomes. `kept`: ids of the snapshots that the volume still has; `increments`: how
    many a chain may have."""
    if full:
        return Next(None, "that was asked for")
    mine = catalogue.of_volume(volume_id)
    older = [backup for backup in mine.whole if backup.header.snapshot.taken_us < snapshot.taken_us]
    if not older:
        return Next(
            None, "there is none of this volume yet" if not mine.whole else "there is none of an older snapshot"
        )
    newest = older[-1]
    base = mine.restorable(newest.key)
    if base is None:
        return Next(None, str(mine.path(newest)))
    path = mine.path(base)
    assert not isinstance(path, Gap)
    if len(path) > increments:
        there = len(path) - 1
        return Next(None, f"the last one has {there} increment{'s' * (there != 1)}")
    if base.header.snapshot.id not in kept:
        return Next(None, f"the volume has no snapshot {base.header.snapshot.name} (the last one's) any more")
    return Next(base, "")


# -- what may go -------------------------------------------------------------------------------------------------------


def expired(catalogue: Catalogue, volume_id: str, keep: int) -> list[Backup]:
    """The files of all but the newest `keep` chains of a volume, newest first: so none is there without its base.

    A chain is as new as its newest backup. Files that hang nowhere stay: what is wrong with them is for people to see.
    """
    assert keep >= 1
    mine = catalogue.of_volume(volume_id)
    chains = sorted(mine.chains(), key=lambda chain: _age(chain[-1]))
    gone = [backup for chain in chains[:-keep] for backup in chain]
    # Leaves first, so that a crash in between leaves no gap. An increment may be older than its base by the clock.
    depths = {backup.path: len(path) for backup in gone if not isinstance(path := mine.path(backup), Gap)}
    return sorted(gone, key=lambda backup: -depths[backup.path])


# -- what to restore ---------------------------------------------------------------------------------------------------


def choose(catalogue: Catalogue, directory: Path, volume: str | None, at: str | None) -> list[Backup]:
    """The files that restore a volume's newest snapshot, or the one named `at`. Raises BackupError."""
    matching = [backup for backup in catalogue.backups if volume in (None, backup.header.volume, _full_name(backup))]
    whole = sorted((backup for backup in matching if backup.totals is not None), key=_age)
    if not whole:
        what = f"backup of {volume}" if volume is not None else "whole backup"
        raise BackupError(errno.ENOENT, f"{directory} has no {what}; terrace backup list {directory} shows what it has")
    if len({backup.header.volume_id for backup in whole}) > 1:
        names = ", ".join(sorted({_full_name(backup) for backup in whole}))
        raise BackupError(
            errno.EINVAL,
            f"{directory} has backups of several volumes ({names}); say which with --volume, or name files",
        )
    chosen = [backup for backup in whole if at in (None, backup.header.snapshot.name, backup.header.snapshot.id)]
    if not chosen:
        raise BackupError(
            errno.ENOENT, f"{directory} has no backup of snapshot {at}; terrace backup list {directory} shows them"
        )
    if at is not None and len({backup.key for backup in chosen}) > 1:
        ids = ", ".join(sorted({backup.header.snapshot.id for backup in chosen}))
        raise BackupError(errno.EINVAL, f"{directory} has several snapshots called {at}; say which by its id: {ids}")
    newer = [backup for backup in matching if backup.totals is None and _age(backup) > _age(chosen[-1])]
    if newer and at is None:
        cut = max(newer, key=_age).path
        raise BackupError(
            errno.EBADMSG,
            f"{cut} has no end, so the newest snapshot can't be restored; put a whole copy there, or "
            f"restore an older snapshot with --at {chosen[-1].header.snapshot.name}",
        )
    path = catalogue.path(catalogue.restorable(chosen[-1].key) or chosen[-1])
    if isinstance(path, Gap):
        raise BackupError(
            errno.ENOENT, f"{directory}: {path}; restore another snapshot with --at, or put the file back"
        )
    return path


def _full_name(backup: Backup) -> str:
    return f"{backup.header.pool}/{backup.header.volume}"


_UNNAMEABLE = re.compile(r"[^A-Za-z0-9._-]")


def file_name(volume: str, snapshot: Snapshot, *, full: bool) -> str:
    """`vol-20261129T194106Z-monday.full.tbk`."""
    taken = re.sub(r"[-: ]|UTC", "", time_text(snapshot.taken_us))
    parts = (volume, f"{taken[:8]}T{taken[8:]}Z", snapshot.name)
    return "-".join(_UNNAMEABLE.sub("_", part)[:64] for part in parts) + (FULL_SUFFIX if full else INCREMENT_SUFFIX)
