"""A real daemon mirrors a volume to a real NBD server that knows nothing of mirrors."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.system.daemon import ApiError, Daemon
from tests.system.nbdclient import Connection

pytestmark = pytest.mark.system
MIB = 1 << 20
SIZE = 32 * MIB


class FileServer:
    """nbdkit over a file, which outlives it."""

    def __init__(self, directory: Path, size_bytes: int = SIZE) -> None:
        self.socket = directory / "leg.sock"
        self.file = directory / "leg.img"
        with self.file.open("wb") as file:
            file.truncate(size_bytes)
        self.process: subprocess.Popen[bytes] | None = None
        self.uri = f"nbd+unix:///?socket={self.socket}"

    def start(self, *options: str) -> None:
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(["nbdkit", "-f", "-U", str(self.socket), *options, "file", str(self.file)])
        deadline_s = time.monotonic() + 10
        while not self.socket.exists():
            assert time.monotonic() < deadline_s and self.process.poll() is None
            time.sleep(0.01)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def leg(tmp_path: Path) -> Iterator[FileServer]:
    server = FileServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("nbdleg") / "home", '[node]\nname = "a"\nlisten = ["127.0.0.1:0"]\n')
    daemon.start()
    try:
        device = {"path": str(daemon.home / "device"), "tier": "fast", "size": 256 * MIB}
        daemon.api("POST", "/v1/pools", {"name": "p", "devices": [device]})
        yield daemon
    finally:
        daemon.kill()


def create(daemon: Daemon, volume: str, uri: str | None = None) -> None:
    mirror = {} if uri is None else {"mirror": [{"node": uri}], "timeout_s": 1.0}
    daemon.api("POST", "/v1/pools/p/volumes", {"name": volume, "size": SIZE, **mirror})
    if uri is not None:
        wait_for(daemon, volume, "UpToDate")


def leg_of(daemon: Daemon, volume: str) -> dict[str, Any]:
    found = daemon.api("GET", f"/v1/pools/p/volumes/{volume}/mirror")
    return next(one for one in found["legs"] if one["kind"] == "nbd")


def wait_for(daemon: Daemon, volume: str, state: str) -> None:
    deadline_s = time.monotonic() + 15
    while (found := leg_of(daemon, volume))["state"] != state:
        assert time.monotonic() < deadline_s, f"{found}\n{daemon.tail()}"
        time.sleep(0.05)


@contextmanager
def connected(daemon: Daemon, volume: str) -> Iterator[Connection]:
    with Connection(daemon.socket, f"p/{volume}") as client:
        yield client


def require_equal(daemon: Daemon, volume: str, leg: FileServer) -> None:
    uri = f"nbd+unix:///p/{volume}?socket={daemon.socket}"
    compared = subprocess.run(
        ["qemu-img", "compare", "-f", "raw", "-F", "raw", uri, str(leg.file)], capture_output=True, text=True
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr


def test_writes_go_on_without_a_server_that_was_killed_and_only_what_it_missed_is_copied(
    daemon: Daemon, leg: FileServer
) -> None:
    made = daemon.cli("volume", "create", "p/v", "32M", "--mirror", leg.uri, "--timeout", "1")
    assert leg.uri in made.stdout
    wait_for(daemon, "v", "UpToDate")
    data = os.urandom(8 * MIB)
    with connected(daemon, "v") as client:
        client.write(0, data)
        client.write(20 * MIB + 100, data[:1000])
        client.trim(MIB, MIB)
        client.flush()
        require_equal(daemon, "v", leg)
        time.sleep(2.2)  # the common flushes that let it forget
        leg.kill()
        began_s = time.monotonic()
        client.write(10 * MIB, data[:MIB])
        assert time.monotonic() - began_s < 5
        wait_for(daemon, "v", "Stale")
        client.trim(0, 64 << 10)
        client.flush()
        told = daemon.api("GET", "/v1/pools/p/volumes/v/mirror/explain")["text"]
        assert f"The leg {leg.uri} has been out of reach" in told and "it misses writes" in told
        # What nobody has written to since isn't looked at: this stays until somebody asks for a comparison.
        with leg.file.open("r+b") as file:
            file.seek(5 * MIB)
            file.write(b"x" * 4096)
        leg.start()
        wait_for(daemon, "v", "UpToDate")
        with leg.file.open("rb") as file:
            assert file.read(64 << 10) == bytes(64 << 10)
            file.seek(10 * MIB)
            assert file.read(MIB) == data[:MIB]
            file.seek(5 * MIB)
            assert file.read(4096) == b"x" * 4096
        # Without --full: an NBD server's data are read, since it has no checksums.
        found = daemon.cli("volume", "mirror", "verify", "p/v", status=1)
        assert leg.uri in found.stdout and str(5 * MIB) in found.stdout
        daemon.cli("volume", "mirror", "resync", "p/v", leg.uri, "--full")
        client.flush()
    require_equal(daemon, "v", leg)


def test_a_primary_that_is_killed_brings_the_server_up_to_date_with_what_was_written_lately(
    daemon: Daemon, leg: FileServer
) -> None:
    create(daemon, "k", leg.uri)
    data = os.urandom(4 * MIB)
    with connected(daemon, "k") as client:
        client.write(0, data)
    daemon.stop()
    with leg.file.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(b"x" * 4096)  # what isn't compared is told by this
    daemon.start()
    wait_for(daemon, "k", "UpToDate")
    with connected(daemon, "k") as client:
        client.write(16 * MIB, data[:MIB])
    daemon.kill()
    with leg.file.open("r+b") as file:
        file.seek(16 * MIB)
        file.write(b"y" * MIB)
    daemon.start()
    wait_for(daemon, "k", "UpToDate")
    with leg.file.open("rb") as file:
        file.seek(16 * MIB)
        assert file.read(MIB) == data[:MIB]
        file.seek(2 * MIB)
        assert file.read(4096) == b"x" * 4096


def test_a_volume_gets_a_leg_on_a_server_and_loses_it_again(daemon: Daemon, leg: FileServer) -> None:
    data = os.urandom(MIB)
    create(daemon, "w")
    with connected(daemon, "w") as client:
        client.write(3 * MIB, data)
    deadline_s = time.monotonic() + 5
    while True:  # the daemon may not know yet that its client has left
        try:
            daemon.api("POST", "/v1/pools/p/volumes/w/mirror/legs", {"node": leg.uri})
            break
        except ApiError as error:
            assert error.errno == "EBUSY" and time.monotonic() < deadline_s, error
            time.sleep(0.05)
    wait_for(daemon, "w", "UpToDate")
    require_equal(daemon, "w", leg)
    # Under another URI it is no second one.
    again = daemon.api("POST", "/v1/pools/p/volumes/w/mirror/legs", {"node": f"nbd+unix://?socket={leg.socket}"})
    assert len(again["legs"]) == 2
    with pytest.raises(ApiError, match="is a leg of p/w"):
        create(daemon, "other", leg.uri)
    link = leg.socket.with_name("link")
    link.symlink_to(leg.socket)
    with pytest.raises(ApiError, match="is a leg of p/w, as nbd"):
        create(daemon, "other", f"nbd+unix:///?socket={link}")
    # What is told by node isn't told of the node that added it.
    taken = daemon.api("POST", "/v1/pools/p/snapshots", {"volumes": ["w"], "name": "one"})
    assert [one["lacking"] for one in taken] == [{}]
    assert leg_of(daemon, "w")["snapshots"] is None
    states = daemon.cli("metrics").stdout
    for place in ("a", leg.uri):
        assert states.count(f'terrace_mirror_leg_state{{node="{place}",state="UpToDate",volume="p/w"}} 1.0') == 1
    daemon.cli("snapshot", "delete", "p/w@one", "--yes")
    removed = daemon.cli("volume", "mirror", "remove", "p/w", leg.uri)  # which asks nothing: nothing is deleted
    assert "is a plain volume" in removed.stdout and f"the data on {leg.uri}" in removed.stdout
    assert leg.file.read_bytes()[3 * MIB : 4 * MIB] == data


def test_another_volume_of_a_terraced_is_a_leg_like_any_export(daemon: Daemon) -> None:
    create(daemon, "under")
    create(daemon, "over", f"nbd+unix:///p/under?socket={daemon.socket}")
    data = os.urandom(MIB)
    with connected(daemon, "over") as client:
        client.write(5 * MIB, data)
        client.trim(5 * MIB, 64 << 10)
        client.flush()
        with connected(daemon, "under") as under:
            assert under.read(5 * MIB, MIB) == bytes(64 << 10) + data[64 << 10 :]


def test_a_server_that_comes_back_too_small_stays_out_and_says_so(daemon: Daemon, leg: FileServer) -> None:
    create(daemon, "z", leg.uri)
    leg.kill()
    with connected(daemon, "z") as client:
        client.write(0, os.urandom(4096))
    with leg.file.open("r+b") as file:
        file.truncate(16 * MIB)
    leg.start()
    deadline_s = time.monotonic() + 10
    while "make the export at least so large" not in (leg_of(daemon, "z")["error"] or ""):
        assert time.monotonic() < deadline_s, leg_of(daemon, "z")
        time.sleep(0.05)
    with leg.file.open("r+b") as file:
        file.truncate(SIZE)
    leg.kill()
    leg.start()
    wait_for(daemon, "z", "UpToDate")
    with connected(daemon, "z") as client:
        client.flush()
    require_equal(daemon, "z", leg)


def test_what_can_not_be_a_leg_leaves_nothing_behind_and_a_sentence(daemon: Daemon, leg: FileServer) -> None:
    def refused(uri: str, said: str) -> None:
        with pytest.raises(ApiError, match=said) as error:
            create(daemon, "bad", uri)
        assert "internal error" not in str(error.value)
        with pytest.raises(ApiError):
            daemon.api("GET", "/v1/pools/p/volumes/bad")

    refused("nbd://no-such-host.invalid/x", "no-such-host.invalid")
    refused("nbd://127.0.0.1:1/x", "refused")
    refused("nbd://127.0.0.1:99999/x", "is no URI")
    refused("http://127.0.0.1/x", "is no NBD URI")
    refused(f"nbd+unix:///none?socket={daemon.socket}", "none")
    refused(f"nbd+unix:///p/bad?socket={daemon.socket}", "that is the volume itself")
    refused(f"nbds+unix:///?socket={leg.socket}", "TLS")
    leg.kill()
    leg.start("-r")
    refused(leg.uri, "is read-only")
    leg.kill()
    with leg.file.open("r+b") as file:
        file.truncate(MIB)
    leg.start()
    refused(leg.uri, "at least so large")
    # One line, as all errors of the command line.
    said = daemon.cli("volume", "create", "p/bad", "32M", "--mirror", leg.uri, status=1).stderr.strip()
    assert "at least so large" in said and len(said.splitlines()) == 1
