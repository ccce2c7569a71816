"""What a leg durably promises, and what it remembers that others miss."""

import dataclasses
import errno
import json
from typing import Any, cast

import pytest
import trio

from replication.keeper import LegKeeper, LegRecord
from replication.leg import EXTENT_BYTES, Position
from replication.membership import MAX_HISTORY, Membership, Term
from tests.replication.stores import MemoryExtents, MemoryStore, first_record

TERM_2 = Term(2, "2" * 16)


def keeper_of(store: MemoryStore, me: str = "a", boot: str = "boot-1") -> LegKeeper:
    record = LegRecord.decode(store.record) if store.record else LegRecord(me)
    return LegKeeper(store, record, node=me, boot=boot)


def restarted(keeper: LegKeeper, boot: str = "boot-1") -> LegKeeper:
    cast(MemoryStore, keeper.store).crash()
    return keeper_of(cast(MemoryStore, keeper.store), keeper.record.me, boot)


def indices(store: MemoryStore, name: str) -> set[int]:
    return cast(MemoryExtents, store.trackers[name]).indices


async def started(legs: str = "abc", me: str = "a") -> tuple[LegKeeper, MemoryStore, Membership]:
    store, record = MemoryStore(), first_record(legs)
    keeper = keeper_of(store, me)
    await keeper.accept(record)
    await keeper.take_part()
    return keeper, store, record


def test_a_record_survives_its_encoding() -> None:
    own = first_record("ab")
    record = LegRecord(
        "a", TERM_2, own, frozenset({"b"}), True, "boot", True, Position(TERM_2, 7), own.next_epoch(), TERM_2
    )
    assert LegRecord.decode(record.encode()) == record
    earlier = json.loads(record.encode())
    del earlier["superseded"], earlier["elsewhere"]
    assert LegRecord.decode(json.dumps(earlier).encode()) == dataclasses.replace(
        record, superseded=None, elsewhere=None
    )
    assert LegRecord.decode(LegRecord("a").encode()) == LegRecord("a")


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 2},
        {"me": 1},
        {"promised": ["2", "x"]},
        {"promised": [1]},
        {"accepted": {}},
        {"inconsistent": 0},
        {"position": {"term": None, "sequence": 1}},
        {"candidates": [1]},
    ],
)
def test_a_record_that_makes_no_sense_is_refused_with_a_sentence(damage: dict[str, object]) -> None:
    plain = json.loads(LegRecord("a", TERM_2, first_record("ab")).encode()) | damage
    with pytest.raises(OSError, match="record") as refused:
        LegRecord.decode(json.dumps(plain).encode())
    assert refused.value.errno == errno.EPROTO


def test_a_promise_is_durable_before_it_is_given_and_fences_lower_terms() -> None:
    async def main() -> None:
        keeper, _, record = await started()
        fenced: list[Term] = []
        keeper.on_fence.append(fenced.append)
        assert keeper.allows(record.term)
        said = await keeper.prepare(TERM_2, "b")
        assert said.candidates == frozenset()  # as it was before
        assert fenced == [TERM_2] and not keeper.allows(record.term)
        again = restarted(keeper)
        assert again.record.promised == TERM_2 and again.record.candidates == {"b"}
        await again.prepare(TERM_2, "b")  # the answer was lost
        for term in (Term(2, "3" * 16), record.term):
            with pytest.raises(OSError, match="has promised term 2") as refused:
                await again.prepare(term, "c")
            assert refused.value.errno == errno.ESTALE
        with pytest.raises(OSError, match="promised term 2"):
            await again.accept(record.next_epoch())

    trio.run(main)


def test_only_later_records_are_accepted_and_the_same_again() -> None:
    async def main() -> None:
        keeper, store, record = await started()
        later = record.next_epoch(in_sync=frozenset("ab"))
        await keeper.accept(later)
        saves = store.saves
        await keeper.accept(later)
        assert store.saves == saves
        for other in (record, record.next_epoch(in_sync=frozenset("a"))):
            with pytest.raises(OSError, match="doesn't come after it") as refused:
                await keeper.accept(other)
            assert refused.value.errno == errno.ESTALE
        with pytest.raises(OSError, match="belongs to the mirror"):
            await keeper.accept(dataclasses.replace(later.next_epoch(), mirror="cd" * 16))
        await keeper.accept(later.next_term(TERM_2, "b", frozenset("ab")))
        assert not keeper.allows(record.term) and keeper.record.promised == TERM_2

    trio.run(main)


def test_a_leg_remembers_that_another_node_was_primary_and_not_that_its_own_was_anew() -> None:
    async def main() -> None:
        keeper, store, record = await started("ab")
        demoted = record.next_epoch(primary=None)
        for own in (demoted, demoted.next_term(TERM_2, "a", record.in_sync)):
            await keeper.accept(own)
        assert keeper.record.elsewhere is None
        there = own.next_term(Term(3, "3" * 16), "b", record.in_sync)
        for one in (there, there.next_epoch(), there.next_epoch(primary=None)):
            await keeper.accept(dataclasses.replace(one, epoch=one.epoch + (one.primary is None)))
        await keeper.accept(keeper.record.accepted.next_term(Term(4, "4" * 16), "a", record.in_sync))  # type: ignore[union-attr]
        assert LegRecord.decode(store.record).elsewhere == Term(3, "3" * 16)

    trio.run(main)


def test_a_leg_that_was_away_while_another_node_was_primary_remembers_that_one_too() -> None:
    async def main() -> None:
        keeper, store, record = await started("abc")
        there = record.next_term(TERM_2, "b", frozenset("bc"))
        demoted = there.next_epoch().next_epoch(primary=None)
        # The primary again, over the legs that have what b was given: the first that the leg here stores since.
        await keeper.accept(demoted.next_term(Term(3, "3" * 16), "a", frozenset("bc")))
        assert LegRecord.decode(store.record).elsewhere == TERM_2
        own = keeper.record.accepted
        assert own is not None
        for _ in range(MAX_HISTORY + 1):  # what others have done is forgotten, and nobody has come since
            own = own.next_epoch()
        await keeper.accept(own)
        assert keeper.record.elsewhere == TERM_2

    trio.run(main)


@pytest.mark.parametrize("forced", ["no", "fenced"])
def test_who_was_primary_before_the_leg_was_seen_last_is_no_news_however_much_is_forgotten(forced: Any) -> None:
    async def main() -> None:
        there = first_record("abc").next_term(TERM_2, "b", frozenset("abc"), forced)
        back = there.next_epoch(primary=None).next_term(Term(3, "3" * 16), "a", frozenset("abc"))
        own = LegKeeper(MemoryStore(), LegRecord("a", accepted=back), node="a", boot="boot")
        for _ in range(2 * MAX_HISTORY):
            back = back.next_epoch()
        await own.accept(back)
        assert own.record.elsewhere is None

    trio.run(main)


def test_a_leg_that_is_left_out_misses_what_was_written_since_the_last_common_flush_and_later() -> None:
    async def main() -> None:
        keeper, store, record = await started()
        store.trackers["recent-old"].add(0, 1)
        store.trackers["recent"].add(EXTENT_BYTES, 1)
        without = record.next_epoch(in_sync=frozenset("ab"))
        await keeper.accept(without)
        assert indices(store, "missing:c") == {0, 1} and "missing:b" not in store.trackers
        store.wrote(5 * EXTENT_BYTES, 1)
        store.trackers["recent"].clear()
        store.trackers["recent-old"].clear()
        alone = without.next_epoch(in_sync=frozenset("a"))
        await keeper.accept(alone)
        assert indices(store, "missing:c") == {0, 1, 5} and indices(store, "missing:b") == set()
        keeper = restarted(keeper)
        assert indices(store, "missing:c") == {0, 1, 5}
        back = alone.next_epoch(in_sync=frozenset("ac"))
        await keeper.accept(back)
        assert "missing:c" not in store.trackers and "missing:b" in store.trackers
        await keeper.leave(None)
        restarted(keeper)
        assert "missing:c" not in store.trackers

    trio.run(main)


def test_a_mark_that_came_back_with_a_crash_is_dropped_by_the_next_common_flush() -> None:
    async def main() -> None:
        keeper, store, record = await started("ab")
        alone = record.next_epoch(in_sync=frozenset("a"))
        await keeper.accept(alone)
        await keeper.accept(alone.next_epoch(in_sync=frozenset("ab")))
        assert "missing:b" not in store.trackers
        keeper = restarted(keeper)
        assert "missing:b" in store.trackers, "it went after the record was durable"
        keeper.settled()
        assert set(store.trackers) == {"recent", "recent-old"}
        await keeper.accept(alone.next_epoch(in_sync=frozenset("ab")).next_epoch(in_sync=frozenset("a")))
        assert "missing:b" in store.trackers
        keeper.settled()
        assert "missing:b" in store.trackers, "that leg does miss something"

    trio.run(main)


@pytest.mark.parametrize("failing", ["before", "after"])
def test_a_mark_of_a_record_that_may_be_stored_is_kept_whatever_is_flushed_meanwhile(failing: str) -> None:
    async def main() -> None:
        keeper, store, record = await started()
        without = record.next_epoch(in_sync=frozenset("ab"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.accept, without)
            await trio.lowlevel.checkpoint()
            keeper.settled()
        assert "missing:c" in store.trackers, "it was being saved"
        again = without.next_epoch(in_sync=frozenset("abc"))
        await keeper.accept(again)
        assert "missing:c" not in store.trackers
        store.failing = failing
        with pytest.raises(OSError, match="the disk has failed"):
            await keeper.accept(again.next_epoch(in_sync=frozenset("ab")))
        keeper.settled()
        assert "missing:c" in store.trackers, "the record without that leg may be stored"

    trio.run(main)


@pytest.mark.parametrize("failing", ["before", "after"])
def test_a_failing_save_loses_no_mark_and_leaves_what_was(failing: str) -> None:
    async def main() -> None:
        keeper, store, record = await started()
        without = record.next_epoch(in_sync=frozenset("ab"))
        await keeper.accept(without)
        store.wrote(0, 1)
        before = keeper.record
        store.failing = failing
        with pytest.raises(OSError, match="the disk has failed"):
            await keeper.accept(without.next_epoch())
        assert keeper.record == before and keeper.allows(record.term)
        assert indices(store, "missing:c") == {0}
        store.failing = failing
        with pytest.raises(OSError, match="the disk has failed"):
            await keeper.prepare(TERM_2, "b")
        assert keeper.allows(record.term)
        await keeper.accept(without.next_epoch(size_bytes=2 * record.size_bytes))
        assert restarted(keeper).record.accepted == without.next_epoch(size_bytes=2 * record.size_bytes)

    trio.run(main)


def test_a_leg_that_rejoins_keeps_what_it_has_differently_until_it_is_in_sync() -> None:
    async def main() -> None:
        keeper, store, record = await started("ab")
        alone = record.next_epoch(in_sync=frozenset("a"))
        await keeper.accept(alone)
        store.wrote(3 * EXTENT_BYTES, 1)  # acknowledged by itself, as primary
        other = record.next_term(TERM_2, "b", frozenset("b"), "fenced")
        with pytest.raises(OSError, match=r"split brain: node b has 2\.0 .*forced.*node a has 1\.1") as refused:
            await keeper.accept(other)
        assert refused.value.errno == errno.EUCLEAN
        await keeper.accept(other, inconsistent=True, discard=True)
        assert indices(store, "missing:b") == {3} and 3 in indices(store, "missing:a")
        store.trackers["recent"].clear()
        keeper = restarted(keeper)
        assert keeper.record.inconsistent and indices(store, "missing:a") == {3}
        await keeper.accept(other.next_epoch())  # as a voter: it says nothing about the resync
        assert keeper.record.inconsistent
        with pytest.raises(OSError, match="inconsistent"):
            await keeper.accept(other.next_term(Term(3, "3" * 16), "a", frozenset("a")))
        await keeper.accept(other.next_epoch().next_epoch(in_sync=frozenset("ab")))
        assert not keeper.record.inconsistent
        assert set(store.trackers) == {"recent", "recent-old"}

    trio.run(main)


def test_a_leg_that_was_itself_away_knows_nothing_of_what_a_third_one_misses() -> None:
    async def main() -> None:
        keeper, store, record = await started("abc", "a")
        only_c = record.next_epoch(in_sync=frozenset("bc"))
        await keeper.accept(only_c, inconsistent=True)
        without_c = only_c.next_epoch(in_sync=frozenset("b"))
        await keeper.accept(without_c.next_epoch(in_sync=frozenset("ab")))
        assert indices(store, "missing:c") == set(range(store.size_bytes // EXTENT_BYTES))
        added = without_c.next_epoch(in_sync=frozenset("ab")).next_epoch(
            legs=(*record.legs, dataclasses.replace(record.legs[0], id="d", node="d"))
        )
        await keeper.accept(added)
        assert indices(store, "missing:d") == set(range(store.size_bytes // EXTENT_BYTES))

    trio.run(main)


def test_a_leg_that_lost_its_memory_after_it_promised_begins_no_term() -> None:
    async def main() -> None:
        for boot, may in (("boot-1", True), ("boot-2", False)):
            keeper, _, record = await started()
            assert keeper.intact
            await keeper.prepare(TERM_2, "b")
            # The candidate knows it as intact, and leaves out another leg that it can't hear.
            began = record.next_term(TERM_2, "b", frozenset("ab"))
            again = restarted(keeper, boot)
            if may:
                await again.accept(began)
                continue
            with pytest.raises(OSError, match="promote again") as refused:
                await again.accept(began)
            assert refused.value.errno == errno.ESTALE and again.record.accepted == record
            term_3 = Term(3, "3" * 16)
            await again.prepare(term_3, "b")
            assert not again.intact, "which the candidate is told"
            await again.accept(record.next_term(term_3, "b", frozenset("abc")))

    trio.run(main)


def test_a_leg_that_is_out_by_a_record_that_never_counted_is_judged_like_one_in_sync_when_a_term_begins() -> None:
    async def main() -> None:
        for promised_before in (True, False):
            keeper, _, record = await started()
            await keeper.accept(record.next_epoch(in_sync=frozenset("b")))
            if promised_before:
                await keeper.prepare(TERM_2, "b")
            again = restarted(keeper, "boot-2")
            began = record.next_term(TERM_2, "b", frozenset("ab"))
            if promised_before:
                with pytest.raises(OSError, match="promote again"):
                    await again.accept(began)
                continue
            await again.prepare(TERM_2, "b")
            await again.take_part()
            await again.accept(began)
            assert not again.intact  # it has lost what it lost: nobody has made it equal to others yet
            again.settled()
            await again.accept(began)
            assert again.intact

    trio.run(main)


def test_a_leg_that_lost_its_memory_lets_no_other_one_leave_before_they_are_equal() -> None:
    async def main() -> None:
        keeper, _, record = await started("ab", "b")
        without_a = record.next_epoch(in_sync=frozenset("b"))
        again = restarted(keeper, "boot-2")
        for _ in range(2):
            # By a call, as its session is over. EBUSY: the primary isn't deposed, and tries again.
            with pytest.raises(OSError, match="no other one leaves before they are equal") as refused:
                await again.accept(without_a)
            assert refused.value.errno == errno.EBUSY and again.record.accepted == record
            await again.take_part()
        await again.accept(record.next_epoch())
        again.settled()
        await again.accept(record.next_epoch().next_epoch(in_sync=frozenset("b")))
        # A process that is killed loses nothing, and it may always be left out itself.
        keeper, _, record = await started("ab", "b")
        await restarted(keeper).accept(record.next_epoch(in_sync=frozenset("b")))
        keeper, _, record = await started("ab", "b")
        await restarted(keeper, "boot-2").accept(record.next_epoch(in_sync=frozenset("a")))

    trio.run(main)


def test_a_leg_whose_machine_went_down_in_its_resync_is_not_in_sync_by_the_record_of_its_end() -> None:
    async def main() -> None:
        for boot, may in (("boot-1", True), ("boot-2", False)):
            keeper, _, record = await started("ab", "b")
            without = record.next_epoch(in_sync=frozenset("a"))
            await keeper.accept(without, inconsistent=True)
            again, ends = restarted(keeper, boot), without.next_epoch(in_sync=frozenset("ab"))
            if may:
                await again.accept(ends)
            else:
                with pytest.raises(OSError, match="may have lost what its resync wrote"):
                    await again.accept(ends)

    trio.run(main)


def test_a_leg_is_intact_after_a_kill_and_a_clean_close_and_not_after_another_boot() -> None:
    async def main() -> None:
        keeper, store, _ = await started("ab")
        assert keeper.intact and restarted(keeper).intact
        rebooted = restarted(keeper, "boot-2")
        assert not rebooted.intact
        await rebooted.take_part()
        assert not rebooted.intact and not restarted(rebooted, "boot-2").intact
        rebooted.settled()
        assert rebooted.intact and not restarted(rebooted, "boot-2").intact
        assert rebooted.record.accepted is not None
        await rebooted.accept(rebooted.record.accepted)  # as a primary does it once it has reconciled
        assert restarted(rebooted, "boot-2").intact
        await rebooted.leave(Position(TERM_2, 9))
        closed = restarted(rebooted, "boot-3")
        assert closed.intact and closed.record.position == Position(TERM_2, 9)
        await closed.take_part()
        store.failing = "after"
        with pytest.raises(OSError, match="the disk"):
            await closed.leave(None)
        await closed.take_part()  # the failed one may have declared it clean
        assert not restarted(closed, "boot-4").intact

    trio.run(main)
