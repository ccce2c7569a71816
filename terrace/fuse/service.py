"""The file system of the daemon itself: `[fuse] mountpoint`."""

from __future__ import annotations

import logging
from pathlib import Path

import trio

from terrace.exports import Mirrored
from terrace.fuse.device import MountError
from terrace.fuse.local import PoolDirectory
from terrace.fuse.session import mounted
from terrace.pools import Pools
from tiers.limits import begin_client

log = logging.getLogger("terrace.fuse")


async def serve_files(pools: Pools, mirrored: Mirrored, mountpoint: Path, told: trio.Event) -> None:
    """Serve all exports at `mountpoint` until `told` to stop, or until somebody unmounts it.

    A mount point that can't be had is logged; volumes are served over NBD all the same. So they are if there is a bug
    in here: its traceback is logged, and the files are taken away from their users.
    """
    begin_client()  # as far as the limits of policies go, all who use these files are one client
    try:
        async with trio.open_nursery() as slow, mounted(PoolDirectory(pools, slow, mirrored), mountpoint) as session:
            log.info("volumes and snapshots are files below %s", mountpoint)
            async with trio.open_nursery() as watching:

                async def until_told() -> None:
                    await told.wait()
                    watching.cancel_scope.cancel()

                watching.start_soon(until_told)
                await session.ended.wait()
                log.warning("%s was unmounted from outside; restart terraced to have it again", mountpoint)
                watching.cancel_scope.cancel()
    except* MountError as group:
        for error in group.exceptions:
            log.error("%s", error)
    except* Exception:
        log.exception("files at %s have failed and are unmounted; restart terraced to have them again", mountpoint)
