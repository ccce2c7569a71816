"""A device that is gone for good: what the pool has in its place, so that everything else lives.

The operator has accepted the loss (`terrace pool evacuate NAME DEV --lost`). Nothing is opened for it, whatever may be
found at its path later: what is there would be older than the pool, or another's. Every read fails, so a block that was
only there is EIO to its readers; map pages that were only there read as BAD_PAGE (`tiers.maptree`); writes are refused,
and nobody asks for any, since no segment is ever taken from it. `tiers.evacuate` then takes it out of the map.
"""

import errno
from collections.abc import Callable, Sequence
from typing import TypeVar

from tiers.catalog import DeviceRow
from tiers.device import Buffer, LabelledDevice
from tiers.errors import TierError
from tiers.label import Label, Tier

T = TypeVar("T")


class LostDevice(LabelledDevice):
    """Implements `tiers.device.Device`."""

    def __init__(self, row: DeviceRow, pool_name: str, pool_uuid: bytes) -> None:
        tier: Tier = "fast" if row.tier == "fast" else "base"
        label = Label(
            tier, row.index, pool_uuid, row.uuid, row.size_bytes, row.segment_bytes, 0, 0, frozenset(), pool_name
        )
        super().__init__(row.path, label)
        self.fd = -1
        self.state = "lost"

    def _gone(self) -> TierError:
        return TierError(errno.EIO, f"{self.path} was given up as lost")

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Refused."""
        raise self._gone()

    def read_now(self, offset: int, into: memoryview) -> bool:
        """Never."""
        return False

    async def write_behind(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Refused."""
        raise self._gone()

    async def read(self, offset: int, length: int) -> bytearray:
        """EIO."""
        raise self._gone()

    async def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytearray]:
        """EIO."""
        raise self._gone()

    async def read_then(
        self, ranges: Sequence[tuple[int, int]], function: Callable[[list[bytearray]], T], *, direct: bool = False
    ) -> T:
        """EIO."""
        raise self._gone()

    async def read_direct(self, offset: int, length: int) -> bytearray:
        """EIO."""
        raise self._gone()

    async def read_direct_into(self, offset: int, into: memoryview) -> None:
        """EIO."""
        raise self._gone()

    async def sync(self) -> None:
        """There is nothing to make durable."""

    def write_label(self, label: Label) -> None:
        """Refused."""
        raise self._gone()

    def erase_label_now(self) -> None:
        """There is none."""

    def close(self) -> None:
        """Nothing is open."""
