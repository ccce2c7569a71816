"""What clients and operators may do wrong: each gets an error that names the thing, and no other volume notices."""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system import nbdclient
from tests.system.daemon import READY_TIMEOUT_S, ApiError, Daemon, environment, program
from tests.system.nbdclient import FLUSH, IHAVEOPT, OPT_GO, READ, REQUEST, REQUEST_MAGIC, WRITE, Connection

pytestmark = pytest.mark.system
MIB = 1 << 20
PATTERN = random.Random(1).randbytes(64 << 10)
PROMPT_S = 2.0


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all that must not harm it, with a volume that watches: `p/witness` holds PATTERN at 0."""
    directory = tmp_path_factory.mktemp("bad")
    with Daemon(directory / "home") as daemon:
        daemon.cli("pool", "create", "p", "--fast", f"{directory}/fast={256 * MIB}")
        daemon.cli("volume", "create", "p/witness", "64M")
        with Connection(daemon.socket, "p/witness") as connection:
            connection.write(0, PATTERN)
        yield daemon
        assert daemon.stop() == 0


@pytest.fixture
def witness(daemon: Daemon) -> Iterator[Connection]:
    """A second client, connected all the while, that must be served promptly and rightly afterwards."""
    with Connection(daemon.socket, "p/witness") as connection:
        yield connection
        assert_served(connection)
    assert daemon.alive()
    with Connection(daemon.socket, "p/witness") as newcomer:
        assert_served(newcomer)


def assert_served(connection: Connection) -> None:
    start_s = time.monotonic()
    assert connection.read(0, len(PATTERN)) == PATTERN
    assert time.monotonic() - start_s < PROMPT_S


def assert_one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The command line's contract for errors: one line on stderr that says what is wrong."""
    message = result.stderr.strip()
    assert "\n" not in message, message
    assert "Traceback" not in message
    for word in words:
        assert word.lower() in message.lower(), f"{word!r} not in {message!r}"


# Clients


def assert_closes(raw: socket.socket) -> None:
    """The server ends this connection, whatever it says before."""
    raw.settimeout(15)
    try:
        while raw.recv(65536):
            pass
    except ConnectionResetError:
        pass


@pytest.mark.parametrize("seed", range(3))
def test_garbage_instead_of_a_handshake_ends_only_its_own_connection(
    daemon: Daemon, witness: Connection, seed: int
) -> None:
    for address in (daemon.socket, ("127.0.0.1", daemon.port)):
        with nbdclient.connect(address) as raw:
            raw.sendall(b"\xff" + random.Random(seed).randbytes(70_000))
            assert_closes(raw)


def test_a_web_browser_ends_only_its_own_connection(daemon: Daemon, witness: Connection) -> None:
    with nbdclient.connect(("127.0.0.1", daemon.port)) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert_closes(raw)


def test_an_option_of_4_gib_ends_only_its_own_connection(daemon: Daemon, witness: Connection) -> None:
    with nbdclient.connect(daemon.socket) as raw:
        nbdclient.greet(raw)
        raw.sendall(struct.pack(">QII", IHAVEOPT, OPT_GO, 0xFFFFFFFF) + bytes(10_000))
        raw.shutdown(socket.SHUT_WR)
        assert_closes(raw)


@pytest.mark.parametrize("name", ["p/none", "none/witness", "../../etc/passwd", "p/\x00", "é" * 1000, "p/witness/"])
def test_an_export_that_is_not_there_is_refused_and_the_next_name_works(
    daemon: Daemon, witness: Connection, name: str
) -> None:
    with nbdclient.connect(daemon.socket) as raw:
        nbdclient.greet(raw)
        with pytest.raises(nbdclient.Refused) as refusal:
            list(nbdclient.option(raw, OPT_GO, go_request(name)))
        assert refusal.value.code in (6, 3)  # UNKNOWN, or INVALID for what can't be a name
        replies = list(nbdclient.option(raw, OPT_GO, go_request("p/witness")))
        assert replies


def go_request(name: str) -> bytes:
    encoded = name.encode()
    return struct.pack(">I", len(encoded)) + encoded + struct.pack(">H", 0)


def test_garbage_instead_of_a_request_ends_only_its_own_connection(daemon: Daemon, witness: Connection) -> None:
    with Connection(daemon.socket, "p/witness") as connection:
        connection.socket.sendall(random.Random(5).randbytes(100_000))
        assert_closes(connection.socket)


@pytest.mark.parametrize("sent", [1, 27, 28, 28 + 1000])
def test_half_a_request_writes_nothing(daemon: Daemon, witness: Connection, sent: int) -> None:
    with Connection(daemon.socket, "p/witness") as connection:
        request = REQUEST.pack(REQUEST_MAGIC, 0, WRITE, 1, 0, 4096) + b"\xee" * 4096
        connection.socket.sendall(request[:sent])
        time.sleep(0.05)
        assert_served(witness)


@pytest.mark.parametrize("command", [READ, WRITE])
def test_a_length_of_4_gib_is_an_error_and_takes_no_memory(daemon: Daemon, witness: Connection, command: int) -> None:
    before = resident_bytes(daemon)
    with Connection(daemon.socket, "p/witness") as connection:
        connection.send(command, 0, 0xFFFFF000)
        if command == READ:
            assert connection.reply().error in (errno.EINVAL, errno.EOVERFLOW, errno.ENOMEM)
            assert_served(connection)
        else:
            # Either it says no and drains, or it hangs up: nobody sends 4 GiB to find out.
            connection.socket.sendall(bytes(4 * MIB))
    assert resident_bytes(daemon) - before < 100 * MIB


@pytest.mark.parametrize("command", [READ, WRITE])
def test_an_offset_at_the_end_of_64_bits_is_an_error(daemon: Daemon, witness: Connection, command: int) -> None:
    with Connection(daemon.socket, "p/witness") as connection:
        for offset in ((1 << 64) - 4096, (1 << 63) - 1, connection.size_bytes, connection.size_bytes - 1):
            with pytest.raises(OSError) as error:
                connection.call(command, offset, 4096, PATTERN[:4096] if command == WRITE else b"")
            assert error.value.errno == (errno.EINVAL if command == READ else errno.ENOSPC)
        assert_served(connection)


def test_an_unknown_command_is_an_error_and_the_connection_goes_on(daemon: Daemon, witness: Connection) -> None:
    with Connection(daemon.socket, "p/witness") as connection:
        for command, flags in ((99, 0), (READ, 1 << 15), (FLUSH, 1 << 9)):
            with pytest.raises(OSError, match="Invalid argument"):
                connection.call(command, 0, 0 if command != READ else 4096, flags=flags)
        assert_served(connection)


def test_a_client_that_never_reads_its_replies_delays_nobody_and_takes_bounded_memory(
    daemon: Daemon, witness: Connection
) -> None:
    before = resident_bytes(daemon)
    with Connection(daemon.socket, "p/witness") as greedy:
        greedy.socket.settimeout(0.5)
        requests = b"".join(greedy.encode(READ, 0, 32 * MIB)[1] for _ in range(500))
        try:
            greedy.socket.sendall(requests)
            for _ in range(200):
                greedy.socket.sendall(requests)
        except TimeoutError:
            pass
        for _ in range(20):
            assert_served(witness)
        assert resident_bytes(daemon) - before < 200 * MIB


def test_a_client_that_says_nothing_is_not_waited_for(daemon: Daemon, witness: Connection) -> None:
    idle = [nbdclient.connect(daemon.socket) for _ in range(50)]
    try:
        assert_served(witness)
        with Connection(daemon.socket, "p/witness") as newcomer:
            assert_served(newcomer)
    finally:
        for raw in idle:
            raw.close()


def test_a_client_that_vanishes_in_mid_write_leaves_the_volume_usable(daemon: Daemon, witness: Connection) -> None:
    for _ in range(10):
        connection = Connection(("127.0.0.1", daemon.port), "p/witness")
        linger_zero = struct.pack("ii", 1, 0)
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_zero)
        for block in range(8):
            connection.send(WRITE, MIB + block * 65536, 65536, PATTERN)
        connection.socket.close()  # with a reset
    daemon.cli("volume", "list")


def resident_bytes(daemon: Daemon) -> int:
    assert daemon.process is not None
    fields = Path(f"/proc/{daemon.process.pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


# The command line and the API


def test_an_address_already_bound_is_named_and_the_first_daemon_lives(
    daemon: Daemon, witness: Connection, tmp_path: Path
) -> None:
    config = tmp_path / "terraced.toml"
    config.write_text(f'[nbd]\nlisten = ["127.0.0.1:{daemon.port}"]\n')
    result = run_terraced("--home", str(tmp_path / "other"), "--config", str(config))
    assert result.returncode == 1
    assert_one_line(result, f"127.0.0.1:{daemon.port}", "in use")


def test_a_second_daemon_on_the_same_home_is_refused(daemon: Daemon, witness: Connection, tmp_path: Path) -> None:
    config = tmp_path / "terraced.toml"
    config.write_text('[nbd]\nlisten = ["127.0.0.1:0"]\n')
    result = run_terraced("--home", str(daemon.home), "--config", str(config))
    assert result.returncode == 1
    assert_one_line(result, str(daemon.home))


def test_a_wrong_key_in_the_configuration_is_named_with_its_line(tmp_path: Path) -> None:
    config = tmp_path / "terraced.toml"
    config.write_text('[nbd]\nlisten = ["127.0.0.1:0"]\n\n[pool]\ncheckpoint_intervall_s = 3\n')
    result = run_terraced("--home", str(tmp_path / "home"), "--config", str(config))
    assert result.returncode != 0
    assert_one_line(result, "terraced.toml:5", "checkpoint_intervall_s")


def run_terraced(*options: str) -> subprocess.CompletedProcess[str]:
    """A daemon that is expected to refuse."""
    command = [*program("terraced", "terrace.daemon"), *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=READY_TIMEOUT_S, env=environment(), check=False
    )


def test_a_command_without_a_daemon_says_that_none_runs(tmp_path: Path) -> None:
    result = Daemon(tmp_path / "nowhere").cli("pool", "list", status=1)
    assert_one_line(result, "terraced")


def test_a_volume_in_use_is_not_deleted(daemon: Daemon, witness: Connection) -> None:
    result = daemon.cli("volume", "delete", "p/witness", "--yes", status=1)
    assert_one_line(result, "p/witness", "use")
    with pytest.raises(ApiError) as refusal:
        daemon.api("DELETE", "/v1/pools/p/volumes/witness")
    assert (refusal.value.status, refusal.value.errno) == (409, "EBUSY")


@pytest.mark.parametrize("size", ["0", "-1", "7", str(1 << 63), "1e9", "ten", "", "10X", "9" * 400])
def test_a_size_that_no_volume_can_have_is_refused(daemon: Daemon, witness: Connection, size: str) -> None:
    result = daemon.cli("volume", "create", "p/odd", "--", size, status=None)
    assert result.returncode in (1, 2)
    assert_one_line(result, "bytes")
    assert volume_names(daemon) == ["witness"]


@pytest.mark.parametrize(
    "size", [0, -1, 7, 1 << 63, 1 << 200, 4097, 1.5, "ten", None, True, [4096]], ids=lambda size: repr(size)[:20]
)
def test_the_api_refuses_a_size_that_no_volume_can_have(daemon: Daemon, witness: Connection, size: object) -> None:
    with pytest.raises(ApiError) as refusal:
        daemon.api("POST", "/v1/pools/p/volumes", {"name": "odd", "size": size})
    assert 400 <= refusal.value.status < 500
    assert refusal.value.errno == "EINVAL"
    assert volume_names(daemon) == ["witness"]


BAD_NAMES = ["a/b", "a\nb", "a" * 300, "", ".", "..", "-x", "a b", "é", "a@b", "\x1b[31m", "a\x7f"]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_that_no_volume_can_have_is_refused(daemon: Daemon, witness: Connection, name: str) -> None:
    result = daemon.cli("volume", "create", "--", f"p/{name}", "1M", status=None)
    assert result.returncode in (1, 2)
    assert_one_line(result)
    assert "\x1b" not in result.stderr
    with pytest.raises(ApiError) as refusal:
        daemon.api("POST", "/v1/pools/p/volumes", {"name": name, "size": MIB})
    assert (refusal.value.status, refusal.value.errno) == (400, "EINVAL")
    assert volume_names(daemon) == ["witness"]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_that_no_pool_can_have_is_refused_and_makes_no_file(
    daemon: Daemon, witness: Connection, name: str, tmp_path: Path
) -> None:
    result = daemon.cli("pool", "create", f"--fast={tmp_path}/device=64M", "--", name, status=None)
    assert result.returncode in (1, 2)
    assert_one_line(result)
    assert list(tmp_path.iterdir()) == []
    assert [pool["name"] for pool in daemon.api("GET", "/v1/pools")] == ["p"]


def volume_names(daemon: Daemon) -> list[str]:
    return [volume["name"].removeprefix("p/") for volume in daemon.api("GET", "/v1/pools/p/volumes")]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"name": 1}'])
def test_a_request_body_that_is_no_volume_is_refused(daemon: Daemon, witness: Connection, body: bytes) -> None:
    status = raw_http(daemon, b"POST /v1/pools/p/volumes HTTP/1.1", body)
    assert 400 <= status < 500


def raw_http(daemon: Daemon, line: bytes, body: bytes) -> int:
    with nbdclient.connect(daemon.home / "api.sock") as raw:
        raw.sendall(line + b"\r\nHost: t\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        return int(nbdclient.receive(raw, 12).split()[1])


# Devices that must not become a pool's


def test_a_device_with_a_filesystem_is_refused_without_force(daemon: Daemon, tmp_path: Path) -> None:
    device = tmp_path / "device"
    make_sparse(device, 64 * MIB)
    subprocess.run(["/sbin/mke2fs", "-q", "-F", "-t", "ext4", device], check=True)
    result = daemon.cli("pool", "create", "q", "--fast", str(device), status=1)
    assert_one_line(result, str(device), "ext4", "--force")
    daemon.cli("pool", "create", "q", "--fast", str(device), "--force")
    daemon.api("DELETE", "/v1/pools/q")


def test_a_device_that_another_pool_uses_is_refused(daemon: Daemon) -> None:
    (device,) = daemon.pool("p")["devices"]
    result = daemon.cli("pool", "create", "q", "--fast", device["path"], status=1)
    assert_one_line(result, device["path"])
    forced = daemon.cli("pool", "create", "q", "--fast", device["path"], "--force", status=1)
    assert_one_line(forced, device["path"])


def test_a_device_listed_twice_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    device = tmp_path / "device"
    make_sparse(device, 64 * MIB)
    (tmp_path / "link").symlink_to(device)
    for second in (device, tmp_path / "link", Path(f"{tmp_path}/../{tmp_path.name}/device")):
        result = daemon.cli("pool", "create", "q", "--fast", str(device), "--base", str(second), status=1)
        assert_one_line(result, "twice")


@pytest.mark.parametrize(
    "device",
    ["{}/none", "{}/none/deeper=64M", "{}/dir", "{}/tiny", "{}/new=0", "{}/new=1M", "{}/new=8E", "/dev/null"],
)
def test_a_device_that_can_not_be_one_is_refused_by_name(daemon: Daemon, tmp_path: Path, device: str) -> None:
    (tmp_path / "dir").mkdir()
    make_sparse(tmp_path / "tiny", 4096)
    result = daemon.cli("pool", "create", "q", "--fast", device.format(tmp_path), status=None)
    assert result.returncode in (1, 2)
    assert_one_line(result, device.format(tmp_path).partition("=")[0])
    assert not (tmp_path / "new").exists()
    assert [pool["name"] for pool in daemon.api("GET", "/v1/pools")] == ["p"]


def make_sparse(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        file.truncate(size_bytes)
