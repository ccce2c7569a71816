"""nbd.takeover: a private option makes a connection somebody else's, plain or over TLS, and only if that one agrees."""

from __future__ import annotations

import errno
import logging
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing

from nbd import wire
from nbd.export import Client
from nbd.handshake import MAX_OPTIONS, MAX_TAKEOVER_BYTES
from nbd.listen import open_tcp
from nbd.opening import ClientLimits, take_over
from nbd.server import Server, serve
from nbd.tls import TlsFiles, TlsSocket, client_context
from nbd.uri import Address
from nbd.workshop import Limits
from tests.nbd.certificates import Authority
from tests.nbd.client import RawClient, option_bytes, run
from tests.nbd.memory import MemoryExport, MemoryExports

OPTION = wire.OPT_TERRACE
Sock = socket.socket | TlsSocket


async def receive(sock: Sock) -> bytes:
    while True:
        try:
            return sock.recv(1 << 16)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)


async def send(sock: Sock, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)


async def receive_exactly(sock: Sock, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = await receive(sock)
        assert part, f"the connection ended behind {data!r}"
        data += part
    return data


@dataclass
class Echo:
    """Says back in capitals what it hears; whoever names itself `bad` is refused."""

    asked: list[tuple[Client, bytes]] = field(default_factory=list)
    running: int = 0
    begun: int = 0
    fails: BaseException | None = None

    def judge(self, client: Client, data: bytes) -> str | None:
        self.asked.append((client, data))
        return f"{data.decode()} is not wanted here" if data.startswith(b"bad") else None

    async def run(self, sock: Sock, client: Client, data: bytes, received: bytes) -> None:
        self.running += 1
        self.begun += 1
        try:
            await send(sock, b"hello " + data + b"\n")
            if self.fails is not None:
                raise self.fails
            await send(sock, received.upper())
            while heard := await receive(sock):
                await send(sock, heard.upper())
        finally:
            self.running -= 1


@dataclass
class Serving:
    server: Server
    address: Address
    exports: MemoryExports
    nursery: trio.Nursery
    clients: list[RawClient] = field(default_factory=list)


@asynccontextmanager
async def serving(
    echo: Echo | None, *, tls: TlsFiles | None = None, required: bool = False, limits: Limits | None = None
) -> AsyncIterator[Serving]:
    (listener,) = await open_tcp("127.0.0.1", 0)
    exports = MemoryExports(MemoryExport())

    async def start(task_status: trio.TaskStatus[Server]) -> None:
        await serve(
            exports,
            [listener],
            limits=limits,
            tls=tls,
            tls_required=required,
            takeovers={} if echo is None else {OPTION: echo},
            task_status=task_status,
        )

    async with trio.open_nursery() as nursery:
        server = await nursery.start(start)
        host, port = listener.sock.getsockname()[:2]
        served = Serving(server, (host, port), exports, nursery)
        try:
            yield served
        finally:
            nursery.cancel_scope.cancel()
            listener.close()
            for client in served.clients:
                client.stream.socket.close()
    assert exports.open == 0
    if echo is not None:
        assert echo.running == 0


async def raw(served: Serving) -> RawClient:
    host, port = served.address  # type: ignore[misc]
    served.clients.append(RawClient(await trio.open_tcp_stream(host, port)))
    return served.clients[-1]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("takeover"))


@pytest.fixture(scope="module")
def files(authority: Authority) -> TlsFiles:
    pair = authority.issue("server", server=True)
    return TlsFiles(pair.certificate, pair.key, authority.path)


def test_both_sides_talk_whatever_they_like_and_it_ends_when_the_other_side_leaves() -> None:
    async def test() -> None:
        echo = Echo()
        async with serving(echo) as served:
            sock, received = await take_over(served.address, OPTION, b"a")
            with sock:  # type: ignore[union-attr]
                await send(sock, b"more")
                whole = received + await receive_exactly(sock, len(b"hello a\n") - len(received))
                assert whole == b"hello a\n"
            while served.server.status().connections:
                await trio.sleep(0.005)
            assert echo.begun == 1 and echo.asked[0][0].address == "127.0.0.1"

    run(test)


@pytest.mark.parametrize("rest", [b"", b"and this at once" * 1000])
def test_what_comes_right_behind_the_option_is_the_first_that_is_handled(rest: bytes) -> None:
    async def test() -> None:
        async with serving(Echo()) as served:
            client = await raw(served)
            await client.hello()
            await client.send(option_bytes(OPTION, b"b") + rest + b"x")
            reply = await client.receive(20)
            assert struct.unpack(">QIII", reply) == (wire.REP_MAGIC, OPTION, wire.REP_ACK, 0)
            assert await client.receive(8) == b"hello b\n"
            assert await client.receive(len(rest) + 1) == rest.upper() + b"X"
            await client.stream.aclose()

    run(test)


def test_over_tls_it_is_the_tls_socket_and_the_client_is_who_its_certificate_says(
    authority: Authority, files: TlsFiles
) -> None:
    async def test() -> None:
        echo = Echo()
        pair = authority.issue("node-b")
        context = client_context(authority.path, pair.certificate, pair.key, check_hostname=False)
        async with serving(echo, tls=files, required=True) as served:
            sock, received = await take_over(served.address, OPTION, b"c", tls=context)
            assert isinstance(sock, TlsSocket)
            assert received + await receive_exactly(sock, 8 - len(received)) == b"hello c\n"
            ((client, data),) = echo.asked
            assert client.encrypted and client.identity is not None and "CN=node-b" in client.identity.subject
            assert data == b"c"
            (status,) = served.server.status().connections
            assert status.subject == client.identity.subject and status.tls.startswith("TLS")
            await served.server.drain(5)
            assert await receive(sock) == b""
            sock.close()

    run(test)


def test_where_tls_is_required_nobody_is_asked_without_it(files: TlsFiles) -> None:
    async def test() -> None:
        echo = Echo()
        async with serving(echo, tls=files, required=True) as served:
            with pytest.raises(OSError, match="the server demands TLS") as caught:
                await take_over(served.address, OPTION, b"d")
            assert caught.value.errno == errno.EPROTONOSUPPORT and not echo.asked

    run(test)


def test_a_client_that_insists_on_tls_sends_the_option_to_nobody_without_it(authority: Authority) -> None:
    async def test() -> None:
        echo = Echo()
        context = client_context(authority.path, check_hostname=False)
        async with serving(echo) as served:
            with pytest.raises(OSError, match="the server takes no TLS"):
                await take_over(served.address, OPTION, b"secret", tls=context)
            assert not echo.asked

    run(test)


def test_a_refusal_is_a_sentence_and_the_handshake_goes_on() -> None:
    async def test() -> None:
        async with serving(Echo()) as served:
            host, port = served.address  # type: ignore[misc]
            with pytest.raises(OSError, match=f"{host}:{port}: .*: bad one is not wanted here$") as caught:
                await take_over(served.address, OPTION, b"bad one")
            assert caught.value.errno == errno.EACCES
            client = await raw(served)
            await client.hello()
            assert await client.option(OPTION, b"bad") == [(wire.REP_ERR_POLICY, b"bad is not wanted here")]
            assert await client.option(OPTION, b"good") == [(wire.REP_ACK, b"")]
            assert await client.receive(11) == b"hello good\n"
            await client.stream.aclose()

    run(test)


def test_a_server_that_has_nobody_for_it_says_that_it_is_not_supported() -> None:
    async def test() -> None:
        async with serving(None) as served:
            with pytest.raises(OSError, match="option TERRACE is not supported") as caught:
                await take_over(served.address, OPTION, b"e")
            assert caught.value.errno == errno.ENOTSUP

    run(test)


@pytest.mark.parametrize("size", [MAX_TAKEOVER_BYTES + 1, 70_000])
def test_more_data_than_the_bound_is_thrown_away_and_nobody_is_asked(size: int) -> None:
    async def test() -> None:
        echo = Echo()
        async with serving(echo) as served:
            client = await raw(served)
            await client.hello()
            ((kind, text),) = await client.option(OPTION, bytes(size))
            assert kind == wire.REP_ERR_TOO_BIG and b"bytes of data" in text and not echo.asked
            assert (await client.option(OPTION, b"x" * MAX_TAKEOVER_BYTES))[0][0] == wire.REP_ACK
            await client.stream.aclose()

    run(test)


def test_who_asks_for_ever_is_dropped_with_one_line_for_its_refusals(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving(Echo()) as served:
            client = await raw(served)
            await client.hello()
            for _ in range(MAX_OPTIONS):
                assert (await client.option(OPTION, b"bad"))[0][0] == wire.REP_ERR_POLICY
            await client.send(option_bytes(OPTION, b"bad"))
            await client.expect_end()

    with caplog.at_level(logging.INFO, logger="nbd.server"):
        run(test)
    assert caplog.text.count("bad is not wanted here") == 1


def test_it_counts_as_a_connection_and_has_no_deadline_but_is_no_client_of_an_export() -> None:
    async def test() -> None:
        limits = Limits(connections=1, handshake_timeout_s=0.1)
        async with serving(Echo(), limits=limits) as served:
            sock, _ = await take_over(served.address, OPTION, b"f")
            await trio.sleep(0.2)
            (status,) = served.server.status().connections
            assert (status.kind, status.export) == ("takeover", "")
            assert served.server.disconnect("mem") == 0
            with pytest.raises(OSError):  # there is no room for another one
                await take_over(served.address, OPTION, b"g", limits=ClientLimits(handshake_timeout_s=1))
            await send(sock, b"still here")
            assert await receive_exactly(sock, 8) == b"hello f\n"
            sock.close()

    run(test)


def test_the_handshake_before_it_has_its_deadline() -> None:
    async def test() -> None:
        async with serving(Echo(), limits=Limits(handshake_timeout_s=0.1)) as served:
            client = await raw(served)
            await client.hello()
            await client.send(option_bytes(OPTION, b"12345")[:-1])
            await client.expect_end()

    run(test)


@pytest.mark.parametrize("how", ["drain", "suspend"])
def test_a_server_that_stops_or_is_replaced_ends_it_at_once_and_keeps_none(how: str) -> None:
    async def test() -> None:
        echo = Echo()
        async with serving(echo) as served:
            sock, _ = await take_over(served.address, OPTION, b"h")
            assert await receive_exactly(sock, 8) == b"hello h\n"
            with trio.fail_after(1):
                if how == "drain":
                    await served.server.drain(30)
                else:
                    assert await served.server.suspend(30) == []
            assert echo.running == 0
            assert await receive(sock) == b""
            sock.close()

    run(test)


@pytest.mark.parametrize("how", ["drain", "suspend"])
def test_it_does_not_begin_when_the_server_has_begun_to_stop(how: str) -> None:
    async def test() -> None:
        echo = Echo()
        async with serving(echo) as served:
            client = await raw(served)
            await client.hello()
            await trio.testing.wait_all_tasks_blocked()
            if how == "drain":
                served.server.start_drain(0.2)
            else:
                served.nursery.start_soon(served.server.suspend, 0.2)
                await trio.testing.wait_all_tasks_blocked()
            ((kind, _),) = await client.option(OPTION, b"late")
            assert kind in (wire.REP_ACK, wire.REP_ERR_SHUTDOWN)
            if kind == wire.REP_ACK:
                await client.expect_end()
            assert echo.begun == 0
            await client.stream.aclose()

    run(test)


@dataclass
class Stubborn(Echo):
    """What it has begun it ends."""

    done: bool = False

    async def run(self, sock: Sock, client: Client, data: bytes, received: bytes) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.05)
            self.done = True


def test_a_drain_waits_for_what_it_has_to_end_itself() -> None:
    async def test() -> None:
        stubborn = Stubborn()
        async with serving(stubborn) as served:
            sock, _ = await take_over(served.address, OPTION, b"i")
            await trio.testing.wait_all_tasks_blocked()
            await served.server.drain(5)
            assert stubborn.done
            sock.close()

    run(test)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ESTALE, "another term"), "its connection ended: another term"),
        (ExceptionGroup("two", [ExceptionGroup("", [OSError(errno.EIO, "first"), OSError(5, "b")])]), "ended: first"),
        (ValueError("oops"), "a bug ended this connection"),
    ],
)
def test_an_error_ends_this_connection_with_a_line_and_no_other(
    error: Exception, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        echo = Echo()
        async with serving(echo) as served:
            other, _ = await take_over(served.address, OPTION, b"other")
            assert await receive_exactly(other, 12) == b"hello other\n"
            echo.fails = error
            sock, _ = await take_over(served.address, OPTION, b"j")
            assert await receive_exactly(sock, 8) == b"hello j\n"
            assert await receive(sock) == b""
            sock.close()
            assert len(served.server.status().connections) == 1
            client = await raw(served)
            await client.go()
            assert (await client.ask(wire.CMD_READ, 0, 512)).error == 0
            await client.stream.aclose()
            other.close()

    with caplog.at_level(logging.INFO, logger="nbd.server"):
        run(test)
    assert line in caplog.text
    assert ("Traceback" in caplog.text) == isinstance(error, ValueError)


def test_a_server_that_is_none_or_says_nothing_is_an_error_with_its_address(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "sock"
        with pytest.raises(OSError, match=f"{path}: ") as caught:
            await take_over(path, OPTION, b"k")
        assert caught.value.errno == errno.ENOENT
        with trio.socket.socket(trio.socket.AF_UNIX) as silent:
            await silent.bind(str(path))
            silent.listen(1)
            with pytest.raises(OSError, match=r"no connection within 0\.05 s") as caught:
                await take_over(path, OPTION, b"k", limits=ClientLimits(handshake_timeout_s=0.05))
            assert caught.value.errno == errno.ETIMEDOUT

    run(test)
