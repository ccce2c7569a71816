"""Calls between nodes: JSON in frames, many at a time on one connection.

One side calls (`Calls`), the other serves (`serve_calls`). An answer comes when it is ready, in any order. A call that
its caller gives up, or that timed out, is cancelled at the other side too. An OSError of a handler comes back with its
errno and its sentence. When the connection ends, everything that waits fails with ECONNRESET; whoever wants to go on
makes another `Calls`, and knows by itself which calls may be made twice.

Frame, both ways, network byte order
  offset size type field
       0    4 u32  MAGIC: "TRC" and the version, 1. An unknown version ends the connection with a sentence
       4    4 u32  length of what follows, 2 to MAX_FRAME_BYTES
       8       -   a JSON object in UTF-8

====================================================  =========  ==================================================
object                                                from       meaning
====================================================  =========  ==================================================
{"id": N, "method": M, "params": {...}}               caller     a call; N is new on this connection, from 1 up
{"id": N, "cancel": true}                             caller     nobody waits for N any more; it may still be answered
{"id": N, "result": ...}                              server     its answer
{"id": N, "error": {"errno": "EBUSY", "text": ...}}   server     it failed: name of the errno, sentence
{"error": {"errno": ..., "text": ...}}                server     the connection is over, and this is why
====================================================  =========  ==================================================

A connection is ended by what breaks these rules. A server reads no more while MAX_RUNNING calls are under way, or
while its answers aren't taken.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from struct import Struct
from typing import Any, Final

import trio

from nbd.tls import TlsSocket
from replication.stream import Inbox, Stream, Traffic, gone

__all__ = ["Calls", "Handler", "Handlers", "serve_calls"]

log = logging.getLogger("replication.calls")

HEAD: Final = Struct(">II")
assert HEAD.size == 8
MAGIC: Final = 0x54524301  # "TRC", version 1
MAX_FRAME_BYTES: Final = 1 << 20
MAX_RUNNING: Final = 64
MAX_BACKLOG_BYTES: Final = 4 << 20
TIMEOUT_S: Final = 10.0
PARTING_S: Final = 0.5
INBOX_BYTES: Final = 64 << 10
MAX_TEXT: Final = 4000

Handler = Callable[[dict[str, Any]], Awaitable[Any]]
Handlers = Mapping[str, Handler]
"""By method. What a handler returns must be JSON; it judges its parameters by itself, and raises OSError EINVAL."""


class _Breach(OSError):
    """The peer broke the rules."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.EPROTO, text)


class _Frames:
    """Objects, out of a stream. The inbox grows to the frame that is announced, within the bound."""

    def __init__(self, stream: Stream, received: bytes) -> None:
        self._stream = stream
        self._inbox = Inbox(INBOX_BYTES, received)

    async def next(self) -> dict[str, Any] | None:
        """The next object; None at the end. Raises OSError; _Breach for what is no frame."""
        wanted = HEAD.size
        while True:
            inbox = self._inbox
            if len(inbox) >= HEAD.size:
                magic, length = HEAD.unpack_from(inbox.buffer, inbox.start)
                if magic != MAGIC:
                    if magic >> 8 == MAGIC >> 8:
                        raise _Breach(f"{self._stream.peer} speaks version {magic & 255} of calls between nodes, not 1")
                    raise _Breach(f"what came from {self._stream.peer} is no call between nodes")
                if not 2 <= length <= MAX_FRAME_BYTES:
                    raise _Breach(f"{self._stream.peer} sent a call of {length} bytes; {MAX_FRAME_BYTES} are the most")
                wanted = HEAD.size + length
                if len(inbox) >= wanted:
                    body = bytes(inbox.view[inbox.start + HEAD.size : inbox.start + wanted])
                    inbox.start += wanted
                    if not len(inbox) and len(inbox.buffer) > INBOX_BYTES:
                        self._inbox = Inbox(INBOX_BYTES)
                    return self._judge(body)
                if wanted > len(inbox.buffer):
                    self._inbox = inbox = Inbox(wanted, bytes(inbox.view[inbox.start : inbox.end]))
            if not await inbox.fill(self._stream, wanted):
                return None

    def _judge(self, body: bytes) -> dict[str, Any]:
        try:
            message = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise _Breach(f"what came from {self._stream.peer} is no JSON: {error}") from None
        if not isinstance(message, dict):
            raise _Breach(f"what came from {self._stream.peer} is no JSON object")
        return message


def _encode(message: dict[str, Any]) -> bytes:
    """Raises OSError EMSGSIZE or EINVAL."""
    try:
        body = json.dumps(message, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise OSError(errno.EINVAL, f"that is no JSON: {error}") from None
    if len(body) > MAX_FRAME_BYTES:
        raise OSError(errno.EMSGSIZE, f"{len(body)} bytes are too many for one call; {MAX_FRAME_BYTES} are the most")
    return HEAD.pack(MAGIC, len(body)) + body


def _error_to_json(error: OSError) -> dict[str, str]:
    number = error.errno or errno.EIO
    text = error.strerror or str(error) or os.strerror(number)
    return {"errno": errno.errorcode.get(number, "EIO"), "text": text[:MAX_TEXT]}


def _error_from_json(plain: Any) -> OSError:
    """Raises ValueError for what is no error."""
    if not isinstance(plain, dict) or not isinstance(plain.get("text"), str) or not isinstance(plain["errno"], str):
        raise ValueError(f"{plain!r:.100} is no error")
    number = getattr(errno, plain["errno"], None) if plain["errno"].isalnum() else None
    return OSError(number if isinstance(number, int) else errno.EIO, plain["text"][:MAX_TEXT])


# --- the caller ---


class _Pending:
    __slots__ = ("answered", "error", "result")

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.error: OSError | None = None
        self.result: Any = None


class Calls:
    """Calls to one peer, over one connection, which it owns. Somebody has to run `run`."""

    def __init__(
        self, sock: socket.socket | TlsSocket, received: bytes = b"", *, peer: str, traffic: Traffic | None = None
    ) -> None:
        """`sock` is non-blocking; `received` came from it already. `peer` is the peer's name, for sentences."""
        self.peer = peer
        self.failure: OSError | None = None
        """Why no call can be made any more."""
        self.heard_at = trio.current_time()
        """When the peer sent something last, by trio's clock."""
        self._stream = Stream(sock, peer=peer, traffic=traffic)
        self._frames = _Frames(self._stream, received)
        self._pending: dict[int, _Pending] = {}
        self._count = 0
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        """Receive answers until the connection ends, or `close`; then `failure` says why. Raises nothing."""
        error: OSError | None = None
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._send)
                    try:
                        await self._receive()
                    except OSError as failed:
                        error = failed
                    nursery.cancel_scope.cancel()
        finally:
            self._fail(error or gone(self.peer))

    async def _send(self) -> None:
        with suppress(OSError):  # the receiver meets it too
            await self._stream.send_rest()

    async def _receive(self) -> None:
        while (message := await self._frames.next()) is not None:
            self.heard_at = trio.current_time()
            try:
                if "id" not in message:
                    raise _error_from_json(message["error"])
                pending = self._pending.pop(message["id"], None) if type(message["id"]) is int else None
                if pending is None:
                    if type(message["id"]) is not int or not 0 < message["id"] <= self._count:
                        raise ValueError(f"an answer to {message['id']!r:.100}, which was not asked")
                    continue  # given up
                if "error" in message:
                    pending.error = OSError(errno.EPROTO, f"{self.peer} answers with an error that can't be read")
                    pending.answered.set()
                    pending.error = _error_from_json(message["error"])
                else:
                    pending.result = message.get("result")
                pending.answered.set()
            except (ValueError, KeyError) as error:
                raise _Breach(f"{self.peer} breaks the protocol: {error}") from None

    async def call(self, method: str, params: dict[str, Any], timeout_s: float = TIMEOUT_S) -> Any:
        """The result. Raises the other side's OSError; ETIMEDOUT, ECONNRESET, EMSGSIZE, ENOSYS (no such method)."""
        if self.failure is not None:
            await trio.lowlevel.checkpoint()
            raise _again(self.failure)
        number = self._count + 1
        frame = _encode({"id": number, "method": method, "params": params})
        self._count = number
        if self._stream.backlog_bytes > MAX_BACKLOG_BYTES:
            await trio.lowlevel.checkpoint()
            raise OSError(errno.EAGAIN, f"{self.peer} doesn't take calls: {MAX_BACKLOG_BYTES} bytes wait")
        pending = self._pending[number] = _Pending()
        began = trio.current_time()
        self._stream.send(frame)
        try:
            with trio.move_on_after(timeout_s):
                await pending.answered.wait()
        finally:
            if self._pending.pop(number, None) is not None and self.failure is None:
                self._stream.send(_encode({"id": number, "cancel": True}))
        if not pending.answered.is_set():
            if self.heard_at < began:
                # Nothing at all came meanwhile: another connection may be better, and this one has no other end.
                self._fail(OSError(errno.ETIMEDOUT, f"{self.peer} has been silent for {timeout_s:g} s"))
            raise OSError(errno.ETIMEDOUT, f"{self.peer} has not answered {method} within {timeout_s:g} s")
        if pending.error is not None:
            raise pending.error
        return pending.result

    def close(self) -> None:
        """Synchronous. What waits fails with ECONNRESET."""
        self._fail(OSError(errno.ECONNRESET, f"the connection to {self.peer} was closed"))

    def _fail(self, error: OSError) -> None:
        if self.failure is not None:
            return
        self.failure = error
        pending, self._pending = self._pending, {}
        for one in pending.values():
            one.error = _again(error) if error.errno == errno.ECONNRESET else gone(f"{self.peer} ({error.strerror})")
            one.answered.set()
        self._stream.close()
        self._scope.cancel()


def _again(error: OSError) -> OSError:
    """Each of those that raise it gets its own."""
    return OSError(error.errno or errno.EIO, error.strerror or str(error))


# --- the server ---


async def serve_calls(
    sock: socket.socket | TlsSocket,
    received: bytes,
    handlers: Handlers,
    *,
    peer: str = "the peer",
    traffic: Traffic | None = None,
) -> None:
    """Serve until the caller leaves; then what is under way is cancelled. The socket is the caller's to close.

    Raises OSError if the connection breaks, or the peer breaks the rules (EPROTO, which the peer is told).
    """
    await _Server(Stream(sock, peer=peer, traffic=traffic), received, handlers).run()


class _Server:
    def __init__(self, stream: Stream, received: bytes, handlers: Handlers) -> None:
        self._stream = stream
        self._frames = _Frames(self._stream, received)
        self._handlers = handlers
        self._running: dict[int, trio.CancelScope] = {}
        self._last = 0
        self._room = trio.Event()

    async def run(self) -> None:
        error: OSError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send)
            try:
                await self._receive(nursery)
            except OSError as failed:
                error = failed
            nursery.cancel_scope.cancel()
        if error is not None:
            if isinstance(error, _Breach):
                self._stream.send(_encode({"error": _error_to_json(error)}))
                with trio.move_on_after(PARTING_S):
                    await self._stream.part()
            raise error

    async def _send(self) -> None:
        try:
            await self._stream.send_rest()
        except OSError:
            self._room.set()  # the receiver meets it too

    async def _receive(self, nursery: trio.Nursery) -> None:
        while (message := await self._frames.next()) is not None:
            number = message.get("id")
            if type(number) is not int or number < 1:
                raise _Breach(f"{self._stream.peer} sent a call without a number")
            if "cancel" in message:
                scope = self._running.get(number)
                if scope is not None:
                    scope.cancel()
                continue
            method, params = message.get("method"), message.get("params")
            if number <= self._last or not isinstance(method, str) or not isinstance(params, dict):
                raise _Breach(f"{self._stream.peer} sent a call that is none: {message!r:.100}")
            self._last = number
            while len(self._running) >= MAX_RUNNING or self._stream.backlog_bytes > MAX_BACKLOG_BYTES:
                if self._stream.broken is not None:
                    raise self._stream.broken
                await self._wait_for_room()
            scope = self._running[number] = trio.CancelScope()
            nursery.start_soon(self._answer, number, method, params, scope)

    async def _wait_for_room(self) -> None:
        self._room = trio.Event()
        with trio.move_on_after(0.05 if self._stream.backlog_bytes > MAX_BACKLOG_BYTES else math.inf):
            await self._room.wait()

    async def _answer(self, number: int, method: str, params: dict[str, Any], scope: trio.CancelScope) -> None:
        answer: dict[str, Any] = {"id": number, "result": None}
        error = OSError(errno.ECANCELED, f"{method} was cancelled")
        done = False
        try:
            with scope:
                handler = self._handlers.get(method)
                if handler is None:
                    raise OSError(errno.ENOSYS, f"this node has no call {method!r:.100}: it may be an older version")
                answer["result"] = await handler(params)
                done = True
        except OSError as failed:
            error = failed
        except Exception as failed:
            log.exception("%s: %s failed", self._stream.peer, method)
            text = f"{method} failed by a mistake of the node's: {failed!r:.300}; see its log"
            error = OSError(errno.EREMOTEIO, text)
        finally:
            del self._running[number]
            self._room.set()
        try:
            frame = _encode(answer if done else {"id": number, "error": _error_to_json(error)})
        except OSError as failed:
            frame = _encode({"id": number, "error": _error_to_json(failed)})
        self._stream.send(frame)
