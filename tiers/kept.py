"""Which snapshots of a volume keep something of which leaf: what makes a thousand of them as quick to look through as a
few.

A snapshot is seen through the trees of all later ones. Nearly all of these say nothing of a given leaf, but it takes a
look into each to know that. So there is an index in memory, eight bytes for each leaf (4 KiB) of a snapshot's tree. It
names at least those that have the leaf; one that it names may have lost it since, or be gone. It is made when a pool
has been opened, in the background; until then all trees are asked.
"""

from collections import defaultdict
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import numpy as np
import trio

from tiers.history import leaves_of

if TYPE_CHECKING:
    from tiers.volume import Volume

U64 = Any
"""A NumPy array of uint64."""

ID_BITS = 32
LEAST_MERGED = 4096


class KeptLeaves:
    """The index of one volume: sorted words (leaf << 32 | snapshot id), and what has come since they were sorted."""

    def __init__(self) -> None:
        self._words: U64 = np.empty(0, np.uint64)
        self._more: dict[int, set[int]] = defaultdict(set)
        self._more_count = 0

    def __len__(self) -> int:
        return len(self._words) + self._more_count

    def add(self, snapshot_id: int, leaves: U64) -> None:
        """A snapshot has these leaves."""
        assert snapshot_id >> ID_BITS == 0
        if len(leaves) > LEAST_MERGED:
            self._merge(leaves.astype(np.uint64) << np.uint64(ID_BITS) | np.uint64(snapshot_id))
            return
        for leaf in leaves.tolist():
            ids = self._more[leaf]
            self._more_count += snapshot_id not in ids
            ids.add(snapshot_id)
        if self._more_count > max(LEAST_MERGED, len(self._words) // 8):
            self._merge(np.empty(0, np.uint64))

    def _merge(self, words: U64) -> None:
        more = [leaf << ID_BITS | i for leaf, ids in self._more.items() for i in ids]
        self._words = np.unique(np.concatenate([self._words, words, np.array(more, np.uint64)]))
        self._more.clear()
        self._more_count = 0

    def forget(self, snapshot_ids: set[int]) -> None:
        """These snapshots are gone."""
        if len(snapshot_ids) > 64 or len(self._words) < LEAST_MERGED:
            self._merge(np.empty(0, np.uint64))
            ids = self._words & np.uint64((1 << ID_BITS) - 1)
            self._words = self._words[~np.isin(ids, np.array(sorted(snapshot_ids), np.uint64))]

    def ids(self, leaf: int) -> list[int]:
        """The snapshots that may have a leaf, oldest first."""
        words = self._words
        lo = int(np.searchsorted(words, np.uint64(leaf << ID_BITS)))
        hi = int(np.searchsorted(words, np.uint64(leaf + 1 << ID_BITS)))
        found = (words[lo:hi] & np.uint64((1 << ID_BITS) - 1)).tolist()
        more = self._more.get(leaf)
        return sorted({*found, *more}) if more else found

    def next_leaf(self, leaf: int) -> int | None:
        """The first leaf from `leaf` on that any may have."""
        at = int(np.searchsorted(self._words, np.uint64(leaf << ID_BITS)))
        first = int(self._words[at]) >> ID_BITS if at < len(self._words) else None
        more = min((other for other in self._more if other >= leaf), default=None)
        return min((found for found in (first, more) if found is not None), default=None)

    def leaves_of(self, first_id: int, end_id: int, start: int, end: int) -> list[int]:
        """The leaves from `start` to before `end` that snapshots with ids in [first_id, end_id) may have, in order."""
        lo = int(np.searchsorted(self._words, np.uint64(start << ID_BITS)))
        hi = int(np.searchsorted(self._words, np.uint64(end << ID_BITS)))
        words = self._words[lo:hi]
        ids = words & np.uint64((1 << ID_BITS) - 1)
        chosen = words[(ids >= np.uint64(first_id)) & (ids < np.uint64(end_id))]
        found = set(np.unique(chosen >> np.uint64(ID_BITS)).tolist())
        for leaf, others in self._more.items():
            if start <= leaf < end and any(first_id <= i < end_id for i in others):
                found.add(leaf)
        return sorted(found)


async def index_of(volume: "Volume") -> None:
    """Make the index of a volume's snapshots. Raises TierError EIO for a damaged or lost page; then there is none.

    What lay below a lost page isn't known, and must not look as if nothing had been kept there.
    What a checkpoint adds meanwhile it adds to this index as well, so it doesn't matter which of a tree's versions the
    walk has seen.
    """
    index = volume.indexing = KeptLeaves()
    try:
        for snapshot in list(volume.snapshots):
            try:
                async with aclosing(leaves_of(snapshot.tree, all_of_them=True)) as found:
                    async for leaves in found:
                        index.add(snapshot.id, np.array(leaves, np.uint64))
            except OSError:
                if not snapshot.gone:  # else its pages may be given back
                    raise
            await trio.lowlevel.checkpoint()
        if volume.indexing is index:
            volume.kept = index
    finally:
        volume.indexing = None


def forget_index(volume: "Volume") -> None:
    """A page above the leaves of some snapshot is lost: what was kept below it is lost too, not nothing."""
    volume.kept = volume.indexing = None
