"""Writing map pages: the stream of MAP segments that checkpoints append to.

Pages go out in batches like everything else, so that a MAP segment tells by itself whose pages it holds. Pages of a
checkpoint that was not committed are just dead slots.
"""

import errno
from typing import TYPE_CHECKING

from tiers.errors import TierError
from tiers.failpoint import hit
from tiers.layout import SLOT_BITS, check_of
from tiers.maptree import page_key
from tiers.record import Kind, Op, encode_batch, header_slots_for
from tiers.segments import Segment

if TYPE_CHECKING:
    from tiers.engine import Engine

MAX_PAGES = 512


class MapWriter:
    """The open MAP segment of a pool."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self.segment: Segment | None = None
        self.written_pages = 0
        self._opened: list[Segment] = []

    def begin(self) -> None:
        """An attempt at a checkpoint begins."""
        self._opened = []

    def give_up(self) -> None:
        """The attempt failed: nothing will ever name the segments that it opened."""
        opened, self._opened = self._opened, []
        hit("map.given_up")
        if self.segment in opened:
            self.seal()
        for segment in opened:
            if not segment.live and not segment.pins:
                self._engine.segments.release(segment)

    async def write(self, volume_id: int, level: int, indices: list[int], pages: list[bytes]) -> list[tuple[int, int]]:
        """Append pages; return their (address, check). They are durable after the next flush."""
        entries: list[tuple[int, int]] = []
        at = 0
        while at < len(pages):
            segment, room = self._open(len(pages) - at)
            count = min(len(pages) - at, MAX_PAGES, room)
            part = pages[at : at + count]
            checks = [check_of(page) for page in part]
            ops: list[int] = []
            for index in indices[at : at + count]:
                ops += (Op.PAGE << 56 | volume_id, page_key(level, index), 0)
            slot = segment.used
            log = self._engine.log
            header, _ = encode_batch(
                Kind.MAP,
                self._engine.pool_uuid,
                segment.id,
                slot,
                log.incarnation,
                log.seq,
                0,
                self._engine.flusher.durable_seq,
                ops,
                checks,
                [],
            )
            first = slot + (len(header) >> 12)
            try:
                await segment.device.write_behind(segment.offset(slot), [header, *part])
            except BaseException:
                self.seal()  # with `used` before what may be garbage, so that its headers stay a chain
                raise
            segment.used = first + count
            hit("map.written")
            entries += [(segment.id << SLOT_BITS | first + i, check) for i, check in enumerate(checks)]
            self.written_pages += count
            at += count
        return entries

    def _open(self, wanted: int) -> tuple[Segment, int]:
        """The open segment and how many pages fit in it."""
        segment = self.segment
        if segment is not None:
            room = segment.slots - segment.used
            room -= header_slots_for(min(wanted, room), min(wanted, room))
            if room > 0:
                return segment, room
            self.seal()
        device = self._engine.space.pick_device(Kind.MAP)
        if device is None:
            raise TierError(errno.ENOSPC, f"the pool {self._engine.pool_name} has no free segment for its map: grow it")
        self.segment = segment = self._engine.log.open_segment(device, Kind.MAP)
        self._opened.append(segment)
        room = segment.slots - segment.used
        return segment, room - header_slots_for(min(wanted, room), min(wanted, room))

    def seal(self) -> None:
        """Leave the open segment for good."""
        if self.segment is not None:
            self.segment.open = False
            self._engine.segments.changed.add(self.segment.id)
            self.segment = None
