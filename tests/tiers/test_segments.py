"""The segment table: places, ids and counts, and that no place is given out before its time."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.tiers.helpers import block, fresh_pool, make_pool, read, run, settle
from tiers import Pool
from tiers.device import FileDevice, new_workers
from tiers.label import Label
from tiers.layout import BLOCK_BYTES, MAX_SEGMENT_BYTES, MIB, MIN_SEGMENT_BYTES, segment_bytes_for
from tiers.record import Kind
from tiers.segments import Segment, SegmentTable


def device(index: int, mib: int) -> FileDevice:
    """A device of which only the numbers are used."""
    label = Label("fast", index, bytes(16), bytes(16), mib * MIB, MIB, 1, 0, frozenset(), "p")
    return FileDevice(f"d{index}", -1, None, label, new_workers())


@given(st.integers(32 * MIB, 1 << 50))
def test_a_device_has_enough_segments_of_a_sensible_size(size: int) -> None:
    segment = segment_bytes_for(size)
    assert MIN_SEGMENT_BYTES <= segment <= MAX_SEGMENT_BYTES
    assert segment % MIN_SEGMENT_BYTES == 0
    assert size // segment >= 32
    assert size // segment <= 2048 or segment == MAX_SEGMENT_BYTES


def test_the_first_segment_begins_behind_the_labels_and_the_last_ends_on_the_device() -> None:
    small = device(0, 33)
    assert small.segment_count == 32
    assert small.segment_offset(0) == MIB
    assert small.segment_offset(31) + small.segment_bytes == 33 * MIB


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(list(Kind)), st.integers(0, 40)), max_size=60))
def test_places_are_never_given_twice_ids_never_again_and_the_sums_stay_right(
    steps: list[tuple[int, Kind, int]],
) -> None:
    async def body() -> None:
        devices = [device(0, 12), device(1, 9)]
        table = SegmentTable([])
        for each in devices:
            table.devices.append(each)
            table.open_places(each)
        held: list[Segment] = []
        ids: set[int] = set()
        for what, kind, number in steps:
            target = devices[number % 2]
            if what == 0 and target.free:
                segment = table.take(target, kind)
                assert segment.id not in ids
                ids.add(segment.id)
                held.append(segment)
            elif what == 1 and held:
                segment = held.pop(number % len(held))
                table.add_live(segment.id, -segment.live)
                table.add_pending(segment.id << 24, -segment.pending)
                table.release(segment)
            elif what == 2 and held:
                segment = held[number % len(held)]
                table.add_live(segment.id, number)
                if segment.kind is not Kind.MAP:
                    table.add_pending(segment.id << 24 | 1, 2)
                    table.drop_pending([segment.id << 24 | 1, 0, 1])
            places = [(segment.device.index, segment.index) for segment in held]
            assert len(set(places)) == len(places)
            for each in devices:
                mine = {index for number_, index in places if number_ == each.index}
                assert sorted([*each.free, *mine]) == list(range(each.segment_count))
            data = [segment for segment in held if segment.kind is not Kind.MAP]
            assert table.live == sum(segment.live for segment in data)
            assert table.pending == sum(segment.pending for segment in data)
            assert table.map_live == sum(segment.live for segment in held if segment.kind is Kind.MAP)
            assert table.map_slots == sum(segment.slots for segment in held if segment.kind is Kind.MAP)
            assert table.free_slots == sum(len(each.free) for each in devices) * 255
            sums = (table.live, table.pending, table.map_live, table.map_slots, table.free_slots, table.total_slots)
            table.rebuild_free()
            assert sums == (
                table.live, table.pending, table.map_live, table.map_slots, table.free_slots, table.total_slots,
            )  # fmt: skip

    run(body)


def test_ids_go_on_rising_over_reopenings(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        highest = 0
        for number in range(5):
            async with Pool.open(home) as pool:
                if not number:
                    await pool.create_volume("v", 8 * MIB)
                await pool.volume("v").write(0, block(number) * 600)
                table = pool._engine.segments
                fresh = [i for i, segment in table.by_id.items() if segment.open]
                assert min(fresh) > highest
                highest = max(table.by_id)

    run(body)


def test_a_pinned_segment_is_not_reused_until_its_reader_is_done(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 4 * MIB)
            await volume.write(0, block(1) * 254)
            await volume.write(MIB, block(2) * 300)
            (address,), _ = await volume.entries(0, 1)
            segment = pool._engine.segments.by_id[address >> 24]
            segment.pins += 1
            await volume.trim(0, 4 * MIB)
            await settle(pool, 3)
            assert segment.id in pool._engine.segments.by_id
            assert (segment.live, segment.pending) == (0, 0)
            segment.pins -= 1
            await settle(pool, 2)
            assert segment.id not in pool._engine.segments.by_id
            assert segment.index in segment.device.free

    run(body)


def test_a_segment_is_not_reused_before_a_checkpoint_has_passed_its_last_record(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 4 * MIB)
            for number in range(6):
                await volume.write(0, block(number) * 250)
            table = pool._engine.segments
            dead = [s for s in table.by_id.values() if not s.open and not s.live and not s.pending]
            assert dead, "overwritten completely"
            assert all(segment.last_seq > pool.status().checkpoint_seq for segment in dead)
            await pool.checkpoint()
            assert not any(segment.id in table.by_id for segment in dead)
            assert await read(volume, 0, BLOCK_BYTES) == block(5)

    run(body)
