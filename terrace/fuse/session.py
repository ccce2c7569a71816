"""A mounted file system from its first moment to its last.

Up: mount, so that a mount point that can't be had is found before anything else happens; then serve. Down, whoever
begins it (`umount` from outside, `Session.unmount`, the end of the block): the kernel tells that the file system is
gone (ENODEV from /dev/fuse), the loop ends, libfuse is told to leave. A file system that is in use when the block ends
is taken out of sight, and cut off: its users get ENOTCONN, as they would if this process died.

However it ends (by an error, a cancellation, an administrator who aborts the connection), nothing stays mounted that
nobody serves. ENODEV alone doesn't say that it is unmounted, so the table of mounts is asked.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

import pyfuse3
import trio

from terrace.fuse.device import Device, MountError, mount, unmount
from terrace.fuse.files import Directory
from terrace.fuse.filesystem import Tree
from terrace.fuse.transmission import Transmission
from tiers.mounts import mounts

log = logging.getLogger("terrace.fuse")

WORKERS: Final = 8
"""Tasks that answer for names and attributes. See terrace.fuse.transmission for what bounds them."""


class Session:
    """A file system that is mounted; `mounted` makes it."""

    def __init__(self, mountpoint: Path, tree: Tree) -> None:
        self.mountpoint = mountpoint
        self.ended = trio.Event()
        """Nobody is served any more: it was unmounted, or cut off."""
        self._number = _mounted_at(mountpoint)
        self._tree = tree

    @property
    def open_files(self) -> int:
        return self._tree.open_files

    @property
    def is_in_sight(self) -> bool:
        """Whether this file system, and no other one, is still mounted there."""
        return self._number is not None and _mounted_at(self.mountpoint) == self._number

    async def unmount(self, *, lazy: bool = False) -> str:
        """Returns why it didn't work; empty if it did. `lazy`: out of sight now, gone with the last user."""
        return await unmount(self.mountpoint, lazy=lazy)


@asynccontextmanager
async def mounted(directory: Directory, mountpoint: Path, *, read_only: bool = False) -> AsyncIterator[Session]:
    """Mount `directory`, and serve it as long as the block lasts. One at a time in a process: pyfuse3 has no more.

    Raises MountError with a sentence.
    """
    mountpoint = await require_mountpoint(mountpoint)
    # Only its owner may see it (no allow_other), and the kernel checks the modes.
    options = "fsname=terrace,subtype=terrace,default_permissions,nosuid,nodev" + (",ro" if read_only else "")
    device = Device(await mount(mountpoint, options))
    tree = Tree(directory, device, read_only=read_only)
    session = Session(mountpoint, tree)
    try:
        transmission = Transmission(device, tree.file)
        failure: Exception | None = None
        try:
            pyfuse3.init(tree, f"/dev/fd/{os.dup(transmission.libfuse_end.fileno())}", set())
        except BaseException:
            transmission.close()
            raise
        finally:
            transmission.libfuse_end.close()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_converse, session)
                nursery.start_soon(_serve, transmission, session)
                try:
                    yield session
                except Exception as error:
                    failure = error  # raised behind the nursery, which would wrap it
                finally:
                    if session.is_in_sight:
                        with trio.CancelScope(shield=True):
                            await _take_away(session)
                nursery.cancel_scope.cancel()
        finally:
            tree.close_all()
            pyfuse3.close(unmount=False)
    finally:
        device.close()
        if session.is_in_sight:  # it has never been served, or what should have unmounted it was killed
            with trio.CancelScope(shield=True):
                await session.unmount(lazy=True)
    if failure is not None:
        raise failure


async def _converse(session: Session) -> None:
    await pyfuse3.main(1, WORKERS)
    if not session.ended.is_set():
        raise RuntimeError("libfuse has left: names and attributes would never be answered")


async def _serve(transmission: Transmission, session: Session) -> None:
    try:
        await transmission.run()
    finally:
        session.ended.set()
        with suppress(OSError, ValueError):
            pyfuse3.terminate()


async def _take_away(session: Session) -> None:
    why = await session.unmount()
    if why:
        log.warning("%s is in use (%s): taking it away from its users", session.mountpoint, why)
        await session.unmount(lazy=True)


def _mounted_at(mountpoint: Path) -> str | None:
    """The number (major:minor) of the file system that is on top there."""
    return next((mount.number for mount in reversed(mounts()) if mount.where == str(mountpoint)), None)


async def require_mountpoint(mountpoint: Path) -> Path:
    """The absolute path of an empty directory. What a dead process left mounted there is unmounted.

    Raises MountError.
    """
    # As the kernel names it, for those who are asked later what they have open below it.
    path = Path(await trio.to_thread.run_sync(os.path.realpath, mountpoint))
    try:
        status = await trio.to_thread.run_sync(path.stat)
        if not stat.S_ISDIR(status.st_mode):
            raise MountError(errno.ENOTDIR, f"can't mount on {path}: it is not a directory")
        found = await trio.to_thread.run_sync(partial(os.listdir, path))
    except MountError:
        raise
    except OSError as error:
        if error.errno == errno.ENOTCONN and not await unmount(path, lazy=True):
            log.info("%s was left mounted by a process that is gone; it is unmounted", path)
            return await require_mountpoint(path)
        step = "; make it first with mkdir" if error.errno == errno.ENOENT else ""
        raise MountError(error.errno, f"can't mount on {path}: {error.strerror}{step}") from None
    if found:
        raise MountError(errno.ENOTEMPTY, f"can't mount on {path}: it is not empty; choose an empty directory")
    return path
