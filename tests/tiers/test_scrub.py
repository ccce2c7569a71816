"""The scrub: what is damaged on a medium is found and named, what isn't is not, and it goes on where it stopped."""

import errno
import json
import logging
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.simulation.machine import Disk, Machine
from tests.simulation.medium import Medium
from tests.tiers.helpers import QUIET, block, flip, make_pool, refusal, run
from tiers import Pool, ScrubStatus, Volume
from tiers.device import FileDevice
from tiers.layout import BLOCK_BYTES, MIB, SLOT_MASK
from tiers.record import Kind
from tiers.scrubpass import Pacer
from tiers.scrubstate import MAX_DAMAGE, Damage, Run, decode

TWO_TIERS = (Disk("fast"), Disk("base"))


def on(machine: Machine, body: Callable[[Pool], Awaitable[None]]) -> None:
    """Run `body` with the machine's pool open."""

    async def main() -> None:
        async with machine.open() as pool:
            # CPU time would make the run depend on this machine's speed.
            pool.scrubber.busy_clock = trio.current_time
            await body(pool)

    machine.run(main)


async def scrub(pool: Pool, rate: int | None = None) -> ScrubStatus:
    """A whole scrub."""
    await pool.scrubber.start(rate)
    return await finish(pool)


async def finish(pool: Pool) -> ScrubStatus:
    with trio.fail_after(36000):
        while pool.scrubber.running:
            await trio.sleep(0.05)
    status = pool.scrubber.status()
    assert status.state == "finished", status
    return status


async def filled(pool: Pool, name: str = "v", count: int = 300, seed: int = 0) -> Volume:
    """A volume of `count` blocks in a row, in pages."""
    volume = await pool.create_volume(name, 4 * MIB)
    for i in range(count):
        await volume.write(i * BLOCK_BYTES, block(seed + i))
    await pool.checkpoint()
    return volume


async def place_of(machine: Machine, volume: Volume, index: int) -> tuple[Medium, int]:
    """Where a block lies."""
    (address,), _ = await volume.entries(index, 1)
    return place_of_address(machine, volume, address)


def place_of_address(machine: Machine, volume: Volume, address: int) -> tuple[Medium, int]:
    segment = volume._engine.segments.by_id[address >> 24]
    return machine.media[segment.device.index], segment.offset(address & SLOT_MASK)


async def page_of(machine: Machine, volume: Volume, level: int, index: int) -> tuple[Medium, int]:
    """Where a map page lies."""
    if level < 4:
        await volume.tree.load(level + 1, [index >> 8])
    entry = volume.tree.entry_of_page_now(level, index)
    assert entry is not None
    return place_of_address(machine, volume, entry[0])


def ranges(status: ScrubStatus) -> list[tuple[str, str | None, int, int]]:
    return [(item.kind, item.volume, item.offset, item.length) for item in status.damage]


def test_a_sound_pool_is_read_once_and_has_no_errors() -> None:
    machine = Machine(TWO_TIERS)

    async def body(pool: Pool) -> None:
        assert pool.scrubber.status().state == "never"
        await filled(pool)
        await filled(pool, "w", seed=1000)
        status = await scrub(pool)
        used = sum(s.used for s in pool._engine.segments.by_id.values() if s.live + s.pending) * BLOCK_BYTES
        assert (status.errors, status.damage, status.damage_omitted) == (0, [], 0)
        assert status.done_bytes == status.total_bytes == used
        assert status.last is not None
        assert (status.last.errors, status.last.done_bytes) == (0, used)
        assert [device.errors for device in status.devices] == [0, 0]
        assert all(segment.pins == 0 for segment in pool._engine.segments.by_id.values())

    on(machine, body)


def test_rot_in_data_is_named_by_volume_and_range_neighbours_joined_and_counted_on_its_device(
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine = Machine(TWO_TIERS)

    async def body(pool: Pool) -> None:
        await filled(pool)
        volume = await filled(pool, "w", seed=1000)
        for index in (40, 41, 42, 90):
            medium, offset = await place_of(machine, volume, index)
            medium.flip(offset + 1234)
        status = await scrub(pool)
        assert ranges(status) == [("data", "sim/w", 40 * 4096, 3 * 4096), ("data", "sim/w", 90 * 4096, 4096)]
        assert status.errors == 4
        assert {device.path: device.errors for device in status.devices} == {
            device.path: 4 * (device.path == medium.path) for device in machine.media
        }
        assert status.damage[1].device == medium.path
        assert status.damage[1].device_offset == offset
        lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("scrub:")]
        assert lines[-1] == (
            f"scrub: sim/w bytes 368640-372735: the data on {medium.path} at {offset} fails its checksum"
        )
        assert sum("163840-" in line for line in lines) == 1
        # Written again it is sound, and the next scrub says so.
        await volume.write(40 * 4096, b"".join(block(5000 + i) for i in range(3)))
        await volume.trim(90 * 4096, 4096)
        again = await scrub(pool)
        assert (again.errors, again.damage) == (0, [])

    with caplog.at_level(logging.ERROR):
        on(machine, body)


def test_rot_that_the_page_cache_hides_is_found_for_the_medium_is_what_counts() -> None:
    machine = Machine()

    async def body(pool: Pool) -> None:
        volume = await filled(pool)
        medium, offset = await place_of(machine, volume, 7)
        await volume.flush()
        medium.durable[offset] ^= 1
        medium.lost.add(offset // 512)
        into = bytearray(4096)
        assert volume.read_now(7 * 4096, 4096, memoryview(into))
        assert ranges(await scrub(pool)) == [("data", "sim/v", 7 * 4096, 4096)]

    on(machine, body)


@pytest.mark.parametrize(("level", "index", "named"), [(0, 1, (MIB, MIB)), (2, 0, (0, 4 * MIB)), (4, 0, (0, 4 * MIB))])
def test_rot_in_a_map_page_is_named_by_the_range_that_lies_below_it(
    level: int, index: int, named: tuple[int, int]
) -> None:
    machine = Machine((Disk("fast", 200),))  # so roomy that no cleaning writes these pages anew

    async def body(pool: Pool) -> None:
        await filled(pool, "other", seed=4000)
        volume = await filled(pool)
        medium, offset = await page_of(machine, volume, level, index)
        medium.flip(offset + 77)
        status = await scrub(pool)
        assert ranges(status) == [("map", "sim/v", *named)]
        assert status.errors == 1

    on(machine, body)


def test_dead_blocks_are_no_errors_however_rotten() -> None:
    machine = Machine()

    async def body(pool: Pool) -> None:
        volume = await filled(pool)
        gone = await filled(pool, "gone", seed=2000)
        places = [await place_of(machine, volume, 3), await place_of(machine, gone, 3)]
        places.append(await page_of(machine, volume, 0, 0))
        await volume.write(3 * 4096, block(77))
        await pool.delete_volume("gone")
        await pool.checkpoint()
        for medium, offset in places:
            medium.flip(offset)
        assert (await scrub(pool)).errors == 0

    on(machine, body)


@pytest.mark.parametrize("how", ["overwritten", "trimmed", "deleted", "moved"])
def test_what_changes_under_the_scrub_is_no_error(how: str) -> None:
    """Rule 7: between the read and the verdict the map may come to name another place."""
    machine = Machine(TWO_TIERS)
    rereads = []

    async def body(pool: Pool) -> None:
        volume = await filled(pool)
        medium, rotten = await place_of(machine, volume, 100)
        medium.flip(rotten)

        async def change(offset: int, length: int) -> None:
            # The block is read by itself only once it was found to differ and to be live.
            if (offset, length) == (rotten, BLOCK_BYTES):
                rereads.append(offset)
                medium.before_read = None
                if how == "overwritten":
                    await volume.write(100 * 4096, block(9))
                elif how == "trimmed":
                    await volume.trim(100 * 4096, 4096)
                elif how == "deleted":
                    await pool.delete_volume("v")
                else:
                    medium.flip(rotten)
                    await empty(pool, volume, 100)
                await pool.checkpoint()

        medium.before_read = change
        status = await scrub(pool)
        assert rereads
        assert (status.errors, status.damage) == (0, [])
        assert status.done_bytes == status.total_bytes

    on(machine, body)


async def empty(pool: Pool, volume: Volume, index: int) -> None:
    """Have the cleaner move what is in a block's segment."""
    (address,), _ = await volume.entries(index, 1)
    victim = pool._engine.segments.by_id[address >> 24]
    await pool._cleaner.mover.move_segment(victim, "base")
    await pool._cleaner.mover.apply_staged()
    assert (await volume.entries(index, 1))[0] != [address]


def test_segments_that_are_freed_and_taken_again_under_the_scrub_are_passed_over() -> None:
    machine = Machine()

    async def body(pool: Pool) -> None:
        volume = await filled(pool)
        medium = machine.media[0]
        before = {s.id for s in pool._engine.segments.by_id.values()}
        reads = 0

        async def change(offset: int, length: int) -> None:
            nonlocal reads
            reads += 1
            if reads == 3:
                for i in range(300):
                    await volume.write(i * BLOCK_BYTES, block(10_000 + i))
                await pool.checkpoint()
                await pool.checkpoint()

        medium.before_read = change
        status = await scrub(pool)
        gone = before - {s.id for s in pool._engine.segments.by_id.values()}
        assert len(gone) > 3
        assert (status.errors, status.damage) == (0, [])
        assert status.done_bytes == status.total_bytes
        assert all(device.total_bytes >= 0 for device in status.devices)
        assert all(segment.pins == 0 for segment in pool._engine.segments.by_id.values())

    on(machine, body)


def test_a_glitch_that_is_gone_when_the_block_is_read_again_is_no_error() -> None:
    machine = Machine()

    async def body(pool: Pool) -> None:
        volume = await filled(pool)
        medium, glitch = await place_of(machine, volume, 5)
        medium.flip(glitch)
        seen = []

        async def heal(offset: int, length: int) -> None:
            if (offset, length) == (glitch, BLOCK_BYTES):
                seen.append(offset)
                medium.flip(glitch)

        medium.before_read = heal
        assert (await scrub(pool)).errors == 0
        assert seen == [glitch]

    on(machine, body)


def test_a_sector_that_cannot_be_read_costs_its_block_and_is_named_with_device_and_offset() -> None:
    machine = Machine(TWO_TIERS)

    async def body(pool: Pool) -> None:
        volume = await filled(pool)
        medium, bad = await place_of(machine, volume, 33)
        medium.on_read = lambda offset, length: errno.EIO if offset <= bad < offset + length else None
        status = await scrub(pool)
        assert ranges(status) == [("data", "sim/v", 33 * 4096, 4096)]
        (damage,) = status.damage
        assert (damage.device, damage.device_offset) == (medium.path, bad)
        assert damage.reason == "can't be read (Input/output error)"
        assert {d.path: d.errors for d in status.devices}[medium.path] == 1

    on(machine, body)


@pytest.mark.parametrize("how", ["rotten", "unreadable"])
def test_behind_a_damaged_header_the_map_tells_what_is_lost(how: str) -> None:
    """The header's blocks can't be told from it any more; those that are sound are no loss."""
    machine = Machine()

    async def body(pool: Pool) -> None:
        volume = await pool.create_volume("v", 4 * MIB)
        # One batch: a header, then eight blocks. The last is damaged too.
        await volume.write(0, b"".join(block(i) for i in range(8)))
        await filled(pool, "w", seed=500)
        medium, first = await place_of(machine, volume, 0)
        header = first - BLOCK_BYTES
        medium.flip(first + 7 * BLOCK_BYTES + 9)
        if how == "rotten":
            medium.flip(header + 200)
        else:
            medium.on_read = lambda offset, length: errno.EIO if offset <= header < offset + length else None
        status = await scrub(pool)
        assert ("data", "sim/v", 7 * 4096, 4096) in ranges(status)
        (found,) = [damage for damage in status.damage if damage.kind == "header"]
        assert (found.device, found.device_offset, found.volume) == (medium.path, header, None)
        assert status.errors == 2

    on(machine, body)


def test_a_damaged_header_of_a_map_batch_does_not_hide_a_damaged_page() -> None:
    machine = Machine()

    async def body(pool: Pool) -> None:
        volume = await filled(pool)
        medium, leaf = await page_of(machine, volume, 0, 0)
        medium.flip(leaf - BLOCK_BYTES + 150)
        medium.flip(leaf + 1)
        status = await scrub(pool)
        assert ("map", "sim/v", 0, MIB) in ranges(status)
        assert sum(damage.kind == "header" for damage in status.damage) == 1

    on(machine, body)


def test_a_damaged_segment_header_is_told_without_a_volume() -> None:
    machine = Machine()

    async def body(pool: Pool) -> None:
        volume = await filled(pool)
        (address,), _ = await volume.entries(200, 1)
        segment = pool._engine.segments.by_id[address >> 24]
        machine.media[0].flip(segment.base + 40)
        status = await scrub(pool)
        assert [(damage.kind, damage.volume, damage.device_offset) for damage in status.damage] == [
            ("header", None, segment.base)
        ]
        assert f"the header of segment {segment.id} fails its checksum" in status.damage[0].sentence()

    on(machine, body)


def test_every_kind_of_segment_is_read_moved_data_too() -> None:
    machine = Machine(TWO_TIERS)

    async def body(pool: Pool) -> None:
        volume = await filled(pool)
        await empty(pool, volume, 100)
        await pool.checkpoint()
        (address,), _ = await volume.entries(100, 1)
        assert pool._engine.segments.by_id[address >> 24].kind is Kind.MOVED
        medium, offset = await place_of(machine, volume, 100)
        assert medium is machine.media[1]
        medium.flip(offset)
        status = await scrub(pool)
        assert ranges(status) == [("data", "sim/v", 100 * 4096, 4096)]
        assert [device.errors for device in status.devices] == [0, 1]

    on(machine, body)


def test_the_rate_is_honoured_over_all_devices_and_can_be_changed_meanwhile() -> None:
    machine = Machine(TWO_TIERS)

    async def body(pool: Pool) -> None:
        await filled(pool, count=600)
        begun = trio.current_time()
        status = await scrub(pool, 128 << 10)
        took = trio.current_time() - begun
        assert 0.8 * status.done_bytes / (128 << 10) < took < 1.3 * status.done_bytes / (128 << 10)
        assert took > 10

        begun = trio.current_time()
        await pool.scrubber.start(64 << 10)
        await trio.sleep(took / 2)
        middle = pool.scrubber.status()
        assert middle.rate == 64 << 10
        assert 0.5 * took * 0.7 * (64 << 10) < middle.done_bytes < 0.5 * took * 1.3 * (64 << 10)
        assert 0.5 * (64 << 10) < middle.bytes_per_s < 1.5 * (64 << 10)
        assert middle.eta_s is not None
        assert middle.eta_s >= (middle.total_bytes - middle.done_bytes) / (64 << 10)
        await pool.scrubber.start(0)
        await finish(pool)
        assert trio.current_time() - begun < took
        assert (await refusal(lambda: pool.scrubber.start(1000))).errno == errno.EINVAL

    on(machine, body)


def test_pausing_keeps_the_place_stopping_gives_it_up() -> None:
    machine = Machine([Disk(segments=96)])
    reads: list[tuple[int, int]] = []

    async def body(pool: Pool) -> None:
        volume = await filled(pool, count=600)
        medium, rotten = await place_of(machine, volume, 0)
        medium.flip(rotten)
        scrubber = pool.scrubber
        for action in (scrubber.pause, scrubber.stop):
            error = await refusal(action)
            assert error.errno == errno.ENOENT
            assert "terrace pool scrub sim --status" in str(error)
        await scrubber.start(256 << 10)
        await trio.sleep(5)
        paused = await scrubber.pause()
        assert paused.state == "paused"
        assert 0 < paused.done_bytes < paused.total_bytes
        assert paused.eta_s is None
        assert paused.errors == 1
        assert all(segment.pins == 0 for segment in pool._engine.segments.by_id.values())
        await trio.sleep(1000)
        assert pool.scrubber.status().done_bytes == paused.done_bytes
        assert pool.scrubber.status().active_s < 20

        async def note(offset: int, length: int) -> None:
            reads.append((offset, length))

        medium.before_read = note
        resumed = await scrub(pool)
        assert resumed.done_bytes == resumed.total_bytes == paused.total_bytes
        # At most the segment that it was in is read twice, and what is known by then is not counted twice.
        assert sum(length for _, length in reads) < paused.total_bytes - paused.done_bytes + (128 << 10)
        assert resumed.errors == 1
        assert ranges(resumed) == [("data", "sim/v", 0, 4096)]

        await scrubber.start(256 << 10)
        await trio.sleep(5)
        stopped = await scrubber.stop()
        assert stopped.state == "stopped"
        assert stopped.finished_at is not None
        assert stopped.last == resumed.last
        assert (await refusal(scrubber.stop)).errno == errno.ENOENT
        assert (await scrubber.start()).done_bytes == 0
        assert (await finish(pool)).errors == 1

    on(machine, body)


def test_more_damage_than_is_named_is_still_counted() -> None:
    known = Run("running", False, 0.0, 1)
    for i in range(MAX_DAMAGE + 5):
        assert known.note(Damage("data", "p/v", 8192 * i, 4096, "/d", 0, 1, "x")) == (i < MAX_DAMAGE)
    assert (len(known.damage), known.damage_omitted) == (MAX_DAMAGE, 5)
    assert known.note(Damage("data", "p/v", known.damage[-1].offset + 4096, 4096, "/d", 0, 1, "x"))
    assert known.damage[-1].length == 8192


@pytest.mark.parametrize("seed", range(6))
def test_under_clients_the_cleaner_and_checkpoints_nothing_sound_is_blamed_and_no_rot_is_missed(seed: int) -> None:
    machine = Machine((Disk("fast", 40), Disk("base", 40)), seed=seed)
    rng = random.Random(seed)

    async def body(pool: Pool) -> None:
        volume = await filled(pool, count=600)
        still = await filled(pool, "still", count=50, seed=7000)
        rotten = sorted(rng.sample(range(50), 5))
        for index in rotten:
            medium, offset = await place_of(machine, still, index)
            medium.flip(offset + rng.randrange(4096), rng.randrange(8))

        async def client() -> None:
            while True:
                at = rng.randrange(600)
                count = min(rng.randrange(1, 30), 600 - at)
                await volume.write(at * BLOCK_BYTES, b"".join(block(rng.randrange(10**6)) for _ in range(count)))
                if rng.random() < 0.05:
                    await pool.checkpoint()
                await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(client)
            await trio.sleep(0.05)
            status = await scrub(pool, rng.choice((0, 4 << 20)))
            nursery.cancel_scope.cancel()
        found = {
            at // 4096
            for item in status.damage
            for at in range(item.offset, item.offset + item.length, 4096)
            if (item.kind, item.volume) == ("data", "sim/still")
        }
        # What the cleaner met first, it has logged as BAD.
        (addresses, _) = await still.entries(0, 50)
        assert found | {i for i in rotten if addresses[i] == 1} == set(rotten)
        assert {item.volume for item in status.damage} <= {"sim/still"}
        assert all(segment.pins >= 0 for segment in pool._engine.segments.by_id.values())

    on(machine, body)


def test_on_a_poisoned_device_it_tells_what_the_medium_never_got() -> None:
    machine = Machine()

    async def body(pool: Pool) -> None:
        await filled(pool)
        volume = await filled(pool, "w", seed=900)
        await volume.write(7 * BLOCK_BYTES, b"".join(block(i) for i in range(3)))
        machine.media[0].failing_syncs = 1
        assert (await refusal(volume.flush)).errno == errno.EIO
        assert pool.status().state == "read-only"
        status = await scrub(pool)
        assert ("data", "sim/w", 7 * 4096, 3 * 4096) in ranges(status)
        assert {item.volume for item in status.damage} <= {"sim/w", None}

    on(machine, body)


# -- real files ------------------------------------------------------------------------------------------------


def test_a_scrub_goes_on_where_the_pool_was_left_and_finds_rot_on_a_real_file(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await pool.create_volume("v", 16 * MIB)
            for at in range(0, 12 * MIB, MIB):
                await volume.write(at, random.Random(at).randbytes(MIB))
            await pool.checkpoint()
            (address,), _ = await volume.entries(11 * 256 + 3, 1)
            place = pool._engine.segments.by_id[address >> 24].offset(address & SLOT_MASK)
        flip(tmp_path / "fast.img", place + 5)
        async with Pool.open(home, settings=QUIET) as pool:
            await pool.scrubber.start(4 << 20, scheduled=True)
            while pool.scrubber.status().done_bytes < 2 * MIB:
                await trio.sleep(0.01)
            assert pool.scrubber.running
        body = json.loads((home / "scrub.json").read_text())
        assert body["run"]["state"] == "running"
        async with Pool.open(home, settings=QUIET) as pool:
            left = pool.scrubber.status()
            assert (left.state, left.scheduled, left.rate) == ("interrupted", True, 4 << 20)
            assert 2 * MIB <= left.done_bytes < left.total_bytes
            resumed = await pool.scrubber.start(0)
            assert resumed.started_at == left.started_at
            status = await finish(pool)
            assert status.done_bytes == status.total_bytes
            assert ranges(status) == [("data", "p/v", 11 * MIB + 3 * 4096, 4096)]
            assert status.damage[0].device == str(tmp_path / "fast.img")
            assert status.damage[0].device_offset == place
        async with Pool.open(home, settings=QUIET) as pool:
            assert pool.scrubber.status() == status
            assert pool.status().scrub == status

    run(body)


def test_a_file_system_without_direct_reads_is_scrubbed_too(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await pool.create_volume("v", 4 * MIB)
            await volume.write(0, random.Random(1).randbytes(2 * MIB))
            await pool.checkpoint()
            (device,) = pool._engine.devices
            assert isinstance(device, FileDevice)
            assert device._direct_fd is not None
            os.close(device._direct_fd)
            device._direct_fd = None
            assert (await scrub(pool)).errors == 0
            (address,), _ = await volume.entries(100, 1)
            segment = pool._engine.segments.by_id[address >> 24]
            flip(tmp_path / "fast.img", segment.offset(address & SLOT_MASK) + 99)
            assert ranges(await scrub(pool)) == [("data", "p/v", 100 * 4096, 4096)]

    run(body)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"version": 2}', b"\xff" * 100, "other", "negative", "state", "missing", "text"],
    ids=lambda content: str(content)[:12],
)
def test_a_state_file_that_is_no_use_is_as_good_as_none(
    tmp_path: Path, content: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            await pool.create_volume("v", MIB)
            await scrub(pool)
        path = home / "scrub.json"
        good = json.loads(path.read_text())
        assert decode(path.read_bytes(), good["pool"]).run is not None
        changes: dict[str, Callable[[], Any]] = {
            "other": lambda: good.update(pool="00" * 16),
            "negative": lambda: good["run"]["devices"]["0"].update(position=-1),
            "state": lambda: good["run"].update(state="dancing"),
            "missing": lambda: good["run"].pop("limit"),
            "text": lambda: good["last"].update(errors="none"),
        }
        if isinstance(content, str):
            changes[content]()
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(good).encode())
        async with Pool.open(home, settings=QUIET) as pool:
            assert pool.scrubber.status().state == "never"
            assert (await scrub(pool)).errors == 0
        assert "no earlier scrub is known of" in caplog.text

    run(body)


def test_a_state_file_that_cannot_be_written_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        (home / "scrub.new").mkdir()
        (home / "scrub.new" / "in the way").touch()
        async with Pool.open(home, settings=QUIET) as pool:
            assert (await scrub(pool)).state == "finished"
        assert caplog.text.count("can't be saved") == 1
        async with Pool.open(home, settings=QUIET) as pool:
            assert pool.scrubber.status().state == "never"

    run(body)


def test_the_rate_holds_for_pieces_of_any_size_from_many_who_ask() -> None:
    async def body() -> float:
        pacer = Pacer(10 * MIB)

        async def read(size: int) -> None:
            for _ in range(100 * MIB // size):
                await pacer.take(size)

        async with trio.open_nursery() as nursery:
            for size in (8 * MIB, 4 * MIB, 64 << 10, BLOCK_BYTES):
                nursery.start_soon(read, size)
        return trio.current_time()

    took_s = trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))
    assert took_s == pytest.approx(396 / 10, rel=0.03)


def test_a_rate_that_is_raised_holds_at_once() -> None:
    async def body() -> float:
        pacer = Pacer(64 << 10)
        await pacer.take(MIB)
        pacer.rate = 64 * MIB
        await pacer.take(MIB)
        return trio.current_time()

    assert trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0)) < 1
