"""scripts/soak: fresh seeds of a simulation, or of real nodes under faults, until time is up, on all cores.

Each worker is a process of `python -m tests.simulation --stream`, with `--nodes` of `tests.cluster`, with `--mirrors`
of `tests.simulation.mirrors`, which tells of each seed when it begins and when it ends. A seed that takes too long by
the wall clock, or kills its worker, has failed too. Ctrl-C ends with the summary.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import click
import trio
from rich.console import Console
from rich.live import Live
from rich.text import Text

from tests.cluster.schedule import PROFILES as NODE_PROFILES
from tests.simulation.mirrors.mutants import MUTANTS
from tests.simulation.mirrors.worlds import WORLDS
from tests.simulation.mutants import PLANTS
from tests.simulation.workload import PROFILES

SEED_TIMEOUT_S = 300.0
"""A seed takes about a second of CPU."""
MAX_FAILURES = 5


@dataclass
class Tally:
    """What has happened so far."""

    first_seed: int
    minutes: float
    wanted_cycles: int | None
    wanted_seeds: int | None = None
    what: str = "crashes"
    """What is recovered from."""
    began: float = field(default_factory=time.monotonic)
    seeds: int = 0
    cycles: int = 0
    longest_stall_s: float = 0.0
    """Of simulated mirrors: the longest time from the last fault until one was whole again."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """(what went wrong, the command that replays it)"""

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began

    @property
    def done(self) -> bool:
        return (
            len(self.failures) >= MAX_FAILURES
            or (self.wanted_cycles is not None and self.cycles >= self.wanted_cycles)
            or (self.wanted_seeds is not None and self.seeds >= self.wanted_seeds)
        )

    def line(self) -> str:
        """The present state in one line."""
        rate = self.cycles / max(self.elapsed_s, 1e-3)
        left = self.minutes * 60 - self.elapsed_s
        if self.wanted_cycles is not None and rate:
            left = min(left, (self.wanted_cycles - self.cycles) / rate)
        if self.wanted_seeds is not None and self.seeds:
            left = min(left, (self.wanted_seeds - self.seeds) * self.elapsed_s / self.seeds)
        stall = f"longest stall {self.longest_stall_s:.1f} simulated s, " if self.longest_stall_s else ""
        return (
            f"{self.cycles:,} {self.what} recovered from, {self.seeds:,} seeds, {rate:.1f} {self.what}/s, "
            f"{stall}{_clock(self.elapsed_s)} elapsed, {_clock(max(0.0, left))} left, {len(self.failures)} failed"
        )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


@click.command()
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=10.0, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), help="The first seed. Without, one that was never used.")
@click.option("--cycles", type=click.IntRange(min=1), help="Stop after so many crashes.")
@click.option("--seeds", type=click.IntRange(min=1), help="Stop after so many seeds.")
@click.option("--nodes", is_flag=True, help="Real nodes in network namespaces, under faults of the network and kills.")
@click.option("--mirrors", is_flag=True, help="Simulated mirrors of two and three nodes, under faults of all kinds.")
@click.option("--profile", type=click.Choice([*PROFILES, *NODE_PROFILES]), help="Only this kind of run.")
@click.option("--world", type=click.Choice(list(WORLDS)), help="With --mirrors: in this world.")
@click.option("--workers", type=click.IntRange(min=1), default=os.cpu_count(), show_default="one a core")
@click.option("--plant", type=click.Choice([*PLANTS, *MUTANTS]), help="With this bug planted, which must be found.")
def main(
    minutes: float,
    seed: int | None,
    cycles: int | None,
    seeds: int | None,
    nodes: bool,
    mirrors: bool,
    profile: str | None,
    world: str | None,
    workers: int,
    plant: str | None,
) -> None:
    """Crash and recover simulated pools, with fresh seeds, until time is up. Exit status 1 if a promise was broken."""
    if mirrors and (nodes or profile):
        raise click.UsageError("--mirrors is a kind of run of its own: leave --nodes and --profile out")
    if world is not None and not mirrors:
        raise click.UsageError("--world is one of simulated mirrors: give --mirrors too")
    if profile is not None and profile not in (NODE_PROFILES if nodes else PROFILES):
        there = ", ".join(NODE_PROFILES if nodes else PROFILES)
        raise click.UsageError(f"--profile {profile} is not for this kind of run: choose from {there}")
    if plant is not None and (nodes or plant not in (MUTANTS if mirrors else PLANTS)):
        there = "none" if nodes else ", ".join(MUTANTS if mirrors else PLANTS)
        raise click.UsageError(f"--plant {plant} is not for this kind of run: choose from {there}")
    first = random.SystemRandom().randrange(1 << 40) if seed is None else seed
    tally = Tally(first, minutes, cycles, seeds, "faults" if nodes or mirrors else "crashes")
    module = "tests.cluster" if nodes else "tests.simulation.mirrors" if mirrors else "tests.simulation"
    options = [
        *(["--profile", profile] if profile else []),
        *(["--world", world] if world else []),
        *(["--plant", plant] if plant else []),
    ]
    click.echo(f"seeds from {tally.first_seed} on, {workers} workers, for {minutes:g} minutes")
    try:
        trio.run(_soak, tally, workers, module, options)
    except* KeyboardInterrupt:
        click.echo("interrupted")
    click.echo(tally.line())
    for problem, command in tally.failures:
        click.echo(f"\nFAILED: {problem}\nreplay: {command}")
    sys.exit(1 if tally.failures else 0)


async def _soak(tally: Tally, workers: int, module: str, options: list[str]) -> None:
    with trio.move_on_after(tally.minutes * 60):
        async with trio.open_nursery() as nursery:
            for i in range(workers):
                command = [sys.executable, "-m", module, *options]
                nursery.start_soon(_worker, tally, tally.first_seed + i, workers, command, nursery.cancel_scope.cancel)
            nursery.start_soon(_show, tally)


async def _show(tally: Tally) -> None:
    """The line of progress: in place on a terminal, else now and then."""
    console = Console(stderr=True)
    if not console.is_terminal:
        while True:
            await trio.sleep(30)
            console.print(tally.line(), highlight=False, soft_wrap=True)
    with Live(Text(tally.line()), console=console, auto_refresh=False, transient=True) as live:
        while True:
            live.update(Text(tally.line()), refresh=True)
            await trio.sleep(0.25)


async def _worker(tally: Tally, first: int, step: int, program: list[str], stop: Callable[[], None]) -> None:
    """A process that lives every `step`-th seed; a fresh one after a failure."""
    while True:
        last = await _stream(tally, first, step, program, stop)
        first = last + step


async def _stream(tally: Tally, first: int, step: int, program: list[str], stop: Callable[[], None]) -> int:
    command = [*program, f"--seed={first}", f"--stream={step}"]
    # A group of its own: Ctrl-C is the parent's to handle.
    process = await trio.lowlevel.open_process(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and process.stderr is not None
    errors = process.stderr
    current, replay, tail = first, " ".join(command), bytearray()

    async def keep_tail() -> None:
        async for chunk in errors:
            tail.extend(chunk)
            del tail[:-2000]

    def failed(problem: str) -> None:
        tally.failures.append((problem, replay))
        tally.seeds += 1
        click.echo(f"failed: {replay}", err=True)  # at once: hours may pass before the summary
        if tally.done:
            stop()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_tail)
            lines = _Lines(process.stdout)
            while True:
                with trio.move_on_after(SEED_TIMEOUT_S) as patience:
                    message = await lines.next()
                if patience.cancelled_caught:
                    failed(f"seed {current} takes more than {SEED_TIMEOUT_S:.0f} s")
                    nursery.cancel_scope.cancel()
                    break
                if message is None:
                    failed(f"the worker ended in seed {current}: {tail.decode(errors='replace')[-500:]}")
                    break
                if "begin" in message:
                    current, replay = message["begin"], message["replay"]
                elif "error" in message:
                    failed(f"seed {current}: {message['error']}")
                else:
                    tally.seeds += 1
                    tally.cycles += message["cycles"]
                    tally.longest_stall_s = max(tally.longest_stall_s, message.get("stall_s", 0.0))
                    if tally.done:
                        stop()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
        with trio.CancelScope(shield=True):
            await process.wait()
    return current


class _Lines:
    """Lines of JSON from a stream."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def next(self) -> dict[str, Any] | None:
        """The next one; None at the end."""
        while (end := self._buffer.find(b"\n")) < 0:
            chunk = await self._stream.receive_some()
            if not chunk:
                return None
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        result: dict[str, Any] = json.loads(line)
        return result


if __name__ == "__main__":
    main()
