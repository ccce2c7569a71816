"""What nodes ask each other to mend legs, and what operators are told: judged, bounded, and never believed."""

from __future__ import annotations

import base64
import errno
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import trio
import trio.testing

from replication.healing import Outcome
from replication.leg import LegState, MirrorState
from replication.members import LegCounters, LegStatus, MirrorStatus
from replication.membership import Term
from terrace.mending import QUIET_S, LegMender, heal_leg, read_block
from terrace.mirrorwords import ranges_in_words
from tests.replication.fakes import MemoryExtents
from tests.replication.stores import first_record
from tests.terrace.helpers_mending import FakePeers
from tiers.layout import check_of

DATA = bytes(range(256)) * 16
CHECK = check_of(DATA)


def mirror_of(node: str = "a", **more: Any) -> Any:
    """A leg of a mirror on nodes a, b and c, of which a is primary."""
    volume = SimpleNamespace(healed_blocks=0, short_name="vol", size_bytes=1 << 20, name="p/vol")
    pool = SimpleNamespace(losses_of=lambda volume: [])
    given = {"membership": first_record("abc"), "me": node, "name": "p/vol", "serves": False, "mirror": None}
    store = SimpleNamespace(empty_extents=MemoryExtents)
    return SimpleNamespace(volume=volume, pool=pool, store=store, **(given | more))


def answer(data: bytes | None) -> dict[str, Any]:
    return {"data": None if data is None else base64.b64encode(data).decode()}


def mender(peers: FakePeers, mirror: Any = None, told: list[str] | None = None) -> LegMender:
    events = told if told is not None else []
    owner: Any = peers
    return LegMender(mirror or mirror_of(), owner, lambda kind, subject, text: events.append(f"{kind}: {text}"))


@pytest.mark.parametrize(
    "bad", [None, {}, {"data": 5}, {"data": "%%%"}, {"data": "A" * 100_000}, answer(None), OSError(errno.EIO, "no")]
)
def test_a_block_is_had_from_the_next_leg_where_one_has_nothing_or_answers_nonsense(bad: Any) -> None:
    peers = FakePeers(b=bad, c=answer(DATA))
    assert trio.run(mender(peers).fetch, "snap", 3, CHECK) == DATA
    assert [(node, method) for node, method, _ in peers.asked] == [("b", "leg.block"), ("c", "leg.block")]
    assert peers.asked[0][2] == {"leg": "b", "snapshot": "snap", "offset": 3 * 4096, "check": f"{CHECK:016x}"}


def test_nobody_to_ask_is_an_error_and_nothing_had_is_none() -> None:
    away = OSError(errno.ENOTCONN, "node can't be reached")
    with pytest.raises(OSError, match="can't be reached"):
        trio.run(mender(FakePeers(b=away, c=away)).fetch, None, 3, CHECK)
    assert trio.run(mender(FakePeers(b=away, c=answer(None))).fetch, None, 3, CHECK) is None


def reading(data: bytes) -> Any:
    async def read_anyway(offset: int, length: int, into: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if not data:
            raise OSError(errno.EIO, "damaged here too")
        into[:] = data

    return read_anyway


def test_a_block_is_given_only_if_it_has_the_check() -> None:
    mirror = mirror_of()
    asked: dict[str, Any] = {"leg": "a", "snapshot": None, "offset": 4096, "check": f"{CHECK:016x}"}
    for content, wanted in ((DATA, answer(DATA)), (DATA[::-1], answer(None)), (b"", answer(None))):
        mirror.volume.read_anyway = reading(content)
        assert trio.run(read_block, mirror, asked) == wanted
    changes: dict[str, Any]
    for changes in ({"offset": 1 << 20}, {"check": "g"}):
        assert trio.run(read_block, mirror, asked | changes) == answer(None)
    for changes in ({"offset": 5}, {"offset": -4096}, {"offset": "0"}, {"check": 7}):
        with pytest.raises(OSError) as refused:
            trio.run(read_block, mirror, asked | changes)
        assert refused.value.errno == errno.EPROTO


def test_a_leg_is_healed_only_by_its_primary_for_the_node_that_has_it() -> None:
    mirror = mirror_of()
    asked: dict[str, Any] = {"leg": "b", "ranges": [[0, 4096]]}
    for node, params, number in (
        ("c", asked, errno.EPERM),
        ("b", asked | {"leg": "x"}, errno.EPERM),
        ("b", asked | {"ranges": [[0, 0]]}, errno.EPROTO),
        ("b", asked, errno.EAGAIN),
    ):
        with pytest.raises(OSError) as refused:
            trio.run(heal_leg, mirror, node, params)
        assert refused.value.errno == number


def on_a_clock(body: Callable[[], Any]) -> None:
    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))


def test_what_was_healed_is_told_at_once_and_then_not_too_often_and_all_of_it() -> None:
    async def body() -> None:
        told: list[str] = []
        mirror = mirror_of()
        one = mender(FakePeers(), mirror, told)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.run)
            for _ in range(100):
                mirror.volume.healed_blocks += 1
                await trio.sleep(QUIET_S / 50)
            await trio.sleep(2 * QUIET_S)
            nursery.cancel_scope.cancel()
        assert 2 <= len(told) <= 4
        assert sum(int(text.split()[1]) for text in told) == 100

    on_a_clock(body)


def test_lost_ranges_are_told_to_the_primary_and_are_off_the_list_when_it_has_healed_them() -> None:
    async def body() -> None:
        losses = [SimpleNamespace(offset=0, length=4096), SimpleNamespace(offset=10 << 16, length=8192)]
        mirror = mirror_of("b")
        refreshed = []

        async def refresh() -> None:
            await trio.lowlevel.checkpoint()
            refreshed.append(True)
            losses.clear()

        mirror.pool.losses_of = lambda volume: list(losses)
        mirror.pool.losses = refresh
        mirror.pool.scrubber = SimpleNamespace(mended=lambda name, offset, length: None)
        peers = FakePeers(a={"done": [[0, 65536, 1, 0], [10 << 16, 65536, 2, 0]]})
        peers.node = "b"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mender(peers, mirror).run)
            await trio.sleep(30)
            nursery.cancel_scope.cancel()
        assert [(node, method) for node, method, _ in peers.asked] == [("a", "leg.damaged")]
        assert peers.asked[0][2]["ranges"] == [[0, 65536], [10 << 16, 65536]]
        assert refreshed == [True]

    on_a_clock(body)


def test_a_node_that_becomes_primary_finds_out_at_once_that_what_its_leg_has_lost_can_be_read_nowhere() -> None:
    async def body() -> None:
        mirror = mirror_of("b")
        mirror.pool.losses_of = lambda volume: [SimpleNamespace(offset=4096, length=4096)]
        peers = FakePeers(a={"done": [[0, 65536, 0, 1]]})
        peers.node = "b"
        asked: list[tuple[str, int, int]] = []

        class Healing:
            unmendable: ClassVar[dict[int, None]] = {}

            async def mend(self, leg_id: str, offset: int, length: int) -> Outcome:
                await trio.lowlevel.checkpoint()
                asked.append((leg_id, offset, length))
                self.unmendable[4096] = None
                return Outcome(0, ((4096, 4096),))

            def tell(self, leg_id: str, offset: int, blocks: int) -> None: ...

        told: list[str] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mender(peers, mirror, told).run)
            await trio.sleep(60)
            assert len(peers.asked) == 1 and not asked
            mirror.membership = replace(mirror.membership, term=Term(9, "9" * 16), primary="b")
            mirror.mirror, mirror.serves = served_by_a({}), True
            mirror.mirror.healing = Healing()
            await trio.sleep(3)
            nursery.cancel_scope.cancel()
        assert asked == [("b", 0, 65536)] and len(peers.asked) == 1
        assert told == [
            "damage: no leg of p/vol can read bytes 4096-8191: restore them from a backup, or write them anew"
        ]

    on_a_clock(body)


def test_a_list_of_losses_that_cannot_be_written_down_ends_no_healing() -> None:
    async def body() -> None:
        mirror = mirror_of("b")
        mirror.pool.losses_of = lambda volume: [SimpleNamespace(offset=0, length=4096)]
        mirror.pool.scrubber = SimpleNamespace(mended=lambda name, offset, length: None)

        async def full() -> None:
            raise OSError(errno.ENOSPC, "no space is left where the pool's catalog is")

        mirror.pool.losses = full
        peers = FakePeers(a={"done": [[0, 65536, 1, 0]]})
        peers.node = "b"
        one = mender(peers, mirror)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.run)
            await trio.sleep(30)
            one.damaged(0, 4096)
            await trio.sleep(30)
            nursery.cancel_scope.cancel()
        assert len(peers.asked) >= 2 and one.damage.extents == 0

    on_a_clock(body)


def served_by_a(unmendable: dict[int, None], *, b: LegState = LegState.UP_TO_DATE) -> Any:
    """The mirror as node a serves it."""
    record = first_record("ab")
    states = {"a": LegState.UP_TO_DATE, "b": b}
    legs = tuple(
        LegStatus(info, states[info.id], 5.0, info.id == "a", 0, None, None, None, LegCounters())
        for info in record.legs
    )
    status = MirrorStatus(record, MirrorState.ONLINE, legs, None, None, 0, 0, 0, None, 0.0, 0.0, len(unmendable))
    return SimpleNamespace(
        status=lambda: status, healing=SimpleNamespace(unmendable=unmendable), size_bytes=record.size_bytes
    )


def test_the_event_of_what_no_leg_can_read_names_the_node_first_that_may_have_it() -> None:
    async def body() -> None:
        for b, calls, step in (
            (LegState.OFFLINE, None, "start node b, whose leg may have them; else restore them"),
            (LegState.STALE, object(), "bring the leg on node b up to date again, which may have them; else restore"),
            (LegState.SYNCING, object(), "wait for the resync of the leg on node b, which may have them; else restore"),
            (LegState.UP_TO_DATE, object(), "restore them from a backup, or write them anew"),
        ):
            told: list[str] = []
            peers = FakePeers()
            peers.peers = {"b": SimpleNamespace(calls=calls)}
            mirror = mirror_of(serves=True, mirror=served_by_a({4096: None}, b=b))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mender(peers, mirror, told).run)
                await trio.sleep(1)
                nursery.cancel_scope.cancel()
            assert len(told) == 1 and "can read bytes 4096-8191: " + step in told[0], told

    on_a_clock(body)


def test_that_blocks_can_be_read_again_is_an_event_and_of_those_of_another_term_or_cut_off_nothing_is_said() -> None:
    async def body() -> None:
        told: list[str] = []
        unmendable: dict[int, None] = {0: None, 4096: None, 1 << 30: None}
        mirror = mirror_of(serves=True, mirror=served_by_a(unmendable))
        mirror.mirror.size_bytes = 1 << 20
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mender(FakePeers(), mirror, told).run)
            await trio.sleep(1)
            del unmendable[4096], unmendable[1 << 30]
            await trio.sleep(1)
            assert told[1:] == ["damage: bytes 4096-8191 of p/vol can be read again"]
            mirror.mirror = served_by_a({})
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
        assert len(told) == 2

    on_a_clock(body)


def test_ranges_are_joined_and_only_the_first_are_named() -> None:
    assert ranges_in_words([0, 4096, 12288]) == "bytes 0-8191, 12288-16383"
    assert ranges_in_words(range(0, 8192 * 8, 8192)).endswith("32768-36863 and 3 more ranges")
