"""The leg on this node, and the fake one behind a link that simulations use, keep every leg's contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from replication.leg import RECENT, RECENT_OLD
from replication.localleg import LocalSite
from tests.replication.fakes import FakeKeeper, FakeLeg, FakeLink, MemoryExtents, MemoryLegStore
from tests.replication.leg_contract import Rig, TerraceLegContract
from tests.replication.linked import INFO, MEMBERSHIP, SIZE, TERM


def stored() -> tuple[MemoryLegStore, FakeKeeper]:
    store = MemoryLegStore(SIZE)
    store.trackers = {RECENT: MemoryExtents(), RECENT_OLD: MemoryExtents()}
    return store, FakeKeeper(store, INFO.id)


class TestLocalLeg(TerraceLegContract):
    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Rig]:
        store, keeper = stored()
        async with trio.open_nursery() as nursery:
            leg = await LocalSite(keeper).open(nursery, INFO, TERM)
            yield Rig(leg, store, MEMBERSHIP)
            leg.close()
            nursery.cancel_scope.cancel()


class TestALegBehindAFakeLink(TerraceLegContract):
    """The fake that the simulations use is held to the same contract."""

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Rig]:
        store, keeper = stored()
        async with trio.open_nursery() as nursery:
            inner = await LocalSite(keeper).open(nursery, INFO, TERM)
            leg = FakeLeg(inner, FakeLink())
            nursery.start_soon(leg.run)
            yield Rig(leg, store, MEMBERSHIP)
            leg.close()
            nursery.cancel_scope.cancel()
