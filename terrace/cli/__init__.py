"""`terrace`, the command line: asks the daemon over its control API and shows the answer to people or to programs.

Tables by default, the API's JSON with `-o json`. Errors are one line on standard error; the exit status is 1, or 2
when the command itself was wrong.
"""

from terrace.cli.root import main

__all__ = ["main"]
