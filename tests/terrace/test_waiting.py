"""What is said to those who wait for a change, and to those who no longer do."""

from __future__ import annotations

import gc
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Any

import pytest
from click.testing import CliRunner

from terrace.cli.root import root
from terrace.cli.waiting import stopped_waiting, where_to_look
from terrace.lastchange import LastChange
from tests.system.daemon import environment
from tests.terrace.fakedaemon import FakeDaemon


def _interrupted(daemon: FakeDaemon, *command: str, again_after_s: float | None = None) -> str:
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
        if again_after_s is not None:
            time.sleep(again_after_s)
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


# The connection of a request that is under way is left to the end of the process, which doesn't come here.
@pytest.mark.filterwarnings("ignore:unclosed.*socket:ResourceWarning")
def test_so_it_does_whatever_line_the_interrupt_comes_in_from_the_request_on(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    begins = LastChange.begins
    asked: list[tuple[str, ...]] = []

    def begin(self: LastChange, path: tuple[str, ...]) -> None:
        begins(self, path)
        asked.append(path)

    monkeypatch.setattr(LastChange, "begins", begin)

    def interrupted_at(line: int) -> str | None:
        """What is said then; None if the command is done before."""
        left = line
        asked.clear()
        before = set(threading.enumerate())

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            if "/terrace/" not in frame.f_code.co_filename or frame.f_code.co_filename.endswith("/root.py"):
                return None
            if event == "line" and asked:
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            result = CliRunner().invoke(root, ["--home", str(daemon.home), "policy", "reload"])
        finally:
            sys.settrace(None)
            for thread in set(threading.enumerate()) - before:
                thread.join(10)
        return None if left > 0 else result.stderr

    line = 1
    while (said := interrupted_at(line)) is not None:
        doubt = "stopped waiting: what was asked for may still be done" in said
        assert doubt or "stopped, after what was asked for was done" in said, f"line {line}: {said!r}"
        assert "see the state with `terrace status`" in said
        line += 1
    assert line > 20
    gc.collect()


@pytest.mark.parametrize("gap_s", [0.0, 0.0005, 0.002])
def test_so_it_does_when_two_interrupts_come_at_once_as_from_timeout(daemon: FakeDaemon, gap_s: float) -> None:
    shown = _interrupted(daemon, "policy", "reload", again_after_s=gap_s)
    assert "Error: stopped waiting: what was asked for may still be done" in shown and "Traceback" not in shown


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
