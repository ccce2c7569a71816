"""The daemon's home directory: where everything lies, and the lock that lets one daemon at a time have it.

HOME/terraced.lock   held by the daemon for its life; contains its process id, for people
HOME/pools/NAME/     one pool
HOME/voters/         what this node knows of mirrors without a leg (`replication.voters`)
HOME/mirrors/        which of those it serves (`terrace.diskless`)
HOME/nbd.sock        NBD
HOME/api.sock        the control API, mode 0600
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# sizeof(sockaddr_un.sun_path) with its terminating zero
_SOCKET_PATH_LIMIT = 107

SYSTEM_HOME = Path("/var/lib/terrace")
"""The home of the daemon that runs as root, unless it is told otherwise."""


class HomeError(OSError):
    """The home can't be used; prints as its sentence alone."""

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class Home:
    path: Path

    @property
    def pools(self) -> Path:
        return self.path / "pools"

    @property
    def nbd_socket(self) -> Path:
        return self.path / "nbd.sock"

    @property
    def api_socket(self) -> Path:
        return self.path / "api.sock"

    @contextmanager
    def locked(self, inherited: int | None = None) -> Iterator[int]:
        """Create the home where it is missing and hold it; gives the descriptor that holds it.

        `inherited`: a descriptor from the process that has held it so far, and goes on if this one fails.
        Raises HomeError: EBUSY when another daemon has it.
        """
        self.prepare()
        if inherited is not None:
            try:
                yield inherited
            finally:
                os.close(inherited)
            return
        lock = self.path / "terraced.lock"
        # flock goes with the process, so a killed daemon leaves a file behind and no lock.
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
                raise HomeError(
                    errno.EBUSY,
                    f"another process ({pid}) has {self.path} in use; use that terraced, stop it, "
                    "or choose another --home",
                ) from None
            write_holder(fd)
            yield fd
        finally:
            os.close(fd)

    def prepare(self) -> None:
        """Create the home where it is missing. Raises HomeError."""
        longest = len(os.fsencode(self.nbd_socket))
        if longest > _SOCKET_PATH_LIMIT:
            raise HomeError(
                errno.ENAMETOOLONG,
                f"{self.path} is too long a path for a home: its sockets would have {longest} bytes in their names "
                f"and Linux allows {_SOCKET_PATH_LIMIT}; use a shorter --home",
            )
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.pools.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise HomeError(
                error.errno or errno.EIO,
                f"{self.path} can't be the home: {error.strerror} ({error.filename}); "
                "choose a directory that you may write with --home or TERRACE_HOME",
            ) from None


def write_holder(lock: int) -> None:
    """Leave this process's id in the lock file, for people."""
    text = f"{os.getpid()}\n".encode()
    os.pwrite(lock, text, 0)
    os.ftruncate(lock, len(text))


def find_home(option: str | os.PathLike[str] | None) -> Home:
    """`option` (--home) if given, else $TERRACE_HOME, else /var/lib/terrace as root, else $XDG_DATA_HOME/terrace."""
    if option:
        chosen = Path(option)
    elif from_environment := os.environ.get("TERRACE_HOME"):
        chosen = Path(from_environment)
    elif os.geteuid() == 0:
        chosen = SYSTEM_HOME
    else:
        chosen = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "terrace"
    return Home(chosen.expanduser().absolute())
