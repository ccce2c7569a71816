"""The top command: which home is meant, and how errors leave the program."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from terrace.cli.completion import completion
from terrace.cli.context import Context
from terrace.cli.pool import pool
from terrace.cli.status import status
from terrace.cli.volume import volume


class Root(click.Group):
    """Turns every refusal into one line and an exit status; tracebacks are for bugs."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *rest: Any, **options: Any) -> Any:
        options["standalone_mode"] = False
        try:
            result = super().main(args, prog_name or "terrace", *rest, **options)
            sys.exit(result if isinstance(result, int) else 0)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(2)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "terrace"
            _complain(f"{error.format_message().rstrip('.')}; see {command} --help")
            sys.exit(2)
        except click.ClickException as error:
            _complain(error.format_message())
            sys.exit(1)
        except click.Abort:
            _complain("stopped")
            sys.exit(1)
        except OSError as error:
            if error.errno == errno.EPIPE:
                # Whoever read our output has enough of it; the interpreter must not try to flush the rest.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            else:
                _complain(str(error))
            sys.exit(1)


def _complain(sentence: str) -> None:
    """On one line, and without what a name from elsewhere could do to a terminal."""
    line = "".join(char if char.isprintable() else " " for char in sentence)
    click.echo(f"Error: {' '.join(line.split())}", err=True)


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--home", metavar="DIR", help="The daemon's home (default: as terraced chooses it).")
@click.version_option(package_name="terrace", message="terrace %(version)s")
@click.pass_context
def root(context: click.Context, home: str | None) -> None:
    """Manage the pools and volumes of a running terraced.

    Sizes are powers of 1024: 512, 64M, 10G, 1.5T. Volumes are named POOL/VOL, over NBD too.
    """
    context.obj = Context(home)


for command in (pool, volume, status, completion):
    root.add_command(command)


def main() -> None:
    """The entry point."""
    root()
