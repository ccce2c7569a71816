"""The configuration file: TOML in, a checked `Config` out, or errors that say where and what instead.

Every key has a default, so no file is a valid configuration. Whatever Terrace doesn't know is an error: a misspelt
limit that is silently ignored is found in the night when it was needed.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from nbd.server import Limits
from terrace.scrubs import Plan
from terrace.sizes import format_size, parse_size
from tiers.settings import PoolSettings


class ConfigError(Exception):
    """One sentence per problem found, each beginning with `file:line: key:`."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def _as_size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


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


_UNITS_S = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def interval_seconds(text: str) -> float | None:
    """Seconds of `90min`, `12h`, `30d` or `4w`; None for `never`. Raises ValueError."""
    if text == "never":
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(s|min|h|d|w)", text)
    if match is None or not 0 < (seconds := float(match[1]) * _UNITS_S[match[2]]) <= 100 * 365 * 86400:
        raise ValueError(f'"{text}" is not an interval; write one such as "12h", "30d" or "4w", or "never"')
    return seconds


def window_minutes(text: str) -> tuple[int, int] | None:
    """(from, to) in minutes of the day of `01:00-06:00`; None for the empty text. Raises ValueError."""
    if not text:
        return None
    match = re.fullmatch(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-4]):([0-5][0-9])", text)
    if match is not None:
        start, end = int(match[1]) * 60 + int(match[2]), int(match[3]) * 60 + int(match[4])
        if start != end and end <= 24 * 60:
            return start, end
    raise ValueError(f'"{text}" is not a window of hours; write one such as "01:00-06:00" or "22:30-05:00"')


def _as_interval(value: object) -> object:
    return "never" if value == 0 and not isinstance(value, bool) else value


def _is_interval(text: str) -> str:
    interval_seconds(text)
    return text


def _is_window(text: str) -> str:
    window_minutes(text)
    return text


def _is_rate(rate: int) -> int:
    if 0 < rate < 64 << 10:
        raise ValueError(f"{rate} bytes a second is too little for a scrub; it must be at least 64 KiB, or 0: no limit")
    return rate


MIB = 1 << 20
# The defaults are those of the packages that obey them.
_LIMITS = Limits()
_SETTINGS = PoolSettings()
Size = Annotated[int, BeforeValidator(_as_size)]
Address = Annotated[str, AfterValidator(_as_address)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class NbdConfig(_Section):
    """[nbd]: where volumes are exported and what a client may take."""

    listen: list[Address] = ["127.0.0.1:10809"]
    socket: str = Field("nbd.sock", max_length=107)
    max_connections: int = Field(_LIMITS.connections, ge=1, le=65536)
    handshake_timeout_s: float = Field(_LIMITS.handshake_timeout_s, gt=0, le=3600, allow_inf_nan=False)
    drain_grace_s: float = Field(_LIMITS.drain_grace_s, ge=0, le=3600, allow_inf_nan=False)

    def limits(self) -> Limits:
        return replace(
            _LIMITS,
            connections=self.max_connections,
            handshake_timeout_s=self.handshake_timeout_s,
            drain_grace_s=self.drain_grace_s,
        )


class PoolConfig(_Section):
    """[pool]: what each pool may use, and when it writes a checkpoint."""

    checkpoint_interval_s: float = Field(_SETTINGS.checkpoint_interval_s, gt=0, le=86400, allow_inf_nan=False)
    checkpoint_log: Size = Field(_SETTINGS.checkpoint_log_bytes, ge=MIB, le=1 << 40)
    map_cache: Size = Field(_SETTINGS.map_cache_bytes, ge=MIB, le=1 << 40)
    unsynced_cap: Size = Field(_SETTINGS.unsynced_cap_bytes, ge=MIB, le=1 << 40)

    def settings(self) -> PoolSettings:
        return replace(
            _SETTINGS,
            checkpoint_interval_s=self.checkpoint_interval_s,
            checkpoint_log_bytes=self.checkpoint_log,
            map_cache_bytes=self.map_cache,
            unsynced_cap_bytes=self.unsynced_cap,
        )


class ScrubConfig(_Section):
    """[scrub]: when the data of each pool is read and verified, and how fast."""

    interval: Annotated[str, BeforeValidator(_as_interval), AfterValidator(_is_interval)] = "30d"
    window: Annotated[str, AfterValidator(_is_window)] = ""
    rate: Annotated[Size, Field(ge=0, le=1 << 50), AfterValidator(_is_rate)] = _SETTINGS.scrub_rate_bytes

    def plan(self) -> Plan:
        return Plan(interval_seconds(self.interval), window_minutes(self.window))


class LogConfig(_Section):
    """[log]: what goes to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(_Section):
    """Everything that can be configured."""

    nbd: NbdConfig = NbdConfig()
    pool: PoolConfig = PoolConfig()
    scrub: ScrubConfig = ScrubConfig()
    log: LogConfig = LogConfig()

    def pool_settings(self) -> PoolSettings:
        """What every pool is opened with."""
        return replace(self.pool.settings(), scrub_rate_bytes=self.scrub.rate)


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
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"at line (\d+)", str(error))
        line = int(at[1]) if at else len(text.splitlines())
        raise ConfigError([f"{file_name}:{line}: is not TOML: {error}"]) from None
    try:
        return Config.model_validate(values)
    except pydantic.ValidationError as error:
        problems = []
        for detail in error.errors(include_url=False):
            key = tuple(part for part in detail["loc"] if isinstance(part, str))
            line = line_of(text, key)
            problems.append((line, f"{file_name}:{line}: {'.'.join(key)}: {_explain(detail)}"))
        raise ConfigError([problem for _, problem in sorted(problems)]) from None


def line_of(text: str, key: Sequence[str]) -> int:
    """The line, from 1, on which `key` (a path of names) begins; `text` must be TOML that has it.

    Asks the TOML parser itself: the first line at which the text up to there holds the key ends its value, and the
    last shorter text that parses ends before it. Quadratic, which for a file that people write is nothing.
    """
    lines = text.splitlines(keepends=True)
    before = 0
    for count in range(1, len(lines) + 1):
        try:
            value: Any = tomllib.loads("".join(lines[:count]))
        except tomllib.TOMLDecodeError:
            continue
        for name in key:
            if not isinstance(value, dict) or name not in value:
                break
            value = value[name]
        else:
            return before + 1
        before = count
    return 1


_TYPE_NAMES = {"int_type": "a whole number", "float_type": "a number", "string_type": "a string in quotes"}


def _explain(detail: Any) -> str:
    """A person's sentence for one of pydantic's errors."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    section, field = _field_at(detail["loc"])
    is_size = field is not None and any(getattr(item, "func", None) is _as_size for item in field.metadata)
    if kind == "extra_forbidden":
        valid = list(section.model_fields)
        near = difflib.get_close_matches(str(detail["loc"][-1]), valid, n=1)
        return f'unknown key; did you mean "{near[0]}"?' if near else f"unknown key; valid here: {', '.join(valid)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error" and field is not None:
        return f"{_shown(value)} is not possible; valid: {', '.join(get_args(field.annotation))}"
    if kind in _TYPE_NAMES:
        return f"{_shown(value)} is not {'a size such as 64M' if is_size else _TYPE_NAMES[kind]}"
    if kind == "list_type":
        return f'{_shown(value)} is not a list such as ["127.0.0.1:10809"]'
    if kind == "model_type":
        return f"{_shown(value)} is not a section; write [{'.'.join(map(str, detail['loc']))}] on a line of its own"
    for limit, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most")):
        if limit in context:
            bound = format_size(context[limit]) if is_size else f"{context[limit]:g}"
            return f"{_shown(value)} is not possible; it must be {words} {bound}"
    if kind == "finite_number":
        return f"{_shown(value)} is not a finite number"
    return f"{_shown(value)} is not possible: {detail['msg']}"


def _field_at(location: Sequence[str | int]) -> tuple[type[BaseModel], pydantic.fields.FieldInfo | None]:
    """The section that `location` lies in, and the field that it names where it names one."""
    section: type[BaseModel] = Config
    field: pydantic.fields.FieldInfo | None = None
    for part in location:
        if isinstance(part, int):
            break
        field = section.model_fields.get(part)
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            section = field.annotation
    return section, field


def _shown(value: object) -> str:
    """`value` as TOML would write it, cut where it is long."""
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, str):
        text = '"' + value.replace('"', '\\"') + '"'
    else:
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
