"""What is hot: which blocks belong on the fast tier. Pure decisions: counters and numbers in, decisions out.

Three questions, all about single blocks of 4 KiB, since hot blocks are scattered:

- **Promotion** (`admits`): a client's read has brought a block from base; does it belong on fast? If it has been
  touched `promote_touches` times within the memory of the sketch, and is hotter than what would be pushed out for it.
- **Survival** (`survivors`): fast segments are being emptied and some of their blocks must leave the tier; the coldest
  do.
- **Separation** (`is_hot`): blocks that will be overwritten soon go into other segments than those that stay, so that
  segments die as a whole.

What would be pushed out is not known before it happens, but what was pushed out last is: `threshold` follows the
hottest block that had to leave. Down at once, up slowly, for a few victims that happen to hold nothing but hot blocks
must not close the door; it fades as the counts do, and each block that is turned away lowers it a little, so that
a set of hot blocks that has moved finds its way in. All of it was tried out before it was written: the numbers are in
docs/architecture.md, "Heat and promotion"; `terrace policy simulate` runs these very functions.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from tiers.heat import Bytes, Floats, Heat, Ints, Mask, Touch
from tiers.policy import DEFAULT, Policy

if TYPE_CHECKING:
    from tiers.volume import Volume

RISE = 0.1
"""So much of the way to a higher threshold is taken with each round of demotion."""
TURNED_AWAY = 0.9 ** (1 / 4096)
"""What each block that was touched often enough, but is too cold, leaves of the threshold."""
MEAN_BLOCKS = 4096
"""Means of writes are over about so many blocks."""

Policies = Mapping[int, Policy]
"""The policies of volumes by id; the default's are not needed."""


class Temperature:
    """What is hot in one pool. Belongs to whoever owns the `heat`."""

    def __init__(self, heat: Heat) -> None:
        self._heat = heat
        self._threshold = 0.0
        self._halvings = heat.halvings
        self._mean_writes = [0.0, 2.0]
        """Of the blocks that were moved lately, those taken for cold and those taken for hot."""
        self._writes_halvings = heat.sketches[Touch.WRITE].halvings
        self.turned_away = 0
        """Blocks that were touched often enough, but were colder than what is on fast."""

    @property
    def threshold(self) -> float:
        """The heat of the hottest block that had to leave the fast tier lately; what is promoted is hotter."""
        halvings = self._heat.halvings
        if halvings != self._halvings:
            self._threshold *= 0.5 ** (halvings - self._halvings)
            self._halvings = halvings
        return self._threshold

    # -- promotion -----------------------------------------------------------------------------------------------------

    def admits(self, policy: Policy, volume_id: int, block: int) -> bool:
        """Whether a block that was read from base belongs on fast. This read isn't in the counters yet."""
        if policy.placement != "auto":
            return policy.placement == "fast"
        touches = self._heat.estimate(volume_id, block) + 1
        if touches < policy.promote_touches:
            return False
        if touches > self.threshold:
            return True
        self._turn_away(1)
        return False

    def admits_each(self, policy: Policy, volume_id: int, blocks: Ints, known: Bytes | None = None) -> Mask:
        """The same for many blocks at once. `known`: their estimates, without this read, if they are at hand."""
        if policy.placement != "auto":
            return np.full(len(blocks), policy.placement == "fast")
        estimates = self._heat.estimates(volume_id, blocks) if known is None else known
        touches = estimates.astype(np.int64) + 1
        often: Mask = touches >= policy.promote_touches
        hot: Mask = often & (touches > self.threshold)
        self._turn_away(int(np.count_nonzero(often)) - int(np.count_nonzero(hot)))
        return hot

    def _turn_away(self, count: int) -> None:
        self.turned_away += count
        self._threshold *= TURNED_AWAY**count

    # -- demotion ------------------------------------------------------------------------------------------------------

    def survivors(
        self, volume_ids: Ints, blocks: Ints, leave: int, policies: Policies, idle_s: Floats | None = None
    ) -> Mask:
        """Which live blocks of the segments being emptied stay on the fast tier; `leave` of them at least don't.

        Blocks of volumes with placement `base` leave in any case, those with `fast` only after all others. Of the rest
        the cold ones (heat up to `demote_heat`, and idle for `demote_idle_s`) leave before the hot, the colder before
        the less cold, and what comes earlier in the arrays before what comes later.

        `idle_s`: for how long each block was not written, as far as it is known (the age of its segment). Choose
        victims with about four times as many live blocks as must leave: with fewer, hot ones have to go.
        """
        heat = self._heat.estimates(volume_ids, blocks).astype(np.int64)
        order = heat + _ranks(volume_ids, heat, policies, idle_s) * 256
        must = np.count_nonzero(order < 256)  # placement base
        leave = min(max(leave, int(must)), len(blocks))
        stays = np.ones(len(blocks), np.bool_)
        if leave:
            by_heat = np.argsort(order, kind="stable")
            stays[by_heat[:leave]] = False
            last = by_heat[leave - 1]
            if leave > must:
                self._left(float(heat[last]))
        return stays

    def _left(self, cut: float) -> None:
        """The hottest block of a round of demotion had this heat."""
        threshold = self.threshold
        self._threshold = cut if cut < threshold else threshold + RISE * (cut - threshold)

    # -- separation ----------------------------------------------------------------------------------------------------

    def is_hot(self, volume_ids: Ints, blocks: Ints) -> Mask:
        """Which of the blocks being moved will be overwritten sooner than most: they belong in a segment together."""
        writes = self._heat.write_estimates(volume_ids, blocks)
        # They fade with the counts: after a busy time nothing might ever come up to that time's mean again.
        halvings = self._heat.sketches[Touch.WRITE].halvings
        self._mean_writes = [mean * 0.5 ** (halvings - self._writes_halvings) for mean in self._mean_writes]
        self._writes_halvings = halvings
        hot: Mask = writes > max(1.0, self._boundary())
        for which, mask in enumerate((~hot, hot)):
            count = int(np.count_nonzero(mask))
            if count:
                share = min(1.0, count / MEAN_BLOCKS)
                self._mean_writes[which] += (float(writes[mask].mean()) - self._mean_writes[which]) * share
        return hot

    def _boundary(self) -> float:
        """So many writes are as likely in either class, if both are Poisson."""
        cold, hot = (max(0.1, mean) for mean in self._mean_writes)
        return (hot - cold) / math.log(hot / cold) if hot > 1.01 * cold else hot


def _ranks(volume_ids: Ints, heat: Ints, policies: Policies, idle_s: Floats | None) -> Ints:
    """Who leaves first: 0 placement base, 1 cold, 2 hot, 3 placement fast."""
    ranks = np.empty(len(heat), np.int64)
    for volume_id in np.unique(volume_ids).tolist():
        policy = policies.get(volume_id, DEFAULT)
        mine = volume_ids == volume_id
        if policy.placement != "auto":
            ranks[mine] = 0 if policy.placement == "base" else 3
            continue
        cold = heat[mine] <= policy.demote_heat
        if idle_s is not None:
            cold &= idle_s[mine] >= policy.demote_idle_s
        ranks[mine] = 2 - cold
    return ranks


def judge_of(temperature: Temperature) -> "Callable[[Volume, int], bool]":
    """What `tiers.promotion.Promoter` asks."""
    return lambda volume, block: temperature.admits(volume.policy, volume.id, block)
