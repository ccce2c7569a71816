"""What turns clients' requests into heat: one task a pool, and the only one that changes its counters.

A request appends a number to a queue of its volume (`Volume.reads`, `Volume.writes`) and goes on: that is all that it
pays on its way (24 ns for a read; the drain below costs about 130 ns more, later and in bulk). Several times a second
`drain` takes what has gathered, drops what belongs to sequential streams, and counts the rest in `tiers.heat`. The
queues are bounded, and so is what a drain counts: under more load than that a random sample is counted, which leaves
all proportions as they are.

Nothing here is needed for anything but placement. The counters are saved every few minutes and at the pool's close
(`tiers/heatfile.py`); what a crash loses is the warmth of those minutes.
"""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import trio

from tiers.heat import Ints, Mask, Streams, Touch
from tiers.heatfile import EXTENTS, SKETCH, HeatFile, SavedHeat
from tiers.host import Host
from tiers.layout import BLOCK_BYTES, BLOCK_SHIFT, FIRST_ADDRESS, MIB, SLOT_BITS
from tiers.reader import RUN_MASK, RUN_SHIFT, SLOW
from tiers.record import OP_WORDS, WRITE_WORD
from tiers.volume import MAX_RECORDED, Volume

if TYPE_CHECKING:
    from tiers.engine import Engine

logger = logging.getLogger(__name__)

BUSY_INTERVAL_S = 0.1
IDLE_INTERVAL_S = 1.0
NOTED_REQUESTS = 8192
"""Of one volume and kind, in one drain: what is more is sampled."""
MAX_DRAINED_BLOCKS = 1 << 17
"""The same for what long requests cover."""
NOTED_BLOCKS = 16384
"""At once, before others get their turn: about a millisecond and a half."""
SAMPLED_READS = 16
"""Of those of one volume that didn't have to wait, in one drain: looked up, to tell how many the fast tier answers."""
HIT_MEMORY = 20_000
"""So many reads the hit ratio is of, the older with less weight."""
SAVE_SHARE = 20
"""Saving may take no more than a twentieth of the time."""

_ORDER_BITS = MAX_RECORDED.bit_length()
_ORDER_MASK = (1 << _ORDER_BITS) - 1


class Recorder:
    """See the module. All of it belongs to the trio thread."""

    def __init__(self, engine: "Engine", store: HeatFile, host: Host) -> None:
        self._engine = engine
        self._store = store
        self._host = host
        self.heat = engine.heat
        self._streams: dict[int, tuple[Streams, Streams]] = {}
        self._rng = np.random.Generator(np.random.PCG64(1))
        self._halved_at = host.now()
        self._save_failed = False
        self._changed = False
        self._fast_reads = 0.0
        self._known_reads = 0.0

    # -- what others ask -------------------------------------------------------------------------------------------

    @property
    def hit_ratio(self) -> float | None:
        """The share of clients' reads, of what is mapped, that lay on the fast tier: 0 to 1, of the last 20,000 or so.

        None where nothing was read. Those that had to wait for a device are counted, the others estimated.
        """
        return self._fast_reads / self._known_reads if self._known_reads else None

    # -- the task --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Drain, age and save for as long as the pool is open."""
        saved_at = trio.current_time()
        pause = self._engine.settings.heat_save_interval_s
        while True:
            busy = await self.drain()
            now = trio.current_time()
            if now - saved_at >= pause and self._changed:
                await self.save()
                took = trio.current_time() - now
                pause = max(self._engine.settings.heat_save_interval_s, SAVE_SHARE * took)
                saved_at = trio.current_time()
            await trio.sleep(BUSY_INTERVAL_S if busy else IDLE_INTERVAL_S)

    async def drain(self) -> bool:
        """Count what was requested up to now; afterwards `heat` knows it. Whether there was anything."""
        busy = False
        for volume in list(self._engine.volumes.values()):
            for touch in Touch:
                requests = self._take(volume, touch)
                if requests is None:
                    continue
                busy = True
                for starts, counts in _slices(*requests):
                    if volume.deleted:
                        break
                    self.heat.note(touch, volume.id, starts, counts)
                    await trio.lowlevel.checkpoint()
        self._changed |= busy
        await self._age()
        return busy

    def _take(self, volume: Volume, touch: Touch) -> tuple[Ints, Ints] | None:
        """Requests of one kind since the last time that earn heat: (starts, counts) in blocks, starts ascending."""
        if touch is Touch.READ:
            starts, counts, prompt = _read_requests(volume)
            self._sample(volume, starts[prompt])
        else:
            starts, counts = _write_requests(volume)
        if not len(starts):
            return None
        keys = starts << _ORDER_BITS | np.arange(len(starts))
        keys.sort()
        starts, order = keys >> _ORDER_BITS, keys & _ORDER_MASK
        counts = counts[order]
        cutoff = volume.policy.stream_cutoff_bytes >> BLOCK_SHIFT
        if cutoff:
            streams = self._streams.get(volume.id)
            if streams is None:
                streams = self._streams[volume.id] = (Streams(), Streams())
            earning = streams[touch].earning(starts, counts, order, cutoff)
            if earning is not None:
                starts, counts = starts[earning], counts[earning]
                if not len(starts):
                    return None
        share = MAX_DRAINED_BLOCKS / int(counts.sum())
        most = max(1, min(NOTED_REQUESTS, int(len(starts) * share)))
        if len(starts) > most:
            chosen = np.sort(self._rng.choice(len(starts), most, replace=False))
            starts, counts = starts[chosen], counts[chosen]
        return starts, counts

    def _sample(self, volume: Volume, prompt: Ints) -> None:
        """Count hits: of the reads that waited, and, by looking up where some of the others lie, of those."""
        waited = volume.slow_reads
        fast, total = float(waited["fast"]), float(waited["fast"] + waited["base"])
        volume.slow_reads = dict.fromkeys(waited, 0)
        mapped = hits = 0
        segments = self._engine.segments.by_id
        for block in prompt[:: -(-len(prompt) // SAMPLED_READS) or 1].tolist():
            entry = volume.entry_now(block)
            if entry is not None and entry[0] >= FIRST_ADDRESS:
                segment = segments.get(entry[0] >> SLOT_BITS)
                if segment is not None:
                    mapped += 1
                    hits += segment.device.tier == "fast"
        if mapped:
            total += len(prompt)
            fast += len(prompt) * hits / mapped
        left = max(0.0, 1 - total / HIT_MEMORY)
        self._known_reads = self._known_reads * left + total
        self._fast_reads = self._fast_reads * left + fast

    async def _age(self) -> None:
        """Let old counts fade, where it is time; and make room for new ones."""
        heat = self.heat
        if len(self._streams) > len(self._engine.volumes):
            for gone in self._streams.keys() - self._engine.volumes.keys():
                del self._streams[gone]
        now = self._host.now()
        half_life = self._engine.settings.heat_half_life_s
        passes: list[Iterator[None]] = []
        if now < self._halved_at:
            self._halved_at = now  # the clock was put back
        if now - self._halved_at >= half_life:
            self._halved_at = now
            passes = [heat.extents.halve(), *(sketch.halve() for sketch in heat.sketches)]
        else:
            passes = [sketch.halve() for sketch in heat.sketches if sketch.is_due]
        if heat.extents.crowded:
            passes.append(heat.extents.evict())
        for steps in passes:
            for _ in steps:
                await trio.lowlevel.checkpoint()

    # -- over restarts -----------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Recall what was saved, as far as its volumes are still there. While the pool was closed nothing faded."""
        saved = await self._engine.offload(self._store.load, self.heat.extents.max_rows)
        if saved is not None:
            await self._restore(saved)
        self._halved_at = self._host.now()

    async def _restore(self, saved: SavedHeat) -> None:
        extents = self.heat.extents
        for keys, rows in saved.extents:
            extents.restore(keys, rows)
            await trio.lowlevel.checkpoint()
        volumes = self._engine.volumes
        for volume_id in extents.volumes() - volumes.keys():
            extents.forget(volume_id)
        for volume in volumes.values():
            extents.forget(volume.id, -(-volume.size_bytes // BLOCK_BYTES))
        for sketch, saved_rows, noted in zip(self.heat.sketches, saved.sketches, saved.noted, strict=True):
            sketch.recall(saved_rows, noted)

    async def save(self) -> None:
        """Write the file anew. A failure is told of, and changes nothing."""
        heat, store, offload = self.heat, self._store, self._engine.offload
        self._changed = False
        bits = heat.sketches[0].bits
        noted = (heat.sketches[0].noted, heat.sketches[1].noted)
        try:
            try:
                await offload(store.begin, bits, self._host.now(), noted)
                for keys, rows in heat.extents.export():
                    raw = keys.astype("<u8").tobytes() + rows.tobytes()
                    await offload(store.add, EXTENTS, 0, len(keys), raw)
                for touch, sketch in enumerate(heat.sketches):
                    for index, row in enumerate(sketch.rows):
                        for part in range(-(-len(row) // MIB)):
                            raw = row[part * MIB : (part + 1) * MIB].tobytes()
                            await offload(store.add, SKETCH, touch * sketch.ROWS + index, part, raw)
                await offload(store.finish)
            finally:
                store.abandon()
        except OSError as error:
            if not self._save_failed:
                logger.warning("saving %s: %s; after a restart its pool starts cold", store.path, error)
            self._save_failed = True
        else:
            self._save_failed = False

    async def close(self) -> None:
        """Count and save what has gathered. For when the task has ended."""
        await self.drain()
        if self._changed:
            await self.save()


def _read_requests(volume: Volume) -> tuple[Ints, Ints, Mask]:
    """(starts, counts, whether it was answered without waiting for a device) of what was read."""
    words = np.fromiter(volume.reads, np.int64, len(volume.reads))
    volume.reads.clear()
    counts = np.ones(len(words), np.int64)
    prompt = np.ones(len(words), np.bool_)
    longer = np.flatnonzero(words < 0)
    coded = ~words[longer]
    counts[longer] = coded & RUN_MASK
    prompt[longer] = coded & SLOW == 0
    words[longer] = coded >> RUN_SHIFT
    return words, counts, prompt


def _write_requests(volume: Volume) -> tuple[Ints, Ints]:
    operations = np.fromiter(volume.writes, np.int64, len(volume.writes)).reshape(-1, OP_WORDS)
    volume.writes.clear()
    writes = operations[operations[:, 0] == WRITE_WORD | volume.id]
    return writes[:, 1], writes[:, 2]


def _slices(starts: Ints, counts: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Parts of requests that have at most NOTED_BLOCKS blocks each, or one request."""
    if len(starts) <= NOTED_BLOCKS and int(counts.sum()) <= NOTED_BLOCKS:
        yield starts, counts
        return
    ends = np.cumsum(counts)
    at, done = 0, 0
    while at < len(starts):
        stop = max(at + 1, int(np.searchsorted(ends, done + NOTED_BLOCKS, side="right")))
        yield starts[at:stop], counts[at:stop]
        at, done = stop, int(ends[stop - 1])
