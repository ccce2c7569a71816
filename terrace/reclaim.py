"""Keeps the kernel's memory reclaim from waiting for us while it waits for itself.

On a host that mounts a volume which this process serves, freeing memory may mean writing to that volume, and so to us.
If we then needed memory that only such a write can free, nobody would go on. Two things, where they are permitted:
PR_SET_IO_FLUSHER makes our own allocations do no I/O (prctl(2)), and locked memory is never what has to be read back
from a disk before we can run. Both are for the whole process, so this is called before any thread is started.
"""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

OOM_SCORE = -900
SCORE = Path("/proc/self/oom_score_adj")
_PR_SET_IO_FLUSHER = 57
# Locked as it is touched: locking stacks and arenas as they are mapped would take memory that is never used.
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_CAP_IPC_LOCK, _CAP_SYS_RESOURCE = 14, 24


def stand_apart() -> list[str]:
    """Do what is permitted; returns what was done, of `io-flusher` and `locked-memory`. Never raises."""
    libc = ctypes.CDLL(None, use_errno=True)
    done = []
    if _capable(_CAP_SYS_RESOURCE) and _worked("PR_SET_IO_FLUSHER", libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)):
        done.append("io-flusher")
    # Only with the capability: under a mere limit later allocations would fail when they reach it.
    flags = _MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT
    if _capable(_CAP_IPC_LOCK) and _worked("mlockall", libc.mlockall(flags)):
        done.append("locked-memory")
    return done


def be_spared() -> None:
    """Be killed late where memory runs out: a mounted filesystem fails with this process. As the units have it."""
    # Who has chosen a score below 0 has thought of it.
    if _capable(_CAP_SYS_RESOURCE) and int(SCORE.read_text(encoding="ascii")) >= 0:
        SCORE.write_text(str(OOM_SCORE), encoding="ascii")


def _worked(call: str, result: int) -> bool:
    if result != 0:
        log.warning("%s: %s; don't mount volumes on the host that serves them", call, os.strerror(ctypes.get_errno()))
    return result == 0


def _capable(capability: int) -> bool:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> capability & 1)
    return False
