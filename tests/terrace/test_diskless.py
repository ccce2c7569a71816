"""A part in a mirror without a leg: what its file says, and when its term is over."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from replication.cluster import VoterState
from replication.durable import remove_file
from replication.membership import Membership, Term
from replication.voters import KeptVoter, LegsCluster
from terrace.diskless import DisklessMirror, Participation, participation, path_of, store, superseded
from terrace.disklessmirrors import DisklessMirrors
from terrace.exports import PoolExports
from terrace.primary import MirrorPart
from tests.replication.nodes import Nodes
from tests.replication.stores import MIRROR, first_record
from tiers import TierError

SERVED = first_record("ab", primary="c")
TERM_2 = Term(2, "2" * 16)


def test_what_is_written_down_is_read_again_and_goes(tmp_path: Path) -> None:
    written = Participation("p/v", 12.5, SERVED, TERM_2)
    path = path_of(tmp_path, MIRROR)
    store(path, written.encode())
    store(path, written.encode())
    assert Participation.decode(path.read_bytes()) == written
    earlier = json.loads(written.encode())
    del earlier["elsewhere"]
    assert Participation.decode(json.dumps(earlier).encode()) == Participation("p/v", 12.5, SERVED)
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    remove_file(path)
    remove_file(path)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "has version 2, and 1 is understood"),
        ({"name": "p"}, "doesn't name a volume"),
        ({"name": "p/.."}, "name"),
        ({"name": 7}, "doesn't name a volume"),
        ({"since": "now"}, "can't be understood"),
        ({"membership": {}}, "can't be understood"),
        ({"membership": None}, "can't be understood"),
        ({"elsewhere": [2]}, "can't be understood"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(changes: dict[str, Any], said: str) -> None:
    plain = json.loads(Participation("p/v", 0.0, SERVED).encode()) | changes
    with pytest.raises(OSError, match=said):
        Participation.decode(json.dumps(plain).encode())


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"null", b"[" * 100_000])
def test_any_bytes_are_refused_with_a_sentence(data: bytes) -> None:
    with pytest.raises(OSError, match="understood") as refused:
        Participation.decode(data)
    assert refused.value.errno == errno.EPROTO


@pytest.mark.parametrize("name", ["../x", "0" * 31, "G" * 32, "0" * 32 + "/x"])
def test_what_a_peer_calls_a_mirror_never_becomes_another_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match="is no mirror's id"):
        path_of(tmp_path, name)


def said(node: str, accepted: Membership | None = SERVED, promised: Term | None = None) -> VoterState:
    return VoterState(node, promised or (accepted.term if accepted else None), accepted, frozenset({"b"}))


def test_a_term_without_its_legs_is_over_only_when_others_cant_take_it_back() -> None:
    taken = SERVED.next_term(TERM_2, "b", frozenset("ab"))
    for states, over in (
        ([], None),
        ([said("a"), said("b")], None),
        ([said("a"), said("b", promised=TERM_2)], None),  # a alone would do, without b
        ([said("b", promised=TERM_2)], None),  # a may come back, and have promised nothing
        ([said("a", promised=TERM_2), said("b", promised=TERM_2)], "every leg in sync has promised a later term to b"),
        ([said("a", taken)], "node b is primary since term 2"),
        ([said("a", SERVED.next_epoch(in_sync=frozenset("a")))], None),  # our own record
        ([said("a", taken.next_epoch(primary=None))], "nobody is primary since term 2"),
    ):
        assert superseded(SERVED, {state.node: state for state in states}) == over


def test_where_a_majority_decides_a_term_is_over_when_none_is_left_for_it() -> None:
    served = first_record("abd", primary="c")
    told = "2 of 3 voters have promised a later term to b"
    for promised, over in (("", None), ("b", None), ("ab", told)):
        states = {node: said(node, served, TERM_2 if node in promised else None) for node in "abd"}
        assert superseded(served, states) == over


@pytest.mark.parametrize(("outdated", "ends"), [(True, True), (False, False)])
def test_a_primary_without_a_leg_whose_record_is_refused_while_it_has_a_leg_finds_out_why(
    outdated: bool, ends: bool
) -> None:
    """Else it would wait for good for a record that can't count, and nobody could be promoted while it does."""

    async def main() -> None:
        fenced: list[OSError] = []
        served = first_record("abd", primary="c")
        mirror: Any = SimpleNamespace(
            lost=False, excluding={"a", "b"}, records=SimpleNamespace(outdated=outdated), ended=trio.Event(),
            membership=served, fence=fenced.append,
        )  # fmt: skip

        async def states() -> dict[str, VoterState]:
            await trio.lowlevel.checkpoint()
            return {node: said(node, served, TERM_2 if node in "ab" else None) for node in "abd"}

        with trio.move_on_after(1.5):
            await DisklessMirror._look_out(cast("Any", SimpleNamespace(_states=states)), mirror)
        assert [error.errno for error in fenced] == [errno.ESTALE] * ends

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_the_record_by_which_a_node_without_a_leg_is_primary_is_in_its_home_last_and_what_ends_it_first(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        nodes = Nodes("ab", timeout_s=0.2)
        first = first_record("ab", primary="a")
        for node in nodes.all.values():
            await node.voter.accept(first)
        home = KeptVoter("c", tmp_path, lambda mirror: [])
        remote = nodes.voter("c")
        cluster = LegsCluster("c", lambda node: home if node == "c" else remote(node), nodes.known, timeout_s=0.2)
        served = first.next_term(TERM_2, "c", frozenset("ab"))
        nodes.all["b"].up = False
        with pytest.raises(OSError, match="isn't stored"):
            await cluster.commit(served, expected=first)
        with pytest.raises(OSError, match="knows nothing"):
            await home.state(MIRROR)
        nodes.all["b"].up = True
        await cluster.commit(served, expected=first)
        assert (await KeptVoter("c", tmp_path, lambda mirror: []).state(MIRROR)).accepted == served
        nodes.all["a"].up = nodes.all["b"].up = False
        demoted = served.next_epoch(primary=None, token="a")
        with pytest.raises(OSError, match="isn't stored"):
            await cluster.commit(demoted, expected=served)
        assert (await home.state(MIRROR)).accepted == demoted

    trio.run(main)


class NoPools:
    """Of a node that has but one, called `local`."""

    def slots(self) -> list[Any]:
        return [SimpleNamespace(name="local")]

    def open_pools(self) -> Iterator[Any]:
        return iter(())

    def open_volumes(self) -> Iterator[Any]:
        return iter(())

    def pool(self, name: str) -> Any:
        raise TierError(errno.ENOENT, f"there is no pool {name!r}")


def mirrors(home: Path, told: list[str]) -> tuple[DisklessMirrors, Any]:
    """Of node c, which knows a and b."""

    def peer(name: str) -> None:
        if name not in "ab":
            raise OSError(errno.ENOENT, f"there is no peer {name!r}")

    node: Any = SimpleNamespace(
        peers=SimpleNamespace(node="c", peer=peer),
        own_voter=KeptVoter("c", home, lambda mirror: []),
        tell=lambda kind, subject, text: told.append(text),
        disconnect=lambda name: 0,
    )

    async def live(mirror: Any) -> None:
        await trio.sleep_forever()

    return DisklessMirrors(cast(Any, NoPools()), home, node, live), node


def test_what_the_home_keeps_is_taken_up_at_a_start_and_what_cant_be_understood_is_told_of(tmp_path: Path) -> None:
    async def main() -> None:
        told: list[str] = []
        found, node = mirrors(tmp_path, told)
        store(path_of(tmp_path, MIRROR), Participation("p/v", 0.0, SERVED).encode())
        store(path_of(tmp_path, "0" * 32), Participation("p/w", 0.0, SERVED).encode())  # of another mirror
        store(path_of(tmp_path, "1" * 32), b"nonsense")
        later = SERVED.next_epoch(in_sync=frozenset("a"))
        await node.own_voter.accept(later)
        async with trio.open_nursery() as nursery:
            await found.start(nursery)
            (mirror,) = found.all()
            assert mirror.name == "p/v" and mirror.starting and mirror.membership == later
            assert len(told) == 2 and all("can't be used" in text for text in told)
            assert found.pools() == ["p"] and found.at("p", "v") is mirror and found.at("p", "w") is None
            with pytest.raises(TierError, match="p/v without a leg"):
                found.require_free("p")
            found.require_free("q")
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_name_must_be_nobody_elses_here_and_all_legs_nodes_be_peers(tmp_path: Path) -> None:
    found, node = mirrors(tmp_path, [])
    found.judge("p/v", SERVED)
    for name, membership, why in (
        ("local/v", SERVED, "node c has a pool local itself.*--as POOL/VOL"),
        ("v", SERVED, "write POOL/VOL"),
        ("p/v", first_record("ac"), "node c has a leg of that mirror"),
        ("p/v", first_record("ad"), "there is no peer 'd'"),
    ):
        with pytest.raises(OSError, match=why):
            found.judge(name, membership)
    with pytest.raises(OSError, match="on node c, run `terrace volume mirror promote local/v --from a --as POOL/VOL`"):
        found.judge("local/v", SERVED, asked_by="a")  # a demotion has no --as
    node.peers.node = ""
    with pytest.raises(OSError, match="this node has no name"):
        found.judge("p/v", SERVED)


def test_clients_of_a_mirror_without_a_leg_are_counted_and_it_is_listed_and_the_default(tmp_path: Path) -> None:
    async def main() -> None:
        found, node = mirrors(tmp_path, [])
        mirror = DisklessMirror(tmp_path, Participation("p/v", 0.0, SERVED), node)
        served: Any = SimpleNamespace(read_only=False, name="p/v", mirrored_volume=mirror.stood_for)
        served.started, served.ended = trio.Event(), trio.Event()
        served.started.set()
        served.membership = SERVED
        mirror.mirror = served
        found._mirrors["p/v"] = mirror
        exports = PoolExports(cast(Any, NoPools()), cast(Any, SimpleNamespace(diskless=found)))
        assert exports.list() == [("p/v", "1 MiB mirrored volume")]
        for name in ("p/v", ""):
            export = await exports.acquire(name)
            assert export is served and mirror.stood_for.open_count == 1
            assert exports.identity(export) == mirror.record.identity == f"mirror/{MIRROR}"
            exports.release(export)
            assert mirror.stood_for.open_count == 0
        mirror.mirror = None
        assert exports.list() == []
        with pytest.raises(OSError, match="being started"):
            await exports.acquire("p/v")
        with pytest.raises(FileNotFoundError):
            await exports.acquire("p/w")

    trio.run(main)


def test_who_has_in_memory_what_was_before_another_node_was_primary_never_gets_what_came_of_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        _, node = mirrors(tmp_path, [])
        seen = []
        records: list[Membership] = []

        async def proven(part: Any, **options: Any) -> Membership:
            await trio.lowlevel.checkpoint()
            return records.pop()

        async def nobody(part: Any) -> dict[str, VoterState]:
            await trio.lowlevel.checkpoint()
            return {}

        monkeypatch.setattr(MirrorPart, "_proven", proven)
        monkeypatch.setattr(DisklessMirror, "_states", nobody)
        by_a = first_record("ab", primary="a")
        mirror = DisklessMirror(tmp_path, participation("p/v", by_a, "c"), node)
        for number, who in ((2, "c"), (3, "c"), (4, "b"), (5, "c"), (6, "c")):
            by_a = by_a.next_term(Term(number, f"{number}" * 16), who, frozenset("ab"))
            if who == "c":
                records.append(by_a)
                await mirror._proven(force=True)
                kept = Participation.decode(path_of(tmp_path, MIRROR).read_bytes())
                again = DisklessMirror(tmp_path, kept, node)
                assert again.identity == mirror.identity  # a daemon that is restarted goes on
                seen.append(mirror.identity)
        assert seen[0] == seen[1] != seen[2] == seen[3]
        # Demoted here, and let go: the next time it is the same only if nobody else was primary in between.
        ended = by_a.next_epoch(primary=None)
        assert DisklessMirror(tmp_path, participation("p/v", ended, "c"), node).identity == seen[3]
        ended = ended.next_term(Term(7, "7" * 16), "a", frozenset("ab")).next_epoch(primary=None)
        assert DisklessMirror(tmp_path, participation("p/v", ended, "c"), node).identity != seen[3]

    trio.run(main)


@pytest.mark.parametrize("is_voter", [True, False])
def test_a_node_that_became_a_voter_while_it_was_primary_keeps_its_promises_when_it_lets_the_mirror_go(
    tmp_path: Path, is_voter: bool
) -> None:
    async def main() -> None:
        _, node = mirrors(tmp_path, [])
        mirror = DisklessMirror(tmp_path, Participation("p/v", 0.0, SERVED), node)
        await node.own_voter.accept(SERVED)
        await mirror.begin()
        later = SERVED.next_epoch(voters=(*SERVED.voters, *("c" if is_voter else "")))
        await node.own_voter.accept(later)  # as the record counts that this node writes
        mirror._closing.set()
        mirror._gone.set()
        await mirror.forget()
        again = KeptVoter("c", tmp_path, lambda mirror: [])
        if is_voter:
            assert (await again.state(MIRROR)).promised == SERVED.term
        else:
            with pytest.raises(OSError, match="knows nothing"):
                await again.state(MIRROR)

    trio.run(main)


@pytest.mark.parametrize("number", [2, 3])
def test_a_node_without_a_leg_never_changes_to_the_other_side_of_a_split_brain_by_itself(
    tmp_path: Path, number: int
) -> None:
    async def main() -> None:
        _, node = mirrors(tmp_path, [])
        ours = SERVED.next_term(TERM_2, "c", frozenset("ab"))
        forced = SERVED.next_term(Term(number, "f" * 16), "b", frozenset("b"), "apart")
        mirror = DisklessMirror(tmp_path, Participation("p/v", 0.0, ours), node)
        await node.own_voter.accept(ours)
        later = ours.next_epoch(in_sync=frozenset("a"))
        records = {"a": later, "b": forced}

        class OtherVoter:
            def __init__(self, name: str) -> None:
                self.name = name

            async def state(self, mirror_id: str) -> VoterState:
                await trio.lowlevel.checkpoint()
                return said(self.name, records[self.name])

        node.voter = OtherVoter
        await mirror._learn()
        assert mirror.membership == later and mirror.is_named_primary
        assert (await node.own_voter.state(MIRROR)).accepted == later
        records["a"] = later.next_term(Term(4, "4" * 16), "a", frozenset("a"))
        await mirror._learn()
        assert mirror.membership == records["a"]

    trio.run(main)
