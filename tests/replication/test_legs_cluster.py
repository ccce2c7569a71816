"""`LegsCluster` keeps the contract of a `ClusterStore`, with voters in memory."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.replication.cluster_contract import *  # noqa: F403
from tests.replication.cluster_contract import Clusters, World
from tests.replication.nodes import Nodes


@pytest.fixture
def clusters() -> Clusters:
    @asynccontextmanager
    async def begin() -> AsyncIterator[World]:
        yield Nodes("abc", timeout_s=0.3)

    return begin
