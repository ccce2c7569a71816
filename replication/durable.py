"""Small files that are replaced whole: after a crash there is the old one or the new one. All of it blocks."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["make_directory", "remove_file", "replace_file", "sync_directory"]


def replace_file(path: Path, data: bytes) -> None:
    """Durable on return, and only its owner's to read."""
    beside = path.with_suffix(".new")
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_directory(path.parent)


def remove_file(path: Path) -> None:
    """Durable on return. One that isn't there is no error: who removed it may have crashed before that was durable."""
    path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        sync_directory(path.parent)


def make_directory(path: Path) -> None:
    """Durable on return, also if it is there already: who made it may have crashed before that."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """What was made, renamed and removed in it is durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
