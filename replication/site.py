"""What the parts of a mirror share: the gate as they see it, and what may be tuned.

`replication.mirror.Mirror` is the gate. Each part says in a Protocol of its own what else it needs of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from replication.members import Member
from replication.membership import Membership
from replication.resync import ResyncSettings


@dataclass(frozen=True)
class MirrorSettings:
    """What may be tuned."""

    queue_bytes: int = 32 << 20
    """What one leg may have queued before clients wait."""
    flush_every_s: float = 1.0
    """How long what was written may lack a common flush."""
    retry_s: float = 0.05
    """The first wait before a leg is sought again, or a record committed again; it doubles."""
    retry_max_s: float = 5.0
    first_leg_s: float = 0.0
    """So long a beginning waits for its first leg, where that is longer than the timeout: for a primary that has
    no leg itself, and so nothing to go on with."""
    resync: ResyncSettings = field(default_factory=ResyncSettings)


class Gate(Protocol):
    """Whether requests may go on, and whom that depends on."""

    name: str
    membership: Membership
    """The newest record that counts."""
    members: dict[str, Member]
    shut: bool
    """A batch may not be submitted now."""
    lost: bool
    """No leg in sync is connected: everything begins anew."""
    end: OSError | None
    """What every request gets from now on."""
    excluding: set[str]
    """Legs that a record calls in sync, or may, and that are gone."""
    failing: OSError | None
    """With the option `fail`, below quorum: what clients get."""

    def change(self) -> None:
        """Something has: decide anew whether the gate is open, and wake all that wait."""

    async def changed(self) -> None:
        """Until something has changed."""

    def check(self) -> None:
        """Raises `end`, if there is one."""

    async def admitted(self, *, reading: bool = False) -> None:
        """Until a request may go on. True at this very moment: no checkpoint between it and the use of that."""
