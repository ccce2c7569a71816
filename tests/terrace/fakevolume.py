"""A volume with snapshots in memory: what backups are made of, and what they are restored to, in tests."""

from __future__ import annotations

import contextlib
import io
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import trio

from terrace.backup.extents import Extent, combine
from terrace.backup.restore import Held, Marker
from terrace.backup.stream import Header, Snapshot, StreamReader
from terrace.backup.write import write_stream

BLOCK = 4096
STREAM_ID = bytes(range(16))


class MemorySink:
    def __init__(self) -> None:
        self.data = bytearray()

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.data += data


@dataclass
class FakeSource:
    """One version of a volume, and another that it is described against; `step` breaks descriptions up."""

    image: bytes
    base: bytes | None = None
    step: int = 1 << 40
    reads: list[tuple[int, int]] = field(default_factory=list)
    reading: int = 0
    most_reading: int = 0
    on_read: Callable[[int], None] = lambda offset: None

    @property
    def size_bytes(self) -> int:
        return len(self.image)

    async def extents(self, offset: int, length: int) -> Sequence[Extent]:
        await trio.lowlevel.checkpoint()
        starts = range(offset, min(offset + length, offset + self.step, len(self.image)), BLOCK)
        blocks = [(start, min(start + BLOCK, len(self.image))) for start in starts]
        allocation = [(end - start, 0 if any(self.image[start:end]) else 3) for start, end in blocks]
        if self.base is None:
            return combine(offset, length, allocation, None)
        grown = self.base.ljust(len(self.image), b"\0")
        changed = [(end - start, int(self.image[start:end] != grown[start:end])) for start, end in blocks]
        return combine(offset, length, allocation, changed)

    async def read(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        self.reading += 1
        self.most_reading = max(self.reading, self.most_reading)
        await trio.lowlevel.checkpoint()
        self.reading -= 1
        self.on_read(offset)
        return self.image[offset : offset + length]


@dataclass
class FakeVolume:
    """Where a restore goes: destination and state in one."""

    image: bytearray = field(default_factory=bytearray)
    exists: bool = False
    markers: list[tuple[Marker, bytes]] = field(default_factory=list)
    fail_at: int | None = None
    writes: int = 0
    filling: bool = False

    @contextlib.asynccontextmanager
    async def open(self, size_bytes: int) -> AsyncIterator[FakeVolume]:
        await trio.lowlevel.checkpoint()
        self.exists = self.filling = True
        self.image = self.image[:size_bytes].ljust(size_bytes, b"\0")
        yield self

    async def write(self, offset: int, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self.fail_at is not None and offset >= self.fail_at:
            raise OSError(5, "it broke")
        self.writes += 1
        self.image[offset : offset + len(data)] = data

    async def write_zeroes(self, offset: int, length: int) -> None:
        await self.write(offset, bytes(length))

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()

    async def held(self) -> Held | None:
        await trio.lowlevel.checkpoint()
        if not self.exists:
            return None
        if not self.markers:
            return Held(None, False, not self.filling)
        marker, image = self.markers[-1]
        return Held(Marker.parse(marker.name), image == self.image, not self.filling)

    async def mark(self, marker: Marker) -> None:
        await trio.lowlevel.checkpoint()
        self.markers.append((marker, bytes(self.image)))

    async def finish(self) -> None:
        await trio.lowlevel.checkpoint()
        self.filling = False


@dataclass
class FakeOrigin:
    """A live volume with snapshots."""

    image: bytearray
    pool: str = "demo"
    volume: str = "vol"
    volume_id: str = "pool:v"
    versions: list[tuple[Snapshot, bytes]] = field(default_factory=list)
    taken: int = 0
    fail_drop: str = ""
    on_read: Callable[[int], None] = lambda offset: None

    async def snapshots(self) -> Sequence[Snapshot]:
        await trio.lowlevel.checkpoint()
        return [one for one, _ in self.versions]

    async def take(self, name: str) -> Snapshot:
        await trio.lowlevel.checkpoint()
        self.taken += 1
        made = Snapshot(name, f"pool:{self.taken}", (1_700_000_000 + 3600 * self.taken) * 1_000_000)
        self.versions.append((made, bytes(self.image)))
        return made

    async def drop(self, name: str) -> None:
        await trio.lowlevel.checkpoint()
        if name == self.fail_drop:
            raise OSError(16, "it is held")
        self.versions = [one for one in self.versions if one[0].name != name]

    @contextlib.asynccontextmanager
    async def open(self, snapshot: Snapshot, base: Snapshot | None) -> AsyncIterator[FakeSource]:
        await trio.lowlevel.checkpoint()
        images = {one.id: image for one, image in self.versions}
        yield FakeSource(images[snapshot.id], images[base.id] if base else None, on_read=self.on_read)

    @property
    def names(self) -> list[str]:
        return [one.name for one, _ in self.versions]


def snapshot(number: int) -> Snapshot:
    return Snapshot(f"s{number}", f"pool:{number}", (1_700_000_000 + 3600 * number) * 1_000_000)


def header(size_bytes: int, number: int, base: int | None = None, volume_id: str = "pool:v") -> Header:
    return Header(
        *("demo", "vol", volume_id, snapshot(number), None if base is None else snapshot(base)),
        *(size_bytes, 1_700_000_000_000_000 + number, "terrace 0.1.0", STREAM_ID),
    )


def stream_of(
    image: bytes, number: int = 1, base: tuple[int, bytes] | None = None, *, step: int = 1 << 40, level: int = 1
) -> bytes:
    """Version `number` of a volume as a stream; incremental if `base` is given (number, image)."""

    async def main() -> bytes:
        sink = MemorySink()
        source = FakeSource(image, None if base is None else base[1], step)
        await write_stream(source, sink, header(len(image), number, None if base is None else base[0]), level=level)
        return bytes(sink.data)

    return trio.run(main)


def reader(stream: bytes, name: str = "backup") -> StreamReader:
    return StreamReader(io.BytesIO(stream), name)
