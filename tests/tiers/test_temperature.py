"""What is hot is a pure function of counters: who is promoted, who stays on fast, who is kept apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiers.heat import Heat, Ints, Touch
from tiers.policy import DEFAULT, Policy
from tiers.temperature import RISE, Temperature

V = 7


def ints(*values: int) -> Ints:
    return np.array(values, np.int64)


def heated(touches: dict[int, int], touch: Touch = Touch.READ) -> Heat:
    """Counters that know blocks of volume V as touched so often."""
    heat = Heat(1 << 20, 1 << 16)
    for block, count in touches.items():
        heat.sketches[touch].note(V, ints(block), ints(count))
    return heat


def leaving(temperature: Temperature, blocks: list[int], leave: int, policy: Policy = DEFAULT) -> list[int]:
    stays = temperature.survivors(np.full(len(blocks), V), ints(*blocks), leave, {V: policy})
    return [block for block, stay in zip(blocks, stays.tolist(), strict=True) if not stay]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 1 << 38)), min_size=1, max_size=50))
def test_one_block_is_estimated_as_many_are(touched: list[tuple[int, int]]) -> None:
    heat = Heat(1 << 20, 1 << 10)
    for volume, block in touched:
        heat.note(Touch.READ, volume, ints(block), ints(1))
        heat.note(Touch.WRITE, volume, ints(block), ints(1))
    volumes, blocks = (np.array(column, np.int64) for column in zip(*touched, strict=True))
    assert heat.estimates(volumes, blocks).tolist() == [heat.estimate(volume, block) for volume, block in touched]


# -- promotion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("touches", [1, 2, 5])
def test_a_block_is_promoted_at_the_touch_that_the_policy_says(touches: int) -> None:
    temperature = Temperature(heated({n: n for n in range(1, 8)}))
    policy = Policy(promote_touches=touches, demote_heat=0)
    seen = [n for n in range(8) if temperature.admits(policy, V, n)]
    assert seen == [n for n in range(8) if n + 1 >= touches]
    assert temperature.admits_each(policy, V, np.arange(8)).tolist() == [n in seen for n in range(8)]


def test_placement_overrules_heat() -> None:
    temperature = Temperature(heated({1: 200}))
    for block in (1, 2):
        assert temperature.admits(Policy(placement="fast"), V, block)
        assert not temperature.admits(Policy(placement="base"), V, block)
    assert temperature.admits_each(Policy(placement="fast"), V, ints(1, 2)).all()
    assert not temperature.admits_each(Policy(placement="base"), V, ints(1, 2)).any()


def test_only_what_is_hotter_than_what_had_to_leave_is_promoted() -> None:
    temperature = Temperature(heated({1: 1, 2: 2, 3: 3, 10: 3, 11: 4}))
    assert temperature.admits(DEFAULT, V, 1)
    for _ in range(200):
        assert leaving(temperature, [10, 11], 1) == [10]
    assert temperature.threshold == pytest.approx(3)
    assert [temperature.admits(DEFAULT, V, block) for block in (0, 1, 3)] == [False, False, True]
    assert temperature.turned_away == 1


def test_the_threshold_falls_at_once_and_rises_slowly() -> None:
    temperature = Temperature(heated({1: 2, 9: 100}))
    leaving(temperature, [9], 1)
    assert temperature.threshold == pytest.approx(100 * RISE)
    leaving(temperature, [1, 9], 1)
    assert temperature.threshold == 2
    leaving(temperature, [1, 9], 0)
    assert temperature.threshold == 2, "where nobody leaves nothing is learnt"


def test_the_threshold_fades_with_the_counts_and_when_it_turns_too_many_away() -> None:
    heat = heated({1: 3, 9: 100})
    temperature = Temperature(heat)
    for _ in range(100):
        leaving(temperature, [9], 1)
    before = temperature.threshold
    for sketch in heat.sketches:
        list(sketch.halve())
    assert temperature.threshold == pytest.approx(before / 2)
    turned_away = 0
    while not temperature.admits(DEFAULT, V, 1):
        turned_away += 1
        assert turned_away < 200_000
    assert turned_away > 4096


# -- demotion ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.integers(0, 50))
def test_as_many_leave_as_must_and_they_are_the_coldest(heats: list[int], leave: int) -> None:
    blocks = list(range(len(heats)))
    temperature = Temperature(heated(dict(zip(blocks, heats, strict=True))))
    gone = leaving(temperature, blocks, leave)
    assert len(gone) == min(leave, len(blocks))
    stayed = [heats[block] for block in blocks if block not in gone]
    assert not gone or not stayed or max(heats[block] for block in gone) <= min(stayed)


def test_a_policy_s_volume_leaves_first_or_last() -> None:
    heat = heated({1: 5, 2: 1})
    heat.sketches[Touch.READ].note(8, ints(1, 2), ints(9, 9))
    temperature = Temperature(heat)
    volumes, blocks = ints(V, V, 8, 8, 9), ints(1, 2, 1, 2, 1)

    def gone(leave: int, mine: Policy, other: Policy) -> list[int]:
        stays = temperature.survivors(volumes, blocks, leave, {V: mine, 8: other})
        return np.flatnonzero(~stays).tolist()

    assert gone(0, DEFAULT, DEFAULT) == []
    assert gone(0, DEFAULT, Policy(placement="base")) == [2, 3]
    assert gone(3, DEFAULT, Policy(placement="base")) == [2, 3, 4]
    assert gone(3, Policy(placement="fast"), DEFAULT) == [2, 3, 4]
    assert gone(4, Policy(placement="fast"), DEFAULT) == [1, 2, 3, 4]


def test_what_has_not_been_idle_for_long_leaves_after_what_has() -> None:
    temperature = Temperature(heated({1: 1, 2: 1, 3: 4}))
    policies = {V: Policy(demote_idle_s=60, demote_heat=1)}
    for idle, expected in (([100, 100, 100], [1, 2]), ([10, 100, 100], [2, 1]), ([10, 10, 10], [1, 2])):
        for leave in (1, 2):
            stays = temperature.survivors(np.full(3, V), ints(1, 2, 3), leave, policies, np.array(idle, np.float64))
            assert sorted(expected[:leave]) == ints(1, 2, 3)[~stays].tolist()


def test_demote_heat_divides_the_cold_from_the_hot() -> None:
    heat = heated({1: 5, 2: 6})
    heat.sketches[Touch.READ].note(8, ints(1), ints(3))
    policies = {V: Policy(demote_heat=5, promote_touches=6), 8: Policy(demote_heat=2, promote_touches=3)}
    stays = Temperature(heat).survivors(ints(V, V, 8), ints(1, 2, 1), 1, policies)
    assert stays.tolist() == [False, True, True], "5 is cold where that is said; 3 is hot where that is said"


def test_no_blocks_need_no_decision() -> None:
    temperature = Temperature(heated({}))
    assert leaving(temperature, [], 5) == []
    assert temperature.is_hot(ints(), ints()).tolist() == []


# -- separation --------------------------------------------------------------------------------------------------------


def test_what_is_overwritten_often_is_told_from_what_is_not() -> None:
    heat = Heat(1 << 20, 1 << 18)
    rng = np.random.default_rng(2)
    for _ in range(40):
        often = rng.integers(0, 2000, 8000)
        seldom = rng.integers(2000, 10000, 2000)
        heat.note(Touch.WRITE, V, np.sort(np.concatenate((often, seldom))), np.ones(10000, np.int64))
        reads = np.sort(rng.integers(5000, 10000, 10000))
        heat.note(Touch.READ, V, reads, np.ones(10000, np.int64))
    temperature = Temperature(heat)
    for _ in range(30):
        blocks = rng.permutation(10000)[:1000]
        hot = temperature.is_hot(np.full(1000, V), blocks)
    assert float(hot[blocks < 2000].mean()) > 0.95
    assert float(hot[blocks >= 2000].mean()) < 0.05, "reads don't count here"


def test_what_is_hot_is_found_again_after_calmer_times() -> None:
    blocks = np.concatenate([np.arange(200), np.arange(5000, 5800)])
    heat = heated({})
    temperature = Temperature(heat)
    writes = heat.sketches[Touch.WRITE]

    def written(times: int, rounds: int) -> float:
        """The share of the hot ones that are taken for hot, at the end of rounds with so many writes each."""
        share = 0.0
        for _ in range(rounds):
            writes.note(V, blocks[:200], np.full(200, times))
            share = float(temperature.is_hot(np.full(1000, V), blocks)[:200].mean())
        return share

    assert written(12, 20) == 1.0
    for _ in range(8):
        list(writes.halve())
    writes.rows[0][:] = writes.rows[1][:] = 0
    for _ in range(20):
        temperature.is_hot(np.full(1000, V), blocks)  # nothing is hot now
    for _ in range(4):
        share = written(1, 6)
        list(writes.halve())
    assert share == 1.0, "colder than what was hot once, and yet hotter than the rest"


def test_what_was_hardly_written_is_cold() -> None:
    temperature = Temperature(heated({1: 1, 2: 1}, Touch.WRITE))
    assert temperature.is_hot(np.full(3, V), ints(1, 2, 3)).tolist() == [False] * 3
