"""Damaged map pages end a pool's writing; giving them up costs what lay below them, and nothing else."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from tests.tiers.helpers import QUIET, assert_sound, block, flip, make_pool, open_refusal, read, refusal, run, settle
from tests.tiers.test_check import BLOCKS, filled, place_of_page
from tiers import Pool, Volume, lostpages
from tiers.device import FileDevice
from tiers.layout import BLOCK_BYTES, MIB
from tiers.maptree import FANOUT
from tiers.snapshot import Snapshot

SIZE = 4 * MIB // BLOCK_BYTES
"""Blocks of a volume, of which `filled` writes the first ones. What a lost page said of the others is lost as well."""


@contextmanager
def direct_reads(answer: str) -> Iterator[None]:
    """What a medium says that is read past the page cache."""

    async def refuse(self: FileDevice, offset: int, length: int) -> bytearray:
        raise OSError(errno.EIO, answer)

    with mock.patch.object(FileDevice, "read_direct", refuse):
        yield


async def damage(home: Path, level: int, index: int, *, write: bool) -> None:
    """A pool with the volumes v and w, and a damaged map page of v; `write`: with something new below it in the log."""
    async with Pool.open(home, settings=QUIET) as pool:
        volume = await filled(pool)
        await filled(pool, "w")
        device, offset = await place_of_page(volume, level, index)
    flip(device, offset + 100)
    if write:
        async with Pool.open(home, settings=QUIET) as pool:
            await pool.volume("v").write(256 * BLOCK_BYTES, block(8000))
            await pool.volume("v").flush()
            pool._engine.space.read_only = "it is killed"  # so that no checkpoint ends it


def whole(lost: range = range(0), seed: int = 0) -> dict[int, bytes | None]:
    """What `filled` has written, without what is lost."""
    return {i: None if i in lost else block(i + seed) if i < BLOCKS else bytes(BLOCK_BYTES) for i in range(SIZE)}


async def blocks_of(volume: Volume | Snapshot) -> dict[int, bytes | None]:
    """Each block, or None where it can't be read."""
    found: dict[int, bytes | None] = {}
    for index in range(SIZE):
        try:
            found[index] = await read(volume, index * BLOCK_BYTES, BLOCK_BYTES)
        except OSError as error:
            assert error.errno == errno.EIO
            found[index] = None
    return found


@pytest.mark.parametrize(
    ("level", "index", "lost"),
    [(0, 1, range(FANOUT, 2 * FANOUT)), (0, 0, range(FANOUT)), (1, 0, range(SIZE)), (4, 0, range(SIZE))],
    ids=["second leaf", "first leaf", "above the leaves", "root"],
)
@pytest.mark.parametrize("write", [False, True], ids=["nothing below it to write", "the log has a block below it"])
def test_what_lay_below_the_page_is_lost_all_else_is_there_and_the_pool_takes_writes_again(
    tmp_path: Path, level: int, index: int, lost: range, write: bool
) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        await damage(home, level, index, write=write)
        if write and 256 in lost:
            async with Pool.open(home, settings=QUIET) as pool:
                error = await refusal(lambda: pool.volume("w").write(0, block(1)))
                assert error.errno == errno.EROFS
                step = "`terrace pool check p --give-up-map` gives up what lies below such pages"
                assert str(error).endswith(f"fails its checksum; {step}, and the pool takes writes again")
                assert "restart" not in str(error), "one next step"
                report = await pool.check(True)
                assert any("fails its checksum" in problem for problem in report.problems)
        told: list[tuple[str, str, str]] = []
        opening = Pool.open(home, settings=QUIET, give_up_map=True, events=lambda *event: told.append(event))
        async with opening as pool:
            text = "1 damaged map page(s) were given up, 1 of p/v, with all that lay below them"
            assert told == [("pool", "p", f"pool p: {text}: `terrace pool check p` lists what is lost")]
            assert pool.status().state == "online"
            assert pool.given_up == "1 damaged map page(s) were given up, 1 of p/v, with all that lay below them"
            expected = whole(lost)
            if write:
                expected[256] = block(8000)
            assert await blocks_of(pool.volume("v")) == expected
            assert await blocks_of(pool.volume("w")) == whole()
            gone = sum(found is None for found in expected.values())
            assert sum(loss.length for loss in await pool.losses()) == gone * BLOCK_BYTES
        async with Pool.open(home, settings=QUIET) as pool:
            report = await pool.check(True)
            assert {problem.split(" at byte")[0] for problem in report.problems} == {"p/v"}
            assert all("lost to a device error" in problem for problem in report.problems)
            assert await blocks_of(pool.volume("v")) == expected
            for at in lost:
                await pool.volume("v").write(at * BLOCK_BYTES, block(at))
            await pool.checkpoint()
            await assert_sound(pool)
            assert await pool.losses() == []

    run(body)


def test_a_damaged_page_among_several_is_named_by_its_own_index_with_a_command_that_can_be_run(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        await damage(home, 0, 1, write=False)
        async with Pool.open(home, settings=QUIET) as pool:
            error = await refusal(lambda: pool.volume("v").tree.load(0, [0, 1]))
            assert str(error).startswith("a map page of p/v, level 0, index 1 on ")
            assert " fails its checksum: `terrace pool check p` tells which others do, and with" in str(error)

    run(body)


def test_what_the_lost_pages_named_is_free_again(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        await damage(home, 1, 0, write=False)
        async with Pool.open(home, settings=QUIET, give_up_map=True) as pool:
            segments = pool._engine.segments.by_id.values()
            assert sum(s.live for s in segments if s.kind.name != "MAP") == BLOCKS + sum(
                s.live for s in segments if s.kind.name == "CATALOG"
            )
            assert pool.volume("v").tree.mapped_blocks == 0
            await pool.delete_volume("v")
            await settle(pool)
            await assert_sound(pool)

    run(body)


def test_a_snapshot_keeps_what_it_has_of_its_own_and_loses_what_lay_below_its_page(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await filled(pool)
            await pool.take_snapshots([("v", "s")])
            for index in range(BLOCKS):
                await volume.write(index * BLOCK_BYTES, block(index + 5000))
            await pool.checkpoint()
            snapshot = pool.snapshots()[0]
            device, offset = await place_of_page(snapshot, 0, 0)
        flip(device, offset + 100)
        async with Pool.open(home, settings=QUIET, give_up_map=True) as pool:
            assert pool.given_up is not None
            assert "1 of p/v@s" in pool.given_up
            assert await blocks_of(pool.volume("v")) == whole(seed=5000)
            found = await blocks_of(pool.snapshots()[0])
            assert found == whole(range(FANOUT))
        async with Pool.open(home, settings=QUIET) as pool:
            assert await blocks_of(pool.snapshots()[0]) == found
            await pool.delete_snapshot("v", "s")
            await settle(pool)
            await assert_sound(pool)

    run(body)


def test_a_sound_pool_loses_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            await filled(pool)
        told: list[str] = []
        opening = Pool.open(home, settings=QUIET, give_up_map=True, events=lambda *event: told.append(event[2]))
        async with opening as pool:
            assert pool.given_up == "all its map pages can be read, none was given up" and told == []
            assert await blocks_of(pool.volume("v")) == whole()
            await assert_sound(pool)

    run(body)


def test_a_page_that_is_sound_past_the_page_cache_is_taken_from_there(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        await damage(home, 0, 0, write=False)
        good: list[bytes] = []

        async def as_it_was(self: FileDevice, offset: int, length: int) -> bytearray:
            data = bytearray(await self.read(offset, length))
            data[100] ^= 0x40
            good.append(bytes(data))
            return data

        with mock.patch.object(FileDevice, "read_direct", as_it_was):
            async with Pool.open(home, settings=QUIET, give_up_map=True) as pool:
                assert pool.given_up == "all its map pages can be read, none was given up"
                assert len(good) == 1
        async with Pool.open(home, settings=QUIET) as pool:
            assert await blocks_of(pool.volume("v")) == whole()
            await assert_sound(pool)

    run(body)


def test_a_device_that_answers_nothing_costs_no_page_and_the_pool_stays_as_it_was(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        await damage(home, 0, 0, write=False)
        with direct_reads("the cable"):
            error = await open_refusal(home, give_up_map=True)
        assert error.errno == errno.EIO
        assert "can't be read at all" in str(error)
        assert "--lost" in str(error)
        async with Pool.open(home, settings=QUIET) as pool:
            found = await blocks_of(pool.volume("v"))
            assert found == whole(range(FANOUT))
            assert await pool.losses() == []

    run(body)


def test_more_pages_than_a_failing_medium_loses_are_not_given_up(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        await damage(home, 0, 0, write=False)
        with mock.patch.object(lostpages, "MAX_GIVEN_UP", 0):
            error = await open_refusal(home, give_up_map=True)
        assert error.errno == errno.E2BIG

    run(body)


def test_a_crash_before_the_counts_are_made_anew_costs_space_until_that_is_done_again(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        await damage(home, 0, 0, write=False)
        told: list[str] = []

        async def crash(*args: object) -> bool:
            raise OSError(errno.EIO, "here")

        with mock.patch.object(lostpages, "recount", crash), pytest.raises(OSError, match="here"):
            async with Pool.open(home, settings=QUIET, give_up_map=True, events=lambda *event: told.append(event[2])):
                pass
        assert len(told) == 1 and "1 of p/v," in told[0], "it was given up, whatever comes after"
        async with Pool.open(home, settings=QUIET) as pool:
            report = await pool.check(True)
            assert any("are counted as live" in problem for problem in report.problems)
        async with Pool.open(home, settings=QUIET, give_up_map=True) as pool:
            report = await pool.check(True)
            assert all("lost to a device error" in problem for problem in report.problems)
            await pool.volume("v").trim(0, 4 * MIB)
            await settle(pool)
            await assert_sound(pool)

    run(body)
