"""The checkpoint's merge: what the log did, turned into pages, must say the same as before, and give back the rest."""

import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiers.helpers import QUIET, assert_sound, block, fresh_pool, make_pool, read, refusal, run, settle
from tiers import Pool, PoolSettings, TierError, Volume, checkpoint
from tiers.catalog import Catalog
from tiers.layout import BLOCK_BYTES, MIB
from tiers.maptree import FANOUT, FANOUT_BITS, ROOT_LEVEL
from tiers.merge import decompose_ranges
from tiers.overlay import Overlay

TINY = PoolSettings(checkpoint_interval_s=3600.0, map_cache_bytes=0)
EDGES = st.sampled_from([1 << shift for shift in (0, 8, 16, 24, 32)])
BLOCK = st.builds(
    lambda unit, count, more: min(unit * count + more, (1 << 40) - 1), EDGES, st.integers(0, 300), st.integers(0, 3)
)
SPAN = st.tuples(BLOCK, BLOCK).map(sorted).filter(lambda span: span[0] < span[1])


# -- splitting ranges ------------------------------------------------------------------------------------------------


def intervals_of(overlay: Overlay) -> list[tuple[int, int]]:
    """The block ranges that singles and detached subtrees cover, in order."""
    singles, detached = decompose_ranges(overlay)
    found = [(int(single), int(single) + 1) for single in singles]
    for level, children in detached.items():
        assert 1 <= level <= ROOT_LEVEL
        found += [(child << FANOUT_BITS * level, child + 1 << FANOUT_BITS * level) for child in children]
    return sorted(found)


@given(st.lists(SPAN, min_size=1, max_size=4))
def test_singles_and_subtrees_tile_the_ranges_exactly(spans: list[list[int]]) -> None:
    overlay = Overlay(small=False)
    for start, end in spans:
        overlay.ranges.add(start, end)
    merged: list[tuple[int, int]] = []
    for start, end in intervals_of(overlay):
        assert not merged or merged[-1][1] <= start, "no block twice"
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    assert merged == list(zip(overlay.ranges.starts, overlay.ranges.ends, strict=True))


@given(SPAN)
def test_the_parts_of_a_range_are_few_however_long_it_is(span: list[int]) -> None:
    overlay = Overlay(small=False)
    overlay.ranges.add(*span)
    assert len(intervals_of(overlay)) <= 2 * FANOUT * (ROOT_LEVEL + 1)


@given(st.integers(0, 1500), st.integers(1, 1500))
def test_the_parts_are_what_brute_force_finds(start: int, count: int) -> None:
    overlay = Overlay(small=False)
    overlay.ranges.add(start, start + count)
    whole = {leaf for leaf in range(12) if start <= leaf * FANOUT and (leaf + 1) * FANOUT <= start + count}
    singles, detached = decompose_ranges(overlay)
    assert detached.get(1, set()) == whole
    assert singles.tolist() == [b for b in range(start, start + count) if b // FANOUT not in whole]


# -- merging against a dictionary --------------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), BLOCK, st.integers(1, 20)),
        st.tuples(st.just("trim"), BLOCK, BLOCK),
        st.tuples(st.just("checkpoint"), st.just(0), st.just(0)),
        st.tuples(st.just("reopen"), st.just(0), st.just(0)),
    ),
    min_size=3,
    max_size=14,
)


async def compare(volume: Volume, model: dict[int, bytes], touched: set[int]) -> None:
    for index in sorted(touched):
        assert await read(volume, index * BLOCK_BYTES, BLOCK_BYTES) == model.get(index, bytes(BLOCK_BYTES)), index


@settings(max_examples=20)
@given(STEPS, st.sampled_from([1 << 50, 6 << 30]))
def test_any_history_of_writes_trims_checkpoints_and_reopenings_reads_like_a_dictionary(
    script: list[tuple[str, int, int]], size: int
) -> None:
    async def body() -> None:
        rng = random.Random(1)
        blocks = size // BLOCK_BYTES
        model: dict[int, bytes] = {}
        touched: set[int] = set()
        parts: list[list[tuple[str, int, int]]] = [[]]
        for step in script:
            if step[0] == "reopen":
                parts.append([])
            else:
                parts[-1].append(step)
        with tempfile.TemporaryDirectory() as directory:
            home = await make_pool(Path(directory))
            for number, part in enumerate(parts):
                async with Pool.open(home, settings=TINY) as pool:
                    volume = await pool.create_volume("v", size) if not number else pool.volume("v")
                    for what, a, b in part:
                        if what == "write":
                            count = min(b, blocks - a % blocks)
                            for index in range(a % blocks, a % blocks + count):
                                model[index] = rng.randbytes(BLOCK_BYTES)
                                touched.add(index)
                                await volume.write(index * BLOCK_BYTES, model[index])
                        elif what == "trim":
                            start, end = sorted((a % blocks, b % blocks))
                            await volume.trim(start * BLOCK_BYTES, (end - start) * BLOCK_BYTES)
                            model = {i: data for i, data in model.items() if not start <= i < end}
                        else:
                            await pool.checkpoint()
                    await compare(volume, model, touched)
            async with Pool.open(home, settings=TINY) as pool:
                await compare(pool.volume("v"), model, touched)
                await settle(pool, 3)
                assert pool.status().volumes[0].mapped_bytes == len(model) * BLOCK_BYTES
                await assert_sound(pool)

    run(body)


def test_a_map_that_does_not_fit_its_cache_is_paged_in_and_out(tmp_path: Path) -> None:
    """64 pages a generation are kept; this map has 700 leaves, all of which change again and again."""

    async def body() -> None:
        async with fresh_pool(tmp_path, settings=TINY) as pool:
            volume = await pool.create_volume("v", 1 << 40)
            rng = random.Random(7)
            leaves = [leaf * 5000 for leaf in range(700)]
            model: dict[int, int] = {}
            for number in range(4):
                rng.shuffle(leaves)
                for leaf in leaves[: 700 if not number else 400]:
                    index = leaf * FANOUT + rng.randrange(FANOUT)
                    model[index] = number * 1_000_000 + leaf
                    await volume.write(index * BLOCK_BYTES, block(model[index]))
                await pool.checkpoint()
                assert len(volume.tree._young) + len(volume.tree._old) < 200
            for index, seed in rng.sample(sorted(model.items()), 500):
                assert await read(volume, index * BLOCK_BYTES, BLOCK_BYTES) == block(seed)
            assert volume.tree.mapped_blocks == len(model)
            await assert_sound(pool)

    run(body)


# -- giving back --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["trim", "delete", "shrink"])
def test_what_was_trimmed_deleted_or_cut_off_is_walked_completely_and_its_space_comes_back(
    tmp_path: Path, how: str
) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            await pool.create_volume("empty", MIB)
            await settle(pool)
            before = pool.status()
            volume = await pool.create_volume("v", 1 << 44)
            for number in range(2000):
                await volume.write(number * 977 * MIB // 4096 * 4096, block(number))
            await pool.checkpoint()
            assert pool.status().used_bytes == 2000 * BLOCK_BYTES
            assert pool.status().metadata_bytes > 2000 * BLOCK_BYTES
            if how == "trim":
                await volume.trim(0, 1 << 44)
            elif how == "shrink":
                await pool.resize_volume("v", 4096)
                await volume.trim(0, 4096)
            else:
                await pool.delete_volume("v")
            await settle(pool)
            after = pool.status()
            assert not pool._engine.dead
            assert (after.used_bytes, after.metadata_bytes) == (before.used_bytes, before.metadata_bytes)
            assert sum(status.mapped_bytes for status in after.volumes) == 0
            assert after.devices[0].free_segments >= before.devices[0].free_segments - 2
            await assert_sound(pool)

    run(body)


def test_trimming_whole_subtrees_reads_none_of_them(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 1 << 44)
            for number in range(1500):
                await volume.write(number << 33 - 3 & ~4095, block(1))
            await pool.checkpoint()
            written = pool._checkpointer.writer.written_pages
            await volume.trim(0, 1 << 44)
            volume.tree.forget()
            await pool.checkpoint()
            assert pool._checkpointer.writer.written_pages - written < 10, "only the top of the tree was rewritten"
            assert volume.tree.mapped_blocks == 0

    run(body)


def test_a_dead_subtree_that_is_not_walked_yet_survives_reopening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiers.checkpoint.DEAD_PAGES_A_CHECKPOINT", 1)
    monkeypatch.setattr("tiers.merge.CHUNK_PAGES", 64)

    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await pool.create_volume("v", 1 << 40)
            for number in range(800):
                await volume.write(number << 22, block(number))
            await pool.checkpoint()
            await pool.delete_volume("v")
            await pool.checkpoint()
            await pool.checkpoint()
        seen = 0
        for _ in range(40):
            async with Pool.open(home, settings=QUIET) as pool:
                seen += bool(pool._engine.dead)
                await assert_sound(pool)
                if not pool._engine.dead:
                    break
        assert seen
        async with Pool.open(home, settings=QUIET) as pool:
            assert not pool._engine.dead
            assert pool.status().used_bytes == 0
            assert pool.status().metadata_bytes == 0

    run(body)


# -- failing --------------------------------------------------------------------------------


def test_a_checkpoint_that_fails_changes_nothing_and_the_next_one_commits_it_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        real = Catalog.commit
        failing = True

        def commit(self: Catalog, change: Any) -> None:
            if failing:
                raise TierError(28, "the catalog's disk is full")
            real(self, change)

        async with Pool.open(home, settings=QUIET) as pool:
            volume = await pool.create_volume("v", 1 << 40)
            doomed = await pool.create_volume("doomed", MIB)
            await volume.write(0, block(0) + block(1))
            await doomed.write(0, block(9))
            await pool.checkpoint()
            monkeypatch.setattr(Catalog, "commit", commit)
            await volume.write(4096, block(2))
            await pool.delete_volume("doomed")
            for attempt in range(3):
                assert "disk is full" in str(await refusal(pool.checkpoint))
                assert pool.status().checkpoint_failure == "the catalog's disk is full"
                await volume.write((10 + attempt) << 30, block(10 + attempt))
                assert await read(volume, 0, 8192) == block(0) + block(2)
            await volume.trim(0, 4096)
            failing = False
            await pool.checkpoint()
            assert pool.status().checkpoint_failure is None
            assert await read(volume, 0, 8192) == bytes(4096) + block(2)
            for attempt in range(3):
                assert await read(volume, (10 + attempt) << 30, 4096) == block(10 + attempt)
            await settle(pool)
            assert pool.status().used_bytes == 4 * BLOCK_BYTES
            await assert_sound(pool)
        async with Pool.open(home, settings=QUIET) as pool:
            assert await read(pool.volume("v"), 0, 8192) == bytes(4096) + block(2)
            await assert_sound(pool)

    run(body)


def test_a_checkpoint_with_nothing_new_is_harmless(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", MIB)
            await volume.write(0, block(1))
            free = pool.status().devices[0].free_segments
            for _ in range(5):
                await pool.checkpoint()
            assert pool.status().devices[0].free_segments >= free - 1
            assert await read(volume, 0, 4096) == block(1)
            await assert_sound(pool)

    run(body)


def test_a_checkpoint_costs_the_same_however_long_the_dead_list_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=1024) as pool:  # its copies have room for that list
            volume = await pool.create_volume("v", MIB)
            monkeypatch.setattr(checkpoint, "DEAD_PAGES_A_CHECKPOINT", 0)
            dead = {1 << 60 | i: (i, 0, 99) for i in range(1_000_000)}
            listed = pool._engine.dead = dict(dead)
            begun_s = time.process_time()
            for i in range(10):
                await volume.write(0, block(i))
                await pool.checkpoint()
            spent_s = time.process_time() - begun_s
            assert pool._engine.dead is listed, "it is changed, not copied"
            assert listed == dead
            listed.clear()
            assert spent_s < 0.5, spent_s

    run(body)


def test_a_dead_list_that_has_been_walked_gives_its_memory_back(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 1024 * MIB)
            for at in range(0, 1024, 2):
                await volume.write(at * MIB, block(at))
            await pool.checkpoint()
            await volume.trim(0, 1024 * MIB)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(checkpoint, "DEAD_PAGES_A_CHECKPOINT", 4)
                await pool.checkpoint()
                assert sys.getsizeof(pool._engine.dead) > 10_000
            await settle(pool)
            assert not pool._engine.dead
            assert sys.getsizeof(pool._engine.dead) < 1000
            await assert_sound(pool)

    run(body)
