"""Sets of changed extents: what a set of numbers would say, fast over terabytes, and judged when they are decoded."""

import errno
import random
import struct
import time
from collections.abc import Callable, Iterator

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tiers import TierError
from tiers.changes import (
    EXTENT_BYTES,
    MAX_ENCODED_BYTES,
    MAX_OTHER_PAGES,
    MAX_TRACKERS,
    PAGE_BITS,
    ChangedExtents,
    Marking,
    decode_trackers,
    encode_trackers,
    require_trackers,
)

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
PAGE = EXTENT_BYTES << PAGE_BITS

offsets = st.one_of(
    st.integers(0, 4 * PAGE),
    st.builds(lambda page, more: max(0, page * PAGE + more), st.integers(0, 4), st.integers(-EXTENT_BYTES, 70000)),
)
lengths = st.one_of(st.integers(0, 3 * EXTENT_BYTES), st.integers(0, 3 * PAGE), st.just(PAGE))
steps = st.lists(
    st.tuples(st.sampled_from(("add", "add", "discard", "update", "clear")), offsets, lengths), max_size=12
)


def extents_of(changes: ChangedExtents, start: int = 0) -> set[int]:
    found: set[int] = set()
    before = -1
    for offset, length in changes.runs(start):
        assert offset % EXTENT_BYTES == length % EXTENT_BYTES == 0 < length
        assert offset > before, "runs are maximal, and in order"
        before = offset + length
        found.update(range(offset // EXTENT_BYTES, before // EXTENT_BYTES))
    return found


def touched(offset: int, length: int) -> range:
    return range(offset // EXTENT_BYTES, -(-(offset + length) // EXTENT_BYTES)) if length else range(0)


def within(offset: int, length: int) -> range:
    return range(-(-offset // EXTENT_BYTES), (offset + length) // EXTENT_BYTES)


@settings(max_examples=60, deadline=None)
@given(steps, offsets)
def test_it_says_what_a_set_of_numbers_says(todo: list[tuple[str, int, int]], start: int) -> None:
    changes, model = ChangedExtents(), set[int]()
    for kind, offset, length in todo:
        if kind == "add":
            changes.add(offset, length)
            model.update(touched(offset, length))
        elif kind == "discard":
            changes.discard(offset, length)
            model.difference_update(within(offset, length))
        elif kind == "clear":
            changes.clear()
            model.clear()
        else:
            other = ChangedExtents()
            other.add(offset, length)
            changes.update(other)
            model.update(touched(offset, length))
            assert extents_of(other) == set(touched(offset, length)), "the other one stays what it was"
    assert extents_of(changes) == model
    assert changes.count == len(model)
    assert bool(changes) == bool(model)
    assert extents_of(changes, start) == {extent for extent in model if extent >= start // EXTENT_BYTES}
    assert ChangedExtents.decode(changes.encode()) == changes == changes.copy()


copied_steps = st.lists(
    st.tuples(
        st.integers(0, 2), st.sampled_from(("add", "add", "discard", "update", "clear", "copy")), offsets, lengths
    ),
    max_size=16,
)


@settings(max_examples=100, deadline=None)
@given(copied_steps)
def test_copies_go_different_ways(todo: list[tuple[int, str, int, int]]) -> None:
    sets, models = [ChangedExtents() for _ in range(3)], [set[int]() for _ in range(3)]
    for which, kind, offset, length in todo:
        other = (which + 1) % 3
        if kind == "add":
            sets[which].add(offset, length)
            models[which].update(touched(offset, length))
        elif kind == "discard":
            sets[which].discard(offset, length)
            models[which].difference_update(within(offset, length))
        elif kind == "clear":
            sets[which].clear()
            models[which].clear()
        elif kind == "copy":
            sets[other], models[other] = sets[which].copy(), models[which].copy()
        else:
            sets[which].update(sets[other])
            models[which] |= models[other]
    assert [extents_of(one) for one in sets] == models


marked_steps = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.sampled_from(("mark", "mark", "mark", "add", "discard", "update", "clear", "new", "copy", "leave")),
        st.integers(0, 40),
        st.integers(1, 40),
    ),
    max_size=30,
)


BOTH = [("a", "new", 0, 1), ("b", "new", 0, 1), ("a", "mark", 0, 1)]
"""Then a has nothing that b hasn't."""


@settings(max_examples=500, deadline=None)
@given(marked_steps)
@example([*BOTH, ("a", "add", 32, 1), ("a", "mark", 32, 1)])
@example([*BOTH, ("b", "clear", 0, 1), ("a", "mark", 0, 1)])
@example([*BOTH, ("c", "new", 0, 1), ("a", "mark", 0, 1)])
def test_what_is_marked_is_in_each_tracker_whatever_was_done_to_one_of_them(
    todo: list[tuple[str, str, int, int]],
) -> None:
    """Blocks, not extents: a few extents only, so that they are met again."""
    marking, trackers, models = Marking(), dict[str, ChangedExtents](), dict[str, set[int]]()
    for name, kind, block, count in todo:
        offset, length = block * 4096, count * 4096
        if kind == "mark":
            marking.mark(trackers, [1, block, count, 0, block + 90, 1])
            for model in models.values():
                model.update(touched(offset, length), touched(offset + 90 * 4096, 4096))
        elif name not in trackers or kind == "new":
            trackers[name], models[name] = ChangedExtents(), set()
        elif kind == "add":
            trackers[name].add(offset, length)
            models[name].update(touched(offset, length))
        elif kind == "discard":
            trackers[name].discard(offset, length)
            models[name].difference_update(within(offset, length))
        elif kind == "update":
            for other, more in trackers.items():
                trackers[name].update(more)
                models[name] |= models[other]
        elif kind == "clear":
            trackers[name].clear()
            models[name].clear()
        elif kind == "copy":
            trackers[name] = trackers[name].copy()
        else:
            del trackers[name], models[name]
    assert {name: extents_of(tracker) for name, tracker in trackers.items()} == models


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused_or_a_set(data: st.DataObject) -> None:
    changes = ChangedExtents()
    changes.add(3 * PAGE, 2 * PAGE)
    changes.add(0, 1)
    changes.add(7 * PAGE + 12345678, 1 << 20)
    raw = bytearray(encode_trackers({"a": changes, "b": ChangedExtents()}))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        if data.draw(st.booleans()):
            raw[at] ^= data.draw(st.integers(1, 255))
        else:
            del raw[at]
    judge_anything(bytes(raw))
    judge_anything(bytes(raw[10:]))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_a_set(raw: bytes) -> None:
    judge_anything(raw)
    judge_anything(b"\1\0\0\0" + raw)


def judge_anything(raw: bytes) -> None:
    """What is accepted is a set like any other; else it is a TierError, and nothing else."""
    for decode in (decode_trackers, lambda raw: {"": ChangedExtents.decode(raw)}):
        try:
            for found in decode(raw).values():
                assert ChangedExtents.decode(found.encode()) == found
        except TierError as error:
            assert error.errno == errno.EPROTO
            assert "\n" not in str(error)


def test_a_header_that_promises_gigabytes_is_refused_before_they_are_there() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 20))
    for runs, pages in ((0, 1 << 14), (1 << 31, 0), (1 << 24, 0), (0, (1 << 14) + 1)):
        with pytest.raises(TierError) as refused:
            ChangedExtents.decode(struct.pack("<HHII", 1, 0, runs, pages) + bomb)
        assert refused.value.errno == errno.EPROTO


def test_another_version_is_refused_and_named() -> None:
    with pytest.raises(TierError, match="format version 9 and this release reads 1"):
        ChangedExtents.decode(b"\x09" + ChangedExtents().encode()[1:])
    with pytest.raises(TierError, match="format version 9 and this release reads 1"):
        decode_trackers(b"\x09\0\0\0")


def test_version_1_is_read_as_it_was_written() -> None:
    changes = ChangedExtents()
    changes.add(3 * PAGE, 2 * PAGE)
    changes.add(7 * PAGE + 3 * EXTENT_BYTES, 1 << 20)
    golden = bytes.fromhex(
        "0100010006726563656e742b00000001000000010000000100000028b52ffd60180fad0000500300"
        "02000700f8ff0700041000f9f704e381072c"
    )
    assert decode_trackers(golden) == {"recent": changes}


def test_terabytes_are_added_and_discarded_at_once() -> None:
    changes = ChangedExtents()
    begun = time.process_time()
    changes.add(12345, 100 * TIB)
    assert list(changes.runs()) == [(0, 100 * TIB + EXTENT_BYTES)]
    assert len(changes.encode()) < 200
    other = changes.copy()
    changes.update(other)
    changes.discard(0, 99 * TIB)
    assert list(changes.runs()) == [(99 * TIB, TIB + EXTENT_BYTES)]
    assert changes.count == (TIB >> 16) + 1
    assert time.process_time() - begun < 1.0  # 0.06 s


def test_an_add_of_one_block_costs_next_to_nothing() -> None:
    changes = ChangedExtents()
    offsets = [random.Random(1).randrange(10 * TIB) & ~4095 for _ in range(1000)]
    for offset in offsets:
        changes.add(offset, 4096)
    add = changes.add
    best = min(_timed(add, offsets) for _ in range(20))
    assert best < 2e-6  # 0.2 us


def test_a_copy_of_much_takes_no_time_in_which_clients_would_wait() -> None:
    changes = ChangedExtents()
    for index in range(5000):
        changes.add(index * PAGE, 1)
    begun = time.perf_counter()
    copies = [changes.copy() for _ in range(20)]
    assert (time.perf_counter() - begun) / len(copies) < 0.005  # 0.3 ms


def _timed(add: Callable[[int, int], None], offsets: list[int]) -> float:
    begun = time.perf_counter()
    for offset in offsets:
        add(offset, 4096)
    return (time.perf_counter() - begun) / len(offsets)


def test_what_would_be_too_long_is_rounded_up_and_has_all_that_it_had() -> None:
    changes = ChangedExtents()
    rng = random.Random(2)
    for index in range(1300):
        bits = rng.randbytes(4096)
        changes._pages[3 * index] = bytearray(bits)
    data = changes.encode()
    assert len(data) <= MAX_ENCODED_BYTES
    found = ChangedExtents.decode(data)
    before = found.count
    found.update(changes)
    assert found.count == before


def test_what_is_scattered_over_more_than_a_decoder_holds_is_rounded_to_whole_pages() -> None:
    changes = ChangedExtents()
    for index in range(MAX_OTHER_PAGES + 1):
        changes.add(2 * index * PAGE, 1)
    found = ChangedExtents.decode(changes.encode())
    assert found.count == (MAX_OTHER_PAGES + 1) << PAGE_BITS


def test_other_sets_are_taken_by_their_runs() -> None:
    class Other:
        def runs(self, start: int = 0) -> Iterator[tuple[int, int]]:
            yield from ((MIB, 2 * MIB), (GIB, 1))

    changes = ChangedExtents()
    changes.update(Other())
    assert list(changes.runs()) == [(MIB, 2 * MIB), (GIB, EXTENT_BYTES)]


def test_trackers_that_cannot_be_saved_are_refused() -> None:
    for trackers in ({"": ChangedExtents()}, {"ä" * 128: ChangedExtents()}, dict.fromkeys(map(str, range(65)))):
        with pytest.raises(TierError) as refused:
            require_trackers(trackers)  # type: ignore[arg-type]
        assert refused.value.errno == errno.EINVAL
    require_trackers(dict.fromkeys(map(str, range(MAX_TRACKERS)), ChangedExtents()))
