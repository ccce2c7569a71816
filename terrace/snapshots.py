"""Snapshots as operators meet them: the engine's operations, with names, refusals and events made for people.

The engine decides what is possible, at the instant at which it happens. What is added here is what it can't know: who
is connected to what, which name was probably meant, how a safety snapshot is called, and who should hear of it.
"""

from __future__ import annotations

import difflib
import errno
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import trio

from terrace.schedule import Kept
from tiers import Pool, Snapshot, SnapshotStatus, TierError, Volume

SAFETY_PREFIX = "before-rollback-"
_COMPARED_NAMES = 200
"""So many of the newest names are compared with one that isn't there: that takes 5 ms."""
_NAMED_CLIENTS = 5

Lacking = Mapping[str, Mapping[str, str]]
"""By volume, mirrored ones only: which nodes have no snapshot of it, and why."""
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


class Through(Protocol):
    """What makes, changes and deletes snapshots, where volumes may be mirrored: `MirrorSnapshots`."""

    def is_mine(self, volume: Volume) -> bool:
        """Whether a schedule of this node is for that volume."""

    async def take(
        self,
        pool: Pool,
        wanted: Sequence[tuple[str, str]],
        *,
        by_filler: bool = False,
        local: bool = False,
        force: bool = False,
    ) -> Lacking:
        """Snapshots (volume, name) of one instant: all, or none. `local`: of the leg here only, as `force` even of one
        that is just being resynced."""

    async def delete(
        self, pool: Pool, wanted: Sequence[tuple[str, str]], *, local: bool = False, remember: bool = True
    ) -> list[str]:
        """Delete (volume, name), all or none; sentences about what is left on other nodes."""

    async def change(
        self,
        pool: Pool,
        volume: str,
        name: str,
        *,
        new_name: str | None = None,
        held: bool | None = None,
        local: bool = False,
    ) -> list[str]:
        """Rename, hold or release; sentences about where that isn't so yet."""

    async def elsewhere(self, pool: Pool, volume: str) -> Mapping[str, Sequence[Kept]]:
        """What other legs have, by leg; empty of what is no mirror of this node."""

    async def expire(self, pool: Pool, volume: str, leg: str, names: Sequence[str]) -> None:
        """Delete on another leg."""


class Direct:
    """`Through` where nothing is mirrored."""

    def is_mine(self, volume: Volume) -> bool:
        """It is."""
        return True

    async def take(
        self,
        pool: Pool,
        wanted: Sequence[tuple[str, str]],
        *,
        by_filler: bool = False,
        local: bool = False,
        force: bool = False,
    ) -> Lacking:
        """As the pool does."""
        await (pool.take_snapshots(wanted, by_filler=True) if by_filler else pool.take_snapshots(wanted))
        return {}

    async def delete(
        self, pool: Pool, wanted: Sequence[tuple[str, str]], *, local: bool = False, remember: bool = True
    ) -> list[str]:
        """As the pool does."""
        await pool.delete_snapshots(wanted)
        return []

    async def change(
        self,
        pool: Pool,
        volume: str,
        name: str,
        *,
        new_name: str | None = None,
        held: bool | None = None,
        local: bool = False,
    ) -> list[str]:
        """As the pool does."""
        await pool.change_snapshot(volume, name, new_name=new_name, held=held)
        return []

    async def elsewhere(self, pool: Pool, volume: str) -> Mapping[str, Sequence[Kept]]:
        """Nothing."""
        await trio.lowlevel.checkpoint()
        return {}

    async def expire(self, pool: Pool, volume: str, leg: str, names: Sequence[str]) -> None:
        """Nothing is elsewhere."""
        raise AssertionError("nothing is elsewhere")


class Snapshots:
    """What the control API does with snapshots and what has them. Every refusal is a TierError."""

    def __init__(self, clients: Clients, tell: Tell, through: Through | None = None) -> None:
        self._clients = clients
        self._tell = tell
        self._through: Through = through or Direct()

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
        self,
        pool: Pool,
        volumes: Sequence[str],
        name: str,
        *,
        by_filler: bool = False,
        local: bool = False,
        force: bool = False,
    ) -> tuple[list[SnapshotStatus], Lacking]:
        """One of each volume, all of one instant, or none. `by_filler`: as in `Pool.take_snapshots`.

        Tells those that are here, and which nodes of mirrored volumes lack one.
        """
        wanted = [(volume, name) for volume in volumes]
        lacking = await self._through.take(pool, wanted, by_filler=by_filler, local=local, force=force)
        names = [f"{pool.name}/{volume}@{name}" for volume in volumes]
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        less = "; ".join(
            f"{pool.name}/{volume}@{name} is not on node {node} ({why})"
            for volume, nodes in lacking.items()
            for node, why in nodes.items()
        )
        self._tell(
            "snapshot",
            pool.name,
            f"{', '.join(names[:10])}{more} {'were' if len(names) > 1 else 'was'} taken"
            + (f"; {less}" if less else ""),
        )
        here = {one.name for volume in volumes for one in pool.snapshots(volume) if one.short_name == name}
        made = [volume for volume in volumes if f"{pool.name}/{volume}@{name}" in here]
        return [(await pool.snapshot_status(volume, name))[0] for volume in made], lacking

    async def delete(self, pool: Pool, volume: str, name: str, *, local: bool = False) -> dict[str, Any]:
        """Delete one; tells the bytes that come back, in the background, and the clones for whose sake none do.

        `left`: sentences about other nodes. Of a mirrored volume it may be on other legs only.
        """
        full_name = f"{pool.name}/{volume}@{name}"
        told: dict[str, Any] = {"deleted": full_name, "freed_bytes": 0, "clones": []}
        if any(one.short_name == name for one in pool.snapshots(volume)):
            self._require_unused(pool.snapshot(volume, name), "deleted")
            (status,) = await pool.snapshot_status(volume, name)
            told |= {"freed_bytes": status.exclusive_bytes, "clones": status.clones}
        elif not pool.volume(volume).mirror_record:
            self.find(pool, volume, name)
        left = await self._through.delete(pool, [(volume, name)], local=local)
        self._tell("snapshot", full_name, f"snapshot {full_name} was deleted" + "".join(f"; {one}" for one in left))
        return told | {"left": left}

    async def change(
        self,
        pool: Pool,
        volume: str,
        name: str,
        *,
        new_name: str | None,
        held: bool | None,
        local: bool = False,
    ) -> tuple[SnapshotStatus, list[str]]:
        """Rename, hold or release it; with sentences about nodes where that isn't so yet."""
        self.find(pool, volume, name)
        left = await self._through.change(pool, volume, name, new_name=new_name, held=held, local=local)
        return (await pool.snapshot_status(volume, new_name or name))[0], left

    async def rollback(
        self, pool: Pool, volume: str, name: str, *, keep_as: str | None, safety: bool, force: bool
    ) -> dict[str, Any]:
        """Make the volume what it was; what it is now is kept as a snapshot if `safety`, called `keep_as` if given.

        Of a volume that is being filled nothing is kept: half of something is nothing to go back to.
        """
        snapshot = self.find(pool, volume, name)
        now = pool.volume(volume)
        if now.mirror_record:
            raise TierError(
                errno.EBUSY,
                f"{now.name} is mirrored and can't be rolled back, which would change one leg only: `terrace volume "
                f"clone {snapshot.name} {pool.name}/NEW` makes a volume of the snapshot, which can be mirrored in its "
                "place",
            )
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
