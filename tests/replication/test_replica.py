"""A replica: fencing, order, and what a primary that breaks the rules gets. The primary here is made of raw frames."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from replication import wire
from replication.localleg import LocalSite
from replication.membership import Term, encode
from replication.wire import BreachError, Frame, LegOption, Type, pack
from tests.replication.linked import INFO, MEMBERSHIP, TERM, Keeper, Network, Told, data, run, until, zeros

BEGIN = wire.pack_begin("line", resumes=False)


class Primary:
    """One end of a session; frames go out as bytes, and come in judged."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = bytearray()

    async def send(self, raw: bytes) -> None:
        left = memoryview(raw)
        while left:
            try:
                left = left[self.sock.send(left) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)

    async def take(self) -> Frame | None:
        """The next frame; None at the end."""
        while True:
            frame = wire.take_frame(self.buffer, 0, len(self.buffer), wire.FROM_REPLICA)
            if not isinstance(frame, int):
                frame.body = memoryview(bytes(frame.body))
                self.buffer = self.buffer[frame.size_bytes :]
                return frame
            try:
                received = self.sock.recv(1 << 16)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.sock)
                continue
            except ConnectionError:
                return None
            if not received:
                return None
            self.buffer += received

    async def expect(self, kind: Type) -> Frame:
        """The next one that isn't about progress."""
        while (frame := await self.take()) is not None:
            if frame.kind is kind:
                return frame
            assert frame.kind in (Type.DONE, Type.WORKING, Type.PONG), frame
        raise AssertionError(f"the end, in place of {kind.name}")

    async def done(self, sequence: int) -> None:
        while (frame := await self.take()) is not None:
            if frame.kind is Type.DONE and frame.number >= sequence:
                return
        raise AssertionError("the end")


class Place:
    def __init__(self, nursery: trio.Nursery, keeper: Keeper | None = None) -> None:
        self.network = Network(nursery, keeper or Keeper())
        self.replica, self.keeper = self.network.replica, self.network.keeper
        self.store = self.keeper.store
        self._nursery = nursery

    async def dial(self, term: Term = TERM) -> Primary:
        here, there = await self.network.pair()
        assert isinstance(here, socket.socket)
        option = LegOption("a", MEMBERSHIP.mirror, INFO.id, term, "s")
        self._nursery.start_soon(self.network._serve, there, option)
        return Primary(here)

    async def begun(self, term: Term = TERM) -> Primary:
        primary = await self.dial(term)
        await primary.expect(Type.HELLO)
        await primary.send(BEGIN)
        return primary


@asynccontextmanager
async def place() -> AsyncIterator[Place]:
    here: Place | None = None
    try:
        async with trio.open_nursery() as nursery:
            here = Place(nursery)
            yield here
            nursery.cancel_scope.cancel()
    finally:
        if here is not None:
            here.network.close()


def batch(sequence: int, *changes: Any) -> bytes:
    return b"".join(wire.pack_batch(sequence, changes, wire.Buffers()))


def test_hello_tells_what_a_primary_must_know() -> None:
    async def body() -> None:
        async with place() as here:
            here.keeper.record.accepted, here.keeper.record.inconsistent = MEMBERSHIP, True
            here.keeper.intact = False
            primary = await here.dial()
            hello = wire.read_hello(await primary.expect(Type.HELLO))
            assert hello == wire.Hello(INFO.id, here.store.size_bytes, False, True, None, None, MEMBERSHIP)

    run(body)


def test_the_position_is_that_of_the_last_batch_that_was_applied() -> None:
    async def body() -> None:
        async with place() as here:
            primary = await here.begun()
            await primary.send(batch(7, data(0, 7)) + batch(9, data(0, 9)))
            await primary.done(9)
            hello = wire.read_hello(await (await here.dial()).expect(Type.HELLO))
            assert hello.position is not None and hello.position.sequence == 9 and hello.position.term == TERM
            assert hello.line == "line"

    run(body)


def test_what_a_pass_brings_is_one_write_and_one_done() -> None:
    async def body() -> None:
        async with place() as here:
            primary = await here.begun()
            await primary.send(b"".join(batch(number, data(0, number)) for number in range(1, 33)))
            await primary.done(32)
            assert here.store.passes <= 3 and len(here.store.log) == 32

    run(body)


@pytest.mark.parametrize("blocks", [False, True])
def test_nothing_of_an_old_session_is_applied_after_the_answer_to_a_new_one(blocks: bool) -> None:
    async def body() -> None:
        rng = random.Random(blocks)
        for _ in range(30):
            async with place() as here:
                here.store.blocks = blocks
                old = await here.begun()
                stream = b"".join(batch(number, data(0, 1, 64 << 10), data(0, 1)) for number in range(1, 40))
                async with trio.open_nursery() as nursery:

                    async def send(old: Primary = old, stream: bytes = stream) -> None:
                        with suppress(OSError):  # it was fenced
                            await old.send(stream)

                    nursery.start_soon(send)
                    for _ in range(rng.randrange(30)):
                        await trio.lowlevel.checkpoint()
                    new = await here.dial(Term(4, "b" * 16))
                    hello = wire.read_hello(await new.expect(Type.HELLO))
                    count = len(here.store.log)
                    await new.send(BEGIN + batch(1, data(0, 2)))
                    await new.done(1)
                    await trio.sleep(0.001)
                    assert here.store.log[count:] == [(0, 2, 4096)]
                    assert (hello.position.sequence if hello.position else 0) == count // 2
                    nursery.cancel_scope.cancel()

    run(body)


def test_a_new_session_waits_for_a_write_of_the_old_one_that_is_under_way() -> None:
    async def body() -> None:
        async with place() as here:
            here.store.gate = trio.Event()
            here.keeper.record.accepted = MEMBERSHIP
            old = await here.begun()
            await old.send(pack(Type.SNAPSHOT, 1, b"s"))
            await until(lambda: here.store.waiting)
            second = await here.dial()
            await trio.testing.wait_all_tasks_blocked()
            third = await here.dial()
            with trio.move_on_after(0.05):
                await third.take()
                raise AssertionError("answered while the old one still works")
            here.store.gate.set()
            await third.expect(Type.HELLO)
            assert here.store.log == [("snapshot", "s")]
            error = wire.read_error(await second.expect(Type.ERROR))
            assert error.errno == errno.ESTALE, "the one in the middle was fenced before it began"

    run(body)


def test_a_session_waits_for_what_a_deposed_primary_of_this_node_is_just_writing() -> None:
    async def body() -> None:
        later = Term(5, "c" * 16)
        async with place() as here, trio.open_nursery() as nursery:
            site = LocalSite(here.keeper)
            here.replica.until_free = site.let_go
            here.keeper.record.accepted = MEMBERSHIP
            leg = await site.open(nursery, INFO, TERM)
            here.store.gate, here.store.blocks = trio.Event(), True
            told = Told()
            leg.submit(1, [data(0, 1)], told.of(1))
            await until(lambda: here.store.waiting)
            here.store.blocks = False
            here.keeper.promise(later)
            await until(lambda: told.failed == [1])
            new = await here.begun(later)
            accepted = encode(replace(MEMBERSHIP, term=later, primary="b"))
            await new.send(pack(Type.ACCEPT, 1, accepted, count=1))
            assert (await new.expect(Type.ANSWER)).number == 1
            await new.send(pack(Type.CHANGED, 2, wire.pack_names(["recent"])) + batch(1, data(0, 2)))
            with trio.move_on_after(0.1):
                await new.take()
                raise AssertionError("answered while the deposed primary still writes")
            assert here.store.log == [("accept", 0, True)]
            here.store.gate.set()
            assert bytes((await new.expect(Type.ANSWER)).body) == b"[0]", "what it wrote last is known"
            await new.done(1)
            assert here.store.log == [("accept", 0, True), (0, 1, 4096), (0, 2, 4096)]
            nursery.cancel_scope.cancel()

    run(body)


def test_a_goodbye_makes_clean_when_a_deposed_primary_of_this_node_has_ended() -> None:
    async def body() -> None:
        async with place() as here:
            free = trio.Event()
            here.replica.until_free = free.wait
            here.keeper.clean = False
            primary = await here.begun()
            await primary.send(pack(Type.GOODBYE))
            with trio.move_on_after(0.05):
                await primary.take()
                raise AssertionError("it has left")
            assert not here.keeper.clean
            free.set()
            assert await primary.take() is None
            assert here.keeper.clean

    run(body)


def test_a_promise_ends_the_session_at_once_and_lower_terms_are_refused() -> None:
    async def body() -> None:
        async with place() as here:
            old = await here.begun()
            await old.send(batch(1, data(0, 1)))
            await old.done(1)
            here.keeper.promise(Term(5, "c" * 16))
            await here.replica.fenced(Term(5, "c" * 16))
            await old.send(batch(2, data(0, 2)))
            error = wire.read_error(await old.expect(Type.ERROR))
            assert error.errno == errno.ESTALE and "5" in str(error)
            refused = await here.dial(Term(4, "b" * 16))
            error = wire.read_error(await refused.expect(Type.ERROR))
            assert error.errno == errno.ESTALE and "has promised term 5" in str(error)
            assert here.store.log == [(0, 1, 4096)]

    run(body)


def test_a_lower_term_does_not_disturb_the_session_of_a_higher_one() -> None:
    async def body() -> None:
        async with place() as here:
            primary = await here.begun(Term(6, "d" * 16))
            refused = await here.dial(Term(5, "c" * 16))
            assert wire.read_error(await refused.expect(Type.ERROR)).errno == errno.ESTALE
            await primary.send(batch(1, data(0, 1)))
            await primary.done(1)

    run(body)


def test_a_promise_between_two_passes_is_seen_even_if_nobody_tells() -> None:
    async def body() -> None:
        async with place() as here:
            primary = await here.begun()
            here.keeper.on_fence.clear()
            here.keeper.promise(Term(5, "c" * 16))
            await primary.send(batch(1, data(0, 1)))
            frame = await primary.take()
            assert frame is not None and frame.kind is Type.ERROR
            assert wire.read_error(frame).errno == errno.ESTALE
            assert here.store.log == []

    run(body)


def test_flush_covers_what_came_before_it_and_holds_up_nothing_behind_it() -> None:
    async def body() -> None:
        async with place() as here:
            here.store.flush_gate = trio.Event()
            primary = await here.begun()
            await primary.send(batch(1, data(0, 1)) + pack(Type.FLUSH, 5) + batch(2, data(0, 2)))
            await primary.done(2)
            here.store.flush_gate.set()
            assert (await primary.expect(Type.ANSWER)).number == 5
            assert here.store.log == [(0, 1, 4096), (0, 2, 4096), ("flush", 1)] or here.store.log[-1][1] >= 1

    run(body)


def test_recent_changes_are_forgotten_only_when_the_flush_that_covers_them_is_common() -> None:
    async def body() -> None:
        async with place() as here:
            primary = await here.begun()

            async def recent() -> set[int]:
                await primary.send(pack(Type.CHANGED, 99, wire.pack_names(["recent*"])))
                answer = await primary.expect(Type.ANSWER)
                return set(here.store.decode_extents(bytes(answer.body)).extents)  # type: ignore[attr-defined]

            extent = 64 << 10
            await primary.send(batch(1, data(0, 1)) + pack(Type.FLUSH, 1) + batch(2, data(extent, 2)))
            await primary.expect(Type.ANSWER)
            await primary.send(pack(Type.FLUSH, 2))  # before the first is common
            await primary.expect(Type.ANSWER)
            assert await recent() == {0, 1}
            await primary.send(pack(Type.FLUSHED_BY_ALL, 0))
            assert await recent() == {0, 1}, "that was an earlier one"
            await primary.send(pack(Type.FLUSHED_BY_ALL, 1))
            assert await recent() == {1}
            await primary.send(pack(Type.FLUSH, 3))
            await primary.expect(Type.ANSWER)
            second = await here.begun(Term(4, "b" * 16))
            await second.send(pack(Type.FLUSHED_BY_ALL, 1))
            primary = second
            assert await recent() == {1}, "flushes of another session prove nothing"

    run(body)


def test_the_boot_is_recorded_before_the_first_write_and_a_goodbye_makes_clean() -> None:
    async def body() -> None:
        async with place() as here:
            primary = await here.begun()
            await primary.send(pack(Type.FLUSH, 1))
            await primary.expect(Type.ANSWER)
            assert here.keeper.clean
            await primary.send(batch(4, data(0, 1)))
            await primary.done(4)
            assert not here.keeper.clean
            await primary.send(pack(Type.GOODBYE))
            assert await primary.take() is None
            assert here.keeper.clean and here.keeper.record.position == here.replica.position
            assert here.store.log[-1] == ("flush", 2)

    run(body)


def test_a_lost_connection_makes_nothing_clean() -> None:
    async def body() -> None:
        async with place() as here:
            primary = await here.begun()
            await primary.send(batch(4, data(0, 1)))
            await primary.done(4)
            primary.sock.close()
            await until(lambda: here.replica.primary is None)
            assert not here.keeper.clean

    run(body)


def test_the_primary_was_heard_when_it_said_something() -> None:
    async def body() -> None:
        async with place() as here:
            assert here.replica.heard_at is None
            primary = await here.begun()
            await primary.send(pack(Type.PING))
            await primary.expect(Type.PONG)
            first = here.replica.heard_at
            assert first is not None and here.replica.primary == "a"
            await trio.sleep(0.01)
            await primary.send(pack(Type.PING))
            await primary.expect(Type.PONG)
            assert here.replica.heard_at > first

    run(body)


def test_a_primary_that_was_cut_off_without_a_word_is_given_up_but_a_slow_disk_is_not() -> None:
    async def body() -> None:
        async with place() as here:
            primary = await here.begun()
            await primary.send(batch(1, data(0, 1)))
            await primary.done(1)
            here.store.blocks, here.store.gate = True, trio.Event()
            await primary.send(batch(2, data(0, 2)))
            await trio.sleep(300)
            assert here.replica.primary == "a"
            here.store.gate.set()
            await primary.done(2)
            await trio.sleep(62)
            assert here.replica.primary is None and "not been heard" in str(here.network.errors[0])

    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0.002))


def test_what_ends_after_a_promise_is_not_told_of() -> None:
    async def body() -> None:
        async with place() as here:
            primary = await here.begun()
            here.store.blocks, here.store.gate = True, trio.Event()
            await primary.send(batch(1, data(0, 1)) + batch(2, data(0, 2)))
            await until(lambda: here.store.waiting)
            here.store.gate.set()
            here.keeper.promise(Term(5, "c" * 16))
            await here.replica.fenced(Term(5, "c" * 16))
            count = len(here.store.log)
            frame = await primary.take()
            assert frame is not None and frame.kind is Type.ERROR
            assert len(here.store.log) == count <= 1

    run(body)


def test_a_stopped_replica_serves_nobody() -> None:
    async def body() -> None:
        async with place() as here:
            primary = await here.begun()
            await here.replica.stop()
            assert wire.read_error(await primary.expect(Type.ERROR)).errno == errno.ESHUTDOWN
            refused = await here.dial()
            assert "is being stopped" in str(wire.read_error(await refused.expect(Type.ERROR)))

    run(body)


def lost(sequence: int, offset: int, length: int) -> bytes:
    return pack(Type.LOST, sequence, wire.RANGE.pack(offset, length))


HALF = batch(1, data(0, 1, 1 << 20))[: wire.HEAD_BYTES + wire.ENTRY_BYTES + wire.PIECE_BYTES]
"""The first frame of a batch that needs more."""


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (batch(1, data(0, 1)), "before BEGIN"),
        (BEGIN + BEGIN, "second BEGIN"),
        (BEGIN + batch(2, data(0, 1)) + batch(2, data(0, 1)), "batch 2 after 2"),
        (BEGIN + batch(2, data(0, 1)) + batch(1, data(0, 1)), "batch 1 after 2"),
        (BEGIN + batch(1, data(1 << 40, 1)), "whole blocks only"),
        (BEGIN + batch(1, zeros(4096, 1 << 63)), "whole blocks only"),
        (BEGIN + pack(Type.FLUSH, 0), "without a cookie"),
        (
            BEGIN + HALF + pack(Type.FLUSH, 1),
            "in the middle of batch 1",
        ),
        (
            BEGIN + HALF + batch(2, data(0, 1)),
            "in the middle of 1",
        ),
        (pack(Type.PONG), "must not come from this side"),
        (b"GET / HTTP/1.0\r\n\r\n" + bytes(30), "no frame of a leg session"),
        (wire.HEAD.pack((wire.MAGIC + 1) << 32 | 14 << 16, 0, 0, 0), "version 2"),
        (wire.HEAD.pack(wire.MAGIC << 32 | 77 << 16, 0, 0, 0), "type 77"),
        (BEGIN + wire.HEAD.pack(wire.WRITE_HEAD, 1, 1 << 31, 1), "are the most"),
        (BEGIN + pack(Type.CHANGED, 1, b"{"), "can't be understood"),
        (BEGIN + pack(Type.RESIZE, 1, b"1234"), "a body of 4 bytes"),
        (BEGIN + pack(Type.FLUSH, 7) + pack(Type.FLUSH, 7), "7 is in use"),
        (BEGIN + pack(Type.FLUSH, 7) + pack(Type.SNAPSHOT, 7, b"s"), "7 is in use"),
        (wire.pack_begin("other", resumes=True), "isn't known here"),
        (lost(1, 0, 4096), "a LOST before BEGIN"),
        (BEGIN + batch(2, data(0, 1)) + lost(2, 0, 4096), "a LOST of batch 2 after 2"),
        (BEGIN + HALF + lost(1, 0, 4096), "a LOST in the middle of batch 1"),
        (BEGIN + lost(1, 0, 1 << 20), "a LOST of 1048576 bytes"),
        (BEGIN + lost(1, 100, 4096), "whole blocks in it only"),
        (BEGIN + lost(1, 1 << 40, 4096), "whole blocks in it only"),
        (BEGIN + pack(Type.LOST, 1, b"short"), "a body of 5 bytes"),
    ],
)
def test_whoever_breaks_the_protocol_is_told_how_and_the_replica_lives(raw: bytes, says: str) -> None:
    async def body() -> None:
        async with place() as here:
            primary = await here.dial()
            await primary.expect(Type.HELLO)
            await primary.send(raw)
            error = wire.read_error(await primary.expect(Type.ERROR))
            assert error.errno == errno.EPROTO and says in str(error), error
            primary.sock.close()
            again = await here.begun()
            await again.send(batch(1, data(0, 3)))
            await again.done(1)

    run(body)


STREAM = BEGIN + b"".join(
    [
        batch(1, data(0, 1), data(4096, 2)),
        batch(2, zeros(0, 8192), data(8192, 3, 8192)),
        pack(Type.FLUSH, 1),
        batch(4, data(0, 4, 1 << 20), data(0, 5)),
        pack(Type.READ, 2, wire.RANGE.pack(0, 8192)),
        pack(Type.SNAPSHOT, 3, b"s"),
        lost(5, 8192, 8192),
        pack(Type.PING),
        *(batch(number, data(number * 4096, number)) for number in range(6, 60)),
        pack(Type.FLUSHED_BY_ALL, 2),
    ]
)


@given(st.lists(st.integers(0, len(STREAM)), max_size=12), st.booleans())
@settings(max_examples=40)
def test_any_split_of_the_stream_gives_the_same(cuts: list[int], blocks: bool) -> None:
    async def body() -> tuple[Any, Any]:
        async with place() as here:
            here.store.blocks = blocks
            primary = await here.dial()
            await primary.expect(Type.HELLO)
            at = 0
            for cut in [*sorted(cuts), len(STREAM)]:
                await primary.send(STREAM[at:cut])
                await trio.testing.wait_all_tasks_blocked()
                at = cut
            await primary.send(pack(Type.PING))
            await until(lambda: here.replica.applied == 59)
            changes = [entry for entry in here.store.log if entry[0] != "flush"]
            return changes, bytes(here.store.image)

    changes, image = run(body)
    assert changes == EXPECTED_LOG
    assert image[:4096] == bytes([5]) * 4096 and image[59 * 4096] == 59


EXPECTED_LOG: list[Any] = [
    (0, 1, 4096),
    (4096, 2, 4096),
    (0, 0, 8192),
    (8192, 3, 8192),
    (0, 4, 512 << 10),
    (512 << 10, 4, 512 << 10),
    (0, 5, 4096),
    ("snapshot", "s"),
    (8192, ord("!"), 4096),
    (12288, ord("!"), 4096),
    *((number * 4096, number, 4096) for number in range(6, 60)),
]


@given(st.binary(max_size=200), st.integers(0, 300), st.booleans())
@settings(max_examples=150)
def test_random_garbage_ends_the_session_and_never_more(junk: bytes, at: int, valid_head: bool) -> None:
    async def body() -> None:
        async with place() as here:
            primary = await here.dial()
            await primary.expect(Type.HELLO)
            raw = bytearray(STREAM[:400])
            if valid_head and junk:
                kind = Type(junk[0] % len(Type) + 1)
                junk_ = wire.HEAD.pack(wire.head_of(kind), 1, len(junk), junk[0]) + junk
            else:
                junk_ = junk
            raw[at : at + len(junk_)] = junk_
            with suppress(OSError):  # it may have ended the session by then
                await primary.send(bytes(raw))
                primary.sock.shutdown(socket.SHUT_WR)
            kinds = []
            while (frame := await primary.take()) is not None:
                kinds.append(frame.kind)
            await until(lambda: here.replica.primary is None)
            for error in here.network.errors:
                assert error.strerror
            again = await here.begun()
            await again.send(pack(Type.PING))
            await again.expect(Type.PONG)

    run(body)


@given(st.binary(max_size=300), st.integers(0, 60), st.sampled_from([wire.FROM_PRIMARY, wire.FROM_REPLICA]))
def test_taking_a_frame_of_anything_gives_a_frame_a_number_or_a_sentence(junk: bytes, keep: int, allowed: Any) -> None:
    raw = bytearray(STREAM[:keep] + junk)
    try:
        got = wire.take_frame(raw, 0, len(raw), allowed)
        if isinstance(got, int):
            assert got > len(raw) or got == wire.HEAD_BYTES
            assert got <= wire.HEAD_BYTES + wire.MAX_BODY_BYTES
        elif got.kind is Type.HELLO:
            wire.read_hello(got)
        elif got.kind is Type.ERROR:
            wire.read_error(got)
    except BreachError as error:
        assert str(error)
