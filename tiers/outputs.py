"""Batches outside the log: blocks appended to a segment of moved or packed data, which a MOVE record makes true later.

Whoever moves blocks, and streams that go past the log, append through here, so that what crash safety rests on is in
one place: the header chain, the pin, and that nobody else's flush waits for bytes that no record names yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiers.device import Buffer
from tiers.frames import Frame
from tiers.layout import BLOCK_SHIFT, SLOT_BITS
from tiers.record import encode_batch, frame_words, places_of
from tiers.segments import Segment

if TYPE_CHECKING:
    from tiers.engine import Engine


@dataclass(frozen=True, slots=True)
class Appended:
    """Where a batch stands, and its blocks."""

    slot: int
    header_check: int
    addresses: list[int]


async def append_copies(
    engine: "Engine",
    segment: Segment,
    ops: list[int],
    checks: list[int],
    frames: list[Frame] | None,
    buffers: Sequence[Buffer],
) -> Appended:
    """Write a batch to an open segment that has room for it and that nobody else appends to.

    `frames`: how the blocks lie in `buffers`, if the segment is one of packed data. The segment is pinned until the
    caller takes the pin away, when the copies are true or given up. Raises OSError (or is cancelled); then nothing is
    pinned, and the segment's `used` stays before what failed, so that its headers stay a chain: the caller leaves the
    segment.
    """
    slot = segment.used
    header, header_check = encode_batch(
        segment.kind,
        engine.pool_uuid,
        segment.id,
        slot,
        engine.log.incarnation,
        engine.log.seq,
        0,
        engine.flusher.durable_seq,
        ops,
        checks,
        frame_words(frames or ()),
    )
    first = slot + (len(header) >> BLOCK_SHIFT)
    segment.pins += 1
    try:
        await segment.device.write_behind(segment.offset(slot), [header, *buffers])
    except BaseException:
        segment.pins -= 1
        raise
    if frames is None:
        segment.used = first + len(checks)
    else:
        segment.blocks += len(checks)
        segment.used = first + sum(frame.slots for frame in frames)
        engine.segments.settle_saved(segment)
    # In the same breath as `write_behind` has counted them: until the record nobody else needs these bytes.
    segment.device.unnamed_bytes += len(header) + sum(map(len, buffers))
    base = segment.id << SLOT_BITS
    return Appended(slot, header_check, [base | place for place in places_of(first, len(checks), frames)])
