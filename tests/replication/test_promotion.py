"""What may be done with what was heard, and what is said when it isn't enough."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from replication.cluster import VoterState
from replication.lineage import Relation
from replication.membership import MAX_HISTORY, Membership, Options, Term, decode, encode
from replication.promotion import (
    Forced,
    Promote,
    Refused,
    SplitBrain,
    decide,
    demote,
    is_rejoin_allowed,
    new_term,
    promote,
)
from replication.voters import LegsCluster
from tests.replication.nodes import Nodes
from tests.replication.stores import MIRROR, first_record, leg

TERM_2, TERM_3 = Term(2, "2" * 16), Term(3, "3" * 16)
AB, ABT = first_record("ab"), first_record("ab", diskless="t")


def said(node: str, record: Membership | None, **more: object) -> VoterState:
    return dataclasses.replace(VoterState(node, record.term if record else None, record), **more)  # type: ignore[arg-type]


def heard(*states: VoterState) -> dict[str, VoterState]:
    return {state.node: state for state in states}


def silent(*nodes: str) -> dict[str, str]:
    return dict.fromkeys(nodes, "no route to host")


def test_all_that_were_in_sync_must_be_heard() -> None:
    decision = decide("b", TERM_2, heard(said("b", AB)), silent("a"))
    assert isinstance(decision, Refused) and decision.must_hear == {"a"}
    assert decision.sentence == (
        "only node a can tell whether writes were acknowledged without the others (a: no route to host). Start a or "
        "mend the way there; or promote with --force, which may lose writes"
    )
    decision = decide("b", TERM_2, heard(said("a", AB), said("b", AB)), {})
    assert isinstance(decision, Promote) and not decision.alone
    assert [leg.node for leg in decision.sources] == ["b", "a"]  # the local one is read
    assert (decision.membership.primary, decision.membership.in_sync) == ("b", frozenset("ab"))


def test_the_newest_record_decides_who_must_be_heard() -> None:
    without_b = AB.next_epoch(in_sync=frozenset("a"))
    decision = decide("b", TERM_2, heard(said("a", without_b), said("b", AB)), {})
    assert isinstance(decision, Promote) and [leg.node for leg in decision.sources] == ["a"]
    assert decision.membership.in_sync == {"a"}


def test_who_is_out_by_a_record_that_never_counts_is_gone_on_with() -> None:
    """The primary a has dropped its own leg, and died before b stored that; b's machine went down before."""
    for first in (AB, ABT, arbitrated(AB)):
        without_a = first.next_epoch(in_sync=frozenset("b"))
        arbiter = without_a if first.options.arbiter == "etcd" else None
        weak = said("b", first, intact=False)
        others = [said("t", without_a)] if first is ABT else []
        for me in "ab":
            decision = decide(me, TERM_2, heard(said("a", without_a), weak, *others), {}, arbiter=arbiter)
            assert isinstance(decision, Promote) and [leg.node for leg in decision.sources] == ["a"]
            assert decision.membership.in_sync == {"a", "b"} and decision.membership.place > without_a.place
            # With an arbiter, which compares, what it has is followed.
            assert decision.expected == (arbiter or first) and decision.membership.descends_from(decision.expected)
            # It may count if b has stored it, or isn't heard: then what a has may be too little.
            stored = dataclasses.replace(weak, accepted=without_a)
            taken = decide(me, TERM_2, heard(said("a", without_a), stored, *others), {}, arbiter=arbiter)
            assert isinstance(taken, Promote) and [leg.node for leg in taken.sources] == ["b"]
        refused = decide("a", TERM_2, heard(said("a", without_a), *others), silent("b"), arbiter=arbiter)
        assert isinstance(refused, Refused) and refused.must_hear == {"b"}
        # By force it is no worse: what a has is kept.
        states = heard(said("a", without_a), dataclasses.replace(weak, inconsistent=True), *others)
        forced = decide("a", TERM_2, states, {}, arbiter=arbiter, force=True)
        assert isinstance(forced, Promote) and "a" in forced.membership.in_sync


@pytest.mark.parametrize("me", ["a", "b"])
def test_a_leg_that_can_store_nothing_is_left_out_where_another_one_has_everything(me: str) -> None:
    """The primary a has dropped its own leg, whose disk is dead, and was restarted before b stored that."""
    for first in (AB, ABT, arbitrated(AB)):
        without_a = first.next_epoch(in_sync=frozenset("b"))
        arbiter = without_a if first.options.arbiter == "etcd" else None
        others = [said("t", first)] if first is ABT else []
        for record in (without_a, first):
            dead = said("a", record, no_writes="its disk is dead")
            decision = decide(me, TERM_2, heard(dead, said("b", first), *others), {}, arbiter=arbiter)
            assert isinstance(decision, Promote) and [leg.node for leg in decision.sources] == ["b"]
            assert decision.membership.primary == me and decision.membership.in_sync == {"b"}
            # None has lost less than the other: it is the same as if both were taken.
            weak = [dataclasses.replace(dead, intact=False), said("b", first, intact=False)]
            decision = decide(me, TERM_2, heard(*weak, *others), {}, arbiter=arbiter)
            assert isinstance(decision, Promote) and decision.membership.in_sync == {"b"}


def test_a_leg_that_can_store_nothing_is_not_left_out_where_it_may_be_the_only_one_with_everything() -> None:
    dead = said("a", AB, no_writes="its disk is dead")
    weak = said("b", AB, intact=False)
    for me in "ab":
        decision = decide(me, TERM_2, heard(dead, weak), {})
        assert isinstance(decision, Refused)
        assert decision.sentence == (
            "only the leg on node a is known to have every acknowledged write, and it can store nothing (a: its disk "
            "is dead), and node b may have lost writes. Mend that and restart terraced there; or promote another node "
            "with --force, which may lose writes"
        )
    # By force without it, as no record with it would count; and never on it.
    forced = decide("b", TERM_2, heard(dead, weak), {}, force=True)
    assert isinstance(forced, Forced) and forced.membership.in_sync == {"b"}
    refused = decide("a", TERM_2, heard(dead, weak), {}, force=True)
    assert isinstance(refused, Refused) and "can store nothing (its disk is dead)" in refused.sentence
    without_b = AB.next_epoch(in_sync=frozenset("a"))
    alone = decide("b", TERM_2, heard(dataclasses.replace(dead, accepted=without_b), said("b", AB)), {})
    assert isinstance(alone, Refused) and "only the leg on node a" in alone.sentence
    both = decide("b", TERM_2, heard(dead, dataclasses.replace(weak, intact=True, no_writes="it is full")), {})
    assert isinstance(both, Refused) and "only the leg on node a or b" in both.sentence


def test_who_goes_on_by_itself_does_so_from_its_own_terms_only_and_asks_for_no_promise_else() -> None:
    async def main() -> None:
        nodes = Nodes("ab")
        for node in nodes.all.values():
            await node.voter.accept(AB)
        asked = ("a", MIRROR, "ab", nodes.voter("a"), nodes.cluster("a"))
        decision = await promote(*asked, own=AB.term)
        assert isinstance(decision, Promote) and decision.membership.term.number == 2
        theirs = decision.membership.next_epoch(primary=None).next_term(Term(3, "3" * 16), "b", AB.in_sync)
        back = theirs.next_epoch(primary=None).next_term(Term(4, "4" * 16), "a", AB.in_sync)
        for number, record in ((3, theirs), (4, back)):
            for node in nodes.all.values():
                await node.voter.accept(record)
            with pytest.raises(OSError, match=rf"others have gone on: there is the record {number}\.0") as refused:
                await promote(*asked, own=AB.term)
            assert refused.value.errno == errno.ESTALE
            assert all(node.keeper.record.promised == record.term for node in nodes.all.values())

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("stored", ["ab", "b", "a"])
def test_who_does_not_know_whether_its_later_term_counts_goes_on_from_that_one(stored: str) -> None:
    """It would be deposed by its own record, and each of its clients with it."""

    async def main() -> None:
        nodes = Nodes("ab")
        for node in nodes.all.values():
            await node.voter.accept(AB)
        asked = ("a", MIRROR, "ab", nodes.voter("a"))

        class Doubtful(LegsCluster):
            async def commit(self, new: Membership, *, expected: Membership) -> None:
                for name in stored:
                    await nodes.all[name].voter.accept(new)
                raise OSError(errno.ETIMEDOUT, "not all have answered")

        doubtful = Doubtful("a", nodes.voter("a"), nodes.known, timeout_s=1.0)
        for number in (2, 3):
            with pytest.raises(OSError, match="not all have answered"):
                await promote(*asked, doubtful, own=AB.term)
            assert nodes.all[stored[-1]].keeper.record.accepted.term.number == number  # type: ignore[union-attr]
        decision = await promote(*asked, nodes.cluster("a"), own=AB.term)
        assert isinstance(decision, Promote) and decision.membership.term.number == 4

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_who_goes_on_by_itself_does_not_when_its_own_leg_has_another_primary_whoever_promises() -> None:
    """That one's record was stored at a and b, and not at itself; both others take a for alive."""

    async def main() -> None:
        nodes = Nodes("abc")
        first = first_record("abc")
        other = first.next_term(TERM_2, primary="c", in_sync=frozenset("bc"))
        for node in nodes.all.values():
            await node.voter.accept(first)
        for name in "ab":
            await nodes.all[name].voter.prepare(MIRROR, TERM_2, "c", force=True)
            await nodes.all[name].voter.accept(other)
        for name in "bc":
            nodes.all[name].voter.heard(MIRROR)
        with pytest.raises(OSError, match=r"others have gone on: there is the record 2\.0") as refused:
            await promote("a", MIRROR, "abc", nodes.voter("a"), nodes.cluster("a"), own=first.term)
        assert refused.value.errno == errno.ESTALE

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_records_that_were_tried_one_after_the_other_fall_back_to_what_all_were_made_from() -> None:
    abc = first_record("abc")
    tried = [abc.next_epoch(in_sync=frozenset("bc"))]
    tried.append(dataclasses.replace(abc, epoch=tried[0].epoch).next_epoch(in_sync=frozenset("c")))
    weak = said("c", abc, intact=False)
    decision = decide("b", TERM_2, heard(said("a", tried[1]), said("b", tried[0]), weak), {})
    assert isinstance(decision, Promote) and [leg.node for leg in decision.sources] == ["b", "a"]
    # Nobody has told of the record in between, so it isn't known who has everything: none but those of the newest.
    unknown = tried[0].next_epoch(in_sync=frozenset("c"))
    decision = decide("b", TERM_2, heard(said("a", unknown), said("b", abc), weak), {})
    assert isinstance(decision, Promote) and [leg.node for leg in decision.sources] == ["c"]


def arbitrated(record: Membership) -> Membership:
    return dataclasses.replace(record, options=Options(arbiter="etcd"))


def test_a_majority_must_have_promised_and_one_leg_in_sync_be_heard() -> None:
    decision = decide("b", TERM_2, heard(said("b", ABT)), silent("a", "t"))
    assert isinstance(decision, Refused) and decision.must_hear == {"a", "t"}
    assert decision.sentence.startswith("1 of 3 voters have promised, and a majority must: 1 more of a or t")
    assert isinstance(decide("b", TERM_2, heard(said("b", ABT), said("t", ABT)), silent("a")), Promote)
    without_b = ABT.next_epoch(in_sync=frozenset("a"))
    decision = decide("b", TERM_2, heard(said("b", ABT), said("t", without_b)), silent("a"))
    assert (
        isinstance(decision, Refused) and decision.must_hear == {"a"} and "no leg that is in sync" in decision.sentence
    )


def test_a_restarted_primary_goes_on_alone_unless_it_has_promised_or_lost_something() -> None:
    decision = decide("a", TERM_2, heard(said("a", AB, candidates=frozenset("a"))), silent("b"))
    assert isinstance(decision, Promote) and decision.alone and decision.membership.in_sync == {"a"}
    for state in (said("a", AB, candidates=frozenset("b")), said("a", AB, intact=False)):
        decision = decide("a", TERM_2, heard(state), silent("b"))
        assert isinstance(decision, Refused) and decision.must_hear == {"b"}


def test_the_token_is_of_use_to_one_node() -> None:
    demoted = AB.next_epoch(primary=None, token="b")
    assert isinstance(decide("b", TERM_2, heard(said("b", demoted)), silent("a")), Promote)
    assert isinstance(decide("a", TERM_2, heard(said("a", demoted)), silent("b")), Refused)
    assert isinstance(decide("b", TERM_2, heard(said("b", demoted, candidates=frozenset("a"))), silent("a")), Refused)


def test_legs_that_may_have_lost_something_are_compared_with_all_others() -> None:
    weak = said("b", ABT, intact=False)
    decision = decide("b", TERM_2, heard(weak, said("t", ABT)), silent("a"))
    assert isinstance(decision, Refused) and decision.must_hear == {"a"} and "may have lost writes" in decision.sentence
    decision = decide("b", TERM_2, heard(weak, said("a", ABT)), {})
    assert isinstance(decision, Promote) and [leg.node for leg in decision.sources] == ["a"]
    decision = decide("b", TERM_2, heard(weak, said("a", ABT, intact=False)), {})
    assert isinstance(decision, Promote) and decision.sources[0].node == "b"


def test_force_says_what_may_be_lost_and_never_takes_an_inconsistent_leg() -> None:
    state = said("b", AB, heard_s=12.0, intact=False, recent_bytes=65536)
    decision = decide("b", TERM_2, heard(state), silent("a"), force=True)
    assert isinstance(decision, Forced) and decision.membership.forced == "fenced"
    assert decision.may_lose == (
        "This may lose what was acknowledged after node b was last in sync; it heard its primary 12 s ago; its machine "
        "went down, and of 65536 bytes written last it may have lost any. Not heard: a. If another node serves still, "
        "or did, both have written: split brain."
    )
    out = AB.next_epoch(in_sync=frozenset("a"))
    decision = decide("b", TERM_2, heard(said("b", out)), silent("a"), force=True)
    assert isinstance(decision, Forced) and decision.membership.forced == "apart"
    assert "all that was acknowledged since node b was left out" in decision.may_lose
    decision = decide("b", TERM_2, heard(said("b", out, inconsistent=True)), silent("a"), force=True)
    assert isinstance(decision, Refused) and "no state that the volume ever had" in decision.sentence
    # By majority it must be able to go on without the others.
    decision = decide("b", TERM_2, heard(said("b", ABT)), silent("a", "t"), force=True)
    assert isinstance(decision, Forced) and decision.membership.voters == ("b",)
    # Force isn't used where it isn't needed.
    assert not isinstance(decide("b", TERM_2, heard(said("a", AB), said("b", AB)), {}, force=True), Forced)


def test_both_histories_of_a_split_brain_are_named_and_the_operator_decides() -> None:
    alone = AB.next_epoch(in_sync=frozenset("a"))
    forced = AB.next_term(TERM_2, "b", frozenset("b"), "fenced")
    states = heard(said("a", alone), said("b", forced))
    decision = decide("a", TERM_3, states, {})
    assert isinstance(decision, SplitBrain) and decision.node == "a"
    assert "node b has 2.0 (22222222, primary b, forced)" in decision.sentence
    assert "node a has 1.1 (11111111, primary a)" in decision.sentence
    way_out = "`terrace volume mirror resync fast/vol a --discard` on node b gives up what only node a has"
    assert way_out in decision.sentence and decision.sentence.endswith("or promote node a with --force")
    # The side that was forced last goes on: nobody needs the other.
    assert isinstance(decide("b", TERM_3, states, {}), Promote)
    taken = decide("a", TERM_3, states, {}, force=True)
    assert isinstance(taken, Forced) and taken.expected == alone


def test_two_terms_of_one_number_have_no_order_and_who_has_heard_of_the_other_that_serves_needs_force() -> None:
    resumed = AB.next_term(Term(2, "a" * 16), "a", frozenset("a"))
    forced = AB.next_term(TERM_2, "b", frozenset("b"), "fenced").next_epoch()
    states = heard(said("a", resumed), said("b", forced))
    for me in "ab":
        assert isinstance(decide(me, TERM_3, states, {}), SplitBrain)
        assert isinstance(decide(me, TERM_3, states, {}, force=True), Forced)
    states = heard(said("a", resumed), said("b", forced, superseded=resumed))
    assert isinstance(decide("a", TERM_3, states, {}), Promote)
    assert isinstance(decide("b", TERM_3, states, {}), SplitBrain)
    # And if each has heard of the other, nobody goes on without an operator.
    states = heard(said("a", resumed, superseded=forced), said("b", forced, superseded=resumed))
    for me in "ab":
        assert isinstance(decide(me, TERM_3, states, {}), SplitBrain)


def test_what_a_returning_leg_is() -> None:
    later = AB.next_epoch(in_sync=frozenset("a"))
    assert is_rejoin_allowed(AB, AB, "b") is Relation.SAME
    assert is_rejoin_allowed(later, AB, "b") is Relation.ANCESTOR
    assert is_rejoin_allowed(later, None, "b") is Relation.ANCESTOR
    with pytest.raises(OSError, match=r"later record 1\.1") as refused:
        is_rejoin_allowed(AB, later, "b")
    assert refused.value.errno == errno.ESTALE
    # A record that never counted: a candidate that was heard by all would have found it.
    other = AB.next_term(TERM_2, "a", frozenset("a"))
    assert is_rejoin_allowed(other, AB.next_epoch(size_bytes=2 << 20), "b") is Relation.FORK
    forced = AB.next_term(TERM_2, "b", frozenset("b"), "fenced")
    with pytest.raises(OSError, match="split brain") as refused:
        is_rejoin_allowed(forced, later, "a")
    assert refused.value.errno == errno.EUCLEAN
    assert is_rejoin_allowed(forced, later, "a", discard=True) is Relation.ANCESTOR
    # The primary that the forced one knew nothing of needed no record to go on.
    out = AB.next_epoch(in_sync=frozenset("a"))
    apart = out.next_term(TERM_2, "b", frozenset("b"), "apart")
    with pytest.raises(OSError, match="split brain"):
        is_rejoin_allowed(apart, out, "a")
    demoted = out.next_epoch(primary=None, token="a")
    assert is_rejoin_allowed(demoted.next_term(TERM_2, "b", frozenset("b"), "apart"), demoted, "a") is Relation.ANCESTOR


def test_a_history_forgets_the_oldest_but_never_that_something_was_forced() -> None:
    record = AB.next_term(TERM_2, "b", frozenset("b"), "fenced")
    forced = record.generation
    for _ in range(2 * MAX_HISTORY):
        record = record.next_epoch()
    assert len(record.history) == MAX_HISTORY and forced in record.history and record.history[-1] == record.generation
    assert decode(encode(record)) == record
    with pytest.raises(OSError, match="split brain"):
        is_rejoin_allowed(record, AB.next_epoch(in_sync=frozenset("a")), "a")


def run(what: Callable[[Nodes], Awaitable[None]], names: str = "ab") -> None:
    async def main() -> None:
        await what(Nodes(names, timeout_s=1.0))

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def promoted(nodes: Nodes, me: str, *, asks: str = "", force: bool = False) -> object:
    voter = nodes.all[me].voter
    return await promote(
        me, MIRROR, list(asks or nodes.all), nodes.voter(me), nodes.cluster(me), timeout_s=1.0, force=force,
        heard_of=voter.heard_of,
    )  # fmt: skip


def test_a_candidate_that_is_refused_fences_nobody() -> None:
    async def what(nodes: Nodes) -> None:
        await nodes.cluster("a").create(AB)
        nodes.all["a"].primary = True
        decision = await promoted(nodes, "b")
        assert isinstance(decision, Refused) and "force" not in decision.sentence
        assert (
            "node a is primary and alive: demote it there first, with `terrace volume mirror demote fast/vol --to b`"
            in (decision.sentence)
        )
        nodes.all["a"].up = False
        decision = await promoted(nodes, "b")
        assert isinstance(decision, Refused) and decision.must_hear == {"a"}
        assert all(node.keeper.allows(AB.term) for node in nodes.all.values())

    run(what)


def test_who_is_refused_for_a_primary_that_was_heard_a_moment_ago_is_not_told_to_use_force() -> None:
    async def what(nodes: Nodes) -> None:
        await nodes.cluster("a").create(AB)
        nodes.all["b"].voter.heard(MIRROR)
        nodes.all["a"].up = False
        decision = await promoted(nodes, "b")
        assert isinstance(decision, Refused) and decision.must_hear == {"a", "b"}
        assert (
            "b: it has heard the primary, node a, 1.0 s ago" in decision.sentence and "force" not in decision.sentence
        )
        await trio.sleep(AB.options.lease_s)
        decision = await promoted(nodes, "b")
        assert isinstance(decision, Refused) and "promote with --force" in decision.sentence

    run(what)


def test_a_clean_hand_over_needs_only_the_token() -> None:
    async def what(nodes: Nodes) -> None:
        await nodes.cluster("a").create(AB)
        with pytest.raises(OSError, match="node b isn't primary"):
            await demote("b", AB, nodes.cluster("b"))
        demoted = await demote("a", AB, nodes.cluster("a"))
        assert demoted.token == "b"
        nodes.all["a"].up = False
        decision = await promoted(nodes, "b")
        assert isinstance(decision, Promote) and decision.alone
        nodes.all["a"].up = True
        nodes.all["b"].up = False
        assert isinstance(await promoted(nodes, "a"), Refused)

    run(what)


def test_a_demotion_that_got_lost_leaves_no_two_that_may_go_on() -> None:
    async def what(nodes: Nodes) -> None:
        await nodes.cluster("a").create(AB)
        nodes.all["b"].up = False
        with pytest.raises(OSError, match="isn't stored") as refused:
            await demote("a", AB, nodes.cluster("a"))
        assert refused.value.errno == errno.ETIMEDOUT
        assert isinstance(await promoted(nodes, "a"), Refused)  # b might have it, and use the token
        nodes.all["b"].up = True
        nodes.all["a"].up = False
        assert isinstance(await promoted(nodes, "b"), Refused)

    run(what)


def test_the_token_is_not_given_to_a_node_that_cannot_go_on() -> None:
    async def what(nodes: Nodes) -> None:
        record = first_record("abc", in_sync="ab")
        await nodes.cluster("a").create(record)
        with pytest.raises(OSError, match=r"node c has no leg in sync.*demote to a or b") as refused:
            await demote("a", record, nodes.cluster("a"), to="c")
        assert refused.value.errno == errno.EINVAL

    run(what, "abc")


def test_a_side_that_was_left_behind_by_force_does_not_go_on_once_it_has_heard_of_the_other_that_serves() -> None:
    async def what(nodes: Nodes) -> None:
        a, b = nodes.all["a"], nodes.all["b"]
        nodes.all["c"].up = a.up = False
        await nodes.all["a"].voter.accept(AB)
        await b.voter.accept(AB)
        old = await promoted(nodes, "b", asks="ab", force=True)
        assert isinstance(old, Forced)
        later = old.membership
        for _ in range(9):  # its place says nothing of which side is the newer one
            later = later.next_epoch()
            await nodes.cluster("b").commit(later, expected=old.membership)
        b.up = False
        a.restart()
        resumed = await promoted(nodes, "a", asks="ab")
        assert isinstance(resumed, Promote) and resumed.alone
        a.primary = True
        b.restart()
        refused = await promoted(nodes, "b", asks="ab")
        assert isinstance(refused, Refused) and "node a is primary and alive" in refused.sentence
        nodes.all["c"].up = True
        one = resumed.membership
        two = one.next_epoch(legs=(*AB.legs, leg("c")), voters=tuple("abc"), in_sync=frozenset("ac"))
        await nodes.cluster("a").commit(two, expected=one)

        a.up = a.primary = False
        for asks in ("ab", "abc"):
            b.restart()  # and knows it still
            assert isinstance(await promoted(nodes, "b", asks=asks), Refused | SplitBrain)
        b.restart(rebooted=True)
        decision = await promoted(nodes, "c")
        assert isinstance(decision, Refused) and "b: it has gone its own way, and has no say" in decision.sentence
        a.restart()
        await trio.sleep(2 * AB.options.lease_s)
        assert isinstance(decision := await promoted(nodes, "b"), SplitBrain)
        assert "resync fast/vol b --discard` on node a" in decision.sentence
        # A majority of the newer record outweighs the leg that is left out.
        decision = await promoted(nodes, "c")
        assert isinstance(decision, Promote) and decision.expected == two
        assert isinstance(await promoted(nodes, "b", force=True), Forced)
        assert b.keeper.record.superseded is None

    run(what, "abc")


def test_with_three_nodes_too_a_side_that_was_left_behind_has_no_say_until_that_is_decided() -> None:
    async def what(nodes: Nodes) -> None:
        a, b, c = nodes.all.values()
        record = first_record("abc")
        await nodes.cluster("a").create(record)
        a.up = c.up = False
        forced = await promoted(nodes, "b", force=True)
        assert isinstance(forced, Forced) and forced.membership.voters == ("b",)
        b.up = False
        a.restart()
        c.restart()
        resumed = await promoted(nodes, "a")
        assert isinstance(resumed, Promote) and resumed.membership.in_sync == frozenset("ac")
        b.restart()
        a.primary = True
        assert isinstance(await promoted(nodes, "b"), Refused)
        c.up = a.up = a.primary = False
        b.restart()
        assert isinstance(await promoted(nodes, "b"), SplitBrain)
        c.restart()
        assert isinstance(await promoted(nodes, "b"), SplitBrain)
        await trio.sleep(2 * record.options.lease_s)
        assert isinstance(decision := await promoted(nodes, "c"), Refused)
        assert "1 of 3 voters" in decision.sentence
        a.restart()
        await trio.sleep(2 * record.options.lease_s)
        assert isinstance(await promoted(nodes, "c"), Promote)

    run(what, "abc")


def test_who_has_only_missed_a_promotion_by_force_does_not_go_on_alone_either() -> None:
    async def what(nodes: Nodes) -> None:
        a, b = nodes.all["a"], nodes.all["b"]
        await nodes.cluster("a").create(AB)
        a.up = False
        assert isinstance(await promoted(nodes, "b", force=True), Forced)
        b.primary = True
        a.restart()
        assert isinstance(await promoted(nodes, "a"), Refused)  # but no session has brought the record
        b.up = False
        a.restart()
        refused = await promoted(nodes, "a")
        assert isinstance(refused, Refused) and refused.must_hear == {"b"}
        b.restart()
        assert isinstance(await promoted(nodes, "a"), Promote)  # of the newer history
        assert a.keeper.record.accepted is not None and a.keeper.record.accepted.history[1].primary == "b"

    run(what)


def test_what_a_primary_that_was_left_behind_writes_lets_nobody_forget_what_it_has_heard_of() -> None:
    async def what(nodes: Nodes) -> None:
        a, b, c = nodes.all.values()
        record = first_record("abc")
        await nodes.cluster("a").create(record)
        a.up = c.up = False
        forced = await promoted(nodes, "b", force=True)
        assert isinstance(forced, Forced)
        a.up = c.up = a.primary = b.primary = True
        assert not isinstance(await promoted(nodes, "c"), Promote)  # it hears of both
        b.up = False
        after = record.next_epoch(in_sync=frozenset("ac"))
        await nodes.cluster("a").commit(after, expected=record)
        c.restart()
        a.restart()
        await trio.sleep(2 * record.options.lease_s)
        decision = await promoted(nodes, "c")
        assert isinstance(decision, SplitBrain), "b serves, and only an operator decides"
        assert c.keeper.record.accepted == after and c.keeper.record.superseded == forced.membership
        assert isinstance(await promoted(nodes, "c", force=True), Forced)
        assert c.keeper.record.superseded is None

    run(what, "abc")


def test_a_primary_that_was_fenced_makes_nobody_give_up() -> None:
    async def what(nodes: Nodes) -> None:
        a, b = nodes.all["a"], nodes.all["b"]
        record = first_record("abc")
        await nodes.cluster("a").create(record)
        a.up = False
        await trio.sleep(2 * record.options.lease_s)
        decision = await promoted(nodes, "b")
        assert isinstance(decision, Promote)
        with pytest.raises(OSError, match="promised term 2"):
            await b.voter.accept(record.next_epoch())
        b.restart()
        assert b.keeper.record.superseded is None
        assert isinstance(await promoted(nodes, "b"), Promote)

    run(what, "abc")


def test_a_new_term_is_higher_than_all_that_was_seen() -> None:
    assert new_term([]).number == 1
    assert new_term([said("a", AB, promised=Term(7, "7" * 16))], AB).number == 8
    assert Options().lease_s > 0
