"""A daemon's volumes as open files, over a real NBD server whose directory of exports a test chooses."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from nbd.channel import GoneError
from nbd.listen import Listener
from nbd.uri import Address
from terrace.daemonexports import DaemonExports
from terrace.exports import ExportRecord
from terrace.fuse.device import Device
from terrace.fuse.remote import ZERO_PIECE_BYTES, DaemonFile
from tests.nbd.client import run, serving
from tests.nbd.memory import MemoryExport
from tests.terrace.test_fuse_local import Answers

SIZE = 1 << 20


class Directory(DaemonExports):
    """What a `DaemonFile` asks of its daemon, without one."""

    def __init__(self, listener: Listener, export: MemoryExport) -> None:
        # Nothing of the base's: no home, no HTTP.
        self.listener = listener
        self.record = ExportRecord(export.name, "first", export.size_bytes, 0, export.read_only, 0.0)
        self.identity = "first"

    async def address(self) -> Address:
        await trio.lowlevel.checkpoint()
        return Path(self.listener.address)

    async def export(self, name: str) -> ExportRecord:
        await trio.lowlevel.checkpoint()
        return ExportRecord(name, self.identity, self.record.size_bytes, 0, False, 0.0)

    async def is_gone(self, name: str, identity: str) -> bool:
        await trio.lowlevel.checkpoint()
        return self.identity != identity


class Waiting(Answers):
    """Whoever wants an answer waits for it."""

    async def get(self, unique: int) -> Any:
        while unique not in self.of:
            await trio.sleep(0.001)
        return self.of[unique]

    def data(self, unique: int, data: memoryview) -> None:
        self._keep(unique, bytes(data))


def number(answer: Any) -> Any:
    assert isinstance(answer, OSError)
    return answer.args[0]


@asynccontextmanager
async def opened(export: MemoryExport) -> AsyncIterator[tuple[DaemonFile, Waiting, Directory]]:
    async with serving(export) as served:
        directory, answers = Directory(served.listener, export), Waiting()
        async with trio.open_nursery() as nursery:
            file = DaemonFile(directory, directory.record, cast(Device, answers), nursery, lambda _: None, 1e9)
            file.users = 1
            await nursery.start(file.run)
            yield file, answers, directory
            file.close()
        while served.server.status().connections:
            await trio.sleep(0.001)


def test_each_request_is_answered_with_what_the_server_says() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        async with opened(export) as (file, answers, _):
            data = os.urandom(100_000)
            file.write(1, 5000, memoryview(data), durable=False)
            file.push()
            assert await answers.get(1) == 100_000
            file.read(2, 4999, 100_002)
            file.read(3, SIZE - 10, 4096)
            file.read(4, SIZE, 1)
            file.write(5, SIZE - 2, memoryview(b"1234"), durable=False)
            file.write(6, SIZE, memoryview(b"x"), durable=False)
            file.flush(7)
            file.zero(8, 0, 5001, keep_space=True)
            file.zero(9, SIZE + 1, 1, keep_space=False)
            file.push()
            assert await answers.get(2) == b"\0" + data + b"\0"
            assert await answers.get(3) == bytes(10) and await answers.get(4) == "done"
            assert await answers.get(5) == 2 and export.data[-2:] == b"12"
            assert number(await answers.get(6)) == errno.ENOSPC
            assert [await answers.get(unique) for unique in (7, 8, 9)] == ["done"] * 3
            assert export.data[:5002] == bytes(5001) + data[1:2]
            assert ("zero_no_hole", 0, 5001) in export.calls
            file.seek(10, 4096, data=False)
            file.seek(11, SIZE, data=True)
            assert await answers.get(10) == 106_496 and number(await answers.get(11)) == errno.ENXIO

    run(test)


def test_a_durable_write_is_flushed_before_it_is_answered_and_another_isnt() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        async with opened(export) as (file, answers, _):
            for unique, durable in enumerate([False, True], start=1):
                file.write(unique, 0, memoryview(b"x"), durable=durable)
                file.push()
                await answers.get(unique)
                assert (("flush", 0, 0) in export.calls) is durable

    run(test)


def test_zeroing_terabytes_goes_in_pieces_and_ends_with_the_first_error() -> None:
    class Huge(MemoryExport):
        async def write_zeroes(self, offset: int, length: int, *, no_hole: bool, fast: bool = False) -> None:
            await trio.lowlevel.checkpoint()
            self.calls.append(("zero", offset, length))
            if offset >= 3 * ZERO_PIECE_BYTES:
                raise OSError(errno.ENOSPC, "no room")

    async def test() -> None:
        export = Huge(size_bytes=SIZE)
        export.size_bytes = 5 * ZERO_PIECE_BYTES
        async with opened(export) as (file, answers, _):
            file.zero(1, 4096, 2 * ZERO_PIECE_BYTES, keep_space=False)
            assert await answers.get(1) == "done"
            lengths = [length for _, _, length in export.calls]
            assert sum(lengths) == 2 * ZERO_PIECE_BYTES and max(lengths) == ZERO_PIECE_BYTES
            file.zero(2, 0, 5 * ZERO_PIECE_BYTES, keep_space=False)
            assert number(await answers.get(2)) == errno.ENOSPC
            assert export.calls[-1][1] == 3 * ZERO_PIECE_BYTES

    run(test)


def test_eio_of_an_export_that_was_replaced_is_estale() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, fail=lambda *_: errno.EIO)
        async with opened(export) as (file, answers, directory):
            for unique, identity, expected in [(1, "first", errno.EIO), (9, "second", errno.ESTALE)]:
                directory.identity = identity
                file.read(unique, 0, 1)
                file.write(unique + 1, 0, memoryview(b"x"), durable=False)
                file.flush(unique + 2)
                file.seek(unique + 3, 0, data=True)
                file.push()
                for one in range(unique, unique + 4):
                    assert number(await answers.get(one)) == expected

    run(test)


def test_another_export_under_the_name_is_not_opened() -> None:
    async def test() -> None:
        async with serving(MemoryExport(size_bytes=SIZE)) as served:
            directory = Directory(served.listener, served.exports.exports["mem"])
            directory.identity = "second"
            async with trio.open_nursery() as nursery:
                file = DaemonFile(
                    directory,
                    directory.record,
                    cast(Device, Waiting()),
                    nursery,
                    lambda _: None,
                    1e9,
                )
                with pytest.raises(GoneError, match="mem was deleted or rolled back"):
                    await nursery.start(file.run)
            while served.server.status().connections:
                await trio.sleep(0.001)

    run(test)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ("pool/3/2-aa", "another node has been the primary of mem while it was in use here"),
        ("pool/4", "was deleted or"),
    ],
)
def test_who_used_a_mirror_of_which_another_node_was_primary_since_hears_that_and_not_that_it_was_deleted(
    now: str, said: str
) -> None:
    async def test() -> None:
        async with serving(MemoryExport(size_bytes=SIZE)) as served:
            directory = Directory(served.listener, served.exports.exports["mem"])
            directory.identity = now
            with pytest.raises(GoneError, match=said):
                await directory.connect("mem", "pool/3")
            while served.server.status().connections:
                await trio.sleep(0.001)

    run(test)
