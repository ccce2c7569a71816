"""nbd.tls: a TlsSocket behaves as the non-blocking socket that it stands for, and files are judged with a sentence."""

from __future__ import annotations

import datetime
import errno
import os
import random
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from cryptography.hazmat.primitives import serialization

from nbd import tls
from nbd.tls import Identity, TlsError, TlsFiles, TlsSocket, client_context, rehearse, server_context
from tests.nbd.certificates import DAY, Authority, Pair

VERSIONS = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def server(authority: Authority) -> Pair:
    return authority.issue("server", server=True)


@pytest.fixture(scope="module")
def client(authority: Authority) -> Pair:
    return authority.issue("client")


@pytest.fixture(scope="module")
def server_side(server: Pair) -> ssl.SSLContext:
    return server_context(server.certificate, server.key)


@pytest.fixture(scope="module")
def client_side(authority: Authority) -> ssl.SSLContext:
    return client_context(authority.path)


def sockets() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair()
    for sock in pair:
        sock.setblocking(False)
    return pair


@asynccontextmanager
async def connected(
    server_side: ssl.SSLContext, client_side: ssl.SSLContext, name: str = "localhost"
) -> AsyncIterator[tuple[TlsSocket, TlsSocket]]:
    """The server's and the client's end, after the handshake."""
    left, right = sockets()
    here = TlsSocket(left, server_side, server_side=True)
    there = TlsSocket(right, client_side, server_side=False, server_hostname=name)
    try:
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(here.handshake)
                nursery.start_soon(there.handshake)
        yield here, there
    finally:
        here.close()
        there.close()


async def receive(sock: TlsSocket, length: int) -> bytes:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        try:
            count = sock.recv_into(view)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
            continue
        assert count, "the connection ended too early"
        view = view[count:]
    return bytes(data)


async def send(sock: TlsSocket, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)


async def failures(
    server_side: ssl.SSLContext, client_side: ssl.SSLContext, name: str = "localhost"
) -> tuple[OSError | None, OSError | None]:
    """What the server's and the client's handshake (or first recv, as the client knows no sooner) raise."""
    left, right = sockets()
    here = TlsSocket(left, server_side, server_side=True)
    there = TlsSocket(right, client_side, server_side=False, server_hostname=name)
    found: list[OSError | None] = [None, None]

    async def one(which: int, sock: TlsSocket) -> None:
        try:
            await sock.handshake()
            if which == 0:
                await send(sock, b"x")
            else:
                await receive(sock, 1)
        except OSError as error:
            found[which] = error
            sock.close()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, 0, here)
            nursery.start_soon(one, 1, there)
    here.close()
    there.close()
    return found[0], found[1]


@VERSIONS
def test_what_is_sent_arrives_in_both_directions_at_once(
    authority: Authority, server_side: ssl.SSLContext, version: ssl.TLSVersion
) -> None:
    async def test() -> None:
        client_side = client_context(authority.path)
        client_side.maximum_version = version
        seeded = random.Random(1)
        one, other = seeded.randbytes(3_000_001), seeded.randbytes(1_234_567)
        async with connected(server_side, client_side) as (here, there):
            assert here.version == there.version == version.name.replace("_", ".").replace("TLSv1", "TLSv1")
            got: dict[str, bytes] = {}

            async def take(name: str, sock: TlsSocket, length: int) -> None:
                got[name] = await receive(sock, length)

            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(send, here, one)
                    nursery.start_soon(send, there, other)
                    nursery.start_soon(take, "there", there, len(one))
                    nursery.start_soon(take, "here", here, len(other))
            assert got == {"there": one, "here": other}

    trio.run(test)


def test_one_call_to_the_kernel_brings_many_records(
    server_side: ssl.SSLContext, client_side: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with connected(server_side, client_side) as (here, there):
            for _ in range(10):
                assert there.send(b"r" * 4096) == 4096
            buffer = memoryview(bytearray(1 << 20))
            assert here.recv_into(buffer) == 40_960
            with pytest.raises(BlockingIOError):
                here.recv_into(buffer)

    trio.run(test)


def test_ciphertext_in_memory_is_bounded_as_its_buffers_never_shrink(
    server_side: ssl.SSLContext, client_side: ssl.SSLContext
) -> None:
    class Watched:
        """A memory buffer that remembers how full it was."""

        def __init__(self, bio: ssl.MemoryBIO) -> None:
            self.bio, self.peak = bio, 0

        def write(self, data: memoryview) -> None:
            self.bio.write(data)
            self.peak = max(self.peak, self.bio.pending)

    async def test() -> None:
        async with connected(server_side, client_side) as (here, there):
            for pair in (here, there):
                pair._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            watched = here._in = Watched(here._in)  # type: ignore[assignment]
            data = random.Random(3).randbytes(1 << 20)
            sent, got = 0, bytearray()
            buffer = memoryview(bytearray(1 << 20))
            longest = 0
            while len(got) < len(data):
                with suppress(BlockingIOError):
                    while sent < len(data):
                        sent += there.send(data[sent:])
                while True:
                    try:
                        count = here.recv_into(buffer)
                    except BlockingIOError:
                        break
                    got += buffer[:count]
                    longest = max(longest, count)
            assert got == data
            assert watched.peak <= tls.RECEIVE_BYTES + (17 << 10) < 100_000
            # Yet what is there comes with one call, so that small requests are handled together.
            assert longest > 2 * tls.RECEIVE_BYTES

    trio.run(test)


def test_a_small_buffer_leaves_the_rest_for_later_though_the_socket_is_empty(
    server_side: ssl.SSLContext, client_side: ssl.SSLContext
) -> None:
    async def test() -> None:
        async with connected(server_side, client_side) as (here, there):
            there.send(bytes(range(256)) * 100)
            taken = bytearray()
            while len(taken) < 25_600:
                piece = bytearray(777)
                taken += piece[: here.recv_into(piece)]
            assert taken == bytes(range(256)) * 100

    trio.run(test)


def test_a_full_socket_wants_the_same_bytes_again_and_nothing_is_sent_twice(
    server_side: ssl.SSLContext, client_side: ssl.SSLContext
) -> None:
    async def test() -> None:
        async with connected(server_side, client_side) as (here, there):
            data = random.Random(2).randbytes(8 << 20)
            view = memoryview(data)
            blocked = 0
            sent = 0
            got = bytearray()
            buffer = memoryview(bytearray(100_000))
            while sent < len(data):
                try:
                    sent += here.send(view[sent:])
                except BlockingIOError:
                    blocked += 1
                    got += buffer[: there.recv_into(buffer)]
            assert blocked > 8
            got += await receive(there, len(data) - len(got))
            assert got == data

    trio.run(test)


def test_pending_ciphertext_is_bounded_by_one_send(server_side: ssl.SSLContext, client_side: ssl.SSLContext) -> None:
    async def test() -> None:
        async with connected(server_side, client_side) as (here, _):
            data = memoryview(bytes(16 << 20))
            sent = 0
            for _ in range(100):
                with suppress(BlockingIOError):
                    sent += here.send(data[sent:])
            assert len(here._left) + here._out.pending <= tls.SEND_BYTES + (16 << 10)

    trio.run(test)


def test_the_end_is_0_after_a_goodbye_and_after_a_plain_close(
    server_side: ssl.SSLContext, client_side: ssl.SSLContext
) -> None:
    async def test() -> None:
        for polite in (True, False):
            async with connected(server_side, client_side) as (here, there):
                there.send(b"last words")
                if polite:
                    there.close()
                else:
                    there._sock.close()
                buffer = bytearray(100)
                assert here.recv_into(buffer) == 10
                assert here.recv_into(buffer) == 0
                assert here.recv_into(buffer) == 0

    trio.run(test)


def test_what_the_peer_sent_is_received_after_our_own_goodbye(
    server_side: ssl.SSLContext, client_side: ssl.SSLContext
) -> None:
    async def test() -> None:
        async with connected(server_side, client_side) as (here, there):
            there.send(b"a" * 100)
            assert here.recv_into(bytearray(10)) == 10  # the rest is decrypted already
            there.send(b"b" * 100)
            here.shutdown(socket.SHUT_WR)
            assert await receive(there, 0) == b"" and there.recv_into(bytearray(1)) == 0
            assert await receive(here, 190) == b"a" * 90 + b"b" * 100
            there.close()
            assert here.recv_into(bytearray(1)) == 0

    trio.run(test)


def test_a_goodbye_reaches_a_peer_of_another_make(server: Pair, authority: Authority) -> None:
    async def test() -> None:
        left, right = socket.socketpair()
        left.setblocking(False)
        here = TlsSocket(left, server_context(server.certificate, server.key), server_side=True)
        heard: list[object] = []

        def other_side() -> None:
            # Without suppress_ragged_eofs an end without close_notify would raise.
            context = ssl.create_default_context(cafile=authority.path)
            context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
            with context.wrap_socket(right, server_hostname="localhost", suppress_ragged_eofs=False) as sock:
                heard.append(sock.recv(10))
                heard.append(sock.recv(10))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, other_side)
            await here.handshake()
            here.send(b"hello")
            here.close()
        assert heard == [b"hello", b""]

    trio.run(test)


def test_garbage_is_a_protocol_error_with_a_sentence_before_and_after_the_handshake(
    server_side: ssl.SSLContext, client_side: ssl.SSLContext
) -> None:
    async def test() -> None:
        for garbage in (b"\0" * 100, b"GET / HTTP/1.1\r\n\r\n", os.urandom(2000)):
            left, right = sockets()
            here = TlsSocket(left, server_side, server_side=True)
            right.send(garbage)
            with pytest.raises(TlsError) as caught, trio.fail_after(5):
                await here.handshake()
            assert caught.value.errno == errno.EPROTO and str(caught.value)[0].islower()
            right.close()
            here.close()
        async with connected(server_side, client_side) as (here, there):
            there._sock.send(b"\x17\x03\x03\x00\x20" + bytes(32))
            for _ in range(2):
                with pytest.raises(TlsError, match="damaged or forged") as caught:
                    here.recv_into(bytearray(10))
                assert caught.value.errno == errno.EPROTO
            with pytest.raises(TlsError):
                here.send(b"x")
            with pytest.raises(TlsError, match="the peer refused: bad record mac"):
                there.recv_into(bytearray(10))

    trio.run(test)


def test_a_peer_that_leaves_in_the_handshake_is_a_reset_connection(server_side: ssl.SSLContext) -> None:
    async def test() -> None:
        left, right = sockets()
        here = TlsSocket(left, server_side, server_side=True)
        right.send(b"\x16\x03\x01")
        right.close()
        with pytest.raises(ConnectionResetError, match="left during the TLS handshake"):
            await here.handshake()
        here.close()

    trio.run(test)


@VERSIONS
@pytest.mark.parametrize("pieces", range(1, 12))
def test_a_record_that_comes_in_pieces_is_received_when_the_last_one_is_there(
    authority: Authority,
    server_side: ssl.SSLContext,
    version: ssl.TLSVersion,
    pieces: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        client_side = client_context(authority.path)
        client_side.maximum_version = version
        async with connected(server_side, client_side) as (here, there):
            there.send(b"q" * 5000)
            size = len(here._sock.recv(1 << 20, socket.MSG_PEEK))
            # As where a slow network brings a piece for each call: nothing is there after the last of them.
            scratch = memoryview(bytearray(-(-size // pieces)))
            monkeypatch.setattr(tls, "_scratch", lambda: scratch)
            with trio.fail_after(2):
                assert await receive(here, 5000) == b"q" * 5000

    trio.run(test)


def test_a_peer_that_makes_us_answer_and_reads_nothing_is_cut_off(
    server_side: ssl.SSLContext, client_side: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "UNASKED_BYTES", 100)

    async def test() -> None:
        async with connected(server_side, client_side) as (here, there):
            data = bytes(4 << 20)
            with pytest.raises(BlockingIOError):
                while True:
                    here.send(data)
            there.send(b"x")
            assert here.recv_into(bytearray(1)) == 1
            # What answers to key updates would leave behind.
            here._out.write(bytes(101))
            there.send(b"x")
            with pytest.raises(TlsError, match="reads none of it"):
                here.recv_into(bytearray(1))

    trio.run(test)


@pytest.mark.parametrize("name", ["a\0b", "", ".a", "a" * 300, "\udcff"])
def test_what_cannot_be_a_hosts_name_is_einval(client_side: ssl.SSLContext, name: str) -> None:
    left, right = sockets()
    with left, right, pytest.raises(OSError, match="can't be the name in a certificate") as caught:
        TlsSocket(left, client_side, server_side=False, server_hostname=name)
    assert caught.value.errno == errno.EINVAL


def test_old_versions_of_tls_are_refused(server_side: ssl.SSLContext, authority: Authority) -> None:
    async def test() -> None:
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.load_verify_locations(authority.path)
        old.set_ciphers("ALL:@SECLEVEL=0")
        old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        with pytest.warns(DeprecationWarning):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        here, _ = await failures(server_side, old)
        assert here is not None and "older than 1.2" in str(here)
        assert client_context(authority.path).minimum_version == ssl.TLSVersion.TLSv1_2

    trio.run(test)


@VERSIONS
def test_client_certificates_are_demanded_and_verified(
    server: Pair, client: Pair, authority: Authority, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    stranger = Authority(tmp_path, "stranger")
    expired = authority.issue("expired", starts=-2 * DAY, ends=datetime.timedelta(seconds=-1))
    foreign = stranger.issue("foreign")
    a_servers = authority.issue("a-server", server=True)
    demanding = server_context(server.certificate, server.key, authority.path)
    demanding.maximum_version = version

    async def test() -> None:
        for pair, number, said in [
            (None, errno.EPROTO, "showed no certificate"),
            (expired, errno.EKEYEXPIRED, "certificate has expired"),
            (foreign, errno.EKEYREJECTED, "unable to get local issuer"),
            (a_servers, errno.EKEYREJECTED, "purpose"),
        ]:
            context = client_context(authority.path, *((pair.certificate, pair.key) if pair else ()))
            here, there = await failures(demanding, context)
            assert here is not None and here.errno == number and said in str(here), (pair, here)
            assert there is not None and there.errno in (errno.EPROTO, errno.ECONNRESET), (pair, there)
        context = client_context(authority.path, client.certificate, client.key)
        async with connected(demanding, context) as (ours, theirs):
            assert ours.peer == Identity("CN=client,O=Test", ("URI:urn:test:client",))
            assert theirs.peer == Identity("CN=server,O=Test", ("DNS:localhost", "IP:127.0.0.1", "IP:::1"))

    trio.run(test)


def test_nobody_goes_on_with_an_earlier_session_past_a_look_at_the_certificate(
    server: Pair, client: Pair, authority: Authority
) -> None:
    async def test() -> None:
        server_side = server_context(server.certificate, server.key, authority.path)
        client_side = client_context(authority.path, client.certificate, client.key)
        client_side.maximum_version = ssl.TLSVersion.TLSv1_2
        async with connected(server_side, client_side) as (_, there):
            session = there._ssl.session
        left, right = sockets()
        here = TlsSocket(left, server_side, server_side=True)
        there = TlsSocket(right, client_side, server_side=False, server_hostname="localhost")
        there._ssl.session = session
        try:
            with trio.fail_after(5):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(there.handshake)
                    with pytest.raises(TlsError, match="an earlier session, which is refused"):
                        await here.handshake()
            with pytest.raises(TlsError):
                here.recv_into(bytearray(1))
        finally:
            here.close()
            there.close()

    trio.run(test)


def test_what_openssl_remembers_of_handshakes_is_forgotten_after_some(
    server: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "CONTEXT_HANDSHAKES", 3)
    files = TlsFiles(server.certificate, server.key)
    contexts = [files.context() for _ in range(7)]
    assert [context is contexts[0] for context in contexts] == [True, True] + 5 * [False]
    assert contexts[2] is contexts[4] and contexts[5] is contexts[6] is not contexts[2]


def test_a_client_refuses_another_authority_another_name_and_an_expired_certificate(
    server: Pair, authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    old = authority.issue("old", server=True, starts=-2 * DAY, ends=datetime.timedelta(seconds=-1))
    good = server_context(server.certificate, server.key)

    async def test() -> None:
        here, there = await failures(good, client_context(stranger.path))
        assert there is not None and there.errno == errno.EKEYREJECTED
        assert here is not None and "the peer refused: unknown ca" in str(here)
        _, there = await failures(good, client_context(authority.path), "example.org")
        assert there is not None and "example.org" in str(there)
        _, there = await failures(server_context(old.certificate, old.key), client_context(authority.path))
        assert there is not None and there.errno == errno.EKEYEXPIRED
        for name in ("127.0.0.1", "::1"):
            assert await failures(good, client_context(authority.path), name) == (None, None)
        # Said explicitly, all of it is taken.
        assert await failures(good, client_context(stranger.path, verify=False), "example.org") == (None, None)
        assert await failures(good, client_context(authority.path, check_hostname=False), "else") == (None, None)

    trio.run(test)


def test_without_an_authority_the_client_has_no_identity(
    server_side: ssl.SSLContext, authority: Authority, client: Pair
) -> None:
    async def test() -> None:
        context = client_context(authority.path, client.certificate, client.key)
        async with connected(server_side, context) as (here, _):
            assert here.peer is None

    trio.run(test)


def test_a_subject_is_written_as_rfc_4514_says() -> None:
    made = {
        "subject": (
            (("countryName", "NL"),),
            (("organizationName", 'A, B; "C"'),),
            (("commonName", "#x"), ("userId", " y ")),
            (("emailAddress", "a+b"),),
        ),
    }
    identity = tls.identity_of(made)
    assert identity is not None
    assert identity.subject == r"emailAddress=a\+b,CN=\#x+UID=\ y\ ,O=A\, B\; \"C\",C=NL"
    assert tls.identity_of({}) is None


def test_a_subject_has_nothing_that_a_log_or_a_terminal_would_obey() -> None:
    made = {
        "subject": ((("commonName", "a\nERROR forged"),), (("organizationName", "\x1b[2J\0\u202eé"),)),
        "subjectAltName": (("DirName", ((("commonName", "x\n"),), (("countryName", "NL"),))),),
    }
    identity = tls.identity_of(made)
    assert identity == Identity(r"O=\1B[2J\00\E2\80\AEé,CN=a\0AERROR forged", (r"DirName:C=NL,CN=x\0A",))


# --- files ---


def test_a_file_that_cannot_be_used_is_named_with_the_reason(
    server: Pair, client: Pair, authority: Authority, tmp_path: Path
) -> None:
    nothing, garbage, loose, locked = (tmp_path / name for name in ("nothing", "garbage", "loose", "locked"))
    garbage.write_text("no PEM")
    garbage.chmod(0o600)
    loose.write_bytes(server.key.read_bytes())
    loose.chmod(0o644)
    key = serialization.load_pem_private_key(server.key.read_bytes(), None)
    encrypted = serialization.BestAvailableEncryption(b"secret")
    locked.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encrypted)  # type: ignore[union-attr]
    )
    locked.chmod(0o600)
    for certificate, private, ca, said in [
        (nothing, server.key, None, f"certificate {nothing} can't be read (No such file or directory)"),
        (server.certificate, nothing, None, f"private key {nothing} can't be read"),
        (server.certificate, server.key, nothing, f"authority's certificate {nothing} can't be read"),
        (garbage, server.key, None, f"{garbage} holds no certificate"),
        (server.certificate, garbage, None, f"{garbage} holds no private key"),
        (server.certificate, server.key, garbage, f"{garbage} holds no certificate"),
        (server.certificate, server.key, client.certificate, "could verify nobody's"),
        (server.certificate, client.key, None, f"{client.key} doesn't belong to the certificate {server.certificate}"),
        (server.certificate, loose, None, f"chmod 600 {loose}"),
        (server.certificate, locked, None, f"{locked} has a passphrase"),
    ]:
        with pytest.raises(OSError) as caught:
            server_context(certificate, private, ca)
        assert said in str(caught.value.strerror), caught.value
        assert not isinstance(caught.value, ssl.SSLError)
    with pytest.raises(OSError, match="needs a client key beside it"):
        client_context(None, client.certificate, None)


def test_a_rehearsal_tells_what_peers_will_find(server: Pair, client: Pair, authority: Authority) -> None:
    assert rehearse(server.certificate, server.key, server=True) is None
    assert rehearse(client.certificate, client.key, server=False) is None
    assert rehearse(client.certificate, client.key, server=True) is not None
    assert rehearse(server.certificate, server.key, server=False) is not None
    second = datetime.timedelta(seconds=1)
    old = authority.issue("gone", server=True, starts=-2 * DAY, ends=-second)
    assert rehearse(old.certificate, old.key, server=True) == "it has expired"
    early = authority.issue("early", starts=60 * second)
    assert rehearse(early.certificate, early.key, server=False) == "it is not valid yet"


def test_changed_files_are_read_anew_and_bad_ones_leave_the_last(
    authority: Authority, client_side: ssl.SSLContext
) -> None:
    pair = authority.issue("turns", server=True)
    files = TlsFiles(pair.certificate, pair.key)
    first = files.context()
    assert files.context() is first and not files.changed()
    other = authority.issue("turned", server=True)
    other.certificate.replace(pair.certificate)
    with pytest.raises(OSError, match="doesn't belong"):
        files.context()
    assert files.last_context is first
    other.key.replace(pair.key)
    assert files.changed()
    second = files.context()
    assert second is not first

    async def test() -> None:
        async with connected(second, client_side) as (_, there):
            assert there.peer is not None and there.peer.subject == "CN=turned,O=Test"

    trio.run(test)
