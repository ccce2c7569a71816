"""The paged map of one volume: (block) -> (address, check), as a radix tree of 4 KiB pages under one root.

Every page, leaf or inner, is 256 addresses and then 256 checks (64-bit, little-endian). A leaf's entries are data
blocks; an inner page's are the pages below it, with the XXH3-64 of each, so that a page that was lost, misdirected or
is stale is caught by its parent (and the root by the catalog). A zero entry is a hole of everything below it: an empty
volume of any size has no page at all. Five levels of 256 cover 2^40 blocks, 4 PiB.

Pages on a device are never changed: a checkpoint writes new copies of those it touches and of their ancestors, and
makes them true by committing the new root (`checkpoint.py`). In memory, clean pages sit in a cache of two generations,
bounded for all volumes together: a page that is used while the newer one fills survives.
"""

import errno
from collections.abc import Iterable, Sequence

from tiers.errors import DamagedPageError, TierError
from tiers.layout import BAD, BLOCK_BYTES, SLOT_MASK, check_of
from tiers.segments import SegmentTable

FANOUT_BITS = 8
FANOUT = 1 << FANOUT_BITS
FANOUT_MASK = FANOUT - 1
ROOT_LEVEL = 4
LEVEL_SHIFT = 48

Page = memoryview
"""512 words: the addresses, then the checks. Never written to."""

EMPTY_PAGE: Page = memoryview(bytes(BLOCK_BYTES)).cast("Q")
BAD_PAGE: Page = memoryview(b"".join([BAD.to_bytes(8, "little") * FANOUT, bytes(8 * FANOUT)])).cast("Q")
"""What a page was is not known any more: every block below it is lost. So an entry BAD above says on any level."""


def page_of(block: bytes | bytearray | memoryview) -> Page:
    """View a 4 KiB block as a page."""
    return memoryview(block).toreadonly().cast("Q")


def page_key(level: int, index: int) -> int:
    """The number by which caches and PAGE records name a page."""
    return level << LEVEL_SHIFT | index


class PageCache:
    """The bound on clean pages in memory, over all the trees that share it."""

    def __init__(self, limit_bytes: int) -> None:
        # A page costs its 4 KiB and about 400 bytes of objects; two generations may be full at once.
        self._limit_pages = max(64, limit_bytes // (BLOCK_BYTES + 400) // 2)
        self._young_pages = 0
        self._trees: list[MapTree] = []

    def attach(self, tree: "MapTree") -> None:
        """Count this tree's pages from now on."""
        self._trees.append(tree)

    def detach(self, tree: "MapTree") -> None:
        """Forget a tree whose volume is gone."""
        self._trees.remove(tree)

    def holds(self, pages: int) -> bool:
        """Whether so many pages fit in a generation: what doesn't would only drive everything else out."""
        return pages <= self._limit_pages

    def added(self) -> None:
        """A page came into a young generation; when these are full they become the old one."""
        self._young_pages += 1
        if self._young_pages >= self._limit_pages:
            self._young_pages = 0
            for tree in self._trees:
                tree.age()


class MapTree:
    """The committed map of a volume. Newer layers (overlays) are the volume's business."""

    def __init__(self, name: str, segments: SegmentTable, cache: PageCache, root: tuple[int, int] = (0, 0)) -> None:
        self.name = name
        self.root = root
        self.mapped_blocks = 0
        self._segments = segments
        self._cache = cache
        self._young: dict[int, Page] = {}
        self._old: dict[int, Page] = {}
        self._generation = 0
        self.loaded: set[int] | None = None
        """While a checkpoint runs: pages that were read from the old tree and may not outlive it."""
        cache.attach(self)

    # -- reading -----------------------------------------------------------------------------------------------

    def leaf_now(self, index: int) -> Page | None:
        """The leaf, if that can be told without reading; EMPTY_PAGE for a hole."""
        page = self._young.get(index)
        if page is None:
            page = self._old.get(index)
            if page is None:
                return self._hole_now(0, index)
            self._young[index] = page
            self._cache.added()
        return page

    def page_now(self, level: int, index: int) -> Page | None:
        """Any page, if it is cached or known to be a hole."""
        key = page_key(level, index)
        page = self._young.get(key)
        if page is None:
            page = self._old.get(key)
            if page is None:
                return self._hole_now(level, index)
            self._insert(key, page)
        return page

    def _hole_now(self, level: int, index: int) -> Page | None:
        """EMPTY_PAGE if a cached ancestor says that nothing is there, else None."""
        if not self.root[0]:
            return EMPTY_PAGE
        for upper in range(level + 1, ROOT_LEVEL + 1):
            child = index >> FANOUT_BITS * (upper - 1 - level)
            key = page_key(upper, child >> FANOUT_BITS)
            page = self._young.get(key) or self._old.get(key)
            if page is not None:
                return None if page[child & FANOUT_MASK] else EMPTY_PAGE
        return None

    def entry_of_page_now(self, level: int, index: int) -> tuple[int, int] | None:
        """(address, check) of a page as its parent has it, or None if the parent isn't cached."""
        if level == ROOT_LEVEL:
            return self.root
        parent = self.page_now(level + 1, index >> FANOUT_BITS)
        if parent is None:
            return None
        slot = index & FANOUT_MASK
        return parent[slot], parent[FANOUT + slot]

    async def load(self, level: int, indices: Iterable[int]) -> dict[int, Page]:
        """Return the pages, reading those that aren't cached. Raises TierError EIO for a damaged one."""
        wanted = list(indices)
        while True:
            generation = self._generation
            found: dict[int, Page] = {}
            missing: list[int] = []
            for index in wanted:
                page = self.page_now(level, index)
                if page is None:
                    missing.append(index)
                else:
                    found[index] = page
            if not missing:
                return found
            entries = await self._entries_of(level, missing)
            if generation == self._generation:
                pages = await self._read_pages([entries[index] for index in missing], level, missing)
                # The tree may have been replaced meanwhile: then these are pages of the old one; look again.
                if generation == self._generation:
                    for index, page in zip(missing, pages, strict=True):
                        found[index] = page
                        key = page_key(level, index)
                        if page is not EMPTY_PAGE:
                            self._insert(key, page)
                            if self.loaded is not None:
                                self.loaded.add(key)
                    return found

    async def _entries_of(self, level: int, indices: Sequence[int]) -> dict[int, tuple[int, int]]:
        if level == ROOT_LEVEL:
            return {0: self.root}
        parents = await self.load(level + 1, sorted({index >> FANOUT_BITS for index in indices}))
        entries = {}
        for index in indices:
            parent = parents[index >> FANOUT_BITS]
            slot = index & FANOUT_MASK
            entries[index] = (parent[slot], parent[FANOUT + slot])
        return entries

    async def _read_pages(self, entries: Sequence[tuple[int, int]], level: int, indices: Sequence[int]) -> list[Page]:
        pages = await read_pages(self._segments, entries, f"of {self.name}, level {level}", indices)
        return [EMPTY_PAGE if page is None else page for page in pages]

    # -- changing (the checkpoint's) -----------------------------------------------------------------------------

    def _insert(self, key: int, page: Page) -> None:
        if key not in self._young:
            self._cache.added()
        self._young[key] = page

    def age(self) -> None:
        """The young generation becomes the old one; what was old is dropped."""
        self._old = self._young
        self._young = {}

    def holds_leaves(self, count: int) -> bool:
        """Whether so many leaves are worth caching at once."""
        return self._cache.holds(count)

    def has_leaf(self, index: int) -> bool:
        """Whether some version of a leaf is cached."""
        return index in self._young or index in self._old

    def replace_page(self, level: int, index: int, page: Page) -> None:
        """A checkpoint has a newer version of a page; the overlay that made it newer still covers the difference."""
        key = page_key(level, index)
        self._old.pop(key, None)
        if self.loaded is not None:
            self.loaded.discard(key)
        self._insert(key, page)

    def commit(self, root: tuple[int, int], inner: dict[int, Page], stale: Sequence[Iterable[int]] = ()) -> None:
        """The checkpoint is committed: from now on this is the tree.

        `inner` are its new inner pages by key; `stale` are leaves that are others now, and were not `replace_page`d.
        """
        self.root = root
        self._generation += 1
        for leaves in stale:
            for index in leaves:
                self._young.pop(int(index), None)
                self._old.pop(int(index), None)
        for key in self.loaded or ():
            self._young.pop(key, None)
            self._old.pop(key, None)
        self.loaded = None
        for layer in (self._young, self._old):
            for key in [key for key in layer if key >> LEVEL_SHIFT and key in inner]:
                del layer[key]
        for key, page in inner.items():
            self._insert(key, page)

    def forget(self) -> None:
        """Drop every cached page: a checkpoint failed half-way, or subtrees were detached."""
        self._young = {}
        self._old = {}
        self.loaded = None
        self._generation += 1

    def close(self) -> None:
        """The volume is gone."""
        self.forget()
        self._cache.detach(self)


async def read_pages(
    segments: SegmentTable, entries: Sequence[tuple[int, int]], what: str, indices: Sequence[int] | None = None
) -> list[Page | None]:
    """Read and verify the pages at these (address, check) entries; None for an entry that is a hole.

    A page that was given up with its device, or whose entry says BAD, is BAD_PAGE. Raises TierError EIO naming the
    device and offset of a page that fails its check: `what` they all are, and where `indices` are given its own.
    """

    def named(i: int) -> str:
        return what if indices is None else f"{what}, index {indices[i]}"

    by_device: dict[int, list[int]] = {}
    pages: list[Page | None] = [None] * len(entries)
    for i, (address, _) in enumerate(entries):
        if address == BAD or (segments.substitutes and address in segments.substitutes):
            pages[i] = segments.substitutes.get(address, BAD_PAGE)
        elif address:
            segment = segments.by_id.get(address >> 24)
            if segment is None:
                raise TierError(
                    errno.EIO,
                    f"a map page {named(i)} lies in segment {address >> 24}, which is not in use: run `terrace pool "
                    f"check {segments.pool_name}`",
                )
            if segment.device.state == "lost":
                pages[i] = BAD_PAGE
            else:
                by_device.setdefault(segment.device.index, []).append(i)
    # All segments are pinned before the first wait: a checkpoint may free what is not.
    places = {i: segments.by_id[entries[i][0] >> 24] for positions in by_device.values() for i in positions}
    for place in places.values():
        place.pins += 1
    try:
        for positions in by_device.values():
            device = places[positions[0]].device
            ranges = [(places[i].offset(entries[i][0] & SLOT_MASK), BLOCK_BYTES) for i in positions]
            blocks = await device.read_many(ranges)
            for i, (offset, _), block in zip(positions, ranges, blocks, strict=True):
                if check_of(block) != entries[i][1]:
                    segments.count_damage(entries[i][0])
                    raise DamagedPageError(
                        segments.pool_name, f"a map page {named(i)} on {device.path} at {offset} fails its checksum"
                    )
                pages[i] = page_of(block)
    finally:
        for place in places.values():
            place.pins -= 1
    return pages
