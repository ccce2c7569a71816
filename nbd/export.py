"""What the server needs of an export, and nothing about how it is stored.

The server judges every request first (``nbd.transmission``), so an implementation may assume
``0 <= offset`` and ``offset + length <= size_bytes`` at the time of the call. Failures are
``OSError`` with a true ``errno``; the server turns that into the protocol's error value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from nbd.tls import Identity


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks, as far as the connection tells."""

    peer: str = ""
    """For people: an address with its port, or which process it is."""
    address: str | None = None
    """The IP address; None for a client of a Unix socket."""
    encrypted: bool = False
    identity: Identity | None = None
    """Whom its certificate names, if it showed one that was verified."""


class Export(Protocol):
    """One block device, shared by all connections that have acquired it."""

    @property
    def name(self) -> str:
        """The canonical export name, e.g. ``demo/vol``; at most 4,096 bytes of UTF-8."""

    @property
    def description(self) -> str:
        """A sentence for a human being; may be empty."""

    @property
    def size_bytes(self) -> int:
        """The size now. It may change while clients are connected (a resize)."""

    @property
    def read_only(self) -> bool: ...

    @property
    def rotational(self) -> bool: ...

    @property
    def can_multi_conn(self) -> bool:
        """True: a flush on one connection covers the answered writes of all connections."""

    @property
    def minimum_block_size(self) -> int:
        """A power of two from 1 to 65,536; other alignments are refused by the server."""

    @property
    def preferred_block_size(self) -> int:
        """A power of two, at least 512 and at least the minimum."""

    @property
    def maximum_payload(self) -> int:
        """The longest READ or WRITE in bytes; the server never accepts more than 32 MiB."""

    def read_now(self, offset: int, length: int, into: memoryview) -> bool:
        """Read without blocking, atomically as other tasks see it.

        True: ``into`` holds the verified bytes. False: it would block; ask ``read``.
        """

    def write_now(self, writes: list[tuple[int, memoryview]]) -> bool:
        """Write ``(offset, data)`` pairs without blocking: all of them or none.

        True: all are in the kernel and may be acknowledged. False: it would block, and nothing
        was written; use ``write`` for each. OSError: none may be acknowledged. The views are only
        valid during the call. Where entries overlap the later one wins. At most 32 MiB in all.
        """

    async def read(self, offset: int, length: int, into: memoryview) -> None:
        """Read; may wait."""

    async def write(self, offset: int, data: memoryview | bytes) -> None:
        """Write; may wait. ``data`` stays unchanged until this returns."""

    async def flush(self) -> None:
        """Make durable every write, trim and zeroing that had returned before the call.

        On every connection. FUA is the write and then this.
        """

    def trim_now(self, ranges: list[tuple[int, int]]) -> bool:
        """Forget these (offset, length) ranges if that needs no waiting; may round inwards.

        All or nothing: False means that nothing happened; use ``trim`` for each.
        """

    async def trim(self, offset: int, length: int) -> None:
        """Forget the range; may wait, may round inwards."""

    async def write_zeroes(self, offset: int, length: int, *, no_hole: bool, fast: bool) -> None:
        """Make the whole range read as zeroes.

        ``no_hole``: keep space for the range, so that writing to it later can't run out of space.
        ``fast``: if that is no faster than a write, raise ENOTSUP at once and change nothing.
        """

    async def cache(self, offset: int, length: int) -> None:
        """A hint that the range will be read soon."""

    async def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """``(length_bytes, flags)`` of consecutive extents from ``offset``, at least one.

        Flags are ``STATE_HOLE`` and ``STATE_ZERO``. At most ``limit`` extents, each longer than
        nothing, equal neighbours merged, never past ``offset + length``.
        """


@runtime_checkable
class OffersContexts(Protocol):
    """What an ``Export`` has besides, if it offers metadata contexts other than ``base:allocation``.

    A name is ``namespace:leaf``, at most 4,096 bytes of UTF-8, and doesn't end in a colon, as that
    is how clients ask for all that begins so. The namespace ``base`` is the protocol's own.
    """

    def contexts(self, prefix: str) -> Iterable[str]:
        """The names that begin with ``prefix``, for a client that lists them; ``""`` is all.

        The server stops taking names when it has as many as it answers with.
        """

    def has_context(self, name: str) -> bool:
        """Whether a client may select this context now; listed or not. Any string may be asked."""

    async def context_extents(self, context: str, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """Like ``Export.extents``, with the 32 bits of flags that the context defines.

        Raises FileNotFoundError when the context has gone since the client selected it: that
        request fails with EINVAL and the error's sentence, and the connection goes on.
        """


@runtime_checkable
class TellsHoles(Protocol):
    """What an ``Export`` has besides, if it can tell cheaply that ranges need not be read."""

    def holes_now(self, offset: int, length: int, shortest: int) -> list[tuple[int, int]] | None:
        """``(offset, length)`` of parts of the range that read as zeroes, in order and apart; never waits.

        True at this moment, as it is for ``read_now``. At least all that hold an aligned unit of
        ``shortest`` bytes, a power of two of at least 4,096. None where that can't be told without
        waiting: read it all. OSError where nothing may be read.
        """


ReadNow = Callable[[int, int, memoryview], bool]
"""Offset, length, into: as ``Export.read_now``."""


@runtime_checkable
class LendsReads(Protocol):
    """What an ``Export`` has besides, if what ``read_now`` looks at before it reads is the same for many reads."""

    def lend_reads(self) -> ReadNow | None:
        """What reads in place of ``read_now``, for as long as there is no checkpoint and no other call of the export.

        An OSError from it means what False does: ask ``read_now`` and ``read``, which may know another way. None: it
        can't be lent now.
        """

    def took_reads(self, reads: int, read_bytes: int) -> None:
        """So much was read by what was lent."""


@runtime_checkable
class AcknowledgesLater(Protocol):
    """What an ``Export`` has besides, if its writes wait for something far away, such as other hosts.

    Each call hands over all writes, or trims, of one pass of a connection, and no task waits for them. Where an export
    has this, the server uses it in place of ``write_now`` and ``trim_now``; ``write`` and ``trim`` remain for what
    can't be handed over so.

    Order: what was handed over takes effect before whatever overlaps it and is handed over, written, trimmed or zeroed
    after it, also when the connection that it came from has ended. The server relies on it where a client sends again
    on another connection what the first one hasn't answered (``nbd.fence``).
    """

    def write_later(self, writes: list[tuple[int, memoryview]], done: Callable[[OSError | None], None]) -> bool:
        """Begin to write ``(offset, data)`` pairs; where entries overlap the later one wins. At most 32 MiB in all.

        True: it is accepted, and ``done`` is called exactly once: later, on the trio thread, and never from within
        this call. None says that all may be acknowledged, an error that none may. ``done`` neither waits nor raises.
        The views are only valid during the call. False: it would block, and nothing happened; use ``write`` for each.
        OSError: refused, and nothing happened.
        """

    def trim_later(self, ranges: list[tuple[int, int]], done: Callable[[OSError | None], None]) -> bool:
        """The same for ``(offset, length)`` ranges to forget; may round inwards."""


class Exports(Protocol):
    """The directory of exports, as each client may see it."""

    def list(self, client: Client) -> list[tuple[str, str]]:
        """``(name, description)`` of each."""

    async def acquire(self, name: str, client: Client) -> Export:
        """Open an export for one connection; ``""`` is the default export, if there is one.

        Raises FileNotFoundError when there is no such export for this client, another OSError when
        it can't be opened now.
        """

    def identity(self, export: Export) -> str:
        """Of an acquired export, and never another one's, not of one that has the name at another time either."""

    def release(self, export: Export) -> None:
        """Give back what one ``acquire`` returned. Synchronous, so that it works while cancelled."""
