"""What a leg durably knows, and may be asked: promises, records, what others miss.

A `LegKeeper` owns the record of one local leg (`LegRecord`), which lies in the leg's volume beside its trackers, and is
the only one that changes it. One lock serializes its changes; each is judged and begun without a checkpoint in
between. Readers need no lock: `record` is replaced by a whole one, after it has become durable.

**A save that fails** may or may not be durable. In memory all stays as it was, and nobody is told that it was done.
Both outcomes are then states that a voter may be in: the next save replaces the whole record, and a crash before it
shows a promise or a record that nobody was told of, as if the answer had been lost. One thing differs: a failed `leave`
may have declared the leg clean, so `take_part` saves again, whatever it believes to be stored.

**Trackers** (sets of extents, in the same durable save as the record that changes their meaning):

- `recent`, `recent-old`: what was written since the last flush that all legs have done. The sessions rotate them.
- `missing:X`: what leg X doesn't have. It begins with the record in which X is no longer in sync, as a copy of both
  recent ones: what X has surely stored is in neither. It begins as the whole volume if this leg can't know: X is new,
  or this leg was itself not in sync, and has got by a resync what others may miss too.
- `missing:X` of an NBD server's leg becomes the whole volume with a new term, unless the recent ones are sure to tell
  all (`replication.nbdleg.tells_all`): such a leg has no trackers of its own, and can't be fenced.
- `missing:ME`: what this leg may have that others don't, from when it learns that it isn't in sync: its recent ones at
  that time. Sessions rotate the recent ones of a leg in resync too, and then this remains.

A tracker goes when leg and X are both in sync: not before, since the `missing:*` of a leg that rejoins are the blocks
in which it differs. The save of that record has it still, so that it is there whichever way that ends; then it is
dropped in memory, and with the next save or checkpoint from the disk. After a crash in between it is there again: the
next common flush drops it (`settled`), unless a save has failed meanwhile, of which it isn't known what it left.
"""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from replication.leg import MISSING, RECENT, RECENT_OLD, Extents, LegStore, Position, missing_tracker
from replication.lineage import Relation, both_histories, how_to_discard, last_of_others, relation, supersedes
from replication.membership import LegInfo, Membership, Term, decode, encode
from replication.nbdleg import tells_all

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LegRecord:
    """What a leg knows, durable."""

    me: str
    """Its id."""
    promised: Term | None = None
    """Nothing of lower terms is taken any more."""
    accepted: Membership | None = None
    candidates: frozenset[str] = frozenset()
    """Nodes that were promised a term since the record was accepted."""
    inconsistent: bool = False
    """It is being resynced, and is no state that the volume ever had."""
    boot: str | None = None
    """Boot id of the kernel under which it takes part; None: closed cleanly."""
    doubtful: bool = False
    """It may have lost writes, and has not been made equal to the others since."""
    position: Position | None = None
    """The last batch that it had when it was closed cleanly."""
    superseded: Membership | None = None
    """What this leg has heard of and not accepted, by which its own record is no ground to go on from any more."""
    elsewhere: Term | None = None
    """The last term in which another node was primary, by a record that this leg has accepted, or by one that such a
    record came from: what was known of the volume here before it, in memory, is not to be relied on."""

    def encode(self) -> bytes:
        """As JSON in UTF-8."""
        plain: dict[str, Any] = {
            "version": FORMAT_VERSION,
            "me": self.me,
            "promised": term_to_json(self.promised),
            "accepted": json.loads(encode(self.accepted)) if self.accepted else None,
            "candidates": sorted(self.candidates),
            "inconsistent": self.inconsistent,
            "boot": self.boot,
            "doubtful": self.doubtful,
            "position": None
            if self.position is None
            else {"term": term_to_json(self.position.term), "sequence": self.position.sequence},
            "superseded": json.loads(encode(self.superseded)) if self.superseded else None,
            "elsewhere": term_to_json(self.elsewhere),
        }
        return json.dumps(plain, separators=(",", ":"), sort_keys=True).encode()

    @staticmethod
    def decode(data: bytes) -> LegRecord:
        """Judges what a disk says. Raises OSError EPROTO with a sentence."""
        try:
            plain = json.loads(data)
            if plain["version"] != FORMAT_VERSION:
                raise OSError(
                    errno.EPROTO,
                    f"a leg's record has version {plain['version']}, and {FORMAT_VERSION} is understood; use the "
                    "version of Terrace that wrote it, or a later one",
                )
            accepted, position = plain["accepted"], plain["position"]
            superseded = plain.get("superseded")  # not in what the first releases wrote
            return LegRecord(
                me=_of_type(plain["me"], str),
                promised=term_from_json(plain["promised"]),
                accepted=decode(json.dumps(accepted).encode()) if accepted is not None else None,
                candidates=frozenset(_of_type(name, str) for name in plain["candidates"]),
                inconsistent=_of_type(plain["inconsistent"], bool),
                boot=None if plain["boot"] is None else _of_type(plain["boot"], str),
                doubtful=_of_type(plain["doubtful"], bool),
                position=None if position is None else _position(position),
                superseded=decode(json.dumps(superseded).encode()) if superseded is not None else None,
                elsewhere=term_from_json(plain.get("elsewhere")),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OSError(errno.EPROTO, f"a leg's record can't be understood: {error!r}") from None


def _of_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value


def _position(plain: Any) -> Position:
    term = term_from_json(plain["term"])
    if term is None:
        raise ValueError("a position without a term")
    return Position(term, _of_type(plain["sequence"], int))


def term_to_json(term: Term | None) -> list[Any] | None:
    """[number, id]."""
    return None if term is None else [term.number, term.id]


def term_from_json(plain: Any) -> Term | None:
    """Raises ValueError or TypeError for what is no term."""
    if plain is None:
        return None
    number, id_ = plain
    return Term(_of_type(number, int), _of_type(id_, str))


def allowed(promised: Term | None, term: Term) -> bool:
    """Whether a promise lets this term in: it is the promised one, or higher."""
    return promised is None or term == promised or term.number > promised.number


def judge_prepare(promised: Term | None, term: Term, who: str) -> None:
    """Raises OSError ESTALE. The same term again is the same candidate, whose answer got lost."""
    if not allowed(promised, term):
        assert promised is not None
        raise OSError(errno.ESTALE, f"{who} has promised term {promised.number} already; ask with a higher one")


def judge_accept(promised: Term | None, accepted: Membership | None, new: Membership, who: str) -> bool:
    """Whether `new` must be stored; False: it is already. Raises OSError ESTALE, EINVAL."""
    if accepted is not None and accepted.mirror != new.mirror:
        raise OSError(errno.EINVAL, f"{who} belongs to the mirror {accepted.mirror}, not to {new.mirror}")
    if not allowed(promised, new.term):
        assert promised is not None
        raise OSError(
            errno.ESTALE, f"{who} has promised term {promised.number}, and takes nothing of {new.term.number}"
        )
    if accepted is None or new.place > accepted.place:
        return True
    if new == accepted:
        return False
    raise OSError(
        errno.ESTALE,
        f"{who} has the record {accepted.term.number}.{accepted.epoch} ({accepted.term.id[:8]}), "
        f"and {new.term.number}.{new.epoch} ({new.term.id[:8]}) doesn't come after it",
    )


def is_superseded(
    own: Membership | None,
    leg_id: str,
    me: str,
    known: Membership | None,
    record: Membership,
    node: str,
    *,
    served: bool,
) -> bool:
    """Whether node `node`'s record supersedes `own`, of node `me`, and tells more than what is `known` to do so."""
    if own is None or own.mirror != record.mirror or (known is not None and record.place <= known.place):
        return False
    if record.primary == me:
        return False  # own records are never behind what counts: it is one of ours, which may
    legs = record.legs_on(record.primary or node)
    return supersedes(record, legs[0].id if legs else "", own, leg_id, served=served)


def still_superseded(known: Membership | None, accepted: Membership) -> Membership | None:
    """What was heard of, where a record that is accepted is no answer to it: one of a term before it."""
    return known if known is not None and known.term.number > accepted.term.number else None


class LegKeeper:
    """The record of one local leg; see the module."""

    def __init__(self, store: LegStore, record: LegRecord, *, node: str, boot: str) -> None:
        self.store = store
        self.record = record
        """What is durable. Replaced, never changed."""
        self.node = node
        self.boot = boot
        """The boot id of the kernel now."""
        self.on_fence: list[Callable[[Term], None]] = []
        """Called synchronously with the term when a promise has risen: sessions of lower terms end."""
        self.before_overwritten: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        """Awaited before the record says that a leg which was consistent isn't any more: its last chance to be kept."""
        self.whole_again: Callable[[], None] = lambda: None
        """Called when the record says that a leg which wasn't consistent is."""
        self._lock = trio.Lock()
        self._clean_in_doubt = False
        self._settled_unsaved = False
        self._unsure = False
        """A save is under way, or has failed: the store may have another record than `record`."""
        self._promised_here: Term | None = None
        """What was promised since this keeper was made: whoever asked knows what the leg is worth."""

    @property
    def intact(self) -> bool:
        """It has all that it ever took."""
        return not self.record.doubtful and self.record.boot in (None, self.boot)

    def allows(self, term: Term) -> bool:
        """Whether a session of this term may write."""
        return allowed(self.record.promised, term)

    async def prepare(self, term: Term, candidate: str = "") -> LegRecord:
        """Promise the node `candidate` to take nothing of lower terms; durable, and they are fenced, on return.

        The record is as it was before, but for the promise. Raises OSError ESTALE.
        """
        async with self._lock:
            before = self.record
            judge_prepare(before.promised, term, self._who)
            if term != before.promised:
                candidates = before.candidates | {candidate}
                await self._save(dataclasses.replace(before, promised=term, candidates=candidates))
                self._fence(term)
            self._promised_here = term
            return dataclasses.replace(before, promised=term)

    async def accept(self, membership: Membership, *, inconsistent: bool = False, discard: bool = False) -> None:
        """Store a record, durably.

        `inconsistent`: this leg begins to be resynced. That ends with a record in which it is in sync. `discard`: an
        operator has decided that what this leg has that the others don't is to be overwritten.

        Raises OSError ESTALE (a higher term was promised, or a later record stored), EUCLEAN (split brain), EINVAL.
        """
        async with self._lock:
            old = self.record
            needed = judge_accept(old.promised, old.accepted, membership, self._who)
            if not needed and (old.inconsistent or not inconsistent) and not self._settled_unsaved:
                return
            self._judge_leg(membership, inconsistent, discard)
            in_sync = old.me in membership.in_sync
            record = dataclasses.replace(
                old,
                promised=membership.term,
                accepted=membership,
                candidates=frozenset() if needed else old.candidates,
                inconsistent=(old.inconsistent or inconsistent) and not in_sync,
                doubtful=old.doubtful and not (self._joins(membership) and membership.epoch > 0),
                superseded=still_superseded(old.superseded, membership) if needed else old.superseded,
                elsewhere=last_of_others(membership, old.accepted or membership, self.node) or old.elsewhere,
            )
            if record.inconsistent and not old.inconsistent:
                await self.before_overwritten()
            await self._save(record, self._trackers(membership))
            if old.inconsistent and not record.inconsistent:
                self.whole_again()
            if old.promised != membership.term:
                self._fence(membership.term)
            self._drop_trackers()

    async def heard_of(self, record: Membership, node: str, *, served: bool) -> None:
        """Node `node` has this record, and is primary by it now if `served`; this node isn't. Durable on return is that
        this leg doesn't go on from its own, if the other supersedes it: until it accepts one, or an operator forces it.

        Raises OSError.
        """
        async with self._lock:
            old = self.record
            known = old.superseded
            if is_superseded(old.accepted, old.me, self.node, known, record, node, served=served):
                await self._save(dataclasses.replace(old, superseded=record))

    def _judge_leg(self, new: Membership, inconsistent: bool, discard: bool) -> None:
        old = self.record
        in_sync = old.me in new.in_sync
        if inconsistent and in_sync:
            raise OSError(errno.EINVAL, f"{self._who} can't be in sync and inconsistent")
        if old.inconsistent and in_sync and new.epoch == 0:
            # Only the primary that has resynced it knows that it is whole, and says so within its term.
            raise OSError(errno.EINVAL, f"{self._who} is inconsistent: it can be in sync only after a resync")
        if old.accepted is None or discard:
            return
        # Also if it is out by a record that was only tried: none but its own primary brings it back by a resync.
        stays = old.me in old.accepted.in_sync or new.epoch == 0
        begins = in_sync and stays and new.term.number > old.accepted.term.number
        if begins and not self.intact and self._promised_here != new.term:
            # The candidate may have left out a leg that has everything, since this one had it too when it promised.
            raise OSError(
                errno.ESTALE,
                f"{self._who} may have lost writes since it promised term {new.term.number}: its machine went down; "
                "promote again",
            )
        goes_on = in_sync and new.term == old.accepted.term and old.me in old.accepted.in_sync
        if goes_on and not self.intact and not old.accepted.in_sync & old.accepted.terrace_ids <= new.in_sync:
            # Who leaves may be the only one that has everything: the primary doesn't know yet what this one has lost.
            # It will when it connects, makes all equal, and tries again. It isn't told that its term is over.
            raise OSError(
                errno.EBUSY,
                f"{self._who} may have lost writes as its machine went down: no other one leaves before they are equal",
            )
        if in_sync and old.inconsistent and old.boot not in (None, self.boot):
            raise OSError(errno.EBUSY, f"{self._who} may have lost what its resync wrote: its machine went down")
        if relation(new, old.accepted, old.me) is Relation.SPLIT_BRAIN:
            sides = both_histories(new, old.accepted, f"node {new.primary}", f"node {self.node}")
            raise OSError(
                errno.EUCLEAN,
                f"split brain: {sides}; decide whose writes are lost: {how_to_discard(new, self.node)}, or promote "
                f"node {self.node} with --force",
            )

    def _joins(self, new: Membership) -> bool:
        """Whether this leg is in sync by this record, and wasn't before."""
        old = self.record
        was = old.accepted is not None and old.me in old.accepted.in_sync and not old.inconsistent
        return old.me in new.in_sync and not was

    def _trackers(self, new: Membership) -> dict[str, Extents]:
        """All that are to be there together with this record, and those that can go once it is durable."""
        old, trackers = self.record.accepted, dict(self.store.trackers)
        me = self.record.me
        joins = self._joins(new) and old is not None
        for leg in new.legs:
            name = missing_tracker(leg.id)
            if leg.id in new.in_sync:
                continue
            is_new = joins or old is None or not old.has(leg.id)
            if leg.id != me and (is_new or not self._tells_all(leg, old, new)):
                trackers[name] = self._everything()
            elif old is not None and leg.id in old.in_sync:
                trackers[name] = self._recent(trackers, name)
            elif leg.id != me and name not in trackers:
                trackers[name] = self._everything()
        return trackers

    def _tells_all(self, leg: LegInfo, old: Membership | None, new: Membership) -> bool:
        """Whether the recent ones have all that the leg may lack, or have beyond this one."""
        if leg.kind == "terrace" or old is None or new.term == old.term:
            return True
        return self.intact and tells_all(old, new)

    def _everything(self) -> Extents:
        extents = self.store.empty_extents()
        extents.add(0, self.store.size_bytes)
        return extents

    def _recent(self, trackers: dict[str, Extents], name: str) -> Extents:
        extents = self.store.empty_extents()
        for one in (RECENT, RECENT_OLD, name):
            if one in trackers:
                extents.update(trackers[one])
        return extents

    def _drop_trackers(self) -> None:
        """Those of legs that miss nothing by the record, which is durable."""
        accepted, trackers = self.record.accepted, self.store.trackers
        if accepted is None or self.record.me not in accepted.in_sync:
            return
        wanted = {missing_tracker(leg.id) for leg in accepted.legs if leg.id not in accepted.in_sync}
        for name in [name for name in trackers if name.startswith(MISSING) and name not in wanted]:
            del trackers[name]

    async def take_part(self) -> None:
        """Before the first write of a session: durable on return is that the leg isn't clean. Raises OSError."""
        async with self._lock:
            trackers = dict(self.store.trackers)
            complete = all(name in trackers for name in (RECENT, RECENT_OLD))
            if self.record.boot == self.boot and complete and not self._clean_in_doubt:
                return
            for name in (RECENT, RECENT_OLD):
                if name not in trackers:
                    trackers[name] = self.store.empty_extents()
            record = dataclasses.replace(self.record, boot=self.boot, doubtful=not self.intact, position=None)
            await self._save(record, None if complete else trackers)
            self._clean_in_doubt = False

    async def leave(self, position: Position | None) -> None:
        """After the last write of the last session: all of them are durable, and the leg is clean. Raises OSError."""
        async with self._lock:
            if self.record.boot is None and self.record.position == position and not self._clean_in_doubt:
                return
            self._clean_in_doubt = True
            await self._save(dataclasses.replace(self.record, boot=None, doubtful=not self.intact, position=position))
            self._clean_in_doubt = False

    def settled(self) -> None:
        """All legs in sync were made equal and have flushed in a session: nothing that this leg lost is missing now.

        Called at each flush that all legs have done (`Leg.flushed_by_all`). Durable with the next save, and `accept` of
        the same record again is one: a primary that has reconciled does this at each leg before it serves. Else a leg
        that is killed later is taken for one that has lost something, and another that really has may be the source.
        """
        if not self._unsure:
            self._drop_trackers()
        in_sync = self.record.accepted is not None and self.record.me in self.record.accepted.in_sync
        if self.record.doubtful and in_sync:
            self.record = dataclasses.replace(self.record, doubtful=False)
            self._settled_unsaved = True

    @property
    def _who(self) -> str:
        return f"the leg {self.store.export_name} on node {self.node}"

    async def _save(self, record: LegRecord, trackers: dict[str, Extents] | None = None) -> None:
        unsaved, self._settled_unsaved = self._settled_unsaved, False
        self._unsure = True
        try:
            await self.store.save(record.encode(), trackers)
        except BaseException:
            self._settled_unsaved = self._settled_unsaved or unsaved
            raise
        self._unsure = False
        # Settled while it was being saved: that is still to be saved.
        self.record = dataclasses.replace(record, doubtful=False) if self._settled_unsaved else record

    def _fence(self, term: Term) -> None:
        for fenced in list(self.on_fence):
            fenced(term)
