"""Words about blocks that no leg in sync can read: whose leg may have them still, and what to do first.

A leg that is away has what it had. If such a block wasn't written since, it is good there, and heals the others once
that leg is back; who restores an old copy of it before that overwrites good data. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from replication.membership import LegInfo

RESTORE = "restore them from a backup, or write them anew"


def first_step(away: Sequence[LegInfo], silent: Collection[str] = (), syncing: Sequence[LegInfo] = ()) -> str:
    """What to do about such blocks.

    `away`: legs that aren't in sync and may have them; `silent`: nodes that don't answer; `syncing`: legs in resync,
    which keep such a block where the checksum of one in sync proves it.
    """
    steps = []
    stopped = list(dict.fromkeys(leg.node for leg in away if leg.kind == "terrace" and leg.node in silent))
    if stopped:
        steps.append(f"start node {each(stopped)}, whose {_legs(len(stopped))} may have them")
    others = [
        leg.export if leg.kind == "nbd" else f"on node {leg.node}"
        for leg in away
        if leg.kind == "nbd" or leg.node not in silent
    ]
    if others:
        steps.append(f"bring the {_legs(len(others))} {each(others)} up to date again, which may have them")
    if syncing:
        nodes = [f"on node {leg.node}" for leg in syncing]
        steps.append(f"wait for the resync of the {_legs(len(nodes))} {each(nodes)}, which may have them")
    return f"{' and '.join(steps)}; else {RESTORE}" if steps else RESTORE


def _legs(count: int) -> str:
    return "leg" if count == 1 else "legs"


def each(names: list[str]) -> str:
    """As people write them all: a, b and c."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
