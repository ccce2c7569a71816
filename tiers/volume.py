"""A volume: bytes at offsets, read and written through the layers of its map.

The newest layer that says something about a block decides: the active overlay, the frozen one (while a checkpoint
writes it into pages), the committed map tree. `read_now` and `write_now` are synchronous and atomic on the trio
thread: between looking an entry up and using it nothing can change. What they can't do without waiting, they refuse,
and the awaited methods do it: load map pages, read from the device, wait for space.

A write is: checksum each block, one batch to the log, then the active overlay names the new places. All-zero blocks
are logged as unmapped and take no space. A write that covers a block in part merges it with what is there (or with
what an earlier write of the same batch put there); where that has to be read first, the merge is applied only if the
map still has the entry that was read.

On the base tier blocks may be packed into frames (`tiers.frames`). These are always read in a worker, which unpacks
them, and kept for a while: what a cached frame holds is served without waiting.
"""

import contextlib
import errno
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import groupby
from os import RWF_NOWAIT
from typing import TYPE_CHECKING

import trio

from tiers.bypass import LEAST_BYTES
from tiers.errors import NoRoomError, TierError
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
    ZERO_CHECK,
    check_of,
)
from tiers.limits import Limits, operations_of
from tiers.log import MAX_BATCH_BLOCKS
from tiers.maptree import FANOUT, FANOUT_BITS, FANOUT_MASK, ROOT_LEVEL, MapTree
from tiers.overlay import LEAF_BITS, Entry, Overlay
from tiers.policy import DEFAULT, Policy
from tiers.promotion import LARGEST_READ_BLOCKS
from tiers.record import OP_WORDS, UNMAP_WORD, WRITE_WORD, Kind, Op, header_slots_for

if TYPE_CHECKING:
    from tiers.engine import Engine

Buffer = bytes | bytearray | memoryview
Edges = dict[int, tuple[Entry, bytes]]
"""Blocks read beforehand for a merge: block -> (the entry it was read through, its bytes)."""

SYNC_WRITE_BYTES = 4 << 20
"""More than this in one go would hold the loop up for too long."""
PIECE_BYTES = 1 << 20
FRAMES_A_READ = 32
"""Frames read and unpacked in one go: 4 MiB of memory."""
READ_ATTEMPTS = 8
MERGE_ATTEMPTS = 4
WAKE_ROOM_BLOCKS = 64
"""Who has had to wait for room goes on when there is so much more than it needs: in the last scraps of room each block
would go alone, with a header of its own."""
MAX_TRIMS = 160
"""So many operations fit a header of one slot."""

RUN_SHIFT = 14
SLOW = 1 << RUN_SHIFT - 1
RUN_MASK = SLOW - 1
"""In `Volume.reads` a request for one block is its number, one for more is ~(block << RUN_SHIFT | blocks), with SLOW
where it had to wait for a device."""
MAX_RECORDED = 1 << 15
"""Requests that are remembered until the next drain; older ones are forgotten, which only costs warmth."""

_BLOCK_SLICES = [slice(i, i + BLOCK_BYTES) for i in range(0, PIECE_BYTES, BLOCK_BYTES)]
"""Ready-made: a quarter of the cost of checking 1 MiB was making these."""

EXTENT_HOLE = 1
EXTENT_ZERO = 2


class Volume:
    """One thin volume. Implements nbd's `Export` structurally."""

    description = ""
    read_only = False
    rotational = False
    can_multi_conn = True
    minimum_block_size = 1
    preferred_block_size = BLOCK_BYTES
    maximum_payload = 32 << 20

    def __init__(
        self, engine: "Engine", volume_id: int, short_name: str, size_bytes: int, tree: MapTree, created_at: float
    ) -> None:
        self.id = volume_id
        self.short_name = short_name
        self.name = f"{engine.pool_name}/{short_name}"
        self.size_bytes = size_bytes
        self.tree = tree
        self.created_at = created_at
        self.policy_name = ""
        """Empty: the default policy."""
        self.policy = DEFAULT
        """What that name means, now: another object as soon as it means something else."""
        self.policy_missing = False
        """The name means nothing, so the default holds."""
        self._limits: Limits | None = None
        self.queued = 0
        """Writes that wait for room in the pool."""
        self._engine = engine
        self._preadv = engine.preadv
        self.active = self.new_overlay()
        self.frozen: Overlay | None = None
        self.open_count = 0
        self.deleted = False
        self._merge_lock = trio.Lock()
        self._merging = False
        self._stream = (0, 0)
        """(start, end) in bytes of the run of large writes that came last."""
        self._segments = engine.segments.by_id
        self._write_word = WRITE_WORD | volume_id
        self._unmap_word = UNMAP_WORD | volume_id
        # What clients did lately, for `tiers.recorder`: appending is all that it may cost a request.
        self.reads: deque[int] = deque(maxlen=MAX_RECORDED)
        self.writes: deque[int] = deque(maxlen=MAX_RECORDED * OP_WORDS)
        """Operations as they were logged, word by word."""
        self._note_read = self.reads.append
        self.slow_reads: dict[str, int] = {"fast": 0, "base": 0}

    def obey(self, policy: Policy) -> None:
        """This policy holds from now on, also for requests that wait."""
        self.policy = policy
        if policy.is_limited and self._limits is None:
            self._limits = Limits(policy)
        elif self._limits is not None:
            self._limits.change(policy)
            if not policy.is_limited:
                self._limits = None

    @property
    def throttled(self) -> int:
        """How many requests wait for the limits of the policy."""
        return 0 if self._limits is None else self._limits.waiting

    def new_overlay(self) -> Overlay:
        """An empty overlay of the kind that suits the volume's size."""
        small_leaves = self._engine.settings.small_volume_leaves
        return Overlay(small=self.size_bytes >> BLOCK_SHIFT <= small_leaves << LEAF_BITS)

    # -- the map, layer by layer ---------------------------------------------------------------------------------

    def acquire(self) -> None:
        """Somebody uses the volume: it can't be deleted or shrunk."""
        self.open_count += 1

    def release(self) -> None:
        """The use that `acquire` began has ended."""
        self.open_count -= 1

    def entry_now(self, block: int) -> Entry | None:
        """The entry of a block; None if a map page has to be loaded first."""
        entry = self.active.get(block)
        if entry is None and self.frozen is not None:
            entry = self.frozen.get(block)
        if entry is None:
            page = self.tree.leaf_now(block >> FANOUT_BITS)
            if page is None:
                return None
            slot = block & FANOUT_MASK
            return page[slot], page[FANOUT + slot]
        return entry

    def entries_now(self, block: int, count: int) -> tuple[list[int], list[int]] | None:
        """Addresses and checks of `count` blocks; None if a map page has to be loaded first."""
        addresses: list[int] = []
        checks: list[int] = []
        end = block + count
        at = block
        while at < end:
            page = self.tree.leaf_now(at >> FANOUT_BITS)
            if page is None:
                return None
            lo = at & FANOUT_MASK
            hi = min(FANOUT, lo + end - at)
            addresses += page[lo:hi].tolist()
            checks += page[FANOUT + lo : FANOUT + hi].tolist()
            at += hi - lo
        if self.frozen is not None:
            self.frozen.patch(block, addresses, checks)
        if self.active:
            self.active.patch(block, addresses, checks)
        return addresses, checks

    async def entries(self, block: int, count: int) -> tuple[list[int], list[int]]:
        """As `entries_now`, loading what is missing. `count` is at most a few thousand."""
        while (found := self.entries_now(block, count)) is None:
            await self.tree.load(0, range(block >> FANOUT_BITS, (block + count - 1 >> FANOUT_BITS) + 1))
        return found

    # -- reading -------------------------------------------------------------------------------------------------

    def read_now(self, offset: int, length: int, into: memoryview) -> bool:
        """Fill `into` with verified bytes if no device has to be waited for. False means: ask `read`."""
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
                self._offer(block, found[0], found[1], into, [])
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
            self._offer(block, [address], [check], into, [])
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

    async def read(self, offset: int, length: int, into: memoryview) -> None:
        """Fill `into` with verified bytes. Raises TierError EIO for a block that can't be read or fails its check."""
        if self._limits is not None:
            await self._limits.take(operations_of(length), length)
        await self._read_pieces(offset, length, into)

    async def _read_pieces(self, offset: int, length: int, into: memoryview) -> None:
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
        self._offer(block, addresses, checks, into, suspects)
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

    def _offer(
        self, block: int, addresses: list[int], checks: list[int], into: memoryview, suspects: list[int]
    ) -> None:
        """Offer what was read from base for promotion."""
        promoter = self._engine.promoter
        if len(addresses) > LARGEST_READ_BLOCKS or not promoter.has_room():
            return
        for i, address in enumerate(addresses):
            segment = self._segments.get(address >> SLOT_BITS)
            if segment is not None and segment.device.tier == "base" and i not in suspects:
                promoter.offer(self, block + i, (address, checks[i]), into[i << BLOCK_SHIFT : i + 1 << BLOCK_SHIFT])

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
        return TierError(errno.EIO, f"{self.name} at byte {block << BLOCK_SHIFT}: the block was lost to a device error")

    # -- writing -------------------------------------------------------------------------------------------------

    def write_now(self, writes: Sequence[tuple[int, Buffer]]) -> bool:
        """Log these writes if nothing has to be waited for; False means that nothing happened. Later ones win.

        Raises TierError if the device refuses: then none may be acknowledged.
        """
        self._require_alive()
        if self._merging:
            return False
        if self._limits is not None:
            return self._write_limited_now(self._limits, writes)
        total = 0
        for _, data in writes:
            total += len(data)
        if total >= LEAST_BYTES and self._follow_stream(writes):
            return False
        blocks = (total >> BLOCK_SHIFT) + 2 * len(writes)
        if total > SYNC_WRITE_BYTES:
            return False
        space = self._engine.space
        charge = blocks
        if not space.admit(blocks, blocks):
            # That was an upper bound, which is cheap. Where room is short, what a write really takes decides.
            blocks, charge = self._exact_charge(writes)
            if not space.admit(blocks, charge):
                return False
        return self._write_admitted(writes, None, charge)

    def _exact_charge(self, writes: Sequence[tuple[int, Buffer]]) -> tuple[int, int]:
        """How many blocks these writes are, and how many of them the volume may not own yet."""
        blocks = new = 0
        for offset, data in writes:
            first = offset >> BLOCK_SHIFT
            count = (offset + len(data) + BLOCK_MASK >> BLOCK_SHIFT) - first
            blocks += count
            found = self.entries_now(first, count)
            new += count if found is None else sum(map(self._needs_a_slot, found[0]))
        return blocks, new

    def _write_limited_now(self, limits: Limits, writes: Sequence[tuple[int, Buffer]]) -> bool:
        operations = length = 0
        for _, data in writes:
            operations += operations_of(len(data))
            length += len(data)
        if not limits.may_go(operations, length, requests=len(writes)):
            return False
        with self._unlimited():
            done = self.write_now(writes)
        if done:
            limits.spend(operations, length)
        return done

    def _write_admitted(
        self, writes: Sequence[tuple[int, Buffer]], edges: Edges | None, charge: int, *, keep_zeroes: bool = False
    ) -> bool:
        for offset, data in writes:
            if (offset | len(data)) & BLOCK_MASK:
                aligned = self._align(writes, edges or {})
                if aligned is None:
                    return False
                writes = aligned
                break
        self._log_blocks(writes, keep_zeroes=keep_zeroes)
        self._engine.space.active_charge += charge
        return True

    def _align(self, writes: Sequence[tuple[int, Buffer]], edges: Edges) -> list[tuple[int, Buffer]] | None:
        """Turn writes of any alignment into whole blocks, merging with the staged bytes of this very batch."""
        staged: dict[int, Buffer] = {}
        result: list[tuple[int, Buffer]] = []

        def merge(block: int, lo: int, part: Buffer) -> bool:
            old = staged.get(block)
            if old is None:
                old = self._edge_now(block, edges)
                if old is None:
                    return False
            merged = bytearray(old)
            merged[lo : lo + len(part)] = part
            staged[block] = merged
            result.append((block << BLOCK_SHIFT, merged))
            return True

        for offset, data in writes:
            view = memoryview(data)
            at, end = offset, offset + len(view)
            if at & BLOCK_MASK or end - at < BLOCK_BYTES:
                head = min(BLOCK_BYTES - (at & BLOCK_MASK), end - at)
                if head and not merge(at >> BLOCK_SHIFT, at & BLOCK_MASK, view[:head]):
                    return None
                at += head
            middle_end = end & ~BLOCK_MASK
            if at < middle_end:
                middle = view[at - offset : middle_end - offset]
                result.append((at, middle))
                for i in range(0, len(middle), BLOCK_BYTES):
                    staged[at + i >> BLOCK_SHIFT] = middle[i : i + BLOCK_BYTES]
                at = middle_end
            if at < end and not merge(at >> BLOCK_SHIFT, 0, view[at - offset :]):
                return None
        return result

    def _edge_now(self, block: int, edges: Edges) -> Buffer | None:
        """The present bytes of a block, if they can be had without waiting or were prepared and are still present."""
        prepared = edges.get(block)
        if prepared is not None and self.entry_now(block) == prepared[0]:
            return prepared[1]
        into = bytearray(BLOCK_BYTES)
        return into if self.read_now(block << BLOCK_SHIFT, BLOCK_BYTES, memoryview(into)) else None

    def _log_blocks(self, writes: Sequence[tuple[int, Buffer]], *, keep_zeroes: bool) -> None:
        """Append whole-block writes, in as many batches as segments and buffer limits ask for, and map them.

        There is no checkpoint in here: what a batch says and what the overlay says change together.
        """
        ops: list[int] = []
        checks: list[int] = []
        buffers: list[Buffer] = []
        left = self._batch_room()
        word = self._write_word
        for offset, data in writes:
            block = offset >> BLOCK_SHIFT
            if len(data) == BLOCK_BYTES and left:
                check = check_of(data)
                if check != ZERO_CHECK:
                    ops += (word, block, 1)
                    checks.append(check)
                    buffers.append(data)
                    left -= 1
                    continue
                block_checks = [check]
            else:
                data = memoryview(data)
                block_checks = checks_of(data)
            for first, count, is_hole in _data_runs(data, block_checks, keep_zeroes=keep_zeroes):
                at, end = first, first + count
                while at < end:
                    if not left:
                        self._append(ops, checks, buffers)
                        ops, checks, buffers = [], [], []
                        left = self._batch_room()
                    if is_hole:
                        ops += (self._unmap_word, block + at, end - at)
                        left -= 1
                        break
                    run = min(left, end - at)
                    ops += (word, block + at, run)
                    checks += block_checks[at : at + run]
                    buffers.append(memoryview(data)[at << BLOCK_SHIFT : at + run << BLOCK_SHIFT])
                    left -= run
                    at += run
        self._append(ops, checks, buffers)

    def rewrite(self, writes: Sequence[tuple[int, Buffer]]) -> None:
        """Log whole blocks that hold what they held before, in a new place. Admission is the caller's."""
        written, noted = self._engine.client_written_bytes, self.writes
        self.writes = deque(maxlen=0)
        try:
            self._log_blocks(writes, keep_zeroes=True)
        finally:
            self._engine.client_written_bytes, self.writes = written, noted  # no client wrote this

    def _batch_room(self) -> int:
        """How many blocks, each with an operation and a buffer of its own, the next batch may have; at least one."""
        room = self._engine.log_room()
        most = min(room, MAX_BATCH_BLOCKS)
        return min(most, room - header_slots_for(most, most))

    def _append(self, ops: list[int], checks: list[int], buffers: list[Buffer]) -> None:
        if not ops:
            return
        engine = self._engine
        address = engine.log.append(ops, checks, buffers)
        engine.client_written_bytes += len(checks) << BLOCK_SHIFT
        if checks:
            self.writes.extend(ops)
        self.apply_batch(ops, checks, address)
        engine.appended()

    def apply_batch(self, ops: list[int], checks: list[int], address: int) -> None:
        """Let the active overlay name what a logged batch brought. Also the replay's way in."""
        active = self.active
        patches = active.patches
        space = self._engine.space
        segments = self._engine.segments
        before = active.weight
        dropped: list[int] = []
        if checks:
            segments.add_pending(address, len(checks))
        at = 0
        for i in range(0, len(ops), OP_WORDS):
            word, block, count = ops[i : i + OP_WORDS]
            if word == self._write_word:
                if count == 1:
                    # `Overlay.put` for the commonest case, without the call.
                    patch = patches.get(block >> LEAF_BITS)
                    if patch is not None:
                        slot = block & FANOUT_MASK
                        old = patch[slot]
                        patch[slot] = address + at
                        patch[FANOUT + slot] = checks[at]
                        if old >= FIRST_ADDRESS:
                            dropped.append(old)
                    elif old := active.put(block, address + at, checks[at]):
                        dropped.append(old)
                else:
                    dropped += active.put_run(block, address + at, checks[at : at + count])
                at += count
            else:
                dropped += active.unmap(block, count)
        if dropped:
            segments.drop_pending(dropped)
        space.active_weight += active.weight - before

    async def write(self, offset: int, data: Buffer, *, keep_zeroes: bool = False) -> None:
        """Write, waiting for space, map pages and the blocks to merge with. `data` must not change meanwhile."""
        view = memoryview(data)
        if self._limits is not None:
            await self._limits.take(operations_of(len(view)), len(view))
        first_refusal_s: float | None = None
        at = 0
        while at < len(view):
            # Pieces end at block boundaries, so that only the first and last can need a merge.
            end = min(len(view), (offset + at + PIECE_BYTES & ~BLOCK_MASK) - offset)
            try:
                if keep_zeroes or not await self._write_past(offset + at, view[at:end]):
                    await self._write_piece(offset + at, view[at:end], keep_zeroes=keep_zeroes)
            except NoRoomError as error:
                first_refusal_s = trio.current_time() if first_refusal_s is None else first_refusal_s
                await self._queue(error, end - at, first_refusal_s)
                continue
            at = end

    async def _queue(self, refusal: NoRoomError, length: int, since_s: float) -> None:
        """Wait until it is worth trying again to write `length` bytes that were refused for want of room.

        Raises NoRoomError if the policy doesn't want that, or not for any longer. Nothing is held meanwhile: other
        writes, which may be to blocks that the volume has already, and trims go on.
        """
        policy = self.policy
        if policy.when_full != "queue":
            raise refusal
        left_s = since_s + policy.queue_timeout_s - trio.current_time()
        if left_s <= 0:
            raise NoRoomError(
                f"{refusal} (the write waited for room for {policy.queue_timeout_s:g} s, which is the queue_timeout of "
                f"the policy {policy.name!r})"
            )
        self.queued += 1
        try:
            blocks = (length >> BLOCK_SHIFT) + 2
            await self._engine.space.wait_in_queue(blocks, left_s, lambda: self.policy is policy)
        finally:
            self.queued -= 1

    def _follow_stream(self, writes: Sequence[tuple[int, Buffer]]) -> bool:
        """Note where the volume's stream of writes has come to; whether it is long and should go straight to base."""
        start, end = self._stream
        for offset, data in writes:
            if offset != end:
                start = offset
            end = offset + len(data)
        self._stream = start, end
        return self._is_stream(start, end)

    def _is_stream(self, offset: int, end: int) -> bool:
        start, stop = self._stream
        cutoff = self.policy.stream_cutoff_bytes
        return 0 < cutoff < stop - start and start <= offset and end <= stop and self._engine.bypass.takes(self)

    async def _write_past(self, offset: int, data: memoryview) -> bool:
        """Write a piece of a long stream straight to base; False: it isn't one, or base has no room."""
        if (offset | len(data)) & BLOCK_MASK or len(data) < LEAST_BYTES or self._merging:
            return False
        if not self._is_stream(offset, offset + len(data)):
            return False
        charge = await self._admission(offset >> BLOCK_SHIFT, len(data) >> BLOCK_SHIFT)
        self._require_alive()
        space = self._engine.space
        space.passing_charge += charge
        may_be_logged = True
        try:
            may_be_logged = await self._engine.bypass.write(self, offset >> BLOCK_SHIFT, data)
        finally:
            space.passing_charge -= charge
            if may_be_logged:  # so it may where it was cancelled
                space.active_charge += charge
        return may_be_logged

    async def _write_piece(self, offset: int, data: memoryview, *, keep_zeroes: bool) -> None:
        first = offset >> BLOCK_SHIFT
        count = (offset + len(data) - 1 >> BLOCK_SHIFT) - first + 1
        partial = sorted(
            {block for block, at in ((first, offset), (first + count - 1, offset + len(data))) if at & BLOCK_MASK}
        )
        for _ in range(MERGE_ATTEMPTS):
            if self._merging:
                async with self._merge_lock:
                    pass
            if await self._merge_piece(offset, data, first, count, partial, keep_zeroes=keep_zeroes):
                return
        # Others keep changing the block: hold them off. Fast writers turn into slow ones, and these wait for the lock.
        async with self._merge_lock:
            self._merging = True
            try:
                while not await self._merge_piece(offset, data, first, count, partial, keep_zeroes=keep_zeroes):
                    pass
            finally:
                self._merging = False

    async def _merge_piece(
        self, offset: int, data: memoryview, first: int, count: int, partial: list[int], *, keep_zeroes: bool
    ) -> bool:
        """Prepare the blocks to merge with, then write if they are still what was prepared."""
        edges = {block: await self.edge(block) for block in partial}
        charge = await self._admission(first, count)
        self._require_alive()
        with self._unlimited():
            return self._write_admitted([(offset, data)], edges, charge, keep_zeroes=keep_zeroes)

    async def _admission(self, first: int, count: int) -> int:
        """Wait until `count` blocks from `first` may be logged; return how many of them to charge.

        Raises ENOSPC, EROFS.

        When it returns, nothing has happened since the answer was found: the caller must log without a checkpoint.
        """
        space = self._engine.space
        checkpoints = 0
        while True:
            space.require_writable()
            # Others that wait will go on with this one: together, if there is room for them too.
            spare = 0 if space.stuck else WAKE_ROOM_BLOCKS
            if space.admit(count, count, spare=spare):
                return count
            if space.charged + count <= space.capacity:
                await space.wait()
                continue
            found = self.entries_now(first, count)
            if found is None:
                await self.entries(first, count)
                continue
            new = sum(1 for address in found[0] if self._needs_a_slot(address))
            if space.charged + new > space.capacity and new:
                if checkpoints == 2 or not (space.active_weight or space.frozen_weight):
                    raise NoRoomError(
                        f"the pool {self._engine.pool_name} is full: delete or trim something, or grow it "
                        f"(`terrace pool grow`)"
                    )
                checkpoints += 1
                await self._engine.checkpoint()
            elif space.admit(count, 0, spare=spare):
                return new
            else:
                await space.wait()

    def _needs_a_slot(self, address: int) -> bool:
        """Whether a write over what lies there takes more space than the volume has for it: of a hole, or unpacked."""
        segment = self._segments.get(address >> 24)
        return address == UNMAPPED or (segment is not None and segment.kind is Kind.PACKED)

    def _require_alive(self) -> None:
        if self.deleted:
            raise TierError(errno.ESTALE, f"{self.name} was deleted")

    async def flush(self) -> None:
        """Return when every write, trim and zero whose call had returned is durable.

        Raises TierError if it can't be.
        """
        if self._engine.log.broken:
            # A write that was refused may stand at the end of the log, whole, where nothing could be put over it: a
            # replay would take it. Nobody is told "durable" before a checkpoint records where the log really goes on.
            await self._engine.checkpoint()
        await self._engine.flusher.flush()

    def trim_now(self, ranges: list[tuple[int, int]]) -> bool:
        """Give the whole blocks inside these (offset, length) ranges back, if nothing has to be waited for."""
        self._require_alive()
        if self._merging or len(ranges) > MAX_TRIMS or not self._engine.may_release():
            return False
        spans: list[tuple[int, int]] = []
        for offset, length in ranges:
            start, end = self._whole_blocks(offset, length)
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], end)
            elif start < end:
                spans.append((start, end))
        if spans:
            self._engine.log_room()
            self._append([word for start, end in spans for word in (self._unmap_word, start, end - start)], [], [])
            self._engine.space.released()
        return True

    async def trim(self, offset: int, length: int) -> None:
        """Give the whole blocks inside the range back; they read as zeros. The rest of the range is left as it is."""
        start, end = self._whole_blocks(offset, length)
        if start < end:
            await self._unmap(start, end - start)
        else:
            await trio.lowlevel.checkpoint()

    def _whole_blocks(self, offset: int, length: int) -> tuple[int, int]:
        """The blocks [start, end) that lie wholly in a byte range, the volume's last one counting as whole."""
        end = offset + length
        end = end + BLOCK_MASK if end == self.size_bytes else end
        return offset + BLOCK_MASK >> BLOCK_SHIFT, end >> BLOCK_SHIFT

    async def write_zeroes(self, offset: int, length: int, *, no_hole: bool, fast: bool = False) -> None:
        """Make the range read as zeros: by unmapping, or with `no_hole` by real zero blocks that stay allocated.

        The latter is a write, so with `fast` it raises ENOTSUP and changes nothing.
        """
        if no_hole and fast:
            raise TierError(errno.ENOTSUP, "zeroes that keep their space are no faster than a write")
        end = offset + length
        if no_hole:
            zeroes = memoryview(bytes(min(length, PIECE_BYTES)))
            at = offset
            while at < end:
                piece = min(end - at, PIECE_BYTES - (at & BLOCK_MASK))
                await self.write(at, zeroes[:piece], keep_zeroes=True)
                await trio.lowlevel.checkpoint()
                at += piece
            return
        start_whole = offset + BLOCK_MASK & ~BLOCK_MASK
        end_whole = end & ~BLOCK_MASK
        if start_whole > end_whole:
            await self.write(offset, bytes(length))
            return
        if offset < start_whole:
            await self.write(offset, bytes(start_whole - offset))
        if start_whole < end_whole:
            await self._unmap(start_whole >> BLOCK_SHIFT, end_whole - start_whole >> BLOCK_SHIFT)
        if end_whole < end:
            await self.write(end_whole, bytes(end - end_whole))

    async def _unmap(self, block: int, count: int) -> None:
        await self._engine.admit_release()
        self._require_alive()
        self._engine.log_room()
        self._append([self._unmap_word, block, count], [], [])
        self._engine.space.released()

    async def edge(self, block: int) -> tuple[Entry, bytes]:
        """A block's entry and the bytes that were read through it, to prepare a merge with."""
        (address,), (check,) = await self.entries(block, 1)
        into = bytearray(BLOCK_BYTES)
        await self._read_pieces(block << BLOCK_SHIFT, BLOCK_BYTES, memoryview(into))
        return (address, check), bytes(into)

    def shrink_logged(self, size_bytes: int, last_block: Buffer | None) -> None:
        """Log in one batch that the volume ends earlier: the new last block, the tail unmapped, the size.

        `last_block`: its bytes with the tail zeroed, None if nothing is mapped there or the size ends with a block.
        Admission is the caller's. No checkpoint of trio in here.
        """
        first = size_bytes + BLOCK_MASK >> BLOCK_SHIFT
        count = (self.size_bytes + BLOCK_MASK >> BLOCK_SHIFT) - first
        ops = [self._unmap_word, first, count] if count else []
        checks: list[int] = []
        if last_block is not None:
            ops = [self._write_word, size_bytes >> BLOCK_SHIFT, 1, *ops]
            checks.append(check_of(last_block))
        engine = self._engine
        engine.log_room()
        resize = [Op.RESIZE << 56 | self.id, size_bytes, 0]
        address = engine.log.append(ops + resize, checks, [] if last_block is None else [last_block])
        self.apply_batch(ops, checks, address)
        engine.resized(self, size_bytes)
        engine.appended()
        engine.space.released()

    async def cache(self, offset: int, length: int) -> None:
        """Bring the range into the page cache: read what is mapped of it, a piece at a time."""
        into = memoryview(bytearray(min(length, PIECE_BYTES)))
        at, end = offset, offset + length
        while at < end:
            (span, flags), *_ = await self.extents(at, end - at, 1)
            stop = at + span
            if flags & EXTENT_HOLE:
                at = stop
            while at < stop:
                piece = min(PIECE_BYTES, stop - at)
                await self.read(at, piece, into[:piece])
                await trio.lowlevel.checkpoint()
                at += piece

    async def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """Describe a prefix of the range as (bytes, flags): HOLE|ZERO where nothing is mapped, 0 where data is.

        At most `limit` of them, neighbours differ, and terabytes of nothing cost a few page look-ups.
        """
        result: list[tuple[int, int]] = []
        at, end = offset, offset + length
        named: list[int] | None = None
        while at < end:
            block = at >> BLOCK_SHIFT
            most = (end - 1 >> BLOCK_SHIFT) + 1 - block
            hole = min(await self.tree_hole(block), most) if most > FANOUT else 0
            if hole > FANOUT:
                if named is None:
                    # Later writes are concurrent with this request; what it must know is in the layers by now.
                    layers = (self.active, self.frozen) if self.frozen is not None else (self.active,)
                    named = sorted(set().union(*(layer.named_leaves() for layer in layers)))
                next_leaf = bisect_left(named, block >> FANOUT_BITS)
                if next_leaf < len(named):
                    hole = min(hole, (named[next_leaf] << FANOUT_BITS) - block)
            if hole > FANOUT:
                runs = [(hole, False)]
            else:
                addresses, _ = await self.entries(block, min(most, FANOUT - (block & FANOUT_MASK)))
                runs = _run_lengths([address != UNMAPPED for address in addresses])
            for count, is_mapped in runs:
                block += count
                stop = min(end, block << BLOCK_SHIFT)
                flags = 0 if is_mapped else EXTENT_HOLE | EXTENT_ZERO
                if result and result[-1][1] == flags:
                    result[-1] = (result[-1][0] + stop - at, flags)
                elif len(result) == limit:
                    return result
                else:
                    result.append((stop - at, flags))
                at = stop
            await trio.lowlevel.checkpoint()
        return result

    async def tree_hole(self, block: int) -> int:
        """How many blocks from `block` on the committed tree certainly has no page for; 0 if there is a leaf."""
        tree = self.tree
        if not tree.root[0]:
            return 1 << FANOUT_BITS * (ROOT_LEVEL + 1)
        for level in range(ROOT_LEVEL, 0, -1):
            index = block >> FANOUT_BITS * (level + 1)
            page = (await tree.load(level, [index]))[index]
            shift = FANOUT_BITS * level
            slot = block >> shift & FANOUT_MASK
            if not page[slot]:
                last = slot
                while last + 1 < FANOUT and not page[last + 1]:
                    last += 1
                return (((block >> shift) + last - slot + 1) << shift) - block
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


def _data_runs(data: Buffer, checks: list[int], *, keep_zeroes: bool) -> list[tuple[int, int, bool]]:
    """Split blocks into runs (first, count, whether it is all zeros and may become a hole)."""
    if keep_zeroes or ZERO_CHECK not in checks:
        return [(0, len(checks), False)]
    runs: list[tuple[int, int, bool]] = []
    at = 0
    for is_hole, run in groupby(check == ZERO_CHECK and is_zero(data, i) for i, check in enumerate(checks)):
        count = sum(1 for _ in run)
        runs.append((at, count, is_hole))
        at += count
    return runs


def is_zero(data: Buffer, block: int) -> bool:
    """Whether a block of `data` is all zeros: the check is asked first, but only the bytes decide."""
    return memoryview(data)[block << BLOCK_SHIFT : block + 1 << BLOCK_SHIFT] == ZERO_BLOCK


def _run_lengths(values: list[bool]) -> list[tuple[int, bool]]:
    return [(sum(1 for _ in run), value) for value, run in groupby(values)]
