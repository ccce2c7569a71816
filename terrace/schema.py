"""What the tables of a TOML file are made of: values as people write them, and errors as people read them.

`validate` turns TOML into a checked model, or says of every problem at once where it is, what is wrong, and what would
be right.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from terrace.sizes import format_size, parse_size


class ConfigError(Exception):
    """One sentence per problem found, each beginning with `file:line: key:`."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class KeyedError(ValueError):
    """What a section as a whole finds wrong with one of its keys."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def _as_size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


Size = Annotated[int, BeforeValidator(_as_size)]
"""Bytes, from a number or a string such as `64M`."""


class Section(BaseModel):
    """A table of the file: unknown keys and values of other types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


ModelT = TypeVar("ModelT", bound=BaseModel)


def validate(model: type[ModelT], text: str, file_name: str) -> ModelT:
    """The TOML `text` as a `model`; `file_name` is for the errors. Raises ConfigError."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"at line (\d+)", str(error))
        line = int(at[1]) if at else len(text.splitlines())
        raise ConfigError([f"{file_name}:{line}: is not TOML: {error}"]) from None
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        problems = []
        for detail in error.errors(include_url=False):
            key = tuple(part for part in detail["loc"] if isinstance(part, str))
            if isinstance(reason := detail.get("ctx", {}).get("error"), KeyedError):
                key += (reason.key,)
            line = line_of(text, key[:-1] if detail["type"] == "missing" else key)
            problems.append((line, f"{file_name}:{line}: {'.'.join(key)}: {explain(model, detail)}"))
        raise ConfigError([problem for _, problem in sorted(problems)]) from None


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


def _is_window(text: str) -> str:
    window_minutes(text)
    return text


Window = Annotated[str, AfterValidator(_is_window)]
"""Hours of the day, local time, such as `22:00-06:00`; the empty text is the whole day."""


def duration_seconds(text: str) -> float:
    """Seconds of `90s`, `10m` (or `10min`), `24h`, `7d` or `2w`. Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(s|m|min|h|d|w)", text)
    if match is None:
        raise ValueError(f'"{text}" is not a time; write one such as "30s", "10m", "24h" or "7d"')
    return float(match[1]) * _UNITS_S["min" if match[2] == "m" else match[2]]


def _is_duration(value: str) -> str:
    duration_seconds(value)
    return value


def _as_duration(value: object) -> object:
    return "0s" if value == 0 and not isinstance(value, bool) else value


Duration = Annotated[str, BeforeValidator(_as_duration), AfterValidator(_is_duration)]
"""A time such as `10m`, or the number 0."""


def format_duration(seconds: float) -> str:
    """As `duration_seconds` reads it, in the largest unit that gives a whole number: `90s`, `10m`, `24h`, `0s`."""
    for unit, unit_s in (("w", 7 * 86400), ("d", 86400), ("h", 3600), ("m", 60)):
        if seconds and seconds % unit_s == 0:
            return f"{seconds / unit_s:.0f}{unit}"
    return (f"{seconds:f}".rstrip("0").rstrip(".") or "0") + "s"


def format_window(window: tuple[int, int] | None) -> str:
    """As `window_minutes` reads it."""
    return "" if window is None else "-".join(f"{minute // 60:02}:{minute % 60:02}" for minute in window)


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


_TYPE_NAMES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a string in quotes",
    "bool_type": "true or false",
}


def explain(model: type[BaseModel], detail: Any) -> str:
    """A person's sentence for one of pydantic's errors about a `model`."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    section, field = _field_at(model, detail["loc"])
    is_size = field is not None and any(getattr(item, "func", None) is _as_size for item in field.metadata)
    if kind == "extra_forbidden":
        valid = list(section.model_fields)
        near = difflib.get_close_matches(str(detail["loc"][-1]), valid, n=1)
        return f'unknown key; did you mean "{near[0]}"?' if near else f"unknown key; valid here: {', '.join(valid)}"
    if kind == "missing":
        return f"is missing: write {detail['loc'][-1]} = ... there"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error" and field is not None:
        return f"{_shown(value)} is not possible; valid: {', '.join(get_args(field.annotation))}"
    if kind in _TYPE_NAMES:
        return f"{_shown(value)} is not {'a size such as 64M' if is_size else _TYPE_NAMES[kind]}"
    if kind == "list_type":
        example = [value] if isinstance(value, str) else field.get_default() if field is not None else []
        return f"{_shown(value)} is not a list such as [{', '.join(map(_shown, example))}]"
    if kind in ("model_type", "dict_type"):
        heading = ".".join(map(str, detail["loc"])) + (".NAME" if kind == "dict_type" else "")
        return f"{_shown(value)} is not a section; write [{heading}] on a line of its own"
    for limit, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most")):
        if limit in context:
            bound = format_size(context[limit]) if is_size else f"{context[limit]:g}"
            return f"{_shown(value)} is not possible; it must be {words} {bound}"
    if kind == "finite_number":
        return f"{_shown(value)} is not a finite number"
    return f"{_shown(value)} is not possible: {detail['msg']}"


def _field_at(
    model: type[BaseModel], location: Sequence[str | int]
) -> tuple[type[BaseModel], pydantic.fields.FieldInfo | None]:
    """The section of `model` that `location` lies in, and the field that it names where it names one."""
    section, named = model, None
    field: pydantic.fields.FieldInfo | None = None
    for part in location:
        if isinstance(part, int):
            break
        if named is not None:  # `part` is a name that somebody chose, for one more of these
            section, named, field = named, None, None
            continue
        field = section.model_fields.get(part)
        kind: Any = field.annotation if field is not None else None
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            section = kind
        elif get_origin(kind) is dict:
            named = get_args(kind)[1]
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
