"""The channel against our own server, which dies and comes back, and against servers that do what none should."""

from __future__ import annotations

import errno
import itertools
import os
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio

from nbd import wire
from nbd.channel import LONGEST_READ_BYTES, Channel, GoneError
from nbd.client import attach
from nbd.listen import open_unix
from nbd.negotiate import Terms
from nbd.server import Limits, Server, serve
from tests.nbd.client import run
from tests.nbd.memory import MemoryExport, MemoryExports

SIZE = 8 << 20
BLOCK = 4096


class Place:
    """A path at which one server after another serves the same export."""

    def __init__(self, path: Path, export: MemoryExport, nursery: trio.Nursery) -> None:
        self.path = path
        self.export = export
        self.exports = MemoryExports(export)
        self.server: Server
        self._nursery = nursery
        self._scope = trio.CancelScope()
        self._gone = trio.Event()

    async def open(self, limits: Limits | None = None) -> None:
        listener = await open_unix(self.path)
        self._scope = trio.CancelScope()

        async def life(*, task_status: trio.TaskStatus[Server]) -> None:
            with self._scope:
                await serve(self.exports, [listener], limits=limits, task_status=task_status)
            self._gone.set()

        self._gone = trio.Event()
        self.server = await self._nursery.start(life)

    async def kill(self) -> None:
        """What it has in flight is abandoned, its sockets are closed."""
        self._scope.cancel()
        await self._gone.wait()

    async def dial(self) -> tuple[socket.socket, Terms]:
        return await attach(self.path, self.export.name)


@dataclass
class User:
    """Whoever submits: each token is answered once."""

    channel: Channel
    answers: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    tokens: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    waiting: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)

    def done(self, token: int, error: int, data: memoryview) -> None:
        assert token not in self.answers, "answered twice"
        self.answers[token] = error, bytes(data)
        self.order.append(token)
        self.waiting.unpark_all()

    def submit(
        self, command: int, offset: int = 0, length: int = 0, data: bytes | memoryview = b"", *, flags: int = 0
    ) -> int:
        token = next(self.tokens)
        self.channel.submit(command, flags, offset, length or len(data), data, self.done, token)
        return token

    def read(self, offset: int, length: int) -> int:
        return self.submit(wire.CMD_READ, offset, length)

    def write(self, offset: int, data: bytes | memoryview) -> int:
        return self.submit(wire.CMD_WRITE, offset, data=data)

    async def answer(self, token: int) -> tuple[int, bytes]:
        self.channel.push()
        while token not in self.answers:
            await self.waiting.park()
        return self.answers[token]

    async def all(self) -> None:
        self.channel.push()
        while self.channel.inflight:
            await self.waiting.park()
        assert self.channel.inflight_bytes == 0


@asynccontextmanager
async def connected(export: MemoryExport, *, limits: Limits | None = None) -> AsyncIterator[tuple[User, Place]]:
    with TemporaryDirectory(prefix="nbd-test-") as name:
        async with trio.open_nursery() as nursery:
            place = Place(Path(name) / "nbd.sock", export, nursery)
            await place.open(limits)
            channel = Channel(export.name, place.dial)
            async with trio.open_nursery() as life:
                await life.start(channel.run)
                yield User(channel), place
                life.cancel_scope.cancel()
            assert channel.inflight == channel.inflight_bytes == 0
            nursery.cancel_scope.cancel()
        assert place.exports.open == 0


def test_each_command_is_answered_with_its_result_or_with_its_errno() -> None:
    async def test() -> None:
        errors = {5: errno.EIO, 6: errno.ENOSPC, 7: errno.EPERM, 8: errno.ENOMEM, 9: errno.EINVAL}
        export = MemoryExport(size_bytes=SIZE, fail=lambda _, offset, __: errors.get(offset, 0))
        async with connected(export) as (user, _):
            assert user.channel.terms.size_bytes == SIZE
            data = os.urandom(3 * BLOCK)
            assert await user.answer(user.write(BLOCK, data)) == (0, b"")
            assert await user.answer(user.read(0, 5 * BLOCK)) == (0, bytes(BLOCK) + data + bytes(BLOCK))
            assert await user.answer(user.submit(wire.CMD_FLUSH)) == (0, b"")
            zero = user.submit(wire.CMD_WRITE_ZEROES, BLOCK, BLOCK, flags=wire.CMD_FLAG_NO_HOLE)
            assert await user.answer(zero) == (0, b"")
            assert await user.answer(user.submit(wire.CMD_TRIM, 2 * BLOCK, BLOCK)) == (0, b"")
            assert await user.answer(user.read(BLOCK, 3 * BLOCK)) == (0, bytes(2 * BLOCK) + data[2 * BLOCK :])
            for offset, number in errors.items():
                assert await user.answer(user.read(offset, 1)) == (number, b"")
                assert await user.answer(user.write(offset, b"x")) == (number, b"")
            assert await user.answer(user.read(SIZE - 1, 2)) == (errno.EINVAL, b"")
            assert await user.answer(user.write(SIZE - 1, b"12")) == (errno.ENOSPC, b"")
            assert await user.answer(user.submit(wire.CMD_WRITE, 0, data=b"1", flags=wire.CMD_FLAG_FUA)) == (0, b"")
            assert export.calls[-1][0] == "flush"
            await user.all()

    run(test)


@pytest.mark.parametrize("slow", [False, True], ids=["at-once", "slow"])
def test_many_requests_of_all_lengths_in_flight_are_each_answered_with_their_own_data(slow: bool) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow, recording=False)
        export.data[:] = os.urandom(SIZE)
        async with connected(export) as (user, _):
            lengths = [1, BLOCK, 16 << 10, LONGEST_READ_BYTES, 100_001, LONGEST_READ_BYTES - 16]
            for length in lengths * 50:
                user.read(random.randrange(SIZE - length), length)
            asked = {
                token: (offset, length)
                for token, offset, length in (
                    (request.token, *wire.REQUEST.unpack(request.header)[2:])
                    for request in user.channel._requests.values()
                )
            }
            assert user.channel.inflight == 300 and user.channel.inflight_bytes == 50 * sum(lengths)
            await user.all()
            for token, (offset, length) in asked.items():
                assert user.answers[token] == (0, bytes(export.view[offset : offset + length]))

    run(test)


def test_writes_longer_than_the_socket_takes_leave_in_parts_and_arrive_whole() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=64 << 20, recording=False)
        async with connected(export) as (user, _):
            data = os.urandom(64 << 20)
            view = memoryview(data)
            for offset in range(0, len(data), 1 << 20):
                user.write(offset, view[offset : offset + (1 << 20)])
                user.channel.push()
            assert user.channel._outbox, "the socket took 64 MiB at once: this tests nothing"
            await user.all()
            assert export.data == data and {error for error, _ in user.answers.values()} == {0}

    run(test)


def test_requests_in_flight_outlive_the_server_and_are_sent_again_in_their_first_order() -> None:
    async def test() -> None:
        hold = trio.Event()
        export = MemoryExport(size_bytes=SIZE, slow=True, hold=hold)
        async with connected(export) as (user, place):
            tokens = [user.write(number * BLOCK, bytes([number]) * BLOCK) for number in range(1, 30)]
            read = user.read(0, BLOCK)
            user.channel.push()
            while export.running < 2:  # whole blocks wait in one task, the read in another
                await trio.sleep(0.001)
            await place.kill()
            while user.channel.connected:
                await trio.sleep(0.001)
            late = user.write(SIZE - BLOCK, b"z" * BLOCK)  # while nobody is there
            user.channel.push()
            assert not user.answers and not export.calls
            export.slow = False
            await place.open()
            await user.all()
            assert [user.answers[token][0] for token in (*tokens, read, late)] == [0] * 31
            # The last server carried all out at once, in the order in which they came.
            writes = [offset for operation, offset, _ in export.calls if operation == "write_now"]
            assert writes == [number * BLOCK for number in range(1, 30)] + [SIZE - BLOCK]
            for number in range(1, 30):
                assert export.data[number * BLOCK] == number

    run(test)


def test_eshutdown_is_no_answer_the_next_server_gives_it() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        async with connected(export) as (user, place):
            place.server.start_drain(0.2)
            token = user.write(0, b"once")
            with trio.move_on_after(0.1):
                await user.answer(token)
            assert not user.answers and not export.calls
            await place.server.drain()
            await place.open()
            assert await user.answer(token) == (0, b"")
            assert export.calls == [("write_now", 0, 4)]

    run(test)


class Scripted:
    """A listener whose connections a test answers by hand, after an honest handshake with `Terms` of its own."""

    def __init__(self) -> None:
        self.ours: socket.socket
        self.dials = 0
        self.refusal: OSError | None = None

    async def dial(self) -> tuple[socket.socket, Terms]:
        await trio.lowlevel.checkpoint()
        self.dials += 1
        if self.refusal is not None:
            raise self.refusal
        self.ours, theirs = socket.socketpair()
        self.ours.setblocking(False)
        theirs.setblocking(False)
        return theirs, Terms(SIZE, 0)

    async def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            await trio.lowlevel.wait_readable(self.ours)
            part = self.ours.recv(length - len(data))
            if not part:
                break
            data += part
        return data


def reply(cookie: int, data: bytes = b"", error: int = 0) -> bytes:
    return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC << 32 | error, cookie) + data


@asynccontextmanager
async def scripted() -> AsyncIterator[tuple[User, Scripted, trio.Nursery]]:
    server = Scripted()
    channel = Channel("scripted", server.dial)
    async with trio.open_nursery() as life:
        await life.start(channel.run)
        try:
            yield User(channel), server, life
        finally:
            server.ours.close()
        life.cancel_scope.cancel()


@pytest.mark.parametrize(
    "garbage",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        reply(77),
        reply(1)[:3] + b"\xff" + reply(1)[4:],
        reply(1, b"1234") + reply(1, b"1234"),
        bytes(16),
    ],
    ids=["http", "unknown cookie", "bad magic", "answered twice", "zeros"],
)
def test_what_is_no_reply_ends_the_channel_with_eproto_for_all(garbage: bytes) -> None:
    async def test() -> None:
        async with scripted() as (user, server, _):
            tokens = [user.read(0, 4), user.write(0, b"data"), user.submit(wire.CMD_FLUSH)]
            user.channel.push()
            server.ours.send(garbage)
            results = [await user.answer(token) for token in tokens]
            answered = [(0, b"1234")] if garbage.startswith(reply(1)) else []
            assert results == answered + [(errno.EPROTO, b"")] * (3 - len(answered))
            # Later ones too, at once, and nobody dials.
            assert await user.answer(user.read(0, 4)) == (errno.EPROTO, b"")
            await trio.sleep(0.1)
            assert server.dials == 1 and not user.channel.connected
            await user.all()

    run(test)


def test_replies_in_any_order_and_in_pieces_find_their_requests() -> None:
    async def test() -> None:
        async with scripted() as (user, server, _):
            tokens = [user.read(0, length) for length in (3, 70_000, 5)]
            flush = user.submit(wire.CMD_FLUSH)
            user.channel.push()
            stream = reply(3, b"three") + reply(2, b"2" * 70_000) + reply(4, error=wire.EIO) + reply(1, b"one")
            server.ours.setblocking(True)
            for start in (*range(40), 40, 70_000, 70_010):
                end = {39: 40, 40: 70_000, 70_000: 70_010, 70_010: len(stream)}.get(start, start + 1)
                server.ours.sendall(stream[start:end])
                await trio.lowlevel.checkpoint()
                await trio.lowlevel.checkpoint()
            assert await user.answer(tokens[0]) == (0, b"one")
            assert await user.answer(tokens[1]) == (0, b"2" * 70_000)
            assert await user.answer(tokens[2]) == (0, b"three")
            assert await user.answer(flush) == (errno.EIO, b"")
            assert user.order == [3, 2, 4, 1]
            await user.all()

    run(test)


def test_an_export_that_is_another_one_by_now_ends_the_channel_with_estale_for_all() -> None:
    async def test() -> None:
        async with scripted() as (user, server, _):
            token = user.write(0, b"for the old one")
            user.channel.push()
            await server.receive(28 + 15)
            server.refusal = GoneError(errno.ESTALE, "another one")
            server.ours.close()
            assert await user.answer(token) == (errno.ESTALE, b"")
            assert await user.answer(user.write(0, b"later")) == (errno.ESTALE, b"")
            await user.all()

    run(test)


def test_a_server_that_is_not_there_is_dialled_until_it_is() -> None:
    async def test() -> None:
        async with scripted() as (user, server, _):
            token = user.read(0, 4)
            server.refusal = OSError(errno.ECONNREFUSED, "not there")
            server.ours.close()
            while server.dials < 4:
                await trio.sleep(0.01)
            assert not user.answers
            server.refusal = None
            while not user.channel.connected:
                await trio.sleep(0.01)
            await server.receive(28)
            server.ours.send(reply(1, b"data"))
            assert await user.answer(token) == (0, b"data")

    run(test)


def test_a_channel_with_little_patience_is_over_when_nobody_came_for_so_long() -> None:
    async def test() -> None:
        server = Scripted()
        channel = Channel("scripted", server.dial, patience_s=0.3)
        user = User(channel)
        async with trio.open_nursery() as life:
            await life.start(channel.run)
            token = user.read(0, 4)
            server.refusal = OSError(errno.ECONNREFUSED, "not there")
            start_s = trio.current_time()
            server.ours.close()
            assert await user.answer(token) == (errno.ETIMEDOUT, b"")
            assert 0.3 <= trio.current_time() - start_s < 5
            assert await user.answer(user.read(0, 4)) == (errno.ETIMEDOUT, b"")

    run(test)


def test_the_first_attempt_fails_with_what_the_dial_raises() -> None:
    async def test() -> None:
        server = Scripted()
        server.refusal = FileNotFoundError(errno.ENOENT, "no such export")
        async with trio.open_nursery() as nursery:
            with pytest.raises(FileNotFoundError, match="no such export"):
                await nursery.start(Channel("none", server.dial).run)

    run(test)


def test_leaving_says_disc_and_answers_what_is_left() -> None:
    async def test() -> None:
        async with scripted() as (user, server, life):
            token = user.read(0, 4)
            user.channel.push()
            await server.receive(28)
            life.cancel_scope.cancel()
        assert user.answers == {token: (errno.ESHUTDOWN, b"")}
        assert user.channel.inflight == user.channel.inflight_bytes == 0

    run(test)

    async def farewell() -> None:
        server = Scripted()
        channel = Channel("scripted", server.dial)
        async with trio.open_nursery() as life:
            await life.start(channel.run)
            life.cancel_scope.cancel()
        with server.ours:
            magic, _, _, _ = wire.REQUEST.unpack(await server.receive(28))
            assert magic == wire.REQUEST_MAGIC << 32 | wire.CMD_DISC and await server.receive(1) == b""

    run(farewell)


def test_half_a_request_is_not_followed_by_a_farewell() -> None:
    async def test() -> None:
        server = Scripted()
        channel = Channel("scripted", server.dial)
        user = User(channel)
        async with trio.open_nursery() as life:
            await life.start(channel.run)
            token = user.write(0, bytes(SIZE))
            channel.push()
            received = server.ours.recv(64 << 10)  # there is room for a farewell now
            life.cancel_scope.cancel()
        assert user.answers == {token: (errno.ESHUTDOWN, b"")}
        with server.ours:
            received += await server.receive(2 * SIZE)
            assert 28 < len(received) < SIZE and not any(received[28:]), "DISC would be taken for data"

    run(test)


def test_a_send_that_fails_in_the_middle_of_a_request_is_never_followed_by_another_one() -> None:
    """ENOBUFS is no end of a connection: what followed would be taken for the rest of the data."""

    class Poor(socket.socket):
        refused = False

        def sendmsg(self, buffers: Any, *rest: Any) -> int:
            if len(buffers[0]) > BLOCK and not Poor.refused:  # what is left of a payload
                Poor.refused = True
                raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
            return super().sendmsg(buffers, *rest)

    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        async with connected(export) as (user, place):
            dialled = 0

            async def dial() -> tuple[socket.socket, Terms]:
                nonlocal dialled
                dialled += 1
                sock, terms = await attach(place.path, export.name)
                return Poor(fileno=sock.detach()), terms

            channel = Channel(export.name, dial)
            user = User(channel)
            async with trio.open_nursery() as life:
                await life.start(channel.run)
                user.write(0, b"\1" * SIZE)
                channel.push()
                while not Poor.refused:
                    await trio.sleep(0.001)
                for at in range(0, SIZE, BLOCK):
                    user.write(at, b"\2" * 512)
                    channel.push()
                with trio.fail_after(10):
                    await user.all()
                life.cancel_scope.cancel()
        assert dialled == 2
        assert {error for error, _ in user.answers.values()} == {0}
        assert export.data == (b"\2" * 512 + b"\1" * (BLOCK - 512)) * (SIZE // BLOCK)

    run(test)


@pytest.mark.parametrize("seed", range(6))
def test_what_a_model_says_holds_while_the_server_dies_at_random_moments(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No two requests in flight touch the same blocks, as with a page cache above; what was answered is read."""
    chosen = random.Random(seed)
    slots, size, deaths = 32, 24 << 10, 0
    monkeypatch.setattr("nbd.channel.FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("nbd.channel.LONGEST_PAUSE_S", 0.004)

    async def test() -> None:
        export = MemoryExport(size_bytes=slots * size, recording=False, delay_s=0.0005)
        model = [bytes(size)] * slots
        async with connected(export) as (user, place):
            over = trio.Event()

            async def assassin() -> None:
                nonlocal deaths
                while not over.is_set():
                    await trio.sleep(chosen.uniform(0.002, 0.04))
                    deaths += 1
                    export.slow = chosen.random() < 0.6
                    if chosen.random() < 0.25:
                        await place.server.drain(chosen.choice([0, 0.005]))
                    await place.kill()
                    await place.open(Limits(inflight_requests=chosen.choice([3, 128])))

            async def work(slot: int) -> None:
                while deaths < 12:
                    kind = chosen.random()
                    if kind < 0.5:
                        data = chosen.randbytes(size)
                        assert await user.answer(user.write(slot * size, data)) == (0, b"")
                        model[slot] = data
                    elif kind < 0.6:
                        token = user.submit(wire.CMD_WRITE_ZEROES, slot * size, size)
                        assert await user.answer(token) == (0, b"")
                        model[slot] = bytes(size)
                    else:
                        assert await user.answer(user.read(slot * size, size)) == (0, model[slot])

            async with trio.open_nursery() as killers:
                killers.start_soon(assassin)
                async with trio.open_nursery() as nursery:
                    for slot in range(slots):
                        nursery.start_soon(work, slot)
                over.set()
            await user.all()
            assert export.data == b"".join(model)

    run(test, timeout_s=30)
