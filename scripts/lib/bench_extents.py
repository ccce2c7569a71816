"""The bench's section about BLOCK_STATUS: what the engine takes to say what is where, in this process, without sockets.

Each line asks all of a volume for its extents, in requests of 64-bit lengths (one, unless the answer is a part) or of
4 GiB less a block, as clients with 32-bit lengths do. The volumes: 10 TiB of nothing, a few blocks scattered over 10
TiB, 20,000 random blocks that no map page tells of yet, the same in pages, a clone and a snapshot of that, and a
stream of 1 GiB.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
from bench_sections import GIB, MIB, TIB, Result

from tiers import DeviceSpec, Policy, Pool, PoolSettings, Snapshot, Volume
from tiers.layout import BLOCK_BYTES

SECTION = "BLOCK_STATUS"
EMPTY_TARGET_MS = 50.0
SIZE_BYTES = 10 * TIB
REQUEST_BYTES = (1 << 32) - BLOCK_BYTES
LIMIT = 16_384
"""Extents that one reply may have (docs/nbd.md, "Transmission")."""
SCATTERED = 8
RANDOM_BLOCKS = 20_000
PIECE = b"".join(random.Random(i).randbytes(64) * 64 for i in range(MIB // BLOCK_BYTES))
"""1 MiB that compresses to a sixtieth, so that a stream of gigabytes fits a small pool."""

Ask = Callable[[int, int, int], Awaitable[list[tuple[int, int]]]]


def extents(directory: Path) -> list[Result]:
    """All lines; about a quarter of a minute, and 1 GiB in `directory`."""
    return trio.run(_measure, directory)


async def _measure(directory: Path) -> list[Result]:
    results: list[Result] = []
    devices = [DeviceSpec(directory / "fast.img", "fast", 2 * GIB), DeviceSpec(directory / "base.img", "base", 4 * GIB)]
    home = directory / "pool"
    await Pool.create(home, "bench", devices)
    async with Pool.open(home, settings=PoolSettings(checkpoint_interval_s=3600.0)) as pool:
        pool.define_policies({"base": Policy("base", placement="base", stream_cutoff_bytes=4 * MIB)})

        async def all_ways(what: str, export: Volume | Snapshot, most_ms: float | None = None) -> None:
            results.extend(await _all_ways(what, export, most_ms))

        await all_ways("10 TiB, empty", await pool.create_volume("empty", SIZE_BYTES), EMPTY_TARGET_MS)
        few = await pool.create_volume("few", SIZE_BYTES)
        rng = random.Random(1)
        for _ in range(SCATTERED):
            await few.write(rng.randrange(SIZE_BYTES // BLOCK_BYTES) * BLOCK_BYTES, PIECE[:BLOCK_BYTES])
        await pool.checkpoint()
        few.tree.forget()
        await all_ways(f"10 TiB, {SCATTERED} blocks", few)
        many = await pool.create_volume("many", SIZE_BYTES)
        for _ in range(RANDOM_BLOCKS // 100):
            writes = [(rng.randrange(SIZE_BYTES // BLOCK_BYTES) * BLOCK_BYTES, PIECE[:BLOCK_BYTES]) for _ in range(100)]
            if not many.write_now(writes):
                for offset, data in writes:
                    await many.write(offset, data)
        await all_ways(f"10 TiB, {RANDOM_BLOCKS:,} blocks not in pages", many)
        await pool.checkpoint()
        await all_ways(f"10 TiB, {RANDOM_BLOCKS:,} blocks", many)
        (snapshot,) = await pool.take_snapshots([("many", "s")])
        await all_ways("the same, a snapshot", snapshot)
        await all_ways("the same, a clone", await pool.clone("many", "s", "clone"))
        stream = await pool.create_volume("stream", SIZE_BYTES, "base")
        for offset in range(0, GIB, MIB):
            await stream.write(offset, PIECE)
        await pool.checkpoint()
        await all_ways("10 TiB, a stream of 1 GiB", stream)
    return results


async def _all_ways(what: str, export: Volume | Snapshot, most_ms: float | None) -> list[Result]:
    async def tier(offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        return await export.context_extents("terrace:tier", offset, length, limit)

    results: list[Result] = []
    contexts: list[tuple[str, Ask]] = [("base:allocation", export.extents)]
    if export.has_context("terrace:tier"):
        contexts.append(("terrace:tier", tier))
    for name, ask in contexts:
        for lengths, longest in (("64-bit", SIZE_BYTES), ("4 GiB", REQUEST_BYTES)):
            begun = time.perf_counter()
            requests, found = await _ask_all(ask, longest)
            taken_ms = (time.perf_counter() - begun) * 1000
            line = f"{what}, {name}, {lengths} lengths: {requests:,} requests, {found:,} extents"
            results.append(Result(SECTION, line, taken_ms, "ms", most_ms if lengths == "64-bit" else None))
    return results


async def _ask_all(ask: Ask, longest: int) -> tuple[int, int]:
    offset = requests = found = 0
    while offset < SIZE_BYTES:
        extents = await ask(offset, min(longest, SIZE_BYTES - offset), LIMIT)
        offset += sum(length for length, _ in extents)
        found += len(extents)
        requests += 1
    return requests, found


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        for result in extents(Path(place)):
            print(f"{result.value:10.1f} {result.unit}  {result.what}", flush=True)
