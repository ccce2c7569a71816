"""The model of `tests.replication.model` with etcd as the arbiter: its commits and leases are the product's own.

etcd itself is in memory (`fakeetcd`), linearizable, and never forgets; it is away now and then, for all or for some.

    python -m tests.replication.etcdmodel 20000 [MUTANT]
"""

from __future__ import annotations

import errno
import sys
from typing import Any

import pytest
import trio

import replication.arbiter
import replication.etcd
import replication.voters
from replication.arbiter import ArbitratedLease
from replication.cluster import ClusterStore
from replication.etcd import EtcdCluster, EtcdLease
from replication.membership import Membership
from replication.voters import LegsCluster, in_sync_nodes
from tests.replication.fakeetcd import FakeEtcd
from tests.replication.model import CALL_S, Violated, World, explore
from tests.replication.rule_mutants import Mutant, mutated
from tests.replication.stores import MIRROR

ETCD = "etcd"


class EtcdWorld(World):
    """Every cut may cut etcd off too, from some or from all."""

    arbiter = True

    def __init__(self, seed: int, *, forces: bool, without: bool = False) -> None:
        self.etcd = FakeEtcd()
        self.etcd_away = False
        super().__init__(seed, forces=forces, without=without)

    async def begin(self) -> None:
        assert await EtcdCluster("a", self.etcd, self.nodes.cluster("a"))._swap(self.first, 0) is None

    def store(self, me: str) -> ClusterStore:
        return EtcdCluster(me, _From(self, me), self.nodes.cluster(me))

    def lease(self, record: Membership) -> Any:
        return ArbitratedLease(record.options.lease_s, trio.current_time)

    async def renew(self, me: str, record: Membership, lease: ArbitratedLease) -> None:
        key = EtcdLease(me, _From(self, me), MIRROR, record.options.lease_s)
        while True:
            begun = lease.begin()
            try:
                await key.renew(record)
            except OSError as error:
                if error.errno == errno.ESTALE:
                    raise
            else:
                lease.renewed(begun)
            await trio.sleep(0.2)

    def may_read(self, record: Membership, lease: ArbitratedLease) -> bool:
        return lease.may_serve(lambda: in_sync_nodes(record))

    def step(self, nursery: trio.Nursery) -> None:
        super().step(nursery)
        self.etcd_away = self.rng.random() < 0.2
        if self.cuts and self.rng.random() < 0.5:
            self.cuts |= {frozenset((ETCD, name)) for name in self.all if self.rng.random() < 0.5}


class _From:
    """etcd, as one node reaches it."""

    def __init__(self, world: EtcdWorld, node: str) -> None:
        self._world, self._node = world, node

    async def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        world, life = self._world, self._world.all[self._node].life
        lost = OSError(errno.ETIMEDOUT, "etcd has not answered")
        await trio.sleep(world.rng.expovariate(1 / 0.01))
        if self._is_lost(life):
            await trio.sleep(CALL_S)
            raise lost
        try:
            answer = world.etcd.do(path, body)
        finally:
            await trio.sleep(world.rng.expovariate(1 / 0.01))
            if self._is_lost(life):
                raise lost
        return answer

    def _is_lost(self, life: int) -> bool:
        world, node = self._world, self._world.all[self._node]
        gone = not node.up or node.life != life or world.etcd_away or frozenset((ETCD, self._node)) in world.cuts
        return gone or world.rng.random() < world.loss


def _no_compare(patch: pytest.MonkeyPatch) -> None:
    real = EtcdCluster._swap

    async def swap(self: EtcdCluster, new: Membership, revision: int, *, unless_primary: bool = False) -> Any:
        _, now = await self._read(new.mirror)
        return await real(self, new, now, unless_primary=unless_primary)

    patch.setattr(EtcdCluster, "_swap", swap)


def _no_key(patch: pytest.MonkeyPatch) -> None:
    real = EtcdCluster._swap

    async def swap(self: EtcdCluster, new: Membership, revision: int, *, unless_primary: bool = False) -> Any:
        return await real(self, new, revision)

    patch.setattr(EtcdCluster, "_swap", swap)


def _etcd_alone(patch: pytest.MonkeyPatch) -> None:
    async def commit(self: LegsCluster, new: Membership, *, expected: Membership) -> None:
        await trio.lowlevel.checkpoint()

    patch.setattr(LegsCluster, "commit", commit)


def _legs_alone(patch: pytest.MonkeyPatch) -> None:
    real = EtcdCluster.commit

    async def commit(self: EtcdCluster, new: Membership, *, expected: Membership) -> None:
        if new.term == expected.term:  # "the legs know it, etcd may hear of it later"
            await self._legs.commit(new, expected=expected)
            return
        await real(self, new, expected=expected)

    patch.setattr(EtcdCluster, "commit", commit)


def _some_leg_answers(patch: pytest.MonkeyPatch) -> None:
    def until(self: ArbitratedLease, nodes: Any) -> float:
        answered = max((self._answered.get(node, float("-inf")) for node in nodes), default=float("-inf"))
        return max(self._renewed, answered) + self.lease_s

    patch.setattr(ArbitratedLease, "until", until)


def _voters_promise_at_once(patch: pytest.MonkeyPatch) -> None:
    real = replication.voters.KeptVoter._judge_alive

    def judge(self: Any, said: Any, candidate: str) -> None:
        if said.primary_here:
            real(self, said, candidate)

    patch.setattr(replication.voters.KeptVoter, "_judge_alive", judge)
    patch.setattr(replication.promotion, "_busy", lambda me, state: None)


MUTANTS = {
    "no-compare": Mutant("a record is put into etcd without looking at what is there", _no_compare),
    "no-key": Mutant("a candidate doesn't look whether the primary has a lease in etcd", _no_key),
    "etcd-alone": Mutant("a record counts that only etcd has", _etcd_alone),
    "legs-alone": Mutant("a record counts that only the legs have", _legs_alone),
    "some-leg-answers": Mutant("a primary serves while any one leg answers", _some_leg_answers),
    "promise-at-once": Mutant("a leg promises while a primary may serve by it", _voters_promise_at_once),
}


def main() -> None:
    """See the module."""
    promotions = reads = 0
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with mutated(MUTANTS[sys.argv[2]] if len(sys.argv) > 2 else None):
        for seed in range(count):
            try:
                oracle = explore(seed, kind=EtcdWorld)
            except Violated as violated:
                raise SystemExit(f"seed {seed}: {violated}") from None
            promotions, reads = promotions + oracle.promotions, reads + oracle.reads
    print(f"{count} seeds: {promotions} promotions, {reads} reads, nothing violated")


if __name__ == "__main__":
    main()
