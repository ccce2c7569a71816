"""A mirror's state in sentences: what is wrong, what it waits for, and what an operator can do about it."""

from __future__ import annotations

from typing import Any

from replication.leg import LegState
from terrace.localmirror import LocalMirror
from terrace.mirrors import Mirrors


async def explain(mirrors: Mirrors, mirror: LocalMirror) -> list[str]:
    """Sentences, the most important first; never empty."""
    status = await mirrors.status(mirror)
    return list(_of_mirror(status)) + [sentence for leg in status["legs"] for sentence in _of_leg(status, leg)]


def _of_mirror(status: dict[str, Any]) -> list[str]:
    name, primary, here = status["volume"], status["primary"], status["node"]
    found = []
    if status["problem"]:
        found.append(f"{name} can't do all that it should: {status['problem']}.")
    if status["role"] == "primary":
        found.append(f"This node, {here}, is the primary of {name} in term {status['term']}, and serves it to clients.")
    elif status["role"] == "starting":
        found.append(f"This node, {here}, is becoming the primary of {name}; clients wait.")
    elif primary is None:
        holder = status["token"]
        who = f"node {holder} may become it without asking the others" if holder else "any node in sync may become it"
        found.append(f"{name} was demoted and has no primary; {who}: terrace volume mirror promote {name}.")
    else:
        found.append(f"Node {primary} is the primary of {name} by what is known here, term {status['term']}.")
    if status["waiting"]:
        found.append(f"Writes wait: {status['waiting']}.")
    return found


def _of_leg(status: dict[str, Any], leg: dict[str, Any]) -> list[str]:
    where = f"The leg on node {leg['node']}"
    why = f" ({leg['error']})" if leg["error"] else ""
    if leg["state"] == LegState.UP_TO_DATE.value:
        return [f"{where} is up to date."]
    if leg["state"] == LegState.SYNCING.value:
        return [f"{where} is being brought up to date while clients go on; there is nothing to do but wait."]
    if leg["error"] and leg["error"].startswith("split brain"):
        return [f"{where} stays out: {leg['error']}."]
    if leg["state"] == LegState.STALE.value:
        return [
            f"{where} misses writes that were acknowledged without it{why}. It is resynced by itself as soon as the "
            "primary reaches it: start that node, or mend the way there."
        ]
    if leg["state"] == LegState.UNPROVEN.value:
        return [f"{where} was in sync when it was last heard of; only the primary can say whether it still is."]
    return [f"{where} can't be reached{why}."]
