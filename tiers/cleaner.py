"""The cleaner: has segments emptied (see `tiers.mover`), so that they can be reused.

A victim's place is reused after a checkpoint has passed the MOVE records of what was in it, or, where writers wait for
room, as soon as these are durable: a checkpoint a round would rewrite most of the map each time.

Map segments are emptied by having the next checkpoint write their live pages elsewhere.
"""

import contextlib
import heapq
import logging
from typing import TYPE_CHECKING

import numpy as np
import trio

from tiers.failpoint import hit
from tiers.frames import MAX_FRAME_BLOCKS
from tiers.heat import Ints
from tiers.layout import BLOCK_BYTES, SLOT_BITS
from tiers.maptree import FANOUT_BITS, LEVEL_SHIFT, ROOT_LEVEL
from tiers.mover import HEADERS_A_TURN, Candidate, DamagedMapError, Mover, OutputFullError
from tiers.placement import Move, benefit
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
ROUND_SEGMENTS = 2
ROUND_SLOTS = 8192
"""What a round should gain: so many segments, or slots if that is less. What it has moved takes its space twice until
it ends, and a round costs two flushes."""
STALE_DIVISOR = 16
"""With more log than this part of the log's tier since the last checkpoint, it is time for another: the counts of live
blocks are old, and what was written since can't be a victim. Twice as often, map pages cost twice as much; in the model
an eighth of the pool did no harm yet."""
MIN_STALE_BYTES = 16 << 20
UNREUSED_DIVISOR = 64
"""So much of the pool may be in emptied victims before a checkpoint frees them where nobody is in a hurry."""
FAST_TARGET_SHARE = 0.85
"""So much of the fast tier may be live: what is more has to leave."""
LEAST_LEAVE, MOST_LEAVE = 4, 2
"""Of the blocks in a round of demotion a quarter to a half leave, the coldest; three quarters at least where clients
are about to wait."""
DEMOTED_SLOTS = 8192
"""Judged at once, without a checkpoint of trio in between: about ten milliseconds."""
MAX_REST_S = 0.05
RANK_SLICE = 2048
"""Segments looked at without a checkpoint of trio in between."""
MOST_RANKED = 1024


class Cleaner:
    """The cleaning task of one pool."""

    def __init__(self, engine: "Engine") -> None:
        self.mover = Mover(engine)
        self.mover.pace = self._pace
        self.mover.are_hot = self._are_hot
        self._engine = engine
        self._futile_rounds = 0
        self._turn_began = 0.0
        self._rested_s = 0.0
        """Of the present round."""
        self._emptied: list[Segment] = []
        """Victims that wait for a checkpoint, or to be reused."""
        self._ranked: list[Segment] = []
        """Victims, the best last, as of the checkpoint and the move in `_ranked_for`."""
        self._ranked_for: tuple[int, Move, bool] | None = None
        self._forced: tuple[int, set[int]] = -1, set()
        """The last checkpoint, and map segments whose live pages the next one is to write elsewhere."""

    async def run(self) -> None:
        """The task: rounds while there is something to do, then wait to be called."""
        space = self._engine.space
        while True:
            space.cleaning = False
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

    def _are_hot(self, blocks: list[Candidate]) -> list[bool]:
        hot: list[bool] = self._engine.temperature.is_hot(*_columns(blocks)).tolist()
        return hot

    async def _pace(self) -> None:
        """Rest between two units of work, in proportion to what it took: less the less space is left."""
        ratio = self._engine.space.rest_ratio()
        worked = trio.current_time() - self._turn_began
        if ratio and worked > 0:
            rest_s = min(MAX_REST_S, worked * ratio)
            self._rested_s += rest_s
            await trio.sleep(rest_s)
        else:
            await trio.lowlevel.checkpoint()
        self._turn_began = trio.current_time()

    async def _round(self) -> bool:
        """Empty some victims and see that they can be reused. False when there is nothing (more) to do."""
        engine = self._engine
        space = engine.space
        if space.read_only is not None:
            space.changed()
            return False
        began_s = self._turn_began = trio.current_time()
        self._rested_s = 0.0
        await self._clean_map()
        gained_before = engine.segments.gained_slots
        moved_before = engine.moved_blocks
        fast_before = space.tier_use("fast").free
        stale = engine.log.appended_bytes - engine.checkpoint_log_mark
        if stale > 2 * self._stale_bytes():
            await engine.checkpoint()
        elif stale > self._stale_bytes():
            space.kick_checkpoint.set()
        move = space.cleaning_needed()
        space.cleaning = move is not None
        moved = False
        emptied: list[Segment] = []
        self.mover.unresolved.clear()
        if move is not None:
            victims = await self._victims(move)
            if not victims and move.source is not None:
                move = Move(None, move.destination)
                victims = await self._victims(move)
            # Output space may run out on the way (its tail is lost at segment ends): what was copied still counts.
            with contextlib.suppress(OutputFullError):
                if move.demotes:
                    await self._demote(victims, emptied)
                else:
                    await self._compact(victims, move.destination, emptied)
            moved = bool(emptied) or self.mover.has_staged
            await self.mover.apply_staged()
            space.staged_entries = 0
            # Not before: what was not moved after all is still in its victim.
            self._emptied += [victim for victim in emptied if victim.id not in self.mover.unresolved]
        pressed = space.waiters > 0
        given_back = await self._give_back(pressed=pressed)
        # What victims took, less what their copies take: counted in slots, since a round may fill no segment.
        net = sum(victim.slots for victim in emptied) - (engine.moved_blocks - moved_before)
        gained = (given_back and net > 0) or engine.segments.gained_slots > gained_before
        # A round that gained nothing chose by counts that are too old, or needs what only a checkpoint frees.
        if (moved or pressed) and not gained:
            await engine.checkpoint()
        # A round may be futile because what could be cleaned was written after the last checkpoint, or because it
        # gained less than a segment. Several in a row, with writers still waiting, mean that nobody can be helped.
        gained = gained or engine.segments.gained_slots > gained_before or bool(engine.dead)
        self._futile_rounds = 0 if gained else self._futile_rounds + 1
        space.stuck = pressed and self._futile_rounds >= FUTILE_ROUNDS_PRESSED
        space.spilling = pressed and space.tier_use("fast").free <= fast_before
        if moved:
            space.pace.round_took(trio.current_time() - began_s - self._rested_s)
        space.changed()
        limit = FUTILE_ROUNDS_PRESSED if pressed else FUTILE_ROUNDS_IDLE
        return (moved or pressed) and self._futile_rounds < limit and space.cleaning_needed() is not None

    async def _compact(self, victims: list[Segment], destination: str, emptied: list[Segment]) -> None:
        """Move all that is live in the victims. Those that are done come into `emptied`. Raises OutputFullError."""
        for victim in victims:
            if self._is_there(victim):
                await self.mover.move_segment(victim, destination)
                if not victim.given_out:
                    emptied.append(victim)

    async def _demote(self, victims: list[Segment], emptied: list[Segment]) -> None:
        """Empty fast segments: the cold blocks go to base, the hot ones stay on fast, by the heat and the policies.

        Where clients are about to wait only what is hotter than all that left lately is kept, and what policies hold:
        each block that stays costs the room of one.
        """
        found = [(victim, await self.mover.survey(victim)) for victim in victims if self._is_there(victim)]
        stays = self._survivors([candidate for _, live in found for candidate in live])
        at = 0
        for victim, live in found:
            staying = {live[i][:2] for i in range(len(live)) if stays[at + i]}
            at += len(live)
            if not self._is_there(victim) or victim.given_out:
                continue
            try:
                await self.mover.move_blocks(
                    victim,
                    live,
                    "base",
                    lambda volume, block: ("fast", "hot") if (volume, block) in staying else ("base", "cold"),  # noqa: B023
                )
            except DamagedMapError as error:
                victim.damaged = True
                logger.error("segment %d can't be emptied and is set aside: %s", victim.id, error)
            emptied.append(victim)

    def _is_there(self, victim: Segment) -> bool:
        """False: a checkpoint freed it meanwhile, or an evacuation moves it."""
        by_id = self._engine.segments.by_id
        return by_id.get(victim.id) is victim and not victim.open and victim.device.state == "online"

    def _survivors(self, live: list[Candidate]) -> list[bool]:
        """Which of these blocks of fast segments stay on the fast tier."""
        engine = self._engine
        if not live:
            return []
        count = len(live)
        volumes, blocks = _columns(live)
        pressed = not engine.space.rest_ratio()
        fast = engine.space.tier_use("fast")
        excess = fast.live - int(fast.total * FAST_TARGET_SHARE)
        leave = count - count // LEAST_LEAVE if pressed else min(max(excess, count // LEAST_LEAVE), count // MOST_LEAVE)
        policies = {volume.id: volume.policy for volume in engine.volumes.values()}
        now = trio.current_time()
        by_id = engine.segments.by_id
        opened = {i: by_id[i].opened_at for i in {address >> SLOT_BITS for _, _, address, _ in live} if i in by_id}
        idle = np.fromiter((now - opened.get(address >> SLOT_BITS, 0.0) for _, _, address, _ in live), float, count)
        # Hotter than what left lately, or held: it has its second chance even where its neighbours are as hot, unless
        # the round before gained nothing that way.
        hotter = engine.heat.estimates(volumes, blocks) > max(1.0, engine.temperature.threshold)
        hotter &= ~np.isin(volumes, [i for i, policy in policies.items() if policy.placement == "base"])
        hotter |= np.isin(volumes, [i for i, policy in policies.items() if policy.placement == "fast"])
        stays = engine.temperature.survivors(volumes, blocks, leave, policies, idle)
        if pressed:
            stays &= hotter
        if not self._futile_rounds:
            stays |= hotter
        if pressed:
            return list(stays.tolist())
        return [
            stay or not engine.migration.allows(volume, BLOCK_BYTES)
            for stay, (volume, _, _, _) in zip(stays.tolist(), live, strict=True)
        ]

    def _stale_bytes(self) -> int:
        fast, base = self._engine.space.tier_use("fast"), self._engine.space.tier_use("base")
        return max(MIN_STALE_BYTES, (fast.total or base.total) * BLOCK_BYTES // STALE_DIVISOR)

    async def _give_back(self, *, pressed: bool) -> bool:
        """Reuse what was emptied if somebody needs it soon; else leave it to a checkpoint, and ask for one in time.

        Returns whether anything was, or is going to be, given back.
        """
        engine = self._engine
        emptied = [victim for victim in self._emptied if engine.segments.by_id.get(victim.id) is victim]
        self._emptied = []
        if not emptied:
            return False
        if pressed or not engine.space.rest_ratio():
            return await engine.reuse(emptied) > 0
        if sum(victim.slots for victim in emptied) > engine.segments.total_slots // UNREUSED_DIVISOR:
            await engine.checkpoint()
            if engine.dead:
                self._emptied = emptied  # what no map names may be counted there yet: further checkpoints walk the list
                return True
            return self._set_leaks_aside(emptied) < len(emptied)
        self._emptied = emptied
        return True

    def _set_leaks_aside(self, emptied: list[Segment]) -> int:
        """Victims that a checkpoint has not freed have blocks that are counted as live and that no map names.

        A page of the map that was lost leaves such. Emptying them again would gain nothing, for ever. Returns how many.
        """
        leaking = 0
        for victim in emptied:
            blocks = victim.live + victim.pending
            if self._engine.segments.by_id.get(victim.id) is victim and blocks and not victim.pins:
                victim.leaks = True
                leaking += 1
                logger.error(
                    "segment %d is set aside: %d of its blocks are counted as live, and no map names them: run "
                    "`terrace pool check`",
                    victim.id,
                    blocks,
                )
        return leaking

    async def _victims(self, move: Move) -> list[Segment]:
        """The best segments to empty, as many as make a good round and as the free output space allows."""
        engine = self._engine
        space = engine.space
        # With nothing gained lately, age counts no more: what gives most comes first.
        wanted = engine.log.checkpoint_seq, move, self._futile_rounds > 0
        if self._ranked_for != wanted or not self._ranked:
            self._ranked = await self._rank(move, by_age=not wanted[2])
            self._ranked_for = wanted
        output = engine.segments.free_slots
        # What doesn't fit the tier that it is meant for would go to the other: from base to fast, so back again.
        there = space.tier_use(move.destination).free - space.largest_segment_slots
        entries = 0
        goal = min(ROUND_SEGMENTS * space.largest_segment_slots, ROUND_SLOTS)
        victims: list[Segment] = []
        pressed = not space.rest_ratio()
        judged = 0
        while self._ranked and goal > 0:
            segment = self._ranked[-1]
            if engine.segments.by_id.get(segment.id) is not segment or segment.pins or segment.damaged:
                self._ranked.pop()
                continue
            blocks = segment.live + segment.pending
            entries += blocks
            # What is packed may be unpacked on its way to the fast tier.
            needed = (segment.wanted_slots if move.destination == "base" else blocks) + 8
            output -= needed
            there -= needed
            if output < space.next_pages(entries) + 3 * space.largest_segment_slots or (there < 0 and victims):
                break
            if move.demotes:
                goal -= segment.slots if pressed else segment.slots - segment.wanted_slots * 3 // 4
                judged += segment.wanted_slots
                if judged > DEMOTED_SLOTS:
                    goal = 0
            else:
                goal -= segment.slots - segment.wanted_slots
            victims.append(self._ranked.pop())
        space.staged_entries = sum(segment.live + segment.pending for segment in victims)
        return victims

    async def _rank(self, move: Move, *, by_age: bool) -> list[Segment]:
        """All that may be a victim, the best last."""
        engine = self._engine
        checkpointed = engine.log.checkpoint_seq
        newest = engine.segments.next_id
        emptied = {victim.id for victim in self._emptied}
        found: list[tuple[float, int, Segment]] = []
        for number, segment in enumerate(list(engine.segments.by_id.values()), 1):
            if number % RANK_SLICE == 0:
                await trio.lowlevel.checkpoint()
            blocks = segment.live + segment.pending
            if (
                not segment.open
                and not (segment.damaged or segment.given_out or segment.leaks)
                and segment.device.state == "online"
                and segment.kind not in (Kind.MAP, Kind.CATALOG)
                and segment.last_seq <= checkpointed
                and blocks > 0
                and (move.source is None or segment.device.tier == move.source)
                and (move.demotes or _is_worth_moving(segment))
                and segment.id not in emptied
            ):
                # Ids are given out in order, so they tell the age in segments.
                age = newest - segment.id if by_age else 1
                found.append(
                    (benefit(segment.wanted_slots, segment.slots, age, demotes=move.demotes), -segment.id, segment)
                )
        return [segment for _, _, segment in reversed(heapq.nlargest(MOST_RANKED, found))]

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
        # Once for each checkpoint: until then the counts stay as they are, and it would be the same ones each round.
        if self._forced[0] != engine.log.checkpoint_seq:
            self._forced = engine.log.checkpoint_seq, set()
        forced = self._forced[1]
        for victim in sorted(sealed, key=lambda segment: segment.live / segment.slots)[:2]:
            if 0 < victim.live < victim.slots // 2 and victim.id not in forced:
                await self._force_pages(victim)
                forced.add(victim.id)

    async def _force_pages(self, victim: Segment) -> None:
        engine = self._engine
        victim.pins += 1
        try:
            data = await self.mover.read_segment(victim)
            for number, batch in enumerate(self.mover.batches(victim, data), 1):
                if number % HEADERS_A_TURN == 0:
                    await trio.lowlevel.checkpoint()
                first = victim.id << SLOT_BITS | batch.slot + batch.header_slots
                for i, (op, owner_id, key, _) in enumerate(batch.operations()):
                    owner = engine.owner_of(owner_id)
                    if op is not Op.PAGE or owner is None:
                        continue
                    level, index = key >> LEVEL_SHIFT, key & ((1 << LEVEL_SHIFT) - 1)
                    if level < ROOT_LEVEL:
                        try:
                            await owner.tree.load(level + 1, [index >> FANOUT_BITS])
                        except OSError as error:
                            victim.damaged = True
                            logger.error("map segment %d is set aside: %s", victim.id, error)
                            return
                    entry = owner.tree.entry_of_page_now(level, index)
                    if entry is not None and entry[0] == first + i:
                        engine.forced.setdefault(owner_id, set()).add(key)
                        hit("move.page_forced")
        finally:
            victim.pins -= 1


def _is_worth_moving(segment: Segment) -> bool:
    """Whether the copies of what is live in a segment would take less than the segment does."""
    if segment.kind is Kind.PACKED and segment.used >= max(segment.slots - MAX_FRAME_BLOCKS, segment.slots // 4):
        # As full as frames make it: its copies would leave such a tail as well, so only what is dead in it is gained.
        return segment.used - segment.wanted_slots > max(2.0, segment.slots * MIN_GAIN_SHARE)
    return segment.wanted_slots < _worth_moving_below(segment.slots)


def _columns(blocks: list[Candidate]) -> tuple[Ints, Ints]:
    """Volume ids and blocks, as heat is asked for them."""
    count = len(blocks)
    volumes = np.fromiter((volume.id for volume, _, _, _ in blocks), np.int64, count)
    return volumes, np.fromiter((block for _, block, _, _ in blocks), np.int64, count)


def _worth_moving_below(slots: int) -> float:
    """The live blocks from which on moving a segment's gains too little: its copies have headers too."""
    packed = slots - 1 - header_slots_for(slots, slots) - slots // BATCHES_SHARE
    return packed - max(2.0, slots * MIN_GAIN_SHARE)
