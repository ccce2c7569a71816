"""The bytes between two nodes: sending that never waits, and an inbox that frames are taken from.

`Stream.send` may be called from any synchronous code. What the socket takes at once has left when it returns; the rest
is kept, in order, and one task (`send_rest`) sees to it. Nothing here bounds what is kept: whoever sends asks
`backlog_bytes` first, or bounds what it sends in another way. The data aren't copied, so they must not change.

One task sends, one receives. A connection that breaks is told to both: each of them raises the OSError.
"""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Final

import trio

from nbd.tls import TlsSocket

__all__ = ["Inbox", "Stream", "gone"]

LEAST_ROOM_BYTES: Final = 64 << 10
"""Receiving into less than this is worth moving what is left in the inbox first."""


def gone(peer: str) -> OSError:
    """A connection that ended where something was still due."""
    return ConnectionResetError(errno.ECONNRESET, f"the connection to {peer} is gone")


def _named(error: OSError, peer: str) -> OSError:
    return OSError(error.errno or errno.EIO, f"the connection to {peer} broke: {error.strerror or error}")


@dataclass
class Traffic:
    """Bytes between this node and another one, without what TLS adds."""

    sent_bytes: int = 0
    received_bytes: int = 0


class Stream:
    """A connected, non-blocking socket, with TLS or without. Closing it is the owner's business, or `close`."""

    def __init__(self, sock: socket.socket | TlsSocket, *, peer: str, traffic: Traffic | None = None) -> None:
        """`traffic`: where its bytes are counted too."""
        self.peer = peer
        self.traffic = traffic or Traffic()
        self.backlog_bytes = 0
        """Sent, and not taken by the socket yet."""
        self.broken: OSError | None = None
        self.woke_at = perf_counter()
        """When whoever receives has let others go before it."""
        self._sock = sock
        self._backlog: deque[memoryview] = deque()
        self._wake = trio.Event()
        self._push = self._sock.send
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send, now or as soon as the socket takes it. Never waits, never raises: `broken` tells."""
        if self.broken is not None:
            return
        left = memoryview(data)
        self.traffic.sent_bytes += len(left)
        if not self._backlog:
            try:
                while left:
                    left = left[self._push(left) :]
                return
            except BlockingIOError:
                # With TLS the same bytes have to come again: they are the first of the backlog.
                pass
            except OSError as error:
                self._break(error)
                return
        self._backlog.append(left)
        self.backlog_bytes += len(left)
        self._wake.set()

    def _break(self, error: OSError) -> None:
        self.broken = _named(error, self.peer)
        self._backlog.clear()
        self.backlog_bytes = 0
        self._wake.set()
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # so that whoever receives wakes up

    async def send_rest(self) -> None:
        """The task that sends what the socket didn't take at once. Ends only by raising OSError, or cancelled."""
        while True:
            if self.broken is not None:
                raise self.broken
            if not self._backlog:
                self._wake = trio.Event()
                await self._wake.wait()
                continue
            await self._wait(trio.lowlevel.wait_writable)
            self._send_some()

    async def _wait(self, wait: Callable[[int], Awaitable[None]]) -> None:
        try:
            await wait(self._sock.fileno())
        except (trio.ClosedResourceError, ValueError):  # closed meanwhile, or before
            raise self.broken or gone(self.peer) from None

    def _send_some(self) -> None:
        backlog = self._backlog
        try:
            while backlog:
                sent = self._push(backlog[0])
                self.backlog_bytes -= sent
                if sent == len(backlog[0]):
                    backlog.popleft()
                else:
                    backlog[0] = backlog[0][sent:]
        except BlockingIOError:
            pass
        except OSError as error:
            self._break(error)

    async def drained(self) -> None:
        """Wait until the socket has taken all; raises OSError. Only where nobody runs `send_rest`."""
        while self._backlog:
            await self._wait(trio.lowlevel.wait_writable)
            self._send_some()
        if self.broken is not None:
            raise self.broken

    async def receive(self, into: memoryview) -> int:
        """At least a byte, as much as is there; 0 is the end. Raises OSError. Waits only if nothing is there."""
        while True:
            if self.broken is not None:
                raise self.broken
            try:
                count = self._sock.recv_into(into)
                self.traffic.received_bytes += count
                return count
            except BlockingIOError:
                await self._wait(trio.lowlevel.wait_readable)
                self.woke_at = perf_counter()
            except OSError as error:
                raise self.broken or _named(error, self.peer) from None

    async def rest(self) -> None:
        """Let others go before whoever receives."""
        await trio.lowlevel.checkpoint()
        self.woke_at = perf_counter()

    def shutdown_send(self) -> None:
        """Nothing more will be sent; what the peer sends can still be received."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    async def part(self) -> None:
        """Let the peer read what was sent last: a close with something unread could overtake it. For a scope to bound.

        Only where nobody else sends or receives any more.
        """
        try:
            await self.drained()
            self.shutdown_send()
            scratch = memoryview(bytearray(LEAST_ROOM_BYTES))
            while await self.receive(scratch):
                await trio.lowlevel.checkpoint()
        except OSError:
            pass

    def close(self) -> None:
        """Synchronous; a second call does nothing."""
        if self._sock.fileno() >= 0:
            self.broken = self.broken or gone(self.peer)
            self._wake.set()
            trio.lowlevel.notify_closing(self._sock.fileno())
            self._sock.close()


class Inbox:
    """Received bytes, of which a part is left: those from `start` to `end` of `view`."""

    def __init__(self, size_bytes: int, received: bytes = b"") -> None:
        size_bytes = max(size_bytes, len(received))
        self.buffer = bytearray(size_bytes)
        self.view = memoryview(self.buffer)
        self.view[: len(received)] = received
        self.start = 0
        self.end = len(received)

    def __len__(self) -> int:
        return self.end - self.start

    async def fill(self, stream: Stream, wanted: int) -> bool:
        """Receive once. `wanted`: so many bytes from `start` on are to fit. False at the end of the stream."""
        if self.start == self.end:
            self.start = self.end = 0
        elif len(self.buffer) - self.start < wanted or len(self.buffer) - self.end < LEAST_ROOM_BYTES:
            have = self.end - self.start
            self.view[:have] = self.view[self.start : self.end]
            self.start, self.end = 0, have
        count = await stream.receive(self.view[self.end :])
        self.end += count
        return bool(count)
