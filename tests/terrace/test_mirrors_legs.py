"""Legs that come and go on a node, with what happens in between."""

from __future__ import annotations

import errno
import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from replication.keeper import LegRecord
from replication.membership import LegInfo, Membership, Options, Term, encode
from terrace.mirroradmin import MirrorAdmin, Place
from terrace.mirrors import _PRIMARYS, Mirrors, _judge_status, _leg
from terrace.mirrorwords import removed_here
from terrace.tiebreakers import said_of, shown_vote
from tests.replication.stores import first_record
from tiers import TierError


class OneVolume(SimpleNamespace):
    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


class OnePool:
    """A pool with one volume, and the pools."""

    name = "fast"
    policies: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, open_count: int = 0) -> None:
        self.volume = OneVolume(
            name="fast/vol", short_name="vol", open_count=open_count, mirror_record=b"", trackers={}, deleted=False,
            size_bytes=1 << 20, healed_blocks=0,
        )  # fmt: skip
        for method in ("write_now", "trim_now", "read_now", "lose", "read", "flush", "checks", "mapped"):
            setattr(self.volume, method, trio.lowlevel.checkpoint)

    def pool(self, name: str) -> Any:
        return self

    def open_pools(self) -> list[Any]:
        return [self]

    def using(self, name: str) -> Any:
        return nullcontext(self)

    def volumes(self) -> list[Any]:
        return []

    def open_volumes(self) -> list[Any]:
        return self.volumes()

    def snapshots(self, volume: str) -> list[Any]:
        return []

    def losses_of(self, volume: Any) -> list[Any]:
        return []

    async def create_volume(self, name: str, size_bytes: int, policy: str) -> Any:
        await trio.lowlevel.checkpoint()
        return self.volume

    async def set_mirror(self, volume: Any, record: bytes, trackers: Any = None) -> None:
        volume.mirror_record = record
        await trio.lowlevel.checkpoint()

    async def delete_volume(self, name: str, *, snapshots: bool = False, mirrored: bool = False) -> None:
        await trio.sleep_forever()


def mirrors(pool: OnePool, tmp_path: Any) -> Mirrors:
    async def call(node: str, method: str, params: dict[str, Any], timeout_s: float = 0.0) -> Any:
        await trio.lowlevel.checkpoint()
        raise OSError(errno.ENOTCONN, f"node {node} can't be reached")

    peers: Any = SimpleNamespace(node="b", peers={}, call=call)
    pools: Any = pool
    return Mirrors(pools, peers, tmp_path, lambda kind, subject, text: None)


def test_a_volume_that_a_client_has_opened_while_it_was_made_becomes_no_leg(tmp_path: Any) -> None:
    pool = OnePool(open_count=1)
    asked = {"membership": json.loads(encode(first_record("a"))), "leg": "b", "volume": "vol", "like": "fast"}
    with pytest.raises(OSError, match="has opened fast/vol") as refused:
        trio.run(mirrors(pool, tmp_path)._create_leg, "a", asked | {"size_bytes": 1 << 20})
    assert (refused.value.errno, pool.volume.mirror_record) == (errno.EBUSY, b"")


@pytest.mark.parametrize(
    ("has", "says"),
    [
        ("one that never became one", None),
        ("one of another mirror that is gone", None),
        ("one with data", "name another pool, or if that leg of a mirror is left over, on node b: "),
        ("one of another mirror", "if that leg of a mirror is left over, on node b: terrace volume delete fast/vol"),
        ("one that the mirror has", "doesn't obey: by the record that node a has sent it is a leg of the mirror"),
        ("one with snapshots", "left over, with snapshots: see whether they are wanted, then, on that node: terrace"),
        ("a volume", "node b has a volume fast/vol already: name another pool, or delete or rename that volume first"),
    ],
)
def test_what_a_leg_that_was_broken_off_in_the_making_has_left_is_made_again_and_nothing_else_is_touched(
    tmp_path: Any, has: str, says: str | None
) -> None:
    """Whose primary was killed between the volume and the record that has it as a leg."""

    async def main() -> None:
        pool, record = OnePool(), first_record("a")
        accepted = replace(first_record("a"), mirror="f" * 32) if "another mirror" in has else record
        own = LegRecord("old", promised=accepted.term, accepted=accepted, inconsistent=has != "one with data")
        pool.volume.mirror_record = b"" if has == "a volume" else own.encode()
        pool.volume.snapshots = int(has == "one with snapshots")
        is_there, told = True, []

        async def delete_volume(name: str, **how: Any) -> None:
            nonlocal is_there
            await trio.lowlevel.checkpoint()
            is_there = False

        pool.delete_volume = delete_volume  # type: ignore[method-assign]
        pool.volumes = lambda: [pool.volume] if is_there else []  # type: ignore[method-assign]
        if has == "one that the mirror has":
            record = record.next_epoch(legs=(*record.legs, LegInfo("old", "b", "fast/vol")), voters=("a", "b"))
        found = mirrors(pool, tmp_path)
        found.tell = lambda kind, subject, text: told.append(text)

        async def ask(node: str, method: str, params: dict[str, Any], timeout_s: float = 0.0) -> Any:
            await trio.lowlevel.checkpoint()
            assert (node, method, params["mirror"]) == ("a", "leg.gone", "f" * 32)
            return {"gone": has.endswith("gone")}

        cast("Any", found.peers).call = ask
        async with trio.open_nursery() as nursery:
            await nursery.start(found.run)
            asked = {"membership": json.loads(encode(record)), "leg": "new", "volume": "vol", "like": "fast"}
            call = partial(found.handlers()["leg.create"], "a", asked | {"size_bytes": 1 << 20})
            if says is None:
                assert await call() == {"export": "fast/vol"}
                assert LegRecord.decode(pool.volume.mirror_record).me == "new" and not is_there
                assert told[0] == "fast/vol was deleted: it was made as a leg, but never became one"
            else:
                with pytest.raises(OSError, match=says) as refused:
                    await call()
                assert refused.value.errno == (errno.EPERM if has == "one that the mirror has" else errno.EEXIST)
                assert is_there and told == []
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize("wait_s", [0.0, 0.01, 0.03])
def test_a_leg_whose_making_is_broken_off_leaves_no_volume(tmp_path: Any, wait_s: float) -> None:
    async def main() -> None:
        pool, there = OnePool(), set()

        async def create_volume(name: str, size_bytes: int, policy: str) -> Any:
            there.add(name)
            await trio.sleep(0.02)
            return pool.volume

        async def set_mirror(volume: Any, record: bytes, trackers: Any = None) -> None:
            await trio.sleep(0.02)
            volume.mirror_record = record

        async def delete_volume(name: str, **how: Any) -> None:
            await trio.lowlevel.checkpoint()
            there.remove(name)

        pool.create_volume, pool.set_mirror = create_volume, set_mirror  # type: ignore[method-assign]
        pool.delete_volume = delete_volume  # type: ignore[method-assign]
        asked = {"membership": json.loads(encode(first_record("a"))), "leg": "b", "volume": "vol", "like": "fast"}
        with trio.move_on_after(wait_s) as scope:
            await mirrors(pool, tmp_path)._create_leg("a", asked | {"size_bytes": 1 << 20})
        assert scope.cancelled_caught and there == set()

    trio.run(main)


def test_a_node_that_is_to_be_primary_and_has_lost_its_leg_says_that(
    tmp_path: Any,
) -> None:
    record = first_record("ab")
    asked = {"mirror": record.mirror, "volume": "fast/vol", "membership": json.loads(encode(record))}
    with pytest.raises(
        OSError, match="node b doesn't have its leg of that mirror open: `terrace pool list` there says"
    ):
        trio.run(mirrors(OnePool(), tmp_path)._promote, "a", asked)


def test_a_node_says_that_a_mirror_is_gone_only_where_its_pool_is_open_and_no_volume_may_be_a_leg_of_it(
    tmp_path: Any,
) -> None:
    """Else the last good leg would be called left over: where the other one's pool has failed, or it can't be used."""

    async def main() -> None:
        pool, record = OnePool(), first_record("ab")
        pool.volumes = lambda: [pool.volume]  # type: ignore[method-assign]
        call = mirrors(pool, tmp_path).handlers()["leg.gone"]
        asked = {"mirror": record.mirror, "pool": "fast"}
        other = LegRecord("b", accepted=replace(record, mirror="f" * 32)).encode()
        for written, is_gone in (
            (b"", True), (other, True), (LegRecord("b", accepted=record).encode(), False), (b"not understood", False),
        ):  # fmt: skip
            pool.volume.mirror_record = written
            assert await call("a", asked) == {"gone": is_gone}
        pool.volume.mirror_record = b""
        assert await call("a", asked | {"pool": "slow"}) == {"gone": False}, "it isn't open"

    trio.run(main)


@pytest.mark.parametrize(
    ("states", "says"),
    [
        ({"a": "UpToDate", "b": "UpToDate"}, None),
        ({"a": "Syncing", "b": "UpToDate"}, "fast/vol: its only leg that is up to date is here (a is in resync)"),
        ({"a": "Offline", "b": "Unproven"}, "fast/vol: no leg of it is up to date, and the one here may have all"),
        ({"a": "of a later release", "b": "UpToDate"}, "fast/vol: its only leg that is up to date is here: wait"),
        ({"a": "UpToDate", "b": "Unproven"}, None),
        ({"a": "Stale", "b": "UpToDate", "nas": "UpToDate"}, "fast/vol: its only leg that is up to date is here"),
    ],
)
def test_a_node_isnt_drained_of_the_last_leg_that_is_worth_something(states: dict[str, str], says: str | None) -> None:
    async def status(mirror: Any) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        kinds = {"nas": "nbd"}
        legs = [{"node": node, "state": states[node], "kind": kinds.get(node, "terrace")} for node in states]
        return {"legs": [leg | {"error": "full" if leg["state"] == "Stale" else None} for leg in legs]}

    here: Any = SimpleNamespace(
        node="b", status=status, all=lambda: [SimpleNamespace(name="fast/vol", is_primary=False, starting=False)]
    )

    async def main() -> None:
        plan = await MirrorAdmin(here, lambda name: [], cast("Any", None)).drain("b", to=None, dry_run=True)
        assert len(plan["refused"]) == (says is not None)
        assert says is None or plan["refused"][0].startswith(says)
        if says is not None and "Stale" in states.values():
            assert plan["refused"][0].endswith("; the leg on node a is out: full"), "waiting doesn't help"

    trio.run(main)


def test_what_a_removal_that_was_broken_off_has_left_is_deleted_where_no_leg_is_named(tmp_path: Any) -> None:
    """Its primary was killed between the record and the deletion, and knows its id no more."""

    async def main() -> None:
        pool, record, deleted = OnePool(), first_record("ab"), []

        async def delete_volume(name: str, **how: Any) -> None:
            await trio.lowlevel.checkpoint()
            pool.volume.deleted = True
            deleted.append(name)

        pool.delete_volume = delete_volume  # type: ignore[method-assign]
        pool.volume.mirror_record = LegRecord("b", promised=record.term, accepted=record).encode()
        pool.volume.snapshots = 0
        without = record.next_epoch(legs=record.legs[:1], voters=("a",), in_sync=frozenset("a"))
        found = mirrors(pool, tmp_path)
        async with trio.open_nursery() as nursery:
            await nursery.start(found.run)
            found.adopt(pool, pool.volume)  # type: ignore[arg-type]
            call = partial(found.handlers()["leg.delete"], "a")
            assert await call({"leg": "", "membership": json.loads(encode(record))}) == {"deleted": None}, "it is one"
            assert deleted == []
            assert await call({"leg": "", "membership": json.loads(encode(without))}) == {"deleted": "fast/vol"}
            assert deleted == ["vol"]
            assert await call({"leg": "", "membership": json.loads(encode(without))}) == {"deleted": None}
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize("method", ["leg.delete", "leg.discard"])
def test_who_is_not_the_primary_of_a_leg_by_a_record_as_new_as_its_own_deletes_and_discards_nothing(
    tmp_path: Any, method: str
) -> None:
    async def main() -> None:
        pool, record = OnePool(), first_record("abc")
        own = record.next_epoch(in_sync=frozenset("ac"))
        pool.volume.mirror_record = LegRecord("b", promised=own.term, accepted=own).encode()
        pool.volume.snapshots = 0
        found = mirrors(pool, tmp_path)
        async with trio.open_nursery() as nursery:
            await nursery.start(found.run)
            found.adopt(pool, pool.volume)  # type: ignore[arg-type]
            call = found.handlers()[method]
            for node, sent in (("c", own), ("a", record), ("a", own.next_epoch(primary="c"))):
                asked = {"leg": "b", "membership": json.loads(encode(sent)), "whole": True, "snapshots": True}
                with pytest.raises(OSError, match="the leg fast/vol on node b doesn't obey") as refused:
                    await call(node, asked)
                assert refused.value.errno == errno.EPERM
            for asked in ({"leg": "b"}, {"leg": "b", "membership": {"version": 1}}):
                with pytest.raises(OSError, match="record"):
                    await call("a", asked)
            assert found.by_leg("b") is not None and LegRecord.decode(pool.volume.mirror_record).accepted == own
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize("whole", [False, True])
def test_a_leg_is_deleted_by_order_of_its_primary_and_its_promise_stays_unless_the_mirror_is_gone(
    tmp_path: Any, whole: bool
) -> None:
    async def main() -> None:
        pool, record = OnePool(), first_record("abc")
        deleted: list[dict[str, Any]] = []

        async def delete_volume(name: str, **how: Any) -> None:
            await trio.lowlevel.checkpoint()
            pool.volume.deleted = True
            deleted.append(how)

        pool.delete_volume = delete_volume  # type: ignore[method-assign]
        pool.volume.mirror_record = LegRecord("b", promised=Term(7, "7" * 16), accepted=record).encode()
        pool.volume.snapshots = 2
        names = ["mine", "resync-20261130-120000"]
        pool.snapshots = lambda volume: [SimpleNamespace(short_name=name) for name in names]  # type: ignore[method-assign,attr-defined]
        found = mirrors(pool, tmp_path)
        order = record.next_term(Term(7, "7" * 16), "a", frozenset("ac"))
        if not whole:
            order = order.next_epoch(legs=(record.legs[0], record.legs[2]), voters=("a", "c"))
        async with trio.open_nursery() as nursery:
            await nursery.start(found.run)
            found.adopt(pool, pool.volume)  # type: ignore[arg-type]
            call = found.handlers()["leg.delete"]
            asked = {"leg": "b", "membership": json.loads(encode(order)), "whole": whole}
            with pytest.raises(OSError, match="fast/vol has snapshots") as refused:
                await call("a", asked)
            assert (refused.value.errno, deleted) == (errno.ENOTEMPTY, [])
            names.remove("mine")  # what a resync keeps is in nobody's way
            assert await call("a", asked) == {"deleted": "fast/vol"}
            assert deleted == [{"snapshots": True, "mirrored": True}]
            assert await call("a", asked) == {"deleted": None}
            if whole:
                assert await found.own_voter.mirrors() == frozenset()
            else:
                assert (await found.own_voter.state(record.mirror)).promised == Term(7, "7" * 16)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_tie_breaker_forgets_by_order_of_the_primary_only(tmp_path: Any) -> None:
    async def main() -> None:
        found = mirrors(OnePool(), tmp_path)
        record = first_record("ac", diskless="b")
        await found.own_voter.accept(record)
        without = record.next_epoch(voters=("a", "c"))
        call = found.handlers()["mirror.forget"]
        with pytest.raises(OSError, match="the voter on node b doesn't obey"):
            await call("c", {"membership": json.loads(encode(without))})
        await call("a", {"membership": json.loads(encode(record))})  # it is one still
        assert (await found.own_voter.state(record.mirror)).accepted == record
        await call("a", {"membership": json.loads(encode(without))})
        assert (await found.own_voter.state(record.mirror)).accepted == without
        await call("a", {"membership": json.loads(encode(without)), "whole": True})
        assert await found.own_voter.mirrors() == frozenset()
        await call("a", {"membership": json.loads(encode(without)), "whole": True})

    trio.run(main)


def test_a_leg_that_a_later_record_does_not_have_is_left_over_and_one_that_is_being_made_is_not(tmp_path: Any) -> None:
    async def main() -> None:
        pool, record = OnePool(), first_record("abc")

        async def status(
            accepted: Membership, epoch: int, legs: str, *, is_new: bool = False, boot: str | None = None
        ) -> Any:
            own = LegRecord("b", promised=record.term, accepted=accepted, inconsistent=is_new, boot=boot)
            pool.volume.mirror_record = own.encode()
            pool.volume.snapshots = 0
            found = mirrors(pool, tmp_path)
            theirs = {
                "primary": "a",
                "term": 1,
                "epoch": epoch,
                "legs": [{"id": leg, "node": leg, "healed_blocks": 0} for leg in legs],
            }
            async with trio.open_nursery() as nursery:
                await nursery.start(found.run)
                mirror = found.adopt(pool, pool.volume)  # type: ignore[arg-type]
                nursery.cancel_scope.cancel()
            assert mirror is not None
            knows = accepted.has("b") is False and (boot is not None or not is_new)
            assert found.local_status(mirror)["left_over"] is knows, "without asking"
            said = removed_here(mirror, theirs)
            asked = found._by_primary(
                found.local_status(mirror),
                mirror,
                dict.fromkeys(_PRIMARYS)
                | theirs
                | {"writes_fail": False, "unreadable_blocks": 0, "legs": theirs["legs"]},
            )
            assert asked["left_over"] is (said is not None and "left over" in said)
            assert found.local_status(mirror)["left_over"] is asked["left_over"], "as was heard last"
            return said

        said = await status(record, record.epoch + 1, "ac")
        assert said.startswith("the leg here is left over: node a has removed it from the mirror")
        assert said.endswith("`terrace volume delete fast/vol --force` deletes it here")
        assert await status(record, record.epoch + 1, "abc") is None
        assert await status(record, record.epoch, "ac") is None
        # It has the record that removed it, and its primary was killed before it said that it is to go.
        assert await status(first_record("ac"), record.epoch, "ac") == said
        being_made = await status(first_record("ac"), record.epoch, "ac", is_new=True)
        assert being_made.startswith("the leg here is none of the mirror's: it is just being made, or that was broken")
        assert await status(first_record("ac"), record.epoch, "abc", is_new=True) is None
        # Its primary was killed while it added it: by the record here it was a leg, which may never have counted.
        either = await status(record, record.epoch + 1, "ac", is_new=True)
        assert "it was being added, and that was broken off, or node a has removed it while" in either
        assert "`terrace volume mirror add` on node a makes it again" in either
        # It was in resync, which only a record that counts begins.
        for accepted, epoch in ((record, record.epoch + 1), (first_record("ac"), record.epoch)):
            assert await status(accepted, epoch, "ac", is_new=True, boot="b1") == said

    trio.run(main)


def test_a_tie_breaker_says_of_which_mirrors_it_is_one_and_where_to_ask(tmp_path: Any) -> None:
    async def main() -> None:
        pool = OnePool()
        found = mirrors(pool, tmp_path)
        missing = TierError(errno.ENOENT, "the pool p has no volume")
        record = first_record("ac", diskless="b")
        name = record.legs[0].export
        here, _, volume = name.partition("/")
        await found.tell_if_vote(here, volume, missing)  # it is none of any
        await found.own_voter.accept(record)
        assert await found.votes() == [record]
        assert shown_vote(record) == {
            "mirror": record.mirror,
            "primary": "a",
            "legs": [{"node": "a", "export": name}, {"node": "c", "export": name}],
        }
        with pytest.raises(
            OSError, match=f"node b has no leg of {name}: it is a tie-breaker .* on node a, c; .* node a "
        ):
            await found.tell_if_vote(here, volume, missing)
        second = replace(record.legs[1], export="q/w")  # each node calls it as its own leg
        other = replace(record, legs=(record.legs[0], second))
        assert said_of("b", "q/w", other).endswith(f"`terrace volume mirror show {name}` on node a tells more")
        without = replace(other, primary="d")
        assert said_of("b", "q/w", without).endswith(f"`terrace volume mirror show {name}` on node a tells more")
        await found.tell_if_vote(here, "other", missing)
        await found.tell_if_vote(here, volume, TierError(errno.EBUSY, "the pool is being opened"))
        pool.volume.name, pool.name = name, here  # a volume here that is called so
        pool.volumes = lambda: [pool.volume]  # type: ignore[method-assign]
        await found.tell_if_vote(here, volume, missing)
        gone: dict[str, Any] = {"a": {"gone": True}, "c": {"gone": False}}

        async def call(node: str, method: str, params: dict[str, Any], timeout_s: float = 0.0) -> Any:
            await trio.lowlevel.checkpoint()
            assert (method, params) == ("leg.gone", {"mirror": record.mirror, "pool": here})
            return gone[node]

        cast("Any", found.peers).call = call
        for answer, votes in (({"gone": False}, [record]), ("no", [record]), ({"gone": True}, [])):
            gone["c"] = answer
            assert await found.votes() == votes, "it was deleted while this node was away"
        gone["c"] = {"gone": False}
        await found.own_voter.retire(record.next_epoch(voters=("a", "c")))
        assert await found.votes() == []

    trio.run(main)


def test_a_leg_whose_deletion_is_cancelled_goes_on(tmp_path: Any) -> None:
    async def main() -> None:
        pool = OnePool()
        pool.volume.mirror_record = LegRecord("b", accepted=first_record("ab")).encode()
        found = mirrors(pool, tmp_path)
        async with trio.open_nursery() as nursery:
            await nursery.start(found.run)
            mirror: Any = found.adopt(pool, pool.volume)  # type: ignore[arg-type]
            for wait_s in (0.0, 0.05):  # in the midst of its end, and of the deletion
                with trio.move_on_after(wait_s):
                    await found.delete_local(mirror)
                mirror = found.by_leg("b")
                assert mirror is not None and not mirror._closing.is_set()
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize("other", ["deletes it too", "dissolves it"])
def test_of_two_that_end_a_leg_at_once_the_first_of_which_fails_nothing_is_left_of_the_mirror(
    tmp_path: Any, other: str
) -> None:
    """The first begins it again, and the second must end that one."""

    async def main() -> None:
        pool = OnePool()
        pool.volume.mirror_record = LegRecord("b", accepted=first_record("ab")).encode()
        asked = 0

        async def delete_volume(name: str, **how: Any) -> None:
            nonlocal asked
            asked += 1
            await trio.sleep(0.01)
            if asked == 1:
                raise OSError(errno.EIO, "no checkpoint can be committed")
            pool.volume.deleted = True

        pool.delete_volume = delete_volume  # type: ignore[method-assign]
        found = mirrors(pool, tmp_path)
        async with trio.open_nursery() as nursery:
            await nursery.start(found.run)
            mirror: Any = found.adopt(pool, pool.volume)  # type: ignore[arg-type]

            async def first() -> None:
                with pytest.raises(OSError, match="no checkpoint"):
                    await found.delete_local(mirror)

            async with trio.open_nursery() as both:
                both.start_soon(first)
                await trio.sleep(0.005)
                if other == "deletes it too":
                    both.start_soon(found.delete_local, mirror)
                else:
                    both.start_soon(found.dissolve, mirror)
            assert found.all() == [] and found.by_leg("b") is None and not found._broken
            if pool.volume.deleted:  # and a name that was given again since is nobody's
                with pytest.raises(OSError, match="fast/vol was deleted just now") as refused:
                    await found.delete_local(mirror)
                assert (refused.value.errno, asked, found.all()) == (errno.ENOENT, 2, [])
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_what_is_no_status_of_a_primary_is_not_shown_as_one() -> None:
    legs = [_leg(LegInfo("l", "a", "p/v"), "UpToDate")]
    good: dict[str, Any] = dict.fromkeys(_PRIMARYS) | {"role": "primary", "legs": legs, "term": 1, "epoch": 0}
    assert _judge_status(good, explain=False)["legs"] == legs
    for count, shown in ((3, 3), (None, 0), ("x", 0)):  # a primary of an older release doesn't say it
        assert _judge_status(good | {"unreadable_blocks": count}, explain=False)["unreadable_blocks"] == shown
    said = good | {"headline": "It is.", "text": "It is. So it is."}
    assert _judge_status(said, explain=True)["text"] == "It is. So it is."
    bad: list[Any] = [None, [], {}, good | {"role": "secondary"}, good | {"legs": None}, good | {"legs": [{}]}]
    bad += [good | {"legs": [legs[0] | {"healed_blocks": "x"}]}, {key: good[key] for key in good if key != "term"}]
    bad += [good | {"term": "1"}, good | {"epoch": None}]
    for theirs in bad:
        with pytest.raises(OSError, match=r"no (status|legs|term) of a mirror"):
            _judge_status(theirs, explain=False)
    with pytest.raises(OSError, match="no status of a mirror"):
        _judge_status(good, explain=True)


@pytest.mark.parametrize("how", ["fails", "is given up"])
def test_a_volume_whose_first_record_is_not_durable_is_a_plain_volume_still(tmp_path: Any, how: str) -> None:
    class Failing(OnePool):
        async def set_mirror(self, volume: Any, record: bytes, trackers: Any = None) -> None:
            volume.mirror_record = record  # as the engine: at once, and durable with a checkpoint
            if record:
                if how == "is given up":
                    await trio.sleep_forever()
                raise OSError(errno.EIO, "no checkpoint can be committed")
            await trio.lowlevel.checkpoint()

    async def main() -> None:
        pool = Failing()
        volume: Any = pool.volume
        volume.filling = False
        here = mirrors(pool, tmp_path)
        here.peers = SimpleNamespace(node="b", peers={"c": None}, peer=lambda name: None)  # type: ignore[assignment]
        admin = MirrorAdmin(here, lambda name: [], cast("Any", None))
        with trio.move_on_after(0.05):
            with pytest.raises(OSError, match="no checkpoint can be committed"):
                await admin.add(cast("Any", pool), volume, Place("c"), Options())
            assert how == "fails"
        assert volume.mirror_record == b"" and here.is_exported(volume)

    trio.run(main)
