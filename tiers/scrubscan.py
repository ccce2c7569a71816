"""What a scrub makes of a segment's bytes: which slots don't hold what their batch's header says. Pure, no IO.

A segment is fed piece by piece, in order; batches may begin in one piece and end in another. Each data block is
compared with the check in the header that was written with it. The map got a copy of that check, so only what differs
here has to be looked up there: a scrub of sound devices reads no map page, and pushes no client's out of the cache.
Of packed data nothing is unpacked: a frame's slots have a check in the header's frame table. Where one doesn't match,
every block of the frame has to be looked up.

Where a header should be and isn't, the scan goes on slot by slot until it finds the next one that names its own place.
The slots in between are a *gap*: what is live in them, and whether it is sound, only the map can tell.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from tiers.frames import Frame
from tiers.layout import BLOCK_BYTES, BLOCK_SHIFT
from tiers.reader import checks_of
from tiers.record import (
    BadRecordError,
    Batch,
    Op,
    decode_batch,
    decode_checks,
    decode_segment_header,
    peek_header_slots,
)

UNIT = 1024
"""Blocks verified without a checkpoint of trio in between: about 0.7 ms."""
BATCH_COST = 12
"""Judging a batch's header costs about as much as verifying so many blocks."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A data block that doesn't pass the check in its batch's header, or lies in a frame that doesn't."""

    place: int
    """The slot part of its address."""
    batch: Batch
    index: int
    unreadable: str | None
    """Why it can't be read, if that is so."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Slots [first, end) that no sound header accounts for. `first` 0: the segment's own header is damaged."""

    first: int
    end: int


class Owner(NamedTuple):
    """What a slot was written for: block `key` of a volume (WRITE), or its map page with that key (PAGE)."""

    op: Op
    volume_id: int
    key: int


def owner_of(batch: Batch, index: int) -> Owner | None:
    """What the `index`-th data block of a batch was written for; None where an operation's meaning isn't known."""
    at = 0
    for op, volume_id, a, b in batch.operations():
        if op in (Op.WRITE, Op.REWRITE):
            if index < at + b:
                return Owner(Op.WRITE, volume_id, a + index - at)
            at += b
        elif op is Op.PAGE:
            if index == at:
                return Owner(op, volume_id, a)
            at += 1
    return None


class Scan:
    """The scan of one segment up to slot `used`. Feed it all slots from 0 on, in order."""

    def __init__(self, pool_uuid: bytes, segment_id: int, used: int) -> None:
        self._pool = pool_uuid
        self._segment_id = segment_id
        self.used = used
        self._slot = 0
        self._checks: list[int] = []
        """Of the batch that the scan is in; `_raw` is its header, which stands at slot `_header_at`."""
        self._raw = b""
        self._header_at = 0
        self._verified = 0
        self._frames: list[Frame] = []
        """Of the batch that the scan is in, if it has frames: `_verified` is then in frames."""
        self._frame_slots = 0
        self._frame_hash = xxhash.xxh3_64()
        self._frame_unreadable: str | None = None
        """Of the frame that the scan is in: slots seen, the hash of these, and what couldn't be read."""
        self._header = bytearray()
        """The beginning of a header whose rest is in the next piece."""
        self._gap_from: int | None = None

    def feed(self, data: memoryview, unreadable: Mapping[int, str]) -> Iterator[list[Suspect | Gap]]:
        """Verify the next slots. Yields what was found after each unit of work: the caller lets others run then.

        `unreadable`: slots of `data` that could not be read, whatever stands in their place.
        """
        found: list[Suspect | Gap] = []
        cost = 0
        at, count = 0, len(data) >> BLOCK_SHIFT
        while at < count:
            if self._verified < len(self._frames):
                run = min(self._frames[self._verified].slots - self._frame_slots, count - at)
                self._verify_frame(data[at << BLOCK_SHIFT : at + run << BLOCK_SHIFT], unreadable, found)
                at += run
                cost += run
            elif self._verified < len(self._checks):
                run = min(len(self._checks) - self._verified, count - at, UNIT - cost % UNIT)
                self._verify(data[at << BLOCK_SHIFT : at + run << BLOCK_SHIFT], unreadable, found)
                at += run
                cost += run
            elif self._slot == 0:
                self._segment_header(data[:BLOCK_BYTES], unreadable, found)
                at += 1
            else:
                at += self._batch_header(data[at << BLOCK_SHIFT :], unreadable, found)
                cost += BATCH_COST
            if cost >= UNIT:
                yield found
                found, cost = [], 0
        if self._slot >= self.used and self._header:
            self._lost(self._slot - (len(self._header) >> BLOCK_SHIFT))
            self._header.clear()
        if self._slot >= self.used and self._gap_from is not None:
            found.append(Gap(self._gap_from, self.used))
            self._gap_from = None
        yield found

    def _verify(self, part: memoryview, unreadable: Mapping[int, str], found: list[Suspect | Gap]) -> None:
        checks = checks_of(part)
        first = self._verified
        wanted = self._checks[first : first + len(checks)]
        if checks != wanted or unreadable:
            different = [i for i in range(len(checks)) if checks[i] != wanted[i] or self._slot + i in unreadable]
            if different:
                batch = decode_batch(self._raw, self._pool, self._segment_id, self._header_at)
                found += [Suspect(self._slot + i, batch, first + i, unreadable.get(self._slot + i)) for i in different]
        self._verified += len(checks)
        self._slot += len(checks)

    def _verify_frame(self, part: memoryview, unreadable: Mapping[int, str], found: list[Suspect | Gap]) -> None:
        """Take slots of the frame at hand; judge it when they are all there."""
        frame = self._frames[self._verified]
        count = len(part) >> BLOCK_SHIFT
        self._frame_hash.update(part)
        if unreadable:
            reasons = (unreadable[slot] for slot in range(self._slot, self._slot + count) if slot in unreadable)
            self._frame_unreadable = self._frame_unreadable or next(reasons, None)
        self._frame_slots += count
        self._slot += count
        if self._frame_slots < frame.slots:
            return
        if self._frame_unreadable is not None or self._frame_hash.intdigest() != frame.check:
            batch = decode_batch(self._raw, self._pool, self._segment_id, self._header_at)
            places = batch.places()
            first = sum(before.blocks for before in self._frames[: self._verified])
            found += [Suspect(places[i], batch, i, self._frame_unreadable) for i in range(first, first + frame.blocks)]
        self._verified += 1
        self._begin_frame()

    def _begin_frame(self) -> None:
        self._frame_slots = 0
        self._frame_hash.reset()
        self._frame_unreadable = None

    def _segment_header(self, block: memoryview, unreadable: Mapping[int, str], found: list[Suspect | Gap]) -> None:
        try:
            sound = decode_segment_header(block, self._pool).segment_id == self._segment_id and 0 not in unreadable
        except BadRecordError:
            sound = False
        if not sound:
            found.append(Gap(0, 1))
        self._slot = 1

    def _batch_header(self, data: memoryview, unreadable: Mapping[int, str], found: list[Suspect | Gap]) -> int:
        """Judge the header that should begin (or go on) here; return how many slots were taken of `data`."""
        held = len(self._header) >> BLOCK_SHIFT
        first = self._slot - held
        block = self._header if held else data
        wanted = peek_header_slots(block[:BLOCK_BYTES])
        here = min(max(1, wanted - held), len(data) >> BLOCK_SHIFT)
        lost = wanted == 0 or any(slot in unreadable for slot in range(self._slot, self._slot + here))
        if not lost and held + here < wanted:
            self._header += data[: here << BLOCK_SHIFT]
            self._slot += here
            return here
        if not lost:
            try:
                rest = data[: here << BLOCK_SHIFT]
                header = self._header + rest if held else rest
                _, self._checks, self._frames = decode_checks(header, self._pool, self._segment_id, first)
                if self._frames:
                    self._checks = []
                self._begin_frame()
                self._raw, self._header_at = bytes(header), first
            except BadRecordError:
                lost = True
        self._header.clear()
        if lost:
            # The next header may stand anywhere behind this slot.
            self._lost(first)
            self._slot += 1
            return 1
        if self._gap_from is not None:
            found.append(Gap(self._gap_from, first))
            self._gap_from = None
        self._verified = 0
        self._slot += here
        return here

    def _lost(self, first: int) -> None:
        self._checks, self._frames = [], []
        self._verified = 0
        if self._gap_from is None:
            self._gap_from = first
