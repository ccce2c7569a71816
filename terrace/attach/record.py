"""What is attached, as the programs of this host know it: a lock and a small file for each attachment.

The lock says whether a keeper lives. Its holder is the keeper, for its whole life, and its content is the keeper's
process id; it goes with the process, whatever ends that, so a process id that was used again deceives nobody. The file
beside it says what the keeper made: the device, the driver, where it was mounted. It is replaced as a whole.

Both lie below `/run/terrace/attach` for the system's own home, where a reboot removes them with the devices, and below
`HOME/run/attach` for any other home. There a reboot leaves them, and the boot's id in the file tells.

A file, `DIRECTORY/KEY.json`, is one JSON object:

    version    1; a file of another version is refused, never guessed at
    boot       /proc/sys/kernel/random/boot_id at the time
    name       POOL/VOL or POOL/VOL@SNAP
    driver     "nbd" or "fuse"
    device     /dev/nbd0, /dev/loop3
    read_only  true or false
    connections   of the kernel's NBD client; 1 for "fuse"
    link       the symbolic link that the keeper made, or null where udev makes it
    since      seconds since the epoch
    identity   of the export, for the next keeper of a kernel NBD device; else null
    keeper     process id of the keeper that made it; another one that has the lock now hasn't got so far yet

It need not be durable: what it tells of ends with the boot.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from terrace.home import SYSTEM_HOME, Home

VERSION: Final = 1
SYSTEM_DIRECTORY: Final = Path("/run/terrace/attach")
LOG_BYTES: Final = 1 << 20
"""Of a keeper's log, which lies in memory: a daemon that dies every second must not fill it within a month."""
LOCK_PATIENCE_S: Final = 1.0
"""Whoever only looks at a lock holds it for an instant; a keeper that starts meanwhile tries again for so long."""
_POLL_S: Final = 0.02


class AttachError(OSError):
    """Something can't be attached or detached; prints as its sentence alone."""

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True, slots=True)
class Record:
    """One attachment; see above."""

    name: str
    driver: str
    device: str
    read_only: bool
    connections: int
    link: str | None
    since: float
    identity: str | None
    keeper: int


def directory_of(home: Home) -> Path:
    """Where the attachments of a home are recorded."""
    return SYSTEM_DIRECTORY if home.path == SYSTEM_HOME else home.path / "run" / "attach"


def identifier(home: Home, name: str) -> str:
    """What the kernel keeps for us beside an NBD device, and shows in `/sys/block/nbdN/backend`."""
    return f"terrace:{name}" if home.path == SYSTEM_HOME else f"terrace:{name} of {home.path}"


class Records:
    """The attachments recorded below one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def prepare(self) -> None:
        """Make the directory. Raises AttachError, also where another user could put links in our way."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            above = [(place, place.stat()) for place in (self.directory, *self.directory.parents[:2])]
        except OSError as error:
            raise AttachError(
                error.errno or errno.EIO, f"{self.directory} can't be made ({error.strerror}): run as root"
            ) from None
        for place, status in above:
            if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
                raise AttachError(
                    errno.EPERM,
                    f"{place} can be changed by others than you (owner {status.st_uid}, mode "
                    f"{stat.S_IMODE(status.st_mode):o}), who could lead what is written there elsewhere: attach the "
                    "volumes of a daemon whose home is root's own",
                )

    def log_file(self, name: str) -> Path:
        """Where a keeper in the background says what happens to it."""
        return self.directory / f"{_key(name)}.log"

    def log_handler(self, name: str) -> logging.Handler:
        """Writes that file, and begins it anew when it has `LOG_BYTES`; the one before is kept."""
        return RotatingFileHandler(self.log_file(name), maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8")

    def find(self, name: str) -> Record | None:
        """What is recorded of this boot, whether its keeper lives or not. Raises AttachError for nonsense."""
        return _read(self._file(name))

    def all(self) -> list[Record]:
        """Every attachment of this boot, by name. Raises AttachError as `find` does."""
        found = []
        for path in self._paths(".json"):
            record = _read(path)
            if record is not None:
                found.append(record)
        return sorted(found, key=lambda record: record.name)

    def store(self, record: Record) -> None:
        """Replace what is recorded under the record's name."""
        path = self._file(record.name)
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"version": VERSION, "boot": _boot_id()} | asdict(record), indent=1) + "\n")
        new.replace(path)

    def forget(self, name: str) -> None:
        """Remove the record; the lock's file stays, for who removed it would let two in."""
        self._file(name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Be the keeper of `name` within. Raises AttachError: EBUSY where another one is."""
        self.prepare()
        fd = os.open(self._lock(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline_s = time.monotonic() + LOCK_PATIENCE_S
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline_s:
                        raise AttachError(
                            errno.EBUSY,
                            f"{name} is being attached or detached by process {_pid_in(fd)}: wait for it, and if it "
                            f"stays so: terrace detach {name}",
                        ) from None
                    time.sleep(_POLL_S)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(fd)

    def keeper(self, name: str) -> int | None:
        """The process id of the keeper, if one lives; 0 if that can't be told yet."""
        try:
            fd = os.open(self._lock(name), os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError:
            raise AttachError(errno.EACCES, f"{self._lock(name)} can't be opened: run as root") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _pid_in(fd)
            # Whoever has just taken the lock hasn't written yet, and what is there is of a keeper that was killed.
            return pid if Path(f"/proc/{pid}").exists() else 0
        finally:
            os.close(fd)
        return None

    def attached(self, name: str) -> Record | None:
        """What the keeper that lives has made and not begun to take away; None if there is no such thing."""
        record = self.find(name)
        return record if record is not None and record.keeper == self.keeper(name) else None

    def tell_keeper(self, name: str, number: signal.Signals) -> int | None:
        """Send the keeper a signal; its process id, or None where none lives. Never another process."""
        pid = self.keeper(name)
        if not pid:
            return None
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        try:
            # The descriptor means the process that has the id now; it is the keeper if that lives still.
            if self.keeper(name) != pid:
                return None
            signal.pidfd_send_signal(fd, number)
        except ProcessLookupError:
            return None
        finally:
            os.close(fd)
        return pid

    def wait_until_gone(self, name: str, patience_s: float) -> bool:
        """Whether no keeper lives any more, at the latest after `patience_s`."""
        deadline_s = time.monotonic() + patience_s
        while self.keeper(name) is not None:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(_POLL_S)
        return True

    def _file(self, name: str) -> Path:
        return self.directory / f"{_key(name)}.json"

    def _lock(self, name: str) -> Path:
        return self.directory / f"{_key(name)}.lock"

    def _paths(self, suffix: str) -> list[Path]:
        try:
            return [path for path in self.directory.iterdir() if path.suffix == suffix]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except PermissionError:
            raise AttachError(errno.EACCES, f"{self.directory} can't be read: run as root") from None


def _key(name: str) -> str:
    return quote(name, safe="@")


def _pid_in(fd: int) -> int:
    text = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
    return int(text) if text.isdecimal() else 0


def _read(path: Path) -> Record | None:
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise AttachError(errno.EACCES, f"{path} can't be read: run as root") from None
    except ValueError:
        raise AttachError(errno.EINVAL, f"{path} is no record of an attachment: remove it, and attach anew") from None
    return _understood(content, path)


def _understood(content: Any, path: Path) -> Record | None:
    """The record; None if it is of another boot, whose devices are gone."""
    step = f"detach with the Terrace that wrote it, or remove {path} if nothing is attached"
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise AttachError(errno.EINVAL, f"{path} is of another version of Terrace: {step}")
    if content.get("boot") != _boot_id():
        return None
    try:
        return Record(**{field.name: content[field.name] for field in fields(Record)})
    except KeyError as missing:
        raise AttachError(errno.EINVAL, f"{path} says nothing of {missing}: {step}") from None


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
