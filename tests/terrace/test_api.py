"""The control API: what it answers, what it refuses, and that nothing a client sends ends it."""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.daemon import ApiError
from tests.system.nbdclient import Connection, Refused
from tests.terrace.fakedaemon import FakeDaemon

MIB = 1 << 20


def refusal(daemon: FakeDaemon, method: str, path: str, body: Any = None) -> ApiError:
    with pytest.raises(ApiError) as error:
        daemon.api(method, path, body)
    return error.value


def test_a_pool_lives_from_creation_over_growth_to_deletion(daemon: FakeDaemon, tmp_path: Path) -> None:
    fast = {"path": f"{tmp_path}/fast", "tier": "fast", "size": "64M"}
    base = {"path": f"{tmp_path}/base", "tier": "base", "size": 128 * MIB}
    made = daemon.api("POST", "/v1/pools", {"name": "q", "devices": [fast]})
    assert (made["name"], made["state"], made["capacity_bytes"]) == ("q", "online", 64 * MIB)
    assert [pool["name"] for pool in daemon.api("GET", "/v1/pools")] == ["p", "q"]
    grown = daemon.api("POST", "/v1/pools/q/grow", {"devices": [base]})
    assert [(device["path"], device["tier"]) for device in grown["devices"]] == [
        (f"{tmp_path}/fast", "fast"),
        (f"{tmp_path}/base", "base"),
    ]
    assert daemon.api("GET", "/v1/pools/q") == grown
    assert daemon.api("POST", "/v1/pools/q/checkpoint")["name"] == "q"
    assert daemon.api("POST", "/v1/pools/q/open")["state"] == "online"
    assert daemon.api("DELETE", "/v1/pools/q") is None
    assert not daemon.directory("q").exists()
    assert (tmp_path / "fast").exists()
    assert refusal(daemon, "GET", "/v1/pools/q").status == 404


def test_a_volume_lives_from_creation_over_resizing_to_deletion(daemon: FakeDaemon) -> None:
    made = daemon.api("POST", "/v1/pools/p/volumes", {"name": "v", "size": "1M"})
    assert made == {"name": "p/v", "size_bytes": MIB, "mapped_bytes": 0, "open_count": 0} | made
    assert daemon.api("GET", "/v1/pools/p/volumes") == [made]
    assert daemon.api("PATCH", "/v1/pools/p/volumes/v", {"size": 2 * MIB})["size_bytes"] == 2 * MIB
    shrinking = refusal(daemon, "PATCH", "/v1/pools/p/volumes/v", {"size": MIB})
    assert (shrinking.status, shrinking.errno) == (400, "EINVAL")
    assert "--shrink" in shrinking.message
    assert daemon.api("GET", "/v1/pools/p/volumes/v")["size_bytes"] == 2 * MIB
    assert daemon.api("PATCH", "/v1/pools/p/volumes/v", {"size": MIB, "shrink": True})["size_bytes"] == MIB
    assert daemon.api("DELETE", "/v1/pools/p/volumes/v") is None
    assert daemon.api("GET", "/v1/pools/p/volumes") == []


def test_exports_are_volumes_and_snapshots_each_with_an_identity_of_its_own(daemon: FakeDaemon) -> None:
    assert daemon.api("GET", "/v1/pools/p/exports") == []
    for name in ("x", "x-2"):
        daemon.api("POST", "/v1/pools/p/volumes", {"name": name, "size": MIB})
    with Connection(daemon.socket, "p/x") as client:
        client.write(0, b"x" * 8192)
    daemon.api("POST", "/v1/pools/p/volumes/x/snapshots", {"name": "s"})
    daemon.api("PATCH", "/v1/pools/p/volumes/x", {"size": 2 * MIB})
    listed = daemon.api("GET", "/v1/pools/p/exports")
    assert [(one["name"], one["size_bytes"], one["read_only"]) for one in listed] == [
        ("p/x", 2 * MIB, False),
        ("p/x-2", MIB, False),
        ("p/x@s", MIB, True),
    ]
    assert [one["allocated_bytes"] for one in listed[:2]] == [8192, 0]
    assert listed[2]["created_at"] > 0
    assert len({one["identity"] for one in listed}) == 3
    for one in listed:
        path = one["name"].partition("/")[2].replace("@", "%40")
        assert daemon.api("GET", f"/v1/pools/p/exports/{path}") == one
    for wrong in ("y", "x%40none", "y%40s", "x%40", "%40s", "x%40s%40s", "a%2Fb", "%0A"):
        error = refusal(daemon, "GET", f"/v1/pools/p/exports/{wrong}")
        assert (error.status, error.errno) == (404, "ENOENT")
    daemon.api("DELETE", "/v1/pools/p/volumes/x/snapshots/s")
    for name in ("x", "x-2"):
        daemon.api("DELETE", f"/v1/pools/p/volumes/{name}")
    assert daemon.api("GET", "/v1/pools/p/exports") == []
    assert refusal(daemon, "GET", "/v1/pools/none/exports").status == 404


def test_what_is_in_use_is_not_deleted_and_its_client_is_not_disturbed(daemon: FakeDaemon) -> None:
    daemon.api("POST", "/v1/pools/p/volumes", {"name": "busy", "size": MIB})
    with Connection(daemon.socket, "p/busy") as client:
        assert daemon.api("GET", "/v1/pools/p/volumes/busy")["open_count"] == 1
        for path in ("/v1/pools/p/volumes/busy", "/v1/pools/p"):
            error = refusal(daemon, "DELETE", path)
            assert (error.status, error.errno) == (409, "EBUSY")
            assert "p/busy" in error.message
        (connection,) = daemon.api("GET", "/v1/status")["nbd"]["connections"]
        assert connection["export"] == "p/busy"
        client.write(0, b"x" * 4096)
    while daemon.api("GET", "/v1/pools/p/volumes/busy")["open_count"]:
        time.sleep(0.01)
    daemon.api("DELETE", "/v1/pools/p/volumes/busy")


@pytest.mark.parametrize(
    ("method", "path", "status", "number"),
    [
        ("GET", "/", 404, "ENOENT"),
        ("GET", "/v2/status", 404, "ENOENT"),
        ("POST", "/v1/status", 405, "ENOTSUP"),
        ("GET", "/v1/pools/none", 404, "ENOENT"),
        ("DELETE", "/v1/pools/none", 404, "ENOENT"),
        ("POST", "/v1/pools/none/check", 404, "ENOENT"),
        ("GET", "/v1/pools/p/volumes/none", 404, "ENOENT"),
        ("DELETE", "/v1/pools/p/volumes/none", 404, "ENOENT"),
        ("GET", "/v1/pools/p/volumes/a%2Fb", 404, "ENOENT"),
        ("GET", "/v1/pools/%00", 404, "ENOENT"),
        ("GET", "/v1/pools/..%2F..", 404, "ENOENT"),
        ("GET", "/v1/pools/" + "x" * 300, 404, "ENOENT"),
    ],
)
def test_what_is_not_there_is_said_to_be_missing(
    daemon: FakeDaemon, method: str, path: str, status: int, number: str
) -> None:
    error = refusal(daemon, method, path)
    assert (error.status, error.errno) == (status, number)


DEVICE = {"path": "/nonexistent/device", "tier": "fast"}


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("/v1/pools", {}, "name"),
        ("/v1/pools", {"name": "q", "devices": []}, "devices"),
        ("/v1/pools", {"name": "q", "devices": [DEVICE], "forse": True}, "forse"),
        ("/v1/pools", {"name": 7, "devices": [DEVICE]}, "name"),
        ("/v1/pools", {"name": "q", "devices": [DEVICE | {"tier": "slow"}]}, "devices.0.tier"),
        ("/v1/pools", {"name": "q", "devices": [DEVICE | {"path": "relative"}]}, "'relative' is not an absolute path"),
        ("/v1/pools", {"name": "q", "devices": [DEVICE | {"size": "10GB"}]}, "ambiguous"),
        ("/v1/pools", {"name": "q" * 300, "devices": [DEVICE]}, "name"),
        ("/v1/pools", {"name": "../q", "devices": [DEVICE]}, "name"),
        ("/v1/pools/p/volumes", {"name": "v"}, "size"),
        ("/v1/pools/p/volumes", {"name": "v", "size": 0}, "4096"),
        ("/v1/pools/p/volumes", {"name": "v", "size": -1}, "4096"),
        ("/v1/pools/p/volumes", {"name": "v", "size": 1 << 63}, "1 PiB"),
        ("/v1/pools/p/volumes", {"name": "v", "size": "-1"}, "negative"),
        ("/v1/pools/p/volumes", {"name": "v\n", "size": MIB}, "name"),
        ("/v1/pools/p/volumes", [], "the body: Input should be an object"),
    ],
)
def test_a_wrong_request_is_refused_with_the_field_that_is_wrong(
    daemon: FakeDaemon, path: str, body: Any, word: str
) -> None:
    error = refusal(daemon, "POST", path, body)
    assert (error.status, error.errno) == (400, "EINVAL")
    assert word in error.message
    assert [pool["name"] for pool in daemon.api("GET", "/v1/pools")] == ["p"]


def test_a_pool_that_could_not_be_created_leaves_nothing_behind(daemon: FakeDaemon) -> None:
    error = refusal(daemon, "POST", "/v1/pools", {"name": "q", "devices": [DEVICE]})
    assert (error.status, error.errno) == (404, "ENOENT")
    assert DEVICE["path"] in error.message
    assert not daemon.directory("q").exists()
    assert refusal(daemon, "GET", "/v1/pools/q").status == 404


def test_a_name_that_is_taken_is_refused_before_a_device_is_touched(daemon: FakeDaemon, tmp_path: Path) -> None:
    device = {"path": f"{tmp_path}/device", "tier": "fast", "size": "64M"}
    assert refusal(daemon, "POST", "/v1/pools", {"name": "p", "devices": [device]}).status == 409
    assert not (tmp_path / "device").exists()


def test_of_two_that_create_the_same_pool_at_once_one_wins(daemon: FakeDaemon, tmp_path: Path) -> None:
    outcomes: list[int] = []

    def create(number: int) -> None:
        device = {"path": f"{tmp_path}/{number}", "tier": "fast", "size": "64M"}
        try:
            daemon.api("POST", "/v1/pools", {"name": "race", "devices": [device]})
            outcomes.append(201)
        except ApiError as error:
            outcomes.append(error.status)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [201, 409, 409, 409]
    daemon.api("DELETE", "/v1/pools/race")


def test_a_check_streams_its_progress_and_then_its_report(daemon: FakeDaemon) -> None:
    (daemon.directory("p") / "slow-check").write_text("0.5")
    lines = list(check(daemon, "p"))
    (daemon.directory("p") / "slow-check").unlink()
    *progress, last = lines
    assert len(progress) >= 2
    assert all(set(line) == {"done_bytes", "total_bytes"} for line in progress)
    assert last["report"]["ok"] is True
    assert last["report"]["problems"] == []


def http(daemon: FakeDaemon) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(daemon.home / "api.sock"), verify=False), timeout=30)


def check(daemon: FakeDaemon, pool: str) -> Any:
    with (
        http(daemon) as client,
        client.stream("POST", f"http://terrace/v1/pools/{pool}/check", json={"full": True}) as response,
    ):
        assert response.headers["content-type"] == "application/x-ndjson"
        for line in response.iter_lines():
            yield json.loads(line)


def test_a_check_whose_client_went_away_ends_and_a_running_one_keeps_the_pool(daemon: FakeDaemon) -> None:
    (daemon.directory("p") / "slow-check").write_text("600")
    stream = check(daemon, "p")
    next(stream)
    error = refusal(daemon, "DELETE", "/v1/pools/p")
    assert (error.status, error.errno) == (409, "EBUSY")
    stream.close()
    (daemon.directory("p") / "slow-check").unlink()
    # The pool is free again as soon as the daemon has seen the client go: it can be opened, checked, deleted.
    daemon.api("POST", "/v1/pools/p/volumes", {"name": "v", "size": MIB})
    daemon.api("DELETE", "/v1/pools/p/volumes/v")
    assert list(check(daemon, "p"))[-1]["report"]["ok"]


@pytest.mark.alone
def test_the_stall_measurement_can_be_reset_and_is_told_first(daemon: FakeDaemon) -> None:
    daemon.api("GET", "/v1/pools")
    first = daemon.api("GET", "/v1/status?reset=1")
    assert first["loop_stall_max_ms"] > 0
    assert first["loop_stall_task"]
    assert daemon.api("GET", "/v1/status")["loop_stall_max_ms"] < 1000


def test_a_body_above_a_mebibyte_is_refused_announced_or_not(daemon: FakeDaemon) -> None:
    big = b"[" + b" " * MIB + b"]"

    def unannounced() -> Any:
        for at in range(0, len(big), 65536):
            yield big[at : at + 65536]

    with http(daemon) as client:
        for content in (big, unannounced()):
            response = client.post("http://terrace/v1/pools", content=content)
            assert response.status_code == 413
            assert response.json()["errno"] == "EFBIG"


def test_garbage_on_the_socket_ends_at_most_its_own_connection(daemon: FakeDaemon) -> None:
    seed = int(os.environ.get("TERRACE_SEED", random.randrange(1 << 32)))
    noise = random.Random(seed)
    beginnings = [
        b"",
        b"GET / HTTP/1.1\r\n",
        b"POST /v1/pools HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n",
        b"POST /v1/pools HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"POST /v1/pools HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /v1/status HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /v1/status HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        b"GET /v1/status HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: !!!!\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"GET /" + b"x" * 100_000,
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000,
        b"GET /v1/pools/\xff\xfe%ff HTTP/1.1\r\nHost: x\r\n\r\n",
    ]
    for beginning in beginnings * 2:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(0.05)
            raw.connect(str(daemon.home / "api.sock"))
            try:
                raw.sendall(beginning + noise.randbytes(noise.randrange(200)))
                raw.recv(65536)
            except OSError:
                pass
        assert daemon.api("GET", "/v1/pools")[0]["name"] == "p", f"TERRACE_SEED={seed}"
    assert daemon.alive()


def test_a_connection_that_the_http_server_fails_over_takes_no_request_with_it(own_daemon: FakeDaemon) -> None:
    own_daemon.start()
    upgrade = (
        b"GET /v1/status HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    with socket.socket(socket.AF_UNIX) as patient, socket.socket(socket.AF_UNIX) as raw:
        for connection in (patient, raw):
            connection.settimeout(10)
            connection.connect(str(own_daemon.home / "api.sock"))
        patient.sendall(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n")
        raw.sendall(upgrade + bytes(range(255, 55, -1)))
        own_daemon.wait_log("a connection to the control API was closed")
        patient.sendall(b"Connection: close\r\n\r\n")
        answer = bytearray()
        while chunk := patient.recv(65536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 200"), answer
    assert b"uptime_s" in answer


def test_a_pool_is_deleted_though_somebody_looks_at_it_who_gets_an_answer(
    own_daemon: FakeDaemon, tmp_path: Path
) -> None:
    own_daemon.start()
    device = {"path": f"{tmp_path}/d", "tier": "fast", "size": 64 << 20}
    own_daemon.api("POST", "/v1/pools", {"name": "p", "devices": [device]})
    own_daemon.api("POST", "/v1/pools/p/volumes", {"name": "v", "size": 1 << 20})
    slow = own_daemon.directory("p") / "slow-checkpoint"
    slow.write_text("1.5")
    with ThreadPoolExecutor(2) as pool:
        shown = pool.submit(own_daemon.api, "GET", "/v1/pools/p/volumes/v")
        time.sleep(0.5)
        assert not shown.done()
        assert own_daemon.api("DELETE", "/v1/pools/p") is None
        assert shown.result(timeout=10)["name"] == "p/v"
    assert own_daemon.api("GET", "/v1/pools") == []


def test_a_client_that_attaches_while_its_pool_is_being_deleted_is_refused_and_nobody_hangs(
    own_daemon: FakeDaemon, tmp_path: Path
) -> None:
    own_daemon.start()
    device = {"tier": "fast", "size": 64 << 20}
    for name in ("going", "staying"):
        own_daemon.api("POST", "/v1/pools", {"name": name, "devices": [device | {"path": f"{tmp_path}/{name}"}]})
        own_daemon.api("POST", f"/v1/pools/{name}/volumes", {"name": "v", "size": 1 << 20})
    (own_daemon.directory("going") / "stuck-close").write_text("1.5")
    with ThreadPoolExecutor(1) as pool:
        deleting = pool.submit(own_daemon.api, "DELETE", "/v1/pools/going")
        attempts = 0
        while own_daemon.api("GET", "/v1/pools/going")["state"] != "busy":
            assert not deleting.done(), deleting.result()
            time.sleep(0.01)
        while not deleting.done():
            try:
                with Connection(own_daemon.socket, "going/v"):
                    assert not attempts, "served again after it was gone"
            except Refused as refused:
                attempts += 1
                assert "going" in str(refused)
            with Connection(own_daemon.socket, "staying/v") as client:
                client.write(0, b"x" * 4096)
            time.sleep(0.05)
        assert deleting.result(timeout=10) is None
    assert attempts > 5
    with pytest.raises(Refused, match="there is no pool 'going'"), Connection(own_daemon.socket, "going/v"):
        pass
    assert own_daemon.alive()
