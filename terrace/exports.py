"""The NBD server's directory of exports: every volume of every open pool as POOL/VOL, its snapshots as POOL/VOL@SNAP.

A list names all volumes, but only the newest `LISTED_SNAPSHOTS` snapshots: clients such as `nbdinfo --list` connect to
each name that they are told, and there may be ten thousand. Any of them can be opened, listed or not.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import trio

from nbd.export import Client, Export
from replication.keeper import LegRecord
from terrace.sizes import format_size
from tiers import Pool, Snapshot, TierError, Volume
from tiers.layout import BLOCK_BYTES
from tiers.limits import begin_client

LISTED_SNAPSHOTS = 64
"""Over all pools."""


@dataclass(frozen=True)
class ExportRecord:
    """An export as those see it who make files or devices of it. Cheap: nothing is counted for it."""

    name: str
    """POOL/VOL or POOL/VOL@SNAP."""
    identity: str
    """Never another export's. Another one when a rollback has put something else under the name, or another node has
    been primary of the mirror."""
    size_bytes: int
    allocated_bytes: int
    """At the last checkpoint, and before blocks were packed."""
    read_only: bool
    created_at: float
    """Seconds since the epoch."""


def record_of(pool: Pool, export: Volume | Snapshot) -> ExportRecord:
    """What is told of an export of `pool`."""
    return ExportRecord(
        name=export.name,
        identity=_identity(pool, export),
        size_bytes=export.size_bytes,
        allocated_bytes=export.shown_blocks * BLOCK_BYTES,
        read_only=export.read_only,
        created_at=export.created_at,
    )


def _identity(pool: Pool, export: Volume | Snapshot) -> str:
    """A mirror that was served by another node in between is not what it was, for who holds something in memory."""
    own = f"{pool.uuid}/{export.id}"
    if isinstance(export, Volume) and export.mirror_record:
        with contextlib.suppress(OSError):  # nobody can have an export whose record makes no sense
            elsewhere = LegRecord.decode(export.mirror_record).elsewhere
            return own if elsewhere is None else f"{own}/{elsewhere.number}-{elsewhere.id}"
    return own


def records_of(pool: Pool) -> list[ExportRecord]:
    """All exports of a pool, each volume before its snapshots."""
    exports: list[Volume | Snapshot] = [*pool.volumes(), *pool.snapshots()]
    return sorted((record_of(pool, export) for export in exports), key=lambda record: record.name)


def find_export(pool: Pool, name: str) -> Volume | Snapshot:
    """VOL or VOL@SNAP. Raises TierError ENOENT."""
    volume_name, at, snapshot_name = name.partition("@")
    return pool.snapshot(volume_name, snapshot_name) if at else pool.volume(volume_name)


class OpenPools(Protocol):
    """The pools whose volumes are exports: those of a home (`terrace.pools.Pools`), or but one."""

    def pool(self, name: str) -> Pool:
        """The open pool. Raises OSError: ENOENT, or why it isn't open."""

    def open_pools(self) -> Iterator[Pool]:
        """Every pool that is open."""

    def open_volumes(self) -> Iterator[Volume]:
        """Every volume of these."""


class WithoutLeg(Protocol):
    """A mirror that is served from here without a leg: `terrace.diskless.DisklessMirror`."""

    @property
    def name(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def record(self) -> ExportRecord: ...

    @property
    def stood_for(self) -> StoodFor: ...

    async def serving(self) -> Export:
        """As `Mirrored.serving`."""


class Diskless(Protocol):
    """All of these: `terrace.disklessmirrors.DisklessMirrors`."""

    def named(self, name: str) -> WithoutLeg | None: ...

    def pools(self) -> list[str]:
        """First parts of their names."""

    def in_pool(self, pool: str) -> Sequence[WithoutLeg]: ...

    def exported(self) -> Iterator[WithoutLeg]: ...


class Mirrored(Protocol):
    """What stands for volumes that are legs of mirrors: `terrace.mirrors.Mirrors`."""

    @property
    def diskless(self) -> Diskless:
        """Mirrors that have no leg here."""

    def is_exported(self, volume: Volume) -> bool:
        """Whether clients may have it from here, as a volume of its own or as a mirror."""

    async def serving(self, volume: Volume) -> MirrorExport:
        """The export under that volume's name. Raises OSError EBUSY for one that is served elsewhere."""


class StoodFor(Protocol):
    """The volume that a mirror is the export of, here or nowhere on this node: its clients are counted there."""

    @property
    def name(self) -> str: ...

    @property
    def open_count(self) -> int: ...

    def acquire(self) -> None: ...

    def release(self) -> None: ...


class MirrorExport(Export, Protocol):
    """An export that stands for a volume."""

    mirrored_volume: StoodFor


class PoolExports:
    """Implements `nbd.export.Exports`: everything is for everybody. Who may have what: `terrace.access`.

    A volume that is a leg of a mirror is no export by itself; without `mirrored` nobody gets it at all.
    """

    def __init__(self, pools: OpenPools, mirrored: Mirrored | None = None) -> None:
        self._pools = pools
        self._mirrored = mirrored

    def list(self, client: Client | None = None) -> list[tuple[str, str]]:
        """Each volume, followed by those of its snapshots that are among the newest."""
        snapshots = [one for pool in self._pools.open_pools() for one in pool.snapshots()]
        if len(snapshots) > LISTED_SNAPSHOTS:
            newest = heapq.nlargest(LISTED_SNAPSHOTS, snapshots, key=lambda snapshot: snapshot.created_at)
        else:
            newest = snapshots
        by_volume: dict[str, list[Snapshot]] = {}
        for snapshot in sorted(newest, key=lambda snapshot: snapshot.created_at):
            by_volume.setdefault(snapshot.name.partition("@")[0], []).append(snapshot)
        found: list[tuple[str, str]] = []
        for volume in self._pools.open_volumes():
            if self._is_exported(volume):
                what = "mirrored volume" if volume.mirror_record else "volume"
                found.append((volume.name, f"{format_size(volume.size_bytes)} {what}"))
            found += [
                (snapshot.name, f"{format_size(snapshot.size_bytes)} snapshot, read-only")
                for snapshot in by_volume.get(volume.name, ())
            ]
        found += [(one.name, f"{format_size(one.size_bytes)} mirrored volume") for one in self._diskless()]
        return found

    def _diskless(self) -> Sequence[WithoutLeg]:
        return () if self._mirrored is None else tuple(self._mirrored.diskless.exported())

    def _without_leg(self, name: str) -> WithoutLeg | None:
        """The mirror of that name that has no leg here; by the empty name the only export that there is."""
        if self._mirrored is None:
            return None
        if name:
            return self._mirrored.diskless.named(name)
        volumes = any(self._is_exported(volume) for volume in self._pools.open_volumes())
        return others[0] if len(others := self._diskless()) == 1 and not volumes else None

    async def acquire(self, name: str, client: Client | None = None) -> Export:
        """See `find`."""
        await trio.lowlevel.checkpoint()
        if (without_leg := self._without_leg(name)) is not None:
            served = await without_leg.serving()
            # No checkpoint since it was found to serve.
            without_leg.stood_for.acquire()
            begin_client()
            return served
        try:
            export = self.find(name)
        except TierError as error:
            if error.errno == errno.ENOENT:
                raise FileNotFoundError(errno.ENOENT, str(error)) from None
            raise
        # No checkpoint from the look-up to here: it can't be deleted in between.
        if not export.read_only and cast(Volume, export).mirror_record:
            return await self._acquire_mirror(cast(Volume, export))
        export.acquire()
        begin_client()  # this task is the connection's, which starts all others of it
        return export

    async def _acquire_mirror(self, volume: Volume) -> Export:
        if self._mirrored is None:
            raise TierError(
                errno.EBUSY, f"{volume.name} is a leg of a mirror, which only a terraced that is its primary can serve"
            )
        mirror = await self._mirrored.serving(volume)
        # No checkpoint since it was found to serve.
        volume.acquire()
        begin_client()
        return mirror

    def _is_exported(self, volume: Volume) -> bool:
        if not volume.mirror_record:
            return True
        return self._mirrored is not None and self._mirrored.is_exported(volume)

    def identity(self, export: Export) -> str:
        """As in its `ExportRecord`."""
        kept = _behind(export)
        there = self._without_leg(kept.name)
        if there is not None and there.stood_for is kept:
            return there.record.identity
        return record_of(self._pools.pool(kept.name.partition("/")[0]), cast("Volume | Snapshot", kept)).identity

    def release(self, export: Export) -> None:
        _behind(export).release()

    def find(self, name: str) -> Volume | Snapshot:
        """What is exported under a name; the empty one is the only volume there is, where there is exactly one.

        Raises FileNotFoundError, or the TierError of the pool.
        """
        if not name:
            return self._default()
        pool_name, slash, rest = name.partition("/")
        if not slash:
            raise FileNotFoundError(
                errno.ENOENT, f"there is no export {name!r}; exports are named POOL/VOL or POOL/VOL@SNAP"
            )
        return find_export(self._pools.pool(pool_name), rest)

    def _default(self) -> Volume:
        volumes = [volume for volume in self._pools.open_volumes() if self._is_exported(volume)]
        number = len(volumes) + len(self._diskless())
        if len(volumes) != 1 or number != 1:
            raise FileNotFoundError(errno.ENOENT, f"there are {number} volumes, so none is the default; name one")
        return volumes[0]


def _behind(export: Export) -> StoodFor:
    """What counts as used."""
    stood_for: StoodFor | None = getattr(export, "mirrored_volume", None)
    return cast("StoodFor", export) if stood_for is None else stood_for
