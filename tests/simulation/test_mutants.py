"""Proof that the simulation can fail: it catches every planted bug, on seeds on which the engine as it is passes.

For each mutant of `mutants.py` there is a scenario, a function of a seed that raises when the promise is broken: the
random search of the oracle where that finds the bug soon, else a machine on which the bug has more to do. The scenario
is run with the mutant planted over a range of seeds until it raises, and what it raises must be a verdict (of the
oracle, of the engine's own assertions, or an error that the engine has no reason for), not a crash of the mutant's own
making. Each of these seeds must pass without the mutant, or else the catch would mean nothing.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import trio

from tests.simulation.corruption import Scene
from tests.tiers.faults import PowerCutError
from tests.tiers.oracle import LAYOUTS
from tiers import Pool, Volume
from tiers.record import Kind

Scenario = Callable[[int], Any]

SEEDS = 40
"""A mutant that survives so many is not caught."""

# -- scenarios ---------------------------------------------------------------------------------------------------------


def storm(seed: int) -> None:
    """Writes, flushes, checkpoints and moves all at once on a slow machine that soon loses its power, again and again.

    Unlike the random search it does little else, so that most crashes fall into a flush, checkpoint or move.
    """
    rng = random.Random(seed)
    scene = Scene(seed, disks=rng.choice(LAYOUTS))
    scene.machine.pauses = rng.choice((2, 6, 12))
    scene.machine.cold_share = rng.choice((0.0, 0.3))

    async def flusher(volume: Volume) -> None:
        while True:
            mark = scene.model.mark
            await volume.flush()
            scene.model.flushed(mark)
            for _ in range(rng.randrange(12)):
                await trio.lowlevel.checkpoint()

    async def checkpointer(pool: Pool) -> None:
        while True:
            for _ in range(rng.randrange(60)):
                await trio.lowlevel.checkpoint()
            mark = scene.model.mark
            await pool.checkpoint()
            scene.model.flushed(mark)

    async def mover(pool: Pool) -> None:
        while True:
            for _ in range(rng.randrange(200)):
                await trio.lowlevel.checkpoint()
            await move_some(pool, rng)

    async def main() -> None:
        for life in range(5):
            with contextlib.suppress(PowerCutError):
                async with scene.opened() as (pool, volume):
                    scene.machine.countdown = rng.randrange(1, 250)
                    async with trio.open_nursery() as nursery:
                        if rng.random() < 0.8:
                            nursery.start_soon(flusher, volume)
                        if rng.random() < 0.8:
                            nursery.start_soon(checkpointer, pool)
                        if rng.random() < 0.5:
                            nursery.start_soon(mover, pool)
                        for _ in range(80):
                            await scene.operation(volume)
                            for _ in range(rng.randrange(6)):
                                await trio.lowlevel.checkpoint()
                        nursery.cancel_scope.cancel()
                    scene.machine.countdown = None
                    await scene.crash()
            scene.machine.countdown = None
            scene.restart(power_cut=life % 3 != 2)
        async with scene.opened():
            pass

    scene.machine.run(main)


async def move_some(pool: Pool, rng: random.Random) -> None:
    """Relocate a few sealed data segments, through the cleaner's own operations."""
    cleaner = pool._cleaner
    victims = [
        segment
        for segment in pool._engine.segments.by_id.values()
        if not segment.open and segment.kind is not Kind.MAP and segment.live + segment.pending
    ]
    rng.shuffle(victims)
    for victim in victims[:3]:
        if pool._engine.segments.by_id.get(victim.id) is victim:
            await cleaner._move_segment(victim, rng.choice(("fast", "base")))
    await cleaner._apply_staged()
