"""Trackers and the record of a volume: what was changed since is in them, whatever happens; both are saved together."""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import trio
import trio.testing

from tests.simulation.machine import Disk, Machine, PowerCutError
from tests.simulation.oracle import BLOCK, OracleError, read_all, require_sound
from tests.tiers.helpers import QUIET, assert_sound, block, fresh_pool, make_pool, read, refusal, run
from tiers import Policy, Pool, PoolSettings, TierError, Volume, rebuild_catalog
from tiers.changes import EXTENT_BYTES, MAX_RECORD_BYTES, ChangedExtents, decode_trackers
from tiers.layout import MIB

GIB = 1 << 30
TIB = 1 << 40


def extents(*ranges: tuple[int, int]) -> ChangedExtents:
    found = ChangedExtents()
    for offset, length in ranges:
        found.add(offset, length)
    return found


def state(volume: Volume) -> tuple[bytes, dict[str, list[tuple[int, int]]]]:
    return volume.mirror_record, {name: list(tracker.runs()) for name, tracker in volume.trackers.items()}


def test_record_and_trackers_survive_closing_and_the_loss_of_the_catalog(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await pool.create_volume("v", GIB)
            await pool.create_volume("w", GIB)
            await pool.set_mirror(volume, b"one", {"recent": extents(), "missing:b": extents((0, 1), (4 * MIB, MIB))})
            await volume.write(9 * MIB, block(1))
            expected = state(volume)
            assert expected[1]["recent"] == [(9 * MIB, EXTENT_BYTES)]
            assert expected[1]["missing:b"] == [(0, EXTENT_BYTES), (4 * MIB, MIB), (9 * MIB, EXTENT_BYTES)]
        async with Pool.open(home, settings=QUIET) as pool:
            assert state(pool.volume("v")) == expected
            assert state(pool.volume("w")) == (b"", {})
        for file in home.glob("catalog*"):
            file.unlink()
        await rebuild_catalog(home, "p", [tmp_path / "fast.img"], force=False)
        async with Pool.open(home, settings=QUIET) as pool:
            assert state(pool.volume("v")) == expected
            await pool.set_mirror(pool.volume("v"), b"", {})
        async with Pool.open(home, settings=QUIET) as pool:
            assert state(pool.volume("v")) == (b"", {})
            await assert_sound(pool)

    run(body)


CHANGES: dict[str, tuple[Callable[[Pool, Volume], object], list[tuple[int, int]]]] = {
    "write": (lambda _, v: v.write(MIB + 5, b"x" * 10), [(MIB, 10)]),
    "long write": (lambda _, v: v.write(MIB - 1, b"x" * (3 * MIB)), [(MIB - 1, 3 * MIB)]),
    "zeros": (lambda _, v: v.write(MIB, bytes(MIB)), [(MIB, MIB)]),
    "write_zeroes": (lambda _, v: v.write_zeroes(MIB + 1, 2 * MIB, no_hole=False), [(MIB + 1, 2 * MIB)]),
    "no hole": (lambda _, v: v.write_zeroes(MIB + 1, MIB, no_hole=True), [(MIB + 1, MIB)]),
    "trim": (lambda _, v: v.trim(MIB, 5 * MIB), [(MIB, 5 * MIB)]),
    "shrink": (lambda p, v: p.resize_volume("v", 8 * MIB + 512, mirrored=True), [(8 * MIB, 8 * MIB)]),
    "grow": (lambda p, v: p.resize_volume("v", 64 * MIB, mirrored=True), []),
    "nothing": (lambda p, v: p.checkpoint(), []),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_every_change_is_in_each_tracker_at_once_and_after_a_kill_and_a_power_cut(kind: str) -> None:
    change, ranges = CHANGES[kind]

    def once(*, cut: bool) -> None:
        machine = Machine((Disk("fast", 96),), seed=4, settings=QUIET)
        wanted = list(extents(*ranges).runs())

        async def body() -> None:
            async with machine.open() as pool:
                volume = await pool.create_volume("v", 16 * MIB)
                await volume.write(0, block(1) * 256)
                await pool.set_mirror(volume, b"r", {"a": extents(), "b": extents()})
                await change(pool, volume)  # type: ignore[misc]
                assert state(volume)[1] == {"a": wanted, "b": wanted}
                if cut:
                    await volume.flush()
                machine.off()

        machine.run(body)
        (machine.power_cut if cut else machine.kill)()

        async def after() -> None:
            async with machine.open() as pool:
                assert state(pool.volume("v")) == (b"r", {"a": wanted, "b": wanted})
                await require_sound(pool)

        machine.run(after)

    once(cut=False)
    once(cut=True)


def test_writes_at_once_are_in_the_trackers_at_once_and_only_there(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume, other = await pool.create_volume("v", GIB), await pool.create_volume("w", GIB)
            await pool.set_mirror(volume, b"", {"a": extents()})
            assert volume.write_now([(0, block(1)), (MIB + 5, b"x" * 8192)])
            assert other.write_now([(5 * MIB, block(1))])
            assert volume.trim_now([(2 * MIB, MIB), (4 * MIB, MIB)])
            found = extents((0, 1), (MIB + 5, 8192), (2 * MIB, MIB), (4 * MIB, MIB))
            assert volume.trackers["a"] == found
            assert other.trackers == {}

    run(body)


def follow_a_stream(seed: int) -> None:
    """A long stream goes past the log, and the process dies. Raises OracleError if a tracker has forgotten it."""
    machine = Machine((Disk("fast", 24), Disk("base", 256)), seed=seed, settings=QUIET)
    image = random.Random(seed).randbytes(4 * MIB)

    async def body() -> None:
        async with machine.open() as pool:
            pool.define_policies({"stream": Policy("stream", placement="base", stream_cutoff_bytes=BLOCK)})
            volume = await pool.create_volume("v", 16 * MIB, "stream")
            await pool.set_mirror(volume, b"r", {"a": extents()})
            for at in range(0, 8 * MIB, MIB):
                data = image[at % len(image) :][:MIB]
                if not volume.write_now([(MIB + at, data)]):
                    await volume.write(MIB + at, data)
            assert pool._engine.bypass.written_bytes > 4 * MIB
            require_extents(volume, [(MIB, 8 * MIB)])
            machine.off()

    machine.run(body)
    machine.kill()

    async def after() -> None:
        async with machine.open() as pool:
            volume = pool.volume("v")
            require_extents(volume, [(MIB, 8 * MIB)])
            assert (await read_all(volume))[MIB : 5 * MIB] == image

    machine.run(after)


def require_extents(volume: Volume, expected: list[tuple[int, int]]) -> None:
    found = state(volume)[1]["a"]
    if found != expected:
        raise OracleError(f"the tracker has {found}, and {expected} was written")


def test_a_stream_that_goes_past_the_log_is_in_the_trackers_after_a_crash_too() -> None:
    follow_a_stream(4)


def set_during_a_checkpoint(seed: int) -> None:
    """Both are set while a checkpoint is under way, behind whose commit the process dies. OracleError: half of it."""
    machine = Machine(seed=seed, settings=QUIET)

    async def body() -> None:
        async with machine.open() as pool, trio.open_nursery() as nursery:
            volume = await pool.create_volume("v", 16 * MIB)
            await pool.set_mirror(volume, b"one", {"one": extents((0, 1))})

            def meanwhile() -> None:
                del machine.on_hit["checkpoint.frozen"]
                nursery.start_soon(pool.set_mirror, volume, b"two", {"two": extents((MIB, 1))})

            machine.on_hit["checkpoint.frozen"] = meanwhile
            machine.arm((None, None, ("checkpoint.committed", 0)))
            await pool.checkpoint()

    with contextlib.suppress(PowerCutError):
        machine.run(body)
    assert machine.is_off
    machine.kill()

    async def after() -> None:
        async with machine.open() as pool:
            found = state(pool.volume("v"))
            if found != (b"one", {"one": [(0, EXTENT_BYTES)]}):
                raise OracleError(f"what the first of two checkpoints had to save is {found}")

    machine.run(after)


def test_what_is_set_while_a_checkpoint_is_under_way_is_the_next_ones() -> None:
    for seed in range(3):
        set_during_a_checkpoint(seed)


def test_what_is_only_moved_or_written_anew_is_no_change(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", GIB)
            await volume.write(0, block(1) * 16)
            await pool.set_mirror(volume, b"", {"a": extents()})
            volume.rewrite([(0, block(1))])
            assert not volume.trackers["a"]
            await pool.take_snapshots([("v", "s")])
            volume.rewrite([(4096, block(1))])
            clone = await pool.clone("v", "s", "c")
            assert (clone.mirror_record, clone.trackers) == (b"", {})
            await pool.set_mirror(clone, b"c", {"a": extents()})
            await pool.promote("c")
            assert not clone.trackers["a"]
            assert not volume.trackers["a"]
            assert await read(clone, 0, 65536) == block(1) * 16

    run(body)


def test_set_mirror_makes_a_checkpoint_though_nothing_was_written_and_covers_what_had_returned() -> None:
    machine = Machine((Disk("fast", 64),), seed=4, settings=QUIET)

    async def body() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 16 * MIB)
            await pool.set_mirror(volume, b"one")
            await volume.write(0, block(7))
            await pool.set_mirror(volume, b"two")
            before = machine.commits
            await pool.set_mirror(volume, b"three")
            assert machine.commits == before + 1
            machine.off()

    machine.run(body)
    machine.power_cut()

    async def after() -> None:
        async with machine.open() as pool:
            volume = pool.volume("v")
            assert volume.mirror_record == b"three"
            assert await read(volume, 0, BLOCK) == block(7)

    machine.run(after)


def test_what_is_written_during_the_call_is_in_the_new_tracker(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", GIB)
            tracker = extents()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.set_mirror, volume, b"r", {"a": tracker})
                await trio.testing.wait_all_tasks_blocked()
                assert volume.write_now([(3 * MIB, block(1))])
            assert list(tracker.runs()) == [(3 * MIB, EXTENT_BYTES)]
            assert volume.trackers["a"] is tracker

    run(body)


def test_a_tracker_that_is_changed_in_place_is_saved_by_the_next_checkpoint_that_comes_by_itself(
    tmp_path: Path,
) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=PoolSettings(checkpoint_interval_s=0.02)) as pool:
            volume = await pool.create_volume("v", GIB)
            await pool.set_mirror(volume, b"r", {"a": extents((0, GIB)), "b": extents()})
            count = pool.status().checkpoints
            await trio.sleep(0.1)
            assert pool.status().checkpoints == count, "nothing is to be saved"
            volume.trackers["b"].clear()
            volume.trackers["b"].discard(0, GIB)
            volume.trackers["b"] = extents()
            await trio.sleep(0.1)
            assert pool.status().checkpoints == count, "what was empty is empty"
            volume.trackers["a"].discard(0, MIB)
            while pool.status().checkpoints == count:
                await trio.sleep(0.01)
            rows = {row.id: row for row in pool._engine.catalog.load().marks}
            assert list(decode_trackers(rows[volume.id].trackers)["a"].runs()) == [(MIB, GIB - MIB)]

    run(body)


def test_a_checkpoint_that_fails_is_told_and_loses_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await pool.create_volume("v", GIB)
            await pool.set_mirror(volume, b"one", {"a": extents((0, 1))})
            full = TierError(errno.ENOSPC, "no space for the catalog")
            with mock.patch.object(pool._engine.catalog, "commit", side_effect=full):
                error = await refusal(lambda: pool.set_mirror(volume, b"two", {"b": extents((MIB, 1))}))
            assert error is full
            await volume.write(5 * MIB, block(1))
            expected = b"two", {"b": [(MIB, EXTENT_BYTES), (5 * MIB, EXTENT_BYTES)]}
            assert state(volume) == expected
            await pool.set_mirror(volume, b"two")
            assert state(volume) == expected
        async with Pool.open(home, settings=QUIET) as pool:
            assert state(pool.volume("v")) == expected

    run(body)


def test_trackers_that_were_added_in_place_and_cannot_be_saved_fail_the_checkpoint_not_the_next_open(
    tmp_path: Path,
) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await pool.create_volume("v", GIB)
            await pool.set_mirror(volume, b"r", {"a": extents((0, 1))})
            volume.trackers["x" * 256] = extents()
            assert (await refusal(pool.checkpoint)).errno == errno.EINVAL
        async with Pool.open(home, settings=QUIET) as pool:
            assert state(pool.volume("v")) == (b"r", {"a": [(0, EXTENT_BYTES)]})

    run(body)


def test_bad_arguments_change_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", GIB)
            for record, trackers in (
                (bytes(MAX_RECORD_BYTES + 1), {}),
                (b"", {"": extents()}),
                (b"", {"x" * 256: extents()}),
                (b"", {str(i): extents() for i in range(65)}),
            ):
                error = await refusal(lambda r=record, t=trackers: pool.set_mirror(volume, r, t))  # type: ignore[misc]
                assert error.errno == errno.EINVAL
                assert state(volume) == (b"", {})
            await pool.set_mirror(volume, bytes(MAX_RECORD_BYTES), {"x" * 255: extents()})
            await pool.delete_volume("v", mirrored=True)
            assert (await refusal(lambda: pool.set_mirror(volume, b""))).errno == errno.ESTALE

    run(body)


def test_a_volume_with_a_record_is_not_deleted_rolled_back_or_resized_by_itself(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await pool.create_volume("v", GIB)
            await pool.set_mirror(volume, b"r", {"a": extents()})
            await pool.take_snapshots([("v", "s")])
            for done, action in (
                ("deleted", lambda: pool.delete_volume("v", snapshots=True)),
                ("resized", lambda: pool.resize_volume("v", 2 * GIB)),
                ("rolled back", lambda: pool.rollback("v", "s", keep_as=None)),
            ):
                error = await refusal(action)
                assert error.errno == errno.EBUSY
                assert f"p/v is mirrored and can't be {done} by itself" in str(error)
                assert "terrace volume mirror remove p/v NODE" in str(error)
            assert state(volume) == (b"r", {"a": []})
            await pool.resize_volume("v", 2 * GIB, mirrored=True)
            new = await pool.rollback("v", "s", keep_as=None, mirrored=True)
            assert state(new) == (b"", {})
        async with Pool.open(home, settings=QUIET) as pool:
            assert state(pool.volume("v")) == (b"", {})
            await pool.set_mirror(pool.volume("v"), b"again")
            await pool.delete_volume("v", snapshots=True, mirrored=True)
            assert pool.volumes() == []
        async with Pool.open(home, settings=QUIET) as pool:
            await assert_sound(pool)

    run(body)
