"""What systemd hears while the daemon lives, and when the watchdog hears nothing."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from terrace.supervisor import Supervisor, watchdog_seconds
from tests.system.daemon import orphans_come_to_us
from tests.terrace.fakedaemon import FakeDaemon
from tests.terrace.test_daemon import make_volume


class Supervised:
    """Hears what the daemon says."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(20)

    def __call__(self) -> dict[str, str]:
        """The next message, by name."""
        while True:
            found = dict(line.split("=", 1) for line in self.socket.recv(4096).decode().split("\n"))
            if "FDSTORE" not in found:
                return found


@pytest.fixture
def hear(tmp_path: Path) -> Iterator[Supervised]:
    supervised = Supervised(tmp_path / "notify")
    yield supervised
    supervised.socket.close()


def until(hear: Supervised, name: str, text: str = "") -> dict[str, str]:
    """The next message that has `name`, with `text` in its value."""
    deadline_s = time.monotonic() + 20
    while text not in (found := hear()).get(name, "") or name not in found:
        assert time.monotonic() < deadline_s
    return found


def test_a_slow_start_and_a_slow_end_ask_for_time_and_say_what_for(
    own_daemon: FakeDaemon, tmp_path: Path, hear: Supervised
) -> None:
    own_daemon.start()
    make_volume(own_daemon, "one")
    make_volume(own_daemon, "two")
    own_daemon.stop()
    (own_daemon.directory("two") / "slow-open").write_text("600")
    process = own_daemon.spawn(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000")
    found = until(hear, "STATUS", "opening pools: 1 of 2 open, recovering two (")
    assert int(found["EXTEND_TIMEOUT_USEC"]) == 60_000_000
    assert found["WATCHDOG"] == "1"
    assert "READY" not in found
    process.send_signal(signal.SIGTERM)
    found = until(hear, "STOPPING")
    assert "closing pools: one" in found["STATUS"]
    process.communicate(timeout=20)
    own_daemon.process = None
    (own_daemon.directory("two") / "slow-open").unlink()

    process = own_daemon.spawn(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000")
    assert until(hear, "READY")["STATUS"] == "serving 2 pools, 2 volumes, 0 clients"
    assert "EXTEND_TIMEOUT_USEC" not in until(hear, "WATCHDOG")
    (own_daemon.directory("two") / "stuck-close").write_text("600")
    process.send_signal(signal.SIGTERM)
    assert "EXTEND_TIMEOUT_USEC" in until(hear, "STATUS", "closing pools: two (")


@pytest.mark.alone
def test_the_watchdog_hears_of_a_loop_that_runs_and_not_of_one_that_hangs(
    own_daemon: FakeDaemon, tmp_path: Path, hear: Supervised
) -> None:
    process = own_daemon.spawn(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="400000")
    until(hear, "READY")
    heard_s = []
    for _ in range(5):
        until(hear, "WATCHDOG")
        heard_s.append(time.monotonic())
    assert max(b - a for a, b in itertools.pairwise(heard_s)) < 0.4
    process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(0.1)
        with pytest.raises(TimeoutError):
            hear.socket.settimeout(0.6)
            while True:
                hear()
    finally:
        process.send_signal(signal.SIGCONT)


def test_a_hand_over_is_announced_with_its_time_and_who_is_the_service_from_then_on(
    own_daemon: FakeDaemon, tmp_path: Path, hear: Supervised
) -> None:
    process = own_daemon.spawn(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="400000")
    until(hear, "READY")
    before = time.monotonic_ns() // 1000
    with orphans_come_to_us():
        process.send_signal(signal.SIGHUP)
        assert before <= int(until(hear, "RELOADING")["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        successor = int(until(hear, "MAINPID")["MAINPID"])
        assert until(hear, "READY")["STATUS"] == "serving 0 pools, 0 volumes, 0 clients"
        own_daemon.follow(successor)
    assert own_daemon.api("GET", "/v1/status")["pid"] == successor
    until(hear, "WATCHDOG")  # the next one knows that it is watched
    assert own_daemon.stop() == 0
    until(hear, "STOPPING")


def test_a_hand_over_that_comes_to_nothing_is_taken_back(
    own_daemon: FakeDaemon, tmp_path: Path, hear: Supervised
) -> None:
    own_daemon.spawn(NOTIFY_SOCKET=str(tmp_path / "notify"))
    until(hear, "READY")
    make_volume(own_daemon)
    (own_daemon.directory("p") / "fail-one-open").write_text("bad luck")
    own_daemon.api("POST", "/v1/upgrade", {})
    found = until(hear, "RELOADING")
    while "READY" not in found:
        found = hear()
        assert "MAINPID" not in found
    assert found["STATUS"] == "serving 1 pool, 1 volume, 0 clients"


def test_closing_asks_for_time_no_longer_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def notify(*states: str) -> bool:
        told.extend(states)
        return True

    monkeypatch.setattr("terrace.supervisor.notify", notify)
    now_s = 1000.0
    monkeypatch.setattr("terrace.supervisor.time.monotonic", lambda: now_s)
    supervisor = Supervisor({})
    supervisor.stopping()
    now_s += 899
    supervisor._post()
    assert any(state.startswith("EXTEND_TIMEOUT_USEC") for state in told)
    told.clear()
    now_s += 2
    supervisor._post()
    assert told and not any(state.startswith("EXTEND_TIMEOUT_USEC") for state in told)


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_s_time_is_obeyed_where_it_is_meant_for_this_process(
    variables: dict[str, str], seconds: float | None
) -> None:
    assert watchdog_seconds(variables) == seconds
