"""Pools of a home that are closed by request while others have them in hand."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from terrace.pools import Pools, open_pools
from tests.terrace.fakepool import FakePool
from tiers import DeviceSpec, Pool, PoolSettings, TierError
from tiers.policy import DEFAULT


def with_a_pool(tmp_path: Path, body: Callable[[Pools], Awaitable[None]]) -> None:
    """Run `body` with the pool "p"; time passes at once when nobody does anything."""
    home = tmp_path / "pools"
    home.mkdir()

    async def main() -> None:
        with trio.fail_after(3600):
            async with open_pools(home, PoolSettings(), cast(Any, FakePool)) as pools:
                await pools.create("p", [DeviceSpec(tmp_path / "device", "fast", 64 << 20)], force=False)
                await body(pools)

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def _hold(pools: Pools, until: trio.Event, *, task_status: trio.TaskStatus[None]) -> None:
    """A request that waits for something, as the creation of a volume waits for room in a full pool."""
    with pools.using("p"):
        task_status.started()
        await until.wait()


def test_a_pool_whose_request_does_not_end_is_not_deleted_and_is_served_on(tmp_path: Path) -> None:
    async def body(pools: Pools) -> None:
        ended = trio.Event()
        async with trio.open_nursery() as nursery:
            await nursery.start(_hold, pools, ended)
            pool = pools.pool("p")
            with pytest.raises(TierError, match="in use") as caught:
                await pools.delete("p")
            assert caught.value.errno == errno.EBUSY
            # What would end the request, such as more devices for a full pool, must find it.
            assert pools.pool("p") is pool
            assert pools.slot("p").error is None
            await pool.create_volume("v", 1 << 20)
            ended.set()
        await pools.delete("p")
        assert pools.slots() == []

    with_a_pool(tmp_path, body)


def test_a_deletion_that_is_cancelled_while_it_waits_leaves_the_pool_as_it_was(tmp_path: Path) -> None:
    async def body(pools: Pools) -> None:
        ended = trio.Event()
        async with trio.open_nursery() as nursery:
            await nursery.start(_hold, pools, ended)
            pools.define_policies({**pools.policies, "slow": replace(DEFAULT, name="slow", iops_limit=5)})
            pool = pools.pool("p")
            volume = await pool.create_volume("v", 1 << 20, "slow")
            with trio.move_on_after(0.1) as waiting:
                async with trio.open_nursery() as deleting:
                    deleting.start_soon(pools.delete, "p")
                    await trio.sleep(0.05)
                    pools.define_policies({**pools.policies, "slow": replace(DEFAULT, name="slow", iops_limit=7)})
            assert waiting.cancelled_caught
            assert volume.policy.iops_limit == 7, "it doesn't miss what came meanwhile"
            ended.set()
        await trio.sleep(1)
        assert pools.pool("p") is pool
        await pools.delete("p")

    with_a_pool(tmp_path, body)


def test_a_pool_that_fails_while_its_deletion_waits_is_deleted(tmp_path: Path) -> None:
    async def body(pools: Pools) -> None:
        ended = trio.Event()
        directory = pools.slot("p").directory
        async with trio.open_nursery() as nursery:
            await nursery.start(_hold, pools, ended)
            nursery.start_soon(pools.delete, "p")
            await trio.sleep(0.1)
            (directory / "fail-later").write_text("its device is on fire")
            await trio.sleep(1)
            assert pools.slot("p").closed.is_set()
            ended.set()
        assert pools.slots() == []

    with_a_pool(tmp_path, body)


def test_a_pool_that_fails_while_its_deletion_waits_in_vain_is_not_brought_back(tmp_path: Path) -> None:
    async def body(pools: Pools) -> None:
        ended = trio.Event()
        directory = pools.slot("p").directory
        async with trio.open_nursery() as nursery:
            await nursery.start(_hold, pools, ended)
            with trio.move_on_after(2):
                async with trio.open_nursery() as deleting:
                    deleting.start_soon(pools.delete, "p")
                    await trio.sleep(0.1)
                    (directory / "fail-later").write_text("its device is on fire")
            with pytest.raises(TierError, match="its device is on fire"):
                pools.pool("p")
            ended.set()

    with_a_pool(tmp_path, body)


class _Watcher:
    def __init__(self, closing_s: float = 0) -> None:
        self.calls: list[str] = []
        self._closing_s = closing_s

    def opened(self, pool: Pool) -> None: ...

    def gone(self, pool: Pool) -> None: ...

    async def closing(self, pool: Pool) -> None:
        await trio.sleep(self._closing_s)
        self.calls.append("closing")

    async def giving_up(self, pool: Pool) -> None:
        await trio.lowlevel.checkpoint()
        self.calls.append("giving up")


def test_a_deletion_that_is_cancelled_while_mirrors_end_keeps_no_stop_of_the_daemon_waiting(tmp_path: Path) -> None:
    async def body(pools: Pools) -> None:
        pools.watcher = _Watcher(closing_s=5)  # as with a peer that is silent
        with trio.move_on_after(3) as deleting:
            await pools.delete("p")
        assert deleting.cancelled_caught
        # `open_pools` closes it now, or waits for it for ever.

    with_a_pool(tmp_path, body)


def test_a_pool_with_legs_is_deleted_by_force_alone_and_only_if_it_takes_no_writes(tmp_path: Path) -> None:
    async def body(pools: Pools) -> None:
        pools.watcher = watcher = _Watcher()
        pool = cast(FakePool, pools.pool("p"))
        volume = await pool.create_volume("v", 1 << 20)
        volume.mirror_record = b"a leg's"
        for force in (False, True):
            with pytest.raises(TierError, match="mirror remove` first"):
                await pools.delete("p", force=force)
        pool.problem = "its checkpoints fail"
        with pytest.raises(TierError, match="`terrace pool delete p --force`"):
            await pools.delete("p")
        assert pools.pool("p") is cast(Any, pool) and watcher.calls == []
        await pools.delete("p", force=True)
        assert pools.slots() == [] and watcher.calls == ["giving up", "closing"]

    with_a_pool(tmp_path, body)


def test_a_pool_that_is_not_open_is_deleted_by_force_alone_as_nobody_knows_what_is_in_it(tmp_path: Path) -> None:
    async def body(pools: Pools) -> None:
        directory = pools.slot("p").directory
        (directory / "fail-later").write_text("its device is on fire")
        while pools.slot("p").pool is not None:
            await trio.sleep(0.1)
        said = r"its device is on fire.*`terrace pool open p`; `terrace pool delete p --force` deletes it with whatever"
        with pytest.raises(TierError, match=said) as refused:
            await pools.delete("p")
        assert refused.value.errno == errno.EIO and directory.exists()
        (directory / "fail-later").unlink()
        assert await pools.reopen("p") is pools.pool("p"), "nothing of it was touched"
        (directory / "fail-later").write_text("its device is on fire")
        while pools.slot("p").pool is not None:
            await trio.sleep(0.1)
        await pools.delete("p", force=True)
        assert pools.slots() == [] and not directory.exists()

    with_a_pool(tmp_path, body)
