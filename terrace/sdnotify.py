"""Tells systemd, or whoever set NOTIFY_SOCKET, what state the daemon is in (sd_notify(3), without libsystemd)."""

from __future__ import annotations

import array
import logging
import os
import select
import socket
from collections.abc import Sequence

log = logging.getLogger(__name__)


def wanted() -> bool:
    """Whether anybody asked."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def notify(*states: str, descriptors: Sequence[int] = (), patience_s: float = 0.0) -> bool:
    """Send e.g. `READY=1`, several in one message, with descriptors for FDSTORE=1; returns whether it was taken.

    Does nothing where nobody asked; a supervisor that went away, or doesn't take it in `patience_s`, is logged, not
    raised.
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
            sender.settimeout(patience_s)
            sender.sendmsg(["\n".join(states).encode()], passed, 0, address)
    except OSError as error:
        log.warning("could not notify the supervisor at NOTIFY_SOCKET: %s", error)
        return False
    return True


def barrier(patience_s: float) -> bool:
    """Wait until all that was sent before has been dealt with (sd_notify_barrier(3)); whether it was, in that time.

    What a process sends at its end is ignored if it is gone by the time that it is read.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        taken = notify("BARRIER=1", descriptors=[writing], patience_s=patience_s)
        os.close(writing)
        writing = -1
        poll = select.poll()
        poll.register(reading, 0)  # it hangs up when the other end's last copy is closed
        return taken and bool(poll.poll(patience_s * 1000))
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)
