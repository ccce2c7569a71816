"""The policies of a daemon: listed, given to volumes, and read anew while it serves; a bad file changes nothing."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.daemon import ApiError, orphans_come_to_us
from tests.system.nbdclient import Connection
from tests.terrace.fakedaemon import FakeDaemon

MIB = 1 << 20
TWO = '[policy.gold]\niops_limit = 500\nplacement = "fast"\n[policy.cold]\nplacement = "base"\n'


@pytest.fixture
def served(own_daemon: FakeDaemon) -> Iterator[FakeDaemon]:
    """A daemon with two policies, and the pool `p`."""
    own_daemon.config = TWO
    own_daemon.start()
    device = {"path": f"{own_daemon.home}/device", "tier": "fast", "size": 64 * MIB}
    own_daemon.api("POST", "/v1/pools", {"name": "p", "devices": [device]})
    yield own_daemon
    assert own_daemon.alive(), own_daemon.tail()


def rewrite(daemon: FakeDaemon, text: str, head: str = '[nbd]\nlisten = ["127.0.0.1:0"]\n') -> Path:
    file = daemon.home.with_name(daemon.home.name + ".toml")
    file.write_text(head + text)
    return file


def refusal(daemon: FakeDaemon, method: str, path: str, body: Any = None) -> ApiError:
    with pytest.raises(ApiError) as error:
        daemon.api(method, path, body)
    return error.value


def test_policies_are_listed_and_shown_with_what_is_given_and_who_has_them(served: FakeDaemon) -> None:
    served.cli("volume", "create", "p/v", "1M", "--policy", "gold")
    found = {policy["name"]: policy for policy in served.cli_json("policy", "list")}
    assert list(found) == ["cold", "default", "gold"]
    assert (found["gold"]["given"], found["gold"]["volumes"]) == (["placement", "iops_limit"], ["p/v"])
    assert served.cli_json("policy", "show", "gold") == found["gold"]
    assert served.api("GET", "/v1/policies/gold") == found["gold"]
    listed = served.cli("policy", "list").stdout
    assert 'placement = "fast", iops_limit = 500' in listed
    shown = served.cli("policy", "show", "gold").stdout
    (limit,) = [line.split() for line in shown.splitlines() if line.split()[:1] == ["iops_limit"]]
    (idle,) = [line.split() for line in shown.splitlines() if line.split()[:1] == ["demote_idle"]]
    assert (limit, idle) == (["iops_limit", "500"], ["demote_idle", '"10m"', "default"])
    assert "Volumes: p/v" in shown
    error = refusal(served, "GET", "/v1/policies/none")
    assert (error.status, error.errno) == (404, "ENOENT")


def test_a_volume_is_given_a_policy_and_says_which_it_has(served: FakeDaemon) -> None:
    served.cli("volume", "create", "p/v", "1M")
    assert "has the policy default" in served.cli("volume", "policy", "p/v").stdout
    assert served.cli("volume", "policy", "p/v", "gold").stdout == "Volume p/v has the policy gold.\n"
    assert served.cli_json("volume", "show", "p/v")["policy"] == "gold"
    assert "gold" in served.cli("volume", "show", "p/v").stdout
    assert "gold" in served.cli("volume", "list").stdout
    error = served.cli("volume", "policy", "p/v", "glod", status=1).stderr
    assert error.startswith("Error: there is no policy 'glod'")
    error = served.cli("volume", "create", "p/w", "1M", "--policy", "none", status=1).stderr
    assert error.startswith("Error: there is no policy 'none'")
    assert refusal(served, "PUT", "/v1/pools/p/volumes/v/policy", {}).errno == "EINVAL"
    assert refusal(served, "PUT", "/v1/pools/p/volumes/none/policy", {"policy": "gold"}).errno == "ENOENT"
    assert served.cli_json("volume", "policy", "p/v", "default")["policy"] == "default"


def test_policies_are_reloaded_while_a_client_is_served(served: FakeDaemon) -> None:
    served.cli("volume", "create", "p/v", "1M", "--policy", "gold")
    with Connection(served.socket, "p/v") as client:
        file = rewrite(served, TWO.replace("500", "900").replace("cold", "new"))
        done = served.cli_json("policy", "reload")
        assert done == {
            "file": str(file),
            "added": ["new"],
            "changed": ["gold"],
            "removed": ["cold"],
            "needs_restart": [],
        }
        assert served.api("GET", "/v1/policies/gold")["keys"]["iops_limit"] == 900
        client.write(0, b"x" * 4096)
    assert "nothing changed" in served.cli("policy", "reload").stdout
    rewrite(served, TWO, '[nbd]\nlisten = []\n[pool]\nmap_cache = "1M"\n')
    assert served.cli_json("policy", "reload")["needs_restart"] == ["nbd", "pool"]
    assert "[nbd], [pool] takes effect when terraced is restarted" in served.cli("policy", "reload").stdout


def test_a_schedule_is_shown_and_a_reload_that_changes_only_that_says_so(served: FakeDaemon) -> None:
    assert served.api("GET", "/v1/policies/gold")["keys"]["snapshots"] == ""
    rewrite(served, TWO + 'snapshots = "daily=7, hourly=24"\n')
    done = served.cli_json("policy", "reload")
    assert (done["added"], done["changed"], done["removed"]) == ([], ["cold"], [])
    assert 'snapshots = "hourly=24 daily=7"' in served.cli("policy", "list").stdout
    shown = served.cli("policy", "show", "cold").stdout
    assert [line.split() for line in shown.splitlines() if "hourly" in line] == [
        ["snapshots", '"hourly=24', 'daily=7"']
    ]
    rewrite(served, TWO + 'snapshots = "daly=7"\n')
    assert 'policy.cold.snapshots: "daly" is not a kind' in served.cli("policy", "reload", status=1).stderr
    assert served.api("GET", "/v1/policies/cold")["keys"]["snapshots"] == "hourly=24 daily=7"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TWO.replace("500", "-1"), "policy.gold.iops_limit: -1 is not possible"),
        (TWO + "[policy.x]\niops_burst = 1\n", "policy.x.iops_burst: 1 is a burst above no limit"),
        (TWO + "[pol]\n", 'pol: unknown key; did you mean "pool"?'),
        ("[", "is not TOML"),
        (TWO.replace("gold", "other"), "'gold' is used by p/v; give these another with `terrace volume policy`"),
    ],
)
def test_a_bad_file_or_one_without_a_policy_in_use_changes_nothing_and_says_why(
    served: FakeDaemon, text: str, expected: str
) -> None:
    served.cli("volume", "create", "p/v", "1M", "--policy", "gold")
    before = served.api("GET", "/v1/policies")
    rewrite(served, text)
    assert expected in served.cli("policy", "reload", status=1).stderr
    assert served.api("GET", "/v1/policies") == before


def test_a_hangup_has_another_process_read_the_file_and_a_bad_one_only_reaches_the_log(served: FakeDaemon) -> None:
    assert served.process is not None
    before = served.process.pid
    rewrite(served, TWO.replace("500", "x"))
    served.process.send_signal(signal.SIGHUP)
    served.wait_log("is not TOML")
    served.wait_log("not handed over, this terraced goes on")
    assert served.api("GET", "/v1/policies/gold")["keys"]["iops_limit"] == 500
    rewrite(served, TWO.replace("500", "900"))
    with orphans_come_to_us():
        served.process.send_signal(signal.SIGHUP)
        served.wait_log(f"took over from process {before} with 0 clients")
        served.follow(served.api("GET", "/v1/status")["pid"])
    assert served.api("GET", "/v1/policies/gold")["keys"]["iops_limit"] == 900


def test_a_policy_that_went_while_the_daemon_was_down_is_missed_and_may_come_back(served: FakeDaemon) -> None:
    served.cli("volume", "create", "p/v", "1M", "--policy", "gold")
    served.stop()
    served.config = ""
    served.start()
    assert "not defined, so the default holds" in served.cli("volume", "show", "p/v").stdout
    assert served.api("GET", "/v1/pools/p/volumes/v")["policy_missing"] is True
    assert served.api("GET", "/v1/policies/default")["volumes"] == ["p/v"]
    rewrite(served, TWO)
    served.cli("policy", "reload")
    assert served.cli("volume", "policy", "p/v").stdout == "Volume p/v has the policy gold.\n"


def test_a_hangup_before_the_pools_are_open_is_obeyed_afterwards(own_daemon: FakeDaemon) -> None:
    own_daemon.config = TWO
    own_daemon.start()
    device = {"path": f"{own_daemon.home}/device", "tier": "fast", "size": 64 * MIB}
    own_daemon.api("POST", "/v1/pools", {"name": "p", "devices": [device]})
    own_daemon.stop()
    slow = own_daemon.directory("p") / "one-slow-open"
    slow.write_text("0.5")
    process = own_daemon.spawn()
    while slow.exists():
        time.sleep(0.02)
    rewrite(own_daemon, TWO.replace("500", "900"))
    with orphans_come_to_us():
        process.send_signal(signal.SIGHUP)
        own_daemon.wait_log(f"took over from process {process.pid}")
        own_daemon.follow(own_daemon.api("GET", "/v1/status")["pid"])
    assert own_daemon.api("GET", "/v1/policies/gold")["keys"]["iops_limit"] == 900
    assert own_daemon.stop() == 0
