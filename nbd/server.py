"""The NBD server: accepts clients and keeps them apart.

Each connection is a task of ``serve``'s nursery (``nbd.connection``). What one client does, be it
garbage, silence, or a bug it uncovers here, ends at most that client's connection, with a line in
the log. Cancelling ``serve`` is the hard stop; ``Server.drain`` the polite one.
"""

from __future__ import annotations

import errno
import logging
import math
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import trio

from nbd.connection import Connection, Counters, Limits, Workshop
from nbd.export import Client, Exports
from nbd.listen import Listener, plain_address, shown
from nbd.tls import TlsFiles

__all__ = ["ConnectionStatus", "Counters", "Limits", "Server", "ServerStatus", "serve"]

log = logging.getLogger("nbd.server")

HANDSHAKE_PATIENCE_S: Final = 1.0
"""Where all connections are taken, one that is so long in its handshake makes room for another."""
_ACCEPT_PAUSE_S: Final = 0.1
_REFUSAL_LOG_PAUSE_S: Final = 1.0
_SEND_BUFFER_BYTES: Final = 1 << 20
"""For Unix sockets. 1 MiB reads at queue depth 4: 1.9 GB/s with 104 KiB, 2.2-2.6 from 256 KiB up
(fio --ioengine=nbd --rw=read --bs=1m --iodepth=4)."""


@dataclass(frozen=True, slots=True)
class ConnectionStatus:
    """A client as it is now. ``export`` is None during the handshake."""

    peer: str
    export: str | None
    counters: Counters
    tls: str
    """The version of TLS; empty without it."""
    subject: str | None
    """Of its certificate, where one was verified."""


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
    ) -> None:
        self._exports = exports
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
            connections.append(
                ConnectionStatus(connection.peer, connection.export_name, counters, connection.tls_version, subject)
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

    def disconnect(self, export_name: str) -> int:
        """Drop the clients of one export at once; returns how many there were."""
        victims = [scope for client, scope in self._connections.items() if client.export_name == export_name]
        for scope in victims:
            scope.cancel()
        return len(victims)

    async def _run(self, task_status: trio.TaskStatus[Server]) -> None:
        try:
            async with trio.open_nursery() as nursery:
                task_status.started(self)
                with self._accepting:
                    async with trio.open_nursery() as acceptors:
                        for listener in self._listeners:
                            acceptors.start_soon(self._accept, listener, nursery)
                for listener in self._listeners:
                    listener.close()
        finally:
            for listener in self._listeners:
                listener.close()
            self._over.set()

    async def _accept(self, listener: Listener, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener.sock)
            try:
                sock, address = listener.sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:
                log.error("can't accept a client on %s: %s", listener.address, error.strerror)
                await trio.sleep(_ACCEPT_PAUSE_S)
                continue
            if self._draining:  # it was let in by a wake-up that the drain came too late to stop
                sock.close()
                return
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
                self._prepare(sock)
            except OSError as error:
                sock.close()
                log.info("%s: gone at once: %s", client.peer, error)
                continue
            # The Unix socket is ours and our user's anyway, so TLS is offered there and never demanded.
            required = self._tls_required and client.address is not None
            connection = Connection(
                sock, client, self._exports, self._limits, self._workshop, tls=self._tls, tls_required=required
            )
            # Known before its task runs, so that a drain in between reaches it.
            self._connections[connection] = trio.CancelScope()
            self._shaking[connection] = trio.current_time()
            if client.address is not None:
                self._of_address[client.address] = self._of_address.get(client.address, 0) + 1
            nursery.start_soon(self._serve_one, connection)

    def _refusal(self, client: Client) -> str:
        """Why one more connection is too many; empty if it isn't.

        Who connects and then says nothing must not lock others out: where there are too many, the oldest
        that is still in its handshake has to go.
        """
        limits = self._limits
        if len(self._shaking) >= limits.handshakes:
            self._forget_shaken()
            if len(self._shaking) >= limits.handshakes:
                self._drop_oldest_shaking(f"{limits.handshakes} others haven't finished their handshake either")
        most = limits.connections_per_address
        if client.address is not None and most and self._of_address.get(client.address, 0) >= most:
            return f"{most} clients of this address are connected already"
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

    def _prepare(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family == socket.AF_UNIX:
            # A reply of 1 MiB should leave in one send.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    async def _serve_one(self, connection: Connection) -> None:
        try:
            with self._connections[connection]:
                await connection.run()
        except* Exception:
            log.exception("%s: a bug ended this connection", connection.peer)
        finally:
            del self._connections[connection]
            self._shaking.pop(connection, None)
            address = connection.client.address
            if address is not None:
                self._of_address[address] -= 1
                if not self._of_address[address]:
                    del self._of_address[address]
            self._past.add(connection.counters)


def _process_of(sock: socket.socket) -> int:
    """The process at the other end of a Unix socket (unix(7), SO_PEERCRED); 0 if it is out of our sight."""
    pid: int = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


async def serve(
    exports: Exports,
    listeners: Sequence[Listener],
    *,
    limits: Limits | None = None,
    tls: TlsFiles | None = None,
    tls_required: bool = False,
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``exports`` on ``listeners``, which it owns and closes.

    With ``tls`` clients may ask for it; ``tls_required``: those that come over TCP must.

    ``server = await nursery.start(serve, exports, listeners)`` gives the ``Server``. Returns after
    a drain; cancelling it drops all clients at once.
    """
    if not listeners:
        raise OSError(errno.EINVAL, "the NBD server has no address to listen on")
    assert tls is not None or not tls_required
    await Server(exports, listeners, limits or Limits(), tls, tls_required)._run(task_status)
