"""Whether an export says that it rotates: what sysfs says of the disks under it, and which of them it may be on."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

import tiers.rotational
from tests.tiers.helpers import fresh_pool, run
from tiers import Policy
from tiers.device import Device
from tiers.layout import MIB
from tiers.mounts import Mount
from tiers.policy import Placement
from tiers.rotational import all_rotate, rotates


class Sysfs:
    """Block devices as /sys shows them, made of files; `numbers` of those that were made."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "dev/block").mkdir(parents=True)

    def disk(self, name: str, number: str, rotational: str, driver: str = "sd") -> Path:
        disk = self._device(self.root / "devices" / name, number)
        (disk / "queue").mkdir()
        (disk / "queue/rotational").write_text(rotational)
        (self.root / "bus" / driver).mkdir(parents=True, exist_ok=True)
        (disk / "device").mkdir()
        (disk / "device/driver").symlink_to(self.root / "bus" / driver)
        return disk

    def partition(self, disk: Path, number: str) -> None:
        part = self._device(disk / f"{disk.name}1", number)
        (part / "partition").write_text("1\n")

    def stacked(self, name: str, number: str, *below: Path) -> None:
        device = self.disk(name, number, "1\n")
        for other in below:
            (device / "slaves" / other.name).symlink_to(other)

    def loop(self, name: str, number: str, backing: str) -> None:
        device = self.disk(name, number, "1\n")
        (device / "loop").mkdir()
        (device / "loop/backing_file").write_text(f"{backing}\n")

    def _device(self, place: Path, number: str) -> Path:
        (place / "slaves").mkdir(parents=True)
        (place / "dev").write_text(f"{number}\n")
        (self.root / "dev/block" / number).symlink_to(place)
        return place

    def says(self, number: str) -> bool:
        return tiers.rotational._rotates(number, self.root, 16)


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    found = Sysfs(tmp_path / "sys")
    slow = found.disk("sda", "8:0", "1\n")
    found.partition(slow, "8:1")
    quick = found.disk("nvme0n1", "259:0", "0\n", "nvme")
    virtual = found.disk("vda", "254:0", "1\n", "virtio_blk")
    found.stacked("md0", "9:0", slow, found.disk("sdb", "8:16", "1\n"))
    found.stacked("dm-0", "252:0", slow, quick)
    found.stacked("dm-1", "252:1", virtual)
    return found


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        ("8:0", True),
        ("8:1", True),
        ("259:0", False),
        ("254:0", False),
        ("9:0", True),
        ("252:0", False),
        ("252:1", False),
        ("7:77", False),
        ("0:31", False),
        ("", False),
    ],
    ids=[
        "a disk that does",
        "its partition",
        "one that doesn't",
        "one that can't know",
        "all disks of a RAID do",
        "some do",
        "the one below can't know",
        "no such device",
        "a file system without one",
        "not even a number",
    ],
)
def test_a_device_rotates_if_all_the_disks_below_do_and_can_know(sysfs: Sysfs, number: str, expected: bool) -> None:
    assert sysfs.says(number) is expected


def test_a_loop_device_is_what_the_file_system_of_its_file_is_on(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted = [Mount("254:0", "/", "ext4", "/dev/vda"), Mount("8:1", "/data", "ext4", "/dev/sda1")]
    monkeypatch.setattr(tiers.rotational, "mounts", lambda: mounted)
    for name, number, backing in (("loop0", "7:0", "/data/x"), ("loop1", "7:1", "/x"), ("loop2", "7:2", "/datas/x")):
        sysfs.loop(name, number, backing)
    assert [sysfs.says(f"7:{i}") for i in range(3)] == [True, False, False]
    mounted.clear()
    assert not sysfs.says("7:0")


def test_devices_that_name_each_other_come_to_an_end(sysfs: Sysfs) -> None:
    one, other = sysfs.disk("dm-8", "252:8", "1\n"), sysfs.disk("dm-9", "252:9", "1\n")
    (one / "slaves/dm-9").symlink_to(other)
    (other / "slaves/dm-8").symlink_to(one)
    assert not sysfs.says("252:8")


@pytest.mark.parametrize("path", ["/proc/self/status", "/dev/shm", __file__])
def test_of_this_machine_something_is_said_of_any_file(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        assert rotates(fd) in (True, False)
        if not stat.S_ISBLK(os.fstat(fd).st_mode) and not path.endswith(".py"):
            assert not rotates(fd), "it is in memory"
    finally:
        os.close(fd)


def fake(tier: str, rotational: bool, state: str = "online") -> Device:
    return cast("Device", SimpleNamespace(tier=tier, rotational=rotational, state=state))


@pytest.mark.parametrize(
    ("devices", "placement", "expected"),
    [
        ([fake("fast", False), fake("base", True)], "auto", False),
        ([fake("fast", False), fake("base", True)], "base", True),
        ([fake("fast", False), fake("base", True)], "fast", False),
        ([fake("base", True), fake("base", True)], "auto", True),
        ([fake("base", True), fake("base", True)], "fast", True),
        ([fake("base", True), fake("base", False)], "base", False),
        ([fake("base", True), fake("base", False, "lost")], "auto", True),
        ([], "auto", False),
    ],
)
def test_a_volume_rotates_if_all_devices_that_its_policy_may_choose_do(
    devices: list[Device], placement: Placement, expected: bool
) -> None:
    assert all_rotate(devices, placement) is expected


def test_a_volume_and_its_snapshot_say_so_by_the_policy_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiers.device.rotates", lambda fd: "base" in Path(f"/proc/self/fd/{fd}").readlink().name)

    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=64, base_mib=64) as pool:
            volume = await pool.create_volume("v", MIB)
            (snapshot,) = await pool.take_snapshots([("v", "s")])
            assert (volume.rotational, snapshot.rotational) == (False, False)
            pool.define_policies({"default": Policy("default", placement="base")})
            assert (volume.rotational, snapshot.rotational) == (True, True)

    run(body)
