"""The kernel's end: the file descriptor of /dev/fuse through which one mounted file system is served.

`mount` gets it from fusermount3, the helper of libfuse that may mount for everybody, and for root as well. The protocol
is the one that libfuse itself uses: the helper gets one end of a Unix socket in `_FUSE_COMMFD` and sends the descriptor
through it.

A reply is one write, which never blocks. ENOENT means that nobody waits for it any more.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import trio

from terrace.fuse import wire


class MountError(OSError):
    """The mount point can't be had; prints as its sentence alone."""

    def __str__(self) -> str:
        return str(self.args[1])


def _nobody_cares(unique: int) -> None:
    return


class Device:
    """Answers requests. All of it belongs to the trio thread."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.answered: Callable[[int], None] = _nobody_cares
        """Called with each request that was answered, so that what it held can be used again."""

    def close(self) -> None:
        """Nobody is answered any more; requests that end later find that out here. Synchronous."""
        fd, self.fd = self.fd, -1
        os.close(fd)

    def data(self, unique: int, data: memoryview) -> None:
        """The bytes of a READ."""
        self._write([wire.REPLY.pack(wire.REPLY.size + len(data), 0, unique), data])
        self.answered(unique)

    def framed(self, unique: int, frame: memoryview) -> None:
        """The bytes of a READ behind room for the head, for one piece is sent faster than two."""
        wire.REPLY.pack_into(frame, 0, len(frame), 0, unique)
        self._write([frame])
        self.answered(unique)

    def written(self, unique: int, length: int) -> None:
        self._write([wire.WRITTEN.pack(wire.WRITTEN.size, 0, unique, length)])
        self.answered(unique)

    def found(self, unique: int, offset: int) -> None:
        self._write([wire.FOUND.pack(wire.FOUND.size, 0, unique, offset)])
        self.answered(unique)

    def done(self, unique: int) -> None:
        self._write([wire.REPLY.pack(wire.REPLY.size, 0, unique)])
        self.answered(unique)

    def failed(self, unique: int, number: int) -> None:
        """Answer with an errno."""
        self._write([wire.REPLY.pack(wire.REPLY.size, -number, unique)])
        self.answered(unique)

    def forward(self, reply: memoryview) -> None:
        """A whole reply that somebody else has made."""
        self._write([reply])

    def _write(self, parts: list[bytes | memoryview]) -> None:
        try:
            os.writev(self.fd, parts)
        except OSError as error:
            # Interrupted, unmounted, or cut off: who asked is gone.
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EBADF, errno.ECONNABORTED, errno.EPERM):
                raise


async def mount(mountpoint: Path, options: str) -> int:
    """Mount; the descriptor is non-blocking and the caller's. Raises MountError with a sentence."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        try:
            result = await trio.run_process(
                ["fusermount3", "-o", options, "--", str(mountpoint)],
                env=os.environ | {"_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                capture_stderr=True,
                check=False,
            )
        except FileNotFoundError:
            raise MountError(
                errno.ENOENT, "mounting needs the program fusermount3; install Debian's package fuse3"
            ) from None
        if result.returncode:
            said = result.stderr.decode("utf-8", "replace").strip().removeprefix("fusermount3: ")
            raise MountError(errno.EIO, f"can't mount on {mountpoint}: {said or 'fusermount3 failed without a word'}")
        theirs.close()
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)  # which takes no notice of flags: see below
        if len(descriptors) != 1:
            raise MountError(errno.EIO, f"can't mount on {mountpoint}: fusermount3 gave no file descriptor")
    os.set_inheritable(descriptors[0], False)
    os.set_blocking(descriptors[0], False)
    return descriptors[0]


async def unmount(mountpoint: Path, *, lazy: bool) -> str:
    """Returns why it didn't work; empty if it did. `lazy`: out of sight now, and gone with its last user."""
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(mountpoint)]
    try:
        # A process group of its own: a second Ctrl-C in our terminal isn't meant for it.
        result = await trio.run_process(command, capture_stderr=True, check=False, process_group=0)
    except FileNotFoundError:
        return "the program fusermount3 is missing"
    if not result.returncode:
        return ""
    said = result.stderr.decode("utf-8", "replace").strip().removeprefix("fusermount3: ")
    return said or f"fusermount3 ended with status {result.returncode}"
