"""What a volume asks of its pool: where its blocks live, how fast it may go, and what it does when there is no room.

A `Policy` is a value: whoever holds one can't see it change. What a volume has in the log and the catalog is only its
policy's *name* (`""` stands for `"default"`); what the name means is the application's configuration, and may be given
anew while the volume is served.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from tiers.names import validate_name

Placement = Literal["auto", "fast", "base"]
WhenFull = Literal["enospc", "queue"]

DEFAULT_NAME = "default"
DAY_MINUTES = 24 * 60
HEAT_LIMIT = 255
"""Heat is counted in a byte."""
COMPRESSION_LIMIT = 19
"""zstd's levels above take hundreds of megabytes a thread."""
RATE_LIMIT = 1 << 50
MIN_RATE_BYTES = 64 << 10
"""Less a second than the extent that heat is kept for would never end moving anything, or serving a large request."""
YEAR_S = 366 * 86400


@dataclass(frozen=True, slots=True)
class Policy:
    """What one volume gets. Made of possible values only: anything else is a ValueError that begins with the field."""

    name: str = DEFAULT_NAME
    placement: Placement = "auto"
    """`auto`: hot blocks on fast devices, cold ones on base; `fast`, `base`: that tier while it has room."""
    promote_touches: int = 2
    """A block on base is promoted at so many touches (1 to 255), if it is hotter than what would make room for it."""
    demote_heat: int = 1
    """An extent is cold at this heat (decayed reads + writes; 0 to 254) or less. Below `promote_touches`, else what
    was just promoted would go back at once."""
    demote_idle_s: float = 600.0
    """Seconds that nobody touched an extent before it is cold; where room is short it may go sooner. 0: at once."""
    compression_level: int = 3
    """zstd's, 1 to 19, for what is demoted to base; 0: no compression."""
    migration_rate_bytes: int = 0
    """Bytes a second that promotion and demotion of this volume's blocks move at most; 0: no limit. Where the fast
    tier is about to be full, demotion doesn't wait for it."""
    migration_window: tuple[int, int] | None = None
    """(from, to): minutes of the day, local time, in which blocks are promoted and demoted, `to` not included; over
    midnight where `to` is less. None: at any time. Where the fast tier is about to be full, demotion doesn't wait."""
    iops_limit: int = 0
    """Reads and writes a second, together; 0: no limit."""
    iops_burst: int = 0
    """Reads and writes that may be done at once after a rest; 0: what the limit gives in a tenth of a second."""
    bandwidth_limit_bytes: int = 0
    """Bytes a second, read and written together; 0: no limit."""
    bandwidth_burst_bytes: int = 0
    """Bytes that may be transferred at once after a rest; 0: what the limit gives in a tenth of a second."""
    when_full: WhenFull = "enospc"
    """A write for which there is no room is refused, or waits in a queue for `queue_timeout_s`."""
    queue_timeout_s: float = 60.0
    """Seconds that a write waits for room before it is refused, where `when_full` is `queue`."""
    stream_cutoff_bytes: int = 4 << 20
    """After so many bytes in sequence a stream earns no more heat and may go straight to base; 0: never."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises ValueError, `FIELD: ` and a sentence with what is possible."""
        try:
            validate_name("policy", self.name)
        except OSError as error:
            raise ValueError(f"name: {error}") from None
        _one_of("placement", self.placement, get_args(Placement))
        _one_of("when_full", self.when_full, get_args(WhenFull))
        _between("promote_touches", self.promote_touches, 1, HEAT_LIMIT)
        _between("demote_heat", self.demote_heat, 0, HEAT_LIMIT - 1)
        _between("demote_idle_s", self.demote_idle_s, 0, YEAR_S)
        _between("compression_level", self.compression_level, 0, COMPRESSION_LIMIT)
        _between("queue_timeout_s", self.queue_timeout_s, 0, YEAR_S)
        _between("stream_cutoff_bytes", self.stream_cutoff_bytes, 0, RATE_LIMIT)
        for field, least in (
            ("migration_rate_bytes", MIN_RATE_BYTES),
            ("iops_limit", 1),
            ("bandwidth_limit_bytes", MIN_RATE_BYTES),
        ):
            if (value := getattr(self, field)) != 0:
                _between(field, value, least, RATE_LIMIT, " or 0: no limit")
        if self.demote_heat >= self.promote_touches:
            raise ValueError(
                f"demote_heat: {self.demote_heat} is not less than promote_touches, {self.promote_touches}: what was "
                f"promoted would be demoted at once; the nearest possible is {self.promote_touches - 1}"
            )
        _burst("iops_burst", self.iops_burst, "iops_limit", self.iops_limit)
        _burst("bandwidth_burst_bytes", self.bandwidth_burst_bytes, "bandwidth_limit_bytes", self.bandwidth_limit_bytes)
        if self.when_full == "queue" and self.queue_timeout_s == 0:
            raise ValueError(
                "queue_timeout_s: 0 is no time to wait in; give one of a second or more, or when_full enospc"
            )
        if self.migration_window is not None:
            start, end = self.migration_window
            _between("migration_window", start, 0, DAY_MINUTES - 1)
            _between("migration_window", end, 0, DAY_MINUTES)
            if start == end:
                raise ValueError("migration_window: begins when it ends; leave it out for the whole day")

    @property
    def is_limited(self) -> bool:
        """Are there limits on IOPS or bandwidth?"""
        return bool(self.iops_limit or self.bandwidth_limit_bytes)

    def migrates_at(self, minute_of_day: int) -> bool:
        """May blocks be promoted and demoted at this minute (0 to 1439) of the local day?"""
        if self.migration_window is None:
            return True
        start, end = self.migration_window
        if start < end:
            return start <= minute_of_day < end
        return minute_of_day >= start or minute_of_day < end


def _one_of(field: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{field}: {value!r} is not possible; valid: {', '.join(valid)}")


def _between(field: str, value: float, least: int, most: int, else_: str = "") -> None:
    if not math.isfinite(value) or not least <= value <= most:
        nearest = most if value > most else least
        raise ValueError(
            f"{field}: {value} is not possible; it must be from {least} to {most}{else_}; the nearest is {nearest}"
        )


def _burst(field: str, burst: int, limit_field: str, limit: int) -> None:
    if not burst:
        return
    if not limit:
        raise ValueError(f"{field}: {burst} is a burst above no limit; give {limit_field} too, or leave it out")
    if burst < limit:
        raise ValueError(
            f"{field}: {burst} is less than a second of {limit_field}, {limit}; the nearest possible is {limit}"
        )
    _between(field, burst, 0, RATE_LIMIT)


DEFAULT = Policy()
