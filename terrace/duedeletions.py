"""Deletions of snapshots that legs of mirrors still owe, since they were away: remembered by the primary, in its home.

HOME/snapshot-deletions.json, JSON in UTF-8, written beside and renamed into place, durable before a deletion is told:

    {"version": 1, "due": [{"mirror", "leg", "node", "term": [number, id], "epoch", "names": [...]}, ...]}

`term` and `epoch` are of the record in force when it was asked for. A name may be given again: what is due holds only
for as long as no other node was primary since then, which the record's history tells (`holds`). A file that can't be
understood, or read, is put aside (`.bad`) and told: what it owed stays on those legs, where `terrace snapshot list`
shows it.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from replication.durable import replace_file
from replication.membership import Membership, Term

log = logging.getLogger("terraced")

FILE_NAME: Final = "snapshot-deletions.json"
VERSION: Final = 1
MAX_NAMES: Final = 10_000
"""Of one leg; of more, the oldest are forgotten."""


@dataclass(frozen=True)
class Due:
    """What one leg is to delete."""

    mirror: str
    leg: str
    node: str
    term: Term
    epoch: int
    names: tuple[str, ...]


def holds(due: Due, membership: Membership, node: str) -> bool:
    """Whether `node` alone has been primary since, so that a name still means the snapshot that was deleted."""
    place = (due.term.number, due.epoch)
    if not any(one.term == due.term and one.epoch <= due.epoch for one in membership.history):
        return False
    later = [one for one in membership.history if (one.term.number, one.epoch) > place]
    return all(one.primary in (node, None) for one in later)


class DueDeletions:
    """The file. One task at a time changes it."""

    def __init__(self, home: Path, tell: Callable[[str, str, str], None]) -> None:
        self._path = home / FILE_NAME
        self._tell = tell
        self._lock = trio.Lock()
        self._due = self._read()

    def of(self, mirror: str) -> list[Due]:
        """What is due of a mirror, a copy."""
        return [one for one in self._due if one.mirror == mirror]

    def __bool__(self) -> bool:
        return bool(self._due)

    async def add(self, due: Due) -> None:
        """Durable on return. Raises OSError."""
        async with self._lock:
            earlier = [one for one in self._due if (one.mirror, one.leg) == (due.mirror, due.leg)]
            names = tuple(dict.fromkeys(name for one in [*earlier, due] for name in one.names))[-MAX_NAMES:]
            merged = Due(due.mirror, due.leg, due.node, due.term, due.epoch, names)
            await self._save([*(one for one in self._due if one not in earlier), merged])

    async def drop(self, mirror: str, leg: str, names: Iterable[str] | None = None, *, only: Due | None = None) -> None:
        """These aren't due any more, or none of that leg: `only` where that is still what it was. Raises OSError."""
        async with self._lock:
            gone = None if names is None else set(names)
            changed = []
            for one in self._due:
                if (one.mirror, one.leg) == (mirror, leg) and only in (None, one):
                    left = () if gone is None else tuple(name for name in one.names if name not in gone)
                    if not left:
                        continue
                    one = Due(one.mirror, one.leg, one.node, one.term, one.epoch, left)
                changed.append(one)
            if changed != self._due:
                await self._save(changed)

    async def _save(self, due: list[Due]) -> None:
        data = json.dumps({"version": VERSION, "due": [_plain(one) for one in due]}).encode()
        await trio.to_thread.run_sync(replace_file, self._path, data)
        self._due = due

    def _read(self) -> list[Due]:
        try:
            found = json.loads(self._path.read_bytes())
            if found["version"] != VERSION:
                raise ValueError(f"version {found['version']!r}")
            return [_due(one) for one in found["due"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            aside = self._path.with_suffix(".bad")
            with contextlib.suppress(OSError):  # it is told, and replaced by what is due next
                self._path.replace(aside)
            self._tell(
                "mirror",
                FILE_NAME,
                f"{self._path} can't be understood ({error}) and is {aside} now: snapshots that were to be deleted on "
                "legs that are away stay there; terrace snapshot list shows them",
            )
            return []


def _plain(due: Due) -> dict[str, Any]:
    term = [due.term.number, due.term.id]
    return {
        "mirror": due.mirror,
        "leg": due.leg,
        "node": due.node,
        "term": term,
        "epoch": due.epoch,
        "names": list(due.names),
    }


def _due(plain: Any) -> Due:
    number, term_id = plain["term"]
    names, texts = plain["names"], (plain["mirror"], plain["leg"], plain["node"], term_id)
    if type(number) is not int or type(plain["epoch"]) is not int or type(names) is not list:
        raise TypeError("a value of another kind")
    if not all(type(text) is str for text in (*texts, *names)):
        raise TypeError("a value of another kind")
    return Due(plain["mirror"], plain["leg"], plain["node"], Term(number, term_id), plain["epoch"], tuple(names))
