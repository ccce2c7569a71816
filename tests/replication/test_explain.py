"""What a mirror's state is, and one paragraph that says why and what would change it."""

from __future__ import annotations

import dataclasses

import pytest

from replication.cluster import VoterState
from replication.explain import Explanation, Facts, Progress, explain, last_leg_on
from replication.leg import LegState, MirrorState
from replication.membership import LegInfo, Membership, Options, Term
from replication.promotion import SplitBrain
from tests.replication.stores import first_record

AB, ABT = first_record("ab"), first_record("ab", diskless="t")
ALONE = AB.next_epoch(in_sync=frozenset("a"))


def facts(record: Membership, **more: object) -> Facts:
    return dataclasses.replace(Facts("fast/vol", record), **more)  # type: ignore[arg-type]


def said(record: Membership, *nodes: str, **more: object) -> dict[str, VoterState]:
    states = {node: VoterState(node, record.term, record) for node in nodes}
    return {node: dataclasses.replace(state, **more) for node, state in states.items()}  # type: ignore[arg-type]


def legs_of(found: Explanation) -> list[LegState]:
    return [found.legs[leg_id] for leg_id in sorted(found.legs)]


def test_healthy() -> None:
    found = explain(facts(AB, serving=True, connected=frozenset("ab"), voters=said(AB, "a", "b")))
    assert found.state is MirrorState.ONLINE and legs_of(found) == [LegState.UP_TO_DATE] * 2
    assert found.paragraph == "fast/vol is Online: node a is primary, and all 2 legs have every acknowledged write."
    # As the other node sees it.
    voters = said(AB, "b") | said(AB, "a", primary_here=True)
    assert explain(facts(AB, voters=voters)).paragraph == found.paragraph


def test_a_mirror_of_one_leg_mirrors_nothing_and_what_gives_it_another_is_said() -> None:
    alone = dataclasses.replace(AB, legs=AB.legs[:1], in_sync=frozenset("a"))
    found = explain(facts(alone, serving=True, connected=frozenset("a"), voters=said(alone, "a")))
    assert found.paragraph == (
        "fast/vol is Online: node a is primary, and its only leg has every acknowledged write, so nothing is mirrored: "
        "`terrace volume mirror add fast/vol NODE` gives it another leg."
    )


def test_a_leg_that_is_away() -> None:
    found = explain(
        facts(
            ALONE, serving=True, connected=frozenset("a"), unheard={"b": "no route to host"}, away_s={"b": 300.0},
            voters=said(ALONE, "a"),
        )
    )  # fmt: skip
    assert found.state is MirrorState.DEGRADED and legs_of(found) == [LegState.UP_TO_DATE, LegState.OFFLINE]
    assert found.paragraph == (
        "fast/vol is Degraded: node a is primary, and 1 of 2 legs have every acknowledged write. The leg on node b has "
        "been out of reach for 5 min (no route to host); it misses writes, and is resynced when it is back."
    )
    stale = explain(facts(ALONE, serving=True, connected=frozenset("ab"), away_s={"b": 3.0}))
    assert stale.legs["b"] is LegState.STALE and "misses writes for 3 s; it is resynced when" in stale.paragraph


@pytest.mark.parametrize("record", [AB, ALONE, AB.next_epoch(primary=None)])
def test_a_leg_of_which_all_others_know_nothing_is_called_left_over_and_how_it_goes_is_said(record: Membership) -> None:
    about = facts(
        record, voters=said(record, "b"), unheard={"a": "node a knows nothing of a mirror"}, leg_here="b",
        gone=frozenset("a"), delete_here="terrace volume delete fast/vol --force --snapshots",
    )  # fmt: skip
    found = explain(about)
    assert found.paragraph.startswith(
        "fast/vol is Unknown: node a has none of this mirror any more, so the leg here is left over: it was removed, "
        "or the volume deleted, while it couldn't be reached. See there that what is wanted is there (`terrace volume "
        "list`): `terrace volume delete fast/vol --force --snapshots` then deletes it here; if it is not, as that pool "
        "was lost and made anew, the leg here is the last one, and `terrace volume mirror promote fast/vol --force` "
        "serves it."
    )
    assert "mend the way" not in found.paragraph
    half = dataclasses.replace(about, voters=said(record, "b", inconsistent=True))
    assert "promote" not in explain(half).paragraph, "a leg in the middle of a resync is served by nobody"
    broken_off = dataclasses.replace(half, membership=first_record("a"))
    assert "left over" in explain(broken_off).paragraph and "promote" not in explain(broken_off).paragraph
    assert str(found.old) in found.paragraph
    # One that only can't be asked may have all of it, and one that has said something isn't all there is.
    for other in (
        dataclasses.replace(about, gone=frozenset()),
        dataclasses.replace(about, membership=first_record("abc")),
        dataclasses.replace(about, voters=said(record, "b") | said(record, "a", primary_here=True), unheard={}),
    ):
        assert "left over" not in explain(other).paragraph


def test_a_leg_that_its_node_refuses_is_left_out_for_the_reason_that_it_gave_and_is_not_called_out_of_reach() -> None:
    found = explain(
        facts(
            ALONE, serving=True, connected=frozenset("a"), voters=said(ALONE, "a", "b"), away_s={"b": 300.0},
            errors={"b": "the pool sm is full"},
        )
    )  # fmt: skip
    assert found.paragraph.endswith(
        "The leg on node b has been left out for 5 min: the pool sm is full; it misses writes, and is resynced when "
        "that is mended."
    )


def test_a_leg_whose_pool_ended_writing_over_a_damaged_map_has_one_next_step() -> None:
    why = "the pool p takes no writes; `terrace pool check p --give-up-map` gives up what lies below"
    voters = said(ALONE, "a", "b")
    found = explain(facts(ALONE, serving=True, connected=frozenset("a"), voters=voters, errors={"b": why}))
    assert found.paragraph.endswith(f"{why}; it misses writes, and is resynced when that is done on node b.")


@pytest.mark.parametrize(
    ("progress", "sentence"),
    [
        (Progress(25, 100, 90.0), "25 %, done in about 90 s."),
        (Progress(0, 100), "0 %, just begun."),
        (Progress(50, 100, 7.0, stalled_s=200.0), "50 %, without progress for 3 min."),
    ],
)
def test_a_resync(progress: Progress, sentence: str) -> None:
    found = explain(facts(ALONE, serving=True, connected=frozenset("ab"), progress={"b": progress}))
    assert found.legs["b"] is LegState.SYNCING and found.state is MirrorState.DEGRADED
    assert found.paragraph.endswith(f"The leg on node b is in resync: {sentence}")


def test_unproven() -> None:
    found = explain(facts(AB, voters=said(AB, "b"), unheard={"a": "no route to host"}))
    assert found.state is MirrorState.UNKNOWN and legs_of(found) == [LegState.OFFLINE, LegState.UNPROVEN]
    assert found.paragraph == (
        "fast/vol is Unknown: its primary, node a, can't be asked (no route to host): this is what was known "
        "last, from before terraced was started. Whether b has every acknowledged write can't be proven without a: "
        "start a or mend the way there, or `terrace volume mirror promote fast/vol --force`, which may lose writes."
    )
    heard = explain(facts(AB, voters=said(AB, "a", "b")))
    assert heard.state is MirrorState.FAULTED and heard.old is None
    assert "`terrace volume mirror promote` on one of them makes it primary" in heard.paragraph
    weak = explain(facts(AB, voters=said(AB, "a", "b", intact=False, recent_bytes=4096)))
    assert "The leg on node b may have lost some of the last 4096 bytes" in weak.paragraph


def test_what_is_known_while_the_primary_can_not_be_asked_is_old_and_it_is_said_how_old() -> None:
    voters = said(AB, "b", heard_s=300.0)
    found = explain(facts(AB, voters=voters, unheard={"a": "no route to host"}))
    assert found.state is MirrorState.UNKNOWN and found.old == (
        "its primary, node a, can't be asked (no route to host): this is what was known 5 min ago, when node b heard "
        "it last"
    )
    assert found.paragraph.startswith(f"fast/vol is Unknown: {found.old}. Whether b has every acknowledged write")
    # Who else is primary is known, then, and by that one.
    voters |= said(AB, "c", primary_here=True)
    assert explain(facts(AB, voters=voters, unheard={"a": "no route to host"})).old is None
    demoted = AB.next_epoch(primary=None)
    assert explain(facts(demoted, voters=said(demoted, "b"), unheard={"a": "no route"})).old is None


def test_writes_that_wait_for_a_moment_are_told_and_the_mirror_is_served() -> None:
    found = explain(facts(ALONE, serving=True, connected=frozenset("a"), held="a snapshot is made", voters=said(AB)))
    assert found.state is MirrorState.DEGRADED
    assert found.headline.endswith("1 of 2 legs have every acknowledged write. Writes wait now: a snapshot is made.")
    majority = facts(ABT, serving=True, connected=frozenset("a"), held="no record", voters=said(ABT, "a"))
    found = explain(dataclasses.replace(majority, unheard={"b": "silent", "t": "silent"}))
    assert "Writes wait now: no record. It goes on when 1 more of b or t can be heard" in found.headline


def test_writes_that_wait_for_a_leg_go_on_by_that_leg_and_not_by_a_quorum() -> None:
    slow = "the leg on node b has been silent for 3 s; it is left out after 30 s"
    waits = facts(ABT, serving=True, connected=frozenset("ab"), held=slow, held_by_leg=True, voters=said(ABT, "a"))
    found = explain(dataclasses.replace(waits, unheard={"b": "silent"}))
    assert found.headline.endswith(f"all 2 legs have every acknowledged write. Writes wait now: {slow}.")


def test_a_split_brain_names_both_histories_and_what_decides_it() -> None:
    sentence = "split brain: node a has 1.1, and node b has 2.0; `mirror resync --discard a`"
    refused = explain(facts(AB, voters=said(AB, "a", "b"), decision=SplitBrain((), (), "a", sentence)))
    assert refused.state is MirrorState.FAULTED and f"Faulted: {sentence}." in refused.paragraph
    served = explain(facts(ALONE, serving=True, connected=frozenset("ab"), split={"b": sentence}))
    assert served.legs["b"] is LegState.STALE and f"The leg on node b is left out: {sentence}." in served.paragraph


def test_who_was_left_behind_says_so_first_whoever_else_serves() -> None:
    sentence = "split brain: node a has 1.1, and node b has 2.0"
    for voters in (said(AB, "b"), said(AB, "b") | said(AB, "a", primary_here=True)):
        found = explain(facts(AB, voters=voters, unheard={}, left_behind=sentence, leg_here="b"))
        assert found.paragraph.startswith(f"fast/vol is not served here: {sentence}. fast/vol is ")
        assert found.legs["b"] is LegState.STALE and found.paragraph.count("split brain") == 1
        assert "all 2 legs" not in found.paragraph


def test_below_quorum() -> None:
    found = explain(
        facts(
            ABT, serving=True, connected=frozenset("a"), suspended="its lease has ended", voters=said(ABT, "a"),
            unheard={"b": "silent", "t": "silent"},
        )
    )  # fmt: skip
    assert found.state is MirrorState.FAULTED
    assert found.paragraph.startswith(
        "fast/vol is Faulted: its primary, node a, lets writes wait, since its lease has ended. It goes on when 1 more "
        "of b or t can be heard (1 of 3 voters are)."
    )
    failing = dataclasses.replace(ABT, options=Options(below_quorum="fail"))
    assert "lets writes fail" in explain(facts(failing, serving=True, suspended="x")).paragraph
    away = explain(facts(ABT, voters=said(ABT, "b"), unheard={"a": "silent", "t": "silent"}))
    assert "Below quorum: It goes on when 1 more of a or t can be heard" in away.paragraph
    assert "a majority of the voters can be heard" in explain(facts(ABT, voters=said(ABT, "b", "t"))).paragraph.lower()


def test_a_primary_without_a_leg_in_sync_waits_for_that_and_not_for_a_quorum_nor_for_a_leg_that_misses_writes() -> None:
    lost = facts(
        ALONE, serving=True, suspended="no leg in sync is connected", is_lost=True, voters=said(ALONE, "a"),
        unheard={"b": "silent"}, errors={"a": "the device is gone"}, away_s={"a": 5.0, "b": 60.0},
    )  # fmt: skip
    assert explain(lost).paragraph == (
        "fast/vol is Faulted: its primary, node a, has no leg in sync, so nothing is read or written. It goes on when "
        "the leg on node a is back. If that is gone for good, `terrace volume mirror promote --force` on node b goes "
        "on without what the leg there misses. The leg on node a has been left out for 5 s: the device is gone. The "
        "leg on node b has been out of reach for 60 s (silent); it misses writes, and is resynced when it is back."
    )
    both = dataclasses.replace(lost, membership=AB)
    assert explain(both).headline.endswith("It goes on when the leg on node a or b is back.")


def test_writes_that_fail_below_quorum_are_not_said_to_wait() -> None:
    held = facts(ABT, serving=True, connected=frozenset("a"), held="no record", voters=said(ABT, "a"))
    assert "Writes wait now: no record." in explain(held).headline
    assert "Writes fail now: no record." in explain(dataclasses.replace(held, is_failing=True)).headline


def test_inconsistent() -> None:
    found = explain(facts(ALONE, serving=True, connected=frozenset("ab"), voters=said(ALONE, "b", inconsistent=True)))
    assert found.legs["b"] is LegState.STALE
    assert "is inconsistent: its resync was interrupted, and it is no state that the volume ever had" in found.paragraph


def test_deposed() -> None:
    found = explain(facts(AB, voters=said(AB, "a"), deposed=Term(4, "4" * 16)))
    assert found.state is MirrorState.FAULTED
    assert found.paragraph.startswith(
        "fast/vol is Faulted here: this node was primary until term 4 was promised to another. Nothing that it "
        "acknowledged is lost by that; `terrace volume mirror list` on node b says who is primary now."
    )


def test_demoted_says_who_holds_the_token() -> None:
    demoted = AB.next_epoch(primary=None, token="b")
    found = explain(facts(demoted, voters=said(demoted, "a", "b")))
    assert legs_of(found) == [LegState.UP_TO_DATE] * 2
    assert found.paragraph == (
        "fast/vol is Faulted: it was demoted cleanly, so nothing is in doubt, and no node exports it. Node b holds the "
        "token: `terrace volume mirror promote` there works without the others. Any other node must hear a and b first."
    )
    nobody = explain(facts(AB.next_epoch(primary=None), voters=said(AB, "a", "b")))
    assert "No node holds a token: `terrace volume mirror promote` must hear a and b." in nobody.paragraph
    majority = explain(facts(ABT.next_epoch(primary=None), voters=said(ABT, "a", "b")))
    assert "`terrace volume mirror promote` on a node with a leg in sync makes it primary." in majority.paragraph


def test_an_nbd_leg_is_called_by_its_address() -> None:
    record = dataclasses.replace(ALONE, legs=(AB.legs[0], LegInfo("b", "a", "nbd://host/disk", "nbd")))
    found = explain(facts(record, serving=True, connected=frozenset("a")))
    assert "The leg nbd://host/disk has been out of reach" in found.paragraph


def test_a_node_with_the_last_good_leg_is_not_drained() -> None:
    good, syncing, stale, unproven = LegState.UP_TO_DATE, LegState.SYNCING, LegState.STALE, LegState.UNPROVEN
    assert last_leg_on("a", [("a", good), ("b", good)]) is None
    assert last_leg_on("b", [("a", good), ("b", syncing)]) is None
    assert last_leg_on("a", [("a", good), ("b", syncing), ("c", stale)]) == (
        "its only leg that is up to date is here (b is in resync): wait for a resync, add a leg elsewhere, or remove it"
    )
    assert last_leg_on("a", [("a", good)]) == (
        "no other node has a leg that could be promoted: add one (`terrace volume mirror add`), or delete the volume"
    ), "there is no resync to wait for"
    assert last_leg_on("b", [("a", unproven), ("b", stale)]) is None
    may_have_all = last_leg_on("a", [("a", unproven), ("b", stale)])
    assert may_have_all is not None and "the one here may have all writes" in may_have_all


WITH_ETCD = first_record("ab", options=Options(arbiter="etcd"))


def test_a_mirror_that_is_whole_while_etcd_is_away() -> None:
    found = explain(
        facts(WITH_ETCD, serving=True, connected=frozenset("ab"), voters=said(WITH_ETCD, "a", "b"), arbiter="silent")
    )
    assert found.state is MirrorState.ONLINE
    assert found.paragraph.endswith(
        "all 2 legs have every acknowledged write. etcd can't be asked now (silent): the mirror goes on as long as all "
        "legs in sync do; when one fails, clients wait until etcd is back, and until then no other node can be primary."
    )


def test_a_mirror_that_waits_for_etcd() -> None:
    found = explain(
        facts(
            WITH_ETCD, serving=True, connected=frozenset("a"), unheard={"b": "gone"}, voters=said(WITH_ETCD, "a"),
            suspended="its lease is over", arbiter="silent",
        )
    )  # fmt: skip
    assert found.state is MirrorState.FAULTED
    assert (
        "lets writes wait, since its lease is over. It goes on when etcd answers (silent), or b can be heard again."
        in (found.paragraph)
    )


def test_a_mirror_whose_primary_is_gone_and_that_etcd_decides_about() -> None:
    unheard = {"a": "no route to host"}
    found = explain(facts(WITH_ETCD, unheard=unheard, voters=said(WITH_ETCD, "b")))
    assert (
        "`terrace volume mirror promote` on a node with a leg in sync makes it primary once the lease of the last "
        "one is over" in (found.paragraph)
    )
    found = explain(facts(WITH_ETCD, unheard=unheard, voters=said(WITH_ETCD, "b"), arbiter="silent"))
    assert "The arbiter, etcd, can't be asked: silent." in found.paragraph


def test_what_no_leg_can_read_is_named_though_all_are_up_to_date() -> None:
    state = facts(AB, serving=True, connected=frozenset("ab"), voters=said(AB, "a", "b"), unreadable="bytes 0-4095")
    assert explain(state).paragraph.endswith(
        " But no leg can read bytes 0-4095: restore them from a backup, or write them anew."
    )
    assert "But no leg" not in explain(dataclasses.replace(state, unreadable="")).paragraph


def test_a_leg_that_is_away_and_may_have_what_no_other_one_can_read_comes_before_a_backup() -> None:
    def step(**more: object) -> str:
        state = facts(ALONE, serving=True, connected=frozenset("a"), unreadable="bytes 0-4095", away_s={"b": 9.0})
        return explain(dataclasses.replace(state, **more)).paragraph.partition(" But ")[2]  # type: ignore[arg-type]

    restore = "; else restore them from a backup, or write them anew."
    assert step(unheard={"b": "no route to host"}, voters=said(ALONE, "a")) == (
        "no leg in sync can read bytes 0-4095: start node b, whose leg may have them" + restore
    )
    assert step(voters=said(ALONE, "a", "b"), errors={"b": "the pool p is full"}) == (
        "no leg in sync can read bytes 0-4095: bring the leg on node b up to date again, which may have them" + restore
    )
    syncing = {"progress": {"b": Progress(1, 2, 3.0)}, "connected": frozenset("ab")}
    for inconsistent in (True, False):
        assert step(voters=said(ALONE, "a", "b", inconsistent=inconsistent), **syncing) == (
            "no leg in sync can read bytes 0-4095: wait for the resync of the leg on node b, which may have them"
            + restore
        )
    nothing = "no leg can read bytes 0-4095: restore them from a backup, or write them anew."
    interrupted = said(ALONE, "a") | said(ALONE, "b", inconsistent=True)
    assert step(voters=interrupted) == nothing, "a resync was interrupted there"
    assert step(voters=said(ALONE, "a", "b"), split={"b": "split brain: two histories"}) == nothing


def test_a_leg_that_is_kept_out_by_what_no_leg_can_read_is_not_called_out_of_reach_nor_nearly_done() -> None:
    why = "1 block(s), the first at byte 4096, can be read on no leg: write them anew, then it is brought up to date"
    going = {"b": Progress(8192, 8192, 0.0)}
    for more in ({"progress": going, "connected": frozenset("ab")}, {"away_s": {"b": 3.0}, "errors": {"b": why}}):
        state = facts(ALONE, serving=True, connected=frozenset("a"), kept_out={"b": why}, unreadable="bytes 4096-8191")
        found = explain(dataclasses.replace(state, **more))  # type: ignore[arg-type]
        assert found.paragraph.endswith(
            f"write. The leg on node b is kept out of sync: {why}. But no leg can read bytes 4096-8191: restore them "
            "from a backup, or write them anew."
        )
    # Before that is known, while it is still tried.
    going = {"b": Progress(8192, 8192, 0.0, unread_blocks=2)}
    found = explain(facts(ALONE, serving=True, connected=frozenset("ab"), progress=going))
    assert "is in resync: all is done but 2 block(s) that no leg could read, which is tried again." in found.paragraph


def test_a_leg_with_a_damaged_map_is_named_with_the_next_step_though_it_is_up_to_date() -> None:
    damage = {"b": "the map of the leg of fast/vol on node b is damaged: make it anew"}
    found = explain(facts(AB, serving=True, connected=frozenset("ab"), voters=said(AB, "a", "b"), map_damage=damage))
    assert found.state is MirrorState.ONLINE
    assert found.paragraph.endswith("write. The map of the leg of fast/vol on node b is damaged: make it anew.")
