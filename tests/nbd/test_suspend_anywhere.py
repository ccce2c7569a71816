"""A server is replaced after any number of its steps, over storage of every kind: each request has one true answer.

Unlike the load in `test_suspend`, this has long requests, clients that don't read, and calls of the storage that can't
be cut short, as those which are in a thread. A failure names its seed; `SUSPEND_SEEDS=A-B` runs others.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import trio

from nbd import wire
from nbd.workshop import Limits
from tests.nbd.client import RawClient, Served, run, serving
from tests.nbd.memory import MemoryExport
from tests.nbd.test_suspend import replace

SIZE = 32 << 20
READ_ONLY = 16 << 20  # below it nothing is written
CONTENT = random.Random(1).randbytes(READ_ONLY)
FIRST, _, BEHIND = os.environ.get("SUSPEND_SEEDS", "0-30").partition("-")


@dataclass
class OddExport(MemoryExport):
    """Declines and waits at random; of what waits, some can be cut short, some not, and some is a group of tasks."""

    rng: random.Random = field(default_factory=random.Random)
    declines: float = 0.3

    def read_now(self, offset: int, length: int, into: memoryview) -> bool:
        return self.rng.random() >= 0.3 and super().read_now(offset, length, into)

    def write_now(self, writes: list[tuple[int, memoryview]]) -> bool:
        return self.rng.random() >= self.declines and super().write_now(writes)

    async def _pause(self) -> None:
        kind = self.rng.random()
        if kind < 0.4:
            await steps(self.rng.randrange(4))
        elif kind < 0.75:
            with trio.CancelScope(shield=True):
                await steps(self.rng.randrange(1, 30))
                if self.rng.random() < 0.3:
                    await trio.sleep(0.01)
        elif kind < 0.9 or self.hold is None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep, 0.002)
                nursery.start_soon(trio.sleep, 0.002)
        else:
            await self.hold.wait()


async def steps(count: int) -> None:
    for _ in range(count):
        await trio.lowlevel.checkpoint()


@dataclass
class Script:
    """Requests that don't overlap, their answers (None: an error), and what is stored at the end."""

    raw: bytes = b""
    answers: dict[int, bytes | None] = field(default_factory=dict)
    image: bytearray = field(default_factory=lambda: bytearray(CONTENT) + bytes(SIZE - READ_ONLY))


def a_script(client: RawClient, rng: random.Random) -> Script:
    script, at = Script(), READ_ONLY
    for cookie in range(1, rng.randrange(4, 15)):
        what = rng.choice(["read", "read", "long read", "write", "write", "long write", "flush", "trim", "zero", "bad"])
        flags = rng.choice([0, 0, wire.CMD_FLAG_FUA])
        if "read" in what:
            short = [10, 4096, 100_000, (1 << 20) - 5]
            length = rng.choice(short if what == "read" else [2 << 20, 6 << 20, (10 << 20) + 7])
            offset = rng.randrange(READ_ONLY - length)
            script.raw += client.encode(wire.CMD_READ, cookie, offset, length)
            script.answers[cookie] = CONTENT[offset : offset + length]
            continue
        script.answers[cookie] = b""
        if "write" in what:
            data = rng.randbytes(rng.choice([512, 4096, 70_000] if what == "write" else [1_300_000, (2 << 20) + 5]))
            script.raw += client.encode(wire.CMD_WRITE, cookie, at, flags=flags, data=data)
            script.image[at : at + len(data)] = data
            at += -(-len(data) // 4096) * 4096
        elif what == "flush":
            script.raw += client.encode(wire.CMD_FLUSH, cookie)
        elif what == "bad":
            script.answers[cookie] = None
            script.raw += client.encode(wire.CMD_WRITE, cookie, SIZE - 50, data=bytes(rng.choice([100, 1_500_000])))
        else:
            command = wire.CMD_TRIM if what == "trim" else wire.CMD_WRITE_ZEROES
            script.raw += client.encode(command, cookie, at, 4096, flags=flags)
            at += 4096
    assert at < SIZE - 4096 and len(script.image) == SIZE
    return script


async def send(client: RawClient, raw: bytes, rng: random.Random) -> None:
    at = 0
    while at < len(raw):
        length = rng.choice([28, 1000, 300_000, 1 << 20, 4 << 20])
        await client.send(raw[at : at + length])
        at += length
        await steps(rng.randrange(3))


async def receive(client: RawClient, answers: dict[int, bytes | None], begin: trio.Event) -> None:
    await begin.wait()
    while answers:
        reply = await client.reply()
        expected = answers.pop(reply.cookie)  # KeyError: answered twice
        assert bool(reply.error) == (expected is None)
        assert reply.data == (expected or b""), f"wrong bytes for {reply.cookie}"


async def replace_often(served: Served, export: OddExport, rng: random.Random, at_least: int) -> None:
    """At least so many clients stay."""
    server = served.server
    for _ in range(rng.randrange(1, 5)):
        if rng.random() < 0.7:
            await steps(rng.randrange(150))
        else:
            await trio.sleep(rng.random() * 0.02)
        left = await server.suspend(rng.choice([0, 0, 0, 0.001, 0.01]))
        assert len(left) >= at_least
        if rng.random() < 0.4:
            export.hold = None
        server = await replace(served, left)
    # What waits for it must be cut short once more.
    export.hold = None
    await replace(served, await server.suspend(rng.choice([0, 0.003])))


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Connections give way to others, and lose their patience, wherever they may."""
    monkeypatch.setattr("nbd.connection.SLICE_S", -1.0)
    monkeypatch.setattr("nbd.connection.PIECE_PATIENCE_S", 0.0)
    yield


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("seed", range(int(FIRST), int(BEHIND)))
def test_each_request_is_answered_once_and_rightly_wherever_its_server_is_replaced(seed: int) -> None:
    async def test() -> None:
        rng = random.Random(seed)
        hold = trio.Event() if rng.random() < 0.5 else None
        export = OddExport(size_bytes=SIZE, recording=False, hold=hold, rng=rng, declines=rng.choice([0, 0.3, 1]))
        export.data[:READ_ONLY] = CONTENT
        limits = Limits(inflight_requests=rng.choice([2, 8, 128]), inflight_bytes=rng.choice([1 << 20, 64 << 20]))
        async with serving(export, limits=limits) as served:
            client = await served.connect()
            form = rng.choice(["simple", "structured", "extended"])
            await client.go(structured=form == "structured", extended=form == "extended")
            script, begin = a_script(client, rng), trio.Event()
            if rng.random() < 0.5:
                begin.set()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, client, script.raw, random.Random(seed))
                nursery.start_soon(receive, client, script.answers, begin)
                await replace_often(served, export, rng, at_least=1)
                begin.set()
            assert export.data == script.image

    run(test)


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("seed", range(int(FIRST), int(BEHIND)))
def test_what_was_given_up_and_sent_again_never_comes_late_wherever_the_server_is_replaced(seed: int) -> None:
    async def test() -> None:
        rng = random.Random(seed)
        hold = trio.Event() if rng.random() < 0.5 else None
        export = OddExport(size_bytes=SIZE, recording=False, hold=hold, rng=rng, declines=rng.choice([0, 0.5, 1]))
        limits = Limits(inflight_requests=rng.choice([1, 2, 128]))
        length = rng.choice([4096, 3000, 1_500_000])
        first, second = rng.randbytes(length), rng.randbytes(length)

        async def write(one: RawClient, other: RawClient) -> None:
            raw = one.encode(wire.CMD_WRITE, 1, 0, data=first, flags=rng.choice([0, wire.CMD_FLAG_FUA]))
            with trio.move_on_after(0.02):
                await one.send(raw)
                await steps(rng.randrange(60))
            one.stream.socket.shutdown(socket.SHUT_RDWR)
            await steps(rng.choice([0, 0, rng.randrange(10)]))
            for data in (first, second):
                assert (await other.ask(wire.CMD_WRITE, 0, data=data)).error == 0

        async with serving(export, limits=limits) as served:
            clients = [await served.connect() for _ in range(2)]
            for client in clients:
                await client.go()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write, clients[0], clients[1])
                await replace_often(served, export, rng, at_least=1)
            await trio.sleep(0.02)
            assert export.data[:length] == second

    run(test)
