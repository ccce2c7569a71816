"""What real daemons tell people of a mirror: each command the same, also where it isn't served."""

from __future__ import annotations

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.system.daemon import ApiError
from tests.system.test_mirror import MIB, SIZE, Node, Pair, until
from tests.system.test_mirror import pair as pair  # the fixture

pytestmark = pytest.mark.system


def told(node: Node, volume: str) -> dict[str, Any]:
    """What a node shows of a mirror, which all its commands have to agree in; with what `explain` says as `text`."""
    shown = node.mirror(volume)
    (listed,) = (one for one in node.daemon.api("GET", "/v1/mirrors") if one["volume"] == shown["volume"])
    (status,) = (one for one in node.daemon.api("GET", "/v1/status")["mirrors"] if one["volume"] == shown["volume"])
    explained = node.daemon.api("GET", f"/v1/pools/p/volumes/{volume}/mirror/explain")
    states = {leg["node"]: leg["state"] for leg in shown["legs"]}
    for other in (listed, status):
        assert states == {leg["node"]: leg["state"] for leg in other["legs"]}
        assert all(other[key] == shown[key] for key in ("state", "primary", "role", "term", "epoch"))
    assert (explained["state"], explained["legs"]) == (shown["state"], states)
    for name in ("a", "b"):
        legs = {leg["volume"]: leg for leg in node.daemon.api("GET", f"/v1/nodes/{name}")["legs"]}
        role = "primary" if name == shown["primary"] else "secondary"
        assert (legs[shown["volume"]]["state"], legs[shown["volume"]]["role"]) == (states[name], role)
    assert f"p/{volume} is {shown['state']}:" in explained["text"]
    return shown | {"text": explained["text"], "states": states}


def of_any_age(sentence: str) -> str:
    return re.sub(r"\b\d+ s ago", "N s ago", sentence)


def test_while_the_primary_can_not_be_asked_all_commands_say_the_same_and_from_when_it_is(pair: Pair) -> None:
    a, b = pair.a, pair.b
    pair.create("k")
    assert told(b, "k")["text"] == told(a, "k")["text"], "as the primary says it, wherever one asks"
    a.daemon.kill()
    until(lambda: b.daemon.api("GET", "/v1/nodes/a")["problem"].startswith(f"127.0.0.1:{a.port}: Connection refused"))
    found = told(b, "k")
    assert (found["state"], found["states"]) == ("Unknown", {"a": "Offline", "b": "Unproven"})
    problem = of_any_age(found["problem"])
    assert problem == (
        f"its primary, node a, can't be asked (127.0.0.1:{a.port}: Connection refused): this is what was known "
        "N s ago, when node b heard it last"
    )
    assert of_any_age(found["text"]).startswith(f"p/k is Unknown: {problem}. Whether b has every acknowledged write")
    b.daemon.kill()
    b.daemon.start()
    until(lambda: "from before terraced was started" in b.mirror("k")["problem"])
    assert "from before terraced was started" in told(b, "k")["problem"]
    a.daemon.start()
    pair.both_online()
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "k")


def test_a_leg_that_was_removed_while_its_node_was_away_says_there_that_it_is_left_over_and_goes_if_asked_again(
    pair: Pair,
) -> None:
    a, b = pair.a, pair.b
    pair.create("o")
    b.daemon.kill()
    done = a.daemon.api("DELETE", "/v1/pools/p/volumes/o/mirror/legs/b?force=1")
    (left,) = done["left"]
    assert left.endswith("on that node: terrace volume delete p/o --force --snapshots")
    a.daemon.kill()
    a.daemon.start()
    again = a.daemon.cli("volume", "mirror", "remove", "p/o", "b", "--yes").stdout
    assert again.startswith("p/o is not mirrored.\nLeft: p/o on node b is still there (")
    assert again.endswith("on that node: terrace volume delete p/o --force --snapshots\n")
    b.daemon.start()
    pair.both_online()
    until(lambda: "left over" in str(b.mirror("o")["problem"]))
    text = b.daemon.api("GET", "/v1/pools/p/volumes/o/mirror/explain")["text"]
    assert text.startswith("p/o is Unknown: node a has none of this mirror any more, so the leg here is left over")
    assert "`terrace volume delete p/o --force` then deletes it here" in text
    assert "left-over leg" in b.daemon.cli("volume", "list", "p").stdout
    gone = {"left": [], "mirrored": False, "voter": False}
    assert a.daemon.api("DELETE", "/v1/pools/p/volumes/o/mirror/legs/b") == gone | {"removed": ["p/o"]}
    assert a.daemon.api("DELETE", "/v1/pools/p/volumes/o/mirror/legs/b") == gone | {"removed": []}
    assert not any(one["name"] == "p/o" for one in b.daemon.api("GET", "/v1/pools/p/volumes"))
    a.daemon.api("DELETE", "/v1/pools/p/volumes/o")


def test_the_losing_side_of_a_split_brain_says_so_first_and_shows_who_is_primary(pair: Pair) -> None:
    a, b = pair.a, pair.b
    pair.create("l")
    a.daemon.kill()
    b.ask("promote", "l", force=True)
    with b.connect("l") as client:
        client.write(0, b"b" * 4096)
    b.daemon.kill()
    a.daemon.start()  # goes on by itself
    a.wait_for({"a": "UpToDate", "b": "Stale"}, "l")
    with a.connect("l") as client:
        client.write(0, b"a" * 4096)
    b.daemon.start()
    pair.both_online()
    until(lambda: "split brain" in str(b.mirror("l")["problem"]))
    until(lambda: "split brain" in str(a.leg("b", "l")["error"]))
    found = told(b, "l")
    assert (found["state"], found["primary"], found["role"]) == ("Degraded", "a", "secondary")
    assert found["states"] == {"a": "UpToDate", "b": "Stale"}
    assert found["text"].startswith(f"p/l is not served here: {found['problem']}. p/l is Degraded: node a is primary")
    assert "a (primary)" in b.daemon.cli("volume", "mirror", "list").stdout
    assert "leg of a" in b.daemon.cli("volume", "list").stdout
    a.daemon.kill()
    until(lambda: b.mirror("l")["state"] == "Unknown")  # the commands of `told` are at different moments
    found = told(b, "l")
    assert (found["primary"], found["states"]) == ("a", {"a": "Offline", "b": "Stale"})
    assert found["text"].startswith("p/l is not served here: split brain: node a has ")
    assert "p/l is Unknown: its primary, node a, can't be asked" in found["text"]
    a.daemon.start()
    pair.both_online()
    a.wait_for({"a": "UpToDate", "b": "Stale"}, "l")
    a.ask("resync", "l", node="b", discard=True)
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "l")
    assert told(b, "l")["text"] == told(a, "l")["text"]


def test_what_a_node_was_refused_with_before_it_followed_another_primary_is_said_no_more(pair: Pair) -> None:
    a, b = pair.a, pair.b
    pair.create("h")
    a.daemon.kill()
    b.ask("promote", "h", force=True)
    a.daemon.start()
    pair.both_online()
    b.wait_for({"a": "UpToDate", "b": "UpToDate"}, "h")
    b.ask("demote", "h")
    until(lambda: a.mirror("h")["primary"] is None)
    found = told(a, "h")
    assert (found["problem"], found["role"]) == (None, "secondary"), found
    assert "p/h:" not in a.daemon.cli("volume", "mirror", "list").stdout

    def promoted() -> bool:
        try:
            a.ask("promote", "h")
        except ApiError as error:
            if error.errno != "EBUSY":  # of its own last try, a few seconds ago
                raise
            return False
        return True

    until(promoted)
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "h")


def test_a_leg_that_is_lost_is_one_event(pair: Pair) -> None:
    a, b = pair.a, pair.b
    pair.create("e", timeout_s=4.0)  # on a busy machine a leg is silent for a second without being lost
    until(lambda: "the leg of p/e on node b is UpToDate" in a.events())
    begun = len(a.events())
    b.daemon.kill()
    a.wait_for({"a": "UpToDate", "b": "Stale"}, "e")
    until(lambda: "mirror p/e is Degraded" in a.events()[begun:])
    told = [text for text in a.events()[begun:] if text.startswith("the leg of p/e on node b is ")]
    assert len(told) == 1, a.events()
    assert told[0].startswith("the leg of p/e on node b is Stale: p/e on b can't be reached since 4 s: ")
    b.daemon.start()
    pair.both_online()
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "e")


def test_writes_that_hang_for_a_silent_leg_are_said_to_wait_for_it_until_it_is_left_out(pair: Pair) -> None:
    a, b = pair.a, pair.b
    pair.create("s", timeout_s=30.0)
    process = b.daemon.process
    assert process is not None
    with a.connect("s") as client, ThreadPoolExecutor(1) as writer:
        process.send_signal(signal.SIGSTOP)
        try:
            written = writer.submit(client.write, 0, b"x" * 4096)
            until(lambda: a.mirror("s")["waiting"] is not None)
            sentence = r"the leg on node b has been silent for \d+ s; it is left out after 30 s"
            assert re.fullmatch(sentence, a.mirror("s")["waiting"])
            assert not written.done() and a.mirror("s")["state"] == "Online"
            for verb, begins in (
                ("show", "Writes wait"),
                ("list", "p/s: writes wait:"),
                ("explain", "Writes wait now:"),
            ):
                name = [] if verb == "list" else ["p/s"]
                said = " ".join(a.daemon.cli("volume", "mirror", verb, *name).stdout.split())
                assert re.search(f"{begins} {sentence}", said), said
        finally:
            process.send_signal(signal.SIGCONT)
        written.result(timeout=20)
    until(lambda: a.mirror("s")["waiting"] is None)
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "s")


def test_a_mirror_that_can_not_grow_on_one_leg_names_it_and_keeps_it(pair: Pair) -> None:
    a, b = pair.a, pair.b
    pair.create("g")
    config = b.daemon.config
    b.daemon.kill()
    until(lambda: a.legs("g")["b"] != "UpToDate")  # else it may be taken for whole before a notices anything
    b.daemon.config = config + "[pool]\novercommit_limit = 1\n"
    b.daemon.start()
    pair.both_online()
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "g")
    refused = a.daemon.cli("volume", "resize", "p/g", "400M", status=1).stderr
    assert refused.startswith(
        "Error: the leg of p/g on node b can't grow: p/g with 368 MiB more would be more than pool p"
    )
    assert refused.endswith("; or go on without that leg: `terrace volume mirror remove p/g b`\n")
    assert a.legs("g") == {"a": "UpToDate", "b": "UpToDate"} and a.mirror("g")["size_bytes"] == SIZE
    for size in ("0", "1025T"):
        refused = a.daemon.cli("volume", "resize", "p/g", size, "--shrink", status=1).stderr
        assert refused.startswith("Error: a volume can't have "), refused
    assert a.legs("g") == {"a": "UpToDate", "b": "UpToDate"} and a.mirror("g")["size_bytes"] == SIZE
    assert "40 MiB" in a.daemon.cli("volume", "resize", "p/g", "40M").stdout
    a.daemon.cli("volume", "mirror", "demote", "p/g", "--to", "b")
    told = [text for text in a.events() if "p/g" in text]
    assert "mirror p/g was demoted, and no node serves it now: node b holds the token" in told
    assert not any("Faulted" in text or "Unproven" in text for text in told), told
    with pytest.raises(ApiError, match="demote p/g --to NODE`, and remove this leg there"):
        b.daemon.api("PATCH", "/v1/pools/p/volumes/g", {"size": 400 << 20})
    b.daemon.kill()
    b.daemon.config = config
    b.daemon.start()
    pair.both_online()
    b.wait_for({"a": "UpToDate", "b": "UpToDate"}, "g")


def test_a_leg_whose_pool_is_full_is_one_event_and_all_commands_say_why_it_is_out(pair: Pair) -> None:
    a, b = pair.a, pair.b
    pair.both_online()
    device = {"path": str(b.daemon.home / "small"), "tier": "fast", "size": 64 * MIB}
    b.daemon.api("POST", "/v1/pools", {"name": "sm", "devices": [device]})
    body = {"name": "f", "size": 128 * MIB, "mirror": [{"node": "b", "pool": "sm"}], "timeout_s": 1.0}
    a.daemon.api("POST", "/v1/pools/p/volumes", body)
    a.wait_for({"a": "UpToDate", "b": "UpToDate"}, "f")
    begun = len(a.events())
    with a.connect("f") as client:
        for at in range(0, 128 * MIB, MIB):
            client.write(at, os.urandom(MIB))
        began = time.monotonic()
        while time.monotonic() - began < 15:
            client.write(0, os.urandom(4096))
            time.sleep(0.05)
    why = "the pool sm is full"
    until(lambda: why in str(a.leg("b", "f")["error"]))
    said = a.daemon.api("GET", "/v1/pools/p/volumes/f/mirror/explain")["text"]
    assert "The leg on node b has been left out for " in said and why in said
    for command in ("list", "show"):
        words = ("volume", "mirror", command, *(["p/f"] if command == "show" else []))
        # Each time that its resync is tried again it is Syncing for a moment.
        until(lambda words=words: why in a.daemon.cli(*words).stdout)  # type: ignore[misc]
    of_the_leg = [text for text in a.events()[begun:] if text.startswith("the leg of p/f on node b is ")]
    if of_the_leg[0].endswith("UpToDate"):
        del of_the_leg[0]  # that it was filled at first, which is told a moment later
    assert len(of_the_leg) == 1 and why in of_the_leg[0]
    a.daemon.api("DELETE", "/v1/pools/p/volumes/f?snapshots=1")


def test_a_removal_says_what_is_so_however_often_it_is_asked_for_and_leaves_no_promise_for_a_mirror_that_has_ended(
    pair: Pair,
) -> None:
    a, b = pair.a, pair.b
    pair.create("r")
    kept = len(list((b.daemon.home / "voters").glob("*.json")))
    refused = a.daemon.cli("volume", "mirror", "remove", "p/r", "qq", status=1).stderr  # no question: nothing is lost
    assert refused.startswith("Error: p/r has no leg on qq, which is no node that this one knows either")
    refused = a.daemon.cli("volume", "mirror", "remove", "p/r", "b", status=2).stderr
    assert "this loses data" in refused and a.legs("r") == {"a": "UpToDate", "b": "UpToDate"}
    refused = a.daemon.cli("volume", "mirror", "promote", "p/none", status=1).stderr
    assert " ".join(refused.split()).endswith("a node without a leg of a mirror is told who has one: --from NODE")
    done = {"left": [], "mirrored": False, "voter": False}
    assert a.daemon.api("DELETE", "/v1/pools/p/volumes/r/mirror/legs/b") == done | {"removed": ["p/r"]}
    assert a.daemon.api("DELETE", "/v1/pools/p/volumes/r/mirror/legs/b") == done | {"removed": []}
    said = a.daemon.cli("volume", "mirror", "remove", "p/r", "b", "--yes").stdout
    assert said == "p/r is not mirrored: nothing was removed.\n"
    assert len(list((b.daemon.home / "voters").glob("*.json"))) == kept
    a.daemon.api("DELETE", "/v1/pools/p/volumes/r")


def test_a_volume_that_is_in_the_way_of_a_leg_is_told_and_leaves_nothing(pair: Pair) -> None:
    a, b = pair.a, pair.b
    pair.both_online()
    b.daemon.cli("volume", "create", "p/z", "32M")  # what is no leg is in the way, and is told as what it is
    body = {"name": "z", "size": SIZE, "mirror": [{"node": "b"}]}
    with pytest.raises(ApiError, match="node b has a volume p/z already: name another pool, or delete or rename that"):
        a.daemon.api("POST", "/v1/pools/p/volumes", body)
    assert not any(one["name"] == "p/z" for one in a.daemon.api("GET", "/v1/pools/p/volumes"))
    b.daemon.api("DELETE", "/v1/pools/p/volumes/z")
    pair.create("z")
    a.daemon.api("DELETE", "/v1/pools/p/volumes/z")
