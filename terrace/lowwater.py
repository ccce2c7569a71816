"""Watching how full the pools are: an event when one passes a level, and one when there is room again.

`judge` is the whole decision, a pure function of the share in use and what was told last. A level counts as left only
`HYSTERESIS` points below it, so that a pool that hovers there is told of once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NoReturn

import trio

from terrace.events import Events
from terrace.pools import Pools
from terrace.sizes import format_size

log = logging.getLogger(__name__)

HYSTERESIS = 2.0
"""Points of a percent."""
_TICK_S = 1.0


def judge(percent: float, told: float, levels: Sequence[float]) -> float:
    """The level that a pool is at now, 0 below all of them. `told`: the level that it was at when last asked."""
    at = max((level for level in levels if percent >= level), default=0.0)
    if at >= told:
        return at
    return max((level for level in levels if level <= told and percent > level - HYSTERESIS), default=0.0)


def passed_down(level: float, levels: Sequence[float]) -> float:
    """The lowest of the levels that a pool left which is at `level` now, and was above that."""
    return min(above for above in levels if above > level)


async def keep_watch(pools: Pools, levels: Sequence[float], events: Events) -> NoReturn:
    """Runs as long as the daemon serves."""
    told: dict[str, float] = {}
    while True:
        for slot in pools.slots():
            if slot.pool is None:
                continue
            used, capacity = slot.pool.use()
            percent = 100 * used / capacity if capacity else 100.0
            before = told.get(slot.name, 0.0)
            level = told[slot.name] = judge(percent, before, levels)
            figures = f"{percent:.0f} % of {format_size(capacity)} used, {format_size(max(0, capacity - used))} left"
            if level > before:
                text = f"pool {slot.name} is above {level:g} %: {figures}"
                log.warning("%s", text)
                events.add("space", slot.name, text)
            elif level < before:
                text = f"pool {slot.name} is below {passed_down(level, levels):g} % again: {figures}"
                log.info("%s", text)
                events.add("space", slot.name, text)
        for name in set(told) - {slot.name for slot in pools.slots()}:
            del told[name]
        await trio.sleep(_TICK_S)
