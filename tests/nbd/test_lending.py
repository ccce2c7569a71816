"""Exports that lend what reads: a pass of READs is read by that, and by nothing else where it can't be lent."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from nbd import wire
from nbd.export import LendsReads
from tests.nbd.client import attached, run
from tests.nbd.memory import MemoryExport

BLOCK = 4096


@dataclass
class LendingExport(MemoryExport):
    lends: bool = True
    broken: frozenset[int] = frozenset()
    """Offsets at which what is lent raises OSError."""
    busy: frozenset[int] = frozenset()
    """Offsets at which it would wait."""
    lent: list[int] = field(default_factory=list)
    took: list[tuple[int, int]] = field(default_factory=list)
    lendings: int = 0

    def lend_reads(self) -> Callable[[int, int, memoryview], bool] | None:
        self.lendings += 1
        return self._read_lent if self.lends else None

    def took_reads(self, reads: int, read_bytes: int) -> None:
        self.took.append((reads, read_bytes))

    def _read_lent(self, offset: int, length: int, into: memoryview) -> bool:
        self.lent.append(offset)
        if offset in self.broken:
            raise OSError(errno.EIO, "it is damaged here")
        if offset in self.busy:
            return False
        into[:] = self.view[offset : offset + length]
        return True


def an_export(**more: object) -> LendingExport:
    export = LendingExport(size_bytes=64 * BLOCK, **more)  # type: ignore[arg-type]
    export.data[:] = b"".join(bytes([n]) * BLOCK for n in range(64))
    assert isinstance(export, LendsReads)
    return export


@pytest.mark.parametrize("form", ["simple", "structured", "extended"])
def test_a_pass_of_reads_is_lent_for_once_and_what_it_can_not_read_is_asked_for(form: str) -> None:
    async def test() -> None:
        export = an_export(broken=frozenset([3 * BLOCK]), busy=frozenset([5 * BLOCK]))
        async with attached(export, form=form) as (client, served):
            await client.send(b"".join(client.encode(wire.CMD_READ, n, n * BLOCK, BLOCK) for n in range(8)))
            for _ in range(8):
                reply = await client.reply()
                assert not reply.error and reply.data == bytes([reply.cookie]) * BLOCK
            assert export.lendings == 1 and export.lent == [n * BLOCK for n in range(8)]
            assert export.took == [(6, 6 * BLOCK)]
            assert sorted(offset for _, offset, _ in export.calls) == [3 * BLOCK, 5 * BLOCK]
            (connection,) = served.server.status().connections
            assert (connection.counters.reads, connection.counters.read_bytes) == (8, 8 * BLOCK)

    run(test)


def test_what_can_not_be_lent_is_read_as_ever_and_its_errors_are_the_clients() -> None:
    async def test() -> None:
        export = an_export(lends=False, fail=lambda name, offset, _: errno.EIO if offset == BLOCK else 0)
        async with attached(export) as (client, _):
            for n in (0, 1, 2):
                reply = await client.ask(wire.CMD_READ, n * BLOCK, BLOCK)
                assert reply.error == (wire.EIO if n == 1 else 0)
            assert [(name, offset) for name, offset, _ in export.calls] == [("read_now", n * BLOCK) for n in range(3)]
            assert export.lendings == 3 and not export.lent and not export.took

    run(test)


def test_a_write_in_between_is_not_overtaken_by_what_was_lent_before_it() -> None:
    async def test() -> None:
        export = an_export()
        async with attached(export) as (client, _):
            for n in range(4):
                await client.ask(wire.CMD_WRITE, 0, data=bytes([100 + n]) * BLOCK)
                reply = await client.ask(wire.CMD_READ, 0, BLOCK)
                assert reply.data == bytes([100 + n]) * BLOCK
            assert export.lendings == 4

    run(test)
