"""The top command: which home is meant, and how errors leave the program."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final

import click

from terrace.cli.context import Context
from terrace.cli.output import complain
from terrace.lastchange import LastChange

_HOMES: Final = {
    "attach": "attach",
    "backup": "backup",
    "completion": "completion",
    "detach": "attach",
    "events": "events",
    "install-units": "units",
    "metrics": "metrics",
    "mount": "mount",
    "node": "node",
    "policy": "policy",
    "pool": "pool",
    "restore": "restore",
    "snapshot": "snapshot",
    "status": "status",
    "tls": "tls",
    "upgrade": "upgrade",
    "volume": "volume",
}
"""The module below `terrace.cli` of each command. It is imported when the command is meant: all of them take as long as
most commands do."""


class Root(click.Group):
    """Turns every refusal into one line and an exit status; tracebacks are for bugs."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(_HOMES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _HOMES:
            return None
        module = import_module(f"terrace.cli.{_HOMES[name]}")
        command: click.Command = getattr(module, name.replace("-", "_"))
        return command

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *rest: Any, **options: Any) -> Any:
        change = LastChange()
        options |= {"standalone_mode": False, "obj": change}
        try:
            status = self._status(super().main, args, prog_name or "terrace", *rest, **options)
        except (click.Abort, KeyboardInterrupt) as stop:
            # Also a second interrupt, that came while the first one was seen to.
            with _deaf():
                _flush()
                complain(_stopped(stop, change))
            status = 1
        sys.exit(status)

    def _status(self, run: Callable[..., Any], *args: Any, **options: Any) -> int:
        """The exit status; what is to be said is said. Raises click.Abort, KeyboardInterrupt."""
        failure: OSError | None = None
        try:
            result = run(*args, **options)
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
        except OSError as error:
            failure, status = error, 1
        if (unwritten := _flush()) is not None:
            failure, status = unwritten, 1
        if failure is not None and failure.errno != errno.EPIPE:
            # All that has no sentence of its own, nor a file, is our output.
            bare = type(failure) is OSError and failure.filename is None
            complain(f"writing to standard output: {failure.strerror}" if bare else str(failure))
        return status


def _flush() -> OSError | None:
    """What keeps our output from being written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter must not try to flush the rest. Whoever closed a pipe has enough of our output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


@contextmanager
def _deaf() -> Iterator[None]:
    """No interrupt comes in there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stopped(stop: BaseException, change: LastChange) -> str:
    """What is said of Ctrl-C."""
    from terrace.apiclient import StoppedWaitingError
    from terrace.cli.waiting import stopped_afterwards, stopped_waiting

    error: BaseException | None = stop
    while error is not None:
        if isinstance(error, StoppedWaitingError):
            return stopped_waiting(error.path)
        error = error.__cause__ or error.__context__
    if change.path is None:
        return "stopped"
    return stopped_afterwards(change.path) if change.is_answered else stopped_waiting(change.path)


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--home", metavar="DIR", help="The daemon's home (default: as terraced chooses it).")
@click.version_option(package_name="terrace", message="terrace %(version)s")
@click.pass_context
def root(context: click.Context, home: str | None) -> None:
    """Manage the pools, volumes and snapshots of a running terraced.

    Sizes are powers of 1024: 512, 64M, 10G, 1.5T. Volumes are named POOL/VOL and snapshots
    POOL/VOL@SNAP, over NBD too.
    """
    context.obj = Context(home, context.obj)
