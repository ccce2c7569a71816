"""Legs that were taken out of mirrors of this node's volumes, and may be left on their nodes: what a repetition needs.

A node that was away deletes its leg only by order of the primary, which has to show a record that the leg there obeys.
Once a mirror has ended, that record is nowhere else: the volume is a plain one. So the last record is kept here, by the
identity of the volume and not by its name, which another volume may have got. The file is replaced whole, durably, and
only helps: one that can't be read or written costs no more than that the command to run there has to be found there.

`removed-legs.json` in the home: {"version": 1, "removed": [{"volume", "record", "names": {NODE: POOL/VOL}}]}, the
oldest first. A tie-breaker that is to forget the mirror has no volume, and an empty name.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import trio

from replication.durable import replace_file
from replication.membership import Membership, decode, encode

log = logging.getLogger("terraced")

FILE: Final = "removed-legs.json"
MOST: Final = 100
"""So many mirrors, the newest, are kept in mind."""


@dataclass(frozen=True)
class Removed:
    """Of one mirror."""

    volume: str
    """The identity of the volume."""
    record: Membership
    """The last one: none of these has a leg by it."""
    names: Mapping[str, str]
    """By node: what the volume there is called; empty for a tie-breaker."""


class RemovedLegs:
    """See the module."""

    def __init__(self, home: Path) -> None:
        self._path = home / FILE
        self._lock = trio.Lock()

    async def of(self, volume: str) -> list[Removed]:
        """What may be left of mirrors of that volume, the newest first."""
        return [one for one in reversed(await self._read()) if one.volume == volume]

    async def add(self, volume: str, record: Membership, names: Mapping[str, str]) -> None:
        """These may be left; those that were of the same mirror before are left by the newer record."""
        async with self._lock:
            found = await self._read()
            before = [one for one in found if (one.volume, one.record.mirror) == (volume, record.mirror)]
            known = {node: name for one in before for node, name in one.names.items()} | {
                node: name for node, name in names.items() if name or not any(node in one.names for one in before)
            }
            kept = [one for one in found if one not in before]
            await self._write([*kept, Removed(volume, record, known)] if known else kept)

    async def drop(self, volume: str, mirror: str, nodes: Iterable[str]) -> None:
        """Nothing is left there of that mirror."""
        gone = set(nodes)
        async with self._lock:
            found = await self._read()
            kept = [
                replace(one, names={node: name for node, name in one.names.items() if node not in gone})
                if (one.volume, one.record.mirror) == (volume, mirror)
                else one
                for one in found
            ]
            if kept != found:
                await self._write([one for one in kept if one.names])

    async def _read(self) -> list[Removed]:
        try:
            return _decode(await trio.to_thread.run_sync(self._path.read_bytes))
        except FileNotFoundError:
            return []
        except OSError as error:
            log.warning("%s can't be read: %s", self._path, error.strerror or error)
            return []

    async def _write(self, removed: list[Removed]) -> None:
        rows = [
            {"volume": one.volume, "record": json.loads(encode(one.record)), "names": dict(one.names)}
            for one in removed[-MOST:]
        ]
        data = json.dumps({"version": 1, "removed": rows}).encode()
        try:
            await trio.to_thread.run_sync(replace_file, self._path, data)
        except OSError as error:
            log.warning("%s can't be written: %s", self._path, error.strerror or error)


def _decode(data: bytes) -> list[Removed]:
    """Raises OSError EPROTO."""
    try:
        found: Any = json.loads(data)
        if found["version"] != 1:
            raise OSError(errno.EPROTO, f"it is of version {found['version']}")
        return [
            Removed(
                str(one["volume"]),
                decode(json.dumps(one["record"]).encode()),
                {str(node): str(name) for node, name in one["names"].items()},
            )
            for one in found["removed"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(errno.EPROTO, f"it can't be understood: {error!r}") from None
