"""A network in one process: connections and calls between nodes, with delays, and with directions that can be blocked.

Connections are TCP's: what was sent arrives in order, or the connection ends. A direction that is blocked delivers
nothing; what is under way waits, as TCP would send it again, and arrives when the way is free. So a cut is `block` both
ways, and a half-open connection one way only. A machine that goes down says nothing: its peers wait, until it is up
again and its kernel knows nothing of their connections. A process that dies is told of by its kernel.

`SimSocket` has what `replication.stream.Stream` uses of a socket, but for the readiness of a descriptor; `simulated`
has `Stream` wait on the socket itself for as long as its context lasts.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import random
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final
from unittest import mock

import trio

from replication.stream import Stream, gone

WINDOW_BYTES: Final = 192 << 10
"""So much may be under way and unread before a sender's socket takes nothing more."""
_fds = itertools.count(1 << 24)

Way = tuple[str, str]
"""From one node to another."""


class SimSocket:
    """One end of a connection."""

    family = socket.AF_UNIX

    def __init__(self, network: Network, here: str, there: str) -> None:
        self.here = here
        self.there = there
        self.peer: SimSocket
        self.is_dead = False
        """Its process or machine is gone: what is still done with it goes nowhere."""
        self._network = network
        self._fd = next(_fds)
        self._incoming: deque[tuple[float, bytes | OSError]] = deque()
        """When it arrives, and what: bytes, none at the end of the stream, or an error."""
        self._unread = 0
        self._last_due = 0.0
        self._closed = False
        self._sent_end = False
        self._stir = trio.Event()

    def fileno(self) -> int:
        """A number that is no descriptor; -1 once it is closed."""
        return -1 if self._closed else self._fd

    def _deliver(self, what: bytes | OSError) -> None:
        due = max(self._last_due, trio.current_time() + self._network.delay_s(self.there, self.here))
        self._last_due = due
        self._incoming.append((due, what))
        if isinstance(what, bytes):
            self._unread += len(what)
        self.stir()

    def stir(self) -> None:
        """Whoever waits is to look again."""
        self._stir.set()
        self._stir = trio.Event()

    def send(self, data: memoryview | bytes) -> int:
        """As a non-blocking socket's."""
        if self.is_dead:
            return len(data)
        if self._closed or self._sent_end:
            raise BrokenPipeError(errno.EPIPE, "closed")
        if self._error() is not None:
            raise ConnectionResetError(errno.ECONNRESET, "connection reset")
        room = WINDOW_BYTES - self.peer._unread
        if room <= 0:
            raise BlockingIOError(errno.EAGAIN, "no room")
        piece = bytes(data[:room])
        self.peer._deliver(piece)
        return len(piece)

    def _error(self) -> OSError | None:
        """A reset that has arrived."""
        now = trio.current_time()
        if self._network.is_blocked(self.there, self.here):
            return None
        return next((what for due, what in self._incoming if due <= now and isinstance(what, OSError)), None)

    def recv_into(self, into: memoryview) -> int:
        """As a non-blocking socket's."""
        if self._closed:
            raise OSError(errno.EBADF, "closed")
        if self.is_dead or not self._readable():
            raise BlockingIOError(errno.EAGAIN, "nothing there")
        due, what = self._incoming[0]
        if isinstance(what, OSError):
            raise ConnectionResetError(what.errno, what.strerror)
        if not what:
            return 0
        count = min(len(into), len(what))
        into[:count] = what[:count]
        self._unread -= count
        if count == len(what):
            self._incoming.popleft()
        else:
            self._incoming[0] = due, what[count:]
        self.peer.stir()
        return count

    def _readable(self) -> bool:
        return bool(
            self._incoming
            and self._incoming[0][0] <= trio.current_time()
            and not self._network.is_blocked(self.there, self.here)
        )

    async def wait(self, *, writing: bool) -> None:
        """Until it is ready. Raises trio.ClosedResourceError."""
        await trio.lowlevel.checkpoint()
        while True:
            if self._closed:
                raise trio.ClosedResourceError("closed")
            if not self.is_dead:
                if writing and (self.peer._unread < WINDOW_BYTES or self._error() is not None):
                    return
                if not writing and self._readable():
                    return
            due = math.inf
            if self._incoming and not self._network.is_blocked(self.there, self.here):
                due = self._incoming[0][0]
                if due <= trio.current_time():
                    due = math.inf
            with trio.move_on_at(due):
                await self._stir.wait()

    def shutdown(self, how: int) -> None:
        """Sends the end of the stream."""
        if not self._sent_end and not self.is_dead:
            self._sent_end = True
            self.peer._deliver(b"")
        if how == socket.SHUT_RDWR:
            self._incoming.clear()
            self._incoming.append((trio.current_time(), b""))
            self.stir()

    def close(self) -> None:
        """A second call does nothing."""
        if not self._closed:
            unread = self._unread
            self._closed = True
            self._network.sockets.discard(self)
            if not self.is_dead:
                if unread:
                    self.peer._deliver(ConnectionResetError(errno.ECONNRESET, "closed with something unread"))
                elif not self._sent_end:
                    self.peer._deliver(b"")
            self.stir()

    def reset(self, why: str) -> None:
        """What this end gets from now on, whatever was on its way."""
        self._incoming.append((trio.current_time(), ConnectionResetError(errno.ECONNRESET, why)))
        self.stir()


class Network:
    """All ways between the nodes."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.blocked: set[Way] = set()
        self.slowness = 1.0
        self.sockets = _Ordered()
        self._changed = trio.Event()

    def delay_s(self, source: str, target: str) -> float:
        """Of one packet."""
        return self._rng.random() * 0.004 * self.slowness

    def is_blocked(self, source: str, target: str) -> bool:
        """Whether nothing gets from one to the other."""
        return (source, target) in self.blocked

    def change(self, blocked: set[Way]) -> None:
        """These ways are blocked from now on, and no others."""
        self.blocked = blocked
        self._changed.set()
        self._changed = trio.Event()
        for one in list(self.sockets):
            one.stir()

    async def carry(self, source: str, target: str) -> None:
        """The time that a packet takes, or until the way is free."""
        await trio.sleep(self.delay_s(source, target))
        while self.is_blocked(source, target):
            await self._changed.wait()

    def pair(self, here: str, there: str) -> tuple[SimSocket, SimSocket]:
        """A connection that is there."""
        one, other = SimSocket(self, here, there), SimSocket(self, there, here)
        one.peer, other.peer = other, one
        self.sockets.add(one)
        self.sockets.add(other)
        return one, other

    def die(self, node: str, *, with_word: bool) -> None:
        """The process of a node is gone; `with_word`: its kernel tells the others."""
        for one in list(self.sockets):
            if one.here == node and not one.is_dead:
                one.is_dead = True
                if with_word:
                    one.peer._deliver(ConnectionResetError(errno.ECONNRESET, "the process is gone"))

    def wake(self, node: str) -> None:
        """A machine is up again, and knows nothing of earlier connections."""
        for one in list(self.sockets):
            if one.here == node and one.is_dead:
                self.sockets.discard(one)
                one.peer._deliver(ConnectionResetError(errno.ECONNRESET, "the machine was started again"))

    def reset(self, one: str, other: str) -> None:
        """All connections between two nodes break, for both."""
        for sock in list(self.sockets):
            if {sock.here, sock.there} == {one, other} and not sock.is_dead:
                sock.reset("connection reset")


class _Ordered(dict[SimSocket, None]):
    """A set with an order that depends on nothing but what is put in."""

    def add(self, one: SimSocket) -> None:
        self[one] = None

    def discard(self, one: SimSocket) -> None:
        self.pop(one, None)


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    """`Stream` waits on simulated sockets in here."""

    async def wait(self: Stream, wait: Callable[[int], Awaitable[None]]) -> None:
        sock: Any = self._sock
        try:
            await sock.wait(writing=wait is trio.lowlevel.wait_writable)
        except trio.ClosedResourceError:
            raise self.broken or gone(self.peer) from None

    with mock.patch.object(Stream, "_wait", wait):
        yield
