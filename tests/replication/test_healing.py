"""Healing: a bad leg gets what another one has, and never anything older than what clients have written."""

from __future__ import annotations

import contextlib
import errno
import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import trio

from replication.damage import (
    BATCH_RANGES,
    HOPELESS_RETRY_S,
    RANGE_BYTES,
    Damage,
    Done,
    Ranges,
    heal_told,
    judge_done,
    judge_ranges,
)
from replication.healing import FEW_AGAIN_S, WRITTEN_S, Healing
from replication.leg import BLOCK_BYTES, EXTENT_BYTES, LegState
from replication.verify import VerifyReport, verify
from tests.replication.fakes import MemoryExtents, run_seeded
from tests.replication.rig import SIZE, Rig, run
from tests.simulation.mutants import _instead

BLOCKS = 32


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def block(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK_BYTES // 8)


async def read(rig: Rig, offset: int, length: int) -> bytes:
    data = bytearray(length)
    await rig.mirror.read(offset, length, memoryview(data))
    return bytes(data)


async def filled(rig: Rig) -> bytes:
    content = random.Random(3).randbytes(4 * EXTENT_BYTES)
    await rig.mirror.write(0, content)
    return content


# -- no newer write is undone ------------------------------------------------------------------------------------------


def life(seed: int) -> None:
    """Clients write numbers while blocks go bad on either leg and are healed all the time."""

    async def body() -> None:
        rng = random.Random(seed)
        rig = Rig(2)
        rig.nodes["b"].link.delay_s = 0.002
        for node in "ab":
            rig.store(node).rng, rig.store(node).slow_s = rng, 0.004
        acknowledged = [0] * BLOCKS
        started = [0] * BLOCKS
        async with rig.running() as mirror:
            for index in range(BLOCKS):
                await mirror.write(index * BLOCK_BYTES, block(0))
            over = trio.Event()

            async def write(mine: range) -> None:
                for number in range(1, 60):
                    index = rng.choice(mine)
                    started[index] = number
                    await mirror.write(index * BLOCK_BYTES, block(number))
                    acknowledged[index] = number
                over.set()

            async def rot() -> None:
                while not over.is_set():
                    node, at = rng.choice("ab"), rng.randrange(BLOCKS) * BLOCK_BYTES
                    if not any(at in rig.store(one).bad | rig.store(one).lost for one in "ab"):
                        rng.choice((rig.store(node).bad, rig.store(node).lost)).add(at)
                    await trio.sleep(rng.random() * 0.003)

            async def heal() -> None:
                while not over.is_set():
                    at = rng.randrange(BLOCKS) * BLOCK_BYTES
                    await mirror.heal(rng.choice(("lega", "legb")), at, rng.choice((1, 4)) * BLOCK_BYTES)
                    await trio.sleep(rng.random() * 0.002)

            async def look() -> None:
                while not over.is_set():
                    index = rng.randrange(BLOCKS)
                    least = acknowledged[index]
                    try:
                        data = await read(rig, index * BLOCK_BYTES, BLOCK_BYTES)
                    except OSError:
                        continue  # one leg was healed, and the other one went bad, between two looks
                    number = int.from_bytes(data[:8], "little")
                    assert least <= number <= started[index], f"block {index}: read {number} after {least}"

            async with trio.open_nursery() as nursery:
                for task in (rot, heal, heal, look):
                    nursery.start_soon(task)
                for mine in (range(0, BLOCKS, 2), range(1, BLOCKS, 2)):
                    nursery.start_soon(write, mine)
            for leg in ("lega", "legb"):
                await mirror.heal(leg, 0, BLOCKS * BLOCK_BYTES)
            assert not rig.store("a").bad | rig.store("b").bad | rig.store("a").lost | rig.store("b").lost
            for node in "ab":
                for index, number in enumerate(acknowledged):
                    at = index * BLOCK_BYTES
                    found = int.from_bytes(rig.store(node).image[at : at + 8], "little")
                    assert found == number, f"block {index} on {node}: {found}, not {number}"
            assert mirror.healing.healed_blocks > 5
            assert all(m.state is LegState.UP_TO_DATE for m in mirror.members.values())

    run(body)


def test_a_heal_never_undoes_a_newer_write() -> None:
    for seed in range(6):
        life(seed)


def test_a_heal_waits_for_what_its_source_has_yet_to_apply() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await mirror.write(0, block(1))
            rig.store("a").held = held = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mirror.write, 0, block(2))
                await rig.until(lambda: rig.store("b").image[0] == 2)
                rig.store("b").bad.add(0)
                nursery.start_soon(mirror.heal, "legb", 0, BLOCK_BYTES)
                await trio.sleep(0.3)
                rig.store("a").held = None
                held.set()
            for node in "ab":
                assert rig.store(node).image[0] == 2 and not rig.store(node).bad

    run(body)


def test_a_heal_without_its_lock_is_caught() -> None:
    without = _instead(Healing, "_heal", "async with self._site.locks.holding(first, last - first):", "if True:")
    with without(), pytest.raises((AssertionError, BaseExceptionGroup)):
        for seed in range(60):
            life(seed)


def test_a_heal_that_does_not_wait_for_batches_in_flight_is_caught() -> None:
    without = _instead(Healing, "_heal", "await self._site.inflight.settle_for_client(first, last - first)", "pass")
    with without(), pytest.raises((AssertionError, BaseExceptionGroup)):
        test_a_heal_waits_for_what_its_source_has_yet_to_apply()


# -- what is healed ----------------------------------------------------------------------------------------------------


def test_what_each_of_two_legs_lacks_is_read_from_the_other_and_both_are_whole_then() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            content = await filled(rig)
            rig.store("a").bad = {BLOCK_BYTES, 5 * BLOCK_BYTES}
            rig.store("b").bad = {2 * BLOCK_BYTES, 20 * BLOCK_BYTES}
            assert await read(rig, 100, len(content) - 200) == content[100:-100]
            await rig.until(lambda: not rig.store("a").bad)
            assert await mirror.heal("legb", 0, len(content)) + mirror.members["legb"].counters.healed_blocks >= 2
            assert not rig.store("b").bad and rig.store("a").image == rig.store("b").image
            assert not mirror.healing.unmendable

    run(body)


def test_a_lost_range_is_written_anew_in_few_pieces() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            content = await filled(rig)
            rig.store("b").lost = set(range(3 * BLOCK_BYTES, 40 * BLOCK_BYTES, BLOCK_BYTES))
            sequence = mirror.sequence
            outcome = await mirror.healing.mend("legb", 0, len(content))
            assert (outcome.healed_blocks, outcome.left) == (37, ())
            assert mirror.sequence - sequence == 3, "one for each extent"
            assert bytes(rig.store("b").image[: len(content)]) == content

    run(body)


def test_what_no_leg_has_is_left_and_remembered_until_it_is_written() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await filled(rig)
            for node in "ab":
                rig.store(node).bad = {0, 7 * BLOCK_BYTES}
            rig.store("b").bad.add(BLOCK_BYTES)
            outcome = await mirror.healing.mend("legb", 0, EXTENT_BYTES)
            assert outcome.healed_blocks == 1
            assert outcome.left == ((0, BLOCK_BYTES), (7 * BLOCK_BYTES, BLOCK_BYTES))
            assert sorted(mirror.healing.unmendable) == [0, 7 * BLOCK_BYTES]
            with pytest.raises(OSError, match="no leg can read"):
                await read(rig, 0, EXTENT_BYTES)
            await mirror.write(0, block(1))
            await mirror.healing.mend("legb", 0, EXTENT_BYTES)
            assert sorted(mirror.healing.unmendable) == [7 * BLOCK_BYTES]

    run(body)


def test_that_a_block_was_written_anew_is_known_a_second_later_and_that_it_can_be_read_or_was_cut_off_soon() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await filled(rig)
            for node in "ab":
                rig.store(node).lost.update((0, 7 * BLOCK_BYTES, 2 * EXTENT_BYTES))
            await mirror.healing.mend("legb", 0, 3 * EXTENT_BYTES)
            assert len(mirror.healing.unmendable) == 3
            await trio.sleep(FEW_AGAIN_S / 4)
            await mirror.write(0, block(1))
            await trio.sleep(WRITTEN_S + 0.2)
            assert sorted(mirror.healing.unmendable) == [7 * BLOCK_BYTES, 2 * EXTENT_BYTES]
            rig.store("b").lost.discard(7 * BLOCK_BYTES)
            await mirror.resize(EXTENT_BYTES)
            await trio.sleep(FEW_AGAIN_S)
            assert not mirror.healing.unmendable and not rig.store("a").lost & {7 * BLOCK_BYTES}

    run(body)


def test_a_leg_that_fails_when_it_is_asked_again_does_not_make_a_block_readable() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await filled(rig)
            for node in "ab":
                rig.store(node).lost.add(0)
            await mirror.healing.mend("legb", 0, BLOCK_BYTES)
            rig.store("b").held = trio.Event()
            rig.nodes["b"].link.delay_s = 5.0
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mirror.heal, "legb", 0, BLOCK_BYTES)
                await trio.sleep(0.1)
                rig.nodes["b"].link.cut(OSError(errno.ECONNRESET, "cut"))
                rig.store("b").held = None
            assert list(mirror.healing.unmendable) == [0]

    run(body)


def test_a_leg_that_is_not_in_sync_is_healed_later_not_now() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await filled(rig)
            rig.nodes["b"].link.cut(OSError(errno.ECONNRESET, "cut"))
            await mirror.write(0, block(1))
            await rig.until(lambda: rig.state("b") is not LegState.UP_TO_DATE)
            for leg in ("legb", "nobody"):
                with pytest.raises(OSError) as refused:
                    await heal_told(mirror.healing, leg, [(0, BLOCK_BYTES)])
                assert refused.value.errno == errno.EAGAIN

    run(body)


# -- what a leg's node tells -------------------------------------------------------------------------------------------


class Primary:
    """Answers what it is set to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[int, int]]] = []
        self.error: OSError | None = None
        self.at_most = 1000
        self.left = 0
        self.before: Any = None
        self.healed: list[tuple[int, int, int]] = []

    async def ask(self, ranges: Ranges) -> list[Done]:
        self.asked.append(list(ranges))
        await trio.sleep(0.01)
        if self.before is not None:
            self.before()
            self.before = None
        if self.error is not None:
            raise self.error
        return [(offset, length, 1, self.left) for offset, length in ranges[: self.at_most]]

    async def note(self, offset: int, length: int, blocks: int) -> None:
        self.healed.append((offset, length, blocks))


def damage_of(primary: Primary) -> Damage:
    return Damage(MemoryExtents, primary.ask, primary.note)


def with_damage(body: Any) -> None:
    async def main() -> None:
        primary = Primary()
        damage = damage_of(primary)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(damage.run)
            await body(primary, damage)
            nursery.cancel_scope.cancel()

    run_seeded(1, main)


def test_damage_is_told_in_bounded_batches_until_all_is_healed() -> None:
    async def body(primary: Primary, damage: Damage) -> None:
        primary.at_most = 3
        for index in range(BATCH_RANGES + 5):
            damage.note(index * 2 * EXTENT_BYTES, 1)
        damage.note(SIZE * 100, 3 * RANGE_BYTES)
        while damage.extents:
            await trio.sleep(1)
        assert all(len(batch) <= BATCH_RANGES and max(size for _, size in batch) <= RANGE_BYTES
                   for batch in primary.asked)  # fmt: skip
        assert sum(length for _, length, _ in primary.healed) == (BATCH_RANGES + 5) * EXTENT_BYTES + 3 * RANGE_BYTES

    with_damage(body)


def test_damage_outlives_a_primary_that_is_away_and_is_told_again() -> None:
    async def body(primary: Primary, damage: Damage) -> None:
        primary.error = OSError(errno.ENOTCONN, "node a can't be reached")
        damage.note(0, BLOCK_BYTES)
        await trio.sleep(1000)
        assert 5 < len(primary.asked) < 60 and damage.extents == 1 and damage.problem is primary.error
        primary.error = None
        await trio.sleep(60)
        assert damage.extents == 0 and damage.problem is None and len(primary.healed) == 1

    with_damage(body)


def test_what_is_found_while_a_batch_is_healed_is_told_anew() -> None:
    async def body(primary: Primary, damage: Damage) -> None:
        primary.before = lambda: damage.note(0, BLOCK_BYTES)
        damage.note(0, BLOCK_BYTES)
        await trio.sleep(10)
        assert len(primary.asked) == 2 and damage.extents == 0

    with_damage(body)


def test_another_primary_is_told_at_once_of_what_the_one_before_could_not_heal() -> None:
    async def body(primary: Primary, damage: Damage) -> None:
        primary.left = 1
        damage.note(0, BLOCK_BYTES)
        await trio.sleep(60)
        damage.again()
        await trio.sleep(1)
        assert len(primary.asked) == 2 and (damage.extents, damage.hopeless) == (0, 1)
        # Nor does it wait for a pause that grew while nobody was primary.
        primary.error = OSError(errno.EAGAIN, "there is no primary")
        damage.again()
        await trio.sleep(100)
        primary.error = None
        asked = len(primary.asked)
        damage.again()
        await trio.sleep(0.1)
        assert len(primary.asked) == asked + 1

    with_damage(body)


def test_what_no_leg_has_is_tried_again_an_hour_later_and_not_before() -> None:
    async def body(primary: Primary, damage: Damage) -> None:
        primary.left = 1
        damage.note(0, BLOCK_BYTES)
        await trio.sleep(HOPELESS_RETRY_S / 2)
        assert len(primary.asked) == 1 and (damage.extents, damage.hopeless) == (0, 1) and not primary.healed
        primary.left = 0
        await trio.sleep(HOPELESS_RETRY_S)
        assert len(primary.asked) == 2 and damage.hopeless == 0 and len(primary.healed) == 1

    with_damage(body)


@pytest.mark.parametrize(
    "body", [None, 5, "x", [[0]], [[0, 0]], [[-1, 5]], [[0, RANGE_BYTES + 1]], [[True, 1]], [["0", 1]],
             [[0, 1]] * (BATCH_RANGES + 1)],
)  # fmt: skip
def test_ranges_that_are_none_are_refused(body: Any) -> None:
    with pytest.raises(OSError) as refused:
        judge_ranges(body, SIZE)
    assert refused.value.errno == errno.EPROTO
    assert judge_ranges([[SIZE - 4096, RANGE_BYTES]], SIZE) == [(SIZE - 4096, 4096)]


@pytest.mark.parametrize("bad_on", ["b", "ab"])
def test_what_is_healed_while_the_mirror_is_shrunk_is_neither_a_damaged_map_nor_lost_everywhere(bad_on: str) -> None:
    async def body(after_s: float) -> bool:
        rig = Rig(2)
        async with rig.running() as mirror:
            await filled(rig)
            rig.nodes["b"].link.delay_s = 0.05
            for node in bad_on:
                rig.store(node).bad.update(range(EXTENT_BYTES, 4 * EXTENT_BYTES, BLOCK_BYTES))
            outcomes = []

            async def mend() -> None:
                outcomes.append(await mirror.healing.mend("legb", EXTENT_BYTES, 3 * EXTENT_BYTES))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(mend)
                await trio.sleep(after_s)
                is_early = not outcomes
                await mirror.resize(EXTENT_BYTES)
            assert not mirror.status().map_damaged
            behind = [one for one in mirror.healing.unmendable if one >= EXTENT_BYTES]
            assert not behind or bad_on == "ab", behind
            for one in behind:
                assert one < 2 * EXTENT_BYTES, "it was looked at before"
            assert rig.state("b") is LegState.UP_TO_DATE
            return is_early

    for tenth in range(1, 12, 2):
        assert run(lambda after_s=tenth / 10: body(after_s)) or tenth > 1  # type: ignore[misc]


@pytest.mark.parametrize("what", ["heal", "verify"])
def test_who_heals_or_verifies_below_quorum_keeps_no_client_from_the_error_that_it_should_get(what: str) -> None:
    async def body() -> None:
        rig = Rig(3)
        rig.record = rig.cluster.truth = replace(rig.record, options=replace(rig.record.options, below_quorum="fail"))
        async with rig.running() as mirror:
            await filled(rig)
            rig.store("b").lost = {BLOCK_BYTES}
            rig.cluster.quorum = False
            rig.nodes["c"].link.cut()
            with pytest.raises(OSError, match="below quorum"):
                await mirror.write(0, block(2))
            async with trio.open_nursery() as nursery:

                async def look() -> None:
                    with contextlib.suppress(OSError):
                        await (mirror.heal("legb", 0, EXTENT_BYTES) if what == "heal" else verify(mirror))

                nursery.start_soon(look)
                await trio.sleep(0.5)
                with trio.fail_after(5), pytest.raises(OSError, match="below quorum"):
                    await mirror.write(100, b"a part of a block")
                nursery.cancel_scope.cancel()
            with pytest.raises(OSError, match="below quorum") as refused:
                await mirror.healing.mend("legb", 0, EXTENT_BYTES)
            assert refused.value.errno == errno.EAGAIN
            rig.cluster.quorum = True
            await rig.until(lambda: not mirror.shut)
            assert await mirror.heal("legb", 0, EXTENT_BYTES) == 1

    run(body)


def test_what_was_read_before_the_mirror_was_shrunk_heals_nothing_after_it_has_grown_again() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await filled(rig)
            rig.store("b").bad = {EXTENT_BYTES}
            source = mirror.members["lega"].leg
            assert source is not None
            reads = source.read

            async def read(offset: int, length: int, into: memoryview) -> None:
                await reads(offset, length, into)
                if mirror.size_bytes == SIZE:
                    source.read = reads  # type: ignore[method-assign]
                    await mirror.resize(EXTENT_BYTES)
                    await mirror.resize(SIZE)

            source.read = read  # type: ignore[method-assign]
            with trio.fail_after(60):
                await mirror.heal("legb", EXTENT_BYTES, BLOCK_BYTES)
            for node in "ab":
                assert rig.store(node).image[EXTENT_BYTES:] == bytes(SIZE - EXTENT_BYTES), node

    run(body)


@pytest.mark.parametrize("full", [False, True])
def test_a_verify_while_the_mirror_is_shrunk_calls_nothing_damaged_that_is_not(full: bool) -> None:
    async def body(after_s: float) -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await filled(rig)
            rig.nodes["b"].link.delay_s = 0.05
            bad = set(range(0, 4 * EXTENT_BYTES, BLOCK_BYTES))
            rig.store("b").lost.update(bad)
            report = VerifyReport()

            async def look() -> None:
                with contextlib.suppress(OSError):
                    await verify(mirror, full=full, report=report)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(look)
                await trio.sleep(after_s)
                await mirror.resize(EXTENT_BYTES)
            assert not mirror.status().map_damaged and not report.map_damaged
            assert not report.differing_bytes and report.unreadable_bytes <= len(bad) * BLOCK_BYTES
            assert "lega" not in report.unreadable

    for after_s in (0.05, 0.15, 0.25, 0.35, 1.1, 1.9):
        run(lambda after_s=after_s: body(after_s))  # type: ignore[misc]


def test_damage_behind_the_end_of_a_mirror_that_was_shrunk_holds_up_no_other() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            content = await filled(rig)
            rig.store("b").bad.add(0)
            asked = [[SIZE + EXTENT_BYTES + 4096, 4096], [SIZE, RANGE_BYTES], [0, EXTENT_BYTES]]
            done = await heal_told(mirror.healing, "legb", judge_ranges(asked, SIZE))
            answer = judge_done([list(one) for one in done], [(offset, length) for offset, length in asked])
            assert [(offset, healed, left) for offset, _, healed, left in answer] == [
                (SIZE + EXTENT_BYTES + 4096, 0, 0), (SIZE, 0, 0), (0, 1, 0),
            ]  # fmt: skip
            assert rig.store("b").image[:BLOCK_BYTES] == content[:BLOCK_BYTES] and not rig.store("b").bad

    run(body)


@pytest.mark.parametrize("body", [None, {}, [[0, 1, 1]], [[0, 1, -1, 0]], [[8192, 1, 1, 0]], ["x"]])
def test_answers_that_are_none_are_refused(body: Any) -> None:
    with pytest.raises(OSError) as refused:
        judge_done(body, [(0, 4096)])
    assert refused.value.errno == errno.EPROTO
    assert judge_done([[0, 10, 1, 2]], [(0, 4096)]) == [(0, 4096, 1, 2)]


# -- a damaged map -----------------------------------------------------------------------------------------------------


def test_nothing_is_written_where_a_leg_cannot_read_its_map_and_that_is_remembered_not_counted_as_healed() -> None:
    """The store's next checkpoint would fail over it, and take the legs of all mirrors in its pool with it."""

    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            content = await filled(rig)
            rig.store("b").no_map = {1, 2}
            rig.store("b").bad = {0, 3 * EXTENT_BYTES}
            sequence = mirror.sequence
            outcome = await mirror.healing.mend("legb", 0, len(content))
            assert outcome.healed_blocks == 2 and mirror.sequence == sequence + 2, "the bad blocks beside it"
            assert outcome.left == ((EXTENT_BYTES, EXTENT_BYTES), (2 * EXTENT_BYTES, EXTENT_BYTES))
            assert list(mirror.healing.map_damage["legb"]) == [EXTENT_BYTES, 2 * EXTENT_BYTES]
            assert await mirror.heal("legb", EXTENT_BYTES, BLOCK_BYTES) == 0 and mirror.sequence == sequence + 2
            assert not mirror.healing.unmendable
            rig.store("b").no_map = set()
            await mirror.healing.mend("legb", 0, len(content))
            assert not mirror.healing.map_damage["legb"]

    run(body)


def test_a_read_that_meets_a_damaged_map_here_is_answered_and_writes_nothing_here() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            content = await filled(rig)
            rig.store("a").no_map = {1}
            sequence = mirror.sequence
            assert await read(rig, EXTENT_BYTES, EXTENT_BYTES) == content[EXTENT_BYTES : 2 * EXTENT_BYTES]
            await rig.until(lambda: list(mirror.healing.map_damage.get("lega", {})) == [EXTENT_BYTES])
            assert mirror.sequence == sequence

    run(body)


def test_damage_of_a_map_is_forgotten_when_its_leg_is_opened_anew_and_told_again_by_who_meets_some() -> None:
    """Its way out is another one then than to remove the leg: its pool may have given up what was damaged."""

    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await filled(rig)
            for _ in range(2):
                rig.store("b").no_map = {1}
                await mirror.heal("legb", EXTENT_BYTES, BLOCK_BYTES)
                assert mirror.status().map_damaged == {"legb"}
                rig.nodes["b"].link.cut()
                rig.store("b").no_map = set()
                await rig.until(lambda: rig.state("b") is LegState.STALE)
                assert mirror.status().map_damaged == {"legb"}, "nothing is mended by being away"
                rig.nodes["b"].link.mend()
                await rig.whole()
                assert not mirror.status().map_damaged

    run(body)


def test_damage_of_a_map_is_forgotten_when_everything_begins_anew() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await filled(rig)
            rig.store("b").no_map = {1}
            await mirror.heal("legb", EXTENT_BYTES, BLOCK_BYTES)
            mirror.let_go()
            rig.store("b").no_map = set()
            await rig.until(lambda: not mirror.lost)
            await rig.whole()
            assert not mirror.status().map_damaged

    run(body)


@pytest.mark.parametrize("full", [False, True])
def test_verify_goes_on_at_a_damaged_map_reports_its_range_and_repairs_only_elsewhere(full: bool) -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            content = await filled(rig)
            rig.store("b").no_map = {1}
            rig.store("b").image[:BLOCK_BYTES] = bytes(BLOCK_BYTES)
            rig.store("b").image[2 * EXTENT_BYTES : 2 * EXTENT_BYTES + BLOCK_BYTES] = bytes(BLOCK_BYTES)
            sequence = mirror.sequence
            report = await verify(mirror, full=full, repair=True)
            assert report.finished and report.unreadable == {"legb": [(EXTENT_BYTES, EXTENT_BYTES)]}
            assert report.map_damaged == {"legb": [(EXTENT_BYTES, EXTENT_BYTES)]}
            assert (report.differing_bytes, report.repaired_bytes) == (2 * BLOCK_BYTES, 2 * BLOCK_BYTES)
            assert (report.healed_bytes, report.left_bytes) == (0, EXTENT_BYTES)
            assert mirror.sequence == sequence + 2
            rig.store("b").no_map = set()
            assert bytes(rig.store("b").image[: len(content)]) == content

    run(body)
