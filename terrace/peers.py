"""Other nodes: a connection to each for calls, kept up, and the judgement of those that connect to us.

All that nodes say to each other goes over the NBD listener: the option `OPT_TERRACE` takes a connection over
(`nbd.takeover`), and its data, JSON, says who wants it and what for: `calls`, or a session of a `leg`. Both directions
are under TLS with certificates of one authority, and a certificate must name the node that its holder claims to be
(`[peers.NAME] subject`, by default CN=NAME). Whoever has only a certificate of an NBD client gets nothing here.

Without TLS nothing is taken but from this host itself, and only where `plaintext` says so.

A `Peer` asks its node every `HELLO_S` how it is, so that `last_seen` is no older than that while all is well. Who is
away is tried again, after pauses up to `LONGEST_PAUSE_S`; nobody has to wait for that: a call to who isn't connected
fails at once.
"""

from __future__ import annotations

import enum
import errno
import ipaddress
import logging
import random
import secrets
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from nbd.export import Client
from nbd.opening import ClientLimits, take_over
from nbd.tls import Identity, TlsSocket, client_context
from nbd.wire import OPT_TERRACE
from replication.calls import Calls, serve_calls
from replication.stream import Traffic
from replication.wire import CallsOption, LegOption, read_option
from terrace.access import facts_of, matches_subject
from terrace.config import Config, PeerConfig, split_address

log = logging.getLogger("terraced")

PROTOCOL: Final = 1
HELLO_S: Final = 2.0
HELLO_TIMEOUT_S: Final = 5.0
CONNECT_S: Final = 5.0
FIRST_PAUSE_S: Final = 0.2
LONGEST_PAUSE_S: Final = 2.0
ID_FILE: Final = "node-id"

Socket = socket.socket | TlsSocket
Handler = Callable[[str, dict[str, Any]], Awaitable[Any]]
"""Takes the name of the node that calls, and the parameters. Raises OSError with a sentence."""


class Legs(Protocol):
    """The legs of this node, for primaries elsewhere."""

    def judge(self, option: LegOption) -> str | None:
        """A sentence for a session that can't be had."""

    async def serve(self, sock: Socket, received: bytes, option: LegOption) -> None:
        """One session."""


_OTHER_AUTHORITY: Final = ("self-signed", "self signed", "issuer", "signature failure", "verify the first certificate")
"""In OpenSSL's words for a certificate that the authority which is asked has not signed."""
_REFUSALS: Final = (errno.EACCES, errno.EKEYREJECTED, errno.EKEYEXPIRED, errno.EPROTO, errno.ENOTSUP, errno.EPERM)


class PeerState(enum.Enum):
    """How it is with a peer now."""

    CONNECTING = "Connecting"
    ONLINE = "Online"
    OFFLINE = "Offline"
    REFUSED = "Refused"  # one of us doesn't take the other for who it should be


def home_id(home: Path) -> str:
    """32 hex digits that no other home has; made where there are none. Raises OSError."""
    file = home / ID_FILE
    try:
        text = file.read_text(encoding="ascii").strip()
        if len(text) == 32 and set(text) <= set("0123456789abcdef"):
            return text
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise OSError(errno.EIO, f"{file} can't be read: {error}") from None
    made = secrets.token_hex(16)
    beside = file.with_suffix(".new")
    beside.write_text(made + "\n", encoding="ascii")
    beside.replace(file)
    return made


class Peer:
    """One other node, as far as it is known. Made and kept up by `Peers`."""

    def __init__(self, name: str, config: PeerConfig) -> None:
        self.name = name
        self.config = config
        self.state = PeerState.CONNECTING
        self.problem = ""
        """Why it isn't online; empty if it is."""
        self.next_step = ""
        """What an operator can do about that; empty where the problem says it, or nothing is known to help."""
        self.hello: dict[str, Any] = {}
        """What it said of itself last."""
        self.seen_at: float | None = None
        """Seconds since the epoch when it answered last."""
        self.calls: Calls | None = None
        self.came = trio.Event()
        """Set while it is online."""

    def status(self) -> dict[str, Any]:
        """For the control API."""
        return {
            "name": self.name,
            "address": self.config.address,
            "state": self.state.value,
            "here": False,
            "encrypted": not self.config.plaintext,
            "version": self.hello.get("version"),
            "home_id": self.hello.get("home_id"),
            "pools": self.hello.get("pools", []),
            "seen_at": self.seen_at,
            "problem": f"{self.problem}; {self.next_step}" if self.next_step else self.problem,
        }


class Peers:
    """All peers of this node. Somebody has to run `run`."""

    def __init__(
        self,
        config: Config,
        home: Path,
        version: str,
        pools: Callable[[], list[str]],
        tell: Callable[[str, str, str], None],
    ) -> None:
        self.node = config.node.name
        self._config = config
        self._home = home
        self._version = version
        self._pools = pools
        self._tell = tell
        self._id = home_id(home) if self.node else ""
        self.peers = {name: Peer(name, one) for name, one in config.peers.items()}
        self.traffic = {name: Traffic() for name in config.peers}
        """With each peer, over all connections, since this daemon was started."""
        self.on_change: list[Callable[[Peer], None]] = []
        """Called synchronously when a peer has come or gone."""

    def hello(self) -> dict[str, Any]:
        """What this node says of itself."""
        return {
            "node": self.node,
            "version": self._version,
            "protocol": PROTOCOL,
            "home_id": self._id,
            "pools": self._pools(),
        }

    def status(self) -> list[dict[str, Any]]:
        """This node first, where it has a name, then its peers by name."""
        here = self.hello()
        own = {
            "name": self.node,
            "address": ", ".join(self._config.node.listen or self._config.nbd.listen),
            "state": PeerState.ONLINE.value,
            "here": True,
            "encrypted": self._config.nbd.tls.mode != "off",
            "version": here["version"],
            "home_id": here["home_id"],
            "pools": here["pools"],
            "seen_at": time.time(),
            "problem": "",
        }
        return [*([own] if self.node else []), *(self.peers[name].status() for name in sorted(self.peers))]

    def peer(self, name: str) -> Peer:
        """Raises ENOENT with the next step."""
        if name not in self.peers:
            known = ", ".join(sorted(self.peers)) or "none"
            raise OSError(
                errno.ENOENT,
                f"there is no peer {name!r} (known: {known}): write its address under [peers.{name}] in the "
                "configuration of this node, and restart terraced",
            )
        return self.peers[name]

    async def call(self, name: str, method: str, params: dict[str, Any], timeout_s: float = 10.0) -> Any:
        """What a node answers. Raises what it raised, or ENOTCONN at once if it can't be reached now."""
        peer = self.peer(name)
        if peer.calls is None:
            raise OSError(errno.ENOTCONN, f"node {name} can't be reached: {peer.problem or 'no connection yet'}")
        return await peer.calls.call(method, params, timeout_s=timeout_s)

    async def connect(self, name: str, wanted: CallsOption | LegOption) -> tuple[Socket, bytes]:
        """A connection to that node which is no longer NBD; the caller's. Raises OSError."""
        peer = self.peer(name)
        config = peer.config
        context: ssl.SSLContext | None = None
        if not config.plaintext:
            context = await trio.to_thread.run_sync(self._client_context, abandon_on_cancel=True)
        limits = ClientLimits(handshake_timeout_s=CONNECT_S, dead_after_s=HELLO_TIMEOUT_S)
        address = split_address(config.address)
        try:
            sock, received = await take_over(address, OPT_TERRACE, wanted.encode(), limits=limits, tls=context)
        except OSError as error:
            said = error.strerror or str(error)
            step = _about_certificates(error, name, self._home / self._config.nbd.tls.ca) if context is not None else ""
            raise OSError(error.errno, f"{said}; {step}" if step else said) from None
        try:
            if isinstance(sock, TlsSocket):
                refusal = judge_identity(sock.peer, name, config)
                if refusal:
                    raise OSError(errno.EKEYREJECTED, f"{config.address}: {refusal}")
        except BaseException:
            sock.close()
            raise
        return sock, received

    def _client_context(self) -> ssl.SSLContext:
        certificate, key = self._config.certificate_and_key(self._home)
        return client_context(self._home / self._config.nbd.tls.ca, certificate, key, check_hostname=False)

    async def run(self) -> None:
        """The task: a connection for calls to each peer, as long as there is anybody to run it."""
        async with trio.open_nursery() as nursery:
            for peer in self.peers.values():
                nursery.start_soon(self._keep, peer)

    async def _keep(self, peer: Peer) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                async with trio.open_nursery() as nursery:
                    sock, received = await self.connect(peer.name, CallsOption(self.node))
                    calls = Calls(sock, received, peer=f"node {peer.name}", traffic=self.traffic[peer.name])
                    nursery.start_soon(_until_ended, calls, nursery.cancel_scope)
                    try:
                        while True:
                            self._judge_hello(peer, await self._exchange_hellos(calls))
                            if peer.calls is None:
                                peer.calls, pause_s = calls, FIRST_PAUSE_S
                                self._change(peer, PeerState.ONLINE, "")
                            await trio.sleep(HELLO_S)
                    finally:
                        peer.calls = None
                        calls.close()
                        nursery.cancel_scope.cancel()
            except* OSError as group:
                error = _first(group)
                refused = error.errno in _REFUSALS
                self._change(peer, PeerState.REFUSED if refused else PeerState.OFFLINE, error.strerror or str(error))
                peer.next_step = _next_step(error, peer.name)
            await trio.sleep(pause_s * random.uniform(0.8, 1.2))  # else nodes that start together meet each other busy
            pause_s = min(LONGEST_PAUSE_S, pause_s * 2)

    async def _exchange_hellos(self, calls: Calls) -> Any:
        """Raises OSError; where the connection has failed, why, and not what became of this call by that."""
        try:
            return await calls.call("node.hello", self.hello(), HELLO_TIMEOUT_S)
        except OSError:
            if calls.failure is None:
                raise
            raise OSError(calls.failure.errno, calls.failure.strerror) from None

    def _judge_hello(self, peer: Peer, answer: Any) -> None:
        """Raises OSError EPERM if it is somebody else."""
        if not isinstance(answer, dict) or not isinstance(answer.get("pools"), list):
            raise OSError(errno.EPROTO, f"{peer.config.address} gave no answer that a node gives")
        if answer.get("home_id") == self._id:
            raise OSError(errno.EPERM, f"{peer.config.address} is this node itself; write the address of {peer.name}")
        if answer.get("node") != peer.name:
            raise OSError(
                errno.EPERM,
                f"{peer.config.address} is the node {answer.get('node')!r}, not {peer.name!r}: give the peer that name",
            )
        peer.hello, peer.seen_at = answer, time.time()

    def _change(self, peer: Peer, state: PeerState, problem: str) -> None:
        before, peer.state, peer.problem, peer.next_step = peer.state, state, problem, ""
        if state is PeerState.ONLINE:
            peer.came.set()
        elif before is PeerState.ONLINE:
            peer.came = trio.Event()
        if state is before:
            return
        if state is PeerState.ONLINE:
            self._tell("node", peer.name, f"node {peer.name} is online at {peer.config.address}")
        elif before is PeerState.ONLINE or state is PeerState.REFUSED:
            self._tell("node", peer.name, f"node {peer.name} is {state.value.lower()}: {problem}")
        for call in list(self.on_change):
            call(peer)


def _next_step(error: OSError, name: str) -> str:
    """Towards a peer that can't be reached, by what the attempt came to."""
    correct = f"correct the address under [peers.{name}]"
    if error.errno == errno.ECONNREFUSED:
        return f"start terraced there, or {correct}"
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT):
        return f"start that host or mend the way there, or {correct}"
    return ""


def _about_certificates(error: OSError, name: str, ca: Path) -> str:
    """The next step where one of both doesn't accept the other one's certificate; ``ca``: this node's authority."""
    said = error.strerror or ""
    same = (
        "all nodes need certificates of one authority: make those of both where its ca-key.pem is, with `terrace tls "
        "node NAME`, and copy them into tls/ of each with its ca-cert.pem (`terrace tls show` on both tells whose they "
        "are)"
    )
    if error.errno == errno.EKEYREJECTED and any(one in said for one in _OTHER_AUTHORITY):
        return f"that of node {name} was not signed by the authority in {ca}: {same}"
    if "peer refused: unknown ca" in said:
        return f"the authority that node {name} goes by has not signed the certificate of this node: {same}"
    if "peer refused: certificate expired" in said:
        return "that of this node has expired: make another with `terrace tls node` and its name, and copy it into tls/"
    if error.errno in (errno.EKEYREJECTED, errno.EKEYEXPIRED):
        return f"make another for node {name} with `terrace tls node {name}`, and copy it into its tls/"
    return ""


def _first(group: BaseExceptionGroup[OSError]) -> OSError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, OSError)
    return error


async def _until_ended(calls: Calls, scope: trio.CancelScope) -> None:
    """Run the connection. Raises OSError as soon as it has ended by itself, so that another one is sought at once."""
    await calls.run()
    if calls.failure is not None and not scope.cancel_called:
        raise OSError(calls.failure.errno, calls.failure.strerror)


def judge_identity(identity: Identity | None, name: str, config: PeerConfig) -> str | None:
    """Whether a verified certificate names that peer; a sentence if not."""
    if identity is None:
        return f"it showed no certificate that was verified, and the node {name} has to"
    facts = facts_of(identity)
    if any(matches_subject(pattern, facts) for pattern in config.subjects(name)):
        return None
    wanted = " or ".join(config.subjects(name))
    return (
        f"its certificate is of {facts[0] or 'nobody'}, and the node {name} has {wanted}: make one with "
        f"`terrace tls node {name}`, or say subject under [peers.{name}]"
    )


class NodeTakeover:
    """Takes over the connections of peers; implements `nbd.takeover.Takeover`."""

    def __init__(self, peers: Peers, handlers: Mapping[str, Handler], legs: Legs) -> None:
        self._peers = peers
        self._handlers = handlers
        self._legs = legs

    def judge(self, client: Client, data: bytes) -> str | None:
        """A sentence for who may not have it."""
        try:
            option = read_option(data)
        except OSError as error:
            return error.strerror
        refusal = self._judge_node(client, option.node)
        if refusal is None and isinstance(option, LegOption):
            return self._legs.judge(option)
        return refusal

    def _judge_node(self, client: Client, name: str) -> str | None:
        config = self._peers.peers[name].config if name in self._peers.peers else None
        if config is None:
            return f"node {name[:64]!r} is no peer of {self._peers.node!r}: write it under [peers.{name[:64]}] there"
        if config.plaintext and not client.encrypted and _is_here(client):
            return None
        if not client.encrypted:
            return "nodes talk over TLS only"
        return judge_identity(client.identity, name, config)

    async def run(self, sock: Socket, client: Client, data: bytes, received: bytes) -> None:
        """Serve calls, or a leg's session, until the peer has gone."""
        option = read_option(data)
        if isinstance(option, LegOption):
            await self._legs.serve(sock, received, option)
            return
        handlers = {method: partial(call, option.node) for method, call in self._handlers.items()}
        traffic = self._peers.traffic.get(option.node)
        await serve_calls(sock, received, handlers, peer=f"node {option.node}", traffic=traffic)


def _is_here(client: Client) -> bool:
    return client.address is None or ipaddress.ip_address(client.address).is_loopback
