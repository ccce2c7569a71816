"""The daemon as its supervisor and its operator see it: start, readiness, signals, refusals."""

from __future__ import annotations

import importlib.metadata
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from terrace.daemon import main, version
from tests.system.daemon import environment
from tests.system.nbdclient import Connection
from tests.terrace.fakedaemon import FakeDaemon, command

MIB = 1 << 20
PATTERN = bytes(range(256)) * 16


def make_volume(daemon: FakeDaemon, pool: str = "p") -> None:
    device = {"path": f"{daemon.home}/{pool}.device", "tier": "fast", "size": 64 * MIB}
    daemon.api("POST", "/v1/pools", {"name": pool, "devices": [device]})
    daemon.api("POST", f"/v1/pools/{pool}/volumes", {"name": "v", "size": MIB})


def await_state(supervisor: socket.socket, state: bytes) -> None:
    """Until the daemon has said it, among what else it says."""
    while state not in supervisor.recv(4096).split(b"\n"):
        pass


def refused(*options: str) -> str:
    """What a daemon that must not start says, which is one line."""
    result = subprocess.run(
        [*command(), *options], capture_output=True, text=True, timeout=30, env=environment(), check=False
    )
    assert result.returncode == 1, result
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def test_standard_streams_that_are_closed_are_given_to_no_device_and_no_socket(own_daemon: FakeDaemon) -> None:
    """Else what the C library says before it gives up would be written over somebody's data."""
    started = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "-", *command(), "--home", str(own_daemon.home)]
    with subprocess.Popen(started, env=environment()) as process:
        try:
            deadline_s = time.monotonic() + 30
            while not (own_daemon.home / "nbd.sock").exists():
                assert time.monotonic() < deadline_s
                assert process.poll() is None
                time.sleep(0.05)
            opened = [Path(f"/proc/{process.pid}/fd/{number}").readlink() for number in range(3)]
            assert opened == [Path("/dev/null")] * 3
        finally:
            process.terminate()
    assert process.returncode == 0


def test_it_says_once_where_it_serves_and_tells_its_supervisor(own_daemon: FakeDaemon, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.settimeout(30)
        process = own_daemon.spawn(NOTIFY_SOCKET=str(tmp_path / "notify"))
        await_state(supervisor, b"READY=1")
        # Ready means ready: the socket is there, and answers.
        assert own_daemon.api("GET", "/v1/status")["pid"] == process.pid
        process.send_signal(signal.SIGTERM)
        await_state(supervisor, b"STOPPING=1")
    output, _ = process.communicate(timeout=30)
    own_daemon.process = None
    assert process.returncode == 0
    assert re.fullmatch(
        rf"terraced is ready: nbd://127\.0\.0\.1:\d+/ nbd\+unix:///\?socket={own_daemon.home}/nbd\.sock\n", output
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_closes_every_pool_cleanly_and_leaves_no_socket(own_daemon: FakeDaemon, number: int) -> None:
    own_daemon.start()
    make_volume(own_daemon, "one")
    make_volume(own_daemon, "two")
    with Connection(own_daemon.socket, "one/v") as client:
        client.write(0, PATTERN)
        assert own_daemon.process is not None
        own_daemon.process.send_signal(number)
        assert own_daemon.process.wait(30) == 0
    own_daemon.kill()
    for pool in ("one", "two"):
        assert (own_daemon.directory(pool) / "closed-cleanly").exists()
    assert not list(own_daemon.home.glob("*.sock"))
    own_daemon.start()
    with Connection(own_daemon.socket, "one/v") as client:
        assert client.read(0, len(PATTERN)) == PATTERN


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_pools_are_being_opened_ends_that_and_closes_those_that_are_open(
    own_daemon: FakeDaemon, number: int
) -> None:
    own_daemon.start()
    make_volume(own_daemon, "one")
    make_volume(own_daemon, "two")
    own_daemon.stop()
    (own_daemon.directory("one") / "closed-cleanly").unlink()
    (own_daemon.directory("two") / "closed-cleanly").unlink()
    (own_daemon.directory("two") / "slow-open").write_text("600")
    before = own_daemon.log.read_text().count("pool one is open")
    process = own_daemon.spawn()
    while own_daemon.log.read_text().count("pool one is open") == before:
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    own_daemon.process = None
    assert (process.returncode, output) == (0, "")
    assert (own_daemon.directory("one") / "closed-cleanly").exists()
    assert not (own_daemon.directory("two") / "closed-cleanly").exists()
    assert "Traceback" not in own_daemon.log.read_text()
    (own_daemon.directory("two") / "slow-open").unlink()
    own_daemon.start()
    assert {pool["state"] for pool in own_daemon.api("GET", "/v1/pools")} == {"online"}


def test_a_second_signal_does_not_wait_for_clients(own_daemon: FakeDaemon) -> None:
    own_daemon.config = "drain_grace_s = 600\n"
    own_daemon.start()
    make_volume(own_daemon)
    with Connection(own_daemon.socket, "p/v"):
        assert own_daemon.process is not None
        own_daemon.process.send_signal(signal.SIGTERM)
        own_daemon.wait_log("finishing what clients have in flight")
        time.sleep(0.3)
        assert own_daemon.alive()
        own_daemon.process.send_signal(signal.SIGTERM)
        assert own_daemon.process.wait(30) == 0
    assert (own_daemon.directory("p") / "closed-cleanly").exists()


def test_a_third_signal_ends_a_daemon_whose_pool_does_not_close(own_daemon: FakeDaemon) -> None:
    own_daemon.start()
    make_volume(own_daemon)
    (own_daemon.directory("p") / "stuck-close").write_text("600")
    assert own_daemon.process is not None
    for said in ("finishing what clients have in flight", "second signal", "third signal"):
        own_daemon.process.send_signal(signal.SIGTERM)
        own_daemon.wait_log(said)
    assert own_daemon.process.wait(30) == 1


def test_a_second_daemon_on_a_home_is_refused_and_the_first_goes_on(daemon: FakeDaemon) -> None:
    assert daemon.process is not None
    said = refused("--home", str(daemon.home))
    assert str(daemon.home) in said
    assert str(daemon.process.pid) in said
    assert "--home" in said
    assert daemon.api("GET", "/v1/status")["pid"] == daemon.process.pid


def test_a_bound_address_is_named_with_the_next_step_and_nothing_is_opened(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        (tmp_path / "c.toml").write_text(f'[nbd]\nlisten = ["127.0.0.1:0", "{address}"]\n')
        said = refused("--home", str(tmp_path / "home"), "--config", str(tmp_path / "c.toml"))
    assert address in said
    assert "already in use" in said
    assert "ss -ltnxp" in said
    assert "[nbd]" in said
    assert not list((tmp_path / "home").glob("*.sock"))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ('listen = ["192.0.2.1:10809"]', "192.0.2.1:10809"),
        ('listen = ["no-such-host.invalid:10809"]', "no-such-host.invalid:10809"),
        ('listen = []\nsocket = ""', "[nbd]"),
        ('listen = []\nsocket = "no/such/directory.sock"', "no/such/directory.sock"),
        (f'listen = []\nsocket = "{"x" * 100}"', "x" * 100),
    ],
)
def test_an_address_that_can_not_be_had_is_named(
    tmp_path: Path, config: str, word: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text(f"[nbd]\n{config}\n")
    # In this process, since nothing is served.
    assert main(["--home", str(tmp_path / "home"), "--config", str(tmp_path / "c.toml")]) == 1
    said = capfd.readouterr().err
    assert word in said
    assert said.count("\n") == 1


def test_sockets_that_a_killed_daemon_left_are_replaced(own_daemon: FakeDaemon) -> None:
    own_daemon.start()
    own_daemon.kill()
    assert (own_daemon.home / "api.sock").is_socket()
    assert (own_daemon.home / "nbd.sock").is_socket()
    own_daemon.start()
    assert own_daemon.api("GET", "/v1/pools") == []


@pytest.mark.parametrize("name", ["api.sock", "nbd.sock"])
def test_a_file_in_a_socket_s_place_is_not_removed(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text("nbd.listen = []")
    (tmp_path / name).write_text("precious")
    assert main(["--home", str(tmp_path), "--config", str(tmp_path / "c.toml")]) == 1
    assert name in capfd.readouterr().err
    assert (tmp_path / name).read_text() == "precious"


def test_only_the_owner_may_open_the_sockets(daemon: FakeDaemon) -> None:
    for name in ("api.sock", "nbd.sock"):
        assert (daemon.home / name).stat().st_mode & 0o777 == 0o600


def test_a_pool_that_can_not_be_opened_is_listed_with_its_reason_and_stops_nobody(own_daemon: FakeDaemon) -> None:
    own_daemon.start()
    make_volume(own_daemon, "good")
    make_volume(own_daemon, "bad")
    own_daemon.kill()
    (own_daemon.directory("bad") / "fail-open").write_text("the device /x is gone")
    (own_daemon.home / "pools" / "no pool's name!").mkdir()
    (own_daemon.home / "pools" / "stray-file").touch()
    own_daemon.start()
    bad, good, alien = own_daemon.api("GET", "/v1/pools")
    assert bad == {"name": "bad", "state": "failed", "error": "the device /x is gone"}
    assert (good["name"], good["state"], good["error"]) == ("good", "online", None)
    assert alien["state"] == "failed"
    with Connection(own_daemon.socket, "good/v") as client:
        client.write(0, PATTERN)
    (own_daemon.directory("bad") / "fail-open").unlink()
    assert own_daemon.api("POST", "/v1/pools/bad/open")["state"] == "online"
    with Connection(own_daemon.socket, "bad/v") as client:
        client.write(0, PATTERN)


def test_a_pool_that_fails_later_takes_nobody_with_it(own_daemon: FakeDaemon) -> None:
    own_daemon.start()
    make_volume(own_daemon, "good")
    make_volume(own_daemon, "bad")
    with Connection(own_daemon.socket, "good/v") as client:
        (own_daemon.directory("bad") / "fail-later").write_text("the device /x died")
        own_daemon.wait_log("the device /x died")
        client.write(0, PATTERN)
        assert client.read(0, len(PATTERN)) == PATTERN
        assert own_daemon.pool("bad") == {"name": "bad", "state": "failed", "error": "the device /x died"}
    assert own_daemon.stop() == 0
    assert (own_daemon.directory("good") / "closed-cleanly").exists()


def test_a_pool_whose_directory_was_renamed_is_not_served_under_a_wrong_name(own_daemon: FakeDaemon) -> None:
    own_daemon.start()
    make_volume(own_daemon, "one")
    own_daemon.stop()
    own_daemon.directory("one").rename(own_daemon.directory("two"))
    own_daemon.start()
    (pool,) = own_daemon.api("GET", "/v1/pools")
    assert pool["state"] == "failed"
    assert "'one'" in pool["error"]


def test_the_configuration_can_be_checked_without_starting(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text('[pool]\nmap_cache = "128M"\n')
    bad.write_text("[pool]\nmap_cash = 1\n")
    assert main(["--check-config", "--config", str(good), "--home", str(tmp_path / "home")]) == 0
    assert capfd.readouterr().err == ""
    assert main(["--check-config", "--config", str(bad)]) == 1
    assert capfd.readouterr().err == f'{bad}:2: pool.map_cash: unknown key; did you mean "map_cache"?\n'
    bad.write_text('nbd.listen = ["0.0.0.0:10809"]\n')
    assert main(["--check-config", "--config", str(bad)]) == 1
    assert "NBD on 0.0.0.0:10809 would be open to the network without TLS" in capfd.readouterr().err
    bad.write_text('nbd.tls.mode = "required"\n')
    assert main(["--check-config", "--config", str(bad), "--home", str(tmp_path / "home")]) == 1
    assert f"{tmp_path}/home/tls/server-cert.pem can't be read" in capfd.readouterr().err
    bad.write_text('nbd.tls.mode = "required"\nnode.name = "a"\n')
    assert main(["--check-config", "--config", str(bad), "--home", str(tmp_path / "home")]) == 1
    said = capfd.readouterr().err
    assert f"{tmp_path}/home/tls/node-cert.pem can't be read" in said and "`terrace tls node a` makes" in said
    assert not (tmp_path / "home").exists()


def test_a_daemon_keeps_its_version_when_another_one_is_installed_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = version()
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "99")
    assert version() == before != "99"


@pytest.mark.alone
def test_an_idle_daemon_is_idle_and_small(own_daemon: FakeDaemon) -> None:
    own_daemon.start()
    own_daemon.api("GET", "/v1/pools")
    assert own_daemon.process is not None
    process = psutil.Process(own_daemon.process.pid)
    time.sleep(0.2)
    before = process.cpu_times()
    time.sleep(2)
    after = process.cpu_times()
    assert (after.user + after.system) - (before.user + before.system) <= 0.02, "more than 1 % of a CPU"
    assert process.memory_info().rss < 120 * MIB


def test_the_daemon_does_not_load_what_only_the_command_line_needs() -> None:
    script = "import sys, terrace.daemon; print(*{'rich', 'click', 'httpx'} & set(sys.modules))"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert result.stdout.strip() == ""
