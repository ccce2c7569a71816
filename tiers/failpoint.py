"""Named places in the engine at which a test may stop the machine, or look on.

`hit` says that the engine is about to go on from such a place. It does nothing unless a test is `watching`. It stands
at the steps of rare things (checkpoints, moves, recovery, records of volumes), and never on the path of a client's
single read or write.

A name is written out where it is hit, since the simulation finds all names by looking for `hit("...")` in this
package, and demands that its seeds reach and crash at each of them.
"""

import contextlib
from collections.abc import Callable, Iterator

_watcher: Callable[[str], None] | None = None


def hit(name: str) -> None:
    """The engine has come to the place of this name."""
    if _watcher is not None:
        _watcher(name)


@contextlib.contextmanager
def watching(watcher: Callable[[str], None]) -> Iterator[None]:
    """Have `watcher` called with the name of each place that is hit, for tests."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before
