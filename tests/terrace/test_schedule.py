"""Schedules of snapshots: what may be written, and what is taken and deleted, whatever the clock and people do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from terrace.schedule import KINDS, MAX_COUNT, Decision, decide, format_schedule, name_of, parse_name, parse_schedule
from tiers.names import validate_name

NOON = datetime(2026, 11, 29, 12, 0, tzinfo=UTC)  # a Sunday
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


@dataclass
class Snap:
    short_name: str
    held: bool = False
    open_count: int = 0


class Shelf:
    """A volume's snapshots, and a schedule that is obeyed with each tick."""

    def __init__(self, schedule: str, *names: str) -> None:
        self.schedule = parse_schedule(schedule)
        self.snaps = [Snap(name) for name in names]
        self.last: dict[str, datetime] = {}

    def tick(self, now: datetime) -> list[str]:
        """Returns what was deleted."""
        for kind in decide(now, self.schedule, self.snaps, self.last).take:
            self.snaps.append(Snap(name_of(kind, now)))
            self.last[kind] = KINDS[kind](now)
        deleted = decide(now, self.schedule, self.snaps, self.last).delete
        self.snaps = [snap for snap in self.snaps if snap.short_name not in deleted]
        return deleted

    def names(self) -> list[str]:
        return [snap.short_name for snap in self.snaps]


# -- how they are written ----------------------------------------------------------------------------------------------


def test_a_schedule_is_written_in_any_order_and_shown_from_the_shortest_period() -> None:
    assert parse_schedule("weekly=4  hourly=24, daily=7") == {"hourly": 24, "daily": 7, "weekly": 4}
    assert format_schedule(parse_schedule("yearly=1 15min=8")) == "15min=8 yearly=1"
    assert parse_schedule("") == parse_schedule(" ") == {}
    assert format_schedule({}) == ""


@given(st.dictionaries(st.sampled_from(list(KINDS)), st.integers(1, MAX_COUNT)))
def test_what_is_shown_can_be_written_again(counts: dict[str, int]) -> None:
    assert parse_schedule(format_schedule(counts)) == counts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hourley=24", '"hourley" is not a kind of snapshot; did you mean "hourly"? valid: 5min, 10min, 15min, '),
        ("15m=4", 'did you mean "15min"?'),
        ("7min=4", "min"),
        ("frequently=4", '"frequently" is not a kind of snapshot; valid: 5min, '),
        ("=4", '"" is not a kind'),
        ("24", '"24" is not a kind'),
        ("hourly", "hourly doesn't say how many are kept; write one right behind it, such as"),
        ("hourly= 24", "hourly has no count"),
        ("hourly=x", 'hourly="x" is not a number of snapshots to keep'),
        ("hourly=2.5", 'hourly="2.5" is not a number'),
        ("hourly=\u0663", "is not a number"),
        ("hourly=24 hourly=5", "hourly is there twice"),
        ("hourly=0", "hourly=0 would keep none of what it takes; leave hourly out"),
        ("hourly=-3", "hourly=-3 is not possible; it must be from 1 to 10000; the nearest is 1"),
        ("hourly=10001", "hourly=10001 is not possible; it must be from 1 to 10000; the nearest is 10000"),
        ("hourly=" + "9" * 10_000, "hourly=999999999999999999999... is not possible"),
        ("x" * 10_000, '"xxxxxxxxxxxxxxxxxxxxx..." is not a kind'),
    ],
)
def test_an_error_says_what_is_wrong_and_what_would_be_right(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        parse_schedule(text)
    assert expected in str(error.value)
    assert len(str(error.value)) < 300


@given(st.text())
def test_no_text_does_anything_but_parse_or_be_refused(text: str) -> None:
    try:
        assert all(1 <= count <= MAX_COUNT for count in parse_schedule(text).values())
    except ValueError as error:
        assert "\n" not in str(error)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("5min", NOON + 35 * MINUTE),
        ("10min", NOON + 30 * MINUTE),
        ("15min", NOON + 30 * MINUTE),
        ("30min", NOON + 30 * MINUTE),
        ("hourly", NOON),
        ("daily", datetime(2026, 11, 29, tzinfo=UTC)),
        ("weekly", datetime(2026, 11, 23, tzinfo=UTC)),
        ("monthly", datetime(2026, 11, 1, tzinfo=UTC)),
        ("yearly", datetime(2026, 1, 1, tzinfo=UTC)),
    ],
)
def test_a_name_is_possible_and_tells_kind_and_minute(kind: str, start: datetime) -> None:
    name = name_of(kind, NOON + timedelta(minutes=37, seconds=5))
    assert name == f"{kind}-20261129T1237Z"
    assert validate_name("snapshot", name) == name
    assert parse_name(name) == (kind, start)


def test_names_of_a_kind_sort_by_time() -> None:
    names = [name_of("hourly", NOON + 997 * MINUTE * number) for number in range(2000)]
    assert sorted(names) == names


@pytest.mark.parametrize(
    "name",
    [
        "before-upgrade",
        "hourly",
        "hourly-20261129T2000",
        "hourly-20261329T2000Z",
        "hourly-20261129T2400Z",
        "hourly-00000101T0000Z",
        "my-hourly-20261129T2000Z",
        "hourly-20261129T2000Z-1",
        "Hourly-20261129T2000Z",
        "hourly-20261129T2000Z\n",
        "20min-20261129T2000Z",
        "weekly-\u0662\u0660\u0662\u06661129T2000Z",
    ],
)
def test_other_names_are_peoples_own(name: str) -> None:
    assert parse_name(name)[0] == ""
    shelf = Shelf("hourly=1 weekly=1", name, name, name)
    assert shelf.tick(NOON) == []


# -- what is taken and deleted -----------------------------------------------------------------------------------------


def test_one_of_each_kind_is_taken_at_once_and_then_at_each_start() -> None:
    shelf = Shelf("15min=3 hourly=2")
    for minute in range(5, 65):
        shelf.tick(NOON + minute * MINUTE)
    assert shelf.names() == [
        "hourly-20261129T1205Z",
        "15min-20261129T1230Z",
        "15min-20261129T1245Z",
        "15min-20261129T1300Z",
        "hourly-20261129T1300Z",
    ]


def test_after_a_long_time_off_there_is_one_to_catch_up_and_one_goes() -> None:
    shelf = Shelf("hourly=3")
    for hour in range(5):
        shelf.tick(NOON + hour * HOUR)
    deleted = [shelf.tick(NOON + 100 * DAY + minute * MINUTE) for minute in range(37, 60)]
    assert deleted[0] == ["hourly-20261129T1400Z"]
    assert not any(deleted[1:])
    assert shelf.names() == ["hourly-20261129T1500Z", "hourly-20261129T1600Z", "hourly-20270309T1237Z"]


def test_a_clock_that_was_in_the_future_keeps_nothing_from_being_taken_or_kept_today() -> None:
    shelf = Shelf("hourly=2")
    for hour in range(2):
        shelf.tick(NOON + 1000 * DAY + hour * HOUR)
    shelf.tick(NOON)
    assert shelf.names()[-1] == "hourly-20261129T1200Z"
    assert shelf.tick(NOON + MINUTE) == []
    shelf.tick(NOON + HOUR)
    assert shelf.names() == ["hourly-20261129T1200Z", "hourly-20261129T1300Z"]


def test_a_clock_that_goes_back_and_forth_between_two_times_takes_one_at_each() -> None:
    shelf = Shelf("hourly=24 yearly=3")
    for _ in range(100):
        shelf.tick(NOON)
        shelf.tick(NOON + 4000 * DAY)
        shelf.last.clear()  # and the daemon restarts each time
    assert len(shelf.names()) == 4


def test_what_somebody_deleted_or_renamed_is_not_taken_again_in_the_same_period() -> None:
    shelf = Shelf("daily=2")
    shelf.tick(NOON)
    shelf.snaps[0].short_name = "keep"
    shelf.tick(NOON + HOUR)
    assert shelf.names() == ["keep"]
    shelf.tick(NOON + DAY)
    assert shelf.names() == ["keep", "daily-20261130T1200Z"]


def test_held_ones_and_those_in_use_stay_and_take_nobodys_place() -> None:
    shelf = Shelf("hourly=2")
    for hour in range(2):
        shelf.tick(NOON + hour * HOUR)
    shelf.snaps[0].held = True
    shelf.snaps[1].open_count = 1
    for hour in range(2, 6):
        shelf.tick(NOON + hour * HOUR)
    assert [name[-6:] for name in shelf.names()] == ["T1200Z", "T1300Z", "T1600Z", "T1700Z"]
    for snap in shelf.snaps:
        snap.held, snap.open_count = False, 0
    assert shelf.tick(NOON + 5 * HOUR) == ["hourly-20261129T1200Z", "hourly-20261129T1300Z"]


def test_a_lower_count_takes_effect_and_a_kind_that_is_no_longer_there_keeps_what_it_has() -> None:
    shelf = Shelf("hourly=5 daily=3")
    for hour in range(5):
        shelf.tick(NOON + hour * HOUR)
    shelf.schedule = parse_schedule("hourly=4")
    assert shelf.tick(NOON + 4 * HOUR) == ["hourly-20261129T1200Z"]
    shelf.schedule = {}
    before = shelf.names()
    assert decide(NOON + 9 * DAY, {}, shelf.snaps, {}) == Decision([], [])
    assert shelf.names() == before


moments = st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1)).map(lambda moment: moment.replace(tzinfo=UTC))
steps = st.one_of(
    st.integers(0, 3 * 60).map(lambda minutes: minutes * MINUTE),
    st.integers(-3 * 24, 40 * 24).map(lambda hours: hours * HOUR),
)
schedules = st.dictionaries(st.sampled_from(list(KINDS)), st.integers(1, 4), min_size=1).map(
    lambda counts: parse_schedule(format_schedule(counts))
)
people = st.sampled_from(["nothing", "nothing", "hold", "open", "release", "delete", "take", "restart"])


@given(schedules, moments, st.lists(st.tuples(steps, people, st.integers(0, 50)), max_size=60))
def test_whatever_clock_and_people_do(
    schedule: dict[str, int], now: datetime, course: Sequence[tuple[timedelta, str, int]]
) -> None:
    """Nothing that is held, in use or somebody's own goes; the newest stay; there is one for each period."""
    shelf = Shelf("")
    shelf.schedule = schedule
    for number, (step, deed, which) in enumerate(course):
        now = max(now + step, datetime(1970, 1, 1, tzinfo=UTC))
        chosen = shelf.snaps[which % len(shelf.snaps)] if shelf.snaps else None
        if deed == "take":
            shelf.snaps.append(Snap(f"mine{number}"))
        elif deed == "restart":
            shelf.last.clear()
        elif chosen is not None:
            if deed == "delete":
                shelf.snaps.remove(chosen)
            chosen.held = deed == "hold" or (chosen.held and deed != "release")
            chosen.open_count = int(deed == "open" or (chosen.open_count > 0 and deed != "release"))
        before = list(shelf.snaps)
        remembered = dict(shelf.last)
        deleted = shelf.tick(now)

        new = [snap for snap in shelf.snaps if snap not in before]
        assert all(snap in shelf.snaps for snap in new)
        assert len({parse_name(snap.short_name)[0] for snap in new}) == len(new)
        for snap in new:
            period = parse_name(snap.short_name)
            assert period[1] == KINDS[period[0]](now)
            assert all(parse_name(other.short_name) != period for other in before)
        for kind in schedule:
            present = any(parse_name(name) == (kind, KINDS[kind](now)) for name in shelf.names())
            assert present or remembered.get(kind) == KINDS[kind](now)
        for snap in before:
            if snap.short_name in deleted:
                assert not snap.held
                assert not snap.open_count
                assert parse_name(snap.short_name)[0] in schedule
        for kind, count in schedule.items():
            all_now = [snap for snap in [*before, *new] if parse_name(snap.short_name)[0] == kind]
            assert all(snap in shelf.snaps for snap in all_now[-count:])
            free = [snap for snap in shelf.snaps if snap in all_now and not snap.held and not snap.open_count]
            assert len(free) <= count
        assert decide(now, schedule, shelf.snaps, shelf.last) == Decision([], [])
