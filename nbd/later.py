"""What one connection has handed to an export that answers later (``nbd.export.AcknowledgesLater``).

A batch is all writes, or all trims, of one pass. It has no task: when the export is done with it, it calls
``acknowledged``, from whatever task that happens in, and the connection answers from there.

A connection that ends before its batches are acknowledged abandons them: what the export says from then on is not
listened to. They still take effect, in the order in which they were handed over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import trio

from nbd.export import AcknowledgesLater

__all__ = ["Batch", "Later"]


@dataclass(slots=True, eq=False)
class Batch:
    """Requests that went to the export with one call. Of their data nothing is kept."""

    command: int
    cookies: list[int]
    asked: list[tuple[int, None]]
    """The offset of each, where replies echo it; else empty."""
    fua: list[int]
    """Indices of those that want a flush, too."""
    length: int
    """Bytes of their payload."""


class Later:
    """See above. All of it belongs to the trio thread."""

    def __init__(self, export: AcknowledgesLater, acknowledged: Callable[[Batch, OSError | None], None]) -> None:
        self._export = export
        self._acknowledged = acknowledged
        self._batches: set[Batch] = set()
        self._over = False
        self._none_left = trio.Event()

    def write(self, writes: list[tuple[int, memoryview]], batch: Batch) -> bool:
        """False, and OSError: nothing happened. See ``AcknowledgesLater.write_later``."""
        return self._begun(batch, self._export.write_later(writes, partial(self._done, batch)))

    def trim(self, ranges: list[tuple[int, int]], batch: Batch) -> bool:
        """The same for trims."""
        return self._begun(batch, self._export.trim_later(ranges, partial(self._done, batch)))

    async def write_and_wait(self, writes: list[tuple[int, memoryview]]) -> bool:
        """Write, in a task that has nothing else to do. False: nothing happened. Raises OSError."""
        done = trio.Event()
        errors: list[OSError] = []

        def acknowledged(error: OSError | None) -> None:
            if error is not None:
                errors.append(error)
            done.set()

        if not self._export.write_later(writes, acknowledged):
            return False
        await done.wait()
        if errors:
            raise errors[0]
        return True

    def _begun(self, batch: Batch, accepted: bool) -> bool:
        if accepted:
            self._batches.add(batch)
        return accepted

    def _done(self, batch: Batch, error: OSError | None) -> None:
        if self._over:
            return
        assert batch in self._batches, "acknowledged twice, or within the call"
        self._batches.remove(batch)
        self._acknowledged(batch, error)
        if not self._batches:
            self._none_left.set()

    def __bool__(self) -> bool:
        """Whether any isn't acknowledged yet."""
        return bool(self._batches)

    async def none_left(self) -> None:
        """Wait until all are acknowledged, when no more are handed over."""
        while self._batches:
            self._none_left = trio.Event()
            await self._none_left.wait()

    def abandon(self) -> int:
        """Listen to none of them any more; returns how many requests they have."""
        self._over = True
        return sum(len(batch.cookies) for batch in self._batches)
