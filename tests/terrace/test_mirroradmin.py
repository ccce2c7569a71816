"""What an operation leaves behind when it fails in the middle."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from replication.leg import LegState
from replication.members import Member
from replication.membership import LegInfo, Membership, Options, Term, decode
from replication.verify import VerifyReport
from terrace.diskless import DisklessMirror
from terrace.mirroradmin import MirrorAdmin, Place, _found_by_verify, _last_record
from terrace.removedlegs import Removed, RemovedLegs
from tests.replication.stores import first_record
from tiers import TierError


class InMemory(RemovedLegs):
    """Without a file."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"))
        self.removed: list[Removed] = []

    async def _read(self) -> list[Removed]:
        await trio.lowlevel.checkpoint()
        return self.removed

    async def _write(self, removed: list[Removed]) -> None:
        await trio.lowlevel.checkpoint()
        self.removed = removed


class Served:
    """A mirror whose next record fails as it is told to."""

    def __init__(self, ends: Callable[[Served, Membership], Awaitable[None]]) -> None:
        self.membership = first_record("a")
        self.records = SimpleNamespace(attempts=[])
        self.ended = trio.Event()
        self.stirred = trio.Event()
        self._ends = ends

    async def changed(self) -> None:
        await self.stirred.wait()

    async def reconfigure(self, **changes: Any) -> None:
        await self._ends(self, self.membership.next_epoch(**changes))


class Admin(MirrorAdmin):
    """On node a; what it asks of node b is remembered."""

    def __init__(self, served: Served) -> None:
        self.asked: list[str] = []
        self.told: list[str] = []

        async def call(node: str, method: str, params: dict[str, Any], timeout_s: float = 0.0) -> Any:
            await trio.lowlevel.checkpoint()
            self.asked.append(method)
            return {"export": "fast/vol"}

        mirrors: Any = SimpleNamespace(
            removed=InMemory(),
            node="a",
            peers=SimpleNamespace(call=call),
            tell=lambda kind, subject, text: self.told.append(text),
        )
        super().__init__(mirrors, lambda name: [], cast("Any", None))
        self._served: Any = served

    async def served(self, mirror: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return self._served

    async def add_leg(self) -> None:
        mirror: Any = SimpleNamespace(
            name="fast/vol", short_name="vol", pool_name="fast", size_bytes=1 << 20, policy_name=""
        )
        await self._add_legs(mirror, [Place("b")])


def run(ends: Callable[[Served, Membership], Awaitable[None]], check: Callable[[Admin], Awaitable[None]]) -> None:
    async def main() -> None:
        await check(Admin(Served(ends)))

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def names(record: Membership) -> list[LegInfo]:
    return [leg for leg in record.legs if leg.node == "b"]


def test_a_leg_that_no_record_can_have_is_deleted_when_it_cannot_be_added() -> None:
    async def ends(served: Served, record: Membership) -> None:
        raise OSError(errno.ESTALE, "it was demoted")

    async def check(admin: Admin) -> None:
        with pytest.raises(OSError, match="it was demoted"):
            await admin.add_leg()
        assert admin.asked == ["leg.create", "leg.delete"]

    run(ends, check)


@pytest.mark.parametrize("is_over", [True, False])
def test_a_leg_that_a_record_in_doubt_may_have_is_left_and_that_is_said(is_over: bool) -> None:
    async def ends(served: Served, record: Membership) -> None:
        served.records.attempts.append(record)
        if is_over:
            served.ended.set()
        raise OSError(errno.ESTALE, "it was deposed")

    async def check(admin: Admin) -> None:
        with pytest.raises(
            OSError, match=r"it was deposed; whether fast/vol has a leg on b now is not known"
        ) as refused:
            await admin.add_leg()
        assert "delete fast/vol on b with `terrace volume delete --force`" in str(refused.value)
        assert admin.asked == ["leg.create"] and "nothing was deleted" in admin.told[0]

    run(ends, check)


def test_it_is_found_out_whether_a_record_in_doubt_counts() -> None:
    for counts in (True, False):

        async def ends(served: Served, record: Membership, counts: bool = counts) -> None:
            served.records.attempts.append(record)

            async def decided() -> None:
                await trio.sleep(1)
                served.records.attempts.clear()
                served.membership = record if counts else served.membership.next_epoch().next_epoch()
                served.stirred.set()

            trio.lowlevel.spawn_system_task(decided)
            raise OSError(errno.ETIMEDOUT, "no majority has answered")

        async def check(admin: Admin, counts: bool = counts) -> None:
            if counts:
                await admin.add_leg()
            else:
                with pytest.raises(OSError, match="no majority"):
                    await admin.add_leg()
            assert admin.asked == ["leg.create", *([] if counts else ["leg.delete"])]

        run(ends, check)


def test_whoever_gives_up_in_the_midst_of_it_leaves_what_counts() -> None:
    async def ends(served: Served, record: Membership) -> None:
        served.membership = record
        await trio.sleep_forever()

    async def check(admin: Admin) -> None:
        with trio.move_on_after(1) as scope:
            await admin.add_leg()
        assert scope.cancelled_caught and admin.asked == ["leg.create"]

    run(ends, check)


@pytest.mark.parametrize("uri", ["nbd://nas/db", "nbd://nas:10809/db", "nbd://nas/%64b"])
def test_an_export_is_no_second_leg_under_any_uri_since_two_connections_would_write_it_in_two_orders(uri: str) -> None:
    async def refused(served: Served, record: Membership) -> None:
        raise AssertionError("a second leg was added")

    async def check(admin: Admin) -> None:
        record = first_record("a")
        record = replace(record, legs=(*record.legs, LegInfo("n", "a", "nbd://nas/db", "nbd")))
        mirror: Any = SimpleNamespace(name="fast/vol", membership=record)

        async def probe(*about: Any) -> None:
            await trio.lowlevel.checkpoint()

        admin._probe = probe  # type: ignore[method-assign, assignment]
        await admin.extend(mirror, Place(uri))
        assert admin.told == []

    run(refused, check)


@pytest.mark.parametrize("force", [True, False])
def test_the_only_good_leg_is_not_removed_since_no_record_could_be_without_it(force: bool) -> None:
    async def main() -> None:
        served = Served(cast("Any", None))
        served.membership = first_record("ab")
        legs = [
            SimpleNamespace(info=leg, state=LegState.UP_TO_DATE if leg.node == "b" else LegState.SYNCING)
            for leg in served.membership.legs
        ]
        cast("Any", served).status = lambda: SimpleNamespace(legs=legs)
        mirror: Any = SimpleNamespace(name="fast/vol")
        with trio.fail_after(1), pytest.raises(OSError, match=r"has the only leg .* `terrace volume mirror promote"):
            await Admin(served).remove(mirror, "b", force=force)

    trio.run(main)


@pytest.mark.parametrize(("serves", "legs"), [(True, "ab"), (False, "ab"), (False, "a")])
def test_who_only_believes_that_it_is_primary_has_nobody_forget_the_mirror_when_it_deletes_its_leg(
    serves: bool, legs: str
) -> None:
    """Its record may be old: another node may have been promoted since, and serve it by what the arbiter has."""

    async def main() -> None:
        record = first_record(legs, options=Options(arbiter="etcd"))
        admin = Admin(Served(cast("Any", None)))
        admin._served.membership = record
        done: list[str] = []

        def does(what: str, answer: Any = None) -> Any:
            async def call(*args: Any, **options: Any) -> Any:
                await trio.lowlevel.checkpoint()
                done.append(what)
                return answer

            return call

        mirrors = cast("Any", admin.mirrors)
        mirrors.own_voter = SimpleNamespace(retire=does("retire"), forget=does("forget"))
        mirrors.delete_local = does("delete")
        mirrors.forget_at_arbiter = does("forget at etcd", [])
        mirror: Any = SimpleNamespace(
            name="fast/vol", me="a", serves=serves, membership=record, mirror=admin._served if serves else None,
            volume=SimpleNamespace(snapshots=[], open_count=0),
        )  # fmt: skip
        await admin.delete(mirror, snapshots=False, force=not serves)
        others = ["leg.delete"] if serves else []
        assert admin.asked == others
        whole = serves or legs == "a"
        assert done == (["delete", "forget", "forget at etcd"] if whole else ["retire", "delete"])

    trio.run(main)


def test_legs_are_deleted_by_the_last_record_that_was_written_whether_it_counts_or_not() -> None:
    served = Served(cast("Any", None))
    tried = served.membership.next_epoch()
    served.records.attempts.append(tried)
    assert _last_record(cast("Any", served)) == tried
    served.membership = tried.next_epoch()
    assert _last_record(cast("Any", served)) == served.membership


def test_a_primary_without_a_leg_is_never_ended_by_a_discard_that_it_could_not_carry_out() -> None:
    class WithoutLeg(DisklessMirror):
        name = "p/v"  # type: ignore[assignment]
        membership = first_record("ab", primary="c")  # type: ignore[assignment]

        def __init__(self) -> None:
            pass

        async def begin_anew(self) -> None:
            pytest.fail("its clients are cut off")

    class OtherVoter:
        async def state(self, mirror: str) -> Any:
            await trio.lowlevel.checkpoint()
            return SimpleNamespace(promised=Term(1, "f" * 16), accepted=None)

    async def main() -> None:
        admin = Admin(Served(cast("Any", None)))
        cast("Any", admin.mirrors).voter = lambda node: OtherVoter()
        with pytest.raises(OSError, match="a node with a leg has to decide that") as refused:
            await admin._discard(WithoutLeg(), LegInfo("b", "b", "fast/vol"))
        assert refused.value.errno == errno.ENOTSUP and admin.asked == []

    trio.run(main)


def test_a_volume_with_a_snapshot_that_a_resync_would_delete_becomes_no_mirror() -> None:
    async def main() -> None:
        async def never(served: Served, record: Membership) -> None:
            raise AssertionError(record)

        admin = Admin(Served(never))
        volume: Any = SimpleNamespace(name="fast/vol", short_name="vol", filling=False, size_bytes=1 << 20)
        mine = SimpleNamespace(name="fast/vol@resync-20261130-120000", short_name="resync-20261130-120000")
        pool: Any = SimpleNamespace(name="fast", snapshots=lambda name: [mine])
        with pytest.raises(TierError, match="vol@resync-20261130-120000 has a name that resyncs of mirrors give"):
            await admin._add_first(pool, volume, Place("b"), Options())

    trio.run(main)


class Silent:
    """An etcd that doesn't answer."""

    async def require(self) -> None:
        await trio.lowlevel.checkpoint()
        raise OSError(errno.ETIMEDOUT, "etcd has not answered within 2 s (silent)")


@pytest.mark.parametrize("what", ["promote", "demote", "remove"])
def test_what_can_not_be_done_without_etcd_names_the_volume_and_says_that_nothing_has_changed(what: str) -> None:
    async def main() -> None:
        served = Served(cast("Any", None))
        served.membership = first_record("ab", options=Options(arbiter="etcd"))
        admin = Admin(served)
        cast("Any", admin.mirrors).arbiter = Silent()
        mirror: Any = SimpleNamespace(
            name="p/dm", membership=served.membership, accepted=served.membership, serves=what != "promote"
        )
        said = (
            r"^p/dm can't be \w+ without its arbiter: etcd has not answered within 2 s .*\. Nothing has changed: see to"
        )
        with pytest.raises(TierError) as refused:
            if what == "promote":
                await admin.promote(mirror, force=False)
            elif what == "demote":
                await admin.demote(mirror, to=None, force=False)
            else:
                await admin.remove(mirror, "b", force=False)
        assert re.search(said, str(refused.value.strerror)) and refused.value.errno == errno.ETIMEDOUT
        assert admin.asked == [] and admin.told == []

    trio.run(main)


def test_a_node_that_can_have_no_leg_is_not_removed_and_the_legs_are_named() -> None:
    async def main() -> None:
        served = Served(cast("Any", None))
        served.membership = first_record("ab")
        admin = Admin(served)
        cast("Any", admin.mirrors.peers).peers = {"c": None}
        mirror: Any = SimpleNamespace(name="p/dm")
        with pytest.raises(TierError, match=r"p/dm has no leg on zz, .*: it has legs on a, b$") as refused:
            await admin.remove(mirror, "zz", force=False)
        assert refused.value.errno == errno.ENOENT
        done = await admin.remove(mirror, "c", force=False)
        assert done == {"removed": [], "left": [], "mirrored": True, "voter": False}, "it may have been done before"
        assert admin.asked == ["leg.delete", "mirror.forget"], "or broken off"
        for answer, result in (
            ({"deleted": "p/dm"}, {"removed": ["p/dm"]}),
            (OSError(errno.EINVAL, "leg is missing"), {}),
            (OSError(errno.ENOTCONN, "away"), {"left": ["what node c may have of a leg of p/dm, which is none any more "
                                                        "(away): `terrace volume mirror list` on that node names it, "
                                                        "with the command that deletes it"]}),
        ):  # fmt: skip

            async def call(node: str, method: str, params: Any, timeout_s: float, said: Any = answer) -> Any:
                await trio.lowlevel.checkpoint()
                if isinstance(said, OSError):
                    raise said
                return said

            cast("Any", admin.mirrors.peers).call = call
            assert (await admin.remove(mirror, "c", force=False)).items() >= result.items()

    trio.run(main)


def test_a_removal_that_is_asked_for_again_after_the_last_one_says_that_the_volume_is_not_mirrored() -> None:
    async def main() -> None:
        admin = Admin(Served(cast("Any", None)))
        cast("Any", admin.mirrors.peers).peers = {"b": None}
        volume: Any = SimpleNamespace(name="p/dm", family=7)
        pool: Any = SimpleNamespace(uuid="u")
        for node in ("a", "b", "nbd://nas/export"):
            done = await admin.nothing_to_remove(pool, volume, node)
            assert done == {"removed": [], "left": [], "mirrored": False, "voter": False} and admin.asked == []
        with pytest.raises(TierError, match="p/dm is not mirrored, and zz is no node that this one knows") as found:
            await admin.nothing_to_remove(pool, volume, "zz")
        assert found.value.errno == errno.ENOENT

    trio.run(main)


def test_what_a_node_kept_of_a_mirror_that_has_ended_goes_at_the_repetition_for_that_very_volume_only() -> None:
    async def main() -> None:
        admin = Admin(Served(cast("Any", None)))
        asked: list[tuple[str, str, dict[str, Any]]] = []
        is_away = True

        async def call(node: str, method: str, params: dict[str, Any], timeout_s: float = 0.0) -> Any:
            await trio.lowlevel.checkpoint()
            if is_away:
                raise OSError(errno.ENOTCONN, "away")
            asked.append((node, method, params))
            return {"deleted": "p/dm", "forgotten": True} if node == "b" else {"deleted": None, "forgotten": True}

        peers = cast("Any", admin.mirrors.peers)
        peers.peers, peers.call = {"b": None, "c": None}, call
        record = first_record("a")
        await admin.mirrors.removed.add("u/7", record, {"b": "p/dm"})
        last = record.next_epoch()
        await admin.mirrors.removed.add("u/7", last, {"c": ""})
        pool: Any = SimpleNamespace(uuid="u")
        same_name: Any = SimpleNamespace(name="p/dm", family=8)
        volume: Any = SimpleNamespace(name="p/dm", family=7)
        nothing = {"removed": [], "left": [], "mirrored": False, "voter": False}
        assert await admin.nothing_to_remove(pool, same_name, "b") == nothing
        left = ["p/dm on node b is still there (away); on that node: terrace volume delete p/dm --force --snapshots"]
        for _ in range(2):
            assert await admin.nothing_to_remove(pool, volume, "b") == nothing | {"left": left}
        is_away = False
        assert await admin.nothing_to_remove(pool, volume, "b") == nothing | {"removed": ["p/dm"]}
        assert await admin.nothing_to_remove(pool, volume, "c") == nothing | {"voter": True}
        assert [(node, method) for node, method, _ in asked] == [
            (node, method) for node in "bc" for method in ("leg.delete", "mirror.forget")
        ]
        for _, _, params in asked:
            assert decode(json.dumps(params["membership"]).encode()) == last, "the newest, which all obey"
        assert asked[0][2]["leg"] == "" and asked[0][2]["whole"] is False, "no leg that the record has"
        assert await admin.nothing_to_remove(pool, volume, "b") == nothing and len(asked) == 4

    trio.run(main)


def test_who_is_not_the_primary_asks_no_other_node_whether_it_could_be() -> None:
    """What that one says then is of no use here: it may name a command that can't help either."""

    async def main() -> None:
        admin = Admin(Served(cast("Any", None)))
        record = replace(first_record("abc"), primary="c", legs=first_record("ab").legs)
        mirror: Any = SimpleNamespace(name="p/dm", membership=record, serves=False, starting=False)
        with pytest.raises(TierError, match="node c is the primary of p/dm: run this there"):
            await admin.demote(mirror, to="d", force=False)
        assert admin.asked == []

    trio.run(main)


def test_a_voter_that_is_removed_is_told_as_one() -> None:
    async def counts(served: Served, record: Membership) -> None:
        await trio.lowlevel.checkpoint()
        served.membership = record

    async def check(admin: Admin) -> None:
        admin._served.membership = replace(first_record("ab"), voters=("a", "b", "t"))
        mirror: Any = SimpleNamespace(name="p/dm")
        assert (await admin.remove(mirror, "t", force=False))["voter"]
        assert admin._served.membership.voters == ("a", "b") and admin.asked == ["mirror.forget"]

    run(counts, check)


@pytest.mark.parametrize("uri", ["nbd://nas/db", "nbd://nas:10809/db", "nbd://nas/%64b"])
def test_a_leg_on_an_nbd_server_is_removed_and_resynced_by_any_uri_of_its_export(uri: str) -> None:
    async def main() -> None:
        record = first_record("a")
        leg = LegInfo("n", "a", "nbd://nas/db", "nbd")
        served = Served(cast("Any", None))
        served.membership = replace(record, legs=(*record.legs, leg))
        failed: list[Any] = []
        why = OSError(errno.EIO, "1 block(s) can be read on no leg")
        member = SimpleNamespace(leg=object(), state=LegState.STALE, error=why, kept_out=why, is_proof=False)
        more = cast("Any", served)
        more.change = lambda: None
        more.members, more.leg_failed = {"n": member}, lambda leg, error: failed.append(leg)
        mirror: Any = SimpleNamespace(name="p/dm", me="a", compared_in_full=set())
        await Admin(served).resync(mirror, uri, discard=False, full=True)
        assert mirror.compared_in_full == {"n"} and failed == [member.leg]
        assert member.kept_out is member.error is None, "it is tried at once, and what was said before is over"
        more.status = lambda: SimpleNamespace(legs=[])
        with pytest.raises(TierError, match="has the only leg"):  # so it was found
            await Admin(served).remove(mirror, uri, force=True)

    trio.run(main)


def test_a_uri_that_was_mistyped_is_not_told_as_removed_and_the_legs_are_named() -> None:
    async def main() -> None:
        record = first_record("a")
        served = Served(cast("Any", None))
        served.membership = replace(record, legs=(*record.legs, LegInfo("n", "a", "nbd://nas/db", "nbd")))
        mirror: Any = SimpleNamespace(name="p/dm")
        said = r"^p/dm has no leg nbd://nas/bd, nothing was removed: it has legs on a, nbd://nas/db$"
        with pytest.raises(TierError, match=said) as refused:
            await Admin(served).remove(mirror, "nbd://nas/bd", force=False)
        assert refused.value.errno == errno.ENOENT
        served.membership = record
        done = await Admin(served).remove(mirror, "nbd://nas/db", force=False)
        assert done["removed"] == [], "there is no other one that could have been meant: it was removed before"

    trio.run(main)


def test_the_only_leg_in_sync_is_not_left_out_to_be_compared_in_full() -> None:
    async def main() -> None:
        served = Served(cast("Any", None))
        served.membership = first_record("ab")
        members = {leg.id: Member(leg, 0.0) for leg in served.membership.legs}
        failed: list[Any] = []
        more = cast("Any", served)
        more.members, more.leg_failed = members, lambda leg, error: failed.append(leg)
        own, other = (members[leg.id] for leg in served.membership.legs)
        own.state, other.state = LegState.SYNCING, LegState.UP_TO_DATE
        own.leg = other.leg = cast("Any", object())
        mirror: Any = SimpleNamespace(name="p/dm", me=own.info.id, compared_in_full=set())
        with pytest.raises(TierError, match="node b has the only leg of p/dm that is up to date") as refused:
            await Admin(served).resync(mirror, "b", discard=False, full=True)
        assert refused.value.errno == errno.EBUSY and not failed and not mirror.compared_in_full
        own.state = LegState.UP_TO_DATE
        await Admin(served).resync(mirror, "b", discard=False, full=True)
        assert failed == [other.leg] and mirror.compared_in_full == {other.info.id}

    trio.run(main)


def test_the_event_of_a_verify_says_that_legs_differ_only_where_they_do() -> None:
    assert _found_by_verify("p/dm", VerifyReport(unreadable_bytes=4096)) == (
        "not all of the legs of p/dm can be read, and nothing that can be differs: 4096 bytes can't be read, 0 of them "
        "were healed"
    )
    assert _found_by_verify("p/dm", VerifyReport(differing_bytes=4096)) == (
        "the legs of p/dm are not equal: 4096 bytes differ, 0 of them were repaired"
    )


def test_a_creation_that_was_broken_off_names_the_commands_that_add_the_legs_that_it_lacks() -> None:
    admin = Admin(Served(cast("Any", None)))
    volume: Any = SimpleNamespace(name="fast/vol", short_name="vol")
    mirror = SimpleNamespace(name="fast/vol", accepted=first_record("a"))
    cast("Any", admin.mirrors).of = lambda one: mirror if one is volume else None
    pool: Any = SimpleNamespace(name="fast", volumes=lambda: [volume])
    with pytest.raises(TierError) as refused:
        admin._require_not_begun(pool, "vol", [Place("b"), Place("c", "slow")])
    assert refused.value.errno == errno.EEXIST and refused.value.strerror == (
        "there is a volume fast/vol already, a mirror with a leg on a and none on b, c: if its creation was broken "
        "off, go on with `terrace volume mirror add fast/vol b` and `terrace volume mirror add fast/vol c/slow`; else "
        "choose another name, or delete it first"
    )
    mirror.accepted = first_record("ab")
    with pytest.raises(
        TierError, match=r"a leg on a, b and none on c: .* go on with `terrace volume mirror add .* c`;"
    ):
        admin._require_not_begun(pool, "vol", [Place("b"), Place("c")])
    # The pool has its own sentence for these.
    admin._require_not_begun(pool, "vol", [Place("b")])
    admin._require_not_begun(pool, "vol", [Place("c")])
    admin._require_not_begun(pool, "other", [Place("b"), Place("c")])
