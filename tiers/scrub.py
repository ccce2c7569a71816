"""The scrubs of a pool: starting, pausing, resuming and stopping one, and what is known of them.

A scrub reads what the media hold of everything live, and names what is damaged before somebody needs it. It reads every
segment that was in use when it began and holds something live, device by device in the order of their places, past the
page cache and in large pieces; `scrubpass.py` does that. It changes nothing, but that a damaged block of which there is
another copy is written anew from that one (`mending.py`).

What a scrub knows (`scrubstate.py`) is saved every ten seconds and when it starts, pauses, stops or ends; after a crash
it goes on from there. Nothing else depends on it.
"""

import errno
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import trio

from tiers.errors import TierError
from tiers.scrubpass import MIN_RATE, Pass
from tiers.scrubstate import Damage, DeviceRun, History, Result, Run, ScrubFile, State

if TYPE_CHECKING:
    from tiers.engine import Engine

logger = logging.getLogger(__name__)

SAVE_INTERVAL_S = 10.0


@dataclass(frozen=True)
class DeviceScrub:
    """How far the newest scrub is on one device, and how many blocks it found damaged there."""

    path: str
    done_bytes: int
    total_bytes: int
    errors: int
    repaired: int = 0


@dataclass(frozen=True)
class ScrubStatus:
    """The newest scrub of a pool, and the last that came to its end. Seconds since 1970; bytes; bytes a second.

    `rate` 0: unlimited. `eta_s`: None where it can't be told. `damage`: the damaged ranges by name, neighbours joined;
    `damage_omitted` more were found.
    """

    state: Literal["never"] | State
    scheduled: bool
    started_at: float | None
    finished_at: float | None
    active_s: float
    rate: int
    done_bytes: int
    total_bytes: int
    bytes_per_s: float
    eta_s: float | None
    errors: int
    devices: list[DeviceScrub]
    damage: list[Damage]
    damage_omitted: int
    last: Result | None
    since: float
    repaired: int = 0
    """Damaged blocks that were had from another copy of their volume; they are no errors."""


class Scrubber:
    """The scrubs of one pool, one at a time. All of it belongs to the trio thread."""

    def __init__(self, engine: "Engine", store: ScrubFile) -> None:
        self._engine = engine
        self._store = store
        self._history = History(time.time())
        self._wake = trio.Event()
        self._scope: trio.CancelScope | None = None
        self._ended = trio.Event()
        self._saving = trio.Lock()
        self._saved = b""
        self._save_failed = False
        self._pass: Pass | None = None
        self._resumed_at = 0.0
        self.busy_clock: Callable[[], float] = time.thread_time
        """Tells how long the loop worked for others: CPU time, for on a busy machine other processes take time too."""

    # -- what operators ask for --------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Recall earlier scrubs. One that ran when the pool was left is `interrupted`; `start` resumes it."""
        history = await self._engine.offload(self._store.load)
        if history is None:
            await self._save()
            return
        self._history = history
        self._saved = self._store.encode(history)
        if history.run is not None and history.run.state == "running":
            history.run.state = "interrupted"

    @property
    def running(self) -> bool:
        """Whether a scrub is under way now."""
        return self._history.run is not None and self._history.run.state == "running"

    async def start(self, rate: int | None = None, *, scheduled: bool = False) -> ScrubStatus:
        """Start a scrub, or resume one that did not come to its end; returns at once. One that runs goes on.

        `rate`: bytes a second over all devices, 0 for no limit; None is what the resumed one had, or the settings'.
        `scheduled`: nobody asked for it, so the schedule may pause it. Raises TierError EINVAL.
        """
        if rate is not None and rate and rate < MIN_RATE:
            raise TierError(errno.EINVAL, f"a scrub can't be held to {rate} bytes a second: give at least 64K, or 0")
        run = self._history.run
        if run is None or run.state in ("stopped", "finished"):
            limit = self._engine.segments.next_id
            run = self._history.run = Run("interrupted", scheduled, time.time(), limit)
        run.scheduled = run.scheduled and scheduled
        if rate is not None:
            run.rate = rate
            if self._pass is not None:
                self._pass.pacer.rate = rate
        if run.state != "running":
            run.state = "running"
            self._pass = Pass(self._engine, run, self._rate(run), self.busy_clock)
            self._resumed_at = trio.current_time()
            self._ended = trio.Event()
            self._wake.set()
            await self._save()
        return self.status()

    def _rate(self, run: Run) -> int:
        return self._engine.settings.scrub_rate_bytes if run.rate is None else run.rate

    async def pause(self, *, waiting: bool = False) -> ScrubStatus:
        """Halt the scrub that runs; `start` resumes it. `waiting`: it is the schedule that asks. Raises ENOENT."""
        run = self._require_run("running") if waiting else self._require_run("running", "waiting", "interrupted")
        await self._halt(run, "waiting" if waiting else "paused")
        return self.status()

    async def stop(self) -> ScrubStatus:
        """End the scrub for good: the next one starts at the beginning. Raises ENOENT if there is none."""
        run = self._require_run("running", "paused", "waiting", "interrupted")
        run.finished_at = time.time()
        await self._halt(run, "stopped")
        return self.status()

    def _require_run(self, *states: str) -> Run:
        run = self._history.run
        if run is None or run.state not in states:
            name = self._engine.pool_name
            raise TierError(
                errno.ENOENT, f"no scrub of pool {name} is running: see `terrace pool scrub {name} --status`"
            )
        return run

    async def _halt(self, run: Run, state: State) -> None:
        was_running = run.state == "running"
        if was_running:
            run.active_s += trio.current_time() - self._resumed_at
        run.state = state
        if was_running:
            if self._scope is not None:
                self._scope.cancel()
                await self._ended.wait()
            logger.info("the scrub of pool %s is %s", self._engine.pool_name, state)
        await self._save()

    async def close(self) -> None:
        """The pool is closing, its tasks are gone: keep how far a scrub has come."""
        run = self._history.run
        if run is not None and run.state == "running":
            run.active_s += trio.current_time() - self._resumed_at
        if self._store.encode(self._history) != self._saved:
            await self._save()

    def status(self, most_damage: int | None = None) -> ScrubStatus:
        """The numbers of the moment, with at most so many damaged ranges."""
        run = self._history.run
        if run is None:
            nothing: list[Damage] = []
            return ScrubStatus(
                *("never", False, None, None, 0.0, 0, 0, 0, 0.0, None, 0, [], nothing, 0, self._history.last),
                since=self._history.since,
            )
        running = run.state == "running"
        devices = []
        for device in self._engine.devices:
            done = run.devices.get(device.index, DeviceRun())
            devices.append(
                DeviceScrub(device.path, done.done_bytes, done.done_bytes + done.left_bytes, done.errors, done.repaired)
            )
        left = {index: device.left_bytes for index, device in run.devices.items()}
        speeds: dict[int, float] = {}
        if running and self._pass is not None:
            for index, speed in self._pass.speeds.items():
                speeds[index] = speed.value(run.devices[index].done_bytes) if index in run.devices else 0.0
        return ScrubStatus(
            run.state,
            run.scheduled,
            run.started_at,
            run.finished_at,
            run.active_s + (trio.current_time() - self._resumed_at if running else 0.0),
            self._rate(run),
            run.done_bytes,
            sum(device.total_bytes for device in devices),
            sum(speeds.values()),
            _eta(left, speeds, self._rate(run)) if running else None,
            run.errors,
            devices,
            [replace(damage) for damage in run.damage[:most_damage]],
            run.damage_omitted,
            self._history.last,
            since=self._history.since,
            repaired=run.repaired,
        )

    def mended(self, volume: str, offset: int, length: int) -> None:
        """Blocks of a volume, by name, that this scrub may have listed as damaged were written anew."""
        run, last = self._history.run, self._history.last
        if run is None:
            return
        paths = {device.path: device.index for device in self._engine.devices}
        count = run.mended(volume, offset, length, paths.get)
        if count and last is not None and run.state == "finished" and last.started_at == run.started_at:
            last.errors, last.repaired = run.errors, run.repaired

    # -- the task ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """The task: a pass whenever one is started."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            run = self._history.run
            if run is None or run.state != "running":
                continue
            ended = self._ended
            try:
                with trio.CancelScope() as self._scope:
                    assert self._pass is not None
                    await self._complete(run, self._pass)
            except Exception:
                # What is damaged is no exception here: this is a bug, and no reason to stop serving.
                logger.exception("the scrub of pool %s failed and is paused", self._engine.pool_name)
                await self._halt_after_failure(run)
            finally:
                self._scope = None
                ended.set()

    async def _halt_after_failure(self, run: Run) -> None:
        if run.state == "running":
            run.active_s += trio.current_time() - self._resumed_at
            run.state = "paused"
            await self._save()

    async def _complete(self, run: Run, scrub: Pass) -> None:
        """Read everything that is left of a run, and conclude it."""
        name = self._engine.pool_name
        logger.info("scrubbing pool %s, from %s on", name, f"{run.done_bytes} bytes" if run.done_bytes else "its start")
        async with trio.open_nursery() as saver:
            saver.start_soon(self._save_regularly)
            await scrub.read_all()
            saver.cancel_scope.cancel()
        if run.state != "running":
            return  # it was halted just now
        run.active_s += trio.current_time() - self._resumed_at
        run.state = "finished"
        run.finished_at = time.time()
        self._history.last = Result(
            run.started_at, run.finished_at, run.active_s, run.done_bytes, run.errors, run.repaired
        )
        logger.log(
            logging.ERROR if run.errors else logging.INFO,
            "the scrub of pool %s is finished: %d bytes read in %.0f s, %s",
            name,
            run.done_bytes,
            run.active_s,
            (f"{run.errors} errors: `terrace pool scrub {name} --status` names them" if run.errors else "no errors")
            + (f", {run.repaired} damaged blocks were repaired from another copy" if run.repaired else "")
            + (f"; blocks are lost already: `terrace pool check {name}` names them" if self._engine.losses else ""),
        )
        await self._save()

    async def _save_regularly(self) -> None:
        while True:
            await trio.sleep(SAVE_INTERVAL_S)
            await self._save()

    async def _save(self) -> None:
        """Keep what is known. Failing costs only that a restart begins earlier: it is logged once."""
        async with self._saving:
            text = self._store.encode(self._history)
            try:
                await self._engine.offload(self._store.save, text)
                self._saved = text
                self._save_failed = False
            except OSError as error:
                if not self._save_failed:
                    logger.warning(
                        "the progress of pool %s's scrub can't be saved (%s): a restart will begin it anew",
                        self._engine.pool_name,
                        error.strerror or error,
                    )
                self._save_failed = True


def _eta(left: dict[int, int], speeds: dict[int, float], rate: int) -> float | None:
    """Seconds until the slowest device is done, and until all are at the speed that they have together."""
    total = sum(left.values())
    speed = sum(speeds.values())
    if left and not total:
        return 0.0
    if not speed:
        return None
    seconds = [total / speed, total / rate if rate else 0.0]
    seconds += [left[index] / speeds[index] for index in left if speeds.get(index)]
    return max(seconds)
