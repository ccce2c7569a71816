"""Write amplification: device bytes over client bytes, as it depends on how full a pool is. In this process, no NBD.

A volume is written once from end to end, then overwritten at random by batches of 32 blocks of 4 KiB, as a connection
with 32 requests under way has them: one that has to wait goes on with its first write, then with the rest together.
What is counted are the bytes of the last overwrite: after so many that the pool has settled.

*Full* is live / (raw - reserve): the reserve is what clients' writes never get (`Space.reserve`, what map pages may
come to take, and the open segments: rule 8 of the design). Metadata, map pages and copies of the catalog, are told
apart. What remains are the blocks, the headers of the batches that they came in (one for 32: 3 %), their copies with
headers of their own, the records of moves, and segment headers.

The theory is that of greedy cleaning under uniform random writes (Desnoyers, "Analytic Models of SSD Write
Performance", 2014): a victim's share v of live blocks solves u = (v - 1) / ln v, and 1 / (1 - v) is written. It knows
no headers.
"""

from __future__ import annotations

import errno
import math
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import trio
from bench_sections import MIB, Result

from tiers import DeviceSpec, Pool, TierError, Volume
from tiers.layout import BLOCK_BYTES

QUEUE_DEPTH = 32
HOT_SHARE = 0.2
HOT_WRITES = 0.8
SHARES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
TARGETS = {"one tier, uniform": 3.2, "two tiers, uniform": 4.0, "one tier, 80/20": 2.5}
TARGET_SHARE = 0.8


@dataclass(frozen=True)
class Shape:
    """A pool and a load. Sizes of the tiers in MiB."""

    title: str
    fast_mib: int
    base_mib: int
    skewed: bool


@dataclass(frozen=True)
class Amplification:
    """Bytes written to devices for each byte of a client, metadata apart from all else."""

    data: float
    metadata: float
    cpu_us_a_block: float


def theory(full: float) -> float:
    """What greedy cleaning writes for each byte of a client, with `full` (0 to 1) of the space live."""
    low, high = 1e-9, 1 - 1e-9
    for _ in range(60):
        v = (low + high) / 2
        low, high = (v, high) if (v - 1) / math.log(v) < full else (low, v)
    return 1 / (1 - low)


def amplification(directory: Path, scale_mib: int, overwrites: int, shares: Sequence[float] = SHARES) -> list[Result]:
    """The curves. A pool of one tier has `scale_mib`, of two tiers half of that and all of it."""
    shapes = (
        Shape("one tier, uniform", scale_mib, 0, skewed=False),
        Shape("two tiers, uniform", scale_mib // 2, scale_mib, skewed=False),
        Shape("one tier, 80/20", scale_mib, 0, skewed=True),
    )
    results = []
    for shape in shapes:
        for full in shares:
            section = f"write amplification, {shape.title}"
            what = f"{full:.0%} full (greedy theory {theory(full):.1f})"
            try:
                (directory / "wa").mkdir()
                found = trio.run(_measure, directory / "wa", shape, full, overwrites)
            except TierError as refusal:
                if refusal.errno != errno.ENOSPC:
                    raise
                results.append(Result(section, f"{what}: refused, {refusal}", math.nan, ""))
                continue
            most = TARGETS[shape.title] if full == TARGET_SHARE else None
            results.append(Result(section, what, found.data, "x", most))
            results.append(Result(section, f"{full:.0%} full: metadata besides", found.metadata, "x"))
            results.append(Result(section, f"{full:.0%} full: CPU of the engine", found.cpu_us_a_block, "us a block"))
    return results


async def _measure(directory: Path, shape: Shape, full: float, overwrites: int) -> Amplification:
    try:
        specs = [
            DeviceSpec(directory / tier, tier, size * MIB)
            for tier, size in (("fast", shape.fast_mib), ("base", shape.base_mib))
            if size
        ]
        await Pool.create(directory / "home", "bench", specs)
        async with Pool.open(directory / "home") as pool:
            space = pool._engine.space
            await pool.create_volume("sizing", int(full * pool.status().size_bytes) // BLOCK_BYTES * BLOCK_BYTES)
            kept = space.reserve + space.map_reserve() + 4 * space.largest_segment_slots
            await pool.delete_volume("sizing")
            blocks = int(full * (pool.status().size_bytes // BLOCK_BYTES - kept))
            volume = await pool.create_volume("volume", blocks * BLOCK_BYTES)
            writer = _Writer(volume, blocks, skewed=shape.skewed)
            await writer.fill()
            await writer.overwrite(overwrites - 1)
            before, cpu_s = _bytes(pool), time.process_time()
            await writer.overwrite(1)
            client, device, metadata = (b - a for a, b in zip(before, _bytes(pool), strict=True))
            return Amplification(
                (device - metadata) / client,
                metadata / client,
                (time.process_time() - cpu_s) / (client / BLOCK_BYTES) * 1e6,
            )
    finally:
        shutil.rmtree(directory)


def _bytes(pool: Pool) -> tuple[int, int, int]:
    """Written by clients, to devices, and of the latter metadata."""
    status = pool.status()
    checkpointer = pool._checkpointer
    metadata = (checkpointer.writer.written_pages + checkpointer.copies.written_slots) * BLOCK_BYTES
    return status.client_written_bytes, status.device_written_bytes, metadata


class _Writer:
    """Incompressible blocks, no two alike, to places that a seed decides."""

    def __init__(self, volume: Volume, blocks: int, *, skewed: bool) -> None:
        self._volume = volume
        self._blocks = blocks
        self._rng = random.Random(1)
        self._noise = self._rng.randbytes(MIB + BLOCK_BYTES)
        self._count = 0
        self._places = list(range(blocks))
        self._hot = int(blocks * HOT_SHARE) if skewed else 0
        if skewed:
            self._rng.shuffle(self._places)

    def _block(self) -> bytes:
        self._count += 1
        at = self._rng.randrange(MIB)
        return self._count.to_bytes(8, "little") + self._noise[at : at + BLOCK_BYTES - 8]

    def _place(self) -> int:
        if self._hot and self._rng.random() < HOT_WRITES:
            return self._places[self._rng.randrange(self._hot)]
        return self._places[self._rng.randrange(self._hot, self._blocks)]

    async def fill(self) -> None:
        """Each block once, in order."""
        for start in range(0, self._blocks, 256):
            data = b"".join(self._block() for _ in range(min(256, self._blocks - start)))
            await self._write([(start * BLOCK_BYTES, data)])

    async def overwrite(self, times: int) -> None:
        """As many blocks as there are, `times` over, at random."""
        for _ in range(times * self._blocks // QUEUE_DEPTH):
            await self._write([(self._place() * BLOCK_BYTES, self._block()) for _ in range(QUEUE_DEPTH)])

    async def _write(self, writes: list[tuple[int, bytes]]) -> None:
        if self._volume.write_now(writes):
            await trio.lowlevel.checkpoint()
            return
        for at, (offset, data) in enumerate(writes, 1):
            await self._volume.write(offset, data)
            if at < len(writes) and self._volume.write_now(writes[at:]):
                return
