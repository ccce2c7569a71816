"""An export in memory whose behaviour a test chooses: at once, slow, or failing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import trio

from nbd import wire

GRAIN = 4096


@dataclass
class MemoryExport:
    """A bytearray. ``slow``: the ``_now`` calls decline. ``fail``: asked before every operation."""

    name: str = "mem"
    size_bytes: int = 1 << 20
    description: str = "bytes in memory"
    read_only: bool = False
    rotational: bool = False
    can_multi_conn: bool = True
    minimum_block_size: int = 1
    preferred_block_size: int = 4096
    maximum_payload: int = wire.MAX_PAYLOAD_BYTES
    slow: bool = False
    delay_s: float = 0.0
    fail: Callable[[str, int, int], int] = lambda operation, offset, length: 0
    hold: trio.Event | None = None  # slow operations wait for it
    calls: list[tuple[str, int, int]] = field(default_factory=list)
    recording: bool = True

    def __post_init__(self) -> None:
        self.data = bytearray(self.size_bytes)
        self.allocated = bytearray(-(-self.size_bytes // GRAIN))
        self.view = memoryview(self.data)
        self.running = 0
        self.peak_running = 0

    def _begin(self, operation: str, offset: int, length: int) -> None:
        if self.recording:
            self.calls.append((operation, offset, length))
        assert offset >= 0 and length >= 0 and offset + length <= self.size_bytes, (operation, offset, length)
        error = self.fail(operation, offset, length)
        if error:
            raise OSError(error, os.strerror(error))

    def _touch(self, offset: int, length: int, value: int) -> None:
        if length:
            for grain in range(offset // GRAIN, (offset + length - 1) // GRAIN + 1):
                self.allocated[grain] = value

    def read_now(self, offset: int, length: int, into: memoryview) -> bool:
        assert len(into) == length
        if self.slow:
            return False
        self._begin("read_now", offset, length)
        into[:] = self.view[offset : offset + length]
        return True

    def write_now(self, writes: list[tuple[int, memoryview]]) -> bool:
        if self.slow:
            return False
        for offset, data in writes:
            self._begin("write_now", offset, len(data))
        for offset, data in writes:
            self.view[offset : offset + len(data)] = data
            if self.recording:
                self._touch(offset, len(data), 1)
        return True

    async def _pause(self) -> None:
        self.running += 1
        self.peak_running = max(self.peak_running, self.running)
        try:
            await trio.sleep(self.delay_s)
            if self.hold is not None:
                await self.hold.wait()
        finally:
            self.running -= 1

    async def read(self, offset: int, length: int, into: memoryview) -> None:
        await self._pause()
        self._begin("read", offset, length)
        into[:] = self.view[offset : offset + length]

    async def write(self, offset: int, data: memoryview | bytes) -> None:
        await self._pause()
        self._begin("write", offset, len(data))
        self.view[offset : offset + len(data)] = data
        self._touch(offset, len(data), 1)

    async def flush(self) -> None:
        await self._pause()
        self._begin("flush", 0, 0)

    def trim_now(self, ranges: list[tuple[int, int]]) -> bool:
        if self.slow:
            return False
        for offset, length in ranges:
            self._begin("trim", offset, length)
        for offset, length in ranges:
            self._forget(offset, length)
        return True

    async def trim(self, offset: int, length: int) -> None:
        await self._pause()
        self._begin("trim", offset, length)
        self._forget(offset, length)

    def _forget(self, offset: int, length: int) -> None:
        first, last = -(-offset // GRAIN), (offset + length) // GRAIN
        if first < last:
            self.data[first * GRAIN : last * GRAIN] = bytes((last - first) * GRAIN)
            self._touch(first * GRAIN, (last - first) * GRAIN, 0)

    async def write_zeroes(self, offset: int, length: int, *, no_hole: bool, fast: bool = False) -> None:
        await self._pause()
        self._begin("zero_no_hole" if no_hole else "zero", offset, length)
        self.data[offset : offset + length] = bytes(length)

    async def cache(self, offset: int, length: int) -> None:
        await self._pause()
        self._begin("cache", offset, length)

    async def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        await self._pause()
        self._begin("extents", offset, length)
        hole = wire.STATE_HOLE | wire.STATE_ZERO
        return self._runs([0 if used else hole for used in self.allocated], offset, length, limit)

    def _runs(self, grains: list[int], offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        extents: list[tuple[int, int]] = []
        position = offset
        while position < offset + length:
            grain = position // GRAIN
            until = min((grain + 1) * GRAIN, offset + length)
            flags = grains[grain]
            if extents and extents[-1][1] == flags:
                extents[-1] = (extents[-1][0] + until - position, flags)
            elif len(extents) == limit:
                break
            else:
                extents.append((until - position, flags))
            position = until
        return extents


@dataclass
class ContextExport(MemoryExport):
    """It offers contexts of its own: for each name, the flags of each grain. Some are told only to who knows them."""

    flags: dict[str, list[int]] = field(default_factory=dict)
    unlisted: set[str] = field(default_factory=set)

    def contexts(self, prefix: str) -> Iterable[str]:
        return (name for name in self.flags if name.startswith(prefix) and name not in self.unlisted)

    def has_context(self, name: str) -> bool:
        return name in self.flags

    async def context_extents(self, context: str, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        await self._pause()
        self._begin(context, offset, length)
        if context not in self.flags:
            raise FileNotFoundError(errno.ENOENT, f"{context} is gone")
        return self._runs(self.flags[context], offset, length, limit)


ZEROES = bytes(GRAIN)


@dataclass
class SparseExport(ContextExport):
    """It tells holes: whatever is zeroes, grain by grain. ``unknown``: not without waiting."""

    unknown: bool = False

    def holes_now(self, offset: int, length: int, shortest: int) -> list[tuple[int, int]] | None:
        if self.unknown:
            return None
        self._begin("holes_now", offset, length)
        at = offset
        holes: list[tuple[int, int]] = []
        while at < offset + length:
            stop = min(at + GRAIN - at % GRAIN, offset + length)
            if self.data.startswith(ZEROES[: stop - at], at):
                if holes and sum(holes[-1]) == at:
                    holes[-1] = (holes[-1][0], holes[-1][1] + stop - at)
                else:
                    holes.append((at, stop - at))
            at = stop
        return holes


Acknowledgement = Callable[[OSError | None], None]


@dataclass
class LaterExport(MemoryExport):
    """It has what it is handed over at once, and acknowledges when `acknowledge` is called, as `run` does by itself.

    ``would_block``: what the calls then say. ``refuses``: asked first, may give an errno to raise.
    """

    would_block: Callable[[], bool] = lambda: False
    refuses: Callable[[int], int] = lambda count: 0
    pending: list[tuple[list[int], Acknowledgement]] = field(default_factory=list)
    lost: list[OSError] = field(default_factory=list)
    """What is acknowledged next gets these errors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.wake = trio.Event()

    def write_now(self, writes: list[tuple[int, memoryview]]) -> bool:
        raise AssertionError("write_later is there in its place")

    def trim_now(self, ranges: list[tuple[int, int]]) -> bool:
        raise AssertionError("trim_later is there in its place")

    def write_later(self, writes: list[tuple[int, memoryview]], done: Acknowledgement) -> bool:
        if not self._accepts(len(writes)):
            return False
        if not super().write_now(writes):
            return False
        return self._accepted([offset for offset, _ in writes], done)

    def trim_later(self, ranges: list[tuple[int, int]], done: Acknowledgement) -> bool:
        if not self._accepts(len(ranges)):
            return False
        if not super().trim_now(ranges):
            return False
        return self._accepted([offset for offset, _ in ranges], done)

    def _accepts(self, count: int) -> bool:
        error = self.refuses(count)
        if error:
            raise OSError(error, os.strerror(error))
        return not self.would_block()

    def _accepted(self, offsets: list[int], done: Acknowledgement) -> bool:
        self.pending.append((offsets, done))
        self.wake.set()
        return True

    def acknowledge(self, count: int | None = None) -> int:
        """The oldest `count` batches, or all; returns how many there were."""
        going = self.pending[:count]
        del self.pending[:count]
        for _, done in going:
            done(self.lost.pop(0) if self.lost else None)
        return len(going)

    async def run(self, delay_s: float = 0.0) -> None:
        """Acknowledge what there is, again and again, `delay_s` after it was there."""
        while True:
            if not self.pending:
                self.wake = trio.Event()
                await self.wake.wait()
            if delay_s:
                await trio.sleep(delay_s)
            else:
                await trio.lowlevel.checkpoint()
            self.acknowledge()


class MemoryExports:
    """A directory of memory exports that counts what is open."""

    def __init__(self, *exports: MemoryExport) -> None:
        self.exports = {export.name: export for export in exports}
        self.open = 0
        self.error = 0

    def list(self, client: object = None) -> list[tuple[str, str]]:
        return [(export.name, export.description) for export in self.exports.values()]

    async def acquire(self, name: str, client: object = None) -> MemoryExport:
        await trio.lowlevel.checkpoint()
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        if name == "" and len(self.exports) == 1:
            name = next(iter(self.exports))
        if name not in self.exports:
            raise FileNotFoundError(errno.ENOENT, f"no export {name!r}")
        self.open += 1
        return self.exports[name]

    def identity(self, export: object) -> str:
        assert isinstance(export, MemoryExport)
        return f"{export.name} {id(export.data)}"

    def release(self, export: object) -> None:
        self.open -= 1
        assert self.open >= 0
