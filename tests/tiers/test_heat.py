"""Heat's counters: what is counted, what fades, what stays bounded, what a stream is."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiers.heat import (
    CHUNK_EXTENTS,
    EXACT,
    EXTENT_BLOCKS,
    ROW_BYTES,
    TOUCHES,
    Extents,
    Heat,
    Ints,
    Sketch,
    Streams,
    Touch,
)


def ints(*values: int) -> Ints:
    return np.array(values, np.int64)


def finish(steps: object) -> None:
    for _ in steps:  # type: ignore[attr-defined]
        pass


def levels(extents: Extents, volume: int, *blocks: int) -> list[list[int]]:
    return extents.levels(volume, ints(*blocks)).tolist()


# -- extents -----------------------------------------------------------------------------------------------------------


def test_reads_and_writes_of_an_extent_are_counted_apart_and_by_volume() -> None:
    extents = Extents(1 << 20)
    extents.note(Touch.READ, 1, ints(0, 7, 5000), ints(3, 1, 2))
    extents.note(Touch.WRITE, 1, ints(7), ints(4))
    extents.note(Touch.READ, 2, ints(7), ints(9))
    blocks = [0, 7 * EXTENT_BLOCKS + 15, 5000 * EXTENT_BLOCKS, 8 * EXTENT_BLOCKS, 10**9]
    assert levels(extents, 1, *blocks) == [[3, 1, 2, 0, 0], [0, 4, 0, 0, 0]]
    assert levels(extents, 2, *blocks) == [[0, 9, 0, 0, 0], [0] * 5]
    assert levels(extents, 3, *blocks) == [[0] * 5, [0] * 5]


def test_a_tebibyte_in_use_everywhere_has_32_mib_of_counters() -> None:
    chunks = (1 << 40) // (CHUNK_EXTENTS * EXTENT_BLOCKS * 4096)
    assert chunks * ROW_BYTES == 32 << 20
    extents = Extents(64 << 20)
    extents.note(
        Touch.READ, 1, np.arange(0, chunks * CHUNK_EXTENTS, 17), np.ones(-(-chunks * CHUNK_EXTENTS // 17), int)
    )
    assert len(extents) == chunks


def test_counts_far_above_a_byte_are_right_in_the_mean_and_saturate() -> None:
    extents = Extents(1 << 20)
    cells = np.arange(2000)
    for _ in range(400):
        extents.note(Touch.READ, 1, cells, np.full(2000, 3))
    means = TOUCHES[extents.levels(1, cells * EXTENT_BLOCKS)[0]]
    assert abs(float(means.mean()) / 1200 - 1) < 0.03
    assert float(means.std()) / 1200 < 0.25
    extents.note(Touch.READ, 1, ints(1), ints(1 << 40))
    extents.note(Touch.READ, 1, ints(1), ints(1 << 40))
    assert levels(extents, 1, EXTENT_BLOCKS)[0] == [255]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 4)), max_size=40))
def test_small_counts_are_exact(touches: list[tuple[int, int]]) -> None:
    extents, truth = Extents(1 << 20), Counter[int]()
    for extent, count in touches:
        if truth[extent] + count <= EXACT:
            truth[extent] += count
            extents.note(Touch.WRITE, 5, ints(extent), ints(count))
    assert levels(extents, 5, *(e * EXTENT_BLOCKS for e in range(41)))[1] == [truth[e] for e in range(41)]


def test_halving_halves_and_what_has_faded_takes_no_memory() -> None:
    extents = Extents(4 << 20)
    extents.note(Touch.READ, 1, ints(0, 1, 2, 10 * CHUNK_EXTENTS), ints(12, 1, 10**6, 1))
    assert len(extents) == 2
    before = float(TOUCHES[levels(extents, 1, 32)[0][0]])
    finish(extents.halve())
    assert levels(extents, 1, 0, 16)[0] == [6, 0]
    assert float(TOUCHES[levels(extents, 1, 32)[0][0]]) / before == pytest.approx(0.5, rel=0.04)
    assert len(extents) == 1, "the chunk with nothing but a single touch is gone"
    for _ in range(25):
        finish(extents.halve())
    assert len(extents) == 0
    extents.note(Touch.READ, 1, ints(3), ints(1))
    assert levels(extents, 1, 0, 32, 48)[0] == [0, 0, 1], "the memory that is used again is clean"


def test_at_the_bound_the_coldest_make_room() -> None:
    extents = Extents(16 * ROW_BYTES)
    for chunk in range(16):
        extents.note(Touch.READ, 1, ints(chunk * CHUNK_EXTENTS), ints(chunk + 1))
    extents.note(Touch.READ, 2, ints(0), ints(1))
    assert extents.crowded and len(extents) == 16
    assert levels(extents, 2, 0)[0] == [0]
    finish(extents.evict())
    assert not extents.crowded and len(extents) == 14
    assert [chunk for chunk, _ in extents.chunks(1)] == list(range(2, 16))
    extents.note(Touch.READ, 2, ints(0), ints(1))
    assert levels(extents, 2, 0)[0] == [1]


@given(st.sets(st.integers(0, 5 * CHUNK_EXTENTS), min_size=1, max_size=30), st.integers(0, 5 * CHUNK_EXTENTS * 16))
def test_a_deleted_volume_is_forgotten_and_a_shrunk_one_behind_its_end(touched: set[int], end: int) -> None:
    extents = Extents(1 << 20)
    for volume in (1, 2, 3):
        extents.note(Touch.READ, volume, ints(*sorted(touched)), np.ones(len(touched), np.int64))
    extents.forget(2, end)
    blocks = [extent * EXTENT_BLOCKS for extent in sorted(touched)]
    kept = [int(end > 0 and block < end) for block in blocks]
    assert levels(extents, 2, *blocks)[0] == kept
    for volume in (1, 3):
        assert levels(extents, volume, *blocks)[0] == [1] * len(blocks)
    extents.forget(2)
    assert extents.volumes() == {1, 3}


def test_what_is_exported_can_be_restored() -> None:
    extents = Extents(4 << 20)
    rng = np.random.default_rng(3)
    for volume in (4, 9):
        touched = np.unique(rng.integers(0, 200 * CHUNK_EXTENTS, 500))
        extents.note(Touch.READ, volume, touched, rng.integers(1, 50, len(touched)))
    other = Extents(4 << 20)
    for keys, rows in extents.export():
        other.restore(keys, rows)
    assert len(other) == len(extents) > 128
    for volume in (4, 9):
        for (chunk, row), (other_chunk, other_row) in zip(extents.chunks(volume), other.chunks(volume), strict=True):
            assert chunk == other_chunk and (row == other_row).all()


# -- sketches ----------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 1 << 38), st.integers(1, 9)), max_size=300))
def test_a_sketch_never_says_less_than_the_truth(touches: list[tuple[int, int, int]]) -> None:
    sketch, truth = Sketch(10), Counter[tuple[int, int]]()
    for volume, block, count in touches:
        sketch.note(volume, ints(block), ints(count))
        truth[volume, block] += count
    for (volume, block), count in truth.items():
        assert int(sketch.estimates(volume, ints(block))[0]) >= min(count, 255)


def test_a_sketch_that_is_not_crowded_is_nearly_always_right() -> None:
    sketch, rng = Sketch(16), np.random.default_rng(1)
    blocks = np.unique(rng.integers(0, 1 << 38, 8000))
    counts = rng.integers(1, 9, len(blocks))
    sketch.note(1, blocks, counts)
    assert float((sketch.estimates(1, blocks) == counts).mean()) > 0.97
    assert float((sketch.estimates(1, blocks + 1) == 0).mean()) > 0.97
    assert float((sketch.estimates(2, blocks) == 0).mean()) > 0.97, "volumes are told apart"
    both = sketch.estimates(np.repeat([1, 2], len(blocks)), np.tile(blocks, 2))
    assert (both[: len(blocks)] == sketch.estimates(1, blocks)).all()


def test_a_sketch_is_due_for_halving_when_it_fills_up() -> None:
    sketch = Sketch(10)
    sketch.note(1, np.arange(1000), np.ones(1000, np.int64))
    assert not sketch.is_due
    sketch.note(1, ints(5), ints(24))
    assert sketch.is_due
    finish(sketch.halve())
    assert not sketch.is_due and int(sketch.estimates(1, ints(5))[0]) in (12, 13)


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_request_counts_once_in_each_extent_and_each_block_that_it_touches() -> None:
    heat = Heat(1 << 20, 1 << 16)
    heat.note(Touch.READ, 1, ints(14, 15, 200), ints(4, 1, 1))
    assert levels(heat.extents, 1, 0, 16, 32, 200)[0] == [2, 1, 0, 1]
    assert heat.estimates(1, ints(13, 14, 15, 16, 17, 18, 200)).tolist() == [0, 1, 2, 1, 1, 0, 1]
    heat.note(Touch.WRITE, 1, ints(15), ints(1))
    assert heat.estimates(1, ints(15)).tolist() == [3]
    assert heat.write_estimates(1, ints(14, 15)).tolist() == [0, 1]


def earning(streams: Streams, requests: list[tuple[int, int]], cutoff: int = 256) -> list[bool]:
    """Which of the requests, in order of arrival, earn heat."""
    starts, counts = (np.array(column, np.int64) for column in zip(*requests, strict=True))
    order = np.argsort(starts, kind="stable")
    mask = streams.earning(starts[order], counts[order], order, cutoff)
    result = np.ones(len(requests), np.bool_)
    if mask is not None:
        result[order] = mask
    return [bool(earns) for earns in result]


def test_a_stream_longer_than_the_cutoff_earns_nothing_also_between_random_requests() -> None:
    rng = np.random.default_rng(5)
    random = [(int(block), 1) for block in rng.integers(1 << 30, 1 << 38, 3000)]
    stream = [(1000 + i, 1) for i in range(1000)]
    mixed = [request for pair in zip(random, stream, strict=False) for request in pair] + random[1000:]
    result = earning(Streams(), mixed)
    assert not any(earns for earns, (block, _) in zip(result, mixed, strict=True) if block < 1 << 30)
    assert all(earns for earns, (block, _) in zip(result, mixed, strict=True) if block >= 1 << 30)


def test_short_sequences_earn_heat() -> None:
    assert all(earning(Streams(), [(i, 16) for i in range(0, 256, 16)]))
    assert not any(earning(Streams(), [(i, 16) for i in range(0, 272, 16)]))
    assert not any(earning(Streams(), [(77, 257)])), "a single request that is as long as a stream is one"


def test_a_stream_is_followed_over_many_drains() -> None:
    streams, rng = Streams(), np.random.default_rng(5)
    results = []
    for i in range(300):
        noise = [(int(block), 1) for block in rng.integers(1 << 30, 1 << 38, 100)]
        results.append(earning(streams, [(4096 + 8 * i, 8), *noise])[0])
        assert all(earning(streams, noise))
    assert results[:32] == [True] * 32
    assert not any(results[32:])


def test_a_queue_may_disorder_a_stream() -> None:
    rng = np.random.default_rng(9)
    order = np.argsort(np.arange(2000) + rng.random(2000) * 30)
    assert sum(earning(Streams(), [(int(i), 1) for i in order])) < 300


def test_random_requests_that_cover_a_small_volume_are_no_stream() -> None:
    rng = np.random.default_rng(7)
    streams = Streams()
    for _ in range(20):
        assert all(earning(streams, [(int(block), 1) for block in rng.permutation(2048)]))
        assert all(earning(streams, [(int(block), 1) for block in rng.integers(0, 512, 20000)]))


def test_the_table_of_streams_stays_small() -> None:
    streams, rng = Streams(), np.random.default_rng(7)
    for i in range(200):
        earning(streams, [(int(block), 1) for block in rng.integers(0, 1 << 38, 500)] + [(i * 4, 4)])
        assert len(streams._ends) <= Streams.TABLE
    assert not earning(streams, [(800, 4)])[0], "and a stream that goes on is still in it"


@pytest.mark.parametrize("bits", [10, 12, 13, 14, 16])
def test_a_sketch_of_another_size_says_too_much_at_most(bits: int) -> None:
    saved, sketch = Sketch(13), Sketch(bits)
    blocks = np.arange(0, 30_000, 100)
    counts = np.arange(len(blocks)) % 7 + 1
    saved.note(5, blocks, counts)
    sketch.recall(saved.rows, saved.noted)
    found = sketch.estimates(5, blocks)
    assert (found >= counts).all()
    if bits >= saved.bits:
        assert found.tolist() == saved.estimates(5, blocks).tolist()
    assert [sketch.estimate(5, int(block)) for block in blocks[:20]] == found[:20].tolist()
    sketch.note(5, blocks, counts)
    assert (sketch.estimates(5, blocks) >= 2 * counts).all()


def test_a_sketch_that_is_saved_and_recalled_again_and_again_is_due_all_the_same() -> None:
    for step in (1, 100):
        sketch = Sketch(10, 4)
        for life in range(100):
            blocks = np.arange(100) * step + life * 10_000 * (step > 1)
            sketch.note(5, blocks, np.ones(100, np.int64))
            recalled = Sketch(10, 4)
            recalled.recall(sketch.rows, sketch.noted)
            sketch = recalled
            if sketch.is_due:
                break
        assert sketch.is_due and life < 50
