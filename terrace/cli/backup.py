"""`terrace backup`: snapshots as streams in files, pipes and directories, and what is known of those."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from terrace.cli.context import VERSION, Context, pass_context
from terrace.cli.output import output_option, patience, show_facts, show_json, show_table
from terrace.sizes import format_size

if TYPE_CHECKING:
    from terrace.apiclient import ApiClient
    from terrace.backup.chain import Backup, Catalogue
    from terrace.backup.run import Origin, Outcome
    from terrace.backup.stream import Header, Totals

_LEVELS = click.IntRange(1, 19)

ResultT = TypeVar("ResultT")


class BackupGroup(click.Group):
    """`terrace backup POOL/VOL ...` is `terrace backup make POOL/VOL ...`: no command has a slash in its name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if any("/" in arg and not arg.startswith("-") for arg in args) and args[0] not in self.commands:
            args = ["make", *args]
        return super().parse_args(ctx, args)


@click.group(cls=BackupGroup)
def backup() -> None:
    """Backups of volumes: a full one or what changed, into a file, a pipe or a directory.

    terrace backup POOL/VOL --to DIR is short for terrace backup make POOL/VOL --to DIR.
    """


@backup.command()
@click.argument("volume", type=VERSION, metavar="POOL/VOL[@SNAP]")
@click.argument("file", required=False, metavar="[FILE|-]")
@click.option("--since", metavar="SNAP", help="Only what changed since that snapshot of the volume.")
@click.option(
    "--to", "directory", type=click.Path(path_type=Path), metavar="DIR", help="The next one of a chain in DIR."
)
@click.option("--keep", type=click.IntRange(1), metavar="N", help="With --to: remove all but the N newest chains.")
@click.option(
    "--keep-increments", "increments", type=click.IntRange(0), metavar="N", help="With --to: N to a full one.  [30]"
)
@click.option("--full", is_flag=True, help="With --to: a full one, though an increment would do.")
@click.option("--level", type=_LEVELS, default=3, show_default=True, help="How hard zstd tries, 1 to 19.")
@output_option
@pass_context
def make(
    context: Context,
    volume: tuple[str, str, str | None],
    file: str | None,
    since: str | None,
    directory: Path | None,
    keep: int | None,
    increments: int | None,
    full: bool,
    level: int,
    output: str,
) -> None:
    """Make a backup.

    Of a snapshot into FILE or standard output (-), to be read by terrace restore and terrace backup verify. Or, with
    --to, into a directory: takes a snapshot of the volume unless one is named, writes a full backup or only what
    changed since the last one there, and removes what --keep doesn't keep.
    """
    pool, name, snapshot = volume
    if (file is None) == (directory is None):
        raise click.UsageError("say where to: a FILE, - for a pipe, or --to DIR")
    if directory is None and (keep is not None or increments is not None or full):
        raise click.UsageError("--keep, --keep-increments and --full go with --to")
    if directory is not None and since is not None:
        raise click.UsageError("--since goes with a FILE; with --to the last backup there is the base")
    if directory is None and snapshot is None:
        raise click.UsageError(f"name a snapshot of {pool}/{name} as POOL/VOL@SNAP; only --to takes one by itself")
    if file == "-" and output == "json":
        raise click.UsageError("standard output is for the backup then, not for JSON")
    if file == "-" and sys.stdout.isatty():
        raise click.UsageError("standard output is a terminal; send it to a pipe or a file")
    with context.connect() as client, patience(f"Backing up {pool}/{name}") as advance:
        origin = _origin(client, pool, name)
        if directory is not None:
            from terrace.backup.chain import DEFAULT_INCREMENTS
            from terrace.backup.run import back_up_to_directory

            to, most = directory, DEFAULT_INCREMENTS if increments is None else increments
            outcome = _run(
                lambda: back_up_to_directory(
                    origin, to, snapshot, keep=keep, increments=most, full=full, level=level, progress=advance
                )
            )
            where, header, totals = str(outcome.path), outcome.header, outcome.totals
        else:
            outcome, where = None, str(file)
            header, totals = _run(lambda: _to_file(origin, str(snapshot), since, where, level, advance))
    if output == "json":
        more = {"removed": list(map(str, outcome.removed)), "problems": list(outcome.problems)} if outcome else {}
        show_json(described(header, totals) | {"file": where} | more)
        return
    # With - standard output is the backup's.
    click.echo(_sentence(header, totals, where), err=where == "-")
    if outcome is not None:
        _tell(outcome)


async def _to_file(
    origin: Origin, name: str, since: str | None, file: str, level: int, advance: Callable[[int, int], None]
) -> tuple[Header, Totals]:
    from terrace.backup.files import FileSink, write_file
    from terrace.backup.run import back_up, find
    from terrace.backup.write import Sink

    volume = f"{origin.pool}/{origin.volume}"
    snapshots = await origin.snapshots()
    snapshot = find(snapshots, name, volume)
    base = find(snapshots, since, volume) if since is not None else None

    async def write(sink: Sink) -> tuple[Header, Totals]:
        return await back_up(origin, snapshot, base, sink, level=level, progress=advance)

    if file != "-":
        return await write_file(Path(file), write)
    sink = FileSink(sys.stdout.buffer.fileno(), "standard output")
    result = await write(sink)
    await sink.flush()
    return result


def _origin(client: ApiClient, pool: str, volume: str) -> Origin:
    from terrace.backup.daemon import DaemonOrigin

    return DaemonOrigin(client, pool, volume)


def _run(main: Callable[[], Awaitable[ResultT]]) -> ResultT:
    """`trio.run`, of which an error comes out as itself."""
    import trio

    from terrace.backup.errors import alone

    with alone():
        return trio.run(main)


def _sentence(header: Header, totals: Totals, where: str) -> str:
    data, stored = format_size(totals.data_bytes), format_size(totals.stream_bytes)
    what = "full" if header.base is None else f"since {header.base.name}"
    place = "on standard output" if where == "-" else f"in {where}"
    return f"Backup of {header.title} ({what}): {data} of data, {stored} {place}."


def _tell(outcome: Outcome) -> None:
    if outcome.header.base is None:
        click.echo(f"It is a full one: {outcome.why}.")
    for path in outcome.removed:
        click.echo(f"{path} is removed.")
    note(outcome.problems)


# -- what is there -----------------------------------------------------------------------------------------------------


@backup.command("list")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@output_option
def list_backups(directory: Path, output: str) -> None:
    """List the backups in a directory, chain by chain, and what is wrong with it.

    By the headers of the files; terrace backup verify reads them whole.
    """
    from terrace.backup.directory import read_directory

    listing = read_directory(directory)
    catalogue = listing.catalogue
    problems = [*listing.problems, *map(str, catalogue.gaps())]
    ordered = _in_order(catalogue)
    if output == "json":
        show_json({"backups": [_row(one, catalogue) for one in ordered], "problems": problems})
        return
    rows = [
        (
            f"{one.header.pool}/{one.header.volume}",
            one.header.snapshot.name,
            time_of(one.header.snapshot.taken_us),
            one.header.base.name if one.header.base else "full",
            format_size(one.header.size_bytes),
            format_size(one.totals.data_bytes) if one.totals else "-",
            format_size(one.file_bytes),
            one.path.name,
        )
        for one in ordered
    ]
    columns = ("Volume", "Snapshot", "Taken", "Since", ">Size", ">Data", ">In file", "File")
    show_table(columns, rows, empty=f"{directory} has no backups; terrace backup POOL/VOL --to {directory} makes one.")
    note(problems)


def _in_order(catalogue: Catalogue) -> list[Backup]:
    """Chain by chain; then what hangs nowhere."""
    chains = [one for chain in catalogue.chains() for one in chain]
    return chains + [one for one in catalogue.backups if one not in chains]


def _row(one: Backup, catalogue: Catalogue) -> dict[str, Any]:
    from terrace.backup.chain import Gap

    path = catalogue.path(one) if one.totals is not None else None
    needs = None if path is None or isinstance(path, Gap) else [str(other.path) for other in path]
    return described(one.header, one.totals) | {"file": str(one.path), "file_bytes": one.file_bytes, "needs": needs}


@backup.command()
@click.argument("source", metavar="FILE|DIR|-")
@output_option
def verify(source: str, output: str) -> int:
    """Read a backup whole and check everything in it, without a daemon; or all backups of a directory.

    Says where a damaged one is damaged. Of a directory also which backups lack the one that they are based on.
    Exit status 1 if anything is wrong.
    """
    if source != "-" and Path(source).is_dir():
        return _verify_directory(Path(source), output)
    from terrace.backup.stream import verify

    name = "standard input" if source == "-" else source
    with opened(source) as (file, size), patience(f"Verifying {name}") as advance:
        report = verify(file, name, lambda done: advance(done, size) if size else None)
    header, totals = report.header, report.totals
    if output == "json":
        show_json(described(header, totals) | {"file": source, "ok": True})
        return 0
    base = header.base
    show_facts(
        [
            ("Volume", f"{header.pool}/{header.volume} (id {header.volume_id})"),
            ("Snapshot", f"{header.snapshot.name}, {time_of(header.snapshot.taken_us)} (id {header.snapshot.id})"),
            ("Since", f"{base.name}, {time_of(base.taken_us)} (id {base.id})" if base else "nothing: it is a full one"),
            ("Size", f"{format_size(header.size_bytes)} ({header.size_bytes} bytes)"),
            ("Data", f"{format_size(totals.data_bytes)}, and {format_size(totals.zero_bytes)} of zeros"),
            ("Stream", f"{format_size(totals.stream_bytes)}, data {report.ratio:.2f} x compressed"),
            ("XXH3-128", f"{totals.content_check.hex()} (data), {totals.stream_check.hex()} (stream)"),
            ("Made", f"{time_of(header.begun_us)} by {header.tool}"),
        ]
    )
    click.echo(f"{name} is sound.")
    return 0


def _from(advance: Callable[[int, int], None], before: int, total: int) -> Callable[[int], None]:
    return lambda position: advance(before + position, total)


def _verify_directory(directory: Path, output: str) -> int:
    from terrace.backup.directory import open_backup, read_directory
    from terrace.backup.stream import verify

    listing = read_directory(directory)
    catalogue = listing.catalogue
    problems, sound, done = list(listing.unreadable), [], 0
    total = sum(one.file_bytes for one in catalogue.backups)
    with patience(f"Verifying {directory}") as advance:
        # What has no end is read too: that says where it breaks off.
        for one in _in_order(catalogue):
            try:
                with open_backup(one.path) as file:
                    verify(file, str(one.path), _from(advance, done, total))
                sound.append(one)
            except OSError as error:
                problems.append(str(error))
            done += one.file_bytes
    from terrace.backup.chain import Catalogue

    # A chain is only as good as what is sound of it.
    remaining = Catalogue(sound)
    problems += [f"{directory}: {gap}" for gap in remaining.gaps()]
    chains = remaining.chains()
    if output == "json":
        backups = [_row(one, remaining) for one in _in_order(remaining)]
        show_json({"ok": not problems, "backups": backups, "problems": problems})
        return 1 if problems else 0
    note(problems)
    usable = sum(map(len, chains))
    click.echo(
        f"{directory}: {usable} of {len(catalogue.backups) + len(listing.unreadable)} backups can be restored, in "
        f"{len(chains)} chain{'s'[: len(chains) != 1]}."
    )
    return 1 if problems else 0


# -- shared ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(source: str) -> Iterator[tuple[Any, int]]:
    """A file or - as (what can be read, its size, 0 if unknown)."""
    from terrace.backup.directory import open_backup

    if source == "-":
        if sys.stdin.isatty():
            raise click.UsageError("standard input is a terminal; send a backup into it")
        # Without its buffer, whose lock a read that was left behind would hold when the interpreter ends.
        yield getattr(sys.stdin.buffer, "raw", sys.stdin.buffer), 0
        return
    with open_backup(Path(source)) as file:
        yield file, os.fstat(file.fileno()).st_size


def note(problems: Sequence[str]) -> None:
    """What is wrong with something else than the command: a line each, without what a name could do to a terminal."""
    for problem in problems:
        click.echo("".join(char if char.isprintable() else " " for char in problem))


def time_of(time_us: int) -> str:
    from terrace.backup.stream import time_text

    return time_text(time_us)


def described(header: Header, totals: Totals | None) -> dict[str, Any]:
    """A stream for programs; times in seconds since 1970."""

    def version(snapshot: Any) -> dict[str, Any] | None:
        if snapshot is None:
            return None
        return {"name": snapshot.name, "id": snapshot.id, "taken_at": snapshot.taken_us / 1e6}

    return {
        "kind": header.kind.name.lower(),
        "volume": f"{header.pool}/{header.volume}",
        "volume_id": header.volume_id,
        "snapshot": version(header.snapshot),
        "since": version(header.base),
        "size_bytes": header.size_bytes,
        "begun_at": header.begun_us / 1e6,
        "tool": header.tool,
        "stream_id": header.stream_id.hex(),
        "complete": totals is not None,
        "data_bytes": totals.data_bytes if totals else None,
        "zero_bytes": totals.zero_bytes if totals else None,
        "stream_bytes": totals.stream_bytes if totals else None,
        "xxh3_128": totals.content_check.hex() if totals else None,
    }
