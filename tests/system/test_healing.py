"""Two real daemons mirror a volume; the media of one rot, and it is the other's data that make them whole again."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.system.daemon import ApiError, Daemon
from tests.system.nbdclient import Connection
from tests.system.test_mirror import Node, Pair, free_port
from tests.system.test_scrub import flip

pytestmark = pytest.mark.system
MIB = 1 << 20
BYTES = 6 * MIB


def data_of(volume: str) -> bytes:
    """Other bytes for each, as they are looked for on the media."""
    return random.Random(volume).randbytes(BYTES)


def until(what: Callable[[], Any], pair: Pair, timeout_s: float = 15.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s, pair.a.daemon.tail() + pair.b.daemon.tail()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("healing")
    ports = {name: free_port() for name in "ab"}
    nodes = {}
    for name, other in ("ab", "ba"):
        config = (
            f'[node]\nname = "{name}"\nlisten = ["127.0.0.1:{ports[name]}"]\n'
            f'[peers.{other}]\naddress = "127.0.0.1:{ports[other]}"\nplaintext = true\n'
            '[policy.stream]\nplacement = "base"\nstream_cutoff = "1M"\n'
        )
        nodes[name] = Node(name, Daemon(directory / name, config), ports[name])
    pair = Pair(nodes["a"], nodes["b"], directory)
    try:
        for node in nodes.values():
            node.daemon.start()
            devices = [
                {"path": str(node.daemon.home / name), "tier": tier, "size": 96 * MIB}
                for name, tier in (("fast", "fast"), ("base1", "base"), ("base2", "base"))
            ]
            node.daemon.api("POST", "/v1/pools", {"name": "p", "devices": devices})
        pair.both_online()
        yield pair
    finally:
        for node in nodes.values():
            node.daemon.kill()


def places(node: Node, content: bytes, *offsets: int) -> list[tuple[Path, int]]:
    """Where the node's devices have these blocks."""
    media = {node.daemon.home / name: (node.daemon.home / name).read_bytes() for name in ("fast", "base1", "base2")}
    found = []
    for data in [content[at : at + 4096] for at in offsets]:
        at_all = [(path, held.find(data)) for path, held in media.items() if data in held]
        assert len(at_all) == 1 and media[at_all[0][0]].count(data) == 1, "a block is to be in one place"
        found += at_all
    return found


def scrub(node: Node) -> dict[str, Any]:
    node.daemon.api("POST", "/v1/pools/p/scrub", {"action": "start", "rate": 0})
    deadline_s = time.monotonic() + 20
    while (found := node.daemon.api("GET", "/v1/pools/p/scrub"))["state"] != "finished":
        assert time.monotonic() < deadline_s, found
        time.sleep(0.05)
    return dict(found)


def hand_over(here: Node, there: Node, volume: str) -> None:
    deadline_s = time.monotonic() + 5
    while True:  # the daemon may not know yet that its client has left
        try:
            here.ask("demote", volume, to=there.name)
            break
        except ApiError as error:
            assert error.errno == "EBUSY" and time.monotonic() < deadline_s, error
            time.sleep(0.05)
    there.ask("promote", volume)


def filled(pair: Pair, volume: str) -> bytes:
    """A mirror with data; which."""
    pair.create(volume)
    data = data_of(volume)
    with pair.a.connect(volume) as client:
        client.write(0, data)
        client.flush()
    return data


def test_what_rots_on_either_node_is_had_from_the_other_by_a_scrub_for_snapshots_too(pair: Pair) -> None:
    a, b = pair.a, pair.b
    data = filled(pair, "v")
    a.daemon.api("POST", "/v1/pools/p/snapshots", {"name": "s", "volumes": ["v"]})
    new = os.urandom(4096)
    with a.connect("v") as client:
        client.write(MIB, new)  # the old block is the snapshot's alone
        client.flush()
    for node in (a, b):
        for path, at in places(node, data, 0, 4096, MIB, 3 * MIB):
            flip(path, at + 1000)
            flip(path, at + 3000)
        found = scrub(node)
        assert (found["errors"], found["repaired"], found["damage"]) == (0, 4, []), found
        assert "4 blocks repaired" in node.daemon.cli("pool", "scrub", "p", "--status").stdout
        until(lambda node=node: any("damaged blocks of p/v here were" in text for text in node.events()), pair)  # type: ignore[misc]
        assert node.leg(node.name)["healed_blocks"] == 4
        again = scrub(node)
        assert (again["errors"], again["repaired"]) == (0, 0)
    assert "equal." in a.daemon.cli("volume", "mirror", "verify", "p/v", "--full").stdout
    hand_over(a, b, "v")
    with b.connect("v") as client:
        assert client.read(0, len(data)) == data[:MIB] + new + data[MIB + 4096 :]
    with Connection(b.daemon.socket, "p/v@s") as client:
        assert client.read(0, len(data)) == data


def test_what_a_scrub_finds_while_the_other_node_is_away_is_healed_when_it_is_back(pair: Pair) -> None:
    a, b = pair.a, pair.b
    data = filled(pair, "w")
    rotten = (2 * MIB, 5 * MIB)
    for path, at in places(b, data, *rotten):
        flip(path, at + 1000)
    a.daemon.kill()
    until(lambda: any(one["state"] == "Offline" for one in b.daemon.api("GET", "/v1/nodes")), pair)
    found = scrub(b)
    assert (found["errors"], found["repaired"]) == (2, 0)
    assert sorted((d["volume"], d["offset"]) for d in found["damage"]) == [("p/w", at) for at in rotten]
    a.daemon.start()
    until(lambda: b.daemon.api("GET", "/v1/pools/p/scrub")["repaired"] == 2, pair)
    found = b.daemon.api("GET", "/v1/pools/p/scrub")
    assert (found["errors"], found["damage"], found["last"]["errors"]) == (0, [], 0)
    until(lambda: any("2 blocks of the leg of p/w on node b" in text for text in a.events()), pair)
    assert a.leg("b", "w")["healed_blocks"] == 2
    hand_over(a, b, "w")
    with b.connect("w") as client:
        assert client.read(0, len(data)) == data


def test_what_no_leg_has_is_told_with_its_ranges_and_is_well_when_it_is_written_anew(pair: Pair) -> None:
    a, b = pair.a, pair.b
    data = filled(pair, "x")
    for node in (a, b):
        for path, at in places(node, data, MIB, MIB + 4096):
            flip(path, at + 1000)
    found = scrub(b)
    assert (found["errors"], found["repaired"]) == (2, 0)
    until(lambda: any(f"no leg of p/x can read bytes {MIB}-{MIB + 8191}" in text for text in a.events()), pair)
    with a.connect("x") as client:
        with pytest.raises(OSError):
            client.read(MIB, 4096)
        client.write(MIB, data[MIB : MIB + 8192])
        client.flush()
        assert client.read(0, len(data)) == data
    assert scrub(b)["errors"] == 0


def test_what_is_lost_with_a_device_of_one_node_is_had_from_the_other(pair: Pair) -> None:
    a, b = pair.a, pair.b
    pair.both_online()
    body = {"name": "y", "size": 32 * MIB, "mirror": [{"node": "b"}], "timeout_s": 1.0, "policy": "stream"}
    a.daemon.api("POST", "/v1/pools/p/volumes", body)
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "y")
    content = random.Random(9).randbytes(24 * MIB)
    with a.connect("y") as client:
        for at in range(0, len(content), MIB):
            client.write(at, content[at : at + MIB])
        for _ in range(4):  # what was written since the last two common flushes is compared when the leg is back
            client.flush()
    gone = b.daemon.home / "base1"
    held = gone.read_bytes()
    on_it = [at for at in range(0, len(content), MIB) if content[at : at + 4096] in held]
    assert on_it, "a long stream goes to both base devices at once"
    assert b.daemon.stop() == 0
    gone.unlink()
    b.daemon.start()
    b.daemon.cli("pool", "evacuate", "p", str(gone), "--lost", "--yes")
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "y")
    until(lambda: not b.daemon.api("GET", "/v1/pools/p/evacuate")["losses"], pair)
    until(lambda: any("of the leg of p/y on node b couldn't be read there" in text for text in a.events()), pair)
    hand_over(a, b, "y")
    with b.connect("y") as client:
        assert b"".join(client.read(at, MIB) for at in range(0, len(content), MIB)) == content
    assert b.daemon.cli("pool", "check", "p", "--full").returncode == 0


class Scraped:
    """What a node's metrics are now."""

    def __init__(self, node: Node) -> None:
        transport = httpx.HTTPTransport(uds=str(node.daemon.home / "api.sock"))
        with httpx.Client(transport=transport, base_url="http://terraced") as client:
            answer = client.get("/v1/metrics")
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        families = text_string_to_metric_families(answer.text)
        self.samples = [sample for family in families for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of those that have these labels."""
        found = [s.value for s in self.samples if s.name == f"terrace_{name}" and labels.items() <= s.labels.items()]
        assert found, name
        return float(sum(found))


def test_metrics_tell_what_a_mirror_does_on_its_primary_and_what_each_node_has_of_it(
    pair: Pair, tmp_path: Path
) -> None:
    a, b = pair.a, pair.b
    data = filled(pair, "z")
    with a.connect("z") as client:
        client.read(0, MIB)
    here, there = Scraped(a), Scraped(b)
    assert here("mirror_state", volume="p/z", state="Online") == here("mirror_state", volume="p/z") == 1
    for node in "ab":
        assert here("mirror_leg_state", volume="p/z", node=node, state="UpToDate") == 1
        assert here("mirror_leg_written_bytes_total", volume="p/z", node=node) == len(data)
        assert here("mirror_leg_queued_bytes", volume="p/z", node=node) == 0
        assert here("mirror_leg_exclusions_total", volume="p/z", node=node) == 0
    assert here("mirror_leg_read_bytes_total", volume="p/z", node="a") == MIB
    assert (here("mirror_primary", volume="p/z"), there("mirror_primary", volume="p/z")) == (1, 0)
    assert here("mirror_term", volume="p/z") == there("mirror_term", volume="p/z") >= 1
    assert not any(s.name == "terrace_mirror_state" and s.labels["volume"] == "p/z" for s in there.samples)
    assert here("peer_up", peer="b") == there("peer_up", peer="a") == 1
    assert here("peer_sent_bytes_total", peer="b") > len(data) < there("peer_received_bytes_total", peer="a")
    b.daemon.kill()
    with a.connect("z") as client:
        client.write(0, data[:4096])
    a.wait_for({"a": "UpToDate", "b": "Stale"}, "z")
    until(lambda: Scraped(a)("peer_up", peer="b") == 0, pair)
    here = Scraped(a)
    assert here("mirror_state", volume="p/z", state="Degraded") == 1
    assert here("mirror_leg_state", volume="p/z", node="b", state="Stale") == 1
    assert here("mirror_leg_exclusions_total", volume="p/z", node="b") == 1
    assert here("mirror_longest_wait_seconds", volume="p/z") >= 0.9, "the write waited for the timeout"
    b.daemon.start()
    file = tmp_path / "terrace.prom"
    a.daemon.cli("metrics", "--to", str(file))
    assert "# TYPE terrace_mirror_leg_healed_blocks_total counter" in file.read_text()
    refused = a.daemon.cli("metrics", "--to", str(tmp_path / "nowhere" / "file"), status=1)
    assert "nowhere/file can't be written: No such file or directory" in refused.stderr
