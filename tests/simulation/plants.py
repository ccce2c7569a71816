"""Bugs to plant in the engine or its machine, each of which the search must find: proof that it can say no."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import trio

from tests.simulation.machine import Machine
from tiers.flush import Flusher
from tiers.recovery import _LogReader


def _skipping_flush_in(caller: str) -> Any:
    """A flusher that does nothing when this function of the engine asks."""
    honest = Flusher.flush

    async def flush(self: Flusher) -> None:
        if sys._getframe(1).f_code.co_name != caller:
            await honest(self)
        else:
            await trio.lowlevel.checkpoint()

    return mock.patch.object(Flusher, "flush", flush)


async def _always_intact(self: object, found: object) -> bool:
    return True


@contextlib.contextmanager
def _lying_disks() -> Iterator[None]:
    honest = Machine.__init__

    def init(self: Machine, *args: Any, **kwargs: Any) -> None:
        honest(self, *args, **kwargs)
        for medium in self.media:
            medium.lying_syncs = True

    with mock.patch.object(Machine, "__init__", init):
        yield


PLANTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "disk-whose-sync-does-nothing": _lying_disks,
    "checkpoint-before-its-data-is-durable": lambda: _skipping_flush_in("_attempt"),
    "flush-that-returns-at-once": lambda: _skipping_flush_in("flush"),
    "replay-that-takes-torn-batches": lambda: mock.patch.object(_LogReader, "is_on_medium", _always_intact),
}
