"""The API's client against a daemon that says nothing, or takes its time."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from terrace import apiclient, apikit
from terrace.apiclient import ApiClient, ApiError
from tests.terrace.fakedaemon import FakeDaemon


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apiclient, "_SILENCE_S", 0.4)
    monkeypatch.setattr(apiclient, "_PROBE_S", 0.6)


@contextmanager
def stopped(daemon: FakeDaemon) -> Iterator[int]:
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        yield daemon.process.pid
    finally:
        daemon.process.send_signal(signal.SIGCONT)


def judge(error: ApiError, daemon: FakeDaemon, pid: int) -> None:
    assert str(error).count("\n") == 0
    for word in (f"process {pid}", str(daemon.home), "not answered for 1 s", f"kill -CONT {pid}"):
        assert word in str(error), error


def test_a_stopped_daemon_is_given_up_and_named_and_answers_again_when_it_goes_on(daemon: FakeDaemon) -> None:
    with ApiClient(daemon.home / "api.sock") as client:
        with stopped(daemon) as pid:
            begun_s = time.monotonic()
            with pytest.raises(ApiError) as caught:
                client.get("status")
            assert time.monotonic() - begun_s < 5
            judge(caught.value, daemon, pid)
            # One that connects only now is in the backlog.
            with ApiClient(daemon.home / "api.sock") as late, pytest.raises(ApiError) as caught:
                late.get("pools")
            judge(caught.value, daemon, pid)
        with ApiClient(daemon.home / "api.sock") as again:
            assert again.get("status")["pid"] == pid


def test_a_stream_that_falls_silent_is_given_up(daemon: FakeDaemon) -> None:
    (daemon.directory("p") / "slow-check").write_text("600")
    try:
        with ApiClient(daemon.home / "api.sock") as client:
            lines = client.stream("POST", "pools", "p", "check", body={})
            next(lines)
            with stopped(daemon) as pid, pytest.raises(ApiError) as caught:
                for _ in lines:
                    pass
            judge(caught.value, daemon, pid)
    finally:
        (daemon.directory("p") / "slow-check").unlink()


def test_an_operation_may_take_longer_than_the_silence_while_the_daemon_lives(own_daemon: FakeDaemon) -> None:
    own_daemon.start()
    with ApiClient(own_daemon.home / "api.sock") as client:
        device = {"path": f"{own_daemon.home}/device", "tier": "fast", "size": 64 << 20}
        directory = own_daemon.directory("late")
        client.request("POST", "pools", body={"name": "late", "devices": [device]})
        (directory / "stuck-close").write_text("2.5")
        begun_s = time.monotonic()
        client.request("DELETE", "pools", "late")
        assert time.monotonic() - begun_s > 2


def test_a_backlog_that_nobody_empties_is_an_error_not_a_wait(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(path))
            with pytest.raises(ApiError) as caught:
                ApiClient(path)
    assert str(path) in str(caught.value)
    assert "not answered" in str(caught.value)


def test_the_client_waits_longer_for_a_line_than_the_daemon_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert apiclient._SILENCE_S + apiclient._PROBE_S > 3 * apikit._REPEAT_S
