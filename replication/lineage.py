"""Whether two records come from each other: what a leg that returns is to the mirror. Pure.

Each record remembers its ancestors (`Membership.history`). A leg whose newest record is one of ours has only missed
something. If neither record is the other's ancestor, there is a fork, and there are two kinds of them:

- Nobody has forced anything since they parted. Then one of the two records has never counted: a candidate finds every
  record that does (`replication.voters`). Nothing was acknowledged by it, so the leg is resynced like an ancestor.
- Somebody has. Then both sides may have acknowledged writes: split brain, which an operator must decide.
"""

from __future__ import annotations

import enum

from replication.membership import Generation, Membership, Term


class Relation(enum.Enum):
    """What their record is to ours."""

    SAME = "same"
    ANCESTOR = "ancestor"  # ours came from it: what it misses is copied to it
    DESCENDANT = "descendant"  # it came from ours: we are the ones who have missed something
    FORK = "fork"  # one of both never counted: as ANCESTOR for whoever is primary by a record that counts
    SPLIT_BRAIN = "split brain"  # both may have acknowledged writes


def relation(ours: Membership, theirs: Membership, their_leg: str) -> Relation:
    """What the record `theirs`, of the leg with the id `their_leg`, is to `ours`."""
    if ours.generation == theirs.generation:
        return Relation.SAME
    if theirs.generation in ours.history:
        after = ours.history[ours.history.index(theirs.generation) + 1 :]
        went_on = theirs.primary is not None and their_leg in theirs.in_sync
        if went_on and after[0].forced == "apart":
            return Relation.SPLIT_BRAIN
        return Relation.ANCESTOR
    if ours.generation in theirs.history:
        return Relation.DESCENDANT
    ours_since, theirs_since = since_common(ours, theirs)
    if any(one.forced != "no" for one in (*ours_since, *theirs_since)):
        return Relation.SPLIT_BRAIN
    return Relation.FORK


def are_apart(ours: Membership, our_leg: str, theirs: Membership, their_leg: str) -> bool:
    """Whether two records are two sides of a split brain, whichever of them is asked about the other."""
    split = Relation.SPLIT_BRAIN
    return relation(ours, theirs, their_leg) is split or relation(theirs, ours, our_leg) is split


def supersedes(theirs: Membership, their_leg: str, ours: Membership, our_leg: str, *, served: bool) -> bool:
    """Whether who has `ours`, and serves nothing now, must not go on from it any more, having heard of `theirs`.

    It is of a later term, and `ours` doesn't come from it; or it is the other side of a split brain, and somebody is
    primary by it now (`served`): then the numbers of the terms say nothing of which side is the newer one.
    """
    later = theirs.term.number > ours.term.number
    if are_apart(ours, our_leg, theirs, their_leg):
        return served or later
    return later and not ours.descends_from(theirs)


def since_common(ours: Membership, theirs: Membership) -> tuple[tuple[Generation, ...], tuple[Generation, ...]]:
    """The generations of each since the newest that both have; all that are remembered if there is none."""
    common = set(ours.history) & set(theirs.history)
    newest = max(common, key=lambda one: (one.term.number, one.epoch), default=None)
    return _after(ours, newest), _after(theirs, newest)


def last_of_others(new: Membership, known: Membership, node: str) -> Term | None:
    """The last term in which another node than `node` was primary, by `new`, since it parted from `known`; None: none.

    Also by records that the node never stored: what came of them may be all that it is given now.
    """
    since, _ = since_common(new, known)
    if not set(new.history) & set(known.history):
        # All that is remembered, which may be of before `known` was made: it has that in it.
        since = tuple(one for one in since if (one.term.number, one.epoch) > known.place)
    others = [one.term for one in (*since, new.generation) if one.primary not in (None, node)]
    return max(others, key=lambda term: term.number, default=None)


def went_on_alone(record: Membership, own: Term, node: str) -> bool:
    """Whether `record` came from one of the term `own`, and none but `node` was primary in later ones.

    As a primary does that begins a later term, and hasn't heard whether it counts.
    """
    since = [one for one in record.history if one.term.number >= own.number]
    return own in [one.term for one in since] and all(one.primary == node for one in since if one.term != own)


def _after(membership: Membership, common: Generation | None) -> tuple[Generation, ...]:
    history = membership.history or (membership.generation,)
    return history if common is None else history[history.index(common) + 1 :]


def both_histories(ours: Membership, theirs: Membership, our_name: str, their_name: str) -> str:
    """A sentence with the two sides of a split brain."""
    ours_since, theirs_since = since_common(ours, theirs)
    return f"{our_name} has {_listed(ours_since)}, and {their_name} has {_listed(theirs_since)}"


def how_to_discard(ours: Membership, node: str) -> str:
    """What gives up what `node` has, as it is to be typed where `ours` is served, or will be."""
    legs = ours.legs_on(ours.primary) if ours.primary is not None else ()
    name = (*legs, *ours.legs)[0].export
    where = f" on node {ours.primary}" if ours.primary is not None else ""
    return f"`terrace volume mirror resync {name} {node} --discard`{where} gives up what only node {node} has"


def _listed(generations: tuple[Generation, ...]) -> str:
    shown = [
        f"{one.term.number}.{one.epoch} ({one.term.id[:8]}, primary {one.primary or 'none'}"
        f"{', forced' if one.forced != 'no' else ''})"
        for one in generations[-3:]
    ]
    more = [f"{len(generations) - 3} older"] if len(generations) > 3 else []
    return ", ".join([*more, *shown]) if shown else "nothing that the other doesn't have"
