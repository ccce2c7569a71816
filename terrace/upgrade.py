"""The daemon's replacement while clients stay connected: who asks for it, how far it is, what came of it.

`terrace upgrade` and SIGHUP ask. The successor is started and loads its program while this daemon serves on; only then
are clients stopped (`wanted`). What is refused or fails before that costs nothing; what fails behind it costs a pause,
and this daemon goes on. The steps between the two processes are in `terrace.handover`.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

import trio

from terrace.config import Config
from terrace.handover import Estate, HandoverError, Predecessor, Successor
from terrace.pools import Pools
from tiers import TierError

log = logging.getLogger("terraced")

PATIENCE_S: Final = 0.25
"""What clients have under way gets so long to end; the rest is carried out by the successor."""
_ONE_CHILD: Final = frozenset({"docker-init", "tini", "tini-static", "dumb-init", "catatonit"})
"""Process 1 of containers (docker run --init), which ends when the process that it has started does."""
CHECKPOINT_S: Final = 10.0
"""So long the daemon tries to have little left to write when clients are stopped. If that isn't enough, closing the
pools could take as long as a disk that hangs, and clients of all pools would wait for it."""


@dataclass(frozen=True)
class Succession:
    """How this process came to serve in the place of another one."""

    from_pid: int
    from_version: str
    clients: int
    pause_s: float
    """How long clients waited, from the first that was stopped to the last that went on."""


def _is_a_container_s() -> bool:
    """Whether a container ends when this process does: it is process 1, or the one that process 1 was to start."""
    if os.getpid() == 1:
        return True
    with suppress(OSError):
        return os.getppid() == 1 and Path("/proc/1/comm").read_text(encoding="utf-8").strip() in _ONE_CHILD
    return False


async def _checkpoint(pools: Pools) -> str:
    """Have little left to write; why that takes too long, empty if it doesn't."""
    under_way = ""
    with trio.move_on_after(CHECKPOINT_S) as scope:
        for pool in pools.open_pools():
            under_way = pool.name
            with suppress(OSError):
                await pool.checkpoint()
    if not scope.cancelled_caught:
        return ""
    return (
        f"a checkpoint of pool {under_way} has not ended in {CHECKPOINT_S:g} s, and clients would wait for longer than "
        "that; try again when its devices are less busy, or --force"
    )


class Heir:
    """A successor, in its own process, until it has taken over."""

    def __init__(self, predecessor: Predecessor, estate: Estate) -> None:
        self.estate = estate
        self.succession: Succession | None = None
        self.predecessor = predecessor

    async def take_over(self, pools: Pools, config: Config, told: trio.Event) -> None:
        """All is opened: returns when it is this process that serves. Raises HandoverError if it is not.

        The caller tells the predecessor, which then ends this process, when nothing of it is left to be cleared away.
        """
        why = self._unfit(pools, config, told)
        if why:
            raise HandoverError(errno.EIO, why)
        predecessor_pid = os.getppid()
        await trio.to_thread.run_sync(self.predecessor.ready, abandon_on_cancel=True)
        pause_s = time.monotonic() - self.estate.since_s
        clients = len(self.estate.clients)
        self.succession = Succession(predecessor_pid, self.estate.version, clients, round(pause_s, 4))
        log.info("took over from process %d with %d clients, who waited for %.3f s", predecessor_pid, clients, pause_s)

    def _unfit(self, pools: Pools, config: Config, told: trio.Event) -> str:
        """Why this process must not take over; empty if it may."""
        if told.is_set():
            return "it was told to stop"
        for name in self.estate.pools:
            try:
                pools.pool(name)
            except OSError as error:
                return str(error)
        known = config.policies()
        for volume in pools.open_volumes():
            if volume.policy_name in self.estate.policies and volume.policy_name not in known:
                return (
                    f"{volume.name} has the policy {volume.policy_name!r}, which the configuration doesn't have any "
                    "more; give it another with `terrace volume policy` first"
                )
        return ""


class Upgrade:
    """Belongs to the trio thread."""

    def __init__(self, version: str) -> None:
        self.succession: Succession | None = None
        """How this process came to serve, where it is a successor itself."""
        self.obstacle: Callable[[], str] = lambda: "this terraced doesn't serve yet"
        """Says why not now; empty if nothing is in the way."""
        self.wanted = trio.Event()
        """A successor is loaded: clients are to be stopped, and `hand_over` to be called."""
        self.attempt = 0
        self._version = version
        self._force = False
        self._state: Literal["idle", "loading", "handing over"] = "idle"
        self._error: str | None = None
        self._asked = trio.Event()
        self._successor: Successor | None = None
        self._serving: int | None = None

    def status(self) -> dict[str, Any]:
        """For the control API."""
        return {
            "pid": os.getpid(),
            "version": self._version,
            "state": self._state,
            "attempt": self.attempt,
            "error": self._error,
            "succession": asdict(self.succession) if self.succession else None,
        }

    def request(self, *, force: bool = False) -> None:
        """Ask for it. Raises TierError EBUSY with what is in the way; `force` goes past that."""
        if self._state != "idle":
            raise TierError(errno.EBUSY, "an upgrade is under way already; `terrace status` shows when it is done")
        if _is_a_container_s():
            raise TierError(
                errno.ENOTSUP,
                "the container that this terraced runs in would end with it, and its successor too: restart the "
                "container, which disconnects clients",
            )
        if not force and (why := self.obstacle()):
            raise TierError(errno.EBUSY, why)
        self._state, self._error, self._force = "loading", None, force
        self.attempt += 1
        self._asked.set()

    async def request_on(self, signals: AsyncIterator[int]) -> NoReturn:
        """Ask at each signal; what is in the way goes into the log."""
        while True:
            await anext(signals)
            log.info("SIGHUP: handing over to a new terraced")
            try:
                self.request()
            except TierError as error:
                log.error("not handed over: %s", error)

    async def run(self, pools: Pools) -> None:
        """Start successors when asked, until one is loaded."""
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            try:
                self._successor = await Successor.start()
            except HandoverError as error:
                self._failed(error)
                continue
            log.info("terraced %s is loaded as process %d", self._successor.version, self._successor.pid)
            slow = await _checkpoint(pools)
            # What has begun while it was loaded is in the way too.
            if not self._force and (why := slow or self.obstacle()):
                successor, self._successor = self._successor, None
                await successor.kill()
                self._failed(HandoverError(errno.EBUSY, why))
                continue
            self._state = "handing over"
            self.wanted.set()
            return

    async def hand_over(self, lock: int, estate: Estate, told: trio.Event, committing: Callable[[int], None]) -> bool:
        """Whether the successor has taken over; then this process must not touch what it gave. Otherwise it goes on.

        `told` to stop, it isn't waited for. `committing` is called with the successor's process id before it serves.
        """
        successor, self._successor = self._successor, None
        assert successor is not None
        self.wanted = trio.Event()
        done = False
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await told.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            try:
                await successor.take(lock, estate)
                # No checkpoint that could be cancelled from here to the end: there is one decision.
                with trio.CancelScope(shield=True):
                    committing(successor.pid)
                    try:
                        await successor.commit()
                    except HandoverError:
                        committing(os.getpid())
                        raise
                done = True
            except HandoverError as error:
                self._failed(error)
            nursery.cancel_scope.cancel()
        if done:
            self._serving = successor.pid
            log.info("process %d serves now", successor.pid)
        self._state = "idle"
        return done

    def pass_on_stop(self) -> None:
        """Who was told to stop just when it handed over lets its successor stop. Synchronous."""
        if self._serving is not None:
            with suppress(ProcessLookupError):
                os.kill(self._serving, signal.SIGTERM)

    def abandon(self) -> None:
        """End a successor that is loaded and not needed any more. Synchronous."""
        if self._successor is not None:
            self._successor.discard()

    def _failed(self, error: HandoverError) -> None:
        self._state, self._error = "idle", str(error)
        log.error("not handed over, this terraced goes on: %s", error)
