"""What the tests with real clients share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., str]
"""Takes a command and its arguments, returns what it said."""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a client in a neutral directory (libnbd's Python module is also called nbd); failure shows what it said."""

    def run_tool(*command: str | Path) -> str:
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}"
        return result.stdout

    return run_tool
