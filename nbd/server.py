"""The NBD server: accepts clients and keeps them apart.

Each connection is a task of ``serve``'s nursery (``nbd.connection``). What one client does, be it
garbage, silence, or a bug it uncovers here, ends at most that client's connection, with a line in
the log. Cancelling ``serve`` is the hard stop; ``Server.drain`` the polite one. After ``Server.suspend``
another server, here or in another process, goes on with the same clients, who don't notice.
"""

from __future__ import annotations

import errno
import logging
import math
import select
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import trio

from nbd.connection import Connection
from nbd.counters import Counters
from nbd.export import Client, Exports
from nbd.listen import Listener, plain_address, shown
from nbd.suspended import Suspended
from nbd.takeover import Takeover
from nbd.tls import TlsFiles
from nbd.transport import prepare
from nbd.workshop import Limits, Workshop

__all__ = ["ConnectionStatus", "Counters", "Limits", "Server", "ServerStatus", "serve"]

log = logging.getLogger("nbd.server")

HANDSHAKE_PATIENCE_S: Final = 1.0
"""Where all connections are taken, one that is so long in its handshake makes room for another."""
_ACCEPT_PAUSE_S: Final = 0.1
_REFUSAL_LOG_PAUSE_S: Final = 1.0
_STRAGGLING_S: Final = 0.25
"""So much longer than the others' patience clients that can't be handed over may take to leave."""


@dataclass(frozen=True, slots=True)
class ConnectionStatus:
    """A client as it is now. ``export`` is None during the handshake, and empty where there is none."""

    peer: str
    export: str | None
    counters: Counters
    tls: str
    """The version of TLS; empty without it."""
    subject: str | None
    """Of its certificate, where one was verified."""
    kind: str = "client"
    """``client``, or ``takeover`` if the connection isn't NBD any more (``nbd.takeover``)."""


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """A snapshot for the daemon's status; ``total`` counts ended connections too."""

    listening: list[str]
    connections: list[ConnectionStatus]
    accepted: int
    refused: int
    draining: bool
    total: Counters


class Server:
    """A running server; ``serve`` makes it."""

    def __init__(
        self,
        exports: Exports,
        listeners: Sequence[Listener],
        limits: Limits,
        tls: TlsFiles | None = None,
        tls_required: bool = False,
        takeovers: Mapping[int, Takeover] = MappingProxyType({}),
    ) -> None:
        self._exports = exports
        self._takeovers = takeovers
        self._tls = tls
        self._tls_required = tls_required
        self._listeners = list(listeners)
        self._limits = limits
        self._workshop = Workshop()
        self._connections: dict[Connection, trio.CancelScope] = {}
        self._shaking: dict[Connection, float] = {}  # since when; the oldest first, and some whose handshake is over
        self._of_address: dict[str, int] = {}
        self._past = Counters()
        self._accepted = 0
        self._refused = 0
        self._serial = 0
        self._quiet_until = -math.inf
        self._draining = False
        self._suspending = False
        self._suspended: list[Suspended] = []
        self._accepting = trio.CancelScope()
        self._over = trio.Event()

    def status(self) -> ServerStatus:
        """Who is connected, and what was asked so far."""
        total = Counters()
        total.add(self._past)
        connections = []
        for connection in self._connections:
            total.add(connection.counters)
            counters = Counters()
            counters.add(connection.counters)
            identity = connection.client.identity
            subject = identity.subject if identity is not None else None
            taken = connection.taken_over
            connections.append(
                ConnectionStatus(
                    connection.peer,
                    "" if taken else connection.export_name,
                    counters,
                    connection.tls_version,
                    subject,
                    "takeover" if taken else "client",
                )
            )
        return ServerStatus(
            [listener.address for listener in self._listeners],
            connections,
            self._accepted,
            self._refused,
            self._draining,
            total,
        )

    def start_drain(self, grace_s: float | None = None) -> None:
        """Begin what ``drain`` waits for. Synchronous; a second call changes nothing."""
        if self._draining:
            return
        self._draining = True
        self._accepting.cancel()
        for connection in self._connections:
            connection.drain(self._limits.drain_grace_s if grace_s is None else grace_s)

    async def drain(self, grace_s: float | None = None) -> None:
        """Stop accepting, finish what is in flight, and end; returns when ``serve`` is done.

        What was not read yet is not answered. Clients that are still there after ``grace_s``
        (``Limits.drain_grace_s``) are disconnected, once what they have in flight is done.
        """
        self.start_drain(grace_s)
        await self._over.wait()

    async def suspend(self, patience_s: float, later_s: float = 0.0) -> list[Suspended]:
        """Stop accepting, and stop each client at a request boundary; returns when ``serve`` is done.

        What is under way gets ``patience_s`` to end; what doesn't is part of what is returned, for who goes on with
        the clients (``serve(..., resumed=...)``). The listeners stay open, and clients wait in their backlogs.
        Connections that can't be handed over are drained (those over TLS) or ended (those that were taken over).

        What an export that acknowledges later has been given can't be part of that, as nothing of it is kept: it gets
        ``later_s``, if that is longer; then its client is dropped.
        """
        assert not self._draining
        self._suspending = self._draining = True
        self._accepting.cancel()
        for connection in self._connections:
            connection.suspend(patience_s, later_s)
        with trio.move_on_after(patience_s + _STRAGGLING_S):
            await self._over.wait()
            return self._suspended
        for connection, scope in self._connections.items():
            # Who is to stay waits only for the storage: a flush that has begun, say, which can't be cut short.
            if not connection.stays:
                scope.cancel()
        await self._over.wait()
        return self._suspended

    def disconnect(self, export_name: str) -> int:
        """Drop the clients of one export at once; returns how many there were."""
        victims = [scope for client, scope in self._connections.items() if client.export_name == export_name]
        for scope in victims:
            scope.cancel()
        return len(victims)

    async def _run(self, resumed: Sequence[Suspended], task_status: trio.TaskStatus[Server]) -> None:
        try:
            async with trio.open_nursery() as nursery:
                await self._resume(resumed, nursery)
                task_status.started(self)
                with self._accepting:
                    async with trio.open_nursery() as acceptors:
                        for listener in self._listeners:
                            acceptors.start_soon(self._accept, listener, nursery)
                if not self._suspending:
                    self._close_listeners()
        finally:
            if not self._suspending:
                self._close_listeners()
            self._over.set()

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()

    async def _resume(self, resumed: Sequence[Suspended], nursery: trio.Nursery) -> None:
        """Go on with clients of an earlier server. An export that can't be had yet holds up its own clients only."""
        by_export: dict[str, list[Suspended]] = {}
        for one in resumed:
            by_export.setdefault(one.export, []).append(one)
        with trio.CancelScope(shield=True):  # a moment: what an export waits for is bounded
            async with trio.open_nursery() as entering:
                for clients in by_export.values():
                    entering.start_soon(self._resume_export, clients, nursery)

    async def _resume_export(self, resumed: Sequence[Suspended], nursery: trio.Nursery) -> None:
        """The clients of one export: all are known to the fence before the first does anything."""
        everybody = trio.Event()
        try:
            for one in resumed:
                connection = await self._entered(one)
                if connection is not None:
                    self._know(connection)
                    # Started here, for a task takes the context that its parent has when it starts it, and by that
                    # exports tell clients apart.
                    nursery.start_soon(self._go_on, connection, everybody)
        finally:
            everybody.set()

    async def _entered(self, one: Suspended) -> Connection | None:
        """A connection that goes on, or None where it can't and is closed."""
        if _is_hung_up(one.sock):
            # What it left unanswered may have been sent again on another connection, and done.
            log.info("%s: left while the server was replaced", one.peer)
            one.close()
            return None
        try:
            client = self._client_of(one)
        except OSError as error:
            log.warning("%s: dropped: %s", one.peer, error.strerror)
            one.close()
            return None
        connection = Connection(one.sock, client, self._exports, self._limits, self._workshop, resumed=one)
        try:
            await connection.enter()
        except OSError as error:
            why = error.strerror or error
            log.warning("%s: dropped: %s can't be served any more: %s", one.peer, one.export, why)
            one.close()
            return None
        return connection

    async def _go_on(self, connection: Connection, everybody: trio.Event) -> None:
        """Serve a connection that has entered, when all have."""
        with trio.CancelScope(shield=True):
            await everybody.wait()
        await self._serve_one(connection)

    def _client_of(self, one: Suspended) -> Client:
        """Raises OSError, if it has gone, or may not go on as it is."""
        if one.sock.family == socket.AF_UNIX:
            return Client(one.peer)
        if self._tls_required:
            raise OSError(errno.EPERM, "it came without TLS, which is required now")
        return Client(one.peer, plain_address(one.sock.getpeername()[0]))

    async def _accept(self, listener: Listener, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener.sock)
            if self._draining:  # woken before the drain could stop it; who waits in the backlog may be served yet
                return
            try:
                sock, address = listener.sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:
                log.error("can't accept a client on %s: %s", listener.address, error.strerror)
                await trio.sleep(_ACCEPT_PAUSE_S)
                continue
            self._serial += 1
            if isinstance(address, tuple):
                client = Client(shown(sock.family, address), plain_address(address[0]))
            else:
                client = Client(f"unix client {self._serial} (process {_process_of(sock)})")
            refusal = self._refusal(client)
            if refusal:
                self._refused += 1
                sock.close()
                self._tell_refusal(client.peer, refusal)
                continue
            self._accepted += 1
            try:
                prepare(sock)
            except OSError as error:
                sock.close()
                log.info("%s: gone at once: %s", client.peer, error)
                continue
            # The Unix socket is ours and our user's anyway, so TLS is offered there and never demanded.
            required = self._tls_required and client.address is not None
            connection = Connection(
                sock,
                client,
                self._exports,
                self._limits,
                self._workshop,
                tls=self._tls,
                tls_required=required,
                takeovers=self._takeovers,
            )
            # Known before its task runs, so that a drain in between reaches it.
            self._know(connection)
            self._shaking[connection] = trio.current_time()
            nursery.start_soon(self._serve_one, connection)

    def _know(self, connection: Connection) -> None:
        """Count it among those that are connected, until `_serve_one` ends."""
        self._connections[connection] = trio.CancelScope()
        self._count_address(connection.client, 1)

    def _refusal(self, client: Client) -> str:
        """Why one more connection is too many; empty if it isn't.

        Who connects and then says nothing must not lock others out: where there are too many, the oldest
        that is still in its handshake has to go.
        """
        limits = self._limits
        # First what drops nobody: who is refused anyway must not cost another one's handshake.
        most = limits.connections_per_address
        if client.address is not None and most and self._of_address.get(client.address, 0) >= most:
            return f"{most} clients of this address are connected already"
        if len(self._shaking) >= limits.handshakes:
            self._forget_shaken()
            if len(self._shaking) >= limits.handshakes:
                self._drop_oldest_shaking(f"{limits.handshakes} others haven't finished their handshake either")
        if len(self._connections) >= limits.connections:
            self._forget_shaken()
            oldest_s = next(iter(self._shaking.values()), math.inf)
            # One that has just come is probably about to go on. What is dropped takes a moment to be gone, so there may
            # be one connection too many for so long, but not two.
            one_too_many = len(self._connections) > limits.connections
            if one_too_many or trio.current_time() - oldest_s < HANDSHAKE_PATIENCE_S:
                return f"{limits.connections} clients are connected already"
            self._drop_oldest_shaking("the room is needed, and it hasn't finished its handshake")
        return ""

    def _count_address(self, client: Client, change: int) -> None:
        if client.address is not None:
            count = self._of_address.pop(client.address, 0) + change
            if count:
                self._of_address[client.address] = count

    def _forget_shaken(self) -> None:
        for connection in [one for one in self._shaking if not one.shaking]:
            del self._shaking[connection]

    def _drop_oldest_shaking(self, why: str) -> None:
        oldest = next(iter(self._shaking))
        del self._shaking[oldest]
        self._tell_refusal(oldest.peer, why)
        self._refused += 1
        oldest.cut()

    def _tell_refusal(self, peer: str, why: str) -> None:
        if trio.current_time() < self._quiet_until:
            return
        self._quiet_until = trio.current_time() + _REFUSAL_LOG_PAUSE_S
        log.warning("%s: refused: %s (%d refused so far)", peer, why, self._refused)

    async def _serve_one(self, connection: Connection) -> None:
        try:
            with self._connections[connection]:
                suspended = await connection.run()
                if suspended is not None:
                    self._suspended.append(suspended)
        except* Exception:
            log.exception("%s: a bug ended this connection", connection.peer)
        finally:
            del self._connections[connection]
            self._shaking.pop(connection, None)
            self._count_address(connection.client, -1)
            self._past.add(connection.counters)


def _is_hung_up(sock: socket.socket) -> bool:
    """Whether its client has shut it down, or closed it."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def _process_of(sock: socket.socket) -> int:
    """The process at the other end of a Unix socket (unix(7), SO_PEERCRED); 0 if it is out of our sight."""
    pid: int = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


async def serve(
    exports: Exports,
    listeners: Sequence[Listener],
    *,
    limits: Limits | None = None,
    resumed: Sequence[Suspended] = (),
    tls: TlsFiles | None = None,
    tls_required: bool = False,
    takeovers: Mapping[int, Takeover] = MappingProxyType({}),
    known: Callable[[Server], None] = lambda server: None,
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``exports`` on ``listeners``, which it owns and closes, unless it is suspended.

    ``resumed``: clients of a server that was suspended, which it owns too.

    With ``tls`` clients may ask for it; ``tls_required``: those that come over TCP must.

    ``takeovers``: who takes connections over, by the option that asks for it (``nbd.takeover``).

    ``server = await nursery.start(serve, exports, listeners)`` gives the ``Server``, when all of ``resumed`` go on, or
    are dropped; ``known`` is called with it before the first of them does. Returns after a drain; cancelling it drops
    all clients at once.
    """
    if not listeners:
        raise OSError(errno.EINVAL, "the NBD server has no address to listen on")
    assert tls is not None or not tls_required
    server = Server(exports, listeners, limits or Limits(), tls, tls_required, takeovers)
    known(server)
    await server._run(resumed, task_status)
