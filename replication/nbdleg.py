"""A leg on any NBD server: `NbdLeg` keeps a mirror's order over a protocol that has none.

An NBD server stores bytes, and nothing else: no record, no promise, no tracker. What follows from that:

- **It proves nothing.** It is no voter, and no record may have it alone in sync, which would be stored nowhere: when
  the last Terrace leg in sync is gone, the mirror stops, though the server lives (`replication.mirror`).
- **It can't be fenced.** What a deposed primary has sent may land at any time. So each new term begins without it
  (`replication.promotion`), and it comes back by a resync: of what was written lately if the primary is the same node
  as before, in the same boot, with its own leg in sync, or if the last one was demoted cleanly; else all of it is
  compared (`tells_all`, which the legs' keepers ask). A node that was primary, and hasn't been heard since, keeps it
  out (`unfenced`).
- **It can be replaced by another one** at the same URI, which nobody can tell, unless the size differs: then it is
  compared in full.
- **Nothing vouches for its bytes.** So they are given to clients, and heal another leg, only where the checksum of a
  Terrace leg's map proves them (`replication.mirrorreads`).

Order
    A server may carry out requests in any order. Those that don't overlap are sent at once, up to `REQUESTS` of them;
    one that overlaps others that aren't answered waits for these. `done` is called in the order of the batches.

Who is behind whom
    With `ahead`, the leg of this node, which the mirror gives each batch before, a batch is sent only when that one has
    it. So after a kill of this process its
    trackers know of all that the server may have got. When `ahead` fails, so does this leg.

The end
    A leg that has failed or was closed begins nothing more, but what the server has not answered may still be carried
    out. So the connection is kept until all writes are answered or it breaks, and only then another leg of the same
    server begins (`NbdSite`): a late write never lands on what was copied after it. Where the connection broke before
    that, or the process was killed that had it, nobody knows when the server is done with what it had got. Then the
    next leg begins once the server has been there for `timeout_s`: a server that was stopped, and goes on, has had so
    long for what was left in its sockets.
"""

from __future__ import annotations

import contextlib
import errno
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Final, Protocol

import trio
import xxhash

from nbd.client import Client, ClientLimits, connect
from nbd.wire import STATE_ZERO
from replication.leg import BLOCK_BYTES, EXTENT_BYTES, RECENT, RECENT_OLD, Change, Done, Extents
from replication.membership import LegInfo, Membership, Term

__all__ = ["NbdLeg", "NbdSite", "is_fenced", "is_outside", "probe", "tells_all", "unfenced"]

ALLOCATION: Final = "base:allocation"
REQUESTS: Final = 64
"""So many changes are under way at once."""
JOINED_BYTES: Final = 1 << 20
"""Neighbours of one batch are joined to requests of this length."""
ZERO_BYTES: Final = 64 << 20
"""So much is zeroed by one request: a server that writes zeros has to answer within the mirror's timeout."""
READ_BYTES: Final = 1 << 20
WIDE_EXTENTS: Final = 64
"""A longer change is looked for among all that are pending, not by extents."""

_ZEROS: Final = bytes(JOINED_BYTES)
_ZERO_BLOCK: Final = bytes(BLOCK_BYTES)


# What follows from the records


def tells_all(old: Membership, new: Membership) -> bool:
    """Whether `recent` at a leg in sync is all that NBD legs may lack, or have beyond it, when a record of a later term
    follows the record `old`.

    It is if the last term ended cleanly, or if the same node goes on whose own leg was in sync: what that primary sent
    to a server its leg had before (see the module). Its own boot is for it to judge (`LegKeeper.intact`).
    """
    if new.term == old.term:
        return True
    after = new.history[new.history.index(old.generation) + 1 :] if old.generation in new.history else ()
    if len({one.term for one in after}) != 1:
        return False  # terms in between, or another line
    if old.primary is None:
        return True
    own = {leg.id for leg in old.legs_on(old.primary)}
    return new.primary == old.primary and bool(own & old.in_sync)


def unfenced(record: Membership, me: str) -> tuple[str, ...]:
    """Nodes that were the mirror's primary before, didn't end cleanly, and so may still write to an NBD server.

    One that had neither a leg nor a say is named too (`Generation.outside`). One that had, and is out of the mirror,
    isn't: an operator has said that it is gone. Nor is one of whose term no record is remembered any more
    (`MAX_HISTORY`).
    """
    of_mirror = {*_parts(record), *(one.primary for one in record.history if one.outside and one.primary)}
    last: dict[str, str | None] = {}
    primaries: dict[str, str] = {}
    for one in record.history:
        last[one.term.id] = one.primary
        if one.primary is not None:
            primaries[one.term.id] = one.primary
    ended = {primaries[term] for term, primary in last.items() if primary is not None and term != record.term.id}
    return tuple(sorted((ended & of_mirror) - {me}))


def is_fenced(record: Membership, node: str, promised: Term | None) -> bool:
    """Whether what that node, one of the `unfenced`, has promised ends its own terms.

    One that has neither a leg nor a say isn't asked by each candidate: what ended its last term is enough.
    """
    last = max((one.term.number for one in record.history if one.primary == node), default=0)
    wanted = record.term.number if node in _parts(record) else last + 1
    return promised is not None and promised.number >= wanted


def is_outside(record: Membership, node: str) -> bool:
    """Whether the node has neither a leg nor a say. If it knows nothing of the mirror it doesn't write to it either."""
    return node not in _parts(record)


def _parts(record: Membership) -> set[str]:
    return {*record.voters, *(leg.node for leg in record.legs if leg.kind == "terrace")}


# The server


def judge(client: Client, uri: str, size_bytes: int) -> None:
    """Whether it can be a leg. Raises OSError with a sentence."""
    if client.read_only:
        raise OSError(errno.EROFS, f"{uri} is read-only: a leg is written to; serve it writable")
    if not client.can_flush:
        raise OSError(errno.EOPNOTSUPP, f"{uri} offers no FLUSH, so nothing there would ever be known to be durable")
    if client.minimum_block_size > BLOCK_BYTES:
        raise OSError(
            errno.EINVAL, f"{uri} takes blocks of {client.minimum_block_size} bytes at least, and a leg gets 4096"
        )
    if client.size_bytes < size_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{uri} has {client.size_bytes} bytes, and the mirror has {size_bytes}: make the export at least so large",
        )


@asynccontextmanager
async def _connected(uri: str, size_bytes: int, timeout_s: float) -> AsyncIterator[Client]:
    limits = ClientLimits(handshake_timeout_s=timeout_s, dead_after_s=timeout_s)
    async with connect(uri, contexts=[ALLOCATION], limits=limits) as client:
        judge(client, uri, size_bytes)
        yield client


async def probe(
    uri: str, size_bytes: int, *, timeout_s: float, while_connected: Callable[[], None] = lambda: None
) -> int:
    """Whether there is a server that can be a leg of such a mirror: its size. Raises OSError with a sentence."""
    async with _connected(uri, size_bytes, timeout_s) as client:
        await trio.lowlevel.checkpoint()
        while_connected()
        return client.size_bytes


class Ahead(Protocol):
    """What has each batch before the server; `replication.localleg.LocalLeg` is one."""

    failure: OSError | None
    on_applied: list[Callable[[], None]]
    """Called when it owes less, or has failed."""

    def owes(self, sequence: int) -> bool:
        """Whether it was given something up to this sequence that it doesn't have yet."""


class NbdSite:
    """One server as a mirror's primary knows it: opens its legs, one after another, and remembers what they have sent.

    What was sent and not flushed by all legs (`Leg.flushed_by_all`) is what the server may have and others may lack.
    """

    def __init__(self, info: LegInfo, empty_extents: Callable[[], Extents], *, may_owe: bool = False) -> None:
        """`may_owe`: another process may have written there lately."""
        self.info = info
        self.server_bytes: int | None = None
        """Its size, when it was seen last."""
        self.was_resized = False
        """It had another size before: perhaps it is another disk. Until the leg is in sync."""
        self.recent = empty_extents()
        self.recent_old = empty_extents()
        self.of_earlier = empty_extents()
        """What legs before this one sent."""
        self.may_owe = may_owe
        """The server may still carry out what it was sent over a connection that nobody has any more."""
        self.empty_extents = empty_extents
        self._leg: NbdLeg | None = None
        self._ahead: Ahead | None = None
        self._last: trio.Event | None = None
        self._opening = trio.Lock()

    def follow(self, ahead: Ahead) -> None:
        """The leg of this node is open from now on, and given each batch first. See the module."""
        self._ahead = ahead  # also for a leg that is just being opened: the two often come back together
        if self._leg is not None:
            self._leg.follow(ahead)

    def in_sync(self) -> None:
        """All that it lacked, or had too much, was set right."""
        self.of_earlier.clear()
        self.was_resized = False

    async def open(
        self, nursery: trio.Nursery, size_bytes: int, *, timeout_s: float, ahead: Ahead | None = None
    ) -> NbdLeg:
        """A leg whose connection lives in `nursery`. Raises OSError with a sentence; EBUSY while the server has not
        answered what was written over the last connection."""
        async with self._opening:
            if self._last is not None:
                with trio.move_on_after(timeout_s):
                    await self._last.wait()
                if not self._last.is_set():
                    raise OSError(
                        errno.EBUSY, f"{self.info.export} has not yet answered what it was sent before it was left out"
                    )
            for extents in (self.recent, self.recent_old):
                self.of_earlier.update(extents)
                extents.clear()
            if self._ahead is not None and self._ahead.failure is None:
                ahead = self._ahead
            leg = self._leg = NbdLeg(self, ahead)
            ended = trio.Event()
            try:
                await nursery.start(partial(leg.run, size_bytes, timeout_s, ended))
                self._last = ended
                if self.may_owe:
                    await self._let_pass(leg, timeout_s)
            except BaseException:
                leg.close()
                raise
            if self.server_bytes not in (None, leg.server_bytes):
                self.was_resized = True
            self.server_bytes = leg.server_bytes
            return leg

    async def _let_pass(self, leg: NbdLeg, timeout_s: float) -> None:
        """What the server has of earlier connections. Raises OSError: it has gone meanwhile."""
        with trio.move_on_after(timeout_s):
            await leg.failed()
        if leg.failure is not None:
            raise OSError(leg.failure.errno, leg.failure.strerror)
        self.may_owe = False


class _Batch:
    __slots__ = ("applied", "done", "left", "ops", "sequence", "size_bytes")

    def __init__(self, sequence: int, ops: list[_Op], done: Done) -> None:
        self.sequence = sequence
        self.ops = ops
        self.left = len(ops)
        self.size_bytes = sum(op.length for op in ops if op.data is not None)
        self.done = done
        self.applied: trio.Event | None = None


class _Op:
    """One request, or a few for one range."""

    __slots__ = ("batch", "data", "followers", "length", "offset", "waits")

    def __init__(self, offset: int, length: int, data: bytes | bytearray | None) -> None:
        self.offset = offset
        self.length = length
        self.data = data
        self.waits = 0
        """For so many that overlap it, and are before it."""
        self.followers: list[_Op] = []
        self.batch: _Batch

    def overlaps(self, other: _Op) -> bool:
        return self.offset < other.offset + other.length and other.offset < self.offset + self.length

    @property
    def extents(self) -> range:
        return range(self.offset // EXTENT_BYTES, (self.offset + self.length - 1) // EXTENT_BYTES + 1)


class NbdLeg:
    """See the module; a `replication.leg.Leg`. `NbdSite` makes it."""

    def __init__(self, site: NbdSite, ahead: Ahead | None) -> None:
        self.info = site.info
        self.failure: OSError | None = None
        self.queued_bytes = 0
        self.server_bytes = 0
        self._site = site
        self._uri = site.info.export
        self._ahead = ahead
        self._client: Client
        self._nursery: trio.Nursery
        self._failed = trio.Event()
        self._idle = trio.Event()
        self._batches: deque[_Batch] = deque()
        """Whose `done` wasn't called, in order."""
        self._held: deque[_Batch] = deque()
        """Of these, those that `ahead` doesn't have."""
        self._pending: dict[int, list[_Op]] = {}
        """What was let go and isn't answered, by extent."""
        self._wide: list[_Op] = []
        self._ready: deque[_Op] = deque()
        self._running = 0
        self._timeout_s = 0.0
        self._submitted = 0
        self._rotated_at: int | None = None
        """Up to where `recent_old` goes, as far as it isn't in `recent` too."""
        self._owed = 0
        self._owing_since: float | None = None
        self._waiting: set[trio.CancelScope] = set()
        self._doomed: list[Done] = []
        if ahead is not None:
            ahead.on_applied.append(self._let_go)

    @property
    def is_local(self) -> bool:
        """False."""
        return False

    @property
    def silent_since(self) -> float | None:
        """See `Leg`. What waits for another leg, or for its turn, isn't owed."""
        return self._owing_since if self.failure is None else None

    # -- life --------------------------------------------------------------------------------------------------------

    async def run(
        self,
        size_bytes: int,
        timeout_s: float,
        ended: trio.Event,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """The connection, until the server owes nothing more. Raises OSError if it isn't made."""
        is_made, self._timeout_s = False, timeout_s
        try:
            async with _connected(self._uri, size_bytes, timeout_s) as self._client:
                self.server_bytes = self._client.size_bytes
                async with trio.open_nursery() as self._nursery:
                    self._nursery.start_soon(self._watch)
                    self._let_go()  # `ahead` may have failed meanwhile
                    is_made = True
                    task_status.started()
                    await self._failed.wait()
                    while self._running:
                        self._idle = trio.Event()
                        await self._idle.wait()
                    self._nursery.cancel_scope.cancel()
        except OSError as error:
            if not is_made:
                raise
            self._fail(error)
        finally:
            self._fail(OSError(errno.ECANCELED, f"the leg {self._uri} was stopped"))
            ended.set()

    async def _watch(self) -> None:
        self._fail(await self._client.failed())

    async def failed(self) -> None:
        """Until it has."""
        await self._failed.wait()

    def follow(self, ahead: Ahead) -> None:
        """From now on nothing is sent that `ahead` was given and doesn't have."""
        if self.failure is None:
            if self._ahead is not None:
                self._ahead.on_applied.remove(self._let_go)
            self._ahead = ahead
            ahead.on_applied.append(self._let_go)
            self._let_go()

    def close(self) -> None:
        """See `Leg`. What the server has got it may still carry out; see the module."""
        self._fail(OSError(errno.ECANCELED, f"the leg {self._uri} was closed"))

    def _fail(self, error: OSError) -> None:
        if self.failure is not None:
            return
        self.failure = OSError(error.errno, error.strerror)
        if self._ahead is not None and self._let_go in self._ahead.on_applied:
            self._ahead.on_applied.remove(self._let_go)
        self._failed.set()
        self._ready.clear()
        self._held.clear()
        for scope in self._waiting:
            scope.cancel()
        for batch in self._batches:
            if batch.applied is not None:
                batch.applied.set()
        self._doom([batch.done for batch in self._batches])
        self._batches.clear()
        self.queued_bytes = 0

    def _doom(self, dones: list[Done]) -> None:
        """Call these with the failure, from trio's loop, in order, whatever task may end."""
        if dones:
            if not self._doomed:
                trio.lowlevel.current_trio_token().run_sync_soon(self._call_doomed)
            self._doomed += dones

    def _call_doomed(self) -> None:
        doomed, self._doomed = self._doomed, []
        assert self.failure is not None
        for done in doomed:
            done(OSError(self.failure.errno, self.failure.strerror))

    def _check(self) -> None:
        if self.failure is not None:
            raise OSError(self.failure.errno, self.failure.strerror)

    # -- changes -----------------------------------------------------------------------------------------------------

    def submit(self, sequence: int, changes: Sequence[Change], done: Done) -> None:
        """See `Leg`. Sequences grow."""
        if self.failure is not None:
            self._doom([done])
            return
        assert changes and sequence > self._submitted, (sequence, self._submitted)
        assert not changes[0].lost, "a server can't be told"
        self._submitted = sequence
        batch = _Batch(sequence, _joined(changes), done)
        for op in batch.ops:
            op.batch = batch
            for extents in (self._site.recent, self._site.recent_old):
                extents.add(op.offset, op.length)
        self._batches.append(batch)
        self.queued_bytes += batch.size_bytes
        self._held.append(batch)
        self._let_go()

    def _let_go(self) -> None:
        """Of what is held, what `ahead` has."""
        ahead = self._ahead
        if ahead is not None and ahead.failure is not None:
            self._fail(ahead.failure)
            return
        while self._held and (ahead is None or not ahead.owes(self._held[0].sequence)):
            for op in self._held.popleft().ops:
                self._enter(op)
        self._start()

    def _enter(self, op: _Op) -> None:
        """It may be sent, as soon as nothing before it is in its way."""
        extents = op.extents
        if len(extents) > WIDE_EXTENTS:
            before = {id(one): one for found in self._pending.values() for one in found if one.overlaps(op)}
            before |= {id(one): one for one in self._wide if one.overlaps(op)}
            self._wide.append(op)
        else:
            before = {id(one): one for one in self._wide if one.overlaps(op)}
            for extent in extents:
                found = self._pending.setdefault(extent, [])
                before |= {id(one): one for one in found if one.overlaps(op)}
                found.append(op)
        for one in before.values():
            one.followers.append(op)
        op.waits = len(before)
        if not op.waits:
            self._ready.append(op)

    def _start(self) -> None:
        while self._ready and self._running < REQUESTS:
            self._running += 1
            self._nursery.start_soon(self._work, self._ready.popleft())

    async def _work(self, first: _Op) -> None:
        """Carries out changes as long as there are any."""
        op: _Op | None = first
        try:
            while op is not None:
                try:
                    await self._apply(op)
                except OSError as error:
                    if self._client.failure is not None:
                        self._site.may_owe = True
                    self._fail(error)
                    return
                except trio.Cancelled:
                    self._site.may_owe = True  # nobody waits for the answer
                    raise
                if self.failure is not None:
                    return
                self._finish(op)
                self._start()
                op = self._ready.popleft() if self._ready else None
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _apply(self, op: _Op) -> None:
        client, at, end = self._client, op.offset, op.offset + op.length
        if op.data is not None:
            with self._owing():
                await client.write(at, op.data)
            return
        zeroes = client.can_write_zeroes
        while at < end and self.failure is None:
            size = min(end - at, ZERO_BYTES if zeroes else JOINED_BYTES)
            with self._owing():
                try:
                    if zeroes:
                        await client.write_zeroes(at, size)
                    else:
                        await client.write(at, memoryview(_ZEROS)[:size])
                except OSError as error:
                    if not zeroes or client.failure is not None or error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise
                    zeroes = False  # of this kind it can't, or not so long
                    continue
            at += size

    def _finish(self, op: _Op) -> None:
        extents = op.extents
        if len(extents) > WIDE_EXTENTS:
            self._wide.remove(op)
        else:
            for extent in extents:
                found = self._pending[extent]
                found.remove(op)
                if not found:
                    del self._pending[extent]
        for follower in op.followers:
            follower.waits -= 1
            if not follower.waits:
                self._ready.append(follower)
        op.batch.left -= 1
        batches = self._batches
        while batches and not batches[0].left:
            batch = batches.popleft()
            self.queued_bytes -= batch.size_bytes
            if batch.applied is not None:
                batch.applied.set()
            batch.done(None)

    @contextlib.contextmanager
    def _owing(self) -> Iterator[None]:
        """The server owes an answer."""
        if not self._owed:
            self._owing_since = trio.current_time()
        self._owed += 1
        try:
            yield
        finally:
            self._owed -= 1
            self._owing_since = trio.current_time() if self._owed else None

    # -- durability --------------------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """See `Leg`."""
        self._check()
        self._rotate()
        if self._batches:
            last = self._batches[-1]
            if last.applied is None:
                last.applied = trio.Event()
            await last.applied.wait()
            self._check()
        try:
            async with self._asking():
                await self._client.flush()
        except OSError as error:
            self._fail(error)
            raise

    def _rotate(self) -> None:
        """As `LocalLeg` does: both sets grow by each change, so what comes after this is in `recent`."""
        if self._rotated_at is None:
            self._site.recent_old.update(self._site.recent)
            self._site.recent.clear()
            self._rotated_at = self._submitted

    def flushed_by_all(self, sequence: int) -> None:
        """See `Leg`."""
        if sequence and self._rotated_at is not None and self._rotated_at <= sequence:
            self._site.recent_old.clear()
            self._rotated_at = None
            self._rotate()

    # -- what is there -----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        """A question, which ends with the leg."""
        self._check()
        with trio.CancelScope() as scope, self._owing():
            self._waiting.add(scope)
            try:
                yield
            finally:
                self._waiting.remove(scope)
        if scope.cancelled_caught:
            self._check()

    def read_now(self, offset: int, length: int, into: memoryview) -> bool:
        """False."""
        self._check()
        return False

    async def read(self, offset: int, length: int, into: memoryview) -> None:
        """What the server says, which nobody vouches for; else as `Leg`."""
        unit = self._client.minimum_block_size
        start, end = offset // unit * unit, -(-(offset + length) // unit) * unit
        async with self._asking():
            data = await self._client.read(start, end - start)
        into[:] = memoryview(data)[offset - start : offset - start + length]

    async def checks(self, offset: int, length: int) -> bytes:
        """As a Terrace leg has them in its map (XXH3-64 of a block, 0 for zeros), of what is read from the server."""
        found = bytearray()
        at, end = offset // BLOCK_BYTES * BLOCK_BYTES, offset + length
        while at < end:
            size = min(-(-(end - at) // BLOCK_BYTES) * BLOCK_BYTES, READ_BYTES)
            if not any(count for _, count in await self.mapped(at, size)):
                found += bytes(size // BLOCK_BYTES * 8)
            else:
                data = memoryview(bytearray(size))
                await self.read(at, size, data)
                found += checks_of(data)
            at += size
        return bytes(found)

    async def mapped(self, offset: int, length: int) -> list[tuple[int, int]]:
        """See `Leg`: all that the server doesn't say to be zeros; by whole blocks."""
        start, end = offset // BLOCK_BYTES * BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES) * BLOCK_BYTES
        self._check()
        if ALLOCATION not in self._client.contexts:
            await trio.lowlevel.checkpoint()
            return [(offset, length)]
        found: list[tuple[int, int]] = []
        at = start
        while at < end:
            async with self._asking():
                extents = (await self._client.block_status(at, end - at))[ALLOCATION]
            for size, flags in extents:
                if not flags & STATE_ZERO:
                    first = at // BLOCK_BYTES * BLOCK_BYTES
                    stop = min(-(-(at + size) // BLOCK_BYTES) * BLOCK_BYTES, end)
                    if found and sum(found[-1]) >= first:
                        found[-1] = found[-1][0], stop - found[-1][0]
                    else:
                        found.append((first, stop - first))
                at += size
        if not found or sum(found[-1]) < end:
            found.append((end, 0))
        return found

    async def changed(self, trackers: Iterable[str]) -> Extents:
        """What was sent to the server since the last common flush, whatever leg sent it; nothing else is known."""
        self._check()
        site, found = self._site, self._site.empty_extents()
        own = ((RECENT, site.recent), (RECENT_OLD, site.recent_old), (RECENT_OLD, site.of_earlier))
        wanted = list(trackers)
        for name, extents in own:
            if any(fnmatchcase(name, one) for one in wanted):
                found.update(extents)
        await trio.lowlevel.checkpoint()
        return found

    # -- what an NBD server doesn't have -----------------------------------------------------------------------------

    async def accept(self, membership: Membership, *, inconsistent: bool) -> None:
        """Stores nothing: there is no room for it."""
        self._check()
        await trio.lowlevel.checkpoint()

    async def resize(self, size_bytes: int) -> None:
        """An export keeps its size, or others have made it larger: then the leg ends soon, and the next one knows that.

        Raises OSError ENOSPC where it is too small now.
        """
        self._check()
        if size_bytes <= self.server_bytes:
            await trio.lowlevel.checkpoint()
            return
        self._site.server_bytes = await probe(self._uri, size_bytes, timeout_s=self._timeout_s)
        grown = OSError(errno.ECONNRESET, f"{self._uri} has grown, and is connected to anew")
        trio.lowlevel.current_trio_token().run_sync_soon(self._fail, grown)

    async def snapshot(self, name: str) -> None:
        """ENOTSUP: the Terrace legs have it."""
        self._check()
        await trio.lowlevel.checkpoint()
        raise OSError(errno.ENOTSUP, f"there are no snapshots on an NBD server ({self.info.export})")


def _joined(changes: Sequence[Change]) -> list[_Op]:
    """Copies, in order; neighbours that follow each other in one."""
    ops: list[_Op] = []
    for change in changes:
        last = ops[-1] if ops else None
        is_next = last is not None and last.offset + last.length == change.offset
        if last is not None and is_next and change.data is None and last.data is None:
            last.length += change.length
        elif change.data is None:
            ops.append(_Op(change.offset, change.length, None))
        elif last is not None and is_next and last.data is not None and last.length + change.length <= JOINED_BYTES:
            if not isinstance(last.data, bytearray):
                last.data = bytearray(last.data)
            last.data += change.data
            last.length += change.length
        else:
            ops.append(_Op(change.offset, change.length, bytes(change.data)))
    return ops


def checks_of(data: memoryview) -> bytes:
    """Of whole blocks: the check of each as the engine's map has it, little-endian; 0 for one of zeros."""
    found = bytearray()
    for at in range(0, len(data), BLOCK_BYTES):
        block = data[at : at + BLOCK_BYTES]
        found += bytes(8) if block == _ZERO_BLOCK else xxhash.xxh3_64_intdigest(block).to_bytes(8, "little")
    return bytes(found)
