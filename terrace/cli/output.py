"""How answers look: tables for people, JSON for programs, and a bar for what takes its time.

rich is imported when something is drawn, since it takes as long to import as most commands take to run.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeVar

import click

from terrace.sizes import format_size

if TYPE_CHECKING:
    from rich.console import Console

    from terrace.apiclient import ApiClient

_PATIENCE_S = 1.0
_watched: list[Console] = []
"""Where `patience` is at work: its console."""
_GAP = 3
"""Between the columns of a table."""
_DRAWN_ROWS = 500
"""rich takes 0.7 ms for each."""

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def output_option(command: CommandT) -> CommandT:
    """Adds `-o table|json` as the parameter `output`."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="For people, or for programs.",
    )(command)


def complain(sentence: str) -> None:
    """An error on one line, or as many as a terminal needs, and without what a name from elsewhere could do to it."""
    line = "".join(char if char.isprintable() else " " for char in sentence)
    text = f"Error: {' '.join(line.split())}"
    click.echo(_for_terminal(text, 0, sys.stderr), err=True)


def show_json(value: object) -> None:
    """The answer as the API gave it."""
    click.echo(json.dumps(value, indent=2))


def console() -> Console:
    """Standard output. Not a terminal: as wide as it needs to be, so that nothing is cut for grep."""
    from rich.console import Console

    made = Console(highlight=False, soft_wrap=True)
    if not made.is_terminal:
        made = Console(highlight=False, soft_wrap=True, width=1000, color_system=None)
    return made


STATE_STYLES = {
    "online": "green",
    "read-only": "yellow",
    "evacuating": "yellow",
    "lost": "bold red",
    "failed": "bold red",
    "poisoned": "bold red",
}


def show_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    title: str = "",
    empty: str = "",
    spare: Sequence[str] = (),
) -> None:
    """Columns whose heading begins with `>` are right-aligned. Without rows, `empty` is said instead.

    `spare`: columns that are left out, in this order, where the terminal is too narrow for all.
    """
    from rich.box import Box
    from rich.table import Table
    from rich.text import Text

    out = console()
    if title:
        out.print(Text(title, "bold"))
    if not rows:
        out.print(Text(empty, "dim"))
        return
    cells = [[str(cell) for cell in row] for row in rows]
    headings = [column.removeprefix(">") for column in columns]
    widths = [max(len(heading), *map(len, column)) for heading, *column in zip(headings, *cells, strict=True)]
    shown = list(range(len(columns)))
    for column in spare if out.is_terminal else ():
        if sum(widths[index] + _GAP for index in shown) - _GAP <= out.width:
            break
        shown.remove(columns.index(column))
    # What still doesn't fit goes on in the terminal's next line: half a name would be taken for a name.
    out.width = max(out.width, sum(widths[index] + _GAP for index in shown))
    if len(rows) > _DRAWN_ROWS:
        for row in (headings, ["\u2500" * width for width in widths], *cells):
            aligned = (
                row[index].rjust(widths[index]) if columns[index].startswith(">") else row[index].ljust(widths[index])
                for index in shown
            )
            click.echo((" " * _GAP).join(aligned).rstrip())
        return
    ruled = Box("    \n    \n ── \n    \n    \n    \n    \n    \n", ascii=False)
    table = Table(box=ruled, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    for index in shown:
        side: Literal["left", "right"] = "right" if columns[index].startswith(">") else "left"
        heading = Text(headings[index])  # as it is: "[policy.x]" would be markup
        table.add_column(heading, justify=side, no_wrap=True, overflow="fold")
    for row in cells:
        table.add_row(*(Text(row[index], STATE_STYLES.get(row[index], "")) for index in shown))
    out.print(table)


def show_facts(facts: Sequence[tuple[str, object]]) -> None:
    """Names and values below each other; a sentence stays in the column of the values."""
    width = max(len(name) for name, _ in facts) + 3
    for name, value in facts:
        colour = STATE_STYLES.get(str(value), "").split(" ")[-1] or None
        shown = _for_terminal(str(value), width)
        click.echo(click.style(name.ljust(width), dim=True) + click.style(shown, fg=colour))


def say(sentence: str, *, begin: str = "") -> None:
    """Echo a sentence behind `begin`, below whose end its other lines stand. See `wrapped`."""
    click.echo(begin + _for_terminal(sentence, len(click.unstyle(begin))))


def _for_terminal(sentence: str, indent: int, stream: TextIO | None = None) -> str:
    stream = sys.stdout if stream is None else stream
    if stream is None or stream.closed or not stream.isatty():
        return sentence
    return wrapped(sentence, shutil.get_terminal_size().columns, indent)


def wrapped(sentence: str, width: int, indent: int = 0) -> str:
    """Lines that end between words, all `indent` columns in, the first of which somebody has begun already.

    What is in backticks is to be copied and run, so it stays in one line, as does a name that is longer than a line.
    """
    if indent + len(sentence) <= width:
        return sentence
    lines: list[str] = []
    for word in re.findall(r"(?:`[^`]*`|\S)+", sentence):
        if lines and indent + len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return f"\n{' ' * indent}".join(lines)


def aside(sentence: str, *, always: bool) -> None:
    """On standard error, if it is a terminal; where `patience` is at work only if `always`, above what that shows."""
    from rich.text import Text

    if _watched:
        if always:
            _watched[-1].print(Text(sentence), soft_wrap=True)
    elif sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty():
        click.echo(_for_terminal(sentence, 0, sys.stderr), err=True)


def percent(part: float, whole: float) -> str:
    """`25 %`; a little is never 0 and nearly all is never 100."""
    if whole <= 0:
        return "0 %"
    share = 100 * part / whole
    if 0 < share < 1:
        return "<1 %"
    return f"{min(share, 99) if part < whole else share:.0f} %"


def count(number: int, thing: str) -> str:
    """`1 client`, `2 clients`."""
    return f"{number} {thing}{'s' * (number != 1)}"


def uris_of(client: ApiClient, export: str) -> list[str]:
    """The NBD URIs of one export, one for each address that the daemon listens on."""
    uris = []
    for uri in client.get("status")["nbd"]["uris"]:
        base, question, query = uri.partition("?")
        uris.append(f"{base}{export}{question}{query}")
    return uris


def duration(seconds: float) -> str:
    """`4 d 3 h`, `2 h 5 min`, `3 min 7 s`, `12 s`."""
    days, rest = divmod(int(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    while len(parts) > 1 and parts[0][0] == 0:
        parts.pop(0)
    shown = parts[:2] if len(parts) > 1 and parts[1][0] else parts[:1]
    return " ".join(f"{count} {unit}" for count, unit in shown)


def speed_text(bytes_per_s: float, left_s: float | None) -> str:
    """`38 MiB/s, ETA 6 s`."""
    eta = f", ETA {duration(left_s)}" if left_s is not None else ""
    return f"{format_size(int(bytes_per_s))}/s{eta}"


@contextlib.contextmanager
def patience(what: str) -> Iterator[Callable[[int, int], None]]:
    """While the block takes more than a second and somebody watches: what it does, how far it is, how long it will be.

    Yields `advance(done_bytes, total_bytes)`; where it is never called only the time that has passed is shown.
    """
    from rich.console import Console

    err = Console(stderr=True)
    if not err.is_terminal:
        yield lambda done_bytes, total_bytes: None
        return

    from rich import progress
    from rich.text import Text

    class Speed(progress.ProgressColumn):
        """Bytes a second and the time left, in the units of the tables."""

        def render(self, task: progress.Task) -> Text:
            speed = task.finished_speed or task.speed
            if not speed:
                return Text("")
            return Text(speed_text(speed, task.time_remaining))

    unknown = progress.Progress(
        progress.SpinnerColumn(), progress.TextColumn(what), progress.TimeElapsedColumn(), console=err, transient=True
    )
    known = progress.Progress(
        progress.TextColumn(what),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.DownloadColumn(binary_units=True),
        Speed(),
        console=err,
        transient=True,
    )
    started_s = time.monotonic()
    unknown.add_task(what, total=None)
    spin = threading.Timer(_PATIENCE_S, unknown.start)
    spin.daemon = True
    bar: progress.TaskID | None = None

    def advance(done_bytes: int, total_bytes: int) -> None:
        nonlocal bar
        if bar is None and time.monotonic() - started_s >= _PATIENCE_S:
            spin.cancel()
            spin.join()
            unknown.stop()
            known.start()
            bar = known.add_task(what, total=total_bytes)
        if bar is not None:
            known.update(bar, completed=done_bytes, total=total_bytes)

    spin.start()
    _watched.append(err)
    try:
        yield advance
    finally:
        _watched.remove(err)
        spin.cancel()
        # Had it fired already, it is either drawing or about to; join tells which.
        spin.join()
        unknown.stop()
        known.stop()
