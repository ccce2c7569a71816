"""An NBD client: many requests in flight over one connection.

    async with connect("nbd://127.0.0.1:10809/demo/vol", contexts=["base:allocation"]) as client:
        data = await client.read(0, 4096)
        await client.write(4096, data, fua=True)

Threads of control
    ``connect`` owns a nursery with two tasks: the sender alone writes the socket, the receiver alone
    reads it. A caller waits for room, leaves its request in the sender's queue, and waits for an
    event that the receiver sets. Any number of tasks may call at once.

Bounds
    ``ClientLimits``: requests in flight, and their bytes. Beyond them callers wait, in their order.
    What a call needs beyond the payload that one request may have, the client splits, so a call
    isn't atomic. The pieces are in flight together.

Cancellation
    A cancelled call leaves the connection as it is. A request that wasn't sent never is; one that
    was is left to the server, and its late reply is taken in and dropped. So a write that was
    cancelled may happen or not, in part, and until its last byte is sent it reads the caller's
    buffer: don't change that buffer as long as the connection lives.

Failure
    Every error is an ``OSError`` with a sentence and a true errno: that of the server's error value,
    EPROTO where the server breaks the protocol, ETIMEDOUT where the handshake takes too long,
    ECONNRESET where the server closes the connection, or what the kernel says. When the
    connection has failed, whoever waits and whoever asks later gets that error. There is no time
    limit for requests: a caller sets its own (``trio.fail_after``).

``nbd.replies`` and ``nbd.negotiate`` are the parts without IO.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import trio

from nbd import wire
from nbd.negotiate import Steps, Terms, inquire, negotiate
from nbd.replies import KEPT_EXTENTS, Pending, Replies
from nbd.uri import Address, parse_uri

__all__ = ["Address", "Client", "ClientLimits", "attach", "connect", "describe", "parse_uri"]

INBOX_BYTES: Final = 256 << 10
SEND_BUFFER_BYTES: Final = 1 << 20
"""Of a Unix socket that ``attach`` returns: a WRITE of 1 MiB should leave in one call."""
BATCH_BYTES: Final = 1 << 20
"""So much leaves with one call to the kernel."""
BATCH_BUFFERS: Final = 128
LONG_PIECE_BYTES: Final = 1 << 30
"""Of TRIM and WRITE_ZEROES, which have no payload. Servers exist that take 31 bits."""
MAX_STATUS_BYTES: Final = 0xFFFFFFFF

_COMMANDS: Final = {
    wire.CMD_READ: "READ",
    wire.CMD_WRITE: "WRITE",
    wire.CMD_FLUSH: "FLUSH",
    wire.CMD_TRIM: "TRIM",
    wire.CMD_CACHE: "CACHE",
    wire.CMD_WRITE_ZEROES: "WRITE_ZEROES",
    wire.CMD_BLOCK_STATUS: "BLOCK_STATUS",
}


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """What one connection may have under way."""

    handshake_timeout_s: float = 10.0  # from the name look-up to the first request
    inflight_requests: int = 128
    inflight_bytes: int = 64 << 20  # payload; one request alone may be longer


@asynccontextmanager
async def connect(
    address: str | Address,
    export: str | None = None,
    *,
    contexts: Sequence[str] = (),
    limits: ClientLimits | None = None,
) -> AsyncIterator[Client]:
    """Attach to an export for the length of the ``async with``.

    ``address`` is an NBD URI, a pair of host and port, or the path of a Unix socket. ``export`` goes
    before the URI's; the empty name is the server's default. ``contexts`` are asked for; see
    ``Client.contexts`` for those that the server has.

    Leaving says DISC to the server. Calls that other tasks have under way then fail with ESHUTDOWN.
    """
    limits = limits or ClientLimits()
    if isinstance(address, str):
        address, named = parse_uri(address)
        export = named if export is None else export
    export = export or ""
    peer = _peer(address, export)
    sock, terms = await _begin(address, export, partial(negotiate, export, contexts), limits.handshake_timeout_s)
    failure: Exception | None = None
    try:
        client = Client(sock, terms, peer, limits)
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
        sock.close()
    if failure is not None:
        raise failure


async def describe(address: Address, export: str, *, timeout_s: float = 10.0) -> Terms:
    """Size and flags of ``export`` now, without opening it. Raises as ``connect``."""
    sock, terms = await _begin(address, export, partial(inquire, export), timeout_s)
    sock.close()
    return terms


class Client:
    """One connection to an export; ``connect`` makes it. Offsets and lengths are in bytes.

    A range must lie inside the export and be aligned to ``minimum_block_size``, else EINVAL (ENOSPC for what
    writes), without asking the server. What the server doesn't advertise is ENOTSUP, and writing
    to a read-only export EROFS.
    """

    def __init__(self, sock: trio.socket.SocketType, terms: Terms, peer: str, limits: ClientLimits) -> None:
        self.terms = terms
        self.peer = peer
        self._sock = sock
        self._room = _Room(limits)
        self._replies = Replies(structured=terms.structured, context_ids=terms.contexts)
        self._requests: dict[int, _Request] = {}  # by cookie, until the reply is complete
        self._outbox: deque[_Request] = deque()
        self._wake_sender = trio.Event()
        self._sending = False
        self._cookie = 0
        self._failure: OSError | None = None

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

    def _has(self, flag: int) -> bool:
        return bool(self.terms.flags & flag)

    # --- requests ---

    async def read(self, offset: int, length: int) -> bytearray:
        """The bytes of the range."""
        self._check(wire.CMD_READ, offset, length)
        data = bytearray(length)
        await self._run(wire.CMD_READ, _pieces(offset, length, self.terms), into=memoryview(data))
        return data

    async def write(self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False) -> None:
        """Write; with ``fua`` it is durable when this returns. ``data`` must stay unchanged until then."""
        payload = memoryview(data).cast("B")
        self._check(wire.CMD_WRITE, offset, len(payload))
        await self._run_durably(wire.CMD_WRITE, _pieces(offset, len(payload), self.terms), fua, payload=payload)

    async def flush(self) -> None:
        """Make durable every write, trim and zeroing that had returned before the call."""
        self._need(wire.CMD_FLUSH, self.can_flush)
        await self._run(wire.CMD_FLUSH, [(0, 0)])

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Tell that the range isn't needed; what is read there afterwards is anything."""
        self._check(wire.CMD_TRIM, offset, length)
        self._need(wire.CMD_TRIM, self.can_trim)
        await self._run_durably(wire.CMD_TRIM, _pieces(offset, length, self.terms, LONG_PIECE_BYTES), fua)

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
        pieces = _pieces(offset, length, self.terms, LONG_PIECE_BYTES)
        await self._run_durably(wire.CMD_WRITE_ZEROES, pieces, fua, flags=flags)

    async def cache(self, offset: int, length: int) -> None:
        """Hint that the range will be read soon."""
        self._check(wire.CMD_CACHE, offset, length)
        self._need(wire.CMD_CACHE, self.can_cache)
        await self._run(wire.CMD_CACHE, _pieces(offset, length, self.terms))

    async def block_status(self, offset: int, length: int) -> dict[str, list[tuple[int, int]]]:
        """For each of ``contexts``: ``(length, flags)`` of consecutive extents from ``offset`` on.

        The answer to one request. At least one extent, none past the range, but they may end
        before it, and for each context elsewhere: ask again from there, or see ``extents``.
        """
        self._need(wire.CMD_BLOCK_STATUS, bool(self.terms.contexts))
        self._check(wire.CMD_BLOCK_STATUS, offset, length)
        if not length:
            raise self._error(errno.EINVAL, "BLOCK_STATUS of an empty range")
        longest = MAX_STATUS_BYTES // self.minimum_block_size * self.minimum_block_size
        (request,) = await self._run(wire.CMD_BLOCK_STATUS, [(offset, min(length, longest))])
        return {name: request.pending.extents[number] for number, name in self.terms.contexts.items()}

    async def extents(
        self, context: str, offset: int = 0, length: int | None = None
    ) -> AsyncIterator[tuple[int, int, int]]:
        """``(offset, length, flags)`` over the whole range (to the end, if None), equal neighbours merged.

        Every context is asked for, so connect with this one alone for a long walk. A context that
        the server doesn't have is ENOTSUP.
        """
        self._need(wire.CMD_BLOCK_STATUS, context in self.contexts)
        at = offset
        end = self.size_bytes if length is None else offset + length
        start, kind = at, -1
        while at < end:
            for span, flags in (await self.block_status(at, end - at))[context]:
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
        into: memoryview | None = None,
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
                data = payload[at : at + length] if payload is not None else memoryview(b"")
                place = into[at : at + length] if into is not None else memoryview(b"")
                waiting.append(await self._start(command, flags, offset, length, data, place))
                at += length
            while waiting:
                await waiting[0].answered.wait()
                last = [waiting.popleft()]
                failed = failed or (last[0] if last[0].pending.error else None)
        finally:
            for request in waiting:
                request.abandoned = True
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

    async def _start(
        self, command: int, flags: int, offset: int, length: int, payload: memoryview, into: memoryview
    ) -> _Request:
        weight = len(payload) + len(into)
        if command == wire.CMD_BLOCK_STATUS:
            weight = KEPT_EXTENTS * wire.DESCRIPTOR.size * len(self.terms.contexts)
        await self._room.take(weight)
        # No checkpoint from here on: the room is given back by the receiver, or here.
        if self._failure is not None:
            self._room.give(weight)
            raise OSError(self._failure.errno, self._failure.strerror)
        self._cookie += 1
        head = wire.REQUEST_MAGIC << 32 | flags << 16 | command
        header = wire.REQUEST.pack(head, self._cookie, offset, length)
        request = _Request(Pending(self._cookie, command, offset, length, into), header, payload, weight)
        self._requests[self._cookie] = request
        self._outbox.append(request)
        self._wake_sender.set()
        return request

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
                await _send_all(self._sock, batch)
                self._sending = False
                batch.clear()  # the buffers are the callers'
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
            if request.abandoned:
                self._finish(request)
                continue
            self._replies.expect(request.pending)
            batch.append(memoryview(request.header))
            if request.payload:
                batch.append(request.payload)
            total += len(request.header) + len(request.payload)
            request.payload = memoryview(b"")
        return batch

    async def _receive(self) -> None:
        inbox = memoryview(bytearray(INBOX_BYTES))
        replies = self._replies
        try:
            while True:
                sink = replies.sink()
                count, *_ = await self._sock.recvmsg_into([sink, inbox] if sink else [inbox])
                if not count:
                    raise self._error(errno.ECONNRESET, "the server closed the connection")
                direct = min(count, len(sink))
                if direct:
                    self._finish_all(replies.filled(direct))
                self._finish_all(replies.feed(inbox[: count - direct]))
        except OSError as error:
            self._fail(error)

    def _finish_all(self, answered: list[Pending]) -> None:
        for pending in answered:
            self._finish(self._requests[pending.cookie])

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
        # The server shall know at once, not when the caller leaves the context.
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _leave(self) -> None:
        """Say goodbye, if that takes no waiting. Synchronous, as a cancelled caller leaves this way too."""
        if self._failure is None:
            if not self._sending:
                head = wire.REQUEST_MAGIC << 32 | wire.CMD_DISC
                with suppress(OSError):
                    os.write(self._sock.fileno(), wire.REQUEST.pack(head, self._cookie + 1, 0, 0))
            self._fail(self._error(errno.ESHUTDOWN, "this client has left"))


@dataclass(slots=True, eq=False)
class _Request:
    """A request from its start to its reply."""

    pending: Pending
    header: bytes
    payload: memoryview
    weight: int  # what it takes of the bytes in flight
    answered: trio.Event = field(default_factory=trio.Event)
    abandoned: bool = False  # nobody waits any more
    lost: OSError | None = None  # the connection failed under it


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


# --- sockets and the handshake ---


async def attach(
    address: Address, export: str, *, limits: ClientLimits | None = None
) -> tuple[socket.socket, Terms]:
    """A non-blocking socket that is in transmission, with simple replies, for who speaks the rest itself.

    The socket is the caller's, who closes it. Raises OSError with a sentence, as ``connect`` does.
    """
    limits = limits or ClientLimits()
    steps = partial(negotiate, export, (), structured=False)
    sock, terms = await _begin(address, export, steps, limits.handshake_timeout_s)
    family, kind = sock.family, sock.type
    own = socket.socket(family, kind, fileno=sock.detach())
    own.setblocking(False)
    if family == socket.AF_UNIX:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    return own, terms


def _peer(address: Address, export: str) -> str:
    return f"{address}/{export}" if isinstance(address, Path) else f"{address[0]}:{address[1]}/{export}"


async def _begin(
    address: Address, export: str, steps: Callable[[], Steps], timeout_s: float
) -> tuple[trio.socket.SocketType, Terms]:
    """A connected socket on which ``steps`` were taken."""
    peer = _peer(address, export)
    with trio.move_on_after(timeout_s):
        try:
            sock = await _open(address)
            try:
                return sock, await _shake_hands(sock, steps())
            except BaseException:
                sock.close()
                raise
        except OSError as error:
            number = errno.ECONNRESET if error.errno == errno.EPIPE else error.errno or errno.EINVAL
            raise OSError(number, f"{peer}: {error.strerror or error}") from None
    raise OSError(errno.ETIMEDOUT, f"{peer}: no connection within {timeout_s:g} s")


async def _open(address: Address) -> trio.socket.SocketType:
    """A connected socket; of a host's addresses the first that answers."""
    if isinstance(address, Path):
        return await _open_one(socket.AF_UNIX, str(address))
    host, port = address
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(errno.EHOSTUNREACH, f"can't find the host {host}: {error}") from None
    failed = OSError(errno.EHOSTUNREACH, f"the host {host} has no address")
    for family, _, _, _, target in found:
        try:
            return await _open_one(family, target)
        except OSError as error:
            failed = error
    raise failed


async def _open_one(family: int, target: object) -> trio.socket.SocketType:
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        await sock.connect(target)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    except BaseException:
        sock.close()
        raise
    return sock


async def _shake_hands(sock: trio.socket.SocketType, steps: Steps) -> Terms:
    answer: bytes | None = None
    while True:
        try:
            step = next(steps) if answer is None else steps.send(answer)
        except StopIteration as end:
            assert isinstance(end.value, Terms)
            return end.value
        if isinstance(step, int):
            answer = await _receive_exactly(sock, step)
        else:
            await _send_all(sock, [memoryview(step)])
            answer = b""


async def _receive_exactly(sock: trio.socket.SocketType, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = await sock.recv(length - len(data))
        if not part:
            raise OSError(errno.ECONNRESET, "the server closed the connection during the handshake")
        data += part
    return bytes(data)


async def _send_all(sock: trio.socket.SocketType, buffers: list[memoryview]) -> None:
    first = 0
    while first < len(buffers):
        sent = await sock.sendmsg(buffers[first:])
        while first < len(buffers) and sent >= len(buffers[first]):
            sent -= len(buffers[first])
            first += 1
        if sent:
            buffers[first] = buffers[first][sent:]
