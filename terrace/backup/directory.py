"""A directory that chains of backups are kept in: reading what is there, and changing it one durable step at a time.

There is no index: what is there is read from the files' headers and their end records each time. One backup at a time
writes a directory, which its lock sees to. A crash leaves whole files under their names, and temporary ones that the
next backup removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from terrace.backup.chain import SUFFIXES, Backup, Catalogue
from terrace.backup.errors import BackupError
from terrace.backup.files import PART_SUFFIX
from terrace.backup.stream import END_BYTES, RECORD_BYTES, StreamReader, read_end
from tiers.catalog import sync_directory


@dataclass(frozen=True)
class Listing:
    """What is in a directory; `unreadable` are sentences about files that are no backups though they are named so."""

    catalogue: Catalogue
    unreadable: Sequence[str]

    @property
    def problems(self) -> list[str]:
        """What is wrong with single files, as far as their headers and ends tell."""
        return [
            *self.unreadable,
            *(
                f"{one.path} has no end: it is cut short, or still being copied; terrace backup verify tells where"
                for one in self.catalogue.backups
                if one.totals is None
            ),
        ]


def read_directory(directory: Path) -> Listing:
    """The backups of a directory, by header and end record. Blocks; raises BackupError if it can't be read."""
    backups, unreadable = [], []
    try:
        paths = sorted(p for p in directory.iterdir() if p.name.endswith(SUFFIXES) and not p.name.startswith("."))
    except OSError as error:
        raise BackupError(
            error.errno or errno.EIO, f"{directory} can't be read: {error.strerror}; name a directory of backups"
        ) from None
    for path in paths:
        try:
            backups.append(read_backup(path))
        except OSError as error:
            unreadable.append(str(error))
    return Listing(Catalogue(backups), unreadable)


def read_backup(path: Path) -> Backup:
    """One file, by its first and last bytes. Blocks; raises BackupError."""
    with open_backup(path) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        header = StreamReader(file, str(path)).header
        tail = os.pread(file.fileno(), RECORD_BYTES + END_BYTES, max(0, file_bytes - RECORD_BYTES - END_BYTES))
        return Backup(path, header, read_end(tail, header, file_bytes), file_bytes)


def open_backup(path: Path) -> FileIO:
    """The file, to be read. Blocks; raises BackupError."""
    try:
        # Unbuffered, so that it can be closed while a read of it that was left behind still waits for a pipe.
        return path.open("rb", buffering=0)
    except OSError as error:
        raise BackupError(
            error.errno or errno.EIO, f"{path} can't be read: {error.strerror}; name a file of terrace backup"
        ) from None


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make the directory where it is missing, and hold it as the only one to write it. Raises BackupError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BackupError(
            error.errno or errno.EIO, f"{directory} can't be used: {error.strerror}; name a directory of yours"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackupError(errno.EBUSY, f"another backup to {directory} runs; wait until it is done") from None
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(directory: Path) -> None:
    """Temporary files of backups that didn't end. Under the lock; blocks."""
    for path in directory.glob(f".*.tbk.*{PART_SUFFIX}"):
        path.unlink(missing_ok=True)


def remove(directory: Path, backups: Sequence[Backup]) -> None:
    """Remove files in this order, durably. Under the lock; blocks."""
    for backup in backups:
        backup.path.unlink(missing_ok=True)
        # One at a time, or a power cut might keep an increment and lose what it needs.
        sync_directory(directory)


def free_path(directory: Path, name: str) -> Path:
    """`name` in the directory, with a number if there is one already. Under the lock."""
    path = directory / name
    stem = next(name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix))
    number = 2
    while path.exists():
        path = directory / f"{stem}-{number}{name[len(stem) :]}"
        number += 1
    return path
