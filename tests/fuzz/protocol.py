"""Fuzz targets of the NBD protocol: the handshake machine, the judge of requests, a whole connection, and the two
parts of the client that judge a server.

The connection is held against a model of the requests that are well-formed and stand before the first garbage: it must
change nothing but what these ask for, answer each of them once, and end.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import trio
import trio.testing

from nbd import wire
from nbd.connection import Connection
from nbd.export import Client
from nbd.handshake import (
    MAX_OPTION_BYTES,
    MAX_SELECTED_CONTEXTS,
    MAX_TAKEOVER_BYTES,
    NEED_DATA,
    Handshake,
    Hangup,
    Send,
    WantExport,
    WantList,
    WantTakeover,
)
from nbd.negotiate import MAX_REPLY_BYTES, negotiate
from nbd.replies import Pending, Replies
from nbd.transmission import Session, block_status, failure, judge, read_header
from nbd.workshop import ARENA_BYTES, INBOX_BYTES, Limits, Workshop
from tests.fuzz.engine import Target
from tests.nbd.client import extended_bytes, filter_bytes, info_bytes, meta_bytes, option_bytes, request_bytes
from tests.nbd.memory import GRAIN, ContextExport, MemoryExport, MemoryExports, SparseExport

SIZE = 320 << 10  # room for a READ that is answered in chunks
NOTHING = slice(96 << 10, 288 << 10)  # zeroes, long enough to be told as a hole
CONTEXT = "terrace:diff:a"
FLAGS = struct.pack(">I", 3)
HELLO = (
    FLAGS
    + option_bytes(wire.OPT_STRUCTURED_REPLY)
    + option_bytes(wire.OPT_SET_META_CONTEXT, meta_bytes("mem", "base:allocation", CONTEXT))
    + option_bytes(wire.OPT_GO, info_bytes("mem"))
)
EXTENDED_HELLO = HELLO.replace(option_bytes(wire.OPT_STRUCTURED_REPLY), option_bytes(wire.OPT_EXTENDED_HEADERS))
PLAIN_HELLO = FLAGS + option_bytes(wire.OPT_EXPORT_NAME, b"mem")
_REPLY_MAGIC = struct.pack(">Q", wire.REP_MAGIC)
REFUSALS = (errno.ENOENT, errno.EACCES, errno.ESHUTDOWN, errno.EIO)


# -- the handshake -----------------------------------------------------------------------------------------------------

_CONTEXTS = {
    name: [0] for name in [*(f"terrace:diff:{name}" for name in "abcdefghijklmnopqrstuvwxyz"), "x:" + "y" * 4090]
}
_OFFERED = [
    ContextExport(
        size_bytes=SIZE, read_only=bool(flags & 1), minimum_block_size=4096 if flags & 2 else 1, flags=_CONTEXTS
    )
    for flags in range(4)
]


def run_handshake(data: bytes) -> None:
    """Any bytes in any pieces. Input: flags, a seed for the pieces, what the client sends."""
    flags, seed, rest = (data[0], data[1], data[2:]) if len(data) > 1 else (0, 0, b"")
    export = _OFFERED[flags & 3]
    machine = Handshake(takeovers=() if flags & 32 else (wire.OPT_TERRACE,))
    machine.shutting_down = bool(flags & 4)
    pieces = _pieces(rest, seed)
    out = bytearray()
    fed = 0
    for _ in range(len(rest) + 100):
        event = machine.next_event()
        if event is NEED_DATA:
            piece = next(pieces, b"")
            if not piece:
                break
            machine.feed(piece)
            fed += len(piece)
        elif isinstance(event, Send):
            out += event.data
        elif isinstance(event, WantList):
            out += machine.listed([("mem", "bytes"), ("x" * 5000, "\0")])
        elif isinstance(event, WantExport):
            assert len(event.name.encode()) <= wire.MAX_STRING_BYTES and "\0" not in event.name
            if event.name in ("", "mem"):
                out += machine.described(export)
                assert machine.begun == event.enters
            else:
                number = REFUSALS[flags >> 3 & 3]
                answer = machine.refused(OSError(number, os.strerror(number)))
                out += answer
                if not answer:
                    break
            if machine.begun:
                assert rest[:fed].endswith(machine.leftover())
                break
        elif isinstance(event, WantTakeover):
            assert event.option == wire.OPT_TERRACE and len(event.data) <= MAX_TAKEOVER_BYTES
            assert not flags & 36, "nobody is there for it, or it is too late"
            if event.data.startswith(b"{"):
                out += machine.given_away()
                assert rest[:fed].endswith(option_bytes(wire.OPT_TERRACE, event.data) + machine.leftover())
                break
            out += machine.declined("no: " + "\0é" * 5000)
        else:
            assert isinstance(event, Hangup) and event.reason
            out += event.farewell
            break
        assert len(machine._buffer) <= MAX_OPTION_BYTES + 16 + 16384, "it holds more than an option"
    else:
        raise AssertionError("the handshake makes no progress")
    _judge_handshake(bytes(out), begun=machine.begun)
    assert machine.session.structured or not machine.session.extended
    selected = machine.session.contexts
    assert len(selected) == len(dict(selected)) == len({name for _, name in selected}) <= MAX_SELECTED_CONTEXTS
    assert all(name in export.flags or name == wire.META_ALLOCATION for _, name in selected)


def _pieces(data: bytes, seed: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    at = 0
    while at < len(data):
        size = len(data) if seed == 0 else rng.choice((1, 3, 16, 100, 16384))
        yield data[at : at + size]
        at += size


def _judge_handshake(out: bytes, *, begun: bool) -> int:
    """Whether the server's bytes are a greeting and sound option replies; returns where they end."""
    assert out[:16] == b"NBDMAGICIHAVEOPT"
    at = 18
    while out[at : at + 8] == _REPLY_MAGIC:
        _, _, kind, length = wire.OPTION_REPLY.unpack_from(out, at)
        assert kind >> 31 or kind in (wire.REP_ACK, wire.REP_SERVER, wire.REP_INFO, wire.REP_META_CONTEXT)
        at += wire.OPTION_REPLY.size + length
        assert at <= len(out)
    if at != len(out):  # EXPORT_NAME is answered without a frame
        assert begun and len(out) - at in (10, 134)
    return at


def _handshake_seeds() -> list[bytes]:
    name = info_bytes("mem", wire.INFO_NAME, wire.INFO_DESCRIPTION, wire.INFO_BLOCK_SIZE)
    streams = [
        HELLO,
        PLAIN_HELLO,
        FLAGS + option_bytes(wire.OPT_LIST) + option_bytes(wire.OPT_ABORT),
        FLAGS + option_bytes(wire.OPT_INFO, name) + option_bytes(wire.OPT_GO, info_bytes("no")),
        FLAGS
        + option_bytes(wire.OPT_STARTTLS)
        + option_bytes(99, bytes(100))
        + option_bytes(wire.OPT_EXTENDED_HEADERS),
        FLAGS + option_bytes(wire.OPT_STRUCTURED_REPLY) + option_bytes(wire.OPT_LIST_META_CONTEXT, meta_bytes("mem")),
        FLAGS
        + option_bytes(wire.OPT_STRUCTURED_REPLY)
        + option_bytes(wire.OPT_LIST_META_CONTEXT, meta_bytes("mem", "terrace:", "terrace:diff:", "base:"))
        + option_bytes(
            wire.OPT_SET_META_CONTEXT, meta_bytes("mem", *(f"terrace:diff:{name}" for name in "abcdefghijklmnopq"))
        )
        + HELLO[4:],
        EXTENDED_HELLO,
        FLAGS + option_bytes(wire.OPT_EXTENDED_HEADERS) + HELLO[4:],
        FLAGS + option_bytes(wire.OPT_EXTENDED_HEADERS) + PLAIN_HELLO[4:],
        FLAGS + option_bytes(wire.OPT_EXTENDED_HEADERS, b"x") + option_bytes(wire.OPT_INFO, name),
        FLAGS + option_bytes(wire.OPT_LIST, b"x") + option_bytes(wire.OPT_EXPORT_NAME, b"no"),
        FLAGS + struct.pack(">QII", wire.IHAVEOPT, wire.OPT_GO, 70000) + bytes(70000 - 65536),
        struct.pack(">I", 0) + option_bytes(wire.OPT_EXPORT_NAME, b""),
        struct.pack(">I", 4),
        FLAGS + option_bytes(wire.OPT_TERRACE, b"no") + option_bytes(wire.OPT_TERRACE, b'{"version": 1}') + b"behind",
        FLAGS + option_bytes(wire.OPT_TERRACE, b"{" * 4097) + HELLO[4:],
    ]
    return [bytes([flags, seed]) + stream for stream in streams for flags, seed in ((0, 0), (7, 3), (24, 0), (32, 3))]


# -- one request -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Terms:
    """What the handshake settled, and what the export allows."""

    form: str
    """simple, structured or extended."""
    contexts: tuple[int, ...]
    read_only: bool
    minimum: int


def is_legal(terms: Terms, command: int, flags: int, offset: int, length: int) -> bool:
    """Whether a request may be carried out: the protocol's rules, written down a second time.

    But for the payload of a BLOCK_STATUS: here it has none.
    """
    known = {
        wire.CMD_READ: 0 if terms.form == "simple" else wire.CMD_FLAG_DF,
        wire.CMD_WRITE: 0,
        wire.CMD_FLUSH: 0,
        wire.CMD_TRIM: 0,
        wire.CMD_CACHE: 0,
        wire.CMD_WRITE_ZEROES: wire.CMD_FLAG_NO_HOLE | wire.CMD_FLAG_FAST_ZERO,
    }
    if terms.contexts:
        known[wire.CMD_BLOCK_STATUS] = wire.CMD_FLAG_REQ_ONE
    if command == wire.CMD_WRITE and terms.form == "extended":
        if not flags & 32:
            return False
        flags &= ~32
    if command not in known or flags & ~(known[command] | wire.CMD_FLAG_FUA):
        return False
    if command == wire.CMD_FLUSH:
        return offset == 0 and length == 0
    if terms.read_only and command in (wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES):
        return False
    if offset + length > SIZE or offset % terms.minimum or length % terms.minimum:
        return False
    return command != wire.CMD_BLOCK_STATUS or length > 0


FORMS = ("simple", "structured", "extended")
MAGICS = {"simple": 0x67446698, "structured": 0x668E33EF, "extended": 0x6E8A278C}


def run_request(data: bytes) -> None:
    """Headers of requests, one after the other; the first byte says what was negotiated."""
    flags = data[0] if data else 0
    form = "extended" if flags & 32 else "structured" if flags & 1 else "simple"
    known = ((1, wire.META_ALLOCATION), (2, CONTEXT))[: 2 if flags & 16 else 1]
    contexts = known if flags & 2 and form != "simple" else ()
    terms = Terms(form, tuple(one for one, _ in contexts), bool(flags & 4), 4096 if flags & 8 else 1)
    session = Session(form != "simple", contexts, form == "extended")
    export = _JUDGED[terms.read_only, terms.minimum]
    layout = wire.EXTENDED_REQUEST if form == "extended" else wire.REQUEST
    for at in range(1, len(data) - layout.size + 1, layout.size):
        head, cookie, offset, length = layout.unpack_from(data, at)
        command, bits = head & 0xFFFF, head >> 16 & 0xFFFF
        verdict = judge(session, export, command, bits, offset, length)
        assert (verdict == 0) == is_legal(terms, command, bits, offset, length), (verdict, command, bits)
        assert verdict in (0, wire.EPERM, wire.EINVAL, wire.ENOSPC, wire.EOVERFLOW)
        if verdict:
            reply = failure(session, cookie, offset, verdict, str(head))
        elif command == wire.CMD_BLOCK_STATUS:
            only = bool(bits & wire.CMD_FLAG_REQ_ONE)
            statuses = [(one, [(length // 2 + 1, 3), (1 << 40, 0)]) for one in terms.contexts]
            reply = block_status(session, cookie, offset, statuses, length=length, only_one=only)
        else:
            reply = read_header(session, cookie, offset, length)
        assert int.from_bytes(reply[:4]) == MAGICS[form]
        assert reply[8:16] == cookie.to_bytes(8)
        assert form != "extended" or reply[16:24] == offset.to_bytes(8)


_JUDGED = {
    (read_only, minimum): MemoryExport(size_bytes=SIZE, read_only=read_only, minimum_block_size=minimum)
    for read_only in (False, True)
    for minimum in (1, 4096)
}


# -- a connection ------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """A request of the stream. `complete`: all of its payload is there. `wanted`: contexts, of a BLOCK_STATUS."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: bytes
    complete: bool
    legal: bool
    wanted: tuple[int, ...] = ()


def parse(stream: bytes, terms: Terms) -> list[Request]:
    """The requests up to DISC, garbage or the end, as the protocol text has them."""
    found: list[Request] = []
    at = 0
    extended = terms.form == "extended"
    size = 32 if extended else 28
    while len(stream) - at >= size:
        magic, flags, command, cookie, offset, length = struct.unpack_from(
            ">IHHQQQ" if extended else ">IHHQQI", stream, at
        )
        if magic != (0x21E41C71 if extended else 0x25609513) or command == wire.CMD_DISC:
            break
        at += size
        has_payload = bool(flags & 32) if extended else command == wire.CMD_WRITE
        if extended and has_payload and length > 32 << 20:
            break
        payload = stream[at : at + length] if has_payload else b""
        complete = not has_payload or len(payload) == length
        wanted = terms.contexts
        if extended and has_payload and command == wire.CMD_BLOCK_STATUS:
            legal = False
            if complete and length >= 12 and length % 4 == 0:
                effect, *ids = struct.unpack(f">Q{(length - 8) // 4}I", payload)
                wanted = tuple(ids)
                legal = len(set(ids)) == len(ids) and set(ids) <= set(terms.contexts)
                legal = legal and is_legal(terms, command, flags & ~32, offset, effect)
        else:
            legal = is_legal(terms, command, flags, offset, length)
        found.append(Request(command, flags, cookie, offset, length, payload, complete, legal, wanted))
        at += len(payload)
        if not complete:
            break
    return found


INITIAL = np.resize(np.arange(1, 252, dtype=np.uint8), SIZE)
INITIAL[NOTHING] = 0


def run_connection(data: bytes) -> None:
    """A server's connection over a socket pair. Input: flags, a seed for the pieces, the stream behind a handshake."""
    trio.run(_judge_connection, data, Workshop())


def run_connections(inputs: Iterable[bytes]) -> None:
    """The same of many, one after the other, in one loop and with one workshop, as a server has them."""

    async def main() -> None:
        workshop = Workshop()
        for data in inputs:
            await _judge_connection(data, workshop)
            assert workshop.last_active is None and not workshop.fence._groups

    trio.run(main)


async def _judge_connection(data: bytes, workshop: Workshop) -> None:
    flags, seed, stream = (data[0], data[1], data[2:]) if len(data) > 1 else (0, 0, b"")
    form = "extended" if flags & 64 else "structured" if flags & 1 else "simple"
    terms = Terms(form, () if form == "simple" else (1, 2), bool(flags & 2), 512 if flags & 4 else 1)
    export = SparseExport(
        size_bytes=SIZE, read_only=terms.read_only, minimum_block_size=terms.minimum, slow=bool(flags & 8)
    )
    export.unknown = bool(flags & 128)
    export.flags = {CONTEXT: [0, 1] * (SIZE // GRAIN // 2)}
    export.data[:] = INITIAL.data
    raw = bool(flags & 16)  # no handshake of ours: the input is all that the client says
    hello = b"" if raw else {"simple": PLAIN_HELLO, "structured": HELLO, "extended": EXTENDED_HELLO}[form]
    out = await _converse(export, hello, stream, seed, bool(flags & 32), workshop)
    if raw:
        return
    requests = parse(stream, terms)
    rude = bool(flags & 32)
    _judge_content(INITIAL, np.frombuffer(export.data, dtype=np.uint8), requests, all_arrived=not rude)
    if not rude:
        end = _end_of_handshake(out, terms)
        assert _judge_handshake(out[:end], begun=True) == (end - 10 if form == "simple" else end)
        _judge_replies(out[end:], terms, requests, INITIAL)


def _end_of_handshake(out: bytes, terms: Terms) -> int:
    at = 18
    while out[at : at + 8] == _REPLY_MAGIC:
        at += wire.OPTION_REPLY.size + wire.OPTION_REPLY.unpack_from(out, at)[3]
    return at + 10 if terms.form == "simple" else at


async def _converse(
    export: MemoryExport, hello: bytes, stream: bytes, seed: int, rude: bool, workshop: Workshop
) -> bytes:
    """Say it all, in pieces; return what the server said. `rude`: vanish without reading on."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    exports = MemoryExports(export)
    connection = Connection(theirs, Client("fuzz"), exports, Limits(handshake_timeout_s=5, linger_s=5), workshop)
    client = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    out = bytearray()

    async def listen() -> None:
        try:
            async for part in client:
                out.extend(part)
        except trio.BrokenResourceError:
            pass

    with trio.fail_after(15):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            if not rude:
                nursery.start_soon(listen)
            try:
                if hello:
                    await client.send_all(hello)
                for piece in _pieces(stream, seed):
                    await client.send_all(piece)
                    if seed % 3 == 1:
                        await trio.testing.wait_all_tasks_blocked()
                if rude:
                    await client.aclose()
                else:
                    await client.send_eof()
            except trio.BrokenResourceError:
                pass
    await client.aclose()
    assert exports.open == 0 and export.running == 0, "the export is still in use"
    assert connection._inflight == connection._inflight_bytes == 0 and (rude or not connection._outbox.unsent())
    assert sum(len(bench.inbox) + len(bench.arena) for bench in workshop._free) <= INBOX_BYTES + ARENA_BYTES
    return bytes(out)


def _judge_content(initial: np.ndarray, found: np.ndarray, requests: list[Request], *, all_arrived: bool) -> None:
    """Each byte is what some legal request put there, or as it was where none (or only one cut short) did.

    Requests in flight together may be carried out in any order. `all_arrived`: no request can have been lost.
    """
    changing = (wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES)
    if not any(request.legal and request.command in changing for request in requests):
        assert found.tobytes() == initial.tobytes(), "something changed, and nobody asked for it"
        return
    allowed = np.zeros(SIZE, dtype=bool)
    written = np.zeros(SIZE, dtype=bool)
    for request in requests:
        if not request.legal:
            continue
        low, high = request.offset, request.offset + request.length
        if request.command == wire.CMD_WRITE:
            high = low + len(request.payload)
            value: np.ndarray | int = np.frombuffer(request.payload, dtype=np.uint8)
        elif request.command == wire.CMD_TRIM:
            low, high = -(-low // GRAIN) * GRAIN, high // GRAIN * GRAIN
            value = 0
        elif request.command == wire.CMD_WRITE_ZEROES:
            value = 0
        else:
            continue
        if low < high:
            allowed[low:high] |= found[low:high] == value
            written[low:high] |= request.complete and all_arrived
    allowed |= ~written & (found == initial)
    wrong = np.flatnonzero(~allowed)
    assert not len(wrong), f"{len(wrong)} bytes from {wrong[0]} on are what nobody asked for"


def _judge_replies(out: bytes, terms: Terms, requests: list[Request], initial: np.ndarray) -> None:
    """One final reply for each complete request, with an error exactly where it isn't legal, and sound chunks."""
    waiting: dict[int, list[Request]] = {}
    for request in requests:
        if request.complete or not request.legal:
            waiting.setdefault(request.cookie, []).append(request)
    quiet = not any(r.legal and r.command in (wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES) for r in requests)
    unique = len(waiting) == sum(map(len, waiting.values()))
    covered: dict[int, int] = {}
    told: dict[int, list[int]] = {}
    at = 0
    while at < len(out):
        magic, word, cookie = struct.unpack_from(">IIQ", out, at)
        assert cookie in waiting, "a reply that nobody waits for"
        request = waiting[cookie][0]
        at += 16
        done, failed = True, False
        if magic == MAGICS["simple"]:
            assert terms.form != "extended", "a simple reply, with extended headers"
            failed = word != 0
            if not failed and terms.form == "simple" and unique and request.command == wire.CMD_READ:
                data = out[at : at + request.length]
                at += len(data)
                if quiet:
                    assert data == initial[request.offset : request.offset + len(data)].tobytes()
            elif not unique and terms.form == "simple":
                return  # can't be told apart from here on
        else:
            assert magic == MAGICS[terms.form], f"no reply: {magic:#x}"
            if terms.form == "extended":
                echo, length = struct.unpack_from(">QQ", out, at)
                same = [one for one in waiting[cookie] if one.offset == echo]
                assert same, "another offset than the request's"
                request = same[0]
                at += 16
            else:
                (length,) = struct.unpack_from(">I", out, at)
                at += 4
            payload = out[at : at + length]
            assert len(payload) == length
            at += length
            kind = word & 0xFFFF
            done, failed = bool(word >> 16 & wire.REPLY_FLAG_DONE), bool(kind & 0x8000)
            if kind in (wire.REPLY_TYPE_OFFSET_DATA, wire.REPLY_TYPE_OFFSET_HOLE):
                start = int.from_bytes(payload[:8])
                hole = kind == wire.REPLY_TYPE_OFFSET_HOLE
                size = int.from_bytes(payload[8:]) if hole else length - 8
                assert size and (not hole or length == 12)
                if quiet:
                    expected = initial[start : start + size].tobytes()
                    assert (bytes(size) if hole else payload[8:]) == expected
                if unique:
                    assert request.command == wire.CMD_READ
                    assert start == request.offset + covered.get(cookie, 0), "out of order, or twice"
                    assert not (hole and request.flags & wire.CMD_FLAG_DF)
                    covered[cookie] = covered.get(cookie, 0) + size
            elif kind in (wire.REPLY_TYPE_BLOCK_STATUS, wire.REPLY_TYPE_BLOCK_STATUS_EXT):
                assert (kind == wire.REPLY_TYPE_BLOCK_STATUS_EXT) == (terms.form == "extended")
                number, count = struct.unpack_from(">II", payload)
                if terms.form == "extended":
                    assert count and length == 8 + 16 * count
                told.setdefault(cookie, []).append(number)
        if done:
            waiting[cookie].remove(request)
            if not waiting[cookie]:
                del waiting[cookie]
            if unique:
                assert failed != request.legal, f"{request} was answered {'with an error' if failed else 'well'}"
                if request.legal and request.command == wire.CMD_READ and terms.form != "simple":
                    assert covered.get(cookie, 0) == request.length
                if request.legal and request.command == wire.CMD_BLOCK_STATUS:
                    assert sorted(told[cookie]) == sorted(request.wanted)
    left = [request for several in waiting.values() for request in several if request.complete]
    assert not left, f"no reply to {left[0]}"


def _requests(form: str) -> list[bytes]:
    """One of each kind, good and bad."""

    def one(command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b"") -> bytes:
        encode = extended_bytes if form == "extended" else request_bytes
        if form == "extended" and (data or command == wire.CMD_WRITE):
            flags |= wire.CMD_FLAG_PAYLOAD_LEN
        return encode(command, cookie, offset, length, flags, data)

    some = [
        one(wire.CMD_WRITE, 1, 4096, 512, 0, b"abcdefgh" * 64),
        one(wire.CMD_READ, 2, 4096, 512, 0),
        one(wire.CMD_FLUSH, 3, 0, 0, 0),
        one(wire.CMD_TRIM, 4, 8192, 8192, 0),
        one(wire.CMD_WRITE_ZEROES, 5, 1024, 4096, wire.CMD_FLAG_NO_HOLE),
        one(wire.CMD_CACHE, 6, 0, 4096, 0),
        one(wire.CMD_BLOCK_STATUS, 7, 0, SIZE, wire.CMD_FLAG_REQ_ONE),
        one(wire.CMD_WRITE, 8, 512, 512, wire.CMD_FLAG_FUA, b"x" * 512),
        one(wire.CMD_READ, 9, 0, SIZE, wire.CMD_FLAG_DF),
        one(wire.CMD_READ, 14, 512, SIZE - 1024, 0),
        one(wire.CMD_WRITE, 10, SIZE - 512, 1024, 0, b"y" * 1024),
        one(wire.CMD_WRITE, 11, 0, 0, 0),
        one(wire.CMD_READ, 12, 0, 0, wire.CMD_FLAG_FUA),
        one(wire.CMD_WRITE, 13, 0, 8 << 20, 0, b"z" * 2000),
    ]
    if form == "extended":
        some[-1:] = [
            one(wire.CMD_BLOCK_STATUS, 15, 4096, data=filter_bytes(SIZE - 4096, 2)),
            one(wire.CMD_BLOCK_STATUS, 16, 0, data=filter_bytes(512, 2, 1), flags=wire.CMD_FLAG_REQ_ONE),
            one(wire.CMD_BLOCK_STATUS, 17, 0, data=filter_bytes(512, 2, 2)),
            one(wire.CMD_TRIM, 18, 0, 1 << 40),
            one(wire.CMD_READ, 19, 0, data=b"unexpected" * 10),
            extended_bytes(wire.CMD_WRITE, 20, 0, 512),
            some[-1],
        ]
    return some


def _connection_seeds() -> list[bytes]:
    disconnect = request_bytes(wire.CMD_DISC, 99, 0, 0, 0)
    some = _requests("simple")
    seeds = [bytes([flags, 0]) + one for one in some for flags in (0, 1)]
    seeds += [bytes([flags, seed]) + b"".join(some[:10]) + disconnect for flags in range(64) for seed in (flags % 3,)]
    seeds += [bytes([16, 1]) + HELLO + some[0], bytes([16, 2]) + PLAIN_HELLO + some[1], bytes([1, 1]) + b"".join(some)]
    some = _requests("extended")
    seeds += [bytes([64, 0]) + one for one in some]
    seeds += [
        bytes([64 | flags, flags % 3]) + b"".join(some[:-1]) + extended_bytes(wire.CMD_DISC, 99)
        for flags in (0, 2, 4, 8, 12, 32, 128, 136)
    ]
    seeds += [bytes([16, 1]) + EXTENDED_HELLO + b"".join(some)]
    return seeds


def _request_seeds() -> list[bytes]:
    seeds = []
    for flags in range(64):
        form = "extended" if flags & 32 else "simple"
        size = 32 if form == "extended" else 28
        seeds.append(bytes([flags]) + b"".join(one[:size] for one in _requests(form)))
    return seeds


# -- the client's side -------------------------------------------------------------------------------------------------


def run_replies(data: bytes) -> None:
    """A server's replies to six requests. Input: flags, a seed for the pieces, what the server sends.

    Whatever it is, the pieces in which it comes must not matter; and what is answered well must be complete.
    """
    flags, seed, stream = (data[0], data[1], data[2:]) if len(data) > 1 else (0, 0, b"")
    assert _answers(flags, [stream]) == _answers(flags, list(_pieces(stream, seed | 1)))


def _answers(flags: int, pieces: list[bytes]) -> list[object]:
    """What each request was answered, in the order of the answers, and whether the protocol was broken."""
    contexts = {1: wire.META_ALLOCATION, 2: CONTEXT} if flags & 2 else {1: wire.META_ALLOCATION}
    replies = Replies(structured=bool(flags & 9), contexts=contexts, extended=bool(flags & 8))
    for cookie, command in enumerate(
        (wire.CMD_READ, wire.CMD_READ, wire.CMD_BLOCK_STATUS, wire.CMD_WRITE, wire.CMD_FLUSH)
    ):
        into = memoryview(bytearray(4096 if command == wire.CMD_READ else 0))
        offset, length = (0, 0) if command == wire.CMD_FLUSH else (1000, 4096)
        replies.expect(Pending(7 + cookie, command, offset, length, into))
    filtered = Pending(12, wire.CMD_BLOCK_STATUS, 1000, 4096, context_ids=frozenset([max(contexts)]))
    replies.expect(filtered)
    answered: list[Pending] = []
    broken = False
    try:
        for piece in pieces:
            sink = replies.sink()
            if sink and flags & 4:
                direct = min(len(sink), len(piece))
                sink[:direct] = piece[:direct]
                answered += replies.filled(direct)
                piece = piece[direct:]
            answered += replies.feed(memoryview(piece))
    except OSError as error:
        assert error.errno == errno.EPROTO and error.strerror
        broken = True
        answered = []  # what was complete before the break in the same piece is lost with it
    for request in answered:
        assert request.error or request.command != wire.CMD_READ or request.cover.total == request.length
        if request.command == wire.CMD_BLOCK_STATUS and not request.error:
            assert set(request.extents) == (request.context_ids or set(contexts))
        for extents in request.extents.values():
            assert all(length for length, _ in extents) and sum(length for length, _ in extents) <= request.length
        assert request.message.isprintable() and request.error in (0, *errno.errorcode)
    return [broken, *((one.cookie, one.error, one.message, bytes(one.into), one.extents) for one in answered)]


def _reply_seeds() -> list[bytes]:
    """With flag 8 the connection has extended headers."""
    kinds = [
        (wire.REPLY_TYPE_NONE, b""),
        (wire.REPLY_TYPE_OFFSET_DATA, struct.pack(">Q", 1000) + b"x" * 4096),
        (wire.REPLY_TYPE_OFFSET_DATA, struct.pack(">Q", 1000) + b"x" * 100),
        (wire.REPLY_TYPE_OFFSET_HOLE, struct.pack(">QI", 1100, 3996)),
        (wire.REPLY_TYPE_OFFSET_HOLE, struct.pack(">QI", 1000, 4096)),
        (wire.REPLY_TYPE_BLOCK_STATUS, struct.pack(">IIIII", 1, 96, 0, 8000, 3)),
        (wire.REPLY_TYPE_BLOCK_STATUS, struct.pack(">III", 2, 4096, 1)),
        (wire.REPLY_TYPE_ERROR, struct.pack(">IH", wire.EIO, 3) + b"bad"),
        (wire.REPLY_TYPE_ERROR_OFFSET, struct.pack(">IHQ", wire.EIO, 0, 1001)),
    ]

    def chunk(index: int, cookie: int, done: bool) -> bytes:
        kind, payload = kinds[index]
        return struct.pack(">IHHQI", wire.STRUCTURED_REPLY_MAGIC, done, kind, cookie, len(payload)) + payload

    simple = [struct.pack(">IIQ", wire.SIMPLE_REPLY_MAGIC, error, cookie) for cookie in (7, 10, 11) for error in (0, 5)]
    streams = [
        chunk(2, 7, False) + chunk(4, 8, False) + chunk(3, 7, True) + chunk(0, 8, True),
        chunk(1, 8, True) + chunk(7, 7, True) + simple[2] + chunk(0, 11, True),
        chunk(6, 9, False) + chunk(5, 9, True),
        chunk(5, 9, True),
        chunk(8, 7, False) + chunk(2, 7, True) + simple[5],
        simple[0] + b"y" * 4096 + simple[3] + simple[4],
    ]
    wide_kinds = [*kinds]
    wide_kinds[5] = (wire.REPLY_TYPE_BLOCK_STATUS_EXT, struct.pack(">IIQQQQ", 1, 2, 96, 0, 1 << 40, 3))
    wide_kinds[6] = (wire.REPLY_TYPE_BLOCK_STATUS_EXT, struct.pack(">IIQQ", 2, 1, 4096, 1 << 40))

    def wide(index: int, cookie: int, done: bool) -> bytes:
        kind, payload = wide_kinds[index]
        offset = 0 if cookie == 11 else 1000
        head = wire.EXTENDED_REPLY_MAGIC, done, kind, cookie, offset, len(payload)
        return struct.pack(">IHHQQQ", *head) + payload

    wide_streams = [
        wide(2, 7, False) + wide(4, 8, False) + wide(3, 7, True) + wide(0, 8, True),
        wide(1, 8, True) + wide(7, 7, True) + wide(0, 10, True) + wide(0, 11, True),
        wide(6, 9, False) + wide(5, 9, True),
        wide(5, 9, True) + wide(6, 12, True),
        wide(8, 7, False) + wide(2, 7, True) + wide(8, 10, True),
        wide(6, 12, True),
    ]
    return [
        *(bytes([flags, 3]) + stream for stream in streams for flags in range(8)),
        *(bytes([8 | flags, 3]) + stream for stream in wide_streams for flags in range(8)),
    ]


def run_negotiation(data: bytes) -> None:
    """What a server says in the handshake: our client agrees on sound terms, wants more, or says what is wrong."""
    tls = data[:1] == b"T"  # every server's greeting begins with N
    data = data[1:] if tls else data
    steps = negotiate("mem", ["base:allocation", CONTEXT], tls=tls)
    at = 0
    try:
        step = next(steps)
        for _ in range(len(data) + 10_000):
            if isinstance(step, int):
                assert 0 < step <= MAX_REPLY_BYTES, "it wants to hold too much"
                if at + step > len(data):
                    return
                at += step
                step = steps.send(data[at - step : at])
            else:
                step = steps.send(b"")
        raise AssertionError("the handshake makes no progress")
    except StopIteration as end:
        terms = end.value
    except OSError as error:
        assert error.errno in errno.errorcode and error.strerror and error.strerror.isprintable()
        return
    assert terms.flags & wire.HAS_FLAGS and terms.size_bytes < 1 << 63
    assert terms.minimum_block_size <= terms.maximum_payload <= wire.MAX_PAYLOAD_BYTES
    assert (
        terms.maximum_payload % terms.minimum_block_size == terms.preferred_block_size % terms.minimum_block_size == 0
    )
    assert not terms.contexts or terms.structured
    assert terms.structured or not terms.extended
    assert terms.encrypted is tls


def _negotiation_seeds() -> list[bytes]:
    def reply(option: int, kind: int, data: bytes = b"") -> bytes:
        return struct.pack(">QIII", wire.REP_MAGIC, option, kind, len(data)) + data

    greeting = b"NBDMAGICIHAVEOPT\0"
    extended = reply(wire.OPT_EXTENDED_HEADERS, wire.REP_ACK)
    compact = reply(wire.OPT_EXTENDED_HEADERS, wire.REP_ERR_UNSUP)
    tls = reply(wire.OPT_STARTTLS, wire.REP_ACK)
    structured = compact + reply(wire.OPT_STRUCTURED_REPLY, wire.REP_ACK)
    simple = compact + reply(wire.OPT_STRUCTURED_REPLY, wire.REP_ERR_UNSUP, b"no")
    context = reply(wire.OPT_SET_META_CONTEXT, wire.REP_META_CONTEXT, b"\0\0\0\1base:allocation")
    context += reply(wire.OPT_SET_META_CONTEXT, wire.REP_ACK)
    size = reply(wire.OPT_GO, wire.REP_INFO, struct.pack(">HQH", 0, 1 << 20, 1))
    blocks = reply(wire.OPT_GO, wire.REP_INFO, struct.pack(">HIII", 3, 512, 4096, 65536))
    ack = reply(wire.OPT_GO, wire.REP_ACK)
    return [
        greeting + b"\3" + extended + context + size + blocks + ack,
        greeting + b"\3" + extended + context + reply(wire.OPT_GO, wire.REP_ERR_UNSUP),
        b"T" + greeting + b"\3" + tls + extended + context + size + blocks + ack,
        b"T" + greeting + b"\3" + reply(wire.OPT_STARTTLS, wire.REP_ERR_POLICY, b"no TLS"),
        b"T" + greeting + b"\3" + tls + reply(wire.OPT_EXTENDED_HEADERS, wire.REP_ERR_TLS_REQD),
        greeting + b"\3" + structured + context + size + blocks + ack,
        greeting + b"\3" + simple + blocks + size + ack,
        greeting
        + b"\1"
        + simple
        + reply(wire.OPT_GO, wire.REP_ERR_UNSUP)
        + struct.pack(">QH", 1 << 20, 1)
        + bytes(124),
        greeting + b"\3" + structured + reply(wire.OPT_SET_META_CONTEXT, wire.REP_ERR_UNKNOWN) + size + ack,
        greeting + b"\3" + simple + reply(wire.OPT_GO, wire.REP_ERR_TLS_REQD, b"TLS, please"),
    ]


_WORDS = [
    struct.pack(">IHH", magic, flags, command)
    for magic, bits in ((0x25609513, (0, 1, 2, 4, 8, 16)), (0x21E41C71, (0, 1, 32, 40)))
    for command in range(9)
    for flags in bits
]
_OPTIONS = [struct.pack(">QI", wire.IHAVEOPT, option) for option in range(12)]

PROTOCOL = [
    Target(
        "handshake",
        run_handshake,
        _handshake_seeds,
        [*_OPTIONS, b"base:allocation", b"terrace:diff:a", b"mem", bytes(4)],
        examples=300,
    ),
    Target(
        "request",
        run_request,
        _request_seeds,
        _WORDS,
        examples=300,
    ),
    Target("connection", run_connection, _connection_seeds, _WORDS, examples=120, run_many=run_connections),
    Target(
        "replies",
        run_replies,
        _reply_seeds,
        [
            *(struct.pack(">IHHQ", wire.STRUCTURED_REPLY_MAGIC, done, kind, 7) for done in (0, 1) for kind in range(7)),
            *(
                struct.pack(">IHHQQ", wire.EXTENDED_REPLY_MAGIC, done, kind, 9, 1000)
                for done in (0, 1)
                for kind in (0, 1, 2, 5, 6, 0x8001)
            ),
            *(
                struct.pack(">IIQ", wire.SIMPLE_REPLY_MAGIC, error, cookie)
                for error in (0, 5)
                for cookie in range(7, 12)
            ),
        ],
        examples=200,
    ),
    Target(
        "negotiation",
        run_negotiation,
        _negotiation_seeds,
        [
            struct.pack(">QII", wire.REP_MAGIC, option, kind)
            for option in (5, 7, 8, 10, 11)
            for kind in (1, 3, 4, 0x80000001)
        ],
        examples=200,
    ),
]

logging.getLogger("nbd.server").addHandler(logging.NullHandler())
