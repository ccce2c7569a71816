"""One volume as a file for a loop device: `terrace.attach` uses it where the kernel has no NBD client."""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from terrace.fuse.filesystem import FRESH_S
from terrace.fuse.remote import DaemonDirectory, daemon_directory
from terrace.fuse.session import mounted
from terrace.home import Home

log = logging.getLogger("terrace.fuse")

POLL_S: Final = 5.0
"""A resize is seen after at most so long, or when somebody says `look_now`."""


class VolumeFile:
    """The file, while the context lives that made it. Reading and writing it reads and writes the volume."""

    def __init__(self, path: Path, name: str, directory: DaemonDirectory, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self._name = name
        self._directory = directory
        self._look = trio.Event()

    def look_now(self) -> None:
        """Look at the volume's size at once."""
        self._look.set()

    async def wait_for_size(self, other_than: int) -> int:
        """Wait until the size isn't `other_than`, to the kernel's knowledge too; returns it."""
        while True:
            try:
                self.size_bytes = (await self._directory.export(self._name)).size_bytes
            except OSError as error:
                log.debug("%s: %s", self.path, error)  # the daemon is gone, and comes back
            else:
                # A loop device takes the size that the kernel remembers of the file.
                if self.size_bytes != other_than and await self._kernel_size() == self.size_bytes:
                    return self.size_bytes
            with trio.move_on_after(FRESH_S if self.size_bytes != other_than else POLL_S):
                await self._look.wait()
                self._look = trio.Event()

    async def _kernel_size(self) -> int:
        # In a thread: it is this program's loop that answers the kernel's question.
        return (await trio.to_thread.run_sync(self.path.stat)).st_size


@asynccontextmanager
async def volume_file(
    home: Home, name: str, mountpoint: Path, *, read_only: bool, patience_s: float = math.inf
) -> AsyncIterator[VolumeFile]:
    """Mount POOL/VOL or POOL/VOL@SNAP of the daemon at `home`, alone, on an empty directory; unmount it at the end.

    Raises FileNotFoundError, or another OSError with a sentence.
    """
    async with daemon_directory(home, only=name, patience_s=patience_s) as directory:
        record = await directory.export(name)
        if record.read_only and not read_only:
            raise OSError(errno.EROFS, f"{name} is a snapshot, which can only be read")
        async with mounted(directory, mountpoint, read_only=read_only) as session:
            yield VolumeFile(session.mountpoint / name, name, directory, record.size_bytes)
