"""The driver for kernels without an NBD client: the volume as a file in a FUSE mount, and a loop device over it.

The keeper serves the file itself, so all data passes through it, and the device fails when it is killed. What is
beneath the file, an NBD client that connects again when the daemon was restarted, is `terrace.fuse`'s; this module owns
the mount point and the loop device.

The mount is `DIRECTORY/fuse/POOL/VOL`, below the directory of the records, and the file in it is POOL/VOL again. The
kernel shows the file's path as `loop/backing_file` in sysfs; by that a device is known to be ours, by udev's rules too.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import trio

from terrace.attach import loopdev
from terrace.attach.driver import Attached, Order
from terrace.attach.filesystem import mount_points, users_of
from terrace.attach.record import AttachError, directory_of
from terrace.extras import how_to_install
from terrace.home import Home

log = logging.getLogger("terrace.attach")

FUSE: Final = Path("/dev/fuse")


class BackingFile(Protocol):
    """A volume as a file, while the context lives that made it."""

    @property
    def path(self) -> Path:
        """The file; reading and writing it reads and writes the volume, fsync flushes it, a punched hole trims it."""

    @property
    def size_bytes(self) -> int:
        """The file's size, which is the volume's."""

    async def wait_for_size(self, other_than: int) -> int:
        """Wait until the size isn't `other_than`; the size."""

    def look_now(self) -> None:
        """Look at the volume's size at once."""


Backing = Callable[[Order, Path], AbstractAsyncContextManager[BackingFile]]
"""Mounts the volume of an order on an empty directory, and unmounts it at the end, forcibly if it must. It raises
AttachError or another OSError with a sentence where the first connection fails; later ones are tried again for as long
as the order says, while whoever reads or writes waits."""


def backing() -> Backing:
    """What serves the file, `terrace.fuse`. Raises AttachError where its library is missing."""
    try:
        from terrace.fuse.backing import volume_file
    except ImportError as error:
        raise AttachError(
            errno.ENODEV, f"a file in a FUSE mount needs pyfuse3 ({error}): {how_to_install('pyfuse3')}"
        ) from None

    def serve(order: Order, place: Path) -> AbstractAsyncContextManager[BackingFile]:
        return volume_file(order.home, order.name, place, read_only=order.read_only, patience_s=order.dead_timeout_s)

    return serve


def mount_point(home: Home, name: str) -> Path:
    """Where the volume's file is mounted, as the kernel names it: the home may be a symbolic link."""
    pool, _, volume = name.partition("/")
    return Path(os.path.realpath(directory_of(home))) / "fuse" / pool / volume


def find_device(home: Home, name: str) -> str | None:
    """The loop device over a file in the mount, also where the keeper is gone; None if there is none."""
    for sysfs in loopdev.SYSFS.glob("loop*/loop/backing_file"):
        device = f"/dev/{sysfs.parent.parent.name}"
        if is_device_of(home, name, device):
            return device
    return None


def is_device_of(home: Home, name: str, device: str) -> bool:
    """Whether a device is made of the volume's file; its number may have come to mean another one."""
    return loopdev.made_of_file_in(mount_point(home, name), device)


def available() -> OSError | None:
    """None if this host can do it, else why not."""
    if (reason := loopdev.available()) is not None:
        return AttachError(errno.ENODEV, reason)
    try:
        os.close(os.open(FUSE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return AttachError(errno.ENODEV, f"{FUSE} can't be opened: {error.strerror}")
    try:
        backing()
    except AttachError as error:
        return error
    return None


def driver(backing: Backing) -> Callable[[Order], AbstractAsyncContextManager[Attached]]:
    """The driver over what serves the file. See `terrace.attach.driver`."""

    @asynccontextmanager
    async def attached(order: Order) -> AsyncIterator[Attached]:
        place = mount_point(order.home, order.name)
        await trio.to_thread.run_sync(clear_left_over, order.home, order.name)
        place.mkdir(parents=True, exist_ok=True)
        try:
            async with backing(order, place) as file:
                device = await _in_thread(lambda: loopdev.make(file.path, read_only=order.read_only))
                found = Attached(device, partial(is_device_of, order.home, order.name, device), outlives=False)
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(_follow_size, file, found)
                        nursery.start_soon(_pass_on_looks, file, found)
                        yield found
                        nursery.cancel_scope.cancel()
                finally:
                    # In a thread: closing the device may write, and it is this program that serves that.
                    with trio.CancelScope(shield=True):
                        await _in_thread(lambda: loopdev.clear(device, inside=place))
        finally:
            with contextlib.suppress(OSError):
                place.rmdir()

    return attached


async def _in_thread(call: Callable[[], object]) -> str:
    return str(await trio.to_thread.run_sync(call))


async def _follow_size(file: BackingFile, found: Attached) -> None:
    size_bytes = file.size_bytes
    while True:
        size_bytes = await file.wait_for_size(size_bytes)
        try:
            await trio.to_thread.run_sync(loopdev.take_size, found.device)
        except OSError as error:
            log.warning("%s", error)


async def _pass_on_looks(file: BackingFile, found: Attached) -> None:
    while True:
        await found.look.wait()
        file.look_now()


def clear_left_over(home: Home, name: str) -> None:
    """Remove what a keeper that was killed has left: a loop device that only fails, and a mount that nobody serves.

    Raises AttachError: EIO where the device is still mounted, EBUSY where it is still open. Blocks.
    """
    place = mount_point(home, name)
    device = find_device(home, name)
    if device is not None:
        # lsof doesn't show a mount, and its filesystem doesn't come back by waiting.
        if mounts := users_of(device).mounts:
            where = ", ".join(mounts)
            raise AttachError(
                errno.EIO,  # not EBUSY, which `terrace attach` takes for another call at work, and waits a minute
                f"{device} only fails since its keeper was killed, and is still mounted at {where}: "
                f"terrace detach {name} --unmount first, then attach it again",
            )
        loopdev.clear(device, inside=place)
    unmount = shutil.which("fusermount3") or shutil.which("umount")
    if unmount is not None and _is_mounted(place):
        # Nobody serves it, so that somebody may still stand in it is no reason to keep it.
        options = ["-u", "-z"] if "fuser" in unmount else ["-l"]
        subprocess.run([unmount, *options, str(place)], capture_output=True, check=False)


def _is_mounted(place: Path) -> bool:
    return str(place) in mount_points()
