"""`terrace attach` on this host, by FUSE and a loop device: what the command promises beside the filesystem itself."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from terrace.attach import filesystem, loopdev
from tests.system.daemon import Daemon, environment, program

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    home = tmp_path_factory.mktemp("a") / "home"
    with Daemon(home) as running:
        running.cli("pool", "create", "p", "--fast", f"{home}/fast=512M")
        running.cli("volume", "create", "p/v", "64M")
        running.cli("volume", "create", "p/w", "64M")
        yield running
        for one in running.cli_json("attach", "--list"):
            running.cli("detach", one["name"], "--unmount", "--force", status=None)


def refused(daemon: Daemon, *arguments: str, status: int = 1) -> str:
    """The one line that the command says."""
    done = daemon.cli(*arguments, status=status)
    assert done.stdout == "" and done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    return done.stderr


def test_attaching_again_tells_the_same_device_and_two_at_once_make_one(daemon: Daemon) -> None:
    said: list[str] = []
    threads = [threading.Thread(target=lambda: said.append(daemon.cli("attach", "p/v").stdout)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 3 and len(set(said)) == 1
    device = said[0].strip()
    assert re.fullmatch(r"/dev/(loop|nbd)\d+", device)
    (listed,) = daemon.cli_json("attach", "--list")
    assert (listed["name"], listed["device"], listed["size_bytes"]) == ("p/v", device, 64 << 20)
    assert "is attached as" in refused(daemon, "volume", "delete", "p/v", "--yes")
    assert "can't be shrunk" in refused(daemon, "volume", "resize", "p/v", "1M", "--shrink")
    daemon.cli("volume", "resize", "p/v", "65M")
    assert filesystem.size_bytes_of(device) == 65 << 20  # as soon as the command has ended
    assert daemon.cli("detach", device).stdout == "p/v is detached.\n"


def test_what_fails_after_the_device_was_made_leaves_nothing_attached(daemon: Daemon, tmp_path: Path) -> None:
    assert "carries no filesystem: --mkfs ext4" in refused(daemon, "attach", "p/w", "--mount", str(tmp_path))
    assert daemon.cli_json("attach", "--list") == []
    assert "make it first (mkdir -p /none)" in refused(daemon, "attach", "p/w", "--mkfs", "ext4", "--mount", "/none")
    # But what was attached before stays.
    device = daemon.cli("attach", "p/w").stdout.strip()
    assert f"{device} carries ext4: leave out --mkfs" in refused(daemon, "attach", "p/w", "--mkfs", "xfs")
    assert [one["device"] for one in daemon.cli_json("attach", "--list")] == [device]
    daemon.cli("detach", "p/w")


def test_a_mounted_device_is_detached_only_with_unmount(daemon: Daemon, tmp_path: Path) -> None:
    daemon.cli("attach", "p/w", "--mkfs", "ext4", "--force", "--mount", str(tmp_path))
    (tmp_path / "file").write_text("kept")
    assert f"is mounted at {tmp_path}: unmount it first, or say --unmount" in refused(daemon, "detach", "p/w")
    assert daemon.cli_json("detach", "p/w", "--unmount")["unmounted"] == [str(tmp_path)]
    daemon.cli("snapshot", "create", "p/w@s")
    daemon.cli("attach", "p/w@s", "--mount", str(tmp_path))
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(OSError, match="Read-only file system"):
        (tmp_path / "other").touch()
    daemon.cli("detach", "p/w@s", "--unmount")


def test_a_keeper_in_the_foreground_detaches_when_it_is_told_to_stop(daemon: Daemon) -> None:
    command = [*program("terrace", "terrace.cli"), "--home", str(daemon.home), "attach", "p/v", "--foreground"]
    notices = daemon.home / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(notices))
        systemd.settimeout(20)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment() | {"NOTIFY_SOCKET": str(notices)}
        ) as keeper:
            assert keeper.stdout is not None
            assert systemd.recv(100) == b"READY=1"
            device = keeper.stdout.readline().strip()
            assert daemon.cli("attach", "p/v").stdout.strip() == device
            keeper.send_signal(signal.SIGINT)
            assert systemd.recv(100) == b"STOPPING=1"
            assert keeper.wait(20) == 0
    assert loopdev.backing_of(device) is None
    assert daemon.cli_json("attach", "--list") == []


def test_a_killed_keeper_is_shown_and_its_device_made_anew(daemon: Daemon) -> None:
    keeper = daemon.cli_json("attach", "p/v")["keeper"]
    os.kill(keeper, signal.SIGKILL)
    deadline_s = time.monotonic() + 10
    while daemon.cli_json("attach", "--list")[0]["keeper"] is not None:
        assert time.monotonic() < deadline_s
    assert "gone: attach again" in daemon.cli("attach", "--list").stdout
    assert daemon.cli_json("attach", "p/v")["keeper"] not in (None, keeper)
    daemon.cli("detach", "p/v")
