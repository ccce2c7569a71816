"""Proof that the simulation can fail: it catches every planted bug, on seeds on which the engine as it is passes.

For each mutant of `mutants.py` there is a scenario, a function of a seed that raises when the promise is broken: the
random search of the oracle where that finds the bug soon, else a machine on which the bug has more to do. The scenario
is run with the mutant planted over a range of seeds until it raises, and what it raises must be a verdict (of the
oracle, of the engine's own assertions, or an error that the engine has no reason for), not a crash of the mutant's own
making. Each of these seeds must pass without the mutant, or else the catch would mean nothing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import trio

from tests.simulation.corruption import (
    ONE,
    QUIET,
    TWO,
    Scene,
    cleaning_damage,
    idle,
    log_damage,
    move_everything,
    require,
    rest_damage,
)
from tests.simulation.machine import Disk, Machine, PowerCutError
from tests.simulation.mutants import MUTANTS, PLANTS
from tests.simulation.oracle import BLOCK, Op, OracleError, read_all, require_sound
from tests.simulation.versions import Versions
from tests.simulation.workload import LAYOUTS, Run, search
from tests.tiers.test_bypass import crash_in_a_stream
from tests.tiers.test_early_reuse import crowded, lives
from tests.tiers.test_evacuate import crash_while_evacuating, lose_a_device
from tests.tiers.test_marks import follow_a_stream, set_during_a_checkpoint
from tests.tiers.test_promotion import write_among_promotions
from tests.tiers.test_rebuild_simulated import lose_catalog
from tiers import Policy, Pool, TierError, Volume
from tiers.frames import frame_of
from tiers.layout import LABEL_AREA_BYTES
from tiers.mover import Mover
from tiers.record import Kind, decode_segment_header
from tiers.segments import Segment

SEEDS = 40
"""A mutant that survives so many is not caught."""

TWINS = (Disk("fast", 24, 64 << 10), Disk("fast", 24, 64 << 10))
"""The log goes from one to the other all the time."""

# -- scenarios ---------------------------------------------------------------------------------------------------------


def storm(seed: int) -> Scene:
    """Writes, flushes, checkpoints and moves all at once, on a machine that soon loses its power, again and again.

    Unlike the random search it does little else, so that most crashes fall into a flush, a checkpoint or a move.
    """
    rng = random.Random(seed)
    scene = Scene(seed, disks=rng.choice((*LAYOUTS, TWINS)), blocks=96)
    scene.machine.pauses = rng.choice((2, 6, 12))
    scene.machine.cold_share = rng.choice((0.0, 0.3))

    async def flusher(volume: Volume) -> None:
        while True:
            await _yield(rng.randrange(1, 12))
            mark = scene.model.mark
            await volume.flush()
            scene.model.flushed(mark)

    async def checkpointer(pool: Pool) -> None:
        while True:
            await _yield(rng.randrange(1, 60))
            mark = scene.model.mark
            await pool.checkpoint()
            scene.model.flushed(mark)

    async def mover(pool: Pool) -> None:
        own = Mover(pool._engine)  # the cleaner uses another meanwhile
        while True:
            await _yield(rng.randrange(1, 100))
            await _move_some(pool, own, rng)

    async def main() -> None:
        for life in range(5):
            with contextlib.suppress(PowerCutError):
                async with scene.opened() as (pool, volume):
                    scene.machine.countdown = rng.randrange(1, 250)
                    async with trio.open_nursery() as nursery:
                        if rng.random() < 0.8:
                            nursery.start_soon(flusher, volume)
                        if rng.random() < 0.8:
                            nursery.start_soon(checkpointer, pool)
                        if rng.random() < 0.5:
                            nursery.start_soon(mover, pool)
                        for _ in range(80):
                            await scene.operation(volume)
                            await _yield(rng.randrange(6))
                        nursery.cancel_scope.cancel()
                    scene.machine.countdown = None
                    await scene.crash()
            scene.machine.countdown = None
            scene.restart(power_cut=rng.random() < (0.8 if life % 2 else 0.4))
        async with scene.opened():
            pass

    scene.machine.run(main)
    return scene


async def _yield(times: int) -> None:
    for _ in range(times):
        await trio.lowlevel.checkpoint()


async def _move_some(pool: Pool, mover: Mover, rng: random.Random) -> None:
    """Relocate a few sealed data segments, through the cleaner's own operations."""
    segments = pool._engine.segments.by_id
    victims = [
        segment
        for segment in segments.values()
        if not segment.open and segment.kind is not Kind.MAP and segment.live + segment.pending
    ]
    for victim in rng.sample(victims, min(3, len(victims))):
        if segments.get(victim.id) is victim:
            await mover.move_segment(victim, rng.choice(("fast", "base")))
    await mover.apply_staged()


def kill_then_power_cut(seed: int) -> None:
    """The daemon dies with much in the page cache; the next one has hardly opened the pool when the power goes."""
    scene = Scene(seed, disks=4 * (Disk("fast", 14, 64 << 10),), blocks=64)

    async def main() -> None:
        for _ in range(3):
            async with scene.opened() as (_, volume):
                for _ in range(15):
                    await scene.operation(volume)
                await scene.crash()
            scene.restart(power_cut=False)
            async with scene.opened(judge=False) as (_, volume):
                scene.model.judge(await read_all(volume), everything=True)
                await scene.crash()
            scene.restart(power_cut=True)
        async with scene.opened():
            pass

    scene.machine.run(main)


def late_flush(seed: int) -> None:
    """A flush comes while a sync runs that began before the last write; when it returns, the power goes."""
    rng = random.Random(seed)
    scene = Scene(seed, blocks=64)
    scene.machine.pauses = 12

    async def main() -> None:
        for _ in range(4):
            async with scene.opened() as (_, volume):
                async with trio.open_nursery() as nursery:
                    await scene.operation(volume)
                    nursery.start_soon(volume.flush)
                    await _yield(rng.randrange(12))
                    await scene.operation(volume)
                    await volume.flush()
                    scene.model.flushed(scene.model.mark)
                await scene.crash()
            scene.restart(power_cut=True)
        async with scene.opened():
            pass

    scene.machine.run(main)


def repeated_write(seed: int) -> None:
    """A client repeats, after a power cut, the write that was lost in it; what came after that stays lost."""
    scene = Scene(seed, blocks=16)
    lost, kept = [(0, scene.data(BLOCK))], [(BLOCK, scene.data(BLOCK))]

    async def main() -> None:
        async with scene.opened() as (_, volume):
            for _ in range(scene.rng.randrange(1, 4)):
                await scene.operation(volume, whole=True)
            await volume.flush()
            scene.model.flushed(scene.model.mark)
            for changes in (lost, kept):
                require(volume.write_now(changes), "a write has to wait for nothing")
                scene.model.returned(Op("write", changes))
            await scene.crash()
        scene.restart(power_cut=True)
        for _ in range(2):
            async with scene.opened(judge=False) as (_, volume):
                # Without `check`, whose checkpoint would burn a sequence.
                scene.model.judge(await read_all(volume), everything=False)
                require(volume.write_now(lost), "a write has to wait for nothing")
                scene.model.returned(Op("repeated write", lost))
                await volume.flush()
                scene.model.flushed(scene.model.mark)
                await scene.crash()
            scene.restart(power_cut=True)
        async with scene.opened():
            pass

    scene.machine.run(main)


def failed_sync(seed: int) -> None:
    """A sync fails once. No later flush may succeed in this life, and no later life may write."""
    rng = random.Random(seed)
    scene = Scene(seed, disks=rng.choice((ONE, TWO)), blocks=64)

    async def main() -> None:
        async with scene.opened() as (_, volume):
            at = rng.randrange(20)
            has_failed = False
            for i in range(30):
                with contextlib.suppress(TierError):
                    await scene.operation(volume, whole=True)
                scene.model.in_flight = None
                if i == at:
                    scene.machine.media[0].failing_syncs = 1
                if rng.random() < 0.4:
                    mark = scene.model.mark
                    is_dirty = bool(scene.machine.media[0].unsynced)
                    try:
                        await volume.flush()
                    except TierError:
                        has_failed = True
                    else:
                        scene.model.flushed(mark)
                        require(not (i >= at and is_dirty and not has_failed), "a flush whose sync failed succeeded")
            await scene.crash()
        scene.restart(power_cut=True)
        async with scene.opened() as (pool, _):
            require(not has_failed or pool.status().state == "read-only", "a restart lifted the poison")

    scene.machine.run(main)


def forgotten_pages(seed: int) -> None:
    """The kernel dropped what it couldn't write, and nobody was told; then the daemon dies, and later the power."""
    scene = Scene(seed, blocks=64)

    async def main() -> None:
        async with scene.opened() as (_, volume):
            for i in range(20):
                await scene.operation(volume, whole=True)
                if i == 9:
                    await volume.flush()
                    scene.model.flushed(scene.model.mark)
            for medium in scene.machine.media:
                medium.drop_dirty(scene.rng.randrange(len(medium.unsynced) + 1))
            await scene.crash()
        for power_cut in (False, True):
            scene.restart(power_cut=power_cut)
            scene.everything = False
            async with scene.opened() as (_, volume):
                scene.model.flushed(scene.model.mark)
                await scene.crash()

    scene.machine.run(main)


def refused_writes(seed: int) -> None:
    """Devices take some of a write and refuse the rest: it never happened, and what comes after it does."""
    rng = random.Random(seed)
    scene = Scene(seed, blocks=64)
    share = 0.0

    def fail(offset: int, length: int) -> tuple[int, int] | None:
        if rng.random() > share:
            return None
        return rng.choice((errno.EIO, errno.ENOSPC, 0)), rng.choice((0, rng.randrange(length // 512 + 1) * 512, length))

    async def main() -> None:
        nonlocal share
        for medium in scene.machine.media:
            medium.on_write = fail
        for _ in range(4):
            async with scene.opened() as (pool, volume):
                share = 0.1
                for _ in range(30):
                    offset, length = scene.range(whole=True)
                    op = Op("write", [(offset, scene.data(length))])
                    scene.model.in_flight = op
                    try:
                        if not volume.write_now(op.changes):
                            await volume.write(*op.changes[0])
                    except TierError:
                        scene.model.in_flight = None
                        # It may have gone in more than one batch. Unless a flush follows, a crash may leave all of it.
                        part = [(offset, await _part(volume, scene, op))]
                        scene.model.returned(Op("a refused write", part, attempted=op.changes))
                        await scene.compare(volume, 0, scene.size)
                        if rng.random() < 0.7:
                            share = 0.0
                            with contextlib.suppress(TierError):
                                await volume.flush()
                                scene.model.flushed(scene.model.mark)
                            share = 0.1
                    else:
                        scene.model.in_flight = None
                        scene.model.returned(op)
                share = 0.0
                is_read_only = pool.status().state == "read-only"  # its checkpoints failed again and again
                try:
                    await volume.flush()
                    scene.model.flushed(scene.model.mark)
                except TierError:
                    require(is_read_only, "a pool that takes writes does not flush them")
                await scene.crash()
            scene.restart(power_cut=rng.random() < 0.5)
            scene.everything = scene.everything and not is_read_only
        async with scene.opened():
            pass

    scene.machine.run(main)


async def _part(volume: Volume, scene: Scene, op: Op) -> bytes:
    """What a refused write has left in its range: each block old or new."""
    ((offset, data),) = op.changes
    into = bytearray(len(data))
    await volume.read(offset, len(into), memoryview(into))
    for at in range(0, len(data), BLOCK):
        old = scene.model.content[offset + at : offset + at + BLOCK]
        require(into[at : at + BLOCK] in (old, data[at : at + BLOCK]), "a refused write left neither old nor new bytes")
    return bytes(into)


def old_catalog(seed: int) -> None:
    """The catalog is restored from a backup that is a few checkpoints old."""
    rng = random.Random(seed)
    scene = Scene(seed, disks=rng.choice((ONE, TWO)), blocks=64)

    async def main() -> None:
        backups = []
        async with scene.opened() as (pool, volume):
            for _ in range(rng.randrange(2, 6)):
                for _ in range(rng.randrange(1, 8)):
                    await scene.operation(volume)
                await pool.checkpoint()
                backups.append(scene.machine.state)
            await scene.operation(volume)
        newest, scene.machine.state = scene.machine.state, rng.choice(backups[:-1])
        try:
            async with scene.opened():
                pass
        except TierError as error:
            if error.errno != errno.ESTALE:
                raise
        else:
            raise OracleError("a catalog older than its devices was accepted")
        scene.machine.state = newest
        async with scene.opened():
            pass

    scene.machine.run(main)


def unique_ids(seed: int) -> None:
    """A segment's id stands for one place, for ever."""
    scene = Scene(seed, disks=TWO, blocks=96)
    places: dict[int, tuple[int, int, str]] = {}

    def note(pool: Pool) -> None:
        for segment in pool._engine.segments.by_id.values():
            place = (segment.device.index, segment.index, segment.kind.name)
            require(
                places.setdefault(segment.id, place) == place,
                f"segment {segment.id} was {places[segment.id]}, is {place}",
            )

    async def main() -> None:
        for _ in range(4):
            async with scene.opened() as (pool, volume):
                for i in range(60):
                    await scene.operation(volume)
                    if i % 10 == 9:
                        await pool.checkpoint()
                    note(pool)
                await scene.crash()
            scene.restart(power_cut=True)

    scene.machine.run(main)


def slow_readers(seed: int) -> None:
    """Readers whose device takes its time, while what they read is overwritten, checkpointed and reused."""
    rng = random.Random(seed)
    scene = Scene(seed, disks=(Disk("fast", 90, 64 << 10),), blocks=300)
    scene.machine.cold_share = 1.0

    async def slow(offset: int, length: int) -> None:
        if rng.random() < 0.3:
            await trio.sleep(rng.random())

    async def reader(volume: Volume) -> None:
        while True:
            volume.tree.forget()  # as a small cache does
            at = rng.randrange(300)
            mark = scene.model.mark
            allowed = [bytes(scene.model.content[at * BLOCK : (at + 1) * BLOCK])]
            watchers.append((at, allowed))
            into = bytearray(BLOCK)
            await volume.read(at * BLOCK, BLOCK, memoryview(into))
            watchers.remove((at, allowed))
            require(bytes(into) in allowed, f"block {at}: read what it never held since {mark}")

    watchers: list[tuple[int, list[bytes]]] = []

    async def main() -> None:
        async with scene.opened() as (pool, volume):
            for at in range(0, 300, 20):
                await _write(scene, volume, at, 20)
            await idle(pool)
            scene.machine.media[0].before_read = slow
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(reader, volume)
                for _ in range(12):
                    for _ in range(rng.randrange(1, 4)):
                        at = rng.randrange(290)
                        await _write(scene, volume, at, 10)
                        for block, allowed in watchers:
                            allowed.append(bytes(scene.model.content[block * BLOCK : (block + 1) * BLOCK]))
                    await trio.sleep(rng.random() * 0.2)
                    await pool.checkpoint()
                nursery.cancel_scope.cancel()

    scene.machine.run(main)


async def _write(scene: Scene, volume: Volume, at: int, count: int) -> None:
    op = Op("write", [(at * BLOCK, scene.data(count * BLOCK))])
    await volume.write(*op.changes[0])
    scene.model.returned(op)


def mended_in_time(seed: int) -> None:
    """A damaged block is overwritten while somebody reads it: the reader gets the new bytes."""
    scene = Scene(seed, blocks=16)
    (medium,) = scene.machine.media

    async def main() -> None:
        async with scene.opened() as (pool, volume):
            at = scene.rng.randrange(16)
            await _write(scene, volume, at, 1)
            await pool.checkpoint()
            (address,), _ = await volume.entries(at, 1)
            medium.flip(volume._segments[address >> 24].offset(address & 0xFFFFFF) + scene.rng.randrange(BLOCK))
            reads = 0

            async def overwrite(offset: int, length: int) -> None:
                nonlocal reads
                reads += 1
                if reads == 2:  # the one past the page cache
                    await _write(scene, volume, at, 1)

            medium.before_read = overwrite
            into = bytearray(BLOCK)
            await volume.read(at * BLOCK, BLOCK, memoryview(into))
            require(reads >= 2, "nobody looked past the page cache")
            require(into == scene.model.content[at * BLOCK : (at + 1) * BLOCK], "the reader got other bytes")

    scene.machine.run(main)


def moves(seed: int) -> None:
    """Blocks move while they are overwritten, and the machine stops at any step of it."""
    rng = random.Random(seed)
    scene = Scene(seed, disks=TWO, blocks=128)
    scene.machine.pauses = rng.choice((0, 3, 8))

    async def writer(volume: Volume) -> None:
        for _ in range(rng.randrange(10)):
            await _yield(rng.randrange(30))
            await scene.operation(volume)

    async def main() -> None:
        for _ in range(4):
            with contextlib.suppress(PowerCutError):
                async with scene.opened() as (pool, volume):
                    for i in range(20):
                        await scene.operation(volume)
                        if i in (7, 14):
                            await pool.checkpoint()
                    await volume.flush()
                    scene.model.flushed(scene.model.mark)
                    scene.machine.countdown = rng.randrange(3, 60)
                    for destination in ("base", "fast"):
                        async with trio.open_nursery() as nursery:
                            nursery.start_soon(writer, volume)
                            await move_everything(pool, destination)
                    for _ in range(rng.randrange(20)):
                        await scene.operation(volume)
                    scene.machine.countdown = None
                    await scene.crash()
            scene.machine.countdown = None
            scene.restart(power_cut=rng.random() < 0.7)
        async with scene.opened():
            pass

    scene.machine.run(main)


def misread(seed: int) -> None:
    """The cleaner gets wrong bytes from a device that has the right ones: it has to look again."""
    scene = Scene(seed, disks=TWO, blocks=96)

    async def main() -> None:
        async with scene.opened() as (pool, volume):
            for i in range(30):
                await scene.operation(volume)
                if i % 10 == 9:
                    await pool.checkpoint()
            blocks = [at for at in range(96) if (volume.entry_now(at) or (0, 0))[0] > 1]
            for at in scene.rng.sample(blocks, 5):
                address, _ = volume.entry_now(at) or (0, 0)
                segment = volume._segments[address >> 24]
                medium = scene.machine.media[segment.device.index]
                offset = segment.offset(address & 0xFFFFFF)
                medium.lost.add(offset // 512)  # the cache says one thing, the medium another
                medium.durable[offset : offset + 512] = medium.cache[offset : offset + 512]
                medium.cache[offset] ^= 1
            await move_everything(pool, "base")
            await scene.compare(volume, 0, scene.size)

    scene.machine.run(main)


def full_pool(seed: int) -> None:
    """A pool is filled to the brim; overwrites, trims and checkpoints go on in it."""
    rng = random.Random(seed)
    scene = Scene(
        seed, disks=(Disk("fast", 40, 512 << 10),), blocks=5000, settings=replace(QUIET, overlay_entries=2048)
    )
    scene.machine.pauses = 0

    async def main() -> None:
        async with scene.opened() as (pool, volume):
            written = 0
            for count in (64, 8, 1):
                with pytest.raises(TierError) as caught, trio.fail_after(1000):
                    while True:
                        await _write(scene, volume, written, count)
                        written += count
                require(caught.value.errno == errno.ENOSPC, f"a full pool said: {caught.value}")
            with trio.fail_after(1000):
                for _ in range(300):
                    await _write(scene, volume, rng.randrange(written), 1)
                await volume.trim(0, written // 2 * BLOCK)
                scene.model.returned(Op("trim", [(0, bytes(written // 2 * BLOCK))]))
                await idle(pool)
                await _write(scene, volume, 0, 16)
            await scene.compare(volume, 0, scene.size)
            await require_sound(pool)

    scene.machine.run(main)


def merges(seed: int) -> None:
    """Many clients write parts of the same few blocks at once: no part is lost."""
    rng = random.Random(seed)
    scene = Scene(seed, blocks=8)
    scene.machine.cold_share = 0.7
    scene.machine.pauses = 5

    async def main() -> None:
        async with scene.opened() as (pool, volume):
            await _write(scene, volume, 0, 8)
            await pool.checkpoint()
            expected = bytearray(scene.model.content)
            starts = rng.sample(range(0, 8 * BLOCK, 512), 24)
            async with trio.open_nursery() as nursery:
                for start in starts:
                    data = scene.data(512)
                    expected[start : start + 512] = data
                    nursery.start_soon(volume.write, start, data)
            require(await read_all(volume) == expected, "of writes to parts of one block some were lost")

    scene.machine.run(main)


def resizes(seed: int) -> None:
    """A volume shrinks and grows: what was cut off is zeros."""
    scene = Scene(seed, blocks=64)

    async def main() -> None:
        for _ in range(3):
            async with scene.opened() as (pool, volume):
                for _ in range(4):
                    await _write(scene, volume, 0, 64)
                    for size in (scene.rng.randrange(1, 60 * 8) * 512, scene.size):
                        await pool.resize_volume("v", size)
                        op = Op(f"resize to {size}", size=size)
                        scene.model.returned(op)
                        scene.model.flushed(scene.model.mark)
                    await scene.compare(volume, 0, scene.size)
                await scene.crash()
            scene.restart(power_cut=True)
        async with scene.opened():
            pass

    scene.machine.run(main)


def huge_trims(seed: int) -> None:
    """Whole subtrees are cut off and given back in slices, with crashes between and within."""
    rng = random.Random(seed)
    machine = Machine((Disk("fast", 60),), seed=seed, settings=QUIET)

    async def main() -> None:
        with contextlib.suppress(PowerCutError):
            async with machine.open() as pool:
                volume = await pool.create_volume("big", 1 << 40)
                keep = await pool.create_volume("keep", 1 << 20)
                for i in range(24):
                    await volume.write(i * (8 << 30), bytes([i + 1]) * BLOCK)
                await keep.write(0, b"k" * (20 * BLOCK))
                await idle(pool)
                await volume.trim(0, 1 << 40)
                await volume.flush()
                machine.countdown = rng.randrange(20, 120)
                await pool.checkpoint()
                machine.countdown = None
                machine.stop()
                await trio.lowlevel.checkpoint()
        for _ in range(3):
            machine.countdown = None
            machine.power_cut()
            with contextlib.suppress(PowerCutError):
                async with machine.open() as pool:
                    await require_sound(pool)
                    machine.countdown = rng.randrange(1, 60)
                    await pool.checkpoint()
                    machine.countdown = None
                    machine.stop()
                    await trio.lowlevel.checkpoint()
        machine.countdown = None
        machine.power_cut()
        async with machine.open() as pool:
            with trio.fail_after(100):
                while pool._engine.dead:
                    await pool.checkpoint()
            await idle(pool)
            await require_sound(pool)
            used = pool.status().used_bytes
            require(used == 20 * BLOCK, f"{used} bytes are in use, and 20 blocks are there")

    with (
        mock.patch("tiers.checkpoint.DEAD_PAGES_A_CHECKPOINT", 3),
        mock.patch("tiers.merge.CHUNK_PAGES", 3),
    ):
        machine.run(main)


def policies(seed: int) -> None:
    """A volume gets another policy whenever a sync begins, so too late for that; and soon the power goes."""
    rng = random.Random(seed)
    scene = Scene(seed, disks=rng.choice(LAYOUTS), blocks=32)
    scene.machine.pauses = 6
    defined = {name: Policy(name) for name in ("a", "b", "c")}
    model = scene.model
    begun = trio.Event()
    commits = 0

    def step(kind: str) -> None:
        nonlocal commits
        if kind == "sync":
            begun.set()
        if kind == "commit":
            commits -= 1
            if commits == 0:
                scene.machine.countdown = rng.randrange(1, 4)

    async def checkpointer(pool: Pool) -> None:
        while True:
            await _yield(rng.randrange(1, 30))
            await pool.checkpoint()

    async def main() -> None:
        nonlocal begun, commits
        for _ in range(6):
            with contextlib.suppress(PowerCutError):
                async with scene.opened() as (pool, volume):
                    pool.define_policies(defined)
                    commits = rng.randrange(1, 10)
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(checkpointer, pool)
                        while True:
                            begun = trio.Event()
                            await begun.wait()
                            await scene.operation(volume)
                            policy = rng.choice(("", *defined))
                            op = model.in_flight = Op(f"policy {policy!r}", policy=policy)
                            mark = model.mark
                            await pool.set_policy("v", policy)
                            model.in_flight = None
                            model.returned(op)
                            model.flushed(mark + 1)
            scene.machine.countdown = None
            scene.restart(power_cut=rng.random() < 0.8)

    scene.machine.on_step = step
    scene.machine.run(main)


def frames(seed: int) -> None:
    """Volumes of text whose blocks are packed, overwritten, packed again and unpacked, with crashes in between.

    Then some of the frames rot, in a bit or two: a read gives what was written, or EIO in those frames.
    """
    rng = random.Random(seed)
    scene = Scene(seed, disks=(Disk("fast", 32, 512 << 10), Disk("base", 32)), blocks=160)
    scene.is_text = True

    async def pack(pool: Pool, destination: str) -> None:
        pool._engine.log.roll()
        await move_everything(pool, destination)

    async def main() -> None:
        for _ in range(3):
            async with scene.opened() as (pool, volume):
                for _ in range(12):
                    await scene.operation(volume, whole=True)
                await pack(pool, "base")
                for _ in range(rng.randrange(8)):
                    await scene.operation(volume, whole=True)
                if rng.random() < 0.4:
                    await pool.checkpoint()
                if rng.random() < 0.6:
                    await pack(pool, rng.choice(("base", "base", "fast")))
                await volume.flush()
                scene.model.flushed(scene.model.mark)
                await scene.crash()
            scene.restart(power_cut=rng.random() < 0.5)
        async with scene.opened() as (pool, volume):
            await pack(pool, "base")
            await idle(pool)
            hit: set[int] = set()
            packed = []
            for block in range(160):
                entry = volume.entry_now(block)
                if entry is not None and entry[0] > 1 and volume._segments[entry[0] >> 24].kind is Kind.PACKED:
                    packed.append(entry[0])
            for address in rng.sample(packed, min(3, len(packed))):
                segment = volume._segments[address >> 24]
                offset, length = segment.place(address)
                for _ in range(rng.randrange(1, 3)):
                    scene.machine.media[segment.device.index].flip(offset + rng.randrange(length), rng.randrange(8))
                hit.add(frame_of(address))
            pool._engine.frames.clear()
            for block in rng.sample(range(160), 160):
                right = scene.model.content[block * BLOCK : (block + 1) * BLOCK]
                entry = volume.entry_now(block)
                slow, fast = bytearray(BLOCK), bytearray(BLOCK)
                try:
                    await volume.read(block * BLOCK, BLOCK, memoryview(slow))
                except TierError:
                    require(entry and frame_of(entry[0]) in hit, f"block {block} is lost, and was not hit")
                else:
                    require(slow == right, f"a read of block {block} returned other bytes than were written")
                if volume.read_now(block * BLOCK, BLOCK, memoryview(fast)):
                    require(fast == right, f"a fast read of block {block} returned other bytes than were written")

    scene.machine.run(main)


def refusing_search(seed: int) -> None:
    """The random search, with devices that refuse writes, and fail in other ways."""
    search(seed, "faults")


def followed(seed: int) -> None:
    """The random search, with somebody who follows what changes."""
    search(seed, "marks")


def early_reuse(seed: int) -> None:
    """A pool so full that the cleaner's victims are reused before a checkpoint shows them empty, and then a crash."""
    lives(*crowded(seed), count=5)


def early_reuse_without_a_copy(seed: int) -> None:
    """Victims are emptied while the copies of the catalog are behind, and then the catalog is lost.

    They were written after the checkpoint of the last copy, whose log leads through them.
    """
    rng = random.Random(seed)
    scene = Scene(seed, disks=(Disk("fast", 160, 64 << 10),), blocks=64)
    machine = scene.machine
    (medium,), (row,) = machine.media, machine.state.devices
    refuses = False

    def refuse_copies(offset: int, length: int) -> tuple[int, int] | None:
        base = offset - (offset - LABEL_AREA_BYTES) % row.segment_bytes
        if not refuses or offset < LABEL_AREA_BYTES or offset == base:
            return None
        header = decode_segment_header(medium.cache[base : base + BLOCK], machine.state.pool_uuid)
        return (errno.EIO, 0) if header.kind is Kind.CATALOG else None

    medium.on_write = refuse_copies

    async def main() -> None:
        nonlocal refuses
        async with scene.opened() as (pool, volume):
            for _ in range(rng.randrange(20)):
                await scene.operation(volume, whole=True)
            await idle(pool)
            segments = pool._engine.segments
            first_id = segments.next_id
            victims: list[Segment] = []
            while len(victims) < 3:
                await scene.operation(volume, whole=True)
                victims = [segment for i, segment in segments.by_id.items() if i >= first_id and not segment.open]
            refuses = True
            try:
                await pool.checkpoint()
            except TierError:
                pass
            else:
                raise OracleError("a checkpoint without a copy on the devices succeeded")
            for victim in victims:
                if segments.by_id.get(victim.id) is victim:
                    await pool._cleaner.mover.move_segment(victim, "fast")
            await pool._cleaner.mover.apply_staged()
            await pool._engine.reuse(victims)
            for _ in range(rng.randrange(3, 12)):
                await scene.operation(volume, whole=True)
            await volume.flush()
            scene.model.flushed(scene.model.mark)
            await scene.crash()
        refuses = False
        scene.restart(power_cut=rng.random() < 0.5)
        await lose_catalog(machine)
        async with scene.opened():
            pass

    machine.run(main)


def programs(seed: int) -> None:
    """Snapshots, clones and rollbacks, one step after another."""
    Versions.live(seed, 60)


def given_up(seed: int) -> None:
    """The same, with blocks that are given up."""
    Versions.live(seed, 60, loses=True)


def lost(seed: int) -> None:
    """The random search, with blocks that are given up."""
    search(seed, "lost")


def slow_deletions(seed: int) -> None:
    """Snapshots are deleted leaf by leaf, while what they keep is overwritten again."""
    versions = Versions(seed, base=False)
    versions.kinds = ["write"] * 4 + ["snapshot", "drop", "checkpoint"]
    with mock.patch("tiers.merge.DELETED_LEAVES", 1):
        versions.machine.run(lambda: versions.run(80))


def moves_in_history(seed: int) -> None:
    """What snapshots keep is moved, its place is used again before a checkpoint knows, and then there is a crash."""
    versions = Versions(seed, narrow=True)
    versions.machine.settings = replace(versions.machine.settings, map_cache_bytes=seed % 2 << 20)
    versions.kinds = ["write"] * 6 + ["clean"] * 3 + ["snapshot", "drop", "checkpoint"]
    versions.machine.run(lambda: versions.run(120))


def histories(seed: int) -> None:
    """The random search, with snapshots and what comes of them."""
    search(seed, "versions")


def crash_at_the_end(seed: int) -> None:
    """A crash while a device that was emptied is removed."""
    crash_while_evacuating(seed + 1, ending=True)


# -- who is caught by what ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What catches a mutant: a scenario, from this seed on, with a verdict of one of these kinds."""

    scenario: Callable[[int], Any]
    first_seed: int = 0
    kinds: tuple[type[BaseException], ...] = (OracleError,)


READ_ERROR = (OracleError, TierError)
"""An error that the engine has no reason for is a verdict too: each scenario knows the errors that are due."""
VERDICT = (OracleError, TierError, AssertionError)

CASES: dict[str, Case] = {
    "a checkpoint that commits without a flush": Case(storm, 0, READ_ERROR),
    "a checkpoint that records the log's position of the commit, not of the freeze": Case(storm, 0, READ_ERROR),
    "a recovery that does not sync before it commits": Case(kill_then_power_cut, 0, READ_ERROR),
    "a recovery that goes on in the half-used segment of an earlier life": Case(repeated_write, 0, READ_ERROR),
    "a volume flush that returns at once": Case(storm, 0, READ_ERROR),
    "a flush that is answered by the sync that was running when it came": Case(late_flush, 0, READ_ERROR),
    "a flush that syncs one device of several": Case(storm, 3, READ_ERROR),
    "a flush that needs the fast devices only": Case(storm, 0, READ_ERROR),
    "a move whose flush is a client's": Case(moves, 8, READ_ERROR),
    "a flush that takes its sequence when the sync has ended": Case(storm, 2, READ_ERROR),
    "a disk whose sync does nothing": Case(search, 0, VERDICT),
    "a volume that is created before it is durable": Case(search, 56),
    "a failed sync that is tried again": Case(failed_sync),
    "a failed sync that fails its flush and is then forgotten": Case(failed_sync),
    "a poison that only this life remembers": Case(failed_sync),
    "a replay that believes the page cache": Case(forgotten_pages, 0, READ_ERROR),
    "a replay that takes any damage for the end of the log": Case(log_damage),
    "a replay that checks a torn batch's header only": Case(storm, 0, READ_ERROR),
    "a replay that ends at damaged data which was durable": Case(log_damage),
    "a failed write whose entries go into the map": Case(refused_writes, 0, READ_ERROR),
    "a log that goes on behind a failed write": Case(refused_writes, 0, READ_ERROR),
    "an older catalog that is accepted": Case(old_catalog, 0, READ_ERROR),
    "a segment that is reused one checkpoint early": Case(storm, 20, READ_ERROR),
    "a segment that is reused under a reader": Case(slow_readers, 0, READ_ERROR),
    "a segment that is reused when its blocks' moves are logged": Case(moves, 1, READ_ERROR),
    "an early reuse without a flush": Case(early_reuse, 0, VERDICT),
    "an early reuse while the copy of the catalog is behind": Case(early_reuse_without_a_copy, 0, VERDICT),
    "a replay that keeps the victim in whose place it meets a segment": Case(early_reuse, 7, VERDICT),
    "a move that is logged before its copies are durable": Case(moves, 8, READ_ERROR),
    "a segment id that is given out twice": Case(unique_ids),
    "a read that gives up without looking the entry up again": Case(mended_in_time, 0, (TierError,)),
    "a fast read that checks nothing": Case(rest_damage),
    "a slow read that checks nothing": Case(rest_damage),
    "a map page that nobody checks": Case(rest_damage, 10),
    "a lost block that is moved as a hole": Case(cleaning_damage),
    "a cleaner that copies what it has not verified": Case(misread, 0, (TierError,)),
    "a slow read of a frame that checks nothing": Case(frames),
    "a fast read of a kept frame that checks nothing": Case(frames),
    "a replay that takes the blocks of frames for blocks in slots": Case(frames, 0, READ_ERROR),
    "a replay that counts the blocks of frames as slots": Case(frames, 0, VERDICT),
    "a reserve that is given away": Case(full_pool, 0, (OracleError, TierError, trio.TooSlowError)),
    "a merge that does not look whether its block has changed": Case(merges),
    "a promotion that does not look whether its block has changed": Case(write_among_promotions),
    "a stream that is made true before it is durable": Case(crash_in_a_stream, 0, READ_ERROR),
    "a merge that ignores what its own batch has staged": Case(search),
    "a move that does not look whether its block has changed": Case(moves),
    "a replay that takes every copy of a move": Case(moves),
    "a shrink that leaves the tail of its last block": Case(resizes),
    "a dead list that is forgotten": Case(huge_trims),
    "a dead list that is walked again": Case(huge_trims, 0, (AssertionError,)),
    "a checkpoint whose failed try has counted already": Case(refusing_search, 0, (AssertionError,)),
    "a device that is wiped before the catalog says that it is removed": Case(crash_at_the_end, 0, READ_ERROR),
    "a device that is removed before the checkpoint that shows it empty": Case(crash_at_the_end, 0, READ_ERROR),
    "a lost map page that reads as a hole": Case(lose_a_device, 0, VERDICT),
    "a block of a lost device that becomes a hole": Case(lose_a_device, 0, VERDICT),
    "an overwritten block that no snapshot keeps": Case(programs, 0, VERDICT),
    "an overwritten block that the oldest snapshot keeps": Case(programs, 0, VERDICT),
    "a kept block that the next overwrite replaces": Case(programs, 0, VERDICT),
    "a snapshot that begins to keep one checkpoint late": Case(histories, 0, VERDICT),
    "a group of snapshots that are taken one after another": Case(histories, 0, VERDICT),
    "a deleted snapshot that keeps what it has to itself": Case(programs, 0, VERDICT),
    "a deleted snapshot whose blocks all live on": Case(programs, 0, VERDICT),
    "a deleted snapshot in whose place the volume's old block is kept": Case(slow_deletions, 0, VERDICT),
    "a snapshot that is deleted under its clone": Case(programs, 3, VERDICT),
    "a hole in a clone that its origin shines through": Case(programs, 0, VERDICT),
    "a clone's snapshot that inherits nothing when the clone takes over": Case(programs, 0, VERDICT),
    "a hidden snapshot that is thinned of what a clone's snapshot inherits": Case(programs, 0, VERDICT),
    "a clone that takes over and isn't remembered as the heir": Case(programs, 0, VERDICT),
    "an heir that a restart forgets": Case(programs, 50, VERDICT),
    "a move that no snapshot's map learns of": Case(programs, 0, VERDICT),
    "a move that the map of a volume with snapshots doesn't learn of": Case(programs, 0, VERDICT),
    "a move in a volume with snapshots that is logged like a write": Case(programs, 0, VERDICT),
    "a replay that ignores moves in volumes with snapshots": Case(moves_in_history, 0, VERDICT),
    "a cached leaf of a snapshot that outlives a commit": Case(programs, 0, VERDICT),
    "a lost page of a snapshot's map that reads as if it kept nothing there": Case(histories, 104, VERDICT),
    "a replay that ignores trims": Case(search),
    "a replay that ignores policies": Case(search),
    "a replay that ignores what is being filled": Case(search),
    "a checkpoint that records the policies of the commit, not of the freeze": Case(policies),
    "a policy that is given before it is durable": Case(policies),
    "a replay that adds nothing to trackers": Case(followed),
    "a replay that takes a stream for blocks that were only moved": Case(follow_a_stream),
    "a stream that no tracker learns of": Case(follow_a_stream),
    "a checkpoint that saves the record of the freeze with the trackers of later": Case(set_during_a_checkpoint),
    "a checkpoint that forgets trackers and record": Case(followed),
    "a record that is given before it is durable": Case(followed),
    "a replay that forgets that a block was lost": Case(lost),
    "a lost block that was nothing before": Case(given_up, 0, VERDICT),
    "a lost block in a clone's origin that is a hole": Case(given_up, 2, VERDICT),
    "a log that rolls without a link": Case(storm, 0, READ_ERROR),
}


@functools.cache
def passes(scenario: Callable[[int], Any], seed: int) -> bool:
    """The engine as it is keeps its promise on this seed (else this raises)."""
    scenario(seed)
    return True


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The engine has much to say about broken machines."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_the_same_seed_gives_the_same_storm() -> None:
    def digest() -> tuple[int, int, int, bytes]:
        scene = storm(5)
        return (
            scene.machine.steps,
            scene.machine.commits,
            scene.machine.state.position.checkpoint_seq,
            bytes(scene.model.content),
        )

    assert digest() == digest()


def test_every_mutant_has_a_case_and_the_rules_are_covered() -> None:
    assert MUTANTS.keys() == CASES.keys()
    assert {str(rule) for rule in range(1, 11)} <= {mutant.rule for mutant in MUTANTS.values()}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_simulation_catches(name: str) -> None:
    case = CASES[name]
    for seed in range(case.first_seed, case.first_seed + SEEDS):
        try:
            with MUTANTS[name].plant():
                case.scenario(seed)
        except case.kinds as verdict:
            print(f"{case.scenario.__name__}({seed}) catches {name}: {type(verdict).__name__}: {verdict}")
            assert passes(case.scenario, seed)
            return
        except BaseException as error:
            error.add_note(f"{case.scenario.__name__}({seed}) with {name}")
            raise
        assert passes(case.scenario, seed)
    pytest.fail(f"{name} survives {case.scenario.__name__} on the seeds from {case.first_seed} on")


@pytest.mark.parametrize("word", PLANTS)
def test_the_random_search_finds(word: str) -> None:
    with PLANTS[word](), pytest.raises((OracleError, TierError, AssertionError)):
        for seed in range(60):
            Run.of(seed).live()
