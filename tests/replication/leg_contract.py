"""What every `replication.leg.Leg` does, wherever its copy is. A test module derives a class from `LegContract`.

The store behind the leg needs `image` (bytes; else the rig has an `image` of its own), `trackers`, and to say whatever
it likes to `write_now`.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trio

from replication.leg import BLOCK_BYTES, EXTENT_BYTES, Change, Leg
from replication.membership import Membership
from tests.replication.linked import MEMBERSHIP, Told, data, run, until, zeros


@dataclass
class Rig:
    """A leg under test, and the store in which it ends."""

    leg: Leg
    store: Any
    membership: Membership = MEMBERSHIP

    async def image(self) -> bytes:
        """All bytes of the copy, as who looks at it without the leg finds them."""
        await trio.lowlevel.checkpoint()
        return bytes(self.store.image)


class LegContract:
    """See the module."""

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Rig]:
        """A leg of at least 2 MiB, all zeros; closed behind the yield."""
        raise NotImplementedError
        yield

    def test_changes_are_applied_in_their_order_and_each_done_is_called_once_in_that_order(self) -> None:
        async def body() -> None:
            async with self.opened() as rig:
                told = Told()
                for sequence in range(1, 101):
                    changes = [data(0, sequence), data(sequence % 8 * BLOCK_BYTES, sequence), zeros(32 << 10)]
                    rig.leg.submit(sequence, changes, told.of(sequence))
                await until(lambda: len(told.calls) == 100)
                assert told.done == list(range(1, 101))
                assert rig.leg.queued_bytes == 0
                image = await rig.image()
                assert image[0] == 100
                assert [image[block * BLOCK_BYTES] for block in range(1, 8)] == [
                    97, 98, 99, 100, 93, 94, 95,
                ]  # fmt: skip

        run(body)

    def test_done_is_never_called_from_within_submit(self) -> None:
        async def body() -> None:
            async with self.opened() as rig:
                told = Told()
                for sequence in range(1, 20):
                    before = len(told.calls)
                    rig.leg.submit(sequence, [data(0, sequence)], told.of(sequence))
                    assert len(told.calls) == before
                await until(lambda: told.done == list(range(1, 20)))
                rig.leg.close()
                rig.leg.submit(20, [data(0, 20)], told.of(20))
                assert len(told.calls) == 19
                await until(lambda: told.failed == [20])

        run(body)

    def test_data_may_change_as_soon_as_submit_has_returned(self) -> None:
        async def body() -> None:
            async with self.opened() as rig:
                told = Told()
                for sequence in range(1, 30):
                    buffer = bytearray([sequence]) * (64 << 10)
                    rig.leg.submit(sequence, [Change(0, 64 << 10, memoryview(buffer))], told.of(sequence))
                    buffer[:] = bytes([255]) * len(buffer)
                await until(lambda: len(told.done) == 29)
                image = await rig.image()
                assert image[: 64 << 10] == bytes([29]) * (64 << 10)

        run(body)

    def test_a_batch_of_any_size_arrives_whole(self) -> None:
        async def body() -> None:
            async with self.opened() as rig:
                told = Told()
                many = [data(block * BLOCK_BYTES, block % 251 + 1) for block in range(256)]
                long = Change(1 << 20, 1 << 20, memoryview(bytes(range(256)) * 4096))
                rig.leg.submit(1, [*many * 6, long, zeros(0, BLOCK_BYTES)], told.of(1))
                await until(lambda: told.done == [1])
                image = await rig.image()
                assert image[0] == 0
                assert [image[block * BLOCK_BYTES] for block in range(1, 256)] == [
                    block % 251 + 1 for block in range(1, 256)
                ]
                assert image[1 << 20 : 2 << 20] == bytes(range(256)) * 4096

        run(body)

    def test_a_flush_returns_after_all_that_was_submitted_before(self) -> None:
        async def body() -> None:
            async with self.opened() as rig:
                told = Told()
                for sequence in range(1, 50):
                    rig.leg.submit(sequence, [data(0, sequence, 32 << 10)], told.of(sequence))
                await rig.leg.flush()
                image = await rig.image()
                assert image[0] == 49
                await until(lambda: len(told.done) == 49)

        run(body)

    def test_a_read_has_all_that_was_done_before(self) -> None:
        async def body() -> None:
            async with self.opened() as rig:
                told = Told()
                rig.leg.submit(1, [data(4096, 7, 1 << 20)], told.of(1))
                await until(lambda: told.done == [1])
                into = memoryview(bytearray((1 << 20) + 8192))
                if not rig.leg.read_now(0, len(into), into):
                    await rig.leg.read(0, len(into), into)
                assert bytes(into) == bytes(4096) + bytes([7]) * (1 << 20) + bytes(4096)

        run(body)

    @pytest.mark.parametrize(
        ("offset", "length"), [(1, 1), (4095, 2), (1024, 1024), (4999, 10002), (100, (1 << 20) + 5000), (4096, 4097)]
    )
    def test_a_part_of_a_block_is_read_like_a_whole_one(self, offset: int, length: int) -> None:
        async def body() -> None:
            async with self.opened() as rig:
                told = Told()
                written = bytes(block % 251 + 1 for block in range(300) for _ in range(BLOCK_BYTES))
                rig.leg.submit(1, [Change(0, len(written), memoryview(written))], told.of(1))
                await until(lambda: told.done == [1])
                into = bytearray(length)
                await rig.leg.read(offset, length, memoryview(into))
                assert into == written[offset : offset + length]

        run(body)

    def test_what_has_changed_since_the_last_common_flush_is_known_and_then_forgotten(self) -> None:
        async def body() -> None:
            async with self.opened() as rig:
                told = Told()

                async def changed() -> set[int]:
                    extents = await rig.leg.changed(["recent*"])
                    return {
                        at // EXTENT_BYTES
                        for start, length in extents.runs()
                        for at in range(start, start + length, EXTENT_BYTES)
                    }

                rig.leg.submit(1, [data(0, 1)], told.of(1))
                await until(lambda: told.done == [1])
                assert await changed() == {0}
                rig.leg.submit(2, [data(EXTENT_BYTES, 2)], told.of(2))
                await rig.leg.flush()
                rig.leg.submit(3, [data(5 * EXTENT_BYTES, 3)], told.of(3))
                await until(lambda: told.done == [1, 2, 3])
                assert await changed() == {0, 1, 5}
                rig.leg.flushed_by_all(2)
                assert await changed() == {5}
                assert not await rig.leg.changed(["missing:*", "nothing"])

        run(body)

    def test_checks_are_eight_bytes_for_each_block_and_follow_the_data(self) -> None:
        async def body() -> None:
            async with self.opened() as rig:
                told = Told()
                rig.leg.submit(1, [data(4096, 9)], told.of(1))
                await until(lambda: told.done == [1])
                checks = await rig.leg.checks(0, 16384)
                assert len(checks) == 32
                assert checks[8:16] != checks[:8] == checks[16:24]

        run(body)

    def test_the_mapped_ranges_have_all_that_was_written(self) -> None:
        async def body() -> None:
            async with self.opened() as rig:
                told = Told()
                rig.leg.submit(1, [data(8192, 9)], told.of(1))
                await until(lambda: told.done == [1])
                ranges = await rig.leg.mapped(0, 1 << 20)
                assert any(offset <= 8192 and offset + length >= 12288 for offset, length in ranges)

        run(body)

    def test_after_a_close_all_that_is_due_fails_with_ecanceled_and_nothing_more_is_taken(self) -> None:
        async def body() -> None:
            async with self.opened() as rig:
                told = Told()
                for sequence in range(1, 10):
                    rig.leg.submit(sequence, [data(0, sequence, 64 << 10)], told.of(sequence))
                rig.leg.close()
                rig.leg.close()
                await until(lambda: len(told.calls) == 9)
                assert [sequence for sequence, _ in told.calls] == list(range(1, 10))
                assert all(error is None or error.errno == errno.ECANCELED for _, error in told.calls)
                assert rig.leg.failure is not None and rig.leg.failure.errno == errno.ECANCELED
                assert rig.leg.queued_bytes == 0 and rig.leg.silent_since is None
                for failing in (rig.leg.flush(), rig.leg.checks(0, 4096), rig.leg.changed(["recent"])):
                    with pytest.raises(OSError) as raised:
                        await failing
                    assert raised.value.errno == errno.ECANCELED

        run(body)

    def test_a_cancelled_wait_harms_nobody(self) -> None:
        async def body() -> None:
            async with self.opened() as rig:
                told = Told()
                for sequence in range(1, 40):
                    rig.leg.submit(sequence, [data(0, sequence)], told.of(sequence))
                    with trio.move_on_after(0):
                        await rig.leg.flush()
                    with trio.move_on_after(0):
                        await rig.leg.changed(["recent"])
                await rig.leg.flush()
                await until(lambda: told.done == list(range(1, 40)))
                image = await rig.image()
                assert image[0] == 39

        run(body)


class TerraceLegContract(LegContract):
    """Of a leg whose place is a pool: an NBD server can't be told that a block is lost. The store has `lost`."""

    def test_blocks_are_lost_in_their_place_between_the_writes(self) -> None:
        async def body() -> None:
            async with self.opened() as rig:
                told = Told()
                for sequence in range(1, 60, 3):
                    rig.leg.submit(sequence, [data(0, sequence, 4 * BLOCK_BYTES)], told.of(sequence))
                    rig.leg.submit(sequence + 1, [Change(0, 3 * BLOCK_BYTES, None, lost=True)], told.of(sequence + 1))
                    rig.leg.submit(
                        sequence + 2, [data(BLOCK_BYTES, sequence), zeros(0, BLOCK_BYTES)], told.of(sequence + 2)
                    )
                rig.leg.submit(61, [Change(5 * BLOCK_BYTES, BLOCK_BYTES, None, lost=True)], told.of(61))
                await until(lambda: len(told.calls) == 61)
                assert told.done == [*range(1, 61), 61]
                assert rig.store.lost == {2 * BLOCK_BYTES, 5 * BLOCK_BYTES}
                image = await rig.image()
                assert image[0] == 0 and image[BLOCK_BYTES] == image[3 * BLOCK_BYTES] == 58

        run(body)
