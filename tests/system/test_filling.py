"""Imports and restores that die, with the real daemon: what is left says itself that it is not complete."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.daemon import Daemon, environment, program
from tests.system.nbdclient import Connection

pytestmark = pytest.mark.system
MIB = 1 << 20
SIZE = 12 * MIB

CONFIG = """
[policy.slow]
bandwidth_limit = "1M"
snapshots = "hourly=3"
[policy.default]
snapshots = "hourly=3"
"""
"""So slow that a filling is surely under way when it is interrupted."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("filling")
    with Daemon(directory / "home", CONFIG) as daemon:
        daemon.cli("pool", "create", "p", "--fast", f"{directory}/fast={512 * MIB}")
        yield daemon
        assert "is sound" in daemon.cli("pool", "check", "p", "--full").stdout


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


def begun(daemon: Daemon, *arguments: str) -> subprocess.Popen[str]:
    """A command that fills p/v, in a process group of its own; its writes wait for the policy when this returns."""
    process = subprocess.Popen(
        [*program("terrace", "terrace.cli"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | {"TERRACE_HOME": str(daemon.home)},
        start_new_session=True,
    )
    while not any(one["name"] == "p/v" and one["throttled"] for one in daemon.pool("p")["volumes"]):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


def killed(process: subprocess.Popen[str]) -> None:
    """With what it has started: as if its host had died."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_until_unused(daemon: Daemon) -> None:
    # What is under way goes on at once, so that the connection ends.
    daemon.api("PUT", "/v1/pools/p/volumes/v/policy", {"policy": "default"})
    while daemon.api("GET", "/v1/pools/p/volumes/v")["open_count"]:
        time.sleep(0.01)


def is_filling(daemon: Daemon) -> bool:
    return bool(daemon.api("GET", "/v1/pools/p/volumes/v")["filling"])


def test_a_volume_whose_import_is_killed_says_so_and_no_schedule_takes_it_before_it_is_declared_complete(
    daemon: Daemon, image: Path
) -> None:
    process = begun(daemon, "volume", "import", str(image), "p/v", "--format", "raw", "--policy", "slow")
    killed(process)
    wait_until_unused(daemon)
    assert "incomplete" in daemon.cli("volume", "list").stdout
    assert is_filling(daemon) and daemon.api("GET", "/v1/pools/p/snapshots") == []
    daemon.cli("volume", "complete", "p/v", "--yes")
    while not daemon.api("GET", "/v1/pools/p/snapshots"):  # it takes one at once
        time.sleep(0.05)
    daemon.api("DELETE", "/v1/pools/p/volumes/v?snapshots=1")


def test_a_volume_that_was_being_imported_when_the_daemon_died_says_so(daemon: Daemon, image: Path) -> None:
    process = begun(daemon, "volume", "import", str(image), "p/v", "--format", "raw", "--policy", "slow")
    daemon.kill()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "which is marked so, could not be deleted" in said and "terrace volume delete p/v" in said
    daemon.start()
    assert is_filling(daemon)
    daemon.api("DELETE", "/v1/pools/p/volumes/v")


def test_a_restore_that_is_killed_leaves_a_volume_that_says_so_and_takes_no_other(
    daemon: Daemon, image: Path, tmp_path: Path
) -> None:
    full = str(tmp_path / "full")
    daemon.api("POST", "/v1/pools/p/volumes", {"name": "source", "size": SIZE})
    with Connection(daemon.socket, "p/source") as connection:
        connection.write(0, image.read_bytes())
    daemon.api("POST", "/v1/pools/p/volumes/source/snapshots", {"name": "a"})
    daemon.cli("backup", "p/source@a", full)
    killed(begun(daemon, "restore", "p/v", full, "--policy", "slow"))
    wait_until_unused(daemon)
    assert is_filling(daemon)
    assert "delete it and restore again" in daemon.cli("restore", "p/v", full, status=1).stderr
