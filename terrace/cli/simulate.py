"""`terrace policy simulate`: what a policy and a size of the fast tier would make of a recorded load."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from terrace.cli.context import SIZE, SizeCommand
from terrace.cli.output import duration, output_option, patience, show_facts, show_json, show_table
from terrace.sizes import format_size

if TYPE_CHECKING:
    from terrace.simulate import Figures
    from terrace.trace import Trace
    from tiers import Policy

MIB = 1 << 20


@click.command(cls=SizeCommand)
@click.option(
    "--trace",
    "trace_file",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="fio's iolog (version 2 or 3) or blkparse's text; may be compressed with gzip.",
)
@click.option("--policy-file", type=click.Path(path_type=Path), metavar="FILE", help="A configuration with policies.")
@click.option("--policy", "names", multiple=True, metavar="NAME", help="A policy of it; repeat to compare. [default]")
@click.option("--fast", type=SIZE, multiple=True, required=True, help="Size of the fast tier; repeat to compare.")
@click.option("--base", type=SIZE, help="Size of the base tier.  [twice what the trace touches]")
@output_option
def simulate(
    trace_file: Path,
    policy_file: Path | None,
    names: tuple[str, ...],
    fast: tuple[int, ...],
    base: int | None,
    output: str,
) -> None:
    """Replay a block trace against policies and sizes of the fast tier.

    Prints how many reads the fast tier would answer, what would be moved each way, and the write amplification. Needs
    no daemon. Heat and decisions are the engine's own; segments are a model of it, without metadata and compression.
    """
    from terrace.simulate import Simulation
    from terrace.trace import read_trace

    policies = _policies(policy_file, names)
    size = _size_of(trace_file)
    with patience(f"Reading {trace_file}") as advance:
        trace = read_trace(trace_file, lambda done: advance(done, size))
    runs: list[tuple[str, int, int, Figures]] = []
    for name, policy in policies.items():
        for fast_bytes in fast:
            with _progress(f"Simulating {name}, {format_size(fast_bytes)} fast", len(trace)) as tell:
                simulation = Simulation(trace, policy, fast_bytes, base)
                runs.append((name, fast_bytes, simulation.base_bytes, simulation.run(tell)))
    if output == "json":
        show_json({"trace": _about(trace, trace_file), "runs": [_plain(*run) for run in runs]})
    else:
        _show(trace, trace_file, runs)


def _policies(file: Path | None, names: tuple[str, ...]) -> Mapping[str, Policy]:
    """The policies that are asked for, by name."""
    from terrace.config import load_config
    from terrace.schema import ConfigError

    try:
        known = load_config(file).policies()
    except ConfigError as error:
        raise click.ClickException("; ".join(error.problems)) from None
    wanted = names or ("default",)
    for name in wanted:
        if name not in known:
            where = f"{file} has" if file else "without --policy-file there is only the policy default, and"
            listed = f": it has {', '.join(known)}" if file else ""
            raise click.ClickException(f"{where} no policy {name!r}{listed}")
    return {name: known[name] for name in wanted}


def _size_of(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error while somebody watches."""
    from rich import progress
    from rich.console import Console

    err = Console(stderr=True)
    bar = progress.Progress(
        progress.TextColumn(what),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("ETA"),
        progress.TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=total)
        told = 0

        def tell(done: int) -> None:
            nonlocal told
            if done - told >= total // 1000:
                told = done
                bar.update(task, completed=done)

        yield tell


def _about(trace: Trace, path: Path) -> dict[str, Any]:
    writes = int(trace.writes.sum())
    return {
        "file": str(path),
        "format": trace.format,
        "devices": list(trace.names),
        "requests": len(trace),
        "reads": len(trace) - writes,
        "writes": writes,
        "skipped": trace.skipped,
        "seconds": float(trace.times[-1]),
    }


def _plain(name: str, fast_bytes: int, base_bytes: int, figures: Figures) -> dict[str, Any]:
    ratios = {
        "hit_ratio": figures.hit_ratio,
        "last_hit_ratio": figures.last_hit_ratio,
        "optimal_hit_ratio": figures.optimal_hit_ratio,
        "write_amplification": figures.write_amplification,
    }
    return {"policy": name, "fast_bytes": fast_bytes, "base_bytes": base_bytes} | ratios | dataclasses.asdict(figures)


def _show(trace: Trace, path: Path, runs: list[tuple[str, int, int, Figures]]) -> None:
    about = _about(trace, path)
    footprint = runs[0][3].footprint_bytes
    span = f", {duration(about['seconds'])}" if about["seconds"] >= 1 else ""
    show_facts(
        [
            ("Trace", f"{path}, {trace.format}{span}"),
            ("Requests", f"{about['reads']} reads, {about['writes']} writes; {trace.skipped} without data left out"),
            ("Touches", format_size(footprint)),
            ("Base tier", format_size(runs[0][2])),
        ]
    )
    click.echo()
    columns = (
        *("Policy", ">Fast", ">Hits", ">In the end", ">At best"),
        *(">Promoted", ">Demoted", ">Cleaned", ">Past fast", ">Write amp."),
    )
    rows = [
        (
            *(name, format_size(fast_bytes), _ratio(figures.hit_ratio), _ratio(figures.last_hit_ratio)),
            *(_ratio(figures.optimal_hit_ratio), format_size(figures.promoted_bytes)),
            *(format_size(figures.demoted_bytes), format_size(figures.rewritten_bytes)),
            format_size(figures.bypassed_bytes),
            "-" if figures.write_amplification is None else f"{figures.write_amplification:.2f}",
        )
        for name, fast_bytes, _, figures in runs
    ]
    show_table(columns, rows)
    click.echo(
        "\nHits: blocks read that lay on fast; in the end: in the last tenth of the trace; at best: a fixed choice of "
        "blocks, made\nin knowledge of the whole trace. Cleaned: written again within a tier. Write amp.: bytes of "
        "data that devices write for each\nbyte that clients write."
    )


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
