"""What an arbiter outside of the legs changes: for how long a primary may serve, and what if it forgets. Pure.

**The lease.** With etcd a primary may serve while either of these holds:

- Its key there, which goes with an etcd lease, was renewed less than a lease ago: no candidate's record gets in.
- Each node that has a leg in sync, by its record or one that it is about to write, has answered a heartbeat less than a
  lease ago: none of them makes a promise for so long, and a candidate needs one of theirs.

So a mirror that is whole doesn't need the arbiter, and one that has lost a leg doesn't need the others: etcd may be
away while nothing else fails. As with a majority the primary counts from the *start* of what was answered, on a clock
that goes on while the machine is suspended, and gives up `DRIFT` of it (`replication.lease`).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from replication.lease import DRIFT, Clock, boottime
from replication.membership import Membership
from replication.voters import in_sync_nodes

FORGOTTEN: Final = errno.EUCLEAN
"""Of errors that say that the arbiter has an older record than a node."""


class ArbitratedLease:
    """What a primary knows of its own lease; see the module."""

    def __init__(self, lease_s: float, clock: Clock = boottime) -> None:
        self.lease_s = lease_s * (1 - DRIFT)
        self._clock = clock
        self._renewed = float("-inf")
        self._answered: dict[str, float] = {}

    def begin(self) -> float:
        """A heartbeat, or a renewal, begins: what is to be given to `answered` or `renewed`."""
        return self._clock()

    def answered(self, node: str, begun: float) -> None:
        """A node, this one for instance, has answered the heartbeat that began then."""
        self._answered[node] = max(begun, self._answered.get(node, begun))

    def renewed(self, begun: float) -> None:
        """The arbiter has renewed the lease in a call that began then."""
        self._renewed = max(begun, self._renewed)

    def until(self, nodes: Iterable[str]) -> float:
        """On this clock, when it ends; `nodes`: those with legs in sync."""
        by_legs = min((self._answered.get(node, float("-inf")) for node in nodes), default=float("-inf"))
        return max(self._renewed, by_legs) + self.lease_s

    def may_serve(self, nodes: Callable[[], Iterable[str]]) -> bool:
        """Asked before each answer to a read, and before each acknowledgement. `nodes`: asked only if need be."""
        now = self._clock()
        return now < self._renewed + self.lease_s or now < self.until(nodes())


def behind(there: Membership | None, records: Mapping[str, Membership]) -> dict[str, Membership]:
    """The nodes, with their records, that have a later one than the arbiter: each was there before it was anywhere."""
    return {node: record for node, record in records.items() if there is None or record.place > there.place}


def forgotten(there: Membership | None, later: Mapping[str, Membership]) -> str:
    """A sentence for an arbiter that has an older record than the nodes in `later`, or none."""
    # The newest; of these one with a leg in sync, from which it can go on.
    node, record = max(later.items(), key=lambda one: (one[1].place, one[0] in in_sync_nodes(one[1])))
    has = "no record of this mirror" if there is None else f"the record {there.term.number}.{there.epoch}"
    return (
        f"etcd has {has}, and node {node} has {record.term.number}.{record.epoch}, which was in etcd before: its "
        "data were lost or restored from an older backup, or it isn't the etcd that was asked before. Bring that one "
        f"back; if it is gone for good, `terrace volume mirror promote --force` on node {node} writes its record there"
    )
