"""What the log has done to one volume since its map pages were last written: the newest layer of the map.

Three forms, each for what it is best at. A *patch* is a leaf page of its own, with UNSET where this layer says nothing:
for streams, and for volumes small enough that random writes fill leaves. A *point* is one block: for random writes over
a large volume, which would otherwise take a page each. A *range* is unmapped blocks: for trims of any size.

A leaf with a patch has no points; patches and points are newer than the ranges that they lie in, since a range clears
what it covers when it arrives. Freezing is handing the object over to the checkpoint and starting a new one; a frozen
overlay never changes.
"""

from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Sequence

from tiers.layout import FIRST_ADDRESS, UNMAPPED

Entry = tuple[int, int]
"""(address, check) of a block. (0, 0) is unmapped."""

Patch = memoryview
"""256 addresses, then 256 checks, as in a map page; UNSET addresses where the layers below decide."""

HOLE: Entry = (0, 0)
UNSET = 2
"""An address that no map page ever has."""

LEAF_BITS = 8
LEAF_BLOCKS = 1 << LEAF_BITS
LEAF_MASK = LEAF_BLOCKS - 1
_UNSET_PAGE = array("Q", [UNSET] * LEAF_BLOCKS + [0] * LEAF_BLOCKS).tobytes()

SMALL_RANGE_BLOCKS = 16
RUN_BLOCKS = 16
"""A write of so many blocks within a leaf is worth a patch."""
PATCH_WEIGHT = 8
RANGE_WEIGHT = 64
MAX_PROBES = 4096
MAX_UNSORTED = 4096


class RangeSet:
    """Disjoint, sorted, non-adjacent block ranges."""

    __slots__ = ("ends", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []

    def __bool__(self) -> bool:
        return bool(self.starts)

    def __len__(self) -> int:
        return len(self.starts)

    def __contains__(self, block: int) -> bool:
        i = bisect_right(self.starts, block) - 1
        return i >= 0 and block < self.ends[i]

    def after(self, block: int) -> int:
        """How many blocks from `block` on are in the range that it lies in; 0 if it is in none."""
        i = bisect_right(self.starts, block) - 1
        return max(0, self.ends[i] - block) if i >= 0 else 0

    def add(self, start: int, end: int) -> None:
        """Unite with [start, end)."""
        lo = bisect_left(self.ends, start)
        hi = bisect_right(self.starts, end)
        if lo < hi:
            start = min(start, self.starts[lo])
            end = max(end, self.ends[hi - 1])
        self.starts[lo:hi] = [start]
        self.ends[lo:hi] = [end]

    def overlapping(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of the set inside [start, end)."""
        found = []
        i = bisect_right(self.ends, start)
        while i < len(self.starts) and self.starts[i] < end:
            found.append((max(start, self.starts[i]), min(end, self.ends[i])))
            i += 1
        return found


class SortedKeys:
    """The keys of a dictionary in order, some of which may be gone, and those that came since.

    Discarding a volume asks for a range of them again and again, and so may zeroing with ragged ends, which adds keys
    in between, and who asks what is where in a volume that is written: so these are kept apart, and merged when they
    are many.
    """

    __slots__ = ("_keys", "_more", "_source")

    def __init__(self, source: Collection[int]) -> None:
        self._source = source
        self._keys = sorted(source)
        self._more: list[int] = []

    def add(self, key: int) -> None:
        """A key came."""
        insort(self._more, key)
        if len(self._more) >= MAX_UNSORTED:
            if len(self._keys) > 2 * len(self._source) + MAX_PROBES:
                self._keys = sorted(self._source)  # most of what was here is gone
            else:
                # Two runs in order: merging them is linear.
                self._keys += self._more
                self._keys.sort()
            self._more.clear()

    def between(self, start: int, end: int) -> list[int]:
        """The keys from `start` to before `end`; one that went and came again may be there twice."""
        found = self._keys[bisect_left(self._keys, start) : bisect_left(self._keys, end)]
        return found + self._more[bisect_left(self._more, start) : bisect_left(self._more, end)]

    def next(self, start: int) -> int | None:
        """The first key from `start` on, of those that are still there."""
        found: list[int] = []
        for keys in (self._keys, self._more):
            at = first = bisect_left(keys, start)
            while at < len(keys) and keys[at] not in self._source:
                at += 1
            if at - first > MAX_PROBES:
                # Many went: let nobody pass by them again.
                self._keys = sorted(self._source)
                self._more.clear()
                return self.next(start)
            found += keys[at : at + 1]
        return min(found, default=None)


class Overlay:
    """Patches, points and ranges; see the module. `small`: single blocks go into patches too.

    The methods that change it return the addresses that it named before and doesn't name any more.
    """

    __slots__ = ("_leaves", "_order", "patches", "points", "ranges", "small")

    def __init__(self, *, small: bool) -> None:
        self.small = small
        self.patches: dict[int, Patch] = {}
        self.points: dict[int, Entry] = {}
        self.ranges = RangeSet()
        self._order: SortedKeys | None = None
        self._leaves: SortedKeys | None = None

    def __bool__(self) -> bool:
        return bool(self.patches) or bool(self.points) or bool(self.ranges)

    @property
    def weight(self) -> int:
        """What bounds it, in points: memory, and the map pages that a checkpoint may have to write for it."""
        return len(self.points) + PATCH_WEIGHT * len(self.patches) + RANGE_WEIGHT * len(self.ranges)

    # -- changing ------------------------------------------------------------------------------------------------

    def put(self, block: int, address: int, check: int) -> int:
        """Name the new place of one block; return the address that this replaces, 0 if none."""
        leaf = block >> LEAF_BITS
        patch = self.patches.get(leaf)
        if patch is None:
            if not self.small:
                old = self.points.get(block)
                self.points[block] = (address, check)
                if old is not None:
                    return old[0]
                if self._order is not None:
                    self._order.add(block)
                return 0
            patch = self._new_patch(leaf)
        slot = block & LEAF_MASK
        replaced: int = patch[slot]
        patch[slot] = address
        patch[LEAF_BLOCKS + slot] = check
        return 0 if replaced == UNSET else replaced

    def put_run(self, block: int, address: int, checks: list[int]) -> list[int]:
        """Name consecutive places of consecutive blocks; return the addresses that this replaces."""
        dropped: list[int] = []
        at = 0
        count = len(checks)
        while at < count:
            lo = (block + at) & LEAF_MASK
            part = min(LEAF_BLOCKS - lo, count - at)
            leaf = (block + at) >> LEAF_BITS
            patch = self.patches.get(leaf)
            if patch is None and (self.small or part >= RUN_BLOCKS):
                patch = self._new_patch(leaf)
            if patch is None:
                for i in range(at, at + part):
                    old = self.put(block + i, address + i, checks[i])
                    if old:
                        dropped.append(old)
            else:
                dropped += self._set(patch, lo, array("Q", range(address + at, address + at + part)))
                patch[LEAF_BLOCKS + lo : LEAF_BLOCKS + lo + part] = memoryview(array("Q", checks[at : at + part]))
            at += part
        return dropped

    def _set(self, patch: Patch, lo: int, addresses: "array[int]") -> list[int]:
        hi = lo + len(addresses)
        old = patch[lo:hi].tolist()
        patch[lo:hi] = memoryview(addresses)
        return [address for address in old if address >= FIRST_ADDRESS]

    def _new_patch(self, leaf: int) -> Patch:
        patch = memoryview(bytearray(_UNSET_PAGE)).cast("Q")
        if self.points:
            for block in range(leaf << LEAF_BITS, (leaf + 1) << LEAF_BITS):
                entry = self.points.pop(block, None)
                if entry is not None:
                    patch[block & LEAF_MASK], patch[LEAF_BLOCKS + (block & LEAF_MASK)] = entry
        self.patches[leaf] = patch
        if self._leaves is not None:
            self._leaves.add(leaf)
        return patch

    def unmap(self, start: int, count: int) -> list[int]:
        """Record that these blocks read as zeros."""
        if count <= SMALL_RANGE_BLOCKS:
            replaced = [self.put(block, UNMAPPED, 0) for block in range(start, start + count)]
            return [address for address in replaced if address]
        end = start + count
        dropped = self._clear_patches(start, end)
        points = self.points
        if points:
            if count <= min(len(points), MAX_PROBES):
                covered = [block for block in range(start, end) if block in points]
            else:
                if self._order is None:
                    self._order = SortedKeys(points)
                covered = self._order.between(start, end)
            dropped += [points.pop(block)[0] for block in covered if block in points]
        self.ranges.add(start, end)
        return dropped

    def _clear_patches(self, start: int, end: int) -> list[int]:
        dropped: list[int] = []
        first, last = start >> LEAF_BITS, (end - 1) >> LEAF_BITS
        if last - first < len(self.patches):
            leaves = [leaf for leaf in range(first, last + 1) if leaf in self.patches]
        else:
            if self._leaves is None:
                self._leaves = SortedKeys(self.patches)
            leaves = [leaf for leaf in self._leaves.between(first, last + 1) if leaf in self.patches]
        for leaf in leaves:
            base = leaf << LEAF_BITS
            lo, hi = max(start - base, 0), min(end - base, LEAF_BLOCKS)
            patch = self.patches.get(leaf)
            if patch is None:
                continue
            dropped += [address for address in patch[lo:hi].tolist() if address >= FIRST_ADDRESS]
            if (lo, hi) == (0, LEAF_BLOCKS):
                del self.patches[leaf]
            else:
                patch[lo:hi] = memoryview(array("Q", [UNMAPPED] * (hi - lo)))
                patch[LEAF_BLOCKS + lo : LEAF_BLOCKS + hi] = memoryview(array("Q", [0] * (hi - lo)))
        return dropped

    # -- asking --------------------------------------------------------------------------------------------------

    def get(self, block: int) -> Entry | None:
        """The entry of a block, HOLE if it was unmapped, None if this layer says nothing."""
        patch = self.patches.get(block >> LEAF_BITS)
        if patch is not None:
            slot = block & LEAF_MASK
            address = patch[slot]
            if address != UNSET:
                return address, patch[LEAF_BLOCKS + slot]
        elif (entry := self.points.get(block)) is not None:
            return entry
        if self.ranges and block in self.ranges:
            return HOLE
        return None

    def patch(self, start: int, addresses: list[int], checks: list[int]) -> None:
        """Lay this layer over the entries of the blocks from `start` on."""
        count = len(addresses)
        end = start + count
        if self.ranges:
            for lo, hi in self.ranges.overlapping(start, end):
                addresses[lo - start : hi - start] = checks[lo - start : hi - start] = [0] * (hi - lo)
        if self.points:
            if self._order is not None and count >= LEAF_BLOCKS:
                blocks: Sequence[int] = self._order.between(start, end)
            else:
                blocks = range(start, end)
            for block, entry in zip(blocks, map(self.points.get, blocks), strict=True):
                if entry is not None:
                    addresses[block - start], checks[block - start] = entry
        if self.patches:
            at = start
            while at < end:
                lo = at & LEAF_MASK
                part = min(LEAF_BLOCKS - lo, end - at)
                patch = self.patches.get(at >> LEAF_BITS)
                if patch is not None:
                    new = patch[lo : lo + part].tolist()
                    new_checks = patch[LEAF_BLOCKS + lo : LEAF_BLOCKS + lo + part].tolist()
                    i = at - start
                    if UNSET not in new:
                        addresses[i : i + part] = new
                        checks[i : i + part] = new_checks
                    else:
                        for j, address in enumerate(new):
                            if address != UNSET:
                                addresses[i + j], checks[i + j] = address, new_checks[j]
                at += part

    def next_named(self, leaf: int) -> int | None:
        """The first leaf from `leaf` on in which a point or patch may name a block; as a set, see `named_leaves`."""
        found: list[int] = []
        if self.points:
            if self._order is None:
                self._order = SortedKeys(self.points)
            block = self._order.next(leaf << LEAF_BITS)
            found += [] if block is None else [block >> LEAF_BITS]
        if self.patches:
            if self._leaves is None:
                self._leaves = SortedKeys(self.patches)
            patch = self._leaves.next(leaf)
            found += [] if patch is None else [patch]
        return min(found, default=None)

    def named_leaves(self) -> set[int]:
        """The leaves in which a point or patch may name a block."""
        return {block >> LEAF_BITS for block in self.points} | self.patches.keys()
