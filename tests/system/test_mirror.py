"""Two real daemons with certificates mirror a volume: what one of them loses, the other has."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from nbd.opening import take_over
from nbd.tls import client_context
from nbd.wire import OPT_TERRACE
from replication.wire import CallsOption
from terrace.certificates import make_authority, make_client, make_node
from tests.system.daemon import ApiError, Daemon
from tests.system.nbdclient import Connection, Refused
from tiers import Pool

pytestmark = pytest.mark.system
MIB = 1 << 20
SIZE = 32 * MIB
NAMES = ("a", "b")


def free_port() -> int:
    """One that was free a moment ago: peers must know each other's before they are started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Node:
    name: str
    daemon: Daemon
    port: int

    def mirror(self, volume: str = "v") -> dict[str, Any]:
        return dict(self.daemon.api("GET", f"/v1/pools/p/volumes/{volume}/mirror"))

    def ask(self, verb: str, volume: str = "v", **body: Any) -> Any:
        return self.daemon.api("POST", f"/v1/pools/p/volumes/{volume}/mirror/{verb}", body)

    def legs(self, volume: str = "v") -> dict[str, str]:
        return {leg["node"]: leg["state"] for leg in self.mirror(volume)["legs"]}

    def leg(self, node: str, volume: str = "v") -> dict[str, Any]:
        return next(leg for leg in self.mirror(volume)["legs"] if leg["node"] == node)

    def wait_for(self, wanted: dict[str, str], volume: str = "v", timeout_s: float = 15.0) -> None:
        """Until the legs have these states, by node."""
        deadline_s = time.monotonic() + timeout_s
        while (found := self.legs(volume)) != wanted:
            assert time.monotonic() < deadline_s, f"{found}, not {wanted}: {self.mirror(volume)}\n{self.daemon.tail()}"
            time.sleep(0.05)

    def connect(self, volume: str = "v") -> Connection:
        return Connection(self.daemon.socket, f"p/{volume}")

    def identity(self, volume: str) -> str:
        """Of its export: whoever holds something in memory that belongs to it goes by that."""
        return str(self.daemon.api("GET", f"/v1/pools/p/exports/{volume}")["identity"])

    def events(self) -> list[str]:
        return [event["text"] for event in self.daemon.api("GET", "/v1/events")]


@dataclass
class Pair:
    a: Node
    b: Node
    authority: Path

    def both_online(self) -> None:
        for node in (self.a, self.b):
            if not node.daemon.alive():  # a test that has failed may have left it so
                node.daemon.start()
        for node in (self.a, self.b):
            deadline_s = time.monotonic() + 10
            while any(one["state"] != "Online" for one in node.daemon.api("GET", "/v1/nodes")):
                assert time.monotonic() < deadline_s, node.daemon.api("GET", "/v1/nodes")
                time.sleep(0.05)

    def create(self, volume: str = "v", *, timeout_s: float = 1.0) -> None:
        self.both_online()
        body = {"name": volume, "size": SIZE, "mirror": [{"node": "b"}], "timeout_s": timeout_s}
        self.a.daemon.api("POST", "/v1/pools/p/volumes", body)
        self.a.wait_for({"a": "UpToDate", "b": "UpToDate"}, volume)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("mirror")
    authority = directory / "authority"
    make_authority(authority, "test", 30)
    ports = {name: free_port() for name in NAMES}
    nodes = {}
    for name, other in (NAMES, NAMES[::-1]):
        made = make_node(authority, name, [], 30, here=False)
        home = directory / name
        (home / "tls").mkdir(parents=True, mode=0o700)
        for file in made.iterdir():
            file.rename(home / "tls" / file.name)
        config = (
            f'[nbd.tls]\nmode = "allowed"\n[node]\nname = "{name}"\nlisten = ["127.0.0.1:{ports[name]}"]\n'
            f'[peers.{other}]\naddress = "127.0.0.1:{ports[other]}"\n'
        )
        nodes[name] = Node(name, Daemon(home, config), ports[name])
    pair = Pair(nodes["a"], nodes["b"], authority)
    try:
        for node in nodes.values():
            node.daemon.start()
            device = {"path": str(node.daemon.home / "device"), "tier": "fast", "size": 256 * MIB}
            node.daemon.api("POST", "/v1/pools", {"name": "p", "devices": [device]})
        pair.both_online()
        yield pair
    finally:
        for node in nodes.values():
            node.daemon.kill()


def until(true: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_what_is_written_while_one_node_is_down_is_on_both_afterwards_and_either_can_serve_it(pair: Pair) -> None:
    a, b = pair.a, pair.b
    pair.create()
    first, second = os.urandom(MIB), os.urandom(MIB)
    with a.connect() as client:
        client.write(0, first)
        client.write(5 * MIB + 100, first[:1000])  # a part of a block
        client.flush()
        b.daemon.kill()
        client.write(2 * MIB, second)  # is answered when the record says that b lacks it
        a.wait_for({"a": "UpToDate", "b": "Stale"})
        assert a.mirror()["state"] == "Degraded"
        client.trim(0, 64 << 10)
        client.flush()
        b.daemon.start()
        a.wait_for({"a": "UpToDate", "b": "UpToDate"})
        a.daemon.api("POST", "/v1/pools/p/snapshots", {"name": "both", "volumes": ["v"]})
        client.write(3 * MIB, second[:4096])
    assert any("leg of p/v on node b is Stale" in text for text in a.events())

    deadline_s = time.monotonic() + 5
    while True:  # the daemon may not know yet that its client has left
        try:
            a.ask("demote", to="b")
            break
        except ApiError as error:
            assert error.errno == "EBUSY" and time.monotonic() < deadline_s, error
            time.sleep(0.05)
    with b.connect() as client:
        assert client.read(0, MIB) == bytes(64 << 10) + first[64 << 10 :]
        assert client.read(2 * MIB, MIB) == second
        assert client.read(3 * MIB, 4096) == second[:4096]
        assert client.read(5 * MIB + 100, 1000) == first[:1000]
        client.write(MIB, first)
    with pytest.raises(Refused, match="primary is node b"):
        a.connect()
    refused = a.daemon.cli("attach", "p/v", status=1).stderr
    assert "p/v can't be attached here: node b is the primary, and serves it; attach it there" in refused
    for node in (a, b):  # at the same place in the order of writes
        with node.connect("v@both") as snapshot:
            assert snapshot.read(2 * MIB, 2 * MIB) == second + bytes(MIB)
    assert (b.mirror()["primary"], b.mirror()["role"], a.mirror()["role"]) == ("b", "primary", "secondary")
    until(lambda: not any(one["kind"] == "client" for one in b.daemon.api("GET", "/v1/status")["nbd"]["connections"]))
    assert b.daemon.api("DELETE", "/v1/pools/p/volumes/v?snapshots=1") == {"deleted": "p/v", "left": []}
    assert not any(volume["name"] == "p/v" for volume in a.daemon.api("GET", "/v1/pools/p/volumes"))


def test_a_primary_that_is_killed_goes_on_when_it_is_started_again(pair: Pair) -> None:
    a, data = pair.a, os.urandom(MIB)
    pair.create("w")
    with a.connect("w") as client:
        client.write(0, data)
    identity = a.identity("w")
    a.daemon.kill()
    a.daemon.start()
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "w")
    assert a.identity("w") == identity
    with a.connect("w") as client:
        assert client.read(0, MIB) == data
    assert a.mirror("w")["term"] == 2


def test_who_is_connected_to_a_mirror_stays_so_over_an_upgrade(pair: Pair) -> None:
    pair.create("u")
    data = os.urandom(MIB)
    with pair.a.connect("u") as client:
        client.write(0, data)
        pair.a.daemon.upgrade()
        client.write(MIB, data)
        client.flush()
        assert client.read(0, 2 * MIB) == 2 * data
    pair.a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "u")


def test_a_client_whose_write_waits_for_a_slow_leg_stays_connected_over_an_upgrade(pair: Pair) -> None:
    pair.create("o", timeout_s=20.0)
    data = os.urandom(4096)
    b = pair.b.daemon.process
    assert b is not None

    def go_on() -> None:
        """A second after the clients were stopped."""
        until(lambda: "is loaded as process" in pair.a.daemon.log.read_text()[before:], 30)
        time.sleep(1)
        b.send_signal(signal.SIGCONT)

    before = len(pair.a.daemon.log.read_text())
    with pair.a.connect("o") as client:
        b.send_signal(signal.SIGSTOP)
        tasks = [threading.Thread(target=client.write, args=(0, data)), threading.Thread(target=go_on)]
        for task in tasks:
            task.start()
        try:
            pair.a.daemon.upgrade()
        finally:
            for task in tasks:
                task.join()
        assert client.read(0, 4096) == data
    pair.both_online()
    pair.a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "o")


def test_two_sides_that_have_both_written_are_a_split_brain_until_an_operator_gives_one_up(pair: Pair) -> None:
    a, b = pair.a, pair.b
    pair.create("s")
    b.daemon.kill()
    with a.connect("s") as client:
        client.write(0, b"a" * 4096)
        client.write(MIB, b"a" * 4096)
    a.wait_for({"a": "UpToDate", "b": "Stale"}, "s")
    identity = a.identity("s")
    alone = a.daemon.cli("volume", "mirror", "verify", "p/s", status=1)
    assert "internal error" not in alone.stderr and "p/s" in alone.stderr
    a.daemon.kill()
    b.daemon.start()
    with pytest.raises(ApiError, match="only node a can tell"):
        b.ask("promote", "s")
    assert "may lose" in b.ask("promote", "s", dry_run=True)["may_lose"]
    b.ask("promote", "s", force=True)
    with b.connect("s") as client:
        client.write(0, b"b" * 4096)
    a.daemon.start()
    deadline_s = time.monotonic() + 15
    while not str((leg := b.leg("a", "s"))["error"]).startswith("split brain"):
        assert time.monotonic() < deadline_s, leg
        time.sleep(0.05)
    with pytest.raises(Refused, match="can't be served"):
        a.connect("s")
    pair.both_online()
    followed = b.daemon.cli("volume", "mirror", "resync", "p/s", "a", "--discard", "--yes")
    assert followed.stdout == "The leg of p/s on node a is UpToDate.\n"
    b.wait_for({"a": "UpToDate", "b": "UpToDate"}, "s")
    assert a.identity("s") != identity, "a kernel that holds a filesystem of a's history must not go on with this"
    lines = b.daemon.cli("volume", "mirror", "verify", "p/s", "--full").stdout
    assert "equal" in lines
    with b.connect("s") as client:
        assert client.read(0, 4096) == b"b" * 4096
        assert client.read(MIB, 4096) == bytes(4096)


def test_a_split_brain_of_two_terms_of_one_number_is_told_and_the_side_that_does_not_serve_stays_out(
    pair: Pair,
) -> None:
    a, b = pair.a, pair.b
    pair.create("e")
    a.daemon.kill()
    b.ask("promote", "e", force=True)
    with b.connect("e") as client:
        client.write(0, b"b" * 4096)
    b.daemon.kill()
    a.daemon.start()  # goes on by itself, in a term with the number that b has, too
    a.wait_for({"a": "UpToDate", "b": "Stale"}, "e")
    with a.connect("e") as client:
        client.write(MIB, b"a" * 4096)
    b.daemon.start()
    pair.both_online()
    until(lambda: str(a.leg("b", "e")["error"]).startswith("split brain: node a has 2.0"))
    until(lambda: any("the leg of p/e on node b: split brain" in text for text in a.events()))
    explained = a.daemon.api("GET", "/v1/pools/p/volumes/e/mirror/explain")["text"]
    assert "primary a" in explained and "primary b, forced" in explained
    way_out = "terrace volume mirror resync p/e b --discard"
    for wait in ((), ("--no-wait",)):
        refused = a.daemon.cli("volume", "mirror", "resync", "p/e", "b", *wait, status=1)
        assert "split brain" in refused.stderr and way_out in refused.stderr

    until(lambda: way_out in b.daemon.api("GET", "/v1/pools/p/volumes/e/mirror/explain")["text"])
    a.daemon.kill()
    b.daemon.kill()
    b.daemon.start()  # as before, but it knows now that it isn't the only one
    with pytest.raises(ApiError, match="split brain"):
        b.ask("promote", "e")
    assert any("split brain" in text for text in b.events())
    time.sleep(1.5)  # it would have gone on after a second without the other
    assert b.mirror("e")["role"] == "secondary"
    with pytest.raises(Refused, match="split brain"):
        b.connect("e")
    a.daemon.start()
    pair.both_online()
    a.wait_for({"a": "UpToDate", "b": "Stale"}, "e")
    a.ask("resync", "e", node="b", discard=True)
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "e")
    assert b.mirror("e")["problem"] is None
    assert "equal" in a.daemon.cli("volume", "mirror", "verify", "p/e", "--full").stdout
    with a.connect("e") as client:
        assert client.read(0, 4096) == bytes(4096)
        assert client.read(MIB, 4096) == b"a" * 4096


def test_what_is_wrong_is_refused_in_a_sentence_and_leaves_nothing_behind(pair: Pair) -> None:
    a, b = pair.a, pair.b
    pair.both_online()
    body = {"name": "x", "size": SIZE}
    for places, said in (
        ([{"node": "c"}], "there is no peer 'c'"),
        ([{"node": "a"}], "node a is this one"),
        ([{"node": "b"}, {"node": "b"}], "named twice"),
        ([{"node": "b", "pool": "q"}], "node b can't have a leg: there is no pool 'q'"),
    ):
        with pytest.raises(ApiError, match=said):
            a.daemon.api("POST", "/v1/pools/p/volumes", body | {"mirror": places})
    with pytest.raises(ApiError, match="a multiple of 4096, such as 8192"):
        a.daemon.api("POST", "/v1/pools/p/volumes", {"name": "x", "size": 4608, "mirror": [{"node": "b"}]})
    assert not any(volume["name"] == "p/x" for volume in a.daemon.api("GET", "/v1/pools/p/volumes"))
    pair.create("x")
    with pytest.raises(ApiError, match="a multiple of 4096"):
        a.daemon.api("PATCH", "/v1/pools/p/volumes/x", {"size": SIZE + 512})
    with pytest.raises(ApiError, match="is the primary of p/x"):
        a.daemon.api("DELETE", "/v1/pools/p/volumes/x/mirror/legs/a")
    with pytest.raises(ApiError, match="run this there"):
        b.daemon.api("DELETE", "/v1/pools/p/volumes/x/mirror/legs/b")
    with pytest.raises(ApiError, match="node a is the primary of p/x: run this there"):
        b.ask("demote", "x")  # which did nothing, and said that there is no primary now
    with pytest.raises(ApiError, match="delete all of it at its primary"):
        b.daemon.api("DELETE", "/v1/pools/p/volumes/x")
    with pytest.raises(ApiError, match="has legs of mirrors"):
        b.daemon.api("DELETE", "/v1/pools/p")
    assert a.daemon.api("DELETE", "/v1/pools/p/volumes/x/mirror/legs/b") == {
        "removed": ["p/x"],
        "left": [],
        "mirrored": False,
        "voter": False,
    }
    assert a.daemon.api("GET", "/v1/pools/p/volumes/x")["mirror"] is None
    with pytest.raises(ApiError, match="not mirrored"):
        a.mirror("x")
    a.daemon.api("POST", "/v1/pools/p/volumes/x/mirror/legs", {"node": "b"})
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "x")
    assert a.daemon.api("DELETE", "/v1/pools/p/volumes/x") == {"deleted": "p/x", "left": []}
    assert not any(volume["name"] == "p/x" for volume in b.daemon.api("GET", "/v1/pools/p/volumes"))


def test_a_leg_whose_record_cannot_be_understood_can_be_deleted_by_force_only(pair: Pair) -> None:
    b = pair.b
    pair.create("d")
    b.daemon.stop()

    async def damage() -> None:
        async with Pool.open(b.daemon.home / "pools" / "p") as pool:
            await pool.set_mirror(pool.volume("d"), b'{"version": 77}', {})

    trio.run(damage)
    b.daemon.start()
    with pytest.raises(ApiError, match=r"version 77.*`terrace volume delete p/d --force` deletes the copy here"):
        b.daemon.api("DELETE", "/v1/pools/p/volumes/d")
    assert "Left: what other nodes have" in b.daemon.cli("volume", "delete", "p/d", "--force", "--yes").stdout
    assert not any(volume["name"] == "p/d" for volume in b.daemon.api("GET", "/v1/pools/p/volumes"))
    b.daemon.api("POST", "/v1/pools/p/volumes", {"name": "d", "size": SIZE})  # the name is free again
    b.daemon.api("DELETE", "/v1/pools/p/volumes/d")
    until(lambda: all(one["state"] == "Online" for one in pair.a.daemon.api("GET", "/v1/nodes")))
    assert len(pair.a.daemon.api("DELETE", "/v1/pools/p/volumes/d")["left"]) == 0


def test_only_the_certificate_of_a_peer_gets_what_is_for_peers(pair: Pair) -> None:
    authority = pair.authority
    client = make_client(authority, "backup", 30)

    async def ask(context: ssl.SSLContext | None, node: str) -> None:
        sock, _ = await take_over(("127.0.0.1", pair.a.port), OPT_TERRACE, CallsOption(node).encode(), tls=context)
        sock.close()

    context = client_context(
        authority / "ca-cert.pem", client / "client-cert.pem", client / "client-key.pem", check_hostname=False
    )
    for given, node, said in (
        (context, "b", "its certificate is of CN=backup"),
        (context, "z", "is no peer of 'a'"),
        (None, "b", "nodes talk over TLS only"),
    ):
        with pytest.raises(OSError, match=said):
            trio.run(ask, given, node)


def test_a_mirror_of_hundreds_of_tib_costs_what_is_in_it(pair: Pair) -> None:
    pair.both_online()
    body = {"name": "huge", "size": 900 << 40, "mirror": [{"node": "b"}], "timeout_s": 1.0}
    pair.a.daemon.api("POST", "/v1/pools/p/volumes", body)
    pair.a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "huge")
    pair.b.daemon.kill()
    data = os.urandom(MIB)
    with pair.a.connect("huge") as client:
        client.write(800 << 40, data)
        client.flush()
        pair.b.daemon.start()
        pair.a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "huge")
        assert client.read(800 << 40, MIB) == data
    pair.a.daemon.cli("volume", "delete", "p/huge", "--yes")
