"""Mirrors, legs, voters and engines that are wrong on purpose, each in one rule: the simulation must notice.

Those of `tests.replication.mutants` that are about the mirror itself are among them; the others are of what the random
lives there have fakes for: records, promises, leases, sessions, and what the engine keeps for a leg.
"""

from __future__ import annotations

import sys
from typing import Final

import replication.barriers
import replication.keeper
import replication.mirror
import replication.promotion
import replication.returning
from replication.commonflush import CommonFlush
from replication.healing import Healing
from replication.keeper import LegKeeper
from replication.link import RemoteLeg
from replication.localleg import LocalLeg
from replication.recent import Recent
from replication.replica import _Session
from replication.resync import Resync
from replication.returning import Returning
from replication.voters import KeptVoter
from terrace.primary import MirrorPart
from tests.replication.mutants import MUTANTS as MIRRORS
from tests.simulation.mutants import Plant, _all_of, _instead, _patched
from tiers.volume import Volume


async def _keep(leg: object, size_bytes: int) -> None:
    """No leg is made to fit."""


UNFENCED: Final = _instead(
    _Session,
    "_check",
    "if self.fence_error is not None:\n        raise self.fence_error\n    if not self._keeper.allows(self.term):",
    "if False:",
)


MUTANTS: Final[dict[str, Plant]] = {
    **{
        name: MIRRORS[name]
        for name in (
            "acknowledges before a record without the leg counts",
            "goes on writing while a leg is being excluded",
            "resync ignores what was touched",
            "resync doesn't wait for batches that the leg didn't get",
            "reads don't wait",
            "reads are lent beside batches in flight",
            "legs aren't reconciled at the start",
            "extents leave the tracker before the flush",
            "recent is forgotten though a leg hasn't flushed",
            "parts of blocks are merged without a lock",
            "a batch of before the last leg was lost is acknowledged",
        )
    },
    # Records
    "what was written recently is forgotten when a leg is excluded": _instead(
        LegKeeper, "_recent", "(RECENT, RECENT_OLD, name)", "(name,)"
    ),
    "a leg takes records of older terms": _instead(
        replication.keeper,
        "allowed",
        "promised is None or term == promised or term.number > promised.number",
        "True",
    ),
    "a promise isn't durable": _instead(
        LegKeeper,
        "prepare",
        "await self._save(dataclasses.replace(before, promised=term, candidates=candidates))",
        "self.record = dataclasses.replace(before, promised=term, candidates=candidates)",
    ),
    "a machine that went down is taken for one that didn't": _patched(LegKeeper, "intact", property(lambda self: True)),
    "a leg that lost its memory after it promised begins a term": _instead(
        LegKeeper, "_judge_leg", "if begins and not self.intact and", "if False and"
    ),
    "a leg that lost its memory lets another one leave": _instead(
        LegKeeper, "_judge_leg", "if goes_on and not self.intact and", "if False and"
    ),
    "missing:* is dropped though a leg isn't in sync": _instead(
        LegKeeper, "_drop_trackers", "if leg.id not in accepted.in_sync", "if False"
    ),
    "a leg in resync is good enough": _instead(
        LegKeeper, "accept", "inconsistent=(old.inconsistent or inconsistent) and not in_sync", "inconsistent=False"
    ),
    # Promotion
    "a record that was only tried says who has all": _patched(
        replication.promotion, "_before", lambda tried, heard, beyond: None
    ),
    "a promotion needs no majority": _instead(
        replication.promotion, "_judge", 'rule == "majority" and not is_majority(heard, newest.voters)', "False"
    ),
    "a promotion takes legs that may have lost writes, and leaves out others": _instead(
        replication.promotion, "_judge", "if not intact and silent:", "if False:"
    ),
    "a node goes on alone whatever it has promised": _instead(
        replication.promotion,
        "_may_go_alone",
        "or not own.candidates <= {me}",
        "",
        "heard[node].candidates <= {me} and",
        "",
    ),
    "a primary serves without a lease": _instead(
        MirrorPart, "_may_serve", "return not self._needs_lease or self._lease.may_serve", "return True"
    ),
    "voters promise while the primary lives": _patched(KeptVoter, "_judge_alive", lambda self, said, candidate: None),
    # Sessions
    "a fenced session goes on": UNFENCED,
    "a promise fences no session": _patched(LegKeeper, "allows", lambda self, term: True),
    "older sessions go on beside newer ones": _all_of(
        _instead(_Session, "fence", "self._scope.cancel()", "pass"),
        UNFENCED,
        _instead(_Session, "run", "async with self._replica._turn:", "if True:"),
    ),
    "a replica says that it has a batch before it has": _instead(
        _Session,
        "_apply",
        "self._check()\n    if",
        "self._check()\n    if self._ends:\n        self._replica.applied = self._ends[-1][1]\n        self._tell()\n"
        "        await trio.lowlevel.checkpoint()\n    if",
    ),
    "a session is resumed at whoever answers": _instead(
        RemoteLeg, "_go_on", "if hello.line == self._line:", "if True:"
    ),
    "a batch that was sent again is skipped": _instead(
        RemoteLeg, "_go_on", "if sequence is None or batch.sequence > sequence:", "if False:"
    ),
    "a leg forgets what is recent at each flush": _instead(
        Recent,
        "flushed_by_all",
        "sequence and self._rotated_at is not None and self._rotated_at <= sequence",
        "True",
        "old.clear()",
        "old.clear(); self._store.trackers[RECENT].clear()",
    ),
    # Bringing legs up to date
    "the leg's own divergent blocks are skipped": _instead(
        Resync, "_todo", 'todo.update(await self._target.changed([RECENT, RECENT_OLD, missing_tracker("*")]))', "pass"
    ),
    "a leg is resynced without being marked": _instead(
        Returning, "admit", "await leg.accept(self._site.membership, inconsistent=True)", "pass"
    ),
    "what third legs miss isn't told": _instead(Resync, "_mark", "if not others or", "if True or"),
    "a leg keeps the size that it has": _all_of(
        *(
            _patched(module, "fit", _keep)
            for module in (replication.barriers, replication.mirror, replication.returning)
        )
    ),
    "who may work beside idle clients alone leaves touched pieces": _instead(
        Resync, "_worker", "if not again:", "if True:"
    ),
    "what can't be read for a moment is lost": _instead(
        Resync, "_see_to_unread", "in self._settings.reread_s", "in ()"
    ),
    "what no leg can read undoes what was written meanwhile": _instead(
        Resync,
        "_bring_block",
        "async with site.locks.holding(offset, BLOCK_BYTES):",
        "if True:",
        "watch.touched or ",
        "",
    ),
    "a leg is healed without a look at what is in flight": _instead(
        Healing,
        "_heal",
        "async with self._site.locks.holding(first, last - first):",
        "if True:",
        "await self._site.inflight.settle_for_client(first, last - first)",
        "pass",
    ),
    "a flush of the local leg is enough": _instead(
        CommonFlush,
        "_round",
        "for leg in writers:\n            nursery",
        "for leg in writers[:1]:\n            nursery",
    ),
    "the local leg applies out of order": _instead(
        LocalLeg, "submit", "if not self._queue:\n        try", "if True:\n        try"
    ),
    # The engine
    "trackers aren't saved with the checkpoint": _instead(
        Volume, "freeze_marks", "{name: tracker.copy() for", "{name: type(tracker)() for"
    ),
    "what is replayed after a crash isn't marked": _instead(
        Volume,
        "apply_batch",
        "if self.trackers:",
        "if self.trackers and sys._getframe(1).f_code.co_name in ('_append', 'shrink_logged'):",
        sys=sys,
    ),
    "zeros aren't marked": _instead(
        Volume,
        "mark",
        "self.trackers, ops)",
        "self.trackers, [w for i in range(0, len(ops), 3) if ops[i] == self._write_word for w in ops[i : i + 3]])",
    ),
}

CAUGHT_BY: Final[dict[str, tuple[int, ...]]] = {
    "acknowledges before a record without the leg counts": tuple(range(12)),
    "goes on writing while a leg is being excluded": (36, 114, *range(12)),
    "a leg takes records of older terms": (5, *range(30)),
    "missing:* is dropped though a leg isn't in sync": tuple(range(12)),
    "what was written recently is forgotten when a leg is excluded": (4, *range(12)),
    "legs aren't reconciled at the start": tuple(range(12)),
    "the leg's own divergent blocks are skipped": (500, 501, 524, 537, *range(30)),
    "parts of blocks are merged without a lock": tuple(range(12)),
    "reads don't wait": (5, *range(12)),
    "reads are lent beside batches in flight": (5, 11, *range(12)),
    "zeros aren't marked": tuple(range(12)),
    "what is replayed after a crash isn't marked": (21, 38, 69, 74),
    "resync ignores what was touched": (17, 98, 109, *range(12)),
    "who may work beside idle clients alone leaves touched pieces": (7, 23, 27, 30),
}
"""Lives that catch some of them: the first did when this was written."""

CAUGHT_IN: Final[dict[str, tuple[str, tuple[int, ...]]]] = {
    "a promise isn't durable": ("promises", (24, 25, 32, 49)),
    "older sessions go on beside newer ones": ("promises", (3, 12, 15, *range(20))),
    "extents leave the tracker before the flush": ("durability", (1, *range(30))),
    "a leg forgets what is recent at each flush": ("durability", (2, 3, 5, *range(20))),
    "a leg keeps the size that it has": ("sizes", (11, 7, 10, *range(20))),
}
"""Those that need a world of their own (`worlds`), and lives there. The others are for `scripts/soak --plant`, but for
those that another rule protects from as well: `CAUGHT_DIRECTLY` in `test_mirrors`."""
