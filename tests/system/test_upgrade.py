"""The daemon is replaced under real clients, again and again: a pause, no error, no wrong byte.

And one of the two processes is killed at any moment of it. A failure of that prints its seed; `UPGRADE_SEED=N` repeats
its choices, `UPGRADE_ROUNDS=N` makes more of them.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.daemon import Daemon, orphans_come_to_us
from tests.system.fioload import Fio
from tests.system.nbdclient import READ, WRITE, Connection
from tests.system.verifier import Image, Worker, fill, payload, verify

pytestmark = pytest.mark.system
MIB = 1 << 20
SEED = int(os.environ.get("UPGRADE_SEED") or random.SystemRandom().randrange(1 << 32))
ROUNDS = int(os.environ.get("UPGRADE_ROUNDS") or 4)
UPGRADES = 5


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """With the volumes p/a and p/b, of 32 MiB."""
    directory = tmp_path_factory.mktemp("u")
    with Daemon(directory / "home") as running:
        running.cli(*("pool", "create", "p", "--fast", f"{directory}/fast=256M", "--base", f"{directory}/base=512M"))
        for name in ("a", "b"):
            running.api("POST", "/v1/pools/p/volumes", {"name": name, "size": 32 * MIB})
        yield running
        assert running.stop() == 0, running.tail()
        assert "Traceback" not in running.log.read_text()


def until(what: str, condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.01)
    return found


def requests(daemon: Daemon) -> int:
    """How many this process has served, and those before it on connections that it goes on with."""
    return int(daemon.api("GET", "/v1/status")["nbd"]["total"]["requests"])


def open_files(pid: int) -> int:
    """The fewest within a second: connections of requests to the API, of which none comes meanwhile, end by then."""
    least, deadline_s = math.inf, time.monotonic() + 1.0
    while time.monotonic() < deadline_s:
        least = min(least, len(list(Path(f"/proc/{pid}/fd").iterdir())))
        time.sleep(0.05)
    return int(least)


def test_fio_sees_a_pause_and_no_error_through_five_upgrades(daemon: Daemon) -> None:
    with Fio(daemon.uri("p/a")) as one, Fio(daemon.uri("p/b", tcp=True)) as other:
        until("both are at work", lambda: requests(daemon) > 5000)
        files = []
        for _ in range(UPGRADES):
            told = daemon.upgrade()
            assert told["succession"]["clients"] == 2
            served = requests(daemon)
            until("they go on", lambda enough=served + 1000: requests(daemon) > enough)
            files.append(open_files(told["pid"]))
        assert files[-1] < files[0] + UPGRADES - 1, f"more and more files are open: {files}"
        for fio in (one, other):
            report = fio.stop()
            assert report.writes > 500 * UPGRADES and report.reads > 500


def test_two_hundred_idle_clients_and_four_busy_ones_go_on(daemon: Daemon) -> None:
    images = [Image(f"p/{name}", 32 * MIB, payload(random.Random(1))) for name in "ab"]
    tcp = ("127.0.0.1", daemon.port)
    with ExitStack() as clients:
        idle = [clients.enter_context(Connection(daemon.socket if n % 2 else tcp, "p/a")) for n in range(200)]
        for image in images:
            fill(daemon.socket, image)
        addresses: tuple[Path | tuple[str, int], ...] = (daemon.socket, tcp)
        workers = [Worker(image, address, 8, random.Random(7)) for image in images for address in addresses]
        for worker in workers:
            worker.start()
        until("all four are busy", lambda: sum(image.acknowledged for image in images) > 500)
        told = daemon.upgrade()
        assert not any(worker.failure for worker in workers), [worker.failure for worker in workers]
        assert told["succession"]["clients"] == 204
        before = sum(image.acknowledged for image in images)
        until("the busy ones go on", lambda: sum(image.acknowledged for image in images) > before + 500)
        for connection in idle:
            connection.flush()
        assert not any(worker.failure for worker in workers), [worker.failure for worker in workers]
        daemon.upgrade()
        for connection in idle[::20]:
            assert len(connection.read(0, 4096)) == 4096
        daemon.kill()
        for worker in workers:
            worker.join()
    daemon.start()
    for image in images:
        verify(daemon.socket, image)


@pytest.mark.alone
def test_a_client_that_does_not_read_its_replies_holds_nobody_up_and_loses_none(daemon: Daemon) -> None:
    data = random.Random(2).randbytes(MIB)
    with Connection(daemon.socket, "p/a") as client, Connection(daemon.socket, "p/a") as other:
        other.write(0, data)
        sent = [client.send(READ, n * 4096, MIB - 65536) for n in range(16)]
        time.sleep(0.2)
        told = daemon.upgrade()
        assert told["succession"]["pause_s"] < 5
        assert other.read(0, MIB) == data
        for _ in sent:
            reply = client.reply()
            number = sent.index(reply.cookie)
            assert (reply.error, reply.data) == (0, data[number * 4096 :][: MIB - 65536])


def test_a_write_that_waits_for_room_waits_on_and_is_done_when_there_is_room(tmp_path: Path) -> None:
    with Daemon(tmp_path / "home", '[policy.queue]\nwhen_full = "queue"\nqueue_timeout = "5m"\n') as daemon:
        daemon.cli("pool", "create", "p", "--fast", f"{tmp_path}/fast=96M")
        daemon.api("POST", "/v1/pools/p/volumes", {"name": "v", "size": 1 << 30, "policy": "queue"})
        data = random.Random(3).randbytes(MIB)

        def queued() -> int:
            return int(daemon.api("GET", "/v1/pools/p/volumes/v")["queued"])

        with Connection(daemon.socket, "p/v") as client, Connection(daemon.socket, "p/v") as other:
            at = 0
            client.socket.settimeout(2)
            try:
                while True:
                    cookie = client.send(WRITE, at, MIB, data)
                    client.reply()
                    at += MIB
            except TimeoutError:
                client.socket.settimeout(30)
            assert at > 40 * MIB
            until("it waits", lambda: queued() >= 1)
            daemon.upgrade()
            until("it waits on", lambda: queued() >= 1)
            assert other.read(at - MIB, MIB) == data
            other.trim(0, 16 * MIB)
            reply = client.reply()
            assert (reply.cookie, reply.error) == (cookie, 0)
            assert other.read(at, MIB) == data
            assert other.read(at - MIB, MIB) == data
        assert daemon.stop() == 0


def test_qemu_s_clients_go_on(daemon: Daemon, tmp_path: Path) -> None:
    proxy_socket = tmp_path / "proxy"
    uri = daemon.uri("p/b", tcp=True)
    proxy = subprocess.Popen(["qemu-nbd", "-f", "raw", "--persistent", f"--socket={proxy_socket}", uri], cwd=tmp_path)
    qemu_io = subprocess.Popen(
        ["qemu-io", "-f", "raw", "-t", "writeback", daemon.uri("p/a")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
    )
    try:
        assert qemu_io.stdin is not None
        until("qemu-nbd listens", proxy_socket.exists)
        with Connection(proxy_socket, "") as through:
            through.write(0, b"through" * 1000)
            qemu_io.stdin.write("write -P 0x5a 1M 64k\naio_write -P 0x77 4M 1M\n")
            qemu_io.stdin.flush()
            daemon.upgrade()
            assert through.read(0, 7000) == b"through" * 1000
            through.write(MIB, b"after" * 1000)
            through.flush()
        said, _ = qemu_io.communicate("aio_flush\nread -P 0x5a 1M 64k\nread -P 0x77 4M 1M\nflush\nquit\n", timeout=30)
        assert qemu_io.returncode == 0
        assert said.count("read ") == 2 and "failed" not in said and "error" not in said.lower(), said
        with Connection(daemon.socket, "p/b") as direct:
            assert direct.read(MIB, 5000) == b"after" * 1000
    finally:
        for process in (proxy, qemu_io):
            process.kill()
            process.communicate()


def test_an_attached_device_sees_a_pause_only(daemon: Daemon) -> None:
    attached = json.loads(daemon.cli("attach", "p/a", "--driver", "fuse", "-o", "json").stdout)
    try:
        before = random.Random(4).randbytes(8 * MIB)
        done: list[int] = []
        failure: list[BaseException] = []
        stop = threading.Event()
        device = os.open(attached["device"], os.O_RDWR | os.O_SYNC)

        def write() -> None:
            try:
                while not stop.is_set():
                    for at in range(0, len(before), 65536):
                        os.pwrite(device, before[at : at + 65536], at)
                        done.append(at)
            except BaseException as error:
                failure.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            until("it writes", lambda: len(done) > 20)
            daemon.upgrade()
            count = len(done)
            until("it goes on", lambda: len(done) > count + 20)
        finally:
            stop.set()
            writer.join(30)
            os.close(device)
        assert not failure, failure
        (listed,) = daemon.cli_json("attach", "--list")
        assert (listed["keeper"], listed["device"]) == (attached["keeper"], attached["device"])
    finally:
        daemon.cli("detach", "p/a")
    with Connection(daemon.socket, "p/a") as client:
        assert client.read(0, 8 * MIB) == before
    assert not re.search(r"connection to the daemon|connecting again", daemon.log.read_text())


# --- and one of the two is killed ---


# A connection that is refused leaves its socket to the collector, in httpcore.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_acknowledged_byte_is_lost_when_one_of_the_two_is_killed_at_any_moment(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    with Daemon(tmp_path / "home") as daemon:
        daemon.cli("pool", "create", "k", "--fast", f"{tmp_path}/fast=32M", "--base", f"{tmp_path}/base=96M")
        data = payload(rng)
        images = [Image(f"k/{name}", size, data) for name, size in (("large", 24 * MIB), ("small", 8 * MIB))]
        for image in images:
            daemon.cli("volume", "create", image.name, str(image.size_bytes))
            fill(daemon.socket, image)
        try:
            for number in range(ROUNDS):
                print(f"round {number + 1}: {kill_one(daemon, images, rng)}")
        except Exception as error:
            error.add_note(f"round {number + 1} of UPGRADE_SEED={SEED}; daemon's log:\n{daemon.tail(80)}")
            raise
        daemon.cli("pool", "check", "k", "--full")
        assert daemon.stop() == 0


def kill_one(daemon: Daemon, images: list[Image], rng: random.Random) -> str:
    """Load, upgrade, kill, and check every byte. Leaves the daemon running."""
    workers = [
        Worker(image, address, rng.choice([1, 4, 16]), random.Random(rng.random()))
        for image in images
        for address in (daemon.socket, ("127.0.0.1", daemon.port))
    ]
    for worker in workers:
        worker.start()
    whom = rng.choice(["successor", "predecessor"])
    # Half of them early, half of them from where clients are being stopped.
    late, delay_s = rng.random() < 0.7, rng.uniform(0, 0.2)
    assert daemon.process is not None
    predecessor, size = daemon.process, daemon.log.stat().st_size
    with orphans_come_to_us():
        daemon.api("POST", "/v1/upgrade", {})
        successor = int(until("a successor is started", lambda: successors(predecessor.pid)))
        if late:
            until("clients are stopped", lambda: "clients for the next terraced" in daemon.log.read_text()[size:])
        time.sleep(delay_s)
        try:
            os.kill(successor if whom == "successor" else predecessor.pid, signal.SIGKILL)
        except ProcessLookupError:
            assert predecessor.poll() == 0  # the hand-over was quicker
        alive = until("one serves, or none is left", lambda: settled(daemon), 30)
        if alive == successor:
            daemon.follow(successor, status=predecessor.wait(20))
        else:
            with suppress(ChildProcessError):  # where its parent has reaped it
                os.waitpid(successor, 0)
    how = "nobody was left"
    if alive != "nobody":
        how = f"the {'successor' if alive == successor else 'predecessor'} went on"
        before = sum(image.acknowledged for image in images)
        until("clients go on", lambda: sum(image.acknowledged for image in images) > before + 50)
    daemon.kill()
    for worker in workers:
        worker.join()
    daemon.start()
    for image in images:
        verify(daemon.socket, image)
    return f"the {whom} was killed {delay_s * 1e3:.0f} ms after {'clients stopped' if late else 'its start'}: {how}"


def successors(pid: int) -> str:
    """Children of any of a process's threads."""
    return "".join(file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children"))


def settled(daemon: Daemon) -> int | str | None:
    """The process that serves; `nobody` if none has the home; None as long as neither is sure."""
    if not daemon.holders():
        return "nobody"
    try:
        now = daemon.api("GET", "/v1/upgrade", timeout_s=0.5)
    except httpx.TransportError:
        return None
    return int(now["pid"]) if now["state"] == "idle" else None
