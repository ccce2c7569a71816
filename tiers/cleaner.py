"""The cleaner: has segments emptied (see `tiers.mover`), so that they can be reused.

A victim's place is reused after a checkpoint has passed the MOVE records of what was in it, or, where writers wait for
room, as soon as these are durable: a checkpoint a round would rewrite most of the map each time.

Map segments are emptied by having the next checkpoint write their live pages elsewhere.
"""

import logging
from typing import TYPE_CHECKING

import trio

from tiers.failpoint import hit
from tiers.layout import SLOT_BITS
from tiers.maptree import FANOUT_BITS, LEVEL_SHIFT, ROOT_LEVEL
from tiers.mover import HEADERS_A_TURN, Mover, OutputFullError
from tiers.placement import Move
from tiers.record import Kind, Op, header_slots_for
from tiers.segments import Segment

if TYPE_CHECKING:
    from tiers.engine import Engine

logger = logging.getLogger(__name__)

MIN_GAIN_SHARE = 1 / 64
"""A victim that would give back less than this is not worth its move."""
BATCHES_SHARE = 64
"""A well packed segment has about one batch header in so many slots."""
FUTILE_ROUNDS_PRESSED = 8
FUTILE_ROUNDS_IDLE = 2
STALE_BYTES = 16 << 20
"""With more log than this since the last checkpoint, the counts of live blocks are too old to choose victims by."""


class Cleaner:
    """The cleaning task of one pool."""

    def __init__(self, engine: "Engine") -> None:
        self.mover = Mover(engine)
        self._engine = engine
        self._futile_rounds = 0

    async def run(self) -> None:
        """The task: rounds while there is something to do, then wait to be called."""
        space = self._engine.space
        while True:
            await space.kick_cleaner.wait()
            space.kick_cleaner = trio.Event()
            try:
                while await self._round():
                    pass
            except OSError as error:
                logger.error("cleaning pool %s: %s", self._engine.pool_name, error)
                self.mover.drop_staged()
                space.staged_entries = 0
                space.kick_checkpoint.set()
                space.changed()
                await trio.sleep(0.5)

    async def _round(self) -> bool:
        """Empty some victims and let a checkpoint free them. False when there is nothing (more) to do."""
        engine = self._engine
        space = engine.space
        if space.read_only is not None:
            space.changed()
            return False
        await self._clean_map()
        before = engine.segments.gained_slots
        if engine.log.appended_bytes - engine.checkpoint_log_mark > STALE_BYTES:
            # What was overwritten since the last checkpoint still counts as live: see first what is really left.
            await engine.checkpoint()
        move = space.cleaning_needed()
        moved = False
        emptied: list[Segment] = []
        self.mover.unresolved.clear()
        if move is not None:
            victims = self._victims(move)
            if not victims and move.source is not None:
                move = Move(None, move.destination)
                victims = self._victims(move)
            try:
                for victim in victims:
                    if engine.segments.by_id.get(victim.id) is not victim or victim.device.state != "online":
                        continue  # a checkpoint freed it meanwhile, or an evacuation moves it
                    await self.mover.move_segment(victim, move.destination)
                    moved = True
                    if not victim.given_out:
                        emptied.append(victim)
            except OutputFullError:
                # Output space ran out on the way (its tail is lost at segment ends): what was copied still counts.
                pass
            moved = moved or self.mover.has_staged
            await self.mover.apply_staged()
            space.staged_entries = 0
        pressed = space.waiters > 0
        if pressed and emptied:
            await engine.reuse([victim for victim in emptied if victim.id not in self.mover.unresolved])
        # A round that gained nothing chose by counts that are too old, or needs what only a checkpoint frees.
        if (moved or pressed) and engine.segments.gained_slots <= before:
            await engine.checkpoint()
        # A round may be futile because what could be cleaned was written after the last checkpoint, or because it
        # gained less than a segment. Several in a row, with writers still waiting, mean that nobody can be helped.
        gained = engine.segments.gained_slots > before or bool(engine.dead)
        self._futile_rounds = 0 if gained else self._futile_rounds + 1
        space.stuck = pressed and self._futile_rounds >= FUTILE_ROUNDS_PRESSED
        space.changed()
        limit = FUTILE_ROUNDS_PRESSED if pressed else FUTILE_ROUNDS_IDLE
        return (moved or pressed) and self._futile_rounds < limit and space.cleaning_needed() is not None

    def _victims(self, move: Move) -> list[Segment]:
        """The emptiest segments, as many as make a good round and as the free output space allows."""
        engine = self._engine
        space = engine.space
        checkpointed = engine.log.checkpoint_seq
        demote = move.source == "fast" and move.destination == "base"
        found = [
            segment
            for segment in engine.segments.by_id.values()
            if not segment.open
            and not (segment.damaged or segment.given_out)
            and segment.device.state == "online"
            and segment.kind is not Kind.MAP
            and segment.last_seq <= checkpointed
            and segment.live + segment.pending > 0
            and (move.source is None or segment.device.tier == move.source)
            and (demote or segment.wanted_slots < _worth_moving_below(segment.slots))
        ]
        found.sort(key=lambda segment: (segment.wanted_slots / segment.slots, segment.id))
        output = engine.segments.free_slots
        entries = 0
        goal = max(engine.segments.total_slots // 64, 2 * space.largest_segment_slots)
        victims: list[Segment] = []
        for segment in found:
            entries += segment.live + segment.pending
            # What is packed may be unpacked on its way to the fast tier.
            output -= (segment.wanted_slots if move.destination == "base" else segment.live + segment.pending) + 8
            if output < space.next_pages(entries) + 3 * space.largest_segment_slots or goal <= 0:
                break
            goal -= segment.slots if demote else segment.slots - segment.wanted_slots
            victims.append(segment)
        space.staged_entries = sum(segment.live + segment.pending for segment in victims)
        return victims

    # -- map segments --------------------------------------------------------------------------------------------

    async def _clean_map(self) -> None:
        """When map segments hold much more dead than live, have the next checkpoint empty the emptiest."""
        engine = self._engine
        sealed = [
            s
            for s in engine.segments.by_id.values()
            if s.kind is Kind.MAP and not s.open and not s.damaged and s.device.state == "online"
        ]
        slots = sum(segment.slots for segment in sealed)
        live = sum(segment.live for segment in sealed)
        if slots - live <= max(live, 4 * engine.space.largest_segment_slots):
            return
        for victim in sorted(sealed, key=lambda segment: segment.live / segment.slots)[:2]:
            if 0 < victim.live < victim.slots // 2:
                await self._force_pages(victim)

    async def _force_pages(self, victim: Segment) -> None:
        engine = self._engine
        victim.pins += 1
        try:
            data = await self.mover.read_segment(victim)
            for number, batch in enumerate(self.mover.batches(victim, data), 1):
                if number % HEADERS_A_TURN == 0:
                    await trio.lowlevel.checkpoint()
                first = victim.id << SLOT_BITS | batch.slot + batch.header_slots
                for i, (op, volume_id, key, _) in enumerate(batch.operations()):
                    volume = engine.volumes.get(volume_id)
                    if op is not Op.PAGE or volume is None:
                        continue
                    level, index = key >> LEVEL_SHIFT, key & ((1 << LEVEL_SHIFT) - 1)
                    if level < ROOT_LEVEL:
                        try:
                            await volume.tree.load(level + 1, [index >> FANOUT_BITS])
                        except OSError as error:
                            victim.damaged = True
                            logger.error("map segment %d is set aside: %s", victim.id, error)
                            return
                    entry = volume.tree.entry_of_page_now(level, index)
                    if entry is not None and entry[0] == first + i:
                        engine.forced.setdefault(volume_id, set()).add(key)
                        hit("move.page_forced")
        finally:
            victim.pins -= 1


def _worth_moving_below(slots: int) -> float:
    """The live blocks from which on moving a segment's gains too little: its copies have headers too."""
    packed = slots - 1 - header_slots_for(slots, slots) - slots // BATCHES_SHARE
    return packed - max(2.0, slots * MIN_GAIN_SHARE)
