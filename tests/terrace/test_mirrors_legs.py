"""Legs that come and go on a node, with what happens in between."""

from __future__ import annotations

import errno
import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from replication.keeper import LegRecord
from replication.membership import encode
from terrace.mirrors import Mirrors
from tests.replication.stores import first_record


class OneVolume(SimpleNamespace):
    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


class OnePool:
    """A pool with one volume, and the pools."""

    name = "fast"
    policies: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, open_count: int = 0) -> None:
        self.volume = OneVolume(
            name="fast/vol", short_name="vol", open_count=open_count, mirror_record=b"", trackers={}, deleted=False,
            size_bytes=1 << 20, healed_blocks=0,
        )  # fmt: skip
        for method in ("write_now", "trim_now", "read_now", "read", "flush", "checks", "mapped"):
            setattr(self.volume, method, trio.lowlevel.checkpoint)

    def pool(self, name: str) -> Any:
        return self

    def open_pools(self) -> list[Any]:
        return [self]

    def using(self, name: str) -> Any:
        return nullcontext(self)

    def volumes(self) -> list[Any]:
        return []

    def losses_of(self, volume: Any) -> list[Any]:
        return []

    async def create_volume(self, name: str, size_bytes: int, policy: str) -> Any:
        await trio.lowlevel.checkpoint()
        return self.volume

    async def set_mirror(self, volume: Any, record: bytes, trackers: Any = None) -> None:
        volume.mirror_record = record
        await trio.lowlevel.checkpoint()

    async def delete_volume(self, name: str, *, snapshots: bool = False, mirrored: bool = False) -> None:
        await trio.sleep_forever()


def mirrors(pool: OnePool, tmp_path: Any) -> Mirrors:
    peers: Any = SimpleNamespace(node="b", peers={})
    pools: Any = pool
    return Mirrors(pools, peers, tmp_path, lambda kind, subject, text: None)


def test_a_volume_that_a_client_has_opened_while_it_was_made_becomes_no_leg(tmp_path: Any) -> None:
    pool = OnePool(open_count=1)
    asked = {"membership": json.loads(encode(first_record("a"))), "leg": "b", "volume": "vol", "like": "fast"}
    with pytest.raises(OSError, match="has opened fast/vol") as refused:
        trio.run(mirrors(pool, tmp_path)._create_leg, "a", asked | {"size_bytes": 1 << 20})
    assert (refused.value.errno, pool.volume.mirror_record) == (errno.EBUSY, b"")


def test_a_leg_whose_deletion_is_cancelled_goes_on(tmp_path: Any) -> None:
    async def main() -> None:
        pool = OnePool()
        pool.volume.mirror_record = LegRecord("b", accepted=first_record("ab")).encode()
        found = mirrors(pool, tmp_path)
        async with trio.open_nursery() as nursery:
            await nursery.start(found.run)
            mirror: Any = found.adopt(pool, pool.volume)  # type: ignore[arg-type]
            for wait_s in (0.0, 0.05):  # in the midst of its end, and of the deletion
                with trio.move_on_after(wait_s):
                    await found.delete_local(mirror)
                mirror = found.by_leg("b")
                assert mirror is not None and not mirror._closing.is_set()
            nursery.cancel_scope.cancel()

    trio.run(main)
