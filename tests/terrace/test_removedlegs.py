"""What is kept in mind of legs that were removed, over restarts."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from terrace.removedlegs import FILE, MOST, Removed, RemovedLegs
from tests.replication.stores import first_record


def test_what_may_be_left_is_known_after_a_restart_by_its_newest_record_until_it_is_gone(tmp_path: Path) -> None:
    async def main() -> None:
        first = first_record("a")
        last = first.next_epoch()
        await RemovedLegs(tmp_path).add("u/7", first, {"b": "p/dm", "c": "p/dm"})
        await RemovedLegs(tmp_path).add("u/7", last, {"c": "", "d": ""})  # c has had a leg: its name is not forgotten
        names = {"b": "p/dm", "c": "p/dm", "d": ""}
        assert await RemovedLegs(tmp_path).of("u/7") == [Removed("u/7", last, names)]
        assert await RemovedLegs(tmp_path).of("u/8") == []
        await RemovedLegs(tmp_path).drop("u/7", "another mirror", "bcd")
        await RemovedLegs(tmp_path).drop("u/7", last.mirror, "bd")
        assert await RemovedLegs(tmp_path).of("u/7") == [Removed("u/7", last, {"c": "p/dm"})]
        await RemovedLegs(tmp_path).drop("u/7", last.mirror, "c")
        assert await RemovedLegs(tmp_path).of("u/7") == []

    trio.run(main)


def test_only_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("terrace.removedlegs.MOST", 3)
    assert MOST == 100

    async def main() -> None:
        removed = RemovedLegs(tmp_path)
        for number in range(5):
            await removed.add(f"u/{number}", first_record("a"), {"b": "p/dm"})
        assert [bool(await removed.of(f"u/{number}")) for number in range(5)] == [False, False, True, True, True]

    trio.run(main)


@pytest.mark.parametrize("data", [b"", b"[]", b'{"version": 2, "removed": []}', b'{"version": 1, "removed": [{}]}'])
def test_a_file_that_cannot_be_understood_keeps_nothing_from_being_removed(data: bytes, tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / FILE).write_bytes(data)
        removed = RemovedLegs(tmp_path)
        assert await removed.of("u/7") == []
        await removed.add("u/7", first_record("a"), {"b": "p/dm"})
        assert len(await removed.of("u/7")) == 1
        nowhere = RemovedLegs(tmp_path / "nowhere")
        await nowhere.add("u/7", first_record("a"), {"b": "p/dm"})
        assert await nowhere.of("u/7") == []

    trio.run(main)
