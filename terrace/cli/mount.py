"""terrace mount: every volume and snapshot as a file, until Ctrl-C or umount."""

from __future__ import annotations

import logging
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import trio

from terrace.cli.context import Context, pass_context
from terrace.cli.output import complain
from terrace.extras import how_to_install
from terrace.reclaim import stand_apart

if TYPE_CHECKING:
    from terrace.fuse.session import Session


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--read-only", is_flag=True, help="Let nobody write through these files.")
@pass_context
def mount(context: Context, directory: Path, read_only: bool) -> None:
    """Mount every volume and snapshot as a file: DIRECTORY/POOL/VOL and DIRECTORY/POOL/VOL@SNAP.

    Serves until Ctrl-C, or until `fusermount3 -u DIRECTORY`. A daemon that is restarted meanwhile is waited for.
    """
    context.connect().get("status")
    require_fuse()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    stand_apart()
    trio.run(partial(_serve, context, directory, read_only))


def require_fuse() -> None:
    """Raises OSError saying what is missing on this host."""
    try:
        import pyfuse3  # noqa: F401
    except ImportError as error:
        raise click.ClickException(
            f"FUSE needs the Python package pyfuse3 ({error}); install it with: {how_to_install('pyfuse3')} "
            "(which compiles it: Debian's libfuse3-dev, pkg-config and a C compiler must be there)"
        ) from None
    if not Path("/dev/fuse").exists():
        raise click.ClickException("this kernel has no /dev/fuse; try `modprobe fuse` as root")


async def _serve(context: Context, directory: Path, read_only: bool) -> None:
    from terrace.fuse.remote import daemon_directory
    from terrace.fuse.session import mounted

    async with (
        daemon_directory(context.home) as exports,
        mounted(exports, directory, read_only=read_only) as session,
        trio.open_nursery() as nursery,
    ):
        click.echo(f"Volumes and snapshots are files below {session.mountpoint}; Ctrl-C unmounts.")
        await nursery.start(_obey, session, nursery.cancel_scope)
        await session.ended.wait()
        nursery.cancel_scope.cancel()


async def _obey(
    session: Session, serving: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """The first signal unmounts what nobody uses; a second one ends `serving`, which takes it away from its users."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        task_status.started()
        await anext(signals)
        why = await session.unmount()
        if why and not session.ended.is_set():
            users = await trio.to_thread.run_sync(users_of, session.mountpoint)
            who = f"in use by {', '.join(users)}" if users else f"in use ({why})"
            complain(f"{session.mountpoint} is {who}; end that, or press Ctrl-C again to take it away")
        await anext(signals)
        serving.cancel()


def users_of(directory: Path) -> list[str]:
    """Loop devices, and processes with a file or their working directory below it, as far as we may see them."""
    import psutil

    below = f"{directory}/"
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if backing.read_text().startswith(below):
                found.append(f"/dev/{backing.parents[1].name}")
        except OSError:  # detached meanwhile
            continue
    for process in psutil.process_iter():
        try:
            links = [Path(f"/proc/{process.pid}/cwd"), *Path(f"/proc/{process.pid}/fd").iterdir()]
            names = [str(link.readlink()) for link in links]
            if any(name == str(directory) or name.startswith(below) for name in names):
                found.append(f"{process.name()} (process {process.pid})")
        except (OSError, psutil.Error):
            continue
    return found
