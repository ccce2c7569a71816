"""Snapshots of several volumes at once: taken, listed and deleted as one."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.tiers.helpers import assert_sound, fresh_pool, refusal, run, settle
from tiers.layout import BLOCK_BYTES, MIB


def test_a_group_is_deleted_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_pool(tmp_path) as pool:
            for name in ("a", "b"):
                volume = await pool.create_volume(name, MIB)
                assert volume.write_now([(0, memoryview(name.encode() * BLOCK_BYTES)[:BLOCK_BYTES])])
            await pool.take_snapshots([("a", "s"), ("b", "s")])
            await pool.take_snapshots([("a", "t")])
            await pool.change_snapshot("b", "s", held=True)
            group = [("a", "s"), ("b", "s"), ("a", "t")]
            held = await refusal(lambda: pool.delete_snapshots(group))
            assert (held.errno, "p/b@s is held" in str(held)) == (errno.EBUSY, True)
            gone = await refusal(lambda: pool.delete_snapshots([("a", "s"), ("a", "none")]))
            assert gone.errno == errno.ENOENT
            assert [snapshot.name for snapshot in pool.snapshots()] == ["p/a@s", "p/a@t", "p/b@s"]
            await pool.change_snapshot("b", "s", held=False)
            await pool.delete_snapshots(group)
            assert pool.snapshots() == []
            await settle(pool)
            await assert_sound(pool)

    run(main)


@pytest.mark.parametrize("keep_as", [None, "before"])
def test_all_snapshots_are_listed_as_those_of_one_volume_after_another(tmp_path: Path, keep_as: str | None) -> None:
    async def main() -> None:
        async with fresh_pool(tmp_path) as pool:
            for name in ("b", "a"):
                await pool.create_volume(name, MIB)
            for number in range(3):
                await pool.take_snapshots([(name, f"s{number}") for name in ("a", "b")])
            await pool.clone("a", "s1", "c")
            await pool.take_snapshots([("c", "s0")])
            await pool.rollback("a", "s0", keep_as=keep_as)
            await pool.take_snapshots([("a", "s3")])
            await pool.delete_snapshot("a", "s1")
            expected = [snapshot for volume in pool.volumes() for snapshot in pool.snapshots(volume.short_name)]
            assert pool.snapshots() == expected
            assert len(expected) == 7 + (keep_as is not None)

    run(main)
