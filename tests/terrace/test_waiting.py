"""What is said to those who wait for a change, and to those who no longer do."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

import pytest

from terrace.cli.waiting import stopped_waiting, where_to_look
from tests.system.daemon import environment
from tests.terrace.fakedaemon import FakeDaemon


def _interrupted(daemon: FakeDaemon, *command: str) -> str:
    """What a terminal shows of a command that gets no answer, and of Ctrl-C as soon as it has said that it waits."""
    assert daemon.process is not None
    main, terminal = pty.openpty()
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "terrace.cli", *command],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=environment() | {"TERRACE_HOME": str(daemon.home), "TERM": "xterm", "COLUMNS": "300"},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a background job may have ignored
        )
        os.close(terminal)
        shown = b""
        while b"It isn't done yet; see" not in shown:
            shown += os.read(main, 4096)
        process.send_signal(signal.SIGINT)
        while True:
            try:
                part = os.read(main, 4096)
            except OSError:
                break
            if not part:
                break
            shown += part
        assert process.wait(timeout=10) == 1
    finally:
        daemon.process.send_signal(signal.SIGCONT)
        os.close(main)
    return shown.decode()


def test_ctrl_c_at_a_change_of_a_mirror_says_that_it_may_still_be_done_and_where_to_look(daemon: FakeDaemon) -> None:
    shown = _interrupted(daemon, "volume", "mirror", "demote", "p/db")
    assert "see `terrace volume mirror explain p/db` for what it waits for" in shown
    assert (
        "Error: stopped waiting: what was asked for may still be done; see `terrace volume mirror show p/db`" in shown
    )


def test_so_it_does_at_any_other_change(daemon: FakeDaemon) -> None:
    shown = _interrupted(daemon, "policy", "reload")
    assert "may still be done; see the state with `terrace status`" in shown


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("pools", "terrace pool list"),
        ("pools p grow", "terrace pool list"),
        ("pools p volumes", "terrace volume list p"),
        ("pools p volumes v", "terrace volume list p"),
        ("pools p volumes v snapshots s rollback", "terrace snapshot list p/v"),
        ("pools p volumes v snapshots s clone", "terrace volume list p"),
        ("pools p snapshots", "terrace snapshot list p"),
        ("pools p volumes v mirror legs b", "terrace volume mirror show p/v"),
        ("nodes a drain", "terrace volume mirror list"),
    ],
)
def test_the_command_that_is_named_shows_what_is_changed(path: str, command: str) -> None:
    assert where_to_look(tuple(path.split())) == command
    assert f"`{command}`" in stopped_waiting(tuple(path.split()))
