"""`terrace volume heat`: where a volume's blocks lie, and how hot they are, as a map in the terminal or a picture."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from terrace.cli.context import VOLUME, Context, pass_context
from terrace.cli.output import console, duration, percent, show_json
from terrace.extras import how_to_install
from terrace.sizes import format_size

PICTURES = (".png", ".svg")
PICTURE_RANGES = 512
LINES = 8
"""Lines of the map in a terminal, each a part of the volume; two lanes a line."""
LEAST_COLUMNS, MOST_COLUMNS = 16, 128
SHADES = " ░▒▓█"
SCALE = ((0.0, "grey37"), (0.05, "blue"), (0.5, "dark_cyan"), (2.0, "green3"), (6.0, "yellow3"), (20.0, "orange1"))
HOTTEST = (60.0, "red1")
"""Colours, each from a number of touches of a block on."""


@dataclass(frozen=True)
class _Output:
    """What `-o` asks for: a table, JSON, or a picture's file."""

    json: bool = False
    picture: Path | None = None


class _OutputType(click.ParamType[_Output]):
    """`table`, `json`, or a file that ends with .png or .svg."""

    name = "output"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> _Output:
        if isinstance(value, _Output):
            return value
        if value in ("table", "json"):
            return _Output(json=value == "json")
        path = Path(value)
        if path.suffix.lower() not in PICTURES:
            self.fail(f"{value!r} is neither table nor json, nor a file that ends with .png or .svg", param, ctx)
        return _Output(picture=path)


@click.command()
@click.argument("volume", type=VOLUME, metavar="POOL/VOL")
@click.option(
    "-o",
    "--output",
    type=_OutputType(),
    default="table",
    show_default=True,
    metavar="table|json|FILE.png|FILE.svg",
    help="For people, for programs, or as a picture (which needs matplotlib).",
)
@click.option("--ranges", type=click.IntRange(1, 4096), help="Into how many ranges the volume is divided at most.")
@pass_context
def heat(context: Context, volume: tuple[str, str], output: _Output, ranges: int | None) -> None:
    """Show what of a volume lies on which tier, and how hot it is.

    Heat counts reads and writes; it is halved each hour. Sequential streams don't count.
    """
    pool, name = volume
    columns = _columns()
    if output.picture is not None:
        _require_plot(output.picture)
    wanted = ranges or (columns * LINES if not output.json and output.picture is None else PICTURE_RANGES)
    with context.connect() as client:
        found = client.get("pools", pool, "volumes", name, "heat", ranges=str(wanted))
    if output.json:
        show_json(found)
    elif output.picture is not None:
        draw(found, output.picture)
        click.echo(f"The heat map of {found['volume']} is in {output.picture}.")
    else:
        show(found, columns)


# -- in a terminal -----------------------------------------------------------------------------------------------------


def _columns() -> int:
    return max(LEAST_COLUMNS, min(MOST_COLUMNS, shutil.get_terminal_size((100, 24)).columns - 18))


def show(found: dict[str, Any], columns: int) -> None:
    """Print the map: two lanes a line, one for each tier; the shade is how full, the colour how hot."""
    from rich.text import Text

    out = console()
    size, count = found["size_bytes"], len(found["reads"])
    out.print(
        Text.assemble((found["volume"], "bold"), f", {format_size(size)}, {format_size(found['range_bytes'])} a column")
    )
    totals = _totals(found)
    for tier in ("fast", "base"):
        out.print(_bar(tier, totals[tier], size, totals[f"{tier}_heat"]))
    out.print(_bar("nothing", totals["nothing"], size, None))
    if found["looked_at"] < 1:
        out.print(Text(f"Estimated from {percent(found['looked_at'], 1)} of the volume's map.", "dim"))
    out.print()
    for first in range(0, count, columns):
        end = min(count, first + columns)
        label = format_size(first * found["range_bytes"])
        for tier in ("fast", "base"):
            line = Text(f"{label if tier == 'fast' else '':>9} {tier} ")
            for i in range(first, end):
                line.append(*_cell(found, tier, i))
            line.append(" ")
            out.print(line)
    out.print()
    out.print(_legend(found))


def _totals(found: dict[str, Any]) -> dict[str, float]:
    """Bytes on each tier and on none, and each tier's mean heat."""
    totals: dict[str, float] = {}
    for tier in ("fast", "base"):
        sizes = [size or 0 for size in found[f"{tier}_bytes"]]
        heats = [heat or 0.0 for heat in found[f"{tier}_heat"]]
        totals[tier] = sum(sizes)
        weighted = sum(size * heat for size, heat in zip(sizes, heats, strict=True))
        totals[f"{tier}_heat"] = weighted / totals[tier] if totals[tier] else 0.0
    totals["nothing"] = max(0, found["size_bytes"] - totals["fast"] - totals["base"])
    return totals


def _bar(name: str, part: float, size: int, heat: float | None) -> Any:
    from rich.text import Text

    width = 24
    filled = min(width, math.ceil(width * part / size)) if part else 0
    line = Text(f"{name:>9} ")
    line.append("█" * filled, "grey37" if heat is None else _colour(heat))
    line.append("·" * (width - filled), "grey37")
    line.append(f" {percent(part, size):>5}  {format_size(int(part))}")
    if heat is not None and part:
        line.append(f", {_number(heat)} touches a block", "dim")
    return line


def _cell(found: dict[str, Any], tier: str, i: int) -> tuple[str, str]:
    """One character of a lane and its style."""
    part = found[f"{tier}_bytes"][i]
    if part is None:
        return "?", "grey37"
    of = min(found["range_bytes"], found["size_bytes"] - i * found["range_bytes"])
    if not part:
        return "·", "grey37"
    return SHADES[max(1, min(4, math.ceil(4 * part / of)))], _colour(found[f"{tier}_heat"][i])


def _colour(heat: float) -> str:
    return next((colour for least, colour in reversed((*SCALE, HOTTEST)) if heat >= least), SCALE[0][1])


def _legend(found: dict[str, Any]) -> Any:
    from rich.text import Text

    line = Text(f"Touches of a block, halved each {duration(found['half_life_s'])}: ", "dim")
    for least, colour in (*SCALE, HOTTEST):
        line.append("█", colour)
        line.append(f" {least:g}+  " if least else " 0  ", "dim")
    line.append("\nShade: how much of the range lies on the tier. · nothing", "dim")
    if None in found["fast_bytes"]:
        line.append("  ? not looked at", "dim")
    return line


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


# -- as a picture ------------------------------------------------------------------------------------------------------


def _require_plot(path: Path) -> None:
    """Raises what tells how to get matplotlib, before the daemon is asked for anything."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise click.ClickException(
            f"{path}: pictures need matplotlib, which isn't installed: `{how_to_install('matplotlib')}`, "
            "or leave --output out to see the map here",
        ) from None


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the map as PNG or SVG, as the file's name says. Raises OSError if it can't be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    count = len(found["reads"])
    unit, name = _axis_unit(found["size_bytes"])
    edges = [min(i * found["range_bytes"], found["size_bytes"]) / unit for i in range(count + 1)]
    shares = {tier: _shares(found, tier) for tier in ("fast", "base")}
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "terrace"}
    with pyplot.rc_context(style):
        figure, (where, hot, requests) = pyplot.subplots(
            3, 1, figsize=(11, 6.5), sharex=True, height_ratios=(2, 1.3, 2), layout="constrained"
        )
        try:
            title = f"{found['volume']}, {format_size(found['size_bytes'])}"
            if found["looked_at"] < 1:
                title += f" (estimated from {percent(found['looked_at'], 1)} of its map)"
            figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")

            both = [a + b for a, b in zip(shares["fast"], shares["base"], strict=True)]
            where.stairs(both, edges, fill=True, color="#8fb3d9", label="base")
            where.stairs(shares["fast"], edges, fill=True, color="#e07b39", label="fast")
            where.set(ylim=(0, 100), ylabel="% of range")
            where.legend(loc="upper right", ncols=2, frameon=True, framealpha=0.9)
            where.set_title("Where blocks lie (white: nothing)", loc="left", fontsize=9)

            rows = [[heat or 0.0 for heat in found[f"{tier}_heat"]] for tier in ("base", "fast")]
            top = max(1.0, *map(max, rows))
            shown = [
                [max(heat, 0.01) if share else math.nan for heat, share in zip(row, shares[tier], strict=True)]
                for row, tier in zip(rows, ("base", "fast"), strict=True)
            ]
            hot.set_facecolor("#f2f2f2")
            mesh = hot.pcolormesh(edges, [0, 1, 2], shown, norm=LogNorm(0.01, top), cmap="inferno", rasterized=True)
            hot.set_yticks([0.5, 1.5], ["base", "fast"])
            hot.set_title("Touches of a block, mean of the range", loc="left", fontsize=9)
            figure.colorbar(mesh, ax=hot, pad=0.01, aspect=12)

            requests.stairs(found["reads"], edges, color="#2f6db3", label="reads", linewidth=1.2)
            requests.stairs(found["writes"], edges, color="#c0392b", label="writes", linewidth=1.2)
            requests.set_yscale("symlog", linthresh=1)
            requests.set_ylim(bottom=0)
            requests.set_title("Requests to an extent of 64 KiB, mean of the range", loc="left", fontsize=9)
            requests.legend(loc="upper right", ncols=2, frameon=True, framealpha=0.9)
            requests.set(
                xlim=(0, edges[-1]), xlabel=f"Offset ({name}); counts are halved each {duration(found['half_life_s'])}"
            )
            _save(figure, path)
        finally:
            pyplot.close(figure)


def _save(figure: Any, path: Path) -> None:
    """Write beside and rename, so that no half a picture is left."""
    beside = path.with_name(f".{path.name}.new")
    try:
        figure.savefig(beside, format=path.suffix.lower()[1:], dpi=130)
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise click.ClickException(f"writing {path}: {error.strerror}; choose another file") from None


def _shares(found: dict[str, Any], tier: str) -> list[float]:
    """Per cent of each range."""
    sizes: Sequence[int | None] = found[f"{tier}_bytes"]
    return [
        100 * (part or 0) / min(found["range_bytes"], found["size_bytes"] - i * found["range_bytes"])
        for i, part in enumerate(sizes)
    ]


def _axis_unit(size: int) -> tuple[int, str]:
    for shift, name in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2 << shift or shift == 10:
            return 1 << shift, name
    raise AssertionError
