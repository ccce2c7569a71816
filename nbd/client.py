"""An NBD client: many requests in flight over one connection.

    async with connect("nbd://127.0.0.1:10809/demo/vol", contexts=["base:allocation"]) as client:
        data = await client.read(0, 4096)
        await client.write(4096, data, fua=True)

Threads of control
    ``connect`` owns a nursery with two tasks: the sender alone writes the socket, the receiver alone
    reads it. A caller waits for room, leaves its request in the sender's queue, and waits for an
    event that the receiver sets. Any number of tasks may call at once.

Bounds
    ``ClientLimits``: requests in flight, and their bytes. Beyond them callers wait, in their order,
    and hold no buffer of ours. So a server that never answers costs no more than that, whatever is
    asked and given up. What a call needs beyond the payload that one request may have, the client
    splits, so a call isn't atomic. The pieces are in flight together.

Cancellation
    A cancelled call leaves the connection as it is. A request that wasn't sent never is; one that
    was is left to the server, keeps its room until it is answered, and its late reply is taken in and
    dropped. So a write that was cancelled may happen or not, in part, and until its last byte is sent
    it reads the caller's buffer: don't change that buffer as long as the connection lives.

Failure
    Every error is an ``OSError`` with a sentence and a true errno: that of the server's error value,
    EPROTO where the server breaks the protocol, ETIMEDOUT where the handshake takes too long,
    ECONNRESET where the server closes the connection, or what the kernel says. When the
    connection has failed, whoever waits and whoever asks later gets that error; ``failed`` waits for
    it. There is no time limit for requests: a caller sets its own (``trio.fail_after``). A host that is
    gone is noticed after ``ClientLimits.dead_after_s``.

``nbd.opening`` makes the connection, ``nbd.transport`` has its bytes; ``nbd.replies`` and
``nbd.negotiate`` are the parts without IO.
"""

from __future__ import annotations

import errno
import os
import ssl
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from nbd import wire
from nbd.negotiate import Terms, negotiate
from nbd.opening import ClientLimits, attach, begin, describe, peer_name
from nbd.replies import KEPT_EXTENTS, Pending, Replies
from nbd.transport import Transport
from nbd.uri import Address, TlsOptions, parse_target, parse_uri

__all__ = ["Address", "Client", "ClientLimits", "TlsOptions", "attach", "connect", "describe", "parse_uri"]

INBOX_BYTES: Final = 256 << 10
MUCH_BYTES: Final = 64 << 10
"""After so many the others have their turn before more is received. It isn't slower: meanwhile more comes."""
BATCH_BYTES: Final = 1 << 20
"""So much leaves with one call to the kernel."""
BATCH_BUFFERS: Final = 128
LONG_PIECE_BYTES: Final = 1 << 30
"""Of TRIM and WRITE_ZEROES, which have no payload, without extended headers. Servers exist that take 31 bits."""
MAX_STATUS_BYTES: Final = 0xFFFFFFFF

_NOTHING: Final = memoryview(b"")

_COMMANDS: Final = {
    wire.CMD_READ: "READ",
    wire.CMD_WRITE: "WRITE",
    wire.CMD_FLUSH: "FLUSH",
    wire.CMD_TRIM: "TRIM",
    wire.CMD_CACHE: "CACHE",
    wire.CMD_WRITE_ZEROES: "WRITE_ZEROES",
    wire.CMD_BLOCK_STATUS: "BLOCK_STATUS",
}


@asynccontextmanager
async def connect(
    address: str | Address,
    export: str | None = None,
    *,
    contexts: Sequence[str] = (),
    limits: ClientLimits | None = None,
    tls: TlsOptions | ssl.SSLContext | None = None,
) -> AsyncIterator[Client]:
    """Attach to an export for the length of the ``async with``.

    ``address`` is an NBD URI, a pair of host and port, or the path of a Unix socket. ``export`` goes
    before the URI's; the empty name is the server's default. ``contexts`` are asked for; see
    ``Client.contexts`` for those that the server has. ``tls`` goes before the URI's (nbds://, see ``nbd.uri``);
    where there is one the server must speak it: EPROTONOSUPPORT, EACCES if it doesn't want to, and EKEYREJECTED or
    EKEYEXPIRED for its certificate.

    Leaving says DISC to the server. Calls that other tasks have under way then fail with ESHUTDOWN.
    """
    limits = limits or ClientLimits()
    if isinstance(address, str):
        target = parse_target(address)
        address, tls = target.address, tls or target.tls
        export = target.export if export is None else export
    export = export or ""
    steps = partial(negotiate, export, contexts, tls=tls is not None)
    transport, terms = await begin(address, export, steps, limits, tls)
    failure: Exception | None = None
    try:
        client = Client(transport, terms, peer_name(address, export), limits)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client._receive)
            nursery.start_soon(client._send)
            try:
                yield client
            except Exception as error:
                failure = error  # raised behind the nursery, which would wrap it
            finally:
                client._leave()
                nursery.cancel_scope.cancel()
    finally:
        transport.close()
    if failure is not None:
        raise failure


class Client:
    """One connection to an export; ``connect`` makes it. Offsets and lengths are in bytes.

    A range must lie inside the export and be aligned to ``minimum_block_size``, else EINVAL (ENOSPC for what
    writes), without asking the server. What the server doesn't advertise is ENOTSUP, and writing
    to a read-only export EROFS.
    """

    def __init__(self, transport: Transport, terms: Terms, peer: str, limits: ClientLimits) -> None:
        self.terms = terms
        self.peer = peer
        self._transport = transport
        self._room = _Room(limits)
        self._replies = Replies(
            structured=terms.structured,
            contexts=terms.contexts,
            extended=terms.extended,
            minimum_block_size=terms.minimum_block_size,
        )
        self._requests: dict[int, _Request] = {}  # by cookie, until the reply is complete
        self._outbox: deque[_Request] = deque()
        self._wake_sender = trio.Event()
        self._sending = False
        self._cookie = 0
        self._takes_any_length = terms.extended  # until a request without payload was too long for it
        self._failure: OSError | None = None
        self._over = trio.Event()

    # --- what was agreed on ---

    @property
    def size_bytes(self) -> int:
        """As it was at the handshake."""
        return self.terms.size_bytes

    @property
    def flags(self) -> int:
        """The transmission flags as the server sent them."""
        return self.terms.flags

    @property
    def contexts(self) -> tuple[str, ...]:
        """Those of the contexts asked for that ``block_status`` answers for."""
        return tuple(self.terms.contexts.values())

    @property
    def minimum_block_size(self) -> int:
        return self.terms.minimum_block_size

    @property
    def preferred_block_size(self) -> int:
        return self.terms.preferred_block_size

    @property
    def maximum_payload(self) -> int:
        """Longer reads and writes are split."""
        return self.terms.maximum_payload

    @property
    def read_only(self) -> bool:
        return self._has(wire.READ_ONLY)

    @property
    def rotational(self) -> bool:
        return self._has(wire.ROTATIONAL)

    @property
    def can_flush(self) -> bool:
        return self._has(wire.SEND_FLUSH)

    @property
    def can_fua(self) -> bool:
        """False: ``fua`` is a flush after the request."""
        return self._has(wire.SEND_FUA)

    @property
    def can_trim(self) -> bool:
        return self._has(wire.SEND_TRIM)

    @property
    def can_write_zeroes(self) -> bool:
        return self._has(wire.SEND_WRITE_ZEROES)

    @property
    def can_fast_zero(self) -> bool:
        return self._has(wire.SEND_FAST_ZERO)

    @property
    def can_cache(self) -> bool:
        return self._has(wire.SEND_CACHE)

    @property
    def can_multi_conn(self) -> bool:
        """A flush on one connection covers the answered writes of all connections."""
        return self._has(wire.CAN_MULTI_CONN)

    @property
    def can_filter_contexts(self) -> bool:
        """``block_status`` of some of the contexts costs the server no more than these."""
        return self.terms.extended and self._has(wire.BLOCK_STATUS_PAYLOAD)

    @property
    def failure(self) -> OSError | None:
        """Why the connection has ended; None as long as it lives."""
        return self._failure

    async def failed(self) -> OSError:
        """Wait until the connection has ended, and return why; ESHUTDOWN if it was left."""
        await self._over.wait()
        assert self._failure is not None
        return self._failure

    def _has(self, flag: int) -> bool:
        return bool(self.terms.flags & flag)

    # --- requests ---

    async def read(self, offset: int, length: int) -> bytearray:
        """The bytes of the range."""
        self._check(wire.CMD_READ, offset, length)
        data = _Buffer(length)
        await self._run(wire.CMD_READ, self._pieces(offset, length), into=data)
        return data.bytes

    async def write(self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False) -> None:
        """Write; with ``fua`` it is durable when this returns. ``data`` must stay unchanged until then."""
        payload = memoryview(data).cast("B")
        self._check(wire.CMD_WRITE, offset, len(payload))
        await self._run_durably(wire.CMD_WRITE, self._pieces(offset, len(payload)), fua, payload=payload)

    async def flush(self) -> None:
        """Make durable every write, trim and zeroing that had returned before the call."""
        self._need(wire.CMD_FLUSH, self.can_flush)
        await self._run(wire.CMD_FLUSH, [(0, 0)])

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Tell that the range isn't needed; what is read there afterwards is anything."""
        self._check(wire.CMD_TRIM, offset, length)
        self._need(wire.CMD_TRIM, self.can_trim)
        await self._run_long(wire.CMD_TRIM, offset, length, fua=fua)

    async def write_zeroes(
        self, offset: int, length: int, *, no_hole: bool = False, fast: bool = False, fua: bool = False
    ) -> None:
        """Make the range read as zeroes. ``no_hole``: and keep space for it.

        ``fast``: fail with ENOTSUP where that is no faster than writing. Where the range is split, some of it may
        be zeroed then.
        """
        self._check(wire.CMD_WRITE_ZEROES, offset, length)
        self._need(wire.CMD_WRITE_ZEROES, self.can_write_zeroes and (self.can_fast_zero or not fast))
        flags = (wire.CMD_FLAG_NO_HOLE if no_hole else 0) | (wire.CMD_FLAG_FAST_ZERO if fast else 0)
        await self._run_long(wire.CMD_WRITE_ZEROES, offset, length, fua=fua, flags=flags)

    async def cache(self, offset: int, length: int) -> None:
        """Hint that the range will be read soon."""
        self._check(wire.CMD_CACHE, offset, length)
        self._need(wire.CMD_CACHE, self.can_cache)
        await self._run_long(wire.CMD_CACHE, offset, length)

    async def block_status(
        self, offset: int, length: int, contexts: Sequence[str] | None = None
    ) -> dict[str, list[tuple[int, int]]]:
        """For each of ``contexts`` (all, if None): ``(length, flags)`` of consecutive extents from ``offset`` on.

        The answer to one request. At least one extent, none past the range, but they may end
        before it, and for each context elsewhere: ask again from there, or see ``extents``. Flags have 64 bits
        with extended headers, else 32. A context that the server doesn't have is ENOTSUP.
        """
        names = self.contexts if contexts is None else tuple(dict.fromkeys(contexts))
        self._need(wire.CMD_BLOCK_STATUS, bool(names) and set(names) <= set(self.contexts))
        self._check(wire.CMD_BLOCK_STATUS, offset, length)
        if not length:
            raise self._error(errno.EINVAL, "BLOCK_STATUS of an empty range")
        if not self.terms.extended:
            length = min(length, MAX_STATUS_BYTES // self.minimum_block_size * self.minimum_block_size)
        wanted = {number: name for number, name in self.terms.contexts.items() if name in names}
        asked = frozenset(wanted) if self.can_filter_contexts and len(wanted) < len(self.terms.contexts) else None
        (request,) = await self._run(wire.CMD_BLOCK_STATUS, [(offset, length)], context_ids=asked)
        return {name: request.pending.extents[number] for number, name in wanted.items()}

    async def extents(
        self, context: str, offset: int = 0, length: int | None = None
    ) -> AsyncIterator[tuple[int, int, int]]:
        """``(offset, length, flags)`` over the whole range (to the end, if None), equal neighbours merged.

        Where the server can't be asked for one context (``can_filter_contexts``), it looks up all of them, so connect
        with this one alone for a long walk. A context that the server doesn't have is ENOTSUP.
        """
        self._need(wire.CMD_BLOCK_STATUS, context in self.contexts)
        at = offset
        end = self.size_bytes if length is None else offset + length
        start, kind = at, -1
        while at < end:
            for span, flags in (await self.block_status(at, end - at, [context]))[context]:
                if flags != kind:
                    if start < at:
                        yield start, at - start, kind
                    start, kind = at, flags
                at += span
        if start < at:
            yield start, at - start, kind

    # --- how a call becomes requests ---

    def _check(self, command: int, offset: int, length: int) -> None:
        writing = command in (wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES)
        what = f"{_COMMANDS[command]} of {length} bytes at {offset}"
        if writing and self.read_only:
            raise self._error(errno.EROFS, f"{what}: the export is read-only")
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            number = errno.ENOSPC if writing else errno.EINVAL
            raise self._error(number, f"{what}: outside the export of {self.size_bytes} bytes")
        if (offset | length) & (self.minimum_block_size - 1):
            raise self._error(errno.EINVAL, f"{what}: not aligned to blocks of {self.minimum_block_size} bytes")

    def _need(self, command: int, able: bool) -> None:
        if not able:
            raise self._error(errno.ENOTSUP, f"the server offers no {_COMMANDS[command]} of this kind")

    def _error(self, number: int, text: str) -> OSError:
        return OSError(number, f"{self.peer}: {text}")

    def _pieces(self, offset: int, length: int, longest: int = 0) -> Iterator[tuple[int, int]]:
        return _pieces(offset, length, self.terms, longest)

    async def _run_long(self, command: int, offset: int, length: int, *, fua: bool = False, flags: int = 0) -> None:
        """A request without payload: in one piece with extended headers, unless it is too much for the server.

        EOVERFLOW is how a server says so ("Size constraints" in the protocol text); it has done nothing then, and
        what it did in part may be done again.
        """
        if self._takes_any_length and length > self.terms.maximum_payload:
            try:
                await self._run_durably(command, [(offset, length)], fua, flags=flags)
                return
            except OSError as error:
                if error.errno != errno.EOVERFLOW:
                    raise
            self._takes_any_length = False
        shorter = self.terms.extended or command == wire.CMD_CACHE
        longest = self.terms.maximum_payload if shorter else LONG_PIECE_BYTES
        await self._run_durably(command, self._pieces(offset, length, longest), fua, flags=flags)

    async def _run_durably(
        self,
        command: int,
        pieces: Iterable[tuple[int, int]],
        fua: bool,
        *,
        flags: int = 0,
        payload: memoryview | None = None,
    ) -> None:
        """Run it, with FUA or with a flush behind it if it must be durable."""
        if fua and not self.can_fua:
            self._need(wire.CMD_FLUSH, self.can_flush)
        await self._run(command, pieces, flags | (wire.CMD_FLAG_FUA if fua and self.can_fua else 0), payload=payload)
        if fua and not self.can_fua:
            await self.flush()

    async def _run(
        self,
        command: int,
        pieces: Iterable[tuple[int, int]],
        flags: int = 0,
        *,
        payload: memoryview | None = None,
        into: _Buffer | None = None,
        context_ids: frozenset[int] | None = None,
    ) -> list[_Request]:
        """Send a request for each piece and wait until all are answered; raises the first error.

        After an error no further piece is sent. Returns the last request.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        waiting: deque[_Request] = deque()
        failed: _Request | None = None
        last: list[_Request] = []
        at = 0
        try:
            for offset, length in pieces:
                while waiting and waiting[0].answered.is_set():
                    last = [waiting.popleft()]
                    failed = failed or (last[0] if last[0].pending.error else None)
                if failed:
                    break
                weight = self._weight(command, length)
                await self._room.take(weight)
                # No checkpoint from here on: the room is given back by who finishes the request, or here.
                if self._failure is not None:
                    self._room.give(weight)
                    raise OSError(self._failure.errno, self._failure.strerror)
                pending = Pending(self._cookie + 1, command, offset, length, context_ids=context_ids)
                if into is not None:
                    pending.into = into.view()[at : at + length]
                data = payload[at : at + length] if payload is not None else _NOTHING
                waiting.append(self._start(pending, flags, data, weight))
                at += length
            while waiting:
                await waiting[0].answered.wait()
                last = [waiting.popleft()]
                failed = failed or (last[0] if last[0].pending.error else None)
        finally:
            for request in waiting:
                self._abandon(request)
        if failed:
            raise self._failed(failed)
        if not last:
            await trio.lowlevel.cancel_shielded_checkpoint()
        return last

    def _failed(self, request: _Request) -> OSError:
        pending = request.pending
        if request.lost is not None:
            return OSError(request.lost.errno, request.lost.strerror)
        said = pending.message or os.strerror(pending.error)
        what = _COMMANDS[pending.command]
        if pending.command != wire.CMD_FLUSH:
            what += f" of {pending.length} bytes at {pending.offset}"
        return self._error(pending.error, f"{what}: {said}")

    def _weight(self, command: int, length: int) -> int:
        """What a request takes of the bytes in flight."""
        if command == wire.CMD_BLOCK_STATUS:
            size = wire.EXTENDED_DESCRIPTOR.size if self.terms.extended else wire.DESCRIPTOR.size
            return KEPT_EXTENTS * size * len(self.terms.contexts)
        return length if command in (wire.CMD_READ, wire.CMD_WRITE) else 0

    def _start(self, pending: Pending, flags: int, payload: memoryview, weight: int) -> _Request:
        self._cookie += 1
        assert pending.cookie == self._cookie
        length = pending.length
        if pending.context_ids is not None:
            ids = b"".join(wire.U32.pack(number) for number in sorted(pending.context_ids))
            payload = memoryview(wire.STATUS_FILTER.pack(length) + ids)
            length = len(payload)
        header = self._header(pending.command, flags, pending.offset, length, len(payload))
        request = _Request(pending, header, payload, weight)
        self._requests[self._cookie] = request
        self._outbox.append(request)
        self._wake_sender.set()
        return request

    def _header(self, command: int, flags: int, offset: int, length: int, payload_bytes: int = 0) -> bytes:
        """Of the request with the last cookie."""
        if self.terms.extended:
            flags |= wire.CMD_FLAG_PAYLOAD_LEN if payload_bytes else 0
            head = wire.EXTENDED_REQUEST_MAGIC << 32 | flags << 16 | command
            return wire.EXTENDED_REQUEST.pack(head, self._cookie, offset, length)
        return wire.REQUEST.pack(wire.REQUEST_MAGIC << 32 | flags << 16 | command, self._cookie, offset, length)

    def _abandon(self, request: _Request) -> None:
        """Nobody waits any more: what wasn't sent won't be, and its room is free at once."""
        if not request.taken and not request.answered.is_set():
            self._outbox.remove(request)
            self._finish(request)

    # --- the two tasks ---

    async def _send(self) -> None:
        try:
            while True:
                while not self._outbox:
                    self._wake_sender = trio.Event()
                    await self._wake_sender.wait()
                batch = self._take_batch()
                # Between requests nothing is owed to the framing; `_leave` looks at this.
                self._sending = True
                await self._transport.send(batch)
                self._sending = False
                batch.clear()  # the buffers are the callers'
                if self._outbox:
                    await trio.lowlevel.checkpoint()  # the kernel may take all that there is, for long
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.ECONNRESET):
                # The server has closed, but may have said why: the receiver reads what is left, and then fails.
                self._failure = self._failure or self._error(errno.ECONNRESET, "the server closed the connection")
            else:
                self._fail(error)

    def _take_batch(self) -> list[memoryview]:
        batch: list[memoryview] = []
        total = 0
        while self._outbox and len(batch) < BATCH_BUFFERS - 1 and total < BATCH_BYTES:
            request = self._outbox.popleft()
            request.taken = True
            self._replies.expect(request.pending)
            batch.append(memoryview(request.header))
            if request.payload:
                batch.append(request.payload)
            total += len(request.header) + len(request.payload)
            request.payload = _NOTHING
        return batch

    async def _receive(self) -> None:
        inbox = memoryview(bytearray(INBOX_BYTES))
        replies, receive = self._replies, self._transport.receive
        try:
            while True:
                sink = replies.sink()
                count = await receive(sink, inbox)
                if not count:
                    raise self._error(errno.ECONNRESET, "the server closed the connection")
                direct = min(count, len(sink))
                if direct:
                    self._finish_all(replies.filled(direct))
                if count > direct:
                    self._finish_all(replies.feed(inbox[: count - direct]))
                if count >= MUCH_BYTES:
                    sink = _NOTHING  # it would hold on to a buffer that is the caller's now
                    await trio.lowlevel.checkpoint()
        except OSError as error:
            self._fail(error)

    def _finish_all(self, answered: list[Pending]) -> None:
        for pending in answered:
            # One that isn't there has failed with the connection, while its reply was on the way.
            if (request := self._requests.get(pending.cookie)) is not None:
                self._finish(request)

    def _finish(self, request: _Request) -> None:
        del self._requests[request.pending.cookie]
        self._room.give(request.weight)
        request.answered.set()

    def _fail(self, error: OSError) -> None:
        """The connection is over: whoever waits gets the error, and so does whoever asks later."""
        if self._failure is None:
            text = error.strerror or str(error)
            number = error.errno or errno.EIO
            prefixed = text.startswith(self.peer)
            self._failure = OSError(number, text) if prefixed else self._error(number, text)
        self._outbox.clear()
        for request in list(self._requests.values()):
            request.lost = self._failure
            request.pending.error = self._failure.errno or errno.EIO
            self._finish(request)
        self._over.set()
        # The server shall know at once, not when the caller leaves the context.
        self._transport.shutdown()

    def _leave(self) -> None:
        """Say goodbye, if that takes no waiting. Synchronous, as a cancelled caller leaves this way too."""
        if self._failure is None:
            if not self._sending:
                self._cookie += 1
                self._transport.send_now(self._header(wire.CMD_DISC, 0, 0, 0))
            self._fail(self._error(errno.ESHUTDOWN, "this client has left"))


@dataclass(slots=True, eq=False)
class _Request:
    """A request from its start to its reply."""

    pending: Pending
    header: bytes
    payload: memoryview
    weight: int  # what it takes of the bytes in flight
    answered: trio.Event = field(default_factory=trio.Event)
    taken: bool = False  # by the sender
    lost: OSError | None = None  # the connection failed under it


class _Buffer:
    """The bytes of a READ, made when there is room for them."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._bytes: bytearray | None = None

    @property
    def bytes(self) -> bytearray:
        if self._bytes is None:
            self._bytes = bytearray(self._length)
        return self._bytes

    def view(self) -> memoryview:
        return memoryview(self.bytes)


class _Room:
    """What may be in flight. Whoever comes first goes first, so that a long request isn't starved by short ones."""

    def __init__(self, limits: ClientLimits) -> None:
        self._limits = limits
        self._requests = 0
        self._bytes = 0
        self._door = trio.Lock()  # trio's locks are fair
        self._freed = trio.Event()

    async def take(self, size: int) -> None:
        await self._door.acquire()
        try:
            while not self._fits(size):
                self._freed = trio.Event()
                await self._freed.wait()
            self._requests += 1
            self._bytes += size
        finally:
            self._door.release()

    def _fits(self, size: int) -> bool:
        if not self._requests:
            return True
        enough = self._requests < self._limits.inflight_requests
        return enough and self._bytes + size <= self._limits.inflight_bytes

    def give(self, size: int) -> None:
        self._requests -= 1
        self._bytes -= size
        self._freed.set()


def _pieces(offset: int, length: int, terms: Terms, most: int = 0) -> Iterator[tuple[int, int]]:
    """Split a range: at most ``most`` bytes each (the longest payload, if 0), ending on preferred blocks."""
    longest = most or terms.maximum_payload
    end = offset + length
    while offset < end:
        stop = offset + longest
        if stop < end:
            aligned = stop // terms.preferred_block_size * terms.preferred_block_size
            stop = aligned if aligned > offset else stop
        stop = min(stop, end)
        yield offset, stop - offset
        offset = stop
