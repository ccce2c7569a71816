"""What every export that acknowledges later must keep to, whatever is behind it: one suite for fakes and real ones."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import pytest
import trio

from nbd.export import AcknowledgesLater, Export


class LaterExport(Export, AcknowledgesLater, Protocol):
    """Both."""


class Done:
    """A ``done`` that tells whether it was called, how often, and whether within the call."""

    def __init__(self) -> None:
        self.errors: list[OSError | None] = []
        self.within = True
        self.event = trio.Event()

    def __call__(self, error: OSError | None) -> None:
        assert not self.within, "done was called within the call"
        self.errors.append(error)
        self.event.set()
        assert len(self.errors) == 1, "done was called twice"


async def check_acknowledges_later(export: LaterExport, settle: Callable[[], Awaitable[None]]) -> None:
    """``export``: at least 1 MiB, writable, minimum block size 1 or 4096. ``settle``: then all is acknowledged."""
    assert isinstance(export, AcknowledgesLater)
    block = 4096

    async def write(*writes: tuple[int, bytes]) -> Done:
        done = Done()
        buffers = [(offset, bytearray(data)) for offset, data in writes]
        accepted = export.write_later([(offset, memoryview(data)) for offset, data in buffers], done)
        done.within = False
        assert accepted, "an idle export declined"
        for _, data in buffers:
            data[:] = b"\xee" * len(data)  # views are only valid during the call
        return done

    async def read(offset: int, length: int) -> bytes:
        data = bytearray(length)
        if not export.read_now(offset, length, memoryview(data)):
            await export.read(offset, length, memoryview(data))
        return bytes(data)

    first = await write((0, b"a" * block), (8 * block, b"b" * block))
    await settle()
    assert first.errors == [None]
    assert await read(0, block) == b"a" * block and await read(8 * block, block) == b"b" * block

    # Later entries, later batches, and what is written behind them, win.
    batches = [await write((0, b"c" * block), (0, bytes([65 + n]) * block)) for n in range(20)]
    waiting = trio.Event()

    async def overwrite() -> None:
        await export.write(8 * block, b"z" * block)
        waiting.set()

    batches.append(await write((8 * block, b"y" * block)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(overwrite)
        await settle()
        await waiting.wait()
    assert [one.errors for one in batches] == [[None]] * len(batches)
    assert await read(0, block) == bytes([65 + 19]) * block
    assert await read(8 * block, block) == b"z" * block

    trimmed = Done()
    assert export.trim_later([(0, block), (8 * block, block)], trimmed)
    trimmed.within = False
    await settle()
    assert trimmed.errors == [None]
    assert await read(0, block) == bytes(block)
    await export.flush()

    with pytest.raises(AssertionError, match="twice"):  # the suite itself can fail
        trimmed(None)
