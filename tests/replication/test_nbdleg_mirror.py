"""A mirror with a leg on an NBD server: what that is never taken for, and what becomes of it.

The server is ours, in this process, so that what it stores can be looked at and damaged.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import trio

from replication.leg import EXTENT_BYTES, LegState, MirrorState
from replication.members import Member
from replication.mirror import Mirror
from replication.site import MirrorSettings
from replication.snapshots import take_at_once
from replication.verify import verify
from tests.nbd.client import serving
from tests.nbd.memory import MemoryExport
from tests.replication.fakes import trackers_matching
from tests.replication.linked import run
from tests.replication.rig import SIZE, Rig, with_server


@dataclass
class Scene:
    rig: Rig
    mirror: Mirror
    export: MemoryExport

    @property
    def member(self) -> Member:
        return self.mirror.members["nbd"]

    async def in_sync(self) -> None:
        await self.until(lambda: self.member.state is LegState.UP_TO_DATE)

    async def until(self, true: Callable[[], bool]) -> None:
        with trio.fail_after(10):
            while not true():
                await trio.sleep(0.005)

    def require_equal(self) -> None:
        for node in self.rig.nodes.values():
            assert node.store.image == self.export.data


@asynccontextmanager
async def scene(legs: int = 1) -> AsyncIterator[Scene]:
    """Node a is the primary; its mirror has a leg on a server more, which is in sync."""
    export = MemoryExport("", size_bytes=SIZE)
    async with serving(export) as served:
        rig = Rig(legs)
        with_server(rig, served.uri(""))
        async with rig.running() as mirror:
            found = Scene(rig, mirror, export)
            await found.in_sync()
            yield found


def played(body: Callable[[Scene], Awaitable[Any]], legs: int = 1) -> None:
    async def main() -> None:
        async with scene(legs) as found:
            await body(found)

    run(main)


def test_a_write_is_on_the_server_when_it_is_acknowledged_and_clients_never_read_there() -> None:
    async def body(on: Scene) -> None:
        data = os.urandom(3 * EXTENT_BYTES)
        await on.mirror.write(100, data)
        assert on.export.data[100 : 100 + len(data)] == data
        await on.mirror.trim(0, EXTENT_BYTES)
        on.require_equal()
        into = memoryview(bytearray(1000))
        for _ in range(20):
            await on.mirror.read(70_000, 1000, into)
        assert on.member.counters.reads == 0
        assert on.mirror.sources()[0].is_local

    played(body)


def test_without_a_terrace_leg_the_mirror_stops_though_the_server_lives_and_both_are_equal_again_later() -> None:
    async def body(on: Scene) -> None:
        await on.mirror.write(0, os.urandom(EXTENT_BYTES))
        store = on.rig.store("a")
        store.failing = OSError(errno.EIO, "the disk is away")
        lone = os.urandom(EXTENT_BYTES)
        with pytest.raises(OSError):
            await on.mirror.write(10 * EXTENT_BYTES, lone)
        assert on.mirror.lost and on.mirror.status().state is MirrorState.FAULTED
        with trio.move_on_after(0.3) as waited:
            await on.mirror.write(0, bytes(4096))
        assert waited.cancelled_caught
        assert on.rig.cluster.truth.in_sync & {"lega"}
        # The server has perhaps got what the leg never took, and nobody's trackers know of.
        store.failing = None
        await on.until(lambda: not on.mirror.lost)
        await on.in_sync()
        assert bytes(on.export.data[10 * EXTENT_BYTES : 11 * EXTENT_BYTES]) != lone
        on.require_equal()
        assert on.rig.cluster.truth.in_sync == {"lega", "nbd"}

    played(body)


def test_a_block_that_no_leg_can_read_keeps_only_itself_from_the_server_and_says_so() -> None:
    async def body(on: Scene) -> None:
        await on.mirror.write(0, os.urandom(8 * EXTENT_BYTES))
        on.mirror.drop(on.member, OSError(errno.EIO, "away"))
        await on.mirror.write(0, os.urandom(4 * EXTENT_BYTES))
        on.rig.store("a").lost.update((4096, 2 * EXTENT_BYTES))
        await on.until(lambda: "on no leg" in str(on.member.error))
        assert "2 block(s), the first at byte 4096, can be read on no leg" in str(on.member.error)
        assert on.member.state is LegState.STALE
        assert trackers_matching(on.rig.store("a"), "missing:nbd") >= {0, 2}
        ours, theirs = bytearray(on.rig.store("a").image), bytearray(on.export.data)
        for at in (4096, 2 * EXTENT_BYTES):
            ours[at : at + 4096] = theirs[at : at + 4096] = bytes(4096)
        assert ours == theirs
        # That is said, and no other round begins, until some of it is written. Then it is said while that is tried.
        resyncs = on.member.counters.resyncs
        await trio.sleep(0.5)
        assert on.member.counters.resyncs == resyncs
        await on.mirror.write(4096, bytes(4096))
        await on.until(lambda: on.member.state is LegState.SYNCING)
        assert "2 block(s)" in str(on.mirror.status().legs[-1].kept_out)
        await on.mirror.trim(2 * EXTENT_BYTES, 4096)
        await on.in_sync()
        on.require_equal()
        assert on.mirror.status().legs[-1].kept_out is None

    played(body)


def test_a_block_is_not_called_readable_because_a_server_in_sync_has_something_there() -> None:
    async def body(on: Scene) -> None:
        await on.mirror.write(0, os.urandom(EXTENT_BYTES))
        on.rig.store("a").lost.add(4096)
        await on.mirror.heal("lega", 0, EXTENT_BYTES)
        assert list(on.mirror.healing.unmendable) == [4096], "no checksum proves what the server has"
        await on.mirror.heal("nbd", 0, EXTENT_BYTES)
        assert list(on.mirror.healing.unmendable) == [4096]

    played(body)


def test_a_block_that_is_written_while_nobody_could_read_it_keeps_the_server_out_no_more() -> None:
    async def body(on: Scene) -> None:
        await on.mirror.write(0, os.urandom(8 * EXTENT_BYTES))
        on.mirror.drop(on.member, OSError(errno.EIO, "away"))
        await on.mirror.write(0, os.urandom(4 * EXTENT_BYTES))
        store = on.rig.store("a")
        store.lost.add(0)
        failures = on.member.counters.failures
        left = on.rig.store("a").read

        async def read(offset: int, length: int, into: memoryview) -> None:
            if length == 4096 and offset == 3 * 4096 and store.lost:
                await on.mirror.write(0, bytes([7]) * 4096)  # just after block 0 was found lost
            await left(offset, length, into)

        with mock.patch.object(store, "read", read), mock.patch.object(store, "read_now", lambda *_: False):
            await on.in_sync()
        assert on.member.counters.failures == failures
        on.require_equal()

    played(body)


def test_no_record_has_the_server_alone_in_sync() -> None:
    async def body(on: Scene) -> None:
        seen = [on.rig.cluster.truth.in_sync]
        commit = on.rig.cluster.commit

        async def watched(new: Any, *, expected: Any) -> None:
            seen.append(new.in_sync)
            await commit(new, expected=expected)

        on.rig.cluster.commit = watched  # type: ignore[method-assign]
        for name in ("legb", "lega"):
            leg = on.mirror.members[name].leg
            assert leg is not None
            on.mirror.leg_failed(leg, OSError(errno.ECONNRESET, "gone"))
        assert on.mirror.lost
        await on.until(lambda: not on.mirror.lost)
        await on.in_sync()
        assert all(one & {"lega", "legb"} for one in seen)

    played(body, legs=2)


def test_a_block_that_no_leg_can_read_comes_from_the_server_if_its_checksum_is_the_leg_s_and_heals_it() -> None:
    async def body(on: Scene) -> None:
        data = os.urandom(2 * EXTENT_BYTES)
        await on.mirror.write(0, data)
        store = on.rig.store("a")
        store.bad = {8192, EXTENT_BYTES}
        into = memoryview(bytearray(5000))
        await on.mirror.read(7000, 5000, into)
        assert into == data[7000:12000]
        await on.until(lambda: 8192 not in store.bad)
        assert bytes(store.image[:12288]) == data[:12288]
        # Of the other one the server has something else.
        on.export.data[EXTENT_BYTES] ^= 1
        with pytest.raises(OSError) as failed:
            await on.mirror.read(EXTENT_BYTES, 4096, into[:4096])
        assert failed.value.errno == errno.EIO
        assert await on.mirror.heal("lega", EXTENT_BYTES, 4096) == 0
        assert EXTENT_BYTES in store.bad

    played(body)


def test_a_write_that_comes_while_a_block_is_proven_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(on: Scene) -> None:
        await on.mirror.write(0, os.urandom(EXTENT_BYTES))
        on.rig.store("a").bad = {8192}
        leg, new, reads = on.member.leg, os.urandom(4096), 0
        assert leg is not None
        read = leg.read

        async def and_then_a_write(offset: int, length: int, into: memoryview) -> None:
            nonlocal reads
            await read(offset, length, into)
            reads += 1
            if reads == 1:
                await on.mirror.write(8192, new)

        monkeypatch.setattr(leg, "read", and_then_a_write)
        into = memoryview(bytearray(4096))
        await on.mirror.read(8192, 4096, into)
        assert into == new and reads == 2

    played(body)


def test_a_server_that_is_away_gets_only_what_it_missed() -> None:
    async def body(on: Scene) -> None:
        await on.mirror.write(0, os.urandom(8 * EXTENT_BYTES))
        for _ in range(3):
            await on.mirror.flush()
        leg = on.member.leg
        assert leg is not None
        on.mirror.leg_failed(leg, OSError(errno.ECONNRESET, "gone"))
        await on.mirror.write(20 * EXTENT_BYTES, os.urandom(EXTENT_BYTES))
        on.export.data[0] ^= 1  # outside of what is looked at
        await on.in_sync()
        assert on.member.resync is not None
        assert on.member.resync.progress.total_bytes <= 2 * EXTENT_BYTES
        assert on.export.data[0] != on.rig.store("a").image[0]
        report = await verify(on.mirror)  # without `full`: it is read, as it has no checksums
        assert report.differing == {"nbd": [(0, 4096)]}
        repaired = await verify(on.mirror, repair=True)
        assert repaired.repaired_bytes == 4096
        on.require_equal()

    played(body)


def test_a_server_that_restarts_without_what_it_had_not_flushed_gets_that_again() -> None:
    class Forgetful(MemoryExport):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.durable = bytes(self.data)

        async def flush(self) -> None:
            await super().flush()
            self.durable = bytes(self.data)

    async def main() -> None:
        export = Forgetful("", size_bytes=SIZE)
        async with serving(export) as served:
            rig = Rig(2, settings=MirrorSettings(flush_every_s=60.0))
            with_server(rig, served.uri(""))
            async with rig.running() as mirror:
                on = Scene(rig, mirror, export)
                await on.in_sync()
                await mirror.write(0, os.urandom(4 * EXTENT_BYTES))
                for _ in range(3):
                    await mirror.flush()
                for offset in (EXTENT_BYTES, 9 * EXTENT_BYTES):
                    await mirror.write(offset, os.urandom(EXTENT_BYTES))
                on.require_equal()
                export.data[:] = export.durable
                assert export.data != rig.store("a").image
                served.server.disconnect("")
                await mirror.write(20 * EXTENT_BYTES, os.urandom(EXTENT_BYTES))
                await on.until(lambda: on.member.counters.failures == 1)
                await on.in_sync()
                on.require_equal()
                assert on.member.resync is not None
                assert on.member.resync.progress.total_bytes <= 4 * EXTENT_BYTES

    run(main)


def test_a_snapshot_leaves_the_leg_in_and_a_growth_needs_room_on_the_server() -> None:
    async def body(on: Scene) -> None:
        await on.mirror.write(0, os.urandom(EXTENT_BYTES))

        async def here(mirrors: Sequence[Mirror]) -> None:
            await on.rig.store("a").snapshot("s")

        lacking = await take_at_once({on.mirror: "s"}, here)
        assert list(lacking[on.mirror]) == ["nbd"] and "NBD server" in lacking[on.mirror]["nbd"]
        assert on.member.state is LegState.UP_TO_DATE and "s" in on.rig.store("a").snapshots
        with pytest.raises(OSError, match="make the export at least so large") as refused:
            await on.mirror.resize(2 * SIZE)
        assert refused.value.errno == errno.ENOSPC
        assert on.mirror.size_bytes == SIZE == on.rig.store("a").size_bytes
        assert on.member.state is LegState.UP_TO_DATE
        on.export.size_bytes = 2 * SIZE
        on.export.data, old = bytearray(2 * SIZE), on.export.data
        on.export.data[:SIZE] = old
        on.export.view = memoryview(on.export.data)
        on.export.allocated += bytes(len(on.export.allocated))
        await on.mirror.resize(2 * SIZE)
        await on.until(lambda: on.member.counters.failures == 1)
        await on.in_sync()
        assert on.member.resync is not None and on.member.resync.progress.total_bytes <= SIZE + 2 * EXTENT_BYTES
        await on.mirror.write(2 * SIZE - 8192, os.urandom(8192))
        on.require_equal()

    played(body)


def test_what_an_export_has_behind_the_end_is_zeros_when_a_growth_that_was_given_up_counts() -> None:
    """The server is back before that, and brought up to date at the old size."""

    async def main() -> None:
        export = MemoryExport("", size_bytes=2 * SIZE)
        async with serving(export) as served:
            rig = Rig(1)
            with_server(rig, served.uri(""))
            async with rig.running() as mirror:
                member = mirror.members["nbd"]
                await rig.until(lambda: member.state is LegState.UP_TO_DATE)
                export.data[SIZE:] = b"\7" * SIZE
                export.allocated[:] = b"\1" * len(export.allocated)
                goes_on = rig.hold_resizes()
                with trio.move_on_after(0.5) as given_up:
                    await mirror.resize(2 * SIZE)
                assert given_up.cancelled_caught and mirror.size_bytes == SIZE
                await rig.until(lambda: member.state is LegState.SYNCING and member.ready)
                goes_on[2 * SIZE].set()
                await rig.until(lambda: member.state is LegState.UP_TO_DATE and mirror.size_bytes == 2 * SIZE)
                assert rig.store("a").image == export.data

    run(main)


@pytest.mark.parametrize("is_away", [False, True])
def test_what_an_export_has_behind_the_end_is_zeros_when_the_mirror_has_grown(is_away: bool) -> None:
    async def main() -> None:
        export = MemoryExport("", size_bytes=2 * SIZE)
        async with serving(export) as served:
            rig = Rig(2)
            with_server(rig, served.uri(""))
            async with rig.running() as mirror:
                on = Scene(rig, mirror, export)
                await on.in_sync()
                await mirror.write(0, os.urandom(SIZE))
                await mirror.resize(SIZE // 2)  # the export keeps what was behind that
                if is_away:
                    back, site = trio.Event(), rig.servers["nbd"]
                    open_leg = site.open

                    async def later(*about: Any, **more: Any) -> Any:
                        await back.wait()
                        return await open_leg(*about, **more)

                    site.open = later  # type: ignore[method-assign]
                    assert on.member.leg is not None
                    mirror.leg_failed(on.member.leg, OSError(errno.ETIMEDOUT, "away"))
                    await mirror.write(0, bytes(4096))
                export.data[SIZE + 100 : SIZE + 200] = b"x" * 100
                export.allocated[:] = b"\1" * len(export.allocated)
                await mirror.resize(2 * SIZE)
                for node in "ab":
                    recent = trackers_matching(rig.store(node), "recent*")
                    assert not any(extent >= SIZE // EXTENT_BYTES for extent in recent), "a start compares it"
                await mirror.write(2 * SIZE - 8192, b"new" * 100)
                if is_away:
                    back.set()
                await on.until(lambda: on.member.counters.resyncs == 2)
                await on.in_sync()
                on.require_equal()

    run(main)
