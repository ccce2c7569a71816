"""Placement is a pure function: counters in, moves out."""

from hypothesis import given
from hypothesis import strategies as st

from tiers.placement import MOST_REST, Move, TierUse, benefit, decide, rest_ratio

NONE = TierUse(0, 0, 0)
ROOMY = TierUse(10_000, 5_000, 3_000)


@st.composite
def uses(draw: st.DrawFn) -> TierUse:
    total = draw(st.integers(0, 10_000))
    free = draw(st.integers(0, total))
    return TierUse(total, free, draw(st.integers(0, total - free)))


def low(live: int) -> TierUse:
    """A tier with 5 % free."""
    return TierUse(10_000, 500, live)


def test_nothing_is_moved_while_there_is_room() -> None:
    assert decide(ROOMY, ROOMY, total_low=False, keep_slots=100) is None
    assert decide(ROOMY, NONE, total_low=False, keep_slots=100) is None
    assert decide(NONE, ROOMY, total_low=False, keep_slots=100) is None


def test_a_fast_tier_full_of_dead_blocks_is_compacted_in_place() -> None:
    assert decide(low(3_000), ROOMY, total_low=False, keep_slots=100) == Move("fast", "fast")


def test_a_fast_tier_full_of_live_blocks_is_demoted_to_base() -> None:
    assert decide(low(8_000), ROOMY, total_low=False, keep_slots=100) == Move("fast", "base")


def test_a_base_tier_without_a_free_place_is_compacted_before_anything_is_demoted_to_it() -> None:
    full_of_dead = TierUse(10_000, 100, 3_000)
    assert decide(low(8_000), full_of_dead, total_low=False, keep_slots=100) == Move("base", "base")


def test_demotion_stops_at_a_base_tier_that_is_more_crowded_than_the_fast_one() -> None:
    crowded = TierUse(10_000, 900, 9_000)
    assert decide(low(8_000), crowded, total_low=False, keep_slots=100) == Move("fast", "fast")
    assert decide(low(9_400), crowded, total_low=False, keep_slots=100) == Move("fast", "base")


def test_a_base_tier_that_runs_short_is_compacted_within_itself_and_never_to_fast() -> None:
    short = TierUse(10_000, 150, 6_000)
    assert decide(ROOMY, short, total_low=False, keep_slots=50) == Move("base", "base")
    assert decide(low(8_000), short, total_low=False, keep_slots=50) == Move("fast", "base"), "clients wait for fast"


def test_cleaning_that_has_begun_goes_on_to_the_upper_mark() -> None:
    between = TierUse(10_000, 800, 8_000)
    assert decide(between, ROOMY, total_low=False, keep_slots=100) is None
    assert decide(between, ROOMY, total_low=False, keep_slots=100, active=True) == Move("fast", "base")
    above = TierUse(10_000, 950, 8_000)
    assert decide(above, ROOMY, total_low=False, keep_slots=100, active=True) is None


def test_a_pool_that_is_low_is_compacted_wherever_its_segments_are_emptiest() -> None:
    assert decide(ROOMY, ROOMY, total_low=True, keep_slots=100) == Move(None, "base")
    assert decide(ROOMY, TierUse(10_000, 50, 9_000), total_low=True, keep_slots=100) == Move(None, "fast")


def test_a_pool_of_one_tier_moves_within_it() -> None:
    assert decide(low(9_000), NONE, total_low=True, keep_slots=100) == Move("fast", "fast")
    assert decide(NONE, low(9_000), total_low=True, keep_slots=100) == Move(None, "base")


@given(uses(), uses(), st.booleans(), st.integers(0, 1000))
def test_a_move_only_names_tiers_that_exist_and_a_low_pool_always_gets_one(
    fast: TierUse, base: TierUse, total_low: bool, keep_slots: int
) -> None:
    move = decide(fast, base, total_low=total_low, keep_slots=keep_slots)
    tiers = {"fast": fast.total, "base": base.total}
    if move is None:
        assert not total_low
    elif fast.total or base.total:
        assert tiers[move.destination]
        assert move.source is None or tiers[move.source]
    if move == Move("fast", "base"):
        assert base.free > keep_slots


@given(uses(), uses(), st.booleans(), st.integers(0, 1000), st.booleans())
def test_what_lies_on_base_is_moved_to_fast_only_where_all_of_the_pool_is_low(
    fast: TierUse, base: TierUse, total_low: bool, keep_slots: int, active: bool
) -> None:
    move = decide(fast, base, total_low=total_low, keep_slots=keep_slots, active=active)
    assert move is None or move.source != "base" or move.destination == "base"
    if move == Move(None, "fast"):
        assert total_low


def test_the_victim_that_gives_most_for_its_cost_and_age_is_the_best() -> None:
    assert benefit(100, 256, 10, demotes=False) > benefit(200, 256, 10, demotes=False), "the emptier of two"
    assert benefit(100, 256, 20, demotes=False) > benefit(100, 256, 10, demotes=False), "the older of two"
    assert benefit(200, 256, 500, demotes=False) > benefit(100, 256, 10, demotes=False), "old enough, though fuller"
    assert benefit(256, 256, 500, demotes=False) == 0, "compaction of what is full gains nothing"
    assert benefit(256, 256, 500, demotes=True) > 0, "demotion does"


@given(st.integers(0, 10_000), st.integers(0, 5_000), st.integers(1, 5_000))
def test_the_less_space_is_left_the_less_the_cleaner_rests(free: int, floor: int, margin: int) -> None:
    ratio = rest_ratio(free, floor + margin, floor)
    assert 0 <= ratio <= MOST_REST
    assert rest_ratio(free + 1, floor + margin, floor) >= ratio
    assert rest_ratio(floor, floor + margin, floor) == 0
    assert rest_ratio(floor + margin, floor + margin, floor) == MOST_REST


def test_the_live_share_of_a_tier_without_devices_is_zero() -> None:
    assert NONE.live_share == 0
    assert TierUse(100, 0, 40).live_share == 0.4
