"""A server that says what a test wants, right or wrong. It shares nothing with ours but the constants."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import trio

from nbd import wire

Handler = Callable[[trio.SocketStream], Awaitable[None]]
USUAL_FLAGS = (
    wire.HAS_FLAGS
    | wire.SEND_FLUSH
    | wire.SEND_FUA
    | wire.SEND_TRIM
    | wire.SEND_WRITE_ZEROES
    | wire.SEND_CACHE
    | wire.SEND_FAST_ZERO
)
COMPACT = struct.Struct(">IHHQQI")
EXTENDED = struct.Struct(">IHHQQQ")


@asynccontextmanager
async def hostile(handler: Handler) -> AsyncIterator[Path]:
    """A server that does what the handler does with each connection, on a Unix socket."""

    async def guarded(stream: trio.SocketStream) -> None:
        try:
            async with stream:
                await handler(stream)
        except trio.BrokenResourceError:
            pass

    with TemporaryDirectory(prefix="nbd-test-") as name:
        path = Path(name) / "sock"
        with trio.socket.socket(socket.AF_UNIX) as sock:
            await sock.bind(str(path))
            sock.listen(5)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, guarded, [trio.SocketListener(sock)])
                yield path
                nursery.cancel_scope.cancel()


async def receive(stream: trio.SocketStream, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = await stream.receive_some(length - len(data))
        if not part:
            raise trio.BrokenResourceError
        data += part
    return data


def option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", wire.REP_MAGIC, option, kind, len(data)) + data


@dataclass
class Manners:
    """What the fake server agrees to."""

    extended: bool = False
    structured: bool = True
    contexts: dict[int, str] = field(default_factory=dict)
    size_bytes: int = 1 << 20
    flags: int = USUAL_FLAGS
    blocks: tuple[int, int, int] = (1, 4096, 32 << 20)
    refusal: int = wire.REP_ERR_UNSUP
    """Of what it doesn't agree to."""


async def shake_hands(stream: trio.SocketStream, manners: Manners) -> None:
    """Up to transmission."""
    await stream.send_all(b"NBDMAGICIHAVEOPT\0\3")
    await receive(stream, 4)
    agreed = {wire.OPT_EXTENDED_HEADERS: manners.extended, wire.OPT_STRUCTURED_REPLY: manners.structured}
    while True:
        _, option, length = struct.unpack(">QII", await receive(stream, 16))
        data = await receive(stream, length)
        if option == wire.OPT_SET_META_CONTEXT:
            for number, name in manners.contexts.items():
                if name.encode() in data:
                    chosen = struct.pack(">I", number) + name.encode()
                    await stream.send_all(option_reply(option, wire.REP_META_CONTEXT, chosen))
            await stream.send_all(option_reply(option, wire.REP_ACK))
        elif option == wire.OPT_GO:
            size = struct.pack(">HQH", wire.INFO_EXPORT, manners.size_bytes, manners.flags)
            blocks = struct.pack(">HIII", wire.INFO_BLOCK_SIZE, *manners.blocks)
            for info in (size, blocks):
                await stream.send_all(option_reply(option, wire.REP_INFO, info))
            await stream.send_all(option_reply(option, wire.REP_ACK))
            return
        else:
            await stream.send_all(option_reply(option, wire.REP_ACK if agreed.get(option) else manners.refusal))


@dataclass
class Asked:
    """A request as it came."""

    raw: bytes
    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    payload: bytes


async def next_request(stream: trio.SocketStream, *, extended: bool) -> Asked:
    form = EXTENDED if extended else COMPACT
    raw = await receive(stream, form.size)
    magic, flags, command, cookie, offset, length = form.unpack(raw)
    assert magic == (wire.EXTENDED_REQUEST_MAGIC if extended else wire.REQUEST_MAGIC)
    has_payload = flags & wire.CMD_FLAG_PAYLOAD_LEN if extended else command == wire.CMD_WRITE
    payload = await receive(stream, length) if has_payload else b""
    return Asked(raw + payload, flags, command, cookie, offset, length, payload)


def answering(*answers: bytes, manners: Manners | None = None) -> Handler:
    """A sound handshake, then an answer for each time that something arrives, then the end."""

    async def handler(stream: trio.SocketStream) -> None:
        await shake_hands(stream, manners or Manners())
        for answer in answers:
            if not await stream.receive_some(1 << 20):
                return
            await stream.send_all(answer)

    return handler


def replying(manners: Manners, answer: Callable[[Asked], bytes], seen: list[Asked] | None = None) -> Handler:
    """A sound handshake, then `answer` to each request, which is kept in `seen`, up to DISC."""

    async def handler(stream: trio.SocketStream) -> None:
        await shake_hands(stream, manners)
        while True:
            asked = await next_request(stream, extended=manners.extended)
            if seen is not None:
                seen.append(asked)
            if asked.command == wire.CMD_DISC:
                return
            await stream.send_all(answer(asked))

    return handler


def extended_chunk(
    kind: int, payload: bytes = b"", *, cookie: int, offset: int, flags: int = wire.REPLY_FLAG_DONE
) -> bytes:
    head = struct.pack(">IHHQQQ", wire.EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, len(payload))
    return head + payload


def extended_done(asked: Asked) -> bytes:
    return extended_chunk(wire.REPLY_TYPE_NONE, cookie=asked.cookie, offset=asked.offset)


def extended_error(asked: Asked, error: int, text: bytes = b"") -> bytes:
    payload = struct.pack(">IH", error, len(text)) + text
    return extended_chunk(wire.REPLY_TYPE_ERROR, payload, cookie=asked.cookie, offset=asked.offset)
