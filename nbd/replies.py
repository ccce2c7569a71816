"""What a server answers to requests, taken apart without IO, and the place where that is judged.

``Replies`` knows the requests in flight (``Pending``). Bytes from the server go in with ``feed``, in
any pieces; it returns the requests whose reply has become complete. The data of a READ goes straight
to where the request wants it, so a caller may receive it there itself: see ``sink``.

Nothing a server says is believed. A reply to what nobody asked, a chunk outside the request's range
or over bytes that came already, a length that doesn't belong to its kind, an end before all is there:
each is ``OSError`` with EPROTO and a sentence, and then the connection can't go on, as nobody knows
where the next reply begins. An error that the server reports for a request is not of this kind; it
is in ``Pending.error``.

Which of the three forms a reply has was settled by the handshake: simple replies, chunks of structured
replies (and simple ones to what carries no data), or chunks with extended headers and nothing else.

Sources: the protocol text's "Simple reply message", "Structured reply chunk message", "Extended reply
chunk message" and "Structured reply types".
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Callable, Mapping
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

_PART: Final = wire.SIMPLE_REPLY.size  # simple and structured replies have at least so many bytes
_HOLE: Final = Struct(">QI")  # offset, length of the hole
_MAGIC_BYTES: Final = wire.U32.size
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
    context_ids: frozenset[int] | None = None
    """The contexts that BLOCK_STATUS asks for; None: all."""
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

    def __init__(
        self, *, structured: bool, contexts: Mapping[int, str], extended: bool = False, minimum_block_size: int = 1
    ) -> None:
        """What the handshake settled; ``contexts`` are the names of those that were selected, by their ids."""
        self._structured = structured
        self._extended = extended
        self._minimum_block_size = minimum_block_size
        self._context_ids = frozenset(contexts)
        self._narrow_ids = {number for number, name in contexts.items() if name.startswith(wire.META_NAMESPACE)}
        self._pending: dict[int, Pending] = {}
        self._finished: list[Pending] = []
        self._held = bytearray()  # of a fixed part that isn't complete
        self._head_size, self._begin = (
            (wire.EXTENDED_CHUNK.size, self._begin_extended) if extended else (_PART, self._begin_compact)
        )
        self._need = self._head_size
        self._then: Callable[[bytes], None] = self._begin
        self._sink = _NOWHERE
        self._skip = 0
        self._current: Pending | None = None  # whose chunk is being read; None between chunks
        self._last = True  # the chunk that is being read ends its reply
        self._kind = 0
        self._length = 0
        self._take: Callable[[Pending, int, bytes], None] = self._nothing

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
                elif self._current is None and len(self._held) >= _MAGIC_BYTES:
                    # Who doesn't speak the protocol may never send the rest of a header.
                    self._judge_magic(int.from_bytes(self._held[:_MAGIC_BYTES]))
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

    def _begin_compact(self, part: bytes) -> None:
        head, cookie = wire.SIMPLE_REPLY.unpack(part)
        magic = head >> 32
        self._judge_magic(magic)
        request = self._find(cookie)
        if magic == wire.SIMPLE_REPLY_MAGIC:
            self._simple(request, head & 0xFFFFFFFF)
        else:
            self._await(wire.U32.size + self._chunk(request, head), self._compact_payload)

    def _compact_payload(self, part: bytes) -> None:
        assert self._current is not None
        self._take(self._current, int.from_bytes(part[: wire.U32.size]), part[wire.U32.size :])

    def _begin_extended(self, part: bytes) -> None:
        head, cookie, offset, length = wire.EXTENDED_CHUNK.unpack(part)
        self._judge_magic(head >> 32)
        request = self._find(cookie)
        if offset != request.offset:
            raise protocol_error(f"a reply with the offset {offset} to a request with the offset {request.offset}")
        first = self._chunk(request, head)
        if length < first:
            raise protocol_error(f"a chunk of the type {self._kind} with {length} bytes")
        if first:
            self._length = length
            self._await(first, self._extended_payload)
        else:
            self._take(request, length, b"")

    def _extended_payload(self, part: bytes) -> None:
        assert self._current is not None
        self._take(self._current, self._length, part)

    def _judge_magic(self, magic: int) -> None:
        if self._extended:
            if magic == wire.EXTENDED_REPLY_MAGIC:
                return
            if magic in (wire.SIMPLE_REPLY_MAGIC, wire.STRUCTURED_REPLY_MAGIC):
                raise protocol_error("a reply without an extended header after extended headers were negotiated")
        elif magic == wire.SIMPLE_REPLY_MAGIC or (magic == wire.STRUCTURED_REPLY_MAGIC and self._structured):
            return
        elif magic == wire.STRUCTURED_REPLY_MAGIC:
            raise protocol_error("a structured reply, which was not negotiated")
        elif magic == wire.EXTENDED_REPLY_MAGIC:
            raise protocol_error("a reply with an extended header, which was not negotiated")
        raise protocol_error(f"not an NBD reply (magic {magic:#010x})")

    def _find(self, cookie: int) -> Pending:
        request = self._pending.get(cookie)
        if request is None:
            raise protocol_error(f"a reply with the cookie {cookie:#x}, which no request has")
        self._current = request
        return request

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

    def _chunk(self, request: Pending, head: int) -> int:
        """Judge the kind of a chunk; returns how much of its payload ``_take`` wants first.

        Flags that we don't know are passed over, as the protocol demands.
        """
        request.chunked = True
        self._last = bool(head >> 16 & wire.REPLY_FLAG_DONE)
        self._kind = kind = head & 0xFFFF
        if kind == wire.REPLY_TYPE_OFFSET_DATA or kind == wire.REPLY_TYPE_OFFSET_HOLE:
            if request.command != wire.CMD_READ:
                raise protocol_error(f"data for a request that is not READ (command {request.command})")
            if kind == wire.REPLY_TYPE_OFFSET_DATA:
                self._take = self._data
                return wire.U64.size
            self._take = self._hole
            return wire.HOLE_PAYLOAD_BYTES
        if kind & _ERROR_BIT:
            self._take = self._error_length
        elif kind == wire.REPLY_TYPE_NONE:
            if not self._last:
                raise protocol_error("an empty chunk that doesn't end its reply")
            self._take = self._nothing
        elif kind in (wire.REPLY_TYPE_BLOCK_STATUS, wire.REPLY_TYPE_BLOCK_STATUS_EXT):
            if request.command != wire.CMD_BLOCK_STATUS:
                raise protocol_error(f"a block status for a request that didn't ask (command {request.command})")
            if self._extended is not (kind == wire.REPLY_TYPE_BLOCK_STATUS_EXT):
                wide = "without extended headers" if not self._extended else "of 32 bits with extended headers"
                raise protocol_error(f"a block status of the type {kind} {wide}")
            self._take = self._status_length
        else:
            raise protocol_error(f"a chunk of the unknown type {kind}")
        return 0

    # --- the kinds of chunks: `length` of the payload, and of this what was asked for ---

    def _nothing(self, request: Pending, length: int, part: bytes) -> None:
        if length:
            raise protocol_error(f"an empty chunk with {length} bytes")
        self._end_chunk()

    def _data(self, request: Pending, length: int, part: bytes) -> None:
        (offset,) = wire.U64.unpack(part)
        if length <= wire.U64.size:
            raise protocol_error(f"a data chunk of {length} bytes, which has no data")
        self._take_data(request, offset, length - wire.U64.size)

    def _hole(self, request: Pending, length: int, part: bytes) -> None:
        offset, size = _HOLE.unpack(part)
        if length != wire.HOLE_PAYLOAD_BYTES or size == 0:
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

    def _status_length(self, request: Pending, length: int, part: bytes) -> None:
        head = wire.STATUS_EXT.size if self._extended else wire.U32.size
        size = wire.EXTENDED_DESCRIPTOR.size if self._extended else wire.DESCRIPTOR.size
        count, ragged = divmod(length - head, size)
        if ragged or not 0 < count <= MAX_STATUS_EXTENTS:
            raise protocol_error(f"a block status of {length} bytes")
        kept = min(count, KEPT_EXTENTS)
        rest = (count - kept) * size
        self._await(head + kept * size, lambda part: self._status(request, count, part, rest))

    def _status(self, request: Pending, count: int, part: bytes, rest: int) -> None:
        context_id = int.from_bytes(part[: wire.U32.size])
        if context_id not in self._context_ids:
            raise protocol_error(f"a block status of the context {context_id}, which was not negotiated")
        if request.context_ids is not None and context_id not in request.context_ids:
            raise protocol_error(f"a block status of the context {context_id}, which was not asked for")
        if context_id in request.extents:
            raise protocol_error(f"a second block status of the context {context_id}")
        if self._extended:
            _, told = wire.STATUS_EXT.unpack_from(part)
            if told != count:
                raise protocol_error(f"a block status of {count} extents that claims to have {told}")
            found = wire.EXTENDED_DESCRIPTOR.iter_unpack(part[wire.STATUS_EXT.size :])
        else:
            found = wire.DESCRIPTOR.iter_unpack(part[wire.U32.size :])
        widest = 0xFFFFFFFF if context_id in self._narrow_ids else 0xFFFFFFFFFFFFFFFF
        ragged = self._minimum_block_size - 1
        extents: list[tuple[int, int]] = []
        left = request.length
        for length, flags in found:
            if not length:
                raise protocol_error("an extent of no length")
            if not left:
                raise protocol_error("an extent behind the end of the range that was asked for")
            if flags > widest:
                raise protocol_error(f"flags {flags:#x} of a context whose flags have 32 bits")
            # The last one may reach beyond what was asked.
            length = min(length, left)
            if length & ragged:
                raise protocol_error(f"an extent of {length} bytes with blocks of {self._minimum_block_size}")
            extents.append((length, flags))
            left -= length
        if rest and not left:
            raise protocol_error("an extent behind the end of the range that was asked for")
        request.extents[context_id] = extents
        self._skip = rest
        if not rest:
            self._end_chunk()

    def _error_length(self, request: Pending, length: int, part: bytes) -> None:
        if not wire.ERROR_PAYLOAD.size <= length <= MAX_ERROR_BYTES:
            raise protocol_error(f"an error chunk of {length} bytes")
        self._await(length, lambda part: self._error(request, part))

    def _error(self, request: Pending, part: bytes) -> None:
        kind = self._kind
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
        self._await(self._head_size, self._begin)
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
        if request.command == wire.CMD_BLOCK_STATUS:
            wanted = self._context_ids if request.context_ids is None else request.context_ids
            if request.extents.keys() != wanted:
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
