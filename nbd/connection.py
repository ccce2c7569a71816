"""One client: its data path, behind the handshake (``nbd.reception``).

Threads of control
    ``run`` is the connection's main task. It receives, judges and carries out whatever does not
    wait, in synchronous passes (``_work``): all complete requests in the inbox are handled
    together, all writes of a pass are one ``write_now``, all replies leave in one ``send``. What
    waits becomes a task in the connection's nursery, bounded in number and bytes; at a bound the
    socket is not read.

One writer
    All replies leave through the ``Outbox``. The main task does not touch its arena again before that
    has let go of it.

Acknowledged later
    Where the export is an ``AcknowledgesLater``, a pass's writes, and its trims, are handed over as a batch
    (``nbd.later``), which counts as in flight. Its replies are packed and sent from within the task in which the export
    is done with it; only if the socket is full, or FUA wants a flush, is there a task for that.

Memory
    The inbox and the arena (a ``Bench``) belong to the connection only while it has work; waiting
    for a client it holds nothing, or a copy of half a header. A WRITE longer than the inbox is
    written in pieces as it arrives, so no length a client names makes us allocate it; a client
    that vanishes in the middle leaves a part of a write that was never acknowledged. Where a piece
    has to wait for long, the rest of its WRITE is taken in, as it arrives and within the bound of
    what is in flight, and left to a task: behind it may be the TRIM that would make room.

Leaving
    After DISC, end of file, or when the server drains, the socket is no longer read, what was read
    is finished and answered if the client still takes answers, and the export is released. Being
    cancelled abandons what is in flight. Either way the socket is closed when nothing is under way
    any more; so a client that sees the end of a connection, and sends again what was not answered,
    can't be overtaken by the first copy. For one that doesn't wait for the end: ``nbd.fence``. (Batches that are to be
    acknowledged later are waited for, too; but who cancels the connection abandons them, and then it is the export that
    lets no later copy overtake them.)

Suspension
    A server that is replaced stops at a request boundary: what was read is handled, what is under way gets a while
    to end, and then is cut short and kept (``_unfinished``). ``run`` returns what a successor needs to go on
    (``nbd.suspended``), and the socket stays open. Wherever the main task may be cut short, what it is in the middle of
    is in ``_long``, ``_long_read`` or ``_unfinished`` at that moment. A connection that its client has given up isn't
    kept: what it left unanswered may have been sent again on another one, and must not come after that. Nor is one
    with a batch that wasn't acknowledged in that while: its data is the export's, and nothing here could carry it out
    anew. It is closed as in a drain.

Draining
    What was not read is not answered either. ESHUTDOWN, which the protocol suggests, the Linux
    kernel's client passes on as an I/O error of the device; but what a connection that ends leaves
    unanswered it sends again on the next one. Other clients fail either way. A close would discard
    what is unread with a reset, which may overtake the last replies over TCP. So first only our side
    is shut down, and what still arrives is thrown away until the client has closed too, or for a
    bounded time.
"""

from __future__ import annotations

import enum
import errno
import logging
import math
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import Context, copy_context
from itertools import repeat
from time import perf_counter
from types import MappingProxyType
from typing import Final

import trio

from nbd import wire
from nbd.counters import Counters
from nbd.export import AcknowledgesLater, Client, Export, Exports, LendsReads, OffersContexts
from nbd.later import Batch, Later
from nbd.outbox import Outbox
from nbd.reception import Reception, tell_lost
from nbd.sparse import CHUNK_BYTES, next_pieces, teller_of
from nbd.suspended import Kept, LongRead, LongWrite, Suspended, Work
from nbd.takeover import TakenOver, Takeover
from nbd.tls import TlsFiles, TlsSocket
from nbd.transmission import (
    Contexts,
    Session,
    block_status,
    data_header,
    error_value,
    extent_limit,
    failure,
    form_of,
    hole,
    is_absurd,
    judge,
    judge_range,
    may_filter,
    narrow,
    pack_successes,
    payload_bytes,
    payload_limit,
    read_header,
    success,
    success_bytes,
)
from nbd.workshop import INBOX_BYTES, INLINE_READ_BYTES, Bench, Limits, Workshop

log = logging.getLogger("nbd.server")

BATCH_BYTES: Final = 512 << 10
"""A pass ends when its replies reach this, so that they are still in the CPU's cache when sent."""
BATCH_WRITES: Final = 1000
"""Most writes in one pass: a pwritev takes 1,023 buffers."""
BATCH_TRIMS: Final = 100
"""Most trims in one pass: if the storage makes them wait, each becomes a task, and these are bounded."""
CACHE_BYTES: Final = 0xFFFFFFFF
"""A CACHE reads so much at most, as with compact headers: nobody can stop a hint, and 64 bits are a lot to read."""
PIECE_BYTES: Final = 512 << 10
"""A WRITE taken in pieces is written about so much at a time."""
PIECE_ALIGNMENT: Final = 64 << 10
"""Pieces end on multiples of this, so that splitting a WRITE costs no read-modify-write."""
PIECE_PATIENCE_S: Final = 0.1
"""So long the connection waits for a piece: for a flush or a page of the map, as opposed to space."""
SMALL_LEFTOVER_BYTES: Final = 4096

SLICE_S: Final = 0.0015
"""So long one connection may work before the others get their turn."""
SPIN_TRIES: Final = 40
"""Empty recv() calls (about 0.7 us each) before waiting: a client that waits for our reply usually
has its next request here sooner than epoll could tell."""
SPIN_TURNS: Final = 1
"""Where an export acknowledges later, others get their turn so often instead, before the connection waits."""
SPIN_GIVE_UP: Final = 8
"""After so many fruitless spins in a row the connection waits at once."""
QUICK_WAKE_S: Final = 0.000_15
"""Data that came so soon after the connection went to sleep speaks for spinning again."""
COMPLAINT_PAUSE_S: Final = 1.0
LEAST_PARTING_S: Final = 0.2
"""So long a client of a server that drains gets to close its end, whatever the grace."""

_NEVER: Final = -1  # a size that no range is inside of


class _After(enum.Enum):
    """Why a pass ended."""

    HUNGRY = enum.auto()  # only a part of a request is left
    FULL = enum.auto()  # the arena must leave first
    NO_ROOM = enum.auto()  # too much in flight
    LONG_READ = enum.auto()  # a READ that is answered in chunks
    LONG_WRITE = enum.auto()  # a WRITE whose payload is taken in pieces, or thrown away
    DISCONNECT = enum.auto()
    GARBAGE = enum.auto()


class Connection:
    """Serves one accepted socket, which it owns and closes."""

    def __init__(
        self,
        sock: socket.socket,
        client: Client,
        exports: Exports,
        limits: Limits,
        workshop: Workshop,
        *,
        tls: TlsFiles | None = None,
        tls_required: bool = False,
        takeovers: Mapping[int, Takeover] = MappingProxyType({}),
        resumed: Suspended | None = None,
    ) -> None:
        self.peer = client.peer
        self.shaking = resumed is None
        """Whether its handshake goes on."""
        self.counters = Counters()
        self.export_name: str | None = None
        self.taken_over = False
        """It isn't NBD any more (``nbd.takeover``)."""
        self.ended = trio.Event()
        """Set when nothing of it is under way any more."""
        self._sock: socket.socket | TlsSocket = sock
        self._exports = exports
        self._limits = limits
        self._workshop = workshop
        self._session = Session()
        self._export: Export
        self._lender: LendsReads | None = None
        self._later: Later | None = None
        self._context: Context  # of the main task, by which exports tell clients apart
        self._nursery: trio.Nursery
        self._resumed = resumed
        self._entered = False  # the fence
        self._draining = False
        self._suspending = False
        self._left = False  # the client has, or is not to be served any longer
        self._leave_by = math.inf  # deadline for reading the socket
        self._scope = trio.CancelScope()
        self._whole = trio.CancelScope()
        self._patience = trio.CancelScope()  # with what is under way, when the server is replaced
        self._cut_at = math.inf  # the same, for what can be cut short
        self._waiting = False  # for the client, with nothing left to do

        self._bench: Bench | None = None
        self._start = 0  # the inbox holds unhandled bytes from here
        self._end = 0  # to here
        self._arena_used = 0
        self._backlog = memoryview(b"")  # received already, and to be handled before what the socket has
        self._parked: list[tuple[int, int, memoryview, bool]] = []  # cookie, offset, data, fua
        self._long: LongWrite | None = None
        self._long_read: LongRead | None = None
        self._taken_back = b""  # of the payload of ``_long``, received before what is in the inbox
        self._unfinished: list[Work] = []  # of what was cut short

        self._inflight = 0
        self._inflight_bytes = 0
        self._room = trio.Event()

        self._outbox = Outbox(sock, client.peer, self._finish_task)
        self._deliver = self._outbox.deliver
        self._reception = Reception(
            sock, client, exports, self._outbox, tls=tls, tls_required=tls_required, takeovers=takeovers
        )

        self._alone = True
        self._fruitless = 0
        self._slice_end = 0.0
        self._quiet_until = 0.0

    # --- life ---

    async def enter(self) -> None:
        """Open the export of a connection that goes on; raises OSError if it isn't the one that it was.

        All that go on together enter before the first of them runs: the fence must know each by then.
        """
        resumed = self._resumed
        assert resumed is not None
        export = await self._exports.acquire(resumed.export, self.client)
        if self._exports.identity(export) != resumed.identity:
            self._exports.release(export)
            raise OSError(errno.ESTALE, f"{resumed.export} is not what it was")
        self._export = export
        self._enter()
        self.export_name = resumed.export
        self.counters = resumed.counters
        self._session = resumed.session
        self._backlog = memoryview(resumed.input)
        self._long, self._long_read = resumed.writing, resumed.reading

    async def run(self) -> Suspended | None:
        """Serve until the client leaves, breaks the protocol, ``drain`` ends it, or ``suspend`` stops it.

        Stopped, it returns what it needs to go on, with the socket; else the socket is closed.
        """
        export: Export | None = self._export if self._resumed is not None else None
        suspended: Suspended | None = None
        try:
            with self._whole:
                if export is None:
                    agreed = await self._shake_hands()
                    self.shaking = False
                    if isinstance(agreed, TakenOver):
                        await self._give_away(agreed)
                    else:
                        export = agreed
                if export is not None:
                    suspended = await self._serve(export)
        finally:
            self.ended.set()
            self._leave_fence()
            if self._bench is not None:
                self._workshop.give(self._bench)
            if self._workshop.last_active is self:
                self._workshop.last_active = None
            if suspended is None:
                self._sock.close()
            if export is not None:
                self._exports.release(export)
        return suspended

    async def _serve(self, export: Export) -> Suspended | None:
        """The transmission phase."""
        resumed = self._resumed
        if resumed is None:
            self._export = export
            self.export_name = export.name
            self._backlog = memoryview(self._reception.leftover())
            self._enter()
        if self._suspending and isinstance(self._sock, TlsSocket):
            self._suspending = False
            self.drain(LEAST_PARTING_S)
        does = "goes on with" if resumed else "attached to"
        log.info("%s: %s %s%s", self.peer, does, export.name, self._reception.secured_how)
        if isinstance(export, LendsReads):
            self._lender = export
        if isinstance(export, AcknowledgesLater):
            self._later = Later(export, self._acknowledged)
            self._context = copy_context()
        abandoned = 0
        with self._patience:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if resumed is not None:
                    self._begin_again(resumed)
                try:
                    with trio.CancelScope(deadline=self._leave_by) as self._scope:
                        await self._transmit()
                    if not self._suspending:
                        # What is in flight may finish, but a client that doesn't read can't hold us.
                        self._outbox.leave_by(trio.current_time() + self._limits.linger_s)
                    if self._later is not None:
                        await self._later.none_left()
                    self._patience.deadline = min(self._patience.deadline, self._cut_at)
                finally:
                    if self._later is not None:
                        # The nursery, into which an acknowledgement may start tasks, is surely open only to here.
                        abandoned = self._later.abandon()
        if abandoned and self._suspending:
            log.warning("%s: dropped: %s acknowledged %d requests too late", self.peer, export.name, abandoned)
            self._left = self._draining = True
            self._leave_by = trio.current_time()
        if self._suspending and not self._left and not self._outbox.gone:
            # No checkpoint since the last of its tasks has ended, so nothing changes any more.
            try:
                return self._written_down(export, self._exports.identity(export))
            except OSError as error:
                log.warning("%s: dropped: nobody can go on with %s: %s", self.peer, export.name, error)
        self._leave_fence()
        if self._draining and not self._outbox.broken:
            await self._part()
        log.info("%s: left %s", self.peer, export.name)
        return None

    def _begin_again(self, resumed: Suspended) -> None:
        """Send what was left to be sent, and start the requests that were cut short anew."""
        tasks: dict[str, Callable[..., Awaitable[None]]] = {
            "read": self._slow_read,
            "long read": self._slow_long_read,
            "write": self._slow_write,
            "long write": self._slow_long_write,
            "flush": self._slow_flush,
            "command": self._slow_command,
        }
        if resumed.output:
            self._outbox.begin_with(resumed.output)
            self._nursery.start_soon(self._outbox.send_beginning)
        for work in resumed.work:
            self._start_task(work.length, work.requests)
            self._nursery.start_soon(tasks[work.kind], *work.arguments)

    def _written_down(self, export: Export, identity: str) -> Suspended:
        assert self._bench is not None and isinstance(self._sock, socket.socket)
        held = bytes(self._bench.inbox[self._start : self._end])
        parked = [Work("write", (cookie, at, bytes(data), fua), 1, len(data)) for cookie, at, data, fua in self._parked]
        return Suspended(
            sock=self._sock,
            peer=self.peer,
            export=export.name,
            identity=identity,
            session=self._session,
            counters=self.counters,
            input=self._taken_back + held + bytes(self._backlog),
            output=self._outbox.unsent(),
            work=(*self._unfinished, *parked),
            writing=self._long,
            reading=self._long_read,
        )

    def _enter(self) -> None:
        self._workshop.fence.enter(self._export, self._sock, self)
        self._entered = True

    def _leave_fence(self) -> None:
        if self._entered:
            self._entered = False
            self._workshop.fence.leave(self._export, self._sock)

    @property
    def client(self) -> Client:
        """Who it is, as far as is known by now."""
        return self._reception.client

    @property
    def tls_version(self) -> str:
        """Such as ``TLSv1.3``; empty without TLS."""
        return self._reception.tls_version

    def cut(self) -> None:
        """End it at once, answering nothing more. Synchronous; ``ended`` tells when it is done."""
        self._left = True
        self._whole.cancel()

    def suspend(self, patience_s: float, later_s: float = 0.0) -> None:
        """Stop at a request boundary; what is under way, and a handshake, gets ``patience_s`` to end.

        ``later_s``, where that is longer: for what an export that acknowledges later has been given.
        """
        if isinstance(self._outbox.sock, TlsSocket):
            # Its keys can't be handed over.
            self.drain(patience_s)
            return
        until = trio.current_time() + patience_s
        self._suspending = True
        self._cut_at = until
        owed_until = max(until, trio.current_time() + later_s) if self._later else until
        self._patience.deadline = min(self._patience.deadline, owed_until)
        if self.taken_over:
            self._scope.cancel()
        elif self.export_name is None:
            self._leave_by = until
            self._scope.deadline = min(self._scope.deadline, until)
        elif self._waiting:
            self._scope.cancel()

    @property
    def stays(self) -> bool:
        """Whether `run` will return what it needs to go on, once the storage has let go of it."""
        return self._suspending and self.export_name is not None and not self._left and not self._outbox.gone

    def drain(self, grace_s: float) -> None:
        """Read no more, and leave when what was read is done; refuse options of a handshake for ``grace_s``."""
        self._draining = True
        self._reception.shut_down()
        self._leave_by = trio.current_time() + grace_s
        self._scope.deadline = min(self._scope.deadline, self._leave_by)
        if self._waiting or self.taken_over:
            # It owes nothing, so it can be cancelled. Should it have been woken already, it sees `_draining`.
            self._scope.cancel()

    async def _part(self) -> None:
        """Let the client see the end behind our last reply, and wait until it has closed its end."""
        deadline = max(self._leave_by, trio.current_time() + LEAST_PARTING_S)
        sink = bytearray(64 << 10)
        with trio.move_on_at(deadline):
            try:
                self._sock.shutdown(socket.SHUT_WR)
                while True:
                    try:
                        if not self._sock.recv_into(sink):
                            return
                    except BlockingIOError:
                        await trio.lowlevel.wait_readable(self._sock)
                    else:
                        await trio.lowlevel.checkpoint()
            except OSError as error:
                log.debug("%s: %s", self.peer, error)

    # --- handshake ---

    async def _shake_hands(self) -> Export | TakenOver | None:
        deadline = min(trio.current_time() + self._limits.handshake_timeout_s, self._leave_by)
        with trio.CancelScope(deadline=deadline) as self._scope:
            try:
                agreed = await self._reception.run()
            finally:
                self._sock = self._reception.sock
            self._session = self._reception.session
            return agreed
        if self._suspending:
            log.info("%s: dropped: its handshake did not end before the server was replaced", self.peer)
        elif not self._draining:
            log.warning("%s: dropped: no handshake in %g s", self.peer, self._limits.handshake_timeout_s)
        return None

    async def _give_away(self, agreed: TakenOver) -> None:
        """Let another protocol have the connection until it is done, or the server ends it."""
        if self._draining or self._suspending:
            return
        log.info("%s: taken over%s", self.peer, self._reception.secured_how)
        with trio.CancelScope() as self._scope:
            # From here on `drain` and `suspend` cancel it.
            self.taken_over = True
            try:
                await agreed.takeover.run(self._sock, self.client, agreed.data, agreed.received)
            except* OSError as errors:
                error = _first(errors)
                log.warning("%s: its connection ended: %s", self.peer, error.strerror or error)
            return
        log.info("%s: its connection is closed, for the server stops or is replaced", self.peer)

    # --- the main task ---

    async def _transmit(self) -> None:
        self._bench = self._workshop.take()
        self._slice_end = perf_counter() + SLICE_S
        if self._long is not None and not await self._take_long_write():
            return
        if self._long_read is not None:
            await self._give_long_read()
        while True:
            after = self._work()
            if self._arena_used:
                await self._send_arena()
            if self._parked:
                await self._release_parked()
            if self._outbox.broken:
                return
            if perf_counter() > self._slice_end:
                await self._yield()
            if after is _After.HUNGRY:
                if not await self._receive():
                    if self._end > self._start and self._left:
                        log.info("%s: closed in the middle of a request", self.peer)
                    return
            elif after is _After.NO_ROOM:
                await self._wait_for_room()
            elif after is _After.LONG_READ:
                await self._give_long_read()
            elif after is _After.LONG_WRITE:
                if not await self._take_long_write():
                    return
            elif after is not _After.FULL:
                self._left = True
                return

    async def _yield(self) -> None:
        await trio.lowlevel.checkpoint()
        self._woke()

    def _woke(self) -> None:
        self._alone = self._workshop.last_active is self
        self._workshop.last_active = self
        self._slice_end = perf_counter() + SLICE_S

    async def _receive(self) -> bool:
        """Append what the socket has to the inbox; False at its end, or where no more is to be read.

        Waits, giving the bench back.
        """
        bench = self._bench
        assert bench is not None
        held = self._end - self._start
        if self._start and (held <= SMALL_LEFTOVER_BYTES or INBOX_BYTES - self._end < INBOX_BYTES // 8):
            bench.inbox[:held] = bench.inbox[self._start : self._end]
            self._start, self._end = 0, held
        if self._backlog:
            count = min(len(self._backlog), INBOX_BYTES - self._end)
            bench.inbox[self._end : self._end + count] = self._backlog[:count]
            self._backlog = self._backlog[count:]
            self._end += count
            return True
        if self._reads_no_more():
            return False
        spins = self._alone and self._fruitless < SPIN_GIVE_UP
        tries = SPIN_TRIES if spins and not self._inflight else 1
        turns = SPIN_TURNS if spins and self._inflight and self._later is not None else 0
        view = bench.inbox[self._end :]
        assert view, "a part of a request always leaves room for the rest"
        receive = self._sock.recv_into
        while True:
            for _ in range(tries):
                try:
                    count = receive(view)
                except BlockingIOError:
                    continue
                except OSError as error:
                    tell_lost(self.peer, error)
                    self._left = True
                    return False
                self._end += count
                self._fruitless = 0
                self._left = not count
                return count > 0
            if turns:
                # What was handed over may be acknowledged in others' turns, and then the client goes on at once.
                await self._yield()
                if self._reads_no_more():
                    return False
                turns = turns - 1 if self._inflight else 0
                tries = 1 if self._inflight else SPIN_TRIES
                if turns or not self._inflight:
                    continue
                self._fruitless += 1
            elif tries > 1:
                self._fruitless += 1
            tries = 1
            slept = perf_counter()
            if held <= SMALL_LEFTOVER_BYTES:
                kept = bytes(bench.inbox[self._start : self._end])
                self._bench = None
                self._workshop.give(bench)
                self._waiting = True
                try:
                    await trio.lowlevel.wait_readable(self._sock)
                finally:
                    self._waiting = False
                    bench = self._bench = self._workshop.take()
                    bench.inbox[:held] = kept
                    self._start, self._end = 0, held
                view = bench.inbox[held:]
            else:
                self._waiting = True
                try:
                    await trio.lowlevel.wait_readable(self._sock)
                finally:
                    self._waiting = False
            if self._reads_no_more():
                return False
            fruitless = self._fruitless
            if fruitless and perf_counter() - slept < QUICK_WAKE_S:
                fruitless -= 1
            try:
                count = receive(view)
            except BlockingIOError:
                continue
            except OSError as error:
                tell_lost(self.peer, error)
                self._left = True
                return False
            finally:
                self._woke()
            self._fruitless = fruitless
            self._end += count
            self._left = not count
            return count > 0

    def _reads_no_more(self) -> bool:
        return self._draining or self._suspending

    def _work(self) -> _After:
        """Handle every complete request in the inbox, without a checkpoint.

        Fills the arena (``_arena_used``), starts tasks for what waits, and leaves in ``_parked``
        the writes that would block: their views into the inbox are valid until the next receive.
        """
        bench = self._bench
        assert bench is not None
        inbox, arena = bench.inbox, bench.arena
        export = self._export
        session = self._session
        extended = session.extended
        structured = session.structured and not extended
        request_bytes, unpack, unpack_all, magic, read_head, write_head, header = form_of(session)
        write_fua_head = write_head | wire.FUA_BIT
        write_heads = (write_head, write_fua_head)
        lender = self._lender
        pack_simple, simple_head = wire.SIMPLE_REPLY.pack_into, wire.SIMPLE_HEAD
        pack_data, data_head = wire.DATA_CHUNK.pack_into, wire.DATA_HEAD
        pack_extended, extended_head = wire.EXTENDED_DATA_CHUNK.pack_into, wire.EXTENDED_DATA_HEAD
        # The quick paths are for what needs no further thought; `judge` decides about all else.
        plain = export.minimum_block_size == 1
        size = export.size_bytes if plain else _NEVER
        writable_size = _NEVER if export.read_only else size
        write_limit = payload_limit(export)
        read_limit = min(write_limit, CHUNK_BYTES if session.structured else INLINE_READ_BYTES)

        later = self._later
        writes: list[tuple[int, memoryview]] = []
        cookies: list[int] = []
        fua: list[int] = []  # indices into writes
        syncs: list[tuple[int, int]] = []  # cookie and offset of what is to be answered after one flush
        trims: list[tuple[int, int]] = []
        trim_cookies: list[int] = []
        position, end, used = self._start, self._end, 0
        reads = read_bytes = 0
        after = _After.HUNGRY

        while end - position >= request_bytes:
            head, cookie, offset, length = unpack(inbox, position)

            if head == read_head and 0 < length <= read_limit and offset + length <= size:
                if used and used + length > BATCH_BYTES:
                    after = _After.FULL
                    break
                lent = lender.lend_reads() if lender is not None else None
                read_now = lent or export.read_now
                reads_before, bytes_before = reads, read_bytes
                whole = (end - position) // request_bytes * request_bytes
                for head, cookie, offset, length in unpack_all(inbox[position : position + whole]):
                    if (
                        head != read_head
                        or not 0 < length <= read_limit
                        or offset + length > size
                        or (used and used + length > BATCH_BYTES)
                    ):
                        break
                    data = used + header
                    try:
                        done = read_now(offset, length, arena[data : data + length])
                    except OSError as error:
                        if lent is None:
                            reply = self._failed(cookie, offset, error)
                            arena[used : used + len(reply)] = reply
                            used += len(reply)
                            position += request_bytes
                            continue
                        done = False
                    if not done:
                        if not self._has_room(length):
                            after = _After.NO_ROOM
                            break
                        self._start_task(length)
                        self._nursery.start_soon(self._slow_read, cookie, offset, length)
                        position += request_bytes
                        continue
                    if structured:
                        pack_data(arena, used, data_head, cookie, length + 8, offset)
                    elif extended:
                        pack_extended(arena, used, extended_head, cookie, offset, length + 8, offset)
                    else:
                        pack_simple(arena, used, simple_head, cookie)
                    used = data + length
                    position += request_bytes
                    reads += 1
                    read_bytes += length
                if lent is not None:
                    assert lender is not None
                    lender.took_reads(reads - reads_before, read_bytes - bytes_before)
                if after is _After.NO_ROOM:
                    break
                continue

            if head in write_heads and 0 < length <= write_limit:
                payload = position + request_bytes
                if offset + length <= writable_size and payload + length <= end:
                    if len(writes) == BATCH_WRITES or used > BATCH_BYTES:
                        after = _After.FULL
                        break
                    if later is not None and not self._has_room_later(len(writes), payload + length - self._start):
                        after = _After.NO_ROOM
                        break
                    if head == write_fua_head:
                        if self._inflight + len(fua) + len(syncs) >= self._limits.inflight_requests:
                            after = _After.NO_ROOM
                            break
                        fua.append(len(writes))
                    position = payload + length
                    writes.append((offset, inbox[payload:position]))
                    cookies.append(cookie)
                    continue

            if used > BATCH_BYTES:
                after = _After.FULL
                break
            command, flags = head & 0xFFFF, head >> 16 & 0xFFFF
            if head >> 32 != magic:
                log.warning("%s: dropped: not an NBD request (magic %#010x)", self.peer, head >> 32)
                after = _After.GARBAGE
                break
            if command == wire.CMD_DISC:
                after = _After.DISCONNECT
                break
            payload = payload_bytes(session, command, flags, length)
            if is_absurd(session, payload):
                log.warning("%s: dropped: a request announces a payload of %d bytes", self.peer, payload)
                after = _After.GARBAGE
                break
            contexts = session.contexts
            is_filter = bool(payload) and may_filter(session, command, payload)
            verdict = 0 if is_filter else judge(session, export, command, flags, offset, length)
            if payload:
                begin = position + request_bytes
                if begin + payload > end:
                    if verdict or request_bytes + payload > INBOX_BYTES:
                        self._long = LongWrite(cookie, flags, offset, payload, verdict, payload)
                        position = begin
                        after = _After.LONG_WRITE
                    break
                if is_filter:
                    narrowed = narrow(session, bytes(inbox[begin : begin + payload]))
                    if narrowed is None:
                        verdict = wire.EINVAL
                    else:
                        length, contexts = narrowed
                        flags ^= wire.CMD_FLAG_PAYLOAD_LEN
                        verdict = judge(session, export, command, flags, offset, length)
                elif not verdict:
                    # Only where a minimum block size keeps writes off the quick path.
                    self._long = LongWrite(cookie, flags, offset, payload, 0, payload)
                    position = begin
                    after = _After.LONG_WRITE
                    break
                position += payload
            if verdict:
                reply = failure(session, cookie, offset, verdict)
                self.counters.requests += 1
                self.counters.errors += 1
            elif command == wire.CMD_READ and length == 0:
                reply = read_header(session, cookie, offset, 0)
                reads += 1
            elif length == 0 and command != wire.CMD_FLUSH and not flags & wire.CMD_FLAG_FUA:
                reply = success(session, cookie, offset)
                self._count(command)
            elif command == wire.CMD_READ and session.structured and not flags:
                self._long_read = LongRead(cookie, offset, length, 0)
                position += request_bytes
                after = _After.LONG_READ
                break
            else:
                room = length if command == wire.CMD_READ else 0
                if self._inflight + len(fua) + len(syncs) >= self._limits.inflight_requests or not self._has_room(room):
                    after = _After.NO_ROOM
                    break
                if command == wire.CMD_TRIM and not flags and length:
                    # Discarding a large volume is thousands of requests: as a batch they cost the storage one.
                    trims.append((offset, length))
                    trim_cookies.append(cookie)
                    position += request_bytes
                    if len(trims) == BATCH_TRIMS:
                        after = _After.FULL
                        break
                    continue
                if command == wire.CMD_FLUSH or length == 0:
                    self._count(command)
                    syncs.append((cookie, offset))
                else:
                    self._start_task(room)
                    if command == wire.CMD_READ:
                        self._nursery.start_soon(self._slow_read, cookie, offset, length)
                    else:
                        self._nursery.start_soon(self._slow_command, cookie, command, flags, offset, length, contexts)
                reply = b""
            position += request_bytes
            arena[used : used + len(reply)] = reply
            used += len(reply)

        if writes:
            used = self._write_batch(writes, cookies, fua, syncs, used)
        if trims:
            used = self._trim_batch(trims, trim_cookies, used)
        if syncs:
            self._start_task(0, len(syncs))
            self._nursery.start_soon(self._slow_flush, syncs)
        counters = self.counters
        counters.requests += reads
        counters.reads += reads
        counters.read_bytes += read_bytes
        self._start = position
        self._arena_used = used
        return after

    def _write_batch(
        self,
        writes: list[tuple[int, memoryview]],
        cookies: list[int],
        fua: list[int],
        syncs: list[tuple[int, int]],
        used: int,
    ) -> int:
        """Write a pass's writes; returns how much of the arena is used when their replies are in it."""
        bench = self._bench
        assert bench is not None
        arena = bench.arena
        try:
            if self._others_gone():
                done = False
            elif self._later is None:
                done = self._export.write_now(writes)
            else:
                length = sum([len(data) for _, data in writes])
                batch = Batch(wire.CMD_WRITE, cookies, self._echoed(writes), fua, length)
                done = self._later.write(writes, batch)
                if done:
                    self._start_task(length, len(cookies))
                    return used
        except OSError as error:
            # One of them is bad. Alone, each of the others may still succeed.
            if len(writes) == 1:
                reply = self._failed(cookies[0], writes[0][0], error)
                arena[used : used + len(reply)] = reply
                return used + len(reply)
            done = False
        marked = frozenset(fua)
        if not done:
            self._parked = [
                (cookie, offset, data, index in marked)
                for index, (cookie, (offset, data)) in enumerate(zip(cookies, writes, strict=True))
            ]
            return used
        length = 0
        for _, data in writes:
            length += len(data)
        self._count_writes(len(writes), length)
        if marked:
            syncs += [(cookies[index], writes[index][0]) for index in fua]
            cookies = [cookie for index, cookie in enumerate(cookies) if index not in marked]
            writes = [write for index, write in enumerate(writes) if index not in marked]
        return pack_successes(self._session, arena, used, cookies, writes)

    def _trim_batch(self, trims: list[tuple[int, int]], cookies: list[int], used: int) -> int:
        """Trim a pass's ranges at once, or give each a task; returns how much of the arena is used."""
        bench = self._bench
        assert bench is not None
        try:
            if self._others_gone():
                done = False
            elif self._later is None:
                done = self._export.trim_now(trims)
            else:
                done = self._later.trim(trims, Batch(wire.CMD_TRIM, cookies, self._echoed(trims), [], 0))
                if done:
                    self._start_task(0, len(cookies))
                    return used
        except OSError:
            done = False  # alone, each tells its own error
        if not done:
            for cookie, (offset, length) in zip(cookies, trims, strict=True):
                self._start_task(0)
                self._nursery.start_soon(self._slow_command, cookie, wire.CMD_TRIM, 0, offset, length, ())
            return used
        self.counters.requests += len(trims)
        self.counters.trims += len(trims)
        return pack_successes(self._session, bench.arena, used, cookies, trims)

    def _echoed(self, ranges: Sequence[tuple[int, object]]) -> list[tuple[int, None]]:
        # Not the views beside them: each would keep its whole inbox.
        return [(offset, None) for offset, _ in ranges] if self._session.extended else []

    def _acknowledged(self, batch: Batch, error: OSError | None) -> None:
        """The export is done with a batch. In whatever task that was found out, a bug here must not end that."""
        try:
            self._answer(batch, error)
        except Exception:
            log.exception("%s: a bug ended this connection", self.peer)
            self.cut()

    def _answer(self, batch: Batch, error: OSError | None) -> None:
        cookies, asked = batch.cookies, batch.asked
        self._finish_task(0, batch.length)
        if error is not None:
            offsets = [offset for offset, _ in asked] or repeat(0)
            failed = [self._failed(cookie, offset, error) for cookie, offset in zip(cookies, offsets, strict=False)]
            self._post(b"".join(failed), len(cookies))
            return
        if batch.command == wire.CMD_TRIM:
            self.counters.requests += len(cookies)
            self.counters.trims += len(cookies)
        else:
            self._count_writes(len(cookies), batch.length)
        if batch.fua:
            waiting = [(cookies[index], asked[index][0] if asked else 0) for index in batch.fua]
            self._context.run(self._nursery.start_soon, self._slow_flush, waiting)
            marked = frozenset(batch.fua)
            cookies = [cookie for index, cookie in enumerate(cookies) if index not in marked]
            asked = [one for index, one in enumerate(asked) if index not in marked]
        if cookies:
            replies = memoryview(bytearray(len(cookies) * success_bytes(self._session)))
            pack_successes(self._session, replies, 0, cookies, asked)
            self._post(replies, len(cookies))

    def _post(self, replies: bytes | memoryview, requests: int) -> None:
        if self._outbox.post(replies, requests, 0):
            self._nursery.start_soon(self._outbox.send_beginning)

    def _count_writes(self, requests: int, length: int) -> None:
        counters = self.counters
        counters.requests += requests
        counters.writes += requests
        counters.written_bytes += length

    def _count(self, command: int) -> None:
        counters = self.counters
        counters.requests += 1
        if command == wire.CMD_FLUSH:
            counters.flushes += 1
        elif command == wire.CMD_TRIM:
            counters.trims += 1
        elif command == wire.CMD_WRITE_ZEROES:
            counters.zeroes += 1
        elif command == wire.CMD_WRITE:
            counters.writes += 1
        else:
            counters.other += 1

    def _complain(self, error: OSError) -> None:
        """Log a failure of the storage, but not a hundred thousand a second."""
        if perf_counter() >= self._quiet_until:
            self._quiet_until = perf_counter() + COMPLAINT_PAUSE_S
            what = str(error) if str(self.export_name) in str(error) else f"{self.export_name}: {error}"
            log.error("%s: %s (%d errors so far)", self.peer, what, self.counters.errors)

    def _failed(self, cookie: int, asked: int, error: OSError, *, fast_zero: bool = False) -> bytes:
        self.counters.requests += 1
        self.counters.errors += 1
        value = error_value(error, fast_zero=fast_zero)
        if value in (wire.EIO, wire.ENOMEM):
            self._complain(error)
        # Batched replies have a bounded place in the arena, so the message stays short.
        return failure(self._session, cookie, asked, value, (error.strerror or "")[:200])

    async def _release_parked(self) -> None:
        """Give the writes that would have blocked copies of their payload, and tasks.

        One task for all whole blocks, which wait for nothing but room: they stay together, so that the store can write
        them together. What may have to be merged waits for reads of its own, and gets a task of its own.
        """
        parked, self._parked = self._parked, []
        block = self._export.preferred_block_size
        together: list[tuple[int, int, bytes]] = []
        at = 0
        try:
            await self._keep_apart()
            for cookie, offset, data, fua in parked:
                while not self._has_room(len(data)):
                    self._start_together(together)
                    together = []
                    await self._wait_for_room()
                self._start_task(len(data))
                if fua or (offset | len(data)) % block:
                    self._nursery.start_soon(self._slow_write, cookie, offset, bytes(data), fua)
                else:
                    together.append((cookie, offset, bytes(data)))
                at += 1
        finally:
            self._start_together(together)
            self._unfinished += [
                Work("write", (cookie, offset, bytes(data), fua), 1, len(data))
                for cookie, offset, data, fua in parked[at:]
            ]

    def _start_together(self, writes: list[tuple[int, int, bytes]]) -> None:
        if writes:
            self._nursery.start_soon(self._slow_writes, writes)

    async def _give_long_read(self) -> None:
        """Answer a READ chunk by chunk; what would block, and all after it, is left to a task."""
        long = self._long_read
        assert long is not None
        tell = teller_of(self._export)
        end = long.offset + long.length
        while long.done < long.length:
            # The bench may have been another's while the last chunk waited for its client.
            assert self._bench is not None
            arena = self._bench.arena
            at, used = long.offset + long.done, 0
            try:
                for start, stop, is_hole in next_pieces(tell, at, end):
                    encode = hole if is_hole else data_header
                    header = encode(self._session, long.cookie, long.offset, start, stop - start, done=stop == end)
                    arena[used : used + len(header)] = header
                    used += len(header)
                    if not is_hole:
                        if not self._export.read_now(start, stop - start, arena[used : used + stop - start]):
                            break
                        used += stop - start
                else:
                    at = stop
            except OSError as error:
                self._long_read = None
                await self._reply_alone(self._failed(long.cookie, long.offset, error))
                return
            if at == long.offset + long.done:
                while not self._has_room(end - at):
                    await self._wait_for_room()
                self._start_task(end - at)
                self._nursery.start_soon(self._slow_long_read, long.cookie, long.offset, long.length, at)
                self._long_read = None
                return
            # From here on the chunks are the outbox's, sent or not.
            long.done = at - long.offset
            if at == end:
                self._long_read = None
            self._arena_used = used
            await self._send_arena()
            if self._outbox.broken:
                return
            if perf_counter() > self._slice_end:
                await self._yield()
        self.counters.requests += 1
        self.counters.reads += 1
        self.counters.read_bytes += long.length

    async def _take_long_write(self) -> bool:
        """Write a payload piece by piece as it arrives, or throw it away; False where no more arrives."""
        long = self._long
        assert long is not None
        while long.left:
            have = min(self._end - self._start, long.left)
            if have < long.left and (have == 0 if long.error else have < PIECE_BYTES):
                if not await self._receive():
                    self._say_cut_short()
                    return False
                continue
            error = long.error
            if not error:
                if have < long.left:
                    have = (long.offset + have) // PIECE_ALIGNMENT * PIECE_ALIGNMENT - long.offset
                assert self._bench is not None
                with trio.move_on_after(PIECE_PATIENCE_S) as patience:
                    data = self._bench.inbox[self._start : self._start + have]
                    error = await self._write_piece(long.offset, data)
                if patience.cancelled_caught:
                    # Part of the piece may be written: then it is written again, which nobody can tell.
                    return await self._park_long_write(long)
            self._start += have
            long.error = error
            long.offset += have
            long.left -= have
            if perf_counter() > self._slice_end:
                await self._yield()
        reply = await self._long_reply(long)
        self._long = None
        await self._reply_alone(reply)
        return True

    async def _park_long_write(self, long: LongWrite) -> bool:
        """Take in what is left of a WRITE that has to wait, and give it a task; False where no more arrives."""
        rest = long.left
        while not self._has_room(rest):
            await self._wait_for_room()
        self._start_task(rest)
        data = bytearray()
        try:
            while len(data) < rest:
                if self._start == self._end and not await self._receive():
                    self._say_cut_short()
                    return False
                have = min(self._end - self._start, rest - len(data))
                assert self._bench is not None
                data += self._bench.inbox[self._start : self._start + have]
                self._start += have
                if perf_counter() > self._slice_end:
                    await self._yield()
            self._long = None
        finally:
            # Also where it is cut short with the last byte taken in.
            if self._long is not None:
                self._taken_back = bytes(data)
                self._finish_task(1, rest)
        self._nursery.start_soon(
            self._slow_long_write, long.cookie, long.flags, long.offset, memoryview(data), long.length
        )
        return True

    async def _slow_long_write(
        self, cookie: int, flags: int, offset: int, data: memoryview | bytes, length: int
    ) -> None:
        """Write what was left of a WRITE of `length` bytes."""
        data = memoryview(data)
        at = error = 0

        def left() -> Work:
            return Work("long write", (cookie, flags, offset + at, data[at:], length), 1, len(data) - at)

        with Kept(self._unfinished, left()) as kept:
            while at < len(data) and not error:
                start = offset + at
                end = min(offset + len(data), (start + PIECE_BYTES) // PIECE_ALIGNMENT * PIECE_ALIGNMENT)
                error = await self._write_piece(start, data[at : end - offset])
                if not error:
                    at = end - offset
                    kept.work = left()
                await trio.lowlevel.checkpoint()
            reply = await self._long_reply(LongWrite(cookie, flags, offset + len(data), 0, error, length))
        await self._deliver(reply, 1, len(data))

    async def _long_reply(self, long: LongWrite) -> bytes:
        """All of a long WRITE is written, or the request failed: flush if it wants that, count it, and answer."""
        error = long.error
        if not error and long.flags & wire.CMD_FLAG_FUA:
            try:
                await self._export.flush()
            except OSError as failed:
                error = error_value(failed)
        if error:
            self.counters.requests += 1
            self.counters.errors += 1
            return failure(self._session, long.cookie, long.asked, error)
        self._count_writes(1, long.length)
        return success(self._session, long.cookie, long.asked)

    async def _write_piece(self, offset: int, data: memoryview) -> int:
        # The volume may have shrunk since the last piece.
        error = judge_range(self._session, self._export, wire.CMD_WRITE, offset, len(data))
        if error:
            return error
        try:
            await self._keep_apart()
            if self._later is not None or not self._export.write_now([(offset, data)]):
                await self._export.write(offset, data)
        except OSError as failed:
            value = error_value(failed)
            if value in (wire.EIO, wire.ENOMEM):
                self._complain(failed)
            return value
        return 0

    def _say_cut_short(self) -> None:
        if self._left:
            log.info("%s: closed in the middle of a WRITE", self.peer)

    # --- the fence ---

    def _others_gone(self) -> bool:
        """Whether `_keep_apart` has something to do. No checkpoint between a False and the write that it allows."""
        return bool(self._workshop.fence.gone(self._export, self))

    async def _keep_apart(self) -> None:
        """End connections that their client has shut down, before something is written for this one: `nbd.fence`."""
        for other in self._workshop.fence.gone(self._export, self):
            other.cut()
            await other.ended.wait()

    # --- what is in flight ---

    def _has_room(self, length: int) -> bool:
        if self._inflight >= self._limits.inflight_requests:
            return False
        return not self._inflight or self._inflight_bytes + length <= self._limits.inflight_bytes

    def _has_room_later(self, writes: int, taken: int) -> bool:
        """Whether a batch of so many writes may get one more, to which the inbox is taken for so many bytes."""
        inflight, limits = self._inflight + writes, self._limits
        if not inflight:
            return True
        return inflight < limits.inflight_requests and self._inflight_bytes + taken <= limits.inflight_bytes

    def _start_task(self, length: int, requests: int = 1) -> None:
        self._inflight += requests
        self._inflight_bytes += length

    def _finish_task(self, requests: int, length: int) -> None:
        self._inflight -= requests
        self._inflight_bytes -= length
        self._room.set()

    async def _wait_for_room(self) -> None:
        self._room = trio.Event()
        if self._inflight:
            await self._room.wait()
        self._woke()

    async def _slow_read(self, cookie: int, offset: int, length: int) -> None:
        header = read_header(self._session, cookie, offset, length)
        reply = memoryview(bytearray(len(header) + length))
        reply[: len(header)] = header
        done = 0
        try:
            with Kept(self._unfinished, Work("read", (cookie, offset, length), 1, length)):
                while done < length:
                    piece = min(length - done, INLINE_READ_BYTES)
                    into = reply[len(header) + done : len(header) + done + piece]
                    if not self._export.read_now(offset + done, piece, into):
                        await self._export.read(offset + done, piece, into)
                    done += piece
                    if done < length:
                        await trio.lowlevel.checkpoint()
        except OSError as error:
            await self._deliver(self._failed(cookie, offset, error), 1, length)
            return
        self.counters.requests += 1
        self.counters.reads += 1
        self.counters.read_bytes += length
        await self._deliver(reply, 1, length)

    async def _slow_long_read(self, cookie: int, asked: int, length: int, offset: int) -> None:
        """Answer a READ from ``offset`` to its end, a chunk for each piece, as soon as that has been read."""

        def left() -> Work:
            return Work("long read", (cookie, asked, length, offset), 1, end - offset)

        export, end = self._export, asked + length
        held = end - offset
        tell = teller_of(export)
        try:
            with Kept(self._unfinished, left()) as kept:
                while True:
                    # One piece at a time: what the export said of the next one would be old by then.
                    start, offset, is_hole = next_pieces(tell, offset, end, INLINE_READ_BYTES)[0]
                    encode = hole if is_hole else data_header
                    header = encode(self._session, cookie, asked, start, offset - start, done=offset == end)
                    reply = memoryview(bytearray(len(header) + (0 if is_hole else offset - start)))
                    reply[: len(header)] = header
                    into = reply[len(header) :]
                    if into and not export.read_now(start, len(into), into):
                        await export.read(start, len(into), into)
                    if offset == end:
                        break
                    # From here on the chunk is the outbox's, sent or not.
                    kept.work = left()
                    await self._deliver(reply, 0, 0)
                    await trio.lowlevel.checkpoint()
        except OSError as error:
            await self._deliver(self._failed(cookie, asked, error), 1, held)
            return
        self.counters.requests += 1
        self.counters.reads += 1
        self.counters.read_bytes += length
        await self._deliver(reply, 1, held)

    async def _slow_write(self, cookie: int, offset: int, data: bytes, fua: bool) -> None:
        try:
            with Kept(self._unfinished, Work("write", (cookie, offset, data, fua), 1, len(data))):
                await self._export.write(offset, data)
        except OSError as error:
            reply = self._failed(cookie, offset, error)
        else:
            self._count_writes(1, len(data))
            if fua:
                # From here on others may read it and write over it, so whoever goes on only flushes.
                self._finish_task(0, len(data))
                return await self._slow_flush([(cookie, offset)])
            reply = success(self._session, cookie, offset)
        await self._deliver(reply, 1, len(data))

    async def _slow_writes(self, writes: list[tuple[int, int, bytes]]) -> None:
        """Writes of whole blocks: the first waits for room, then all that there is room for go with one call."""
        at = 0
        try:
            while at < len(writes):
                cookie, offset, data = writes[at]
                at += 1  # from here on it keeps itself
                await self._slow_write(cookie, offset, data, fua=False)
                rest = writes[at:]
                try:
                    done = bool(rest) and await self._write_rest(
                        [(offset, memoryview(data)) for _, offset, data in rest]
                    )
                except OSError:
                    done = False  # one of them is bad: alone, each of the others may still succeed
                if done:
                    at = len(writes)
                    length = sum(len(data) for _, _, data in rest)
                    self._count_writes(len(rest), length)
                    replies = [success(self._session, cookie, offset) for cookie, offset, _ in rest]
                    await self._deliver(b"".join(replies), len(rest), length)
        finally:
            self._unfinished += [
                Work("write", (cookie, offset, data, False), 1, len(data)) for cookie, offset, data in writes[at:]
            ]

    async def _write_rest(self, writes: list[tuple[int, memoryview]]) -> bool:
        """Write all of them with one call; False if that can't be now."""
        if self._later is None:
            return self._export.write_now(writes)
        return await self._later.write_and_wait(writes)

    async def _slow_flush(self, waiting: Sequence[tuple[int, int]]) -> None:
        """One flush for a pass's FLUSH requests and for its FUA writes, which are already written."""
        try:
            with Kept(self._unfinished, Work("flush", (tuple(waiting),), len(waiting))):
                await self._export.flush()
        except OSError as error:
            value = error_value(error)
            self.counters.errors += len(waiting)  # as requests they are counted already
            self._complain(error)
            text = error.strerror or ""
            reply = b"".join([failure(self._session, cookie, asked, value, text) for cookie, asked in waiting])
        else:
            reply = b"".join([success(self._session, cookie, asked) for cookie, asked in waiting])
        await self._deliver(reply, len(waiting), 0)

    async def _slow_command(
        self, cookie: int, command: int, flags: int, offset: int, length: int, contexts: Contexts
    ) -> None:
        """``contexts``: those that a BLOCK_STATUS is about."""
        export = self._export
        reply = success(self._session, cookie, offset)
        try:
            with Kept(self._unfinished, Work("command", (cookie, command, flags, offset, length, contexts))):
                if command in (wire.CMD_TRIM, wire.CMD_WRITE_ZEROES):
                    await self._keep_apart()
                if command == wire.CMD_TRIM:
                    await export.trim(offset, length)
                elif command == wire.CMD_WRITE_ZEROES:
                    no_hole, fast = bool(flags & wire.CMD_FLAG_NO_HOLE), bool(flags & wire.CMD_FLAG_FAST_ZERO)
                    await export.write_zeroes(offset, length, no_hole=no_hole, fast=fast)
                elif command == wire.CMD_CACHE:
                    await export.cache(offset, min(length, CACHE_BYTES))
                else:
                    only_one = bool(flags & wire.CMD_FLAG_REQ_ONE)
                    limit = extent_limit(contexts, only_one=only_one)
                    statuses = [
                        (number, await self._extents(context, offset, length, limit)) for number, context in contexts
                    ]
                    reply = block_status(self._session, cookie, offset, statuses, length=length, only_one=only_one)
        except OSError as error:
            reply = self._failed(cookie, offset, error, fast_zero=bool(flags & wire.CMD_FLAG_FAST_ZERO))
        else:
            self._count(command)
            if flags & wire.CMD_FLAG_FUA and command in (wire.CMD_TRIM, wire.CMD_WRITE_ZEROES):
                return await self._slow_flush([(cookie, offset)])
        await self._deliver(reply, 1, 0)

    async def _extents(self, context: str, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        export = self._export
        if context == wire.META_ALLOCATION:
            return await export.extents(offset, length, limit)
        try:
            if isinstance(export, OffersContexts):
                return await export.context_extents(context, offset, length, limit)
        except FileNotFoundError as error:
            raise OSError(errno.EINVAL, error.strerror or f"the context {context} is gone") from error
        raise OSError(errno.EINVAL, f"the export has no context {context} any more")

    # --- sending ---

    async def _reply_alone(self, reply: bytes) -> None:
        """The main task's own answer, outside of a pass. It waits its turn: else nothing would bound such answers."""
        assert self._bench is not None
        self._bench.arena[: len(reply)] = reply
        self._arena_used = len(reply)
        await self._send_arena()

    async def _send_arena(self) -> None:
        """Send the arena's replies; when this returns the arena may be used again."""
        used, self._arena_used = self._arena_used, 0
        assert self._bench is not None
        if await self._outbox.send_arena(self._bench.arena[:used]):
            self._woke()


def _first(errors: BaseExceptionGroup[OSError]) -> OSError:
    """One of a group, which may have groups in it."""
    found = errors.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found
