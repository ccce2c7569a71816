"""The client's judge of replies, fed by hand: any split and order of chunks, and all that a server can get wrong."""

from __future__ import annotations

import errno
import itertools
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd import replies as replies_module
from nbd import wire
from nbd.replies import KEPT_EXTENTS, MAX_STATUS_EXTENTS, Cover, Pending, Replies
from tests.nbd.fake import extended_chunk

DONE = wire.REPLY_FLAG_DONE


def chunk(kind: int, payload: bytes = b"", *, flags: int = DONE, cookie: int = 7) -> bytes:
    return struct.pack(">IHHQI", wire.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(payload)) + payload


def data_chunk(offset: int, data: bytes, *, flags: int = DONE, cookie: int = 7) -> bytes:
    return chunk(wire.REPLY_TYPE_OFFSET_DATA, struct.pack(">Q", offset) + data, flags=flags, cookie=cookie)


def hole_chunk(offset: int, length: int, *, flags: int = DONE, cookie: int = 7) -> bytes:
    return chunk(wire.REPLY_TYPE_OFFSET_HOLE, struct.pack(">QI", offset, length), flags=flags, cookie=cookie)


def status_chunk(context_id: int, *extents: tuple[int, int], flags: int = DONE, cookie: int = 7) -> bytes:
    payload = struct.pack(">I", context_id) + b"".join(struct.pack(">II", *extent) for extent in extents)
    return chunk(wire.REPLY_TYPE_BLOCK_STATUS, payload, flags=flags, cookie=cookie)


def error_chunk(error: int, text: bytes = b"", *, flags: int = DONE, cookie: int = 7) -> bytes:
    return chunk(wire.REPLY_TYPE_ERROR, struct.pack(">IH", error, len(text)) + text, flags=flags, cookie=cookie)


def simple(error: int = 0, data: bytes = b"", *, cookie: int = 7) -> bytes:
    return struct.pack(">IIQ", wire.SIMPLE_REPLY_MAGIC, error, cookie) + data


def wide(raw: bytes, offset: int = 1000) -> bytes:
    """The same chunks with extended headers; statuses become extended ones."""
    found = b""
    while raw:
        _, flags, kind, cookie, length = struct.unpack_from(">IHHQI", raw)
        payload, raw = raw[20 : 20 + length], raw[20 + length :]
        if kind == wire.REPLY_TYPE_BLOCK_STATUS:
            kind = wire.REPLY_TYPE_BLOCK_STATUS_EXT
            extents = b"".join(struct.pack(">QQ", *extent) for extent in struct.iter_unpack(">II", payload[4:]))
            payload = payload[:4] + struct.pack(">I", len(extents) // 16) + extents
        found += extended_chunk(kind, payload, cookie=cookie, offset=offset, flags=flags)
    return found


def wide_status(context_id: int, *extents: tuple[int, int], count: int | None = None, flags: int = DONE) -> bytes:
    payload = struct.pack(">II", context_id, len(extents) if count is None else count)
    payload += b"".join(struct.pack(">QQ", *extent) for extent in extents)
    return extended_chunk(wire.REPLY_TYPE_BLOCK_STATUS_EXT, payload, cookie=7, offset=1000, flags=flags)


def read(offset: int = 1000, length: int = 100, cookie: int = 7) -> Pending:
    return Pending(cookie, wire.CMD_READ, offset, length, memoryview(bytearray(length)))


def status(offset: int = 1000, length: int = 100) -> Pending:
    return Pending(7, wire.CMD_BLOCK_STATUS, offset, length)


def write() -> Pending:
    return Pending(7, wire.CMD_WRITE, 1000, 100)


@contextmanager
def fails(number: int, text: str = "") -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == number and caught.value.strerror and text in caught.value.strerror


def machine(
    *requests: Pending, structured: bool = True, context_ids: Sequence[int] = (1,), extended: bool = False
) -> Replies:
    """The contexts are named ``x:ID``, but for 1, which is base:allocation. Blocks have 2 bytes."""
    names = {number: wire.META_ALLOCATION if number == 1 else f"x:{number}" for number in context_ids}
    replies = Replies(structured=structured, contexts=names, extended=extended, minimum_block_size=2)
    for request in requests:
        replies.expect(request)
    return replies


def take(replies: Replies, raw: bytes) -> list[Pending]:
    return replies.feed(memoryview(raw))


@settings(max_examples=200)
@given(data=st.data())
def test_any_order_and_split_of_chunks_gives_the_bytes_of_the_range(data: st.DataObject) -> None:
    """Reads in flight together, each in data and hole chunks in any order, mixed, cut anywhere, received either way."""
    extended = data.draw(st.booleans())
    streams: list[list[bytes]] = []
    requests: list[tuple[Pending, bytes]] = []
    for cookie in range(1, data.draw(st.integers(1, 3)) + 1):
        length = data.draw(st.integers(1, 300))
        offset = data.draw(st.integers(0, 1 << 62))
        content = bytearray([(cookie * 50 + i) % 251 + 1 for i in range(length)])
        cuts = sorted(data.draw(st.sets(st.integers(1, length), max_size=8)) | {0, length})
        chunks = []
        for start, end in itertools.pairwise(cuts):
            if data.draw(st.booleans()):
                chunks.append(data_chunk(offset + start, bytes(content[start:end]), flags=0, cookie=cookie))
            else:
                content[start:end] = bytes(end - start)
                chunks.append(hole_chunk(offset + start, end - start, flags=0, cookie=cookie))
        chunks = data.draw(st.permutations(chunks))
        if data.draw(st.booleans()):
            chunks.append(chunk(wire.REPLY_TYPE_NONE, cookie=cookie))
        else:
            chunks[-1] = chunks[-1][:4] + struct.pack(">H", DONE) + chunks[-1][6:]
        streams.append([wide(one, offset) for one in chunks] if extended else chunks)
        requests.append((read(offset, length, cookie), bytes(content)))
    replies = machine(*(request for request, _ in requests), extended=extended)
    stream = b""
    while any(streams):
        turn = data.draw(st.sampled_from([one for one in streams if one]))
        stream += turn.pop(0)
    done: list[Pending] = []
    at = 0
    while at < len(stream):
        count = data.draw(st.integers(1, 200))
        sink = replies.sink()
        direct: bool = data.draw(st.booleans())
        if sink and direct:
            part = stream[at : at + min(count, len(sink))]
            sink[: len(part)] = part
            done += replies.filled(len(part))
        else:
            part = stream[at : at + count]
            done += take(replies, part)
        at += len(part)
    assert {request.cookie for request in done} == {request.cookie for request, _ in requests}
    for request, expected in requests:
        assert not request.error and request.into == expected


@given(st.permutations(range(40)))
def test_what_has_come_is_counted_once_in_any_order(order: list[int]) -> None:
    cover = Cover()
    for number in order:
        cover.add(number * 10, number * 10 + 10)
        with pytest.raises(OSError, match="came twice"):
            cover.add(number * 10 + 9, number * 10 + 11)
    assert cover.total == 400 and cover._starts == [0] and cover._ends == [400]


def test_data_in_too_many_islands_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies_module, "MAX_FRAGMENTS", 10)
    cover = Cover()
    with pytest.raises(OSError, match="separate pieces"):
        for number in range(20):
            cover.add(number * 2, number * 2 + 1)


def test_simple_replies_are_taken_where_structured_ones_were_not_negotiated() -> None:
    request = read()
    assert take(machine(request, structured=False), simple(data=b"x" * 100)) == [request]
    assert request.into == b"x" * 100
    request = read()
    assert take(machine(request, structured=False), simple(wire.EIO)) == [request]
    assert request.error == errno.EIO


def test_a_simple_reply_may_answer_what_carries_no_data_even_with_structured_ones() -> None:
    request = write()
    assert take(machine(request), simple()) == [request] and not request.error
    request = write()
    assert take(machine(request), chunk(wire.REPLY_TYPE_NONE)) == [request] and not request.error
    request = status()
    assert take(machine(request), simple(wire.EINVAL)) == [request] and request.error == errno.EINVAL


def test_the_first_error_counts_and_its_text_is_made_printable() -> None:
    request = read()
    raw = (
        data_chunk(1000, b"x" * 10, flags=0)
        + error_chunk(wire.ENOMEM, b"no\x1b[31m \xff memory\n", flags=0)
        + chunk(wire.REPLY_TYPE_ERROR_OFFSET, struct.pack(">IHQ", wire.EIO, 0, 1010))
    )
    assert take(machine(request), raw) == [request]
    assert request.error == errno.ENOMEM and request.message == "no\ufffd[31m \ufffd memory\ufffd"


@pytest.mark.parametrize("value", [1, 5, 12, 22, 28, 75, 95, 108])
def test_every_error_of_the_protocol_is_its_errno(value: int) -> None:
    request = write()
    take(machine(request), simple(value))
    assert errno.errorcode[request.error] in (
        "EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC", "EOVERFLOW", "EOPNOTSUPP", "ENOTSUP", "ESHUTDOWN"
    )  # fmt: skip


def test_unknown_errors_are_einval_and_unknown_error_types_are_errors() -> None:
    request = write()
    take(machine(request), simple(9999))
    assert request.error == errno.EINVAL
    request = write()
    take(machine(request), chunk(0x8123, struct.pack(">IH", wire.EIO, 2) + b"hm and more that nobody knows"))
    assert request.error == errno.EIO and request.message == "hm"


def test_flags_of_a_chunk_that_we_do_not_know_are_passed_over() -> None:
    """The protocol text, "Structured and extended header reply flags": clients MUST ignore them."""
    raw = data_chunk(1000, b"x" * 60, flags=0xFFFE) + data_chunk(1060, b"x" * 40, flags=3)
    for stream, extended in ((raw, False), (wide(raw), True)):
        request = read()
        assert take(machine(request, extended=extended), stream) == [request] and request.into == b"x" * 100


@pytest.mark.parametrize("extended", [False, True])
def test_extents_are_cut_to_the_range(extended: bool) -> None:
    request = status()
    replies = machine(request, context_ids=(1, 5), extended=extended)
    first, second = status_chunk(5, (60, 1), (1 << 31, 0xFFFFFFFF), flags=0), status_chunk(1, (10, 3))
    assert take(replies, wide(first) if extended else first) == []
    assert take(replies, wide(second) if extended else second) == [request]
    assert request.extents == {5: [(60, 1), (40, 0xFFFFFFFF)], 1: [(10, 3)]}


def test_extents_and_flags_of_64_bits_are_taken() -> None:
    request = status(1000, 1 << 62)
    replies = machine(request, context_ids=(1, 5), extended=True)
    assert take(replies, wide_status(1, (1 << 40, 3), (1 << 63, 0), flags=0)) == []
    assert take(replies, wide_status(5, ((1 << 64) - 2, (1 << 64) - 1))) == [request]
    assert request.extents == {1: [(1 << 40, 3), ((1 << 62) - (1 << 40), 0)], 5: [(1 << 62, (1 << 64) - 1)]}


def test_a_request_for_some_contexts_is_complete_with_these() -> None:
    request = status()
    request.context_ids = frozenset({5, 6})
    replies = machine(request, context_ids=(1, 5, 6), extended=True)
    assert take(replies, wide_status(6, (100, 9), flags=0) + wide_status(5, (100, 8))) == [request]
    assert request.extents == {5: [(100, 8)], 6: [(100, 9)]}
    for stream in (wide_status(5, (100, 8)), wide_status(5, (100, 8), flags=0) + wide_status(1, (100, 0))):
        request = status()
        request.context_ids = frozenset({5, 6})
        with fails(errno.EPROTO, "context"):
            take(machine(request, context_ids=(1, 5, 6), extended=True), stream)


def test_replies_with_extended_headers_byte_by_byte() -> None:
    """Written down from the tables of the protocol text, not made by code."""
    requests = [
        Pending(1, wire.CMD_READ, 0x1000, 8, memoryview(bytearray(8))),
        Pending(2, wire.CMD_BLOCK_STATUS, 0, 1 << 40),
        Pending(3, wire.CMD_WRITE_ZEROES, 0x2000, 1 << 40),
        Pending(4, wire.CMD_FLUSH, 0, 0),
    ]
    raw = """
        6e8a278c 0000 0001 0000000000000001 0000000000001000 000000000000000c  0000000000001004 64617461
        6e8a278c 0001 0006 0000000000000002 0000000000000000 0000000000000028
            00000001 00000002  0000000000010000 0000000000000003  0000010000000000 0000000000000000
        6e8a278c 0001 0002 0000000000000001 0000000000001000 000000000000000c  0000000000001000 00000004
        6e8a278c 0001 8002 0000000000000003 0000000000002000 0000000000000012
            0000005f 0004 6e6f7065 0000000000003000
        6e8a278c 0001 0000 0000000000000004 0000000000000000 0000000000000000"""
    answered = take(machine(*requests, extended=True), bytes.fromhex(raw))
    assert [request.cookie for request in answered] == [2, 1, 3, 4]
    assert bytes(requests[0].into) == b"\0\0\0\0data"
    assert requests[1].extents == {1: [(0x10000, 3), ((1 << 40) - 0x10000, 0)]}
    assert (requests[2].error, requests[2].message) == (errno.ENOTSUP, "nope")
    assert not requests[3].error


@pytest.mark.parametrize("extended", [False, True])
def test_of_very_many_extents_the_first_are_kept_and_the_rest_is_skipped(extended: bool) -> None:
    request = status(0, 1 << 30)
    replies = machine(request, extended=extended)
    count = KEPT_EXTENTS + 1000
    raw = status_chunk(1, *[(512, number & 1) for number in range(count)]) + chunk(wire.REPLY_TYPE_NONE, cookie=9)
    raw = wide(raw, 0) if extended else raw
    other = Pending(9, wire.CMD_FLUSH, 0, 0)
    replies.expect(other)
    assert take(replies, raw[:100_000]) + take(replies, raw[100_000:]) == [request, other]
    assert len(request.extents[1]) == KEPT_EXTENTS and len(replies._held) == 0


HOSTILE = {
    "garbage": (read(), b"HTTP/1.1 200 OK\r\n"),
    "a cookie that nobody has": (read(), data_chunk(1000, b"x" * 100, cookie=8)),
    "a second reply": (read(), data_chunk(1000, b"x" * 100) * 2),
    "a simple reply to READ": (read(), simple(data=b"x" * 100)),
    "a simple reply amid chunks": (write(), chunk(wire.REPLY_TYPE_ERROR, struct.pack(">IH", 5, 0), flags=0) + simple()),
    "an unknown type": (read(), chunk(77)),
    "an empty chunk that doesn't end": (read(), chunk(wire.REPLY_TYPE_NONE, flags=0)),
    "an empty chunk that isn't empty": (write(), chunk(wire.REPLY_TYPE_NONE, b"x")),
    "too little data": (read(), data_chunk(1000, b"x" * 99)),
    "no data": (read(), chunk(wire.REPLY_TYPE_NONE)),
    "a data chunk without data": (read(), data_chunk(1000, b"") + bytes(8)),
    "data before the range": (read(), data_chunk(999, b"x" * 100)),
    "data behind the range": (read(), data_chunk(1001, b"x" * 100)),
    "data of gigabytes": (read(), struct.pack(">IHHQIQ", wire.STRUCTURED_REPLY_MAGIC, 0, 1, 7, 0xFFFFFFFF, 1000)),
    "an offset that wraps": (read(), data_chunk((1 << 64) - 50, b"x" * 100)),
    "overlapping data": (read(), data_chunk(1000, b"x" * 60, flags=0) + data_chunk(1059, b"x" * 41)),
    "a hole over data": (read(), data_chunk(1000, b"x" * 60, flags=0) + hole_chunk(1000, 100)),
    "an empty hole": (read(), hole_chunk(1000, 0)),
    "a hole behind the range": (read(), hole_chunk(1000, 101)),
    "a hole of a wrong size": (read(), chunk(wire.REPLY_TYPE_OFFSET_HOLE, bytes(13))),
    "data for a write": (write(), data_chunk(1000, b"x" * 100)),
    "a status for a write": (write(), status_chunk(1, (100, 0))),
    "data for a status": (status(), data_chunk(1000, b"x" * 100)),
    "a simple success for a status": (status(), simple()),
    "a status without extents": (status(), status_chunk(1)),
    "a status of a ragged length": (status(), chunk(wire.REPLY_TYPE_BLOCK_STATUS, bytes(13))),
    "a status that is too long": (
        status(),
        struct.pack(">IHHQI", wire.STRUCTURED_REPLY_MAGIC, 1, 5, 7, 4 + 8 * (MAX_STATUS_EXTENTS + 1)),
    ),
    "an unknown context": (status(), status_chunk(2, (100, 0))),
    "a context twice": (status(), status_chunk(1, (100, 0), flags=0) + status_chunk(1, (100, 0))),
    "a context too few": (status(), chunk(wire.REPLY_TYPE_NONE)),
    "an empty extent": (status(), status_chunk(1, (50, 0), (0, 1))),
    "an extent behind the range": (status(), status_chunk(1, (100, 0), (2, 1))),
    "an extent that ends within a block": (status(), status_chunk(1, (51, 0), (2, 1))),
    "an extended status": (status(), chunk(wire.REPLY_TYPE_BLOCK_STATUS_EXT, wide_status(1, (100, 0))[32:])),
    "an extended header": (read(), wide(data_chunk(1000, b"x" * 100))),
    "an error of no kind": (read(), error_chunk(0)),
    "an error chunk that is too short": (read(), chunk(wire.REPLY_TYPE_ERROR, bytes(5))),
    "an error chunk that is too long": (read(), chunk(wire.REPLY_TYPE_ERROR, bytes(1 << 17))),
    "a message longer than its chunk": (read(), chunk(wire.REPLY_TYPE_ERROR, struct.pack(">IH", 5, 9) + b"short")),
    "a message shorter than its chunk": (read(), chunk(wire.REPLY_TYPE_ERROR, struct.pack(">IH", 5, 1) + b"long")),
    "an error outside the range": (read(), chunk(wire.REPLY_TYPE_ERROR_OFFSET, struct.pack(">IHQ", 5, 0, 1100))),
}


FRAMED = [  # chunks whose frame is sound, so that the same lie can be told with extended headers
    name
    for name, (_, raw) in HOSTILE.items()
    if raw[:4] == struct.pack(">I", wire.STRUCTURED_REPLY_MAGIC)
    and name
    not in (
        "a simple reply amid chunks",
        "a data chunk without data",
        "data of gigabytes",
        "a status that is too long",
        "a status of a ragged length",
        "an extended status",
    )
]

HOSTILE_EXTENDED = {
    **{name: (HOSTILE[name][0], wide(HOSTILE[name][1])) for name in FRAMED},
    "garbage": (read(), b"HTTP/1.1 200 OK\r\n"),
    "a simple reply": (write(), simple()),
    "a simple error": (write(), simple(wire.EIO)),
    "a structured reply": (read(), data_chunk(1000, b"x" * 100)),
    "the offset of the data": (
        read(),
        extended_chunk(wire.REPLY_TYPE_OFFSET_DATA, struct.pack(">Q", 1050) + b"x" * 50, cookie=7, offset=1050),
    ),
    "another offset": (write(), extended_chunk(wire.REPLY_TYPE_NONE, cookie=7, offset=0)),
    "a data chunk without an offset": (
        read(),
        extended_chunk(wire.REPLY_TYPE_OFFSET_DATA, b"1234567", cookie=7, offset=1000),
    ),
    "a data chunk without data": (read(), extended_chunk(wire.REPLY_TYPE_OFFSET_DATA, bytes(8), cookie=7, offset=1000)),
    "data of exabytes": (
        read(),
        struct.pack(">IHHQQQQ", wire.EXTENDED_REPLY_MAGIC, 1, 1, 7, 1000, (1 << 64) - 1, 1000),
    ),
    "a hole of 64 bits": (
        read(),
        extended_chunk(wire.REPLY_TYPE_OFFSET_HOLE, struct.pack(">QQ", 1000, 100), cookie=7, offset=1000),
    ),
    "a status of 32 bits": (
        status(),
        extended_chunk(wire.REPLY_TYPE_BLOCK_STATUS, struct.pack(">III", 1, 100, 0), cookie=7, offset=1000),
    ),
    "a status of a ragged length": (
        status(),
        extended_chunk(wire.REPLY_TYPE_BLOCK_STATUS_EXT, bytes(23), cookie=7, offset=1000),
    ),
    "a status without extents": (status(), wide_status(1)),
    "a status that counts too many": (status(), wide_status(1, (100, 0), count=2)),
    "a status that counts too few": (status(), wide_status(1, (50, 0), (50, 1), count=1)),
    "a status that counts none": (status(), wide_status(1, (100, 0), count=0)),
    "a status that is too long": (
        status(),
        struct.pack(">IHHQQQ", wire.EXTENDED_REPLY_MAGIC, 1, 6, 7, 1000, 8 + 16 * (MAX_STATUS_EXTENTS + 1)),
    ),
    "64 bits of flags where base: has 32": (status(), wide_status(1, (100, 1 << 32))),
    "an error chunk of exabytes": (
        write(),
        struct.pack(">IHHQQQ", wire.EXTENDED_REPLY_MAGIC, 1, 0x8001, 7, 1000, 1 << 62),
    ),
}


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("name", "extended"), [*((name, False) for name in HOSTILE), *((name, True) for name in HOSTILE_EXTENDED)]
)
def test_a_reply_that_breaks_the_protocol_is_eproto(name: str, extended: bool, piece: int) -> None:
    model, raw = (HOSTILE_EXTENDED if extended else HOSTILE)[name]
    into = memoryview(bytearray(len(model.into)))
    replies = machine(Pending(model.cookie, model.command, model.offset, model.length, into), extended=extended)
    with fails(errno.EPROTO):
        for at in range(0, len(raw), piece):
            take(replies, raw[at : at + piece])


@pytest.mark.parametrize("extended", [False, True])
def test_four_bytes_tell_who_is_no_server(extended: bool) -> None:
    """It may never send more, and a caller would wait for ever."""
    replies = machine(read(), extended=extended)
    assert take(replies, b"HTT") == []
    with fails(errno.EPROTO, "not an NBD reply"):
        take(replies, b"P")


def test_a_structured_reply_that_was_not_negotiated_is_eproto() -> None:
    with pytest.raises(OSError, match="not negotiated"):
        take(machine(read(), structured=False), data_chunk(1000, b"x" * 100))
