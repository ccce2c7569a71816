"""What is known to be lost: blocks whose data can't be had any more, by volume and byte range.

The truth is in the map, where such a block's entry says BAD; this is the list of them that an operator is shown. It is
kept up when blocks are given up, completed by each `terrace pool check`, and asked of the map again before it is shown
(`refresh`): what was written, trimmed or deleted since is no loss any more. It lies in `losses.json` in the pool's
directory, replaced as a whole, before a checkpoint makes true what a replay would add to it; so a crash takes nothing
from it. If it is gone the next check makes it anew.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tiers.layout import BAD, BLOCK_SHIFT
from tiers.overlay import RangeSet
from tiers.scrubstate import replace_file

if TYPE_CHECKING:
    from tiers.reader import Reader

logger = logging.getLogger(__name__)

FILE_NAME = "losses.json"
VERSION = 1
MAX_RANGES = 10_000
"""So many ranges are kept by name; what is beyond them is only in the map."""
MAX_FILE_BYTES = 16 << 20
PIECE_BLOCKS = 4096


@dataclass(frozen=True)
class Loss:
    """A lost range of a volume, or of a snapshot (VOLUME@SNAPSHOT), whose map names it: bytes."""

    volume: str
    offset: int
    length: int


def lost_in_words(reader: "Reader", count: int = 1, more: str = "") -> str:
    """That so many blocks of a volume or snapshot are lost, and how that may have come: "the block was lost ...".

    `more`: stands before "blocks". Which of two causes it was isn't kept: a leg also loses what no other leg could read
    when it was brought up to date (`Volume.lose`), while all its devices are well.
    """
    what = "the block" if count == 1 and not more else f"{count} {more}block{'s' * (count != 1)}"
    if not reader.of_mirror:
        return f"{what} {'was' if count == 1 else 'were'} lost to a device error"
    are, them = ("is", "it") if count == 1 else ("are", "them")
    return f"{what} {are} lost: a device had an error, or no leg of a mirror could read {them}"


class Losses:
    """The lost ranges of one pool, by volume id. All of it belongs to the trio thread."""

    def __init__(self) -> None:
        self.changed = False
        """Something came or went since it was saved."""
        self._ranges: dict[int, RangeSet] = {}
        self._count = 0

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def add(self, volume_id: int, block: int, count: int = 1) -> None:
        """Blocks of a volume were lost."""
        if self._count >= MAX_RANGES:
            return
        ranges = self._ranges.setdefault(volume_id, RangeSet())
        self._count -= len(ranges)
        ranges.add(block, block + count)
        self._count += len(ranges)
        self.changed = True

    def listed(self, volumes: "Iterable[Reader]", most: int | None = None) -> list[Loss]:
        """The ranges by volume (or snapshot) and place, at most so many."""
        found: list[Loss] = []
        for volume in sorted((v for v in volumes if v.id in self._ranges), key=lambda v: v.name):
            ranges = self._ranges[volume.id]
            for start, end in zip(ranges.starts, ranges.ends, strict=True):
                offset = start << BLOCK_SHIFT
                stop = min(end << BLOCK_SHIFT, volume.size_bytes)
                if offset < stop:
                    found.append(Loss(volume.name, offset, stop - offset))
                if most is not None and len(found) >= most:
                    return found
        return found

    async def refresh(self, volumes: "Iterable[Reader]") -> None:
        """Ask the maps of volumes and snapshots which of these blocks are lost still."""
        there = {volume.id: volume for volume in volumes}
        before = self._ranges
        known = {volume_id: list(zip(r.starts, r.ends, strict=True)) for volume_id, r in before.items()}
        fresh: dict[int, RangeSet] = {}
        for volume_id, ranges in known.items():
            volume = there.get(volume_id)
            if volume is None:
                continue
            kept = fresh[volume_id] = RangeSet()
            for start, end in ranges:
                at, stop = start, min(end, (volume.size_bytes - 1 >> BLOCK_SHIFT) + 1)
                while at < stop:
                    count = min(PIECE_BLOCKS, stop - at)
                    try:
                        addresses, _ = await volume.entries(at, count)
                    except OSError:
                        addresses = [BAD] * count  # its map page is damaged: that is no better
                    for i, address in enumerate(addresses):
                        if address == BAD:
                            kept.add(at + i, at + i + 1)
                    at += count
        now = {volume_id: list(zip(r.starts, r.ends, strict=True)) for volume_id, r in before.items()}
        if self._ranges is not before or now != known:
            return  # something came meanwhile: next time
        fresh = {volume_id: ranges for volume_id, ranges in fresh.items() if ranges}
        pairs = {volume_id: (r.starts, r.ends) for volume_id, r in fresh.items()}
        if pairs != {volume_id: (r.starts, r.ends) for volume_id, r in before.items()}:
            self._ranges = fresh
            self._count = sum(map(len, fresh.values()))
            self.changed = True

    # -- keeping it --------------------------------------------------------------------------------------------------

    def load(self, directory: Path, pool_uuid: bytes) -> None:
        """Recall what was saved; nothing if that can't be. Blocks."""
        path = directory / FILE_NAME
        try:
            with path.open("rb") as file:
                body = json.loads(file.read(MAX_FILE_BYTES))
            if body["version"] != VERSION or body["pool"] != pool_uuid.hex():
                raise ValueError("it is of another version, or another pool's")
            found = Losses()
            for volume_id, ranges in body["ranges"].items():
                for start, end in ranges:
                    if not 0 <= int(start) < int(end) < 1 << 40:
                        raise ValueError(f"it has a range from {start} to {end}")
                    found.add(int(volume_id), int(start), int(end) - int(start))
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            logger.warning("%s is no use (%s): `terrace pool check` lists what is lost", path, error)
            return
        self._ranges, self._count = found._ranges, found._count

    def encoded(self, pool_uuid: bytes) -> bytes:
        """The file's content; from then on it counts as saved."""
        self.changed = False
        ranges = {i: list(zip(r.starts, r.ends, strict=True)) for i, r in self._ranges.items()}
        return json.dumps({"version": VERSION, "pool": pool_uuid.hex(), "ranges": ranges}).encode() + b"\n"

    @staticmethod
    def save(directory: Path, text: bytes) -> None:
        """Replace the file. Blocks; a failure costs only the list, and is logged."""
        try:
            replace_file(directory / FILE_NAME, text)
        except OSError as error:
            logger.warning("%s can't be saved: %s", directory / FILE_NAME, error.strerror or error)
