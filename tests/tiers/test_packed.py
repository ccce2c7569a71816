"""Packed data on the base tier: what clients wrote comes back, whatever is overwritten, moved, damaged or crashed."""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import trio

import tiers.reader
from tests.simulation.machine import Disk, Machine, PowerCutError
from tests.simulation.medium import SECTOR
from tests.simulation.oracle import BLOCK, Model, Op, read_all, require_sound
from tests.tiers.helpers import QUIET, assert_sound, flip, fresh_pool, make_pool, read, refusal, run, settle
from tests.tiers.test_rebuild_simulated import lose_catalog
from tiers import Policy, Pool, PoolSettings, Volume
from tiers.cleaner import _worth_moving_below
from tiers.frames import CACHE_BYTES, frame_of, index_of, unpack_all
from tiers.layout import BAD, MIB, SLOT_BITS
from tiers.mover import Mover
from tiers.placement import Move as CleanerMove
from tiers.record import Kind
from tiers.segments import Segment

STAYS_ON_BASE = {"default": Policy("default", placement="base", stream_cutoff_bytes=0)}

WORDS = [
    bytes(random.Random(seed).choices(b"abcdefghijklmnopqrstuvwxyz", k=random.Random(-seed).randrange(2, 11)))
    for seed in range(4000)
]


def text(seed: int, length: int) -> bytes:
    """Words, some much more frequent than others: compresses like prose."""
    rng = random.Random(seed)
    weights = [1 / (i + 1) for i in range(len(WORDS))]
    out = bytearray()
    while len(out) < length:
        out += b" ".join(rng.choices(WORDS, weights, k=2000)) + b".\n"
    return bytes(out[:length])


def mixed(seed: int, length: int) -> bytes:
    """Runs of text and runs of noise, and some zeros."""
    rng = random.Random(seed)
    out = bytearray()
    while len(out) < length:
        size = rng.randrange(1, 40) * BLOCK
        kind = rng.random()
        out += text(seed + len(out), size) if kind < 0.6 else rng.randbytes(size) if kind < 0.9 else bytes(size)
    return bytes(out[:length])


def victims(pool: Pool, *tiers: str) -> list[Segment]:
    """The sealed data segments of these tiers that hold something live."""
    return [
        segment
        for segment in pool._engine.segments.by_id.values()
        if segment.device.tier in tiers
        and not segment.open
        and segment.kind not in (Kind.MAP, Kind.CATALOG)
        and segment.live + segment.pending
    ]


async def move(pool: Pool, chosen: Sequence[Segment], destination: str) -> None:
    """Empty these segments, into fresh ones."""
    mover = Mover(pool._engine)  # the cleaner uses its own meanwhile
    for victim in chosen:
        if pool._engine.segments.by_id.get(victim.id) is victim:
            await mover.move_segment(victim, destination)
    await mover.apply_staged()
    mover.seal_all()


async def demote(pool: Pool) -> None:
    """Move everything that is on the fast tier to base, packed where it pays."""
    pool._engine.log.roll()
    await pool.checkpoint()
    await move(pool, victims(pool, "fast"), "base")
    await pool.checkpoint()


def packed_blocks(volume: Volume) -> dict[int, int]:
    """Block -> address, of those that lie in frames."""
    found = {}
    for block in range(volume.size_bytes // BLOCK):
        entry = volume.entry_now(block)
        assert entry is not None
        if entry[0] > BAD and volume._segments[entry[0] >> SLOT_BITS].kind is Kind.PACKED:
            found[block] = entry[0]
    return found


async def load(volume: Volume) -> None:
    """Bring the volume's map into memory, for `entry_now`."""
    await volume.entries(0, volume.size_bytes // BLOCK)


# -- reading -----------------------------------------------------------------------------------------------------------


def test_text_is_packed_on_base_and_reads_as_it_was(tmp_path: Path) -> None:
    size = 12 * MIB
    content = text(1, size)

    async def check(pool: Pool, volume: Volume) -> None:
        await load(volume)
        assert len(packed_blocks(volume)) > size // BLOCK - 8, "a block that is left over stays raw"
        assert await read(volume, 0, size) == content
        rng = random.Random(3)
        for _ in range(200):
            offset, length = rng.randrange(size - 70000), rng.choice((1, 512, 4096, 5000, 65536))
            offset &= rng.choice((-1, -512, -4096))
            assert await read(volume, offset, length) == content[offset : offset + length]
            into = bytearray(length)
            assert volume.read_now(offset, length, memoryview(into)), "what was just read is kept"
            assert into == content[offset : offset + length]
        await volume.cache(0, size)
        extents = await volume.extents(0, size, 10)
        assert extents == [(size, 0)]

    async def body() -> None:
        home = await make_pool(tmp_path, fast_mib=64, base_mib=64)
        async with Pool.open(home, settings=QUIET) as pool:
            pool.define_policies(STAYS_ON_BASE)
            volume = await pool.create_volume("v", size)
            await volume.write(0, content)
            await demote(pool)
            await check(pool, volume)
            await assert_sound(pool)
            used = pool.status().used_bytes
            assert used <= 0.45 * size
            assert {d.tier: d.live_bytes for d in pool.status().devices}["base"] >= used
        async with Pool.open(home, settings=QUIET) as pool:
            pool.define_policies(STAYS_ON_BASE)
            await check(pool, pool.volume("v"))
            await assert_sound(pool)
            assert pool.status().used_bytes == used

    run(body)


def test_noise_stays_raw_and_costs_no_more_than_before(tmp_path: Path) -> None:
    size = 12 * MIB
    noise = random.Random(1).randbytes(size)

    async def used_by(level: int) -> int:
        directory = tmp_path / f"level-{level}"
        directory.mkdir()
        settings = PoolSettings(checkpoint_interval_s=3600.0, compression_level=level)
        async with fresh_pool(directory, fast_mib=64, base_mib=64, settings=settings) as pool:
            volume = await pool.create_volume("v", size)
            await volume.write(0, noise)
            await demote(pool)
            assert await read(volume, 0, size) == noise
            assert {segment.kind for segment in victims(pool, "base")} <= {Kind.MOVED}
            return sum(s.used - 1 for s in pool._engine.segments.by_id.values() if s.kind is Kind.MOVED) * BLOCK

    async def body() -> None:
        raw, packed = await used_by(0), await used_by(3)
        assert packed <= 1.01 * raw

    run(body)


def test_a_sequential_reader_unpacks_each_frame_once_and_what_is_kept_is_bounded(tmp_path: Path) -> None:
    size = 48 * MIB
    unpacked = 0

    def counted(frames: Sequence[bytes]) -> list[bytes]:
        nonlocal unpacked
        unpacked += len(frames)
        return unpack_all(frames)

    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=96, base_mib=64) as pool:
            volume = await pool.create_volume("v", size)
            piece = text(4, MIB)
            for at in range(0, size, MIB):
                await volume.write(at, piece)
            await demote(pool)
            await load(volume)
            frames = {frame_of(address) for address in packed_blocks(volume).values()}
            into = memoryview(bytearray(BLOCK))
            with mock.patch.object(tiers.reader, "unpack_all", counted):
                for at in range(0, size, BLOCK):
                    if not volume.read_now(at, BLOCK, into):
                        await volume.read(at, BLOCK, into)
                    assert into == piece[at % MIB : at % MIB + BLOCK]
            assert unpacked == len(frames)
            assert CACHE_BYTES - (128 << 10) <= pool._engine.frames.bytes <= CACHE_BYTES

    run(body)


def test_reads_of_a_closed_pool_are_errors_even_of_what_was_kept(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=64, base_mib=64) as pool:
            volume = await pool.create_volume("v", MIB)
            await volume.write(0, text(5, MIB))
            await demote(pool)
            await read(volume, 0, MIB)
        assert not volume.read_now(0, BLOCK, memoryview(bytearray(BLOCK)))
        assert (await refusal(lambda: read(volume, 0, BLOCK))).errno == errno.EBADF

    run(body)


# -- changing ----------------------------------------------------------------------------------------------------------


def test_overwrites_trims_and_merges_inside_frames_and_every_kind_of_move(tmp_path: Path) -> None:
    size = 4 * MIB

    async def body() -> None:
        home = await make_pool(tmp_path, fast_mib=64, base_mib=64)
        rng = random.Random(7)
        content = bytearray(mixed(7, size))
        for life in range(3):
            async with Pool.open(home, settings=QUIET) as pool:
                if life == 0:
                    volume = await pool.create_volume("v", size)
                    await volume.write(0, bytes(content))
                volume = pool.volume("v")
                for round_ in range(4):
                    await demote(pool)
                    await load(volume)
                    assert packed_blocks(volume)
                    assert await read(volume, 0, size) == content
                    for i in range(60):
                        offset = rng.randrange(size - 40000)
                        length = rng.choice((100, 512, BLOCK, 3 * BLOCK + 7, 9 * BLOCK))
                        if i % 3:
                            offset -= offset % BLOCK
                        new = mixed(i * 31 + round_, length) if i % 5 else bytes(length)
                        content[offset : offset + length] = new
                        if not volume.write_now([(offset, new)]):
                            await volume.write(offset, new)
                        if i % 4 == 0:
                            first, count = rng.randrange(size // BLOCK - 8), rng.randrange(1, 8)
                            content[first * BLOCK : (first + count) * BLOCK] = bytes(count * BLOCK)
                            await volume.trim(first * BLOCK, count * BLOCK)
                    assert await read(volume, 0, size) == content
                    await pool.checkpoint()
                    await assert_sound(pool)
                    # Base is cleaned: what is left of the frames goes into new ones.
                    chosen = victims(pool, "base")
                    await move(pool, chosen, "base")
                    assert not any(victim.pending for victim in chosen)
                    await pool.checkpoint()
                    assert not any(victim.live for victim in chosen)
                    assert await read(volume, 0, size) == content
                    await assert_sound(pool)
                    if round_ % 2:  # everything is promoted
                        await move(pool, victims(pool, "base"), "fast")
                        await pool.checkpoint()
                        assert not packed_blocks(volume)
                        assert pool._engine.segments.saved == 0
                        assert await read(volume, 0, size) == content
                        await assert_sound(pool)
                await settle(pool)
                mapped = sum(1 for at in range(0, size, BLOCK) if any(content[at : at + BLOCK]))
                assert pool._engine.segments.live == mapped

    run(body)


def test_each_block_goes_where_it_is_told_and_frames_hold_neighbours(tmp_path: Path) -> None:
    size = 8 * MIB
    content = text(8, size)

    def choose(volume: Volume, block: int) -> tuple[str, str]:
        return ("fast", "hot") if block % 64 < 32 else ("base", "cold" if block % 128 < 64 else "warm")

    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=64, base_mib=64) as pool:
            volume = await pool.create_volume("v", size)
            await volume.write(0, content)
            pool._engine.log.roll()
            await pool.checkpoint()
            mover = Mover(pool._engine)
            for victim in victims(pool, "fast"):
                await mover.move_segment(victim, "base", choose)
            await mover.apply_staged()
            await pool.checkpoint()
            assert await read(volume, 0, size) == content
            await load(volume)
            packed = packed_blocks(volume)
            cold_ones = {block for block in range(size // BLOCK) if block % 64 >= 32}
            assert set(packed) <= cold_ones and len(packed) > len(cold_ones) - 8, "one that is left over stays raw"
            warm = {packed[block] >> SLOT_BITS for block in packed if block % 128 >= 64}
            cold = {packed[block] >> SLOT_BITS for block in packed if block % 128 < 64}
            assert not warm & cold
            whole = sum(packed[b] + 31 == packed.get(b + 31) for b in packed if index_of(packed[b]) == 0)
            assert whole > 0.7 * len(packed) / 32
            await assert_sound(pool)

    run(body)


def test_a_device_with_tiny_segments_gets_what_no_frame_fits_into_raw() -> None:
    machine = Machine((Disk("fast", 40), Disk("base", 40, 64 << 10)), seed=1)
    rng = random.Random(5)
    # What comes from one segment would be a frame of about 20 slots; a segment has 16.
    content = b"".join(rng.randbytes(2800) + bytes(BLOCK - 2800) for _ in range(200))

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", len(content))
            await volume.write(0, content)
            await demote(pool)
            assert await read_all(volume) == content
            assert sum(segment.live for segment in victims(pool, "base") if segment.kind is Kind.MOVED) > 150
            await require_sound(pool)

    machine.run(main)


# -- space -------------------------------------------------------------------------------------------------------------


def test_counts_of_slots_follow_every_change(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path, fast_mib=64, base_mib=64)

        def sums(pool: Pool) -> tuple[int, dict[str, int], dict[int, int], dict[int, int]]:
            segments = pool._engine.segments
            every = segments.by_id.values()
            by_tier = {"fast": 0, "base": 0}
            by_device = {0: 0, 1: 0}
            saved = {0: 0, 1: 0}
            for segment in every:
                assert segment.saved == segment.live - segment.live_slots >= 0
                by_tier[segment.device.tier] += segment.live_slots
                by_device[segment.device.index] += segment.live_slots
                saved[segment.device.index] += segment.saved
            return sum(saved.values()), by_tier, by_device, saved

        def agrees(pool: Pool) -> None:
            segments = pool._engine.segments
            live = {index: segments.device_live[index] for index in (0, 1)}
            saved = {index: segments.device_saved[index] for index in (0, 1)}
            assert (segments.saved, segments.tier_live, live, saved) == sums(pool)

        async with Pool.open(home, settings=QUIET) as pool:
            volume = await pool.create_volume("v", 8 * MIB)
            await volume.write(0, text(2, 8 * MIB))
            await demote(pool)
            agrees(pool)
            assert pool._engine.segments.saved > 1000
            available = pool.status().available_bytes
            await volume.write(0, random.Random(2).randbytes(MIB))
            assert pool.status().available_bytes == available - MIB, "an overwrite of packed blocks takes whole ones"
            agrees(pool)
            await pool.checkpoint()
            assert available - MIB < pool.status().available_bytes < available
            agrees(pool)
            await move(pool, victims(pool, "base"), "fast")
            assert pool._engine.space.active_charge > 6 * 256, "so does unpacking"
            agrees(pool)
            await volume.trim(4 * MIB, 2 * MIB)
            await pool.checkpoint()
            agrees(pool)
            await demote(pool)
        async with Pool.open(home, settings=QUIET) as pool:
            agrees(pool)
            assert pool._engine.segments.saved > 500
            await pool.delete_volume("v")
            await settle(pool)
            agrees(pool)
            assert pool._engine.segments.saved == 0 == pool._engine.segments.live

    run(body)


def test_packed_segments_are_cleaned_for_what_is_dead_in_them_and_not_for_their_tails(tmp_path: Path) -> None:
    """Else the cleaner would write them anew for ever: the next frame doesn't fit behind the copies either."""

    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=64, base_mib=64) as pool:
            volume = await pool.create_volume("v", 16 * MIB)
            rng = random.Random(3)  # frames of 22 slots
            await volume.write(0, b"".join(rng.randbytes(2800) + bytes(BLOCK - 2800) for _ in range(4096)))
            await demote(pool)
            packed = [segment for segment in victims(pool, "base") if segment.kind is Kind.PACKED]
            full = [segment for segment in packed if segment.used > segment.slots - 32]
            assert len(full) > 8 and len(packed) - len(full) <= 1
            assert any(segment.used < _worth_moving_below(segment.slots) for segment in full), "frames leave tails"

            async def ranked() -> set[int]:
                found = await pool._cleaner._rank(CleanerMove("base", "base"), by_age=False)
                return {segment.id for segment in found}

            assert not await ranked() & {segment.id for segment in full}
            for at in range(0, 16 * MIB, 8 * BLOCK):
                await volume.write(at, random.Random(at).randbytes(BLOCK))
            await pool.checkpoint()
            assert {segment.id for segment in full} <= await ranked()

    run(body)


def test_a_pool_holds_more_text_than_it_has_room_for_and_then_says_that_it_is_full(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=40, base_mib=48) as pool:
            volume = await pool.create_volume("v", 200 * MIB)
            piece = text(9, MIB)
            written = 0
            with contextlib.suppress(OSError), trio.move_on_after(40):
                while written < 200 * MIB:
                    await volume.write(written, piece)
                    written += MIB
                    if pool._engine.space.tier_use("fast").free < 3000:
                        await demote(pool)
            assert written > 88 * MIB
            for at in range(0, written, 8 * MIB):
                assert await read(volume, at, MIB) == piece
            await assert_sound(pool)

    run(body)


# -- damage ------------------------------------------------------------------------------------------------------------


async def damaged_pool(tmp_path: Path, pool: Pool, seed: int) -> tuple[Volume, bytes, dict[int, int], int]:
    """A volume of text on base with a bit flipped in one frame: (volume, content, packed blocks, that frame)."""
    content = text(seed, 2 * MIB)
    volume = await pool.create_volume("v", len(content))
    await volume.write(0, content)
    await demote(pool)
    await load(volume)
    packed = packed_blocks(volume)
    rng = random.Random(seed)
    address = packed[rng.choice(sorted(packed))]
    segment = volume._segments[address >> SLOT_BITS]
    offset, length = segment.place(address)
    used = len(bytes((tmp_path / "base.img").read_bytes()[offset : offset + length]).rstrip(b"\0"))
    flip(tmp_path / "base.img", offset + rng.randrange(used), 1 << rng.randrange(8))
    pool._engine.frames.clear()
    return volume, content, packed, frame_of(address)


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_in_a_frame_costs_at_most_its_blocks_and_gives_no_wrong_byte(tmp_path: Path, seed: int) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path, fast_mib=64, base_mib=64)
        async with Pool.open(home, settings=QUIET) as pool:
            volume, content, packed, frame = await damaged_pool(tmp_path, pool, seed)
            inside = {block for block, address in packed.items() if frame_of(address) == frame}
            lost = set()
            for block in sorted(packed):
                right = content[block * BLOCK : (block + 1) * BLOCK]
                into = bytearray(BLOCK)
                if volume.read_now(block * BLOCK, BLOCK, memoryview(into)):
                    assert into == right
                try:
                    assert await read(volume, block * BLOCK, BLOCK) == right
                except OSError as error:
                    assert error.errno == errno.EIO
                    lost.add(block)
            assert lost <= inside
            if not lost:
                return  # a bit of zstd's that means nothing
            offset, _ = volume._segments[frame >> SLOT_BITS].place(frame)
            report = await pool.check(True)
            assert len(report.problems) == len(lost) and all("fails its checksum" in p for p in report.problems)
            # A scrub finds the same, and calls them by name.
            await pool.scrubber.start()
            with trio.fail_after(20):
                while pool.scrubber.status().state in ("running", "waiting"):
                    await trio.sleep(0.01)
            found = pool.scrubber.status().damage
            assert {block for d in found for block in range(d.offset // BLOCK, (d.offset + d.length) // BLOCK)} == lost
            assert {(d.kind, d.device_offset) for d in found} == {("data", offset)}
            # The segment is moved: what is lost is BAD, the rest lives, nothing is pinned.
            victim = volume._segments[frame >> SLOT_BITS]
            await move(pool, [victim], "base")
            await pool.checkpoint()
            assert not victim.live + victim.pending
            for block in sorted(packed):
                if block in lost:
                    assert volume.entry_now(block) == (BAD, 0)
                    assert (await refusal(lambda b=block: read(volume, b * BLOCK, BLOCK))).errno == errno.EIO
                else:
                    assert await read(volume, block * BLOCK, BLOCK) == content[block * BLOCK : (block + 1) * BLOCK]
            # Written again, they are good again.
            for block in lost:
                await volume.write(block * BLOCK, b"n" * BLOCK)
            await assert_sound(pool)

    run(body)


def test_stale_bytes_of_a_frame_in_the_page_cache_are_read_again_past_it() -> None:
    machine = Machine((Disk("fast", 60), Disk("base", 60)), seed=3)
    content = text(3, 100 * BLOCK)

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", len(content))
            await volume.write(0, content)
            await demote(pool)
            await load(volume)
            address = packed_blocks(volume)[5]
            segment = volume._segments[address >> SLOT_BITS]
            offset, length = segment.place(address)
            medium = machine.media[segment.device.index]
            medium.cache[offset : offset + length] = bytes(length)
            medium.lost.update(range(offset // SECTOR, (offset + length) // SECTOR))
            pool._engine.frames.clear()
            assert await read_all(volume) == content
            pool._engine.frames.clear()
            await move(pool, [segment], "fast")
            assert await read_all(volume) == content

    machine.run(main)


def test_a_read_that_fails_for_one_frame_fails_nobody_elses() -> None:
    machine = Machine((Disk("fast", 60), Disk("base", 60)), seed=4)
    content = text(4, 300 * BLOCK)

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", len(content))
            await volume.write(0, content)
            await demote(pool)
            await load(volume)
            packed = packed_blocks(volume)
            segment = volume._segments[packed[70] >> SLOT_BITS]
            bad, length = segment.place(packed[70])
            medium = machine.media[segment.device.index]
            medium.on_read = lambda at, count: errno.EIO if at < bad + length and bad < at + count else None
            pool._engine.frames.clear()
            inside = {block for block in packed if frame_of(packed[block]) == frame_of(packed[70])}
            for block in range(len(content) // BLOCK):
                if block in inside:
                    assert (await refusal(lambda b=block: read(volume, b * BLOCK, BLOCK))).errno == errno.EIO
                else:
                    assert await read(volume, block * BLOCK, BLOCK) == content[block * BLOCK : (block + 1) * BLOCK]
            rest = [block for block in range(len(content) // BLOCK) if block not in inside]
            pool._engine.frames.clear()
            start = next(b for b in rest if all(b + i in rest for i in range(20)))
            assert await read(volume, start * BLOCK, 20 * BLOCK) == content[start * BLOCK : (start + 20) * BLOCK]

    machine.run(main)


# -- crashes -----------------------------------------------------------------------------------------------------------


def lives(seed: int, count: int = 5, *, rebuild: bool = False) -> int:
    """Random writes, trims, moves between the tiers and checkpoints, with a crash at any operation in each life.

    Returns how many blocks lay in frames at the ends of all lives.
    """
    rng = random.Random(seed)
    settings = PoolSettings(checkpoint_interval_s=1e6, overlay_entries=4096, compression_level=rng.choice((1, 3)))
    machine = Machine((Disk("fast", 64), Disk("base", 64)), seed=seed, settings=settings)
    size = 192 * BLOCK
    model = Model(size)
    frames = 0
    everything = True

    async def mover(pool: Pool) -> None:
        while True:
            for _ in range(rng.randrange(1, 30)):
                await trio.lowlevel.checkpoint()
            if rng.random() < 0.3:
                await pool.checkpoint()
            chosen = victims(pool, rng.choice(("fast", "base")))
            await move(pool, rng.sample(chosen, min(len(chosen), 3)), rng.choice(("base", "base", "base", "fast")))

    async def main() -> None:
        nonlocal frames, everything
        async with machine.open() as pool:
            await pool.create_volume("v", size)
        for life in range(count):
            with contextlib.suppress(PowerCutError):
                async with machine.open() as pool:
                    volume = pool.volume("v")
                    model.judge(await read_all(volume), everything=everything)
                    await require_sound(pool)
                    everything = True
                    await load(volume)
                    frames += len(packed_blocks(volume))
                    machine.countdown = rng.randrange(20, 600)
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(mover, pool)
                        for i in range(60):
                            offset = rng.randrange(size // BLOCK) * BLOCK + rng.choice((0, 0, 0, 77))
                            length = min(rng.choice((BLOCK, 5 * BLOCK, 40 * BLOCK, 300)), size - offset)
                            kind = rng.random()
                            if kind < 0.15:
                                offset -= offset % BLOCK
                                length = max(BLOCK, length - length % BLOCK)
                                op = Op("trim", [(offset, bytes(length))])
                            else:
                                new = text(rng.randrange(1 << 30), length) if kind < 0.75 else rng.randbytes(length)
                                op = Op("write", [(offset, new)])
                            model.in_flight = op
                            if op.what == "trim":
                                await volume.trim(offset, length)
                            else:
                                await volume.write(offset, op.changes[0][1])
                            model.in_flight = None
                            model.returned(op)
                            if i % 10 == 0:
                                mark = model.mark
                                await volume.flush()
                                model.flushed(mark)
                            into = bytearray(40 * BLOCK)
                            at = rng.randrange(size // BLOCK - 40) * BLOCK
                            if rng.random() < 0.5 or not volume.read_now(at, len(into), memoryview(into)):
                                await volume.read(at, len(into), memoryview(into))
                            assert into == model.content[at : at + len(into)]
                        nursery.cancel_scope.cancel()
                    machine.countdown = None
                    machine.stop()
                    await trio.lowlevel.checkpoint()
            machine.countdown = None
            everything = life % 2 == 0
            if everything:
                machine.kill()
            else:
                machine.power_cut()
            if rebuild:
                await lose_catalog(machine)
        async with machine.open() as pool:
            volume = pool.volume("v")
            model.judge(await read_all(volume), everything=everything)
            await require_sound(pool)
            await load(volume)
            frames += len(packed_blocks(volume))

    machine.run(main)
    return frames


@pytest.mark.parametrize("seed", range(12))
def test_a_crash_at_any_moment_leaves_a_prefix(seed: int) -> None:
    lives(seed)


@pytest.mark.parametrize("seed", range(100, 104))
def test_a_pool_with_frames_is_rebuilt_from_its_devices(seed: int) -> None:
    lives(seed, rebuild=True)


def test_those_runs_had_frames() -> None:
    assert sum(lives(seed) for seed in range(200, 203)) > 100


# -- many records of one batch, in any order ---------------------------------------------------------------------------


def test_blocks_of_a_batch_are_counted_once_however_many_records_name_it() -> None:
    """With a small cache a batch of copies is made true piece by piece."""
    settings = PoolSettings(
        checkpoint_interval_s=1e6, map_cache_bytes=0, small_volume_leaves=0, overlay_entries=1 << 15
    )
    machine = Machine((Disk("fast", 60), Disk("base", 60)), seed=6, settings=settings)
    content = text(6, 400 * BLOCK)

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 1 << 30)
            for i in range(400):  # a leaf each
                await volume.write(i << 20, content[i * BLOCK : (i + 1) * BLOCK])
            pool._engine.log.roll()
            await pool.checkpoint()
            await move(pool, victims(pool, "fast"), "base")
            before = {s.id: (s.used, s.blocks, s.pending) for s in pool._engine.segments.by_id.values() if s.blocks}
            assert before
            machine.stop()
            await trio.lowlevel.checkpoint()
        machine.kill()
        async with machine.open() as pool:
            by_id = pool._engine.segments.by_id
            after = {i: (by_id[i].used, by_id[i].blocks, by_id[i].live) for i in before}
            assert after == before
            for i in range(400):
                assert await read(pool.volume("v"), i << 20, BLOCK) == content[i * BLOCK : (i + 1) * BLOCK]

    with contextlib.suppress(PowerCutError):
        machine.run(main)
