"""`terrace`, the command line: asks the daemon over its control API and shows the answer to people or to programs.

Tables by default, the API's JSON with `-o json`. Errors are one line on standard error; the exit status is 1, or 2
when the command itself was wrong.
"""

import signal
import sys

from terrace.stdio import fill_standard_streams

__all__ = ["main"]


def main() -> None:
    """The entry point. The commands are imported here, where Ctrl-C while they are is no traceback either."""
    fill_standard_streams(output_matters=True)
    try:
        from terrace.cli.root import root
    except KeyboardInterrupt:
        print("Error: stopped", file=sys.stderr)
        sys.exit(1)
    try:
        root()
    finally:
        # What is to be said is said. A second interrupt, as from `timeout -s INT`, would change the exit status.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
