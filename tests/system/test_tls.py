"""TLS with clients that are not ours, and certificates of `terrace tls`: libnbd, qemu, nbdkit and fio."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from nbd.tls import client_context
from terrace.certificates import make_authority, make_client, make_server
from tests.nbd.certificates import DAY, Authority, Pair
from tests.system.conftest import Run
from tests.system.daemon import Daemon, environment, orphans_come_to_us
from tests.terrace.fakedaemon import command

pytestmark = pytest.mark.system
MIB = 1 << 20

CONFIG = """
[nbd.tls]
mode = "required"
[nbd.exports."p/secret"]
subjects = ["CN=owner"]
[nbd.exports."p/shown"]
read_only = true
[nbd.exports."p/here"]
addresses = ["unix"]
"""


@dataclass
class Site:
    """A daemon that wants TLS, and directories with certificates for its clients, good and bad ones."""

    daemon: Daemon
    directory: Path

    def certificates(self, name: str) -> Path:
        return self.daemon.home / "tls" / "clients" / name

    def uri(self, export: str = "p/v", certificates: str | Path = "backup") -> str:
        where = self.certificates(certificates) if isinstance(certificates, str) else certificates
        return f"nbds://127.0.0.1:{self.daemon.port}/{export}?tls-certificates={where}"

    def qemu(self, certificates: Path, export: str = "p/v") -> list[str]:
        """Options of qemu's programs for an image over TLS."""
        return [
            *("--object", f"tls-creds-x509,id=tls0,endpoint=client,dir={certificates}"),
            "--image-opts",
            f"driver=nbd,host=127.0.0.1,port={self.daemon.port},export={export},tls-creds=tls0",
        ]

    def log_since(self, position: int, *, lines: tuple[str, ...] = (), count: int = 0) -> str:
        """What was logged since. A client may leave before its line is there: waits for `count` of `lines`."""
        deadline = time.monotonic() + 10
        while True:
            log = self.daemon.log.read_text()[position:]
            if sum(log.count(text) for text in lines) >= count or time.monotonic() > deadline:
                return log
            time.sleep(0.02)

    def position(self) -> int:
        return len(self.daemon.log.read_text())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("tls")
    daemon = Daemon(directory / "home", CONFIG)
    # As `terrace tls init` and `client` make them.
    made = daemon.home / "tls"
    make_authority(made, "test", 2)
    make_server(made, ["nbd.example"], 2)
    for name in ("backup", "owner"):
        make_client(made, name, 2)
    with daemon:
        device = {"path": f"{directory}/fast", "tier": "fast", "size": 256 * MIB}
        daemon.api("POST", "/v1/pools", {"name": "p", "devices": [device]})
        for name in ("v", "secret", "shown", "here"):
            daemon.api("POST", "/v1/pools/p/volumes", {"name": name, "size": 16 * MIB})
        yield Site(daemon, directory)
        assert daemon.stop() == 0


def fails(*command: str | Path, directory: Path) -> str:
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode != 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_nbdcopy_and_nbdinfo_over_nbds_keep_every_byte(site: Site, run: Run, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(16 * MIB)
    (tmp_path / "in").write_bytes(data)
    run("nbdcopy", "--flush", tmp_path / "in", site.uri())
    run("nbdcopy", site.uri(), tmp_path / "out")
    assert hashlib.sha256((tmp_path / "out").read_bytes()).digest() == hashlib.sha256(data).digest()
    told = run("nbdinfo", site.uri())
    assert "TLS" in told.splitlines()[0] and "export-size: 16777216" in told
    run("nbdinfo", "--map", site.uri())


def test_nbdsh_negotiates_the_whole_protocol_over_tls(site: Site, run: Run) -> None:
    script = f"""
h.set_tls(nbd.TLS_REQUIRE)
h.set_tls_certificates("{site.certificates("backup")}")
h.add_meta_context("base:allocation")
h.set_export_name("p/v")
h.connect_tcp("127.0.0.1", "{site.daemon.port}")
assert h.get_tls_negotiated() and h.get_structured_replies_negotiated() and h.can_meta_context("base:allocation")
data = bytes(range(256)) * 5000
h.pwrite(data, 12345)
h.flush()
assert h.pread(len(data), 12345) == data
h.shutdown()
"""
    # nbdsh runs the python3 that it finds first, and libnbd's binding belongs to the distribution's.
    run("env", f"PATH=/usr/bin:{os.environ['PATH']}", "nbdsh", "-c", script)


def test_qemu_writes_reads_and_converts_over_tls(site: Site, run: Run, tmp_path: Path) -> None:
    options = site.qemu(site.certificates("backup"))
    said = run("qemu-io", *options, "-c", "write -P 0x5a 1M 3M", "-c", "flush", "-c", "read -P 0x5a 1M 3M")
    assert "verification failed" not in said
    run("qemu-img", "convert", *options, "-O", "raw", tmp_path / "out")
    assert (tmp_path / "out").read_bytes()[MIB : 4 * MIB] == b"\x5a" * (3 * MIB)


def test_nbdkits_nbd_plugin_goes_on_over_tls(site: Site, run: Run, tmp_path: Path) -> None:
    run("qemu-io", *site.qemu(site.certificates("backup")), "-c", "write -P 0x77 0 1M")
    run(
        *("nbdkit", "-U", "-", "nbd", "hostname=127.0.0.1", f"port={site.daemon.port}", "export=p/v", "tls=require"),
        f"tls-certificates={site.certificates('backup')}",
        *("--run", f'nbdcopy "$uri" {tmp_path}/out'),
    )
    assert (tmp_path / "out").read_bytes()[:MIB] == b"\x77" * MIB


def test_fio_verifies_what_it_wrote_over_nbds(site: Site, run: Run, tmp_path: Path) -> None:
    job = [f"--{key}={value}" for key, value in {"rw": "randwrite", "bs": "4k", "iodepth": 16, "size": "8m"}.items()]
    # fio doesn't let URIs name files; so the certificates lie where libnbd looks by itself, which for root is /etc.
    (tmp_path / ".pki").mkdir()
    (tmp_path / ".pki" / "libnbd").symlink_to(site.certificates("backup"))
    uri = f"nbds://127.0.0.1:{site.daemon.port}/p/v"
    options = ["--name=tls", "--ioengine=nbd", f"--uri={uri}", *job, "--verify=crc32c", "--do_verify=1"]
    not_root = ["unshare", "--user", "--map-user=1000"] if os.geteuid() == 0 else []
    run(*not_root, "env", f"HOME={tmp_path}", "fio", *options)


def secured(site: Site, version: ssl.TLSVersion | None = None) -> ssl.SSLSocket:
    """The standard library's TLS, behind an acknowledged STARTTLS."""
    directory = site.certificates("backup")
    context = client_context(*(directory / name for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem")))
    if version is not None:
        context.minimum_version = context.maximum_version = version
    plain = socket.create_connection(("127.0.0.1", site.daemon.port))
    assert len(plain.recv(18, socket.MSG_WAITALL)) == 18
    plain.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 5, 0))
    assert struct.unpack(">QIII", plain.recv(20, socket.MSG_WAITALL))[2] == 1
    return context.wrap_socket(plain, server_hostname="127.0.0.1")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def test_both_versions_of_tls_are_spoken(site: Site, version: ssl.TLSVersion) -> None:
    with secured(site, version) as sock:
        assert sock.version() == version.name.replace("_", ".")
        sock.sendall(struct.pack(">QII", 0x49484156454F5054, 3, 0))
        assert len(sock.recv(20)) == 20
        (connection,) = [one for one in site.daemon.api("GET", "/v1/status")["nbd"]["connections"] if one["tls"]]
        assert (connection["tls"], connection["subject"]) == (sock.version(), "CN=backup")


def test_an_upgrade_tells_how_many_clients_over_tls_it_has_disconnected(site: Site) -> None:
    with secured(site) as sock, orphans_come_to_us():
        sock.sendall(struct.pack(">QII", 0x49484156454F5054, 3, 0))
        assert len(sock.recv(20)) == 20
        said = " ".join(site.daemon.cli("upgrade").stdout.split())
        successor = re.search(r"\(process (\d+)\) has taken over", said)
        assert successor is not None, said
        site.daemon.follow(int(successor[1]))
        assert said.endswith("s. 1 client over TLS was disconnected.")
        with contextlib.suppress(OSError):  # however it ends
            while sock.recv(4096):
                pass


def test_clients_without_tls_are_told_that_it_is_required(site: Site, tmp_path: Path) -> None:
    uri = f"nbd://127.0.0.1:{site.daemon.port}/p/v"
    assert "TLS" in fails("nbdinfo", uri, directory=tmp_path)
    assert "TLS" in fails("qemu-img", "info", uri, directory=tmp_path)


@pytest.mark.parametrize("wrong", ["absent", "expired", "foreign"])
def test_a_client_certificate_that_is_not_good_is_refused_by_the_daemon_with_a_line(
    site: Site, tmp_path: Path, run: Run, wrong: str
) -> None:
    # The authority's key, as whoever runs the site has it.
    directory = tmp_path / "client"
    directory.mkdir()
    ca = site.daemon.home / "tls" / "ca-cert.pem"
    (directory / "ca-cert.pem").write_bytes(ca.read_bytes())
    if wrong != "absent":
        pair = _expired(site, tmp_path) if wrong == "expired" else Authority(tmp_path).issue("foreign")
        pair.certificate.rename(directory / "client-cert.pem")
        pair.key.rename(directory / "client-key.pem")
    before = site.position()
    fails("nbdinfo", site.uri("p/v", directory), directory=tmp_path)
    fails("qemu-img", "info", *site.qemu(directory), directory=tmp_path)
    said = {"absent": "showed no certificate", "expired": "has expired", "foreign": "not accepted"}[wrong]
    # qemu looks at its own certificate first, and doesn't even connect with a bad one.
    count = 2 if wrong == "absent" else 1
    log = site.log_since(before, lines=("dropped: ",), count=count)
    lines = [line for line in log.splitlines() if "dropped: " in line]
    assert len(lines) == count, lines
    assert all("127.0.0.1:" in line and said in line for line in lines), lines
    run("nbdinfo", "--size", site.uri())


def _expired(site: Site, directory: Path) -> Pair:
    authority = Authority(directory, load=site.daemon.home / "tls")
    return authority.issue("expired", starts=-2 * DAY, ends=-timedelta(minutes=1))


def test_a_client_that_trusts_another_authority_refuses_the_daemon(site: Site, tmp_path: Path) -> None:
    directory = tmp_path / "client"
    directory.mkdir()
    Authority(tmp_path).path.rename(directory / "ca-cert.pem")
    for name in ("client-cert.pem", "client-key.pem"):
        (directory / name).write_bytes((site.certificates("backup") / name).read_bytes())
    before = site.position()
    assert "certificate" in fails("nbdinfo", site.uri("p/v", directory), directory=tmp_path)
    # qemu wouldn't take a certificate of its own that its authority hasn't signed.
    for name in ("client-cert.pem", "client-key.pem"):
        (directory / name).unlink()
    assert "certificate" in fails("qemu-img", "info", *site.qemu(directory), directory=tmp_path)
    # It says nothing about why it leaves, or in TLS 1.3 an empty list of certificates.
    said = ("gone during the TLS handshake", "dropped: the peer refused", "dropped: the peer showed no certificate")
    log = site.log_since(before, lines=said, count=2)
    assert sum(log.count(text) for text in said) == 2, log


def test_the_unix_socket_and_what_uses_it_need_no_tls(site: Site, run: Run, tmp_path: Path) -> None:
    run("nbdinfo", "--size", site.daemon.uri("p/v"))
    (tmp_path / "image").write_bytes(os.urandom(MIB))
    site.daemon.cli("volume", "import", str(tmp_path / "image"), "p/imported")
    assert "nbds://127.0.0.1:" in site.daemon.cli("volume", "show", "p/v").stdout


def test_rules_of_exports_hold_for_real_clients(site: Site, run: Run, tmp_path: Path) -> None:
    before = site.position()
    assert "No such file" in fails("nbdinfo", site.uri("p/secret"), directory=tmp_path)
    refused = "p/secret is refused: its subject CN=backup"
    assert refused in site.log_since(before, lines=(refused,), count=1)
    fails("nbdinfo", site.uri("p/here"), directory=tmp_path)
    run("nbdinfo", "--size", site.uri("p/secret", "owner"))
    run("nbdinfo", "--size", site.daemon.uri("p/here"))
    listed = run("nbdinfo", "--list", site.uri(""))
    assert 'export="p/v"' in listed and "p/secret" not in listed and "p/here" not in listed
    told = run("nbdinfo", site.uri("p/shown"))
    assert "is_read_only: true" in told
    said = fails("qemu-io", *site.qemu(site.certificates("backup"), "p/shown"), "-c", "write 0 4k", directory=tmp_path)
    assert "Permission denied" in said


def test_a_new_certificate_is_shown_without_a_restart(site: Site) -> None:
    def shown() -> bytes | None:
        with secured(site) as sock:
            return sock.getpeercert(binary_form=True)

    first = shown()
    make_server(site.daemon.home / "tls", ["nbd.example"], 2, force=True)
    assert shown() != first


# --- starting ---


def refused(tmp_path: Path, config: str) -> str:
    """The line of a daemon that doesn't start."""
    file = tmp_path / "config.toml"
    file.write_text(config)
    options = ["--home", str(tmp_path / "home"), "--config", str(file)]
    result = subprocess.run(
        [*command(), *options], capture_output=True, text=True, timeout=30, env=environment(), check=False
    )
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("terraced: "), result.stderr
    return result.stderr


def test_an_address_that_others_reach_is_refused_without_tls(tmp_path: Path) -> None:
    said = refused(tmp_path, '[nbd]\nlisten = ["0.0.0.0:0"]\n')
    assert "0.0.0.0:" in said and 'mode = "required" under [nbd.tls]' in said and "plaintext = true" in said


def test_tls_files_that_cannot_be_used_are_named_at_start(tmp_path: Path) -> None:
    config = '[nbd]\nlisten = ["127.0.0.1:0"]\n[nbd.tls]\nmode = "allowed"\n'
    said = refused(tmp_path, config)
    assert f"{tmp_path}/home/tls/server-cert.pem can't be read" in said and "[nbd.tls]" in said
    make_authority(tmp_path / "home" / "tls", "test", 2)
    make_server(tmp_path / "home" / "tls", [], 2)
    (tmp_path / "home" / "tls" / "server-key.pem").chmod(0o644)
    assert "chmod 600" in refused(tmp_path, config)


def test_an_expired_certificate_is_said_at_start_and_plaintext_elsewhere_is_a_choice(tmp_path: Path) -> None:
    pair = Authority(tmp_path).issue("old", server=True, starts=-2 * DAY, ends=-timedelta(seconds=9))
    config = f"""listen = ["127.0.0.1:0", "0.0.0.0:0"]
[nbd.tls]
mode = "allowed"
certificate = "{pair.certificate}"
key = "{pair.key}"
clients = "any"
plaintext = true
"""

    class OwnListener(Daemon):
        def spawn(self) -> subprocess.Popen[str]:
            assert self.process is None
            self.home.mkdir(parents=True)
            file = self.home.with_name("own.toml")
            file.write_text("[nbd]\n" + config)
            with self.log.open("a") as log:
                self.process = subprocess.Popen(
                    [*command(), "--home", str(self.home), "--config", str(file)],
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment(),
                )
            return self.process

    with OwnListener(tmp_path / "home") as daemon:
        log = daemon.log.read_text()
    assert f"clients will refuse the certificate {pair.certificate}: it has expired" in log
    assert "is open: whoever reaches it can read and write every volume" in log
