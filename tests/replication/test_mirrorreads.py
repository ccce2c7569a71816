"""What a mirror says is mapped, and reads that aren't clients': as true as reads are, from whichever leg can."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import trio

from nbd.wire import STATE_HOLE, STATE_ZERO
from replication.leg import BLOCK_BYTES, EXTENT_BYTES
from replication.mirror import Mirror
from replication.mirrorreads import LEAF_BYTES
from tests.replication.rig import SIZE, Rig, run

HOLE = STATE_HOLE | STATE_ZERO


@contextlib.contextmanager
def held_up(mirror: Mirror) -> Iterator[trio.Event]:
    """What the local leg finds mapped is on its way to who has asked until the event is set."""
    leg, arrives = mirror.members["lega"].leg, trio.Event()
    assert leg is not None
    mapped = leg.mapped

    async def late(offset: int, length: int) -> list[tuple[int, int]]:
        found = await mapped(offset, length)
        await arrives.wait()
        return found

    leg.mapped = late  # type: ignore[method-assign]
    yield arrives
    leg.mapped = mapped  # type: ignore[method-assign]


def test_no_hole_is_told_by_a_primary_whose_lease_was_over_when_it_looked() -> None:
    async def body() -> None:
        serving, again = True, trio.Event()
        rig = Rig(2, may_serve=lambda: serving, until_may_serve=lambda: again.wait())
        async with rig.running() as mirror, trio.open_nursery() as nursery:
            await mirror.write(0, bytes([1]) * BLOCK_BYTES)
            told: list[list[tuple[int, int]]] = []

            @nursery.start_soon
            async def ask() -> None:
                told.append(await mirror.extents(0, 2 * BLOCK_BYTES, 9))

            with held_up(mirror) as arrives:
                await trio.sleep(0.1)
                serving = False  # and another primary may have written, and a copy of that be read from here later
                arrives.set()
                await trio.sleep(1)
            assert told == []
            for node in "ab":
                rig.store(node).image[BLOCK_BYTES : 2 * BLOCK_BYTES] = bytes([2]) * BLOCK_BYTES
            serving = True
            again.set()
            await rig.until(lambda: bool(told))
            assert told == [[(2 * BLOCK_BYTES, 0)]]

    run(body)


def test_what_is_mapped_is_told_by_another_leg_where_the_local_map_is_damaged() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await mirror.write(0, bytes([1]) * BLOCK_BYTES)
            leg = mirror.members["lega"].leg
            assert leg is not None

            async def damaged(offset: int, length: int) -> list[tuple[int, int]]:
                raise OSError(errno.EIO, "a page of the map is damaged")

            leg.mapped = damaged  # type: ignore[method-assign]
            assert await mirror.extents(0, 2 * BLOCK_BYTES, 9) == [(BLOCK_BYTES, 0), (BLOCK_BYTES, HOLE)]

    run(body)


def test_a_range_that_is_not_in_whole_blocks_is_told_by_another_leg_too() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await mirror.write(0, bytes([1]) * 2 * BLOCK_BYTES)
            rig.store("a").no_map = {0}
            remote = mirror.members["legb"].leg
            assert remote is not None
            mapped = remote.mapped

            async def aligned(offset: int, length: int) -> list[tuple[int, int]]:
                if (offset | length) % BLOCK_BYTES:  # as `replication.wire.read_range` judges
                    raise OSError(errno.EINVAL, "whole blocks only")
                return await mapped(offset, length)

            remote.mapped = aligned  # type: ignore[method-assign]
            told = await mirror.extents(100, 3 * BLOCK_BYTES, 9)
            assert told == [(2 * BLOCK_BYTES - 100, 0), (BLOCK_BYTES + 100, HOLE)]

    run(body)


def test_where_no_leg_can_read_its_map_all_of_that_leaf_is_data_and_the_rest_is_told_as_it_is() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await mirror.write(5 * BLOCK_BYTES, bytes([1]) * BLOCK_BYTES)
            for node in "ab":
                rig.store(node).no_map = {LEAF_BYTES // EXTENT_BYTES + 1}
            assert await mirror.extents(0, SIZE, 9) == [
                (5 * BLOCK_BYTES, HOLE), (BLOCK_BYTES, 0), (LEAF_BYTES - 6 * BLOCK_BYTES, HOLE),
                (LEAF_BYTES, 0), (SIZE - 2 * LEAF_BYTES, HOLE),
            ]  # fmt: skip

    run(body)


def test_a_resync_that_reads_what_is_damaged_here_and_there_is_no_client() -> None:
    async def body() -> None:
        rig = Rig(2)
        async with rig.running() as mirror:
            await mirror.write(0, bytes([1]) * 2 * BLOCK_BYTES)
            rig.store("a").bad.add(0)
            rig.store("b").bad.add(BLOCK_BYTES)
            at, into = mirror.client_at, memoryview(bytearray(2 * BLOCK_BYTES))
            await trio.sleep(1)
            await mirror.read_for_copy(0, len(into), into)
            assert into == bytes([1]) * 2 * BLOCK_BYTES and mirror.client_at == at

    run(body)
