"""Listening: sockets that nobody else can open, stale files, and errors that name the address."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

import pytest
import trio

from nbd import wire
from nbd.listen import open_tcp, open_unix
from nbd.server import serve
from tests.nbd.client import RawClient, run
from tests.nbd.memory import MemoryExport, MemoryExports


@pytest.mark.parametrize(("mode", "umask"), [(0o600, 0), (0o600, 0o777), (0o660, 0o077)])
def test_a_unix_socket_has_the_mode_that_was_asked_for(tmp_path: Path, mode: int, umask: int) -> None:
    async def test() -> None:
        old = os.umask(umask)
        try:
            listener = await open_unix(tmp_path / "s", mode)
        finally:
            os.umask(old)
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == mode
        listener.close()
        assert not (tmp_path / "s").exists()

    run(test)


def test_a_unix_socket_is_never_open_to_others_not_even_while_it_is_made(tmp_path: Path) -> None:
    modes: list[int] = []
    bind = socket.socket.bind

    class Watching(socket.socket):
        def bind(self, address: object) -> None:
            bind(self, address)  # type: ignore[arg-type]
            modes.append(stat.S_IMODE((tmp_path / "s").stat().st_mode))

    async def test() -> None:
        old = os.umask(0)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("nbd.listen.socket.socket", Watching)
                (await open_unix(tmp_path / "s")).close()
        finally:
            os.umask(old)
        assert modes == [0o600]

    run(test)


def test_the_file_of_a_dead_server_is_replaced_and_of_a_live_one_kept(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "s"
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        listener = await open_unix(path)
        with pytest.raises(OSError, match="another server is listening there") as info:
            await open_unix(path)
        assert info.value.errno == errno.EADDRINUSE and str(path) in str(info.value)
        listener.close()
        listener.close()
        path.write_text("precious")
        with pytest.raises(OSError, match="not a socket") as info:
            await open_unix(path)
        assert path.read_text() == "precious"

    run(test)


def test_closing_leaves_a_successors_file_alone(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "s"
        first = await open_unix(path)
        path.unlink()
        second = await open_unix(path)
        first.close()
        assert path.exists()
        second.close()
        assert not path.exists()

    run(test)


def test_errors_name_the_address(tmp_path: Path) -> None:
    async def test() -> None:
        with pytest.raises(OSError, match="longer than 107 bytes"):
            await open_unix(tmp_path / ("x" * 108))
        with pytest.raises(OSError, match="No such file") as info:
            await open_unix(tmp_path / "missing" / "s")
        assert str(tmp_path) in str(info.value)
        (listener,) = await open_tcp("127.0.0.1", 0)
        with pytest.raises(OSError, match=f"127.0.0.1:{listener.port}") as info:
            await open_tcp("127.0.0.1", listener.port)
        assert info.value.errno == errno.EADDRINUSE
        listener.close()
        with pytest.raises(OSError, match=r"no-such-host\.invalid"):
            await open_tcp("no-such-host.invalid", 0)

    run(test)


def test_tcp_clients_are_served_without_nagle(tmp_path: Path) -> None:
    async def test() -> None:
        (listener,) = await open_tcp("127.0.0.1", 0)
        assert listener.uri("demo/vol") == f"nbd://127.0.0.1:{listener.port}/demo/vol"
        async with trio.open_nursery() as nursery:
            server = await nursery.start(serve, MemoryExports(MemoryExport()), [listener])
            client = RawClient(await trio.open_tcp_stream("127.0.0.1", listener.port))
            await client.go()
            assert (await client.ask(wire.CMD_READ, 0, 512)).data == bytes(512)
            (connection,) = server._connections
            assert connection._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            await client.disconnect()
            await client.stream.aclose()
            await server.drain()

    run(test)


def test_serving_without_a_listener_is_refused() -> None:
    async def test() -> None:
        with pytest.raises(OSError, match="no address to listen on"):
            await serve(MemoryExports(), [])

    run(test)
