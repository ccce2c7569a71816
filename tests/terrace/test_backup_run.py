"""Backups into a directory, from beginning to end: chains grow, old ones go, and failures leave nothing behind."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from terrace.backup.chain import choose
from terrace.backup.directory import read_directory
from terrace.backup.errors import BackupError
from terrace.backup.restore import restore
from terrace.backup.run import Outcome, back_up, back_up_to_directory, find
from tests.terrace.fakevolume import BLOCK, FakeOrigin, FakeVolume, MemorySink, reader


def run(origin: FakeOrigin, directory: Path, name: str | None = None, **options: Any) -> Outcome:
    async def main() -> Outcome:
        return await back_up_to_directory(origin, directory, name, **options)

    return trio.run(main)


def restored(directory: Path, at: str | None = None) -> bytes:
    volume = FakeVolume()
    path = choose(read_directory(directory).catalogue, directory, None, at)

    async def main() -> None:
        streams = [reader(one.path.read_bytes(), one.path.name) for one in path]
        await restore(streams, volume, volume, await volume.held(), target="demo/new")

    trio.run(main)
    return bytes(volume.image)


def change(origin: FakeOrigin, seed: int) -> None:
    rng = random.Random(seed)
    at = rng.randrange(len(origin.image) // BLOCK) * BLOCK
    origin.image[at : at + BLOCK] = rng.choice([bytes(BLOCK), rng.randbytes(BLOCK)])


def test_the_first_backup_is_full_and_the_next_ones_are_increments_until_there_are_enough(tmp_path: Path) -> None:
    origin = FakeOrigin(bytearray(random.Random(1).randbytes(8 * BLOCK)))
    images = []
    for number in range(5):
        change(origin, number)
        images.append(bytes(origin.image))
        outcome = run(origin, tmp_path, increments=2)
        assert (outcome.header.base is None) == (number in (0, 3))
        assert outcome.problems == []
        assert restored(tmp_path) == origin.image
        # One snapshot stays: the base of the next increment.
        assert len(origin.names) == 1 and origin.names[0].startswith("backup-")
    assert outcome.totals.data_bytes <= BLOCK
    found = read_directory(tmp_path).catalogue
    assert [len(chain) for chain in found.chains()] == [3, 2]
    assert [restored(tmp_path, one.header.snapshot.id) for one in found.whole] == images


def test_only_the_newest_chains_are_kept(tmp_path: Path) -> None:
    origin = FakeOrigin(bytearray(8 * BLOCK))
    removed = []
    for number in range(9):
        change(origin, number)
        removed.append(len(run(origin, tmp_path, increments=1, keep=2).removed))
        assert restored(tmp_path) == origin.image
    assert removed == [0, 0, 0, 0, 2, 0, 2, 0, 2]
    assert [len(chain) for chain in read_directory(tmp_path).catalogue.chains()] == [2, 1]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 99), st.sampled_from(["", "", "", "full", "fail", "gone"])), max_size=8),
    st.integers(0, 3),
    st.none() | st.integers(1, 3),
)
def test_whatever_happens_each_backup_that_succeeded_last_can_be_restored(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, str]], increments: int, keep: int | None
) -> None:
    directory = tmp_path_factory.mktemp("backups")
    origin = FakeOrigin(bytearray(4 * BLOCK))

    def fail(offset: int) -> None:
        raise OSError(5, "a block is damaged")

    for seed, how in steps:
        change(origin, seed)
        if how == "gone":
            origin.versions.clear()
        origin.on_read = fail if how == "fail" else lambda offset: None
        before = sorted(directory.iterdir())
        try:
            run(origin, directory, increments=increments, keep=keep, full=how == "full")
        except OSError:
            assert how == "fail" and sorted(directory.iterdir()) == before
            assert len(origin.names) <= 1
            continue
        assert restored(directory) == origin.image
        assert len(origin.names) == 1


def test_a_named_snapshot_is_backed_up_once_and_never_dropped(tmp_path: Path) -> None:
    origin = FakeOrigin(bytearray(8 * BLOCK))
    trio.run(origin.take, "monday")
    change(origin, 1)
    trio.run(origin.take, "tuesday")
    assert run(origin, tmp_path, "monday").header.base is None
    with pytest.raises(BackupError, match=r"full\.tbk is a backup of demo/vol@monday already"):
        run(origin, tmp_path, "monday")
    outcome = run(origin, tmp_path, "tuesday")
    assert outcome.header.base is not None and outcome.header.base.name == "monday"
    run(origin, tmp_path)
    assert origin.names[:2] == ["monday", "tuesday"]
    assert run(origin, tmp_path, "tuesday", full=True).path.name.endswith(".full.tbk")
    with pytest.raises(BackupError, match="has no snapshot sunday \\(it has monday, tuesday, backup-"):
        run(origin, tmp_path, "sunday")


def test_a_failure_drops_the_snapshot_that_was_taken_and_keeps_those_that_were_there(tmp_path: Path) -> None:
    origin = FakeOrigin(bytearray(random.Random(1).randbytes(8 * BLOCK)))
    run(origin, tmp_path)
    names = origin.names

    def fail(offset: int) -> None:
        raise OSError(5, "a block is damaged")

    origin.image[:BLOCK] = b"x" * BLOCK
    origin.on_read = fail
    with pytest.raises(OSError, match="a block is damaged"):
        run(origin, tmp_path)
    assert origin.names == names
    assert len(list(tmp_path.iterdir())) == 1


def test_a_snapshot_that_cannot_be_dropped_is_a_problem_and_no_failure(tmp_path: Path) -> None:
    origin = FakeOrigin(bytearray(8 * BLOCK))
    run(origin, tmp_path)
    origin.fail_drop = origin.names[0]
    (problem,) = run(origin, tmp_path).problems
    assert "of an earlier backup can't be deleted" in problem and "it is held" in problem
    origin.fail_drop = ""
    assert run(origin, tmp_path).problems == []
    assert len(origin.names) == 1


def test_a_base_that_was_renamed_is_found_by_its_identity(tmp_path: Path) -> None:
    origin = FakeOrigin(bytearray(8 * BLOCK))
    run(origin, tmp_path)
    origin.versions = [(replace(one, name="renamed"), image) for one, image in origin.versions]
    change(origin, 1)
    outcome = run(origin, tmp_path)
    assert outcome.header.base is not None and outcome.header.base.name == "renamed"
    assert "renamed" in origin.names
    assert restored(tmp_path) == origin.image


def test_a_base_must_be_older() -> None:
    origin = FakeOrigin(bytearray(BLOCK))
    first, second = trio.run(origin.take, "a"), trio.run(origin.take, "b")
    with pytest.raises(BackupError, match="b is no older than a"):
        trio.run(lambda: back_up(origin, first, second, MemorySink()))


def test_a_long_list_of_snapshots_is_shortened_in_the_error() -> None:
    origin = FakeOrigin(bytearray(BLOCK))
    for number in range(9):
        trio.run(origin.take, f"s{number}")
    with pytest.raises(BackupError, match="it has 9, the newest: s4, s5, s6, s7, s8"):
        find(trio.run(origin.snapshots), "x", "demo/vol")
    with pytest.raises(BackupError, match="it has none"):
        find([], "x", "demo/vol")
