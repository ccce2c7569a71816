"""Damage on a simulated machine: bytes that rot, land elsewhere, never arrive, are stale, or can't be read.

The promise (docs/durability.md, 2): a read gives the bytes that were written last, or EIO, and EIO only for what the
damage hit. So every kind of damage tells which places (device, offset of a block) it has hit, and `Scene.scan` reads
each block of the volume on its own, compares it with the model, and asks of each EIO whether the block, or a map page
on the way to it, lies in such a place.

Everything is a function of the seed. A scenario returns when the promise was kept, else it raises OracleError (or the
engine's own error, where the engine had no reason for one).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import random
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import trio

from tests.simulation.machine import Disk, Machine, PowerCutError
from tests.simulation.medium import SECTOR, Medium
from tests.simulation.oracle import BLOCK, LOST_PROBLEM, Model, Op, OracleError, read_all, require_sound
from tiers import Pool, PoolSettings, TierError, Volume
from tiers.layout import BAD, LABEL_AREA_BYTES, SLOT_BITS
from tiers.maptree import FANOUT_BITS, FANOUT_MASK, ROOT_LEVEL
from tiers.mover import Mover
from tiers.record import BadRecordError, Batch, Kind, decode_batch, decode_segment_header, peek_header_slots
from tiers.segments import Segment

QUIET = PoolSettings(checkpoint_interval_s=1e6, overlay_entries=4096, unsynced_cap_bytes=8 << 20)
"""No checkpoint unless somebody asks."""

ONE = (Disk("fast", 48),)
TWO = (Disk("fast", 32), Disk("base", 32))

EIGHT_LETTERS = bytes(b"etaoinsh"[i % 8] for i in range(256))

Place = tuple[int, int]
"""(device, offset): where a block of 4 KiB lies."""


def require(what_is_true: object, else_: str) -> None:
    """Raise OracleError unless it is."""
    if not what_is_true:
        raise OracleError(else_)


class Scene:
    """A machine with one volume `v`, a model of it, and the places that were hit by damage."""

    def __init__(
        self, seed: int, *, disks: Sequence[Disk] = ONE, blocks: int = 160, settings: PoolSettings = QUIET
    ) -> None:
        self.rng = random.Random(seed ^ 0x5CE2E)
        self.machine = Machine(disks, seed=seed, settings=settings)
        self.is_text = seed % 3 == 0
        self.size = blocks * BLOCK
        self.model = Model(self.size)
        self.everything = True
        self.created = False
        self.hit: set[Place] = set()
        """Places whose bytes are not what was written there last."""
        self.unreadable: set[Place] = set()
        self._fresh: dict[Place, set[int]] = {}
        """Sectors of places that were hit which were written since."""
        self.was_hit: set[int] = set()
        """Blocks whose data lay in a place when it was hit: the cleaner may have marked them BAD since."""
        self.page_was_hit = False
        self.history: list[bytes] = []
        """What the devices held at some moment, for stale sectors."""
        self.neighbour = b""
        """What a second volume `w` holds, which no damage of this scene hits."""
        for device, medium in enumerate(self.machine.media):
            medium.on_write = functools.partial(self._written, device)
            medium.on_read = functools.partial(self._about_to_read, device)

    def _written(self, device: int, offset: int, length: int) -> None:
        """What is written over is good again, once all of its sectors are: the parts of a write may meet in a block."""
        if not self.hit:
            return
        for sector in range(-(-offset // SECTOR), (offset + length) // SECTOR):
            place = device, sector * SECTOR // BLOCK * BLOCK
            if place in self.hit:
                fresh = self._fresh.setdefault(place, set())
                fresh.add(sector)
                if len(fresh) == BLOCK // SECTOR:
                    self.hit.discard(place)
                    self.unreadable.discard(place)
                    del self._fresh[place]

    def _about_to_read(self, device: int, offset: int, length: int) -> int | None:
        if self.unreadable:
            for at in range(offset // BLOCK * BLOCK, offset + length, BLOCK):
                if (device, at) in self.unreadable:
                    return errno.EIO
        return None

    # -- lives ---------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def opened(self, *, truncate_log: bool = False, judge: bool = True) -> AsyncIterator[tuple[Pool, Volume]]:
        """The pool, after the oracle has judged what it holds."""
        async with self.machine.open(truncate_log=truncate_log) as pool:
            if not self.created:
                await pool.create_volume("v", self.size)
                self.created = True
            elif judge:
                await self.judge(pool)
            yield pool, pool.volume("v")

    async def judge(self, pool: Pool) -> None:
        """What a crash has left must be allowed, and the pool sound."""
        volume = pool.volume("v")
        self.model.judge(await read_all(volume), everything=self.everything, policy=volume.policy_name)
        self.everything = True
        if pool.status().state == "online":
            await self.require_sound(pool)

    async def require_sound(self, pool: Pool) -> None:
        """The check finds nothing; but what reads past a sector that can't be read says so, wanted or not."""
        await require_sound(pool, known=r" at byte \d+: .*Input/output error" if self.unreadable else "(?!)")

    async def crash(self) -> None:
        """The machine stops here."""
        self.machine.stop()
        await trio.lowlevel.checkpoint()

    def restart(self, *, power_cut: bool) -> None:
        """The power comes back, or the process is started again."""
        self.everything = not power_cut
        if power_cut:
            self.machine.power_cut()
        else:
            self.machine.kill()

    # -- load ----------------------------------------------------------------------------------------------------------

    def data(self, length: int) -> bytes:
        """Bytes that nobody has written before; in every third scene such that they are packed on the base tier."""
        data = self.rng.randbytes(length)
        return data.translate(EIGHT_LETTERS) if self.is_text else data

    def range(self, *, whole: bool = False) -> tuple[int, int]:
        """A random (offset, length), more often in the first quarter of the volume."""
        rng = self.rng
        length = rng.choice((700, BLOCK, BLOCK, 2 * BLOCK, 3 * BLOCK + 5, 9 * BLOCK, 24 * BLOCK))
        offset = rng.randrange(self.size if rng.random() < 0.5 else self.size // 4)
        if whole or rng.random() < 0.7:
            offset -= offset % BLOCK
        if whole:
            length = max(BLOCK, length // BLOCK * BLOCK)
        return offset, min(length, self.size - offset)

    async def operation(self, volume: Volume, *, whole: bool = False) -> None:
        """One write, batch of writes, trim, zeroing or read; the model learns of it in the same breath.

        `whole`: whole blocks only, and no reads, so that damage to other blocks can't fail it.
        """
        kind = self.rng.choices(("now", "write", "trim", "zeroes", "read"), (30, 30, 8, 6, 0 if whole else 10))[0]
        ranges = [self.range(whole=whole) for _ in range(self.rng.randrange(1, 4) if kind == "now" else 1)]
        (offset, length) = ranges[0]
        if kind == "read":
            await self.compare(volume, offset, length)
            return
        if kind in ("now", "write"):
            op = Op(kind, [(offset, self.data(length)) for offset, length in ranges])
        elif kind == "trim":
            start, end = -(-offset // BLOCK) * BLOCK, offset + length
            end = end if end == self.size else end // BLOCK * BLOCK
            op = Op(kind, [(start, bytes(max(0, end - start)))])
        else:
            op = Op(kind, [(offset, bytes(length))])
        op.what = f"{kind} {[(at, len(data)) for at, data in op.changes]}"
        self.model.in_flight = op
        if kind == "now" and not volume.write_now(op.changes):
            for at, data in op.changes:
                one = self.model.in_flight = Op(f"write {at}+{len(data)}", [(at, data)])
                await volume.write(at, data)
                self.model.in_flight = None
                self.model.returned(one)
            return
        if kind == "write":
            await volume.write(*op.changes[0])
        elif kind == "trim":
            await volume.trim(offset, length)
        elif kind == "zeroes":
            await volume.write_zeroes(offset, length, no_hole=self.rng.random() < 0.5)
        self.model.in_flight = None
        self.model.returned(op)

    async def compare(self, volume: Volume, offset: int, length: int) -> None:
        """A read returns what was written last."""
        into = bytearray(length)
        await volume.read(offset, length, memoryview(into))
        require(into == self.model.content[offset : offset + length], f"a read at {offset} returned other bytes")

    # -- damage --------------------------------------------------------------------------------------------------------

    async def scan(self, volume: Volume) -> dict[int, set[Place]]:
        """Read each block on its own, fast and slow: right, or EIO because of a hit.

        Returns the blocks with EIO, and for each the hit places on the way to it; none if it was moved as BAD.
        """
        lost: dict[int, set[Place]] = {}
        volume._engine.frames.clear()  # what was unpacked before the damage is right
        for block in range(self.size // BLOCK):
            right = self.model.content[block * BLOCK : (block + 1) * BLOCK]
            fast, slow = bytearray(BLOCK), bytearray(BLOCK)
            with contextlib.suppress(OSError):
                if volume.read_now(block * BLOCK, BLOCK, memoryview(fast)):
                    require(fast == right, f"block {block}: a fast read returned other bytes than were written")
            try:
                await volume.read(block * BLOCK, BLOCK, memoryview(slow))
            except TierError as error:
                require(error.errno == errno.EIO, f"block {block}: errno {error.errno}")
                lost[block] = await self._hits(volume, block)
                is_bad = block in self.was_hit and volume.entry_now(block) == (BAD, 0)
                require(lost[block] or is_bad, f"block {block} was not hit, but: {error}")
            else:
                require(slow == right, f"block {block}: a read returned other bytes than were written")
        if self.neighbour:
            other = volume._engine.volume_named("w")
            require(other and await read_all(other) == self.neighbour, "another volume has suffered")
        return lost

    async def add_neighbour(self, pool: Pool) -> None:
        """Make the second volume."""
        volume = await pool.create_volume("w", 40 * BLOCK)
        self.neighbour = self.rng.randbytes(40 * BLOCK)
        await volume.write(0, self.neighbour)

    async def _hits(self, volume: Volume, block: int) -> set[Place]:
        pages, data = await path_of(volume, block)
        hits = self.hit.intersection([*pages, *data])
        if hits.intersection(data):
            hits.add(data[0])  # what is damaged in a frame is told by where the frame begins
        return hits

    def remember(self) -> None:
        """Keep what the devices hold now."""
        self.history = [bytes(medium.cache) for medium in self.machine.media]

    def damage(self, place: Place, layout: Layout) -> None:
        """Do something bad to a place."""
        rng = self.rng
        device, offset = place
        medium = self.machine.media[device]
        kind = rng.choice(("rot", "zeroes", "stale", "misdirected", "lost sector", "unreadable"))
        self.hit.add(place)
        self._fresh.pop(place, None)
        self.page_was_hit |= place in layout.pages
        if place in layout.data:
            self.was_hit |= layout.data[place]
        at, length = offset, BLOCK
        if kind in ("rot", "zeroes", "lost sector"):
            at, length = offset + rng.randrange(BLOCK // SECTOR) * SECTOR, SECTOR
        if kind == "unreadable":
            self.unreadable.add(place)
        elif kind == "rot":
            for _ in range(rng.randrange(1, 4)):
                medium.flip(at + rng.randrange(length), rng.randrange(8))
        else:
            new = bytes(length)
            if kind == "misdirected" and layout.data:
                source = rng.choice(sorted(layout.data))
                new = bytes(self.machine.media[source[0]].cache[source[1] : source[1] + length])
            elif kind in ("stale", "lost sector") and self.history:
                new = self.history[device][at : at + length]
            medium.cache[at : at + length] = medium.durable[at : at + length] = new


@dataclass
class Layout:
    """Where things lie at one moment."""

    data: dict[Place, set[int]] = field(default_factory=dict)
    """The blocks of the volume whose data lie in a place: one, or those in a frame."""
    pages: set[Place] = field(default_factory=set)
    other: list[Place] = field(default_factory=list)
    """Headers and dead slots of sealed segments that the checkpoint has passed, and free places."""


def _places(volume: Volume, address: int) -> list[Place]:
    """Where a page or block lies: one place, or those of its frame."""
    segment = volume._segments.get(address >> SLOT_BITS)
    if segment is None:
        return []
    first, count = segment.span(address)
    return [(segment.device.index, segment.offset(slot)) for slot in range(first, first + count)]


async def path_of(volume: Volume, block: int) -> tuple[list[Place], list[Place]]:
    """The map pages on the way to a block, as far as they can be read, and where its data lies."""
    pages: list[Place] = []
    address, _ = volume.tree.root
    for level in range(ROOT_LEVEL, -1, -1):
        places = _places(volume, address)
        if not places:
            break
        pages += places
        index = block >> FANOUT_BITS * (level + 1)
        try:
            page = (await volume.tree.load(level, [index]))[index]
        except OSError:
            return pages, []
        address = page[block >> FANOUT_BITS * level & FANOUT_MASK]
    entry = volume.entry_now(block)
    return pages, _places(volume, entry[0]) if entry is not None else []


def end_of_log(pool: Pool) -> set[Place]:
    """Where the log goes on: if that can't be read, nobody knows whether it ends there, and opening is refused."""
    head = pool._engine.log.head
    return {(head.device.index, head.offset(head.used))} if head.used < head.slots else set()


async def layout_of(pool: Pool, volume: Volume) -> Layout:
    """Where the volume's blocks and pages lie right after a checkpoint."""
    layout = Layout()
    others: set[Place] = set()
    for each in pool.volumes():
        for block in range(each.size_bytes // BLOCK):
            pages, data = await path_of(each, block)
            if each is not volume:
                others.update([*pages, *data])
                continue
            layout.pages.update(pages)
            for place in data:
                layout.data.setdefault(place, set()).add(block)
    # Of a frame that holds something of another volume that one would suffer too.
    layout.data = {place: blocks for place, blocks in layout.data.items() if place not in others}
    engine = pool._engine
    for segment in engine.segments.by_id.values():
        if not segment.open and segment.last_seq < engine.log.checkpoint_seq:
            places = [(segment.device.index, segment.offset(slot)) for slot in range(segment.slots)]
            wanted = others | layout.data.keys() | layout.pages
            layout.other += [place for place in places if place not in wanted]
    for device in engine.devices:
        layout.other += [
            (device.index, device.segment_offset(index) + slot * BLOCK)
            for index in device.free
            for slot in range(device.segment_bytes // BLOCK)
        ]
    return layout


async def move_everything(pool: Pool, destination: str) -> None:
    """Relocate every sealed data segment, through the cleaner's own operations."""
    mover = Mover(pool._engine)  # the cleaner uses its own meanwhile
    segments = pool._engine.segments.by_id
    for victim in list(segments.values()):
        is_wanted = not victim.open and victim.kind is not Kind.MAP and victim.live + victim.pending
        if is_wanted and segments.get(victim.id) is victim:
            await mover.move_segment(victim, destination)
    await mover.apply_staged()
    mover.seal_all()


async def idle(pool: Pool) -> None:
    """Checkpoints until nothing is left to give back."""
    for _ in range(3):
        await pool.checkpoint()


# -- scenarios ---------------------------------------------------------------------------------------------------------


async def _fill(scene: Scene, pool: Pool, volume: Volume) -> Layout:
    """Give the volume a past: written, overwritten, trimmed, checkpointed and moved."""
    rng = scene.rng
    for i in range(60):
        await scene.operation(volume)
        if rng.random() < 0.05:
            await pool.checkpoint()
        if rng.random() < 0.03:
            await move_everything(pool, rng.choice(("fast", "base")))
        if i == 30:
            scene.remember()
    await idle(pool)
    return await layout_of(pool, volume)


def _choose(scene: Scene, layout: Layout, count: int) -> list[Place]:
    """Places to damage: mostly data, some map pages, some where nothing is wanted."""
    rng = scene.rng
    choices = [sorted(layout.data), sorted(layout.pages), layout.other]
    return [rng.choice(rng.choices(choices, (6, 2, 2))[0]) for _ in range(count)]


def _name_of_any(scene: Scene, places: set[Place], text: str) -> bool:
    """Whether a text names the device and the offset of any of these places."""
    named = {(match[1], int(match[2])) for match in re.finditer(r"(/simulated/\w+) at (\d+)", text)}
    return any((scene.machine.media[device].path, offset) in named for device, offset in places)


async def _require_named(scene: Scene, pool: Pool, lost: dict[int, set[Place]]) -> None:
    """The check names each block that reads as EIO, or the place of the damage, and nothing that wasn't hit."""
    report = await pool.check(full=True)
    text = "\n".join(f"{problem}:" for problem in report.problems)
    named = {
        at // BLOCK
        for match in re.finditer(r"sim/v at byte (\d+): (?:the block|(\d+) blocks|)", text)
        for at in range(int(match[1]), int(match[1]) + int(match[2] or 1) * BLOCK, BLOCK)
    }
    for block, places in lost.items():
        require(
            block in named or _name_of_any(scene, places, text),
            f"block {block} reads as EIO and the check does not say so: {report.problems}",
        )
    # What lies below a page that can't be read can't be counted: that is said too.
    uncounted = ("mapped blocks, its map has", "blocks are counted as live") if scene.page_was_hit else ()
    due = scene.hit.union(*lost.values())
    for problem in report.problems:
        is_due = _name_of_any(scene, due, f"{problem}:") or any(part in problem for part in uncounted)
        require(
            is_due or re.search(LOST_PROBLEM, problem) or problem.endswith("a damaged header and can't be cleaned"),
            f"nothing is damaged there, but the check says: {problem}",
        )


def rest_damage(seed: int) -> None:
    """Damage to what a checkpoint has passed: seen while the pool is open, and after it was opened again."""
    rng = random.Random(seed)
    scene = Scene(seed, disks=rng.choice((ONE, TWO)), blocks=330)
    scene.machine.cold_share = rng.choice((0.0, 0.5))

    async def main() -> None:
        async with scene.opened() as (pool, volume):
            await scene.add_neighbour(pool)
            layout = await _fill(scene, pool, volume)
            for place in _choose(scene, layout, rng.randrange(1, 7)):
                scene.damage(place, layout)
            await _require_named(scene, pool, await scene.scan(volume))
            await volume.flush()
            end = rng.choice(("close", "kill", "power cut"))
            if end != "close":
                await scene.crash()
        if end != "close":
            scene.restart(power_cut=end == "power cut")
        async with scene.opened(judge=False) as (pool, volume):
            await _require_named(scene, pool, await scene.scan(volume))

    scene.machine.run(main)


def crash_damage(seed: int) -> Scene:
    """The same, and then more writes and a crash: around the holes there is a prefix of what was written."""
    rng = random.Random(seed)
    scene = Scene(seed, disks=rng.choice((ONE, TWO)), blocks=330)
    scene.machine.cold_share = rng.choice((0.0, 0.5))

    async def main() -> None:
        async with scene.opened() as (pool, volume):
            await scene.add_neighbour(pool)
            layout = await _fill(scene, pool, volume)
            scene.model.flushed(scene.model.mark)
            for place in _choose(scene, layout, rng.randrange(1, 7)):
                scene.damage(place, layout)
            for _ in range(rng.randrange(1, 40)):
                await scene.operation(volume, whole=True)
                if rng.random() < 0.1:
                    mark = scene.model.mark
                    await volume.flush()
                    scene.model.flushed(mark)
            scene.unreadable -= end_of_log(pool)
            await scene.crash()
        scene.restart(power_cut=rng.random() < 0.7)
        async with scene.opened(judge=False) as (pool, volume):
            found, lost = bytearray(scene.size), set()
            scene.machine.cold_share = 0.0  # what a fast read can find is found the first time
            for block in range(scene.size // BLOCK):
                into = memoryview(found)[block * BLOCK : (block + 1) * BLOCK]
                try:
                    # A fast read finds a block of the overlay even where the map page below is damaged.
                    if not volume.read_now(block * BLOCK, BLOCK, into):
                        await volume.read(block * BLOCK, BLOCK, into)
                except TierError:
                    lost.add(block)
            scene.model.judge(bytes(found), everything=scene.everything, unreadable=lost)
            await _require_named(scene, pool, await scene.scan(volume))

    scene.machine.run(main)
    return scene


def cleaning_damage(seed: int) -> None:
    """Damage that the cleaner meets: the block is BAD wherever it goes, pins nothing, and is good when overwritten."""
    rng = random.Random(seed)
    scene = Scene(seed, disks=TWO, blocks=330)
    scene.machine.cold_share = rng.choice((0.0, 0.5))

    async def main() -> None:
        async with scene.opened() as (pool, volume):
            await scene.add_neighbour(pool)
            layout = await _fill(scene, pool, volume)
            victims = [place for place in sorted(layout.data) if not _segment_at(pool, place).open]
            hits = rng.sample(victims, min(len(victims), rng.randrange(1, 7)))
            for place in hits:
                scene.damage(place, layout)
            lost = await scene.scan(volume)
            used = {_segment_at(pool, place).id for place in hits}
            await move_everything(pool, "base")
            after = await scene.scan(volume)
            # Not equal: of a block of zeros that can't be read the check proves that zeros are right.
            require(after.keys() <= lost.keys(), f"cleaning lost more: {sorted(lost)}, now {sorted(after)}")
            await idle(pool)
            left = used & pool._engine.segments.by_id.keys()
            require(not left, f"segments {left} are pinned by what was damaged in them")
            await _require_named(scene, pool, after)
            await volume.flush()
            scene.unreadable -= end_of_log(pool)
            await scene.crash()
        scene.restart(power_cut=rng.random() < 0.5)
        async with scene.opened(judge=False) as (pool, volume):
            again = await scene.scan(volume)
            require(
                again.keys() == after.keys(), f"a restart changed what is lost: {sorted(after)}, now {sorted(again)}"
            )
            for block in again:
                await _refuse_part(volume, block)
                op = Op("mend", [(block * BLOCK, scene.data(BLOCK))])
                await volume.write(*op.changes[0])
                scene.model.returned(op)
            require(not await scene.scan(volume), "a block that was overwritten is still damaged")
            await idle(pool)
            await scene.require_sound(pool)
            scene.unreadable -= end_of_log(pool)
            await scene.crash()
        scene.restart(power_cut=True)
        async with scene.opened():
            pass

    scene.machine.run(main)


def _segment_at(pool: Pool, place: Place) -> Segment:
    device, offset = place
    return next(
        segment
        for segment in pool._engine.segments.by_id.values()
        if segment.device.index == device and segment.base <= offset < segment.base + segment.slots * BLOCK
    )


async def _refuse_part(volume: Volume, block: int) -> None:
    """A write of a part of a lost block can't be merged with anything: EIO, not made-up bytes."""
    try:
        await volume.write(block * BLOCK + 10, b"part")
    except TierError as error:
        require(error.errno == errno.EIO, f"errno {error.errno}")
    else:
        raise OracleError(f"block {block} is lost, and a write of a part of it was taken")


@dataclass
class Logged:
    """A log batch as it stands on a device."""

    medium: Medium
    offset: int
    batch: Batch


def log_batches(machine: Machine) -> list[Logged]:
    """The log batches on the devices that the next open will replay, in order."""
    found: list[Logged] = []
    position = machine.state.position
    for medium, row in zip(machine.media, machine.state.devices, strict=True):
        for start in range(LABEL_AREA_BYTES, medium.size, row.segment_bytes):
            with contextlib.suppress(BadRecordError):
                header = decode_segment_header(medium.cache[start : start + BLOCK], machine.state.pool_uuid)
                if header.kind is Kind.LOG and header.incarnation == position.incarnation:
                    for at in range(start + BLOCK, start + row.segment_bytes, BLOCK):
                        slots = peek_header_slots(medium.cache[at : at + BLOCK])
                        with contextlib.suppress(BadRecordError):
                            raw = medium.cache[at : at + max(1, slots) * BLOCK]
                            slot = (at - start) // BLOCK
                            batch = decode_batch(raw, machine.state.pool_uuid, header.segment_id, slot)
                            found.append(Logged(medium, at, batch))
    found.sort(key=lambda logged: logged.batch.seq)
    return [logged for logged in found if logged.batch.seq > position.checkpoint_seq]


def _count(op: Op) -> int:
    return sum(len(data) for _, data in op.changes) // BLOCK


def _after(state: bytes, op: Op) -> bytes:
    content = bytearray(state)
    op.apply(content)
    return bytes(content)


def map_damage(seed: int) -> int:
    """Damaged map pages, writes below them, and an operator who gives the pages up, with power cuts meanwhile.

    What lay below a page and wasn't written since is EIO, everything else is right; written anew all is sound. Returns
    how many blocks were lost.
    """
    rng = random.Random(seed)
    scene = Scene(seed, disks=rng.choice((ONE, TWO)), blocks=330)
    scene.machine.cold_share = rng.choice((0.0, 0.5))
    lost: set[int] = set()

    async def main() -> None:
        below: dict[Place, set[int]] = {}
        async with scene.opened() as (pool, volume):
            await scene.add_neighbour(pool)
            layout = await _fill(scene, pool, volume)
            scene.model.flushed(scene.model.mark)
            for block in range(scene.size // BLOCK):
                for page in (await path_of(volume, block))[0]:
                    below.setdefault(page, set()).add(block)
            for place in rng.sample(sorted(layout.pages), rng.randrange(1, 3)):
                scene.damage(place, layout)
            may_be_lost = set().union(*(below[place] for place in scene.hit))
            for _ in range(rng.randrange(20)):
                await scene.operation(volume, whole=True)
                if rng.random() < 0.2:
                    mark = scene.model.mark
                    await volume.flush()
                    scene.model.flushed(mark)
            await scene.crash()
        scene.restart(power_cut=rng.random() < 0.7)
        everything = scene.everything
        cuts = rng.randrange(3)
        while True:
            scene.machine.countdown = rng.randrange(1, 120) if cuts else None
            cuts -= cuts > 0
            try:
                async with scene.machine.open(give_up_map=True) as pool:
                    scene.machine.disarm()
                    volume = pool.volume("v")
                    found = bytearray(scene.size)
                    for block in range(scene.size // BLOCK):
                        into = memoryview(found)[block * BLOCK : (block + 1) * BLOCK]
                        try:
                            await volume.read(block * BLOCK, BLOCK, into)
                        except TierError as error:
                            require(error.errno == errno.EIO, f"block {block}: errno {error.errno}")
                            lost.add(block)
                    require(lost <= may_be_lost, f"lost, but not below the damage: {sorted(lost - may_be_lost)}")
                    scene.model.judge(bytes(found), everything=everything, unreadable=lost)
                    require(await read_all(pool.volume("w")) == scene.neighbour, "another volume has suffered")
                    report = await pool.check(full=True)
                    for problem in report.problems:
                        require(re.search(LOST_PROBLEM, problem), f"the pool isn't sound: {problem}")
            except PowerCutError:
                scene.restart(power_cut=True)
            else:
                break
        async with scene.machine.open() as pool:
            volume = pool.volume("v")
            for block in sorted(lost):
                try:
                    await volume.read(block * BLOCK, BLOCK, memoryview(bytearray(BLOCK)))
                except TierError:
                    continue
                raise OracleError(f"block {block} was lost, and is there again")
            for block in range(scene.size // BLOCK):
                await volume.write(block * BLOCK, scene.data(BLOCK))
            await idle(pool)
            await scene.require_sound(pool)

    scene.machine.run(main)
    return len(lost)


def log_damage(seed: int) -> None:
    """One batch of the log rots before it is replayed.

    A header that a later batch proves to have been durable: the pool is refused, and opens with what came before if
    the operator gives up the rest. Its data: EIO for that block alone. What nothing proves is as if torn: the end.
    """
    rng = random.Random(seed)
    scene = Scene(seed, disks=rng.choice((ONE, (Disk("fast", 40, 64 << 10),))), blocks=64)
    history: list[tuple[int, bytes, Op]] = []
    """For each write: the sequence and the state before it, and the write."""

    def judge(found: bytes, seq: int) -> None:
        """The log ended before the batch `seq`: what it held of a longer write may be there."""
        _, state, op = next((s, state, op) for s, state, op in reversed(history) if s < seq)
        model = Model(scene.size)
        model.adopt(state)
        model.in_flight = op
        model.judge(found, everything=False)
        require(found == state or (_count(op) > 1 and found != _after(state, op)), "a damaged batch took effect")

    async def main() -> None:
        async with scene.opened() as (pool, volume):
            for _ in range(rng.randrange(12)):
                await scene.operation(volume, whole=True)
            await idle(pool)
            for _ in range(rng.randrange(4, 30)):
                op = Op("write", [(rng.randrange(60) * BLOCK, scene.data(rng.randrange(1, 4) * BLOCK))])
                history.append((pool._engine.log.seq, bytes(scene.model.content), op))
                require(volume.write_now(op.changes), "a write has to wait for nothing")
                scene.model.returned(op)
                if rng.random() < 0.4:
                    await volume.flush()
            await scene.crash()
        scene.restart(power_cut=False)
        batches = log_batches(scene.machine)
        writes = [logged for logged in batches if logged.batch.checks]
        victim = rng.choice(writes)
        is_header = rng.random() < 0.5
        seq = victim.batch.seq
        proven = max(
            (logged.batch.durable_seq for logged in batches if not is_header or logged is not victim), default=0
        )
        at = 0 if is_header else victim.batch.header_slots + rng.randrange(len(victim.batch.checks))
        place = (scene.machine.media.index(victim.medium), victim.offset + at * BLOCK)
        victim.medium.flip(place[1] + (rng.randrange(104) if is_header else rng.randrange(BLOCK)), rng.randrange(8))
        if is_header and proven > seq - 1:
            for _ in range(2):
                await _require_refusal(scene)
            async with scene.opened(truncate_log=True, judge=False) as (pool, volume):
                judge(await read_all(volume), seq)
                await require_sound(pool)
        elif is_header or proven < seq:
            async with scene.opened(judge=False) as (pool, volume):
                judge(await read_all(volume), seq)
                await require_sound(pool)
        else:
            scene.hit.add(place)
            async with scene.opened(judge=False) as (pool, volume):
                await _require_named(scene, pool, await scene.scan(volume))
                await scene.crash()
            scene.restart(power_cut=True)
            async with scene.opened(judge=False) as (pool, volume):
                await scene.scan(volume)
            return
        async with scene.opened(judge=False) as (pool, volume):
            judge(await read_all(volume), seq)

    scene.machine.run(main)


async def _require_refusal(scene: Scene) -> None:
    try:
        async with scene.machine.open():
            pass
    except TierError as error:
        require(
            error.errno == errno.EIO and "--truncate-log" in str(error),
            f"a damaged log is refused with the repair named, not: {error}",
        )
    else:
        raise OracleError("a log that was damaged in the middle was taken as if it had ended there")


def write_damage(seed: int) -> None:
    """Blocks that land elsewhere, or nowhere, when they are written, while clients, checkpoints and moves go on."""
    rng = random.Random(seed)
    scene = Scene(seed, disks=TWO, blocks=330)
    scene.machine.cold_share = rng.choice((0.0, 0.5))
    layout = Layout()
    share = rng.choice((0.02, 0.1))
    is_on = False
    lands = True

    def misdirect(device: int, medium: Medium) -> None:
        honest = medium.write

        def write(offset: int, data: bytes) -> None:
            whole = range(-(-offset // BLOCK) * BLOCK, offset + len(data) - BLOCK + 1, BLOCK)
            # Not the headers of segments and batches, nor labels: they all begin with a magic number.
            places = [at for at in whole if data[at - offset : at - offset + 3] not in (b"TRC", b"TER")]
            if not is_on or not places or rng.random() > share:
                honest(offset, data)
                return
            at = rng.choice(places)
            honest(offset, data[: at - offset])
            honest(at + BLOCK, data[at - offset + BLOCK :])
            scene.hit.add((device, at))
            if lands and layout.data and rng.random() < 0.5:
                there = rng.choice([*sorted(layout.data), *sorted(layout.pages)])
                target = scene.machine.media[there[0]]
                if target.cache[there[1] : there[1] + 3] != b"TRC":
                    put[there[0]](there[1], data[at - offset : at - offset + BLOCK])
                    scene.hit.add(there)

        medium.write = write  # type: ignore[method-assign]

    put = [medium.write for medium in scene.machine.media]
    for device, medium in enumerate(scene.machine.media):
        misdirect(device, medium)

    async def main() -> None:
        nonlocal is_on, lands, layout
        async with scene.opened() as (pool, volume):
            layout = await _fill(scene, pool, volume)
            scene.page_was_hit = True
            try:
                for _ in range(4):
                    is_on = True
                    for _ in range(rng.randrange(12)):
                        await scene.operation(volume, whole=True)
                    scene.was_hit.update(await scene.scan(volume))
                    if rng.random() < 0.5:
                        # What lands on a block that is yet to be moved would make it BAD before anybody has seen it.
                        lands = False
                        await move_everything(pool, rng.choice(("fast", "base")))
                        lands = True
                    is_on = False
                    lost = await scene.scan(volume)
                    await _require_named(scene, pool, lost)
                await pool.checkpoint()
            except TierError as error:
                # A checkpoint has to change a page that it can't read.
                require(_name_of_any(scene, scene.hit, str(error)), f"nothing is damaged there: {error}")
                scene.was_hit.update(await scene.scan(volume))
                return
            await volume.flush()
            await scene.crash()
        scene.restart(power_cut=rng.random() < 0.5)
        async with scene.opened(judge=False) as (pool, volume):
            await _require_named(scene, pool, await scene.scan(volume))

    scene.machine.run(main)
