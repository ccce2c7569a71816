"""A running terraced as the origin of backups and the target of restores: its control API for names, NBD for bytes.

The API's client blocks, so everything that asks it does so from a worker thread.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import quote

import trio

from terrace.apiclient import ApiClient, ApiError
from terrace.backup.errors import BackupError
from terrace.backup.nbdsource import is_unchanged, open_source, open_target
from terrace.backup.restore import Held, Marker, Target
from terrace.backup.stream import Snapshot
from terrace.backup.write import Source

_PROBE = "restore-check"
"""The snapshot that a target gets for as long as it takes to compare it with its marker."""
_TIDY_S = 10.0


class _Volume:
    """What both directions need of one volume."""

    def __init__(self, client: ApiClient, pool: str, volume: str) -> None:
        self.pool = pool
        self.volume = volume
        self._client = client
        self._path = ("pools", pool, "volumes", volume)
        self._uuid = str(client.get("pools", pool).get("uuid", ""))
        self._uris: list[str] = client.get("status")["nbd"]["uris"]

    def uri(self, snapshot: str | None = None) -> str:
        """The NBD URI, over the Unix socket where there is one."""
        base, question, query = min(self._uris, key=lambda uri: not uri.startswith("nbd+unix:")).partition("?")
        export = f"{self.pool}/{self.volume}" + (f"@{snapshot}" if snapshot is not None else "")
        return f"{base}{quote(export)}{question}{query}"

    async def ask(self, method: str, *path: str, body: object = None) -> Any:
        return await trio.to_thread.run_sync(lambda: self._client.request(method, *path, body=body))

    async def snapshots(self) -> list[Snapshot]:
        """Oldest first."""
        answer = await self.ask("GET", *self._path, "snapshots")
        return sorted(map(self._snapshot, answer), key=lambda snapshot: snapshot.taken_us)

    async def take(self, name: str, *, by_filler: bool = False) -> Snapshot:
        body = {"name": name} | ({"by_filler": True} if by_filler else {})
        return self._snapshot(await self.ask("POST", *self._path, "snapshots", body=body))

    async def drop(self, name: str) -> None:
        await self.ask("DELETE", *self._path, "snapshots", name)

    def _snapshot(self, answer: dict[str, Any]) -> Snapshot:
        """Ids are unique in a pool, and never given out twice; a pool's uuid makes them so everywhere."""
        name = str(answer["name"]).rpartition("@")[2]
        return Snapshot(name, f"{self._uuid}/{answer['id']}", round(float(answer["created_at"]) * 1e6))


class DaemonOrigin(_Volume):
    """`Origin`: a volume of a running daemon. Blocks when made; raises ApiError."""

    def __init__(self, client: ApiClient, pool: str, volume: str) -> None:
        super().__init__(client, pool, volume)
        found = client.get(*self._path)
        self.volume_id = f"{self._uuid}/{found.get('id', volume)}"

    def open(self, snapshot: Snapshot, base: Snapshot | None) -> AbstractAsyncContextManager[Source]:
        return open_source(self.uri(snapshot.name), base.name if base is not None else None)


class DaemonTarget(_Volume):
    """`Destination` and `RestoredState`: a volume of a running daemon, or one that will be. Blocks when made."""

    def __init__(self, client: ApiClient, pool: str, volume: str, policy: str) -> None:
        super().__init__(client, pool, volume)
        self._policy = policy
        self._is_new = False

    async def held(self) -> Held | None:
        """What the volume holds; None if there is none yet."""
        found = await self._find()
        if found is None:
            self._is_new = True
            return None
        snapshots = await self.snapshots()
        markers = [one for one in snapshots if Marker.parse(one.name) is not None]
        if not markers:
            return Held(None, unchanged=False, is_complete=not found["filling"])
        if any(one.name == _PROBE for one in snapshots):  # of a restore that was killed
            await self.drop(_PROBE)
        newest = markers[-1]
        if found["filling"]:
            return Held(Marker.parse(newest.name), unchanged=False, is_complete=False)
        return Held(Marker.parse(newest.name), unchanged=await self._is_unchanged(newest))

    @contextlib.asynccontextmanager
    async def open(self, size_bytes: int) -> AsyncIterator[Target]:
        found = await self._find()
        if found is None:
            if not self._is_new:
                raise BackupError(errno.ENOENT, f"{self.pool}/{self.volume} is gone; restore again")
            body = {"name": self.volume, "size": size_bytes, "policy": self._policy, "filling": True}
            await self.ask("POST", "pools", self.pool, "volumes", body=body)
            self._is_new = False
        elif self._is_new:
            raise BackupError(
                errno.EEXIST, f"somebody has made {self.pool}/{self.volume} meanwhile; name another volume"
            )
        else:
            await self.ask("PUT", *self._path, "filling", body={"filling": True})
            if found["size_bytes"] != size_bytes:
                await self.ask("PATCH", *self._path, body={"size": size_bytes, "shrink": True})
        async with open_target(self.uri(), size_bytes) as client:
            yield client

    async def mark(self, marker: Marker) -> None:
        await self.take(marker.name, by_filler=True)

    async def finish(self) -> None:
        await self.ask("PUT", *self._path, "filling", body={"filling": False})

    async def _find(self) -> dict[str, Any] | None:
        try:
            return dict(await self.ask("GET", *self._path))
        except ApiError as error:
            if error.errno != errno.ENOENT:
                raise
            return None

    async def _is_unchanged(self, marker: Snapshot) -> bool:
        """Compare with a snapshot of now, since only of snapshots it is told what is different."""
        await self.take(_PROBE)
        try:
            return await is_unchanged(self.uri(_PROBE), self.uri(marker.name), marker.name)
        finally:
            with trio.move_on_after(_TIDY_S, shield=True):
                await self.drop(_PROBE)
