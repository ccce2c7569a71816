"""What a volume may hold after a crash, and a seeded driver that makes crashes and asks.

The oracle is the promise: after a power cut a volume holds a prefix of its operations in the order in which they took
effect, with everything that had returned before the last completed flush began; after a kill it holds all that had
returned. The operation at which the prefix ends may be there in part, in whole blocks (it was not flushed, or had not
returned). A resize is there or not.
"""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import trio

from tests.simulation.machine import Disk, Machine, PowerCutError
from tiers import Pool, PoolSettings, TierError, Volume

BLOCK = 4096
Changes = list[tuple[int, bytes]]


class OracleError(AssertionError):
    """The promise is broken."""


@dataclass
class Op:
    """One operation: bytes that it changes, or a new size."""

    what: str
    changes: Changes = field(default_factory=list)
    size: int | None = None

    def apply(self, content: bytearray) -> None:
        if self.size is not None:
            if self.size < len(content):
                del content[self.size :]
            else:
                content.extend(bytes(self.size - len(content)))
        for offset, data in self.changes:
            content[offset : offset + len(data)] = data


class Model:
    """A volume as its user knows it: the content, and the operations that a crash may still take back."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(size)
        self.floor = bytearray(size)
        self.first = 0
        self.ops: list[Op] = []
        self.in_flight: Op | None = None

    @property
    def mark(self) -> int:
        """How many operations have returned, ever."""
        return self.first + len(self.ops)

    def returned(self, op: Op) -> None:
        """An operation was acknowledged."""
        op.apply(self.content)
        self.ops.append(op)

    def flushed(self, mark: int) -> None:
        """A flush that began at `mark` has returned."""
        while self.first < mark:
            self.ops.pop(0).apply(self.floor)
            self.first += 1

    def judge(self, found: bytes, *, everything: bool) -> None:
        """`found` is what a crash has left. Raises OracleError unless it may be; then it is the new state."""
        state = bytearray(self.floor)
        ops = [*self.ops, *([self.in_flight] if self.in_flight else [])]
        least = len(self.ops) if everything else 0
        for k in range(len(ops) + 1):
            if k >= least and (
                state == found or (k < len(ops) and ops[k].size is None and self._in_part(state, ops[k], found))
            ):
                self.adopt(found)
                return
            if k < len(ops):
                ops[k].apply(state)
        raise OracleError(self._explain(found, ops, least))

    @staticmethod
    def _in_part(state: bytearray, op: Op, found: bytes) -> bool:
        """Whether `found` is `state` and some of `op`: the first of its changes, and of the next some blocks."""
        if len(found) != len(state):
            return False
        before = bytearray(state)
        for offset, data in op.changes:
            after = bytearray(before)
            after[offset : offset + len(data)] = data
            mixed = bytearray(before)
            for at in range(offset // BLOCK * BLOCK, offset + len(data), BLOCK):
                if found[at : at + BLOCK] == after[at : at + BLOCK]:
                    mixed[at : at + BLOCK] = after[at : at + BLOCK]
            if mixed == found:
                return True
            before = after
        return False

    def _explain(self, found: bytes, ops: Sequence[Op], least: int) -> str:
        state = bytearray(self.floor)
        best: tuple[int, int, list[int]] | None = None
        for k in range(len(ops) + 1):
            if k >= least:
                size = max(len(state), len(found))
                bad = [b for b in range(0, size, BLOCK) if state[b : b + BLOCK] != found[b : b + BLOCK]]
                if best is None or len(bad) < len(best[2]):
                    best = (k, len(state), bad)
            if k < len(ops):
                ops[k].apply(state)
        assert best is not None
        k, size, bad = best
        around = [f"{i}: {ops[i].what}" for i in range(max(0, k - 2), min(len(ops), k + 3))]
        return (
            f"no prefix of {len(ops)} operations (at least {least}) gives what is there ({len(found)} bytes); nearest "
            f"is {k} with {size} bytes and {len(bad)} wrong blocks {[b // BLOCK for b in bad[:8]]}; around: {around}"
        )

    def adopt(self, found: bytes) -> None:
        """This is the state now, durably."""
        self.content = bytearray(found)
        self.floor = bytearray(found)
        self.ops.clear()
        self.first = 0
        self.in_flight = None


async def read_all(volume: Volume) -> bytes:
    """The whole volume, through the slow path."""
    into = bytearray(volume.size_bytes)
    await volume.read(0, len(into), memoryview(into))
    return bytes(into)


async def require_sound(pool: Pool) -> None:
    """`pool check --full` finds nothing."""
    report = await pool.check(full=True)
    if not report.ok:
        raise OracleError(f"pool check: {report.problems[:5]}")


class Driver:
    """A machine, the volumes on it, and a model of each. `life` is one open, some load, and an end."""

    def __init__(self, machine: Machine, *, volumes: int = 2, volume_bytes: int = 1 << 20) -> None:
        self.machine = machine
        self.rng = random.Random(machine.seed ^ 0x5EED)
        self.models: dict[str, Model] = {}
        self.uncertain: dict[str, Model | None] = {}
        """Volumes whose creation or deletion was in flight: the model to use if they exist."""
        self.volume_count = volumes
        self.volume_bytes = volume_bytes
        self.everything = True
        self.counter = 0
        self.full_errors = 0
        self.write_faults = 0.0
        """The share of the devices' writes that fail."""

    # -- checking ------------------------------------------------------------------------------------------------------

    async def judge(self, pool: Pool) -> None:
        """After an open: what is there must be allowed."""
        names = {volume.short_name for volume in pool.volumes()}
        for name, model in self.uncertain.items():
            if name in names and model is not None:
                self.models[name] = model
            else:
                self.models.pop(name, None)
        self.uncertain.clear()
        if names != set(self.models):
            raise OracleError(f"volumes {sorted(names)}, expected {sorted(self.models)}")
        for name, model in self.models.items():
            found = await read_all(pool.volume(name))
            try:
                model.judge(found, everything=self.everything)
            except OracleError as error:
                raise OracleError(f"{name}: {error}") from None
        await require_sound(pool)

    # -- load ----------------------------------------------------------------------------------------------------------

    def _bytes(self, length: int) -> bytes:
        self.counter += 1
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
        kind = rng.choices(
            ("now", "batch", "write", "zero", "zeroes", "no_hole", "trim", "flush", "read", "resize"),
            (20, 15, 25, 3, 6, 3, 8, 8, 8, 1),
        )[0]
        if kind == "flush":
            mark = model.mark
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
            if kind == "trim":
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
            else:
                mark = model.mark
                await pool.resize_volume(name, op.size or 0)
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
            model.in_flight = None
            await self._after_failure(volume, model, failed)
            return
        model.in_flight = None
        model.returned(op)

    async def _after_failure(self, volume: Volume, model: Model, op: Op) -> None:
        """An operation was refused: it may have happened in part, by blocks, and what is there now counts."""
        if op.size is not None:
            if volume.size_bytes != len(model.content):
                raise OracleError(f"a refused resize changed the size to {volume.size_bytes}")
            if await read_all(volume) != bytes(model.content):
                raise OracleError(f"a refused {op.what} changed the content")
            return
        states = [bytes(model.content)]
        for change in op.changes:
            state = bytearray(states[-1])
            Op("", [change]).apply(state)
            states.append(bytes(state))
        seen: Changes = []
        for offset, data in op.changes:
            lo, hi = offset // BLOCK * BLOCK, min(-(-(offset + len(data)) // BLOCK) * BLOCK, len(states[0]))
            into = bytearray(hi - lo)
            await volume.read(lo, hi - lo, memoryview(into))
            for at in range(lo, hi, BLOCK):
                if all(into[at - lo : at - lo + BLOCK] != state[at : at + BLOCK] for state in states):
                    raise OracleError(f"a refused {op.what} left neither old nor new bytes at {at}")
            seen.append((lo, bytes(into)))
        model.returned(Op(f"refused {op.what}", seen))

    async def compare(self, volume: Volume, model: Model, offset: int, length: int) -> None:
        """A read returns what was written last."""
        into = bytearray(length)
        if self.rng.random() < 0.5 or not volume.read_now(offset, length, memoryview(into)):
            await volume.read(offset, length, memoryview(into))
        if into != model.content[offset : offset + length]:
            bad = next(i for i in range(length) if into[i] != model.content[offset + i])
            raise OracleError(f"{volume.name}: a read at {offset + bad} returned other bytes than were written")

    async def _client(self, pool: Pool, name: str, count: int) -> None:
        for _ in range(count):
            await self._operation(pool, name, self.models[name])
            if self.rng.random() < 0.3:
                await trio.sleep(self.rng.random() * 0.01)

    async def _flusher(self, pool: Pool) -> None:
        while True:
            await trio.sleep(self.rng.random() * 0.03)
            marks = {name: model.mark for name, model in self.models.items()}
            models = dict(self.models)
            await pool._engine.flusher.flush()
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
            if self.machine.is_off or not self.write_faults:
                raise
            self.full_errors += 1

    def _inject(self, on: bool) -> None:
        """Let writes fail now and then, before any byte is taken."""
        share = self.write_faults if on else 0.0

        def fail(offset: int, length: int) -> tuple[int, int] | None:
            return (self.rng.choice((errno.EIO, errno.ENOSPC)), 0) if self.rng.random() < share else None

        for medium in self.machine.media:
            medium.on_write = fail

    async def _creator(self, pool: Pool) -> None:
        """Volumes come, are written to, and go."""
        for _ in range(self.rng.randrange(3)):
            await trio.sleep(self.rng.random() * 0.05)
            self.counter += 1
            name = f"x{self.counter}"
            model = Model(self.rng.randrange(8, 400) * 512 * 8)
            self.uncertain[name] = model
            try:
                volume = await pool.create_volume(name, len(model.content))
            except TierError:
                if self.machine.is_off:
                    raise
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
            del self.uncertain[name]
            return
        del self.uncertain[name]
        del self.models[name]

    async def load(self, pool: Pool, count: int) -> None:
        """Clients on every volume, flushes, checkpoints and cleaning, all at once."""
        async with trio.open_nursery() as background:
            background.start_soon(self._flusher, pool)
            background.start_soon(self._nudger, pool)
            async with trio.open_nursery() as clients:
                for name in [name for name in self.models if not name.startswith("x")]:
                    clients.start_soon(self._client, pool, name, count)
                clients.start_soon(self._creator, pool)
            background.cancel_scope.cancel()

    # -- lives ---------------------------------------------------------------------------------------------------------

    async def life(self, *, count: int, crash_after: int | None) -> None:
        """Open, check, load, and end: cleanly, or where the countdown says (which may be in the recovery)."""
        self.machine.countdown = crash_after
        self._inject(False)
        with contextlib.suppress(PowerCutError):
            async with self.machine.open() as pool:
                countdown, self.machine.countdown = self.machine.countdown, None
                await self.judge(pool)
                self.everything = True
                for i in range(self.volume_count):
                    if f"v{i}" not in self.models:
                        self.models[f"v{i}"] = Model(self.volume_bytes)
                        await pool.create_volume(f"v{i}", self.volume_bytes)
                self.machine.countdown = countdown
                self._inject(True)
                await self.load(pool, count)
                self._inject(False)
        if not self.machine.is_off:
            for model in self.models.values():  # a clean end makes all durable
                model.flushed(model.mark)
            self.machine.countdown = None

    def after(self) -> None:
        """Between two lives: the power comes back, or the process is started again."""
        if self.machine.is_off:
            if self.rng.random() < 0.7:
                self.machine.power_cut()
                self.everything = False
            else:
                self.machine.kill()
        else:
            self.machine.kill()


LAYOUTS: tuple[tuple[Disk, ...], ...] = (
    (Disk("fast", 64),),
    (Disk("fast", 24), Disk("base", 48)),
    (Disk("fast", 20), Disk("fast", 24), Disk("base", 32)),
    (Disk("base", 64),),
    (Disk("fast", 24, 256 << 10), Disk("base", 60)),
)


def random_machine(seed: int) -> Machine:
    """A small machine on which everything happens often."""
    rng = random.Random(seed)
    settings = PoolSettings(
        checkpoint_interval_s=rng.choice((0.02, 0.2, 30.0)),
        checkpoint_log_bytes=rng.choice((256 << 10, 1 << 20, 1 << 30)),
        overlay_entries=rng.choice((512, 1024, 4096)),
        unsynced_cap_bytes=rng.choice((512 << 10, 4 << 20)),
        map_cache_bytes=rng.choice((0, 1 << 20)),
    )
    machine = Machine(rng.choice(LAYOUTS), seed=seed, settings=settings)
    machine.cold_share = rng.choice((0.0, 0.1, 0.5))
    machine.pauses = rng.choice((0, 2, 6))
    machine.settings = replace(settings, small_volume_leaves=rng.choice((0, settings.small_volume_leaves)))
    return machine


def search(seed: int, *, lives: int = 6, count: int = 40, write_faults: float = 0.0) -> Driver:
    """One seeded run of several lives. Raises OracleError where the promise is broken."""
    machine = random_machine(seed)
    driver = Driver(machine, volume_bytes=random.Random(seed + 1).choice((512 << 10, 1 << 20, 3 << 19)))
    driver.write_faults = write_faults

    async def main() -> None:
        for _ in range(lives):
            crash = driver.rng.choice((None, driver.rng.randrange(1, 60), driver.rng.randrange(1, 1500)))
            with trio.fail_after(3600):
                await driver.life(count=count, crash_after=crash)
            driver.after()
        driver._inject(False)
        with trio.fail_after(3600):
            async with machine.open() as pool:
                await driver.judge(pool)

    machine.run(main)
    return driver
