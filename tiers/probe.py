"""What may become a device of a pool: refuses what somebody else still uses.

A block device that is mounted, or carries a filesystem, RAID, LVM or partition signature (blkid's view), and a file
that is not empty of signatures, are refused unless forced; a mounted one is refused always. So is a file of Terrace's
own file system, and a loop device over one: its bytes come from a daemon, which as the pool's owner would wait for
itself, for ever.
"""

import contextlib
import errno
import os
import stat
import subprocess
from pathlib import Path

import psutil

from tiers.errors import TierError
from tiers.label import LABEL_BYTES, LABEL_OFFSETS, BadLabelError, Label, newest_label
from tiers.mounts import mounts


def read_label(path: Path) -> Label:
    """Return the label of a file or block device. Raises BadLabelError, or OSError from the system."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return newest_label([os.pread(fd, LABEL_BYTES, offset) for offset in LABEL_OFFSETS])
    finally:
        os.close(fd)


def size_of(fd: int) -> int:
    """Bytes of an open file or block device."""
    return os.lseek(fd, 0, os.SEEK_END)


def mounted_at(path: Path) -> str | None:
    """Where the block device, or a partition of it, is mounted (or that it is swap); None if it isn't."""
    real = path.resolve()
    for partition in psutil.disk_partitions(all=True):
        device = partition.device
        if device.startswith("/") and (Path(device).resolve() == real or _is_partition_of(Path(device), real)):
            return str(partition.mountpoint)
    swaps = Path("/proc/swaps")
    if swaps.exists():
        for line in swaps.read_text().splitlines()[1:]:
            if Path(line.split()[0]).resolve() == real:
                return "swap"
    return None


def _is_partition_of(partition: Path, disk: Path) -> bool:
    return (Path("/sys/class/block") / disk.name / partition.resolve().name).exists()


def _require_unclaimed(path: Path) -> None:
    """Raise EBUSY if the kernel says that a block device, or a partition of it, is held by somebody (open(2), O_EXCL).

    That knows of mounts in places that this process doesn't see, as a service in a sandbox doesn't, of RAID, LVM, swap.
    """
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            message = f"{path} is in use: it is mounted, or part of a RAID or LVM; free it, or choose another device"
            raise TierError(errno.EBUSY, message) from None
        raise TierError(error.errno or errno.EIO, f"opening {path}: {error.strerror}") from error


def signature_of(path: Path) -> str | None:
    """The filesystem, RAID, LVM or partition-table signature that blkid finds, as "ext4" or "gpt partition table"."""
    found = _blkid(path, "TYPE")
    if found:
        return found
    table = _blkid(path, "PTTYPE")
    return f"{table} partition table" if table else None


def _blkid(path: Path, tag: str) -> str:
    for program in ("blkid", "/sbin/blkid", "/usr/sbin/blkid"):
        try:
            done = subprocess.run(
                [program, "--probe", "-o", "value", "-s", tag, "--", str(path)],
                capture_output=True,
                text=True,
                check=False,
                timeout=30,
            )
        except FileNotFoundError:
            continue
        # 2: nothing found. 8: ambivalent result, that is several signatures.
        if done.returncode == 8:
            return "several signatures"
        return done.stdout.strip()
    raise TierError(
        errno.ENOENT, "blkid is missing, so it can't be told whether a device is in use: install util-linux"
    )


def _is_volume(path: Path) -> bool:
    """Whether a file, or what a loop device is over, is a volume in a file system of Terrace (fuse.terrace)."""
    status = path.stat()
    number = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    backing = None
    if stat.S_ISBLK(status.st_mode):
        device = Path(f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}").resolve()
        for disk in (device, device.parent):  # itself, or the disk whose partition it is
            with contextlib.suppress(OSError):
                backing = (disk / "loop/backing_file").read_text().rstrip("\n")
        if backing is None:
            return False
    ours = [mount for mount in mounts() if mount.kind == "fuse.terrace"]
    if backing is None:
        return any(mount.number == number for mount in ours)
    return any(backing.startswith(f"{mount.where}/") for mount in ours)


def check_usable(path: Path, *, force: bool) -> None:
    """Raise TierError if `path` (which exists) must not become a device. `force` overrides signatures, not mounts."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise TierError(errno.EINVAL, f"{path} is neither a file nor a block device")
    if _is_volume(path):
        raise TierError(
            errno.EINVAL,
            f"{path} is a volume of Terrace: a pool on it would wait for itself; choose a disk, or a file elsewhere",
        )
    if stat.S_ISBLK(mode):
        where = mounted_at(path)
        if where:
            raise TierError(errno.EBUSY, f"{path} is in use ({where}): unmount it first, or choose another device")
        _require_unclaimed(path)
    try:
        label = read_label(path)
    except BadLabelError as error:
        if not error.foreign and not force:
            raise TierError(
                errno.EEXIST,
                f"{path} looks like a device of a Terrace pool, but {error}: choose another device, or "
                f"--force to wipe it",
            ) from None
    else:
        if not force:
            raise TierError(
                errno.EEXIST,
                f"{path} belongs to the Terrace pool {label.pool_name!r}: delete that pool, choose another "
                f"device, or --force to wipe it",
            )
    signature = signature_of(path)
    if signature and not force:
        raise TierError(errno.EEXIST, f"{path} carries {signature}: choose another device, or --force to overwrite it")
