"""Volumes that are being filled, as the API and the commands tell of them. On fake pools."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.nbdclient import Connection
from tests.terrace.fakedaemon import FakeDaemon
from tests.terrace.test_cli import Cli
from tests.terrace.test_snapshots import VOLUMES, refusal, wait_until_unused, write


@pytest.fixture
def cli(daemon: FakeDaemon) -> Cli:
    return Cli(daemon.home)


@pytest.fixture
def volume(daemon: FakeDaemon) -> Iterator[str]:
    """`p/v`, which is being filled, and `p/w`, which is complete."""
    daemon.api("POST", VOLUMES, {"name": "v", "size": "1M", "filling": True})
    daemon.api("POST", VOLUMES, {"name": "w", "size": "1M"})
    yield "p/v"
    for found in daemon.api("GET", VOLUMES):
        wait_until_unused(daemon, found["name"])
        daemon.api("DELETE", f"{VOLUMES}/{found['name'][2:]}?snapshots=1")


def test_the_mark_is_set_at_creation_and_later_and_taken_off(daemon: FakeDaemon, volume: str) -> None:
    assert [one["filling"] for one in daemon.api("GET", VOLUMES)] == [True, False]
    for filling in (False, True, True):
        assert daemon.api("PUT", f"{VOLUMES}/v/filling", {"filling": filling})["filling"] is filling
        assert daemon.api("GET", f"{VOLUMES}/v")["filling"] is filling
    assert refusal(daemon, "PUT", f"{VOLUMES}/none/filling", {"filling": True}).errno == "ENOENT"
    for body in ({}, {"filling": "half"}, {"filling": True, "more": 1}):
        assert refusal(daemon, "PUT", f"{VOLUMES}/v/filling", body).errno == "EINVAL"


def test_only_who_fills_a_volume_takes_snapshots_of_it_and_no_group_has_it(daemon: FakeDaemon, volume: str) -> None:
    assert refusal(daemon, "POST", f"{VOLUMES}/v/snapshots", {"name": "s"}).errno == "EBUSY"
    assert refusal(daemon, "POST", "/v1/pools/p/snapshots", {"name": "s", "volumes": ["w", "v"]}).errno == "EBUSY"
    body = {"name": "s", "volumes": ["v"], "by_filler": True}
    assert refusal(daemon, "POST", "/v1/pools/p/snapshots", body).errno == "EINVAL", "only of one volume"
    daemon.api("POST", f"{VOLUMES}/v/snapshots", {"name": "whole", "by_filler": True})
    assert daemon.api("GET", f"{VOLUMES}/v")["filling"] is True
    rollback = f"{VOLUMES}/v/snapshots/whole/rollback"
    assert "without --keep-as" in refusal(daemon, "POST", rollback, {"keep_as": "x"}).message
    done = daemon.api("POST", rollback)
    assert (done["kept_as"], done["volume"]["filling"]) == (None, False)
    assert [one["snapshot"] for one in daemon.api("GET", f"{VOLUMES}/v/snapshots")] == ["whole"]


def test_the_commands_tell_of_it_with_what_to_do_until_it_is_complete(
    daemon: FakeDaemon, cli: Cli, volume: str, tmp_path: Path
) -> None:
    write(daemon, volume, b"x" * 4096)  # which anybody may
    for listed in (cli.ok("volume", "list"), cli.ok("pool", "show", "p")):
        assert "State" in listed and "incomplete" in listed
    shown = cli.ok("volume", "show", "p/v")
    assert "incomplete, and no client is there that fills it: delete it (terrace volume delete p/v)" in shown
    assert "terrace volume complete p/v" in shown
    assert "State" not in cli.ok("volume", "show", "p/w")
    assert "terrace volume show p/v" in cli.error("volume", "export", "p/v", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with Connection(daemon.socket, volume):
        assert "being filled" in cli.ok("volume", "list")
        assert "being filled, so not complete yet" in cli.ok("volume", "show", "p/v")
        said = cli.error("volume", "complete", "p/v", "--yes")
        assert "p/v is in use by 1 client, which may be filling it: wait until that has ended" in said
    wait_until_unused(daemon, volume)
    assert "--yes" in cli.error("volume", "complete", "p/v", status=2)
    assert cli.ok("volume", "complete", "p/v", "--yes") == "Volume p/v is complete.\n"
    assert cli.ok("volume", "complete", "p/v") == "Volume p/v is complete.\n", "once more changes nothing"
    assert "State" not in cli.ok("volume", "list")
    cli.ok("volume", "export", "p/v", str(tmp_path / "out"))


def test_one_that_has_snapshots_is_rolled_back_and_is_complete(daemon: FakeDaemon, cli: Cli, volume: str) -> None:
    daemon.api("POST", f"{VOLUMES}/v/snapshots", {"name": "whole", "by_filler": True})
    shown = cli.ok("volume", "show", "p/v")
    assert "roll it back to one of its snapshots (terrace snapshot list p/v), or delete it" in shown
    assert "--yes" in cli.error("snapshot", "rollback", "p/v@whole", status=2), "nothing keeps what it is now"
    assert "before" not in cli.ok("snapshot", "rollback", "p/v@whole", "--yes")
    assert "State" not in cli.ok("volume", "show", "p/v")


def test_nobody_attaches_it_to_write_to_it(cli: Cli, volume: str) -> None:
    said = cli.error("attach", volume, "--driver", "fuse")
    assert f"{volume} is being filled and not complete, so nobody else should write to it: wait" in said
    assert cli.json("attach", "--list") == []
