"""Whether what a device of a pool lies on rotates, as far as Linux knows.

The kernel says of each disk whether it rotates (sysfs, `queue/rotational`), and for want of knowledge that it does: so
disks of which it can't know are left out, virtio's. A device is a file system's, a partition's, a RAID's or a loop's
before it is a disk's, so what is below is followed down; it rotates if all of that does. What can't be told doesn't
rotate: who is told so wrongly sorts requests for an arm that isn't there.
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tiers.mounts import mounts
from tiers.policy import Placement

if TYPE_CHECKING:
    from tiers.device import Device

SYSFS = Path("/sys")
UNKNOWING_DRIVERS = ("virtio_blk",)
"""Their disks all say that they rotate: the protocol that they speak doesn't tell."""
MAX_DEPTH = 16


def all_rotate(devices: "Iterable[Device]", placement: Placement) -> bool:
    """Whether all those devices rotate that a volume's data may be on, by its policy: of its tier, or of any."""
    online = [device for device in devices if device.state == "online"]
    chosen = [device for device in online if placement in ("auto", device.tier)] or online
    return bool(chosen) and all(device.rotational for device in chosen)


def rotates(fd: int) -> bool:
    """Whether an open file or block device lies on disks that rotate, all of them. A few small reads of sysfs."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return _rotates(_number(status.st_rdev), SYSFS, MAX_DEPTH)
    return _rotates(_number_below(_number(status.st_dev)), SYSFS, MAX_DEPTH)


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _number_of_file(path: str) -> str:
    """The number below a file's file system, told by its path: it may be a file system that can't answer now."""
    around = [mount for mount in reversed(mounts()) if path.startswith(mount.where.rstrip("/") + "/")]
    return _number_below(max(around, key=lambda mount: len(mount.where)).number) if around else ""


def _number_below(number: str) -> str:
    """Of the block device that a file system is on; its own number, unless it has one that is no device's (btrfs)."""
    if not number.startswith("0:"):
        return number
    for mount in mounts():
        if mount.number == number and mount.source.startswith("/"):
            try:
                status = Path(mount.source).stat()
            except OSError:
                continue
            if stat.S_ISBLK(status.st_mode):
                return _number(status.st_rdev)
    return number


def _rotates(number: str, sysfs: Path, depth: int) -> bool:
    """The same for a block device of that number, MAJOR:MINOR."""
    if not depth:
        return False
    try:
        device = (sysfs / "dev/block" / (number or "unknown")).resolve(strict=True)
        if (device / "partition").exists():
            device = device.parent
        below = [(other / "dev").read_text().strip() for other in _entries(device / "slaves")]
        backing = device / "loop/backing_file"
        if backing.exists():
            below.append(_number_of_file(backing.read_text().rstrip("\n")))
        if below:
            return all(_rotates(other, sysfs, depth - 1) for other in below)
        driver = device / "device/driver"
        if driver.exists() and driver.resolve().name in UNKNOWING_DRIVERS:
            return False
        return (device / "queue/rotational").read_text().strip() == "1"
    except OSError:
        return False


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []
