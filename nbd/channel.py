"""An NBD connection that a data path drives by itself, and that outlives its server.

``nbd.client`` has a task and an event for each call, which costs more than the request. A ``Channel``
has neither: ``submit`` queues a request, ``push`` sends what is queued with one call to the kernel, and
when the answer is there the request's ``done`` is called. All of it is synchronous; what waits is
``run``, with one task that receives and one that sends what the socket didn't take at once.

The server may die
    Then requests wait, and ``run`` dials until somebody answers. Whatever has no answer is sent again,
    in its first order. That is right for a server that never loses what it has acknowledged, as long
    as the host lives (``terraced`` on the same host), under two conditions. A request that was carried
    out already may be carried out again: all that is sent here is the same when done twice. And no
    copy of an earlier connection may be carried out late, behind what was written since: a server
    closes the socket of a connection when all of its requests have ended, or dies with them, and this
    side never leaves a connection that the server still holds, except for good.

Bounds
    None of its own but the receive buffer: the caller bounds what it submits, with ``inflight`` and
    ``inflight_bytes``. A WRITE's payload must not change until its ``done``.

Who is it?
    ``dial`` must make sure that it is the same export as before, and raise ``GoneError`` if it never
    will be again: then the channel is over, and every request fails with that error's errno. So does a
    server that breaks the protocol: connecting anew could break the second condition.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import trio

from nbd import wire
from nbd.negotiate import Terms
from nbd.replies import errno_of

__all__ = ["Channel", "Dial", "Done", "GoneError"]

log = logging.getLogger("nbd.channel")

LONGEST_READ_BYTES: Final = 1 << 20
INBOX_BYTES: Final = 2 * LONGEST_READ_BYTES
"""A reply is handed over from here in one piece, so there must be room for the longest, and then some."""
BATCH_BUFFERS: Final = 512
FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 1.0
"""Between two attempts to reach a server that is gone: it costs nothing, and nobody notices."""
REMINDER_S: Final = 60.0
SPIN_TRIES: Final = 30
"""Empty recv() calls before waiting: with requests in flight the next reply is usually here sooner than epoll tells."""

_HEAD: Final = wire.SIMPLE_REPLY.size
_MAGIC: Final = wire.SIMPLE_REPLY_MAGIC
_ERROR_MASK: Final = 0xFFFFFFFF

Done = Callable[[int, int, memoryview], None]
"""Takes the request's token, an errno or 0, and a READ's data, which is only there during the call."""


class GoneError(OSError):
    """The export is another one, or none any more, for good; prints as its sentence alone."""

    def __str__(self) -> str:
        return str(self.args[1])


Dial = Callable[[], Awaitable[tuple[socket.socket, Terms]]]
"""A socket in transmission (``nbd.client.attach``). OSError: try again later; GoneError: never."""


@dataclass(slots=True, eq=False)
class _Request:
    header: bytes
    payload: bytes | memoryview
    expects: int  # bytes of data that a good reply carries
    done: Done
    token: int


class Channel:
    """One export, over one connection after another. All of it belongs to the trio thread."""

    def __init__(self, name: str, dial: Dial, *, patience_s: float = math.inf) -> None:
        """`patience_s`: without a server for so long, the channel is over, and requests fail with ETIMEDOUT."""
        self.terms = Terms(0, 0)
        """Of the present or last connection."""
        self.inflight_bytes = 0
        self.connected = False
        self._name = name
        self._dial = dial
        self._patience_s = patience_s
        self._cookie = 0
        self._requests: dict[int, _Request] = {}  # by cookie, in the order of their submission
        self._outbox: deque[bytes | memoryview] = deque()
        self._sock: socket.socket | None = None
        self._stuck = False  # the sender waits for the socket to take more
        self._wake_sender = trio.Event()
        self._over: OSError | None = None

    @property
    def inflight(self) -> int:
        """Requests without an answer yet."""
        return len(self._requests)

    # --- for the data path ---

    def submit(
        self, command: int, flags: int, offset: int, length: int, payload: bytes | memoryview, done: Done, token: int
    ) -> None:
        """Queue a request; ``push`` sends it. ``done`` may be called at once if the channel is over."""
        if self._over is not None:
            done(token, self._over.errno or errno.EIO, memoryview(b""))
            return
        self._cookie = cookie = self._cookie + 1
        header = wire.REQUEST.pack(wire.REQUEST_MAGIC << 32 | flags << 16 | command, cookie, offset, length)
        expects = length if command == wire.CMD_READ else 0
        assert expects <= LONGEST_READ_BYTES
        self._requests[cookie] = _Request(header, payload, expects, done, token)
        self.inflight_bytes += expects + len(payload)
        if self.connected:
            self._outbox.append(header)
            if payload:
                self._outbox.append(payload)

    def push(self) -> None:
        """Send what was queued, as far as the socket takes it; the sender sees to the rest."""
        if self._outbox and not self._stuck and not self._send_some():
            self._stuck = True
            self._wake_sender.set()

    def _send_some(self) -> bool:
        """False: the socket is full. One that is broken swallows all; the receiver notices.

        Nothing may follow half of a request, which the server would take for the rest of it. So whatever the error
        is (ENOBUFS is no end of a connection), nothing more is sent: the server answers what it has, and closes.
        """
        outbox, sock = self._outbox, self._sock
        while outbox and sock is not None:
            batch = list(outbox) if len(outbox) <= BATCH_BUFFERS else [outbox[i] for i in range(BATCH_BUFFERS)]
            try:
                sent = sock.sendmsg(batch)
            except BlockingIOError:
                return False
            except OSError as error:
                log.debug("%s: %s", self._name, error)
                outbox.clear()
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
                return True
            for part in batch:
                size = len(part)
                if sent < size:
                    break
                sent -= size
                outbox.popleft()
            if sent:
                outbox[0] = memoryview(outbox[0])[sent:]
        return True

    # --- its life ---

    async def run(self, *, task_status: trio.TaskStatus[Terms] = trio.TASK_STATUS_IGNORED) -> None:
        """Connect, and stay connected until cancelled. Raises what the first attempt raises.

        Says DISC when it is cancelled. Returns when the export is gone for good (``GoneError``), after
        failing everything; later requests fail at once.
        """
        sock, self.terms = await self._dial()
        task_status.started(self.terms)
        try:
            while True:
                with sock:
                    broken = await self._serve(sock)
                if broken is not None:
                    raise broken
                log.warning("%s: the connection is lost; trying again until it is back", self._name)
                sock, self.terms = await self._dial_again()
                log.info("%s: connected again; %d requests are sent again", self._name, len(self._requests))
        except GoneError as gone:
            log.error("%s: %s", self._name, gone)
            self._end(gone)
        finally:
            self._end(OSError(errno.ESHUTDOWN, "this client has left"))

    async def _serve(self, sock: socket.socket) -> GoneError | None:
        """Send and receive until this connection ends. Returns why there must be no other one, if so."""
        self._sock, self.connected, self._stuck = sock, True, False
        self._outbox.clear()
        for request in self._requests.values():
            self._outbox.append(request.header)
            if request.payload:
                self._outbox.append(request.payload)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send)
                self.push()
                broken = await self._receive(sock)
                nursery.cancel_scope.cancel()
            return broken
        except BaseException:
            self._say_goodbye(sock)
            raise
        finally:
            self._sock, self.connected = None, False
            self._outbox.clear()

    def _say_goodbye(self, sock: socket.socket) -> None:
        if self._outbox:
            return  # half of a request may have left
        try:
            os.write(sock.fileno(), wire.REQUEST.pack(wire.REQUEST_MAGIC << 32 | wire.CMD_DISC, self._cookie + 1, 0, 0))
        except OSError:
            return

    async def _dial_again(self) -> tuple[socket.socket, Terms]:
        pause_s = FIRST_PAUSE_S
        lost_s = told_s = trio.current_time()
        while True:
            await trio.sleep(pause_s)
            try:
                return await self._dial()
            except GoneError:
                raise
            except OSError as error:
                pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
                if trio.current_time() - lost_s >= self._patience_s:
                    raise GoneError(errno.ETIMEDOUT, f"no server for {self._patience_s:g} s; giving up") from None
                if trio.current_time() - told_s >= REMINDER_S:
                    told_s = trio.current_time()
                    waiting = len(self._requests)
                    log.warning("%s: still no connection, %d requests wait: %s", self._name, waiting, error)

    async def _send(self) -> None:
        while True:
            if not self._stuck:
                self._wake_sender = trio.Event()
                await self._wake_sender.wait()
            assert self._sock is not None
            await trio.lowlevel.wait_writable(self._sock)
            if self._send_some():
                self._stuck = False

    async def _receive(self, sock: socket.socket) -> GoneError | None:
        """Take answers until the connection ends, or until what comes is no answer: then that is returned."""
        inbox = memoryview(bytearray(INBOX_BYTES))
        start = end = 0
        receive, requests = sock.recv_into, self._requests
        unpack = wire.SIMPLE_REPLY.unpack_from
        while True:
            needed = _HEAD
            while end - start >= _HEAD:
                head, cookie = unpack(inbox, start)
                request = requests.get(cookie)
                if head >> 32 != _MAGIC or request is None:
                    # Nobody knows where the next reply begins, and the server may still carry out what it has:
                    # connecting anew would break the second condition.
                    return GoneError(errno.EPROTO, "the server sent what is no reply to any request")
                error = head & _ERROR_MASK
                expects = 0 if error else request.expects
                needed = _HEAD + expects
                if end - start < needed:
                    break
                data = inbox[start + _HEAD : start + needed]
                start += needed
                needed = _HEAD
                if error == wire.ESHUTDOWN:
                    continue  # it was not carried out, and the connection is about to end: as if there were no answer
                del requests[cookie]
                self.inflight_bytes -= request.expects + len(request.payload)
                request.done(request.token, errno_of(error) if error else 0, data)
            if start == end:
                start = end = 0
            elif start + needed > INBOX_BYTES or INBOX_BYTES - end < INBOX_BYTES // 8:
                inbox[: end - start] = inbox[start:end]
                start, end = 0, end - start
            tries = SPIN_TRIES if requests else 1
            while True:
                try:
                    count = receive(inbox[end:])
                except BlockingIOError:
                    tries -= 1
                    if not tries:
                        await trio.lowlevel.wait_readable(sock)
                        tries = 1
                    continue
                except OSError as error:
                    log.debug("%s: %s", self._name, error)
                    return None
                break
            if not count:
                return None
            end += count

    def _end(self, why: OSError) -> None:
        if self._over is not None:
            return
        self._over = why
        requests, self._requests = self._requests, {}
        self.inflight_bytes = 0
        for request in requests.values():
            request.done(request.token, why.errno or errno.EIO, memoryview(b""))
