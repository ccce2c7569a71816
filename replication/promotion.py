"""Who may become primary, and what of: pure decisions from what voters have said, and the steps around them.

`decide` is given what the voters have answered, and says what may be done. The proofs (see `replication.voters` for
when a record counts):

- etcd: the record there is the newest, unless a node has a later one: etcd has forgotten that, and nothing is proven.
- majority: a majority of the voters has promised; one of them has every record that counts.
- all: each node with a leg in sync by the newest record that was seen has promised. Whatever counts after that record
  is stored at one of them at least, and without their promises nothing more comes to count.
- all, alone: a node may leave out nodes that it can't hear if its own record says that it is the last primary, or was
  given the token of a clean demotion; and if neither it nor a leg that it goes on with has promised anything to another
  node since. For a record that counts without it would have needed that promise, and its own records are never behind
  what counts (see `replication.voters`, "the order").

A node that has heard of a record that supersedes its own (`replication.lineage.supersedes`) keeps it, durably, until it
accepts one of a term as late, by which an operator has decided at the latest: it doesn't go on from its own any more,
whoever can be heard. What it
has heard of stands for it in these decisions, and if it is apart from that, in a split brain, it has no say.

And a leg to go on with: in sync by that record, and either intact, or compared with all others that are in sync.

A leg that can store nothing, since its disk is dead or full, is no leg to go on with: its node has promised, by its
home, but a record that has the leg in sync would never count. It is left out like one that isn't heard; and where it
may be the only one that has everything, an intact one beside others that aren't, nobody goes on.

A record that was only tried may be the newest that was seen, though it is known now never to count: a leg that it calls
in sync has promised, and has an older one. Whoever is out by it has everything still, and perhaps only there: legs in
sync by the record that it was made from, or by another one made from that, are those to go on with (`_before`).

`promote` first asks without promises (`Voter.state`), since each promise fences a primary that may be well, and
only if that would do, and the store would take the record (`ClusterStore.judge_candidate`), asks for them.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from replication.arbiter import behind, forgotten
from replication.cluster import ClusterStore, Voter, VoterState
from replication.lineage import Relation, both_histories, how_to_discard, relation, since_common, went_on_alone
from replication.membership import Generation, LegInfo, Membership, Term
from replication.voters import ask, in_sync_nodes, is_majority, rule_of


@dataclass(frozen=True)
class Promote:
    """It may be done, and nothing that was acknowledged is lost."""

    sources: tuple[LegInfo, ...]
    """Legs to reconcile the others from, the best first."""
    membership: Membership
    """To be committed."""
    expected: Membership
    """What it follows."""
    alone: bool = False
    """Not everybody was heard; it rests on this node's own record."""


@dataclass(frozen=True)
class Forced(Promote):
    """It may be done because an operator says so."""

    may_lose: str = ""
    """A sentence."""


@dataclass(frozen=True)
class Refused:
    """It can't be proven that nothing is lost, or that nobody else goes on."""

    sentence: str
    must_hear: frozenset[str] = frozenset()
    """Nodes, each of which is needed; or, by majority, some of which."""


@dataclass(frozen=True)
class SplitBrain:
    """Two sides may have acknowledged writes."""

    ours: tuple[Generation, ...]
    theirs: tuple[Generation, ...]
    node: str
    """One that is on the other side."""
    sentence: str


Decision = Promote | Refused | SplitBrain


def new_term(seen: Sequence[VoterState], arbiter: Membership | None = None) -> Term:
    """Higher than all that was seen."""
    terms = [state.promised for state in seen] + [state.accepted.term for state in seen if state.accepted]
    terms += [state.superseded.term for state in seen if state.superseded]
    terms += [arbiter.term] if arbiter else []
    return Term(1 + max((term.number for term in terms if term), default=0), secrets.token_hex(8))


def decide(
    me: str,
    term: Term,
    heard: Mapping[str, VoterState],
    unheard: Mapping[str, str],
    *,
    arbiter: Membership | None = None,
    force: bool = False,
) -> Decision:
    """What node `me` may do with the promises of `heard` for `term`.

    `unheard`: why other nodes have promised nothing, in words. `arbiter`: etcd's record; None if it has none.
    """
    records = {node: state.accepted for node, state in heard.items() if state.accepted is not None}
    # Of a node that has heard of a record that supersedes its own, that one counts, and not its own.
    beyond = {node: state.superseded for node, state in heard.items() if state.superseded is not None}
    known = {node: beyond.get(node, record) for node, record in records.items()}
    arbitrated = any(rule_of(record) == "etcd" for record in known.values())
    if arbitrated and (later := behind(arbiter, known)):
        if not force:
            return Refused(forgotten(arbiter, later), frozenset(later) - {me})
        arbiter = None
    newest = max(known.values(), key=lambda one: one.place, default=None) if arbiter is None else arbiter
    if newest is None:
        return Refused(f"no node has given a record of the mirror{_because(unheard)}", frozenset(unheard))
    mine = records.get(me, newest)
    ours = frozenset(node for node, record in records.items() if not _is_apart(newest, record, node))
    apart = sorted(set(records) - ours)
    own_side = me in ours or me not in records
    if me in beyond and _is_apart(beyond[me], mine, me):
        own_side = False  # whatever is newest by others: it has heard who serves, and only an operator decides
    others = [records[node] for node in apart if node not in beyond and arbiter is None]
    if (apart or not own_side) and not (own_side and _outweighs(newest, ours, others)):
        if not force:
            other = apart[0] if own_side else me
            return _split(newest if own_side else beyond.get(me, newest), records[other], other)
        same_side = {node: state for node, state in heard.items() if not _is_apart(mine, records.get(node), node)}
        return _force(me, term, same_side, unheard, mine, mine, sorted(set(heard) - set(same_side)))
    usable = {node: state for node, state in heard.items() if node in ours or node not in records}
    left_out = dict.fromkeys(apart, "it has gone its own way, and has no say until that is decided")
    base = _that_may_count(newest, usable, beyond, arbiter is not None)
    refused = _judge(me, term, usable, {**unheard, **left_out}, base, newest, arbiter is not None)
    if isinstance(refused, Promote) or not force:
        return refused
    return _force(me, term, usable, unheard, base, newest if arbiter is not None else base, apart)


def _that_may_count(
    newest: Membership, heard: Mapping[str, VoterState], beyond: Mapping[str, Membership], arbiter: bool
) -> Membership:
    """The newest record or, where that is known never to count, the one to go on from in its place; see the module.

    With an arbiter, which has the newest one all the same, it is that one with other legs in sync.
    """
    base = newest
    while (before := _before(base, heard, beyond)) is not None:
        base = before
    if base is newest or not arbiter:
        return base
    both = base.in_sync & newest.in_sync
    kept = any(leg.id in both and leg.node in heard and _can_stay(heard[leg.node]) for leg in newest.legs)
    return replace(newest, in_sync=base.in_sync & newest.terrace_ids) if kept else newest


def _before(tried: Membership, heard: Mapping[str, VoterState], beyond: Mapping[str, Membership]) -> Membership | None:
    """What to go on from if `tried`, the newest that was seen, never counts; None: it may, or that isn't seen.

    A primary makes its next record from the newest of its own that it knows to count, and acknowledges nothing that a
    leg in sync by that one lacks until a later one counts. So that one, or the newest made from the same, tells who has
    everything; unless a later record counts, and of that one of those who have promised would have told.
    """
    places = {node: state.accepted.place for node, state in heard.items() if state.accepted and node not in beyond}
    is_tried_only = any(places.get(node, tried.place) < tried.place for node in in_sync_nodes(tried))
    if not is_tried_only or tried.forced != "no" or len(tried.history) < 2:
        return None
    if rule_of(tried) == "majority" and not is_majority(heard, tried.voters):
        return None
    origin = tried.history[-2]
    known = [state.accepted for state in heard.values() if state.accepted and state.accepted.place < tried.place]
    beside = [one for one in known if one.term == tried.term and one.history[-2:-1] == (origin,)]
    made_of = [one for one in known if one.generation == origin]
    return max((*made_of, *beside), key=lambda one: one.place, default=None)


def _outweighs(newest: Membership, ours: frozenset[str], others: Sequence[Membership]) -> bool:
    """Whether the nodes `ours` may go on from the newest record, whatever is on the other side of a split brain.

    `others`: the records there of nodes that haven't heard yet that they are superseded; with etcd all have, there.
    """
    if any(one.term.number == newest.term.number for one in others):
        return False  # two terms of one number have no order
    by_majority = rule_of(newest) == "majority" and is_majority(ours, newest.voters)
    return not others or by_majority or in_sync_nodes(newest) <= ours


def _is_apart(ours: Membership, theirs: Membership | None, node: str) -> bool:
    """Whether a node's record is the other side of a split brain."""
    if theirs is None:
        return False
    legs = theirs.legs_on(node)
    return relation(ours, theirs, legs[0].id if legs else "") is Relation.SPLIT_BRAIN


def _split(ours: Membership, theirs: Membership, node: str) -> SplitBrain:
    ours_since, theirs_since = since_common(ours, theirs)
    return SplitBrain(
        ours_since,
        theirs_since,
        node,
        f"split brain: {both_histories(ours, theirs, f'node {ours.primary}', f'node {node}')}; both may have "
        f"acknowledged writes. Decide whose are lost: {how_to_discard(ours, node)}, or promote node {node} with "
        "--force",
    )


def _judge(
    me: str,
    term: Term,
    heard: Mapping[str, VoterState],
    unheard: Mapping[str, str],
    newest: Membership,
    followed: Membership,
    arbiter: bool,
) -> Promote | Refused:
    """By the record `newest`. What is made follows `followed`, which with an arbiter may have other legs in sync."""
    rule = "etcd" if arbiter else rule_of(newest)
    if rule == "etcd" and not arbiter:
        return Refused(f"the newest record should be in etcd, and isn't{_because(unheard)}")
    alone = False
    if rule == "majority" and not is_majority(heard, newest.voters):
        silent = frozenset(newest.voters) - set(heard)
        have, of = len(set(heard) & set(newest.voters)), len(set(newest.voters))
        return Refused(
            f"{have} of {of} voters have promised, and a majority must: {of // 2 + 1 - have} more of {_named(silent)}"
            f"{_because(unheard, silent)}. {_change(silent)}",
            silent,
        )
    silent = in_sync_nodes(newest) - set(heard)
    if rule == "all" and silent:
        alone = _may_go_alone(me, heard, newest)
        if not alone:
            return Refused(
                f"only node {_named(silent, 'and')} can tell whether writes were acknowledged without the others"
                f"{_because(unheard, silent)}. {_change(silent)}",
                silent,
            )
    legs = [leg for leg in newest.legs if leg.id in newest.in_sync and leg.kind == "terrace" and leg.node in heard]
    legs = [leg for leg in legs if not heard[leg.node].inconsistent]
    if not legs:
        return Refused(
            f"no leg that is in sync can be reached: it takes node {_named(silent)}{_because(unheard, silent)}. "
            f"{_change(silent)}",
            silent,
        )
    intact = [leg for leg in legs if heard[leg.node].intact]
    if not intact and silent:
        return Refused(
            f"{_named(frozenset(leg.node for leg in legs), 'and')} may have lost writes when the machine went down, "
            f"and node {_named(silent)} may have them{_because(unheard, silent)}. {_change(silent)}",
            silent,
        )
    unable = {leg.node: why for leg in legs if (why := heard[leg.node].no_writes) is not None}
    stay = [leg for leg in legs if leg.node not in unable]
    if unable and not (any(leg in intact for leg in stay) or (stay and not intact)):
        # What was written last is only where nothing can be stored any more: no record with that leg would count.
        lost = f", and node {_named(frozenset(leg.node for leg in stay), 'and')} may have lost writes" if stay else ""
        return Refused(
            f"only the leg on node {_named(frozenset(unable))} is known to have every acknowledged write, and it can "
            f"store nothing{_because(unable)}{lost}. Mend that and restart terraced there; or promote another node "
            "with --force, which may lose writes",
            silent,
        )
    legs, intact = stay, [leg for leg in intact if leg in stay]
    sources = sorted(intact or legs, key=lambda leg: leg.node != me)
    in_sync = frozenset(leg.id for leg in legs)
    return Promote(tuple(sources), newest.next_term(term, me, in_sync), followed if arbiter else newest, alone)


def _can_stay(state: VoterState) -> bool:
    """Whether a record may call its leg in sync."""
    return not state.inconsistent and state.no_writes is None


def _may_go_alone(me: str, heard: Mapping[str, VoterState], newest: Membership) -> bool:
    """By this node's own record and legs that nobody else has asked for a promise since; see the module."""
    own = heard.get(me)
    if own is None or own.accepted != newest or not own.candidates <= {me}:
        return False
    if me != (newest.token if newest.primary is None else newest.primary):
        return False
    return any(
        node in heard and heard[node].candidates <= {me} and heard[node].accepted == newest
        for node in in_sync_nodes(newest)
    )


def _force(
    me: str,
    term: Term,
    heard: Mapping[str, VoterState],
    unheard: Mapping[str, str],
    base: Membership,
    followed: Membership,
    apart: Sequence[str],
) -> Decision:
    """The operator takes this node's leg as it is."""
    own = base.legs_on(me)
    if not own or me not in heard:
        return Refused(f"force takes the leg of node {me} as it is, and there is none")
    if heard[me].inconsistent:
        return Refused(
            f"the leg of node {me} was being resynced: it is no state that the volume ever had, and force can't make "
            f"it one; it takes node {_named(in_sync_nodes(base) - {me})}"
        )
    if (why := heard[me].no_writes) is not None:
        return Refused(f"force takes the leg of node {me} as it is, and that can store nothing ({why})")
    fenced = in_sync_nodes(base) & set(heard)
    kept = {leg.id for leg in own}
    if kept & base.in_sync:
        kept &= base.in_sync
        heard_legs = [leg for leg in base.legs if leg.node in heard and _can_stay(heard[leg.node])]
        kept |= {leg.id for leg in heard_legs if leg.id in base.in_sync and leg.kind == "terrace"}
    new = base.next_term(term, me, frozenset(kept), "fenced" if fenced else "apart")
    if rule_of(base) == "majority" and not is_majority(heard, base.voters):
        new = replace(new, voters=tuple(voter for voter in base.voters if voter in heard))
    sources = tuple(sorted((leg for leg in base.legs if leg.id in kept), key=lambda leg: leg.node != me))
    return Forced(sources, new, followed, may_lose=_may_lose(me, heard[me], base, frozenset(unheard) | set(apart)))


def _may_lose(me: str, own: VoterState, base: Membership, others: frozenset[str]) -> str:
    in_sync = bool({leg.id for leg in base.legs_on(me)} & base.in_sync)
    if in_sync:
        what = f"what was acknowledged after node {me} was last in sync"
    else:
        what = (
            f"all that was acknowledged since node {me} was left out (record {base.term.number}.{base.epoch} or before)"
        )
    when = f"; it heard its primary {own.heard_s:.0f} s ago" if own.heard_s is not None else ""
    loss = ""
    if not own.intact:
        loss = f"; its machine went down, and of {own.recent_bytes} bytes written last it may have lost any"
    by = f" Not heard: {', '.join(sorted(others))}." if others else ""
    return (
        f"This may lose {what}{when}{loss}.{by} If another node serves still, or did, both have written: split brain."
    )


def _named(nodes: frozenset[str], last: str = "or") -> str:
    names = sorted(nodes)
    return f" {last} ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names) or "none"


def _because(unheard: Mapping[str, str], only: frozenset[str] | None = None) -> str:
    told = [f"{node}: {why}" for node, why in sorted(unheard.items()) if only is None or node in only]
    return f" ({'; '.join(told)})" if told else ""


def _change(silent: frozenset[str]) -> str:
    return f"Start {_named(silent)} or mend the way there; or promote with --force, which may lose writes"


# With promises


class HeardOf(Protocol):
    """`replication.voters.KeptVoter.heard_of`."""

    async def __call__(self, record: Membership, node: str, *, served: bool) -> None: ...


async def promote(
    me: str,
    mirror: str,
    nodes: Sequence[str],
    voter: Callable[[str], Voter],
    cluster: ClusterStore,
    *,
    arbiter: bool = False,
    force: bool = False,
    patience_s: float = 0.0,
    timeout_s: float = 2.0,
    heard_of: HeardOf | None = None,
    own: Term | None = None,
) -> Decision:
    """Become primary of a mirror: the record is committed when this returns a `Promote`.

    `nodes`: all that may know of the mirror. `patience_s`: how long to wait for nodes that are silent; a primary that
    was restarted gives its timeout. `arbiter`: the truth is in etcd. `heard_of`: stores what supersedes our own record,
    before anything is decided; not used with `force`, by which an operator has decided. `own`: this node is primary in
    that term, and goes on by itself: from a record of that term, or of a later one that it has begun itself and of
    which it doesn't know whether it counts, or not at all. Raises OSError: ETIMEDOUT if it isn't
    known whether the record counts (then again, with another term), ESTALE if somebody else was faster, EUCLEAN if etcd
    has gone back.
    """
    wait_s = max(timeout_s, patience_s)
    states, unheard = await _states(mirror, nodes, voter, wait_s)
    others = tuple(dict.fromkeys(node for node in _named_by(states) if node not in nodes))
    if others:
        more, more_unheard = await _states(mirror, others, voter, wait_s)
        states, unheard = states | more, unheard | more_unheard
    if heard_of is not None and not force:
        for node, state in states.items():
            # What a node has that knows itself superseded supersedes nobody.
            record = state.superseded or state.accepted
            if node != me and record is not None:
                await heard_of(record, node, served=state.primary_here and record is state.accepted)
        if me in states:
            states[me] = await voter(me).state(mirror)
    # After the states: each record is in etcd before a node has it.
    truth = await _arbiters(cluster, mirror) if arbiter else None
    known = {node: state.superseded or state.accepted for node, state in states.items()}
    records = {node: record for node, record in known.items() if record is not None}
    if arbiter and not force and (later := behind(truth, records)):
        return Refused(forgotten(truth, later), frozenset(later) - {me})
    term = new_term(list(states.values()), truth)
    alive = [node for node, state in states.items() if state.primary_here and node != me]
    _judge_own(me, own, *(one for node in alive if (one := states[node].accepted) is not None and _is_after(one, own)))
    mine = states[me].accepted if me in states else None
    if mine is not None and mine.primary != me and _is_after(mine, own):
        # Its leg here has been given to another primary: whether or not that one serves, this node doesn't any more. It
        # would be refused for ever, as its own seeking keeps it alive in the eyes of the others.
        _judge_own(me, own, mine)
    if alive and not force:
        return Refused(
            f"node {alive[0]} is primary and alive: demote it there first, with `terrace volume mirror demote "
            f"{_name_on(alive[0], states)} --to {me}`",
            frozenset(alive),
        )
    busy = {} if force else {node: why for node, state in states.items() if (why := _busy(me, state))}
    would_promise = {node: state for node, state in states.items() if node not in busy}
    would = decide(me, term, would_promise, unheard | busy, arbiter=truth, force=force)
    if not isinstance(would, Promote):
        return _while_alive(would, busy, states)
    _judge_own(me, own, would.expected)
    if not force:
        await cluster.judge_candidate(mirror)
    # This node last: if another refuses, our own leg has fenced nobody.
    asked = tuple(node for node in states if node != me)
    promised, failures = await ask(
        asked,
        lambda node: voter(node).prepare(mirror, term, me, force=force),
        lambda answers: len(answers) == len(asked),
        timeout_s=timeout_s,
    )
    if me in states:
        try:
            promised[me] = await voter(me).prepare(mirror, term, me, force=force)
        except OSError as error:
            failures[me] = error
    told = unheard | {node: error.strerror or str(error) for node, error in failures.items()}
    truth = await _arbiters(cluster, mirror) if arbiter else None
    decision = decide(me, term, promised, told, arbiter=truth, force=force)
    if not isinstance(decision, Promote):
        busy = {node: told[node] for node in failures if failures[node].errno == errno.EBUSY}
        return _while_alive(decision, busy, states)
    _judge_own(me, own, decision.expected)
    await cluster.commit(decision.membership, expected=decision.expected)
    return decision


def _is_after(record: Membership, own: Term | None) -> bool:
    return own is not None and record.term.number > own.number


def _judge_own(me: str, own: Term | None, *records: Membership) -> None:
    """Raises OSError ESTALE if others have gone on since the term that this node goes on from by itself.

    A later one of its own is no other: it has begun that from this one, and doesn't know whether it counts.
    """
    for record in records:
        if own is not None and record.term != own and not went_on_alone(record, own, me):
            raise OSError(errno.ESTALE, f"others have gone on: there is the record {record.term.number}.{record.epoch}")


def _while_alive(
    refused: Refused | SplitBrain, busy: Mapping[str, str], states: Mapping[str, VoterState]
) -> Refused | SplitBrain:
    """With the next step where nodes have answered, and promise nothing: none that would end a primary that is well."""
    if not busy or not isinstance(refused, Refused):
        return refused
    lease_s = max((one.accepted.options.lease_s for one in states.values() if one.accepted is not None), default=0.0)
    return Refused(
        f"a primary is alive, or was a moment ago, and nobody else may be one meanwhile{_because(busy)}: demote it "
        f"there, or ask again when it has been silent for longer than its lease, {lease_s:g} s",
        refused.must_hear | frozenset(busy),
    )


def _name_on(node: str, states: Mapping[str, VoterState]) -> str:
    accepted = states[node].accepted
    legs = accepted.legs_on(node) or accepted.legs if accepted is not None else ()
    return legs[0].export if legs else "POOL/VOL"


async def _arbiters(cluster: ClusterStore, mirror: str) -> Membership | None:
    """The arbiter's record; None if it has none. Raises OSError."""
    try:
        return await cluster.newest(mirror)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return None


async def _states(
    mirror: str, nodes: Sequence[str], voter: Callable[[str], Voter], timeout_s: float
) -> tuple[dict[str, VoterState], dict[str, str]]:
    states, failures = await ask(
        nodes, lambda node: voter(node).state(mirror), lambda answers: len(answers) == len(nodes), timeout_s=timeout_s
    )
    return states, {node: error.strerror or str(error) for node, error in failures.items()}


def _busy(me: str, state: VoterState) -> str | None:
    """Why it wouldn't promise, though it has answered."""
    accepted = state.accepted
    if accepted is None or accepted.primary in (None, me) or state.heard_s is None:
        return None
    if state.heard_s >= accepted.options.lease_s:
        return None
    return f"it has heard the primary, node {accepted.primary}, {state.heard_s:.1f} s ago"


def _named_by(states: Mapping[str, VoterState]) -> list[str]:
    found: list[str] = []
    for state in states.values():
        for record in (state.accepted, state.superseded):
            if record is not None:
                found += [*record.voters, *(leg.node for leg in record.legs if leg.kind == "terrace")]
    return found


async def demote(me: str, current: Membership, cluster: ClusterStore, *, to: str | None = None) -> Membership:
    """Give up being primary: afterwards, in mode all, only the node with the token may go on without all others.

    The caller has ended all writes, and all legs in sync have flushed. Once this was called, this node must not serve
    in this term any more, whatever it raises: the record may count, and another node go on. Without `to` the token goes
    to the only other node in sync; it stays here if there is none, and nobody has it if there are several.
    Raises OSError EINVAL, ESTALE, ETIMEDOUT.
    """
    if current.primary != me:
        raise OSError(errno.EINVAL, f"node {me} isn't primary: that is {current.primary or 'nobody'}")
    holder = to
    others = sorted(in_sync_nodes(current) - {me})
    if to is None:
        holder = others[0] if len(others) == 1 else None if others else me
    elif to not in in_sync_nodes(current) and (current.legs_on(to) or to not in current.voters):
        raise OSError(
            errno.EINVAL,
            f"node {to} has no leg in sync, so it can't go on; demote to {_named(in_sync_nodes(current))}, or wait for "
            "its resync",
        )
    new = current.next_epoch(primary=None, token=holder)
    await cluster.commit(new, expected=current)
    return new


def is_rejoin_allowed(ours: Membership, theirs: Membership | None, leg_id: str, *, discard: bool = False) -> Relation:
    """What a leg that returns is to the primary whose record `ours` counts. Raises OSError EUCLEAN, ESTALE.

    SAME, ANCESTOR and FORK: it is resynced, if it isn't in sync. EUCLEAN: split brain, unless `discard`. ESTALE: it has
    a record that came from ours, so we aren't primary any more.
    """
    if theirs is None:
        return Relation.ANCESTOR
    found = relation(ours, theirs, leg_id)
    if found is Relation.DESCENDANT:
        raise OSError(errno.ESTALE, f"a leg has the later record {theirs.term.number}.{theirs.epoch}")
    if found is Relation.SPLIT_BRAIN and not discard:
        node = ours.leg(leg_id).node if ours.has(leg_id) else leg_id
        raise OSError(errno.EUCLEAN, _split(ours, theirs, node).sentence)
    return Relation.ANCESTOR if found is Relation.SPLIT_BRAIN else found
