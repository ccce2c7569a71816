"""Listening sockets that outlive the daemon: those that systemd passes in, and those that are left in its care.

systemd passes descriptors from number 3 on, with LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES (sd_listen_fds(3)). They
are of two kinds, told apart by their names:

| name | from | an address that is not configured |
|---|---|---|
| `terraced` | terraced.socket | is refused: whoever connects there would wait for ever |
| `bound-ADDRESS` | an earlier life of this daemon, which bound it and put it into the descriptor store | is given up |

Beside them clients of an earlier life may come: `terrace.keptclients`.

A passed socket takes the place of the one that the daemon would bind. What the daemon binds itself it hands to the
store (`leave`), if there is one. Either way clients that connect while no daemon runs wait in the backlog.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import Any, Final

from nbd.listen import Listener, adopt
from terrace import keptclients, sdnotify
from terrace.handover import PassedListener

log = logging.getLogger(__name__)

FIRST_DESCRIPTOR: Final = 3
NAME: Final = "terraced"
"""FileDescriptorName= of terraced.socket."""
_BOUND: Final = "bound-"
_MOST: Final = 16384


class PassedSocketError(OSError):
    """What was passed can't be served on; prints as its sentence alone."""

    def __str__(self) -> str:
        return str(self.args[1])


class PassedSockets:
    """What was passed in and is not yet in use. Made by `receive`; belongs to the trio thread."""

    def __init__(
        self, passed: dict[tuple[socket.AddressFamily, Any], tuple[str, Listener]], ours: Iterable[Listener] = ()
    ) -> None:
        self._passed = passed
        self._ours = list(ours)
        self._unwanted: list[tuple[str, Listener]] = []
        self.clients: list[socket.socket] = []
        """Clients of an earlier life, and what it has written down of them: for `keptclients.take_back`."""
        self.memory: int | None = None

    def take(self, family: socket.AddressFamily, address: Any) -> Listener | None:
        """The listener that was passed for this address, once. A `nbd.listen.Held`."""
        for key, (_, listener) in self._passed.items():
            if key[0] != family:
                continue
            if _same_address(family, key[1], address) or (listener.any_port and (key[1][0], 0) == address[:2]):
                del self._passed[key]
                return listener
        return None

    def settle(self) -> None:
        """All addresses have been taken: what is left must be from an earlier life. Raises for the rest."""
        self._unwanted = list(self._passed.values())
        self._passed = {}
        alien = [listener.address for name, listener in self._unwanted if not name.startswith(_BOUND)]
        if alien:
            for _, listener in self._unwanted:
                listener.close()
            raise PassedSocketError(
                errno.EINVAL,
                f"terraced.socket listens on {', '.join(alien)}, which is not configured, so its clients would wait "
                "for ever; let ListenStream= there and listen and socket under [nbd] name the same addresses "
                "(`terrace install-units --config FILE` writes it so)",
            )

    def claim(self) -> None:
        """This process serves: the files of what it inherited are its own, and what nobody wants is given up."""
        for listener in self._ours:
            listener.take_file()
        for name, listener in self._unwanted:
            log.info("%s is no longer configured: not listening there any more", listener.address)
            listener.close()
            _forget(name)
        self._unwanted = []


def inherit(listeners: Iterable[PassedListener]) -> PassedSockets:
    """What a predecessor listens on. Raises PassedSocketError."""
    passed: dict[tuple[socket.AddressFamily, Any], tuple[str, Listener]] = {}
    ours = []
    for one in listeners:
        try:
            listener = adopt(one.sock)
        except OSError as error:
            raise PassedSocketError(errno.EINVAL, f"{one.name} can't be served on: {error.strerror}") from None
        listener.name, listener.any_port = one.name, one.any_port
        if one.ours:
            ours.append(listener)
        passed[socket.AddressFamily(one.sock.family), one.sock.getsockname()] = one.name, listener
    return PassedSockets(passed, ours)


def to_pass(listener: Listener) -> PassedListener:
    """A listener, as a successor gets it."""
    return PassedListener(
        listener.sock, listener.name or _store_name(listener), not listener.adopted, listener.any_port
    )


def receive(environment: MutableMapping[str, str] = os.environ) -> PassedSockets:
    """Judge what was passed to this process; from here on no process that it starts gets it.

    To be called before anything else is opened, which could have got the number of a descriptor that wasn't passed
    after all. Raises PassedSocketError naming the descriptor that is not what it should be.
    """
    for_whom = environment.pop("LISTEN_PID", "")
    count, names = environment.pop("LISTEN_FDS", ""), environment.pop("LISTEN_FDNAMES", None)
    passed: dict[tuple[socket.AddressFamily, Any], tuple[str, Listener]] = {}
    if for_whom != str(os.getpid()):
        return PassedSockets(passed)  # meant for a process that started us
    if not count.isascii() or not count.isdecimal() or int(count) > _MOST:
        raise PassedSocketError(errno.EINVAL, f"LISTEN_FDS is {count!r}, which is no number of sockets")
    descriptors = range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(count))
    named = names.split(":") if names else [NAME] * int(count)
    if len(named) != len(descriptors):
        raise PassedSocketError(
            errno.EINVAL, f"LISTEN_FDS says {count} sockets, and LISTEN_FDNAMES has {len(named)} names"
        )
    clients: list[socket.socket] = []
    memory: int | None = None
    for descriptor, name in zip(descriptors, named, strict=True):
        if name in (keptclients.CLIENT, keptclients.CLIENTS):
            os.set_inheritable(descriptor, False)
            if name == keptclients.CLIENT:
                clients.append(socket.socket(fileno=descriptor))
            else:
                if memory is not None:
                    os.close(memory)  # of an earlier one, which nobody could have taken back
                memory = descriptor
            continue
        listener = _judge(descriptor, name)
        if listener is None:
            continue
        key = socket.AddressFamily(listener.sock.family), listener.sock.getsockname()
        if key in passed:
            listener.close()
            raise PassedSocketError(
                errno.EINVAL, f"{listener.address} was passed twice, as {passed[key][0]} and {name}"
            )
        passed[key] = name, listener
    found = PassedSockets(passed)
    found.clients, found.memory = clients, memory
    return found


def _judge(descriptor: int, name: str) -> Listener | None:
    """The listener on it; None for one from an earlier life that is no use any more."""
    what = f"descriptor {descriptor} ({name}), which the supervisor passed"
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:
        raise PassedSocketError(errno.EBADF, f"{what}, is not open") from None
    if not stat.S_ISSOCK(mode):
        raise PassedSocketError(errno.EINVAL, f"{what}, is not a socket")
    os.set_inheritable(descriptor, False)
    if name not in (NAME, f"{NAME}.socket") and not name.startswith(_BOUND):
        raise PassedSocketError(
            errno.EINVAL,
            f"{what}, has a name that terraced doesn't know; write FileDescriptorName={NAME} into the socket unit",
        )
    sock = socket.socket(fileno=descriptor)
    try:
        listener = adopt(sock)
        listener.name = name
        return listener
    except OSError as error:
        sock.close()
        if name.startswith(_BOUND):
            log.warning("%s, is given up: %s", what, error.strerror)
            _forget(name)
            return None
        raise PassedSocketError(
            errno.EINVAL,
            f"{what}, can't be served on: {error.strerror}; compare the socket unit with that of "
            "`terrace install-units`",
        ) from None


def _same_address(family: socket.AddressFamily, one: Any, other: Any) -> bool:
    if family == socket.AF_UNIX:
        if one == other:
            return True
        try:
            return Path(one).samefile(other)
        except OSError:
            return False
    return bool(one[:2] == other[:2])


def leave(listeners: Iterable[Listener]) -> None:
    """Put what this process has bound itself into the supervisor's store, where there is one."""
    for listener in listeners:
        # FDPOLL=0: a socket with clients in its backlog is readable, and is not to be dropped for that.
        if not listener.adopted and sdnotify.notify(
            "FDSTORE=1", f"FDNAME={_store_name(listener)}", "FDPOLL=0", descriptors=[listener.sock.fileno()]
        ):
            listener.keep_file()
            listener.name = _store_name(listener)


def _store_name(listener: Listener) -> str:
    """At most 255 printable ASCII characters without a colon (sd_pid_notify_with_fds(3))."""
    plain = "".join(sign if " " <= sign <= "~" and sign != ":" else "_" for sign in listener.address)
    return _BOUND + plain


def _forget(name: str) -> None:
    sdnotify.notify("FDSTOREREMOVE=1", f"FDNAME={name}")
