"""The quickstart, interrupted: it says so by its status, and leaves nothing running and nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from tests.system.daemon import REPOSITORY, environment

pytestmark = pytest.mark.system


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("after", ["started terraced", "made a thin volume"])
def test_an_interrupted_quickstart_fails_and_stops_all_that_it_started(
    tmp_path_factory: pytest.TempPathFactory, number: int, status: int, after: str
) -> None:
    tmp_path = tmp_path_factory.mktemp("q")  # Linux allows 107 bytes in the name of a daemon's socket
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / "scripts/lib/quickstart.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | {"TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if after in line:
                break
        children = psutil.Process(process.pid).children(recursive=True)
        assert any("terraced" in " ".join(child.cmdline()) for child in children)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == status, errors
    assert "PASS" not in output
    assert "Traceback" not in errors
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert not list(tmp_path.iterdir())
