"""Devices of a real daemon: emptied and removed, given up when they are gone; and what operators are told."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.daemon import Daemon
from tests.system.nbdclient import Connection

MIB = 1 << 20
CONTENT = random.Random(4).randbytes(24 * MIB)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path / "home")
    yield daemon
    daemon.kill()


@pytest.fixture
def pool(daemon: Daemon, tmp_path: Path) -> Daemon:
    """A pool `p` on three devices with a volume `p/v` of which 24 MiB are written."""
    daemon.start()
    paths = [str(tmp_path / name) for name in ("f1", "f2", "b")]
    daemon.cli("pool", "create", "p", "--fast", f"{paths[0]}=64M", f"{paths[1]}=64M", "--base", f"{paths[2]}=64M")
    assert daemon.cli("volume", "create", "p/v", "32M").returncode == 0
    with Connection(daemon.socket, "p/v") as connection:
        for at in range(0, len(CONTENT), MIB):
            connection.write(at, CONTENT[at : at + MIB])
        connection.flush()
    return daemon


def read_back(daemon: Daemon) -> bytes:
    with Connection(daemon.socket, "p/v") as connection:
        return b"".join(connection.read(at, MIB) for at in range(0, len(CONTENT), MIB))


def test_a_device_is_emptied_and_removed_while_a_client_is_connected(pool: Daemon, tmp_path: Path) -> None:
    with Connection(pool.socket, "p/v") as connection:
        done = pool.cli("pool", "evacuate", "p", str(tmp_path / "f1"), "--wait")
        assert (done.returncode, done.stderr) == (0, "")
        assert "no longer part of pool p" in done.stdout
        assert connection.read(0, MIB) == CONTENT[:MIB]
    shown = json.loads(pool.cli("pool", "show", "p", "-o", "json").stdout)
    assert [Path(device["path"]).name for device in shown["devices"]] == ["f2", "b"]
    assert read_back(pool) == CONTENT
    events = json.loads(pool.cli("events", "-o", "json").stdout)
    assert [event["kind"] for event in events] == ["evacuation", "evacuation"]
    assert pool.stop() == 0
    (tmp_path / "f1").unlink()
    pool.start()
    assert read_back(pool) == CONTENT
    assert pool.cli("pool", "check", "p", "--full").returncode == 0
    assert len(json.loads(pool.cli("events", "-o", "json").stdout)) == 2


def test_a_killed_daemon_goes_on_with_the_evacuation(pool: Daemon, tmp_path: Path) -> None:
    assert pool.cli("pool", "evacuate", "p", str(tmp_path / "f2")).returncode == 0
    pool.kill()
    pool.start()
    deadline_s = time.monotonic() + 60
    while len(json.loads(pool.cli("pool", "show", "p", "-o", "json").stdout)["devices"]) > 2:
        assert time.monotonic() < deadline_s, pool.cli("pool", "evacuate", "p", "--status").stdout
        time.sleep(0.2)
    assert read_back(pool) == CONTENT


def test_a_lost_device_is_given_up_and_what_was_there_is_listed(pool: Daemon, tmp_path: Path) -> None:
    assert pool.stop() == 0
    gone = None
    for name in ("f1", "f2"):  # that without the end of the log
        (tmp_path / name).rename(tmp_path / "elsewhere")
        pool.start()
        shown = json.loads(pool.cli("pool", "show", "p", "-o", "json").stdout)
        assert shown["state"] == "failed" and "--lost" in shown["error"]
        refused = pool.cli("pool", "evacuate", "p", str(tmp_path / name), "--lost", status=2)
        assert refused.returncode == 2 and "--yes" in refused.stderr
        done = pool.cli("pool", "evacuate", "p", str(tmp_path / name), "--lost", "--yes", status=None)
        if done.returncode == 0:
            gone = name
            break
        assert "newest part of the log" in done.stderr and "--truncate-log" in done.stderr
        assert pool.stop() == 0
        (tmp_path / "elsewhere").rename(tmp_path / name)
    assert gone is not None
    assert "given up and forgotten" in done.stdout and "p/v" in done.stdout
    found = json.loads(pool.cli("pool", "evacuate", "p", "--status", "-o", "json").stdout)
    lost = {at for loss in found["losses"] for at in range(loss["offset"], loss["offset"] + loss["length"], 4096)}
    assert lost
    with Connection(pool.socket, "p/v") as connection:
        for at in range(0, len(CONTENT), 4096):
            if at in lost:
                with pytest.raises(OSError):
                    connection.read(at, 4096)
            else:
                assert connection.read(at, 4096) == CONTENT[at : at + 4096]
    checked = pool.cli("pool", "check", "p", "--full", status=1)
    assert checked.returncode == 1 and "lost to a device error" in checked.stdout
    with Connection(pool.socket, "p/v") as connection:
        for at in range(0, len(CONTENT), MIB):
            connection.write(at, CONTENT[at : at + MIB])
        connection.trim(len(CONTENT), 8 * MIB)  # with a page of the map what was never written is lost too
    assert json.loads(pool.cli("pool", "evacuate", "p", "--status", "-o", "json").stdout)["losses"] == []
    assert pool.cli("pool", "check", "p", "--full").returncode == 0
    assert pool.stop() == 0
    (tmp_path / "elsewhere").rename(tmp_path / gone)  # it is back, and nobody touches it
    pool.start()
    assert read_back(pool) == CONTENT
    taken = pool.cli("pool", "grow", "p", "--fast", str(tmp_path / gone), status=1)
    assert taken.returncode == 1 and str(tmp_path / gone) in taken.stderr


def test_what_cannot_be_is_refused(pool: Daemon, tmp_path: Path) -> None:
    for arguments, text in (
        ((str(tmp_path / "nowhere"),), "has no device"),
        ((str(tmp_path / "f1"), "--lost", "--yes"), "without --lost"),
        ((str(tmp_path / "f1"), "--cancel"), "not being evacuated"),
    ):
        refused = pool.cli("pool", "evacuate", "p", *arguments, status=1)
        assert refused.returncode == 1 and text in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
    assert "can't be opened" not in pool.cli("events").stdout, "the refusal is for who asked"
    pool.cli("pool", "evacuate", "p", status=2)
    assert read_back(pool) == CONTENT, "the pool is open again after the refusal of --lost"


def test_over_commitment_is_limited_and_levels_of_use_are_told(daemon: Daemon, tmp_path: Path) -> None:
    daemon.config = "[pool]\novercommit_limit = 2\n[space]\nlevels = [20, 90]\n"
    daemon.start()
    daemon.cli("pool", "create", "p", "--fast", f"{tmp_path / 'f'}=128M")
    refused = daemon.cli("volume", "create", "p/v", "1T", status=1)
    assert refused.returncode == 1 and "overcommit_limit" in refused.stderr and "p/v of 1 TiB" in refused.stderr
    assert daemon.cli("volume", "create", "p/v", "100M").returncode == 0
    refused = daemon.cli("volume", "resize", "p/v", "1T", status=1)
    assert refused.returncode == 1 and "overcommit_limit" in refused.stderr
    with Connection(daemon.socket, "p/v") as connection:
        for at in range(0, 40 * MIB, MIB):
            connection.write(at, CONTENT[at % len(CONTENT) :][:MIB])
    deadline_s = time.monotonic() + 20
    while "above 20 %" not in daemon.cli("events").stdout:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    assert daemon.cli("volume", "delete", "p/v", "--yes").returncode == 0
    while "below 20 % again" not in daemon.cli("events").stdout:
        assert time.monotonic() < deadline_s + 20
        time.sleep(0.2)
