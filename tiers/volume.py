"""A volume: bytes at offsets, read and written through the layers of its map.

The newest layer that says something about a block decides: the active overlay, the frozen one (while a checkpoint
writes it into pages), the committed map tree. `read_now` and `write_now` are synchronous and atomic on the trio
thread: between looking an entry up and using it nothing can change. What they can't do without waiting, they refuse,
and the awaited methods do it: load map pages, read from the device, wait for space.

A write is: checksum each block, one batch to the log, then the active overlay names the new places. All-zero blocks
are logged as unmapped and take no space. A write that covers a block in part merges it with what is there (or with
what an earlier write of the same batch put there); where that has to be read first, the merge is applied only if the
map still has the entry that was read.

A volume that is a clone has below its own map the snapshot that it was made of, its `origin`: what its map says nothing
of is there. What its snapshots keep of earlier times, and why a write never touches it, is in `tiers.snapshot`.

How blocks are read is in `tiers.reader`.
"""

import contextlib
import errno
import logging
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import trio

from tiers.bypass import LEAST_BYTES
from tiers.changes import ChangedExtents, Marking
from tiers.errors import NoRoomError, TierError
from tiers.extents import load_ahead
from tiers.kept import KeptLeaves
from tiers.layout import (
    BAD,
    BLOCK_BYTES,
    BLOCK_MASK,
    BLOCK_SHIFT,
    FIRST_ADDRESS,
    SLOT_BITS,
    UNMAPPED,
    ZERO_BLOCK,
    ZERO_CHECK,
    check_of,
)
from tiers.limits import Limits, operations_of
from tiers.log import MAX_BATCH_BLOCKS
from tiers.maptree import EMPTY_PAGE, FANOUT, FANOUT_BITS, FANOUT_MASK, ROOT_LEVEL, MapTree, Page
from tiers.overlay import LEAF_BITS, UNSET, Entry, Overlay
from tiers.policy import DEFAULT, Placement, Policy
from tiers.promotion import LARGEST_READ_BLOCKS
from tiers.reader import PIECE_BYTES, Buffer, Reader, at_one_moment, checks_of, entries_in, hole_in
from tiers.record import OP_WORDS, UNMAP_WORD, WRITE_WORD, Kind, Op, header_slots_for
from tiers.snapshot import Snapshot, compose

if TYPE_CHECKING:
    from tiers.engine import Engine
    from tiers.mending import Elsewhere

logger = logging.getLogger(__name__)

Edges = dict[int, tuple[Entry, bytes]]
"""Blocks read beforehand for a merge: block -> (the entry it was read through, its bytes)."""

SYNC_WRITE_BYTES = 4 << 20
"""More than this in one go would hold the loop up for too long."""
MERGE_ATTEMPTS = 4
WAKE_ROOM_BLOCKS = 64
"""Who has had to wait for room goes on when there is so much more than it needs: in the last scraps of room each block
would go alone, with a header of its own."""
MAX_REWRITTEN = 64
"""So many blocks, each with an operation, a check and an old address, fit a header of one slot."""
LONG_TRIM_BLOCKS = 16 * FANOUT
"""From here on what snapshots keep of an unmapped range takes more map pages than the weight of a range stands for."""
LOST_BLOCK = b"lost".ljust(BLOCK_BYTES, b"\0")
"""What is logged in place of a block that is lost. Nobody is ever given it."""
LOST_BLOCK_CHECK = check_of(LOST_BLOCK)
MAX_TRIMS = 160
"""So many operations fit a header of one slot."""

MAX_RECORDED = 1 << 15
"""Requests that are remembered until the next drain; older ones are forgotten, which only costs warmth."""


class Volume(Reader):
    """One thin volume. Implements nbd's `Export` structurally."""

    read_only = False

    def __init__(
        self, engine: "Engine", volume_id: int, short_name: str, size_bytes: int, tree: MapTree, created_at: float
    ) -> None:
        super().__init__(engine, volume_id, f"{engine.pool_name}/{short_name}", size_bytes, tree, created_at)
        self.short_name = short_name
        self.policy_name = ""
        """Empty: the default policy."""
        self.policy = DEFAULT
        """What that name means, now: another object as soon as it means something else."""
        self.policy_missing = False
        """The name means nothing, so the default holds."""
        self.filling = False
        """It is not complete: somebody is filling it, or has begun to. No snapshot is taken of it by itself."""
        self.queued = 0
        """Writes that wait for room in the pool."""
        self.active = self.new_overlay()
        self.frozen: Overlay | None = None
        self.snapshots: list[Snapshot] = []
        """Those that a checkpoint has committed, oldest first; deleted ones until what they kept is sorted out."""
        self.kept: KeptLeaves | None = KeptLeaves()
        """Which of them have which leaves; None while that isn't known yet."""
        self.indexing: KeptLeaves | None = None
        """What is going to be `kept`."""
        self.taking: Snapshot | None = None
        """The one that the checkpoint under way is about to commit."""
        self.origin: Snapshot | None = None
        """What lies below the map of a clone."""
        self.layered = False
        """Its map may have entries that only mean something with an origin, or had one."""
        self.retired = False
        """No client will ever see it again, but snapshots or clones need what it holds."""
        self.heir: Volume | None = None
        """Who takes over the blocks that a retired volume has. Their headers go on naming this one."""
        self.family = volume_id
        """The id of the first volume of that name: a rollback makes another one, which takes name and family over."""
        self.trackers: dict[str, ChangedExtents] = {}
        """By name; every change is added to each of them in the step in which it is logged. See `Pool.set_mirror`."""
        self._marking = Marking()
        self.mirror_record = b""
        """What `Pool.set_mirror` was given last: the engine doesn't know what it means."""
        self.elsewhere: Elsewhere | None = None
        """Who may have the bytes of blocks that are damaged here."""
        self.healed_blocks = 0
        """Damaged blocks that were had from elsewhere, since the pool was opened."""
        self._saved_marks: tuple[bytes, dict[str, tuple[ChangedExtents, int]]] = b"", {}
        self.referenced_blocks = 0
        """Blocks with data as clients see them at the last checkpoint: for a clone, those of its origin too."""
        self._merge_lock = trio.Lock()
        self._merging = False
        self._stream = (0, 0)
        """(start, end) in bytes of the run of large writes that came last."""
        self._write_word = WRITE_WORD | volume_id
        self._unmap_word = UNMAP_WORD | volume_id
        self.reads = deque(maxlen=MAX_RECORDED)
        self._note_read = self.reads.append
        self.writes: deque[int] = deque(maxlen=MAX_RECORDED * OP_WORDS)
        """Operations as they were logged, word by word."""

    @property
    def shown_blocks(self) -> int:
        """Blocks with data that its clients see, at the last checkpoint."""
        return self.referenced_blocks if self.layered else self.tree.mapped_blocks

    @property
    def placement(self) -> Placement:
        """Where its policy wants its blocks."""
        return self.policy.placement

    @property
    def of_mirror(self) -> bool:
        """Whether it is a leg, or has been handed down from one."""
        if self.mirror_record or (self.origin is not None and self.origin.of_mirror):
            return True
        heir = self.heir
        while heir is not None and not heir.mirror_record:
            heir = heir.heir
        return heir is not None

    @property
    def has_history(self) -> bool:
        """Whether what is overwritten may have to be kept for a snapshot."""
        return bool(self.snapshots) or self.taking is not None

    def snapshots_at(self, index: int) -> list[Snapshot]:
        """Those that may have a leaf of their own there, oldest first."""
        if self.kept is None:
            return self.snapshots
        known = self._engine.lineage.snapshots
        return [known[i] for i in self.kept.ids(index) if i in known]

    def owners(self) -> "list[Volume | Snapshot]":
        """Whose trees may name a block that was written to this volume: the likeliest first."""
        found: list[Volume | Snapshot] = [self, *reversed(self.snapshots)]
        return found if self.heir is None else [*self.heir.owners(), *found]

    def owners_at(self, index: int) -> "list[Volume | Snapshot]":
        """The same, but for those that have nothing of this leaf."""
        found: list[Volume | Snapshot] = [self, *reversed(self.snapshots_at(index))]
        return found if self.heir is None else [*self.heir.owners_at(index), *found]

    def names_now(self, block: int) -> list[int] | None:
        """The present addresses by which a block of the volume is named, by anybody; None if a page must be loaded."""
        found: list[int] = []
        index, slot = block >> FANOUT_BITS, block & FANOUT_MASK
        for layer in (self.active, self.frozen):
            entry = None if layer is None else layer.get(block)
            if entry is not None:
                found.append(entry[0])
        if self.heir is not None:
            inherited = self.heir.names_now(block)
            if inherited is None:
                return None
            found += inherited
        for owner in (self, *self.snapshots_at(index)):
            page = owner.tree.leaf_now(index)
            if page is None:
                return None
            found.append(page[slot])
        return [self._moved.get(address, address) for address in found if address >= FIRST_ADDRESS]

    def rename(self, short_name: str) -> None:
        """Have another name from now on."""
        self.short_name = short_name
        self.name = f"{self._engine.pool_name}/{short_name}"

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

    def entry_now(self, block: int) -> Entry | None:
        """The entry of a block; None if a map page has to be loaded first."""
        entry = self.active.get(block)
        if entry is None:
            if self.frozen is not None:
                entry = self.frozen.get(block)
            if entry is None:
                index = block >> FANOUT_BITS
                page = self.layered_leaf_now(index) if self.layered else self.tree.leaf_now(index)
                if page is None:
                    return None
                slot = block & FANOUT_MASK
                entry = page[slot], page[FANOUT + slot]
            if self._moved and (moved := self._moved.get(entry[0])) is not None:
                return moved, entry[1]
        return entry

    def entries_now(self, block: int, count: int) -> tuple[list[int], list[int]] | None:
        """Addresses and checks of `count` blocks; None if a map page has to be loaded first."""
        found = entries_in(self.layered_leaf_now if self.layered else self.tree.leaf_now, block, count)
        if found is None:
            return None
        addresses, checks = found
        if self.frozen is not None:
            self.frozen.patch(block, addresses, checks)
        if self._moved:
            addresses = [self._moved.get(address, address) for address in addresses]
        if self.active:
            self.active.patch(block, addresses, checks)
        return addresses, checks

    def layered_leaf_now(self, index: int) -> Page | None:
        """A leaf of the committed map with what the origin has below it; None if a page has to be loaded first."""
        views = self._engine.views
        page = views.get(self.id, index)
        if page is None:
            own = self.tree.leaf_now(index)
            below = EMPTY_PAGE if self.origin is None else self.origin.leaf_now(index)
            if own is None or below is None:
                return None
            page = views.put(self.id, index, compose([own], below))
        return page

    async def layered_leaf(self, index: int) -> Page:
        """The same, reading what is missing. Raises TierError EIO for a damaged page."""
        views = self._engine.views
        while (page := self.layered_leaf_now(index)) is None:
            moment = views.moment
            own = (await self.tree.load(0, [index]))[index]
            below = EMPTY_PAGE if self.origin is None else await self.origin.leaf(index)
            if moment == views.moment:
                return views.put(self.id, index, compose([own], below))
        return page

    async def load_leaves(self, first: int, last: int) -> None:
        if not self.layered:
            await self.tree.load(0, range(first, last + 1))
            return
        for index in range(first, last + 1):
            await self.layered_leaf(index)

    async def hole_at(self, block: int) -> int:
        if self.origin is None:
            return await hole_in(self.tree, block)
        return await at_one_moment(self._engine.views, partial(self._hole_at, block))

    async def _hole_at(self, block: int) -> int:
        hole = await hole_in(self.tree, block)
        return min(hole, await self.origin.hole_in_trees(block)) if hole and self.origin is not None else hole

    async def load_ahead(self, first: int, last: int, end: int) -> None:
        await load_ahead(self.tree, first, last, end)
        if self.origin is not None:
            await self.origin.load_ahead(first, last, end)
        if self.layered:
            await self.load_leaves(first, last)
        if self.snapshots:
            await self.snapshots[-1].tree.load(0, range(first, last + 1))

    def _layers(self) -> tuple[Overlay, ...]:
        return (self.active, self.frozen) if self.frozen is not None else (self.active,)

    def named_leaves(self) -> list[int]:
        return sorted(set().union(*(layer.named_leaves() for layer in self._layers())))

    def next_named(self, leaf: int) -> int | None:
        found = [layer.next_named(leaf) for layer in self._layers()]
        return min((leaf for leaf in found if leaf is not None), default=None)

    def unmapped_now(self, block: int) -> int:
        return max(layer.ranges.after(block) for layer in self._layers())

    def shared_now(self, block: int, addresses: list[int]) -> list[bool] | None:
        """As `_is_own`, for many blocks at once."""
        if not (self.has_history or self.layered):
            return []
        count = len(addresses)
        shared = [self.taking is not None] * count
        trees = [self.tree] if self.layered else []
        if self.snapshots:
            trees.append(self.snapshots[-1].tree)
        for tree in trees:
            found = entries_in(tree.leaf_now, block, count)
            if found is None:
                return None
            shared = [kept or not address for kept, address in zip(shared, found[0], strict=True)]
        newest = [UNSET] * count
        self.active.patch(block, newest, [0] * count)
        return [kept and address == UNSET for kept, address in zip(shared, newest, strict=True)]

    def offer(self, block: int, addresses: list[int], checks: list[int], into: memoryview, suspects: list[int]) -> None:
        """Offer what was read from base for promotion."""
        promoter = self._engine.promoter
        if len(addresses) > LARGEST_READ_BLOCKS or not promoter.has_room():
            return
        for i, address in enumerate(addresses):
            segment = self._segments.get(address >> SLOT_BITS)
            if segment is not None and segment.device.tier == "base" and i not in suspects:
                promoter.offer(self, block + i, (address, checks[i]), into[i << BLOCK_SHIFT : i + 1 << BLOCK_SHIFT])

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
        total = edges = 0
        for offset, data in writes:
            length = len(data)
            total += length
            edges |= offset | length
        if total >= LEAST_BYTES and self._follow_stream(writes):
            return False
        blocks = total >> BLOCK_SHIFT
        if edges & BLOCK_MASK:
            blocks += 2 * len(writes)
        if total > SYNC_WRITE_BYTES:
            return False
        space = self._engine.space
        charge = blocks
        if not space.admit(blocks, blocks):
            # That was an upper bound, which is cheap: at most so many blocks, and none of them the volume's yet. Where
            # room is short, what a write really takes decides.
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
            new += count if found is None else self._new_blocks(first, found[0])
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
        if self.has_history:
            self._rewrite_history(writes)
            return
        self._log_unnoticed(writes)

    def _log_unnoticed(self, writes: Sequence[tuple[int, Buffer]]) -> None:
        """Log whole blocks that hold what they held: they earn no heat, and are neither clients' bytes nor changes."""
        written, noted, trackers = self._engine.client_written_bytes, self.writes, self.trackers
        self.writes, self.trackers = deque(maxlen=0), {}
        try:
            self._log_blocks(writes, keep_zeroes=True)
        finally:
            self._engine.client_written_bytes, self.writes, self.trackers = written, noted, trackers

    def _rewrite_history(self, writes: Sequence[tuple[int, Buffer]]) -> None:
        """The same where snapshots may name these blocks too: each block's old address is logged with it."""
        engine = self._engine
        at = 0
        while at < len(writes):
            part = writes[at : at + min(self._batch_room(), MAX_REWRITTEN)]
            blocks = [offset >> BLOCK_SHIFT for offset, _ in part]
            entries = [self.entry_now(block) for block in blocks]
            olds = [entry[0] for entry in entries if entry is not None]
            assert len(olds) == len(part), "a block is rewritten of which it isn't known where it is"
            checks = [check_of(data) for _, data in part]
            ops = [word for block in blocks for word in (Op.REWRITE << 56 | self.id, block, 1)]
            address = engine.log.append(ops, checks, [data for _, data in part], olds)
            for i, (block, old) in enumerate(zip(blocks, olds, strict=True)):
                engine.relocate(self, block, old, address + i, checks[i])
            engine.appended()
            at += len(part)

    async def copy_up(self, first: int, count: int) -> int:
        """Make blocks that are the origin's the volume's own, by writing what they hold; return how many were.

        Blocks that clients change meanwhile are theirs. Raises TierError EIO, ENOSPC.
        """
        before = await self.entries(first, count)
        data = memoryview(bytearray(count << BLOCK_SHIFT))
        await self.read_anyway(first << BLOCK_SHIFT, len(data), data)
        charge = await self._admission(first, count)
        self._require_alive()
        now = self.entries_now(first, count)
        if now is None:
            return 0  # a checkpoint has come in between: the next call goes on with them
        writes: list[tuple[int, Buffer]] = [
            (first + i << BLOCK_SHIFT, data[i << BLOCK_SHIFT : i + 1 << BLOCK_SHIFT])
            for i in range(count)
            if (now[0][i], now[1][i]) == (before[0][i], before[1][i])
            and now[0][i] >= FIRST_ADDRESS
            and not self.owns_now(first + i)
        ]
        if writes:
            self._log_unnoticed(writes)
            self._engine.space.active_charge += charge
        return len(writes)

    def owns_now(self, block: int) -> bool:
        """Whether a block that isn't a hole is the volume's own, not its origin's."""
        if not self.layered or self.active.get(block) is not None:
            return True
        if self.frozen is not None and self.frozen.get(block) is not None:
            return True
        page = self.tree.leaf_now(block >> FANOUT_BITS)
        return page is not None and page[block & FANOUT_MASK] != 0

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
        if self.trackers:
            self.mark(ops)
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

    async def put_anew(self, block: int, old: int, check: int, data: Buffer) -> bool:
        """Log a block that lies at `old`, and may be damaged there, in another place: the bytes are those of its check.

        Whoever names the old place names the new one then, snapshots too. False: nobody names it any more. Raises
        OSError: there is no room, a page of the map is damaged.
        """
        index = block >> FANOUT_BITS
        while True:
            charge = await self._admission(block, 1)
            # No checkpoint of trio from here to where it is logged.
            if self.gone:
                return False
            historic = self.has_history or self.retired
            entry = None if historic else self.entry_now(block)
            names = self.names_now(block) if historic else None
            if entry is None and names is None:
                for owner in self.owners_at(index) if historic else ():
                    await owner.tree.load(0, [index])
                if not historic:
                    await self.entries(block, 1)
                continue
            break
        if names is not None:
            if old not in names:
                return False
            engine = self._engine
            engine.log_room()  # which makes room for a block where the segment is full
            address = engine.log.append([Op.REWRITE << 56 | self.id, block, 1], [check], [data], [old])
            engine.relocate(self, block, old, address, check)
            engine.appended()
        else:
            if entry != (old, check):
                return False
            self._log_unnoticed([(block << BLOCK_SHIFT, data)])
        self._engine.space.active_charge += charge
        return True

    def mark(self, ops: Sequence[int]) -> None:
        """Add the blocks that these operations of a batch change to each tracker."""
        self._marking.mark(self.trackers, ops)

    def freeze_marks(self) -> tuple[bytes, dict[str, ChangedExtents]]:
        """The record and copies of the trackers, which are about to be saved. No checkpoint of trio in here."""
        self._saved_marks = self.mirror_record, self._edits() if self.trackers else {}
        return self.mirror_record, {name: tracker.copy() for name, tracker in self.trackers.items()}

    @property
    def marks_differ(self) -> bool:
        """Whether these were changed, other than by writes, since a checkpoint has taken them."""
        record, edits = self._saved_marks
        return bool(
            (self.trackers or edits or self.mirror_record or record)
            and (record != self.mirror_record or edits != self._edits())
        )

    def _edits(self) -> dict[str, tuple[ChangedExtents, int]]:
        return {name: (tracker, tracker.edits) for name, tracker in self.trackers.items()}

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
            new = self._new_blocks(first, found[0])
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

    def _new_blocks(self, first: int, addresses: list[int]) -> int:
        """How many of the blocks from `first` on, which lie at these addresses, a write over them takes space for."""
        if not (self.has_history or self.layered):
            return sum(map(self._needs_a_slot, addresses))
        return sum(
            self._needs_a_slot(address) or not self._is_own(block) for block, address in enumerate(addresses, first)
        )

    def _is_own(self, block: int) -> bool:
        """Whether what a block holds dies when it is overwritten: no snapshot and no origin keeps it, surely."""
        entry = self.active.get(block)
        if entry is not None:
            return True
        index, slot = block >> FANOUT_BITS, block & FANOUT_MASK
        if self.taking is not None or (self.layered and not ((leaf := self.tree.leaf_now(index)) and leaf[slot])):
            return False
        if not self.snapshots:
            return True
        kept = self.snapshots[-1].tree.leaf_now(index)
        return bool(kept and kept[slot])

    def _needs_a_slot(self, address: int) -> bool:
        """Whether a write over what lies there takes more space than the volume has for it: of a hole, or unpacked."""
        segment = self._segments.get(address >> 24)
        return address == UNMAPPED or (segment is not None and segment.kind is Kind.PACKED)

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
        count = sum(end - start for start, end in spans)
        pages = self.pages_to_keep(count)
        if pages and (count >= LONG_TRIM_BLOCKS or not self._engine.space.has_room_for_pages(pages * len(spans))):
            return False
        if spans:
            self._engine.log_room()
            self._append([word for start, end in spans for word in (self._unmap_word, start, end - start)], [], [])
            self._engine.space.released()
        return True

    async def trim(self, offset: int, length: int) -> None:
        """Give the whole blocks inside the range back; they read as zeros. The rest of the range is left as it is.

        Where snapshots keep what was there, and the pool has no room for the map of that, nothing happens: it would not
        give back anything.
        """
        start, end = self._whole_blocks(offset, length)
        if start < end:
            with contextlib.suppress(NoRoomError):
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

    def pages_to_keep(self, count: int) -> int:
        """Map pages at most that unmapping so many blocks takes besides: what snapshots keep, or hides an origin."""
        if not (self.has_history or self.layered):
            return 0
        mapped = self.referenced_blocks or self.tree.mapped_blocks
        if self.frozen is not None:
            mapped += self.frozen.weight  # each leaf that it names weighs something
        leaves = min((count >> FANOUT_BITS) + 2, mapped)
        if self.has_history and self.layered:
            leaves *= 2  # the clone says that its origin isn't to be seen there, its snapshot that it was
        return leaves + leaves // 64 + 4 * ROOT_LEVEL

    async def admit_unmap(self, count: int) -> None:
        """Wait until so many blocks may be unmapped. Raises EROFS, NoRoomError, as `Engine.admit_release`."""
        await self._engine.admit_release(self.pages_to_keep(count), kept_anyway=count < LONG_TRIM_BLOCKS)

    async def _unmap(self, block: int, count: int) -> None:
        await self.admit_unmap(count)
        self._require_alive()
        self._engine.log_room()
        self._append([self._unmap_word, block, count], [], [])
        self._engine.space.released()

    async def lose(self, offset: int, length: int) -> None:
        """Have whole blocks read as EIO until they are written: what they should hold can be had nowhere.

        For a copy that has something else there. Snapshots keep what they have. Raises OSError: there is no room.
        """
        engine = self._engine
        for block in range(offset >> BLOCK_SHIFT, offset + length >> BLOCK_SHIFT):
            charge = await self._admission(block, 1)
            self._require_alive()
            if block << BLOCK_SHIFT >= self.size_bytes:
                return  # it was shrunk meanwhile: there are zeros when it grows again
            # As a write, which is the volume's own, and which then is found damaged. Both in one batch: a crash leaves
            # both or none, and nobody ever reads what was written. No checkpoint of trio from here on.
            engine.log_room()
            head = engine.log.head
            address = head.id << SLOT_BITS | head.used + header_slots_for(2, 1)
            ops = [self._write_word, block, 1]
            lost = [Op.LOST << 56 | self.id, block, address]
            logged_at = engine.log.append(ops + lost, [LOST_BLOCK_CHECK], [LOST_BLOCK])
            assert logged_at == address
            self.apply_batch(ops, [LOST_BLOCK_CHECK], address)
            engine.relocate(self, block, address, BAD, 0)
            engine.losses.add(self.id, block)
            engine.space.active_charge += charge
            engine.appended()

    async def edge(self, block: int) -> tuple[Entry, bytes]:
        """A block's entry and the bytes that were read through it, to prepare a merge with."""
        (address,), (check,) = await self.entries(block, 1)
        into = bytearray(BLOCK_BYTES)
        await self.read_anyway(block << BLOCK_SHIFT, BLOCK_BYTES, memoryview(into))
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
