"""NBD URIs: where a server is, which of its exports is meant, and how TLS is to be spoken.

``nbd://HOST[:PORT]/EXPORT`` and ``nbd+unix:///EXPORT?socket=PATH``, percent-encoded where needed; ``nbds`` and
``nbds+unix`` for TLS, with these parameters behind ``?`` and ``&``:

    tls-certificates=DIR  ``ca-cert.pem`` is what the server's certificate must be signed by (without DIR: by what the
                          system trusts); ``client-cert.pem`` and ``client-key.pem``, if they are there, are shown
    tls-hostname=NAME     the name or IP address that it must be for, in place of HOST
    tls-verify-peer=0     any certificate will do
    tls-type=x509         no other type is spoken

Source: NetworkBlockDevice/nbd, ``doc/uri.md``; ``tls-certificates`` is from libnbd's nbd_connect_uri(3).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

DEFAULT_PORT: Final = 10809
_TLS_PARAMETERS: Final = ("tls-certificates", "tls-hostname", "tls-verify-peer", "tls-type")

Address = tuple[str, int] | Path
"""Host and TCP port, or the path of a Unix socket."""


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """How a client speaks TLS: what it trusts and shows."""

    certificates: Path | None = None
    """A directory with ``ca-cert.pem``, and maybe ``client-cert.pem`` and ``client-key.pem``; None: the system's."""
    hostname: str | None = None
    """What the server's certificate must be for; None: the host of the address. A Unix socket has none, and then
    only who has signed it is looked at."""
    verify: bool = True
    """False: any certificate will do, and so whoever is in between can read and change everything."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a URI means."""

    address: Address
    export: str
    tls: TlsOptions | None


def parse_uri(uri: str) -> tuple[Address, str]:
    """The address and the export's name, for who speaks no TLS: EPROTONOSUPPORT; else as ``parse_target``."""
    target = parse_target(uri)
    if target.tls is not None:
        raise OSError(
            errno.EPROTONOSUPPORT, f"{uri!r} asks for TLS, which is not spoken here: use nbd:// or nbd+unix://"
        )
    return target.address, target.export


def export_of(uri: str) -> tuple[Address, str]:
    """Where it is, and its name there; the same for all URIs of an export. Raises OSError as ``parse_target``."""
    target = parse_target(uri)
    return target.address, target.export


def parse_target(uri: str) -> Target:
    """Raises OSError with a sentence: EINVAL; EPROTONOSUPPORT for a type of TLS that isn't spoken."""
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
        # A plus sign is one in a URI, and a space only in forms of the web.
        text = parts.query.replace("+", "%2B")
        query = parse_qs(text, keep_blank_values=True, strict_parsing=bool(parts.query), errors="strict")
        export = unquote(parts.path.removeprefix("/"), errors="strict")
    except ValueError as error:
        raise OSError(errno.EINVAL, f"{uri!r} is no URI: {error}") from None
    scheme, plus, unix = parts.scheme.partition("+")
    if scheme not in ("nbd", "nbds") or plus + unix not in ("", "+unix"):
        raise OSError(
            errno.EINVAL, f"{uri!r} is no NBD URI: it begins with none of nbd://, nbds://, nbd+unix:// and nbds+unix://"
        )
    if parts.fragment or parts.username is not None:
        raise OSError(errno.EINVAL, f"{uri!r}: an NBD URI has no fragment and no user here")
    for name, values in query.items():
        if len(values) != 1 or not values[0]:
            raise OSError(errno.EINVAL, f"{uri!r}: {name} must be there once, with a value")
    given = {name: values[0] for name, values in query.items()}
    tls = _take_tls(uri, given) if scheme == "nbds" else None
    address = _take_socket(uri, parts, given) if unix else _host(uri, host, port)
    for name in given:
        why = "is for nbds:// and nbds+unix://" if name in _TLS_PARAMETERS else "is no parameter here"
        raise OSError(errno.EINVAL, f"{uri!r}: {name} {why}")
    return Target(address, export, tls)


def _host(uri: str, host: str | None, port: int | None) -> Address:
    if not host:
        raise OSError(errno.EINVAL, f"{uri!r} names no host")
    return unquote(host), DEFAULT_PORT if port is None else port


def _take_socket(uri: str, parts: SplitResult, given: dict[str, str]) -> Address:
    path = given.pop("socket", None)
    if parts.netloc or path is None:
        raise OSError(errno.EINVAL, f"{uri!r}: {parts.scheme}:/// takes an export and ?socket=PATH, and no host")
    return Path(path)


def _take_tls(uri: str, given: dict[str, str]) -> TlsOptions:
    kind = given.pop("tls-type", "x509")
    if kind != "x509":
        raise OSError(errno.EPROTONOSUPPORT, f"{uri!r}: TLS of the type {kind!r} is not spoken here: use tls-type=x509")
    verify = given.pop("tls-verify-peer", "1")
    if verify not in ("0", "1"):
        raise OSError(errno.EINVAL, f"{uri!r}: tls-verify-peer is 0 or 1, not {verify!r}")
    directory = given.pop("tls-certificates", None)
    return TlsOptions(None if directory is None else Path(directory), given.pop("tls-hostname", None), verify == "1")
