"""A `LegStore` in memory: what is durable is apart from what is believed, and a save can fail either way."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from typing import cast

import trio

from replication.leg import EXTENT_BYTES, Extents
from replication.membership import LegInfo, Membership, Options, Term

SIZE_BYTES = 1 << 20
MIRROR = "ab" * 16


class MemoryExtents:
    """A set of extents."""

    def __init__(self, indices: set[int] | None = None) -> None:
        self.indices = indices or set()

    def add(self, offset: int, length: int) -> None:
        self.indices |= set(range(offset // EXTENT_BYTES, -(-(offset + length) // EXTENT_BYTES)))

    def discard(self, offset: int, length: int) -> None:
        self.indices -= set(range(-(-offset // EXTENT_BYTES), (offset + length) // EXTENT_BYTES))

    def runs(self, start: int = 0) -> Iterator[tuple[int, int]]:
        first = None
        ordered = sorted(self.indices)
        for index in ordered:
            first = index if first is None else first
            if index + 1 not in self.indices:
                if (index + 1) * EXTENT_BYTES > start:
                    yield first * EXTENT_BYTES, (index + 1 - first) * EXTENT_BYTES
                first = None

    def update(self, other: Extents) -> None:
        self.indices |= cast(MemoryExtents, other).indices

    def clear(self) -> None:
        self.indices.clear()

    def encode(self) -> bytes:
        return json.dumps(sorted(self.indices)).encode()

    @property
    def count(self) -> int:
        return len(self.indices)

    def __bool__(self) -> bool:
        return bool(self.indices)


class MemoryStore:
    """Enough of a `LegStore` for its keeper: a record and trackers."""

    def __init__(self, name: str = "fast/vol") -> None:
        self.export_name = name
        self.size_bytes = SIZE_BYTES
        self.record = b""
        self.trackers: dict[str, Extents] = {}
        self.durable: tuple[bytes, dict[str, bytes]] = (b"", {})
        self.saves = 0
        self.failing: str = ""
        """"before", "after": the next save fails before or after it has become durable; "dead", "full": all do, before,
        and a dead one is known to be that."""

    @property
    def no_writes(self) -> str | None:
        return "the disk is dead" if self.failing == "dead" else None

    async def save(self, record: bytes, trackers: dict[str, Extents] | None = None) -> None:
        failing, self.failing = self.failing, self.failing if self.failing in ("dead", "full") else ""
        now = self.trackers if trackers is None else trackers
        self.trackers = now  # from the call on, however it ends
        if failing in ("before", "dead", "full"):
            await trio.lowlevel.checkpoint()
            if failing == "full":
                raise OSError(errno.ENOSPC, "the pool is full")
            raise OSError(errno.EIO, "the disk has failed")
        self.durable = record, {name: one.encode() for name, one in now.items()}
        await trio.lowlevel.checkpoint()
        if failing == "after":
            raise OSError(errno.EIO, "the disk has failed, but later")
        self.saves += 1
        self.record = record

    def crash(self) -> None:
        """What is left after the machine went down."""
        self.record = self.durable[0]
        self.trackers = {name: self.decode_extents(data) for name, data in self.durable[1].items()}

    def wrote(self, offset: int, length: int) -> None:
        for one in self.trackers.values():
            one.add(offset, length)

    def empty_extents(self) -> Extents:
        return MemoryExtents()

    def decode_extents(self, data: bytes) -> Extents:
        return MemoryExtents(set(json.loads(data)))

    def write_now(self, writes: list[tuple[int, memoryview]]) -> bool:
        return False

    def trim_now(self, ranges: list[tuple[int, int]]) -> bool:
        return False

    def read_now(self, offset: int, length: int, into: memoryview) -> bool:
        return False

    async def write(self, offset: int, data: memoryview | bytes) -> None:
        raise AssertionError

    async def trim(self, offset: int, length: int) -> None:
        raise AssertionError

    async def lose(self, offset: int, length: int) -> None:
        raise AssertionError

    async def read(self, offset: int, length: int, into: memoryview) -> None:
        raise AssertionError

    async def flush(self) -> None: ...

    async def checks(self, offset: int, length: int) -> bytes:
        raise AssertionError

    async def mapped(self, offset: int, length: int) -> list[tuple[int, int]]:
        raise AssertionError

    async def resize(self, size_bytes: int) -> None:
        raise AssertionError

    async def snapshot(self, name: str) -> None:
        raise AssertionError


def leg(node: str) -> LegInfo:
    """The leg of a node: its id is the node's name."""
    return LegInfo(node, node, "fast/vol")


def first_record(
    legs: str, *, diskless: str = "", primary: str = "a", in_sync: str = "", options: Options | None = None
) -> Membership:
    """One letter for each node: of its leg too."""
    record = Membership(
        mirror=MIRROR,
        size_bytes=SIZE_BYTES,
        legs=tuple(leg(node) for node in legs),
        voters=tuple(legs + diskless),
        term=Term(1, "1" * 16),
        epoch=0,
        primary=primary,
        in_sync=frozenset(in_sync or legs),
        options=options or Options(),
    )
    return record._followed(record)
