"""Which driver makes the device. Pure.

The kernel's NBD client is the better one where there is one: the data doesn't pass through the keeper, and the device
outlives it. FUSE and a loop device work on every kernel of a distribution, and in containers that are given them.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Literal

from terrace.attach.record import AttachError

Asked = Literal["auto", "nbd", "fuse"]
Chosen = Literal["nbd", "fuse"]


@dataclass(frozen=True, slots=True)
class Means:
    """What this host offers: for each driver None, or why it can't be used."""

    root: bool
    no_nbd: str | None
    no_fuse: str | None


def choose(asked: Asked, means: Means) -> Chosen:
    """The driver. Raises AttachError with what is missing and the next step."""
    if not means.root:
        raise AttachError(errno.EPERM, "block devices are made by root only: run it as root, or use the NBD URI")
    if asked == "nbd":
        if means.no_nbd is not None:
            raise AttachError(errno.ENODEV, f"the kernel's NBD client can't be used: {means.no_nbd}; try --driver fuse")
        return "nbd"
    if asked == "fuse":
        if means.no_fuse is not None:
            raise AttachError(errno.ENODEV, f"FUSE and a loop device can't be used: {means.no_fuse}; try --driver nbd")
        return "fuse"
    if means.no_nbd is None:
        return "nbd"
    if means.no_fuse is None:
        return "fuse"
    raise AttachError(
        errno.ENODEV,
        f"no block device can be made here: the kernel's NBD client can't be used ({means.no_nbd}), nor can FUSE and a "
        f"loop device ({means.no_fuse})",
    )
