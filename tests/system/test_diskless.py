"""Three real daemons with certificates: two have a copy of a volume, the third has no pool, and serves it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from terrace.certificates import make_authority, make_node
from tests.system.daemon import ApiError, Daemon
from tests.system.mount import Mount, opened
from tests.system.nbdclient import WRITE, Connection, Refused
from tests.system.test_mirror import MIB, Node, free_port
from tests.terrace.test_cli import Cli

pytestmark = pytest.mark.system
SIZE = 32 * MIB
TIMEOUT_S = 1.0


@dataclass
class Three:
    """`a` and `b` have a pool p; `c` has none."""

    a: Node
    b: Node
    c: Node

    def all(self) -> tuple[Node, Node, Node]:
        return self.a, self.b, self.c

    def online(self) -> None:
        """All are started, and know each other."""
        for node in self.all():
            if not node.daemon.alive():
                node.daemon.start()
        for node in self.all():
            until(lambda node=node: all(one["state"] == "Online" for one in node.daemon.api("GET", "/v1/nodes")))  # type: ignore[misc]

    def serve(self, volume: str) -> None:
        """A mirror with legs on a and b, of which c is the primary."""
        self.online()
        body = {"name": volume, "size": SIZE, "mirror": [{"node": "b"}], "timeout_s": TIMEOUT_S}
        self.a.daemon.api("POST", "/v1/pools/p/volumes", body)
        self.a.wait_for({"a": "UpToDate", "b": "UpToDate"}, volume)
        self.a.ask("demote", volume)
        promote(self.c, volume)


def until(true: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline_s, "it didn't come true"
        time.sleep(0.05)


def promote(node: Node, volume: str) -> None:
    node.ask("promote", volume, **{"from": "a"})
    node.wait_for({"a": "UpToDate", "b": "UpToDate"}, volume)


def test_the_node_of_a_tie_breaker_says_of_which_mirror_it_is_one_and_where_to_ask(three: Three) -> None:
    three.online()
    a, b, c = three.all()
    body = {"name": "t", "size": SIZE, "mirror": [{"node": "b"}], "timeout_s": TIMEOUT_S}
    a.daemon.api("POST", "/v1/pools/p/volumes", body)
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "t")
    a.daemon.cli("volume", "mirror", "add", "p/t", "c", "--voter")
    listed = " ".join(c.daemon.cli("volume", "mirror", "list").stdout.split())
    assert "This node is a tie-breaker of the mirror of p/t on node a, p/t on node b:" in listed
    for command in ("show", "explain"):
        said = " ".join(c.daemon.cli("volume", "mirror", command, "p/t", status=1).stderr.split())
        assert "node c has no leg of p/t: it is a tie-breaker of that mirror, which has legs on node a, b;" in said
        assert "`terrace volume mirror show p/t` on node a tells more" in said
    assert "tie-breaker" not in c.daemon.cli("volume", "mirror", "show", "p/none", status=1).stderr
    assert b.daemon.api("GET", "/v1/tiebreakers") == []
    a.daemon.api("DELETE", "/v1/pools/p/volumes/t")
    assert "tie-breaker" not in c.daemon.cli("volume", "mirror", "list").stdout


def unused(action: Callable[[], Any]) -> Any:
    """The daemon may not know yet that its client has left."""
    deadline_s = time.monotonic() + 5
    while True:
        try:
            return action()
        except ApiError as error:
            assert error.errno == "EBUSY" and "in use" in error.message and time.monotonic() < deadline_s, error
            time.sleep(0.05)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Three]:
    directory = tmp_path_factory.mktemp("diskless")
    authority = directory / "authority"
    make_authority(authority, "test", 30)
    ports = {name: free_port() for name in "abc"}
    nodes = {}
    for name in "abc":
        made = make_node(authority, name, [], 30, here=False)
        home = directory / name
        (home / "tls").mkdir(parents=True, mode=0o700)
        for file in made.iterdir():
            file.rename(home / "tls" / file.name)
        config = f'[nbd.tls]\nmode = "allowed"\n[node]\nname = "{name}"\nlisten = ["127.0.0.1:{ports[name]}"]\n'
        for other in sorted(set("abc") - {name}):
            config += f'[peers.{other}]\naddress = "127.0.0.1:{ports[other]}"\n'
        nodes[name] = Node(name, Daemon(home, config), ports[name])
    found = Three(nodes["a"], nodes["b"], nodes["c"])
    try:
        for node in found.all():
            node.daemon.start()
        for node in (found.a, found.b):
            device = {"path": str(node.daemon.home / "device"), "tier": "fast", "size": 256 * MIB}
            node.daemon.api("POST", "/v1/pools", {"name": "p", "devices": [device]})
        found.online()
        yield found
    finally:
        for node in found.all():
            node.daemon.kill()


def kept(node: Node) -> list[Path]:
    """What the home says of mirrors that have no leg there."""
    return sorted((node.daemon.home / "mirrors").glob("*.json"))


def test_a_node_without_a_pool_serves_a_mirror_and_what_is_written_there_is_on_both_legs(three: Three) -> None:
    a, b, c = three.all()
    three.serve("v")
    assert (c.mirror()["role"], c.mirror()["diskless"], a.mirror()["primary"]) == ("primary", True, "c")
    data = os.urandom(MIB)
    with c.connect() as client:
        client.write(0, data)
        client.write(5 * MIB + 100, data[:1000])  # a part of a block
        client.trim(0, 64 << 10)
        client.flush()
        assert client.read(0, MIB) == bytes(64 << 10) + data[64 << 10 :]
        assert client.read(5 * MIB, 4096) == bytes(100) + data[:1000] + bytes(2996)
        assert "p/v@s on node" in c.daemon.cli("snapshot", "create", "p/v@s").stdout
        client.write(2 * MIB, data[:4096])
    for node in (a, b):
        with node.connect("v@s") as snapshot:
            assert snapshot.read(64 << 10, 4096) == data[64 << 10 : (64 << 10) + 4096]
            assert snapshot.read(2 * MIB, 4096) == bytes(4096)
        with pytest.raises(Refused, match="primary is node c"):
            node.connect()
    assert "equal" in c.daemon.cli("volume", "mirror", "verify", "p/v", "--full").stdout

    # Everything that shows volumes speaks of it.
    assert "c (primary)" in c.daemon.cli("volume", "mirror", "list").stdout
    assert "p/v" in c.daemon.cli("volume", "list").stdout
    assert c.daemon.api("GET", "/v1/status")["mirrors"][0]["role"] == "primary"
    explained = c.daemon.api("GET", "/v1/pools/p/volumes/v/mirror/explain")
    assert explained["state"] == "Online" and "serves it without a leg of its own" in explained["text"]
    shown = c.daemon.api("GET", "/v1/pools/p/volumes/v")
    assert (shown["name"], shown["snapshots"]) == ("p/v", 1) and shown["mapped_bytes"] >= MIB - (64 << 10)
    (one,) = c.daemon.api("GET", "/v1/pools/p/volumes/v/snapshots")
    assert one["name"] == "p/v@s" and one["on"]["node"] in ("a", "b")
    listed = subprocess.run(["nbdinfo", "--list", "--json", c.daemon.uri("")], capture_output=True, check=True)
    assert [one["export-name"] for one in json.loads(listed.stdout)["exports"]] == ["p/v"]
    copied = c.daemon.home.with_name("copy")
    subprocess.run(["nbdcopy", c.daemon.uri("p/v"), str(copied)], check=True)
    assert copied.read_bytes()[2 * MIB : 2 * MIB + 4096] == data[:4096]

    # It grows, and is given up in favour of a node with a leg, and then of this one again.
    assert c.daemon.api("PATCH", "/v1/pools/p/volumes/v", {"size": "40M"})["size_bytes"] == 40 * MIB
    assert unused(lambda: c.daemon.api("POST", "/v1/nodes/c/drain", {"dry_run": True}))["demote"] == ["p/v"]
    unused(lambda: c.ask("demote", to="b"))
    assert kept(c) == [] and c.daemon.api("GET", "/v1/mirrors") == []
    with b.connect() as client:
        assert client.read(2 * MIB, 4096) == data[:4096]
    unused(lambda: b.ask("demote", to="c"))
    with c.connect() as client:
        assert client.read(64 << 10, 4096) == data[64 << 10 : (64 << 10) + 4096]
        assert client.size_bytes == 40 * MIB


def test_a_primary_without_a_leg_goes_on_after_an_upgrade_and_a_restart_and_says_what_it_cant_understand(
    three: Three,
) -> None:
    c = three.c
    three.serve("w")
    data = os.urandom(MIB)
    terms = [c.mirror("w")["term"]]
    with c.connect("w") as client:
        client.write(0, data)
        c.daemon.upgrade()
        client.write(MIB, data)
        client.flush()
        terms.append(c.mirror("w")["term"])
    written = {
        "0" * 32: b'{"version": 99}',
        "1" * 32: b"\xff not json",
        "2" * 32: b'{"version": 1, "name": "../x", "since": 0, "membership": {}}',
        "3" * 32: b'{"version": 1}',
    }
    files = {c.daemon.home / "mirrors" / f"{name}.json": text for name, text in written.items()}
    try:
        for file, text in files.items():
            file.write_bytes(text)
        c.daemon.stop()
        c.daemon.start()
        told = c.events()
        for file, why in zip(files, ("has version 99", "understood", "can't be used", "understood"), strict=True):
            assert any(file.stem in line and why in line for line in told), (file, told)
        assert all(file.read_bytes() == text for file, text in files.items())
    finally:
        for file in files:
            file.unlink()
    c.wait_for({"a": "UpToDate", "b": "UpToDate"}, "w")
    with c.connect("w") as client:
        assert client.read(0, 2 * MIB) == 2 * data
    terms.append(c.mirror("w")["term"])
    assert terms == sorted(set(terms)), terms


def test_a_primary_without_a_leg_that_was_killed_together_with_one_leg_goes_on_with_the_other(three: Three) -> None:
    a, _, c = three.all()
    three.serve("o")
    with c.connect("o") as client:
        client.write(0, b"o" * 4096)
    c.daemon.kill()
    a.daemon.kill()
    c.daemon.start()
    c.wait_for({"a": "Stale", "b": "UpToDate"}, "o")
    with c.connect("o") as client:
        assert client.read(0, 4096) == b"o" * 4096
        client.write(MIB, b"p" * 4096)
    a.daemon.start()
    c.wait_for({"a": "UpToDate", "b": "UpToDate"}, "o")


def test_when_it_is_killed_a_node_with_a_leg_is_promoted_without_force_and_the_old_one_is_deposed(three: Three) -> None:
    _, b, c = three.all()
    three.serve("f")
    data = os.urandom(MIB)
    with c.connect("f") as client:
        client.write(0, data)
        with pytest.raises(ApiError, match="node c is primary and alive"):
            b.ask("promote", "f")
        c.daemon.kill()
    until(lambda: promoted(b, "f"))
    with b.connect("f") as client:
        assert client.read(0, MIB) == data
        client.write(0, b"b" * 4096)
    c.daemon.start()
    until(lambda: "not its primary any more" in str(c.mirror("f")["problem"]))
    with pytest.raises(Refused, match="not its primary any more"):
        c.connect("f")
    with pytest.raises(ApiError, match="node b is primary and alive"):
        c.ask("promote", "f")
    c.ask("forget", "f")
    assert not any("p/f" in file.read_text() for file in kept(c))
    with b.connect("f") as client:
        assert client.read(0, 4096) == b"b" * 4096


def promoted(node: Node, volume: str) -> bool:
    try:
        node.ask("promote", volume)
    except ApiError:  # a lease may run yet
        return False
    return True


def test_a_primary_that_was_deposed_while_it_was_paused_answers_with_errors_and_never_with_old_data(
    three: Three,
) -> None:
    a, b, c = three.all()
    three.serve("d")
    with c.connect("d") as client:
        client.write(0, b"1" * 4096)
        assert c.daemon.process is not None
        c.daemon.process.send_signal(signal.SIGSTOP)
        until(lambda: promoted(b, "d"))
        with b.connect("d") as other:
            other.write(0, b"2" * 4096)
            c.daemon.process.send_signal(signal.SIGCONT)
            with pytest.raises((OSError, EOFError)):
                for _ in range(100):
                    assert client.read(0, 4096) == b"2" * 4096, "old data"
                    time.sleep(0.05)
    until(lambda: "not its primary any more" in str(c.mirror("d")["problem"]))
    assert (a.mirror("d")["primary"], b.mirror("d")["role"]) == ("b", "primary")
    b.ask("demote", "d", to="c")  # and it can be it again
    with c.connect("d") as client:
        assert client.read(0, 4096) == b"2" * 4096


def test_cut_off_from_all_legs_clients_wait_and_lose_nothing(three: Three) -> None:
    a, b, c = three.all()
    three.serve("s")
    with c.connect("s") as client:
        client.write(0, b"1" * 4096)
        processes = [node.daemon.process for node in (a, b)]
        for process in processes:
            assert process is not None
            process.send_signal(signal.SIGSTOP)
        client.send(WRITE, 4096, 4096, b"2" * 4096)
        time.sleep(2.5 * TIMEOUT_S)
        for process in processes:
            assert process is not None
            process.send_signal(signal.SIGCONT)
        assert client.reply().error == 0
        client.flush()
        assert client.read(0, 8192) == b"1" * 4096 + b"2" * 4096
    c.wait_for({"a": "UpToDate", "b": "UpToDate"}, "s")


def test_a_filesystem_on_it_outlives_the_node_that_serves_it(three: Three, tmp_path: Path) -> None:
    """Without a mount: the tests of others, in namespaces of their own, would keep that."""
    b, c = three.b, three.c
    three.serve("m")
    cli = Cli(c.daemon.home)
    data = tmp_path / "data"
    data.write_bytes(os.urandom(4 * MIB))
    try:
        device = cli.ok("attach", "p/m", "--mkfs", "ext4").strip()
        e2fs("debugfs", "-w", "-R", f"write {data} one", device)
        c.daemon.kill()
        c.daemon.start()
        e2fs("debugfs", "-w", "-R", f"write {data} two", device)
        cli.ok("detach", "p/m")
    finally:
        c.daemon.cli("detach", "p/m", "--force", status=None)
    unused(lambda: c.ask("demote", "m", to="b"))
    image = tmp_path / "image"
    subprocess.run(["nbdcopy", b.daemon.uri("p/m"), str(image)], check=True)
    e2fs("e2fsck", "-fn", str(image))
    for name in ("one", "two"):
        e2fs("debugfs", "-R", f"dump {name} {tmp_path / name}", str(image))
        assert (tmp_path / name).read_bytes() == data.read_bytes()


def e2fs(*command: str) -> None:
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_it_is_a_file_below_a_mount_point(three: Three, tmp_path: Path) -> None:
    c = three.c
    three.serve("fuse")
    with Mount(c.daemon.home, tmp_path / "mnt") as mount:
        file = mount.directory / "p/fuse"
        assert file.stat().st_size == SIZE and "fuse" in [one.name for one in file.parent.iterdir()]
        with opened(file) as fd:
            os.pwrite(fd, b"1" * 10000, 5000)
            os.fsync(fd)
            assert os.pread(fd, 10002, 4999) == b"\0" + b"1" * 10000 + b"\0"


def test_legs_come_and_go_and_the_volume_is_deleted_through_it(three: Three) -> None:
    a, b, c = three.all()
    three.serve("l")
    with c.connect("l") as client:
        client.write(0, b"1" * MIB)
        done = c.daemon.api("DELETE", "/v1/pools/p/volumes/l/mirror/legs/b")
        assert done["left"] == [], done
        client.write(MIB, b"2" * MIB)
        assert [leg["node"] for leg in c.mirror("l")["legs"]] == ["a"]
        c.daemon.api("POST", "/v1/pools/p/volumes/l/mirror/legs", {"node": "b"})
        c.wait_for({"a": "UpToDate", "b": "UpToDate"}, "l")
        with pytest.raises(ApiError, match="without a leg"):
            c.daemon.api("POST", "/v1/pools/p/volumes/l/mirror/legs", {"node": "c"})
    assert "equal" in c.daemon.cli("volume", "mirror", "verify", "p/l").stdout
    c.daemon.api("POST", "/v1/pools/p/snapshots", {"name": "one", "volumes": ["l"]})
    with pytest.raises(ApiError, match="on nodes a and b"):
        c.daemon.api("DELETE", "/v1/pools/p/volumes/l/snapshots/one")
    with pytest.raises(ApiError, match="has snapshots"):
        c.daemon.api("DELETE", "/v1/pools/p/volumes/l")
    unused(lambda: c.daemon.api("DELETE", "/v1/pools/p/volumes/l?snapshots=1"))
    for node in (a, b):
        assert not any(one["name"] == "p/l" for one in node.daemon.api("GET", "/v1/pools/p/volumes"))
    assert not any("p/l" in file.read_text() for file in kept(c))


def test_what_is_wrong_is_refused_in_a_sentence_and_leaves_nothing_behind(three: Three) -> None:
    a, b, c = three.all()
    three.online()
    body = {"name": "x", "size": SIZE, "mirror": [{"node": "b"}], "timeout_s": TIMEOUT_S}
    a.daemon.api("POST", "/v1/pools/p/volumes", body)
    a.daemon.api("POST", "/v1/pools/p/volumes", {"name": "plain", "size": SIZE})
    before = kept(c)
    wrong: list[tuple[Node, str, dict[str, Any], str]] = [
        (c, "x", {"from": "z"}, "there is no peer 'z'"),
        (c, "x", {"from": "c"}, "node c is this one"),
        (c, "none", {"from": "a"}, "the pool p has no volume 'none'"),
        (c, "plain", {"from": "a"}, "not mirrored"),
        (c, "x", {"from": "a"}, "node a is primary and alive"),
        (c, "x", {"from": "a", "name": "q/.x"}, "name"),
        (c, "x", {"from": "a", "name": "q"}, "write POOL/VOL"),
        (c, "x", {"name": "q/x"}, "it goes with from"),
        (c, "x", {}, "there is no pool 'p'"),
        (b, "x", {"from": "a"}, "has a leg of that mirror"),
        (a, "x", {"from": "a"}, "node a is this one"),
    ]
    for node, volume, asked, said in wrong:
        with pytest.raises(ApiError, match=said):
            node.ask("promote", volume, **asked)
    assert kept(c) == before
    assert "say --from NODE" in c.daemon.cli("volume", "mirror", "promote", "p/x", "--as", "q/x", status=2).stderr
    with pytest.raises(ApiError, match="there is no peer 'z'"):
        a.ask("demote", "x", to="z")
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "x")  # and it has stayed primary
    assert a.mirror("x")["role"] == "primary"

    a.ask("demote", "x")
    a.daemon.kill()  # one of the two that must be heard
    for force, said in ((False, "only node a can tell"), (True, "there is none")):
        with pytest.raises(ApiError, match=said):
            c.ask("promote", "x", force=force, **{"from": "b"})
    assert kept(c) == before
    three.online()

    c.daemon.cli("volume", "mirror", "promote", "p/x", "--from", "a", "--as", "q/y")
    device = {"path": str(c.daemon.home / "device"), "tier": "fast", "size": 64 * MIB}
    with pytest.raises(ApiError, match="q/y without a leg"):
        c.daemon.api("POST", "/v1/pools", {"name": "q", "devices": [device]})
    with Connection(c.daemon.socket, "q/y") as client:
        client.write(0, b"1" * 4096)
        with pytest.raises(ApiError, match="in use by"):
            c.daemon.api("POST", "/v1/pools/q/volumes/y/mirror/demote", {})
    for method, path in (
        ("PUT", "/v1/pools/q/volumes/y/policy"),
        ("GET", "/v1/pools/q/volumes/y/heat"),
        ("POST", "/v1/pools/q/volumes/y/snapshots/s/clone"),
    ):
        with pytest.raises(ApiError, match="on nodes a and b"):
            c.daemon.api(method, path, {})
    for mirror in c.daemon.api("GET", "/v1/mirrors"):  # what other tests have left
        if mirror["volume"] != "q/y":
            c.ask("forget", mirror["volume"].partition("/")[2], force=True)
    c.daemon.api("POST", "/v1/pools", {"name": "p", "devices": [device]})
    unused(lambda: c.daemon.api("POST", "/v1/pools/q/volumes/y/mirror/demote", {}))
    with pytest.raises(ApiError, match=r"node c has a pool p itself.*--as"):
        c.ask("promote", "x", **{"from": "a"})
    with pytest.raises(
        ApiError, match=r"node c has a pool p itself.*on node c, run `terrace volume mirror promote p/x --from b --as"
    ):
        b.ask("demote", "x", to="c")
    c.daemon.api("DELETE", "/v1/pools/p")
    b.ask("promote", "x")


def test_a_tie_breaker_that_is_added_is_no_event_of_a_mirror_out_of_service_and_a_demotion_is_one_of_its_own(
    three: Three,
) -> None:
    three.online()
    a = three.a
    body = {"name": "ev", "size": SIZE, "mirror": [{"node": "b"}], "timeout_s": TIMEOUT_S}
    a.daemon.api("POST", "/v1/pools/p/volumes", body)
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "ev")
    a.daemon.api("POST", "/v1/pools/p/volumes/ev/mirror/legs", {"node": "c", "voter": True})
    until(lambda: a.mirror("ev")["state"] == "Online" and len(a.mirror("ev")["voters"]) == 3)
    time.sleep(1.0)
    a.ask("demote", "ev")
    told = [text for text in a.events() if "p/ev" in text]
    assert any(text.startswith("mirror p/ev was demoted, and no node serves it now") for text in told), told
    assert not any("Faulted" in text or "Unproven" in text for text in told), told
