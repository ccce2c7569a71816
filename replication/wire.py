"""The bytes of a leg session: what a primary and a replica say to each other about one leg.

Sans IO: functions that make frames, and `take_frame`, which judges what came. docs/replication-protocol.md tells the
conversation. Network byte order everywhere. Nothing here is ever on a disk; a frame that is cut short is no frame.

Frame
  offset size type field
       0    4 u32  MAGIC: "TRL" and the version, 1. An unknown version ends the session with a sentence
       4    2 u16  type (Type)
       6    2 u16  flags: MORE, others are 0
       8    8 u64  number: a sequence (WRITE, LOST, DONE, FLUSHED_BY_ALL), a cookie (requests, their answers), else 0
      16    4 u32  length of the body, at most MAX_BODY_BYTES
      20    4 u32  count: entries of a WRITE, errno of an ERROR (Linux's), 1 in an ACCEPT for `inconsistent`; else 0
      24    -      body

==============  =======  =====================================================================================
type            from     body
==============  =======  =====================================================================================
HELLO           replica  JSON: `Hello`. The first frame of a session, and sent once
BEGIN           primary  JSON: {"line": 16 hex digits, "resumes": bool}. The answer to HELLO
WRITE           primary  `count` entries, then the data of those that have some, in their order. MORE: the batch
                         goes on in another WRITE of the same sequence
LOST            primary  RANGE; at most MAX_LOST_BYTES. A batch by itself, like a WRITE: no leg has what should be
                         there, so these blocks are EIO for readers until they are written. Answered by DONE
DONE            replica  none. All batches up to `number` are in the replica's kernel
FLUSH           primary  none. All before it in the stream is to be durable
FLUSHED_BY_ALL  primary  none. Batches up to `number` are durable at each leg; 0: forget nothing. Not answered
READ            primary  RANGE; at most MAX_READ_BYTES. Answered with the data
CHECKS          primary  RANGE; at most MAX_CHECKS_BYTES. Answered with 8 bytes for each block
MAPPED          primary  RANGE. Answered with RANGEs within it, in order, MAX_MAPPED at most
CHANGED         primary  JSON: names of trackers. Answered with the union, encoded as the engine does
ACCEPT          primary  a membership as `replication.membership` encodes it
RESIZE          primary  u64, the size in bytes
SNAPSHOT        primary  the name, UTF-8
PING            primary  none. Answered with PONG, also for the lease
PONG            replica  none
WORKING         replica  none. A request takes its time, and is being worked on
ANSWER          replica  what the request is answered with. MORE: it goes on in another one with the same cookie
ERROR           both     a sentence, UTF-8. Of the request with that cookie; with cookie 0 of the session, which ends
GOODBYE         primary  none. Nothing more will come; the leg may be closed cleanly
==============  =======  =====================================================================================

Entry of a WRITE: whole blocks within the volume
  offset size type field
       0    8 u64  offset in bytes
       8    8 u64  length in bytes, not 0
      16    4 u32  kind: 0 data, which follow the entries; 1 zeros, without data

RANGE
       0    8 u64  offset in bytes
       8    8 u64  length in bytes, not 0
"""

from __future__ import annotations

import enum
import errno
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Any, Final

from replication.leg import BLOCK_BYTES, Change, Position
from replication.membership import Membership, Term, decode, encode

HEAD: Final = Struct(">QQII")
HEAD_BYTES: Final = 24
assert HEAD.size == HEAD_BYTES
ENTRY: Final = Struct(">QQI")
ENTRY_BYTES: Final = 20
assert ENTRY.size == ENTRY_BYTES
RANGE: Final = Struct(">QQ")
assert RANGE.size == 16
SIZE: Final = Struct(">Q")

VERSION: Final = 1
MAGIC: Final = 0x54524C00 | VERSION
MORE: Final = 1

MAX_ENTRIES: Final = 1000
"""In one WRITE frame: what a pwritev takes, and a pass of the NBD server has."""
PIECE_BYTES: Final = 512 << 10
"""Most data in one WRITE frame: as the NBD server writes long WRITEs in pieces of this size."""
MAX_BODY_BYTES: Final = PIECE_BYTES + MAX_ENTRIES * ENTRY_BYTES
LONG_FRAME_BYTES: Final = 128 << 10
"""From here on a frame's memory is kept for later ones."""
ANSWER_BYTES: Final = 256 << 10
"""Most in one ANSWER frame."""
MAX_READ_BYTES: Final = 1 << 20
MAX_LOST_BYTES: Final = PIECE_BYTES
"""In one LOST: each block is logged by itself."""
MAX_CHECKS_BYTES: Final = 128 << 20
MAX_MAPPED: Final = 16384
MAX_TRACKERS: Final = 32
MAX_CHANGED_BYTES: Final = 8 << 20
"""Of an answer to CHANGED: twice what the engine makes of the largest set."""
MAX_TEXT_BYTES: Final = 2000
MAX_NAME_BYTES: Final = 255
MAX_REQUESTS: Final = 64
"""Without an answer yet, at a time."""
OPTION_VERSION: Final = 1

DATA: Final = 0
ZEROS: Final = 1


class Type(enum.IntEnum):
    """Of a frame."""

    HELLO = 1
    BEGIN = 2
    WRITE = 3
    DONE = 4
    FLUSH = 5
    FLUSHED_BY_ALL = 6
    READ = 7
    CHECKS = 8
    MAPPED = 9
    CHANGED = 10
    ACCEPT = 11
    RESIZE = 12
    SNAPSHOT = 13
    PING = 14
    PONG = 15
    WORKING = 16
    ANSWER = 17
    ERROR = 18
    GOODBYE = 19
    LOST = 20


REQUESTS: Final = frozenset(
    {Type.FLUSH, Type.READ, Type.CHECKS, Type.MAPPED, Type.CHANGED, Type.ACCEPT, Type.RESIZE, Type.SNAPSHOT}
)
"""These have a cookie and are answered."""
ORDERED: Final = frozenset({Type.ACCEPT, Type.RESIZE, Type.SNAPSHOT})
"""Of these: take effect in the stream's order, and are not repeated when they come again after a resumption."""
FROM_PRIMARY: Final = REQUESTS | {
    Type.BEGIN,
    Type.WRITE,
    Type.LOST,
    Type.FLUSHED_BY_ALL,
    Type.PING,
    Type.ERROR,
    Type.GOODBYE,
}
FROM_REPLICA: Final = frozenset(
    {Type.HELLO, Type.DONE, Type.PONG, Type.WORKING, Type.ANSWER, Type.ERROR},
)
_LONGEST: Final[dict[Type, int]] = {
    Type.HELLO: 256 << 10,
    Type.BEGIN: 1000,
    Type.WRITE: MAX_BODY_BYTES,
    Type.LOST: RANGE.size,
    Type.READ: RANGE.size,
    Type.CHECKS: RANGE.size,
    Type.MAPPED: RANGE.size,
    Type.CHANGED: 8000,
    Type.ACCEPT: 256 << 10,
    Type.RESIZE: SIZE.size,
    Type.SNAPSHOT: MAX_NAME_BYTES,
    Type.ANSWER: ANSWER_BYTES,
    Type.ERROR: MAX_TEXT_BYTES,
}
"""Types that aren't here have no body."""
_MAY_GO_ON: Final = frozenset({Type.WRITE, Type.ANSWER})


def head_of(kind: Type, flags: int = 0) -> int:
    """The first eight bytes of a frame as one number, so that one comparison recognises a plain WRITE or DONE."""
    return MAGIC << 32 | kind << 16 | flags


WRITE_HEAD: Final = head_of(Type.WRITE)
WRITE_MORE_HEAD: Final = head_of(Type.WRITE, MORE)
LOST_HEAD: Final = head_of(Type.LOST)
DONE_HEAD: Final = head_of(Type.DONE)
_TYPES: Final = {
    head_of(kind, flags): (kind, flags) for kind in Type for flags in ((0, MORE) if kind in _MAY_GO_ON else (0,))
}


class BreachError(OSError):
    """The peer breaks the protocol (EPROTO); prints as its sentence."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.EPROTO, text)

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(slots=True)
class Frame:
    """One that was judged; `body` is a view of what it was taken from."""

    kind: Type
    number: int
    count: int
    more: bool
    body: memoryview

    @property
    def size_bytes(self) -> int:
        """Of all of it."""
        return HEAD_BYTES + len(self.body)


def take_frame(buffer: bytearray, start: int, end: int, allowed: frozenset[Type]) -> Frame | int:
    """The frame at `start`; or how many bytes there must be until it is worth asking again.

    `allowed`: the types that this side may receive. Raises BreachError. A WRITE's entries are `judge_entries`' affair.
    """
    if end - start < HEAD_BYTES:
        return HEAD_BYTES
    head: int
    number: int
    length: int
    count: int
    head, number, length, count = HEAD.unpack_from(buffer, start)
    known = _TYPES.get(head)
    if known is None:
        raise BreachError(_unknown(head))
    kind, flags = known
    if kind not in allowed:
        raise BreachError(f"a {kind.name} must not come from this side")
    if length > _LONGEST.get(kind, 0):
        raise BreachError(f"a {kind.name} of {length} bytes; {_LONGEST.get(kind, 0)} are the most")
    if end - start < HEAD_BYTES + length:
        return HEAD_BYTES + length
    if kind in REQUESTS and not number:
        raise BreachError(f"a {kind.name} without a cookie")
    body = memoryview(buffer)[start + HEAD_BYTES : start + HEAD_BYTES + length]
    return Frame(kind, number, count, bool(flags & MORE), body)


def _unknown(head: int) -> str:
    magic, kind = head >> 32, head >> 16 & 0xFFFF
    if magic >> 8 != MAGIC >> 8:
        return "what came is no frame of a leg session"
    if magic != MAGIC:
        return f"the other side speaks version {magic & 255} of leg sessions, and {VERSION} is understood here"
    return f"a frame of type {kind} with flags {head & 0xFFFF:#x} is unknown in version {VERSION}"


# --- batches ---


class Buffers:
    """Memory for long frames, used again: to get and to give back half a MiB costs more than to fill it.

    4 x 1 MiB writes in flight over loopback cost the primary 540 us of CPU each without it, 220 to 280 with it.
    """

    SPARE: Final = 8

    def __init__(self) -> None:
        self._spare: list[bytearray] = []

    def join(self, parts: Sequence[bytes | memoryview], size: int) -> bytes | memoryview:
        """Their bytes, `size` altogether."""
        if size < LONG_FRAME_BYTES:
            return b"".join(parts)
        view = memoryview(self._spare.pop() if self._spare else bytearray(HEAD_BYTES + MAX_BODY_BYTES))[:size]
        at = 0
        for part in parts:
            end = at + len(part)
            view[at:end] = part
            at = end
        return view

    def give_back(self, frame: bytes | memoryview) -> None:
        """Nobody needs this frame any more."""
        if len(frame) >= LONG_FRAME_BYTES and len(self._spare) < self.SPARE:
            assert isinstance(frame, memoryview) and isinstance(frame.obj, bytearray)
            self._spare.append(frame.obj)


def is_lasting(changes: Sequence[Change]) -> bool:
    """Whether `pack_batch` makes no copy of them."""
    first = changes[0]
    return first.lasting and len(changes) == 1 and first.data is not None and first.length <= PIECE_BYTES


def pack_batch(sequence: int, changes: Sequence[Change], buffers: Buffers) -> list[bytes | memoryview]:
    """A batch's WRITE frames, each within the bounds; they leave one behind the other. The data are copied, once.

    Not those of a single lasting change: they leave behind their frame's head, as they are.
    """
    if is_lasting(changes):
        offset, length, data = changes[0].offset, changes[0].length, changes[0].data
        assert data is not None
        head = HEAD.pack(WRITE_HEAD, sequence, ENTRY_BYTES + length, 1)
        return [head + ENTRY.pack(offset, length, DATA), data]
    if changes[0].lost:
        assert len(changes) == 1 and changes[0].length <= MAX_LOST_BYTES
        return [HEAD.pack(LOST_HEAD, sequence, RANGE.size, 0) + RANGE.pack(changes[0].offset, changes[0].length)]
    if len(changes) <= MAX_ENTRIES:
        size = 0
        table: list[bytes] = []
        parts: list[bytes | memoryview] = [b"", b""]
        pack = ENTRY.pack
        for change in changes:
            data = change.data
            if data is None:
                table.append(pack(change.offset, change.length, ZEROS))
            else:
                table.append(pack(change.offset, change.length, DATA))
                size += change.length
                parts.append(data)
        if size <= PIECE_BYTES:
            body = len(table) * ENTRY_BYTES + size
            parts[0] = HEAD.pack(WRITE_HEAD, sequence, body, len(table))
            parts[1] = b"".join(table)
            return [buffers.join(parts, HEAD_BYTES + body)]
    return _pack_long(sequence, changes, buffers)


def _pack_long(sequence: int, changes: Sequence[Change], buffers: Buffers) -> list[bytes | memoryview]:
    frames: list[tuple[list[bytes], list[memoryview], int]] = [([], [], 0)]
    for change in changes:
        at = 0
        while at < change.length:
            table, data, size = frames[-1]
            if len(table) == MAX_ENTRIES or size == PIECE_BYTES:
                frames.append(([], [], 0))
                continue
            length = change.length - at
            if change.data is not None:
                length = min(length, PIECE_BYTES - size)
                data.append(change.data[at : at + length])
                size += length
            table.append(ENTRY.pack(change.offset + at, length, ZEROS if change.data is None else DATA))
            frames[-1] = (table, data, size)
            at += length
    packed = []
    for index, (table, data, size) in enumerate(frames):
        head = WRITE_HEAD if index == len(frames) - 1 else WRITE_MORE_HEAD
        body = len(table) * ENTRY_BYTES + size
        packed.append(buffers.join([HEAD.pack(head, sequence, body, len(table)), *table, *data], HEAD_BYTES + body))
    return packed


Entry = tuple[int, int, memoryview | None]
"""(offset, length, data); None: zeros."""


def judge_entries(body: memoryview, count: int, size_bytes: int, into: list[Entry]) -> None:
    """Add a WRITE's entries to `into`. `size_bytes` is the volume's. Raises BreachError; then nothing was added."""
    at = count * ENTRY_BYTES
    if not 0 < count <= MAX_ENTRIES or at > len(body):
        raise BreachError(f"a WRITE of {count} entries in {len(body)} bytes")
    entries: list[Entry] = []
    add = entries.append
    for offset, length, kind in ENTRY.iter_unpack(body[:at]):
        if not length or (offset | length) % BLOCK_BYTES or offset + length > size_bytes:
            raise BreachError(f"a write of {length} bytes at {offset} to a volume of {size_bytes}: whole blocks only")
        if kind == DATA:
            start, at = at, at + length
            add((offset, length, body[start:at]))
        elif kind == ZEROS:
            add((offset, length, None))
        else:
            raise BreachError(f"a WRITE of the unknown kind {kind}")
    if at != len(body):
        raise BreachError(f"the WRITE's entries need {at} bytes, and it has {len(body)}")
    into += entries


# --- other frames ---


def pack(kind: Type, number: int = 0, body: bytes | memoryview = b"", *, count: int = 0, more: bool = False) -> bytes:
    """Any frame; `body` is within the type's bound."""
    assert len(body) <= _LONGEST.get(kind, 0), (kind, len(body))
    head = HEAD.pack(head_of(kind, MORE if more else 0), number, len(body), count)
    return b"".join((head, body)) if body else head


def pack_answer(cookie: int, body: bytes | bytearray | memoryview) -> list[bytes]:
    """One frame or more."""
    view = memoryview(body)
    frames = []
    while len(view) > ANSWER_BYTES:
        frames.append(pack(Type.ANSWER, cookie, view[:ANSWER_BYTES], more=True))
        view = view[ANSWER_BYTES:]
    return [*frames, pack(Type.ANSWER, cookie, view)]


def pack_error(error: OSError, cookie: int = 0) -> bytes:
    """Of a request, or of the session."""
    text = (error.strerror or str(error)).encode(errors="replace")[:MAX_TEXT_BYTES]
    return pack(Type.ERROR, cookie, text, count=error.errno or errno.EIO)


def read_error(frame: Frame) -> OSError:
    """What an ERROR says."""
    text = bytes(frame.body).decode(errors="replace")
    return OSError(frame.count if frame.count in errno.errorcode else errno.EIO, text or "no reason was given")


def read_range(frame: Frame, size_bytes: int, longest: int | None = None) -> tuple[int, int]:
    """(offset, length) of a READ, CHECKS, MAPPED or LOST. Raises OSError EINVAL, which answers it; BreachError."""
    if len(frame.body) != RANGE.size:
        raise BreachError(f"a {frame.kind.name} with a body of {len(frame.body)} bytes")
    offset, length = RANGE.unpack(frame.body)
    if not length or (offset | length) % BLOCK_BYTES or offset + length > size_bytes or length > (longest or length):
        raise OSError(
            errno.EINVAL, f"a {frame.kind.name} of {length} bytes at {offset} of {size_bytes}: whole blocks in it only"
        )
    return offset, length


def read_ranges(body: bytes | bytearray, offset: int, length: int) -> list[tuple[int, int]]:
    """An answer to MAPPED of that range: in order, within it, and about some of it. Raises BreachError."""
    if len(body) % RANGE.size:
        raise BreachError(f"an answer to MAPPED of {len(body)} bytes")
    ranges = [(start, size) for start, size in RANGE.iter_unpack(body)]
    at, stop = offset, offset + length
    for start, size in ranges:
        if not at <= start <= start + size <= stop:
            raise BreachError(f"{size} bytes at {start} in an answer to MAPPED of {length} bytes at {offset}")
        at = start + size
    if at == offset:
        raise BreachError(f"an answer to MAPPED of {length} bytes at {offset} that says nothing of it")
    return ranges


def pack_names(names: Iterable[str]) -> bytes:
    """The body of a CHANGED."""
    return json.dumps(list(names)).encode()


def read_names(frame: Frame) -> list[str]:
    """Of a CHANGED. Raises BreachError."""
    names = _json(frame.body, "a CHANGED")
    if not isinstance(names, list) or len(names) > MAX_TRACKERS or not all(isinstance(name, str) for name in names):
        raise BreachError("a CHANGED that is no list of names")
    return names


def read_size(frame: Frame) -> int:
    """Of a RESIZE. Raises BreachError."""
    if len(frame.body) != SIZE.size:
        raise BreachError(f"a RESIZE with a body of {len(frame.body)} bytes")
    size: int = SIZE.unpack(frame.body)[0]
    if not size or size % BLOCK_BYTES:
        raise BreachError(f"a RESIZE to {size} bytes: whole blocks only")
    return size


def read_name(frame: Frame) -> str:
    """Of a SNAPSHOT. Raises BreachError."""
    try:
        return bytes(frame.body).decode()
    except ValueError:
        raise BreachError("a snapshot's name that is no UTF-8") from None


def read_membership(frame: Frame) -> Membership:
    """Of an ACCEPT. Raises OSError EPROTO."""
    return decode(bytes(frame.body))


def _json(body: bytes | memoryview, what: str) -> Any:
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise BreachError(f"{what} can't be understood: {error}") from None


# --- the beginning of a session ---


@dataclass(frozen=True)
class Hello:
    """What a replica says first: all that a primary must know before it sends anything."""

    leg: str
    """Its id."""
    size_bytes: int
    intact: bool
    """It has all that it ever took."""
    inconsistent: bool
    """It was being resynced, and is no state that the volume ever had."""
    position: Position | None
    """The last batch that it has, if it knows exactly: it is the process that took it, or was closed cleanly."""
    line: str | None
    """Of which line of sessions that is; None if it was closed since."""
    accepted: Membership | None
    promised: Term | None = None

    def encode(self) -> bytes:
        """As JSON in UTF-8."""
        position = self.position
        plain = {
            "leg": self.leg,
            "size": self.size_bytes,
            "intact": self.intact,
            "inconsistent": self.inconsistent,
            "position": position and [*_plain_term(position.term), position.sequence],
            "line": self.line,
            "promised": self.promised and _plain_term(self.promised),
            "accepted": self.accepted and json.loads(encode(self.accepted)),
        }
        return json.dumps(plain, separators=(",", ":")).encode()


def read_hello(frame: Frame) -> Hello:
    """Raises OSError EPROTO with a sentence."""
    plain = _json(frame.body, "a HELLO")
    try:
        position, promised, accepted = plain["position"], plain["promised"], plain["accepted"]
        return Hello(
            leg=_is(plain["leg"], str),
            size_bytes=_is(plain["size"], int),
            intact=_is(plain["intact"], bool),
            inconsistent=_is(plain["inconsistent"], bool),
            position=None if position is None else Position(_term(position[:2]), _is(position[2], int)),
            line=None if plain["line"] is None else _is(plain["line"], str),
            promised=None if promised is None else _term(promised),
            accepted=None if accepted is None else decode(json.dumps(accepted).encode()),
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise BreachError(f"a HELLO can't be understood: {error!r}") from None


def pack_begin(line: str, *, resumes: bool) -> bytes:
    """The answer to HELLO. `line`: what the sessions that one leg object has, one after the other, have in common."""
    return pack(Type.BEGIN, 0, json.dumps({"line": line, "resumes": resumes}).encode())


def read_begin(frame: Frame) -> tuple[str, bool]:
    """(line, resumes). Raises BreachError."""
    plain = _json(frame.body, "a BEGIN")
    try:
        return _is(plain["line"], str), _is(plain["resumes"], bool)
    except (ValueError, KeyError, TypeError) as error:
        raise BreachError(f"a BEGIN can't be understood: {error!r}") from None


# --- the option that takes a connection over ---


@dataclass(frozen=True)
class LegOption:
    """The connection is to be a session on a leg."""

    node: str
    """Who asks."""
    mirror: str
    leg: str
    term: Term
    session: str
    """Any text, for the log; a later session takes the place of an earlier one whatever it is."""

    def encode(self) -> bytes:
        """As JSON in UTF-8."""
        plain = {
            "version": OPTION_VERSION,
            "node": self.node,
            "kind": "leg",
            "mirror": self.mirror,
            "leg": self.leg,
            "term": _plain_term(self.term),
            "session": self.session,
        }
        return json.dumps(plain, separators=(",", ":")).encode()


@dataclass(frozen=True)
class CallsOption:
    """The connection is to carry calls."""

    node: str
    """Who asks."""

    def encode(self) -> bytes:
        """As JSON in UTF-8."""
        return json.dumps({"version": OPTION_VERSION, "node": self.node, "kind": "calls"}).encode()


def read_option(data: bytes) -> LegOption | CallsOption:
    """Judges the option's data. Raises OSError EPROTO with a sentence, which the peer may be told."""
    plain = _json(data, "what the connection is to be")
    try:
        if plain["version"] != OPTION_VERSION:
            version = plain["version"]
            raise BreachError(f"the node speaks version {version!r:.40}, and {OPTION_VERSION} is understood here")
        node = _is(plain["node"], str)
        if plain["kind"] == "calls":
            return CallsOption(node)
        if plain["kind"] == "leg":
            mirror, leg, session = (_is(plain[key], str) for key in ("mirror", "leg", "session"))
            return LegOption(node, mirror, leg, _term(plain["term"]), session)
        raise BreachError(f"a connection of the unknown kind {plain['kind']!r:.40}")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise BreachError(f"what the connection is to be can't be understood: {error!r:.200}") from None


def _plain_term(term: Term) -> list[Any]:
    return [term.number, term.id]


def _term(plain: Any) -> Term:
    number, id_ = plain
    return Term(_is(number, int), _is(id_, str))


def _is(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r:.60} is no {kind.__name__}")
    return value
