"""A scrub of real devices by the real daemon: flipped bytes are found while clients write, and named as clients see."""

from __future__ import annotations

import errno
import random
import threading
from pathlib import Path

import pytest

from tests.system.daemon import Daemon
from tests.system.nbdclient import Connection

pytestmark = pytest.mark.system
MIB = 1 << 20


def find(device: Path, wanted: bytes) -> int:
    """Where a device has these bytes; they must be there once."""
    data = device.read_bytes()
    at = data.find(wanted)
    assert at >= 0
    assert data.find(wanted, at + 1) < 0
    return at


def flip(device: Path, offset: int) -> None:
    with device.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.alone
def test_flipped_bytes_are_named_by_volume_and_range_while_clients_write_and_a_rewrite_mends_them(
    tmp_path: Path,
) -> None:
    fast, base = tmp_path / "fast", tmp_path / "base"
    pattern = random.Random(1).randbytes(24 * MIB)
    rotten = [5 * MIB, 5 * MIB + 4096, 17 * MIB + 8192]
    with Daemon(tmp_path / "home") as daemon:
        daemon.cli("pool", "create", "p", "--fast", f"{fast}=256M", "--base", f"{base}=256M")
        for name in ("p/v", "p/busy"):
            daemon.cli("volume", "create", name, "32M")
        with Connection(daemon.socket, "p/v") as client:
            for at in range(0, len(pattern), MIB):
                client.write(at, pattern[at : at + MIB])
            client.flush()
        assert "no errors" in daemon.cli("pool", "scrub", "p", "--wait").stdout
        places = [find(fast, pattern[at : at + 4096]) for at in rotten]
        for place in places:
            flip(fast, place + 1000)

        done = threading.Event()

        def write() -> None:
            rng = random.Random(2)
            with Connection(daemon.socket, "p/busy") as client:
                while not done.is_set():
                    client.write(rng.randrange(7000) * 4096, rng.randbytes(16 << 10))

        writer = threading.Thread(target=write)
        writer.start()
        try:
            told = daemon.cli("pool", "scrub", "p", "--wait", status=1).stdout
        finally:
            done.set()
            writer.join()
        found = daemon.api("GET", "/v1/pools/p/scrub")
        assert (found["state"], found["errors"], found["damage_omitted"]) == ("finished", 3, 0)
        assert [(d["volume"], d["offset"], d["length"], d["device_offset"]) for d in found["damage"]] == [
            ("p/v", rotten[0], 8192, places[0]),
            ("p/v", rotten[2], 4096, places[2]),
        ]
        assert {d["path"]: d["errors"] for d in found["devices"]} == {str(fast): 3, str(base): 0}
        for expected in ("3 errors", "p/v", str(rotten[0]), str(rotten[0] + 8191), str(fast)):
            assert expected in told
        log = daemon.log.read_text()
        assert log.count("scrub: p/v bytes") == 2
        assert f"scrub: p/v bytes {rotten[2]}-{rotten[2] + 4095}: the data on {fast} at {places[2]} fails" in log
        assert daemon.api("GET", "/v1/status")["loop_stall_max_ms"] < 500

        # The result is still known after a restart; what is written anew is sound.
        assert daemon.stop() == 0
        daemon.start()
        assert daemon.pool("p")["scrub"]["last"]["errors"] == 3
        with Connection(daemon.socket, "p/v") as client:
            for at in rotten:
                with pytest.raises(OSError) as error:
                    client.read(at, 4096)
                assert error.value.errno == errno.EIO
                client.write(at, pattern[at : at + 4096])
            client.flush()
        assert "is sound: no errors" in daemon.cli("pool", "scrub", "p", "--wait").stdout
        with Connection(daemon.socket, "p/v") as client:
            assert client.read(5 * MIB, MIB) == pattern[5 * MIB : 6 * MIB]


def test_a_killed_daemon_goes_on_with_its_scrub(tmp_path: Path) -> None:
    with Daemon(tmp_path / "home") as daemon:
        daemon.cli("pool", "create", "p", "--fast", f"{tmp_path}/fast=256M")
        daemon.cli("volume", "create", "p/v", "64M")
        with Connection(daemon.socket, "p/v") as client:
            for at in range(0, 32 * MIB, MIB):
                client.write(at, random.Random(at).randbytes(MIB))
            client.flush()
        assert "is started" in daemon.cli("pool", "scrub", "p", "--rate", "2M").stdout
        begun = daemon.api("GET", "/v1/pools/p/scrub")
        daemon.kill()
        daemon.start()
        after = daemon.api("POST", "/v1/pools/p/scrub", {"action": "start", "rate": 0})
        assert after["started_at"] == begun["started_at"]
        daemon.cli("pool", "scrub", "p", "--wait")
        finished = daemon.api("GET", "/v1/pools/p/scrub")
        assert (finished["state"], finished["errors"]) == ("finished", 0)
        assert finished["done_bytes"] == finished["total_bytes"] > 32 * MIB
