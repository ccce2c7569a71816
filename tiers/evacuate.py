"""Evacuation: emptying a device, so that it can be taken out of the pool while that is in use.

From the moment at which its state is `evacuating` nothing new is put on a device (`Space.pick_device`, and whoever has
an open segment there leaves it), and neither its free places nor its size count. Then, in rounds:

1. The log's head, the open segments of map pages and of copies leave it.
2. A checkpoint: what is dead on it is freed, the copy of the catalog goes elsewhere.
3. Live map pages are written elsewhere by the next checkpoint (`Engine.forced`). They are found by walking the trees.
4. Live data are moved (`tiers.mover`), by a mover of its own. The cleaner keeps off such a device from then on. A round
   of it that was under way may move out of the same segment: then one of the two MOVE records finds the entry changed,
   and that copy doesn't take effect.

When no segment lies there any more the device leaves the tables, a checkpoint commits and copies a catalog that says
`removed`, and only then is its label wiped. The catalog keeps the row: device indices are given once in a pool's life,
since an old log, an old copy or the device itself, attached again, could name it. A crash at any point finds the state
in the catalog, and the next life goes on. Until the last step nothing needs to be undone, so an evacuation can be
cancelled.

**A failing device**: a block that can't be read, or is damaged, moves as BAD, as everywhere. A segment with a damaged
batch header is emptied by what the map says is in it. A map page that can't be read is given up: from then on it reads
as BAD_PAGE (`SegmentTable.substitutes`), so the checkpoint can write it elsewhere, and what was below it is lost.

**A lost device** (`tiers.lost`) has nothing to be read. Its map pages read as BAD_PAGE, and a checkpoint that writes a
leaf makes entries BAD that name a place on it; here the leaves that have some are found and forced.

What a lost page named stays counted, and would pin segments for ever. So when pages were lost the counts are made anew
by a walk over all maps (`check.find_leaks`), which lists what is lost on the way.
"""

import errno
import logging
import time
from collections.abc import AsyncGenerator, Callable, Set
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import trio
import trio.lowlevel

from tiers.catalog import device_row
from tiers.check import find_leaks
from tiers.checkpoint import Checkpointer
from tiers.cleaner import Cleaner
from tiers.device import Device
from tiers.errors import TierError
from tiers.failpoint import hit
from tiers.layout import BLOCK_BYTES, BLOCK_SHIFT, FIRST_ADDRESS, MIB, SLOT_BITS
from tiers.lostpages import give_up, read_past_cache, take_back
from tiers.maptree import BAD_PAGE, EMPTY_PAGE, FANOUT, FANOUT_BITS, ROOT_LEVEL, page_key, read_pages
from tiers.merge import Owner
from tiers.mover import DamagedMapError, Mover, OutputFullError
from tiers.record import Kind
from tiers.segments import Segment
from tiers.snapshot import Snapshot
from tiers.units import format_size
from tiers.volume import Volume

if TYPE_CHECKING:
    from tiers.engine import Engine

logger = logging.getLogger(__name__)

GIVEN_UP = "it was given up as lost"
"""Why a removed device is poisoned, if that is why: what carries its label is not to be touched."""
PIECE_BLOCKS = 256
"""A client's long write asks for room by so much."""
STAGED_BLOCKS = 2048
"""Copies made before they are made true, with one flush: 8 MiB."""
FORCED_PAGES = 4096
"""Map pages that one checkpoint is asked to write elsewhere."""
WAIT_S = 0.2
RETRY_S = 1.0
LONG_RETRY_S = 30.0
MIN_SPEED_S = 1.0

Events = Callable[[str, str, str], None]
"""Is told of what operators should hear: (kind, subject, text)."""


def no_events(kind: str, subject: str, text: str) -> None:
    """Nobody listens."""


U64 = Any
"""A NumPy array of uint64."""


@dataclass(frozen=True)
class EvacuationStatus:
    """An evacuation as `terrace pool evacuate` tells it. Bytes of live blocks; seconds since 1970.

    `state` "waiting": for room, which the cleaner makes; "stuck": `problem` says why it is tried again only later.
    """

    path: str
    state: Literal["running", "waiting", "stuck", "removed", "cancelled"]
    lost: bool
    started_at: float
    finished_at: float | None
    done_bytes: int
    total_bytes: int
    bytes_per_s: float
    eta_s: float | None
    bad_blocks: int
    problem: str | None


@dataclass
class _Run:
    """What is known of the evacuation of one device, in this life of the pool."""

    device: Device
    resumed: bool
    started_at: float
    began: float
    total_blocks: int
    recount: bool
    """A map page was lost, or may have been in an earlier life."""
    state: Literal["running", "waiting", "stuck", "removed", "cancelled"] = "running"
    problem: str | None = None
    finished_at: float | None = None
    bad_blocks: int = 0
    left_at_end: int = 0
    """Blocks, when it was cancelled."""
    emptied: set[int] = field(default_factory=set)
    """Segments whose copies are true, and whose counts the next checkpoint will bring down."""


class Evacuator:
    """The evacuations of one pool, one at a time. All of it belongs to the trio thread."""

    def __init__(self, engine: "Engine", checkpointer: Checkpointer, cleaner: Cleaner, events: Events) -> None:
        self.mover = Mover(engine)
        self._events = events
        self._engine = engine
        self._checkpointer = checkpointer
        self._cleaner = cleaner
        self._runs: dict[int, _Run] = {}
        self._wake = trio.Event()
        self._deciding = trio.Lock()

    # -- what operators ask for --------------------------------------------------------------------------------------

    def resume(self) -> None:
        """The pool was opened: go on with what an earlier life began."""
        for device in self._engine.devices:
            if device.state != "online":
                self._begin(device, resumed=True)

    def _begin(self, device: Device, *, resumed: bool) -> None:
        total = self._left(device)
        lost = device.state == "lost"
        began = trio.current_time()
        self._runs[device.index] = _Run(device, resumed, time.time(), began, total, recount=resumed or lost)
        self._wake.set()

    async def start(self, path: str) -> EvacuationStatus:
        """Begin to empty a device; durable when this returns. One that is being emptied goes on.

        Raises TierError: ENOENT, EINVAL for the last device, ENOSPC if the others can't take what is there, EROFS.
        """
        engine = self._engine
        space = engine.space
        async with self._deciding:
            device = self._device(path)
            if device.state != "online":
                return self._status(self._runs[device.index])
            space.require_writable()
            await engine.checkpoint()  # for exact counts
            space.require_writable()
            self._require_others(device)
            self._set_state(device, "evacuating")
            try:
                self._require_room(device)
                hit("evacuate.decided")
                await engine.checkpoint()
            except BaseException:
                self._set_state(device, "online")
                raise
            hit("evacuate.begun")
            self._begin(device, resumed=False)
            text = f"{device.path} is being emptied, {format_size(self._left(device) * BLOCK_BYTES)}"
            logger.info("pool %s: %s", engine.pool_name, text)
            self._events("evacuation", device.path, text)
            return self._status(self._runs[device.index])

    async def cancel(self, path: str) -> EvacuationStatus:
        """Let a device be used again; durable when this returns. What was moved stays moved. Raises TierError."""
        engine = self._engine
        async with self._deciding:
            device = self._device(path)
            run = self._runs.get(device.index)
            if device.state == "lost":
                raise TierError(errno.EINVAL, f"{path} was given up as lost, which can't be taken back")
            if device.state != "evacuating" or run is None:
                raise TierError(errno.ENOENT, f"{path} is not being evacuated")
            engine.space.require_writable()
            self._set_state(device, "online")
            try:
                await engine.checkpoint()
            except BaseException:
                if device in engine.devices:
                    self._set_state(device, "evacuating")
                raise
            hit("evacuate.cancelled")
            run.left_at_end = self._left(device, run.emptied)
            run.state, run.finished_at = "cancelled", time.time()
            self._events("evacuation", device.path, f"the evacuation of {device.path} was cancelled")
            return self._status(run)

    def _device(self, path: str) -> Device:
        for device in self._engine.devices:
            if device.path == path:
                return device
        known = ", ".join(device.path for device in self._engine.devices)
        raise TierError(
            errno.ENOENT, f"the pool {self._engine.pool_name} has no device {path}: its devices are {known}"
        )

    def _require_others(self, device: Device) -> None:
        if not any(other is not device and other.state == "online" for other in self._engine.devices):
            raise TierError(
                errno.EINVAL,
                f"{device.path} is the last device of pool {self._engine.pool_name}: add another one first "
                "(`terrace pool grow`), or delete the pool",
            )

    def _require_room(self, device: Device) -> None:
        """What lives in the pool must fit on the other devices, with the reserve that these need."""
        space = self._engine.space
        pool = self._engine.pool_name
        if space.charged > space.capacity:
            missing = -(-(space.charged - space.capacity) * BLOCK_BYTES // MIB) * MIB
            raise TierError(
                errno.ENOSPC,
                f"{device.path} can't be evacuated: {format_size(space.charged * BLOCK_BYTES)} live in pool {pool}, "
                f"and its other devices have a capacity of {format_size(space.capacity * BLOCK_BYTES)}: grow it by "
                f"{format_size(missing)} or more, or delete or trim something",
            )
        # As much as the cleaner would see to, so that clients, who lose the free space of this device, go on as well.
        most = max(device.segment_bytes >> BLOCK_SHIFT, PIECE_BLOCKS)
        free = self._engine.segments.free_slots
        needed = max(space.low_slots(), space.reserve + space.map_reserve(most) + most) + space.largest_segment_slots
        if free < needed:
            raise TierError(
                errno.ENOSPC,
                f"{device.path} can't be evacuated now: of pool {pool} {format_size(free * BLOCK_BYTES)} are free on "
                f"other devices, and moving takes {format_size(needed * BLOCK_BYTES)} with the reserve: trim or delete "
                "something, or grow it",
            )

    def _set_state(self, device: Device, state: Literal["online", "evacuating"]) -> None:
        self._engine.segments.set_state(device, state)
        self._engine.space.measure_devices()
        self._engine.space.changed()

    # -- telling -----------------------------------------------------------------------------------------------------

    def status(self) -> list[EvacuationStatus]:
        """Those of this life of the pool, the newest last."""
        return [self._status(run) for run in self._runs.values()]

    def _left(self, device: Device, emptied: Set[int] = frozenset()) -> int:
        segments = self._engine.segments.on_device(device)
        return sum(segment.live + segment.pending for segment in segments if segment.id not in emptied)

    def _status(self, run: _Run) -> EvacuationStatus:
        over = run.state in ("removed", "cancelled")
        left = run.left_at_end if over else self._left(run.device, run.emptied)
        total = max(run.total_blocks, left)
        done = total - left
        passed = trio.current_time() - run.began
        speed = done * BLOCK_BYTES / passed if passed >= MIN_SPEED_S and not over else 0.0
        eta = left * BLOCK_BYTES / speed if speed and run.state == "running" else None
        return EvacuationStatus(
            run.device.path,
            run.state,
            run.device.state == "lost",
            run.started_at,
            run.finished_at,
            done * BLOCK_BYTES,
            total * BLOCK_BYTES,
            speed,
            eta,
            run.bad_blocks,
            run.problem,
        )

    # -- the task ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """The task: empty one device after the other."""
        engine = self._engine
        while True:
            todo = [run for run in self._runs.values() if run.device in engine.devices and self._goes_on(run)]
            if not todo:
                await self._wake.wait()
                self._wake = trio.Event()
                continue
            for run in todo:
                delay = RETRY_S
                try:
                    if await self._empty(run):
                        continue
                    delay = 0.0
                except OSError as error:
                    logger.error("evacuating %s: %s", run.device.path, error)
                    run.problem = str(error)
                    if run.state == "stuck":
                        delay = LONG_RETRY_S
                finally:
                    self.mover.drop_staged()
                    engine.space.evacuated_entries = 0
                    engine.space.wanted_slots = 0
                await trio.sleep(delay)

    def _goes_on(self, run: _Run) -> bool:
        return run.device.state in ("evacuating", "lost") and self._engine.space.read_only is None

    async def _empty(self, run: _Run) -> bool:
        """Rounds until the device is empty and removed. False if it was cancelled."""
        engine = self._engine
        device = run.device
        before, searched = -1, False
        while self._goes_on(run):
            await self._leave(device)
            await engine.checkpoint()
            run.emptied.clear()
            engine.space.evacuated_entries = 0
            segments = engine.segments.on_device(device)
            if not segments and not run.recount:
                return await self._remove(run)
            left = sum(segment.live + segment.pending for segment in segments)
            if left and left != before:
                before = left
                run.state, run.problem = "running", None
                await self._empty_once(run, segments)
            elif left and not searched and device.state != "lost":
                searched = True
                await self._search(run, {segment.id: segment for segment in segments})
            elif engine.dead or self._checkpointer.waiting_deletes():
                await trio.lowlevel.checkpoint()  # what is being given back lies there: further checkpoints do that
            elif left or run.recount:
                await self._recount(run)
                before, searched = -1, False
            else:
                await trio.sleep(WAIT_S)  # a reader pins what is dead
        return False

    async def _leave(self, device: Device) -> None:
        """Whoever has an open segment there goes elsewhere. Raises ENOSPC if there is no room for a log."""
        engine = self._engine
        if engine.log.head.device is device and not engine.log.broken:
            engine.log.roll()
            hit("evacuate.rolled")
        for mover in (self.mover, self._cleaner.mover):
            mover.leave(device)
        engine.bypass.leave(device)
        await self._checkpointer.hold()
        try:
            writer = self._checkpointer.writer
            if writer.segment is not None and writer.segment.device is device:
                writer.seal()
        finally:
            self._checkpointer.let_go()

    async def _empty_once(self, run: _Run, segments: list[Segment]) -> None:
        """Force the live map pages and move the live data that lie there now."""
        if not await self._force(run, {segment.id for segment in segments if segment.kind is Kind.MAP}):
            return  # the next round goes on with them
        if run.device.state != "lost":
            await self._move(run, segments)

    # -- map pages -----------------------------------------------------------------------------------------------------

    async def _force(self, run: _Run, there: set[int]) -> bool:
        """Have the next checkpoint write pages elsewhere: those in the segments `there`, and leaves that name a place
        on a lost device. False if there are more than it should be asked for at once.
        """
        engine = self._engine
        lost = run.device.state == "lost"
        if not there and not lost:
            return True
        ids = np.array(sorted(there), np.uint64)
        gone: Callable[[U64], U64] | None = None
        if lost:
            kept = np.array(sorted(s.id for s in engine.segments.by_id.values() if s.device.state != "lost"), np.uint64)

            def gone(addresses: U64) -> U64:
                return (addresses >= np.uint64(FIRST_ADDRESS)) & ~np.isin(addresses >> np.uint64(SLOT_BITS), kept)

        forced = 0
        for volume in engine.owners():
            async with aclosing(self._pages_of(run, volume, leaves=lost)) as pages:
                async for level, index, addresses in pages:
                    found: list[int] = []
                    if level == ROOT_LEVEL and volume.tree.root[0] >> SLOT_BITS in there:
                        found.append(page_key(ROOT_LEVEL, 0))
                    if level == 0:
                        assert gone is not None
                        if gone(addresses).any():
                            found.append(page_key(0, index))
                    else:
                        children = np.flatnonzero(np.isin(addresses >> np.uint64(SLOT_BITS), ids)).tolist()
                        if children and not lost:
                            await self._rescue(run, volume, level - 1, [index << FANOUT_BITS | i for i in children])
                        found += [page_key(level - 1, index << FANOUT_BITS | child) for child in children]
                    if found:
                        forced += len(found)
                        if not await self._room(run, engine.space.evacuated_entries + len(found) + ROOT_LEVEL):
                            return False
                        engine.space.evacuated_entries += len(found) + ROOT_LEVEL
                        if not volume.gone:
                            engine.forced.setdefault(volume.id, set()).update(found)
                            hit("evacuate.page_forced")
                    if forced >= FORCED_PAGES:
                        return False
        return True

    async def _pages_of(self, run: _Run, volume: Owner, *, leaves: bool) -> AsyncGenerator[tuple[int, int, U64], None]:
        """The inner pages of a volume's tree (and its leaves), each above what is below it: (level, index, addresses).

        What lies below a damaged page on another device is passed over.
        """
        stack = [(ROOT_LEVEL, 0)] if volume.tree.root[0] >= FIRST_ADDRESS else []
        while stack and not volume.gone:
            level, index = stack.pop()
            try:
                page = (await volume.tree.load(level, [index]))[index]
            except OSError:
                await self._rescue(run, volume, level, [index])
                try:
                    page = (await volume.tree.load(level, [index]))[index]
                except OSError as error:
                    logger.error("%s", error)
                    continue
            if page is EMPTY_PAGE or page is BAD_PAGE:
                if page is BAD_PAGE and level == ROOT_LEVEL:
                    yield level, index, np.frombuffer(page, np.uint64)[:FANOUT]
                continue
            addresses = np.frombuffer(page, np.uint64)[:FANOUT]
            yield level, index, addresses
            if level > (0 if leaves else 1):
                below = np.flatnonzero(addresses >= np.uint64(FIRST_ADDRESS)).tolist()
                stack += [(level - 1, index << FANOUT_BITS | slot) for slot in reversed(below)]

    async def _rescue(self, run: _Run, volume: Owner, level: int, indices: list[int]) -> None:
        """See that pages on a failing device can be had: by reading past the page cache, or by giving them up."""
        segments = self._engine.segments
        entries = [(index, volume.tree.entry_of_page_now(level, index)) for index in indices]
        wanted = [(index, entry) for index, entry in entries if entry is not None and entry[0] >= FIRST_ADDRESS]
        try:
            await read_pages(segments, [entry for _, entry in wanted], f"of {volume.name}")
            return
        except OSError:
            pass
        for index, (address, check) in wanted:
            segment = segments.by_id.get(address >> SLOT_BITS)
            if segment is None or segment.device is not run.device:
                continue
            segment.pins += 1
            try:
                await read_pages(segments, [(address, check)], f"of {volume.name}")
                continue
            except OSError:
                page = await read_past_cache(segment, address, check)
            finally:
                segment.pins -= 1
            if page is not None:
                segments.substitutes[address] = page
                continue
            give_up(self._engine, volume, level, index, address)
            run.recount = True
            hit("evacuate.page_lost")

    # -- data ----------------------------------------------------------------------------------------------------------

    async def _move(self, run: _Run, segments: list[Segment]) -> None:
        """Move what lives in these segments."""
        by_id = self._engine.segments.by_id
        staged = 0
        copied: set[int] = set()
        for victim in sorted(segments, key=lambda segment: segment.index):
            if victim.kind in (Kind.MAP, Kind.CATALOG) or victim.given_out or victim.open:
                continue
            blocks = victim.live + victim.pending
            if staged and (staged + blocks > STAGED_BLOCKS or not self._may_stage(staged + blocks)):
                await self._apply(run, copied)
                staged = 0
            if not await self._room(run, blocks):
                break
            if by_id.get(victim.id) is not victim or not blocks:
                continue
            staged += blocks
            self._engine.space.evacuated_entries = staged
            try:
                await self.mover.move_segment(victim, self._tier_for(run.device))
                if not victim.damaged and not victim.given_out:
                    copied.add(victim.id)
            except OutputFullError:
                self._engine.space.kick_cleaner.set()
                await self._apply(run, copied)
                staged = 0
        await self._apply(run, copied)

    def _may_stage(self, blocks: int) -> bool:
        settings = self._engine.settings
        space = self._engine.space
        return blocks + space.active_weight + space.frozen_weight < settings.overlay_entries // 2

    async def _apply(self, run: _Run, copied: Set[int] = frozenset()) -> None:
        bad_before = self.mover.bad_blocks
        await self.mover.apply_staged()
        run.emptied |= copied
        run.bad_blocks += self.mover.bad_blocks - bad_before
        self._engine.space.evacuated_entries = 0
        hit("evacuate.moved")

    def _tier_for(self, device: Device) -> str:
        """The device's own tier, if there is another device in it."""
        devices = self._engine.devices
        same = any(other.tier == device.tier and other.state == "online" for other in devices)
        return device.tier if same else {"fast": "base", "base": "fast"}[device.tier]

    async def _room(self, run: _Run, blocks: int) -> bool:
        """Wait until so many blocks may be moved. False if the evacuation was cancelled meanwhile."""
        space = self._engine.space
        while self._goes_on(run):
            if run.device.state == "lost":
                # Only map pages are written, and no more than there were: what a checkpoint needs is enough. The others
                # may be too full for more, for nobody could ask them before.
                spare = self._engine.segments.free_slots - space.first_keep_slots() - space.largest_segment_slots
                has_room = spare >= 2 * blocks
            else:
                has_room = space.room_to_move(blocks)
            if has_room:
                run.state = "running"
                return True
            run.state = "waiting"
            await trio.sleep(WAIT_S)
        return False

    async def _search(self, run: _Run, there: dict[int, Segment]) -> None:
        """Move what the map says is in these segments: their own headers don't tell all."""
        ids = np.array(sorted(there), np.uint64)
        for volume in self._engine.owners():
            async with aclosing(self._pages_of(run, volume, leaves=True)) as pages:
                async for level, index, addresses in pages:
                    if level or not np.isin(addresses >> np.uint64(SLOT_BITS), ids).any():
                        continue
                    try:
                        found, checks = await volume.entries(index << FANOUT_BITS, FANOUT)
                    except OSError:
                        continue
                    by_segment: dict[int, list[tuple[Volume, int, int, int]]] = {}
                    # What a snapshot shows and later ones name is found with these.
                    home: Volume = volume.volume if isinstance(volume, Snapshot) else volume
                    for i, address in enumerate(found):
                        if address >> SLOT_BITS in there:
                            block = index << FANOUT_BITS | i
                            candidate = (home, block, address, checks[i])
                            by_segment.setdefault(address >> SLOT_BITS, []).append(candidate)
                    for segment_id, candidates in by_segment.items():
                        victim = there[segment_id]
                        if self._engine.segments.by_id.get(segment_id) is victim:
                            if not await self._room(run, len(candidates)):
                                return
                            try:
                                await self.mover.move_blocks(victim, candidates, self._tier_for(run.device))
                            except DamagedMapError as error:  # its leaf was there a moment ago: soon again
                                raise TierError(errno.EIO, str(error)) from error
                    await self._apply(run)

    # -- the end -------------------------------------------------------------------------------------------------------

    async def _recount(self, run: _Run) -> None:
        """Take back what is counted and isn't there. Raises TierError if that can't be told."""
        engine = self._engine
        leaks = await find_leaks(engine, self._checkpointer)
        if leaks is None and (engine.dead or self._checkpointer.waiting_deletes()):
            return  # not now: deletes come first
        here = {segment.id for segment in engine.segments.on_device(run.device)}
        if leaks is None or (not run.recount and here.isdisjoint(leaks.live)):
            run.state = "stuck"
            why = "a map page elsewhere can't be read" if leaks is None else "what is on it can't be moved"
            raise TierError(
                errno.EIO,
                f"{run.device.path} can't be emptied: {why}; `terrace pool check {engine.pool_name}` tells more",
            )
        await take_back(engine, self._checkpointer, leaks)
        run.recount = False
        hit("evacuate.recounted")

    async def _remove(self, run: _Run) -> bool:
        """Nothing lies there: take the device out of the pool. False if it was cancelled just now."""
        engine = self._engine
        device = run.device
        lost = device.state == "lost"
        async with self._deciding:
            if not self._goes_on(run):
                return False
            row = replace(device_row(device), state="removed", poisoned=GIVEN_UP if lost else None)
            engine.devices.remove(device)
            engine.removed_devices.append(row)
            engine.space.measure_devices()
            hit("evacuate.removing")
            try:
                await engine.checkpoint()
            except BaseException:
                engine.removed_devices.remove(row)
                engine.devices.append(device)
                engine.devices.sort(key=lambda one: one.index)
                engine.space.measure_devices()
                raise
            hit("evacuate.removed")
            # Nobody else closes it: it is no longer among the pool's devices.
            with trio.CancelScope(shield=True):
                await engine.flusher.device_left(device)
                run.state, run.finished_at, run.problem = "removed", time.time(), None
                try:
                    await engine.offload(device.erase_label_now)
                except OSError as error:
                    logger.warning("the label of %s can't be wiped: %s", device.path, error)
                hit("evacuate.wiped")
                device.close()
        ending = "is forgotten" if lost else "is empty and no longer part of the pool"
        bad = f"; {run.bad_blocks} blocks could not be read" if run.bad_blocks else ""
        logger.info("pool %s: %s %s%s", engine.pool_name, device.path, ending, bad)
        self._events("evacuation", device.path, f"{device.path} {ending}{bad}")
        return True
