"""Memory reclaim: what is permitted is done, and what isn't permitted stops nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from terrace import reclaim
from terrace.reclaim import _CAP_IPC_LOCK, _CAP_SYS_RESOURCE, _capable
from tests.system.daemon import environment

# PR_GET_IO_FLUSHER is 58; VmLck counts what is locked, in KiB.
SCRIPT = """
import ctypes, re
from terrace.reclaim import stand_apart
print(*stand_apart())
print(ctypes.CDLL(None).prctl(58, 0, 0, 0, 0))
print(re.search(r"VmLck:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""


def run(*before: str) -> tuple[list[str], int, int]:
    """(what was done, PR_GET_IO_FLUSHER's answer, KiB locked) in a process of its own."""
    command = [*before, sys.executable, "-W", "ignore", "-c", SCRIPT]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    done, flusher, locked = result.stdout.splitlines()
    return done.split(), int(flusher), int(locked)


def test_what_this_process_may_do_is_done_and_visible_to_the_kernel() -> None:
    done, flusher, locked_kib = run()
    assert ("io-flusher" in done) == _capable(_CAP_SYS_RESOURCE) == (flusher == 1)
    assert ("locked-memory" in done) == _capable(_CAP_IPC_LOCK) == (locked_kib > 0)


def test_without_the_privilege_nothing_is_done_and_nothing_fails() -> None:
    done, _, locked_kib = run("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--")
    assert (done, locked_kib) == ([], 0)


@pytest.mark.parametrize(("before", "permitted", "after"), [(0, True, -900), (0, False, 0), (-500, True, -500)])
def test_a_keeper_is_killed_late_where_that_may_be_said_and_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, permitted: bool, after: int
) -> None:
    monkeypatch.setattr(reclaim, "SCORE", tmp_path / "score")
    monkeypatch.setattr(reclaim, "_capable", lambda capability: permitted)
    reclaim.SCORE.write_text(f"{before}\n")
    reclaim.be_spared()
    assert int(reclaim.SCORE.read_text()) == after
