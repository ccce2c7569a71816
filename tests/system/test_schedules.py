"""Scheduled snapshots with the real daemon: taken when a volume has the policy, once, and not again after a restart."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.system.daemon import Daemon

pytestmark = pytest.mark.system
YEARLY = '[policy.default]\nsnapshots = "yearly=3"\n[policy.plain]\n'


def taken(daemon: Daemon) -> list[str]:
    return re.findall(r"took yearly-\S+ of (.*)", daemon.log.read_text())


def until_taken(daemon: Daemon, expected: list[str]) -> None:
    deadline_s = time.monotonic() + 20
    while taken(daemon) != expected:
        assert time.monotonic() < deadline_s, daemon.tail()
        time.sleep(0.05)


def test_what_is_due_is_taken_by_itself_and_a_restart_remembers(tmp_path: Path) -> None:
    with Daemon(tmp_path / "home", YEARLY) as daemon:
        daemon.cli("pool", "create", "p", "--fast", f"{tmp_path}/fast=96M")
        daemon.cli("volume", "create", "p/plain", "16M", "--policy", "plain")
        daemon.cli("volume", "create", "p/a", "16M")
        until_taken(daemon, ["a"])
        daemon.stop()
        daemon.start()
        daemon.cli("volume", "create", "p/b", "16M")
        until_taken(daemon, ["a", "b"])
        daemon.cli("volume", "policy", "p/plain", "default")
        until_taken(daemon, ["a", "b", "plain"])
        assert not [event for event in daemon.cli_json("events") if event["kind"] == "snapshot"]
