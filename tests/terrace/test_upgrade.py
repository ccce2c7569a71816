"""`terrace upgrade` and SIGHUP: another process takes over, and clients see a pause; or it doesn't, and they stay."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import httpx
import psutil
import pytest
import trio

from terrace.cli.upgrade import _cut_off
from terrace.handover import Successor
from terrace.pools import Pools
from terrace.upgrade import Upgrade
from tests.system.daemon import ApiError, DaemonError, environment, orphans_come_to_us
from tests.system.nbdclient import READ, WRITE, Connection
from tests.terrace.fakedaemon import FakeDaemon, command
from tests.terrace.test_api import check
from tests.terrace.test_cli import Cli
from tests.terrace.test_handover import an_estate, raw, run
from tiers import TierError

MIB = 1 << 20
PATTERN = bytes(range(256)) * 16
CLIENTS_WAIT = "clients for the next terraced"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeDaemon]:
    """With the pool `p` and the volume `p/v`, of a policy `gold`. Tests leave it serving that, in whatever process."""
    home: Path = tmp_path_factory.mktemp("u") / "home"
    running = FakeDaemon(home, "[policy.gold]\niops_limit = 500\n")
    with running:
        add_volume(running, "gold")
        yield running
        assert running.stop() == 0, running.tail()
        assert not list(home.glob("*.sock"))


@pytest.fixture
def own(own_daemon: FakeDaemon) -> FakeDaemon:
    """The same for one test, which may do to it what it likes."""
    own_daemon.start()
    add_volume(own_daemon)
    return own_daemon


def add_volume(daemon: FakeDaemon, policy: str = "") -> None:
    device = {"path": str(daemon.home / "device"), "tier": "fast", "size": 64 * MIB}
    daemon.api("POST", "/v1/pools", {"name": "p", "devices": [device]})
    daemon.api("POST", "/v1/pools/p/volumes", {"name": "v", "size": MIB, "policy": policy or "default"})


def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return found


def pid_of(daemon: FakeDaemon) -> int:
    assert daemon.process is not None
    return daemon.process.pid


def holder(daemon: FakeDaemon) -> int:
    """Whom the lock file names."""
    return int((daemon.home / "terraced.lock").read_text())


def successor_of(daemon: FakeDaemon) -> psutil.Process:
    (child,) = until(psutil.Process(pid_of(daemon)).children)
    return child


class Client:
    """In the middle of everything: a write that was answered, half of another one, a read that is never taken."""

    def __init__(self, daemon: FakeDaemon, *, tcp: bool = False) -> None:
        self.connection = Connection(("127.0.0.1", daemon.port) if tcp else daemon.socket, "p/v")
        self.connection.write(0, PATTERN)
        self.connection.send(READ, 0, 4096)
        self.cookie, header = self.connection.encode(WRITE, 4096, 4096)
        self.connection.socket.sendall(header + PATTERN[:1000])

    def goes_on(self) -> None:
        """Nothing of that was lost, and nothing comes twice."""
        with self.connection as connection:
            connection.socket.sendall(PATTERN[1000:])
            read, written = connection.reply(), connection.reply()
            assert (read.error, read.data) == (0, PATTERN)
            assert (written.cookie, written.error) == (self.cookie, 0)
            assert connection.read(0, 8192) == PATTERN * 2
            connection.flush()
            connection.disconnect()


# --- it takes over ---


@pytest.mark.alone
def test_clients_stay_connected_through_one_upgrade_after_the_other(daemon: FakeDaemon) -> None:
    clients = [Client(daemon), Client(daemon, tcp=True)]
    with Connection(daemon.socket, "p/v") as steady:
        for _ in range(2):
            before = pid_of(daemon)
            told = daemon.upgrade()
            assert pid_of(daemon) == told["pid"] == holder(daemon) != before
            assert not psutil.pid_exists(before)
            assert told["succession"]["from_pid"] == before
            assert told["succession"]["clients"] == 3
            assert 0 < told["succession"]["pause_s"] < 10
            assert (told["state"], told["attempt"], told["error"]) == ("idle", 0, None)
            status = daemon.api("GET", "/v1/status")
            assert status["pid"] == told["pid"] and status["succession"] == told["succession"]
            assert len(status["nbd"]["connections"]) == 3
            assert steady.read(0, 4096) == PATTERN
    for client in clients:
        client.goes_on()
    for address in (daemon.socket, ("127.0.0.1", daemon.port)):
        with Connection(address, "p/v") as newcomer:
            assert newcomer.read(4096, 4096) == PATTERN


def test_the_command_says_who_took_over_from_whom_and_how_long_clients_waited(daemon: FakeDaemon) -> None:
    cli = Cli(daemon.home)
    before = pid_of(daemon)
    with Connection(daemon.socket, "p/v") as client, orphans_come_to_us():
        said = cli.run("upgrade")
        assert said.exit_code == 0, said.output
        daemon.follow(holder(daemon))
        assert re.fullmatch(
            rf"terraced \S+ \(process {pid_of(daemon)}\) has taken over from \S+ \(process {before}\); "
            r"1 client waited for \d+\.\d\d s\.\n",
            said.stdout,
        )
        assert client.read(0, 4096)
    before = pid_of(daemon)
    with orphans_come_to_us():
        told = cli.run("upgrade", "-o", "json")
        daemon.follow(holder(daemon))
    assert re.search(rf'"pid": {pid_of(daemon)},', told.stdout) and re.search(rf'"from_pid": {before},', told.stdout)
    assert f"process {pid_of(daemon)}" in cli.ok("status")


def test_clients_over_tls_are_counted_also_as_an_older_daemon_tells_of_them() -> None:
    assert _cut_off([{"tls": ""}, {}, {"tls": "1.3", "kind": "takeover"}]) == ""
    assert _cut_off([{"tls": "1.3"}, {"tls": "1.2", "kind": "client"}]) == " 2 clients over TLS were disconnected."


def test_a_hangup_hands_over_too_and_a_second_daemon_is_refused_afterwards(daemon: FakeDaemon) -> None:
    before, client = pid_of(daemon), Client(daemon)
    with orphans_come_to_us():
        os.kill(before, signal.SIGHUP)
        until(lambda: holder(daemon) != before)
        daemon.follow(holder(daemon))
    client.goes_on()
    second = subprocess.run(
        [*command(), "--home", str(daemon.home)], capture_output=True, text=True, env=environment(), check=False
    )
    assert second.returncode == 1
    assert f"another process ({pid_of(daemon)}) has {daemon.home} in use" in second.stderr


def test_who_comes_while_nobody_serves_is_served_by_the_next_one(daemon: FakeDaemon) -> None:
    opening = daemon.directory("p") / "one-slow-open"
    opening.write_text("0.4")
    answers: list[int] = []

    def come() -> None:
        with Connection(daemon.socket, "p/v") as client:
            answers.append(client.size_bytes)

    def ask() -> None:
        answers.append(daemon.api("GET", "/v1/status")["pid"])

    threads = [threading.Thread(target=each) for each in (daemon.upgrade, come, ask)]
    threads[0].start()
    until(lambda: not opening.exists())
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(answers) == sorted([MIB, pid_of(daemon)])


def test_the_configuration_is_read_anew(own_daemon: FakeDaemon) -> None:
    """Policies, addresses and all; a kept address goes on, a removed one goes with its file."""
    own_daemon.config = "[policy.gold]\niops_limit = 500\n"
    own_daemon.start()
    add_volume(own_daemon, "gold")
    first_port, old = own_daemon.port, own_daemon.socket
    ready = own_daemon.ready_line
    inode = (own_daemon.home / "api.sock").stat().st_ino
    client = Client(own_daemon)
    file = own_daemon.configure()
    file.write_text(
        '[nbd]\nlisten = ["127.0.0.1:0", "[::1]:0"]\nsocket = "new.sock"\n'
        "[policy.gold]\niops_limit = 900\n[policy.silver]\niops_limit = 1\n"
    )
    own_daemon.upgrade()
    assert own_daemon.port == first_port
    assert (own_daemon.home / "api.sock").stat().st_ino == inode
    assert not old.exists()
    assert own_daemon.api("GET", "/v1/policies/gold")["keys"]["iops_limit"] == 900
    assert own_daemon.api("GET", "/v1/policies/silver")["keys"]["iops_limit"] == 1
    assert own_daemon.process is not None and own_daemon.process.stdout is not None
    said = own_daemon.process.stdout.readline()
    new_uri = f"nbd+unix:///?socket={own_daemon.home}/new.sock"
    match = re.fullmatch(rf"terraced is ready: nbd://127\.0\.0\.1:{first_port}/ nbd://\[::1\]:(\d+)/ (\S+)\n", said)
    assert match is not None and match[2] == new_uri, said
    assert ready.split()[:4] == said.split()[:4]
    for address in (("127.0.0.1", first_port), ("::1", int(match[1])), own_daemon.home / "new.sock"):
        with Connection(address, "p/v") as newcomer:
            assert newcomer.read(0, 4096) == PATTERN
    client.goes_on()  # its connection outlives the address that it came by
    own_daemon.configure()
    own_daemon.upgrade()
    assert old.exists() and not (own_daemon.home / "new.sock").exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("::1", int(match[1])), 5)
    assert own_daemon.stop() == 0
    assert not list(own_daemon.home.glob("*.sock"))
    assert (own_daemon.directory("p") / "closed-cleanly").exists()
    own_daemon.start()


def test_nobody_has_to_hear_where_the_next_one_serves(own: FakeDaemon) -> None:
    """What it was started by may have read a line and gone."""
    assert own.process is not None and own.process.stdout is not None
    own.process.stdout.close()
    client = Client(own)
    own.upgrade()
    client.goes_on()
    assert "can't say on standard output that it is ready: Broken pipe" in own.log.read_text()
    assert own.stop() == 0


# --- it doesn't, and the old one goes on ---


@pytest.mark.parametrize(
    ("config", "file", "expected"),
    [
        ("[", "", "is not TOML"),
        ("[pol]\n", "", 'pol: unknown key; did you mean "pool"?'),
        ("[policy.gold]\niops_limit = -1\n", "", "policy.gold.iops_limit: -1 is not possible"),
        ('socket = "{home}/nowhere/x.sock"\n[policy.gold]\n', "", "can't listen on "),
        ("[policy.silver]\n", "", "p/v has the policy 'gold', which the configuration doesn't have any more; give it"),
        ("[policy.gold]\n", "fail-one-open", "pool 'p' is not open: the device is on fire"),
    ],
)
def test_what_the_next_one_can_not_serve_is_refused_with_a_sentence_and_clients_stay(
    daemon: FakeDaemon, config: str, file: str, expected: str
) -> None:
    before, client = pid_of(daemon), Client(daemon)
    listing = {path: path.stat().st_ino for path in daemon.home.glob("*.sock")}
    daemon.configure().write_text('[nbd]\nlisten = ["127.0.0.1:0"]\n' + config.format(home=daemon.home))
    if file:
        (daemon.directory("p") / file).write_text("the device is on fire")
    try:
        with pytest.raises(DaemonError) as error:
            daemon.upgrade()
    finally:
        daemon.configure()
    told = daemon.api("GET", "/v1/upgrade")
    assert told["state"] == "idle" and expected in told["error"]
    assert f"no upgrade: {told['error']}; log:" in str(error.value)
    assert pid_of(daemon) == holder(daemon) == before and daemon.alive()
    assert psutil.Process(before).children() == []
    assert {path: path.stat().st_ino for path in daemon.home.glob("*.sock")} == listing
    client.goes_on()
    assert daemon.api("GET", "/v1/policies/gold")["keys"]["iops_limit"] == 500


def test_what_can_be_seen_beforehand_stops_no_client(daemon: FakeDaemon) -> None:
    cli = Cli(daemon.home)
    for config, reason in (
        ('listen = ["0.0.0.0:0"]', "would be open to the network without TLS"),
        ('tls.mode = "allowed"', "tls/server-cert.pem can't be read"),
    ):
        daemon.configure().write_text(f"[nbd]\n{config}\n[policy.gold]\n")
        seen = len(daemon.log.read_text())
        try:
            assert reason in cli.error("upgrade")
        finally:
            daemon.configure()
        assert "stopped" not in daemon.log.read_text()[seen:]
        assert re.search(rf"Upgrade +came to nothing: .*{reason}", cli.ok("status"))


def test_who_stops_waiting_for_it_is_told_that_it_goes_on(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = pid_of(daemon)
    monkeypatch.setattr("terrace.cli.upgrade._wait", interrupted)
    with orphans_come_to_us():
        assert "not waiting any longer; the upgrade goes on" in Cli(daemon.home).error("upgrade")
        assert re.search(r"Upgrade +(under way: |took over)", Cli(daemon.home).ok("status"))
        until(lambda: holder(daemon) != before)
        daemon.follow(holder(daemon))
    assert re.search(rf"Upgrade +took over from \S+, process {before}; 0 clients", Cli(daemon.home).ok("status"))


def test_an_address_that_only_the_next_one_has_goes_with_it(own: FakeDaemon) -> None:
    client = Client(own)
    own.configure().write_text('[nbd]\nlisten = ["127.0.0.1:0"]\nsocket = "new.sock"\n')
    (own.directory("p") / "fail-one-open").write_text("the device is on fire")
    with pytest.raises(DaemonError, match="on fire"):
        own.upgrade()
    assert own.socket.exists() and not (own.home / "new.sock").exists()
    client.goes_on()


def test_policies_that_were_reloaded_hold_on_when_it_comes_to_nothing(own_daemon: FakeDaemon) -> None:
    own_daemon.start()
    add_volume(own_daemon)
    own_daemon.configure().write_text('[nbd]\nlisten = ["127.0.0.1:0"]\n[policy.silver]\niops_limit = 900\n')
    own_daemon.api("POST", "/v1/policies/reload")
    own_daemon.api("PUT", "/v1/pools/p/volumes/v/policy", {"policy": "silver"})
    (own_daemon.directory("p") / "fail-one-open").write_text("the device is on fire")
    with pytest.raises(DaemonError, match="on fire"):
        own_daemon.upgrade()
    assert own_daemon.api("GET", "/v1/policies/silver")["keys"]["iops_limit"] == 900
    own_daemon.configure().write_text("[policy.gold]\n")
    with pytest.raises(ApiError, match="a policy in use can't go: 'silver'"):
        own_daemon.api("POST", "/v1/policies/reload")


def test_the_command_says_why_it_came_to_nothing(daemon: FakeDaemon) -> None:
    daemon.configure().write_text("[")
    try:
        said = Cli(daemon.home).run("upgrade")
    finally:
        daemon.configure()
    assert (said.exit_code, said.stdout) == (1, "")
    assert "Error: the running terraced goes on: " in said.stderr and "is not TOML" in said.stderr
    assert "Traceback" not in said.output
    assert pid_of(daemon) == holder(daemon)


def test_two_at_once_are_one(daemon: FakeDaemon) -> None:
    before = pid_of(daemon)
    with orphans_come_to_us():
        asked = daemon.api("POST", "/v1/upgrade", {})
        assert (asked["pid"], asked["state"], asked["error"]) == (before, "loading", None)
        with pytest.raises(ApiError, match="an upgrade is under way already") as error:
            daemon.api("POST", "/v1/upgrade", {"force": True})
        assert (error.value.status, error.value.errno) == (409, "EBUSY")
        assert "an upgrade is under way already" in Cli(daemon.home).error("upgrade")
        until(lambda: holder(daemon) != before)
        daemon.follow(holder(daemon))
    assert daemon.api("GET", "/v1/upgrade")["succession"]["from_pid"] == before
    assert Cli(daemon.home).error("upgrade", "now", status=2)
    bodies: list[object] = [{"force": 3}, {"forced": True}, []]
    for body in bodies:
        with pytest.raises(ApiError):
            daemon.api("POST", "/v1/upgrade", body)
    assert pid_of(daemon) == holder(daemon)


def test_an_operation_under_way_is_in_the_way_unless_forced(daemon: FakeDaemon) -> None:
    before = pid_of(daemon)
    slow = daemon.directory("p") / "slow-check"
    slow.write_text("600")
    stream = check(daemon, "p")
    next(stream)
    busy = "operations are running on p, and would be cut short; wait for them, or --force"
    assert busy in Cli(daemon.home).error("upgrade")
    size = daemon.log.stat().st_size
    os.kill(before, signal.SIGHUP)
    until(lambda: f"not handed over: {busy}" in daemon.log.read_text()[size:])
    assert holder(daemon) == before
    daemon.upgrade(force=True)
    with pytest.raises(httpx.RemoteProtocolError):
        list(stream)
    slow.unlink()
    assert list(check(daemon, "p"))[-1]["report"]["ok"]


def test_an_operation_that_begins_while_the_next_one_is_loaded_is_in_the_way_too(own: FakeDaemon) -> None:
    client, before = Client(own), pid_of(own)
    slow = own.directory("p") / "slow-check"
    slow.write_text("60")
    own.api("POST", "/v1/upgrade", {})
    successor = successor_of(own)
    successor.suspend()
    stream = check(own, "p")
    next(stream)
    successor.resume()
    told = until(lambda: (now := own.api("GET", "/v1/upgrade"))["state"] == "idle" and now)
    assert told["pid"] == before and "operations are running on p" in told["error"]
    slow.unlink()
    assert list(stream)[-1]["report"]["ok"]
    client.goes_on()
    own.upgrade()


@pytest.mark.parametrize("force", [False, True])
def test_a_disk_that_hangs_is_in_the_way_before_clients_are_stopped(
    monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    class HangingPool:
        name = "slow"

        async def checkpoint(self) -> None:
            await trio.sleep_forever()

    class HangingPools:
        def open_pools(self) -> Iterator[HangingPool]:
            yield HangingPool()

    async def test() -> None:
        monkeypatch.setattr("terrace.upgrade.CHECKPOINT_S", 0.05)
        monkeypatch.setattr("terrace.handover.own_command", lambda: raw("loaded(); hear()"))
        upgrade = Upgrade("1")
        upgrade.obstacle = lambda: ""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upgrade.run, cast(Pools, HangingPools()))
            upgrade.request(force=force)
            while upgrade.status()["state"] == "loading":
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert upgrade.wanted.is_set() == force
        error = "a checkpoint of pool slow has not ended in 0.05 s, and clients would wait"
        assert force or error in upgrade.status()["error"]
        upgrade.abandon()

    run(test)


@pytest.mark.parametrize("init", ["", "tini", "docker-init"])
def test_what_a_container_ends_with_is_not_replaced(monkeypatch: pytest.MonkeyPatch, init: str) -> None:
    """Process 1, and the child of an init that waits for no other."""
    upgrade = Upgrade("1")
    upgrade.obstacle = lambda: ""
    with monkeypatch.context() as patch:
        patch.setattr(os, "getppid" if init else "getpid", lambda: 1)
        patch.setattr(Path, "read_text", lambda *_, **__: f"{init}\n")
        with pytest.raises(TierError, match=r"the container .* would end with it, .*: restart the container") as error:
            upgrade.request(force=True)
    assert error.value.errno == errno.ENOTSUP
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "systemd\n")
    upgrade.request()
    assert upgrade.status()["state"] == "loading"


def test_a_daemon_that_does_not_serve_yet_is_not_replaced() -> None:
    with pytest.raises(TierError, match="this terraced doesn't serve yet"):
        Upgrade("1").request()


# --- one of the two is told to stop, or dies ---


@pytest.fixture
def opening(own: FakeDaemon) -> Iterator[tuple[Client, psutil.Process]]:
    """Somebody in the middle of everything, who waits for a successor that opens the pools for ever."""
    slow = own.directory("p") / "one-slow-open"
    slow.write_text("600")
    client = Client(own)
    own.api("POST", "/v1/upgrade", {})
    until(lambda: not slow.exists())
    successor = successor_of(own)
    with client.connection:
        yield client, successor
    assert not successor.is_running()


Opening = tuple[Client, psutil.Process]


def test_told_to_stop_while_the_next_one_opens_both_end_and_the_home_is_free(own: FakeDaemon, opening: Opening) -> None:
    client, successor = opening
    assert own.stop() == 0
    assert not successor.is_running()
    with pytest.raises(ConnectionError):
        client.goes_on()
    assert not list(own.home.glob("*.sock"))
    own.start()


def test_told_to_stop_while_the_next_one_is_loaded_both_end(own: FakeDaemon) -> None:
    own.api("POST", "/v1/upgrade", {})
    successor = successor_of(own)
    successor.suspend()
    assert own.stop() == 0
    assert not successor.is_running()
    assert not list(own.home.glob("*.sock"))
    own.start()


def test_who_is_told_to_stop_in_the_moment_of_decision_passes_that_on() -> None:
    told = trio.Event()

    def committing(pid: int) -> None:
        told.set()

    async def test() -> None:
        with ExitStack() as sockets:
            upgrade = Upgrade("1")
            upgrade._successor = successor = await Successor.start(
                raw("taken(); say('ready'); hear(); time.sleep(600)")
            )
            lock = sockets.enter_context(socket.socket()).fileno()
            assert await upgrade.hand_over(lock, an_estate(sockets), told, committing)
            upgrade.pass_on_stop()
            _, status = await trio.to_thread.run_sync(os.waitpid, successor.pid, 0)
            assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM

    run(test)


def test_a_successor_that_is_told_to_stop_leaves_the_clients_to_its_predecessor(
    own: FakeDaemon, opening: Opening
) -> None:
    client, successor = opening
    successor.terminate()
    client.goes_on()
    assert own.alive() and holder(own) == pid_of(own)
    assert own.api("GET", "/v1/upgrade")["error"] == "it was told to stop"


def test_a_successor_that_is_killed_leaves_the_clients_to_its_predecessor(own: FakeDaemon, opening: Opening) -> None:
    client, successor = opening
    successor.kill()
    client.goes_on()
    assert own.alive() and holder(own) == pid_of(own)
    assert "the other terraced has ended" in own.api("GET", "/v1/upgrade")["error"]
    own.upgrade()


def test_a_successor_whose_predecessor_is_killed_ends_and_leaves_the_home_to_who_starts_next(own: FakeDaemon) -> None:
    slow = own.directory("p") / "one-slow-open"
    slow.write_text("0.3")
    client = Client(own)
    own.api("POST", "/v1/upgrade", {})
    until(lambda: not slow.exists())
    successor = successor_of(own)
    with orphans_come_to_us():
        os.kill(pid_of(own), signal.SIGKILL)
        assert successor.wait(20) == 1  # by itself
    with client.connection, pytest.raises(ConnectionError):
        client.goes_on()
    own.kill()
    own.start()
    with Connection(own.socket, "p/v") as newcomer:
        assert newcomer.read(0, 4096) == PATTERN
