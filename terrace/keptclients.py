"""Clients that stay connected while systemd restarts the daemon: they wait in its file descriptor store.

A daemon that is told to stop can't know whether another one is about to start. Where it has a store (the variable
FDSTORE says so: systemd sets it from version 254 on, our unit before) it stops its clients as for a successor, and
leaves their sockets, and a memory file with the rest (`nbd.suspended`), in the store. systemd gives them to the next
daemon if that is started in the course of a restart; when the service stays stopped it closes them, and the clients see
the end of their connection.

| name in the store | |
|---|---|
| `client` | the socket of one |
| `clients` | the memory file |

**Only once.** What was written down of a client is true until somebody reads from its socket. So `take_back` has them
removed from the store, and has systemd confirm that, before anything else is done with them: a daemon that then dies
takes its clients' connections along, as ever, and no third one goes on from what is outdated.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

from nbd.suspended import FormatError, Suspended, read, write
from terrace.sdnotify import barrier, notify, wanted

log = logging.getLogger(__name__)

CLIENT: Final = "client"
CLIENTS: Final = "clients"
BATCH: Final = 128
"""Descriptors in a message; the kernel allows 253."""
PATIENCE_S: Final = 5.0
"""For systemd to take a message, and to confirm that it has."""


def has_store(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether what this process leaves is kept for the next one."""
    return wanted() and environment.get("FDSTORE", "0") not in ("", "0")


def leave_behind(clients: Sequence[Suspended]) -> None:
    """Put them into the store. What it doesn't take is disconnected when this process ends."""
    if not clients:
        return
    memory = write(clients)
    try:
        # FDPOLL stays as it is: systemd lets go of a client that leaves while it waits.
        sockets = [one.sock.fileno() for one in clients]
        taken = notify("FDSTORE=1", f"FDNAME={CLIENTS}", descriptors=[memory], patience_s=PATIENCE_S)
        for first in range(0, len(sockets), BATCH):
            batch = sockets[first : first + BATCH]
            taken = taken and notify("FDSTORE=1", f"FDNAME={CLIENT}", descriptors=batch, patience_s=PATIENCE_S)
    finally:
        os.close(memory)
    if taken and barrier(PATIENCE_S):
        log.info("%d clients wait for the next terraced", len(clients))
    else:
        log.warning("systemd did not take the clients in %g s: they are disconnected", PATIENCE_S)


def take_back(memory: int | None, sockets: Sequence[socket.socket]) -> list[Suspended]:
    """The clients that an earlier daemon has left, which from now on are nobody else's. Takes all descriptors over."""
    if memory is None and not sockets:
        return []
    clients: list[Suspended] = []
    try:
        removed = [notify("FDSTOREREMOVE=1", f"FDNAME={name}", patience_s=PATIENCE_S) for name in (CLIENT, CLIENTS)]
        if not all(removed) or not barrier(PATIENCE_S):
            log.warning("systemd did not confirm that the clients are ours alone: they are disconnected")
        elif memory is not None:
            clients = read(memory, sockets)
    except FormatError as error:
        log.warning("clients of an earlier terraced are disconnected: %s", error)
    finally:
        if memory is not None:
            os.close(memory)
    known = {one.sock for one in clients}
    for sock in sockets:
        if sock not in known:
            # Not only closed: where the store still has it, its client would wait for who knows whom.
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        else:
            sock.setblocking(False)
    return clients
