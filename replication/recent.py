"""What was written recently at one leg: all that another leg may lack since the last flush that all of them have ended.

Two of the store's trackers hold it, and grow by each write both. When a flush begins, what is in `recent` goes to
`recent-old`, and it is remembered up to which sequence that goes. When all legs have ended a flush that covers this
sequence, `recent-old` is cleared. So what one leg may have lost that another one has is always in one of the two, and
nothing stays there for more than two common flushes, also while clients write all the time.

Which sequence `recent-old` goes up to isn't known after a restart, nor of a flush of an earlier session: all is old
then, until a later flush has ended everywhere.
"""

from __future__ import annotations

from replication.leg import RECENT, RECENT_OLD, LegStore


class Recent:
    """See the module. Of one store."""

    def __init__(self, store: LegStore) -> None:
        self._store = store
        self._rotated_at: int | None = None
        """Up to where `recent-old` goes, as far as it isn't in `recent` too; None: it isn't known."""

    def flush_begins(self, applied: int) -> None:
        """All up to the sequence `applied` will be durable here with a flush that begins now."""
        if self._rotated_at is None:
            self._age()
            self._rotated_at = applied

    def flushed_by_all(self, sequence: int) -> None:
        """All up to there is durable at each leg. 0: so it is, but not all legs in sync are there: forget nothing."""
        if sequence and self._rotated_at is not None and self._rotated_at <= sequence:
            self._rotated_at = None
            old = self._store.trackers.get(RECENT_OLD)
            if old is not None:
                old.clear()

    def begin_anew(self) -> None:
        """What a flush of an earlier session covered will never be told."""
        self._rotated_at = None
        self._age()

    def _age(self) -> None:
        trackers = self._store.trackers
        recent, old = trackers.get(RECENT), trackers.get(RECENT_OLD)
        if recent is not None and old is not None and recent:
            old.update(recent)
            recent.clear()
