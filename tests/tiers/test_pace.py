"""The pace: clients don't stand still between the cleaner's rounds, lose nothing by that, and go in their order."""

import contextlib
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from tests.simulation.machine import Disk, Machine
from tests.tiers.helpers import QUIET, block
from tiers import Pool, Volume
from tiers.layout import BLOCK_BYTES
from tiers.pace import GULP_S, MOST_DEBT_S, MOST_SPREAD_S, Pace

BATCH = 32
STEP_S = 0.001
MARGIN = 14336


def serve(round_s: float, gain: int, *, paced: bool) -> tuple[float, float]:
    """A client that writes as fast as it may, while each round gives so much room back: what the pace makes of it.

    Returns the longest time that it stood still, and the share of what was gained that it could use.
    """
    pace = Pace()
    room, used, rounds = gain, 0, 0
    now_s, last_s, longest_s = 0.0, 0.0, 0.0
    while now_s < 60:
        now_s += STEP_S
        if now_s >= (rounds + 1) * round_s:
            rounds += 1
            room += gain
            pace.round_took(round_s)
        if room >= BATCH and (not paced or room > MARGIN or not pace.spread_s or pace.may_go(now_s)):
            if paced and room < MARGIN:
                pace.took(BATCH, room, MARGIN, now_s)
            room -= BATCH
            used += BATCH
            longest_s = max(longest_s, now_s - last_s if now_s > 10 else 0.0)
            last_s = now_s
    return longest_s, used / ((rounds + 1) * gain)


@pytest.mark.parametrize("round_s", [0.15, 0.3, 0.5])
def test_between_long_rounds_writes_go_on_and_all_that_is_gained_is_used(round_s: float) -> None:
    unpaced_s, most = serve(round_s, 3072, paced=False)
    assert unpaced_s > round_s / 3
    longest_s, share = serve(round_s, 3072, paced=True)
    assert longest_s < 2 * GULP_S
    assert share > 0.9 * most


def test_where_rounds_are_short_nothing_is_paced() -> None:
    pace = Pace()
    for _ in range(100):
        pace.round_took(0.05)
    assert pace.spread_s == 0
    pace.round_took(0.3)
    assert pace.spread_s == pytest.approx(0.9)
    for _ in range(20):
        pace.round_took(0.01)
    assert pace.spread_s > 0.5, "short rounds in between made it forget the long ones"
    for _ in range(50):
        pace.round_took(0.05)
    assert pace.spread_s == 0, "one long round was never forgotten"
    pace.round_took(60)
    assert pace.spread_s == MOST_SPREAD_S


def test_no_write_holds_up_the_next_for_long_even_if_it_takes_all_the_room() -> None:
    pace = Pace()
    pace.round_took(60)
    now_s = 100.0
    pace.took(1024, 1024, MARGIN, now_s)
    assert not pace.may_go(now_s)
    assert MOST_DEBT_S / 2 < pace.turn_in_s(now_s) <= MOST_DEBT_S
    assert pace.may_go(now_s + MOST_DEBT_S)


def test_at_the_upper_end_of_the_margin_nothing_is_held_up() -> None:
    pace = Pace()
    pace.round_took(60)
    for _ in range(100):
        assert pace.may_go(10.0)
        pace.took(BATCH, MARGIN - 10, MARGIN, 10.0)


def test_a_rest_saves_up_only_a_little() -> None:
    pace = Pace()
    pace.round_took(60)
    gone = 0
    while pace.may_go(1000.0):
        pace.took(1, 100, MARGIN, 1000.0)
        gone += 1
    assert gone < 10, "time from before was saved up"


def test_nobody_overtakes_the_line_but_for_one_that_goes_with_its_first() -> None:
    pace = Pace()
    pace.round_took(0.5)
    pace.waiting = 2
    assert not pace.may_go(10.0), "it overtook"
    pace.take_turn(10.0)
    assert pace.may_go(10.0)
    pace.took(1, 1000, MARGIN, 10.0)
    assert pace.may_go(10.001), "what came together was parted"
    pace.took(31, 1000, MARGIN, 10.001)
    assert not pace.may_go(10.001), "more than one went with the first"
    pace.take_turn(10.1)
    pace.took(1, 1000, MARGIN, 10.1)
    assert not pace.may_go(10.5), "a turn that nobody took was kept for ever"


# -- in a pool ---------------------------------------------------------------------------------------------------------


def room_of(pool: Pool) -> int:
    space = pool._engine.space
    return space._room(space.reserve + space.map_reserve())


async def idle_round() -> bool:
    return False


@contextlib.asynccontextmanager
async def short_of_room(machine: Machine, share: float = 0.5) -> AsyncIterator[tuple[Pool, Volume]]:
    """A pool with so much left of the margin in which the cleaner works; it doesn't help."""
    async with machine.open() as pool:
        pool._cleaner._round = idle_round  # type: ignore[method-assign]
        volume = await pool.create_volume("v", 1 << 30)
        at = 0
        while room_of(pool) > pool._engine.space._margin() * share:
            assert volume.write_now([(at % 1024 * BLOCK_BYTES, block(at % 100))])
            at += 1
        yield pool, volume


def write_until_held_back(pool: Pool, volume: Volume) -> None:
    """A long round, and then writes until the pace refuses one."""
    pool._engine.space.pace.round_took(0.5)
    while volume.write_now([(0, block(1))]):
        pass


def machine_of() -> Machine:
    return Machine((Disk("fast", 64, 512 << 10),), settings=QUIET)


def test_where_room_is_short_and_rounds_are_long_writes_wait_in_order_and_others_are_not_overtaken() -> None:
    machine = machine_of()

    async def main() -> None:
        async with short_of_room(machine) as (pool, volume):
            space = pool._engine.space
            assert volume.write_now([(0, block(1))]), "paced although rounds are short"
            space.pace.round_took(0.5)
            while volume.write_now([(0, block(1))]):
                pass
            begun_s = trio.current_time()
            done: list[int] = []

            async def write(number: int) -> None:
                await volume.write(number * BLOCK_BYTES, block(number))
                done.append(number)

            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(write, number)
                    await trio.testing.wait_all_tasks_blocked()
                assert space.pace.waiting == 8
                assert not space.waiters, "who only keeps the pace makes nobody think that the pool is stuck"
                assert not volume.write_now([(0, block(1))]), "it overtook"
            assert done == list(range(8))
            assert 0.05 < trio.current_time() - begun_s < 2
            assert space.pace.waiting == 0

    machine.run(main)


def test_who_gives_up_waiting_for_its_turn_leaves_the_line() -> None:
    machine = machine_of()

    async def main() -> None:
        async with short_of_room(machine) as (pool, volume):
            space = pool._engine.space
            write_until_held_back(pool, volume)
            with trio.move_on_after(0.001) as scope:
                await volume.write(0, block(2))
            assert scope.cancelled_caught
            assert space.pace.waiting == 0
            await trio.sleep(1)
            assert volume.write_now([(0, block(3))])

    machine.run(main)


def test_trims_do_not_keep_the_pace_and_room_ends_it() -> None:
    machine = machine_of()

    async def main() -> None:
        async with short_of_room(machine) as (pool, volume):
            space = pool._engine.space
            write_until_held_back(pool, volume)
            assert volume.trim_now([(0, BLOCK_BYTES)])
            await volume.trim(0, 1 << 29)
            await pool.checkpoint()
            await pool.checkpoint()
            assert room_of(pool) > space._margin()
            for number in range(64):
                assert volume.write_now([(number * BLOCK_BYTES, block(1))])

    machine.run(main)


def test_the_cleaner_does_not_rest_while_writes_are_held_back() -> None:
    machine = machine_of()

    async def main() -> None:
        async with short_of_room(machine, 0.9) as (pool, volume):
            space = pool._engine.space
            space.pace.round_took(0.5)
            assert space.rest_ratio() > 0
            while volume.write_now([(0, block(1))]):
                pass
            assert space.rest_ratio() == 0
            await trio.sleep(1)
            assert space.rest_ratio() > 0, "it was never let rest again"

    machine.run(main)


def test_how_long_rounds_take_is_told_without_the_rests_in_them() -> None:
    """Else a cleaner that has time would slow clients down."""
    read_s = 0.01
    machine = machine_of()
    took: list[tuple[float, float]] = []
    reads = 0

    async def slow(offset: int, length: int) -> None:
        nonlocal reads
        reads += 1
        await trio.sleep(read_s)

    class Told(Pace):
        def round_took(self, seconds: float) -> None:
            took.append((seconds, reads * read_s))

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 1 << 30)
            pool._engine.space.pace = Told()
            machine.media[0].before_read = slow
            for number in range(12000):
                await volume.write(number * 7919 % 3000 * BLOCK_BYTES, block(number % 100))
                await trio.sleep(0.001)
            before = 0.0
            for seconds, read_until in took:
                assert seconds <= read_until - before + 0.005
                before = read_until
            assert sum(seconds for seconds, _ in took) > 10 * read_s

    machine.run(main)
