"""What a running daemon exports, for programs on trio that outlive it: keepers of devices, `terrace mount`.

Names, sizes and identities come over the control API. A daemon that doesn't answer is waited for, as it may be
restarted at this moment; after `PATIENCE_S` that is an error.

An export's identity is more than its name: a rollback puts another one under it, and so does who deletes a volume and
makes a new one. Whoever holds something in memory that belongs to an export, as the kernel does of a filesystem, must
never write it to another one; so `connect` gives a connection to the very export that is meant.
"""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import quote

import httpx
import trio

from nbd.channel import GoneError
from nbd.client import Address, attach, parse_uri
from nbd.negotiate import Terms
from terrace.apiclient import refusal
from terrace.exports import ExportRecord
from terrace.home import Home

PATIENCE_S: Final = 30.0
PAUSE_S: Final = 0.1
_OPEN_STATES: Final = ("online", "read-only")


class DaemonExports:
    """Asks the daemon at one home; `daemon_exports` makes it."""

    def __init__(self, home: Home, http: httpx.AsyncClient) -> None:
        self._home = home
        self._http = http

    async def pools(self) -> Sequence[str]:
        """Names of those that are open, and the first parts of the names of mirrors that have no leg here."""
        pools = [pool["name"] for pool in await self._ask("pools") if pool["state"] in _OPEN_STATES]
        try:
            return [*pools, *await self._ask("diskless")]
        except FileNotFoundError:  # a terraced that was not upgraded yet
            return pools

    async def exports(self, pool: str) -> Sequence[ExportRecord]:
        """Raises FileNotFoundError."""
        return [ExportRecord(**answer) for answer in await self._ask("pools", pool, "exports")]

    async def export(self, name: str) -> ExportRecord:
        """POOL/VOL or POOL/VOL@SNAP. Raises FileNotFoundError."""
        pool, _, rest = name.partition("/")
        return ExportRecord(**await self._ask("pools", pool, "exports", rest))

    async def space(self) -> tuple[int, int]:
        """Bytes that all open pools can hold, and what is still available of that."""
        pools = [pool for pool in await self._ask("pools") if pool["state"] in _OPEN_STATES]
        return sum(pool["capacity_bytes"] for pool in pools), sum(pool["available_bytes"] for pool in pools)

    async def connect(self, name: str, identity: str) -> tuple[socket.socket, Terms]:
        """A socket that is attached to the export of that identity (`nbd.client.attach`); the caller's.

        Raises GoneError where it won't ever be there again, another OSError where it may.
        """
        try:
            sock, terms = await attach(await self.address(), name)
        except FileNotFoundError:
            if await self.is_gone(name, identity):
                raise gone(name, identity, await self._identity_now(name)) from None
            raise
        try:
            # Now that the daemon counts us as a client nothing else can come under this name without a cut.
            now = await self.export(name)
        except BaseException:
            sock.close()
            raise
        if now.identity != identity:
            sock.close()
            raise gone(name, identity, now.identity)
        return sock, terms

    async def _identity_now(self, name: str) -> str | None:
        try:
            return (await self.export(name)).identity
        except OSError:
            return None

    async def is_gone(self, name: str, identity: str) -> bool:
        """Whether its pool is open, and it isn't there: it won't come back. Not if nobody can tell."""
        try:
            pool = await self._ask("pools", name.partition("/")[0])
        except OSError:
            return False
        if pool["state"] not in _OPEN_STATES:
            return False
        try:
            return (await self.export(name)).identity != identity
        except FileNotFoundError:
            return True
        except OSError:
            return False

    async def address(self) -> Address:
        """Where the daemon serves NBD: its Unix socket, wherever `[nbd] socket` has put it, else what it has.

        Raises OSError at once if it doesn't answer.
        """
        try:
            uris = (await self._ask_once("/v1/status"))["nbd"]["uris"]
        except httpx.TransportError as error:
            raise OSError(errno.ECONNREFUSED, f"no terraced answers at {self._home.api_socket}: {error}") from None
        return parse_uri(next((uri for uri in uris if uri.startswith("nbd+unix:")), uris[0]))[0]

    async def _ask(self, *path: str) -> Any:
        """The answer to a GET. A daemon that doesn't answer is waited for; ETIMEDOUT after `PATIENCE_S`."""
        url = "/v1/" + "/".join(quote(part, safe="") for part in path)
        with trio.move_on_after(PATIENCE_S):
            while True:
                try:
                    return await self._ask_once(url)
                except httpx.TransportError:
                    await trio.sleep(PAUSE_S)
        raise OSError(
            errno.ETIMEDOUT, f"no terraced has answered at {self._home.api_socket} for {PATIENCE_S:g} s; is it running?"
        )

    async def _ask_once(self, url: str) -> Any:
        response = await self._http.get(url)
        if not response.is_error:
            return json.loads(response.content)
        error = refusal(response.content)
        if error.errno == errno.ENOENT:
            raise FileNotFoundError(errno.ENOENT, str(error))
        raise error


def gone(name: str, was: str, now: str | None) -> GoneError:
    """The export of the identity `was` won't come back. `now`: of what has its name, if that is known."""
    if now is not None and was != now and was.split("/")[:2] == now.split("/")[:2]:
        # The same volume (`ExportRecord`): it is a mirror.
        return GoneError(
            errno.ESTALE,
            f"another node has been the primary of {name} while it was in use here, so what is in memory here is "
            "older than what it has: unmount it, `terrace detach --force` it or close it, and attach or open it anew "
            f"where it is served now (`terrace volume mirror explain {name}`). What was written here and not flushed, "
            "and what a promotion by force gave up, is lost",
        )
    return GoneError(
        errno.ESTALE,
        f"{name} was deleted or rolled back while it was in use here: detach or close it, check what the "
        "programs that used it have lost, and attach or open it anew",
    )


@asynccontextmanager
async def daemon_exports(home: Home) -> AsyncIterator[DaemonExports]:
    """Of the daemon at `home`, which need not be running yet."""
    transport = httpx.AsyncHTTPTransport(uds=str(home.api_socket), verify=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://terraced", timeout=PATIENCE_S) as http:
        yield DaemonExports(home, http)
