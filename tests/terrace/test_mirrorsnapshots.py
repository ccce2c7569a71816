"""Snapshots through mirrors: what legs owe is never a snapshot that means something else by now."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

import terrace.mirrorsnapshots
from replication.membership import Generation, LegInfo, Membership, Term
from terrace.duedeletions import Due, DueDeletions
from terrace.mirrorsnapshots import MirrorSnapshots
from tests.replication.stores import first_record
from tiers import TierError


class Served:
    """Hashed by identity, as mirrors are."""

    def __init__(self, membership: Membership) -> None:
        self.membership = membership
        self.name = "p/v"


class Scene:
    """Node a is the primary of p/v."""

    def __init__(self, home: Path, record: Membership) -> None:
        self.told: list[str] = []
        mirrors: Any = SimpleNamespace(node="a", tell=lambda kind, subject, text: self.told.append(text))
        self.due = DueDeletions(home, lambda kind, subject, text: self.told.append(text))
        self.snapshots = MirrorSnapshots(mirrors, self.due)
        self.served: Any = Served(record)
        local = SimpleNamespace(serves=True, mirror=self.served, starting=False)
        mirrors.of = lambda volume: local
        self.pool: Any = SimpleNamespace(volume=lambda name: SimpleNamespace(name=f"p/{name}", mirror_record=b"{}"))

    def owed(self) -> dict[str, tuple[str, ...]]:
        return {one.leg: one.names for one in self.due.of(self.served.membership.mirror)}


def owes(record: Membership, leg: str, *names: str) -> Due:
    return Due(record.mirror, leg, leg, record.term, record.epoch, names)


def test_a_name_of_before_another_primary_is_not_owed_anew_with_a_later_one(tmp_path: Path) -> None:
    async def main() -> None:
        first = first_record("ab")
        scene = Scene(tmp_path, first)
        await scene.due.add(owes(first, "b", "old"))
        terms = Term(first.term.number + 1, "b" * 16), Term(first.term.number + 2, "c" * 16)
        between, now = Generation(terms[0], 0, "b"), Generation(terms[1], 0, "a")
        scene.served.membership = replace(first, term=terms[1], epoch=0, history=(*first.history, between, now))
        left = await scene.snapshots._delete_elsewhere({}, {scene.served: {"b": {"new"}}}, remember=True)
        assert scene.owed() == {"b": ("new",)} and "deletes new" in left[0]
        assert len(scene.told) == 1 and scene.told[0].startswith("old of p/v may be left on node b")

    trio.run(main)


def test_what_is_asked_for_while_older_debts_are_given_up_is_owed(tmp_path: Path) -> None:
    async def main() -> None:
        first = first_record("abc")
        scene = Scene(tmp_path, first)
        for leg in "bc":
            await scene.due.add(owes(first, leg, "old"))
        now = first.next_term(Term(2, "b" * 16), "b", frozenset("abc")).next_epoch(primary=None)
        scene.served.membership = now = now.next_term(Term(3, "c" * 16), "a", frozenset("a"))
        drop = scene.due.drop

        async def slow(mirror: str, leg: str, *names: Any, **only: Any) -> None:
            if leg == "b" and leg in scene.owed():  # a disk that takes its time, and an operator who deletes meanwhile
                await scene.snapshots._delete_elsewhere({}, {scene.served: {"c": {"new"}}}, remember=True)
            await drop(mirror, leg, *names, **only)

        scene.due.drop = slow  # type: ignore[method-assign]
        await scene.snapshots._settle(scene.served)
        assert scene.owed() == {"c": ("new",)}

    trio.run(main)


def test_a_leg_that_comes_back_while_a_snapshot_is_taken_does_not_owe_its_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        record = first_record("abc").next_epoch(in_sync=frozenset("ab"))
        scene = Scene(tmp_path, record)
        for leg in "abc":
            await scene.due.add(owes(record, leg, "one", "two"))

        async def take(names: Any, here: Any) -> Any:
            await trio.lowlevel.checkpoint()
            assert scene.snapshots._settling.locked(), "what it takes could be deleted in this moment"
            assert scene.owed() == {"a": ("two",), "b": ("two",), "c": ("one", "two")}
            return {mirror: {"b": "its pool is full"} for mirror in names}

        monkeypatch.setattr(terrace.mirrorsnapshots, "take_at_once", take)
        assert await scene.snapshots.take(scene.pool, [("v", "one")]) == {"v": {"b": "its pool is full"}}
        assert scene.owed() == {"a": ("two",), "b": ("two",), "c": ("two",)}

    trio.run(main)


def test_what_is_taken_while_one_of_its_name_is_being_deleted_is_never_owed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leg that was away for the deletion may be back for what is taken next."""

    async def main() -> None:
        scene = Scene(tmp_path, first_record("ab"))
        there = [SimpleNamespace(short_name="one")]
        scene.pool.name, scene.pool.snapshots = "p", lambda volume: list(there)
        taken: list[str] = []

        async def delete(wanted: Any) -> None:
            there.clear()
            await trio.lowlevel.checkpoint()
            with pytest.raises(TierError, match="p/v@one is being deleted at this moment"):
                await scene.snapshots.take(scene.pool, [("v", "one")])
            await scene.snapshots.take(scene.pool, [("v", "two")])

        async def take(names: Any, here: Any) -> Any:
            await trio.lowlevel.checkpoint()
            taken.extend(names.values())
            return {mirror: {} for mirror in names}

        async def ask(mirror: Any) -> Any:
            await trio.lowlevel.checkpoint()
            return {LegInfo("b", "b", "p/v"): None}

        scene.pool.delete_snapshots = delete
        monkeypatch.setattr(scene.snapshots, "_ask", ask)
        monkeypatch.setattr(terrace.mirrorsnapshots, "take_at_once", take)
        (left,) = await scene.snapshots.delete(scene.pool, [("v", "one")])
        assert "deletes one" in left and scene.owed() == {"b": ("one",)} and taken == ["two"]
        await scene.snapshots.take(scene.pool, [("v", "one")])
        assert scene.owed() == {} and taken == ["two", "one"]

    trio.run(main)


def test_a_leg_on_an_nbd_server_is_not_told_as_a_node_without_the_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        record = first_record("ab")
        record = replace(record, legs=(*record.legs, LegInfo("n", "a", "nbd://nas/v", "nbd")))
        scene = Scene(tmp_path, record)

        async def take(names: Any, here: Any) -> Any:
            await trio.lowlevel.checkpoint()
            return {mirror: {"b": "it is Offline", "n": "there are no snapshots"} for mirror in names}

        monkeypatch.setattr(terrace.mirrorsnapshots, "take_at_once", take)
        assert await scene.snapshots.take(scene.pool, [("v", "one")]) == {"v": {"b": "it is Offline"}}

    trio.run(main)


def test_nobody_gives_a_snapshot_of_a_mirror_a_name_that_resyncs_delete(tmp_path: Path) -> None:
    async def main() -> None:
        scene = Scene(tmp_path, first_record("ab"))
        for local in (False, True):
            with pytest.raises(TierError, match="resyncs give, and delete"):
                await scene.snapshots.take(scene.pool, [("v", "resync-20261130-120000")], local=local)
            with pytest.raises(TierError, match="resyncs give, and delete"):
                await scene.snapshots.change(scene.pool, "v", "daily", new_name="resync-20261130-120000", local=local)

    trio.run(main)


@pytest.mark.parametrize(("here", "said"), [("ab", r"p/v@two already: choose"), ("b", "p/v@two on node b already")])
def test_a_rename_to_a_name_that_is_taken_says_where_it_is(tmp_path: Path, here: str, said: str) -> None:
    async def main() -> None:
        record = first_record("ab")
        scene = Scene(tmp_path, record)

        async def ask(mirror: Any) -> Any:
            await trio.lowlevel.checkpoint()
            return {leg: {"one", "two"} for leg in record.legs if leg.node == "b"}

        scene.snapshots._ask = ask  # type: ignore[method-assign]
        names = ["one", "two"] if "a" in here else ["one"]
        local: Any = scene.snapshots._mirrors.of(None)  # type: ignore[arg-type]
        local.volume_snapshots = lambda: [SimpleNamespace(short_name=name) for name in names]
        scene.pool.snapshot = lambda volume, name: None
        with pytest.raises(TierError, match=said):
            await scene.snapshots.change(scene.pool, "v", "one", new_name="two")

    trio.run(main)
