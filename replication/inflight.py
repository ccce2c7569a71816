"""What is in flight: batches that were given to the legs and are not acknowledged yet, by 64 KiB extent.

Three things wait for it. A read that overlaps a batch in flight has perhaps seen it on one leg, and must not be
answered before the batch is on all of them: a fail-over could take back what was read. A copy from leg to leg must be
of what the legs agree on, and is void if a batch touched it since (`Watch`). And a barrier wants nothing in flight.

A batch may be answered with an error and stay in flight (`refuse`): some legs have it, and no record without the others
counts. Whether it is there isn't decided, so whoever would read it fails as it did, until it is.

Who waits, waits for the batches that are there now, not for quiet: later ones don't hold it up.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Final

import trio

from replication.leg import EXTENT_BYTES, Change, Done

EXTENT_SHIFT: Final = EXTENT_BYTES.bit_length() - 1
WIDE_EXTENTS: Final = 64
"""A longer range is remembered as a range: a trim of terabytes has millions of extents."""


def extents_of(offset: int, length: int) -> tuple[int, int]:
    """(first, behind the last) extent that the bytes touch."""
    return offset >> EXTENT_SHIFT, (offset + length + EXTENT_BYTES - 1) >> EXTENT_SHIFT


class Batch:
    """One sequence: counts down the legs that have it. Is the `Done` that they all are given."""

    __slots__ = (
        "_completed",
        "_waiting",
        "began",
        "done",
        "doomed",
        "error",
        "extents",
        "failures",
        "refused",
        "remaining",
        "sequence",
        "size_bytes",
        "wide",
    )

    def __init__(
        self, sequence: int, legs: int, size_bytes: int, began: float, done: Done, completed: Callable[[Batch], None]
    ) -> None:
        self.sequence = sequence
        self.remaining = legs
        self.size_bytes = size_bytes
        self.began = began
        self.done = done
        self.failures = 0
        self.error: OSError | None = None
        self.refused: OSError | None = None
        """It was answered with that, and is in flight all the same."""
        self.doomed: OSError | None = None
        """What became of the mirror meanwhile; it fails with that, whatever the legs say."""
        self.extents: set[int] = set()
        self.wide: list[tuple[int, int]] | None = None
        self._completed = completed
        self._waiting: trio.Event | None = None

    def __call__(self, error: OSError | None) -> None:
        if error is not None:
            self.failures += 1
            self.error = error
        self.remaining -= 1
        if not self.remaining:
            self._completed(self)

    def touches(self, first: int, stop: int) -> bool:
        """Whether it changes something in the extents [first, stop)."""
        if self.wide is not None and any(a < stop and first < b for a, b in self.wide):
            return True
        if stop - first <= len(self.extents):
            return not self.extents.isdisjoint(range(first, stop))
        return any(first <= extent < stop for extent in self.extents)

    def settled(self) -> trio.Event:
        """Is set when it is in flight no more, or refused; to be asked for while it is in flight."""
        if self._waiting is None:
            self._waiting = trio.Event()
        return self._waiting

    def refuse(self, error: OSError) -> None:
        """Answer with an error, though some legs have it: it stays in flight."""
        self.refused = error
        self.wake()
        self.done(error)

    def wake(self) -> None:
        """It is in flight no more, or refused."""
        if self._waiting is not None:
            self._waiting.set()
            self._waiting = None


class Watch:
    """Whether a batch has touched some extents since, or what was behind an end may have been cut off."""

    __slots__ = ("first", "resized", "stop", "touched")

    def __init__(self, first: int, stop: int) -> None:
        self.first = first
        self.stop = stop
        self.touched = False
        self.resized = False
        """Then it counts as touched, though no leg was given anything."""


class InFlight:
    """All batches in flight."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        """How many batches touch an extent; wide ranges are not in it."""
        self.wide_count = 0
        self.batches: dict[int, Batch] = {}
        """By sequence, in order."""
        self._watches: list[Watch] = []

    def add(self, batch: Batch) -> None:
        """It is about to be submitted."""
        self.batches[batch.sequence] = batch
        counts = self.counts
        for extent in batch.extents:
            counts[extent] = counts.get(extent, 0) + 1
        if batch.wide is not None:
            self.wide_count += 1
        if self._watches:
            for watch in self._watches:
                if not watch.touched and batch.touches(watch.first, watch.stop):
                    watch.touched = True

    def remove(self, batch: Batch) -> None:
        """Its fate is known."""
        del self.batches[batch.sequence]
        counts = self.counts
        for extent in batch.extents:
            left = counts[extent] - 1
            if left:
                counts[extent] = left
            else:
                del counts[extent]
        if batch.wide is not None:
            self.wide_count -= 1
        batch.wake()

    def resized(self) -> None:
        """What was read before may be what was cut off, and is zeros when there is room for it again."""
        for watch in self._watches:
            watch.touched = watch.resized = True

    def overlaps(self, offset: int, length: int) -> bool:
        """Whether a batch in flight changes something in these extents."""
        first, stop = extents_of(offset, length)
        counts = self.counts
        if counts:
            if stop - first == 1:
                if first in counts:
                    return True
            elif any(extent in counts for extent in range(first, stop)):
                return True
        return bool(self.wide_count) and any(
            batch.wide is not None and batch.touches(first, stop) for batch in self.batches.values()
        )

    async def settle(self, offset: int, length: int) -> None:
        """Wait for the batches that overlap now."""
        first, stop = extents_of(offset, length)
        await self._settled([batch for batch in self.batches.values() if batch.touches(first, stop)])

    async def settle_for_client(self, offset: int, length: int) -> None:
        """The same. Raises OSError if one of them was refused and isn't settled: so is who depends on it."""
        first, stop = extents_of(offset, length)
        await self._settled([batch for batch in self.batches.values() if batch.touches(first, stop)], judge=True)

    async def settle_all(self) -> None:
        """Wait for all that is in flight now."""
        await self._settled(list(self.batches.values()))

    async def settle_all_for_client(self) -> None:
        """The same. Raises OSError as `settle_for_client`."""
        await self._settled(list(self.batches.values()), judge=True)

    async def _settled(self, batches: list[Batch], *, judge: bool = False) -> None:
        for batch in batches:
            while self.batches.get(batch.sequence) is batch:
                if judge and batch.refused is not None:
                    raise OSError(batch.refused.errno, batch.refused.strerror)
                await batch.settled().wait()

    @contextlib.contextmanager
    def watching(self, offset: int, length: int) -> Iterator[Watch]:
        """A `Watch` from now on."""
        watch = Watch(*extents_of(offset, length))
        self._watches.append(watch)
        try:
            yield watch
        finally:
            self._watches.remove(watch)


class Locks:
    """Extents to which no new batch may go: of blocks that are being merged, copied or compared."""

    def __init__(self) -> None:
        self.held: dict[int, trio.Event] = {}

    def free(self, first: int, stop: int) -> bool:
        """Whether none of the extents is held."""
        held = self.held
        if not held:
            return True
        if stop - first <= len(held):
            return not any(extent in held for extent in range(first, stop))
        return not any(first <= extent < stop for extent in held)

    async def wait(self, first: int, stop: int) -> None:
        """Until they are all free; true at this moment."""
        while not self.free(first, stop):
            held = next(event for extent, event in self.held.items() if first <= extent < stop)
            await held.wait()

    @contextlib.asynccontextmanager
    async def holding(self, offset: int, length: int) -> AsyncIterator[None]:
        """Hold the extents that these bytes touch (few), all at once, so that two can't block each other."""
        first, stop = extents_of(offset, length)
        await self.wait(first, stop)
        released = trio.Event()
        for extent in range(first, stop):
            self.held[extent] = released
        try:
            yield
        finally:
            for extent in range(first, stop):
                del self.held[extent]
            released.set()


class Outcome:
    """A `Done` to wait for."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._error: OSError | None = None

    def __call__(self, error: OSError | None) -> None:
        self._error = error
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()
        if self._error is not None:
            raise OSError(self._error.errno, self._error.strerror)


def touched(changes: Sequence[Change]) -> tuple[set[int], list[tuple[int, int]] | None]:
    """The extents of changes: singly, and as ranges (first, behind the last) where they are long."""
    extents: set[int] = set()
    wide: list[tuple[int, int]] = []
    for change in changes:
        first, stop = extents_of(change.offset, change.length)
        if stop - first > WIDE_EXTENTS:
            wide.append((first, stop))
        else:
            extents.update(range(first, stop))
    return extents, wide or None
