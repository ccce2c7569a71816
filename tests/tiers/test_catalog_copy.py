"""Copies of the catalog: the codec, chains of deltas, what is torn or damaged, and the writer that appends them."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import random
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.simulation.machine import Disk, Machine, SimDevice, _changed
from tests.tiers.helpers import QUIET, assert_sound, block, flip, make_pool, open_refusal, read, refusal, run
from tests.tiers.test_rebuild_simulated import lose_catalog
from tests.tiers.test_record import golden
from tiers import DeviceSpec, Pool, TierError, rebuild_catalog
from tiers.catalog import (
    CATALOG_NAME,
    SNAPSHOT_STATES,
    Change,
    DeviceRow,
    MarkRow,
    Position,
    SegmentRow,
    SnapshotRow,
    State,
    VolumeRow,
)
from tiers.catalogcopy import (
    BadCopyError,
    Copy,
    CopyKind,
    Link,
    Mirror,
    bound_bytes,
    chain_of,
    decode_copy,
    encode_copy,
    newest_chain,
    state_of,
)
from tiers.copies import copies_in, read_parts
from tiers.device import open_device
from tiers.layout import BLOCK_BYTES, MIB, check_of
from tiers.record import Kind

UUID = bytes(range(16))
U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)
NAMES = st.text("abc.äß", min_size=1, max_size=20)


# -- the codec ---------------------------------------------------------------------------------------------------------

POSITIONS = st.builds(Position, U64, U64, U64, U64, U64, U64, U64)
DEVICES = st.builds(
    DeviceRow,
    st.integers(0, 255),
    st.binary(min_size=16, max_size=16),
    st.text(max_size=40),
    st.sampled_from(("fast", "base")),
    U64,
    U64,
    st.none() | st.text(max_size=60),
)
TIMES = st.integers(0, 2**40).map(float)
VOLUMES = st.builds(
    VolumeRow,
    *(U64, NAMES, U64, U64, U64, U64, TIMES, st.text("abc.äß", max_size=20)),
    *(U64, U64, st.booleans(), st.booleans(), U64, U64),
)
SNAPSHOTS = st.builds(
    SnapshotRow, U64, U64, NAMES, U64, U64, U64, U64, U64, TIMES, st.sampled_from(SNAPSHOT_STATES), st.booleans()
)
SEGMENTS = st.builds(
    SegmentRow, U64, st.integers(0, 255), U32, st.sampled_from(list(Kind)).map(int), st.booleans(), U32, U32, U64
)
DEAD = st.tuples(U64, U64, st.integers(0, 4), U64)


def by(rows: list[Any], key: Callable[[Any], int]) -> list[Any]:
    """One row a key, in order."""
    return [row for _, row in sorted({key(row): row for row in rows}.items())]


STATES = st.builds(
    State,
    NAMES,
    st.just(UUID),
    POSITIONS,
    st.lists(DEVICES, max_size=4).map(lambda rows: by(rows, lambda row: row.index)),
    st.lists(VOLUMES, max_size=6).map(lambda rows: by(rows, lambda row: row.id)),
    st.lists(SEGMENTS, max_size=8).map(lambda rows: by(rows, lambda row: row.id)),
    st.lists(DEAD, max_size=6).map(lambda rows: by(rows, lambda row: row[0])),
    st.lists(SNAPSHOTS, max_size=6).map(lambda rows: by(rows, lambda row: row.id)),
)


def in_order(state: State) -> State:
    return dataclasses.replace(
        state,
        segments=sorted(state.segments, key=lambda row: row.id),
        dead=sorted(state.dead),
    )


def full(state: State) -> tuple[bytes, int]:
    return encode_copy(CopyKind.FULL, state.pool_name, state.position, Mirror(state).whole(), Link())


@given(STATES)
def test_a_full_copy_says_what_the_catalog_said(state: State) -> None:
    data, check = full(state)
    assert len(data) % BLOCK_BYTES == 0
    copy = decode_copy(data)
    assert copy.check == check
    assert in_order(state_of([copy], UUID)) == in_order(state)
    names = [(volume.name, volume.policy) for volume in state.volumes]
    assert len(data) - BLOCK_BYTES < bound_bytes(
        state.pool_name, state.devices, names, len(state.segments), len(state.dead), len(state.snapshots)
    )


def changes_from(rng: random.Random, state: State) -> Change:
    """A change as a checkpoint might make it."""
    position = dataclasses.replace(state.position, checkpoint_seq=state.position.checkpoint_seq + rng.randrange(1, 9))
    volumes = [dataclasses.replace(v, root_check=rng.getrandbits(64)) for v in state.volumes if rng.random() < 0.8]
    volumes += [VolumeRow(rng.getrandbits(40), f"n{rng.getrandbits(30)}", 4096, 0, 0, 0, 5.0, rng.choice(("", "cold")))]
    freed = [row.id for row in state.segments if rng.random() < 0.3] + [rng.getrandbits(50)]
    segments = [
        SegmentRow(rng.getrandbits(50), 0, rng.randrange(99), 3, rng.random() < 0.5, 3, 2, 1, rng.randrange(9))
        for _ in range(3)
    ]
    dead = [(rng.getrandbits(60), rng.getrandbits(64), 2, 7) for _ in range(3)]
    removed = [row[0] for row in state.dead if rng.random() < 0.5]
    devices = [dataclasses.replace(row, path=f"/{rng.random()}") for row in state.devices]
    return Change(position, volumes, segments, freed, dead, removed, devices)


@given(STATES, st.integers(0, 1 << 30), st.integers(1, 6))
def test_a_chain_of_deltas_says_what_the_commits_did(state: State, seed: int, count: int) -> None:
    rng = random.Random(seed)
    state = dataclasses.replace(state, position=dataclasses.replace(state.position, checkpoint_seq=7))
    mirror = Mirror(state)
    data, check = full(state)
    copies = [decode_copy(data)]
    link = Link(7, check)
    for _ in range(count):
        change = changes_from(rng, state)
        state = _changed(state, change)
        data, check = encode_copy(CopyKind.DELTA, state.pool_name, change.position, mirror.apply(change), link)
        link = Link(change.position.checkpoint_seq, check)
        copies.append(decode_copy(data))
    rng.shuffle(copies)
    chain = newest_chain(copies)
    assert chain is not None
    assert len(chain) == count + 1
    assert in_order(state_of(chain, UUID)) == in_order(state)
    assert in_order(state_of([decode_copy(full(state)[0])], UUID)) == in_order(state)


def sample(seq: int = 41, volumes: int = 3, incarnation: int = 2) -> State:
    devices = [
        DeviceRow(0, b"\x01" * 16, "/dev/disk/by-id/one", "fast", 64 * MIB, MIB // 2, None),
        DeviceRow(1, b"\x02" * 16, "/srv/two", "base", 1 << 40, 64 * MIB, "a flush failed", "evacuating"),
    ]
    return State(
        "demo",
        UUID,
        Position(incarnation, seq, 7, 1, 0xDEADBEEF, 12, 6),
        devices,
        [
            VolumeRow(
                i,
                f"v{i}",
                1 << 30,
                3 << 24 | 1,
                77,
                5,
                1700000000.0,
                "archive",
                2,
                9 if i == 2 else 0,
                i == 2,
                i == 1,
                2 if i == 1 else 0,
                3 + i,
                i == 0,
            )
            for i in range(volumes)
        ],
        [
            SegmentRow(3, 0, 9, Kind.MAP, False, 20, 6, 40, 300),
            SegmentRow(7, 0, 2, Kind.LOG, True, 1, 0, 0),
            SegmentRow(8, 0, 3, Kind.CATALOG, True, 5, 0, 0),
        ],
        [(3 << 24 | 5, 99, 1, 4)],
        [SnapshotRow(9, 1, "monday", 1 << 30, 3 << 24 | 2, 78, 4, 6, 1700000001.5, "hidden", True)],
        [MarkRow(2, b"a record", b"trackers, which are judged elsewhere")],
    )


def test_every_flipped_bit_of_a_copy_is_refused() -> None:
    data = bytearray(full(sample())[0])
    length = struct.unpack_from("<Q", data, 48)[0]
    for bit in range(8 * length):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadCopyError):
            decode_copy(data)
        data[bit // 8] ^= 1 << bit % 8
    decode_copy(data)


@pytest.mark.parametrize("length", [0, 7, 63, 64, 120, 300])
def test_a_copy_cut_short_is_refused(length: int) -> None:
    with pytest.raises(BadCopyError):
        decode_copy(full(sample())[0][:length])


@given(st.binary(max_size=400))
def test_garbage_is_never_a_copy(garbage: bytes) -> None:
    for data in (garbage, b"TRCCATA1" + garbage):
        with pytest.raises(BadCopyError):
            decode_copy(data)


def sealed(data: bytearray) -> bytearray:
    """Put the right check on a copy that was tampered with."""
    length = struct.unpack_from("<Q", data, 48)[0]
    data[56:64] = bytes(8)
    data[56:64] = struct.pack("<Q", check_of(bytes(data[:length])))
    return data


@given(st.integers(64, 400), st.binary(min_size=1, max_size=8))
def test_senseless_values_under_a_sound_check_raise_nothing_else(at: int, garbage: bytes) -> None:
    data = bytearray(full(sample())[0])
    data[at : at + len(garbage)] = garbage
    try:
        state_of([decode_copy(sealed(data))], UUID)
    except BadCopyError as error:
        assert not error.newer


def test_a_sound_copy_of_a_newer_version_is_told_from_a_damaged_one() -> None:
    data = bytearray(full(sample())[0])
    data[8] = 99
    with pytest.raises(BadCopyError) as damaged:
        decode_copy(data)
    assert not damaged.value.newer
    with pytest.raises(BadCopyError, match="format version 99 and this release reads 5") as newer:
        decode_copy(sealed(data))
    assert newer.value.newer


def test_version_5_has_these_bytes() -> None:
    assert full(sample())[0] == golden("v5-catalog-copy.hex", BLOCK_BYTES)


# -- chains ------------------------------------------------------------------------------------------------------------


def linked(count: int, *, incarnation: int = 2, first: int = 10) -> list[Copy]:
    """A full copy and deltas, each to the one before."""
    copies: list[Copy] = []
    link = Link()
    for i in range(count):
        state = sample(first + i, incarnation=incarnation)
        tables = Mirror(state).whole()
        data, check = encode_copy(CopyKind.DELTA if i else CopyKind.FULL, "demo", state.position, tables, link)
        link = Link(first + i, check)
        copies.append(decode_copy(data))
    return copies


def test_a_gap_in_the_chain_makes_the_copy_before_it_the_newest() -> None:
    copies = linked(5)
    for missing in range(1, 5):
        chain = newest_chain(copies[:missing] + copies[missing + 1 :])
        assert chain is not None
        assert chain[-1] is copies[missing - 1]
    assert newest_chain(copies[1:]) is None
    assert newest_chain([]) is None


def test_a_delta_to_another_copy_of_the_same_sequence_is_not_followed() -> None:
    copies, others = linked(3), linked(3, first=10)
    forged = dataclasses.replace(others[1], check=others[1].check ^ 1)
    assert chain_of({copy.key: copy for copy in (copies[0], forged, copies[2])}, copies[2]) is None


def test_a_later_life_wins_over_a_higher_sequence() -> None:
    old, new = linked(3, first=50), linked(2, incarnation=3, first=20)
    chain = newest_chain(old + new)
    assert chain is not None
    assert chain[-1] is new[-1]


def test_a_delta_that_names_itself_is_not_followed_for_ever() -> None:
    copy = linked(2)[1]
    endless = dataclasses.replace(copy, before=Link(copy.key[1], copy.check))
    assert newest_chain([endless]) is None


# -- on devices --------------------------------------------------------------------------------------------------------


async def copies_on(path: Path) -> list[tuple[int, int, list[Copy]]]:
    """(segment id, byte offset, copies) for each CATALOG segment on a device."""
    from tiers.rebuild import _headers

    device = open_device(path)
    try:
        found = []
        for index, header in await _headers(device, range(device.segment_count), device.label.pool_uuid):
            if header.kind is Kind.CATALOG:
                copies = copies_in(await read_parts(device, index, device.label.pool_uuid))
                found.append((header.segment_id, device.segment_offset(index), copies))
        return found
    finally:
        device.close()


async def used_pool(directory: Path, checkpoints: int = 6) -> Path:
    """A pool with two volumes, one checkpoint after each write."""
    home = await make_pool(directory)
    async with Pool.open(home, settings=QUIET) as pool:
        await pool.create_volume("empty", MIB)
        volume = await pool.create_volume("v", 64 * MIB)
        for number in range(checkpoints):
            await volume.write(number * BLOCK_BYTES, block(number))
            await pool.checkpoint()
        await volume.write(checkpoints * BLOCK_BYTES, block(checkpoints))
    return home


def lose(home: Path) -> None:
    for path in home.glob(CATALOG_NAME + "*"):
        path.unlink()


async def assert_rebuilt(home: Path, device: Path, blocks: int) -> None:
    await rebuild_catalog(home, "p", [device])
    async with Pool.open(home, settings=QUIET) as pool:
        assert [volume.short_name for volume in pool.volumes()] == ["empty", "v"]
        for number in range(blocks):
            assert await read(pool.volume("v"), number * BLOCK_BYTES, BLOCK_BYTES) == block(number)
        await assert_sound(pool)


def in_trio(test: Callable[[Path], Awaitable[None]]) -> Callable[[Path], None]:
    def wrapped(tmp_path: Path) -> None:
        run(lambda: test(tmp_path))

    wrapped.__name__ = test.__name__
    return wrapped


@in_trio
async def test_a_pool_without_its_catalog_says_what_to_do_and_is_rebuilt(tmp_path: Path) -> None:
    home = await used_pool(tmp_path)
    lose(home)
    assert "--rebuild-catalog --device DEV" in str(await open_refusal(home))
    await assert_rebuilt(home, tmp_path / "fast.img", 7)


@in_trio
async def test_each_checkpoint_has_a_copy_and_superseded_ones_give_their_segments_back(tmp_path: Path) -> None:
    home = await make_pool(tmp_path, fast_mib=32)
    async with Pool.open(home, settings=QUIET) as pool:
        volume = await pool.create_volume("v", 16 * MIB)
        copies = pool._checkpointer.copies
        for number in range(300):
            await volume.write(number % 50 * BLOCK_BYTES, block(number))
            await pool.checkpoint()
            held = [s for s in pool._engine.segments.by_id.values() if s.kind is Kind.CATALOG]
            assert len(held) == 1
        assert copies.full_copies + copies.deltas >= 300
        assert copies.written_slots > 2 * held[0].slots, "several segments were filled"
        assert copies.written_slots <= 4 * 300
        newest = max(copy.key for _, _, found in await copies_on_open(pool) for copy in found)
        assert newest == (pool._engine.log.incarnation, pool.status().checkpoint_seq)
        await assert_sound(pool)


async def copies_on_open(pool: Pool) -> list[tuple[int, int, list[Copy]]]:
    found = []
    for segment in pool._engine.segments.by_id.values():
        if segment.kind is Kind.CATALOG:
            parts = await read_parts(segment.device, segment.index, pool._engine.pool_uuid)
            found.append((segment.id, segment.base, copies_in(parts)))
    return found


@in_trio
async def test_large_catalogs_get_deltas_and_a_full_copy_when_these_outgrow_it(tmp_path: Path) -> None:
    home = await make_pool(tmp_path, fast_mib=256)
    async with Pool.open(home, settings=QUIET) as pool:
        for number in range(300):
            await pool.create_volume(f"volume-with-a-long-name-{number:030}", MIB)
        copies = pool._checkpointer.copies
        volume = pool.volumes()[0]
        await pool.checkpoint()
        full_copies, deltas, slots = copies.full_copies, copies.deltas, copies.written_slots
        for number in range(60):
            await volume.write(number * BLOCK_BYTES, block(number))
            await pool.checkpoint()
        assert copies.deltas - deltas > 3 * (copies.full_copies - full_copies) > 0
        assert (copies.written_slots - slots) / 60 < 5
        await assert_sound(pool)
    lose(home)
    await rebuild_catalog(home, "p", [tmp_path / "fast.img"])
    async with Pool.open(home, settings=QUIET) as pool:
        assert len(pool.volumes()) == 300
        await assert_sound(pool)


def test_a_copy_longer_than_a_segment_spans_several() -> None:
    machine = Machine((Disk("fast", 100, 64 << 10),))

    async def main() -> None:
        async with machine.open() as pool:
            for number in range(700):
                await pool.create_volume(f"{number:064}", 1 << 20)
            await pool.checkpoint()
            held = [s for s in pool._engine.segments.by_id.values() if s.kind is Kind.CATALOG]
            assert len(held) > 1
            await assert_sound(pool)
        await lose_catalog(machine)
        async with machine.open() as pool:
            assert len(pool.volumes()) == 700
            await assert_sound(pool)

    machine.run(main)


@in_trio
async def test_a_damaged_newest_copy_is_refused_not_replaced_by_an_older_one(tmp_path: Path) -> None:
    home = await used_pool(tmp_path)
    device = tmp_path / "fast.img"
    lose(home)
    newest = max(copy.key for _, _, found in await copies_on(device) for copy in found)
    for _, offset, found in await copies_on(device):
        if any(copy.key == newest for copy in found):
            data = device.read_bytes()
            at = data.rindex(b"TRCCATA1", offset, offset + MIB // 2)
            flip(device, at + 200)
    error = await refusal(lambda: rebuild_catalog(home, "p", [device]))
    assert error.errno == errno.EIO
    assert "newest copy of the catalog of pool p is damaged" in str(error)
    assert not (home / CATALOG_NAME).exists()


@in_trio
async def test_check_finds_a_damaged_copy_and_the_next_checkpoint_writes_another(tmp_path: Path) -> None:
    home = await make_pool(tmp_path)
    async with Pool.open(home, settings=QUIET) as pool:
        volume = await pool.create_volume("empty", MIB)
        volume = await pool.create_volume("v", 64 * MIB)
        await volume.write(0, block(0))
        await pool.checkpoint()
        held = [s for s in pool._engine.segments.by_id.values() if s.kind is Kind.CATALOG]
        data = (tmp_path / "fast.img").read_bytes()
        flip(tmp_path / "fast.img", data.rindex(b"TRCCATA1", held[-1].base, held[-1].base + MIB // 2) + 100)
        problems = await pool._checkpointer.copies.verify()
        assert ["copy of the catalog" in problem and "fast.img" in problem for problem in problems] == [True]
        await pool.checkpoint()
        assert await pool._checkpointer.copies.verify() == []
        await assert_sound(pool)
    lose(home)
    await assert_rebuilt(home, tmp_path / "fast.img", 1)


@in_trio
async def test_a_newer_format_anywhere_is_refused(tmp_path: Path) -> None:
    home = await used_pool(tmp_path)
    device = tmp_path / "fast.img"
    lose(home)
    pristine = device.read_bytes()
    (_, offset, _) = (await copies_on(device))[-1]
    segment = bytearray(pristine[offset : offset + 4096])
    segment[8] = 9
    segment[72:80] = struct.pack("<Q", check_of(bytes(segment[:72])))
    batch = bytearray(pristine[offset + 4096 : offset + 8192])
    batch[8] = 9
    batch[96:104] = bytes(8)
    batch[96:104] = struct.pack("<Q", check_of(bytes(batch)))
    for at, changed in ((offset, segment), (offset + 4096, batch)):
        with device.open("r+b") as file:
            file.seek(at)
            file.write(changed)
        error = await refusal(lambda: rebuild_catalog(home, "p", [device]))
        assert error.errno == errno.EPROTO
        assert "use the release that wrote it" in str(error)
        device.write_bytes(pristine)
    await assert_rebuilt(home, device, 7)


@in_trio
async def test_devices_that_joined_are_in_the_rebuilt_catalog(tmp_path: Path) -> None:
    home = await make_pool(tmp_path)
    base = tmp_path / "base.img"
    async with Pool.open(home, settings=QUIET) as pool:
        volume = await pool.create_volume("v", 64 * MIB)
        await pool.create_volume("empty", MIB)
        await pool.grow([DeviceSpec(base, "base", 64 * MIB)])
        await volume.write(0, block(0))
        with trio.fail_after(30):
            while pool._checkpointer.copies.behind:
                await trio.sleep(0.01)
    lose(home)
    base.rename(tmp_path / "moved.img")
    error = await refusal(lambda: rebuild_catalog(home, "p", [tmp_path / "fast.img"]))
    assert str(base) in str(error)
    rebuilt = await rebuild_catalog(home, "p", [tmp_path / "moved.img", tmp_path / "fast.img"])
    assert rebuilt.devices == [str(tmp_path / "fast.img"), str(tmp_path / "moved.img")]
    await open_and_read(home)


async def open_and_read(home: Path) -> None:
    async with Pool.open(home, settings=QUIET) as pool:
        assert await read(pool.volume("v"), 0, BLOCK_BYTES) == block(0)
        assert len(pool.status().devices) == 2
        await assert_sound(pool)


@in_trio
async def test_a_pool_that_was_never_opened_has_no_copy(tmp_path: Path) -> None:
    home = await make_pool(tmp_path)
    lose(home)
    error = await refusal(lambda: rebuild_catalog(home, "p", [tmp_path / "fast.img"]))
    assert "never opened" in str(error)


# -- with faults -------------------------------------------------------------------------------------------------------


def test_a_poisoned_device_stays_poisoned_in_a_rebuilt_catalog() -> None:
    machine = Machine((Disk("fast", 40), Disk("base", 40)))

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 1 << 20)
            await volume.write(0, block(1))
            machine.media[0].failing_syncs = 1
            with pytest.raises(TierError):
                await volume.flush()
        await lose_catalog(machine)
        assert machine.state.devices[0].poisoned
        async with machine.open() as pool:
            assert pool.status().state == "read-only"
            assert pool.status().devices[0].state == "poisoned"

    machine.run(main)


def test_a_copy_that_can_not_be_written_frees_nothing_and_the_next_one_is_full() -> None:
    machine = Machine((Disk("fast", 48),))

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 1 << 20)
            for number in range(200):
                await volume.write(number * BLOCK_BYTES, block(number))
            copies, segments = pool._checkpointer.copies, pool._engine.segments
            await pool.checkpoint()
            await volume.trim(0, 1 << 20)
            broken = {s.base for s in segments.by_id.values() if s.kind is Kind.CATALOG}
            machine.media[0].on_write = lambda offset, length: (
                (errno.EIO, 0) if any(base <= offset < base + (128 << 10) for base in broken) else None
            )
            free = segments.free_slots
            with pytest.raises(TierError):
                await pool.checkpoint()
            assert copies.behind
            assert segments.free_slots <= free, "nothing was given out"
            full_copies = copies.full_copies
            await pool.checkpoint()
            assert copies.full_copies == full_copies + 1
            assert not copies.behind
            assert segments.free_slots > free
            await assert_sound(pool)
        await lose_catalog(machine)
        async with machine.open() as pool:
            assert pool.volume("v").size_bytes == 1 << 20
            await assert_sound(pool)

    machine.run(main)


def test_a_full_pool_that_crashes_again_and_again_goes_on() -> None:
    machine = Machine((Disk("fast", 40),))

    async def main() -> None:
        filled = 0
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 8 << 20)
            with pytest.raises(TierError):
                while True:
                    await volume.write(filled * BLOCK_BYTES, block(filled))
                    filled += 1
            machine.stop()
            await trio.lowlevel.checkpoint()
        machine.kill()
        for number in range(12):
            async with machine.open() as pool:
                assert pool.status().state == "online"
                volume = pool.volume("v")
                with contextlib.suppress(TierError):  # a full pool may refuse
                    for i in range(0, filled, 3):
                        await volume.write(i * BLOCK_BYTES, block(i))
                if number % 2:
                    await pool.checkpoint()
                machine.stop()
                await trio.lowlevel.checkpoint()
            machine.kill()
            if number % 3 == 0:
                await lose_catalog(machine)
        async with machine.open() as pool:
            for i in range(filled):
                assert await read(pool.volume("v"), i * BLOCK_BYTES, BLOCK_BYTES) == block(i)
            await assert_sound(pool)

    machine.run(main)


def test_simulated_devices_are_scanned_without_a_catalog() -> None:
    machine = Machine((Disk("base", 40),))

    async def main() -> None:
        async with machine.open() as pool:
            await pool.create_volume("v", 1 << 20)
        before = machine.state
        await lose_catalog(machine)
        assert machine.state.volumes == before.volumes
        assert machine.state.position.checkpoint_seq == before.position.checkpoint_seq
        assert {row.id for row in machine.state.segments} == {row.id for row in before.segments}
        assert SimDevice(machine, machine.media[0]).label.checkpoint_seq == before.position.checkpoint_seq

    machine.run(main)
