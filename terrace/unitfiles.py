"""systemd's units and udev's rules of this installation: what they say, and how they get into /etc and out again.

The templates are in `terrace/units`; `render` fills in where the programs, the home and the addresses are. A file that
was installed begins with a comment that has a checksum of the rest. By that a file that somebody has changed is told
from one that is merely of another version: the first is shown and left alone, the second is replaced.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import importlib.resources
import ipaddress
import os
import re
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from terrace.config import Config, split_address
from terrace.home import Home

DEFAULT_HOME: Final = Path("/var/lib/terrace")
DEFAULT_CONFIG: Final = Path("/etc/terrace/terraced.toml")

_SYSTEMD: Final = Path("etc/systemd/system")
TARGETS: Final[Mapping[str, Path]] = {
    "terraced.service": _SYSTEMD,
    "terraced.socket": _SYSTEMD,
    "terrace-attach@.service": _SYSTEMD,
    "60-terrace.rules": Path("etc/udev/rules.d"),
}
"""Where each file goes, below the root."""
_MARK: Final = "# Installed by `terrace install-units`, checksum "
_MARKED: Final = re.compile(re.escape(_MARK) + r"([0-9a-f]{16})\n")


class UnitError(OSError):
    """Units can't be installed or removed; prints as its sentence alone."""

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class Installation:
    """What the units are made for. All paths are absolute and as the host will see them."""

    programs: Path
    """The directory with `terraced` and `terrace`."""
    home: Path
    config_file: Path | None
    config: Config


def this_installation(home: Path, config_file: Path | None, config: Config) -> Installation:
    """The one that this interpreter belongs to. Raises UnitError if its programs can't be started from a unit."""
    programs = Path(sys.prefix) / "bin"
    for name in ("terraced", "terrace"):
        if not os.access(programs / name, os.X_OK):
            raise UnitError(
                errno.ENOENT,
                f"{programs / name} is missing, and units start programs by their paths; install Terrace with pipx or "
                "pip, and run the `terrace` of that installation",
            )
    for path in (home, programs, *((config_file,) if config_file else ())):
        if any(not sign.isprintable() for sign in str(path)):
            raise UnitError(errno.EINVAL, f"{str(path)!r} has a character that a unit can't hold; choose another path")
    return Installation(programs, home, config_file, config)


def writable_by_others(path: Path) -> Path | None:
    """The first of `path` and the directories above it that others than root may change; None if there is none.

    Whoever can replace a program that a unit starts as root is root.
    """
    real = path.resolve()
    for part in (real, *real.parents):
        status = part.stat()
        sticky = bool(status.st_mode & stat.S_ISVTX) and part != real
        if status.st_uid != 0 or (status.st_mode & 0o022 and not sticky):
            return part
    return None


def render(installation: Installation) -> dict[str, str]:
    """The content of each of `TARGETS`."""
    home = installation.home
    options = [] if home == DEFAULT_HOME else ["--home", str(home)]
    daemon = [str(installation.programs / "terraced"), *options]
    if installation.config_file is not None:
        daemon += ["--config", str(installation.config_file)]
    if home == DEFAULT_HOME:
        state = "StateDirectory=terrace\nStateDirectoryMode=0700"
    else:
        state = f"ReadWritePaths={_word(home)}"
    mounts = [home, installation.programs, Path(sys.base_prefix)]
    if installation.config_file is not None:
        mounts.append(installation.config_file)
    listen = [f"ListenStream={address}" for address in _addresses(installation)]
    values = {
        "MOUNTS": " ".join(map(_word, mounts)),
        "TERRACED": " ".join(map(_argument, daemon)),
        "TERRACE": " ".join(map(_argument, [str(installation.programs / "terrace"), *options])),
        "STATE": state,
        "HOME": _word(home),
        "LISTEN": "\n".join(listen),
    }
    return {name: _filled(name, values) for name in TARGETS}


def _filled(name: str, values: Mapping[str, str]) -> str:
    template = importlib.resources.files("terrace.units").joinpath(name).read_text(encoding="utf-8")
    body = re.sub(r"@([A-Z]+)@", lambda found: values[found[1]], template)
    return f"{_MARK}{_checksum(body)}\n{body}"


def _addresses(installation: Installation) -> list[str]:
    """What systemd can listen on: what has a name or a free port stays for the daemon, as does what is for nobody."""
    found = []
    nbd = installation.config.nbd
    for address in nbd.listen:
        host, port = split_address(address)
        try:
            number = ipaddress.ip_address(host)
        except ValueError:
            continue
        if port:
            found.append(f"[{host}]:{port}" if number.version == 6 else f"{host}:{port}")
    if nbd.socket:
        found.append(_escaped(str(installation.home / nbd.socket)))
    found.append(_escaped(str(Home(installation.home).api_socket)))
    return found


def _escaped(text: str) -> str:
    """Without specifiers (systemd.unit(5))."""
    return text.replace("%", "%%")


def _word(path: Path) -> str:
    """One word of a list of paths."""
    text = _escaped(str(path)).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"' if re.search(r"[\s\\\"']", text) else text


def _argument(text: str) -> str:
    """One word of a command line (systemd.service(5))."""
    return _word(Path(text)).replace("$", "$$") if text.startswith("/") else text


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


class State(Enum):
    MISSING = "missing"
    CURRENT = "current"
    OUTDATED = "of another version"
    CHANGED = "changed here"


@dataclass(frozen=True)
class Target:
    """One file: what is there, and what should be."""

    path: Path
    shown: Path
    """As the host will see it."""
    wanted: str
    found: str | None

    @property
    def state(self) -> State:
        if self.found is None:
            return State.MISSING
        if self.found == self.wanted:
            return State.CURRENT
        mark = _MARKED.match(self.found)
        if mark and mark[1] == _checksum(self.found[mark.end() :]):
            return State.OUTDATED
        return State.CHANGED

    def difference(self) -> str:
        """From what is there to what should be, as a unified diff."""
        lines = difflib.unified_diff(
            (self.found or "").splitlines(keepends=True),
            self.wanted.splitlines(keepends=True),
            str(self.shown) if self.found is not None else "/dev/null",
            f"{self.shown} (new)",
        )
        return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)


def survey(root: Path, files: Mapping[str, str]) -> list[Target]:
    """What is there of `files` below `root`. Raises UnitError."""
    targets = []
    for name, wanted in files.items():
        place = TARGETS[name] / name
        path = root / place
        try:
            found = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            found = None
        except OSError as error:
            raise _failed(error, path) from None
        targets.append(Target(path, Path("/") / place, wanted, found))
    return targets


def write(targets: Sequence[Target]) -> None:
    """Make each what it should be, one after the other; each is whole at any time. Raises UnitError."""
    for target in targets:
        beside = target.path.with_name(f".{target.path.name}.new")
        try:
            target.path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(target.wanted, encoding="utf-8")
            beside.chmod(0o644)
            beside.replace(target.path)
        except OSError as error:
            raise _failed(error, target.path) from None


def remove(targets: Sequence[Target]) -> None:
    """Remove each that is there. Raises UnitError."""
    for target in targets:
        try:
            target.path.unlink(missing_ok=True)
        except OSError as error:
            raise _failed(error, target.path) from None


def enabled(root: Path) -> list[str]:
    """Links of `systemctl enable` to our units, which would lead nowhere without them."""
    links = (root / _SYSTEMD).glob("*.*/terrace*")
    return sorted(
        link.name for link in links if link.is_symlink() and re.fullmatch(r"terraced\.\w+|terrace-attach@.*", link.name)
    )


def _failed(error: OSError, path: Path) -> UnitError:
    hint = "; run as root, or give --root DIR" if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else ""
    return UnitError(error.errno or errno.EIO, f"{path}: {error.strerror}{hint}")
