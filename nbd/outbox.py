"""The sending half of a connection: replies, in whatever order they become ready, through one writer.

One writer
    Replies go into a queue; whoever finds nobody sending becomes the sender and empties it (`_pump`).
    The main task sends its arena under the same flag, and does not touch the arena again before it
    has left.

Bounds
    The queue's are its connection's: `sent` gives back what a reply had taken of them.

Cut short
    A sender that is cancelled in mid-send leaves the socket at a place that only this object knows.
    What of that reply, and of all behind it, hasn't gone is in `unsent`: a successor that sends it
    first goes on where this one has stopped. Whoever can't do that must close the socket.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
from collections import deque
from collections.abc import Callable

import trio

from nbd.tls import TlsSocket

log = logging.getLogger("nbd.server")

JOINED_BYTES = 64 << 10
"""Short replies that wait leave together, up to this."""


class Outbox:
    """Owns the order of what is sent on `sock`, not the socket. ``sent(requests, bytes)``: so much has left."""

    def __init__(self, sock: socket.socket | TlsSocket, peer: str, sent: Callable[[int, int], None]) -> None:
        self.sock = sock
        """May be replaced while nothing is sent."""
        self.broken = False
        """Nothing more can be sent: the client is gone, or a send was cut short."""
        self.gone = False
        """The client is."""
        self._peer = peer
        self._sent = sent
        self._replies: deque[tuple[bytes | memoryview, int, int]] = deque()  # data, requests, bytes
        self._sending = False
        self._sender_left = trio.lowlevel.ParkingLot()
        self._scope: trio.CancelScope | None = None
        self._deadline = math.inf
        self._rest = b""  # of the send that was cut short

    def leave_by(self, deadline: float) -> None:
        """A client that doesn't take its replies until then (trio's clock) is given up."""
        self._deadline = deadline
        if self._scope is not None:
            self._scope.deadline = deadline

    def unsent(self) -> bytes:
        """What was to be sent and hasn't been, for who goes on here when all tasks of the connection have ended."""
        return b"".join([self._rest, *(reply for reply, _, _ in self._replies)])

    def begin_with(self, data: bytes) -> None:
        """Before all else goes what another sender has left; from here on others wait for `send_beginning`."""
        self._sending = True
        self._rest = data

    async def send_beginning(self) -> None:
        """A task that must run after `begin_with`, and when `post` says so."""
        data, self._rest = self._rest, b""
        await self._pump(data)

    async def send_arena(self, view: memoryview) -> bool:
        """Send replies that lie in memory which is used again afterwards. Whether it had to wait."""
        waited = False
        while self._sending:
            waited = True
            try:
                await self._sender_left.park()
            except BaseException:
                self._replies.append((bytes(view), 0, 0))
                raise
        # No checkpoint from here to the send, or to _pump's first line: nobody else sends.
        if self.broken:
            if not self.gone:
                self._replies.append((bytes(view), 0, 0))
            return waited
        try:
            sent = self.sock.send(view)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.give_up(error)
            return waited
        if sent < len(view):
            waited = True
            await self._pump(view[sent:])
        return waited

    async def deliver(self, reply: bytes | memoryview, requests: int, length: int) -> None:
        """Queue a reply; ``requests`` and ``length`` leave the bounds when it has been sent."""
        self._replies.append((reply, requests, length))
        if not self._sending:
            await self._pump(b"")

    def post(self, reply: bytes | memoryview, requests: int, length: int) -> bool:
        """The same without waiting, from any task: send at once if nobody sends, else queue.

        True: the socket is full, and a task must run ``send_beginning``, for which others wait from here on.
        """
        if self._sending or (self.broken and not self.gone):
            self._replies.append((reply, requests, length))
            return False
        view = memoryview(reply)
        try:
            while view and not self.broken:
                view = view[self.sock.send(view) :]
        except BlockingIOError:
            self.begin_with(bytes(view))
            self._replies.append((b"", requests, length))  # goes when the rest has gone
            return True
        except OSError as error:
            self.give_up(error)
        self._sent(requests, length)
        return False

    async def _pump(self, first: bytes | memoryview) -> None:
        """Be the sender: send ``first``, then the queue until it is empty."""
        self._sending = True
        try:
            if first:
                await self.send_all(first)
            # Behind a send that was cut short none goes, but one may still come: of storage that can't be cut short.
            while self._replies and (self.gone or not self.broken):
                batch = [self._replies.popleft()]
                total = len(batch[0][0])
                while self._replies and total + len(self._replies[0][0]) <= JOINED_BYTES:
                    batch.append(self._replies.popleft())
                    total += len(batch[-1][0])
                await self.send_all(b"".join([reply for reply, _, _ in batch]) if len(batch) > 1 else batch[0][0])
                self._sent(sum(requests for _, requests, _ in batch), sum(length for _, _, length in batch))
        finally:
            self._sending = False
            self._sender_left.unpark_all()

    async def send_all(self, data: bytes | memoryview) -> None:
        """Send all, unless the socket is or becomes broken. Cut short, it is broken, and the rest in `unsent`."""
        view = memoryview(data)
        while view and not self.broken:
            try:
                view = view[self.sock.send(view) :]
            except BlockingIOError:
                try:
                    with trio.CancelScope(deadline=self._deadline) as self._scope:
                        await trio.lowlevel.wait_writable(self.sock)
                except BaseException:
                    self.broken = True
                    self._rest = bytes(view)
                    raise
                finally:
                    caught = self._scope is not None and self._scope.cancelled_caught
                    self._scope = None
                if caught:
                    self.give_up(OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
            except OSError as error:
                self.give_up(error)

    def give_up(self, error: OSError) -> None:
        """The client can't be reached any more."""
        self.broken = self.gone = True
        log.debug("%s: can't send: %s", self._peer, error)
