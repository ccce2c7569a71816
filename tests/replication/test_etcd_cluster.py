"""`EtcdCluster` keeps the contract of a `ClusterStore`, with a real etcd."""

from __future__ import annotations

import errno
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from replication.etcd import Etcd, EtcdCluster, EtcdTls
from replication.membership import Term
from tests.replication.cluster_contract import *  # noqa: F403
from tests.replication.cluster_contract import Clusters, World
from tests.replication.nodes import Nodes
from tests.replication.stores import MIRROR, first_record


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Server:
    """etcd, in its own directory and on its own ports."""

    def __init__(self, directory: Path) -> None:
        tool = shutil.which("etcd")
        assert tool, "etcd is missing; scripts/install-tools etcd-server installs it"
        self.url, peer = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
        command = [tool, "--name", "one", "--data-dir", str(directory / "data"), "--unsafe-no-fsync"]
        command += ["--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        command += [
            "--listen-peer-urls",
            peer,
            "--initial-advertise-peer-urls",
            peer,
            "--initial-cluster",
            f"one={peer}",
        ]
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while not self._is_well():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.05)

    def _is_well(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return b"true" in answer.read()
        except (urllib.error.URLError, OSError):
            return False

    def wipe(self) -> None:
        """Another test begins."""
        request = urllib.request.Request(f"{self.url}/v3/kv/deleterange", b'{"key":"AA==","range_end":"AA=="}')
        urllib.request.urlopen(request, timeout=5).close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("etcd"))
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGCONT)
        server.process.kill()
        server.process.wait()


class EtcdWorld(Nodes):
    def __init__(self, server: Server, etcd: Etcd) -> None:
        super().__init__("abc", timeout_s=0.3)
        self._server, self._etcd = server, etcd
        self.made: dict[str, EtcdCluster] = {}

    def cluster(self, node: str) -> EtcdCluster:  # type: ignore[override]
        return self.made.setdefault(node, EtcdCluster(node, self._etcd, super().cluster(node)))

    def cut(self) -> None:
        super().cut()
        self._server.process.send_signal(signal.SIGSTOP)

    def heal(self) -> None:
        super().heal()
        self._server.process.send_signal(signal.SIGCONT)


@asynccontextmanager
async def etcd_world(server: Server, *more: str) -> AsyncIterator[EtcdWorld]:
    server.wipe()
    async with Etcd([*more, server.url], timeout_s=1.0) as etcd:
        world = EtcdWorld(server, etcd)
        try:
            yield world
        finally:
            world.heal()


@pytest.fixture
def clusters(server: Server) -> Clusters:
    @asynccontextmanager
    async def begin() -> AsyncIterator[World]:
        async with etcd_world(server) as world:
            yield world

    return begin


def test_an_endpoint_that_is_dead_is_passed_over(server: Server) -> None:
    async def main() -> None:
        async with etcd_world(server, f"http://127.0.0.1:{free_port()}") as world:
            first = first_record("abc")
            await world.cluster("a").create(first)
            assert await world.cluster("b").newest(MIRROR) == first

    trio.run(main)


def test_a_record_is_in_etcd_and_at_its_legs_before_it_counts(server: Server) -> None:
    async def main() -> None:
        async with etcd_world(server) as world:
            first = first_record("abc")
            await world.cluster("a").create(first)
            second = first.next_epoch(in_sync=frozenset("ab"))
            world.all["b"].up = False
            with pytest.raises(OSError, match="isn't stored") as refused:
                await world.cluster("a").commit(second, expected=first)
            assert refused.value.errno == errno.ETIMEDOUT
            assert await world.cluster("c").newest(MIRROR) == second  # a candidate finds it
            third = second.next_epoch(in_sync=frozenset("a"))
            await world.cluster("a").commit(third, expected=second)
            assert world.all["a"].keeper.record.accepted == third

    trio.run(main)


def test_no_new_term_begins_while_another_node_holds_the_primarys_lease(server: Server) -> None:
    async def main() -> None:
        async with etcd_world(server) as world:
            first = first_record("abc")
            a, b = world.cluster("a"), world.cluster("b")
            await a.create(first)
            await a.hold(MIRROR, 2.0)
            await a.hold(MIRROR, 2.0)
            with pytest.raises(OSError, match="another node is primary") as refused:
                await b.hold(MIRROR, 2.0)
            assert refused.value.errno == errno.EBUSY
            new = first.next_term(Term(2, "2" * 16), "b", frozenset("abc"))
            with pytest.raises(OSError, match="node a is primary and alive") as refused:
                await b.commit(new, expected=first)
            assert refused.value.errno == errno.EBUSY
            await a.release()
            await b.commit(new, expected=first)
            await b.hold(MIRROR, 2.0)
            # A primary that is started again isn't kept out by itself.
            await b.commit(new.next_term(Term(3, "3" * 16), "b", frozenset("abc")), expected=new)

    trio.run(main)


def test_a_lease_that_has_expired_is_taken_anew_or_lost(server: Server) -> None:
    async def main() -> None:
        async with etcd_world(server) as world:
            a, b = world.cluster("a"), world.cluster("b")
            await a.hold(MIRROR, 2.0)
            assert a._lease is not None
            await world._etcd.call("lease/revoke", {"ID": a._lease})  # as an expiry, without the wait
            await b.hold(MIRROR, 2.0)
            with pytest.raises(OSError, match="another node is primary"):
                await a.hold(MIRROR, 2.0)

    trio.run(main)


@pytest.mark.parametrize("endpoints", [[], ["ftp://host:1"], ["host:2379"], ["http://"]])
def test_an_endpoint_that_makes_no_sense_is_named(endpoints: list[str]) -> None:
    with pytest.raises(OSError, match="endpoint") as refused:
        Etcd(endpoints)
    assert refused.value.errno == errno.EINVAL


def test_what_answers_but_is_no_etcd_is_said(tmp_path: Path) -> None:
    async def main() -> None:
        async def other(stream: trio.SocketStream) -> None:
            await stream.receive_some(4096)
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")

        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(trio.serve_tcp, other, 0)
            port = listeners[0].socket.getsockname()[1]
            async with Etcd([f"http://127.0.0.1:{port}"], timeout_s=1) as etcd:
                with pytest.raises(OSError, match="answers as etcd doesn't") as refused:
                    await etcd.call("kv/range", {"key": "AA=="})
                assert refused.value.errno == errno.EPROTO
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_tls_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "ca.pem"
    bad.write_text("no certificate")
    with pytest.raises(OSError, match=r"ca\.pem") as refused:
        EtcdTls(ca=bad).context()
    assert refused.value.errno == errno.EINVAL
    with pytest.raises(FileNotFoundError):
        EtcdTls(ca=tmp_path / "none.pem").context()
