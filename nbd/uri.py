"""NBD URIs: where a server is, and which of its exports is meant.

``nbd://HOST[:PORT]/EXPORT`` and ``nbd+unix:///EXPORT?socket=PATH``, percent-encoded where needed.
Source: NetworkBlockDevice/nbd, ``doc/uri.md``. The schemes for TLS are refused.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

DEFAULT_PORT: Final = 10809

Address = tuple[str, int] | Path
"""Host and TCP port, or the path of a Unix socket."""


def parse_uri(uri: str) -> tuple[Address, str]:
    """The server's address and the export's name. Raises OSError with a sentence: EINVAL, EPROTONOSUPPORT for TLS."""
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
        query = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query), errors="strict")
        export = unquote(parts.path.removeprefix("/"), errors="strict")
    except ValueError as error:
        raise OSError(errno.EINVAL, f"{uri!r} is no URI: {error}") from None
    if parts.scheme in ("nbds", "nbds+unix"):
        raise OSError(errno.EPROTONOSUPPORT, f"{uri!r} asks for TLS, which this client doesn't speak")
    if parts.scheme not in ("nbd", "nbd+unix"):
        raise OSError(errno.EINVAL, f"{uri!r} is no NBD URI: it begins with neither nbd:// nor nbd+unix://")
    if parts.fragment or parts.username is not None:
        raise OSError(errno.EINVAL, f"{uri!r}: an NBD URI has no fragment and no user here")
    if parts.scheme == "nbd":
        if query or not host:
            raise OSError(errno.EINVAL, f"{uri!r}: nbd:// takes a host, a port and an export, nothing else")
        return (unquote(host), DEFAULT_PORT if port is None else port), export
    sockets = query.pop("socket", [])
    if parts.netloc or query or len(sockets) != 1 or not sockets[0]:
        raise OSError(errno.EINVAL, f"{uri!r}: nbd+unix:/// takes an export and ?socket=PATH, nothing else")
    return Path(sockets[0]), export
