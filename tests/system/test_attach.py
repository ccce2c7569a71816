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
from tests.terrace.test_cli import Cli

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


@pytest.fixture(scope="module")
def cli(daemon: Daemon) -> Cli:
    """In this process, which spares the start of a Python; the keepers are processes of their own all the same."""
    return Cli(daemon.home)


def test_attaching_again_tells_the_same_device_and_two_at_once_make_one(daemon: Daemon, cli: Cli) -> None:
    said: list[str] = []
    threads = [threading.Thread(target=lambda: said.append(daemon.cli("attach", "p/v").stdout)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 3 and len(set(said)) == 1
    device = said[0].strip()
    assert re.fullmatch(r"/dev/(loop|nbd)\d+", device)
    (listed,) = cli.json("attach", "--list")
    assert (listed["name"], listed["device"], listed["size_bytes"]) == ("p/v", device, 64 << 20)
    assert "can be written: terrace detach p/v first" in cli.error("attach", "p/v", "--read-only")
    other = "nbd" if listed["driver"] == "fuse" else "fuse"
    assert f"by the driver {listed['driver']}: terrace detach" in cli.error("attach", "p/v", "--driver", other)
    assert "is attached as" in cli.error("volume", "delete", "p/v", "--yes")
    assert "can't be shrunk" in cli.error("volume", "resize", "p/v", "1M", "--shrink")
    cli.ok("volume", "resize", "p/v", "65M")
    assert filesystem.size_bytes_of(device) == 65 << 20  # as soon as the command has ended
    assert cli.ok("detach", device) == "p/v is detached.\n"


def test_what_fails_after_the_device_was_made_leaves_nothing_attached(cli: Cli, tmp_path: Path) -> None:
    assert "carries no filesystem: --mkfs ext4" in cli.error("attach", "p/w", "--mount", str(tmp_path))
    assert cli.json("attach", "--list") == []
    assert "make it first (mkdir -p /none)" in cli.error("attach", "p/w", "--mkfs", "ext4", "--mount", "/none")
    # But what was attached before stays.
    device = cli.ok("attach", "p/w").strip()
    assert f"{device} carries ext4: leave out --mkfs" in cli.error("attach", "p/w", "--mkfs", "xfs")
    assert [one["device"] for one in cli.json("attach", "--list")] == [device]
    cli.ok("detach", "p/w")


def test_a_mounted_device_is_detached_only_with_unmount(cli: Cli, tmp_path: Path) -> None:
    cli.ok("attach", "p/w", "--mkfs", "ext4", "--force", "--mount", str(tmp_path))
    (tmp_path / "file").write_text("kept")
    assert f"is mounted at {tmp_path}: unmount it first, or say --unmount" in cli.error("detach", "p/w")
    assert cli.json("detach", "p/w", "--unmount")["unmounted"] == [str(tmp_path)]
    cli.ok("snapshot", "create", "p/w@s")
    cli.ok("attach", "p/w@s", "--mount", str(tmp_path))
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(OSError, match="Read-only file system"):
        (tmp_path / "other").touch()
    cli.ok("detach", "p/w@s", "--unmount")


def test_a_keeper_in_the_foreground_detaches_when_it_is_told_to_stop(daemon: Daemon, cli: Cli) -> None:
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
    assert not (loopdev.backing_of(device) or "").startswith(str(daemon.home))  # others may have the number by now
    assert cli.json("attach", "--list") == []


def kill_keeper(cli: Cli, keeper: int) -> None:
    """Of the only attachment there is; returns when it is seen to be gone."""
    os.kill(keeper, signal.SIGKILL)
    deadline_s = time.monotonic() + 10
    while cli.json("attach", "--list")[0]["keeper"] is not None:
        assert time.monotonic() < deadline_s


def test_a_killed_keeper_is_shown_and_its_device_made_anew(daemon: Daemon, cli: Cli) -> None:
    keeper = cli.json("attach", "p/v")["keeper"]
    kill_keeper(cli, keeper)
    assert "gone: attach again" in cli.ok("attach", "--list")
    assert cli.json("attach", "p/v")["keeper"] not in (None, keeper)
    cli.ok("detach", "p/v")


def test_a_device_that_is_mounted_and_lost_its_keeper_is_refused_at_once_and_says_how_to_go_on(
    cli: Cli, tmp_path: Path
) -> None:
    attached = cli.json("attach", "p/w", "--driver", "fuse", "--mkfs", "ext4", "--force", "--mount", str(tmp_path))
    kill_keeper(cli, attached["keeper"])
    started_s = time.monotonic()
    said = cli.error("attach", "p/w", "--driver", "fuse")
    assert f"still mounted at {tmp_path}: terrace detach p/w --unmount first" in said
    assert time.monotonic() - started_s < 20
    cli.ok("detach", "p/w", "--unmount")
    cli.ok("attach", "p/w")
    cli.ok("detach", "p/w")


@pytest.mark.alone
def test_a_device_that_has_taken_the_number_of_an_attached_one_is_left_alone(cli: Cli, tmp_path: Path) -> None:
    other, where = tmp_path / "other", tmp_path / "mnt"
    where.mkdir()
    with other.open("wb") as file:
        file.truncate(64 << 20)
    attached = cli.json("attach", "p/w", "--driver", "fuse")
    device = attached["device"]
    paths = environment() | {"PATH": f"{environment()['PATH']}:/usr/sbin:/sbin"}
    subprocess.run(["losetup", "-d", device], check=True, env=paths)
    subprocess.run(["losetup", device, str(other)], check=True, env=paths)
    try:
        filesystem.make(device, "ext4", force=False)
        filesystem.mount(device, where, read_only=False)
        said = cli.error("attach", "p/w", "--mkfs", "ext4", "--force")
        assert f"{device} is not the device of p/w any more" in said
        assert [(one["size_bytes"], one["mounts"]) for one in cli.json("attach", "--list")] == [(0, [])]
        assert "no device that terrace attached" in cli.error("detach", device)
        assert cli.json("detach", "p/w", "--unmount")["unmounted"] == []
        assert filesystem.users_of(device).mounts == [str(where)]
        assert loopdev.backing_of(device) == str(other)
        assert cli.json("attach", "--list") == []
    finally:
        filesystem.unmount_all(device)
        loopdev.clear(device, inside=tmp_path)
