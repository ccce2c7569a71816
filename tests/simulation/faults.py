"""What goes wrong with devices while they are used, by seed: refused writes, failing reads and syncs, slowness.

What a power cut does to unsynced writes is the medium's own (`Medium.power_cut`).
"""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Iterator
from dataclasses import dataclass

import trio

from tests.simulation.machine import Machine
from tests.simulation.medium import Medium

SPELL_S = 0.05
SLOW_S = 0.2


@dataclass(frozen=True)
class Faults:
    """How often what fails. Shares are of the operations of that kind."""

    refused_writes: float = 0.0
    """Writes that fail with EIO or ENOSPC, or are cut short, after any part of their bytes was taken."""
    read_spells: float = 0.0
    """Reads that begin a spell in which every read of that device fails with EIO, and which then passes."""
    failed_sync: float = 0.0
    """The chance that in one life one fdatasync of one device fails, which drops what was dirty."""
    slow: float = 0.0
    """Reads and syncs that take long."""
    while_opening: float = 0.0
    """The chance that a pool is opened while all this goes on."""

    def __bool__(self) -> bool:
        return self != Faults()


class Injector:
    """Makes the media of a machine fail, while it is `active`."""

    def __init__(self, machine: Machine, faults: Faults, rng: random.Random) -> None:
        self.faults = faults
        self.active = False
        self._machine = machine
        self._rng = rng
        self._spell_ends: dict[str, float] = {}
        self._syncs_to_failure: int | None = None
        for medium in machine.media:
            self.infect(medium)

    def begin_life(self) -> None:
        """Decide whether a sync is to fail in the life that begins."""
        self._spell_ends.clear()
        fails = self._rng.random() < self.faults.failed_sync
        self._syncs_to_failure = self._rng.choice((1, 3, 10, 30)) if fails else None

    @contextlib.contextmanager
    def calm(self) -> Iterator[None]:
        """Nothing fails in here."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before

    def infect(self, medium: Medium) -> None:
        """Let a medium fail from now on as the others do."""
        rng, faults = self._rng, self.faults

        def on_write(offset: int, length: int) -> tuple[int, int] | None:
            if not self.active or rng.random() >= faults.refused_writes:
                return None
            return rng.choice((errno.EIO, errno.ENOSPC, 0)), rng.choice((0, 0, rng.randrange(length + 1)))

        def on_read(offset: int, length: int) -> int | None:
            if not self.active or not faults.read_spells:
                return None
            now = trio.current_time()
            if rng.random() < faults.read_spells:
                self._spell_ends[medium.path] = now + rng.random() * SPELL_S
            return errno.EIO if now <= self._spell_ends.get(medium.path, -1.0) else None

        async def dawdle() -> None:
            if self.active and rng.random() < faults.slow:
                await trio.sleep(rng.random() * SLOW_S)

        async def before_sync() -> None:
            await dawdle()
            if self.active and self._syncs_to_failure is not None:
                self._syncs_to_failure -= 1
                if self._syncs_to_failure == 0:
                    self._syncs_to_failure = None
                    medium.failing_syncs = 1

        medium.on_write = on_write
        if faults.read_spells:
            medium.on_read = on_read
        if faults.slow:
            medium.before_read = lambda offset, length: dawdle()
        if faults.slow or faults.failed_sync:
            medium.before_sync = before_sync
