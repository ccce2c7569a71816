"""A mirror in a few words, for the tables of volumes."""

from __future__ import annotations

from typing import Any


def brief(found: dict[str, Any] | None) -> str:
    """A mirror in a word, for a column."""
    if found is None:
        return "-"
    if found["role"] == "primary":
        return f"{found['state']}, primary"
    if found["role"] == "starting":
        return "starting"
    if found["diskless"]:
        return f"no leg here, served by {found['primary'] or 'nobody'}"
    if found.get("left_over"):  # which a daemon of an older release doesn't say
        return "left-over leg"
    return f"leg of {found['primary']}" if found["primary"] else "leg, no primary"


def served_elsewhere(found: dict[str, Any] | None) -> str | None:
    """Why a volume has no NBD URI here; None if it has one."""
    if found is None or found["role"] != "secondary":
        return None
    where = f"node {found['primary']} is the primary, and serves it" if found["primary"] else "it has no primary now"
    return f"none here: {where}"
