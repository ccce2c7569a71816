"""Two real daemons: snapshots of mirrored volumes, and every command that might change one leg alone."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.system.daemon import ApiError
from tests.system.test_mirror import MIB, SIZE, Node, Pair
from tests.system.test_mirror import pair as pair  # the fixture

pytestmark = pytest.mark.system


def names(node: Node, volume: str) -> list[str]:
    """The snapshots on that node's leg."""
    found = node.daemon.api("GET", f"/v1/pools/p/volumes/{volume}/snapshots")
    return sorted(one["snapshot"] for one in found)


def listed(node: Node, volume: str) -> dict[str, Any]:
    """By name, which legs have what, as that node finds out."""
    found = node.daemon.api("GET", f"/v1/pools/p/volumes/{volume}/snapshots?legs=1")
    return {one["snapshot"]: one["legs"] for one in found}


def until(true: Callable[[], bool], what: Callable[[], object] = lambda: "", timeout_s: float = 15.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline_s, what()
        time.sleep(0.005)


def test_a_group_over_mirrored_and_plain_volumes_is_of_one_instant_on_both_nodes(pair: Pair) -> None:
    a, b = pair.a, pair.b
    pair.create("g")
    pair.create("h")
    a.daemon.api("POST", "/v1/pools/p/volumes", {"name": "plain", "size": SIZE})
    with a.connect("g") as first, a.connect("plain") as second, a.connect("h") as third:
        for number in range(1, 40):
            data = bytes([number]) * 4096
            for client in (first, second, third):  # each comes from the one before
                client.write(0, data)
            if number == 20:
                body = {"name": "s", "volumes": ["g", "plain", "h"]}
                assert len(a.daemon.api("POST", "/v1/pools/p/snapshots", body)) == 3
    for name in ("g", "h"):
        with b.connect(f"{name}@s") as there, a.connect(f"{name}@s") as here:
            assert there.read(0, 4096) == here.read(0, 4096) == bytes([20]) * 4096
    assert listed(b, "g") == {"s": {"on": ["b", "a"], "missing": [], "unknown": []}}
    with pytest.raises(ApiError, match="already"):
        a.daemon.api("POST", "/v1/pools/p/snapshots", {"name": "s", "volumes": ["g", "h"]})
    a.daemon.api("DELETE", "/v1/pools/p/volumes/plain?snapshots=1")
    assert a.daemon.api("DELETE", "/v1/pools/p/volumes/h?snapshots=1")["left"] == []
    assert not any(one["name"] == "p/h" for one in b.daemon.api("GET", "/v1/pools/p/volumes"))


def test_what_a_leg_that_was_away_missed_is_told_and_what_was_deleted_goes_there_too(pair: Pair) -> None:
    a, b = pair.a, pair.b
    pair.create("m")
    for name in ("old", "kept"):
        a.daemon.api("POST", "/v1/pools/p/volumes/m/snapshots", {"name": name})
    b.daemon.kill()
    with a.connect("m") as client:
        client.write(0, b"x" * 4096)
    a.wait_for({"a": "UpToDate", "b": "Stale"}, "m")
    made = a.daemon.api("POST", "/v1/pools/p/volumes/m/snapshots", {"name": "missed"})
    assert list(made["lacking"]) == ["b"]
    (left,) = a.daemon.api("DELETE", "/v1/pools/p/volumes/m/snapshots/old")["left"]
    assert "node b" in left and "when it is back" in left
    assert listed(a, "m")["missed"] == {"on": ["a"], "missing": [], "unknown": ["b"]}
    a.daemon.kill()  # it is remembered over this, too
    a.daemon.start()
    b.daemon.start()
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "m")
    until(lambda: names(b, "m") == ["kept"], lambda: names(b, "m"))
    assert listed(a, "m")["missed"] == {"on": ["a"], "missing": ["b"], "unknown": []}
    shown = {leg["node"]: (leg["snapshots"], leg["lacking_snapshots"]) for leg in a.mirror("m")["legs"]}
    assert shown == {"a": (2, 0), "b": (1, 1)}
    # One that only the other node has can be deleted from here.
    b.daemon.api("POST", "/v1/pools/p/volumes/m/snapshots", {"name": "rescue", "local": True})
    assert listed(a, "m")["rescue"] == {"on": ["b"], "missing": ["a"], "unknown": []}
    a.daemon.cli("snapshot", "delete", "--yes", "p/m@rescue")
    assert names(b, "m") == ["kept"]


def test_a_hold_and_a_name_are_the_same_on_all_legs_and_what_is_held_anywhere_is_deleted_nowhere(pair: Pair) -> None:
    a, b = pair.a, pair.b
    pair.create("k")
    a.daemon.api("POST", "/v1/pools/p/volumes/k/snapshots", {"name": "one"})
    a.daemon.api("PATCH", "/v1/pools/p/volumes/k/snapshots/one", {"name": "two", "held": True})
    path = "/v1/pools/p/volumes/k/snapshots/two"
    assert a.daemon.api("GET", path)["held"] and b.daemon.api("GET", path)["held"]
    a.daemon.api("PATCH", path, {"held": False, "local": True})
    with pytest.raises(ApiError, match="held on node b"):
        a.daemon.api("DELETE", path)
    assert names(a, "k") == names(b, "k") == ["two"]
    a.daemon.api("PATCH", path, {"held": False})
    assert a.daemon.api("DELETE", path)["left"] == []
    assert names(a, "k") == names(b, "k") == []


def test_when_the_source_dies_in_a_resync_the_leg_has_its_last_consistent_state_and_says_how_to_reach_it(
    pair: Pair,
) -> None:
    a, b = pair.a, pair.b
    pair.create("r")

    def interrupted() -> bool:
        """Whether node a was killed while it resynced node b, which takes a good part of a second."""
        with a.connect("r") as client:
            client.write(0, old)
            client.flush()
            b.daemon.kill()
            for number in range(30):
                client.write(number * MIB, os.urandom(MIB))
            client.flush()
        a.wait_for({"a": "UpToDate", "b": "Stale"}, "r")
        told = b.daemon.log.read_text().count("p/r: kept as")
        b.daemon.start()
        until(lambda: b.daemon.log.read_text().count("p/r: kept as") > told)
        a.daemon.kill()
        return b.leg("b", "r")["state"] == "Stale"

    old = os.urandom(4 * MIB)
    for _ in range(5):
        if interrupted():
            break
        a.daemon.start()
        a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "r")
    (kept,) = names(b, "r")
    assert re.fullmatch(r"resync-\d{8}-\d{6}", kept)
    with pytest.raises(ApiError, match=f"terrace volume clone p/r@{kept} p/r-rescued"):
        b.ask("promote", "r", force=True)
    assert kept in b.daemon.api("GET", f"{VOLUME}/r/mirror/explain")["text"]
    with pytest.raises(ApiError, match=f"no state that the volume ever had.*{kept}"):
        b.daemon.api("POST", f"{VOLUME}/r/snapshots", {"name": "x", "local": True})
    b.daemon.api("POST", f"{VOLUME}/r/snapshots/{kept}/clone", {"name": "r-rescued"})
    with b.connect("r-rescued") as client:
        assert client.read(0, 4 * MIB) == old
    a.daemon.start()
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "r")
    until(lambda: names(b, "r") == [], lambda: names(b, "r"))


def test_a_schedule_goes_through_the_mirror_at_its_primary_and_rests_on_the_other_node(pair: Pair) -> None:
    a, b = pair.a, pair.b
    pair.create("d")
    for node in (b, a):
        node.daemon.config += '[policy.often]\nsnapshots = "yearly=1"\n'
        node.daemon.configure()
        node.daemon.api("POST", "/v1/policies/reload")
    b.daemon.api("PUT", "/v1/pools/p/volumes/d/policy", {"policy": "often"})
    time.sleep(2.5)
    assert names(b, "d") == []
    a.daemon.api("PUT", "/v1/pools/p/volumes/d/policy", {"policy": "often"})
    until(lambda: len(names(a, "d")) == 1)
    until(lambda: names(b, "d") == names(a, "d"))


LEG = "node a as its primary"
MIRRORED = "is mirrored and can't be"
VOLUME = "/v1/pools/p/volumes"
T = f"{VOLUME}/t"
S = f"{T}/snapshots"
REQUESTS: list[tuple[str, str, dict[str, Any] | None, str | None, str | None]] = [
    # method, path, body, what the primary refuses it with (None: it does it), what the secondary refuses it with
    ("POST", S, {"name": "{n}"}, None, LEG),
    ("POST", "/v1/pools/p/snapshots", {"name": "{n}g", "volumes": ["t"]}, None, LEG),
    ("PATCH", f"{S}/base{{n}}", {"name": "renamed{n}"}, None, LEG),
    ("PATCH", f"{S}/base", {"held": True}, None, LEG),
    ("PATCH", f"{S}/base", {"held": False}, None, LEG),
    ("DELETE", f"{S}/gone{{n}}", None, None, LEG),
    ("POST", f"{S}/base/rollback", {}, MIRRORED, MIRRORED),
    ("POST", f"{S}/base/rollback", {"force": True, "safety": False}, MIRRORED, MIRRORED),
    ("POST", f"{S}/base/clone", {"name": "clone{n}"}, None, None),
    ("POST", f"{VOLUME}/clone{{n}}/promote", None, None, None),
    ("DELETE", f"{VOLUME}/clone{{n}}", None, None, None),
    ("PATCH", T, {"size": SIZE + MIB}, None, "node a is the primary"),
    ("PATCH", T, {"size": SIZE, "shrink": True}, "in use by", "node a is the primary"),
    ("PUT", f"{T}/policy", {"policy": "default"}, None, None),
    ("PUT", f"{T}/filling", {"filling": False}, None, None),
    ("PUT", f"{T}/filling", {"filling": True}, MIRRORED, MIRRORED),  # what a restore begins with
    ("POST", VOLUME, {"name": "t", "size": MIB, "filling": True}, "already", "already"),  # what an import begins with
    ("DELETE", T, None, "in use by", "delete all of it at its primary"),
    ("DELETE", f"{T}?snapshots=1", None, "in use by", "delete all of it at its primary"),
    ("DELETE", f"{T}/mirror/legs/b", None, "would be lost: only", "run this there"),
    ("DELETE", "/v1/pools/p", None, "", "has legs of mirrors"),
]


def test_no_request_changes_one_leg_alone(pair: Pair) -> None:
    a, b = pair.a, pair.b
    pair.create("t")
    with a.connect("t") as client:
        client.write(0, os.urandom(MIB))
        for name in ("base", "basea", "baseb", "gonea", "goneb"):
            a.daemon.api("POST", S, {"name": name})
        for method, path, body, at_primary, at_secondary in REQUESTS:
            what = f"{method} {path} {body}"
            if "would be lost" in str(at_primary):
                b.daemon.api("POST", S, {"name": "only", "local": True})
            for node, refusal in ((b, at_secondary), (a, at_primary)):
                sent = {
                    key: value.replace("{n}", node.name) if isinstance(value, str) else value
                    for key, value in (body or {}).items()
                }
                try:
                    if path.endswith("/promote"):  # which answers in several lines
                        node.daemon.cli("volume", "promote", f"p/clone{node.name}")
                        continue
                    node.daemon.api(method, path.replace("{n}", node.name), None if body is None else sent)
                    assert refusal is None, (what, node.name)
                except ApiError as error:
                    assert refusal is not None and refusal in error.message, (what, node.name, error)
                    assert "internal error" not in error.message
                assert set(names(b, "t")) - {"only"} == set(names(a, "t")), (what, node.name)
                sizes = [one.daemon.api("GET", T)["size_bytes"] for one in (a, b)]
                assert sizes[0] == sizes[1], (what, node.name)
    assert a.legs("t") == {"a": "UpToDate", "b": "UpToDate"}
    with pytest.raises(ApiError, match="has snapshots"):
        a.daemon.api("DELETE", T)

    def is_deleted() -> bool:
        try:  # the daemon may not know yet that its client has left
            return bool(a.daemon.api("DELETE", f"{T}?snapshots=1")["left"] == [])
        except ApiError as error:
            assert "in use by" in error.message
            return False

    until(is_deleted)
    assert not any(one["name"] == "p/t" for one in b.daemon.api("GET", VOLUME))


def test_a_secondary_can_be_backed_up_from_a_snapshot_and_says_where_a_new_one_is_to_be_taken(pair: Pair) -> None:
    a, b = pair.a, pair.b
    pair.create("v")
    data, directory = os.urandom(MIB), pair.authority.parent / "backups"
    directory.mkdir()
    with a.connect("v") as client:
        client.write(0, data)
    assert LEG in b.daemon.cli("backup", "p/v", "--to", str(directory), status=1).stderr
    a.daemon.api("POST", f"{VOLUME}/v/snapshots", {"name": "one"})
    b.daemon.cli("backup", "p/v@one", "--to", str(directory))
    b.daemon.cli("restore", "p/restored", str(directory))
    with b.connect("restored") as client:
        assert client.read(0, MIB) == data


def test_a_healthy_secondary_says_so_and_names_no_address_that_would_be_refused(pair: Pair) -> None:
    a, b = pair.a, pair.b
    before = len(a.events())
    pair.create("q")
    told = [text for text in a.events()[before:] if "p/q" in text]
    assert not any("Degraded" in text for text in told), told
    status = b.daemon.cli("status").stdout
    assert re.search(r"p/q +Online", status), status
    assert "(another node)" in status and "(handshake)" not in status
    shown = b.daemon.cli("volume", "show", "p/q").stdout
    assert "nbd" not in shown.replace("NBD URI", "") and "node a is the primary" in shown
    assert "0.5" in a.daemon.cli("volume", "create", "p/no", "1G", "--mirror", "b", "--timeout", "-1", status=2).stderr
