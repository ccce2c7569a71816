"""The client against qemu-nbd and nbdkit, with TLS and without, and the same suite against our own server."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio

from nbd import wire
from nbd.client import Client, connect
from nbd.tls import TlsFiles
from tests.nbd.client import run, serving
from tests.nbd.memory import MemoryExport
from tests.nbd.test_client import fails
from tests.nbd.test_client_tls import make_pki
from tests.nbd.test_interop import tool

SIZE = 16 << 20


@asynccontextmanager
async def started(*command: str, socket: Path) -> AsyncIterator[trio.Process]:
    """A server in a process of its own, greeting on `socket`."""
    async with trio.open_nursery() as nursery:
        start = partial(trio.run_process, list(command), check=False, stdout=subprocess.DEVNULL)
        process: trio.Process = await nursery.start(start)
        try:
            while not await greets(socket):
                assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                await trio.sleep(0.02)
            yield process
        finally:
            process.kill()  # qemu-nbd does not always end on SIGTERM


@asynccontextmanager
async def running(*command: str, socket: Path) -> AsyncIterator[Path]:
    async with started(*command, socket=socket):
        yield socket


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


# --- one suite for all ---


@dataclass
class Peer:
    """A server of `SIZE` bytes that can be written."""

    uri: str
    kill: Callable[[], object]
    """It goes away at once, with all of its connections."""


KINDS = ["ours", "ours, TLS", "qemu-nbd", "nbdkit", "qemu-nbd, TLS", "nbdkit, TLS"]
each_server = pytest.mark.parametrize("kind", KINDS)


@asynccontextmanager
async def peer(kind: str, directory: Path, pki: Path) -> AsyncIterator[Peer]:
    socket = directory / "sock"
    uri = f"nbd+unix:///?socket={socket}"
    if kind == "ours":
        async with serving(MemoryExport("", size_bytes=SIZE)) as served:
            yield Peer(served.uri(""), lambda: served.server.disconnect(""))
        return
    tls = kind.endswith("TLS")
    if tls:
        uri = f"nbds+unix:///?socket={socket}&tls-certificates={pki}&tls-hostname=localhost"
    if kind.startswith("ours"):
        files = TlsFiles(pki / "server-cert.pem", pki / "server-key.pem", pki / "ca-cert.pem")
        async with serving(MemoryExport("", size_bytes=SIZE), tls=files) as served:
            ours = served.uri("").replace("nbd+unix", "nbds+unix")
            yield Peer(f"{ours}&tls-certificates={pki}&tls-hostname=localhost", lambda: served.server.disconnect(""))
        return
    if kind.startswith("nbdkit"):
        options = ["--tls=require", f"--tls-certificates={pki}", "--tls-verify-peer"] if tls else []
        command = ["nbdkit", "-f", "-U", str(socket), *options, "memory", str(SIZE)]
    else:
        image = directory / "image"
        with image.open("wb") as file:
            file.truncate(SIZE)
        secret = f"tls-creds-x509,id=tls0,dir={pki},endpoint=server,verify-peer=on"
        options = ["--object", secret, "--tls-creds=tls0"] if tls else []
        command = ["qemu-nbd", "--persistent", "--shared=8", "--format=raw", "--discard=unmap", f"--socket={socket}"]
        command += [*options, str(image)]
    async with started(*command, socket=socket) as process:
        yield Peer(uri, process.kill)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pki(tmp_path_factory.mktemp("pki"))


async def exercise(client: Client) -> bytes:
    """What every server must do alike; returns what is at 5 MiB then."""
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
        with trio.move_on_after(delay_s):
            await client.write(12 << 20, bytes(2 << 20))
    assert await client.read(8 << 20, 5000) == bytes(5000)
    assert len(await client.read(0, SIZE)) == SIZE
    for number, call in (
        (errno.EINVAL, client.read(SIZE - 1, 2)),
        (errno.ENOSPC, client.write(SIZE - 1, b"xy")),
        (errno.ENOSPC, client.write_zeroes(0, SIZE + 1)),
    ):
        with fails(number, "outside the export"):
            await call
    await client.write(SIZE - 1, b"x")
    await client.trim(0, SIZE, fua=True)
    await client.write_zeroes(0, SIZE)
    assert await client.read(0, SIZE) == bytes(SIZE)
    await client.write(5 << 20, data, fua=True)
    if client.contexts:
        runs = [run async for run in client.extents("base:allocation")]
        assert sum(length for _, length, _ in runs) == SIZE
        for offset, length, flags in runs:
            if flags & wire.STATE_ZERO:
                assert await client.read(offset, length) == bytes(length)
            else:
                assert not flags & wire.STATE_HOLE
        status = await client.block_status(5 << 20, len(data), ["base:allocation"])
        assert status["base:allocation"][0][1] == 0
    return data


@each_server
def test_every_server_serves_every_request(kind: str, tmp_path: Path, pki: Path) -> None:
    async def main() -> None:
        async with peer(kind, tmp_path, pki) as server:
            async with connect(server.uri, contexts=["base:allocation"]) as client:
                assert client.contexts == ("base:allocation",)
                assert client.terms.extended is kind.startswith("ours") and client.terms.structured
                assert client.terms.encrypted is kind.endswith("TLS")
                await exercise(client)
            async with connect(server.uri) as client:  # it was left in order
                await client.flush()

    run(main, timeout_s=60)


@each_server
def test_every_server_that_goes_away_in_the_middle_is_told_to_all(kind: str, tmp_path: Path, pki: Path) -> None:
    async def main() -> None:
        async with peer(kind, tmp_path, pki) as server, connect(server.uri) as client:
            lost = 0

            async def work(number: int) -> None:
                nonlocal lost
                try:
                    while True:
                        await client.write(number << 16, bytes(65536))
                        assert len(await client.read(number << 16, 65536)) == 65536
                except OSError as error:
                    assert error.errno == errno.ECONNRESET, error
                    lost += 1

            async with trio.open_nursery() as nursery:
                for number in range(100):
                    nursery.start_soon(work, number)
                await trio.sleep(0.1)
                server.kill()
            assert lost == 100 and not client._requests
            assert (await client.failed()).errno == errno.ECONNRESET

    run(main, timeout_s=60)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.endswith("TLS")])
def test_wrong_certificates_are_refused_by_whoever_sees_them(kind: str, tmp_path: Path, pki: Path) -> None:
    async def main() -> None:
        stranger = tmp_path / "stranger"
        bare = tmp_path / "bare"
        for place in (stranger, bare):
            place.mkdir()
        shutil.copy(make_pki(stranger) / "ca-cert.pem", bare)
        async with peer(kind, tmp_path, pki) as server:
            address = server.uri.partition("&tls-certificates")[0]
            # Who doesn't like the client's certificate may say so; GnuTLS tells nobody.
            refused = (errno.ECONNRESET, "accept the client's certificate")
            if kind.startswith("ours"):
                refused = (errno.EPROTO, "the peer refused: ")
            for parameters, number, text in (
                (f"&tls-certificates={stranger}", errno.EKEYREJECTED, "certificate is not accepted"),
                (f"&tls-certificates={pki}&tls-hostname=example.org", errno.EKEYREJECTED, "example.org"),
                ("", errno.EKEYREJECTED, "certificate is not accepted"),
                (f"&tls-certificates={stranger}&tls-verify-peer=0", *refused),
                (f"&tls-certificates={bare}&tls-verify-peer=0", *refused),
            ):
                with fails(number, text):
                    async with connect(address + parameters):
                        pass
            if not kind.startswith("ours"):  # which demands it over TCP only
                with fails(errno.EPROTONOSUPPORT, "demands TLS; connect with a URI nbds://"):
                    async with connect(address.replace("nbds", "nbd")):
                        pass
            async with connect(
                f"{address}&tls-certificates={pki}"
            ) as client:  # over a Unix socket no name is asked for
                assert len(await client.read(0, 512)) == 512

    run(main, timeout_s=60)


@pytest.mark.parametrize("certificate", ["expired", "client"])
def test_an_expired_certificate_and_one_for_clients_are_refused(certificate: str, tmp_path: Path, pki: Path) -> None:
    async def main() -> None:
        served = tmp_path / "pki"
        served.mkdir()
        shutil.copy(pki / "ca-cert.pem", served)
        shutil.copy(pki / f"{certificate}-cert.pem", served / "server-cert.pem")
        shutil.copy(pki / f"{certificate}-key.pem", served / "server-key.pem")
        server = nbdkit(tmp_path, "--tls=on", f"--tls-certificates={served}", "memory", "1M")
        async with server as socket:
            with fails(errno.EKEYEXPIRED if certificate == "expired" else errno.EKEYREJECTED):
                async with connect(f"nbds+unix:///?socket={socket}&tls-certificates={pki}"):
                    pass

    run(main, timeout_s=60)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("TLS")])
def test_a_server_without_tls_is_not_spoken_to_in_plain_text(kind: str, tmp_path: Path, pki: Path) -> None:
    async def main() -> None:
        async with peer(kind, tmp_path, pki) as server:
            uri = server.uri.replace("nbd+unix", "nbds+unix")
            with pytest.raises(OSError, match="takes no TLS") as caught:
                async with connect(f"{uri}&tls-certificates={pki}"):
                    pass
            assert caught.value.errno in (errno.EPROTONOSUPPORT, errno.EACCES)

    run(main, timeout_s=60)


@pytest.mark.alone
def test_a_host_that_is_gone_is_noticed_by_who_waits_and_by_who_does_not() -> None:
    """In network namespaces: the server's address vanishes, and nothing says so."""
    root = [] if os.geteuid() == 0 else ["--map-root-user"]
    command = ["unshare", *root, "--net", sys.executable, "-m", "tests.nbd.halfopen", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert told.pop("read") == "ETIMEDOUT"
    for name in ("idle", "busy"):
        number, seconds = told[name].split()
        assert number == "ETIMEDOUT" and 0.5 < float(seconds) < 4, told


# --- what each has of its own ---


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_qemu_nbd_serves_every_request(image_format: str, tmp_path: Path) -> None:
    async def main() -> None:
        image = tmp_path / "image"
        await tool(tmp_path, "qemu-img", "create", "-f", image_format, str(image), str(SIZE))
        server = qemu_nbd(tmp_path, f"--format={image_format}", "--discard=unmap", "--export-name=demo/vol", str(image))
        async with server as socket:
            async with connect(f"nbd+unix:///demo/vol?socket={socket}", contexts=["base:allocation"]) as client:
                assert client.terms.structured and client.contexts == ("base:allocation",)
                data = await exercise(client)
            with fails(errno.ENOENT):
                async with connect(socket, "other"):
                    pass
        # A raw image holds what the client was told is durable.
        if image_format == "raw":
            assert image.read_bytes()[5 << 20 :][: len(data)] == data

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
