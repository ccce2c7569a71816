"""PostgreSQL on a volume. The work is in scripts/postgres, which runs longer by itself."""

from __future__ import annotations

import pytest

from tests.system.daemon import run_script


@pytest.mark.system
@pytest.mark.long
def test_snapshots_under_load_are_sound_databases_and_a_kill_of_everything_loses_nothing_committed() -> None:
    run_script("scripts/postgres", "--seconds", "9", "--interval", "3", "--scale", "2")
