"""The HTTP server of the control API: hypercorn's connections, each kept to itself.

hypercorn's own `serve` lets an error in one connection end the server and with it everybody's requests, and a client
can cause one (a WebSocket handshake followed by garbage does). So the connections are hypercorn's, and what accepts
them is ours.
"""

from __future__ import annotations

import logging
import socket
from functools import partial
from typing import Any, cast

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from starlette.types import ASGIApp

log = logging.getLogger(__name__)


class Shutdown:
    """When it has `begun`, requests under way get `grace_s` to finish."""

    def __init__(self) -> None:
        self.begun = trio.Event()
        self.grace_s = 3.0

    def begin(self, grace_s: float | None = None) -> None:
        self.grace_s = self.grace_s if grace_s is None else grace_s
        self.begun.set()


class _Connection(TCPServer):
    """One client's connection, which takes nobody else's with it."""

    async def run(self) -> None:
        try:
            await super().run()
        except Exception as error:
            log.warning("a connection to the control API was closed over an error in serving it", exc_info=error)


async def serve_http(
    app: ASGIApp,
    listening: socket.socket,
    shutdown: Shutdown,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `app` on the listening Unix socket, which stays the caller's, until `shutdown`."""
    config = Config()
    config.accesslog = None
    config.errorlog = logging.getLogger("terrace.httpserver")
    config.include_server_header = False
    context = WorkerContext(None)
    wrapped = ASGIWrapper(cast(Any, app))  # two projects' types for one interface

    async def serve_connection(stream: trio.SocketStream) -> None:
        await _Connection(wrapped, config, context, ConnectionState({}), cast(Any, stream))

    # trio closes what it listens on, so it gets a duplicate.
    own = trio.socket.fromfd(listening.fileno(), listening.family, listening.type)
    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            serve = partial(trio.serve_listeners, handler_nursery=connections)
            accepting.start_soon(serve, serve_connection, [trio.SocketListener(own)])
            task_status.started()
            await shutdown.begun.wait()
            accepting.cancel_scope.cancel()
        await context.terminated.set()
        connections.cancel_scope.deadline = trio.current_time() + shutdown.grace_s
