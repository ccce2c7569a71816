"""Trims that are taken as a batch: the same as one after the other, and one record for all."""

from pathlib import Path

import pytest
import trio

from tests.tiers.helpers import fresh_pool, run, settle
from tiers import TierError
from tiers.layout import BLOCK_BYTES as BLOCK


def test_a_batch_of_trims_is_one_record_and_rounds_inwards(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 1 << 20)
            await volume.write(0, b"x" * (16 * BLOCK))
            seq = pool.status().log_seq
            assert volume.trim_now([(0, BLOCK), (BLOCK, BLOCK), (4 * BLOCK + 1, 2 * BLOCK), (9 * BLOCK, 100)])
            assert pool.status().log_seq == seq + 1
            into = bytearray(16 * BLOCK)
            await volume.read(0, len(into), memoryview(into))
            kept = [into[i * BLOCK : (i + 1) * BLOCK] == b"x" * BLOCK for i in range(16)]
            assert [i for i, is_kept in enumerate(kept) if not is_kept] == [0, 1, 5]

    run(body)


def test_the_partial_last_block_of_a_volume_is_trimmed_with_it(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 8 * BLOCK + 512)
            await volume.write(0, b"x" * volume.size_bytes)
            assert volume.trim_now([(0, volume.size_bytes)])
            into = bytearray(volume.size_bytes)
            await volume.read(0, len(into), memoryview(into))
            assert not any(into)

    run(body)


def test_a_deleted_volume_takes_no_trims(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 1 << 20)
            await pool.delete_volume("v")
            with pytest.raises(TierError, match="deleted"):
                volume.trim_now([(0, BLOCK)])

    run(body)


def test_a_trim_whose_space_is_not_counted_yet_is_told_of_until_it_is(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 8 << 20)
            await volume.write(0, b"x" * (8 << 20))
            await pool.checkpoint()
            assert not pool.status().uncounted_frees
            await volume.trim(0, 8 << 20)
            assert pool.status().uncounted_frees
            await settle(pool)
            assert not pool.status().uncounted_frees
            await volume.write(0, b"x" * (8 << 20))
            await pool.checkpoint()
            live = pool.status().devices[0].live_bytes
            await pool.delete_volume("v")
            while pool.status().devices[0].live_bytes == live:
                assert pool.status().uncounted_frees
                await trio.lowlevel.checkpoint()
            await settle(pool)
            assert not pool.status().uncounted_frees
            assert pool.status().used_bytes == 0

    run(body)
