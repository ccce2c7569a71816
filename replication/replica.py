"""The other end of a leg: a replica takes from a primary what it is to hold, in order, one session at a time.

Fencing
    At most one session may change the leg. A newer one marks the older fenced at once, by a flag that is looked at
    before anything is applied: what the older one still has in its socket buffer, or in its inbox, is never applied.
    Then the newer waits for the turn (a lock, first come first served), that is until what the older one was in the
    middle of has ended. Only then does it answer, with the position that follows from that. A promise to a higher term
    fences in the same way, from within the keeper's step; `fenced` waits for the end.

    A primary on this node writes by another way (`replication.localleg`), and may be in the middle of a write when it
    is deposed. A session stores a record that it is given, which is what deposes it at the latest, and does nothing
    else before that way is free (`until_free`): not even say what has changed, as that write isn't in there yet.

The data path is that of `nbd.connection`: one receive takes what is there, all WRITE frames of the inbox become one
`write_now`, and one DONE at the end of the pass tells of all of them. What would block is awaited in its place: nothing
behind it in the stream can overtake it. A batch that needs more than one frame is applied frame by frame; it counts
once the last is there, and is sent again from its beginning if the connection is lost in between.

Tasks
    FLUSH, READ, CHECKS and MAPPED run beside the stream, bounded in number and bytes: at a bound the socket isn't
    read. A FLUSH begins when all before it is applied, and covers that. ACCEPT, RESIZE and SNAPSHOT are the main task's
    own, so they have their place between the writes. They are shielded from the end of the session, and their answers
    are remembered for as long as its line of sessions can be resumed, so that what was done and not heard of isn't done
    twice.

Memory
    An inbox for each session, twice the longest frame; answers that the primary doesn't take stop the reading.

What survives a crash is the engine's and the keeper's affair. In memory only: the exact position, and that a session
can be resumed. A primary that goes away properly (GOODBYE), or a node that stops (`stop`), leaves the leg flushed and
clean, with its position in the record.
"""

from __future__ import annotations

import errno
import logging
import math
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from fnmatch import fnmatchcase
from functools import partial
from time import perf_counter
from typing import Final, Protocol

import trio

from nbd.tls import TlsSocket
from replication import wire
from replication.leg import BLOCK_BYTES, LegStore, Position
from replication.membership import Membership, Term
from replication.recent import Recent
from replication.stream import Inbox, Stream, Traffic, gone
from replication.wire import BreachError, Frame, LegOption, Type

__all__ = ["Keeper", "Replica"]

log = logging.getLogger("replication.replica")

INBOX_BYTES: Final = 2 * (wire.HEAD_BYTES + wire.MAX_BODY_BYTES)
SLICE_S: Final = 0.0015
"""So long a session may work before others get their turn."""
MAX_TASKS: Final = wire.MAX_REQUESTS
MAX_TASK_BYTES: Final = 16 << 20
MAX_BACKLOG_BYTES: Final = 8 << 20
WORKING_S: Final = 1.0
"""Between two frames that say that a request is being worked on."""
LONGEST_WORK_S: Final = 30.0
"""A request that takes longer is not spoken for any more: a disk that never answers must not look alive."""
IDLE_S: Final = 60.0
"""A primary pings every second; one that was cut off without a word is given up, for its connection's sake."""
ORDERED_S: Final = 30.0
"""An ACCEPT, RESIZE or SNAPSHOT, which nobody else can cut short, may take so long."""
PARTING_S: Final = 0.5


class Record(Protocol):
    """What a replica reads of `replication.keeper.LegRecord`."""

    @property
    def me(self) -> str: ...
    @property
    def promised(self) -> Term | None: ...
    @property
    def accepted(self) -> Membership | None: ...
    @property
    def inconsistent(self) -> bool: ...
    @property
    def position(self) -> Position | None: ...


class Keeper(Protocol):
    """What a replica needs of `replication.keeper.LegKeeper`."""

    @property
    def store(self) -> LegStore: ...
    @property
    def record(self) -> Record: ...
    @property
    def on_fence(self) -> list[Callable[[Term], None]]: ...
    @property
    def intact(self) -> bool: ...
    def allows(self, term: Term) -> bool: ...
    async def accept(self, membership: Membership, *, inconsistent: bool = False) -> None: ...
    async def take_part(self) -> None: ...
    async def leave(self, position: Position | None) -> None: ...
    def settled(self) -> None: ...


async def _free() -> None:
    await trio.lowlevel.checkpoint()


class Replica:
    """One leg of this node, for primaries elsewhere. It lives as long as the node serves the leg."""

    def __init__(self, keeper: Keeper, until_free: Callable[[], Awaitable[None]] = _free) -> None:
        """`until_free`: returns when nothing of a primary on this node is under way (`LocalSite.let_go`)."""
        self.keeper = keeper
        self.until_free = until_free
        self.heard_at: float | None = None
        """By trio's clock, when a primary was heard whose term is allowed. For the voter's lease."""
        position = keeper.record.position
        self._term = position.term if position else None
        self._applied = position.sequence if position else None
        self._line: str | None = None
        self._answered: OrderedDict[int, list[bytes]] = OrderedDict()
        self._recent = Recent(keeper.store)
        self._current: _Session | None = None
        self._turn = trio.Lock()
        self._stopped = False
        keeper.on_fence.append(self._promised)

    @property
    def position(self) -> Position | None:
        """The last batch that is applied, if that is exactly known."""
        if self._term is None or self._applied is None:
            return None
        return Position(self._term, self._applied)

    @property
    def primary(self) -> str | None:
        """Name of the node that has the current session."""
        return self._current.peer if self._current is not None and self._current.fence_error is None else None

    def judge(self, option: LegOption) -> str | None:
        """Why a session isn't wanted, as a sentence; None if it is."""
        record, keeper = self.keeper.record, self.keeper
        name = keeper.store.export_name
        if option.leg != record.me:
            return f"{name} is the leg {record.me}, and not {option.leg}"
        if record.accepted is not None and option.mirror != record.accepted.mirror:
            return f"{name} belongs to the mirror {record.accepted.mirror}, and not to {option.mirror}"
        if self._stopped:
            return f"the leg {name} is being stopped"
        stale = self._stale(option.term)
        return None if stale is None else stale.strerror

    def _stale(self, term: Term) -> OSError | None:
        name, current = self.keeper.store.export_name, self._current
        if not self.keeper.allows(term):
            promised = self.keeper.record.promised
            number = promised.number if promised else "another"
            return OSError(errno.ESTALE, f"{name} has promised term {number}, and takes nothing of term {term.number}")
        if current is not None and current.fence_error is None and term.number < current.term.number:
            return OSError(errno.ESTALE, f"{name} has a session of term {current.term.number}, after {term.number}")
        return None

    async def serve(
        self, sock: socket.socket | TlsSocket, received: bytes, hello: LegOption, traffic: Traffic | None = None
    ) -> None:
        """One session, until it ends. The socket is non-blocking, and the caller's to close.

        Raises OSError where it ended by more than the primary's leaving: ESTALE if it was fenced, EPROTO if the
        primary broke the protocol, the storage's error if that failed; the primary was told then.
        """
        session = _Session(self, Stream(sock, peer=hello.node, traffic=traffic), received, hello.term)
        refusal = self.judge(hello)
        if refusal is not None:
            stale = self._stale(hello.term)
            await session.refuse(stale or OSError(errno.EINVAL, refusal))
        if self._current is not None:
            self._current.fence(OSError(errno.ESTALE, f"node {hello.node} has begun a newer session"))
        self._current = session
        try:
            await session.run()
        finally:
            if self._current is session:
                self._current = None

    def _promised(self, term: Term) -> None:
        current = self._current
        if current is not None and not self.keeper.allows(current.term):
            current.fence(OSError(errno.ESTALE, f"term {term.number} was promised, after {current.term.number}"))

    async def fenced(self, term: Term) -> None:
        """Wait until nothing of sessions of lower terms is under way any more. They were fenced by the promise.

        For whoever changes the leg by other ways than a session, before it does: a primary on this node.
        """
        self._promised(term)
        async with self._turn:
            pass

    async def stop(self) -> None:
        """End the session, and leave the leg clean. Raises OSError if that fails: then it isn't clean."""
        self._stopped = True
        if self._promised in self.keeper.on_fence:
            self.keeper.on_fence.remove(self._promised)
        if self._current is not None:
            self._current.fence(OSError(errno.ESHUTDOWN, f"the leg {self.keeper.store.export_name} is being stopped"))
        async with self._turn:
            await self.leave()

    async def leave_after_primary(self) -> None:
        """This node was the primary, and nothing of that is under way any more: the leg is clean.

        Unless a session has begun, which then leaves by itself: it may have writes that aren't durable. Raises OSError.
        """
        try:
            self._turn.acquire_nowait()
        except trio.WouldBlock:
            return
        # A session that comes now waits, and says anew that it takes part.
        try:
            self._term = self._applied = None
            await self.leave()
        finally:
            self._turn.release()

    async def leave(self) -> None:
        """All that was applied is durable, and the leg is clean. For whoever has the turn."""
        await self.keeper.store.flush()
        await self.keeper.leave(self.position)
        self._line = None

    # --- for the session that has the turn ---

    def hello(self) -> wire.Hello:
        """What is true now."""
        keeper, record = self.keeper, self.keeper.record
        return wire.Hello(
            leg=record.me,
            size_bytes=keeper.store.size_bytes,
            intact=keeper.intact,
            inconsistent=record.inconsistent,
            position=self.position,
            line=self._line,
            accepted=record.accepted,
            promised=record.promised,
        )

    def begin(self, term: Term, line: str, *, resumes: bool) -> None:
        """A session begins. Raises BreachError."""
        if resumes:
            known = self._line in (None, line) and (self._line is not None or self._term == term)
            if not known:
                raise BreachError("the session that is to be resumed isn't known here")
        else:
            self._applied = None
            self._answered.clear()
        if self._line != line:
            self._recent.begin_anew()
        self._term, self._line = term, line

    @property
    def applied(self) -> int | None:
        """Sequence of the last batch."""
        return self._applied

    @applied.setter
    def applied(self, sequence: int) -> None:
        self._applied = sequence

    def answered(self, cookie: int) -> list[bytes] | None:
        """What an ordered request of this line was answered, if it was."""
        return self._answered.get(cookie)

    def remember(self, cookie: int, frames: list[bytes]) -> None:
        """An ordered request was carried out."""
        self._answered[cookie] = frames
        while len(self._answered) > MAX_TASKS:
            self._answered.popitem(last=False)

    def flush_begins(self) -> None:
        """What is applied by now is durable with it."""
        self._recent.flush_begins(self._applied or 0)

    def flushed_by_all(self, sequence: int) -> None:
        """See `replication.leg.Leg`."""
        self._recent.flushed_by_all(sequence)
        self.keeper.settled()


class _Goodbye(Exception):
    """The primary leaves properly."""


class _Session:
    """See the module."""

    def __init__(self, replica: Replica, stream: Stream, received: bytes, term: Term) -> None:
        self.term = term
        self.peer = stream.peer
        self.fence_error: OSError | None = None
        self._replica = replica
        self._keeper = replica.keeper
        self._store = replica.keeper.store
        self._stream = stream
        self._inbox = Inbox(INBOX_BYTES, received)
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery
        self._begun = False
        self._alone = False
        self._took_part = False
        self._told: int | None = None
        self._open: int | None = None  # sequence of a batch of which more is to come
        self._entries: list[wire.Entry] = []  # judged, and not applied yet
        self._ends: list[tuple[int, int]] = []  # of batches in them: (number of entries up to there, sequence)
        self._tasks = 0
        self._task_bytes = 0
        self._room = trio.Event()
        self._idle_since: float | None = None  # nothing is left to do, and nothing comes
        self._since: dict[int, float] = {}  # requests being worked on, by cookie
        self._looks: dict[Type, Callable[[int, int], Awaitable[bytes | bytearray]]] = {
            Type.READ: self._read,
            Type.CHECKS: self._checks,
            Type.MAPPED: self._mapped,
        }

    # --- life ---

    def fence(self, error: OSError) -> None:
        """From here on nothing of it is applied."""
        if self.fence_error is None:
            self.fence_error = error
            self._scope.cancel()

    async def refuse(self, error: OSError) -> None:
        """Say why and end. Raises `error`."""
        self._stream.send(wire.pack_error(error))
        with trio.move_on_after(PARTING_S):
            await self._stream.part()
        raise error

    async def run(self) -> None:
        error: OSError | None = None
        with self._scope:
            async with self._replica._turn:
                try:
                    await self._serve()
                except OSError as failed:
                    error = failed
        if self.fence_error is not None:
            await self.refuse(self.fence_error)
        if error is not None:
            if isinstance(error, ConnectionError):
                raise error
            await self.refuse(error)

    async def _serve(self) -> None:
        self._check()
        self._stream.send(wire.pack(Type.HELLO, 0, self._replica.hello().encode()))
        error: OSError | None = None
        goodbye = False
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._send)
            nursery.start_soon(self._speak_for_work)
            try:
                await self._receive()
            except OSError as failed:
                error = failed
            except _Goodbye:
                goodbye = True
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error
        if goodbye:
            self._check()
            await self._replica.leave()

    async def _send(self) -> None:
        try:
            await self._stream.send_rest()
        except OSError:
            self._room.set()  # the receiver meets it too

    async def _speak_for_work(self) -> None:
        while True:
            await trio.sleep(WORKING_S)
            if self._idle_since is not None and trio.current_time() - self._idle_since > IDLE_S:
                self.fence(OSError(errno.ETIMEDOUT, f"node {self.peer} has not been heard for {IDLE_S:g} s"))
            oldest = min(self._since.values(), default=-math.inf)
            if trio.current_time() - oldest < LONGEST_WORK_S and not self._stream.backlog_bytes:
                self._stream.send(wire.pack(Type.WORKING))

    def _check(self) -> None:
        """Before anything is applied. No checkpoint between this and the applying."""
        if self.fence_error is not None:
            raise self.fence_error
        if not self._keeper.allows(self.term):
            raise self._replica._stale(self.term) or OSError(errno.ESTALE, "another term was promised")

    # --- the main task ---

    async def _receive(self) -> None:
        inbox, stream = self._inbox, self._stream
        while True:
            wanted = await self._work()
            self._idle_since = trio.current_time()
            more = await inbox.fill(stream, wanted)
            self._idle_since = None
            if not more:
                if len(inbox) or self._open is not None:
                    raise gone(self.peer)
                return
            self._check()
            self._replica.heard_at = trio.current_time()
            while self._stream.backlog_bytes > MAX_BACKLOG_BYTES:
                await self._wait_for_room(0.02)

    async def _work(self) -> int:
        """A pass: whatever is complete in the inbox. Returns how many bytes there must be for the next frame."""
        inbox, entries = self._inbox, self._entries
        stream = self._stream
        while True:
            frame = wire.take_frame(inbox.buffer, inbox.start, inbox.end, wire.FROM_PRIMARY)
            if isinstance(frame, int):
                break
            if frame.kind is Type.WRITE:
                if len(entries) + frame.count > wire.MAX_ENTRIES:
                    await self._apply()
                self._judge_sequence(frame)
                wire.judge_entries(frame.body, frame.count, self._store.size_bytes, entries)
                inbox.start += frame.size_bytes
                if frame.more:
                    self._open = frame.number
                else:
                    self._open = None
                    self._ends.append((len(entries), frame.number))
            else:
                await self._apply()
                inbox.start += frame.size_bytes
                await (self._lose(frame) if frame.kind is Type.LOST else self._handle(frame))
            if perf_counter() > stream.woke_at + SLICE_S:
                await self._apply()
                self._tell()
                await stream.rest()
        await self._apply()
        self._tell()
        return frame

    def _judge_sequence(self, frame: Frame) -> None:
        if not self._begun:
            raise BreachError(f"a {frame.kind.name} before BEGIN")
        last = self._ends[-1][1] if self._ends else self._replica.applied
        if self._open is not None:
            if frame.number != self._open:
                raise BreachError(f"a {frame.kind.name} of batch {frame.number} in the middle of {self._open}")
        elif last is not None and frame.number <= last:
            raise BreachError(f"a {frame.kind.name} of batch {frame.number} after {last}")

    async def _apply(self) -> None:
        """What was gathered, in order. The views are of the inbox, which nobody receives into meanwhile."""
        entries = self._entries
        if not entries:
            return
        self._check()
        if not self._took_part:
            await self._take_part()
        writes = [(offset, data) for offset, _, data in entries if data is not None]
        if len(writes) == len(entries):
            if not self._store.write_now(writes):
                await self._write(writes, 0)
        else:
            await self._apply_mixed(entries)
        if self._ends:
            self._replica.applied = self._ends[-1][1]
            self._ends.clear()
        entries.clear()

    async def _lose(self, frame: Frame) -> None:
        """A batch by itself, in its place."""
        self._judge_sequence(frame)
        if self._open is not None:
            raise BreachError(f"a LOST in the middle of batch {self._open}")
        try:
            offset, length = wire.read_range(frame, self._store.size_bytes, wire.MAX_LOST_BYTES)
        except OSError as error:
            raise BreachError(error.strerror or str(error)) from None  # it has no cookie by which it could be answered
        self._check()
        if not self._took_part:
            await self._take_part()
        for at in range(offset, offset + length, BLOCK_BYTES):
            self._check()
            await self._store.lose(at, BLOCK_BYTES)
        self._replica.applied = frame.number
        self._check()

    async def _be_alone(self) -> None:
        """Before anything but a record: a primary on this node, which was deposed, may be in the middle of a write."""
        if not self._alone:
            await self._replica.until_free()
            self._alone = True
            self._check()

    async def _take_part(self) -> None:
        await self._be_alone()
        await self._keeper.take_part()
        self._took_part = True
        self._check()

    async def _apply_mixed(self, entries: list[wire.Entry]) -> None:
        at = 0
        while at < len(entries):
            stop = at
            writes: list[tuple[int, memoryview]] = []
            trims: list[tuple[int, int]] = []
            for offset, length, data in entries[at:]:
                if data is None and not writes:
                    trims.append((offset, length))
                elif data is not None and not trims:
                    writes.append((offset, data))
                else:
                    break
                stop += 1
            self._check()
            if writes:
                if not self._store.write_now(writes):
                    await self._write(writes, at)
            elif not self._store.trim_now(trims):
                for index, (offset, length) in enumerate(trims, at + 1):
                    self._check()
                    await self._store.trim(offset, length)
                    self._advance(index)
            at = stop

    async def _write(self, writes: list[tuple[int, memoryview]], at: int) -> None:
        """One after the other, with everything behind them waiting. `at`: the entries before them."""
        for index, (offset, data) in enumerate(writes, at + 1):
            self._check()
            await self._store.write(offset, data)
            self._advance(index)

    def _advance(self, applied: int) -> None:
        """In the middle of a pass that takes its time: so many entries are applied."""
        ends = self._ends
        if ends and ends[0][0] <= applied:
            while ends and ends[0][0] <= applied:
                self._replica.applied = ends.pop(0)[1]
            self._check()  # what ended after a promise is there, but nobody may count on it
            self._tell()

    def _tell(self) -> None:
        applied = self._replica.applied
        if applied is not None and applied != self._told and self._begun:
            self._told = applied
            self._stream.send(wire.HEAD.pack(wire.DONE_HEAD, applied, 0, 0))

    async def _handle(self, frame: Frame) -> None:
        """Anything but a WRITE."""
        kind = frame.kind
        if kind is Type.BEGIN:
            if self._begun:
                raise BreachError("a second BEGIN")
            line, resumes = wire.read_begin(frame)
            self._replica.begin(self.term, line, resumes=resumes)
            self._begun = True
        elif kind is Type.PING:
            self._stream.send(wire.pack(Type.PONG))
        elif kind is Type.GOODBYE:
            await self._be_alone()
            raise _Goodbye
        elif kind is Type.ERROR:
            raise wire.read_error(frame)
        elif not self._begun:
            raise BreachError(f"a {kind.name} before BEGIN")
        elif self._open is not None:
            raise BreachError(f"a {kind.name} in the middle of batch {self._open}")
        elif kind is Type.FLUSHED_BY_ALL:
            self._replica.flushed_by_all(frame.number)
        elif frame.number in self._since:
            raise BreachError(f"the cookie {frame.number} is in use")
        elif kind in wire.ORDERED:
            await self._carry_out(frame)
        else:
            await self._start(frame)

    # --- requests in the stream's order ---

    async def _carry_out(self, frame: Frame) -> None:
        frames = self._replica.answered(frame.number)
        if frames is None:
            self._tell()
            self._check()
            if frame.kind is Type.ACCEPT:
                await self._keeper.take_part()
            elif not self._took_part:
                await self._take_part()
            self._since[frame.number] = trio.current_time()
            try:
                with trio.CancelScope(deadline=trio.current_time() + ORDERED_S, shield=True) as shield:
                    await self._ordered(frame)
                if shield.cancelled_caught:
                    raise OSError(errno.ETIMEDOUT, f"{frame.kind.name} has not ended within {ORDERED_S:g} s")
                frames = wire.pack_answer(frame.number, b"")
            except BreachError:
                raise
            except OSError as error:
                frames = [wire.pack_error(error, frame.number)]
            finally:
                del self._since[frame.number]
            self._replica.remember(frame.number, frames)
        for one in frames:
            self._stream.send(one)

    async def _ordered(self, frame: Frame) -> None:
        if frame.kind is Type.ACCEPT:
            await self._keeper.accept(wire.read_membership(frame), inconsistent=bool(frame.count))
        elif frame.kind is Type.RESIZE:
            await self._store.resize(wire.read_size(frame))
        else:
            await self._store.snapshot(wire.read_name(frame))

    # --- requests beside the stream ---

    async def _start(self, frame: Frame) -> None:
        await self._be_alone()
        cookie, kind = frame.number, frame.kind
        work: Callable[[], Awaitable[bytes | bytearray]]
        held = 0
        try:
            if kind is Type.FLUSH:
                self._replica.flush_begins()
                work = self._flush
            elif kind is Type.CHANGED:
                names = wire.read_names(frame)
                work = partial(self._changed, names)
            else:
                longest = {Type.READ: wire.MAX_READ_BYTES, Type.CHECKS: wire.MAX_CHECKS_BYTES}.get(kind)
                offset, length = wire.read_range(frame, self._store.size_bytes, longest)
                held = length if kind is Type.READ else 0
                work = partial(self._looks[kind], offset, length)
        except BreachError:
            raise
        except OSError as error:
            self._stream.send(wire.pack_error(error, cookie))
            return
        while self._tasks >= MAX_TASKS or (self._tasks and self._task_bytes + held > MAX_TASK_BYTES):
            self._tell()
            await self._wait_for_room()
        self._tasks += 1
        self._task_bytes += held
        self._since[cookie] = trio.current_time()
        self._nursery.start_soon(self._run, cookie, work, held)

    async def _wait_for_room(self, at_most_s: float = math.inf) -> None:
        self._room = trio.Event()
        with trio.move_on_after(at_most_s):
            await self._room.wait()
        if self._stream.broken is not None:
            raise self._stream.broken

    async def _run(self, cookie: int, work: Callable[[], Awaitable[bytes | bytearray]], held: int) -> None:
        try:
            frames = wire.pack_answer(cookie, await work())
        except OSError as error:
            frames = [wire.pack_error(error, cookie)]
        finally:
            self._tasks -= 1
            self._task_bytes -= held
            del self._since[cookie]
            self._room.set()
        for one in frames:
            self._stream.send(one)

    async def _flush(self) -> bytes:
        await self._store.flush()
        return b""

    async def _read(self, offset: int, length: int) -> bytearray:
        data = bytearray(length)
        if not self._store.read_now(offset, length, memoryview(data)):
            await self._store.read(offset, length, memoryview(data))
        return data

    async def _checks(self, offset: int, length: int) -> bytes:
        return await self._store.checks(offset, length)

    async def _mapped(self, offset: int, length: int) -> bytes:
        ranges = await self._store.mapped(offset, length)
        return b"".join([wire.RANGE.pack(*one) for one in ranges[: wire.MAX_MAPPED]])

    async def _changed(self, names: list[str]) -> bytes:
        found = self._store.empty_extents()
        for name, extents in self._store.trackers.items():
            if any(fnmatchcase(name, one) for one in names):
                found.update(extents)
        return found.encode()
