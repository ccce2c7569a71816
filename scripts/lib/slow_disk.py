"""A device at a hard disk's pace, for the bench: one head, seeks, a bounded rate. Under the engine, at the Host seam.

The bytes go to the file, and its page cache, as with any device; the time that a disk would take is slept in the worker
that would wait for it. So nothing may be had without a worker: `read_now` always declines, and `fd` is -1, for which
the engine's own fast path declines too.

The disk of the model: an access that continues the last one, or begins within `NEAR_BYTES` of its end, costs no seek,
any other `SEEK_S`; each byte costs 1 / `BYTES_PER_S`. One head: accesses queue. A write costs nothing by itself, since
the kernel takes it; fdatasync pays for all that was written since the last one, in the order of the disk, as an
elevator would serve it. Reads are not reordered.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tiers.device import Buffer, FileDevice, Offload, new_workers, open_device
from tiers.host import RealHost

SEEK_S = 0.008
BYTES_PER_S = 150e6
NEAR_BYTES = 256 << 10


class Head:
    """The head of one disk: when it will be free, and where it will be then. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free_at_s = 0.0
        self._position = 0
        self.busy_s = 0.0
        self.seeks = 0

    def serve(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Wait for as long as these (offset, length) accesses take, after those that came before."""
        with self._lock:
            cost_s = 0.0
            for offset, length in ranges:
                if not 0 <= offset - self._position <= NEAR_BYTES:
                    cost_s += SEEK_S
                    self.seeks += 1
                cost_s += length / BYTES_PER_S
                self._position = offset + length
            self.busy_s += cost_s
            self._free_at_s = max(self._free_at_s, time.monotonic()) + cost_s
            wait_s = self._free_at_s - time.monotonic()
        time.sleep(max(0.0, wait_s))


def merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(offset, length) ranges in the order of the disk, those that touch or overlap as one."""
    result: list[tuple[int, int]] = []
    for offset, length in sorted(ranges):
        if result and offset <= result[-1][0] + result[-1][1]:
            start, before = result[-1]
            result[-1] = start, max(before, offset + length - start)
        else:
            result.append((offset, length))
    return result


class SlowDevice(FileDevice):
    """A `FileDevice` whose every access takes the time of `Head`."""

    def __init__(self, inner: FileDevice, offload: Offload) -> None:
        super().__init__(inner.path, -1, None, inner.label, offload)
        self.head = Head()
        self._inner = inner
        self._written: list[tuple[int, int]] = []

    def _pwritev(self, offset: int, buffers: Sequence[Buffer], expected: int) -> None:
        self._inner._pwritev(offset, buffers, expected)
        self._written.append((offset, expected))

    def read_now(self, offset: int, into: memoryview) -> bool:
        """Always False: on a disk it would have to wait."""
        return False

    def _read_blocking(self, ranges: Sequence[tuple[int, int]]) -> list[bytearray]:
        self.head.serve(ranges)
        return self._inner._read_blocking(ranges)

    def _read_direct_blocking(self, offset: int, length: int) -> bytearray:
        self.head.serve([(offset, length)])
        return self._inner._read_direct_blocking(offset, length)

    def _read_direct_into_blocking(self, offset: int, into: memoryview) -> None:
        self.head.serve([(offset, len(into))])
        self._inner._read_direct_into_blocking(offset, into)

    async def sync(self) -> None:
        """Pay for what was written, then make it durable. Raises OSError."""
        await self._offload(self._sync_blocking)

    def _sync_blocking(self) -> None:
        written, self._written = self._written, []
        self.head.serve(merged(written))
        os.fdatasync(self._inner.fd)

    def close(self) -> None:
        """Close the file."""
        self._inner.close()


class SlowHost(RealHost):
    """This machine, with base devices at a disk's pace."""

    def open_device(self, path: Path) -> FileDevice:
        device = open_device(path)
        return SlowDevice(device, new_workers()) if device.tier == "base" else device
