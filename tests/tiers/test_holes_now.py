"""What a volume or snapshot tells of holes without waiting: the map's truth at that moment, or nothing."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import cast

from nbd import wire
from tests.nbd.client import attached, run
from tests.nbd.memory import MemoryExport
from tests.tiers.helpers import QUIET, fresh_pool, make_pool, read
from tiers import Pool, Snapshot, TierError, Volume
from tiers.layout import BLOCK_BYTES, MIB
from tiers.policy import Policy

SHORTEST = 64 << 10


async def judge(export: Volume | Snapshot, offset: int, length: int, shortest: int = SHORTEST) -> int:
    """Compare with `extents`; returns how many holes there are."""
    holes = set()
    at = offset
    for size, flags in await export.extents(offset, length, 1 << 20):
        if flags:
            holes.add((at, size))
        at += size
    into = bytearray(length)
    await export.read(offset, length, memoryview(into))  # loads the map, of which `extents` doesn't need all
    told = export.holes_now(offset, length, shortest)
    assert told is not None
    assert set(told) <= holes
    for at, size in holes:
        first = -(-at // shortest) * shortest
        assert at + size < first + shortest or (at, size) in told, "one was missed"
    return len(told)


def test_holes_are_those_of_the_map_in_every_layer(tmp_path: Path) -> None:
    async def body() -> None:
        rng = random.Random(11)
        found = 0
        async with fresh_pool(tmp_path, fast_mib=96) as pool:
            volume = await pool.create_volume("v", 16 * MIB)
            for step in range(60):
                at = rng.randrange(4096)
                count = min(rng.choice((1, 16, 40, 700)), 4096 - at)
                if rng.random() < 0.5:
                    await volume.write(at * BLOCK_BYTES, rng.randbytes(BLOCK_BYTES) * count)
                else:
                    await volume.trim(at * BLOCK_BYTES, count * BLOCK_BYTES)
                if step % 13 == 5:
                    await pool.checkpoint()
                if step == 30:
                    (snapshot,) = await pool.take_snapshots([("v", "s")])
                    seen = await read(volume, 0, 16 * MIB)
                offset = rng.randrange(16 * MIB - 1)
                length = rng.randrange(1, 16 * MIB - offset)
                found += await judge(volume, offset, length, rng.choice((SHORTEST, BLOCK_BYTES)))
            found += await judge(snapshot, 1, 16 * MIB - 2)
            for at, size in snapshot.holes_now(0, 16 * MIB, BLOCK_BYTES) or ():
                assert not any(seen[at : at + size])
        assert found > 100

    run(body)


def test_a_map_that_is_not_in_memory_tells_nothing_until_it_is_loaded(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await pool.create_volume("v", 16 * MIB)
            await volume.write(0, b"x" * BLOCK_BYTES)
            assert volume.holes_now(0, MIB, SHORTEST) == [(BLOCK_BYTES, MIB - BLOCK_BYTES)]
        async with Pool.open(home, settings=QUIET) as pool:
            volume = pool.volume("v")
            assert volume.holes_now(0, MIB, SHORTEST) is None
            async with attached(cast(MemoryExport, volume), form="structured") as (client, _):
                reply = await client.ask(wire.CMD_READ, 0, 8 * MIB)
                assert reply.data == b"x" * BLOCK_BYTES + bytes(8 * MIB - BLOCK_BYTES)
                assert reply.holes == ((MIB, 7 * MIB),)
                reply = await client.ask(wire.CMD_READ, 0, 8 * MIB)
                assert reply.holes == ((BLOCK_BYTES, 8 * MIB - BLOCK_BYTES),)

    run(body)


def test_a_volume_with_limits_pays_for_what_it_reads_and_one_that_is_deleted_tells_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            pool.define_policies({"slow": Policy(iops_limit=1_000_000)})
            volume = await pool.create_volume("v", 16 * MIB, "slow")
            assert volume.holes_now(0, 16 * MIB, SHORTEST) is None
            other = await pool.create_volume("w", 16 * MIB)
            assert other.holes_now(5, 16 * MIB - 7, SHORTEST) == [(5, 16 * MIB - 7)]
            await pool.delete_volume("w")
            try:
                other.holes_now(0, MIB, SHORTEST)
            except TierError as error:
                assert error.errno == errno.ESTALE
            else:
                raise AssertionError("it tells of what isn't there any more")

    run(body)
