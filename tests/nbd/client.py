"""A small raw client for tests: it says exactly what a test wants, right or wrong.

It knows no more of the protocol than the test needs and shares only the constants with the server.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import trio

from nbd import wire
from nbd.listen import Listener, open_unix
from nbd.server import Limits, Server, serve
from nbd.suspended import Suspended
from nbd.tls import TlsFiles
from tests.nbd.memory import MemoryExport, MemoryExports


class Closed(Exception):
    """The server closed the connection."""


@dataclass
class Reply:
    """A simple reply, or all chunks of a structured or extended one."""

    cookie: int
    error: int = 0
    data: bytes = b""
    structured: bool = False
    extended: bool = False
    message: str = ""
    holes: tuple[tuple[int, int], ...] = ()  # offset, length; `data` has zeroes for them
    chunks: tuple[tuple[int, int, bytes], ...] = ()  # flags, type, payload

    @property
    def extents(self) -> list[tuple[int, int]]:
        ((context_id, extents),) = self.statuses.items()
        assert context_id == 1
        return extents

    @property
    def statuses(self) -> dict[int, list[tuple[int, int]]]:
        """By context id. Each has one chunk, and only the last chunk is DONE."""
        assert [flags for flags, _, _ in self.chunks] == [0] * (len(self.chunks) - 1) + [wire.REPLY_FLAG_DONE]
        statuses = {}
        for _, kind, payload in self.chunks:
            (context_id,) = struct.unpack_from(">I", payload)
            assert context_id not in statuses
            if self.extended:
                assert kind == 6
                (count,) = struct.unpack_from(">I", payload, 4)
                assert count and len(payload) == 8 + 16 * count
                statuses[context_id] = [struct.unpack_from(">QQ", payload, at) for at in range(8, len(payload), 16)]
            else:
                assert kind == 5 and len(payload) > 4
                statuses[context_id] = [struct.unpack_from(">II", payload, at) for at in range(4, len(payload), 8)]
            assert all(length for length, _ in statuses[context_id])
        return statuses


@dataclass
class _Partial:
    """The chunks of a reply so far."""

    reply: Reply
    data: bytearray = field(default_factory=bytearray)
    chunks: list[tuple[int, int, bytes]] = field(default_factory=list)

    def add(self, flags: int, kind: int, payload: bytes, asked: tuple[int, int, int, int] | None) -> None:
        """``asked``: command, flags, offset and length of the request, where they are known."""
        reply, length = self.reply, len(payload)
        assert not flags & ~wire.REPLY_FLAG_DONE
        self.chunks.append((flags, kind, payload))
        if kind == 0:
            assert not payload and flags
        elif kind in (1, 2):
            assert not reply.error and (length > 8 if kind == 1 else length == 12)
            (start,) = struct.unpack_from(">Q", payload)
            size = length - 8 if kind == 1 else struct.unpack(">QI", payload)[1]
            assert size
            if asked is not None:
                # This server sends them in order.
                assert asked[0] == wire.CMD_READ and start == asked[2] + len(self.data)
                assert len(self.data) + size <= asked[3]
                assert not (asked[1] & wire.CMD_FLAG_DF and (kind == 2 or self.data))
            if kind == 1:
                self.data += memoryview(payload)[8:]
            else:
                self.data += bytes(size)
                reply.holes += ((start, size),)
        elif kind == 0x8001:
            assert not reply.error
            reply.error, size = struct.unpack_from(">IH", payload)
            assert reply.error and size == length - 6
            reply.message = payload[6:].decode()
        else:
            assert kind == (6 if reply.extended else 5)
            assert asked is None or asked[0] == wire.CMD_BLOCK_STATUS
        if flags and asked is not None and asked[0] == wire.CMD_READ and not reply.error:
            assert len(self.data) == asked[3]

    def whole(self) -> Reply:
        self.reply.data, self.reply.chunks = bytes(self.data), tuple(self.chunks)
        return self.reply


class RawClient:
    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.structured = False
        self.extended = False
        self._buffer = bytearray()
        self._read_lengths: dict[int, int] = {}
        self._asked: dict[int, tuple[int, int, int, int]] = {}  # by cookie: command, flags, offset, length
        self._partial: dict[int, _Partial] = {}
        self._cookie = 0
        self.error: BaseException | None = None
        """Why receiving failed, where it was more than the end of the stream."""

    async def send(self, data: bytes) -> None:
        try:
            await self.stream.send_all(data)
        except trio.BrokenResourceError:
            raise Closed from None

    async def receive(self, length: int) -> bytes:
        while len(self._buffer) < length:
            try:
                data = await self.stream.receive_some(1 << 16)
            except trio.BrokenResourceError as error:
                self.error = error.__cause__
                raise Closed from None
            if not data:
                raise Closed
            self._buffer += data
        data = bytes(self._buffer[:length])
        del self._buffer[:length]
        return data

    async def expect_end(self) -> None:
        """The server closes, without another byte."""
        try:
            extra = await self.receive(1)
        except Closed:
            return
        raise AssertionError(f"got {extra!r} where the connection should end")

    # --- handshake ---

    async def hello(self, flags: int = 3) -> None:
        magic, haveopt, server_flags = struct.unpack(">QQH", await self.receive(18))
        assert (magic, haveopt, server_flags) == (wire.INIT_PASSWD, wire.IHAVEOPT, 3)
        await self.send(struct.pack(">I", flags))

    async def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; returns (reply type, data) up to the final reply."""
        await self.send(option_bytes(option, data))
        replies = []
        while True:
            magic, echoed, kind, length = struct.unpack(">QIII", await self.receive(20))
            assert magic == wire.REP_MAGIC and echoed == option
            replies.append((kind, await self.receive(length)))
            if kind == wire.REP_ACK or kind & 1 << 31:
                return replies

    async def go(
        self,
        name: str = "mem",
        *,
        structured: bool = False,
        extended: bool = False,
        status: bool | Sequence[str] = False,
    ) -> int:
        """Negotiate; returns the transmission flags. ``status``: the contexts, or True for base:allocation."""
        await self.hello()
        if extended:
            assert await self.option(wire.OPT_EXTENDED_HEADERS) == [(wire.REP_ACK, b"")]
            self.structured = self.extended = True
        elif structured or status:
            assert (await self.option(wire.OPT_STRUCTURED_REPLY))[-1][0] == wire.REP_ACK
            self.structured = True
        if status:
            queries = (wire.META_ALLOCATION,) if status is True else status
            await self.option(wire.OPT_SET_META_CONTEXT, meta_bytes(name, *queries))
        replies = await self.option(wire.OPT_GO, info_bytes(name))
        assert replies[-1][0] == wire.REP_ACK, replies
        kind, payload = replies[0]
        assert kind == wire.REP_INFO
        _, _, flags = struct.unpack(">HQH", payload)
        return int(flags)

    # --- transmission ---

    def encode(
        self, command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b""
    ) -> bytes:
        """A request whose reply will be awaited. Extended, data brings PAYLOAD_LEN with it, as has a WRITE."""
        if self.extended and (data or command == wire.CMD_WRITE):
            flags |= wire.CMD_FLAG_PAYLOAD_LEN
        if command == wire.CMD_READ:
            self._read_lengths[cookie] = length
        self._asked[cookie] = (command, flags, offset, length)
        return (extended_bytes if self.extended else request_bytes)(command, cookie, offset, length, flags, data)

    async def request(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b"", cookie: int = 0
    ) -> int:
        """Send a request; returns its cookie."""
        if not cookie:
            self._cookie += 1
            cookie = self._cookie
        await self.send(self.encode(command, cookie, offset, length, flags, data))
        return cookie

    async def reply(self) -> Reply:
        """The next complete reply, in whatever form. Chunks of several replies may come mixed."""
        while True:
            (magic,) = struct.unpack(">I", await self.receive(4))
            if self.extended:
                assert magic == 0x6E8A278C, hex(magic)
                flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", await self.receive(28))
                assert offset == self._asked[cookie][2], "the reply doesn't echo the request's offset"
            elif magic == wire.SIMPLE_REPLY_MAGIC:
                error, cookie = struct.unpack(">IQ", await self.receive(12))
                assert cookie not in self._partial, "a simple reply after chunks"
                read_length = self._read_lengths.pop(cookie, None)
                if read_length is not None:
                    assert not self.structured, "a simple reply to READ after structured replies were negotiated"
                return Reply(cookie, error, await self.receive(read_length) if read_length and not error else b"")
            else:
                assert magic == wire.STRUCTURED_REPLY_MAGIC and self.structured, hex(magic)
                flags, kind, cookie, length = struct.unpack(">HHQI", await self.receive(16))
            partial = self._partial.setdefault(cookie, _Partial(Reply(cookie, structured=True, extended=self.extended)))
            partial.add(flags, kind, await self.receive(length), self._asked.get(cookie))
            if flags & wire.REPLY_FLAG_DONE:
                del self._partial[cookie]
                self._read_lengths.pop(cookie, None)
                self._asked.pop(cookie, None)
                return partial.whole()

    async def ask(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b"") -> Reply:
        """A request and its reply, with nothing else in flight."""
        cookie = await self.request(command, offset, length, flags=flags, data=data)
        reply = await self.reply()
        assert reply.cookie == cookie
        return reply

    async def disconnect(self) -> None:
        await self.request(wire.CMD_DISC)
        await self.expect_end()


def option_bytes(option: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", wire.IHAVEOPT, option, len(data)) + data


def info_bytes(name: str, *wanted: int) -> bytes:
    raw = name.encode()
    return struct.pack(f">I{len(raw)}sH{len(wanted)}H", len(raw), raw, len(wanted), *wanted)


def meta_bytes(name: str, *queries: str) -> bytes:
    strings = [text.encode() for text in (name, *queries)]
    packed = [struct.pack(">I", len(raw)) + raw for raw in strings]
    return packed[0] + struct.pack(">I", len(queries)) + b"".join(packed[1:])


def request_bytes(
    command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b""
) -> bytes:
    return struct.pack(">IHHQQI", wire.REQUEST_MAGIC, flags, command, cookie, offset, length or len(data)) + data


def extended_bytes(
    command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b""
) -> bytes:
    return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length or len(data)) + data


def filter_bytes(length: int, *context_ids: int) -> bytes:
    """The payload by which a BLOCK_STATUS asks for some contexts only."""
    return struct.pack(f">Q{len(context_ids)}I", length, *context_ids)


class Served:
    """A running server and the clients a test has connected to it."""

    def __init__(self, exports: MemoryExports, listener: Listener, directory: Path) -> None:
        self.exports = exports
        self.listener = listener
        self.directory = directory
        self.scope = trio.CancelScope()
        self.clients: list[RawClient] = []
        self.server: Server
        self._nursery: trio.Nursery

    async def start(self, limits: Limits | None, tls: TlsFiles | None, task_status: trio.TaskStatus[None]) -> None:
        with self.scope:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(trio.sleep_forever)  # keeps it open between two servers
                await self.serve(limits, tls=tls)
                task_status.started()

    async def serve(
        self, limits: Limits | None = None, resumed: Sequence[Suspended] = (), tls: TlsFiles | None = None
    ) -> Server:
        """Start the server, or the next one."""
        start = partial(serve, self.exports, [self.listener], limits=limits, resumed=resumed, tls=tls)
        self.server = await self._nursery.start(start)
        return self.server

    async def connect(self) -> RawClient:
        sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        try:
            await sock.connect(self.listener.address)
        except OSError:
            sock.close()
            raise
        client = RawClient(trio.SocketStream(sock))
        self.clients.append(client)
        return client

    def uri(self, name: str = "mem") -> str:
        return self.listener.uri(name)


@asynccontextmanager
async def serving(
    *exports: MemoryExport, limits: Limits | None = None, tls: TlsFiles | None = None
) -> AsyncIterator[Served]:
    """A real server on a Unix socket; every export must have been released when it ends."""
    with TemporaryDirectory(prefix="nbd-test-") as name:
        directory = Path(name)
        listener = await open_unix(directory / "nbd.sock")
        served = Served(MemoryExports(*(exports or (MemoryExport(),))), listener, directory)
        async with trio.open_nursery() as nursery:
            await nursery.start(served.start, limits, tls)
            try:
                yield served
            finally:
                for client in served.clients:
                    client.stream.socket.close()
                served.scope.cancel()
                listener.close()
        assert served.exports.open == 0, "an export was not released"


@asynccontextmanager
async def attached(
    export: MemoryExport,
    *,
    form: str = "simple",
    status: bool | Sequence[str] = False,
    limits: Limits | None = None,
) -> AsyncIterator[tuple[RawClient, Served]]:
    """A client of that export. ``form``: simple, structured or extended."""
    async with serving(export, limits=limits) as served:
        client = await served.connect()
        await client.go(export.name, structured=form == "structured", extended=form == "extended", status=status)
        yield client, served


def run(test: Callable[[], object], *, timeout_s: float = 10.0) -> None:
    """Run an async test; a hang is a failure."""

    async def main() -> None:
        with trio.fail_after(timeout_s):
            await test()  # type: ignore[misc]

    trio.run(main)
