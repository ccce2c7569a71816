"""One instant of several mirrors: their snapshots, each at the same place in the order of writes on every leg in sync.

While it is taken nothing is in flight in any of them, and nothing begins (`Mirror.barrier`). A write that was answered
before is in all snapshots, and none that was sent afterwards is in any; so a client that writes to one mirror what it
has read in another one finds both or the earlier one alone.

**Order.** Barriers exclude each other, and whoever takes several takes them in the order of the mirrors' ids, as nobody
holds one and waits for that of a mirror before it. So there is no deadlock.

**Time.** What holds clients up is bounded: all barriers are there within the longest timeout of these mirrors, else
all are let go, and it is tried once more, as the leg that was waited for is left out by then. A leg that is
silent for its mirror's timeout is dropped as ever, and one that says that it works on its snapshot after `TAKE_S`. One
that only refuses (its pool is full, the name is in use there) stays in sync and lacks that snapshot, which is told: its
data are as good as before.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final

import trio

from replication.leg import Leg, LegState
from replication.mirror import Mirror

PARTING_S: Final = 1.0
"""So long what is cancelled may take to end."""
REFUSALS: Final = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EEXIST, errno.EBUSY),
        *(errno.EINVAL, errno.ENOTSUP, errno.ENAMETOOLONG, errno.EROFS),
    }
)
"""A leg that answers a snapshot with one of these is as good as before."""

TAKE_S: Final = 10.0
"""So long a storage that works has to take a snapshot, which is one checkpoint, while clients wait."""

Lacking = dict[str, str]
"""By id of the leg: why it doesn't have the snapshot."""


async def take_at_once(
    mirrors: Mapping[Mirror, str], here: Callable[[Sequence[Mirror]], Awaitable[None]]
) -> dict[Mirror, Lacking]:
    """Take one snapshot of each mirror, of the name given; tells which legs lack it.

    `here` takes those of this node, all at once and all or none: it is given the mirrors whose local leg is in sync,
    and may add volumes that are in no mirror. Raises OSError: what `here` raises, EBUSY if no instant was found in
    time, or what the mirror says that can't be served. Nothing was taken then, unless this node's storage hangs
    (ETIMEDOUT).
    """
    ordered = sorted(mirrors, key=lambda mirror: mirror.membership.mirror)
    limit_s = max((mirror.membership.options.timeout_s for mirror in ordered), default=None)
    if limit_s is None:
        await here([])
        return {}
    waited_for = ordered[0]
    for _ in range(2):
        # Before anything is held: one that can't be written to now would keep the clients of all others waiting.
        for waited_for in ordered:
            with trio.move_on_after(limit_s) as patience:
                await waited_for.admitted()
            if patience.cancelled_caught:
                raise _no_moment(waited_for, limit_s)
        async with contextlib.AsyncExitStack() as barriers:
            with trio.move_on_after(limit_s) as patience:
                for waited_for in ordered:
                    await barriers.enter_async_context(waited_for.barrier())
            if not patience.cancelled_caught:
                return await _take(ordered, mirrors, here)
    raise _no_moment(waited_for, limit_s)


def _no_moment(mirror: Mirror, limit_s: float) -> OSError:
    waiting = mirror.status().waiting
    why = f" ({waiting})" if waiting else ""
    return OSError(
        errno.EBUSY,
        f"{mirror.name} had no moment without a write in flight within {limit_s:g} s{why}, so no snapshot was taken: "
        f"try again; `terrace volume mirror explain {mirror.name}` says what it waits for",
    )


async def _take(
    ordered: Sequence[Mirror], names: Mapping[Mirror, str], here: Callable[[Sequence[Mirror]], Awaitable[None]]
) -> dict[Mirror, Lacking]:
    """Under all barriers."""
    local = [mirror for mirror in ordered if any(leg.is_local for leg in _in_sync(mirror))]
    limit_s = max(TAKE_S, *(mirror.membership.options.timeout_s for mirror in ordered))
    if not await _ended(partial(here, local), limit_s):
        raise OSError(
            errno.ETIMEDOUT,
            f"this node's storage has not taken the snapshot within {limit_s:g} s; if it appears later it is of no "
            "common instant: delete it",
        )
    lacking: dict[Mirror, Lacking] = {}
    async with trio.open_nursery() as nursery:
        for mirror in ordered:
            lacking[mirror] = {}
            for member in mirror.members.values():
                if member.state is not LegState.UP_TO_DATE or member.leg is None:
                    lacking[mirror][member.info.id] = f"it is {member.state.value}"
            for leg in _in_sync(mirror):
                if not leg.is_local:
                    nursery.start_soon(_take_one, mirror, leg, names[mirror], lacking[mirror])
    for mirror in ordered:
        mirror.check()  # it may be another node's since: then this is no snapshot of the mirror
        if len(lacking[mirror]) == len(mirror.members):
            left = {leg.id: leg.node for leg in mirror.membership.legs}  # one that lacks it may be none any more
            why = "; ".join(f"{left[leg]}: {why}" for leg, why in lacking[mirror].items() if leg in left)
            raise OSError(errno.EIO, f"no leg of {mirror.name} has taken the snapshot ({why})")
    return lacking


async def _ended(work: Callable[[], Awaitable[None]], limit_s: float) -> bool:
    """Do it, for so long at most. False: it is cancelled, and left behind, since a disk that never answers can't be
    cancelled; whoever waits for the barriers has to go on. Raises what it raises."""
    ended, scope = trio.Event(), trio.CancelScope()
    problem: list[Exception] = []

    async def run() -> None:
        try:
            with scope:
                await work()
        except Exception as error:
            problem.append(error)
        finally:
            ended.set()

    trio.lowlevel.spawn_system_task(run)
    try:
        with trio.move_on_after(limit_s):
            await ended.wait()
    finally:
        scope.cancel()
        with trio.move_on_after(PARTING_S, shield=True):
            await ended.wait()
    if problem:
        raise problem[0]
    return ended.is_set() and not scope.cancelled_caught


def _in_sync(mirror: Mirror) -> list[Leg]:
    return [
        member.leg
        for member in mirror.members.values()
        if member.state is LegState.UP_TO_DATE and member.leg is not None
    ]


async def _take_one(mirror: Mirror, leg: Leg, name: str, lacking: Lacking) -> None:
    error = OSError(errno.ETIMEDOUT, "it has not taken a snapshot in time")
    try:
        with trio.move_on_after(max(TAKE_S, mirror.membership.options.timeout_s)):
            await leg.snapshot(name)
            return
    except OSError as refusal:
        error = refusal
    lacking[leg.info.id] = error.strerror or str(error)
    if error.errno not in REFUSALS:
        mirror.leg_failed(leg, error)
