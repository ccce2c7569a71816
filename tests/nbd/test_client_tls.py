"""The client over TLS, against a server of the test's own: sound ones, and those that do what no server should."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from nbd import wire
from nbd.client import ClientLimits, TlsOptions, connect
from nbd.tls import SEND_BYTES, server_context
from nbd.transport import TlsTransport, _blocks
from tests.nbd.certificates import DAY, Authority, Pair
from tests.nbd.client import run
from tests.nbd.fake import option_reply, receive
from tests.nbd.test_client import fails

TlsHandler = Callable[[trio.SSLStream[trio.SocketStream]], Awaitable[None]]
SIZE = 8 << 20


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pki(tmp_path_factory.mktemp("pki"))


def make_pki(directory: Path) -> Path:
    """A directory as clients and servers of NBD want it, with everything in it."""
    authority = Authority(directory)
    shutil.copy(authority.path, directory / "ca-cert.pem")
    authority.issue("server", server=True)
    authority.issue("client")
    authority.issue("expired", server=True, starts=-2 * DAY, ends=-DAY / 2)
    return directory


def pair(pki: Path, name: str) -> Pair:
    return Pair(pki / f"{name}-cert.pem", pki / f"{name}-key.pem")


@asynccontextmanager
async def serving(handler: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[int]:
    """The port of a server on 127.0.0.1 that does what the handler does with each connection."""

    async def guarded(stream: trio.SocketStream) -> None:
        try:
            async with stream:
                await handler(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    with trio.socket.socket(socket.AF_INET) as sock:
        await sock.bind(("127.0.0.1", 0))
        sock.listen(5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, guarded, [trio.SocketListener(sock)])
            yield sock.getsockname()[1]
            nursery.cancel_scope.cancel()


async def agree_on_tls(stream: trio.SocketStream, kind: int = wire.REP_ACK, extra: bytes = b"") -> None:
    await stream.send_all(b"NBDMAGICIHAVEOPT\0\3")
    await receive(stream, 4)
    assert await receive(stream, 16) == struct.pack(">QII", wire.IHAVEOPT, wire.OPT_STARTTLS, 0)
    await stream.send_all(option_reply(wire.OPT_STARTTLS, kind) + extra)


def over_tls(
    certificate: Pair, *, ca: Path | None = None, oldest: ssl.TLSVersion | None = None
) -> Callable[[trio.SocketStream], Awaitable[None]]:
    """A server with one export of `SIZE` bytes in memory, and extended headers; everything over TLS."""
    context = server_context(certificate.certificate, certificate.key, ca)
    if oldest is not None:
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.maximum_version = oldest
        context.set_ciphers("ALL:@SECLEVEL=0")
    data = bytearray(SIZE)

    async def handler(raw: trio.SocketStream) -> None:
        await agree_on_tls(raw)
        stream = trio.SSLStream(raw, context, server_side=True, https_compatible=True)
        inbox = bytearray()

        async def take(length: int) -> bytes:
            while len(inbox) < length:
                part = await stream.receive_some(1 << 16)
                if not part:
                    raise trio.BrokenResourceError
                inbox.extend(part)
            found = bytes(inbox[:length])
            del inbox[:length]
            return found

        while True:
            _, option, length = struct.unpack(">QII", await take(16))
            await take(length)
            assert option in (wire.OPT_EXTENDED_HEADERS, wire.OPT_GO)
            if option == wire.OPT_GO:
                flags = wire.HAS_FLAGS | wire.SEND_FLUSH
                size = struct.pack(">HQH", wire.INFO_EXPORT, SIZE, flags)
                await stream.send_all(option_reply(option, wire.REP_INFO, size))
            await stream.send_all(option_reply(option, wire.REP_ACK))
            if option == wire.OPT_GO:
                break
        while True:
            _, flags, command, cookie, offset, length = struct.unpack(">IHHQQQ", await take(32))
            if command == wire.CMD_DISC:
                return
            payload = b""
            kind = wire.REPLY_TYPE_NONE
            if command == wire.CMD_WRITE:
                data[offset : offset + length] = await take(length)
            elif command == wire.CMD_READ:
                kind, payload = wire.REPLY_TYPE_OFFSET_DATA, struct.pack(">Q", offset) + data[offset : offset + length]
            head = struct.pack(">IHHQQQ", wire.EXTENDED_REPLY_MAGIC, 1, kind, cookie, offset, len(payload))
            await stream.send_all(head + payload)

    return handler


def test_everything_goes_over_tls_in_both_directions(pki: Path) -> None:
    async def test() -> None:
        handler = over_tls(pair(pki, "server"), ca=pki / "ca-cert.pem")
        async with serving(handler) as port:
            uri = f"nbds://localhost:{port}/?tls-certificates={pki}"
            async with connect(uri) as client:
                assert client.terms.encrypted and isinstance(client._transport, TlsTransport)
                data = os.urandom(3 << 20)
                await client.write(12345, data)
                assert await client.read(12345, len(data)) == data
                await client.flush()

                async def work(number: int) -> None:
                    offset = (4 << 20) + number * 5000
                    await client.write(offset, bytes([number]) * 5000)
                    with trio.move_on_after(0.001 * (number % 3)):
                        await client.read(0, 1 << 20)
                    assert await client.read(offset, 5000) == bytes([number]) * 5000

                async with trio.open_nursery() as nursery:
                    for number in range(100):
                        nursery.start_soon(work, number)

    run(test, timeout_s=30)


def test_tls_can_be_given_beside_the_address(pki: Path) -> None:
    async def test() -> None:
        async with serving(over_tls(pair(pki, "server"))) as port:
            for tls in (TlsOptions(pki), TlsOptions(pki, "localhost"), TlsOptions(verify=False)):
                async with connect(("127.0.0.1", port), tls=tls) as client:
                    assert await client.read(0, 4) == bytes(4)
            context = ssl.create_default_context(cafile=str(pki / "ca-cert.pem"))
            async with connect(f"nbd://127.0.0.1:{port}", tls=context) as client:
                assert client.terms.encrypted
            context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
            with fails(errno.EINVAL, "older than 1.2"):
                async with connect(("127.0.0.1", port), tls=context):
                    pass

    run(test)


@pytest.mark.parametrize(
    ("certificate", "query", "number", "text"),
    [
        ("server", "", errno.EKEYREJECTED, "certificate is not accepted"),
        ("server", "tls-certificates={pki}&tls-hostname=other.example", errno.EKEYREJECTED, "other.example"),
        ("client", "tls-certificates={pki}", errno.EKEYREJECTED, "certificate is not accepted"),
        ("expired", "tls-certificates={pki}", errno.EKEYEXPIRED, "expired"),
        ("server", "tls-certificates={other}", errno.EKEYREJECTED, "certificate is not accepted"),
        ("server", "tls-certificates={pki}/none", errno.ENOENT, "no directory"),
        ("server", "tls-certificates={empty}", errno.ENOENT, "ca-cert.pem"),
        ("server", "tls-certificates={broken}", errno.EINVAL, "ca-cert.pem holds no certificate"),
        ("server", "tls-certificates={half}", errno.EINVAL, "client-cert.pem needs a client key"),
    ],
    ids=["system", "host", "no-server", "expired", "authority", "directory", "no-ca", "garbage", "no-key"],
)
def test_a_certificate_that_is_not_right_ends_it_with_a_sentence(
    certificate: str, query: str, number: int, text: str, pki: Path, tmp_path: Path
) -> None:
    places = {name: tmp_path / name for name in ("other", "empty", "broken", "half")}
    for place in places.values():
        place.mkdir()
    shutil.copy(Authority(places["other"]).path, places["other"] / "ca-cert.pem")
    (places["broken"] / "ca-cert.pem").write_text("no certificate\n")
    shutil.copy(pki / "ca-cert.pem", places["half"])
    shutil.copy(pki / "client-cert.pem", places["half"])

    async def test() -> None:
        async with serving(over_tls(pair(pki, certificate))) as port:
            with fails(number, text):
                async with connect(f"nbds://127.0.0.1:{port}/?{query.format(pki=pki, **places)}"):
                    pass

    run(test)


def test_what_a_certificate_is_for_is_the_host_of_the_address(pki: Path) -> None:
    async def test() -> None:
        async with serving(over_tls(pair(pki, "server"))) as port:
            async with connect(f"nbds://127.0.0.1:{port}/?tls-certificates={pki}"):
                pass
            with fails(errno.EKEYREJECTED, "not valid for '127.0.0.2'"):
                async with connect(f"nbds://127.0.0.1:{port}/?tls-certificates={pki}&tls-hostname=127.0.0.2"):
                    pass

    run(test)


def test_a_server_that_wants_a_client_certificate_and_gets_none_is_told_from_one_that_is_gone(
    pki: Path, tmp_path: Path
) -> None:
    shutil.copy(pki / "ca-cert.pem", tmp_path)

    async def test() -> None:
        async with serving(over_tls(pair(pki, "server"), ca=pki / "ca-cert.pem")) as port:
            with pytest.raises(OSError, match=r"certificate"):
                async with connect(f"nbds://localhost:{port}/?tls-certificates={tmp_path}"):
                    pass

    run(test)


def test_tls_older_than_1_2_is_not_spoken(pki: Path) -> None:
    async def test() -> None:
        with pytest.warns(DeprecationWarning):
            handler = over_tls(pair(pki, "server"), oldest=ssl.TLSVersion.TLSv1_1)
        async with serving(handler) as port:
            # A server that finds no version it speaks tells so, or only leaves.
            with pytest.raises(OSError, match=r"TLS|version"):
                async with connect(f"nbds://localhost:{port}/?tls-certificates={pki}"):
                    pass

    run(test)


@pytest.mark.parametrize(
    ("injected", "text"),
    [
        (option_reply(wire.OPT_EXTENDED_HEADERS, wire.REP_ACK), "TLS"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "TLS"),
        (bytes(range(100)), ""),
    ],
    ids=["options", "http", "noise"],
)
def test_plain_text_behind_the_agreement_on_tls_is_never_taken_for_an_answer(
    injected: bytes, text: str, pki: Path
) -> None:
    """The protocol text demands it: what was slipped in before TLS must not count after it."""

    async def handler(stream: trio.SocketStream) -> None:
        await agree_on_tls(stream, extra=injected)
        while await stream.receive_some(1 << 16):
            pass

    async def test() -> None:
        async with serving(handler) as port:
            with fails(errno.EPROTO, text):
                async with connect(
                    f"nbds://localhost:{port}/?tls-certificates={pki}", limits=ClientLimits(handshake_timeout_s=2)
                ):
                    pass

    run(test)


def test_a_server_that_goes_silent_in_the_tls_handshake_is_etimedout(pki: Path) -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await agree_on_tls(stream)
        await trio.sleep_forever()

    async def test() -> None:
        async with serving(handler) as port:
            with fails(errno.ETIMEDOUT, "within 0.2 s"):
                async with connect(
                    f"nbds://localhost:{port}/?tls-certificates={pki}", limits=ClientLimits(handshake_timeout_s=0.2)
                ):
                    pass

    run(test)


def test_a_server_without_tls_gets_no_plain_text_beyond_the_question(pki: Path) -> None:
    async def test() -> None:
        said = bytearray()

        async def handler(stream: trio.SocketStream) -> None:
            await agree_on_tls(stream, wire.REP_ERR_UNSUP)
            async for part in stream:
                said.extend(part)

        async with serving(handler) as port:
            with fails(errno.EPROTONOSUPPORT, "takes no TLS"):
                async with connect(f"nbds://localhost:{port}/secret?tls-certificates={pki}"):
                    pass
        assert b"secret" not in said

    run(test)


def test_a_tls_server_that_goes_away_is_econnreset_for_all_who_wait(pki: Path) -> None:
    async def test() -> None:
        context = server_context(pki / "server-cert.pem", pki / "server-key.pem")

        async def handler(raw: trio.SocketStream) -> None:
            await agree_on_tls(raw)
            stream = trio.SSLStream(raw, context, server_side=True)
            left = 16 + 16 + 4 + 2 + 2
            while left > 0:
                left -= len(await stream.receive_some(1 << 16))
                if left == 24:
                    await stream.send_all(option_reply(wire.OPT_EXTENDED_HEADERS, wire.REP_ACK))
            size = struct.pack(">HQH", wire.INFO_EXPORT, SIZE, wire.HAS_FLAGS)
            await stream.send_all(
                option_reply(wire.OPT_GO, wire.REP_INFO, size) + option_reply(wire.OPT_GO, wire.REP_ACK)
            )
            await stream.receive_some(1 << 16)
            await trio.sleep(0.05)

        async with serving(handler) as port, connect(f"nbds://localhost:{port}/?tls-certificates={pki}") as client:

            async def reader() -> None:
                with fails(errno.ECONNRESET):
                    await client.read(0, 4096)

            async with trio.open_nursery() as nursery:
                for _ in range(200):
                    nursery.start_soon(reader)
            assert (await client.failed()).errno == errno.ECONNRESET

    run(test)


def test_blocks_for_tls_are_the_same_bytes_in_fewer_pieces() -> None:
    for sizes in ([], [1], [32] * 100, [32, 1 << 20, 32, 5, 300_000], [262_144, 1], [100_000] * 7):
        buffers = [memoryview(os.urandom(size)) for size in sizes]
        found = _blocks(buffers)
        assert b"".join(found) == b"".join(buffers)
        assert len(found) <= 1 + 2 * sum(sizes) // SEND_BYTES
