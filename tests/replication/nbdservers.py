"""Real NBD servers for a leg: nbdkit, qemu-nbd over raw and qcow2, and our own, and a way to look at their bytes."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from nbd.client import connect
from replication.leg import Extents
from replication.membership import LegInfo
from replication.nbdleg import NbdLeg, NbdSite
from tests.nbd.client import serving
from tests.nbd.memory import MemoryExport
from tests.replication.fakes import MemoryExtents

KINDS = ("nbdkit", "qemu-nbd raw", "qemu-nbd qcow2", "ours")


@dataclass
class Server:
    """One that answers at `uri`."""

    uri: str
    process: trio.Process | None = None


@asynccontextmanager
async def server(kind: str, directory: Path, size_bytes: int, *options: str) -> AsyncIterator[Server]:
    """Of that kind, with zeros; killed behind the yield."""
    if kind == "ours":
        async with serving(MemoryExport("", size_bytes=size_bytes)) as served:
            yield Server(served.uri(""))
        return
    socket = directory / "leg.sock"
    if kind == "nbdkit":
        command = ["nbdkit", "-f", "-U", str(socket), *options, "memory", str(size_bytes)]
    else:
        form = kind.split()[1]
        image = directory / f"image.{form}"
        await trio.run_process(["qemu-img", "create", "-q", "-f", form, str(image), str(size_bytes)])
        command = ["qemu-nbd", "--persistent", "--shared=8", f"--format={form}", "--discard=unmap",
                   f"--socket={socket}", *options, str(image)]  # fmt: skip
    async with started(socket, *command) as process:
        yield Server(f"nbd+unix:///?socket={socket}", process)


@asynccontextmanager
async def started(socket: Path, *command: str) -> AsyncIterator[trio.Process]:
    """A server in a process of its own, once it greets on `socket`."""
    socket.unlink(missing_ok=True)
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(trio.run_process, list(command), check=False, stdout=subprocess.DEVNULL)
        )
        try:
            while not await _greets(socket):
                assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                await trio.sleep(0.01)
            yield process
        finally:
            process.kill()


async def _greets(path: Path) -> bool:
    try:
        async with await trio.open_unix_socket(path) as stream:
            return bool(await stream.receive_some(1))
    except OSError:
        return False


def site(uri: str) -> NbdSite:
    return NbdSite(LegInfo("e" * 16, "a", uri, "nbd"), empty_extents)


def empty_extents() -> Extents:
    return MemoryExtents()


@asynccontextmanager
async def opened(uri: str, size_bytes: int, **options: Any) -> AsyncIterator[NbdLeg]:
    """A leg there."""
    async with trio.open_nursery() as nursery:
        leg = await site(uri).open(nursery, size_bytes, timeout_s=5.0, **options)
        yield leg
        leg.close()
        nursery.cancel_scope.cancel()


async def image_of(uri: str) -> bytes:
    """All bytes that the server has."""
    async with connect(uri) as client:
        return bytes(await client.read(0, client.size_bytes))
