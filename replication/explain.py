"""What each leg and the mirror is worth now, and one paragraph that says why, and what would change it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from replication.cluster import VoterState
from replication.leg import LegState, MirrorState, mirror_state
from replication.membership import LegInfo, Membership, Term
from replication.promotion import Refused, SplitBrain
from replication.unreadable import RESTORE, each, first_step
from replication.voters import in_sync_nodes, is_majority, rule_of

GIVE_UP_MAP: Final = "--give-up-map"
"""In why a leg is out: its pool takes no writes, since a page of a map is damaged, and that is the way out."""
_ANY_IN_SYNC: Final = "`terrace volume mirror promote` on a node with a leg in sync makes it primary"


@dataclass(frozen=True)
class Progress:
    """Of a leg's resync."""

    done_bytes: int
    total_bytes: int
    eta_s: float | None = None
    """None: it has just begun, or makes no progress."""
    stalled_s: float = 0.0
    """So long it has made no progress."""
    unread_blocks: int = 0
    """All else is done: these can be read on no leg, which is tried again for some seconds."""


@dataclass(frozen=True)
class Facts:
    """All that the explanation rests on, as the node that explains knows it."""

    name: str
    """The mirror's volume, POOL/VOL."""
    membership: Membership
    """The newest record that is known here."""
    voters: Mapping[str, VoterState] = field(default_factory=dict)
    """What nodes have said, this one included."""
    unheard: Mapping[str, str] = field(default_factory=dict)
    """Nodes that couldn't be asked, and why."""
    connected: frozenset[str] = frozenset()
    """Ids of legs that the primary has a session with; only known there."""
    serving: bool = False
    """This node is the primary, and serves."""
    suspended: str | None = None
    """Why it lets writes wait or fail: below quorum, or without a lease."""
    held: str | None = None
    """Why writes wait for the moment, while it is served all the same."""
    held_by_leg: bool = False
    """It is a leg that they wait for, whoever has a say."""
    is_lost: bool = False
    """What it waits for is a leg in sync: none is connected."""
    is_failing: bool = False
    """What is `held` fails, by the option for below quorum."""
    progress: Mapping[str, Progress] = field(default_factory=dict)
    """By leg id."""
    away_s: Mapping[str, float] = field(default_factory=dict)
    """By leg id: for how long it has been out of reach or out of sync."""
    errors: Mapping[str, str] = field(default_factory=dict)
    """By leg id: why the primary isn't connected to it, as the leg has said, or the way there."""
    kept_out: Mapping[str, str] = field(default_factory=dict)
    """By leg id: why it isn't in sync though the primary reaches it, and it has all else."""
    split: Mapping[str, str] = field(default_factory=dict)
    """By leg id: the sentence of its split brain."""
    decision: Refused | SplitBrain | None = None
    """Why no node could become primary when it was tried last."""
    arbiter: str | None = None
    """Why the arbiter doesn't answer this node, where the mirror has one."""
    map_damage: Mapping[str, str] = field(default_factory=dict)
    """By leg id: the sentence about its damaged map, with the next step."""
    unreadable: str = ""
    """What no leg could read when that was tried last, in words."""
    deposed: Term | None = None
    """This node was primary until a promise for this term fenced it."""
    left_behind: str | None = None
    """The leg here is the other side of a split brain, and doesn't go on by itself: both histories, and the way out."""
    leg_here: str = ""
    """Id of the leg of this node, if it has one."""
    gone: frozenset[str] = frozenset()
    """Of the nodes that weren't heard, those that have answered that they know nothing of it, with their pools open."""
    delete_here: str = ""
    """The command by which the leg here goes, if this node has one."""


@dataclass(frozen=True)
class Explanation:
    """The answer to `mirror explain`."""

    legs: Mapping[str, LegState]
    """By leg id."""
    state: MirrorState
    paragraph: str
    headline: str
    """How the paragraph begins: what holds for the whole mirror."""
    old: str | None
    """That all this is what was known when the primary was heard last, and when that was, or that nobody else has any
    of it any more; None: neither."""
    left_over: bool = False
    """The leg here is all that is left of the mirror."""


def explain(facts: Facts) -> Explanation:
    """Judge the legs, the mirror, and say why."""
    legs = {leg.id: _leg_state(leg, facts) for leg in facts.membership.legs}
    served = (facts.serving or _primary_elsewhere(facts) is not None) and facts.suspended is None
    old = _old(facts)
    # Whether another node serves it can't be said where the primary isn't heard.
    known = served or old is None
    state = mirror_state(legs.values(), is_served=served) if known else MirrorState.UNKNOWN
    headline = _headline(facts, state, legs)
    damage = [f"{text[:1].upper()}{text[1:]}." for text in facts.map_damage.values()]
    if facts.unreadable:
        away = _may_have(facts, legs, LegState.OFFLINE, LegState.STALE)
        step = first_step(away, facts.unheard, _may_have(facts, legs, LegState.SYNCING))
        damage.append(f"But no leg {'' if step == RESTORE else 'in sync '}can read {facts.unreadable}: {step}.")
    sentences = [headline, *_about_legs(facts, legs), *damage, _about_arbiter(facts, served)]
    if facts.left_behind is not None:
        sentences.insert(0, f"{facts.name} is not served here: {facts.left_behind.rstrip('.')}.")
    return Explanation(
        legs, state, " ".join(one for one in sentences if one), headline, old, _orphaned(facts) is not None
    )


def last_leg_on(node: str, legs: Iterable[tuple[str, LegState]]) -> str | None:
    """Why a node must not be taken down for one mirror's sake: it has the last leg that is worth something, or may.

    `legs`: each leg's node and state, without those on NBD servers, of which none can be promoted. None: the others
    have all.
    """
    states = list(legs)
    good = {where for where, state in states if state is LegState.UP_TO_DATE}
    if good == {node}:
        syncing = sorted(where for where, state in states if state is LegState.SYNCING)
        until = f" ({each(syncing)} {_is(syncing)} in resync)" if syncing else ""
        if {where for where, _ in states} == {node}:  # no resync is to be waited for
            return (
                "no other node has a leg that could be promoted: add one (`terrace volume mirror add`), or delete the "
                "volume"
            )
        return f"its only leg that is up to date is here{until}: wait for a resync, add a leg elsewhere, or remove it"
    if not good and (node, LegState.UNPROVEN) in states:
        return "no leg of it is up to date, and the one here may have all writes: start the nodes that have the others"
    return None


def _primary_elsewhere(facts: Facts) -> str | None:
    alive = [one.node for one in facts.voters.values() if one.primary_here and one.node not in facts.unheard]
    return alive[0] if alive else None


def _old(facts: Facts) -> str | None:
    """See `Explanation`."""
    primary = facts.membership.primary
    if (orphaned := _orphaned(facts)) is not None:
        return orphaned
    if primary is None or facts.serving or primary not in facts.unheard or _primary_elsewhere(facts) is not None:
        return None
    heard = {node: voice.heard_s for node, voice in facts.voters.items() if voice.heard_s is not None}
    if heard:
        node = min(heard, key=lambda one: heard[one])
        when = f"this is what was known {_time(heard[node])} ago, when node {node} heard it last"
    else:
        when = "this is what was known last, from before terraced was started"
    return f"its primary, node {primary}, can't be asked ({facts.unheard[primary]}): {when}"


def _orphaned(facts: Facts) -> str | None:
    """That the leg here is all that is left of the mirror: it was taken out, or all was deleted, in its absence.

    Or what the others had was lost, and a pool of that name made anew: nobody but its operator knows that.
    """
    others = {leg.node for leg in facts.membership.legs if leg.kind == "terrace" and leg.id != facts.leg_here}
    if not facts.delete_here or not others or not others <= facts.gone or _primary_elsewhere(facts) is not None:
        return None
    nodes = sorted(others)
    have = "have" if len(nodes) > 1 else "has"
    last = ""
    # Else it is no state that the volume ever had, and nobody serves it. It may be no leg by the record here either.
    if not any(voice.inconsistent for voice in facts.voters.values()):
        last = (
            f"; if it is not, as that pool was lost and made anew, the leg here is the last one, and `terrace volume "
            f"mirror promote {facts.name} --force` serves it"
        )
    return (
        f"node {each(nodes)} {have} none of this mirror any more, so the leg here is left over: it was removed, or the "
        f"volume deleted, while it couldn't be reached. See there that what is wanted is there (`terrace volume list`)"
        f": `{facts.delete_here}` then deletes it here{last}"
    )


def _leg_state(leg: LegInfo, facts: Facts) -> LegState:
    record = facts.membership
    elsewhere = _primary_elsewhere(facts)
    unreachable = leg.id not in facts.connected if facts.serving else leg.node in facts.unheard
    if leg.kind == "nbd" and not facts.serving:
        unreachable = False  # only the primary talks to it
    if leg.id in facts.split or (leg.id == facts.leg_here and facts.left_behind is not None):
        return LegState.STALE
    if leg.id in record.in_sync and (facts.serving or elsewhere):
        # Out of reach for less than the timeout: nothing was acknowledged without it yet.
        return LegState.UP_TO_DATE if not unreachable else LegState.OFFLINE
    if unreachable:
        return LegState.OFFLINE
    if leg.id in facts.progress:
        return LegState.SYNCING
    if leg.id not in record.in_sync:
        return LegState.STALE
    if leg.kind == "nbd":
        # Nobody vouches for what an NBD server has, unless a clean end does: the next term begins without it.
        return LegState.UP_TO_DATE if record.primary is None else LegState.UNPROVEN
    voice = facts.voters.get(leg.node)
    if record.primary is None and (voice is None or voice.intact):
        return LegState.UP_TO_DATE
    return LegState.UNPROVEN


def _headline(facts: Facts, state: MirrorState, legs: Mapping[str, LegState]) -> str:
    record = facts.membership
    who = f"{facts.name} is {state.value}"
    here = _primary_elsewhere(facts)
    if facts.is_lost and facts.serving:
        return f"{who}: {_lost(facts)}"
    if facts.suspended is not None and facts.serving:
        what = "wait" if record.options.below_quorum == "suspend" else "fail"
        return (
            f"{who}: its primary, node {record.primary}, lets writes {what}, since {facts.suspended}. "
            f"{_quorum_change(facts)}"
        )
    if facts.serving or here is not None:
        primary = here or record.primary
        count = sum(one is LegState.UP_TO_DATE for one in legs.values())
        have = f"all {len(legs)} legs" if state is MirrorState.ONLINE else f"{count} of {len(legs)} legs"
        if len(legs) == count == 1:  # its creation was broken off, or the other legs were removed while it was in use
            return (
                f"{who}: node {primary} is primary, and its only leg has every acknowledged write, so nothing is "
                f"mirrored: `terrace volume mirror add {facts.name} NODE` gives it another leg.{_held(facts)}"
            )
        return f"{who}: node {primary} is primary, and {have} have every acknowledged write.{_held(facts)}"
    if facts.deposed is not None:
        return (
            f"{who} here: this node was primary until term {facts.deposed.number} was promised to another. Nothing "
            f"that it acknowledged is lost by that; `terrace volume mirror list` on {_nodes_or_peers(facts)} says who "
            "is primary now."
        )
    if isinstance(facts.decision, SplitBrain):
        return f"{who}: {facts.decision.sentence}."
    if record.primary is None and _orphaned(facts) is None:
        return f"{who}: it was demoted cleanly, so nothing is in doubt, and no node exports it. {_token(record)}"
    old = _old(facts)
    what = old if old is not None else f"its primary, node {record.primary}, doesn't serve it"
    if facts.left_behind is not None or _orphaned(facts) is not None:
        return f"{who}: {what}."  # what could be done is said with that
    why = facts.decision.sentence if facts.decision is not None else _unproven(facts)
    return f"{who}: {what}. {why[:1].upper()}{why[1:].rstrip('.')}."


def _lost(facts: Facts) -> str:
    """What a primary waits for that has no leg in sync: who has a say, or misses writes, doesn't help."""
    record = facts.membership
    good = in_sync_nodes(record)
    others = sorted({leg.node for leg in record.legs if leg.kind == "terrace"} - good)
    which = f"the leg on node {_or(sorted(good))} is back" if good else "a leg in sync is back"
    forced = (
        f" If that is gone for good, `terrace volume mirror promote --force` on node {_or(others)} goes on without "
        "what the leg there misses."
        if others
        else ""
    )
    return (
        f"its primary, node {record.primary}, has no leg in sync, so nothing is read or written. It goes on when "
        f"{which}.{forced}"
    )


def _held(facts: Facts) -> str:
    """Behind the headline of a mirror that is served."""
    if facts.held is None:
        return ""
    voters = facts.membership.voters
    silent = any(node in facts.unheard or node not in facts.voters for node in voters)
    change = ""
    if silent and not facts.held_by_leg and rule_of(facts.membership) != "all":
        change = f" {_quorum_change(facts)}"
    return f" Writes {'fail' if facts.is_failing else 'wait'} now: {facts.held}.{change}"


def _nodes_or_peers(facts: Facts) -> str:
    nodes = sorted(set(in_sync_nodes(facts.membership)) - {facts.membership.primary})
    return f"node {_or(nodes)}" if nodes else "the peers"


def _token(record: Membership) -> str:
    if rule_of(record) != "all":
        return f"{_ANY_IN_SYNC}."
    if record.token is not None:
        return (
            f"Node {record.token} holds the token: `terrace volume mirror promote` there works without the others. Any "
            f"other node must hear {each(sorted(in_sync_nodes(record)))} first."
        )
    return f"No node holds a token: `terrace volume mirror promote` must hear {each(sorted(in_sync_nodes(record)))}."


def _unproven(facts: Facts) -> str:
    record = facts.membership
    needed = sorted(in_sync_nodes(record))
    silent = [node for node in needed if node in facts.unheard or node not in facts.voters]
    if rule_of(record) == "majority":
        heard = set(facts.voters) - set(facts.unheard)
        if not is_majority(heard, record.voters):
            return f"below quorum: {_quorum_change(facts)}"
        return f"a majority of the voters can be heard: {_ANY_IN_SYNC}"
    if rule_of(record) == "etcd":
        if facts.arbiter is not None:
            return f"the arbiter, etcd, can't be asked: {facts.arbiter}"
        return f"{_ANY_IN_SYNC} once the lease of the last one is over"
    if silent:
        return (
            f"whether {each([node for node in needed if node not in silent] or ['what can be heard'])} "
            f"has every acknowledged write can't be proven without {each(silent)}: start {each(silent)} or mend "
            f"the way there, or `terrace volume mirror promote {facts.name} --force`, which may lose writes"
        )
    return "all nodes with a leg in sync can be heard: `terrace volume mirror promote` on one of them makes it primary"


def _quorum_change(facts: Facts) -> str:
    voters = facts.membership.voters
    silent = [node for node in voters if node in facts.unheard or node not in facts.voters]
    if rule_of(facts.membership) == "etcd":
        back = f", or {each(silent)} can be heard again" if silent else ""
        return f"It goes on when etcd answers{f' ({facts.arbiter})' if facts.arbiter is not None else ''}{back}."
    have, need = len(voters) - len(silent), len(voters) // 2 + 1
    if have >= need or not silent:
        return "It goes on as soon as a majority of the voters has answered."
    return f"It goes on when {need - have} more of {_or(silent)} can be heard ({have} of {len(voters)} voters are)."


def _about_arbiter(facts: Facts, served: bool) -> str:
    """What it means that etcd is away while the mirror is served all the same."""
    if not served or facts.arbiter is None or rule_of(facts.membership) != "etcd":
        return ""
    return (
        f"etcd can't be asked now ({facts.arbiter}): the mirror goes on as long as all legs in sync do; when one "
        "fails, clients wait until etcd is back, and until then no other node can be primary."
    )


def _about_legs(facts: Facts, legs: Mapping[str, LegState]) -> list[str]:
    sentences = []
    for leg in facts.membership.legs:
        state, where = legs[leg.id], f"The leg on node {leg.node}"
        if leg.kind == "nbd":
            where = f"The leg {leg.export}"
        voice = facts.voters.get(leg.node) if leg.kind == "terrace" else None
        inconsistent = voice is not None and voice.inconsistent
        away = facts.away_s.get(leg.id)
        since = f" for {_time(away)}" if away is not None else ""
        if leg.id == facts.leg_here and facts.left_behind is not None:
            continue  # that comes first of all
        if leg.id in facts.split:
            sentences.append(f"{where} is left out: {facts.split[leg.id].rstrip('.')}.")
        elif leg.id in facts.kept_out:
            sentences.append(f"{where} is kept out of sync: {facts.kept_out[leg.id].rstrip('.')}.")
        elif state is LegState.SYNCING:
            sentences.append(f"{where} is in resync: {_resync(facts.progress[leg.id])}.")
        elif state is LegState.OFFLINE and leg.node == facts.membership.primary and _old(facts) is not None:
            continue  # that its node can't be asked, and why, comes first of all
        elif state is LegState.OFFLINE and leg.node in facts.gone and _orphaned(facts) is not None:
            continue  # the same
        elif state is LegState.OFFLINE:
            misses = leg.id not in facts.membership.in_sync
            unheard = facts.unheard.get(leg.node) if leg.kind == "terrace" else None
            why = facts.errors.get(leg.id) if unheard is None else unheard
            if why is not None and leg.kind == "terrace" and unheard is None and voice is not None:
                # Its node answers: the leg is out for a reason of its own.
                mended = f"done on node {leg.node}" if GIVE_UP_MAP in why else "mended"
                sentences.append(
                    f"{where} has been left out{since}: {why.rstrip('.')}"
                    + (f"; it misses writes, and is resynced when that is {mended}." if misses else ".")
                )
                continue
            why = f" ({why})" if why else ""
            sentences.append(
                f"{where} has been out of reach{since}{why}"
                + ("; it misses writes, and is resynced when it is back." if misses else ".")
            )
        elif state is LegState.STALE and inconsistent:
            sentences.append(
                f"{where} is inconsistent: its resync was interrupted, and it is no state that the volume ever had. It "
                "goes on when the primary reaches it."
            )
        elif state is LegState.STALE:
            sentences.append(f"{where} misses writes{since}; it is resynced when the primary reaches it.")
        elif state is LegState.UNPROVEN and voice is not None and not voice.intact:
            sentences.append(
                f"{where} may have lost some of the last {voice.recent_bytes} bytes when its machine went down."
            )
    return sentences


def _may_have(facts: Facts, legs: Mapping[str, LegState], *states: LegState) -> list[LegInfo]:
    """Legs in one of these states that may have what none in sync can read; not one whose writes would be discarded."""
    found = []
    for leg in facts.membership.legs:
        state = legs[leg.id]
        voice = facts.voters.get(leg.node) if leg.kind == "terrace" else None
        # A server in resync is most often there for just these blocks. An interrupted resync may have begun with them.
        is_hopeless = leg.kind == "nbd" if state is LegState.SYNCING else voice is not None and voice.inconsistent
        if state in states and leg.id not in facts.split and leg.id not in facts.kept_out and not is_hopeless:
            found.append(leg)
    return found


def _resync(progress: Progress) -> str:
    if progress.unread_blocks:
        return f"all is done but {progress.unread_blocks} block(s) that no leg could read, which is tried again"
    share = 100 * progress.done_bytes / progress.total_bytes if progress.total_bytes else 100.0
    if progress.stalled_s > 0:
        return f"{share:.0f} %, without progress for {_time(progress.stalled_s)}"
    return f"{share:.0f} %, " + ("just begun" if progress.eta_s is None else f"done in about {_time(progress.eta_s)}")


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _or(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else "".join(names)


def _is(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"
