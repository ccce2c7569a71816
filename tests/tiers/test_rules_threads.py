"""Rules 11 and 12: what may happen on the trio thread, and how much may be unsynced. A test or more for each."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.simulation.machine import Disk, Machine
from tests.simulation.oracle import BLOCK, read_all
from tests.tiers.test_rules_log import block, get, machine_of, opened, put
from tiers import DeviceSpec, Pool, PoolSettings
from tiers.device import FileDevice
from tiers.host import RealHost

# -- rule 11 -----------------------------------------------------------------------------------------------------------


def test_fast_reads_and_writes_have_no_checkpoint_and_touch_no_worker() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (_, volume):
            into = memoryview(bytearray(8 * BLOCK))
            with trio.testing.assert_no_checkpoints():
                assert volume.write_now([(0, block(1) * 8), (100, b"x"), (BLOCK, b"y" * BLOCK)])
                assert volume.read_now(0, len(into), into)
                assert volume.read_now(99, 3, into[:3])
            assert bytes(into[:3]) == b"\1x\1"

    machine.run(main)


def test_a_batch_is_in_the_log_and_in_the_map_in_the_same_breath() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume):
            seen: list[tuple[int, int]] = []

            async def watch() -> None:
                while True:
                    entry = volume.entry_now(3)
                    seen.append((pool._engine.log.seq, entry[0] if entry else -1))
                    await trio.lowlevel.checkpoint()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                for i in range(20):
                    await volume.write(3 * BLOCK, block(i + 1))
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            by_seq: dict[int, set[int]] = {}
            for seq, address in seen:
                by_seq.setdefault(seq, set()).add(address)
            assert len(by_seq) > 10 and all(len(addresses) == 1 for addresses in by_seq.values())

    machine.run(main)


def test_the_devices_are_synced_and_slow_reads_made_in_worker_threads_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, set[bool]] = {}
    main_thread = threading.get_ident()

    def note(name: str, original: Any) -> Any:
        def called(*args: Any) -> Any:
            calls.setdefault(name, set()).add(threading.get_ident() == main_thread)
            return original(*args)

        return called

    monkeypatch.setattr("os.fdatasync", note("fdatasync", __import__("os").fdatasync))
    for name in ("_read_blocking", "_read_direct_blocking"):
        monkeypatch.setattr(FileDevice, name, note(name, getattr(FileDevice, name)))

    async def main() -> None:
        await Pool.create(tmp_path / "p", "p", [DeviceSpec(tmp_path / "d", "fast", 64 << 20)])
        async with Pool.open(tmp_path / "p") as pool:
            volume = await pool.create_volume("v", 1 << 20)
            put(volume, 0, block(1))
            await volume.flush()
            assert await get(volume, 0) == 1
            await pool.checkpoint()
        async with Pool.open(tmp_path / "p") as pool:
            assert await get(pool.volume("v"), 0) == 1
            await pool._engine.devices[0].read_direct(0, 4096)

    trio.run(main)
    assert calls == {"fdatasync": {False}, "_read_blocking": {False}, "_read_direct_blocking": {False}}


# -- rule 12 -----------------------------------------------------------------------------------------------------------


def test_writers_are_held_back_at_the_cap_of_unsynced_bytes_and_go_on_after_the_sync() -> None:
    cap = 512 << 10
    settings = PoolSettings(checkpoint_interval_s=1e6, unsynced_cap_bytes=cap)
    machine = Machine((Disk("fast", 200),), seed=2, settings=settings)

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 4 << 20)
            await volume.flush()
            (medium,) = machine.media
            most = 0

            async def slow() -> None:
                await trio.sleep(0.01)

            def unsynced(kind: str) -> None:
                nonlocal most
                most = max(most, sum(len(data) for _, data in medium.unsynced))

            medium.before_sync = slow
            machine.on_step = unsynced
            began = trio.current_time()

            async def writer(first: int) -> None:
                for i in range(40):
                    await volume.write((first + i) * 8 * BLOCK, block(1 + i) * 8)

            async with trio.open_nursery() as nursery:
                for n in range(3):
                    nursery.start_soon(writer, 40 * n)
            machine.on_step = lambda kind: None
            # What is unsynced at the medium: what came during a sync, and what that sync covers.
            assert cap // 2 < most <= 2 * cap + (3 * 9 + 2) * BLOCK
            assert trio.current_time() - began < 1, "writers slept on after their sync"

    machine.run(main)


def test_a_held_back_write_now_refuses_and_does_nothing() -> None:
    cap = 256 << 10
    settings = PoolSettings(checkpoint_interval_s=1e6, unsynced_cap_bytes=cap)
    machine = Machine((Disk("fast", 60),), seed=2, settings=settings)

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 2 << 20)
            await volume.flush()
            written = 0
            while volume.write_now([(written * BLOCK, block(1 + written % 200))]):
                written += 1
            assert written * BLOCK <= cap
            seq = pool._engine.log.seq
            assert not volume.write_now([(0, block(9))])
            assert pool._engine.log.seq == seq
            content = await read_all(volume)
            assert [content[i * BLOCK] for i in range(written)] == [1 + i % 200 for i in range(written)]
            await volume.flush()
            assert volume.write_now([(0, block(9))])

    machine.run(main)


def test_syncing_begins_before_the_cap_is_reached() -> None:
    settings = PoolSettings(checkpoint_interval_s=1e6, unsynced_cap_bytes=1 << 20)
    machine = Machine((Disk("fast", 60),), seed=2, settings=settings)

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", 2 << 20)
            await volume.flush()
            before = machine.media[0].sync_count
            for i in range(50):
                put(volume, i, block(i + 1))
            put(volume, 60, block(60) * 20)
            put(volume, 60, block(61))
            await trio.sleep(0.001)
            assert machine.media[0].sync_count > before

    machine.run(main)


def test_a_device_without_nowait_reads_is_read_in_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = __import__("os").preadv

    def preadv(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(95, "Operation not supported")
        return real(fd, buffers, offset)

    monkeypatch.setattr("os.preadv", preadv)

    async def main() -> None:
        await Pool.create(tmp_path / "p", "p", [DeviceSpec(tmp_path / "d", "fast", 64 << 20)])
        async with Pool.open(tmp_path / "p", host=RealHost()) as pool:
            volume = await pool.create_volume("v", 1 << 20)
            put(volume, 0, block(1) * 4)
            into = memoryview(bytearray(4 * BLOCK))
            assert not volume.read_now(0, len(into), into)
            await volume.read(0, len(into), into)
            assert into == block(1) * 4
            assert not volume.write_now([(5, b"x")])
            await volume.write(5, b"x")
            assert (await read_all(volume))[:7] == b"\1\1\1\1\1x\1"

    trio.run(main)
