"""What a request may ask and what a reply looks like: pure functions of bytes and numbers.

``judge`` is the one place where a request is checked; what it lets through has a known command,
only flags that belong to it, and a range inside the export. Replies are encoded here too, in the
one form that the handshake settled (``Session``):

========== ================ ==========================================================================
form       requests         replies
========== ================ ==========================================================================
simple     28 bytes         16 bytes, and the data of a READ
structured 28 bytes         chunks for READ, BLOCK_STATUS and every error; simple ones for the rest
extended   32 bytes         chunks of 32 bytes, which echo the request's offset, for everything
========== ================ ==========================================================================

Sources: the protocol text's "Request types", "Command flags", "Structured reply types" and "Error values".
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from nbd import wire
from nbd.export import Export

_ALLOWED_FLAGS: Final = {
    # FUA is accepted on every command once it is advertised, as the protocol demands, even where
    # there is nothing to make durable.
    wire.CMD_READ: wire.CMD_FLAG_FUA | wire.CMD_FLAG_DF,
    wire.CMD_WRITE: wire.CMD_FLAG_FUA,
    wire.CMD_FLUSH: wire.CMD_FLAG_FUA,
    wire.CMD_TRIM: wire.CMD_FLAG_FUA,
    wire.CMD_CACHE: wire.CMD_FLAG_FUA,
    wire.CMD_WRITE_ZEROES: wire.CMD_FLAG_FUA | wire.CMD_FLAG_NO_HOLE | wire.CMD_FLAG_FAST_ZERO,
    wire.CMD_BLOCK_STATUS: wire.CMD_FLAG_FUA | wire.CMD_FLAG_REQ_ONE,
}
_MODIFYING: Final = frozenset({wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES})

_ERRORS: Final = {
    errno.EPERM: wire.EPERM,
    errno.EACCES: wire.EPERM,
    errno.EROFS: wire.EPERM,
    errno.ENOMEM: wire.ENOMEM,
    errno.EINVAL: wire.EINVAL,
    errno.ENOSPC: wire.ENOSPC,
    errno.EDQUOT: wire.ENOSPC,
    errno.EFBIG: wire.ENOSPC,
    errno.ESHUTDOWN: wire.ESHUTDOWN,
}

EXTENT_LIMIT: Final = 1 << 14
"""Most extents in one BLOCK_STATUS reply, all contexts together: 128 or 256 KiB. The protocol has 2^20 for each."""


Contexts = tuple[tuple[int, str], ...]
"""Id and name of each."""


@dataclass(frozen=True, slots=True)
class Session:
    """What the handshake settled: how requests and replies look, and what BLOCK_STATUS tells."""

    structured: bool = False
    contexts: Contexts = ()  # all that were selected
    extended: bool = False  # implies `structured`

    def __post_init__(self) -> None:
        assert self.structured or not self.extended


class Form(NamedTuple):
    """What the data path has to know of a form: looked up once for many requests, so that none needs to ask."""

    request_bytes: int
    unpack: Callable[[memoryview, int], tuple[int, ...]]
    """The request at a place: its first eight bytes as a number, cookie, offset, length."""
    unpack_all: Callable[[memoryview], Iterator[tuple[int, ...]]]
    magic: int
    read_head: int
    """The first eight bytes of a READ without flags."""
    write_head: int
    """Of a WRITE without flags but the one that it may have to have; with FUA: ``| wire.FUA_BIT``."""
    data_header_bytes: int
    """What stands before the data of a READ that is answered in one piece."""


def _form(compact: bool, data_header_bytes: int) -> Form:
    request = wire.REQUEST if compact else wire.EXTENDED_REQUEST
    return Form(
        request.size,
        request.unpack_from,
        request.iter_unpack,
        wire.REQUEST_MAGIC if compact else wire.EXTENDED_REQUEST_MAGIC,
        wire.READ_HEAD if compact else wire.EXTENDED_READ_HEAD,
        wire.WRITE_HEAD if compact else wire.EXTENDED_WRITE_HEAD,
        data_header_bytes,
    )


_SIMPLE: Final = _form(True, wire.SIMPLE_REPLY.size)
_STRUCTURED: Final = _form(True, wire.DATA_CHUNK.size)
_EXTENDED: Final = _form(False, wire.EXTENDED_DATA_CHUNK.size)


def form_of(session: Session) -> Form:
    """The form that the handshake settled."""
    if session.extended:
        return _EXTENDED
    return _STRUCTURED if session.structured else _SIMPLE


def transmission_flags(export: Export, *, structured: bool, filters_status: bool = False) -> int:
    """The 16 bits that tell a client what this export can do.

    ``filters_status``: headers are extended and contexts are selected, so that BLOCK_STATUS may name some of them.
    """
    flags = wire.HAS_FLAGS | wire.SEND_FLUSH | wire.SEND_FUA | wire.SEND_CACHE
    if export.read_only:
        flags |= wire.READ_ONLY
    else:
        flags |= wire.SEND_TRIM | wire.SEND_WRITE_ZEROES | wire.SEND_FAST_ZERO
    if export.rotational:
        flags |= wire.ROTATIONAL
    if export.can_multi_conn:
        flags |= wire.CAN_MULTI_CONN
    if structured:
        flags |= wire.SEND_DF
    if filters_status:
        flags |= wire.BLOCK_STATUS_PAYLOAD
    return flags


def payload_limit(export: Export) -> int:
    """The longest READ or WRITE in bytes that this export takes."""
    return min(export.maximum_payload, wire.MAX_PAYLOAD_BYTES)


def payload_bytes(session: Session, command: int, flags: int, length: int) -> int:
    """How many bytes of payload follow a request, right or wrong."""
    if session.extended:
        return length if flags & wire.CMD_FLAG_PAYLOAD_LEN else 0
    return length if command == wire.CMD_WRITE else 0


def is_absurd(session: Session, payload: int) -> bool:
    """Whether a request announces so much payload that the connection should end at once.

    The protocol has this for extended headers only, above "a server's advertised or default maximum payload length",
    and says elsewhere that 32 MiB are never absurd. So between what the export takes and 32 MiB it is thrown away and
    answered with EINVAL, as any length is with compact headers.
    """
    return session.extended and payload > wire.MAX_PAYLOAD_BYTES


def judge(session: Session, export: Export, command: int, flags: int, offset: int, length: int) -> int:
    """Return 0 if the request may be carried out, else the error value its reply must carry.

    A payload follows the header whatever the verdict is: the caller drains it. Where a BLOCK_STATUS has one that
    ``may_filter``, the caller judges it without CMD_FLAG_PAYLOAD_LEN, and with the length that ``narrow`` finds.
    """
    if session.extended and command == wire.CMD_WRITE:
        if not flags & wire.CMD_FLAG_PAYLOAD_LEN:
            return wire.EINVAL
        flags ^= wire.CMD_FLAG_PAYLOAD_LEN
    allowed = _ALLOWED_FLAGS.get(command)
    if allowed is None or flags & ~allowed:
        return wire.EINVAL
    if flags & wire.CMD_FLAG_DF and not session.structured:
        return wire.EINVAL
    if command == wire.CMD_BLOCK_STATUS and not session.contexts:
        return wire.EINVAL
    return judge_range(session, export, command, offset, length)


def judge_range(session: Session, export: Export, command: int, offset: int, length: int) -> int:
    """The same, of a known command, but for its flags: what may change while a long request is carried out."""
    if command == wire.CMD_FLUSH:
        return wire.EINVAL if offset or length else 0
    if export.read_only and command in _MODIFYING:
        return wire.EPERM
    if offset + length > export.size_bytes:
        return wire.ENOSPC if command in (wire.CMD_WRITE, wire.CMD_WRITE_ZEROES) else wire.EINVAL
    if (offset | length) & (export.minimum_block_size - 1):
        return wire.EINVAL
    if command in (wire.CMD_READ, wire.CMD_WRITE) and length > payload_limit(export):
        # EOVERFLOW is only for READ, and only where DF is understood.
        return wire.EOVERFLOW if command == wire.CMD_READ and session.structured else wire.EINVAL
    if command == wire.CMD_BLOCK_STATUS and length == 0:
        return wire.EINVAL  # a status needs at least one extent, and none may be empty
    return 0


def may_filter(session: Session, command: int, payload: int) -> bool:
    """Whether so many bytes of payload may be those by which a BLOCK_STATUS asks for some contexts only.

    That is a length and at least one id. No more than were selected: else one is unknown, or is there twice.
    """
    ids, odd = divmod(payload - wire.STATUS_FILTER.size, wire.U32.size)
    return command == wire.CMD_BLOCK_STATUS and not odd and 0 < ids <= len(session.contexts)


def narrow(session: Session, payload: bytes) -> tuple[int, Contexts] | None:
    """The length and the contexts that a payload which ``may_filter`` asks for.

    None if it names one twice, or one that wasn't selected.
    """
    (length,) = wire.STATUS_FILTER.unpack_from(payload)
    wanted = [number for (number,) in wire.U32.iter_unpack(payload[wire.STATUS_FILTER.size :])]
    selected = dict(session.contexts)
    if len(set(wanted)) < len(wanted) or not selected.keys() >= set(wanted):
        return None
    return length, tuple((number, selected[number]) for number in wanted)


def error_value(error: OSError, *, fast_zero: bool = False) -> int:
    """The protocol's value for a failure; ENOTSUP only where a client asked for FAST_ZERO."""
    if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP):
        return wire.ENOTSUP if fast_zero else wire.EINVAL
    return _ERRORS.get(error.errno or errno.EIO, wire.EIO)


def read_header(session: Session, cookie: int, offset: int, length: int) -> bytes:
    """What precedes the data of a successful READ that is answered in one piece.

    In chunks it is one data chunk marked DONE (or none, if the READ was empty), so it must not be
    sent before the data is known to be good.
    """
    if not session.structured:
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_HEAD, cookie)
    if length == 0:
        return chunk(session, wire.REPLY_TYPE_NONE, cookie, offset, b"", done=True)
    return data_header(session, cookie, offset, offset, length, done=True)


def data_header(session: Session, cookie: int, asked: int, offset: int, length: int, *, done: bool) -> bytes:
    """What precedes ``length`` bytes of data from ``offset``, of a READ at ``asked``; not where replies are simple."""
    head = wire.REPLY_TYPE_OFFSET_DATA | (wire.DONE_BIT if done else 0)
    payload = length + wire.DATA_PREFIX_BYTES
    if session.extended:
        return wire.EXTENDED_DATA_CHUNK.pack(wire.EXTENDED_HEAD | head, cookie, asked, payload, offset)
    return wire.DATA_CHUNK.pack(wire.CHUNK_HEAD | head, cookie, payload, offset)


def hole(session: Session, cookie: int, asked: int, offset: int, length: int, *, done: bool) -> bytes:
    """The chunk for ``length`` zero bytes from ``offset``, of a READ at ``asked``; not where replies are simple."""
    head = wire.REPLY_TYPE_OFFSET_HOLE | (wire.DONE_BIT if done else 0)
    size = wire.HOLE_PAYLOAD_BYTES
    if session.extended:
        return wire.EXTENDED_HOLE_CHUNK.pack(wire.EXTENDED_HEAD | head, cookie, asked, size, offset, length)
    return wire.HOLE_CHUNK.pack(wire.CHUNK_HEAD | head, cookie, size, offset, length)


def chunk(session: Session, kind: int, cookie: int, asked: int, payload: bytes, *, done: bool) -> bytes:
    """Any chunk of the reply to a request at ``asked``; not where replies are simple."""
    head = kind | (wire.DONE_BIT if done else 0)
    if session.extended:
        return wire.EXTENDED_CHUNK.pack(wire.EXTENDED_HEAD | head, cookie, asked, len(payload)) + payload
    return wire.CHUNK.pack(wire.CHUNK_HEAD | head, cookie, len(payload)) + payload


def success(session: Session, cookie: int, asked: int) -> bytes:
    """The reply to any other command that succeeded and carries no payload; not for READ."""
    if session.extended:
        return wire.EXTENDED_CHUNK.pack(wire.EXTENDED_DONE_HEAD, cookie, asked, 0)
    return wire.SIMPLE_REPLY.pack(wire.SIMPLE_HEAD, cookie)


def success_bytes(session: Session) -> int:
    """The size of ``success``."""
    return wire.EXTENDED_CHUNK.size if session.extended else wire.SIMPLE_REPLY.size


def pack_successes(
    session: Session, into: memoryview, used: int, cookies: Sequence[int], ranges: Sequence[tuple[int, object]]
) -> int:
    """``success`` for each request, one behind the other from ``used`` on; returns where they end.

    Each of ``ranges`` begins with the offset of the request whose cookie has the same place.
    """
    if session.extended:
        pack_chunk, done, step = wire.EXTENDED_CHUNK.pack_into, wire.EXTENDED_DONE_HEAD, wire.EXTENDED_CHUNK.size
        for cookie, (asked, _) in zip(cookies, ranges, strict=True):
            pack_chunk(into, used, done, cookie, asked, 0)
            used += step
        return used
    pack, head, size = wire.SIMPLE_REPLY.pack_into, wire.SIMPLE_HEAD, wire.SIMPLE_REPLY.size
    for cookie in cookies:
        pack(into, used, head, cookie)
        used += size
    return used


def failure(session: Session, cookie: int, asked: int, error: int, message: str = "") -> bytes:
    """The reply to a command that failed, with a message for a human where the form has room."""
    if not session.structured:
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_HEAD | error, cookie)
    text = clip_utf8(message, wire.MAX_STRING_BYTES)
    payload = wire.ERROR_PAYLOAD.pack(error, len(text)) + text
    return chunk(session, wire.REPLY_TYPE_ERROR, cookie, asked, payload, done=True)


def extent_limit(contexts: Contexts, *, only_one: bool) -> int:
    """How many extents to ask the export for, for each of the contexts that a BLOCK_STATUS is about."""
    return 1 if only_one else EXTENT_LIMIT // max(1, len(contexts))


def block_status(
    session: Session,
    cookie: int,
    asked: int,
    statuses: Sequence[tuple[int, Sequence[tuple[int, int]]]],
    *,
    length: int,
    only_one: bool,
) -> bytes:
    """The reply to BLOCK_STATUS: one chunk for each context, and only the last is marked DONE.

    ``statuses`` has a context's id and what the export said of it; that is cut to ``length``, so no
    descriptor is empty, and none reaches past the request. Contexts may describe the range to
    different points.
    """
    assert statuses
    kind = wire.REPLY_TYPE_BLOCK_STATUS_EXT if session.extended else wire.REPLY_TYPE_BLOCK_STATUS
    chunks = []
    for index, (context_id, extents) in enumerate(statuses, 1):
        cut = _cut(extents[:1] if only_one else extents, length if session.extended else min(length, 0xFFFFFFFF))
        if session.extended:
            payload = wire.STATUS_EXT.pack(context_id, len(cut))
            payload += b"".join([wire.EXTENDED_DESCRIPTOR.pack(*descriptor) for descriptor in cut])
        else:
            payload = wire.U32.pack(context_id)
            payload += b"".join([wire.DESCRIPTOR.pack(*descriptor) for descriptor in cut])
        chunks.append(chunk(session, kind, cookie, asked, payload, done=index == len(statuses)))
    return b"".join(chunks)


def _cut(extents: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """At most so many bytes of extents, and what contexts say in 32 bits."""
    found = []
    left = length
    for extent_length, flags in extents[:EXTENT_LIMIT]:
        taken = min(extent_length, left)
        if taken <= 0:
            break
        found.append((taken, flags & 0xFFFFFFFF))
        left -= taken
    if not found:
        raise ValueError(f"an export gave no extents for {length} bytes: {extents!r}")
    return found


def clip_utf8(text: str, limit_bytes: int) -> bytes:
    """UTF-8 of ``text``, without NUL, cut at a character boundary to at most ``limit_bytes``."""
    raw = text.replace("\0", "").encode("utf-8", "replace")
    if len(raw) <= limit_bytes:
        return raw
    return raw[:limit_bytes].decode("utf-8", "ignore").encode()
