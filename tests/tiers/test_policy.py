"""A Policy is made of possible values only, and its window is right around midnight."""

import math
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiers.policy import DAY_MINUTES, DEFAULT, RULES, Policy, PolicyError


def test_the_default_limits_nothing_and_never_waits() -> None:
    assert DEFAULT.name == "default"
    assert not DEFAULT.is_limited
    assert (DEFAULT.when_full, DEFAULT.migration_window, DEFAULT.migration_rate_bytes) == ("enospc", None, 0)


def test_a_policy_is_a_value() -> None:
    with pytest.raises(FrozenInstanceError):
        DEFAULT.iops_limit = 1  # type: ignore[misc]
    assert replace(DEFAULT, iops_limit=5) == Policy(iops_limit=5)
    assert Policy(iops_limit=1).is_limited
    assert Policy(bandwidth_limit_bytes=1 << 20).is_limited


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a/b"}, "name: 'a/b' can't name a policy"),
        ({"placement": "slow"}, "placement: 'slow' is not possible; valid: auto, fast, base"),
        ({"when_full": "wait"}, "when_full: 'wait' is not possible; valid: enospc, queue"),
        ({"promote_touches": 0}, "promote_touches: 0 .* from 1 to 255; the nearest is 1"),
        ({"promote_touches": 256}, "promote_touches: 256 .* the nearest is 255"),
        ({"demote_heat": -1}, "demote_heat: -1 .* the nearest is 0"),
        ({"demote_heat": 2}, "demote_heat: 2 is not less than promote_touches, 2.* nearest possible is 1"),
        ({"demote_idle_s": math.nan}, "demote_idle_s: nan is not possible"),
        ({"demote_idle_s": math.inf}, "demote_idle_s: inf .* the nearest is 31622400"),
        ({"compression_level": 20}, "compression_level: 20 .* the nearest is 19"),
        ({"migration_rate_bytes": 1}, "migration_rate_bytes: 1 .* or 0: no limit; the nearest is 64K"),
        ({"iops_limit": -1}, "iops_limit: -1 .* the nearest is 0"),
        ({"iops_burst": 10}, "iops_burst: 10 is a burst above no limit; give iops_limit"),
        (
            {"iops_limit": 100, "iops_burst": 99},
            "iops_burst: 99 is less than what iops_limit gives in a second; .* 100$",
        ),
        ({"bandwidth_limit_bytes": 4096}, "bandwidth_limit_bytes: 4K .* the nearest is 64K"),
        ({"bandwidth_burst_bytes": 4096}, "bandwidth_burst_bytes: 4096 is a burst above no limit"),
        ({"bandwidth_limit_bytes": 1 << 20, "bandwidth_burst_bytes": 1}, "bandwidth_burst_bytes: 1 is less than"),
        ({"iops_limit": 1, "iops_burst": 1 << 60}, "iops_burst: .* the nearest is"),
        ({"when_full": "queue", "queue_timeout_s": 0}, "queue_timeout_s: 0 is no time"),
        ({"queue_timeout_s": -1}, "queue_timeout_s: -1 .* the nearest is 0"),
        ({"stream_cutoff_bytes": -1}, "stream_cutoff_bytes: -1 .* the nearest is 0"),
        ({"migration_window": (60, 60)}, "migration_window: it begins when it ends"),
        ({"migration_window": (1440, 0)}, "migration_window: 1440 .* the nearest is 1439"),
        ({"migration_window": (0, 1441)}, "migration_window: 1441 .* the nearest is 1440"),
    ],
)
def test_an_impossible_value_is_refused_with_its_field_and_what_is_possible(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(PolicyError, match=f"^{message}") as error:
        Policy(**values)
    assert error.value.field in values


def test_every_field_has_a_rule() -> None:
    assert set(RULES) == {field.name for field in fields(Policy)}


def test_a_window_over_midnight_holds_from_its_begin_to_its_end() -> None:
    night = Policy(migration_window=(22 * 60, 6 * 60))
    at = {"21:59": False, "22:00": True, "23:59": True, "00:00": True, "05:59": True, "06:00": False, "12:00": False}
    for clock, expected in at.items():
        hours, minutes = map(int, clock.split(":"))
        assert night.migrates_at(hours * 60 + minutes) is expected, clock


def test_without_a_window_and_with_that_of_the_whole_day_every_minute_is_good() -> None:
    for policy in (DEFAULT, Policy(migration_window=(0, DAY_MINUTES))):
        assert all(policy.migrates_at(minute) for minute in range(DAY_MINUTES))


@given(st.integers(0, DAY_MINUTES - 1), st.integers(0, DAY_MINUTES - 1))
def test_a_window_and_the_one_from_its_end_to_its_begin_share_the_day(start: int, end: int) -> None:
    if start == end:
        return
    one, other = Policy(migration_window=(start, end)), Policy(migration_window=(end, start))
    assert all(one.migrates_at(minute) != other.migrates_at(minute) for minute in range(DAY_MINUTES))
    assert sum(map(one.migrates_at, range(DAY_MINUTES))) == (end - start) % DAY_MINUTES
    assert one.migrates_at(start)
    assert not one.migrates_at(end)
