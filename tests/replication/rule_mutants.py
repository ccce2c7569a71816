"""Rules with one mistake each: the model must find all of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

import replication.keeper
import replication.lineage
import replication.orders
import replication.promotion
import replication.voters
from replication.keeper import LegKeeper, LegRecord
from replication.membership import Membership, Term
from replication.voters import KeptVoter, in_sync_nodes, is_majority, rule_of
from tests.replication.nodes import MemoryVoter

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mutant:
    says: str
    patch: Patch


def _older_terms(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(replication.keeper, "allowed", lambda promised, term: True)


def _promise_in_memory(patch: pytest.MonkeyPatch) -> None:
    async def prepare(self: LegKeeper, term: Term, candidate: str = "") -> LegRecord:
        before = self.record
        replication.keeper.judge_prepare(before.promised, term, "it")
        self.record = dataclasses.replace(before, promised=term, candidates=before.candidates | {candidate})
        self._fence(term)
        return dataclasses.replace(before, promised=term)

    patch.setattr(LegKeeper, "prepare", prepare)


def _without_legs(patch: pytest.MonkeyPatch) -> None:
    def counts(new: Membership, expected: Membership | None, stored: frozenset[str]) -> bool:
        return is_majority(stored, new.voters) if rule_of(new) == "majority" else in_sync_nodes(new) <= stored

    patch.setattr(replication.voters, "counts", counts)


def _without_majority(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(replication.voters, "counts", lambda new, expected, stored: in_sync_nodes(new) <= stored)


def _own_always_last(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(replication.voters, "goes_first", lambda node, new, expected: False)


def _token_for_two(patch: pytest.MonkeyPatch) -> None:
    real = replication.promotion._may_go_alone

    def may_go_alone(me: str, heard: Mapping[str, Any], newest: Membership) -> bool:
        return real(me, heard, dataclasses.replace(newest, token=me) if newest.primary is None else newest) or (
            newest.primary is None and me in heard and heard[me].accepted == newest
        )

    patch.setattr(replication.promotion, "_may_go_alone", may_go_alone)


def _alone_whatever_was_promised(patch: pytest.MonkeyPatch) -> None:
    real = replication.promotion._may_go_alone
    patch.setattr(
        replication.promotion,
        "_may_go_alone",
        lambda me, heard, newest: real(
            me, {node: dataclasses.replace(one, candidates=frozenset()) for node, one in heard.items()}, newest
        ),
    )


def _own_record_only(patch: pytest.MonkeyPatch) -> None:
    real = replication.promotion.decide

    def decide(me: str, term: Term, heard: Mapping[str, Any], unheard: Mapping[str, str], **more: Any) -> Any:
        if me in heard and heard[me].accepted is not None:
            heard = {node: dataclasses.replace(one, accepted=heard[me].accepted) for node, one in heard.items()}
        return real(me, term, heard, unheard, **more)

    patch.setattr(replication.promotion, "decide", decide)


def _not_all_heard(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(replication.promotion, "_may_go_alone", lambda me, heard, newest: True)


def _not_intact(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LegKeeper, "intact", True)


def _intact_by_taking_part(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LegKeeper, "intact", property(lambda self: self.record.boot in (None, self.boot)))


def _inconsistent_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    real = LegKeeper.accept

    async def accept(self: LegKeeper, membership: Membership, **more: Any) -> None:
        await real(self, membership, **more)
        self.record = dataclasses.replace(self.record, inconsistent=False)

    patch.setattr(LegKeeper, "accept", accept)


def _lease_after_promise(patch: pytest.MonkeyPatch) -> None:
    async def heartbeat(self: KeptVoter, mirror: str, term: Term) -> None:
        self._lease.heard(mirror)

    patch.setattr(KeptVoter, "heartbeat", heartbeat)


def _lease_lost_by_a_restart(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KeptVoter, "_by_majority", lambda self, mirror, file: False)


def _no_lease(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KeptVoter, "_judge_alive", lambda self, said, candidate: None)
    patch.setattr(replication.promotion, "_busy", lambda me, state: None)


def _apart_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    real = replication.lineage.relation

    def relation(ours: Membership, theirs: Membership, their_leg: str) -> Any:
        found = real(ours, theirs, their_leg)
        if found is replication.lineage.Relation.SPLIT_BRAIN and theirs.generation in ours.history:
            return replication.lineage.Relation.ANCESTOR
        return found

    for module in (replication.lineage, replication.promotion, replication.keeper):
        patch.setattr(module, "relation", relation)


def _forks_are_harmless(patch: pytest.MonkeyPatch) -> None:
    real = replication.lineage.relation

    def relation(ours: Membership, theirs: Membership, their_leg: str) -> Any:
        found = real(ours, theirs, their_leg)
        split = found is replication.lineage.Relation.SPLIT_BRAIN
        return replication.lineage.Relation.FORK if split else found

    for module in (replication.lineage, replication.promotion, replication.keeper):
        patch.setattr(module, "relation", relation)


def _superseded_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    async def heard_of(self: LegKeeper, record: Membership, node: str, *, served: bool) -> None: ...

    patch.setattr(LegKeeper, "heard_of", heard_of)


def _anybody_supersedes(patch: pytest.MonkeyPatch) -> None:
    async def heard_of_accept(self: KeptVoter, keeper: LegKeeper, refused: Membership) -> None:
        await keeper._save(dataclasses.replace(keeper.record, superseded=refused))

    patch.setattr(KeptVoter, "_heard_of_accept", heard_of_accept)


def _one_number_has_an_order(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(replication.promotion, "_outweighs", lambda newest, ours, others: in_sync_nodes(newest) <= ours)


def _highest_place_wins(patch: pytest.MonkeyPatch) -> None:
    real = replication.promotion.decide

    def decide(me: str, term: Term, heard: Mapping[str, Any], unheard: Mapping[str, str], **more: Any) -> Any:
        forgotten = {node: dataclasses.replace(one, superseded=None) for node, one in heard.items()}
        return real(me, term, forgotten, unheard, **more)

    patch.setattr(replication.promotion, "decide", decide)


def _tried_counts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(replication.promotion, "_before", lambda tried, heard, beyond: None)


def _retired_forgets(patch: pytest.MonkeyPatch) -> None:
    async def retire(self: MemoryVoter, record: Membership) -> None:
        own = self._site.keeper.record
        await self._site.keeper._save(LegRecord(own.me, promised=own.promised))

    patch.setattr(MemoryVoter, "retire", retire)

    async def keeps_nothing(self: KeptVoter, record: Membership) -> None:
        await self.forget(record.mirror)

    patch.setattr(KeptVoter, "retire", keeps_nothing)


def _obeys_anybody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(replication.orders, "judge_order", lambda order, known: None)


MUTANTS: Mapping[str, Mutant] = {
    "older-terms": Mutant("a leg accepts records and writes of an older term", _older_terms),
    "promise-in-memory": Mutant("a promise is forgotten by a crash", _promise_in_memory),
    "majority-without-legs": Mutant("a record counts that a leg in sync hasn't stored", _without_legs),
    "legs-without-majority": Mutant("a record counts that only its legs have stored", _without_majority),
    "own-copy-last": Mutant("the primary stores even a demotion itself last", _own_always_last),
    "token-for-two": Mutant("any node may use the token", _token_for_two),
    "alone-whatever-promised": Mutant("a restarted primary forgets whom it promised", _alone_whatever_was_promised),
    "own-record-only": Mutant("a candidate ignores what others have accepted", _own_record_only),
    "not-all-heard": Mutant("a candidate goes on without legs that were in sync", _not_all_heard),
    "not-intact": Mutant("a leg whose machine went down counts as intact", _not_intact),
    "intact-by-taking-part": Mutant("a leg that takes part after a reboot counts as intact", _intact_by_taking_part),
    "inconsistent-forgotten": Mutant("a leg in resync is taken for one in sync", _inconsistent_is_forgotten),
    "lease-after-promise": Mutant("a voter gives a lease to a primary that it has promised away", _lease_after_promise),
    "lease-lost-by-restart": Mutant(
        "a voter forgets by a restart that it has heard a primary whose record it missed", _lease_lost_by_a_restart
    ),
    "no-lease": Mutant("a voter promises while the primary's lease lasts", _no_lease),
    "apart-forgotten": Mutant("a primary that a forced one knew nothing of is taken for its past", _apart_is_forgotten),
    "superseded-forgotten": Mutant("who was left behind by force goes on when it is alone", _superseded_is_forgotten),
    "anybody-supersedes": Mutant("a fenced primary makes the one after it give up", _anybody_supersedes),
    "one-number-ordered": Mutant("of two terms of one number the one with more epochs wins", _one_number_has_an_order),
    "highest-place-wins": Mutant("a leg that was left behind outweighs a majority", _highest_place_wins),
    "tried-counts": Mutant("a record that a leg in sync by it has never stored says who has all", _tried_counts),
    "retired-forgets": Mutant("a voter that was removed forgets what it has promised and stored", _retired_forgets),
    "obeys-anybody": Mutant("a leg is given up by order of a primary that is none any more", _obeys_anybody),
    "forks-harmless": Mutant("a split brain is resynced like a leg that was away", _forks_are_harmless),
}


@contextlib.contextmanager
def mutated(mutant: Mutant | None) -> Iterator[None]:
    """The rules, with that mistake."""
    with pytest.MonkeyPatch.context() as patch:
        if mutant is not None:
            mutant.patch(patch)
        yield
