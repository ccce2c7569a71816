"""The bypass: long sequential writes go straight to base where the fast tier has no room to spare.

They would push hot blocks out, only to be demoted soon after, so that each byte is written twice. The order keeps every
promise that the log keeps:

1. The data go to a base segment, with a batch header of their own.
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
from tiers.layout import BLOCK_BYTES, BLOCK_SHIFT, SLOT_BITS, ZERO_CHECK, check_of
from tiers.record import Kind, Op, encode_batch, header_slots_for
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
    first_address: int


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
        self._segment: Segment | None = None

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
        finally:
            for write in writes:
                write.done.set()

    def seal(self) -> None:
        """Leave the open segment: the pool is closing, or it is full."""
        if self._segment is not None:
            self._segment.open = False
            self._engine.segments.changed.add(self._segment.id)
            self._segment = None

    def leave(self, device: Device) -> None:
        """Leave the open segment if it is on this device, but not while copies are on their way into it."""
        if self._segment is not None and self._segment.device is device and not self._segment.pins:
            self.seal()

    async def _round(self, writes: list[_Write]) -> None:
        copies: list[_Copies] = []
        try:
            try:
                for write in writes:
                    await self._copy(write, copies)
                await self._engine.flusher.flush()
                hit("bypass.durable")
            except OSError as error:
                for write in writes:
                    write.error = error
                return
            except BaseException:
                for write in writes:
                    write.error = self._closing()
                raise
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

    async def _copy(self, write: _Write, copies: list[_Copies]) -> None:
        """Write all of it into base segments. Raises OSError; then those before it in the round are lost too."""
        at = 0
        while at < len(write.checks):
            try:
                segment = self._output()
            except _NoSegmentError:
                write.refused = True
                return
            at += await self._copy_part(write, at, segment, copies)

    async def _copy_part(self, write: _Write, at: int, segment: Segment, copies: list[_Copies]) -> int:
        engine = self._engine
        room = segment.slots - segment.used
        count = min(len(write.checks) - at, BATCH_BLOCKS, room - header_slots_for(1, min(room, BATCH_BLOCKS)))
        slot = segment.used
        header, header_check = encode_batch(
            Kind.MOVED,
            engine.pool_uuid,
            segment.id,
            slot,
            engine.log.incarnation,
            engine.log.seq,
            0,
            engine.flusher.durable_seq,
            [Op.WRITE << 56 | write.volume.id, write.block + at, count],
            write.checks[at : at + count],
            [],
        )
        first = slot + (len(header) >> BLOCK_SHIFT)
        segment.pins += 1
        try:
            data = write.data[at << BLOCK_SHIFT : at + count << BLOCK_SHIFT]
            await segment.device.write_behind(segment.offset(slot), [header, data])
        except BaseException:
            segment.pins -= 1
            self.seal()  # `used` stays before what failed: the headers stay a chain
            raise
        segment.used = first + count
        copies.append(_Copies(write, at, count, segment, slot, header_check, segment.id << SLOT_BITS | first))
        hit("bypass.copied")
        return count

    def _output(self) -> Segment:
        segment = self._segment
        if segment is not None and segment.slots - segment.used >= 3 and segment.device.state == "online":
            return segment
        self.seal()
        device = self._engine.space.pick_device(Kind.MOVED, "base")
        if device is None or device.tier != "base":
            raise _NoSegmentError
        self._segment = self._engine.log.open_segment(device, Kind.MOVED)
        return self._segment

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
        checks = write.checks[copies.start : copies.start + count]
        write.volume.apply_batch([word, write.block + copies.start, count], checks, copies.first_address)
        engine.client_written_bytes += count << BLOCK_SHIFT
        self.written_bytes += count << BLOCK_SHIFT
        hit("bypass.logged")
