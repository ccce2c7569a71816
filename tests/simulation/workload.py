"""What a seed decides, and the driver that lives it: clients, flushes, crashes, and after each the oracle.

Snapshots and clones are the business of `tests.simulation.historian`, which works beside the clients.

`search(seed)` is one run: a small machine and the faults that its devices have are drawn from the seed, then it goes
through several lives. A life opens the pool, judges what is there, puts load on it, and ends cleanly or by a crash:
at an operation of a device, at any step of any task, or at a failpoint, in the recovery just as well as under load.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trio

from tests.simulation.failpoints import failpoint_names
from tests.simulation.faults import Faults, Injector
from tests.simulation.follower import Follower
from tests.simulation.historian import Historian
from tests.simulation.machine import SEGMENT_BYTES, Disk, Machine, PowerCutError
from tests.simulation.oracle import (
    BLOCK,
    LOST,
    LOST_PROBLEM,
    Changes,
    Model,
    Op,
    OracleError,
    lost_blocks,
    read_what_can_be,
    require_sound,
)
from tiers import DeviceSpec, Policy, Pool, PoolSettings, TierError, Volume
from tiers.label import Tier
from tiers.layout import FIRST_ADDRESS, INHERITED, LABEL_AREA_BYTES, SLOT_BITS
from tiers.maptree import FANOUT_BITS, FANOUT_MASK, ROOT_LEVEL, MapTree
from tiers.policy import DEFAULT
from tiers.snapshot import Snapshot

LIFE_S = 3600.0
"""A life that takes longer, by its own clock, hangs."""

Crash = tuple[int | None, int | None, tuple[str, int] | None]
"""What `Machine.arm` takes."""
NO_CRASH: Crash = (None, None, None)


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("a", promote_touches=1, demote_heat=0, demote_idle_s=0, stream_cutoff_bytes=64 << 10),
        Policy("another-one", placement="base", stream_cutoff_bytes=BLOCK),
        Policy("x" * 64, placement="fast", compression_level=0),
        Policy("slow", iops_limit=500, bandwidth_limit_bytes=4 << 20),
        Policy("patient", when_full="queue", queue_timeout_s=0.3),
    )
}
"""Whatever moves blocks, or makes requests wait, is at work on some volume."""


class Driver:
    """A machine, the volumes on it, and a model of each. `life` is one open, some load, and an end."""

    def __init__(
        self, machine: Machine, *, volumes: int = 2, volume_bytes: int = 1 << 20, faults: Faults | None = None
    ) -> None:
        self.machine = machine
        self.rng = random.Random(machine.seed ^ 0x5EED)
        self.faults = faults or Faults()
        self.injector = Injector(machine, self.faults, random.Random(machine.seed ^ 0xFA17))
        self.models: dict[str, Model] = {}
        self.uncertain: dict[str, Model | None] = {}
        """Volumes whose creation or deletion was in flight: the model to use if they exist."""
        self.volume_count = volumes
        self.volume_bytes = volume_bytes
        self.everything = True
        self.counter = 0
        self.full_errors = 0
        """Operations that were refused."""
        self.read_errors = 0
        self.cycles = 0
        """Crashes that were recovered from."""
        self.crashed_at: Counter[str] = Counter()
        """How often the machine went down at which failpoint."""
        self.poisoned = False
        self.may_be_full = False
        self.devices_change = False
        """Devices come and go, in good order and otherwise."""
        self.devices_lost = 0
        self.loses = False
        """Clients give blocks up."""
        self.found_lost = 0
        """Blocks of volumes that were found lost after an open, as they had to be."""
        self.evacuated = 0
        self._device_count = len(machine.media)
        self._crashed = False
        self.historian: Historian | None = None
        """Takes snapshots and what comes of them, where the profile has it."""
        self.follower: Follower | None = None
        """Follows what clients change, where the profile has it."""
        self._before: tuple[Any, ...] | None = None
        """What was known before a pool was judged that could be opened for reading only."""
        machine.on_medium = self.injector.infect

    # -- checking ------------------------------------------------------------------------------------------------------

    async def judge(self, pool: Pool) -> None:
        """After an open: what is there must be allowed."""
        self._look_for_losses()  # a sync that the recovery began with may have failed
        if pool.status().state != "online":
            # Recovery made nothing durable: what is seen now may be less after a power cut.
            kept = None if self.historian is None else self.historian.saved()
            self._before = self._before or copy.deepcopy((self.models, self.uncertain, kept))
        names = {volume.short_name for volume in pool.volumes()}
        for name, model in self.uncertain.items():
            if name in names and model is not None:
                self.models[name] = model
            else:
                self.models.pop(name, None)
        self.uncertain.clear()
        if self.historian is not None:
            await self.historian.resolve(pool)
        if names != set(self.models):
            raise OracleError(f"volumes {sorted(names)}, expected {sorted(self.models)}")
        self._require_remembered_poison(pool)
        for name, model in self.models.items():
            found, unreadable = await read_what_can_be(pool.volume(name))
            if unreadable and not (self.reads_may_fail or self.loses):
                raise OracleError(f"{name}: blocks {sorted(unreadable)[:8]} can't be read, and no read ever failed")
            try:
                volume = pool.volume(name)
                model.judge(
                    found,
                    everything=self.everything,
                    unreadable=unreadable if self.reads_may_fail else (),
                    policy=volume.policy_name,
                    filling=volume.filling,
                )
            except OracleError as error:
                raise OracleError(f"{name}: {error}; unreadable: {sorted(unreadable)[:8]}") from None
            self.found_lost += len(lost_blocks(model.content)) if self.loses else 0
        if self.historian is not None:
            await self.historian.judge(pool)
        if self.follower is not None:
            self.follower.judge(pool)
        await require_sound(pool, known=self._known_problems())
        if self.loses and not self.reads_may_fail and pool.status().state == "online":
            await self._judge_list(pool)
        if self._crashed:
            self.cycles += 1
            self._crashed = False

    async def _judge_list(self, pool: Pool) -> None:
        """What was given up is on the list of what is lost, and nothing else is; a check has just made that."""
        listed = await self._listed(pool)
        for reader in self._readers(pool):
            lost = lost_blocks(self._content_of(reader))
            own = listed.get(reader.name, set())
            seen = set().union(*(listed.get(one.name, set()) for one in _line_of(reader)))
            # Past the end of a volume nothing is listed, though others look through its map there as well.
            end = min(one.size_bytes for one in _line_of(reader)) // BLOCK
            if not own <= lost or not {block for block in lost if block < end} <= seen:
                raise OracleError(f"{reader.name}: listed as lost {sorted(own)[:9]}, given up {sorted(lost)[:9]}")

    @staticmethod
    async def _listed(pool: Pool) -> dict[str, set[int]]:
        listed: dict[str, set[int]] = {}
        for loss in await pool.losses():
            blocks = {at // BLOCK for at in range(loss.offset, loss.offset + loss.length, BLOCK)}
            listed.setdefault(loss.volume, set()).update(blocks)
        return listed

    def _content_of(self, reader: Volume | Snapshot) -> bytes | bytearray:
        """What a model knows of a volume or snapshot."""
        if isinstance(reader, Volume):
            return self.models[reader.short_name].content
        assert self.historian is not None
        return self.historian.versions[reader.name.partition("@")[0].partition("/")[2]][reader.short_name].content

    @property
    def reads_may_fail(self) -> bool:
        """Whether a block may be an error to its readers, though it was not hit just now."""
        return bool(self.faults.read_spells or self.devices_lost)

    def _known_problems(self) -> str:
        """What a check may find, given what was done to the devices."""
        known = ["(?!)"]
        if self.loses:
            known.append(LOST_PROBLEM)  # exactly which is `_judge_list`'s
        if self.devices_lost:
            known.append(LOST_PROBLEM)
            if any(row.state == "lost" for row in self.machine.state.devices):
                known.append("given up as lost|which is not in use|are counted as live|the catalog counts")
        if self.faults.read_spells:
            # A page of the dead list that can't be read is given up, with what lies below it.
            known.append(f"{LOST_PROBLEM}|are counted as live|the catalog counts")
        if self.poisoned:
            known.append(" is poisoned: ")
        return "|".join(known)

    def _require_remembered_poison(self, pool: Pool) -> None:
        """A failed sync is for good: a device that was recorded as poisoned stays so, and the pool read-only."""
        recorded = [
            row.path for row in self.machine.state.devices if row.poisoned and row.state in ("online", "evacuating")
        ]
        self.poisoned = self.poisoned or bool(recorded)
        status = pool.status()
        if recorded and (status.state == "online" or not any(d.state == "poisoned" for d in status.devices)):
            raise OracleError(f"{recorded} failed a sync, and the pool takes writes again")

    # -- load ----------------------------------------------------------------------------------------------------------

    def _bytes(self, length: int) -> bytes:
        self.counter += 1
        if self.counter % 3 == 0:  # some of it can't be compressed
            return random.Random(self.counter).randbytes(length)
        stamp = self.counter.to_bytes(8, "little")
        return (stamp * (length // 8 + 1))[:length]

    def _range(self, size: int) -> tuple[int, int]:
        rng = self.rng
        if rng.random() < 0.5:  # a hot fifth, so that segments become empty at different rates
            size = max(BLOCK, size // 5)
        length = rng.choice((512, 1000, BLOCK, BLOCK, 2 * BLOCK, 3 * BLOCK + 5, 8 * BLOCK, 16 * BLOCK, 40 * BLOCK))
        offset = rng.randrange(size)
        if rng.random() < 0.7:
            offset &= ~(BLOCK - 1)
        return offset, max(1, min(length, size - offset))

    async def _operation(self, pool: Pool, name: str, model: Model) -> None:
        """One operation on a volume; the model learns of it in the same breath."""
        rng = self.rng
        volume = pool.volume(name)
        size = len(model.content)
        if rng.random() < 0.03:
            await (self._change_mark if self.counter % 2 else self._change_policy)(pool, name, model)
            return
        kinds = {
            "now": 20, "batch": 15, "write": 25, "zero": 3, "zeroes": 6, "no_hole": 3, "trim": 8, "flush": 8, "read": 8,
            "resize": 1,
        }  # fmt: skip
        if self.loses:
            kinds["lose"] = 12
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        if kind == "flush":
            mark = model.mark
            with self._refusals():
                await volume.flush()
                model.flushed(mark)
            return
        if kind == "read":
            await self.compare(volume, model, *self._range(size))
            return
        op = Op(kind)
        if kind == "resize":
            op.size = max(BLOCK, min(2 * self.volume_bytes, size + rng.randrange(-size // 2, size // 2) // 512 * 512))
            op.what = f"resize to {op.size}"
        elif kind in ("now", "batch"):
            for _ in range(1 if kind == "now" else rng.randrange(2, 6)):
                offset, length = self._range(size)
                op.changes.append((offset, self._bytes(length)))
        else:
            offset, length = self._range(size)
            if kind in ("trim", "zeroes") and rng.random() < 0.15:
                offset, length = rng.choice(((0, size), (0, size // 2 or 1), (offset, size - offset)))
            data = self._bytes(length) if kind == "write" else bytes(length)
            if kind == "lose":
                offset &= ~(BLOCK - 1)
                length = -(-length // BLOCK) * BLOCK
                op.changes = [(offset, (LOST * (length // BLOCK))[: size - offset])]
            elif kind == "trim":
                start, end = -(-offset // BLOCK) * BLOCK, offset + length
                end = end if end == size else end // BLOCK * BLOCK
                op.changes = [(start, bytes(max(0, end - start)))]
            else:
                op.changes = [(offset, data)]
        if op.size is None:
            op.what = f"{kind} {[(o, len(d)) for o, d in op.changes]}"
        model.in_flight = op
        try:
            if kind in ("now", "batch"):
                if not volume.write_now(op.changes):
                    model.in_flight = None
                    for offset, data in op.changes:
                        one = model.in_flight = Op(f"write of a batch {offset}+{len(data)}", [(offset, data)])
                        await volume.write(offset, data)
                        model.in_flight = None
                        model.returned(one)
                    return
            elif kind in ("write", "zero"):
                await volume.write(offset, data)
            elif kind in ("zeroes", "no_hole"):
                await volume.write_zeroes(offset, length, no_hole=kind == "no_hole")
            elif kind == "trim":
                await volume.trim(offset, length)
            elif kind == "lose":
                await volume.lose(offset, length)
            else:
                mark = model.mark
                await pool.resize_volume(name, op.size or 0, mirrored=self.follower is not None)
                model.in_flight = None
                model.returned(op)
                model.flushed(mark + 1)
                return
        except TierError:
            if self.machine.is_off:
                raise
            self.full_errors += 1
            failed = model.in_flight
            assert failed is not None
            with self.injector.calm():  # still in flight: a crash may leave any part of it
                await self._after_failure(volume, model, failed)
            model.in_flight = None
            return
        model.in_flight = None
        model.returned(op)

    async def _change_policy(self, pool: Pool, name: str, model: Model) -> None:
        """Give a volume another policy, which is durable when that returns."""
        policy = self.rng.choice(("", *POLICIES))
        op = model.in_flight = Op(f"policy {policy!r}", policy=policy)
        mark = model.mark
        try:
            volume = await pool.set_policy(name, policy)
        except TierError:
            if self.machine.is_off:
                raise
            self.full_errors += 1
            model.in_flight = None
            volume = pool.volume(name)
            if volume.policy_name != model.policy:
                if volume.policy_name != policy or not self._flush_failed(volume):
                    raise OracleError(f"a refused {op.what} left the policy {volume.policy_name!r}") from None
                model.returned(op)  # it took effect, only not durably
            else:
                model.refused(op, log_is_broken=pool._engine.log.broken)
            return
        model.in_flight = None
        model.returned(op)
        model.flushed(mark + 1)
        if volume.policy != pool._engine.policies.get(policy, DEFAULT):
            raise OracleError(f"{op.what} did not take effect")

    async def _change_mark(self, pool: Pool, name: str, model: Model) -> None:
        """Mark a volume as being filled, or as complete, which is durable when that returns."""
        filling = not model.filling
        op = model.in_flight = Op(f"filling {filling}", filling=filling)
        mark = model.mark
        try:
            volume = await pool.set_filling(name, filling)
        except TierError:
            if self.machine.is_off:
                raise
            self.full_errors += 1
            model.in_flight = None
            volume = pool.volume(name)
            if volume.filling != model.filling:
                if not self._flush_failed(volume):
                    raise OracleError(f"a refused {op.what} took effect") from None
                model.returned(op)  # only not durably
            else:
                model.refused(op, log_is_broken=pool._engine.log.broken)
            return
        model.in_flight = None
        model.returned(op)
        model.flushed(mark + 1)
        if volume.filling != filling:
            raise OracleError(f"{op.what} did not take effect")

    async def _after_failure(self, volume: Volume, model: Model, op: Op) -> None:
        """An operation was refused: it may have happened in part, by blocks, and what is there now counts."""
        if op.size is not None:
            if volume.size_bytes == op.size and self._flush_failed(volume):
                model.returned(op)  # it took effect, only not durably
                return
            if volume.size_bytes != len(model.content):
                raise OracleError(f"a refused resize changed the size to {volume.size_bytes}")
            found, unreadable = await read_what_can_be(volume)
            for at in range(0, len(found), BLOCK):
                if at // BLOCK not in unreadable and found[at : at + BLOCK] != model.content[at : at + BLOCK]:
                    raise OracleError(f"a refused {op.what} changed the content at {at}")
            model.refused(op, log_is_broken=volume._engine.log.broken)
            return
        states = [bytes(model.content)]
        for change in op.changes:
            state = bytearray(states[-1])
            Op("", [change]).apply(state)
            states.append(bytes(state))
        seen: Changes = []
        for offset, data in op.changes:
            lo, hi = offset // BLOCK * BLOCK, min(-(-(offset + len(data)) // BLOCK) * BLOCK, len(states[0]))
            for at in range(lo, hi, BLOCK):
                into = bytearray(min(BLOCK, hi - at))
                try:
                    await volume.read(at, len(into), memoryview(into))
                except TierError:
                    lost = LOST[: len(into)]
                    if all(lost != state[at : at + BLOCK] for state in states):
                        if not self.reads_may_fail:
                            raise
                        continue
                    into[:] = lost
                if all(into != state[at : at + BLOCK] for state in states):
                    raise OracleError(f"a refused {op.what} left neither old nor new bytes at {at}")
                seen.append((at, bytes(into)))
        in_doubt = model.in_doubt
        model.returned(Op(f"refused {op.what}", seen, attempted=op.changes))
        # It wasn't acknowledged, so what was in doubt is. A flush makes durable what is seen; but a record of it whose
        # place nothing could be put over stays behind the end of the log.
        model.in_doubt = in_doubt
        model.refused(op, log_is_broken=volume._engine.log.broken)

    @staticmethod
    def _flush_failed(of: Volume | Pool) -> bool:
        return of._engine.flusher.failure is not None

    async def compare(self, volume: Volume, model: Model, offset: int, length: int) -> None:
        """A read returns what was written last."""
        into = bytearray(length)
        lost = self.loses and lost_blocks(model.content, offset, length)
        try:
            if self.rng.random() < 0.5 or not volume.read_now(offset, length, memoryview(into)):
                await volume.read(offset, length, memoryview(into))
        except TierError:
            if self.machine.is_off or not (self.reads_may_fail or lost):
                raise
            self.read_errors += 1
            return
        if into != model.content[offset : offset + length]:
            bad = next(i for i in range(length) if into[i] != model.content[offset + i])
            raise OracleError(f"{volume.name}: a read at {offset + bad} returned other bytes than were written")

    async def _client(self, pool: Pool, name: str, count: int) -> None:
        for _ in range(count):
            await self._operation(pool, name, self.models[name])
            if self.rng.random() < 0.3:
                await trio.sleep(self.rng.random() * 0.01)

    async def _work(self, pool: Pool, name: str, count: int) -> None:
        """A volume's client, until it has done its work."""
        await self._client(pool, name, count)
        if self.historian is not None:
            self.historian.busy.discard(name)

    async def _flusher(self, pool: Pool) -> None:
        while True:
            await trio.sleep(self.rng.random() * 0.03)
            marks = {name: model.mark for name, model in self.models.items()}
            models = dict(self.models)
            volumes = pool.volumes()
            with self._refusals():
                if volumes:
                    await volumes[0].flush()  # one volume's covers them all
                for name, mark in marks.items():
                    models[name].flushed(mark)

    async def _nudger(self, pool: Pool) -> None:
        space = pool._engine.space
        while True:
            await trio.sleep(self.rng.random() * 0.08)
            choice = self.rng.random()
            if choice < 0.4:
                space.kick_checkpoint.set()
            elif choice < 0.8:
                space.kick_cleaner.set()
            else:
                with self._refusals():
                    await pool.checkpoint()

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """A device that refuses a write may fail what needs it; a machine that is off fails everything."""
        try:
            yield
        except TierError:
            if self.machine.is_off or not (self.faults or self.may_be_full):
                raise
            self.full_errors += 1

    async def _creator(self, pool: Pool) -> None:
        """Volumes come, are written to, and go."""
        for _ in range(self.rng.randrange(3)):
            await trio.sleep(self.rng.random() * 0.05)
            self.counter += 1
            name = f"x{self.counter}"
            size, policy = self.rng.randrange(8, 400) * 512 * 8, self.rng.choice(("", *POLICIES))
            model = Model(size, policy, filling=bool(self.counter % 2))
            self.uncertain[name] = model
            try:
                volume = await pool.create_volume(name, size, policy, filling=model.filling)
            except TierError:
                if self.machine.is_off:
                    raise
                # Where nothing could be put over the refused record, a crash may still let it come true.
                if pool._engine.flusher.failure is None and not pool._engine.log.broken:
                    del self.uncertain[name]
                continue
            del self.uncertain[name]
            self.models[name] = model
            assert volume.size_bytes == len(model.content)
            await self._client(pool, name, self.rng.randrange(6))
            if self.rng.random() < 0.7:
                await self._delete(pool, name)
        for name in [name for name in self.models if name.startswith("x")]:
            if self.rng.random() < 0.4:
                await self._delete(pool, name)

    async def _delete(self, pool: Pool, name: str) -> None:
        self.uncertain[name] = self.models[name]
        try:
            await pool.delete_volume(name)
        except TierError:
            if self.machine.is_off:
                raise
            if pool._engine.flusher.failure is None:
                if not pool._engine.log.broken:  # as for a creation
                    del self.uncertain[name]
            elif pool._engine.volume_named(name) is None:
                del self.models[name]  # gone, but perhaps not durably
            else:
                del self.uncertain[name]
            return
        del self.uncertain[name]
        del self.models[name]

    async def _operator(self, pool: Pool) -> None:
        """Devices are added, emptied and removed, while clients work."""
        rng = self.rng
        for _ in range(rng.randrange(4)):
            await trio.sleep(rng.random() * 0.1)
            present = [device.path for device in pool.status().devices if device.state == "online"]
            try:
                if len(present) < 2 or (len(present) < 4 and rng.random() < 0.4):
                    await self._grow(pool)
                    continue
                path = rng.choice(present)
                await pool.evacuator.start(path)
                if rng.random() < 0.3:
                    await trio.sleep(rng.random() * rng.choice((0, 0.01, 0.2)))
                    await pool.evacuator.cancel(path)
                elif rng.random() < 0.7:
                    with trio.move_on_after(30):
                        await self._gone(pool, path)
            except TierError:
                if self.machine.is_off:
                    raise
                self.full_errors += 1

    async def _grow(self, pool: Pool) -> None:
        self._device_count += 1
        tier: Tier = self.rng.choice(("fast", "base"))
        size = LABEL_AREA_BYTES + self.rng.choice((40, 64)) * SEGMENT_BYTES
        await pool.grow([DeviceSpec(Path(f"/simulated/{tier}{self._device_count}"), tier, size)])

    async def _gone(self, pool: Pool, path: str) -> None:
        """Wait until a device is no longer part of the pool."""
        while path in [device.path for device in pool.status().devices]:
            await trio.sleep(0.1)
        self.evacuated += 1

    async def lose_device(self, failpoint: str | None = None) -> None:
        """Between two lives a device is taken away for good, without a word. It may crash at `failpoint`."""
        machine = self.machine
        rows = [row for row in machine.state.devices if row.state in ("online", "evacuating")]
        if len(rows) < 2:
            return
        row = self.rng.choice(rows)
        expected: dict[str, set[int]] | None = None
        if not machine.is_off and self.rng.random() < 0.6:
            # Left in good order, so that it can be told what was only there.
            async with machine.open() as pool:
                await self.judge(pool)
                if pool.status().state != "online":
                    return
                for state in pool.evacuator.status():
                    if state.state in ("running", "waiting"):
                        with contextlib.suppress(TierError):  # it was faster
                            await pool.evacuator.cancel(state.path)
                await pool.checkpoint()
                expected = {}
                for reader in self._readers(pool):
                    lost = lost_blocks(self._content_of(reader)) if self.loses else set()
                    expected[reader.name] = await blocks_on(reader, row.index) | lost
                head = pool._engine.log.head.device.index
            if head == row.index or row.index not in [r.index for r in machine.state.devices if r.state == "online"]:
                return
            self.everything = True
        medium = next(medium for medium in machine.media if medium.path == row.path)
        medium.missing = True
        before = self.devices_lost
        self.devices_lost += 1
        crashes = failpoint is not None or self.rng.random() < 0.5
        for crash in (random_crash(self.rng, failpoint) if crashes else NO_CRASH, NO_CRASH):
            machine.arm(crash)
            given_up = any(r.path == row.path and r.state in ("online", "evacuating") for r in machine.state.devices)
            try:
                with contextlib.suppress(PowerCutError):
                    async with machine.open(give_up=[row.path] if given_up else []) as pool:
                        if pool.status().state == "online":
                            await self._judge_loss(pool, row.path, expected if not before and not self.faults else None)
                        else:
                            # The other devices have no room for a log, or failed a sync.
                            self.poisoned = any(device.state == "poisoned" for device in pool.status().devices)
                            if any(r.path == row.path and r.state == "lost" for r in machine.state.devices):
                                raise OracleError(f"{row.path} is given up, but the pool takes no writes without it")
                            medium.missing = False
                            self.devices_lost = before
            except TierError as error:
                if machine.is_off or "newest part of the log" not in str(error):
                    raise
                medium.missing = False  # it was only taken away, and is brought back
                self.devices_lost = before
            machine.disarm()
            if not machine.is_off:
                return
            self._crashed = True
            self.crashed_at[crash[2][0] if crash[2] else ""] += 1
            self.after()

    async def _judge_loss(self, pool: Pool, path: str, expected: dict[str, set[int]] | None) -> None:
        """What was only on a lost device is lost and listed, and nothing else is."""
        if (self.machine.countdown, self.machine.task_countdown, self.machine.crash_at) == NO_CRASH:
            await self.judge(pool)  # else that is for the next attempt, for it takes longer than what is to crash
            self.everything = True
        with trio.fail_after(3000):
            with trio.move_on_after(300) as patience:
                await self._gone(pool, path)
            if patience.cancelled_caught:
                if self.historian is not None and any(s.state == "waiting" for s in pool.evacuator.status()):
                    await self._grow(pool)  # the map of what snapshots keep may need more room than there is
                await self._gone(pool, path)
            for other in [state for state in pool.evacuator.status() if state.state == "running"]:
                await self._gone(pool, other.path)
        self.machine.disarm()
        if not pool._engine.space.room_to_move(256):
            await self._grow(pool)  # the others were so full that not even a trim may have room
        pool._engine.space.wanted_slots = 0
        listed = await self._listed(pool)
        for reader in self._readers(pool):
            _, unreadable = await read_what_can_be(reader)
            if expected is not None and unreadable != expected[reader.name]:
                was = sorted(expected[reader.name])
                raise OracleError(f"{reader.name}: only on {path} were {was[:9]}, lost are {sorted(unreadable)[:9]}")
            # What several versions share is listed once, with the one whose map names it.
            own = listed.get(reader.name, set())
            most = own if self.historian is None else set().union(*listed.values())
            # Past the end of a volume or snapshot nothing is listed, though others look through its map there as well.
            end = min(one.size_bytes for one in _line_of(reader)) // BLOCK
            if not own <= unreadable or not {block for block in unreadable if block < end} <= most:
                raise OracleError(f"{reader.name}: listed as lost {sorted(own)[:9]}, lost {sorted(unreadable)[:9]}")
        if not self.faults.read_spells:
            await require_sound(pool, known=LOST_PROBLEM)

    def _readers(self, pool: Pool) -> list[Volume | Snapshot]:
        """All volumes and snapshots."""
        snapshots = [] if self.historian is None else pool.snapshots()
        return [*(pool.volume(name) for name in self.models), *snapshots]

    async def load(self, pool: Pool, count: int) -> None:
        """Clients on every volume, flushes, checkpoints and cleaning, all at once."""
        async with trio.open_nursery() as background:
            background.start_soon(self._flusher, pool)
            background.start_soon(self._nudger, pool)
            if self.follower is not None:
                background.start_soon(self.follower.run, pool)
            async with trio.open_nursery() as clients:
                names = [name for name in self.models if not name.startswith("x")]
                if self.historian is not None:
                    names = self.historian.begin(pool)
                    background.start_soon(self.historian.read, pool)
                    clients.start_soon(self.historian.run, pool)
                for name in names:
                    clients.start_soon(self._work, pool, name, count)
                clients.start_soon(self._creator, pool)
                if self.devices_change:
                    clients.start_soon(self._operator, pool)
            background.cancel_scope.cancel()

    # -- lives ---------------------------------------------------------------------------------------------------------

    async def life(self, *, count: int, crash: Crash = NO_CRASH) -> None:
        """Open, check, load, and end: cleanly, or where `crash` says (which may be in the recovery)."""
        machine = self.machine
        self.injector.begin_life()
        self.injector.active = self.injector.faults.while_opening > self.rng.random()
        machine.arm(crash)
        failpoint = crash[2][0] if crash[2] else ""
        durable_end = False
        with contextlib.suppress(PowerCutError):
            async with self._opened() as pool:
                pool.define_policies(POLICIES)
                self.injector.active = False
                planned = machine.disarm()
                await self.judge(pool)
                self.everything = True
                online = pool.status().state == "online"
                for i in range(self.volume_count if online else 0):
                    if f"v{i}" not in self.models:
                        self.models[f"v{i}"] = Model(self.volume_bytes)
                        await pool.create_volume(f"v{i}", self.volume_bytes)
                machine.arm(planned)
                self.injector.active = True
                await self.load(pool, count)
                self.injector.active = False
                durable_end = pool.status().state == "online"
            # A sync that had begun may have failed while the pool closed.
            durable_end = durable_end and not self._flush_failed(pool)
        self.injector.active = False
        if machine.goes_in_circles:
            raise OracleError("the engine is busy for ever: its tasks wake each other up, and no time passes")
        if machine.is_off:
            self._crashed = True
            self.crashed_at[failpoint] += 1
        elif durable_end:
            for model in self.models.values():  # a clean end makes all durable
                model.flushed(model.mark)
        machine.disarm()

    @contextlib.asynccontextmanager
    async def _opened(self) -> AsyncIterator[Pool]:
        """Open the pool. If a device's fault prevents that, it must be possible once the fault has gone."""
        tried = False
        try:
            async with self.machine.open() as pool:
                tried = True
                yield pool
            return
        except TierError:
            if tried or self.machine.is_off or not self.injector.active:
                raise
            self.full_errors += 1
        self.injector.active = False
        async with self.machine.open() as pool:
            yield pool

    def _look_for_losses(self) -> None:
        """A sync failed: what it was to make durable may be gone, as after a power cut."""
        if any(medium.lost for medium in self.machine.media):
            self.everything = False

    def after(self) -> None:
        """Between two lives: the power comes back, or the process is started again."""
        machine = self.machine
        self._look_for_losses()
        if self._before is not None:
            (self.models, self.uncertain, kept), self._before = self._before, None
            if self.historian is not None:
                self.historian.restore(kept)
            self.everything = False
        if machine.is_off and self.rng.random() < 0.7:
            machine.power_cut()
            self.everything = False
        else:
            machine.kill()


# -- what a seed decides -----------------------------------------------------------------------------------------------


async def blocks_on(reader: Volume | Snapshot, index: int) -> set[int]:
    """The blocks of a volume or snapshot of which the data, or a map page on the way, lie on a device."""
    segments = reader._engine.segments.by_id
    found: set[int] = set()
    for block in range(-(-reader.size_bytes // BLOCK)):
        addresses = [(await reader.entries(block, 1))[0][0]]
        async for tree in _trees_asked(reader, block):
            for level in range(ROOT_LEVEL + 1):
                page = block >> FANOUT_BITS * (level + 1)
                await tree.load(level, [page])
                entry = tree.entry_of_page_now(level, page)
                addresses.append(entry[0] if entry else 0)
        if any(a >= FIRST_ADDRESS and segments[a >> SLOT_BITS].device.index == index for a in addresses):
            found.add(block)
    return found


def _line_of(reader: Volume | Snapshot) -> Iterator[Volume | Snapshot]:
    """A volume or snapshot, and what it is seen through: later snapshots, the volume, what that is a clone of ..."""
    of: Volume | Snapshot | None = reader
    while of is not None:
        volume = of if isinstance(of, Volume) else of.volume
        if isinstance(of, Snapshot):
            yield from volume.snapshots[volume.snapshots.index(of) :]
        yield volume
        of = volume.origin


async def _trees_asked(reader: Volume | Snapshot, block: int) -> AsyncIterator[MapTree]:
    """The trees that are asked for a block, up to the one that says something of it."""
    inherits = False
    for of in _line_of(reader):
        if not inherits:
            yield of.tree
            word = (await of.tree.load(0, [block >> FANOUT_BITS]))[block >> FANOUT_BITS][block & FANOUT_MASK]
            if word not in (0, INHERITED):
                return
            inherits = word == INHERITED
        if isinstance(of, Volume):
            inherits = False  # from here on it is what the origin has


LAYOUTS: tuple[tuple[Disk, ...], ...] = (
    (Disk("fast", 64),),
    (Disk("fast", 24), Disk("base", 48)),
    (Disk("fast", 20), Disk("fast", 24), Disk("base", 32)),
    (Disk("base", 64),),
    (Disk("fast", 24, 256 << 10), Disk("base", 60)),
)
TIGHT_LAYOUTS: tuple[tuple[Disk, ...], ...] = (
    (Disk("fast", 30),),
    (Disk("fast", 14), Disk("base", 18)),
    (Disk("base", 32),),
)


DEVICE_LAYOUTS: tuple[tuple[Disk, ...], ...] = (
    (Disk("fast", 56), Disk("base", 64)),
    (Disk("fast", 40), Disk("fast", 44), Disk("base", 56)),
    (Disk("base", 56), Disk("base", 60)),
    (Disk("fast", 64), Disk("fast", 64)),
)


@dataclass(frozen=True)
class Profile:
    """A kind of run."""

    what: str
    faults: bool = False
    tight: bool = False
    devices: bool = False
    versions: bool = False
    marks: bool = False
    loses: bool = False


PROFILES = {
    "crashes": Profile("sound devices, until the power goes or the process dies"),
    "faults": Profile("devices that refuse writes, fail reads and syncs, and are slow", faults=True),
    "full": Profile("devices that are too small, and fail", faults=True, tight=True),
    "devices": Profile("devices that are added, emptied and removed, and lost for good", devices=True),
    "failing": Profile("the same with devices that fail", faults=True, devices=True),
    "versions": Profile("snapshots, clones and rollbacks, over any of these", versions=True),
    "marks": Profile("trackers of what changes, and a record with them, on sound devices", marks=True),
    "lost": Profile("blocks that are given up, over any of these", loses=True),
}


LOST_BELOW = ("versions", "crashes", "faults", "full", "devices", "failing", "marks")


def profile_of(seed: int, name: str) -> Profile:
    """What a seed of a profile is about.

    `versions` goes over all others, half of its seeds with sound devices; `lost` over these, most with snapshots.
    """
    kind = PROFILES[name]
    if kind.loses:
        below = profile_of(seed, random.Random(seed ^ 0x1057).choices(LOST_BELOW, (6, 1, 1, 1, 1, 1, 1))[0])
        return replace(below, what=f"{kind.what}: {below.what}", loses=True)
    if not kind.versions:
        return kind
    others = [other for other in PROFILES.values() if not (other.versions or other.marks or other.loses)]
    below = random.Random(seed ^ 0x4E125).choices(others, (4, 1, 1, 1, 1))[0]
    return replace(below, what=f"{kind.what}: {below.what}", versions=True)


def random_machine(seed: int, *, layouts: Sequence[tuple[Disk, ...]] = LAYOUTS) -> Machine:
    """A small machine on which everything happens often."""
    rng = random.Random(seed)
    settings = PoolSettings(
        checkpoint_interval_s=rng.choice((0.02, 0.2, 30.0)),
        checkpoint_log_bytes=rng.choice((256 << 10, 1 << 20, 1 << 30)),
        overlay_entries=rng.choice((512, 1024, 4096)),
        unsynced_cap_bytes=rng.choice((512 << 10, 4 << 20)),
        map_cache_bytes=rng.choice((0, 1 << 20)),
    )
    machine = Machine(rng.choice(layouts), seed=seed, settings=settings)
    machine.cold_share = rng.choice((0.0, 0.1, 0.5))
    machine.pauses = rng.choice((0, 2, 6))
    machine.settings = replace(
        settings,
        small_volume_leaves=rng.choice((0, settings.small_volume_leaves)),
        compression_level=random.Random(seed ^ 0xF4A3E).choice((0, 1, 3)),
        pack_after_s=random.Random(seed ^ 0xF4A3F).choice((0.02, 60.0)),
    )
    return machine


def random_faults(seed: int) -> Faults:
    """Each kind of fault in about half of the runs."""
    rng = random.Random(seed ^ 0xFAD)
    return Faults(
        refused_writes=rng.choice((0.0, 0.003, 0.01, 0.03)),
        read_spells=rng.choice((0.0, 0.0, 0.002, 0.02)),
        failed_sync=rng.choice((0.0, 0.0, 0.15, 0.4)),
        slow=rng.choice((0.0, 0.0, 0.02, 0.2)),
        while_opening=rng.choice((0.0, 0.3)),
    )


def random_crash(rng: random.Random, failpoint: str | None = None) -> Crash:
    """How a life ends: cleanly, at an operation, at a step of a task, or at a failpoint (this one, if one is given)."""
    kind = rng.choices(("none", "soon", "operation", "task", "failpoint"), (1, 2, 3, 3, 4))[0]
    if failpoint is not None or kind == "failpoint":
        return None, None, (failpoint or rng.choice(failpoint_names()), rng.choice((0, 0, 0, 1, 3, 10)))
    if kind == "task":
        return None, int(2 ** (rng.random() * 12)), None
    if kind == "none":
        return NO_CRASH
    return rng.randrange(1, 60 if kind == "soon" else 500), None, None


def search(
    seed: int,
    profile: str = "crashes",
    *,
    lives: int = 6,
    count: int = 40,
    failpoints: Sequence[str] = (),
    digest: bool = False,
) -> Driver:
    """One seeded run of several lives. Raises OracleError where the promise is broken.

    `failpoints`: where the lives end, in turn, in place of other places. `digest`: keep the hash of all that happens,
    which `Machine.fingerprint` ends.
    """
    kind = profile_of(seed, profile)
    machine = random_machine(seed, layouts=TIGHT_LAYOUTS if kind.tight else DEVICE_LAYOUTS if kind.devices else LAYOUTS)
    if digest:
        machine.digest = hashlib.sha256()
    faults = random_faults(seed) if kind.faults else Faults()
    sizes = (1 << 20, 3 << 19, 2 << 20) if kind.tight else (512 << 10, 1 << 20, 3 << 19)
    driver = Driver(machine, volume_bytes=random.Random(seed + 1).choice(sizes), faults=faults)
    driver.may_be_full = kind.tight or kind.devices or kind.versions
    driver.devices_change = kind.devices
    driver.loses = kind.loses
    if kind.versions:
        driver.historian = Historian(driver, seed)
    if kind.marks:
        driver.follower = Follower(driver, seed)

    async def main() -> None:
        for i in range(lives):
            failpoint = failpoints[i % len(failpoints)] if failpoints else None
            with trio.fail_after(LIFE_S):
                await driver.life(count=count, crash=random_crash(driver.rng, failpoint))
            driver.after()
            if driver.poisoned:
                break
            if kind.devices and i and (driver.rng.random() < 0.25 or failpoint == "checkpoint.given_up"):
                with trio.fail_after(LIFE_S):
                    await driver.lose_device(failpoint)
                if driver.poisoned:
                    break
        with trio.fail_after(LIFE_S):
            async with machine.open() as pool:
                await driver.judge(pool)

    machine.run(main)
    return driver


@dataclass(frozen=True)
class Run:
    """One run, as it can be named on a command line."""

    seed: int
    profile: str
    failpoints: tuple[str, ...] = ()

    @staticmethod
    def of(seed: int, profile: str | None = None, failpoints: Sequence[str] = ()) -> Run:
        """The run of a seed, which also chooses the profile if none is given."""
        return Run(seed, profile or list(PROFILES)[seed % len(PROFILES)], tuple(failpoints))

    def live(self, *, digest: bool = False) -> Driver:
        """Raises where the promise is broken, or the engine breaks."""
        return search(self.seed, self.profile, failpoints=self.failpoints, digest=digest)

    def command(self, plant: str | None = None) -> str:
        """What replays exactly this."""
        words = ["python -m tests.simulation", f"--seed {self.seed}", f"--profile {self.profile}"]
        words += [f"--failpoint {name}" for name in self.failpoints]
        words += [f"--plant {plant}"] if plant else []
        return " ".join(words)
