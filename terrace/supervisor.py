"""What the daemon tells systemd while it lives (sd_notify(3)): that it lives, what it does, and for how long it may.

One task sends, from trio's loop: a loop that hangs sends nothing, and the watchdog replaces the daemon. While pools are
opened or closed each message asks for more time, so that a long recovery isn't taken for a failure. Opening may take as
long as it takes, for whoever starts anew would begin anew; closing at most `CLOSING_S`, for what is cut short there
costs a replay at the next start and nothing else. Where nobody asked (no NOTIFY_SOCKET), nothing is done.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from enum import Enum

import trio

from terrace.pools import Pools
from terrace.sdnotify import notify, wanted

log = logging.getLogger(__name__)

INTERVAL_S = 5.0
"""At most this between two messages; half the watchdog's time where that is less."""
EXTENSION_S = 60.0
CLOSING_S = 900.0


class Phase(Enum):
    OPENING = "opening"
    SERVING = "serving"
    HANDING_OVER = "handing over"
    CLOSING = "closing"


class Supervisor:
    """Whoever started the daemon and watches over it."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._interval_s = INTERVAL_S
        self._watched = False
        watchdog_s = watchdog_seconds(environment)
        if watchdog_s is not None:
            self._watched = True
            self._interval_s = min(INTERVAL_S, watchdog_s / 2)
        self._phase = Phase.OPENING
        self._since_s = time.monotonic()
        self._pools: Pools | None = None
        self._clients: Callable[[], int] = lambda: 0

    async def run(self) -> None:
        """The task; returns at once where nobody asked."""
        while wanted():
            self._post()
            await trio.sleep(self._interval_s)

    def opening(self, pools: Pools) -> None:
        """These are being opened."""
        self._pools = pools

    def ready(self, clients: Callable[[], int]) -> None:
        """Clients are served; `clients` counts them."""
        self._clients = clients
        self._enter(Phase.SERVING, "READY=1")

    def stopping(self) -> None:
        """The daemon was told to stop."""
        self._enter(Phase.CLOSING, "STOPPING=1")

    def reloading(self) -> None:
        """Another process is about to serve in the place of this one; else `ready` comes again."""
        notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        self._enter(Phase.HANDING_OVER)

    def succeeded_by(self, pid: int) -> None:
        """From now on that process is the service, and speaks for it."""
        notify(f"MAINPID={pid}")

    def _enter(self, phase: Phase, *states: str) -> None:
        self._phase, self._since_s = phase, time.monotonic()
        notify(*states, f"STATUS={self.status()}")

    def _post(self) -> None:
        states = [f"STATUS={self.status()}"]
        if self._watched:
            states.append("WATCHDOG=1")
        elapsed_s = time.monotonic() - self._since_s
        if self._phase is Phase.OPENING or (self._phase is Phase.CLOSING and elapsed_s < CLOSING_S):
            states.append(f"EXTEND_TIMEOUT_USEC={int(EXTENSION_S * 1e6)}")
        notify(*states)

    def status(self) -> str:
        """A line for `systemctl status`."""
        slots = self._pools.slots() if self._pools else []
        is_open = [slot.name for slot in slots if slot.pool is not None]
        failed = [slot.name for slot in slots if slot.error is not None]
        pending = [slot.name for slot in slots if slot.pool is None and slot.error is None]
        elapsed = f"{time.monotonic() - self._since_s:.0f} s"
        trouble = f", not open: {', '.join(failed)}" if failed else ""
        if self._phase is Phase.OPENING:
            if not pending:
                return f"starting: {_count(len(is_open), 'pool')} open{trouble}"
            return (
                f"opening pools: {len(is_open)} of {len(slots)} open, recovering {', '.join(pending)} "
                f"({elapsed}){trouble}"
            )
        if self._phase is Phase.HANDING_OVER:
            return f"handing over to a new terraced ({elapsed})"
        if self._phase is Phase.CLOSING:
            waiting = [slot.name for slot in slots if not slot.closed.is_set() and slot.error is None]
            if not waiting:
                return "closed all pools"
            return f"finishing requests and closing pools: {', '.join(waiting)} ({elapsed})"
        volumes = sum(len(slot.pool.volumes()) for slot in slots if slot.pool is not None)
        return (
            f"serving {_count(len(is_open), 'pool')}, {_count(volumes, 'volume')}, "
            f"{_count(self._clients(), 'client')}{trouble}"
        )


def watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    """How long the supervisor lets this process be silent (sd_watchdog_enabled(3)); None: for ever."""
    text = environment.get("WATCHDOG_USEC", "")
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None  # meant for a process that started us
    if not text:
        return None
    if not text.isascii() or not text.isdecimal() or int(text) == 0:
        log.warning("WATCHDOG_USEC is %r, which is no number of microseconds: there is no watchdog", text)
        return None
    return int(text) / 1e6


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"
