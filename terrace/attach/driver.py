"""What the keeper and the two drivers, `kernelnbd` and `fuseloop`, say to each other.

A driver is an async context manager, `attached(order)`: inside, the device is there and stays usable over restarts of
the daemon; at the end it is gone again, unless `leave` was set.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from nbd.client import Address
from terrace.attach.record import directory_of, identifier
from terrace.home import Home

DEFAULT_DEAD_TIMEOUT_S: Final = 30 * 86400
"""How long I/O waits for a daemon that is gone. Whoever stops a daemon for a week-end must find the filesystem as it
was; whoever wants an end before that says so, or detaches with --force."""
MAX_CONNECTIONS: Final = 16
LOGICAL_BLOCK_BYTES: Final = 512
"""Of the device. What is on a volume must be readable wherever it is attached, and partition tables count in logical
blocks: an image of a virtual machine's disk, a guest, nbd-client and losetup all mean 512. Filesystems are made with
blocks and sectors of 4096, and the page cache writes such."""


@dataclass(frozen=True, slots=True)
class Order:
    """What shall be attached, and how."""

    home: Home
    name: str
    """POOL/VOL or POOL/VOL@SNAP, of a volume or snapshot that exists: it is part of paths."""
    address: Address
    """Where the daemon serves NBD, also after its next start."""
    read_only: bool = False
    connections: int = 1
    dead_timeout_s: int = DEFAULT_DEAD_TIMEOUT_S

    @property
    def identifier(self) -> str:
        return identifier(self.home, self.name)

    @property
    def directory(self) -> Path:
        """That of the records."""
        return directory_of(self.home)


@dataclass(slots=True)
class Attached:
    """A device that is there."""

    device: str
    """Its path, /dev/nbd0."""
    is_ours: Callable[[], bool]
    """Whether the path still means it: numbers of devices that others have ended are used again."""
    outlives: bool
    """It works on when its keeper has ended; so a keeper that fails leaves it to what uses it."""
    look: trio.Event = field(default_factory=trio.Event)
    """Set and replaced by `look_now`: the volume's size may have changed."""
    identity: str | None = None
    """Of the export (`terrace.daemonexports`), where the next keeper has to know it."""
    leave: bool = False
    """The device shall stay when the context ends, as it does when the keeper is killed. Only the kernel's NBD client
    can; elsewhere it means nothing."""

    def look_now(self) -> None:
        """Ask the driver to look at the volume's size at once."""
        self.look.set()
        self.look = trio.Event()


Driver = Callable[[Order], AbstractAsyncContextManager[Attached]]
