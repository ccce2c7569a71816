"""A mirror of three nodes with clients, faults by seed, and an oracle.

Every 512 bytes that a client writes carry a number of their own, and the order of the mirror's batches is the truth: so
each sector that is read or found on a leg stands for one place in that order. The oracle holds that

- no sector is ever found older than an acknowledged write, or than what a read has returned before;
- when a write is acknowledged, every leg that isn't there for it has its extents in `missing:ID` at all legs in sync;
- at the end, when all legs are back, they are identical byte by byte.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import trio

from replication.inflight import Batch
from replication.leg import (
    BLOCK_BYTES,
    EXTENT_BYTES,
    MISSING,
    RECENT,
    RECENT_OLD,
    Change,
    Done,
    Leg,
    LegState,
    missing_tracker,
)
from replication.members import LegFacts
from replication.membership import LegInfo, Membership, Options, Term
from replication.mirror import Mirror
from replication.resync import ResyncSettings
from replication.site import MirrorSettings
from tests.replication.fakes import FakeCluster, FakeLink, FakeNode, MemoryLegStore, RealKeeper, trackers_matching
from tests.replication.reads import read_as_clients_do

SECTOR = 512
SIZE = 8 * EXTENT_BYTES
TERM_SEQUENCES = 10**9
FAULTS = ("cut", "stall", "long stall", "kill", "power", "full", "stuck", "primary", "quorum", "bad")
REFUSALS = {errno.EIO, errno.ENOSPC, errno.ESTALE, errno.ESHUTDOWN, errno.ECONNRESET, errno.ETIMEDOUT, errno.ECANCELED}


class ViolationError(AssertionError):
    """The promise was broken."""


@dataclass
class Sector:
    """What is known of 512 bytes."""

    numbers: dict[int, int] = field(default_factory=lambda: {0: 0})
    """Place in the order of each number that was ever submitted; of zeros, the latest."""
    acknowledged: int = 0
    read: int = 0


class WatchedMirror(Mirror):
    """Tells the oracle what is submitted, and what the legs' machines may forget."""

    world: World

    def submit(self, changes: list[Change], extents: Any, wide: Any, size: int, done: Done) -> None:
        super().submit(changes, extents, wide, size, self.world.submitted(self.sequence + 1, changes, done))

    def change(self) -> None:
        super().change()
        for member in self.members.values():
            if member.leg is not None and member.leg.failure is None and member.state is LegState.UP_TO_DATE:
                self.world.nodes[member.info.id].intact = True


class World:
    """See the module. `await run()` raises `ViolationError`."""

    def __init__(self, seed: int, *, legs: int = 3, operations: int = 120, faults: int = 6) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.operations = operations
        self.faults = faults
        self.counts: Counter[str] = Counter()
        self.sectors = [Sector() for _ in range(SIZE // SECTOR)]
        self.numbers = itertools.count(1)
        infos = tuple(LegInfo(f"leg{name}", name, "pool/vol") for name in "abcd"[:legs])
        self.nodes = {
            info.id: FakeNode(
                info,
                MemoryLegStore(SIZE, rng=self.rng),
                FakeLink(self.rng, self.rng.choice((0.0, 0.005, 0.03))),
                RealKeeper,
            )
            for info in infos
        }
        term = Term(1, "0" * 16)
        first = Membership(
            mirror="f" * 32, size_bytes=SIZE, legs=infos, voters=tuple(info.node for info in infos), term=term,
            epoch=0, primary="a", in_sync=frozenset(self.nodes),
            options=Options(timeout_s=0.5, below_quorum="fail" if seed % 3 == 0 else "suspend"),
        )  # fmt: skip
        self.cluster = FakeCluster(self.nodes, first, rng=self.rng)
        self.cluster.unsure = 0.1
        self.mirror: WatchedMirror | None = None
        self.primary_up = trio.Event()
        self.clients_left = 0
        self.violation: ViolationError | None = None

    # -- the oracle --------------------------------------------------------------------------------------------------

    def submitted(self, sequence: int, changes: list[Change], done: Done) -> Done:
        place = sequence
        fresh: list[int] = []
        for change in changes:
            for at in range(change.offset, change.offset + change.length, SECTOR):
                index = at // SECTOR
                sector = self.sectors[index]
                if change.data is None:
                    number = 0
                else:
                    raw = at - change.offset
                    number = int.from_bytes(change.data[raw : raw + 8], "little")
                if number == 0:
                    sector.numbers[0] = place
                    if change.data is None:
                        fresh.append(index)
                elif number not in sector.numbers:
                    sector.numbers[number] = place
                    fresh.append(index)

        def watched(error: OSError | None) -> None:
            if error is None:
                for index in fresh:
                    self.sectors[index].acknowledged = max(self.sectors[index].acknowledged, place)
                try:
                    self._check_missing(fresh, place)
                except ViolationError as violation:
                    self.violation = self.violation or violation  # a `done` doesn't raise; who runs next does
                self.counts["acknowledged"] += 1
            else:
                self.counts[f"refused: {errno.errorcode.get(error.errno or 0)}"] += 1
            done(error)

        return watched

    def _check_missing(self, fresh: list[int], place: int) -> None:
        mirror = self.mirror
        if mirror is None:
            return
        for leg_id, member in mirror.members.items():
            node = self.nodes[leg_id]
            if member.leg is not None and leg_id not in self.cluster.truth.in_sync:
                continue  # it is being brought up to date
            missed = [index for index in fresh if self.place_at(node, index) < place]
            touched = {index * SECTOR // EXTENT_BYTES for index in missed}
            if leg_id in self.cluster.truth.in_sync:
                if missed and node.intact:
                    raise ViolationError(f"acknowledged without {leg_id}, which the record calls in sync")
                continue
            for other in self.cluster.truth.in_sync:
                missing = trackers_matching(self.nodes[other].store, missing_tracker(leg_id))
                if not touched <= missing:
                    raise ViolationError(f"{leg_id} misses {sorted(touched - missing)}, and {other} doesn't know it")

    def place_at(self, node: FakeNode, index: int) -> int:
        number = int.from_bytes(node.store.image[index * SECTOR : index * SECTOR + 8], "little")
        return self.sectors[index].numbers.get(number, 0)

    def judge(self, index: int, number: int, where: str, floor: int) -> int:
        """The place of what was found in a sector."""
        place = self.sectors[index].numbers.get(number)
        if place is None:
            raise ViolationError(f"{where}: sector {index} holds {number}, which nobody wrote there")
        if place < floor:
            raise ViolationError(f"{where}: sector {index} holds {number} of {place}, older than {floor}")
        return place

    # -- clients -----------------------------------------------------------------------------------------------------

    def data(self, sectors: int) -> bytes:
        return b"".join(next(self.numbers).to_bytes(8, "little") + bytes([7]) * (SECTOR - 8) for _ in range(sectors))

    async def client(self) -> None:
        rng = self.rng
        for _ in range(self.operations):
            while self.mirror is None:
                await self.primary_up.wait()
            mirror = self.mirror
            try:
                await self.operation(mirror, rng.random())
            except OSError as error:
                if self.mirror is mirror and error.errno not in REFUSALS:
                    raise
                self.counts["failed"] += 1
                await trio.sleep(0.02)
            if rng.random() < 0.3:
                await trio.sleep(rng.random() * 0.02)
        self.clients_left -= 1

    def range(self) -> tuple[int, int]:
        """(sector, count): often in the same place."""
        rng = self.rng
        count = rng.choice((1, 3, 8, 8, 16, 40, 160))
        first = rng.randrange(len(self.sectors) - count)
        if rng.random() < 0.5:
            first %= 256
        if rng.random() < 0.7:
            first, count = first // 8 * 8, max(8, count // 8 * 8)
        return first, min(count, len(self.sectors) - first)

    async def operation(self, mirror: WatchedMirror, kind: float) -> None:
        if self.violation is not None:
            raise self.violation
        first, count = self.range()
        offset, length = first * SECTOR, count * SECTOR
        if kind < 0.45:
            writes = [(offset, memoryview(self.data(count)))]
            if self.rng.random() < 0.3:
                again, more = self.range()
                writes.append((again * SECTOR, memoryview(self.data(more))))
            event = trio.Event()
            outcome: list[OSError | None] = []

            def done(error: OSError | None) -> None:
                outcome.append(error)
                event.set()

            if mirror.write_later(writes, done):
                await event.wait()
                if outcome[0] is not None:
                    raise OSError(outcome[0].errno, "write_later")
            else:
                for at, data in writes:
                    await mirror.write(at, data)
        elif kind < 0.52:
            await mirror.trim(offset, length)
        elif kind < 0.92:
            floors = [max(s.acknowledged, s.read) for s in self.sectors[first : first + count]]
            into = memoryview(bytearray(length))
            await read_as_clients_do(mirror, offset, into)
            for index in range(count):
                number = int.from_bytes(into[index * SECTOR : index * SECTOR + 8], "little")
                place = self.judge(first + index, number, "a read", floors[index])
                if self.mirror is mirror:
                    self.sectors[first + index].read = max(self.sectors[first + index].read, place)
            self.counts["reads"] += 1
        else:
            await mirror.flush()

    # -- faults ------------------------------------------------------------------------------------------------------

    async def trouble(self) -> None:
        rng = self.rng
        for _ in range(self.faults):
            await trio.sleep(rng.random() * 0.4)
            node = rng.choice(list(self.nodes.values()))
            kind = rng.choice(FAULTS)
            self.counts[kind] += 1
            is_primary = node.info.node == "a"
            if kind == "cut" and not is_primary:
                node.link.cut()
                await trio.sleep(rng.random() * 0.5)
                node.link.mend()
            elif kind in ("stall", "long stall") and not is_primary:
                node.link.stall()
                await trio.sleep(rng.random() * (0.4 if kind == "stall" else 1.5))
                node.link.resume()
            elif kind in ("kill", "power") and not is_primary:
                await node.stop(power=kind == "power" and self.may_lose(node))
                await trio.sleep(rng.random())
                await self.nursery.start(node.run)
            elif kind == "full" and len(self.up()) > 1:
                node.store.failing = OSError(errno.ENOSPC, "full")
                await trio.sleep(rng.random() * 0.2)
                node.store.failing = None
            elif kind == "stuck":
                node.store.stuck = stuck = trio.Event()
                node.store.is_hard = self.seed % 2 == 0
                try:
                    await trio.sleep(rng.random() * 0.8)
                finally:
                    node.store.is_hard = False
                    if node.store.stuck is stuck:
                        node.store.stuck = None
                    stuck.set()
            elif kind == "bad" and self.mirror is not None and self.safely_bad(node):
                node.store.bad.add(rng.randrange(SIZE // BLOCK_BYTES) * BLOCK_BYTES)
            elif kind == "quorum":
                self.cluster.quorum = False
                await trio.sleep(rng.random() * 0.5)
                self.cluster.quorum = True
            elif kind == "primary":
                await self.crash_primary(power=rng.random() < 0.5)
                others = [n for n in self.nodes.values() if n.info.node != "a"]
                if rng.random() < 0.5 and others:
                    other = rng.choice(others)
                    if other.is_up:
                        await other.stop(power=rng.random() < 0.5 and self.may_lose(other))
                        await self.nursery.start(other.run)

    def up(self) -> list[FakeNode]:
        return [node for node in self.nodes.values() if node.is_up and not node.link.is_cut]

    def may_lose(self, node: FakeNode) -> bool:
        """Power cuts at all legs in sync take what wasn't flushed, as from a single disk: not looked for here."""
        return all(other.intact for other in self.nodes.values() if other is not node) and (
            node.info.id not in self.cluster.truth.in_sync
            or any(other != node.info.id for other in self.surely_in_sync())
        )

    def surely_in_sync(self) -> frozenset[str]:
        found = self.cluster.truth.in_sync
        for node in self.nodes.values():
            if node.keeper.accepted is not None and node.keeper.accepted.place > self.cluster.truth.place:
                found &= node.keeper.accepted.in_sync
        return found

    def safely_bad(self, node: FakeNode) -> bool:
        return (
            len(self.up()) == len(self.nodes)
            and len(self.cluster.truth.in_sync) == len(self.nodes)
            and not any(other.store.bad for other in self.nodes.values())
        )

    async def crash_primary(self, *, power: bool) -> None:
        node = self.nodes["lega"]
        self.mirror = None
        self.crashed.set()
        await self.gone.wait()
        await node.stop(power=power and self.may_lose(node))
        await self.nursery.start(node.run)
        self.restart.set()

    # -- the primary's node ------------------------------------------------------------------------------------------

    async def primaries(self) -> None:
        """One life of the primary after the other."""
        for life in itertools.count(2):
            self.crashed, self.gone, self.restart = trio.Event(), trio.Event(), trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.one_life, life)
                await self.crashed.wait()
                nursery.cancel_scope.cancel()
            for node in self.nodes.values():
                node.link.cut()
                node.link.is_cut = False
            self.gone.set()
            await self.restart.wait()

    async def one_life(self, life: int) -> None:
        term = Term(life, f"{life:016x}")
        while True:
            # What voters see to: the newest record that anybody has stored, heard from all of its legs in sync.
            records = [node.keeper.accepted for node in self.nodes.values() if node.keeper.accepted is not None]
            newest = max([self.cluster.truth, *records], key=lambda record: record.place)
            nodes = [self.nodes[leg_id] for leg_id in newest.in_sync]
            if all(node.is_up and not node.link.is_cut for node in nodes):
                break
            await trio.sleep(0.05)
        record = newest.next_term(term, "a", newest.in_sync)
        self.cluster.truth = newest
        while True:
            try:
                for node in nodes:
                    if node.keeper.promised is None or node.keeper.promised < term:
                        await node.keeper.promise(term)
                unsure, self.cluster.unsure = self.cluster.unsure, 0.0
                try:
                    await self.cluster.commit(record, expected=self.cluster.truth)
                finally:
                    self.cluster.unsure = unsure
                break
            except OSError:
                await trio.sleep(0.05)
        async with trio.open_nursery() as nursery:
            intact: dict[str, bool] = {}

            async def connect(info: LegInfo, membership: Membership) -> Leg:
                node = self.nodes[info.id]
                leg = await node.open(membership.term, primary=None if info.node == "a" else nursery)
                intact[info.id] = node.intact
                return leg

            async def facts(info: LegInfo, membership: Membership) -> LegFacts:
                await trio.lowlevel.checkpoint()
                return LegFacts(intact=intact[info.id], known=True)

            settings = MirrorSettings(
                queue_bytes=256 << 10, flush_every_s=0.1, retry_max_s=0.2, stay_s=0.0,
                resync=ResyncSettings(floor_bytes_s=1 << 20, flush_bytes=128 << 10, workers=2),
            )  # fmt: skip
            while True:
                mirror = WatchedMirror(
                    "pool/vol", record, self.cluster, connect, store=self.nodes["lega"].store, facts=facts,
                    settings=settings,
                )  # fmt: skip
                mirror.world = self
                mirror.sequence = life * TERM_SEQUENCES

                async def announce(mirror: WatchedMirror) -> None:
                    await mirror.started.wait()
                    self.mirror = mirror
                    self.primary_up.set()
                    self.primary_up = trio.Event()

                try:
                    async with trio.open_nursery() as inner:
                        inner.start_soon(announce, mirror)
                        await mirror.run()
                        inner.cancel_scope.cancel()
                except* OSError as group:
                    if mirror.started.is_set():
                        raise ViolationError("the mirror ended by itself") from group
                if mirror.ended.is_set():
                    raise ViolationError(f"deposed by nobody: {mirror.status().deposed}")
                await trio.sleep(0.05)

    # -- a run -------------------------------------------------------------------------------------------------------

    async def run(self) -> Counter[str]:
        with trio.fail_after(600):
            async with trio.open_nursery() as self.nursery:
                for node in self.nodes.values():
                    await self.nursery.start(node.run)
                    await node.keeper.accept(self.cluster.truth)
                self.nursery.start_soon(self.primaries)
                self.clients_left = 3
                async with trio.open_nursery() as work:
                    work.start_soon(self.trouble)
                    for _ in range(3):
                        work.start_soon(self.client)
                await self.quiesce()
                self.compare()
                self.nursery.cancel_scope.cancel()
        return self.counts

    async def quiesce(self) -> None:
        """All is well again; wait until the mirror has noticed."""
        for node in self.nodes.values():
            node.link.mend()
            node.store.failing = None
        with trio.move_on_after(120) as scope:
            while True:
                mirror = self.mirror
                whole = mirror is not None and len(self.cluster.truth.in_sync) == len(self.nodes)
                if (
                    mirror is not None
                    and whole
                    and all(m.state is LegState.UP_TO_DATE for m in mirror.members.values())
                ):
                    await mirror.flush()
                    for node in self.nodes.values():
                        for block in sorted(node.store.bad):
                            await mirror.heal(node.info.id, block, BLOCK_BYTES)
                    await mirror.stop()
                    break
                await trio.sleep(0.1)
        if scope.cancelled_caught:
            what = self.mirror.status() if self.mirror is not None else "no primary"
            raise ViolationError(f"the mirror doesn't become whole: {what}")

    def compare(self) -> None:
        """All legs, against each other and the oracle; and nothing is left in the trackers."""
        if self.violation is not None:
            raise self.violation
        images = {leg_id: node.store.image for leg_id, node in self.nodes.items()}
        (_, image), *others = images.items()
        for leg_id, other in others:
            if other != image:
                at = next(i for i in range(SIZE) if other[i] != image[i])
                raise ViolationError(f"{leg_id} differs from the first leg at {at}")
        for index, sector in enumerate(self.sectors):
            number = int.from_bytes(image[index * SECTOR : index * SECTOR + 8], "little")
            self.judge(index, number, "the legs", sector.acknowledged)
        for leg_id, node in self.nodes.items():
            if node.store.bad:
                raise ViolationError(f"{leg_id} has blocks that weren't healed")
            for pattern in (RECENT, RECENT_OLD):
                if trackers_matching(node.store, pattern):
                    raise ViolationError(f"{leg_id} still remembers something as {pattern}")
            left = sorted(name for name in node.store.trackers if name.startswith(MISSING))
            if left:
                raise ViolationError(f"all legs are in sync and have flushed, and {leg_id} has {left}")


__all__ = ["Batch", "ViolationError", "World", "contextlib"]
