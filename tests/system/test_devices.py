"""Devices that change while nobody looks: the pool they belong to fails and names them, and every other pool serves."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system import nbdclient
from tests.system.daemon import Daemon
from tests.system.nbdclient import Connection

pytestmark = pytest.mark.system
MIB = 1 << 20
PATTERN = random.Random(1).randbytes(64 << 10)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a site, right only under `site`'s name: a home with two pools and their devices, stopped cleanly."""
    site = tmp_path_factory.mktemp("devices") / "site"
    with Daemon(site / "home") as daemon:
        devices = ["--fast", f"{site}/hurt-fast=64M", "--base", f"{site}/hurt-base=64M"]
        daemon.cli("pool", "create", "hurt", *devices)
        daemon.cli("pool", "create", "fine", "--fast", f"{site}/fine-fast=64M")
        for name in ("hurt/v", "fine/v"):
            daemon.cli("volume", "create", name, "64M")
            with Connection(daemon.socket, name) as connection:
                connection.write(0, PATTERN)
                connection.flush()
        assert daemon.stop() == 0
    copy = site.with_name("pristine")
    subprocess.run(["cp", "-a", "--sparse=always", site, copy], check=True)
    return copy


@pytest.fixture
def site(pristine: Path) -> Path:
    """The devices `hurt-fast`, `hurt-base` and `fine-fast`, and `home`, for a test to damage."""
    site = pristine.with_name("site")
    shutil.rmtree(site)
    subprocess.run(["cp", "-a", "--sparse=always", pristine, site], check=True)
    return site


@pytest.fixture
def two_pools(site: Path) -> Iterator[Daemon]:
    """Not started: pools `hurt` (a fast and a base device) and `fine`, each with a volume `v` that holds PATTERN."""
    daemon = Daemon(site / "home")
    try:
        yield daemon
    finally:
        daemon.kill()


def assert_hurt_pool_failed(daemon: Daemon, *words: str) -> None:
    """`hurt` is failed and says why, `fine` serves, and the export of the failed pool is refused, not wrong."""
    daemon.start()
    pools = {pool["name"]: pool for pool in daemon.api("GET", "/v1/pools")}
    assert pools["fine"]["state"] == "online"
    assert pools["hurt"]["state"] == "failed"
    for word in words:
        assert word in pools["hurt"]["error"], pools["hurt"]["error"]
    with Connection(daemon.socket, "fine/v") as connection:
        assert connection.read(0, len(PATTERN)) == PATTERN
        connection.write(MIB, PATTERN)
    with pytest.raises(nbdclient.Refused):
        Connection(daemon.socket, "hurt/v")
    shown = daemon.cli("pool", "list")
    assert "failed" in shown.stdout
    assert daemon.alive()


@pytest.mark.parametrize("device", ["hurt-fast", "hurt-base"])
def test_a_missing_device_fails_its_pool_until_it_is_back(two_pools: Daemon, site: Path, device: str) -> None:
    path = site / device
    path.rename(site / "elsewhere")
    assert_hurt_pool_failed(two_pools, str(path))
    (site / "elsewhere").rename(path)
    two_pools.api("POST", "/v1/pools/hurt/open")
    with Connection(two_pools.socket, "hurt/v") as connection:
        assert connection.read(0, len(PATTERN)) == PATTERN


@pytest.mark.parametrize("device", ["hurt-fast", "hurt-base"])
@pytest.mark.parametrize("size_bytes", [0, 100, 4096, 8 * MIB, 64 * MIB - 4096])
def test_a_truncated_device_fails_its_pool(two_pools: Daemon, site: Path, device: str, size_bytes: int) -> None:
    path = site / device
    os.truncate(path, size_bytes)
    assert_hurt_pool_failed(two_pools, str(path))


@pytest.mark.parametrize("device", ["hurt-fast", "hurt-base"])
def test_a_foreign_device_fails_its_pool(two_pools: Daemon, site: Path, device: str) -> None:
    path = site / device
    with path.open("r+b") as file:
        file.write(random.Random(2).randbytes(2 * MIB))
    assert_hurt_pool_failed(two_pools, str(path))


def test_another_pools_device_in_its_place_fails_the_pool(two_pools: Daemon, site: Path) -> None:
    shutil.copy(site / "fine-fast", site / "hurt-fast")
    assert_hurt_pool_failed(two_pools, str(site / "hurt-fast"))


def test_one_device_under_two_names_fails_the_pool(two_pools: Daemon, site: Path) -> None:
    shutil.copy(site / "hurt-fast", site / "hurt-base")
    assert_hurt_pool_failed(two_pools, str(site / "hurt-base"))


def test_a_label_with_one_flipped_bit_in_both_copies_fails_the_pool(two_pools: Daemon, site: Path) -> None:
    path = site / "hurt-fast"
    with path.open("r+b") as file:
        for copy in (0, 4096):
            file.seek(copy + 20)
            byte = file.read(1)[0]
            file.seek(copy + 20)
            file.write(bytes([byte ^ 1]))
    assert_hurt_pool_failed(two_pools, str(path), "checksum")


def test_a_label_with_one_damaged_copy_is_no_trouble(two_pools: Daemon, site: Path) -> None:
    for copy in (0, 4096):
        with (site / "hurt-fast").open("r+b") as file:
            file.seek(copy)
            file.write(bytes(512))
        two_pools.start()
        with Connection(two_pools.socket, "hurt/v") as connection:
            assert connection.read(0, len(PATTERN)) == PATTERN
        assert two_pools.stop() == 0  # a clean stop writes a label again


def test_a_flipped_bit_in_data_is_eio_for_that_block_only(two_pools: Daemon, site: Path) -> None:
    path = site / "hurt-fast"
    content = path.read_bytes()
    at = content.find(PATTERN[8192 : 8192 + 4096])
    assert at > 0, "the block is stored as it is"
    with path.open("r+b") as file:
        file.seek(at + 100)
        file.write(bytes([content[at + 100] ^ 0x10]))
    two_pools.start()
    with Connection(two_pools.socket, "hurt/v") as connection:
        assert connection.read(0, 8192) == PATTERN[:8192]
        assert connection.read(12288, len(PATTERN) - 12288) == PATTERN[12288:]
        with pytest.raises(OSError) as error:
            connection.read(8192, 4096)
        assert error.value.errno == errno.EIO
        connection.write(8192, PATTERN[8192:12288])
        assert connection.read(0, len(PATTERN)) == PATTERN
    assert two_pools.cli("pool", "check", "hurt", "--full").returncode == 0
