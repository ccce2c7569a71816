"""Stand-ins for what a mirror has around it: stores, keepers of records, links, the cluster's truth. No threads, no IO.

`MemoryLegStore` loses what it must lose and nothing else: a killed process nothing, a power cut a suffix of what wasn't
flushed; its trackers are afterwards what an engine's are, a superset of what was in memory. `FakeLeg` is a leg behind a
link that delays, stalls or breaks, at any message. `FakeCluster` stores records at the legs, as voters do.

All that is random comes from a `random.Random` that is given, so that `run_seeded` makes a run a function of its seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import itertools
import json
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any
from unittest import mock

import trio
import trio.testing
import xxhash

from replication.cluster import NotStoredError
from replication.keeper import LegKeeper, LegRecord
from replication.leg import BLOCK_BYTES, EXTENT_BYTES, RECENT, RECENT_OLD, Change, Done, Extents, missing_tracker
from replication.localleg import LocalLeg, LocalSite
from replication.membership import LegInfo, Membership, Term, decode, encode
from replication.voters import UNABLE


def run_seeded(seed: int, body: Callable[[], Awaitable[Any]]) -> Any:
    """`trio.run` with a scheduler and a clock that are functions of the seed, as `tests.simulation.machine` has it."""
    core = trio._core._run
    core._r.seed(seed)  # type: ignore[attr-defined]
    collecting = gc.isenabled()
    gc.disable()
    try:
        with mock.patch.object(core, "_ALLOW_DETERMINISTIC_SCHEDULING", True):
            return trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        if collecting:
            gc.enable()


class MemoryExtents:
    """Extents as a plain set."""

    def __init__(self, extents: Iterable[int] = ()) -> None:
        self.extents = set(extents)

    def add(self, offset: int, length: int) -> None:
        self.extents.update(range(offset // EXTENT_BYTES, (offset + length + EXTENT_BYTES - 1) // EXTENT_BYTES))

    def discard(self, offset: int, length: int) -> None:
        first, stop = -(-offset // EXTENT_BYTES), (offset + length) // EXTENT_BYTES
        self.extents.difference_update(range(first, stop))

    def runs(self, start: int = 0) -> Iterator[tuple[int, int]]:
        run: tuple[int, int] | None = None
        for extent in sorted(self.extents):
            if extent * EXTENT_BYTES < start:
                continue
            if run is not None and sum(run) == extent:
                run = run[0], run[1] + 1
            else:
                if run is not None:
                    yield run[0] * EXTENT_BYTES, run[1] * EXTENT_BYTES
                run = extent, 1
        if run is not None:
            yield run[0] * EXTENT_BYTES, run[1] * EXTENT_BYTES

    def update(self, other: Extents) -> None:
        for offset, length in other.runs():
            self.add(offset, length)

    def clear(self) -> None:
        self.extents.clear()

    def encode(self) -> bytes:
        return json.dumps(sorted(self.extents)).encode()

    def copy(self) -> MemoryExtents:
        return MemoryExtents(self.extents)

    @property
    def count(self) -> int:
        return len(self.extents)

    def __bool__(self) -> bool:
        return bool(self.extents)

    def __contains__(self, extent: int) -> bool:
        return extent in self.extents


class MemoryLegStore:
    """A `LegStore`. With a `rng` it says often enough that it would block, and takes its time."""

    def __init__(self, size_bytes: int, export_name: str = "pool/vol", *, rng: random.Random | None = None) -> None:
        self.export_name = export_name
        self.rng = rng
        self.blocks = 0.2
        """How often something would block."""
        self.slow_s = 0.002
        """What that takes then, at most."""
        self.image = bytearray(size_bytes)
        self.record = b""
        self.trackers: dict[str, Extents] = {}
        self.snapshots: dict[str, bytes] = {}
        self.bad: set[int] = set()
        """Offsets of blocks that can't be read until they are written anew."""
        self.lost: set[int] = set()
        """The same, and known to be so without a read."""
        self.no_map: set[int] = set()
        """Numbers of extents for which the map is damaged; the next checkpoint after a write there would fail."""
        self.failing: OSError | None = None
        """What each change fails with."""
        self.no_writes: str | None = None
        self.stuck: trio.Event | None = None
        """Until it is set, no change, flush or read returns, and nothing is done at once."""
        self.is_hard = False
        """What is stuck can't be cancelled either."""
        self.held: trio.Event | None = None
        """Writes wait for it; all else goes on."""
        self.is_off = False
        self.flushes = 0
        self.read_bytes = 0
        self._durable = bytearray(size_bytes)
        self._log: list[tuple[int, int, bytes | None]] = []
        """Changes since the last checkpoint."""
        self._flushed = 0
        """So many of them are in `_durable`."""
        self._kept: dict[str, MemoryExtents] = {}
        """The trackers as the last checkpoint has them."""

    @property
    def size_bytes(self) -> int:
        return len(self.image)

    # -- what the machine does to it ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def hung(self) -> Iterator[None]:
        """The disk answers nobody, who can't be cancelled either: as a worker thread can't."""
        self.stuck, self.is_hard = stuck, _ = trio.Event(), True
        try:
            yield
        finally:
            self.stuck, self.is_hard = None, False
            stuck.set()

    def checkpoint(self) -> None:
        """The engine does it now and then."""
        self._durable = bytearray(self.image)
        self._log.clear()
        self._flushed = 0
        self._kept = {name: MemoryExtents(_extents(one)) for name, one in self.trackers.items()}

    def kill(self) -> None:
        """The process is gone; the kernel has all that it took."""
        self._restart(len(self._log))

    def power_cut(self) -> int:
        """A suffix of what wasn't flushed vanishes; how many changes."""
        kept = (self.rng or random).randint(self._flushed, len(self._log))
        lost = len(self._log) - kept
        self._restart(kept)
        return lost

    def _restart(self, kept: int) -> None:
        for offset, length, data in self._log[self._flushed : kept]:
            self._durable[offset : offset + length] = bytes(length) if data is None else data
        trackers = {name: one.copy() for name, one in self._kept.items()}
        for offset, length, _ in self._log[:kept]:
            for tracker in trackers.values():
                tracker.add(offset, length)
        self.image = bytearray(self._durable)
        self.trackers = dict(trackers)
        self.failing = self.stuck = self.held = None
        self.checkpoint()

    # -- LegStore ----------------------------------------------------------------------------------------------------

    async def save(self, record: bytes, trackers: dict[str, Extents] | None = None) -> None:
        if trackers is not None:
            self.trackers = dict(trackers)
        await self._pause()
        self._usable()
        self.record = record
        self.checkpoint()

    def empty_extents(self) -> Extents:
        return MemoryExtents()

    def decode_extents(self, data: bytes) -> Extents:
        try:
            return MemoryExtents(json.loads(data))
        except ValueError as error:
            raise OSError(errno.EPROTO, f"extents can't be understood: {error}") from None

    def _usable(self) -> None:
        if self.is_off:
            raise OSError(errno.EIO, "the machine is off")
        if self.failing is not None:
            raise OSError(self.failing.errno, self.failing.strerror)

    def _would_block(self) -> bool:
        return self.stuck is not None or (self.rng is not None and self.rng.random() < self.blocks)

    async def _pause(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.stuck is not None:
            with trio.CancelScope(shield=self.is_hard):
                await self.stuck.wait()
        if self.rng is not None and self.rng.random() < 0.5:
            await trio.sleep(self.rng.random() * self.slow_s)

    def _apply(self, offset: int, length: int, data: bytes | None) -> None:
        assert not (offset | length) % BLOCK_BYTES, "a change of part of a block came to a store"
        assert offset >= 0 and offset + length <= len(self.image), "a change beyond the end"
        self.image[offset : offset + length] = bytes(length) if data is None else data
        self._log.append((offset, length, data))
        for tracker in self.trackers.values():
            tracker.add(offset, length)
        if self.bad or self.lost:
            self.bad.difference_update(range(offset, offset + length, BLOCK_BYTES))
            self.lost.difference_update(range(offset, offset + length, BLOCK_BYTES))

    def write_now(self, writes: list[tuple[int, memoryview]]) -> bool:
        self._usable()
        if self.held is not None or self._would_block():
            return False
        for offset, data in writes:
            self._apply(offset, len(data), bytes(data))
        return True

    def trim_now(self, ranges: list[tuple[int, int]]) -> bool:
        self._usable()
        if self._would_block():
            return False
        for offset, length in ranges:
            self._apply(offset, length, None)
        return True

    def read_now(self, offset: int, length: int, into: memoryview) -> bool:
        self._check_readable(offset, length)
        if self._would_block():
            return False
        into[:] = self.image[offset : offset + length]
        self.read_bytes += length
        return True

    def _within(self, offset: int, length: int) -> None:
        if not 0 <= length <= len(self.image) - offset:
            raise OSError(errno.EINVAL, f"{length} bytes at {offset} of {len(self.image)}")

    def _check_readable(self, offset: int, length: int) -> None:
        if self.is_off:
            raise OSError(errno.EIO, "the machine is off")
        self._has_map(offset, length)
        for block in (*self.bad, *self.lost):
            if offset < block + BLOCK_BYTES and block < offset + length:
                raise OSError(errno.EIO, f"{self.export_name}: the block at {block} is damaged")

    def _has_map(self, offset: int, length: int) -> None:
        if self.no_map and not self.no_map.isdisjoint(
            range(offset // EXTENT_BYTES, -(-(offset + length) // EXTENT_BYTES))
        ):
            raise OSError(errno.EIO, f"{self.export_name}: a page of the map at {offset} is damaged")

    async def write(self, offset: int, data: memoryview | bytes) -> None:
        await self._pause()
        if self.held is not None:
            await self.held.wait()
        self._usable()
        self._apply(offset, len(data), bytes(data))

    async def trim(self, offset: int, length: int) -> None:
        await self._pause()
        self._usable()
        self._apply(offset, length, None)

    async def lose(self, offset: int, length: int) -> None:
        await self._pause()
        self._usable()
        self._apply(offset, length, b"lost".ljust(BLOCK_BYTES) * (length // BLOCK_BYTES))
        self.lost.update(range(offset, offset + length, BLOCK_BYTES))

    async def read(self, offset: int, length: int, into: memoryview) -> None:
        await self._pause()
        self._within(offset, length)
        self._check_readable(offset, length)
        into[:] = self.image[offset : offset + length]
        self.read_bytes += length
        await self._pause()

    async def flush(self) -> None:
        # As the engine has it: a checkpoint takes what is in memory, and doesn't wait for the flush that is under way.
        upto, log = len(self._log), self._log
        await self._pause()
        self._usable()
        self.flushes += 1
        if log is self._log and len(log) >= upto:
            for offset, length, data in log[self._flushed : upto]:
                self._durable[offset : offset + length] = bytes(length) if data is None else data
            self._flushed = max(self._flushed, upto)
        if self.rng is not None and self.rng.random() < 0.2:
            self.checkpoint()

    async def checks(self, offset: int, length: int) -> bytes:
        await self._pause()
        self._within(offset, length)
        self._usable()
        self._has_map(offset, length)
        found = bytearray()
        for at in range(offset, offset + length, BLOCK_BYTES):
            block = bytes(self.image[at : at + BLOCK_BYTES])
            check = xxhash.xxh3_64_intdigest(block) if any(block) else 0
            found += (2**64 - 1 if at in self.lost else check).to_bytes(8, "little")
        return bytes(found)

    async def mapped(self, offset: int, length: int) -> list[tuple[int, int]]:
        await self._pause()
        self._usable()
        self._has_map(offset, length)
        stop = min(offset + length, len(self.image))
        found: list[tuple[int, int]] = []
        for at in range(offset // BLOCK_BYTES * BLOCK_BYTES, stop, BLOCK_BYTES):
            if any(self.image[at : at + BLOCK_BYTES]):
                begin = max(at, offset)
                end = min(at + BLOCK_BYTES, stop)
                if found and sum(found[-1]) == begin:
                    found[-1] = found[-1][0], found[-1][1] + end - begin
                else:
                    found.append((begin, end - begin))
        if not found or sum(found[-1]) < stop:
            found.append((stop, 0))
        return found

    async def resize(self, size_bytes: int) -> None:
        await self._pause()
        self._usable()
        self.image = self.image[:size_bytes].ljust(size_bytes, b"\0")
        self.checkpoint()

    async def snapshot(self, name: str) -> None:
        await self._pause()
        self._usable()
        if name in self.snapshots:
            raise OSError(errno.EEXIST, f"{self.export_name} has a snapshot {name} already")
        self.snapshots[name] = bytes(self.image)


def _extents(extents: Extents) -> set[int]:
    assert isinstance(extents, MemoryExtents)
    return extents.extents


class FakeKeeper:
    """What keeps a leg's record: the tracker rule, promises, ESTALE. Durable in the store's record."""

    def __init__(self, store: MemoryLegStore, leg_id: str) -> None:
        self.store = store
        self.leg_id = leg_id
        self.on_fence: list[Callable[[Term], None]] = []
        self.promised: Term | None = None
        self.accepted: Membership | None = None
        self.inconsistent = False
        self.is_settled = False
        self.settled_saved = False
        """`settled` was told, and a record stored since."""
        self._saving = trio.Lock()
        if store.record:
            plain = json.loads(store.record)
            self.promised = Term(**plain["promised"]) if plain["promised"] else None
            self.accepted = decode(plain["accepted"].encode()) if plain["accepted"] else None
            self.inconsistent = plain["inconsistent"]

    def allows(self, term: Term) -> bool:
        return self.promised is None or term >= self.promised

    def settled(self) -> None:
        self.is_settled = True

    async def promise(self, term: Term) -> None:
        if self.promised is not None and term <= self.promised:
            raise OSError(errno.ESTALE, f"term {self.promised.number} was promised")
        self.promised = term
        for call in list(self.on_fence):
            call(term)
        async with self._saving:
            await self._save(dict(self.store.trackers))

    async def accept(self, membership: Membership, *, inconsistent: bool = False) -> None:
        async with self._saving:
            before = self.accepted
            if not self.allows(membership.term):
                raise OSError(errno.ESTALE, "a higher term was promised")
            if before is not None and membership.place < before.place:
                raise OSError(errno.ESTALE, "a later record was stored")
            trackers = dict(self.store.trackers)
            for name in (RECENT, RECENT_OLD):
                trackers.setdefault(name, MemoryExtents())
            left = set() if before is None else before.in_sync - membership.in_sync
            for leg_id in left:
                missing = trackers.setdefault(missing_tracker(leg_id), MemoryExtents())
                missing.update(trackers[RECENT])
                missing.update(trackers[RECENT_OLD])
            if self.leg_id in membership.in_sync:
                for leg_id in membership.in_sync:
                    trackers.pop(missing_tracker(leg_id), None)
            self.accepted, self.inconsistent = membership, inconsistent
            await self._save(trackers)
            self.settled_saved = self.is_settled

    async def _save(self, trackers: dict[str, Extents]) -> None:
        plain = {
            "promised": self.promised and dataclasses.asdict(self.promised),
            "accepted": self.accepted and encode(self.accepted).decode(),
            "inconsistent": self.inconsistent,
        }
        await self.store.save(json.dumps(plain).encode(), trackers)


class RealKeeper(LegKeeper):
    """The product's own, with the names that are used here; a leg takes part before it is given anything."""

    def __init__(self, store: MemoryLegStore, leg_id: str) -> None:
        record = LegRecord.decode(store.record) if store.record else LegRecord(leg_id)
        super().__init__(store, record, node=leg_id[-1], boot="since ever")

    @property
    def promised(self) -> Term | None:
        return self.record.promised

    @property
    def accepted(self) -> Membership | None:
        return self.record.accepted

    async def promise(self, term: Term) -> None:
        await self.prepare(term, "a")

    async def accept(self, membership: Membership, *, inconsistent: bool = False, discard: bool = False) -> None:
        await self.take_part()
        await super().accept(membership, inconsistent=inconsistent, discard=discard)


class FakeLeg:
    """A leg behind a link: a `LocalLeg` at the other end, messages in order in both directions, each with a delay."""

    def __init__(self, inner: LocalLeg, link: FakeLink) -> None:
        self.info = inner.info
        self.failure: OSError | None = None
        self.queued_bytes = 0
        self.link = link
        self._inner = inner
        self._out: deque[Callable[[], None]] = deque()
        self._back: deque[tuple[int, OSError | None]] = deque()
        self._owed: dict[int, tuple[Done, int, float]] = {}
        self._keys = itertools.count()
        self._wake = trio.Event()
        self._calls: list[float] = []
        link.legs.append(self)

    @property
    def is_local(self) -> bool:
        return False

    @property
    def silent_since(self) -> float | None:
        return min([*(began for _, _, began in self._owed.values()), *self._calls], default=None)

    def submit(self, sequence: int, changes: Sequence[Change], done: Done) -> None:
        if self.failure is not None:
            trio.lowlevel.current_trio_token().run_sync_soon(done, self.failure)
            return
        copies = [
            change if change.data is None else change._replace(data=memoryview(bytes(change.data)))
            for change in changes
        ]
        size = sum(change.length for change in copies if change.data is not None)
        key = next(self._keys)
        self._owed[key] = done, size, trio.current_time()
        self.queued_bytes += size

        def answered(error: OSError | None) -> None:
            self._back.append((key, error))
            self._wake.set()

        self._out.append(lambda: self._inner.submit(sequence, copies, answered))
        self._wake.set()

    async def run(self) -> None:
        """Carry messages, until the leg has failed and all that it owed has been called."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._carry_back)
                while self.failure is None:
                    if not self._out:
                        await self._woken()
                        continue
                    await self.link.travel()
                    if self.failure is None:
                        self._out.popleft()()
                nursery.cancel_scope.cancel()
        finally:
            if self.failure is None:
                self._fail(OSError(errno.ECANCELED, "the link was stopped"))

    async def _carry_back(self) -> None:
        while True:
            if not self._back:
                await self._woken()
                continue
            await self.link.travel()
            key, error = self._back.popleft()
            if error is not None:
                self._fail(error)
                continue
            if key in self._owed:
                done, size, _ = self._owed.pop(key)
                self.queued_bytes -= size
                done(None)

    async def _woken(self) -> None:
        wake = self._wake
        await wake.wait()
        if self._wake is wake:
            self._wake = trio.Event()

    def _fail(self, error: OSError) -> None:
        if self.failure is not None:
            return
        self.failure = error
        for done, _, _ in self._owed.values():
            trio.lowlevel.current_trio_token().run_sync_soon(done, error)
        self._owed.clear()
        self.queued_bytes = 0
        self._inner.close()
        if self in self.link.legs:
            self.link.legs.remove(self)
        self._wake.set()
        self.link.broken.set()
        self.link.broken = trio.Event()

    def cut(self, error: OSError) -> None:
        """The link breaks: what is under way is lost, in both directions."""
        self._fail(error)

    def close(self) -> None:
        self._fail(OSError(errno.ECANCELED, "the leg was closed"))

    async def _call(self, function: Callable[[], Awaitable[Any]]) -> Any:
        """There, done, and back; ends when the link breaks."""
        began = trio.current_time()
        self._calls.append(began)
        answer: list[Any] = []
        failure: list[OSError] = []
        try:
            if self.failure is not None:
                raise OSError(self.failure.errno, self.failure.strerror)
            async with trio.open_nursery() as nursery:

                async def work() -> None:
                    try:
                        await self.link.travel()
                        answer.append(await function())
                        await self.link.travel()
                    except OSError as error:
                        failure.append(error)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(work)
                while self.failure is None:
                    await self.link.broken.wait()
                failure.append(self.failure)
                nursery.cancel_scope.cancel()
        finally:
            self._calls.remove(began)
        if failure:
            raise OSError(failure[0].errno, failure[0].strerror)
        return answer[0]

    def read_now(self, offset: int, length: int, into: memoryview) -> bool:
        return False

    async def read(self, offset: int, length: int, into: memoryview) -> None:
        await self._call(lambda: self._inner.read(offset, length, into))

    async def flush(self) -> None:
        arrived = self._arrival()

        async def flush() -> None:
            await arrived.wait()
            await self._inner.flush()

        await self._call(flush)

    def _arrival(self) -> trio.Event:
        """Is set when all that was sent before has arrived."""
        arrived = trio.Event()
        self._out.append(arrived.set)
        self._wake.set()
        return arrived

    def flushed_by_all(self, sequence: int) -> None:
        self._out.append(lambda: self._inner.flushed_by_all(sequence))
        self._wake.set()

    async def checks(self, offset: int, length: int) -> bytes:
        return await self._call(lambda: self._inner.checks(offset, length))

    async def mapped(self, offset: int, length: int) -> list[tuple[int, int]]:
        return await self._call(lambda: self._inner.mapped(offset, length))

    async def changed(self, trackers: Iterable[str]) -> Extents:
        # Behind what was sent before, as it may change what is remembered.
        arrived, wanted = self._arrival(), list(trackers)

        async def changed() -> Extents:
            await arrived.wait()
            return await self._inner.changed(wanted)

        return await self._call(changed)

    async def accept(self, membership: Membership, *, inconsistent: bool) -> None:
        await self._call(lambda: self._inner.accept(membership, inconsistent=inconsistent))

    async def resize(self, size_bytes: int) -> None:
        await self._call(lambda: self._inner.resize(size_bytes))

    async def snapshot(self, name: str) -> None:
        await self._call(lambda: self._inner.snapshot(name))


class FakeLink:
    """Between the primary and one node."""

    def __init__(self, rng: random.Random | None = None, delay_s: float = 0.0) -> None:
        self.rng = rng
        self.delay_s = delay_s
        self.stalled: trio.Event | None = None
        """Nothing arrives until it is set."""
        self.is_cut = False
        self.legs: list[FakeLeg] = []
        self.broken = trio.Event()

    async def travel(self) -> None:
        """What one message takes."""
        await trio.lowlevel.checkpoint()
        if self.delay_s:
            await trio.sleep(self.delay_s * (self.rng.random() if self.rng is not None else 1.0))
        while self.stalled is not None:
            await self.stalled.wait()

    def cut(self, error: OSError | None = None) -> None:
        """Break it, until `mend`."""
        self.is_cut = True
        for leg in list(self.legs):
            leg.cut(error or OSError(errno.ECONNRESET, "the link was cut"))

    def mend(self) -> None:
        """It works again, for new legs."""
        self.is_cut = False
        self.resume()

    def stall(self) -> None:
        """Neither data nor an error, until `resume`."""
        if self.stalled is None:
            self.stalled = trio.Event()

    def resume(self) -> None:
        """Go on with what was under way."""
        if self.stalled is not None:
            self.stalled.set()
            self.stalled = None


class FakeNode:
    """A machine with one leg: its store outlives its process."""

    def __init__(
        self, info: LegInfo, store: MemoryLegStore, link: FakeLink, keeper: type[FakeKeeper | RealKeeper] = FakeKeeper
    ) -> None:
        self.info = info
        self.store = store
        self.link = link
        self.intact = True
        self.is_up = False
        self._make_keeper = keeper
        self.keeper: Any = keeper(store, info.id)
        self._site: LocalSite | None = None
        self._scope: trio.CancelScope | None = None
        self._nursery: trio.Nursery | None = None
        self._ended = trio.Event()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The process, until `stop`."""
        self._ended = trio.Event()
        self.keeper = self._make_keeper(self.store, self.info.id)
        self._site = LocalSite(self.keeper)
        self.store.is_off = False
        try:
            async with trio.open_nursery() as self._nursery:
                self.is_up = True
                task_status.started()
                await trio.sleep_forever()
        finally:
            self.is_up = False
            self._nursery = None
            self._ended.set()

    async def stop(self, *, power: bool) -> None:
        """Kill the process, or the machine's power. Nothing more gets to the store."""
        if self.is_up and self._nursery is not None:
            self.store.is_off = True
            self.is_up = False
            self._nursery.cancel_scope.cancel()
            self.link.cut()
            self.link.is_cut = False
            await self._ended.wait()
        if power:
            self.intact = False
            self.store.power_cut()
        else:
            self.store.kill()

    async def open(self, term: Term, *, primary: trio.Nursery | None) -> LocalLeg | FakeLeg:
        """A leg of a session of that term; `primary`: whose end of the link runs there, None on the primary itself."""
        local = primary is None
        if not local:
            await self.link.travel()
        if not self.is_up or self._nursery is None or self._site is None or (self.link.is_cut and not local):
            raise OSError(errno.ECONNREFUSED, f"node {self.info.node} can't be reached")
        nursery = self._nursery
        inner = await self._site.open(nursery, self.info, term)
        if local:
            return inner
        leg = FakeLeg(inner, self.link)
        if self.link.is_cut or not self.is_up:
            leg.cut(OSError(errno.ECONNRESET, "the link was cut"))
        assert primary is not None
        primary.start_soon(leg.run)
        return leg


class FakeCluster:
    """A `ClusterStore` in mode "all": a record counts when each leg in its own `in_sync` has it."""

    def __init__(self, nodes: dict[str, FakeNode], truth: Membership, *, rng: random.Random | None = None) -> None:
        self.nodes = nodes
        self.truth = truth
        self.rng = rng
        self.commits = 0
        self.quorum = True
        """False: nothing can be committed."""
        self.timeout_s = 0.5
        self.unsure = 0.0
        """How often it isn't known whether a commit counts, though it does."""

    async def newest(self, mirror: str) -> Membership:
        await trio.lowlevel.checkpoint()
        if not self.quorum:
            raise OSError(errno.ETIMEDOUT, "too few voters answer")
        return self.truth

    async def create(self, first: Membership) -> None:
        await trio.lowlevel.checkpoint()
        self.truth = first

    async def judge_candidate(self, mirror: str) -> None:
        await trio.lowlevel.checkpoint()

    async def commit(self, new: Membership, *, expected: Membership) -> None:
        await trio.lowlevel.checkpoint()
        if expected != self.truth:
            raise OSError(errno.ESTALE, f"term {self.truth.term.number}, epoch {self.truth.epoch} is newer")
        if not self.quorum:
            raise OSError(errno.ETIMEDOUT, "too few voters answer")
        primary = next((n for n in self.nodes.values() if n.info.node == new.primary), None)
        stored = new.in_sync & new.terrace_ids
        for leg_id in sorted(stored, key=lambda one: (primary is not None and one == primary.info.id, one)):
            node = self.nodes[leg_id]
            if node is not primary and node.link.is_cut:
                raise OSError(errno.ETIMEDOUT, f"node {node.info.node} doesn't answer")
            if not node.is_up:
                raise OSError(errno.ETIMEDOUT, f"node {node.info.node} doesn't answer")
            done = False
            with trio.move_on_after(self.timeout_s):
                if node is not primary:
                    await node.link.travel()
                try:
                    await node.keeper.accept(new)
                except OSError as error:
                    if error.errno not in UNABLE:
                        raise
                    raise NotStoredError(
                        errno.ETIMEDOUT, f"the record isn't stored: {error.strerror}", {node.info.node: error}
                    ) from None
                done = True
            if not done or not node.is_up:
                raise OSError(errno.ETIMEDOUT, f"node {node.info.node} doesn't answer")
        if self.truth.term > new.term:
            raise OSError(errno.ESTALE, f"term {self.truth.term.number} has begun")
        self.truth = new
        self.commits += 1
        if self.rng is not None and self.rng.random() < self.unsure:
            raise OSError(errno.ETIMEDOUT, "the answer was lost")


def trackers_matching(store: MemoryLegStore, pattern: str) -> set[int]:
    """The union of the trackers whose names match."""
    found: set[int] = set()
    for name, one in store.trackers.items():
        if fnmatchcase(name, pattern):
            found |= _extents(one)
    return found
