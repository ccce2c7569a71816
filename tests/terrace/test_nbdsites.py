"""Which legs on NBD servers wait for what an earlier connection to their server may have left there."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import trio

from replication.membership import LegInfo, Membership
from replication.nbdleg import NbdSite
from terrace.primary import MirrorPart
from tests.replication.stores import first_record


def test_a_leg_on_a_server_waits_where_one_was_removed_that_may_have_been_there_and_no_other_does() -> None:
    first, second = (LegInfo(name * 16, "a", f"nbd://{name}/export", "nbd") for name in "xy")
    seen: list[bool] = []

    async def opened(site: NbdSite, *args: Any, **options: Any) -> NbdSite:
        await trio.lowlevel.checkpoint()
        seen.append(site.may_owe)
        return site

    async def fenced(*args: Any) -> None:
        await trio.lowlevel.checkpoint()

    def record(*legs: LegInfo) -> Membership:
        record = first_record("ab")
        return replace(record, legs=(*record.legs, *legs))

    async def body() -> None:
        part = cast("MirrorPart", SimpleNamespace(nbd_sites={}, _servers=None, _leg_here=None, _require_fenced=fenced))
        with mock.patch.object(NbdSite, "open", opened):
            for info, membership in (
                (first, record(first)),
                (second, record(first, second)),
                (first, record(first, second)),
                (replace(first, id="z" * 16), record(second, replace(first, id="z" * 16))),
            ):
                await MirrorPart._connect_nbd(part, info, membership)
        assert seen == [False, False, False, True]

    trio.run(body)
