"""Events: bounded, in order, kept over restarts, and never a reason to fail. Levels of use: told once each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from terrace import events as module
from terrace.events import Events
from terrace.lowwater import judge, passed_down


async def keep(events: Events, count: int, first: int = 0) -> None:
    """Add events while the task runs, then end it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(events.run)
        for n in range(first, first + count):
            events.add("kind", "subject", f"text {n}")
            if n % 7 == 0:
                await trio.sleep(0.001)
        nursery.cancel_scope.cancel()


def test_events_outlive_the_daemon_and_go_on_counting(tmp_path: Path) -> None:
    trio.run(keep, Events(tmp_path), 5)
    again = Events(tmp_path)
    assert [(event.number, event.text) for event in again.after(0)] == [(n + 1, f"text {n}") for n in range(5)]
    trio.run(keep, again, 2, 5)
    assert [event.number for event in Events(tmp_path).after(5)] == [6, 7]


def test_only_the_newest_are_kept_and_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 20)
    events = Events(tmp_path)
    trio.run(keep, events, 205)
    assert [event.text for event in events.after(0)] == [f"text {n}" for n in range(185, 205)]
    assert [event.text for event in Events(tmp_path).after(0)] == [f"text {n}" for n in range(185, 205)]
    assert len((tmp_path / module.FILE_NAME).read_text().splitlines()) <= 60


def test_lines_that_are_no_events_are_passed_over(tmp_path: Path) -> None:
    good = {"number": 3, "time": 1.0, "kind": "space", "subject": "p", "text": "full"}
    lines = [b"", b"{", b"[]", json.dumps(good).encode(), json.dumps(good | {"number": 2}).encode(), b"\xff\xfe"]
    lines.append(json.dumps(good | {"number": 9, "text": 4}).encode())
    (tmp_path / module.FILE_NAME).write_bytes(b"\n".join(lines))
    events = Events(tmp_path)
    assert [event.number for event in events.after(0)] == [3]
    events.add("kind", "subject", "x" * 10_000)
    assert events.after(3)[0].number == 4
    assert len(events.after(3)[0].text) == module.MAX_TEXT


def test_a_file_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    events = Events(tmp_path / "nowhere")
    trio.run(keep, events, 30)
    assert len(events.after(0)) == 30


def test_who_waits_gets_the_next_one(tmp_path: Path) -> None:
    async def main() -> None:
        events = Events(tmp_path)
        assert await events.wait(0, 0.01) == []
        async with trio.open_nursery() as nursery:

            async def add() -> None:
                await trio.sleep(0.05)
                events.add("kind", "subject", "now")

            nursery.start_soon(add)
            with trio.fail_after(5):
                (event,) = await events.wait(0, 60)
        assert event.text == "now"

    trio.run(main)


def test_each_level_is_told_once_when_it_is_passed_and_left_only_well_below_it() -> None:
    levels = [70.0, 85.0, 95.0]
    told, heard = 0.0, []
    for percent in (10, 69, 70, 71, 69, 68.1, 71, 84, 86, 84, 83.5, 82.9, 96, 99, 94, 92.9, 60, 96):
        level = judge(percent, told, levels)
        if level != told:
            heard.append((percent, told, level))
        told = level
    assert heard == [
        (70, 0.0, 70.0),
        (86, 70.0, 85.0),
        (82.9, 85.0, 70.0),
        (96, 70.0, 95.0),
        (92.9, 95.0, 85.0),
        (60, 85.0, 0.0),
        (96, 0.0, 95.0),
    ]


def test_without_levels_nothing_is_told() -> None:
    assert judge(100, 0.0, []) == 0.0


@pytest.mark.parametrize(("level", "told"), [(85, 95), (70, 85), (0, 70)])
def test_what_is_told_of_a_pool_that_left_several_levels_at_once_is_the_lowest(level: float, told: float) -> None:
    assert passed_down(level, [85.0, 70.0, 95.0]) == told
