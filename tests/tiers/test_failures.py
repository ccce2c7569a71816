"""What failing devices and unlucky moments may not do to a pool that is open."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.tiers.helpers import QUIET, assert_sound, block, fresh_pool, make_pool, read, refusal, run
from tiers import DeviceSpec, Pool, TierError, Volume, checkpoint
from tiers.device import FileDevice
from tiers.layout import BLOCK_BYTES, LABEL_AREA_BYTES, MIB


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Say `full_disk["path"] = name` and every write to segments of that device finds no space."""
    state = {"path": ""}
    pwritev = FileDevice._pwritev

    def write(self: FileDevice, offset: int, buffers: Sequence[Any], expected: int) -> None:
        if Path(self.path).name == state["path"] and offset >= LABEL_AREA_BYTES:
            raise TierError(errno.ENOSPC, f"writing {self.path} at {offset}: No space left on device")
        pwritev(self, offset, buffers, expected)

    monkeypatch.setattr(FileDevice, "_pwritev", write)
    monkeypatch.setattr(checkpoint, "RETRY_S", 0.02)
    return state


def test_a_full_file_system_below_a_device_is_told_and_room_on_it_is_noticed(
    tmp_path: Path, full_disk: dict[str, str]
) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path, fast_mib=32)
        async with Pool.open(home) as pool:
            volume = await pool.create_volume("v", 8 * MIB)
            await volume.write(0, block(1))
            await pool.checkpoint()
            free = pool.status().devices[0].free_segments
            full_disk["path"] = Path(pool.status().devices[0].path).name
            for _ in range(3):
                with trio.fail_after(5), pytest.raises(TierError) as raised:
                    await volume.write(0, block(2))
                assert raised.value.errno == errno.ENOSPC
            assert await read(volume, 0, BLOCK_BYTES) == block(1)
            await trio.sleep(0.5)  # two dozen failed tries
            assert pool.status().devices[0].free_segments >= free - 3
            full_disk["path"] = ""
            with trio.fail_after(10):
                while True:
                    try:
                        await volume.write(0, block(3))
                        break
                    except TierError:
                        await trio.sleep(0.02)
            await assert_sound(pool)
        async with Pool.open(home) as pool:
            assert await read(pool.volume("v"), 0, BLOCK_BYTES) == block(3)

    run(body)


def test_growing_helps_a_pool_whose_devices_take_no_more(tmp_path: Path, full_disk: dict[str, str]) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path, fast_mib=32)
        async with Pool.open(home) as pool:
            volume = await pool.create_volume("v", 8 * MIB)
            await volume.write(0, block(1))
            full_disk["path"] = Path(pool.status().devices[0].path).name
            with pytest.raises(TierError):
                await volume.write(0, block(2))
            with trio.fail_after(5):
                await pool.grow([DeviceSpec(tmp_path / "more", "base", 64 * MIB)])
            assert len(pool.status().devices) == 2
            full_disk["path"] = ""
        async with Pool.open(home) as pool:
            assert len(pool.status().devices) == 2
            assert await read(pool.volume("v"), 0, BLOCK_BYTES) == block(1)

    run(body)


def test_a_grow_that_fails_leaves_the_pool_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path, fast_mib=32)
        async with Pool.open(home) as pool:

            def refuse(devices: object) -> None:
                raise TierError(errno.ENOSPC, "the catalog: disk full")

            with monkeypatch.context() as patch:
                patch.setattr(pool._engine.catalog, "add_devices", refuse)
                with pytest.raises(TierError, match="disk full"):
                    await pool.grow([DeviceSpec(tmp_path / "more", "base", 64 * MIB)])
            assert len(pool.status().devices) == 1
            await pool.checkpoint()
            await pool.grow([DeviceSpec(tmp_path / "more", "base")])
        async with Pool.open(home) as pool:
            assert len(pool.status().devices) == 2

    run(body)


def test_a_pool_opens_whichever_way_a_grow_in_doubt_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed fsync of the catalog's WAL: after a crash the new device may be recorded, though that was an error."""

    async def body() -> None:
        home = await make_pool(tmp_path, fast_mib=32)
        async with Pool.open(home) as pool:
            record = pool._engine.catalog.add_devices
            for name, is_recorded in (("without", False), ("with", True)):

                def fail(devices: Any, is_recorded: bool = is_recorded) -> None:
                    if is_recorded:
                        record(devices)
                    raise TierError(errno.EIO, "the catalog: disk I/O error")

                monkeypatch.setattr(pool._engine.catalog, "add_devices", fail)
                with pytest.raises(TierError, match=rf"disk I/O error; after a .*/{name} became part") as raised:
                    await pool.grow([DeviceSpec(tmp_path / name, "base", 64 * MIB)])
                assert raised.value.errno == errno.EIO
                assert len(pool.status().devices) == 1
        async with Pool.open(home) as pool:
            assert [Path(device.path).name for device in pool.status().devices][1:] == ["with"]
            await pool.grow([DeviceSpec(tmp_path / "without", "base")], force=True)
            assert len(pool.status().devices) == 3

    run(body)


def test_what_changes_while_the_catalog_commits_is_in_the_next_checkpoint(tmp_path: Path) -> None:
    """A log segment is overwritten and left while a commit runs: its row must be written by the next one."""

    async def body() -> None:
        home = await make_pool(tmp_path, fast_mib=64)
        async with Pool.open(home) as pool:
            engine: Any = pool._engine
            volume = await pool.create_volume("v", 16 * MIB)
            await volume.write(0, os.urandom(40 * BLOCK_BYTES))
            await pool.checkpoint()
            head = engine.log.head
            offload = engine.offload

            async def meanwhile(function: Any, *arguments: Any) -> Any:
                result = await offload(function, *arguments)
                if function == engine.catalog.commit and engine.log.head is head:
                    assert volume.write_now([(0, os.urandom(40 * BLOCK_BYTES))])
                    while engine.log.head is head:
                        assert volume.write_now([(MIB, os.urandom(20 * BLOCK_BYTES))])
                return result

            engine.offload = meanwhile
            await volume.write(8 * MIB, block(1))
            await pool.checkpoint()
            engine.offload = offload
            await volume.write(MIB, os.urandom(60 * BLOCK_BYTES))
            await pool.checkpoint()
        async with Pool.open(home) as pool:
            await assert_sound(pool)

    run(body)


def test_no_flush_claims_a_sequence_that_no_batch_has(tmp_path: Path) -> None:
    """A checkpoint burns a sequence. A later header that called it durable would turn a power cut into corruption."""

    async def body() -> None:
        home = await make_pool(tmp_path, fast_mib=32)
        async with Pool.open(home) as pool:
            volume = await pool.create_volume("v", 8 * MIB)
            await volume.write(0, block(1))
            await pool.checkpoint()
            await volume.flush()
            log = pool._engine.log
            assert log.appended_seq < log.seq
            assert pool.status().durable_seq <= log.appended_seq
            await volume.write(0, block(2))
            await volume.flush()
            assert pool.status().durable_seq == log.appended_seq == log.seq

    run(body)


def test_commits_that_fail_again_and_again_eat_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path, fast_mib=64)
        async with Pool.open(home) as pool:
            volume = await pool.create_volume("v", 1 << 30)
            for i in range(300):
                await volume.write(i * 3 * MIB % volume.size_bytes, block(i))

            def refuse(change: object) -> None:
                raise TierError(errno.ENOSPC, "the catalog: disk full")

            with monkeypatch.context() as patch:
                patch.setattr(pool._engine.catalog, "commit", refuse)
                free = pool.status().devices[0].free_segments
                for _ in range(20):
                    with pytest.raises(TierError, match="disk full"):
                        await pool.checkpoint()
                assert pool.status().devices[0].free_segments >= free - 1
            await pool.checkpoint()
            await assert_sound(pool)

    run(body)


def test_a_flush_round_that_dies_unexpectedly_fails_every_flusher_and_the_pool_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        dying = False
        sync = FileDevice.sync

        async def no_threads(self: FileDevice) -> None:
            await trio.lowlevel.checkpoint()
            if dying:
                raise RuntimeError("can't start new thread")
            await sync(self)

        monkeypatch.setattr(FileDevice, "sync", no_threads)
        errors: list[OSError] = []

        async def flush(volume: Volume) -> None:
            try:
                await volume.flush()
            except OSError as error:
                errors.append(error)

        # The flushers are connections' tasks, which no pool's nursery cancels.
        async with trio.open_nursery() as clients:
            with pytest.raises(BaseExceptionGroup) as caught:
                async with Pool.open(home, settings=QUIET) as pool:
                    volume = await pool.create_volume("v", MIB)
                    await volume.write(0, block(1))
                    dying = True
                    for _ in range(3):
                        clients.start_soon(flush, volume)
                    await trio.sleep_forever()
            assert caught.group_contains(RuntimeError, match="can't start new thread")
        assert [error.errno for error in errors] == [errno.EIO] * 3
        with pytest.raises(TierError):
            await volume.flush()
        assert not volume.write_now([(0, block(2))])
        dying = False
        async with Pool.open(home, settings=QUIET) as pool:
            assert await read(pool.volume("v"), 0, BLOCK_BYTES) == block(1)
            await assert_sound(pool)

    run(body)


@pytest.mark.parametrize("call", ["preadv", "pwritev", "fdatasync"])
def test_a_medium_never_says_estale_which_means_of_a_leg_that_its_term_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            device = pool._engine.devices[0]

            def lost(*args: object) -> int:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

            async def ask() -> None:
                if call == "preadv":
                    await device.read(1 << 20, 4096)
                elif call == "pwritev":
                    device.write(device.label.size_bytes - 4096, [bytes(4096)])
                else:
                    await device.sync()

            with monkeypatch.context() as patched:
                patched.setattr(os, call, lost)
                error = await refusal(ask)
            assert error.errno == errno.EIO
            assert os.strerror(errno.ESTALE) in str(error)

    run(body)
