"""What the engine needs of the machine under it, in one place: a lock, the catalog, devices, workers, the time.

The engine itself opens no file and starts no thread: it asks a `Host`. `REAL_HOST` is this machine. The simulation
brings another, without threads, whose devices lose what real ones lose; so what it runs is the engine as it is, and
nothing of it is replaced.

`preadv` is `os.preadv`: the engine keeps the bound function and calls it for each small read, with RWF_NOWAIT.
Wrapping it would cost as much as the rest of the read.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from tiers.catalog import CATALOG_NAME, Catalog, Change, DeviceRow, State
from tiers.device import Device, Offload, lock_or_refuse, new_workers, open_device
from tiers.errors import TierError
from tiers.newdevices import DeviceSpec, label_devices, wipe_labels

LOCK_NAME = "lock"

Preadv = Callable[[int, Sequence[memoryview], int, int], int]
"""(descriptor, buffers, offset, flags) -> bytes read. Raises OSError, EAGAIN where RWF_NOWAIT would have to wait."""


class CatalogStore(Protocol):
    """What the engine needs of an open catalog. Its methods block, and raise TierError."""

    def load(self) -> State: ...
    def commit(self, change: Change) -> None: ...
    def add_devices(self, devices: Sequence[DeviceRow]) -> None: ...
    def mark_poisoned(self, index: int, why: str) -> None: ...
    def lay_ballast(self) -> None: ...
    def close(self) -> None: ...


class Host(Protocol):
    """A machine that a pool can be opened on."""

    @property
    def preadv(self) -> Preadv:
        """Read from a device's descriptor without waiting for it."""

    def lock(self, directory: Path) -> AbstractContextManager[None]:
        """Hold a pool's directory. Raises TierError: ENOENT if there is no pool, EBUSY if somebody else holds it."""

    def open_catalog(self, directory: Path) -> CatalogStore:
        """Open a pool's catalog. Blocks; raises TierError."""

    def open_device(self, path: Path) -> Device:
        """Open and lock a labelled device. Blocks; raises BadLabelError if its label can't be used, or TierError."""

    def label_devices(
        self,
        name: str,
        pool_uuid: bytes,
        specs: Sequence[DeviceSpec],
        first_index: int,
        present: Sequence[Path],
        *,
        force: bool,
    ) -> list[DeviceRow]:
        """Check new devices of a pool, then label all of them or none. Blocks; raises TierError."""

    def wipe_labels(self, paths: Sequence[Path]) -> None:
        """Take back what `label_devices` did. Blocks."""

    def workers(self) -> Offload:
        """A pool's own bounded set of workers for calls that block or compute for long."""

    def now(self) -> float:
        """Seconds since the epoch: what a volume's creation is stamped with."""


class RealHost:
    """This machine."""

    def __init__(self) -> None:
        self.preadv: Preadv = os.preadv

    def lock(self, directory: Path) -> AbstractContextManager[None]:
        return locked(directory)

    def open_catalog(self, directory: Path) -> CatalogStore:
        return Catalog(directory)

    def open_device(self, path: Path) -> Device:
        return open_device(path)

    def label_devices(
        self,
        name: str,
        pool_uuid: bytes,
        specs: Sequence[DeviceSpec],
        first_index: int,
        present: Sequence[Path],
        *,
        force: bool,
    ) -> list[DeviceRow]:
        return label_devices(name, pool_uuid, list(specs), first_index, list(present), force)

    def wipe_labels(self, paths: Sequence[Path]) -> None:
        wipe_labels(paths)

    def workers(self) -> Offload:
        return new_workers()

    def now(self) -> float:
        return time.time()


REAL_HOST = RealHost()


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of the pool in `directory`; see `Host.lock`."""
    if not (directory / CATALOG_NAME).exists():
        if (directory / LOCK_NAME).exists():
            raise TierError(
                errno.ENOENT,
                f"the pool in {directory} has lost its catalog: rebuild it with `terrace pool check {directory.name} "
                "--rebuild-catalog --device DEV`, naming a device of the pool",
            )
        raise TierError(errno.ENOENT, f"there is no pool in {directory}: create one with `terrace pool create`")
    fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        lock_or_refuse(fd, f"the pool in {directory}")
        yield
    finally:
        os.close(fd)
