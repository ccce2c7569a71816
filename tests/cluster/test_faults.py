"""Real nodes under faults: no acknowledged byte lost, no stale read, and everything whole again by itself.

`scripts/soak --nodes` lives many more seeds; `python -m tests.cluster --seed N` replays one.
"""

from __future__ import annotations

import base64
import json
import shutil
import time
from pathlib import Path

import pytest

from tests.cluster.client import Load, regions_of
from tests.cluster.network import Network
from tests.cluster.nodes import CLIENT, TIMEOUT_S, VOLUME, Alone, Mirrored, Nodes
from tests.cluster.oracle import Oracle, Violation
from tests.cluster.schedule import (
    ALL_FAULTS,
    ETCD_FAULTS,
    LINK_FAULTS,
    MOVES,
    NODE_FAULTS,
    SIZE_BYTES,
    Story,
    plan,
    run,
    settle,
)
from tests.etcdserver import EtcdServer

pytestmark = [pytest.mark.system]


def test_a_plan_is_its_seeds_alone_and_has_every_kind_of_fault() -> None:
    assert plan(5, 2, 10.0) == plan(5, 2, 10.0) != plan(6, 2, 10.0)
    kinds = {fault.kind for seed in range(50) for fault in plan(seed, 2, 10.0)}
    assert kinds == {*NODE_FAULTS, *LINK_FAULTS, *MOVES, *ALL_FAULTS}
    assert not {fault.kind for seed in range(50) for fault in plan(seed, 1, 10.0)} & {*MOVES, *ALL_FAULTS}
    kinds = {fault.kind for seed in range(50) for fault in plan(seed, 2, 10.0, etcd=True)}
    assert kinds == {*NODE_FAULTS, *LINK_FAULTS, *MOVES, *ALL_FAULTS, *ETCD_FAULTS}
    assert all(0 < fault.begin_s < 10 and 0.1 <= fault.length_s < 2 for fault in plan(5, 3, 10.0))


def test_one_node_keeps_what_it_acknowledged_whatever_happens(tmp_path: Path) -> None:
    outcome = run(11, "alone", 4.0, tmp_path)
    print("\n".join(outcome.story.lines))
    assert outcome.faults >= 3
    assert outcome.summary.longest_stall_s > 0.2, "no fault was noticed"


def test_a_node_that_comes_back_with_an_older_state_is_found(tmp_path: Path) -> None:
    """That the load and its oracle can fail."""
    (tmp_path / "nodes").mkdir()
    with Network(["a", CLIENT]) as network, Nodes(network, tmp_path / "nodes", Alone()) as nodes:
        nodes.deployment.create(nodes, SIZE_BYTES)
        oracle = Oracle(regions_of(SIZE_BYTES), 1)
        load = Load(network.host(CLIENT), nodes.addresses, VOLUME, oracle, 1)
        load.start()
        time.sleep(0.5)
        nodes["a"].kill()
        shutil.copytree(tmp_path / "nodes", tmp_path / "older", ignore=shutil.ignore_patterns("*.sock"))
        nodes["a"].start()
        time.sleep(1.0)
        load.check()
        nodes["a"].kill()
        shutil.copytree(tmp_path / "older", tmp_path / "nodes", dirs_exist_ok=True)
        nodes["a"].start()
        with pytest.raises(Violation, match=r"write \d+, from before what was|zeros, from before"):
            load.stop()


@pytest.mark.parametrize(("profile", "seed"), [("two", 1), ("three", 2), ("etcd", 1), ("diskless", 1)])
def test_no_fault_costs_an_acknowledged_byte_or_shows_a_stale_one(profile: str, seed: int, tmp_path: Path) -> None:
    outcome = run(seed, profile, 4.0, tmp_path)
    print("\n".join(outcome.story.lines))
    assert outcome.faults >= 2


def test_a_leg_on_a_server_that_knows_nothing_of_mirrors_is_a_copy_in_the_end(tmp_path: Path) -> None:
    outcome = run(1, "server", 2.0, tmp_path)
    print("\n".join(outcome.story.lines))


def test_a_leg_that_is_gone_holds_clients_up_for_its_timeouts_at_most(tmp_path: Path) -> None:
    """Once for its silence, and once while it might still come back."""
    with Network(["a", "b", CLIENT]) as network, Nodes(network, tmp_path, Mirrored()) as nodes:
        nodes.deployment.create(nodes, SIZE_BYTES)
        oracle = Oracle(regions_of(SIZE_BYTES), 1)
        load = Load(network.host(CLIENT), nodes.addresses, VOLUME, oracle, 1)
        load.start()
        time.sleep(0.5)
        faults = {
            "kill": nodes["b"].kill,
            "pause": nodes["b"].pause,
            "cut": lambda: network.cut("a", "b", both=True),
            "cut one way": lambda: network.cut("b", "a"),
        }
        stalls = {}
        story = Story("two", 1, 0)
        for name, begin in faults.items():
            load.longest_stall_s()
            begin()
            time.sleep(3 * TIMEOUT_S)
            stalls[name] = load.longest_stall_s()
            if not nodes["b"].alive():
                nodes["b"].start()
            settle(nodes, load, story)
        load.stop()
    print(stalls)
    assert max(stalls.values()) < 2 * TIMEOUT_S + 0.4, stalls


def in_sync(etcd: EtcdServer) -> list[str]:
    """Legs, by the one record that it has."""
    (value,) = [one["value"] for one in etcd.stored() if base64.b64decode(one["key"]).endswith(b"/membership")]
    return list(json.loads(base64.b64decode(value))["in_sync"])


def test_a_primary_that_only_its_clients_can_reach_stops_and_etcd_lets_the_other_go_on(tmp_path: Path) -> None:
    """Without force, and nobody reads what is old meanwhile: the load would tell."""
    with Network(["a", "b", CLIENT, "e"]) as network, Nodes(network, tmp_path, Mirrored(arbiter="e")) as nodes:
        nodes.deployment.create(nodes, SIZE_BYTES)
        oracle = Oracle(regions_of(SIZE_BYTES), 1)
        load = Load(network.host(CLIENT), nodes.addresses, VOLUME, oracle, 1)
        load.start()
        time.sleep(0.5)
        network.cut("a", "e", both=True)  # so no record is written from here on
        assert nodes.etcd is not None
        while len(in_sync(nodes.etcd)) < 2:  # a slow machine has left one out just before
            network.heal()
            settle(nodes, load, Story("etcd", 1, 0))
            network.cut("a", "e", both=True)
        network.cut("a", "b", both=True)
        took_s = nodes.wait_for("promoted", lambda: nodes.deployment.promote(nodes, "b"), 10)
        before = load.summary.writes

        def goes_on() -> str | None:
            load.check()
            return None if load.summary.writes > before + 200 else "b serves nobody"

        nodes.wait_for("served by b", goes_on, 10)
        settle(nodes, load, Story("etcd", 1, 0))
        load.stop()
        nodes.check_logs()
    print(f"promoted {took_s:.1f} s after the cut")
