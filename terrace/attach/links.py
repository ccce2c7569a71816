"""`/dev/terrace/POOL/VOL`, a name for the device that doesn't depend on how many there are.

Where udev runs with the rule that `terrace install-units` installs, udev makes the link; elsewhere the keeper does, and
removes it at the end. The link of another home's volume of the same name is left alone, while that is attached.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

DIRECTORY: Final = Path("/dev/terrace")
RULES: Final = [Path(place) / "60-terrace.rules" for place in ("/etc/udev/rules.d", "/usr/lib/udev/rules.d")]
SYSFS: Final = Path("/sys/block")
UDEV: Final = Path("/run/udev/control")


def made_by_udev() -> bool:
    """Whether udev makes the links here."""
    return UDEV.exists() and any(rule.exists() for rule in RULES)


def make(name: str, device: str) -> str | None:
    """Link to the device; the link, or None where that is udev's to do, or it can't be made."""
    if made_by_udev():
        return None
    link = DIRECTORY / name
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink():
            if link.readlink() == Path(device):
                return str(link)  # a keeper that was killed left it
            if _is_of(name, link.readlink().name):
                return None
            link.unlink()
        link.symlink_to(device)
    except OSError:
        return None
    return str(link)


def _is_of(name: str, device: str) -> bool:
    """Whether the device `loop3` or `nbd0` is that of a volume of this name. It may be anything by now."""
    backend, file = (_told(SYSFS / device / place) for place in ("backend", "loop/backing_file"))
    return backend == f"terrace:{name}" or backend.startswith(f"terrace:{name} of /") or f"/fuse/{name}/" in file


def _told(path: Path) -> str:
    try:
        return path.read_text().rstrip("\n")
    except OSError:
        return ""


def remove(link: str | None, device: str) -> None:
    """Remove a link that `make` made, if it still means the device, and directories that are empty then."""
    if link is None:
        return
    path = Path(link)
    with contextlib.suppress(OSError):
        if str(path.readlink()) == device:
            path.unlink()
            for parent in (path.parent, DIRECTORY):
                parent.rmdir()
