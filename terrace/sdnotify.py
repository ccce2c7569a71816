"""Tells systemd, or whoever set NOTIFY_SOCKET, what state the daemon is in (sd_notify(3), without libsystemd)."""

from __future__ import annotations

import array
import logging
import os
import socket
from collections.abc import Sequence

log = logging.getLogger(__name__)


def wanted() -> bool:
    """Whether anybody asked."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def notify(*states: str, descriptors: Sequence[int] = ()) -> bool:
    """Send e.g. `READY=1`, several in one message, with descriptors for FDSTORE=1; returns whether it was taken.

    Does nothing where nobody asked; a supervisor that went away is logged, not raised.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            # A supervisor that doesn't read must not stop the daemon.
            sender.setblocking(False)
            sender.sendmsg(["\n".join(states).encode()], passed, 0, address)
    except OSError as error:
        log.warning("could not notify the supervisor at NOTIFY_SOCKET: %s", error)
        return False
    return True
