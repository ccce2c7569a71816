"""What may become a device: nothing that somebody else still uses."""

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiers.helpers import make_pool, refusal, run
from tiers import DeviceSpec, Pool, TierError
from tiers.layout import MIB
from tiers.probe import check_usable, mounted_at, read_label, signature_of


def command(*words: str | Path) -> str:
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True).stdout


def filesystem(path: Path) -> Path:
    """A small ext4 image."""
    command("/sbin/mke2fs", "-q", "-F", "-t", "ext4", path, "40M")
    return path


def partition_table(path: Path) -> Path:
    """A disk image with an MBR of one partition."""
    sector = bytearray(512)
    sector[446 + 4] = 0x83
    sector[446 + 8 : 446 + 16] = (2048).to_bytes(4, "little") + (4096).to_bytes(4, "little")
    sector[510:] = b"\x55\xaa"
    path.write_bytes(bytes(sector))
    os.truncate(path, 40 * MIB)
    return path


def swap(path: Path) -> Path:
    """A swap area."""
    path.touch()
    os.truncate(path, 40 * MIB)
    command("/sbin/mkswap", path)
    return path


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A loop device with an ext4 that is mounted."""
    image = filesystem(tmp_path / "mounted.img")
    device = Path(command("/sbin/losetup", "--find", "--show", image).strip())
    try:
        (tmp_path / "mnt").mkdir()
        command("mount", device, tmp_path / "mnt")
        try:
            yield device
        finally:
            command("umount", tmp_path / "mnt")
    finally:
        command("/sbin/losetup", "--detach", device)


@pytest.mark.parametrize(
    ("make", "what"), [(filesystem, "ext4"), (partition_table, "dos partition table"), (swap, "swap")]
)
def test_a_signature_is_named_and_overridden_only_by_force(tmp_path: Path, make: object, what: str) -> None:
    path = make(tmp_path / "x.img")  # type: ignore[operator]
    before = path.read_bytes()
    assert signature_of(path) == what

    async def body() -> None:
        error = await refusal(lambda: Pool.create(tmp_path / "h", "p", [DeviceSpec(path, "fast")]))
        assert error.errno == errno.EEXIST
        assert f"{path} carries {what}" in str(error)
        assert "--force" in str(error)
        assert path.read_bytes() == before
        await Pool.create(tmp_path / "h", "p", [DeviceSpec(path, "fast")], force=True)
        assert signature_of(path) is None, "the old signature is gone, so nobody mounts it by mistake"
        async with Pool.open(tmp_path / "h") as pool:
            assert pool.name == "p"

    run(body)


def test_a_device_that_is_mounted_where_this_process_can_not_see_it_is_refused_even_by_force(tmp_path: Path) -> None:
    """As a service in a sandbox doesn't, or a container."""
    image = filesystem(tmp_path / "mounted.img")
    device = Path(command("/sbin/losetup", "--find", "--show", image).strip())
    script = f"mount {device} {tmp_path} && echo mounted && read -r line"
    elsewhere = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    try:
        with subprocess.Popen(elsewhere, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "mounted\n"
            assert mounted_at(device) is None
            with pytest.raises(TierError, match=f"^{device} is in use: it is mounted"):
                check_usable(device, force=True)
            process.communicate("\n")
        # The kernel takes a namespace down in its own time.
        deadline_s = time.monotonic() + 10
        while True:
            try:
                check_usable(device, force=True)
                break
            except TierError:
                assert time.monotonic() < deadline_s, "it is still in use long after it was unmounted"
                time.sleep(0.05)
    finally:
        command("/sbin/losetup", "--detach", device)


def test_a_mounted_device_is_refused_even_by_force(tmp_path: Path, mounted: Path) -> None:
    where = str(tmp_path / "mnt")
    assert mounted_at(mounted) == where
    (tmp_path / "link").symlink_to(mounted)
    assert mounted_at(tmp_path / "link") == where

    async def body() -> None:
        for force in (False, True):
            error = await refusal(
                lambda force=force: Pool.create(tmp_path / "h", "p", [DeviceSpec(mounted, "fast")], force=force)
            )
            assert error.errno == errno.EBUSY
            assert where in str(error)
            assert "unmount" in str(error)

    run(body)
    command("mountpoint", where)


def test_a_block_device_that_nobody_uses_becomes_a_device(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(40 * MIB)
    device = Path(command("/sbin/losetup", "--find", "--show", image).strip())
    try:

        async def body() -> None:
            assert mounted_at(device) is None
            await Pool.create(tmp_path / "h", "p", [DeviceSpec(device, "fast")])
            async with Pool.open(tmp_path / "h") as pool:
                volume = await pool.create_volume("v", MIB)
                await volume.write(5, b"bytes on a block device")
                assert pool.status().devices[0].size_bytes == 40 * MIB
                assert (await pool.check(True)).ok
            async with Pool.open(tmp_path / "h") as pool:
                into = bytearray(23)
                await pool.volume("v").read(5, 23, memoryview(into))
                assert into == b"bytes on a block device"

        run(body)
        assert read_label(image).pool_name == "p"
    finally:
        command("/sbin/losetup", "--detach", device)


def test_an_empty_file_and_one_with_other_bytes_are_usable(tmp_path: Path) -> None:
    path = tmp_path / "x.img"
    path.write_bytes(b"just some bytes, no signature" * 1000)
    check_usable(path, force=False)
    path.write_bytes(b"")
    check_usable(path, force=False)


def test_a_directory_a_pipe_and_a_character_device_are_not(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(TierError, match="neither a file nor a block device") as caught:
            check_usable(path, force=True)
        assert caught.value.errno == errno.EINVAL


def test_a_device_of_a_pool_is_named_with_its_pool(tmp_path: Path) -> None:
    async def body() -> None:
        await make_pool(tmp_path, name="mine")

    run(body)
    path = tmp_path / "fast.img"
    assert read_label(path).pool_name == "mine"
    with pytest.raises(TierError, match="belongs to the Terrace pool 'mine'") as caught:
        check_usable(path, force=False)
    assert caught.value.errno == errno.EEXIST
    check_usable(path, force=True)
    with path.open("r+b") as file:
        for offset in (0, 4096):
            file.seek(offset + 20)
            file.write(b"\xff")
    with pytest.raises(TierError, match="looks like a device of a Terrace pool, but its label fails its checksum"):
        check_usable(path, force=False)


def test_without_blkid_nothing_is_taken_for_unused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.img").write_bytes(b"x")

    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(TierError, match="blkid is missing"):
        check_usable(tmp_path / "x.img", force=False)
