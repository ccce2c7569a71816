"""Rules 1 to 6 of the design: what the log, flushes, failed syncs, damage and labels must do, a test or more each."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import trio

from tests.simulation.machine import Disk, Machine, SimDevice
from tests.simulation.medium import Medium
from tests.simulation.oracle import BLOCK, read_all, require_sound
from tiers import Pool, PoolSettings, TierError, Volume
from tiers.layout import LABEL_AREA_BYTES
from tiers.record import Batch, Kind, Op, decode_batch, decode_segment_header, peek_header_slots

VOLUME_BYTES = 64 * BLOCK
QUIET = PoolSettings(checkpoint_interval_s=1e6, overlay_entries=4096)


def block(number: int) -> bytes:
    return bytes([number]) * BLOCK


def machine_of(*disks: Disk, seed: int = 1) -> Machine:
    return Machine(disks or (Disk("fast", 48),), seed=seed, settings=QUIET)


@contextlib.asynccontextmanager
async def opened(machine: Machine, *, truncate_log: bool = False) -> AsyncIterator[tuple[Pool, Volume]]:
    async with machine.open(truncate_log=truncate_log) as pool:
        if not pool.volumes():
            await pool.create_volume("v", VOLUME_BYTES)
        yield pool, pool.volume("v")


def put(volume: Volume, at: int, data: bytes) -> None:
    assert volume.write_now([(at * BLOCK, data)])


async def get(volume: Volume, at: int) -> int:
    """The byte that fills block `at`."""
    into = bytearray(BLOCK)
    await volume.read(at * BLOCK, BLOCK, memoryview(into))
    assert into == block(into[0])
    return into[0]


async def crash(machine: Machine) -> None:
    machine.stop()
    await trio.lowlevel.checkpoint()


def batches(machine: Machine) -> list[tuple[Medium, int, Batch]]:
    """Every log batch on the media, with the offset of its header, in the order of the sequence."""
    found = []
    for medium in machine.media:
        row = machine.state.devices[machine.media.index(medium)]
        for start in range(LABEL_AREA_BYTES, medium.size, row.segment_bytes):
            try:
                header = decode_segment_header(medium.cache[start : start + BLOCK], machine.state.pool_uuid)
            except Exception:
                continue
            if header.kind is not Kind.LOG:
                continue
            for slot in range(1, row.segment_bytes // BLOCK):
                at = start + slot * BLOCK
                slots = peek_header_slots(medium.cache[at : at + BLOCK])
                if slots:
                    with contextlib.suppress(Exception):
                        raw = medium.cache[at : at + slots * BLOCK]
                        found.append((medium, at, decode_batch(raw, machine.state.pool_uuid, header.segment_id, slot)))
    return sorted(found, key=lambda item: item[2].seq)


def writes_of(machine: Machine) -> list[tuple[Medium, int, Batch]]:
    return [item for item in batches(machine) if any(op[0] is Op.WRITE for op in item[2].operations())]


# -- rule 1 ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_commits_only_when_no_device_has_anything_unsynced() -> None:
    machine = machine_of(Disk("fast", 24), Disk("base", 24))

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            for round_ in range(3):
                for i in range(40):
                    put(volume, i, block(1 + (i + round_) % 250))
                dirty: list[int] = []

                def on_step(kind: str, dirty: list[int] = dirty) -> None:
                    if kind == "commit":
                        dirty.append(sum(len(medium.unsynced) for medium in machine.media))

                machine.on_step = on_step
                await pool.checkpoint()
                machine.on_step = lambda kind: None
                assert dirty == [0]

    machine.run(main)


def test_recovery_syncs_every_device_before_it_reads_and_commits_before_it_serves() -> None:
    machine = machine_of(Disk("fast", 24), Disk("base", 24))
    events: list[str] = []

    async def main() -> None:
        async with opened(machine) as (_, volume):
            put(volume, 1, block(1))
            await crash(machine)
        machine.kill()
        machine.on_step = events.append
        async with opened(machine):
            machine.on_step = lambda kind: None
            assert events[:2] == ["sync", "sync"]
            assert "commit" in events
            assert not any(medium.unsynced for medium in machine.media) or events[-1] != "commit"

    machine.run(main)


def test_an_old_batch_that_survived_where_its_predecessor_was_lost_never_comes_back() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (_, volume):
            put(volume, 0, block(1))
            await volume.flush()
            put(volume, 1, block(2))
            put(volume, 2, block(3))
            await crash(machine)
        # The medium got the second of the two unsynced batches, and not the first.
        (medium,) = machine.media
        lost, kept = medium.unsynced[-2:]
        medium.unsynced[:] = [kept]
        medium.make_durable(1)
        medium.cache[lost[0] : lost[0] + len(lost[1])] = medium.durable[lost[0] : lost[0] + len(lost[1])]
        machine.kill()
        for life in range(3):
            async with opened(machine) as (pool, volume):
                assert [await get(volume, i) for i in range(3)] == [1, 0, 0]
                # One batch of the size of the lost one: whoever appends at the old place would make the chain whole.
                put(volume, 5 + life, block(9))
                await require_sound(pool)
                await crash(machine)
            machine.kill()
        async with opened(machine) as (_, volume):
            assert [await get(volume, i) for i in range(8)] == [1, 0, 0, 0, 0, 9, 9, 9]

    machine.run(main)


def test_every_life_has_a_new_incarnation_and_appends_to_a_fresh_segment() -> None:
    machine = machine_of()

    async def main() -> None:
        seen: set[int] = set()
        incarnations = []
        for _ in range(4):
            async with opened(machine) as (pool, volume):
                head = pool._engine.log.head
                assert head.id not in seen and head.used <= 2
                seen.update(pool._engine.segments.by_id)
                incarnations.append(pool._engine.log.incarnation)
                put(volume, 0, block(1))
                await crash(machine)
            machine.power_cut()
        assert incarnations == sorted(set(incarnations))

    machine.run(main)


# -- rule 2 ------------------------------------------------------------------------------------------------------------


def test_a_flush_that_arrives_during_a_sync_is_answered_by_the_next_one() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (_, volume):
            (medium,) = machine.media
            await volume.flush()
            begun, gate = trio.Event(), trio.Event()

            async def hold() -> None:
                medium.before_sync = None
                begun.set()
                await gate.wait()

            medium.before_sync = hold
            done: list[str] = []

            async def flush(name: str) -> None:
                await volume.flush()
                done.append(f"{name} {medium.sync_count}")

            put(volume, 0, block(1))
            before = medium.sync_count
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flush, "first")
                await begun.wait()
                put(volume, 1, block(2))
                nursery.start_soon(flush, "second")
                await trio.testing.wait_all_tasks_blocked()
                assert done == []
                gate.set()
            assert done == [f"first {before + 1}", f"second {before + 2}"]
            await crash(machine)
        machine.power_cut()
        async with opened(machine) as (_, volume):
            assert [await get(volume, 0), await get(volume, 1)] == [1, 2]

    machine.run(main)


def test_a_flush_without_new_writes_still_waits_for_a_sync_that_is_running() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (_, volume):
            (medium,) = machine.media
            begun, gate = trio.Event(), trio.Event()

            async def hold() -> None:
                begun.set()
                await gate.wait()

            put(volume, 0, block(1))
            medium.before_sync = hold
            async with trio.open_nursery() as nursery:
                nursery.start_soon(volume.flush)
                await begun.wait()
                with trio.move_on_after(1) as patience:
                    await volume.flush()
                assert patience.cancelled_caught
                medium.before_sync = None
                gate.set()

    machine.run(main)


def test_a_flush_syncs_every_device_that_the_log_has_touched() -> None:
    machine = machine_of(Disk("fast", 16, 64 << 10), Disk("fast", 16, 64 << 10))

    async def main() -> None:
        async with opened(machine) as (_, volume):
            for i in range(60):
                put(volume, i % 64, block(1 + i))
            assert all(medium.unsynced for medium in machine.media)
            await volume.flush()
            assert not any(medium.unsynced for medium in machine.media)

    machine.run(main)


# -- rule 3 ------------------------------------------------------------------------------------------------------------


def test_a_failed_sync_poisons_the_device_whatever_a_later_sync_says() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            put(volume, 0, block(1))
            await volume.flush()
            put(volume, 1, block(2))
            machine.media[0].failing_syncs = 1
            for _ in range(3):
                with pytest.raises(OSError) as caught:
                    await volume.flush()
                assert caught.value.errno == errno.EIO
            assert not volume.write_now([(0, block(3))])
            with pytest.raises(OSError) as refused:
                await volume.write(0, block(3))
            assert refused.value.errno == errno.EROFS
            assert pool.status().state == "read-only"
            assert await get(volume, 0) == 1

    machine.run(main)


@pytest.mark.parametrize("disks", [(Disk("fast", 48),), (Disk("fast", 24), Disk("base", 24))], ids=["one", "two"])
@pytest.mark.parametrize("power", [True, False], ids=["power cut", "kill"])
def test_a_restart_does_not_lift_the_poison(disks: tuple[Disk, ...], power: bool) -> None:
    machine = machine_of(*disks)

    async def main() -> None:
        async with opened(machine) as (_, volume):
            put(volume, 0, block(1))
            await volume.flush()
            machine.media[0].failing_syncs = 1
            put(volume, 1, block(2))
            with pytest.raises(OSError, match="poisoned"):
                await volume.flush()
            await crash(machine)
        for _ in range(2):
            if power:
                machine.power_cut()
            else:
                machine.kill()
            async with opened(machine) as (pool, volume):
                assert pool.status().state == "read-only"
                assert pool.status().devices[0].state == "poisoned"
                assert await get(volume, 0) == 1
                with pytest.raises(OSError):
                    await volume.write(0, block(3))

    machine.run(main)


def test_replay_believes_the_medium_and_not_the_page_cache() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (_, volume):
            put(volume, 0, block(1))
            await volume.flush()
            put(volume, 1, block(2))
            # A sync failed that the engine never heard of: the cache shows the batch, the medium hasn't got it.
            medium = machine.media[0]
            medium.drop_dirty(len(medium.unsynced))
            await crash(machine)
        machine.kill()
        async with opened(machine) as (_, volume):
            assert [await get(volume, 0), await get(volume, 1)] == [1, 0]

    machine.run(main)


@pytest.mark.parametrize("catalog", ["simulated", "real"])
def test_a_poison_that_comes_while_a_checkpoint_commits_is_not_wiped_by_it(catalog: str, tmp_path: Path) -> None:
    machine = machine_of()
    if catalog == "real":
        machine.catalog_directory = tmp_path

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            put(volume, 0, block(1))
            engine = pool._engine
            commit = engine.catalog.commit

            async def offload(function: Any, *args: Any) -> Any:
                if function == commit:
                    # The transaction is ready, its rows are made; now a client's flush fails.
                    put(volume, 1, block(2))
                    machine.media[0].failing_syncs = 1
                    with pytest.raises(OSError, match="poisoned"):
                        await volume.flush()
                return function(*args)

            engine.offload = cast(Any, offload)
            with contextlib.suppress(OSError):
                await pool.checkpoint()
            await crash(machine)
        machine.kill()
        async with opened(machine) as (pool, _):
            assert pool.status().state == "read-only"

    machine.run(main)


def test_a_sync_that_fails_in_recovery_is_remembered() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (_, volume):
            put(volume, 0, block(1))
            await crash(machine)
        machine.kill()
        machine.media[0].failing_syncs = 1
        with contextlib.suppress(OSError):
            async with opened(machine) as (pool, _):
                assert pool.status().state == "read-only"
                await crash(machine)
        machine.kill()
        async with opened(machine) as (pool, _):
            assert pool.status().state == "read-only"

    machine.run(main)


# -- rule 4 ------------------------------------------------------------------------------------------------------------


async def three_durable_batches(machine: Machine) -> None:
    """Blocks 0, 1, 2 in a batch each, flushed one by one, so that the last proves the first two; then a crash."""
    async with opened(machine) as (_, volume):
        for i in range(3):
            put(volume, i, block(i + 1))
            await volume.flush()
        put(volume, 3, block(4))
        await volume.flush()
        await crash(machine)
    machine.power_cut()


def test_a_bad_header_below_the_durable_sequence_is_refused_and_truncation_is_offered() -> None:
    machine = machine_of()

    async def main() -> None:
        await three_durable_batches(machine)
        (_, _, sound), (medium, at, damaged), *_ = writes_of(machine)
        medium.flip(at + 200)
        for _ in range(2):
            with pytest.raises(TierError) as caught:
                async with opened(machine):
                    pass
            assert caught.value.errno == errno.EIO and "truncate" in str(caught.value)
        readable = [batch for _, _, batch in batches(machine) if batch.seq > damaged.seq]
        async with opened(machine, truncate_log=True) as (pool, volume):
            said = pool.status().given_up
            assert said is not None
            for expected in (
                f"after sequence {sound.seq} ",
                f"{len(readable)} batches (sequences {readable[0].seq} to {readable[-1].seq}, {2 * BLOCK} bytes",
                volume.name,
            ):
                assert expected in said
            assert [await get(volume, i) for i in range(4)] == [1, 0, 0, 0]
            put(volume, 5, block(6))
            await volume.flush()
            await require_sound(pool)
        async with opened(machine) as (pool, volume):
            assert pool.status().given_up is None
            assert [await get(volume, i) for i in range(6)] == [1, 0, 0, 0, 0, 6]

    machine.run(main)


def test_bad_data_below_the_durable_sequence_is_eio_for_that_block_alone() -> None:
    machine = machine_of()

    async def main() -> None:
        await three_durable_batches(machine)
        medium, at, batch = writes_of(machine)[1]
        medium.flip(at + batch.header_slots * BLOCK + 77)
        async with opened(machine) as (pool, volume):
            with pytest.raises(OSError) as caught:
                await get(volume, 1)
            assert caught.value.errno == errno.EIO
            assert [await get(volume, i) for i in (0, 2, 3)] == [1, 3, 4]
            assert not (await pool.check(full=True)).ok
            put(volume, 1, block(9))
            assert await get(volume, 1) == 9

    machine.run(main)


def test_a_bad_header_that_nothing_proves_durable_is_the_end_of_the_log() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (_, volume):
            for i in range(3):
                put(volume, i, block(i + 1))
            await crash(machine)
        machine.kill()
        medium, at, _ = writes_of(machine)[1]
        medium.flip(at + 200)
        async with opened(machine) as (pool, volume):
            assert [await get(volume, i) for i in range(3)] == [1, 0, 0]
            await require_sound(pool)

    machine.run(main)


def test_bad_data_that_nothing_proves_durable_is_the_end_of_the_log() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (_, volume):
            for i in range(3):
                put(volume, i, block(i + 1))
            await crash(machine)
        machine.kill()
        medium, at, batch = writes_of(machine)[1]
        medium.flip(at + batch.header_slots * BLOCK)
        async with opened(machine) as (pool, volume):
            assert [await get(volume, i) for i in range(3)] == [1, 0, 0]
            await require_sound(pool)

    machine.run(main)


def test_a_log_segment_that_the_catalog_knows_still_proves_what_was_durable() -> None:
    machine = machine_of(Disk("fast", 48, 64 << 10))

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            engine = pool._engine
            commit = engine.catalog.commit
            change_of = pool._checkpointer._change

            def change(*args):  # type: ignore[no-untyped-def]
                # After the freeze: the log goes on into segments that the transaction will list.
                for i in range(40):
                    put(volume, i, block(i + 1))
                return change_of(*args)

            pool._checkpointer._change = change  # type: ignore[method-assign]
            await pool.checkpoint()
            assert engine.catalog.commit == commit
            await volume.flush()
            put(volume, 40, block(41))
            await volume.flush()
            await crash(machine)
        machine.power_cut()
        after = [item for item in writes_of(machine) if item[2].seq > machine.state.position.checkpoint_seq]
        medium, at, _ = after[1]
        medium.flip(at + 200)
        with pytest.raises(TierError, match="damaged"):
            async with opened(machine):
                pass

    machine.run(main)


# -- rule 5 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [0, 512, BLOCK, BLOCK + 512, 2 * BLOCK], ids=lambda n: f"{n} bytes taken")
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, 0], ids=["EIO", "ENOSPC", "short"])
@pytest.mark.parametrize("power", [True, False], ids=["power cut", "kill"])
def test_a_failed_write_burns_its_sequence_and_what_is_acknowledged_later_survives(
    taken: int, number: int, power: bool
) -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            (medium,) = machine.media
            put(volume, 0, block(1))
            seq = pool._engine.log.seq
            head = pool._engine.log.head

            def fail(offset: int, length: int) -> tuple[int, int]:
                medium.on_write = lambda offset, length: None
                return number, taken

            medium.on_write = fail
            with pytest.raises(OSError):
                volume.write_now([(0, block(2))])
            assert await get(volume, 0) == 1
            put(volume, 1, block(3))
            assert pool._engine.log.seq > seq + 1
            assert pool._engine.log.head is not head and not head.open
            await volume.flush()
            put(volume, 2, block(4))
            await crash(machine)
        if power:
            machine.power_cut()
        else:
            machine.kill()
        async with opened(machine) as (pool, volume):
            assert [await get(volume, 0), await get(volume, 1)] == [1, 3]
            assert await get(volume, 2) in ((0, 4) if power else (4,))
            await require_sound(pool)

    machine.run(main)


def test_a_log_that_cannot_be_linked_waits_for_a_checkpoint_and_goes_on() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            (medium,) = machine.media
            put(volume, 0, block(1))
            bad = pool._engine.log.head
            end = bad.base + bad.slots * BLOCK
            medium.on_write = lambda offset, length: (errno.EIO, 0) if bad.base <= offset < end else None
            with pytest.raises(OSError):
                volume.write_now([(0, block(2))])
            await volume.write(BLOCK, block(3))  # waits for the checkpoint that mends the log
            await volume.flush()
            await crash(machine)
        machine.power_cut()
        async with opened(machine) as (pool, volume):
            machine.media[0].on_write = lambda offset, length: None
            assert [await get(volume, 0), await get(volume, 1)] == [1, 3]
            await require_sound(pool)

    machine.run(main)


@pytest.mark.parametrize("power", [False, True])
def test_a_refused_write_that_nothing_could_be_put_over_never_comes_true_after_a_flush(power: bool) -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            (medium,) = machine.media
            put(volume, 0, block(1))
            await volume.flush()
            head = pool._engine.log.head
            place = head.offset(head.used)
            failed: list[int] = []

            def fail(offset: int, length: int) -> tuple[int, int] | None:
                if offset == place and len(failed) < 2:  # the write, which the kernel took, and the LINK over it
                    failed.append(length)
                    return errno.EIO, length if len(failed) == 1 else 0
                return None

            medium.on_write = fail
            with pytest.raises(TierError):
                volume.write_now([(0, block(2))])
            assert len(failed) == 2
            assert await get(volume, 0) == 1
            await volume.flush()
            put(volume, 1, block(3))
            await crash(machine)
        medium.on_write = lambda offset, length: None
        if power:
            machine.power_cut()
        else:
            machine.kill()
        async with opened(machine) as (pool, volume):
            assert await get(volume, 0) == 1
            assert power or await get(volume, 1) == 3
            await require_sound(pool)

    machine.run(main)


@pytest.mark.parametrize("where", ["data before the checkpoint", "a slot never written", "another segment's header"])
def test_a_sector_that_cannot_be_read_costs_what_lies_in_it_and_not_the_pool(where: str) -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            put(volume, 0, block(1))
            put(volume, 2, block(4))
            await pool.checkpoint()
            put(volume, 1, block(2))
            await volume.flush()
            ((address,), _) = await volume.entries(0, 1)
            segment = pool._engine.segments.by_id[address >> 24]
            bad = {
                "data before the checkpoint": segment.offset(address & 0xFFFFFF),
                "a slot never written": segment.offset(segment.slots - 1),
                "another segment's header": segment.device.segment_offset(segment.device.segment_count - 1),
            }[where]
            await crash(machine)
        machine.kill()
        (medium,) = machine.media
        medium.on_read = lambda offset, length: errno.EIO if offset <= bad < offset + length else None
        async with opened(machine) as (pool, volume):
            assert await get(volume, 1) == 2
            assert await get(volume, 2) == 4
            if where == "data before the checkpoint":
                with pytest.raises(TierError) as caught:
                    await get(volume, 0)
                assert caught.value.errno == errno.EIO
                put(volume, 0, block(9))
            else:
                assert await get(volume, 0) == 1

    machine.run(main)


@pytest.mark.parametrize("what", ["data", "header"])
def test_a_sector_that_only_the_medium_cannot_give_is_no_torn_batch(what: str) -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            await pool.checkpoint()
            put(volume, 0, block(1))
            put(volume, 1, block(2))
            await volume.flush()  # of which the log itself has no proof: nothing was written after it
            await crash(machine)
        machine.kill()
        (_, header, batch) = writes_of(machine)[-1]
        bad = header + (batch.header_slots * BLOCK if what == "data" else 0)
        direct = SimDevice.read_direct

        async def read_direct(device: SimDevice, offset: int, length: int) -> bytearray:
            if offset <= bad < offset + length:
                raise TierError(errno.EIO, "a lost sector")
            return await direct(device, offset, length)

        with mock.patch.object(SimDevice, "read_direct", read_direct):
            if what == "header":
                with pytest.raises(TierError, match=rf"at {bad} can't be read.*--truncate-log"):
                    async with opened(machine):
                        pass
            else:
                async with opened(machine) as (pool, volume):
                    assert await get(volume, 0) == 1
                    assert await get(volume, 1) == 2  # the page cache has it
        async with opened(machine) as (pool, volume):
            assert await get(volume, 1) == 2

    machine.run(main)


def test_a_sector_in_which_the_log_may_go_on_is_not_taken_for_its_end() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            put(volume, 0, block(1))
            await pool.checkpoint()
            put(volume, 1, block(2))
            await crash(machine)
        machine.kill()
        (medium, bad, _) = writes_of(machine)[-1]
        medium.on_read = lambda offset, length: errno.EIO if offset <= bad < offset + length else None
        with pytest.raises(TierError, match=rf"at {bad} can't be read.*--truncate-log"):
            async with opened(machine):
                pass
        medium.on_read = lambda offset, length: None
        async with opened(machine) as (_, volume):
            assert await get(volume, 1) == 2

    machine.run(main)


def test_a_batch_never_has_more_buffers_than_the_kernel_takes() -> None:
    machine = machine_of(Disk("fast", 24, 16 << 20))

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 3000 * BLOCK)
            assert volume.write_now([(2 * i * BLOCK, block(1 + i % 200)) for i in range(1000)])  # the device asserts
            assert volume.write_now([(i * 600, bytes([1 + i % 200]) * 600) for i in range(900)])
            content = await read_all(volume)
            assert all(content[i * 600 : i * 600 + 600] == bytes([1 + i % 200]) * 600 for i in range(900))

    machine.run(main)


# -- rule 6 ------------------------------------------------------------------------------------------------------------


def test_a_catalog_older_than_the_labels_is_refused() -> None:
    machine = machine_of(Disk("fast", 24), Disk("base", 24))

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            put(volume, 0, block(1))
            await pool.checkpoint()
            backup = machine.state
            put(volume, 0, block(2))
            await pool.checkpoint()
            await volume.flush()
        newest = machine.state
        machine.state = backup
        with pytest.raises(TierError) as caught:
            async with opened(machine):
                pass
        assert caught.value.errno == errno.ESTALE
        machine.state = newest
        async with opened(machine) as (_, volume):
            assert await get(volume, 0) == 2

    machine.run(main)


def test_a_torn_label_leaves_the_other_copy() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            put(volume, 0, block(1))
            await pool.checkpoint()
        medium = machine.media[0]
        for offset in (0, 4096):
            medium.flip(offset + 30)
            async with opened(machine) as (pool, volume):
                assert await get(volume, 0) == 1
                await pool.checkpoint()
                await pool.checkpoint()

    machine.run(main)
