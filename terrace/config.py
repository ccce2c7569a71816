"""The configuration file: TOML in, a checked `Config` out, or errors that say where and what instead.

Every key has a default, so no file is a valid configuration. Whatever Terrace doesn't know is an error: a misspelt
limit that is silently ignored is found in the night when it was needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from nbd.server import Limits
from nbd.tls import TlsFiles
from terrace.access import ANY, Rule, require_address, require_subject
from terrace.policies import PolicyConfig, ShownPolicy, require_policy_name, shown
from terrace.schedule import Schedule
from terrace.schema import ConfigError, KeyedError, Section, Size, Window, interval_seconds, validate, window_minutes
from terrace.scrubs import Plan
from tiers import Policy
from tiers.policy import DEFAULT, DEFAULT_NAME
from tiers.settings import PoolSettings


def _as_address(text: str) -> str:
    split_address(text)
    return text


def split_address(text: str) -> tuple[str, int]:
    """(host, port) of `127.0.0.1:10809`, `[::1]:10809` or `localhost:10809`. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r} is ambiguous; write an IPv6 address as [{host}]:{port}")
    if not colon or not host or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is not an address; write HOST:PORT with a port from 0 to 65535")
    return host, int(port)


def _as_interval(value: object) -> object:
    return "never" if value == 0 and not isinstance(value, bool) else value


def _is_interval(text: str) -> str:
    interval_seconds(text)
    return text


def _is_rate(rate: int) -> int:
    if 0 < rate < 64 << 10:
        raise ValueError(f"{rate} bytes a second is too little for a scrub; it must be at least 64 KiB, or 0: no limit")
    return rate


MIB = 1 << 20
# The defaults are those of the packages that obey them.
_LIMITS = Limits()
_SETTINGS = PoolSettings()
Address = Annotated[str, AfterValidator(_as_address)]


class TlsConfig(Section):
    """[nbd.tls]: what is encrypted, and who is let in. Relative paths begin at the home."""

    mode: Literal["off", "allowed", "required"] = "off"
    certificate: str = Field("tls/server-cert.pem", min_length=1, max_length=4095)
    key: str = Field("tls/server-key.pem", min_length=1, max_length=4095)
    ca: str = Field("tls/ca-cert.pem", min_length=1, max_length=4095)
    clients: Literal["verify", "any"] = "verify"
    plaintext: bool = False

    def files(self, home: Path) -> TlsFiles | None:
        """What the mode needs, which is read here. Raises OSError with a sentence."""
        if self.mode == "off":
            return None
        ca = home / self.ca if self.clients == "verify" else None
        return TlsFiles(home / self.certificate, home / self.key, ca)


class ExportConfig(Section):
    """[nbd.exports."PATTERN"]: who may have the exports that the pattern matches, and for what."""

    read_only: bool = False
    addresses: list[Annotated[str, AfterValidator(require_address)]] = Field([ANY])
    subjects: list[Annotated[str, AfterValidator(require_subject)]] = Field([ANY])


def _are_patterns(exports: dict[str, ExportConfig]) -> dict[str, ExportConfig]:
    for pattern in exports:
        if "/" not in pattern and "*" not in pattern:
            other = f'"{pattern}/*" is a whole pool' if pattern else '"*" is all of them'
            raise KeyedError(pattern, f'"{pattern}" matches no export: they are named POOL/VOL, and {other}')
    return exports


class NbdConfig(Section):
    """[nbd]: where volumes are exported and what a client may take."""

    listen: list[Address] = Field(["127.0.0.1:10809"])
    socket: str = Field("nbd.sock", max_length=107)
    max_connections: int = Field(_LIMITS.connections, ge=1, le=65536)
    max_connections_per_address: int = Field(_LIMITS.connections_per_address, ge=0, le=65536)
    max_handshakes: int = Field(_LIMITS.handshakes, ge=1, le=65536)
    handshake_timeout_s: float = Field(_LIMITS.handshake_timeout_s, gt=0, le=3600, allow_inf_nan=False)
    drain_grace_s: float = Field(_LIMITS.drain_grace_s, ge=0, le=3600, allow_inf_nan=False)

    tls: TlsConfig = TlsConfig()
    exports: Annotated[dict[str, ExportConfig], AfterValidator(_are_patterns)] = Field(default_factory=dict)

    def rules(self) -> list[Rule]:
        """Who may have which export, in the order of the file."""
        return [
            Rule(pattern, one.read_only, tuple(one.addresses), tuple(one.subjects))
            for pattern, one in self.exports.items()
        ]

    def limits(self) -> Limits:
        return replace(
            _LIMITS,
            connections=self.max_connections,
            connections_per_address=self.max_connections_per_address,
            handshakes=self.max_handshakes,
            handshake_timeout_s=self.handshake_timeout_s,
            drain_grace_s=self.drain_grace_s,
        )


class PoolConfig(Section):
    """[pool]: what each pool may use, and when it writes a checkpoint."""

    checkpoint_interval_s: float = Field(_SETTINGS.checkpoint_interval_s, gt=0, le=86400, allow_inf_nan=False)
    checkpoint_log: Size = Field(_SETTINGS.checkpoint_log_bytes, ge=MIB, le=1 << 40)
    map_cache: Size = Field(_SETTINGS.map_cache_bytes, ge=MIB, le=1 << 40)
    unsynced_cap: Size = Field(_SETTINGS.unsynced_cap_bytes, ge=MIB, le=1 << 40)
    overcommit_limit: float = Field(_SETTINGS.overcommit_limit, ge=0, le=1e6, allow_inf_nan=False)

    def settings(self) -> PoolSettings:
        return replace(
            _SETTINGS,
            checkpoint_interval_s=self.checkpoint_interval_s,
            checkpoint_log_bytes=self.checkpoint_log,
            map_cache_bytes=self.map_cache,
            unsynced_cap_bytes=self.unsynced_cap,
            overcommit_limit=self.overcommit_limit,
        )


def _are_levels(levels: list[float]) -> list[float]:
    for level in levels:
        if not 0 < level <= 100:
            raise ValueError(f"{level:g} is not a level; levels are percents above 0, up to 100, such as [70, 85, 95]")
    return sorted(levels)


class SpaceConfig(Section):
    """[space]: when operators hear that a pool fills up."""

    levels: Annotated[list[float], AfterValidator(_are_levels)] = Field([70, 85, 95])


class ScrubConfig(Section):
    """[scrub]: when the data of each pool is read and verified, and how fast."""

    interval: Annotated[str, BeforeValidator(_as_interval), AfterValidator(_is_interval)] = "30d"
    window: Window = ""
    rate: Annotated[Size, Field(ge=0, le=1 << 50), AfterValidator(_is_rate)] = _SETTINGS.scrub_rate_bytes

    def plan(self) -> Plan:
        return Plan(interval_seconds(self.interval), window_minutes(self.window))


def _is_mountpoint(text: str) -> str:
    if text and not Path(text).is_absolute():
        raise ValueError(f"{text!r} is not an absolute path; write the whole path of an empty directory")
    return text


class FuseConfig(Section):
    """[fuse]: where the daemon shows volumes and snapshots as files."""

    mountpoint: Annotated[str, AfterValidator(_is_mountpoint)] = Field("", max_length=4095)


class LogConfig(Section):
    """[log]: what goes to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(Section):
    """Everything that can be configured."""

    nbd: NbdConfig = NbdConfig()
    pool: PoolConfig = PoolConfig()
    space: SpaceConfig = SpaceConfig()
    scrub: ScrubConfig = ScrubConfig()
    fuse: FuseConfig = FuseConfig()
    log: LogConfig = LogConfig()
    policy: dict[str, PolicyConfig] = Field(default_factory=dict)

    @field_validator("policy")
    @classmethod
    def _have_possible_names(cls, policies: dict[str, PolicyConfig]) -> dict[str, PolicyConfig]:
        for name in policies:
            require_policy_name(name)
        return policies

    def pool_settings(self) -> PoolSettings:
        """What every pool is opened with."""
        return replace(self.pool.settings(), scrub_rate_bytes=self.scrub.rate)

    def policies(self) -> dict[str, Policy]:
        """Every policy that volumes may have, by name; that of volumes that name none is always among them."""
        return {DEFAULT_NAME: DEFAULT} | {name: table.policy(name) for name, table in self.policy.items()}

    def schedules(self) -> dict[str, Schedule]:
        """What snapshots the volumes of each policy get, where a table says so; by policy."""
        return {name: schedule for name, table in self.policy.items() if (schedule := table.schedule())}

    def show_policy(self, name: str, volumes: Sequence[str] = ()) -> ShownPolicy:
        """One of `policies`, for people and programs; `volumes` have it. Raises KeyError."""
        table = self.policy.get(name) or PolicyConfig()
        return shown(self.policies()[name], table.schedule(), table.model_fields_set, volumes)


def load_config(path: Path | None) -> Config:
    """The configuration in `path`, or the defaults. Raises ConfigError."""
    if path is None:
        return Config()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"{path}: can't be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not UTF-8 text (at byte {error.start})"]) from None
    return parse_config(text, str(path))


def parse_config(text: str, file_name: str) -> Config:
    """`text` as a Config; `file_name` is for the errors. Raises ConfigError."""
    return validate(Config, text, file_name)
