"""What the command line does by itself: checking a pool where no daemon runs, and rebuilding a lost catalog."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import trio

from terrace.home import Home
from tiers import Pool, TierError, rebuild_catalog

_POLL_S = 0.2


def check_offline(
    home: Home, name: str, *, full: bool, truncate_log: bool, give_up_map: bool, advance: Callable[[int, int], None]
) -> dict[str, Any]:
    """Open the pool, check it and close it; the report as the API would give it. No daemon can start meanwhile."""
    directory = home.pools / name
    if not directory.is_dir():
        raise TierError(errno.ENOENT, f"there is no pool {name!r} in {home.pools}, and no terraced runs on {home.path}")

    async def check() -> dict[str, Any]:
        async with Pool.open(directory, truncate_log=truncate_log, give_up_map=give_up_map) as pool:
            return await _report(pool, full=full, gives_up=truncate_log or give_up_map, advance=advance)

    with home.locked():
        return trio.run(check)


def evacuate_offline(
    home: Home, name: str, device: str, *, lost: bool, truncate_log: bool, advance: Callable[[int, int], None]
) -> dict[str, Any]:
    """Open the pool, without `device` if it is lost, empty or forget that device, and close it; as the API answers."""
    directory = home.pools / name
    if not directory.is_dir():
        raise TierError(errno.ENOENT, f"there is no pool {name!r} in {home.pools}, and no terraced runs on {home.path}")

    async def evacuate() -> dict[str, Any]:
        given_up = [device] if lost else []
        async with Pool.open(directory, truncate_log=truncate_log, give_up=given_up) as pool:
            if not lost:
                await pool.evacuator.start(device)
            while running := [
                one for one in pool.evacuator.status() if one.path == device and one.state in ("running", "waiting")
            ]:
                if pool.status().problem is not None:
                    break
                advance(running[0].done_bytes, running[0].total_bytes)
                await trio.sleep(_POLL_S)
            return {
                "evacuations": [dataclasses.asdict(one) for one in pool.evacuator.status()],
                "losses": [dataclasses.asdict(loss) for loss in await pool.losses()],
                "given_up": pool.given_up,
            }

    with home.locked():
        return trio.run(evacuate)


def rebuild_offline(
    home: Home,
    name: str,
    devices: Sequence[Path],
    *,
    force: bool,
    full: bool,
    truncate_log: bool,
    advance: Callable[[int, int], None],
) -> dict[str, Any]:
    """Rebuild the catalog of a pool that nobody has open, then open the pool, check it and close it.

    The check's report, with what was rebuilt under `rebuilt`. A daemon may serve other pools of this home meanwhile:
    the pool's and its devices' own locks keep it away from this one.
    """
    home.prepare()
    directory = home.pools / name

    async def rebuild() -> dict[str, Any]:
        rebuilt = await rebuild_catalog(directory, name, devices, force=force, progress=advance)
        async with Pool.open(directory, truncate_log=truncate_log) as pool:
            report = await _report(pool, full=full, gives_up=truncate_log, advance=advance)
        return report | {"rebuilt": dataclasses.asdict(rebuilt)}

    return trio.run(rebuild)


async def _report(pool: Pool, *, full: bool, gives_up: bool, advance: Callable[[int, int], None]) -> dict[str, Any]:
    report = dataclasses.asdict(await pool.check(full, advance))
    return report | ({"given_up": pool.status().given_up} if gives_up else {})
