"""Carrying out the schedules of snapshots: one look at a pool each minute, and at once when who has which has changed.

What is due is decided by `terrace.schedule`; here it is taken and deleted. All volumes of a pool that are due for the
same kind are taken as one group, so they are of one instant. Each pool has its rounds in a task of its own: one whose
devices hang keeps no other waiting. Nothing is remembered that a restart would miss: what was taken is seen in the
pool, and a cancelled round leaves snapshots that are there or not there.

A volume whose policy isn't defined has the default one's schedule, as it has its other values, but nothing of it is
deleted: a table that went missing must not cost history. A volume that is being filled has no schedule before it is
complete: a snapshot of half an image would pass for one of the whole.

Failures are tried again each minute and told once, until they end or become others. Snapshots that were taken are in
the log only; deletions are summed up, one event a day for a pool, since a list of a thousand events must last.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import trio

from terrace.events import Events
from terrace.pools import Pools
from terrace.schedule import KINDS, Decision, Kind, Schedule, decide, name_of, parse_name
from terrace.snapshots import Direct, Through
from tiers import Pool, Snapshot

Schedules = Callable[[], Mapping[str, Schedule]]
"""Gives the schedules that are in force, by policy; policies without one aren't there."""

log = logging.getLogger(__name__)

_TICK_S = 1.0
_ROUND_S = 30.0
"""After so long a round leaves further deletions to the next, so that what is due then is taken in time."""
_AT_ONCE = 64
"""Snapshots that are deleted with one checkpoint."""
_TELL_S = 86400.0
_SHOWN_NAMES = 3
# Somebody was faster: the next look finds out what is to be done after that.
_PASSING = frozenset({errno.ENOENT, errno.EEXIST, errno.EBUSY})


@dataclass
class _Watch:
    """What is remembered of one pool."""

    seen: tuple[int, Mapping[str, Schedule]] = (-1, {})
    """The minute of the last look, and the schedules of its volumes then."""
    is_busy: bool = False
    last: dict[str, dict[Kind, datetime]] = field(default_factory=dict)
    """By volume: the starts of the periods in which snapshots were taken last."""
    told: dict[str, int | None] = field(default_factory=dict)
    """By what is failing: the errno that was told."""
    deleted: Counter[Kind] = field(default_factory=Counter)
    """What was not told yet."""
    told_deleted_s: float = float("-inf")


async def keep_schedules(
    pools: Pools,
    schedules: Schedules,
    events: Events,
    through: Through | None = None,
    *,
    now_s: Callable[[], float] = time.time,
) -> None:
    """Runs as long as the daemon serves. `through`: how snapshots are taken and deleted. `now_s`: since 1970."""
    through = through or Direct()
    watches: dict[str, _Watch] = {}
    try:
        async with trio.open_nursery() as nursery:
            while True:
                slots = pools.slots()
                for gone in watches.keys() - {slot.name for slot in slots}:
                    del watches[gone]
                now = datetime.fromtimestamp(now_s(), UTC)
                for slot in slots:
                    if slot.pool is None:
                        continue
                    watch = watches.setdefault(slot.name, _Watch())
                    seen = int(now.timestamp() // 60), _wanted(slot.pool, schedules, through)
                    if not watch.is_busy and watch.seen != seen:
                        watch.seen, watch.is_busy = seen, True
                        nursery.start_soon(_Round(slot.name, watch, schedules, now, events, through).run, pools)
                await trio.sleep(_TICK_S)
    finally:
        for name, watch in watches.items():
            _tell_deleted(name, watch, events)


def _wanted(pool: Pool, schedules: Schedules, through: Through) -> dict[str, Schedule]:
    """The schedules of those volumes that have one, are complete, and no other node's to see to."""
    known = schedules()
    return {
        volume.short_name: known[name]
        for volume in pool.volumes()
        if (name := volume.policy.name) in known and not volume.filling and through.is_mine(volume)
    }


def _tell_deleted(name: str, watch: _Watch, events: Events) -> None:
    total = watch.deleted.total()
    if total:
        kinds = ", ".join(f"{watch.deleted[kind]} {kind}" for kind in KINDS if watch.deleted[kind])
        text = f"pool {name}: {total} expired snapshot{'s were' if total > 1 else ' was'} deleted ({kinds})"
        events.add("snapshot", name, text)
        watch.deleted.clear()
        watch.told_deleted_s = trio.current_time()


class _Round:
    """One look at a pool, and what follows from it."""

    def __init__(
        self, name: str, watch: _Watch, schedules: Schedules, now: datetime, events: Events, through: Through
    ) -> None:
        self._name = name
        self._watch = watch
        self._schedules = schedules
        self._now = now
        self._events = events
        self._through = through
        self._done: set[str] = set()
        self._failing: set[str] = set()

    async def run(self, pools: Pools) -> None:
        try:
            slot = pools.slot(self._name)
            if slot.pool is not None and _wanted(slot.pool, self._schedules, self._through):
                with pools.using(self._name) as pool:
                    await self._act(pool)
            self._tell()
        finally:
            self._watch.is_busy = False

    async def _act(self, pool: Pool) -> None:
        due: dict[Kind, list[str]] = {}
        for volume, decision in self._decide(pool).items():
            for kind in decision.take:
                due.setdefault(kind, []).append(volume)
        for kind in KINDS:
            if kind in due and not await self._take(pool, kind, due[kind]):
                return
        until_s = trio.current_time() + _ROUND_S
        # Decided anew each time: meanwhile somebody may have held one, or have the schedule keep more.
        while trio.current_time() < until_s and (expired := self._expired(pool)):
            if not await self._delete(pool, expired[:_AT_ONCE]):
                return
        await self._expire_elsewhere(pool)

    def _decide(self, pool: Pool) -> dict[str, Decision]:
        existing: dict[str, list[Snapshot]] = {volume.short_name: [] for volume in pool.volumes()}
        for snapshot in pool.snapshots():
            volume = snapshot.name.partition("@")[0].partition("/")[2]
            existing.setdefault(volume, []).append(snapshot)
        self._watch.last = {volume: self._watch.last.get(volume, {}) for volume in existing}
        return {
            volume: decide(self._now, schedule, existing[volume], self._watch.last[volume])
            for volume, schedule in _wanted(pool, self._schedules, self._through).items()
        }

    def _expired(self, pool: Pool) -> list[tuple[str, str]]:
        missing = {volume.short_name for volume in pool.volumes() if volume.policy_missing}
        return [
            (volume, name)
            for volume, decision in self._decide(pool).items()
            if volume not in missing
            for name in decision.delete
        ]

    async def _take(self, pool: Pool, kind: Kind, volumes: Sequence[str]) -> bool:
        """Returns whether the round can go on."""
        name = name_of(kind, self._now)
        try:
            lacking = await self._through.take(pool, [(volume, name) for volume in volumes])
        except OSError as error:
            self._failed("taken", f"{kind} snapshots of {_listed(volumes)}", error)
            # In a full pool deleting what has expired is what helps.
            return error.errno in _PASSING or error.errno == errno.ENOSPC
        for volume in volumes:
            self._watch.last.setdefault(volume, {})[kind] = KINDS[kind](self._now)
        log.info("pool %s: took %s of %s", self._name, name, ", ".join(volumes))
        for volume, nodes in lacking.items():
            for node, why in nodes.items():
                log.info("pool %s: node %s has no %s of %s: %s", self._name, node, name, volume, why)
        self._done.add("taken")
        return True

    async def _delete(self, pool: Pool, expired: Sequence[tuple[str, str]]) -> bool:
        """Returns whether the round can go on."""
        try:
            # What a leg that is away keeps of it expires there by what it has, once it is back.
            await self._through.delete(pool, expired, remember=False)
        except OSError as error:
            self._failed("deleted", "expired snapshots", error)
            return False
        self._watch.deleted.update(parse_name(name)[0] for _, name in expired)
        log.info("pool %s: deleted the expired %s", self._name, ", ".join("@".join(pair) for pair in expired))
        self._done.add("deleted")
        return True

    async def _expire_elsewhere(self, pool: Pool) -> None:
        """On other legs of mirrors: a leg that was away has what was deleted meanwhile, and lacks what was taken."""
        missing = {volume.short_name for volume in pool.volumes() if volume.policy_missing}
        for volume, schedule in _wanted(pool, self._schedules, self._through).items():
            if volume in missing:
                continue
            try:
                for leg, existing in (await self._through.elsewhere(pool, volume)).items():
                    expired = decide(self._now, schedule, existing, self._watch.last.get(volume, {})).delete
                    if expired:
                        await self._through.expire(pool, volume, leg, expired)
                        log.info("pool %s: deleted the expired %s on another leg of %s", self._name, expired, volume)
            except OSError as error:
                log.info("pool %s: other legs of %s are looked at again in a minute: %s", self._name, volume, error)

    def _failed(self, done: str, what: str, error: OSError) -> None:
        if error.errno in _PASSING:
            log.info("pool %s: %s are to be %s with the next try: %s", self._name, what, done, error)
            return
        self._failing.add(done)
        if self._watch.told.get(done) != error.errno:
            self._watch.told[done] = error.errno
            text = f"pool {self._name}: {what} can't be {done}, which is tried again each minute: {error}"
            log.warning("%s", text)
            self._events.add("snapshot", self._name, text)

    def _tell(self) -> None:
        for done in self._done - self._failing:
            if done in self._watch.told:
                del self._watch.told[done]
                text = f"pool {self._name}: scheduled snapshots are {done} again"
                log.info("%s", text)
                self._events.add("snapshot", self._name, text)
        if trio.current_time() >= self._watch.told_deleted_s + _TELL_S:
            _tell_deleted(self._name, self._watch, self._events)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN_NAMES])
    return shown if len(names) <= _SHOWN_NAMES else f"{shown} and {len(names) - _SHOWN_NAMES} more"
