"""The server's side of the handshake as a machine without IO.

Bytes go in with ``feed``; ``next_event`` says what is to be done next:

================  ==========================================================================
event             the caller's part
================  ==========================================================================
``NEED_DATA``     feed more
``Send``          send these bytes
``WantList``      call ``listed`` with the directory (or ``refused``), send what it returns
``WantExport``    open the export; call ``described`` with it or ``refused``; send what is
                  returned; keep the export open if ``enters``, as transmission has begun
``WantTls``       nothing may have come behind what was fed; send ``acknowledgement``, do the TLS
                  handshake as a server, call ``secured``, and feed what comes decrypted
``WantTakeover``  call ``given_away`` or ``declined``; send what is returned. Given away, the
                  connection is no longer NBD, and ``leftover`` is the first of what it is now
``Hangup``        send ``farewell`` if there is any, then close; ``reason`` is for the log
================  ==========================================================================

Where TLS is required, nothing but STARTTLS and ABORT is answered before it is there. What was negotiated
before it is forgotten, and what came behind STARTTLS in plaintext ends the connection: somebody in between
may have put it there ("FORCEDTLS mode" and "Security considerations" in the protocol's text).

It speaks fixed newstyle only. What a client may make it hold is bounded: a name by 4,096 bytes, an
option by ``MAX_OPTION_BYTES``; longer data is skipped as it arrives and answered with an error,
and an option that announces more than ``MAX_SKIPPED_BYTES`` ends the connection. Of metadata
contexts it may query ``MAX_QUERIES`` at a time, select ``MAX_SELECTED_CONTEXTS``, and gets to see
``MAX_LISTED_CONTEXTS`` of an export that offers more.

A handshake has ``MAX_OPTIONS`` options; then the connection ends. Its deadline bounds how long a
client may keep the server busy with options, but within that a client that only sends makes answers
(a LIST of all snapshots, an INFO that opens an export) as fast as they can be made. No client needs
more than a dozen, or, where it looks at every export, an INFO and a LIST_META_CONTEXT for each.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from nbd import wire
from nbd.export import Export, OffersContexts
from nbd.transmission import Contexts, Session, clip_utf8, payload_limit, transmission_flags

MAX_OPTION_BYTES: Final = 64 << 10
MAX_SKIPPED_BYTES: Final = 1 << 20
MAX_TAKEOVER_BYTES: Final = 4096
"""Of the data of an option that takes the connection over."""
MAX_OPTIONS: Final = 1024

MAX_QUERIES: Final = 256
MAX_LISTED_CONTEXTS: Final = 4096
MAX_SELECTED_CONTEXTS: Final = 16
"""Each costs a walk of its own for every BLOCK_STATUS."""

ALLOCATION_CONTEXT_ID: Final = 1
_FIRST_OTHER_CONTEXT_ID: Final = 2

OPTION_NAMES: Final = {
    wire.OPT_EXPORT_NAME: "EXPORT_NAME",
    wire.OPT_ABORT: "ABORT",
    wire.OPT_LIST: "LIST",
    wire.OPT_STARTTLS: "STARTTLS",
    wire.OPT_INFO: "INFO",
    wire.OPT_GO: "GO",
    wire.OPT_STRUCTURED_REPLY: "STRUCTURED_REPLY",
    wire.OPT_LIST_META_CONTEXT: "LIST_META_CONTEXT",
    wire.OPT_SET_META_CONTEXT: "SET_META_CONTEXT",
    wire.OPT_EXTENDED_HEADERS: "EXTENDED_HEADERS",
    wire.OPT_TERRACE: "TERRACE",
}


class _NeedData(enum.Enum):
    NEED_DATA = enum.auto()


NEED_DATA: Final = _NeedData.NEED_DATA


@dataclass(frozen=True, slots=True)
class Send:
    data: bytes


@dataclass(frozen=True, slots=True)
class WantList:
    """The client asks for the directory."""


@dataclass(frozen=True, slots=True)
class WantExport:
    """The client names an export. ``enters``: if it exists, transmission begins with it."""

    name: str
    enters: bool


@dataclass(frozen=True, slots=True)
class WantTls:
    """The client asks for TLS, and gets it."""

    acknowledgement: bytes


@dataclass(frozen=True, slots=True)
class WantTakeover:
    """The client asks for the connection itself, by a private option with this data."""

    option: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Hangup:
    """Close the connection. ``rude``: the client broke the protocol, which deserves a log line."""

    reason: str
    farewell: bytes = b""
    rude: bool = True


Event = _NeedData | Send | WantList | WantExport | WantTls | WantTakeover | Hangup


class _Invalid(Exception):
    """An option's data is not what the protocol says; the message is for the client."""


class _TooBig(_Invalid):
    """An option's data is well-formed but beyond a bound."""


@dataclass(frozen=True, slots=True)
class _Question:
    """An option that waits for ``listed``, ``described`` or ``refused``, ``given_away`` or ``declined``."""

    option: int
    answer: Callable[[Export], bytes] = lambda export: b""


class Handshake:
    """One connection's handshake. ``begun`` tells that transmission follows, with ``session``, or another protocol.

    ``takeovers``: the options by which a client may ask for the latter.
    """

    def __init__(
        self, *, tls_offered: bool = False, tls_required: bool = False, takeovers: Collection[int] = ()
    ) -> None:
        assert tls_offered or not tls_required
        self._tls_offered, self._tls_required = tls_offered, tls_required
        self._takeovers = takeovers
        self._secured = False
        self._buffer = bytearray()
        self._next: Callable[[], Event] = self._greet
        self._no_zeroes = False
        self._fixed = False
        self._structured = False
        self._extended = False  # implies `_structured`
        self._options = 0
        self._contexts_for = ""  # the export for which these were selected
        self._contexts: Contexts = ()
        self._question: _Question | None = None
        self._skip = 0
        self._after_skip: Callable[[], Event] = self._read_option
        self.shutting_down = False
        """Set by the caller when the server drains: every option but ABORT is then refused."""
        self.plaintext_refused = False
        """The client asked for something without TLS, where that is required."""
        self.begun = False
        self.session = Session()

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Add bytes from the client."""
        self._buffer += data

    def leftover(self) -> bytes:
        """After ``begun``: bytes that arrived behind the handshake, such as the first requests."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def next_event(self) -> Event:
        """What to do now. After ``WantList``, ``WantExport`` or ``WantTakeover`` answer before asking again."""
        assert not self.begun and self._question is None
        return self._next()

    def secured(self) -> None:
        """After ``WantTls``: TLS is there. Everything begins anew but the client's flags."""
        assert not self._buffer
        self._secured = True
        self.plaintext_refused = False
        self._structured = self._extended = False
        self._contexts_for, self._contexts = "", ()

    # --- states ---

    def _greet(self) -> Event:
        self._next = self._read_client_flags
        flags = wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES
        return Send(wire.GREETING.pack(wire.INIT_PASSWD, wire.IHAVEOPT, flags))

    def _read_client_flags(self) -> Event:
        if len(self._buffer) < wire.CLIENT_FLAGS.size:
            return NEED_DATA
        (flags,) = wire.CLIENT_FLAGS.unpack(self._take(wire.CLIENT_FLAGS.size))
        if flags & ~(wire.FLAG_C_FIXED_NEWSTYLE | wire.FLAG_C_NO_ZEROES):
            return Hangup(f"unknown client flags {flags:#x}")
        self._fixed = bool(flags & wire.FLAG_C_FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & wire.FLAG_C_NO_ZEROES)
        self._next = self._read_option
        return self._read_option()

    def _read_option(self) -> Event:
        if len(self._buffer) < wire.OPTION.size:
            # Garbage is garbage from its first bytes; don't wait for sixteen of them.
            if not wire.U64.pack(wire.IHAVEOPT).startswith(self._buffer[:8]):
                return Hangup("not an NBD option (bad magic)")
            return NEED_DATA
        magic, option, length = wire.OPTION.unpack_from(self._buffer)
        if magic != wire.IHAVEOPT:
            return Hangup("not an NBD option (bad magic)")
        if not self._fixed and option != wire.OPT_EXPORT_NAME:
            return Hangup(f"option {_named(option)} without fixed newstyle")
        if length > MAX_SKIPPED_BYTES:
            return Hangup(f"option {_named(option)} announces {length} bytes")
        if self._options == MAX_OPTIONS:
            return Hangup(f"more than {MAX_OPTIONS} options")
        if option == wire.OPT_ABORT:
            return self._skipping(length, lambda: self._abort(option))
        if self._tls_required and not self._secured and option != wire.OPT_STARTTLS:
            return self._skipping(length, lambda: self._refuse_plaintext(option))
        if self.shutting_down:
            return self._skipping(length, lambda: self._refuse_shutdown(option))
        handler = self._handlers().get(option)
        if handler is None:
            text = f"option {_named(option)} is not supported"
            if option == wire.OPT_STARTTLS:
                text = "TLS is off here"
            return self._skipping(length, lambda: Send(_error(option, wire.REP_ERR_UNSUP, text)))
        if length > MAX_OPTION_BYTES:
            if option == wire.OPT_EXPORT_NAME:
                return Hangup(f"an export name of {length} bytes")
            return self._skipping(
                length,
                lambda: self._rejected(option, wire.REP_ERR_TOO_BIG, f"more than {MAX_OPTION_BYTES} bytes of data"),
            )
        if len(self._buffer) < wire.OPTION.size + length:
            return NEED_DATA
        self._take(wire.OPTION.size)
        self._options += 1
        data = self._take(length)
        try:
            return handler(option, data)
        except _Invalid as error:
            if option == wire.OPT_EXPORT_NAME:
                return Hangup(f"a bad export name: {error}")
            reply = wire.REP_ERR_TOO_BIG if isinstance(error, _TooBig) else wire.REP_ERR_INVALID
            return self._rejected(option, reply, str(error))

    def _skipping(self, length: int, then: Callable[[], Event]) -> Event:
        self._take(wire.OPTION.size)
        self._options += 1
        self._skip, self._after_skip = length, then
        self._next = self._drain
        return self._drain()

    def _drain(self) -> Event:
        gone = min(self._skip, len(self._buffer))
        self._take(gone)
        self._skip -= gone
        if self._skip:
            return NEED_DATA
        self._next = self._read_option
        return self._after_skip()

    def _take(self, length: int) -> bytes:
        data = bytes(self._buffer[:length])
        del self._buffer[:length]
        return data

    # --- options ---

    def _handlers(self) -> dict[int, Callable[[int, bytes], Event]]:
        handlers: dict[int, Callable[[int, bytes], Event]] = {
            wire.OPT_EXPORT_NAME: self._export_name,
            wire.OPT_LIST: self._list,
            wire.OPT_INFO: self._info_or_go,
            wire.OPT_GO: self._info_or_go,
            wire.OPT_STRUCTURED_REPLY: self._structured_reply,
            wire.OPT_LIST_META_CONTEXT: self._meta_context,
            wire.OPT_SET_META_CONTEXT: self._meta_context,
            wire.OPT_EXTENDED_HEADERS: self._extended_headers,
        }
        if self._tls_offered:
            handlers[wire.OPT_STARTTLS] = self._starttls
        for option in self._takeovers:
            handlers.setdefault(option, self._takeover)
        return handlers

    def _abort(self, option: int) -> Event:
        return Hangup("the client aborted", _reply(option, wire.REP_ACK), rude=False)

    def _refuse_plaintext(self, option: int) -> Event:
        if option == wire.OPT_EXPORT_NAME:
            return Hangup("an export asked for without TLS, which is required here")
        self.plaintext_refused = True
        return Send(_error(option, wire.REP_ERR_TLS_REQD, "TLS is required here: begin with STARTTLS"))

    def _starttls(self, option: int, data: bytes) -> Event:
        if data:
            raise _Invalid("STARTTLS takes no data")
        if self._secured:
            raise _Invalid("TLS is there already")
        if self._buffer:
            return Hangup("data in plaintext behind STARTTLS")
        return WantTls(_reply(option, wire.REP_ACK))

    def _refuse_shutdown(self, option: int) -> Event:
        if option == wire.OPT_EXPORT_NAME:
            return Hangup("the server is shutting down", rude=False)
        return self._rejected(option, wire.REP_ERR_SHUTDOWN, "the server is shutting down")

    def _rejected(self, option: int, reply: int, text: str) -> Event:
        if option == wire.OPT_SET_META_CONTEXT:
            self._contexts = ()  # it replaces the selection even when it fails
        return Send(_error(option, reply, text))

    def _export_name(self, option: int, data: bytes) -> Event:
        if self._extended:
            return Hangup("EXPORT_NAME after EXTENDED_HEADERS")
        name = _text(data, "the export name")
        self._question = _Question(option, lambda export: self._begin_export_name(name, export))
        return WantExport(name, enters=True)

    def _begin_export_name(self, name: str, export: Export) -> bytes:
        self._begin(name)
        flags = self._flags(name, export)
        reply = wire.EXPORT_NAME_REPLY.pack(export.size_bytes, flags)
        return reply if self._no_zeroes else reply + wire.EXPORT_NAME_PADDING

    def _list(self, option: int, data: bytes) -> Event:
        if data:
            raise _Invalid("LIST takes no data")
        self._question = _Question(option)
        return WantList()

    def _takeover(self, option: int, data: bytes) -> Event:
        if len(data) > MAX_TAKEOVER_BYTES:
            raise _TooBig(f"more than {MAX_TAKEOVER_BYTES} bytes of data")
        self._question = _Question(option)
        return WantTakeover(option, data)

    def _structured_reply(self, option: int, data: bytes) -> Event:
        if data:
            raise _Invalid("STRUCTURED_REPLY takes no data")
        if self._extended:
            return Send(_error(option, wire.REP_ERR_EXT_HEADER_REQD, "extended headers are negotiated already"))
        self._structured = True
        return Send(_reply(option, wire.REP_ACK))

    def _extended_headers(self, option: int, data: bytes) -> Event:
        if data:
            raise _Invalid("EXTENDED_HEADERS takes no data")
        self._structured = self._extended = True
        return Send(_reply(option, wire.REP_ACK))

    def _info_or_go(self, option: int, data: bytes) -> Event:
        reader = _Reader(data)
        name = reader.string("the export name")
        wanted = [reader.u16() for _ in range(reader.u16())]
        reader.end()
        enters = option == wire.OPT_GO

        def answer(export: Export) -> bytes:
            if enters:
                self._begin(name)
            infos = self._infos(name, export, wanted)
            return b"".join(_reply(option, wire.REP_INFO, info) for info in infos) + _reply(option, wire.REP_ACK)

        self._question = _Question(option, answer)
        return WantExport(name, enters)

    def _flags(self, name: str, export: Export) -> int:
        filters_status = self._extended and bool(self._contexts_of(name))
        return transmission_flags(export, structured=self._structured, filters_status=filters_status)

    def _infos(self, name: str, export: Export, wanted: Iterable[int]) -> list[bytes]:
        wanted = set(wanted)
        flags = self._flags(name, export)
        infos = [wire.INFO_EXPORT_PAYLOAD.pack(wire.INFO_EXPORT, export.size_bytes, flags)]
        if wire.INFO_NAME in wanted:
            infos.append(wire.U16.pack(wire.INFO_NAME) + clip_utf8(export.name, wire.MAX_STRING_BYTES))
        if wire.INFO_DESCRIPTION in wanted:
            infos.append(wire.U16.pack(wire.INFO_DESCRIPTION) + clip_utf8(export.description, wire.MAX_STRING_BYTES))
        limit = payload_limit(export)
        if wire.INFO_BLOCK_SIZE in wanted or export.minimum_block_size > 1 or limit < wire.MAX_PAYLOAD_BYTES:
            sizes = (export.minimum_block_size, export.preferred_block_size, limit)
            infos.append(wire.INFO_BLOCK_SIZE_PAYLOAD.pack(wire.INFO_BLOCK_SIZE, *sizes))
        return infos

    def _meta_context(self, option: int, data: bytes) -> Event:
        selecting = option == wire.OPT_SET_META_CONTEXT
        if selecting:
            self._contexts = ()  # whatever follows, the old selection is gone
        if not self._structured:
            raise _Invalid("negotiate structured replies or extended headers first")
        reader = _Reader(data)
        name = reader.string("the export name")
        count = reader.u32()
        if count > MAX_QUERIES:
            raise _TooBig(f"more than {MAX_QUERIES} queries")
        queries = [reader.string("a query") for _ in range(count)]
        reader.end()

        def answer(export: Export) -> bytes:
            if not selecting:
                listed = dict.fromkeys(_listed_contexts(export, queries))
                return _context_replies(option, [(0, found) for found in islice(listed, MAX_LISTED_CONTEXTS)])
            selected = [query for query in dict.fromkeys(queries) if _has_context(export, query)]
            if len(selected) > MAX_SELECTED_CONTEXTS:
                return _error(option, wire.REP_ERR_TOO_BIG, f"more than {MAX_SELECTED_CONTEXTS} contexts at a time")
            others = [found for found in selected if found != wire.META_ALLOCATION]
            numbered = list(enumerate(others, _FIRST_OTHER_CONTEXT_ID))
            if len(others) < len(selected):
                numbered.insert(0, (ALLOCATION_CONTEXT_ID, wire.META_ALLOCATION))
            self._contexts_for, self._contexts = name, tuple(numbered)
            return _context_replies(option, numbered)

        self._question = _Question(option, answer)
        return WantExport(name, enters=False)

    def _begin(self, name: str) -> None:
        self.session = Session(self._structured, self._contexts_of(name), self._extended)
        self.begun = True

    def _contexts_of(self, name: str) -> Contexts:
        """They count only for the export they were selected for."""
        return self._contexts if self._contexts_for == name else ()

    # --- answers ---

    def listed(self, exports: Iterable[tuple[str, str]]) -> bytes:
        """Answer ``WantList`` with ``(name, description)`` pairs; returns the bytes to send."""
        option = self._answered().option
        replies = []
        for name, description in exports:
            raw = clip_utf8(name, wire.MAX_STRING_BYTES)
            details = clip_utf8(description, wire.MAX_STRING_BYTES)
            replies.append(_reply(option, wire.REP_SERVER, wire.U32.pack(len(raw)) + raw + details))
        return b"".join(replies) + _reply(option, wire.REP_ACK)

    def described(self, export: Export) -> bytes:
        """Answer ``WantExport`` with the opened export; returns the bytes to send."""
        return self._answered().answer(export)

    def refused(self, error: OSError) -> bytes:
        """Answer that there is no such export, or that it can't be opened now.

        Returns the bytes to send. None at all means that the protocol has no way to say so
        (EXPORT_NAME): close the connection.
        """
        option = self._answered().option
        if option == wire.OPT_EXPORT_NAME:
            return b""
        if error.errno == errno.ESHUTDOWN:
            reply = wire.REP_ERR_SHUTDOWN
        elif error.errno in (errno.EACCES, errno.EPERM):
            reply = wire.REP_ERR_POLICY
        else:
            reply = wire.REP_ERR_UNKNOWN
        return _error(option, reply, error.strerror or str(error))

    def given_away(self) -> bytes:
        """Answer ``WantTakeover`` with yes; returns the bytes to send, the last that are NBD."""
        option = self._answered().option
        self.begun = True
        return _reply(option, wire.REP_ACK)

    def declined(self, why: str) -> bytes:
        """Answer ``WantTakeover`` with no; returns the bytes to send."""
        return _error(self._answered().option, wire.REP_ERR_POLICY, why)

    def _answered(self) -> _Question:
        question = self._question
        assert question is not None
        self._question = None
        return question


def _has_context(export: Export, query: str) -> bool:
    """Whether SET_META_CONTEXT selects something by this: a whole name, never the beginning of one."""
    if query == wire.META_ALLOCATION:
        return True
    if query.startswith(wire.META_NAMESPACE) or query.endswith(":") or ":" not in query:
        return False
    return isinstance(export, OffersContexts) and export.has_context(query)


def _listed_contexts(export: Export, queries: list[str]) -> Iterator[str]:
    """What LIST_META_CONTEXT answers: all, or what is named, or what begins with a query that ends in a colon.

    A name may come more than once. Unknown namespaces and names are ignored.
    """
    for query in dict.fromkeys(queries or [""]):
        prefix = query.endswith(":") or not queries
        if wire.META_ALLOCATION.startswith(query) if prefix else _has_context(export, query):
            yield wire.META_ALLOCATION if prefix else query
        if prefix and query != wire.META_NAMESPACE and isinstance(export, OffersContexts):
            yield from islice(export.contexts(query), MAX_LISTED_CONTEXTS)


def _context_replies(option: int, contexts: Sequence[tuple[int, str]]) -> bytes:
    replies = [
        _reply(option, wire.REP_META_CONTEXT, wire.U32.pack(number) + name.encode()) for number, name in contexts
    ]
    return b"".join(replies) + _reply(option, wire.REP_ACK)


class _Reader:
    """Takes an option's data apart; anything that doesn't fit exactly is ``_Invalid``."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def _bytes(self, length: int) -> bytes:
        if length > len(self._data) - self._position:
            raise _Invalid("the data ends too early")
        start = self._position
        self._position += length
        return self._data[start : self._position]

    def u16(self) -> int:
        return int.from_bytes(self._bytes(2))

    def u32(self) -> int:
        return int.from_bytes(self._bytes(4))

    def string(self, what: str) -> str:
        return _text(self._bytes(self.u32()), what)

    def end(self) -> None:
        if self._position != len(self._data):
            raise _Invalid("there is data behind the end")


def _text(raw: bytes, what: str) -> str:
    if len(raw) > wire.MAX_STRING_BYTES:
        raise _TooBig(f"{what} is longer than {wire.MAX_STRING_BYTES} bytes")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise _Invalid(f"{what} is not UTF-8") from None
    if "\0" in text:
        raise _Invalid(f"{what} contains NUL")
    return text


def _reply(option: int, reply: int, data: bytes = b"") -> bytes:
    return wire.OPTION_REPLY.pack(wire.REP_MAGIC, option, reply, len(data)) + data


def _error(option: int, reply: int, text: str) -> bytes:
    return _reply(option, reply, clip_utf8(text, wire.MAX_STRING_BYTES))


def _named(option: int) -> str:
    return OPTION_NAMES.get(option, str(option))
