"""A mirror over legs in memory, without randomness: what a test sets is all that happens."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import trio

from replication.leg import EXTENT_BYTES, Leg, LegState
from replication.members import LegFacts
from replication.membership import LegInfo, Membership, Options, Term
from replication.mirror import Mirror
from replication.nbdleg import NbdSite
from replication.resync import ResyncSettings
from replication.site import MirrorSettings
from tests.replication.fakes import FakeCluster, FakeLink, FakeNode, MemoryExtents, MemoryLegStore, run_seeded

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
        self.intact: Collection[str] = "abcd"
        """Nodes whose machines have not gone down."""
        self.cluster = FakeCluster({info.id: self.nodes[info.node] for info in infos}, record)
        self.servers: dict[str, NbdSite] = {}
        """Of NBD servers' legs, by their ids; see `with_server`."""
        self._mirror_options = mirror
        self._settings = settings or MirrorSettings(resync=ResyncSettings(workers=2))
        self.mirror: Mirror = None  # type: ignore[assignment]

    def store(self, node: str) -> MemoryLegStore:
        """Of a node."""
        return self.nodes[node].store

    def hold_resizes(self) -> dict[int, trio.Event]:
        """From now on a record with another size, in bytes, waits until its event here is set."""
        commit, goes_on = self.cluster.commit, collections.defaultdict[int, trio.Event](trio.Event)

        async def held(new: Membership, *, expected: Membership) -> None:
            if new.size_bytes != expected.size_bytes:
                await goes_on[new.size_bytes].wait()
            await commit(new, expected=expected)

        self.cluster.commit = held  # type: ignore[method-assign]
        return goes_on

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Mirror]:
        """The mirror, started."""
        async with trio.open_nursery() as nursery:
            for node in self.nodes.values():
                await nursery.start(node.run)
                await node.keeper.accept(self.record)

            async def connect(info: LegInfo, membership: Membership) -> Leg:
                if info.kind == "nbd":
                    return await self.servers[info.id].open(nursery, membership.size_bytes, timeout_s=1.0)
                node = self.nodes[info.node]
                return await node.open(membership.term, primary=None if info.node == "a" else nursery)

            async def facts(info: LegInfo, membership: Membership) -> LegFacts:
                await trio.lowlevel.checkpoint()
                return LegFacts(intact=info.node in self.intact, known=self.known)

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


def with_server(rig: Rig, uri: str, leg_id: str = "nbd") -> None:
    """One more leg, on that NBD server; not in sync. Before it runs."""
    info = LegInfo(leg_id, "a", uri, "nbd")
    rig.servers[leg_id] = NbdSite(info, MemoryExtents)
    rig.record = replace(rig.record, legs=(*rig.record.legs, info))
    rig.cluster.truth = rig.record


def with_options(rig: Rig, **changes: Any) -> None:
    """Before it runs."""
    rig.record = replace(rig.record, options=replace(rig.record.options, **changes))
    rig.cluster.truth = rig.record
