"""What must hold for any bytes at all: how they are split doesn't matter, and garbage does no harm."""

from __future__ import annotations

import itertools
import logging
import socket
import struct

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd import wire
from nbd.connection import Connection
from nbd.export import Client
from nbd.workshop import ARENA_BYTES, INBOX_BYTES, Limits, Workshop
from tests.nbd.client import RawClient, info_bytes, meta_bytes, option_bytes, request_bytes
from tests.nbd.memory import GRAIN, MemoryExport, MemoryExports

SIZE = 64 << 10
HELLO = (
    struct.pack(">I", 3)
    + option_bytes(wire.OPT_STRUCTURED_REPLY)
    + option_bytes(wire.OPT_SET_META_CONTEXT, meta_bytes("mem", "base:allocation"))
    + option_bytes(wire.OPT_GO, info_bytes("mem"))
)

OFFSETS = st.one_of(st.integers(0, SIZE), st.sampled_from([SIZE - 1, 2**63, 2**64 - 1]))
LENGTHS = st.one_of(st.integers(0, 9000), st.sampled_from([SIZE, SIZE + 1, 0xFFFFFFFF]))


@st.composite
def requests(draw: st.DrawFn) -> tuple[int, int, int, int, bytes]:
    command = draw(st.sampled_from([0, 0, 0, 1, 1, 1, 3, 4, 5, 6, 7, 8]))
    flags = draw(st.sampled_from([0, 0, 0, 0, 1, 2, 4, 8, 16, 1 << 9]))
    offset = draw(OFFSETS)
    if command == wire.CMD_WRITE:
        length = draw(st.integers(0, 9000))
        return command, flags, offset, length, bytes([draw(st.integers(0, 255))]) * length
    return command, flags, offset, draw(LENGTHS), b""


async def talk(export: MemoryExport, pieces: list[bytes], count: int) -> dict[int, tuple[int, bytes]]:
    """Send the pieces one by one, giving the server time between them; returns the replies."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    replies: dict[int, tuple[int, bytes]] = {}
    exports = MemoryExports(export)
    connection = Connection(theirs, Client("test"), exports, Limits(), Workshop())
    client = RawClient(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
    client.structured = True
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)

            sent = trio.Event()

            async def send() -> None:
                for piece in pieces:
                    await client.send(piece)
                    for _ in range(3):
                        await trio.lowlevel.checkpoint()
                sent.set()

            await client.receive(18)
            nursery.start_soon(send)
            for option in (wire.OPT_STRUCTURED_REPLY, wire.OPT_SET_META_CONTEXT, wire.OPT_GO):
                while True:
                    _, echoed, kind, length = struct.unpack(">QIII", await client.receive(20))
                    await client.receive(length)
                    assert echoed == option and not kind >> 31
                    if kind == wire.REP_ACK:
                        break
            while len(replies) < count:
                reply = await client.reply()
                assert reply.cookie not in replies
                replies[reply.cookie] = (reply.error, reply.data or b"".join(chunk[2] for chunk in reply.chunks))
            await sent.wait()  # the last piece may be an empty one
            await client.disconnect()
            await client.stream.aclose()
    assert exports.open == 0
    return replies


@pytest.mark.parametrize("slow", [False, True], ids=["at-once", "slow"])
@settings(max_examples=40)
@given(data=st.data())
def test_any_split_of_the_byte_stream_gives_the_same_replies(slow: bool, data: st.DataObject) -> None:
    # What is in flight together may be carried out in any order, so no two requests may touch one grain of the
    # export: block status tells of whole ones.
    taken: list[tuple[int, int]] = []
    stream, count = HELLO, 0
    for command, flags, offset, length, payload in data.draw(st.lists(requests(), max_size=25)):
        first, last = offset // GRAIN * GRAIN, offset + length + -(offset + length) % GRAIN
        if any(first < end and start < last for start, end in taken):
            continue
        taken.append((first, last))
        count += 1
        stream += request_bytes(command, count, offset, length, flags, payload)
    cuts = sorted(data.draw(st.lists(st.integers(1, len(stream)), max_size=12)))
    edges = [0, *cuts, len(stream)]
    pieces = [stream[a:b] for a, b in itertools.pairwise(edges) if a < b]

    def outcome(parts: list[bytes]) -> tuple[dict[int, tuple[int, bytes]], bytes]:
        export = MemoryExport(size_bytes=SIZE, slow=slow)
        export.data[:] = bytes(range(256)) * (SIZE // 256)
        return trio.run(talk, export, parts, count), bytes(export.data)

    assert outcome(pieces) == outcome([stream])


GARBAGE = st.lists(
    st.one_of(
        st.binary(max_size=300),
        st.builds(
            request_bytes,
            st.integers(0, 12),
            st.integers(0, 2**64 - 1),
            st.integers(0, 2**64 - 1),
            st.integers(0, 2**32 - 1),
            st.integers(0, 65535),
            st.binary(max_size=50),
        ),
        st.builds(request_bytes, st.integers(0, 7), st.just(5), st.integers(0, SIZE), st.integers(0, 5000)),
    ),
    max_size=15,
)


@pytest.mark.parametrize("slow", [False, True], ids=["at-once", "slow"])
@settings(max_examples=100)
@given(prefix=st.sampled_from([b"", HELLO[:4], HELLO]), pieces=GARBAGE)
def test_garbage_never_crashes_hangs_or_leaks(slow: bool, prefix: bytes, pieces: list[bytes]) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        exports = MemoryExports(MemoryExport(size_bytes=SIZE, slow=slow))
        workshop = Workshop()
        connection = Connection(theirs, Client("test"), exports, Limits(), workshop)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.run)

                async def read_all() -> None:
                    try:
                        async for _ in stream:
                            pass
                    except trio.BrokenResourceError:
                        pass

                nursery.start_soon(read_all)
                try:
                    await stream.send_all(prefix + b"".join(pieces))
                    await stream.send_eof()
                except trio.BrokenResourceError:
                    pass
        await stream.aclose()
        assert exports.open == 0 and connection._inflight == 0
        assert connection._inflight_bytes == 0 and not connection._outbox.unsent()
        assert sum(len(b.inbox) + len(b.arena) for b in workshop._free) <= INBOX_BYTES + ARENA_BYTES

    logging.getLogger("nbd.server").setLevel(logging.CRITICAL)
    try:
        trio.run(main)
    finally:
        logging.getLogger("nbd.server").setLevel(logging.NOTSET)
