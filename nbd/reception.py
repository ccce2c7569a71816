"""A client from its first byte to its export, or to who takes it over: the handshake, and TLS where it asks for that.

What is said is decided in ``nbd.handshake``; here is what waits: for the client, for the export to be opened, for TLS.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import trio

from nbd.export import Client, Export, Exports
from nbd.handshake import NEED_DATA, Handshake, Hangup, Send, WantExport, WantList, WantTakeover, WantTls
from nbd.outbox import Outbox
from nbd.takeover import TakenOver, Takeover
from nbd.tls import TlsError, TlsFiles, TlsSocket
from nbd.transmission import Session

log = logging.getLogger("nbd.server")


class Reception:
    """Of one client. ``sock`` and ``client`` change when TLS begins; the outbox is told."""

    def __init__(
        self,
        sock: socket.socket,
        client: Client,
        exports: Exports,
        outbox: Outbox,
        *,
        tls: TlsFiles | None = None,
        tls_required: bool = False,
        takeovers: Mapping[int, Takeover] = MappingProxyType({}),
    ) -> None:
        self.sock: socket.socket | TlsSocket = sock
        self.client = client
        self.tls_version = ""
        self._peer = client.peer
        self._exports = exports
        self._outbox = outbox
        self._tls = tls
        self._takeovers = takeovers
        self._declined = False
        self._machine = Handshake(tls_offered=tls is not None, tls_required=tls_required, takeovers=takeovers)

    @property
    def session(self) -> Session:
        """What was agreed on, once `run` has returned an export."""
        return self._machine.session

    def leftover(self) -> bytes:
        """What came behind the handshake: the first requests."""
        return self._machine.leftover()

    def shut_down(self) -> None:
        """Refuse what is asked from now on, for the server drains."""
        self._machine.shutting_down = True

    async def run(self) -> Export | TakenOver | None:
        """The export, opened for the client, or who takes it over, if it comes to that.

        How long that may take is the caller's affair.
        """
        machine = self._machine
        while True:
            event = machine.next_event()
            if event is NEED_DATA:
                data = await self._receive_some()
                if not data:
                    self._tell_left()
                    return None
                machine.feed(data)
            elif isinstance(event, Send):
                await self._outbox.send_all(event.data)
            elif isinstance(event, WantList):
                await self._outbox.send_all(machine.listed(self._exports.list(self.client)))
            elif isinstance(event, WantExport):
                export = await self._open(event)
                if export is not None:
                    return export
            elif isinstance(event, WantTls):
                if not await self._start_tls(event.acknowledgement):
                    return None
                machine.secured()
            elif isinstance(event, WantTakeover):
                taken = await self._give_away(event)
                if taken is not None:
                    return taken
            elif isinstance(event, Hangup):
                await self._outbox.send_all(event.farewell)
                if event.rude:
                    log.warning("%s: dropped: %s", self._peer, event.reason)
                else:
                    self._tell_left()
                return None
            if self._outbox.broken:
                return None

    def _tell_left(self) -> None:
        if self._machine.plaintext_refused:
            log.info("%s: left: it asked for an export without TLS, which is required here", self._peer)
        else:
            log.debug("%s: left during the handshake", self._peer)

    async def _start_tls(self, acknowledgement: bytes) -> bool:
        """From here on the connection talks through TLS; False if it doesn't come about."""
        raw = self.sock
        assert isinstance(raw, socket.socket) and self._tls is not None
        try:
            context = self._tls.context()
        except OSError as error:
            log.error("TLS files have changed and can't be used, so those of before stay: %s", error.strerror)
            context = self._tls.last_context
        try:
            early = raw.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            pass
        except OSError:
            return False
        else:
            if early:
                log.warning("%s: dropped: data in plaintext behind STARTTLS", self._peer)
            return False
        await self._outbox.send_all(acknowledgement)
        if self._outbox.broken:
            return False
        self.sock = self._outbox.sock = sock = TlsSocket(raw, context, server_side=True)
        try:
            await sock.handshake()
            identity = sock.peer
        except TlsError as error:
            log.warning("%s: dropped: %s", self._peer, error)
            return False
        except OSError as error:
            log.info("%s: gone during the TLS handshake: %s", self._peer, error.strerror)
            return False
        self.tls_version = sock.version
        self.client = replace(self.client, encrypted=True, identity=identity)
        return True

    @property
    def secured_how(self) -> str:
        """For the log: `` (TLSv1.3, CN=backup)``."""
        if not self.tls_version:
            return ""
        identity = self.client.identity
        return f" ({self.tls_version}, {identity.subject or identity.names})" if identity else f" ({self.tls_version})"

    async def _open(self, event: WantExport) -> Export | None:
        """Answer a question about an export; returns it, still open, if transmission begins."""
        machine = self._machine
        try:
            export = await self._exports.acquire(event.name, self.client)
        except OSError as error:
            reply = machine.refused(error)
            if reply:
                await self._outbox.send_all(reply)
            else:
                log.warning("%s: dropped: no export %r: %s", self._peer, event.name, error.strerror or error)
                self._outbox.broken = True
            return None
        keep = False
        try:
            await self._outbox.send_all(machine.described(export))
            keep = event.enters and not self._outbox.broken
        finally:
            if not keep:
                self._exports.release(export)
        if not keep:
            return None
        return export

    async def _give_away(self, event: WantTakeover) -> TakenOver | None:
        """Answer a private option; None where it is refused, or nobody is there any more."""
        machine, takeover = self._machine, self._takeovers[event.option]
        why = takeover.judge(self.client, event.data)
        if why is not None:
            if not self._declined:  # a client may ask as often as it likes
                log.info("%s: refused: %s", self._peer, why)
            self._declined = True
            await self._outbox.send_all(machine.declined(why))
            return None
        await self._outbox.send_all(machine.given_away())
        return None if self._outbox.broken else TakenOver(takeover, event.data, machine.leftover())

    async def _receive_some(self) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            # What TLS has decrypted already is not in the socket any more, so first the call and then the wait.
            try:
                return self.sock.recv(16384)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.sock)
            except OSError as error:
                tell_lost(self._peer, error)
                return b""


def tell_lost(peer: str, error: OSError) -> None:
    """Nothing more can be received. That clients vanish is no news; what breaks TLS may be an attack."""
    if isinstance(error, TlsError):
        log.warning("%s: dropped: %s", peer, error)
    else:
        log.debug("%s: %s", peer, error)
