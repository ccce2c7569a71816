"""Healing: blocks that one leg can't read come from another, and are written anew where they are bad.

What is bad is found by whoever reads: a client's read here, which gets its answer from another leg and goes on, as it
may hold a lock of the extent; and the node of a leg itself, whose scrub finds damage, or which has lost a device
(`replication.damage`). Both are healed here, at the primary, for it alone knows the order of the writes: the extent's
writers wait, nothing is in flight there, and what another leg has is submitted to the bad one in its order. So no newer
write is ever undone.

What no leg can read stays as it is, and is remembered in `unmendable`, for who tells operators. It is tried again now
and then: a disk may have failed for a moment, and others may have been told meanwhile that the block is lost.

Nothing is written where a leg can't read its *map*. A write there would be taken, and the next checkpoint, which has to
merge it into the damaged page, would fail: that ends all writes to the pool, and with them the legs of all its mirrors.
Such a range is remembered in `map_damage`; the way out is a new leg (`new_leg`).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from replication.inflight import InFlight, Locks
from replication.leg import BLOCK_BYTES, EXTENT_BYTES, LOST_CHECK, Leg, LegState
from replication.members import Member, readable
from replication.mirrorreads import Reads
from replication.site import Gate
from replication.unreadable import first_step

log = logging.getLogger("replication.mirror")

MAX_BAD: Final = 1024
"""So many ranges wait to be healed; another one waits for its next reader, or for a scrub."""
MAX_UNMENDABLE: Final = 1024
AGAIN_S: Final = 60.0
"""So often what no leg could read is tried again."""
FEW: Final = 32
FEW_AGAIN_S: Final = 10.0
"""The same for so few blocks, as they may be on a leg that can read them again."""
WRITTEN_S: Final = 1.0
"""So long after a write to one of the few it is tried: it may have been written anew."""


@dataclass(frozen=True)
class Outcome:
    """Of healing a range of one leg: how many blocks were written anew, and which ones were not."""

    healed_blocks: int
    left: tuple[tuple[int, int], ...]
    """(offset, length) in bytes: what no leg can read, or what lies below a damaged page of this leg's map."""


class Healed(Gate, Protocol):
    """What healing needs of the mirror."""

    inflight: InFlight
    locks: Locks

    @property
    def size_bytes(self) -> int: ...

    async def copy_to(self, member: Member, offset: int, data: memoryview | None, *, length: int = 0) -> bool:
        """To one leg only, in its order; whether it has it."""


class Healing:
    """See the module. `run` has to be run."""

    def __init__(self, site: Healed, reads: Reads) -> None:
        self._site = site
        self._reads = reads
        self.healed_blocks = 0
        self.unmendable: dict[int, None] = {}
        """Offsets of blocks that no leg could read when that was tried last."""
        self.map_damage: dict[str, dict[int, None]] = {}
        """By leg id: offsets of extents for which its map couldn't be read when that was tried last, so that nothing is
        written there."""
        self._bad: dict[tuple[str, int, int], None] = {}
        """(leg, offset, length) that it couldn't read and another one could."""

    def later(self, member: Member, offset: int, length: int) -> None:
        """Not by who reads: it may hold a lock of the extent, and has what it wanted."""
        if len(self._bad) < MAX_BAD:
            self._bad[member.info.id, offset, length] = None
            self._site.change()

    async def run(self) -> None:
        """The task."""
        tried_at = trio.current_time()
        while True:
            while self._bad:
                leg_id, offset, length = next(iter(self._bad))
                del self._bad[leg_id, offset, length]
                await self.heal(leg_id, offset, length)
            every_s = FEW_AGAIN_S if len(self.unmendable) <= FEW else AGAIN_S
            await self._try_again(await self._written_before(tried_at + every_s))
            if trio.current_time() >= tried_at + every_s:
                await self._try_again(list(self.unmendable))
                tried_at = trio.current_time()

    async def _written_before(self, due: float) -> list[int]:
        """Wait until then, or something has changed. Blocks that no leg could read, in extents that were written."""
        with contextlib.ExitStack() as watched:
            watches = {
                offset: watched.enter_context(self._site.inflight.watching(offset, BLOCK_BYTES))
                for offset in itertools.islice(self.unmendable, FEW)
            }
            while True:
                now = trio.current_time()
                with trio.move_on_at(min(due, now + WRITTEN_S) if watches else due) as waiting:
                    await self._site.changed()
                written = [offset for offset, watch in watches.items() if watch.touched]
                if written or not waiting.cancelled_caught or trio.current_time() >= due:
                    return written

    async def _try_again(self, offsets: Iterable[int]) -> None:
        for offset in offsets:
            if offset >= self._site.size_bytes:  # the mirror was shrunk
                self._readable(offset)
                continue
            for leg_id in list(self._site.members):
                await self.heal(leg_id, offset, BLOCK_BYTES)

    async def heal(self, leg_id: str, offset: int, length: int) -> int:
        """Write anew on one leg the blocks in this range that it can't read; how many. They come from another leg.

        Does nothing for a leg that isn't in sync.
        """
        member = self._site.members.get(leg_id)
        if member is None or member.state is not LegState.UP_TO_DATE:
            return 0
        try:
            blocks = (await self._heal(member, offset, length)).healed_blocks
        except OSError:
            return 0  # below quorum: it waits for its next reader, or for a scrub
        self.tell(leg_id, offset, blocks)
        return blocks

    def tell(self, leg_id: str, offset: int, blocks: int) -> None:
        """Log what was healed, from `offset` on."""
        member = self._site.members.get(leg_id)
        if blocks and member is not None:
            where = f"{self._site.name}: {blocks} blocks from {offset} on of the leg on {member.info.place}"
            log.warning("%s couldn't be read, and were written anew from another leg", where)

    async def mend(self, leg_id: str, offset: int, length: int) -> Outcome:
        """The same for who has to know what became of it. Raises OSError EAGAIN while it can't be done."""
        member = self._site.members.get(leg_id)
        if member is None or member.state is not LegState.UP_TO_DATE:
            raise OSError(errno.EAGAIN, f"{self._site.name}: the leg {leg_id} is not in sync; it is healed when it is")
        outcome = await self._heal(member, offset, length)
        if member.state is not LegState.UP_TO_DATE:
            raise OSError(
                errno.EAGAIN, f"{self._site.name}: the leg on {member.info.node} was lost while it was healed"
            )
        return outcome

    async def _heal(self, member: Member, offset: int, length: int) -> Outcome:
        """Raises OSError EAGAIN where a write has failed below quorum, and it isn't decided whether it is there."""
        healed = 0
        left: list[tuple[int, int]] = []
        start = offset // BLOCK_BYTES * BLOCK_BYTES
        stop = min(-(-(offset + length) // BLOCK_BYTES) * BLOCK_BYTES, self._site.size_bytes)
        if start >= stop:
            return Outcome(0, ())  # the mirror was shrunk
        for at in range(start // EXTENT_BYTES * EXTENT_BYTES, stop, EXTENT_BYTES):
            first, last = max(at, start), min(at + EXTENT_BYTES, stop)
            async with self._site.locks.holding(first, last - first):
                try:  # whoever waits for the lock is to get the same error
                    await self._site.inflight.settle_for_client(first, last - first)
                except OSError as error:
                    raise OSError(errno.EAGAIN, error.strerror) from None
                try:
                    bad = await self._unreadable(member, first, last - first)
                except _MapDamagedError as error:
                    if last > self._site.size_bytes:
                        break  # it was asked for what is behind its end now
                    self.no_map(member, at, str(error))
                    left.append((first, last - first))
                    continue
                self.map_damage.get(member.info.id, {}).pop(at, None)
                for begin, size in _runs(bad):
                    healed += await self._rewrite(member, begin, size, left)
            if member.is_proof and member.leg is not None and member.leg.failure is None:  # it has answered
                for block in [one for one in self.unmendable if first <= one < last and (one, BLOCK_BYTES) not in left]:
                    self._readable(block)  # or written since
        if healed:
            member.counters.healed_blocks += healed
            self.healed_blocks += healed
        if stop > self._site.size_bytes:  # the mirror was shrunk meanwhile: what is left of the range is looked at anew
            again = await self._heal(member, offset, length)
            return Outcome(healed + again.healed_blocks, again.left)
        return Outcome(healed, tuple(left))

    async def _rewrite(self, member: Member, offset: int, length: int, left: list[tuple[int, int]]) -> int:
        """Blocks of one extent, whose writers wait, on one leg; how many were written. What no leg has: `left`."""
        data = memoryview(bytearray(length))
        for source in [m for m in readable(self._site.members.values()) if m is not member]:
            with self._site.inflight.watching(offset, length) as watch:
                is_read = await self._reads.read_from(source, offset, length, data)
            if is_read:
                if offset + length > self._site.size_bytes:
                    return 0  # shrunk meanwhile
                if watch.resized:  # perhaps shrunk and grown again, which nothing of before survives
                    return await self._rewrite(member, offset, length, left)
                return length // BLOCK_BYTES * await self._site.copy_to(member, offset, data)
        if length > BLOCK_BYTES:  # each of them may be there on some leg
            blocks = range(offset, offset + length, BLOCK_BYTES)
            return sum([await self._rewrite(member, block, BLOCK_BYTES, left) for block in blocks])
        if offset + length > self._site.size_bytes:
            return 0
        self.nowhere(offset)
        left.append((offset, length))
        return 0

    def no_map(self, member: Member, extent: int, why: str) -> None:
        """The map of a leg can't be read for the extent that begins there: nothing is written into it."""
        known = self.map_damage.setdefault(member.info.id, {})
        if extent not in known and len(known) < MAX_UNMENDABLE:
            if not known:
                what = map_is_damaged(self._site.name, member.info.node)
                log.error("%s at %d: nothing is written there (%s)", what, extent, why)
            known[extent] = None
            self._site.change()

    def opened_anew(self, member: Member) -> None:
        """What was known of its map may be mended, as its pool was opened anew; who meets damage again says so."""
        self.map_damage.pop(member.info.id, None)

    def nowhere(self, offset: int) -> None:
        """No leg could read the block there."""
        if offset not in self.unmendable and len(self.unmendable) < MAX_UNMENDABLE:
            self.unmendable[offset] = None
            step = first_step([m.info for m in self._site.members.values() if m.is_away])
            until = offset + BLOCK_BYTES - 1
            log.error("%s: no leg can read bytes %d-%d: %s", self._site.name, offset, until, step)
            self._site.change()

    def _readable(self, offset: int) -> None:
        """A leg could read the block there, or there is none any more."""
        self.unmendable.pop(offset, None)
        self._site.change()  # a leg may have been kept out of sync for it

    async def _unreadable(self, member: Member, offset: int, length: int) -> list[int]:
        """Offsets of blocks, in order. Raises _MapDamagedError if the leg's map can't be read there."""
        leg = member.leg
        if leg is None or await _reads(leg, offset, length) or leg.failure is not None:
            return []
        # After a lost device that is nearly all, and by halves each block would be read twice.
        found = await _lost(member, leg, offset, length)
        if length <= BLOCK_BYTES:
            return [offset]
        if found:
            for begin, size in _runs(sorted({*range(offset, offset + length, BLOCK_BYTES)} - set(found))):
                found += await self._unreadable(member, begin, size)
            return sorted(found)
        half = length // 2 // BLOCK_BYTES * BLOCK_BYTES
        first = await self._unreadable(member, offset, half)
        return first + await self._unreadable(member, offset + half, length - half)


async def _reads(leg: Leg, offset: int, length: int) -> bool:
    try:
        await leg.read(offset, length, memoryview(bytearray(length)))
    except OSError:
        return False
    return True


class _MapDamagedError(Exception):
    """The map of a leg can't be read in a range."""


async def _lost(member: Member, leg: Leg, offset: int, length: int) -> list[int]:
    """Offsets of blocks that the leg's map knows as lost. Raises _MapDamagedError."""
    if member.info.kind == "nbd":
        return []  # it has no map, and its checks are those of what is read
    try:
        checks = await leg.checks(offset, length)
    except OSError as error:
        if leg.failure is not None:
            return []
        raise _MapDamagedError(error.strerror or str(error)) from None
    return [offset + at * BLOCK_BYTES for at in range(len(checks) // 8) if checks[at * 8 : at * 8 + 8] == LOST_CHECK]


async def has_map(member: Member, offset: int, length: int) -> bool:
    """Whether the map of this leg can be read there, as far as it has one."""
    try:
        if member.leg is not None:
            await _lost(member, member.leg, offset, length)
    except _MapDamagedError:
        return False
    return True


def map_is_damaged(name: str, node: str) -> str:
    """Begins a sentence about a leg."""
    return f"the map of the leg of {name} on node {node} is damaged"


def new_leg(name: str, node: str, *, is_primarys: bool, others: int) -> str:
    """The next step for a leg whose map is damaged, where so many other ones with a node are up to date."""
    if not others:
        return "no other leg is up to date, so this one is needed: copy what can be read to another pool"
    anew = f"`terrace volume mirror remove {name} {node}`, then `terrace volume mirror add {name} {node}`"
    if is_primarys:
        return f"`terrace volume mirror demote {name} --to NODE` first, and on that NODE {anew}"
    return f"make that leg anew: {anew}"


def _runs(offsets: Iterable[int]) -> list[tuple[int, int]]:
    """(offset, length) of blocks that lie one behind the other."""
    runs: list[tuple[int, int]] = []
    for offset in offsets:
        if runs and sum(runs[-1]) == offset:
            runs[-1] = runs[-1][0], runs[-1][1] + BLOCK_BYTES
        else:
            runs.append((offset, BLOCK_BYTES))
    return runs
