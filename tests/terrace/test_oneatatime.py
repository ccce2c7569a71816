"""Two commands about one mirror at the same time leave what one after the other would."""

from __future__ import annotations

import errno
import re
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from replication.leg import LegState
from replication.membership import LegInfo, Membership, Options
from terrace.mirroradmin import MirrorAdmin, Place
from terrace.sameexports import SameExports
from tests.replication.stores import first_record
from tests.terrace.test_mirroradmin import InMemory
from tiers import TierError


class Served:
    """A mirror whose records take a second to count; as in the real one the last one that is wanted is written."""

    def __init__(self, record: Membership) -> None:
        self.membership = record
        self.records = SimpleNamespace(attempts=[])
        self.ended = trio.Event()
        self._wanted: dict[str, Any] = {}
        self.given_up: Membership | None = None
        """The record of a resize that was given up, and counts when it is waited for."""

    @property
    def size_bytes(self) -> int:
        return self.membership.size_bytes

    async def reconfigure(self, **changes: Any) -> None:
        self._wanted |= changes
        while not all(getattr(self.membership, name) == value for name, value in changes.items()):
            await trio.sleep(1)
            self.membership = self.membership.next_epoch(**self._wanted)

    async def size_decided(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.given_up is not None:
            self.membership, self.given_up = self.given_up, None

    async def resize(self, size_bytes: int) -> None:
        await self.reconfigure(size_bytes=size_bytes)

    def status(self) -> Any:
        legs = [SimpleNamespace(info=leg, state=LegState.UP_TO_DATE) for leg in self.membership.legs]
        return SimpleNamespace(legs=legs)


class Part:
    """What an operation asks of a mirror."""

    pool_name, policy_name, me = "fast", "", "a"

    def __init__(self, name: str, record: Membership) -> None:
        self.name = name
        self.short_name = name.partition("/")[2]
        self.served = self.mirror = Served(record)
        self.stood_for = SimpleNamespace(open_count=1, name=name)

    @property
    def membership(self) -> Membership:
        return self.served.membership

    accepted = membership

    @property
    def size_bytes(self) -> int:
        return self.membership.size_bytes


class Admin(MirrorAdmin):
    """On node a. Legs are made and deleted elsewhere, and each takes a moment."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.deleted: list[str] = []
        self.parts: dict[str, Part] = {}

        async def call(node: str, method: str, params: dict[str, Any], timeout_s: float = 0.0) -> Any:
            await trio.sleep(0.1)
            if method == "leg.create":
                self.made.append(node)
            elif method == "leg.delete":
                self.deleted.append(node)
            return {"export": "fast/vol"}

        mirrors: Any = SimpleNamespace(
            node="a",
            removed=InMemory(),
            peers=SimpleNamespace(call=call, peer=lambda name: None, peers={}),
            tell=lambda kind, subject, text: None,
            all=lambda: list(self.parts.values()),
            of=lambda volume: self.parts.get(volume.name),
            require_growth=lambda leg, size_bytes: None,
        )
        super().__init__(mirrors, lambda name: [], SimpleNamespace())  # type: ignore[arg-type]
        self._exports = SameExports(lambda host: [host])  # no resolver: that it takes long isn't what is tried here

    def part(self, name: str = "fast/vol", legs: str = "ab") -> Any:
        self.parts[name] = Part(name, first_record(legs))
        return self.parts[name]

    async def served(self, mirror: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return mirror.served

    async def _probe(self, *about: Any) -> None:
        await trio.sleep(0.1)

    async def _begin(self, pool: Any, volume: Any, options: Options) -> Any:
        await trio.sleep(0.1)
        assert volume.name not in self.parts, "it has a record already"
        return self.part(volume.name, "a")


def both(what: Callable[[Admin], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(60):
            await what(Admin())

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def at_once(*operations: Callable[[], Awaitable[Any]]) -> list[OSError | None]:
    """What became of each."""
    ends: list[OSError | None] = [None] * len(operations)

    async def one(index: int) -> None:
        try:
            await operations[index]()
        except OSError as error:
            ends[index] = error

    async with trio.open_nursery() as nursery:
        for index in range(len(operations)):
            nursery.start_soon(one, index)
    return ends


def places(record: Membership) -> list[str]:
    return sorted(leg.place for leg in record.legs)


@pytest.mark.parametrize("place", ["c", "nbd://nas/db"])
def test_one_place_that_is_added_twice_is_one_leg(place: str) -> None:
    async def what(admin: Admin) -> None:
        part = admin.part()
        again = "nbd://nas:10809/db" if "nas" in place else place
        assert await at_once(*(lambda one=one: admin.extend(part, Place(one)) for one in (place, again))) == [None] * 2
        assert len(part.membership.legs) == 3 and len(admin.made) == (place == "c") and not admin.deleted

    both(what)


def test_two_places_are_both_added_and_what_is_removed_meanwhile_is_gone() -> None:
    async def what(admin: Admin) -> None:
        part = admin.part()
        ends = await at_once(
            lambda: admin.extend(part, Place("c")),
            lambda: admin.remove(part, "b", force=True),
            lambda: admin.add_voter(part, "t"),
            lambda: admin.extend(part, Place("d")),
        )
        assert ends == [None] * 4
        assert places(part.membership) == ["a", "c", "d"] and admin.deleted == ["b"]
        assert sorted(part.membership.voters) == ["a", "c", "d", "t"]

    both(what)


def test_two_legs_that_are_removed_are_both_gone() -> None:
    async def what(admin: Admin) -> None:
        part = admin.part(legs="abcd")
        await at_once(*(lambda node=node: admin.remove(part, node, force=True) for node in "bc"))
        assert places(part.membership) == ["a", "d"] and sorted(admin.deleted) == ["b", "c"]

    both(what)


def test_a_volume_to_which_two_legs_are_added_becomes_one_mirror() -> None:
    async def what(admin: Admin) -> None:
        volume: Any = SimpleNamespace(
            name="fast/vol", short_name="vol", size_bytes=1 << 20, filling=False, open_count=0
        )
        pool: Any = SimpleNamespace(name="fast", snapshots=lambda name: [])
        ends = await at_once(*(lambda node=node: admin.add(pool, volume, Place(node), Options()) for node in "bc"))
        assert ends == [None, None]
        assert places(admin.parts["fast/vol"].membership) == ["a", "b", "c"]

    both(what)


def test_an_export_that_is_added_to_two_mirrors_becomes_a_leg_of_one_and_the_other_one_is_named() -> None:
    async def what(admin: Admin) -> None:
        one, other = admin.part("fast/one"), admin.part("fast/other")
        ends = await at_once(
            lambda: admin.extend(one, Place("nbd://nas/db")), lambda: admin.extend(other, Place("nbd://nas:10809/db"))
        )
        (refused,) = [end for end in ends if end is not None]
        assert isinstance(refused, TierError) and refused.errno == errno.EBUSY
        winner, loser = ("one", "other") if ends[1] is refused else ("other", "one")
        # How long a name's lookup takes, in a thread, decides how far the other one is by then.
        assert re.search(f"is (just being made )?a leg of fast/{winner}", str(refused))
        assert len(admin.parts[f"fast/{loser}"].membership.legs) == 2
        assert len(admin.parts[f"fast/{winner}"].membership.legs) == 3
        await admin.remove(admin.parts[f"fast/{winner}"], "nbd://nas/db", force=True)  # type: ignore[arg-type]
        await admin.extend(admin.parts[f"fast/{loser}"], Place("nbd://nas/db"))  # type: ignore[arg-type]

    both(what)


def test_an_export_that_a_mirror_may_have_by_a_record_in_doubt_is_left_to_it() -> None:
    async def what(admin: Admin) -> None:
        one, other = admin.part("fast/one"), admin.part("fast/other")
        tried = one.membership.next_epoch(legs=(*one.membership.legs, LegInfo("n", "a", "nbd://nas/db", "nbd")))
        one.served.records.attempts.append(tried)
        with pytest.raises(OSError, match="nbd://nas:10809/db is a leg of fast/one") as refused:
            await admin.extend(other, Place("nbd://nas:10809/db"))
        assert refused.value.errno == errno.EBUSY and len(other.membership.legs) == 2

    both(what)


def test_an_export_is_a_leg_once_however_its_host_is_written() -> None:
    async def what(admin: Admin) -> None:
        one, other = admin.part("fast/one"), admin.part("fast/other")
        ends = await at_once(
            lambda: admin.extend(one, Place("nbd://127.0.0.1/db")),
            lambda: admin.extend(other, Place("nbd://localhost/db")),
        )
        (refused,) = [end for end in ends if end is not None]
        part, left = (other, one) if ends[1] is refused else (one, other)
        assert refused.errno == errno.EBUSY and re.search(f"is (just being made )?a leg of {left.name}", str(refused))
        again = "nbd://[::ffff:127.0.0.1]:10809/db"
        with pytest.raises(OSError, match=f"is a leg of {left.name}, as nbd://") as taken:
            await admin.extend(part, Place(again))
        assert taken.value.errno == errno.EBUSY and len(part.membership.legs) == 2
        with pytest.raises(OSError, match=f"is the export nbd://.*, which is a leg of {left.name} already"):
            await admin.extend(left, Place(again))
        assert len(left.membership.legs) == 3
        with pytest.raises(OSError, match=r"nbd://LOCALHOST/x is the export nbd://127\.0\.0\.1/x: one leg"):
            await admin._judge_places([Place("nbd://127.0.0.1/x"), Place("nbd://LOCALHOST/x")])

    both(what)


def test_what_was_to_grow_a_mirror_does_not_shrink_it_after_another_one_has_grown_it_more() -> None:
    async def what(admin: Admin) -> None:
        part = admin.part()
        size = part.size_bytes
        ends = await at_once(lambda: admin.resize(part, 3 * size), lambda: admin.resize(part, 2 * size))
        assert part.size_bytes in (2 * size, 3 * size)
        (refused,) = [end for end in ends if end is not None]
        assert refused.errno == errno.EBUSY and f"another size meanwhile, {part.size_bytes} bytes" in str(refused)
        assert await at_once(*(lambda: admin.resize(part, 4 * size) for _ in range(2))) == [None, None]

    both(what)


def test_what_was_to_grow_a_mirror_does_not_shrink_it_after_a_growth_that_was_given_up_has_come_to_count() -> None:
    async def what(admin: Admin) -> None:
        part = admin.part()
        size = part.size_bytes
        part.served.given_up = part.membership.next_epoch(size_bytes=4 * size)
        with pytest.raises(OSError, match=f"another size meanwhile, {4 * size} bytes") as refused:
            await admin.resize(part, 2 * size)
        assert refused.value.errno == errno.EBUSY and part.size_bytes == 4 * size

    both(what)


def test_other_mirrors_are_not_held_up_and_nothing_is_left_of_who_waited() -> None:
    async def what(admin: Admin) -> None:
        one, other = admin.part("fast/one"), admin.part("fast/other")
        async with trio.open_nursery() as nursery:
            for node in "cd":
                nursery.start_soon(admin.extend, one, Place(node))
            await trio.sleep(0.5)
            with trio.fail_after(2):
                await admin.extend(other, Place("c"))
            nursery.cancel_scope.cancel()
        assert not admin._one_at_a_time._locks and not admin._one_at_a_time._claimed

    both(what)
