"""`python -m tests.simulation.mirrors --seed N`: one life of a mirror, or one that failed once more.

With `--stream` it is a worker of scripts/soak: seed after seed, a line of JSON for each.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import logging
import os
import sys
import traceback

import click

from tests.simulation.mirrors.life import Life, digest, live
from tests.simulation.mirrors.mutants import MUTANTS
from tests.simulation.mirrors.worlds import WORLDS


@click.command()
@click.option("--seed", type=int, required=True, help="Which life.")
@click.option("--plant", type=click.Choice(list(MUTANTS)), help="With this bug, which must be found.")
@click.option("--world", type=click.Choice(list(WORLDS)), default="life", help="In this world; see `worlds`.")
@click.option("--stream", type=click.IntRange(min=1), hidden=True, help="For soak: every so many'th seed, for ever.")
@click.option("--verbose", is_flag=True, help="Show what is logged, and the schedule also of a life that is well.")
def main(seed: int, plant: str | None, world: str, stream: int | None, verbose: bool) -> None:
    """Live one life of a mirror, and judge it. Exit status 1 if a promise was broken."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The order of a set of strings is the process's own otherwise.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONHASHSEED": "0"})
    logging.basicConfig(level=logging.INFO if verbose else logging.CRITICAL, format="%(name)s: %(message)s")
    with MUTANTS[plant]() if plant else contextlib.nullcontext():
        if stream is not None:
            for number in itertools.count(seed, stream):
                _tell_of(number, plant, world)
        try:
            life = live(seed, WORLDS[world])
        except Exception as error:
            traceback.print_exception(error)
            click.echo(f"\nreplay: {command(seed, plant, world)}")
            sys.exit(1)
    if verbose:
        click.echo("\n".join(life.schedule))
    click.echo(f"seed {seed}: {told(life)}, digest {digest(life)}")


def told(life: Life) -> str:
    """What has happened, in a line."""
    counts = life.counts
    return (
        f"{life.shape} nodes, {counts['acknowledged']} batches acknowledged, {counts['reads']} reads, "
        f"{counts['promotions']} terms served, whole {life.ends_s:.1f} s after the last fault"
    )


def command(seed: int, plant: str | None, world: str = "life") -> str:
    """What lives the same life again."""
    elsewhere = f" --world={world}" if world != "life" else ""
    return f"python -m tests.simulation.mirrors --seed={seed}{elsewhere}" + (f" --plant='{plant}'" if plant else "")


def _tell_of(seed: int, plant: str | None, world: str) -> None:
    _tell(begin=seed, replay=command(seed, plant, world))
    try:
        life = live(seed, WORLDS[world])
    except Exception as error:
        _tell(seed=seed, error=first_line(error))
    else:
        _tell(seed=seed, cycles=life.faults_met, stall_s=life.ends_s)
        del life
    gc.collect()  # media are large, and the collector doesn't run while a life does


def first_line(error: BaseException) -> str:
    """The first error of a group, in a line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"[:600]


def _tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
