"""The mover: relocates what is live in a segment. All relocation is this, whoever asks for it.

It goes in this order:

1. Read the victim; its batch headers say which blocks it holds. Those whose map entry still names their place are live.
2. Check each against the map's check, and write them to an output segment, with headers of its own.
3. Flush: the copies are durable.
4. Log a MOVE record that names the copies and which of them take effect (those whose entry is still the one copied
   from), and change the overlay in the same breath.

A crash before 4 leaves copies that nothing names. A block that fails its check on the device too is logged as BAD: its
readers get EIO, and it pins nothing.
"""

import contextlib
import errno
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from tiers.device import read_what_can_be_read
from tiers.errors import TierError
from tiers.failpoint import hit
from tiers.layout import BAD, BLOCK_BYTES, BLOCK_SHIFT, SLOT_BITS, SLOT_MASK, check_of
from tiers.maptree import FANOUT_BITS
from tiers.overlay import Entry
from tiers.record import (
    BadRecordError,
    Batch,
    Kind,
    Op,
    decode_batch,
    encode_batch,
    header_slots_for,
    peek_header_slots,
)
from tiers.segments import Segment, is_given_out
from tiers.volume import Volume

if TYPE_CHECKING:
    from tiers.engine import Engine

logger = logging.getLogger(__name__)

UNIT_BLOCKS = 512
"""Blocks looked at, or moved, without a checkpoint of trio in between: about a millisecond."""
SMALL_UNIT_BLOCKS = 32
"""The same where the map's cache is too small to hold the leaves of more."""
HEADERS_A_TURN = 32
"""Batch headers decoded without a checkpoint of trio in between."""


class DamagedMapError(Exception):
    """A map page that tells whether blocks are live can't be read."""


class OutputFullError(TierError):
    """No segment may be taken for copies now: a checkpoint has to free some first."""


Candidate = tuple[Volume, int, int, int]
"""(volume, block, slot, check): a block as a batch header describes it."""


@dataclass(slots=True)
class Copies:
    """A batch of copies in an output segment, waiting for its MOVE record."""

    segment: Segment
    slot: int
    header_check: int
    first_address: int
    blocks: list[tuple[Volume, int, int, int]] = field(default_factory=list)
    """(volume, block, old address, check)"""


class Mover:
    """Moves for one task: what it has staged, and the output segments that it fills."""

    def __init__(self, engine: "Engine") -> None:
        self.unresolved: set[int] = set()
        """Segments that were moved out of, and in which blocks may be left that are still live."""
        self._engine = engine
        self._outputs: dict[str, Segment] = {}
        self._staged: list[Copies] = []

    @property
    def has_staged(self) -> bool:
        """Whether copies wait for `apply_staged`."""
        return bool(self._staged)

    async def move_segment(self, victim: Segment, destination: str) -> None:
        """Stage copies of everything live in `victim`."""
        victim.pins += 1
        try:
            data = await self.read_segment(victim)
            if is_given_out(victim, data, self._engine.pool_uuid):
                victim.given_out = True
                return
            hit("move.read")
            candidates: list[Candidate] = []
            for number, batch in enumerate(self.batches(victim, data), 1):
                if number % HEADERS_A_TURN == 0:
                    await trio.lowlevel.checkpoint()
                slot = batch.slot + batch.header_slots
                at = 0
                for op, volume_id, block, count in batch.operations():
                    if op is not Op.WRITE:
                        continue
                    volume = self._engine.volumes.get(volume_id)
                    if volume is not None:
                        candidates += [(volume, block + i, slot + at + i, batch.checks[at + i]) for i in range(count)]
                    at += count
                while len(candidates) >= UNIT_BLOCKS:
                    await self._copy(victim, data, candidates[:UNIT_BLOCKS], destination)
                    del candidates[:UNIT_BLOCKS]
            if candidates:
                await self._copy(victim, data, candidates, destination)
        except DamagedMapError as error:
            victim.damaged = True
            logger.error("segment %d can't be emptied and is set aside: %s", victim.id, error)
        finally:
            victim.pins -= 1

    async def read_segment(self, segment: Segment) -> memoryview:
        """The written part of a segment. Blocks that can't be read are zeros, so they fail their checks."""
        data, _ = await read_what_can_be_read(segment.device, segment.base, segment.used * BLOCK_BYTES)
        return memoryview(data)

    def batches(self, segment: Segment, data: memoryview) -> Iterator[Batch]:
        """Yield the batches of a segment. A damaged header ends it: the segment is set aside, not lost."""
        slot = 1
        while slot < segment.used:
            header = data[slot << BLOCK_SHIFT :]
            try:
                count = peek_header_slots(header[:BLOCK_BYTES])
                batch = decode_batch(header[: max(1, count) << BLOCK_SHIFT], self._engine.pool_uuid, segment.id, slot)
            except BadRecordError as error:
                segment.damaged = True
                logger.error(
                    "%s at %d: %s; the segment is left as it is: run `terrace pool check`",
                    segment.device.path,
                    segment.offset(slot),
                    error,
                )
                return
            yield batch
            slot += batch.slots

    async def _copy(self, victim: Segment, data: memoryview, candidates: list[Candidate], destination: str) -> None:
        """Copy those of the candidates that are live."""
        await self._load_leaves([(volume, block) for volume, block, _, _ in candidates])
        base = victim.id << SLOT_BITS
        live: list[tuple[Volume, int, int, int]] = []
        views: list[memoryview] = []
        damaged: list[Candidate] = []
        for candidate in candidates:
            volume, block, slot, check = candidate
            entry = volume.entry_now(block)
            if entry is None:  # its leaf was evicted again: a small cache, or many volumes
                (address,), (found_check,) = await volume.entries(block, 1)
                entry = (address, found_check)
            if entry != (base | slot, check) or volume.deleted:
                continue
            view = data[slot << BLOCK_SHIFT : slot + 1 << BLOCK_SHIFT]
            if check_of(view) == check:
                live.append((volume, block, base | slot, check))
                views.append(view)
            else:
                damaged.append(candidate)
        for volume, block, slot, check in damaged:
            try:
                again = await victim.device.read_direct(victim.offset(slot), BLOCK_BYTES)
            except OSError:
                again = bytearray()
            if check_of(again) == check:
                live.append((volume, block, base | slot, check))
                views.append(memoryview(again))
            else:
                self._log_bad(volume, block, (base | slot, check), victim)
        at = 0
        while at < len(live):
            at += await self._write_copies(live[at:], views[at:], destination)

    async def _write_copies(
        self, blocks: list[tuple[Volume, int, int, int]], views: list[memoryview], destination: str
    ) -> int:
        """Write as many copies as fit the output segment; return how many."""
        engine = self._engine
        segment = self._output(destination)
        room = segment.slots - segment.used
        count = min(len(blocks), room - header_slots_for(min(room, len(blocks)), min(room, len(blocks))))
        ops: list[int] = []
        for volume, block, _, _ in blocks[:count]:
            word = Op.WRITE << 56 | volume.id
            if ops and ops[-3] == word and ops[-2] + ops[-1] == block:
                ops[-1] += 1
            else:
                ops += (word, block, 1)
        checks = [check for _, _, _, check in blocks[:count]]
        slot = segment.used
        log = engine.log
        header, header_check = encode_batch(
            Kind.MOVED,
            engine.pool_uuid,
            segment.id,
            slot,
            log.incarnation,
            log.seq,
            0,
            engine.flusher.durable_seq,
            ops,
            checks,
            [],
        )
        first = slot + (len(header) >> BLOCK_SHIFT)
        segment.pins += 1
        try:
            await segment.device.write_behind(segment.offset(slot), [header, *views[:count]])
        except BaseException:
            # Only copies that were written may be made true. `used` stays before them: the headers stay a chain.
            segment.pins -= 1
            self._seal(destination)
            raise
        segment.used = first + count
        hit("move.copied")
        self._staged.append(Copies(segment, slot, header_check, segment.id << SLOT_BITS | first, blocks[:count]))
        return count

    def _output(self, destination: str) -> Segment:
        segment = self._outputs.get(destination)
        if segment is not None and segment.slots - segment.used >= 3:
            return segment
        self._seal(destination)
        device = self._engine.space.pick_device(Kind.MOVED, destination)
        if device is None:
            raise OutputFullError(
                errno.ENOSPC, f"the pool {self._engine.pool_name} has no free segment to clean into: grow it"
            )
        segment = self._outputs[destination] = self._engine.log.open_segment(device, Kind.MOVED)
        return segment

    def _seal(self, destination: str) -> None:
        segment = self._outputs.pop(destination, None)
        if segment is not None:
            segment.open = False
            self._engine.segments.changed.add(segment.id)

    def seal_all(self) -> None:
        """Leave the output segments: the pool is closing."""
        for destination in list(self._outputs):
            self._seal(destination)

    async def _load_leaves(self, places: list[tuple[Volume, int]]) -> None:
        wanted: dict[Volume, set[int]] = {}
        for volume, leaf in dict.fromkeys((volume, block >> FANOUT_BITS) for volume, block in places):
            if volume.tree.leaf_now(leaf) is None:
                wanted.setdefault(volume, set()).add(leaf)
        for volume, missing in wanted.items():
            try:
                await volume.tree.load(0, missing)
            except OSError as error:
                raise DamagedMapError(str(error)) from error

    # -- making moves true ---------------------------------------------------------------------------------------

    async def apply_staged(self) -> None:
        """Flush the copies, then log and apply their MOVE records."""
        engine = self._engine
        if self._staged:
            await engine.flusher.flush()
            hit("move.durable")
        try:
            while self._staged:
                copies = self._staged[-1]
                weight = engine.space.active_weight + engine.space.frozen_weight
                if weight + len(copies.blocks) > engine.settings.overlay_entries and engine.space.active_weight:
                    await engine.checkpoint()
                at = 0
                while at < len(copies.blocks):
                    at += await self._apply_part(copies, at)
                self._staged.pop()
                copies.segment.pins -= 1
                await trio.lowlevel.checkpoint()
        except BaseException:
            self.drop_staged()
            raise

    def drop_staged(self) -> None:
        """Forget copies that were not made true: they are dead slots."""
        for copies in self._staged:
            copies.segment.pins -= 1
        self._staged.clear()

    async def _apply_part(self, copies: Copies, start: int) -> int:
        """Make copies from `start` on true, as many at once as the map's cache allows; return how many."""
        for count in (len(copies.blocks) - start, SMALL_UNIT_BLOCKS):
            part = range(start, min(start + count, len(copies.blocks)))
            with contextlib.suppress(DamagedMapError):  # then those copies don't take effect
                await self._load_leaves([copies.blocks[i][:2] for i in part])
            if all(copies.blocks[i][0].entry_now(copies.blocks[i][1]) is not None for i in part):
                break
        self._apply(copies, part)
        return len(part)

    def _apply(self, copies: Copies, part: range) -> None:
        """Log which copies take effect and let the overlay name them. No checkpoint of trio in here."""
        engine = self._engine
        effective = []
        for i in part:
            volume, block, old, check = copies.blocks[i]
            if volume.deleted:
                continue
            entry = volume.entry_now(block)
            if entry == (old, check):
                effective.append(i)
            elif entry is None:
                self.unresolved.add(old >> SLOT_BITS)
        if not effective:
            return
        words = [0] * -(-len(copies.blocks) // 64)
        for i in effective:
            words[i // 64] |= 1 << i % 64
        segment = copies.segment
        extra = [segment.device.index << 32 | segment.index, *words]
        engine.append_record(Op.MOVE, segment.id, copies.slot << 32 | len(copies.blocks), copies.header_check, extra)
        segment.last_seq = engine.log.seq
        first = copies.first_address
        put_moved(
            engine, [(copies.blocks[i][0], copies.blocks[i][1], first + i, copies.blocks[i][3]) for i in effective]
        )
        engine.moved_blocks += len(effective)
        hit("move.logged")

    def _log_bad(self, volume: Volume, block: int, entry: Entry, victim: Segment) -> None:
        if volume.deleted or volume.entry_now(block) != entry:
            if volume.entry_now(block) is None:
                self.unresolved.add(victim.id)
            return
        logger.error(
            "%s at byte %d: the block on %s at %d fails its checksum and is lost",
            volume.name,
            block << BLOCK_SHIFT,
            victim.device.path,
            victim.offset(entry[0] & SLOT_MASK),
        )
        self._engine.segments.count_damage(entry[0])
        self._engine.append_record(Op.BAD, volume.id, block, 1)
        put_moved(self._engine, [(volume, block, BAD, 0)])
        hit("move.bad")


def put_moved(engine: "Engine", moves: list[tuple[Volume, int, int, int]]) -> None:
    """Let the active overlays name new places: (volume, block, address, check). Also the replay's way in."""
    volumes = {volume for volume, _, _, _ in moves}
    before = sum(volume.active.weight for volume in volumes)
    dropped: list[int] = []
    for volume, block, address, check in moves:
        old = volume.active.put(block, address, check)
        if old:
            dropped.append(old)
        if address != BAD:
            engine.segments.add_pending(address, 1)
    engine.segments.drop_pending(dropped)
    engine.space.active_weight += sum(volume.active.weight for volume in volumes) - before
