"""How `terrace` shows scrubs: one line in lists, a few in `pool show`, all of it in `pool scrub --status`."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import click

from terrace.cli.output import count, duration, percent, show_facts, show_table
from terrace.sizes import format_size

_MOST_LOST = 20
"""So many volumes and snapshots that have lost something are named."""

_HALTED = {
    "paused": "paused",
    "waiting": "waiting for its hours",
    "interrupted": "interrupted",
}


def brief(found: dict[str, Any]) -> str:
    """For a column: how far it is, or when the last one ended, and the errors where there are any."""
    errors = _errors(found)
    last = found["last"]
    if found["state"] == "running" or found["state"] in _HALTED:
        share = percent(found["done_bytes"], found["total_bytes"]) if found["total_bytes"] else "0 %"
        text = f"running, {share}" if found["state"] == "running" else f"{found['state']} at {share}"
    elif found["state"] == "stopped":
        text = "stopped"
    elif last is not None:
        text = _ago(last["finished_at"])
    else:
        return "never"
    return f"{text}, {errors}" if found["errors"] or found["repaired"] else text


def scrub_facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """For `pool show`: the newest scrub, and the last finished one where that is another."""
    lines = [("Scrub", sentence(found))]
    if found["state"] not in ("finished", "never") and found["last"] is not None:
        lines.append(("Last scrub", _result(found["last"])))
    return lines


def sentence(found: dict[str, Any]) -> str:
    """What the newest scrub does or did."""
    state = found["state"]
    if state == "never":
        return "never"
    if state == "finished":
        return _result(found["last"])
    if state == "stopped":
        return f"stopped {_ago(found['finished_at'])}, {format_size(found['done_bytes'])} verified, {_errors(found)}"
    done, total = found["done_bytes"], found["total_bytes"]
    share = f"{percent(done, total)}, {format_size(done)} of {format_size(total)}" if total else "just begun"
    if state != "running":
        return f"{_HALTED[state]} at {share}, {_errors(found)}"
    speed = f", {format_size(int(found['bytes_per_s']))}/s" if found["bytes_per_s"] else ""
    limit = f" (limit {format_size(found['rate'])}/s)" if found["rate"] else ""
    eta = f", ETA {duration(found['eta_s'])}" if found["eta_s"] is not None else ""
    return f"{share}{speed}{limit}{eta}, {_errors(found)}"


def show_scrub(name: str, found: dict[str, Any]) -> None:
    """All that is known of a pool's newest scrub."""
    if found["state"] == "never":
        click.echo(f"Pool {name} was never scrubbed; terrace pool scrub {name} starts it.")
        _show_lost(name, found)
        return
    rows: list[tuple[str, object]] = [("Pool", name), ("State", _state(found))]
    rows.append(("Started", _when(found["started_at"])))
    if found["finished_at"] is not None:
        rows.append(("Ended", _when(found["finished_at"])))
    rows.append(("Progress" if found["state"] not in ("finished", "stopped") else "Result", sentence(found)))
    if found["last"] is not None and found["state"] != "finished":
        rows.append(("Last scrub", _result(found["last"])))
    show_facts(rows)
    click.echo()
    show_table(
        ("Device", ">Verified", ">Of", ">Done", ">Errors", ">Repaired"),
        [
            (
                device["path"],
                format_size(device["done_bytes"]),
                format_size(device["total_bytes"]),
                percent(device["done_bytes"], device["total_bytes"]) if device["total_bytes"] else "-",
                device["errors"],
                device["repaired"],
            )
            for device in found["devices"]
        ],
    )
    show_damage(found)
    _show_lost(name, found)


def is_well(found: dict[str, Any]) -> bool:
    """Whether neither errors nor losses are known."""
    return not found["errors"] and not found["lost"]


def _show_lost(name: str, found: dict[str, Any]) -> None:
    if found["lost"]:
        click.echo(f"\nLost: {_lost(name, found)}.")


def _lost(name: str, found: dict[str, Any]) -> str:
    """How much of what: a scrub doesn't find what isn't there any more."""
    lost = found["lost"]
    which = [f"{count(one['blocks'], 'block')} of {one['volume']}" for one in lost[:_MOST_LOST]]
    if len(lost) > len(which):
        blocks = sum(one["blocks"] for one in lost[_MOST_LOST:])
        which.append(f"{count(blocks, 'block')} of {len(lost) - len(which)} more")
    return (
        f"{', '.join(which)}, which `terrace pool check {name}` names; they read as EIO until they are written or "
        "trimmed"
    )


def show_damage(found: dict[str, Any]) -> None:
    """The damaged ranges by name."""
    if not found["errors"]:
        return
    click.echo()
    show_table(
        ("Damaged", ">From byte", ">To byte", "What", "Why", "Device", ">At byte"),
        [
            (
                item["volume"] or "-",
                item["offset"] if item["volume"] else "-",
                item["offset"] + item["length"] - 1 if item["volume"] else "-",
                item["kind"],
                item["reason"],
                item["device"],
                item["device_offset"],
            )
            for item in sorted(found["damage"], key=_by_volume)
        ],
    )
    if found["damage_omitted"]:
        click.echo(f"... and {found['damage_omitted']} more, which are only counted.")
    if any(item["kind"] == "data" for item in found["damage"]):
        click.echo(
            "\nWrite or trim the damaged ranges of a volume, and they are sound again; restore them from a copy."
        )


def _by_volume(item: dict[str, Any]) -> tuple[bool, str, int]:
    return item["volume"] is None, item["volume"] or item["device"], item["offset"] or item["device_offset"]


def verdict(name: str, found: dict[str, Any]) -> str:
    """The sentence that a scrub ends with."""
    if found["state"] == "stopped":
        return f"The scrub of pool {name} is stopped: {format_size(found['done_bytes'])} verified, {_errors(found)}."
    if found["state"] != "finished":
        return f"The scrub of pool {name} is {sentence(found)}."
    if found["lost"]:
        scrubbed = "Of what is there: " + _result(found["last"])
        return f"Pool {name} has lost {_lost(name, found)}. {scrubbed}."
    verb = "is sound" if not found["errors"] else "is damaged"
    return f"Pool {name} {verb}: {_result(found['last'])}."


def _state(found: dict[str, Any]) -> str:
    state = str(_HALTED.get(found["state"], found["state"]))
    return f"{state}, by schedule" if found["scheduled"] else state


def _errors(found: dict[str, Any]) -> str:
    count, repaired = found["errors"], found.get("repaired", 0)
    errors = "no errors" if not count else f"{count} error{'s' * (count > 1)}"
    return f"{errors}, {repaired} block{'s' * (repaired > 1)} repaired" if repaired else errors


def _result(last: dict[str, Any]) -> str:
    speed = f", {format_size(int(last['done_bytes'] / last['active_s']))}/s" if last["active_s"] >= 1 else ""
    took = duration(last["active_s"]) if last["active_s"] >= 1 else "less than a second"
    return f"{_errors(last)} in {format_size(last['done_bytes'])}, {_ago(last['finished_at'])}, took {took}{speed}"


def _ago(at_s: float) -> str:
    passed_s = time.time() - at_s
    return "just now" if passed_s < 60 else f"{duration(passed_s)} ago"


def _when(at_s: float) -> str:
    return f"{datetime.fromtimestamp(at_s).astimezone():%Y-%m-%d %H:%M:%S %z} ({_ago(at_s)})"
