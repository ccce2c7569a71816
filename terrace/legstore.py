"""A volume of the engine as a place for a leg: implements `replication.leg.LegStore` over `tiers`.

The names differ little, and two promises do. A trim of a leg has to give zeros, where a client's is a hint; and what a
leg is given lies in the volume by its own right: it doesn't count as a client's, and limits of the volume's policy hold
for the clients of the mirror, at its primary.
"""

from __future__ import annotations

from typing import cast

from replication.leg import Extents
from tiers import Pool, Volume
from tiers.changes import ChangedExtents


class PoolLegStore:
    """One leg's volume. It must stay in its pool as long as this is used."""

    def __init__(self, pool: Pool, volume: Volume) -> None:
        self._pool = pool
        self.volume = volume
        # Bound methods of the volume itself: they cost what they cost without a mirror.
        self.write_now = volume.write_now
        self.trim_now = volume.trim_now
        self.read_now = volume.read_now
        self.lose = volume.lose
        self.read = volume.read
        self.flush = volume.flush
        self.checks = volume.checks
        self.mapped = volume.mapped

    @property
    def export_name(self) -> str:
        return self.volume.name

    @export_name.setter
    def export_name(self, name: str) -> None:
        raise AttributeError("a volume is renamed in its pool")

    @property
    def size_bytes(self) -> int:
        return self.volume.size_bytes

    @property
    def no_writes(self) -> str | None:
        return self._pool.no_writes

    @property
    def record(self) -> bytes:
        return self.volume.mirror_record

    async def save(self, record: bytes, trackers: dict[str, Extents] | None = None) -> None:
        await self._pool.set_mirror(self.volume, record, cast("dict[str, ChangedExtents] | None", trackers))

    @property
    def trackers(self) -> dict[str, Extents]:
        return cast("dict[str, Extents]", self.volume.trackers)

    def empty_extents(self) -> Extents:
        return cast(Extents, ChangedExtents())

    def decode_extents(self, data: bytes) -> Extents:
        return cast(Extents, ChangedExtents.decode(data))

    async def write(self, offset: int, data: memoryview | bytes) -> None:
        await self.volume.write(offset, data)

    async def trim(self, offset: int, length: int) -> None:
        await self.volume.write_zeroes(offset, length, no_hole=False)

    async def resize(self, size_bytes: int) -> None:
        if size_bytes == self.size_bytes:
            await self.flush()  # one that was given up may not be durable yet
            return
        await self._pool.resize_volume(self.volume.short_name, size_bytes, mirrored=True)

    async def snapshot(self, name: str) -> None:
        await self._pool.take_snapshots([(self.volume.short_name, name)])
