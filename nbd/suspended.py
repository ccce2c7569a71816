"""Connections that have stopped between two requests, and how they are written down for who goes on with them.

A server that is replaced stops each connection (`Connection.suspend`), and its successor, or itself if there is none
after all, goes on from what is told here. Nothing is lost on the way and nothing is done twice that was answered:

`output`  replies, or the end of one, that the client has not taken yet; sent before any other
`input`   bytes from the client that are not handled yet: the beginning of a request, at most a batch of them
`work`    requests that were waiting for the storage and have no reply yet. They are carried out anew: until a request
          is answered it may have happened, or not, or in part, so doing it again is among what its client expects
`writing`, `reading`   the one WRITE or READ that the connection was in the middle of, and how far it was

The sockets themselves travel beside it, as descriptors; `cookie` says which is whose.

Written down it is, all numbers big-endian:

  offset size type field
       0    8      MAGIC
       8    4 u32  version (VERSION); another one is refused, never guessed at
      12    4 u32  length of the JSON text
      16      JSON text in UTF-8: {"connections": [...]}, see `_record`
              then the bytes values, one after the other. In the text each is {"bytes": [position, length]}, counted
              from the end of the text

It passes between two processes in memory and is never stored, so it has no checksum.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from mmap import PROT_READ, mmap
from struct import Struct
from typing import Any, Final, cast

from nbd.counters import Counters
from nbd.transmission import Session

MAGIC: Final = b"TERRNBDH"
VERSION: Final = 1
HEADER: Final = Struct(">8sII")
assert HEADER.size == 16
SO_COOKIE: Final = 57
"""socket(7) in the kernel's headers; Python's socket module lacks it."""

Value = int | str | bytes | Sequence["Value"]


@dataclass(frozen=True, slots=True)
class Work:
    """A request that has no reply yet: what kind of task carries it out, and the task's arguments."""

    kind: str
    arguments: tuple[Value, ...]
    requests: int = 1
    length: int = 0
    """What it takes of the connection's bounds."""


class Kept:
    """Around what carries a request out: should that be cut short, the request is kept for who goes on here."""

    __slots__ = ("_unfinished", "work")

    def __init__(self, unfinished: list[Work], work: Work) -> None:
        self._unfinished = unfinished
        self.work = work
        """May be replaced as it goes on, by what is left."""

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # Cancelled, alone or in a group with others of its kind; an error of the storage becomes a reply.
        if kind is not None and not issubclass(kind, Exception):
            self._unfinished.append(self.work)


@dataclass(slots=True)
class LongWrite:
    """A WRITE whose payload is taken in pieces: what is left of it. Or a payload of any request that failed already."""

    cookie: int
    flags: int
    offset: int
    """Where the next byte goes."""
    left: int
    error: int
    length: int
    """Of the whole."""

    @property
    def asked(self) -> int:
        """The offset of the request."""
        return self.offset - (self.length - self.left)


@dataclass(slots=True)
class LongRead:
    """A READ that is answered in chunks, the first `done` bytes of which have been."""

    cookie: int
    offset: int
    length: int
    done: int


@dataclass(slots=True)
class Suspended:
    """One connection; it owns the socket."""

    sock: socket.socket
    peer: str
    export: str
    identity: str
    """Of the export; it must be the same when the connection goes on (`nbd.export.Exports.identity`)."""
    session: Session
    counters: Counters = field(default_factory=Counters)
    input: bytes = b""
    output: bytes = b""
    work: tuple[Work, ...] = ()
    writing: LongWrite | None = None
    reading: LongRead | None = None

    @property
    def cookie(self) -> int:
        return socket_cookie(self.sock)

    def close(self) -> None:
        self.sock.close()


class FormatError(ValueError):
    """Not what a predecessor of this version writes; the message is a sentence."""


def socket_cookie(sock: socket.socket) -> int:
    """The kernel's number for a socket, the same in each process that has it and never given twice."""
    (number,) = struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
    return int(number)


def encode(connections: Iterable[Suspended]) -> list[bytes]:
    """What `decode` takes, without the sockets, in pieces: clients that don't read may have left gigabytes."""
    blobs: list[bytes] = []
    position = 0

    def plain(value: Any) -> Any:
        nonlocal position
        if isinstance(value, bytes | bytearray | memoryview):
            raw = bytes(value)
            blobs.append(raw)
            place = {"bytes": [position, len(raw)]}
            position += len(raw)
            return place
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        return value

    text = json.dumps({"connections": [plain(_record(one)) for one in connections]}).encode()
    return [HEADER.pack(MAGIC, VERSION, len(text)), text, *blobs]


def _record(one: Suspended) -> dict[str, Any]:
    return {
        "socket": one.cookie,
        "peer": one.peer,
        "export": one.export,
        "identity": one.identity,
        "session": asdict(one.session),
        "counters": asdict(one.counters),
        "input": one.input,
        "output": one.output,
        # Not asdict: it copies what it finds, and a WRITE's payload may be a memoryview, which nothing copies.
        "work": [
            {"kind": work.kind, "arguments": work.arguments, "requests": work.requests, "length": work.length}
            for work in one.work
        ],
        "writing": asdict(one.writing) if one.writing else None,
        "reading": asdict(one.reading) if one.reading else None,
    }


def write(connections: Iterable[Suspended]) -> int:
    """What `encode` makes in a new memory file, whose descriptor is the caller's. Raises OSError: no memory for it."""
    descriptor = os.memfd_create("terrace-clients", os.MFD_CLOEXEC)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.writelines(encode(connections))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read(descriptor: int, sockets: Iterable[socket.socket]) -> list[Suspended]:
    """`decode` of a memory file, which is not copied for it."""
    if not os.fstat(descriptor).st_size:
        return decode(b"", sockets)
    with mmap(descriptor, 0, prot=PROT_READ) as raw:
        return decode(raw, sockets)


def decode(raw: bytes | mmap, sockets: Iterable[socket.socket]) -> list[Suspended]:
    """The connections of those `sockets` that are named in `raw`; the others of both are left out.

    Raises FormatError.
    """
    if len(raw) < HEADER.size:
        raise FormatError(f"{len(raw)} bytes are no list of connections")
    magic, version, length = HEADER.unpack_from(raw)
    if magic != MAGIC:
        raise FormatError("it is no list of connections")
    if version != VERSION:
        raise FormatError(f"the connections are written down in version {version}, and this is version {VERSION}")
    begin = HEADER.size + length

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {"bytes"}:
                start, size = value["bytes"]
                if not 0 <= start <= start + size <= len(raw) - begin:
                    raise FormatError("bytes of a connection are missing")
                return raw[begin + start : begin + start + size]
            return {key: filled(part) for key, part in value.items()}
        return [filled(part) for part in value] if isinstance(value, list) else value

    by_cookie = {socket_cookie(sock): sock for sock in sockets}
    try:
        records = [filled(record) for record in json.loads(raw[HEADER.size : begin])["connections"]]
        return [_connection(record, by_cookie[record["socket"]]) for record in records if record["socket"] in by_cookie]
    except FormatError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"a connection can't be understood: {error!r}") from None


def _connection(record: dict[str, Any], sock: socket.socket) -> Suspended:
    session = record["session"]
    session["contexts"] = tuple((int(number), str(name)) for number, name in session["contexts"])
    return Suspended(
        sock=sock,
        peer=record["peer"],
        export=record["export"],
        identity=record["identity"],
        session=Session(**session),
        counters=Counters(**record["counters"]),
        input=record["input"],
        output=record["output"],
        work=tuple(
            Work(work["kind"], _frozen(work["arguments"]), work["requests"], work["length"]) for work in record["work"]
        ),
        writing=LongWrite(**record["writing"]) if record["writing"] else None,
        reading=LongRead(**record["reading"]) if record["reading"] else None,
    )


def _frozen(value: Sequence[Any]) -> tuple[Value, ...]:
    return tuple(_frozen(part) if isinstance(part, list) else cast("Value", part) for part in value)
