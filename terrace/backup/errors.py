"""What may be wrong with a backup: sentences that name the stream, the byte and the next step."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from enum import Enum


class BackupError(OSError):
    """A backup or a restore can't go on; prints as its sentence alone."""

    def __str__(self) -> str:
        return str(self.args[1])


class Fault(Enum):
    """How a stream can be bad, and what to do about it."""

    EMPTY = "name a file that terrace backup has written"
    NOT_A_BACKUP = "name a file that terrace backup has written"
    NEWER = "read it with the release that wrote it, or a later one"
    CUT_SHORT = "copy it again from where it is complete, or make the backup again"
    DAMAGED = "use another copy of it, or make the backup again"
    TRAILING = "cut it off there if a copy appended it, or use another copy"


class BadStreamError(BackupError):
    """The bytes are no stream that may be used. `offset` is the byte where that shows."""

    def __init__(self, stream: str, fault: Fault, offset: int, why: str) -> None:
        super().__init__(errno.EBADMSG, f"{stream} {why}; {fault.value}")
        self.stream = stream
        self.fault = fault
        self.offset = offset


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Around a nursery whose tasks fail with an OSError: that comes out itself, not in a group. The first, if several.

    A group in which something else is (a bug, Cancelled from outside) stays as it is.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        leaves = _leaves(group)
        if not all(isinstance(leaf, OSError | KeyboardInterrupt) for leaf in leaves):
            raise
        raise next((leaf for leaf in leaves if isinstance(leaf, KeyboardInterrupt)), leaves[0]) from None


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
