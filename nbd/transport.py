"""The bytes of a client's connection: the socket, and sending and receiving on it, with TLS or without.

A ``Transport`` has one task that sends and one that receives. Both try the call first and wait only if it
would block. What has begun is ended: a ``send`` that is cancelled has sent a part, and nothing may follow it.
"""

from __future__ import annotations

import errno
import math
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import trio

from nbd.tls import SEND_BYTES, TlsSocket
from nbd.uri import Address

__all__ = ["PlainTransport", "TlsTransport", "Transport", "open_socket", "prepare"]

SEND_BUFFER_BYTES: Final = 1 << 20
"""Of Unix sockets: a WRITE of 1 MiB, or the reply to a READ, should leave in one call. 1 MiB reads at queue depth 4:
1.9 GB/s with 104 KiB, 2.2-2.6 from 256 KiB up (fio --ioengine=nbd --rw=read --bs=1m --iodepth=4)."""


class Transport(Protocol):
    """See above. Errors are OSError."""

    async def send(self, buffers: list[memoryview]) -> None:
        """Send all of them, in their order."""

    async def receive(self, sink: memoryview, inbox: memoryview) -> int:
        """Receive at least one byte, into ``sink`` as far as it goes, then into ``inbox``; 0 is the end."""

    def send_now(self, data: bytes) -> None:
        """A last message, if that takes no waiting and no ``send`` is under way."""

    def shutdown(self) -> None:
        """End both directions; whoever waits here wakes up. Synchronous."""

    def close(self) -> None:
        """Synchronous; a second call does nothing."""


class _Ending:
    """What both kinds have in common: their socket, and the end of it."""

    sock: socket.socket | TlsSocket

    def send_now(self, data: bytes) -> None:
        with suppress(OSError):
            self.sock.send(data)

    def shutdown(self) -> None:
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.sock.close()


class PlainTransport(_Ending):
    """Over the non-blocking socket itself, which is its own from now on."""

    sock: socket.socket

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    async def send(self, buffers: list[memoryview]) -> None:
        sock = self.sock
        first = 0
        while first < len(buffers):
            try:
                sent = sock.sendmsg(buffers[first:] if first else buffers)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(sock)
                continue
            while first < len(buffers) and sent >= len(buffers[first]):
                sent -= len(buffers[first])
                first += 1
            if sent:
                buffers[first] = buffers[first][sent:]

    async def receive(self, sink: memoryview, inbox: memoryview) -> int:
        buffers = [sink, inbox] if sink else [inbox]
        while True:
            try:
                return self.sock.recvmsg_into(buffers)[0]
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.sock)


class TlsTransport(_Ending):
    """Over TLS, whose handshake is done. Small buffers are put together, for each call makes records of its own."""

    sock: TlsSocket

    def __init__(self, sock: TlsSocket) -> None:
        self.sock = sock

    async def send(self, buffers: list[memoryview]) -> None:
        for block in _blocks(buffers):
            left = memoryview(block)
            while left:
                try:
                    sent = self.sock.send(left)
                except BlockingIOError:
                    # The same bytes again, then: they are encrypted already.
                    await trio.lowlevel.wait_writable(self.sock.fileno())
                    continue
                left = left[sent:]

    async def receive(self, sink: memoryview, inbox: memoryview) -> int:
        target = sink or inbox
        while True:
            try:
                return self.sock.recv_into(target)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.sock.fileno())


def _blocks(buffers: list[memoryview]) -> list[bytes | memoryview]:
    """The same bytes in pieces of ``SEND_BYTES``, small neighbours joined."""
    blocks: list[bytes | memoryview] = []
    small: list[memoryview] = []
    size = 0
    for buffer in buffers:
        if size + len(buffer) > SEND_BYTES and small:
            blocks.append(b"".join(small))
            small, size = [], 0
        if len(buffer) > SEND_BYTES:
            blocks.append(buffer)
        else:
            small.append(buffer)
            size += len(buffer)
    if small:
        blocks.append(b"".join(small))
    return blocks


async def open_socket(address: Address, *, dead_after_s: float | None = None) -> socket.socket:
    """A connected, prepared socket; of a host's addresses the first that answers.

    ``dead_after_s``: over TCP the kernel ends the connection (ETIMEDOUT) if the other side acknowledges nothing for
    about so long: at once where something waits to be sent, else after a probe that it sends by itself; seconds are
    rounded up, and it may take twice as long. It also ends it if the other side takes nothing in for so long
    (``TCP_USER_TIMEOUT`` in tcp(7)), so let it be longer than a server may be busy.
    """
    if isinstance(address, Path):
        return await _open_one(socket.AF_UNIX, str(address), None)
    host, port = address
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        why = error.strerror if isinstance(error, socket.gaierror) else error
        raise OSError(errno.EHOSTUNREACH, f"can't find the host {host}: {why}") from None
    failed = OSError(errno.EHOSTUNREACH, f"the host {host} has no address")
    for family, _, _, _, target in found:
        try:
            return await _open_one(family, target, dead_after_s)
        except OSError as error:
            failed = error
    raise failed


async def _open_one(family: int, target: object, dead_after_s: float | None) -> socket.socket:
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        await _connect(sock, target)
        own = socket.socket(sock.family, sock.type, sock.proto, fileno=sock.detach())
    except BaseException:
        sock.close()
        raise
    try:
        prepare(own)
        if family != socket.AF_UNIX and dead_after_s is not None:
            _watch(own, dead_after_s)
    except BaseException:
        own.close()
        raise
    return own


async def _connect(sock: trio.socket.SocketType, target: object) -> None:
    """trio's own sentence names the address once more, as Python writes it; whoever hears of it knows which it was."""
    try:
        await sock.connect(target)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno)) from None


def prepare(sock: socket.socket) -> None:
    """Make a connected stream socket what the data path wants."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _watch(sock: socket.socket, dead_after_s: float) -> None:
    # The user timeout rules both what is sent again and the probes; their own count doesn't matter beside it.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(dead_after_s * 1000))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, math.ceil(dead_after_s / 2))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, math.ceil(dead_after_s / 4))
