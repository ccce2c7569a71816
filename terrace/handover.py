"""From one daemon to the next without a disconnect: how the two processes talk.

The *predecessor* runs and wants to be replaced; it starts its *successor*, with the command line that it was started
with itself, and a socket between the two. They take turns:

    predecessor                            successor
    serves                                 loads the program, reads the configuration
                           <-  loaded
    stops its clients at request
    boundaries, closes the pools
    take, clients ...      ->              has the home's lock, listening sockets and clients; opens the pools
                           <-  ready
    serve                  ->              serves
    ends

Before `serve` the successor touches no client, and the predecessor keeps all that it gave: if the successor fails, dies
or is too slow, it is killed, and the predecessor opens the pools and goes on with the clients itself. `serve` is the
one moment of decision; behind it there is nothing that the successor could fail in.

The socket is of the type SOCK_SEQPACKET: a message is JSON, a table with the key `say`, and carries descriptors. What
is written down of the clients (`nbd.suspended`) is in a memory file.

| say | keys | descriptors |
|---|---|---|
| loaded | `version` of the program, `format` | |
| take | an `Estate`; of `listeners` {`name`, `ours`, `any_port`}, of `clients` their number | lock, memory, listeners |
| clients | | at most `BATCH` of them; each such message is answered with `more` |
| more, ready, serve | | |
| failed | `why`, a sentence | |
"""

from __future__ import annotations

import array
import errno
import json
import logging
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from nbd.suspended import FormatError, Suspended, read, write

log = logging.getLogger(__name__)

VARIABLE: Final = "TERRACE_HANDOVER"
"""Names the descriptor of the socket in the successor's environment."""
FORMAT: Final = 1
BATCH: Final = 128
"""Descriptors in a message; the kernel allows 253, and not too many on their way."""
MAX_MESSAGE_BYTES: Final = 64 << 10
LOADING_S: Final = 60.0
OPENING_S: Final = 60.0
"""How long the predecessor waits for the successor. Clients wait during the second of the two."""
_ENDED: Final = "the other terraced has ended; the log says why"
_NOT_INHERITED: Final = (VARIABLE, "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID")


class HandoverError(OSError):
    """It did not come to the hand-over; prints as its sentence alone."""

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class PassedListener:
    """A listening socket on its way."""

    sock: socket.socket
    name: str
    ours: bool
    """The daemon has bound it, and removes its file at its end."""
    any_port: bool
    """The configuration said port 0."""


@dataclass
class Estate:
    """What a successor gets, beside the lock of the home."""

    listeners: Sequence[PassedListener]
    clients: Sequence[Suspended]
    pools: Sequence[str]
    """Those that were open, and must be again."""
    policies: Sequence[str]
    """Those that there were; one that a volume has must be there again."""
    version: str
    """Of the predecessor."""
    since_s: float
    """When clients began to wait (the clock is CLOCK_MONOTONIC)."""


class Successor:
    """The predecessor's side."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self.version = ""
        self._process = process
        self._sock = sock

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def start(cls, command: Sequence[str] | None = None) -> Successor:
        """Start it and wait until it is loaded. Raises HandoverError; then nothing has changed."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.setblocking(False)
            environment = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
            environment[VARIABLE] = str(theirs.fileno())
            try:
                process = await trio.to_thread.run_sync(_spawn, command or own_command(), theirs.fileno(), environment)
            except OSError as error:
                ours.close()
                raise HandoverError(errno.EIO, f"the new terraced can't be started: {error}") from None
        successor = cls(process, ours)
        try:
            with trio.fail_after(LOADING_S):
                said, _ = await successor._hear("loaded")
            if said.get("format") != FORMAT:
                raise HandoverError(
                    errno.EPROTO,
                    f"the installed terraced {said.get('version')} can't take over from this one, which is older or "
                    "newer: restart the service, which disconnects its clients",
                )
            successor.version = str(said.get("version"))
        except trio.TooSlowError:
            await successor.kill()
            raise HandoverError(errno.ETIMEDOUT, f"the new terraced was not loaded in {LOADING_S:g} s") from None
        except BaseException:
            with trio.CancelScope(shield=True):
                await successor.kill()
            raise
        return successor

    async def take(self, lock: int, estate: Estate) -> None:
        """Give it everything and wait until it could serve. Raises HandoverError; it is dead then."""
        try:
            with trio.fail_after(OPENING_S):
                await self._give(lock, estate)
                await self._hear("ready")
        except trio.TooSlowError:
            await self.kill()
            raise HandoverError(
                errno.ETIMEDOUT, f"the new terraced had not opened the pools after {OPENING_S:g} s"
            ) from None
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await self.kill()
            if isinstance(error, Exception) and not isinstance(error, HandoverError):
                # A mistake of ours must not cost the clients, who can still be served here.
                log.exception("internal error in the hand-over; please report this")
                what = traceback.format_exception_only(error)[-1].strip()
                why = f"internal error: {what}; the log says where, please report it"
                raise HandoverError(errno.EIO, why) from error
            raise

    async def _give(self, lock: int, estate: Estate) -> None:
        memory = await trio.to_thread.run_sync(write, estate.clients)
        try:
            message = {
                "say": "take",
                "version": estate.version,
                "since_s": estate.since_s,
                "pools": list(estate.pools),
                "policies": list(estate.policies),
                "listeners": [
                    {"name": one.name, "ours": one.ours, "any_port": one.any_port} for one in estate.listeners
                ],
                "clients": len(estate.clients),
            }
            await self._say(message, [lock, memory, *(one.sock.fileno() for one in estate.listeners)])
        finally:
            os.close(memory)
        sockets = [one.sock.fileno() for one in estate.clients]
        for first in range(0, len(sockets), BATCH):
            await self._say({"say": "clients"}, sockets[first : first + BATCH])
            await self._hear("more")

    async def commit(self) -> None:
        """From here on it serves, and this process must not touch anything that it gave away.

        Raises HandoverError; it is dead then.
        """
        try:
            await self._say({"say": "serve"})
        except BaseException:
            await self.kill()
            raise
        self._process.returncode = 0  # nobody waits for it here
        self._sock.close()

    async def kill(self) -> None:
        """End it, and return when it has ended."""
        self._process.kill()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._process.wait)
        self._sock.close()

    def discard(self) -> None:
        """Let go of it: it ends by itself when it sees that nobody will say `take`. Synchronous."""
        self._process.returncode = 0
        self._sock.close()

    async def _say(self, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        while True:
            try:
                socket.send_fds(self._sock, [json.dumps(message).encode()], descriptors)
                return
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)
            except (BrokenPipeError, ConnectionResetError):
                raise HandoverError(errno.ECONNRESET, _ENDED) from None
            except OSError as error:  # too long, or more descriptors than the kernel lets a message have
                raise HandoverError(errno.EIO, f"the new terraced can't be told all: {error.strerror}") from None

    async def _hear(self, expected: str) -> tuple[dict[str, Any], list[int]]:
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                return _understood(*_receive(self._sock), expected)
            except BlockingIOError:
                continue


class Predecessor:
    """The successor's side. Its calls block, for until it is told to serve there is nothing else to do."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> Predecessor | None:
        """None where this process was started like any other. To be called before anything else is opened."""
        text = environment.pop(VARIABLE, None)
        if text is None:
            return None
        try:
            sock = socket.socket(fileno=int(text))
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != socket.SOCK_SEQPACKET:
                sock.detach()  # whoever's it is
                raise OSError(errno.EINVAL, "it is of another type")
            sock.set_inheritable(False)
        except (OSError, ValueError, OverflowError) as error:
            raise HandoverError(
                errno.EINVAL, f"{VARIABLE} is {text!r}, which is no socket of a running terraced ({error}); unset it"
            ) from None
        return cls(sock)

    def loaded(self, version: str) -> None:
        self._say({"say": "loaded", "version": version, "format": FORMAT})

    def receive(self) -> tuple[int, Estate]:
        """Wait for everything: the descriptor that holds the home's lock, and the rest.

        Raises HandoverError, if the predecessor goes on serving itself.
        """
        said, descriptors = self._hear("take")
        names = said["listeners"]
        if len(descriptors) != 2 + len(names):
            raise HandoverError(errno.EPROTO, f"{len(descriptors)} descriptors came for {len(names)} listeners")
        lock, memory, *rest = descriptors
        listeners = [
            PassedListener(socket.socket(fileno=fd), one["name"], one["ours"], one["any_port"])
            for fd, one in zip(rest, names, strict=True)
        ]
        sockets: list[socket.socket] = []
        while len(sockets) < said["clients"]:
            _, descriptors = self._hear("clients")
            if not descriptors:
                raise HandoverError(errno.EPROTO, "a message that brings clients brought none")
            sockets += [socket.socket(fileno=fd) for fd in descriptors]
            self._say({"say": "more"})
        try:
            clients = read(memory, sockets)
        except FormatError as error:
            raise HandoverError(errno.EPROTO, f"the running terraced's clients can't be taken over: {error}") from None
        finally:
            os.close(memory)
        if len(clients) != len(sockets):
            raise HandoverError(errno.EPROTO, f"{len(sockets)} sockets came for {len(clients)} clients")
        names = said["pools"], said["policies"]
        return lock, Estate(listeners, clients, *names, str(said["version"]), float(said["since_s"]))

    def ready(self) -> None:
        """All is opened. Returns when it is this process that serves; raises HandoverError if it is not."""
        self._say({"say": "ready"})
        self._hear("serve")
        self._sock.close()

    def failed(self, why: str) -> None:
        """Tell the predecessor, if it is still there and hasn't been told."""
        if self._sock.fileno() < 0:
            return
        try:
            self._say({"say": "failed", "why": why[:4000]})
        except HandoverError as error:
            log.warning("%s", error)
        self._sock.close()

    def _say(self, message: Mapping[str, Any]) -> None:
        try:
            self._sock.send(json.dumps(message).encode())
        except OSError as error:
            raise HandoverError(errno.EIO, f"the running terraced is gone: {error.strerror}") from None

    def _hear(self, expected: str) -> tuple[dict[str, Any], list[int]]:
        return _understood(*_receive(self._sock), expected)


def own_command() -> list[str]:
    """The command line of this process, with what is installed now in the place of the program."""
    return [sys.executable, *sys.orig_argv[1:]]


def _spawn(command: Sequence[str], descriptor: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, pass_fds=[descriptor], stdin=subprocess.DEVNULL, env=dict(environment))


def _receive(sock: socket.socket) -> tuple[bytes, list[int], int]:
    """One message, the descriptors that came with it, which no process that is started gets, and recvmsg's flags."""
    descriptors = array.array("i")
    size = socket.CMSG_SPACE(253 * descriptors.itemsize)
    try:
        raw, ancillary, flags, _ = sock.recvmsg(MAX_MESSAGE_BYTES, size, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:  # it has ended without reading all that it was told
        return b"", [], 0
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    return raw, list(descriptors), flags


def _understood(raw: bytes, descriptors: list[int], flags: int, expected: str) -> tuple[dict[str, Any], list[int]]:
    """A message, if it is the one that must come now. Raises HandoverError with what was said in its place."""
    try:
        return _judged(raw, flags, expected), descriptors
    except HandoverError:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def _judged(raw: bytes, flags: int, expected: str) -> dict[str, Any]:
    if not raw:
        raise HandoverError(errno.ECONNRESET, _ENDED)
    if flags & socket.MSG_TRUNC:
        raise HandoverError(errno.EMSGSIZE, f"the other terraced says more than {MAX_MESSAGE_BYTES} bytes at once")
    if flags & socket.MSG_CTRUNC:
        raise HandoverError(
            errno.EMFILE,
            "not all descriptors could be taken over: more files must be allowed (LimitNOFILE=, ulimit -n)",
        )
    try:
        said = json.loads(raw)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise HandoverError(errno.EPROTO, f"{raw[:40]!r} came where {expected!r} belongs")
    if said.get("say") == "failed":
        raise HandoverError(errno.EIO, str(said.get("why")))
    if said.get("say") != expected:
        raise HandoverError(errno.EPROTO, f"{said.get('say')!r} came where {expected!r} belongs")
    return said
