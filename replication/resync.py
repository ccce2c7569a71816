"""Resync: a leg that was away gets what it missed, while clients go on.

From the moment that a leg is `Syncing` every batch goes to it too. What it missed before is known by extent: the
tracker `missing:ID` at a leg in sync, and its own trackers, which hold what it has and others don't. A leg of unknown
history is compared wherever one of the two has something mapped.

Each piece is compared by checks, without reading data; what differs is read from a leg in sync and submitted to this
leg only, in its order. **The touched rule**: a batch that touches the piece between the moment when nothing was in
flight there and the copy's `submit` makes the copy void, as it would put older bytes over newer ones. Then it is done
again, by single extents; after a few tries writers of the extent wait. Where nobody writes, a long range is compared
once, and what differs is copied by that; a batch into it has the rest of it compared again, in pieces.

Extents leave the primary's tracker only after the leg has been flushed: what a power cut takes from it is still there.
So a resync that was interrupted goes on where it was.

**What no leg can read** is tried again, as a disk may fail for a moment; then it is lost at this leg too, whatever it
has there: that may be older than what was acknowledged. All else comes to be mirrored again, and the block is EIO until
somebody writes it anew, or a leg can read it after all: that is looked at now and then (`replication.healing`), and
heals the others. An NBD server can't be told that a block is lost: all else is copied to it, and it stays out of sync
with that reason.
"""

from __future__ import annotations

import errno
import logging
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

import trio

from replication.inflight import InFlight, Locks, Watch
from replication.leg import (
    BLOCK_BYTES,
    EXTENT_BYTES,
    LOST_CHECK,
    RECENT,
    RECENT_OLD,
    Extents,
    Leg,
    LegStore,
    missing_tracker,
)
from replication.reconcile import (
    COMPARE_BYTES,
    PIECE_BYTES,
    SPARSE_BYTES,
    UnreadableError,
    check_at,
    covered_bytes,
    cut,
    differing,
    mapped_of,
    pieces,
    ungrouped,
)

if TYPE_CHECKING:
    from replication.members import Member

log = logging.getLogger("replication.mirror")

MAX_TRIES: Final = 4
MAX_UNREAD: Final = 1 << 14
"""So many blocks that no leg could read are remembered, to be tried again."""
MAX_UNREAD_OF_NBD: Final = 1 << 20
"""The same for an NBD server, to which all else is to be copied before it is left out for them."""
MARKED_BYTES: Final = 1 << 40, 1 << 30, 16 << 20, EXTENT_BYTES
"""What third legs miss is told for so much at once where there is a hole, else in the next smaller parts."""
COPY_BYTES: Final = 512 << 10
"""So much is read and submitted at a time: one frame of a leg session."""


class LacksBlocksError(OSError):
    """All else was brought, but a leg that can't be told that blocks are lost stays out of sync for these."""


@dataclass(frozen=True)
class ResyncSettings:
    """What may be tuned. Rates are bytes a second."""

    floor_bytes_s: float = 16 << 20
    """Not slower than that, whatever clients suffer."""
    ceiling_bytes_s: float = math.inf
    workers: int = 24
    """So many pieces are under way at once: each waits for checks, and for its place behind the data of the others."""
    workers_beside_clients: int = 8
    """Not more while clients are busy, whose writes to this leg stand behind what was submitted before."""
    idle_s: float = 1.0
    """With no request for so long, clients are idle."""
    slower_from: float = 2.0
    """It goes slower when clients' batches take so many times as long as they did at best."""
    judge_s: float = 0.2
    flush_bytes: int = 64 << 20
    """So much is copied between two flushes; extents leave the tracker with each."""
    reread_s: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Pauses before a block that no leg could read is tried again; then it is given up."""
    stalled_s: float = 30.0
    """Without progress for so long it is given up, and begun again."""


@dataclass
class Progress:
    """How far it is."""

    state: str = "looking for what is missing"
    total_bytes: int = 0
    done_bytes: int = 0
    """Compared, and copied where it differed."""
    copied_bytes: int = 0
    unread_blocks: int = 0
    """That no leg could read so far, while they are tried again: all else is done."""
    lost_blocks: int = 0
    """That no leg can read: they are lost at this leg, too."""
    retries: int = 0
    began: float = 0.0
    rate_bytes_s: float = 0.0
    eta_s: float | None = None
    ceiling_bytes_s: float = math.inf
    """How fast it may go now."""

    def seen(self, now: float) -> Progress:
        """A copy, with rate and remaining time."""
        took = now - self.began
        rate = self.done_bytes / took if took > 0 else 0.0
        eta = (self.total_bytes - self.done_bytes) / rate if rate else None
        return replace(self, rate_bytes_s=rate, eta_s=eta)


class Pace:
    """How fast it may go: a decision from what clients suffer, and a bucket."""

    def __init__(self, settings: ResyncSettings) -> None:
        self._settings = settings
        self.rate = settings.ceiling_bytes_s
        self._best_s = math.inf
        self._budget = 0.0
        self._filled_at = 0.0

    def judge(self, *, idle: bool, latency_s: float, measured_bytes_s: float) -> None:
        """Each `judge_s`. Pure but for what it remembers."""
        settings = self._settings
        if idle:
            self.rate = settings.ceiling_bytes_s
            return
        self._best_s = min(self._best_s * 1.01, latency_s)
        if latency_s > self._best_s * settings.slower_from:
            at = min(self.rate, max(measured_bytes_s, settings.floor_bytes_s))
            self.rate = max(settings.floor_bytes_s, at / 2)
        else:
            self.rate = min(settings.ceiling_bytes_s, self.rate * 1.25)

    async def take(self, size_bytes: int) -> None:
        """Wait until so much may be copied."""
        while math.isfinite(self.rate):
            now = trio.current_time()
            # A quarter of a second may be saved up; a piece may be longer than that, and is then owed.
            self._budget = min(self._budget + (now - self._filled_at) * self.rate, self.rate / 4)
            self._filled_at = now
            if self._budget > 0:
                break
            await trio.sleep(min(0.1, -self._budget / self.rate + 0.001))
        self._budget -= size_bytes


class Site(Protocol):
    """What a resync needs of the mirror."""

    inflight: InFlight
    locks: Locks
    client_at: float
    latency_s: float

    @property
    def size_bytes(self) -> int: ...

    def sources(self) -> list[Leg]: ...

    def stale_beside(self, member: Member) -> list[str]: ...

    async def read_for_copy(self, offset: int, length: int, into: memoryview) -> None: ...

    async def copy_to(
        self, member: Member, offset: int, data: memoryview | None, *, length: int = 0, lost: bool = False
    ) -> bool: ...


class Resync:
    """One leg's. `run` returns when the leg has everything; it is cancelled when the leg fails."""

    def __init__(
        self, site: Site, member: Member, *, known: bool, store: LegStore | None, settings: ResyncSettings
    ) -> None:
        assert member.leg is not None
        self._site = site
        self._member = member
        self._target = member.leg
        self._known = known
        self._store = store
        self._settings = settings
        self._pace = Pace(settings)
        self._done: list[tuple[int, int]] = []
        """Brought up to date since the last flush."""
        self._copied = 0
        self._given_out = False
        self._unread: dict[int, None] = {}
        """Offsets of blocks that no leg could read."""
        self._seeing = trio.Lock()
        self._rereads = 0
        self._flushing = trio.Lock()
        self.progress = Progress(began=trio.current_time())

    async def run(self) -> None:
        """Raises OSError: the leg, or all sources, failed."""
        # Batches that were in flight when the leg began to get them didn't go to it: they are in the set when they
        # have been applied.
        await self._site.inflight.settle_all()
        todo = await self._todo()
        self.progress.total_bytes = covered_bytes(todo, self._site.size_bytes)
        self.progress.state = "copying"
        self.progress.began = trio.current_time()
        work = self._work(todo)
        again: deque[tuple[int, int, int]] = deque()
        with ungrouped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._judge)
                nursery.start_soon(self._watch)
                async with trio.open_nursery() as workers:
                    for number in range(self._settings.workers):
                        workers.start_soon(self._worker, number, work, again)
                await self._see_to_unread()
                nursery.cancel_scope.cancel()
        await self._mark()
        self.progress.state = "flushing"
        await self._flush()
        if self.progress.lost_blocks:
            log.error(
                "the leg on %s lacks %s block(s) too that no leg can read; write them anew, or restore them",
                self._member.info.place,
                f"{self.progress.lost_blocks:,}",
            )
        self.progress.state = "done"

    def _work(self, todo: Extents) -> Iterator[tuple[int, int]]:
        # A server's data are read to be compared: by the time that so much has come, the watchdog has given up.
        is_quick = not self._known and self._member.info.kind == "terrace"
        return pieces(todo, self._site.size_bytes, COMPARE_BYTES if is_quick else PIECE_BYTES)

    # -- what is missing ---------------------------------------------------------------------------------------------

    def _source(self) -> Leg:
        for source in self._site.sources():
            return source
        raise OSError(errno.EHOSTUNREACH, "no leg in sync is there to copy from")

    async def _todo(self) -> Extents:
        name = missing_tracker(self._target.info.id)
        source = self._source()
        if self._store is not None and name not in self._store.trackers:
            self._known = False
        if self._known:
            todo = await source.changed([name])
            for leg in self._site.sources():
                if leg is not source:
                    todo.update(await leg.changed([name]))
            todo.update(await self._target.changed([RECENT, RECENT_OLD, missing_tracker("*")]))
        else:
            todo = await source.changed([])
            todo.add(0, self._site.size_bytes)
        if not self._known or covered_bytes(todo, self._site.size_bytes) > SPARSE_BYTES:
            everything, todo = todo, await source.changed([])
            await mapped_of(everything, [source, self._target], self._site.size_bytes, todo)
        if self._store is not None:
            missing = self._store.empty_extents()
            missing.update(todo)
            if name in self._store.trackers:
                missing.update(self._store.trackers[name])
            self._store.trackers[name] = missing
        return todo

    async def _mark(self) -> None:
        """Let the leg know what third legs miss, as it will be one of those that have to.

        Its trackers grow by what is written, so where it doesn't know it yet one block of the extent is written anew. A
        batch that touches the extent meanwhile does as well.
        """
        site = self._site
        others = [missing_tracker(leg_id) for leg_id in site.stale_beside(self._member)]
        if not others or self._member.info.kind == "nbd":
            return  # an NBD server notes nothing, and is never asked
        unknown = await self._source().changed(others)
        for offset, length in list((await self._target.changed(others)).runs()):
            unknown.discard(offset, length)
        for offset, length in pieces(unknown, site.size_bytes, MARKED_BYTES[0]):
            await self._mark_range(offset, length, MARKED_BYTES[1:])

    async def _mark_range(self, offset: int, length: int, smaller: tuple[int, ...]) -> None:
        """At once where nothing is mapped: a disk that was trimmed as a whole is hundreds of millions of extents."""
        site = self._site
        if length <= EXTENT_BYTES:
            return await self._mark_extent(offset, length)
        with site.inflight.watching(offset, length) as watch:
            await site.inflight.settle(offset, length)
            if await self._is_hole(offset, length) and not watch.touched:
                return await self._give(offset, length, None)
        while smaller[0] >= length:
            smaller = smaller[1:]
        for at, size in cut(offset, length, smaller[0]):
            await self._mark_range(at, size, smaller[1:])

    async def _is_hole(self, offset: int, length: int) -> bool:
        try:
            found = await self._source().mapped(offset, length)
        except OSError:
            return False  # a page of its map
        return bool(found) and sum(found[-1]) >= offset + length and not any(count for _, count in found)

    async def _mark_extent(self, offset: int, length: int) -> None:
        site, data = self._site, memoryview(bytearray(BLOCK_BYTES))
        is_marked = False
        while not is_marked:
            with site.inflight.watching(offset, length) as watch:
                await site.inflight.settle(offset, length)
                at = offset
                while not (is_read := await self._has(at, data)) and at + BLOCK_BYTES < offset + length:
                    at += BLOCK_BYTES
                if not watch.touched:  # where no block of it can be read, nothing there can be made worse
                    await self._give(at, BLOCK_BYTES, data if is_read else None, lost=not is_read)
                is_marked = not watch.resized

    # -- copying -----------------------------------------------------------------------------------------------------

    async def _worker(self, number: int, work: Iterator[tuple[int, int]], again: deque[tuple[int, int, int]]) -> None:
        buffer = memoryview(bytearray(COPY_BYTES))
        while True:
            while number >= self._settings.workers_beside_clients and not self._clients_are_idle():
                if self._given_out:
                    if not again:
                        return
                    break  # perhaps nobody else is left who would do it
                await trio.sleep(self._settings.judge_s)
            tries = 0
            if again:
                offset, length, tries = again.popleft()
            else:
                piece = next(work, None)
                if piece is None:
                    self._given_out = True
                    return
                offset, length = piece
            touched = await self._bring(offset, length, tries, buffer)
            if touched is not None:
                self.progress.retries += 1
                again.extend(_anew(touched, offset + length, tries))
            if len(self._unread) >= (MAX_UNREAD if self._member.info.kind == "terrace" else MAX_UNREAD_OF_NBD):
                await self._see_to_unread()  # not within `_bring`, which may hold a lock
            await self._flush_if_due()
            await trio.lowlevel.checkpoint()

    async def _bring(self, offset: int, length: int, tries: int, buffer: memoryview) -> int | None:
        """None: it is equal now. Else it was touched meanwhile, and that is the offset of the first extent that may not
        be equal."""
        if tries >= MAX_TRIES:
            async with self._site.locks.holding(offset, length):
                return await self._copy(offset, length, buffer)
        return await self._copy(offset, length, buffer)

    async def _copy(self, offset: int, length: int, buffer: memoryview) -> int | None:
        site, equal = self._site, offset
        with site.inflight.watching(offset, length) as watch:
            # From here on, what the source is asked for holds all batches up to now, and a later one is noticed.
            await site.inflight.settle(offset, length)
            for start, size, hole in await differing(self._source(), self._target, offset, length):
                for at, count in cut(start, size, size if hole else COPY_BYTES):
                    await self._pace.take(count)
                    data = None if hole else buffer[:count]
                    try:
                        if data is not None:
                            await site.read_for_copy(at, count, data)
                        if watch.touched:
                            return equal
                        # No checkpoint between that and `submit`.
                        await self._give(at, count, data)
                    except UnreadableError:
                        if not await self._copy_blocks(at, count, buffer, watch):
                            return equal
                    self.progress.copied_bytes += count
                    self._copied += count
                    equal = self._equal(equal, (at + count) // EXTENT_BYTES * EXTENT_BYTES)
                    if length > PIECE_BYTES:
                        await self._flush_if_due()
            self._equal(equal, offset + length)
        return None

    async def _give(self, offset: int, length: int, data: memoryview | None, *, lost: bool = False) -> None:
        if not await self._site.copy_to(self._member, offset, data, length=length, lost=lost):
            raise OSError(errno.EIO, "the leg failed while it was brought up to date")

    async def _can_read(self, offset: int, data: memoryview) -> bool:
        """Whether the block can be had from any leg; `data` is filled with it then."""
        try:
            await self._site.read_for_copy(offset, BLOCK_BYTES, data)
        except UnreadableError:
            return False
        return True

    async def _has(self, offset: int, data: memoryview) -> bool:
        """The same, or from the leg itself, which has all by now."""
        if await self._can_read(offset, data):
            return True
        try:
            await self._target.read(offset, BLOCK_BYTES, data)
        except OSError:
            return False
        return True

    async def _copy_blocks(self, offset: int, length: int, buffer: memoryview, watch: Watch) -> bool:
        """Block by block, as no leg can read some, which are seen to at the end. False: a batch came between."""
        data = buffer[:BLOCK_BYTES]
        for at in range(offset, offset + length, BLOCK_BYTES):
            is_read = await self._can_read(at, data)
            if watch.touched:
                return False
            self._rereads += 1
            if is_read:
                await self._give(at, BLOCK_BYTES, data)
            else:
                self._unread[at] = None
        return True

    async def _see_to_unread(self) -> None:
        """Blocks that no leg could read: tried again for a while, then given up. Raises OSError for an NBD server."""
        async with self._seeing:
            for pause_s in self._settings.reread_s:
                self.progress.unread_blocks = len(self._unread)
                if self._unread:
                    await trio.sleep(pause_s)
                for at in sorted(self._unread):
                    await self._bring_block(at, gives_up=False)
            if self._unread and self._member.info.kind == "nbd":
                await self._flush()
                raise LacksBlocksError(
                    errno.EIO,
                    f"{len(self._unread)} block(s), the first at byte {min(self._unread)}, can be read on no leg, and "
                    "an NBD server can't be told so: write them anew, or restore them, then it is brought up to date",
                )
            for at in sorted(self._unread):
                while not await self._bring_block(at, gives_up=True):
                    pass

    async def _bring_block(self, offset: int, *, gives_up: bool) -> bool:
        """Whether the leg has what can be had of it now; that it is lost, if it `gives_up`."""
        site, data = self._site, memoryview(bytearray(BLOCK_BYTES))
        self._rereads += 1
        async with site.locks.holding(offset, BLOCK_BYTES):
            with site.inflight.watching(offset, BLOCK_BYTES) as watch:
                await site.inflight.settle(offset, BLOCK_BYTES)
                if offset + BLOCK_BYTES <= site.size_bytes:
                    is_lost = not await self._can_read(offset, data)
                    stays = is_lost and await self._stays(offset)
                    if watch.touched or (is_lost and not stays and not gives_up):
                        return False
                    if not stays:
                        await self._give(offset, BLOCK_BYTES, None if is_lost else data, lost=is_lost)
                        self.progress.lost_blocks += is_lost
        self._unread.pop(offset, None)
        return True

    async def _stays(self, offset: int) -> bool:
        """Whether the leg is to keep what it has of a block that no other one can read: it is lost there already, or
        the map of one of them says by its checksum that it is what should be there."""
        theirs = await check_at(self._target, offset)
        if theirs in (None, LOST_CHECK):
            return theirs is not None
        for source in self._site.sources():
            if source.info.kind == "terrace" and await check_at(source, offset) == theirs:
                return True
        return False

    def _equal(self, start: int, stop: int) -> int:
        """What is between is brought up to date; where the next such range begins."""
        if stop <= start:
            return start
        self._done.append((start, stop - start))
        self.progress.done_bytes += stop - start
        return stop

    async def _flush_if_due(self) -> None:
        """One worker flushes; the others go on meanwhile, as what they copy is for the next flush."""
        if self._copied >= self._settings.flush_bytes and not self._flushing.locked():
            await self._flush()

    async def _flush(self) -> None:
        """What is done is durable, and is missing no more."""
        async with self._flushing:
            done, self._done, self._copied = self._done, [], 0
            await self._target.flush()
            if self._member.leg is not self._target:
                return  # lost in this very moment: what it got since the flush began was noted as missing anew
            if self._store is not None:
                missing = self._store.trackers.get(missing_tracker(self._target.info.id))
                if missing is not None:
                    for offset, length in done:
                        missing.discard(offset, length)
                    for offset in self._unread:
                        missing.add(offset, BLOCK_BYTES)

    # -- how fast ----------------------------------------------------------------------------------------------------

    def _clients_are_idle(self) -> bool:
        return trio.current_time() - self._site.client_at > self._settings.idle_s

    async def _judge(self) -> None:
        settings = self._settings
        before = self.progress.copied_bytes
        while True:
            await trio.sleep(settings.judge_s)
            copied, before = self.progress.copied_bytes - before, self.progress.copied_bytes
            self._pace.judge(
                idle=self._clients_are_idle(),
                latency_s=self._site.latency_s,
                measured_bytes_s=copied / settings.judge_s,
            )
            self.progress.ceiling_bytes_s = self._pace.rate

    async def _watch(self) -> None:
        """The watchdog."""
        seen, since = -1, trio.current_time()
        while True:
            await trio.sleep(self._settings.stalled_s / 10)
            now = self.progress.done_bytes + self.progress.copied_bytes + self._rereads
            if now != seen:
                seen, since = now, trio.current_time()
            elif trio.current_time() - since >= self._settings.stalled_s:
                raise OSError(errno.ETIMEDOUT, f"the resync made no progress for {self._settings.stalled_s:g} s")


def _anew(offset: int, stop: int, tries: int) -> Iterator[tuple[int, int, int]]:
    """What a batch came between, in smaller parts: a long range by pieces, which is no second try yet; then extents."""
    long = stop - offset > PIECE_BYTES
    size = PIECE_BYTES if long else EXTENT_BYTES
    while offset < stop:
        until = min(stop, (offset // size + 1) * size)
        yield offset, until - offset, tries + (0 if long else 1)
        offset = until
