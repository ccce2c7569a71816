"""No silent corruption: whatever happens to a device, a read gives what was written last, or EIO where it was hit.

Each seed is a past for a volume, damage of a random kind to random places, and reads before and after a restart; a
failure names the scenario and the seed. `corruption.py` has the scenarios and says what is asked in each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from tests.simulation.corruption import (
    Place,
    cleaning_damage,
    crash_damage,
    log_damage,
    map_damage,
    rest_damage,
    write_damage,
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Each damaged block is an error in the log."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def run(scenario: Callable[[int], object], seed: int) -> None:
    """Run a scenario; a failure says how to repeat it."""
    try:
        scenario(seed)
    except BaseException as error:
        error.add_note(f"{scenario.__name__}({seed}) of tests/simulation/corruption.py")
        raise


@pytest.mark.parametrize("seed", range(24))
def test_damage_at_rest_costs_only_what_it_hit_and_the_check_names_it(seed: int) -> None:
    run(rest_damage, seed)


@pytest.mark.parametrize("seed", range(24))
def test_around_the_damage_a_crash_leaves_a_prefix(seed: int) -> None:
    run(crash_damage, seed)


@pytest.mark.parametrize("seed", range(16))
def test_damaged_blocks_are_bad_wherever_they_move_and_good_when_overwritten(seed: int) -> None:
    run(cleaning_damage, seed)


@pytest.mark.parametrize("seed", range(40))
def test_a_log_that_was_damaged_is_refused_unless_it_looks_torn_and_truncation_gives_what_came_before(
    seed: int,
) -> None:
    run(log_damage, seed)


@pytest.mark.parametrize("seed", range(24))
def test_map_pages_that_are_given_up_cost_what_lay_below_them_whatever_is_cut_in_the_middle(seed: int) -> None:
    run(map_damage, seed)


def test_most_of_these_worlds_lose_something() -> None:
    assert sum(map_damage(seed) > 0 for seed in range(8)) >= 4


@pytest.mark.parametrize("seed", range(16))
def test_writes_that_land_elsewhere_or_nowhere_are_noticed(seed: int) -> None:
    run(write_damage, seed)


def test_the_same_seed_gives_the_same_damage() -> None:
    def digest() -> tuple[int, int, bytes, set[Place]]:
        scene = crash_damage(3)
        return scene.machine.steps, scene.machine.commits, bytes(scene.model.content), scene.hit

    first, again = digest(), digest()
    assert first == again
    assert first[3]
