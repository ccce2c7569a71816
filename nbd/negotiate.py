"""The client's side of the handshake, without IO.

``negotiate`` is a generator. It yields bytes to send, or the number of bytes it needs next, which are
sent in, or ``UPGRADE``: from there on all is said over TLS. It returns the ``Terms``. So it never
holds more than one reply, and no byte behind the handshake, or behind the agreement on TLS, is taken:
what somebody slipped in there in plain text is for TLS to refuse. It raises ``OSError``: EPROTO where
the server breaks the protocol, else what the server's refusal means.

It asks for TLS (if wanted) before all else, and goes no step on without. Then for extended headers,
else for structured replies, and the contexts, then for GO with the block sizes; of a server that has
no GO it asks EXPORT_NAME. ``inquire`` asks what an export is, and doesn't attach. ``ask_for_connection``
asks for the connection itself (``nbd.takeover``). They speak fixed newstyle only.
"""

from __future__ import annotations

import errno
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from struct import Struct
from typing import Final

from nbd import wire
from nbd.replies import printable, protocol_error

MAX_REPLY_BYTES: Final = 64 << 10
MAX_REPLIES: Final = 1024
"""To one option."""
MAX_SIZE_BYTES: Final = (1 << 63) - 1
_MAX_MINIMUM_BLOCK_SIZE: Final = 64 << 10
_OLDSTYLE: Final = 0x00420281861253
_REST_OF_GREETING: Final = Struct(">QH")  # IHAVEOPT, handshake flags
_ERROR_BIT: Final = 1 << 31
_DECLINES: Final = (wire.REP_ERR_UNSUP, wire.REP_ERR_POLICY, wire.REP_ERR_INVALID, wire.REP_ERR_PLATFORM)
"""What a server says to an option that it doesn't take. Who can do without goes on."""


class Upgrade(Enum):
    """What ``negotiate`` yields when both sides have agreed on TLS."""

    TLS = "TLS"


UPGRADE: Final = Upgrade.TLS

Step = bytes | int | Upgrade
Steps = Generator[Step, bytes, "Terms"]

_REFUSALS: Final = {
    wire.REP_ERR_UNSUP: (errno.ENOTSUP, "the server doesn't support this option"),
    wire.REP_ERR_POLICY: (errno.EACCES, "the server's policy forbids it"),
    wire.REP_ERR_INVALID: (errno.EINVAL, "the server finds the option invalid"),
    wire.REP_ERR_PLATFORM: (errno.ENOTSUP, "the server's platform doesn't support it"),
    wire.REP_ERR_TLS_REQD: (
        errno.EPROTONOSUPPORT,
        "the server demands TLS; connect with a URI nbds:// or nbds+unix:// and its tls-certificates",
    ),
    wire.REP_ERR_UNKNOWN: (errno.ENOENT, "the server has no such export"),
    wire.REP_ERR_SHUTDOWN: (errno.ESHUTDOWN, "the server is shutting down"),
    wire.REP_ERR_BLOCK_SIZE_REQD: (errno.EINVAL, "the server demands that its block sizes are obeyed"),
    wire.REP_ERR_TOO_BIG: (errno.E2BIG, "the server finds the option too big"),
    wire.REP_ERR_EXT_HEADER_REQD: (errno.EPROTONOSUPPORT, "the server demands extended headers"),
}


@dataclass(frozen=True, slots=True)
class Terms:
    """What was agreed on, and what the export is. Sizes are in bytes."""

    size_bytes: int
    flags: int
    """Transmission flags (``wire.SEND_*`` and others)."""
    structured: bool = False
    """Replies come in chunks: structured ones, or extended ones."""
    contexts: dict[int, str] = field(default_factory=dict)
    """Those of the contexts asked for that the server has, by the id it gave them."""
    minimum_block_size: int = 1
    preferred_block_size: int = 4096
    maximum_payload: int = wire.MAX_PAYLOAD_BYTES
    """Of one READ or WRITE; a multiple of the minimum, and at most 32 MiB."""
    extended: bool = False
    """Requests and replies have extended headers, with lengths of 64 bits."""
    encrypted: bool = False
    """All but the greeting and the agreement on this went over TLS."""


def negotiate(
    export: str, contexts: Sequence[str], *, structured: bool = True, extended: bool = True, tls: bool = False
) -> Steps:
    """Attach to ``export``; see above. Without structured replies there are no extended headers and no contexts."""
    no_zeroes = yield from _greeting()
    name = _string(export)
    if tls:
        yield from _start_tls()
    extended = structured and extended and (yield from _agreed(wire.OPT_EXTENDED_HEADERS, tls))
    structured = structured and (extended or (yield from _agreed(wire.OPT_STRUCTURED_REPLY, tls)))
    found: dict[int, str] = {}
    if structured and contexts:
        found = yield from _select(name, list(dict.fromkeys(contexts)), tls)
    so_far = Terms(0, 0, structured, found, extended=extended, encrypted=tls)
    yield _option(wire.OPT_GO, name + wire.U16.pack(1) + wire.U16.pack(wire.INFO_BLOCK_SIZE))
    terms = yield from _information(wire.OPT_GO, so_far)
    if terms is None:
        if extended:
            raise protocol_error("a server with extended headers that doesn't know GO")
        yield _option(wire.OPT_EXPORT_NAME, name[wire.U32.size :])
        size_bytes, flags = wire.EXPORT_NAME_REPLY.unpack((yield wire.EXPORT_NAME_REPLY.size))
        if not no_zeroes:
            yield len(wire.EXPORT_NAME_PADDING)
        terms = _judged(replace(so_far, size_bytes=size_bytes, flags=flags))
    return terms


def inquire(export: str) -> Steps:
    """What ``export`` is now, by INFO: it isn't opened. The connection can only be closed afterwards.

    ENOTSUP where the server has no INFO.
    """
    yield from _greeting()
    yield _option(wire.OPT_INFO, _string(export) + wire.U16.pack(1) + wire.U16.pack(wire.INFO_BLOCK_SIZE))
    terms = yield from _information(wire.OPT_INFO, Terms(0, 0))
    if terms is None:
        raise OSError(errno.ENOTSUP, "the server can't tell what an export is without opening it")
    yield _option(wire.OPT_ABORT)
    return terms


def ask_for_connection(option: int, data: bytes, *, tls: bool = False) -> Steps:
    """Have the connection taken over by a private option: what follows is no longer NBD. The terms say nothing."""
    yield from _greeting()
    if tls:
        yield from _start_tls()
    yield _option(option, data)
    kind, answer = yield from _reply(option)
    if kind == wire.REP_ERR_TLS_REQD and not tls:
        raise OSError(errno.EPROTONOSUPPORT, "the server demands TLS")
    _raise_refusal(kind, answer, tls=tls)
    _expect_ack(kind, answer)
    return Terms(0, 0, encrypted=tls)


def _greeting() -> Generator[Step, bytes, bool]:
    """Both sides' greetings; whether the zeroes behind the answer to EXPORT_NAME are left out."""
    # Eight bytes first: who isn't an NBD server may never send eighteen.
    magic = yield wire.U64.size
    if wire.U64.unpack(magic)[0] != wire.INIT_PASSWD:
        raise protocol_error("this is not an NBD server (bad magic)")
    kind, flags = _REST_OF_GREETING.unpack((yield _REST_OF_GREETING.size))
    if kind == _OLDSTYLE:
        raise OSError(errno.EPROTONOSUPPORT, "the server speaks the oldstyle handshake only")
    if kind != wire.IHAVEOPT:
        raise protocol_error("this is not an NBD server (bad second magic)")
    if not flags & wire.FLAG_FIXED_NEWSTYLE:
        raise OSError(errno.EPROTONOSUPPORT, "the server doesn't speak the fixed newstyle handshake")
    no_zeroes = bool(flags & wire.FLAG_NO_ZEROES)
    yield wire.CLIENT_FLAGS.pack(wire.FLAG_C_FIXED_NEWSTYLE | (wire.FLAG_C_NO_ZEROES if no_zeroes else 0))
    return no_zeroes


def _start_tls() -> Generator[Step, bytes, None]:
    yield _option(wire.OPT_STARTTLS)
    kind, data = yield from _reply(wire.OPT_STARTTLS)
    if kind in _DECLINES:
        number = errno.EACCES if kind == wire.REP_ERR_POLICY else errno.EPROTONOSUPPORT
        said = printable(data) or _REFUSALS[kind][1]
        raise OSError(number, f"the server takes no TLS, which this client was told to insist on: {said}")
    _raise_refusal(kind, data, tls=True)
    _expect_ack(kind, data)
    yield UPGRADE


def _agreed(option: int, tls: bool) -> Generator[Step, bytes, bool]:
    """Whether the server agrees to an option without data that one can do without."""
    yield _option(option)
    kind, data = yield from _reply(option)
    if kind in _DECLINES:
        return False
    _raise_refusal(kind, data, tls=tls)
    _expect_ack(kind, data)
    return True


def _select(name: bytes, contexts: Sequence[str], tls: bool) -> Generator[Step, bytes, dict[int, str]]:
    option = wire.OPT_SET_META_CONTEXT
    yield _option(option, name + wire.U32.pack(len(contexts)) + b"".join(map(_string, contexts)))
    found: dict[int, str] = {}
    for _ in range(MAX_REPLIES):
        kind, data = yield from _reply(option)
        if kind in (wire.REP_ERR_TLS_REQD, wire.REP_ERR_SHUTDOWN, wire.REP_ERR_TOO_BIG):
            _raise_refusal(kind, data, tls=tls)
        if kind & _ERROR_BIT:
            return {}  # if it matters (there is no such export), GO fails too
        if kind != wire.REP_META_CONTEXT:
            _expect_ack(kind, data)
            return found
        context_id = int.from_bytes(data[: wire.U32.size])
        text = data[wire.U32.size :].decode("utf-8", "replace")
        if len(data) <= wire.U32.size or text not in contexts:
            raise protocol_error("the server selected a context that was not asked for")
        if context_id in found or text in found.values():
            raise protocol_error("the server selected a context twice")
        found[context_id] = text
    raise protocol_error("the server's answer to an option has no end")


def _information(option: int, so_far: Terms) -> Generator[Step, bytes, Terms | None]:
    """The terms with what GO or INFO was answered; None if the server doesn't know this option."""
    size: tuple[int, int] | None = None
    blocks = (1, 4096, wire.MAX_PAYLOAD_BYTES)
    for _ in range(MAX_REPLIES):
        kind, data = yield from _reply(option)
        if kind == wire.REP_ERR_UNSUP:
            return None
        _raise_refusal(kind, data, tls=so_far.encrypted)
        if kind != wire.REP_INFO:
            _expect_ack(kind, data)
            if size is None:
                raise protocol_error("the server didn't tell the export's size")
            told = replace(so_far, size_bytes=size[0], flags=size[1])
            minimum, preferred, limit = blocks
            return _judged(
                replace(told, minimum_block_size=minimum, preferred_block_size=preferred, maximum_payload=limit)
            )
        if len(data) < wire.U16.size:
            raise protocol_error("an information without a type")
        info = int.from_bytes(data[: wire.U16.size])
        if info == wire.INFO_EXPORT:
            if len(data) != wire.INFO_EXPORT_PAYLOAD.size:
                raise protocol_error(f"the export's size in {len(data)} bytes")
            _, size_bytes, flags = wire.INFO_EXPORT_PAYLOAD.unpack(data)
            size = size_bytes, flags
        elif info == wire.INFO_BLOCK_SIZE:
            if len(data) != wire.INFO_BLOCK_SIZE_PAYLOAD.size:
                raise protocol_error(f"block sizes in {len(data)} bytes")
            _, *values = wire.INFO_BLOCK_SIZE_PAYLOAD.unpack(data)
            blocks = values[0], values[1], values[2]
    raise protocol_error("the server's answer to an option has no end")


def _judged(terms: Terms) -> Terms:
    """The terms, if they make sense; the payload's limit is brought down to ours."""
    if terms.size_bytes > MAX_SIZE_BYTES:
        raise protocol_error(f"an export of {terms.size_bytes} bytes")
    if not terms.flags & wire.HAS_FLAGS:
        raise protocol_error(f"transmission flags {terms.flags:#x}, which are none")
    minimum, preferred, limit = terms.minimum_block_size, terms.preferred_block_size, terms.maximum_payload
    if not 0 < minimum <= _MAX_MINIMUM_BLOCK_SIZE or minimum & (minimum - 1):
        raise protocol_error(f"a minimum block size of {minimum}")
    if not preferred or preferred % minimum or limit < minimum:
        raise protocol_error(f"block sizes of {minimum} (minimum), {preferred} (preferred), {limit} (maximum)")
    limit = min(limit, wire.MAX_PAYLOAD_BYTES) // minimum * minimum
    return replace(terms, maximum_payload=limit)


# --- options and their replies ---


def _option(option: int, data: bytes = b"") -> bytes:
    return wire.OPTION.pack(wire.IHAVEOPT, option, len(data)) + data


def _string(text: str) -> bytes:
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raise OSError(errno.EINVAL, f"the name {text!r} is not UTF-8") from None
    if len(raw) > wire.MAX_STRING_BYTES or b"\0" in raw:
        raise OSError(errno.EINVAL, f"a name of {len(raw)} bytes; at most {wire.MAX_STRING_BYTES}, without NUL")
    return wire.U32.pack(len(raw)) + raw


def _reply(option: int) -> Generator[Step, bytes, tuple[int, bytes]]:
    magic, echoed, kind, length = wire.OPTION_REPLY.unpack((yield wire.OPTION_REPLY.size))
    if magic != wire.REP_MAGIC:
        raise protocol_error(f"not a reply to an option (magic {magic:#x})")
    if echoed != option:
        raise protocol_error(f"a reply to the option {echoed} where {option} was asked")
    if length > MAX_REPLY_BYTES:
        raise protocol_error(f"a reply of {length} bytes to an option")
    data = (yield length) if length else b""
    return kind, data


def _raise_refusal(kind: int, data: bytes, *, tls: bool) -> None:
    """Raise what an error means. ``tls``: it has been asked for already."""
    if kind & _ERROR_BIT:
        if tls and kind == wire.REP_ERR_TLS_REQD:
            raise protocol_error("the server demands TLS where there is TLS")
        number, text = _REFUSALS.get(kind, (errno.EPROTO, f"the server refuses an option (error {kind:#x})"))
        said = printable(data)
        raise OSError(number, f"{text}: {said}" if said else text)


def _expect_ack(kind: int, data: bytes) -> None:
    if kind != wire.REP_ACK or data:
        raise protocol_error(f"a reply of type {kind} with {len(data)} bytes where an acknowledgement belongs")
