"""A leg on a peer: the contract, and what happens when the connection, the replica or its term goes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbd.tls import client_context, server_context
from tests.nbd.certificates import Authority
from tests.replication.leg_contract import LegContract, Rig
from tests.replication.linked import (
    Contexts,
    linked,
)


class TestRemoteLeg(LegContract):
    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Rig]:
        async with linked() as link:
            yield Rig(link.leg, link.store)


class TestRemoteLegWhoseStoreWaits(LegContract):
    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Rig]:
        async with linked() as link:
            link.store.blocks = True
            yield Rig(link.leg, link.store)


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Contexts:
    authority = Authority(tmp_path_factory.mktemp("link"))
    pair = authority.issue("server", server=True)
    return server_context(pair.certificate, pair.key), client_context(Path(authority.path))


class TestRemoteLegOverTls(LegContract):
    @pytest.fixture(autouse=True)
    def _with_tls(self, contexts: Contexts) -> None:
        self.contexts = contexts

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Rig]:
        async with linked(tls=self.contexts) as link:
            yield Rig(link.leg, link.store)
