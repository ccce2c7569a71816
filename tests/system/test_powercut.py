"""After a power cut at any moment the pool opens from real files, is sound, and holds what was promised.

`writelog.py` records a real pool (real files, real SQLite) under a mixed load, and rebuilds what a crash may have left;
each such image is opened by the real code, checked in full, and judged by the oracle. `POWERCUT_SEED=N` repeats the
choices of a failure (the timing of worker threads stays their own); `POWERCUT_IMAGES=N` tries more images.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio

from tests.simulation.oracle import BLOCK, Model, Op, OracleError, read_all, require_sound
from tests.system.writelog import Committed, Crash, Flushed, Write, WriteLog, catalog_files, crashes, create_small_pool
from tiers import Pool, PoolSettings, TierError
from tiers.flush import Flusher
from tiers.recovery import _LogReader

SEED = int(os.environ.get("POWERCUT_SEED") or random.SystemRandom().randrange(1 << 32))
IMAGES = int(os.environ.get("POWERCUT_IMAGES") or 100)
LIVES = 2
SETTINGS = PoolSettings(
    checkpoint_interval_s=3600.0,
    checkpoint_log_bytes=512 << 10,
    overlay_entries=2048,
    unsynced_cap_bytes=2 << 20,
    map_cache_bytes=1 << 20,
)
CHOICES = ((0.0, 0.0), (0.0, 0.0), (1.0, 0.0), (0.5, 0.0), (0.5, 0.3), (0.9, 0.1), (0.1, 0.1), (0.0, 1.0))
"""(share of the unflushed writes that stay, share that is torn)"""


class Load:
    """Clients of several volumes, one each, who tell the log what they ask for and what they were answered."""

    def __init__(self, log: WriteLog, rng: random.Random, size_bytes: int) -> None:
        self.log = log
        self.rng = rng
        self.size_bytes = size_bytes
        self.returned: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.stamp = 0

    async def create(self, pool: Pool, name: str) -> None:
        self.log.note("creating", name, size=self.size_bytes)
        await pool.create_volume(name, self.size_bytes)
        self.log.note("created", name)
        self.returned[name], self.sizes[name] = 0, self.size_bytes

    async def flush(self, pool: Pool, name: str) -> None:
        """A flush covers what had returned on every volume."""
        marks = dict(self.returned)
        await pool.volume(name).flush()
        self.log.note("flushed", marks=marks)

    async def operation(self, pool: Pool, name: str) -> None:
        rng = self.rng
        volume, size = pool.volume(name), self.sizes[name]
        kind = rng.choices(("write", "fua", "zeroes", "trim", "flush", "resize"), (60, 6, 8, 10, 8, 2))[0]
        if kind == "flush":
            return await self.flush(pool, name)
        hot = max(BLOCK, size // 4) if rng.random() < 0.5 else size
        offset = rng.randrange(hot)
        if rng.random() < 0.7:
            offset -= offset % BLOCK
        length = min(rng.choice((512, 1000, BLOCK, BLOCK, 3 * BLOCK + 5, 8 * BLOCK, 20 * BLOCK)), size - offset)
        self.stamp += 1
        data = (self.stamp.to_bytes(8, "little") * (length // 8 + 1))[:length]
        if kind == "zeroes":
            data = bytes(length)
        op = Op(f"{kind} {offset}+{length} (stamp {self.stamp})", [(offset, data)])
        if kind == "trim":
            start, end = -(-offset // BLOCK) * BLOCK, (offset + length) // BLOCK * BLOCK
            op.changes = [(start, bytes(max(0, end - start)))]
            length = max(0, end - start)
            offset = min(start, size)
        elif kind == "resize":
            new = rng.randrange(self.size_bytes // 2, self.size_bytes * 3 // 2) // 512 * 512
            op = Op(f"resize {size} -> {new}", size=new)
        self.log.note("begun", name, op=op)
        mark = self.returned[name] + 1
        if kind in ("write", "fua"):
            if not (rng.random() < 0.7 and volume.write_now([(offset, memoryview(data))])):
                await volume.write(offset, data)
        elif kind == "zeroes":
            await volume.write_zeroes(offset, length, no_hole=rng.random() < 0.3)
        elif kind == "trim":
            await volume.trim(offset, length)
        else:
            assert op.size is not None
            await pool.resize_volume(name, op.size)
            self.sizes[name] = op.size
        self.log.note("returned", name, op=op)
        self.returned[name] = mark
        if kind == "resize":
            self.log.note("flushed", marks={name: mark})
        elif kind == "fua":
            await self.flush(pool, name)

    async def client(self, pool: Pool, name: str, count: int) -> None:
        for _ in range(count):
            await self.operation(pool, name)
            if self.rng.random() < 0.3:
                await trio.sleep(self.rng.random() * 0.004)

    async def passing(self, pool: Pool, name: str) -> None:
        """A volume comes, is written to, and goes."""
        await self.create(pool, name)
        await self.client(pool, name, self.rng.randrange(10))
        self.log.note("deleting", name)
        await pool.delete_volume(name)
        self.log.note("deleted", name)
        del self.returned[name], self.sizes[name]

    async def nudge(self, pool: Pool) -> None:
        """Checkpoints and cleaning, more often than the load alone would cause them."""
        while True:
            await trio.sleep(self.rng.random() * 0.02)
            space = pool._engine.space
            (space.kick_checkpoint if self.rng.random() < 0.5 else space.kick_cleaner).set()

    async def run(self, pool: Pool, names: list[str], count: int) -> None:
        async with trio.open_nursery() as background:
            background.start_soon(self.nudge, pool)
            async with trio.open_nursery() as clients:
                for name in names:
                    clients.start_soon(self.client, pool, name, count)
                clients.start_soon(self.passing, pool, f"x{self.stamp}")
            background.cancel_scope.cancel()


async def record(
    tmp_path: Path, rng: random.Random, *, volumes: int, count: int, lives: int, lying: bool = False
) -> tuple[WriteLog, dict[str, bytes], int]:
    """A pool's lives under load. Returns its log, its first catalog, and how many blocks the cleaner moved."""
    home = tmp_path / "home"
    devices = {tmp_path / "fast.img": ("fast", 28), tmp_path / "base.img": ("base", 40)}
    await create_small_pool(home, devices)
    log = WriteLog(home)
    log.lying = lying
    log.start = {str(path): path.read_bytes() for path in devices}
    first = catalog_files(home)
    load = Load(log, rng, 768 << 10)
    names = [f"v{i}" for i in range(volumes)]
    moved = 0
    with log.recording():
        for life in range(lives):
            async with Pool.open(home, settings=SETTINGS) as pool:
                if not life:
                    for name in names:
                        await load.create(pool, name)
                await load.run(pool, names, count)
                marks = dict(load.returned)
                moved += pool._engine.moved_blocks
            log.note("flushed", marks=marks)  # a clean end makes all durable
    return log, first, moved


async def judge(crash: Crash) -> None:
    """Open what the crash left; it must be sound, and hold what was promised."""
    models, uncertain = crash.judged()
    with trio.fail_after(60):
        async with Pool.open(crash.home, settings=SETTINGS) as pool:
            names = {volume.short_name for volume in pool.volumes()}
            if not set(models) <= names <= {*models, *uncertain}:
                raise OracleError(f"volumes {sorted(names)}, expected {sorted(models)} and perhaps {sorted(uncertain)}")
            for name in sorted(names):
                model: Model = models.get(name) or uncertain[name]
                try:
                    model.judge(await read_all(pool.volume(name)), everything=False)
                except OracleError as error:
                    raise OracleError(f"{name}: {error}") from None
            await require_sound(pool)


async def record_recovery(crash: Crash) -> tuple[WriteLog, dict[str, bytes]]:
    """Open and close what a crash left, and record that."""
    log = WriteLog(crash.home)
    log.start = {str(medium.path): medium.path.read_bytes() for medium in crash.media}
    first = catalog_files(crash.home)
    with log.recording():
        async with Pool.open(crash.home, settings=SETTINGS):
            pass
    return log, first


def draw_points(log: WriteLog, count: int, rng: random.Random) -> dict[int, int]:
    """Moments anywhere, but two of five right after a commit, when it must be true that all it names is durable."""
    commits = [at for at, entry in enumerate(log.entries, 1) if isinstance(entry, Committed)]
    points: dict[int, int] = {}
    for number in range(count):
        at = rng.choice(commits) if number % 5 < 2 else rng.randrange(len(log.entries) + 1)
        points[at] = points.get(at, 0) + 1
    return points


def try_images(
    log: WriteLog,
    first: dict[str, bytes],
    points: dict[int, int],
    rng: random.Random,
    before: Crash | None = None,
) -> int:
    """Judge so many images at each of these points of the log; return how many that were.

    `before`: the crash whose recovery this is the log of; nobody was told anything since.
    """
    images = 0
    for crash in crashes(log, first):
        if before is not None:
            crash.models, crash.uncertain = before.models, before.uncertain
        for _ in range(points.get(crash.at, 0)):
            story = crash.build(rng, CHOICES)
            images += 1
            try:
                trio.run(judge, crash)
            except Exception as error:
                error.add_note(
                    f"POWERCUT_SEED={SEED}; {story}; entry: {str(log.entries[crash.at : crash.at + 1])[:300]}"
                )
                raise
    return images


@pytest.mark.system
def test_every_moment_of_a_short_run_is_a_good_moment_for_a_power_cut(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    log, first, _ = trio.run(lambda: record(tmp_path, rng, volumes=1, count=6, lives=1))
    # What is on the devices changes only at these.
    points = {at + 1: 1 for at, entry in enumerate(log.entries) if isinstance(entry, Write | Flushed | Committed)}
    assert try_images(log, first, {0: 1, **points}, rng) > 20


@pytest.mark.system
def test_a_power_cut_at_any_moment_of_a_mixed_load_leaves_what_was_promised(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    log, first, moved = trio.run(lambda: record(tmp_path, rng, volumes=3, count=150, lives=LIVES))
    commits = sum(isinstance(entry, Committed) for entry in log.entries)
    flushes = sum(isinstance(entry, Flushed) for entry in log.entries)
    assert commits > 10 and flushes > 30 and moved > 50, (
        f"{commits} commits, {flushes} flushes, {moved} moved: too little"
    )
    assert try_images(log, first, draw_points(log, IMAGES, rng), rng) == IMAGES


@pytest.mark.system
def test_a_second_power_cut_during_recovery_takes_no_more_than_the_first(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    log, first, _ = trio.run(lambda: record(tmp_path, rng, volumes=2, count=40, lives=1))
    images = 0
    points = set(rng.sample(range(len(log.entries) // 2, len(log.entries)), 4))
    for crash in crashes(log, first):
        if crash.at in points:
            crash.build(rng, CHOICES)
            again, catalog = trio.run(record_recovery, crash)
            changes = [
                at for at, entry in enumerate(again.entries, 1) if isinstance(entry, Write | Flushed | Committed)
            ]
            chosen = dict.fromkeys(rng.sample(changes, min(4, len(changes))), 1)
            images += try_images(again, catalog, chosen, rng, crash)
    assert images > 8


def skipping(method: str, caller: str) -> Any:
    """A flusher that does nothing when this function of the engine asks in this way."""
    honest = getattr(Flusher, method)

    async def flush(self: Flusher) -> None:
        if sys._getframe(1).f_code.co_name != caller:
            await honest(self)

    return mock.patch.object(Flusher, method, flush)


async def always(self: object, found: object) -> bool:
    return True


MUTANTS = {
    "a checkpoint that commits before its pages are durable": lambda: skipping("flush_all", "_attempt"),
    "a volume flush that returns at once": lambda: skipping("flush", "flush"),
    "a replay that takes torn batches": lambda: mock.patch.object(_LogReader, "is_on_medium", always),
    "a disk that forgets what it flushed": contextlib.nullcontext,
}


@pytest.mark.system
@pytest.mark.parametrize("name", MUTANTS)
def test_the_judge_finds(name: str, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    with MUTANTS[name](), pytest.raises((OracleError, TierError), match="POWERCUT_SEED"):
        lying = name.startswith("a disk")
        log, first, _ = trio.run(lambda: record(tmp_path, rng, volumes=3, count=60, lives=1, lying=lying))
        try_images(log, first, draw_points(log, 200, rng), rng)
