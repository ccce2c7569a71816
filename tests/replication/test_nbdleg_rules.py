"""A leg on an NBD server is no proof in any rule: each place where legs in sync are counted."""

from __future__ import annotations

import dataclasses
import errno

import pytest
import trio

from replication.explain import Facts, explain
from replication.leg import LegState
from replication.membership import LegInfo, Membership, Term, decode, encode
from replication.nbdleg import is_fenced, is_outside, tells_all, unfenced
from replication.promotion import Forced, Promote, Refused, decide
from replication.reconcile import choose_source
from replication.voters import counts, in_sync_nodes, judge_successor
from tests.replication.stores import SIZE_BYTES, first_record
from tests.replication.test_keeper import indices, keeper_of, restarted, started
from tests.replication.test_promotion import heard, said, silent

TERM_2, TERM_3 = Term(2, "2" * 16), Term(3, "3" * 16)
DISK = LegInfo("n", "a", "nbd://host/disk", "nbd")
EVERYTHING = set(range(SIZE_BYTES >> 16))


def with_disk(record: Membership, *, in_sync: bool = True) -> Membership:
    return record.next_epoch(legs=(*record.legs, DISK), in_sync=record.in_sync | ({"n"} if in_sync else set()))


AN, ABN, ABTN = with_disk(first_record("a")), with_disk(first_record("ab")), with_disk(first_record("ab", diskless="t"))


def test_it_is_no_node_that_must_store_a_record_or_be_heard() -> None:
    assert in_sync_nodes(AN) == {"a"} and in_sync_nodes(ABN) == {"a", "b"}
    assert counts(AN.next_epoch(), AN, frozenset("a"))
    assert not counts(ABN.next_epoch(), ABN, frozenset("a"))


def test_a_record_that_keeps_only_the_server_in_sync_is_refused() -> None:
    with pytest.raises(OSError, match="at least one Terrace leg") as refused:
        judge_successor(AN.next_epoch(in_sync=frozenset("n")), AN)
    assert refused.value.errno == errno.EINVAL
    # The server is no link between two records either: who knows only the older one would find nobody of the newer.
    before = ABN.next_epoch(in_sync=frozenset("an"))
    with pytest.raises(OSError, match="must keep at least one leg"):
        judge_successor(before.next_epoch(in_sync=frozenset("bn")), before)


def test_each_new_primary_begins_without_it() -> None:
    for record, me in ((AN, "a"), (ABN, "a"), (ABN, "b")):
        states = heard(*(said(node, record, candidates=frozenset()) for node in sorted(in_sync_nodes(record))))
        decision = decide(me, TERM_2, states, {})
        assert isinstance(decision, Promote)
        assert decision.membership.in_sync == in_sync_nodes(record) and "n" not in decision.membership.in_sync
        assert all(source.kind == "terrace" for source in decision.sources)
        forced = decide("b", TERM_2, heard(said("b", ABN)), silent("a"), force=True)
        assert isinstance(forced, Forced) and forced.membership.in_sync == {"b"}
    majority = decide("b", TERM_2, heard(said("b", ABTN), said("t", ABTN)), silent("a"))
    assert isinstance(majority, Promote) and majority.membership.in_sync == {"b"}


def test_it_is_no_leg_to_go_on_with() -> None:
    only_a = ABN.next_epoch(in_sync=frozenset("an"))
    decision = decide("b", TERM_2, heard(said("b", only_a)), silent("a"))
    assert isinstance(decision, Refused) and decision.must_hear == {"a"}
    without_force = decide("c", TERM_2, heard(said("b", only_a)), silent("a"), force=True)
    assert isinstance(without_force, Refused) and "there is none" in without_force.sentence
    with pytest.raises(OSError):  # after a power cut: the server doesn't make it "all were heard"
        leg = type("A", (), {"is_local": True, "info": ABN.legs[0]})()
        choose_source([leg], frozenset(), all_heard=len([leg]) == len(ABN.in_sync & ABN.terrace_ids))


def test_what_is_recent_tells_all_only_after_a_clean_end_or_on_the_same_node_with_its_own_leg() -> None:
    assert tells_all(ABN, ABN.next_epoch(in_sync=frozenset("ab")))
    assert tells_all(ABN, ABN.next_term(TERM_2, "a", frozenset("ab")))
    assert not tells_all(ABN, ABN.next_term(TERM_2, "b", frozenset("ab")))
    demoted = ABN.next_epoch(primary=None, token="b")
    assert tells_all(demoted, demoted.next_term(TERM_2, "b", frozenset("ab")))
    not_own = ABN.next_epoch(in_sync=frozenset("bn"))
    assert not tells_all(not_own, not_own.next_term(TERM_2, "a", frozenset("b")))
    diskless = dataclasses.replace(ABN, primary="d")
    assert not tells_all(diskless, diskless.next_term(TERM_2, "d", frozenset("ab")))
    missed = ABN.next_term(TERM_2, "b", frozenset("ab")).next_term(TERM_3, "a", frozenset("ab"))
    assert not tells_all(ABN, missed)


async def wrote(new: Membership, *, boot: str = "boot-1") -> set[int]:
    """What a leg holds for missing at the server after something was written and that record came."""
    keeper, store, record = await started("ab")
    await keeper.accept(with_disk(record, in_sync=False))
    await keeper.accept(ABN.next_epoch())
    for name in ("recent", "recent-old"):
        store.trackers[name].clear()
    store.wrote(3 << 16, 4096)
    store.durable = store.record, {name: one.encode() for name, one in store.trackers.items()}
    keeper = restarted(keeper, boot)
    await keeper.prepare(new.term, new.primary or "")
    await keeper.accept(new)
    return indices(store, "missing:n")


def test_a_leg_notes_what_is_recent_or_everything_of_a_server_with_a_new_term() -> None:
    async def main() -> None:
        last = ABN.next_epoch()
        same, other = (last.next_term(TERM_2, node, frozenset("ab")) for node in "ab")
        assert await wrote(same) == {3}
        assert await wrote(same, boot="boot-2") == EVERYTHING  # a log's end is gone, and what it knew of
        assert await wrote(other) == EVERYTHING
        demoted = last.next_epoch(primary=None, token="b")
        assert await wrote(demoted.next_term(TERM_2, "b", frozenset("ab"))) == EVERYTHING  # its end wasn't seen here

    trio.run(main)


def test_after_a_clean_hand_over_only_what_is_recent_is_missing_at_a_server() -> None:
    async def main() -> None:
        keeper, store, record = await started("ab", "b")
        await keeper.accept(with_disk(record, in_sync=False))
        await keeper.accept(ABN.next_epoch())
        for name in ("recent", "recent-old"):
            store.trackers[name].clear()
        demoted = ABN.next_epoch().next_epoch(primary=None, token="b")
        await keeper.accept(demoted)
        await keeper.prepare(TERM_2, "b")
        await keeper.accept(demoted.next_term(TERM_2, "b", frozenset("ab")))
        assert indices(store, "missing:n") == set()

    trio.run(main)


def test_whoever_was_primary_and_did_not_end_cleanly_is_named_until_it_is_out_of_the_mirror() -> None:
    assert unfenced(AN, "a") == ()
    taken = ABN.next_term(TERM_2, "b", frozenset("ab"))
    assert unfenced(taken, "b") == ("a",)
    assert unfenced(taken.next_epoch(), "b") == ("a",)
    assert unfenced(taken.next_term(TERM_3, "a", frozenset("ab")), "a") == ("b",)
    demoted = ABN.next_epoch(primary=None, token="b").next_term(TERM_2, "b", frozenset("ab"))
    assert unfenced(demoted, "b") == ()
    without_a = taken.next_epoch(legs=taken.legs[1:], voters=("b",), in_sync=frozenset("b"))
    assert unfenced(without_a, "b") == ()


def test_it_is_explained_by_its_address() -> None:
    ended = explain(Facts("fast/vol", ABN, voters={}, unheard={"b": "no route to host"}))
    assert ended.legs["n"] is LegState.UNPROVEN
    away = explain(
        Facts("fast/vol", AN.next_epoch(in_sync=frozenset("a")), serving=True, connected=frozenset("a"),
              errors={"n": "nobody listens"}, away_s={"n": 5.0})
    )  # fmt: skip
    assert "The leg nbd://host/disk has been out of reach for 5 s (nobody listens)" in away.paragraph


def test_a_new_server_is_compared_in_full() -> None:
    async def main() -> None:
        keeper, store, record = await started("a")
        await keeper.accept(with_disk(record, in_sync=False))
        assert indices(store, "missing:n") == EVERYTHING
        assert keeper_of(store).record.accepted is not None

    trio.run(main)


def test_a_former_primary_that_has_neither_a_leg_nor_a_say_keeps_a_server_out_until_its_own_term_is_over() -> None:
    by_c = ABN.next_term(TERM_2, "c", frozenset("ab"))
    later = by_c.next_term(TERM_3, "a", frozenset("ab"))
    assert unfenced(later, "a") == ("c",)
    assert unfenced(decode(encode(later)), "a") == ("c",), "nothing but the history names it"
    assert is_outside(later, "c") and not is_outside(later, "a")
    # It isn't asked by each candidate: what ends its last term will do.
    much_later = later.next_term(Term(7, "7" * 16), "a", frozenset("ab"))
    for promised, fenced in ((None, False), (TERM_2, False), (TERM_3, True), (Term(7, "7" * 16), True)):
        assert is_fenced(much_later, "c", promised) is fenced
    assert not is_fenced(later.next_term(Term(7, "7" * 16), "b", frozenset("b")), "a", TERM_3)
    demoted = by_c.next_epoch(primary=None, token="a")
    assert unfenced(demoted.next_term(TERM_3, "a", frozenset("ab")), "a") == ()
    # A node that had a say and is out of the mirror is gone: an operator has said so.
    by_b = later.next_term(Term(4, "4" * 16), "b", frozenset("b"))
    assert unfenced(by_b, "b") == ("a", "c")
    assert unfenced(by_b.next_epoch(legs=by_b.legs_on("b"), voters=("b",)), "b") == ("c",)
