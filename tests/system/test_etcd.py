"""Two real daemons and a real etcd, which decides which of them serves."""

from __future__ import annotations

import base64
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from terrace.certificates import make_authority, make_node
from tests.etcdserver import EtcdServer, free_port
from tests.system.daemon import ApiError, Daemon
from tests.system.nbdclient import Connection
from tests.system.test_mirror import MIB, SIZE, Node, Pair

pytestmark = pytest.mark.system
TIMES = {"timeout_s": 0.5, "lease_s": 0.5}


class Trio(Pair):
    """Both nodes and their etcd."""

    etcd: EtcdServer

    def make(self, volume: str, **more: Any) -> None:
        self.both_online()
        body = {"name": volume, "size": SIZE, "mirror": [{"node": "b"}], "arbiter": "etcd", **TIMES, **more}

        def made() -> bool:
            try:
                self.a.daemon.api("POST", "/v1/pools/p/volumes", body)
            except ApiError as error:
                if error.errno != "ENOTCONN":  # of a connection to b as it was before its restart
                    raise
                return False
            return True

        until(made)
        self.a.wait_for({"a": "UpToDate", "b": "UpToDate"}, volume)

    def records(self) -> list[dict[str, Any]]:
        """What etcd has."""
        keys = [(base64.b64decode(key["key"]), base64.b64decode(key["value"])) for key in self.etcd.stored()]
        return [json.loads(value) for key, value in keys if key.endswith(b"/membership")]


def until(what: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """What it returns once it raises nothing, and returns what is true."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            if found := what():
                return found
            why: object = found
        except (ApiError, AssertionError, OSError) as error:
            why = error
        assert time.monotonic() < deadline_s, why
        time.sleep(0.05)


@pytest.fixture(scope="module")
def trio_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    directory = tmp_path_factory.mktemp("etcd")
    make_authority(directory / "authority", "test", 30)
    ports = {name: free_port() for name in "ab"}
    nodes = {}
    etcd = EtcdServer(directory / "etcd")
    for name, other in ("ab", "ba"):
        made = make_node(directory / "authority", name, [], 30, here=False)
        home = directory / name
        (home / "tls").mkdir(parents=True, mode=0o700)
        for file in made.iterdir():
            file.rename(home / "tls" / file.name)
        config = (
            f'[nbd.tls]\nmode = "allowed"\n[node]\nname = "{name}"\nlisten = ["127.0.0.1:{ports[name]}"]\n'
            f'[peers.{other}]\naddress = "127.0.0.1:{ports[other]}"\n[etcd]\nendpoints = ["{etcd.url}"]\n'
        )
        nodes[name] = Node(name, Daemon(home, config), ports[name])
    found = Trio(nodes["a"], nodes["b"], directory / "authority")
    found.etcd = etcd
    try:
        for node in nodes.values():
            node.daemon.start()
            device = {"path": str(node.daemon.home / "device"), "tier": "fast", "size": 256 * MIB}
            node.daemon.api("POST", "/v1/pools", {"name": "p", "devices": [device]})
        yield found
    finally:
        for node in nodes.values():
            node.daemon.kill()
        etcd.kill()


@contextmanager
def paused(etcd: EtcdServer) -> Iterator[None]:
    etcd.pause()
    try:
        yield
    finally:
        etcd.resume()


def promoted(node: Node, volume: str) -> float:
    """Ask until it is; the seconds that took."""
    began_s = time.monotonic()
    until(lambda: node.ask("promote", volume))
    return time.monotonic() - began_s


def test_the_survivor_of_a_dead_primary_is_promoted_without_force_and_has_everything(trio_of: Trio) -> None:
    a, b = trio_of.a, trio_of.b
    trio_of.make("v")
    data = os.urandom(MIB)
    with a.connect() as client:
        client.write(0, data)
        with pytest.raises(ApiError, match="node a is primary and alive"):
            b.ask("promote")
    a.daemon.kill()
    with pytest.raises(ApiError, match=r"heard the primary|alive by its lease"):
        b.ask("promote")
    took_s = promoted(b, "v")
    assert took_s < 6, "two leases and what etcd takes to notice"
    with b.connect() as client:
        assert client.read(0, MIB) == data
        client.write(MIB, data)
    a.daemon.start()
    b.wait_for({"a": "UpToDate", "b": "UpToDate"})
    shown = a.daemon.cli("volume", "mirror", "show", "p/v").stdout
    assert "Arbiter" in shown and "etcd, answers" in shown
    assert "etcd at http://127.0.0.1" in a.daemon.cli("status").stdout
    # Back by a demotion, which doesn't wait for any lease.
    until(lambda: b.ask("demote", to="a"))
    with a.connect() as client:
        assert client.read(MIB, MIB) == data
    assert trio_of.a.daemon.api("DELETE", "/v1/pools/p/volumes/v") == {"deleted": "p/v", "left": []}
    assert not trio_of.etcd.stored(), "a mirror that was deleted leaves no key"


def test_a_mirror_that_is_whole_goes_on_without_etcd_and_one_that_loses_a_leg_waits_for_it(trio_of: Trio) -> None:
    a, b = trio_of.a, trio_of.b
    trio_of.make("w")
    data = os.urandom(MIB)
    with a.connect("w") as client:
        with paused(trio_of.etcd):
            began_s = time.monotonic()
            while time.monotonic() - began_s < 3 * TIMES["lease_s"]:
                client.write(0, data)
                assert client.read(0, MIB) == data
            until(lambda: not a.mirror("w")["arbiter"]["answers"])
            told = a.daemon.cli("volume", "mirror", "explain", "p/w").stdout
            assert "is Online" in told and "etcd can't be asked now" in told, told
            with pytest.raises(ApiError, match="etcd has not answered"):
                a.ask("demote", "w", force=True)  # at once, and nothing is held up
            client.write(0, data)
            b.daemon.kill()
            waiting = until(lambda: a.mirror("w")["waiting"])
            assert "doesn't count yet" in waiting or "neither etcd nor" in waiting
            told = a.daemon.cli("volume", "mirror", "explain", "p/w").stdout
            assert "lets writes wait" in told and "It goes on when etcd answers (etcd has not" in told, told
        until(lambda: a.legs("w") == {"a": "UpToDate", "b": "Stale"})
        assert client.read(0, MIB) == data
        client.write(MIB, data)
        b.daemon.start()
        a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "w")
    assert any("etcd is no arbiter now" in text for text in a.events())
    assert any("etcd answers at" in text for text in a.events())


def test_a_primary_that_stood_still_answers_nothing_that_is_old(trio_of: Trio) -> None:
    a, b = trio_of.a, trio_of.b
    trio_of.make("z")
    assert a.daemon.process is not None
    with a.connect("z") as client:
        client.write(0, b"1" * 4096)
        a.daemon.process.send_signal(signal.SIGSTOP)
        try:
            promoted(b, "z")
            with b.connect("z") as other:
                other.write(0, b"2" * 4096)
        finally:
            a.daemon.process.send_signal(signal.SIGCONT)
        with pytest.raises((OSError, EOFError, AssertionError)):
            assert client.read(0, 4096) != b"1" * 4096, "a stale read"
            raise OSError("it was answered with what is new")
    b.wait_for({"a": "UpToDate", "b": "UpToDate"}, "z")


def test_a_leg_that_has_promised_a_term_to_a_node_that_etcd_refused_comes_back_by_itself(trio_of: Trio) -> None:
    a, b = trio_of.a, trio_of.b
    trio_of.make("l")
    before = a.mirror("l")["term"]
    assert a.daemon.process is not None
    with a.connect("l") as client:
        client.write(0, b"1" * 4096)
        a.daemon.process.send_signal(signal.SIGSTOP)
        try:
            refused = ""
            while "alive by its lease in etcd" not in refused:  # b's leg is free of a after 0.5 s, etcd after 2 s
                with pytest.raises(ApiError) as caught:
                    b.ask("promote", "l")
                refused = caught.value.message
        finally:
            a.daemon.process.send_signal(signal.SIGCONT)
        until(lambda: a.mirror("l")["term"] > before)
        a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "l")
        assert client.read(0, 4096) == b"1" * 4096
        client.write(4096, b"2" * 4096)


def test_an_etcd_that_was_restored_from_an_older_backup_is_told_and_decides_nothing(
    trio_of: Trio, tmp_path: Path
) -> None:
    a, b = trio_of.a, trio_of.b
    trio_of.make("r")
    trio_of.etcd.back_up(tmp_path / "backup")
    with a.connect("r") as client:
        b.daemon.kill()
        client.write(0, b"a" * 4096)  # which only a has
    a.wait_for({"a": "UpToDate", "b": "Stale"}, "r")
    trio_of.etcd.restore(tmp_path / "backup")
    told = r"etcd has the record 1\.2, and node a has 1\.3"
    until(lambda: "etcd has the record 1.2, and node a has 1.3" in str(a.mirror("r")["problem"]))
    b.daemon.start()
    until(lambda: b.daemon.api("GET", "/v1/nodes")[1]["state"] == "Online")
    with pytest.raises(ApiError, match=told):
        b.ask("promote", "r")
    with pytest.raises(ApiError, match=told):
        a.ask("promote", "r")
    assert any("etcd has gone back from revision" in text for text in a.events())
    # And where only b is left, it knows nothing of that: but a does when it is back, and force is what was said.
    assert "may lose" in a.ask("promote", "r", dry_run=True)["may_lose"]
    a.ask("promote", "r", force=True)
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "r")
    with a.connect("r") as client:
        assert client.read(0, 4096) == b"a" * 4096
    assert any(record["forced"] == "fenced" for record in trio_of.records()) or trio_of.records()


def test_what_is_wrong_with_etcd_is_refused_in_a_sentence_and_leaves_nothing_behind(
    trio_of: Trio, tmp_path: Path
) -> None:
    a, b = trio_of.a, trio_of.b
    trio_of.both_online()
    body = {"name": "x", "size": SIZE, "mirror": [{"node": "b"}], "arbiter": "etcd", **TIMES}
    with paused(trio_of.etcd), pytest.raises(ApiError, match=r"etcd has not answered within 2 s \(http.*silent"):
        a.daemon.api("POST", "/v1/pools/p/volumes", body)
    good = b.daemon.config

    def configure(etcd: str) -> None:
        b.daemon.stop()
        b.daemon.config = good.partition("[etcd]")[0] + etcd
        trio_of.both_online()

    def refusal(wanted: str) -> bool:
        with pytest.raises(ApiError) as refused:
            a.daemon.api("POST", "/v1/pools/p/volumes", body)
        return wanted in refused.value.message

    configure(f'[etcd]\nendpoints = ["{trio_of.etcd.url}"]\nprefix = "other"\n')
    until(lambda: refusal("node b can't have a leg: the etcd that node b asks knows nothing of this mirror"))
    configure(good[good.index("[etcd]") :])
    assert not any(volume["name"] == "p/x" for volume in a.daemon.api("GET", "/v1/pools/p/volumes"))
    trio_of.make("x")
    with pytest.raises(ApiError, match="arbiter is etcd, which is chosen when a volume becomes a mirror"):
        a.daemon.api("POST", "/v1/pools/p/volumes/x/mirror/legs", {"node": "b", "arbiter": "legs"})
    mirror = a.mirror("x")["mirror"]
    key = base64.b64encode(f"terrace/mirrors/{mirror}/membership".encode()).decode()
    value = next(one["value"] for one in trio_of.etcd.stored() if one["key"] == key)
    trio_of.etcd.ask("kv/put", {"key": key, "value": base64.b64encode(b"no record").decode()})
    with a.connect("x") as client:
        client.write(0, b"x" * 4096)  # both legs answer
    with pytest.raises(ApiError, match=r"/membership in etcd has no record of this mirror: .* can't be understood"):
        b.ask("promote", "x")
    trio_of.etcd.ask("kv/put", {"key": key, "value": value})
    a.daemon.api("DELETE", "/v1/pools/p/volumes/x/mirror/legs/b")
    assert not any(record["mirror"] == mirror for record in trio_of.records())
    a.daemon.api("POST", "/v1/pools/p/volumes/x/mirror/legs", {"node": "b", "arbiter": "etcd"})
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "x")
    with paused(trio_of.etcd):
        left = a.daemon.api("DELETE", "/v1/pools/p/volumes/x")["left"]
    assert len(left) == 1 and "etcdctl del --prefix terrace/mirrors/" in left[0]


def test_a_primary_goes_on_over_a_restart_and_an_upgrade(trio_of: Trio) -> None:
    a = trio_of.a
    trio_of.make("u")
    data = os.urandom(MIB)
    with a.connect("u") as client:
        client.write(0, data)
        a.daemon.upgrade()
        assert client.read(0, MIB) == data
    a.daemon.kill()
    a.daemon.start()
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "u")
    with Connection(a.daemon.socket, "p/u") as client:
        assert client.read(0, MIB) == data
