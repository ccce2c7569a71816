"""A node's say: what it keeps in its home, what it tells peers, and what it refuses."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from replication import voters
from replication.cluster import NotStoredError, VoterState
from replication.keeper import LegKeeper, LegRecord
from replication.leg import Extents
from replication.membership import Term
from replication.promotion import Promote, promote
from replication.voters import (
    Handler,
    KeptVoter,
    LegsCluster,
    RemoteVoter,
    goes_first,
    handlers,
    state_from_json,
    state_to_json,
)
from tests.replication.nodes import Nodes
from tests.replication.stores import MIRROR, MemoryStore, first_record

TERM_2 = Term(2, "2" * 16)
FIRST = first_record("ab", diskless="t")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def tie_breaker(home: Path, clock: Clock | None = None) -> KeptVoter:
    return KeptVoter("t", home, lambda mirror: [], clock=clock or Clock())


class Loopback:
    """A `Caller` that carries JSON to a node's handlers."""

    def __init__(self, served: Mapping[str, Handler]) -> None:
        self.served = served

    async def call(self, method: str, params: dict[str, Any], timeout_s: float) -> Any:
        return json.loads(json.dumps(await self.served[method](json.loads(json.dumps(params)))))


def test_a_tie_breaker_keeps_its_promises_and_records_over_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        voter = tie_breaker(tmp_path, clock)
        with pytest.raises(OSError, match="knows nothing of a mirror") as refused:
            await voter.state(MIRROR)
        assert refused.value.errno == errno.ENOENT
        fenced: list[tuple[str, Term]] = []
        voter.on_fence.append(lambda mirror, term: fenced.append((mirror, term)))
        await voter.accept(FIRST)
        clock.now += 10
        await voter.prepare(MIRROR, TERM_2, "b")
        assert fenced == [(MIRROR, FIRST.term), (MIRROR, TERM_2)]
        (tmp_path / "voters" / f"{MIRROR}.new").write_text("torn by a crash before the rename")
        again = tie_breaker(tmp_path, clock)
        said = await again.state(MIRROR)
        assert (said.promised, said.accepted, said.candidates) == (TERM_2, FIRST, frozenset("b"))
        assert await again.mirrors() == {MIRROR}
        with pytest.raises(OSError, match="promised term 2") as refused:
            await again.accept(FIRST.next_epoch())
        assert refused.value.errno == errno.ESTALE
        await again.forget(MIRROR)
        assert await again.mirrors() == frozenset()

    trio.run(main)


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"version": 9}', b"[]"])
def test_a_tie_breaker_that_has_forgotten_its_promises_does_not_vote(tmp_path: Path, damage: bytes) -> None:
    async def main() -> None:
        await tie_breaker(tmp_path).accept(FIRST)
        path = tmp_path / "voters" / f"{MIRROR}.json"
        path.write_bytes(damage)
        with pytest.raises(OSError, match=str(path)) as refused:
            await tie_breaker(tmp_path).prepare(MIRROR, TERM_2, "b")
        assert refused.value.errno == errno.EPROTO

    trio.run(main)


def test_a_mirrors_id_from_a_peer_never_becomes_another_path(tmp_path: Path) -> None:
    async def main() -> None:
        for name in ("../../etc/passwd", "A" * 32, ""):
            with pytest.raises(OSError, match="no mirror's id") as refused:
                await tie_breaker(tmp_path).state(name)
            assert refused.value.errno == errno.EINVAL
        with pytest.raises(OSError, match="is no voter of mirror"):
            await tie_breaker(tmp_path).accept(first_record("ab"))

    trio.run(main)


def test_a_voter_promises_nothing_while_the_primary_may_serve(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        await tie_breaker(tmp_path, clock).accept(FIRST)
        voter = tie_breaker(tmp_path, clock)  # started again: it may have answered a heartbeat just before
        with pytest.raises(OSError, match=r"may promise nothing for 3\.0 s") as refused:
            await voter.prepare(MIRROR, TERM_2, "b")
        assert refused.value.errno == errno.EBUSY
        clock.now += 2
        await voter.heartbeat(MIRROR, FIRST.term)
        clock.now += 2.9
        with pytest.raises(OSError, match="node a"):
            await voter.prepare(MIRROR, TERM_2, "b")
        await voter.prepare(MIRROR, TERM_2, "a")  # the primary itself, started again
        await voter.prepare(MIRROR, Term(3, "3" * 16), "b", force=True)
        with pytest.raises(OSError, match="promised term 3") as refused:
            await voter.heartbeat(MIRROR, FIRST.term)
        assert refused.value.errno == errno.ESTALE

    trio.run(main)


@pytest.mark.parametrize("primary", ["a", None])
def test_a_voter_that_has_missed_the_record_of_a_later_primary_gives_that_one_its_lease(
    tmp_path: Path, primary: str | None
) -> None:
    async def main() -> None:
        clock = Clock()
        voter = tie_breaker(tmp_path, clock)
        await voter.accept(FIRST if primary else FIRST.next_epoch(primary=None, token="b"))
        clock.now += 10
        await voter.heartbeat(MIRROR, TERM_2)  # node b's, which a majority without this voter has made primary
        clock.now += 2.9
        with pytest.raises(OSError, match="may promise nothing") as refused:
            await voter.prepare(MIRROR, Term(3, "3" * 16), "a")
        assert refused.value.errno == errno.EBUSY
        clock.now += 0.2
        await voter.prepare(MIRROR, Term(3, "3" * 16), "a")

    trio.run(main)


@pytest.mark.parametrize("primary", ["a", None])
def test_nor_does_its_restart_take_that_lease_from_it(tmp_path: Path, primary: str | None) -> None:
    async def main() -> None:
        clock = Clock()
        voter = tie_breaker(tmp_path, clock)
        await voter.accept(FIRST if primary else FIRST.next_epoch(primary=None, token="b"))
        clock.now += 10
        await voter.heartbeat(MIRROR, TERM_2)  # of node b, which has no other majority than itself and this voter
        clock.now += 0.5
        voter = tie_breaker(tmp_path, clock)
        with pytest.raises(OSError, match="may promise nothing for") as refused:
            await voter.prepare(MIRROR, Term(3, "3" * 16), "a")
        assert refused.value.errno == errno.EBUSY
        await voter.heartbeat(MIRROR, TERM_2)
        clock.now += 3.1
        await voter.prepare(MIRROR, Term(3, "3" * 16), "a")

    trio.run(main)


def test_a_promise_tells_of_the_record_that_a_session_was_storing_when_it_was_asked_for(tmp_path: Path) -> None:
    async def main() -> None:
        stored = trio.Event()

        class Slow(MemoryStore):
            async def save(self, record: bytes, trackers: dict[str, Extents] | None = None) -> None:
                await stored.wait()
                await super().save(record, trackers)

        record = first_record("ab")
        keeper = LegKeeper(Slow(), LegRecord("a", accepted=record, promised=record.term), node="a", boot="1")
        voter = KeptVoter("a", tmp_path, lambda mirror: [keeper])
        out = record.next_epoch(in_sync=frozenset("a"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.accept, out)  # as a leg's session does, which knows nothing of voters

            @nursery.start_soon
            async def ends() -> None:
                await trio.testing.wait_all_tasks_blocked(0.01)
                stored.set()

            await trio.lowlevel.checkpoint()
            said = await voter.prepare(MIRROR, TERM_2, "b")
        assert keeper.record.accepted == out
        assert (said.accepted, said.candidates) == (out, frozenset())

    trio.run(main)


@pytest.mark.parametrize("serves", [False, True])
def test_a_leg_keeps_what_it_must_refuse_of_the_other_side_unless_it_serves_itself(
    tmp_path: Path, serves: bool
) -> None:
    async def main() -> None:
        store = MemoryStore()
        keeper = LegKeeper(store, LegRecord("a"), node="a", boot="1")
        voter = KeptVoter("a", tmp_path, lambda mirror: [keeper], is_primary=lambda mirror: serves)
        record = first_record("ab")
        await voter.accept(record)
        alone = record.next_epoch(in_sync=frozenset("a"))
        await voter.accept(alone)
        forced = record.next_term(TERM_2, "b", frozenset("b"), "fenced")
        with pytest.raises(OSError, match="split brain") as refused:
            await voter.accept(forced)
        assert refused.value.errno == errno.EUCLEAN
        store.crash()
        again = LegRecord.decode(store.record)
        assert (again.accepted, again.superseded) == (alone, None if serves else forced)
        if not serves:  # an operator decides for this side
            await voter.accept(alone.next_term(Term(3, "3" * 16), "a", frozenset("a"), "fenced"))
            assert keeper.record.superseded is None

    trio.run(main)


def test_a_tie_breaker_keeps_in_its_home_what_supersedes_its_record(tmp_path: Path) -> None:
    async def main() -> None:
        voter = tie_breaker(tmp_path)
        await voter.accept(FIRST)
        later = FIRST.next_term(TERM_2, "b", frozenset("b"))
        await voter.heard_of(later, "b", served=False)
        assert (await tie_breaker(tmp_path).state(MIRROR)).superseded == later
        await voter.accept(FIRST.next_epoch())  # of who was left behind
        assert (await tie_breaker(tmp_path).state(MIRROR)).superseded == later
        await voter.accept(later)
        assert (await tie_breaker(tmp_path).state(MIRROR)).superseded is None

    trio.run(main)


def test_ids_that_a_peer_makes_up_leave_nothing_behind(tmp_path: Path) -> None:
    async def main() -> None:
        voter = tie_breaker(tmp_path)
        for number in range(50):
            made_up = f"{number:032x}"
            with pytest.raises(OSError, match="knows nothing of"):
                await voter.state(made_up)
            with pytest.raises(OSError, match="knows nothing of"):
                await voter.prepare(made_up, TERM_2, "b")
            with pytest.raises(OSError, match="knows nothing of"):
                await voter.heartbeat(made_up, TERM_2)
            with pytest.raises(OSError, match="is no voter of"):
                await voter.accept(dataclasses.replace(first_record("ab"), mirror=made_up))
        assert (voter._files, voter._locks, voter._lease._heard, voter._lease._terms) == ({}, {}, {}, {})
        assert await voter.mirrors() == frozenset()

    trio.run(main)


def test_a_node_is_the_tie_breaker_of_so_many_mirrors_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(voters, "MAX_MIRRORS", 2)
        voter = tie_breaker(tmp_path)
        for digit in "12":
            await voter.accept(dataclasses.replace(FIRST, mirror=digit * 32))
        with pytest.raises(OSError, match="a voter of 2 mirrors that it has no leg of") as refused:
            await voter.accept(FIRST)
        assert refused.value.errno == errno.ENOSPC
        await voter.accept(dataclasses.replace(FIRST, mirror="1" * 32).next_epoch())
        await voter.forget("1" * 32)
        await voter.accept(FIRST)

    trio.run(main)


def test_a_voter_that_was_removed_lets_no_primary_go_on_that_was_fenced_before(tmp_path: Path) -> None:
    async def main() -> None:
        voter = tie_breaker(tmp_path, clock := Clock())
        await voter.accept(FIRST)
        clock.now += 10
        await voter.prepare(MIRROR, TERM_2, "b")
        record = FIRST.next_term(TERM_2, "b", frozenset("b"))
        await voter.accept(record)
        without = record.next_epoch(voters=("a", "b"))
        await voter.retire(without)
        for one in (voter, tie_breaker(tmp_path, clock)):
            with pytest.raises(OSError, match="promised term 2"):
                await one.accept(FIRST.next_epoch(in_sync=frozenset("a")))
            assert (await one.state(MIRROR)).accepted == without  # which a candidate must find that knows FIRST
        await voter.accept(without.next_epoch(voters=FIRST.voters))  # it is one again

    trio.run(main)


def test_of_the_mirrors_that_it_was_removed_from_a_voter_remembers_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(voters, "MAX_RETIRED", 3)
        voter = tie_breaker(tmp_path)
        await voter.accept(FIRST)
        for digit in "123456":
            await voter.retire(dataclasses.replace(first_record("ab"), mirror=digit * 32))
        assert await voter.mirrors() == {MIRROR, "4" * 32, "5" * 32, "6" * 32}

    trio.run(main)


def test_a_node_that_serves_refuses_candidates(tmp_path: Path) -> None:
    async def main() -> None:
        keeper = LegKeeper(MemoryStore(), LegRecord("a"), node="a", boot="1")
        voter = KeptVoter("a", tmp_path, lambda mirror: [keeper], is_primary=lambda mirror: True)
        await voter.accept(first_record("ab"))
        with pytest.raises(OSError, match="node a is primary and alive") as refused:
            await voter.prepare(MIRROR, TERM_2, "b")
        assert refused.value.errno == errno.EBUSY
        await voter.prepare(MIRROR, TERM_2, "b", force=True)

    trio.run(main)


def test_a_primary_whose_disk_is_dead_keeps_in_its_home_that_its_leg_is_out(tmp_path: Path) -> None:
    async def main() -> None:
        store = MemoryStore()
        keeper = LegKeeper(store, LegRecord("a"), node="a", boot="1")
        voter = KeptVoter("a", tmp_path, lambda mirror: [keeper])
        record = first_record("ab")
        await voter.accept(record)
        store.failing = "dead"
        out = record.next_epoch(in_sync=frozenset("b"))
        await voter.accept(out)
        with pytest.raises(OSError, match="the disk has failed"):
            await voter.accept(out.next_epoch(in_sync=frozenset("ab")))
        store.failing = ""
        store.crash()  # the disk is back, with what it knew
        keeper = LegKeeper(store, LegRecord.decode(store.record), node="a", boot="1")
        assert keeper.record.accepted == record
        again = KeptVoter("a", tmp_path, lambda mirror: [keeper])
        assert (await again.state(MIRROR)).accepted == out

    trio.run(main)


def test_whose_leg_couldnt_store_a_record_is_told_and_who_wasnt_heard_isnt_one_of_them() -> None:
    async def main() -> None:
        nodes = Nodes("abc", timeout_s=0.5)
        record = first_record("abc")
        for node in nodes.all.values():
            await node.voter.accept(record)
        for unable, number, failing in (
            ("b", errno.ETIMEDOUT, "full"),
            ("b", errno.ETIMEDOUT, "dead"),
            ("a", errno.ENOSPC, "full"),
            ("a", errno.EIO, "dead"),
            ("", errno.ETIMEDOUT, ""),
        ):
            nodes.all["c"].up = bool(failing)
            if unable:
                nodes.all[unable].store.failing = failing
            record = record.next_epoch()
            with pytest.raises(NotStoredError) as refused:
                await nodes.cluster("a").commit(record, expected=first_record("abc"))
            assert refused.value.errno == number and set(refused.value.unable) == set(unable)
            if unable:
                nodes.all[unable].store.failing = ""

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("failing", ["dead", "full"])
def test_a_leg_that_its_node_has_left_out_and_that_can_store_nothing_holds_up_no_promotion(
    tmp_path: Path, failing: str
) -> None:
    """Its node promises by its home; but a record with the leg in sync would never be stored there."""

    async def main() -> None:
        clock = Clock()
        stores = {node: MemoryStore() for node in "abc"}
        keepers = {node: LegKeeper(stores[node], LegRecord(node), node=node, boot="1") for node in "abc"}

        def voter(node: str) -> KeptVoter:
            return KeptVoter(node, tmp_path / node, lambda mirror: [keepers[node]], clock=clock)

        voters = {node: voter(node) for node in "abc"}
        record = first_record("abc")
        for one in voters.values():
            await one.accept(record)
        stores["a"].failing = failing
        await voters["a"].accept(record.next_epoch(in_sync=frozenset("bc")))  # and is killed: no other one has it
        voters["a"] = voter("a")
        clock.now += 10

        async def known(mirror: str) -> str:
            return "abc"

        cluster = LegsCluster("b", voters.__getitem__, known, timeout_s=0.5)
        decision = await promote("b", MIRROR, "abc", voters.__getitem__, cluster)
        assert isinstance(decision, Promote)
        assert decision.membership.in_sync == {"b", "c"}
        said = await voters["a"].state(MIRROR)
        assert (said.promised, said.accepted) == (decision.membership.term, decision.membership)

    trio.run(main)


def test_a_remote_voter_says_what_the_node_says(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        kept = tie_breaker(tmp_path, clock)
        remote = RemoteVoter("t", Loopback(handlers(kept)))
        await remote.accept(FIRST)
        clock.now += 10
        assert await remote.state(MIRROR) == await kept.state(MIRROR)
        await remote.heartbeat(MIRROR, FIRST.term)
        assert (await remote.state(MIRROR)).heard_s == 0
        clock.now += 10
        said = await remote.prepare(MIRROR, TERM_2, "b")
        assert (said.promised, said.candidates) == (TERM_2, frozenset())
        with pytest.raises(OSError, match="promised term 2"):
            await remote.accept(FIRST.next_epoch())
        with pytest.raises(OSError, match="says that it is node t") as refused:
            await RemoteVoter("b", Loopback(handlers(kept))).state(MIRROR)
        assert refused.value.errno == errno.EPROTO

    trio.run(main)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("voter.state", {}),
        ("voter.state", {"mirror": 1}),
        ("voter.prepare", {"mirror": MIRROR, "term": [1], "candidate": "b", "force": False}),
        ("voter.prepare", {"mirror": MIRROR, "term": [2, "x"], "candidate": None, "force": False}),
        ("voter.accept", {}),
        ("voter.accept", {"membership": {"version": 1}}),
        ("voter.heartbeat", {"mirror": MIRROR, "term": None}),
    ],
)
def test_a_call_that_makes_no_sense_is_refused_with_a_sentence(
    tmp_path: Path, method: str, params: dict[str, Any]
) -> None:
    async def main() -> None:
        with pytest.raises(OSError, match=r"voter|record") as refused:
            await handlers(tie_breaker(tmp_path))[method](params)
        assert refused.value.errno in (errno.EINVAL, errno.EPROTO)

    trio.run(main)


def test_a_state_survives_its_encoding_and_nonsense_is_refused() -> None:
    state = VoterState("b", TERM_2, FIRST, frozenset({"a"}), True, 1.5, False, True, 4096, FIRST.next_epoch(), "full")
    plain = json.loads(json.dumps(state_to_json(state)))
    assert state_from_json(plain) == state
    for damage in ({"node": 1}, {"promised": [1]}, {"accepted": 1}, {"heard_s": "x"}, {"intact": 1}):
        with pytest.raises(OSError, match=r"record|answer") as refused:
            state_from_json(plain | damage)
        assert refused.value.errno == errno.EPROTO


def test_a_record_counts_at_a_majority_and_at_each_of_its_legs() -> None:
    three, two = FIRST, first_record("ab")
    alone = three.next_epoch(in_sync=frozenset("a"))
    assert not voters.counts(alone, three, frozenset("a")) and not voters.counts(alone, three, frozenset("bt"))
    assert voters.counts(alone, three, frozenset("at")) and voters.counts(alone, three, frozenset("ab"))
    assert voters.counts(two.next_epoch(in_sync=frozenset("a")), two, frozenset("a"))
    # Who changes the voters needs both majorities.
    fewer = dataclasses.replace(alone, voters=("a",))
    assert not voters.counts(fewer, three, frozenset("a")) and voters.counts(fewer, three, frozenset("at"))


def test_what_takes_from_a_primary_that_it_may_go_on_alone_is_stored_there_first() -> None:
    two = first_record("ab")
    assert goes_first("a", two.next_epoch(primary=None, token="b"), two)
    assert goes_first("a", two.next_epoch(in_sync=frozenset("b")), two)
    assert not goes_first("a", two.next_epoch(in_sync=frozenset("a")), two)
    assert not goes_first("b", two.next_term(TERM_2, "b", frozenset("ab")), two)


def test_what_counts_is_found_also_where_nodes_have_come_to_the_mirror_since() -> None:
    async def main() -> None:
        nodes = Nodes("abc", timeout_s=0.3)

        async def at_first(mirror: str) -> tuple[str, ...]:
            await trio.lowlevel.checkpoint()
            return ("a", "b")

        cluster = LegsCluster("a", nodes.voter("a"), at_first, timeout_s=0.3)
        first = first_record("ab")
        await cluster.create(first)
        of_three = first_record("abc")
        later = dataclasses.replace(first, legs=of_three.legs, voters=of_three.voters).next_epoch()
        await cluster.commit(later, expected=first)
        # The others go on without the primary of before.
        taken = later.next_term(TERM_2, "b", frozenset("bc"))
        for name in "bc":
            await nodes.all[name].voter.accept(taken)
        assert await cluster.newest(first.mirror) == taken

    trio.run(main)
