"""The bypass: long sequential writes go straight to base where the fast tier has no room to spare.

They would push hot blocks out, only to be demoted soon after, so that each byte is written twice. The order keeps every
promise that the log keeps:

1. The data go to a base segment, with a batch header of their own: packed into frames where that pays (`tiers.frames`).
2. Flush: they are durable.
3. A MOVE record makes them true, and the overlay names them in the same breath. Only then is the write answered.

A crash before 3 leaves copies that nothing names; a replay takes the record for what it is, blocks in a new place.
Rounds gather what many requests have brought, so that they share a flush: on base it is what costs.
"""

import errno
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from tiers.device import Device
from tiers.errors import TierError
from tiers.failpoint import hit
from tiers.frames import MAX_FRAME_BLOCKS, Buffer, Packed, pack_all
from tiers.layout import BLOCK_BYTES, BLOCK_SHIFT, ZERO_CHECK, check_of
from tiers.outputs import append_copies
from tiers.record import Kind, Op, frames_that_fit, header_slots_for
from tiers.segments import Segment

if TYPE_CHECKING:
    from tiers.engine import Engine
    from tiers.volume import Volume

LEAST_BYTES = 64 << 10
"""A smaller write is answered sooner through the log, whatever it belongs to."""
ROUND_BYTES = 8 << 20
BATCH_BLOCKS = 256
SPARE_FAST_SHARE = 0.25
"""With more of the fast tier free than this, a stream is welcome there."""
SPARE_BASE_SEGMENTS = 8
"""Base must have this much to spare, beyond what the cleaner needs: a stream is not worth a lack of room."""


@dataclass(eq=False, slots=True)
class _Write:
    """Whole blocks on their way to base."""

    volume: "Volume"
    block: int
    data: memoryview
    checks: list[int]
    frames: list[Packed | None] = field(default_factory=list)
    """Of each 32 blocks, in order; None for those that stay raw, which may be all."""
    done: trio.Event = field(default_factory=trio.Event)
    error: OSError | None = None
    refused: bool = False
    """Base has no segment for it: nothing happened."""


@dataclass(slots=True)
class _Copies:
    """A batch in a base segment, waiting for its record."""

    write: _Write
    start: int
    count: int
    segment: Segment
    slot: int
    header_check: int
    runs: list[tuple[int, int]]
    """(address, count) of blocks with consecutive addresses, in order."""


class _NoSegmentError(Exception):
    """No base segment may be taken now."""


class Bypass:
    """The streams of one pool that go past its fast tier. All of it belongs to the trio thread."""

    def __init__(self, engine: "Engine") -> None:
        self.written_bytes = 0
        """What went straight to base since the pool was opened."""
        self._engine = engine
        self._queue: deque[_Write] = deque()
        self._wanted = trio.Event()
        self._segments: dict[Kind, Segment] = {}
        self._ended = False

    def takes(self, volume: "Volume") -> bool:
        """Whether a stream into this volume should go straight to base now."""
        space = self._engine.space
        placement = volume.policy.placement
        base = space.tier_use("base")
        if placement == "fast" or base.free <= SPARE_BASE_SEGMENTS * space.largest_segment_slots:
            return False
        fast = space.tier_use("fast")
        return fast.total > 0 and (placement == "base" or fast.free < fast.total * SPARE_FAST_SHARE)

    async def write(self, volume: "Volume", block: int, data: memoryview) -> bool:
        """Write whole blocks to base; durable and true when this returns.

        False: nothing happened, the log has to take them. Admission is the caller's. Raises OSError. `data` isn't
        looked at any more when this returns or is cancelled.
        """
        if self._ended:
            raise self._closing()
        checks = [check_of(data[i : i + BLOCK_BYTES]) for i in range(0, len(data), BLOCK_BYTES)]
        if ZERO_CHECK in checks:
            return False  # zeros take no space, by way of the log
        write = _Write(volume, block, data, checks)
        self._queue.append(write)
        self._wanted.set()
        try:
            await write.done.wait()
        except BaseException:
            if write in self._queue:
                self._queue.remove(write)
            else:
                with trio.CancelScope(shield=True):
                    await write.done.wait()
            raise
        if write.error is not None:
            raise write.error
        return not write.refused

    async def run(self) -> None:
        """The task: rounds, as long as there is something to write."""
        try:
            while True:
                await self._wanted.wait()
                self._wanted = trio.Event()
                while self._queue:
                    await self._next_round()
        finally:
            self._ended = True
            for write in self._queue:  # nobody else will
                write.error = self._closing()
                write.done.set()
            self._queue.clear()

    def _closing(self) -> TierError:
        return TierError(errno.EIO, f"the pool {self._engine.pool_name} is being closed")

    async def _next_round(self) -> None:
        writes: list[_Write] = []
        size = 0
        while self._queue and (not writes or size + len(self._queue[0].data) <= ROUND_BYTES):
            writes.append(self._queue.popleft())
            size += len(writes[-1].data)
        try:
            await self._round(writes)
        except BaseException:
            # Whatever it was that ends the task: nothing may be answered as good that isn't surely in the log.
            for write in writes:
                write.error = self._closing()
            raise
        finally:
            for write in writes:
                write.done.set()

    def seal(self) -> None:
        """Leave the open segments: the pool is closing."""
        for kind in list(self._segments):
            self._leave(kind)

    def _leave(self, kind: Kind) -> None:
        segment = self._segments.pop(kind, None)
        if segment is not None:
            segment.open = False
            self._engine.segments.changed.add(segment.id)

    def leave(self, device: Device) -> None:
        """Leave the open segments that are on this device, but not while copies are on their way into them."""
        for kind, segment in list(self._segments.items()):
            if segment.device is device and not segment.pins:
                self._leave(kind)

    async def _round(self, writes: list[_Write]) -> None:
        copies: list[_Copies] = []
        try:
            try:
                await self._pack(writes)
                for write in writes:
                    await self._copy(write, copies)
                devices = {item.segment.device.index: item.segment.device for item in copies}.values()
                await self._engine.flusher.flush_devices(devices)
                hit("bypass.durable")
            except OSError as error:
                for write in writes:
                    write.error = error
                return
            for item in copies:
                if item.write.refused or item.write.error is not None:
                    continue
                try:
                    self._make_true(item)
                except OSError as error:
                    item.write.error = error
        finally:
            for item in copies:
                item.segment.pins -= 1

    async def _pack(self, writes: list[_Write]) -> None:
        """Compress what is to be compressed, with as many workers as there are."""

        async def pack(write: _Write, level: int) -> None:
            starts = range(0, len(write.data), BLOCK_BYTES)
            views = [write.data[start : start + BLOCK_BYTES] for start in starts]
            groups = [views[at : at + MAX_FRAME_BLOCKS] for at in range(0, len(views), MAX_FRAME_BLOCKS)]
            write.frames = await self._engine.offload(pack_all, groups, level)

        async with trio.open_nursery() as nursery:
            for write in writes:
                level = self._engine.compression_of(write.volume)
                if level:
                    nursery.start_soon(pack, write, level)

    async def _copy(self, write: _Write, copies: list[_Copies]) -> None:
        """Write all of it into base segments. Raises OSError; then those before it in the round are lost too."""
        at = 0
        count = len(write.checks)
        while at < count:
            number = at // MAX_FRAME_BLOCKS
            try:
                if write.frames and write.frames[number] is not None:
                    at += await self._copy_frames(write, at, copies)
                else:
                    raw = next((i for i in range(number, len(write.frames)) if write.frames[i] is not None), count)
                    at += await self._copy_raw(write, at, min(count, raw * MAX_FRAME_BLOCKS), copies)
            except _NoSegmentError:
                write.refused = True
                return

    async def _copy_raw(self, write: _Write, at: int, end: int, copies: list[_Copies]) -> int:
        """Write blocks from `at` to before `end` as they are, as far as the segment goes; return how many."""
        segment = self._output(Kind.MOVED, 2)
        room = segment.slots - segment.used
        count = min(end - at, BATCH_BLOCKS, room - header_slots_for(1, min(room, BATCH_BLOCKS)))
        data = write.data[at << BLOCK_SHIFT : at + count << BLOCK_SHIFT]
        await self._write_batch(write, at, count, segment, None, [data], copies)
        return count

    async def _copy_frames(self, write: _Write, at: int, copies: list[_Copies]) -> int:
        """Write the frames from that of block `at` on, as far as they go and the segment goes; return their blocks."""
        frames: list[Packed] = []
        for frame in write.frames[at // MAX_FRAME_BLOCKS :][: BATCH_BLOCKS // MAX_FRAME_BLOCKS]:
            if frame is None:
                break
            frames.append(frame)
        segment = self._output(Kind.PACKED, frames[0].slots)
        del frames[frames_that_fit(frames, segment.slots - segment.used) :]
        if not frames:  # a device whose segments are smaller than a frame
            write.frames[at // MAX_FRAME_BLOCKS] = None
            return 0
        count = sum(frame.blocks for frame in frames)
        await self._write_batch(write, at, count, segment, frames, [frame.data for frame in frames], copies)
        return count

    async def _write_batch(
        self,
        write: _Write,
        at: int,
        count: int,
        segment: Segment,
        frames: list[Packed] | None,
        buffers: list[Buffer],
        copies: list[_Copies],
    ) -> None:
        """Write a batch to a segment that has room for it; with `frames` to one of packed data."""
        described = None if frames is None else [frame.described for frame in frames]
        checks = write.checks[at : at + count]
        try:
            written = await append_copies(
                self._engine,
                segment,
                [Op.WRITE << 56 | write.volume.id, write.block + at, count],
                checks,
                described,
                buffers,
            )
        except BaseException:
            self._leave(segment.kind)
            raise
        runs = []
        done = 0
        for part in [count] if frames is None else [frame.blocks for frame in frames]:
            runs.append((written.addresses[done], part))
            done += part
        copies.append(_Copies(write, at, count, segment, written.slot, written.header_check, runs))
        hit("bypass.copied")

    def _output(self, kind: Kind, least: int) -> Segment:
        """The open segment of a kind, with room for a header and `least` slots more if a fresh one has it."""
        segment = self._segments.get(kind)
        if segment is not None and segment.slots - segment.used > least and segment.device.state == "online":
            return segment
        self._leave(kind)
        device = self._engine.space.pick_device(kind, "base")
        if device is None or device.tier != "base":
            raise _NoSegmentError
        segment = self._segments[kind] = self._engine.log.open_segment(device, kind)
        device.unnamed_bytes += BLOCK_BYTES  # its header: durable with the first copies
        return segment

    def _make_true(self, copies: _Copies) -> None:
        """Log the record and let the overlay name the blocks. No checkpoint of trio in here."""
        engine = self._engine
        write, segment, count = copies.write, copies.segment, copies.count
        if write.volume.deleted:
            raise TierError(errno.ESTALE, f"{write.volume.name} was deleted")
        words = [(1 << min(64, count - i)) - 1 for i in range(0, count, 64)]
        extra = [segment.device.index << 32 | segment.index, *words]
        engine.append_record(Op.MOVE, segment.id, copies.slot << 32 | count, copies.header_check, extra)
        segment.last_seq = engine.log.seq
        word = Op.WRITE << 56 | write.volume.id
        at = copies.start
        for address, part in copies.runs:
            write.volume.apply_batch([word, write.block + at, part], write.checks[at : at + part], address)
            at += part
        engine.client_written_bytes += count << BLOCK_SHIFT
        self.written_bytes += count << BLOCK_SHIFT
        hit("bypass.logged")
