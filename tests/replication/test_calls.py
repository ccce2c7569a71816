"""Calls between nodes: many at a time, each answered once or failed with a sentence, whatever comes."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from replication.calls import HEAD, MAGIC, MAX_FRAME_BYTES, MAX_RUNNING, Calls, serve_calls
from tests.replication.linked import run, until


class Node:
    """Handlers that tell what happened to them."""

    def __init__(self) -> None:
        self.gate = trio.Event()
        self.running = self.most = self.cancelled = 0
        self.ended: OSError | None = None
        self.handlers = {
            "echo": self.echo,
            "wait": self.wait,
            "refuse": self.refuse,
            "break": self.break_,
            "odd": self.odd,
        }

    async def echo(self, params: dict[str, Any]) -> Any:
        await trio.lowlevel.checkpoint()
        return params

    async def wait(self, params: dict[str, Any]) -> Any:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gate.wait()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return params.get("n")

    async def refuse(self, params: dict[str, Any]) -> Any:
        raise OSError(errno.EBUSY, "node a is primary and alive")

    async def break_(self, params: dict[str, Any]) -> Any:
        raise KeyError("a mistake")

    async def odd(self, params: dict[str, Any]) -> Any:
        return object() if params.get("kind") == "object" else "x" * MAX_FRAME_BYTES

    async def serve(self, sock: socket.socket, received: bytes = b"") -> None:
        try:
            await serve_calls(sock, received, self.handlers, peer="node b")
        except OSError as error:
            self.ended = error
        finally:
            trio.lowlevel.notify_closing(sock)
            sock.close()


def pair() -> tuple[socket.socket, socket.socket]:
    both = socket.socketpair()
    for one in both:
        one.setblocking(False)
    return both


@asynccontextmanager
async def calling() -> AsyncIterator[tuple[Calls, Node]]:
    here, there = pair()
    node = Node()
    try:
        async with trio.open_nursery() as nursery:
            calls = Calls(here, peer="node a")
            nursery.start_soon(calls.run)
            nursery.start_soon(node.serve, there)
            yield calls, node
            nursery.cancel_scope.cancel()
    finally:
        here.close()
        there.close()


def test_answers_come_back_to_whoever_asked_in_any_order() -> None:
    async def body() -> None:
        async with calling() as (calls, node):
            results: dict[int, Any] = {}

            async def ask(n: int) -> None:
                results[n] = await calls.call("wait" if n % 2 else "echo", {"n": n, "text": "ä" * n})

            async with trio.open_nursery() as nursery:
                for n in range(50):
                    nursery.start_soon(ask, n)
                await until(lambda: len(results) == 25)
                assert set(results) == set(range(0, 50, 2))
                node.gate.set()
            assert results == {n: n if n % 2 else {"n": n, "text": "ä" * n} for n in range(50)}

    run(body)


def test_errors_come_back_with_errno_and_sentence_and_the_connection_lives() -> None:
    async def body() -> None:
        async with calling() as (calls, _):
            refused: list[tuple[str, dict[str, Any], int, str]] = [
                ("refuse", {}, errno.EBUSY, "node a is primary and alive"),
                ("nothing", {}, errno.ENOSYS, "no call 'nothing'"),
                ("break", {}, errno.EREMOTEIO, "KeyError"),
                ("odd", {"kind": "object"}, errno.EINVAL, "no JSON"),
                ("odd", {}, errno.EMSGSIZE, "too many for one call"),
                ("echo", {"x": "x" * MAX_FRAME_BYTES}, errno.EMSGSIZE, "too many for one call"),
                ("echo", {"x": object()}, errno.EINVAL, "no JSON"),
            ]
            for method, params, number, says in refused:
                with pytest.raises(OSError, match=says) as raised:
                    await calls.call(method, params)
                assert raised.value.errno == number
            assert await calls.call("echo", {"x": 1}) == {"x": 1}

    run(body)


def test_a_call_that_times_out_or_is_cancelled_is_cancelled_at_the_other_side() -> None:
    async def body() -> None:
        async with calling() as (calls, node):
            await calls.call("echo", {})
            with pytest.raises(OSError) as raised:
                await calls.call("wait", {}, timeout_s=0.05)
            assert raised.value.errno == errno.ETIMEDOUT and "node a has not answered wait" in str(raised.value)
            await until(lambda: node.cancelled == 1)

    run(body)


def test_a_cancelled_call_is_forgotten_and_others_go_on() -> None:
    async def body() -> None:
        async with calling() as (calls, node):
            with trio.move_on_after(0.02):
                await calls.call("wait", {})
            await until(lambda: node.cancelled == 1)
            assert await calls.call("echo", {"y": 2}) == {"y": 2}

    run(body)


def test_when_the_connection_ends_everything_fails_with_econnreset_naming_the_peer() -> None:
    async def body() -> None:
        here, there = pair()
        errors = []

        async def ask(calls: Calls) -> None:
            with pytest.raises(OSError) as raised:
                await calls.call("wait", {})
            errors.append(raised.value)

        async with trio.open_nursery() as nursery:
            calls = Calls(here, peer="node a")
            nursery.start_soon(calls.run)
            for _ in range(3):
                nursery.start_soon(ask, calls)
            await trio.testing.wait_all_tasks_blocked()
            there.close()
        await ask(calls)
        assert len(errors) == 4
        for error in errors:
            assert error.errno == errno.ECONNRESET and "node a" in str(error)

    run(body)


def test_a_silent_peer_costs_one_timeout_and_then_the_connection() -> None:
    async def body() -> None:
        here, there = pair()
        async with trio.open_nursery() as nursery:
            calls = Calls(here, peer="node a")
            nursery.start_soon(calls.run)
            await trio.sleep(0.001)
            with pytest.raises(OSError) as raised:
                await calls.call("echo", {}, timeout_s=0.05)
            assert raised.value.errno == errno.ETIMEDOUT
            assert calls.failure is not None and "silent" in str(calls.failure)
        there.close()

    run(body)


def test_a_server_runs_so_many_calls_at_a_time_and_the_rest_wait() -> None:
    async def body() -> None:
        async with calling() as (calls, node):
            async with trio.open_nursery() as nursery:
                for _ in range(3 * MAX_RUNNING):
                    nursery.start_soon(calls.call, "wait", {})
                await until(lambda: node.running == MAX_RUNNING)
                await trio.testing.wait_all_tasks_blocked()
                node.gate.set()
            assert node.most == MAX_RUNNING

    run(body)


def test_what_came_behind_the_option_is_the_first_call() -> None:
    async def body() -> None:
        here, there = pair()
        frame = framed({"id": 1, "method": "echo", "params": {"z": 3}})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Node().serve, there, frame)
            await until(lambda: _peek(here))
            assert json.loads(here.recv(4096)[8:]) == {"id": 1, "result": {"z": 3}}
            here.close()

    run(body)


def _peek(sock: socket.socket) -> bytes:
    with suppress(BlockingIOError):
        return sock.recv(100, socket.MSG_PEEK)
    return b""


def framed(message: Any) -> bytes:
    body = json.dumps(message).encode()
    return HEAD.pack(MAGIC, len(body)) + body


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", "no call between nodes"),
        (HEAD.pack(MAGIC + 1, 2) + b"{}", "version 2"),
        (HEAD.pack(MAGIC, MAX_FRAME_BYTES + 1), "are the most"),
        (HEAD.pack(MAGIC, 0), "0 bytes"),
        (HEAD.pack(MAGIC, 3) + b"{{}", "no JSON"),
        (HEAD.pack(MAGIC, 2) + b"\xff\xfe", "no JSON"),
        (HEAD.pack(MAGIC, 100_000) + b"[" * 100_000, "no JSON"),
        (framed([1]), "no JSON object"),
        (framed({"method": "echo", "params": {}}), "without a number"),
        (framed({"id": True, "method": "echo", "params": {}}), "without a number"),
        (framed({"id": 1, "method": 5, "params": {}}), "that is none"),
        (framed({"id": 1, "method": "echo", "params": []}), "that is none"),
        (framed({"id": 1, "method": "echo", "params": {}}) * 2, "that is none"),
    ],
)
def test_a_caller_that_breaks_the_rules_is_told_how(raw: bytes, says: str) -> None:
    async def body() -> None:
        here, there = pair()
        node = Node()
        received = b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.serve, there)
            left = memoryview(raw)
            while left:
                try:
                    left = left[here.send(left) :]
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(here)
            while True:
                await trio.lowlevel.wait_readable(here)
                piece = here.recv(1 << 16)
                received += piece
                if not piece:
                    break
            here.close()
        assert node.ended is not None and node.ended.errno == errno.EPROTO and says in str(node.ended)
        assert says.encode() in received

    run(body)


@pytest.mark.parametrize(
    "raw",
    [
        b"x" * 100,
        framed({"id": 7, "result": 1}),
        framed({"id": "1", "result": 1}),
        framed({"id": 1, "error": "no"}),
        framed({"id": 1, "error": {"errno": 5, "text": "no"}}),
        framed({"id": 1, "error": {"text": "no"}}),
        framed({"error": {"errno": "EPROTO", "text": "you broke it"}}),
        framed({}),
    ],
)
def test_a_server_that_breaks_the_rules_ends_the_connection_and_no_call_hangs(raw: bytes) -> None:
    async def body() -> None:
        here, there = pair()
        async with trio.open_nursery() as nursery:
            calls = Calls(here, peer="node a")
            nursery.start_soon(calls.run)

            async def answer() -> None:
                await trio.testing.wait_all_tasks_blocked()
                there.send(raw)

            nursery.start_soon(answer)
            with pytest.raises(OSError):
                await calls.call("echo", {})
        assert calls.failure is not None
        there.close()

    run(body)


CALLS = b"".join(
    framed({"id": n, "method": "echo", "params": {"n": n, "x": "x" * (n * 1000)}}) for n in range(1, 100, 9)
)


@given(st.lists(st.integers(0, len(CALLS)), max_size=10))
@settings(max_examples=30)
def test_any_split_of_the_calls_gives_the_same_answers(cuts: list[int]) -> None:
    async def body() -> None:
        here, there = pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Node().serve, there)
            received = bytearray()

            async def receive() -> None:
                while True:
                    await trio.lowlevel.wait_readable(here)
                    piece = here.recv(1 << 16)
                    received.extend(piece)
                    if not piece:
                        return

            nursery.start_soon(receive)
            at = 0
            for cut in [*sorted(cuts), len(CALLS)]:
                while at < cut:
                    try:
                        at += here.send(CALLS[at:cut])
                    except BlockingIOError:
                        await trio.lowlevel.wait_writable(here)
                await trio.testing.wait_all_tasks_blocked()
            here.shutdown(socket.SHUT_WR)
        here.close()
        answers, at = [], 0
        while at < len(received):
            length = HEAD.unpack_from(received, at)[1]
            answers.append(json.loads(received[at + 8 : at + 8 + length]))
            at += 8 + length
        assert sorted(answer["id"] for answer in answers) == list(range(1, 100, 9))
        assert all(answer["result"]["n"] == answer["id"] for answer in answers)

    run(body)
