"""One mirror as a node with a leg has it: the leg in a volume here, and its record.

A `LocalMirror` lives as long as its volume is open. Its leg is served to whoever is primary elsewhere by its `replica`;
who may write to it is decided by the leg's record alone (`replication.keeper`), so that a primary and a replica can't
both: a promise to a later term ends what is of an earlier one.

While this node is primary, the mirror is served from here: `terrace.primary`. After a demotion and a close the leg is
declared clean, once nothing can write to it any more.
"""

from __future__ import annotations

import logging
from functools import partial

import trio

from replication.keeper import LegKeeper, LegRecord
from replication.leg import Leg, LegStore
from replication.localleg import LocalLeg, LocalSite
from replication.membership import LegInfo, Membership
from replication.replica import Replica
from terrace.exports import StoodFor
from terrace.keptstate import KeptState, has_lost, is_kept_state
from terrace.legstore import PoolLegStore
from terrace.primary import MirrorPart, Surroundings
from tiers import Pool, Snapshot, Volume

log = logging.getLogger("terraced")


class LocalMirror(MirrorPart):
    """See the module. `run` has to be run."""

    def __init__(self, pool: Pool, volume: Volume, node: Surroundings, *, is_new: bool = False) -> None:
        """`is_new`: this node has just written its first record. Raises OSError EPROTO for one that makes no sense."""
        super().__init__(node, is_new=is_new)
        self.pool = pool
        self.volume = volume
        self._store = PoolLegStore(pool, volume)
        self.keeper = LegKeeper(
            self._store, LegRecord.decode(volume.mirror_record), node=node.peers.node, boot=node.boot
        )
        self.kept = KeptState(
            *(pool, volume, node.tell, lambda: self.keeper.record.inconsistent),
            wanted=node.keep_before_resync,
            has_lost=partial(has_lost, pool, volume),
        )
        self.keeper.before_overwritten = self.kept.take
        self.keeper.whole_again = self.kept.served
        self.heard_left_over = False
        """By what was asked of other nodes last, the leg here is none of the mirror any more."""
        self._site = LocalSite(self.keeper)
        self.replica = Replica(self.keeper, self._site.let_go)
        self._begin_as_before()

    @property
    def name(self) -> str:
        return self.volume.name

    @property
    def stood_for(self) -> StoodFor:
        return self.volume

    @property
    def size_bytes(self) -> int:
        return self.volume.size_bytes

    @property
    def policy_name(self) -> str:
        return self.volume.policy_name

    @property
    def store(self) -> LegStore:
        return self._store

    @property
    def me(self) -> str:
        return self.keeper.record.me

    @property
    def accepted(self) -> Membership | None:
        return self.keeper.record.accepted

    @property
    def intact(self) -> bool:
        return self.keeper.intact

    @property
    def rotational(self) -> bool:
        return self.volume.rotational

    @property
    def superseded(self) -> Membership | None:
        return self.keeper.record.superseded

    def kept_state(self) -> str | None:
        return self.kept.name if self.keeper.record.inconsistent else None

    def volume_snapshots(self) -> list[Snapshot]:
        """Of the leg here, but for what a resync keeps."""
        found = self.pool.snapshots(self.volume.short_name)
        return [one for one in found if not is_kept_state(one.short_name)]

    @property
    def _leg_here(self) -> LocalLeg | None:
        return self._site.open_leg

    async def _beside(self) -> None:
        await self.kept.run()

    async def _take_part(self) -> None:
        await self.keeper.take_part()

    async def _open_here(self, nursery: trio.Nursery, info: LegInfo, membership: Membership) -> Leg:
        # What a session of an earlier primary was just writing here must not land on what this one writes.
        await self.replica.fenced(membership.term)
        await self.keeper.take_part()  # that may not have been possible when the term began
        leg = await self._site.open(nursery, info, membership.term)
        for site in self.nbd_sites.values():
            site.follow(leg)
        return leg

    async def _settle_as_replica(self) -> None:
        """After a demotion nothing writes here any more, and all that was written is durable: the leg is clean."""
        accepted = self.accepted
        if accepted is None or accepted.primary is not None:
            return
        try:
            await self.replica.leave_after_primary()
        except OSError as error:
            log.warning("%s: can't be declared clean: %s", self.name, error.strerror)

    async def _leave(self) -> None:
        await self.replica.stop()
