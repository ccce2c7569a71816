"""Readiness notification: arrives where it was asked for, and never stands in the way."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import pytest

from terrace.sdnotify import notify


@pytest.mark.parametrize("abstract", [False, True])
def test_the_state_arrives_at_the_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"@{tmp_path}" if abstract else f"{tmp_path}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(name.replace("@", "\0", 1))
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify("READY=1")
        assert receiver.recv(100) == b"READY=1"


def test_nobody_asked_is_no_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    assert not caplog.records


def test_a_supervisor_that_went_away_is_only_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/gone")
    with caplog.at_level(logging.WARNING):
        notify("READY=1")
    assert "NOTIFY_SOCKET" in caplog.text
