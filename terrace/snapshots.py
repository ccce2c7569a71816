"""Snapshots as operators meet them: the engine's operations, with names, refusals and events made for people.

The engine decides what is possible, at the instant at which it happens. What is added here is what it can't know: who
is connected to what, which name was probably meant, how a safety snapshot is called, and who should hear of it.
"""

from __future__ import annotations

import difflib
import errno
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from tiers import Pool, Snapshot, SnapshotStatus, TierError, Volume

SAFETY_PREFIX = "before-rollback-"
_COMPARED_NAMES = 200
"""So many of the newest names are compared with one that isn't there: that takes 5 ms."""
_NAMED_CLIENTS = 5

Clients = Callable[[str], Sequence[str]]
"""Who is connected to an export, by its name."""
Tell = Callable[[str, str, str], None]
"""Takes an event: kind, subject, text."""


def safety_name(now_s: float, taken: Collection[str]) -> str:
    """`before-rollback-20260114-093012`, in local time; with a number behind it if there is one of that second."""
    name = base = time.strftime(f"{SAFETY_PREFIX}%Y%m%d-%H%M%S", time.localtime(now_s))
    number = 1
    while name in taken:
        number += 1
        name = f"{base}-{number}"
    return name


def meant(name: str, names: Sequence[str]) -> str | None:
    """The one of `names`, oldest first, that somebody who wrote `name` probably meant."""
    near = difflib.get_close_matches(name, names[-_COMPARED_NAMES:], n=1)
    return near[0] if near else None


def named(clients: Sequence[str]) -> str:
    """`127.0.0.1:4711 and unix client 3 (process 815)`; of many only the first few."""
    shown = list(clients[:_NAMED_CLIENTS])
    if len(clients) > len(shown):
        shown.append(f"{len(clients) - len(shown)} more")
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


class Snapshots:
    """What the control API does with snapshots and what has them. Every refusal is a TierError."""

    def __init__(self, clients: Clients, tell: Tell) -> None:
        self._clients = clients
        self._tell = tell

    @staticmethod
    def find(pool: Pool, volume: str, name: str) -> Snapshot:
        """The snapshot. ENOENT names the nearest one that there is."""
        names = [snapshot.short_name for snapshot in pool.snapshots(volume)]
        if name not in names and (near := meant(name, names)) is not None:
            raise TierError(
                errno.ENOENT,
                f"{pool.name}/{volume} has no snapshot {name!r}; did you mean {near!r}? `terrace snapshot list "
                f"{pool.name}/{volume}` shows all",
            )
        return pool.snapshot(volume, name)

    async def create(
        self, pool: Pool, volumes: Sequence[str], name: str, *, by_filler: bool = False
    ) -> list[SnapshotStatus]:
        """One of each volume, all of one instant, or none. `by_filler`: as in `Pool.take_snapshots`."""
        taken = await pool.take_snapshots([(volume, name) for volume in volumes], by_filler=by_filler)
        which = ", ".join(snapshot.name for snapshot in taken[:10])
        more = f" and {len(taken) - 10} more" if len(taken) > 10 else ""
        self._tell("snapshot", pool.name, f"{which}{more} {'were' if len(taken) > 1 else 'was'} taken")
        return [(await pool.snapshot_status(volume, name))[0] for volume in volumes]

    async def delete(self, pool: Pool, volume: str, name: str) -> dict[str, Any]:
        """Delete one; tells the bytes that come back, in the background, and the clones for whose sake none do."""
        snapshot = self.find(pool, volume, name)
        self._require_unused(snapshot, "deleted")
        (status,) = await pool.snapshot_status(volume, name)
        await pool.delete_snapshot(volume, name)
        self._tell("snapshot", status.name, f"snapshot {status.name} was deleted")
        return {"deleted": status.name, "freed_bytes": status.exclusive_bytes, "clones": status.clones}

    async def change(
        self, pool: Pool, volume: str, name: str, *, new_name: str | None, held: bool | None
    ) -> SnapshotStatus:
        """Rename, hold or release it."""
        self.find(pool, volume, name)
        changed = await pool.change_snapshot(volume, name, new_name=new_name, held=held)
        return (await pool.snapshot_status(volume, changed.short_name))[0]

    async def rollback(
        self, pool: Pool, volume: str, name: str, *, keep_as: str | None, safety: bool, force: bool
    ) -> dict[str, Any]:
        """Make the volume what it was; what it is now is kept as a snapshot if `safety`, called `keep_as` if given.

        Of a volume that is being filled nothing is kept: half of something is nothing to go back to.
        """
        snapshot = self.find(pool, volume, name)
        now = pool.volume(volume)
        if now.filling:
            if keep_as is not None:
                raise TierError(
                    errno.EBUSY,
                    f"{now.name} is not complete, so no snapshot can keep what it is now: roll it back "
                    "without --keep-as",
                )
            safety = False
        if not force:
            self._require_unused(now, "rolled back", step=self._step_of_force)
        clients = list(self._clients(now.name)) if now.open_count else []
        wanted = snapshot.name
        given = keep_as
        while True:
            if safety and given is None:
                keep_as = safety_name(time.time(), {one.short_name for one in pool.snapshots(volume)})
            try:
                await pool.rollback(volume, name, keep_as=keep_as if safety else None, force=force)
                break
            except TierError as error:
                # Another rollback of the same second may have taken the name since it was chosen.
                if error.errno != errno.EEXIST or given is not None:
                    raise
        kept = f"{now.name}@{keep_as}" if safety else None
        before = f"what it was before is {kept}" if kept else "what it was before was not kept"
        self._tell("snapshot", now.name, f"volume {now.name} was rolled back to {wanted}; {before}")
        return {"snapshot": wanted, "kept_as": kept, "cut_off": clients}

    async def clone(self, pool: Pool, volume: str, name: str, new_volume: str, policy: str | None) -> Volume:
        """A new volume that begins as the snapshot is; with the policy of the snapshot's volume if none is given."""
        snapshot = self.find(pool, volume, name)
        origin = snapshot.name
        made = await pool.clone(volume, name, new_volume, pool.volume(volume).policy_name if policy is None else policy)
        self._tell("snapshot", made.name, f"volume {made.name} was made as a clone of {origin}")
        return made

    async def promote(self, pool: Pool, name: str, progress: Callable[[int, int], None]) -> None:
        """Copy what a clone shares with its origin, which takes as long as it takes; it depends on nothing then."""
        volume = await pool.promote(name, progress)
        self._tell("snapshot", volume.name, f"volume {volume.name} was made independent of its origin")

    async def delete_volume(self, pool: Pool, name: str, *, snapshots: bool) -> None:
        """Delete a volume; `snapshots`: with all its snapshots, else it must have none."""
        volume = pool.volume(name)
        going = pool.snapshots(name) if snapshots else []
        everything: list[Volume | Snapshot] = [volume, *going]
        for one in everything:
            self._require_unused(one, "deleted")
        full_name = volume.name
        await pool.delete_volume(name, snapshots=snapshots)
        if going:
            self._tell("snapshot", full_name, f"volume {full_name} was deleted with its {len(going)} snapshot(s)")

    def _require_unused(
        self, export: Volume | Snapshot, done: str, *, step: Callable[[bool], str] | None = None
    ) -> None:
        """Refuse with the names of who is connected; what the engine would say has only their number."""
        if export.open_count and (clients := self._clients(export.name)):
            several = len(clients) > 1
            what = step(several) if step else f"disconnect {'them' if several else 'it'} first"
            raise TierError(errno.EBUSY, f"{export.name} is in use by {named(clients)} and can't be {done}: {what}")

    @staticmethod
    def _step_of_force(several: bool) -> str:
        return (
            f"disconnect {'them' if several else 'it'} first; with --force {'their' if several else 'its'} requests "
            "fail from then on, so that what is mounted there breaks"
        )
