"""What the primary of a mirror may order at a node beside its sessions: that a leg is deleted, or gives up what it has,
that a voter forgets. Pure.

None of it can be undone, so a node obeys only who shows that it is the primary by a record that is not older than
anything that the node itself knows of that mirror. A peer that was primary once, and hasn't heard that it isn't any
more, is refused like one that never was; so is a side of a split brain, until an operator decides.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from replication.keeper import allowed
from replication.lineage import are_apart
from replication.membership import Membership, Term


@dataclass(frozen=True)
class Order:
    """Of node `caller`, which is the primary by `record`, or says so."""

    caller: str
    record: Membership


@dataclass(frozen=True)
class Known:
    """What a leg, or a voter without one, knows of its mirror."""

    who: str
    """For the sentence."""
    promised: Term | None
    accepted: Membership | None
    leg: str = ""
    """Its id."""


def judge_order(order: Order, known: Known) -> None:
    """Whether it is obeyed at all. Raises OSError EPERM with a sentence."""
    record, accepted, caller = order.record, known.accepted, f"node {order.caller}"
    if record.primary != order.caller:
        by = f"node {record.primary} is" if record.primary else "nobody is"
        raise _refusal(known, f"by the record that {caller} has sent {by} the primary")
    if accepted is not None and accepted.mirror != record.mirror:
        raise _refusal(known, f"it is of mirror {accepted.mirror}, and {caller} speaks of {record.mirror}")
    if known.promised is not None and not allowed(known.promised, record.term):
        raise _refusal(
            known, f"it has promised term {known.promised.number}, and {caller} is primary of {record.term.number}"
        )
    if accepted is not None and record.place <= accepted.place and record.generation != accepted.generation:
        newer, older = (f"{one.term.number}.{one.epoch}" for one in (accepted, record))
        raise _refusal(
            known, f"it knows the record {newer}, and {caller} has sent {older}, which doesn't come after it"
        )


def judge_deletion(order: Order, known: Known, *, whole: bool) -> None:
    """Whether a leg is to be deleted: it is none any more, or `whole`, the whole mirror is. Raises OSError EPERM."""
    judge_order(order, known)
    if order.record.has(known.leg) and not whole:
        raise _refusal(known, f"by the record that node {order.caller} has sent it is a leg of the mirror")
    theirs = next((leg.id for leg in order.record.legs_on(order.caller)), "")
    if known.accepted is not None and are_apart(order.record, theirs, known.accepted, known.leg):
        raise _refusal(known, f"it and node {order.caller} are two sides of a split brain: decide that first")


def judge_discard(order: Order, known: Known) -> None:
    """Whether what a leg has and others don't is to be given up. Raises OSError EPERM."""
    judge_order(order, known)
    if not order.record.has(known.leg) or known.leg in order.record.in_sync:
        raise _refusal(known, f"by the record that node {order.caller} has sent it is in sync, or no leg of the mirror")


def _refusal(known: Known, why: str) -> OSError:
    return OSError(errno.EPERM, f"{known.who} doesn't obey: {why}")
