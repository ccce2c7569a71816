"""The last consistent state of a leg while it is being resynced: a snapshot `resync-DATE-TIME` on that leg alone.

A leg that was away is no state that the volume ever had from the first block that a resync writes to it until the last
one. If the source dies in between, the snapshot is what is left: `terrace volume clone` makes a volume of it.

It is taken by the leg itself, before its record says that it is inconsistent, and deleted when the record says that it
is in sync again. A crash in between leaves it there, and the next start looks. A pool that is too full to take it, or
fills up while it is there, goes on without, with an event: that a leg becomes whole comes first. A leg that is new has
no such state.

Where the leg has lost blocks, as no leg could read them when it was resynced, the snapshot may be all that is left of
these. Then it stays, until they are written or healed, or the pool needs the space; an event says so, and another one
when it goes.
"""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

import trio

from tiers import Pool, Snapshot, Volume
from tiers.layout import BAD, BLOCK_SHIFT

log = logging.getLogger("terraced")

TICK_S: Final = 1.0
RETRY_S: Final = 10.0
LOW_SHARE: Final = 0.05
"""With less of the pool free than that, the kept state is given up."""
PIECE_BLOCKS: Final = 4096
MAX_KEPT: Final = 4
"""So many at most stay for what was lost: the oldest ones, which were taken before it was."""
_NAME = re.compile(r"resync-[0-9]{8}-[0-9]{6}(-[0-9]+)?")


def is_kept_state(name: str) -> bool:
    """Whether a snapshot has a name that only resyncs give."""
    return _NAME.fullmatch(name) is not None


async def _nothing(snapshot: Snapshot) -> bool:
    await trio.lowlevel.checkpoint()
    return False


async def has_lost(pool: Pool, volume: Volume, snapshot: Snapshot) -> bool:
    """Whether a snapshot has a block that its volume has lost. What is known of that survives a crash from then on."""
    await pool.losses()  # asks the map, and saves
    for loss in pool.losses_of(volume):
        first, stop = loss.offset >> BLOCK_SHIFT, loss.offset + loss.length >> BLOCK_SHIFT
        for at in range(first, stop, PIECE_BLOCKS):
            try:
                addresses, _ = await snapshot.entries(at, min(PIECE_BLOCKS, stop - at))
            except OSError:
                continue  # a damaged page of its map
            if any(address > BAD for address in addresses):
                return True
    return False


class KeptState:
    """Of one leg. `run` has to be run."""

    def __init__(
        self,
        pool: Pool,
        volume: Volume,
        tell: Callable[[str, str, str], None],
        is_inconsistent: Callable[[], bool],
        *,
        wanted: bool = True,
        has_lost: Callable[[Snapshot], Awaitable[bool]] = _nothing,
    ) -> None:
        """`has_lost`: whether a snapshot has what the volume has lost."""
        self._pool = pool
        self._volume = volume
        self._tell = tell
        self._is_inconsistent = is_inconsistent
        self._wanted = wanted
        self._has_lost = has_lost
        self._stays = False
        """That it does, for what was lost, was told."""
        self._stay: set[str] = set()
        """Short names of those that did, or may have before the start: that they go is told."""
        self._looked_at = -RETRY_S
        self._stirred = trio.Event()
        self._refused = ""
        """Why none could be taken, as it was told last: a resync is tried again every few seconds."""
        self._is_early = False
        """It is there, or about to be, and the record that says why is still on its way."""

    def found(self) -> list[Snapshot]:
        """Oldest first."""
        return [one for one in self._pool.snapshots(self._volume.short_name) if is_kept_state(one.short_name)]

    @property
    def name(self) -> str | None:
        """POOL/VOL@resync-... of the newest; None if there is none."""
        found = self.found()
        return found[-1].name if found else None

    async def take(self) -> None:
        """Before the leg is overwritten. Raises nothing: a resync goes on without."""
        if not self._wanted:
            await trio.lowlevel.checkpoint()
            return
        taken = {one.short_name for one in self._pool.snapshots(self._volume.short_name)}
        base = name = time.strftime("resync-%Y%m%d-%H%M%S", time.localtime())
        number = 1
        while name in taken:
            number += 1
            name = f"{base}-{number}"
        # Before it can be seen, which is long before this returns: `run` may look in between.
        before, self._is_early = self._is_early, True
        try:
            await self._pool.take_snapshots([(self._volume.short_name, name)])
        except OSError as error:
            self._is_early = before
            why = "the pool is too full" if error.errno == errno.ENOSPC else str(error)
            if why != self._refused:
                self._refused = why
                self._tell(
                    "leg",
                    self._volume.name,
                    f"{self._volume.name} is resynced without keeping the state that it has now: {why}",
                )
        except BaseException:
            self._is_early = before
            raise
        else:
            self._refused = ""
            log.info("%s: kept as %s until it is resynced", self._volume.name, name)
        finally:
            self._stir()

    def served(self) -> None:
        """The record says that the leg is whole again."""
        self._is_early, self._refused = False, ""
        self._stir()

    def _stir(self) -> None:
        self._stirred.set()
        self._stirred = trio.Event()

    async def run(self) -> NoReturn:
        """The task: delete it when it has served, or when the pool needs the space."""
        if not self._is_inconsistent():
            # What one of these stayed for may have been written while nobody looked, and then it goes now.
            self._stay = {one.short_name for one in self._of_before(self.found())}
        while True:
            stirred, pause_s = self._stirred, TICK_S
            if self._is_inconsistent():
                self._is_early = False
            found = self.found()
            self._stay.intersection_update(one.short_name for one in found)
            if found:
                if not self._is_inconsistent():
                    is_short = self._is_short()
                    stays = [] if is_short else [one for one in found if await self._has_lost(one)][:MAX_KEPT]
                    self._tell_stays(stays)
                    over = [one for one in self._of_before(found) if one not in stays]
                    gone = await self._delete(over)
                    self._tell_gone([one for one in gone if one.short_name in self._stay], is_short=is_short)
                    if len(gone) < len(over) or stays:
                        pause_s = RETRY_S
                elif self._is_short():
                    gone = await self._delete(found)
                    told = [one for one in gone if one is found[-1] or one.short_name in self._stay]
                    self._tell_gone(told, is_short=True)
                    if len(gone) < len(found):
                        pause_s = RETRY_S
                elif trio.current_time() - self._looked_at >= RETRY_S:
                    self._looked_at = trio.current_time()
                    await self._has_lost(found[0])  # so that it is known after a crash, too
                with trio.move_on_after(pause_s):
                    await stirred.wait()
            else:
                await stirred.wait()

    def _of_before(self, found: list[Snapshot]) -> list[Snapshot]:
        """Each attempt to begin takes one, and only the newest is of now."""
        return found[:-1] if self._is_early else found

    def _tell_stays(self, stays: list[Snapshot]) -> None:
        was, self._stays = self._stays, bool(stays)
        self._stay.update(one.short_name for one in stays)
        if stays and not was:
            name, pool = stays[0].name, self._pool.name
            self._tell(
                "leg",
                self._volume.name,
                f"{name} stays, the state of this leg before its resync: it may have what no leg could read. It is "
                f"deleted when that is written anew or healed, or pool {pool} is nearly full: `terrace snapshot hold "
                f"--local {name}` keeps it, `terrace volume clone {name} {pool}/NAME` makes a volume of it",
            )

    def _tell_gone(self, gone: list[Snapshot], *, is_short: bool) -> None:
        for one in gone:
            if is_short:
                also = ", though it may have had what no leg could read" if one.short_name in self._stay else ""
                what = f"{one.name}, the state of this leg before its resync, was given up{also}: pool "
                what += f"{self._pool.name} is nearly full"
            else:
                what = f"{one.name}, the state of this leg before its resync, is deleted: the leg lacks nothing any "
                what += "more that it may have had"
            self._tell("leg", self._volume.name, what)

    def _is_short(self) -> bool:
        used, capacity = self._pool.use()
        return capacity - used < capacity * LOW_SHARE

    async def _delete(self, found: list[Snapshot]) -> list[Snapshot]:
        """Those that are gone. One that somebody holds or reads stays until that ends."""
        free = [one for one in found if not one.held and not one.open_count]
        if free:
            try:
                await self._pool.delete_snapshots([(self._volume.short_name, one.short_name) for one in free])
            except OSError as error:
                log.warning("%s can't be deleted: %s", free[-1].name, error)
                return []
        return free
