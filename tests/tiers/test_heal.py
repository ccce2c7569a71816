"""Healing: what can't be read here is had from elsewhere, only if it is what was written, and is put right here too."""

import errno
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from tests.tiers.helpers import QUIET, assert_sound, block, flip, fresh_pool, make_pool, read, refusal, run
from tests.tiers.test_check import place_of
from tiers import Pool, TierError, Volume
from tiers.changes import ChangedExtents
from tiers.layout import BAD, BLOCK_BYTES, MIB
from tiers.mover import put_moved

BLOCKS = 40
CONTENT = b"".join(block(i) for i in range(BLOCKS))


async def filled(pool: Pool) -> Volume:
    volume = await pool.create_volume("v", MIB)
    await volume.write(0, CONTENT)
    return volume


class Elsewhere:
    """Has what was written, and says what it was asked for."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.asked: list[tuple[int, int]] = []
        self.content = content
        self.before: Callable[[], Awaitable[object]] | None = None

    async def __call__(self, first: int, count: int) -> bytes | None:
        self.asked.append((first, count))
        if self.before is not None:
            await self.before()
        await trio.lowlevel.checkpoint()
        return self.content[first * BLOCK_BYTES : (first + count) * BLOCK_BYTES]


async def damage(pool: Pool, volume: Volume, indices: list[int], *, lost: bool) -> None:
    for index in indices:
        if lost:
            put_moved(pool._engine, [(volume, index, BAD, 0)])
        else:
            device, offset = await place_of(volume, index)
            flip(device, offset + 77)


@pytest.mark.parametrize("snapshot", [False, True], ids=["plain", "with a snapshot"])
@pytest.mark.parametrize("lost", [False, True], ids=["damaged", "lost"])
def test_damaged_blocks_are_read_from_elsewhere_once_and_are_sound_then(
    tmp_path: Path, lost: bool, snapshot: bool
) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await filled(pool)
            await pool.set_mirror(volume, b"", {"a": ChangedExtents()})
            if snapshot:
                await pool.take_snapshots([("v", "s")])
            healer = volume.healer = Elsewhere()
            await damage(pool, volume, [3, 4, 5, 9], lost=lost)
            assert await read(volume, 0, len(CONTENT)) == CONTENT
            assert healer.asked == [(3, 3), (9, 1)]
            assert volume.healed_blocks == pool.status().volumes[0].healed_blocks == 4
            assert await read(volume, 0, len(CONTENT)) == CONTENT
            assert volume.healed_blocks == 4
            assert not volume.trackers["a"], "what it holds is what it held"
            if not lost:
                await assert_sound(pool)
        async with Pool.open(home, settings=QUIET) as pool:
            assert await read(pool.volume("v"), 0, len(CONTENT)) == CONTENT
            if snapshot and not lost:
                assert await read(pool.snapshot("v", "s"), 0, len(CONTENT)) == CONTENT  # type: ignore[arg-type]

    run(body)


def test_a_single_block_a_part_of_one_and_a_merge_are_healed_too(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            volume.healer = Elsewhere()
            await damage(pool, volume, [1, 2], lost=False)
            await damage(pool, volume, [7], lost=True)
            into = memoryview(bytearray(BLOCK_BYTES))
            assert not volume.read_now(7 * BLOCK_BYTES, BLOCK_BYTES, into)
            assert await read(volume, 7 * BLOCK_BYTES, BLOCK_BYTES) == block(7)
            assert await read(volume, BLOCK_BYTES + 5, 10) == block(1)[5:15]
            await volume.write(2 * BLOCK_BYTES + 100, b"merged")
            assert await read(volume, 2 * BLOCK_BYTES, BLOCK_BYTES) == block(2)[:100] + b"merged" + block(2)[106:]
            assert volume.healed_blocks == 3

    run(body)


def test_what_is_not_what_was_written_or_is_not_there_is_an_error(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            await damage(pool, volume, [3], lost=False)

            async def refuses(first: int, count: int) -> bytes | None:
                raise OSError(errno.ENOTCONN, "nobody is there")

            async def has_nothing(first: int, count: int) -> bytes | None:
                return None

            async def has_less(first: int, count: int) -> bytes | None:
                return b"less"

            for healer in (refuses, has_nothing, has_less, Elsewhere(CONTENT[BLOCK_BYTES:] + bytes(BLOCK_BYTES))):
                volume.healer = healer
                error = await refusal(lambda: read(volume, 0, len(CONTENT)))
                assert error.errno == errno.EIO
                assert f"p/v at byte {3 * BLOCK_BYTES}" in str(error)
            assert volume.healed_blocks == 0
            volume.healer = None
            assert (await refusal(lambda: read(volume, 3 * BLOCK_BYTES, BLOCK_BYTES))).errno == errno.EIO

    run(body)


def test_what_a_client_writes_meanwhile_stays(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            healer = volume.healer = Elsewhere()
            await damage(pool, volume, [3, 4], lost=False)

            async def write() -> None:
                assert volume.write_now([(3 * BLOCK_BYTES, block(99))])

            healer.before = write
            found = await read(volume, 3 * BLOCK_BYTES, 2 * BLOCK_BYTES)
            assert found == block(99) + block(4)
            assert await read(volume, 3 * BLOCK_BYTES, 2 * BLOCK_BYTES) == found

    run(body)


def test_what_cannot_be_written_is_returned_all_the_same(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            volume.healer = Elsewhere()
            await damage(pool, volume, [3], lost=False)
            pool._engine.space.read_only = "the pool takes no writes, says the test"
            assert await read(volume, 0, len(CONTENT)) == CONTENT
            assert await read(volume, 0, len(CONTENT)) == CONTENT
            assert volume.healed_blocks == 2
            pool._engine.space.read_only = None

    run(body)


@pytest.mark.parametrize("known", [True, False], ids=["elsewhere", "nowhere"])
def test_a_scrub_heals_and_tells_only_of_what_stays_damaged(tmp_path: Path, known: bool) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            await pool.checkpoint()
            await damage(pool, volume, [3, 17], lost=False)
            volume.healer = Elsewhere(CONTENT if known else CONTENT[::-1])
            await pool.scrubber.start(None)
            while pool.scrubber.running:
                await trio.sleep(0.01)
            status = pool.scrubber.status()
            assert status.state == "finished"
            assert [d.offset for d in status.damage] == ([] if known else [3 * BLOCK_BYTES, 17 * BLOCK_BYTES])
            assert volume.healed_blocks == (2 if known else 0)
            if known:
                volume.healer = None
                assert await read(volume, 0, len(CONTENT)) == CONTENT

    run(body)


def test_a_clone_heals_what_it_has_of_its_origin(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            await pool.take_snapshots([("v", "s")])
            clone = await pool.clone("v", "s", "c")
            clone.healer = Elsewhere()
            await damage(pool, volume, [3], lost=False)
            assert await read(clone, 0, len(CONTENT)) == CONTENT
            clone.healer = None
            await pool.checkpoint()
            assert await read(clone, 0, len(CONTENT)) == CONTENT
            with pytest.raises(TierError):
                await read(volume, 0, len(CONTENT))

    run(body)
