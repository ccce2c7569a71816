"""Standard input, output and error, where who started the program has closed them.

A descriptor that is free is what the next `open` gets: a device of a pool could be number 2, and what the C library
says of a program that breaks down would be written over its data. And Python has None where it has a file otherwise.
So each of the three that is closed is opened before anything else is:

| | on | so that |
|---|---|---|
| input | /dev/null, for reading | it is empty |
| output | /dev/null; of commands for *reading* | what a command could not write is an error, as it is on a full disk |
| error | /dev/null, for writing | there is nobody to tell |
"""

from __future__ import annotations

import os
import sys


def fill_standard_streams(*, output_matters: bool) -> None:
    """Open those that are closed; `output_matters`: writing to an output that was closed fails."""
    if sys.stdin is None:
        sys.stdin = os.fdopen(_null(0, os.O_RDONLY), closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(_null(1, os.O_RDONLY if output_matters else os.O_WRONLY), "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(_null(2, os.O_WRONLY), "w", closefd=False)


def _null(descriptor: int, flags: int) -> int:
    opened = os.open(os.devnull, flags)
    if opened != descriptor:
        os.dup2(opened, descriptor)
        os.close(opened)
    os.set_inheritable(descriptor, True)  # as they are for who is started by us
    return descriptor
