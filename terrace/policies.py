"""`[policy.NAME]`: the tables of a configuration file in which policies are written, and how a policy is shown again.

Sizes, times and hours are written as people write them; what a value may be is the engine's to say (`tiers.policy`),
so that there is one place that knows it. The schedule of snapshots is no part of the engine's policy: it is carried out
above it (`terrace.scheduler`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, model_validator

from terrace.schedule import Schedule, format_schedule, parse_schedule
from terrace.schema import (
    Duration,
    KeyedError,
    Section,
    Size,
    Window,
    duration_seconds,
    format_duration,
    format_window,
    window_minutes,
)
from tiers import Policy, PolicyError
from tiers.policy import DEFAULT, Placement, WhenFull, require_possible
from tiers.units import exact_size


def _plain(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Key:
    """A key of the table: the field of a `Policy` that it gives, and the way between them."""

    field: str
    read: Callable[[Any], Any] = _plain
    write: Callable[[Any], Any] = _plain


KEYS = {
    "placement": Key("placement"),
    "promote_touches": Key("promote_touches"),
    "demote_heat": Key("demote_heat"),
    "demote_idle": Key("demote_idle_s", duration_seconds, format_duration),
    "compression_level": Key("compression_level"),
    "migration_rate": Key("migration_rate_bytes", write=exact_size),
    "migration_window": Key("migration_window", window_minutes, format_window),
    "iops_limit": Key("iops_limit"),
    "iops_burst": Key("iops_burst"),
    "bandwidth_limit": Key("bandwidth_limit_bytes", write=exact_size),
    "bandwidth_burst": Key("bandwidth_burst_bytes", write=exact_size),
    "when_full": Key("when_full"),
    "queue_timeout": Key("queue_timeout_s", duration_seconds, format_duration),
    "stream_cutoff": Key("stream_cutoff_bytes", write=exact_size),
}
"""Those that the engine obeys."""
KEY_OF_FIELD = {key.field: name for name, key in KEYS.items()}
SCHEDULE_KEY = "snapshots"


def _default(name: str) -> Any:
    return KEYS[name].write(getattr(DEFAULT, KEYS[name].field))


def _without_per_second(value: object) -> object:
    return value.removesuffix("/s") if isinstance(value, str) else value


def _possible(name: str) -> AfterValidator:
    """Asks the engine's rule for that key."""
    key = KEYS[name]

    def judge(value: Any) -> Any:
        require_possible(key.field, key.read(value))
        return value

    return AfterValidator(judge)


def _is_schedule(text: str) -> str:
    parse_schedule(text)
    return text


Rate = Annotated[Size, BeforeValidator(_without_per_second)]


class PolicyConfig(Section):
    """[policy.NAME]: what a volume of that policy gets. See `tiers.policy.Policy` for what each key means."""

    placement: Placement = DEFAULT.placement
    promote_touches: Annotated[int, _possible("promote_touches")] = DEFAULT.promote_touches
    demote_heat: Annotated[int, _possible("demote_heat")] = DEFAULT.demote_heat
    demote_idle: Annotated[Duration, _possible("demote_idle")] = _default("demote_idle")
    compression_level: Annotated[int, _possible("compression_level")] = DEFAULT.compression_level
    migration_rate: Annotated[Rate, _possible("migration_rate")] = DEFAULT.migration_rate_bytes
    migration_window: Window = _default("migration_window")
    iops_limit: Annotated[int, _possible("iops_limit")] = DEFAULT.iops_limit
    iops_burst: Annotated[int, _possible("iops_burst")] = DEFAULT.iops_burst
    bandwidth_limit: Annotated[Rate, _possible("bandwidth_limit")] = DEFAULT.bandwidth_limit_bytes
    bandwidth_burst: Annotated[Size, _possible("bandwidth_burst")] = DEFAULT.bandwidth_burst_bytes
    when_full: WhenFull = DEFAULT.when_full
    queue_timeout: Annotated[Duration, _possible("queue_timeout")] = _default("queue_timeout")
    stream_cutoff: Annotated[Size, _possible("stream_cutoff")] = DEFAULT.stream_cutoff_bytes
    snapshots: Annotated[str, AfterValidator(_is_schedule)] = ""

    @model_validator(mode="after")
    def _agree(self) -> PolicyConfig:
        self.policy("any")
        return self

    def policy(self, name: str) -> Policy:
        """What the table says, as the engine knows it."""
        try:
            return Policy(name, **{key.field: key.read(getattr(self, toml)) for toml, key in KEYS.items()})
        except PolicyError as error:
            reason = error.reason
            for known, toml in KEY_OF_FIELD.items():
                reason = reason.replace(known, toml)
            raise KeyedError(KEY_OF_FIELD[error.field], reason) from None

    def schedule(self) -> Schedule:
        """What snapshots are taken and kept."""
        return parse_schedule(self.snapshots)


def require_policy_name(name: str) -> None:
    """Raises KeyedError if no policy can have that name."""
    try:
        require_possible("name", name)
    except ValueError as error:
        raise KeyedError(name, str(error)) from None


@dataclass(frozen=True)
class ShownPolicy:
    """A policy as `terrace policy show` tells it."""

    name: str
    keys: dict[str, Any]
    """Every key with the value that is in force, as TOML would have it."""
    given: list[str]
    """The keys that the configuration gives; the others have their defaults."""
    volumes: list[str]
    """The volumes that have the policy, as POOL/VOL."""


def shown(policy: Policy, schedule: Schedule, given: Collection[str], volumes: Sequence[str]) -> ShownPolicy:
    """How `policy` and its schedule, of whose keys some were `given`, are told to people and programs."""
    keys = {name: key.write(getattr(policy, key.field)) for name, key in KEYS.items()}
    keys[SCHEDULE_KEY] = format_schedule(schedule)
    return ShownPolicy(policy.name, keys, [name for name in keys if name in given], list(volumes))
