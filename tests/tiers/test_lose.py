"""`Volume.lose`: a block that is EIO for its readers until it is written, while what snapshots have of it stays."""

from __future__ import annotations

import errno
import random
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import cast
from unittest import mock

import pytest

from tests.simulation.machine import Disk, Machine
from tests.tiers.helpers import QUIET, block, fresh_pool, read, refusal, run
from tiers import Pool, Volume
from tiers.changes import EXTENT_BYTES, ChangedExtents
from tiers.check import _Walk
from tiers.extents import LOST_CHECK
from tiers.layout import BAD, BLOCK_BYTES, MIB
from tiers.losses import Losses
from tiers.snapshot import Snapshot


async def found(volume: Volume | Snapshot, at: int) -> bytes | None:
    """A block, by its number; None if it can't be read."""
    try:
        return await read(volume, at * BLOCK_BYTES, BLOCK_BYTES)
    except OSError as error:
        assert error.errno == errno.EIO
        return None


@pytest.mark.parametrize("writes_out", [False, True])
def test_a_lost_block_is_an_error_until_it_is_written_and_snapshots_and_clones_keep_theirs(
    tmp_path: Path, writes_out: bool
) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:

            async def settled() -> None:
                if writes_out:
                    await pool.checkpoint()

            volume = await pool.create_volume("v", 16 * MIB)
            await volume.write(0, b"".join(map(block, range(8))))
            (snapshot,) = await pool.take_snapshots([("v", "s")])
            await pool.set_mirror(volume, b"", {"recent": ChangedExtents()})
            await settled()
            await volume.lose(BLOCK_BYTES, 2 * BLOCK_BYTES)
            await volume.lose(MIB, BLOCK_BYTES)  # a hole
            assert list(volume.trackers["recent"].runs()) == [(0, EXTENT_BYTES), (MIB, EXTENT_BYTES)]
            await settled()
            for at, wanted in enumerate([block(0), None, None, block(3)]):
                assert await found(volume, at) == wanted
                assert await found(snapshot, at) == block(at)
            assert await found(volume, 256) is None and await found(volume, 257) == bytes(BLOCK_BYTES)
            checks = memoryview(await volume.checks(0, 4 * BLOCK_BYTES)).cast("Q").tolist()
            assert checks[1:3] == [LOST_CHECK] * 2 and LOST_CHECK not in (checks[0], checks[3])
            assert [(loss.volume, loss.offset, loss.length) for loss in await pool.losses()] == [
                ("p/v", BLOCK_BYTES, 2 * BLOCK_BYTES), ("p/v", MIB, BLOCK_BYTES),
            ]  # fmt: skip
            (later,) = await pool.take_snapshots([("v", "later")])
            await settled()
            await volume.write(BLOCK_BYTES, block(70))
            await volume.trim(2 * BLOCK_BYTES, BLOCK_BYTES)
            await settled()
            assert await found(volume, 1) == block(70) and await found(volume, 2) == bytes(BLOCK_BYTES)
            assert await found(later, 1) is None and await found(later, 2) is None
            assert await found(snapshot, 1) == block(1)

    run(body)


def test_a_loss_of_a_mirrors_leg_isnt_laid_on_a_device_for_certain_nor_that_of_its_snapshots_and_clones(
    tmp_path: Path,
) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            leg = await pool.create_volume("leg", MIB)
            plain = await pool.create_volume("plain", MIB)
            await pool.set_mirror(leg, b"a leg's record", {})
            for volume in (leg, plain):
                await volume.write(0, b"".join(map(block, range(8))))
                await volume.lose(BLOCK_BYTES, 2 * BLOCK_BYTES)
            await pool.take_snapshots([("leg", "s")])
            clone = await pool.clone("leg", "s", "clone")
            either = ": a device had an error, or no leg of a mirror could read "
            for reader in (leg, pool.snapshot("leg", "s"), clone):
                error = await refusal(partial(read, reader, BLOCK_BYTES, BLOCK_BYTES))
                assert str(error) == f"{reader.name} at byte {BLOCK_BYTES}: the block is lost{either}it"
            error = await refusal(lambda: read(plain, BLOCK_BYTES, BLOCK_BYTES))
            assert str(error) == f"p/plain at byte {BLOCK_BYTES}: the block was lost to a device error"
            await pool.checkpoint()
            assert pool.lost_blocks() == {"p/leg": 2, "p/plain": 2}
            assert sorted((await pool.check(True)).problems) == [
                f"p/leg at byte {BLOCK_BYTES}: 2 blocks are lost{either}them",
                f"p/plain at byte {BLOCK_BYTES}: 2 blocks were lost to a device error",
            ]

    run(body)


def live_on(
    machine: Machine, work: Callable[[Pool, Volume], Awaitable[None]], end: Callable[[], object], times: int
) -> None:
    """A process makes the volume and works, and so does one after each end."""

    async def first() -> None:
        async with machine.open() as pool:
            await work(pool, await pool.create_volume("v", 4 * MIB))

    async def again() -> None:
        async with machine.open() as pool:
            await work(pool, pool.volume("v"))

    machine.run(first)
    for _ in range(times):
        end()
        machine.run(again)


def life(seed: int) -> int:
    """Writes, trims, losses, snapshots and checkpoints, and between them the process dies; how many losses survived."""
    machine = Machine((Disk("fast", 96),), seed=seed, settings=QUIET)
    rng = random.Random(seed)
    now: dict[int, bytes | None] = {}
    kept: list[tuple[str, dict[int, bytes | None]]] = []
    survived = 0

    async def work(pool: Pool, volume: Volume) -> None:
        nonlocal survived
        for name, blocks in [("", now), *kept]:
            holder = volume if not name else pool.snapshot("v", name)
            for at in range(16):
                wanted = blocks.get(at, bytes(BLOCK_BYTES))
                assert await found(holder, at) == wanted, (seed, name, at)
                survived += wanted is None
        for step in range(rng.randrange(30)):
            what, at = rng.choice(("write", "write", "lose", "trim", "checkpoint", "snapshot")), rng.randrange(16)
            if what == "write":
                now[at] = data = block(seed * 1000 + step)
                await volume.write(at * BLOCK_BYTES, data)
            elif what == "lose":
                await volume.lose(at * BLOCK_BYTES, BLOCK_BYTES)
                now[at] = None
            elif what == "trim":
                await volume.trim(at * BLOCK_BYTES, BLOCK_BYTES)
                now.pop(at, None)
            elif what == "checkpoint":
                await pool.checkpoint()
            elif len(kept) < 4:
                kept.append((f"s{len(kept)}", dict(now)))
                await pool.take_snapshots([("v", kept[-1][0])])
        machine.off()

    live_on(machine, work, machine.kill, 4)
    return survived


def test_what_was_lost_is_lost_after_a_kill_too_and_only_that() -> None:
    assert sum(life(seed) for seed in range(20)) > 100


def powerless_life(seed: int) -> int:
    """Blocks are written and lost, and the power is cut somewhere; how often one was found lost afterwards."""
    machine = Machine((Disk("fast", 96),), seed=seed, settings=QUIET)
    rng = random.Random(seed)
    since: dict[int, list[bytes | None]] = {at: [bytes(BLOCK_BYTES)] for at in range(8)}
    """What a block may hold: what it held when it was flushed last, and all that it was since."""
    found_lost = 0

    async def work(pool: Pool, volume: Volume) -> None:
        nonlocal found_lost
        for at, may in since.items():
            now = await found(volume, at)
            assert now in may, (seed, at, now and now[:8], [one and one[:8] for one in may])
            found_lost += now is None
            since[at] = [now]
        await volume.flush()
        machine.countdown = rng.randrange(1, 60)
        for step in range(60):
            at = rng.randrange(8)
            what = rng.choice(("write", "lose", "lose", "flush", "checkpoint", "snapshot"))
            if what == "write":
                since[at].append(block(seed * 1000 + step))
                await volume.write(at * BLOCK_BYTES, block(seed * 1000 + step))
            elif what == "lose":
                since[at].append(None)
                await volume.lose(at * BLOCK_BYTES, BLOCK_BYTES)
            elif what == "flush":
                flushed = {one: may[-1:] for one, may in since.items()}
                await volume.flush()
                since.update(flushed)
            elif what == "checkpoint":
                await pool.checkpoint()
            elif len(volume.snapshots) < 3:
                await pool.take_snapshots([("v", f"s{rng.random()}")])
        machine.off()

    live_on(machine, work, machine.power_cut, 5)
    return found_lost


def test_a_power_cut_leaves_a_block_lost_or_what_it_was_and_never_what_stood_in_for_it() -> None:
    assert sum(powerless_life(seed) for seed in range(30)) > 50


def listed_after_a_kill(directory: Path, *, checkpoints: bool) -> list[int]:
    """Blocks are lost, and the process dies before anybody has asked for the list; what is on it in the next life."""
    machine = Machine((Disk("fast", 96),), seed=1, settings=QUIET)
    found: list[int] = []

    async def first() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 4 * MIB)
            await volume.lose(0, BLOCK_BYTES)
            await pool.losses()  # which saves it
            await volume.lose(3 * BLOCK_BYTES, 2 * BLOCK_BYTES)
            if checkpoints:
                await pool.checkpoint()
            machine.off()

    async def again() -> None:
        async with machine.open() as pool:
            found.extend(loss.offset // BLOCK_BYTES for loss in await pool.losses())

    honest = Losses.save

    def save(place: Path, text: bytes) -> None:
        if not machine.is_off:  # a pool that closes saves the list, and a process that is killed doesn't close it
            honest(place, text)

    with (
        mock.patch("tiers.losses.FILE_NAME", str(directory / "losses.json")),
        mock.patch.object(Losses, "save", staticmethod(save)),
    ):
        machine.run(first)
        machine.kill()
        machine.run(again)
    return found


@pytest.mark.parametrize("checkpoints", [False, True])
def test_what_is_lost_is_on_the_list_after_a_kill_too(tmp_path: Path, checkpoints: bool) -> None:
    assert listed_after_a_kill(tmp_path, checkpoints=checkpoints) == [0, 3]


def test_what_is_lost_during_a_check_stays_on_the_list(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 16 * MIB)
            await volume.lose(0, BLOCK_BYTES)
            honest = _Walk.run

            async def run_and_lose(walk: _Walk, *, may_give_way: bool) -> None:
                await honest(walk, may_give_way=may_give_way)
                await volume.lose(7 * BLOCK_BYTES, BLOCK_BYTES)

            with mock.patch.object(_Walk, "run", run_and_lose):
                await pool.check(full=True)
            assert [loss.offset // BLOCK_BYTES for loss in await pool.losses()] == [0, 7]
            await volume.trim(0, 8 * BLOCK_BYTES)
            await pool.check(full=True)
            assert pool.status().losses == []

    run(body)


def test_what_is_lost_while_the_list_is_asked_of_the_map_stays_on_the_list() -> None:
    losses = Losses()
    losses.add(1, 0)

    class Asked:
        id, name, size_bytes = 1, "p/v", MIB

        async def entries(self, block: int, count: int) -> tuple[list[int], list[int]]:
            losses.add(1, 7)
            return [BAD] * count, [0] * count

    async def body() -> None:
        await losses.refresh([cast(Volume, Asked())])
        assert [loss.offset for loss in losses.listed([cast(Volume, Asked())])] == [0, 7 * BLOCK_BYTES]

    run(body)


def test_what_is_behind_the_end_is_not_lost_there(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 16 * MIB)
            await pool.resize_volume("v", 8 * MIB)
            await volume.lose(8 * MIB - BLOCK_BYTES, 3 * BLOCK_BYTES)
            await pool.resize_volume("v", 16 * MIB)
            assert await found(volume, (8 * MIB >> 12) - 1) is None
            assert await found(volume, 8 * MIB >> 12) == bytes(BLOCK_BYTES)

    run(body)
