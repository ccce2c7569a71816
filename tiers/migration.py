"""What may migrate now: the hours in which policies let blocks be promoted and demoted, and how much a second.

Whoever moves blocks for the sake of placement asks first. What has to move so that clients get room doesn't ask.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from tiers.limits import Bucket
from tiers.policy import Policy

if TYPE_CHECKING:
    from tiers.volume import Volume

BURST_S = 1.0
"""A rate is kept over so long: blocks are moved in batches."""


class Migration:
    """The windows and rates of one pool's volumes. `now`: seconds since 1970."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._rates: dict[int, tuple[Policy, Bucket, float]] = {}
        """By volume: the policy that the bucket is for, and when it was filled last."""

    def allows(self, volume: "Volume", length: int) -> bool:
        """Whether `length` bytes of a volume may be moved now; if so, they count. What is more than a burst is debt."""
        policy = volume.policy
        if policy.migration_window is not None:
            local = time.localtime(self._now())
            if not policy.migrates_at(60 * local.tm_hour + local.tm_min):
                return False
        if not policy.migration_rate_bytes:
            return True
        bucket = self._bucket_of(volume)
        if bucket.wait_s(length) > 0:
            return False
        bucket.level -= length
        return True

    def forget(self, volume_id: int) -> None:
        """A volume is gone."""
        self._rates.pop(volume_id, None)

    def _bucket_of(self, volume: "Volume") -> Bucket:
        now = trio.current_time()
        policy = volume.policy
        known = self._rates.get(volume.id)
        if known is None:
            bucket = Bucket(policy.migration_rate_bytes, BURST_S * policy.migration_rate_bytes)
        else:
            old, bucket, filled_at = known
            bucket.refill(now - filled_at)
            if old is not policy:
                bucket.adjust(policy.migration_rate_bytes, BURST_S * policy.migration_rate_bytes)
        self._rates[volume.id] = policy, bucket, now
        return bucket
