"""A daemon over fake pools, shared by the tests of a module that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.terrace.fakedaemon import FakeDaemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeDaemon]:
    """Running, with the pool `p` of 256 MiB."""
    home: Path = tmp_path_factory.mktemp("d") / "home"
    with FakeDaemon(home) as running:
        device = {"path": str(home / "device"), "tier": "fast", "size": 256 << 20}
        running.api("POST", "/v1/pools", {"name": "p", "devices": [device]})
        yield running
        assert running.alive(), running.tail()


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    """Not started yet, and killed afterwards."""
    fake = FakeDaemon(tmp_path / "home")
    yield fake
    fake.kill()
