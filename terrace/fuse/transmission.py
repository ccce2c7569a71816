"""The data path: requests from the kernel, as many as are there in one pass, each answered with one write.

pyfuse3 answers everything about names, attributes and open files. It could answer READ and WRITE too, with a task and
an await for each: a quarter of the rate that this loop has (51,000 against 200,000 random reads of 4 KiB a second, over
memory, fio --ioengine=libaio --direct=1 --iodepth=32). And it knows neither FALLOCATE nor LSEEK, without which a loop
device can't discard and nobody sees holes. So libfuse doesn't read /dev/fuse but one end of a socket pair;
this loop has the descriptor, takes those requests out that are about a file's bytes, and passes all others on.

    kernel  <--- /dev/fuse --->  Transmission  <--- SOCK_SEQPACKET --->  libfuse, pyfuse3, terrace.fuse.filesystem
                                      |
                                      +--- READ, WRITE, FSYNC, FALLOCATE, LSEEK ---> OpenFile

One message is one request or reply on both. Of what libfuse replies only INIT is changed: it leaves the number of
background requests (direct asynchronous IO, which is what loop devices do) at the kernel's 12, and may ask for longer
requests than fit the buffers here.

Libfuse writes its replies in this same thread, and a full socket would block it for good. So what can be in the socket
is bounded: `terrace.fuse.session` runs `WORKERS` tasks of pyfuse3, each with one reply between two checkpoints, a reply
has at most `terrace.fuse.filesystem.LISTED` entries, and `_bring_replies` empties the socket whenever it runs.

Memory: a request is read into a buffer of its longest size. A short WRITE is copied out; a long one keeps the buffer
until it is answered, and the loop goes on with another, of which there are at most `POOLED` beyond those in use. Beyond
`MOST_BYTES` of WRITEs without an answer nothing is read; the kernel bounds the rest (`BACKGROUND`, and one request for
each thread that waits).
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Final

import trio

from terrace.fuse import wire
from terrace.fuse.device import Device
from terrace.fuse.files import OpenFile

log = logging.getLogger("terrace.fuse")

BACKGROUND: Final = 128
CONGESTED: Final = 96
SHORT_BYTES: Final = 32 << 10
MOST_BYTES: Final = 64 << 20
POOLED: Final = 8
REPLIES_BYTES: Final = 1 << 20
"""Of libfuse's socket; the kernel gives less where net.core.wmem_max says so, but never below what is needed."""
SLICE_S: Final = 0.0015
"""So long the loop may work before other tasks get their turn."""
SPIN_TRIES: Final = 20
"""Empty reads of /dev/fuse before waiting, where requests came just now."""
SPIN_GIVE_UP: Final = 8

_NOTHING: Final = memoryview(b"")


class Transmission:
    """Serves one mounted file system until it is unmounted."""

    def __init__(self, device: Device, find: Callable[[int], OpenFile | None]) -> None:
        """`find` tells the file of a handle; None if nobody has it."""
        self._device = device
        self._find = find
        self._buffer = memoryview(bytearray(wire.BUFFER_BYTES))
        self._spare: list[memoryview] = []
        self._kept: dict[int, memoryview] = {}  # by request
        self._short: dict[int, int] = {}
        self._held_bytes = 0
        self._freed = trio.Event()
        self._init = 0  # the number of the request INIT, until it is answered
        self._put_off: deque[bytes] = deque()  # what libfuse's socket didn't take; nothing is read meanwhile
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REPLIES_BYTES)
        self.libfuse_end = theirs
        """What libfuse shall take for /dev/fuse."""
        device.answered = self._answered

    def close(self) -> None:
        """Libfuse reads the end of its file. Synchronous."""
        self._ours.close()

    async def run(self) -> None:
        """Returns when the file system is unmounted."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._bring_replies)
                await self._take_requests()
                nursery.cancel_scope.cancel()
        finally:
            self.close()

    async def _take_requests(self) -> None:
        fd = self._device.fd
        fruitless = 0
        while True:
            slice_end = perf_counter() + SLICE_S
            tries = SPIN_TRIES if fruitless < SPIN_GIVE_UP else 1
            left = tries
            busy: set[OpenFile] = set()
            while True:
                try:
                    os.readv(fd, [self._buffer])
                except BlockingIOError:
                    if busy:  # those wait for our answers
                        for one in busy:
                            one.push()
                        busy.clear()
                    left -= 1
                    if left <= 0:
                        break
                    continue
                except OSError as error:
                    if error.errno in (errno.EINTR, errno.ENOENT):  # ENOENT: interrupted before we could read it
                        continue
                    if error.errno in (errno.ENODEV, errno.ECONNABORTED):  # unmounted; cut off by an administrator
                        return
                    raise
                left = tries
                fruitless = 0
                if (file := self._handle()) is not None:
                    busy.add(file)
                if perf_counter() > slice_end or self._held_bytes > MOST_BYTES or self._put_off:
                    break
            for one in busy:
                one.push()
            while self._put_off:
                await trio.lowlevel.wait_writable(self._ours)
                self._pass_on_rest()
            while self._held_bytes > MOST_BYTES:
                self._freed = trio.Event()
                await self._freed.wait()
            if left <= 0:
                fruitless += tries > 1
                slept = perf_counter()
                await trio.lowlevel.wait_readable(fd)
                if fruitless and perf_counter() - slept < 0.000_15:
                    fruitless -= 1
            else:
                await trio.lowlevel.checkpoint()

    def _handle(self) -> OpenFile | None:
        """Take the request in the buffer; returns the file that it was about."""
        buffer = self._buffer
        length, opcode, unique, _ = wire.REQUEST.unpack_from(buffer)
        if opcode == wire.READ:
            handle, offset, size, _, _, _ = wire.TRANSFER.unpack_from(buffer, wire.REQUEST.size)
            file = self._find(handle)
            if file is not None:
                file.read(unique, offset, size)
                return file
        elif opcode == wire.WRITE:
            handle, offset, size, _, _, flags = wire.TRANSFER.unpack_from(buffer, wire.REQUEST.size)
            file = self._find(handle)
            if file is not None:
                start = wire.REQUEST.size + wire.TRANSFER.size
                data = buffer[start : start + size]
                if size <= SHORT_BYTES:
                    data = memoryview(bytes(data))
                    self._short[unique] = size
                    self._held_bytes += size
                else:
                    self._kept[unique] = buffer
                    self._held_bytes += wire.BUFFER_BYTES
                    self._buffer = self._spare.pop() if self._spare else memoryview(bytearray(wire.BUFFER_BYTES))
                file.write(unique, offset, data, durable=bool(flags & wire.O_DSYNC))
                return file
        elif opcode == wire.FSYNC:
            handle, _ = wire.SYNC.unpack_from(buffer, wire.REQUEST.size)
            file = self._find(handle)
            if file is not None:
                file.flush(unique)
                return file
        elif opcode == wire.FALLOCATE:
            return self._allocate(unique)
        elif opcode == wire.LSEEK:
            handle, offset, whence = wire.SEEK.unpack_from(buffer, wire.REQUEST.size)
            file = self._find(handle)
            if file is not None:
                if whence in (wire.SEEK_DATA, wire.SEEK_HOLE):
                    file.seek(unique, offset, data=whence == wire.SEEK_DATA)
                else:
                    self._device.failed(unique, errno.EINVAL)
                return file
        elif opcode == wire.FLUSH:
            # A close says nothing about durability. The kernel remembers this answer and asks no more.
            self._device.failed(unique, errno.ENOSYS)
            return None
        elif opcode in (wire.INTERRUPT, wire.FORGET, wire.BATCH_FORGET):
            # None of them gets a reply. What is asked of an engine is not taken back; and nothing is kept for the
            # kernel's references to a node.
            return None
        else:
            self._pass_on(buffer[:length], opcode, unique)
            return None
        self._device.failed(unique, errno.EBADF)
        return None

    def _allocate(self, unique: int) -> OpenFile | None:
        handle, offset, length, mode = wire.ALLOCATE.unpack_from(self._buffer, wire.REQUEST.size)
        file = self._find(handle)
        if file is None:
            self._device.failed(unique, errno.EBADF)
            return None
        kind = mode & ~wire.FALLOC_KEEP_SIZE
        if kind == wire.FALLOC_PUNCH_HOLE:
            file.zero(unique, offset, length, keep_space=False)
        elif kind == wire.FALLOC_ZERO_RANGE:
            file.zero(unique, offset, length, keep_space=True)
        else:
            # Space can't be promised to a thin volume ahead of its data, nor can bytes be cut out of a device.
            self._device.failed(unique, errno.EOPNOTSUPP)
        return file

    def _answered(self, unique: int) -> None:
        """What the request held is free again."""
        if self._short and (size := self._short.pop(unique, 0)):
            self._held_bytes -= size
        elif self._kept and (buffer := self._kept.pop(unique, _NOTHING)):
            self._held_bytes -= wire.BUFFER_BYTES
            if len(self._spare) < POOLED:
                self._spare.append(buffer)
        else:
            return
        if self._held_bytes <= MOST_BYTES:
            self._freed.set()

    # --- libfuse's part ---

    def _pass_on(self, request: memoryview, opcode: int, unique: int) -> None:
        if opcode == wire.INIT_OPCODE:
            self._init = unique
        try:
            self._ours.send(request)
        except BlockingIOError:
            self._put_off.append(bytes(request))
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            self._device.failed(unique, errno.E2BIG)  # an extended attribute of hundreds of KiB

    def _pass_on_rest(self) -> None:
        while self._put_off:
            try:
                self._ours.send(self._put_off[0])
            except BlockingIOError:
                return
            self._put_off.popleft()

    async def _bring_replies(self) -> None:
        buffer = memoryview(bytearray(wire.BUFFER_BYTES))
        while True:
            await trio.lowlevel.wait_readable(self._ours)
            # All that are there: libfuse would block the whole thread if it found its socket full.
            while True:
                try:
                    count = self._ours.recv_into(buffer)
                except BlockingIOError:
                    break
                if not count:
                    return
                reply = buffer[:count]
                if self._init and wire.REPLY.unpack_from(reply)[2] == self._init:
                    self._init = 0
                    self._adjust(reply)
                self._device.forward(reply)

    def _adjust(self, reply: memoryview) -> None:
        if len(reply) < wire.REPLY.size + wire.INIT.size:
            return  # libfuse refused the kernel
        fields = list(wire.INIT.unpack_from(reply, wire.REPLY.size))
        fields[4:6] = [BACKGROUND, CONGESTED]
        fields[6] = min(fields[6], wire.LONGEST_BYTES)
        fields[8] = min(fields[8], wire.LONGEST_BYTES // resource.getpagesize())
        wire.INIT.pack_into(reply, wire.REPLY.size, *fields)
