"""Tells systemd, or whoever set NOTIFY_SOCKET, what state the daemon is in (sd_notify(3), without libsystemd)."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Send e.g. `READY=1`. Does nothing where nobody asked; a supervisor that went away is logged, not raised."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            # A supervisor that doesn't read must not stop the daemon.
            sender.setblocking(False)
            sender.sendto(state.encode(), address)
    except OSError as error:
        log.warning("could not notify the supervisor at NOTIFY_SOCKET: %s", error)
