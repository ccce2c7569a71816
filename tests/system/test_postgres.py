"""PostgreSQL on a volume. The work is in scripts/postgres, which runs longer by itself."""

from __future__ import annotations

import subprocess

import pytest

from tests.system.daemon import REPOSITORY, environment


@pytest.mark.system
def test_snapshots_under_load_are_sound_databases_and_a_kill_of_everything_loses_nothing_committed() -> None:
    result = subprocess.run(
        ["scripts/postgres", "--seconds", "9", "--interval", "3", "--scale", "2"],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
