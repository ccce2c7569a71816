"""The fuzz target of a whole pool: devices and catalog of a crashed pool, damaged or forged, and then opened.

It opens, or `TierError` says why not. If only damage was done (no checksum put right, nothing edited by SQL), every
block read is one that was written there once, or an error. The pool's own check must come to an end too.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import trio

from tests.fuzz.engine import Target
from tests.fuzz.formats import Reader, edit_catalog, scratch, seal_batch, seal_label, seal_segment
from tiers import DeviceSpec, Pool, PoolSettings, TierError, Volume
from tiers.catalog import CATALOG_NAME
from tiers.layout import BLOCK_BYTES, LABEL_AREA_BYTES, MIB
from tiers.record import BATCH_MAGIC, SEGMENT_MAGIC, peek_header_slots

DEVICE_BYTES = 32 * MIB
SETTINGS = PoolSettings(checkpoint_interval_s=3600.0)
SPAN = 64
ZEROES = bytes(BLOCK_BYTES)
LETTERS = bytes(b"etaoinsh"[i % 8] for i in range(256))


@dataclass
class Template:
    """A pool as a kill left it, and all that its blocks ever held."""

    catalog: dict[str, bytes] = field(default_factory=dict)
    devices: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)
    """The parts of each device that are not zeros."""
    contents: dict[tuple[str, int], set[bytes]] = field(default_factory=lambda: defaultdict(set))
    segments: list[tuple[str, int]] = field(default_factory=list)
    """Where a segment's header stands."""
    batches: list[tuple[str, int, int]] = field(default_factory=list)
    """Where a batch stands, and how many slots its header takes."""


def paths() -> tuple[Path, dict[str, Path]]:
    """The pool's directory and its devices; the same places for the template and for each run."""
    base = scratch() / "pool"
    return base / "home", {"fast": base / "fast.img", "base": base / "base.img"}


@cache
def template() -> Template:
    """Write, trim, delete, move, checkpoint, and write again; then keep what is on the devices while it is open."""
    made = Template()
    home, devices = paths()
    home.parent.mkdir()
    rng = random.Random(1)

    async def write(pool: Pool, name: str, block: int, count: int) -> None:
        data = rng.randbytes(count * BLOCK_BYTES)
        if block % 2:  # half of it is packed when it moves to the base tier
            data = data.translate(LETTERS)
        await pool.volume(name).write(block * BLOCK_BYTES, data)
        for i in range(count):
            made.contents[name, block + i].add(data[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES])

    async def main() -> None:
        specs = [DeviceSpec(devices[tier], tier, DEVICE_BYTES) for tier in ("fast", "base")]
        await Pool.create(home, "demo", specs)
        async with Pool.open(home, settings=SETTINGS) as pool:
            for name in ("a", "b", "gone"):
                await pool.create_volume(name, 4 * MIB)
            for number in range(60):
                await write(pool, "ab"[number % 2], rng.randrange(600), rng.randrange(1, 40))
            await write(pool, "gone", 0, 60)
            await pool.volume("a").trim(0, 40 * BLOCK_BYTES)
            await pool.checkpoint()
            await pool.delete_volume("gone")
            victim = next(s for s in pool._engine.segments.by_id.values() if not s.open and s.live)
            await pool._cleaner.mover.move_segment(victim, "base")
            await pool._cleaner.mover.apply_staged()
            await pool.volume("b").flush()
            for number in range(20):
                await write(pool, "ab"[number % 2], rng.randrange(600), rng.randrange(1, 5))
            await pool.volume("a").trim(100 * BLOCK_BYTES, 40 * BLOCK_BYTES)
            await pool.volume("b").flush()
            await pool.create_volume("late", MIB)
            await pool.resize_volume("b", 5 * MIB)
            await write(pool, "late", 3, 5)
            for path in home.iterdir():
                if path.name.startswith(CATALOG_NAME):
                    made.catalog[path.name] = path.read_bytes()
            for name, path in devices.items():
                _index(made, name, path.read_bytes())

    trio.run(main)
    return made


def _index(made: Template, name: str, data: bytes) -> None:
    step = 64 << 10
    steps = range(0, len(data), step)
    made.devices[name] = [(at, data[at : at + step]) for at in steps if data[at : at + step].strip(b"\0")]
    for at in range(LABEL_AREA_BYTES, len(data), BLOCK_BYTES):
        if data[at : at + 8] == SEGMENT_MAGIC:
            made.segments.append((name, at))
        elif data[at : at + 8] == BATCH_MAGIC:
            made.batches.append((name, at, peek_header_slots(data[at : at + BLOCK_BYTES])))


def restore() -> None:
    """Put the template's bytes back."""
    made = template()
    home, devices = paths()
    shutil.rmtree(home)
    home.mkdir()
    for name, data in made.catalog.items():
        (home / name).write_bytes(data)
    for name, parts in made.devices.items():
        with devices[name].open("wb") as file:
            file.truncate(DEVICE_BYTES)
            for at, part in parts:
                file.seek(at)
                file.write(part)


def edit(reader: Reader) -> bool:
    """Carry out one edit of the input. Whether it is a forgery: one that checksums can't tell."""
    made = template()
    home, devices = paths()
    kind, which, at, length = reader.number(1), reader.number(1), reader.number(2), reader.number(1)
    sealed = bool(kind & 0x80)
    kind %= 7
    if kind == 4:
        edit_catalog(home / CATALOG_NAME, reader)
        return True
    new = reader.take(length % 64)
    if kind == 0:
        name, place, size = ("fast", "base")[which & 1], (0, 4096)[which >> 1 & 1], 512
    elif kind == 1:
        name, place = made.segments[which % len(made.segments)]
        size = 80
    elif kind == 2:
        name, place, slots = made.batches[-1 - which % len(made.batches)]
        size = slots * BLOCK_BYTES
    elif kind == 3:
        name, place, slots = made.batches[-1 - which % len(made.batches)]
        place += slots * BLOCK_BYTES
        size = 16 * BLOCK_BYTES
    elif kind == 5:
        name, place, size = ("fast", "base")[which & 1], (which >> 1) * 4096 * 16, 1 << 16
        if length & 1:
            new *= 4096  # a large part of the device
    else:
        with devices[("fast", "base")[which & 1]].open("r+b") as file:
            file.truncate(DEVICE_BYTES * at >> 16)
        return False
    if kind == 2 and at & 0x8000:
        at = 104 + (at & 0x1FF)  # its operations
    at %= size
    with devices[name].open("r+b") as file:
        file.seek(place)
        data = bytearray(file.read(size))
        if kind in (0, 1, 2):
            new = new[: max(0, len(data) - at)]
        data[at : at + len(new)] = new
        if sealed and kind in (0, 1, 2) and len(data) == size:
            (seal_label, seal_segment, seal_batch)[kind](data)
        file.seek(place)
        file.write(data)
    return sealed


def run_pool(data: bytes) -> None:
    """Some edits, and then opening, reading, checking, closing, and opening again."""
    restore()
    reader = Reader(data)
    forged = False
    edits = 0
    while reader and edits < 6:
        with contextlib.suppress(ZeroDivisionError, IndexError, OSError):
            forged |= edit(reader)
        edits += 1
    truncate = bool(len(data) & 1)

    async def main() -> None:
        for _ in range(2):
            try:
                async with Pool.open(paths()[0], settings=SETTINGS, truncate_log=truncate) as pool:
                    await _look(pool, forged)
            except TierError as error:
                assert str(error) and "\n" not in str(error), str(error)

    trio.run(main)


async def _span(volume: Volume, first: int, count: int) -> list[tuple[int, bytes]]:
    """The blocks of a range that can be read: at once, or, if that fails, one by one."""
    into = bytearray(count * BLOCK_BYTES)
    try:
        await volume.read(first * BLOCK_BYTES, len(into), memoryview(into))
    except OSError as error:
        assert isinstance(error, TierError)
        if count == 1:
            return []
        return [pair for block in range(first, first + count) for pair in await _span(volume, block, 1)]
    return [(first + i, bytes(into[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES])) for i in range(count)]


async def _look(pool: Pool, forged: bool) -> None:
    contents = template().contents
    for volume in pool.volumes():
        end = min(volume.size_bytes, 5 * MIB) // BLOCK_BYTES
        for first in range(0, end, SPAN):
            for block, found in await _span(volume, first, min(SPAN, end - first)):
                known = contents.get((volume.short_name, block), ())
                assert forged or found == ZEROES or found in known, f"{volume.name}, block {block}: wrong data"
    with contextlib.suppress(TierError):
        await pool.check(full=True)
    with contextlib.suppress(TierError):
        await pool.create_volume("new" + hashlib.sha256(repr(pool.volumes()).encode()).hexdigest()[:8], MIB)


def _pool_seeds() -> list[bytes]:
    rng = random.Random(2)
    seeds = [b""]
    for kind in (0, 1, 2, 3, 5, 0x80, 0x81, 0x82, 0x83, 0x85):
        for which in range(4):
            at = rng.randrange(1 << 15) % (512 if kind & 0x7F == 0 else 80 if kind & 0x7F == 1 else 4096)
            seeds.append(bytes([kind, which]) + at.to_bytes(2, "little") + bytes([8]) + rng.randbytes(8))
    for which in range(30):
        at = 0x8000 + 8 * rng.randrange(6)
        value = rng.choice((0, 1, 2, 1 << 32, 1 << 40, (1 << 64) - 1)).to_bytes(8, "little")
        seeds.append(bytes([0x82, which]) + at.to_bytes(2, "little") + b"\10" + value)
    for table, columns in zip(range(5), (2, 7, 7, 8, 4), strict=True):
        for column in range(columns):
            values = (b"\0\1", b"\2" + b"\xff" * 7 + b"\7", b"\0\0")
            seeds += [bytes([4, 0, 0, 0, 0, 4, table, column, rng.randrange(9)]) + value for value in values]
    seeds += [bytes([6, which, 0, at, 0]) for which in (0, 1) for at in (0, 40, 255)]
    return seeds


IMAGE = [Target("pool", run_pool, _pool_seeds, [b"\x82", b"\4", bytes([4, 0, 0, 0, 0, 4])], examples=25)]
