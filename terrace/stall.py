"""How long the event loop was ever kept from its other tasks.

All state lives on the trio thread, so the longest step of any task is the longest that every client had to wait for
something that wasn't its own. The daemon measures it itself, always: two clock readings a step.
"""

from __future__ import annotations

import time

import trio


class StallMeter(trio.abc.Instrument):
    """A trio instrument that remembers the longest step of a task since the last reset, and whose it was.

    A step's time includes waiting for the GIL, garbage collection and being scheduled away: it is what clients see.
    """

    def __init__(self) -> None:
        self._started_s = time.perf_counter()
        self._longest_s = 0.0
        self._task_name = ""

    @property
    def max_ms(self) -> float:
        """The longest step, in milliseconds."""
        return self._longest_s * 1000

    @property
    def task_name(self) -> str:
        """The name of the task that took it, empty when there was none."""
        return self._task_name

    def reset(self) -> None:
        """Forget. The step that is running now counts from now."""
        self._longest_s = 0.0
        self._task_name = ""
        self._started_s = time.perf_counter()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._started_s = time.perf_counter()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        took_s = time.perf_counter() - self._started_s
        if took_s > self._longest_s:
            self._longest_s = took_s
            self._task_name = task.name
