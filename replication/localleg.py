"""The leg on this node: a `Leg` over a `LegStore`, with an order.

What the store takes without waiting is applied within `submit`. What would block goes into a queue, and everything
behind it too, whichever range it is for: one task applies the queue, in order. The same task calls what is due, all
that there is in one step, so that a thousand batches cost no thousand tasks.

A store that fails a change fails the leg: what follows might have built on it.

**A disk that never answers** holds up whoever waits in its worker thread, and trio can't take them out of there. So
what is asked of the store runs in tasks of the leg's own, below `run`. Who has asked gets the leg's failure as soon as
there is one, by the mirror's timeout for instance; the task stays until the disk answers, and nobody hears it.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Final, Protocol, TypeVar

import trio

from replication.leg import Change, Done, Extents, LegStore
from replication.membership import LegInfo, Membership, Term
from replication.recent import Recent

ORDERED_S: Final = 25.0
"""A record, a resize or a snapshot waits for a checkpoint of the pool: so long nobody calls that silence."""

T = TypeVar("T")


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


class _Call:
    """One thing that the store was asked."""

    __slots__ = ("answer", "due", "ended", "error")

    def __init__(self, due: float) -> None:
        self.due = due  # when it should have begun to answer
        self.ended = trio.Event()
        self.answer: Any = None
        self.error: Exception | None = None


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
        self._recent = Recent(self._store)
        self._busy_since: float | None = None
        self._calls: dict[_Call, None] = {}
        self._nursery: trio.Nursery | None = None
        self._running = trio.Event()
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
        since = [call.due for call in self._calls]
        if self._busy_since is not None:
            since.append(self._busy_since)
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
            elif changes[taken].lost:
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
        """Apply what is queued and call what is due, until the leg is closed or failed, and nothing is left.

        Nothing of the leg's is under way in the store when it returns.
        """
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._running.set()
                try:
                    await self._apply_all()
                finally:
                    # Before the nursery closes: nothing can be begun there then.
                    self._fail(OSError(errno.ECANCELED, f"the leg {self.info.export} was stopped"))
        finally:
            self._call_due()

    async def _apply_all(self) -> None:
        while True:
            self._call_due()
            if self._queue:
                await self._apply_first()
            elif self.failure is not None and not self._due:
                return
            elif not self._due:
                await self._wake.wait()
                self._wake = trio.Event()

    def _call_due(self) -> None:
        due, self._due = self._due, []
        for done, error in due:
            done(error)

    async def _apply_first(self) -> None:
        item = self._queue[0]
        if item.place is not None:
            self._queue.popleft()
            self._recent.flush_begins(self._applied)
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
        if change.lost:
            await self._store.lose(change.offset, change.length)
        elif change.data is None:
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
        calls, self._calls = self._calls, {}
        for call in calls:
            call.ended.set()
        self._running.set()
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

    async def _ask(self, work: Callable[[], Awaitable[T]]) -> T:
        """What the store answers, or the leg's failure as soon as there is one.

        What was begun goes on where nobody waits for it any more, because they were cancelled or the leg has failed.
        """
        call = await self._begun(work, 0.0)
        try:
            await call.ended.wait()
        finally:
            self._calls.pop(call, None)
        self._check()
        if call.error is not None:
            raise call.error
        answer: T = call.answer
        return answer

    async def _order(self, work: Callable[[], Awaitable[None]]) -> None:
        """The same for what changes the leg: who is cancelled cuts it short, and waits until it has ended."""
        scope = trio.CancelScope()

        async def in_scope() -> None:
            with scope:
                await work()

        call = await self._begun(in_scope, ORDERED_S)
        try:
            await call.ended.wait()
        except trio.Cancelled:
            scope.cancel()
            with trio.CancelScope(shield=True):
                await call.ended.wait()
            raise
        finally:
            self._calls.pop(call, None)
        self._check()
        if call.error is not None:
            raise call.error

    async def _begun(self, work: Callable[[], Awaitable[Any]], patience_s: float) -> _Call:
        self._check()
        call = _Call(trio.current_time() + patience_s)
        self._calls[call] = None
        if self._nursery is None:
            try:
                await self._running.wait()
                self._check()
            except BaseException:
                self._calls.pop(call, None)
                raise
            assert self._nursery is not None
        self._nursery.start_soon(self._carry_out, call, work)
        return call

    async def _carry_out(self, call: _Call, work: Callable[[], Awaitable[Any]]) -> None:
        try:
            call.answer = await work()
        except Exception as error:  # theirs who have asked
            call.error = error
        except trio.Cancelled:
            call.error = OSError(errno.ECANCELED, f"the leg {self.info.export} was stopped")
            raise
        finally:
            call.ended.set()

    # -- durability --------------------------------------------------------------------------------------------------

    async def flush(self) -> None:
        self._check()
        place = None
        if self._queue:
            # Its place in the order is here; what is submitted while it waits belongs to the next one.
            item = _Queued(self._queue[-1].sequence, [], 0, None)
            place = item.place
            self._queue.append(item)
        else:
            self._recent.flush_begins(self._applied)
        await self._ask(partial(self._flush_behind, place))

    async def _flush_behind(self, place: trio.Event | None) -> None:
        if place is not None:
            await place.wait()
            self._check()
        await self._store.flush()

    def flushed_by_all(self, sequence: int) -> None:
        self._recent.flushed_by_all(sequence)
        self._keeper.settled()

    # -- what is there -----------------------------------------------------------------------------------------------

    def read_now(self, offset: int, length: int, into: memoryview) -> bool:
        self._check()
        return self._store.read_now(offset, length, into)

    async def read(self, offset: int, length: int, into: memoryview) -> None:
        # Not into the caller's: that is somebody else's when this ends before the disk has answered.
        own = memoryview(bytearray(length))
        await self._ask(partial(self._store.read, offset, length, own))
        into[:] = own

    async def checks(self, offset: int, length: int) -> bytes:
        return await self._ask(partial(self._store.checks, offset, length))

    async def mapped(self, offset: int, length: int) -> list[tuple[int, int]]:
        return await self._ask(partial(self._store.mapped, offset, length))

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
        await self._order(partial(self._keeper.accept, membership, inconsistent=inconsistent))

    async def resize(self, size_bytes: int) -> None:
        await self._order(partial(self._store.resize, size_bytes))

    async def snapshot(self, name: str) -> None:
        await self._order(partial(self._store.snapshot, name))


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

    async def let_go(self) -> None:
        """Until nothing of the last leg's is under way in the store any more: if it is in use, as long as it is."""
        while self._last is not None and not self._last.is_set():
            await self._last.wait()

    @property
    def open_leg(self) -> LocalLeg | None:
        """The last one, while it is of use."""
        return self._leg if self._leg is not None and self._leg.failure is None else None

    async def _run(self, leg: LocalLeg, ended: trio.Event) -> None:
        try:
            await leg.run()
        finally:
            ended.set()
