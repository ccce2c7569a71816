"""A volume's heat map: true where all was looked at, and as quick for 10 TiB as for a MiB."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.simulation.corruption import move_everything
from tests.simulation.machine import Disk, Machine
from tests.tiers.helpers import fresh_pool, refusal, run
from tiers.heat import CHUNK_EXTENTS, Touch
from tiers.heatmap import MAX_RANGES, SAMPLED_LEAVES, _chosen
from tiers.layout import BLOCK_BYTES, MIB

KIB = 1024


def test_it_says_what_lies_on_which_tier_and_how_hot_it_is() -> None:
    machine = Machine((Disk("fast", 40), Disk("base", 40)), seed=1)

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 13 * 64 * KIB + 8 * KIB)
            await volume.write(0, b"a" * (4 * 64 * KIB))
            pool._engine.log.roll()
            await pool.checkpoint()
            await move_everything(pool, "base")
            await volume.write(2 * 64 * KIB, b"b" * (64 * KIB))
            await volume.write(8 * 64 * KIB, b"c" * BLOCK_BYTES)
            await pool.recorder.drain()
            for _ in range(3):
                into = memoryview(bytearray(BLOCK_BYTES))
                await volume.read(0, BLOCK_BYTES, into)
                await pool.recorder.drain()
            found = await pool.heat_map("v", 100)
            extent = 64 * KIB
            assert (found.volume, found.size_bytes, found.range_bytes) == ("sim/v", volume.size_bytes, extent)
            assert found.looked_at == 1.0
            assert found.base_bytes == [extent, extent, 0, extent] + [0] * 10
            assert found.fast_bytes == [0, 0, extent, 0, 0, 0, 0, 0, BLOCK_BYTES] + [0] * 5
            # The whole extents were written twice or once, block 0 was read three times as well.
            assert found.base_heat == [pytest.approx(1 + 3 / 16, abs=0.001), 1, 0, 1] + [0] * 10
            assert found.fast_heat[2] == 2 and found.fast_heat[8] == 1
            assert found.reads == [3.0] + [0.0] * 13
            assert found.writes[8] == 1 and all(found.writes[:4]) and not any(found.writes[9:])
            halves = await pool.heat_map("v", 2)
            assert halves.range_bytes == 7 * extent
            assert halves.base_bytes == [3 * extent, 0] and halves.fast_bytes == [extent, BLOCK_BYTES]

    machine.run(main)


def test_ten_tebibytes_of_nothing_and_of_heat_are_answered_at_once(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 10 << 40)
            begun = time.process_time()
            found = await pool.heat_map("v", 512)
            assert time.process_time() - begun < 0.5
            assert len(found.reads) == 512 and set(found.fast_bytes) <= {0, None}
            extents = pool.recorder.heat.extents
            for chunk in range(0, 28672, 64):
                touched = np.arange(chunk * CHUNK_EXTENTS, (chunk + 64) * CHUNK_EXTENTS, 7)
                extents.note(Touch.WRITE, volume.id, touched, np.full(len(touched), 2))
            begun = time.process_time()
            found = await pool.heat_map("v", 512)
            assert time.process_time() - begun < 1.0
            assert len(extents) == 28672
            counted = 28672 * 512 // 40960 - 1
            assert found.writes[:counted] == pytest.approx([2 / 7] * counted, rel=0.05)
            assert sum(found.reads) == 0

    run(body)


def test_a_volume_that_is_not_there_is_named(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            assert "no volume 'none'" in str(await refusal(lambda: pool.heat_map("none", 5)))
            await pool.create_volume("tiny", 4096)
            found = await pool.heat_map("tiny", MAX_RANGES)
            assert (len(found.reads), found.fast_bytes, found.looked_at) == (1, [0], 1.0)

    run(body)


@given(st.integers(1, 1 << 38), st.integers(1, MAX_RANGES))
def test_what_is_looked_at_is_bounded_and_spread_over_all_ranges(blocks: int, ranges: int) -> None:
    extents = -(-blocks // 16)
    range_blocks = -(-extents // ranges) * 16
    count = -(-extents * 16 // range_blocks)
    leaves = _chosen(blocks, range_blocks, count)
    total = -(-blocks // 256)
    assert len(set(leaves)) == len(leaves) <= max(SAMPLED_LEAVES, count)
    assert all(0 <= leaf < total for leaf in leaves)
    if range_blocks >= 512:
        assert {leaf * 256 // range_blocks for leaf in leaves} | {
            (leaf * 256 + 255) // range_blocks for leaf in leaves
        } >= set(range(count))


def test_a_part_of_what_is_looked_at_is_spread_too() -> None:
    leaves = _chosen(1000 * 256, 256, 1000)
    assert sorted(leaves) == list(range(1000))
    gaps = np.diff(sorted(leaves[:100]))
    assert int(gaps.max()) <= 32
    assert MIB == 256 * BLOCK_BYTES
