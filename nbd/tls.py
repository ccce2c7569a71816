"""TLS for both sides of a connection, behind the calls of a non-blocking socket.

A ``TlsSocket`` stands where the data path has a ``socket.socket``: the same ``recv_into`` and ``send``,
which never wait, and the raw socket's descriptor to wait on. Between them is OpenSSL with two buffers in
memory, so that one ``recv`` brings many records and one ``send`` takes many away: a record is 16 KiB at
most, and a call to the kernel for each would cost more than its encryption.

Its rules
    Receive first, wait later: what was decrypted is not in the socket any more, so only after a
    ``BlockingIOError`` does the descriptor tell when there will be more.

    After a ``send`` that raised ``BlockingIOError`` the next one must get the same bytes from the same
    position, as with OpenSSL itself: they are encrypted already, and only their ciphertext is still here.

    One sender at a time, and one receiver; that these are two tasks is fine.

The end
    A peer that closes without TLS's own goodbye (close_notify) is at its end like any other. In NBD every
    message says how long it is, so nobody gains by cutting a connection short, and clients that are killed
    do so.

Bounds
    ``RECEIVE_BYTES`` of ciphertext that came and are not decrypted, ``SEND_BYTES`` and what TLS adds of
    ciphertext that has not left. A peer that makes us answer on TLS's own level (key updates, refused
    renegotiation) and doesn't read the answers is cut off at ``UNASKED_BYTES``.

TLS 1.2 is the oldest version spoken (the protocol's text asks for that at least: "TLS versions"), without
compression, renegotiation or resumed sessions: a certificate is looked at in every handshake.

Pre-shared keys aren't there: Python has them since 3.13 only.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import ssl
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import trio

__all__ = ["Identity", "TlsError", "TlsFiles", "TlsSocket", "client_context", "rehearse", "server_context"]

RECEIVE_BYTES: Final = 64 << 10
SEND_BYTES: Final = 64 << 10
"""Plaintext that one ``send`` takes. OpenSSL's buffers in memory grow to these and never shrink: with 256 KiB a
thousand connections that had once been busy held 0.7 GB, where it is 0.2 now. That costs about 5 % more CPU a byte."""
UNASKED_BYTES: Final = 64 << 10
CONTEXT_HANDSHAKES: Final = 256
"""So many share a context. OpenSSL keeps each session of TLS 1.2 in it, 10 KiB, for hours and up to 20,480 of them,
though none may be gone on with; Python has no switch for that."""
_ROUNDS: Final = 4
"""So often one ``recv_into`` asks the kernel for more, where there was as much as it asked for, or none of the peer's
data in it."""
_HANDSHAKE_RECEIVE_BYTES: Final = 16 << 10

_SHORT_NAMES: Final = {  # RFC 4514, section 3; others go by the name that OpenSSL has for them
    "commonName": "CN",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
}
_NAME_KINDS: Final = {"IP Address": "IP"}

# OpenSSL's reasons that people meet, said plainly.
_REASONS: Final = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the peer showed no certificate",
    "WRONG_VERSION_NUMBER": "what came is not TLS",
    "HTTP_REQUEST": "what came is HTTP and not TLS",
    "HTTPS_PROXY_REQUEST": "what came is HTTP and not TLS",
    "UNSUPPORTED_PROTOCOL": "the peer wants a version of TLS older than 1.2",
    "UNEXPECTED_MESSAGE": "what came is no TLS handshake",
    "NO_SHARED_CIPHER": "no cipher that both sides have",
    "RECORD_LAYER_FAILURE": "a record was damaged or forged",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC": "a record was damaged or forged",
    "NO_RENEGOTIATION": "the peer wants to renegotiate, which is refused",
}
_REHEARSAL_TURNS: Final = 12
"""A handshake takes each side three at most; one that is over does nothing in its turn."""
_EXPIRED, _NOT_YET_VALID = 10, 9  # OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED and ..._NOT_YET_VALID


class TlsError(OSError):
    """TLS failed, with a sentence. EPROTO; EKEYREJECTED or EKEYEXPIRED where the peer's certificate is why."""

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a certificate names, which was verified."""

    subject: str
    """As RFC 4514 writes it, the most specific part first: ``CN=backup,O=Example``. May be empty."""
    names: tuple[str, ...] = ()
    """Subject alternative names with their kind: ``DNS:host.example``, ``IP:::1``, ``URI:...``, ``DirName:CN=...``."""


# --- a connection ---


class TlsSocket:
    """A connected stream socket, which it owns, with TLS over it. First ``handshake``, then all else."""

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool, server_hostname: str | None = None
    ) -> None:
        """``sock`` is non-blocking. ``server_hostname`` is what a client's context checks the certificate for.

        Raises OSError (EINVAL) if that can't be a host's name.
        """
        self.family = socket.AddressFamily(sock.family)
        self.type = socket.SocketKind(sock.type)
        self._sock = sock
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()
        try:
            self._ssl = context.wrap_bio(self._in, self._out, server_side, server_hostname)
        except (ValueError, TypeError) as error:  # the latter for a NUL
            raise OSError(errno.EINVAL, f"{server_hostname!r} can't be the name in a certificate: {error}") from None
        self._read: Callable[[int, memoryview], int] = cast(Any, self._ssl.read)  # typeshed knows other buffers only
        self._hungry = False  # OpenSSL has used up what came
        self._ended = False  # the peer will send no more
        self._left = memoryview(b"")  # ciphertext on its way to the kernel
        self._taken = 0  # plaintext in it that no `send` has returned yet
        self._rest = memoryview(b"")  # decrypted before our goodbye, and not received yet
        self._said_goodbye = False
        self._broken: TlsError | None = None

    # --- its beginning ---

    async def handshake(self) -> None:
        """Agree on keys and look at certificates. How long that may take is the caller's business.

        Raises TlsError with what is wrong, after telling the peer; another OSError if the connection broke.
        A client learns from its first ``recv_into`` at the earliest that the server didn't like its
        certificate (RFC 8446, section 4.4.2.4).
        """
        while True:
            try:
                self._ssl.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                done = False
            except ssl.SSLError as error:
                with suppress(OSError):
                    self._flush()  # the alert
                raise self._broke(error) from None
            while not self._flush():
                await trio.lowlevel.wait_writable(self._sock)
            if done:
                if self._ssl.server_side and self._ssl.session_reused:
                    # TLS 1.2 by a session's id, which Python can't turn off: certificates weren't looked at.
                    self._broken = TlsError(errno.EPROTO, "the peer goes on with an earlier session, which is refused")
                    raise self._broken
                return
            await trio.lowlevel.wait_readable(self._sock)
            try:
                data = self._sock.recv(_HANDSHAKE_RECEIVE_BYTES)
            except BlockingIOError:
                continue
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "the peer left during the TLS handshake")
            self._in.write(data)

    @property
    def peer(self) -> Identity | None:
        """Whom the peer's certificate names; None if it showed none, or none was verified.

        Raises TlsError where a name in it is none: it has been signed, and yet isn't the text that it claims to be.
        """
        try:
            certificate = self._ssl.getpeercert()
        except (ValueError, ssl.SSLError):
            raise TlsError(
                errno.EKEYREJECTED, "the peer's certificate is not accepted: a name in it can't be read"
            ) from None
        return identity_of(certificate)

    @property
    def version(self) -> str:
        """``TLSv1.3``; empty before the handshake."""
        return self._ssl.version() or ""

    # --- as a socket ---

    def recv_into(self, view: memoryview | bytearray) -> int:
        """Fill ``view`` with as much as is there; returns the bytes, 0 at the end.

        Raises BlockingIOError where there is nothing yet, TlsError, or the raw socket's OSError.
        """
        if self._broken is not None:
            raise self._broken
        target = memoryview(view)
        if self._rest:
            count = min(len(self._rest), len(target))
            target[:count] = self._rest[:count]
            self._rest = self._rest[count:]
            return count
        if self._ended:
            return 0
        size, got, more = len(target), 0, False
        # What came in the last round is still looked at: it is in the socket no more, and nothing would tell of it.
        for rounds_left in range(_ROUNDS, -1, -1):
            if not self._hungry:
                read = self._read
                try:
                    while got < size:
                        count = read(size - got, target[got:])
                        if not count:
                            self._ended = True
                            break
                        got += count
                except ssl.SSLWantReadError:
                    self._hungry = True
                except ssl.SSLZeroReturnError:
                    self._ended = True
                except ssl.SSLError as error:
                    broken = self._broke(error)
                    with suppress(OSError):
                        self._flush()
                    if not got:
                        raise broken from None
                if self._out.pending:
                    self._answer_unasked()
                if got == size or self._ended or self._broken is not None or (got and not more):
                    return got
            if not rounds_left:
                break
            scratch = _scratch()
            try:
                count = self._sock.recv_into(scratch)
            except OSError:
                if got:
                    return got
                raise
            if not count:
                self._ended = True
                return got
            self._in.write(scratch[:count])
            self._hungry = False
            more = count == len(scratch)
        if got:
            return got
        # The peer sends and sends, and none of it is for us. Others may have their turn.
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def recv(self, size: int) -> bytes:
        """Like ``recv_into``, at most ``size`` bytes."""
        buffer = bytearray(size)
        return bytes(memoryview(buffer)[: self.recv_into(buffer)])

    def send(self, data: memoryview | bytes) -> int:
        """Encrypt and send from the beginning of ``data``; returns how much of it has left, at most ``SEND_BYTES``.

        Raises BlockingIOError if the kernel doesn't take all of the ciphertext: wait until the socket is
        writable, and call it with the same data again. Raises TlsError, or the raw socket's OSError.
        """
        if self._broken is not None:
            raise self._broken
        if not self._taken:
            # What TLS itself had to say comes first. At its bound, nothing is added before that has left.
            if (self._left or self._out.pending) and not self._flush():
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            view = memoryview(data)[:SEND_BYTES]
            write = self._ssl.write
            try:
                while self._taken < len(view):
                    self._taken += write(view[self._taken :])
            except ssl.SSLError as error:
                raise self._broke(error) from None
        if not self._flush():
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        taken, self._taken = self._taken, 0
        return taken

    def fileno(self) -> int:
        """The raw socket's descriptor, to wait on."""
        return self._sock.fileno()

    def getsockopt(self, level: int, option: int) -> int:
        """The raw socket's."""
        return self._sock.getsockopt(level, option)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        """The raw socket's."""
        self._sock.setsockopt(level, option, value)

    def shutdown(self, how: int) -> None:
        """Say TLS's goodbye, as far as the socket takes it at once, and shut the socket down.

        What the peer has sent can still be received after ``SHUT_WR``.
        """
        if how == socket.SHUT_WR:
            self._decrypt_rest()
        if how != socket.SHUT_RD:
            self._say_goodbye()
        self._sock.shutdown(how)

    def close(self) -> None:
        """Say TLS's goodbye, if it wasn't yet, and close the socket. Synchronous; a second call does nothing."""
        if self._sock.fileno() >= 0:
            self._say_goodbye()
            self._sock.close()

    # --- ciphertext ---

    def _flush(self) -> bool:
        """Hand ciphertext to the kernel; False if it doesn't take all of it."""
        while True:
            if not self._left:
                if not self._out.pending:
                    return True
                self._left = memoryview(self._out.read())
            try:
                sent = self._sock.send(self._left)
            except BlockingIOError:
                return False
            self._left = self._left[sent:]

    def _answer_unasked(self) -> None:
        """Send what TLS itself has to say, which a peer provokes by what it sends."""
        if not self._flush() and self._out.pending > UNASKED_BYTES:
            self._broken = TlsError(
                errno.EPROTO, f"the peer makes TLS answer and reads none of it ({UNASKED_BYTES} bytes wait)"
            )
            raise self._broken

    def _say_goodbye(self) -> None:
        if self._said_goodbye or self._broken is not None:
            return
        self._said_goodbye = True
        with suppress(OSError):  # ssl.SSLError is one
            if not self._taken and self._flush():
                with suppress(ssl.SSLError):  # the peer's own goodbye isn't waited for
                    self._ssl.unwrap()
                self._flush()

    def _decrypt_rest(self) -> None:
        """SSL_shutdown loses what was not decrypted by then, which is ``RECEIVE_BYTES`` at most."""
        rest = bytearray()
        with suppress(ssl.SSLError):  # SSLWantReadError, or one that comes again
            while piece := self._ssl.read(RECEIVE_BYTES):
                rest += piece
        self._rest = memoryview(bytes(self._rest) + rest)

    def _broke(self, error: ssl.SSLError) -> TlsError:
        self._broken = explained(error)
        return self._broken


_threads = threading.local()


def _scratch() -> memoryview:
    """A buffer that is only used between two lines without a checkpoint: one for all connections of a thread."""
    scratch: memoryview | None = getattr(_threads, "scratch", None)
    if scratch is None:
        scratch = _threads.scratch = memoryview(bytearray(RECEIVE_BYTES))
    return scratch


def explained(error: ssl.SSLError) -> TlsError:
    """OpenSSL's error as a sentence, with a true errno: ``ssl.SSLError`` has a number of its own there."""
    if isinstance(error, ssl.SSLCertVerificationError):
        number = errno.EKEYEXPIRED if error.verify_code == _EXPIRED else errno.EKEYREJECTED
        said = error.verify_message.rstrip(".")
        return TlsError(number, f"the peer's certificate is not accepted: {said}")
    reason = error.reason or ""
    if "ALERT" in reason:
        told = reason.partition("ALERT_")[2] or reason
        return TlsError(errno.EPROTO, f"the peer refused: {told.replace('_', ' ').lower()}")
    if reason in _REASONS:
        return TlsError(errno.EPROTO, _REASONS[reason])
    return TlsError(errno.EPROTO, f"TLS failed: {(reason or str(error)).replace('_', ' ').lower()}")


# --- certificates ---


def identity_of(certificate: Any) -> Identity | None:
    """Whom a certificate names, in the form that ``ssl.SSLSocket.getpeercert`` gives it; None for none."""
    if not certificate:
        return None
    names = tuple(_alternative(kind, value) for kind, value in certificate.get("subjectAltName", ()))
    return Identity(_distinguished(certificate.get("subject", ())), names)


def _distinguished(name: Any) -> str:
    parts = ["+".join(_attribute(key, value) for key, value in part) for part in name]
    return ",".join(reversed(parts))


def _attribute(key: str, value: str) -> str:
    """One attribute as RFC 4514, section 2.4, writes it; in hexadecimal too what a log or a terminal would obey."""
    text = "".join("\\" + c if c in '"+,;<>\\' else c if c.isprintable() else _hexadecimal(c) for c in value)
    if value[:1] in (" ", "#"):
        text = "\\" + text
    if len(value) > 1 and value.endswith(" "):
        text = text[:-1] + "\\ "
    return f"{_SHORT_NAMES.get(key, key)}={text}"


def _hexadecimal(character: str) -> str:
    return "".join(f"\\{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


def _alternative(kind: str, value: Any) -> str:
    if not isinstance(value, str):  # a directory's name has the form of a subject
        return f"{kind}:{_distinguished(value)}"
    value = value.strip()
    if kind == "IP Address":
        with suppress(ValueError):
            value = str(ipaddress.ip_address(value))
    return f"{_NAME_KINDS.get(kind, kind)}:{value}"


def server_context(
    certificate: str | os.PathLike[str],
    key: str | os.PathLike[str],
    ca: str | os.PathLike[str] | None = None,
) -> ssl.SSLContext:
    """What a server shows, and with ``ca`` what it demands: a client certificate which that has signed.

    Each is the path of a PEM file; behind the certificate may be those between it and its authority. Raises
    OSError whose sentence names the file.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context)
    _load_chain(context, Path(certificate), Path(key))
    if ca is not None:
        _load_ca(context, Path(ca))
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(
    ca: str | os.PathLike[str] | None = None,
    certificate: str | os.PathLike[str] | None = None,
    key: str | os.PathLike[str] | None = None,
    *,
    verify: bool = True,
    check_hostname: bool = True,
) -> ssl.SSLContext:
    """What a client trusts and shows. Without ``ca``: the authorities that the system trusts.

    ``check_hostname``: the server's certificate must be for the name that the ``TlsSocket`` is given.
    Without ``verify`` any certificate will do, and whoever is in between can read and change everything.
    Raises OSError whose sentence names the file.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _harden(context)
    context.check_hostname = verify and check_hostname
    if not verify:
        context.verify_mode = ssl.CERT_NONE
    elif ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        _load_ca(context, Path(ca))
    if certificate is not None or key is not None:
        if certificate is None or key is None:
            missing, there = ("certificate", key) if certificate is None else ("key", certificate)
            raise OSError(errno.EINVAL, f"{there} needs a client {missing} beside it: give both, or neither")
        _load_chain(context, Path(certificate), Path(key))
    return context


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    if context.protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0


def _load_chain(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    _require_readable(certificate, "certificate")
    mode = _require_readable(key, "private key")
    if mode & stat.S_IRWXO:
        raise OSError(errno.EPERM, f"the private key {key} can be read by everybody (mode {mode:04o}): chmod 600 {key}")
    try:
        # A throw-away context tells a file that is no certificate from one that is no key.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(certificate)
    except ssl.SSLError:
        raise OSError(errno.EINVAL, f"{certificate} holds no certificate in PEM form") from None
    try:
        context.load_cert_chain(certificate, key, password=_no_passphrase(key))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            said = f"the private key {key} doesn't belong to the certificate {certificate}: name the two that do"
        elif error.reason in ("EE_KEY_TOO_SMALL", "CA_MD_TOO_WEAK", "CA_KEY_TOO_SMALL"):
            said = f"the certificate {certificate} is too weak ({error.reason.replace('_', ' ').lower()}): make another"
        else:
            said = f"{key} holds no private key in PEM form that can be used"
        raise OSError(errno.EINVAL, said) from None


def _load_ca(context: ssl.SSLContext, ca: Path) -> None:
    _require_readable(ca, "authority's certificate")
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError:
        raise OSError(errno.EINVAL, f"{ca} holds no certificate in PEM form") from None
    if not context.get_ca_certs():
        raise OSError(errno.EINVAL, f"no certificate in {ca} is an authority's, so it could verify nobody's")


def _require_readable(path: Path, what: str) -> int:
    """The mode of a file that can be read. Raises OSError with a sentence."""
    try:
        with path.open("rb") as file:
            file.read(1)
            return stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    except OSError as error:
        raise OSError(
            error.errno, f"the {what} {path} can't be read ({os.strerror(error.errno or 0)}): correct its path or mode"
        ) from None


def _no_passphrase(key: Path) -> Callable[[], str]:
    def refuse() -> str:
        # Without this OpenSSL would ask for it at a terminal.
        raise OSError(errno.EINVAL, f"the private key {key} has a passphrase: store it without one, with mode 0600")

    return refuse


def rehearse(certificate: str | os.PathLike[str], key: str | os.PathLike[str], *, server: bool) -> str | None:
    """What a peer that trusts this certificate itself would still find wrong with it now; None: nothing.

    Expired, not valid yet, or not made for this side (``server``: for servers, else for clients). It is a
    handshake in memory. Raises OSError as ``server_context`` does.
    """
    shows = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    looks = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if server else ssl.PROTOCOL_TLS_SERVER)
    _load_chain(shows, Path(certificate), Path(key))
    if server:
        looks.check_hostname = False
    else:
        shows.check_hostname = False
        shows.verify_mode = ssl.CERT_NONE
        _load_chain(looks, Path(certificate), Path(key))
    looks.verify_mode = ssl.CERT_REQUIRED
    looks.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    looks.load_verify_locations(certificate)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [shows.wrap_bio(back, there, server), looks.wrap_bio(there, back, not server)]
    for turn in range(_REHEARSAL_TURNS):
        try:
            sides[turn % 2].do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            if error.verify_code == _NOT_YET_VALID:
                return "it is not valid yet"
            return "it has expired" if error.verify_code == _EXPIRED else error.verify_message.rstrip(".")
        except ssl.SSLError as error:
            return str(explained(error))
    return None


class TlsFiles:
    """A server's files, read anew when they have changed; so a new certificate needs no restart.

    A file that is replaced while a handshake asks may not fit the others yet; that one, and any until all fit,
    get what was good last.
    """

    def __init__(
        self,
        certificate: str | os.PathLike[str],
        key: str | os.PathLike[str],
        ca: str | os.PathLike[str] | None = None,
    ) -> None:
        """Raises OSError as ``server_context`` does."""
        self.certificate, self.key = Path(certificate), Path(key)
        self.ca = None if ca is None else Path(ca)
        self._seen = self._looks()
        self._handed_out = 0
        self._context = server_context(self.certificate, self.key, self.ca)

    def changed(self) -> bool:
        """Whether a file was replaced or rewritten since ``context`` looked last. Three calls to stat(2)."""
        return self._looks() != self._seen

    def context(self) -> ssl.SSLContext:
        """For the next handshake. Raises OSError if what has changed can't be used: ``last_context`` still can."""
        seen = self._looks()
        self._handed_out += 1
        if seen != self._seen or self._handed_out == CONTEXT_HANDSHAKES:
            self._seen, self._handed_out = seen, 0
            self._context = server_context(self.certificate, self.key, self.ca)
        return self._context

    @property
    def last_context(self) -> ssl.SSLContext:
        """Of the files when they were good last."""
        return self._context

    def _looks(self) -> list[tuple[int, int, int, int] | None]:
        looks: list[tuple[int, int, int, int] | None] = []
        for path in (self.certificate, self.key, self.ca):
            try:
                status = path.stat() if path is not None else None
            except OSError:
                status = None
            looks.append(status and (status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode))
        return looks
