"""`python -m tests.cluster --seed N`: real nodes under the faults of one seed, or a replay of one that failed.

With `--stream` it is a worker of `scripts/soak --nodes`: seed after seed, a line of JSON for each.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import traceback
from pathlib import Path

import click

from tests.cluster.schedule import PROFILES, Outcome, Story, run

SECONDS = 8.0


@click.command()
@click.option("--seed", type=int, required=True, help="Which run.")
@click.option("--profile", type=click.Choice(list(PROFILES)), help="Which nodes; without, the seed decides.")
@click.option("--seconds", type=click.FloatRange(min=0.5), default=SECONDS, show_default=True, help="Of faults.")
@click.option("--stream", type=click.IntRange(min=1), hidden=True, help="For soak: every so many'th seed, for ever.")
@click.option("--verbose", is_flag=True, help="Tell what happened also when every promise was kept.")
def main(seed: int, profile: str | None, seconds: float, stream: int | None, verbose: bool) -> None:
    """Let nodes meet the faults of a seed under load, and judge it. Exit status 1 if a promise was broken."""
    if stream is not None:
        for number in itertools.count(seed, stream):
            _tell_of(number, profile or profile_of(number), seconds)
    profile = profile or profile_of(seed)
    try:
        outcome = live(seed, profile, seconds)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    if verbose:
        click.echo("\n".join(outcome.story.lines))
    told = f"{outcome.faults} faults; {outcome.summary}; whole {outcome.settled_s:.1f} s after them"
    click.echo(f"seed {seed}, {profile}: {told}")


def profile_of(seed: int) -> str:
    """Each in turn, but the one without a mirror, which the harness is tested with."""
    mirrored = [name for name in PROFILES if name != "alone"]
    return mirrored[seed % len(mirrored)]


def live(seed: int, profile: str, seconds: float) -> Outcome:
    """In a directory that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="cluster-") as directory:
        return run(seed, profile, seconds, Path(directory))


def _tell_of(seed: int, profile: str, seconds: float) -> None:
    """Live a run, and tell the soak before and after."""
    _tell(begin=seed, replay=Story(profile, seed, seconds).command)
    try:
        outcome = live(seed, profile, seconds)
    except Exception as error:
        print("\n".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
        _tell(seed=seed, error=f"{type(error).__name__}: {error}")
    else:
        _tell(seed=seed, cycles=outcome.faults)


def _tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
