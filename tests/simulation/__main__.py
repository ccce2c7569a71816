"""`python -m tests.simulation --seed N`: live one seed, or replay one that failed.

With `--stream` it is a worker of scripts/soak: seed after seed, a line of JSON for each.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import sys
import traceback

import click

from tests.simulation.failpoints import failpoint_names
from tests.simulation.mutants import PLANTS
from tests.simulation.workload import PROFILES, Run


@click.command()
@click.option("--seed", type=int, required=True, help="Which run.")
@click.option("--profile", type=click.Choice(list(PROFILES)), help="Which kind of run; without, the seed decides.")
@click.option(
    "--failpoint",
    "failpoints",
    type=click.Choice(failpoint_names()),
    multiple=True,
    help="Crash there, in place of elsewhere. Several: in turn.",
)
@click.option("--plant", type=click.Choice(list(PLANTS)), help="With this bug in the engine, which must be found.")
@click.option("--stream", type=click.IntRange(min=1), hidden=True, help="For soak: every so many'th seed, for ever.")
@click.option("--verbose", is_flag=True, help="Show what the engine logs.")
def main(
    seed: int, profile: str | None, failpoints: tuple[str, ...], plant: str | None, stream: int | None, verbose: bool
) -> None:
    """Live one seed of the simulation and judge it. Exit status 1 if the promise was broken."""
    logging.basicConfig(level=logging.INFO if verbose else logging.CRITICAL, format="%(name)s: %(message)s")
    run = Run.of(seed, profile, failpoints)
    with PLANTS[plant]() if plant else contextlib.nullcontext():
        if stream is not None:
            for number in itertools.count(seed, stream):
                _tell_of(Run.of(number, profile, failpoints), plant)
        try:
            driver = run.live(digest=True)
        except Exception:
            traceback.print_exc()
            click.echo(f"\nreplay: {run.command(plant)}")
            sys.exit(1)
    click.echo(
        f"seed {seed}, {run.profile}: {driver.cycles} crashes recovered from, {driver.full_errors} operations refused, "
        f"{driver.read_errors} reads failed, digest {driver.machine.fingerprint()}"
    )


def _tell_of(run: Run, plant: str | None) -> None:
    """Live a run, and tell the soak before and after."""
    _tell(begin=run.seed, replay=run.command(plant))
    try:
        driver = run.live()
    except Exception as error:
        _tell(seed=run.seed, error=f"{type(error).__name__}: {error}")
    else:
        _tell(seed=run.seed, cycles=driver.cycles)


def _tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
