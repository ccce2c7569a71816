"""Mending: what is damaged here is had from another copy, only if it is what was written, and is put right here."""

import errno
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.simulation.machine import Disk, Machine
from tests.tiers.helpers import QUIET, assert_sound, block, flip, fresh_pool, make_pool, read, refusal, run, settle
from tests.tiers.test_check import place_of
from tiers import Pool, ScrubStatus, Volume
from tiers.changes import ChangedExtents
from tiers.layout import BAD, BLOCK_BYTES, FIRST_ADDRESS, MIB, SLOT_MASK, check_of
from tiers.mover import put_moved

BLOCKS = 40
CONTENT = b"".join(block(i) for i in range(BLOCKS))


async def filled(pool: Pool) -> Volume:
    volume = await pool.create_volume("v", MIB)
    await volume.write(0, CONTENT)
    return volume


class Copy:
    """Another copy: has what was written, and says what it was asked for."""

    def __init__(self, content: bytes = CONTENT, *, snapshots: dict[str | None, bytes] | None = None) -> None:
        self.asked: list[tuple[str | None, int]] = []
        self.told: list[tuple[int, int]] = []
        self.content: dict[str | None, bytes] = dict(snapshots or {})
        self.content[None] = content
        self.before: Callable[[], Awaitable[object]] | None = None
        self.honest = True
        self.error: OSError | None = None

    async def fetch(self, snapshot: str | None, block: int, check: int) -> bytes | None:
        self.asked.append((snapshot, block))
        if self.before is not None:
            await self.before()
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        data = self.content.get(snapshot, b"")[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        return data if not self.honest or (data and check_of(data) == check) else None

    def damaged(self, offset: int, length: int) -> None:
        self.told.append((offset, length))


async def damage(volume: Volume, *indices: int) -> None:
    for index in indices:
        device, offset = await place_of(volume, index)
        flip(device, offset + 77)


async def scrub(pool: Pool) -> ScrubStatus:
    await pool.scrubber.start(None)
    while pool.scrubber.running:
        await trio.sleep(0.01)
    status = pool.scrubber.status()
    assert status.state == "finished"
    return status


@pytest.mark.parametrize("snapshot", [False, True], ids=["plain", "with a snapshot"])
def test_a_scrub_repairs_what_another_copy_has_for_whoever_names_it_and_it_stays_so(
    tmp_path: Path, snapshot: bool
) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await filled(pool)
            await pool.set_mirror(volume, b"", {"a": ChangedExtents()})
            if snapshot:
                await pool.take_snapshots([("v", "s")])
            await pool.checkpoint()
            copy = volume.elsewhere = Copy()
            await damage(volume, 3, 4, 5, 9)
            status = await scrub(pool)
            assert (status.errors, status.repaired, status.damage) == (0, 4, [])
            assert status.last is not None and (status.last.errors, status.last.repaired) == (0, 4)
            assert sorted(copy.asked) == [(None, 3), (None, 4), (None, 5), (None, 9)] and not copy.told
            assert volume.healed_blocks == pool.status().volumes[0].healed_blocks == 4
            assert pool.status().devices[0].errors == 4, "the medium is what it is"
            assert not volume.trackers["a"], "what it holds is what it held"
            assert await read(volume, 0, len(CONTENT)) == CONTENT
            again = await scrub(pool)
            assert (again.errors, again.repaired) == (0, 0)
            await assert_sound(pool)
        async with Pool.open(home, settings=QUIET) as pool:
            assert pool.scrubber.status().last == again.last
            assert await read(pool.volume("v"), 0, len(CONTENT)) == CONTENT
            if snapshot:
                assert await read(pool.snapshot("v", "s"), 0, len(CONTENT)) == CONTENT  # type: ignore[arg-type]

    run(body)


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "before the next checkpoint"])
@pytest.mark.parametrize("there", ["the snapshot", "only the volume, which has it still"])
def test_what_only_a_snapshot_names_is_had_from_the_snapshot_of_another_copy_or_from_its_volume(
    tmp_path: Path, there: str, merged: bool
) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            await pool.checkpoint()
            place = await place_of(volume, 3)
            await pool.take_snapshots([("v", "s")])
            await volume.write(3 * BLOCK_BYTES, block(99))
            if merged:
                await pool.checkpoint()
            flip(place[0], place[1] + 77)
            new = CONTENT[: 3 * BLOCK_BYTES] + block(99) + CONTENT[4 * BLOCK_BYTES :]
            if there == "the snapshot":
                copy = Copy(new, snapshots={"s": CONTENT})
            else:
                copy = Copy(CONTENT)
            volume.elsewhere = copy
            status = await scrub(pool)
            assert (status.errors, status.repaired) == (0, 1)
            assert copy.asked[0] == ("s", 3)
            assert await read(pool.snapshot("v", "s"), 0, len(CONTENT)) == CONTENT  # type: ignore[arg-type]
            assert await read(volume, 0, len(CONTENT)) == new
            await assert_sound(pool)

    run(body)


def test_what_is_not_what_was_written_or_is_not_there_is_told_and_stays_an_error_until_it_is_written(
    tmp_path: Path,
) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            await pool.checkpoint()
            await damage(volume, 3)
            liar, poor, short, gone = Copy(CONTENT[::-1]), Copy(b""), Copy(), Copy()
            liar.honest = short.honest = False
            short.content = {None: CONTENT[: 3 * BLOCK_BYTES + 100]}
            gone.error = OSError(errno.ENOTCONN, "nobody is there")
            for copy in (liar, poor, short, gone):
                volume.elsewhere = copy
                status = await scrub(pool)
                assert (status.errors, status.repaired) == (1, 0)
                assert [(d.volume, d.offset, d.length) for d in status.damage] == [("p/v", 3 * BLOCK_BYTES, 4096)]
                assert copy.told == [(3 * BLOCK_BYTES, BLOCK_BYTES)]
                error = await refusal(lambda: read(volume, 0, len(CONTENT)))
                assert error.errno == errno.EIO and f"p/v at byte {3 * BLOCK_BYTES}" in str(error)
            assert volume.healed_blocks == 0
            pool.scrubber.mended("p/v", 0, 16 * BLOCK_BYTES)
            status = pool.scrubber.status()
            assert (status.errors, status.repaired, status.damage) == (0, 1, [])
            assert status.last is not None and (status.last.errors, status.last.repaired) == (0, 1)

    run(body)


def test_of_a_damaged_range_only_what_was_written_anew_is_repaired(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            await pool.checkpoint()
            await damage(volume, 3, 4, 5, 6)
            await scrub(pool)
            pool.scrubber.mended("p/other", 0, MIB)
            pool.scrubber.mended("p/v", 4 * BLOCK_BYTES, 2 * BLOCK_BYTES)
            status = pool.scrubber.status()
            assert (status.errors, status.repaired) == (2, 2)
            assert sorted((d.offset, d.length, d.blocks) for d in status.damage) == [
                (3 * BLOCK_BYTES, BLOCK_BYTES, 1),
                (6 * BLOCK_BYTES, BLOCK_BYTES, 1),
            ]

    run(body)


def test_what_a_client_writes_meanwhile_stays(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            await pool.checkpoint()
            copy = volume.elsewhere = Copy()
            await damage(volume, 3, 4)

            async def write() -> None:
                assert volume.write_now([(3 * BLOCK_BYTES, block(99))])

            copy.before = write
            status = await scrub(pool)
            assert (status.errors, status.repaired) == (0, 1)
            assert await read(volume, 3 * BLOCK_BYTES, 2 * BLOCK_BYTES) == block(99) + block(4)

    run(body)


def test_a_pool_that_takes_no_writes_repairs_nothing_and_says_what_is_damaged(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            await pool.checkpoint()
            volume.elsewhere = Copy()
            await damage(volume, 3)
            pool._engine.space.read_only = "the pool takes no writes, says the test"
            status = await scrub(pool)
            assert (status.errors, status.repaired) == (1, 0)
            pool._engine.space.read_only = None

    run(body)


def test_nobody_is_asked_for_a_lost_block_which_nothing_can_be_compared_with(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await filled(pool)
            await pool.checkpoint()
            copy = volume.elsewhere = Copy()
            put_moved(pool._engine, [(volume, 3, BAD, 0)])
            assert (await scrub(pool)).errors == 0
            assert (await refusal(lambda: read(volume, 3 * BLOCK_BYTES, BLOCK_BYTES))).errno == errno.EIO
            assert not copy.asked

    run(body)


@pytest.mark.parametrize("seed", range(6))
def test_what_was_mended_for_a_volume_and_its_snapshots_outlives_a_power_cut(seed: int) -> None:
    rng = random.Random(seed)
    machine = Machine((Disk("fast"), Disk("base")))
    count = 24
    now: dict[str | None, list[int]] = {None: [0] * count}
    """What each block has, of the volume and by snapshot."""

    def content(name: str | None) -> bytes:
        return b"".join(block(number) if number else bytes(BLOCK_BYTES) for number in now[name])

    async def write(volume: Volume, index: int, number: int) -> None:
        now[None][index] = number
        await volume.write(index * BLOCK_BYTES, block(number))

    async def judge(pool: Pool) -> None:
        assert await read(pool.volume("v"), 0, count * BLOCK_BYTES) == content(None)
        for name in now:
            if name is not None:
                snapshot: Any = pool.snapshot("v", name)
                assert await read(snapshot, 0, count * BLOCK_BYTES) == content(name), name

    async def main() -> None:
        async with machine.open() as pool:
            pool.scrubber.busy_clock = trio.current_time
            volume = await pool.create_volume("v", MIB)
            for step in range(4):
                for _ in range(rng.randrange(4, 30)):
                    await write(volume, rng.randrange(count), rng.randrange(1, 10_000))
                if rng.random() < 0.7 or step == 0:
                    await pool.take_snapshots([("v", f"s{step}")])
                    now[f"s{step}"] = list(now[None])
                if rng.random() < 0.5:
                    await pool.checkpoint()
            # Only what a checkpoint has passed rots: in the log's end nothing tells that from what a power cut took.
            await pool.checkpoint()
            bad: set[int] = set()
            for owner in (volume, *(pool.snapshot("v", name) for name in now if name is not None)):
                addresses, _ = await owner.entries(0, count)  # type: ignore[attr-defined]
                bad.update(address for address in addresses if address >= FIRST_ADDRESS and rng.random() < 0.3)
            for _ in range(rng.randrange(6)):
                await write(volume, rng.randrange(count), rng.randrange(1, 10_000))
            copy = Copy(b"")
            copy.content = {name: content(name) for name in now}
            volume.elsewhere = copy
            for address in bad:
                segment = pool._engine.segments.by_id[address >> 24]
                machine.media[segment.device.index].flip(segment.offset(address & SLOT_MASK) + 77)

            async def meanwhile() -> None:
                if rng.random() < 0.3:
                    await write(volume, rng.randrange(count), rng.randrange(1, 10_000))
                if rng.random() < 0.1:
                    await pool.checkpoint()

            if seed % 2:
                copy.before = meanwhile
            status = await scrub(pool)
            assert status.errors == 0, status.damage
            assert 0 < status.repaired <= len(bad), "some may have been overwritten"
            await judge(pool)
            if rng.random() < 0.5:
                await pool.checkpoint()
            await volume.flush()
            machine.stop()
        machine.power_cut()
        async with machine.open() as pool:
            await judge(pool)
            await settle(pool, 2)
            await judge(pool)
            await assert_sound(pool)

    machine.run(main)
