"""Mirrors that are wrong on purpose, each in one rule: the random runs must notice every one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trio

from replication.barriers import Barriers
from replication.edges import Edges
from replication.inflight import InFlight
from replication.keeper import LegKeeper
from replication.leg import Leg
from replication.localleg import LocalLeg
from replication.mirror import Mirror
from replication.mirrorreads import Reads
from replication.recent import Recent
from replication.replica import _Session
from replication.resync import Resync
from tests.simulation.mutants import Plant, _instead


async def _unequal(source: Leg, others: Sequence[Leg], sequence: int, size_bytes: int, **about: Any) -> int:
    await trio.lowlevel.checkpoint()
    return sequence


MUTANTS: dict[str, Plant] = {
    "acknowledges before a record without the leg counts": _instead(
        Mirror, "_completed", "elif self.excluding:", "elif False:"
    ),
    "goes on writing while a leg is being excluded": _instead(Mirror, "change", "or self.excluding\n", "or False\n"),
    "resync ignores what was touched": _instead(Resync, "_copy", "if watch.touched:", "if False:"),
    "resync reads while older batches are in flight": _instead(
        Resync, "_copy", "await site.inflight.settle(offset, length)", "pass"
    ),
    "resync doesn't wait for batches that the leg didn't get": _instead(
        Resync, "run", "await self._site.inflight.settle_all()", "pass"
    ),
    "reads don't wait": _instead(InFlight, "settle_for_client", "extents_of(offset, length)", "0, 0"),
    "what a resize that was given up may cut off is written": _instead(
        Mirror, "change", "or self.records.may_be_smaller()", ""
    ),
    "reads are lent beside batches in flight": _instead(Mirror, "lend_reads", "self.inflight.batches or ", ""),
    "extents leave the tracker before the flush": _instead(Resync, "_flush", "await self._target.flush()", "pass"),
    "what was written recently is forgotten when a leg is excluded": _instead(
        LegKeeper, "_recent", "for one in (RECENT, RECENT_OLD, name):", "for one in (name,):"
    ),
    "what a leg misses stays though it is in sync": _instead(LegKeeper, "_drop_trackers", "del trackers[name]", "pass"),
    "what a leg misses is dropped though a record without it may be stored": _instead(
        LegKeeper, "settled", "if not self._unsure:", "if True:"
    ),
    "what a leg in resync has got lately isn't noted when it fails": _instead(
        Mirror, "_remember", "missing.update(trackers[name])", "pass"
    ),
    "legs aren't reconciled at the start": _instead(
        Mirror,
        "_make_equal",
        "await reconcile(",
        "await unequal(",
        unequal=_unequal,
    ),
    "recent is forgotten though a leg hasn't flushed": _instead(
        Recent, "flushed_by_all", "self._rotated_at <= sequence", "sequence >= 0"
    ),
    "a closed leg keeps those who wait for its disk": _instead(LocalLeg, "_fail", "call.ended.set()", "pass"),
    "a disk that never answers a read isn't silent": _instead(
        LocalLeg, "silent_since", "[call.due for call in self._calls]", "[]"
    ),
    "a session begins while a primary on the node is still writing": _instead(
        _Session, "_be_alone", "await self._replica.until_free()", "pass"
    ),
    "parts of blocks are merged without a lock": _instead(
        Edges, "_merge", "async with self._site.locks.holding(start, stop - start):", "if True:"
    ),
    "what failed below quorum is read": _instead(
        Mirror, "fail_parked", "batch.refuse(self.failing)", "self._settle(batch, self.failing)"
    ),
    "who waits for a write that fails below quorum reads it": _instead(
        InFlight,
        "_settled",
        "if judge and batch.refused is not None:",
        "if batch.refused is not None: break\n            if False:",
    ),
    "what a primary begins with is read before a record counts": _instead(
        Mirror, "_begin_without", "self._undecided = bool(self.excluding)", "pass"
    ),
    "what an NBD server has behind the end isn't missed when the mirror grows": _instead(
        Barriers, "_miss", 'self._on_all("grow", members, note)', "trio.lowlevel.checkpoint()"
    ),
    "what is mapped is told though the lease was over": _instead(
        Reads, "extents", "losses == self._site.losses and self._site.may_serve()", "True"
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
    "what a leg misses stays though it is in sync",
)
"""Random runs catch these, one in twenty of them or more; the others are caught by single tests."""
