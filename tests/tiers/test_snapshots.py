"""Snapshots and clones, case by case; programs of all of it at random are in `tests.simulation.versions`."""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
import trio

from tests.simulation.corruption import move_everything
from tests.simulation.machine import Disk, Machine, PowerCutError
from tests.simulation.oracle import require_sound
from tests.tiers.helpers import refusal
from tests.tiers.test_promotion import BLOCKS, demoted, machine_of, read, seal, tiers_of, whole
from tiers import Pool, Volume
from tiers.kept import LEAST_MERGED, KeptLeaves
from tiers.layout import BLOCK_BYTES, INHERITED, ZEROED
from tiers.maptree import EMPTY_PAGE, FANOUT, page_of
from tiers.reader import Reader
from tiers.snapshot import compose

LEAF_BYTES = FANOUT * BLOCK_BYTES


def stamp(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK_BYTES // 8)


async def write(volume: Volume, block: int, number: int, count: int = 1) -> None:
    await volume.write(block * BLOCK_BYTES, stamp(number) * count)


async def stamps(reader: Reader, *blocks: int) -> list[int]:
    found = []
    for block in blocks:
        into = bytearray(BLOCK_BYTES)
        await reader.read(block * BLOCK_BYTES, BLOCK_BYTES, memoryview(into))
        found.append(int.from_bytes(into[:8], "little"))
    return found


def run(body: Callable[[Pool], Awaitable[None]], *disks: Disk) -> None:
    """A test on a fresh pool, which is sound afterwards, and after a kill and a replay too."""
    machine = Machine(disks or (Disk("fast", 60), Disk("base", 60)), seed=3)

    async def main() -> None:
        async with machine.open() as pool:
            await body(pool)
            await require_sound(pool)
            machine.stop()
            await trio.lowlevel.checkpoint()

    with contextlib.suppress(PowerCutError):  # the machine was stopped
        machine.run(main)
    machine.kill()

    async def again() -> None:
        async with machine.open() as pool:
            await require_sound(pool)

    machine.run(again)


# -- what is seen ------------------------------------------------------------------------------------------------------


def page(entries: dict[int, int]) -> memoryview:
    words = np.zeros(2 * FANOUT, np.uint64)
    for slot, address in entries.items():
        words[slot], words[FANOUT + slot] = address, address + 1 if address >> 24 else 0
    return page_of(words.tobytes())


def test_the_first_layer_that_says_something_counts() -> None:
    one, two, three = 1 << 24, 2 << 24, 3 << 24
    layers = [page({0: one, 4: ZEROED, 5: INHERITED}), page({0: two, 1: two, 4: two, 5: two, 6: ZEROED})]
    below = page({0: three, 1: three, 2: three, 4: three, 5: three, 6: three})
    seen = compose(layers, below)
    assert seen[:7].tolist() == [one, two, three, 0, 0, three, 0]
    assert seen[FANOUT : FANOUT + 3].tolist() == [one + 1, two + 1, three + 1]
    assert compose(layers, EMPTY_PAGE)[:7].tolist() == [one, two, 0, 0, 0, 0, 0]
    assert compose([EMPTY_PAGE], below) is below


def test_an_index_of_kept_leaves_names_all_that_were_added() -> None:
    rng = random.Random(1)
    index = KeptLeaves()
    known: dict[int, set[int]] = {}
    for number in range(1, 60):
        leaves = rng.sample(range(400), rng.randrange(1, 200))
        if number == 30:
            leaves = list(range(500, 500 + LEAST_MERGED + 1))
        index.add(number, np.array(sorted(leaves), np.uint64))
        for leaf in leaves:
            known.setdefault(leaf, set()).add(number)
    for leaf in (*range(401), 500, 4596, 4597):
        assert index.ids(leaf) == sorted(known.get(leaf, ()))
    assert index.next_leaf(401) == 500
    assert index.next_leaf(4597) is None
    wanted = sorted(leaf for leaf, ids in known.items() if 10 <= leaf < 390 and any(20 <= i < 25 for i in ids))
    assert index.leaves_of(20, 25, 10, 390) == wanted


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_what_is_announced_as_exclusive_comes_back_and_the_rest_stays() -> None:
    async def body(pool: Pool) -> None:
        volume = await pool.create_volume("v", 4 * LEAF_BYTES)
        for number in range(1, 5):
            await write(volume, 0, number, 10 * number)
            await pool.take_snapshots([("v", f"s{number}")])
        await write(volume, 0, 9, 100)
        await pool.checkpoint()
        sizes = {one.snapshot: one.exclusive_bytes // BLOCK_BYTES for one in await pool.snapshot_status("v")}
        assert sizes == {"s1": 10, "s2": 20, "s3": 30, "s4": 40}
        before = pool._engine.segments.live
        await pool.delete_snapshot("v", "s2")
        for _ in range(4):
            await pool.checkpoint()
        assert before - pool._engine.segments.live == 20
        assert await stamps(pool.snapshot("v", "s3"), 0, 29, 30) == [3, 3, 0]
        assert await stamps(pool.snapshot("v", "s1"), 0, 10) == [1, 0]

    run(body)


def test_what_no_clone_of_a_hidden_snapshot_needs_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiers.merge.THIN_BLOCKS", 8)

    async def body(pool: Pool) -> None:
        volume = await pool.create_volume("v", 2 * LEAF_BYTES)
        await write(volume, 0, 1, 300)
        await pool.take_snapshots([("v", "s")])
        clones = [await pool.clone("v", "s", name) for name in ("one", "two")]
        await write(volume, 0, 2, 300)
        await pool.delete_snapshot("v", "s")
        await pool.checkpoint()
        before = pool._engine.segments.live
        for number, clone in enumerate(clones, 3):
            await write(clone, 0, number, 100)
            await pool.checkpoint()
        await write(clones[0], 200, 5, 20)  # the other needs these
        for _ in range(3):
            await pool.checkpoint()
        # 220 new blocks of the clones, and 100 that none of them needs any more.
        assert pool._engine.segments.live - before == 220 - 100
        assert await stamps(clones[1], 0, 99, 100, 200, 299, 300) == [4, 4, 1, 1, 1, 0]

    run(body)


def test_a_long_trim_for_which_a_pool_has_no_room_changes_nothing_and_zeroing_says_so() -> None:
    async def body(pool: Pool) -> None:
        volume = await pool.create_volume("v", 64 * LEAF_BYTES)
        for leaf in range(0, 64):
            await write(volume, leaf * FANOUT, leaf + 1)
        await pool.take_snapshots([("v", "s")])
        engine = pool._engine
        honest, engine.space.has_room_for_pages = engine.space.has_room_for_pages, lambda pages: False  # type: ignore[method-assign]
        await volume.trim(0, 64 * LEAF_BYTES)
        assert await stamps(volume, 0, 63 * FANOUT) == [1, 64]
        error = await refusal(lambda: volume.write_zeroes(0, 64 * LEAF_BYTES, no_hole=False))
        assert error.errno == errno.ENOSPC
        engine.space.has_room_for_pages = honest  # type: ignore[method-assign]
        await volume.trim(0, 64 * LEAF_BYTES)
        assert engine.space.active_pages
        await pool.checkpoint()
        assert not engine.space.active_pages and not engine.space.frozen_pages
        assert await stamps(volume, 0, 63 * FANOUT) == [0, 0]
        assert await stamps(pool.snapshot("v", "s"), 0, 63 * FANOUT) == [1, 64]

    run(body)


def test_hundreds_of_snapshots_are_taken_seen_and_deleted() -> None:
    async def body(pool: Pool) -> None:
        volume = await pool.create_volume("v", LEAF_BYTES)
        for number in range(300):
            await write(volume, number % 200, number + 1)
            await pool.take_snapshots([("v", f"s{number}")])
        assert await stamps(pool.snapshot("v", "s0"), 0, 1) == [1, 0]
        assert await stamps(pool.snapshot("v", "s250"), 50, 51, 199) == [251, 52, 200]
        await pool.delete_snapshots([("v", f"s{number}") for number in range(1, 299)])
        for _ in range(20):
            await pool.checkpoint()
        assert len(pool.snapshots("v")) == 2
        assert len(pool._engine.lineage.snapshots) == 2
        assert await stamps(pool.snapshot("v", "s0"), 0, 1) == [1, 0]
        assert await stamps(pool.snapshot("v", "s299"), 99, 100) == [300, 101]

    run(body, Disk("fast", 160))


# -- moves -----------------------------------------------------------------------------------------------------------


def test_blocks_that_snapshots_name_move_once_and_are_read_by_all() -> None:
    async def body(pool: Pool) -> None:
        volume = await pool.create_volume("v", LEAF_BYTES)
        await write(volume, 0, 1, 100)
        for number in range(4):
            await pool.take_snapshots([("v", f"s{number}")])
            await write(volume, 10 * number, 2 + number, 10)
        await pool._cleaner.mover.apply_staged()
        pool._engine.log.roll()
        await pool.checkpoint()
        moved = pool._engine.moved_blocks
        await move_everything(pool, "base")
        assert pool._engine.moved_blocks - moved == 100 + 40
        for _ in range(2):  # before and after the checkpoint that puts the new places into the trees
            assert await stamps(pool.snapshot("v", "s0"), 0, 35, 99) == [1, 1, 1]
            assert await stamps(pool.snapshot("v", "s3"), 0, 10, 35, 99) == [2, 3, 1, 1]
            assert await stamps(volume, 0, 35, 99) == [2, 5, 1]
            await pool.checkpoint()
            assert not pool._engine.relocations

    run(body)


def test_a_promoted_block_is_moved_for_the_snapshots_too() -> None:
    machine = machine_of()

    async def main() -> None:
        async with demoted(machine) as (pool, volume, promoter):
            await pool.take_snapshots([("v", "s")])
            before = pool._engine.segments.live
            for block in range(20):
                await read(volume, block)
            await trio.sleep(1)
            assert promoter.promoted_blocks == 20
            assert tiers_of(volume, range(20)) == {"fast"}
            await pool.checkpoint()
            assert pool._engine.segments.live == before  # moved, not copied
            await write(volume, 0, 7)
            await seal(pool)
            into = bytearray(BLOCKS * BLOCK_BYTES)
            await pool.snapshot("v", "s").read(0, len(into), memoryview(into))
            assert into == whole(1)
            for block in range(20, 40):
                await read(volume, block)
            await trio.sleep(1)
            machine.stop()  # with promotions that only the log has
            await trio.lowlevel.checkpoint()

    with contextlib.suppress(PowerCutError):  # the machine was stopped
        machine.run(main)
    machine.kill()

    async def again() -> None:
        async with machine.open() as pool:
            into = bytearray(BLOCKS * BLOCK_BYTES)
            await pool.snapshot("v", "s").read(0, len(into), memoryview(into))
            assert into == whole(1)
            await read(pool.volume("v"), 1)  # for its page of the map
            assert tiers_of(pool.volume("v"), range(1, 40)) == {"fast"}
            await require_sound(pool)

    machine.run(again)
