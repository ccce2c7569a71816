"""What the parts of a mirror share: the gate as they see it, and what may be tuned.

`replication.mirror.Mirror` is the gate. Each part says in a Protocol of its own what else it needs of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import trio

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
    stay_s: float = 5.0
    """So long a leg has to have been in sync for that to end its waits, when it is lost again."""
    first_leg_s: float = 0.0
    """So long a beginning waits for its first leg, where that is longer than the timeout: for a primary that has
    no leg itself, and so nothing to go on with."""
    resync: ResyncSettings = field(default_factory=ResyncSettings)


class Waits:
    """How long writes had to wait: for a gate that was shut, and for the slowest leg."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._waited_s = 0.0
        self.longest_s = 0.0
        """Whoever answers a batch sees to it too."""

    def gate(self, *, shut: bool) -> None:
        """It is that now."""
        if shut and self._since is None:
            self._since = trio.current_time()
        elif not shut and self._since is not None:
            took = trio.current_time() - self._since
            self._since = None
            self._waited_s += took
            self.longest_s = max(self.longest_s, took)

    def so_far(self) -> tuple[float, float]:
        """How long the gate was shut in all, and the longest wait; that of now is in both."""
        now = 0.0 if self._since is None else trio.current_time() - self._since
        return self._waited_s + now, max(self.longest_s, now)


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

    async def admitted(self, *, reading: bool = False, leased: bool = True) -> None:
        """Until a request may go on. True at this very moment: no checkpoint between it and the use of that.

        `leased`: False for what answers no client, and changes nothing for any: it needs no lease.
        """
