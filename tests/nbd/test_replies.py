"""The client's judge of replies, fed by hand: any split and order of chunks, and all that a server can get wrong."""

from __future__ import annotations

import errno
import itertools
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd import replies as replies_module
from nbd import wire
from nbd.replies import KEPT_EXTENTS, MAX_STATUS_EXTENTS, Cover, Pending, Replies

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


def read(offset: int = 1000, length: int = 100, cookie: int = 7) -> Pending:
    return Pending(cookie, wire.CMD_READ, offset, length, memoryview(bytearray(length)))


def status(offset: int = 1000, length: int = 100) -> Pending:
    return Pending(7, wire.CMD_BLOCK_STATUS, offset, length)


def write() -> Pending:
    return Pending(7, wire.CMD_WRITE, 1000, 100)


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
        streams.append(chunks)
        requests.append((read(offset, length, cookie), bytes(content)))
    replies = machine(*(request for request, _ in requests))
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


def test_extents_are_cut_to_the_range() -> None:
    request = status()
    replies = machine(request, context_ids=(1, 5))
    assert take(replies, status_chunk(5, (60, 1), (1 << 31, 0xFFFFFFFF), flags=0)) == []
    assert take(replies, status_chunk(1, (10, 3))) == [request]
    assert request.extents == {5: [(60, 1), (40, 0xFFFFFFFF)], 1: [(10, 3)]}


def test_of_very_many_extents_the_first_are_kept_and_the_rest_is_skipped() -> None:
    request = status(0, 1 << 30)
    replies = machine(request)
    count = KEPT_EXTENTS + 1000
    raw = status_chunk(1, *[(512, number & 1) for number in range(count)]) + simple(cookie=9)
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
    "an extent behind the range": (status(), status_chunk(1, (100, 0), (1, 1))),
    "an error of no kind": (read(), error_chunk(0)),
    "an error chunk that is too short": (read(), chunk(wire.REPLY_TYPE_ERROR, bytes(5))),
    "an error chunk that is too long": (read(), chunk(wire.REPLY_TYPE_ERROR, bytes(1 << 17))),
    "a message longer than its chunk": (read(), chunk(wire.REPLY_TYPE_ERROR, struct.pack(">IH", 5, 9) + b"short")),
    "a message shorter than its chunk": (read(), chunk(wire.REPLY_TYPE_ERROR, struct.pack(">IH", 5, 1) + b"long")),
    "an error outside the range": (read(), chunk(wire.REPLY_TYPE_ERROR_OFFSET, struct.pack(">IHQ", 5, 0, 1100))),
}


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_reply_that_breaks_the_protocol_is_eproto(name: str, piece: int) -> None:
    model, raw = HOSTILE[name]
    into = memoryview(bytearray(len(model.into)))
    replies = machine(Pending(model.cookie, model.command, model.offset, model.length, into))
    with pytest.raises(OSError) as caught:
        for at in range(0, len(raw), piece):
            take(replies, raw[at : at + piece])
    assert caught.value.errno == errno.EPROTO and caught.value.strerror


def test_a_structured_reply_that_was_not_negotiated_is_eproto() -> None:
    with pytest.raises(OSError, match="not negotiated"):
        take(machine(read(), structured=False), data_chunk(1000, b"x" * 100))
