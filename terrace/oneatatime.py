"""What operators change of one mirror, one after the other, and no NBD export for two mirrors.

A record is made from the one before it: of two that are wanted at the same time one would undo the other, as each names
all legs and all voters. Who comes second waits, and then sees what is there. Other mirrors aren't held up.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Hashable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

import trio

from terrace.sameexports import Marks
from tiers import TierError


class OneAtATime:
    """See the module."""

    def __init__(self) -> None:
        self._locks: dict[str, trio.Lock] = {}
        """Those that somebody has or waits for."""
        self._claimed: dict[Hashable, str] = {}
        """Marks of exports that are about to be legs, and of what."""

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
    def claiming(self, name: str, exports: Mapping[str, Marks]) -> Iterator[None]:
        """No other mirror takes these exports meanwhile. Raises TierError EBUSY with the one that does.

        `exports`: by URI, as `terrace.sameexports.SameExports.marks` has them.
        """
        for uri, marks in exports.items():
            for mark in marks & self._claimed.keys():
                raise TierError(
                    errno.EBUSY,
                    f"{uri} is just being made a leg of {self._claimed[mark]}, and each would overwrite the other "
                    "one's data: use another export",
                )
        claimed = frozenset[Hashable]().union(*exports.values())
        self._claimed |= dict.fromkeys(claimed, name)
        try:
            yield
        finally:
            for mark in claimed:
                del self._claimed[mark]
