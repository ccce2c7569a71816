"""The client against our own server, and against servers that do what no server should."""

from __future__ import annotations

import errno
import itertools
import math
import os
import socket
import struct
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from nbd import wire
from nbd.client import Client, ClientLimits, _pieces, attach, connect, describe
from nbd.listen import open_tcp, open_unix
from nbd.negotiate import MAX_SIZE_BYTES, Terms, Upgrade, negotiate
from nbd.server import serve
from nbd.transmission import transmission_flags
from nbd.uri import Address, Target, TlsOptions, parse_target, parse_uri
from tests.nbd.client import Served, run, serving
from tests.nbd.fake import (
    USUAL_FLAGS,
    Asked,
    Manners,
    answering,
    extended_chunk,
    extended_done,
    extended_error,
    hostile,
    option_reply,
    replying,
    shake_hands,
)
from tests.nbd.memory import ContextExport, MemoryExport, MemoryExports

SIZE = 1 << 20
both_speeds = pytest.mark.parametrize("slow", [False, True], ids=["at-once", "slow"])


@asynccontextmanager
async def attached(
    export: MemoryExport, *, contexts: Sequence[str] = (), limits: ClientLimits | None = None
) -> AsyncIterator[tuple[Client, Served]]:
    async with serving(export) as served:
        async with connect(served.uri(export.name), contexts=contexts, limits=limits) as client:
            yield client, served
        # It said DISC, so the server is done with it before it is torn down.
        while served.server.status().connections:
            await trio.sleep(0.001)


@contextmanager
def fails(number: int, text: str = "") -> Iterator[None]:
    """The body raises an OSError with this errno, and with this text in its sentence."""
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == number, caught.value
    assert text in str(caught.value)


# --- against our server ---


@both_speeds
def test_what_was_written_is_read(slow: bool) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow)
        async with attached(export) as (client, _):
            assert client.size_bytes == SIZE
            for offset, length in [(0, 4096), (1, 1), (4095, 3), (SIZE - 513, 513), (100_000, 900_000), (5, 0)]:
                data = os.urandom(length)
                await client.write(offset, data)
                found = await client.read(offset, length)
                assert found == data
                found += b"it is the caller's alone"
            await client.write(0, memoryview(struct.pack("4I", 1, 2, 3, 4)).cast("I"), fua=True)
            assert export.data[:16] == struct.pack("4I", 1, 2, 3, 4) and export.calls[-1][0] == "flush"

    run(test)


@both_speeds
def test_any_number_of_tasks_share_a_connection(slow: bool) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow)
        async with attached(export) as (client, served):

            async def work(number: int) -> None:
                data = bytes([number]) * 1000
                await client.write(number * 1000, data)
                assert await client.read(number * 1000, 1000) == data

            async with trio.open_nursery() as nursery:
                for number in range(250):
                    nursery.start_soon(work, number)
            assert served.server.status().total.requests == 500

    run(test)


def test_requests_in_flight_are_bounded_and_keep_their_order() -> None:
    async def test() -> None:
        hold = trio.Event()
        export = MemoryExport(size_bytes=SIZE, slow=True, hold=hold)
        limits = ClientLimits(inflight_requests=4, inflight_bytes=9000)
        async with attached(export, limits=limits) as (client, _):
            async with trio.open_nursery() as nursery:
                for number in range(2):
                    nursery.start_soon(client.read, number, 3000)
                await trio.sleep(0.05)
                nursery.start_soon(client.read, 10, 9000)
                await trio.sleep(0.05)
                assert export.running == 2
                nursery.start_soon(client.read, 20, 1)  # there would be room, but 9000 bytes came first
                await trio.sleep(0.05)
                assert export.running == 2
                hold.set()
            sizes = [length for name, _, length in export.calls]
            assert sizes == [3000, 3000, 9000, 1]

    run(test)


def test_what_is_longer_than_a_payload_is_split_and_what_has_none_is_not() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, maximum_payload=65536)
        async with attached(export) as (client, _):
            assert client.maximum_payload == 65536
            data = os.urandom(300_000)
            await client.write(5000, data, fua=True)
            writes = sorted(call for call in export.calls if call[0] == "write_now")
            assert len(writes) == 5 and all(length <= 65536 for _, _, length in writes)
            assert all(offset % 4096 == 0 for _, offset, _ in writes[1:]), "pieces end on preferred blocks"
            assert await client.read(5000, 300_000) == data
            await client.write_zeroes(0, SIZE)
            assert export.calls[-1] == ("zero", 0, SIZE)
            await client.trim(0, SIZE)
            await client.cache(0, 4096)
            await client.flush()
            assert [name for name, _, _ in export.calls[-3:]] == ["trim", "cache", "flush"]

    run(test)


def test_a_read_longer_than_all_that_may_be_in_flight_is_served() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=4 << 20)
        export.data[:] = os.urandom(4 << 20)
        async with attached(export, limits=ClientLimits(inflight_requests=1, inflight_bytes=1000)) as (client, _):
            assert await client.read(3, (4 << 20) - 3) == export.data[3:]

    run(test)


@both_speeds
def test_an_error_is_that_of_the_request_and_the_connection_goes_on(slow: bool) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow)
        async with attached(export) as (client, _):
            for number in (errno.EIO, errno.ENOMEM, errno.ENOSPC, errno.EPERM, errno.EINVAL):
                export.fail = lambda operation, offset, length, number=number: number if offset == 8192 else 0
                with fails(number, f"mem: READ of 512 bytes at 8192: {os.strerror(number)}"):
                    await client.read(8192, 512)
                with fails(number, "WRITE of 512 bytes at 8192"):
                    await client.write(8192, bytes(512))
                await client.write(0, b"fine")
                assert await client.read(0, 4) == b"fine"
            export.fail = lambda operation, offset, length: errno.EIO if operation == "flush" else 0
            with fails(errno.EIO, "mem: FLUSH: "):
                await client.flush()
            with fails(errno.EIO):
                await client.write(0, b"fine", fua=True)

    run(test)


def test_an_error_in_one_piece_fails_the_call() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, maximum_payload=65536)
        export.fail = lambda operation, offset, length: errno.EIO if offset == 3 * 65536 else 0
        async with attached(export) as (client, _):
            with fails(errno.EIO, f"at {3 * 65536}"):
                await client.read(0, SIZE)
            with fails(errno.EIO, f"at {3 * 65536}"):
                await client.write(0, bytes(SIZE))
            assert await client.read(0, 65536) == bytes(65536)

    run(test)


def test_ranges_outside_the_export_or_unaligned_are_refused_without_asking() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, minimum_block_size=512)
        async with attached(export, contexts=["base:allocation"]) as (client, served):
            calls: list[tuple[Callable[[], Awaitable[object]], int]] = [
                (lambda: client.read(SIZE, 512), errno.EINVAL),
                (lambda: client.read(-512, 512), errno.EINVAL),
                (lambda: client.write(SIZE, bytes(512)), errno.ENOSPC),
                (lambda: client.trim(0, SIZE + 512), errno.ENOSPC),
                (lambda: client.write_zeroes(SIZE, 512), errno.ENOSPC),
                (lambda: client.cache(SIZE, 512), errno.EINVAL),
                (lambda: client.block_status(SIZE, 512), errno.EINVAL),
                (lambda: client.block_status(0, 0), errno.EINVAL),
                (lambda: client.read(1, 512), errno.EINVAL),
                (lambda: client.write(0, b"x"), errno.EINVAL),
            ]
            for call, number in calls:
                with fails(number):
                    await call()
            assert served.server.status().total.requests == 0

    run(test)


def test_the_flags_of_the_server_are_respected() -> None:
    async def test() -> None:
        async with attached(MemoryExport(size_bytes=SIZE, read_only=True, can_multi_conn=False)) as (client, served):
            assert client.read_only and client.can_flush and not client.can_trim and not client.can_multi_conn
            with fails(errno.EROFS, "read-only"):
                await client.write(0, b"x")
            for call in (client.trim, client.write_zeroes):
                with fails(errno.EROFS, "read-only"):
                    await call(0, 4096)
            with fails(errno.ENOTSUP, "offers no BLOCK_STATUS"):
                await client.block_status(0, 512)
            assert served.server.status().total.requests == 0
        async with attached(MemoryExport(size_bytes=SIZE)) as (client, _):
            assert client.can_fua and client.can_trim and client.can_write_zeroes and client.can_fast_zero
            assert client.can_cache and client.can_multi_conn and not client.read_only and not client.rotational
            assert client.flags == transmission_flags(MemoryExport(), structured=True)

    run(test)


def test_block_status_answers_for_each_context_the_server_has() -> None:
    async def test() -> None:
        export = ContextExport(size_bytes=SIZE, flags={"t:diff:a": [0] * 256})
        export.flags["t:diff:a"][2:4] = [1, 1]
        wanted = ["t:diff:a", "t:diff:none", "base:allocation", "t:diff:a"]
        async with attached(export, contexts=wanted) as (client, _):
            assert sorted(client.contexts) == ["base:allocation", "t:diff:a"]
            await client.write(0, bytes(4096))
            assert await client.block_status(0, 16384) == {
                "base:allocation": [(4096, 0), (12288, 3)],
                "t:diff:a": [(8192, 0), (8192, 1)],
            }
            with fails(errno.ENOTSUP):
                async for _ in client.extents("t:diff:none"):
                    pass
            del export.flags["t:diff:a"]
            with fails(errno.EINVAL, "t:diff:a is gone"):
                await client.block_status(0, SIZE)
            assert await client.read(0, 1) == b"\0"

    run(test)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=40), st.integers(1, 5))
def test_extents_walks_the_whole_range_in_merged_runs(grains: list[int], limit: int) -> None:
    async def test() -> None:
        size = 4096 * len(grains)
        export = ContextExport(size_bytes=size, flags={"t:x": grains})
        whole = export.context_extents

        async def few(context: str, offset: int, length: int, most: int) -> list[tuple[int, int]]:
            return await whole(context, offset, min(length, 4096 * limit), min(most, 2))

        export.context_extents = few  # type: ignore[method-assign,assignment]
        async with attached(export, contexts=["t:x"]) as (client, _):
            runs = [run async for run in client.extents("t:x", 100, size - 200)]
            assert runs[0][0] == 100 and sum(length for _, length, _ in runs) == size - 200
            for (offset, length, flags), following in itertools.pairwise(runs):
                assert offset + length == following[0] and flags != following[2]
            for offset, length, flags in runs:
                assert set(grains[offset // 4096 : -(-(offset + length) // 4096)]) == {flags}

    run(test)


@both_speeds
def test_a_cancelled_request_leaves_the_others_and_its_late_reply_is_dropped(slow: bool) -> None:
    async def test() -> None:
        hold = trio.Event()
        export = MemoryExport(size_bytes=SIZE, slow=True)
        export.data[:] = bytes(range(256)) * (SIZE // 256)
        async with attached(export) as (client, _):
            export.hold = hold
            for cancel in range(5):
                with trio.move_on_after(0.01 * cancel) as scope:
                    await client.read(cancel, 100_000)
                assert scope.cancelled_caught
                with trio.move_on_after(0.01 * cancel) as scope:
                    await client.write(SIZE - 10, b"late")
                assert scope.cancelled_caught
            hold.set()
            export.slow = slow
            for offset in range(10):
                assert await client.read(offset, 5000) == export.data[offset : offset + 5000]
            assert not client._requests and not client._room._requests and not client._room._bytes

    run(test)


def test_a_request_that_is_cancelled_in_the_queue_is_not_sent() -> None:
    async def test() -> None:
        hold = trio.Event()
        export = MemoryExport(size_bytes=64 << 20, slow=True, hold=hold)
        export.recording = False
        async with attached(export) as (client, served):
            async with trio.open_nursery() as nursery:
                for number in range(2):
                    # The server takes in no more than 64 MiB that wait, and then the socket is full.
                    nursery.start_soon(client.write, number << 25, bytes(32 << 20))
                await trio.testing.wait_all_tasks_blocked(0.05)
                with trio.move_on_after(0.05) as scope:
                    await client.write(0, b"x" * 100)
                assert scope.cancelled_caught
                hold.set()
            assert served.server.status().total.writes == 2

    run(test, timeout_s=30)


def test_what_the_body_raises_comes_out_as_it_is() -> None:
    async def test() -> None:
        async with serving(MemoryExport()) as served:
            with pytest.raises(ZeroDivisionError):
                async with connect(served.uri()):
                    raise ZeroDivisionError
            with trio.move_on_after(0.01) as scope:
                async with connect(served.uri()):
                    await trio.sleep_forever()
            assert scope.cancelled_caught
            while served.server.status().connections:
                await trio.sleep(0.001)

    run(test)


def test_calls_of_other_tasks_fail_when_the_context_is_left() -> None:
    async def test() -> None:
        export = MemoryExport(slow=True, hold=trio.Event())
        async with serving(export) as served, trio.open_nursery() as nursery:

            async def reader(client: Client) -> None:
                with fails(errno.ESHUTDOWN, "has left"):
                    await client.read(0, 512)

            async with connect(served.uri()) as client:
                nursery.start_soon(reader, client)
                await trio.sleep(0.02)
            with fails(errno.ESHUTDOWN):
                await client.read(0, 512)
            assert export.hold is not None
            export.hold.set()

    run(test)


def test_a_reply_that_is_there_as_the_context_is_left_is_nobodys() -> None:
    """The receiver is awake for it already, and runs after the goodbye in one of two cases: trio's order is random."""

    class Answering(MemoryExport):
        is_answered: trio.Event

        async def read(self, offset: int, length: int, into: memoryview) -> None:
            await super().read(offset, length, into)
            self.is_answered.set()

    async def test() -> None:
        export = Answering(slow=True)
        async with serving(export) as served:
            for number in range(80):
                export.is_answered = trio.Event()
                async with trio.open_nursery() as nursery:

                    async def reader(client: Client) -> None:
                        with suppress(OSError):
                            await client.read(0, 512)

                    async with connect(served.uri()) as client:
                        nursery.start_soon(reader, client)
                        await export.is_answered.wait()
                        for _ in range(number % 4):
                            await trio.lowlevel.checkpoint()
                assert not client._requests and not client._room._requests

    run(test)


def test_a_server_that_goes_away_is_econnreset_for_all_who_wait_and_who_come_later() -> None:
    async def test() -> None:
        export = MemoryExport("mem", slow=True, hold=trio.Event())
        async with serving(export) as served, connect(served.uri()) as client:

            async def reader() -> None:
                with fails(errno.ECONNRESET, str(served.listener.address)):
                    await client.read(0, 512)

            async with trio.open_nursery() as nursery:
                for _ in range(200):
                    nursery.start_soon(reader)
                await trio.sleep(0.02)
                assert served.server.disconnect("mem") == 1
            await reader()

    run(test)


def test_a_server_that_shuts_down_closes_the_connection() -> None:
    async def test() -> None:
        async with serving(MemoryExport()) as served, connect(served.uri()) as client:
            await client.read(0, 1)
            served.server.start_drain(0.5)
            with fails(errno.ECONNRESET, "closed the connection"):
                await client.read(0, 1)

    run(test)


def test_tcp_and_every_form_of_an_address_work() -> None:
    async def main() -> None:
        (listener,) = await open_tcp("127.0.0.1", 0)
        async with trio.open_nursery() as nursery:
            server = await nursery.start(serve, MemoryExports(MemoryExport("demo/vol")), [listener])
            targets: list[tuple[str | Address, str | None]] = [
                (listener.uri("demo/vol"), None),
                (listener.uri("other"), "demo/vol"),
                (listener.uri(), None),
                (("127.0.0.1", listener.port), "demo/vol"),
                (("localhost", listener.port), None),
            ]
            for address, export in targets:
                async with connect(address, export) as client:
                    assert await client.read(0, 4) == bytes(4)
            await server.drain(0)
        with fails(errno.ECONNREFUSED, listener.address):
            async with connect(listener.uri()):
                pass
        async with serving(MemoryExport()) as served, connect(Path(served.listener.address)) as client:
            assert await client.read(0, 4) == bytes(4)

    run(main)


def test_who_cannot_be_reached_is_named_once_and_as_people_write_it(tmp_path: Path) -> None:
    class NoNames(trio.abc.HostnameResolver):
        async def getaddrinfo(self, *args: object) -> Any:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        async def getnameinfo(self, *args: object) -> Any:
            raise AssertionError("nobody asks for that")

    async def main() -> None:
        trio.socket.set_custom_hostname_resolver(NoNames())
        (listener,) = await open_tcp("127.0.0.1", 0)
        tcp = ("127.0.0.1", listener.port)
        listener.close()
        unix = tmp_path / "no.sock"
        for address, export, said in (
            (tcp, "e", f"127.0.0.1:{tcp[1]}/e: Connection refused"),
            (tcp, "", f"127.0.0.1:{tcp[1]}: Connection refused"),
            (unix, "e", f"{unix}, export e: No such file or directory"),
            (unix, "", f"{unix}: No such file or directory"),
            (("a.example", 1), "", "a.example:1: can't find the host a.example: Name or service not known"),
        ):
            with pytest.raises(OSError) as caught:
                async with connect(address, export):
                    pass
            assert caught.value.strerror == said

    run(main)


@pytest.mark.parametrize("name", ["a+b", "a%41", "a b", "a&b=c", "a#b?c;d", "ü"])
def test_the_uri_of_a_unix_socket_leads_there_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    async def test() -> None:
        listener = await open_unix(tmp_path / name)
        try:
            assert parse_uri(listener.uri("demo/vol")) == (tmp_path / name, "demo/vol")
            # A plus sign needs no escape (RFC 3986).
            assert parse_uri("nbd+unix:///x+y?socket=/a+b") == (Path("/a+b"), "x+y")
        finally:
            listener.close()

    run(test)


def test_an_export_that_is_not_there_is_enoent() -> None:
    async def test() -> None:
        async with serving(MemoryExport()) as served:
            for contexts in ([], ["base:allocation"]):
                with fails(errno.ENOENT, "no export 'other'"):
                    async with connect(served.uri("other"), contexts=contexts):
                        pass
            served.exports.error = errno.EACCES
            with fails(errno.EACCES):
                async with connect(served.uri()):
                    pass
            with fails(errno.ENOENT):
                async with connect(served.directory / "no-socket"):
                    pass
            with fails(errno.EINVAL):
                async with connect(Path("/" + "x" * 200)):
                    pass
            for name in ("a\0b", "\udcff", "x" * 5000):
                with fails(errno.EINVAL):
                    async with connect(served.uri(), name):
                        pass

    run(test)


# --- against hostile servers ---


def read_reply(cookie: int, offset: int, data: bytes) -> bytes:
    return (
        struct.pack(
            ">IHHQIQ", wire.STRUCTURED_REPLY_MAGIC, 1, wire.REPLY_TYPE_OFFSET_DATA, cookie, len(data) + 8, offset
        )
        + data
    )


@pytest.mark.parametrize(
    ("answer", "number", "match"),
    [
        (b"", errno.ECONNRESET, "closed the connection"),
        (read_reply(1, 0, b"x" * 512)[:100], errno.ECONNRESET, "closed the connection"),
        (read_reply(2, 0, b"x" * 512), errno.EPROTO, "cookie"),
        (read_reply(1, 512, b"x" * 512), errno.EPROTO, "not asked for"),
        (b"\0" * 16, errno.EPROTO, "not an NBD reply"),
        (struct.pack(">IIQ", wire.SIMPLE_REPLY_MAGIC, 0, 1) + b"x" * 512, errno.EPROTO, "simple reply to READ"),
    ],
)
def test_a_broken_reply_ends_the_connection_with_a_sentence(answer: bytes, number: int, match: str) -> None:
    async def test() -> None:
        async with hostile(answering(answer)) as path, connect(path) as client:
            with fails(number, match):
                await client.read(0, 512)
            with fails(number, match):
                await client.write(0, b"x")

    run(test)


def test_a_broken_reply_fails_all_that_is_in_flight() -> None:
    async def test() -> None:
        async with hostile(answering(b"", b"", b"garbage of 16 by")) as path, connect(path) as client:

            async def reader(number: int) -> None:
                with fails(errno.EPROTO, "not an NBD reply"):
                    await client.read(number, 512)

            async with trio.open_nursery() as nursery:
                for number in range(3):
                    nursery.start_soon(reader, number)
                    await trio.sleep(0.01)
            assert client._room._requests == client._room._bytes == 0

    run(test)


def test_a_reply_before_its_request_is_refused() -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await shake_hands(stream, Manners())
        await stream.send_all(read_reply(1, 0, b"x" * 512))
        await stream.receive_some(1)

    async def test() -> None:
        async with hostile(handler) as path, connect(path) as client:
            await trio.sleep(0.02)
            with fails(errno.EPROTO, "cookie"):
                await client.read(0, 512)

    run(test)


@pytest.mark.parametrize("greeting", [b"", b"NBDMAGIC", b"NBDMAGICIHAVEOPT\0\3"])
def test_a_silent_server_is_etimedout(greeting: bytes) -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await stream.send_all(greeting)
        await trio.sleep_forever()

    async def test() -> None:
        async with hostile(handler) as path:
            with fails(errno.ETIMEDOUT, "within 0.05 s"):
                async with connect(path, limits=ClientLimits(handshake_timeout_s=0.05)):
                    pass

    run(test)


def test_a_server_that_drips_its_handshake_is_etimedout() -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await stream.send_all(b"NBDMAGICIHAVEOPT\0\3")
        while True:
            await stream.send_all(struct.pack(">QIII", wire.REP_MAGIC, 0, 0, 1)[:1])
            await trio.sleep(0.01)

    async def test() -> None:
        async with hostile(handler) as path:
            with fails(errno.ETIMEDOUT):
                async with connect(path, limits=ClientLimits(handshake_timeout_s=0.1)):
                    pass

    run(test)


@pytest.mark.parametrize(
    ("greeting", "number"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", errno.EPROTO),
        (b"NBDMAGIC" + bytes(10), errno.EPROTO),
        (b"NBDMAGIC" + struct.pack(">Q", 0x00420281861253) + bytes(136), errno.EPROTONOSUPPORT),
        (b"NBDMAGICIHAVEOPT\0\0", errno.EPROTONOSUPPORT),
        (b"NBDMAGIC", errno.ECONNRESET),
        (b"NBDMAGICIHAVEOPT\0\3" + bytes(20), errno.EPROTO),
    ],
)
def test_who_is_no_server_of_this_protocol_is_told_so(greeting: bytes, number: int) -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await stream.send_all(greeting)
        await stream.send_eof()
        while await stream.receive_some(1000):
            pass

    async def test() -> None:
        async with hostile(handler) as path:
            with fails(number, str(path)):
                async with connect(path):
                    pass

    run(test)


def simple_done(asked: Asked) -> bytes:
    return struct.pack(">IIQ", wire.SIMPLE_REPLY_MAGIC, 0, asked.cookie)


def test_without_fua_durable_writes_are_flushed() -> None:
    seen: list[Asked] = []
    manners = Manners(structured=False, flags=USUAL_FLAGS & ~wire.SEND_FUA)

    async def test() -> None:
        async with hostile(replying(manners, simple_done, seen)) as path:
            async with connect(path) as client:
                assert not client.can_fua and not client.terms.structured
                await client.write(0, b"data", fua=True)
                await client.write(0, b"data")
            while len(seen) < 4:
                await trio.sleep(0.001)
            assert [asked.command for asked in seen] == [wire.CMD_WRITE, wire.CMD_FLUSH, wire.CMD_WRITE, wire.CMD_DISC]
            assert not any(asked.flags for asked in seen)

    run(test)


# --- extended headers ---

WIDE = Manners(extended=True, size_bytes=1 << 62)


def statuses(asked: Asked, ids: list[int]) -> bytes:
    """One extent of 512 bytes for each context, with its id as the flags."""
    found = b""
    for number in ids:
        payload = struct.pack(">IIQQ", number, 1, 512, number)
        found += extended_chunk(6, payload, cookie=asked.cookie, offset=asked.offset, flags=0)
    return found + extended_done(asked)


def test_requests_with_extended_headers_byte_by_byte() -> None:
    """Written down from the tables of the protocol text, not made by code."""
    seen: list[Asked] = []
    flags = USUAL_FLAGS | wire.BLOCK_STATUS_PAYLOAD
    manners = Manners(extended=True, size_bytes=1 << 62, flags=flags, contexts={7: "a:b", 9: "a:c", 1 << 31: "a:d"})

    def answer(asked: Asked) -> bytes:
        if asked.command == wire.CMD_READ:
            payload = struct.pack(">QI", asked.offset, asked.length)
            return extended_chunk(wire.REPLY_TYPE_OFFSET_HOLE, payload, cookie=asked.cookie, offset=asked.offset)
        if asked.command == wire.CMD_BLOCK_STATUS:
            ids = [9, 1 << 31] if asked.payload else [7, 9, 1 << 31]
            chunks = [
                extended_chunk(
                    6, struct.pack(">IIQQ", one, 1, 512, one), cookie=asked.cookie, offset=asked.offset, flags=0
                )
                for one in ids
            ]
            return b"".join(chunks) + extended_done(asked)
        return extended_done(asked)

    async def test() -> None:
        async with hostile(replying(manners, answer, seen)) as path:
            async with connect(path, contexts=["a:b", "a:c", "a:d"]) as client:
                assert client.terms.extended and client.can_filter_contexts
                assert await client.read(0x1000, 512) == bytes(512)
                await client.write(0x2000, b"data", fua=True)
                await client.trim(0x3000, 1 << 40)
                await client.write_zeroes(0, 1 << 61, no_hole=True, fast=True)
                await client.cache(1 << 33, 1 << 34)
                await client.flush()
                assert await client.block_status(0x4000, 1 << 35, ["a:d", "a:c", "a:d"]) == {
                    "a:d": [(512, 1 << 31)],
                    "a:c": [(512, 9)],
                }
                assert len(await client.block_status(0x4000, 1 << 35)) == 3
            while not seen or seen[-1].command != wire.CMD_DISC:
                await trio.sleep(0.001)
        assert [asked.raw.hex(" ", 4).replace(" ", "") for asked in seen] == [
            "".join(line.split())
            for line in """
                21e41c71 0000 0000 0000000000000001 0000000000001000 0000000000000200
                21e41c71 0021 0001 0000000000000002 0000000000002000 0000000000000004 64617461
                21e41c71 0000 0004 0000000000000003 0000000000003000 0000010000000000
                21e41c71 0012 0006 0000000000000004 0000000000000000 2000000000000000
                21e41c71 0000 0005 0000000000000005 0000000200000000 0000000400000000
                21e41c71 0000 0003 0000000000000006 0000000000000000 0000000000000000
                21e41c71 0020 0007 0000000000000007 0000000000004000 0000000000000010 0000000800000000 00000009 80000000
                21e41c71 0000 0007 0000000000000008 0000000000004000 0000000800000000
                21e41c71 0000 0002 0000000000000009 0000000000000000 0000000000000000
            """.strip().splitlines()
        ]

    run(test)


@pytest.mark.parametrize("manners", [Manners(), Manners(structured=False)], ids=["structured", "simple"])
def test_without_extended_headers_requests_are_compact_and_lengths_have_32_bits(manners: Manners) -> None:
    seen: list[Asked] = []

    def answer(asked: Asked) -> bytes:
        if asked.command == wire.CMD_BLOCK_STATUS:
            payload = struct.pack(">III", 7, asked.length, 0)
            head = (wire.STRUCTURED_REPLY_MAGIC, 1, wire.REPLY_TYPE_BLOCK_STATUS, asked.cookie, len(payload))
            return struct.pack(">IHHQI", *head) + payload
        return simple_done(asked)

    async def test() -> None:
        kind = replace(manners, size_bytes=1 << 40, contexts={7: "a:b"}, flags=USUAL_FLAGS | wire.BLOCK_STATUS_PAYLOAD)
        async with hostile(replying(kind, answer, seen)) as path, connect(path, contexts=["a:b"]) as client:
            assert not client.terms.extended and client.terms.structured is manners.structured
            assert not client.can_filter_contexts, "the flag means nothing without extended headers"
            await client.trim(0, 5 << 30)
            await client.write_zeroes(0, 5 << 30)
            assert [asked.length for asked in seen] == [1 << 30] * 10
            if manners.structured:
                assert await client.block_status(0, 1 << 40) == {"a:b": [(0xFFFFFFFF, 0)]}

    run(test)


@pytest.mark.parametrize("refusal", [wire.REP_ERR_UNSUP, wire.REP_ERR_POLICY, wire.REP_ERR_INVALID])
@pytest.mark.parametrize("structured", [True, False])
def test_what_a_server_does_not_take_is_done_without(refusal: int, structured: bool) -> None:
    async def test() -> None:
        manners = Manners(structured=structured, refusal=refusal)
        async with hostile(answering(manners=manners)) as path, connect(path, contexts=["a:b"]) as client:
            assert (client.terms.structured, client.terms.extended) == (structured, False)

    run(test)


def test_a_range_too_long_for_a_server_is_sent_in_shorter_pieces_from_then_on() -> None:
    """The protocol text, "Size constraints": EOVERFLOW for an effect length beyond the maximum payload."""
    seen: list[Asked] = []
    manners = Manners(extended=True, blocks=(1, 4096, 1 << 18))

    def answer(asked: Asked) -> bytes:
        return extended_error(asked, wire.EOVERFLOW) if asked.length > 1 << 18 else extended_done(asked)

    async def test() -> None:
        async with hostile(replying(manners, answer, seen)) as path, connect(path) as client:
            await client.write_zeroes(0, 1 << 20)
            assert [asked.length for asked in seen] == [1 << 20] + [1 << 18] * 4
            seen.clear()
            await client.trim(0, 1 << 20)
            await client.cache(0, 1 << 20)
            assert [asked.length for asked in seen] == [1 << 18] * 8

    run(test)


def test_other_errors_of_long_ranges_are_errors() -> None:
    async def test() -> None:
        async with (
            hostile(replying(WIDE, lambda asked: extended_error(asked, wire.ENOSPC, b"full"))) as path,
            connect(path) as client,
        ):
            with fails(errno.ENOSPC, f"WRITE_ZEROES of {1 << 50} bytes at 0: full"):
                await client.write_zeroes(0, 1 << 50)

    run(test)


@pytest.mark.parametrize("filtering", [True, False])
def test_some_of_the_contexts_can_be_asked_for(filtering: bool) -> None:
    """Where the server can't leave out the others, the client does."""
    seen: list[Asked] = []
    flags = USUAL_FLAGS | (wire.BLOCK_STATUS_PAYLOAD if filtering else 0)
    manners = Manners(extended=True, flags=flags, contexts={1: "a:b", 2: "a:c"})

    def answer(asked: Asked) -> bytes:
        ids = [number for (number,) in struct.iter_unpack(">I", asked.payload[8:])] or [1, 2]
        return statuses(asked, ids)

    async def test() -> None:
        async with (
            hostile(replying(manners, answer, seen)) as path,
            connect(path, contexts=["a:b", "a:c", "a:d"]) as client,
        ):
            assert await client.block_status(0, 4096, ["a:c"]) == {"a:c": [(512, 2)]}
            assert await client.block_status(0, 4096, ["a:b", "a:c"]) == {"a:b": [(512, 1)], "a:c": [(512, 2)]}
            assert [run async for run in client.extents("a:b", 0, 1024)] == [(0, 1024, 1)]
            assert [bool(asked.payload) for asked in seen] == [filtering, False, filtering, filtering]
            for wanted in (["a:d"], ["a:b", "a:d"], []):
                with fails(errno.ENOTSUP, "BLOCK_STATUS"):
                    await client.block_status(0, 4096, wanted)

    run(test)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda asked: extended_chunk(0, cookie=asked.cookie, offset=asked.offset + 512), "offset"),
        (lambda asked: struct.pack(">IIQ", wire.SIMPLE_REPLY_MAGIC, 0, asked.cookie), "without an extended header"),
        (
            lambda asked: struct.pack(">IHHQI", wire.STRUCTURED_REPLY_MAGIC, 1, 0, asked.cookie, 0),
            "without an extended header",
        ),
        (lambda asked: extended_chunk(5, bytes(12), cookie=asked.cookie, offset=asked.offset), "block status"),
    ],
    ids=["offset", "simple", "structured", "status"],
)
def test_a_server_that_forgets_what_it_agreed_to_is_eproto(answer: Callable[[Asked], bytes], match: str) -> None:
    async def test() -> None:
        async with hostile(replying(WIDE, answer)) as path, connect(path) as client:
            with fails(errno.EPROTO, match):
                await client.trim(0, 1 << 40)

    run(test)


# --- what mirroring stands on ---


async def never(stream: trio.SocketStream) -> None:
    """Agrees to all, and then says nothing, but goes on reading."""
    await shake_hands(stream, WIDE)
    while await stream.receive_some(1 << 20):
        pass


def test_a_server_that_never_answers_costs_no_more_than_what_may_be_in_flight() -> None:
    """Whatever is asked and given up: the buffers of callers that wait for room aren't made yet."""
    limits = ClientLimits(inflight_requests=8, inflight_bytes=8 << 20)

    async def test() -> None:
        async with hostile(never) as path, connect(path, limits=limits) as client:

            async def give_up() -> None:
                with trio.move_on_after(0.05):
                    await client.read(0, 1 << 20)

            tracemalloc.start()
            try:
                for _ in range(3):
                    async with trio.open_nursery() as nursery:
                        for _ in range(200):
                            nursery.start_soon(give_up)
                assert client._room._requests == len(client._requests) == 8
                assert tracemalloc.get_traced_memory()[1] < 24 << 20
            finally:
                tracemalloc.stop()
            with trio.move_on_after(0.01) as scope:
                await client.flush()
            assert scope.cancelled_caught, "a deadline of the caller's holds while there is no room"

    run(test)


def test_what_was_not_sent_gives_its_room_back_when_it_is_cancelled() -> None:
    """The server reads nothing, so the second write stays in the queue."""

    async def deaf(stream: trio.SocketStream) -> None:
        await shake_hands(stream, WIDE)
        await trio.sleep_forever()

    async def test() -> None:
        limits = ClientLimits(inflight_bytes=64 << 20)
        async with hostile(deaf) as path, connect(path, limits=limits) as client, trio.open_nursery() as nursery:
            nursery.start_soon(client.write, 0, bytes(32 << 20))
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(100):
                with trio.move_on_after(0) as scope:
                    await client.write(0, bytes(32 << 20))
                with trio.move_on_after(0.001) as scope:
                    await client.write(0, bytes(32 << 20))
                assert scope.cancelled_caught
                assert len(client._outbox) == 0 and client._room._bytes == 32 << 20
            nursery.cancel_scope.cancel()

    run(test)


def test_whoever_waits_for_the_end_of_a_connection_is_told_why() -> None:
    async def test() -> None:
        export = MemoryExport()
        async with serving(export) as served, trio.open_nursery() as nursery:
            ends: list[OSError] = []

            async def watch(client: Client) -> None:
                ends.append(await client.failed())

            async with connect(served.uri()) as client:
                nursery.start_soon(watch, client)
                await client.read(0, 1)
                assert client.failure is None and not ends
                served.server.disconnect("mem")
                assert (await client.failed()).errno == errno.ECONNRESET
                assert client.failure is not None
            async with connect(served.uri()) as client:
                nursery.start_soon(watch, client)
                await trio.testing.wait_all_tasks_blocked()
            await trio.testing.wait_all_tasks_blocked()
            assert [end.errno for end in ends] == [errno.ECONNRESET, errno.ESHUTDOWN]

    run(test)


def test_cancelling_most_of_many_requests_leaves_the_rest_right() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=True, delay_s=0.001)
        export.data[:] = os.urandom(SIZE)
        good = 0
        async with attached(export) as (client, _):

            async def one(number: int) -> None:
                nonlocal good
                offset = number * 997 % (SIZE - 9000)
                with trio.move_on_after(math.inf if number % 3 == 0 else 0.0005 * (number % 20)):
                    assert await client.read(offset, 9000) == export.data[offset : offset + 9000]
                    good += 1

            async with trio.open_nursery() as nursery:
                for number in range(900):
                    nursery.start_soon(one, number)
            assert good >= 300
            await client.flush()
            while client._requests:
                await trio.sleep(0.001)
            assert client._room._requests == client._room._bytes == 0

    run(test)


def test_gigabytes_that_a_server_announces_take_no_memory() -> None:
    huge = struct.pack(">IHHQI", wire.STRUCTURED_REPLY_MAGIC, 0, wire.REPLY_TYPE_OFFSET_DATA, 1, 0xFFFFFFFF)

    async def test() -> None:
        async with hostile(answering(huge + bytes(8))) as path, connect(path) as client:
            tracemalloc.start()
            with fails(errno.EPROTO):
                await client.read(0, 512)
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
            tracemalloc.stop()

    run(test)


# --- the handshake, without IO ---


GREETING = b"NBDMAGICIHAVEOPT\0\3"
NO_EXTENDED = option_reply(wire.OPT_EXTENDED_HEADERS, wire.REP_ERR_UNSUP)
EXTENDED = option_reply(wire.OPT_EXTENDED_HEADERS, wire.REP_ACK)
NO_STRUCTURED = NO_EXTENDED + option_reply(wire.OPT_STRUCTURED_REPLY, wire.REP_ERR_UNSUP)
STRUCTURED = NO_EXTENDED + option_reply(wire.OPT_STRUCTURED_REPLY, wire.REP_ACK)
ACK = option_reply(wire.OPT_GO, wire.REP_ACK)
EXPORT = option_reply(wire.OPT_GO, wire.REP_INFO, struct.pack(">HQH", 0, 1 << 30, wire.HAS_FLAGS))


def blocks(minimum: int, preferred: int, maximum: int) -> bytes:
    return option_reply(wire.OPT_GO, wire.REP_INFO, struct.pack(">HIII", 3, minimum, preferred, maximum))


def context(number: int, name: str) -> bytes:
    data = struct.pack(">I", number) + name.encode()
    return option_reply(wire.OPT_SET_META_CONTEXT, wire.REP_META_CONTEXT, data)


CONTEXT_ACK = option_reply(wire.OPT_SET_META_CONTEXT, wire.REP_ACK)


def talk(server: bytes, contexts: Sequence[str] = ("a:b",), *, tls: bool = False) -> tuple[Terms, bytes]:
    """Negotiate with what a server says; returns the terms and what was said to it, with UPGRADE where TLS begins.

    EOFError if it wants more.
    """
    steps = negotiate("mem", contexts, tls=tls)
    said = b""
    step = next(steps)
    while True:
        try:
            if isinstance(step, bytes):
                said += step
                step = steps.send(b"")
            elif isinstance(step, Upgrade):
                said += b"UPGRADE"
                step = steps.send(b"")
            else:
                assert 0 < step <= 65536
                if len(server) < step:
                    raise EOFError
                part, server = server[:step], server[step:]
                step = steps.send(part)
        except StopIteration as end:
            assert server == b"", "bytes behind the handshake belong to transmission"
            return end.value, said


def test_without_go_the_old_way_is_taken() -> None:
    flags = wire.HAS_FLAGS | wire.SEND_FLUSH
    for greeting, padding in [(GREETING, b""), (b"NBDMAGICIHAVEOPT\0\1", bytes(124))]:
        server = greeting + NO_STRUCTURED + option_reply(wire.OPT_GO, wire.REP_ERR_UNSUP)
        terms, said = talk(server + struct.pack(">QH", 1 << 20, flags) + padding)
        assert terms == Terms(1 << 20, flags) and said.endswith(b"\0\0\0\1\0\0\0\3mem")
        assert said[:4] == struct.pack(">I", 1 if padding else 3)


def test_the_block_sizes_of_the_server_are_taken_and_its_payload_is_capped() -> None:
    terms, _ = talk(GREETING + NO_STRUCTURED + EXPORT + blocks(512, 65536, 0xFFFFFFFF) + ACK)
    assert (terms.minimum_block_size, terms.preferred_block_size, terms.maximum_payload) == (512, 65536, 32 << 20)
    terms, _ = talk(GREETING + NO_STRUCTURED + EXPORT + blocks(1, 4096, 65536) + ACK)
    assert terms.maximum_payload == 65536


def test_extended_headers_are_asked_for_first_and_nothing_else_after() -> None:
    server = GREETING + EXTENDED + context(77, "a:b") + CONTEXT_ACK + EXPORT + ACK
    terms, said = talk(server)
    assert terms.extended and terms.structured and terms.contexts == {77: "a:b"} and not terms.encrypted
    assert [number for _, number, _ in options(said)] == [11, 10, 7]
    assert [number for _, number, _ in options(talk(GREETING + NO_STRUCTURED + EXPORT + ACK)[1])] == [11, 8, 7]


def options(said: bytes) -> list[tuple[int, int, bytes]]:
    """Behind the flags; with where each begins."""
    found = []
    at = said.index(b"IHAVEOPT")
    while at < len(said):
        magic, option, length = struct.unpack_from(">QII", said, at)
        assert magic == wire.IHAVEOPT
        found.append((at, option, said[at + 16 : at + 16 + length]))
        at += 16 + length
        at += 7 if said[at:].startswith(b"UPGRADE") else 0
    return found


TLS = option_reply(wire.OPT_STARTTLS, wire.REP_ACK)


def test_tls_comes_before_all_else() -> None:
    terms, said = talk(GREETING + TLS + EXTENDED + context(77, "a:b") + CONTEXT_ACK + EXPORT + ACK, tls=True)
    assert terms.encrypted and terms.extended
    assert [number for _, number, _ in options(said)] == [5, 11, 10, 7]
    assert said.index(b"UPGRADE") == 4 + 16, "right behind STARTTLS, which is the first option"


@pytest.mark.parametrize(
    ("refusal", "number"),
    [
        (wire.REP_ERR_UNSUP, errno.EPROTONOSUPPORT),
        (wire.REP_ERR_PLATFORM, errno.EPROTONOSUPPORT),
        (wire.REP_ERR_INVALID, errno.EPROTONOSUPPORT),
        (wire.REP_ERR_POLICY, errno.EACCES),
        (wire.REP_ERR_SHUTDOWN, errno.ESHUTDOWN),
        (wire.REP_ERR_TLS_REQD, errno.EPROTO),
        (wire.REP_INFO, errno.EPROTO),
    ],
)
def test_without_tls_nothing_more_is_said_to_who_was_told_to_speak_it(refusal: int, number: int) -> None:
    with fails(number):
        talk(GREETING + option_reply(wire.OPT_STARTTLS, refusal), tls=True)


@pytest.mark.parametrize("before", [b"", NO_EXTENDED, NO_STRUCTURED], ids=["first", "second", "GO"])
def test_a_server_that_demands_tls_says_so_with_the_next_step(before: bytes) -> None:
    option = {b"": wire.OPT_EXTENDED_HEADERS, NO_EXTENDED: wire.OPT_STRUCTURED_REPLY}.get(before, wire.OPT_GO)
    demand = before + option_reply(option, wire.REP_ERR_TLS_REQD)
    with fails(errno.EPROTONOSUPPORT, "nbds://"):
        talk(GREETING + demand)
    with fails(errno.EPROTO, "where there is TLS"):
        talk(GREETING + TLS + demand, tls=True)


def test_unknown_informations_are_passed_over() -> None:
    unknown = option_reply(wire.OPT_GO, wire.REP_INFO, b"\0\x63whatever")
    terms, _ = talk(GREETING + NO_STRUCTURED + unknown + EXPORT + unknown + ACK)
    assert terms.size_bytes == 1 << 30


def test_contexts_that_the_server_lacks_are_left_out() -> None:
    wanted = ["a:b", "a:c", "a:b"]
    terms, _ = talk(GREETING + STRUCTURED + context(77, "a:c") + CONTEXT_ACK + EXPORT + ACK, wanted)
    assert terms.contexts == {77: "a:c"} and terms.structured
    for refusal in (wire.REP_ERR_UNSUP, wire.REP_ERR_UNKNOWN, wire.REP_ERR_INVALID):
        refused = option_reply(wire.OPT_SET_META_CONTEXT, refusal)
        assert talk(GREETING + STRUCTURED + refused + EXPORT + ACK, wanted)[0].contexts == {}
    assert talk(GREETING + NO_STRUCTURED + EXPORT + ACK, wanted)[0].contexts == {}


@pytest.mark.parametrize(
    ("refusal", "number"),
    [
        (wire.REP_ERR_UNKNOWN, errno.ENOENT),
        (wire.REP_ERR_POLICY, errno.EACCES),
        (wire.REP_ERR_TLS_REQD, errno.EPROTONOSUPPORT),
        (wire.REP_ERR_SHUTDOWN, errno.ESHUTDOWN),
        (wire.REP_ERR_BLOCK_SIZE_REQD, errno.EINVAL),
        (wire.REP_ERR_EXT_HEADER_REQD, errno.EPROTONOSUPPORT),
        (0x80001234, errno.EPROTO),
    ],
)
def test_a_refusal_of_go_says_why(refusal: int, number: int) -> None:
    with fails(number, "because\ufffd"):
        talk(GREETING + NO_STRUCTURED + option_reply(wire.OPT_GO, refusal, b"because\x07"))


@pytest.mark.parametrize(
    "server",
    [
        struct.pack(">QIII", 1, wire.OPT_EXTENDED_HEADERS, 1, 0),
        option_reply(wire.OPT_GO, wire.REP_ACK),
        struct.pack(">QIII", wire.REP_MAGIC, wire.OPT_EXTENDED_HEADERS, 1, 1 << 31),
        option_reply(wire.OPT_EXTENDED_HEADERS, wire.REP_ACK, b"x"),
        NO_EXTENDED + option_reply(wire.OPT_STRUCTURED_REPLY, wire.REP_ACK, b"x"),
        NO_EXTENDED + option_reply(wire.OPT_STRUCTURED_REPLY, wire.REP_INFO),
        EXTENDED + option_reply(wire.OPT_STRUCTURED_REPLY, wire.REP_ACK),
        EXTENDED + context(1, "a:b") + CONTEXT_ACK + option_reply(wire.OPT_GO, wire.REP_ERR_UNSUP),
        STRUCTURED + context(1, "a:other"),
        STRUCTURED + context(1, "a:b") + context(1, "a:b"),
        STRUCTURED + option_reply(wire.OPT_SET_META_CONTEXT, wire.REP_META_CONTEXT, b"\0\0\0"),
        STRUCTURED + option_reply(wire.OPT_SET_META_CONTEXT, wire.REP_INFO),
        NO_STRUCTURED + ACK,
        NO_STRUCTURED + option_reply(wire.OPT_GO, wire.REP_INFO, b"\0"),
        NO_STRUCTURED + option_reply(wire.OPT_GO, wire.REP_INFO, bytes(11)),
        NO_STRUCTURED + option_reply(wire.OPT_GO, wire.REP_INFO, b"\0\3" + bytes(11)),
        NO_STRUCTURED + option_reply(wire.OPT_GO, wire.REP_SERVER),
        NO_STRUCTURED + option_reply(wire.OPT_GO, wire.REP_INFO, b"\0\x63") * 1100,
        NO_STRUCTURED + option_reply(wire.OPT_GO, wire.REP_INFO, struct.pack(">HQH", 0, MAX_SIZE_BYTES + 1, 1)) + ACK,
        NO_STRUCTURED + option_reply(wire.OPT_GO, wire.REP_INFO, struct.pack(">HQH", 0, 4096, 0)) + ACK,
        *(
            NO_STRUCTURED + EXPORT + blocks(*sizes) + ACK
            for sizes in [(0, 4096, 65536), (3, 4096, 65536), (1 << 17, 1 << 17, 1 << 20), (512, 0, 65536)]
        ),
        NO_STRUCTURED + EXPORT + blocks(512, 1000, 65536) + ACK,
        NO_STRUCTURED + EXPORT + blocks(4096, 4096, 512) + ACK,
    ],
)
def test_a_handshake_that_breaks_the_protocol_is_eproto(server: bytes) -> None:
    with fails(errno.EPROTO):
        talk(GREETING + server)


@given(st.data())
def test_a_garbled_handshake_ends_or_is_eproto(data: st.DataObject) -> None:
    sound = GREETING + STRUCTURED + context(77, "a:b") + CONTEXT_ACK + EXPORT + blocks(1, 4096, 65536) + ACK
    raw = bytearray(sound)
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4)):
        raw[at] = data.draw(st.integers(0, 255))
    try:
        talk(bytes(raw))
    except (EOFError, AssertionError):
        pass  # it waits for more, or something is left, which is for transmission to judge
    except OSError as error:
        assert error.errno and error.strerror


def test_names_that_the_protocol_forbids_are_not_sent() -> None:
    for name in ("x" * 4097, "a\0b"):
        with fails(errno.EINVAL):
            steps = negotiate(name, ())
            next(steps)
            steps.send(b"NBDMAGIC")
            steps.send(b"IHAVEOPT\0\3")
            steps.send(b"")


# --- addresses and pieces ---


@pytest.mark.parametrize(
    ("uri", "address", "export"),
    [
        ("nbd://host/pool/vol", ("host", 10809), "pool/vol"),
        ("nbd://host:1234", ("host", 1234), ""),
        ("nbd://[::1]:5/a%20b%3f", ("::1", 5), "a b?"),
        ("nbd://host/pool/vol@snap", ("host", 10809), "pool/vol@snap"),
        ("nbd+unix:///pool/vol?socket=/run/x%20y.sock", Path("/run/x y.sock"), "pool/vol"),
        ("nbd+unix://?socket=rel", Path("rel"), ""),
    ],
)
def test_uris(uri: str, address: object, export: str) -> None:
    assert parse_uri(uri) == (address, export)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "/run/nbd.sock",
        "http://host/x",
        "nbd:///x",
        "nbd://host:99999/x",
        "nbd://host:x/y",
        "nbd://[::1/x",
        "nbd://me@host/x",
        "nbd://host/x?socket=/y",
        "nbd://host/x#y",
        "nbd://host/%ff",
        "nbd+unix:///x",
        "nbd+unix:///x?socket=",
        "nbd+unix:///x?socket=/a&socket=/b",
        "nbd+unix:///x?socket=/a&tls-certificates=/b",
        "nbd://host/x?tls-hostname=h",
        "nbds://host/x?tls-verify-peer=yes",
        "nbds://host/x?tls-verify-peer=",
        "nbds://host/x?tls-certificates=/a&tls-certificates=/b",
        "nbds://host/x?tls-psk-file=/a",
        "nbds://me@host/x",
        "nbds:///x",
        "nbds+unix:///x?tls-hostname=h",
        "nbds+tcp://host/x",
        "nbd+://host/x",
        "nbd+unix://host/x?socket=/a",
    ],
)
def test_bad_uris_are_einval(uri: str) -> None:
    with fails(errno.EINVAL):
        parse_uri(uri)


@pytest.mark.parametrize(
    ("uri", "target"),
    [
        ("nbds://host/x", Target(("host", 10809), "x", TlsOptions())),
        ("nbds://[::1]:7/", Target(("::1", 7), "", TlsOptions())),
        (
            "nbds://host/x?tls-certificates=/etc/p%20ki&tls-hostname=other.example&tls-type=x509",
            Target(("host", 10809), "x", TlsOptions(Path("/etc/p ki"), "other.example")),
        ),
        ("nbds://host/x?tls-verify-peer=0", Target(("host", 10809), "x", TlsOptions(verify=False))),
        (
            "nbds+unix:///a/b?socket=/s&tls-certificates=pki&tls-verify-peer=1",
            Target(Path("/s"), "a/b", TlsOptions(Path("pki"))),
        ),
        ("nbd://host/x", Target(("host", 10809), "x", None)),
    ],
)
def test_uris_with_tls(uri: str, target: Target) -> None:
    assert parse_target(uri) == target


def test_tls_uris_are_refused_where_no_tls_is_spoken() -> None:
    for uri in ("nbds://host/x", "nbds+unix:///x?socket=/y"):
        with fails(errno.EPROTONOSUPPORT, "TLS"):
            parse_uri(uri)
    for kind in ("psk", "anon"):
        with fails(errno.EPROTONOSUPPORT, "tls-type=x509"):
            parse_target(f"nbds://host/x?tls-type={kind}")


@given(
    st.integers(0, 1 << 20),
    st.integers(0, 1 << 20),
    st.sampled_from([1, 512, 4096]),
    st.integers(1, 200),
    st.sampled_from([1, 16, 1 << 10]),
)
def test_pieces_cover_the_range_once_and_are_aligned(
    offset: int, length: int, minimum: int, payload: int, preferred: int
) -> None:
    offset, length = offset // minimum * minimum, length // minimum * minimum
    longest = max(payload, length // minimum // 50 + 1) * minimum
    terms = Terms(1 << 30, 1, False, {}, minimum, preferred * minimum, longest)
    at = offset
    for start, size in _pieces(offset, length, terms):
        assert start == at and 0 < size <= longest and size % minimum == 0
        at += size
    assert at == offset + length


def test_a_socket_for_somebody_else_to_speak_on_has_simple_replies() -> None:
    async def test() -> None:
        async with serving(MemoryExport()) as served:
            sock, terms = await attach(Path(served.listener.address), "mem")
            with sock:
                assert (terms.size_bytes, terms.structured) == (1 << 20, False)
                assert terms.flags & wire.CAN_MULTI_CONN
                head = wire.REQUEST_MAGIC << 32 | wire.CMD_READ
                sock.send(wire.REQUEST.pack(head, 7, 0, 16))
                await trio.lowlevel.wait_readable(sock)
                assert sock.recv(64) == wire.SIMPLE_REPLY.pack(wire.SIMPLE_HEAD, 7) + bytes(16)

    run(test)


def test_an_export_can_be_described_without_opening_it() -> None:
    async def test() -> None:
        async with serving(MemoryExport(size_bytes=3 << 20)) as served:
            address = Path(served.listener.address)
            terms = await describe(address, "mem")
            assert terms.size_bytes == 3 << 20
            assert served.exports.open == 0
            with fails(errno.ENOENT, "no such export"):
                await describe(address, "other")

    run(test)
