"""The FUSE data path over crafted requests: a socket that keeps messages apart stands in for /dev/fuse."""

from __future__ import annotations

import errno
import os
import random
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from terrace.fuse import wire
from terrace.fuse.device import Device
from terrace.fuse.transmission import BACKGROUND, CONGESTED, MOST_BYTES, SHORT_BYTES, Transmission

HANDLE = 7
LOOKUP, SETXATTR = 1, 21
SO_SNDBUFFORCE = 32  # a message of 1 MiB is beyond what net.core.wmem_max allows by default


@dataclass(eq=False)
class HeldFile:
    """An `OpenFile` that notes what is asked and answers when the test says so, or at once if `eager`."""

    device: Device
    eager: bool = False
    size_bytes: int = 1 << 30
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    writes: dict[int, memoryview] = field(default_factory=dict)
    pushed: int = 0

    def read(self, unique: int, offset: int, length: int) -> None:
        self.asked.append(("read", unique, offset, length))
        if self.eager:
            self.device.data(unique, memoryview(bytes(length)))

    def write(self, unique: int, offset: int, data: memoryview, *, durable: bool) -> None:
        self.asked.append(("write", unique, offset, len(data), durable))
        self.writes[unique] = data
        if self.eager:
            self.written(unique)

    def written(self, unique: int) -> None:
        self.device.written(unique, len(self.writes.pop(unique)))

    def flush(self, unique: int) -> None:
        self.asked.append(("flush", unique))
        self.device.done(unique)

    def zero(self, unique: int, offset: int, length: int, *, keep_space: bool) -> None:
        self.asked.append(("zero", unique, offset, length, keep_space))
        self.device.done(unique)

    def seek(self, unique: int, offset: int, *, data: bool) -> None:
        self.asked.append(("seek", unique, offset, data))
        self.device.found(unique, offset + 1)

    def push(self) -> None:
        self.pushed += 1

    def close(self) -> None:
        return


class Kernel:
    """The other end of the descriptor, and libfuse's end."""

    def __init__(self, sock: socket.socket, transmission: Transmission, device: Device) -> None:
        self.sock = sock
        self.transmission = transmission
        self.libfuse = transmission.libfuse_end
        self.device = device
        self.file = HeldFile(device)

    async def ask(self, opcode: int, body: bytes | memoryview = b"", *, unique: int) -> None:
        await self.send(request(opcode, body, unique))

    async def send(self, message: bytes) -> None:
        while True:
            try:
                self.sock.send(message)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)
            else:
                return

    async def reply(self) -> tuple[int, int, bytes]:
        """unique, errno, body."""
        await trio.lowlevel.wait_readable(self.sock)
        message = self.sock.recv(2 << 20)
        length, error, unique = struct.unpack_from("=IiQ", message)
        assert length == len(message)
        return unique, -error, message[16:]

    async def result(self, opcode: int, body: bytes = b"", *, unique: int = 1) -> tuple[int, bytes]:
        await self.ask(opcode, body, unique=unique)
        answered, error, data = await self.reply()
        assert answered == unique
        return error, data

    async def silence(self) -> None:
        """Everything that was sent is handled, and nothing more is answered."""
        await trio.sleep(0.02)
        with pytest.raises(BlockingIOError):
            self.sock.recv(1)


def request(opcode: int, body: bytes | memoryview, unique: int) -> bytes:
    return struct.pack("=IIQQIIII", 40 + len(body), opcode, unique, 5, 0, 0, 0, 0) + body


def transfer(offset: int, length: int, *, handle: int = HANDLE, flags: int = os.O_RDWR) -> bytes:
    return struct.pack("=QQIIQII", handle, offset, length, 0, 0, flags, 0)


def allocate(mode: int, offset: int = 4096, length: int = 8192, handle: int = HANDLE) -> bytes:
    return struct.pack("=QQQII", handle, offset, length, mode, 0)


def seek(whence: int, offset: int, handle: int = HANDLE) -> bytes:
    return struct.pack("=QQII", handle, offset, whence, 0)


def sync(handle: int = HANDLE) -> bytes:
    return struct.pack("=QII", handle, 1, 0)


@asynccontextmanager
async def serving() -> AsyncIterator[Kernel]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (near, far):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 4 << 20)
    device = Device(far.detach())
    files: dict[int, HeldFile] = {}
    transmission = Transmission(device, files.get)
    kernel = Kernel(near, transmission, device)
    files[HANDLE] = kernel.file
    kernel.libfuse.setblocking(False)
    with near, kernel.libfuse:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transmission.run)
            try:
                yield kernel
            finally:
                nursery.cancel_scope.cancel()
    device.close()


def run(test: Callable[[], Any]) -> None:
    async def bounded() -> None:
        with trio.fail_after(10):
            await test()

    trio.run(bounded)


def test_each_request_reaches_its_file_and_is_answered_once() -> None:
    async def test() -> None:
        async with serving() as kernel:
            file, kernel.file.eager = kernel.file, True
            assert await kernel.result(wire.READ, transfer(4096, 5000)) == (0, bytes(5000))
            assert await kernel.result(wire.READ, transfer(0, 1 << 20)) == (0, bytes(1 << 20))
            assert await kernel.result(wire.WRITE, transfer(8192, 3) + b"abc") == (0, struct.pack("=II", 3, 0))
            durable = transfer(0, 3, flags=os.O_RDWR | os.O_DSYNC)
            assert await kernel.result(wire.WRITE, durable + b"abc") == (0, struct.pack("=II", 3, 0))
            synced = transfer(0, 3, flags=os.O_RDWR | os.O_SYNC)
            assert await kernel.result(wire.WRITE, synced + b"abc") == (0, struct.pack("=II", 3, 0))
            assert await kernel.result(wire.FSYNC, sync()) == (0, b"")
            assert await kernel.result(wire.LSEEK, seek(os.SEEK_DATA, 70)) == (0, struct.pack("=Q", 71))
            assert await kernel.result(wire.LSEEK, seek(os.SEEK_HOLE, 80)) == (0, struct.pack("=Q", 81))
            assert [asked[0:1] + asked[2:] for asked in file.asked] == [
                ("read", 4096, 5000),
                ("read", 0, 1 << 20),
                ("write", 8192, 3, False),
                ("write", 0, 3, True),
                ("write", 0, 3, True),
                ("flush",),
                ("seek", 70, True),
                ("seek", 80, False),
            ]
            await kernel.silence()
            assert file.pushed

    run(test)


@pytest.mark.parametrize("whence", [os.SEEK_SET, os.SEEK_CUR, os.SEEK_END, 5, 0xFFFFFFFF])
def test_other_ways_to_seek_are_the_kernels_own_and_refused(whence: int) -> None:
    async def test() -> None:
        async with serving() as kernel:
            assert await kernel.result(wire.LSEEK, seek(whence, 0)) == (errno.EINVAL, b"")
            assert not kernel.file.asked

    run(test)


@pytest.mark.parametrize(
    ("mode", "keep_space"),
    [(3, False), (2, False), (16, True), (17, True)] + [(mode, None) for mode in (0, 1, 8, 18, 32, 65)],
)
def test_fallocate_punches_and_zeroes_and_promises_nothing(mode: int, keep_space: bool | None) -> None:
    async def test() -> None:
        async with serving() as kernel:
            error, _ = await kernel.result(wire.FALLOCATE, allocate(mode))
            if keep_space is None:
                assert error == errno.EOPNOTSUPP and not kernel.file.asked
            else:
                assert error == 0 and kernel.file.asked == [("zero", 1, 4096, 8192, keep_space)]

    run(test)


@pytest.mark.parametrize(
    ("opcode", "body"),
    [
        (wire.READ, transfer(0, 4096, handle=8)),
        (wire.WRITE, transfer(0, 1, handle=8) + b"x"),
        (wire.FSYNC, sync(8)),
        (wire.FALLOCATE, allocate(3, handle=8)),
        (wire.LSEEK, seek(os.SEEK_DATA, 0, handle=8)),
    ],
    ids=["read", "write", "fsync", "fallocate", "lseek"],
)
def test_a_handle_that_nobody_has_is_ebadf(opcode: int, body: bytes) -> None:
    async def test() -> None:
        async with serving() as kernel:
            assert await kernel.result(opcode, body) == (errno.EBADF, b"")
            assert not kernel.file.asked

    run(test)


def test_flush_isnt_implemented_and_what_wants_no_reply_gets_none() -> None:
    async def test() -> None:
        async with serving() as kernel:
            assert await kernel.result(wire.FLUSH, bytes(24)) == (errno.ENOSYS, b"")
            for opcode, body in [(wire.FORGET, bytes(8)), (wire.INTERRUPT, bytes(8)), (wire.BATCH_FORGET, bytes(8))]:
                await kernel.ask(opcode, body, unique=2)
            await kernel.silence()
            with pytest.raises(BlockingIOError):
                kernel.libfuse.recv(1)

    run(test)


@pytest.mark.parametrize("length", [1, 4096, SHORT_BYTES, SHORT_BYTES + 1, 256 << 10, 1 << 20])
def test_a_write_stays_as_it_was_until_it_is_answered_whatever_comes_meanwhile(length: int) -> None:
    async def test() -> None:
        async with serving() as kernel:
            chosen = random.Random(length)
            held: dict[int, bytes] = {}
            for unique in range(1, 120):
                data = chosen.randbytes(length)
                held[unique] = data
                await kernel.ask(wire.WRITE, transfer(unique, length) + data, unique=unique)
                while unique not in kernel.file.writes:
                    await trio.lowlevel.checkpoint()
                if len(held) > 20:
                    # Any of them, so that its buffer is used again while others are held.
                    done = chosen.choice(list(held))
                    assert kernel.file.writes[done] == held.pop(done)
                    kernel.file.written(done)
                    assert await kernel.reply() == (done, 0, struct.pack("=II", length, 0))
            assert {unique: bytes(data) for unique, data in kernel.file.writes.items()} == held
            for unique in held:
                kernel.file.written(unique)
                await kernel.reply()
            transmission = cast(Any, kernel.transmission)
            assert transmission._held_bytes == 0 and not transmission._kept and not transmission._short
            assert len(transmission._spare) <= 8

    run(test)


def test_beyond_the_bound_nothing_is_read_until_writes_are_answered() -> None:
    async def test() -> None:
        async with serving() as kernel:
            data = bytes(1 << 20)
            sent = 2 * (MOST_BYTES >> 20)
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    for unique in range(1, sent + 1):
                        await kernel.ask(wire.WRITE, transfer(0, len(data)) + data, unique=unique)

                nursery.start_soon(send)
                await trio.sleep(0.3)
                taken = len(kernel.file.writes)
                assert MOST_BYTES <= taken * wire.BUFFER_BYTES <= MOST_BYTES + 2 * wire.BUFFER_BYTES
                answered = 0
                while answered < sent:
                    for unique in list(kernel.file.writes):
                        kernel.file.written(unique)
                        assert (await kernel.reply())[0] == unique
                        answered += 1
                    await trio.lowlevel.checkpoint()
            assert kernel.file.asked == [("write", unique, 0, 1 << 20, False) for unique in range(1, sent + 1)]

    run(test)


def test_everything_else_goes_to_libfuse_and_its_replies_come_back_unchanged() -> None:
    async def test() -> None:
        async with serving() as kernel:
            message = request(LOOKUP, b"demo\0", 4)
            await kernel.send(message)
            await trio.lowlevel.wait_readable(kernel.libfuse)
            assert kernel.libfuse.recv(1 << 20) == message
            kernel.libfuse.send(struct.pack("=IiQ", 24, 0, 4) + b"whatever")
            assert await kernel.reply() == (4, 0, b"whatever")
            kernel.libfuse.send(struct.pack("=IiQ", 16, -errno.ENOENT, 5))
            assert await kernel.reply() == (5, errno.ENOENT, b"")

    run(test)


def test_of_inits_reply_only_the_background_requests_are_changed() -> None:
    async def test() -> None:
        async with serving() as kernel:
            await kernel.ask(wire.INIT_OPCODE, bytes(64), unique=2)
            await trio.lowlevel.wait_readable(kernel.libfuse)
            kernel.libfuse.recv(1 << 20)
            other = struct.pack("=IiQ", 80, 0, 9) + bytes(range(64))
            kernel.libfuse.send(other)
            assert await kernel.reply() == (9, 0, bytes(range(64)))
            body = struct.pack("=IIIIHHIIH", 7, 31, 131072, 0xABCD, 12, 9, 1 << 20, 1, 16) + bytes(range(34))
            for background, congested in [(BACKGROUND, CONGESTED), (12, 9)]:  # only once
                kernel.libfuse.send(struct.pack("=IiQ", 80, 0, 2) + body)
                unique, error, data = await kernel.reply()
                assert (unique, error, len(data)) == (2, 0, 64)
                assert struct.unpack_from("=HH", data, 16) == (background, congested)
                assert data[:16] + data[20:] == body[:16] + body[20:]

    run(test)


def test_requests_are_never_longer_than_the_buffers_whatever_libfuse_asks_for() -> None:
    async def test() -> None:
        async with serving() as kernel:
            await kernel.ask(wire.INIT_OPCODE, bytes(64), unique=2)
            await trio.lowlevel.wait_readable(kernel.libfuse)
            body = struct.pack("=IIIIHHIIHHI", 7, 31, 131072, 0xABCD, 12, 9, 16 << 20, 1, 4096, 77, 88) + bytes(28)
            kernel.libfuse.send(struct.pack("=IiQ", 80, 0, 2) + body)
            _, _, data = await kernel.reply()
            longest, granularity, pages, alignment, more = struct.unpack_from("=IIHHI", data, 20)
            assert longest == pages * os.sysconf("SC_PAGE_SIZE") == wire.LONGEST_BYTES
            assert (granularity, alignment, more) == (1, 77, 88)

    run(test)


def test_a_refusal_of_init_passes() -> None:
    async def test() -> None:
        async with serving() as kernel:
            await kernel.ask(wire.INIT_OPCODE, bytes(64), unique=2)
            await trio.lowlevel.wait_readable(kernel.libfuse)
            kernel.libfuse.send(struct.pack("=IiQ", 16, -errno.EPROTO, 2))
            assert await kernel.reply() == (2, errno.EPROTO, b"")

    run(test)


def test_where_libfuses_socket_is_full_nothing_is_lost_or_reordered_and_replies_still_leave() -> None:
    async def test() -> None:
        async with serving() as kernel:
            count = 2000
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    await kernel.ask(wire.WRITE, transfer(0, 3) + b"abc", unique=1)
                    for unique in range(2, count):
                        await kernel.ask(LOOKUP, b"x" * 500, unique=unique)
                    await kernel.ask(wire.FSYNC, sync(), unique=count)

                nursery.start_soon(send)
                await trio.sleep(0.2)
                assert len(cast(Any, kernel.transmission)._put_off) == 1, "the socket took all: this tests nothing"
                assert ("flush", count) not in kernel.file.asked
                kernel.file.written(1)  # whoever waits for the engine is answered meanwhile
                assert (await kernel.reply())[0] == 1
                for unique in range(2, count):
                    await trio.lowlevel.wait_readable(kernel.libfuse)
                    assert kernel.libfuse.recv(1 << 20) == request(LOOKUP, b"x" * 500, unique)
                assert (await kernel.reply())[0] == count

    run(test)


def test_what_no_message_can_carry_is_too_big() -> None:
    async def test() -> None:
        async with serving() as kernel:
            body = bytes(900_000)
            if kernel.transmission._ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) > len(body):
                kernel.transmission._ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            assert await kernel.result(SETXATTR, body) == (errno.E2BIG, b"")
            assert (await kernel.result(wire.FSYNC, sync()))[0] == 0

    run(test)


@pytest.mark.parametrize("number", [errno.ENODEV, errno.ECONNABORTED])
def test_it_ends_when_the_file_system_is_unmounted_or_cut_off(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        far.setblocking(False)
        device = Device(far.detach())
        transmission = Transmission(device, lambda handle: None)
        calls = 0

        def readv(fd: int, buffers: list[memoryview]) -> int:
            nonlocal calls
            calls += 1
            raise OSError([errno.EINTR, errno.ENOENT, number][calls - 1], "as the kernel does")

        with near, transmission.libfuse_end as libfuse, monkeypatch.context() as patched:
            patched.setattr(os, "readv", readv)
            await transmission.run()
            assert calls == 3
            assert libfuse.recv(1) == b"", "libfuse isn't told"
        device.close()
        device.done(3)  # late: nobody is there any more

    run(test)


def test_an_answer_that_nobody_waits_for_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED):

        def gone(fd: int, parts: list[Any], number: int = number) -> int:
            raise OSError(number, "gone")

        monkeypatch.setattr(os, "writev", gone)
        answered: list[int] = []
        device = Device(-1)
        device.answered = answered.append
        device.failed(5, errno.EIO)
        device.written(6, 1)
        device.data(7, memoryview(b"x"))
        assert answered == [5, 6, 7], "what it held isn't given back"


def test_the_structs_and_numbers_are_the_kernels() -> None:
    """The layouts in linux/fuse.h, computed from its text."""
    header = Path("/usr/include/linux/fuse.h").read_text()

    def fields(name: str) -> list[tuple[str, str]]:
        match = re.search(rf"^struct {name} {{(.*?)^}};", header, re.MULTILINE | re.DOTALL)
        assert match, name
        body = re.sub(r"/\*.*?\*/", "", match[1], flags=re.DOTALL)
        return re.findall(r"(u?int\d+_t)\s+(\w+)(?:\[\d+\])?;", body)

    codes = {"uint64_t": "Q", "int64_t": "q", "uint32_t": "I", "int32_t": "i", "uint16_t": "H"}

    def layout(name: str, most: int = 99) -> str:
        return "=" + "".join(codes[kind] for kind, _ in fields(name)[:most])

    def offset_of(name: str, member: str) -> int:
        names = [field for _, field in fields(name)]
        return struct.calcsize(layout(name, names.index(member)))

    assert struct.calcsize(layout("fuse_in_header")) == wire.REQUEST.size
    assert struct.calcsize(layout("fuse_read_in")) == struct.calcsize(layout("fuse_write_in")) == wire.TRANSFER.size
    for name in ("fuse_read_in", "fuse_write_in"):
        places = [offset_of(name, member) for member in ("fh", "offset", "size", "flags")]
        assert places == [0, 8, 16, 32]
    assert struct.calcsize(layout("fuse_fsync_in")) == wire.SYNC.size
    assert (
        struct.calcsize(layout("fuse_fallocate_in")) == wire.ALLOCATE.size
        and offset_of("fuse_fallocate_in", "mode") == 24
    )
    assert struct.calcsize(layout("fuse_lseek_in")) == wire.SEEK.size and offset_of("fuse_lseek_in", "whence") == 16
    assert layout("fuse_out_header") == wire.REPLY.format
    assert struct.calcsize(layout("fuse_write_out")) == wire.WRITTEN.size - wire.REPLY.size
    assert struct.calcsize(layout("fuse_lseek_out")) == wire.FOUND.size - wire.REPLY.size
    assert layout("fuse_init_out", 9) == wire.INIT.format
    assert [offset_of("fuse_init_out", name) for name in ("max_background", "congestion_threshold")] == [16, 18]
    for name in ("FORGET", "READ", "WRITE", "FSYNC", "FLUSH", "INTERRUPT", "BATCH_FORGET", "FALLOCATE", "LSEEK"):
        assert re.search(rf"FUSE_{name}\s*=\s*{getattr(wire, name)},", header), name
    assert re.search(rf"FUSE_INIT\s*=\s*{wire.INIT_OPCODE},", header)
    assert (wire.SEEK_DATA, wire.SEEK_HOLE, wire.O_DSYNC) == (os.SEEK_DATA, os.SEEK_HOLE, os.O_DSYNC)
