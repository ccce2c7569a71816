"""When pools are scrubbed: the schedule of the configuration, and what it does about each pool.

`decide` is the whole policy, a pure function of a pool's last scrub and the time; `keep_schedule` asks it every second
and does what it says. A scrub that the daemon's end interrupted goes on; one that an operator paused waits for him.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Literal, NoReturn

import trio

from terrace.pools import Pools, Slot
from tiers import ScrubStatus

log = logging.getLogger(__name__)

_TICK_S = 1.0
DAY_MIN = 24 * 60

Action = Literal["start", "resume", "wait"]


@dataclass(frozen=True)
class Plan:
    """`interval_s` from the end of a scrub to the start of the next; None: only by hand.

    `window`: minutes of the day, local time, [from, to), between which scheduled scrubs run; it may pass midnight.
    """

    interval_s: float | None
    window: tuple[int, int] | None = None

    def is_open(self, minute: int) -> bool:
        """Whether a scheduled scrub may run at this minute of the day."""
        if self.window is None:
            return True
        start, end = self.window
        return start <= minute < end if start < end else minute >= start or minute < end


def decide(found: ScrubStatus, now_s: float, minute: int, plan: Plan) -> Action | None:
    """What the schedule does about a pool now. `now_s`: since 1970; `minute`: of the day, local time."""
    may_run = plan.is_open(minute)
    if found.state == "running":
        return "wait" if found.scheduled and not may_run else None
    if found.state in ("interrupted", "waiting"):
        return "resume" if may_run or not found.scheduled else None
    if found.state == "paused" or plan.interval_s is None:
        return None
    # What was stopped counts as done: its operator has seen enough of it.
    ends = [found.since, found.finished_at or 0.0, found.last.finished_at if found.last else 0.0]
    # A clock that was set back must not put the next scrub off for ever.
    newest_s = max((end for end in ends if end <= now_s), default=0.0)
    return "start" if may_run and now_s >= newest_s + plan.interval_s else None


async def keep_schedule(pools: Pools, plan: Plan) -> NoReturn:
    """Runs as long as the daemon serves."""
    while True:
        now = time.localtime()
        for slot in pools.slots():
            await _act(pools, slot, now.tm_hour * 60 + now.tm_min, plan)
        await trio.sleep(_TICK_S)


async def _act(pools: Pools, slot: Slot, minute: int, plan: Plan) -> None:
    if slot.pool is None:
        return
    found = slot.pool.scrubber.status(0)
    action = decide(found, time.time(), minute, plan)
    if action is None:
        return
    try:
        with pools.using(slot.name) as pool:
            if action == "wait":
                await pool.scrubber.pause(waiting=True)
            else:
                await pool.scrubber.start(scheduled=action == "start" or found.scheduled)
    except OSError as error:
        log.warning("the scheduled scrub of pool %s: %s", slot.name, error)
