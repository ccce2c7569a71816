"""From an address to a connection in transmission: the socket, TLS, the handshake.

What is said in the handshake is decided in ``nbd.negotiate``; here it is only sent and received, within
a time limit for all of it.
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from nbd.negotiate import Steps, Terms, Upgrade, ask_for_connection, inquire, negotiate
from nbd.tls import TlsSocket, client_context
from nbd.transport import PlainTransport, TlsTransport, Transport, open_socket
from nbd.uri import Address, TlsOptions

__all__ = ["ClientLimits", "attach", "begin", "describe", "peer_name", "take_over"]


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """What one connection may have under way, and how long it may be silent."""

    handshake_timeout_s: float = 10.0  # from the name look-up to the first request, with TLS
    inflight_requests: int = 128
    inflight_bytes: int = 64 << 20  # payload; one request alone may be longer
    dead_after_s: float | None = None
    """Over TCP: the connection ends (ETIMEDOUT) if the other host acknowledges nothing for about so long, twice as
    long at most, also while nobody asks anything. None: for requests the kernel's own limit, about 15 minutes, and two
    hours without any. A server that takes nothing in for so long is given up too (TCP_USER_TIMEOUT in tcp(7)). Who
    answers TCP and not NBD isn't noticed: that takes a deadline of the caller's."""


async def attach(address: Address, export: str, *, limits: ClientLimits | None = None) -> tuple[socket.socket, Terms]:
    """A non-blocking socket that is in transmission, with simple replies, for who speaks the rest itself.

    The socket is the caller's, who closes it. No TLS. Raises OSError with a sentence, as ``connect`` does.
    """
    limits = limits or ClientLimits()
    transport, terms = await begin(address, export, partial(negotiate, export, (), structured=False), limits)
    assert isinstance(transport, PlainTransport)
    return transport.sock, terms


async def describe(address: Address, export: str, *, timeout_s: float = 10.0) -> Terms:
    """Size and flags of ``export`` now, without opening it. No TLS. Raises as ``connect``."""
    transport, terms = await begin(
        address, export, partial(inquire, export), ClientLimits(handshake_timeout_s=timeout_s)
    )
    transport.close()
    return terms


async def take_over(
    address: Address,
    option: int,
    data: bytes,
    *,
    limits: ClientLimits | None = None,
    tls: TlsOptions | ssl.SSLContext | None = None,
) -> tuple[socket.socket | TlsSocket, bytes]:
    """A connection that is no longer NBD (``nbd.takeover``), and what has already been received of what it is now.

    ``data``, up to 4 KiB, says to the server what is wanted. With ``tls`` the option is only sent over TLS. The socket
    is non-blocking, and the caller's, who closes it. Raises OSError with the server's sentence: EACCES if it refuses,
    ENOTSUP if it doesn't know the option; else as ``connect`` does.
    """
    steps = partial(ask_for_connection, option, data, tls=tls is not None)
    transport, _ = await begin(address, None, steps, limits or ClientLimits(), tls)
    assert isinstance(transport, PlainTransport | TlsTransport)
    return transport.sock, b""  # no byte behind the answer has been asked for


def peer_name(address: Address, export: str | None) -> str:
    """For sentences. ``export``: None where it isn't about one, empty for the default one, which no name is said of."""
    host = str(address) if isinstance(address, Path) else f"{address[0]}:{address[1]}"
    if not export:
        return host
    return f"{host}, export {export}" if isinstance(address, Path) else f"{host}/{export}"


async def begin(
    address: Address,
    export: str | None,
    steps: Callable[[], Steps],
    limits: ClientLimits,
    tls: TlsOptions | ssl.SSLContext | None = None,
) -> tuple[Transport, Terms]:
    """A transport on which ``steps`` were taken. Errors begin with the peer's name."""
    peer = peer_name(address, export)
    with trio.move_on_after(limits.handshake_timeout_s):
        try:
            context = None if tls is None else await _context(tls, address)
            sock = await open_socket(address, dead_after_s=limits.dead_after_s)
            try:
                return await _shake_hands(sock, steps(), context, _host_name(tls, address))
            except BaseException:
                sock.close()
                raise
        except OSError as error:
            number = errno.ECONNRESET if error.errno == errno.EPIPE else error.errno or errno.EINVAL
            raise OSError(number, f"{peer}: {error.strerror or error}") from None
    raise OSError(errno.ETIMEDOUT, f"{peer}: no connection within {limits.handshake_timeout_s:g} s")


async def _context(tls: TlsOptions | ssl.SSLContext, address: Address) -> ssl.SSLContext:
    if isinstance(tls, TlsOptions):
        # Of a file system that hangs only this connection shall know.
        return await trio.to_thread.run_sync(_load, tls, address, abandon_on_cancel=True)
    if tls.minimum_version not in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        raise OSError(errno.EINVAL, "an SSLContext that allows TLS older than 1.2: set its minimum_version")
    return tls


def _load(tls: TlsOptions, address: Address) -> ssl.SSLContext:
    ca = certificate = key = None
    directory = tls.certificates
    if directory is not None:
        if not directory.is_dir():
            raise OSError(errno.ENOENT, f"tls-certificates: {directory} is no directory that can be read")
        ca = directory / "ca-cert.pem" if tls.verify else None
        certificate = _if_there(directory / "client-cert.pem")
        key = _if_there(directory / "client-key.pem")
    named = _host_name(tls, address) is not None
    return client_context(ca, certificate, key, verify=tls.verify, check_hostname=named)


def _if_there(path: Path) -> Path | None:
    return path if path.exists() else None


def _host_name(tls: TlsOptions | ssl.SSLContext | None, address: Address) -> str | None:
    if isinstance(tls, TlsOptions) and tls.hostname is not None:
        return tls.hostname
    return None if isinstance(address, Path) else address[0]


async def _shake_hands(
    sock: socket.socket, steps: Steps, context: ssl.SSLContext | None, host: str | None
) -> tuple[Transport, Terms]:
    transport: Transport = PlainTransport(sock)
    answer: bytes | None = None
    unproven = False  # whether the server likes our certificate it tells behind the handshake of TLS 1.3
    while True:
        try:
            step = next(steps) if answer is None else steps.send(answer)
        except StopIteration as end:
            assert isinstance(end.value, Terms)
            return transport, end.value
        answer = b""
        if isinstance(step, Upgrade):
            assert context is not None
            over = TlsSocket(sock, context, server_side=False, server_hostname=host)
            await over.handshake()
            transport, unproven = TlsTransport(over), True
            continue
        try:
            if isinstance(step, int):
                answer = await _receive_exactly(transport, step)
                unproven = False
            else:
                await _send_all(transport, step)
        except (ConnectionResetError, BrokenPipeError) as error:
            if not unproven:
                raise
            raise OSError(
                error.errno, "the server left right behind the TLS handshake: does it accept the client's certificate?"
            ) from None


async def _send_all(transport: Transport, data: bytes) -> None:
    try:
        await transport.send([memoryview(data)])
    except (ConnectionResetError, BrokenPipeError):
        await _receive_exactly(transport, 1)  # it may have said why, which raises
        raise


async def _receive_exactly(transport: Transport, length: int) -> bytes:
    data = bytearray(length)
    left = memoryview(data)
    while left:
        count = await transport.receive(memoryview(b""), left)
        if not count:
            raise OSError(errno.ECONNRESET, "the server closed the connection during the handshake")
        left = left[count:]
    return bytes(data)
