"""The leg on this node: a `Leg` over a `LegStore`, with an order.

What the store takes without waiting is applied within `submit`. What would block goes into a queue, and everything
behind it too, whichever range it is for: one task applies the queue, in order. The same task calls what is due, all
that there is in one step, so that a thousand batches cost no thousand tasks.

The store's trackers `recent` and `recent-old` are rotated here. `recent-old` holds changes up to a sequence that is
remembered; when all legs have flushed what came up to there, it is cleared, and takes what is in `recent` then. So what
one leg may have lost that another one has is always in one of the two, and nothing stays there for more than two
common flushes, also while clients write all the time.

A store that fails a change fails the leg: what follows might have built on it.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Protocol

import trio

from replication.leg import RECENT, RECENT_OLD, Change, Done, Extents, LegStore
from replication.membership import LegInfo, Membership, Term


class Keeper(Protocol):
    """What a local leg needs of who keeps the leg's record (`replication.keeper.LegKeeper`)."""

    @property
    def store(self) -> LegStore: ...

    on_fence: list[Callable[[Term], None]]
    """Called at once when a term has been promised."""

    def allows(self, term: Term) -> bool: ...

    async def accept(self, membership: Membership, *, inconsistent: bool = False) -> None: ...

    def settled(self) -> None:
        """All legs are equal, and have flushed."""


class _Queued:
    """A batch that waits for those before it, with its own copy of the data; without changes: a flush's place."""

    __slots__ = ("changes", "done", "place", "sequence", "size_bytes")

    def __init__(self, sequence: int, changes: list[Change], size_bytes: int, done: Done | None) -> None:
        self.sequence = sequence
        self.changes = changes
        self.size_bytes = size_bytes
        self.done = done
        self.place = trio.Event() if done is None else None


class LocalLeg:
    """See the module. Somebody has to run `run`."""

    def __init__(self, keeper: Keeper, info: LegInfo, term: Term) -> None:
        self.info = info
        self.failure: OSError | None = None
        self.queued_bytes = 0
        self._keeper = keeper
        self._store = keeper.store
        self._term = term
        self._queue: deque[_Queued] = deque()
        self._due: list[tuple[Done, OSError | None]] = []
        self._wake = trio.Event()
        self._applied = 0
        self._rotated_at: int | None = None
        """Up to where `recent-old` goes, as far as it isn't in `recent` too; None: it isn't known."""
        self._busy_since: float | None = None
        self._flushing_since: list[float] = []
        self.on_applied: list[Callable[[], None]] = []
        """Called when it owes less, or has failed."""
        keeper.on_fence.append(self._fenced)
        if not keeper.allows(term):
            self._fenced(None)

    @property
    def is_local(self) -> bool:
        return True

    def owes(self, sequence: int) -> bool:
        """Whether it was given something up to this sequence that the store doesn't have yet."""
        first = next((item for item in self._queue if item.done is not None), None)
        return first is not None and first.sequence <= sequence

    @property
    def store(self) -> LegStore:
        """Where it is."""
        return self._store

    @property
    def silent_since(self) -> float | None:
        since = [*self._flushing_since[:1], *([] if self._busy_since is None else [self._busy_since])]
        return min(since, default=None)

    # -- changes -----------------------------------------------------------------------------------------------------

    def submit(self, sequence: int, changes: Sequence[Change], done: Done) -> None:
        if self.failure is not None:
            # Whether or not `run` is still there.
            trio.lowlevel.current_trio_token().run_sync_soon(done, self.failure)
            return
        if not self._queue:
            try:
                taken = self._apply_now(changes)
            except OSError as error:
                self._fail(error)
                self._call_later(done, error)
                return
            if taken == len(changes):
                self._applied = sequence
                self._call_later(done, None)
                return
            changes = changes[taken:]
        copies = [
            change if change.data is None else Change(change.offset, change.length, memoryview(bytes(change.data)))
            for change in changes
        ]
        size = sum(change.length for change in copies if change.data is not None)
        if not self._queue:
            self._busy_since = trio.current_time()
        self._queue.append(_Queued(sequence, copies, size, done))
        self.queued_bytes += size
        self._wake.set()

    def _apply_now(self, changes: Sequence[Change]) -> int:
        """How many of them, from the first on, were taken without waiting."""
        taken = 0
        while taken < len(changes):
            stop = taken
            writes: list[tuple[int, memoryview]] = []
            for change in changes[taken:]:
                if change.data is None:
                    break
                writes.append((change.offset, change.data))
            if writes:
                stop += len(writes)
                if not self._store.write_now(writes):
                    return taken
            else:
                trims = []
                for change in changes[taken:]:
                    if change.data is not None:
                        break
                    trims.append((change.offset, change.length))
                stop += len(trims)
                if not self._store.trim_now(trims):
                    return taken
            taken = stop
        return taken

    def _call_later(self, done: Done, error: OSError | None) -> None:
        self._due.append((done, error))
        self._wake.set()

    async def run(self) -> None:
        """Apply what is queued and call what is due, until the leg is closed or failed, and nothing is left."""
        try:
            while True:
                self._call_due()
                if self._queue:
                    await self._apply_first()
                elif self.failure is not None and not self._due:
                    return
                elif not self._due:
                    await self._wake.wait()
                    self._wake = trio.Event()
        finally:
            if self.failure is None:
                self._fail(OSError(errno.ECANCELED, f"the leg {self.info.export} was stopped"))
            self._call_due()

    def _call_due(self) -> None:
        due, self._due = self._due, []
        for done, error in due:
            done(error)

    async def _apply_first(self) -> None:
        item = self._queue[0]
        if item.place is not None:
            self._queue.popleft()
            self._rotate()
            item.place.set()
            return
        self._busy_since = trio.current_time()
        try:
            left = item.changes
            while left and self.failure is None:
                left = left[self._apply_now(left) :]
                if left:
                    await self._apply(left[0])
                    left = left[1:]
        except OSError as error:
            self._fail(error)
        if self.failure is not None:
            return  # by itself, or by a term that is over: it was called with the failure
        self._queue.popleft()
        self.queued_bytes -= item.size_bytes
        self._applied = item.sequence
        self._busy_since = trio.current_time() if self._queue else None
        assert item.done is not None
        self._due.append((item.done, None))
        self._tell_applied()

    def _tell_applied(self) -> None:
        for tell in list(self.on_applied):
            tell()

    async def _apply(self, change: Change) -> None:
        if change.data is None:
            await self._store.trim(change.offset, change.length)
        else:
            await self._store.write(change.offset, change.data)

    def _fail(self, error: OSError) -> None:
        if self.failure is not None:
            return
        self.failure = error
        if self._fenced in self._keeper.on_fence:
            self._keeper.on_fence.remove(self._fenced)
        for item in self._queue:
            if item.place is not None:
                item.place.set()
            elif item.done is not None:
                self._due.append((item.done, error))
        self._queue.clear()
        self.queued_bytes = 0
        self._busy_since = None
        self._wake.set()
        self._tell_applied()
        if self._due:
            # `run` may be in the middle of something that never ends, and clients wait for this.
            trio.lowlevel.current_trio_token().run_sync_soon(self._call_due)

    def _fenced(self, term: Term | None) -> None:
        if term is None or term > self._term:
            newer = "" if term is None else f" {term.number}"
            self._fail(OSError(errno.ESTALE, f"{self.info.export}: later term{newer} promised to another primary"))

    def close(self) -> None:
        self._fail(OSError(errno.ECANCELED, f"the leg {self.info.export} was closed"))

    def _check(self) -> None:
        if self.failure is not None:
            raise OSError(self.failure.errno, self.failure.strerror)

    # -- durability --------------------------------------------------------------------------------------------------

    async def flush(self) -> None:
        self._check()
        began = trio.current_time()
        self._flushing_since.append(began)
        try:
            if self._queue:
                # Its place in the order is here; what is submitted while it waits belongs to the next one.
                item = _Queued(self._queue[-1].sequence, [], 0, None)
                assert item.place is not None
                self._queue.append(item)
                await item.place.wait()
                self._check()
            else:
                self._rotate()
            await self._store.flush()
        finally:
            self._flushing_since.remove(began)
        self._check()

    def _rotate(self) -> None:
        """What was applied until now is to be forgotten when all legs have flushed up to here.

        Both sets grow by each write, so what comes after this is in `recent`.
        """
        trackers = self._store.trackers
        recent, old = trackers.get(RECENT), trackers.get(RECENT_OLD)
        if recent is not None and old is not None and self._rotated_at is None:
            old.update(recent)
            recent.clear()
            self._rotated_at = self._applied

    def flushed_by_all(self, sequence: int) -> None:
        old = self._store.trackers.get(RECENT_OLD)
        if sequence and old is not None and self._rotated_at is not None and self._rotated_at <= sequence:
            old.clear()
            self._rotated_at = None
            self._rotate()
        self._keeper.settled()

    # -- what is there -----------------------------------------------------------------------------------------------

    def read_now(self, offset: int, length: int, into: memoryview) -> bool:
        self._check()
        return self._store.read_now(offset, length, into)

    async def read(self, offset: int, length: int, into: memoryview) -> None:
        self._check()
        await self._store.read(offset, length, into)
        self._check()

    async def checks(self, offset: int, length: int) -> bytes:
        self._check()
        return await self._store.checks(offset, length)

    async def mapped(self, offset: int, length: int) -> list[tuple[int, int]]:
        self._check()
        return await self._store.mapped(offset, length)

    async def changed(self, trackers: Iterable[str]) -> Extents:
        self._check()
        found = self._store.empty_extents()
        wanted = list(trackers)
        for name, extents in self._store.trackers.items():
            if any(fnmatchcase(name, one) for one in wanted):
                found.update(extents)
        await trio.lowlevel.checkpoint()
        return found

    async def accept(self, membership: Membership, *, inconsistent: bool) -> None:
        self._check()
        await self._keeper.accept(membership, inconsistent=inconsistent)

    async def resize(self, size_bytes: int) -> None:
        self._check()
        await self._store.resize(size_bytes)

    async def snapshot(self, name: str) -> None:
        self._check()
        await self._store.snapshot(name)


class LocalSite:
    """Opens the legs over one store, one after the other: the next one when the last one has let go of the store."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._last: trio.Event | None = None
        self._leg: LocalLeg | None = None
        self._opening = trio.Lock()

    async def open(self, nursery: trio.Nursery, info: LegInfo, term: Term) -> LocalLeg:
        """A leg that runs in `nursery`. It waits for what the last one is just doing: that must not land later."""
        async with self._opening:
            if self._last is not None:
                await self._last.wait()
            leg = LocalLeg(self._keeper, info, term)
            if leg.failure is not None:
                raise OSError(leg.failure.errno, leg.failure.strerror)
            self._last, self._leg = trio.Event(), leg
            nursery.start_soon(self._run, leg, self._last)
            return leg

    @property
    def open_leg(self) -> LocalLeg | None:
        """The last one, while it is of use."""
        return self._leg if self._leg is not None and self._leg.failure is None else None

    async def _run(self, leg: LocalLeg, ended: trio.Event) -> None:
        try:
            await leg.run()
        finally:
            ended.set()
