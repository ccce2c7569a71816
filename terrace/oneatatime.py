"""What operators change of one mirror, one after the other, and no NBD export for two mirrors.

A record is made from the one before it: of two that are wanted at the same time one would undo the other, as each names
all legs and all voters. Who comes second waits, and then sees what is there. Other mirrors aren't held up.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from nbd.uri import export_of
from tiers import TierError


class OneAtATime:
    """See the module."""

    def __init__(self) -> None:
        self._locks: dict[str, trio.Lock] = {}
        """Those that somebody has or waits for."""
        self._claimed: dict[object, str] = {}
        """Exports that are about to be legs, and of what."""

    @asynccontextmanager
    async def changing(self, what: str) -> AsyncIterator[None]:
        """Nobody else does, for as long. Not to be nested for the same."""
        # No checkpoint between finding the lock and having it, or waiting for it: it can't be thrown away in between.
        lock = self._locks.setdefault(what, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():
                self._locks.pop(what, None)

    @contextmanager
    def claiming(self, name: str, uris: Iterable[str]) -> Iterator[None]:
        """No other mirror takes these exports meanwhile. Raises TierError EBUSY with the one that does."""
        exports = {export_of(uri): uri for uri in uris}
        for export, uri in exports.items():
            if export in self._claimed:
                raise TierError(
                    errno.EBUSY,
                    f"{uri} is just being made a leg of {self._claimed[export]}, and each would overwrite the other "
                    "one's data: use another export",
                )
        self._claimed |= dict.fromkeys(exports, name)
        try:
            yield
        finally:
            for export in exports:
                del self._claimed[export]
