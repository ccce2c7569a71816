"""The top command: which home is meant, and how errors leave the program."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from terrace.cli.attach import attach, detach
from terrace.cli.backup import backup
from terrace.cli.completion import completion
from terrace.cli.context import Context
from terrace.cli.events import events
from terrace.cli.metrics import metrics
from terrace.cli.mount import mount
from terrace.cli.node import node
from terrace.cli.output import complain
from terrace.cli.policy import policy
from terrace.cli.pool import pool
from terrace.cli.restore import restore
from terrace.cli.snapshot import snapshot
from terrace.cli.status import status
from terrace.cli.tls import tls
from terrace.cli.units import install_units
from terrace.cli.upgrade import upgrade
from terrace.cli.volume import volume


class Root(click.Group):
    """Turns every refusal into one line and an exit status; tracebacks are for bugs."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *rest: Any, **options: Any) -> Any:
        options["standalone_mode"] = False
        failure: OSError | None = None
        try:
            result = super().main(args, prog_name or "terrace", *rest, **options)
            status = result if isinstance(result, int) else 0
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            status = 2
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "terrace"
            complain(f"{error.format_message().rstrip('.')}; see {command} --help")
            status = 2
        except click.ClickException as error:
            complain(error.format_message())
            status = 1
        except click.Abort:
            complain("stopped")
            status = 1
        except OSError as error:
            failure, status = error, 1
        try:
            sys.stdout.flush()
        except OSError as error:
            # The interpreter must not try to flush the rest. Whoever closed a pipe has enough of our output.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            failure, status = error, 1
        if failure is not None and failure.errno != errno.EPIPE:
            # All that has no sentence of its own, nor a file, is our output.
            bare = type(failure) is OSError and failure.filename is None
            complain(f"writing to standard output: {failure.strerror}" if bare else str(failure))
        sys.exit(status)


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--home", metavar="DIR", help="The daemon's home (default: as terraced chooses it).")
@click.version_option(package_name="terrace", message="terrace %(version)s")
@click.pass_context
def root(context: click.Context, home: str | None) -> None:
    """Manage the pools, volumes and snapshots of a running terraced.

    Sizes are powers of 1024: 512, 64M, 10G, 1.5T. Volumes are named POOL/VOL and snapshots
    POOL/VOL@SNAP, over NBD too.
    """
    context.obj = Context(home)


for command in (
    *(pool, volume, snapshot, policy, backup, restore, attach, detach, mount, node),
    *(status, events, metrics, upgrade, tls, install_units, completion),
):
    root.add_command(command)
