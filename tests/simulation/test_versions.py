"""Programs over trees of versions: whatever is taken, deleted, cloned and rolled back, each one stays what it was."""

from __future__ import annotations

import pytest

from tests.simulation.versions import Versions

REGRESSIONS = {
    "a clone that was deleted while it took over what its origin kept ended the pool": (44, 60),
}


@pytest.mark.parametrize("name", REGRESSIONS)
def test_a_bug_that_was_found_stays_away(name: str) -> None:
    Versions.live(*REGRESSIONS[name])


@pytest.mark.parametrize("seed", range(25))
def test_every_version_stays_what_it_was(seed: int) -> None:
    Versions.live(seed, 50)


@pytest.mark.parametrize("seed", [2, 5])
def test_what_was_given_up_is_lost_in_each_version_that_has_it_and_counts_as_nothing(seed: int) -> None:
    assert Versions.live(seed, 60, loses=True).found_lost


def test_everything_is_done_in_these_programs() -> None:
    seen = {kind for seed in range(30, 34) for kind in Versions.live(seed, 50, loses=seed == 33).seen}
    assert seen == {name.removeprefix("do_") for name in dir(Versions) if name.startswith("do_")}
