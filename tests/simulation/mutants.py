"""Bugs on purpose: each breaks one rule of the promise in the engine, for as long as its context lasts.

A simulation that never fails proves nothing until it is shown that it can. So here is one small wrong engine for each
rule that a simulated machine can see broken; `test_mutants.py` demands that the simulation catches every one of them,
on seeds on which the engine as it is passes.

Most mutants are one passage of the engine's source in place of another (`_instead`): what is wrong with the mutant can
be read off directly. If the engine changes so that the passage is no longer there, planting fails and says so; then
the mutant has to be written anew, or goes with the rule that it broke. Nothing of this is in the product.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import textwrap
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import tiers.kept
import tiers.maptree
import tiers.pool
import tiers.recovery
import tiers.segments
import tiers.snapshot
from tests.simulation.machine import Machine
from tiers.bypass import Bypass
from tiers.checkpoint import Checkpointer
from tiers.engine import Engine
from tiers.evacuate import Evacuator
from tiers.flush import Flusher
from tiers.lineage import Lineage
from tiers.log import Log
from tiers.merge import Merge, Merger, _Keeping
from tiers.mover import Mover
from tiers.pool import Pool
from tiers.promotion import Promoter
from tiers.segments import Segment, SegmentTable
from tiers.snapshot import Snapshot
from tiers.space import Space
from tiers.volume import Volume

Plant = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Mutant:
    """A bug that can be planted."""

    rule: str
    """The rule of the design (section 5) that it breaks, or the promise (`docs/durability.md`)."""
    breaks: str
    """How."""
    plant: Plant


def _instead(owner: Any, name: str, *passages: str, **helpers: Any) -> Plant:
    """A function of a class or module of the engine with `passages` of its source (old, new, ...) replaced.

    `helpers` are names that the new passages use, put into the module for as long.
    """

    @contextlib.contextmanager
    def plant() -> Iterator[None]:
        honest = inspect.getattr_static(owner, name)
        function = getattr(honest, "fget", None) or getattr(honest, "__func__", honest)
        source = textwrap.dedent(inspect.getsource(function))
        for old, new in zip(passages[::2], passages[1::2], strict=True):
            if source.count(old) != 1:
                raise LookupError(f"{owner.__name__}.{name} has no (single) {old!r} any more: write the mutant anew")
            source = source.replace(old, new)
        module = sys.modules[function.__module__]
        made: dict[str, Any] = {}
        code = compile(source, f"<mutant of {owner.__name__}.{name}>", "exec", dont_inherit=True)
        exec(code, module.__dict__, made)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(module.__dict__, helpers))
            stack.enter_context(mock.patch.object(owner, name, made[name]))
            for other in list(sys.modules.values()):  # those that imported it by name
                if other is not owner and other.__name__.startswith("tiers.") and getattr(other, name, None) is honest:
                    stack.enter_context(mock.patch.object(other, name, made[name]))
            yield

    return plant


def _all_of(*plants: Plant) -> Plant:
    """Several replacements that together are one bug."""

    @contextlib.contextmanager
    def plant() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for one in plants:
                stack.enter_context(one())
            yield

    return plant


def _patched(owner: Any, name: str, new: Any) -> Plant:
    return lambda: mock.patch.object(owner, name, new)


# -- bugs that need more than a line -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _half_used_segment() -> Iterator[None]:
    """Recovery goes on where the log ended: same segment, same incarnation, no checkpoint."""
    ends: dict[int, Any] = {}
    honest_apply = tiers.recovery._apply

    async def apply(engine: Engine, found: Any, result: Any, *, truncate_log: bool) -> None:
        await honest_apply(engine, found, result, truncate_log=truncate_log)
        ends[id(engine)] = found.batch

    def resume(engine: Engine) -> bool:
        last = ends.pop(id(engine), None)
        if last is None:
            return False
        log = engine.log
        log.incarnation, log.seq, log.appended_seq, log.prev_check = (last.incarnation, last.seq, last.seq, last.check)
        engine.flusher.durable_seq = last.seq
        log._head = engine.segments.by_id[last.segment_id]
        log._head.open = True
        return True

    recover = _instead(
        tiers.pool,
        "_recover",
        'engine.log.start()\n        hit("recovery.started")\n        await pool._checkpoint_alone()',
        "if not resume(engine):\n            engine.log.start()\n            await pool._checkpoint_alone()",
        resume=resume,
    )
    with mock.patch.object(tiers.recovery, "_apply", apply), recover():
        yield


@contextlib.contextmanager
def _victims_given_back_at_once() -> Iterator[None]:
    """A segment whose blocks have all moved is free when its MOVE is logged, durable or not."""
    honest_move, honest_apply = Mover.move_segment, Mover.apply_staged
    emptied: list[Segment] = []

    async def move(self: Mover, victim: Any, destination: str) -> None:
        await honest_move(self, victim, destination)
        emptied.append(victim)

    async def apply(self: Mover) -> None:
        await honest_apply(self)
        segments = self._engine.segments
        while emptied:
            victim = emptied.pop()
            if segments.by_id.get(victim.id) is victim and not victim.pins and not victim.open:
                victim.device.free.append(victim.index)
                victim.device.free.sort(key=lambda index: index != victim.index)
                victim.device.free.reverse()

    with mock.patch.object(Mover, "move_segment", move), mock.patch.object(Mover, "apply_staged", apply):
        yield


async def _sync_twice(device: Any) -> None:
    try:
        await device.sync()
    except OSError:
        await device.sync()


def _lowest_free_id(table: SegmentTable) -> int:
    return next(i for i in range(1, 1 << 40) if i not in table.by_id)


def _late_keeper(checkpointer: Checkpointer, volume: Volume) -> Snapshot | None:
    """The newest snapshot, but not before the checkpoint after the one that took it."""
    seen: set[int] = checkpointer.__dict__.setdefault("seen_snapshots", set())
    there = [snapshot for snapshot in volume.snapshots if snapshot.state != "deleted"]
    known = [snapshot for snapshot in there if snapshot.id in seen]
    seen.update(snapshot.id for snapshot in there)
    return known[-1] if known else None


def _merge_of_before(checkpointer: Checkpointer) -> Merge:
    """What the failed try had counted stays counted."""
    begun, merge = checkpointer.__dict__.get("kept", (-1, None))
    if begun != checkpointer._begun:
        merge = Merge()
    checkpointer.__dict__["kept"] = checkpointer._begun, merge
    merge.dead, merge.dead_removed, merge.free = {}, [], []
    return merge


def _log_hole(self: Mover, volume: Volume, block: int, entry: Any, victim: Any) -> None:
    """In place of BAD: the lost block becomes a hole."""
    if not volume.deleted and volume.entry_now(block) == entry:
        volume._append([volume._unmap_word, block, 1], [], [])


def _guessed_place(engine: Engine) -> int:
    """Where a batch with a header of one slot goes."""
    head = engine.log.head
    return head.id << 24 | head.used + 1


@contextlib.contextmanager
def _lying_disks() -> Iterator[None]:
    """Not the engine's: the simulation has to see through a disk that lies, too."""
    honest = Machine.__init__

    def init(self: Machine, *args: Any, **kwargs: Any) -> None:
        honest(self, *args, **kwargs)
        for medium in self.media:
            medium.lying_syncs = True

    with mock.patch.object(Machine, "__init__", init):
        yield


# -- the bugs ----------------------------------------------------------------------------------------------------------


async def _untracked(engine: Engine, applying: Awaitable[None]) -> None:
    kept = [(volume, volume.trackers) for volume in engine.volumes.values()]
    for volume, _ in kept:
        volume.trackers = {}
    try:
        await applying
    finally:
        for volume, trackers in kept:
            volume.trackers = trackers


MUTANTS: dict[str, Mutant] = {
    # Rule 1: checkpoints and recovery.
    "a checkpoint that commits without a flush": Mutant(
        "1",
        "the catalog names map pages and blocks that a power cut may still take",
        _instead(
            Checkpointer, "_attempt", "await self._engine.flusher.flush_all()", "await trio.lowlevel.checkpoint()"
        ),
    ),
    "a checkpoint that records the log's position of the commit, not of the freeze": Mutant(
        "1",
        "what was written while the map pages were made is in neither the pages nor the log to be replayed",
        _instead(
            Checkpointer,
            "_change",
            "frozen.log_segment,\n            frozen.log_slot,\n            frozen.log_prev_check,",
            "engine.log.head.id, engine.log.head.used, engine.log.prev_check,",
        ),
    ),
    "a recovery that does not sync before it commits": Mutant(
        "1",
        "a killed daemon's unsynced batches are replayed from the page cache and the checkpoint says they are durable",
        _instead(tiers.pool, "_recover", "await device.sync()", "await trio.lowlevel.checkpoint()"),
    ),
    "a recovery that goes on in the half-used segment of an earlier life": Mutant(
        "1",
        "a batch that survived where its predecessor was lost comes back when a client repeats the lost write",
        _half_used_segment,
    ),
    # Rule 2: flushes.
    "a volume flush that returns at once": Mutant(
        "2",
        "nothing is synced",
        _instead(Volume, "flush", "await self._engine.flusher.flush()", "await trio.lowlevel.checkpoint()"),
    ),
    "a flush that is answered by the sync that was running when it came": Mutant(
        "2",
        "that sync may not cover what was written after it began",
        _instead(Flusher, "_round_for", "lane.begun + 1", "lane.ended + 1"),
    ),
    "a flush that syncs one device of several": Mutant(
        "2",
        "the log may lie on any of them",
        _instead(Flusher, "flush", "if self._names(device)]", "if self._names(device)][:1]"),
    ),
    "a flush that takes its sequence when the sync has ended": Mutant(
        "2",
        "batches claim by durable_seq that others were durable which were not",
        _instead(Flusher, "flush", "self.durable_seq, seq)", "self.durable_seq, self._seq())"),
    ),
    "a volume that is created before it is durable": Mutant(
        "2",
        "the command returned, and a power cut takes the volume",
        _instead(Pool, "create_volume", "await self._engine.flusher.flush()", "await trio.lowlevel.checkpoint()"),
    ),
    "a disk whose sync does nothing": Mutant("2", "what it said was durable is lost with the power", _lying_disks),
    # Rule 3: failed syncs.
    "a failed sync that is tried again": Mutant(
        "3",
        "the second one succeeds, since the kernel has marked the lost pages clean",
        _instead(Flusher, "_round", "await device.sync()", "await sync_twice(device)", sync_twice=_sync_twice),
    ),
    "a failed sync that fails its flush and is then forgotten": Mutant(
        "3",
        "the next flush succeeds and claims what the first has lost",
        _instead(
            Flusher,
            "_round",
            'logger.error("%s", self.failure)\n        with trio.CancelScope(shield=True):\n'
            "            async with self._poisoning:\n                await self._on_poison(device)",
            "",
        ),
    ),
    "a poison that only this life remembers": Mutant(
        "3",
        "a restart lifts it",
        _instead(Engine, "poisoned", "bits = frozenset(d.index for d in self.devices if d.poisoned)", "return"),
    ),
    "a replay that believes the page cache": Mutant(
        "3",
        "after a failed sync the cache shows what the medium never got",
        _instead(tiers.recovery._LogReader, "is_on_medium", "direct=True", "direct=False"),
    ),
    # Rule 4: the end of the log.
    "a replay that takes any damage for the end of the log": Mutant(
        "4",
        "what durable_seq proves to have been durable is dropped in silence",
        _instead(tiers.recovery, "replay", "if proof > end_seq:\n        message", "if False:\n        message"),
    ),
    "a replay that checks a torn batch's header only": Mutant(
        "4",
        "its data may be what was there before",
        _instead(
            tiers.recovery._LogReader,
            "is_on_medium",
            "return checks == batch.checks or all(",
            "return True or all(",
        ),
    ),
    "a replay that ends at damaged data which was durable": Mutant(
        "4",
        "one bad block takes everything after it along",
        _instead(tiers.recovery, "replay", "batch.seq > durable and ", ""),
    ),
    # Rule 5: failed writes.
    "a failed write whose entries go into the map": Mutant(
        "5",
        "the map names bytes that were never written",
        _instead(
            Volume,
            "_append",
            "address = engine.log.append(ops, checks, buffers)",
            "guess = guessed_place(engine)\n"
            "    try:\n"
            "        address = engine.log.append(ops, checks, buffers)\n"
            "    except OSError:\n"
            "        self.apply_batch(ops, checks, guess)\n"
            "        raise",
            guessed_place=_guessed_place,
        ),
    ),
    "a log that goes on behind a failed write": Mutant(
        "5",
        "what had arrived of it stands where the next batch should be: it ends the log, or comes true after all",
        _instead(
            Log,
            "append",
            "self._leave_damaged_head()",
            "segment.used = min(segment.used + len(checks) + 1, segment.slots - 1)",
        ),
    ),
    # Rule 6: labels.
    "an older catalog that is accepted": Mutant(
        "6",
        "the log that it continues with is gone or another's",
        _instead(tiers.pool, "_judge_label", "if label.checkpoint_seq > state.position.checkpoint_seq:", "if False:"),
    ),
    # Rule 7: reuse.
    "a segment that is reused one checkpoint early": Mutant(
        "7",
        "its records are still needed to replay, and those that killed its blocks may not be durable",
        _instead(tiers.segments, "is_free", "and segment.last_seq <= seq", ""),
    ),
    "a segment that is reused under a reader": Mutant(
        "7",
        "a map page's bytes change while a worker reads them",
        _instead(tiers.maptree, "read_pages", "place.pins += 1", "pass", "place.pins -= 1", "pass"),
    ),
    "a segment that is reused when its blocks' moves are logged": Mutant(
        "7",
        "a power cut takes the record, and the blocks' old place is overwritten",
        _victims_given_back_at_once,
    ),
    "an early reuse without a flush": Mutant(
        "7",
        "a power cut takes the records that moved what was in the victim, and the map still names its place",
        _instead(Checkpointer, "reuse", "await engine.flusher.flush()", "await trio.lowlevel.checkpoint()"),
    ),
    "an early reuse while the copy of the catalog is behind": Mutant(
        "7",
        "the copy continues with a log that leads through the reused place",
        _instead(Checkpointer, "reuse", " or self.copies.behind", ""),
    ),
    "a replay that keeps the victim in whose place it meets a segment": Mutant(
        "7",
        "the checkpoint's counts of the victim go on, and its place has two owners",
        _instead(SegmentTable, "adopt_from_log", "if former is not None:", "if False:"),
    ),
    "a move that is logged before its copies are durable": Mutant(
        "7",
        "a power cut may keep the record and lose the copies",
        _instead(
            Mover, "apply_staged", "await engine.flusher.flush_devices(devices)", "await trio.lowlevel.checkpoint()"
        ),
    ),
    "a move whose flush is a client's": Mutant(
        "2",
        "that one passes over copies which no record names yet, and the record is about to name them",
        _instead(Mover, "apply_staged", "await engine.flusher.flush_devices(devices)", "await engine.flusher.flush()"),
    ),
    "a flush that needs the fast devices only": Mutant(
        "2",
        "the log may lie on base too, where there is no room on fast",
        _instead(Flusher, "flush", "if self._names(device)]", 'if device.tier == "fast"]'),
    ),
    "a segment id that is given out twice": Mutant(
        "7",
        "a stale address can be mistaken for a new one",
        _instead(
            SegmentTable,
            "take",
            "Segment(self.next_id,",
            "Segment(lowest_free_id(self),",
            lowest_free_id=_lowest_free_id,
        ),
    ),
    "a read that gives up without looking the entry up again": Mutant(
        "7",
        "a block that was overwritten in time reads as an error",
        _instead(Volume, "_read_suspect", "if self.entry_now(block) == (address, check):", "if True:"),
    ),
    # Promise 2: no silent corruption.
    "a fast read that checks nothing": Mutant(
        "promise 2",
        "it returns what the page cache has",
        _all_of(
            _instead(Volume, "read_now", "and check_of(into) == check", ""),
            _instead(Volume, "_read_entries_now", "if checks_of(part) != checks[first : first + count]:", "if False:"),
        ),
    ),
    "a slow read that checks nothing": Mutant(
        "promise 2",
        "it returns what the device has",
        _instead(
            Volume,
            "_read_runs",
            "suspects += [first + i for i in range(count) if found[i] != checks[first + i]]",
            "del found",
        ),
    ),
    "a map page that nobody checks": Mutant(
        "promise 2",
        "a stale or misdirected page shows other blocks",
        _instead(tiers.maptree, "read_pages", "if check_of(block) != entries[i][1]:", "if False:"),
    ),
    "a lost block that is moved as a hole": Mutant(
        "promise 2",
        "its readers get zeros in place of an error",
        _patched(Mover, "_log_bad", _log_hole),
    ),
    "a cleaner that copies what it has not verified": Mutant(
        "promise 2",
        "one bad read of a good block makes the block bad",
        _instead(Mover, "_copy", "if check_of(view) != check:\n            try:", "if False:\n            try:"),
    ),
    "a slow read of a frame that checks nothing": Mutant(
        "promise 2",
        "it returns what damaged bytes are unpacked to",
        _instead(Volume, "_read_frames", "if found != checks[first : first + count]:", "if False:"),
    ),
    "a fast read of a kept frame that checks nothing": Mutant(
        "promise 2",
        "it returns what somebody else's read has unpacked, and found damaged",
        _instead(Volume, "_read_kept_frame_now", "return checks_of(into) == checks", "return True"),
    ),
    "a replay that takes the blocks of frames for blocks in slots": Mutant(
        "promise 1",
        "after a crash the map names places in which other blocks lie, or none",
        _instead(tiers.recovery, "_apply_move", "batch.places()", "range(batch.places()[0], 1 << 24)"),
    ),
    "a replay that counts the blocks of frames as slots": Mutant(
        "8",
        "the segment has fewer blocks than are live, which no catalog may say",
        _instead(tiers.recovery, "_apply_move", "0 if slot in known else count", "0"),
    ),
    # Rule 8: space.
    "a reserve that is given away": Mutant(
        "8",
        "a full pool has no room left for the cleaner, the map and the trims that would help",
        _all_of(
            _instead(
                Space,
                "reserve",
                "return (7 + self.packed_outputs) * self.largest_segment_slots + self.copy_slots",
                "return 0",
            ),
            _instead(Space, "map_reserve", "return max(pages, quota - segments.map_slots)", "return 0"),
            _instead(Space, "capacity", "kept = ", "return segments.total_slots\n    kept = "),
            _instead(Space, "keep_slots", "return self.copy_slots", "return 0"),
            _instead(Space, "first_keep_slots", "return self.next_pages() + self.copy_slots", "return 0"),
        ),
    ),
    # Rule 9: merging.
    "a merge that does not look whether its block has changed": Mutant(
        "9",
        "a write between its read and its own is lost",
        _instead(
            Volume,
            "_edge_now",
            "if prepared is not None and self.entry_now(block) == prepared[0]:",
            "if prepared is not None:",
        ),
    ),
    "a promotion that does not look whether its block has changed": Mutant(
        "9",
        "a write between the read from base and the promotion is lost",
        _instead(
            Promoter,
            "_promote",
            "if not volume.deleted and volume.entry_now(block) == entry and volume.owns_now(block):",
            "if not volume.deleted:",
        ),
    ),
    "a stream that is made true before it is durable": Mutant(
        "1",
        "a flush covers the record, and a power cut takes what it names",
        _instead(
            Bypass, "_round", "await self._engine.flusher.flush_devices(devices)", "await trio.lowlevel.checkpoint()"
        ),
    ),
    "a merge that ignores what its own batch has staged": Mutant(
        "9",
        "of two writes to one block the first is lost",
        _instead(Volume, "_align", "old = staged.get(block)", "old = None"),
    ),
    "a move that does not look whether its block has changed": Mutant(
        "9",
        "an overwrite between copy and MOVE is undone",
        _instead(Mover, "_apply", "if entry == (old, check):", "if True:"),
    ),
    "a replay that takes every copy of a move": Mutant(
        "9",
        "those whose block was overwritten meanwhile were not to take effect",
        _instead(tiers.recovery, "_apply_move", "if words[1 + at // 64] >> at % 64 & 1:", "if volume:"),
    ),
    # Rule 10: shrinking and huge trims.
    "a shrink that leaves the tail of its last block": Mutant(
        "10",
        "cut-off bytes come back when the volume grows",
        _instead(Pool, "_shrink", 'data[:partial].ljust(BLOCK_BYTES, b"\\0")', "data"),
    ),
    "a dead list that is forgotten": Mutant(
        "10",
        "what lay below is counted as live for ever",
        _instead(Checkpointer, "_change", "change.dead_added = [", "change.dead_added = [] and ["),
    ),
    "a dead list that is walked again": Mutant(
        "10",
        "a restart gives back what was given back before",
        _instead(Checkpointer, "_change", "change.dead_removed = merge.dead_removed", "change.dead_removed = []"),
    ),
    "a checkpoint whose failed try has counted already": Mutant(
        "1",
        "live counts drift, so that space is lost or live segments are freed",
        _instead(
            Checkpointer,
            "_attempt",
            "merge = Merge()",
            "merge = merge_of_before(self)",
            merge_of_before=_merge_of_before,
        ),
    ),
    # Devices that leave.
    "a device that is wiped before the catalog says that it is removed": Mutant(
        "1",
        "a crash leaves a pool that needs it",
        _instead(
            Evacuator,
            "_remove",
            'hit("evacuate.removing")\n',
            'await engine.offload(device.erase_label_now)\n        hit("evacuate.removing")\n',
        ),
    ),
    "a device that is removed before the checkpoint that shows it empty": Mutant(
        "7",
        "the catalog, or the newest copy, still names what lies there",
        _instead(
            Evacuator,
            "_empty",
            "await self._empty_once(run, segments)",
            "await self._empty_once(run, segments)\n            return await self._remove(run)",
        ),
    ),
    "a lost map page that reads as a hole": Mutant(
        "promise 2",
        "what was below it reads as zeros",
        _instead(
            tiers.maptree,
            "read_pages",
            'if segment.device.state == "lost":\n                pages[i] = BAD_PAGE',
            'if segment.device.state == "lost":\n                pages[i] = None',
        ),
    ),
    "a block of a lost device that becomes a hole": Mutant(
        "promise 2",
        "it reads as zeros",
        _instead(Merger, "_give_up_lost", "addresses[lost] = BAD", "addresses[lost] = 0"),
    ),
    # Snapshots.
    "an overwritten block that no snapshot keeps": Mutant(
        "snapshots",
        "each of them shows what was written after it",
        _instead(_Keeping, "_keep", "hidden = kept != 0", "hidden = kept == kept"),
    ),
    "an overwritten block that the oldest snapshot keeps": Mutant(
        "snapshots",
        "newer ones look for it in themselves and in the volume",
        _instead(Checkpointer, "_freeze", "for s in reversed(volume.snapshots) if", "for s in volume.snapshots if"),
    ),
    "a kept block that the next overwrite replaces": Mutant(
        "snapshots",
        "a snapshot shows what was written after it",
        _instead(_Keeping, "_keep", "hidden = kept != 0", "hidden = kept != kept"),
    ),
    "a snapshot that begins to keep one checkpoint late": Mutant(
        "snapshots",
        "it shows what was written after it, until the checkpoint after its own",
        _instead(
            Checkpointer,
            "_freeze",
            'next((s for s in reversed(volume.snapshots) if s.state != "deleted"), None)',
            "late_keeper(self, volume)",
            late_keeper=_late_keeper,
        ),
    ),
    "a group of snapshots that are taken one after another": Mutant(
        "snapshots",
        "they are not of one instant, and a crash leaves some of them",
        _instead(
            Pool,
            "take_snapshots",
            "async with self._ddl:",
            "if len(wanted) > 1:\n"
            "        return [taken for one in wanted for taken in await self.take_snapshots([one])]\n"
            "    async with self._ddl:",
        ),
    ),
    "a deleted snapshot that keeps what it has to itself": Mutant(
        "snapshots",
        "the older one shows what was written after it",
        _instead(
            Merger, "_fold", "taken = (addresses == 0) & (more != 0)", "taken = (addresses == 0) & (more == ~more)"
        ),
    ),
    "a deleted snapshot whose blocks all live on": Mutant(
        "snapshots",
        "what the older one has of its own is counted twice, and never given back",
        _instead(Merger, "_fold", "merge.count_live(more[(addresses != 0) & (more != 0)], -1)", "pass"),
    ),
    "a deleted snapshot in whose place the volume's old block is kept": Mutant(
        "snapshots",
        "the older one has what was written after it, and what is folded comes too late",
        _instead(_Keeping, "_keep", "for blocker in self._blockers:", "for blocker in ():"),
    ),
    "a snapshot that is deleted under its clone": Mutant(
        "snapshots",
        "the clone loses what it has not written itself",
        _instead(Lineage, "delete", '"hidden" if self._has_clones(snapshot, frozen) else "deleted"', '"deleted"'),
    ),
    "a hole in a clone that its origin shines through": Mutant(
        "snapshots",
        "what was trimmed is back",
        _instead(tiers.snapshot, "compose", "(addresses == 0) |", "(addresses == 0) | (addresses == ZEROED) |"),
    ),
    "a clone's snapshot that inherits nothing when the clone takes over": Mutant(
        "snapshots",
        "what it had of the origin is gone with that",
        _instead(
            Merger, "_absorb", "inherits = left & (kept[:, :FANOUT] == INHERITED)", "inherits = left & (left == ~left)"
        ),
    ),
    "a hidden snapshot that is thinned of what a clone's snapshot inherits": Mutant(
        "snapshots",
        "that one finds nothing there, or what an older one has",
        _instead(Merger, "_thin", "[:, :FANOUT] == INHERITED", "[:, :FANOUT] == ~INHERITED"),
    ),
    "a clone that takes over and isn't remembered as the heir": Mutant(
        "snapshots",
        "whoever moves the blocks takes them for dead: their headers name the old volume",
        _instead(Merger, "_absorb", "merge.heirs[source.volume.id] = clone", "pass"),
    ),
    "an heir that a restart forgets": Mutant(
        "snapshots",
        "whoever moves the blocks takes them for dead: their headers name the old volume",
        _instead(Checkpointer, "_volume_rows", "0 if heir is None else heir.id", "0"),
    ),
    "a move that no snapshot's map learns of": Mutant(
        "snapshots",
        "it names a place that is given to others",
        _instead(Merger, "_relocate", "in self._owners_at(volume, leaf):", "in [volume]:"),
    ),
    "a move that the map of a volume with snapshots doesn't learn of": Mutant(
        "snapshots",
        "it names a place that is given to others",
        _instead(Merger, "_relocate", "in self._owners_at(volume, leaf):", "in volume.snapshots_at(leaf):"),
    ),
    "a move in a volume with snapshots that is logged like a write": Mutant(
        "snapshots",
        "the old entry becomes history, and names a place that is given to others",
        _instead(Mover, "_apply", "if volume.has_history or volume.retired:", "if False:"),
    ),
    "a replay that ignores moves in volumes with snapshots": Mutant(
        "snapshots",
        "the maps name places that were given to others",
        _instead(
            tiers.recovery,
            "_apply_move",
            "engine.relocate(volume, start + i, old, base | places[at], batch.checks[at])",
            "pass",
        ),
    ),
    "a cached leaf of a snapshot that outlives a commit": Mutant(
        "snapshots",
        "it names blocks that are elsewhere by now",
        _instead(Lineage, "committed", "engine.views.forget()", "pass"),
    ),
    "a lost page of a snapshot's map that reads as if it kept nothing there": Mutant(
        "promise 2",
        "other bytes are read in place of an error",
        _instead(tiers.kept, "index_of", ", all_of_them=True", ""),
    ),
    # The log says it, the replay must do it.
    "a replay that ignores trims": Mutant(
        "promise 1",
        "what was zeroed before the last writes is back",
        _instead(
            tiers.recovery,
            "_apply",
            "if volume is not None:\n                # What",
            "if volume is not None and op is Op.WRITE:\n                # What",
        ),
    ),
    "a replay that ignores what is being filled": Mutant(
        "promise 1",
        "a half-filled volume passes for complete, or a complete one for half filled",
        _instead(tiers.recovery, "_apply", "engine.volumes[subject].filling = bool(a)", "pass"),
    ),
    "a replay that ignores policies": Mutant(
        "promise 1",
        "a volume is back at the policy that the last checkpoint knew",
        _instead(tiers.recovery, "_apply", "engine.volumes[subject].policy_name = ", ""),
    ),
    "a checkpoint that records the policies of the commit, not of the freeze": Mutant(
        "1",
        "a power cut takes the record and what was written before it, and the policy is there",
        _instead(Checkpointer, "_volume_rows", "item.policy_name", "item.volume.policy_name"),
    ),
    "a policy that is given before it is durable": Mutant(
        "2",
        "the command returned, and a power cut takes the policy back",
        _instead(Pool, "set_policy", "await engine.flusher.flush()", "await trio.lowlevel.checkpoint()"),
    ),
    "a replay that adds nothing to trackers": Mutant(
        "marks",
        "what was written after the last checkpoint is there, and no tracker tells of it",
        _instead(
            tiers.recovery,
            "replay",
            "await _apply(engine, found, result, truncate_log=truncate_log)",
            "await _untracked(engine, _apply(engine, found, result, truncate_log=truncate_log))",
            _untracked=_untracked,
        ),
    ),
    "a replay that takes a stream for blocks that were only moved": Mutant(
        "marks",
        "the same of what went past the log",
        _instead(tiers.recovery, "_apply_move", "volume.mark([0, start + i, 1])", "pass"),
    ),
    "a stream that no tracker learns of": Mutant(
        "marks",
        "it is there, and no tracker tells of it",
        _instead(
            Bypass,
            "_make_true",
            "        write.volume.apply_batch(",
            "        kept, write.volume.trackers = write.volume.trackers, {}\n        write.volume.apply_batch(",
            "        at += part",
            "        write.volume.trackers = kept\n        at += part",
        ),
    ),
    "a checkpoint that saves the record of the freeze with the trackers of later": Mutant(
        "marks",
        "a record is there with trackers that were not given with it",
        _instead(
            Checkpointer,
            "_marks",
            "encode_trackers, item.trackers) if item.trackers",
            "encode_trackers, item.volume.trackers) if item.volume.trackers",
        ),
    ),
    "a checkpoint that forgets trackers and record": Mutant(
        "marks",
        "they are gone after the next open",
        _instead(Checkpointer, "_marks", "rows.append(", "bool("),
    ),
    "a record that is given before it is durable": Mutant(
        "marks",
        "the call returned, and a crash takes the record back",
        _instead(Pool, "set_mirror", "await self._checkpointer.checkpoint()", "await trio.lowlevel.checkpoint()"),
    ),
    # What was given up.
    "a replay that forgets that a block was lost": Mutant(
        "lost",
        "what was logged in its place is given to readers",
        _instead(
            tiers.recovery,
            "_apply",
            "elif op is Op.LOST and subject in engine.volumes:",
            "elif op is Op.LOST and subject in ():",
        ),
    ),
    "a lost block that was nothing before": Mutant(
        "lost",
        "a snapshot doesn't keep it when it is written, so it shows what was written later",
        _instead(
            _Keeping,
            "edit",
            "await self._keep(self._keeper, indices, changed, old,",
            "await self._keep(self._keeper, indices, changed & (old != BAD), old,",
        ),
    ),
    "a lost block in a clone's origin that is a hole": Mutant(
        "lost",
        "a trim of it in the clone says nothing, and it is lost there still",
        _instead(_Keeping, "edit", "below[row] = words != 0", "below[row] = words >= FIRST_ADDRESS"),
    ),
    "a log that rolls without a link": Mutant(
        "promise 1",
        "what follows can't be found again",
        _instead(Log, "roll", "self._write(old, link, [], [], [])", "del link"),
    ),
}

SEARCHED = (
    "a volume flush that returns at once",
    "a checkpoint that records the log's position of the commit, not of the freeze",
    "a flush that syncs one device of several",
    "a disk whose sync does nothing",
    "a failed sync that is tried again",
    "a replay that checks a torn batch's header only",
    "a failed write whose entries go into the map",
    "a log that goes on behind a failed write",
    "a move that does not look whether its block has changed",
    "a merge that ignores what its own batch has staged",
    "a replay that ignores trims",
    "a replay that keeps the victim in whose place it meets a segment",
    "a segment id that is given out twice",
    "a checkpoint whose failed try has counted already",
    "a log that rolls without a link",
)
"""What the random search finds within a dozen seeds."""


def _word(name: str) -> str:
    return re.sub("[^a-z]+", "-", name)


PLANTS: dict[str, Plant] = {_word(name): MUTANTS[name].plant for name in SEARCHED}
"""These by names for a command line."""
