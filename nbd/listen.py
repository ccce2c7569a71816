"""Listening sockets: TCP, and Unix sockets that are never readable by others, not for a moment.

A ``Listener`` holds a plain non-blocking ``socket.socket``, as the server's data path talks to the
kernel itself. A Unix socket's file is removed when its listener closes. A file left by a dead
server is replaced, one of a live server is not.

A socket that somebody else has bound, and will go on holding when we are gone, is ``adopt``ed: it is
judged, and its file stays. So clients wait in its backlog while nobody serves.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import trio

BACKLOG: Final = 256
_MAX_UNIX_PATH_BYTES: Final = 107


class Listener:
    """A bound, listening, non-blocking stream socket."""

    def __init__(self, sock: socket.socket, address: str, *, path: Path | None = None, adopted: bool = False) -> None:
        self.sock = sock
        self.address = address
        """For people: ``127.0.0.1:10809`` or the path of the Unix socket."""
        self.adopted = adopted
        """Somebody else has bound it."""
        self.name = ""
        """What it is called by whoever keeps it over the daemon's end."""
        self.any_port = False
        """The kernel has chosen the port, for who asked for 0."""
        self._path = path
        self._inode = None if adopted or path is None else _inode(path)

    def take_file(self) -> None:
        """From now on the file is this listener's, which somebody else has bound and given up."""
        self.adopted = False
        self._inode = None if self._path is None else _inode(self._path)

    def keep_file(self) -> None:
        """From now on somebody else holds the socket too, so its file stays when this listener closes."""
        self._inode = None

    @property
    def port(self) -> int:
        """The TCP port, which matters if 0 was asked for; 0 for a Unix socket."""
        return 0 if self._path else int(self.sock.getsockname()[1])

    def uri(self, export: str = "", *, tls: bool = False) -> str:
        """The NBD URI of an export behind this listener; with ``tls``, one that says so, over TCP."""
        if self._path:
            return f"nbd+unix:///{export}?socket={quote(os.fsencode(self._path), safe='/')}"
        return f"{'nbds' if tls else 'nbd'}://{self.address}/{export}"

    def close(self) -> None:
        """Stop listening and remove the Unix socket's file, if it is still ours. Synchronous."""
        if self.sock.fileno() < 0:
            return
        if self._path and self._inode is not None and _inode(self._path) == self._inode:
            self._path.unlink(missing_ok=True)
        self.sock.close()


Held = Callable[[socket.AddressFamily, Any], Listener | None]
"""Asked with the family and the kernel's address, before that is bound, whether somebody listens there for us."""


def _nobody(family: socket.AddressFamily, address: Any) -> None:
    return None


def adopt(sock: socket.socket, mode: int = 0o600) -> Listener:
    """Serve on a socket that somebody else has bound and listens on; ``mode`` is for the file of a Unix socket.

    Raises OSError (EINVAL) with what is wrong with it: not a stream socket, not listening, or a Unix
    socket without a file or that more people may open than ``mode`` says.
    """
    family = socket.AddressFamily(sock.family)
    if family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        raise OSError(errno.EINVAL, f"it is of the family {family.name}, and neither TCP nor a Unix socket")
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != socket.SOCK_STREAM:
        raise OSError(errno.EINVAL, f"{shown(family, sock.getsockname())} is not a stream socket")
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise OSError(errno.EINVAL, f"{shown(family, sock.getsockname())} doesn't listen")
    path = None
    if family == socket.AF_UNIX:
        name = sock.getsockname()
        if not isinstance(name, str) or not name.startswith("/"):
            raise OSError(errno.EINVAL, f"the Unix socket {name!r} has no file")
        path = Path(name)
        try:
            status = path.lstat()
        except OSError as error:
            raise OSError(errno.EINVAL, f"{path}: {error.strerror}, so no client can reach it") from None
        if stat.S_IMODE(status.st_mode) & ~mode:
            raise OSError(
                errno.EINVAL, f"{path} has the mode {stat.S_IMODE(status.st_mode):04o} and may have {mode:04o} at most"
            )
    sock.setblocking(False)
    # Ours from here on: the backlog, and what its clients see as their peer (unix(7), SO_PEERCRED).
    sock.listen(BACKLOG)
    return Listener(sock, shown(family, sock.getsockname()), path=path, adopted=True)


def shown(family: socket.AddressFamily, address: Any) -> str:
    """A socket's address for people: ``127.0.0.1:10809``, ``[::1]:10809`` or a path."""
    if family == socket.AF_INET6:
        return f"[{address[0]}]:{address[1]}"
    return f"{address[0]}:{address[1]}" if family == socket.AF_INET else str(address)


def plain_address(text: str) -> str:
    """An IP address in its one form: without a zone, and IPv4 as such where a socket of both families maps it."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


async def open_tcp(host: str, port: int, held: Held = _nobody) -> list[Listener]:
    """Listen on every address ``host`` has (a name or an address); ``port`` 0 picks a free one.

    Raises OSError naming the address: taken, not ours, or not known.
    """
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise OSError(errno.EADDRNOTAVAIL, f"can't listen on {host}:{port}: {error.strerror}") from None
    listeners: list[Listener] = []
    try:
        for family, kind, protocol, _, address in found:
            if (listener := held(family, address)) is not None:
                listeners.append(listener)
                continue
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(address)
                sock.listen(BACKLOG)
            except OSError as error:
                sock.close()
                reason = os.strerror(error.errno or 0)
                raise OSError(error.errno, f"can't listen on {shown(family, address)}: {reason}") from None
            listeners.append(Listener(sock, shown(family, sock.getsockname())))
            listeners[-1].any_port = not port
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


async def open_unix(path: str | os.PathLike[str], mode: int = 0o600, held: Held = _nobody) -> Listener:
    """Listen on a Unix socket with file mode ``mode`` from its first moment.

    Raises OSError: EADDRINUSE if a live server listens there, EEXIST if the file is not a socket,
    ENAMETOOLONG beyond the kernel's 107 bytes.
    """
    await trio.lowlevel.checkpoint()
    target = Path(path).absolute()  # noqa: ASYNC240 - no file is touched
    if len(os.fsencode(target)) > _MAX_UNIX_PATH_BYTES:
        message = f"the socket path {target} is longer than {_MAX_UNIX_PATH_BYTES} bytes: choose a shorter one"
        raise OSError(errno.ENAMETOOLONG, message)
    if (listener := held(socket.AF_UNIX, str(target))) is not None:
        return listener
    _remove_stale(target)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # bind() gives the file the mode that the socket itself has, less the umask; so there is no
        # moment in which others could connect.
        os.fchmod(sock.fileno(), mode)
        sock.bind(str(target))
        target.chmod(mode)  # the umask may have taken bits away that were asked for
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"can't listen on {target}: {os.strerror(error.errno or 0)}") from None
    return Listener(sock, str(target), path=target)


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, f"can't listen on {path}: the file exists and is not a socket; remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # its backlog is full, so somebody lives there
        raise OSError(errno.EADDRINUSE, f"can't listen on {path}: another server is listening there; stop it first")


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
