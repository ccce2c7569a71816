"""Writing streams and restoring them: any image and any changes come back, and what doesn't fit is refused by name."""

from __future__ import annotations

import io
import itertools
import random
from dataclasses import replace

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from terrace.backup.errors import BackupError, BadStreamError
from terrace.backup.extents import CHANGED, READS_ZERO, Extent, Need, combine, pieces
from terrace.backup.restore import Held, Marker, judge, restore
from terrace.backup.stream import MAX_DATA_BYTES, Data, Header, Zeros, verify
from terrace.backup.write import write_stream
from tests.terrace.fakevolume import BLOCK, FakeSource, FakeVolume, MemorySink, header, reader, stream_of

CONTENTS = [bytes(BLOCK), b"a" * BLOCK, random.Random(3).randbytes(BLOCK), (b"some text " * 410)[:BLOCK]]


@st.composite
def histories(draw: st.DrawFn) -> list[bytes]:
    """Versions of a volume: each differs from the one before in some blocks, and sometimes in size."""
    versions = []
    image = bytearray()
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 12)) * BLOCK + draw(st.sampled_from([0, 512, 3584]))
        image = image[:size].ljust(size, b"\0")
        for number in draw(st.lists(st.integers(0, size // BLOCK - 1), max_size=8)):
            image[number * BLOCK : (number + 1) * BLOCK] = draw(st.sampled_from(CONTENTS))
        versions.append(bytes(image))
    return versions


def chain_of(versions: list[bytes], step: int = 1 << 40) -> list[bytes]:
    streams = [stream_of(versions[0], 1, step=step)]
    for number, (before, image) in enumerate(itertools.pairwise(versions), 2):
        streams.append(stream_of(image, number, (number - 1, before), step=step))
    return streams


def apply(volume: FakeVolume, *streams: bytes) -> None:
    readers = [reader(stream, f"stream{number}") for number, stream in enumerate(streams, 1)]

    async def main() -> None:
        await restore(readers, volume, volume, await volume.held(), target="demo/new")

    trio.run(main)


def refused(volume: FakeVolume, *streams: bytes) -> str:
    with pytest.raises(BackupError) as caught:
        apply(volume, *streams)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@settings(max_examples=60, deadline=None)
@given(histories(), st.sampled_from([1 << 40, BLOCK, 3 * BLOCK]), st.integers(0, 3))
def test_any_history_comes_back_from_a_full_backup_and_its_increments(
    versions: list[bytes], step: int, together: int
) -> None:
    streams = chain_of(versions, step)
    volume = FakeVolume()
    first = streams[: together + 1]
    apply(volume, *first)
    assert bytes(volume.image) == versions[len(first) - 1]
    for image, stream in zip(versions[len(first) :], streams[len(first) :], strict=True):
        apply(volume, stream)
        assert bytes(volume.image) == image
    assert [image for _, image in volume.markers] == versions


def test_nothing_is_read_but_what_changed_and_is_stored() -> None:
    base = bytearray(random.Random(1).randbytes(64 * BLOCK))
    image = bytearray(base)
    image[5 * BLOCK] ^= 1
    image[20 * BLOCK : 22 * BLOCK] = bytes(2 * BLOCK)
    image[63 * BLOCK + 1] ^= 1
    source, sink = FakeSource(bytes(image), bytes(base)), MemorySink()
    trio.run(lambda: write_stream(source, sink, header(len(image), 2, 1)))
    assert sorted(source.reads) == [(5 * BLOCK, BLOCK), (63 * BLOCK, BLOCK)]
    records = list(reader(bytes(sink.data)).records())
    assert [(type(record), record.offset, record.length) for record in records] == [
        (Data, 5 * BLOCK, BLOCK),
        (Zeros, 20 * BLOCK, 2 * BLOCK),
        (Data, 63 * BLOCK, BLOCK),
    ]


def test_stored_zeros_become_a_hole_and_holes_are_joined() -> None:
    class Stored(FakeSource):
        async def extents(self, offset: int, length: int) -> list[Extent]:
            await trio.lowlevel.checkpoint()
            return [Extent(offset, length, Need.DATA)]

    image = bytes(3 * MAX_DATA_BYTES) + b"x" * 512
    sink = MemorySink()
    trio.run(lambda: write_stream(Stored(image), sink, header(len(image), 1)))
    assert list(reader(bytes(sink.data)).records()) == [
        Zeros(0, 3 * MAX_DATA_BYTES),
        Data(3 * MAX_DATA_BYTES, b"x" * 512),
    ]


def test_reads_are_in_flight_together_and_bounded_and_a_slow_sink_stops_them() -> None:
    image = random.Random(1).randbytes(BLOCK) * 256 * 40
    progress = list[tuple[int, int]]()

    class Together(FakeSource):
        async def read(self, offset: int, length: int) -> bytes:
            self.reading += 1
            self.most_reading = max(self.reading, self.most_reading)
            await trio.testing.wait_all_tasks_blocked()  # so all that may be read together is being read
            self.reading -= 1
            return await super().read(offset, length)

    source = Together(image)

    class Slow(MemorySink):
        async def write(self, data: bytes) -> None:
            await trio.testing.wait_all_tasks_blocked()
            written = len(self.data) // (1 << 10)
            assert len(source.reads) <= 40 and (written or len(source.reads) <= 4 + 2)
            await super().write(data)

    sink = Slow()

    def note(done: int, total: int) -> None:
        progress.append((done, total))

    trio.run(lambda: write_stream(source, sink, header(len(image), 1), in_flight=4, level=1, progress=note))
    assert 4 <= source.most_reading <= 6
    assert progress[-1] == (len(image), len(image))
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert verify(io.BytesIO(sink.data), "it").totals.data_bytes == len(image)


def test_a_read_that_fails_ends_the_stream_before_its_end() -> None:
    def fail(offset: int) -> None:
        if offset == 2 * MAX_DATA_BYTES:
            raise OSError(5, "a block is damaged")

    image = b"z" * 5 * MAX_DATA_BYTES
    sink = MemorySink()
    with pytest.raises(OSError, match="a block is damaged"):
        trio.run(lambda: write_stream(FakeSource(image, on_read=fail), sink, header(len(image), 1)))
    with pytest.raises(BadStreamError, match="cut short"):
        verify(io.BytesIO(sink.data), "it")


@pytest.mark.parametrize(
    "extents",
    [
        [],
        [Extent(0, 0, Need.ZEROS)],
        [Extent(BLOCK, BLOCK, Need.ZEROS)],
        [Extent(0, 9 * BLOCK, Need.ZEROS)],
        [Extent(0, 100, Need.DATA)],
    ],
)
def test_a_description_that_has_a_gap_or_passes_the_end_is_refused(extents: list[Extent]) -> None:
    class Wrong(FakeSource):
        async def extents(self, offset: int, length: int) -> list[Extent]:
            await trio.lowlevel.checkpoint()
            return extents

    with pytest.raises(BackupError, match="see the log"):
        trio.run(lambda: write_stream(Wrong(bytes(8 * BLOCK)), MemorySink(), header(8 * BLOCK, 1)))


def test_a_source_of_another_size_than_announced_is_refused() -> None:
    with pytest.raises(BackupError, match="8192 bytes and its export 4096"):
        trio.run(lambda: write_stream(FakeSource(bytes(BLOCK)), MemorySink(), header(2 * BLOCK, 1)))


# -- extents -----------------------------------------------------------------------------------------------------------

DESCRIBED = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), max_size=8)


@given(st.integers(0, 10), st.integers(1, 20), DESCRIBED, st.none() | DESCRIBED)
def test_extents_say_of_each_byte_what_the_two_descriptions_say(
    offset: int, length: int, allocation: list[tuple[int, int]], changed: list[tuple[int, int]] | None
) -> None:
    def flat(described: list[tuple[int, int]]) -> list[int]:
        return [flags for count, flags in described for _ in range(count)]

    found = combine(offset, length, allocation, changed)
    different = [CHANGED] * 100 if changed is None else flat(changed)
    expected = [
        Need.SAME if not b & CHANGED else Need.ZEROS if a & READS_ZERO else Need.DATA
        for a, b in zip(flat(allocation), different, strict=False)
    ][:length]
    assert [extent.need for extent in found for _ in range(extent.length)] == expected
    assert all(one.end == other.offset and one.need != other.need for one, other in itertools.pairwise(found))
    assert not found or found[0].offset == offset


@given(st.integers(0, 100), st.integers(1, 100), st.integers(1, 30))
def test_pieces_are_the_same_bytes_and_cross_no_boundary(offset: int, length: int, size: int) -> None:
    parts = list(pieces([Extent(offset, length, Need.DATA)], size))
    assert sum(part.length for part in parts) == length and parts[0].offset == offset
    assert all(part.offset // size == (part.end - 1) // size for part in parts)
    assert list(pieces([Extent(offset, length, Need.ZEROS)], size)) == [Extent(offset, length, Need.ZEROS)]


# -- what doesn't fit --------------------------------------------------------------------------------------------------

VERSIONS = [b"".join(random.Random(n).choices(CONTENTS, k=4)) for n in range(4)]


def test_a_missing_increment_is_named_and_nothing_is_applied() -> None:
    full, first, second, third = chain_of(VERSIONS)
    volume = FakeVolume()
    message = refused(volume, full, first, third)
    assert "stream3 is an increment based on snapshot s3 (id pool:3, of 2023-11-15 01:13:20 UTC)" in message
    assert "demo/new would be at s2 (id pool:2" in message and "apply s3 first" in message
    assert not volume.exists
    message = refused(volume, first)
    assert "based on snapshot s1" in message and "new and empty" in message and not volume.exists
    apply(volume, full)
    image = bytes(volume.image)
    message = refused(volume, second)
    assert "based on snapshot s2" in message and "demo/new is at s1" in message
    assert bytes(volume.image) == image


def test_a_full_backup_goes_to_a_new_volume_only_and_only_first() -> None:
    full, first, *_ = chain_of(VERSIONS)
    volume = FakeVolume()
    assert "another full backup" in refused(volume, full, first, full)
    apply(volume, full)
    assert "demo/new exists" in refused(volume, full)


def test_an_increment_of_another_volume_is_refused_though_its_base_has_the_same_name() -> None:
    ours = header(BLOCK, 1)
    theirs = header(BLOCK, 2, 1, volume_id="other:v")
    with pytest.raises(BackupError, match="another volume"):
        judge([("a", ours), ("b", theirs)], None, "t")
    with pytest.raises(BackupError, match="based on snapshot s1"):
        judge([("b", theirs)], Held(Marker.of(ours, ours.snapshot), True), "t")
    renamed = replace(header(BLOCK, 2, 1), base=replace(ours.snapshot, id="pool:77"))
    with pytest.raises(BackupError, match="id pool:77"):
        judge([("a", ours), ("b", renamed)], None, "t")


def test_a_volume_that_was_written_to_since_takes_no_increment() -> None:
    full, first, *_ = chain_of(VERSIONS)
    volume = FakeVolume()
    apply(volume, full)
    volume.image[0] ^= 1
    assert "has changed since its snapshot restored-" in refused(volume, first)
    volume.image[0] ^= 1
    apply(volume, first)


def test_a_volume_that_was_never_restored_takes_no_increment() -> None:
    volume = FakeVolume(bytearray(VERSIONS[0]), exists=True)
    assert "was not restored from a backup" in refused(volume, chain_of(VERSIONS)[1])


def test_a_damaged_stream_leaves_the_target_marked_as_incomplete() -> None:
    full, first, second, _ = chain_of([random.Random(n).randbytes(3 << 20) for n in range(4)])
    broken = bytearray(first)
    broken[-200] ^= 1
    volume = FakeVolume()
    message = refused(volume, full, bytes(broken), second)
    assert "stream2 is damaged at byte" in message
    assert "demo/new is incomplete now, with only a part of demo/vol@s2" in message
    assert f"roll it back to its snapshot {volume.markers[-1][0].name}" in message
    assert len(volume.markers) == 1
    further = refused(volume, first)
    assert "is not complete: a restore or an import that was to fill it has not ended" in further
    assert f"roll it back to its snapshot {volume.markers[-1][0].name}, or delete it" in further
    volume = FakeVolume()
    assert "delete it and restore again" in refused(volume, full[:-1])
    assert volume.markers == [] and "is not complete" in refused(volume, first)


def test_a_target_that_fails_is_incomplete_too() -> None:
    volume = FakeVolume(fail_at=1 << 20)
    message = refused(volume, stream_of(random.Random(1).randbytes(2 << 20)))
    assert (
        "demo/new can't be written at byte 1048576: it broke" in message
        and "incomplete" in message
        and volume.markers == []
    )


def test_a_new_volume_is_not_written_where_it_is_to_read_as_zeros() -> None:
    image = CONTENTS[2] + bytes(2 * BLOCK) + CONTENTS[2]
    volume = FakeVolume()
    apply(volume, stream_of(image))
    assert bytes(volume.image) == image and volume.writes == 2


@given(st.text(min_size=1, max_size=80), st.text(min_size=1), st.text(min_size=1))
def test_a_marker_is_a_name_that_a_snapshot_may_have_and_tells_identities_apart(
    name: str, one: str, other: str
) -> None:
    from tiers.names import validate_name

    def marker(volume_id: str, snapshot_id: str) -> Marker:
        made: Header = header(BLOCK, 1, volume_id=volume_id)
        return Marker.of(made, replace(made.snapshot, name=name, id=snapshot_id))

    validate_name("snapshot", marker(one, other).name)
    assert Marker.parse(marker(one, other).name) == marker(one, other)
    if one != other:
        assert marker(one, other).digest != marker(other, one).digest
        assert marker(one, one).digest != marker(one, other).digest
    assert Marker.parse("monday") is None
