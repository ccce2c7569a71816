"""Who follows the changes of volumes: it sets records and trackers, empties these, and knows what must be in them.

The promise: a record and the trackers that were given with it are there together, the last ones whose call returned or
those of a call that was under way. And a tracker has at least what is other now than when it was emptied. What a block
held then is remembered; where it was being written at that moment, nothing is demanded of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio
import xxhash

from tests.simulation.oracle import BLOCK, Model, Op, OracleError
from tiers import Pool, TierError, Volume
from tiers.changes import EXTENT_BYTES, ChangedExtents

if TYPE_CHECKING:
    from tests.simulation.workload import Driver

EXTENT_BLOCKS = EXTENT_BYTES // BLOCK
_hash = xxhash.xxh3_64_intdigest
_ZEROS = _hash(bytes(BLOCK))


def _hashes(content: bytes | bytearray) -> list[int]:
    view = bytes(content)
    return [_hash(view[at : at + BLOCK].ljust(BLOCK, b"\0")) for at in range(0, len(view), BLOCK)]


@dataclass
class Base:
    """What a tracker need not have."""

    allowed: list[set[int]]
    """Hashes of what a block held when it was emptied, by block."""
    unknown: set[int] = field(default_factory=set)
    """Blocks of which nothing is demanded."""
    given: set[int] = field(default_factory=set)
    """Extents that were in it when it was given."""


@dataclass
class Given:
    """A record, and its trackers."""

    record: bytes
    bases: dict[str, Base]


class Follower:
    """The trackers of a driver's volumes, as who owns them knows them; and a task that changes them."""

    def __init__(self, driver: Driver, seed: int) -> None:
        self.driver = driver
        self.rng = random.Random(seed ^ 0xF0110)
        self.given: dict[str, list[Given]] = {}
        """By volume: the one that is durable, and those that may be."""
        self.count = 0
        self.found_changes = 0
        """Extents that had to be in a tracker after an open."""

    # -- judging -------------------------------------------------------------------------------------------------------

    def judge(self, pool: Pool) -> None:
        """After an open, when the models say what is there."""
        for name, model in self.driver.models.items():
            volume = pool.volume(name)
            known = self.given.get(name, [Given(b"", {})])
            found = next((one for one in known if one.record == volume.mirror_record), None)
            if found is None:
                raise OracleError(f"{name}: the record {volume.mirror_record!r}, expected {[g.record for g in known]}")
            if found.bases.keys() != volume.trackers.keys():
                raise OracleError(f"{name}: {found.record!r} has trackers {[*volume.trackers]}, not {[*found.bases]}")
            self.given[name] = [found]
            self.found_changes += self._require(name, volume, model, found, exact=True)

    def _require(self, name: str, volume: Volume, model: Model, given: Given, *, exact: bool) -> int:
        """Raise OracleError if a tracker lacks something; return how many extents had to be there."""
        now = _hashes(model.content)
        skip = set() if exact else _blocks_of(model.in_flight, model)
        demanded = 0
        for tracker_name, base in given.bases.items():
            there = {
                extent
                for offset, length in volume.trackers[tracker_name].runs()
                for extent in range(offset // EXTENT_BYTES, (offset + length) // EXTENT_BYTES)
            }
            changed = {
                block // EXTENT_BLOCKS
                for block in range(max(len(now), len(base.allowed)))
                if block not in base.unknown
                and block not in skip
                and (now[block] if block < len(now) else _ZEROS)
                not in (base.allowed[block] if block < len(base.allowed) else {_ZEROS})
            }
            demanded += len(changed)
            if not changed | base.given <= there:
                raise OracleError(
                    f"{name}: tracker {tracker_name!r} of {given.record!r} has {sorted(there)}, and lacks "
                    f"{sorted((changed | base.given) - there)}"
                )
        return demanded

    # -- load ----------------------------------------------------------------------------------------------------------

    async def run(self, pool: Pool) -> None:
        """Set, empty and look at trackers, as long as there is load."""
        rng = self.rng
        while True:
            await trio.sleep(rng.random() * rng.choice((0, 0.01, 0.05)))
            if rng.random() < 0.3:  # what is set while a checkpoint is under way is the next one's
                with trio.move_on_after(0.2):
                    while pool._checkpointer._frozen is None:
                        await trio.sleep(0.0002)
            name = rng.choice([name for name in self.driver.models if not name.startswith("x")])
            volume, model = pool.volume(name), self.driver.models[name]
            given = self.given.setdefault(name, [Given(b"", {})])[-1]
            if not given.bases or rng.random() < 0.4:
                await self._set(pool, name, volume, model)
                continue
            tracker_name = rng.choice([*given.bases])
            self._require(name, volume, model, given, exact=False)
            if rng.random() < 0.5:
                self._empty(volume.trackers[tracker_name], given.bases[tracker_name], model)

    async def _set(self, pool: Pool, name: str, volume: Volume, model: Model) -> None:
        rng = self.rng
        self.count += 1
        names = rng.sample(("recent", "recent-old", "missing:b", "missing:c"), rng.randrange(4))
        given = Given(f"record {self.count}".encode(), {})
        trackers: dict[str, ChangedExtents] = {}
        before = self.given[name][-1]
        now, unknown = _hashes(model.content), _blocks_of(model.in_flight, model)
        for tracker_name in names:
            old = before.bases.get(tracker_name)
            if old is not None and rng.random() < 0.3:  # goes on
                trackers[tracker_name] = volume.trackers[tracker_name].copy()
                given.bases[tracker_name] = Base([set(one) for one in old.allowed], set(old.unknown), set(old.given))
                continue
            base = given.bases[tracker_name] = Base([{one} for one in now], set(unknown))
            tracker = trackers[tracker_name] = ChangedExtents()
            if rng.random() < 0.5:
                offset = rng.randrange(len(model.content))
                length = rng.randrange(1, 4 * EXTENT_BYTES)
                tracker.add(offset, length)
                base.given = set(range(offset // EXTENT_BYTES, (offset + length - 1) // EXTENT_BYTES + 1))
        keeps = not trackers and rng.random() < 0.5
        if keeps:
            given.bases = before.bases
        mark = model.mark
        self.given[name].append(given)
        try:
            await pool.set_mirror(volume, given.record, None if keeps else trackers)
        except TierError:
            if self.driver.machine.is_off or not self.driver.may_be_full:
                raise
            self.driver.full_errors += 1
            return
        self.given[name] = [given]
        model.flushed(mark)

    def _empty(self, tracker: ChangedExtents, base: Base, model: Model) -> None:
        """Take extents out. What they hold, or may hold after a crash that comes before this is saved, is known."""
        size = -(-len(model.content) // EXTENT_BYTES) * EXTENT_BYTES
        first, end = sorted(self.rng.randrange(size // EXTENT_BYTES + 1) for _ in range(2))
        if self.rng.random() < 0.3:
            first, end = 0, max(size // EXTENT_BYTES, -(-len(base.allowed) // EXTENT_BLOCKS))
            tracker.clear()
            base.given.clear()
        else:
            tracker.discard(first * EXTENT_BYTES, (end - first) * EXTENT_BYTES)
            base.given -= set(range(first, end))
        states = [bytearray(model.floor)]
        for op in model.ops:
            states.append(bytearray(states[-1]))
            op.apply(states[-1])
        hashes = [_hashes(state) for state in states]
        unknown = _blocks_of(model.in_flight, model) | _blocks_of(model.in_doubt, model)
        base.allowed += [{_ZEROS} for _ in range(end * EXTENT_BLOCKS - len(base.allowed))]
        for block in range(first * EXTENT_BLOCKS, end * EXTENT_BLOCKS):
            base.allowed[block] = {known[block] if block < len(known) else _ZEROS for known in hashes}
            base.unknown.discard(block)
            if block in unknown:
                base.unknown.add(block)


def _blocks_of(op: Op | None, model: Model) -> set[int]:
    """Which blocks an operation that has not returned may have changed by now."""
    if op is None:
        return set()
    if op.size is not None:
        return set(range(max(op.size, len(model.content)) // BLOCK + 1))
    ranges: Iterable[tuple[int, int]] = ((offset, len(data)) for offset, data in [*op.changes, *op.attempted])
    return {block for offset, length in ranges for block in range(offset // BLOCK, -(-(offset + length) // BLOCK))}
