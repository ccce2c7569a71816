"""The policies that are in force, with their schedules, and how they are read anew while volumes are served.

A reload is all or nothing. A file that can't be read, has an error anywhere, or no longer has a policy that volumes
use, changes nothing and says why. A good one takes effect in one step for all open pools; a pool that is opened later
gets what is in force then. Only policies are reloaded: what else has changed in the file waits for a restart, and is
named.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import trio

from terrace.config import Config, load_config
from terrace.policies import ShownPolicy
from terrace.pools import Pools
from terrace.schedule import Schedule
from terrace.schema import ConfigError
from tiers import TierError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reloaded:
    """What a reload did: names of policies, and the other sections whose changes a restart would bring."""

    file: str
    added: list[str]
    changed: list[str]
    removed: list[str]
    needs_restart: list[str]


class Definitions:
    """What the configuration file says of policies; `pools` obey."""

    def __init__(self, file: Path | None, config: Config, pools: Pools, reloaded: Config | None = None) -> None:
        """`config` is what the daemon was started with; `reloaded`: what it has been told since of policies."""
        self._file = file.absolute() if file is not None else None
        self._started = config
        self._config = reloaded or config
        self._schedules = self._config.schedules()
        self._pools = pools
        self._lock = trio.Lock()

    @property
    def config(self) -> Config:
        """What is in force, as far as policies go."""
        return self._config

    def show(self) -> list[ShownPolicy]:
        """Every policy in force, by name."""
        users: dict[str, list[str]] = {}
        for volume in self._pools.open_volumes():
            users.setdefault(volume.policy.name, []).append(volume.name)
        return [self._config.show_policy(name, users.get(name, ())) for name in sorted(self._pools.policies)]

    def show_one(self, name: str) -> ShownPolicy:
        """The policy of that name. Raises ENOENT."""
        for found in self.show():
            if found.name == name:
                return found
        raise TierError(errno.ENOENT, f"there is no policy {name!r}: `terrace policy list` shows those that exist")

    def schedules(self) -> Mapping[str, Schedule]:
        """What snapshots the volumes of each policy get; those that get none aren't there."""
        return self._schedules

    async def reload(self) -> Reloaded:
        """Read the configuration file again, and let its policies hold. Raises TierError; then nothing has changed."""
        if self._file is None:
            raise TierError(
                errno.EINVAL,
                "terraced runs without a configuration file, so there are no policies to reload: restart it with "
                "--config FILE",
            )
        async with self._lock:
            try:
                config = await trio.to_thread.run_sync(load_config, self._file)
            except ConfigError as error:
                raise TierError(errno.EINVAL, f"nothing was reloaded: {'; '.join(error.problems)}") from None
            before = self._config
            self._pools.define_policies(config.policies())
            self._config, self._schedules = config, config.schedules()
        done = Reloaded(
            str(self._file),
            **_difference(before, config),
            needs_restart=[
                section
                for section in Config.model_fields
                if section != "policy" and getattr(config, section) != getattr(self._started, section)
            ],
        )
        log.info(
            "policies are reloaded: added %s, changed %s, removed %s",
            *(", ".join(names) or "none" for names in (done.added, done.changed, done.removed)),
        )
        if done.needs_restart:
            log.warning("%s: what changed in these sections needs a restart", ", ".join(done.needs_restart))
        return done


def _difference(old: Config, new: Config) -> dict[str, list[str]]:
    before, after = old.policies(), new.policies()
    before_kept, after_kept = old.schedules(), new.schedules()
    return {
        "added": sorted(after.keys() - before.keys()),
        "changed": sorted(
            name
            for name in before.keys() & after.keys()
            if before[name] != after[name] or before_kept.get(name) != after_kept.get(name)
        ),
        "removed": sorted(before.keys() - after.keys()),
    }
