"""What the command line does by itself when no daemon runs: checking a pool."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable
from typing import Any

import trio

from terrace.home import Home
from tiers import Pool, TierError


def check_offline(
    home: Home, name: str, *, full: bool, truncate_log: bool, advance: Callable[[int, int], None]
) -> dict[str, Any]:
    """Open the pool, check it and close it; the report as the API would give it. No daemon can start meanwhile."""
    directory = home.pools / name
    if not directory.is_dir():
        raise TierError(errno.ENOENT, f"there is no pool {name!r} in {home.pools}, and no terraced runs on {home.path}")

    async def check() -> dict[str, Any]:
        async with Pool.open(directory, truncate_log=truncate_log) as pool:
            report = dataclasses.asdict(await pool.check(full, advance))
            return report | ({"given_up": pool.status().given_up} if truncate_log else {})

    with home.locked():
        return trio.run(check)
