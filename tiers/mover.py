"""The mover: relocates what is live in a segment. All relocation is this, whoever asks for it.

It goes in this order:

1. Read the victim; its batch headers say which blocks it holds. Those whose map entry still names their place are live.
   Frames with live blocks are unpacked.
2. Check each against the map's check, and write them to an output segment, with headers of its own. On the base tier
   they are packed into frames, in the order in which they come, if their volume is to be compressed; frames that would
   save too little are written as they are.
3. Flush: the copies are durable.
4. Log a MOVE record that names the copies and which of them take effect (those whose entry is still the one copied
   from), and change the overlay in the same breath.

An output is a stream of its own for each tier, temperature and form (raw or packed); each has at most one open segment.

A crash before 4 leaves copies that nothing names. A block that fails its check on the device too is logged as BAD: its
readers get EIO, and it pins nothing.
"""

import contextlib
import errno
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from tiers.device import Buffer, Device, read_what_can_be_read
from tiers.errors import TierError
from tiers.failpoint import hit
from tiers.frames import MAX_FRAME_BLOCKS, Frame, Packed, block_at, frame_of, pack_all, unpack_all
from tiers.layout import BAD, BLOCK_BYTES, BLOCK_SHIFT, SLOT_BITS, check_of
from tiers.maptree import FANOUT_BITS, MapTree
from tiers.outputs import append_copies
from tiers.overlay import Entry
from tiers.record import (
    BadRecordError,
    Batch,
    Kind,
    Op,
    decode_batch,
    frames_that_fit,
    header_slots_for,
    peek_header_slots,
)
from tiers.segments import Segment, is_given_out
from tiers.volume import Volume

if TYPE_CHECKING:
    from tiers.engine import Engine

logger = logging.getLogger(__name__)

UNIT_BLOCKS = 512
"""Blocks copied with one header."""
TURN_BLOCKS = 128
"""Blocks looked at without a checkpoint of trio in between: a quarter of a millisecond."""
APPLY_BLOCKS = 256
"""Blocks moved by one record, so without a checkpoint of trio in between: half a millisecond."""
LARGE_SLOTS = 2048
"""The blocks of a victim with more slots are written at once: what waits keeps all that was read in memory."""
SEPARATED_SEGMENTS = 256
"""A tier of fewer segments has one output for raw blocks: a second open segment would cost more than it gains."""
SMALL_UNIT_BLOCKS = 32
"""The same where the map's cache is too small to hold the leaves of more."""
FRAMES_A_TURN = 16
"""Frames packed, or unpacked, by one call of a worker: 2 MiB of blocks."""
HEADERS_A_TURN = 32
"""Batch headers decoded without a checkpoint of trio in between."""


class DamagedMapError(Exception):
    """A map page that tells whether blocks are live can't be read."""


class OutputFullError(TierError):
    """No segment may be taken for copies now: a checkpoint has to free some first."""


Candidate = tuple[Volume, int, int, int]
"""(volume, block, address, check): a block as a batch header describes it."""

Stream = tuple[str, str, bool]
"""(tier, temperature, whether it is packed): what an output segment is for."""

Choose = Callable[[Volume, int], tuple[str, str]]
"""(volume, block) -> (tier, temperature) that a live block should go to."""


@dataclass(slots=True)
class Copies:
    """A batch of copies in an output segment, waiting for its MOVE record."""

    segment: Segment
    slot: int
    header_check: int
    addresses: list[int]
    """Of the copies, in order."""
    blocks: list[Candidate]
    """What each is a copy of: (volume, block, old address, check)."""


class Mover:
    """Moves for one task: what it has staged, and the output segments that it fills. Two tasks need two of these."""

    def __init__(self, engine: "Engine") -> None:
        self.unresolved: set[int] = set()
        """Segments that were moved out of, and in which blocks may be left that are still live."""
        self.bad_blocks = 0
        """Blocks that could not be read, or were damaged, and are lost."""
        self._engine = engine
        self._outputs: dict[Stream, Segment] = {}
        self._staged: list[Copies] = []
        self._gathered: dict[tuple[str, str], list[tuple[Candidate, Buffer]]] = {}
        """By tier and temperature: raw blocks that wait until they are enough for a batch, maybe of several victims."""
        self.pace: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        """Waited for between two units of work: who asks for the moves says how fast they may be."""
        self.are_hot: Callable[[list[Candidate]], Sequence[bool]] = lambda blocks: [False] * len(blocks)
        """Which of the blocks to be moved will be overwritten sooner than most: they get an output of their own."""
        self.packs_only = False
        """Blocks that would not become smaller are left where they are."""
        self._unpacked: dict[tuple[str, str, int], list[tuple[Candidate, Buffer]]] = {}
        """By tier, temperature and level: blocks of the victim in hand that wait for a frame to be full."""

    @property
    def has_staged(self) -> bool:
        """Whether copies wait for `apply_staged`."""
        return bool(self._staged or self._gathered)

    async def move_segment(self, victim: Segment, destination: str, choose: Choose | None = None) -> None:
        """Stage copies of everything live in `victim`, for the tier `destination`, or block by block as `choose` says.

        Raises OutputFullError if there is no room for them, OSError if a device refuses. Then what was staged so far
        may be applied, but the victim is not empty.
        """
        victim.pins += 1
        try:
            data = await self.read_segment(victim)
            if is_given_out(victim, data, self._engine.pool_uuid):
                victim.given_out = True
                return
            hit("move.read")
            candidates: list[Candidate] = []
            for number, found in enumerate(self._candidates(victim, data), 1):
                if number % HEADERS_A_TURN == 0:
                    await trio.lowlevel.checkpoint()
                candidates += found
                while len(candidates) >= UNIT_BLOCKS:
                    await self._copy(victim, data, candidates[:UNIT_BLOCKS], destination, choose)
                    del candidates[:UNIT_BLOCKS]
                    await self.pace()
            if candidates:
                await self._copy(victim, data, candidates, destination, choose)
                await self.pace()
            await self._pack_waiting(least=1)
        except DamagedMapError as error:
            victim.damaged = True
            logger.error("segment %d can't be emptied and is set aside: %s", victim.id, error)
        finally:
            self._leave_data()
            victim.pins -= 1

    async def survey(self, victim: Segment) -> list[Candidate]:
        """What is live in a victim now, for who decides block by block; `move_blocks` moves it."""
        victim.pins += 1
        try:
            data = await self.read_segment(victim)
            if is_given_out(victim, data, self._engine.pool_uuid):
                victim.given_out = True
                return []
            live: list[Candidate] = []
            part: list[Candidate] = []
            for found in self._candidates(victim, data):
                part += found
                if len(part) >= TURN_BLOCKS:
                    live += await self._live_of(part)
                    part = []
                    await trio.lowlevel.checkpoint()
            return live + await self._live_of(part)
        except DamagedMapError as error:
            victim.damaged = True
            logger.error("segment %d can't be emptied and is set aside: %s", victim.id, error)
            return []
        finally:
            victim.pins -= 1

    async def move_blocks(
        self, victim: Segment, candidates: list[Candidate], destination: str, choose: Choose | None = None
    ) -> None:
        """Stage copies of those blocks of a victim that somebody else has found to be in it, as `move_segment` does.

        Raises DamagedMapError if it can't be told any more whether they are.
        """
        victim.pins += 1
        try:
            data = await self.read_segment(victim)
            for start in range(0, len(candidates), UNIT_BLOCKS):
                part = candidates[start : start + UNIT_BLOCKS]
                await self._copy(victim, data, part, destination, choose)
                await self.pace()
            await self._pack_waiting(least=1)
        finally:
            self._leave_data()
            victim.pins -= 1

    def _leave_data(self) -> None:
        """A victim is done with: what waits of it keeps its own blocks, not all that was read."""
        self._unpacked.clear()
        for waiting in self._gathered.values():
            waiting[:] = [(block, bytes(view) if isinstance(view, memoryview) else view) for block, view in waiting]

    def _candidates(self, victim: Segment, data: memoryview) -> Iterator[list[Candidate]]:
        """The blocks that were written into a segment, batch by batch."""
        base = victim.id << SLOT_BITS
        for batch in self.batches(victim, data):
            places = batch.places()
            found: list[Candidate] = []
            at = 0
            for op, volume_id, block, count in batch.operations():
                if op not in (Op.WRITE, Op.REWRITE):
                    continue
                volume = self._engine.volumes.get(volume_id)
                if volume is not None:
                    found += [(volume, block + i, base | places[at + i], batch.checks[at + i]) for i in range(count)]
                at += count
            yield found

    async def _live_of(self, candidates: list[Candidate]) -> list[Candidate]:
        """Those of the candidates that the map still names."""
        await self._load_leaves([(volume, block) for volume, block, _, _ in candidates])
        live: list[Candidate] = []
        for number, candidate in enumerate(candidates, 1):
            if number % TURN_BLOCKS == 0:
                await trio.lowlevel.checkpoint()
            volume, block, address, check = candidate
            if volume.has_history or volume.retired:
                while (names := volume.names_now(block)) is None:
                    await self._load_leaves([(volume, block)])
                if address in names and not volume.gone:
                    live.append(candidate)
                continue
            entry = volume.entry_now(block)
            if entry is None:  # its leaf was evicted again: a small cache, or many volumes
                (found_address,), (found_check,) = await volume.entries(block, 1)
                entry = (found_address, found_check)
            if entry == (address, check) and not volume.gone:
                live.append(candidate)
        return live

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

    async def _copy(
        self, victim: Segment, data: memoryview, candidates: list[Candidate], destination: str, choose: Choose | None
    ) -> None:
        """Copy those of the candidates that are live."""
        live = await self._live_of(candidates)
        hot = self.are_hot(live)
        for candidate, view, is_hot in zip(live, await self._views(victim, data, live), hot, strict=True):
            volume, block, address, check = candidate
            if check_of(view) != check:
                try:
                    view = await victim.read_direct(address)
                except OSError:
                    view = b""
                if check_of(view) != check:
                    self._log_bad(volume, block, (address, check), victim)
                    continue
            tier, temperature = choose(volume, block) if choose else (destination, "hot" if is_hot else "cold")
            level = self._engine.compression_of(volume) if tier == "base" else 0
            if level:
                self._unpacked.setdefault((tier, temperature, level), []).append((candidate, view))
            elif not self.packs_only:
                self._gathered.setdefault((tier, temperature), []).append((candidate, view))
        await self._write_gathered(least=1 if victim.slots > LARGE_SLOTS else UNIT_BLOCKS)
        await self._pack_waiting(least=MAX_FRAME_BLOCKS)

    async def _views(self, victim: Segment, data: memoryview, live: list[Candidate]) -> list[Buffer]:
        """The bytes of each block, unverified; nothing for those whose frame is damaged."""
        if victim.kind is not Kind.PACKED:
            slots = [victim.span(address)[0] for _, _, address, _ in live]
            return [data[slot << BLOCK_SHIFT : slot + 1 << BLOCK_SHIFT] for slot in slots]
        by_frame: dict[int, list[int]] = {}
        for i, (_, _, address, _) in enumerate(live):
            by_frame.setdefault(frame_of(address), []).append(i)
        views: list[Buffer] = [b""] * len(live)
        keys = list(by_frame)
        for start in range(0, len(keys), FRAMES_A_TURN):
            part = keys[start : start + FRAMES_A_TURN]
            spans = [victim.span(key) for key in part]
            packed = [data[first << BLOCK_SHIFT : first + count << BLOCK_SHIFT] for first, count in spans]
            for key, content in zip(part, await self._engine.offload(unpack_all, packed), strict=True):
                for i in by_frame[key]:
                    # A copy: what is live of a frame may be a small part of it.
                    views[i] = bytes(block_at(content, live[i][2]))
            hit("move.unpacked")
        return views

    # -- writing copies --------------------------------------------------------------------------------------------

    async def _pack_waiting(self, *, least: int) -> None:
        """Write the blocks that wait for a frame, as far as there are `least` for one."""
        for (tier, temperature, level), waiting in self._unpacked.items():
            while len(waiting) >= least:
                groups = [
                    waiting[at : at + MAX_FRAME_BLOCKS]
                    for at in range(0, min(len(waiting), FRAMES_A_TURN * MAX_FRAME_BLOCKS), MAX_FRAME_BLOCKS)
                    if len(waiting) - at >= least
                ]
                del waiting[: sum(map(len, groups))]
                frames = await self._engine.offload(pack_all, [[view for _, view in group] for group in groups], level)
                hit("move.packed")
                packed: list[tuple[Packed, list[tuple[Candidate, Buffer]]]] = []
                raw: list[tuple[Candidate, Buffer]] = []
                for frame, group in zip(frames, groups, strict=True):
                    if frame is None:
                        raw += group
                    else:
                        packed.append((frame, group))
                raw += await self._write_packed(packed, tier, temperature)
                if not self.packs_only:
                    await self._write_raw(raw, tier, temperature)

    async def _write_gathered(self, *, least: int) -> None:
        """Write what waits for each output, as far as there are `least` blocks for it.

        Few blocks of a victim may be live: those of several make one batch, with one header and one record.
        """
        for tier, temperature in list(self._gathered):
            waiting = self._gathered[tier, temperature]
            while len(waiting) >= least:
                part = waiting[:UNIT_BLOCKS]
                await self._write_raw(part, tier, temperature)
                del waiting[: len(part)]
                if not waiting:
                    break
            if not waiting:
                del self._gathered[tier, temperature]

    async def _write_raw(self, copies: list[tuple[Candidate, Buffer]], tier: str, temperature: str) -> None:
        at = 0
        stream = tier, temperature if self._separates(tier) else "cold", False
        while at < len(copies):
            segment = self._output(stream, 2)
            room = segment.slots - segment.used
            left = min(room, len(copies) - at)
            part = copies[at : at + min(left, room - header_slots_for(left, left))]
            await self._write_batch(segment, [c for c, _ in part], [], [view for _, view in part])
            at += len(part)

    async def _write_packed(
        self, packed: list[tuple[Packed, list[tuple[Candidate, Buffer]]]], tier: str, temperature: str
    ) -> list[tuple[Candidate, Buffer]]:
        """Write frames; return the blocks of those that no segment has room for, because its device is very small."""
        stream = tier, temperature, True
        left_over: list[tuple[Candidate, Buffer]] = []
        at = 0
        while at < len(packed):
            segment = self._output(stream, packed[at][0].slots)
            count = frames_that_fit([frame for frame, _ in packed[at:]], segment.slots - segment.used)
            part = packed[at : at + count]
            if not part:
                left_over += packed[at][1]
                at += 1
                continue
            await self._write_batch(
                segment,
                [candidate for _, group in part for candidate, _ in group],
                [frame.described for frame, _ in part],
                [frame.data for frame, _ in part],
            )
            at += count
        return left_over

    async def _write_batch(
        self, segment: Segment, blocks: list[Candidate], frames: list[Frame], buffers: Sequence[Buffer]
    ) -> None:
        """Write a batch of copies to an output segment that has room for it, and stage them."""
        engine = self._engine
        ops: list[int] = []
        for volume, block, _, _ in blocks:
            word = Op.WRITE << 56 | volume.id
            if ops and ops[-3] == word and ops[-2] + ops[-1] == block:
                ops[-1] += 1
            else:
                ops += (word, block, 1)
        checks = [check for _, _, _, check in blocks]
        segment.pins += 1  # nobody leaves it while its device has no room yet
        try:
            await engine.flusher.room_on(segment.device)
            packed = frames if segment.kind is Kind.PACKED else None
            written = await append_copies(engine, segment, ops, checks, packed, buffers)
        except BaseException:
            # Only copies that were written may be made true.
            segment.pins -= 1
            for key in [key for key, output in self._outputs.items() if output is segment]:
                self._seal(key)
            raise
        segment.pins -= 1
        hit("move.copied")
        self._staged.append(Copies(segment, written.slot, written.header_check, written.addresses, blocks))

    def _output(self, stream: Stream, least: int) -> Segment:
        """The open segment of a stream, with room for a header and `least` slots more if a fresh one has it."""
        tier, _, packed = stream
        segment = self._outputs.get(stream)
        if segment is not None and segment.slots - segment.used > least and segment.device.state == "online":
            return segment
        self._seal(stream)
        kind = Kind.PACKED if packed else Kind.MOVED
        device = self._engine.space.pick_device(kind, tier)
        if device is None:
            for other, output in self._outputs.items():
                if (other[0], other[2]) == (tier, packed) and output.slots - output.used > least:
                    return output
            raise OutputFullError(
                errno.ENOSPC, f"the pool {self._engine.pool_name} has no free segment to clean into: grow it"
            )
        segment = self._outputs[stream] = self._engine.log.open_segment(device, kind)
        device.unnamed_bytes += BLOCK_BYTES  # its header: durable with the first copies
        return segment

    def _separates(self, tier: str) -> bool:
        count = sum(device.segment_count for device in self._engine.devices if device.tier == tier)
        return count >= SEPARATED_SEGMENTS

    def _seal(self, stream: Stream) -> None:
        segment = self._outputs.pop(stream, None)
        if segment is not None:
            segment.open = False
            self._engine.segments.changed.add(segment.id)

    def leave(self, device: Device) -> None:
        """Leave output segments on a device, but for those into which copies are on their way."""
        for stream, segment in list(self._outputs.items()):
            if segment.device is device and not segment.pins:
                self._seal(stream)

    def seal_all(self) -> None:
        """Leave the output segments: the pool is closing."""
        for stream in list(self._outputs):
            self._seal(stream)

    async def _load_leaves(self, places: list[tuple[Volume, int]]) -> None:
        wanted: dict[MapTree, set[int]] = {}
        for volume, leaf in dict.fromkeys((volume, block >> FANOUT_BITS) for volume, block in places):
            owners = volume.owners_at(leaf) if volume.has_history or volume.retired else [volume]
            for owner in owners:
                if owner.tree.leaf_now(leaf) is None:
                    wanted.setdefault(owner.tree, set()).add(leaf)
        for tree, missing in wanted.items():
            try:
                await tree.load(0, missing)
            except OSError as error:
                raise DamagedMapError(str(error)) from error

    # -- making moves true ---------------------------------------------------------------------------------------

    async def apply_staged(self) -> None:
        """Flush the copies that are staged by now, then log and apply their MOVE records."""
        engine = self._engine
        try:
            await self._write_gathered(least=1)
        except OutputFullError:
            self._drop_gathered()
        staged, self._staged = self._staged, []  # what is staged later, this flush doesn't cover
        try:
            if staged:
                devices = {copies.segment.device.index: copies.segment.device for copies in staged}.values()
                await engine.flusher.flush_devices(devices)
                hit("move.durable")
            while staged:
                copies = staged[-1]
                weight = engine.space.active_weight + engine.space.frozen_weight
                if weight + len(copies.blocks) > engine.settings.overlay_entries and engine.space.active_weight:
                    await engine.checkpoint()
                at = 0
                while at < len(copies.blocks):
                    at += await self._apply_part(copies, at)
                    await trio.lowlevel.checkpoint()
                staged.pop()
                copies.segment.pins -= 1
                await self.pace()
        finally:
            for copies in staged:  # not made true: dead slots
                copies.segment.pins -= 1

    def drop_staged(self) -> None:
        """Forget copies that were not made true: they are dead slots."""
        for copies in self._staged:
            copies.segment.pins -= 1
        self._staged.clear()
        self._drop_gathered()

    def _drop_gathered(self) -> None:
        """What could not be copied stays where it is: its segments are not empty."""
        for waiting in self._gathered.values():
            self.unresolved.update(old >> SLOT_BITS for (_, _, old, _), _ in waiting)
        self._gathered.clear()

    async def _apply_part(self, copies: Copies, start: int) -> int:
        """Make copies from `start` on true, as many at once as the map's cache allows; return how many."""
        for count in (APPLY_BLOCKS, SMALL_UNIT_BLOCKS):
            part = range(start, min(start + count, len(copies.blocks)))
            with contextlib.suppress(DamagedMapError):  # then those copies don't take effect
                await self._load_leaves([copies.blocks[i][:2] for i in part])
            if all(_is_known(*copies.blocks[i][:2]) for i in part):
                break
        self._apply(copies, part)
        return len(part)

    def _apply(self, copies: Copies, part: range) -> None:
        """Log which copies take effect and let the map name them. No checkpoint of trio in here."""
        engine = self._engine
        moves: list[int] = []
        relocations: list[int] = []
        for i in part:
            volume, block, old, check = copies.blocks[i]
            if volume.gone:
                continue
            if volume.has_history or volume.retired:
                names = volume.names_now(block)
                if names is None:
                    self.unresolved.add(old >> SLOT_BITS)
                elif old in names:
                    relocations.append(i)
                continue
            entry = volume.entry_now(block)
            if entry == (old, check):
                moves.append(i)
            elif entry is None:
                self.unresolved.add(old >> SLOT_BITS)
        segment = copies.segment
        for op, effective in ((Op.MOVE, moves), (Op.RELOCATE, relocations)):
            if not effective:
                continue
            words = [0] * -(-len(copies.blocks) // 64)
            for i in effective:
                words[i // 64] |= 1 << i % 64
            extra = [segment.device.index << 32 | segment.index, *words]
            if op is Op.RELOCATE:
                extra += [copies.blocks[i][2] for i in effective]
            engine.append_record(op, segment.id, copies.slot << 32 | len(copies.blocks), copies.header_check, extra)
            segment.last_seq = engine.log.seq
            if segment.kind is not Kind.PACKED:
                # What was packed and isn't any more takes slots that no client has asked for.
                kind_of = engine.segments.kind_of
                engine.space.active_charge += sum(
                    1 for i in effective if kind_of(copies.blocks[i][2] >> SLOT_BITS, Kind.MOVED) is Kind.PACKED
                )
            engine.moved_blocks += len(effective)
        if moves:
            put_moved(engine, [(*copies.blocks[i][:2], copies.addresses[i], copies.blocks[i][3]) for i in moves])
            hit("move.logged")
        for i in relocations:
            volume, block, old, check = copies.blocks[i]
            engine.relocate(volume, block, old, copies.addresses[i], check)
        if relocations:
            hit("move.relocated")

    def _log_bad(self, volume: Volume, block: int, entry: Entry, victim: Segment) -> None:
        historic = volume.has_history or volume.retired
        names = volume.names_now(block) if historic else None
        if volume.gone or (entry[0] not in (names or ()) if historic else volume.entry_now(block) != entry):
            if (names if historic else volume.entry_now(block)) is None:
                self.unresolved.add(victim.id)
            return
        logger.error(
            "%s at byte %d: the block on %s at %d fails its checksum and is lost",
            volume.name,
            block << BLOCK_SHIFT,
            victim.device.path,
            victim.place(entry[0])[0],
        )
        self._engine.segments.count_damage(entry[0])
        self._engine.losses.add(volume.id, block)
        self.bad_blocks += 1
        if historic:
            self._engine.append_record(Op.LOST, volume.id, block, entry[0])
            self._engine.relocate(volume, block, entry[0], BAD, 0)
        else:
            self._engine.append_record(Op.BAD, volume.id, block, 1)
            put_moved(self._engine, [(volume, block, BAD, 0)])
        hit("move.bad")


def _is_known(volume: Volume, block: int) -> bool:
    """Whether it can be told without reading what names a block."""
    if volume.has_history or volume.retired:
        return volume.names_now(block) is not None
    return volume.entry_now(block) is not None


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
