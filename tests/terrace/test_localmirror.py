"""One mirror of a node, without an engine: what it makes durable, and when."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

import terrace.localmirror
import terrace.primary
from replication.cluster import VoterState
from replication.keeper import LegRecord
from replication.membership import LegInfo, Options, Term
from replication.voters import KeptVoter, LegsCluster
from terrace.arbiter import HeldLease
from terrace.localmirror import LocalMirror
from tests.replication.stores import MemoryStore, first_record

TERM_2 = Term(2, "2" * 16)


class SlowStore(MemoryStore):
    """A flush takes until it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.flushing = trio.Event()
        self.may_flush = trio.Event()

    async def flush(self) -> None:
        self.flushing.set()
        await self.may_flush.wait()


def local_mirror(
    monkeypatch: pytest.MonkeyPatch, store: MemoryStore, record: LegRecord, *, is_new: bool = False
) -> LocalMirror:
    """On node a."""
    monkeypatch.setattr(terrace.localmirror, "PoolLegStore", lambda pool, volume: store)
    volume: Any = SimpleNamespace(name="fast/vol", short_name="vol", mirror_record=record.encode(), open_count=0)
    node: Any = SimpleNamespace(
        peers=SimpleNamespace(node="a"), boot="boot", tell=print, disconnect=lambda name: 0, keep_before_resync=True
    )
    pool: Any = SimpleNamespace(snapshots=lambda volume: [])
    mirror = LocalMirror(pool, volume, node, is_new=is_new)
    node.own_voter = KeptVoter("a", Path("/nonexistent"), lambda mirror_id: [mirror.keeper])
    node.voter = lambda name: node.own_voter
    node.cluster = lambda membership: LegsCluster("a", node.voter, lambda mirror_id: pytest.fail("not asked"))
    return mirror


def test_a_mirror_of_one_leg_that_begins_again_writes_no_second_record_with_the_place_of_one_it_may_have_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        store, record = MemoryStore(), first_record("a")
        mirror = local_mirror(monkeypatch, store, LegRecord("a", record.term, record), is_new=True)
        first = await mirror._proven(force=False)
        assert first == record  # a second leg gets `first.next_epoch(...)`, and the answer is lost
        again = await mirror._proven(force=False)
        store.crash()
        restarted = local_mirror(monkeypatch, store, LegRecord.decode(store.record))
        later = await restarted._proven(force=False)
        assert [one.term.number for one in (first, again, later)] == [1, 2, 3]
        assert later.descends_from(again) and again.descends_from(first)

    trio.run(main)


def test_who_is_known_to_write_to_nbd_servers_no_more_is_so_in_a_later_term_of_the_same_primary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        record = first_record("a")
        mirror = local_mirror(monkeypatch, MemoryStore(), LegRecord("a", record.term, record))
        mirror.is_gone("c")  # an operator says so, of one that can't be heard
        mirror._fenced_nodes["d"] = Term(0, "0" * 16)
        later = await mirror._in_later_term()
        assert later.term.number == 2 and mirror._fenced_nodes == {"c": later.term}

    trio.run(main)


def test_a_leg_that_the_next_primary_writes_to_is_never_declared_clean_by_the_last_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        store = SlowStore()
        demoted = first_record("ab").next_epoch(primary=None, token="b")
        own = LegRecord("a", promised=demoted.term, accepted=demoted, boot="boot")
        mirror = local_mirror(monkeypatch, store, own)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mirror._settle_as_replica)
            await store.flushing.wait()
            # Node b goes on meanwhile: its session takes part, and writes.
            await mirror.keeper.prepare(TERM_2, "b")
            await mirror.keeper.accept(demoted.next_term(TERM_2, "b", frozenset("ab")))
            took_part = trio.Event()

            @nursery.start_soon
            async def session() -> None:
                async with mirror.replica._turn:
                    await mirror.keeper.take_part()
                    took_part.set()

            await trio.testing.wait_all_tasks_blocked(0.01)
            store.may_flush.set()
            await took_part.wait()
        store.crash()
        assert LegRecord.decode(store.record).boot == "boot"

    trio.run(main)


def test_a_leg_is_clean_after_its_node_was_demoted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        store = MemoryStore()
        demoted = first_record("ab").next_epoch(primary=None, token="b")
        mirror = local_mirror(monkeypatch, store, LegRecord("a", demoted.term, demoted, boot="boot"))
        await mirror._settle_as_replica()
        assert LegRecord.decode(store.record).boot is None

    trio.run(main)


def test_a_close_that_is_cancelled_ends_the_mirror_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hangs:
        """A primary's mirror that can't flush."""

        membership = first_record("ab")

        def __init__(self) -> None:
            self.started, self.ended = trio.Event(), trio.Event()
            self.started.set()

        async def stop(self) -> None:
            await trio.sleep_forever()

    async def main() -> None:
        mirror = local_mirror(monkeypatch, MemoryStore(), LegRecord("a", accepted=first_record("ab")))

        async def serves() -> None:
            with trio.CancelScope() as mirror._scope:
                await trio.sleep_forever()

        monkeypatch.setattr(mirror, "_be_primary", serves)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mirror.run)
            await trio.testing.wait_all_tasks_blocked(0.01)
            mirror.mirror = Hangs()  # type: ignore[assignment]
            with trio.move_on_after(0.02):
                await mirror.close()
            with trio.fail_after(1):
                await mirror.close()  # as the daemon does when it stops

    trio.run(main)


def test_who_cant_be_primary_as_its_leg_is_being_resynced_hears_how_to_reach_its_last_consistent_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = first_record("ab").next_epoch(in_sync=frozenset("b"))
    mirror = local_mirror(monkeypatch, MemoryStore(), LegRecord("a", accepted=record, inconsistent=True))
    assert mirror.way_out() == ""
    kept = SimpleNamespace(short_name="resync-20261130-120000", name="fast/vol@resync-20261130-120000")
    mirror.pool.snapshots = lambda volume: [kept]  # type: ignore[method-assign,assignment,return-value,list-item]
    assert "terrace volume clone fast/vol@resync-20261130-120000 fast/vol-rescued" in mirror.way_out()
    mirror.keeper.record = LegRecord("a", accepted=record)
    assert mirror.way_out() == ""


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (OSError(errno.ETIMEDOUT, "no route to host"), "volume mirror remove fast/vol b"),
        (VoterState("b", Term(1, "1" * 16), None), "hasn't promised yet"),
        (VoterState("b", TERM_2, None), None),
        (OSError(errno.ENOENT, "it knows nothing of a mirror"), "volume mirror remove fast/vol b"),
    ],
)
def test_a_server_of_no_mirrors_is_left_out_until_who_was_primary_before_is_known_to_have_stopped(
    said: VoterState | OSError, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OtherVoter:
        async def state(self, mirror: str) -> VoterState:
            await trio.lowlevel.checkpoint()
            if isinstance(said, OSError):
                raise said
            return said

    async def main() -> None:
        record = first_record("ab", primary="b")
        disk = LegInfo("n", "b", "nbd+unix:///?socket=/nonexistent/sock", "nbd")
        ours = record.next_epoch(legs=(*record.legs, disk)).next_term(TERM_2, "a", frozenset("ab"))
        ours = replace(ours, options=Options(timeout_s=0.05))
        mirror = local_mirror(monkeypatch, MemoryStore(), LegRecord("a", TERM_2, ours))
        mirror._node.voter = lambda node: OtherVoter()  # type: ignore[method-assign,assignment,return-value]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mirror.run)
            await trio.testing.wait_all_tasks_blocked(0.01)
            with pytest.raises(OSError, match=reason or "No such file") as failed:
                await mirror._connect_nbd(disk, ours)
            assert failed.value.errno == (errno.EBUSY if reason else errno.ENOENT)
            nursery.cancel_scope.cancel()

    monkeypatch.setattr(LocalMirror, "_be_primary", trio_forever)
    trio.run(main)


async def trio_forever(mirror: LocalMirror) -> None:
    """A primary that has nothing to do."""
    await trio.sleep_forever()


@pytest.mark.parametrize("policy", ["suspend", "fail"])
def test_what_clients_of_a_primary_get_whose_lease_is_over(monkeypatch: pytest.MonkeyPatch, policy: Any) -> None:
    """They wait; or, where the mirror says so, get errors a lease later. When it may serve again all is well."""

    async def main() -> None:
        record = first_record("ab", options=Options(lease_s=2.0, below_quorum=policy, arbiter="etcd"))
        mirror = local_mirror(monkeypatch, MemoryStore(), LegRecord("a", accepted=record))
        served: Any = SimpleNamespace(
            membership=record, records=SimpleNamespace(attempts=[]), started=trio.Event(), ended=trio.Event()
        )
        served.started.set()
        mirror.mirror = served
        key: Any = SimpleNamespace(lease_s=2.0)
        mirror._held = HeldLease(key)
        mirror._held._clock = trio.current_time
        mirror._held.problem = OSError(errno.ETIMEDOUT, "etcd is silent")

        async def request() -> None:
            while not mirror._may_serve():
                await mirror._until_may_serve()

        async def heartbeat() -> None:
            begun = trio.current_time()
            for node in "ab":
                mirror._held.answered(node, begun)  # type: ignore[union-attr]
            if mirror._may_serve():
                mirror._lapsed_at = None

        assert mirror.lease_over is not None and mirror.lease_over.endswith("lately: etcd is silent")
        await heartbeat()
        assert mirror.lease_over is None
        await request()
        await trio.sleep(2.0)
        with trio.move_on_after(1.9) as waited:
            await request()
        assert waited.cancelled_caught
        with trio.move_on_after(10) as waited:
            if policy == "fail":
                with pytest.raises(OSError, match="below quorum: neither etcd nor all nodes") as refused:
                    await request()
                assert refused.value.errno == errno.EIO
            else:
                await request()
        assert waited.cancelled_caught is (policy == "suspend")
        await heartbeat()
        await request()
        await trio.sleep(2.0)
        with trio.move_on_after(1.9) as waited:
            await request()
        assert waited.cancelled_caught, "another lapse begins anew"

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_record_that_is_being_written_counts_for_whose_answers_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate may find it in etcd, and go on with a leg that only it has in sync."""
    alone = first_record("ab", in_sync="a", options=Options(arbiter="etcd"))
    mirror = local_mirror(monkeypatch, MemoryStore(), LegRecord("a", accepted=alone))
    both = alone.next_epoch(in_sync=frozenset("ab"))
    served: Any = SimpleNamespace(membership=alone, records=SimpleNamespace(attempts=[]))
    mirror.mirror = served
    assert mirror._nodes_in_sync() == {"a"}
    served.records.attempts.append(both)
    assert mirror._nodes_in_sync() == {"a", "b"}


@pytest.mark.parametrize("force", [True, False])
def test_whoever_promotes_a_mirror_that_was_closed_or_has_failed_hears_it_at_once(
    monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    async def main() -> None:
        mirror = local_mirror(monkeypatch, MemoryStore(), LegRecord("a", accepted=first_record("ab", primary="b")))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mirror.run)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await mirror.close()
        with trio.fail_after(1), pytest.raises(OSError, match="is being closed here"):
            await mirror.promote(force=force)

    trio.run(main)


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_the_lease_is_given_back_when_nobody_takes_it_again(
    monkeypatch: pytest.MonkeyPatch, is_cancelled: bool
) -> None:
    events: list[str] = []

    class Held:
        def may_serve(self, nodes: object) -> bool:
            return True

        def answered(self, node: str, begun: float) -> None:
            pass

        async def keep(self, newest: object, deposed: object) -> None:
            try:
                await trio.sleep_forever()
            finally:
                events.append("no longer kept")

        async def release(self) -> None:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
            events.append("given back")

    async def serves(mirror: object) -> None:
        await trio.testing.wait_all_tasks_blocked(0.01)
        while is_cancelled:
            await trio.sleep(1)

    async def main() -> None:
        record = first_record("ab", options=Options(arbiter="etcd"))
        mirror = local_mirror(monkeypatch, MemoryStore(), LegRecord("a", accepted=record))
        cast(Any, mirror.volume).rotational = False
        mirror._node.arbiter = SimpleNamespace(held=lambda mirror, lease_s: Held())  # type: ignore[assignment]
        with trio.move_on_after(0.1):
            await mirror._serve(record)
        assert events == ["no longer kept", "given back"]

    monkeypatch.setattr(terrace.primary.ServedMirror, "run", serves)
    trio.run(main)
