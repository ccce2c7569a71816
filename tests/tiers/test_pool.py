"""A pool from outside: making it, opening it, what it refuses, and that what it answered survives a kill."""

import contextlib
import errno
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.tiers.helpers import (
    QUIET,
    assert_sound,
    block,
    flip,
    fresh_pool,
    make_pool,
    open_refusal,
    read,
    refusal,
    run,
    specs,
)
from tiers import DeviceSpec, Pool, PoolSettings, TierError
from tiers.catalog import Catalog
from tiers.device import FileDevice
from tiers.label import LABEL_OFFSETS, decode_label
from tiers.layout import BLOCK_BYTES, MIB, check_of

REPOSITORY = Path(__file__).parents[2]


def plain(path: Path, size: int = 40 * MIB) -> DeviceSpec:
    """An existing empty file as a device."""
    with path.open("wb") as file:
        file.truncate(size)
    return DeviceSpec(path, "fast")


# -- creating --------------------------------------------------------------------------------------------------------


def test_a_pool_on_existing_and_on_new_files_opens_empty_and_sound(tmp_path: Path) -> None:
    async def body() -> None:
        home = tmp_path / "deep" / "home"
        new = DeviceSpec(tmp_path / "new.img", "base", 48 * MIB)
        await Pool.create(home, "demo", [plain(tmp_path / "old.img"), new])
        async with Pool.open(home, settings=QUIET) as pool:
            status = pool.status()
            assert (status.name, status.state, status.volumes) == ("demo", "online", [])
            assert [(Path(d.path).name, d.tier, d.size_bytes) for d in status.devices] == [
                ("old.img", "fast", 40 * MIB),
                ("new.img", "base", 48 * MIB),
            ]
            assert 0 < status.capacity_bytes < status.size_bytes <= 88 * MIB
            await assert_sound(pool)

    run(body)


def test_a_pool_without_devices_or_with_a_bad_name_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        error = await refusal(lambda: Pool.create(tmp_path / "h", "p", []))
        assert error.errno == errno.EINVAL
        assert "--fast" in str(error)
        for name in ("a/b", "x\n", "y" * 300, ""):
            error = await refusal(lambda name=name: Pool.create(tmp_path / "h", name, specs(tmp_path, fast_mib=64)))
            assert error.errno == errno.EINVAL
        assert list(tmp_path.iterdir()) == []

    run(body)


def test_a_device_listed_twice_is_refused_by_any_of_its_names_and_nothing_is_written(tmp_path: Path) -> None:
    async def body() -> None:
        spec = plain(tmp_path / "a.img")
        (tmp_path / "link.img").symlink_to(spec.path)
        os.link(spec.path, tmp_path / "hard.img")
        for other in ("a.img", "link.img", "hard.img", f"../{tmp_path.name}/a.img"):
            twin = DeviceSpec(tmp_path / other, "base")
            error = await refusal(lambda twin=twin: Pool.create(tmp_path / "h", "p", [spec, twin]))
            assert error.errno in (errno.EINVAL, errno.EBUSY)
            assert str(twin.path) in str(error)
            assert spec.path.read_bytes() == bytes(40 * MIB)
            assert not (tmp_path / "h").exists()

    run(body)


def test_a_missing_device_is_refused_and_the_error_says_how_to_make_one(tmp_path: Path) -> None:
    async def body() -> None:
        path = tmp_path / "no.img"
        error = await refusal(lambda: Pool.create(tmp_path / "h", "p", [DeviceSpec(path, "fast")]))
        assert error.errno == errno.ENOENT
        assert f"{path}=SIZE" in str(error)
        error = await refusal(
            lambda: Pool.create(tmp_path / "h", "p", [DeviceSpec(tmp_path / "no" / "x", "fast", 64 * MIB)])
        )
        assert error.errno == errno.ENOENT

    run(body)


def test_a_new_sparse_file_never_replaces_one_that_exists(tmp_path: Path) -> None:
    async def body() -> None:
        path = tmp_path / "a.img"
        path.write_bytes(b"precious")
        for force in (False, True):
            error = await refusal(
                lambda force=force: Pool.create(tmp_path / "h", "p", [DeviceSpec(path, "fast", 64 * MIB)], force=force)
            )
            assert error.errno == errno.EEXIST
            assert "without =SIZE" in str(error)
        assert path.read_bytes() == b"precious"

    run(body)


def test_a_device_that_is_too_small_is_refused_and_files_made_on_the_way_are_removed(tmp_path: Path) -> None:
    async def body() -> None:
        made = DeviceSpec(tmp_path / "made.img", "fast", 64 * MIB)
        for small in (
            plain(tmp_path / "s.img", 32 * MIB - 1),
            plain(tmp_path / "e.img", 0),
            DeviceSpec(tmp_path / "t.img", "base", 31 * MIB),
        ):
            error = await refusal(lambda small=small: Pool.create(tmp_path / "h", "p", [made, small]))
            assert error.errno == errno.EINVAL
            assert "32 MiB" in str(error)
            assert not made.path.exists()
            assert not (tmp_path / "t.img").exists()

    run(body)


def test_a_directory_is_no_device(tmp_path: Path) -> None:
    async def body() -> None:
        error = await refusal(lambda: Pool.create(tmp_path / "h", "p", [DeviceSpec(tmp_path, "fast")]))
        assert error.errno == errno.EINVAL

    run(body)


def test_a_second_pool_in_the_same_directory_or_on_the_same_device_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path, name="first")
        error = await refusal(lambda: Pool.create(home, "again", [plain(tmp_path / "b.img")]))
        assert error.errno == errno.EEXIST
        error = await refusal(
            lambda: Pool.create(tmp_path / "other", "second", [DeviceSpec(tmp_path / "fast.img", "fast")])
        )
        assert error.errno == errno.EEXIST
        assert "'first'" in str(error)
        async with Pool.open(home):
            error = await refusal(
                lambda: Pool.create(
                    tmp_path / "other", "second", [DeviceSpec(tmp_path / "fast.img", "fast")], force=True
                )
            )
            assert error.errno == errno.EBUSY, "in use: not even --force takes it"

    run(body)


def test_a_device_of_another_pool_is_taken_only_by_force(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path, name="first")
        await Pool.create(tmp_path / "other", "second", [DeviceSpec(tmp_path / "fast.img", "fast")], force=True)
        async with Pool.open(tmp_path / "other") as pool:
            assert pool.name == "second"
        error = await open_refusal(home)
        assert error.errno == errno.EIO
        assert "another pool ('second')" in str(error)

    run(body)


# -- opening: devices and catalog that are not as they should be ----------------------------------------------------


def reseal(path: Path, change: bytes, at: int) -> None:
    """Change both copies of a label, with a sound checksum."""
    with path.open("r+b") as file:
        for offset in LABEL_OFFSETS:
            file.seek(offset)
            body = bytearray(file.read(504))
            body[at : at + len(change)] = change
            file.seek(offset)
            file.write(body + struct.pack("<Q", check_of(bytes(body))))


def test_a_pool_that_is_not_there_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        error = await open_refusal(tmp_path / "nothing")
        assert error.errno == errno.ENOENT
        assert "terrace pool create" in str(error)

    run(body)


def test_a_missing_device_keeps_the_pool_closed_and_is_named(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path, base_mib=64)
        (tmp_path / "base.img").rename(tmp_path / "elsewhere.img")
        error = await open_refusal(home)
        assert error.errno == errno.ENOENT
        assert str(tmp_path / "base.img") in str(error)
        (tmp_path / "elsewhere.img").rename(tmp_path / "base.img")
        async with Pool.open(home) as pool:
            assert len(pool.status().devices) == 2

    run(body)


def test_a_truncated_device_is_refused_with_both_sizes(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        os.truncate(tmp_path / "fast.img", 50 * MIB)
        error = await open_refusal(home)
        assert error.errno == errno.EIO
        assert str(50 * MIB) in str(error)
        assert str(64 * MIB) in str(error)
        os.truncate(tmp_path / "fast.img", 100)
        assert "label" in str(await open_refusal(home))

    run(body)


def test_a_label_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        reseal(tmp_path / "fast.img", b"\x02\x00", 8)
        error = await open_refusal(home)
        assert error.errno == errno.EIO
        assert "format version 2" in str(error)
        assert str(tmp_path / "fast.img") in str(error)
        error = await refusal(lambda: Pool.create(tmp_path / "o", "o", [DeviceSpec(tmp_path / "fast.img", "fast")]))
        assert error.errno == errno.EEXIST, "nor does a new pool take it"

    run(body)


def test_a_label_that_fails_its_checksum_in_both_copies_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        for offset in LABEL_OFFSETS:
            flip(tmp_path / "fast.img", offset + 100)
        error = await open_refusal(home)
        assert error.errno == errno.EIO
        assert "fails its checksum" in str(error)
        error = await refusal(lambda: Pool.create(tmp_path / "o", "o", [DeviceSpec(tmp_path / "fast.img", "fast")]))
        assert error.errno == errno.EEXIST

    run(body)


def test_one_torn_copy_of_a_label_is_survived(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        for offset in LABEL_OFFSETS:
            flip(tmp_path / "fast.img", offset + 100)
            async with Pool.open(home, settings=QUIET) as pool:
                await pool.create_volume(f"v{offset}", MIB)
                await pool.checkpoint()
                await pool.create_volume(f"w{offset}", MIB)
                await pool.checkpoint()

    run(body)


def test_a_foreign_device_in_a_devices_place_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path, base_mib=64)
        (tmp_path / "x").mkdir()
        await make_pool(tmp_path / "x", name="q", base_mib=64)
        shutil.copy(tmp_path / "x" / "base.img", tmp_path / "base.img")
        error = await open_refusal(home)
        assert error.errno == errno.EIO
        assert "another pool ('q')" in str(error)
        (tmp_path / "base.img").write_bytes(bytes(64 * MIB))
        error = await open_refusal(home)
        assert "no Terrace label" in str(error)

    run(body)


def test_devices_that_swapped_places_are_refused(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path, base_mib=64)
        fast, base = tmp_path / "fast.img", tmp_path / "base.img"
        fast.rename(tmp_path / "t")
        base.rename(fast)
        (tmp_path / "t").rename(base)
        error = await open_refusal(home)
        assert error.errno == errno.EIO
        assert "is device 1" in str(error)

    run(body)


def test_a_catalog_of_another_version_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        with contextlib.closing(sqlite3.connect(home / "catalog.sqlite")) as db, db:
            db.execute("UPDATE meta SET value = 99 WHERE key = 'format_version'")
        error = await open_refusal(home)
        assert error.errno == errno.EPROTO
        assert "format version 99" in str(error)

    run(body)


@pytest.mark.parametrize("damage", [b"", b"this is no database, and long enough to be looked at" * 100])
def test_a_catalog_that_is_no_database_is_refused(tmp_path: Path, damage: bytes) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        (home / "catalog.sqlite").write_bytes(damage)
        error = await open_refusal(home)
        assert error.errno == errno.EIO
        assert "rebuild it with `terrace pool check" in str(error)

    run(body)


def test_an_older_catalog_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            await pool.create_volume("v", MIB)
        shutil.copy(home / "catalog.sqlite", tmp_path / "backup")
        async with Pool.open(home, settings=QUIET) as pool:
            await pool.volume("v").write(0, block(1))
        shutil.copy(tmp_path / "backup", home / "catalog.sqlite")
        error = await open_refusal(home)
        assert error.errno == errno.ESTALE
        assert "restored from a backup" in str(error)

    run(body)


# -- the lock ---------------------------------------------------------------------------------------------------------


def test_an_open_pool_is_locked_and_the_error_says_what_to_do(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home):
            for action in (lambda: open_refusal(home), lambda: refusal(lambda: Pool.destroy(home))):
                error = await action()
                assert error.errno == errno.EBUSY
                assert "stop that terraced" in str(error)
        async with Pool.open(home):
            pass

    run(body)


def test_a_device_that_another_process_holds_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        copy = tmp_path / "copy"
        shutil.copytree(home, copy)
        async with Pool.open(home):
            error = await open_refusal(copy)
            assert error.errno == errno.EBUSY
            assert str(tmp_path / "fast.img") in str(error)

    run(body)


# -- volumes ----------------------------------------------------------------------------------------------------------


def test_volumes_are_created_found_listed_and_deleted_by_name(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            for name in ("b", "a", "c"):
                volume = await pool.create_volume(name, 8 * MIB)
                assert (volume.name, volume.size_bytes) == (f"p/{name}", 8 * MIB)
            assert [volume.name for volume in pool.volumes()] == ["p/a", "p/b", "p/c"]
            assert pool.volume("b") is pool.volumes()[1]
            await pool.delete_volume("b")
            assert [volume.name for volume in pool.volumes()] == ["p/a", "p/c"]
            with pytest.raises(TierError) as caught:
                pool.volume("b")
            assert caught.value.errno == errno.ENOENT
            assert (await refusal(lambda: pool.delete_volume("b"))).errno == errno.ENOENT
            assert (await refusal(lambda: pool.resize_volume("b", MIB))).errno == errno.ENOENT
            assert (await refusal(lambda: pool.create_volume("a", MIB))).errno == errno.EEXIST

    run(body)


@pytest.mark.parametrize("size", [0, -1, 7, 4097, 1 << 63])
def test_a_senseless_size_is_refused_in_creating_and_in_resizing(tmp_path: Path, size: int) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            await pool.create_volume("v", MIB)
            assert (await refusal(lambda: pool.create_volume("w", size))).errno == errno.EINVAL
            assert (await refusal(lambda: pool.resize_volume("v", size))).errno == errno.EINVAL
            assert [(v.name, v.size_bytes) for v in pool.volumes()] == [("p/v", MIB)]

    run(body)


@pytest.mark.parametrize("name", ["a/b", "a\nb", "x" * 300, "", "-x"])
def test_a_senseless_name_is_refused(tmp_path: Path, name: str) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            assert (await refusal(lambda: pool.create_volume(name, MIB))).errno == errno.EINVAL
            assert pool.volumes() == []

    run(body)


def test_a_volume_in_use_is_neither_deleted_nor_shrunk_but_may_grow(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 8 * MIB)
            await volume.write(7 * MIB, block(1))
            volume.acquire()
            for action in (lambda: pool.delete_volume("v"), lambda: pool.resize_volume("v", 4 * MIB)):
                error = await refusal(action)
                assert error.errno == errno.EBUSY
                assert "p/v is in use by 1 connection and" in str(error)
            assert pool.status().volumes[0].open_count == 1
            await pool.resize_volume("v", 16 * MIB)
            assert await read(volume, 7 * MIB, BLOCK_BYTES) == block(1)
            volume.release()
            await pool.resize_volume("v", 4 * MIB)
            await pool.delete_volume("v")

    run(body)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["in the overlay", "in pages"])
@pytest.mark.parametrize("size", [MIB, MIB + 512, MIB + 3584, 4096, 4608])
def test_what_was_cut_off_reads_as_zeros_when_the_volume_grows_again(
    tmp_path: Path, size: int, checkpoint: bool
) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await pool.create_volume("v", 3 * MIB)
            data = b"".join(block(i) for i in range(3 * MIB // BLOCK_BYTES))
            await volume.write(0, data)
            if checkpoint:
                await pool.checkpoint()
            await pool.resize_volume("v", size)
            assert volume.size_bytes == size
            assert await read(volume, 0, size) == data[:size]
            if checkpoint:
                await pool.checkpoint()
            await pool.resize_volume("v", 3 * MIB)
            assert await read(volume, 0, 3 * MIB) == data[:size] + bytes(3 * MIB - size)
            await assert_sound(pool)
        async with Pool.open(home, settings=QUIET) as pool:
            assert await read(pool.volume("v"), 0, 3 * MIB) == data[:size] + bytes(3 * MIB - size)

    run(body)


def test_a_name_can_be_used_again_in_the_same_checkpoint_and_the_new_volume_is_empty(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await pool.create_volume("v", MIB)
            await volume.write(0, block(1))
            await pool.checkpoint()
            await volume.write(4096, block(2))
            await pool.delete_volume("v")
            fresh = await pool.create_volume("v", MIB)
            assert await read(fresh, 0, 8192) == bytes(8192)
            error = await refusal(lambda: volume.write(0, block(3)))
            assert error.errno == errno.ESTALE
            await fresh.write(4096, block(4))
        async with Pool.open(home, settings=QUIET) as pool:
            assert await read(pool.volume("v"), 0, 8192) == bytes(4096) + block(4)
            await assert_sound(pool)

    run(body)


def test_a_10_tib_volume_costs_nothing_to_make_trim_or_delete(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 10 << 40)
            for offset in (0, 5 << 40, (10 << 40) - 4096):
                await volume.write(offset, block(offset))
            await pool.checkpoint()
            assert pool.status().metadata_bytes < MIB
            begun = trio.current_time()
            await volume.trim(0, 10 << 40)
            assert trio.current_time() - begun < 0.1
            for offset in (0, 5 << 40, (10 << 40) - 4096):
                assert await read(volume, offset, 4096) == bytes(4096)
            await pool.delete_volume("v")
            await pool.checkpoint()
            await assert_sound(pool)

    run(body)


# -- what survives ----------------------------------------------------------------------------------------------------

CHILD = """
import sys, trio
from pathlib import Path
from tests.tiers.helpers import QUIET, block, specs
from tiers import Pool

async def main():
    home, extra = Path(sys.argv[1]), Path(sys.argv[2])
    async with Pool.open(home, settings=QUIET) as pool:
        kept = await pool.create_volume("kept", 8 << 20)
        gone = await pool.create_volume("gone", 8 << 20)
        small = await pool.create_volume("small", 8 << 20)
        await kept.write(0, block(1) + block(2))
        await gone.write(0, block(3))
        await small.write(6 << 20, block(4))
        await pool.checkpoint()
        await kept.write(4096, block(5))
        assert kept.write_now([(8192, block(6)), (100, b"unaligned")])
        await kept.trim(0, 0)
        await pool.resize_volume("kept", 16 << 20)
        await kept.write(15 << 20, block(7))
        await pool.resize_volume("small", 1 << 20)
        await pool.delete_volume("gone")
        await pool.create_volume("gone", 4 << 20)
        await pool.grow(specs(extra, base_mib=48))
        await pool._checkpointer._lock.acquire()  # grow has asked for a checkpoint, which would leave nothing to replay
        await pool.create_volume("last", 1 << 20)
        print("ready", flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


def test_everything_that_was_answered_survives_a_kill(tmp_path: Path) -> None:
    async def make() -> Path:
        return await make_pool(tmp_path)

    home = run(make)
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(home), str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGKILL)

    async def look() -> None:
        for replays in (True, False):
            async with Pool.open(home, settings=QUIET) as pool:
                assert (pool.replayed_batches > 0) is replays
                assert [(v.name, v.size_bytes) for v in pool.volumes()] == [
                    ("p/gone", 4 * MIB), ("p/kept", 16 * MIB), ("p/last", MIB), ("p/small", MIB),
                ]  # fmt: skip
                kept = pool.volume("kept")
                expected = bytearray(block(1) + block(5) + block(6) + bytes(4096))
                expected[100:109] = b"unaligned"
                assert await read(kept, 0, 16384) == expected
                assert await read(kept, 15 * MIB, 4096) == block(7)
                assert await read(pool.volume("gone"), 0, 4096) == bytes(4096)
                assert [Path(d.path).name for d in pool.status().devices] == ["fast.img", "base.img"]
                await assert_sound(pool)

    run(look)


def test_every_change_of_volumes_survives_reopening(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        expected: dict[str, int] = {}
        for step in range(4):
            async with Pool.open(home, settings=QUIET) as pool:
                assert {v.short_name: v.size_bytes for v in pool.volumes()} == expected
                await pool.create_volume(f"v{step}", (step + 1) * MIB)
                expected[f"v{step}"] = (step + 1) * MIB
                if step == 2:
                    await pool.delete_volume("v0")
                    del expected["v0"]
                if step == 3:
                    await pool.resize_volume("v1", 512 * 9)
                    expected["v1"] = 512 * 9
        async with Pool.open(home, settings=QUIET) as pool:
            assert {v.short_name: v.size_bytes for v in pool.volumes()} == expected

    run(body)


def test_a_pool_that_was_left_properly_has_nothing_to_replay(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=PoolSettings()) as pool:
            volume = await pool.create_volume("v", MIB)
            await volume.write(0, block(1))
        async with Pool.open(home) as pool:
            assert pool.replayed_batches == 0
            assert await read(pool.volume("v"), 0, 4096) == block(1)

    run(body)


# -- growing and ending -----------------------------------------------------------------------------------------------


def test_a_pool_grows_by_devices_while_it_is_used(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", MIB)
            await volume.write(0, block(1))
            before = pool.status().capacity_bytes
            await pool.grow([DeviceSpec(tmp_path / "more.img", "base", 64 * MIB), plain(tmp_path / "n.img")])
            assert pool.status().capacity_bytes > before + 64 * MIB
            assert [d.tier for d in pool.status().devices] == ["fast", "base", "fast"]
            assert await read(volume, 0, 4096) == block(1)
            await assert_sound(pool)

    run(body)


def test_growing_refuses_what_creating_refuses_and_changes_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            good = plain(tmp_path / "good.img")
            for bad, code in (
                (DeviceSpec(tmp_path / "fast.img", "base"), errno.EEXIST),
                (DeviceSpec(tmp_path / "no.img", "base"), errno.ENOENT),
                (plain(tmp_path / "small.img", MIB), errno.EINVAL),
                (good, errno.EINVAL),
            ):
                error = await refusal(lambda bad=bad: pool.grow([good, bad]))
                assert error.errno == code
            assert len(pool.status().devices) == 1
            await pool.grow([good])
            assert len(pool.status().devices) == 2

    run(body)


def test_a_destroyed_pool_leaves_its_files_unlabelled_and_free_for_another(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path, base_mib=64)
        async with Pool.open(home) as pool:
            await pool.create_volume("v", MIB)
        await Pool.destroy(home)
        assert not home.exists()
        for name in ("fast.img", "base.img"):
            data = (tmp_path / name).read_bytes()
            assert len(data) == 64 * MIB
            assert data[:8192] == bytes(8192)
        await Pool.create(home, "p", [DeviceSpec(tmp_path / n, "fast") for n in ("fast.img", "base.img")])
        async with Pool.open(home) as pool:
            assert pool.volumes() == []

    run(body)


def test_destroying_what_is_not_a_pool_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "file").write_text("keep")
        assert (await refusal(lambda: Pool.destroy(tmp_path / "x"))).errno == errno.ENOENT
        assert (tmp_path / "x" / "file").exists()

    run(body)


def test_labels_follow_the_checkpoints(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            await pool.create_volume("v", MIB)
            await pool.checkpoint()
            with (tmp_path / "fast.img").open("rb") as file:
                copies = []
                for offset in LABEL_OFFSETS:
                    file.seek(offset)
                    copies.append(decode_label(file.read(512)))
            assert max(copy.checkpoint_seq for copy in copies) == pool.status().checkpoint_seq

    run(body)


def test_a_refused_pool_leaves_every_device_as_it_was(tmp_path: Path) -> None:
    async def body() -> None:
        good = plain(tmp_path / "good.img")
        flip(good.path, 123_456)
        before = good.path.read_bytes()
        small = plain(tmp_path / "small.img", MIB)
        await refusal(lambda: Pool.create(tmp_path / "h", "p", [good, small]))
        assert good.path.read_bytes() == before

    run(body)


def test_a_pool_that_grew_can_be_opened_again_at_once(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            await pool.grow(specs(tmp_path, base_mib=48))
        async with Pool.open(home, settings=QUIET) as pool:
            assert [d.tier for d in pool.status().devices] == ["fast", "base"]

    run(body)


def test_destroying_leaves_a_device_alone_that_another_pool_took_over(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path, name="first")
        other = tmp_path / "other"
        await Pool.create(other, "second", [DeviceSpec(tmp_path / "fast.img", "fast")], force=True)
        await Pool.destroy(home)
        async with Pool.open(other) as pool:
            assert pool.name == "second"

    run(body)


def test_an_older_catalog_is_refused_even_if_no_record_lies_between(tmp_path: Path) -> None:
    """A life that wrote nothing before its first checkpoint still supersedes the catalog of the life before."""

    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            await pool.create_volume("v", MIB)
        shutil.copy(home / "catalog.sqlite", tmp_path / "backup")
        async with Pool.open(home, settings=QUIET):
            pass
        shutil.copy(tmp_path / "backup", home / "catalog.sqlite")
        error = await open_refusal(home)
        assert error.errno == errno.ESTALE

    run(body)


def test_an_error_of_the_body_leaves_the_context_as_itself(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        with pytest.raises(TierError):
            async with Pool.open(home) as pool:
                pool.volume("none")

    run(body)


def test_a_recovery_that_can_not_be_recorded_leaves_the_pool_readable_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home) as pool:
            await (await pool.create_volume("v", MIB)).write(0, block(1))

        def full(self: Catalog, change: object) -> None:
            raise TierError(errno.ENOSPC, "the catalog: no space left")

        with monkeypatch.context() as patch:
            patch.setattr(Catalog, "commit", full)
            async with Pool.open(home) as pool:
                assert pool.status().state == "read-only"
                assert "no space left" in str(pool.status().problem)
                assert await read(pool.volume("v"), 0, BLOCK_BYTES) == block(1)
                assert (await refusal(lambda: pool.volume("v").write(0, block(2)))).errno == errno.EROFS
        async with Pool.open(home) as pool:
            await pool.volume("v").write(0, block(2))

    run(body)


def test_a_pool_that_was_closed_under_its_users_answers_errors_and_touches_no_file(tmp_path: Path) -> None:
    """A task of the pool may die of a bug. The descriptors' numbers are soon somebody else's."""

    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home) as pool:
            volume = await pool.create_volume("v", MIB)
            await volume.write(0, block(1))
            old_fds = [device.fd for device in pool._engine.devices]
        bystanders = [os.open(tmp_path / f"bystander{i}", os.O_RDWR | os.O_CREAT) for i in range(8)]
        try:
            assert set(old_fds) <= set(bystanders)
            assert not volume.write_now([(0, block(2))])
            for action in (lambda: volume.write(0, block(2)), volume.flush, lambda: volume.trim(0, MIB)):
                with pytest.raises(TierError, match="closed"):
                    await action()
            with pytest.raises(OSError):
                await volume.read(0, 4096, memoryview(bytearray(4096)))
            assert [os.fstat(fd).st_size for fd in bystanders] == [0] * 8
        finally:
            for fd in bystanders:
                os.close(fd)

    run(body)


def test_mapped_bytes_are_exact_after_a_checkpoint_whatever_was_overwritten(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 8 * MIB)
            for _ in range(3):
                await volume.write(0, b"x" * (2 * MIB))
            await volume.trim(MIB, MIB)
            await pool.checkpoint()
            assert pool.status().volumes[0].mapped_bytes == MIB

    run(body)


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope when so many task steps have been made."""

    def __init__(self, scope: trio.CancelScope, steps: int) -> None:
        self._scope = scope
        self._left = steps

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._left -= 1
        if self._left == 0:
            self._scope.cancel()


def test_an_opening_that_is_cancelled_at_any_step_loses_nothing_and_leaves_nothing_locked(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        device, copy = tmp_path / "fast.img", tmp_path / "copy"
        async with Pool.open(home, settings=QUIET) as pool:
            volume = await pool.create_volume("v", 64 * MIB)
            for i in range(300):
                await volume.write(i * 7 % 300 * BLOCK_BYTES, block(i))
            await volume.flush()
            # As after a kill: the log isn't in a checkpoint.
            shutil.copytree(home, copy / "home")
            shutil.copy(device, copy / "device")
        shutil.rmtree(home)
        shutil.copytree(copy / "home", home)
        shutil.copy(copy / "device", device)
        cancelled = steps = 0
        while True:
            steps += 1
            with trio.CancelScope() as scope:
                instrument = CancelAtStep(scope, steps)
                trio.lowlevel.add_instrument(instrument)
                async with Pool.open(home, settings=QUIET) as pool:
                    trio.lowlevel.remove_instrument(instrument)
                    scope.shield = True
                    assert pool.replayed_batches in (0, 301)  # 0: an earlier attempt came as far as its checkpoint
                    for i in range(300):
                        assert await read(pool.volume("v"), i * 7 % 300 * BLOCK_BYTES, BLOCK_BYTES) == block(i)
                    await assert_sound(pool)
                    break
            trio.lowlevel.remove_instrument(instrument)
            assert scope.cancelled_caught
            cancelled += 1
        assert cancelled > 20

    run(body)


def test_a_pool_closes_behind_a_checkpoint_that_somebody_has_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with trio.open_nursery() as outside, Pool.open(home, settings=QUIET) as pool:
            volume = await pool.create_volume("v", 1 << 30)
            for at in range(200):
                await volume.write(at << 20, block(at))
            write_behind = FileDevice.write_behind

            async def slowly(device: FileDevice, *about: Any) -> None:
                await trio.sleep(0.2)
                await write_behind(device, *about)

            monkeypatch.setattr(FileDevice, "write_behind", slowly)
            outside.start_soon(pool.checkpoint)
            while not pool._checkpointer.writer._under_way:
                await trio.lowlevel.checkpoint()
        async with Pool.open(home, settings=QUIET) as pool:
            assert await read(pool.volume("v"), 7 << 20, 4096) == block(7)
            await assert_sound(pool)

    run(body)
