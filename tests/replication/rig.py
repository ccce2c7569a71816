"""A mirror over legs in memory, without randomness: what a test sets is all that happens."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import trio

from replication.leg import EXTENT_BYTES, Leg, LegState
from replication.members import LegFacts
from replication.membership import LegInfo, Membership, Options, Term
from replication.mirror import Mirror
from replication.resync import ResyncSettings
from replication.site import MirrorSettings
from tests.replication.fakes import FakeCluster, FakeLink, FakeNode, MemoryLegStore, run_seeded

SIZE = 64 * EXTENT_BYTES
TERM = Term(2, "2" * 16)


class Rig:
    """Nodes a, b, ...; `a` is the primary, with a local leg unless `diskless`."""

    def __init__(
        self, legs: int = 2, *, diskless: bool = False, in_sync: Sequence[str] | None = None, size: int = SIZE,
        options: Options | None = None, settings: MirrorSettings | None = None, **mirror: Any,
    ) -> None:  # fmt: skip
        names = "bcde" if diskless else "abcd"
        infos = tuple(LegInfo(f"leg{name}", name, "pool/vol") for name in names[:legs])
        self.nodes = {info.node: FakeNode(info, MemoryLegStore(size), FakeLink()) for info in infos}
        record = Membership(
            mirror="f" * 32, size_bytes=size, legs=infos, voters=tuple(names[:legs]), term=TERM, epoch=0, primary="a",
            in_sync=frozenset(in_sync or [info.id for info in infos]), options=options or Options(timeout_s=1.0),
        )  # fmt: skip
        self.record = record
        self.known = True
        self.intact: bool | set[str] = True
        """All, or none; or the nodes whose legs are."""
        self.cluster = FakeCluster({info.id: self.nodes[info.node] for info in infos}, record)
        self._mirror_options = mirror
        self._settings = settings or MirrorSettings(resync=ResyncSettings(workers=2))
        self.mirror: Mirror = None  # type: ignore[assignment]

    def store(self, node: str) -> MemoryLegStore:
        """Of a node."""
        return self.nodes[node].store

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Mirror]:
        """The mirror, started."""
        async with trio.open_nursery() as nursery:
            for node in self.nodes.values():
                await nursery.start(node.run)
                await node.keeper.accept(self.record)

            async def connect(info: LegInfo, membership: Membership) -> Leg:
                node = self.nodes[info.node]
                return await node.open(membership.term, primary=None if info.node == "a" else nursery)

            async def facts(info: LegInfo, membership: Membership) -> LegFacts:
                await trio.lowlevel.checkpoint()
                intact = info.node in self.intact if isinstance(self.intact, set) else self.intact
                return LegFacts(intact=intact, known=self.known)

            local = self.nodes.get("a")
            self.mirror = Mirror(
                "pool/vol", self.record, self.cluster, connect, store=None if local is None else local.store,
                facts=facts, settings=self._settings, **self._mirror_options,
            )  # fmt: skip
            nursery.start_soon(self.mirror.run)
            with trio.fail_after(30):
                await self.mirror.started.wait()
            yield self.mirror
            nursery.cancel_scope.cancel()

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait for it."""
        with trio.fail_after(60):
            while not true():
                await trio.sleep(0.01)

    def state(self, node: str) -> LegState:
        """Of a node's leg."""
        return self.mirror.members[f"leg{node}"].state

    async def whole(self) -> None:
        """Until all legs are in sync."""
        await self.until(lambda: all(m.state is LegState.UP_TO_DATE for m in self.mirror.members.values()))


class Told:
    """A `Done` that remembers."""

    def __init__(self) -> None:
        self.outcomes: list[OSError | None] = []

    def __call__(self, error: OSError | None) -> None:
        self.outcomes.append(error)


def run(body: Callable[[], Awaitable[Any]]) -> Any:
    """On a clock that jumps."""

    async def bounded() -> Any:
        with trio.fail_after(300):
            return await body()

    return run_seeded(1, bounded)


def with_options(rig: Rig, **changes: Any) -> None:
    """Before it runs."""
    rig.record = replace(rig.record, options=replace(rig.record.options, **changes))
    rig.cluster.truth = rig.record
