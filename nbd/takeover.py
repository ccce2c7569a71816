"""A connection that stops being NBD: after a private option it belongs to somebody else.

What speaks another protocol on the NBD listener (nodes among themselves, say) needs no port and no TLS of its own: it
shakes hands as any NBD client, with STARTTLS and certificates, and then asks for the connection itself with an option
that the protocol doesn't know. A server that has nobody for this option answers ERR_UNSUP, as to any unknown one.

====================  ==================================================================================================
client                server
====================  ==================================================================================================
option, up to 4 KiB   ``Takeover.judge`` looks at it: a sentence is sent as ERR_POLICY, and the handshake goes on
..                    None is sent as ACK without data; what either side sends from here on is not NBD
====================  ==================================================================================================

From then on the connection is ``run``'s, until that returns or is cancelled; it still counts among the server's
connections. A drain, and a suspension, cancel it: peers connect again, to the server that there is then.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Protocol

from nbd.export import Client
from nbd.tls import TlsSocket

__all__ = ["TakenOver", "Takeover"]


class Takeover(Protocol):
    """Who takes connections over by one option."""

    def judge(self, client: Client, data: bytes) -> str | None:
        """None if this client may have it, else a sentence why not. ``data``: the option's, anything up to 4 KiB.

        Synchronous and quick: whoever can connect may make the server ask this a thousand times.
        """

    async def run(self, sock: socket.socket | TlsSocket, client: Client, data: bytes, received: bytes) -> None:
        """Talk to the client over ``sock``, which is non-blocking, and which the caller closes afterwards.

        ``received`` came behind the option and is to be handled before what ``sock`` has. An OSError ends this
        connection with a line in the log. It is cancelled when the server drains, is suspended, or stops; nothing may
        use ``sock`` any more when it has ended.
        """


@dataclass(frozen=True, slots=True)
class TakenOver:
    """A handshake has ended in this."""

    takeover: Takeover
    data: bytes
    received: bytes
