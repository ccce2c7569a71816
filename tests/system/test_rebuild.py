"""A pool whose catalog is gone comes back from its devices, byte for byte; and what can't be rebuilt is refused.

`REBUILD_SEED=N` repeats a run's choices (the daemon's timing stays its own).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.daemon import Daemon, DaemonError
from tests.system.nbdclient import Connection
from tests.system.verifier import Image, Worker, payload, verify

pytestmark = pytest.mark.system
MIB = 1 << 20
SEED = int(os.environ.get("REBUILD_SEED") or random.SystemRandom().randrange(1 << 32))
PATTERN = random.Random(1).randbytes(256 << 10)
ROUNDS = 6
OTHER_HOST_FROM = 4


def catalog(home: Path, pool: str = "p") -> Path:
    return home / "pools" / pool / "catalog.sqlite"


def lose_catalog(home: Path, pool: str = "p") -> None:
    for path in catalog(home, pool).parent.glob("catalog.sqlite*"):
        path.unlink()


@pytest.mark.long
def test_a_used_pool_is_rebuilt_byte_for_byte_after_sigkill_and_the_loss_of_its_catalog(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    daemon = Daemon(tmp_path / "home", "[pool]\ncheckpoint_interval_s = 0.05\n")
    fast, base = tmp_path / "fast", tmp_path / "base"
    daemon.start()
    daemon.cli("pool", "create", "p", "--fast", f"{fast}={48 * MIB}", "--base", f"{base}={160 * MIB}")
    data = payload(rng)
    images = [Image(f"p/{name}", size, data) for name, size in (("large", 96 * MIB), ("small", 40 * MIB))]
    for image in images:
        daemon.cli("volume", "create", image.name, str(image.size_bytes))
    try:
        for number in range(ROUNDS):
            workers = [
                Worker(image, daemon.socket, rng.choice([1, 4, 16]), random.Random(rng.random()))
                for image in images
                for _ in range(2)
            ]
            for worker in workers:
                worker.start()
            time.sleep(rng.uniform(0.2, 1.0))
            daemon.kill()
            for worker in workers:
                worker.join()
            lose_catalog(daemon.home)
            if number >= OTHER_HOST_FROM:  # the last rounds: on another host, where nothing is but the devices
                daemon = Daemon(tmp_path / f"home{number}", daemon.config)
                for path in (fast, base):
                    path.rename(path.with_suffix(f".{number}"))
                fast, base = (path.with_suffix(f".{number}") for path in (fast, base))
            report = json.loads(
                daemon.cli(
                    "pool", "check", "p", "--full", "--rebuild-catalog", "--device", str(fast), "--device", str(base),
                    "-o", "json",
                ).stdout
            )  # fmt: skip
            assert report["ok"], report["problems"]
            assert report["rebuilt"]["devices"] == [str(fast), str(base)]
            assert report["rebuilt"]["kept_as"] is None
            daemon.start()
            for image in images:
                verify(daemon.socket, image)
            daemon.cli("pool", "check", "p", "--full")
        assert daemon.stop() == 0
    except Exception as error:
        error.add_note(f"round {number} of REBUILD_SEED={SEED}; daemon's log:\n{daemon.tail()}")
        raise
    finally:
        daemon.kill()
    assert sum(image.acknowledged for image in images) > 100 * ROUNDS


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site with pools `p` (two devices) and `q`, stopped cleanly."""
    site = tmp_path_factory.mktemp("rebuild") / "site"
    with Daemon(site / "home") as daemon:
        daemon.cli("pool", "create", "p", "--fast", f"{site}/fast=64M", "--base", f"{site}/base=64M")
        daemon.cli("pool", "create", "q", "--fast", f"{site}/other=64M")
        for name in ("p/v", "q/v"):
            daemon.cli("volume", "create", name, "32M")
            with Connection(daemon.socket, name) as connection:
                connection.write(0, PATTERN)
                connection.flush()
        assert daemon.stop() == 0
    copy = site.with_name("pristine")
    subprocess.run(["cp", "-a", "--sparse=always", site, copy], check=True)
    return copy


@pytest.fixture
def daemon(pristine: Path) -> Iterator[Daemon]:
    """The site as it was, its daemon not started. Its devices lie beside the home."""
    site = pristine.with_name("site")
    shutil.rmtree(site)
    subprocess.run(["cp", "-a", "--sparse=always", pristine, site], check=True)
    daemon = Daemon(site / "home")
    try:
        yield daemon
    finally:
        daemon.kill()


def refused(daemon: Daemon, *arguments: str, pool: str = "p") -> str:
    """The one line with which a rebuild is refused. Nothing in the pool's directory may have changed."""
    directory = catalog(daemon.home, pool).parent
    before = {path.name: path.read_bytes() for path in directory.iterdir()} if directory.exists() else None
    result = daemon.cli("pool", "check", pool, "--rebuild-catalog", *arguments, status=1)
    after = {path.name: path.read_bytes() for path in directory.iterdir()} if directory.exists() else None
    assert after == before
    message = result.stderr.strip()
    assert message and "\n" not in message, message
    assert not result.stdout
    return message


def assert_served(daemon: Daemon, name: str = "p/v") -> None:
    if not daemon.alive():
        daemon.start()
    with Connection(daemon.socket, name) as connection:
        assert connection.read(0, len(PATTERN)) == PATTERN


def test_a_sound_catalog_is_only_replaced_by_force_and_kept(daemon: Daemon) -> None:
    message = refused(daemon)
    assert str(catalog(daemon.home)) in message
    assert "--force" in message
    shown = daemon.cli("pool", "check", "p", "--rebuild-catalog", "--force").stdout
    kept = catalog(daemon.home).with_name("catalog.sqlite.old-1")
    assert f"kept as {kept}" in shown
    assert "is sound" in shown
    assert_served(daemon)
    daemon.kill()
    for stale in catalog(daemon.home).parent.glob("catalog.sqlite-*"):
        stale.unlink()
    shutil.copy(kept, catalog(daemon.home))  # and putting it back is refused: it is older than the devices now
    daemon.start()
    pools = {pool["name"]: pool for pool in daemon.api("GET", "/v1/pools")}
    assert "older than its devices" in pools["p"]["error"]


def test_a_damaged_catalog_is_replaced_and_kept(daemon: Daemon) -> None:
    path = catalog(daemon.home)
    damaged = b"no database" * 1000
    path.write_bytes(damaged)
    daemon.start()
    pools = {pool["name"]: pool for pool in daemon.api("GET", "/v1/pools")}
    assert "--rebuild-catalog" in pools["p"]["error"]
    # While the daemon serves its other pools:
    daemon.cli("pool", "check", "p", "--rebuild-catalog", "--device", str(daemon.home.parent / "fast"))
    assert path.with_name("catalog.sqlite.old-1").read_bytes() == damaged
    daemon.cli("pool", "open", "p")
    assert_served(daemon)
    assert_served(daemon, "q/v")


def test_an_old_catalog_is_replaced_without_force(daemon: Daemon) -> None:
    old = catalog(daemon.home).read_bytes()
    daemon.start()
    daemon.cli("volume", "create", "p/more", "8M")
    assert daemon.stop() == 0
    catalog(daemon.home).write_bytes(old)
    daemon.cli("pool", "check", "p", "--rebuild-catalog")
    assert_served(daemon)
    assert [volume["name"] for volume in daemon.pool("p")["volumes"]] == ["p/more", "p/v"]


def test_a_missing_device_is_named(daemon: Daemon) -> None:
    site = daemon.home.parent
    lose_catalog(daemon.home)
    (site / "base").rename(site / "elsewhere")
    message = refused(daemon, "--device", str(site / "fast"))
    assert str(site / "base") in message
    assert "missing" in message
    assert "--device" in message
    daemon.cli("pool", "check", "p", "--rebuild-catalog", "--device", f"{site}/fast", "--device", f"{site}/elsewhere")
    assert_served(daemon)


def test_no_device_at_all_is_asked_for(daemon: Daemon) -> None:
    lose_catalog(daemon.home)
    assert "--device" in refused(daemon)


@pytest.mark.parametrize("case", ["other", "empty", "absent", "directory"])
def test_what_is_no_device_of_the_pool_is_named(daemon: Daemon, case: str) -> None:
    site = daemon.home.parent
    (site / "empty").write_bytes(bytes(MIB))
    (site / "directory").mkdir()
    lose_catalog(daemon.home)
    message = refused(daemon, "--device", f"{site}/fast", "--device", f"{site}/{case}")
    assert str(site / case) in message
    assert {"other": "another pool, 'q'", "absent": "is missing", "empty": "Terrace pool", "directory": ""}[
        case
    ] in message


def test_a_copy_of_a_device_beside_the_device_is_refused(daemon: Daemon) -> None:
    site = daemon.home.parent
    shutil.copy(site / "fast", site / "twin")
    lose_catalog(daemon.home)
    message = refused(daemon, "--device", f"{site}/fast", "--device", f"{site}/twin")
    assert "both device 0" in message


def test_an_older_copy_of_all_devices_can_be_rebuilt_and_a_mix_is_refused(daemon: Daemon) -> None:
    site = daemon.home.parent
    old = site / "old"
    shutil.copy(site / "fast", old)
    daemon.start()
    with Connection(daemon.socket, "p/v") as connection:
        connection.write(MIB, PATTERN)
    assert daemon.stop() == 0
    lose_catalog(daemon.home)
    shutil.copy(old, site / "fast")
    message = refused(daemon, "--device", f"{site}/fast")
    assert "base knows of checkpoint" in message


def test_a_pool_that_is_open_is_refused(daemon: Daemon) -> None:
    daemon.start()
    assert "open in another process" in refused(daemon)
    assert "open in another process" in refused(daemon, "--force")
    lose_catalog(daemon.home)
    assert "open in another process" in refused(daemon, "--device", str(daemon.home.parent / "fast"))
    elsewhere = Daemon(daemon.home.with_name("home2"))
    assert "open in another process" in refused(elsewhere, "--device", str(daemon.home.parent / "fast"))
    assert not catalog(elsewhere.home).parent.exists()
    assert_served(daemon)


def test_a_pool_rebuilt_under_a_running_daemon_is_opened_by_it(daemon: Daemon) -> None:
    site = daemon.home.parent
    with Daemon(site.with_name("home-of-another-host")) as other:
        other.cli("pool", "check", "p", "--rebuild-catalog", "--device", f"{site}/fast", "--device", f"{site}/base")
        other.cli("pool", "open", "p")
        assert_served(other)
        with pytest.raises(DaemonError, match="no pool 'nothing'"):
            other.cli("pool", "open", "nothing")


def test_devices_and_force_need_the_option_that_they_belong_to(daemon: Daemon) -> None:
    assert "--rebuild-catalog" in daemon.cli("pool", "check", "p", "--force", status=2).stderr
    assert "--rebuild-catalog" in daemon.cli("pool", "check", "p", "--device", "x", status=2).stderr
