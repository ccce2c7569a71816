"""Synchronous mirroring: what a mirror asks of its legs and of the store of cluster truth.

Only the interfaces live here so far: a mirror's rules are fixed by what `Leg` and `ClusterStore` promise, and the
engine and the server were shaped to be able to promise it. Nothing in Terrace mirrors yet.
"""

from replication.cluster import ClusterStore, Membership
from replication.leg import Leg, LegState, MirrorState, Position, Term

__all__ = ["ClusterStore", "Leg", "LegState", "Membership", "MirrorState", "Position", "Term"]
