"""Of which mirrors this node is a tie-breaker only: it has a say in who is primary, and no leg. By its own records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from replication.membership import Membership
from replication.voters import KeptVoter


async def votes_of(voter: KeptVoter, taken: Iterable[str]) -> list[Membership]:
    """The records of these mirrors, by name. `taken`: ids of those that this node has another part in."""
    found = []
    for mirror in await voter.mirrors() - set(taken):
        try:
            record = (await voter.state(mirror)).accepted
        except OSError:
            continue  # one that can't be read has no name to show; whoever asks for its say is told
        if record is not None and voter.node in record.voters and not record.legs_on(voter.node):
            found.append(record)
    return sorted(found, key=lambda record: (_exports(record), record.mirror))


def shown_vote(record: Membership) -> dict[str, Any]:
    """JSON; as the last record here has it."""
    legs = [{"node": leg.node, "export": leg.export} for leg in record.legs if leg.kind == "terrace"]
    return {"mirror": record.mirror, "primary": record.primary, "legs": legs}


def is_called(record: Membership, name: str) -> bool:
    """Whether a node calls it so, POOL/VOL."""
    return name in _exports(record)


def said_of(node: str, name: str, record: Membership) -> str:
    """What to tell who asks this node, the tie-breaker, for more."""
    # Each node calls it as its own leg is called, and one without a leg as nobody here knows.
    legs = sorted((leg.node != record.primary, leg.node, leg.export) for leg in record.legs if leg.kind == "terrace")
    more = f"; `terrace volume mirror show {legs[0][2]}` on node {legs[0][1]} tells more" if legs else ""
    return (
        f"node {node} has no leg of {name}: it is a tie-breaker of that mirror, which has legs on node "
        f"{', '.join(_nodes(record))}{more}"
    )


def _exports(record: Membership) -> list[str]:
    first = sorted(record.legs, key=lambda leg: (leg.node != record.primary, leg.node))
    return [leg.export for leg in first if leg.kind == "terrace"]


def _nodes(record: Membership) -> list[str]:
    return sorted({leg.node for leg in record.legs if leg.kind == "terrace"})
