"""A mirror's state in sentences: `replication.explain` over what this node knows and can find out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import trio

from replication.explain import Explanation, Facts, Progress, explain
from replication.promotion import Refused
from replication.voters import ask
from terrace.diskless import DisklessMirror
from terrace.mirrors import Mirrors
from terrace.primary import MirrorPart, nodes_of_mirror

ASK_S = 1.5


async def explained(mirrors: Mirrors, mirror: MirrorPart) -> Explanation:
    """What is wrong, what it waits for, and what would change it. Asks the voters; changes nothing."""
    membership = mirror.membership
    nodes = nodes_of_mirror(membership)
    heard, failures = await ask(
        nodes,
        lambda node: mirrors.voter(node).state(membership.mirror),
        lambda answers: len(answers) == len(nodes),
        timeout_s=ASK_S,
    )
    status: dict[str, Any] = mirrors.local_status(mirror)
    served = mirror.mirror if mirror.serves else None
    legs = served.status().legs if served is not None else ()
    progress = {
        leg.info.id: Progress(leg.resync.done_bytes, leg.resync.total_bytes, leg.resync.eta_s)
        for leg in legs
        if leg.resync is not None and leg.state.value == "Syncing"
    }
    split = {leg.info.id: leg.error for leg in legs if leg.error is not None and leg.error.startswith("split brain")}
    await trio.lowlevel.checkpoint()
    arbiter = status["arbiter"] if status["arbiter"] is not None and status["arbiter"]["kind"] == "etcd" else None
    refusal = mirror.problem.strerror or "" if arbiter is not None and mirror.problem is not None else None
    found = explain(
        Facts(
            name=mirror.name,
            membership=mirror.membership,
            voters=heard,
            unheard={node: error.strerror or str(error) for node, error in failures.items()},
            connected=frozenset(leg.info.id for leg in legs if leg.state.value in ("UpToDate", "Syncing")),
            serving=served is not None,
            suspended=status["waiting"],
            progress=progress,
            away_s={leg.info.id: leg.for_s for leg in legs if leg.state.value not in ("UpToDate", "Syncing")},
            errors={leg.info.id: leg.error for leg in legs if leg.error is not None and leg.info.kind == "nbd"},
            split=split,
            left_behind=mirror.problem.strerror if mirror.is_left_behind and mirror.problem is not None else None,
            arbiter=arbiter["problem"] if arbiter is not None and not arbiter["answers"] else None,
            decision=Refused(refusal) if refusal is not None and served is None else None,
        )
    )
    if isinstance(mirror, DisklessMirror):
        what = "serves it" if served is not None else "takes part in it"
        found = replace(found, paragraph=f"{found.paragraph} Node {mirrors.node} {what} without a leg of its own.")
    return found
