"""Reading blocks through a map: what a volume and a snapshot have in common.

`read_now` is synchronous and atomic on the trio thread: between looking an entry up and using it nothing can change.
What can't be done without waiting it refuses, and `read` does it: load map pages, read from the device. Which entry a
block has is the business of the class that inherits from this one (`entry_now`, `entries_now`, `load_leaves`).

On the base tier blocks may be packed into frames (`tiers.frames`). These are always read in a worker, which unpacks
them, and kept for a while: what a cached frame holds is served without waiting.
"""

import contextlib
import errno
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import groupby
from os import RWF_NOWAIT
from typing import TYPE_CHECKING

import numpy as np
import trio

from tiers.errors import TierError
from tiers.extents import EXTENT_ZERO, TIER_CONTEXT, allocation_of, checks_of_map, mapped_in, tiers_of
from tiers.frames import frame_of, index_of, unpack_all
from tiers.layout import (
    BAD,
    BLOCK_BYTES,
    BLOCK_MASK,
    BLOCK_SHIFT,
    FIRST_ADDRESS,
    SLOT_BITS,
    SLOT_MASK,
    UNMAPPED,
    ZERO_BLOCK,
    check_of,
)
from tiers.limits import Limits, operations_of
from tiers.losses import lost_in_words
from tiers.maptree import FANOUT, FANOUT_BITS, FANOUT_MASK, ROOT_LEVEL, MapTree, Page
from tiers.overlay import Entry
from tiers.policy import Placement
from tiers.record import Kind
from tiers.rotational import all_rotate

if TYPE_CHECKING:
    from tiers.engine import Engine
    from tiers.snapshot import Views

Buffer = bytes | bytearray | memoryview

PIECE_BYTES = 1 << 20
FRAMES_A_READ = 32
"""Frames read and unpacked in one go: 4 MiB of memory."""
READ_ATTEMPTS = 8

RUN_SHIFT = 14
SLOW = 1 << RUN_SHIFT - 1
RUN_MASK = SLOW - 1
"""In `Reader.reads` a request for one block is its number, one for more is ~(block << RUN_SHIFT | blocks), with SLOW
where it had to wait for a device."""

_BLOCK_SLICES = [slice(i, i + BLOCK_BYTES) for i in range(0, PIECE_BYTES, BLOCK_BYTES)]
"""Ready-made: a quarter of the cost of checking 1 MiB was making these."""


class Reader:
    """What can be read block by block, and is verified. Implements the reading half of nbd's `Export`."""

    description = ""
    can_multi_conn = True
    minimum_block_size = 1
    preferred_block_size = BLOCK_BYTES
    maximum_payload = 32 << 20

    def __init__(
        self, engine: "Engine", owner_id: int, name: str, size_bytes: int, tree: MapTree, created_at: float
    ) -> None:
        self.id = owner_id
        self.name = name
        self.size_bytes = size_bytes
        self.tree = tree
        self.created_at = created_at
        self.open_count = 0
        self.deleted = False
        self.gone = False
        """It has left the tables."""
        self._engine = engine
        self._preadv = engine.preadv
        self._segments = engine.segments.by_id
        self._moved = engine.relocations.moved
        self._limits: Limits | None = None
        # What clients did lately, for `tiers.recorder`: appending is all that it may cost a request.
        self.reads: deque[int] = deque(maxlen=0)
        self._note_read = self.reads.append
        self.slow_reads: dict[str, int] = {"fast": 0, "base": 0}

    @property
    def placement(self) -> Placement:
        """Where its policy wants its blocks."""
        raise NotImplementedError

    @property
    def of_mirror(self) -> bool:
        """Whether what it shows is a leg's, or has been handed down from one: its losses may be others' then."""
        raise NotImplementedError

    @property
    def rotational(self) -> bool:
        """Whether all the devices that it may be on rotate. Judged when a client connects."""
        return all_rotate(self._engine.segments.devices, self.placement)

    def acquire(self) -> None:
        """Somebody uses it: it can't be deleted or shrunk."""
        self.open_count += 1

    def release(self) -> None:
        """The use that `acquire` began has ended."""
        self.open_count -= 1

    def _require_alive(self) -> None:
        """Raise ESTALE once it is deleted, or replaced by a rollback: others may take its blocks over from then on."""
        if self.deleted:
            raise TierError(errno.ESTALE, f"{self.name} was deleted or rolled back: connect anew")

    # -- the map -------------------------------------------------------------------------------------------------

    def entry_now(self, block: int) -> Entry | None:
        """The entry of a block; None if a map page has to be loaded first."""
        raise NotImplementedError

    def entries_now(self, block: int, count: int) -> tuple[list[int], list[int]] | None:
        """Addresses and checks of `count` blocks; None if a map page has to be loaded first."""
        raise NotImplementedError

    async def load_leaves(self, first: int, last: int) -> None:
        """Load what `entries_now` needs of the blocks in leaves `first` to `last`."""
        raise NotImplementedError

    async def hole_at(self, block: int) -> int:
        """How many blocks from `block` on certainly have no committed page; 0 if there is a leaf."""
        raise NotImplementedError

    async def load_ahead(self, first: int, last: int, end: int) -> None:
        """As `load_leaves`, for who goes on to leaf `end`; and what `shared_now` needs of them."""
        await self.load_leaves(first, last)

    def named_leaves(self) -> list[int]:
        """The leaves, in order, in which something is mapped that no committed page tells of yet."""
        return []

    def next_named(self, leaf: int) -> int | None:
        """The first of these from `leaf` on; one in which something was may be told too."""
        return None

    def unmapped_now(self, block: int) -> int:
        """How many blocks from `block` on were unmapped as a whole, later than the committed pages tell.

        What was written there since is in one of the leaves that `next_named` tells.
        """
        return 0

    def shared_now(self, block: int, addresses: list[int]) -> list[bool] | None:
        """Which of the blocks that lie at these addresses others have too, so that writing over them takes space.

        Empty: none. None: a map page has to be loaded first.
        """
        return []

    async def entries(self, block: int, count: int) -> tuple[list[int], list[int]]:
        """As `entries_now`, loading what is missing. `count` is at most a few thousand."""
        while (found := self.entries_now(block, count)) is None:
            await self.load_leaves(block >> FANOUT_BITS, block + count - 1 >> FANOUT_BITS)
        return found

    def offer(self, block: int, addresses: list[int], checks: list[int], into: memoryview, suspects: list[int]) -> None:
        """What was read may be worth promoting: a volume's business."""

    # -- reading -------------------------------------------------------------------------------------------------

    def read_now(self, offset: int, length: int, into: memoryview) -> bool:
        """Fill `into` with verified bytes if no device has to be waited for. False means: ask `read`."""
        if self.deleted:
            self._require_alive()
        if self._limits is not None:
            return self._read_limited_now(self._limits, offset, length, into)
        if (offset | length) & BLOCK_MASK:
            return self._read_unaligned_now(offset, length, into)
        block = offset >> BLOCK_SHIFT
        if length != BLOCK_BYTES:
            if not length:
                return True
            found = self.entries_now(block, length >> BLOCK_SHIFT)
            if found is None or not self._read_entries_now(found[0], found[1], into):
                return False
            if (segment := self._segments.get(found[0][0] >> 24)) is not None and segment.fd == -1:
                self.offer(block, found[0], found[1], into, [])
            self._note_read(~(block << RUN_SHIFT | min(length >> BLOCK_SHIFT, RUN_MASK)))
            return True
        entry = self.entry_now(block)
        if entry is None:
            return False
        address, check = entry
        if address < FIRST_ADDRESS:
            if address == BAD:
                raise self._bad(block)
            into[:] = ZERO_BLOCK
            return True
        try:
            segment = self._segments[address >> 24]
            count = self._preadv(segment.fd, [into], segment.base + ((address & SLOT_MASK) << BLOCK_SHIFT), RWF_NOWAIT)
        except (OSError, KeyError):
            if not self._read_kept_frame_now(address, [check], into):
                return False
            # What is read most would stay among the kept frames, and so on base, for ever.
            self.offer(block, [address], [check], into, [])
            self._note_read(block)
            return True
        # A mismatch is not judged here: `read` looks again, on the device.
        if count == BLOCK_BYTES and check_of(into) == check:
            self._note_read(block)
            return True
        return False

    def _read_limited_now(self, limits: Limits, offset: int, length: int, into: memoryview) -> bool:
        operations = operations_of(length)
        if not limits.may_go(operations, length):
            return False
        with self._unlimited():
            done = self.read_now(offset, length, into)
        if done:
            limits.spend(operations, length)
        return done

    @contextlib.contextmanager
    def _unlimited(self) -> Iterator[None]:
        """What is done in here is part of a request that has paid. There must be no checkpoint of trio in it."""
        limits, self._limits = self._limits, None
        try:
            yield
        finally:
            self._limits = limits

    def _read_entries_now(self, addresses: list[int], checks: list[int], into: memoryview) -> bool:
        for first, count in runs_of(addresses):
            address = addresses[first]
            lo, hi = first << BLOCK_SHIFT, first + count << BLOCK_SHIFT
            part = into[lo:hi]
            if address < FIRST_ADDRESS:
                if address == BAD:
                    return False
                part[:] = bytes(hi - lo)
                continue
            segment = self._segments.get(address >> 24)
            if segment is None:
                return False
            if segment.fd == -1:
                if not self._read_kept_frame_now(address, checks[first : first + count], part):
                    return False
                continue
            if not segment.device.read_now(segment.base + ((address & SLOT_MASK) << BLOCK_SHIFT), part):
                return False
            if checks_of(part) != checks[first : first + count]:
                return False
        return True

    def _read_kept_frame_now(self, address: int, checks: list[int], into: memoryview) -> bool:
        """Blocks with consecutive addresses, if they lie in a frame that is kept and are what they should be."""
        content = self._engine.frames.get(address)
        if content is None:
            return False
        at = index_of(address) << BLOCK_SHIFT
        data = content[at : at + len(into)]
        if len(data) != len(into):
            return False
        into[:] = data
        return checks_of(into) == checks

    def _read_unaligned_now(self, offset: int, length: int, into: memoryview) -> bool:
        if not length:
            return True
        start = offset & ~BLOCK_MASK
        end = offset + length + BLOCK_MASK & ~BLOCK_MASK
        whole = memoryview(bytearray(end - start))
        if not self.read_now(start, end - start, whole):
            return False
        into[:] = whole[offset - start : offset - start + length]
        return True

    def holes_now(self, offset: int, length: int, shortest: int) -> list[tuple[int, int]] | None:
        """(offset, length) of what is not mapped and so reads as zeros; None if a page of the map has to be loaded.

        Each run of blocks that covers a multiple of `shortest` (bytes, whole blocks) is among them. To find these only
        one block in `shortest` is looked up: where everything is mapped, which is the rule, the answer costs little.
        """
        self._require_alive()
        if self._limits is not None:
            return None  # what it costs is counted where it is read
        stride = shortest >> BLOCK_SHIFT
        first, last = offset >> BLOCK_SHIFT, offset + length - 1 >> BLOCK_SHIFT
        entry_now = self.entry_now
        block = -(-first // stride) * stride
        while block <= last:
            entry = entry_now(block)
            if entry is None:
                return None
            if entry[0] == UNMAPPED:
                break
            block += stride
        else:
            return []
        found = self.entries_now(first, last + 1 - first)
        if found is None:
            return None
        holes = []
        at = offset
        for is_mapped, run in groupby(address != UNMAPPED for address in found[0]):
            first += sum(1 for _ in run)
            stop = min(offset + length, first << BLOCK_SHIFT)
            if not is_mapped:
                holes.append((at, stop - at))
            at = stop
        return holes

    async def read(self, offset: int, length: int, into: memoryview) -> None:
        """Fill `into` with verified bytes. Raises TierError EIO for a block that can't be read or fails its check."""
        self._require_alive()
        if self._limits is not None:
            await self._limits.take(operations_of(length), length)
        await self.read_anyway(offset, length, into)
        self._require_alive()  # else a rollback may have taken away some of what was looked for

    async def read_anyway(self, offset: int, length: int, into: memoryview) -> None:
        """The same without limits, and of what no client sees any more, too."""
        start = offset & ~BLOCK_MASK
        end = offset + length + BLOCK_MASK & ~BLOCK_MASK
        for at in range(start, end, PIECE_BYTES):
            piece_end = min(at + PIECE_BYTES, end)
            lo, hi = max(at, offset), min(piece_end, offset + length)
            target = into[lo - offset : hi - offset]
            if (lo, hi) == (at, piece_end):
                await self._read_blocks(at >> BLOCK_SHIFT, piece_end - at >> BLOCK_SHIFT, target)
            else:
                whole = memoryview(bytearray(piece_end - at))
                await self._read_blocks(at >> BLOCK_SHIFT, piece_end - at >> BLOCK_SHIFT, whole)
                target[:] = whole[lo - at : hi - at]

    async def _read_blocks(self, block: int, count: int, into: memoryview) -> None:
        """Read whole blocks: those whose entry changed under the read are read again, those that fail twice are EIO."""
        addresses, checks = await self.entries(block, count)
        suspects = await self._read_runs(addresses, checks, into)
        self.offer(block, addresses, checks, into, suspects)
        self._note_slow(addresses[0])
        self._note_read(
            ~(block << RUN_SHIFT | SLOW | count)
        )  # behind the offer: what judges it counts this read by itself
        for i in suspects:
            await self._read_suspect(block + i, into[i << BLOCK_SHIFT : i + 1 << BLOCK_SHIFT])

    def _note_slow(self, address: int) -> None:
        """Count a read that had to wait by the tier of its first block: a drain may come after its promotion."""
        segment = self._segments.get(address >> SLOT_BITS)
        if segment is not None:
            self.slow_reads[segment.device.tier] += 1

    async def _read_runs(self, addresses: list[int], checks: list[int], into: memoryview) -> list[int]:
        """Read every run, in one worker a device; return the positions whose bytes did not match.

        Frames are read in a worker of their own.
        """
        suspects: list[int] = []
        by_device: dict[int, list[tuple[int, int]]] = {}
        packed: list[tuple[int, int]] = []
        for first, count in runs_of(addresses):
            address = addresses[first]
            if address == BAD or (address != UNMAPPED and address >> 24 not in self._segments):
                suspects += range(first, first + count)
            elif address == UNMAPPED:
                into[first << BLOCK_SHIFT : first + count << BLOCK_SHIFT] = bytes(count << BLOCK_SHIFT)
            elif self._segments[address >> 24].kind is Kind.PACKED:
                packed.append((first, count))
            else:
                by_device.setdefault(self._segments[address >> 24].device.index, []).append((first, count))
        # All segments are pinned before the first wait: a checkpoint may free what is not.
        all_runs = [*packed, *(run for runs in by_device.values() for run in runs)]
        segments = {first: self._segments[addresses[first] >> 24] for first, _ in all_runs}
        for segment in segments.values():
            segment.pins += 1
        try:
            for runs in by_device.values():
                ranges = [
                    (segments[first].offset(addresses[first] & SLOT_MASK), count << BLOCK_SHIFT)
                    for first, count in runs
                ]
                try:
                    blocks = await segments[runs[0][0]].device.read_many(ranges)
                except OSError:
                    for first, count in runs:
                        suspects += range(first, first + count)
                    continue
                for (first, count), data in zip(runs, blocks, strict=True):
                    into[first << BLOCK_SHIFT : first + count << BLOCK_SHIFT] = data
                    found = checks_of(memoryview(data))
                    suspects += [first + i for i in range(count) if found[i] != checks[first + i]]
            if packed:
                suspects += await self._read_frames(packed, addresses, checks, into)
        finally:
            for segment in segments.values():
                segment.pins -= 1
        return suspects

    async def _read_frames(
        self, runs: list[tuple[int, int]], addresses: list[int], checks: list[int], into: memoryview
    ) -> list[int]:
        """Read runs that lie in frames, each frame once; return the positions whose bytes did not match.

        Their segments are pinned.
        """
        suspects: list[int] = []
        kept = self._engine.frames
        missing: dict[int, list[int]] = {}
        by_frame: dict[int, list[tuple[int, int]]] = {}
        for run in runs:
            by_frame.setdefault(frame_of(addresses[run[0]]), []).append(run)

        def take(key: int, content: bytes) -> None:
            for first, count in by_frame[key]:
                at = index_of(addresses[first]) << BLOCK_SHIFT
                data = content[at : at + (count << BLOCK_SHIFT)]
                into[first << BLOCK_SHIFT : (first << BLOCK_SHIFT) + len(data)] = data
                found = checks_of(data)
                if found != checks[first : first + count]:
                    suspects.extend(first + i for i in range(count) if found[i : i + 1] != [checks[first + i]])

        for key in by_frame:
            content = kept.get(key)
            if content is not None:
                take(key, content)
            else:
                missing.setdefault(self._segments[key >> 24].device.index, []).append(key)
        for keys in missing.values():
            device = self._segments[keys[0] >> 24].device
            for start in range(0, len(keys), FRAMES_A_READ):
                part = keys[start : start + FRAMES_A_READ]
                places = [self._segments[key >> 24].place(key) for key in part]
                try:
                    contents = await device.read_then(places, unpack_all)
                except OSError:
                    contents = [b""] * len(part)
                for key, content in zip(part, contents, strict=True):
                    take(key, content)
                    if content:
                        kept.put(key, content)
        return suspects

    async def _read_suspect(self, block: int, into: memoryview) -> None:
        """Read one block past the page cache; EIO if its entry stays the same and its bytes stay wrong."""
        for _ in range(READ_ATTEMPTS):
            (address,), (check,) = await self.entries(block, 1)
            if address == UNMAPPED:
                into[:] = ZERO_BLOCK
                return
            if address == BAD:
                raise self._bad(block)
            segment = self._segments.get(address >> 24)
            if segment is None:
                raise TierError(
                    errno.EIO,
                    f"{self.name} at byte {block << BLOCK_SHIFT}: its map names segment {address >> 24}, which is not "
                    "in use: run `terrace pool check`",
                )
            segment.pins += 1
            try:
                data = await segment.read_direct(address)
            except OSError as error:
                raise TierError(
                    error.errno or errno.EIO, f"{self.name} at byte {block << BLOCK_SHIFT}: {error}"
                ) from error
            finally:
                segment.pins -= 1
            if check_of(data) == check:
                into[:] = data
                return
            if self.entry_now(block) == (address, check):
                self._engine.segments.count_damage(address)
                offset, _ = segment.place(address)
                raise TierError(
                    errno.EIO,
                    f"{self.name} at byte {block << BLOCK_SHIFT}: the block on {segment.device.path} at "
                    f"{offset} fails its checksum",
                )
        raise TierError(
            errno.EIO, f"{self.name} at byte {block << BLOCK_SHIFT}: the block kept changing while it was read"
        )

    def _bad(self, block: int) -> TierError:
        return TierError(errno.EIO, f"{self.name} at byte {block << BLOCK_SHIFT}: {lost_in_words(self)}")

    async def cache(self, offset: int, length: int) -> None:
        """Bring the range into the page cache: read what is mapped of it, a piece at a time."""
        into = memoryview(bytearray(min(length, PIECE_BYTES)))
        at, end = offset, offset + length
        while at < end:
            (span, flags), *_ = await self.extents(at, end - at, 1)
            stop = at + span
            if flags & EXTENT_ZERO:
                at = stop
            while at < stop:
                piece = min(PIECE_BYTES, stop - at)
                await self.read(at, piece, into[:piece])
                await trio.lowlevel.checkpoint()
                at += piece

    # -- what is where -------------------------------------------------------------------------------------------

    async def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """Describe a prefix of the range as (bytes, flags): HOLE|ZERO where nothing is mapped, 0 where data is.

        At most `limit` of them, neighbours differ, and terabytes of nothing cost a few page look-ups.
        """
        return await allocation_of(self, offset, length, limit)

    async def mapped(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(offset, length) of what isn't a hole, in order; the last one reaches the end of the range.

        Where a hole is there, it has no length. Terabytes of nothing cost a few page look-ups.
        """
        return await mapped_in(self, offset, length)

    async def checks(self, offset: int, length: int) -> bytes:
        """8 bytes for each block that the range touches, little-endian: its XXH3-64 as the map has it.

        0 for what reads as zeros, mapped or not; 2**64 - 1 for a block that is lost, which is equal to nothing, not
        even to another such. No data is read. Raises TierError EIO for a damaged map page.
        """
        return await checks_of_map(self, offset, length)

    def contexts(self, prefix: str) -> Iterable[str]:
        """The metadata contexts that begin with `prefix`."""
        return (TIER_CONTEXT,) if TIER_CONTEXT.startswith(prefix) else ()

    def has_context(self, name: str) -> bool:
        """Whether there is such a context now."""
        return name == TIER_CONTEXT

    async def context_extents(self, context: str, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """Describe a prefix of the range as `extents` does, with the flags of that context (`tiers.extents`).

        Raises FileNotFoundError if there is no such context.
        """
        if context != TIER_CONTEXT:
            raise FileNotFoundError(errno.ENOENT, f"{self.name} offers no {context!r}")
        return await tiers_of(self, offset, length, limit)


async def at_one_moment(views: "Views", look: Callable[[], Awaitable[int]]) -> int:
    """What `look` finds out from several trees, one after the other, while none of them changes.

    Checkpoints move entries from tree to tree, in either direction: what looks into one too late and into the next one
    too early sees them nowhere.
    """
    while True:
        moment = views.moment
        found = await look()
        if moment == views.moment:
            return found


def entries_in(leaf_now: Callable[[int], Page | None], block: int, count: int) -> tuple[list[int], list[int]] | None:
    """Addresses and checks of `count` blocks, leaf by leaf; None if one of the leaves has to be loaded first."""
    addresses: list[int] = []
    checks: list[int] = []
    end = block + count
    at = block
    while at < end:
        page = leaf_now(at >> FANOUT_BITS)
        if page is None:
            return None
        lo = at & FANOUT_MASK
        hi = min(FANOUT, lo + end - at)
        addresses += page[lo:hi].tolist()
        checks += page[FANOUT + lo : FANOUT + hi].tolist()
        at += hi - lo
    return addresses, checks


async def hole_in(tree: MapTree, block: int) -> int:
    """How many blocks from `block` on a committed tree certainly has no page for; 0 if there is a leaf."""
    if not tree.root[0]:
        return 1 << FANOUT_BITS * (ROOT_LEVEL + 1)
    for level in range(ROOT_LEVEL, 0, -1):
        index = block >> FANOUT_BITS * (level + 1)
        page = (await tree.load(level, [index]))[index]
        shift = FANOUT_BITS * level
        slot = block >> shift & FANOUT_MASK
        if not page[slot]:
            below = np.flatnonzero(np.frombuffer(page, np.uint64)[slot:FANOUT])
            empty = int(below[0]) if len(below) else FANOUT - slot
            return ((block >> shift) + empty << shift) - block
    return 0


def runs_of(addresses: list[int]) -> list[tuple[int, int]]:
    """Group positions into runs (first, count) that one read serves: consecutive addresses, or all unmapped."""
    count = len(addresses)
    first = addresses[0]
    if first > BAD and addresses[-1] == first + count - 1 and addresses == list(range(first, first + count)):
        return [(0, count)]
    runs = []
    start = 0
    for i in range(1, count):
        step = 1 if addresses[start] > BAD else 0
        if addresses[i] != addresses[i - 1] + step:
            runs.append((start, i - start))
            start = i
    runs.append((start, count - start))
    return runs


def checks_of(data: Buffer) -> list[int]:
    """The check of each block of `data`."""
    view = memoryview(data)
    count = len(view) >> BLOCK_SHIFT
    if count <= len(_BLOCK_SLICES):
        return [check_of(view[part]) for part in _BLOCK_SLICES[:count]]
    return [check_of(view[i : i + BLOCK_BYTES]) for i in range(0, len(view), BLOCK_BYTES)]
