"""The stall meter: the longest step of any task, whoever's it was."""

from __future__ import annotations

import time

import pytest
import trio

from terrace.stall import StallMeter

pytestmark = pytest.mark.alone


def test_the_longest_step_is_remembered_with_its_task_until_the_reset() -> None:
    meter = StallMeter()

    async def hog() -> None:
        await trio.lowlevel.checkpoint()
        time.sleep(0.03)  # the stall
        await trio.lowlevel.checkpoint()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hog, name="the hog")
        assert 30 <= meter.max_ms < 1000
        assert meter.task_name == "the hog"
        meter.reset()
        assert meter.max_ms == 0
        await trio.sleep(0.05)

    trio.run(main, instruments=[meter])
    assert meter.max_ms < 30


def test_waiting_is_no_stall() -> None:
    meter = StallMeter()
    trio.run(trio.sleep, 0.1, instruments=[meter])
    assert meter.max_ms < 50
