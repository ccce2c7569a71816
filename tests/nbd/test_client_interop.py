"""The client against servers that are not ours: qemu-nbd and nbdkit."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from nbd.client import Client, connect
from tests.nbd.client import run
from tests.nbd.test_client import fails
from tests.nbd.test_interop import tool

SIZE = 16 << 20


@asynccontextmanager
async def running(*command: str, socket: Path) -> AsyncIterator[Path]:
    """A server of its own process, greeting on `socket`."""
    async with trio.open_nursery() as nursery:
        start = partial(trio.run_process, list(command), check=False, stdout=subprocess.DEVNULL)
        process = await nursery.start(start)
        try:
            while not await greets(socket):
                assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                await trio.sleep(0.02)
            yield socket
        finally:
            process.kill()  # qemu-nbd does not always end on SIGTERM


async def greets(path: Path) -> bool:
    try:
        async with await trio.open_unix_socket(path) as stream:
            return bool(await stream.receive_some(1))
    except OSError:
        return False  # no file yet, or nobody listens on it yet


def nbdkit(directory: Path, *arguments: str) -> AbstractAsyncContextManager[Path]:
    socket = directory / "nbdkit.sock"
    return running("nbdkit", "-f", "-U", str(socket), *arguments, socket=socket)


def qemu_nbd(directory: Path, *arguments: str) -> AbstractAsyncContextManager[Path]:
    socket = directory / "qemu.sock"
    common = ("qemu-nbd", "--persistent", "--shared=8", f"--socket={socket}")
    return running(*common, *arguments, socket=socket)


async def exercise(client: Client) -> None:
    """What every server must do alike."""
    assert client.size_bytes == SIZE
    data = os.urandom(3 << 20)
    await client.write(1 << 20, data)
    await client.write(513, b"x" * 5000, fua=True)
    assert await client.read((1 << 20) - 10, len(data) + 20) == bytes(10) + data + bytes(10)
    assert await client.read(512, 5002) == b"\0" + b"x" * 5000 + b"\0"
    await client.flush()
    await client.write_zeroes(2 << 20, 65536)
    assert await client.read(2 << 20, 65537) == bytes(65536) + data[(1 << 20) + 65536 : (1 << 20) + 65537]
    await client.write_zeroes(3 << 20, 1 << 20, no_hole=True, fua=True)
    assert await client.read(3 << 20, 1 << 20) == bytes(1 << 20)
    await client.trim(0, 1 << 20)
    if client.can_cache:
        await client.cache(0, SIZE)

    async def work(number: int) -> None:
        offset = (8 << 20) + number * 5000
        await client.write(offset, bytes([number]) * 5000)
        assert await client.read(offset, 5000) == bytes([number]) * 5000

    async with trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(work, number)
    for delay_s in (0, 0.0005, 0.002):
        with trio.move_on_after(delay_s):
            await client.read(0, SIZE)
    assert await client.read(8 << 20, 5000) == bytes(5000)
    assert len(await client.read(0, SIZE)) == SIZE


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_qemu_nbd_serves_every_request(image_format: str, tmp_path: Path) -> None:
    async def main() -> None:
        image = tmp_path / "image"
        await tool(tmp_path, "qemu-img", "create", "-f", image_format, str(image), str(SIZE))
        server = qemu_nbd(tmp_path, f"--format={image_format}", "--discard=unmap", "--export-name=demo/vol", str(image))
        async with server as socket:
            async with connect(f"nbd+unix:///demo/vol?socket={socket}", contexts=["base:allocation"]) as client:
                assert client.terms.structured and client.contexts == ("base:allocation",)
                await exercise(client)
            with fails(errno.ENOENT):
                async with connect(socket, "other"):
                    pass
        # A raw image holds what the client was told is durable.
        if image_format == "raw":
            assert image.read_bytes()[8 << 20 :][5000:10000] == b"\1" * 5000

    run(main, timeout_s=60)


def test_holes_that_qemu_nbd_leaves_out_are_zeroes(tmp_path: Path) -> None:
    async def main() -> None:
        image = tmp_path / "image"
        data = os.urandom(65536)
        with image.open("wb") as file:
            file.truncate(SIZE)
            for offset in range(0, SIZE, 1 << 20):
                file.seek(offset)
                file.write(data)
        server = qemu_nbd(tmp_path, "--format=raw", "--read-only", str(image))
        async with server as socket, connect(socket, contexts=["base:allocation"]) as client:
            assert client.read_only
            assert await client.read(0, SIZE) == image.read_bytes()
            runs = [run async for run in client.extents("base:allocation")]
            assert sum(length for _, length, _ in runs) == SIZE
            assert [offset for offset, _, flags in runs if not flags] == list(range(0, SIZE, 1 << 20))
            with fails(errno.EROFS):
                await client.write(0, b"x")

    run(main, timeout_s=60)


def test_a_dirty_bitmap_of_qemu_is_a_context(tmp_path: Path) -> None:
    async def main() -> None:
        image = str(tmp_path / "image.qcow2")
        await tool(tmp_path, "qemu-img", "create", "-f", "qcow2", image, str(SIZE))
        await tool(tmp_path, "qemu-img", "bitmap", "--add", "-g", "65536", image, "b0")
        await tool(tmp_path, "qemu-io", "-f", "qcow2", "-c", "write 1M 128k", "-c", "write 8M 64k", image)
        server = qemu_nbd(tmp_path, "--format=qcow2", "--read-only", "--bitmap=b0", "--allocation-depth", image)
        wanted = ["base:allocation", "qemu:dirty-bitmap:b0", "qemu:allocation-depth", "terrace:diff:a"]
        async with server as socket, connect(socket, contexts=wanted) as client:
            assert sorted(client.contexts) == sorted(wanted[:3])
            dirty = [run async for run in client.extents("qemu:dirty-bitmap:b0")]
            assert [(offset, length) for offset, length, flags in dirty if flags & 1] == [
                (1 << 20, 128 << 10),
                (8 << 20, 64 << 10),
            ]
            status = await client.block_status(1 << 20, 128 << 10)
            assert status["base:allocation"] == [(128 << 10, 0)]
            assert status["qemu:allocation-depth"] == [(128 << 10, 1)]

    run(main, timeout_s=60)


@pytest.mark.parametrize("options", [[], ["--no-sr"], ["--mask-handshake=1"]], ids=["structured", "simple", "zeroes"])
def test_nbdkit_serves_every_request(options: list[str], tmp_path: Path) -> None:
    async def main() -> None:
        server = nbdkit(tmp_path, *options, "memory", str(SIZE))
        async with server as socket, connect(socket, contexts=["base:allocation"]) as client:
            simple = options == ["--no-sr"]
            assert client.terms.structured is not simple
            assert client.contexts == (() if simple else ("base:allocation",))
            await exercise(client)

    run(main, timeout_s=60)


def test_nbdkits_errors_are_errnos(tmp_path: Path) -> None:
    async def main() -> None:
        script = [
            "get_size=echo 1M",
            'pread=if [ $4 -ge 65536 ]; then echo "EIO rotten" >&2; exit 1; fi; '
            "dd if=/dev/zero count=$3 iflag=count_bytes status=none",
            "can_write=exit 0",
            "pwrite=cat > /dev/null; echo ENOSPC no room >&2; exit 1",
        ]
        server = nbdkit(tmp_path, "eval", *script)
        async with server as socket, connect(socket) as client:
            assert await client.read(0, 512) == bytes(512)
            with fails(errno.EIO, "READ of 512 bytes at 65536"):
                await client.read(65536, 512)
            with fails(errno.ENOSPC):
                await client.write(0, b"x" * 512)
            with fails(errno.ENOTSUP):
                await client.trim(0, 512)
            assert await client.read(0, 512) == bytes(512)

    run(main, timeout_s=60)


def test_nbdkits_block_sizes_are_obeyed(tmp_path: Path) -> None:
    async def main() -> None:
        policy = ["blocksize-minimum=4096", "blocksize-preferred=65536"]
        limits = ["blocksize-maximum=131072", "blocksize-error-policy=error"]
        server = nbdkit(tmp_path, "--filter=blocksize-policy", "memory", str(SIZE), *policy, *limits)
        async with server as socket, connect(socket) as client:
            assert (client.minimum_block_size, client.preferred_block_size) == (4096, 65536)
            assert client.maximum_payload == 131072
            data = os.urandom(1 << 20)
            await client.write(4096, data)
            assert await client.read(4096, 1 << 20) == data
            with fails(errno.EINVAL, "aligned"):
                await client.read(1, 4096)

    run(main, timeout_s=60)


def test_old_servers_are_refused_with_a_sentence(tmp_path: Path) -> None:
    async def main() -> None:
        for number, option in enumerate(("-o", "--mask-handshake=0")):
            directory = tmp_path / str(number)
            directory.mkdir()
            server = nbdkit(directory, option, "memory", "1M")
            async with server as socket:
                with fails(errno.EPROTONOSUPPORT, "handshake"):
                    async with connect(socket):
                        pass

    run(main, timeout_s=60)
