"""A simulated machine to open a pool on: dishonest devices, an atomic catalog, a clock that jumps, no threads.

`Machine` is a `tiers.host.Host`: the engine that runs on it is the real one, unpatched. What a device holds is its
`Medium`, which outlives processes and power cuts; `SimDevice` is how one process sees it.

The machine can be made to crash at any moment: `countdown` at the n-th operation on any device or the catalog, before,
in the middle of or after it; `task_countdown` before the n-th step of any task, that is at any await; `crash_at` at
the n-th time that the engine comes to a named failpoint. From then on nothing can be changed, so that the engine's own
clean-up code can't help.

Everything is a function of the seed: `Machine.run` uses trio's own switch to make its scheduler deterministic. With
`digest` set, every write, sync, commit, failpoint and step of a task goes into one hash, and the final media too.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple
from unittest import mock

import trio
import trio.testing

from tests.simulation.medium import SECTOR, Medium
from tiers.catalog import CATALOG_NAME, Catalog, Change, DeviceRow, Position, State
from tiers.device import LabelledDevice, Offload
from tiers.errors import TierError
from tiers.failpoint import watching
from tiers.host import CatalogStore
from tiers.label import LABEL_BYTES, LABEL_OFFSETS, Label, Tier, encode_label, newest_label
from tiers.layout import LABEL_AREA_BYTES
from tiers.newdevices import DeviceSpec
from tiers.pool import Pool
from tiers.settings import PoolSettings

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
Buffer = bytes | bytearray | memoryview

SEGMENT_BYTES = 128 << 10
POOL_UUID = bytes(range(16))

LOOK_EVERY = 4096
MAX_STEPS_AT_ONCE = 200_000
"""A life of the search has a few thousand steps."""

_fds = itertools.count(1000)


class PowerCutError(TierError):
    """The machine is off."""

    def __init__(self) -> None:
        super().__init__(errno.EIO, "the simulated machine is off")


class SimDevice(LabelledDevice):
    """`tiers.device.Device` over a medium, for as long as one process has it open."""

    def __init__(self, machine: Machine, medium: Medium) -> None:
        super().__init__(medium.path, newest_label([medium.cache[o : o + LABEL_BYTES] for o in LABEL_OFFSETS]))
        self.medium = medium
        self.machine = machine
        self.fd = -next(_fds)
        self.machine.by_fd[self.fd] = self

    def _check_writable(self) -> None:
        if self.poisoned:
            raise TierError(errno.EIO, f"{self.path} takes no writes: {self.poisoned}")

    def _take(self, offset: int, data: bytes) -> None:
        """One write arrives at the kernel; the machine may go down in the middle."""
        when = self.machine.step("write")
        if when == "middle":
            data = data[: self.machine.rng.randrange(len(data) + 1)]
        fault = self.medium.on_write(offset, len(data))
        if fault is not None:
            number, taken = fault
            self.medium.write(offset, data[:taken])
            self.machine.note("failed write", self.index, offset, data[:taken])
            self.error_count += 1
            raise TierError(number or errno.EIO, f"writing {self.path} at {offset}: {taken} bytes were taken")
        if when != "before":
            self.medium.write(offset, data)
            self.machine.note("write", self.index, offset, data)
        if when is not None:
            self.machine.off()

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._check_writable()
        assert 0 < len(buffers) <= 1023
        data = b"".join(bytes(buffer) for buffer in buffers)
        self.unsynced_bytes += len(data)
        self.written_bytes += len(data)
        self._take(offset, data)

    async def write_behind(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._check_writable()
        data = b"".join(bytes(buffer) for buffer in buffers)
        half = len(data) // 2 // SECTOR * SECTOR
        try:
            await self.machine.pause()
            self._take(offset, data[:half])
            await self.machine.pause()
            self._take(offset + half, data[half:])
            await self.machine.pause()
        finally:
            self.unsynced_bytes += len(data)
            self.written_bytes += len(data)

    def read_now(self, offset: int, into: memoryview) -> bool:
        if self.machine.rng.random() < self.machine.cold_share or self.medium.on_read(offset, len(into)):
            return False
        into[:] = self.medium.cache[offset : offset + len(into)]
        return True

    async def read(self, offset: int, length: int) -> bytearray:
        return (await self.read_many([(offset, length)]))[0]

    async def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytearray]:
        buffers = []
        for offset, length in ranges:
            await self._about_to_read(offset, length)
            buffers.append(bytearray(self.medium.cache[offset : offset + length]))
        await self.machine.pause()
        return buffers

    async def read_then(
        self, ranges: Sequence[tuple[int, int]], function: Callable[[list[bytearray]], T], *, direct: bool = False
    ) -> T:
        if direct:
            return function([await self.read_direct(offset, length) for offset, length in ranges])
        return function(await self.read_many(ranges))

    async def read_direct(self, offset: int, length: int) -> bytearray:
        await self._about_to_read(offset, length)
        return self.medium.direct(offset, length)

    async def read_direct_into(self, offset: int, into: memoryview) -> None:
        into[:] = await self.read_direct(offset, len(into))

    async def _about_to_read(self, offset: int, length: int) -> None:
        assert offset >= 0 and offset + length <= self.medium.size, "a read past the end of the device"
        await self.machine.pause()
        if self.medium.before_read is not None:
            await self.medium.before_read(offset, length)
        if self.machine.step("read") is not None:
            self.machine.off()
        number = self.medium.on_read(offset, length)
        if number is not None:
            self.error_count += 1
            raise TierError(number, f"reading {self.path} at {offset}: {os.strerror(number)}")

    async def sync(self) -> None:
        medium = self.medium
        covered = len(medium.unsynced)
        await self.machine.pause()
        if medium.before_sync is not None:
            await medium.before_sync()
        when = self.machine.step("sync")
        medium.sync_count += 1
        if medium.failing_syncs:
            medium.failing_syncs -= 1
            medium.drop_dirty(covered)
            self.machine.note("failed sync", self.index, covered)
            self.error_count += 1
            raise TierError(errno.EIO, f"fdatasync of {self.path}: {os.strerror(errno.EIO)}")
        if medium.lying_syncs:
            covered = 0
        if when == "middle":
            covered = self.machine.rng.randrange(covered + 1)
        if when != "before":
            medium.make_durable(covered)
            self.machine.note("sync", self.index, covered)
        if when is not None:
            self.machine.off()
        await self.machine.pause()

    def erase_label_now(self) -> None:
        for offset in LABEL_OFFSETS:
            self._take(offset, bytes(4096))
        self.medium.make_durable(len(self.medium.unsynced))

    def write_label(self, label: Label) -> None:
        self.write(LABEL_OFFSETS[label.generation % 2], [encode_label(label).ljust(4096, b"\0")])
        self.label = label

    def close(self) -> None:
        self.machine.by_fd.pop(self.fd, None)


class MemoryCatalog:
    """Stands in for `tiers.catalog.Catalog`: a commit is one atomic, durable event."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def load(self) -> State:
        return self._machine.state

    def commit(self, change: Change) -> None:
        machine = self._machine
        when = machine.step("commit")
        if when != "before":
            machine.state = _changed(machine.state, change)
            machine.commits += 1
            machine.note("commit", change)
        if when is not None:
            machine.off()

    def mark_poisoned(self, index: int, why: str) -> None:
        self._machine.step("commit")
        state = self._machine.state
        devices = [replace(row, poisoned=why) if row.index == index else row for row in state.devices]
        self._machine.state = replace(state, devices=devices)

    def add_devices(self, devices: Sequence[DeviceRow]) -> None:
        machine = self._machine
        when = machine.step("commit")
        if when != "before":
            machine.state = replace(machine.state, devices=[*machine.state.devices, *devices])
        if when is not None:
            machine.off()

    def lay_ballast(self) -> None:
        """There is no file system to run full."""

    def close(self) -> None:
        """Nothing is held."""


def _changed(state: State, change: Change) -> State:
    segments = {row.id: row for row in state.segments if row.id not in set(change.freed_segments)}
    segments.update((row.id, row) for row in change.segments)
    removed = set(change.dead_removed)
    dead = {row[0]: row for row in state.dead if row[0] not in removed}
    dead.update((row[0], row) for row in change.dead_added)
    snapshots = {row.id: row for row in state.snapshots if row.id not in set(change.snapshots_removed)}
    snapshots.update((row.id, row) for row in change.snapshots)
    devices = {row.index: row for row in state.devices}
    for row in change.devices:
        old = devices.get(row.index)
        devices[row.index] = replace(row, poisoned=(old and old.poisoned) or row.poisoned)
    return State(
        state.pool_name,
        state.pool_uuid,
        replace(change.position),
        [devices[index] for index in sorted(devices)],
        sorted(change.volumes, key=lambda row: row.id),
        list(segments.values()),
        list(dead.values()),
        [snapshots[number] for number in sorted(snapshots)],
        sorted(change.marks, key=lambda row: row.id),
    )


@dataclass(frozen=True)
class Disk:
    """A device to be simulated."""

    tier: Tier = "fast"
    segments: int = 48
    segment_bytes: int = SEGMENT_BYTES


class Machine:
    """Devices, a catalog, and what may happen to them."""

    def __init__(
        self, disks: Sequence[Disk] = (Disk(),), *, seed: int = 0, settings: PoolSettings | None = None
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.settings = settings or PoolSettings(overlay_entries=2048, unsynced_cap_bytes=4 << 20)
        self.by_fd: dict[int, SimDevice] = {}
        self.is_off = False
        self.goes_in_circles = False
        """Stopped, because the engine was busy for ever without the clock going on."""
        self.countdown: int | None = None
        """Operations on devices or the catalog until the crash."""
        self.task_countdown: int | None = None
        """Steps of tasks until the crash."""
        self.crash_at: tuple[str, int] | None = None
        """The failpoint at which to crash, and how often it is to be passed before."""
        self.on_hit: dict[str, Callable[[], None]] = {}
        """What is to happen at a failpoint."""
        self.hits: Counter[str] = Counter()
        """How often each failpoint was come to."""
        self.digest: Any = None
        """A hash to be fed with everything that happens."""
        self.on_off: Callable[[], None] = lambda: None
        self.on_step: Callable[[str], None] = lambda kind: None
        self.on_medium: Callable[[Medium], None] = lambda medium: None
        """Is told of each new device."""
        self.steps = 0
        self.commits = 0
        self.catalog_directory: Path | None = None
        """Where to keep a real catalog in place of the simulated one."""
        self.cold_share = 0.0
        """How often a read that could be served from the cache is not."""
        self.pauses = 2
        """An operation yields to the other tasks up to so many times."""
        self.media: list[Medium] = []
        rows = []
        for index, disk in enumerate(disks):
            size = LABEL_AREA_BYTES + disk.segments * disk.segment_bytes
            label = Label(
                disk.tier, index, POOL_UUID, bytes([index + 1] * 16), size, disk.segment_bytes, 1, 0, frozenset(), "sim"
            )
            path = f"/simulated/{disk.tier}{index}"
            self.media.append(Medium(path, label))
            rows.append(DeviceRow(index, label.device_uuid, path, disk.tier, size, disk.segment_bytes, None))
        self.state = State("sim", POOL_UUID, Position(0, 0, 0, 0, 0, 1, 1), rows, [], [], [])

    # -- faults ------------------------------------------------------------------------------------------------------

    def step(self, kind: str) -> str | None:
        """An operation is about to happen: None, or where in it ("before", "middle", "after") the machine goes down."""
        if self.is_off:
            raise PowerCutError
        self.steps += 1
        self.on_step(kind)
        if self.countdown is not None:
            self.countdown -= 1
            if self.countdown <= 0:
                return self.rng.choice(("before", "middle", "after"))
        return None

    def disarm(self) -> tuple[int | None, int | None, tuple[str, int] | None]:
        """Plan no crash; return what was planned, to be given to `arm`."""
        planned = self.countdown, self.task_countdown, self.crash_at
        self.countdown = self.task_countdown = self.crash_at = None
        return planned

    def arm(self, planned: tuple[int | None, int | None, tuple[str, int] | None]) -> None:
        """Plan to crash: after so many operations, or steps of tasks, or at a failpoint."""
        self.countdown, self.task_countdown, self.crash_at = planned

    def came_to(self, name: str) -> None:
        """The engine hit a failpoint. It isn't interrupted there, but it changes nothing any more."""
        if self.is_off:
            return
        self.note("at", name)
        self.hits[name] += 1
        if name in self.on_hit:
            self.on_hit[name]()
        if self.crash_at is not None and self.crash_at[0] == name:
            if self.crash_at[1] == 0:
                self.stop()
            else:
                self.crash_at = name, self.crash_at[1] - 1

    def note(self, *what: object) -> None:
        """Into the digest."""
        if self.digest is not None:
            for value in what:
                self.digest.update(value if isinstance(value, bytes) else repr(value).encode())

    def fingerprint(self) -> str:
        """The digest of all that has happened, and of what is on the media."""
        for medium in self.media:
            self.digest.update(medium.cache)
            self.digest.update(medium.durable)
        self.note(self.state)
        return str(self.digest.hexdigest())

    def off(self) -> None:
        """Down. Raises, so that the operation in hand never returns."""
        self.stop()
        raise PowerCutError

    def stop(self) -> None:
        """Down, from outside."""
        self.is_off = True
        self.disarm()
        self.on_off()

    def power_cut(self) -> None:
        """What the media hold when the power is back."""
        self.is_off = False
        for medium in self.media:
            medium.power_cut(self.rng)

    def kill(self) -> None:
        """Only the process died: the kernel still has everything."""
        self.is_off = False

    async def pause(self) -> None:
        """Yield, a few times or not at all; at least trio's checkpoint."""
        await trio.lowlevel.checkpoint()
        for _ in range(self.rng.randrange(self.pauses + 1)):
            await trio.lowlevel.checkpoint()

    # -- being a host ------------------------------------------------------------------------------------------------

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        """Read what is in the cache, or what this machine takes for it."""
        (into,) = buffers
        if not self.by_fd[fd].read_now(offset, into):
            raise BlockingIOError(errno.EAGAIN, "not in the cache")
        return len(into)

    def lock(self, directory: Path) -> contextlib.AbstractContextManager[None]:
        """Nobody else is here."""
        return contextlib.nullcontext()

    def open_catalog(self, directory: Path) -> CatalogStore:
        """The simulated catalog, or a real one where a test wants that."""
        real = self.catalog_directory
        if real is None:
            return MemoryCatalog(self)
        if not (real / CATALOG_NAME).exists():
            state = self.state
            Catalog.create(real, state.pool_name, state.pool_uuid, state.devices, state.position)
        return Catalog(real)

    def open_device(self, path: Path) -> SimDevice:
        """The device as a process sees it that opens it now."""
        for medium in self.media:
            if medium.path == str(path) and not medium.missing:
                return SimDevice(self, medium)
        raise TierError(errno.ENOENT, f"the device {path} is missing: --lost")

    def label_devices(
        self,
        name: str,
        pool_uuid: bytes,
        specs: Sequence[DeviceSpec],
        first_index: int,
        present: Sequence[Path],
        *,
        force: bool,
    ) -> list[DeviceRow]:
        """New media; a power cut before the catalog knows them leaves them there, labelled, and nobody's."""
        rows = []
        for index, spec in enumerate(specs, first_index):
            if self.step("label") is not None:
                self.off()
            size = spec.create_size_bytes or 0
            label = Label(
                spec.tier, index, pool_uuid, self.rng.randbytes(16), size, SEGMENT_BYTES, 1, 0, frozenset(), name
            )
            self.media.append(Medium(str(spec.path), label))
            self.on_medium(self.media[-1])
            rows.append(DeviceRow(index, label.device_uuid, str(spec.path), spec.tier, size, SEGMENT_BYTES, None))
        return rows

    def wipe_labels(self, paths: Sequence[Path]) -> None:
        """The media are nobody's again. The engine cleans up like that when it goes down too, which must not help."""
        if self.is_off:
            return
        self.media = [medium for medium in self.media if medium.path not in map(str, paths)]

    def workers(self) -> Offload:
        """No threads: other tasks run before and after, as with a real worker."""
        return _inline

    def now(self) -> float:
        """The simulated clock."""
        return trio.current_time()

    # -- running -----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def open(
        self,
        *,
        truncate_log: bool = False,
        settings: PoolSettings | None = None,
        give_up: Sequence[str] = (),
        give_up_map: bool = False,
    ) -> AsyncIterator[Pool]:
        """`Pool.open` over the simulated devices. A crash ends the body by cancelling it."""
        opened = False
        with trio.CancelScope() as scope:
            self.on_off = scope.cancel
            try:
                with self._ungrouped():
                    async with Pool.open(
                        Path("/simulated"),
                        settings=settings or self.settings,
                        truncate_log=truncate_log,
                        give_up=give_up,
                        give_up_map=give_up_map,
                        host=self,
                    ) as pool:
                        opened = True
                        yield pool
            except PowerCutError:
                if not opened:
                    raise
            finally:
                self.on_off = lambda: None
        if not opened:
            raise PowerCutError

    @contextlib.contextmanager
    def _ungrouped(self) -> Iterator[None]:
        """Unwrap the group that a nursery puts around an error; when the machine is off that is all there is to say."""
        try:
            yield
        except (BaseExceptionGroup, OSError) as error:
            real = [e for e in _leaves(error) if not isinstance(e, trio.Cancelled)]
            if self.is_off:
                real = [e for e in real if not isinstance(e, OSError)]
            if real:
                raise real[0] from error
            raise PowerCutError from None

    def run(self, body: Callable[[], Awaitable[Any]]) -> Any:
        """Run `body` on this machine, in a trio of its own whose scheduler and clock are functions of the seed."""

        # Trio's own switch, made for this: tasks are stepped in the order of their creation, shuffled by `_r`.
        core = trio._core._run
        core._r.seed(self.seed)  # type: ignore[attr-defined]
        collecting = gc.isenabled()
        gc.disable()  # what it finalizes, it finalizes at moments of its own
        try:
            with (
                mock.patch.object(core, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
                watching(self.came_to),
            ):
                clock = trio.testing.MockClock(autojump_threshold=0)
                return trio.run(body, clock=clock, instruments=[_Steps(self)])
        finally:
            if collecting:
                gc.enable()


class _Steps(trio.abc.Instrument):
    """Sees every step of every task: a crash may come before any of them."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._steps = 0
        self._then = -1.0
        self._standing = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        machine = self._machine
        self._steps += 1
        if self._steps % LOOK_EVERY == 0:
            self._look_at_the_clock()
        if machine.digest is not None:
            machine.digest.update(task.name.encode())
        if machine.task_countdown is not None and not machine.is_off:
            machine.task_countdown -= 1
            if machine.task_countdown <= 0:
                machine.stop()

    def _look_at_the_clock(self) -> None:
        """Tasks that wake each other up again and again leave the clock no moment to jump: end that."""
        now = trio.current_time()
        self._standing = self._standing + 1 if now == self._then else 0
        self._then = now
        if self._standing * LOOK_EVERY > MAX_STEPS_AT_ONCE:
            self._machine.goes_in_circles = True
            self._machine.stop()


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


async def _inline(function: Callable[[*Ts], T], *args: *Ts) -> T:
    await trio.lowlevel.checkpoint()
    result = function(*args)
    await trio.lowlevel.cancel_shielded_checkpoint()
    return result
