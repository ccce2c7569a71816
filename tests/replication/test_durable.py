"""Small files that are replaced whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from replication.durable import make_directory, remove_file, replace_file


def test_a_file_is_replaced_whole_by_one_that_only_its_owner_reads_and_removed_twice(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "one.json"
    for _ in range(2):
        make_directory(path.parent)
    for data in (b"longer than the next", b"short"):
        replace_file(path, data)
        assert path.read_bytes() == data and [one.name for one in path.parent.iterdir()] == ["one.json"]
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    for _ in range(2):
        remove_file(path)
    assert list(path.parent.iterdir()) == []


def test_the_old_file_is_there_until_the_new_one_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "one.json"
    replace_file(path, b"old")

    def failing(descriptor: int) -> None:
        raise OSError(5, "the disk is gone")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_file_that_is_gone_already_is_durably_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "one.json"
    replace_file(path, b"old")
    synced: list[int] = []

    def failing(descriptor: int) -> None:
        synced.append(descriptor)
        raise OSError(5, "the disk is gone")

    monkeypatch.setattr(os, "fsync", failing)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            remove_file(path)
    assert len(synced) == 2
    remove_file(tmp_path / "never" / "one.json")
