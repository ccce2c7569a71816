"""Mirrors that are wrong on purpose, each in one rule: the random runs must notice every one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trio

from replication.edges import Edges
from replication.inflight import InFlight
from replication.leg import Leg
from replication.localleg import LocalLeg
from replication.mirror import Mirror
from replication.resync import Resync
from tests.replication.fakes import FakeKeeper
from tests.simulation.mutants import Plant, _instead


async def _unequal(source: Leg, others: Sequence[Leg], sequence: int, size_bytes: int, **about: Any) -> int:
    await trio.lowlevel.checkpoint()
    return sequence


MUTANTS: dict[str, Plant] = {
    "acknowledges before a record without the leg counts": _instead(
        Mirror, "_completed", "elif self.excluding:", "elif False:"
    ),
    "goes on writing while a leg is being excluded": _instead(
        Mirror, "change", "self.lost or self.excluding or", "self.lost or"
    ),
    "resync ignores what was touched": _instead(Resync, "_copy", "if watch.touched:", "if False:"),
    "resync reads while older batches are in flight": _instead(
        Resync, "_copy", "await site.inflight.settle(offset, length)", "pass"
    ),
    "resync doesn't wait for batches that the leg didn't get": _instead(
        Resync, "run", "await self._site.inflight.settle_all()", "pass"
    ),
    "reads don't wait": _instead(InFlight, "settle", "extents_of(offset, length)", "0, 0"),
    "extents leave the tracker before the flush": _instead(Resync, "_flush", "await self._target.flush()", "pass"),
    "what was written recently is forgotten when a leg is excluded": _instead(
        FakeKeeper, "accept", "missing.update(trackers[RECENT])", "pass", "missing.update(trackers[RECENT_OLD])", "pass"
    ),
    "legs aren't reconciled at the start": _instead(
        Mirror,
        "begin",
        "await reconcile(",
        "await unequal(",
        unequal=_unequal,
    ),
    "recent is forgotten though a leg hasn't flushed": _instead(
        LocalLeg, "flushed_by_all", "self._rotated_at <= sequence", "sequence >= 0"
    ),
    "parts of blocks are merged without a lock": _instead(
        Edges, "_merge", "async with self._site.locks.holding(start, stop - start):", "if True:"
    ),
    "a batch of before the last leg was lost is acknowledged": _instead(
        Mirror, "_completed", "if batch.doomed is not None:", "if False:"
    ),
}

AT_RANDOM = (
    "acknowledges before a record without the leg counts",
    "goes on writing while a leg is being excluded",
    "resync ignores what was touched",
    "what was written recently is forgotten when a leg is excluded",
)
"""Random runs catch these, one in ten of them or more; the others are caught by single tests."""
