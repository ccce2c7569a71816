"""The newest layer of the map against a dictionary that does the same the slow way."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tiers.overlay import HOLE, SMALL_RANGE_BLOCKS, Entry, Overlay, RangeSet

SPACE = 120
SPANS = st.tuples(st.integers(0, SPACE - 1), st.integers(1, 60)).map(lambda span: (span[0], min(SPACE, sum(span))))


@given(st.lists(SPANS, max_size=30), SPANS)
def test_a_range_set_is_a_set_of_blocks(spans: list[tuple[int, int]], window: tuple[int, int]) -> None:
    ranges, model = RangeSet(), set()
    for start, end in spans:
        ranges.add(start, end)
        model |= set(range(start, end))
    assert {block for block in range(-1, SPACE + 2) if block in ranges} == model
    assert bool(ranges) == bool(model)
    parts = list(zip(ranges.starts, ranges.ends, strict=True))
    assert len(parts) == len(ranges)
    assert all(start < end for start, end in parts)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(parts)), "disjoint, not adjacent"
    inside = ranges.overlapping(*window)
    assert [b for lo, hi in inside for b in range(lo, hi)] == sorted(model & set(range(*window)))


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[int, int, bool]]:
    """(first block, count, is a write)."""
    return [
        (start, end - start, write)
        for (start, end), write in draw(st.lists(st.tuples(SPANS, st.booleans()), max_size=25))
    ]


def play(script: list[tuple[int, int, bool]]) -> tuple[Overlay, dict[int, Entry]]:
    """Apply the script to an overlay and to a dictionary, and compare what the overlay says it dropped."""
    overlay, model = Overlay(), {}
    points: dict[int, Entry] = {}
    for number, (start, count, write) in enumerate(script, 1):
        blocks = range(start, start + count)
        if write:
            for block in blocks:
                overlay.points[block] = points[block] = model[block] = (number << 24 | block, number)
        else:
            dropped = overlay.unmap(start, count)
            expected = [points.pop(block)[0] for block in blocks if block in points]
            assert sorted(a for a in dropped if a) == sorted(expected)
            model.update(dict.fromkeys(blocks, HOLE))
    return overlay, model


@given(steps())
def test_the_last_word_on_each_block_counts(script: list[tuple[int, int, bool]]) -> None:
    overlay, model = play(script)
    assert {block: overlay.get(block) for block in range(SPACE)} == {block: model.get(block) for block in range(SPACE)}
    assert bool(overlay) == bool(model)


@given(steps(), SPANS)
def test_patching_lays_the_layer_over_what_is_below(
    script: list[tuple[int, int, bool]], window: tuple[int, int]
) -> None:
    overlay, model = play(script)
    start, end = window
    addresses, checks = [block + 7000 for block in range(start, end)], [block + 9000 for block in range(start, end)]
    overlay.patch(start, addresses, checks)
    assert list(zip(addresses, checks, strict=True)) == [
        model.get(block, (block + 7000, block + 9000)) for block in range(start, end)
    ]


@given(steps())
def test_the_weight_bounds_the_memory_that_an_overlay_takes(script: list[tuple[int, int, bool]]) -> None:
    overlay, _ = play(script)
    assert overlay.weight >= len(overlay.points) + len(overlay.ranges)
    assert (overlay.weight == 0) == (not overlay)


def test_unmapping_terabytes_is_one_range_whatever_it_covers() -> None:
    overlay = Overlay()
    overlay.points.update({block << 20: (1 << 24, 1) for block in range(100)})
    assert overlay.unmap(0, 1 << 38) == [1 << 24] * 100
    assert (overlay.points, len(overlay.ranges)) == ({}, 1)
    assert overlay.get(1 << 37) == HOLE
    assert overlay.get(1 << 38) is None


def test_small_unmaps_are_points_so_that_many_of_them_stay_cheap() -> None:
    overlay = Overlay()
    overlay.unmap(5, SMALL_RANGE_BLOCKS)
    assert not overlay.ranges
    overlay.unmap(100, SMALL_RANGE_BLOCKS + 1)
    assert len(overlay.ranges) == 1
