"""A mirror's state and sentences: `replication.explain` over what this node knows and what others have said of it.

All that people read of a mirror at a node that doesn't serve it comes from here, so that no two commands differ.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from replication.cluster import VoterState
from replication.explain import GIVE_UP_MAP, Explanation, Facts, Progress, explain
from replication.healing import map_is_damaged, new_leg
from replication.leg import BLOCK_BYTES, RECENT, LegState, MirrorState
from replication.lineage import are_apart
from replication.members import LegStatus, MirrorStatus
from replication.membership import Membership
from replication.promotion import Refused
from replication.unreadable import first_step
from terrace.localmirror import LocalMirror
from terrace.primary import MirrorPart

NAMED_RANGES: Final = 5


def known_record(mirror: MirrorPart) -> Membership:
    """The newest that this node knows, though its leg may not go by it. Raises OSError as `MirrorPart.membership`."""
    if mirror.is_left_behind and mirror.superseded is not None:
        return mirror.superseded
    return mirror.membership


def about_map(name: str, here: str, status: MirrorStatus, leg_id: str) -> str:
    """A sentence about a leg whose map is damaged, with the next step. `here`: this node, the primary."""
    legs = [leg for leg in status.legs if leg.info.kind == "terrace"]
    node = next((leg.info.node for leg in legs if leg.info.id == leg_id), leg_id)
    others = sum(leg.state is LegState.UP_TO_DATE for leg in legs if leg.info.id != leg_id)
    step = new_leg(name, node, is_primarys=node == here, others=others)
    return f"{map_is_damaged(name, node)}, and nothing is written there: {step}"


def about_unreadable(name: str, status: MirrorStatus, offsets: Iterable[int], silent: Collection[str]) -> str:
    """That no leg can read the blocks at these offsets, in order, with the next step. `silent`: nodes that are away."""
    may_have = [leg for leg in status.legs if leg.kept_out is None and not (leg.error or "").startswith("split brain")]
    away = [leg.info for leg in may_have if leg.state in (LegState.OFFLINE, LegState.STALE)]
    syncing = [leg.info for leg in may_have if leg.state is LegState.SYNCING and leg.info.kind == "terrace"]
    which = "in sync " if away or syncing else ""
    return f"no leg of {name} {which}can read {ranges_in_words(offsets)}: {first_step(away, silent, syncing)}"


def map_notice(name: str, here: str, status: MirrorStatus, leg: LegStatus) -> str | None:
    """`about_map` where there is something to say of the map of this leg.

    Not of one that is out for just that: why it is out names the next step already, and that is another one.
    """
    if leg.info.id not in status.map_damaged or (leg.error is not None and GIVE_UP_MAP in leg.error):
        return None
    return about_map(name, here, status, leg.info.id)


def writes_fail(status: MirrorStatus) -> bool:
    """Whether writes get EIO by the option for below quorum: what `MirrorStatus.waiting` says is why.

    As `replication.explain`: below quorum is also where the lease is over, and not where no leg in sync is connected.
    """
    if status.waiting is None or status.is_lost:
        return False
    is_below = status.state is MirrorState.FAULTED and status.membership.options.below_quorum == "fail"
    return status.is_failing or is_below


def newest_record(mirror: MirrorPart, voices: Mapping[str, VoterState]) -> Membership:
    """As `known_record`, with what others have said; the other side of a split brain has no say in that."""
    own = known_record(mirror)
    said = [voice.accepted for voice in voices.values() if voice.accepted is not None]
    same_side = [theirs for theirs in said if not are_apart(own, mirror.me, theirs, _leg_of_primary(theirs))]
    return max([own, *same_side], key=lambda record: record.place)


def _leg_of_primary(record: Membership) -> str:
    legs = record.legs_on(record.primary) if record.primary is not None else record.legs
    return legs[0].id if legs else ""


def explained(
    mirror: MirrorPart,
    status: Mapping[str, Any],
    voices: Mapping[str, VoterState],
    unheard: Mapping[str, str],
    gone: frozenset[str] = frozenset(),
    *,
    name: str | None = None,
) -> Explanation:
    """What is wrong, what it waits for, and what would change it.

    `status`: as `Mirrors.local_status` has it. `voices`: what nodes have said just now, this one included; `unheard`:
    why others haven't; `gone`: those of them that have said that they know nothing of it. `name`: what the mirror is
    called where it is read, if not here.
    """
    served = mirror.mirror if mirror.serves else None
    seen = served.status() if served is not None else None
    legs = seen.legs if seen is not None else ()
    arbiter = status["arbiter"] if status["arbiter"] is not None and status["arbiter"]["kind"] == "etcd" else None
    problem = mirror.problem.strerror if mirror.problem is not None and served is None else None
    own_problem = problem if mirror.is_named_primary or arbiter is not None else None
    # Whether what waits is only the next writes, or everything.
    stands = status["state"] == MirrorState.FAULTED.value
    return explain(
        Facts(
            name=name or mirror.name,
            membership=newest_record(mirror, voices),
            voters=voices,
            unheard=unheard,
            connected=frozenset(leg.info.id for leg in legs if leg.state.value in ("UpToDate", "Syncing")),
            serving=served is not None,
            suspended=status["waiting"] if stands else None,
            held=status["waiting"] if not stands else None,
            held_by_leg=seen is not None and seen.waits_for_leg,
            is_lost=seen is not None and seen.is_lost,
            is_failing=seen is not None and seen.is_failing,
            progress={
                leg.info.id: Progress(
                    leg.resync.done_bytes,
                    leg.resync.total_bytes,
                    leg.resync.eta_s,
                    unread_blocks=leg.resync.unread_blocks,
                )
                for leg in legs
                if leg.resync is not None and leg.state.value == "Syncing"
            },
            away_s={leg.info.id: leg.for_s for leg in legs if leg.state.value not in ("UpToDate", "Syncing")},
            errors={leg.info.id: leg.error for leg in legs if leg.error is not None},
            kept_out={leg.info.id: leg.kept_out for leg in legs if leg.kept_out is not None},
            split={
                leg.info.id: leg.error for leg in legs if leg.error is not None and leg.error.startswith("split brain")
            },
            map_damage={
                leg.info.id: notice
                for leg in legs
                if seen is not None and (notice := map_notice(name or mirror.name, status["node"], seen, leg))
            },
            unreadable="" if served is None else ranges_in_words(sorted(served.healing.unmendable)),
            left_behind=problem if mirror.is_left_behind else None,
            leg_here=mirror.me,
            gone=gone,
            delete_here=_deletion(mirror) if gone else "",
            arbiter=arbiter["problem"] if arbiter is not None and not arbiter["answers"] else None,
            decision=Refused(own_problem) if own_problem is not None else None,
        )
    )


def removed_here(mirror: MirrorPart, theirs: Mapping[str, Any]) -> str | None:
    """That the primary, which says `theirs`, has removed the leg here from the mirror in the absence of this node."""
    if not isinstance(mirror, LocalMirror) or any(leg["id"] == mirror.me for leg in theirs["legs"]):
        return None
    own, primary = mirror.membership, theirs["primary"]
    # Only the primary by a record that counts has sessions with a leg: one that has had none may never have been one.
    never_was = mirror.keeper.record.inconsistent and not _took_part(mirror)
    again = f"`terrace volume mirror add` on node {primary} makes it again, or `{_deletion(mirror)}` deletes it here"
    if never_was and not own.has(mirror.me):
        return (
            "the leg here is none of the mirror's: it is just being made, or that was broken off, or it was removed "
            f"before it got anything, and then {again}"
        )
    is_older = (own.term.number, own.epoch) < (theirs["term"], theirs["epoch"])
    if not is_older and own.has(mirror.me):
        return None
    if never_was:
        return (
            f"the leg here is left over, and never got anything: it was being added, and that was broken off, or node "
            f"{primary} has removed it while it couldn't be reached; {again}"
        )
    return (
        f"the leg here is left over: node {primary} has removed it from the mirror while it couldn't be reached; "
        f"`{_deletion(mirror)}` deletes it here"
    )


def is_left_over(mirror: MirrorPart) -> bool:
    """Whether the leg here is none of the mirror any more, as far as is known here without asking anybody."""
    if not isinstance(mirror, LocalMirror) or mirror.serves or mirror.accepted is None:
        return False
    own = mirror.keeper.record
    is_out = not known_record(mirror).has(mirror.me)
    # Else it may just be being made.
    return mirror.heard_left_over or (is_out and (_took_part(mirror) or not own.inconsistent))


def is_being_made(mirror: MirrorPart) -> bool:
    """Whether the leg here may be just being made: it has never been one by the record here."""
    return isinstance(mirror, LocalMirror) and not mirror.membership.has(mirror.me) and not _took_part(mirror)


def _took_part(mirror: LocalMirror) -> bool:
    """Whether the leg here has ever had a session with a primary, or been one."""
    own = mirror.keeper.record
    return own.boot is not None or own.position is not None or RECENT in mirror.keeper.store.trackers


def _deletion(mirror: MirrorPart) -> str:
    if not isinstance(mirror, LocalMirror):
        return ""
    more = " --snapshots" if mirror.volume.snapshots else ""
    return f"terrace volume delete {mirror.name} --force{more}"


def ranges_in_words(offsets: Iterable[int]) -> str:
    """Blocks at these offsets, in order, as ranges; the first few. Empty for none."""
    runs: list[tuple[int, int]] = []
    for offset in offsets:
        if runs and runs[-1][1] == offset:
            runs[-1] = runs[-1][0], offset + BLOCK_BYTES
        else:
            runs.append((offset, offset + BLOCK_BYTES))
    named = ", ".join(f"{start}-{stop - 1}" for start, stop in runs[:NAMED_RANGES])
    more = f" and {len(runs) - NAMED_RANGES} more ranges" if len(runs) > NAMED_RANGES else ""
    return f"bytes {named}{more}" if runs else ""
