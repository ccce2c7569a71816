"""A server is replaced under its clients: what they see is a pause.

Each hand-over goes the whole way: the first server stops, what it leaves is written down and read back, with
duplicates of the sockets as a process gets them, and the next server goes on.
"""

from __future__ import annotations

import logging
import math
import random
import socket
from collections.abc import Sequence
from contextvars import ContextVar
from functools import partial

import pytest
import trio
import trio.testing

from nbd import wire
from nbd.connection import BATCH_WRITES, PIECE_PATIENCE_S
from nbd.counters import Counters
from nbd.server import Server
from nbd.sparse import CHUNK_BYTES
from nbd.suspended import HEADER, MAGIC, FormatError, LongRead, LongWrite, Suspended, Work, decode, encode
from nbd.transmission import Session
from nbd.workshop import INBOX_BYTES, Limits
from tests.nbd.client import Closed, RawClient, Served, filter_bytes, request_bytes, run, serving
from tests.nbd.memory import MemoryExport, MemoryExports, SparseExport
from tests.nbd.test_connection import pattern

SIZE = 8 << 20
all_forms = pytest.mark.parametrize("form", ["simple", "structured", "extended"])


def handed_over(left: Sequence[Suspended]) -> list[Suspended]:
    """As another process sees it."""
    raw = b"".join(encode(left))
    sockets = [socket.socket(fileno=socket.dup(one.sock.fileno())) for one in left]
    for one in left:
        one.close()
    for sock in sockets:
        sock.setblocking(False)
    return decode(raw, sockets)


async def replace(served: Served, left: list[Suspended]) -> Server:
    """Another server goes on where one was suspended."""
    return await served.serve(resumed=handed_over(left))


@all_forms
def test_an_idle_client_goes_on_with_the_next_server(form: str) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        async with serving(export) as served:
            client = await served.connect()
            await client.go(structured=form == "structured", extended=form == "extended", status=form != "simple")
            data = pattern(4096)[:4096]
            assert (await client.ask(wire.CMD_WRITE, 8192, data=data)).error == 0
            left = await served.server.suspend(1.0)
            assert len(left) == 1 and not left[0].input and not left[0].output and not left[0].work
            server = await replace(served, left)
            assert (await client.ask(wire.CMD_READ, 8192, 4096)).data == data
            if form != "simple":
                assert (await client.ask(wire.CMD_BLOCK_STATUS, 0, SIZE)).extents[1] == (4096, 0)
            (status,) = server.status().connections
            assert status.export == "mem" and status.counters.writes == status.counters.reads == 1
            newcomer = await served.connect()
            await newcomer.go()
            assert (await newcomer.ask(wire.CMD_READ, 8192, 4096)).data == data
            await client.disconnect()

    run(test)


def test_an_export_that_is_not_there_yet_keeps_only_its_own_clients_waiting() -> None:
    async def test() -> None:
        late, there = (MemoryExport(size_bytes=SIZE, name=name) for name in ("late", "there"))
        async with serving(late, there) as served:
            clients = [await served.connect() for _ in range(3)]
            for client, name in zip(clients, ("late", "there", "late"), strict=True):
                await client.go(name)
            left = await served.server.suspend(1.0)
            acquire, comes = served.exports.acquire, trio.Event()

            async def wait_for_it(name: str, client: object = None) -> MemoryExport:
                if name == "late":
                    await comes.wait()
                return await acquire(name, client)

            served.exports.acquire = wait_for_it  # type: ignore[method-assign]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(replace, served, left)
                for client in clients:
                    await client.send(request_bytes(wire.CMD_WRITE, 7, 0, data=b"x" * 512))
                with trio.move_on_after(5):
                    assert (await clients[1].reply()).cookie == 7
                written = bytes(there.data[:512]), bytes(late.data[:512])
                comes.set()  # whatever it is, or this test would not end
                assert written == (b"x" * 512, bytes(512))
                for client in (clients[0], clients[2]):
                    assert (await client.reply()).cookie == 7

    run(test)


@pytest.mark.alone
def test_suspending_an_idle_client_takes_no_time() -> None:
    async def test() -> None:
        async with serving(MemoryExport(size_bytes=SIZE)) as served:
            for _ in range(5):
                await (await served.connect()).go()
            with trio.fail_after(1):
                left = await served.server.suspend(math.inf)
            assert len(left) == 5
            await replace(served, left)
            for client in served.clients:
                await client.disconnect()

    run(test)


@pytest.mark.parametrize("cut", [1, 27, 28, 29, 28 + 4096, 28 + 4096 + 13])
def test_half_a_request_is_finished_by_the_next_server(cut: int) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        async with serving(export) as served:
            client = await served.connect()
            await client.go()
            data = pattern(8192)[:8192]
            request = request_bytes(wire.CMD_WRITE, 7, 4096, data=data)
            await client.send(request[:cut])
            await trio.testing.wait_all_tasks_blocked()
            left = await served.server.suspend(1.0)
            await replace(served, left)
            await client.send(request[cut:])
            assert (await client.reply()).cookie == 7
            assert export.data[4096:12288] == data

    run(test)


@pytest.mark.parametrize("fua", [False, True])
@pytest.mark.parametrize("slow", [False, True])
def test_a_long_write_goes_on_where_it_was(slow: bool, fua: bool) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow)
        async with serving(export) as served:
            client = await served.connect()
            await client.go()
            data = random.Random(5).randbytes(4 << 20)
            flags = wire.CMD_FLAG_FUA if fua else 0
            request = request_bytes(wire.CMD_WRITE, 9, 4096, flags=flags, data=data)
            sent, server = 0, served.server
            for cut in (INBOX_BYTES + 1000, INBOX_BYTES + 300_000, 3_000_000):
                await client.send(request[sent:cut])
                sent = cut
                await trio.testing.wait_all_tasks_blocked()
                left = await server.suspend(1.0)
                assert left[0].writing is not None and left[0].writing.length == len(data)
                server = await replace(served, left)
            await client.send(request[sent:])
            reply = await client.reply()
            assert reply.cookie == 9 and reply.error == 0
            assert export.data[4096 : 4096 + len(data)] == data
            assert ("flush", 0, 0) in export.calls or not fua

    run(test)


def test_a_write_that_failed_in_its_first_piece_fails_after_the_hand_over_too() -> None:
    async def test() -> None:
        broken = True
        export = MemoryExport(size_bytes=SIZE, fail=lambda operation, *_: 5 if broken and "write" in operation else 0)
        async with serving(export) as served:
            client = await served.connect()
            await client.go()
            request = request_bytes(wire.CMD_WRITE, 9, 0, data=bytes(4 << 20))
            await client.send(request[: 2 << 20])
            await trio.testing.wait_all_tasks_blocked()
            left = await served.server.suspend(1.0)
            broken = False
            await replace(served, left)
            await client.send(request[2 << 20 :])
            assert (await client.reply()).error == wire.EIO

    run(test)


@all_forms
def test_what_takes_longer_than_the_patience_is_done_by_the_next_server(form: str) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=True, hold=trio.Event())
        async with serving(export) as served:
            client = await served.connect()
            await client.go(structured=form == "structured", extended=form == "extended", status=form != "simple")
            data = pattern(5000)[:5000]
            expected = {
                await client.request(wire.CMD_WRITE, 0, data=data),
                await client.request(wire.CMD_WRITE, 8192, data=data[:4096]),
                await client.request(wire.CMD_WRITE, 16384, data=data[:4096]),
                await client.request(wire.CMD_WRITE, 65536, data=data, flags=wire.CMD_FLAG_FUA),
                await client.request(wire.CMD_FLUSH),
                await client.request(wire.CMD_TRIM, 1 << 20, 4096),
                await client.request(wire.CMD_WRITE_ZEROES, 2 << 20, 4096, flags=wire.CMD_FLAG_FUA),
                await client.request(wire.CMD_READ, 4 << 20, 100),
                await client.request(wire.CMD_READ, 4 << 20, 3 << 20),
                await client.request(wire.CMD_CACHE, 0, 4096),
            }
            if form != "simple":
                expected.add(await client.request(wire.CMD_BLOCK_STATUS, 0, SIZE))
            if form == "extended":
                expected.add(await client.request(wire.CMD_BLOCK_STATUS, 0, data=filter_bytes(SIZE, 1)))
            await trio.testing.wait_all_tasks_blocked()
            left = await served.server.suspend(0.05)
            assert export.running == 0
            assert sum(work.requests for work in left[0].work) == len(expected)
            export.hold = None
            server = await replace(served, left)
            replies = [await client.reply() for _ in expected]
            assert {reply.cookie for reply in replies} == expected and not any(reply.error for reply in replies)
            assert export.data[:5000] == data == export.data[65536 : 65536 + 5000]
            assert export.data[8192:12288] == data[:4096] == export.data[16384 : 16384 + 4096]
            (status,) = server.status().connections
            assert status.counters.requests == len(expected)

    run(test)


def test_a_long_write_that_waits_for_the_storage_waits_on_with_the_next_server() -> None:
    async def test() -> None:
        hold = trio.Event()
        export = MemoryExport(size_bytes=SIZE, slow=True, hold=hold)
        async with serving(export) as served:
            client = await served.connect()
            await client.go()
            data = random.Random(6).randbytes(2 << 20)
            cookie = await client.request(wire.CMD_WRITE, 8192, data=data)
            await trio.sleep(3 * PIECE_PATIENCE_S)
            server = served.server
            for _ in range(2):
                left = await server.suspend(0.05)
                assert [work.kind for work in left[0].work] == ["long write"]
                server = await replace(served, left)
            hold.set()
            reply = await client.reply()
            assert (reply.cookie, reply.error) == (cookie, 0)
            assert export.data[8192 : 8192 + len(data)] == data

    run(test)


@pytest.mark.parametrize("form", ["structured", "extended"])
def test_a_read_that_is_cut_short_between_two_chunks_goes_on_behind_what_was_told(form: str) -> None:
    async def test() -> None:
        export = SparseExport(size_bytes=SIZE, slow=True)
        export.data[: 1 << 20] = export.data[6 << 20 : 7 << 20] = b"x" * (1 << 20)
        plain = export.read

        async def read(offset: int, length: int, into: memoryview) -> None:
            if offset and export.hold is None:
                export.hold = trio.Event()  # the first chunk and the hole behind it were told
            await plain(offset, length, into)

        export.read = read  # type: ignore[method-assign]
        async with serving(export) as served:
            client = await served.connect()
            await client.go(structured=form == "structured", extended=form == "extended", status=True)
            cookie = await client.request(wire.CMD_READ, 0, SIZE)
            await trio.testing.wait_all_tasks_blocked()
            left = await served.server.suspend(0.05)
            (work,) = [work for work in left[0].work if work.kind == "long read"]
            assert work.arguments == (cookie, 0, SIZE, 6 << 20) and work.length == SIZE - (6 << 20)
            export.read = plain  # type: ignore[method-assign]
            export.hold = None
            await replace(served, left)
            reply = await client.reply()
            assert reply.cookie == cookie
            assert reply.data == export.data and reply.holes == ((1 << 20, 5 << 20), (7 << 20, 1 << 20))

    run(test)


@pytest.mark.parametrize("fua", [False, True])
def test_a_long_write_that_waits_for_room_is_written_down_too(fua: bool) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=True, hold=trio.Event())
        async with serving(export) as served:
            client = await served.connect()
            await client.go()
            data = random.Random(6).randbytes(3 << 20)
            cookie = await client.request(wire.CMD_WRITE, 512, data=data, flags=wire.CMD_FLAG_FUA if fua else 0)
            await trio.sleep(0.2)  # more than it has patience with a piece
            left = await served.server.suspend(0.05)
            assert [work.kind for work in left[0].work] == ["long write"]
            export.hold = None
            await replace(served, left)
            reply = await client.reply()
            assert (reply.cookie, reply.error) == (cookie, 0)
            assert export.data[512 : 512 + len(data)] == data

    run(test)


def test_a_long_write_that_is_just_taken_in_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever its connection gives way to others, and is cut short there."""
    monkeypatch.setattr("nbd.connection.SLICE_S", -1.0)
    monkeypatch.setattr("nbd.connection.PIECE_PATIENCE_S", 0.0)
    data = random.Random(6).randbytes(INBOX_BYTES + 5000)

    async def test() -> None:
        for ticks in range(3, 40, 2):
            export = MemoryExport(size_bytes=SIZE, slow=True, hold=trio.Event())
            async with serving(export) as served:
                client = await served.connect()
                await client.go()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(partial(client.request, wire.CMD_WRITE, 0, data=data, cookie=7))
                    for _ in range(ticks):
                        await trio.lowlevel.checkpoint()
                    left = await served.server.suspend(0)
                    export.hold = None
                    await replace(served, left)
                    with trio.fail_after(2):
                        assert (await client.reply()).cookie == 7
                assert export.data[: len(data)] == data

    run(test)


@all_forms
def test_what_the_storage_finishes_behind_a_send_that_was_cut_short_is_answered_by_the_next_server(
    monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """A thread that reads can't be cut short: what it was asked for is done when it has ended."""

    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        export.data[:] = content = random.Random(4).randbytes(SIZE)

        async def read(offset: int, length: int, into: memoryview) -> None:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.2)
            into[:] = export.view[offset : offset + length]

        async with serving(export) as served:
            client = await served.connect()
            await client.go(structured=form == "structured", extended=form == "extended")
            with monkeypatch.context() as patch:
                patch.setattr(export, "read", read)
                patch.setattr(export, "read_now", lambda *_: False)
                for _ in range(3):
                    await client.request(wire.CMD_READ, 0, 4096)
                await trio.sleep(0.02)
                patch.undo()
            for _ in range(8):
                await client.request(wire.CMD_READ, 0, 1 << 20)
            await trio.sleep(0.02)  # a send waits for the client now
            left = await served.server.suspend(0.02)
            assert left[0].output
            await replace(served, left)
            replies = [await client.reply() for _ in range(11)]
            assert {reply.cookie for reply in replies} == set(range(1, 12))
            assert all(reply.data == content[: 4096 if reply.cookie <= 3 else 1 << 20] for reply in replies)

    run(test)


def test_what_is_written_and_only_not_durable_yet_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may have read it meanwhile, and written over it: they would see it come back."""

    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=True)
        flush, flushing = export.flush, 0

        async def held() -> None:
            nonlocal flushing
            flushing += 1
            await trio.sleep_forever()

        monkeypatch.setattr(export, "flush", held)
        async with serving(export) as served:
            client, other = await served.connect(), await served.connect()
            await client.go()
            await other.go()
            size = INBOX_BYTES + 4096
            fua = wire.CMD_FLAG_FUA
            asked = {
                await client.request(wire.CMD_WRITE, 0, data=b"old" * 1000, flags=fua),
                await client.request(wire.CMD_TRIM, 1 << 20, 4096, flags=fua),
                await client.request(wire.CMD_WRITE_ZEROES, 2 << 20, 4096, flags=fua),
                await client.request(wire.CMD_WRITE, 4 << 20, data=bytes(size), flags=fua),
            }
            while flushing < 4:
                await trio.sleep(0.001)
            for at in (0, 1 << 20, 2 << 20, 4 << 20):
                assert (await other.ask(wire.CMD_WRITE, at, data=b"new" * 1000)).error == 0
            left = await served.server.suspend(0)
            monkeypatch.setattr(export, "flush", flush)
            server = await replace(served, left)
            assert {(await client.reply()).cookie for _ in asked} == asked
            for at in (0, 1 << 20, 2 << 20, 4 << 20):
                assert export.data[at : at + 3000] == b"new" * 1000
            mine = max(server.status().connections, key=lambda status: status.counters.requests + status.counters.trims)
            assert (mine.counters.writes, mine.counters.trims, mine.counters.zeroes) == (2, 1, 1)
            assert mine.counters.written_bytes == 3000 + size

    run(test)


def test_storage_that_can_not_be_cut_short_is_waited_for_and_no_client_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a flush of a busy disk, which takes longer than all patience."""

    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        begun = trio.Event()

        async def flush() -> None:
            begun.set()
            with trio.CancelScope(shield=True):
                await trio.sleep(0.8)
            await trio.lowlevel.checkpoint()

        monkeypatch.setattr(export, "flush", flush)
        async with serving(export) as served:
            client, leaving = await served.connect(), await served.connect()
            for each in (client, leaving):
                await each.go()
                await each.request(wire.CMD_WRITE, 0, data=b"x" * 512, flags=wire.CMD_FLAG_FUA)
            flushed = await client.request(wire.CMD_FLUSH)
            await leaving.request(wire.CMD_DISC)
            await begun.wait()
            await trio.testing.wait_all_tasks_blocked()
            left = await served.server.suspend(0.05)
            assert len(left) == 1
            await replace(served, left)
            assert {(await client.reply()).cookie for _ in range(2)} == {1, flushed}
            await leaving.expect_end()

    run(test)


@all_forms
def test_a_client_that_does_not_read_gets_all_its_replies_from_the_next_server(form: str) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        content = random.Random(3).randbytes(SIZE)
        export.data[:] = content
        async with serving(export) as served:
            client = await served.connect()
            await client.go(structured=form == "structured", extended=form == "extended")
            lengths = [4096, 7 << 20, 100, 3 << 20, CHUNK_BYTES, 1 << 20] * 3
            for number, length in enumerate(lengths):
                await client.request(wire.CMD_READ, number * 4096, length)
            await trio.testing.wait_all_tasks_blocked()
            left = await served.server.suspend(0.05)
            assert left[0].output
            server = await replace(served, left)
            await trio.testing.wait_all_tasks_blocked()
            # And once more, in the middle of what the first one left.
            again = await server.suspend(0.05)
            await replace(served, again)
            for _ in lengths:
                reply = await client.reply()
                number = reply.cookie - 1
                assert reply.error == 0 and len(reply.data) == lengths[number]
                assert reply.data == content[number * 4096 : number * 4096 + lengths[number]]

    run(test)


def test_writes_that_were_handled_but_not_answered_are_answered_by_the_next_server() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        async with serving(export) as served:
            client = await served.connect()
            await client.go()
            count = 3 * BATCH_WRITES
            batch = b"".join(
                request_bytes(wire.CMD_WRITE, i + 1, i * 512, data=bytes([i % 251 + 1]) * 512) for i in range(count)
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.send, batch)
                await trio.testing.wait_all_tasks_blocked()
                left = await served.server.suspend(0.05)
                await replace(served, left)
                assert {(await client.reply()).cookie for _ in range(count)} == set(range(1, count + 1))
                assert all(export.data[i * 512] == i % 251 + 1 for i in range(count))

    run(test)


def test_a_handshake_that_ends_in_time_is_handed_over_and_another_one_is_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        async with serving(MemoryExport(size_bytes=SIZE)) as served:
            quick, silent = await served.connect(), await served.connect()
            await quick.hello()
            await silent.hello()
            left: list[Suspended] = []

            async def suspend() -> None:
                left.extend(await served.server.suspend(0.3))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(suspend)
                await trio.testing.wait_all_tasks_blocked()
                await quick.send(b"")
                quick_option = (await quick.option(wire.OPT_GO, b"\0\0\0\x03mem\0\0"))[-1][0]
                assert quick_option == wire.REP_ACK
                await silent.expect_end()
            assert len(left) == 1
            await replace(served, left)
            assert (await quick.ask(wire.CMD_READ, 0, 10)).error == 0
            assert any("before the server was replaced" in record.message for record in caplog.records)

    with caplog.at_level(logging.INFO, "nbd.server"):
        run(test)


async def one_writes_and_another_waits(served: Served) -> tuple[RawClient, RawClient, list[Suspended]]:
    """Two clients of a server that is suspended while a write of the first, "old", waits for the storage."""
    client, other = await served.connect(), await served.connect()
    await client.go()
    await other.go()
    await client.request(wire.CMD_WRITE, 0, data=b"old" * 100)
    await trio.testing.wait_all_tasks_blocked()
    return client, other, await served.server.suspend(0.05)


def test_a_client_that_left_meanwhile_is_not_gone_on_with() -> None:
    """What it had under way may have been sent again on another connection, and must not come behind that."""

    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=True, hold=trio.Event())
        async with serving(export) as served:
            client, other, left = await one_writes_and_another_waits(served)
            assert sorted(len(one.work) for one in left) == [0, 1]
            export.hold = None
            client.stream.socket.close()
            server = await replace(served, left)
            assert (await other.ask(wire.CMD_WRITE, 0, data=b"new" * 100)).error == 0
            await trio.sleep(0.05)
            assert export.data[:300] == b"new" * 100
            assert len(server.status().connections) == 1

    run(test)


def test_a_client_that_leaves_after_the_hand_over_is_fenced() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=True, hold=trio.Event())
        async with serving(export) as served:
            client, other, left = await one_writes_and_another_waits(served)
            await replace(served, left)
            await trio.testing.wait_all_tasks_blocked()
            client.stream.socket.close()
            await other.request(wire.CMD_WRITE, 0, data=b"new" * 100)
            await trio.testing.wait_all_tasks_blocked()
            hold, export.hold = export.hold, None
            assert hold is not None
            hold.set()
            assert (await other.reply()).error == 0
            await trio.sleep(0.02)
            assert export.data[:300] == b"new" * 100

    run(test)


def test_a_client_whose_export_is_another_one_now_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        async with serving(export) as served:
            client = await served.connect()
            await client.go()
            left = await served.server.suspend(1.0)
            served.exports.exports["mem"] = MemoryExport(size_bytes=SIZE)
            server = await replace(served, left)
            await client.expect_end()
            assert not server.status().connections
        assert any("mem can't be served any more" in record.message for record in caplog.records)

    run(test)


def test_an_empty_disconnect_is_obeyed_and_not_handed_over() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=True, hold=trio.Event())
        async with serving(export) as served:
            client = await served.connect()
            await client.go()
            await client.request(wire.CMD_READ, 0, 10)
            await client.request(wire.CMD_DISC)
            await trio.testing.wait_all_tasks_blocked()
            assert await served.server.suspend(0.05) == []
            await client.expect_end()

    run(test)


def test_clients_that_go_on_are_told_apart_by_the_storage_as_before() -> None:
    """As by the limits of a policy, shared among clients: by the context of the task that opens the export."""

    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        who: ContextVar[object] = ContextVar("who", default=None)
        seen: list[object] = []
        acquire, flush = MemoryExports.acquire, export.flush

        async def acquiring(exports: MemoryExports, name: str, client: object = None) -> MemoryExport:
            found = await acquire(exports, name, client)
            who.set(object())
            return found

        async def flushing() -> None:
            seen.append(who.get())
            await flush()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MemoryExports, "acquire", acquiring)
            patch.setattr(export, "flush", flushing)
            async with serving(export) as served:
                clients = [await served.connect() for _ in range(3)]
                for client in clients:
                    await client.go()
                await replace(served, await served.server.suspend(1.0))
                for client in clients * 2:
                    await client.ask(wire.CMD_FLUSH)
        assert None not in seen and seen[:3] == seen[3:] and len(set(seen)) == 3

    run(test)


class Load:
    """Requests over blocks of its own, as many at a time as it likes, each verified."""

    def __init__(self, client: RawClient, rng: random.Random, first: int, blocks: int) -> None:
        self.client = client
        self.rng = rng
        self.content = {first + n: bytes(4096) for n in range(blocks)}
        self.busy: set[int] = set()
        self.waiting: dict[int, tuple[int, int, bytes]] = {}  # by cookie: command, block, bytes
        self.answered = 0
        self.stop = False
        self.credits = trio.Semaphore(32)

    async def send(self) -> None:
        rng, client = self.rng, self.client
        commands = [wire.CMD_READ] * 4 + [wire.CMD_WRITE] * 5 + [wire.CMD_FLUSH, wire.CMD_WRITE_ZEROES, wire.CMD_TRIM]
        while not self.stop:
            await self.credits.acquire()
            if self.stop:
                return
            free = [block for block in self.content if block not in self.busy]
            block, command = rng.choice(free), rng.choice(commands)
            cookie = client._cookie = client._cookie + 1
            data, flags = b"", wire.CMD_FLAG_FUA if rng.random() < 0.1 else 0
            if command == wire.CMD_WRITE:
                data = rng.randbytes(4096)
            if command == wire.CMD_FLUSH:
                block = -1
            self.busy.add(block)
            self.waiting[cookie] = command, block, data
            length = 0 if command == wire.CMD_FLUSH else 4096
            raw = client.encode(command, cookie, max(block, 0) * 4096, length, flags=flags, data=data)
            cut = rng.randrange(len(raw)) if rng.random() < 0.2 else 0
            if cut:
                await client.send(raw[:cut])
                await trio.sleep(rng.choice([0, 0.001]))
            await client.send(raw[cut:])

    async def receive(self) -> None:
        while True:
            while not self.waiting:  # so that it never waits for a reply that nobody owes
                if self.stop:
                    return
                await trio.sleep(0.001)
            reply = await self.client.reply()
            command, block, data = self.waiting.pop(reply.cookie)  # KeyError: answered twice
            assert reply.error == 0
            if command == wire.CMD_READ:
                assert reply.data == self.content[block], f"wrong bytes in block {block}"
            elif command == wire.CMD_WRITE:
                self.content[block] = data
            elif command in (wire.CMD_WRITE_ZEROES, wire.CMD_TRIM):
                self.content[block] = bytes(4096)
            self.busy.discard(block)
            self.answered += 1
            self.credits.release()
            if self.rng.random() < 0.01:
                await trio.sleep(0.005)


@pytest.mark.parametrize("seed", range(6))
def test_a_verified_load_does_not_notice_that_its_server_is_replaced_again_and_again(seed: int) -> None:
    async def test() -> None:
        rng = random.Random(seed)
        export = MemoryExport(size_bytes=SIZE, recording=False)
        async with serving(export, limits=Limits(inflight_requests=rng.choice([2, 8, 128]))) as served:
            loads = []
            for number in range(3):
                client = await served.connect()
                await client.go(structured=number % 3 == 1, extended=number % 3 == 2)
                loads.append(Load(client, rng, number * 64, 64))
            async with trio.open_nursery() as nursery:
                for load in loads:
                    nursery.start_soon(load.send)
                    nursery.start_soon(load.receive)
                server = served.server
                for _ in range(12):
                    export.slow = rng.random() < 0.5
                    export.delay_s = rng.choice([0, 0.001, 0.02])
                    await trio.sleep(rng.choice([0, 0.003, 0.03]))
                    left = await server.suspend(rng.choice([0, 0, 0.002, 0.05]))
                    assert len(left) == 3
                    server = await replace(served, left)
                await trio.sleep(0.02)
                for load in loads:
                    load.stop = True
            for load in loads:
                for block, content in load.content.items():
                    assert export.data[block * 4096 : (block + 1) * 4096] == content
                assert load.answered > 50

    run(test, timeout_s=30)


# --- as bytes ---


def one_of_each(sock: socket.socket) -> Suspended:
    return Suspended(
        sock=sock,
        peer="127.0.0.1:4",
        export="demo/völ",
        identity="a/1",
        session=Session(structured=True, contexts=((1, "base:allocation"), (2, "x:y")), extended=True),
        counters=Counters(requests=5, errors=1),
        input=b"\0\xff",
        output=bytes(range(256)),
        work=(Work("write", (1, 2, b"abc", True), 1, 3), Work("flush", ((4, 5),), 2), Work("read", (6, 7, 8), 1, 8)),
        writing=LongWrite(1, 2, 3, 4, 5, 6),
        reading=LongRead(1, 2, 3, 4),
    )


def test_what_is_written_down_is_read_back() -> None:
    one, other = socket.socketpair()
    with one, other:
        first, second = one_of_each(one), Suspended(other, "p", "e", "i", Session())
        raw = b"".join(encode([first, second]))
        assert decode(raw, [other, one]) == [first, second]
        assert decode(raw, [other]) == [second]
        assert decode(b"".join(encode([])), [one]) == []


def test_what_cannot_be_understood_is_refused() -> None:
    one, other = socket.socketpair()
    with one, other:
        raw = b"".join(encode([one_of_each(one)]))
        for bad, reason in [
            (b"", "no list"),
            (b"X" + raw[1:], "no list"),
            (HEADER.pack(MAGIC, 2, 0), "version 2"),
            (raw[:-1], "missing"),
            (raw[:40], "understood"),
            (raw.replace(b'"identity"', b'"identify"'), "identity"),
        ]:
            with pytest.raises(FormatError, match=reason):
                decode(bad, [one])


def test_a_dropped_client_sees_the_end() -> None:
    async def test() -> None:
        async with serving(MemoryExport(size_bytes=SIZE)) as served:
            client = await served.connect()
            await client.go()
            for one in await served.server.suspend(1.0):
                one.close()
            with pytest.raises(Closed):
                await client.reply()

    run(test)
