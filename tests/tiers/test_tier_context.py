"""`terrace:tier`: what it says of each block, against what the map and the admission of writes say of it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

import tiers.extents
from tests.tiers.helpers import QUIET, block, fresh_pool, make_pool, run
from tests.tiers.test_packed import STAYS_ON_BASE, demote, load, text
from tiers import Policy, Pool, Snapshot, Volume
from tiers.extents import TIER_BASE, TIER_CONTEXT, TIER_FAST, TIER_LOST, TIER_PACKED, TIER_SHARED
from tiers.layout import BAD, BLOCK_BYTES, MIB, SLOT_BITS, UNMAPPED
from tiers.mover import put_moved
from tiers.reader import Reader
from tiers.record import Kind, Op

ANY = 1 << 20


async def told(reader: Reader, first: int, count: int, limit: int = ANY) -> list[int]:
    """The flags of each of these blocks, from as many answers as it takes; each answer keeps the contract."""
    flags: list[int] = []
    while len(flags) < count:
        offset, length = (first + len(flags)) * BLOCK_BYTES, (count - len(flags)) * BLOCK_BYTES
        found = await reader.context_extents(TIER_CONTEXT, offset, length, limit)
        assert 1 <= len(found) <= limit
        assert all(size > 0 and size % BLOCK_BYTES == 0 for size, _ in found)
        assert sum(size for size, _ in found) <= length
        assert all(one[1] != next_one[1] for one, next_one in itertools.pairwise(found))
        flags += [flag for size, flag in found for _ in range(size // BLOCK_BYTES)]
    return flags


def expected(reader: Volume | Snapshot, number: int) -> int:
    """What is to be told of one block, from its entry, by the functions that reads and writes go by."""
    entry = reader.entry_now(number)
    assert entry is not None
    address = entry[0]
    if address == UNMAPPED:
        return 0
    shared = isinstance(reader, Volume) and not reader._is_own(number)
    flags = TIER_SHARED if shared else 0
    if address == BAD:
        return flags | TIER_LOST
    segment = reader._segments[address >> SLOT_BITS]
    flags |= TIER_FAST if segment.device.tier == "fast" else TIER_BASE
    return flags | TIER_PACKED if segment.kind is Kind.PACKED else flags


async def assert_told(rng: random.Random, reader: Volume | Snapshot) -> set[int]:
    """Each block of it is told as expected, in one answer and in many; returns the flags that occurred."""
    count = reader.size_bytes // BLOCK_BYTES
    await load(reader)  # type: ignore[arg-type]
    if isinstance(reader, Volume) and reader.snapshots:
        await reader.snapshots[-1].tree.load(0, range((count >> 8) + 1))
    truth = [expected(reader, number) for number in range(count)]
    assert await told(reader, 0, count) == truth
    first = rng.randrange(count)
    length = rng.randrange(1, count - first + 1)
    assert await told(reader, first, length, rng.choice((1, 2, 5))) == truth[first : first + length]
    return set(truth)


@pytest.mark.parametrize("seed", range(3))
def test_each_block_is_told_as_its_entry_and_the_price_of_a_write_over_it_say(tmp_path: Path, seed: int) -> None:
    size = 3 * MIB
    blocks = size // BLOCK_BYTES

    async def body() -> None:
        rng = random.Random(seed)
        home = await make_pool(tmp_path, fast_mib=64, base_mib=64)
        seen: set[int] = set()
        async with Pool.open(home, settings=QUIET) as pool:
            pool.define_policies(STAYS_ON_BASE)
            volume = await pool.create_volume("v", size)
            family: list[Volume] = [volume]

            async def scribble() -> None:
                chosen = rng.choice(family)
                for _ in range(4):
                    first = rng.randrange(blocks)
                    count = min(rng.choice((1, 2, 30, 300)), blocks - first)
                    data = text(rng.randrange(1000), count * BLOCK_BYTES) if rng.random() < 0.5 else None
                    if rng.random() < 0.25:
                        await chosen.trim(first * BLOCK_BYTES, count * BLOCK_BYTES)
                    else:
                        await chosen.write(first * BLOCK_BYTES, data or rng.randbytes(count * BLOCK_BYTES))

            async def snap() -> None:
                await pool.take_snapshots([("v", f"s{len(pool.snapshots('v'))}")])

            async def clone() -> None:
                if len(family) < 3 and pool.snapshots("v"):
                    family.append(await pool.clone("v", rng.choice(pool.snapshots("v")).short_name, f"c{len(family)}"))

            async def move() -> None:
                await demote(pool)

            steps: list[Callable[[], Awaitable[None]]] = [scribble, scribble, snap, clone, move, pool.checkpoint]
            for number in range(24):
                await (scribble if number < 3 else rng.choice([scribble, *steps]))()
                shown: list[Volume | Snapshot] = [*family, *pool.snapshots("v")]
                for one in shown:
                    seen |= await assert_told(rng, one)
        assert {0, TIER_FAST, TIER_BASE | TIER_PACKED} <= seen
        assert any(flags & TIER_SHARED for flags in seen)

    run(body)


def test_what_is_told_to_be_owned_can_be_overwritten_in_a_full_pool_and_the_rest_takes_space(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=64) as pool:
            volume = await pool.create_volume("v", 16 * MIB)
            await volume.write(0, block(1) * 1024)
            await pool.take_snapshots([("v", "s")])
            await volume.write(512 * BLOCK_BYTES, block(2) * 1024)
            flags = await told(volume, 0, 2048)
            assert flags == [TIER_FAST | TIER_SHARED] * 512 + [TIER_FAST] * 1024 + [0] * 512
            for number in range(2048):
                entry = volume.entry_now(number)
                assert entry is not None
                free = flags[number] != 0 and not flags[number] & (TIER_SHARED | TIER_PACKED)
                assert (volume._new_blocks(number, [entry[0]]) == 0) is free

    run(body)


def test_a_lost_block_is_told_as_lost_and_as_data_to_those_who_ask_for_allocation(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", MIB)
            await volume.write(0, block(1) * 16)
            engine = pool._engine
            engine.append_record(Op.BAD, volume.id, 5, 1)
            put_moved(engine, [(volume, 5, BAD, 0)])
            assert await told(volume, 0, 17) == [TIER_FAST] * 5 + [TIER_LOST] + [TIER_FAST] * 10 + [0]
            assert await volume.extents(0, MIB, ANY) == [(16 * BLOCK_BYTES, 0), (MIB - 16 * BLOCK_BYTES, 3)]

    run(body)


def test_data_is_never_a_hole_though_a_write_over_it_may_find_no_room(tmp_path: Path) -> None:
    """A client that is told HOLE without ZERO may take it that there is nothing to copy: qemu does."""

    async def body() -> None:
        home = await make_pool(tmp_path, fast_mib=64, base_mib=64)
        async with Pool.open(home, settings=QUIET) as pool:
            pool.define_policies({"default": Policy("default", placement="base", stream_cutoff_bytes=0)})
            volume = await pool.create_volume("v", 4 * MIB)
            await volume.write(0, text(1, 2 * MIB))
            await demote(pool)
            await pool.take_snapshots([("v", "s")])
            clone = await pool.clone("v", "s", "c")
            for one in (volume, clone, pool.snapshot("v", "s")):
                assert TIER_BASE | TIER_PACKED in {flags & ~TIER_SHARED for flags in await told(one, 0, 1024)}
                assert await one.extents(0, 4 * MIB, ANY) == [(2 * MIB, 0), (2 * MIB, 3)]

    run(body)


def test_a_range_that_cuts_blocks_is_described_to_the_byte(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 8192 + 512)
            await volume.write(8192, b"y" * 512)
            assert await volume.context_extents(TIER_CONTEXT, 0, 8704, ANY) == [(8192, 0), (512, TIER_FAST)]
            assert await volume.context_extents(TIER_CONTEXT, 8191, 2, ANY) == [(1, 0), (1, TIER_FAST)]
            assert await volume.context_extents(TIER_CONTEXT, 1, 7, 1) == [(7, 0)]

    run(body)


def test_volumes_and_snapshots_offer_the_context_by_name_and_no_others_by_likeness(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", MIB)
            first, _ = [(await pool.take_snapshots([("v", name)]))[0] for name in ("a", "b")]
            for prefix in ("", "terrace:", TIER_CONTEXT):
                assert list(volume.contexts(prefix)) == [TIER_CONTEXT]
                assert TIER_CONTEXT in list(first.contexts(prefix))
            assert list(first.contexts("")) == [TIER_CONTEXT, "terrace:diff:b"]
            assert list(volume.contexts("base:")) == []
            for one in (volume, first):
                assert one.has_context(TIER_CONTEXT)
                assert not one.has_context("terrace:tiers")
                assert not one.has_context("")
            with pytest.raises(FileNotFoundError, match=r"p/v offers no 'terrace:diff:a'"):
                await volume.context_extents("terrace:diff:a", 0, 4096, 1)

    run(body)


def test_one_answer_looks_at_a_bounded_number_of_map_pages_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers.extents, "WALK_LEAVES", 4)

    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 1 << 40)
            await volume.write(0, block(1) * (16 << 8))
            await pool.checkpoint()
            for ask, flags in ((volume.extents, 0), (lambda *a: volume.context_extents(TIER_CONTEXT, *a), TIER_FAST)):
                offset = answers = 0
                while offset < 16 * MIB:
                    (length, found), *rest = await ask(offset, (1 << 40) - offset, ANY)
                    assert found == flags
                    assert length <= 11 * MIB, "three pages, and then one look at up to eight"
                    assert rest in ([], [((1 << 40) - 16 * MIB, 3 if not flags else 0)])
                    offset += length
                    answers += 1
                assert offset == 16 * MIB
                assert answers >= 2

    run(body)
