"""The daemon's own volumes as open files: each request is answered once, with what the engine says."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from typing import Any, cast

import pytest
import trio

from terrace.fuse.device import Device
from terrace.fuse.local import BATCH_WRITES, PoolFile
from terrace.fuse.wire import LONGEST_BYTES, REPLY
from tests.nbd.memory import MemoryExport

SIZE = 1 << 20


class Answers:
    """Stands in for `Device`: what it would write is kept."""

    def __init__(self) -> None:
        self.of: dict[int, Any] = {}

    def _keep(self, unique: int, answer: Any) -> None:
        assert unique not in self.of, "answered twice"
        self.of[unique] = answer

    def framed(self, unique: int, frame: memoryview) -> None:
        self._keep(unique, bytes(frame[REPLY.size :]))

    def written(self, unique: int, length: int) -> None:
        self._keep(unique, length)

    def found(self, unique: int, offset: int) -> None:
        self._keep(unique, offset)

    def done(self, unique: int) -> None:
        self._keep(unique, "done")

    def failed(self, unique: int, number: int) -> None:
        self._keep(unique, OSError(number))


def number(answer: Any) -> int | None:
    assert isinstance(answer, OSError)
    return cast("int | None", answer.args[0])


def over(export: MemoryExport, test: Callable[[PoolFile, Answers], None]) -> dict[int, Any]:
    """What was answered when all of it has ended."""
    answers = Answers()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            arena = memoryview(bytearray(REPLY.size + LONGEST_BYTES))
            file = PoolFile(export, lambda export: None, cast(Device, answers), nursery, arena)
            test(file, answers)
            file.push()

    trio.run(main)
    return answers.of


both_speeds = pytest.mark.parametrize("slow", [False, True], ids=["at-once", "slow"])


@both_speeds
def test_ranges_are_cut_at_the_end(slow: bool) -> None:
    export = MemoryExport(size_bytes=SIZE, slow=slow)
    export.data[-3:] = b"end"

    def test(file: PoolFile, _: Answers) -> None:
        file.read(1, SIZE - 3, 4096)
        file.read(2, SIZE, 4096)
        file.read(3, SIZE + 4096, 1)
        file.write(4, SIZE, memoryview(b"x"), durable=False)
        file.write(5, SIZE + 99, memoryview(b"x"), durable=True)
        file.zero(6, SIZE + 99, 4096, keep_space=False)
        file.seek(7, SIZE, data=False)
        file.flush(8)

    answers = over(export, test)
    assert answers[1] == b"end" and answers[2] == answers[3] == "done" and answers[8] == "done"
    assert number(answers[4]) == number(answers[5]) == errno.ENOSPC
    assert answers[6] == "done" and number(answers[7]) == errno.ENXIO
    answers = over(export, lambda file, _: file.write(1, SIZE - 2, memoryview(b"1234"), durable=False))
    assert answers == {1: 2} and export.data[-2:] == b"12"


@both_speeds
def test_one_bad_write_of_a_batch_fails_alone(slow: bool) -> None:
    bad = 5 * 4096
    export = MemoryExport(size_bytes=SIZE, slow=slow, fail=lambda _, at, __: errno.ENOSPC if at == bad else 0)

    def test(file: PoolFile, answers: Answers) -> None:
        for unique in range(1, 10):
            file.write(unique, unique * 4096, memoryview(bytes([unique]) * 4096), durable=unique == 7)
        assert not answers.of, "answered before it was done"

    answers = over(export, test)
    assert number(answers.pop(5)) == errno.ENOSPC
    assert answers == dict.fromkeys([1, 2, 3, 4, 6, 7, 8, 9], 4096)
    for unique in answers:
        assert export.data[unique * 4096] == unique
    assert ("flush", 0, 0) in export.calls


def test_a_batch_is_bounded_and_goes_with_one_call() -> None:
    calls: list[int] = []

    class Counting(MemoryExport):
        def write_now(self, writes: list[tuple[int, memoryview]]) -> bool:
            calls.append(len(writes))
            return super().write_now(writes)

    def test(file: PoolFile, _: Answers) -> None:
        for unique in range(2 * BATCH_WRITES + 10):
            file.write(unique, unique * 512, memoryview(b"x" * 512), durable=False)

    assert len(over(Counting(size_bytes=SIZE), test)) == 2 * BATCH_WRITES + 10
    assert calls == [BATCH_WRITES, BATCH_WRITES, 10]


def test_an_export_is_given_back_when_its_last_request_has_ended_not_before() -> None:
    """Its users were cut off: what is given back may be shrunk beneath a write that waits for room."""
    given_back: list[bool] = []
    ended = False

    class Waiting(MemoryExport):
        async def write(self, offset: int, data: memoryview | bytes) -> None:
            nonlocal ended
            await trio.sleep(0.05)
            await super().write(offset, data)
            ended = True

    async def main() -> None:
        answers = Answers()
        async with trio.open_nursery() as nursery:
            arena = memoryview(bytearray(REPLY.size + LONGEST_BYTES))
            export = Waiting(size_bytes=SIZE)
            file = PoolFile(export, lambda _: given_back.append(ended), cast(Device, answers), nursery, arena)
            file.write(1, 0, memoryview(b"x"), durable=True)
            file.close()
            assert not given_back
        assert given_back == [True] and answers.of == {1: 1}

    trio.run(main)


@both_speeds
def test_what_fails_has_the_engines_errno(slow: bool) -> None:
    export = MemoryExport(size_bytes=SIZE, slow=slow, fail=lambda *_: errno.ESTALE)

    def test(file: PoolFile, _: Answers) -> None:
        file.read(1, 0, 10)
        file.write(2, 0, memoryview(b"x"), durable=False)
        file.write(3, 0, memoryview(b"x"), durable=True)
        file.flush(4)
        file.zero(5, 0, 10, keep_space=True)
        file.seek(6, 0, data=True)

    assert [number(answer) for _, answer in sorted(over(export, test).items())] == [errno.ESTALE] * 6


def test_nothing_is_written_to_what_is_read_only() -> None:
    export = MemoryExport(size_bytes=SIZE, read_only=True)

    def test(file: PoolFile, _: Answers) -> None:
        file.write(1, 0, memoryview(b"x"), durable=False)
        file.zero(2, 0, 10, keep_space=True)
        file.read(3, 0, 1)

    answers = over(export, test)
    assert number(answers[1]) == number(answers[2]) == errno.EROFS and answers[3] == b"\0"
    assert not any(operation != "read_now" for operation, _, _ in export.calls)


@both_speeds
def test_what_is_read_is_what_was_written(slow: bool) -> None:
    chosen = random.Random(3)
    export = MemoryExport(size_bytes=SIZE, slow=slow)
    model = bytearray(SIZE)

    def write(offset: int, data: bytes) -> dict[int, Any]:
        return over(export, lambda file, _: file.write(1, offset, memoryview(data), durable=False))

    def read(offset: int, length: int) -> dict[int, Any]:
        return over(export, lambda file, _: file.read(1, offset, length))

    for _ in range(60):
        offset, length = chosen.randrange(SIZE), chosen.choice([1, 512, 4096, 100_000, LONGEST_BYTES])
        if chosen.random() < 0.5:
            data = os.urandom(min(length, SIZE - offset))
            model[offset : offset + len(data)] = data
            assert write(offset, data) == {1: len(data)}
        else:
            assert read(offset, length) == {1: bytes(model[offset : offset + length])}
