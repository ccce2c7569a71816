"""A small blocking NBD client over plain sockets, for tests: shares no code with `nbd/`, so both can't be wrong alike.

Fixed newstyle, NBD_OPT_GO, simple replies. Requests and replies are separate calls, so that a test can keep many
requests in flight, send half of one, or never read a reply.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE = 1, 2
OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_INFO, OPT_GO = 1, 2, 3, 6, 7
REP_ACK, REP_SERVER, REP_INFO = 1, 2, 3
INFO_EXPORT = 0

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST = struct.Struct(">IHHQQI")
REQUEST_MAGIC = 0x25609513
REPLY = struct.Struct(">IIQ")
REPLY_MAGIC = 0x67446698


class Refused(OSError):
    """The server answered an option with an error. `code` is the NBD_REP_ERR number."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"NBD_REP_ERR {code:#x}: {message}")
        self.code = code


@dataclass(frozen=True)
class Reply:
    cookie: int
    error: int
    data: bytes


def connect(address: Path | tuple[str, int], timeout_s: float = 20.0) -> socket.socket:
    if isinstance(address, Path):
        raw = socket.socket(socket.AF_UNIX)
        raw.settimeout(timeout_s)
        try:
            raw.connect(str(address))
        except OSError:
            raw.close()
            raise
        return raw
    return socket.create_connection(address, timeout_s)


def receive(raw: socket.socket, length: int) -> bytes:
    """Exactly `length` bytes; ConnectionError when the server closes first."""
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = raw.recv_into(view)
        if count == 0:
            raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection")
        view = view[count:]
    return bytes(data)


def greet(raw: socket.socket) -> None:
    """The handshake up to the options."""
    magic, option_magic, _flags = struct.unpack(">QQH", receive(raw, 18))
    assert (magic, option_magic) == (NBDMAGIC, IHAVEOPT)
    raw.sendall(struct.pack(">I", 3))  # FIXED_NEWSTYLE | NO_ZEROES


def option(raw: socket.socket, number: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    """Sends an option and yields its replies up to the acknowledgement."""
    raw.sendall(struct.pack(">QII", IHAVEOPT, number, len(data)) + data)
    while True:
        magic, echoed, kind, length = struct.unpack(">QIII", receive(raw, 20))
        assert (magic, echoed) == (OPTION_REPLY_MAGIC, number)
        payload = receive(raw, length)
        if kind & 1 << 31:
            raise Refused(kind & 0xFFFF, payload.decode(errors="replace"))
        if kind == REP_ACK:
            return
        yield kind, payload


class Connection:
    """One connection to one export, in transmission."""

    def __init__(self, address: Path | tuple[str, int], export: str, *, timeout_s: float = 20.0) -> None:
        self.socket = connect(address, timeout_s)
        self.size_bytes = 0
        self.flags = 0
        self._lengths: dict[int, int] = {}
        self._cookie = 0
        try:
            greet(self.socket)
            name = export.encode()
            request = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
            for kind, payload in option(self.socket, OPT_GO, request):
                if kind == REP_INFO and payload[:2] == struct.pack(">H", INFO_EXPORT):
                    self.size_bytes, self.flags = struct.unpack(">QH", payload[2:12])
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()

    def encode(self, command: int, offset: int, length: int, flags: int = 0) -> tuple[int, bytes]:
        """(cookie, header) of a new request."""
        self._cookie += 1
        self._lengths[self._cookie] = length if command == READ else 0
        return self._cookie, REQUEST.pack(REQUEST_MAGIC, flags, command, self._cookie, offset, length)

    def send(self, command: int, offset: int, length: int, data: bytes | memoryview = b"", flags: int = 0) -> int:
        """Sends one request and returns its cookie."""
        cookie, header = self.encode(command, offset, length, flags)
        self.socket.sendall(header + data)
        return cookie

    def reply(self) -> Reply:
        """The next reply, whichever request it is for."""
        magic, error, cookie = REPLY.unpack(receive(self.socket, REPLY.size))
        assert magic == REPLY_MAGIC, f"reply magic {magic:#x}"
        length = self._lengths.pop(cookie)
        return Reply(cookie, error, receive(self.socket, length) if length and not error else b"")

    def call(
        self, command: int, offset: int = 0, length: int = 0, data: bytes | memoryview = b"", flags: int = 0
    ) -> bytes:
        """One request and its reply; OSError with the server's errno."""
        cookie = self.send(command, offset, length, data, flags)
        reply = self.reply()
        assert reply.cookie == cookie
        if reply.error:
            raise OSError(reply.error, os.strerror(reply.error))
        return reply.data

    def read(self, offset: int, length: int) -> bytes:
        return self.call(READ, offset, length)

    def write(self, offset: int, data: bytes | memoryview, flags: int = 0) -> None:
        self.call(WRITE, offset, len(data), data, flags)

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        self.call(TRIM, offset, length, flags=flags)

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self.call(WRITE_ZEROES, offset, length, flags=flags)

    def flush(self) -> None:
        self.call(FLUSH)

    def disconnect(self) -> None:
        self.send(DISC, 0, 0)
        self.socket.close()
