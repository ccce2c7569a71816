"""The fence: what a client has given up on one connection takes no effect after what it writes on another.

A client with several connections to an export may take one of them for dead, shut it down, and send what was in flight
there again on another: the Linux kernel's does so with a request that is older than its timer
(`drivers/block/nbd.c`, `nbd_xmit_timeout`). It goes on as soon as the second copy is answered. Were the first copy,
which lay unread in a socket or waited for the storage, carried out after that, it would overwrite newer data that was
acknowledged.

So before a connection writes, trims or zeroes it looks whether others of the same export were shut down by their
client, ends them, and waits until nothing of them is under way any more. That is enough: the client shuts down first
and sends again afterwards, so whoever has received the second copy sees the first connection shut down. On a Unix
socket that is certain; over TCP the two come on different ways, and a FIN may be late.

It costs a call to poll(2) for each pass with writes (about a microsecond), where an export has several connections.
"""

from __future__ import annotations

import select
import socket
from typing import Protocol

import trio


class Socket(Protocol):
    """The descriptor that is polled, whatever is spoken over it."""

    @property
    def family(self) -> int: ...

    def fileno(self) -> int: ...


class Member(Protocol):
    """A connection in its transmission phase."""

    @property
    def ended(self) -> trio.Event:
        """Set when nothing of it is under way any more."""

    def cut(self) -> None:
        """End it at once, answering nothing more. Synchronous."""


class _Group:
    """The connections of one export."""

    def __init__(self) -> None:
        self.poll = select.poll()
        self.members: dict[int, Member] = {}  # by descriptor


class Fence:
    """Who is connected to which export, for the connections of one server."""

    def __init__(self) -> None:
        self._groups: dict[int, _Group] = {}  # by the identity of the export, which its connections keep alive

    def enter(self, export: object, sock: Socket, member: Member) -> None:
        """From now on `member` can be found by the others of its export."""
        group = self._groups.setdefault(id(export), _Group())
        # A Unix socket that is shut down for both directions, or closed, is hung up, which is always told. Of a TCP
        # connection only the end of its data can be seen.
        group.poll.register(sock.fileno(), 0 if sock.family == socket.AF_UNIX else select.POLLRDHUP)
        group.members[sock.fileno()] = member

    def leave(self, export: object, sock: Socket) -> None:
        """The opposite, while the socket is still open."""
        group = self._groups[id(export)]
        group.poll.unregister(sock.fileno())
        del group.members[sock.fileno()]
        if not group.members:
            del self._groups[id(export)]

    def gone(self, export: object, member: Member) -> list[Member]:
        """Those other than `member` that their client has shut down and that haven't ended yet. Synchronous."""
        group = self._groups[id(export)]
        if len(group.members) == 1:
            return []
        found = [group.members[fd] for fd, _ in group.poll.poll(0)]
        return [other for other in found if other is not member]
