"""`terrace metrics`: numbers for Prometheus."""

from __future__ import annotations

from pathlib import Path

import click

from terrace.cli.context import Context, pass_context


@click.command()
@click.option(
    "--to",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Replace this file as a whole, as node_exporter's textfile collector wants it.",
)
@pass_context
def metrics(context: Context, to: Path | None) -> None:
    """Show the metrics of nodes and mirrors, in the text format that Prometheus reads."""
    with context.connect() as client:
        text = client.text("metrics")
    if to is None:
        click.echo(text, nl=False)
        return
    beside = to.with_name(f".{to.name}.new")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.chmod(0o644)
        beside.replace(to)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise click.ClickException(f"{to} can't be written: {error.strerror}") from None
