"""What a node knows of a leg when its mirror asks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from replication.membership import LegInfo, Membership, Term
from terrace import primary
from terrace.localmirror import LocalMirror


@pytest.mark.parametrize("discarded", [False, True])
def test_a_leg_whose_writes_are_discarded_is_compared_in_full_when_it_comes_back(
    monkeypatch: pytest.MonkeyPatch, discarded: bool
) -> None:
    infos = (LegInfo("lega", "a", "pool/vol"), LegInfo("legb", "b", "pool/vol"))
    record = Membership(
        mirror="f" * 32, size_bytes=1 << 20, legs=infos, voters=("a", "b"), term=Term(1, "0" * 16), epoch=0,
        primary="a", in_sync=frozenset({"lega"}),
    )  # fmt: skip

    async def opened(*args: Any, **options: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return SimpleNamespace(info=infos[1], hello=SimpleNamespace(accepted=record, intact=False), close=lambda: None)

    monkeypatch.setattr(primary, "open_remote_leg", opened)

    async def body() -> None:
        mirror = cast(Any, object.__new__(LocalMirror))
        mirror.__dict__.update(
            keeper=SimpleNamespace(record=SimpleNamespace(me="lega", accepted=record), intact=True),
            mirror=None,
            compared_in_full={"legb"} if discarded else set(),
            _connected={},
            _node=SimpleNamespace(peers=SimpleNamespace(traffic={})),
        )
        await mirror._connect(None, infos[1], record)
        # As `Mirror.admit` asks: the leg isn't a member's yet.
        facts = await mirror._facts(infos[1], record)
        assert facts.known is not discarded
        assert not facts.intact

    trio.run(body)
