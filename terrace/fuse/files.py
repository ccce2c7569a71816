"""What the file system needs of whoever has the volumes, and nothing about how they are reached.

Failures are `OSError` with a true errno, which is what the caller of read(2), open(2) and so on gets to see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from terrace.exports import ExportRecord
from terrace.fuse.device import Device


class OpenFile(Protocol):
    """One export that somebody has open, shared by all who have it open in the same way.

    The calls of the data path are synchronous and answer to `device`, at once or later, each request exactly once.
    Offsets and lengths are in bytes; ranges may reach past the end, where a block device would refuse.
    """

    @property
    def size_bytes(self) -> int:
        """As it was known last."""

    def read(self, unique: int, offset: int, length: int) -> None: ...

    def write(self, unique: int, offset: int, data: memoryview, *, durable: bool) -> None:
        """`data` doesn't change until the answer. `durable`: it must be on the media before that."""

    def flush(self, unique: int) -> None:
        """Answer when everything that was answered before is durable."""

    def zero(self, unique: int, offset: int, length: int, *, keep_space: bool) -> None:
        """The range reads as zeros from now on, and takes no space unless it shall keep it."""

    def seek(self, unique: int, offset: int, *, data: bool) -> None:
        """Answer where the next data begins at or behind `offset`, or the next hole. ENXIO behind the end."""

    def push(self) -> None:
        """All requests that were at hand have been handed over: do what was put off."""

    def close(self) -> None:
        """Give back what one `Directory.open` returned. Synchronous, so that it works while cancelled."""


class Directory(Protocol):
    """Pools, and what they export. May wait."""

    async def pools(self) -> Sequence[str]: ...

    async def exports(self, pool: str) -> Sequence[ExportRecord]:
        """Raises FileNotFoundError."""

    async def export(self, name: str) -> ExportRecord:
        """`name` is POOL/VOL or POOL/VOL@SNAP. Raises FileNotFoundError."""

    async def space(self) -> tuple[int, int]:
        """Bytes that all pools can hold, and what is still available of that."""

    async def open(self, record: ExportRecord, device: Device) -> OpenFile:
        """Open that very export; it can't be deleted until the file is closed.

        Raises FileNotFoundError, and OSError ESTALE if another one has its name by now.
        """
