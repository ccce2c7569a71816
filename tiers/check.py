"""`terrace pool check`: does everything that must be true of a pool hold?

Four parts: the segment table, the map, the headers in the segments, the data. Clients and checkpoints go on meanwhile.

The map is judged as of one moment. Live counts belong to the roots of one checkpoint, so both are taken together while
the next checkpoint is held off, for as long as copying the tables takes. After that nothing has to stop: pages are
never changed in place, so the trees of that moment stay what they were as long as their segments aren't reused, and
a pin on each map segment sees to that. What the pins keep is dead space that a full pool may need: if a writer waits
for room while a pinned segment could be freed, the pins are given up and the walk begins again at a new moment; the
third walk holds checkpoints off, and can't be disturbed.

Every page must pass its check, each entry must lie within the written part of a segment of its kind, no two entries
may share a place, and the counts that the catalog keeps must be the counts that are found. Places are remembered in a
bitmap of at most 64 MiB, two tebibytes of segments; a larger pool is walked once more for each such part. Segments of
packed data take 32 bits a slot, one for each block that a frame that begins there may have: 64 GiB of them are a part.

A segment with live blocks must have the header that the table says, from no later checkpoint than the catalog's (else
the catalog is an old one), and its batch headers must be a chain as far as anything is live; `full` reads those of
every sealed segment, otherwise of a sample. Where a header is bad through the page cache it is read again past it, and
a segment that was freed in the meantime is nobody's. Data is read the way clients read it, which looks again by itself.
"""

import contextlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import trio

from tiers.device import read_what_can_be_read
from tiers.frames import INDEX_BITS, MAX_FRAME_BLOCKS
from tiers.layout import BAD, BLOCK_BYTES, BLOCK_SHIFT, FIRST_ADDRESS, SLOT_BITS, SLOT_MASK
from tiers.losses import MAX_RANGES, lost_in_words
from tiers.maptree import FANOUT, FANOUT_BITS, FANOUT_MASK, ROOT_LEVEL, read_pages
from tiers.merge import Owner
from tiers.overlay import RangeSet
from tiers.record import (
    MAX_HEADER_SLOTS,
    BadRecordError,
    Batch,
    Kind,
    decode_batch,
    decode_segment_header,
    peek_header_slots,
)
from tiers.segments import Segment
from tiers.snapshot import Snapshot
from tiers.volume import Volume

if TYPE_CHECKING:
    from tiers.checkpoint import Checkpointer
    from tiers.device import Device
    from tiers.engine import Engine

CHUNK_PAGES = 64
"""Pages looked at without a checkpoint of trio in between."""
SLICE_ENTRIES = 4096
SAMPLE_EVERY = 64
"""Without --full, one leaf page in so many has its data read, and one segment its batch headers."""
READ_BLOCKS = 256
MAX_PROBLEMS = 1000
BITMAP_BYTES = 64 << 20
UNDISTURBED_ATTEMPT = 2
"""The walk that holds checkpoints off, after two that had to give way."""

Progress = Callable[[int, int], None]
U64 = Any
"""A NumPy array of uint64."""


@dataclass
class CheckReport:
    """What a check found. `problems` is empty if and only if all is well."""

    ok: bool = True
    problems: list[str] = field(default_factory=list)
    volumes: int = 0
    pages_checked: int = 0
    blocks_mapped: int = 0
    bytes_checked: int = 0

    def problem(self, text: str) -> None:
        """Note a problem; the first thousand are kept."""
        self.ok = False
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(text)


class _GiveWayError(Exception):
    """A writer waits for space that the walk's pins keep."""


async def check_pool(engine: "Engine", checkpointer: "Checkpointer", *, full: bool, progress: Progress) -> CheckReport:
    """Check a pool that is open. A read-only pool is checked as of its last checkpoint."""
    for attempt in itertools.count():
        if engine.space.read_only is None:
            await checkpointer.checkpoint()
        # A walk that gave way has seen a moment that is over: its report goes with it.
        report = CheckReport()
        async with _moment(engine, checkpointer, holding=attempt == UNDISTURBED_ATTEMPT) as moment:
            try:
                walk = _Walk(engine, moment, report)
                await walk.run(may_give_way=attempt < UNDISTURBED_ATTEMPT)
                break
            except _GiveWayError:
                continue
    await checkpointer.hold()
    try:
        for problem in await checkpointer.copies.verify():
            report.problem(problem)
    finally:
        checkpointer.let_go()
    await walk.tell_losses()
    every = 1 if full else SAMPLE_EVERY
    named = [(segment, highest) for segment, highest in walk.named() if segment.device.state != "lost"]
    sealed = [(segment, highest) for segment, highest in named if not segment.open and not segment.damaged][::every]
    leaf_count = sum(-(-count // every) for count in walk.leaf_counts)
    total = (leaf_count * FANOUT + sum(highest for _, highest in sealed)) * BLOCK_BYTES
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done = min(total, done + count * BLOCK_BYTES)
        progress(done, total)

    suspects = await _check_segment_headers(engine, [segment for segment, _ in named])
    for segment, highest in sealed:
        if segment.id not in suspects and (why := await _check_batch_headers(engine, segment, highest)):
            suspects[segment.id] = why
        advance(highest)
    left_behind = await _left_behind(engine, suspects.keys())
    for segment_id, why in suspects.items():
        if segment_id not in left_behind:
            report.problem(why)
    for owner, _, _ in walk.moment.roots:
        await _check_data(owner, every, report, advance)
    progress(total, total)
    return report


@dataclass(frozen=True)
class Leaks:
    """What is counted and isn't there, because a map page was lost that named it."""

    live: dict[int, int]
    """Blocks too many, by segment id."""
    mapped: "list[tuple[Owner, int]]"


async def find_leaks(engine: "Engine", checkpointer: "Checkpointer") -> Leaks | None:
    """Count anew; list what is lost in `engine.losses` on the way. None if that can't be done now, or not soundly.

    What is found stays true: nothing names what leaked, so nothing will ever count it down.
    """
    for attempt in itertools.count():
        await checkpointer.checkpoint()
        async with _moment(engine, checkpointer, holding=attempt == UNDISTURBED_ATTEMPT) as moment:
            if len(moment.dead) or checkpointer.waiting_deletes():
                return None  # what is being given back is counted still
            try:
                walk = _Walk(engine, moment, CheckReport())
                await walk.run(may_give_way=attempt < UNDISTURBED_ATTEMPT)
            except _GiveWayError:
                continue
        if walk.unread:
            return None  # what lies below a page that can't be read now may be there again later
        await walk.tell_losses()
        excess = moment.live - walk.found
        rows = np.flatnonzero(excess * ~moment.is_copy).tolist()
        return Leaks({int(moment.ids[row]): int(excess[row]) for row in rows}, walk.mapped_too_many)
    raise AssertionError("the last attempt gives way to nobody")


# -- the moment --------------------------------------------------------------------------------------------


@dataclass
class _Moment:
    """A checkpoint's state: roots, and what was counted for them. The columns from `ids` on belong together."""

    roots: "list[tuple[Owner, tuple[int, int], int]]"
    """(volume or snapshot, root, mapped blocks by the catalog's count)"""
    segments: "list[Segment]"
    free: "list[tuple[Device, list[int]]]"
    ids: U64
    live: U64
    used: U64
    is_map: U64
    is_copy: U64
    is_packed: U64
    reused: U64
    """Segments whose places were given out again, although the roots still name them: the log has what became of it."""
    dead: U64
    """A row (address, check, level, volume) for each detached subtree."""


@contextlib.asynccontextmanager
async def _moment(engine: "Engine", checkpointer: "Checkpointer", *, holding: bool) -> AsyncIterator[_Moment]:
    """A moment whose map pages stay where they are while the context lasts. `holding`: no checkpoint comes either."""
    pinned: list[Segment] = []
    await checkpointer.hold()
    held = True
    try:
        moment = await _take_moment(engine, checkpointer.waiting_deletes())
        for segment, is_map in zip(moment.segments, moment.is_map.tolist(), strict=True):
            if is_map:
                segment.pins += 1
                pinned.append(segment)
        if not holding:
            held = False
            checkpointer.let_go()
        yield moment
    finally:
        for segment in pinned:
            segment.pins -= 1
            if not segment.live:
                engine.space.kick_checkpoint.set()
        if held:
            checkpointer.let_go()


async def _take_moment(engine: "Engine", deleted: "list[Volume]") -> _Moment:
    """Copy the tables, in slices: while checkpoints are held off roots, live counts and the dead list don't change."""
    # What was deleted since the checkpoint is still counted: a read-only pool never gets to the next one. In one step
    # with the rest of what has no slices: a volume that is deleted meanwhile must be in one of the two.
    roots = [(owner, owner.tree.root, owner.tree.mapped_blocks) for owner in [*engine.owners(), *deleted]]
    reused = np.array(sorted(engine.segments.reused), np.uint64)
    segments = sorted(engine.segments.by_id.values(), key=lambda segment: segment.id)
    free = [(device, list(device.free)) for device in engine.devices]
    columns = np.zeros((len(segments), 4), np.uint64)
    for start in range(0, len(segments), SLICE_ENTRIES):
        part = segments[start : start + SLICE_ENTRIES]
        columns[start : start + len(part)] = [(s.id, s.live, s.used, s.kind) for s in part]
        await trio.lowlevel.checkpoint()
    dead = np.zeros((len(engine.dead), 4), np.uint64)
    source = iter(engine.dead.items())
    at = 0
    while slice_ := list(itertools.islice(source, SLICE_ENTRIES)):
        dead[at : at + len(slice_)] = [(address, *value) for address, value in slice_]
        at += len(slice_)
        await trio.lowlevel.checkpoint()
    return _Moment(
        roots=roots,
        segments=segments,
        free=free,
        ids=columns[:, 0].copy(),
        live=columns[:, 1].astype(np.int64),
        used=columns[:, 2].astype(np.int64),
        is_map=columns[:, 3] == Kind.MAP,
        is_copy=columns[:, 3] == Kind.CATALOG,
        is_packed=columns[:, 3] == Kind.PACKED,
        reused=reused,
        dead=dead,
    )


# -- the map -----------------------------------------------------------------------------------------------


class _Walk:
    """One walk over all map pages of a moment."""

    def __init__(self, engine: "Engine", moment: _Moment, report: CheckReport) -> None:
        self.moment = moment
        self.leaf_counts: list[int] = []
        """Leaf pages of each volume."""
        self._engine = engine
        self._report = report
        self._may_give_way = False
        self._pinned = [segment for segment in moment.segments if segment.kind is Kind.MAP]
        self.found = np.zeros(len(moment.ids), np.int64)
        """Blocks that are mapped, by segment."""
        self.unread = 0
        """Pages that could not be read: what lies below them was not seen."""
        self.mapped_too_many: list[tuple[Owner, int]] = []
        self._lost: dict[Owner, RangeSet] = {}
        self._lost_blocks: dict[Owner, int] = {}
        self._owner: Owner | None = None
        self._highest = np.zeros(len(moment.ids), np.int64)
        # Bit of a segment's slot 0, over all segments; on whole bytes, so that parts end on them.
        bits = np.where(moment.is_packed, MAX_FRAME_BLOCKS, 1) * moment.used
        self._first_bit = np.concatenate([[0], np.cumsum((bits + 7) & ~7)])
        self._part = (0, 0)
        self._bitmap: Any = None
        self._first_part = True

    def named(self) -> "list[tuple[Segment, int]]":
        """The segments that the map named at the moment, and the last slot that it named of each."""
        return [pair for pair in zip(self.moment.segments, self._highest.tolist(), strict=True) if pair[1]]

    async def run(self, *, may_give_way: bool) -> None:
        """Walk, once for each part of the segments whose places fit the bitmap. Raises _GiveWayError."""
        self._may_give_way = may_give_way
        await self._check_table()
        lo = 0
        while self._first_part or lo < len(self.moment.ids):
            hi = int(np.searchsorted(self._first_bit, self._first_bit[lo] + 8 * BITMAP_BYTES, side="right")) - 1
            self._part = (lo, max(hi, lo + 1))
            bits = int(self._first_bit[min(self._part[1], len(self.moment.ids))] - self._first_bit[lo])
            self._bitmap = np.zeros(bits // 8, np.uint8)
            await self._walk_trees()
            self._first_part = False
            lo = self._part[1]
        self._bitmap = None

    async def _walk_trees(self) -> None:
        """The first time everything is judged; later times only whether places are shared."""
        report, moment = self._report, self.moment
        owing = set(np.unique(moment.dead[:, 3]).tolist())
        for owner, root, mapped in moment.roots:
            entries = np.array([(*root, 0)] if root[0] else [], np.uint64).reshape(-1, 3)
            self._owner = owner
            leaves, found = await self._subtree(owner.name, entries, ROOT_LEVEL)
            self._owner = None
            if self._first_part:
                self.leaf_counts.append(leaves)
                report.volumes += isinstance(owner, Volume) and not owner.retired
                report.blocks_mapped += found
                if found != mapped and owner.id not in owing:
                    self.mapped_too_many.append((owner, mapped - found))
                    report.problem(f"{owner.name}: the catalog counts {mapped} mapped blocks, its map has {found}")
        for level in range(ROOT_LEVEL + 1):
            rows = moment.dead[moment.dead[:, 2] == level][:, [0, 1, 3]]
            await self._subtree("a deleted range", rows, level, is_dead=True)
        if self._first_part:
            for at in np.flatnonzero(self.found != moment.live).tolist():
                report.problem(
                    f"segment {moment.ids[at]}: {moment.live[at]} blocks are counted as live, "
                    f"{self.found[at]} are mapped"
                )
            for segment, highest in zip(moment.segments, self._highest.tolist(), strict=True):
                # Where all that is in it was deleted there is nothing to clean. The bytes there may be another's: of
                # a segment that was put in its place before a crash, which took the header of that.
                if segment.damaged and (highest or self.unread):
                    report.problem(
                        f"{segment.device.path} at {segment.base}: segment {segment.id} has a damaged header and "
                        f"can't be cleaned"
                    )

    async def _check_table(self) -> None:
        """The segment table must partition each device, and a free place must not be in use."""
        places: dict[int, set[int]] = {device.index: set() for device, _ in self.moment.free}
        for number, segment in enumerate(self.moment.segments, 1):
            if number % SLICE_ENTRIES == 0:
                await trio.lowlevel.checkpoint()
            taken = places[segment.device.index]
            if segment.index in taken:
                self._report.problem(f"{segment.device.path}: two segments claim place {segment.index}")
            taken.add(segment.index)
            written = segment.blocks if segment.kind is Kind.PACKED else segment.used
            if segment.live > written:
                self._report.problem(
                    f"segment {segment.id}: {segment.live} blocks are counted as live, and {written} were written"
                )
        for device, free in self.moment.free:
            taken = places[device.index]
            for index in sorted(taken.intersection(free)):
                self._report.problem(f"{device.path}: place {index} is free and in use")
            if len(free) + len(taken) != device.segment_count:
                self._report.problem(f"{device.path}: some segments are neither free nor in use")
            if device.poisoned:
                self._report.problem(f"{device.path} is poisoned: {device.poisoned}")

    async def _subtree(self, name: str, entries: U64, level: int, *, is_dead: bool = False) -> tuple[int, int]:
        """Check pages, rows of (address, check, index), and all below; return how many leaves and blocks they map."""
        leaves = mapped = 0
        lost = entries[:, 0] == BAD
        if lost.any():
            self._note_lost(entries[lost, 2], FANOUT_BITS * (level + 1))
            entries = entries[~lost]
        for start in range(0, len(entries), CHUNK_PAGES):
            part = entries[start : start + CHUNK_PAGES]
            self._give_way()
            self._place(part[:, 0], name, is_map=True, is_dead=is_dead)
            pages, indices = await self._read(name, level, part.tolist())
            words = np.frombuffer(b"".join(pages), np.uint64).reshape(-1, 2 * FANOUT)
            used = np.nonzero(words[:, :FANOUT])
            if self._first_part:
                self._report.pages_checked += len(pages)
            if level == 0:
                self._place(words[used], name, is_map=False, is_dead=is_dead)
                leaves += len(pages)
                rows, columns = np.nonzero(words[:, :FANOUT] == BAD)
                mapped += int(np.count_nonzero(words[:, :FANOUT] >= np.uint64(FIRST_ADDRESS)))
                if len(rows):
                    first = np.array(indices, np.uint64)[rows] << np.uint64(FANOUT_BITS)
                    self._note_lost(first | columns.astype(np.uint64), 0)
            await trio.lowlevel.checkpoint()
            if level:
                index = np.array(indices, np.uint64)[used[0]] << np.uint64(FANOUT_BITS) | used[1].astype(np.uint64)
                below = np.stack([words[used], words[used[0], used[1] + FANOUT], index], axis=1)
                more = await self._subtree(name, below, level - 1, is_dead=is_dead)
                leaves, mapped = leaves + more[0], mapped + more[1]
        return leaves, mapped

    async def _read(self, name: str, level: int, part: list[list[int]]) -> tuple[list[Any], list[int]]:
        """The pages that are sound, and the index of each."""
        segments = self._engine.segments
        entries = [(address, check) for address, check, _ in part]
        try:
            return list(await read_pages(segments, entries, f"of {name}, level {level}")), [row[2] for row in part]
        except OSError:
            pages: list[Any] = []
            indices: list[int] = []
            for address, check, index in part:
                try:
                    pages += await read_pages(segments, [(address, check)], f"of {name}, level {level}", [index])
                    indices.append(index)
                except OSError as error:
                    self.unread += 1
                    if self._first_part:
                        self._report.problem(str(error))
            return pages, indices

    def _note_lost(self, indices: U64, shift: int) -> None:
        """Blocks, or with `shift` ranges of blocks, of the map in hand are BAD."""
        owner = self._owner
        if owner is None or not self._first_part:
            return
        end = owner.size_bytes + BLOCK_BYTES - 1 >> BLOCK_SHIFT
        ranges = self._lost.setdefault(owner, RangeSet())
        # In runs: a lost device may have taken millions.
        breaks = np.flatnonzero(np.diff(indices) != 1) + 1
        for run in np.split(indices, breaks):
            start, stop = int(run[0]) << shift, min(int(run[-1]) + 1 << shift, end)
            if start < stop:
                self._lost_blocks[owner] = self._lost_blocks.get(owner, 0) + stop - start
                if len(ranges) < MAX_RANGES:
                    ranges.add(start, stop)

    async def tell_losses(self) -> None:
        """Report what was lost, range by range, and list it for the pool's status.

        What is listed and lost stays so: it may have been given up since the moment.
        """
        losses = self._engine.losses
        await losses.refresh(self._engine.owners())
        for owner, ranges in self._lost.items():
            blocks = 0
            for start, stop in zip(ranges.starts, ranges.ends, strict=True):
                losses.add(owner.id, start, stop - start)
                blocks += stop - start
                self._report.problem(
                    f"{owner.name} at byte {start << BLOCK_SHIFT}: {lost_in_words(owner, stop - start)}"
                )
            if blocks < self._lost_blocks.get(owner, 0):
                more = self._lost_blocks[owner] - blocks
                self._report.problem(f"{owner.name}: {lost_in_words(owner, more, 'more ')}")

    def _place(self, addresses: U64, name: str, *, is_map: bool, is_dead: bool) -> None:
        """Count addresses by segment; each must lie in the written part of one of the right kind, and be unique.

        Dead leaves may go on naming data segments that were reused since: nothing is ever read through them.
        """
        moment, report = self.moment, self._report
        in_order = np.sort(addresses[addresses >= FIRST_ADDRESS])
        if not len(in_order) or not len(moment.ids):
            if len(in_order) and self._first_part and not is_dead:
                report.problem(f"{name}: {len(in_order)} entries point into segments, and none is in use")
            return
        ids = in_order >> np.uint64(SLOT_BITS)
        slots = (in_order & np.uint64(SLOT_MASK)).astype(np.int64)
        rows = np.minimum(np.searchsorted(moment.ids, ids), len(moment.ids) - 1)
        known = moment.ids[rows] == ids
        # In a packed segment: a frame's first slot, how many it has, and which of its blocks it is.
        packed = known & moment.is_packed[rows]
        counts_of = np.where(packed, (slots >> INDEX_BITS & MAX_FRAME_BLOCKS - 1) + 1, 1)
        bits_of = np.where(packed, slots >> INDEX_BITS & ~(MAX_FRAME_BLOCKS - 1) | slots & MAX_FRAME_BLOCKS - 1, slots)
        slots = np.where(packed, slots >> 2 * INDEX_BITS, slots)
        last = slots + counts_of - 1
        outside = known & ((slots < 1) | (last >= moment.used[rows]))
        if self._first_part:
            unknown = ids[~known & ~np.isin(ids, moment.reused)] if is_map or not is_dead else ids[:0]
            for segment_id, count in zip(*np.unique(unknown, return_counts=True), strict=True):
                report.problem(f"{name}: {count} entries point into segment {segment_id}, which is not in use")
            for segment_id in np.unique(ids[known & ((moment.is_map[rows] != is_map) | moment.is_copy[rows])]):
                report.problem(f"{name}: entries point into segment {segment_id}, which holds something else")
            for segment_id in np.unique(ids[outside]):
                report.problem(f"{name}: entries point past what was written of segment {segment_id}")
            touched, counts = np.unique(rows[known], return_counts=True)
            self.found[touched] += counts
            if not is_dead:
                np.maximum.at(self._highest, rows[known & ~outside], last[known & ~outside])
        here = known & ~outside & (rows >= self._part[0]) & (rows < self._part[1])
        bits = self._first_bit[rows[here]] - self._first_bit[self._part[0]] + bits_of[here]
        order = np.argsort(bits, kind="stable")  # they are in order but where frames of other lengths begin together
        shared = self._mark(bits[order])
        for segment_id in np.unique(ids[here][order][shared]):
            report.problem(f"{name}: two map entries share a place in segment {segment_id}")

    def _mark(self, bits: U64) -> U64:
        """Set these bits (in order) of the bitmap; return which of them were set, or are there twice."""
        if not len(bits):
            return np.zeros(0, bool)
        masks = (1 << (bits & 7)).astype(np.uint8)
        shared = (self._bitmap[bits >> 3] & masks) != 0
        shared[1:] |= bits[1:] == bits[:-1]
        first = np.flatnonzero(np.append(True, np.diff(bits >> 3)))
        self._bitmap[bits[first] >> 3] |= np.bitwise_or.reduceat(masks, first)
        return shared

    def _give_way(self) -> None:
        """Nobody is to wait for space that only the walk's pins keep."""
        space = self._engine.space
        if (
            self._may_give_way
            and space.short
            and space.waiters
            and any(not segment.live and not segment.open for segment in self._pinned)
        ):
            raise _GiveWayError


# -- headers -----------------------------------------------------------------------------------------------


async def _check_segment_headers(engine: "Engine", segments: "list[Segment]") -> dict[int, str]:
    """Slot 0 of every segment with live blocks says what the table says. Returns those where it doesn't, and why."""
    by_id = engine.segments.by_id
    suspects: dict[int, str] = {}
    for device in list(engine.devices):
        live = [segment for segment in segments if segment.device is device]
        for start in range(0, len(live), CHUNK_PAGES):
            part = [segment for segment in live[start : start + CHUNK_PAGES] if by_id.get(segment.id) is segment]
            try:
                headers = await device.read_many([(segment.base, BLOCK_BYTES) for segment in part])
            except OSError:
                headers = [bytearray()] * len(part)
            for segment, header in zip(part, headers, strict=True):
                if _wrong_header(engine, segment, header) is None:
                    continue
                try:
                    why = _wrong_header(engine, segment, await device.read_direct(segment.base, BLOCK_BYTES))
                except OSError as error:
                    why = str(error)
                if why is not None and by_id.get(segment.id) is segment:
                    suspects[segment.id] = f"{device.path} at {segment.base}: the header of segment {segment.id}: {why}"
            await trio.lowlevel.checkpoint()
    return suspects


async def _left_behind(engine: "Engine", suspects: Collection[int]) -> set[int]:
    """Those of the suspects that nothing is in any more, for all that the log says since the last checkpoint.

    A pool that can't take a checkpoint still has them in its last one's map; their places may have been given out
    again, and what a crash left there is anybody's.
    """
    if engine.space.read_only is None or not suspects:
        return set()
    by_id = engine.segments.by_id
    left = {i for i in suspects if i in by_id and by_id[i].kind in (Kind.LOG, Kind.MOVED, Kind.PACKED)}
    for owner in engine.owners():
        async with contextlib.aclosing(_leaves(owner)) as pages:
            async for leaves in pages:
                for index in leaves:
                    with contextlib.suppress(OSError):  # the walk has named that page
                        addresses, _ = await owner.entries(index << FANOUT_BITS, FANOUT)
                        left.difference_update({address >> SLOT_BITS for address in addresses})
    return left


def _wrong_header(engine: "Engine", segment: "Segment", block: bytearray) -> str | None:
    """What is wrong with a segment's header, if anything."""
    try:
        header = decode_segment_header(block, engine.pool_uuid)
    except BadRecordError as error:
        return str(error)
    named = (header.segment_id, header.kind, header.device_index, header.physical_index)
    if named != (segment.id, segment.kind, segment.device.index, segment.index):
        return f"it is that of segment {header.segment_id}, device {header.device_index}, place {header.physical_index}"
    if header.checkpoint_seq > engine.log.checkpoint_seq:
        return (
            f"it was written after checkpoint {header.checkpoint_seq}, and the catalog knows only "
            f"{engine.log.checkpoint_seq}: it was restored from a backup; put the newest catalog back"
        )
    return None


async def _check_batch_headers(engine: "Engine", segment: "Segment", highest: int) -> str | None:
    """The batch headers of a sealed segment lead from one to the next, up to the last slot that anything names.

    What is behind it may be a batch that a power cut tore: nobody was promised that. Returns what is wrong.
    """
    if engine.segments.by_id.get(segment.id) is not segment:
        return None
    segment.pins += 1
    try:
        slot = 1
        while slot <= highest:
            length = min(MAX_HEADER_SLOTS, segment.slots - slot) << BLOCK_SHIFT
            offset = segment.offset(slot)
            # A data block in between that can't be read is for the check of the data to tell.
            data, _ = await read_what_can_be_read(segment.device, offset, length)
            batches = _batches_in(engine, segment, slot, data)
            if not batches:
                data, unreadable = await read_what_can_be_read(segment.device, offset, length, direct=True)
                try:
                    batches = _batches_in(engine, segment, slot, data, must=True)
                except BadRecordError as error:
                    why = "a batch header that can't be read" if 0 in unreadable else str(error)
                    return (
                        f"{segment.device.path} at {offset}: {why}; segment {segment.id} has a damaged header and "
                        f"can't be cleaned"
                    )
            slot = batches[-1].slot + batches[-1].slots
            await trio.lowlevel.checkpoint()
        return None
    finally:
        segment.pins -= 1


def _batches_in(engine: "Engine", segment: "Segment", slot: int, data: bytearray, *, must: bool = False) -> list[Batch]:
    """The batches whose headers lie one after the other in `data`, which begins at `slot`.

    `must`: raises BadRecordError if there is none.
    """
    view = memoryview(data)
    batches: list[Batch] = []
    at = 0
    while at < len(view) >> BLOCK_SHIFT:
        rest = view[at << BLOCK_SHIFT :]
        slots = max(1, peek_header_slots(rest[:BLOCK_BYTES]))
        try:
            batch = decode_batch(rest[: slots << BLOCK_SHIFT], engine.pool_uuid, segment.id, slot + at)
        except BadRecordError:
            if must and not batches:
                raise
            break
        batches.append(batch)
        at += batch.slots
    return batches


# -- data --------------------------------------------------------------------------------------------------


async def _check_data(owner: "Owner", every: int, report: CheckReport, advance: Callable[[int], None]) -> None:
    """Read one leaf in `every` the way clients do and let the checks speak."""
    into = memoryview(bytearray(READ_BLOCKS * BLOCK_BYTES))
    number = 0
    async with contextlib.aclosing(_leaves(owner)) as pages:
        async for leaves in pages:
            for index in leaves:
                number += 1
                if owner.gone or (number - 1) % every:
                    continue
                try:
                    addresses, _ = await owner.entries(index << FANOUT_BITS, FANOUT)
                    if isinstance(owner, Snapshot):  # what it shows and others name is read with theirs
                        own = (await owner.tree.load(0, [index]))[index]
                        addresses = [a if own[i] >= FIRST_ADDRESS else 0 for i, a in enumerate(addresses)]
                except OSError as error:
                    if report.ok and not owner.gone:  # else the walk has named that page
                        report.problem(str(error))
                    continue
                for first, count in _mapped_runs(addresses):
                    start = (index << FANOUT_BITS) + first << BLOCK_SHIFT
                    try:
                        await owner.read_anyway(start, count << BLOCK_SHIFT, into[: count << BLOCK_SHIFT])
                    except OSError:
                        await _name_bad_blocks(owner, start, count, report)
                    report.bytes_checked += count << BLOCK_SHIFT
                advance(FANOUT)


async def _leaves(owner: "Owner") -> AsyncGenerator[list[int], None]:
    """The leaf pages that the committed tree has by now, in order, a level-1 page's at a time.

    What lies below a damaged page is passed over: the walk has named it.
    """
    at = 0  # index of the next level-1 page
    while at < 1 << FANOUT_BITS * (ROOT_LEVEL - 1) and not owner.gone and owner.tree.root[0] > BAD:
        for level in range(ROOT_LEVEL, 0, -1):
            index = at >> FANOUT_BITS * (level - 1)
            try:
                page = (await owner.tree.load(level, [index]))[index]
            except OSError:
                at = index + 1 << FANOUT_BITS * (level - 1)
                break
            if level == 1:
                yield [index << FANOUT_BITS | slot for slot in range(FANOUT) if page[slot] > BAD]
                at += 1
                break
            shift = FANOUT_BITS * (level - 2)
            slot = at >> shift & FANOUT_MASK
            if page[slot] <= BAD:
                skipped = next((more for more in range(1, FANOUT - slot) if page[slot + more] > BAD), FANOUT - slot)
                at = (at >> shift) + skipped << shift
                break
        await trio.lowlevel.checkpoint()


def _mapped_runs(addresses: list[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for i, address in enumerate(addresses):
        if address >= FIRST_ADDRESS:  # what was lost before is told of already
            if runs and runs[-1][0] + runs[-1][1] == i:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((i, 1))
    return runs


async def _name_bad_blocks(owner: "Owner", start: int, count: int, report: CheckReport) -> None:
    into = memoryview(bytearray(BLOCK_BYTES))
    for offset in range(start, start + (count << BLOCK_SHIFT), BLOCK_BYTES):
        try:
            await owner.read_anyway(offset, BLOCK_BYTES, into)
        except OSError as error:
            if not owner.gone:  # what it had may have been given out again since
                report.problem(str(error))
