"""`terrace events`: what the daemon has to tell of pools, devices and space."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import click

from terrace.cli.context import Context, pass_context
from terrace.cli.output import output_option, say, show_json

_WAIT_S = 10


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Go on with each event as it comes, until Ctrl-C.")
@click.option("--last", "-n", type=click.IntRange(min=0), help="Only so many of the newest.")
@output_option
@pass_context
def events(context: Context, follow: bool, last: int | None, output: str) -> None:
    """Show events: pools that fill up or fail, devices that come and go. The newest thousand are kept.

    With --follow JSON is a line for each event.
    """
    with context.connect() as client:
        found = client.get("events")
        if last is not None:
            found = found[max(0, len(found) - last) :]
        newest = found[-1]["number"] if found else 0
        if output == "json" and not follow:
            show_json(found)
            return
        if not found and not follow:
            click.echo("No events.")
        _show(found, output)
        try:
            while follow:
                more = client.request("GET", "events", query={"after": str(newest), "wait": str(_WAIT_S)})
                _show(more, output)
                newest = more[-1]["number"] if more else newest
        except KeyboardInterrupt:
            return


def _show(found: list[dict[str, Any]], output: str) -> None:
    for event in found:
        if output == "json":
            click.echo(json.dumps(event))
            continue
        when = datetime.fromtimestamp(event["time"]).strftime("%Y-%m-%d %H:%M:%S")
        say(event["text"], begin=f"{click.style(when, dim=True)}  {event['kind']:<10}  ")
