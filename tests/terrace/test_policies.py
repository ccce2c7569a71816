"""`[policy.NAME]`: what may be written there, what it means, and that what is shown can be written again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from terrace.cli.root import root
from terrace.config import Config, parse_config
from terrace.policies import KEYS, SCHEDULE_KEY, PolicyConfig
from terrace.schema import ConfigError, duration_seconds, format_duration
from terrace.sizes import parse_size
from tiers import Policy
from tiers.policy import DEFAULT
from tiers.units import exact_size

EVERY_KEY = """
[policy.gold]
placement = "fast"
promote_touches = 5
demote_heat = 3
demote_idle = "24h"
compression_level = 9
migration_rate = "50M/s"
migration_window = "22:00-06:00"
iops_limit = 5000
iops_burst = 10000
bandwidth_limit = "100M"
bandwidth_burst = "1G"
when_full = "queue"
queue_timeout = "90s"
stream_cutoff = "1M"
snapshots = "hourly=24 daily=7 weekly=4"
"""
GOLD = Policy(
    "gold",
    "fast",
    5,
    3,
    86400.0,
    9,
    50 << 20,
    (22 * 60, 6 * 60),
    5000,
    10000,
    100 << 20,
    1 << 30,
    "queue",
    90.0,
    1 << 20,
)


def problem(text: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(text, "t.toml")
    (found,) = error.value.problems
    return found


def test_every_key_reaches_the_policy() -> None:
    assert parse_config(EVERY_KEY, "t.toml").policies() == {"default": DEFAULT, "gold": GOLD}
    assert parse_config(EVERY_KEY, "t.toml").schedules() == {"gold": {"hourly": 24, "daily": 7, "weekly": 4}}
    assert list(PolicyConfig.model_fields) == [*KEYS, SCHEDULE_KEY]


def test_a_table_without_keys_is_the_defaults_and_default_itself_may_be_given() -> None:
    assert Config().policies() == {"default": DEFAULT}
    policies = parse_config("[policy.plain]\n[policy.default]\niops_limit = 5", "t.toml").policies()
    assert policies == {"plain": Policy("plain"), "default": Policy(iops_limit=5)}


def test_what_is_shown_says_what_was_given_and_can_be_written_again() -> None:
    config = parse_config(EVERY_KEY, "t.toml")
    found = config.show_policy("gold", ["p/v"])
    assert (found.name, found.given, found.volumes) == ("gold", [*KEYS, SCHEDULE_KEY], ["p/v"])
    assert found.keys["migration_rate"] == "50M"
    again = "\n".join(f"{key} = {value!r}" for key, value in found.keys.items())
    written = parse_config("[policy.gold]\n" + again, "t.toml")
    assert written.policies()["gold"] == GOLD
    assert written.schedules() == config.schedules()
    assert config.show_policy("default").given == []
    assert config.show_policy("default").keys["demote_idle"] == "10m"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("iops_limt = 5", 'iops_limt: unknown key; did you mean "iops_limit"?'),
        ("x = 5", "x: unknown key; valid here: placement, promote_touches, "),
        ("placement = 'fats'", 'placement: "fats" is not possible; valid: auto, fast, base'),
        ("when_full = 'wait'", 'when_full: "wait" is not possible; valid: enospc, queue'),
        ("promote_touches = 0", "promote_touches: 0 is not possible; it must be from 1 to 255; the nearest is 1"),
        ("promote_touches = '2'", 'promote_touches: "2" is not a whole number'),
        ("compression_level = 22", "compression_level: 22 is not possible; it must be from 0 to 19; the nearest is 19"),
        ("demote_heat = 2", "demote_heat: 2 is not less than promote_touches, 2"),
        ("demote_idle = 'soon'", 'demote_idle: "soon" is not a time; write one such as "30s", "10m", "24h" or "7d"'),
        ("demote_idle = 5", "demote_idle: 5 is not a string in quotes"),
        ("demote_idle = '9999w'", "demote_idle: "),
        (
            "migration_rate = '1K'",
            "migration_rate: 1K is not possible; it must be from 64K to 1P, or 0: ",
        ),
        ("migration_rate = '50MB'", "migration_rate: '50MB' is ambiguous"),
        ("migration_rate = -1", "migration_rate: -1 is not possible"),
        ("migration_window = '22-6'", 'migration_window: "22-6" is not a window of hours'),
        ("iops_burst = 5", "iops_burst: 5 is a burst above no limit; give iops_limit too"),
        ("iops_limit = 5\niops_burst = 4", "iops_burst: 4 is less than what iops_limit gives in a second; "),
        (
            "bandwidth_limit = '1M'\nbandwidth_burst = '64K'",
            "bandwidth_burst: 64K is less than what bandwidth_limit gives in a second; the nearest possible is 1M",
        ),
        ("snapshots = 'hourley=24'", 'snapshots: "hourley" is not a kind of snapshot; did you mean "hourly"?'),
        ("snapshots = 'hourly=0'", "snapshots: hourly=0 would keep none of what it takes; leave hourly out"),
        ("snapshots = 'daily=1000000'", "snapshots: daily=1000000 is not possible; it must be from 1 to 10000; "),
        ("snapshots = 24", "snapshots: 24 is not a string in quotes"),
        ("snapshots = {hourly = 24}", "snapshots: {'hourly': 24} is not a string in quotes"),
        ("snapshot = 'hourly=24'", 'snapshot: unknown key; did you mean "snapshots"?'),
        ("when_full = 'queue'\nqueue_timeout = 0", "queue_timeout: 0 is no time to wait in"),
    ],
)
def test_an_error_names_file_line_table_and_key_and_what_would_be_right(line: str, expected: str) -> None:
    found = problem("[policy.gold]\n" + line)
    number = 2 + line.count("\n")
    assert found.startswith(f"t.toml:{number}: policy.gold.{expected}")


def test_a_name_that_no_policy_can_have_is_refused() -> None:
    assert problem("[policy.'a b']").startswith("t.toml:1: policy.a b: 'a b' can't name a policy")
    assert problem("[policy]\ngold = 1").startswith("t.toml:2: policy.gold: 1 is not a section; write [policy.gold]")
    assert problem("policy = 1").startswith("t.toml:1: policy: 1 is not a section; write [policy.NAME]")


def test_every_problem_of_every_policy_is_told() -> None:
    with pytest.raises(ConfigError) as error:
        parse_config("[policy.a]\niops_limit = -1\ndemote_heat = 255\n[policy.b]\nx = 1\n", "t.toml")
    assert [found.split(": ")[1] for found in error.value.problems] == [
        "policy.a.iops_limit",
        "policy.a.demote_heat",
        "policy.b.x",
    ]


@given(st.integers(0, 10**9))
def test_times_and_sizes_are_written_as_they_are_read(number: int) -> None:
    assert duration_seconds(format_duration(number)) == number
    assert parse_size(exact_size(number)) == number
    assert format_duration(7 * 86400) == "1w"
    assert format_duration(90) == "90s"
    assert exact_size(3 << 20) == "3M"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(root, arguments)


def test_a_file_is_checked_without_a_daemon(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text(EVERY_KEY)
    good = run("--home", str(tmp_path), "policy", "check", str(file))
    assert (good.exit_code, good.output) == (0, f"{file}: good; policies: gold\n")
    assert '"migration_window": "22:00-06:00"' in run("policy", "check", str(file), "-o", "json").output
    assert '"snapshots": "hourly=24 daily=7 weekly=4"' in run("policy", "check", str(file), "-o", "json").output
    file.write_text(EVERY_KEY.replace("placement", "placment"))
    bad = run("policy", "check", str(file))
    assert bad.exit_code == 1
    assert bad.stderr == f'Error: {file}:3: policy.gold.placment: unknown key; did you mean "placement"?\n'
    file.write_text("[policy.a]\nx = 1\n[policy.b]\niops_limit = -1\n")
    first, second = run("policy", "check", str(file)).stderr.splitlines()
    assert first.startswith(f"Error: {file}:2: policy.a.x: unknown key")
    assert second.startswith(f"Error: {file}:4: policy.b.iops_limit: -1 is not possible")
    missing = run("policy", "check", str(tmp_path / "none"))
    assert (missing.exit_code, "can't be read" in missing.stderr) == (1, True)
