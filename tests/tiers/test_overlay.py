"""The newest layer of the map against a dictionary that does the same the slow way."""

import itertools
import random
import time

from hypothesis import given
from hypothesis import strategies as st

from tiers.overlay import HOLE, LEAF_BITS, RUN_BLOCKS, SMALL_RANGE_BLOCKS, Entry, Overlay, RangeSet

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
    assert [ranges.after(b) for b in range(SPACE)] == [
        next(n for n in itertools.count() if b + n not in model) for b in range(SPACE)
    ]
    inside = ranges.overlapping(*window)
    assert [b for lo, hi in inside for b in range(lo, hi)] == sorted(model & set(range(*window)))


WIDE = 900  # blocks: three leaves and a half
LONG = st.tuples(st.integers(0, WIDE - 1), st.integers(1, 600)).map(lambda span: (span[0], min(WIDE, sum(span))))
STEPS = st.lists(st.tuples(LONG, st.sampled_from(["put", "run", "unmap"])), max_size=12)
SMALL = st.booleans()


def play(
    script: list[tuple[tuple[int, int], str]],
    *,
    small: bool,
    onto: tuple[Overlay, dict[int, Entry]] | None = None,
) -> tuple[Overlay, dict[int, Entry]]:
    """Apply the script to an overlay and to a dictionary, and compare what the overlay says that it dropped."""
    overlay, model = onto or (Overlay(small=small), {})
    for number, ((start, end), what) in enumerate(script, 1):
        if what == "put":
            end = min(end, start + 30)
        blocks = range(start, end)
        before = sorted(model[block][0] for block in blocks if model.get(block, HOLE) != HOLE)
        first = number << 24 | 1
        if what == "unmap":
            dropped = overlay.unmap(start, len(blocks))
            model.update(dict.fromkeys(blocks, HOLE))
        else:
            checks = [number * 1000 + i for i in range(len(blocks))]
            if what == "run":
                dropped = overlay.put_run(start, first, checks)
            else:
                dropped = [overlay.put(block, first + i, checks[i]) for i, block in enumerate(blocks)]
            model.update({block: (first + i, checks[i]) for i, block in enumerate(blocks)})
        assert sorted(address for address in dropped if address) == before
    return overlay, model


@given(STEPS, SMALL)
def test_the_last_word_on_each_block_counts(script: list[tuple[tuple[int, int], str]], small: bool) -> None:
    overlay, model = play(script, small=small)
    assert {block: overlay.get(block) for block in range(WIDE + 5)} == {
        block: model.get(block) for block in range(WIDE + 5)
    }
    assert bool(overlay) == bool(model)


@given(STEPS, SMALL, LONG)
def test_patching_lays_the_layer_over_what_is_below(
    script: list[tuple[tuple[int, int], str]], small: bool, window: tuple[int, int]
) -> None:
    overlay, model = play(script, small=small)
    start, end = window
    below = {block: (block + (7 << 30), block + 9000) for block in range(start, end)}
    addresses, checks = [entry[0] for entry in below.values()], [entry[1] for entry in below.values()]
    overlay.patch(start, addresses, checks)
    assert list(zip(addresses, checks, strict=True)) == [model.get(block, below[block]) for block in range(start, end)]


@given(STEPS, SMALL)
def test_a_leaf_has_points_or_a_patch_and_the_weight_counts_both(
    script: list[tuple[tuple[int, int], str]], small: bool
) -> None:
    overlay, _ = play(script, small=small)
    assert not {block >> LEAF_BITS for block in overlay.points} & overlay.patches.keys()
    assert not (small and overlay.points)
    assert overlay.weight >= len(overlay.points) + len(overlay.patches) + len(overlay.ranges)
    assert (overlay.weight == 0) == (not overlay)


@given(STEPS, SMALL)
def test_every_named_block_lies_in_a_named_leaf(script: list[tuple[tuple[int, int], str]], small: bool) -> None:
    overlay, model = play(script, small=small)
    assert {block >> LEAF_BITS for block, entry in model.items() if entry != HOLE} <= overlay.named_leaves()


@given(STEPS, STEPS, SMALL, LONG)
def test_the_next_named_leaf_is_the_first_of_all_whatever_was_asked_before(
    script: list[tuple[tuple[int, int], str]],
    more: list[tuple[tuple[int, int], str]],
    small: bool,
    window: tuple[int, int],
) -> None:
    overlay, model = play(script, small=small)
    for then in ([], more):
        overlay, model = play(then, small=small, onto=(overlay, model))
        leaves = range((WIDE >> LEAF_BITS) + 2)
        named = overlay.named_leaves()
        assert [overlay.next_named(leaf) for leaf in leaves] == [
            min((other for other in named if other >= leaf), default=None) for leaf in leaves
        ]
    start, end = window
    addresses, checks = [1] * (end - start), [1] * (end - start)
    overlay.patch(start, addresses, checks)  # which now goes by the order of points
    assert list(zip(addresses, checks, strict=True)) == [model.get(block, (1, 1)) for block in range(start, end)]


def test_unmapping_terabytes_is_one_range_whatever_it_covers() -> None:
    for small in (False, True):
        overlay = Overlay(small=small)
        for number in range(100):
            overlay.put(number << 20, 1 << 24 | number, 1)
        assert sorted(overlay.unmap(0, 1 << 38)) == [1 << 24 | number for number in range(100)]
        assert (overlay.points, overlay.patches, len(overlay.ranges)) == ({}, {}, 1)
        assert overlay.get(1 << 37) == HOLE
        assert overlay.get(1 << 38) is None


def test_small_unmaps_are_no_ranges_so_that_many_of_them_stay_cheap() -> None:
    overlay = Overlay(small=False)
    overlay.unmap(5, SMALL_RANGE_BLOCKS)
    assert not overlay.ranges
    overlay.unmap(100, SMALL_RANGE_BLOCKS + 1)
    assert len(overlay.ranges) == 1


def test_random_blocks_of_a_large_volume_are_points_and_runs_are_patches() -> None:
    overlay = Overlay(small=False)
    overlay.put(10, 1 << 24, 1)
    assert not overlay.patches
    assert overlay.put_run(0, 2 << 24, list(range(RUN_BLOCKS))) == [1 << 24]
    assert not overlay.points
    assert overlay.get(10) == ((2 << 24) + 10, 10)


def test_zeroing_with_ragged_ends_among_many_points_sorts_them_once_not_each_time() -> None:
    overlay, rng = Overlay(small=False), random.Random(1)
    count, span = 100_000, 1 << 18
    for block in rng.sample(range(1 << 30), count):
        overlay.put(block, 1 << 24 | 1, 7)
    spent_s = 0.0
    for number in range(600):
        start = rng.randrange(1 << 30)
        expected = sum(start < block <= start + span for block in overlay.points) if number % 60 == 0 else None
        begun_s = time.process_time()
        # The edge block that the zeroing of a part of it writes, and the whole ones behind.
        overlay.put(start, 2 << 24 | number, 7)
        dropped = overlay.unmap(start + 1, span)
        spent_s += time.process_time() - begun_s
        assert expected is None or len(dropped) == expected
        count += 1 - len(dropped)
        assert overlay.get(start) == (2 << 24 | number, 7)
        assert overlay.get(start + 1) == overlay.get(start + span) == HOLE
    assert abs(len(overlay.points) - count) < 3  # an edge may hit a point
    assert spent_s < 2, "600 sorts take 12 s"
