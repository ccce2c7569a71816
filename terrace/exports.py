"""The NBD server's directory of exports: every volume of every open pool, as POOL/VOL."""

from __future__ import annotations

import errno
from typing import cast

import trio

from nbd.export import Export
from terrace.pools import Pools
from terrace.sizes import format_size
from tiers import TierError, Volume
from tiers.limits import begin_client


class PoolExports:
    """Implements `nbd.export.Exports`."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools

    def list(self) -> list[tuple[str, str]]:
        return [(volume.name, f"{format_size(volume.size_bytes)} volume") for volume in self._pools.open_volumes()]

    async def acquire(self, name: str) -> Export:
        """The empty name is the only volume there is, where there is exactly one."""
        await trio.lowlevel.checkpoint()
        try:
            volume = self._find(name) if name else self._default()
        except TierError as error:
            if error.errno == errno.ENOENT:
                raise FileNotFoundError(errno.ENOENT, str(error)) from None
            raise
        # No checkpoint from the look-up to here: a volume can't be deleted in between.
        volume.acquire()
        begin_client()  # this task is the connection's, which starts all others of it
        return volume

    def release(self, export: Export) -> None:
        cast(Volume, export).release()

    def _find(self, name: str) -> Volume:
        pool_name, slash, volume_name = name.partition("/")
        if not slash:
            raise FileNotFoundError(errno.ENOENT, f"there is no export {name!r}; exports are named POOL/VOL")
        return self._pools.pool(pool_name).volume(volume_name)

    def _default(self) -> Volume:
        volumes = list(self._pools.open_volumes())
        if len(volumes) != 1:
            raise FileNotFoundError(errno.ENOENT, f"there are {len(volumes)} exports, so none is the default; name one")
        return volumes[0]
