"""What clients and operators do while a checkpoint is under way that sorts out snapshots and retired volumes."""

from __future__ import annotations

import contextlib
import copy
import errno
from collections.abc import Awaitable, Callable, Iterable
from types import ModuleType

import pytest
import trio

import tiers.history
import tiers.pool
import tiers.snapshot
from tests.simulation.machine import Disk, Machine, PowerCutError
from tests.simulation.oracle import require_sound
from tests.tiers.helpers import refusal
from tests.tiers.test_snapshots import stamps, write
from tiers import Pool, PoolSettings, TierError, Volume
from tiers.catalog import State, judge_state
from tiers.failpoint import watching
from tiers.flatten import flatten
from tiers.history import exclusive_blocks
from tiers.kept import index_of
from tiers.layout import BLOCK_BYTES, SLOT_BITS
from tiers.lineage import MOST_ORIGINS
from tiers.maptree import FANOUT_BITS, MapTree, Page
from tiers.mover import Mover
from tiers.reader import hole_in
from tiers.record import Kind, Op

BLOCKS = 64
SIZE_BYTES = 512 * BLOCK_BYTES


def life(machine: Machine, body: Callable[[Pool], Awaitable[None]]) -> None:
    """The pool is open while `body` runs; the machine may be stopped in it."""

    async def main() -> None:
        async with machine.open() as pool:
            await body(pool)

    with contextlib.suppress(PowerCutError):
        machine.run(main)


def quiet_machine(seed: int = 3) -> Machine:
    return Machine((Disk("fast", 60), Disk("base", 60)), seed=seed, settings=PoolSettings(checkpoint_interval_s=3600.0))


async def clones_of_a_deleted_volume(pool: Pool, count: int) -> None:
    """Clones c0, c1... of a snapshot that holds the numbers 1 to 64, whose volume is gone."""
    volume = await pool.create_volume("v", SIZE_BYTES)
    for block in range(BLOCKS):
        await write(volume, block, block + 1)
    await pool.take_snapshots([("v", "s")])
    for number in range(count):
        await pool.clone("v", "s", f"c{number}")
    for block in range(BLOCKS // 2):
        await write(volume, block, block + 1001)
    await pool.delete_volume("v", snapshots=True)


def delete_now(pool: Pool, name: str) -> None:
    """`Pool.delete_volume` of a volume without snapshots, up to the flush."""
    volume = pool.volume(name)
    pool._engine.append_record(Op.DELETE, volume.id)
    pool._engine.remove_volume(volume)


async def clean_everything(pool: Pool) -> None:
    """Empty each segment of data, and have the places reused at once."""
    engine = pool._engine
    mover = Mover(engine)
    data = (Kind.LOG, Kind.MOVED, Kind.PACKED)
    victims = [segment for segment in engine.segments.by_id.values() if segment.kind in data and not segment.open]
    for victim in victims:
        await mover.move_segment(victim, "fast")
    await mover.apply_staged()
    mover.seal_all()
    await engine.reuse(victims)


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("clones", [1, 2])
@pytest.mark.parametrize("at", ["frozen", "merged", "flushed"])
def test_a_clone_that_is_deleted_while_its_origin_is_sorted_out_is_there_as_a_whole_or_gone(
    at: str, clones: int, settled: bool, crash: bool
) -> None:
    machine = quiet_machine()

    async def before(pool: Pool) -> None:
        await clones_of_a_deleted_volume(pool, clones)
        if settled:
            for _ in range(4):
                await pool.checkpoint()
        await pool.create_volume("more", SIZE_BYTES)

        def on(name: str) -> None:
            if name == f"checkpoint.{at}" and "c0" in {volume.short_name for volume in pool.volumes()}:
                delete_now(pool, "c0")
            if name == "checkpoint.committed" and crash:
                machine.off()

        with watching(on):
            await pool.checkpoint()
        for _ in range(4):
            await pool.checkpoint()
        await require_sound(pool)
        machine.stop()
        await trio.lowlevel.checkpoint()

    life(machine, before)
    machine.power_cut()
    judge_state(machine.state)

    async def after(pool: Pool) -> None:
        await pool.checkpoint()
        await clean_everything(pool)
        names = {volume.short_name for volume in pool.volumes()} - {"more"}
        assert names | {"c0"} == {f"c{number}" for number in range(clones)} | {"c0"}
        for name in names:
            found = await stamps(pool.volume(name), *range(BLOCKS))
            assert found == list(range(1, BLOCKS + 1))
        await require_sound(pool)

    life(machine, after)


async def leave(pool: Pool, action: Callable[[], Awaitable[object]]) -> None:
    """Have something asked for by somebody who leaves right after the freeze of the checkpoint that does it."""
    with trio.CancelScope() as scope:

        def on(name: str) -> None:
            if name == "checkpoint.frozen":
                scope.cancel()

        with watching(on):
            await action()
    assert scope.cancelled_caught
    assert pool._checkpointer._frozen is not None


def test_the_name_of_a_clone_that_a_checkpoint_is_about_to_make_is_taken() -> None:
    machine = quiet_machine()

    async def before(pool: Pool) -> None:
        await pool.create_volume("v", SIZE_BYTES)
        await pool.take_snapshots([("v", "s")])
        await leave(pool, lambda: pool.clone("v", "s", "c"))
        taken = await refusal(lambda: pool.create_volume("c", SIZE_BYTES))
        assert taken.errno == errno.EEXIST
        await pool.checkpoint()
        assert pool.volume("c").origin is pool.snapshot("v", "s")
        machine.stop()
        await trio.lowlevel.checkpoint()

    life(machine, before)
    machine.kill()
    judge_state(machine.state)

    async def after(pool: Pool) -> None:
        assert [volume.short_name for volume in pool.volumes()] == ["c", "v"]

    life(machine, after)


def test_what_is_deleted_while_a_rollback_is_under_way_is_the_volume_that_comes_of_it() -> None:
    machine = quiet_machine()

    async def main(pool: Pool) -> None:
        await pool.create_volume("v", SIZE_BYTES)
        await pool.take_snapshots([("v", "s")])
        await leave(pool, lambda: pool.rollback("v", "s", keep_as=None))
        await pool.delete_volume("v", snapshots=True)
        assert pool.volumes() == []
        for _ in range(4):
            await pool.checkpoint()
        assert not pool._engine.volumes
        assert not pool._engine.lineage.snapshots
        await require_sound(pool)

    life(machine, main)


def test_a_snapshot_that_is_about_to_be_taken_is_not_deleted_with_a_volume_that_had_none() -> None:
    async def main(pool: Pool) -> None:
        await pool.create_volume("v", SIZE_BYTES)
        await leave(pool, lambda: pool.take_snapshots([("v", "s")]))
        busy = await refusal(lambda: pool.delete_volume("v"))
        assert busy.errno == errno.EBUSY
        assert [snapshot.short_name for snapshot in pool.snapshots("v")] == ["s"]

    life(quiet_machine(), main)


def test_a_snapshot_is_there_although_the_copy_of_its_checkpoint_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(pool: Pool) -> None:
        await pool.create_volume("v", SIZE_BYTES)

        async def refuse() -> None:
            raise TierError(errno.ENOSPC, "no room for a copy")

        with monkeypatch.context() as patched:
            patched.setattr(pool._checkpointer.copies, "write", refuse)
            (taken,) = await pool.take_snapshots([("v", "s")])
        assert pool.snapshots("v") == [taken]

    life(quiet_machine(), main)


def suspend_at(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, tree: MapTree, meanwhile: Callable[[], Awaitable[object]]
) -> None:
    """The first look of `module` for a hole in a tree has to wait for a device, and `meanwhile` things happen."""
    waits = [tree]

    async def slow(other: MapTree, block: int) -> int:
        if waits and other is waits[0]:
            waits.clear()
            await meanwhile()
        return await hole_in(other, block)

    monkeypatch.setattr(module, "hole_in", slow)


async def kept_by_the_second(pool: Pool) -> Volume:
    """Snapshots a, b, c: what a and b show in block 1000 is kept by b; the volume has nothing any more."""
    volume = await pool.create_volume("v", 4096 * BLOCK_BYTES)
    await write(volume, 1000, 7)
    for name in ("a", "b"):
        await pool.take_snapshots([("v", name)])
    await volume.trim(1000 * BLOCK_BYTES, BLOCK_BYTES)
    await pool.take_snapshots([("v", "c")])
    volume.kept = None  # as after a start, until the index is made
    return volume


def test_what_moves_from_one_snapshot_to_another_is_no_hole_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(pool: Pool) -> None:
        await kept_by_the_second(pool)
        tree = pool.snapshot("v", "b").tree
        suspend_at(monkeypatch, tiers.snapshot, tree, lambda: pool.delete_snapshot("v", "b"))
        first = pool.snapshot("v", "a")
        extents = await first.extents(0, first.size_bytes, 64)
        assert (BLOCK_BYTES, 0) in extents
        assert await stamps(first, 1000) == [7]

    life(quiet_machine(), main)


def test_what_moves_from_one_snapshot_to_another_differs_still(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(pool: Pool) -> None:
        await kept_by_the_second(pool)
        tree = pool.snapshot("v", "b").tree
        suspend_at(monkeypatch, tiers.history, tree, lambda: pool.delete_snapshot("v", "b"))
        last = pool.snapshot("v", "c")
        changed = await last.context_extents("terrace:diff:a", 0, last.size_bytes, 64)
        assert (BLOCK_BYTES, 1) in changed

    life(quiet_machine(), main)


def test_what_a_clone_takes_over_from_its_origin_is_no_hole_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(pool: Pool) -> None:
        volume = await kept_by_the_second(pool)
        tree = pool.snapshot("v", "a").tree
        await pool.clone("v", "a", "clone")
        for name in ("a", "c"):
            await pool.delete_snapshot("v", name)
        clone = pool.volume("clone")
        assert clone.origin is not None
        assert clone.origin.tree is tree

        async def meanwhile() -> None:
            await pool.delete_volume("v", snapshots=True)
            for _ in range(4):
                await pool.checkpoint()
            assert clone.origin is None

        await pool.delete_snapshot("v", "b")
        volume.kept = None
        suspend_at(monkeypatch, tiers.snapshot, tree, meanwhile)
        extents = await clone.extents(0, clone.size_bytes, 64)
        assert (BLOCK_BYTES, 0) in extents
        assert await stamps(clone, 1000) == [7]

    life(quiet_machine(), main)


def test_a_snapshot_that_is_being_compared_is_not_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(pool: Pool) -> None:
        await kept_by_the_second(pool)
        tree = pool.snapshot("v", "b").tree
        refused: list[TierError] = []

        async def meanwhile() -> None:
            refused.append(await refusal(lambda: pool.delete_snapshot("v", "a")))

        suspend_at(monkeypatch, tiers.history, tree, meanwhile)
        last = pool.snapshot("v", "c")
        changed = await last.context_extents("terrace:diff:a", 0, last.size_bytes, 64)
        assert (BLOCK_BYTES, 1) in changed
        assert refused[0].errno == errno.EBUSY
        await pool.delete_snapshot("v", "a")

    life(quiet_machine(), main)


async def give_back(pool: Pool, volume: Volume, name: str) -> None:
    """Delete a snapshot, and have its map pages given back."""
    await pool.delete_snapshot(volume.short_name, name)
    pool._checkpointer.writer.seal()
    await write(volume, 0, 1)
    for _ in range(3):
        await pool.checkpoint()
    for segment in [s for s in pool._engine.segments.by_id.values() if s.kind is Kind.MAP and not s.open]:
        await pool._cleaner._force_pages(segment)
    for _ in range(3):
        await pool.checkpoint()


def test_a_page_that_was_given_back_while_others_were_looked_for_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(pool: Pool) -> None:
        volume = await kept_by_the_second(pool)
        first, second = pool.snapshot("v", "a"), pool.snapshot("v", "b")
        for tree in (volume.tree, first.tree, second.tree):
            tree.forget()
        load = MapTree.load
        waits = [second.tree]

        async def slow(tree: MapTree, level: int, indices: Iterable[int]) -> dict[int, Page]:
            found = await load(tree, level, indices)
            if waits and tree is waits[0] and level == 1:
                waits.clear()
                where = second.tree.entry_of_page_now(0, 1000 >> FANOUT_BITS)
                assert where is not None
                await give_back(pool, volume, "b")
                assert where[0] >> SLOT_BITS not in pool._engine.segments.by_id
            return found

        monkeypatch.setattr(MapTree, "load", slow)
        assert await stamps(first, 1000) == [7]

    life(quiet_machine(), main)


@pytest.mark.parametrize("asked", ["the index", "the sizes"])
def test_a_snapshot_whose_pages_are_given_back_while_they_are_read_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    async def main(pool: Pool) -> None:
        volume = await kept_by_the_second(pool)
        await write(volume, 1000, 8)
        for name in ("a", "c"):
            await pool.delete_snapshot("v", name)
        second = pool.snapshot("v", "b")
        assert volume.snapshots[0] is second
        for number in (9, 10):  # the last one keeps a block, too
            await pool.checkpoint()
            await write(volume, 1001, number)
            if number == 9:
                await pool.take_snapshots([("v", "d")])
        await pool.checkpoint()
        second.tree.forget()
        load = MapTree.load
        waits = [second.tree]

        async def slow(tree: MapTree, level: int, indices: Iterable[int]) -> dict[int, Page]:
            if waits and tree is waits[0]:
                waits.clear()
                await give_back(pool, volume, "b")
                assert second.gone
            return await load(tree, level, indices)

        monkeypatch.setattr(MapTree, "load", slow)
        if asked == "the index":
            await index_of(volume)
            assert volume.kept is not None
        else:
            last = pool.snapshot("v", "d")
            assert await exclusive_blocks(last) == last.tree.mapped_blocks == 1
        assert second.gone

    life(quiet_machine(), main)


def test_a_clone_of_a_clone_and_so_on_is_refused_before_it_is_too_deep_to_be_read() -> None:
    async def main(pool: Pool) -> None:
        volume = await pool.create_volume("v", SIZE_BYTES)
        await write(volume, 300, 7)
        for number in range(MOST_ORIGINS):
            await pool.take_snapshots([("v", f"s{number}")])
            await pool.rollback("v", f"s{number}", keep_as=None)
        await pool.take_snapshots([("v", "last")])
        for refused in (lambda: pool.rollback("v", "last", keep_as=None), lambda: pool.clone("v", "last", "c")):
            assert (await refusal(refused)).errno == errno.EMLINK
        for reader in (pool.volume("v"), pool.snapshot("v", "last")):
            assert await stamps(reader, 300) == [7]
            assert (BLOCK_BYTES, 0) in await reader.extents(0, SIZE_BYTES, 10)
        changed = await pool.snapshot("v", "last").context_extents("terrace:diff:s0", 0, SIZE_BYTES, 10)
        assert changed == [(SIZE_BYTES, 0)]
        machine.stop()
        await trio.lowlevel.checkpoint()

    machine = quiet_machine()
    life(machine, main)
    machine.kill()

    async def again(pool: Pool) -> None:
        assert await stamps(pool.volume("v"), 300) == [7]

    life(machine, again)


def test_a_clone_is_made_independent_while_a_checkpoint_makes_it_an_heir(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(pool: Pool) -> None:
        ground = await pool.create_volume("ground", SIZE_BYTES)
        for block in range(BLOCKS):
            await write(ground, block, block + 1)
        await pool.take_snapshots([("ground", "g")])
        middle = await pool.clone("ground", "g", "middle")
        await write(middle, 0, 1001)
        await pool.take_snapshots([("middle", "m")])
        clone = await pool.clone("middle", "m", "clone")

        async def flattened(volume: Volume, progress: Callable[[int], None]) -> None:
            await flatten(volume, progress)
            # What the next freeze finds is what the deletion has left by then.
            monkeypatch.undo()
            await pool.delete_volume("middle", snapshots=True)

        monkeypatch.setattr(tiers.pool, "flatten", flattened)
        await pool.promote("clone")
        assert clone.origin is None
        for _number in range(4):
            await pool.checkpoint()
        assert clone.origin is None
        assert await stamps(clone, *range(BLOCKS)) == [1001, *range(2, BLOCKS + 1)]
        await pool.delete_volume("ground", snapshots=True)
        for _number in range(4):
            await pool.checkpoint()
        assert list(pool._engine.volumes.values()) == [clone]
        assert not pool._engine.lineage.snapshots
        await require_sound(pool)

    life(quiet_machine(), main)


def test_a_deletion_is_replayed_over_an_older_copy_in_which_the_volume_has_snapshots() -> None:
    machine = quiet_machine()
    older: list[State] = []

    async def before(pool: Pool) -> None:
        volume = await pool.create_volume("v", SIZE_BYTES)
        await write(volume, 1, 1)
        await pool.take_snapshots([("v", "s")])
        await write(volume, 1, 2)
        await pool.checkpoint()
        older.append(copy.deepcopy(machine.state))

        async def deleted_before_the_copy_is_durable() -> None:
            delete_now(pool, "v")
            await pool._engine.flusher.flush()
            machine.off()

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(pool._checkpointer.copies, "write", deleted_before_the_copy_is_durable)
            await pool.delete_snapshot("v", "s")

    life(machine, before)
    machine.kill()
    (machine.state,) = older

    async def after(pool: Pool) -> None:
        assert pool.volumes() == []
        await pool.create_volume("v", SIZE_BYTES)
        judge_state(machine.state)
        for _number in range(4):
            await pool.checkpoint()
        assert len(pool._engine.volumes) == 1
        assert not pool._engine.lineage.snapshots
        assert pool._engine.segments.live == 0
        await require_sound(pool)

    life(machine, after)
    judge_state(machine.state)


def test_a_volume_that_goes_with_its_snapshots_leaves_no_heat() -> None:
    async def main(pool: Pool) -> None:
        volume = await pool.create_volume("v", SIZE_BYTES)
        await write(volume, 1, 1)
        await pool.take_snapshots([("v", "s")])
        await pool.recorder.drain()
        assert pool._engine.heat.extents.volumes() == {volume.id}
        await pool.delete_volume("v", snapshots=True)
        await pool.checkpoint()
        assert pool._engine.heat.extents.volumes() == set()

    life(quiet_machine(), main)
