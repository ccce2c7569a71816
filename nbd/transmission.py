"""What a request may ask and what a reply looks like: pure functions of bytes and numbers.

``judge`` is the one place where a request is checked; what it lets through has a known command,
only flags that belong to it, and a range inside the export. Replies are encoded here too, and
obey the rule that after structured replies are negotiated a READ never gets a simple one.

Sources: the protocol text's "Request types", "Command flags" and "Error values".
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

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
"""Most extents in one BLOCK_STATUS reply, all contexts together: 128 KiB, far below the protocol's 2^20 for each."""


@dataclass(frozen=True, slots=True)
class Session:
    """What the handshake settled: how replies look, and what BLOCK_STATUS tells."""

    structured: bool = False
    contexts: tuple[tuple[int, str], ...] = ()  # id and name of each that was selected


def transmission_flags(export: Export, *, structured: bool) -> int:
    """The 16 bits that tell a client what this export can do."""
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
    return flags


def payload_limit(export: Export) -> int:
    """The longest READ or WRITE in bytes that this export takes."""
    return min(export.maximum_payload, wire.MAX_PAYLOAD_BYTES)


def judge(session: Session, export: Export, command: int, flags: int, offset: int, length: int) -> int:
    """Return 0 if the request may be carried out, else the error value its reply must carry.

    A WRITE's payload follows its header whatever the verdict is: the caller drains it.
    """
    allowed = _ALLOWED_FLAGS.get(command)
    if allowed is None or flags & ~allowed:
        return wire.EINVAL
    if flags & wire.CMD_FLAG_DF and not session.structured:
        return wire.EINVAL
    if command == wire.CMD_BLOCK_STATUS and not session.contexts:
        return wire.EINVAL
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


def error_value(error: OSError, *, fast_zero: bool = False) -> int:
    """The protocol's value for a failure; ENOTSUP only where a client asked for FAST_ZERO."""
    if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP):
        return wire.ENOTSUP if fast_zero else wire.EINVAL
    return _ERRORS.get(error.errno or errno.EIO, wire.EIO)


def read_header(session: Session, cookie: int, offset: int, length: int) -> bytes:
    """What precedes the data of a successful READ of which every byte is at hand.

    With structured replies it is one data chunk marked DONE (or none, if the READ was empty), so
    it must not be sent before the data is known to be good.
    """
    if not session.structured:
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_HEAD, cookie)
    if length == 0:
        return wire.CHUNK.pack(wire.DONE_HEAD, cookie, 0)
    return wire.DATA_CHUNK.pack(wire.DATA_HEAD, cookie, length + 8, offset)


def success(cookie: int) -> bytes:
    """The reply to any other command that succeeded and carries no payload; not for READ."""
    return wire.SIMPLE_REPLY.pack(wire.SIMPLE_HEAD, cookie)


def failure(session: Session, cookie: int, error: int, message: str = "") -> bytes:
    """The reply to a command that failed, with a message for a human where the form has room."""
    if not session.structured:
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_HEAD | error, cookie)
    text = clip_utf8(message, wire.MAX_STRING_BYTES)
    return b"".join(
        (
            wire.CHUNK.pack(wire.ERROR_HEAD, cookie, wire.ERROR_PAYLOAD.size + len(text)),
            wire.ERROR_PAYLOAD.pack(error, len(text)),
            text,
        )
    )


def extent_limit(session: Session, *, only_one: bool) -> int:
    """How many extents to ask the export for, for each context of a BLOCK_STATUS."""
    return 1 if only_one else EXTENT_LIMIT // max(1, len(session.contexts))


def block_status(
    cookie: int, statuses: Sequence[tuple[int, Sequence[tuple[int, int]]]], *, length: int, only_one: bool
) -> bytes:
    """The reply to BLOCK_STATUS: one chunk for each selected context, and only the last is marked DONE.

    ``statuses`` has a context's id and what the export said of it; that is cut to ``length``, so no
    descriptor is empty, and none reaches past the request. Contexts may describe the range to
    different points.
    """
    assert statuses
    chunks = []
    for index, (context_id, extents) in enumerate(statuses, 1):
        payload = wire.U32.pack(context_id) + _descriptors(extents[:1] if only_one else extents, length)
        head = wire.STATUS_HEAD if index == len(statuses) else wire.PART_STATUS_HEAD
        chunks.append(wire.CHUNK.pack(head, cookie, len(payload)) + payload)
    return b"".join(chunks)


def _descriptors(extents: Sequence[tuple[int, int]], length: int) -> bytes:
    descriptors = []
    left = min(length, 0xFFFFFFFF)
    for extent_length, flags in extents[:EXTENT_LIMIT]:
        taken = min(extent_length, left)
        if taken <= 0:
            break
        descriptors.append(wire.DESCRIPTOR.pack(taken, flags & 0xFFFFFFFF))
        left -= taken
    if not descriptors:
        raise ValueError(f"an export gave no extents for {length} bytes: {extents!r}")
    return b"".join(descriptors)


def clip_utf8(text: str, limit_bytes: int) -> bytes:
    """UTF-8 of ``text``, without NUL, cut at a character boundary to at most ``limit_bytes``."""
    raw = text.replace("\0", "").encode("utf-8", "replace")
    if len(raw) <= limit_bytes:
        return raw
    return raw[:limit_bytes].decode("utf-8", "ignore").encode()
