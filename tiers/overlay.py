"""What the log has done to one volume since its map pages were last written: the newest layer of the map.

Point entries (block -> address and check) for writes, ranges for trims and zeroes. A point is newer than any range it
lies in, since a range removes the points that it covers when it arrives. Freezing is handing the object over to the
checkpoint and starting a new one; a frozen overlay never changes.
"""

from bisect import bisect_left, bisect_right

Entry = tuple[int, int]
"""(address, check) of a block. (0, 0) is unmapped."""

HOLE: Entry = (0, 0)
SMALL_RANGE_BLOCKS = 16


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


class Overlay:
    """Points and ranges; see the module."""

    __slots__ = ("points", "ranges")

    def __init__(self) -> None:
        self.points: dict[int, Entry] = {}
        self.ranges = RangeSet()

    def __bool__(self) -> bool:
        return bool(self.points) or bool(self.ranges)

    @property
    def weight(self) -> int:
        """What bounds it: the entries that it holds, a range counting as the map entries it may touch at its edges."""
        return len(self.points) + 64 * len(self.ranges)

    def unmap(self, start: int, count: int) -> list[int]:
        """Record that these blocks read as zeros. Returns the addresses of the points that this dropped."""
        points = self.points
        end = start + count
        if count <= SMALL_RANGE_BLOCKS:
            dropped = [points[b][0] for b in range(start, end) if b in points]
            for block in range(start, end):
                points[block] = HOLE
            return dropped
        covered = (
            [b for b in range(start, end) if b in points]
            if count <= len(points)
            else [b for b in points if start <= b < end]
        )
        dropped = [points.pop(block)[0] for block in covered]
        self.ranges.add(start, end)
        return dropped

    def get(self, block: int) -> Entry | None:
        """The entry of a block, HOLE if it was unmapped, None if this layer says nothing."""
        entry = self.points.get(block)
        if entry is None and self.ranges and block in self.ranges:
            return HOLE
        return entry

    def patch(self, start: int, addresses: list[int], checks: list[int]) -> None:
        """Lay this layer over the entries of the blocks from `start` on."""
        count = len(addresses)
        if self.ranges:
            for lo, hi in self.ranges.overlapping(start, start + count):
                addresses[lo - start : hi - start] = checks[lo - start : hi - start] = [0] * (hi - lo)
        if self.points:
            for i, entry in enumerate(map(self.points.get, range(start, start + count))):
                if entry is not None:
                    addresses[i], checks[i] = entry
