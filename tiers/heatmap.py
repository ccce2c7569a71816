"""A volume's heat map: for equal ranges of it, what lies on which tier, and how hot that is.

It has to answer at once for a volume of any size, so it looks at the map only in so many places (`SAMPLED_LEAVES` of
256 blocks, spread evenly over each range), and stops when its time is up: the shares are of what was looked at. A
volume of up to 2 GiB is seen whole. How hot the blocks of a tier are comes from the sketches, by block; how often a
range is read and written comes from the counters of its extents.
"""

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import trio

from tiers.heat import CHUNK_BITS, CHUNK_EXTENTS, EXTENT_BITS, EXTENT_BLOCKS, TOUCHES, Floats, expanded
from tiers.layout import BLOCK_BYTES, FIRST_ADDRESS, SLOT_BITS
from tiers.maptree import FANOUT, FANOUT_BITS

if TYPE_CHECKING:
    from tiers.engine import Engine
    from tiers.volume import Volume

MAX_RANGES = 4096
SAMPLED_LEAVES = 2048
LEAVES_AT_ONCE = 64
TIME_S = 0.4
"""Looking at the map ends after so long: on a slow device each page of it costs a seek."""
LOOKED_AT_EXTENTS = 1 << 20
"""Of a volume with more that were touched, every n-th is looked at."""


@dataclass(frozen=True)
class HeatMap:
    """A volume in ranges of `range_bytes`, the last one shorter. Lists have an item for each range, in order.

    Bytes are estimates where `looked_at` (the share of the volume's map that was) is below 1. Heat is in touches
    (reads + writes, halved each `half_life_s`) of a block of 4 KiB, in the mean over the range's blocks on that tier;
    `reads` and `writes` are requests, in the mean over the range's extents of 64 KiB, by the same clock. A range that
    was not looked at has None for bytes and heat.
    """

    volume: str
    size_bytes: int
    range_bytes: int
    half_life_s: float
    looked_at: float
    fast_bytes: list[int | None]
    base_bytes: list[int | None]
    fast_heat: list[float | None]
    base_heat: list[float | None]
    reads: list[float]
    writes: list[float]


async def heat_map(engine: "Engine", volume: "Volume", ranges: int) -> HeatMap:
    """The heat map of a volume in at most `ranges` ranges (1 to MAX_RANGES), each a multiple of 64 KiB."""
    blocks = -(-volume.size_bytes // BLOCK_BYTES)
    extents = -(-blocks // EXTENT_BLOCKS)
    range_extents = -(-extents // max(1, min(ranges, MAX_RANGES)))
    range_blocks = range_extents << EXTENT_BITS
    count = -(-extents // range_extents)
    places = _Places(engine, volume, blocks, range_blocks, count)
    await places.look()
    reads, writes = await _requests(engine, volume.id, range_extents, count, extents)
    sizes = np.full(count, range_blocks * BLOCK_BYTES, np.float64)
    sizes[-1] = volume.size_bytes - (count - 1) * range_blocks * BLOCK_BYTES
    seen = places.seen

    def scaled(part: Floats) -> list[int | None]:
        return [round(size * n / of) if of else None for size, n, of in zip(sizes, part, seen, strict=True)]

    def mean(heat: Floats, of: Floats) -> list[float | None]:
        return [
            None if not looked else round(float(h / n), 3) if n else 0.0
            for h, n, looked in zip(heat, of, seen, strict=True)
        ]

    return HeatMap(
        volume.name,
        volume.size_bytes,
        range_blocks * BLOCK_BYTES,
        engine.settings.heat_half_life_s,
        min(1.0, float(seen.sum()) / blocks),
        scaled(places.mapped["fast"]),
        scaled(places.mapped["base"]),
        mean(places.heat["fast"], places.mapped["fast"]),
        mean(places.heat["base"], places.mapped["base"]),
        reads.round(3).tolist(),
        writes.round(3).tolist(),
    )


class _Places:
    """Where the blocks of each range lie, as far as they were looked at."""

    def __init__(self, engine: "Engine", volume: "Volume", blocks: int, range_blocks: int, count: int) -> None:
        self._engine = engine
        self._volume = volume
        self._blocks = blocks
        self._range_blocks = range_blocks
        self.seen = np.zeros(count)
        self.mapped = {"fast": np.zeros(count), "base": np.zeros(count)}
        self.heat = {"fast": np.zeros(count), "base": np.zeros(count)}

    async def look(self) -> None:
        """At evenly spread leaves of every range, first one of each, until all is seen or time is up."""
        deadline = trio.current_time() + TIME_S
        leaves = _chosen(self._blocks, self._range_blocks, len(self.seen))
        for at in range(0, len(leaves), LEAVES_AT_ONCE):
            part = leaves[at : at + LEAVES_AT_ONCE]
            if trio.current_time() > deadline:
                return
            # What is cached, or can't be there, needs no wait; a damaged page is for reads and scrubs to tell of.
            try:
                with trio.move_on_at(deadline):
                    await self._volume.tree.load(0, part)
            except OSError:
                continue
            self._look_at(part)
            await trio.lowlevel.checkpoint()

    def _look_at(self, leaves: list[int]) -> None:
        """Count what is in these leaves, those of them that need no wait."""
        parts: list[list[int]] = []
        starts: list[int] = []
        for leaf in leaves:
            first = leaf << FANOUT_BITS
            found = self._volume.entries_now(first, min(FANOUT, self._blocks - first))
            if found is not None:
                parts.append(found[0])
                starts.append(first)
        if not parts:
            return
        blocks = expanded(np.array(starts, np.int64), np.array(list(map(len, parts)), np.int64))
        addresses = np.fromiter(chain.from_iterable(parts), np.int64, len(blocks))
        ranges = blocks // self._range_blocks
        self.seen += np.bincount(ranges, minlength=len(self.seen))
        there = addresses >= FIRST_ADDRESS
        blocks, ranges, segments = blocks[there], ranges[there], addresses[there] >> SLOT_BITS
        by_id = self._engine.segments.by_id
        ids, which = np.unique(segments, return_inverse=True)
        tiers = [by_id[segment_id].device.tier if segment_id in by_id else "" for segment_id in ids.tolist()]
        heat = self._engine.heat.estimates(self._volume.id, blocks)
        for tier, mapped in self.mapped.items():
            mine = np.array([found == tier for found in tiers], np.bool_)[which]
            mapped += np.bincount(ranges[mine], minlength=len(mapped))
            self.heat[tier] += np.bincount(ranges[mine], heat[mine], len(mapped))


def _chosen(blocks: int, range_blocks: int, count: int) -> list[int]:
    """Leaves to look at: all, if they are few, or some of each range; in an order of which each beginning is spread."""
    total = -(-blocks // FANOUT)
    if total <= SAMPLED_LEAVES:
        width = (total - 1).bit_length()
        return sorted(range(total), key=lambda leaf: int(f"{leaf:0{width or 1}b}"[::-1], 2))
    chosen: dict[int, None] = {}
    for turn in range(max(1, SAMPLED_LEAVES // count)):
        share = (turn + 0.5) / max(1, SAMPLED_LEAVES // count)
        for number in range(count):
            at = number * range_blocks + int(min(range_blocks, blocks - number * range_blocks) * share)
            chosen[min(at >> FANOUT_BITS, total - 1)] = None
    return list(chosen)


async def _requests(
    engine: "Engine", volume_id: int, range_extents: int, count: int, extents: int
) -> tuple[Floats, Floats]:
    """Reads and writes of each range, in the mean over its extents."""
    sums = np.zeros((2, count))
    counters = engine.heat.extents
    chunks = counters.chunk_count(volume_id)
    stride = 1
    while chunks * CHUNK_EXTENTS // stride > LOOKED_AT_EXTENTS:
        stride *= 2
    inside = np.arange(0, CHUNK_EXTENTS, stride)
    for numbers, rows in counters.batches(volume_id, stride):
        ranges = np.minimum(((numbers[:, None] << CHUNK_BITS) + inside) // range_extents, count - 1).ravel()
        for touch in range(2):
            touches = TOUCHES[rows[:, touch]].ravel()
            sums[touch] += np.bincount(ranges, touches, count)
        await trio.lowlevel.checkpoint()
    sizes = np.full(count, range_extents, np.float64)
    sizes[-1] = extents - (count - 1) * range_extents
    sums *= stride / sizes
    return sums[0], sums[1]
