"""Which NBD URIs name one export, however each writes the host: two mirrors on it would overwrite each other.

Hosts are compared by the addresses that they resolve to, and Unix sockets by the file that they are. What isn't known
in time is compared as it is written. A server that is reached by several addresses, none of whose names has two of
them, isn't known again: nothing in the protocol says which server one talks to.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import trio

from nbd.uri import Address, export_of

LOOKUP_S: Final = 3.0
"""For so long names are resolved, all of one comparison together."""
_MOST_LOOKUPS: Final = 8
"""Threads. One that has no end keeps its own, and the other work of this process doesn't wait for it."""
_LOOPBACK: Final = "127.0.0.1"

Marks = frozenset[Hashable]
"""Of an export: two with one in common are the same."""


class SameExports:
    """See the module."""

    def __init__(self, addresses: Callable[[str], Iterable[str]] | None = None) -> None:
        """`addresses`: of a host's name, numeric; may block, and raises OSError or ValueError if it has none."""
        self._addresses = addresses_of if addresses is None else addresses
        self._limiter = trio.CapacityLimiter(_MOST_LOOKUPS)

    async def marks(self, uris: Iterable[str]) -> dict[str, Marks]:
        """Of each. Raises OSError as `nbd.uri.parse_target`."""
        exports = {uri: export_of(uri) for uri in uris}
        found: dict[Address, Marks] = {}

        async def one(address: Address) -> None:
            look = partial(_marks_of, address, self._addresses)
            found[address] = await trio.to_thread.run_sync(look, abandon_on_cancel=True, limiter=self._limiter)

        with trio.move_on_after(LOOKUP_S):
            async with trio.open_nursery() as nursery:
                for address in {address for address, _ in exports.values()}:
                    nursery.start_soon(one, address)
        return {
            uri: frozenset((mark, export) for mark in found.get(address, frozenset()) | {_as_written(address)})
            for uri, (address, export) in exports.items()
        }

    async def same(self, uri: str, others: Mapping[str, str]) -> str | None:
        """The first of the `others` that is the export of ``uri``: its key. Their values are URIs."""
        marks = await self.marks([uri, *others.values()])
        return next((key for key, other in others.items() if marks[uri] & marks[other]), None)


def addresses_of(host: str) -> list[str]:
    """What the system's resolver says."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]


def _marks_of(address: Address, addresses: Callable[[str], Iterable[str]]) -> Marks:
    """What is to be found out; blocks."""
    found: set[Hashable] = set()
    with suppress(OSError, ValueError):
        if isinstance(address, Path):
            real = os.path.realpath(address)
            found.add(("socket", real))  # also of a path where nothing is now
            status = Path(real).stat()
            found.add(("file", status.st_dev, status.st_ino))
        else:
            host, port = address
            found |= {(_plain(one), port) for one in addresses(host)}
    return frozenset(found)


def _as_written(address: Address) -> Hashable:
    if isinstance(address, Path):
        return "socket", str(Path.cwd() / address)
    host, port = address
    host = host.lower().rstrip(".")
    # RFC 6761, section 6.3: whatever a resolver would say.
    return _LOOPBACK if host == "localhost" else _plain(host), port


def _plain(host: str) -> str:
    """One form for all of an address; a name stays."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    # A server of this machine listens to both families, as a rule; Linux takes no address for loopback too.
    if address.is_unspecified or address == ipaddress.IPv6Address("::1"):
        return _LOOPBACK
    return str(address)
