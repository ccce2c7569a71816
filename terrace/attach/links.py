"""`/dev/terrace/POOL/VOL`, a name for the device that doesn't depend on how many there are.

Where udev runs with the rule that `terrace install-units` installs, udev makes the link; elsewhere the keeper does, and
removes it at the end. A link of somebody else's is left alone.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

DIRECTORY: Final = Path("/dev/terrace")
RULES: Final = [Path(place) / "60-terrace.rules" for place in ("/etc/udev/rules.d", "/usr/lib/udev/rules.d")]
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
            if link.exists():
                return None  # another home's volume of this name
            link.unlink()
        link.symlink_to(device)
    except OSError:
        return None
    return str(link)


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
