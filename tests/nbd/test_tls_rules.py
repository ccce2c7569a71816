"""What the protocol says of TLS on the server's side, each rule by name, with a client that says what is meant."""

from __future__ import annotations

import logging
import os
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.x509.oid import NameOID

from nbd import wire
from nbd.export import Client
from nbd.listen import open_tcp, open_unix
from nbd.server import Server, serve
from nbd.suspended import Suspended
from nbd.tls import TlsFiles, client_context
from nbd.workshop import Limits
from tests.nbd.certificates import DAY, Authority, Pair
from tests.nbd.client import Closed, RawClient, info_bytes, meta_bytes, option_bytes, run
from tests.nbd.memory import MemoryExport, MemoryExports

SIZE = 1 << 20
VERSIONS = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def server_pair(authority: Authority) -> Pair:
    return authority.issue("server", server=True)


@pytest.fixture(scope="module")
def trusting(authority: Authority) -> ssl.SSLContext:
    """A client's context without a certificate of its own."""
    return client_context(authority.path)


@pytest.fixture(scope="module")
def known(authority: Authority) -> ssl.SSLContext:
    """One with a certificate that the server takes."""
    pair = authority.issue("backup")
    return client_context(authority.path, pair.certificate, pair.key)


class Stream:
    """As much of trio.SocketStream as `RawClient` uses, over TLS of the standard library."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self.stream = stream
        self.socket = stream.transport_stream.socket

    async def send_all(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def receive_some(self, size: int) -> bytes:
        return bytes(await self.stream.receive_some(size))


class Served:
    def __init__(self, exports: MemoryExports, port: int, path: Path, server: Server) -> None:
        self.exports, self.port, self.path, self.server = exports, port, path, server
        self.sockets: list[trio.socket.SocketType] = []

    async def connect(self, *, unix: bool = False) -> RawClient:
        sock = trio.socket.socket(trio.socket.AF_UNIX if unix else trio.socket.AF_INET)
        self.sockets.append(sock)
        await sock.connect(str(self.path) if unix else ("127.0.0.1", self.port))
        return RawClient(trio.SocketStream(sock))

    async def secure(self, client: RawClient, context: ssl.SSLContext) -> None:
        """Ask for TLS and go on with it."""
        assert await client.option(wire.OPT_STARTTLS) == [(wire.REP_ACK, b"")]
        await self.shake(client, context)

    async def shake(self, client: RawClient, context: ssl.SSLContext) -> None:
        assert not client._buffer
        stream = trio.SSLStream(client.stream, context, server_hostname="localhost", https_compatible=True)
        await stream.do_handshake()
        client.stream = Stream(stream)  # type: ignore[assignment]

    async def until_quiet(self) -> None:
        """No connection is left."""
        with trio.fail_after(5):
            while self.server.status().connections:
                await trio.sleep(0.005)


@asynccontextmanager
async def serving(
    server_pair: Pair,
    *,
    ca: Path | None = None,
    required: bool = True,
    off: bool = False,
    limits: Limits | None = None,
    export: MemoryExport | None = None,
) -> AsyncIterator[Served]:
    exports = MemoryExports(export or MemoryExport(size_bytes=SIZE))
    files = None if off else TlsFiles(server_pair.certificate, server_pair.key, ca)
    listeners = await open_tcp("127.0.0.1", 0)
    path = server_pair.key.parent / f"nbd-{os.getpid()}.sock"
    listeners.append(await open_unix(path))
    async with trio.open_nursery() as nursery:

        async def start(task_status: trio.TaskStatus[Server]) -> None:
            await serve(
                exports, listeners, limits=limits, tls=files, tls_required=required and not off, task_status=task_status
            )

        server = await nursery.start(start)
        served = Served(exports, listeners[0].port, path, server)
        try:
            yield served
        finally:
            for sock in served.sockets:
                sock.close()
            nursery.cancel_scope.cancel()
            for listener in listeners:  # which a server that is suspended leaves open
                listener.close()
    assert exports.open == 0, "an export was not released"


def errors(replies: list[tuple[int, bytes]]) -> list[int]:
    return [kind for kind, _ in replies]


async def works(client: RawClient) -> None:
    """The rest of the protocol goes on over it."""
    await client.option(wire.OPT_STRUCTURED_REPLY)
    client.structured = True
    await client.option(wire.OPT_SET_META_CONTEXT, meta_bytes("mem", wire.META_ALLOCATION))
    replies = await client.option(wire.OPT_GO, info_bytes("mem"))
    assert replies[-1][0] == wire.REP_ACK
    data = os.urandom(300_000)
    assert (await client.ask(wire.CMD_WRITE, 7, data=data)).error == 0
    assert (await client.ask(wire.CMD_FLUSH)).error == 0
    assert (await client.ask(wire.CMD_READ, 7, 300_000)).data == data
    assert (await client.ask(wire.CMD_BLOCK_STATUS, 0, SIZE)).extents
    await client.disconnect()


@VERSIONS
def test_after_starttls_the_whole_connection_goes_on_over_tls(
    server_pair: Pair, authority: Authority, version: ssl.TLSVersion
) -> None:
    context = client_context(authority.path)
    context.maximum_version = version

    async def test() -> None:
        async with serving(server_pair) as served:
            client = await served.connect()
            await client.hello()
            await served.secure(client, context)
            await client.option(wire.OPT_LIST)
            (connection,) = served.server.status().connections
            assert connection.tls == version.name.replace("_", ".") and connection.subject is None
            await works(client)

    run(test)


def test_starttls_discards_what_was_negotiated_before(server_pair: Pair, trusting: ssl.SSLContext) -> None:
    async def test() -> None:
        async with serving(server_pair, required=False) as served:
            client = await served.connect()
            await client.hello()
            assert errors(await client.option(wire.OPT_STRUCTURED_REPLY)) == [wire.REP_ACK]
            replies = await client.option(wire.OPT_SET_META_CONTEXT, meta_bytes("mem", wire.META_ALLOCATION))
            assert errors(replies) == [wire.REP_META_CONTEXT, wire.REP_ACK]
            await served.secure(client, trusting)
            # Contexts want structured replies, which are gone; and so are the contexts.
            replies = await client.option(wire.OPT_SET_META_CONTEXT, meta_bytes("mem", wire.META_ALLOCATION))
            assert errors(replies) == [wire.REP_ERR_INVALID]
            assert errors(await client.option(wire.OPT_GO, info_bytes("mem")))[-1] == wire.REP_ACK
            assert not (await client.ask(wire.CMD_READ, 0, 10)).structured
            assert (await client.ask(wire.CMD_BLOCK_STATUS, 0, 10)).error == wire.EINVAL
            await client.disconnect()

    run(test)


@pytest.mark.parametrize("together", [True, False], ids=["with-the-option", "right-behind-it"])
def test_plaintext_behind_starttls_before_the_acknowledgement_ends_the_connection(
    server_pair: Pair, trusting: ssl.SSLContext, caplog: pytest.LogCaptureFixture, together: bool
) -> None:
    async def test() -> None:
        async with serving(server_pair) as served:
            client = await served.connect()
            await client.hello()
            # Somebody in between adds an option that would be taken as if it had come through TLS.
            if together:
                await client.send(option_bytes(wire.OPT_STARTTLS) + option_bytes(wire.OPT_STRUCTURED_REPLY))
            else:
                # The server's receive takes 16,384 bytes, which end with STARTTLS; the rest stays in the socket.
                assert errors(await client.option(wire.OPT_LIST)) == [wire.REP_ERR_TLS_REQD]
                filler = option_bytes(99, b"x" * (16_384 - 2 * wire.OPTION.size))
                await client.send(filler + option_bytes(wire.OPT_STARTTLS) + option_bytes(wire.OPT_STRUCTURED_REPLY))
                (*_, length) = struct.unpack(">QIII", await client.receive(20))
                await client.receive(length)
            await client.expect_end()
            await served.until_quiet()
            other = await served.connect()
            await other.hello()
            await served.secure(other, trusting)
            await works(other)

    with caplog.at_level(logging.WARNING, "nbd.server"):
        run(test)
    (record,) = caplog.records
    assert "127.0.0.1:" in record.getMessage() and "plaintext behind STARTTLS" in record.getMessage()


def test_a_second_starttls_is_invalid_and_so_is_one_with_data(server_pair: Pair, trusting: ssl.SSLContext) -> None:
    async def test() -> None:
        async with serving(server_pair) as served:
            client = await served.connect()
            await client.hello()
            assert errors(await client.option(wire.OPT_STARTTLS, b"x")) == [wire.REP_ERR_INVALID]
            await served.secure(client, trusting)
            assert errors(await client.option(wire.OPT_STARTTLS)) == [wire.REP_ERR_INVALID]
            assert errors(await client.option(wire.OPT_STARTTLS, b"x")) == [wire.REP_ERR_INVALID]
            await works(client)

    run(test)


def test_where_tls_is_required_every_option_but_starttls_and_abort_gets_tls_reqd_and_no_export_is_opened(
    server_pair: Pair, trusting: ssl.SSLContext
) -> None:
    async def test() -> None:
        async with serving(server_pair) as served:
            acquired: list[str] = []
            acquire = served.exports.acquire

            async def noted(name: str, client: object = None) -> MemoryExport:
                assert isinstance(client, Client) and client.encrypted
                acquired.append(name)
                return await acquire(name, client)

            served.exports.acquire = noted  # type: ignore[method-assign]
            client = await served.connect()
            await client.hello()
            for option, data in [
                (wire.OPT_LIST, b""),
                (wire.OPT_INFO, info_bytes("mem")),
                (wire.OPT_GO, info_bytes("mem")),
                (wire.OPT_GO, info_bytes("no such export")),
                (wire.OPT_STRUCTURED_REPLY, b""),
                (wire.OPT_LIST_META_CONTEXT, meta_bytes("mem")),
                (wire.OPT_SET_META_CONTEXT, meta_bytes("mem", wire.META_ALLOCATION)),
                (wire.OPT_EXTENDED_HEADERS, b""),
                (4711, b"unknown"),
                (wire.OPT_INFO, b"x" * 100_000),
            ]:
                assert errors(await client.option(option, data)) == [wire.REP_ERR_TLS_REQD], option
            assert not acquired
            await served.secure(client, trusting)
            # And never after it.
            assert wire.REP_ERR_TLS_REQD not in errors(await client.option(4711))
            assert errors(await client.option(wire.OPT_LIST)) == [wire.REP_SERVER, wire.REP_ACK]
            await works(client)
            assert acquired

            client = await served.connect()
            await client.hello()
            assert errors(await client.option(wire.OPT_ABORT, b"ignored")) == [wire.REP_ACK]
            await client.expect_end()
            for flags in (3, 0):  # newstyle that is not fixed has nothing but EXPORT_NAME
                client = await served.connect()
                await client.hello(flags)
                await client.send(option_bytes(wire.OPT_EXPORT_NAME, b"mem"))
                await client.expect_end()

    run(test)


def test_where_tls_is_allowed_both_ways_work_and_the_old_option_too(
    server_pair: Pair, trusting: ssl.SSLContext
) -> None:
    async def test() -> None:
        async with serving(server_pair, required=False) as served:
            client = await served.connect()
            await client.hello()
            await works(client)
            client = await served.connect()
            await client.hello()
            await served.secure(client, trusting)
            await client.send(option_bytes(wire.OPT_EXPORT_NAME, b"mem"))
            size, flags = struct.unpack(">QH", await client.receive(10))
            assert size == SIZE and flags
            await client.disconnect()

    run(test)


def test_the_unix_socket_never_needs_tls_and_has_it(server_pair: Pair, trusting: ssl.SSLContext) -> None:
    async def test() -> None:
        async with serving(server_pair) as served:
            client = await served.connect(unix=True)
            await client.hello()
            await works(client)
            client = await served.connect(unix=True)
            await client.hello()
            await served.secure(client, trusting)
            await works(client)

    run(test)


def test_where_tls_is_off_starttls_is_unsupported_and_nothing_gets_tls_reqd(server_pair: Pair) -> None:
    async def test() -> None:
        async with serving(server_pair, off=True) as served:
            client = await served.connect()
            await client.hello()
            assert await client.option(wire.OPT_STARTTLS) == [(wire.REP_ERR_UNSUP, b"TLS is off here")]
            await works(client)

    run(test)


def test_a_server_that_stops_refuses_starttls(server_pair: Pair) -> None:
    async def test() -> None:
        async with serving(server_pair, required=False) as served:
            client = await served.connect()
            await client.hello()
            await client.option(wire.OPT_LIST)
            served.server.start_drain(1)
            assert errors(await client.option(wire.OPT_STARTTLS)) == [wire.REP_ERR_SHUTDOWN]

    run(test)


def test_a_verified_certificate_is_the_clients_identity(
    server_pair: Pair, authority: Authority, known: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with serving(server_pair, ca=authority.path) as served:
            client = await served.connect()
            await client.hello()
            await served.secure(client, known)
            await client.option(wire.OPT_LIST)
            (connection,) = served.server.status().connections
            assert connection.subject == "CN=backup,O=Test"
            await works(client)

    with caplog.at_level(logging.INFO, "nbd.server"):
        run(test)
    assert any("attached to mem (TLSv1.3, CN=backup,O=Test)" in record.getMessage() for record in caplog.records)


def test_a_certificate_with_a_directorys_name_is_taken_and_one_with_a_name_that_is_none_is_not(
    server_pair: Pair, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    name = x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")]))
    good = authority.issue("directory", also=name)
    # cryptography wouldn't write such bytes, but a signature can be over any.
    bad = authority.issue("bytes", raw_names=b"\x30\x07\x86\x05urn:\xff")

    async def test() -> None:
        async with serving(server_pair, ca=authority.path) as served:
            client = await served.connect()
            await client.hello()
            await served.secure(client, client_context(authority.path, good.certificate, good.key))
            (connection,) = served.server._connections
            await client.option(wire.OPT_LIST)
            assert connection.client.identity is not None and connection.client.identity.names[1] == "DirName:CN=x"
            await works(client)
            client = await served.connect()
            await client.hello()
            with pytest.raises((Closed, trio.BrokenResourceError)):
                await served.secure(client, client_context(authority.path, bad.certificate, bad.key))
                await client.option(wire.OPT_LIST)
            await served.until_quiet()

    with caplog.at_level(logging.WARNING, "nbd.server"):
        run(test)
    (record,) = caplog.records
    assert record.getMessage().endswith("the peer's certificate is not accepted: a name in it can't be read")


@VERSIONS
@pytest.mark.parametrize("wrong", ["none", "expired", "foreign", "early"])
def test_a_client_whose_certificate_is_not_good_is_dropped_with_one_line_and_others_notice_nothing(
    server_pair: Pair,
    authority: Authority,
    known: ssl.SSLContext,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    wrong: str,
    version: ssl.TLSVersion,
) -> None:
    pair = {
        "none": lambda: None,
        "expired": lambda: authority.issue("expired", starts=-2 * DAY, ends=-timedelta(seconds=5)),
        "early": lambda: authority.issue("early", starts=DAY / 2),
        "foreign": lambda: Authority(tmp_path).issue("foreign"),
    }[wrong]()
    said = {
        "none": "the peer showed no certificate",
        "expired": "certificate has expired",
        "early": "certificate is not yet valid",
        "foreign": "not accepted",
    }[wrong]
    context = client_context(authority.path, *((pair.certificate, pair.key) if pair else ()))
    context.maximum_version = version

    async def test() -> None:
        async with serving(server_pair, ca=authority.path) as served:
            good = await served.connect()
            await good.hello()
            await served.secure(good, known)
            bad = await served.connect()
            await bad.hello()
            with pytest.raises((Closed, ssl.SSLError, trio.BrokenResourceError)) as caught:
                await served.secure(bad, context)
                await bad.option(wire.OPT_LIST)
            assert caught.value
            await works(good)
            await served.until_quiet()

    with caplog.at_level(logging.WARNING, "nbd.server"):
        run(test)
    (record,) = caplog.records
    assert record.getMessage().startswith("127.0.0.1:") and said in record.getMessage(), record.getMessage()


@pytest.mark.parametrize("sent", [os.urandom(500), option_bytes(wire.OPT_LIST), b"GET / HTTP/1.0\r\n\r\n"])
def test_what_is_not_tls_after_starttls_ends_that_connection_with_one_line(
    server_pair: Pair, trusting: ssl.SSLContext, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    async def test() -> None:
        async with serving(server_pair) as served:
            client = await served.connect()
            await client.hello()
            assert errors(await client.option(wire.OPT_STARTTLS)) == [wire.REP_ACK]
            await client.send(sent)
            await served.until_quiet()
            other = await served.connect()
            await other.hello()
            await served.secure(other, trusting)
            await works(other)

    with caplog.at_level(logging.WARNING, "nbd.server"):
        run(test)
    (record,) = caplog.records
    assert record.getMessage().startswith("127.0.0.1:") and "dropped: " in record.getMessage()


def test_what_breaks_tls_later_ends_that_connection_with_one_line(
    server_pair: Pair, trusting: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with serving(server_pair) as served:
            client = await served.connect()
            await client.hello()
            await served.secure(client, trusting)
            await client.option(wire.OPT_GO, info_bytes("mem"))
            await client.stream.socket.send(b"\x17\x03\x03\x00\x40" + bytes(64))
            await served.until_quiet()

    with caplog.at_level(logging.WARNING, "nbd.server"):
        run(test)
    (record,) = caplog.records
    assert "dropped: a record was damaged or forged" in record.getMessage()


def test_a_tls_handshake_that_never_ends_is_bounded_by_the_handshakes_timeout(
    server_pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with serving(server_pair, limits=Limits(handshake_timeout_s=0.2)) as served:
            client = await served.connect()
            await client.hello()
            assert errors(await client.option(wire.OPT_STARTTLS)) == [wire.REP_ACK]
            await client.send(b"\x16\x03\x01\x01\x00\x01")
            with pytest.raises(Closed):
                while True:
                    await client.receive(1)

    with caplog.at_level(logging.WARNING, "nbd.server"):
        run(test)
    (record,) = caplog.records
    assert "no handshake in 0.2 s" in record.getMessage()


@pytest.mark.parametrize("aborts", [True, False])
def test_who_asks_without_tls_where_it_is_required_and_leaves_is_named(
    server_pair: Pair, caplog: pytest.LogCaptureFixture, aborts: bool
) -> None:
    async def test() -> None:
        async with serving(server_pair) as served:
            client = await served.connect()
            await client.hello()
            assert errors(await client.option(wire.OPT_LIST)) == [wire.REP_ERR_TLS_REQD]
            if aborts:
                assert errors(await client.option(wire.OPT_ABORT)) == [wire.REP_ACK]
            await client.stream.aclose()
            with trio.fail_after(5):
                while not caplog.records:
                    await trio.sleep(0.01)

    with caplog.at_level(logging.INFO, "nbd.server"):
        run(test)
    (record,) = caplog.records
    assert record.getMessage().endswith("left: it asked for an export without TLS, which is required here")


def test_a_client_that_reads_no_replies_over_tls_holds_up_nobody_and_its_replies_arrive_in_the_end(
    server_pair: Pair, trusting: ssl.SSLContext
) -> None:
    async def test() -> None:
        async with serving(server_pair, export=MemoryExport(size_bytes=32 << 20)) as served:
            slow = await served.connect()
            await slow.hello()
            await served.secure(slow, trusting)
            await slow.option(wire.OPT_GO, info_bytes("mem"))
            count = 40
            for _ in range(count):
                await slow.request(wire.CMD_READ, 0, 1 << 20)
            other = await served.connect()
            await other.hello()
            await served.secure(other, trusting)
            await works(other)
            for _ in range(count):
                assert len((await slow.reply()).data) == 1 << 20
            await slow.disconnect()

    run(test)


def test_a_drain_answers_what_was_read_and_says_goodbye(server_pair: Pair, trusting: ssl.SSLContext) -> None:
    async def test() -> None:
        async with serving(server_pair, export=MemoryExport(size_bytes=SIZE, slow=True, delay_s=0.1)) as served:
            client = await served.connect()
            await client.hello()
            await served.secure(client, trusting)
            await client.option(wire.OPT_GO, info_bytes("mem"))
            await client.request(wire.CMD_READ, 0, 1000)
            await trio.sleep(0.05)
            served.server.start_drain(1)
            assert len((await client.reply()).data) == 1000
            await client.expect_end()

    run(test)


def test_a_changed_certificate_is_shown_to_the_next_client_and_a_bad_one_leaves_the_last(
    authority: Authority, trusting: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    pair = authority.issue("replaced", server=True)

    async def subject(served: Served) -> str:
        client = await served.connect()
        await client.hello()
        await served.secure(client, trusting)
        stream = client.stream.stream  # type: ignore[attr-defined]
        found = stream._ssl_object.getpeercert()
        await client.option(wire.OPT_ABORT)
        return str(dict(part[0] for part in found["subject"])["commonName"])

    async def test() -> None:
        async with serving(pair) as served:
            assert await subject(served) == "replaced"
            other = authority.issue("fresh", server=True)
            other.certificate.replace(pair.certificate)
            assert await subject(served) == "replaced"
            other.key.replace(pair.key)
            assert await subject(served) == "fresh"

    with caplog.at_level(logging.WARNING, "nbd.server"):
        run(test)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and "doesn't belong to the certificate" in record.getMessage()


# --- a server that is replaced ---


def test_clients_over_tls_are_answered_and_let_go_where_others_are_handed_over(
    server_pair: Pair, trusting: ssl.SSLContext
) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=True, delay_s=0.1)
        async with serving(server_pair, required=False, export=export) as served:
            plain, secured, idle = [await served.connect() for _ in range(3)]
            await plain.go()
            for client in (secured, idle):
                await client.hello()
                await served.secure(client, trusting)
                assert errors(await client.option(wire.OPT_GO, info_bytes("mem")))[-1] == wire.REP_ACK
            await secured.request(wire.CMD_READ, 0, 1000)
            await trio.sleep(0.05)
            left: list[Suspended] = []

            async def suspend() -> None:
                left.extend(await served.server.suspend(1))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(suspend)
                assert len((await secured.reply()).data) == 1000
                # By TLS's own goodbye, after which they may close.
                for client in (secured, idle):
                    await client.expect_end()
                    client.stream.socket.close()
            assert [one.peer.rpartition(":")[0] for one in left] == ["127.0.0.1"]
            left[0].close()
            await plain.expect_end()

    run(test)


def test_where_tls_is_required_from_now_on_a_client_that_came_without_it_is_not_gone_on_with(
    server_pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        exports = MemoryExports(MemoryExport(size_bytes=SIZE))
        files = TlsFiles(server_pair.certificate, server_pair.key)
        path = server_pair.key.parent / "again.sock"
        listeners = [*await open_tcp("127.0.0.1", 0), await open_unix(path)]
        async with trio.open_nursery() as nursery:
            server = await nursery.start(serve, exports, listeners)
            served = Served(exports, listeners[0].port, path, server)
            clients = [await served.connect(unix=unix) for unix in (False, True)]
            for client in clients:
                await client.go()
            left = await server.suspend(1)
            assert len(left) == 2
            again = partial(serve, exports, listeners, tls=files, tls_required=True, resumed=left)
            await nursery.start(again)
            await clients[0].expect_end()
            assert (await clients[1].ask(wire.CMD_READ, 0, 10)).error == 0
            for sock in served.sockets:
                sock.close()
            nursery.cancel_scope.cancel()
        assert exports.open == 0

    with caplog.at_level(logging.WARNING, "nbd.server"):
        run(test)
    (record,) = caplog.records
    assert "dropped: it came without TLS, which is required now" in record.getMessage()


# --- limits of connections ---


def test_the_oldest_handshake_makes_room_so_that_silent_clients_lock_nobody_out(server_pair: Pair) -> None:
    async def test() -> None:
        async with serving(server_pair, off=True, limits=Limits(handshakes=3)) as served:
            attached = await served.connect()
            await attached.go()
            silent = []
            for _ in range(3):
                client = await served.connect()
                await client.hello()
                silent.append(client)
            late = await served.connect()
            await late.go()
            await silent[0].expect_end()
            assert errors(await silent[1].option(wire.OPT_LIST))[-1] == wire.REP_ACK
            assert (await attached.ask(wire.CMD_READ, 0, 10)).error == 0
            await late.disconnect()

    run(test)


def test_where_all_connections_are_taken_a_silent_one_makes_room_after_a_while(
    server_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbd.server.HANDSHAKE_PATIENCE_S", 0.2)

    async def test() -> None:
        async with serving(server_pair, off=True, limits=Limits(connections=2)) as served:
            attached = await served.connect()
            await attached.go()
            silent = await served.connect()
            await silent.hello()
            await (await served.connect()).expect_end()  # it has just come, so it may go on
            await trio.sleep(0.25)
            late = await served.connect()
            await late.go()
            await silent.expect_end()
            await (await served.connect()).expect_end()  # those that are attached stay
            assert (await attached.ask(wire.CMD_READ, 0, 10)).error == 0

    run(test)


def test_connections_of_one_address_are_bounded_and_those_of_the_unix_socket_are_not(server_pair: Pair) -> None:
    async def test() -> None:
        async with serving(server_pair, off=True, limits=Limits(connections_per_address=2)) as served:
            clients = [await served.connect() for _ in range(2)]
            for client in clients:
                await client.go()
            await (await served.connect()).expect_end()
            for _ in range(3):
                await (await served.connect(unix=True)).go()
            await clients[0].disconnect()
            with trio.fail_after(5):
                while len(served.server.status().connections) > 4:
                    await trio.sleep(0.005)
            await (await served.connect()).go()

    run(test)


def test_who_is_refused_for_its_address_drops_nobodys_handshake(server_pair: Pair) -> None:
    async def test() -> None:
        async with serving(server_pair, off=True, limits=Limits(connections_per_address=1, handshakes=1)) as served:
            await (await served.connect()).go()
            waiting = await served.connect(unix=True)
            await waiting.hello()
            await waiting.option(wire.OPT_LIST)
            await (await served.connect()).expect_end()
            assert errors(await waiting.option(wire.OPT_LIST))[-1] == wire.REP_ACK

    run(test)
