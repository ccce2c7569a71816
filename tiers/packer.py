"""The packer: when nobody needs space, it brings what has rested into the form and the place that it should have.

While the fast tier has no room the log goes on on base, and what it leaves there is raw. When such a segment has rested
for a while and nobody waits for space, those of its blocks that compress well are moved into frames, by the mover, like
all that moves. What doesn't compress stays where it is, and is looked at once in the life of a pool.

What volumes with placement `base` have on the fast tier, where the log is, it moves to base in the same way.

A pool without a fast tier is left alone: there every write goes to base, and packing it all would write it twice.
"""

import logging
from typing import TYPE_CHECKING

import trio

from tiers.layout import BLOCK_BYTES
from tiers.mover import DamagedMapError, Mover, OutputFullError
from tiers.record import Kind
from tiers.segments import Segment
from tiers.volume import Volume

if TYPE_CHECKING:
    from tiers.engine import Engine

logger = logging.getLogger(__name__)

ROUND_SLOTS = 2048
"""So much is packed before it is made true: a flush a round."""
SPARE_SEGMENTS = 8
"""Free ones on base that are left to others."""
REST = 2.0
"""The packer rests so many times as long as it works."""
MAX_REST_S = 1.0
SLICE = 2048
"""Segments looked at without a checkpoint of trio in between."""


_ON_FAST = (Kind.LOG, Kind.MOVED)


def _belongs_on_base(volume: Volume) -> bool:
    return volume.policy.placement == "base"


class Packer:
    """The packing task of one pool."""

    def __init__(self, engine: "Engine") -> None:
        self.mover = Mover(engine)
        self.mover.packs_only = True
        self.placer = Mover(engine)
        self._engine = engine
        self._seen: set[int] = set()
        """Segments in which nothing is left that would become smaller, or belongs on base."""
        self._placed: set[int] = set()
        """The volumes that have belonged on base since `_seen` was begun."""

    async def run(self) -> None:
        """The task: rounds, as long as there is something to pack and nobody is in need of space."""
        age = self._engine.settings.pack_after_s
        while True:
            await trio.sleep(age / 2)
            pause = 0.0
            try:
                while self._is_quiet() and (victims := await self._victims(age)) and await self._round(victims):
                    pass
            except OutputFullError:
                pause = age
            except OSError as error:
                logger.error("packing on the base tier of pool %s: %s", self._engine.pool_name, error)
                pause = age
            finally:
                for mover in (self.mover, self.placer):
                    mover.drop_staged()
                    mover.seal_all()
            await trio.sleep(pause)

    def _is_quiet(self) -> bool:
        """Whether space is nobody's concern, and some volume's blocks may be moved now."""
        engine = self._engine
        volumes = engine.volumes.values()
        if not any(
            (engine.compression_of(v) or _belongs_on_base(v)) and engine.migration.allows(v, 0) for v in volumes
        ):
            return False
        space = engine.space
        fast, base = space.tier_use("fast"), space.tier_use("base")
        return (
            space.read_only is None
            and not space.waiters
            and not space.cleaning
            and space.rest_ratio() > 0
            and fast.total > 0
            and base.free > SPARE_SEGMENTS * space.largest_segment_slots
        )

    async def _victims(self, age: float) -> list[Segment]:
        """Segments that have rested, enough for a round; the oldest first.

        Log segments on base, and where some volume belongs on base all on fast.
        """
        segments = self._engine.segments
        self._seen &= segments.by_id.keys()
        placed = {volume.id for volume in self._engine.volumes.values() if _belongs_on_base(volume)}
        if not placed <= self._placed:
            self._seen.clear()
        self._placed = placed
        now = segments.clock()
        found: list[Segment] = []
        slots = 0
        for number, segment in enumerate(list(segments.by_id.values()), 1):
            if number % SLICE == 0:
                await trio.lowlevel.checkpoint()
            if (
                (segment.kind is Kind.LOG if segment.device.tier == "base" else placed and segment.kind in _ON_FAST)
                and segment.device.state == "online"
                and not (segment.open or segment.pins or segment.damaged or segment.given_out)
                and segment.last_seq <= self._engine.log.checkpoint_seq
                and segment.live
                and now - segment.opened_at >= age
                and segment.id not in self._seen
            ):
                found.append(segment)
                slots += segment.live
                if slots >= ROUND_SLOTS:
                    break
        return found

    async def _round(self, victims: list[Segment]) -> bool:
        """Pack what may be packed of these; False if they are all to be looked at once more."""
        engine = self._engine
        began = trio.current_time()
        for victim in victims:
            if engine.segments.by_id.get(victim.id) is not victim or not self._is_quiet():
                continue
            self._seen.add(victim.id)
            try:
                live = await self.mover.survey(victim)
                packs = victim.device.tier == "base"
                mover = self.mover if packs else self.placer
                wanted = engine.compression_of if packs else _belongs_on_base
                chosen = [candidate for candidate in live if wanted(candidate[0])]
                may = [candidate for candidate in chosen if engine.migration.allows(candidate[0], BLOCK_BYTES)]
                await mover.move_blocks(victim, may, "base")
            except DamagedMapError as error:
                victim.damaged = True
                logger.error("segment %d can't be packed and is set aside: %s", victim.id, error)
                continue
            if len(may) < len(chosen):
                self._seen.discard(victim.id)  # another time
        await self.mover.apply_staged()
        await self.placer.apply_staged()
        await trio.sleep(min(MAX_REST_S, max(0.001, REST * (trio.current_time() - began))))
        return not self._seen.isdisjoint(victim.id for victim in victims)
