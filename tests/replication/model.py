"""A model of mirrors under faults, around the real rules: voters, records, promotion and leases are the product's own.

What is modelled: nodes that crash and come back (with or without their machine), a network that delays, loses either
way and is cut, and a primary in its simplest form, which writes numbers to its legs, and makes tie-breakers of nodes
and takes that back. In every third run there is an operator who uses force, and gives up one side of a split brain. A
seed decides everything. The `Oracle` knows all numbers that were acknowledged, and raises `Violated`.

    python -m tests.replication.model 20000 [MUTANT]     # that many seeds from 0 on
    python -c 'from tests.replication.model import explore; explore(SEED, trace=print)'
"""

from __future__ import annotations

import contextlib
import errno
import random
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import trio
import trio.testing

from replication.cluster import ClusterStore
from replication.lease import PrimaryLease
from replication.lineage import are_apart
from replication.membership import Generation, Membership, Options, Term
from replication.orders import Known, Order, judge_discard, judge_order
from replication.promotion import Promote, SplitBrain, demote, is_rejoin_allowed, promote
from replication.voters import _Kept, rule_of
from tests.replication.nodes import MemoryVoter, Node, Nodes
from tests.replication.stores import MIRROR, MemoryStore, first_record

R = TypeVar("R")

LAYOUTS = (
    ("ab", ""),
    ("ab", ""),
    ("ab", ""),
    ("ab", ""),
    ("a", "t"),
    ("ab", "t"),
    ("abc", ""),
    ("abc", "t"),
    ("abcd", "t"),
    ("ab", "tu"),
    ("a", "tu"),
)
LAYOUTS_WITHOUT = (("ab", ""), ("ab", ""), ("a", ""), ("ab", "t"), ("abc", ""))
"""With a node d besides, which has neither a leg nor a say, and is primary all the same if it can prove that it may."""
CALL_S = 0.5


class Violated(Exception):
    """An invariant doesn't hold; its text says which."""


@dataclass(frozen=True)
class Write:
    number: int
    under: Generation
    acked_at: float


@dataclass
class Oracle:
    """What must never be lost."""

    forced_at: dict[Generation, float] = field(default_factory=dict)
    excused: dict[Generation, set[int]] = field(default_factory=dict)
    """By the forced record: what its operator was told may be lost."""
    acked: dict[int, Write] = field(default_factory=dict)
    doubtful: dict[str, set[int]] = field(default_factory=dict)
    """By leg: not flushed when its machine went down. What all legs had so may be lost: a volume has a cache."""
    gone: set[int] = field(default_factory=set)
    flushed: set[int] = field(default_factory=set)
    """By all legs that were in sync then."""
    committed: list[Membership] = field(default_factory=list)
    ackers: dict[int, Term] = field(default_factory=dict)
    given_up: set[int] = field(default_factory=set)
    """By an operator, with the other side of a split brain."""
    heard: dict[str, Membership] = field(default_factory=dict)
    """By node: by which record another one served the other side of a split brain, when it was heard last."""
    splits: int = 0
    discards: int = 0
    reconfigurations: int = 0
    promotions: int = 0
    reads: int = 0

    def required(self, by: Membership) -> set[int]:
        """What a primary with this record must have."""
        if not self.forced_at:
            return set(self.acked) - self.gone
        history = set(by.history)
        forced = [one for one in by.history if one in self.forced_at]
        gone = set[int]().union(*(self.excused[one] for one in forced))
        return {
            number
            for number, write in self.acked.items()
            if write.under in history
            and number not in gone
            and number not in self.gone
            and not any(
                self.forced_at[one] < write.acked_at and (one.term.number, one.epoch) > _place(write.under)
                for one in forced
            )
        }

    def judge_gone(self, in_sync: frozenset[str], data: set[int]) -> None:
        """A primary begins with `data`: what no leg in sync has surely kept may be missing, and is then lost for good.

        A leg that has come into sync since it was written has flushed it then.
        """
        for number in set(self.acked) - data:
            if all(number in self.doubtful.get(leg, ()) for leg in in_sync):
                self.gone.add(number)

    def commit(self, record: Membership) -> None:
        if not self.forced_at and record.forced == "no":
            for other in self.committed:
                later, earlier = (record, other) if record.place >= other.place else (other, record)
                if not later.descends_from(earlier):
                    raise Violated(f"record {later.place} has lost the committed {earlier.place}")
        self.committed.append(record)

    def acknowledge(self, number: int, record: Membership, now: float) -> None:
        if self.ackers.setdefault(record.term.number, record.term) != record.term and not self.forced_at:
            raise Violated(f"two primaries acknowledge in term {record.term.number}")
        self.acked[number] = Write(number, record.generation, now)

    def force(self, record: Membership, has: set[int], now: float) -> None:
        self.forced_at[record.generation] = now
        self.excused[record.generation] = set(self.acked) - has

    def overwrite(self, old: set[int], new: set[int], record: Membership, leg_record: Membership | None) -> None:
        """A leg's content is replaced by that of a primary's."""
        excused = set[int]().union(*(gone for one, gone in self.excused.items() if one in record.history))
        excused |= self.given_up
        lost = {number for number in old - new if number in self.acked and number not in self.gone} - excused
        if lost:
            raise Violated(f"{lost} acknowledged and silently overwritten by {record.place}")


def _place(generation: Generation) -> tuple[int, int]:
    return generation.term.number, generation.epoch


class ModelNode(Node):
    """With data, and what runs on it."""

    def __init__(self, name: str) -> None:
        self.data: set[int] = set()
        self.flushed: set[int] = set()
        self.life = 0
        self.scope: trio.CancelScope | None = None
        self.reader: Callable[[], None] | None = None
        super().__init__(name)

    def crash(self, *, power: bool, rng: random.Random, oracle: Oracle) -> None:
        """All that isn't durable is gone; what still runs for it writes to a store that nobody has."""
        self.up, self.primary = False, False
        self.life += 1
        if self.scope is not None:
            self.scope.cancel()
        store = MemoryStore(self.store.export_name)
        store.durable = self.store.durable
        store.crash()
        self.store = store
        if power:
            self.boot += 1
            unflushed = sorted(self.data - self.flushed)
            oracle.doubtful.setdefault(self.name, set()).update(self.data - oracle.flushed)
            self.data = self.flushed | {one for one in unflushed if rng.random() < 0.5}

    def come_back(self) -> None:
        self.up = True
        self.start()


class NodeWithout(ModelNode):
    """A node with neither a leg nor a say: what its home keeps is durable at once, by no thread."""

    kept: _Kept | None = None

    def start(self) -> None:
        super().start()

        class Voter(MemoryVoter):
            async def _keep(voter, mirror: str, kept: _Kept) -> None:
                await trio.lowlevel.checkpoint()
                if voter is self.voter:  # else the process is gone
                    self.kept = voter._files[mirror] = kept

        is_primary: Callable[[str], bool] = lambda mirror: self.primary  # noqa: E731
        self.voter = Voter(
            self, self.name, Path("/nonexistent"), lambda mirror: [], is_primary=is_primary, clock=self.clock
        )
        self.voter._files[MIRROR] = self.kept


class World:
    arbiter = False

    def __init__(self, seed: int, *, forces: bool, without: bool = False) -> None:
        self.rng = random.Random(seed)
        legs, diskless = self.rng.choice(LAYOUTS_WITHOUT if without else LAYOUTS)
        self.nodes = Nodes("", self.carry, timeout_s=1.0)
        self.all: dict[str, ModelNode] = {name: ModelNode(name) for name in legs + diskless}
        if without:
            self.all["d"] = NodeWithout("d")
        self.nodes.all = dict(self.all)
        self.oracle = Oracle()
        self.forces = forces
        self.loss = self.rng.choice([0.0, 0.02, 0.1])
        self.crashing = self.rng.choice([0.0, 0.01, 0.05])
        self.cuts: set[frozenset[str]] = set()
        self.numbers = 0
        self.sessions: dict[tuple[Term, str], int] = {}
        self.holders: dict[Term, frozenset[str]] = {}
        """Legs that had all that was acknowledged when a term began, which no candidate is asked about."""
        self.slow = random.Random(seed).choice([0.0, 0.0, 0.1])
        """How often a leg fails though its node is well."""
        first_options = Options(timeout_s=1.0, lease_s=0.8, arbiter="etcd" if self.arbiter else "legs")
        self.first = first_record(legs, diskless=diskless, options=first_options)
        self.trace: Callable[[str], None] = lambda line: None

    async def carry(self, source: str, target: str, call: Callable[[], Awaitable[R]], /) -> R:
        if source == target:
            return await call()
        lost = OSError(errno.ETIMEDOUT, f"node {target} hasn't answered")
        life = self.all[target].life
        await trio.sleep(self.rng.expovariate(1 / 0.01))
        if self._is_lost(source, target, life):
            raise lost
        with trio.move_on_after(CALL_S):
            try:
                answer = await call()
            except OSError as error:
                if self._is_lost(source, target, life):
                    raise lost from None
                raise error
            if self.rng.random() < self.crashing:
                # Between two steps of a protocol, where it matters.
                name = self.rng.choice([source, source, target])
                self.trace(f"{trio.current_time():8.2f} crash {name} between steps")
                self.crash(name)
            await trio.sleep(self.rng.expovariate(1 / 0.01))
            if self._is_lost(source, target, life):
                raise lost
            return answer
        raise lost

    def _is_lost(self, source: str, target: str, life: int) -> bool:
        node = self.all[target]
        gone = not node.up or node.life != life or frozenset((source, target)) in self.cuts
        return gone or self.rng.random() < self.loss

    async def run(self, steps: int) -> None:
        for node in self.all.values():
            if isinstance(node, NodeWithout):
                continue
            await node.voter.accept(self.first)
            await node.keeper.take_part()
        await self.begin()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._as_node, "a", self._serve, self.first, "a")
            for _ in range(steps):
                await trio.sleep(self.rng.choice([0.02, 0.1, 0.5, 2.0]))
                self.step(nursery)
            nursery.cancel_scope.cancel()

    async def begin(self) -> None:
        """What else has to know the first record."""

    def step(self, nursery: trio.Nursery) -> None:
        rng, name = self.rng, self.rng.choice(sorted(self.all))
        node = self.all[name]
        what = rng.choice(
            ["promote"] * 5 + ["crash"] * 3 + ["start"] * 5 + ["cut"] * 4 + ["heal"] * 2 + ["demote"] * 3 + ["duel"] * 3
        )
        self.trace(f"{trio.current_time():8.2f} {what} {name}")
        if what == "promote" and node.up and node.scope is None:
            force = self.forces and rng.random() < 0.4
            nursery.start_soon(self._as_node, name, self._promote, force)
        elif what == "crash" and node.up:
            self.crash(name)
        elif what == "start":
            for one in self.all.values():
                if not one.up and rng.random() < 0.7:
                    one.come_back()
        elif what == "cut":
            side = {one for one in self.all if rng.random() < 0.5}
            self.cuts = {frozenset((a, b)) for a in side for b in set(self.all) - side}
        elif what == "duel":
            # Both sides of a cut try to go on: what the rules are for.
            side = {one for one in self.all if rng.random() < 0.5}
            self.cuts = {frozenset((a, b)) for a in side for b in set(self.all) - side}
            for each in sorted(self.all):
                if not self.all[each].up:
                    self.all[each].come_back()
                if self.all[each].scope is None:
                    nursery.start_soon(self._as_node, each, self._promote, self.forces and rng.random() < 0.2)
        elif what == "heal":
            self.cuts = set()
        elif what == "demote":
            for one in self.all.values():
                if one.primary:
                    one.demoting = True  # type: ignore[attr-defined]

    def crash(self, name: str) -> None:
        self.all[name].crash(power=self.rng.random() < 0.3, rng=self.rng, oracle=self.oracle)

    async def _as_node(self, name: str, what: Callable[..., Awaitable[None]], *args: Any) -> None:
        node = self.all[name]
        if node.scope is not None:
            return
        with trio.CancelScope() as node.scope:
            try:
                await what(name, *args)
            except* OSError:
                pass
            finally:
                node.primary = False
        node.scope = None

    async def _promote(self, me: str, force: bool) -> None:
        own = self.all[me].keeper.record.accepted
        decision = await promote(
            *(me, MIRROR, sorted(self.all), self.nodes.voter(me), self.cluster(me)),
            arbiter=self.arbiter,
            force=force,
            timeout_s=1.0,
            heard_of=partial(self._heard_of, me),
        )
        self.oracle.splits += isinstance(decision, SplitBrain)
        self.trace(f"{trio.current_time():8.2f} promote {me} force={force}: {decision}")
        if not isinstance(decision, Promote):
            return
        if decision.membership.forced != "no":
            self.oracle.heard.pop(me, None)
        other = self.oracle.heard.get(me)
        by_own = decision.expected == own
        if by_own and other is not None and are_apart(decision.expected, me, other, other.primary or ""):
            raise Violated(
                f"node {me} goes on from {decision.expected.place}, though it knows who serves {other.place}"
            )
        source = decision.sources[0].node
        record = decision.membership
        self.oracle.judge_gone(self.holders.pop(record.term, decision.expected.in_sync), self.all[source].data)
        missing = self.oracle.required(record) - self.all[source].data
        if missing:
            raise Violated(f"{record.place}: node {me} goes on with the leg of {source}, which lacks {missing}")
        self.oracle.promotions += 1
        await self._serve(me, record, source)

    async def _heard_of(self, me: str, record: Membership, node: str, *, served: bool) -> None:
        own = self.all[me]
        await own.voter.heard_of(record, node, served=served)
        accepted = own.keeper.record.accepted
        if served and accepted is not None and record.primary == node and are_apart(accepted, me, record, node):
            self.oracle.heard[me] = record

    def holding(self, newest: Membership) -> frozenset[str]:
        """Legs that have all that was acknowledged: in sync by the newest record that may count.

        One that a leg of its own hasn't stored doesn't.
        """
        kept = {name: node.keeper.record.accepted for name, node in self.all.items()}
        for one in sorted((one for one in kept.values() if one is not None), key=lambda one: one.place, reverse=True):
            if all((own := kept[leg]) is not None and own.place >= one.place for leg in one.in_sync):
                return one.in_sync
        return newest.in_sync

    def cluster(self, me: str) -> Committing:
        return Committing(self, me)

    def store(self, me: str) -> ClusterStore:
        """Where records count."""
        return self.nodes.cluster(me)

    # A primary

    async def _serve(self, me: str, record: Membership, source: str) -> None:
        node = self.all[me]
        node.demoting = False  # type: ignore[attr-defined]
        leases = [self.lease(record)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat, me, record.term, leases)
            nursery.start_soon(self.renew, me, record, leases[0])
            try:
                record = await self._reconcile(me, record, source)
                node.primary = True
                while record.in_sync:
                    voters = record.voters
                    record = await self._turn(me, record, leases[-1])
                    if record.voters != voters and not self.arbiter:
                        leases.append(self.lease(record))
            finally:
                nursery.cancel_scope.cancel()

    def lease(self, record: Membership) -> Any:
        """What `_beat` renews and `may_read` asks."""
        return PrimaryLease(record.options.lease_s, record.voters, trio.current_time)

    async def renew(self, me: str, record: Membership, lease: Any) -> None:
        """Other tasks for the lease."""

    def may_read(self, record: Membership, lease: Any) -> bool:
        return rule_of(record) != "majority" or lease.may_serve

    async def _beat(self, me: str, term: Term, leases: list[Any]) -> None:
        async def one(target: str, lease: Any, begun: float) -> None:
            try:
                await self.nodes.voter(me)(target).heartbeat(MIRROR, term)
                lease.answered(target, begun)
            except OSError:
                pass

        async with trio.open_nursery() as nursery:
            while True:
                for target in sorted(self.all):
                    nursery.start_soon(one, target, leases[-1], leases[-1].begin())
                await trio.sleep(0.2)

    async def _reconcile(self, me: str, record: Membership, source: str) -> Membership:
        data = set(self.all[source].data)
        failed = set()
        for leg_id in sorted(record.in_sync):
            if not await self._at_leg(me, leg_id, record.term, lambda node: self._set(node, data, record)):
                failed.add(leg_id)
        if failed:
            record = await self._exclude(me, record, failed)
        if not await self._flush(me, record):
            raise OSError(errno.EIO, "a leg has failed")
        for leg_id in sorted(record.in_sync):
            keeper = self.all[leg_id].keeper
            await self.carry(me, leg_id, lambda keeper=keeper: keeper.accept(record))  # type: ignore[misc]
        return record

    def _set(self, node: ModelNode, data: set[int], record: Membership) -> None:
        self.oracle.overwrite(node.data, data, record, node.keeper.record.accepted)
        node.data = set(data)
        node.flushed &= data

    async def _at_leg(self, me: str, leg_id: str, term: Term, what: Callable[[ModelNode], None]) -> bool:
        """At a leg, unless it is fenced: as the replica does it, in the same synchronous step as the check."""
        node = self.all[leg_id]
        # A session is with one process: another one may have lost what this one had.
        life = self.sessions.setdefault((term, leg_id), node.life)

        async def there() -> None:
            await node.keeper.take_part()
            if node.life != life:
                raise OSError(errno.ECONNRESET, "another process")
            if not node.keeper.allows(term):
                raise OSError(errno.ESTALE, "fenced")
            if self.slow and self.rng.random() < self.slow:
                raise OSError(errno.EIO, "the disk is slow")
            what(node)

        try:
            await self.carry(me, leg_id, there)
        except OSError:
            return False
        return True

    async def _exclude(self, me: str, record: Membership, failed: set[str]) -> Membership:
        left = record.in_sync - failed
        if not left:
            raise OSError(errno.EIO, "no leg is left")
        return await self._commit(me, record.next_epoch(in_sync=left), record)

    async def _commit(self, me: str, new: Membership, expected: Membership) -> Membership:
        while True:
            try:
                await self.cluster(me).commit(new, expected=expected)
                return new
            except OSError as error:
                if error.errno != errno.ETIMEDOUT:
                    raise
            await trio.sleep(0.1)

    async def _turn(self, me: str, record: Membership, lease: Any) -> Membership:
        await trio.sleep(self.rng.choice([0.01, 0.05, 0.3]))
        what = self.rng.choice(["write"] * 10 + ["read"] * 4 + ["flush"] * 2 + ["resync"] * 2 + ["voters"])
        if getattr(self.all[me], "demoting", False):
            self.all[me].primary = False
            if await self._flush(me, record):
                await demote(me, record, self.cluster(me), to=self.rng.choice([None, None, *sorted(record.in_sync)]))
            raise OSError(errno.ESHUTDOWN, "demoted")
        if what == "write":
            return await self._write(me, record)
        if what == "read":
            self._read(me, record, lease)
        elif what == "flush":
            await self._flush(me, record)
        elif what == "voters":
            return await self._change_voters(me, record)
        else:
            out = [leg.id for leg in record.legs if leg.id not in record.in_sync]
            if out:
                return await self._resync(me, record, self.rng.choice(out))
        return record

    async def _write(self, me: str, record: Membership) -> Membership:
        self.numbers += 1
        number, failed = self.numbers, set[str]()

        async def one(leg_id: str) -> None:
            if not await self._at_leg(me, leg_id, record.term, lambda node: node.data.add(number)):
                failed.add(leg_id)

        async with trio.open_nursery() as nursery:
            for leg_id in sorted(record.in_sync):
                nursery.start_soon(one, leg_id)
        if failed:
            record = await self._exclude(me, record, failed)
        self.oracle.acknowledge(number, record, trio.current_time())
        self.trace(f"{trio.current_time():8.2f} {me} acknowledges {number} under {record.place}")
        return record

    def _read(self, me: str, record: Membership, lease: Any) -> None:
        # Who has no leg asks one, which answers only within the session.
        at = me if record.legs_on(me) else min(record.in_sync)
        node = self.all[at]
        if at not in record.in_sync or not node.keeper.allows(record.term):
            return
        if at != me and (not node.up or self.sessions.get((record.term, at)) != node.life):
            return
        if not self.may_read(record, lease):
            return
        self.oracle.reads += 1
        missing = self.oracle.required(record) - node.data
        if missing:
            raise Violated(f"{record.place}: a stale read on node {me}, without {missing}")

    async def _flush(self, me: str, record: Membership) -> bool:
        """All legs in sync, which then know it."""

        def flush(node: ModelNode) -> None:
            node.flushed = set(node.data)

        for leg_id in sorted(record.in_sync):
            if not await self._at_leg(me, leg_id, record.term, flush):
                return False
        self.oracle.flushed |= set.intersection(*(self.all[leg_id].flushed for leg_id in record.in_sync))
        for leg_id in sorted(record.in_sync):
            if not await self._at_leg(me, leg_id, record.term, self._settle):
                return False
        return True

    def _settle(self, node: ModelNode) -> None:
        node.keeper.settled()
        self.oracle.doubtful.get(node.name, set()).difference_update(node.data)

    async def _change_voters(self, me: str, record: Membership) -> Membership:
        """A tie-breaker more or less."""
        diskless = [name for name in sorted(self.all) if not record.legs_on(name)]
        if not diskless:
            return record
        name = self.rng.choice(diskless)
        goes = name in record.voters
        voters = tuple(one for one in record.voters if one != name) if goes else (*record.voters, name)
        new = await self._commit(me, record.next_epoch(voters=voters), record)
        self.oracle.reconfigurations += 1
        node = self.all[name]

        async def retire() -> None:
            own = node.keeper.record
            judge_order(Order(me, new), Known(name, own.promised, own.accepted))
            await node.voter.retire(new)

        if goes:
            with contextlib.suppress(OSError):
                await self.carry(me, name, retire)
        return new

    async def _discard(self, me: str, record: Membership, leg_id: str) -> None:
        """The operator gives up what a leg has that is the other side of a split brain."""
        node = self.all[leg_id]

        async def there() -> None:
            own = node.keeper.record
            judge_discard(Order(me, record), Known(leg_id, own.promised, own.accepted, leg_id))
            await node.keeper.prepare(record.term, me)
            # Not what this side must have: of before the fork, and lost without anybody's decision.
            self.oracle.given_up |= node.data - self.oracle.required(record)
            await node.keeper.accept(record, inconsistent=True, discard=True)
            self.oracle.heard.pop(leg_id, None)
            self.oracle.discards += 1

        with contextlib.suppress(OSError):
            await self.carry(me, leg_id, there)

    async def _resync(self, me: str, record: Membership, leg_id: str) -> Membership:
        node = self.all[leg_id]

        async def begin() -> None:
            accepted = node.keeper.record.accepted
            is_rejoin_allowed(record, accepted, leg_id)
            await node.keeper.accept(record, inconsistent=True)
            self.sessions[record.term, leg_id] = node.life

        try:
            await self.carry(me, leg_id, begin)
        except OSError as error:
            self.oracle.splits += error.errno == errno.EUCLEAN
            if error.errno == errno.EUCLEAN and self.rng.random() < 0.3:
                await self._discard(me, record, leg_id)
            return record
        data = set[int]()
        if not await self._at_leg(me, min(record.in_sync), record.term, lambda leg: data.update(leg.data)):
            raise OSError(errno.EIO, "the source has failed")
        if not await self._at_leg(me, leg_id, record.term, lambda leg: self._set(leg, data, record)):
            return record
        new = record.next_epoch(in_sync=record.in_sync | {leg_id})
        if not await self._at_leg(me, leg_id, record.term, lambda leg: setattr(leg, "flushed", set(leg.data))):
            return record
        new = await self._commit(me, new, record)
        self.oracle.doubtful.get(leg_id, set()).difference_update(data)
        return new


class Committing:
    """A cluster that tells the oracle what counts."""

    def __init__(self, world: World, node: str) -> None:
        self._world = world
        self._node = node
        self._cluster = world.store(node)

    async def newest(self, mirror: str) -> Membership:
        return await self._cluster.newest(mirror)

    async def create(self, first: Membership) -> None:
        await self._cluster.create(first)

    async def judge_candidate(self, mirror: str) -> None:
        await self._cluster.judge_candidate(mirror)

    async def commit(self, new: Membership, *, expected: Membership) -> None:
        sides = f"{new.place} by {self._node}, in sync {sorted(new.in_sync)}, primary {new.primary}"
        if new.epoch == 0 and not self._world.forces:
            self._world.holders[new.term] = self._world.holding(expected)
        if new.forced != "no":
            # From now on: should the answer be lost, it may still come to count.
            self._world.oracle.force(new, self._world.all[self._node].data, trio.current_time())
        try:
            await self._cluster.commit(new, expected=expected)
        except OSError as error:
            self._world.trace(f"{trio.current_time():8.2f} commit {sides}: {error}")
            raise
        self._world.trace(f"{trio.current_time():8.2f} commit {sides}: counts")
        self._world.oracle.commit(new)


def explore(
    seed: int,
    *,
    steps: int = 40,
    without: bool = False,
    trace: Callable[[str], None] | None = None,
    kind: type[World] = World,
) -> Oracle:
    """One run. Raises `Violated`; the seed decides all. `without`: with a node that has neither a leg nor a say."""
    # As Hypothesis does it: trio's own order of tasks, which is random, follows the seed.
    trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[attr-defined]
    trio._core._run._r.seed(seed)  # type: ignore[attr-defined]

    async def run() -> Oracle:
        world = kind(seed, forces=seed % 3 == 2, without=without)
        world.trace = trace or world.trace
        await world.run(steps)
        return world.oracle

    try:
        return trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))
    except* Violated as group:
        raise _first(group) from None


def _first(group: BaseExceptionGroup[Violated]) -> Violated:
    one = group.exceptions[0]
    return _first(one) if isinstance(one, BaseExceptionGroup) else one


def main() -> None:
    """See the module."""
    from tests.replication.rule_mutants import MUTANTS, mutated

    promotions = reads = splits = discards = changes = 0
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with mutated(MUTANTS[sys.argv[2]] if len(sys.argv) > 2 else None):
        for seed in range(count):
            try:
                oracle = explore(seed)
            except Violated as violated:
                raise SystemExit(f"seed {seed}: {violated}") from None
            promotions, reads, splits = promotions + oracle.promotions, reads + oracle.reads, splits + oracle.splits
            discards, changes = discards + oracle.discards, changes + oracle.reconfigurations
    print(
        f"{count} seeds: {promotions} promotions, {reads} reads, {splits} split brains found, {discards} decided, "
        f"{changes} changes of voters, nothing violated"
    )


if __name__ == "__main__":
    main()
