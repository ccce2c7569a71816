"""SEEK_DATA and SEEK_HOLE say what lseek(2) says of a file with these extents."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
import trio

from nbd.wire import STATE_HOLE, STATE_ZERO
from terrace.fuse.seek import seek

BLOCK = 4096


def find(extents: list[tuple[int, bool]], offset: int, *, data: bool, most: int = 99) -> int:
    """Over whole extents, given from the start; `most` are told at a time."""
    size = sum(length for length, _ in extents)

    async def tell(at: int, length: int) -> list[tuple[int, int]]:
        assert at >= 0 and 0 < length == size - at
        found, start = [], 0
        for span, hole in extents:
            if start + span > at:
                found.append((start + span - max(at, start), STATE_HOLE | STATE_ZERO if hole else 0))
            start += span
        return found[:most]

    return trio.run(lambda: seek(tell, size, offset, data=data))


def fails(extents: list[tuple[int, bool]], offset: int, *, data: bool) -> int | None:
    with pytest.raises(OSError) as caught:
        find(extents, offset, data=data)
    return caught.value.errno


def test_what_may_not_be_allocated_but_does_not_read_as_zeroes_is_data() -> None:
    async def tell(at: int, length: int) -> list[tuple[int, int]]:
        return [(BLOCK, STATE_HOLE)] if at == 0 else [(length, STATE_ZERO)]

    assert trio.run(lambda: seek(tell, 2 * BLOCK, 0, data=True)) == 0
    assert trio.run(lambda: seek(tell, 2 * BLOCK, 0, data=False)) == BLOCK


HOLED = [(4096, False), (8192, True), (4096, True), (100, False), (50, True)]


@pytest.mark.parametrize("most", [1, 2, 99])
@pytest.mark.parametrize(
    ("offset", "data", "found"),
    [
        (0, True, 0),
        (4095, True, 4095),
        (4096, True, 16384),
        (16384, True, 16384),
        (16483, True, 16483),
        (0, False, 4096),
        (5000, False, 5000),
        (16390, False, 16484),
        (16533, False, 16533),
    ],
)
def test_the_next_data_or_hole_begins_at_or_behind_the_offset(offset: int, data: bool, found: int, most: int) -> None:
    assert find(HOLED, offset, data=data, most=most) == found


def test_the_end_counts_as_a_hole_and_nothing_is_behind_it() -> None:
    assert find([(100, False)], 50, data=False) == 100
    assert fails(HOLED, 16484, data=True) == errno.ENXIO
    for offset in (16534, 16535, 1 << 62, -1):
        assert fails(HOLED, offset, data=True) == fails(HOLED, offset, data=False) == errno.ENXIO


def test_it_agrees_with_a_file_of_the_kernels(tmp_path: Path) -> None:
    """tmpfs, ext4 and xfs keep holes of whole pages as they are punched."""
    chosen = random.Random(1)
    holes = [chosen.random() < 0.5 for _ in range(40)]
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(len(holes) * BLOCK)
        for number, hole in enumerate(holes):
            if not hole:
                os.pwrite(file.fileno(), b"x" * BLOCK, number * BLOCK)
        os.fsync(file.fileno())
        extents = [(BLOCK, hole) for hole in holes]
        for offset in range(0, len(holes) * BLOCK, 1234):
            for data, whence in ((True, os.SEEK_DATA), (False, os.SEEK_HOLE)):
                try:
                    expected = os.lseek(file.fileno(), offset, whence)
                except OSError:
                    assert fails(extents, offset, data=data) == errno.ENXIO
                else:
                    assert find(extents, offset, data=data, most=3) == expected
