"""How two daemons hand over, below the daemons: whatever a successor does, its predecessor gets a sentence and is free.

The successors here are programs of a few lines that do wrong what one wants to see done wrong.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import trio

from nbd.suspended import Suspended
from nbd.transmission import Session
from terrace import handover
from terrace.handover import BATCH, VARIABLE, Estate, HandoverError, PassedListener, Predecessor, Successor
from tests.system.daemon import REPOSITORY

RAW = """
import json, os, signal, socket, sys, time
sock = socket.socket(fileno=int(os.environ["TERRACE_HANDOVER"]))
def say(what, **more): sock.send(json.dumps({"say": what, **more}).encode())
def hear(): return json.loads(socket.recv_fds(sock, 1 << 16, 253)[0])
def loaded(): say("loaded", version="9", format=1)
def taken():
    loaded()
    for _ in range((hear()["clients"] + 127) // 128):
        hear()
        say("more")
"""
OURS = """
import os, sys
from terrace.handover import Predecessor
predecessor = Predecessor.from_environment()
predecessor.loaded("9")
lock, estate = predecessor.receive()
"""


def raw(program: str) -> list[str]:
    """A successor that speaks for itself."""
    return [sys.executable, "-ISc", RAW + program]


def ours(program: str) -> list[str]:
    """One that uses the module."""
    return [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}, *{sys.path!r}]\n{OURS}{program}"]


def run(test: Callable[[], Awaitable[None]], timeout_s: float = 20.0) -> None:
    async def bounded() -> None:
        with trio.fail_after(timeout_s):
            await test()

    trio.run(bounded)


def descriptors() -> set[str]:
    """Of this process: number and what is behind it."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # what the directory itself was read by
            found.add(f"{entry.name}: {entry.readlink()}")
    return found


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes of all successors that the test starts; they are dead and reaped when it ends."""
    processes: list[subprocess.Popen[bytes]] = []
    spawn = handover._spawn

    def spying(*arguments: object) -> subprocess.Popen[bytes]:
        processes.append(spawn(*arguments))  # type: ignore[arg-type]
        return processes[-1]

    monkeypatch.setattr(handover, "_spawn", spying)
    yield processes
    for process in processes:
        with pytest.raises(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)


@contextmanager
def nothing_stays_open() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() == before


def an_estate(sockets: ExitStack, clients: int = 2) -> Estate:
    listening = sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
    suspended = []
    for number in range(clients):
        one, other = socket.socketpair()
        sockets.enter_context(one)
        sockets.enter_context(other)
        suspended.append(Suspended(one, f"peer {number}", "p/v", "id", Session(), input=bytes([number % 256])))
    return Estate([PassedListener(listening, "n", True, True)], suspended, ["p"], ["default"], "1", time.monotonic())


async def hand_over(command: Sequence[str], clients: int = 2) -> None:
    """All of it, as the daemon does."""
    lock = os.memfd_create("lock")
    with ExitStack() as sockets:
        try:
            estate = an_estate(sockets, clients)
            successor = await Successor.start(command)
            await successor.take(lock, estate)
            await successor.commit()
        finally:
            os.close(lock)


def refusal(command: Sequence[str], clients: int = 2) -> HandoverError:
    """What it says that didn't come to the hand-over. Nothing stays open, whoever failed."""
    found: list[HandoverError] = []

    async def test() -> None:
        await trio.to_thread.run_sync(int)  # so that trio's own descriptors are there
        with nothing_stays_open():
            with pytest.raises(HandoverError) as caught:
                await hand_over(command, clients)
            found.append(caught.value)

    run(test)
    text = str(found[0])
    assert "\n" not in text and not text.startswith("[Errno") and len(text) > 20, text
    return found[0]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("", "the other terraced has ended; the log says why"),
        ("sys.exit(1)", "has ended"),
        ("sock.close(); time.sleep(600)", "has ended"),
        ("sock.send(b'')\ntime.sleep(600)", "has ended"),
        ("sock.send(b'\\xff garbage')\ntime.sleep(600)", "b'\\xff garbage' came where 'loaded' belongs"),
        ("sock.send(b'[1]')\ntime.sleep(600)", "b'[1]' came where 'loaded' belongs"),
        ("sock.send(b'[' * 60000)\ntime.sleep(600)", "came where 'loaded' belongs"),
        ("sock.send(b'\"' + b' ' * 100000 + b'\"')\ntime.sleep(600)", "says more than 65536 bytes"),
        ("say('ready')\ntime.sleep(600)", "'ready' came where 'loaded' belongs"),
        ("socket.send_fds(sock, [b'{}'], [0, 1, 2])\ntime.sleep(600)", "None came where 'loaded' belongs"),
        ("say('failed', why='terraced.toml: it is bad in every way')", "terraced.toml: it is bad in every way"),
        ("say('loaded', version='9.1', format=2)\ntime.sleep(600)", "terraced 9.1 can't take over from this one"),
        ("say('loaded')\ntime.sleep(600)", "can't take over from this one"),
        ("loaded()", "has ended"),
        ("loaded(); hear(); sys.exit(3)", "has ended"),
        ("loaded(); hear(); hear(); os.kill(os.getpid(), signal.SIGKILL)", "has ended"),
        ("taken(); say('failed', why='pool p: a device is missing')", "pool p: a device is missing"),
        ("taken(); say('loaded'); time.sleep(600)", "'loaded' came where 'ready' belongs"),
        ("taken(); sock.send(b'?'); time.sleep(600)", "b'?' came where 'ready' belongs"),
        ("taken(); socket.send_fds(sock, [b'{}'], [0]); time.sleep(600)", "came where 'ready' belongs"),
    ],
)
def test_a_successor_that_does_not_what_it_should_costs_a_sentence(
    program: str, expected: str, started: list[subprocess.Popen[bytes]]
) -> None:
    assert expected in str(refusal(raw(program)))
    assert len(started) == 1


def test_one_that_can_not_be_started_costs_a_sentence(started: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    missing = refusal([str(tmp_path / "terraced")])
    assert f"the new terraced can't be started: [Errno 2] No such file or directory: '{tmp_path}/terraced'" in str(
        missing
    )
    assert not started


def test_one_that_is_never_loaded_is_killed(
    started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "LOADING_S", 0.2)
    error = refusal(raw("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"))
    assert (error.errno, str(error)) == (errno.ETIMEDOUT, "the new terraced was not loaded in 0.2 s")
    assert started[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "program",
    [
        "taken(); os.kill(os.getpid(), signal.SIGSTOP)",
        "loaded(); os.kill(os.getpid(), signal.SIGSTOP)",
        "taken(); time.sleep(600)",
    ],
)
@pytest.mark.parametrize("clients", [1, 300])
def test_one_that_is_stopped_or_hangs_while_clients_wait_is_killed(
    program: str, clients: int, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "OPENING_S", 0.3)
    error = refusal(raw(program), clients)
    assert error.errno == errno.ETIMEDOUT
    assert str(error) == "the new terraced had not opened the pools after 0.3 s"
    assert started[0].returncode == -signal.SIGKILL


def test_one_that_dies_between_ready_and_serve_is_reaped_and_does_not_serve(
    started: list[subprocess.Popen[bytes]],
) -> None:
    async def test() -> None:
        await trio.to_thread.run_sync(int)
        lock = os.memfd_create("lock")
        with nothing_stays_open(), ExitStack() as sockets:
            successor = await Successor.start(raw("taken(); say('ready')"))
            await successor.take(lock, an_estate(sockets))
            while not Path(f"/proc/{successor.pid}/stat").read_text().rpartition(")")[2].startswith(" Z"):
                await trio.sleep(0.005)
            with pytest.raises(HandoverError, match="has ended"):
                await successor.commit()
        os.close(lock)

    run(test)
    assert started[0].returncode == 0


def test_a_mistake_of_ours_costs_a_sentence_too(
    started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write(connections: object) -> bytes:
        raise TypeError("cannot pickle memoryview objects")

    monkeypatch.setattr(handover, "write", write)
    error = refusal(raw("loaded(); time.sleep(600)"))
    assert str(error) == (
        "internal error: TypeError: cannot pickle memoryview objects; the log says where, please report it"
    )
    assert caplog.records[0].exc_info
    assert started[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize("when", ["loading", "opening"])
def test_who_is_told_to_stop_meanwhile_ends_it(when: str, started: list[subprocess.Popen[bytes]]) -> None:
    async def test() -> None:
        await trio.to_thread.run_sync(int)
        with nothing_stays_open():
            with trio.move_on_after(0.3) as scope:
                await hand_over(raw("time.sleep(600)" if when == "loading" else "taken(); time.sleep(600)"))
            assert scope.cancelled_caught

    run(test)
    assert started[0].returncode == -signal.SIGKILL


def test_one_that_is_not_wanted_any_more_ends_by_itself() -> None:
    async def test() -> None:
        await trio.to_thread.run_sync(int)
        with nothing_stays_open():
            successor = await Successor.start(ours("sys.exit('not reached')"))
            successor.discard()
            # Nobody waits for it: here that is this test, which has not ended as a daemon would have.
            _, status = await trio.to_thread.run_sync(os.waitpid, successor.pid, 0)
            assert os.waitstatus_to_exitcode(status) == 1

    run(test)


def test_three_hundred_clients_arrive_each_with_its_own_bytes(tmp_path: Path) -> None:
    """And each with its socket: the successor answers on it."""
    command = ours(
        f"""
import json, pathlib
assert all(not os.get_inheritable(one.sock.fileno()) for one in (*estate.clients, *estate.listeners))
assert not os.get_inheritable(lock)
predecessor.ready()
for one in estate.clients:
    one.sock.send(one.peer.encode() + b" " + one.input)
pathlib.Path({str(tmp_path / "told")!r}).write_text(json.dumps([estate.version, estate.pools, estate.policies,
    [(one.name, one.ours, one.any_port, one.sock.getsockname()) for one in estate.listeners]]))
"""
    )

    async def test() -> None:
        await trio.to_thread.run_sync(int)
        lock = os.memfd_create("lock")
        with nothing_stays_open(), ExitStack() as sockets:
            listening = sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
            pairs = [socket.socketpair() for _ in range(2 * BATCH + 44)]
            for one, other in pairs:
                sockets.enter_context(one)
                sockets.enter_context(other)
            clients = [
                Suspended(one, f"peer {number}", "p/v", "id", Session(), input=bytes([number % 256]))
                for number, (one, _) in enumerate(pairs)
            ]
            listeners = [PassedListener(listening, "name", True, True)]
            successor = await Successor.start(command)
            await successor.take(lock, Estate(listeners, clients, ["p", "q"], ["gold"], "0.8", time.monotonic()))
            await successor.commit()
            for number, (_, other) in enumerate(pairs):
                expected = f"peer {number} ".encode() + bytes([number % 256])
                assert await trio.to_thread.run_sync(other.recv, 100) == expected
            _, status = await trio.to_thread.run_sync(os.waitpid, successor.pid, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            listener = ["name", True, True, list(listening.getsockname())]
            assert json.loads((tmp_path / "told").read_text()) == ["0.8", ["p", "q"], ["gold"], [listener]]
        os.close(lock)

    run(test)


def test_what_is_handed_over_is_inherited_by_no_other_child() -> None:
    """Of either process: neither by one that the predecessor starts meanwhile, nor by one of the successor's."""
    listing = "import os; print(len(os.listdir('/proc/self/fd')))"

    def seen_by_a_child() -> bytes:
        child = [sys.executable, "-ISc", listing]
        return subprocess.run(child, close_fds=False, capture_output=True, check=True).stdout

    command = ours(
        f"""
import subprocess
own = len(os.listdir("/proc/self/fd"))
assert own > 6
seen = subprocess.run([sys.executable, "-ISc", {listing!r}], close_fds=False, capture_output=True, check=True).stdout
assert int(seen) == 4, seen
predecessor.ready()
"""
    )

    async def test() -> None:
        lock = os.memfd_create("lock", os.MFD_CLOEXEC)
        with ExitStack() as sockets:
            estate = an_estate(sockets)
            before = seen_by_a_child()
            successor = await Successor.start(command)
            assert seen_by_a_child() == before
            await successor.take(lock, estate)
            await successor.commit()
            _, status = await trio.to_thread.run_sync(os.waitpid, successor.pid, 0)
            assert os.waitstatus_to_exitcode(status) == 0
        os.close(lock)

    run(test)


def test_a_successor_that_may_open_too_few_files_says_so(started: list[subprocess.Popen[bytes]]) -> None:
    limited = """
import resource
from terrace.handover import HandoverError
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
try:
    predecessor.receive()
except HandoverError as error:
    predecessor.failed(str(error))
"""
    program = [part.replace("lock, estate = predecessor.receive()", limited) for part in ours("")]
    assert "not all descriptors could be taken over: more files must be allowed" in str(refusal(program, 100))


# --- the successor's side ---


@contextmanager
def a_predecessor() -> Iterator[tuple[socket.socket, Predecessor]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        environment = {VARIABLE: str(theirs.detach()), "other": "x"}
        made = Predecessor.from_environment(environment)
        assert made is not None and environment == {"other": "x"}
        yield ours, made
        made._sock.close()


def test_who_was_started_like_any_other_has_no_predecessor() -> None:
    assert Predecessor.from_environment({}) is None


@pytest.mark.parametrize("text", ["", "x", "-1", "999", "1.5", "9" * 30, "stdin", "stream", "file"])
def test_a_variable_that_names_no_socket_of_a_predecessor_is_refused_and_nothing_closed(
    text: str, tmp_path: Path
) -> None:
    one, other = socket.socketpair()
    with one, other, (tmp_path / "file").open("w") as file:
        value = {"stream": str(one.fileno()), "file": str(file.fileno())}.get(text, text)
        with pytest.raises(HandoverError) as caught:
            Predecessor.from_environment({VARIABLE: value})
        assert f"TERRACE_HANDOVER is {value!r}, which is no socket of a running terraced" in str(caught.value)
        assert str(caught.value).endswith("; unset it")
        os.fstat(one.fileno())
        os.fstat(file.fileno())


def test_a_predecessor_that_is_gone_is_told_from_one_that_talks_nonsense() -> None:
    for said, expected in (
        (None, "the other terraced has ended"),
        (b"nonsense", "b'nonsense' came where 'take' belongs"),
        (b'{"say": "serve"}', "'serve' came where 'take' belongs"),
    ):
        with a_predecessor() as (running, predecessor):
            predecessor.loaded("1")
            assert running.recv(1000) == b'{"say": "loaded", "version": "1", "format": 1}'
            if said is None:
                running.close()
            else:
                running.send(said)
            with pytest.raises(HandoverError, match=expected):
                predecessor.receive()
            predecessor.failed("why")  # which nobody may hear any more


def test_a_predecessor_that_dies_before_it_says_serve_leaves_a_successor_that_does_not_serve() -> None:
    with a_predecessor() as (running, predecessor):
        running.close()
        with pytest.raises(HandoverError, match="the running terraced is gone"):
            predecessor.ready()
    with a_predecessor() as (running, predecessor):
        predecessor._say({"say": "ready"})
        running.close()  # with what was said to it unread
        with pytest.raises(HandoverError, match="has ended"):
            predecessor._hear("serve")
