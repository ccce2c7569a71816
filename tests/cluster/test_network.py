"""The network that faults are made with does what it says, and only on the link that it is said of."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.network import Network

pytestmark = pytest.mark.system
PORT = 7


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(["a", "b", "c"]) as network:
        yield network


@pytest.fixture(autouse=True)
def _healed(network: Network) -> Iterator[None]:
    yield
    network.heal()


def connected(network: Network, client: str = "a", server: str = "b") -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection between two hosts."""
    listener = network.host(server).run(lambda: socket.create_server((network.host(server).address, 0)))
    with listener:
        address = listener.getsockname()
        ours = network.host(client).run(lambda: socket.create_connection(address, 5))
        theirs, _ = listener.accept()
    for sock in (ours, theirs):
        sock.settimeout(5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


def silent(sock: socket.socket, seconds: float = 0.4) -> bool:
    sock.settimeout(seconds)
    try:
        return sock.recv(100) == b"never"
    except TimeoutError:
        return True
    finally:
        sock.settimeout(5)


def test_all_bytes_of_a_stream_arrive_and_are_counted(network: Network) -> None:
    ours, theirs = connected(network)
    before = network.counts()
    data = bytes(range(256)) * 65536
    with ours, theirs:
        sender = threading.Thread(target=ours.sendall, args=(data,))
        sender.start()
        found = bytearray()
        while len(found) < len(data):
            found += theirs.recv(1 << 20)
        sender.join()
    assert found == data
    after = network.counts()
    assert len(data) < after["a", "b"] - before["a", "b"] < len(data) * 1.1
    assert after["b", "a"] - before["b", "a"] < len(data) * 0.1
    assert after["c", "b"] == before["c", "b"]


def test_a_cut_one_way_leaves_the_other_way_and_the_other_hosts(network: Network) -> None:
    ours, theirs = connected(network)
    other, others = connected(network, "c")
    with ours, theirs, other, others:
        network.cut("b", "a")
        ours.sendall(b"heard")
        assert theirs.recv(100) == b"heard"
        theirs.sendall(b"not heard")
        other.sendall(b"of c")
        assert others.recv(100) == b"of c"
        assert silent(ours)
        network.heal()
        assert ours.recv(100) == b"not heard"  # sent again by the kernel: the connection has only stalled


def test_a_connection_that_is_begun_over_a_cut_gets_no_answer(network: Network) -> None:
    listener = network.host("b").run(lambda: socket.create_server((network.host("b").address, PORT)))
    with listener:
        network.cut("a", "b", both=True)
        with pytest.raises(TimeoutError):
            network.host("a").run(lambda: socket.create_connection((network.host("b").address, PORT), 0.3))


def test_a_delay_is_kept_and_loss_only_costs_time(network: Network) -> None:
    ours, theirs = connected(network)
    with ours, theirs:
        network.delay("a", "b", 0.15)
        start_s = time.monotonic()
        ours.sendall(b"late")
        assert theirs.recv(100) == b"late"
        assert 0.15 <= time.monotonic() - start_s < 1
        network.lose("a", "b", 0.3)
        for number in range(20):
            ours.sendall(bytes([number]))
        found = b""
        while len(found) < 20:
            found += theirs.recv(100)
        assert found == bytes(range(20))


def test_nothing_of_a_network_is_left(tmp_path: Path) -> None:
    def devices() -> int:
        links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.exists()]
        return sum(link.name == "tun" for link in links)

    before = devices()
    with Network(["a", "b"]) as network:
        command = network.host("a").command("ip", "-br", "addr")
        process = network._switch
        assert devices() == before + 2
    assert devices() == before
    assert process is not None and process.returncode == 0
    assert command[0] == "nsenter"
