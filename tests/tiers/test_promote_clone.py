"""A clone takes over what only it needs, from however far down it comes, and can be made independent of the rest."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from tests.simulation.machine import Machine
from tiers import Pool

BLOCK = 4096


async def _first_bytes(pool: Pool, name: str) -> bytes:
    into = bytearray(8 * BLOCK)
    await pool.volume(name).read(0, len(into), memoryview(into))
    return bytes(into[::BLOCK])


async def _delete(pool: Pool, name: str) -> None:
    await pool.delete_volume(name, snapshots=True)
    for _ in range(6):
        await pool.checkpoint()  # what goes with it goes in slices


def _run(test: Callable[[Pool], Awaitable[None]]) -> None:
    """Three generations: `third` is a clone of second@t, that one of first@s; then `second` is deleted."""
    machine = Machine(seed=1)

    async def main() -> None:
        async with machine.open() as pool:
            first = await pool.create_volume("first", 1 << 20)
            await first.write(0, b"a" * 8 * BLOCK)
            await pool.take_snapshots([("first", "s")])
            second = await pool.clone("first", "s", "second")
            await pool.take_snapshots([("second", "t")])
            await pool.clone("second", "t", "third")
            await second.write(0, b"b" * BLOCK)  # second@t says of this block that what it had is the origin's
            await first.write(BLOCK, b"c" * BLOCK)
            await pool.checkpoint()
            await _delete(pool, "second")
            assert pool.volume("third").origin is pool.snapshot("first", "s")
            await test(pool)
            assert await _first_bytes(pool, "third") == b"aaaaaaaa"
            assert (await pool.check(full=True)).ok

    machine.run(main)


def test_a_clone_that_took_over_what_was_inherited_is_promoted() -> None:
    async def promote(pool: Pool) -> None:
        await pool.promote("third")
        await _delete(pool, "first")

    _run(promote)


def test_a_clone_takes_over_generation_after_generation() -> None:
    async def take_over(pool: Pool) -> None:
        await _delete(pool, "first")
        assert pool.volume("third").origin is None

    _run(take_over)


@pytest.mark.parametrize("promoted", [False, True])
def test_nothing_is_kept_for_a_deleted_volume_whose_blocks_its_clone_has_taken_over(promoted: bool) -> None:
    async def delete(pool: Pool) -> None:
        third = pool.volume("third")
        if promoted:
            await pool.promote("third")
            await pool.delete_snapshot("first", "s")
        else:
            await third.write(0, b"d" * 8 * BLOCK)
            await _delete(pool, "first")
            await third.write(0, b"a" * 8 * BLOCK)
        for _ in range(6):
            await pool.checkpoint()
        assert not pool._engine.lineage.snapshots
        assert pool._engine.segments.live == (16 if promoted else 8)

    _run(delete)
