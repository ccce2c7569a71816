"""Worlds of their own: random lives that are full of the events which a breach of one rule needs to be seen.

In `life.Life` these are too seldom: a process that dies just after its promise, a machine that loses what a resync has
just flushed, a leg that is away while the mirror grows. Each world has such an event among its faults, drawn from the
life's own stream; so a world's seeds are its own, and no event that is added here changes what another world lives.
"""

from __future__ import annotations

import random
from typing import Any, Final

import trio

from replication.keeper import LegRecord
from replication.leg import EXTENT_BYTES, LegState, missing_tracker
from replication.membership import LegInfo
from tests.simulation.mirrors.judge import SECTOR
from tests.simulation.mirrors.life import EXTENTS, Life
from tests.simulation.mirrors.nodes import Node, WatchedMirror, make_leg

PATIENCE_S: Final = 3.0


class AllLost(random.Random):
    """A power cut by this keeps nothing that wasn't synced."""

    def choice(self, seq: Any) -> Any:
        """The least."""
        return seq[0]


class World(Life):
    """What the worlds have in common."""

    def primary(self) -> WatchedMirror | None:
        """A mirror that serves now."""
        serving = self.serving()
        mirror = self.rng.choice(serving).mirror if serving else None
        return mirror if isinstance(mirror, WatchedMirror) else None

    def follower(self, mirror: WatchedMirror) -> Node | None:
        """Another node with a leg in sync."""
        here = mirror.process.node.name
        names = [leg.node for leg in mirror.membership.legs if leg.id in mirror.membership.in_sync]
        names = [name for name in names if name != here and self.local_of(name) is not None]
        return self.nodes[self.rng.choice(names)] if names else None

    async def follower_away(self) -> tuple[WatchedMirror, Node] | None:
        """The process of a follower is killed; returns when its leg is out, or patience is. None if there is none."""
        mirror = self.primary()
        node = None if mirror is None else self.follower(mirror)
        if mirror is None or node is None:
            return None
        await node.kill(power=False)
        with trio.move_on_after(PATIENCE_S):
            while f"leg-{node.name}" in mirror.membership.in_sync:
                await trio.sleep(0.02)
        return mirror, node

    async def lose_all(self, node: Node) -> None:
        """Its machine goes down, and what wasn't synced is gone; on return it is up again."""
        machine = node.machine
        if machine is None or node.process is None:
            return
        before, machine.rng = machine.rng, AllLost(0)
        try:
            await node.kill(power=True)
        finally:
            machine.rng = before
        await trio.sleep(self.rng.random() * self.rng.choice((0.05, 0.5, 1.5)))
        await self.up(node)

    async def fill(self, mirror: WatchedMirror, first: int, count: int) -> None:
        """A write into each of some extents, whoever refuses it."""
        for extent in range(first, first + count):
            with trio.move_on_after(1.0):
                try:
                    at = extent * EXTENT_BYTES
                    if at < mirror.size_bytes:
                        await self.write(mirror, at, self.judge.data(self.rng.choice((8, 64, EXTENT_BYTES // SECTOR))))
                except OSError as error:
                    self.trace(f"refused: {error}")


class Promises(World):
    """A process dies after its promise; and what a primary had sent before the promise arrives when others have gone
    on."""

    kinds = ("promise and kill", "promise and kill", "late writes", "late writes", "kill", "power", "usurped")
    shapes = ("3",)

    async def befall(self, kind: str, node: Node) -> None:
        """See the class."""
        if kind == "promise and kill":
            await self.kill_behind_a_promise()
        elif kind == "late writes":
            await self.deliver_late()
        else:
            await super().befall(kind, node)

    async def kill_behind_a_promise(self) -> None:
        """A voter has promised, dies, and is up again, before the record comes for which it was asked: meanwhile it
        hears nobody but the primary of before."""
        mirror = self.primary()
        if mirror is None:
            return
        name = mirror.process.node.name
        heir, third = self.rng.sample(sorted(set(self.nodes) - {name}), 2)
        local, its = self.local_of(heir), self.local_of(third)
        machine = self.nodes[heir].machine
        if local is None or its is None or local.starting or machine is None:
            return
        apart = {(name, heir), (heir, name)}
        third_apart = {(name, third), (third, name)}
        before = self.promised(third)
        late_s = self.rng.choice((0.3, 0.6, 1.0))
        self.network.change(self.network.blocked | apart | third_apart)

        async def dawdle() -> None:
            await trio.sleep(late_s)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.take_over, local, 6.0)
            with trio.move_on_after(PATIENCE_S):
                while self.promised(third) <= before:
                    await trio.sleep(0.002)
                machine.media[0].before_sync = dawdle  # its own promise comes last, and then the record
                self.counts["promise lost"] += 1
                with trio.CancelScope(shield=True):
                    await self.nodes[third].kill(power=self.rng.random() < 0.2)
                    await self.up(self.nodes[third])
                self.trace(f"{third} has promised {heir} a term, was started again, and hears {name}")
                self.network.change(self.network.blocked - third_apart)
                with trio.move_on_after(late_s + 0.2):
                    await self.fill(mirror, self.rng.randrange(EXTENTS), 1)
            machine.media[0].before_sync = None
            self.network.change(self.network.blocked - apart - third_apart)
        self.trace(f"{name} is connected again")

    def promised(self, node: str) -> int:
        """The number of the term that its leg has promised."""
        local = self.local_of(node)
        record = None if local is None else local.keeper.record
        return 0 if record is None or record.promised is None else record.promised.number

    async def deliver_late(self) -> None:
        """What the primary has sent is held up until another one serves."""
        mirror = self.primary()
        if mirror is None:
            return
        name = mirror.process.node.name
        others = sorted(set(self.nodes) - {name})
        heirs = [local for local in map(self.local_of, others) if local is not None and not local.starting]
        if not heirs:
            return
        heir = self.rng.choice(heirs)
        ways = {(name, other) for other in others}
        self.network.change(self.network.blocked | ways)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.fill, mirror, self.rng.randrange(EXTENTS - 1), 2)
            with trio.move_on_after(PATIENCE_S):
                await trio.sleep(0.8)
                while not heir.serves:
                    try:
                        await heir.promote()
                        self.counts["taken over"] += 1
                    except OSError:
                        await trio.sleep(0.01)
                await trio.sleep(self.rng.random() * self.rng.choice((0.02, 0.1, 0.5)))
            self.network.change(self.network.blocked - ways)
        self.trace(f"{name} is heard again")


class Durability(World):
    """A leg's machine goes down, and all that wasn't synced is lost, just when the primary counts on it."""

    kinds = (
        *("loses its resync", "loses its resync", "loses what is recent", "loses what is recent"),
        *("slow disk", "kill", "power in a resync", "reset"),
    )
    shapes = ("3", "3", "2+1")

    async def befall(self, kind: str, node: Node) -> None:
        """See the class."""
        if kind == "loses its resync":
            await self.lose_a_resync()
        elif kind == "loses what is recent":
            await self.lose_what_is_recent()
        else:
            await super().befall(kind, node)

    async def lose_a_resync(self) -> None:
        """A leg that was away is brought much, and loses it when the first of it isn't missed any more."""
        if (pair := await self.follower_away()) is None:
            return
        mirror, node = pair
        leg = f"leg-{node.name}"
        await self.fill(mirror, 0, EXTENTS)
        slow_s = self.rng.choice((0.02, 0.2, 0.2))

        async def dawdle() -> None:
            await trio.sleep(slow_s)

        if node.machine is not None:
            node.machine.media[0].before_sync = dawdle  # else the record that it is in sync comes first, and syncs
        await self.up(node)
        with trio.move_on_after(PATIENCE_S):
            most, left = 0, 1
            while left >= most:
                await trio.sleep(0.001)
                local, member = self.local_of(mirror.process.node.name), mirror.members[leg]
                extents = None if local is None else local.store.trackers.get(missing_tracker(leg))
                if extents is not None and member.state is LegState.SYNCING:
                    left = sum(length for _, length in extents.runs())
                    most = max(most, left)
                elif most:
                    break
            self.trace(f"{node.name} loses what its resync has brought")
            self.counts["resync lost"] += 1
            with trio.CancelScope(shield=True):
                await self.lose_all(node)
        self.mend(node)

    async def lose_what_is_recent(self) -> None:
        """A leg loses what it has taken while a common flush was under way, as soon as that has ended.

        Nothing but `recent` at the others tells of that: its own was saved when it was empty, and what is lost isn't
        replayed.
        """
        mirror = self.primary()
        node = None if mirror is None else self.follower(mirror)
        local = None if node is None else self.local_of(node.name)
        if mirror is None or node is None or local is None:
            return

        async def dawdle() -> None:
            await trio.sleep(0.1)

        with trio.move_on_after(PATIENCE_S):
            try:
                await mirror.flush()
                await mirror.flush()
                await local.pool.checkpoint()
                for one in self.nodes.values():
                    if one.machine is not None:
                        one.machine.media[0].before_sync = dawdle
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.flush, mirror)
                    await trio.sleep(0.02 + self.rng.random() * 0.05)
                    await self.fill(mirror, self.rng.randrange(1, EXTENTS - 1), self.rng.randrange(1, 3))
                await trio.sleep(self.rng.random() * self.rng.choice((0.0, 0.0, 0.01)))
            except OSError as error:
                self.trace(f"refused: {error}")
            self.trace(f"{node.name} loses what is recent")
            self.counts["recent lost"] += 1
            with trio.CancelScope(shield=True):
                await self.lose_all(node)
        for one in self.nodes.values():
            self.mend(one)

    async def flush(self, mirror: WatchedMirror) -> None:
        """Whoever refuses it."""
        try:
            await mirror.flush()
        except OSError as error:
            self.trace(f"refused: {error}")


class Sizes(World):
    """The mirror shrinks and grows while a leg is away, or while the nodes are cut off from each other."""

    kinds = ("resized without", "resized without", "resized without", "kill", "partition", "usurped", "reset")
    shapes = ("3", "3", "2+1")

    async def befall(self, kind: str, node: Node) -> None:
        """See the class."""
        if kind == "resized without":
            await self.resize_without()
        else:
            await super().befall(kind, node)

    async def resize_without(self) -> None:
        """A leg is away while the mirror gets another size, once or twice."""
        if (pair := await self.follower_away()) is None:
            return
        mirror, node = pair
        for _ in range(self.rng.randrange(1, 3)):
            sizes = [extents for extents in range(EXTENTS - 2, EXTENTS + 1) if extents << 16 != mirror.size_bytes]
            try:
                with trio.move_on_after(PATIENCE_S):
                    await self.resize(mirror, self.rng.choice(sizes) * EXTENT_BYTES)
                    self.counts["resized without"] += 1
            except OSError as error:
                self.trace(f"operator: {error}")
            await self.fill(mirror, EXTENTS - 2, self.rng.randrange(3))
        await self.up(node)


class Anew(World):
    """Syncs fail, which ends a pool for good: its leg is taken out, and made anew on other disks. So are sound ones."""

    kinds = ("failing sync", "failing sync", "made anew", "kill", "power", "reset", "slow disk", "partition")
    shapes = ("3",)  # of two legs one that is made anew leaves none but the other, which a second fault takes

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(seed, **options)
        self.turn = trio.Lock()
        """One fault at a time: a second one may leave a pool that takes no writes as the only leg in sync."""
        self.made = 0

    async def befall(self, kind: str, node: Node) -> None:
        """See the class."""
        async with self.turn:
            if kind == "failing sync":
                await self.fail_a_sync(node)
            elif kind == "made anew":
                await self.replace(node)
            else:
                await super().befall(kind, node)

    async def fail_a_sync(self, node: Node) -> None:
        """Of a leg while all are in sync. What wasn't synced is gone, though its kernel shows it."""
        with trio.move_on_after(PATIENCE_S):
            while self.whole() is None:
                await trio.sleep(0.02)
        if node.machine is None or node.process is None or self.whole() is None:
            return
        medium = node.machine.media[0]

        async def is_lost() -> None:
            if self.whole() is None:
                medium.failing_syncs = 0
            node.is_vulnerable = node.is_vulnerable or medium.failing_syncs > 0
            await trio.lowlevel.checkpoint()

        medium.failing_syncs, medium.before_sync = 1, is_lost
        with trio.move_on_after(PATIENCE_S):
            while medium.failing_syncs:
                await trio.sleep(0.005)
        medium.before_sync, medium.failing_syncs = None, 0
        if not self.takes_no_writes(node):
            return
        self.counts["poisoned"] += 1
        self.trace(f"a sync of {node.name} has failed")
        await trio.sleep(self.rng.random() * self.rng.choice((0.0, 0.5, 2.0)))
        if self.rng.random() < 0.3:
            await node.kill(power=self.rng.random() < 0.5)
            await self.up(node)
        await self.replace(node)

    async def replace(self, node: Node) -> None:
        """What an operator does who reads in what state its pool is; again, until it is done."""
        if node.machine is None:
            return
        with trio.move_on_after(20.0):
            while True:
                try:
                    if await self.make_anew(node):
                        self.counts["anew"] += 1
                        return
                except OSError as error:
                    self.trace(f"operator: {error.strerror or error}")
                await trio.sleep(0.1)

    async def make_anew(self, node: Node) -> bool:
        """Take its leg out, and add one on new disks: as the commands `remove` and `add` do. Raises OSError."""
        mirror = self.primary()
        if mirror is None:
            return False
        others = [m.info.node for m in mirror.members.values() if m.state is LegState.UP_TO_DATE]
        others = [name for name in others if name != node.name]
        if not others:
            return False
        if mirror.process.node is node:
            await self.hand_over(mirror, self.rng.choice(others))
            return False
        process = node.process
        if process is None or not process.is_ready:
            await self.up(node)
            return False
        record = mirror.membership
        going = record.legs_on(node.name)
        if going:
            self.trace(f"operator: removes {going[0].id}")
            voters = tuple(voter for voter in record.voters if voter != node.name)
            await mirror.reconfigure(legs=tuple(leg for leg in record.legs if leg not in going), voters=voters)
            await trio.sleep(self.rng.random() * 0.2)
        await process.own_voter.retire(mirror.membership)  # before its promise goes with the leg
        await node.kill(power=False)
        self.made += 1
        leg = f"leg-{node.name}{self.made}"
        node.renew()
        assert node.machine is not None
        record = mirror.membership
        async with node.machine.open() as pool:
            made = LegRecord(leg, promised=record.term, accepted=record, inconsistent=True)
            await make_leg(pool, made, mirror.size_bytes)
        await self.up(node)
        self.trace(f"operator: adds {leg}")
        record = mirror.membership
        voters = tuple(dict.fromkeys((*record.voters, node.name)))
        await mirror.reconfigure(legs=(*record.legs, LegInfo(leg, node.name, "sim/v")), voters=voters)
        return True

    async def hand_over(self, mirror: WatchedMirror, heir: str) -> None:
        """Demote, to one that is promoted. Raises OSError."""
        here, there = self.local_of(mirror.process.node.name), self.local_of(heir)
        if here is not None and there is not None:
            self.trace(f"operator: hands over to {heir}")
            with trio.move_on_after(PATIENCE_S):
                await here.demote(heir)
                await there.promote()
                return

    async def help(self) -> None:
        """Also of a leg whose pool takes no writes."""
        await super().help()
        for node in self.nodes.values():
            if self.takes_no_writes(node):
                await self.replace(node)

    def takes_no_writes(self, node: Node) -> bool:
        """Its pool, for good."""
        return node.machine is not None and any(row.poisoned for row in node.machine.state.devices)

    async def compare(self, mirror: WatchedMirror) -> None:
        """Without those that are no legs any more."""
        for node in self.nodes.values():
            local = self.local_of(node.name)
            if local is not None and not mirror.membership.has(local.me):
                await node.kill(power=False)
        await super().compare(mirror)


WORLDS: Final[dict[str, type[Life]]] = {
    "life": Life,
    "promises": Promises,
    "durability": Durability,
    "sizes": Sizes,
    "anew": Anew,
}
"""By their names, as `--world` takes them."""
