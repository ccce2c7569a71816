"""What clients get under the name of a volume that is a leg of a mirror."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from terrace.exports import PoolExports
from tests.terrace.fakepool import FakeVolume
from tiers import TierError, Volume


class OneVolume:
    """A pool, and the pools."""

    name, uuid = "p", "u"

    def __init__(self, volume: FakeVolume) -> None:
        self._volume = volume

    def pool(self, name: str) -> Any:
        return self

    def open_pools(self) -> Iterator[Any]:
        yield self

    def open_volumes(self) -> Iterator[Any]:
        yield self._volume

    def volume(self, name: str) -> Any:
        return self._volume

    def snapshots(self) -> list[Any]:
        return []


class TheMirror:
    """An export that stands for the volume."""

    read_only = False

    def __init__(self, volume: FakeVolume) -> None:
        self.name = volume.name
        self.mirrored_volume = volume


class Mirrored:
    def __init__(self, mirror: TheMirror | None) -> None:
        self.mirror = mirror
        self.diskless = SimpleNamespace(named=lambda name: None, exported=lambda: iter(()))

    def is_exported(self, volume: Volume) -> bool:
        return not volume.mirror_record or self.mirror is not None

    async def serving(self, volume: Volume) -> Any:
        await trio.lowlevel.checkpoint()
        if self.mirror is None:
            raise TierError(16, f"{volume.name} is served by node b")
        return self.mirror


@pytest.fixture
def volume(tmp_path: Path) -> FakeVolume:
    made = FakeVolume("p", tmp_path / "v.raw", 1 << 20)
    made.mirror_record = b"something"
    return made


def exports(volume: FakeVolume, mirrored: Mirrored | None) -> PoolExports:
    return PoolExports(cast(Any, OneVolume(volume)), cast(Any, mirrored))


def test_the_mirror_stands_for_its_volume_and_the_volume_counts_its_clients(volume: FakeVolume) -> None:
    mirror = TheMirror(volume)
    found: Any = exports(volume, Mirrored(mirror))
    assert trio.run(found.acquire, "p/v") is mirror
    assert volume.open_count == 1
    plain = exports(volume, None)
    assert found.identity(cast(Any, mirror)) == plain.identity(cast(Any, volume))
    found.release(cast(Any, mirror))
    assert volume.open_count == 0
    assert [name for name, _ in found.list()] == ["p/v"] and "mirrored" in found.list()[0][1]
    assert cast(Any, found.find("")) is volume


@pytest.mark.parametrize("mirrored", [Mirrored(None), None])
def test_a_leg_that_is_not_served_here_is_no_export(volume: FakeVolume, mirrored: Mirrored | None) -> None:
    found = exports(volume, mirrored)
    with pytest.raises(TierError, match="node b" if mirrored else "only a terraced"):
        trio.run(found.acquire, "p/v")
    assert volume.open_count == 0 and found.list() == []
    with pytest.raises(FileNotFoundError):
        trio.run(found.acquire, "")
