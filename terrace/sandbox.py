"""What terraced.service keeps the daemon from, said where a device is refused for that.

The unit (`terrace/units/terraced.service`) makes everything read-only but the home and block devices, and takes root's
power over the files of others away. The kernel's answers to that are EROFS and EACCES, which alone would puzzle.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from tiers import TierError

_WHY: Final[Mapping[int, str]] = {
    errno.EROFS: "terraced.service lets it write to its home and to block devices only; to have device files elsewhere "
    "set ReadWritePaths= to their directory with `systemctl edit terraced.service`, and restart it",
    errno.EACCES: "under terraced.service it has no power over the files of others; make root the owner",
}


@contextmanager
def explained(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Adds to a refusal in the block what the unit has to do with it, where systemd started this process."""
    try:
        yield
    except OSError as error:
        why = _WHY.get(error.errno or 0)
        if why is None or "INVOCATION_ID" not in environment:  # systemd.exec(5)
            raise
        raise TierError(error.errno or errno.EIO, f"{error}; {why}") from None
