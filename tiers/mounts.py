"""What is mounted, as this process sees it. Asks no file system: one that is served by ourselves couldn't answer."""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo, as far as it is used."""

    number: str
    """MAJOR:MINOR of the file system, which need not be that of the device it is on (btrfs)."""
    where: str
    """The mount point."""
    kind: str
    """`ext4`, `fuse.terrace`."""
    source: str
    """What is mounted: a device's path, or what the file system says."""


def mounts() -> list[Mount]:
    """In the order in which they were mounted: of several at one place the last is on top."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        # proc_pid_mountinfo(5): id, parent, major:minor, root, mount point, options, ..., -, type, source, ...
        fields, _, rest = line.partition(" - ")
        _, _, number, _, where, *_ = fields.split(" ")
        kind, source, *_ = rest.split(" ")
        found.append(Mount(number, _plain(where), kind, _plain(source)))
    return found


def _plain(field: str) -> str:
    """Blanks and backslashes stand there in octal."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)
