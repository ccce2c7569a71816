"""Clients in systemd's store: they come back once, or see the end of their connection; none waits for nobody."""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nbd.suspended import Suspended
from nbd.transmission import Session
from terrace import keptclients
from terrace.keptclients import BATCH, CLIENT, CLIENTS, leave_behind, take_back
from tests.system.daemon import environment
from tests.system.nbdclient import Connection
from tests.terrace.fakedaemon import FakeDaemon, command
from tests.terrace.test_passedsockets import PASS
from tests.terrace.test_upgrade import MIB, PATTERN, Client, add_volume


class Store:
    """As systemd has one, in a thread. `deaf`: to these states."""

    def __init__(self, path: Path, deaf: tuple[str, ...] = ()) -> None:
        self.path = path
        self.deaf = deaf
        self.kept: list[tuple[str, int]] = []
        self.ready = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            data, control, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(253 * 4))
            descriptors = array.array("i")
            for _, _, content in control:
                descriptors.frombytes(content)
            states = data.decode().split("\n")
            name = "".join(state.removeprefix("FDNAME=") for state in states if state.startswith("FDNAME="))
            if states == ["END"]:
                return
            if "READY=1" in states:
                self.ready.set()
            if "FDSTORE=1" in states:
                self.kept += [(name, descriptor) for descriptor in descriptors]
                continue
            if "FDSTOREREMOVE=1" in states and "FDSTOREREMOVE=1" not in self.deaf:
                self.forget(name)
            if "BARRIER=1" in states and "BARRIER=1" in self.deaf:
                self.kept += [("barrier", descriptor) for descriptor in descriptors]
            else:
                for descriptor in descriptors:
                    os.close(descriptor)

    def forget(self, *names: str) -> None:
        for name, descriptor in self.kept:
            if name in names:
                os.close(descriptor)
        self.kept = [one for one in self.kept if one[0] not in names]

    def of(self, name: str) -> list[int]:
        return [descriptor for found, descriptor in self.kept if found == name]

    def passed(self) -> tuple[int | None, list[socket.socket]]:
        """What the next daemon gets of it."""
        memories = self.of(CLIENTS)
        sockets = [socket.socket(fileno=os.dup(descriptor)) for descriptor in self.of(CLIENT)]
        return os.dup(memories[0]) if memories else None, sockets

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"END", str(self.path))
        self._thread.join()
        self._socket.close()
        self.forget(*[name for name, _ in self.kept])


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    made = Store(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(made.path))
    monkeypatch.setattr(keptclients, "PATIENCE_S", 0.2)
    yield made
    made.close()


@pytest.fixture
def peers() -> Iterator[Callable[[int], list[socket.socket]]]:
    """Leaves so many clients behind, and gives their ends."""
    with ExitStack() as sockets:

        def make(count: int) -> list[socket.socket]:
            pairs = [socket.socketpair() for _ in range(count)]
            suspended = [
                Suspended(ours, f"peer {number}", "p/v", "id", Session(), input=bytes([number % 256]))
                for number, (ours, _) in enumerate(pairs)
            ]
            leave_behind(suspended)
            for one in suspended:
                one.close()
            for _, theirs in pairs:
                theirs.settimeout(5)
                sockets.enter_context(theirs)
            return [theirs for _, theirs in pairs]

        yield make


Peers = Callable[[int], list[socket.socket]]


def test_clients_come_back_each_with_its_own_and_are_in_the_store_no_more(store: Store, peers: Peers) -> None:
    ends = peers(2 * BATCH + 3)
    clients = take_back(*store.passed())
    assert not store.kept
    assert len(clients) == len(ends)
    for one in clients:
        one.sock.send(one.peer.encode() + one.input)
    for number, end in enumerate(ends):
        assert end.recv(100) == f"peer {number}".encode() + bytes([number % 256])
    for one in clients:
        one.close()


@pytest.mark.parametrize("deaf", ["FDSTOREREMOVE=1", "BARRIER=1"])
def test_who_may_be_in_the_store_still_is_disconnected(store: Store, peers: Peers, deaf: str) -> None:
    """Also where the store goes on holding the socket: its client must not wait for nobody."""
    (end,) = peers(1)
    passed = store.passed()
    store.deaf = (deaf, "BARRIER=1")
    assert take_back(*passed) == []
    assert end.recv(1) == b""


def test_sockets_whose_records_are_lost_are_disconnected(store: Store, peers: Peers) -> None:
    (end,) = peers(1)
    store.forget(CLIENTS)
    assert take_back(*store.passed()) == []
    assert end.recv(1) == b"" and not store.kept


def test_records_that_are_another_version_s_disconnect(store: Store, peers: Peers) -> None:
    (end,) = peers(1)
    (memory,) = store.of(CLIENTS)
    os.pwrite(memory, b"\0\0\0\2", 8)
    assert take_back(*store.passed()) == []
    assert end.recv(1) == b"" and not store.kept


# --- with daemons ---


def start(daemon: FakeDaemon, store: Store) -> None:
    """As systemd does, with all that the store has."""
    names = ":".join(name for name, _ in store.kept)
    moves = " ".join(f"{number}<&{descriptor}" for number, (_, descriptor) in enumerate(store.kept, 3))
    inside = [sys.executable, "-c", PASS, str(len(store.kept)), names, *command()]
    store.ready.clear()
    with daemon.log.open("a") as log:
        daemon.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" {moves}', "-", *inside, "--home", daemon.home, "--config", daemon.configure()],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment() | {"NOTIFY_SOCKET": str(store.path), "FDSTORE": "100"},
            pass_fds=[descriptor for _, descriptor in store.kept],
        )


@pytest.fixture
def kept(own_daemon: FakeDaemon, store: Store) -> Client:
    """In the middle of everything, and in the store."""
    own_daemon.home.mkdir()
    start(own_daemon, store)
    assert store.ready.wait(20)
    add_volume(own_daemon)
    own_daemon.port = int(own_daemon.api("GET", "/v1/status")["nbd"]["uris"][0].rpartition(":")[2].strip("/"))
    client = Client(own_daemon)
    assert own_daemon.stop() == 0
    assert len(store.of(CLIENT)) == len(store.of(CLIENTS)) == 1
    return client


def test_a_client_goes_on_with_the_next_daemon(own_daemon: FakeDaemon, store: Store, kept: Client) -> None:
    start(own_daemon, store)
    assert store.ready.wait(20)
    assert not store.of(CLIENT) and not store.of(CLIENTS)
    kept.goes_on()
    with Connection(own_daemon.socket, "p/v") as newcomer:
        assert newcomer.size_bytes == MIB and newcomer.read(0, 4096) == PATTERN


def test_a_daemon_that_is_stopped_before_it_serves_leaves_the_clients_to_the_next_one(
    own_daemon: FakeDaemon, store: Store, kept: Client
) -> None:
    slow = own_daemon.directory("p") / "one-slow-open"
    slow.write_text("600")
    start(own_daemon, store)
    while slow.exists():
        assert own_daemon.alive()
    assert own_daemon.process is not None
    own_daemon.process.send_signal(signal.SIGTERM)
    assert own_daemon.process.wait(20) == 0
    own_daemon.kill()
    start(own_daemon, store)
    assert store.ready.wait(20)
    kept.goes_on()


def test_a_client_without_records_does_not_wait_for_ever(own_daemon: FakeDaemon, store: Store, kept: Client) -> None:
    store.forget(CLIENTS)
    start(own_daemon, store)
    assert store.ready.wait(20)
    with kept.connection as connection, pytest.raises((ConnectionError, EOFError)):
        connection.socket.settimeout(5)
        connection.reply()
        connection.reply()
