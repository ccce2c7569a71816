"""Where blocks should be: pure decisions, counters in, moves out.

For now the policy is the simplest that keeps every write going: the log lives on the fast tier; when fast space runs
short, the emptiest fast segments are compacted, or, once the fast tier is really full of live data, demoted to base;
when the whole pool runs short, the tier with the emptier segments is compacted.
"""

from dataclasses import dataclass

FAST_LOW_SHARE = 0.10
"""Below this share of free fast slots the cleaner works on the fast tier."""
FAST_FULL_SHARE = 0.75
"""Above this share of live fast slots, compaction within the fast tier gives way to demotion."""
BASE_CROWDED_SHARE = 0.85
"""Above this share of live base slots, demotion goes on only while the fast tier is fuller still."""


@dataclass(frozen=True, slots=True)
class TierUse:
    """Slots of a tier: all, those in free segments, those that map pages point to."""

    total: int
    free: int
    live: int

    @property
    def live_share(self) -> float:
        """Live slots over all slots."""
        return self.live / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True)
class Move:
    """Empty the emptiest segments of `source` (None: of any tier); their live blocks go to `destination`."""

    source: str | None
    destination: str


def decide(fast: TierUse, base: TierUse, *, total_low: bool, keep_slots: int) -> Move | None:
    """What the cleaner should do next. `keep_slots`: free base slots that demotion must leave."""
    fast_low = bool(fast.total) and fast.free < fast.total * FAST_LOW_SHARE
    if fast_low and base.total:
        base_takes_more = base.free > keep_slots and base.live_share < max(BASE_CROWDED_SHARE, fast.live_share)
        if fast.live_share > FAST_FULL_SHARE:
            if base_takes_more:
                return Move("fast", "base")
        else:
            return Move("fast", "fast")
    if total_low:
        if not base.total:
            return Move("fast", "fast")
        return Move(None, "base" if base.free > keep_slots or not fast.total else "fast")
    return None
