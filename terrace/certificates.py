"""A private authority and the certificates that it signs, as files that NBD's servers and clients take.

A directory is laid out as libnbd, qemu and nbdkit expect it, so that each can be given the whole of it:

    DIR/ca-cert.pem                        the authority's certificate
    DIR/ca-key.pem                         its key: needed only to sign, and best kept elsewhere afterwards
    DIR/server-cert.pem, server-key.pem
    DIR/clients/NAME/ca-cert.pem, client-cert.pem, client-key.pem      to be copied to that client
    DIR/nodes/NAME/ca-cert.pem, node-cert.pem, node-key.pem            to be copied to HOME/tls of that node
    DIR/node-cert.pem, node-key.pem                                    those of the node that DIR is on

A key's file has the mode 0600 from its first moment. Nothing that exists is replaced unless that was asked for; what is
replaced is replaced in one step, so that a server which reads it anew never finds half of it.

The keys are ECDSA over P-256, which everything that speaks TLS 1.2 knows.
"""

from __future__ import annotations

import datetime
import errno
import ipaddress
import os
import re
import shlex
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_CERTIFICATE: Final = "ca-cert.pem"
CA_KEY: Final = "ca-key.pem"
SERVER: Final = "server"
CLIENT: Final = "client"
NODE: Final = "node"
CA_DAYS: Final = 3650
LEAF_DAYS: Final = 825
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_CLOCKS_DIFFER: Final = datetime.timedelta(minutes=5)


class CertificateError(OSError):
    """Prints as its sentence alone."""

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class Shown:
    """A certificate as people see it."""

    file: str
    subject: str
    names: list[str]
    not_before: datetime.datetime
    not_after: datetime.datetime


def make_authority(directory: Path, name: str, days: int, *, force: bool = False) -> None:
    """The authority's two files. Raises CertificateError, EEXIST where one is there."""
    _require_free([directory / CA_KEY, directory / CA_CERTIFICATE], force)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(name)
    certificate = (
        _begun(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _make_directory(directory)
    _write(directory / CA_KEY, _pem_of(key), 0o600)
    _write(directory / CA_CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def make_server(directory: Path, names: Sequence[str], days: int, *, force: bool = False) -> None:
    """A server's certificate, for these names and addresses and those of the loopback. Raises CertificateError."""
    alternatives = [as_name(name) for name in dict.fromkeys((*names, *LOOPBACK))]
    _issue(directory, directory, SERVER, names[0] if names else LOOPBACK[0], alternatives, days, force)


def make_client(directory: Path, name: str, days: int, *, force: bool = False) -> Path:
    """A client's certificate, in a directory of its own, which is returned. Raises CertificateError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}", name):
        raise CertificateError(
            errno.EINVAL, f"{name!r} can't be a client's name: up to 63 of A-Z a-z 0-9 . _ @ -, a letter or digit first"
        )
    into = directory / "clients" / name
    _issue(directory, into, CLIENT, name, [], days, force)
    return into


def make_node(directory: Path, name: str, names: Sequence[str], days: int, *, here: bool, force: bool = False) -> Path:
    """A node's certificate, with which it is server and client: CN=NAME, for these host names, its own and loopback.

    In a directory of its own, or beside the authority if `here`; that is returned. Raises CertificateError.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise CertificateError(
            errno.EINVAL, f"{name!r} can't be a node's name: up to 63 of A-Z a-z 0-9 . _ -, a letter or digit first"
        )
    into = directory if here else directory / "nodes" / name
    alternatives = [as_name(one) for one in dict.fromkeys((*names, name, *LOOPBACK))]
    _issue(directory, into, NODE, name, alternatives, days, force)
    return into


_USAGES: Final = {
    SERVER: [ExtendedKeyUsageOID.SERVER_AUTH],
    CLIENT: [ExtendedKeyUsageOID.CLIENT_AUTH],
    NODE: [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
}


def _issue(
    directory: Path, into: Path, role: str, name: str, names: list[x509.GeneralName], days: int, force: bool
) -> None:
    authority, authority_key = _authority(directory)
    if authority.not_valid_after_utc <= datetime.datetime.now(datetime.UTC):
        raise CertificateError(
            errno.EKEYEXPIRED,
            f"the authority in {directory} has expired, so nobody would take what it signs; make another with "
            f"`terrace tls init --force {directory}`, and new certificates for all clients",
        )
    paths = [into / f"{role}-key.pem", into / f"{role}-cert.pem"]
    _require_free(paths, force)
    key = ec.generate_private_key(ec.SECP256R1())
    begun = _begun(_subject(name), authority.subject, key.public_key(), days, authority.not_valid_after_utc)
    if names:
        begun = begun.add_extension(x509.SubjectAlternativeName(names), critical=False)
    certificate = (
        begun.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(_USAGES[role]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    _make_directory(into)
    if into != directory:
        _write(into / CA_CERTIFICATE, (directory / CA_CERTIFICATE).read_bytes(), 0o644)
    _write(paths[0], _pem_of(key), 0o600)
    _write(paths[1], certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def show(directory: Path) -> list[Shown]:
    """Every certificate in a directory and in those of its clients and nodes. Raises CertificateError."""
    if not directory.is_dir():
        raise CertificateError(errno.ENOENT, f"there is no directory {directory}; `terrace tls init` makes one")
    paths = [directory / name for name in (CA_CERTIFICATE, "server-cert.pem", "client-cert.pem", "node-cert.pem")]
    paths += sorted(directory.glob("clients/*/client-cert.pem"))
    paths += sorted(directory.glob("nodes/*/node-cert.pem"))
    found = []
    for path in paths:
        if path.exists():
            certificate = _read_certificate(path)
            found.append(
                Shown(
                    str(path.relative_to(directory)),
                    certificate.subject.rfc4514_string(),
                    names_of(certificate),
                    certificate.not_valid_before_utc,
                    certificate.not_valid_after_utc,
                )
            )
    if not found:
        raise CertificateError(errno.ENOENT, f"there is no certificate in {directory}; `terrace tls init` makes one")
    return found


def server_names(directory: Path) -> list[str]:
    """The names of the server's certificate, the loopback's last. Raises CertificateError."""
    names = names_of(_read_certificate(directory / "server-cert.pem"))
    return sorted(names, key=LOOPBACK.__contains__)


def names_of(certificate: x509.Certificate) -> list[str]:
    """DNS names and addresses that a certificate is for, in its order."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names]


def as_name(text: str) -> x509.GeneralName:
    """A host's name or address, as a certificate has it. Raises CertificateError."""
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(text))
    if len(text) <= 253 and re.fullmatch(
        r"(\*\.)?([A-Za-z0-9_]([A-Za-z0-9_-]{0,62})\.)*[A-Za-z0-9_][A-Za-z0-9_-]{0,62}", text
    ):
        return x509.DNSName(text)
    raise CertificateError(
        errno.EINVAL, f"{text!r} is neither a host's name nor an address; write one such as nbd.example or 192.0.2.7"
    )


def _subject(name: str) -> x509.Name:
    # X.520 allows a common name 64 characters; what a server is called is among its alternative names anyway.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _begun(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    days: int,
    last: datetime.datetime | None = None,
) -> x509.CertificateBuilder:
    """What all have; a certificate that outlived its authority would be worth nothing after `last`."""
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    until = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(until if last is None else min(until, last))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _authority(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate = _read_certificate(directory / CA_CERTIFICATE)
    try:
        key = serialization.load_pem_private_key(_read(directory / CA_KEY), None)
    except (ValueError, TypeError):
        raise CertificateError(
            errno.EINVAL, f"{directory / CA_KEY} holds no private key without a passphrase"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise CertificateError(
            errno.EINVAL,
            f"{directory / CA_KEY} is not the key of {directory / CA_CERTIFICATE}: put back the one that is",
        )
    return certificate, key


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError:
        raise CertificateError(errno.EINVAL, f"{path} holds no certificate in PEM form") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        step = "; `terrace tls init` makes an authority" if error.errno == errno.ENOENT else ""
        raise CertificateError(error.errno, f"{path} can't be read: {error.strerror}{step}") from None


def _require_free(paths: Sequence[Path], force: bool) -> None:
    for path in paths:
        if not force and path.exists():
            raise CertificateError(errno.EEXIST, f"{path} exists; --force replaces it")


def _make_directory(path: Path) -> None:
    """For its owner only, and what is missing above it too. One that is there must not be everybody's."""
    try:
        for missing in reversed([one for one in (path, *path.parents) if not one.exists()]):
            missing.mkdir(mode=0o700)
        mode = path.stat().st_mode
    except OSError as error:
        raise CertificateError(error.errno, f"{path} can't be made: {error.strerror}; name another directory") from None
    if mode & stat.S_IWOTH:
        raise CertificateError(
            errno.EPERM,
            f"everybody can write to {path}, and so could put another authority in the place of this one: "
            f"chmod o-w {shlex.quote(str(path))}, or name another directory",
        )


def _write(path: Path, data: bytes, mode: int) -> None:
    """In one step, as a file that had this mode from its first moment."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)  # whatever the umask says
            file.write(data)
            file.flush()
            os.fsync(fd)
        temporary.replace(path)
    except OSError as error:
        raise CertificateError(error.errno, f"{path} can't be written: {error.strerror}") from None
