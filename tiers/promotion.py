"""Promotion: a block that clients read from base, and that has become hot, is logged anew on the fast tier.

The bytes are at hand when the judgement falls: a client's read has just brought them, and they were verified. So a
promotion costs the base device nothing. It is a write of what is there already, by the rule for all that is prepared
outside: it is logged only if the map entry is still the one that was read through, in the same step of the loop. Nobody
can tell the volume from what it was before, whatever crashes; what lay on base is dead from then on. Where snapshots
may need the block it is a move all the same (a REWRITE record): they see it at its new place too. What a clone shares
with its origin is left where it is.

Reads offer, and never wait: an offer that finds the queue full, the log on base, or the pool short of room is dropped.
The block will be offered again when it is read again.
"""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from tiers.failpoint import hit
from tiers.layout import BLOCK_BYTES, BLOCK_SHIFT
from tiers.overlay import Entry
from tiers.placement import FAST_BEGIN_SHARE

if TYPE_CHECKING:
    from tiers.engine import Engine
    from tiers.volume import Volume

QUEUE_BLOCKS = 1024
"""4 MiB of offers at most."""
BATCH_BLOCKS = 64
"""One header slot serves so many."""
GATHER_S = 0.02
"""Offers of so long share batches: a batch of one block writes as much header as data."""
LARGEST_READ_BLOCKS = 32
"""What comes in larger reads is no random access: base serves it well."""

Judge = Callable[["Volume", int], bool]
"""(volume, block) -> whether this block, which was read from base, belongs on the fast tier."""


class Promoter:
    """The promotions of one pool. All of it belongs to the trio thread."""

    def __init__(self, engine: "Engine", judge: Judge) -> None:
        self.promoted_blocks = 0
        self.dropped_offers = 0
        """Blocks that were hot enough, and that there was no room or time for."""
        self._engine = engine
        self._judge = judge
        self._queue: deque[tuple[Volume, int, Entry, bytes]] = deque()
        self._wanted = trio.Event()

    def has_room(self) -> bool:
        """Whether there is any use in offering: the pool takes writes, on its fast tier, and the queue isn't full."""
        return (
            self._engine.space.read_only is None
            and len(self._queue) < QUEUE_BLOCKS
            and (self._engine.log.head.device.tier == "fast" or self._may_lead_back())
        )

    def _may_lead_back(self) -> bool:
        """Whether the log, which went to base when fast was full, can go on there: it is not short any more."""
        fast = self._engine.space.tier_use("fast")
        if fast.free < fast.total * FAST_BEGIN_SHARE:
            return False
        device = self._engine.log.pick_device()
        return device is not None and device.tier == "fast"

    def _is_on_fast(self) -> bool:
        """Whether the log is on fast, where it is led if it can be: those who only read would never bring it there."""
        log = self._engine.log
        if log.head.device.tier != "fast" and not log.broken and self._may_lead_back():
            try:
                log.roll()
            except OSError:
                return False  # the log has told of its trouble
        return log.head.device.tier == "fast"

    def offer(self, volume: "Volume", block: int, entry: Entry, data: bytes | bytearray | memoryview) -> None:
        """A block was read from base through `entry`, and `data` is what it holds, verified."""
        if not self._judge(volume, block):
            return
        if len(self._queue) >= QUEUE_BLOCKS:
            self.dropped_offers += 1
            return
        self._queue.append((volume, block, entry, bytes(data)))
        self._wanted.set()

    async def run(self) -> None:
        """The task: batches of what was offered."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            if len(self._queue) < BATCH_BLOCKS:
                await trio.sleep(GATHER_S)
            while self._queue:
                self._promote([self._queue.popleft() for _ in range(min(BATCH_BLOCKS, len(self._queue)))])
                await trio.lowlevel.checkpoint()

    def _promote(self, offers: "list[tuple[Volume, int, Entry, bytes]]") -> None:
        """Log those that are still what was read. No checkpoint of trio in here."""
        engine = self._engine
        writes: dict[Volume, dict[int, bytes]] = {}
        for volume, block, entry, data in offers:
            if not volume.deleted and volume.entry_now(block) == entry and volume.owns_now(block):
                writes.setdefault(volume, {})[block] = data
        for volume, blocks in writes.items():
            count = len(blocks)
            # Where the log isn't on the fast tier, or room is short, this would only add to the trouble.
            if (
                not self._is_on_fast()
                or not engine.migration.allows(volume, count << BLOCK_SHIFT)
                or not engine.space.admit(count, count)
            ):
                self.dropped_offers += count
                continue
            try:
                volume.rewrite([(block << BLOCK_SHIFT, data) for block, data in sorted(blocks.items())])
            except OSError:
                self.dropped_offers += count  # the log has told of its trouble; the block stays where it is
                continue
            engine.space.active_charge += count
            engine.moved_blocks += count
            self.promoted_blocks += count
            hit("promotion.logged")

    @property
    def promoted_bytes(self) -> int:
        """What has been promoted since the pool was opened."""
        return self.promoted_blocks * BLOCK_BYTES
