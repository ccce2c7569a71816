"""Two real daemons mirror a volume, and a page of one leg's map is damaged: nothing makes that worse than it is."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.system.daemon import ApiError, Daemon
from tests.system.test_healing import hand_over
from tests.system.test_mirror import Node, Pair, free_port, until
from tests.system.test_scrub import flip
from tests.tiers.test_check import place_of_page
from tiers import Pool

pytestmark = pytest.mark.system
MIB = 1 << 20
DATA = random.Random(1).randbytes(3 * MIB)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    ports = {name: free_port() for name in "ab"}
    nodes = {}
    for name, other in ("ab", "ba"):
        config = (
            f'[node]\nname = "{name}"\nlisten = ["127.0.0.1:{ports[name]}"]\n'
            f'[peers.{other}]\naddress = "127.0.0.1:{ports[other]}"\nplaintext = true\n'
        )
        nodes[name] = Node(name, Daemon(tmp_path / name, config), ports[name])
    pair = Pair(nodes["a"], nodes["b"], tmp_path)
    try:
        for node in nodes.values():
            node.daemon.start()
            make_pool(node)
        pair.both_online()
        pair.create()
        with pair.a.connect() as client:
            client.write(0, DATA)
            for _ in range(4):  # what was written since the last two common flushes is compared when a leg is back
                client.flush()
        yield pair
    finally:
        for node in nodes.values():
            node.daemon.kill()


def make_pool(node: Node) -> None:
    device = {"path": str(node.daemon.home / "device"), "tier": "fast", "size": 96 * MIB}
    node.daemon.api("POST", "/v1/pools", {"name": "p", "devices": [device]})


def damage_leaf(pair: Pair, node: Node, index: int) -> None:
    """Of the map of the leg there; the node is restarted, so that it has no copy of it in memory."""
    assert node.daemon.stop() == 0

    async def find() -> tuple[Path, int]:
        async with Pool.open(node.daemon.home / "pools" / "p") as pool:
            return await place_of_page(pool.volume("v"), 0, index)

    path, at = trio.run(find)
    flip(path, at + 1000)
    node.daemon.start()
    pair.both_online()
    pair.a.wait_for({"a": "UpToDate", "b": "UpToDate"})


@pytest.mark.parametrize("full", [True, False])
def test_a_repair_writes_nothing_below_a_damaged_page_and_names_the_way_to_a_new_leg(pair: Pair, full: bool) -> None:
    a, b = pair.a, pair.b
    damage_leaf(pair, b, 1)
    options = ["--repair", *(["--full"] if full else [])]
    said = a.daemon.cli("volume", "mirror", "verify", "p/v", *options, status=1)
    assert " ".join(said.stderr.split()).removeprefix("Error: ").rstrip(".") == (
        "the map of the leg of p/v on node b is damaged, and nothing is written there: make that leg anew: `terrace "
        "volume mirror remove p/v b`, then `terrace volume mirror add p/v b`"
    )
    assert "map damaged" in said.stdout and "0 of them are healed" in said.stdout
    way_out = "make that leg anew: `terrace volume mirror remove p/v b`"
    until(lambda: any(way_out in text for text in a.events()))
    for verb in ("show", "explain"):
        for node in (a, b):
            assert way_out in " ".join(node.daemon.cli("volume", "mirror", verb, "p/v").stdout.split()), verb
    b.daemon.api("POST", "/v1/pools/p/checkpoint")
    assert b.daemon.api("GET", "/v1/pools/p")["state"] == "online"
    assert a.legs() == {"a": "UpToDate", "b": "UpToDate"}
    a.daemon.cli("volume", "mirror", "remove", "p/v", "b", "--yes")
    a.daemon.cli("volume", "mirror", "add", "p/v", "b")
    a.wait_for({"a": "UpToDate", "b": "UpToDate"})
    assert "equal." in a.daemon.cli("volume", "mirror", "verify", "p/v", "--full").stdout
    hand_over(a, b, "v")
    with b.connect() as client:
        assert client.read(0, len(DATA)) == DATA


def test_a_pool_that_takes_no_writes_is_deleted_with_its_legs_and_these_are_made_anew(pair: Pair) -> None:
    a, b = pair.a, pair.b
    for here, other in ((b, a), (a, b)):
        pair.create("w")
        assert "--force" not in here.daemon.cli("pool", "delete", "p", "--yes", status=1).stderr
        refused = here.daemon.cli("pool", "delete", "p", "--force", "--yes", status=1).stderr
        assert "terrace volume mirror remove" in " ".join(refused.split()), "a pool that works needs no force"
        kill_pool(pair, here)
        refused = " ".join(here.daemon.cli("pool", "delete", "p", "--yes", status=1).stderr.split())
        assert "it takes no writes any more" in refused and "`terrace pool delete p --force`" in refused
        with a.connect() as client:
            client.write(0, DATA[:4096])  # the leg here is out; that of the other mirror may still count as in sync
        asked = here.daemon.cli("pool", "delete", "p", "--force", status=2).stderr
        for volume in ("p/v", "p/w"):
            assert f"{volume}: its leg here goes with the pool; another one is up to date on node {other.name}" in asked
        assert "terrace volume mirror remove" in here.daemon.cli("pool", "delete", "p", "--force", "--yes").stdout
        if here is a:
            for volume in ("v", "w"):
                promote(b, volume)
        (here.daemon.home / "device").unlink()
        make_pool(here)
        for volume in ("v", "w"):
            other.daemon.cli("volume", "mirror", "remove", f"p/{volume}", here.name, "--yes")
            other.daemon.cli("volume", "mirror", "add", f"p/{volume}", here.name)
            other.wait_for({"a": "UpToDate", "b": "UpToDate"}, volume)
        with other.connect() as client:
            assert client.read(0, len(DATA)) == DATA
        if here is b:
            other.daemon.api("DELETE", "/v1/pools/p/volumes/w")


def test_a_pool_that_gives_up_the_page_takes_writes_again_and_its_leg_is_healed(pair: Pair) -> None:
    a, b = pair.a, pair.b
    for here in (b, a):
        kill_pool(pair, here)
        with a.connect() as client:
            client.write(0, DATA[:4096])  # the leg is out, if it wasn't before
        until(lambda here=here: a.legs()[here.name] != "UpToDate")
        said = " ".join(a.daemon.cli("volume", "mirror", "explain", "p/v").stdout.split())
        assert "`terrace pool check p --give-up-map` gives up" in said, said
        assert "mirror remove" not in said and "mirror demote" not in said and "restart" not in said, "one next step"
        said = here.daemon.cli("pool", "check", "p", status=1).stdout
        assert "fails its checksum: `terrace pool check p` tells which others do, and with --give-up-map" in said
        assert "--yes" in here.daemon.cli("pool", "check", "p", "--give-up-map", status=2).stderr
        said = here.daemon.cli("pool", "check", "p", "--give-up-map", "--yes", status=1).stdout
        assert "1 damaged map page(s) were given up, 1 of p/v" in said
        assert "blocks are lost: a device had an error, or no leg of a mirror could read them" in said
        told = "pool p: 1 damaged map page(s) were given up, 1 of p/v, with all that lay below them: "
        assert any(text.startswith(told) for text in here.events())
        a.wait_for({"a": "UpToDate", "b": "UpToDate"})
        assert "is damaged" not in a.daemon.cli("volume", "mirror", "explain", "p/v").stdout
        until(lambda here=here: not here.daemon.api("GET", "/v1/pools/p")["losses"])
        assert "equal." in a.daemon.cli("volume", "mirror", "verify", "p/v", "--full").stdout
        assert "is sound" in here.daemon.cli("pool", "check", "p", "--full").stdout
        with a.connect() as client:
            assert client.read(0, len(DATA)) == DATA


def promote(node: Node, volume: str) -> None:
    """When the primary that is gone has been silent for long enough."""
    deadline_s = time.monotonic() + 15
    while True:
        try:
            node.ask("promote", volume)
            return
        except ApiError as error:
            assert error.errno == "EBUSY" and time.monotonic() < deadline_s, error
            time.sleep(0.2)


def kill_pool(pair: Pair, node: Node) -> None:
    """A client writes below a damaged page of the leg there."""
    damage_leaf(pair, node, 1)
    with pair.a.connect() as client:
        client.write(MIB, DATA[MIB : MIB + 4096])
        client.flush()
    deadline_s = time.monotonic() + 20
    while node.daemon.api("GET", "/v1/pools/p")["state"] != "read-only":
        with contextlib.suppress(ApiError):
            node.daemon.api("POST", "/v1/pools/p/checkpoint")
        assert time.monotonic() < deadline_s, node.daemon.tail()
        time.sleep(0.1)
