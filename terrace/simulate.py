"""What a policy and a pool's sizes would make of a block trace: the model behind `terrace policy simulate`.

Heat and every decision about it are the engine's own (`tiers.heat`, `tiers.temperature`): what differs is everything
around them. Segments are slots in memory, an operation takes no time, and the cleaner is the simplest that keeps the
tiers apart: when few free segments are left it empties the emptiest ones, the older first. No checkpoints, no headers,
no map, no compression: the figures are of data blocks.

Requests are taken in batches of `BATCH_REQUESTS`, as the engine takes them from its queues: within a batch all reads
see the state before it. A block that the trace reads before it wrote it lies on base when the simulation begins.
"""

import errno
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from terrace.trace import Trace
from tiers import TierError
from tiers.heat import Heat, Ints, Mask, Streams, Touch, expanded
from tiers.layout import BLOCK_BYTES, BLOCK_SHIFT, MIN_DEVICE_BYTES, segment_bytes_for
from tiers.policy import Policy
from tiers.temperature import Temperature
from tiers.units import format_size

BATCH_REQUESTS = 256
HEAT_BYTES = 256 << 20
LOW_SHARE = 0.08
"""The cleaner works where fewer free segments than this are left, and the open ones."""
LIVE_SHARE = 0.85
"""So much of a tier's slots may be live: the rest is what cleaning lives on."""
VICTIMS = 4
MOST_LEAVE = 0.75
BYPASS_FREE_SHARE = 0.25
"""With less of the fast tier free than this, writes of long streams go to base."""
HALF_LIFE_S = 3600.0
LARGEST_PROMOTED_READ = 32
"""Blocks; as in `tiers.promotion`."""


@dataclass
class Figures:
    """What the simulation counted. Bytes of data blocks; reads in blocks."""

    requests: int = 0
    read_blocks: int = 0
    fast_blocks: int = 0
    """Of them, found on fast."""
    written_bytes: int = 0
    promoted_bytes: int = 0
    demoted_bytes: int = 0
    rewritten_bytes: int = 0
    """Moved within a tier by the cleaner."""
    bypassed_bytes: int = 0
    """Of what was written, straight to base as a part of a long stream."""
    footprint_bytes: int = 0
    """Distinct blocks that the trace touches."""
    optimal_fast_blocks: int = 0
    """Of the blocks read: how many an optimal fixed choice of blocks for the fast tier would find there."""
    windows: list[tuple[int, int]] = field(default_factory=list)
    """(blocks read, of them found on fast) of ten equal parts of the trace."""

    @property
    def hit_ratio(self) -> float | None:
        """Reads found on fast, 0 to 1; None where nothing was read."""
        return self.fast_blocks / self.read_blocks if self.read_blocks else None

    @property
    def optimal_hit_ratio(self) -> float | None:
        """The same of an optimal fixed choice."""
        return self.optimal_fast_blocks / self.read_blocks if self.read_blocks else None

    @property
    def last_hit_ratio(self) -> float | None:
        """The hit ratio of the last tenth: after warm-up, if the trace is long enough."""
        reads, hits = self.windows[-1] if self.windows else (0, 0)
        return hits / reads if reads else None

    @property
    def write_amplification(self) -> float | None:
        """Bytes that devices write for each byte that clients write; None where they write nothing."""
        device = self.written_bytes + self.promoted_bytes + self.demoted_bytes + self.rewritten_bytes
        return device / self.written_bytes if self.written_bytes else None


class _Tier:
    """Segments of one tier: slots that hold blocks (dense numbers), filled front to back."""

    def __init__(self, name: str, size_bytes: int, first_segment: int) -> None:
        if size_bytes < MIN_DEVICE_BYTES:
            raise TierError(errno.EINVAL, f"a {name} tier of {format_size(size_bytes)} is too small: give 32M or more")
        segment_bytes = segment_bytes_for(size_bytes)
        self.name = name
        self.slots = segment_bytes >> BLOCK_SHIFT
        self.count = size_bytes // segment_bytes
        self.first = first_segment
        self.blocks: dict[int, Ints] = {}
        self.live = np.zeros(self.count, np.int64)
        self.used = np.zeros(self.count, np.int64)
        self.born = np.zeros(self.count, np.int64)
        self.free = list(range(self.count - 1, -1, -1))
        self.open: dict[str, int] = {}
        self.clock = 0

    @property
    def total_live(self) -> int:
        return int(self.live.sum())

    @property
    def limit(self) -> int:
        """How many blocks may be live."""
        return int(self.count * self.slots * LIVE_SHARE)

    @property
    def is_low(self) -> bool:
        return len(self.free) < max(3, int(self.count * LOW_SHARE))


class Simulation:
    """One run: `step` until the trace is at its end; `figures` all the while."""

    def __init__(self, trace: Trace, policy: Policy, fast_bytes: int, base_bytes: int | None) -> None:
        self.figures = Figures()
        self._trace = trace
        self._policy = policy
        self._fast = _Tier("fast", fast_bytes, 0)
        self._volumes = np.unique(trace.volumes).tolist()
        self._ids, self._reads = _known(trace)
        self.base_bytes = base_bytes or max(2 * len(self._ids) * BLOCK_BYTES, 4 * MIN_DEVICE_BYTES)
        self._base = _Tier("base", self.base_bytes, self._fast.count)
        self.figures.footprint_bytes = len(self._ids) * BLOCK_BYTES
        room = self._fast.limit + self._base.limit
        if len(self._ids) > room:
            raise TierError(
                errno.ENOSPC,
                f"the trace touches {format_size(len(self._ids) * BLOCK_BYTES)} and these tiers hold "
                f"{format_size(room * BLOCK_BYTES)} at {LIVE_SHARE:.0%} full: give larger --fast or --base",
            )
        self.figures.optimal_fast_blocks = int(np.sort(self._reads)[::-1][: self._fast.limit].sum())
        self._place = np.full(len(self._ids), -1, np.int64)
        """Where each block lies: tier's first segment + segment, times the largest number of slots, + slot."""
        self._stride = max(self._fast.slots, self._base.slots)
        self._heat = Heat(HEAT_BYTES, self._fast.count * self._fast.slots + self._base.count * self._base.slots)
        self._temperature = Temperature(self._heat)
        self._streams = {volume: (Streams(), Streams()) for volume in self._volumes}
        self._halved_at = float(trace.times[0]) if len(trace.times) else 0.0
        self._prefill()

    def _prefill(self) -> None:
        """What is read before it is written lies on base; what doesn't fit there on fast."""
        there = np.flatnonzero(_first_is_read(self._trace, self._ids))
        for tier, part in ((self._base, there[: self._base.limit]), (self._fast, there[self._base.limit :])):
            for at in range(0, len(part), tier.slots):
                self._append(tier, "cold", part[at : at + tier.slots])

    def run(self, progress: Callable[[int], None] = lambda done: None) -> Figures:
        """Replay the trace. `progress` is told how many requests are done."""
        total = len(self._trace)
        for number in range(10):
            before = self.figures.read_blocks, self.figures.fast_blocks
            lo, hi = total * number // 10, total * (number + 1) // 10
            for at in range(lo, hi, BATCH_REQUESTS):
                self._batch(at, min(at + BATCH_REQUESTS, hi))
                progress(min(at + BATCH_REQUESTS, hi))
            self.figures.windows.append((self.figures.read_blocks - before[0], self.figures.fast_blocks - before[1]))
        return self.figures

    # -- one batch of requests -----------------------------------------------------------------------------------------

    def _batch(self, first: int, end: int) -> None:
        part = self._trace.slice(first, end)
        self.figures.requests += end - first
        for volume in self._volumes:
            for touch in Touch:
                chosen = (part.volumes == volume) & (part.writes == (touch is Touch.WRITE))
                if chosen.any():
                    self._requests(touch, volume, part.starts[chosen], part.counts[chosen])
        self._age(float(part.times[-1]))

    def _requests(self, touch: Touch, volume: int, starts: Ints, counts: Ints) -> None:
        """Carry out the requests of one kind of a batch, in the engine's order: data, then heat."""
        order = np.argsort(starts, kind="stable")
        starts, counts = starts[order], counts[order]
        cutoff = self._policy.stream_cutoff_bytes >> BLOCK_SHIFT
        earning = self._streams[volume][touch].earning(starts, counts, order, cutoff) if cutoff else None
        ids = self._find(volume, expanded(starts, counts))
        if touch is Touch.READ:
            self._read(volume, ids, np.repeat(counts <= LARGEST_PROMOTED_READ, counts))
        else:
            in_stream = np.zeros(len(ids), np.bool_) if earning is None else np.repeat(~earning, counts)
            self._write(ids, in_stream)
        if earning is not None:
            starts, counts = starts[earning], counts[earning]
        if len(starts):
            self._heat.note(touch, volume, starts, counts)

    def _find(self, volume: int, blocks: Ints) -> Ints:
        return np.searchsorted(self._ids, volume << Trace.VOLUME_SHIFT | blocks)

    def _read(self, volume: int, ids: Ints, small: Mask) -> None:
        self.figures.read_blocks += len(ids)
        on_fast = self._is_on(self._fast, ids)
        self.figures.fast_blocks += int(np.count_nonzero(on_fast))
        offered = np.unique(ids[small & ~on_fast & (self._place[ids] >= 0)])
        if len(offered):
            blocks = self._ids[offered] & (1 << Trace.VOLUME_SHIFT) - 1
            hot = offered[self._temperature.admits_each(self._policy, volume, blocks)]
            if len(hot) and len(self._fast.free) > 2:
                self._append(self._fast, "log", hot)
                self.figures.promoted_bytes += len(hot) * BLOCK_BYTES
                self._clean()

    def _write(self, ids: Ints, in_stream: Mask) -> None:
        self.figures.written_bytes += len(ids) * BLOCK_BYTES
        crowded = len(self._fast.free) < self._fast.count * BYPASS_FREE_SHARE
        to_base = in_stream & (crowded and self._policy.placement != "fast")
        self.figures.bypassed_bytes += int(np.count_nonzero(to_base)) * BLOCK_BYTES
        for tier, stream, part in ((self._base, "stream", ids[to_base]), (self._fast, "log", ids[~to_base])):
            part = np.unique(part)
            for at in range(0, len(part), self._fast.slots):
                self._append(tier, stream, part[at : at + self._fast.slots])
                self._clean()

    def _age(self, now: float) -> None:
        passes = [sketch.halve() for sketch in self._heat.sketches if sketch.is_due]
        if now - self._halved_at >= HALF_LIFE_S:
            self._halved_at = now
            passes = [self._heat.extents.halve(), *(sketch.halve() for sketch in self._heat.sketches)]
        if self._heat.extents.crowded:
            passes.append(self._heat.extents.evict())
        for steps in passes:
            for _ in steps:
                pass

    # -- segments ------------------------------------------------------------------------------------------------------

    def _is_on(self, tier: _Tier, ids: Ints) -> Mask:
        segment = self._place[ids] // self._stride
        return (segment >= tier.first) & (segment < tier.first + tier.count) & (self._place[ids] >= 0)

    def _append(self, tier: _Tier, stream: str, ids: Ints) -> None:
        """Put distinct blocks into a tier; their old places are dead."""
        for owner in (self._fast, self._base):
            there = ids[self._is_on(owner, ids)]
            np.subtract.at(owner.live, self._place[there] // self._stride - owner.first, 1)
        at = 0
        while at < len(ids):
            segment = tier.open.get(stream)
            if segment is None or tier.used[segment] == tier.slots:
                segment = self._open(tier, stream)
            used = int(tier.used[segment])
            part = ids[at : at + tier.slots - used]
            tier.blocks[segment][used : used + len(part)] = part
            self._place[part] = (tier.first + segment) * self._stride + used + np.arange(len(part))
            tier.used[segment] += len(part)
            tier.live[segment] += len(part)
            at += len(part)

    def _open(self, tier: _Tier, stream: str) -> int:
        if not tier.free:
            dead = np.flatnonzero((tier.live == 0) & (tier.used == tier.slots))
            self._release(tier, dead)
        if not tier.free:
            raise TierError(errno.ENOSPC, f"the {tier.name} tier is full of live blocks: give a larger --{tier.name}")
        segment = tier.free.pop()
        tier.open[stream] = segment
        tier.used[segment] = 0
        tier.clock += 1
        tier.born[segment] = tier.clock
        if segment not in tier.blocks:
            tier.blocks[segment] = np.zeros(tier.slots, np.int64)
        return segment

    def _release(self, tier: _Tier, segments: Ints) -> None:
        opened = set(tier.open.values())
        for segment in segments.tolist():
            if segment not in opened:
                tier.used[segment] = 0
                tier.free.append(segment)

    def _clean(self) -> None:
        """Make room where little is left."""
        for tier in (self._fast, self._base):
            rounds = 0
            while tier.is_low or (tier is self._fast and tier.total_live > tier.limit + tier.slots):
                if not self._clean_round(tier):
                    break
                rounds += 1
                if rounds > 4 * tier.count:
                    break

    def _clean_round(self, tier: _Tier) -> bool:
        """Empty the emptiest segments; whether that gained anything."""
        full = tier.used == tier.slots
        full[[segment for segment in tier.open.values() if tier.used[segment] < tier.slots]] = False
        candidates = np.flatnonzero(full)
        if not len(candidates):
            return False
        order = np.lexsort((tier.born[candidates], tier.live[candidates]))
        victims = candidates[order[:VICTIMS]]
        for stream, segment in list(tier.open.items()):
            if segment in victims:
                del tier.open[stream]
        ids = np.concatenate([self._live_in(tier, int(segment)) for segment in victims])
        free = len(tier.free)
        if tier is self._base:
            self._relocate(self._base, "cold", ids)
            self.figures.rewritten_bytes += len(ids) * BLOCK_BYTES
        else:
            over = tier.total_live - tier.limit
            leave = min(max(0, over), int(len(ids) * MOST_LEAVE), max(0, self._base.limit - self._base.total_live))
            volumes, blocks = self._ids[ids] >> Trace.VOLUME_SHIFT, self._ids[ids] & (1 << Trace.VOLUME_SHIFT) - 1
            stays = self._temperature.survivors(volumes, blocks, leave, dict.fromkeys(self._volumes, self._policy))
            hot = self._temperature.is_hot(volumes, blocks)
            self._relocate(self._fast, "hot", ids[stays & hot])
            self._relocate(self._fast, "cold", ids[stays & ~hot])
            self._relocate(self._base, "cold", ids[~stays])
            self.figures.rewritten_bytes += int(np.count_nonzero(stays)) * BLOCK_BYTES
            self.figures.demoted_bytes += int(np.count_nonzero(~stays)) * BLOCK_BYTES
        self._release(tier, victims)
        return len(tier.free) > free or not len(ids)

    def _live_in(self, tier: _Tier, segment: int) -> Ints:
        ids: Ints = tier.blocks[segment]
        places = (tier.first + segment) * self._stride + np.arange(tier.slots)
        live: Ints = ids[self._place[ids] == places]
        return live

    def _relocate(self, tier: _Tier, stream: str, ids: Ints) -> None:
        if len(ids):
            self._append(tier, stream, ids)


def _keys(part: Trace) -> Ints:
    """Volume and block in one number, of all blocks of all requests."""
    return np.repeat(part.volumes, part.counts) << Trace.VOLUME_SHIFT | expanded(part.starts, part.counts)


def _known(trace: Trace) -> tuple[Ints, Ints]:
    """The distinct blocks of a trace (volume and block in one number, ascending), and how often each is read."""
    parts = []
    for at in range(0, len(trace), 1 << 16):
        part = trace.slice(at, at + (1 << 16))
        parts.append(
            np.unique(np.repeat(part.volumes, part.counts) << Trace.VOLUME_SHIFT | expanded(part.starts, part.counts))
        )
    ids = np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)
    reads = np.zeros(len(ids), np.int64)
    for at in range(0, len(trace), 1 << 16):
        part = trace.slice(at, at + (1 << 16)).only(writes=False)
        np.add.at(reads, np.searchsorted(ids, _keys(part)), 1)
    return ids, reads


def _first_is_read(trace: Trace, ids: Ints) -> Mask:
    """Which blocks are read before they are written."""
    result = np.zeros(len(ids), np.bool_)
    seen = np.zeros(len(ids), np.bool_)
    for at in range(0, len(trace), BATCH_REQUESTS):
        part = trace.slice(at, at + BATCH_REQUESTS)
        for writes in (False, True):
            found = np.searchsorted(ids, _keys(part.only(writes=writes)))
            if not writes:
                result[found[~seen[found]]] = True
            seen[found] = True
    return result
