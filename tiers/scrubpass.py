"""One pass of a scrub: reading the segments of each device in order, and judging what was read.

Each block is compared with its batch's header (`scrubscan.py`); a block that differs is looked up in the map. It counts
as damaged only if the map still names its place, it fails the map's check when it is read once more, and the map still
names its place then: a client may overwrite it meanwhile, the cleaner may move it. What another copy of the volume has
is had from there (`mending.py`), and counted as repaired. What lies behind a damaged header
can't be attributed that way: at the end the maps of all volumes are walked once for what points there.

Clients come first. A pass works on the trio thread for a fraction of a millisecond at a time, and when it finds that
others had to wait for the loop it stays away for longer than they took. Reads happen in worker threads, at most four
at a time for each of at most four devices, into buffers that are reused. A segment is pinned only while pieces of it
are in flight.
"""

import contextlib
import errno
import logging
import mmap
import os
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import trio

from tiers.device import Device
from tiers.layout import BLOCK_BYTES, BLOCK_SHIFT, FIRST_ADDRESS, SLOT_BITS, SLOT_MASK, check_of
from tiers.maptree import FANOUT, FANOUT_BITS, FANOUT_MASK, LEVEL_SHIFT, ROOT_LEVEL
from tiers.mending import mend
from tiers.record import Op
from tiers.scrubscan import Gap, Owner, Scan, Suspect, owner_of
from tiers.scrubstate import Damage, DeviceRun, Run
from tiers.segments import Segment
from tiers.snapshot import Snapshot
from tiers.volume import Volume

if TYPE_CHECKING:
    from tiers.engine import Engine

logger = logging.getLogger(__name__)

Holder = Volume | Snapshot
"""Whose map it is."""

PIECE_BYTES = 8 << 20
READ_OVER_BYTES = 256 << 10
"""A gap between segments that is read with them, for that costs less than another read."""
SHARE_AT_ONCE = 128
"""One read pins at most this share of a device's segments: on a small, full one the cleaner needs them back."""
PIECES_IN_FLIGHT = 4
"""Buffers of a device: while one piece is verified, three are read, so that it isn't idle while the loop is busy."""
DEVICES_AT_ONCE = 4
SPLIT_BYTES = 64 << 10
"""A piece that can't be read is read in parts of this size, and such a part block by block."""
MIN_RATE = 64 << 10
PLAN_UNIT = 4096
SPEED_WINDOW_S = 10.0
BUSY_S = 0.0005
"""When others used the loop for longer than this between two slices, clients are busy."""
YIELD_SHARE = 2.0
MAX_YIELD_S = 0.02


@dataclass(eq=False, slots=True)
class _Part:
    """Slots of a segment that one read brings; `into` is where."""

    segment: Segment
    scan: Scan
    first: int
    count: int
    into: memoryview = field(default_factory=lambda: memoryview(b""))
    unreadable: dict[int, str] = field(default_factory=dict)

    @property
    def offset(self) -> int:
        return self.segment.offset(self.first)

    @property
    def end(self) -> int:
        return self.segment.offset(self.first + self.count)

    @property
    def is_last(self) -> bool:
        return self.first + self.count >= self.scan.used


@dataclass(eq=False, slots=True)
class _Piece:
    """One read: parts that lie one behind the other, so that small segments don't mean small reads."""

    parts: list[_Part]
    buffer: memoryview
    done: trio.Event = field(default_factory=trio.Event)

    def lay_out(self) -> None:
        """Give each part its place in the buffer, and pin the segments."""
        for part in self.parts:
            at = part.offset - self.parts[0].offset
            part.into = self.buffer[at : at + (part.count << BLOCK_SHIFT)]
            part.segment.pins += 1

    def unpin(self) -> None:
        for part in self.parts:
            part.segment.pins -= 1


@dataclass(frozen=True, slots=True)
class _Target:
    """What a live slot means: bytes of a volume, and the check that the map has."""

    kind: str
    volume: "Holder"
    offset: int
    length: int
    check: int


class Pacer:
    """Bytes a second, over all who ask. `rate` 0: no limit; it may be changed at any time."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._free_at = 0.0
        self._paced = rate

    async def take(self, count: int) -> None:
        """Wait until `count` bytes may be read."""
        if not self.rate:
            await trio.lowlevel.checkpoint()
            return
        now = trio.current_time()
        if self._paced != self.rate:  # a rate that was changed takes effect at once, on what is queued too
            self._free_at = now + max(0.0, self._free_at - now) * self._paced / self.rate
            self._paced = self.rate
        start = max(self._free_at, now)  # after a long wait for a slow device nobody may catch up
        self._free_at = start + count / self.rate
        await trio.sleep_until(start)


class Speed:
    """Bytes a second over the last ten seconds."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque()

    def add(self, total: int) -> None:
        now = trio.current_time()
        if not self._marks or now - self._marks[-1][0] >= SPEED_WINDOW_S / 20:
            self._marks.append((now, total))
        while len(self._marks) > 2 and now - self._marks[0][0] > SPEED_WINDOW_S:
            self._marks.popleft()

    def value(self, total: int) -> float:
        if not self._marks:
            return 0.0
        at, done = self._marks[0]
        passed = trio.current_time() - at
        return (total - done) / passed if passed > 0 else 0.0


class Pass:
    """What is left of a run, to be read once. `run` is kept up to date on the way."""

    def __init__(self, engine: "Engine", run: Run, rate: int, busy_clock: Callable[[], float]) -> None:
        self._engine = engine
        self._run = run
        self._known = list(run.damage)
        """What a resumed scrub may meet again."""
        self._busy_clock = busy_clock
        self.pacer = Pacer(rate)
        self.speeds = {device.index: Speed() for device in engine.devices}

    async def read_all(self) -> None:
        """Read and judge everything. Damage becomes part of the run; an OSError that leaves this is the engine's."""
        for state in self._run.devices.values():
            # The segment in which it was interrupted is read from its beginning.
            state.done_bytes -= state.partial_bytes
            state.partial_bytes = 0
        limiter = trio.CapacityLimiter(DEVICES_AT_ONCE)
        async with trio.open_nursery() as nursery:
            for device in [device for device in self._engine.devices if device.state != "lost"]:
                nursery.start_soon(self._scrub_device, device, limiter)
        await self._search_gaps()

    # -- reading -----------------------------------------------------------------------------------------------------

    async def _scrub_device(self, device: Device, limiter: trio.CapacityLimiter) -> None:
        """Read what is left of one device, in order; verify each piece while the next ones are read."""
        state = self._run.devices.setdefault(device.index, DeviceRun())
        speed = self.speeds.setdefault(device.index, Speed())
        plan = await self._plan(device, state)
        async with limiter:
            speed.add(state.done_bytes)
            # Anonymous mappings begin at a page, as O_DIRECT wants it.
            buffers = [memoryview(mmap.mmap(-1, PIECE_BYTES)) for _ in range(PIECES_IN_FLIGHT)]
            flying: deque[_Piece] = deque()
            parts = self._parts(plan, state)
            behind: _Part | None = None
            try:
                async with trio.open_nursery() as nursery:
                    while True:
                        while buffers:
                            together, behind = self._gather(state, parts, behind)
                            if not together:
                                break
                            piece = _Piece(together, buffers.pop())
                            piece.lay_out()
                            flying.append(piece)
                            nursery.start_soon(self._fetch, device, piece)
                        if not flying:
                            break
                        piece = flying[0]
                        await piece.done.wait()
                        for part in piece.parts:
                            await self._judge(state, part)
                        speed.add(state.done_bytes)
                        flying.popleft().unpin()
                        buffers.append(piece.buffer)
            finally:
                for piece in flying:
                    piece.unpin()

    def _gather(
        self, state: DeviceRun, parts: Iterator[_Part], first: _Part | None
    ) -> tuple[list[_Part], _Part | None]:
        """The next parts that one read can bring, and the one behind them."""
        together: list[_Part] = []
        part = first or next(parts, None)
        most = self._piece_slots() << BLOCK_SHIFT
        while part is not None:
            if self._engine.segments.by_id.get(part.segment.id) is part.segment:
                device = part.segment.device
                share = max(1, device.segment_count // SHARE_AT_ONCE) * device.segment_bytes
                if together and (
                    part.end - together[0].offset > min(most, share) or part.offset - together[-1].end > READ_OVER_BYTES
                ):
                    return together, part
                together.append(part)
            else:  # it had to wait for its read, and is gone by now
                state.left_bytes -= part.count << BLOCK_SHIFT
            part = next(parts, None)
        return together, None

    async def _plan(self, device: Device, state: DeviceRun) -> list[int]:
        """What is left of a device in the order of the places: (place << 64 | segment id << 24 | slots) each."""
        plan: list[int] = []
        for n, segment in enumerate(list(self._engine.segments.by_id.values())):
            if (
                segment.device is device
                and segment.id < self._run.limit
                and segment.index >= state.position
                and segment.live + segment.pending
            ):
                plan.append(segment.index << 64 | segment.id << 24 | segment.used)
            if n % PLAN_UNIT == PLAN_UNIT - 1:
                await trio.lowlevel.checkpoint()
        plan.sort()
        state.left_bytes = sum(key & SLOT_MASK for key in plan) << BLOCK_SHIFT
        return plan

    def _parts(self, plan: list[int], state: DeviceRun) -> Iterator[_Part]:
        """Everything planned that is still there and holds something live."""
        by_id = self._engine.segments.by_id
        for key in plan:
            segment_id, planned = key >> 24 & (1 << 40) - 1, key & SLOT_MASK
            segment = by_id.get(segment_id)
            used = segment.used if segment is not None and segment.live + segment.pending else 0
            state.left_bytes += used - planned << BLOCK_SHIFT  # freed, or the log's head and grown
            if segment is None or not used:
                continue
            scan = Scan(self._engine.pool_uuid, segment_id, used)
            first = 0
            while first < used:
                if by_id.get(segment_id) is not segment:
                    state.left_bytes -= used - first << BLOCK_SHIFT
                    break
                count = min(self._piece_slots(), used - first)
                yield _Part(segment, scan, first, count)
                first += count

    def _piece_slots(self) -> int:
        """Under a limit smaller pieces, a quarter of a second's worth, so that reading is even and pins are short."""
        rate = self.pacer.rate
        return (min(PIECE_BYTES, max(MIN_RATE, rate // 4)) if rate else PIECE_BYTES) >> BLOCK_SHIFT

    async def _fetch(self, device: Device, piece: _Piece) -> None:
        """Fill a piece; what can't be read is zeros, and noted."""
        first = piece.parts[0].offset
        length = piece.parts[-1].end - first
        await self.pacer.take(length)
        try:
            await device.read_direct_into(first, piece.buffer[:length])
        except OSError:
            for part in piece.parts:
                for at in range(0, len(part.into), SPLIT_BYTES):
                    await self._fetch_split(device, part, at, min(SPLIT_BYTES, len(part.into) - at))
        piece.done.set()

    async def _fetch_split(self, device: Device, part: _Part, start: int, length: int) -> None:
        with contextlib.suppress(OSError):
            await device.read_direct_into(part.offset + start, part.into[start : start + length])
            return
        for at in range(start, start + length, BLOCK_BYTES):
            block = part.into[at : at + BLOCK_BYTES]
            try:
                await device.read_direct_into(part.offset + at, block)
            except OSError as error:
                block[:] = bytes(BLOCK_BYTES)
                part.unreadable[part.first + (at >> BLOCK_SHIFT)] = _unreadable(error)

    # -- judging -----------------------------------------------------------------------------------------------------

    async def _judge(self, state: DeviceRun, part: _Part) -> None:
        """Verify a part and record what is damaged in it."""
        segment = part.segment
        if state.position != segment.index:
            state.position = segment.index
            state.partial_bytes = 0
        found: list[Suspect | Gap] = []
        for news in part.scan.feed(part.into, part.unreadable):
            found += news
            await self._let_others()
        state.done_bytes += len(part.into)
        state.partial_bytes += len(part.into)
        state.left_bytes -= len(part.into)
        damage: list[Damage] = []
        for item in found:
            if isinstance(item, Suspect):
                await self._let_others()
                owner = owner_of(item.batch, item.index)
                if owner is not None:
                    await self._suspect(damage, segment, item.place, owner, item.unreadable)
            elif item.first == 0:
                reason = part.unreadable.get(0, "fails its checksum")
                self._record_header(damage, segment, 0, f"the header of segment {segment.id} {reason}")
            elif (gap := (segment.id, item.first, item.end)) not in self._run.gaps:
                self._run.gaps.append(gap)
        _log(damage)
        if part.is_last:
            state.position = segment.index + 1
            state.partial_bytes = 0

    async def _let_others(self) -> None:
        """Yield; where others had much to do, stay away for longer than they took."""
        before = self._busy_clock()
        await trio.lowlevel.checkpoint()
        busy = self._busy_clock() - before
        if busy > BUSY_S:
            await trio.sleep(min(YIELD_SHARE * busy, MAX_YIELD_S))

    async def _suspect(
        self, damage: list[Damage], segment: Segment, place: int, owner: Owner, unreadable: str | None
    ) -> None:
        """A block differs from its header, or can't be read: is it live, is it so again, and is it live still?"""
        address = segment.id << SLOT_BITS | place
        target = await self._target(owner, address)
        if target is None:
            return
        reason = unreadable or await self._read_again(segment, address, target.check)
        if reason is None:
            return
        target = await self._target(owner, address)
        if target is not None and target.kind == "data":
            if await mend(target.volume, target.offset >> BLOCK_SHIFT, address, target.check):
                self._run.devices.setdefault(segment.device.index, DeviceRun()).repaired += 1
                segment.device.error_count += 1  # the medium is none the better
                return
            target = await self._target(owner, address)
        if target is not None:
            self._record_block(damage, segment, address, target, reason)
            if isinstance(target.volume, Volume) and target.kind == "data" and target.volume.elsewhere is not None:
                target.volume.elsewhere.damaged(target.offset, target.length)

    async def _read_again(self, segment: Segment, address: int, check: int) -> str | None:
        """What is wrong with a block when it is read by itself; None if nothing is. The segment is pinned."""
        try:
            data = await segment.read_direct(address)
        except OSError as error:
            return _unreadable(error)
        return None if check_of(data) == check else "fails its checksum"

    async def _target(self, owner: Owner, address: int) -> _Target | None:
        """What the map says of a place now; None if it names it no more, or can't tell (its page is damaged itself)."""
        there = self._engine.owner_of(owner.volume_id)
        if there is None:
            return None
        try:
            if owner.op is Op.WRITE:
                found = await _who_names(there, owner.key, address)
                return None if found is None else _data_target(found[0], owner.key, found[1])
            level, index = owner.key >> LEVEL_SHIFT, owner.key & ((1 << LEVEL_SHIFT) - 1)
            if level == ROOT_LEVEL:
                now, check = there.tree.root
            else:
                parent = index >> FANOUT_BITS
                page = (await there.tree.load(level + 1, [parent]))[parent]
                now, check = page[index & FANOUT_MASK], page[FANOUT + (index & FANOUT_MASK)]
        except OSError:
            return None
        return _page_target(there, level, index, check) if now == address and not there.gone else None

    def _record_block(self, damage: list[Damage], segment: Segment, address: int, target: _Target, reason: str) -> None:
        place = (segment.device.path, segment.place(address)[0])
        self._record(
            damage, segment, Damage(target.kind, target.volume.name, target.offset, target.length, *place, 1, reason)
        )

    def _record_header(self, damage: list[Damage], segment: Segment, slot: int, reason: str) -> None:
        self._record(
            damage, segment, Damage("header", None, 0, 0, segment.device.path, segment.offset(slot), 1, reason)
        )

    def _record(self, damage: list[Damage], segment: Segment, found: Damage) -> None:
        """Count a damaged block, keep its name, and have it logged."""
        run = self._run
        if any(known.holds(found) for known in self._known):
            return
        run.devices.setdefault(segment.device.index, DeviceRun()).errors += found.blocks
        segment.device.error_count += found.blocks
        if run.note(replace(found)):
            if damage and damage[-1].joins(found):
                damage[-1].length += found.length
                damage[-1].blocks += found.blocks
            else:
                damage.append(found)
        elif run.damage_omitted == 1:
            logger.error("there is more damage than is named: from here on it is only counted")

    # -- what lies behind damaged headers ----------------------------------------------------------------------------

    async def _search_gaps(self) -> None:
        """Walk the maps of all volumes for what points into slots that no sound header accounts for."""
        by_id = self._engine.segments.by_id
        gaps: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for segment_id, first, end in self._run.gaps:
            segment = by_id.get(segment_id)
            if segment is not None and segment.live + segment.pending:
                gaps[segment_id].append((first, end))
        told: set[tuple[int, int]] = set()
        if gaps:
            for there in self._engine.owners():
                damage: list[Damage] = []
                async with contextlib.aclosing(self._entries_into(there, gaps)) as entries:
                    async for owner, address in entries:
                        segment = by_id.get(address >> 24)
                        if segment is None:
                            continue
                        slot, _ = segment.span(address)
                        gap = next((g for g in gaps[address >> 24] if g[0] <= slot < g[1]), None)
                        if gap is not None:
                            await self._judge_in_gap(damage, segment, gap[0], address & SLOT_MASK, owner, told)
                _log(damage)
        self._run.gaps.clear()

    async def _judge_in_gap(
        self, damage: list[Damage], segment: Segment, gap: int, place: int, owner: Owner, told: set[tuple[int, int]]
    ) -> None:
        """Judge a live place behind the damaged header at slot `gap`, and name that header if it isn't named yet."""
        segment.pins += 1
        try:
            await self._suspect(damage, segment, place, owner, None)
            if (segment.id, gap) not in told:
                told.add((segment.id, gap))
                what = f"a batch header in segment {segment.id} is damaged: what it described can't be moved"
                self._record_header(damage, segment, gap, what)
        finally:
            segment.pins -= 1

    async def _entries_into(
        self, there: Holder, gaps: dict[int, list[tuple[int, int]]]
    ) -> AsyncGenerator[tuple[Owner, int], None]:
        """Everything of a volume's or snapshot's map that points into these segments, from the root down."""
        named = set(there.named_leaves())
        if there.tree.root[0] >> 24 in gaps:
            yield Owner(Op.PAGE, there.id, ROOT_LEVEL << LEVEL_SHIFT), there.tree.root[0]
        pages = [(ROOT_LEVEL, 0)] if there.tree.root[0] else []
        while pages or named:
            level, index = pages.pop() if pages else (0, named.pop())
            await self._let_others()
            if there.gone:
                return
            try:
                if level:
                    addresses = (await there.tree.load(level, [index]))[index][:FANOUT].tolist()
                    op, base = Op.PAGE, (level - 1) << LEVEL_SHIFT | index << FANOUT_BITS
                    pages += [
                        (level - 1, index << FANOUT_BITS | slot) for slot, address in enumerate(addresses) if address
                    ]
                else:
                    named.discard(index)
                    op, base = Op.WRITE, index << FANOUT_BITS
                    addresses, _ = await there.entries(base, FANOUT)
            except OSError:
                continue  # a damaged page, which the pass has named
            for slot, address in enumerate(addresses):
                if address >= FIRST_ADDRESS and address >> 24 in gaps:
                    yield Owner(op, there.id, base + slot), address


async def _who_names(there: Holder, block: int, address: int) -> tuple[Holder, int] | None:
    """Who names a place that was written for a block of this volume (or snapshot), and the check it has for it."""
    (now,), (check,) = await there.entries(block, 1)
    if now == address and not there.gone:
        return there, check
    volume = there.volume if isinstance(there, Snapshot) else there
    if not (volume.has_history or volume.retired):
        return None
    # The newest one shows what was overwritten since the last checkpoint through the volume's committed map: it gets an
    # entry of its own with the next one.
    for owner in (*volume.owners_at(block >> FANOUT_BITS), *volume.snapshots[-1:]):
        (now,), (check,) = await owner.entries(block, 1)
        if now == address and not owner.gone:
            return owner, check
    return None


def _data_target(volume: Holder, block: int, check: int) -> _Target:
    offset = block << BLOCK_SHIFT
    return _Target("data", volume, offset, max(0, min(BLOCK_BYTES, volume.size_bytes - offset)), check)


def _page_target(volume: Holder, level: int, index: int, check: int) -> _Target:
    """A page stands for all blocks below it."""
    shift = BLOCK_SHIFT + FANOUT_BITS * (level + 1)
    offset = index << shift
    return _Target("map", volume, offset, max(0, min(1 << shift, volume.size_bytes - offset)), check)


def _unreadable(error: OSError) -> str:
    """The reason without the place, which the damage itself has, so that neighbours are alike."""
    return f"can't be read ({os.strerror(error.errno or errno.EIO)})"


def _log(damage: list[Damage]) -> None:
    for found in damage:
        logger.error("scrub: %s", found.sentence())
