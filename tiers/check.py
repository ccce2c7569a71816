"""`terrace pool check`: does everything that must be true of a pool hold?

Right after a checkpoint, while the next one waits (clients go on), every map page is walked: each must pass its check,
each entry must lie within a segment in use, no two entries may share a place, and the counts that the catalog keeps
must be the counts that are found. Then data is read and checked against the map: a sample, or all of it.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import trio

from tiers.layout import BLOCK_BYTES, BLOCK_SHIFT, FIRST_ADDRESS, UNMAPPED
from tiers.maptree import FANOUT, FANOUT_BITS, ROOT_LEVEL, read_pages
from tiers.record import Kind

if TYPE_CHECKING:
    from tiers.checkpoint import Checkpointer
    from tiers.engine import Engine
    from tiers.volume import Volume

CHUNK_PAGES = 256
SAMPLE_EVERY = 64
"""Without --full, one leaf page in so many has its data read."""
READ_BLOCKS = 256
MAX_PROBLEMS = 1000

Progress = Callable[[int, int], None]


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


async def check_pool(engine: "Engine", checkpointer: "Checkpointer", *, full: bool, progress: Progress) -> CheckReport:
    """Check a pool that is open. A read-only pool is checked as of its last checkpoint."""
    report = CheckReport(volumes=len(engine.volumes))
    if engine.space.read_only is None:
        await checkpointer.checkpoint()
    await checkpointer.hold()
    try:
        leaves = await _Walk(engine, report).run()
        for problem in await checkpointer.copies.verify():
            report.problem(problem)
    finally:
        checkpointer.let_go()
    await _check_data(engine, leaves, report, full=full, progress=progress)
    return report


class _Walk:
    """One walk over all map pages of a pool."""

    def __init__(self, engine: "Engine", report: CheckReport) -> None:
        self._engine = engine
        self._report = report
        self._live: dict[int, int] = defaultdict(int)
        self._seen: dict[int, Any] = {}
        self._expected = {segment.id: segment.live for segment in engine.segments.by_id.values()}
        self._leaves: list[tuple[Volume, list[int]]] = []

    async def run(self) -> "list[tuple[Volume, list[int]]]":
        """Walk, compare, and return the leaf pages of each volume."""
        roots = [(volume, volume.tree.root, volume.tree.mapped_blocks) for volume in self._engine.volumes.values()]
        dead = list(self._engine.dead.items())
        self._check_segments()
        for volume, root, mapped in roots:
            leaves: list[int] = []
            found = await self._subtree(volume.name, [(root[0], root[1], 0)], ROOT_LEVEL, leaves) if root[0] else 0
            waiting = any(volume_id == volume.id for _, (_, _, volume_id) in dead)
            if found != mapped and not waiting:
                self._report.problem(f"{volume.name}: the catalog counts {mapped} mapped blocks, its map has {found}")
            self._report.blocks_mapped += found
            self._leaves.append((volume, leaves))
        for address, (check, level, _) in dead:
            await self._subtree("a deleted range", [(address, check, 0)], level, [])
        for segment_id, live in self._expected.items():
            if live != self._live.get(segment_id, 0):
                self._report.problem(
                    f"segment {segment_id}: {live} blocks are counted as live, "
                    f"{self._live.get(segment_id, 0)} are mapped"
                )
        return self._leaves

    def _check_segments(self) -> None:
        """The segment table must partition each device, and a free place must not be in use."""
        places: set[tuple[int, int]] = set()
        for segment in self._engine.segments.by_id.values():
            place = (segment.device.index, segment.index)
            if place in places:
                self._report.problem(f"{segment.device.path}: two segments claim place {segment.index}")
            places.add(place)
            if segment.damaged:
                self._report.problem(
                    f"{segment.device.path} at {segment.base}: segment {segment.id} has a damaged header and "
                    f"can't be cleaned"
                )
        for device in self._engine.devices:
            for index in device.free:
                if (device.index, index) in places:
                    self._report.problem(f"{device.path}: place {index} is free and in use")
            if len(device.free) + sum(1 for d, _ in places if d == device.index) != device.segment_count:
                self._report.problem(f"{device.path}: some segments are neither free nor in use")
            if device.poisoned:
                self._report.problem(f"{device.path} is poisoned: {device.poisoned}")

    async def _subtree(self, name: str, entries: list[tuple[int, int, int]], level: int, leaves: list[int]) -> int:
        """Check pages (address, check, index) and all below; return how many data blocks they map."""
        mapped = 0
        for start in range(0, len(entries), CHUNK_PAGES):
            part = entries[start : start + CHUNK_PAGES]
            await self._place(np.array([address for address, _, _ in part], np.uint64), Kind.MAP, name)
            below: list[tuple[int, int, int]] = []
            data: list[Any] = []
            for (_, _, index), page in zip(part, await self._read(name, level, part), strict=True):
                if page is None:
                    continue
                self._report.pages_checked += 1
                words = np.frombuffer(page, np.uint64)
                addresses = words[:FANOUT]
                used = np.flatnonzero(addresses)
                if level == 0:
                    data.append(addresses[used])
                    mapped += len(used)
                    leaves.append(index)
                else:
                    below += [
                        (int(words[slot]), int(words[FANOUT + slot]), index << FANOUT_BITS | slot)
                        for slot in used.tolist()
                    ]
            if data:
                await self._place(np.concatenate(data), None, name)
            await trio.lowlevel.checkpoint()
            if below:
                mapped += await self._subtree(name, below, level - 1, leaves)
        return mapped

    async def _read(self, name: str, level: int, part: list[tuple[int, int, int]]) -> list[Any]:
        pages: list[Any] = []
        try:
            return list(
                await read_pages(self._engine.segments, [(a, c) for a, c, _ in part], f"of {name}, level {level}")
            )
        except OSError:
            for address, check, index in part:
                try:
                    pages += await read_pages(
                        self._engine.segments, [(address, check)], f"of {name}, level {level}, index {index}"
                    )
                except OSError as error:
                    self._report.problem(str(error))
                    pages.append(None)
        return pages

    async def _place(self, addresses: Any, kind: Kind | None, name: str) -> None:
        """Count addresses by segment; each must lie in the written part of one of the right kind, and be unique."""
        in_order = np.sort(addresses[addresses >= FIRST_ADDRESS])
        ids, starts = np.unique(in_order >> np.uint64(24), return_index=True)
        ends = np.append(starts[1:], len(in_order))
        for n, (segment_id, start, end) in enumerate(zip(ids.tolist(), starts.tolist(), ends.tolist(), strict=True)):
            if n % 64 == 63:
                await trio.lowlevel.checkpoint()
            slots = (in_order[start:end] & np.uint64(0xFFFFFF)).astype(np.int64)
            self._live[segment_id] += len(slots)
            segment = self._engine.segments.by_id.get(segment_id)
            if segment is None:
                self._report.problem(
                    f"{name}: {len(slots)} entries point into segment {segment_id}, which is not in use"
                )
                continue
            if (segment.kind is Kind.MAP) != (kind is Kind.MAP) or segment.kind is Kind.CATALOG:
                self._report.problem(f"{name}: entries point into segment {segment_id}, which holds something else")
            if int(slots[0]) < 1 or int(slots[-1]) >= segment.used:
                self._report.problem(f"{name}: entries point past what was written of segment {segment_id}")
                continue
            seen = self._seen.setdefault(segment_id, np.zeros(segment.slots, bool))
            if seen[slots].any() or (slots[1:] == slots[:-1]).any():
                self._report.problem(f"{name}: two map entries share a place in segment {segment_id}")
            seen[slots] = True


async def _check_data(
    engine: "Engine", leaves: "list[tuple[Volume, list[int]]]", report: CheckReport, *, full: bool, progress: Progress
) -> None:
    """Read blocks the way clients do and let the checks speak."""
    chosen = [
        (volume, index)
        for volume, indices in leaves
        for index in (sorted(indices) if full else sorted(indices)[::SAMPLE_EVERY])
    ]
    total = len(chosen) * FANOUT * BLOCK_BYTES
    into = memoryview(bytearray(READ_BLOCKS * BLOCK_BYTES))
    for done, (volume, index) in enumerate(chosen):
        progress(done * FANOUT * BLOCK_BYTES, total)
        if volume.deleted:
            continue
        try:
            addresses, _ = await volume.entries(index << FANOUT_BITS, FANOUT)
            for first, count in _mapped_runs(addresses):
                start = (index << FANOUT_BITS) + first << BLOCK_SHIFT
                try:
                    await volume.read(start, count << BLOCK_SHIFT, into[: count << BLOCK_SHIFT])
                except OSError:
                    await _name_bad_blocks(volume, start, count, report)
                report.bytes_checked += count << BLOCK_SHIFT
        except OSError as error:
            report.problem(str(error))
    progress(total, total)


def _mapped_runs(addresses: list[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for i, address in enumerate(addresses):
        if address != UNMAPPED:
            if runs and runs[-1][0] + runs[-1][1] == i:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((i, 1))
    return runs


async def _name_bad_blocks(volume: "Volume", start: int, count: int, report: CheckReport) -> None:
    into = memoryview(bytearray(BLOCK_BYTES))
    for offset in range(start, start + (count << BLOCK_SHIFT), BLOCK_BYTES):
        try:
            await volume.read(offset, BLOCK_BYTES, into)
        except OSError as error:
            report.problem(str(error))
