"""The mark of a volume that is being filled: a volume without it holds all that it was filled with, after any crash."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import sys
from pathlib import Path
from unittest import mock

import pytest
import trio

from tests.simulation.machine import Disk, Machine, PowerCutError
from tests.simulation.mutants import _instead
from tests.simulation.oracle import BLOCK, read_all, require_sound
from tests.tiers.helpers import QUIET, assert_sound, fresh_pool, make_pool, refusal, run
from tests.tiers.test_rebuild_simulated import lose_catalog
from tiers import Pool, PoolSettings, rebuild_catalog
from tiers.layout import MIB

REPOSITORY = Path(__file__).parents[2]
BLOCKS = 24
OPERATIONS = range(1, 160, 6)
FAILPOINTS = ("create.logged", "create.durable", "filling.logged", "filling.durable", "checkpoint.committed")
IMAGE = random.Random(5).randbytes(BLOCKS * BLOCK)


def marks(pool: Pool) -> dict[str, bool]:
    return {status.name.partition("/")[2]: status.filling for status in pool.status().volumes}


def test_the_mark_survives_closing_killing_and_the_loss_of_the_catalog(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys, trio
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
from tests.tiers.helpers import QUIET
from tiers import Pool
async def main():
    async with Pool.open(Path(sys.argv[1]), settings=QUIET) as pool:
        await pool.set_filling("ended", False)
        await pool.set_filling("began", True)
        await pool.create_volume("new", 4096, filling=True)
        await pool.create_volume("whole", 4096)
        os.kill(os.getpid(), signal.SIGKILL)
trio.run(main)
"""

    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            await pool.create_volume("ended", MIB, filling=True)
            await pool.create_volume("began", MIB)
            await pool.create_volume("going", MIB, filling=True)
        async with Pool.open(home, settings=QUIET) as pool:
            assert marks(pool) == {"began": False, "ended": True, "going": True}
        killed = await trio.run_process([sys.executable, "-c", script, str(home)], check=False, capture_stderr=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        expected = {"began": True, "ended": False, "going": True, "new": True, "whole": False}
        async with Pool.open(home, settings=QUIET) as pool:
            assert marks(pool) == expected
            await assert_sound(pool)
        for file in home.glob("catalog*"):
            file.unlink()
        await rebuild_catalog(home, "p", [tmp_path / "fast.img"], force=False)
        async with Pool.open(home, settings=QUIET) as pool:
            assert marks(pool) == expected
            await assert_sound(pool)

    run(body)


def filled_and_crashed(crash: int | tuple[str, int], seed: int, *, loses_catalog: bool) -> bool:
    """Fill a volume, with a crash at that operation of a device, or failpoint. Returns whether it came so far.

    Fails if the volume that is there afterwards passes for complete and isn't, or the other way round.
    """
    machine = Machine(
        (Disk("fast", 24, 64 << 10), Disk("base", 40, 64 << 10)),
        seed=seed,
        settings=PoolSettings(checkpoint_interval_s=0.01, checkpoint_log_bytes=64 << 10),
    )
    said = {"complete": False}

    async def main() -> None:
        async with machine.open() as pool:
            await pool.create_volume("other", BLOCK)
        machine.arm((crash, None, None) if isinstance(crash, int) else (None, None, crash))
        with contextlib.suppress(PowerCutError):
            async with machine.open() as pool:
                volume = await pool.create_volume("v", len(IMAGE), filling=True)
                for at in machine.rng.sample(range(0, len(IMAGE), BLOCK), BLOCKS):
                    await volume.write(at, IMAGE[at : at + BLOCK])
                    if at % (8 * BLOCK) == 0:
                        await pool.checkpoint()
                await pool.set_filling("v", False)
                said["complete"] = True
                await pool.checkpoint()
        machine.disarm()
        crashed = machine.is_off
        if seed % 3:
            machine.power_cut()
        else:
            machine.kill()
        if loses_catalog:
            await lose_catalog(machine)
        async with machine.open() as pool:
            found = pool._engine.volume_named("v")
            if found is not None and not found.filling:
                assert await read_all(found) == IMAGE, "half of it passes for the whole"
            if said["complete"]:
                assert found is not None and not found.filling, "it was said to be complete, and isn't any more"
            await require_sound(pool)
        said["crashed"] = crashed

    machine.run(main)
    return said["crashed"]


@pytest.mark.parametrize("loses_catalog", [False, True])
def test_a_crash_at_any_moment_leaves_a_mark_or_the_whole(loses_catalog: bool) -> None:
    crashes = [filled_and_crashed(at, seed=at, loses_catalog=loses_catalog) for at in OPERATIONS]
    assert crashes.count(True) > len(OPERATIONS) // 2, "most of them came"
    for name in FAILPOINTS:
        assert filled_and_crashed((name, 0), seed=1, loses_catalog=loses_catalog), name


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("create_volume", "ops += (Op.FILLING << 56 | volume_id, 1, 0)", "pass"),
        ("set_filling", "await engine.flusher.flush()", "await trio.lowlevel.checkpoint()"),
    ],
)
def test_the_crashes_find_an_engine_that_forgets_the_mark_or_says_too_early_that_it_is_gone(
    name: str, old: str, new: str
) -> None:
    with _instead(Pool, name, old, new)(), pytest.raises(AssertionError):
        for seed, crash in enumerate([*OPERATIONS, *((name, 0) for name in FAILPOINTS * 5)]):
            filled_and_crashed(crash, seed, loses_catalog=False)


def test_a_checkpoint_commits_the_mark_as_it_was_at_its_freeze(tmp_path: Path) -> None:
    """What is said while it runs is in the log behind it: if that is lost, so is what was written before it."""

    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            await pool.create_volume("v", MIB, filling=True)
            committed: list[list[bool]] = []
            honest = pool._engine.catalog.commit

            def commit(change: object) -> None:
                committed.append([row.filling for row in change.volumes])  # type: ignore[attr-defined]
                honest(change)  # type: ignore[arg-type]

            volume = pool.volume("v")
            builder = pool._checkpointer._volume_rows

            def rows(*arguments: object) -> object:
                volume.filling = False  # as set_filling does behind the freeze
                return builder(*arguments)  # type: ignore[arg-type]

            with (
                mock.patch.object(pool._engine.catalog, "commit", commit),
                mock.patch.object(pool._checkpointer, "_volume_rows", rows),
            ):
                await pool.checkpoint()
                await pool.checkpoint()
            assert committed[:2] == [[True], [False]]

    run(body)


def test_every_snapshot_is_of_something_whole(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await pool.create_volume("v", MIB, filling=True)
            await pool.create_volume("other", MIB)
            error = await refusal(lambda: pool.take_snapshots([("other", "s"), ("v", "s")]))
            assert error.errno == errno.EBUSY
            assert "p/v is being filled" in str(error) and "terrace volume show p/v" in str(error)
            assert pool.snapshots() == [], "all or nothing"
            await volume.write(0, b"a" * BLOCK)
            await pool.take_snapshots([("v", "whole")], by_filler=True)
            await volume.write(0, b"b" * BLOCK)
            assert (await refusal(lambda: pool.rollback("v", "whole", keep_as="half"))).errno == errno.EBUSY
            assert marks(pool) == {"v": True, "other": False}
            assert not (await pool.clone("v", "whole", "clone")).filling
            assert not (await pool.rollback("v", "whole", keep_as=None)).filling
        async with Pool.open(home, settings=QUIET) as pool:
            assert marks(pool) == {"v": False, "other": False, "clone": False}
            for name in ("v", "clone"):
                assert (await read_all(pool.volume(name)))[:BLOCK] == b"a" * BLOCK
            await pool.take_snapshots([("v", "s"), ("clone", "s")])
            await assert_sound(pool)

    run(body)


def test_a_mark_can_be_set_and_taken_off_a_volume_that_is_there_and_in_a_pool_that_is_full(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=40) as pool:
            assert (await refusal(lambda: pool.set_filling("v", True))).errno == errno.ENOENT
            volume = await pool.create_volume("v", 100 * MIB, filling=True)
            data = os.urandom(MIB)
            with pytest.raises(OSError, match="is full"):
                for at in range(100):
                    await volume.write(at * MIB, data)
            for filling in (False, True, False):
                await pool.set_filling("v", filling)
                assert marks(pool) == {"v": filling}
            before = pool.status().log_seq
            await pool.set_filling("v", False)
            assert pool.status().log_seq == before, "what is so already takes no record"

    run(body)
