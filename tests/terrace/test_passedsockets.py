"""Sockets that a supervisor passes in, and those left in its store: taken where they match, judged, refused by name."""

from __future__ import annotations

import array
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.daemon import environment
from tests.system.nbdclient import Connection
from tests.terrace.fakedaemon import FakeDaemon, command

# Sets what systemd sets: the process id is known only here, and descriptors begin at 3.
PASS = """
import os, sys
count, names, *command = sys.argv[1:]
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count, "LISTEN_FDNAMES": names}
os.execvp(command[0], command)
"""


class Supervisor:
    """A fake one: what it was told, and the descriptors that it holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stored: dict[str, int] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(20)

    def hear(self) -> list[str]:
        data, control, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(4))
        states = data.decode().split("\n")
        for _, _, content in control:
            (name,) = [state.removeprefix("FDNAME=") for state in states if state.startswith("FDNAME=")]
            assert "FDSTORE=1" in states and "FDPOLL=0" in states
            self.stored[name] = array.array("i", content[:4])[0]
        return states

    def await_state(self, wanted: str) -> None:
        while wanted not in self.hear():
            pass

    def close(self) -> None:
        self._socket.close()
        for descriptor in self.stored.values():
            os.close(descriptor)


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    fake = Supervisor(tmp_path / "notify")
    yield fake
    fake.close()


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(own_daemon: FakeDaemon, supervisor: Supervisor) -> Start:
    """Start the daemon with descriptors passed to it; `listen` is what it is configured to."""

    def run(passed: dict[str, int], listen: str = "[]") -> subprocess.Popen[str]:
        own_daemon.home.mkdir(exist_ok=True)
        config = own_daemon.home.with_name("daemon.toml")
        config.write_text(f"nbd.listen = {listen}\n")
        names = ":".join(passed)
        inside = [sys.executable, "-c", PASS, str(len(passed)), names, *command()]
        # bash moves them to 3, 4 ... by name.
        moves = " ".join(f"{number}<&{descriptor}" for number, descriptor in enumerate(passed.values(), 3))
        with own_daemon.log.open("a") as log:
            process = subprocess.Popen(
                ["bash", "-c", f'exec "$@" {moves}', "-", *inside, "--home", own_daemon.home, "--config", config],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment() | {"NOTIFY_SOCKET": str(supervisor.path)},
                pass_fds=list(passed.values()),
            )
        own_daemon.process = process
        return process

    return run


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Callable[..., socket.socket]]:
    """Makes listening Unix sockets as systemd would, that end with the test."""
    made: list[socket.socket] = []

    def make(path: Path, *, kind: int = socket.SOCK_STREAM, mode: int = 0o600, listens: bool = True) -> socket.socket:
        path.parent.mkdir(exist_ok=True)
        sock = socket.socket(socket.AF_UNIX, kind)
        made.append(sock)
        sock.bind(str(path))
        path.chmod(mode)
        if listens:
            sock.listen()
        return sock

    yield make
    for sock in made:
        sock.close()


Listening = Callable[..., socket.socket]


def refusal(daemon: FakeDaemon, process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=20)
    daemon.process = None
    assert (process.returncode, output) == (1, "")
    (line,) = daemon.log.read_text().splitlines()
    return line


def test_passed_sockets_are_served_on_and_their_files_stay(
    own_daemon: FakeDaemon, supervisor: Supervisor, start: Start, listening: Listening
) -> None:
    home = own_daemon.home
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        port = tcp.getsockname()[1]
        nbd, api = listening(home / "nbd.sock"), listening(home / "api.sock")
        # Waits since before the daemon was started.
        with socket.create_connection(("127.0.0.1", port), 20) as early:
            passed = {"terraced": api.fileno(), "terraced.socket": tcp.fileno()}
            process = start(passed | {"bound-x": nbd.fileno()}, f'["127.0.0.1:{port}"]')
            supervisor.await_state("READY=1")
            assert early.recv(8) == b"NBDMAGIC"
        assert not supervisor.stored
        assert own_daemon.api("GET", "/v1/status")["nbd"]["uris"] == [
            f"nbd://127.0.0.1:{port}/",
            f"nbd+unix:///?socket={home}/nbd.sock",
        ]
        # What a client sees as its peer is the daemon, not who bound the socket.
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(home / "api.sock"))
            peer = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            assert int.from_bytes(peer[:4], sys.byteorder) == process.pid
        assert own_daemon.stop() == 0
    assert (home / "nbd.sock").is_socket() and (home / "api.sock").is_socket()


def test_what_the_daemon_binds_itself_is_stored_and_taken_again_after_its_death(
    own_daemon: FakeDaemon, supervisor: Supervisor, start: Start
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    start({}, f'["127.0.0.1:{port}"]')
    supervisor.await_state("READY=1")
    names = {f"bound-127.0.0.1_{port}", f"bound-{own_daemon.home}/nbd.sock", f"bound-{own_daemon.home}/api.sock"}
    assert supervisor.stored.keys() == names
    own_daemon.kill()
    with socket.create_connection(("127.0.0.1", port), 20) as waiting, socket.socket(socket.AF_UNIX) as local:
        local.settimeout(20)
        local.connect(str(own_daemon.home / "nbd.sock"))
        start(dict(supervisor.stored), f'["127.0.0.1:{port}"]')
        assert waiting.recv(8) == b"NBDMAGIC"
        assert local.recv(8) == b"NBDMAGIC"
    assert own_daemon.stop() == 0
    assert (own_daemon.home / "nbd.sock").is_socket(), "clients of the next one wait there"


def test_a_stored_socket_that_is_no_longer_wanted_is_given_up(
    own_daemon: FakeDaemon, supervisor: Supervisor, start: Start, listening: Listening, tmp_path: Path
) -> None:
    gone = listening(tmp_path / "gone.sock")
    (tmp_path / "gone.sock").unlink()
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        start({"bound-tcp": tcp.fileno(), "bound-gone": gone.fileno()})
        forgotten = set()
        while "READY=1" not in (states := supervisor.hear()):
            if "FDSTOREREMOVE=1" in states:
                forgotten.add(states[1])
        assert forgotten == {"FDNAME=bound-tcp", "FDNAME=bound-gone"}
    assert own_daemon.stop() == 0


def test_a_passed_address_that_is_not_configured_is_refused_by_name(own_daemon: FakeDaemon, start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        said = refusal(own_daemon, start({"terraced": tcp.fileno()}))
        assert f"127.0.0.1:{tcp.getsockname()[1]}" in said
    assert "ListenStream" in said and "install-units" in said
    assert not list(own_daemon.home.glob("*.sock")), "what it had bound by then"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"kind": socket.SOCK_DGRAM, "listens": False}, "stream"),
        ({"listens": False}, "doesn't listen"),
        ({"mode": 0o666}, "mode 0666"),
    ],
)
def test_a_socket_that_can_not_be_served_on_is_refused_by_name(
    own_daemon: FakeDaemon, start: Start, listening: Listening, options: dict[str, int], word: str
) -> None:
    path = own_daemon.home / "nbd.sock"
    said = refusal(own_daemon, start({"terraced": listening(path, **options).fileno()}))
    assert re.search(rf"descriptor 3 \(terraced\).*{word}", said), said
    assert str(path) in said and "socket unit" in said
    assert path.is_socket()


def test_a_file_a_pipe_and_an_unknown_name_are_refused_by_name(
    own_daemon: FakeDaemon, start: Start, listening: Listening, tmp_path: Path
) -> None:
    with (tmp_path / "file").open("w") as file:
        assert "descriptor 3 (terraced), which the supervisor passed, is not a socket" in refusal(
            own_daemon, start({"terraced": file.fileno()})
        )
    own_daemon.log.write_text("")
    said = refusal(own_daemon, start({"cups": listening(own_daemon.home / "nbd.sock").fileno()}))
    assert "descriptor 3 (cups)" in said and "FileDescriptorName=terraced" in said


def test_an_address_that_was_passed_twice_is_refused(
    own_daemon: FakeDaemon, start: Start, listening: Listening
) -> None:
    sock = listening(own_daemon.home / "nbd.sock")
    said = refusal(own_daemon, start({"terraced": sock.fileno(), "bound-x": os.dup(sock.fileno())}))
    assert f"{own_daemon.home}/nbd.sock was passed twice" in said


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({"LISTEN_FDS": "many"}, "LISTEN_FDS is 'many'"),
        ({"LISTEN_FDS": "1", "LISTEN_FDNAMES": "terraced:terraced"}, "LISTEN_FDNAMES has 2 names"),
        ({"LISTEN_FDS": "1", "LISTEN_FDNAMES": "terraced"}, "is not open"),
    ],
)
def test_variables_that_make_no_sense_are_refused(own_daemon: FakeDaemon, variables: dict[str, str], word: str) -> None:
    script = 'export LISTEN_PID=$$; exec "$@" 3<&-'
    started = ["bash", "-c", script, "-", *command(), "--home", str(own_daemon.home)]
    done = subprocess.run(started, env=environment() | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert word in done.stderr and done.stderr.count("\n") == 1


def test_what_is_meant_for_another_process_is_left_alone(own_daemon: FakeDaemon) -> None:
    own_daemon.spawn(LISTEN_PID="1", LISTEN_FDS="7", LISTEN_FDNAMES="x")
    own_daemon.wait_log("")
    while not own_daemon.socket.exists():
        assert own_daemon.alive()
    with pytest.raises(OSError, match="NBD_REP_ERR"), Connection(own_daemon.socket, "no/volume"):
        pass
    assert own_daemon.process is not None
    own_daemon.process.send_signal(signal.SIGTERM)
    assert own_daemon.process.wait(20) == 0
