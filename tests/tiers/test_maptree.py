"""The paged map: holes, levels, the shared bound on cached pages, and what happens when the tree is replaced."""

from pathlib import Path

import trio

from tests.tiers.helpers import QUIET, block, flip, fresh_pool, make_pool, read, refusal, run
from tiers import Pool
from tiers.layout import BLOCK_BYTES, check_of
from tiers.maptree import EMPTY_PAGE, FANOUT, ROOT_LEVEL, MapTree, PageCache, page_key, page_of
from tiers.segments import SegmentTable


def test_a_page_is_256_addresses_and_their_checks() -> None:
    raw = b"".join(number.to_bytes(8, "little") for number in range(512))
    page = page_of(raw)
    assert (page[0], page[255], page[FANOUT], page[511]) == (0, 255, 256, 511)
    assert page.readonly
    assert EMPTY_PAGE.nbytes == BLOCK_BYTES
    assert not any(EMPTY_PAGE)


def test_no_two_pages_of_a_tree_have_the_same_key() -> None:
    keys = {page_key(level, index) for level in range(ROOT_LEVEL + 1) for index in (0, 1, 255, 256, (1 << 32) - 1)}
    assert len(keys) == 5 * (ROOT_LEVEL + 1)


def test_an_empty_tree_knows_without_reading_that_all_is_a_hole() -> None:
    tree = MapTree("p/v", SegmentTable([]), PageCache(0))
    for index in (0, 1, 1 << 20, (1 << 32) - 1):
        assert tree.leaf_now(index) is EMPTY_PAGE
    for level in range(ROOT_LEVEL + 1):
        assert tree.page_now(level, 0) is EMPTY_PAGE
    assert tree.entry_of_page_now(ROOT_LEVEL, 0) == (0, 0)

    async def body() -> None:
        assert await tree.load(0, [5, 7]) == {5: EMPTY_PAGE, 7: EMPTY_PAGE}

    run(body)


def test_cached_pages_are_bounded_over_all_trees_and_a_page_in_use_survives() -> None:
    cache = PageCache(0)
    trees = [MapTree(f"p/{number}", SegmentTable([]), cache, root=(1 << 24 | 1, 1)) for number in range(3)]
    page = page_of(bytes(BLOCK_BYTES))
    trees[0].replace_page(0, 0, page)
    for index in range(1, 3000):
        trees[index % 3].replace_page(0, index, page)
        assert trees[0].leaf_now(0) is page, "used all the time"
        assert sum(len(tree._young) + len(tree._old) for tree in trees) <= 2 * 64 + 3
    assert trees[1].leaf_now(1) is None, "not used for long"
    trees[1].close()
    for index in range(200):
        trees[2].replace_page(0, index, page)
    assert not trees[1]._young


def test_a_bigger_cache_keeps_more() -> None:
    cache = PageCache(4 << 20)
    tree = MapTree("p/v", SegmentTable([]), cache, root=(1 << 24 | 1, 1))
    for index in range(450):
        tree.replace_page(0, index, page_of(bytes(BLOCK_BYTES)))
    assert all(tree.leaf_now(index) is not None for index in range(450))


def test_every_page_is_covered_by_its_parents_check(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 1 << 50)
            last = (1 << 50) - BLOCK_BYTES
            for offset in (0, 255 * BLOCK_BYTES, 1 << 20, 1 << 28, 1 << 36, last):
                await volume.write(offset, block(offset))
            await pool.checkpoint()
            tree = volume.tree
            tree.forget()
            for index in (0, 1, (last >> 20)):
                at = index
                page = (await tree.load(0, [index]))[index]
                for level in range(ROOT_LEVEL + 1):
                    entry = tree.entry_of_page_now(level, at)
                    assert entry is not None
                    assert entry[1] == check_of(bytes(page.cast("B")))
                    at >>= 8
                    if level < ROOT_LEVEL:
                        page = (await tree.load(level + 1, [at]))[at]
            assert tree.leaf_now(2) is EMPTY_PAGE
            assert tree.leaf_now(1 << 20) is EMPTY_PAGE, "a hole is known from its nearest cached ancestor"
            assert await read(volume, last, BLOCK_BYTES) == block(last)
            assert await read(volume, last - BLOCK_BYTES, BLOCK_BYTES) == bytes(BLOCK_BYTES)

    run(body)


def test_a_damaged_page_is_not_cached_and_can_be_read_once_it_is_whole_again(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await pool.create_volume("v", 1 << 30)
            await volume.write(0, block(1))
            await pool.checkpoint()
            address, _ = volume.tree.root
            segment = volume._engine.segments.by_id[address >> 24]
            offset = segment.offset(address & 0xFFFFFF)
            volume.tree.forget()
            flip(tmp_path / "fast.img", offset)
            for _ in range(2):
                assert "fails its checksum" in str(await refusal(lambda: read(volume, 0, 1)))
            flip(tmp_path / "fast.img", offset)
            assert await read(volume, 0, BLOCK_BYTES) == block(1)

    run(body)


def test_reading_while_checkpoints_replace_the_tree_always_finds_the_newest_bytes(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 1 << 34)
            newest: dict[int, int] = {}
            stop = False

            async def reader(shift: int) -> None:
                number = shift
                while not stop:
                    number += 7
                    index = number % 40 << 20
                    before = newest.get(index)
                    found = await read(volume, index, BLOCK_BYTES)
                    after = newest.get(index)
                    if before == after:
                        assert found == (bytes(BLOCK_BYTES) if before is None else block(before))
                    await trio.lowlevel.checkpoint()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader, 0)
                nursery.start_soon(reader, 3)
                for number in range(400):
                    index = number * 11 % 40 << 20
                    await volume.write(index, block(number))
                    newest[index] = number
                    if number % 10 == 0:
                        await pool.checkpoint()
                    if number % 7 == 0:
                        volume.tree.forget()
                    await trio.lowlevel.checkpoint()
                stop = True

    run(body)
