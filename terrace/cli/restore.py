"""`terrace restore`: a volume made of a full backup and its increments, or brought further with another one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from terrace.cli.backup import _run, note, opened
from terrace.cli.context import VOLUME, Context, pass_context
from terrace.cli.output import output_option, patience, show_json
from terrace.cli.policy import POLICY
from terrace.sizes import format_size

if TYPE_CHECKING:
    from terrace.apiclient import ApiClient
    from terrace.backup.daemon import DaemonTarget
    from terrace.backup.restore import Held


@click.command()
@click.argument("volume", type=VOLUME, metavar="POOL/NEW")
@click.argument("sources", nargs=-1, required=True, metavar="DIR|FILE...|-")
@click.option("--at", metavar="SNAP", help="With DIR: the snapshot to restore, by name or id.  [the newest]")
@click.option(
    "--volume", "of", metavar="VOL", help="With DIR: whose backups, where there are those of several volumes."
)
@click.option("--policy", type=POLICY, default="default", show_default=True, help="Of the new volume.")
@output_option
@pass_context
def restore(
    context: Context,
    volume: tuple[str, str],
    sources: tuple[str, ...],
    at: str | None,
    of: str | None,
    policy: str,
    output: str,
) -> None:
    """Restore a volume from backups.

    Makes POOL/NEW of a full backup and the increments that follow it, in this order; or of what DIR has. If POOL/NEW
    exists, it must hold what the first of them is based on, restored from backups and not changed since. Everything
    is verified on the way; if a backup is damaged, the error says that the volume is incomplete, and so does `terrace
    volume show` until it is rolled back or deleted.
    """
    pool, name = volume
    title = f"{pool}/{name}"
    from_directory = len(sources) == 1 and sources[0] != "-" and Path(sources[0]).is_dir()
    if (at is not None or of is not None) and not from_directory:
        raise click.UsageError("--at and --volume go with a directory of backups")
    if "-" in sources and len(sources) > 1:
        raise click.UsageError("standard input is one backup; restore it in a call of its own")
    files = _files_of(Path(sources[0]), of, at, quiet=output == "json") if from_directory else list(sources)
    with context.connect() as client:
        target = _target(client, pool, name, policy)
        done, snapshot = _run(lambda: _restore(target, title, files, skip=from_directory))
    if output == "json":
        show_json({"restored": title, "snapshot": snapshot, "files": done})
    elif done:
        click.echo(f"Volume {title} is restored: it holds {snapshot}.")
    else:
        click.echo(f"Volume {title} holds {snapshot} already.")


async def _restore(target: DaemonTarget, title: str, files: list[str], *, skip: bool) -> tuple[list[str], str]:
    """Apply files; with `skip` without those that the target has already. Which, and what it holds then."""
    from terrace.backup.restore import remaining, require_complete, restore
    from terrace.backup.stream import StreamReader

    with contextlib.ExitStack() as stack:
        streams, total = [], 0
        for file in files:
            source, size = stack.enter_context(opened(file))
            streams.append(StreamReader(source, "standard input" if file == "-" else file))
            total += size
        snapshot = streams[-1].header.title
        held: Held | None = await target.held()
        require_complete(held, title)
        if skip and (there := remaining([stream.header for stream in streams], held)):
            streams, files = streams[there:], files[there:]
        if not streams:
            return [], snapshot
        advance = stack.enter_context(patience(f"Restoring {title}, {format_size(total)} of backups"))
        await restore(
            streams, target, target, held, target=title, progress=lambda done: advance(done, total) if total else None
        )
        return files, snapshot


def _files_of(directory: Path, volume: str | None, at: str | None, *, quiet: bool) -> list[str]:
    from terrace.backup.chain import choose
    from terrace.backup.directory import read_directory

    listing = read_directory(directory)
    if not quiet:
        note(listing.unreadable)
    return [str(one.path) for one in choose(listing.catalogue, directory, volume, at)]


def _target(client: ApiClient, pool: str, volume: str, policy: str) -> Any:
    from terrace.backup.daemon import DaemonTarget

    return DaemonTarget(client, pool, volume, policy)
