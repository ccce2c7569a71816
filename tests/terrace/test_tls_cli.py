"""`terrace tls`: what it makes is what clients and servers take, and what exists stays."""

from __future__ import annotations

import json
import os
import socket
import ssl
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from nbd.tls import client_context, rehearse, server_context
from terrace.cli.root import root
from terrace.config import parse_config


def tls(home: Path, *arguments: str, status: int = 0) -> Result:
    result = CliRunner().invoke(root, ["--home", str(home), "tls", *arguments])
    assert result.exit_code == status, result.output
    return result


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_made_is_taken_by_both_sides_and_keys_are_private(tmp_path: Path) -> None:
    home = tmp_path / "home"
    said = tls(home, "init", "--name", "nbd.example", "--name", "192.0.2.7").output
    tls(home, "client", "backup")
    made, client = home / "tls", home / "tls" / "clients" / "backup"
    assert sorted(path.name for path in client.iterdir()) == ["ca-cert.pem", "client-cert.pem", "client-key.pem"]
    assert mode(home) == mode(made) == mode(client) == 0o700
    for key in (made / "ca-key.pem", made / "server-key.pem", client / "client-key.pem"):
        assert mode(key) == 0o600
    assert rehearse(made / "server-cert.pem", made / "server-key.pem", server=True) is None
    assert rehearse(client / "client-cert.pem", client / "client-key.pem", server=False) is None
    # Each is verified by the authority, strictly.
    shown = server_context(made / "server-cert.pem", made / "server-key.pem", made / "ca-cert.pem")
    asked = client_context(client / "ca-cert.pem", client / "client-cert.pem", client / "client-key.pem")
    for context in (shown, asked):
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [shown.wrap_bio(there, back, True), asked.wrap_bio(back, there, False, "nbd.example")]
    for turn in range(8):
        try:
            sides[turn % 2].do_handshake()
        except ssl.SSLWantReadError:
            continue
    assert sides[0].getpeercert()["subject"] == ((("commonName", "backup"),),)  # type: ignore[index]
    # The lines that it prints are what the daemon needs, and no more.
    lines = [line for line in said.splitlines() if line.startswith("  ")]
    config = parse_config("\n".join(lines), "printed")
    files = config.tls_files(home)
    assert config.nbd.tls.mode == "required" and files is not None and files.ca == made / "ca-cert.pem"


def test_a_directory_of_ones_choice_is_printed_with_its_paths(tmp_path: Path) -> None:
    elsewhere = tmp_path / 'with "space'
    said = tls(tmp_path / "home", "init", str(elsewhere)).output
    lines = [line for line in said.splitlines() if line.startswith("  ")]
    assert parse_config("\n".join(lines), "printed").nbd.tls.key == str(elsewhere / "server-key.pem")
    said = tls(tmp_path / "home", "client", "one", "--dir", str(elsewhere)).output
    assert f"tls-certificates={elsewhere}/clients/one" in said and "nbd-client -N POOL/VOL" in said


def test_nothing_that_exists_is_replaced_without_force(tmp_path: Path) -> None:
    home, made = tmp_path, tmp_path / "tls"
    tls(home, "init")
    tls(home, "client", "one")
    before = {path: path.read_bytes() for path in made.rglob("*.pem")}
    for command, said in [
        (("init",), "has an authority already"),
        (("server",), "server-key.pem exists"),
        (("client", "one"), "client-key.pem exists"),
    ]:
        assert said in tls(home, *command, status=1).output
    assert {path: path.read_bytes() for path in made.rglob("*.pem")} == before
    tls(home, "server", "--force")
    after = {path: path.read_bytes() for path in made.rglob("*.pem")}
    changed = {path.name for path in before if after[path] != before[path]}
    assert changed == {"server-cert.pem", "server-key.pem"} and not list(made.glob(".*"))
    tls(home, "init", "--force")
    assert (made / "ca-key.pem").read_bytes() != before[made / "ca-key.pem"]


def test_a_new_server_certificate_has_the_names_of_the_old_one(tmp_path: Path) -> None:
    tls(tmp_path, "init", "--name", "nbd.example")
    assert "for nbd.example, localhost" in tls(tmp_path, "server", "--force").output
    assert "for fd00::1, localhost" in tls(tmp_path, "server", "--force", "--name", "fd00::1").output


def test_show_tells_whom_certificates_name_and_when_they_expire(tmp_path: Path) -> None:
    tls(tmp_path, "init", "--days", "10")
    tls(tmp_path, "client", "one", "--days", "9999")
    found = json.loads(tls(tmp_path, "show", "-o", "json").output)
    by_file = {one["file"]: one for one in found}
    assert by_file["server-cert.pem"]["state"] == "expires in 9 days"
    assert set(by_file["server-cert.pem"]["names"]) == {socket.gethostname(), "localhost", "127.0.0.1", "::1"}
    tls(tmp_path, "client", "two", "--days", "2")
    tls(tmp_path, "client", "three", "--days", "1")
    said = tls(tmp_path, "show").output
    assert "expires in 1 day " in said and "expires within a day" in said
    client = by_file["clients/one/client-cert.pem"]
    assert (client["subject"], client["state"]) == ("CN=one", "valid")
    # None outlives its authority.
    assert client["not_after"] == by_file["ca-cert.pem"]["not_after"]
    assert "expires in 9 days" in tls(tmp_path, "show").output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("client", "../up"), "can't be a client's name"),
        (("client", "one"), "ca-cert.pem can't be read: No such file or directory; `terrace tls init` makes"),
        (("show",), "there is no directory"),
        (("init", "--name", "not a name"), "neither a host's name nor an address"),
        (("init", "/proc/x"), "can't be made"),
    ],
)
def test_what_cannot_be_done_is_one_line_with_the_next_step(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    output = tls(tmp_path, *arguments, status=1).output
    assert said in output and output.count("\n") == 1
    assert not (tmp_path / "tls").exists()


def test_no_authority_is_made_where_everybody_can_put_another_in_its_place(tmp_path: Path) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o777)
    output = tls(tmp_path, "init", str(directory), status=1).output
    assert f"chmod o-w {directory}" in output and output.count("\n") == 1 and not list(directory.iterdir())
    directory.chmod(0o775)
    tls(tmp_path, "init", str(directory))


def test_keys_are_private_whatever_the_umask_and_links_are_not_written_through(tmp_path: Path) -> None:
    elsewhere, made = tmp_path / "elsewhere", tmp_path / "tls"
    elsewhere.write_text("kept")
    elsewhere.chmod(0o666)
    made.mkdir()
    for name in ("ca-key.pem", ".ca-key.pem.new", ".server-key.pem.new"):
        (made / name).symlink_to(elsewhere)
    before = os.umask(0)
    try:
        tls(tmp_path, "init", "--force")
        tls(tmp_path, "client", "one")
    finally:
        os.umask(before)
    assert elsewhere.read_text() == "kept"
    for key in made.rglob("*-key.pem"):
        assert not key.is_symlink() and mode(key) == 0o600
    assert mode(made / "clients") == mode(made / "clients" / "one") == 0o700


def test_damaged_files_of_an_authority_are_named(tmp_path: Path) -> None:
    tls(tmp_path, "init")
    key = tmp_path / "tls" / "ca-key.pem"
    good = key.read_bytes()
    key.write_bytes((tmp_path / "tls" / "server-key.pem").read_bytes())
    assert "ca-key.pem is not the key of" in tls(tmp_path, "client", "one", status=1).output
    key.write_text("no key")
    assert "ca-key.pem holds no private key" in tls(tmp_path, "client", "one", status=1).output
    key.write_bytes(good)
    (tmp_path / "tls" / "ca-cert.pem").write_text("no certificate")
    assert "ca-cert.pem holds no certificate" in tls(tmp_path, "client", "one", status=1).output
    assert not (tmp_path / "tls" / "clients").exists()


def test_certificates_say_what_they_are_for(tmp_path: Path) -> None:
    tls(tmp_path, "init")
    authority = x509.load_pem_x509_certificate((tmp_path / "tls" / "ca-cert.pem").read_bytes())
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    server = x509.load_pem_x509_certificate((tmp_path / "tls" / "server-cert.pem").read_bytes())
    usage = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_a_node_is_told_to_listen_where_the_documentation_has_it_listen(tmp_path: Path) -> None:
    home = tmp_path / "home"
    tls(home, "init", "--name", "a.example")
    said = tls(home, "node", "a", "--here", "--name", "a.example").output
    documented = (Path(__file__).parents[2] / "docs" / "mirroring.md").read_text()
    line = next(line for line in documented.splitlines() if line.startswith("listen = "))
    assert line in [one.strip() for one in said.splitlines()]
    assert parse_config("\n".join(one for one in said.splitlines() if one.startswith("  ")), "printed").node.name == "a"
