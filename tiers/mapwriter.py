"""Writing map pages: the stream of MAP segments that checkpoints append to.

A page gets its address at once and is written by a worker meanwhile, so that working out the next pages and writing the
last ones overlap. `settle` waits for all of them; only then may a flush be asked to make them durable.

Pages go out in batches like everything else, so that a MAP segment tells by itself whose pages it holds. Pages of a
checkpoint that was not committed are just dead slots.
"""

import errno
from typing import TYPE_CHECKING

import trio

from tiers.device import Buffer
from tiers.errors import TierError
from tiers.failpoint import hit
from tiers.layout import BLOCK_SHIFT, SLOT_BITS
from tiers.maptree import LEVEL_SHIFT
from tiers.reader import checks_of
from tiers.record import Kind, Op, encode_batch, header_slots_for
from tiers.segments import Segment

if TYPE_CHECKING:
    from tiers.engine import Engine

MAX_PAGES = 512
MAX_WRITES = 4
"""Batches on their way to the device at a time, each of at most MAX_PAGES."""


class MapWriter:
    """The open MAP segment of a pool."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self.segment: Segment | None = None
        self.written_pages = 0
        self._opened: list[Segment] = []
        self._filled: list[Segment] = []
        self._failure: OSError | None = None
        self._room = trio.CapacityLimiter(MAX_WRITES)
        self._idle = trio.Event()
        self._under_way = 0

    def begin(self) -> None:
        """An attempt at a checkpoint begins. None of an earlier one's writes is under way."""
        assert not self._under_way
        self._opened = []
        self._failure = None

    def give_up(self) -> None:
        """The attempt failed: nothing will ever name the segments that it opened."""
        opened, self._opened = self._opened, []
        hit("map.given_up")
        if self.segment in opened:
            self.seal()
        for segment in opened:
            if not segment.live and not segment.pins:
                self._engine.segments.release(segment)

    async def write(
        self, nursery: trio.Nursery, volume_id: int, level: int, indices: list[int], pages: memoryview
    ) -> tuple[list[int], list[int]]:
        """Append pages, which lie one after the other in `pages` and must not change any more.

        Returns their addresses and checks. The writing itself goes on in `nursery`. Raises TierError.
        """
        addresses: list[int] = []
        checks: list[int] = []
        at = 0
        while at < len(indices):
            # Only a write that has its turn gets a place: what waits holds no segment.
            await self._room.acquire_on_behalf_of(token := object())
            try:
                if self._failure is not None:
                    raise self._failure
                segment, room = self._open(len(indices) - at)
                count = min(len(indices) - at, MAX_PAGES, room)
                part = pages[at << BLOCK_SHIFT : at + count << BLOCK_SHIFT]
                part_checks = checks_of(part)
                header = self._header(segment, volume_id, level, indices[at : at + count], part_checks)
            except BaseException:
                self._room.release_on_behalf_of(token)
                raise
            slot = segment.used
            first = slot + (len(header) >> BLOCK_SHIFT)
            segment.used = first + count
            self._under_way += 1
            buffers: list[Buffer] = [header, part]
            nursery.start_soon(self._write, segment, slot, buffers, token)
            addresses += range(segment.id << SLOT_BITS | first, (segment.id << SLOT_BITS | first) + count)
            checks += part_checks
            self.written_pages += count
            at += count
        return addresses, checks

    def _header(self, segment: Segment, volume_id: int, level: int, indices: list[int], checks: list[int]) -> bytearray:
        word, key = Op.PAGE << 56 | volume_id, level << LEVEL_SHIFT
        log = self._engine.log
        header, _ = encode_batch(
            Kind.MAP,
            self._engine.pool_uuid,
            segment.id,
            segment.used,
            log.incarnation,
            log.seq,
            0,
            self._engine.flusher.durable_seq,
            [part for index in indices for part in (word, key | index, 0)],
            checks,
            [],
        )
        return header

    async def _write(self, segment: Segment, slot: int, buffers: list[Buffer], token: object) -> None:
        """Task: one batch on its way. A failure is kept for whoever writes or settles next."""
        try:
            await segment.device.write_behind(segment.offset(slot), buffers)
            hit("map.written")
        except BaseException as error:
            # With `used` before what may be garbage, so that its headers stay a chain.
            segment.used = min(segment.used, slot)
            if segment is self.segment:
                self._leave(segment)
            if not isinstance(error, OSError):
                raise
            self._failure = self._failure or error
        finally:
            self._room.release_on_behalf_of(token)
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()
                self._idle = trio.Event()

    async def settle(self) -> None:
        """Return when all that was appended is written. Raises TierError if something could not be."""
        while self._under_way:
            await self._idle.wait()
        self.settled()
        if self._failure is not None:
            raise self._failure

    def settled(self) -> None:
        """Nothing is being written any more: segments that were left in the meantime are sealed."""
        assert not self._under_way
        for segment in self._filled:
            segment.open = False
            self._engine.segments.changed.add(segment.id)
        self._filled.clear()

    def _open(self, wanted: int) -> tuple[Segment, int]:
        """The open segment and how many pages fit in it."""
        segment = self.segment
        if segment is not None:
            room = segment.slots - segment.used
            room -= header_slots_for(min(wanted, room), min(wanted, room))
            if room > 0 and segment.device.state == "online":
                return segment, room
            self._leave(segment)
        device = self._engine.space.pick_device(Kind.MAP)
        if device is None:
            raise TierError(errno.ENOSPC, f"the pool {self._engine.pool_name} has no free segment for its map: grow it")
        self.segment = segment = self._engine.log.open_segment(device, Kind.MAP)
        self._opened.append(segment)
        room = segment.slots - segment.used
        return segment, room - header_slots_for(min(wanted, room), min(wanted, room))

    def _leave(self, segment: Segment) -> None:
        """Nothing more goes into a segment; it stays open, so that nobody reads or frees it, until all is written."""
        self._filled.append(segment)
        self.segment = None

    def seal(self) -> None:
        """Leave the open segment for good, between checkpoints."""
        if self.segment is not None:
            self._leave(self.segment)
        self.settled()
