"""`python -m tests.system.manysnapshots DIR COUNT`: a file system of one pool with so many snapshots, and no engine."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from pathlib import Path

import trio

from terrace.exports import ExportRecord
from terrace.fuse.device import Device
from terrace.fuse.files import OpenFile
from terrace.fuse.session import mounted


class ManySnapshots:
    """Implements `terrace.fuse.files.Directory`."""

    def __init__(self, count: int) -> None:
        names = [f"p/{'v' * 64}@{'s' * 50}{number:06}" for number in range(count)]
        self._records = {name: ExportRecord(name, name, 1 << 20, 0, True, 0.0) for name in names}

    async def pools(self) -> Sequence[str]:
        await trio.lowlevel.checkpoint()
        return ["p"]

    async def exports(self, pool: str) -> Sequence[ExportRecord]:
        await trio.lowlevel.checkpoint()
        return list(self._records.values())

    async def export(self, name: str) -> ExportRecord:
        await trio.lowlevel.checkpoint()
        if name not in self._records:
            raise FileNotFoundError(errno.ENOENT, name)
        return self._records[name]

    async def space(self) -> tuple[int, int]:
        await trio.lowlevel.checkpoint()
        return 0, 0

    async def open(self, record: ExportRecord, device: Device) -> OpenFile:
        raise OSError(errno.EIO, "there is nothing behind it")


async def main(directory: Path, count: int) -> None:
    async with mounted(ManySnapshots(count), directory) as session:
        print("Ctrl-C unmounts", flush=True)
        await session.ended.wait()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), int(sys.argv[2]))
