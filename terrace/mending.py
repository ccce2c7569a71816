"""Mending the leg of this node: what is damaged in its volume is had from other nodes, and told to operators.

A scrub that finds a damaged block asks for its bytes here (`fetch`): any other leg that has a block with just that
checksum will do, in its volume or in the snapshot of the same name, and however far it is behind; the engine believes
nothing else. What can't be had so, and blocks that were lost with a device, of which there is no checksum, are the
primary's to heal, in its order (`replication.damage`).

Nobody waits for this longer than for one call to a node that answers. A node that is away is not waited for.
"""

from __future__ import annotations

import base64
import binascii
import errno
import logging
from collections.abc import Mapping
from typing import Any, Final, NoReturn

import trio

from replication.damage import Damage, Done, Ranges, heal_told, judge_done, judge_ranges
from replication.leg import BLOCK_BYTES
from replication.membership import Term
from terrace.localmirror import LocalMirror
from terrace.mirrorwords import about_map, about_unreadable, ranges_in_words
from terrace.peers import Peers
from terrace.primary import MirrorPart, ServedMirror, Tell
from tiers.layout import check_of

log = logging.getLogger("terraced")

FETCH_S: Final = 5.0
CALL_S: Final = 30.0
WATCH_S: Final = 0.5
LOST_S: Final = 2.0
QUIET_S: Final = 10.0
"""Blocks that were healed are told once in this time, and counted together."""


class LegMender:
    """Of one leg of this node; implements `tiers.mending.Elsewhere`. `run` has to be run."""

    def __init__(self, mirror: LocalMirror, peers: Peers, tell: Tell) -> None:
        self.damage = Damage(mirror.store.empty_extents, self._ask, self._healed)
        self._mirror = mirror
        self._peers = peers
        self._tell = tell
        self._lost: set[tuple[int, int]] = set()
        """Ranges that were lost with a device, as far as they were noted."""
        self._told = _Counted()
        self._told_to: tuple[str | None, Term] | None = None
        """The primary that is told of what can't be read here, and its term."""
        self._served: ServedMirror | None = None
        self._unmendable: set[int] = set()
        self._map_damaged: frozenset[str] = frozenset()

    # -- what the engine asks ------------------------------------------------------------------------------------

    async def fetch(self, snapshot: str | None, block: int, check: int) -> bytes | None:
        """See `tiers.mending.Elsewhere`."""
        membership = self._mirror.membership
        others = [leg for leg in membership.legs if leg.id != self._mirror.me and leg.kind == "terrace"]
        asked = 0
        problem = OSError(errno.ENOTCONN, f"{self._mirror.name}: there is no other leg")
        for leg in sorted(others, key=lambda leg: leg.id not in membership.in_sync):
            params = {"leg": leg.id, "snapshot": snapshot, "offset": block * BLOCK_BYTES, "check": f"{check:016x}"}
            try:
                answer = await self._peers.call(leg.node, "leg.block", params, FETCH_S)
            except OSError as error:
                problem = error
                continue
            asked += 1
            data = _bytes_of(answer)
            if data is not None:
                return data
        if not asked:
            raise problem
        await trio.lowlevel.checkpoint()
        return None

    def damaged(self, offset: int, length: int) -> None:
        """See `tiers.mending.Elsewhere`."""
        self.damage.note(offset, length)

    # -- what the primary does -----------------------------------------------------------------------------------

    async def _ask(self, ranges: Ranges) -> list[Done]:
        mirror = self._mirror
        if mirror.serves and mirror.mirror is not None:
            return await heal_told(mirror.mirror.healing, mirror.me, ranges)
        primary = mirror.membership.primary
        if primary is None or primary == self._peers.node:
            raise OSError(errno.EAGAIN, f"{mirror.name} has no primary now that could heal its leg here")
        params = {"leg": mirror.me, "ranges": [list(one) for one in ranges]}
        answer = await self._peers.call(primary, "leg.damaged", params, CALL_S)
        return judge_done(answer.get("done") if isinstance(answer, dict) else None, ranges)

    async def _healed(self, offset: int, length: int, blocks: int) -> None:
        pool, name = self._mirror.pool, self._mirror.name
        if blocks:
            log.info("%s: %d damaged blocks at %d were healed from another leg", name, blocks, offset)
            pool.scrubber.mended(name, offset, length)
        if self._lost and not self.damage.extents:
            try:
                await pool.losses()  # what was written anew is none any more
            except OSError as error:
                # The list can't be written down now: it is with what is healed next, or when the pool is closed.
                log.warning("%s: the list of what was lost can't be brought up to date: %s", name, error)
                return
            self._lost.clear()

    # -- the task ------------------------------------------------------------------------------------------------

    async def run(self) -> NoReturn:
        """As long as the leg is here."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.damage.run)
            nursery.start_soon(self._watch)
        raise AssertionError("both run for ever")

    async def _watch(self) -> None:
        looked_at = -LOST_S
        while True:
            if (begun := self._primary_of()) != self._told_to:
                self._told_to = begun
                self.damage.again()
            # It may be ten thousand ranges, of which most were noted already.
            if trio.current_time() - looked_at >= LOST_S:
                looked_at = trio.current_time()
                self._note_lost()
            self._tell_healed()
            self._tell_unmendable()
            self._tell_map_damage()
            await trio.sleep(WATCH_S)

    def _primary_of(self) -> tuple[str | None, Term] | None:
        """Who is primary, and since which term, as far as it is known here."""
        try:
            record = self._mirror.membership
        except OSError:  # it can't be read now
            return self._told_to
        return record.primary, record.term

    def _note_lost(self) -> None:
        for loss in self._mirror.pool.losses_of(self._mirror.volume):
            if (loss.offset, loss.length) not in self._lost:
                self._lost.add((loss.offset, loss.length))
                self.damage.note(loss.offset, loss.length)

    def _tell_healed(self) -> None:
        mirror, name = self._mirror, self._mirror.name
        own = self._told.due("", mirror.volume.healed_blocks)
        if own:
            self._tell("leg", name, f"{own} damaged blocks of {name} here were repaired from another leg")
        served = mirror.mirror
        if served is None:
            return
        if served is not self._served:
            self._served = served
            self._told.forget()
            self._unmendable = set()
            self._map_damaged = frozenset()
        for leg in served.status().legs:
            count = self._told.due(leg.info.id, leg.counters.healed_blocks)
            if count:
                place = leg.info.place if leg.info.kind == "nbd" else f"node {leg.info.place}"
                self._tell(
                    "leg", name,
                    f"{count} blocks of the leg of {name} on {place} couldn't be read there, and were "
                    "written anew from another leg",
                )  # fmt: skip

    def _tell_unmendable(self) -> None:
        served, name = self._mirror.mirror, self._mirror.name
        if served is None:
            return
        now = set(served.healing.unmendable)
        fresh, again = sorted(now - self._unmendable), sorted(self._unmendable - now)
        self._unmendable = now
        if fresh:
            silent = {node for node, peer in self._peers.peers.items() if peer.calls is None}
            self._tell("damage", name, about_unreadable(name, served.status(), fresh, silent))
        if words := ranges_in_words(offset for offset in again if offset < served.size_bytes):
            self._tell("damage", name, f"{words} of {name} can be read again")

    def _tell_map_damage(self) -> None:
        served = self._mirror.mirror
        if served is None:
            return
        status = served.status()
        for leg_id in sorted(status.map_damaged - self._map_damaged):
            name = self._mirror.name
            self._tell("damage", name, about_map(name, self._peers.node, status, leg_id))
        self._map_damaged = status.map_damaged


class _Counted:
    """Counters of which what was added is told, not too often."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._at: dict[str, float] = {}

    def due(self, key: str, count: int) -> int:
        """How many are new and to be told now."""
        fresh = count - self._seen.get(key, 0)
        now = trio.current_time()
        if fresh <= 0 or now < self._at.get(key, 0.0):
            return 0
        self._seen[key] = count
        self._at[key] = now + QUIET_S
        return fresh

    def forget(self) -> None:
        """The counters of legs begin anew, as the mirror does."""
        for key in [key for key in self._seen if key]:
            del self._seen[key]


def _bytes_of(answer: Any) -> bytes | None:
    """A block out of another node's answer."""
    text = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(text, str) or len(text) > 2 * BLOCK_BYTES:
        return None
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


# -- what other nodes ask ----------------------------------------------------------------------------------------


async def read_block(mirror: LocalMirror, params: Mapping[str, Any]) -> dict[str, Any]:
    """`leg.block`: a block of the leg here, or of its snapshot of that name, if it has that check; else null."""
    offset, snapshot, text = params.get("offset"), params.get("snapshot"), params.get("check")
    if type(offset) is not int or offset % BLOCK_BYTES or offset < 0 or not isinstance(text, str):
        raise OSError(errno.EPROTO, "leg.block: offset or check is none")
    try:
        check = int(text, 16)
        there = mirror.volume if snapshot is None else mirror.pool.snapshot(mirror.volume.short_name, str(snapshot))
        data = bytearray(BLOCK_BYTES)
        if offset + BLOCK_BYTES > there.size_bytes:
            raise ValueError("it is behind the end")
        await there.read_anyway(offset, BLOCK_BYTES, memoryview(data))
    except (OSError, ValueError):
        await trio.lowlevel.checkpoint()
        return {"data": None}
    return {"data": base64.b64encode(data).decode() if check_of(data) == check else None}


async def heal_leg(mirror: MirrorPart, node: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """`leg.damaged`: what another node can't read of its leg is healed here, by the primary."""
    membership = mirror.membership
    leg = params.get("leg")
    if not any(one.id == leg and one.node == node for one in membership.legs):
        raise OSError(errno.EPERM, f"node {node} has no leg {str(leg)[:32]} of {mirror.name}")
    ranges = judge_ranges(params.get("ranges"), membership.size_bytes)
    if not mirror.serves or mirror.mirror is None:
        raise OSError(errno.EAGAIN, f"node {membership.primary} is the primary of {mirror.name} by what is known here")
    return {"done": await heal_told(mirror.mirror.healing, str(leg), ranges)}
