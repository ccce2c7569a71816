"""Loop devices: a file as a block device, by the kernel's loop driver (loop(4), `linux/loop.h`).

Direct I/O, so that nothing is cached twice and a flush of the device is a flush of the file; discards become holes
where the file's filesystem has `fallocate`. Blocks of 512 bytes, see `terrace.attach.driver`.

    loop_config (LOOP_CONFIGURE), since Linux 5.8
      offset size field
           0    4 descriptor of the file
           4    4 block size
           8  232 loop_info64
         240   64 reserved
    loop_info64, of which is used
          52    4 flags (LO_FLAGS_*)
          56   64 a name for people
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from pathlib import Path
from typing import Final

from terrace.attach.driver import LOGICAL_BLOCK_BYTES
from terrace.attach.record import AttachError

CONTROL: Final = Path("/dev/loop-control")
SYSFS: Final = Path("/sys/block")
LOOP_CTL_GET_FREE: Final = 0x4C82
LOOP_CONFIGURE: Final = 0x4C0A
LOOP_CLR_FD: Final = 0x4C01
LOOP_SET_CAPACITY: Final = 0x4C07
LO_FLAGS_READ_ONLY: Final = 1
LO_FLAGS_PARTSCAN: Final = 8
LO_FLAGS_DIRECT_IO: Final = 16

_CONFIG: Final = struct.Struct("=II5Q4I64s64s32s2Q64x")
assert _CONFIG.size == 304

TRIES: Final = 64
"""A free device may be taken by somebody else before it is ours."""
CLEAR_PATIENCE_S: Final = 10.0
_POLL_S: Final = 0.02


def make(path: Path, *, read_only: bool = False) -> str:
    """Make a device of a file; its path. Raises AttachError. Blocks."""
    file = _open(path, os.O_RDONLY if read_only else os.O_RDWR, "the file of a loop device")
    try:
        control = _open(CONTROL, os.O_RDWR, "the loop driver")
        try:
            return _make(control, file, path, read_only)
        finally:
            os.close(control)
    finally:
        os.close(file)


def _make(control: int, file: int, path: Path, read_only: bool) -> str:
    flags = LO_FLAGS_DIRECT_IO | LO_FLAGS_PARTSCAN | (LO_FLAGS_READ_ONLY if read_only else 0)
    label = os.fsencode(path)[:63]
    config = _CONFIG.pack(file, LOGICAL_BLOCK_BYTES, 0, 0, 0, 0, 0, 0, 0, 0, flags, label, b"", b"", 0, 0)
    for _ in range(TRIES):
        try:
            index = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
        except OSError as error:
            raise _failed(error, "there is no free loop device") from None
        device = f"/dev/loop{index}"
        node = _open(Path(device), os.O_RDWR, "a loop device")
        try:
            fcntl.ioctl(node, LOOP_CONFIGURE, config)
        except OSError as error:
            if error.errno == errno.EBUSY:
                continue  # somebody was faster
            raise _failed(error, f"{device} can't be made of {path}") from None
        finally:
            os.close(node)
        return device
    raise AttachError(errno.EBUSY, f"{TRIES} times another process took the free loop device first: try again")


def clear(device: str, *, inside: Path = Path("/")) -> None:
    """End a device and wait until it has gone. Raises AttachError: EBUSY if somebody has it open. Blocks.

    The kernel would otherwise keep it until its last user closes it. `inside`: only if it is made of a file in there;
    else it was ended already, and is somebody else's.
    """
    node = _open(Path(device), os.O_RDONLY, "a loop device")
    try:
        # While we have it open nobody else can end it and make another one of that number.
        if not made_of_file_in(inside, device):
            return
        fcntl.ioctl(node, LOOP_CLR_FD)
    except OSError as error:
        if error.errno != errno.ENXIO:  # it is none any more
            raise _failed(error, f"{device} can't be detached") from None
    finally:
        os.close(node)
    deadline_s = time.monotonic() + CLEAR_PATIENCE_S
    while made_of_file_in(inside, device):
        if time.monotonic() > deadline_s:
            raise AttachError(
                errno.EBUSY, f"{device} is still open; `lsof {device}` shows where, and it goes when that ends"
            )
        time.sleep(_POLL_S)


def take_size(device: str) -> None:
    """Give the device the size that its file has now. Raises AttachError. Blocks."""
    node = _open(Path(device), os.O_RDONLY, "a loop device")
    try:
        fcntl.ioctl(node, LOOP_SET_CAPACITY)
    except OSError as error:
        raise _failed(error, f"{device} can't be resized") from None
    finally:
        os.close(node)


def backing_of(device: str) -> str | None:
    """The file that the device is made of, as the kernel names it; None if it is no device at present."""
    try:
        text = (SYSFS / Path(device).name / "loop" / "backing_file").read_text()
    except OSError:
        return None
    return text.removesuffix("\n").removesuffix(" (deleted)")


def made_of_file_in(directory: Path, device: str) -> bool:
    """Whether the device is one at present, and made of a file somewhere below `directory`."""
    found = backing_of(device)
    return found is not None and directory in Path(found).parents


def find_device(path: Path) -> str | None:
    """The device that is made of `path`; None if there is none."""
    for sysfs in SYSFS.glob("loop*/loop/backing_file"):
        device = f"/dev/{sysfs.parent.parent.name}"
        if backing_of(device) == str(path):
            return device
    return None


def available() -> str | None:
    """None if loop devices can be made here, else why not."""
    try:
        os.close(_open(CONTROL, os.O_RDWR, "the loop driver"))
    except AttachError as error:
        return str(error)
    return None


def _open(path: Path, flags: int, what: str) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise AttachError(error.errno or errno.EIO, f"{path}, {what}, can't be opened: {error.strerror}") from None


def _failed(error: OSError, what: str) -> AttachError:
    return AttachError(error.errno or errno.EIO, f"{what}: {error.strerror}; dmesg may say more")
