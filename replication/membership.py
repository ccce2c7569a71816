"""A mirror's truth: who is primary, in which term, which legs have every acknowledged write.

It changes only by whole records, each with its place in one order: (term, epoch). A primary that excludes or admits a
leg, or changes what the mirror is made of, writes the next epoch of its term; whoever becomes primary writes the first
epoch of a higher term. Who must have stored a record before it counts is `replication.voters`' affair.

A `Membership` is immutable, and on disk and between nodes it is JSON (`encode`, `decode`), with a version: an unknown
one is refused.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

FORMAT_VERSION = 1
MAX_LEGS = 4
MAX_HISTORY = 128
"""Generations that are remembered, the newest: a leg that was away for longer than these is compared in full."""


@dataclass(frozen=True, order=True)
class Term:
    """One start of one primary. Equal numbers with different ids are split brain, not a tie."""

    number: int
    id: str
    """16 random hex digits."""


@dataclass(frozen=True)
class Generation:
    """One record that counted, as later ones remember it: what is not in a leg's history it has not come from."""

    term: Term
    epoch: int
    primary: str | None
    forced: Literal["no", "fenced", "apart"] = "no"
    """Whether it was made without proof. "fenced": a leg has promised that its predecessor's primary could acknowledge
    nothing without, except after a record of its own. "apart": none has, so it may have gone on unseen."""
    outside: bool = dataclasses.field(default=False, compare=False)
    """The primary had neither a leg nor a say: no later record names it but this."""


@dataclass(frozen=True)
class LegInfo:
    """One copy, as the mirror knows it. A fresh disk is a fresh leg: its id never comes back."""

    id: str
    """16 random hex digits."""
    node: str
    """Name of the node that it is on; of an NBD leg, of the node that talks to it."""
    export: str
    """POOL/VOL there; of an NBD leg, its URI."""
    kind: Literal["terrace", "nbd"] = "terrace"

    @property
    def place(self) -> str:
        """What people call it by: its node; an NBD leg's URI."""
        return self.export if self.kind == "nbd" else self.node


@dataclass(frozen=True)
class Options:
    """How the mirror behaves; the same on each leg."""

    timeout_s: float = 5.0
    """So long a leg may be silent before writes go on without it."""
    lease_s: float = 3.0
    below_quorum: Literal["suspend", "fail"] = "suspend"
    arbiter: Literal["legs", "etcd"] = "legs"


@dataclass(frozen=True)
class Membership:
    """See the module."""

    mirror: str
    """32 random hex digits."""
    size_bytes: int
    legs: tuple[LegInfo, ...]
    voters: tuple[str, ...]
    """Names of nodes: of each Terrace leg's, and of diskless tie-breakers."""
    term: Term
    epoch: int
    primary: str | None
    """Name of the node; None after a clean demotion."""
    in_sync: frozenset[str]
    """Ids of legs. Never empty."""
    token: str | None = None
    """After a clean demotion: the node that may become primary without hearing the others."""
    history: tuple[Generation, ...] = ()
    """Oldest first; the newest is this record itself."""
    options: Options = Options()
    forced: Literal["no", "fenced", "apart"] = "no"
    """Of this record; see `Generation`."""

    @property
    def place(self) -> tuple[int, int]:
        """In the order of records: (term number, epoch)."""
        return self.term.number, self.epoch

    @property
    def generation(self) -> Generation:
        """Itself, as its successors remember it."""
        parts = {*self.voters, *(leg.node for leg in self.legs if leg.kind == "terrace")}
        outside = self.primary is not None and self.primary not in parts
        return Generation(self.term, self.epoch, self.primary, self.forced, outside)

    @property
    def terrace_ids(self) -> frozenset[str]:
        """Of the legs that store records. Those on NBD servers store none, and so prove nothing."""
        return frozenset(leg.id for leg in self.legs if leg.kind == "terrace")

    def leg(self, leg_id: str) -> LegInfo:
        """Raises KeyError."""
        return next(leg for leg in self.legs if leg.id == leg_id) if self.has(leg_id) else _missing(leg_id)

    def has(self, leg_id: str) -> bool:
        """Whether it is one of the legs."""
        return any(leg.id == leg_id for leg in self.legs)

    def legs_on(self, node: str) -> tuple[LegInfo, ...]:
        """The Terrace legs of a node."""
        return tuple(leg for leg in self.legs if leg.node == node and leg.kind == "terrace")

    def next_epoch(self, **changes: Any) -> Membership:
        """The record that its primary writes next."""
        return self._followed(dataclasses.replace(self, epoch=self.epoch + 1, forced="no", **changes))

    def next_term(
        self,
        term: Term,
        primary: str | None,
        in_sync: frozenset[str],
        forced: Literal["no", "fenced", "apart"] = "no",
    ) -> Membership:
        """The record with which `primary` begins `term`."""
        changed = dataclasses.replace(
            self, term=term, epoch=0, primary=primary, in_sync=in_sync, token=None, forced=forced
        )
        return self._followed(changed)

    def _followed(self, changed: Membership) -> Membership:
        """Forgets the oldest generations, but none that was forced: without these, a fork can't be called harmless."""
        history = (*self.history, changed.generation)
        room = MAX_HISTORY - sum(one.forced != "no" for one in history)
        plain = [one for one in history if one.forced == "no"]
        gone = set(plain[: max(len(plain) - max(room, 1), 0)])
        return dataclasses.replace(changed, history=tuple(one for one in history if one not in gone))

    def descends_from(self, other: Membership) -> bool:
        """Whether `other` is this record or one that it came from."""
        return other.generation in self.history or other.generation == self.generation


def _missing(leg_id: str) -> LegInfo:
    raise KeyError(leg_id)


def encode(membership: Membership) -> bytes:
    """As JSON in UTF-8."""
    plain = dataclasses.asdict(membership) | {"in_sync": sorted(membership.in_sync), "version": FORMAT_VERSION}
    return json.dumps(plain, separators=(",", ":"), sort_keys=True).encode()


def decode(data: bytes) -> Membership:
    """Judges what a disk or a peer says. Raises OSError EPROTO with a sentence."""
    try:
        plain = json.loads(data)
        version = plain.pop("version")
        if version != FORMAT_VERSION:
            raise OSError(errno.EPROTO, f"a mirror's record has version {version}, and {FORMAT_VERSION} is understood")
        term = Term(**plain.pop("term"))
        history = tuple(
            Generation(
                *(Term(**one["term"]), int(one["epoch"]), one["primary"]),
                *(one.get("forced", "no"), one.get("outside", False)),
            )
            for one in plain.pop("history")
        )
        membership = Membership(
            term=term,
            legs=tuple(LegInfo(**leg) for leg in plain.pop("legs")),
            voters=tuple(plain.pop("voters")),
            in_sync=frozenset(plain.pop("in_sync")),
            history=history,
            options=Options(**plain.pop("options")),
            **plain,
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise OSError(errno.EPROTO, f"a mirror's record can't be understood: {error}") from None
    except RecursionError:
        raise OSError(errno.EPROTO, "a mirror's record can't be understood: it is nested too deep") from None
    _judge_types(membership)
    ids = {leg.id for leg in membership.legs}
    if not membership.in_sync <= ids or not membership.in_sync or len(ids) != len(membership.legs):
        raise OSError(errno.EPROTO, "a mirror's record names legs in sync that it doesn't have, or none")
    return membership


def _judge_types(found: Membership) -> None:
    """What a peer has once made a node store would else stop it at each start. Raises OSError EPROTO."""
    texts: list[object] = [found.mirror, found.term.id, *found.voters, *found.in_sync]
    numbers: list[object] = [found.size_bytes, found.term.number, found.epoch]
    optional: list[object] = [found.primary, found.token]
    words: list[object] = [found.forced]
    for leg in found.legs:
        texts += [leg.id, leg.node, leg.export]
    for one in found.history:
        texts.append(one.term.id)
        numbers += [one.term.number, one.epoch]
        optional.append(one.primary)
        words.append(one.forced)
    flags = [one.outside for one in found.history]
    times = [found.options.timeout_s, found.options.lease_s]
    sound = (
        all(type(text) is str for text in texts)
        and all(type(number) is int for number in numbers)
        and found.size_bytes > 0
        and all(one is None or type(one) is str for one in optional)
        and all(word in ("no", "fenced", "apart") for word in words)
        and all(type(flag) is bool for flag in flags)
        and all(leg.kind in ("terrace", "nbd") for leg in found.legs)
        and all(type(time_s) in (int, float) and 0 < time_s < math.inf for time_s in times)
        and found.options.below_quorum in ("suspend", "fail")
        and found.options.arbiter in ("legs", "etcd")
    )
    if not sound:
        raise OSError(
            errno.EPROTO, "a mirror's record can't be understood: it has a value of a kind that it can't have"
        )
