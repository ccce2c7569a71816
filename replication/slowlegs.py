"""Which leg writes in flight wait for, in a sentence: asked for by whoever wants the status, nothing for each write."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from replication.inflight import Batch
from replication.leg import LegState
from replication.members import Member

LONG_S: Final = 1.0
"""A write that is in flight for longer is told; it takes milliseconds as a rule."""


def waited_for(batches: Iterable[Batch], members: Iterable[Member], timeout_s: float, now: float) -> str | None:
    """The leg that the oldest write waits for, and what comes of that; None: no write is old, or no leg owes any.

    `batches`: in flight, oldest first; `now`: by trio's clock, in seconds.
    """
    oldest = next((batch for batch in batches if batch.refused is None), None)
    if oldest is None or now - oldest.began <= LONG_S:
        return None
    everybody = list(members)
    silent_s = {member: _silent_s(member, now) for member in everybody if _is_given(member)}
    owing = [member for member in silent_s if silent_s[member] or (member.leg is not None and member.leg.queued_bytes)]
    if not owing:
        return None
    member = max(owing, key=lambda one: (silent_s[one], one.leg.queued_bytes if one.leg is not None else 0))
    where = f"the leg {member.info.place}" if member.info.kind == "nbd" else f"the leg on node {member.info.place}"
    if silent_s[member] < LONG_S:
        return f"{where} is slow: the oldest has waited for {now - oldest.began:.0f} s"
    said = f"{where} has been silent for {silent_s[member]:.0f} s"
    # As the mirror itself judges it: without another leg that stores records nobody goes on without this one.
    if any(other.is_proof and silent_s.get(other, 0.0) < LONG_S for other in everybody if other is not member):
        return f"{said}; it is left out after {timeout_s:g} s"
    return f"{said}, and no other leg is there to go on without it"


def _is_given(member: Member) -> bool:
    """Whether it gets what is written."""
    return member.leg is not None and member.state in (LegState.UP_TO_DATE, LegState.SYNCING)


def _silent_s(member: Member, now: float) -> float:
    since = member.leg.silent_since if member.leg is not None else None
    return max(0.0, now - since) if since is not None else 0.0
