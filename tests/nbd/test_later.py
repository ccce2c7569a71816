"""Exports that acknowledge writes and trims later: each request is answered once, and not before."""

from __future__ import annotations

import errno
import logging
import random
import socket
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from nbd import wire
from nbd.connection import Connection
from nbd.outbox import Outbox
from nbd.transmission import Session, success, success_bytes
from nbd.workshop import INBOX_BYTES, Limits
from tests.nbd.client import Closed, RawClient, Served, attached, run, serving
from tests.nbd.latercontract import check_acknowledges_later
from tests.nbd.memory import LaterExport, MemoryExport, MemoryExports
from tests.nbd.test_suspend import replace
from tests.nbd.test_suspend_anywhere import (
    CONTENT,
    READ_ONLY,
    SIZE,
    OddExport,
    a_script,
    receive,
    replace_often,
    send,
    steps,
)

FORMS = pytest.mark.parametrize("form", ["simple", "structured", "extended"])
settled = trio.testing.wait_all_tasks_blocked


def writes(client: RawClient, cookies: range, *, flags: int = 0, size: int = 512) -> bytes:
    """One after the other, each with its cookie's bytes."""
    return b"".join(
        client.encode(wire.CMD_WRITE, cookie, cookie * size, flags=flags, data=bytes([cookie % 256]) * size)
        for cookie in cookies
    )


async def replies(client: RawClient, count: int) -> dict[int, int]:
    """Errors by cookie; no cookie twice."""
    found: dict[int, int] = {}
    for _ in range(count):
        reply = await client.reply()
        assert reply.cookie not in found, "answered twice"
        found[reply.cookie] = reply.error
    return found


async def nothing_comes(client: RawClient) -> None:
    await settled()
    with trio.move_on_after(0.01) as scope:
        reply = await client.reply()
        raise AssertionError(f"answered too early: {reply}")
    assert scope.cancelled_caught


# --- replies ---


@FORMS
def test_writes_are_answered_when_they_are_acknowledged_and_not_before(form: str) -> None:
    async def test() -> None:
        export = LaterExport()
        async with attached(export, form=form) as (client, served):
            for begin in (1, 11, 21):
                await client.send(writes(client, range(begin, begin + 10)))
                await settled()
            assert [len(offsets) for offsets, _ in export.pending] == [10, 10, 10]  # a pass is a batch
            await nothing_comes(client)
            export.acknowledge(2)
            assert list(await replies(client, 20)) == list(range(1, 21))
            await nothing_comes(client)
            export.acknowledge()
            assert set(await replies(client, 10)) == set(range(21, 31))
            (status,) = served.server.status().connections
            assert (status.counters.writes, status.counters.written_bytes) == (30, 30 * 512)
            assert export.data[512:1024] == b"\1" * 512
            await client.disconnect()

    run(test)


@FORMS
def test_trims_are_answered_when_they_are_acknowledged(form: str) -> None:
    async def test() -> None:
        export = LaterExport()
        async with attached(export, form=form) as (client, served):
            raw = [client.encode(wire.CMD_TRIM, cookie, cookie * 4096, 4096) for cookie in range(1, 8)]
            await client.send(b"".join(raw))
            await nothing_comes(client)
            assert [len(offsets) for offsets, _ in export.pending] == [7]
            export.acknowledge()
            assert await replies(client, 7) == dict.fromkeys(range(1, 8), 0)
            assert served.server.status().connections[0].counters.trims == 7

    run(test)


@FORMS
def test_reads_and_a_flush_do_not_wait_for_writes_that_are_not_acknowledged(form: str) -> None:
    async def test() -> None:
        export = LaterExport()
        async with attached(export, form=form) as (client, _):
            await client.send(
                writes(client, range(1, 5)) + client.encode(wire.CMD_FLUSH, 50) + client.encode(wire.CMD_READ, 51, 0, 9)
            )
            assert set(await replies(client, 2)) == {50, 51}
            export.acknowledge()
            assert set(await replies(client, 4)) == set(range(1, 5))

    run(test)


@FORMS
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EPERM])
def test_an_error_answers_each_request_of_its_batch_and_no_other(form: str, number: int) -> None:
    async def test() -> None:
        export = LaterExport()
        async with attached(export, form=form) as (client, served):
            for begin in (1, 6):
                await client.send(writes(client, range(begin, begin + 5), flags=wire.CMD_FLAG_FUA * (begin == 1)))
                await settled()
            trims = [client.encode(wire.CMD_TRIM, cookie, 0, 4096) for cookie in (11, 12)]
            await client.send(b"".join(trims))
            await settled()
            export.lost.append(OSError(number, "too few legs"))
            export.acknowledge(2)
            export.lost.append(OSError(number, "too few legs"))
            export.acknowledge()
            errors = await replies(client, 12)
            assert errors == {n: 0 if 6 <= n <= 10 else number for n in range(1, 13)}
            counters = served.server.status().connections[0].counters
            assert (counters.errors, counters.writes, counters.trims) == (7, 5, 0)
            assert ("flush", 0, 0) not in export.calls
            await client.send(writes(client, range(20, 21)))
            await settled()
            export.acknowledge()
            assert await replies(client, 1) == {20: 0}

    run(test)


@FORMS
def test_fua_is_answered_behind_one_flush_that_begins_when_the_batch_is_acknowledged(form: str) -> None:
    async def test() -> None:
        export = LaterExport()
        async with attached(export, form=form) as (client, _):
            plain, fua = writes(client, range(1, 4)), writes(client, range(4, 8), flags=wire.CMD_FLAG_FUA)
            await client.send(plain + fua)
            await nothing_comes(client)
            assert ("flush", 0, 0) not in export.calls
            export.hold = trio.Event()
            export.acknowledge()
            assert set(await replies(client, 3)) == {1, 2, 3}
            await nothing_comes(client)
            export.hold.set()
            assert set(await replies(client, 4)) == {4, 5, 6, 7}
            assert export.calls.count(("flush", 0, 0)) == 1

    run(test)


def test_a_flush_for_fua_that_fails_is_the_error_of_those_alone() -> None:
    async def test() -> None:
        export = LaterExport(fail=lambda operation, *_: errno.EIO if operation == "flush" else 0)
        async with attached(export) as (client, _):
            await client.send(writes(client, range(1, 3)) + writes(client, range(3, 5), flags=wire.CMD_FLAG_FUA))
            await settled()
            export.acknowledge()
            assert await replies(client, 4) == {1: 0, 2: 0, 3: wire.EIO, 4: wire.EIO}

    run(test)


@FORMS
@pytest.mark.parametrize("kind", ["declines", "refuses a batch", "refuses all"])
def test_what_is_not_accepted_is_written_one_by_one(form: str, kind: str) -> None:
    async def test() -> None:
        export = LaterExport()
        if kind == "declines":
            export.would_block = lambda: True
        elif kind == "refuses a batch":
            export.refuses = lambda count: errno.EIO if count > 1 else 0
        else:
            export.refuses = lambda count: errno.EIO
        async with attached(export, form=form) as (client, served):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(export.run)
                for flags, size in ((0, 4096), (0, 300), (wire.CMD_FLAG_FUA, 512)):
                    await client.send(writes(client, range(1, 10), flags=flags, size=size))
                    assert await replies(client, 9) == dict.fromkeys(range(1, 10), 0)
                    assert export.data[size : 2 * size] == b"\1" * size
                await client.send(b"".join(client.encode(wire.CMD_TRIM, n, n * 4096, 4096) for n in range(1, 10)))
                assert await replies(client, 9) == dict.fromkeys(range(1, 10), 0)
                assert export.data[4096 : 10 * 4096] == bytes(9 * 4096)
                nursery.cancel_scope.cancel()
            assert served.server.status().connections[0].counters.writes == 27

    run(test)


def test_a_single_write_that_is_refused_is_answered_with_the_error() -> None:
    async def test() -> None:
        export = LaterExport(refuses=lambda count: errno.ENOSPC)
        async with attached(export) as (client, _):
            assert (await client.ask(wire.CMD_WRITE, 0, data=b"x" * 512)).error == wire.ENOSPC
            assert not export.pending

    run(test)


@FORMS
@pytest.mark.parametrize("minimum", [1, 512])
def test_a_write_that_is_longer_than_the_inbox_is_written_in_pieces(form: str, minimum: int) -> None:
    async def test() -> None:
        export = LaterExport(size_bytes=8 << 20, minimum_block_size=minimum)
        data = random.Random(1).randbytes(INBOX_BYTES + (1 << 20))
        async with attached(export, form=form) as (client, _):
            await client.send(writes(client, range(1, 2)))
            for flags in (0, wire.CMD_FLAG_FUA):
                offset = (1 << 20) + flags * 4096
                await client.send(client.encode(wire.CMD_WRITE, 9, offset, flags=flags, data=data))
                if minimum > 1 and not flags:
                    assert await replies(client, 2) == {1: 0, 9: 0}  # neither could be handed over
                else:
                    assert await replies(client, 1) == {9: 0}
                assert export.data[offset : offset + len(data)] == data
            export.acknowledge()
            if minimum == 1:
                assert await replies(client, 1) == {1: 0}

    run(test)


# --- bounds ---


def test_a_client_that_asks_for_more_than_the_bound_is_not_read_until_something_is_acknowledged() -> None:
    async def test() -> None:
        export = LaterExport()
        async with attached(export, limits=Limits(inflight_requests=4)) as (client, _):
            await client.send(writes(client, range(1, 20)))
            await nothing_comes(client)
            assert [len(offsets) for offsets, _ in export.pending] == [4]
            for left in range(15, 0, -4):
                export.acknowledge()
                assert len(await replies(client, 4)) == 4
                await settled()
                assert sum(len(offsets) for offsets, _ in export.pending) == min(4, left)
            export.acknowledge()
            assert await replies(client, 3) == dict.fromkeys((17, 18, 19), 0)

    run(test)


def test_bytes_are_bounded_too_but_one_write_always_has_room() -> None:
    async def test() -> None:
        export = LaterExport(size_bytes=4 << 20)
        async with attached(export, limits=Limits(inflight_bytes=100_000)) as (client, _):
            sizes = [30_000, 30_000, 30_000, 200_000, 10]
            for cookie, size in enumerate(sizes, 1):
                await client.send(client.encode(wire.CMD_WRITE, cookie, cookie * 300_000, data=bytes(size)))
            await settled()
            seen = []
            while export.pending:
                assert sum(len(offsets) for offsets, _ in export.pending) <= 3
                seen.append(sum(len(offsets) for offsets, _ in export.pending))
                await replies(client, export.acknowledge() and seen[-1])
                await settled()
            assert sum(seen) == 5 and max(seen) >= 2

    run(test)


def test_a_client_that_does_not_read_holds_no_more_than_the_bound_and_gets_each_reply_once() -> None:
    async def test() -> None:
        export = LaterExport(recording=False)
        async with attached(export, form="extended", limits=Limits(inflight_requests=16)) as (client, served):
            raw = [client.encode(wire.CMD_WRITE, n, 0, data=b"x") for n in range(1, 6001)]

            async def ask() -> None:
                for one in raw:
                    await client.send(one)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(export.run)
                nursery.start_soon(ask)
                seen = -1
                while seen < (now := served.server.status().connections[0].counters.writes):
                    seen = now
                    await trio.sleep(0.2)
                assert seen < 6000, "it is read on and on"
                assert await replies(client, 6000) == dict.fromkeys(range(1, 6001), 0)
                nursery.cancel_scope.cancel()

    run(test)


class Sent:
    """What an outbox gave back."""

    def __init__(self) -> None:
        self.requests = 0

    def __call__(self, requests: int, length: int) -> None:
        self.requests += requests


def pair() -> tuple[socket.socket, socket.socket]:
    sockets = socket.socketpair()
    for one in sockets:
        one.setblocking(False)
    sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    return sockets


def take(sock: socket.socket) -> bytes:
    data = b""
    while True:
        try:
            part = sock.recv(1 << 16)
        except BlockingIOError:
            return data
        if not part:
            return data
        data += part


@pytest.mark.parametrize("size", [100, 5000, 100_000])
def test_replies_that_are_posted_go_in_their_order_whether_the_socket_is_full_or_not(size: int) -> None:
    async def test() -> None:
        near, far = pair()
        with near, far:
            sent = Sent()
            outbox = Outbox(near, "peer", sent)
            parts = [bytes([65 + n]) * size for n in range(20)]
            got = bytearray()
            async with trio.open_nursery() as nursery:
                for part in parts:
                    if outbox.post(part, 1, 0):
                        nursery.start_soon(outbox.send_beginning)
                while len(got) < 20 * size:
                    await trio.lowlevel.wait_readable(far)
                    got += take(far)
            assert got == b"".join(parts) and sent.requests == 20 and outbox.unsent() == b""

    run(test)


def test_what_is_posted_and_cut_short_is_all_in_the_rest() -> None:
    async def test() -> None:
        near, far = pair()
        with near, far:
            outbox = Outbox(near, "peer", Sent())
            parts = [bytes([65 + n]) * 30_000 for n in range(5)]
            async with trio.open_nursery() as nursery:
                for part in parts[:3]:
                    if outbox.post(part, 1, 0):
                        nursery.start_soon(outbox.send_beginning)
                await settled()
                nursery.cancel_scope.cancel()
            assert outbox.broken and not outbox.gone
            for part in parts[3:]:
                assert not outbox.post(part, 1, 0)
            assert take(far) + outbox.unsent() == b"".join(parts)

    run(test)


def test_what_is_posted_to_who_has_gone_counts_as_sent() -> None:
    near, far = pair()
    with near:
        far.close()
        sent = Sent()
        outbox = Outbox(near, "peer", sent)
        assert not outbox.post(b"x", 3, 0) and outbox.gone
        assert not outbox.post(b"x", 4, 0)
        assert sent.requests == 7 and outbox.unsent() == b""


# --- the end ---


def test_after_disc_what_is_pending_is_answered_before_the_end() -> None:
    async def test() -> None:
        export = LaterExport()
        async with attached(export) as (client, served):
            await client.send(writes(client, range(1, 4), flags=wire.CMD_FLAG_FUA) + client.encode(wire.CMD_DISC, 9))
            await nothing_comes(client)
            assert len(served.server.status().connections) == 1
            export.acknowledge()
            assert set(await replies(client, 3)) == {1, 2, 3}
            await client.expect_end()

    run(test)


@pytest.mark.parametrize("flags", [0, wire.CMD_FLAG_FUA])
def test_a_connection_whose_client_has_left_ends_when_all_is_acknowledged(flags: int) -> None:
    async def test() -> None:
        export = LaterExport()
        async with attached(export) as (client, served):
            await client.send(writes(client, range(1, 4), flags=flags))
            await settled()
            client.stream.socket.close()
            await settled()
            assert len(served.server.status().connections) == 1
            export.acknowledge()
            await settled()
            assert served.server.status().connections == [] and served.exports.open == 0

    run(test)


@pytest.mark.parametrize("how", ["disconnect", "stop", "bad magic"])
@pytest.mark.parametrize("flags", [0, wire.CMD_FLAG_FUA])
def test_an_acknowledgement_for_a_connection_that_has_ended_is_harmless(
    how: str, flags: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        export = LaterExport()
        async with attached(export) as (client, served):
            await client.send(writes(client, range(1, 4), flags=flags))
            await settled()
            if how == "disconnect":
                assert served.server.disconnect("mem") == 1
            elif how == "stop":
                served.scope.cancel()
            else:
                await client.send(bytes(100))
                await settled()
                client.stream.socket.close()
            if how != "bad magic":
                await client.expect_end()
            export.acknowledge()
            await settled()
            assert served.exports.open == 0

    run(test)
    assert "bug" not in caplog.text


def test_a_drain_waits_for_what_is_pending_and_answers_it() -> None:
    async def test() -> None:
        export = LaterExport()
        async with attached(export) as (client, served):
            await client.send(writes(client, range(1, 4), flags=wire.CMD_FLAG_FUA))
            await settled()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(served.server.drain, 0.01)
                await trio.sleep(0.05)
                assert len(served.server.status().connections) == 1
                export.acknowledge()
                assert set(await replies(client, 3)) == {1, 2, 3}
                await client.expect_end()
                client.stream.socket.close()

    run(test)


def test_a_connection_that_a_second_one_takes_the_place_of_is_not_waited_for() -> None:
    async def test() -> None:
        export = LaterExport()
        async with attached(export) as (client, served):
            await client.send(writes(client, range(1, 2)))
            await settled()
            client.stream.socket.shutdown(socket.SHUT_RDWR)
            other = await served.connect()
            await other.go()
            await other.send(writes(other, range(1, 2)))
            await settled()
            assert len(served.server.status().connections) == 1
            export.acknowledge(1)
            export.acknowledge()
            assert await replies(other, 1) == {1: 0}

    run(test)


# --- another server ---


def test_what_is_acknowledged_within_the_patience_is_answered_and_the_connection_kept() -> None:
    async def test() -> None:
        export = LaterExport()
        async with attached(export) as (client, served):
            await client.send(writes(client, range(1, 4), flags=wire.CMD_FLAG_FUA) + writes(client, range(4, 6)))
            await settled()

            async def acknowledge() -> None:
                await trio.sleep(0.02)
                export.acknowledge()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(acknowledge)
                left = await served.server.suspend(5)
            assert len(left) == 1 and not left[0].work
            await replace(served, left)
            assert set(await replies(client, 5)) == {1, 2, 3, 4, 5}
            await client.send(writes(client, range(6, 7)))
            await settled()
            export.acknowledge()
            assert await replies(client, 1) == {6: 0}

    run(test)


def test_an_export_that_acknowledges_later_has_longer_for_that_than_what_can_be_handed_over() -> None:
    async def test() -> None:
        export = LaterExport()
        async with attached(export) as (client, served):
            await client.send(writes(client, range(1, 4)))
            await settled()
            export.hold = trio.Event()
            await client.send(client.encode(wire.CMD_READ, 9, 0, 4096))
            await settled()

            async def acknowledge() -> None:
                await trio.sleep(0.5)
                export.acknowledge()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(acknowledge)
                begun = trio.current_time()
                left = await served.server.suspend(0.05, 30)
            assert len(left) == 1
            assert trio.current_time() - begun < 5, "what isn't owed keeps nobody waiting"
            export.hold = None
            await replace(served, left)
            assert await replies(client, 4) == {1: 0, 2: 0, 3: 0, 9: 0}

    run(test)


def test_what_is_not_acknowledged_in_time_costs_the_connection_and_is_not_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        export = LaterExport()
        async with attached(export) as (client, served):
            idle = await served.connect()
            await idle.go()
            await client.send(writes(client, range(1, 4)))
            await settled()
            await client.send(writes(client, range(4, 7), flags=wire.CMD_FLAG_FUA))
            await settled()
            begun = trio.current_time()
            async with trio.open_nursery() as nursery:

                async def end() -> None:
                    await client.expect_end()
                    client.stream.socket.close()

                nursery.start_soon(end)
                left = await served.server.suspend(0.05)
            assert trio.current_time() - begun < 1
            assert len(left) == 1, "the idle one stays, and no other"
            export.acknowledge()
            await replace(served, left)
            await idle.send(writes(idle, range(1, 2)))
            await settled()
            export.acknowledge()
            assert await replies(idle, 1) == {1: 0}

    with caplog.at_level(logging.INFO, logger="nbd.server"):
        run(test)
    assert "dropped: mem acknowledged 6 requests too late" in caplog.text


@dataclass
class OddLaterExport(OddExport, LaterExport):
    """At random it would block, waits, fails what nobody sees, and is slow to acknowledge."""

    async def run(self, delay_s: float = 0.0) -> None:
        while True:
            if self.rng.random() < 0.7:
                await steps(self.rng.randrange(1, 20))
            else:
                await trio.sleep(self.rng.random() * 0.004)
            self.acknowledge(self.rng.randrange(3))


def odd(rng: random.Random) -> OddLaterExport:
    chance = rng.choice([0.0, 0.3, 1.0])
    hold = trio.Event() if rng.random() < 0.5 else None
    export = OddLaterExport(
        size_bytes=SIZE, recording=False, hold=hold, rng=rng, would_block=lambda: rng.random() < chance
    )
    export.data[:READ_ONLY] = CONTENT
    return export


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Connections give way to others, and lose their patience, wherever they may."""
    monkeypatch.setattr("nbd.connection.SLICE_S", -1.0)
    monkeypatch.setattr("nbd.connection.PIECE_PATIENCE_S", 0.0)
    yield


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("seed", range(15))
def test_each_request_is_answered_once_and_rightly_wherever_its_server_is_replaced(seed: int) -> None:
    async def test() -> None:
        rng = random.Random(seed)
        export = odd(rng)
        limits = Limits(inflight_requests=rng.choice([2, 8, 128]), inflight_bytes=rng.choice([1 << 20, 64 << 20]))
        async with serving(export, limits=limits) as served:
            client = await served.connect()
            form = rng.choice(["simple", "structured", "extended"])
            await client.go(structured=form == "structured", extended=form == "extended")
            script, begin = a_script(client, rng), trio.Event()
            if rng.random() < 0.5:
                begin.set()
            async with trio.open_nursery() as acknowledging:
                acknowledging.start_soon(export.run)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(send, client, script.raw, random.Random(seed))
                    nursery.start_soon(receive, client, script.answers, begin)
                    await replace_patiently(served, export, rng)
                    begin.set()
                acknowledging.cancel_scope.cancel()
            assert export.data == script.image

    run(test)


async def replace_patiently(served: Served, export: OddLaterExport, rng: random.Random) -> None:
    """Its acknowledgements all come in time, though other storage may not."""
    server = served.server
    for _ in range(rng.randrange(1, 4)):
        await steps(rng.randrange(150))
        left = await server.suspend(0.1)
        assert len(left) == 1
        if rng.random() < 0.4:
            export.hold = None
        server = await replace(served, left)
    export.hold = None
    await replace(served, await server.suspend(0.1))


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("seed", range(15))
def test_whatever_was_answered_is_stored_wherever_an_impatient_server_is_replaced(seed: int) -> None:
    """A client that connects anew and sends again what has no answer, as the kernel's does."""

    async def test() -> None:
        rng = random.Random(seed)
        export = odd(rng)
        export.hold = None
        image = {n: rng.randbytes(512) for n in range(1, 200)}
        waiting = set(image)

        async def talk(client: RawClient) -> None:
            await client.go()
            order = sorted(waiting)
            flags = {n: rng.choice([0, 0, wire.CMD_FLAG_FUA]) for n in order}

            async def ask() -> None:
                try:
                    for n in order:
                        raw = client.encode(wire.CMD_WRITE, n, READ_ONLY + n * 512, flags=flags[n], data=image[n])
                        await client.send(raw)
                        await steps(rng.randrange(3))
                except Closed:
                    pass

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                while waiting:
                    reply = await client.reply()
                    assert reply.error == 0
                    waiting.remove(reply.cookie)  # KeyError: answered twice

        async def insist() -> None:
            while waiting:
                client = await served.connect()
                try:
                    await talk(client)
                except* Closed:
                    pass
                finally:
                    client.stream.socket.close()

        async with serving(export) as served, trio.open_nursery() as acknowledging:
            acknowledging.start_soon(export.run)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(insist)
                await replace_often(served, export, rng, at_least=0)
            acknowledging.cancel_scope.cancel()
            for n, data in image.items():
                assert export.data[READ_ONLY + n * 512 : READ_ONLY + (n + 1) * 512] == data

    run(test)


@pytest.mark.parametrize("how", ["disconnect", "drain", "suspend", "stop"])
def test_it_may_be_cut_short_at_any_step(how: str, caplog: pytest.LogCaptureFixture) -> None:
    async def test(step: int) -> None:
        export = LaterExport(recording=False)
        async with attached(export) as (client, served):
            flags = wire.CMD_FLAG_FUA * (step % 2)
            raw = writes(client, range(1, 5)) + writes(client, range(5, 9), flags=flags)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(export.run)

                async def talk() -> None:
                    try:
                        await client.send(raw)
                        await replies(client, 8)
                        await client.send(writes(client, range(9, 12)))
                        await replies(client, 3)
                        await client.expect_end()
                    except Closed:
                        pass
                    client.stream.socket.close()

                nursery.start_soon(talk)
                await steps(step)
                if how == "disconnect":
                    served.server.disconnect("mem")
                elif how == "drain":
                    await served.server.drain(0.001)
                elif how == "stop":
                    served.scope.cancel()
                else:
                    for one in await served.server.suspend(0.0):
                        one.close()
                await steps(30)
                export.acknowledge()
                await steps(5)
                nursery.cancel_scope.cancel()

    for step in range(40):
        run(lambda step=step: test(step))  # type: ignore[misc]
    assert "bug" not in caplog.text


# --- what an export and its other users may rely on ---

_client: ContextVar[str] = ContextVar("_client", default="nobody")


class Named(MemoryExports):
    """Tells clients apart as the engine does."""

    async def acquire(self, name: str, client: object = None) -> MemoryExport:
        _client.set("the client")
        return await super().acquire(name, client)


@dataclass
class Noting(LaterExport):
    names: list[str] = field(default_factory=list)

    async def flush(self) -> None:
        self.names.append(_client.get())

    def write_later(self, writes: list[tuple[int, memoryview]], done: object) -> bool:
        self.names.append(_client.get())
        return super().write_later(writes, done)  # type: ignore[arg-type]


def test_a_flush_for_fua_is_its_clients_whoever_acknowledges() -> None:
    async def test() -> None:
        export = Noting()
        async with serving(export) as served:
            served.exports.__class__ = Named
            client = await served.connect()
            await client.go()
            await client.send(writes(client, range(1, 2), flags=wire.CMD_FLAG_FUA))
            await settled()
            export.acknowledge()
            assert await replies(client, 1) == {1: 0}
            assert export.names == ["the client", "the client"]

    run(test)


def test_a_bug_in_answering_ends_that_connection_and_not_who_acknowledges(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        export = LaterExport()
        async with attached(export) as (client, served):
            other = await served.connect()
            await other.go()
            for one in (client, other):
                await one.send(writes(one, range(1, 2)))
                await settled()
            whole = Connection._answer

            def once(self: Connection, *arguments: object) -> None:
                monkeypatch.setattr(Connection, "_answer", whole)
                raise ValueError("oops")

            monkeypatch.setattr(Connection, "_answer", once)
            export.acknowledge()
            await client.expect_end()
            assert await replies(other, 1) == {1: 0}

    run(test)
    assert "a bug ended this connection" in caplog.text


def test_acknowledging_twice_is_found(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        export = LaterExport()
        async with attached(export) as (client, _):
            await client.send(writes(client, range(1, 3)))
            await settled()
            export.pending *= 2
            with pytest.raises(AssertionError, match="twice"):
                export.acknowledge()
            assert await replies(client, 2) == {1: 0, 2: 0}
            await nothing_comes(client)

    run(test)


def test_our_fake_keeps_to_the_contract() -> None:
    async def test() -> None:
        export = LaterExport()

        async def settle() -> None:
            await trio.lowlevel.checkpoint()
            export.acknowledge()

        await check_acknowledges_later(export, settle)

    run(test)


def test_a_session_needs_as_much_room_as_its_replies_take() -> None:
    for session in (Session(), Session(True), Session(True, extended=True)):
        assert len(success(session, 1, 2)) == success_bytes(session)
