"""Where the daemon listens: every address of NBD and the control API, bound here or passed in by systemd."""

from __future__ import annotations

import errno
import ipaddress
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from nbd.listen import Listener, open_tcp, open_unix, plain_address
from terrace.config import NbdConfig, TlsConfig, split_address
from terrace.home import Home
from terrace.passedsockets import PassedSockets, leave

log = logging.getLogger("terraced")


@dataclass(frozen=True)
class Listening:
    nbd: Sequence[Listener]
    api: Listener
    passed: PassedSockets

    def all(self) -> list[Listener]:
        return [*self.nbd, self.api]

    def claim(self) -> None:
        """This process is the one that serves here."""
        self.passed.claim()
        leave(self.all())


async def listen(
    home: Home, config: NbdConfig, passed: PassedSockets, sockets: ExitStack, for_peers: Sequence[str] = ()
) -> Listening:
    """All addresses, those `for_peers` behind the others; closed with `sockets`.

    Raises OSError whose text names the one that can't be had.
    """
    try:
        nbd = await _listen_nbd(home, config, passed, sockets, for_peers)
        api = await open_unix(home.api_socket, 0o600, passed.take)
        sockets.callback(api.close)
        passed.settle()
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}{_next_step(error)}") from None
    return Listening(nbd, api, passed)


async def _listen_nbd(
    home: Home, config: NbdConfig, passed: PassedSockets, sockets: ExitStack, for_peers: Sequence[str]
) -> list[Listener]:
    listeners: list[Listener] = []
    for address in dict.fromkeys((*config.listen, *for_peers)):
        host, port = split_address(address)
        bound = await open_tcp(host, port, passed.take)
        for listener in bound:
            sockets.callback(listener.close)
            if not ipaddress.ip_address(plain_address(listener.sock.getsockname()[0])).is_loopback:
                _judge_open_address(config.tls, listener.address)
        listeners += bound
    if config.socket:
        listener = await open_unix(home.path / config.socket, 0o600, passed.take)
        sockets.callback(listener.close)
        listeners.append(listener)
    if not listeners:
        raise OSError(errno.EINVAL, "there is nothing to serve NBD on; set listen or socket under [nbd]")
    return listeners


def judge_addresses(config: NbdConfig, for_peers: Sequence[str] = ()) -> None:
    """What can be said of them before anything is bound: names are not looked up. Raises OSError."""
    for address in (*config.listen, *for_peers):
        host, _ = split_address(address)
        try:
            is_loopback = ipaddress.ip_address(plain_address(host)).is_loopback
        except ValueError:
            continue
        if not is_loopback:
            _refuse_open_address(config.tls, address)


def _judge_open_address(tls: TlsConfig, address: str) -> None:
    """What others can reach wants TLS. Raises OSError."""
    _refuse_open_address(tls, address)
    if tls.mode != "required":
        log.warning("NBD on %s is open: whoever reaches it can read and write every volume", address)
    elif tls.clients == "any":
        log.warning("NBD on %s takes clients without a certificate: whoever reaches it can have every volume", address)


def _refuse_open_address(tls: TlsConfig, address: str) -> None:
    if tls.mode != "required" and not tls.plaintext:
        raise OSError(
            errno.EPERM,
            f"NBD on {address} would be open to the network without TLS: make certificates with `terrace tls init` "
            'and set mode = "required" under [nbd.tls], or, where nobody else can reach it, plaintext = true there',
        )


def _next_step(error: OSError) -> str:
    if error.errno in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
        return "; `ss -ltnxp` shows who listens where; other addresses can be set under [nbd] in a --config file"
    return ""
