"""The arbiter as the daemon sees it: whether it answers, how far it has been, and the primary's lease there."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from replication.arbiter import ArbitratedLease
from replication.etcd import EtcdCluster, EtcdLease
from replication.lease import DRIFT
from replication.membership import Options, Term
from replication.promotion import Promote, promote
from terrace.arbiter import FILE, Arbiter, HeldLease
from terrace.config import EtcdConfig
from tests.replication.fakeetcd import FakeEtcd
from tests.replication.nodes import Nodes
from tests.replication.stores import MIRROR, first_record

FIRST = first_record("ab", options=Options(arbiter="etcd"))


class Told(list[str]):
    def __call__(self, kind: str, subject: str, text: str) -> None:
        self.append(f"{kind}: {text}")


def arbiter_of(home: Path, etcd: FakeEtcd, told: Callable[[str, str, str], None], node: str = "a") -> Arbiter:
    arbiter = Arbiter(EtcdConfig(endpoints=["http://127.0.0.1:1"]), home, node, told)
    arbiter._etcd = etcd  # type: ignore[assignment]
    return arbiter


def test_that_etcd_has_come_or_gone_is_told_once(tmp_path: Path) -> None:
    async def main() -> None:
        etcd, told = FakeEtcd(), Told()
        arbiter = arbiter_of(tmp_path, etcd, told)
        for cut in (True, True, False, False, True, True, False):
            etcd.is_cut = cut
            if cut:
                with pytest.raises(OSError, match="etcd has not answered"):
                    await arbiter.require()
            else:
                await arbiter.require()
            status = arbiter.status()
            assert status is not None and status["answers"] is not cut
        assert [text.split(" at ")[0].split(":")[1] for text in told] == [
            " etcd is no arbiter now",
            " etcd answers",
            " etcd is no arbiter now",
            " etcd answers",
        ]

    trio.run(main)


def test_where_etcd_has_gone_back_nobody_is_asked_for_a_promise_but_by_force(tmp_path: Path) -> None:
    """A promise would fence the primary that is well, for a record that is refused afterwards."""

    async def main() -> None:
        first = first_record("abc", options=Options(arbiter="etcd"))
        etcd, nodes, told = FakeEtcd(), Nodes("abc", timeout_s=0.3), Told()
        await EtcdCluster("a", etcd, nodes.cluster("a")).create(first)
        backup = dict(etcd._values), etcd._revision
        other = dataclasses.replace(first, mirror="cd" * 16)
        other = dataclasses.replace(other, history=(other.generation,))
        await EtcdCluster("a", etcd, nodes.cluster("a"))._swap(other, 0)
        arbiter = arbiter_of(tmp_path, etcd, told, "b")
        await arbiter.require()
        await arbiter._save()
        etcd._values, etcd._revision = backup
        cluster = arbiter.cluster(nodes.cluster("b"))
        await cluster.newest(MIRROR)  # sees it
        await trio.sleep(10)  # nobody has been heard for a lease
        for _ in range(2):
            with pytest.raises(OSError, match="etcd was restored from an older backup") as refused:
                # Its own record is that of etcd, so nobody is seen to have a later one.
                await promote("b", MIRROR, "abc", nodes.voter("b"), cluster, arbiter=True, timeout_s=0.3)
            assert refused.value.errno == errno.EUCLEAN
        assert [nodes.all[name].keeper.record.promised for name in "abc"] == [first.term] * 3
        second = first.next_epoch(in_sync=frozenset("ab"))
        await EtcdCluster("a", etcd, nodes.cluster("a")).commit(second, expected=first)  # the primary goes on
        found = await promote("b", MIRROR, "abc", nodes.voter("b"), cluster, arbiter=True, timeout_s=0.3)
        assert isinstance(found, Promote)  # its record is new there

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.05))


def test_without_etcd_in_the_configuration_what_needs_it_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        arbiter = Arbiter(EtcdConfig(), tmp_path, "a", Told())
        assert arbiter.status() is None
        with pytest.raises(OSError, match=r"write endpoints under \[etcd\]") as refused:
            await arbiter.require()
        assert refused.value.errno == errno.EINVAL

    trio.run(main)


def test_an_etcd_that_has_gone_back_makes_nobody_primary_by_an_old_record_not_even_after_a_restart(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        etcd, nodes, told = FakeEtcd(), Nodes("ab", timeout_s=0.3), Told()
        arbiter = arbiter_of(tmp_path, etcd, told, "b")
        await EtcdCluster("a", etcd, nodes.cluster("a")).create(FIRST)
        backup = dict(etcd._values), etcd._revision
        nodes.all["b"].up = False  # which is left out, and never hears of that
        await EtcdCluster("a", etcd, nodes.cluster("a")).commit(
            FIRST.next_epoch(in_sync=frozenset("a")), expected=FIRST
        )
        nodes.all["b"].up = True
        await arbiter.require()
        await arbiter._save()
        etcd._values, etcd._revision = backup
        arbiter = arbiter_of(tmp_path, etcd, told, "b")
        new = FIRST.next_term(Term(2, "2" * 16), "b", frozenset("b"))
        for _ in range(2):
            with pytest.raises(
                OSError, match="etcd was restored from an older backup, as this node has seen"
            ) as refused:
                await arbiter.cluster(nodes.cluster("b")).commit(new, expected=FIRST)
            assert refused.value.errno == errno.EUCLEAN
            arbiter = arbiter_of(tmp_path, etcd, told, "b")  # as after a restart
        assert len([text for text in told if "gone back from revision 3 to 2" in text]) == 1
        forced = FIRST.next_term(Term(2, "3" * 16), "b", frozenset("b"), "fenced")
        await arbiter.cluster(nodes.cluster("b")).commit(forced, expected=FIRST)
        again = forced.next_term(Term(3, "4" * 16), "b", frozenset("b"))
        await arbiter.cluster(nodes.cluster("b")).commit(again, expected=forced)  # by a record that is new there

    trio.run(main)


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2, "seen": 1, "floor": 1}', '{"version": 1, "seen": "x"}'])
def test_a_file_that_cannot_be_understood_is_named_and_left_as_it_is(tmp_path: Path, text: str) -> None:
    async def main() -> None:
        (tmp_path / FILE).write_text(text)
        arbiter = arbiter_of(tmp_path, FakeEtcd(), Told())
        with pytest.raises(OSError, match=r"etcd\.json, .* can't be understood; .* delete it") as refused:
            await arbiter.require()
        assert refused.value.errno == errno.EPROTO and (tmp_path / FILE).read_text() == text
        (tmp_path / FILE).unlink()
        await arbiter.require()
        await arbiter._save()
        assert json.loads((tmp_path / FILE).read_text()) == {"version": 1, "seen": 1, "floor": -1}

    trio.run(main)


def test_a_primary_may_serve_while_etcd_or_all_legs_in_sync_answer() -> None:
    now = 0.0
    lease = ArbitratedLease(10.0, lambda: now)

    def serves(nodes: str = "ab") -> bool:
        return lease.may_serve(lambda: nodes)

    assert not serves()
    lease.answered("a", lease.begin())
    assert not serves() and serves("a") and not serves("")
    now = 5.0
    lease.answered("b", lease.begin())
    assert serves()
    now = 10.0 * (1 - DRIFT)
    assert not serves() and serves("b"), "by the one that has answered longest ago"
    lease.renewed(5.0)
    assert serves() and serves("")
    now = 5.0 + 10.0 * (1 - DRIFT)
    assert not serves()


def held(etcd: Any) -> HeldLease:
    return HeldLease(EtcdLease("a", etcd, MIRROR, 1.0))


def test_a_lease_is_kept_up_until_another_term_counts_which_deposes() -> None:
    async def main() -> None:
        etcd, nodes = FakeEtcd(), Nodes("ab", timeout_s=0.3)
        cluster = EtcdCluster("b", etcd, nodes.cluster("b"))
        await EtcdCluster("a", etcd, nodes.cluster("a")).create(FIRST)
        deposed: list[OSError] = []
        lease = held(etcd)
        lease._clock = trio.current_time
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lease.keep, lambda: FIRST, deposed.append)
            await trio.sleep(5)
            assert lease.may_serve(lambda: "") and lease.problem is None
            etcd.is_cut = True
            await trio.sleep(1.2)
            assert not lease.may_serve(lambda: "") and lease.problem is not None
            await trio.sleep(3)
            etcd.is_cut = False
            await trio.sleep(0.3)
            assert lease.may_serve(lambda: "") and lease.problem is None
            await cluster.commit(FIRST.next_term(Term(2, "2" * 16), "b", frozenset("b"), "fenced"), expected=FIRST)
            await trio.sleep(0.5)
        assert [error.errno for error in deposed] == [errno.ESTALE]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_primary_whose_record_etcd_has_forgotten_serves_no_more_even_if_its_legs_answer() -> None:
    async def main() -> None:
        lease = held(FakeEtcd())
        with pytest.raises(OSError, match="etcd has no record of this mirror, and node a has") as refused:
            await lease.keep(lambda: FIRST, lambda error: None)
        assert refused.value.errno == errno.EUCLEAN

    trio.run(main)


def test_a_lease_that_is_given_back_keeps_nobody_waiting_and_etcd_that_is_away_neither() -> None:
    async def main() -> None:
        etcd, nodes = FakeEtcd(), Nodes("ab", timeout_s=0.3)
        await EtcdCluster("a", etcd, nodes.cluster("a")).create(FIRST)
        lease = held(etcd)
        await lease._key.renew(FIRST)
        await lease.release()
        new = FIRST.next_term(Term(2, "2" * 16), "b", frozenset("ab"))
        await EtcdCluster("b", etcd, nodes.cluster("b")).commit(new, expected=FIRST)
        etcd.is_cut = True
        with trio.fail_after(2):
            await lease.release()

    trio.run(main)
