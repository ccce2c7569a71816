"""Who descends from whom: snapshots, clones, rollbacks, and what becomes of a volume that others need.

What is asked for is done at the freeze of a checkpoint, in one step of the loop with everything else that is asked for,
and is true when that checkpoint commits (`Lineage.ask`): so a group of snapshots is of one instant, and a crash leaves
all of it or nothing. Nothing of it is in the log.

A **rollback** makes a clone of the snapshot, which takes the volume's name and family over; the volume itself is
retired. It costs the same at any size, and the snapshots stay, the newer ones too. What the retired volume holds goes
when the last snapshot that shows it is deleted, or becomes the clone's own, when only the clone needs it
(`tiers.merge`).
"""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiers.errors import TierError
from tiers.maptree import MapTree
from tiers.snapshot import Snapshot
from tiers.volume import Volume

if TYPE_CHECKING:
    from tiers.checkpoint import Frozen
    from tiers.engine import Engine
    from tiers.merge import Merge


MOST_ORIGINS = 200
"""A block of a clone of a clone of ... is looked for in each of them, one call within the other."""


@dataclass(eq=False)
class Request:
    """Something to be done at a freeze: `act` raises TierError to refuse it, then nothing has happened."""

    act: "Callable[[Frozen], None]"
    refusal: TierError | None = None
    is_done: bool = False


class Lineage:
    """The snapshots of a pool, and how volumes depend on them. All of it belongs to the trio thread."""

    def __init__(self, engine: "Engine") -> None:
        self.snapshots: dict[int, Snapshot] = {}
        """Those that a checkpoint has committed, deleted ones that are not sorted out yet included, by id."""
        self.requests: list[Request] = []
        self.recounted: set[Snapshot] = set()
        """Snapshots of which a count was put right, which the catalog doesn't know yet."""
        self.coming: list[Volume] = []
        """Volumes that the checkpoint under way is about to make: their names are taken. Who asked may have left."""
        self._engine = engine

    async def ask(self, act: "Callable[[Frozen], None]") -> None:
        """Have something done by the next checkpoint; it is true, durably, when this returns.

        Raises TierError if it is refused, or if no checkpoint can be committed. Then, or where this is cancelled, a
        checkpoint may be under way that does it nevertheless.
        """
        engine = self._engine
        engine.space.require_writable()
        request = Request(act)
        self.requests.append(request)
        try:
            while not request.is_done and request.refusal is None:
                await engine.checkpoint()
        except OSError:
            if not request.is_done:  # else only the copy of that checkpoint failed
                raise
        finally:
            if request in self.requests:
                self.requests.remove(request)  # cancelled, or no checkpoint: it was not begun
        if request.refusal is not None:
            raise request.refusal

    def obey(self, frozen: "Frozen") -> None:
        """At a freeze: do what was asked. No checkpoint of trio in here."""
        requests, self.requests = self.requests, []
        for request in requests:
            try:
                request.act(frozen)
            except TierError as refusal:
                request.refusal = refusal
            else:
                frozen.requests.append(request)
        self.coming = frozen.made
        frozen.changed |= {snapshot for snapshot in self.recounted if not snapshot.gone}
        self.recounted.clear()
        for snapshot in self.snapshots.values():
            # What only clones that are gone have needed.
            if snapshot.state == "hidden" and not self._has_clones(snapshot, frozen):
                snapshot.state = "deleted"
                frozen.changed.add(snapshot)

    def _has_clones(self, snapshot: Snapshot, frozen: "Frozen") -> bool:
        return bool(self.clones_of(snapshot)) or any(volume.origin is snapshot for volume in frozen.made)

    def clones_of(self, snapshot: Snapshot) -> list[Volume]:
        """The volumes that lie over a snapshot, retired ones too."""
        return [volume for volume in self._engine.volumes.values() if volume.origin is snapshot]

    def clones_by_origin(self) -> dict[Snapshot | None, list[Volume]]:
        """The same of all snapshots: for who asks of many."""
        found: dict[Snapshot | None, list[Volume]] = {}
        for volume in self._engine.volumes.values():
            found.setdefault(volume.origin, []).append(volume)
        return found

    def head_of(self, volume: Volume) -> Volume:
        """The volume that clients see under the name that the snapshots of `volume` bear."""
        if volume.retired:
            for other in self._engine.volumes.values():
                if other.family == volume.family and not other.retired:
                    return other
        return volume

    def of_family(self, volume: Volume) -> list[Snapshot]:
        """The visible snapshots that bear a volume's name, oldest first."""
        found = [
            snapshot
            for snapshot in self.snapshots.values()
            if snapshot.volume.family == volume.family and snapshot.state == "visible"
        ]
        return sorted(found, key=lambda snapshot: snapshot.id)

    def by_family(self) -> dict[int, list[Snapshot]]:
        """The visible snapshots of each family, oldest first: for who asks of all volumes."""
        found: dict[int, list[Snapshot]] = {}
        for snapshot in sorted(self.snapshots.values(), key=lambda snapshot: snapshot.id):
            if snapshot.state == "visible":
                found.setdefault(snapshot.volume.family, []).append(snapshot)
        return found

    def name_family(self, family: int) -> None:
        """Give the snapshots of a family the name that its volume has now."""
        for snapshot in self.snapshots.values():
            if snapshot.volume.family == family:
                snapshot.name = f"{self.head_of(snapshot.volume).name}@{snapshot.short_name}"

    def by_name(self) -> dict[tuple[int, str], Snapshot]:
        """The visible snapshots by family and name: for who asks of many."""
        return {(s.volume.family, s.short_name): s for s in self.snapshots.values() if s.state == "visible"}

    # -- what may be asked -------------------------------------------------------------------------------------------

    def take(self, frozen: "Frozen", volume: Volume, name: str, created_at: float) -> Snapshot:
        """A snapshot of what the volume is at this freeze. Who has taken the last one has the leaf pages counted."""
        engine = self._engine
        tree = MapTree(f"{volume.name}@{name}", engine.segments, engine.cache)
        snapshot = Snapshot(engine, engine.next_volume_id, volume, name, volume.size_bytes, tree, created_at)
        snapshot.name = f"{volume.name}@{name}"
        engine.next_volume_id += 1
        volume.taking = snapshot
        frozen.taken.append(snapshot)
        return snapshot

    def delete(self, frozen: "Frozen", snapshot: Snapshot) -> None:
        """Nobody sees it any more; it stays hidden while clones need it."""
        snapshot.state = "hidden" if self._has_clones(snapshot, frozen) else "deleted"
        frozen.changed.add(snapshot)

    def require_descent(self, snapshot: Snapshot) -> None:
        """Raise TierError if a clone of this snapshot would have too many origins, one below the other."""
        origins = 1
        below = snapshot.volume.origin
        while below is not None:
            origins, below = origins + 1, below.volume.origin
        if origins > MOST_ORIGINS:
            raise TierError(
                errno.EMLINK,
                f"{snapshot.name} is one of a clone of a clone, and so on, {origins - 1} deep, which is the most: "
                "promote one of them (`terrace volume promote`), or delete snapshots that were rolled back to",
            )

    def clone(self, frozen: "Frozen", snapshot: Snapshot, name: str, created_at: float, policy_name: str) -> Volume:
        """A volume that begins as the snapshot is."""
        engine = self._engine
        volume = engine.make_volume(engine.next_volume_id, name, snapshot.size_bytes, (0, 0), created_at)
        volume.origin = snapshot
        volume.layered = True
        volume.referenced_blocks = snapshot.referenced_blocks
        volume.policy_name = policy_name
        frozen.made.append(volume)
        return volume

    def retire(self, frozen: "Frozen", volume: Volume) -> None:
        """Clients don't see it from now on; what its snapshots need of it stays."""
        volume.deleted = True
        frozen.retiring.add(volume)

    def give_up(self, volume: Volume) -> None:
        """Replay: a volume was deleted that had no snapshots any more, and has some in an older copy of the catalog."""
        volume.deleted = volume.retired = True
        for snapshot in volume.snapshots:
            snapshot.state = "hidden" if self.clones_of(snapshot) else "deleted"
            self.recounted.add(snapshot)

    # -- the commit --------------------------------------------------------------------------------------------------

    def committed(self, frozen: "Frozen", merge: "Merge") -> None:
        """Make memory say what the catalog says. No checkpoint of trio in here."""
        engine = self._engine
        engine.relocations.committed()
        for snapshot in frozen.taken:
            volume = snapshot.volume
            volume.taking = None
            volume.snapshots.append(snapshot)
            snapshot.referenced_blocks = volume.referenced_blocks
            self.snapshots[snapshot.id] = snapshot
        for owner_id, root in merge.roots.items():
            snapshot_ = self.snapshots.get(owner_id)
            if snapshot_ is not None:
                tree = snapshot_.tree
                tree.mapped_blocks = merge.mapped.get(owner_id, tree.mapped_blocks)
                tree.commit(root, merge.inner.get(owner_id, {}), merge.stale.get(owner_id, ()))
                self._count_again(snapshot_)
                for index in (snapshot_.volume.kept, snapshot_.volume.indexing):
                    if index is not None and root[0]:
                        for leaves in merge.stale.get(owner_id, ()):
                            index.add(owner_id, leaves)
        for volume_id, heir in merge.heirs.items():
            engine.volumes[volume_id].heir = None if heir.gone else heir  # it may have been deleted meanwhile
        for volume_id, origin in merge.origins.items():
            if volume_id in engine.volumes:  # else it was deleted meanwhile
                engine.volumes[volume_id].origin = origin
        for snapshot in frozen.changed:
            self._count_again(snapshot)
        for snapshot in merge.gone:
            self._count_again(snapshot)
            snapshot.volume.snapshots.remove(snapshot)
            if snapshot.volume.kept is not None:
                snapshot.volume.kept.forget({snapshot.id})
            del self.snapshots[snapshot.id]
            snapshot.deleted = snapshot.gone = True
            snapshot.tree.close()
        for volume in frozen.retiring:
            volume.retired = True
        for volume, name in frozen.renamed.items():
            volume.rename(name)
        for volume in frozen.made:
            engine.enter_volume(volume)
        self.coming = []
        for volume in merge.buried:
            self.bury(volume)
        if frozen.taken or frozen.made or frozen.retiring or frozen.renamed or merge.roots or merge.gone:
            engine.views.forget()
        for volume in {*frozen.retiring, *frozen.made, *frozen.renamed}:
            self.name_family(volume.family)
        engine.count_leaf_pages()
        for act in frozen.on_commit:
            act()
        for request in frozen.requests:
            request.is_done = True

    def _count_again(self, snapshot: Snapshot) -> None:
        """What would be given back with it, and with its neighbours, is not what it was."""
        snapshots = snapshot.volume.snapshots
        at = snapshots.index(snapshot)
        for near in snapshots[max(0, at - 1) : at + 2]:
            near.exclusive_blocks = None

    def bury(self, volume: Volume) -> None:
        """A retired volume is no more."""
        engine = self._engine
        del engine.volumes[volume.id]
        volume.gone = True
        volume.tree.close()
        engine.heat.extents.forget(volume.id)
        engine.migration.forget(volume.id)
        self.disinherit(volume)

    def disinherit(self, volume: Volume) -> None:
        """What a volume was the heir of has none any more: the next checkpoint sees to it."""
        for other in self._engine.volumes.values():
            if other.heir is volume:
                other.heir = None
