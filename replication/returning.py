"""Legs that come back: each is sought, brought up to date while clients go on, and put into the record.

There is one task for each member. It connects where nobody is connected, tells the leg that it is inconsistent from now
on (durably), lets it have every new batch, and runs its resync; then the leg is ready, and a record with it is wanted.

Each attempt that comes to nothing doubles the wait before the next. Being in sync ends that only when it has lasted: a
leg whose pool is full may have room for what it missed, and none for what clients write next.

A leg that lacks nothing but blocks that no leg can read, and can't be told that they are lost (`LacksBlocksError`), is
tried again when some of them can be read or an operator asks for it, and seldom else. Why it is kept out stays known
while that goes on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import trio

from replication.barriers import fit
from replication.healing import Healing
from replication.leg import Leg, LegState, LegStore
from replication.members import Connect, LegFacts, Member
from replication.membership import LegInfo, Membership
from replication.records import Records
from replication.resync import LacksBlocksError, Resync, Site
from replication.site import Gate, MirrorSettings

KEPT_OUT_S: Final = 30.0
"""So often a leg that is kept out by blocks that no leg can read is tried, where nothing says that they can be."""


class Attended(Gate, Site, Protocol):
    """What a leg that comes back needs of the mirror."""

    reader: Leg | None
    """The local leg, if it may be read."""
    healing: Healing

    def drop(self, member: Member, error: OSError) -> None:
        """Its leg is out."""


class Returning:
    """See the module. `tend` has to be run."""

    def __init__(
        self,
        site: Attended,
        records: Records,
        connect: Connect,
        facts: Callable[[LegInfo, Membership], Awaitable[LegFacts]],
        store: LegStore | None,
        settings: MirrorSettings,
    ) -> None:
        self._site = site
        self._records = records
        self._connect = connect
        self._facts = facts
        self._store = store
        self._settings = settings

    async def tend(self) -> None:
        """A task for each leg of the mirror."""
        tended: set[Member] = set()
        async with trio.open_nursery() as nursery:
            while True:
                for member in self._site.members.values():
                    if member not in tended:
                        tended.add(member)
                        nursery.start_soon(self._tend_one, member)
                await self._site.changed()

    async def _tend_one(self, member: Member) -> None:
        settings = self._settings
        delay, up_since = settings.retry_s, None
        while self._site.members.get(member.info.id) is member and self._site.end is None:
            if member.state is LegState.UP_TO_DATE:
                up_since = member.since
            elif up_since is not None:
                has_stayed, up_since = member.since - up_since >= settings.stay_s, None
                delay = settings.retry_s if has_stayed else delay
                if not has_stayed:
                    await trio.sleep(delay)
                    delay = min(delay * 2, settings.retry_max_s)
                    continue
            if member.leg is not None or self._site.shut or member.info.id in self._records.required():
                await self._site.changed()
                continue
            try:
                leg = await self._connect(member.info, self._site.membership)
            except OSError as error:
                member.error, member.kept_out = error, None
            else:
                if member.leg is not None or self._site.shut or self._site.members.get(member.info.id) is not member:
                    leg.close()
                    continue
                await self.admit(leg)
                if member.state is LegState.UP_TO_DATE:
                    continue
                if member.kept_out is not None:
                    await self._until_worth_it(member)
                    delay = settings.retry_s
                    continue
            await trio.sleep(delay)
            delay = min(delay * 2, settings.retry_max_s)

    async def _until_worth_it(self, member: Member) -> None:
        """Until a leg that was kept out may get in: some of what no leg could read can be read now, or was written."""
        known = set(self._site.healing.unmendable)
        with trio.move_on_after(KEPT_OUT_S):
            while (
                member.kept_out is not None
                and self._site.end is None
                and self._site.members.get(member.info.id) is member
                and known <= self._site.healing.unmendable.keys()
            ):
                await self._site.changed()

    async def admit(self, leg: Leg) -> None:
        """Bring a leg up to date and put it into the record. Returns when it is in sync, or has failed."""
        member = self._site.members[leg.info.id]
        try:
            known = (await self._facts(leg.info, self._site.membership)).known
            await leg.accept(self._site.membership, inconsistent=True)
            size_bytes = self._site.size_bytes
            await fit(leg, size_bytes)
        except OSError as error:
            member.error, member.kept_out = error, None
            leg.close()
            return
        resized = self._site.size_bytes != size_bytes
        if member.leg is not None or self._site.shut or self._site.lost or self._site.end is not None or resized:
            leg.close()
            return
        member.leg, member.fitted_bytes = leg, size_bytes
        self._site.healing.opened_anew(member)
        member.abandoned = abandoned = trio.Event()
        member.counters.resyncs += 1
        member.become(LegState.SYNCING)
        store, settings = self._local_store(), self._settings.resync
        member.resync = Resync(self._site, member, known=known, store=store, settings=settings)
        self._site.change()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def give_up() -> None:
                await abandoned.wait()
                nursery.cancel_scope.cancel()

            try:
                await member.resync.run()
            except OSError as error:
                member.resync.progress.state = f"failed: {error.strerror}"
                member.kept_out = error if isinstance(error, LacksBlocksError) else None
                if member.leg is leg:
                    self._site.drop(member, error)
            else:
                if member.leg is leg:
                    member.ready = True
                    self._site.change()
                    while member.leg is leg and member.ready:
                        await self._site.changed()
            nursery.cancel_scope.cancel()
        if member.state is LegState.UP_TO_DATE:
            member.error = member.kept_out = None
        elif member.kept_out is not member.error:
            member.kept_out = None  # it was lost for another reason

    def _local_store(self) -> LegStore | None:
        """The primary's own store, if its leg is in sync."""
        return self._store if self._site.reader is not None else None
