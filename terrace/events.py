"""What operators should hear of: a bounded list, kept over restarts in `events.jsonl` in the home.

`Events.add(kind, subject, text)` is all that others need. It never waits and never fails: a task writes the file, a
line of JSON for each event, and writes it anew when it has grown to twice what is kept. A crash may take the newest
few; a line that can't be read is passed over.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import trio

log = logging.getLogger(__name__)

KEPT = 1000
FILE_NAME = "events.jsonl"
MAX_TEXT = 500
_MAX_FILE_BYTES = 4 << 20


@dataclass(frozen=True)
class Event:
    """`number` grows by one with each event of a home; `time` is seconds since 1970."""

    number: int
    time: float
    kind: str
    subject: str
    text: str


class Events:
    """The events of one home. Belongs to the trio thread."""

    def __init__(self, home: Path) -> None:
        self._path = home / FILE_NAME
        self._events: deque[Event] = deque(_read(self._path), maxlen=KEPT)
        self._unsaved: list[Event] = []
        self._lines = KEPT * 2  # so that the first save writes the file anew
        self._wanted = trio.Event()
        self._added = trio.Event()

    def add(self, kind: str, subject: str, text: str) -> None:
        """Something happened: `kind` in a word, `subject` names the pool, volume or device."""
        number = self._events[-1].number + 1 if self._events else 1
        event = Event(number, time.time(), kind, subject, text[:MAX_TEXT])
        self._events.append(event)
        self._unsaved.append(event)
        self._wanted.set()
        self._added.set()
        self._added = trio.Event()

    def after(self, number: int) -> list[Event]:
        """Those that came after the event of that number, oldest first; all for 0."""
        return [event for event in self._events if event.number > number]

    async def wait(self, number: int, at_most_s: float) -> list[Event]:
        """As `after`; where there are none, wait for the next one so long."""
        found = self.after(number)
        if not found:
            with trio.move_on_after(at_most_s):
                await self._added.wait()
            found = self.after(number)
        return found

    async def run(self) -> NoReturn:
        """The task: write what was added. What comes while the daemon ends is written too."""
        try:
            while True:
                await self._wanted.wait()
                self._wanted = trio.Event()
                with trio.CancelScope(shield=True):  # else a cancellation could come between the two
                    await trio.to_thread.run_sync(self._save, *self._take())
        finally:
            if self._unsaved:
                self._save(*self._take())

    def _take(self) -> tuple[list[Event], bool]:
        anew = self._lines >= 2 * KEPT
        events = list(self._events) if anew else self._unsaved
        self._unsaved = []
        self._lines = len(events) if anew else self._lines + len(events)
        return events, anew

    def _save(self, events: list[Event], anew: bool) -> None:
        text = "".join(json.dumps(asdict(event)) + "\n" for event in events)
        try:
            if anew:
                beside = self._path.with_suffix(".new")
                beside.write_text(text)
                beside.replace(self._path)
            else:
                with self._path.open("a") as file:
                    file.write(text)
        except OSError as error:
            log.warning("events can't be kept in %s: %s", self._path, error.strerror)


def _read(path: Path) -> Iterable[Event]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _MAX_FILE_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("earlier events can't be read from %s: %s", path, error.strerror)
        return
    last = 0
    for line in lines:
        event = _event(line)
        if event is not None and event.number > last:
            last = event.number
            yield event


def _event(line: bytes) -> Event | None:
    try:
        body: Any = json.loads(line)
        event = Event(int(body["number"]), float(body["time"]), body["kind"], body["subject"], body["text"])
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None
    return event if all(isinstance(part, str) for part in (event.kind, event.subject, event.text)) else None
