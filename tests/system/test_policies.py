"""Policies with the real daemon: limits that a real client measures, and a full pool in which writes wait."""

from __future__ import annotations

import errno
import json
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.daemon import Daemon
from tests.system.nbdclient import READ, TRIM, WRITE, Connection
from tests.system.test_full import fill, until

pytestmark = pytest.mark.system
MIB = 1 << 20
POLICIES = """
[policy.iops]
iops_limit = 1000
[policy.slow]
iops_limit = 1
[policy.bandwidth]
bandwidth_limit = "8M"
[policy.queue]
when_full = "queue"
queue_timeout = "5m"
[policy.impatient]
when_full = "queue"
queue_timeout = "1s"
"""


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path / "home", POLICIES) as daemon:
        daemon.cli("pool", "create", "p", "--fast", f"{tmp_path}/fast=96M")
        yield daemon


def fio(daemon: Daemon, export: str, *options: str, depths: tuple[int, ...]) -> list[Any]:
    """What fio's NBD engine gets in five seconds, behind the first of them: a job for each depth, begun together."""
    program = shutil.which("fio")
    assert program is not None, "fio is missing (Debian: fio)"
    command = [program, "--ioengine=nbd", f"--uri={daemon.uri(export)}", "--output-format=json"]
    command += ["--time_based", "--ramp_time=1", "--runtime=5", "--size=4M", *options]
    for depth in depths:
        command += [f"--name=depth{depth}", f"--iodepth={depth}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd="/")
    jobs: list[Any] = json.loads(result.stdout[result.stdout.index("{") :])["jobs"]
    return jobs


@pytest.mark.alone
def test_a_real_client_gets_as_much_as_the_policy_says(own: Daemon) -> None:
    own.cli("volume", "create", "p/v", "16M", "--policy", "iops")
    (job,) = fio(own, "p/v", "--rw=randrw", "--bs=4k", depths=(32,))
    total = job["read"]["iops"] + job["write"]["iops"]
    assert total == pytest.approx(1000, rel=0.1)
    own.cli("volume", "policy", "p/v", "bandwidth")
    (job,) = fio(own, "p/v", "--rw=write", "--bs=64k", depths=(8,))
    assert job["write"]["bw_bytes"] == pytest.approx(8 * MIB, rel=0.1)


@pytest.mark.alone
def test_connections_of_a_volume_share_its_limit_and_a_change_counts_for_requests_that_wait(own: Daemon) -> None:
    own.cli("volume", "create", "p/v", "16M", "--policy", "iops")
    jobs = fio(own, "p/v", "--rw=randread", "--bs=4k", depths=(16, 120))
    modest, greedy = (job["read"]["iops"] for job in jobs)
    assert modest + greedy == pytest.approx(1000, rel=0.1)
    assert modest == pytest.approx(greedy, rel=0.25)

    own.cli("volume", "policy", "p/v", "slow")
    with Connection(own.socket, "p/v", timeout_s=100) as client:
        for _ in range(100):
            client.send(READ, 0, 4096)
        until("they wait", lambda: own.api("GET", "/v1/pools/p/volumes/v")["throttled"] > 90)
        assert "requests for the limits of the policy" in own.cli("volume", "show", "p/v").stdout
        own.cli("volume", "policy", "p/v", "default")
        begun_s = time.monotonic()
        for _ in range(100):
            assert client.reply().error == 0
        assert time.monotonic() - begun_s < 10, "at the old rate they take minutes"


def test_a_trim_passes_a_write_that_waits_on_the_same_connection(own: Daemon) -> None:
    own.cli("volume", "create", "p/v", "1G", "--policy", "default")
    with Connection(own.socket, "p/v") as client:
        filled = fill(client)
        own.cli("volume", "policy", "p/v", "queue")
        data = random.Random(7).randbytes(2 * MIB)
        # One of each way in which a WRITE reaches the storage: in a batch, and in pieces.
        waiting = {
            client.send(WRITE, filled, MIB, data[:MIB]): (filled, MIB),
            client.send(WRITE, filled + 8 * MIB, len(data), data): (filled + 8 * MIB, len(data)),
        }
        until("both wait", lambda: own.api("GET", "/v1/pools/p/volumes/v")["queued"] == 2)
        assert "2 requests for room in the pool" in own.cli("volume", "show", "p/v").stdout
        read = client.send(READ, 0, 4096)
        reply = client.reply()
        assert (reply.cookie, reply.error, len(reply.data)) == (read, 0, 4096)
        trim = client.send(TRIM, 0, 16 * MIB)
        cookies = []
        for _ in range(3):
            reply = client.reply()
            assert reply.error == 0
            cookies.append(reply.cookie)
        assert cookies[0] == trim
        assert set(cookies[1:]) == set(waiting)
        for offset, length in waiting.values():
            assert client.read(offset, length) == data[:length]
    own.cli("pool", "check", "p", "--full")


def test_writes_that_wait_are_bounded_and_a_deleted_volume_lets_them_go(own: Daemon) -> None:
    own.cli("volume", "create", "p/other", "1G")
    own.cli("volume", "create", "p/v", "1G", "--policy", "queue")
    with Connection(own.socket, "p/other") as client:
        fill(client)
    data = random.Random(8).randbytes(64 << 10)
    count = 200
    with Connection(own.socket, "p/v", timeout_s=60) as client:
        sender = threading.Thread(
            target=lambda: [client.send(WRITE, number * len(data), len(data), data) for number in range(count)]
        )
        sender.start()
        until("as many wait as may", lambda: own.api("GET", "/v1/pools/p/volumes/v")["queued"] >= 100)
        time.sleep(1)
        assert own.api("GET", "/v1/pools/p/volumes/v")["queued"] <= 128
        with Connection(own.socket, "p/v") as other:
            assert other.read(MIB, 4096) == bytes(4096)
        own.cli("volume", "delete", "p/other", "--yes")
        for _ in range(count):
            assert client.reply().error == 0
        sender.join()
        for number in range(count):
            assert client.read(number * len(data), len(data)) == data


def test_a_write_whose_time_is_up_gets_enospc_and_the_end_of_the_daemon_waits_for_none(own: Daemon) -> None:
    own.cli("volume", "create", "p/v", "1G", "--policy", "default")
    with Connection(own.socket, "p/v") as client:
        filled = fill(client)
        own.cli("volume", "policy", "p/v", "impatient")
        begun_s = time.monotonic()
        with pytest.raises(OSError, match="No space left") as error:
            client.write(filled, random.Random(1).randbytes(MIB))
        assert error.value.errno == errno.ENOSPC
        assert 0.9 < time.monotonic() - begun_s < 20
        own.cli("volume", "policy", "p/v", "queue")
        client.send(WRITE, filled, MIB, random.Random(1).randbytes(MIB))
        until("it waits", lambda: own.api("GET", "/v1/pools/p/volumes/v")["queued"] == 1)
        begun_s = time.monotonic()
        assert own.stop() == 0
        assert time.monotonic() - begun_s < 20
    own.start()
    assert own.cli_json("volume", "show", "p/v")["policy"] == "queue"
