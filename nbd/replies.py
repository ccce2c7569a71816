"""What a server answers to requests, taken apart without IO, and the place where that is judged.

``Replies`` knows the requests in flight (``Pending``). Bytes from the server go in with ``feed``, in
any pieces; it returns the requests whose reply has become complete. The data of a READ goes straight
to where the request wants it, so a caller may receive it there itself: see ``sink``.

Nothing a server says is believed. A reply to what nobody asked, a chunk outside the request's range
or over bytes that came already, a length that doesn't belong to its kind, an end before all is there:
each is ``OSError`` with EPROTO and a sentence, and then the connection can't go on, as nobody knows
where the next reply begins. An error that the server reports for a request is not of this kind; it
is in ``Pending.error``.

Sources: the protocol text's "Simple reply message", "Structured reply chunk message" and "Structured
reply types".
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from struct import Struct
from typing import Final

from nbd import wire

MAX_STATUS_EXTENTS: Final = 1 << 20
"""By the protocol a chunk of BLOCK_STATUS has no more."""
KEPT_EXTENTS: Final = 1 << 16
"""What is kept of them. A status describes a prefix of the range, so the rest can be asked for again."""
MAX_ERROR_BYTES: Final = 64 << 10
MAX_FRAGMENTS: Final = 1 << 16
"""Data may come in any order. So many islands of it are told apart, which costs at most 1 MiB."""

_PART: Final = wire.SIMPLE_REPLY.size  # both forms have at least so many bytes
_DATA_PART: Final = Struct(">IQ")  # length of the payload, offset
_HOLE_PART: Final = Struct(">IQI")  # length of the payload, offset, length of the hole
_ERROR_BIT: Final = 1 << 15
_NOWHERE: Final = memoryview(b"")

_ERRORS: Final = {
    wire.EPERM: errno.EPERM,
    wire.EIO: errno.EIO,
    wire.ENOMEM: errno.ENOMEM,
    wire.EINVAL: errno.EINVAL,
    wire.ENOSPC: errno.ENOSPC,
    wire.EOVERFLOW: errno.EOVERFLOW,
    wire.ENOTSUP: errno.ENOTSUP,
    wire.ESHUTDOWN: errno.ESHUTDOWN,
}


@dataclass(slots=True, eq=False)
class Pending:
    """A request that waits for its reply, and what has come of it. ``into``: where a READ's bytes go, all zero."""

    cookie: int
    command: int
    offset: int
    length: int
    into: memoryview = _NOWHERE
    error: int = 0
    """An errno, once the server has said that the request failed."""
    message: str = ""
    """The server's sentence about the error, if it has one; printable."""
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Of BLOCK_STATUS: (length in bytes, flags) by context id, none empty or past the range."""
    chunked: bool = False
    cover: Cover = field(default_factory=lambda: Cover())


class Cover:
    """Which parts of a range have come. Neighbours merge, so data in order is one island."""

    __slots__ = ("_ends", "_starts", "total")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.total = 0

    def add(self, start: int, end: int) -> None:
        """Raises OSError if a part of it was there already, or if there are too many islands."""
        starts, ends = self._starts, self._ends
        at = bisect_right(starts, start)
        if (at and ends[at - 1] > start) or (at < len(starts) and starts[at] < end):
            raise protocol_error(f"data for the bytes {start} to {end} came twice")
        self.total += end - start
        after_left = bool(at) and ends[at - 1] == start
        before_right = at < len(starts) and starts[at] == end
        if after_left and before_right:
            ends[at - 1] = ends.pop(at)
            del starts[at]
        elif after_left:
            ends[at - 1] = end
        elif before_right:
            starts[at] = start
        else:
            if len(starts) == MAX_FRAGMENTS:
                raise protocol_error(f"data came in more than {MAX_FRAGMENTS} separate pieces")
            starts.insert(at, start)
            ends.insert(at, end)


class Replies:
    """The replies of one connection. After an OSError it is of no use any more."""

    def __init__(self, *, structured: bool, context_ids: Collection[int]) -> None:
        self._structured = structured
        self._context_ids = frozenset(context_ids)
        self._pending: dict[int, Pending] = {}
        self._finished: list[Pending] = []
        self._held = bytearray()  # of a fixed part that isn't complete
        self._need = _PART
        self._then: Callable[[bytes], None] = self._begin
        self._sink = _NOWHERE
        self._skip = 0
        self._current: Pending | None = None
        self._last = True  # the chunk that is being read ends its reply

    def expect(self, request: Pending) -> None:
        """The request is about to be sent. Cookies of requests in flight are unique."""
        assert request.cookie not in self._pending
        assert request.command != wire.CMD_READ or len(request.into) == request.length > 0
        self._pending[request.cookie] = request

    def forget(self, request: Pending) -> None:
        """It was not sent after all."""
        del self._pending[request.cookie]

    def sink(self) -> memoryview:
        """Where the next bytes from the server belong if they are data of a READ; else empty.

        Who receives so many bytes there, or fewer, tells ``filled``.
        """
        return self._sink

    def feed(self, data: memoryview) -> list[Pending]:
        """Take in what the server sent; returns the requests that are answered now."""
        at, end = 0, len(data)
        while at < end:
            if self._sink:
                count = min(len(self._sink), end - at)
                self._sink[:count] = data[at : at + count]
                at += count
                self._advance(count)
            elif self._skip:
                count = min(self._skip, end - at)
                at += count
                self._skip -= count
                if not self._skip:
                    self._end_chunk()
            else:
                count = min(self._need - len(self._held), end - at)
                self._held += data[at : at + count]
                at += count
                if len(self._held) == self._need:
                    part = bytes(self._held)
                    self._held.clear()
                    self._then(part)
        finished, self._finished = self._finished, []
        return finished

    def filled(self, count: int) -> list[Pending]:
        """So many bytes were received into ``sink``; returns the requests that are answered now."""
        self._advance(count)
        finished, self._finished = self._finished, []
        return finished

    # --- the parts of a reply, in their order ---

    def _await(self, need: int, then: Callable[[bytes], None]) -> None:
        self._need, self._then = need, then

    def _begin(self, part: bytes) -> None:
        head, cookie = wire.SIMPLE_REPLY.unpack(part)
        magic = head >> 32
        if magic not in (wire.SIMPLE_REPLY_MAGIC, wire.STRUCTURED_REPLY_MAGIC):
            raise protocol_error(f"not an NBD reply (magic {magic:#010x})")
        request = self._pending.get(cookie)
        if request is None:
            raise protocol_error(f"a reply with the cookie {cookie:#x}, which no request has")
        self._current = request
        if magic == wire.SIMPLE_REPLY_MAGIC:
            self._simple(request, head & 0xFFFFFFFF)
        else:
            self._chunk(request, head >> 16 & 0xFFFF, head & 0xFFFF)

    def _simple(self, request: Pending, error: int) -> None:
        if request.chunked:
            raise protocol_error("a simple reply behind chunks of a structured one")
        if request.command == wire.CMD_READ and self._structured:
            raise protocol_error("a simple reply to READ after structured ones were negotiated")
        self._last = True
        if error:
            _fail(request, error, "")
        elif request.command == wire.CMD_BLOCK_STATUS:
            raise protocol_error("a simple reply that BLOCK_STATUS succeeded")
        elif request.command == wire.CMD_READ:
            self._take_data(request, request.offset, request.length)
            return
        self._end_chunk()

    def _chunk(self, request: Pending, flags: int, kind: int) -> None:
        if not self._structured:
            raise protocol_error("a structured reply, which was not negotiated")
        if flags & ~wire.REPLY_FLAG_DONE:
            raise protocol_error(f"a chunk with unknown flags {flags:#x}")
        request.chunked = True
        self._last = bool(flags & wire.REPLY_FLAG_DONE)
        if kind & _ERROR_BIT:
            self._await(wire.U32.size, lambda part: self._error_length(request, kind, part))
        elif kind == wire.REPLY_TYPE_NONE:
            if not self._last:
                raise protocol_error("an empty chunk that doesn't end its reply")
            self._await(wire.U32.size, self._nothing)
        elif kind in (wire.REPLY_TYPE_OFFSET_DATA, wire.REPLY_TYPE_OFFSET_HOLE):
            if request.command != wire.CMD_READ:
                raise protocol_error(f"data for a request that is not READ (command {request.command})")
            if kind == wire.REPLY_TYPE_OFFSET_DATA:
                self._await(_DATA_PART.size, lambda part: self._data(request, part))
            else:
                self._await(_HOLE_PART.size, lambda part: self._hole(request, part))
        elif kind == wire.REPLY_TYPE_BLOCK_STATUS:
            if request.command != wire.CMD_BLOCK_STATUS:
                raise protocol_error(f"a block status for a request that didn't ask (command {request.command})")
            self._await(wire.U32.size, lambda part: self._status_length(request, part))
        else:
            raise protocol_error(f"a chunk of the unknown type {kind}")

    def _nothing(self, part: bytes) -> None:
        if any(part):
            raise protocol_error(f"an empty chunk with {int.from_bytes(part)} bytes")
        self._end_chunk()

    def _data(self, request: Pending, part: bytes) -> None:
        length, offset = _DATA_PART.unpack(part)
        if length <= 8:
            raise protocol_error(f"a data chunk of {length} bytes, which has no data")
        self._take_data(request, offset, length - 8)

    def _hole(self, request: Pending, part: bytes) -> None:
        length, offset, size = _HOLE_PART.unpack(part)
        if length != _HOLE_PART.size - wire.U32.size or size == 0:
            raise protocol_error(f"a hole of {size} bytes in a chunk of {length}")
        _cover(request, offset, size)
        self._end_chunk()

    def _take_data(self, request: Pending, offset: int, length: int) -> None:
        _cover(request, offset, length)
        start = offset - request.offset
        self._sink = request.into[start : start + length]

    def _advance(self, count: int) -> None:
        self._sink = self._sink[count:]
        if not self._sink:
            self._sink = _NOWHERE  # an empty view would hold on to the caller's buffer
            self._end_chunk()

    def _status_length(self, request: Pending, part: bytes) -> None:
        length = int.from_bytes(part)
        size = wire.DESCRIPTOR.size
        count, rest = divmod(length - wire.U32.size, size)
        if rest or not 0 < count <= MAX_STATUS_EXTENTS:
            raise protocol_error(f"a block status of {length} bytes")
        kept = min(count, KEPT_EXTENTS)
        rest = (count - kept) * size
        self._await(wire.U32.size + kept * size, lambda part: self._status(request, part, rest))

    def _status(self, request: Pending, part: bytes, rest: int) -> None:
        context_id = int.from_bytes(part[: wire.U32.size])
        if context_id not in self._context_ids:
            raise protocol_error(f"a block status of the context {context_id}, which was not negotiated")
        if context_id in request.extents:
            raise protocol_error(f"a second block status of the context {context_id}")
        extents: list[tuple[int, int]] = []
        left = request.length
        for length, flags in wire.DESCRIPTOR.iter_unpack(part[wire.U32.size :]):
            if not length:
                raise protocol_error("an extent of no length")
            if not left:
                raise protocol_error("an extent behind the end of the range that was asked for")
            # The last one may reach beyond what was asked.
            extents.append((min(length, left), flags))
            left -= extents[-1][0]
        if rest and not left:
            raise protocol_error("an extent behind the end of the range that was asked for")
        request.extents[context_id] = extents
        self._skip = rest
        if not rest:
            self._end_chunk()

    def _error_length(self, request: Pending, kind: int, part: bytes) -> None:
        length = int.from_bytes(part)
        if not wire.ERROR_PAYLOAD.size <= length <= MAX_ERROR_BYTES:
            raise protocol_error(f"an error chunk of {length} bytes")
        self._await(length, lambda part: self._error(request, kind, part))

    def _error(self, request: Pending, kind: int, part: bytes) -> None:
        error, length = wire.ERROR_PAYLOAD.unpack_from(part)
        end = wire.ERROR_PAYLOAD.size + length
        extra = {wire.REPLY_TYPE_ERROR: 0, wire.REPLY_TYPE_ERROR_OFFSET: wire.U64.size}.get(kind)
        # Of error types that we don't know only the beginning is known.
        if end > len(part) or (extra is not None and end + extra != len(part)):
            raise protocol_error(f"an error chunk of {len(part)} bytes with a message of {length}")
        if not error:
            raise protocol_error("an error chunk without an error")
        if kind == wire.REPLY_TYPE_ERROR_OFFSET:
            (offset,) = wire.U64.unpack_from(part, end)
            if not request.offset <= offset < request.offset + max(1, request.length):
                raise protocol_error(f"an error at {offset}, which is outside the request")
        _fail(request, error, printable(part[wire.ERROR_PAYLOAD.size : end]))
        self._end_chunk()

    def _end_chunk(self) -> None:
        request = self._current
        assert request is not None
        self._current = None
        self._await(_PART, self._begin)
        if not self._last:
            return
        if not request.error:
            self._judge_complete(request)
        del self._pending[request.cookie]
        self._finished.append(request)

    def _judge_complete(self, request: Pending) -> None:
        if request.command == wire.CMD_READ and request.cover.total != request.length:
            missing = request.length - request.cover.total
            raise protocol_error(f"a reply to READ ends without {missing} of {request.length} bytes")
        if request.command == wire.CMD_BLOCK_STATUS and request.extents.keys() != self._context_ids:
            raise protocol_error("a reply to BLOCK_STATUS ends without all contexts")


def _cover(request: Pending, offset: int, length: int) -> None:
    if offset < request.offset or offset + length > request.offset + request.length:
        raise protocol_error(f"data for the bytes {offset} to {offset + length}, which were not asked for")
    request.cover.add(offset, offset + length)


def _fail(request: Pending, error: int, message: str) -> None:
    """Keep the first error of a request. Values that the protocol doesn't know count as EINVAL, as it says."""
    if not request.error:
        request.error, request.message = _ERRORS.get(error, errno.EINVAL), message


def protocol_error(text: str) -> OSError:
    """The server broke the protocol."""
    return OSError(errno.EPROTO, text)


def errno_of(value: int) -> int:
    """What the protocol's error value means here; EIO for those that it doesn't define."""
    return _ERRORS.get(value, errno.EIO)


def printable(raw: bytes) -> str:
    """A server's text, fit for a terminal or a log."""
    text = raw[: wire.MAX_STRING_BYTES].decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
