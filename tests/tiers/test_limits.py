"""Limits: the rate holds whatever the sizes, a rest is worth the burst, clients share, and a change counts at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock

from tests.tiers.helpers import block, fresh_pool, run
from tiers import Policy
from tiers.layout import BLOCK_BYTES, MIB
from tiers.limits import Limits, begin_client, operations_of
from tiers.policy import DEFAULT

KIB = 1 << 10


def virtually(body: Callable[[], Awaitable[Any]]) -> Any:
    """Run on a clock that jumps whenever everybody sleeps."""

    async def bounded() -> Any:
        with trio.fail_after(10_000):
            return await body()

    return trio.run(bounded, clock=MockClock(autojump_threshold=0))


async def load(limits: Limits, done: Counter[str], name: str, depth: int, length: int, seconds: float) -> None:
    """A client with so many requests on the way all the time, half of which try without waiting first."""
    begin_client()

    async def one(number: int) -> None:
        while True:
            operations = operations_of(length)
            if number % 2 and limits.may_go(operations, length):
                limits.spend(operations, length)
                await trio.lowlevel.checkpoint()
            else:
                await limits.take(operations, length)
            done[name] += 1

    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            for number in range(depth):
                nursery.start_soon(one, number)


async def measured(policy: Policy, *clients: tuple[str, int, int], seconds: float = 5.0) -> Counter[str]:
    """How many requests each client (name, depth, length) got through."""
    limits, done = Limits(policy), Counter[str]()
    async with trio.open_nursery() as nursery:
        for name, depth, length in clients:
            nursery.start_soon(load, limits, done, name, depth, length, seconds)
    assert limits.waiting == 0
    return done


@pytest.mark.parametrize("limit", [1, 7, 100, 3000, 50_000])
@pytest.mark.parametrize("depth", [1, 128])
def test_an_iops_limit_holds_within_a_tenth_over_five_seconds(limit: int, depth: int) -> None:
    done = virtually(partial(measured, Policy(iops_limit=limit), ("a", depth, 4096)))
    assert done["a"] == pytest.approx(5 * limit, rel=0.1, abs=1)


@pytest.mark.parametrize("length", [512, 4096, 60_000, MIB, 32 * MIB])
def test_a_bandwidth_limit_holds_whatever_the_size_of_requests(length: int) -> None:
    rate = MIB if length < MIB else 16 * MIB
    done = virtually(partial(measured, Policy(bandwidth_limit_bytes=rate), ("a", 16, length), seconds=20))
    assert done["a"] * length == pytest.approx(20 * rate, rel=0.1, abs=length)


def test_the_scarcer_of_two_limits_decides() -> None:
    both = Policy(iops_limit=100, bandwidth_limit_bytes=MIB)
    assert virtually(partial(measured, both, ("a", 8, 4096)))["a"] == pytest.approx(500, rel=0.1)
    assert virtually(partial(measured, both, ("a", 8, 64 * KIB)))["a"] == pytest.approx(5 * 16, rel=0.1)


def test_a_rest_is_worth_the_burst_and_no_more() -> None:
    async def body() -> None:
        limits = Limits(Policy(iops_limit=100, iops_burst=250))
        for rest_s in (0.0, 2.5, 1000.0):
            await trio.sleep(rest_s)
            begun = trio.current_time()
            for _ in range(250):
                await limits.take(1, 4096)
            assert trio.current_time() == begun
            await limits.take(1, 4096)
            assert trio.current_time() - begun == pytest.approx(0.01, abs=0.002)

    virtually(body)


def test_clients_share_operations_equally_however_many_they_have_waiting() -> None:
    done = virtually(partial(measured, Policy(iops_limit=1000), ("greedy", 128, 4096), ("modest", 1, 4096)))
    assert done["modest"] == pytest.approx(2500, rel=0.1)
    assert done["greedy"] == pytest.approx(2500, rel=0.1)


def test_clients_share_bytes_equally_whatever_the_size_of_their_requests() -> None:
    policy = Policy(bandwidth_limit_bytes=32 * MIB)
    done = virtually(partial(measured, policy, ("large", 4, MIB), ("small", 32, 16 * KIB), seconds=10))
    assert done["small"] * 16 * KIB == pytest.approx(160 * MIB, rel=0.1)
    assert done["large"] * MIB == pytest.approx(160 * MIB, rel=0.1)


def test_who_rested_has_no_claim_on_what_it_did_not_use() -> None:
    async def body() -> None:
        limits, done = Limits(Policy(iops_limit=100)), Counter[str]()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load, limits, done, "early", 8, 4096, 20)
            await trio.sleep(10)
            before = done["early"]
            nursery.start_soon(load, limits, done, "late", 8, 4096, 10)
        assert before == pytest.approx(1000, rel=0.1)
        assert done["late"] == pytest.approx(500, rel=0.1)
        assert done["early"] - before == pytest.approx(500, rel=0.1)

    virtually(body)


def test_other_limits_count_at_once_also_for_those_who_wait() -> None:
    async def body() -> None:
        limits = Limits(Policy(iops_limit=1))
        went: list[float] = []

        async def one() -> None:
            await limits.take(1, 4096)
            went.append(trio.current_time())

        begun = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(1 + 2 + 100 + 50):
                nursery.start_soon(one)
            await trio.sleep(2.5)
            assert len(went) == 3
            limits.change(Policy(iops_limit=100))
            await trio.sleep(1)
            assert len(went) == pytest.approx(103, abs=3)
            limits.change(DEFAULT)
            await trio.sleep(0.001)
            assert len(went) == 153
        assert trio.current_time() - begun < 3.6
        assert limits.waiting == 0

    virtually(body)


def test_a_debt_of_a_high_rate_is_not_paid_off_at_a_low_one() -> None:
    async def body() -> None:
        limits = Limits(Policy(bandwidth_limit_bytes=1 << 30))
        await limits.take(128, 1 << 30)
        limits.change(Policy(bandwidth_limit_bytes=64 * KIB))
        begun = trio.current_time()
        await limits.take(1, 4096)
        assert trio.current_time() - begun < 1

    virtually(body)


def test_whoever_is_cancelled_pays_nothing_and_holds_nobody_up() -> None:
    async def body() -> None:
        limits, done = Limits(Policy(iops_limit=10)), Counter[str]()
        await limits.take(1, 4096)

        async def give_up(after_s: float) -> None:
            begin_client()
            with trio.move_on_after(after_s):
                await limits.take(1, 1 << 30)
                await limits.take(1, 1 << 30)
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(give_up, 0.01 * number)  # the one that leads is among them
            nursery.start_soon(load, limits, done, "patient", 3, 4096, 5.2)
        assert done["patient"] == pytest.approx(50, abs=3)
        assert limits.waiting == 0

    virtually(body)


def test_nobody_overtakes_those_who_wait_and_a_batch_makes_no_debt() -> None:
    async def body() -> None:
        limits = Limits(Policy(iops_limit=100, iops_burst=100))
        assert not limits.may_go(101, 0, requests=101)
        assert limits.may_go(101, 0)
        assert limits.may_go(100, 0, requests=100)
        limits.spend(150, 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(limits.take, 1, 0)
            await trio.sleep(0.505)
            assert limits.waiting == 1
            assert not limits.may_go(1, 0)
        await trio.sleep(0.011)
        assert limits.may_go(1, 0)

    virtually(body)


@pytest.mark.parametrize(("length", "operations"), [(0, 1), (1, 1), (1 << 18, 1), ((1 << 18) + 1, 2), (32 * MIB, 128)])
def test_a_request_counts_one_for_each_256_kib_begun(length: int, operations: int) -> None:
    assert operations_of(length) == operations


# -- of a volume -------------------------------------------------------------------------------------------------------


def test_a_volume_counts_what_a_client_asked_for_and_nothing_else(tmp_path: Any) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 8 * MIB)
            pool.define_policies({"slow": Policy("slow", iops_limit=1000, iops_burst=1000), "free": Policy("free")})
            await pool.set_policy("v", "slow")
            limits = volume._limits
            assert limits is not None
            bucket = limits._operations
            assert bucket is not None
            bucket.rate = 1e-9  # nothing comes in while we count

            def spent() -> int:
                count, bucket.level = round(1000 - bucket.level), 1000.0
                return count

            into = memoryview(bytearray(2 * MIB))
            assert volume.write_now([(0, block(1)), (BLOCK_BYTES, block(2))])
            assert spent() == 2
            assert volume.write_now([(100, b"part of a block"), (5000, b"of another")])  # reads both
            assert spent() == 2
            assert volume.read_now(0, BLOCK_BYTES, into[:BLOCK_BYTES])
            assert volume.read_now(100, 5000, into[:5000])  # two blocks, through itself
            assert spent() == 2
            await volume.read(7, 5000, into[:5000])
            await volume.write(7, b"x")  # reads a block
            assert spent() == 2
            await volume.write(0, bytes(MIB + 1))
            assert spent() == 5
            await volume.trim(0, 4 * MIB)
            assert volume.trim_now([(0, MIB)])
            await volume.flush()
            await volume.extents(0, 8 * MIB, 100)
            assert spent() == 0
            await volume.write_zeroes(0, MIB, no_hole=True)
            assert spent() == 4

    run(body)


def test_a_volume_at_its_limit_would_block_and_waits_and_others_do_not(tmp_path: Any) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            pool.define_policies({"slow": Policy("slow", iops_limit=20, iops_burst=20), "free": Policy("free")})
            volume = await pool.create_volume("v", MIB, "slow")
            other = await pool.create_volume("w", MIB)
            into = memoryview(bytearray(BLOCK_BYTES))
            for number in range(20):
                assert volume.write_now([(number * BLOCK_BYTES, block(number))])
            assert not volume.write_now([(0, block(1))])
            assert not volume.read_now(0, BLOCK_BYTES, into)
            assert other.write_now([(0, block(1))])
            begun = trio.current_time()
            await volume.read(3 * BLOCK_BYTES, BLOCK_BYTES, into)
            await volume.write(0, block(99))
            assert 0.09 < trio.current_time() - begun < 1
            assert into == block(3)
            async with trio.open_nursery() as nursery:
                for _ in range(200):
                    nursery.start_soon(volume.read, 0, BLOCK_BYTES, into)
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert volume.throttled > 190
                assert pool.status().volumes[0].throttled == volume.throttled
                await pool.set_policy("v", "free")
            assert trio.current_time() - begun < 5
            assert volume.read_now(0, BLOCK_BYTES, into)
            assert volume.throttled == 0

    run(body)


def test_who_waits_for_limits_does_not_hold_up_the_end_of_the_pool(tmp_path: Any) -> None:
    async def body() -> None:
        ended = trio.Event()

        async def wait(volume: Any) -> None:
            try:
                for _ in range(10):
                    await volume.write(0, block(1))
            except OSError:
                ended.set()

        async with trio.open_nursery() as nursery:
            async with fresh_pool(tmp_path) as pool:
                pool.define_policies({"default": Policy(iops_limit=1)})
                nursery.start_soon(wait, await pool.create_volume("v", MIB))
                await trio.sleep(0.1)
                assert pool.volume("v").throttled == 1
            await ended.wait()

    run(body)
