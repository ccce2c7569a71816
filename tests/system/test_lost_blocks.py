"""Two real daemons mirror a volume, and a block of it can be read nowhere: all else is mirrored, and what the other leg
had there before isn't thrown away."""

from __future__ import annotations

import random

import pytest

from tests.system.nbdclient import Connection
from tests.system.test_mirror import Node, Pair, until
from tests.system.test_mirror_map import DATA, MIB, pair
from tests.system.test_scrub import flip

__all__ = ["pair"]
pytestmark = pytest.mark.system
LOST = (0, 64 << 10)


def rot(node: Node, block: bytes) -> None:
    """On its device."""
    path = node.daemon.home / "device"
    held = path.read_bytes()
    assert held.count(block) == 1
    flip(path, held.find(block) + 1000)


def explained(node: Node) -> str:
    return str(node.daemon.api("GET", "/v1/pools/p/volumes/v/mirror/explain")["text"])


def told_of_both(node: Node, step: str) -> bool:
    """By one event or two."""
    told = [text for text in node.events() if "can read bytes" in text and step in text]
    return all(any(span in text for text in told) for span in ("0-4095", "65536-69631"))


def test_a_leg_that_comes_back_is_up_to_date_without_what_the_primary_can_read_no_more(pair: Pair) -> None:
    a, b = pair.a, pair.b
    b.daemon.kill()
    new = random.Random(2).randbytes(MIB)
    with a.connect() as client:
        client.write(0, new)
        client.flush()
    until(lambda: a.legs()["b"] != "UpToDate")
    for at in LOST:
        rot(a, new[at : at + 4096])
    b.daemon.start()
    a.wait_for({"a": "UpToDate", "b": "UpToDate"})
    until(lambda: told_of_both(a, "wait for the resync of"))
    until(lambda: any("stays, the state of this leg before its resync" in text for text in b.events()))
    # Who is primary next says so too, before anybody reads there.
    lost = "can read bytes 0-4095, 65536-69631: restore them from a backup, or write them anew"
    a.daemon.cli("volume", "mirror", "demote", "p/v", "--to", "b")
    until(lambda: told_of_both(b, "restore them from a backup"))
    until(lambda: f"But no leg {lost}" in explained(b))
    assert "no leg in sync can read 2 blocks" in b.daemon.cli("volume", "mirror", "show", "p/v").stdout
    b.daemon.cli("volume", "mirror", "demote", "p/v", "--to", "a")
    until(lambda: f"But no leg {lost}" in explained(a))
    repair = a.daemon.cli("volume", "mirror", "verify", "p/v", "--full", "--repair", status=1)
    assert "16384 bytes can't be read, 0 of them are healed" in " ".join(repair.stdout.split())
    # Only b's scrub: on a the blocks are damaged, and there still.
    scrubbed = b.daemon.cli("pool", "scrub", "p", "--wait", status=1).stdout
    assert scrubbed.startswith("Pool p has lost 2 blocks of p/v, which `terrace pool check p` names;"), scrubbed
    checked = b.daemon.cli("pool", "check", "p", "--full", status=1).stdout
    assert "the block is lost: a device had an error, or no leg of a mirror could read it" in checked
    (kept,) = [one["snapshot"] for one in b.daemon.api("GET", "/v1/pools/p/snapshots")]
    with Connection(b.daemon.socket, f"p/v@{kept}") as client:
        assert client.read(0, len(DATA)) == DATA
    b.daemon.cli("snapshot", "hold", "--local", f"p/v@{kept}")  # as the event says
    assert [one["held"] for one in b.daemon.api("GET", "/v1/pools/p/snapshots")] == [True]
    with a.connect() as client:
        assert client.read(4096, LOST[1] - 4096) == new[4096 : LOST[1]]
        for at in LOST:
            with pytest.raises(OSError):
                client.read(at, 4096)
            client.write(at, new[at : at + 4096])
        client.flush()
        assert client.read(0, MIB) == new
    until(lambda: "can read" not in explained(a), 5.0)
    for at in LOST:
        until(lambda at=at: any(f"{at}-{at + 4095}" in text for text in a.events() if "read again" in text), 5.0)  # type: ignore[misc]
    assert "equal." in a.daemon.cli("volume", "mirror", "verify", "p/v", "--full").stdout
    for node in (a, b):
        assert "is sound" in node.daemon.cli("pool", "check", "p", "--full").stdout
