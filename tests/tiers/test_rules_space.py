"""Rules 7, 9, 10 and 13: reuse of space, merging, huge trims, and bounds. A test or more for each."""

from __future__ import annotations

import contextlib
import errno
import random
from typing import Any

import pytest
import trio

from tests.simulation.machine import SEGMENT_BYTES, Disk, Machine, PowerCutError
from tests.simulation.oracle import BLOCK, Model, Op, read_all, require_sound
from tests.tiers.test_rules_log import QUIET, block, crash, get, machine_of, opened, put
from tiers import Pool, PoolSettings, TierError, Volume
from tiers.record import Kind
from tiers.segments import Segment

GIB = 1 << 30
MIB = 1 << 20
SEGMENT_BLOCKS = SEGMENT_BYTES // BLOCK


def segment_of(volume: Volume, at: int) -> Any:
    entry = volume.entry_now(at)
    assert entry is not None
    return volume._segments[entry[0] >> 24]


async def idle(pool: Pool) -> None:
    """Checkpoints until nothing is left to give back."""
    for _ in range(4):
        await pool.checkpoint()


# -- rule 7 ------------------------------------------------------------------------------------------------------------


def test_an_emptied_segment_is_not_reused_before_a_checkpoint_has_passed_it() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            put(volume, 0, block(1))
            await pool.checkpoint()
            old = segment_of(volume, 0)
            for i in range(200):
                put(volume, i % 60, block(1 + i % 200))
            assert old.pending == 0
            await volume.flush()
            assert old.index not in old.device.free
            await pool.checkpoint()
            assert old.index in old.device.free and old.id not in pool._engine.segments.by_id

    machine.run(main)


def test_a_segment_whose_blocks_were_overwritten_after_the_freeze_outlives_the_commit() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            await pool.checkpoint()
            for i in range(40):
                put(volume, i, block(i + 1))
            change_of = pool._checkpointer._change

            def change(*args: Any) -> Any:
                for i in range(40):  # unsynced, and after the moment that the checkpoint records
                    put(volume, i, block(i + 101))
                return change_of(*args)

            pool._checkpointer._change = change  # type: ignore[method-assign, assignment]
            await pool.checkpoint()
            pool._checkpointer._change = change_of  # type: ignore[method-assign]
            for i in range(40, 60):
                put(volume, i, block(7))  # lands in whatever was set free
            await crash(machine)
        # The medium has the newest writes, and not those before: so these never happened.
        medium = machine.media[0]
        medium.unsynced[:] = medium.unsynced[-10:]
        medium.make_durable(10)
        medium.cache[:] = medium.durable[:]
        machine.kill()
        async with opened(machine) as (pool, volume):
            # The flush of the checkpoint's copy may have made the later ones durable, all of them or none.
            found = [await get(volume, i) for i in range(40)]
            assert found in (list(range(1, 41)), list(range(101, 141)))
            await require_sound(pool)

    machine.run(main)


def test_a_reader_in_a_worker_pins_the_segment_that_it_reads() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            (medium,) = machine.media
            put(volume, 0, block(1))
            await idle(pool)
            segment = segment_of(volume, 0)
            begun, gate = trio.Event(), trio.Event()

            async def hold(offset: int, length: int) -> None:
                medium.before_read = None
                begun.set()
                await gate.wait()

            medium.before_read = hold
            into = bytearray(BLOCK)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(volume.read, 0, BLOCK, memoryview(into))
                await begun.wait()
                for i in range(3 * SEGMENT_BLOCKS):
                    put(volume, i % 60, block(2))
                await idle(pool)
                assert segment.index not in segment.device.free
                for i in range(3 * SEGMENT_BLOCKS):
                    put(volume, i % 60, block(3))
                gate.set()
            assert into == block(1)
            await idle(pool)
            assert segment.id not in pool._engine.segments.by_id

    machine.run(main)


def test_a_read_over_two_devices_survives_that_the_second_is_cleaned_meanwhile() -> None:
    machine = machine_of(Disk("fast", 80, 64 << 10), Disk("fast", 80, 64 << 10))

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            for i in range(60):
                put(volume, i, block(i + 1))
            await idle(pool)
            devices = [segment_of(volume, i).device for i in range(60)]
            assert len({device.index for device in devices}) == 2
            first = devices[0].medium
            begun, gate = trio.Event(), trio.Event()

            async def hold(offset: int, length: int) -> None:
                first.before_read = None
                begun.set()
                await gate.wait()

            first.before_read = hold
            into = bytearray(60 * BLOCK)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(volume.read, 0, len(into), memoryview(into))
                await begun.wait()
                for round_ in range(6):
                    for i in range(60):
                        put(volume, i, block(100 + round_))
                await idle(pool)
                gate.set()
            assert all(into[i * BLOCK] in (i + 1, *range(100, 106)) for i in range(60))

    machine.run(main)


def test_segment_ids_never_come_back() -> None:
    machine = machine_of()

    async def main() -> None:
        seen: set[int] = set()
        for life in range(6):
            async with opened(machine) as (pool, volume):
                table = pool._engine.segments
                taken: list[int] = []
                take = table.take

                def recording(device: Any, kind: Kind, take: Any = take, taken: list[int] = taken) -> Any:
                    segment = take(device, kind)
                    taken.append(segment.id)
                    return segment

                table.take = recording  # type: ignore[method-assign]
                for i in range(3 * SEGMENT_BLOCKS):
                    put(volume, i % 60, block(1 + life))
                if life % 2:
                    await pool.checkpoint()
                assert not seen.intersection(taken)
                seen.update(taken)
                seen.update(table.by_id)
                await crash(machine)
            machine.power_cut()

    machine.run(main)


async def fill_with_holes(pool: Pool, volume: Volume) -> None:
    """Segments that are half live: every other block is overwritten elsewhere."""
    count = volume.size_bytes // BLOCK
    for i in range(count):
        await volume.write(i * BLOCK, block(1 + i % 250))
    await idle(pool)
    for i in range(0, count, 2):
        await volume.write(i * BLOCK, block(1 + (i + 7) % 250))
    await idle(pool)


def holes_content(count: int) -> list[int]:
    return [1 + (i + 7) % 250 if i % 2 == 0 else 1 + i % 250 for i in range(count)]


async def move_everything(pool: Pool, destination: str) -> None:
    """Relocate every sealed data segment, through the cleaner's own operations."""
    cleaner = pool._cleaner
    victims = [
        segment
        for segment in pool._engine.segments.by_id.values()
        if not segment.open and segment.kind is not Kind.MAP and segment.live + segment.pending
    ]
    for victim in victims:
        await cleaner.mover.move_segment(victim, destination)
    await cleaner.mover.apply_staged()


@pytest.mark.parametrize("countdown", [1, 2, 3, 4, 5, 7, 9, 11, 14, 18, 25, 33, 45, None])
def test_moved_blocks_survive_a_power_cut_at_any_step_of_the_move(countdown: int | None) -> None:
    machine = machine_of(Disk("fast", 24), Disk("base", 24))

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 128 * BLOCK)
            await fill_with_holes(pool, volume)
            await volume.flush()
            machine.countdown = countdown
            await move_everything(pool, "base")
            await pool.checkpoint()
            machine.countdown = None
            await crash(machine)
        machine.power_cut()
        async with machine.open() as pool:
            content = await read_all(pool.volume("v"))
            assert [content[i * BLOCK] for i in range(128)] == holes_content(128)
            await require_sound(pool)

    machine.run(main)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("nth", [0, 1, 2, 3])
def test_copies_that_could_not_be_written_are_never_made_true(number: int, nth: int) -> None:
    machine = machine_of(Disk("fast", 24), Disk("base", 24))

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 128 * BLOCK)
            await fill_with_holes(pool, volume)
            base = machine.media[1]
            left = nth

            def fail(offset: int, length: int) -> tuple[int, int] | None:
                nonlocal left
                left -= 1
                return (number, 0) if left < 0 and length > BLOCK else None

            base.on_write = fail
            with contextlib.suppress(OSError):
                await move_everything(pool, "base")
            # What a round of the cleaner does when it meets a full disk: it goes on with what was copied.
            with contextlib.suppress(OSError):
                await pool._cleaner.mover.apply_staged()
            base.on_write = lambda offset, length: None
            content = await read_all(volume)
            assert [content[i * BLOCK] for i in range(128)] == holes_content(128)
            await require_sound(pool)
            await move_everything(pool, "base")
            await idle(pool)
            await require_sound(pool)
            await crash(machine)
        machine.power_cut()
        async with machine.open() as pool:
            content = await read_all(pool.volume("v"))
            assert [content[i * BLOCK] for i in range(128)] == holes_content(128)
            await require_sound(pool)

    machine.run(main)


def test_an_overwrite_between_copy_and_move_wins() -> None:
    machine = machine_of(Disk("fast", 24), Disk("base", 24))

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 64 * BLOCK)
            await fill_with_holes(pool, volume)
            cleaner = pool._cleaner
            for segment in list(pool._engine.segments.by_id.values()):
                if not segment.open and segment.kind is not Kind.MAP and segment.live:
                    await cleaner.mover.move_segment(segment, "base")
            for i in range(0, 64, 3):
                put(volume, i, block(251))
            await volume.trim(BLOCK, BLOCK)
            await cleaner.mover.apply_staged()
            expected = [0 if i == 1 else 251 if i % 3 == 0 else v for i, v in enumerate(holes_content(64))]
            content = await read_all(volume)
            assert [content[i * BLOCK] for i in range(64)] == expected
            await crash(machine)
        machine.kill()
        async with machine.open() as pool:
            content = await read_all(pool.volume("v"))
            assert [content[i * BLOCK] for i in range(64)] == expected
            await require_sound(pool)

    machine.run(main)


def test_a_block_that_rots_moves_as_bad_and_pins_nothing() -> None:
    machine = machine_of(Disk("fast", 24), Disk("base", 24))

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 64 * BLOCK)
            await fill_with_holes(pool, volume)
            segment = segment_of(volume, 11)
            (address, _) = volume.entry_now(11) or (0, 0)
            segment.device.medium.flip(segment.offset(address & 0xFFFFFF) + 5)
            await move_everything(pool, "base")
            await idle(pool)
            assert segment.id not in pool._engine.segments.by_id
            with pytest.raises(OSError) as caught:
                await get(volume, 11)
            assert caught.value.errno == errno.EIO
            assert [await get(volume, i) for i in (10, 12)] == [holes_content(64)[10], holes_content(64)[12]]
            await crash(machine)
        machine.power_cut()
        async with machine.open() as pool:
            volume = pool.volume("v")
            with pytest.raises(OSError):
                await get(volume, 11)
            put(volume, 11, block(3))
            assert await get(volume, 11) == 3

    machine.run(main)


# -- rule 7, the map's own segments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_map_segments_are_emptied_and_no_crash_takes_a_page_with_them(seed: int) -> None:
    machine = Machine((Disk("fast", 90),), seed=seed, settings=QUIET)
    machine.cold_share = 0.3
    rng = random.Random(seed)
    count = 250
    forced = 0

    async def main() -> None:
        nonlocal forced
        durable = [0] * count
        unsure: list[tuple[int, int]] = []
        async with machine.open() as pool:
            await pool.create_volume("v", GIB)
        for _ in range(14):
            with contextlib.suppress(PowerCutError):
                async with machine.open() as pool:
                    volume = pool.volume("v")
                    found = [await get(volume, i * 512) for i in range(count)]
                    prefixes = [list(durable)]
                    for at, value in unsure:
                        prefixes.append([*prefixes[-1][:at], value, *prefixes[-1][at + 1 :]])
                    assert found in prefixes
                    durable, unsure = found, []
                    await require_sound(pool)
                    machine.countdown = rng.choice((20, 60, 150, 400))
                    for _ in range(12):
                        for _ in range(rng.randrange(1, 40)):
                            at, value = rng.randrange(count), rng.randrange(1, 250)
                            unsure.append((at, value))
                            await volume.write(at * 512 * BLOCK, block(value))
                        await pool._cleaner._clean_map()
                        forced += sum(map(len, pool._engine.forced.values()))
                        await pool.checkpoint()
                        for at, value in unsure:
                            durable[at] = value
                        unsure = []
                    machine.countdown = None
                    await crash(machine)
            machine.countdown = None
            machine.power_cut()
        async with machine.open() as pool:
            await require_sound(pool)

    machine.run(main)
    assert forced


def test_map_segments_are_read_for_their_emptying_once_for_each_checkpoint() -> None:
    """A round of the cleaner comes often, and the segments may lie on a slow device."""
    machine = Machine((Disk("fast", 90),), settings=QUIET)
    rng = random.Random(1)
    read: list[int] = []

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", GIB)
            mover = pool._cleaner.mover
            read_segment = mover.read_segment

            async def counted(segment: Segment) -> memoryview:
                read.append(segment.id)
                return await read_segment(segment)

            mover.read_segment = counted  # type: ignore[method-assign]
            emptied = 0
            for _ in range(40):
                for _ in range(30):
                    await volume.write(rng.randrange(250) * 512 * BLOCK, block(rng.randrange(1, 250)))
                read.clear()
                await pool._cleaner._clean_map()
                first, forced = list(read), {i: set(keys) for i, keys in pool._engine.forced.items()}
                await pool._cleaner._clean_map()
                assert read == first, "read again, to find the same"
                assert pool._engine.forced == forced
                await pool.checkpoint()
                emptied += len(first)
                assert all(
                    i not in pool._engine.segments.by_id or not pool._engine.segments.by_id[i].live for i in first
                )
            assert emptied > 2, "each checkpoint makes more to empty"

    machine.run(main)


# -- rule 9 ------------------------------------------------------------------------------------------------------------


def test_a_write_between_the_read_and_the_apply_of_a_merge_is_not_lost() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            (medium,) = machine.media
            put(volume, 0, block(1))
            await idle(pool)
            machine.cold_share = 1.0
            begun, gate = trio.Event(), trio.Event()

            async def hold(offset: int, length: int) -> None:
                medium.before_read = None
                begun.set()
                await gate.wait()

            medium.before_read = hold
            async with trio.open_nursery() as nursery:
                nursery.start_soon(volume.write, 100, b"x" * 50)
                await begun.wait()
                put(volume, 0, block(2))
                gate.set()
            into = bytearray(BLOCK)
            await volume.read(0, BLOCK, memoryview(into))
            assert into == b"\2" * 100 + b"x" * 50 + b"\2" * (BLOCK - 150)

    machine.run(main)


def test_many_merges_of_one_block_at_once_all_take_effect() -> None:
    machine = machine_of()
    machine.cold_share = 0.7
    machine.pauses = 5

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            put(volume, 0, block(1))
            await idle(pool)
            async with trio.open_nursery() as nursery:
                for i in range(40):
                    nursery.start_soon(volume.write, i * 100, bytes([i + 2]) * 100)
            content = await read_all(volume)
            assert content[:4000] == b"".join(bytes([i + 2]) * 100 for i in range(40))
            assert content[4000:BLOCK] == b"\1" * 96

    machine.run(main)


def test_writes_of_one_batch_merge_with_each_other_in_their_order() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (_, volume):
            model = Model(volume.size_bytes)
            batch = [
                (0, b"a" * 5000),
                (10, b"b" * 100),
                (4000, b"c" * 200),
                (BLOCK, b"d" * BLOCK),
                (5000, b"e"),
                (0, b"f"),
            ]
            assert volume.write_now(batch)
            model.returned(Op("batch", list(batch)))
            assert await read_all(volume) == model.content
            await crash(machine)
        machine.kill()
        async with opened(machine) as (_, volume):
            assert await read_all(volume) == model.content

    machine.run(main)


# -- rule 10 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1536 + BLOCK, 2 * BLOCK, 512 + 30 * BLOCK])
def test_a_tail_that_was_cut_off_never_comes_back(size: int) -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            await volume.write(0, b"\7" * volume.size_bytes)
            old = volume.size_bytes
            await pool.resize_volume("v", size)
            await pool.resize_volume("v", old)
            expected = (b"\7" * size).ljust(old, b"\0")
            assert await read_all(volume) == expected
            await crash(machine)
        machine.power_cut()
        async with opened(machine) as (pool, volume):
            assert await read_all(volume) == expected
            await require_sound(pool)

    machine.run(main)


@pytest.mark.parametrize("countdown", range(1, 14))
@pytest.mark.parametrize("power", [True, False], ids=["power cut", "kill"])
def test_a_crash_while_shrinking_leaves_the_old_volume_or_the_new_one(countdown: int, power: bool) -> None:
    machine = machine_of(seed=countdown)

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            content = b"\7" * volume.size_bytes
            await volume.write(0, content)
            await idle(pool)
            machine.cold_share = 1.0
            machine.countdown = countdown
            await pool.resize_volume("v", 1536 + BLOCK)
            machine.countdown = None
            await crash(machine)
        if power:
            machine.power_cut()
        else:
            machine.kill()
        async with opened(machine) as (pool, volume):
            assert await read_all(volume) in (content, content[: 1536 + BLOCK])
            await pool.resize_volume("v", len(content))
            assert await read_all(volume) in (content, content[: 1536 + BLOCK].ljust(len(content), b"\0"))

    machine.run(main)


def test_a_refused_shrink_changes_nothing() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            content = b"\7" * volume.size_bytes
            await volume.write(0, content)
            await idle(pool)
            machine.cold_share = 1.0
            (medium,) = machine.media

            async def somebody_comes(offset: int, length: int) -> None:
                medium.before_read = None
                volume.acquire()

            medium.before_read = somebody_comes
            with pytest.raises(TierError) as caught:
                await pool.resize_volume("v", 1536 + BLOCK)
            assert caught.value.errno == errno.EBUSY
            assert await read_all(volume) == content

    machine.run(main)


def test_trimming_ten_tebibytes_is_one_record_and_its_space_returns_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machine_of(Disk("fast", 60), Disk("base", 60))
    size = 10 << 40

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", size)
            for i in range(300):
                await volume.write(i * (32 << 30), block(1 + i % 250))
            await idle(pool)
            steps, appended = machine.steps, pool._engine.log.appended_bytes
            await volume.trim(0, size)
            assert machine.steps - steps == 1
            assert pool._engine.log.appended_bytes - appended == BLOCK
            await volume.write(5 * (32 << 30), block(77))
            assert await get(volume, 5 * (32 << 30) // BLOCK) == 77
            assert await get(volume, 6 * (32 << 30) // BLOCK) == 0
            monkeypatch.setattr("tiers.checkpoint.DEAD_PAGES_A_CHECKPOINT", 1)
            monkeypatch.setattr("tiers.merge.CHUNK_PAGES", 16)
            await pool._checkpointer._attempt()
            assert pool._engine.dead, "the walk should take several checkpoints"
            await require_sound(pool)
            assert pool._engine.dead
            await crash(machine)
        machine.power_cut()
        async with machine.open() as pool:
            volume = pool.volume("v")
            with trio.fail_after(60):
                while pool._engine.dead:
                    await pool.checkpoint()
            await idle(pool)
            assert await get(volume, 5 * (32 << 30) // BLOCK) == 77
            assert pool.status().used_bytes == BLOCK
            await require_sound(pool)

    machine.run(main)


def test_a_crash_while_the_dead_list_is_walked_gives_every_block_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiers.checkpoint.DEAD_PAGES_A_CHECKPOINT", 3)
    monkeypatch.setattr("tiers.merge.CHUNK_PAGES", 3)
    machine = machine_of(Disk("fast", 60))

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 1 << 40)
            await pool.create_volume("keep", 1 << 20)
            for i in range(40):
                await volume.write(i * (8 << 30), block(1 + i))
            await pool.volume("keep").write(0, block(8) * 20)
            await idle(pool)
            await pool.delete_volume("v")
            await crash(machine)
        for life in range(12):
            machine.power_cut()
            async with machine.open() as pool:
                machine.countdown = 5 + life * 3
                with trio.fail_after(60):
                    while pool._engine.dead:
                        await pool.checkpoint()
                machine.countdown = None
                await crash(machine)
        machine.power_cut()
        async with machine.open() as pool:
            with trio.fail_after(60):
                while pool._engine.dead:
                    await pool.checkpoint()
            await idle(pool)
            assert pool.status().used_bytes == 20 * BLOCK
            assert await get(pool.volume("keep"), 19) == 8
            await require_sound(pool)

    machine.run(main)


# -- rule 13 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("small_leaves", [0, 8192], ids=["points", "patches"])
def test_the_overlay_stays_within_its_bound_while_writers_wait(small_leaves: int) -> None:
    bound = 512
    settings = PoolSettings(overlay_entries=bound, checkpoint_interval_s=1e6, small_volume_leaves=small_leaves)
    machine = Machine((Disk("fast", 200),), seed=5, settings=settings)

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", GIB)
            space = pool._engine.space
            most = 0

            async def writer(first: int) -> None:
                nonlocal most
                for i in range(400):
                    await volume.write((first + i * 37 % 4096) * 16 * BLOCK, block(1 + i % 250))
                    most = max(most, space.active_weight + space.frozen_weight)

            with trio.fail_after(10_000):
                async with trio.open_nursery() as nursery:
                    for n in range(3):
                        nursery.start_soon(writer, n * 4096)
            assert bound // 3 < most <= bound + 64

    machine.run(main)


def test_a_batch_that_the_bound_could_never_admit_is_still_written() -> None:
    machine = Machine(
        (Disk("fast", 60),), seed=6, settings=PoolSettings(overlay_entries=512, checkpoint_interval_s=1e6)
    )

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 8 << 20)
            with trio.fail_after(1000):
                await volume.write(5, b"\3" * (3 << 20))
                await volume.write_zeroes(0, 4 << 20, no_hole=True)

    machine.run(main)


def test_settings_used_here_never_checkpoint_by_themselves() -> None:
    assert QUIET.checkpoint_interval_s > 1e5
