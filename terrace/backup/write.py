"""Writing a stream: what changed is read with several requests in flight, compressed by workers, and sent in order.

Two tasks. The planner walks the extents and starts a task for each piece that has to be read; a queue of `in_flight`
places bounds them, and with them memory: each holds at most 1 MiB read and as much packed. The writer, who alone has
the encoder and the sink, takes the pieces in the order of the volume and waits for each. A slow sink (a pipe) thus
stops the reading by itself.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from terrace.backup.errors import BackupError, alone
from terrace.backup.extents import Extent, Need, pieces
from terrace.backup.stream import BLOCK_BYTES, MAX_DATA_BYTES, Encoding, Header, StreamEncoder, Totals, encode_payload
from tiers.names import SECTOR_BYTES

IN_FLIGHT = 16
DEFAULT_LEVEL = 3
SURVEY_BYTES = (1 << 32) - BLOCK_BYTES
"""How much of a volume is asked about at a time: whole blocks that an NBD request can name."""
_INLINE_BYTES = 8 << 10
"""What is so small is compressed where it is: a worker's round trip costs more."""
_NOTHING = bytes(MAX_DATA_BYTES)


class Source(Protocol):
    """A snapshot to be backed up; it doesn't change meanwhile."""

    @property
    def size_bytes(self) -> int: ...

    async def extents(self, offset: int, length: int) -> Sequence[Extent]:
        """Consecutive extents from `offset` on: at least one, and not beyond `length`."""

    async def read(self, offset: int, length: int) -> bytes: ...


class Sink(Protocol):
    """Where a stream goes. `write` takes all of it and may wait."""

    async def write(self, data: bytes) -> None: ...


Progress = Callable[[int, int], None]
"""(bytes of the volume read so far, bytes to be read in total)."""


async def write_stream(
    source: Source,
    sink: Sink,
    header: Header,
    *,
    level: int = DEFAULT_LEVEL,
    in_flight: int = IN_FLIGHT,
    progress: Progress | None = None,
) -> Totals:
    """Write `source` as the stream that `header` announces; what it may leave out the source says.

    Raises BackupError if the source isn't what the header says, and what source and sink raise. Then, and when
    cancelled, the sink has got the beginning of a stream, which no reader takes for one.
    """
    if source.size_bytes != header.size_bytes:
        raise BackupError(
            errno.EPROTO,
            f"{header.title} has {header.size_bytes} bytes and its export {source.size_bytes}; begin the backup again",
        )
    total_bytes = await survey(source) if progress is not None else 0
    done_bytes = 0
    writer = _Writer(StreamEncoder(header), sink)
    await writer.begin()
    planned, to_write = trio.open_memory_channel[_Piece](in_flight)
    with alone():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_plan, source, header, planned, nursery, level)
            async with to_write:
                async for piece in to_write:
                    await piece.ready.wait()
                    await writer.write(piece)
                    if piece.extent.need is Need.DATA and progress is not None:
                        done_bytes += piece.extent.length
                        progress(done_bytes, max(total_bytes, done_bytes))
    return await writer.end()


async def survey(source: Source) -> int:
    """How many bytes will have to be read."""
    offset = total = 0
    while offset < source.size_bytes:
        extents = await _extents(source, offset)
        total += sum(extent.length for extent in extents if extent.need is Need.DATA)
        offset = extents[-1].end
    return total


async def _extents(source: Source, offset: int) -> Sequence[Extent]:
    """The next extents of a source, of which none is doubted any more."""
    found = await source.extents(offset, min(SURVEY_BYTES, source.size_bytes - offset))
    at = offset
    for extent in found:
        if extent.offset != at or extent.length <= 0 or extent.end > source.size_bytes or extent.length % SECTOR_BYTES:
            raise BackupError(
                errno.EPROTO,
                f"the description of what changed breaks at byte {at}: it goes on with {extent.length} bytes at "
                f"{extent.offset}; begin the backup again, and see the log of terraced",
            )
        at = extent.end
    if not found:
        raise BackupError(errno.EPROTO, f"nothing describes byte {offset}; see the log of terraced")
    return found


class _Piece:
    """A part of the stream on its way: `payload` None means zeros."""

    def __init__(self, extent: Extent) -> None:
        self.extent = extent
        self.ready = trio.Event()
        self.content = b""
        self.encoding = Encoding.RAW
        self.payload: bytes | None = None


class _Writer:
    """Encoder and sink; zeros wait until it is known how far they go."""

    def __init__(self, encoder: StreamEncoder, sink: Sink) -> None:
        self._encoder = encoder
        self._sink = sink
        self._zeros: Extent | None = None

    async def begin(self) -> None:
        await self._sink.write(self._encoder.begin())

    async def write(self, piece: _Piece) -> None:
        extent, zeros = piece.extent, self._zeros
        if piece.payload is None and zeros is not None and zeros.end == extent.offset:
            self._zeros = Extent(zeros.offset, zeros.length + extent.length, Need.ZEROS)
            return
        await self._write_zeros()
        if piece.payload is None:
            self._zeros = Extent(extent.offset, extent.length, Need.ZEROS)
        else:
            await self._sink.write(self._encoder.data(extent.offset, piece.content, piece.encoding, piece.payload))

    async def end(self) -> Totals:
        await self._write_zeros()
        end, totals = self._encoder.end()
        await self._sink.write(end)
        return totals

    async def _write_zeros(self) -> None:
        if self._zeros is not None:
            zeros, self._zeros = self._zeros, None
            await self._sink.write(self._encoder.zeros(zeros.offset, zeros.length))


async def _plan(
    source: Source, header: Header, planned: trio.MemorySendChannel[_Piece], nursery: trio.Nursery, level: int
) -> None:
    offset = 0
    async with planned:
        while offset < source.size_bytes:
            extents = await _extents(source, offset)
            offset = extents[-1].end
            for part in pieces(extents, MAX_DATA_BYTES):
                if part.need is Need.SAME:
                    assert header.base is not None, "a full stream leaves nothing out"
                    continue
                piece = _Piece(part)
                # A place first, then the work: so no more is read than the queue holds, and one that waits here.
                await planned.send(piece)
                if part.need is Need.DATA:
                    nursery.start_soon(_fetch, source, piece, level)
                else:
                    piece.ready.set()


async def _fetch(source: Source, piece: _Piece, level: int) -> None:
    extent = piece.extent
    content = await source.read(extent.offset, extent.length)
    if len(content) != extent.length:
        raise BackupError(
            errno.EIO,
            f"reading {extent.length} bytes at {extent.offset} gave {len(content)}; see the log of terraced",
        )
    if content != (_NOTHING if len(content) == MAX_DATA_BYTES else bytes(len(content))):
        piece.content = content
        if len(content) <= _INLINE_BYTES:
            piece.encoding, piece.payload = encode_payload(content, level)
        else:
            piece.encoding, piece.payload = await trio.to_thread.run_sync(encode_payload, content, level)
    piece.ready.set()
