"""Readiness notification: arrives where it was asked for, and never stands in the way."""

from __future__ import annotations

import logging
import os
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
        assert notify("READY=1", "STATUS=x")
        assert receiver.recv(100) == b"READY=1\nSTATUS=x"


def test_descriptors_arrive_with_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver, (tmp_path / "file").open("w") as file:
        receiver.bind(f"{tmp_path}/notify")
        monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
        assert notify("FDSTORE=1", descriptors=[file.fileno()])
        data, descriptors, _, _ = socket.recv_fds(receiver, 100, 2)
        assert data == b"FDSTORE=1"
        (copy,) = descriptors
        assert os.path.sameopenfile(copy, file.fileno())
        os.close(copy)


def test_nobody_asked_is_no_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
    assert not caplog.records


def test_a_supervisor_that_went_away_is_only_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/gone")
    with caplog.at_level(logging.WARNING):
        assert not notify("READY=1")
    assert "NOTIFY_SOCKET" in caplog.text
