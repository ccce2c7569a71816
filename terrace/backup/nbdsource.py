"""Snapshots and volumes over NBD, as the source of a backup and the target of a restore."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator, Iterator, Sequence

from nbd.client import Client, connect
from terrace.backup.errors import BackupError
from terrace.backup.extents import Extent, Need, combine

ALLOCATION = "base:allocation"


def diff_context(base: str) -> str:
    """The metadata context that tells what changed since a snapshot of the same volume."""
    return f"terrace:diff:{base}"


class NbdSource:
    """An export that is read, described by its allocation and, for an increment, by what changed since `base`."""

    def __init__(self, client: Client, base: str | None) -> None:
        self._client = client
        self._diff = diff_context(base) if base is not None else None

    @property
    def size_bytes(self) -> int:
        return self._client.size_bytes

    async def extents(self, offset: int, length: int) -> Sequence[Extent]:
        found = await self._client.block_status(offset, length)
        return combine(offset, length, found[ALLOCATION], found[self._diff] if self._diff is not None else None)

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(await self._client.read(offset, length))


@contextlib.asynccontextmanager
async def open_source(uri: str, base: str | None) -> AsyncIterator[NbdSource]:
    """An export by its NBD URI. Raises BackupError if its server doesn't say what a backup must know."""
    wanted = [ALLOCATION, *([diff_context(base)] if base is not None else [])]
    with _sentences():
        async with connect(uri, contexts=wanted) as client:
            for context in wanted:
                # Without a description everything would have to be read, and an increment would be none.
                if context not in client.contexts:
                    raise BackupError(
                        errno.ENOTSUP, f"{client.peer} doesn't offer {context}; see that terraced is of this release"
                    )
            yield NbdSource(client, base)


@contextlib.asynccontextmanager
async def open_target(uri: str, size_bytes: int) -> AsyncIterator[Client]:
    """A volume to be written, by its NBD URI. Raises BackupError if it isn't of that size, or can't be written."""
    with _sentences():
        async with connect(uri) as client:
            if client.size_bytes != size_bytes:
                raise BackupError(
                    errno.EPROTO, f"{client.peer} has {client.size_bytes} bytes and not {size_bytes}; restore again"
                )
            if client.read_only:
                raise BackupError(errno.EROFS, f"{client.peer} can't be written; see terrace pool list")
            yield client


async def is_unchanged(uri: str, since_uri: str, since: str) -> bool:
    """Whether a snapshot has the same size and contents as an older one of the volume, each by its NBD URI."""
    async with open_source(since_uri, None) as older:
        size_bytes = older.size_bytes
    async with open_source(uri, since) as source:
        if source.size_bytes != size_bytes:
            return False
        offset = 0
        while offset < source.size_bytes:
            extents = await source.extents(offset, source.size_bytes - offset)
            if any(extent.need is not Need.SAME for extent in extents):
                return False
            offset = extents[-1].end
        return True


@contextlib.contextmanager
def _sentences() -> Iterator[None]:
    """What the client raises, as BackupError: the client's errors are sentences in plain OSErrors."""
    try:
        yield
    except OSError as error:
        # A reader of our output that has gone is nobody's failure here.
        if isinstance(error, BackupError) or error.errno == errno.EPIPE:
            raise
        raise BackupError(
            error.errno or errno.EIO, f"{error.strerror or error}; see terrace status, and the log of terraced"
        ) from None
