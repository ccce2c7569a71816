"""What a volume asks of its pool: where its blocks live, how fast it may go, and what it does when there is no room.

A `Policy` is a value: whoever holds one can't see it change. What a volume has in the log and the catalog is only its
policy's *name* (`""` stands for `"default"`); what the name means is the application's configuration, and may be given
anew while the volume is served.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tiers.names import validate_name
from tiers.units import exact_size

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
    """What one volume gets. Made of possible values only: anything else is a PolicyError."""

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
        """Raises PolicyError (a ValueError) naming the field, with what is possible in its place."""
        for field in RULES:
            try:
                require_possible(field, getattr(self, field))
            except ValueError as error:
                raise PolicyError(field, str(error)) from None
        if self.demote_heat >= self.promote_touches:
            raise PolicyError(
                "demote_heat",
                f"{self.demote_heat} is not less than promote_touches, {self.promote_touches}: what was promoted would "
                f"be demoted at once; the nearest possible is {self.promote_touches - 1}",
            )
        for burst_field, limit_field in _BURSTS:
            burst, limit = getattr(self, burst_field), getattr(self, limit_field)
            if burst and not limit:
                raise PolicyError(
                    burst_field, f"{burst} is a burst above no limit; give {limit_field} too, or leave it out"
                )
            if burst and burst < limit:
                show = exact_size if burst_field == "bandwidth_burst_bytes" else str
                raise PolicyError(
                    burst_field,
                    f"{show(burst)} is less than what {limit_field} gives in a second; "
                    f"the nearest possible is {show(limit)}",
                )
        if self.when_full == "queue" and self.queue_timeout_s == 0:
            raise PolicyError(
                "queue_timeout_s", "0 is no time to wait in; give a second or more, or make when_full enospc"
            )

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


class PolicyError(ValueError):
    """A value that a policy can't have; prints as the field, a colon, and the reason."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def require_possible(field: str, value: Any) -> None:
    """Judge one field by itself. Raises ValueError with a sentence that doesn't name it."""
    RULES[field](value)


def _possible_name(name: str) -> None:
    try:
        validate_name("policy", name)
    except OSError as error:
        raise ValueError(str(error)) from None


def _possible_window(window: tuple[int, int] | None) -> None:
    if window is not None:
        start, end = window
        _between(0, DAY_MINUTES - 1)(start)
        _between(0, DAY_MINUTES)(end)
        if start == end:
            raise ValueError("it begins when it ends; leave it out for the whole day")


def _one_of(*valid: str) -> Callable[[Any], None]:
    def judge(value: Any) -> None:
        if value not in valid:
            raise ValueError(f"{value!r} is not possible; valid: {', '.join(valid)}")

    return judge


def _between(least: int, most: int, *, or_zero: str = "", show: Callable[[Any], str] = str) -> Callable[[Any], None]:
    """From `least` to `most`; or 0 as well, where a meaning of it is given. `show` writes numbers."""

    def judge(value: Any) -> None:
        if (or_zero and value == 0) or (math.isfinite(value) and least <= value <= most):
            return
        nearest = most if value > most else 0 if or_zero and value < 0 else least
        raise ValueError(
            f"{show(value)} is not possible; it must be from {show(least)} to {show(most)}"
            f"{or_zero and f', or 0: {or_zero}'}; the nearest is {show(nearest)}"
        )

    return judge


RULES: dict[str, Callable[[Any], None]] = {
    "name": _possible_name,
    "placement": _one_of(*get_args(Placement)),
    "promote_touches": _between(1, HEAT_LIMIT),
    "demote_heat": _between(0, HEAT_LIMIT - 1),
    "demote_idle_s": _between(0, YEAR_S),
    "compression_level": _between(0, COMPRESSION_LIMIT),
    "migration_rate_bytes": _between(MIN_RATE_BYTES, RATE_LIMIT, or_zero="no limit", show=exact_size),
    "migration_window": _possible_window,
    "iops_limit": _between(1, RATE_LIMIT, or_zero="no limit"),
    "iops_burst": _between(0, RATE_LIMIT),
    "bandwidth_limit_bytes": _between(MIN_RATE_BYTES, RATE_LIMIT, or_zero="no limit", show=exact_size),
    "bandwidth_burst_bytes": _between(0, RATE_LIMIT, show=exact_size),
    "when_full": _one_of(*get_args(WhenFull)),
    "queue_timeout_s": _between(0, YEAR_S),
    "stream_cutoff_bytes": _between(0, RATE_LIMIT, show=exact_size),
}
"""What each field may be, whatever the others are."""
_BURSTS = (("iops_burst", "iops_limit"), ("bandwidth_burst_bytes", "bandwidth_limit_bytes"))

DEFAULT = Policy()
