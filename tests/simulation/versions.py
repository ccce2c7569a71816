"""Random programs over volumes, snapshots and clones on a simulated machine, and the model that judges them.

A volume or snapshot is a list of stamps, one a block; a block holds its stamp, over and over, or zeros for 0. One that
was given up (`Volume.lose`), in programs that do that, has the stamp `LOST`.

One step comes after another here, so the model knows exactly what each version holds, what has changed between two of
them, and how much a deletion gives back; what clients do meanwhile is in the search (`tests.simulation.historian`).
"""

from __future__ import annotations

import contextlib
import copy
import errno
import random
from dataclasses import dataclass, field
from unittest import mock

import trio

from tests.simulation.machine import Disk, Machine, PowerCutError
from tests.simulation.oracle import LOST_PROBLEM, require_sound
from tiers import Pool, PoolSettings, TierError
from tiers.layout import BLOCK_BYTES
from tiers.merge import DELETED_LEAVES
from tiers.mover import Mover
from tiers.pool import SNAPSHOT_ROOM_SLOTS
from tiers.reader import Reader
from tiers.record import Kind
from tiers.snapshot import DIFF_CONTEXT, Snapshot

Stamps = list[int]
LOST = -1
"""Reading is an error until it is written."""


def block_of(stamp: int) -> bytes:
    """A block's bytes."""
    return stamp.to_bytes(8, "little") * (BLOCK_BYTES // 8)


@dataclass
class Line:
    """A volume that clients see, and its snapshots."""

    stamps: Stamps
    snapshots: dict[str, Stamps] = field(default_factory=dict)


async def read_stamps(reader: Reader) -> Stamps:
    """The whole of a volume or snapshot. Asserts that each block is one stamp, over and over."""
    into = bytearray(reader.size_bytes)
    stamps: Stamps = []
    lost: set[int] = set()
    try:
        await reader.read(0, len(into), memoryview(into))
    except TierError as error:
        if error.errno != errno.EIO:
            raise
        for at in range(0, len(into), BLOCK_BYTES):
            try:
                await reader.read(at, BLOCK_BYTES, memoryview(into)[at : at + BLOCK_BYTES])
            except TierError:
                lost.add(at)
    for at in range(0, len(into), BLOCK_BYTES):
        if at in lost:
            stamps.append(LOST)
            continue
        stamp = int.from_bytes(into[at : at + 8], "little")
        assert into[at : at + BLOCK_BYTES] == block_of(stamp), f"block {at // BLOCK_BYTES} of {reader.name} is torn"
        stamps.append(stamp)
    return stamps


class Versions:
    """A program that runs, crashes now and then, and is compared with its model."""

    def __init__(self, seed: int, *, base: bool = True, small: bool = True, narrow: bool = False) -> None:
        self.rng = random.Random(seed)
        self.blocks = 40 if narrow else 700
        self.most_lines, self.most_snapshots = (2, 3) if narrow else (6, 100)
        disks = (Disk("fast", 40, 256 << 10), Disk("base", 60, 256 << 10)) if base else (Disk("fast", 80, 256 << 10),)
        if narrow:
            disks = (Disk("fast", 64, 64 << 10),)
        self.machine = Machine(
            disks,
            seed=seed,
            settings=PoolSettings(
                overlay_entries=2048, unsynced_cap_bytes=1 << 20, small_volume_leaves=8192 if small else 0
            ),
        )
        self.lines: dict[str, Line] = {}
        self.known = "(?!)"
        """Problems that a check may find."""
        self.found_lost = 0
        """Blocks that were lost where they had to be, all comparisons together."""
        self.stamp = 0
        self.names = 0
        self.crashes = 0
        self.kinds = ["write"] * 8 + ["trim"] * 2 + ["snapshot"] * 3 + ["drop"] * 2 + ["checkpoint"] * 2 + ["clean"] * 2
        self.kinds += ["clone", "rollback", "delete", "group", "rename", "settle", "evacuate", "promote"]
        self.kinds += ["resize", "diff", "diff", "free"]
        """What the steps are drawn from."""
        self.seen: list[str] = []
        self.before: dict[str, Line] | None = None
        """What was before the step that a crash may have come in."""

    def give_up(self) -> None:
        """Let blocks be given up, too."""
        self.kinds += ["lose"] * 4
        self.known = LOST_PROBLEM

    @staticmethod
    def live(seed: int, steps: int, *, loses: bool = False) -> Versions:
        """The program of a seed: on one device or on two tiers, with small overlays or without.

        Every fifth has little room, so that all places are soon used again; in every fifth what is deleted goes leaf by
        leaf.
        """
        versions = Versions(seed, base=seed % 3 != 0, small=seed % 4 != 0, narrow=seed % 5 == 3)
        if loses:
            versions.give_up()
        with mock.patch("tiers.merge.DELETED_LEAVES", 1 if seed % 5 == 4 else DELETED_LEAVES):
            versions.machine.run(lambda: versions.run(steps))
        return versions

    @property
    def torn(self) -> bool:
        """Whether the last step may have happened in part."""
        return self.seen[-1] in ("write", "trim", "lose")

    def name(self, prefix: str) -> str:
        self.names += 1
        return f"{prefix}{self.names}"

    async def run(self, steps: int) -> None:
        """So many steps, with a crash after every few dozen, and a comparison of everything after each crash."""
        left = steps
        while left > 0:
            flushed = False
            with contextlib.suppress(PowerCutError):
                async with self.machine.open() as pool:
                    await self.judge(pool)
                    for _ in range(min(left, self.rng.randrange(5, 40))):
                        left -= 1
                        await self.step(pool)
                        if self.rng.random() < 0.1:
                            await self.compare(pool)
                    if self.rng.random() < 0.4:
                        await self.compare(pool)  # which takes a checkpoint, so that there is little to replay
                    if self.rng.random() < 0.5:
                        flushed = True
                        for volume in pool.volumes():
                            await volume.flush()
                    if flushed and self.rng.random() < 0.7:
                        await self.crash_within(pool)
                    if self.rng.random() < 0.8:
                        self.machine.stop()
                        await trio.lowlevel.checkpoint()
            self.crashes += 1
            if flushed:
                self.machine.power_cut()
            else:
                self.machine.kill()
        async with self.machine.open() as pool:
            await self.judge(pool)
            await self.empty(pool)

    async def crash_within(self, pool: Pool) -> None:
        """A step in which the machine goes down, wherever it is by then; or the step is done before."""
        self.before = copy.deepcopy(self.lines)
        self.machine.countdown = self.rng.randrange(1, self.rng.choice((10, 40, 150)))
        try:
            await self.step(pool)
        except OSError:
            if not self.machine.is_off:
                raise
        finally:
            self.machine.countdown = None

    async def judge(self, pool: Pool) -> None:
        """After a crash: the step that it came in has happened, or hasn't; of a write, any of its blocks have."""
        before, self.before = self.before, None
        if before is not None:
            after = self.lines
            names = {volume.short_name for volume in pool.volumes()}
            snapshots = {name: {s.short_name for s in pool.snapshots(name)} for name in names}
            for lines in (after, before):
                if names == set(lines) and all(snapshots[name] == set(lines[name].snapshots) for name in names):
                    self.lines = lines
                    break
            else:
                raise AssertionError(f"{snapshots} is neither what was before the crash nor what was to come")
            other = before if self.lines is after else after
            for name, line in self.lines.items():
                found = await read_stamps(pool.volume(name))
                was = other[name].stamps if name in other else line.stamps
                if self.torn:
                    for block, (stamp, one, two) in enumerate(zip(found, line.stamps, was, strict=True)):
                        assert stamp in (one, two), f"{name}: block {block} has {stamp}, and may have {one} or {two}"
                elif found != line.stamps:
                    assert found == was, f"{name} is neither what it was nor what it was to be"
                line.stamps = found
        await self.compare(pool)

    async def step(self, pool: Pool) -> None:
        """One operation."""
        kind = self.rng.choice(self.kinds) if self.lines else "create"
        self.seen.append(kind)
        with contextlib.suppress(TierError) if kind in ("clean", "evacuate") else contextlib.nullcontext():
            await getattr(self, f"do_{kind}")(pool)

    def any_line(self) -> str:
        return self.rng.choice(sorted(self.lines))

    def any_snapshot(self) -> tuple[str, str] | None:
        found = [(name, snap) for name, line in sorted(self.lines.items()) for snap in sorted(line.snapshots)]
        return self.rng.choice(found) if found else None

    async def do_create(self, pool: Pool) -> None:
        name = self.name("v")
        self.lines[name] = Line([0] * self.blocks)
        await pool.create_volume(name, self.blocks * BLOCK_BYTES)

    async def do_write(self, pool: Pool) -> None:
        name = self.any_line()
        stamps = self.lines[name].stamps
        volume = pool.volume(name)
        for _ in range(self.rng.randrange(1, 6) if self.before is None else 1):
            at = self.rng.randrange(len(stamps))
            count = min(self.rng.choice((1, 1, 2, 17, 40)), len(stamps) - at)
            self.stamp += 1
            stamp = 0 if self.rng.random() < 0.1 else self.stamp
            stamps[at : at + count] = [stamp] * count
            await volume.write(at * BLOCK_BYTES, block_of(stamp) * count)

    async def do_trim(self, pool: Pool) -> None:
        name = self.any_line()
        stamps = self.lines[name].stamps
        at = self.rng.choice((0, self.rng.randrange(len(stamps))))
        count = min(self.rng.choice((1, 30, 300, len(stamps))), len(stamps) - at)
        stamps[at : at + count] = [0] * count
        await pool.volume(name).trim(at * BLOCK_BYTES, count * BLOCK_BYTES)

    async def do_lose(self, pool: Pool) -> None:
        name = self.any_line()
        stamps = self.lines[name].stamps
        at = self.rng.randrange(len(stamps))
        count = min(self.rng.choice((1, 1, 2, 17)), len(stamps) - at)
        stamps[at : at + count] = [LOST] * count
        await pool.volume(name).lose(at * BLOCK_BYTES, count * BLOCK_BYTES)

    async def do_resize(self, pool: Pool) -> None:
        name = self.any_line()
        stamps = self.lines[name].stamps
        count = self.rng.randrange(1, self.blocks * 3 // 2)
        stamps[:] = (stamps + [0] * count)[:count]
        await pool.resize_volume(name, count * BLOCK_BYTES)

    def has_room(self, pool: Pool, count: int) -> bool:
        """Whether so many snapshots may be taken."""
        room = pool._engine.space.available >= SNAPSHOT_ROOM_SLOTS * count
        return room and len(pool.snapshots()) < self.most_snapshots

    async def do_snapshot(self, pool: Pool) -> None:
        if not self.has_room(pool, 1):
            await self.do_drop(pool)
            return
        name = self.any_line()
        snap = self.name("s")
        self.lines[name].snapshots[snap] = list(self.lines[name].stamps)
        await pool.take_snapshots([(name, snap)])

    async def do_group(self, pool: Pool) -> None:
        if not self.has_room(pool, len(self.lines)):
            return
        snap = self.name("g")
        for line in self.lines.values():
            line.snapshots[snap] = list(line.stamps)
        await pool.take_snapshots([(name, snap) for name in self.lines])

    async def do_drop(self, pool: Pool) -> None:
        found = self.any_snapshot()
        if found is not None:
            del self.lines[found[0]].snapshots[found[1]]
            await pool.delete_snapshot(*found)

    async def do_free(self, pool: Pool) -> None:
        """Delete a snapshot: exactly what it was said to have alone comes back."""
        found = self.any_snapshot()
        if found is None:
            return
        await self.settle(pool)
        engine = pool._engine
        name, snap = found
        status = next(s for s in await pool.snapshot_status(name) if s.snapshot == snap)
        # What is hidden for its sake, or only one clone needs from now on, may go as well.
        more = any(snapshot.state == "hidden" for snapshot in engine.lineage.snapshots.values())
        more = more or bool(engine.lineage.clones_of(pool.snapshot(name, snap)))
        before = engine.segments.live
        del self.lines[name].snapshots[snap]
        await pool.delete_snapshot(name, snap)
        await self.settle(pool)
        freed = (before - engine.segments.live) * BLOCK_BYTES
        assert freed == status.exclusive_bytes or (more and freed > status.exclusive_bytes), (
            f"{status.name} had {status.exclusive_bytes} bytes of its own, and gave back {freed}"
        )

    async def settle(self, pool: Pool) -> None:
        """Checkpoints until nothing is on the way: no entry in an overlay, no deleted snapshot, nothing dead."""
        engine = pool._engine
        for _ in range(200):
            await pool.checkpoint()
            deleted = any(snapshot.state == "deleted" for snapshot in engine.lineage.snapshots.values())
            if not (engine.segments.pending or engine.dead or deleted or pool._checkpointer._more_deleted):
                return
        raise AssertionError("deleted snapshots are never sorted out")

    async def do_diff(self, pool: Pool) -> None:
        """Whatever two snapshots of a family have different is told, both ways."""
        names = [name for name, line in sorted(self.lines.items()) if len(line.snapshots) > 1]
        if not names:
            return
        name = self.rng.choice(names)
        snapshots = self.lines[name].snapshots
        one, two = self.rng.sample(sorted(snapshots), 2)
        for old, new in ((one, two), (two, one)):
            snapshot = pool.snapshot(name, new)
            flags = await self.changed(snapshot, old)
            assert len(flags) == len(snapshots[new])
            was = snapshots[old] + [0] * len(flags)
            missed = [i for i, flag in enumerate(flags) if not flag and snapshots[new][i] != was[i]]
            assert not missed, f"{snapshot.name} since {old}: blocks {missed[:5]} have changed, and it isn't told"

    async def changed(self, snapshot: Snapshot, since: str) -> list[int]:
        """The flag of each block, asked for in pieces."""
        flags: list[int] = []
        while len(flags) * BLOCK_BYTES < snapshot.size_bytes:
            at = len(flags) * BLOCK_BYTES
            length = min(self.rng.choice((snapshot.size_bytes, 100 * BLOCK_BYTES)), snapshot.size_bytes - at)
            extents = await snapshot.context_extents(DIFF_CONTEXT + since, at, length, self.rng.choice((1, 3, 1000)))
            assert extents, "a difference without an end"
            for size, flag in extents:
                flags += [flag] * (size // BLOCK_BYTES)
        return flags

    async def do_rename(self, pool: Pool) -> None:
        found = self.any_snapshot()
        if found is not None:
            new = self.name("r")
            snapshots = self.lines[found[0]].snapshots
            snapshots[new] = snapshots.pop(found[1])
            await pool.change_snapshot(*found, new_name=new)

    async def do_clone(self, pool: Pool) -> None:
        found = self.any_snapshot()
        if found is not None and len(self.lines) < self.most_lines:
            new = self.name("c")
            self.lines[new] = Line(list(self.lines[found[0]].snapshots[found[1]]))
            await pool.clone(*found, new)

    async def do_rollback(self, pool: Pool) -> None:
        found = self.any_snapshot()
        if found is not None:
            line = self.lines[found[0]]
            keep = self.name("k") if self.rng.random() < 0.5 and self.has_room(pool, 1) else None
            if keep is not None:
                line.snapshots[keep] = list(line.stamps)
            line.stamps = list(line.snapshots[found[1]])
            await pool.rollback(*found, keep_as=keep)

    async def do_promote(self, pool: Pool) -> None:
        for volume in pool.volumes():
            if volume.origin is not None and not volume.snapshots:
                try:
                    await pool.promote(volume.short_name)
                except TierError as error:
                    # What it has of its origin is lost, and can't be copied.
                    if error.errno != errno.EIO or LOST not in self.lines[volume.short_name].stamps:
                        raise
                    return
                assert volume.origin is None
                return

    async def do_delete(self, pool: Pool) -> None:
        if len(self.lines) > 1:
            name = self.any_line()
            del self.lines[name]
            await pool.delete_volume(name, snapshots=True)

    async def do_checkpoint(self, pool: Pool) -> None:
        await pool.checkpoint()

    async def do_settle(self, pool: Pool) -> None:
        for _ in range(4):
            await pool.checkpoint()

    async def do_clean(self, pool: Pool) -> None:
        """Empty a few segments, as the cleaner would; sometimes their places are given out at once."""
        engine = pool._engine
        mover = Mover(engine)  # of its own: the cleaner's is the cleaner's
        victims = [
            s for s in engine.segments.by_id.values() if not s.open and s.kind.name in ("LOG", "MOVED", "PACKED")
        ]
        self.rng.shuffle(victims)
        emptied = []
        for victim in victims[:3]:
            if engine.segments.by_id.get(victim.id) is victim and not victim.pins:
                mover.unresolved.clear()
                await mover.move_segment(victim, self.rng.choice(("fast", "base")))
                if not victim.given_out and not victim.damaged:
                    emptied.append(victim)
        await mover.apply_staged()
        mover.seal_all()
        if self.rng.random() < 0.5:
            await engine.reuse([victim for victim in emptied if victim.id not in mover.unresolved])

    async def do_evacuate(self, pool: Pool) -> None:
        """Have all live pages of some map segment written elsewhere."""
        engine = pool._engine
        segments = [s for s in engine.segments.by_id.values() if s.kind is Kind.MAP and not s.open]
        if segments:
            await pool._cleaner._force_pages(self.rng.choice(segments))
            await pool.checkpoint()

    async def compare(self, pool: Pool) -> None:
        """Every version reads as the model has it, in full, and the pool is sound."""
        assert sorted(volume.short_name for volume in pool.volumes()) == sorted(self.lines)
        for name, line in self.lines.items():
            found = await read_stamps(pool.volume(name))
            assert found == line.stamps, _difference(name, found, line.stamps)
            assert sorted(s.short_name for s in pool.snapshots(name)) == sorted(line.snapshots)
            for snap, stamps in line.snapshots.items():
                snapshot = pool.snapshot(name, snap)
                assert snapshot.name == f"sim/{name}@{snap}"
                found = await read_stamps(snapshot)
                assert found == stamps, _difference(snapshot.name, found, stamps)
        await require_sound(pool, known=self.known)
        for name, line in self.lines.items():
            seen = sum(stamp > 0 for stamp in line.stamps)
            told = pool.volume(name).shown_blocks
            # What a long trim took counts until it is sorted out, in snapshots and clones of that time for ever.
            assert told >= seen, f"{name} has data in {seen} blocks, and says {told}"
        if self.known != "(?!)":
            await self.compare_list(pool)

    async def compare_list(self, pool: Pool) -> None:
        """The list of what is lost, which a check has just made, has what was given up, and nothing else.

        What several versions share is on it once, with the one whose map names it.
        """
        listed: dict[str, set[int]] = {}
        for loss in await pool.losses():
            first, end = loss.offset // BLOCK_BYTES, (loss.offset + loss.length) // BLOCK_BYTES
            listed.setdefault(loss.volume, set()).update(range(first, end))
        everywhere = set().union(*listed.values())
        for name, line in self.lines.items():
            for full, stamps in [(name, line.stamps), *((f"{name}@{s}", c) for s, c in line.snapshots.items())]:
                lost = {block for block, stamp in enumerate(stamps) if stamp == LOST}
                own = listed.get(f"sim/{full}", set())
                assert own <= lost <= everywhere, f"{full}: {sorted(own)} are listed as lost, {sorted(lost)} are"
                self.found_lost += len(lost)

    async def empty(self, pool: Pool) -> None:
        """Delete everything, in any order: nothing is left, and nothing is counted."""
        names = sorted(self.lines)
        self.rng.shuffle(names)
        for name in names:
            del self.lines[name]
            await pool.delete_volume(name, snapshots=True)
            await self.compare(pool)
        for _ in range(400):
            await pool.checkpoint()
            if not pool._checkpointer.needed():
                break
        assert not pool._engine.volumes
        assert not pool._engine.lineage.snapshots
        assert pool._engine.segments.live == 0
        assert pool._engine.segments.pending == 0
        await require_sound(pool)


def _difference(name: str, found: Stamps, wanted: Stamps) -> str:
    wrong = [(i, a, b) for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b]
    return f"{name}: {len(wrong)} blocks differ, (block, found, wanted): {wrong[:5]}"
