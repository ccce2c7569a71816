"""Scrubs as operators meet them: the schedule, the control API and the command line, on a daemon over fake pools."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from terrace.cli.root import root
from terrace.scrubs import Plan, decide
from tests.system.daemon import ApiError, environment
from tests.terrace.fakedaemon import FakeDaemon
from tiers import Result as ScrubResult
from tiers import ScrubStatus

MIB = 1 << 20
DAY_S = 86400.0
NOW_S = 1_800_000_000.0
NIGHT, NOON = 3 * 60, 12 * 60

NEVER = ScrubStatus("never", False, None, None, 0.0, 0, 0, 0, 0.0, None, 0, [], [], 0, None, NOW_S - 40 * DAY_S)


def at(state: Any, *, scheduled: bool = True, ended_days_ago: float | None = None) -> ScrubStatus:
    """A pool that has been known for 400 days and whose newest scrub is in this state."""
    ended_s = None if ended_days_ago is None else NOW_S - ended_days_ago * DAY_S
    last = ScrubResult(ended_s - 9, ended_s, 9.0, 1, 0) if ended_s is not None else None
    since_s = NOW_S - 400 * DAY_S
    return replace(NEVER, state=state, scheduled=scheduled, finished_at=ended_s, last=last, since=since_s)


MONTHLY = Plan(30 * DAY_S)
NIGHTLY = Plan(30 * DAY_S, (60, 360))
LATE = Plan(30 * DAY_S, (23 * 60, 5 * 60))
BY_HAND = Plan(None)


@pytest.mark.parametrize(
    ("found", "minute", "plan", "action"),
    [
        (NEVER, NOON, MONTHLY, "start"),
        (replace(NEVER, since=NOW_S - 29 * DAY_S), NOON, MONTHLY, None),
        (NEVER, NOON, BY_HAND, None),
        (NEVER, NOON, NIGHTLY, None),
        (NEVER, NIGHT, NIGHTLY, "start"),
        (NEVER, NIGHT, LATE, "start"),
        (NEVER, 23 * 60 + 30, LATE, "start"),
        (NEVER, 5 * 60, LATE, None),
        (at("finished", ended_days_ago=29.9), NOON, MONTHLY, None),
        (at("finished", ended_days_ago=30), NOON, MONTHLY, "start"),
        (at("finished", ended_days_ago=-5), NOON, MONTHLY, "start"),
        (replace(at("stopped", ended_days_ago=3), last=None), NOON, MONTHLY, None),
        (replace(at("stopped", ended_days_ago=31), last=None), NOON, MONTHLY, "start"),
        (at("paused"), NIGHT, NIGHTLY, None),
        (at("running"), NIGHT, NIGHTLY, None),
        (at("running"), NOON, NIGHTLY, "wait"),
        (at("running", scheduled=False), NOON, NIGHTLY, None),
        (at("waiting"), NOON, NIGHTLY, None),
        (at("waiting"), NIGHT, NIGHTLY, "resume"),
        (at("waiting"), NOON, BY_HAND, "resume"),
        (at("interrupted"), NOON, NIGHTLY, None),
        (at("interrupted"), NIGHT, NIGHTLY, "resume"),
        (at("interrupted", scheduled=False), NOON, NIGHTLY, "resume"),
        (at("interrupted", scheduled=False), NOON, BY_HAND, "resume"),
    ],
)
def test_the_schedule_decides_from_the_last_scrub_and_the_time(
    found: ScrubStatus, minute: int, plan: Plan, action: str | None
) -> None:
    assert decide(found, NOW_S, minute, plan) == action


# -- on a daemon -----------------------------------------------------------------------------------------------------


@pytest.fixture
def scrubbed(daemon: FakeDaemon) -> Iterator[FakeDaemon]:
    """A daemon with a pool `s` of its own and a volume of 4 MiB of data, which nobody scrubs but the test."""
    device = {"path": f"{daemon.home}/s.device", "tier": "fast", "size": 64 * MIB}
    daemon.api("POST", "/v1/pools", {"name": "s", "devices": [device]})
    daemon.api("POST", "/v1/pools/s/volumes", {"name": "v", "size": 4 * MIB})
    (daemon.directory("s") / "v.raw").write_bytes(b"x" * (4 * MIB))
    yield daemon
    daemon.api("DELETE", "/v1/pools/s")
    Path(f"{daemon.home}/s.device").unlink()


def refusal(daemon: FakeDaemon, body: Any, pool: str = "s") -> ApiError:
    with pytest.raises(ApiError) as error:
        daemon.api("POST", f"/v1/pools/{pool}/scrub", body)
    return error.value


def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_a_scrub_is_started_watched_paused_resumed_and_stopped_over_the_api(scrubbed: FakeDaemon) -> None:
    def scrub(**body: Any) -> Any:
        return scrubbed.api("POST", "/v1/pools/s/scrub", body) if body else scrubbed.api("GET", "/v1/pools/s/scrub")

    assert scrub()["state"] == "never"
    slow = scrubbed.directory("s") / "slow-scrub"
    slow.write_text("3600")
    assert scrub(action="start", rate="10M")["state"] == "running"
    running = scrub()
    assert (running["rate"], running["total_bytes"], running["scheduled"]) == (10 * MIB, 4 * MIB, False)
    assert scrubbed.api("GET", "/v1/pools/s")["scrub"]["state"] == "running"
    assert scrub(action="start")["started_at"] == running["started_at"]
    assert scrub(action="pause")["state"] == "paused"
    error = refusal(scrubbed, {"action": "pause"})
    assert (error.status, error.errno) == (404, "ENOENT")
    assert scrub(action="start", rate=0)["rate"] == 0
    assert scrub(action="stop")["state"] == "stopped"
    slow.unlink()
    (scrubbed.directory("s") / "rot").write_text("v")
    scrub(action="start")
    until(lambda: scrub()["state"] == "finished")
    finished = scrub()
    assert finished["errors"] == finished["last"]["errors"] == 1
    (damage,) = finished["damage"]
    assert (damage["volume"], damage["offset"], damage["length"]) == ("s/v", 0, 4096)
    assert (damage["device"], damage["device_offset"]) == (f"{scrubbed.home}/s.device", MIB)
    (pool,) = (pool for pool in scrubbed.api("GET", "/v1/status")["pools"] if pool["name"] == "s")
    assert pool["scrub"] | {"lost": []} == finished


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "action"),
        ({"action": "dance"}, "action"),
        ({"action": "start", "rate": "fast"}, "rate"),
        ({"action": "start", "rate": -1}, "rate"),
        ({"action": "start", "rate": 1 << 60}, "rate"),
        ({"action": "start", "rate": 4096}, "64K"),
        ({"action": "pause", "rate": "1M"}, "rate"),
        ({"action": "start", "speed": 1}, "speed"),
    ],
)
def test_a_wrong_request_is_refused_and_starts_nothing(scrubbed: FakeDaemon, body: Any, word: str) -> None:
    error = refusal(scrubbed, body)
    assert (error.status, error.errno) == (400, "EINVAL")
    assert word in error.message
    assert scrubbed.api("GET", "/v1/pools/s/scrub")["state"] == "never"
    missing = refusal(scrubbed, {"action": "start"}, "none")
    assert (missing.status, missing.errno) == (404, "ENOENT")


def terrace(daemon: FakeDaemon, *arguments: str) -> Result:
    result = CliRunner().invoke(root, ["--home", str(daemon.home), "pool", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_the_command_starts_follows_and_tells(scrubbed: FakeDaemon) -> None:
    def said(*arguments: str, status: int = 0) -> str:
        result = terrace(scrubbed, "scrub", "s", *arguments)
        assert result.exit_code == status, result.output
        return result.stdout

    assert said("--status") == "Pool s was never scrubbed; terrace pool scrub s starts it.\n"
    assert " never" in terrace(scrubbed, "list").stdout
    slow = scrubbed.directory("s") / "slow-scrub"
    slow.write_text("3600")
    assert said("--rate", "10M") == "The scrub of pool s is started; terrace pool scrub s --status follows it.\n"
    assert "runs already" in said()
    shown = said("--status")
    for expected in ("running", "limit 10 MiB/s", "ETA 1 s", "no errors", f"{scrubbed.home}/s.device", "4 MiB"):
        assert expected in shown
    assert "running, " in terrace(scrubbed, "list").stdout
    assert said("--pause").startswith("The scrub of pool s is paused at ")
    assert "paused at " in terrace(scrubbed, "show", "s").stdout
    assert "goes on" in said()
    assert json.loads(said("--stop", "-o", "json"))["state"] == "stopped"
    slow.unlink()
    assert said("--wait").startswith("Pool s is sound: no errors in 4 MiB, just now, took ")
    assert "no errors in 4 MiB" in terrace(scrubbed, "show", "s").stdout
    (scrubbed.directory("s") / "rot").write_text("v")
    found = said("--wait", status=1)
    for expected in ("1 error in 4 MiB", "s/v", "4095", "fails its checksum", f"{scrubbed.home}/s.device", "trim"):
        assert expected in found
    assert said("--status", status=1) == found
    assert "just now, 1 error" in terrace(scrubbed, "list").stdout
    assert json.loads(said("--status", "-o", "json", status=1))["errors"] == 1


def test_a_scrub_without_errors_of_a_pool_that_has_lost_blocks_does_not_call_it_sound(scrubbed: FakeDaemon) -> None:
    def said(*arguments: str) -> str:
        result = terrace(scrubbed, "scrub", "s", *arguments)
        assert result.exit_code == 1, result.output
        assert "is sound" not in result.stdout
        return result.stdout

    lost = scrubbed.directory("s") / "lost"
    lost.write_text(json.dumps({"s/v": 1, "s/v@daily": 3}))
    which = "1 block of s/v, 3 blocks of s/v@daily, which `terrace pool check s` names; they read as EIO until "
    assert f"Lost: {which}" in said("--status"), "no scrub is needed for that"
    verdict = said("--wait")
    assert verdict.startswith(
        f"Pool s has lost {which}they are written or trimmed. Of what is there: no errors in 4 MiB"
    )
    assert f"Lost: {which}" in said("--status")
    (scrubbed.directory("s") / "rot").write_text("v")
    assert "1 error in 4 MiB" in (shown := said("--wait")) and f"Lost: {which}" in shown
    found = json.loads(said("--status", "-o", "json"))
    assert found["lost"] == [{"volume": "s/v", "blocks": 1}, {"volume": "s/v@daily", "blocks": 3}]
    lost.write_text(json.dumps({f"s/v@{i:02}": 2 for i in range(22)}))
    assert "2 blocks of s/v@19, 4 blocks of 2 more, which" in said("--status")


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (("none",), 1, "there is no pool 'none'"),
        (("s", "--stop"), 1, "no scrub of pool s is running"),
        (("s", "--pause"), 1, "terrace pool scrub s --status"),
        (("s", "--rate", "1K"), 1, "64K"),
        (("s", "--rate", "fast"), 2, "'fast' is not a size"),
        (("s", "--pause", "--stop"), 2, "stand alone"),
        (("s", "--status", "--rate", "1M"), 2, "stand alone"),
        (("s", "--wait", "--stop"), 2, "stand alone"),
        (("s/v",), 2, "no slash"),
    ],
)
def test_an_error_is_one_line_that_names_the_thing(
    scrubbed: FakeDaemon, arguments: tuple[str, ...], status: int, word: str
) -> None:
    result = terrace(scrubbed, "scrub", *arguments)
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert word in result.stderr


def test_who_waits_on_a_terminal_sees_a_bar_with_the_time_left_and_may_leave_without_ending_it(
    scrubbed: FakeDaemon,
) -> None:
    (scrubbed.directory("s") / "slow-scrub").write_text("20")
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "terrace.cli", "pool", "scrub", "s", "--wait"]
    process = subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment() | {"TERRACE_HOME": str(scrubbed.home), "TERM": "xterm"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a background job may have ignored
    )
    os.close(slave)
    shown = b""
    while b"/s, ETA " not in shown:
        shown += os.read(master, 4096)
    assert b"Scrubbing pool s" in shown
    assert b"/4.0 MiB" in shown
    process.send_signal(signal.SIGINT)
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(master)
    assert process.wait(20) == 1
    assert b"the scrub goes on" in shown
    assert b"Traceback" not in shown
    assert scrubbed.api("POST", "/v1/pools/s/scrub", {"action": "stop"})["state"] == "stopped"


def test_a_scrub_is_due_when_the_last_is_older_than_the_interval_and_an_interrupted_one_goes_on(
    own_daemon: FakeDaemon,
) -> None:
    def scrub() -> Any:
        return own_daemon.api("GET", "/v1/pools/p/scrub")

    own_daemon.config = '[scrub]\ninterval = "2s"\nrate = "5M"\n'
    own_daemon.start()
    device = {"path": f"{own_daemon.home}/device", "tier": "fast", "size": 64 * MIB}
    own_daemon.api("POST", "/v1/pools", {"name": "p", "devices": [device]})
    until(lambda: scrub()["state"] == "finished")
    first = scrub()
    assert (first["scheduled"], first["rate"]) == (True, 5 * MIB)
    assert first["started_at"] >= first["since"] + 2
    (own_daemon.directory("p") / "slow-scrub").write_text("3600")
    until(lambda: scrub()["state"] == "running")
    second = scrub()
    assert second["started_at"] >= first["finished_at"] + 2
    assert own_daemon.stop() == 0
    own_daemon.start()
    until(lambda: scrub()["state"] == "running")
    assert (scrub()["started_at"], scrub()["scheduled"]) == (second["started_at"], True)
    own_daemon.kill()
    # One that an operator paused is the operator's, also after a restart.
    own_daemon.start()
    own_daemon.api("POST", "/v1/pools/p/scrub", {"action": "pause"})
    assert own_daemon.stop() == 0
    own_daemon.start()
    time.sleep(2.5)
    assert scrub()["state"] == "paused"
