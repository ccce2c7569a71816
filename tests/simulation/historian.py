"""The historian of the search: takes, deletes, clones and rolls back at random, while clients write; and what it knows.

What a snapshot holds is what its volume's model held at the freeze of the checkpoint that took it, for all snapshots of
a group at the same one. Only the operation that was in flight at that instant may be there in part, by blocks: the
first read settles it, and from then on each byte is as it was, for ever, whatever crashes and is deleted around it.

A change of structure is there after a crash or isn't, never in part (`Change`). If it is, all that had been
acknowledged before its freeze is durable, in every volume.
"""

from __future__ import annotations

import copy
import errno
import random
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from tests.simulation.oracle import BLOCK, LOST, Model, Op, OracleError, lost_blocks, read_what_can_be
from tiers import Pool, TierError
from tiers.snapshot import DIFF_CONTEXT, Snapshot

if TYPE_CHECKING:
    from tests.simulation.workload import Driver

MOST_SNAPSHOTS = 9
MOST_CLONES = 3

Key = tuple[str, str]
"""(volume, snapshot)"""


class Version:
    """What a snapshot holds."""

    def __init__(self, content: bytes | bytearray) -> None:
        self.content = bytearray(content)
        self.others: dict[int, list[bytes]] = {}
        """What else a block may hold, until it has been read."""

    @staticmethod
    def of(model: Model, size: int) -> Version:
        """What a snapshot of this size holds that is taken now."""
        version = Version(model.content)
        op = model.in_flight
        if size != len(version.content):
            if op is None or op.size != size:
                raise OracleError(f"a snapshot of {len(version.content)} bytes has {size}")
            op.apply(version.content)
        elif op is not None and op.size is None:
            state = bytearray(version.content)
            for change in op.changes:
                Op("", [change]).apply(state)
                offset, data = change
                for at in range(offset // BLOCK * BLOCK, offset + len(data), BLOCK):
                    version.others.setdefault(at // BLOCK, []).append(bytes(state[at : at + BLOCK]))
        return version

    def may_be_lost(self, offset: int, length: int) -> bool:
        """Whether a block is or may be lost that a range touches."""
        blocks = range(offset // BLOCK, -(-(offset + length) // BLOCK))
        return bool(lost_blocks(self.content, offset, length)) or any(
            LOST[: len(other)] == other for block in blocks for other in self.others.get(block, ())
        )

    def judge(self, found: bytes | bytearray, *, offset: int = 0, unreadable: Collection[int] = ()) -> None:
        """These bytes, from a block's beginning on, were read. Raises OracleError unless they are what it holds."""
        if not self.others and not unreadable and found == self.content[offset : offset + len(found)]:
            return
        for at in range(offset, offset + len(found), BLOCK):
            block = at // BLOCK
            if block in unreadable:
                continue
            there, known = found[at - offset : at - offset + BLOCK], self.content[at : at + BLOCK]
            if len(there) < len(known):
                known = known[: len(there)]
            elif there != known and there in self.others.get(block, ()):
                self.content[at : at + BLOCK] = known = bytearray(there)
            if there != known:
                raise OracleError(f"block {block} isn't what it was at the freeze")
            if len(there) == len(self.content[at : at + BLOCK]):
                self.others.pop(block, None)


@dataclass
class Change:
    """A change of structure that is under way: it has happened, or hasn't."""

    what: str
    removed: list[Key] = field(default_factory=list)
    taken: list[Key] = field(default_factory=list)
    """Snapshots that are taken; `added` has what they hold, from the freeze on."""
    added: dict[Key, Version] = field(default_factory=dict)
    made: dict[str, Model] = field(default_factory=dict)
    """Volumes that are new, or others under the same name."""
    gone: str | None = None
    """The volume that goes."""
    marks: list[tuple[Model, int]] | None = None
    """What had been acknowledged at the freeze; None before it."""


class Historian:
    """The snapshots of a driver's volumes, as their user knows them; and a task that changes them."""

    def __init__(self, driver: Driver, seed: int) -> None:
        self.driver = driver
        self.rng = random.Random(seed ^ 0x4157)
        self.versions: dict[str, dict[str, Version]] = {}
        """By volume, then by snapshot."""
        self.change: Change | None = None
        self.done: dict[str, int] = {}
        """How often what was done."""
        self.busy: set[str] = set()
        """Volumes that clients write to."""
        self._pool: Pool | None = None
        self._seen: object = None
        self._names = 0
        driver.machine.on_hit["checkpoint.frozen"] = self._at_freeze

    def saved(self) -> tuple[dict[str, dict[str, Version]], Change | None]:
        """What a crash may take back."""
        return self.versions, self.change

    def restore(self, saved: tuple[dict[str, dict[str, Version]], Change | None]) -> None:
        """Take back what was seen since `saved`."""
        self.versions, self.change = saved

    def keys(self) -> list[Key]:
        """All snapshots."""
        return [(name, snap) for name, snaps in sorted(self.versions.items()) for snap in sorted(snaps)]

    # -- at a freeze, and at the commit --------------------------------------------------------------------------------

    def _at_freeze(self) -> None:
        """In the step of the freeze: the models are what is frozen. A retry freezes nothing."""
        pool, change = self._pool, self.change
        if pool is None:
            return
        frozen = pool._checkpointer._frozen
        if frozen is None or frozen is self._seen:
            return
        self._seen = frozen
        if change is None or change.marks is not None or not frozen.requests:
            return
        models = self.driver.models
        change.marks = [(model, model.mark) for model in models.values()]
        sizes = {(s.volume.short_name, s.short_name): s.size_bytes for s in frozen.taken}
        if sorted(sizes) != sorted(change.taken):
            raise OracleError(f"{change.what} took {sorted(sizes)}")
        for key in change.taken:
            change.added[key] = Version.of(models[key[0]], sizes[key])

    def _happened(self, *, durable: bool = True) -> None:
        """The change is true."""
        change, self.change = self.change, None
        assert change is not None
        for model, mark in change.marks or () if durable else ():
            model.flushed(mark)
        for name, snap in change.removed:
            del self.versions[name][snap]
        for (name, snap), version in change.added.items():
            self.versions.setdefault(name, {})[snap] = version
        if change.gone is not None:
            self.versions.pop(change.gone, None)
            del self.driver.models[change.gone]
        self.driver.models.update(change.made)
        kind = change.what.split()[0]
        self.done[kind] = self.done.get(kind, 0) + 1

    # -- after a crash -------------------------------------------------------------------------------------------------

    async def resolve(self, pool: Pool) -> None:
        """Find out whether what was under way has happened. Raises OracleError if it has in part."""
        self._pool = None
        change = self.change
        if change is None:
            return
        volumes = {volume.short_name for volume in pool.volumes()}
        there = {(s.name.partition("@")[0].partition("/")[2], s.short_name) for s in pool.snapshots()}
        before = set(self.keys())
        after = before - {*change.removed} | {*change.taken, *change.added}
        if change.gone is not None:
            after = {key for key in after if key[0] != change.gone}
        new = [name for name in change.made if name not in self.driver.models]
        is_before = there == before and not volumes & {*new} and (change.gone is None or change.gone in volumes)
        is_after = there == after and volumes >= {*change.made} and change.gone not in volumes
        if change.marks is None and not change.gone:
            is_after = False
        if is_before and is_after and change.made:
            is_before, is_after = await self._told_by_content(pool, change)
        if not is_before and not is_after:
            raise OracleError(
                f"{change.what}: snapshots {sorted(there)} of {sorted(volumes)}; before {sorted(before)}, "
                f"after {sorted(after)}"
            )
        if is_after:
            self._happened(durable=not is_before)
        else:
            self.change = None

    async def _told_by_content(self, pool: Pool, change: Change) -> tuple[bool, bool]:
        """A rollback that keeps nothing has left nothing but the content, and a volume that counts as complete."""
        ((name, new),) = change.made.items()
        volume = pool.volume(name)
        found, unreadable = await read_what_can_be(volume)
        answers = []
        for model in (self.driver.models[name], new):
            try:
                copy.deepcopy(model).judge(
                    found,
                    everything=self.driver.everything,
                    unreadable=unreadable if self.driver.reads_may_fail else (),
                    policy=volume.policy_name,
                    filling=volume.filling,
                )
            except OracleError:
                answers.append(False)
            else:
                answers.append(True)
        return answers[0], answers[1]

    async def judge(self, pool: Pool) -> None:
        """Every version is there and reads as it was, and no other is."""
        there = {(s.name.partition("@")[0].partition("/")[2], s.short_name) for s in pool.snapshots()}
        if there != set(self.keys()):
            raise OracleError(f"snapshots {sorted(there)}, expected {self.keys()}")
        for name, snap in self.keys():
            await self._read_all(pool.snapshot(name, snap), self.versions[name][snap])

    async def _read_all(self, snapshot: Snapshot, version: Version) -> None:
        if snapshot.size_bytes != len(version.content):
            raise OracleError(f"{snapshot.name} has {snapshot.size_bytes} bytes, expected {len(version.content)}")
        found, unreadable = await read_what_can_be(snapshot)
        if unreadable and not (self.driver.reads_may_fail or self.driver.loses):
            raise OracleError(f"{snapshot.name}: {sorted(unreadable)[:8]} can't be read, and no read ever failed")
        try:
            version.judge(found, unreadable=unreadable if self.driver.reads_may_fail else ())
        except OracleError as error:
            raise OracleError(f"{snapshot.name}: {error}; unreadable: {sorted(unreadable)[:8]}") from None

    # -- load ----------------------------------------------------------------------------------------------------------

    def begin(self, pool: Pool) -> list[str]:
        """A life's load begins; returns the volumes that clients write to in it. The others are the historian's own."""
        self._pool = pool
        share = {"v": 0.8, "h": 0.4, "x": 0.0}
        clients = [name for name in sorted(self.driver.models) if self.rng.random() < share[name[0]]]
        self.busy = {*clients}
        return clients

    async def run(self, pool: Pool) -> None:
        """Change something now and then."""
        rng = self.rng
        for _ in range(rng.randrange(6, 20)):
            await trio.sleep(rng.random() * rng.choice((0, 0.01, 0.03)))
            kinds = {
                "take": 5 if len(self.keys()) < MOST_SNAPSHOTS else 0,
                "group": 2 if len(self.keys()) < MOST_SNAPSHOTS - 2 else 0,
                "drop": 5,
                "rename": 1,
                "clone": 3 if len(self._clones()) < MOST_CLONES else 0,
                "write": 4,
                "rollback": 4,
                "promote": 1,
                "remove": 2,
                "compare": 2,
            }
            kind = rng.choices(list(kinds), list(kinds.values()))[0]
            await getattr(self, f"_{kind}")(pool)
            if self.change is not None:
                return

    async def read(self, pool: Pool) -> None:
        """Read snapshots, and hold them open meanwhile."""
        rng = self.rng
        while True:
            await trio.sleep(rng.random() * 0.02)
            keys = [key for key in self.keys() if self.change is None or not self._concerns(self.change, key)]
            if not keys:
                continue
            name, snap = rng.choice(keys)
            version, snapshot = self.versions[name][snap], pool.snapshot(name, snap)
            snapshot.acquire()
            try:
                await self._read_part(snapshot, version)
            finally:
                snapshot.release()

    @staticmethod
    def _concerns(change: Change, key: Key) -> bool:
        return key in change.removed or key[0] == change.gone or key[0] in change.made

    async def _read_part(self, snapshot: Snapshot, version: Version) -> None:
        rng = self.rng
        size = len(version.content)
        offset = rng.randrange(size) // BLOCK * BLOCK
        length = min(rng.choice((BLOCK, 8 * BLOCK, 40 * BLOCK, size)), size - offset)
        into = bytearray(length)
        try:
            if rng.random() < 0.5 or not snapshot.read_now(offset, length, memoryview(into)):
                await snapshot.read(offset, length, memoryview(into))
        except TierError:
            if self.driver.machine.is_off or not (self.driver.reads_may_fail or version.may_be_lost(offset, length)):
                raise
            self.driver.read_errors += 1
            return
        try:
            version.judge(into, offset=offset)
        except OracleError as error:
            raise OracleError(f"{snapshot.name}: {error}") from None

    def _name(self, prefix: str) -> str:
        self._names += 1
        return f"{prefix}{self._names}"

    def _clones(self) -> list[str]:
        return [name for name in sorted(self.driver.models) if name.startswith("h")]

    def _idle(self) -> list[str]:
        """Volumes that nobody else writes to or changes."""
        names = [name for name in sorted(self.driver.models) if not name.startswith("x")]
        return [name for name in names if name not in self.busy]

    def _any(self) -> Key | None:
        keys = self.keys()
        return self.rng.choice(keys) if keys else None

    async def _do(self, change: Change, act: Callable[[], Awaitable[object]]) -> bool:
        """Make a change; whether it has happened. Where that isn't known yet, `self.change` stays."""
        driver = self.driver
        self.change = change
        try:
            await act()
        except TierError as error:
            if driver.machine.is_off:
                raise
            if not (driver.faults or driver.may_be_full or error.errno == errno.EBUSY):
                raise
            driver.full_errors += 1
            if change.marks is None:
                self.change = None  # it was not begun
            else:
                await self._wait_for_commit(self._seen)
            return False
        self._happened()
        return True

    async def _wait_for_commit(self, frozen: object) -> None:
        """A checkpoint failed: what was frozen comes true with the next one, or when the pool has been opened again."""
        assert self._pool is not None
        for _ in range(100):
            if self._pool._checkpointer._frozen is not frozen:
                self._happened()
                return
            await trio.sleep(0.1)

    async def _settled(self, pool: Pool, key: Key) -> Version | None:
        """What a snapshot holds, exactly; None if that can't be told, since it can't be read."""
        name, snap = key
        version = self.versions[name][snap]
        await self._read_all(pool.snapshot(name, snap), version)
        return None if version.others else version

    async def _take(self, pool: Pool) -> None:
        names = [name for name in sorted(self.driver.models) if not name.startswith("x")]
        if not names:
            return  # a device's fault has kept them from being made
        key = self.rng.choice(names), self._name("s")
        await self._do(Change(f"take {key}", taken=[key]), lambda: pool.take_snapshots([key], by_filler=True))

    async def _group(self, pool: Pool) -> None:
        snap = self._name("g")
        keys = [(name, snap) for name in sorted(self.driver.models) if not name.startswith("x")]
        if not keys:
            return
        await self._do(Change(f"group {keys}", taken=keys), lambda: pool.take_snapshots(keys, by_filler=True))

    async def _drop(self, pool: Pool) -> None:
        key = self._any()
        if key is not None:
            await self._do(Change(f"drop {key}", removed=[key]), lambda: pool.delete_snapshot(*key))

    async def _rename(self, pool: Pool) -> None:
        key = self._any()
        if key is not None:
            name, snap = key
            new = self._name("r")
            change = Change(f"rename {key}", removed=[key], added={(name, new): self.versions[name][snap]})
            change.taken = []
            await self._do(change, lambda: pool.change_snapshot(name, snap, new_name=new))

    async def _clone(self, pool: Pool) -> None:
        key = self._any()
        version = None if key is None else await self._settled(pool, key)
        if key is not None and version is not None:
            new = self._name("h")
            change = Change(f"clone {key} as {new}", made={new: Model.holding(version.content)})
            if await self._do(change, lambda: pool.clone(*key, new)):
                await self._read_some(pool, new)

    async def _write(self, pool: Pool) -> None:
        names = self._idle()
        if names:
            await self.driver._client(pool, self.rng.choice(names), self.rng.randrange(1, 8))

    async def _rollback(self, pool: Pool) -> None:
        idle = self._idle()
        keys = [key for key in self.keys() if key[0] in idle]
        key = self.rng.choice(keys) if keys else None
        version = None if key is None else await self._settled(pool, key)
        if key is not None and version is not None:
            name, snap = key
            policy = self.driver.models[name].policy
            keep = self._name("k") if self.rng.random() < 0.5 else None
            if self.driver.models[name].filling:
                keep = None  # which would be refused
            change = Change(f"rollback {key}, keep as {keep}", made={name: Model.holding(version.content, policy)})
            change.taken = [] if keep is None else [(name, keep)]
            if await self._do(change, lambda: pool.rollback(name, snap, keep_as=keep)):
                await self._read_some(pool, name)

    async def _read_some(self, pool: Pool, name: str) -> None:
        model = self.driver.models[name]
        await self.driver.compare(pool.volume(name), model, *self.driver._range(len(model.content)))

    async def _promote(self, pool: Pool) -> None:
        clones = [v for v in pool.volumes() if v.origin is not None and not v.snapshots and v.taking is None]
        if clones:
            volume = self.rng.choice(clones)
            with self.driver._refusals():
                await pool.promote(volume.short_name)
                if volume.origin is not None:
                    raise OracleError(f"{volume.name} was promoted and has an origin")
                self.done["promote"] = self.done.get("promote", 0) + 1

    async def _remove(self, pool: Pool) -> None:
        names = [name for name in self._idle() if name.startswith("h")]
        if not names:
            return
        name = self.rng.choice(names)
        volume = pool.volume(name)
        if not self.versions.get(name) and not volume.has_history:
            self.versions.pop(name, None)
            await self.driver._delete(pool, name)
            return
        change = Change(f"remove {name}", gone=name)
        await self._do(change, lambda: pool.delete_volume(name, snapshots=True))

    async def _compare(self, pool: Pool) -> None:
        """What has changed between two snapshots of a volume is told."""
        names = [name for name, snaps in sorted(self.versions.items()) if len(snaps) > 1]
        if not names:
            return
        name = self.rng.choice(names)
        old, new = self.rng.sample(sorted(self.versions[name]), 2)
        snapshot = pool.snapshot(name, new)
        try:
            extents = await snapshot.context_extents(DIFF_CONTEXT + old, 0, snapshot.size_bytes, 1 << 20)
        except TierError:
            if self.driver.machine.is_off or not self.driver.reads_may_fail:
                raise
            return
        before, after = self.versions[name][old], self.versions[name][new]
        for start, end in _unchanged(extents):
            for at in range(start, end, BLOCK):
                block = at // BLOCK
                if block not in before.others and block not in after.others:
                    was = before.content[at : at + BLOCK].ljust(BLOCK, b"\0")
                    if after.content[at : at + BLOCK].ljust(BLOCK, b"\0") != was:
                        raise OracleError(f"{snapshot.name}: block {block} has changed since {old}, and it isn't told")


def _unchanged(extents: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    at = 0
    for length, changed in extents:
        if not changed:
            yield at, at + length
        at += length
