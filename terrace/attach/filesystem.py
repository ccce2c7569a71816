"""Filesystems on an attached device: who uses it, what it carries, making one, mounting it.

By the tools of the distribution: blkid, mkfs.ext4, mkfs.xfs, mount, umount. All of it blocks. Every failure is an
AttachError with the tool's own words.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from terrace.attach.record import AttachError
from tiers.mounts import mounts
from tiers.probe import signature_of

Kind = Literal["ext4", "xfs"]

_PACKAGES: Final = {"ext4": "e2fsprogs", "xfs": "xfsprogs"}
# Blocks and sectors of 4 KiB, the unit of the map: what is smaller would have to be merged with what is there.
_MAKE: Final = {
    "ext4": (["mkfs.ext4", "-q", "-b", "4096"], "-F"),
    "xfs": (["mkfs.xfs", "-q", "-s", "size=4096"], "-f"),
}
_PATH: Final = "/usr/sbin:/sbin:/usr/bin:/bin"
SYSFS: Final = Path("/sys/class/block")
BLANK_BYTES: Final = 1 << 20
"""Where nothing is here, nothing was ever put: a database's file and a pool of ours begin here too, as does what is
encrypted without a header."""
OPENER_PATIENCE_S: Final = 1.0
_POLL_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class Users:
    """Who uses a block device or a partition of it."""

    mounts: list[str]
    """Mount points, in the order in which they were mounted."""
    holders: list[str]
    """Devices on top of it (device mapper, RAID, loop devices), and "swap"."""

    def __bool__(self) -> bool:
        return bool(self.mounts or self.holders)


def users_of(device: str) -> Users:
    """Who uses it, as this process sees it."""
    name = Path(device).resolve().name
    parts = _parts(name)
    numbers = {_read(SYSFS / part / "dev") for part in parts} - {""}
    # btrfs shows a device number of its own.
    places = [
        mount.where
        for mount in mounts()
        if mount.number in numbers or (mount.source.startswith("/dev/") and Path(mount.source).resolve().name in parts)
    ]
    holders = sorted(holder for part in parts for holder in _names(SYSFS / part / "holders"))
    for backing in sorted(SYSFS.glob("loop*/loop/backing_file")):
        if _device_name(_read(backing)) in parts:
            holders.append(backing.parent.parent.name)
    for line in _read(Path("/proc/swaps")).splitlines()[1:]:
        if Path(line.split()[0]).resolve().name in parts:
            holders.append("swap")
    return Users(places, [_shown(holder) for holder in holders])


def require_unused(device: str, name: str) -> None:
    """Raise AttachError: EBUSY, naming what is mounted or lies on top, and the next step."""
    users = users_of(device)
    if users.mounts:
        where = ", ".join(users.mounts)
        raise AttachError(errno.EBUSY, f"{name} ({device}) is mounted at {where}: unmount it first, or say --unmount")
    if users.holders:
        raise AttachError(
            errno.EBUSY,
            f"{name} ({device}) is in use by {', '.join(users.holders)}: close that first (cryptsetup close, "
            "vgchange -an, swapoff), or say --force, which makes its I/O fail",
        )
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise AttachError(
                errno.EBUSY,
                f"{name} ({device}) is in use, perhaps by a mount in another namespace or container: `lsof {device}` "
                "may tell; end that first, or say --force, which makes its I/O fail",
            ) from None
    # Neither a machine's disk nor dd claims what it has opened. What looks at every device does it for an instant.
    deadline_s = time.monotonic() + OPENER_PATIENCE_S
    while openers := openers_of(device):
        if time.monotonic() > deadline_s:
            more = f" and {len(openers) - 3} more" if len(openers) > 3 else ""
            raise AttachError(
                errno.EBUSY,
                f"{name} ({device}) is open in {', '.join(openers[:3])}{more}: end that first, or say --force, which "
                "makes its I/O fail",
            )
        time.sleep(_POLL_S)


def openers_of(device: str) -> list[str]:
    """The other processes that have the device or a partition of it open, as "qemu-system-x86 (process 12)"."""
    parts = _parts(Path(device).resolve().name)
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        # Only the links are read: who follows one to another's filesystem may wait for that.
        links = (_target(process / "fd" / number) for number in _names(process / "fd"))
        if any(_device_name(link) in parts for link in links):
            found.append(f"{_read(process / 'comm')} (process {process.name})")
    return found


def make(device: str, kind: Kind, *, force: bool) -> None:
    """Make a filesystem over the whole device. Over anything that is there only with `force`, mounted never."""
    program, *options = _MAKE[kind][0]
    found = _tool(program, _PACKAGES[kind])
    users = users_of(device)
    if users:
        where = f"mounted at {users.mounts[0]}" if users.mounts else f"in use by {users.holders[0]}"
        raise AttachError(errno.EBUSY, f"{device} is {where}: no filesystem is made over that")
    signature = signature_of(Path(device))
    if signature and not force:
        raise AttachError(
            errno.EEXIST,
            f"{device} carries {signature}: leave out --mkfs to use what is there, or say --force to overwrite it",
        )
    if not force:
        _require_blank(device)
    _run([found, *options, *([_MAKE[kind][1]] if force else []), device], f"making {kind} on {device}")


def _require_blank(device: str) -> None:
    """Raise AttachError if the beginning of the device isn't zeroes, or can't be read, of which blkid says nothing."""
    try:
        with Path(device).open("rb", buffering=0) as disk:
            beginning = disk.read(BLANK_BYTES)
    except OSError as error:
        raise AttachError(
            error.errno or errno.EIO,
            f"{device} can't be read ({error.strerror}), so nobody knows what it carries: no filesystem is made",
        ) from None
    if any(beginning):
        raise AttachError(
            errno.EEXIST,
            f"{device} carries data of an unknown kind: say --force to overwrite it",
        )


def mount(device: str, directory: Path, *, read_only: bool) -> bool:
    """Mount what the device carries; False if it is mounted there already."""
    where = str(directory)
    if where in users_of(device).mounts:
        return False
    if not directory.is_dir():
        raise AttachError(errno.ENOENT, f"{directory} is no directory: make it first (mkdir -p {directory})")
    if _is_mount_point(directory):
        raise AttachError(errno.EBUSY, f"something else is mounted at {directory}: choose another directory")
    signature = signature_of(Path(device))
    if signature is None:
        raise AttachError(
            errno.ENODEV, f"{device} carries no filesystem: --mkfs ext4 or --mkfs xfs makes one, or make it yourself"
        )
    options = ["ro"] if read_only else []
    if signature == "xfs":
        # A clone or snapshot has the id of its origin, which xfs takes for the same filesystem mounted twice.
        options.append("nouuid")
    command = [_tool("mount", "mount"), *(["-o", ",".join(options)] if options else []), "--", device, where]
    try:
        _run(command, f"mounting {device} at {directory}")
    except AttachError as error:
        if not read_only or signature not in ("ext4", "xfs"):
            raise
        raise AttachError(
            error.errno or errno.EIO,
            f"{error}; a filesystem that was in use when it was snapshotted has a journal to be replayed, which takes "
            "writing: attach a clone instead (terrace volume clone)",
        ) from None
    return True


def unmount(where: str) -> None:
    """Unmount. Raises AttachError: EBUSY where files are open."""
    program = _tool("umount", "mount")
    try:
        _run([program, "--", where], f"unmounting {where}")
    except AttachError as error:
        raise AttachError(
            errno.EBUSY, f"{error}; `fuser -vm {where}` shows who has files open there: end that first"
        ) from None


def unmount_all(device: str) -> list[str]:
    """Unmount the device wherever it is mounted; where that was. What was mounted last goes first."""
    done = []
    while places := users_of(device).mounts:
        unmount(places[-1])
        done.append(places[-1])
    return done


def size_bytes_of(device: str) -> int:
    """Bytes of the device as the kernel has it now; 0 if there is none."""
    text = _read(SYSFS / Path(device).name / "size").strip()
    return int(text) * 512 if text.isdecimal() else 0


def _run(command: Sequence[str], what: str) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        said = _reason((done.stderr or done.stdout).splitlines()) or f"exit status {done.returncode}"
        raise AttachError(errno.EIO, f"{what} failed: {said}")


def _reason(lines: Sequence[str]) -> str:
    """What a tool said, without the explanation of its options that mkfs.xfs appends to every error."""
    said = [line.strip() for line in lines if line.strip()]
    for index, line in enumerate(said):
        if line.lower().startswith("usage"):
            said = said[:index]
            break
    return "; ".join(line.rstrip(".") for line in said[:2])


def _tool(name: str, package: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_PATH}")
    if found is None:
        raise AttachError(errno.ENOENT, f"{name} is missing: install {package}")
    return found


def _parts(name: str) -> set[str]:
    """The device and its partitions."""
    return {name, *(part.parent.name for part in (SYSFS / name).glob(f"{name}*/partition"))}


def _device_name(path: str) -> str:
    """`nbd0` of `/dev/nbd0`; "" if it is no path of a device."""
    return path.rpartition("/")[2].removesuffix(" (deleted)") if path.startswith("/dev/") else ""


def _shown(holder: str) -> str:
    label = _read(SYSFS / holder / "dm" / "name").strip()
    return f"/dev/mapper/{label}" if label else holder


def _is_mount_point(directory: Path) -> bool:
    return str(directory.resolve()) in mount_points()


def mount_points() -> set[str]:
    """Wherever something is mounted, as this process sees it."""
    return {mount.where for mount in mounts()}


def _names(directory: Path) -> list[str]:
    try:
        return [path.name for path in directory.iterdir()]
    except OSError:
        return []


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").rstrip("\n")
    except OSError:
        return ""
