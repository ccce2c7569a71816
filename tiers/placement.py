"""Where blocks should be: pure decisions, counters in, moves out.

The log lives on the fast tier. When fast space runs short, its coldest segments are demoted to base, or, while much of
what the fast tier holds is dead, compacted within it. When base runs short it is compacted within itself: nothing that
was demoted comes back by being cleaned. When the whole pool runs short, whatever gains most is compacted.

Each tier has two marks for its free slots. Cleaning begins below the lower one and goes on up to the upper one, so that
it doesn't begin and end with each segment; in between it is paced by how much is left (`rest_ratio`).

Victims are chosen by cost and benefit (Rosenblum and Ousterhout, "The Design and Implementation of a Log-Structured
File System", 1992, section 3.5): what a victim gives back, times its age, over what its move costs. The emptiest first
would move data that is hot again and again, shortly before it dies by itself. In a model of 1,024 segments, 80 % full,
80 % of the writes to 20 % of the blocks, the emptiest first wrote 3.1 bytes for each byte of a client, this rule 2.6
with the blocks that were moved before apart from those moved for the first time, and 2.3 if it were known which are
hot; for uniform writes it makes no difference (3.0; the theory of the emptiest first, without headers, is 2.7).
"""

from dataclasses import dataclass

FAST_BEGIN_SHARE, FAST_END_SHARE = 0.06, 0.09
"""Cleaning of the fast tier begins below this share of free slots, and goes on until it has the other."""
BASE_BEGIN_SHARE, BASE_END_SHARE = 1 / 64, 1 / 48
"""The same for the base tier, which no client waits for."""
FAST_FULL_SHARE = 0.6
"""Above this share of live fast slots, compaction within the fast tier gives way to demotion."""
BASE_CROWDED_SHARE = 0.85
"""Above this share of live base slots, demotion goes on only while the fast tier is fuller still."""
AGE_EXPONENT = 0.7
"""Less than in the paper: in the model with headers, and with what separation takes for hot, 2.41 instead of 2.46 (0.5:
2.44; 0.3: 2.60; 1.5: 2.53)."""
MOST_REST = 4.0
"""The cleaner that has just begun rests so many times as long as it works; halfway to the floor it doesn't rest."""


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
    """Empty segments of `source` (None: of any tier); their live blocks go to `destination`."""

    source: str | None
    destination: str

    @property
    def demotes(self) -> bool:
        """Whether it gives all of a victim's place back to its tier, however much of it is live."""
        return self.source == "fast" and self.destination == "base"


def decide(fast: TierUse, base: TierUse, *, total_low: bool, keep_slots: int, active: bool = False) -> Move | None:
    """What the cleaner should do next.

    `keep_slots`: free base slots that demotion must leave. `active`: it is at work already, and goes on to the upper
    marks.
    """
    fast_low = fast.free < fast.total * (FAST_END_SHARE if active else FAST_BEGIN_SHARE)
    base_low = base.free < max(2 * keep_slots, base.total * (BASE_END_SHARE if active else BASE_BEGIN_SHARE))
    if fast.total and base.total:
        if base_low and base.free <= keep_slots and base.live_share < BASE_CROWDED_SHARE:
            return Move("base", "base")  # before anything else can be demoted
        if fast_low:
            base_takes_more = base.free > keep_slots and base.live_share < max(BASE_CROWDED_SHARE, fast.live_share)
            return Move("fast", "base" if fast.live_share > FAST_FULL_SHARE and base_takes_more else "fast")
        if base_low and base.live_share < BASE_CROWDED_SHARE:
            return Move("base", "base")
    if total_low:
        if not base.total:
            return Move("fast", "fast")
        return Move(None, "base" if base.free > keep_slots or not fast.total else "fast")
    return None


def benefit(live: int, slots: int, age: int, *, demotes: bool) -> float:
    """How much a victim with `live` of its `slots` is worth emptying: the best has most. `age` in any unit.

    Compaction gains what is dead in it, and costs reading it and writing what is live. Demotion gains all of it.
    """
    share = min(1.0, live / slots)
    gain = 1.0 if demotes else 1.0 - share
    return float(gain * age**AGE_EXPONENT / (1.0 + share))


def rest_ratio(free: int, begin: int, floor: int) -> float:
    """How long the cleaner rests for the time it works, with `free` slots left between its mark and what is kept.

    Most just below the mark `begin`, nothing from halfway to the `floor`, at which clients have to wait.
    """
    middle = (begin + floor) / 2
    if free <= middle:
        return 0.0
    if free >= begin:
        return MOST_REST
    return MOST_REST * (free - middle) / (begin - middle)
