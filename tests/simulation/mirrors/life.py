"""A life of a mirror: clients, an operator, and faults at random moments, then peace; all of it a function of the seed.

Nodes are as in `nodes`: two or three legs, or two and a tie-breaker. The clients use whatever node serves at the
moment, also one that others think dead; the operator promotes and demotes, takes snapshots, resizes. The faults
overlap. When the clients have done their work everything is mended, and the mirror must become `Online` by itself, or
with what an operator can do, within `PEACE_S`; then all legs are compared, with what the judge knows and each other.

Nothing in it depends on real time, threads or descriptors. What does depend on the process is the order of sets of
strings: `python -m tests.simulation.mirrors` runs with PYTHONHASHSEED=0.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final
from unittest import mock

import trio
import trio.testing

from replication.keeper import LegRecord
from replication.leg import BLOCK_BYTES, EXTENT_BYTES, MISSING, RECENT, RECENT_OLD, LegState, MirrorState
from replication.membership import LegInfo, Membership, Options, Term
from replication.mirror import Mirror
from replication.snapshots import take_at_once
from replication.verify import verify
from replication.voters import rule_of
from terrace.localmirror import LocalMirror
from tests.replication.reads import read_as_clients_do
from tests.simulation.mirrors.judge import SECTOR, Judge, ViolationError, place_of
from tests.simulation.mirrors.network import Network
from tests.simulation.mirrors.nodes import Node, WatchedMirror, make_leg, surroundings
from tests.simulation.oracle import OracleError, read_what_can_be, require_sound
from tiers import TierError

MIRROR: Final = "f" * 32
EXTENTS: Final = 6
SIZE: Final = EXTENTS * EXTENT_BYTES
PEACE_S: Final = 60.0
LIFE_S: Final = 600.0
OPERATION_S: Final = 6.0
OPERATIONS: Final = 30
CLIENTS: Final = 2
FAULTS: Final = (
    *("kill", "kill", "power", "power", "all killed", "all powered", "at an operation", "at an operation"),
    *("partition", "partition", "one way", "reset", "reset", "slow network", "stop"),
    *("usurped", "usurped", "usurped", "power in a resync", "power in a resync"),
    *("refused writes", "refused writes", "failing reads", "slow disk", "rot"),
)


class Life:
    """See the module. `await run()` raises ViolationError, or what was raised where nothing may be."""

    kinds: tuple[str, ...] = FAULTS
    """What `befall` is given, each as often as it is in here."""
    shapes: tuple[str, ...] = ("3", "3", "3", "2", "2+1")

    def __init__(self, seed: int, *, faults: int = 6, operations: int = OPERATIONS) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.operations = operations
        self.fault_count = faults
        self.forces = seed % 10 == 7
        self.judge = Judge(SIZE)
        self.network = Network(rng)
        self.network.slowness = self.pace = rng.choice((0.5, 2.0, 8.0))
        self.schedule: list[str] = []
        self.shape = rng.choice(self.shapes)
        legs = "abc" if self.shape == "3" else "ab"
        names = "ab" if self.shape == "2" else "abc"
        self.nodes = {
            name: Node(self, name, has_leg=name in legs, rng=random.Random(rng.getrandbits(40))) for name in names
        }
        term = Term(1, "0" * 16)
        first = Membership(
            mirror=MIRROR, size_bytes=SIZE, legs=tuple(LegInfo(f"leg-{name}", name, "sim/v") for name in legs),
            voters=tuple(names), term=term, epoch=0, primary="a", in_sync=frozenset(f"leg-{name}" for name in legs),
            options=Options(timeout_s=1.0, lease_s=0.8),
        )  # fmt: skip
        self.counted = replace(first, history=(first.generation,))
        """The newest record of which it is known that it counts."""
        self.branch: Term | None = None
        """Of a forced promotion: only what came from it is judged."""
        self.forcing: str | None = None
        self.rotten: dict[tuple[str, int], None] = {}
        self.refused: set[str] = set()
        """Nodes whose disks have refused writes."""
        self.unread: set[str] = set()
        """Nodes whose disks have failed reads."""
        self.snapshots: list[str] = []
        self.ends_s = 0.0
        self.working = CLIENTS
        self.nursery: trio.Nursery

    @property
    def counts(self) -> Counter[str]:
        """What has happened."""
        return self.judge.counts

    @property
    def faults_met(self) -> int:
        """How many there were."""
        return sum(self.counts[kind] for kind in set(self.kinds))

    def losses(self) -> tuple[int, ...]:
        """Changes when what was acknowledged may be gone: what was under way then proves nothing."""
        return tuple(self.counts[kind] for kind in ("unflushed lost", "forgiven"))

    def trace(self, text: str) -> None:
        """Into the schedule, which a failure prints."""
        self.schedule.append(f"{trio.current_time():8.3f} {text}")

    # -- what the mirrors tell ---------------------------------------------------------------------------------------

    def is_judged(self, mirror: WatchedMirror) -> bool:
        """Whether what this one says to clients is what holds; not after a force on another side."""
        if self.forcing is not None:
            return False
        return self.branch is None or any(one.term == self.branch for one in mirror.membership.history)

    def counts_now(self, record: Membership) -> None:
        """A record counts."""
        if record.place > self.counted.place:
            self.counted = record

    def begun(self, mirror: WatchedMirror) -> None:
        """A mirror serves, for the first time."""
        self.counts["promotions"] += 1
        record = mirror.membership
        self.trace(f"{mirror.process.node.name}: serves by {record.place}, in sync {sorted(record.in_sync)}")
        if self.forcing == mirror.process.node.name:
            self.forcing, self.branch = None, mirror.membership.term
            self.judge.forgive()
        self.alone(mirror)

    def alone(self, mirror: WatchedMirror) -> None:
        """If it may answer now, no other one may. A record that comes to count late begins a mirror without a lease."""
        if self.branch is not None or rule_of(mirror.membership) == "all" or not mirror.may_serve():
            return
        for node in self.nodes.values():
            local = node.process.local if node.process is not None and node.process.is_alive else None
            other = local.mirror if local is not None else None
            if other is None or other is mirror or not local or not local.serves:
                continue
            if rule_of(other.membership) != "all" and other.may_serve():
                self.judge.found(
                    f"{node.name} serves by {other.membership.place}, and so does {mirror.membership.place}"
                )

    def local_of(self, node: str) -> LocalMirror | None:
        """The leg of a node that is up."""
        process = self.nodes[node].process
        return process.local if process is not None and process.is_alive else None

    def joins(self, mirror: WatchedMirror, info: LegInfo, *, is_local: bool) -> None:
        """A leg is in sync now: it has everything."""
        local, process = self.local_of(info.node), self.nodes[info.node].process
        if process is None or not (is_local or process.has_session):
            return  # the one that has it has gone, with the word of its record still on its way
        if local is not None:
            self.nodes[info.node].is_vulnerable = False
        if local is None or local.me != info.id or not self.is_judged(mirror) or self.rotten:
            return
        data = bytearray(min(self.judge.size_bytes, local.volume.size_bytes, mirror.size_bytes))
        try:
            if local.store.read_now(0, len(data), memoryview(data)):
                self.judge.image(data, f"{info.id}, in sync by {mirror.membership.place}")
                self.counts["inspected"] += 1
        except ViolationError as violation:
            self.judge.found(str(violation))
        except OSError:
            pass

    def machine_lost(self, node: Node) -> None:
        """A machine went down that had something to lose: who still has everything?"""
        records = [self.counted]
        for one in self.nodes.values():
            one.note_accepted()
            if one.accepted is not None and one.accepted.place > self.counted.place:
                records.append(one.accepted)
        surely = frozenset.intersection(*(record.in_sync for record in records))
        legs = [leg for leg in self.counted.legs if leg.id in surely]
        if all(self.nodes[leg.node].is_vulnerable for leg in legs):
            self.trace("nobody has what wasn't flushed")
            self.judge.lose_unflushed()

    # -- clients -------------------------------------------------------------------------------------------------------

    def serving(self) -> list[LocalMirror]:
        """On all nodes that take clients now."""
        found = []
        for node in self.nodes.values():
            process = node.process
            if process is not None and process.is_alive and process.local is not None and process.local.serves:
                found.append(process.local)
        return found

    async def client(self) -> None:
        rng = self.rng
        for _ in range(self.operations):
            self.judge.check()
            waited = trio.current_time() + 4.0
            while not (serving := self.serving()) and trio.current_time() < waited:
                await trio.sleep(0.05)
            if serving:
                mirror = rng.choice(serving).mirror
                assert isinstance(mirror, WatchedMirror)
                try:
                    with trio.move_on_after(OPERATION_S) as patience:
                        await self.operation(mirror)
                    self.counts["given up"] += patience.cancelled_caught
                except OSError as error:
                    self.counts[f"failed: {errno.errorcode.get(error.errno or 0)}"] += 1
                    await trio.sleep(0.02)
            if rng.random() < 0.25:
                await trio.sleep(rng.random() * 0.3)
        self.working -= 1

    def range(self, size_bytes: int) -> tuple[int, int]:
        """(sector, count): often in the same place."""
        rng = self.rng
        sectors = size_bytes // SECTOR
        count = rng.choice((1, 3, 8, 8, 16, 40, 136))
        first = rng.randrange(sectors - count)
        if rng.random() < 0.5:
            first %= 136
        if rng.random() < 0.7:
            first, count = first // 8 * 8, max(8, count // 8 * 8)
        return first, min(count, sectors - first)

    async def operation(self, mirror: WatchedMirror) -> None:
        """One, of any kind. Raises OSError."""
        kind = self.rng.random()
        first, count = self.range(mirror.size_bytes)
        offset, length = first * SECTOR, count * SECTOR
        if kind < 0.3:
            await self.burst(mirror)
        elif kind < 0.5:
            await self.write(mirror, offset, self.judge.data(count))
        elif kind < 0.56:
            await mirror.trim(offset, length)
        elif kind < 0.94:
            await self.read(mirror, first, count)
        else:
            before = self.judge.flushing()
            await mirror.flush()
            if mirror.process.is_alive and self.is_judged(mirror):
                self.judge.flushed(before)

    async def write(self, mirror: WatchedMirror, offset: int, data: bytes) -> None:
        """At once, if that can be."""
        told = trio.Event()
        outcome: list[OSError | None] = []

        def done(error: OSError | None) -> None:
            outcome.append(error)
            told.set()

        if mirror.write_later([(offset, memoryview(data))], done):
            await told.wait()
            if outcome[0] is not None:
                raise OSError(outcome[0].errno, "write_later")
        else:
            await mirror.write(offset, data)

    async def burst(self, mirror: WatchedMirror) -> None:
        """Some writes at once, to few places, and a read in the middle of them."""
        async with trio.open_nursery() as nursery:

            async def one(first: int, count: int) -> None:
                with contextlib.suppress(OSError):
                    await self.write(mirror, first * SECTOR, self.judge.data(count))

            spread_s = self.rng.choice((0.004, 0.004, 0.02, 0.3)) * self.network.slowness
            narrow = self.rng.random() < 0.3
            for _ in range(self.rng.randrange(2, 8)):
                first, count = self.range(mirror.size_bytes)
                if narrow:  # parts of the same blocks
                    first, count = self.rng.randrange(16), self.rng.randrange(1, 8)
                nursery.start_soon(one, first % 136, min(count, 40))
                if self.rng.random() < 0.4:
                    await trio.sleep(min(0.5, self.rng.random() * spread_s))
            with contextlib.suppress(OSError):
                await self.read(mirror, 0, 136 + 40)

    async def read(self, mirror: WatchedMirror, first: int, count: int) -> None:
        """Judged, unless it is answered by a process that is dead by then."""
        floors = self.judge.floors(first, count)
        losses = *self.losses(), self.counts["resizing"]
        into = memoryview(bytearray(count * SECTOR))
        await read_as_clients_do(mirror, first * SECTOR, into)
        if losses != (*self.losses(), self.counts["resizing"]):
            return
        if mirror.process.is_alive and self.is_judged(mirror):
            self.judge.read(first, into, floors, f"a read on {mirror.process.node.name} by {mirror.membership.place}")

    # -- the operator --------------------------------------------------------------------------------------------------

    async def operator(self) -> None:
        rng = self.rng
        while True:
            await trio.sleep(rng.random() * 1.5)
            serving = self.serving()
            try:
                with trio.move_on_after(8.0):
                    if not serving:
                        await self.promote_somewhere()
                    elif rng.random() < 0.25:
                        await self.demote(rng.choice(serving))
                    else:
                        await self.administer(rng.choice(serving))
            except OSError as error:
                self.trace(f"operator: {error.strerror or error}")

    def locals(self) -> list[LocalMirror]:
        """Of all nodes that are up, with a leg."""
        nodes = [node.process for node in self.nodes.values() if node.process is not None and node.process.is_alive]
        return [process.local for process in nodes if process.local is not None]

    async def promote_somewhere(self, *, force: bool = False) -> None:
        """Raises OSError."""
        there = self.locals()
        if not there or any(local.starting for local in there):
            return
        local = self.rng.choice(there)
        name = local._node.peers.node
        force = force or (self.forces and self.rng.random() < 0.3)
        self.trace(f"operator: promote {name}{' by force' if force else ''}")
        if not force:
            await local.promote()
            return
        await self.promote_by_force(local)

    async def promote_by_force(self, local: LocalMirror) -> None:
        """Raises OSError."""
        self.judge.forgive()
        self.forcing = name = local._node.peers.node
        try:
            await local.promote(force=True)
        finally:
            if self.forcing == name:
                self.forcing = None

    async def demote(self, local: LocalMirror) -> None:
        """Raises OSError."""
        nodes = [leg.node for leg in local.membership.legs if leg.id in local.membership.in_sync]
        token = self.rng.choice([*nodes, None])
        self.trace(f"operator: demote {local._node.peers.node}, token {token}")
        await local.demote(token)
        self.counts["demotions"] += 1
        if token is not None and self.rng.random() < 0.7:
            process = self.nodes[token].process
            if process is not None and process.local is not None and process.is_alive:
                self.trace(f"operator: promote {token}")
                await process.local.promote()

    async def administer(self, local: LocalMirror) -> None:
        """Raises OSError."""
        rng, mirror = self.rng, local.mirror
        assert isinstance(mirror, WatchedMirror)
        kind = rng.random()
        if kind < 0.35 and len(self.snapshots) < 4:
            name = f"s{len(self.snapshots)}"
            self.snapshots.append(name)
            self.trace(f"operator: snapshot {name}")

            async def here(mirrors: Sequence[Mirror]) -> None:
                if mirrors:
                    await local.store.snapshot(name)

            await take_at_once({mirror: name}, here)
            self.counts["snapshots"] += 1
        elif kind < 0.5:
            await self.resize(mirror, rng.choice((EXTENTS - 2, EXTENTS - 1, EXTENTS)) * EXTENT_BYTES)
        elif kind < 0.8:
            pool = self.nodes[rng.choice(self.locals())._node.peers.node].process
            if pool is not None and pool.pool is not None:
                await pool.pool.checkpoint()
        else:
            report = await verify(mirror, full=rng.random() < 0.5, repair=True)
            if report.differing_bytes and not self.rotten:
                raise ViolationError(f"legs in sync differ: {report.differing}")

    async def resize(self, mirror: WatchedMirror, size_bytes: int) -> None:
        """Raises OSError."""
        self.trace(f"operator: resize to {size_bytes >> 16} extents")
        await mirror.size_decided()
        self.counts["resizing"] += 1
        smaller = min(size_bytes, self.judge.size_bytes)
        self.judge.resizing(smaller)
        try:
            await mirror.resize(size_bytes)
            if mirror.process.is_alive and self.is_judged(mirror):
                self.judge.resized(size_bytes, place_of(mirror.membership.term.number, mirror.sequence))
        finally:
            self.counts["resizing"] += 1
            self.judge.resizing(smaller)

    # -- faults --------------------------------------------------------------------------------------------------------

    async def trouble(self) -> None:
        for _ in range(self.fault_count):
            await trio.sleep(self.rng.random() * 0.7)
            with trio.move_on_after(0.5):
                while not any(local.mirror is not None and local.mirror.inflight.batches for local in self.serving()):
                    await trio.sleep(0.001 + self.rng.random() * 0.003)
            kind = self.rng.choice(self.kinds)
            self.counts[kind] += 1
            node = self.nodes[self.rng.choice(sorted(self.nodes))]
            self.trace(f"{kind} {node.name}")
            await self.befall(kind, node)

    async def befall(self, kind: str, node: Node) -> None:
        """One fault, from its beginning to its end."""
        if kind in ("kill", "power"):
            await self.down([node], power=kind == "power")
        elif kind in ("all killed", "all powered"):
            some = list(self.nodes.values())
            if self.rng.random() < 0.5:
                some.remove(node)
            await self.down(some, power=kind == "all powered")
        elif kind == "at an operation":
            await self.down_at_an_operation(node)
        elif kind in ("partition", "one way"):
            await self.cut(node, one_way=kind == "one way")
        elif kind == "reset":
            self.network.reset(node.name, self.rng.choice(sorted(set(self.nodes) - {node.name})))
        elif kind == "slow network":
            self.network.slowness = self.rng.choice((10.0, 40.0, 150.0))
            await trio.sleep(self.rng.random())
            self.network.slowness = self.pace
        elif kind == "stop":
            await self.stop(node)
        elif kind == "usurped":
            await self.usurp()
        elif kind == "power in a resync":
            await self.interrupt_a_resync()
        elif node.machine is not None:
            await self.disk_fault(node, kind)

    async def down(self, nodes: list[Node], *, power: bool) -> None:
        """They go, and come back after a while."""
        nodes = [node for node in nodes if node.process is not None and node.process.is_alive]
        for node in nodes:
            # All at one moment, as far as they can tell; what each had in its cache is decided on the way.
            self.network.die(node.name, with_word=not power)
            node.note_accepted()
            if node.process is not None:
                node.process.die()
        for node in nodes:
            await node.kill(power=power)
        for node in nodes:
            await trio.sleep(self.rng.random() * self.rng.choice((0.1, 1.0, 3.0)))
            await self.up(node)

    async def up(self, node: Node) -> None:
        """Started, if it isn't."""
        if node.process is None:
            node.power_on()
            try:
                await self.nursery.start(node.start)
            except TierError as error:
                self.trace(f"{node.name} doesn't start: {error}")
                self.counts["not started"] += 1

    async def down_at_an_operation(self, node: Node) -> None:
        power = self.rng.random() < 0.6
        if node.machine is None or node.process is None or not node.process.is_alive:
            return
        node.machine.countdown = self.rng.choice((1, 2, 3, 5, 8, 13, 21, 40))
        process = node.process
        with trio.move_on_after(1.5):
            await node.ended.wait()
        node.machine.countdown = None
        if node.process is process:
            return
        await node.kill(power=power)
        await trio.sleep(self.rng.random())
        await self.up(node)

    async def cut(self, node: Node, *, one_way: bool) -> None:
        others = set(self.nodes) - {node.name}
        ways = {(node.name, other) for other in others}
        if one_way:
            if self.rng.random() < 0.5:
                ways = {(other, node.name) for other in others}
            if self.rng.random() < 0.5:
                ways = {self.rng.choice(sorted(ways))}
        else:
            ways |= {(other, node.name) for other in others}
        self.network.change(self.network.blocked | ways)
        await trio.sleep(self.rng.random() * self.rng.choice((0.5, 2.5, 4.0)))
        self.network.change(self.network.blocked - ways)
        self.trace(f"{node.name} is connected again")

    async def usurp(self) -> None:
        """The primary is cut off for no longer than another one needs, and goes on: with writes that only it has, and
        connections that are as good as ever."""
        serving = self.serving()
        if not serving:
            return
        name = self.rng.choice(serving)._node.peers.node
        others = sorted(set(self.nodes) - {name})
        if len(others) == 2 and self.rng.random() < 0.5:
            await self.write_behind_a_promise(name, *self.rng.sample(others, 2))
            return
        ways = {(other, name) for other in others}
        if self.rng.random() < 0.6:
            ways |= {(name, other) for other in others}
        self.network.change(self.network.blocked | ways)
        heirs = [local for local in self.locals() if local._node.peers.node != name and not local.starting]
        with trio.move_on_after(2.5 + self.rng.random()):
            await trio.sleep(0.6 + self.rng.random() * 0.4)
            while heirs:
                heir = self.rng.choice(heirs)
                try:
                    self.trace(f"operator: promote {heir._node.peers.node}, as {name} is cut off")
                    await heir.promote()
                    self.counts["taken over"] += 1
                    break
                except OSError as error:
                    self.trace(f"operator: {error.strerror or error}")
                await trio.sleep(0.05)
            await trio.sleep(self.rng.random() * self.rng.choice((0.0, 0.1, 1.0)))
        self.network.change(self.network.blocked - ways)
        self.trace(f"{name} is connected again")

    async def write_behind_a_promise(self, name: str, heir: str, third: str) -> None:
        """The third node hears the primary again just when it has promised its heir a term, whose record is late."""

        def promised() -> int:
            process = self.nodes[third].process
            files = [] if process is None else [one for one in process.own_voter._files.values() if one is not None]
            terms = [one.promised for one in files]
            if process is not None and process.local is not None:
                terms.append(process.local.keeper.record.promised)
            return max((term.number for term in terms if term is not None), default=0)

        local, before = self.local_of(heir), promised()
        if local is None or local.starting:
            return
        apart = {(name, heir), (heir, name)}
        third_apart = {(name, third), (third, name)}
        self.network.change(self.network.blocked | apart | third_apart)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.take_over, local, 5.0)
            with trio.move_on_after(3.5):
                while promised() <= before:
                    await trio.sleep(0.002)
                self.trace(f"{third} has promised {heir} a term, and hears {name} again")
                self.network.change(self.network.blocked - third_apart | {(heir, third)})
                await trio.sleep(0.2 + self.rng.random())
            self.network.change(self.network.blocked - apart - third_apart - {(heir, third)})
        self.trace(f"{name} is connected again")

    async def take_over(self, local: LocalMirror, within_s: float) -> None:
        """Promote it when the lease of the primary before is over, as soon as that is possible."""
        with trio.move_on_after(within_s):
            await trio.sleep(0.85)
            while True:
                try:
                    await local.promote()
                    self.counts["taken over"] += 1
                    return
                except OSError:
                    await trio.sleep(0.03)

    async def interrupt_a_resync(self) -> None:
        """The machine of a leg goes down that is just being brought up to date, or has just been."""

        def resynced() -> list[str]:
            found = []
            for local in self.serving():
                members = local.mirror.members.values() if local.mirror is not None else ()
                found += [m.info.node for m in members if m.leg is not None and m.state is LegState.SYNCING]
            return [name for name in found if self.nodes[name].process is not None]

        with trio.move_on_after(2.5):
            while not (names := resynced()):
                await trio.sleep(0.005)
            await trio.sleep(self.rng.random() * self.rng.choice((0.01, 0.05, 0.2)))
            node = self.nodes[self.rng.choice(names)]
            self.trace(f"power {node.name} in its resync")
            with trio.CancelScope(shield=True):
                await self.down([node], power=True)

    async def stop(self, node: Node) -> None:
        process = node.process
        if process is None or not process.is_alive or process.stopping.is_set():
            return
        process.stopping.set()
        with trio.move_on_after(6.0):
            await node.ended.wait()
        if node.process is process:
            await node.kill(power=False)
        await trio.sleep(self.rng.random())
        await self.up(node)

    async def disk_fault(self, node: Node, kind: str) -> None:
        rng = self.rng
        assert node.machine is not None
        medium = node.machine.media[0]
        if kind == "refused writes":
            self.refused.add(node.name)
            number = rng.choice((errno.ENOSPC, errno.ENOSPC, errno.EIO, 0))
            medium.on_write = lambda offset, length: (number, rng.choice((0, rng.randrange(length + 1))))
            await trio.sleep(rng.random() * 0.3)
        elif kind == "failing reads":
            self.unread.add(node.name)
            medium.on_read = lambda offset, length: errno.EIO if rng.random() < 0.7 else None
            await trio.sleep(rng.random() * 0.4)
        elif kind == "slow disk":
            slow_s = rng.choice((0.05, 0.3, 1.3))

            async def dawdle(*about: int) -> None:
                await trio.sleep(rng.random() * slow_s)

            medium.before_read = medium.before_sync = dawdle
            await trio.sleep(rng.random() * 1.5)
        else:
            await self.rot(node)
        self.mend(node)

    def mend(self, node: Node) -> None:
        """Its disk is well."""
        if node.machine is not None:
            medium = node.machine.media[0]
            medium.on_write = lambda offset, length: None
            medium.on_read = lambda offset, length: None
            medium.before_read = medium.before_sync = None

    async def rot(self, node: Node) -> None:
        """A block of a leg, where every other one has it too."""
        local = next((one for one in self.locals() if one._node.peers.node == node.name), None)
        whole = [
            one for one in self.serving() if one.mirror is not None and one.mirror.status().state is MirrorState.ONLINE
        ]
        if local is None or not whole or self.rotten or node.machine is None:
            return
        offset = self.rng.randrange(EXTENTS * EXTENT_BYTES // BLOCK_BYTES) * BLOCK_BYTES
        data = bytearray(BLOCK_BYTES)
        try:
            await local.pool.checkpoint()  # what lies before it isn't replayed after a crash
            if offset >= local.volume.size_bytes:
                return
            await local.volume.read(offset, BLOCK_BYTES, memoryview(data))
        except OSError:
            return
        if not any(data) or node.process is None or local is not node.process.local:
            return
        for one in whole:
            if one.mirror is None or one.mirror.status().state is not MirrorState.ONLINE:
                return
            if one.mirror.inflight.overlaps(offset, BLOCK_BYTES):
                return  # another leg may not have it yet, and be left out without it
        medium, at = node.machine.media[0], -1
        while (at := medium.cache.find(bytes(data), at + 1)) >= 0:
            medium.flip(at + self.rng.randrange(BLOCK_BYTES), self.rng.randrange(8))
            self.rotten[node.name, offset] = None
            self.counts["rotten"] += 1

    # -- the end -------------------------------------------------------------------------------------------------------

    async def peace(self) -> WatchedMirror | None:
        """All is mended. Returns the mirror when it is whole; None where two faults left nothing that is proven."""
        self.trace("peace")
        self.network.slowness = 1.0
        self.network.change(set())
        self.forces = False
        began = trio.current_time()
        for node in self.nodes.values():
            self.mend(node)
            if node.machine is not None:
                node.machine.countdown = None
        helped = 0
        with trio.move_on_after(PEACE_S):
            while True:
                for node in self.nodes.values():
                    if node.machine is not None and node.machine.is_off and node.process is None:
                        await node.kill(power=False)
                    await self.up(node)
                if not self.serving() and not any(local.starting for local in self.locals()):
                    with trio.move_on_after(5.0):
                        try:
                            await self.promote_somewhere()
                        except OSError as error:
                            self.trace(f"operator: {error.strerror or error}")
                if mirror := self.whole():
                    # It may only not have noticed yet.
                    await trio.sleep(2.5 * mirror.membership.options.timeout_s)
                    with contextlib.suppress(OSError):
                        await mirror.flush()
                        if self.whole() is mirror:
                            self.ends_s = trio.current_time() - began
                            return mirror
                await trio.sleep(0.25)
                if trio.current_time() - began > 15.0 * (helped + 1):
                    helped += 1
                    await self.help()
        problems = [str(local.problem) for local in self.locals()]
        if self.rotten and any("fails its checksum" in problem for problem in problems):
            # Rot on the one leg whose machine has kept its memory: what was acknowledged is nowhere else for sure.
            self.counts["lost to rot and power"] += 1
            return None
        states = [repr(local.mirror.status()) if local.mirror else f"{local.problem}" for local in self.locals()]
        raise ViolationError(f"{PEACE_S:g} s after all was mended the mirror is not whole: {states}")

    def whole(self) -> WatchedMirror | None:
        """The mirror, if it is Online in the branch that is judged."""
        for local in self.serving():
            mirror = local.mirror
            if (
                isinstance(mirror, WatchedMirror)
                and mirror.status().state is MirrorState.ONLINE
                and self.is_judged(mirror)
            ):
                return mirror
        return None

    async def help(self) -> None:
        """What an operator does who reads what `explain` says."""
        self.counts["helped"] += 1
        self.trace("operator: helps")
        for local in self.serving():
            mirror = local.mirror
            assert mirror is not None and isinstance(mirror, WatchedMirror)
            for name, offset in list(self.rotten):
                if offset < mirror.size_bytes:
                    self.trace(f"operator: writes the block at {offset} of {name} anew")
                    with trio.move_on_after(3.0):
                        try:
                            await self.write(mirror, offset, self.judge.data(BLOCK_BYTES // SECTOR))
                        except OSError as error:
                            self.trace(f"operator: {error}")
            if self.branch is None or not self.is_judged(mirror):
                continue
            for leg in mirror.membership.legs:
                process = self.nodes[leg.node].process
                if leg.id not in mirror.membership.in_sync and process is not None and process.local is not None:
                    self.trace(f"operator: discards {leg.node}")
                    keeper = process.local.keeper
                    try:
                        if keeper.record.promised is not None and not keeper.allows(local.membership.term):
                            with trio.move_on_after(5.0):
                                await local.begin_anew()  # as the command does
                        await keeper.prepare(local.membership.term, mirror.process.node.name)
                        await keeper.accept(local.membership, inconsistent=True, discard=True)
                        local.compared_in_full.add(leg.id)
                    except OSError as error:
                        self.trace(f"operator: {error}")
        serving = self.serving()
        if self.branch is not None and not any(
            isinstance(one.mirror, WatchedMirror) and self.is_judged(one.mirror) for one in serving
        ):
            # A side that was left goes on by itself, and the one that counts was demoted meanwhile.
            for local in self.locals():
                if local not in serving and any(one.term == self.branch for one in local.membership.history):
                    self.trace(f"operator: promote {local._node.peers.node} by force")
                    try:
                        return await self.promote_by_force(local)
                    except OSError as error:
                        self.trace(f"operator: {error}")
        for name in sorted(self.refused | self.unread):  # a pool may take no writes before a restart
            self.trace(f"operator: restarts {name}")
            await self.stop(self.nodes[name])

    async def compare(self, mirror: WatchedMirror) -> None:
        """All legs, with the judge and each other."""
        await mirror.flush()
        report = await verify(mirror, full=True, repair=True)
        if report.differing_bytes:
            raise ViolationError(f"legs in sync differ: {report.differing}")
        if report.unreadable and not self.rotten:
            raise ViolationError(f"legs can't read: {report.unreadable}")
        await mirror.stop()
        found: dict[str, bytes] = {}
        snapshots: dict[str, tuple[str, bytes, set[int]]] = {}
        for local in self.locals():
            name = local._node.peers.node
            data, bad = await read_what_can_be(local.volume)
            if bad:
                raise ViolationError(f"{name} can't read {sorted(bad)}, after it was healed")
            found[name] = data[: mirror.size_bytes]
            for snapshot in local.volume.snapshots:
                before, unreadable = await read_what_can_be(snapshot)
                if unreadable and not self.rotten:
                    raise ViolationError(f"{name}@{snapshot.name} can't read {sorted(unreadable)}")
                other, theirs, skipped = snapshots.setdefault(snapshot.name, (name, before, unreadable))
                skip = skipped | unreadable
                # A leg that a resize has passed by is larger than the others until the next one.
                for block in range(min(len(before), len(theirs)) // BLOCK_BYTES):
                    at = block * BLOCK_BYTES
                    if block not in skip and before[at : at + BLOCK_BYTES] != theirs[at : at + BLOCK_BYTES]:
                        raise ViolationError(f"snapshot {snapshot.name}: {name} and {other} differ at {at}")
            left = sorted(key for key in local.store.trackers if key.startswith(MISSING))
            recent = [key for key in (RECENT, RECENT_OLD) if local.store.trackers.get(key)]
            if left or recent:
                raise ViolationError(f"{name} still has {left} and something in {recent}")
            known = ["@s.*fails its checksum"] if self.rotten else []
            if name in self.unread:  # below a page of a deleted version that couldn't be read nothing is given back
                known.append("blocks are counted as live, ")
            await require_sound(local.pool, known="|".join(known) or "(?!)")
        (first, image), *others = found.items()
        for name, data in others:
            if data != image:
                at = next((i for i in range(min(len(data), len(image))) if data[i] != image[i]), -1)
                raise ViolationError(f"{name} ({len(data)} bytes) differs from {first} ({len(image)} bytes) at {at}")
        self.judge.image(image, "the legs")

    # -- a life --------------------------------------------------------------------------------------------------------

    async def make(self) -> None:
        """The nodes and their legs."""
        for node in self.nodes.values():
            if node.machine is not None:
                async with node.machine.open() as pool:
                    record = LegRecord(f"leg-{node.name}", promised=self.counted.term, accepted=self.counted)
                    await make_leg(pool, record, SIZE)
            else:
                node.process = None
        for node in self.nodes.values():
            await self.nursery.start(node.start)

    async def unrest(self) -> None:
        """Everything before the peace."""
        async with trio.open_nursery() as operators:
            operators.start_soon(self.operator)
            async with trio.open_nursery() as work:
                for _ in range(CLIENTS):
                    work.start_soon(self.client)
                for _ in range(2):
                    work.start_soon(self.trouble)
            operators.cancel_scope.cancel()

    async def run(self) -> Life:
        """From the beginning to the end."""
        with trio.fail_after(LIFE_S):
            async with trio.open_nursery() as self.nursery:
                await self.make()
                await self.unrest()
                mirror = await self.peace()
                self.judge.check()
                if mirror is not None:
                    await self.compare(mirror)
                self.judge.check()
                self.nursery.cancel_scope.cancel()
        return self


def live(seed: int, kind: type[Life] = Life, **options: Any) -> Life:
    """One life. Raises ViolationError, with the schedule as a note."""
    core = trio._core._run
    core._r.seed(seed)  # type: ignore[attr-defined]
    life = kind(seed, **options)
    collecting = gc.isenabled()
    gc.disable()
    try:
        with (
            surroundings(random.Random(seed ^ 0x5EC2E7)),
            mock.patch.object(core, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
        ):
            trio.run(life.run, clock=trio.testing.MockClock(autojump_threshold=0))
    except BaseException as error:
        error.add_note("\n".join(life.schedule))
        raise
    finally:
        if collecting:
            gc.enable()
    return life


def digest(life: Life) -> str:
    """Of all that has happened."""
    return hashlib.sha256("\n".join(life.schedule).encode() + repr(sorted(life.counts.items())).encode()).hexdigest()[
        :16
    ]


__all__ = ["Awaitable", "Callable", "Life", "OracleError", "ViolationError", "digest", "live", "partial"]
