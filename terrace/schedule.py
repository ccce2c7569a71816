"""Schedules of snapshots, such as `hourly=24 daily=7`: how they are written, and what one wants done at some moment.

A schedule takes one snapshot in each *period*: at its start, or as soon afterwards as it can. However many periods were
missed, there is one to catch up. Of each kind it keeps the newest so many and has the others deleted. Periods are of
UTC, so none is skipped or comes twice when summer time begins or ends; weeks begin on Mondays.

What belongs to the schedule is told by its name, `hourly-20261129T2000Z`: the kind and the minute in which it was asked
for, UTC, so that names of a kind sort by time. A snapshot with any other name is somebody's own and never deleted here,
and neither is one of a kind that the schedule doesn't name (any more).

`decide` counts snapshots and never judges their age. "Newest" is the order in which they were taken, not what their
names say. So a clock that jumps, forwards or back, costs no more than one snapshot of each kind for each jump, and a
name from the future keeps nothing from being taken today.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from typing import Protocol

Kind = str
"""A key of `KINDS`."""
Schedule = Mapping[Kind, int]
"""How many snapshots of each kind are kept, shortest periods first; empty where none are taken."""

MAX_COUNT = 10_000
_EXAMPLE = '"hourly=24 daily=7 weekly=4"'


def _minutes(length: int, moment: datetime) -> datetime:
    return moment.replace(minute=moment.minute - moment.minute % length, second=0, microsecond=0)


def _midnight(moment: datetime) -> datetime:
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


KINDS: dict[Kind, Callable[[datetime], datetime]] = {
    **{f"{length}min": partial(_minutes, length) for length in (5, 10, 15, 30)},
    "hourly": partial(_minutes, 60),
    "daily": _midnight,
    "weekly": lambda moment: _midnight(moment) - timedelta(days=moment.weekday()),
    "monthly": lambda moment: _midnight(moment).replace(day=1),
    "yearly": lambda moment: _midnight(moment).replace(month=1, day=1),
}
"""When the period of a moment began, for each kind; shortest first."""


class Kept(Protocol):
    """What a schedule looks at in a snapshot; `tiers.Snapshot` is one."""

    short_name: str
    held: bool
    open_count: int


@dataclass(frozen=True)
class Decision:
    """The kinds of which a snapshot is to be taken now, and the names of those to be deleted, oldest first."""

    take: list[Kind]
    delete: list[str]


def decide(now: datetime, schedule: Schedule, existing: Iterable[Kept], last: Mapping[Kind, datetime]) -> Decision:
    """What a schedule wants of one volume.

    `existing`: the volume's snapshots in the order in which they were taken. `last`: the start of the period that one
    was taken in last, as far as it is remembered: what somebody deletes or renames isn't taken again at once. What is
    held or in use stays, and takes nobody's place. `now` is UTC.
    """
    started = {kind: KINDS[kind](now) for kind in schedule}
    missing = {kind for kind, start in started.items() if last.get(kind) != start}
    spare: dict[Kind, list[str]] = {kind: [] for kind in schedule}
    for snapshot in existing:
        kind, start = parse_name(snapshot.short_name)
        if kind not in spare:
            continue
        if start == started[kind]:
            missing.discard(kind)
        if not snapshot.held and not snapshot.open_count:
            spare[kind].append(snapshot.short_name)
    return Decision(
        [kind for kind in schedule if kind in missing],
        [name for kind, names in spare.items() for name in names[: max(0, len(names) - schedule[kind])]],
    )


def name_of(kind: Kind, now: datetime) -> str:
    """What a snapshot of that kind is called that is asked for now (UTC)."""
    return f"{kind}-{now:%Y%m%dT%H%MZ}"


# Not strptime, which takes ten times as long: a first look may be at ten thousand.
_NAME = re.compile(rf"({'|'.join(KINDS)})-([0-9]{{4}})([0-9]{{2}})([0-9]{{2}})T([0-9]{{2}})([0-9]{{2}})Z")


@lru_cache(maxsize=1 << 16)
def parse_name(name: str) -> tuple[Kind, datetime]:
    """The kind of a schedule's own snapshot, and the start of its period; `""` and any time for all others."""
    match = _NAME.fullmatch(name)
    if match is not None:
        try:
            kind, *parts = match.groups()
            year, month, day, hour, minute = map(int, parts)
            return kind, KINDS[kind](datetime(year, month, day, hour, minute, tzinfo=UTC))
        except (ValueError, OverflowError):
            pass
    return "", datetime.min.replace(tzinfo=UTC)


def parse_schedule(text: str) -> Schedule:
    """The schedule of `hourly=24 daily=7`; nothing for the empty text. Raises ValueError with a sentence."""
    counts: dict[Kind, int] = {}
    for part in text.replace(",", " ").split():
        kind, equals, count = part.partition("=")
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1)
            raise ValueError(
                f"{_shown(kind)} is not a kind of snapshot; "
                + (f'did you mean "{near[0]}"? ' if near else "")
                + f"valid: {', '.join(KINDS)}"
            )
        if not count:
            what = "has no count" if equals else "doesn't say how many are kept"
            raise ValueError(f"{kind} {what}; write one right behind it, such as {_EXAMPLE}")
        if kind in counts:
            raise ValueError(f"{kind} is there twice; give it one count")
        counts[kind] = _count(kind, count)
    return {kind: counts[kind] for kind in KINDS if kind in counts}


def _count(kind: Kind, text: str) -> int:
    if not re.fullmatch(r"-?[0-9]+", text):
        raise ValueError(f"{kind}={_shown(text)} is not a number of snapshots to keep; write them such as {_EXAMPLE}")
    digits = text.lstrip("0") or "0"
    if digits == "0":
        raise ValueError(f"{kind}=0 would keep none of what it takes; leave {kind} out to take none, or give 1 or more")
    if digits.startswith("-") or len(digits) > len(str(MAX_COUNT)) or int(digits) > MAX_COUNT:
        nearest = 1 if digits.startswith("-") else MAX_COUNT
        raise ValueError(
            f"{kind}={_cut(digits)} is not possible; it must be from 1 to {MAX_COUNT}; the nearest is {nearest}"
        )
    return int(digits)


def format_schedule(schedule: Schedule) -> str:
    """As `parse_schedule` reads it."""
    return " ".join(f"{kind}={count}" for kind, count in schedule.items())


def _cut(text: str) -> str:
    return text if len(text) <= 24 else text[:21] + "..."


def _shown(text: str) -> str:
    return f'"{_cut(text)}"'
