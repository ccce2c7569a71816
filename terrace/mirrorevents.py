"""Which events a primary tells of its mirror, from what it sees of it: each change once. Pure.

The loss of a leg is one event. It is out of reach first (`Offline`), and left behind a moment later, when a record
without it counts (`Stale`): only that is told, as clients go on from then on. Where no such record comes, as below
quorum, what is told after `LOSS_S` is that it is out of reach, and later nothing more of that loss.

A leg that is tried again and fails again, as one whose pool is full, has one event until it fails for another reason:
what comes back is told when it has lasted. That is at once for a leg in sync, a moment for a resync; and longer for
both where the leg was lost again, for the same reason, soon after it had been back. A leg that was lost and is tried
again before anybody has looked is told as lost if that fails within `RESYNC_S`, and else as what it is.

That a mirror is `Faulted` is told when that has lasted for `FAULTED_S`: with new voters, as at its beginning, the
primary has no lease before a majority has answered once. A clean demotion is told as one, and a daemon's stop not at
all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from replication.leg import LegState, MirrorState
from replication.members import LegStatus, MirrorStatus

LOSS_S: Final = 2.0
"""So long a leg that is out of reach may take to be left behind; a record takes milliseconds as a rule."""
RESYNC_S: Final = 2.0
"""So long a resync lasts before it is told; one that comes to nothing does so sooner as a rule."""
FAULTED_S: Final = 2.0
"""So long a mirror is out of service before that is told."""
REPEATED_S: Final = 60.0
"""A leg that is lost again, for the same reason, within this time is told as back when that has lasted so long."""
_OUT: Final = (LegState.OFFLINE, LegState.STALE)


@dataclass
class Changes:
    """What is to be told, as kind and text, in this order."""

    events: list[tuple[str, str]] = field(default_factory=list)
    in_sync: list[str] = field(default_factory=list)
    """Ids of legs that are up to date now, and weren't when it was looked last."""


class MirrorEvents:
    """What has been told of one mirror by this node as its primary."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._seen: dict[str, LegState] = {}
        self._told: dict[str, LegState] = {}
        self._lost_at: dict[str, float] = {}
        """Of legs whose loss isn't told yet."""
        self._lost_by: dict[str, tuple[str | None, float]] = {}
        """Why, and when last: of legs whose loss was told, or goes on."""
        self._repeats: set[str] = set()
        """Legs that were lost again for the same reason, soon after they had been back."""
        self._back_at: dict[str, float] = {}
        """Of legs that are back, or are tried again, and whose loss is what was told last: since when."""
        self._unseen: dict[str, float] = {}
        """Of legs that were up to date when it was looked last and are being resynced, where that isn't told yet."""
        self._split: set[str] = set()
        self._state: MirrorState | None = None
        self._faulted_at: float | None = None
        """Since when it is, where that isn't told yet."""
        self._has_ended = False
        self._new: set[str] = set()
        """Legs that were added and haven't been up to date yet, nor failed."""

    def begun(self, name: str, status: MirrorStatus, now: float) -> Changes:
        """This node is primary from now on."""
        self._seen, self._told, self._lost_at = {}, {}, {}
        self._lost_by, self._back_at, self._unseen, self._repeats = {}, {}, {}, set()
        self._faulted_at, self._has_ended = None, False
        term = status.membership.term.number
        began = ("mirror", f"node {self._node} is primary of {name}, term {term}")
        changes = self._look(name, status, now, first=True)
        changes.events.insert(0, began)
        return changes

    def looked(self, name: str, status: MirrorStatus, now: float) -> Changes:
        """It is seen so, at `now` in seconds."""
        return self._look(name, status, now, first=False)

    def problem(self, name: str, sentence: str) -> list[tuple[str, str]]:
        """It can't be served here, though it should."""
        if self._state is MirrorState.FAULTED:
            return []
        self._state = MirrorState.FAULTED
        return [("mirror", f"mirror {name} can't be served here: {sentence}")]

    def _look(self, name: str, status: MirrorStatus, now: float, *, first: bool) -> Changes:
        changes = Changes()
        if status.deposed is not None:
            self._look_at_end(changes, name, status)
            return changes
        self._drop_removed({leg.info.id for leg in status.legs})
        for leg in status.legs:
            in_sync = leg.info.id in status.membership.in_sync
            self._look_at_leg(changes, name, leg, in_sync, now, first=first)
        if status.state is not MirrorState.FAULTED:
            self._faulted_at = None
        wanting = {leg.info.id for leg in status.legs if leg.state is not LegState.UP_TO_DATE}
        if status.state is MirrorState.DEGRADED:
            if self._state is MirrorState.ONLINE and wanting <= self._new:
                return changes  # it has got a leg, which can't be up to date yet: nothing that it had is missing
            if wanting and wanting <= self._lost_at.keys():
                return changes  # the loss comes first
            if self._state is MirrorState.ONLINE and wanting and wanting <= self._lost_at.keys() | self._unseen.keys():
                return changes  # what is told of these legs comes first
        if status.state is MirrorState.ONLINE and any(leg.info.id in self._back_at for leg in status.legs):
            return changes  # it is told with the leg
        if status.state is MirrorState.FAULTED and status.state is not self._state:
            self._faulted_at = now if self._faulted_at is None else self._faulted_at
            if now - self._faulted_at < FAULTED_S:
                return changes
        if status.state is not self._state:
            self._state = status.state
            changes.events.append(("mirror", f"mirror {name} is {status.state.value}"))
        return changes

    def _drop_removed(self, legs: set[str]) -> None:
        """What is known of others than these, which come and go for as long as this node is primary."""
        for leg_id in self._seen.keys() - legs:
            for known in (self._seen, self._told, self._lost_at, self._lost_by, self._back_at, self._unseen):
                known.pop(leg_id, None)
        self._repeats &= legs
        self._split &= legs
        self._new &= legs

    def _look_at_end(self, changes: Changes, name: str, status: MirrorStatus) -> None:
        """It is served from here no more, at once: nobody looks later on. The legs are let go of, not lost."""
        if self._has_ended or status.is_stopped:
            return
        self._has_ended = True
        self._state = MirrorState.FAULTED
        if status.membership.primary is None:  # by a record that counts
            token = status.membership.token
            then = f": node {token} holds the token" if token is not None else ""
            changes.events.append(("mirror", f"mirror {name} was demoted, and no node serves it now{then}"))
        else:
            why = status.deposed.removeprefix(f"{name}: ") if status.deposed is not None else ""
            changes.events.append(("mirror", f"mirror {name} is {status.state.value}: {why}"))

    def _look_at_leg(
        self, changes: Changes, name: str, leg: LegStatus, in_sync: bool, now: float, *, first: bool
    ) -> None:
        leg_id, state = leg.info.id, leg.state
        if state is LegState.OFFLINE and not in_sync:
            state = LegState.STALE  # as soon as the record says so: then clients go on without it
        split = leg.error is not None and leg.error.startswith("split brain")
        if split and leg_id not in self._split:
            text = f"the leg of {name} on node {leg.info.node}: {leg.error}"
            changes.events.append(("splitbrain", text))
        self._split = self._split - {leg_id} | ({leg_id} if split else set())
        if state is LegState.UP_TO_DATE and self._seen.get(leg_id) is not state:
            changes.in_sync.append(leg_id)
        self._seen[leg_id] = state

        before = self._told.get(leg_id)
        if state is LegState.OFFLINE and before is not LegState.OFFLINE:
            if first:
                before = self._told[leg_id] = LegState.UP_TO_DATE  # by the record
            if before is not None and now - self._lost_at.setdefault(leg_id, now) < LOSS_S:
                return
        self._lost_at.pop(leg_id, None)
        if state in _OUT:
            was_back = self._back_at.pop(leg_id, None) is not None
            if was_back or before not in _OUT:
                is_as_before = self._note_loss(leg, now)
                if before in _OUT and not is_as_before:
                    before = LegState.SYNCING  # it was, though that wasn't told
        elif before in _OUT and not self._has_lasted(leg_id, state, now):
            return
        where = f"the leg of {name} on {'' if leg.info.kind == 'nbd' else 'node '}{leg.info.place}"
        if (before, state) == (LegState.UP_TO_DATE, LegState.SYNCING):
            if now - self._unseen.setdefault(leg_id, now) < RESYNC_S:
                return
        elif leg_id in self._unseen and state is before:  # it was up to date again sooner: it was lost all the same
            changes.events.append(("leg", f"{where} is {LegState.SYNCING.value}"))
            before = LegState.SYNCING
        self._unseen.pop(leg_id, None)
        if state is before:
            return
        self._told[leg_id] = state
        if before is None and not first and state is not LegState.UP_TO_DATE:
            self._new.add(leg_id)
        elif state is not LegState.SYNCING:
            self._new.discard(leg_id)
        if before is None and ((first and state is LegState.UP_TO_DATE) or not first):
            return  # nothing has changed: it is well, or has just been added
        if split or (before, state) == (LegState.OFFLINE, LegState.STALE):
            return  # it has an event of its own; the same loss
        why = f": {leg.error}" if leg.error else ""
        changes.events.append(("leg", f"{where} is {state.value}{why}"))

    def _note_loss(self, leg: LegStatus, now: float) -> bool:
        """It is lost now; whether for the same reason as the last time."""
        reason, at = self._lost_by.get(leg.info.id, (None, -REPEATED_S))
        is_as_before = reason is not None and leg.error == reason
        self._lost_by[leg.info.id] = leg.error, now
        self._repeats.discard(leg.info.id)
        if is_as_before and now - at < REPEATED_S:
            self._repeats.add(leg.info.id)
        return is_as_before

    def _has_lasted(self, leg_id: str, state: LegState, now: float) -> bool:
        """Whether a leg, whose loss was told last, has been back for so long that this is told."""
        since = self._back_at.setdefault(leg_id, now)
        bound_s = RESYNC_S if state is LegState.SYNCING else 0.0
        if now - since < (REPEATED_S if leg_id in self._repeats else bound_s):
            return False
        del self._back_at[leg_id]
        return True
