"""Nodes in one process, each with a leg or a say: real keepers and voters over stores in memory, and a network."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import trio

from replication.cluster import Voter, VoterState
from replication.keeper import LegKeeper, LegRecord
from replication.lease import Clock
from replication.membership import Membership, Options, Term
from replication.voters import KeptVoter, LegsCluster
from tests.replication.stores import MIRROR, MemoryStore

R = TypeVar("R")


class Carry(Protocol):
    """The network, which may lose either way."""

    async def __call__(self, source: str, target: str, call: Callable[[], Awaitable[R]], /) -> R: ...


class MemoryVoter(KeptVoter):
    """Without files, as a thread is nothing for a clock that jumps; a node without a leg has it in its store too."""

    def __init__(self, site: Node, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._files[MIRROR] = None
        self._site = site

    async def retire(self, record: Membership) -> None:
        async with self._holding(record.mirror):
            keeper = self._site.keeper
            await keeper._save(LegRecord(keeper.record.me, promised=keeper.record.promised, accepted=record))


class Node:
    """One node: what is durable is its store; `start` makes the rest anew."""

    def __init__(self, name: str, clock: Clock = trio.current_time) -> None:
        self.name = name
        self.store = MemoryStore(f"{name}/vol")
        self.clock = clock
        self.boot = 1
        self.up = True
        self.primary = False
        self.start()

    def start(self) -> None:
        record = LegRecord.decode(self.store.record) if self.store.record else LegRecord(self.name)
        self.keeper = LegKeeper(self.store, record, node=self.name, boot=f"boot-{self.boot}")
        self.voter = MemoryVoter(
            self,
            self.name,
            Path("/nonexistent"),
            lambda mirror: [self.keeper],
            is_primary=lambda mirror: self.primary,
            clock=self.clock,
        )

    def restart(self, *, rebooted: bool = False) -> None:
        self.store.crash()
        self.boot += rebooted
        self.up, self.primary = True, False
        self.start()


class Wire:
    """A node's voter, as seen from another."""

    def __init__(self, source: str, target: Node, carry: Carry) -> None:
        self.node = target.name
        self._source, self._target, self._carry = source, target, carry

    async def state(self, mirror: str) -> VoterState:
        return await self._carry(self._source, self.node, lambda: self._target.voter.state(mirror))

    async def prepare(self, mirror: str, term: Term, candidate: str, *, force: bool = False) -> VoterState:
        return await self._carry(
            self._source, self.node, lambda: self._target.voter.prepare(mirror, term, candidate, force=force)
        )

    async def accept(self, membership: Membership) -> None:
        await self._carry(self._source, self.node, lambda: self._target.voter.accept(membership))

    async def heartbeat(self, mirror: str, term: Term) -> None:
        await self._carry(self._source, self.node, lambda: self._target.voter.heartbeat(mirror, term))


class Nodes:
    """All of them."""

    def __init__(self, names: str, carry: Carry | None = None, *, timeout_s: float = 2.0) -> None:
        self.all = {name: Node(name) for name in names}
        self.options = Options()
        self.is_cut = False
        self._carry = carry or self._direct
        self._timeout_s = timeout_s

    async def _direct(self, source: str, target: str, call: Callable[[], Awaitable[R]]) -> R:
        await trio.lowlevel.checkpoint()
        if self.is_cut or not self.all[target].up:
            raise OSError(errno.ETIMEDOUT, f"node {target} hasn't answered")
        return await call()

    def voter(self, source: str) -> Callable[[str], Voter]:
        return lambda target: Wire(source, self.all[target], self._carry)

    async def known(self, mirror: str) -> Sequence[str]:
        return list(self.all)

    def cluster(self, node: str) -> LegsCluster:
        return LegsCluster(node, self.voter(node), self.known, timeout_s=self._timeout_s)

    def cut(self) -> None:
        self.is_cut = True

    def heal(self) -> None:
        self.is_cut = False
