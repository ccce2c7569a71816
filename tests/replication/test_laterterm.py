"""A leg that has promised a term to a candidate that came to nothing comes back by a later term of the same primary."""

from __future__ import annotations

import errno

import pytest
import trio

from replication.leg import BLOCK_BYTES
from replication.membership import Membership, Term
from tests.replication.fakes import FakeCluster
from tests.replication.rig import Rig, run, with_options

FAILED, LATER = Term(3, "3" * 16), Term(4, "4" * 16)
DATA = bytes(range(256)) * (BLOCK_BYTES // 256)


class Proof:
    """What `promotion.promote` does, at the rig's nodes; the first `refusals` times in vain."""

    number = errno.EBUSY

    def __init__(self, refusals: int = 0, *, after_promises: bool = False) -> None:
        self.rig: Rig = None  # type: ignore[assignment]
        self.refusals = refusals
        self.after_promises = after_promises
        self.asked_at: list[float] = []

    async def __call__(self) -> Membership:
        self.asked_at.append(trio.current_time())
        term = Term(LATER.number + len(self.asked_at), LATER.id)
        refused = len(self.asked_at) <= self.refusals
        if not refused or self.after_promises:
            for node in reversed(self.rig.nodes.values()):  # its own last
                await node.keeper.promise(term)
        if refused:
            raise OSError(self.number, "node c was not heard")
        record = self.rig.mirror.membership.next_term(term, "a", self.rig.mirror.membership.in_sync)
        await self.rig.cluster.commit(record, expected=self.rig.cluster.truth)
        return record


class MajorityCluster(FakeCluster):
    """In mode "majority": a record also needs most of the nodes, whoever is in sync by it. Who has promised a term has
    stored the candidate's record as well, and nobody else has."""

    async def newest(self, mirror: str) -> Membership:
        if not all(node.keeper.allows(self.truth.term) for node in self.nodes.values()):
            await trio.lowlevel.checkpoint()
            raise OSError(errno.ETIMEDOUT, "the newest record can't be proven")
        return await super().newest(mirror)

    async def commit(self, new: Membership, *, expected: Membership) -> None:
        away = [node for node in self.nodes.values() if node.link.is_cut]
        fenced = [node for node in self.nodes.values() if node not in away and not node.keeper.allows(new.term)]
        if 2 * (len(away) + len(fenced)) >= len(self.nodes):
            await trio.lowlevel.checkpoint()
            raise OSError(errno.ESTALE if fenced else errno.ETIMEDOUT, "too few voters take the record")
        await super().commit(new, expected=expected)


def rig_with(proof: Proof) -> Rig:
    proof.rig = Rig(3, prove=proof)
    return proof.rig


def rig_by_majority(proof: Proof) -> Rig:
    rig = rig_with(proof)
    rig.cluster = MajorityCluster(rig.cluster.nodes, rig.record)
    return rig


async def cut_off(rig: Rig) -> None:
    """The primary from both others, which promise a term to a candidate that comes to nothing; then all is mended."""
    for node in "bc":
        rig.nodes[node].link.cut()
    await rig.until(lambda: rig.mirror.excluding == {"legb", "legc"})
    for node in "bc":
        await rig.nodes[node].keeper.promise(FAILED)
    await trio.sleep(3)
    for node in "bc":
        rig.nodes[node].link.is_cut = False


def test_a_leg_that_refuses_the_term_is_back_within_bounded_time_and_clients_only_wait() -> None:
    async def main() -> None:
        rig = rig_with(Proof())
        async with rig.running() as mirror, trio.open_nursery() as nursery:
            written = 0

            @nursery.start_soon
            async def client() -> None:
                nonlocal written
                into = memoryview(bytearray(BLOCK_BYTES))
                while True:
                    await mirror.write(written * BLOCK_BYTES, memoryview(DATA))
                    await mirror.read(written * BLOCK_BYTES, BLOCK_BYTES, into)
                    assert into == DATA
                    await mirror.flush()
                    written += 1
                    await trio.sleep(0.05)

            await rig.until(lambda: written > 3)
            await rig.nodes["c"].keeper.promise(FAILED)
            await rig.until(lambda: "legc" not in mirror.membership.in_sync)
            began = trio.current_time()
            await rig.until(lambda: mirror.membership.term.number > FAILED.number)
            await rig.whole()
            assert trio.current_time() - began < 4 * mirror.membership.options.timeout_s
            before = written
            await rig.until(lambda: written > before + 3)
            assert mirror.end is None and not rig.mirror.ended.is_set()
            nursery.cancel_scope.cancel()
        assert rig.store("a").image == rig.store("b").image == rig.store("c").image

    run(main)


@pytest.mark.parametrize("who_refuses", ["a leg too", "voters alone"])
def test_voters_that_have_promised_a_later_term_keep_a_primary_from_being_served_no_longer_than_that(
    who_refuses: str,
) -> None:
    """They answer no heartbeat any more, so that there is no lease: the barrier mustn't wait for one."""

    async def main() -> None:
        proof = Proof()
        refuse = False

        def is_refused() -> bool:
            return refuse and rig.mirror.membership.term.number <= FAILED.number

        rig = proof.rig = Rig(
            3, prove=proof, may_serve=lambda: not is_refused(), lease_is_refused=is_refused,
        )  # fmt: skip
        async with rig.running() as mirror:
            await mirror.write(0, memoryview(DATA))
            if who_refuses == "a leg too":
                await rig.nodes["c"].keeper.promise(FAILED)
                await rig.until(lambda: "legc" not in mirror.membership.in_sync)
            refuse = True
            began = trio.current_time()
            await mirror.write(BLOCK_BYTES, memoryview(DATA))
            assert mirror.membership.term.number > FAILED.number
            assert trio.current_time() - began < 4 * mirror.membership.options.timeout_s
            await rig.whole()

    run(main)


def test_a_leg_that_is_away_or_being_resynced_is_no_reason() -> None:
    async def main() -> None:
        proof = Proof()
        rig = rig_with(proof)
        async with rig.running() as mirror:
            rig.nodes["c"].link.cut()
            await rig.until(lambda: "legc" not in mirror.membership.in_sync)
            await trio.sleep(20)
            assert not proof.asked_at

    run(main)


def test_nor_is_one_that_has_refused_and_is_no_leg_any_more() -> None:
    async def main() -> None:
        proof = Proof()
        rig = rig_with(proof)
        async with rig.running() as mirror:
            await rig.nodes["c"].keeper.promise(FAILED)
            await rig.until(lambda: "legc" not in mirror.membership.in_sync)
            error = mirror.members["legc"].error
            await rig.until(lambda: mirror.members["legc"].error is not error)  # it was sought, and has refused
            await trio.sleep(mirror.membership.options.timeout_s / 2)
            await mirror.reconfigure(legs=tuple(leg for leg in mirror.membership.legs if leg.node != "c"))
            await trio.sleep(20)
            assert not proof.asked_at

    run(main)


def test_without_a_proof_the_old_term_goes_on_and_it_is_tried_again_less_and_less_often() -> None:
    async def main() -> None:
        proof = Proof(refusals=3)
        rig = rig_with(proof)
        async with rig.running() as mirror:
            await rig.nodes["c"].keeper.promise(FAILED)
            await rig.until(lambda: len(proof.asked_at) == 3)
            await mirror.write(0, memoryview(DATA))
            assert mirror.membership.term.number < FAILED.number
            await rig.whole()
        first, second, third, fourth = proof.asked_at
        assert fourth - third > 1.5 * (third - second) > 2 * (second - first)

    run(main)


def test_who_was_promised_and_then_not_proven_goes_on_trying() -> None:
    async def main() -> None:
        proof = Proof(refusals=1, after_promises=True)
        rig = rig_with(proof)
        async with rig.running() as mirror:
            await rig.nodes["c"].keeper.promise(FAILED)
            await rig.until(lambda: len(proof.asked_at) == 2)
            await rig.whole()
            await mirror.write(0, memoryview(DATA))
            assert mirror.end is None and mirror.records.renewal is None

    run(main)


def test_a_primary_whose_last_leg_in_sync_refuses_its_term_begins_a_later_one() -> None:
    async def main() -> None:
        rig = rig_with(Proof())
        async with rig.running() as mirror:
            for node in "ac":
                rig.nodes[node].store.failing = OSError(errno.EIO, "broken")
            await mirror.write(0, memoryview(DATA))
            await rig.until(lambda: mirror.membership.in_sync == {"legb"})
            for node in "ac":
                rig.nodes[node].store.failing = None
            await rig.nodes["b"].keeper.promise(FAILED)
            await rig.until(lambda: mirror.membership.term.number > FAILED.number and not mirror.lost)
            await rig.whole()

    run(main)


def test_a_term_that_has_begun_is_enough_however_long_its_legs_take_to_be_equal() -> None:
    async def main() -> None:
        proof = Proof()
        rig = rig_with(proof)
        async with rig.running() as mirror:
            await mirror.write(0, memoryview(DATA))
            await rig.nodes["c"].keeper.promise(FAILED)
            await rig.until(lambda: "legc" not in mirror.membership.in_sync)
            is_broken, flush = True, rig.store("a").flush

            async def fails() -> None:
                await flush()
                if mirror.lost and is_broken:
                    raise OSError(errno.EIO, "broken")

            for node in "ab":
                rig.store(node).flush = fails  # type: ignore[method-assign]
            await rig.until(lambda: bool(proof.asked_at))
            await trio.sleep(30)
            assert mirror.lost and len(proof.asked_at) == 1, "each would push one of before out of the history"
            is_broken = False
            await rig.whole()
            assert len(proof.asked_at) == 1 and mirror.records.renewal is None

    run(main)


def test_it_is_deposed_instead_where_others_have_gone_on() -> None:
    async def main() -> None:
        proof = Proof(refusals=1)
        proof.number = errno.ESTALE
        rig = rig_with(proof)
        async with rig.running() as mirror:
            await rig.nodes["c"].keeper.promise(FAILED)
            await mirror.ended.wait()
            assert mirror.end is not None and mirror.end.errno == errno.ESTALE

    run(main)


def test_a_primary_whose_record_without_the_legs_it_lost_is_refused_begins_a_later_term_and_no_write_fails() -> None:
    async def main() -> None:
        rig = rig_by_majority(Proof())
        async with rig.running() as mirror, trio.open_nursery() as nursery:
            await mirror.write(0, memoryview(DATA))
            answered: set[int] = set()

            async def client(block: int) -> None:
                await mirror.write(block * BLOCK_BYTES, memoryview(DATA))
                answered.add(block)

            for node in "bc":
                rig.nodes[node].link.cut()
            for block in range(1, 4):
                nursery.start_soon(client, block)
            nursery.start_soon(mirror.flush)
            await cut_off(rig)
            assert not answered
            with trio.fail_after(4 * mirror.membership.options.timeout_s):
                await rig.whole()
                await mirror.flush()
            assert answered == {1, 2, 3} and mirror.membership.term.number > FAILED.number
            into = memoryview(bytearray(BLOCK_BYTES))
            for block in range(4):
                await mirror.read(block * BLOCK_BYTES, BLOCK_BYTES, into)
                assert into == DATA
            await mirror.flush()
        assert rig.store("a").image == rig.store("b").image == rig.store("c").image

    run(main)


def test_also_where_nothing_is_written_and_where_the_proof_comes_late() -> None:
    async def main() -> None:
        proof = Proof(refusals=2)
        rig = rig_by_majority(proof)
        async with rig.running() as mirror, trio.open_nursery() as nursery:
            await cut_off(rig)
            answered = trio.Event()

            @nursery.start_soon
            async def client() -> None:
                await mirror.write(0, memoryview(DATA))
                answered.set()

            await rig.until(lambda: len(proof.asked_at) == 2)
            assert not answered.is_set() and mirror.membership.term.number < FAILED.number
            await answered.wait()
            await rig.whole()
            assert len(proof.asked_at) == 3 and mirror.records.renewal is None

    run(main)


def test_a_leg_that_is_lost_is_excluded_by_a_record_where_that_counts_whoever_else_refuses_the_term() -> None:
    async def main() -> None:
        proof = Proof(refusals=1000)
        rig = rig_by_majority(proof)
        async with rig.running() as mirror:
            await rig.nodes["c"].keeper.promise(FAILED)
            await rig.until(lambda: mirror.membership.in_sync == {"lega", "legb"})
            await mirror.write(0, memoryview(DATA))
            assert not proof.asked_at

    run(main)


def test_a_write_that_only_a_leg_has_whose_machine_has_gone_down_fails_and_is_decided() -> None:
    """What the others are made equal to hasn't got it, so it mustn't be acknowledged."""

    async def main() -> None:
        proof = Proof()
        rig = rig_by_majority(proof)
        async with rig.running() as mirror, trio.open_nursery() as nursery:
            outcomes: list[OSError | None] = []
            await mirror.write(0, memoryview(DATA))
            await mirror.flush()

            @nursery.start_soon
            async def client() -> None:
                try:
                    await mirror.write(0, memoryview(bytes(BLOCK_BYTES)))
                except OSError as error:
                    outcomes.append(error)
                else:
                    outcomes.append(None)

            await cut_off(rig)
            rig.intact = "bc"
            await rig.whole()
            assert [error and error.errno for error in outcomes] == [errno.EIO]
            into = memoryview(bytearray(BLOCK_BYTES))
            await mirror.read(0, BLOCK_BYTES, into)
            assert into == DATA
            await mirror.flush()
        assert rig.store("a").image == rig.store("b").image == rig.store("c").image

    run(main)


def test_writes_that_have_failed_below_quorum_are_answered_once_and_later_ones_are_taken() -> None:
    async def main() -> None:
        rig = rig_by_majority(Proof())
        with_options(rig, below_quorum="fail")
        async with rig.running() as mirror, trio.open_nursery() as nursery:
            for node in "bc":
                rig.nodes[node].link.cut()

            @nursery.start_soon
            async def client() -> None:
                with pytest.raises(OSError, match="below quorum"):
                    await mirror.write(0, memoryview(DATA))

            await cut_off(rig)
            await rig.whole()
            assert mirror.failing is None and not mirror.inflight.batches
            await mirror.write(BLOCK_BYTES, memoryview(DATA))

    run(main)


@pytest.mark.parametrize("what", ["a resize", "a demotion"])
def test_what_waits_at_a_barrier_for_a_record_that_is_refused_comes_about_in_a_later_term(what: str) -> None:
    async def main() -> None:
        rig = rig_by_majority(Proof())
        async with rig.running() as mirror:
            await mirror.write(0, memoryview(DATA))
            for node in "bc":
                await rig.nodes[node].keeper.promise(FAILED)
                rig.nodes[node].link.cut()
            async with trio.open_nursery() as nursery:
                if what == "a resize":
                    nursery.start_soon(mirror.resize, 2 * mirror.size_bytes)
                    wanted = 2 * mirror.size_bytes
                else:
                    nursery.start_soon(mirror.demote, "b")
                await rig.until(lambda: bool(mirror.excluding))
                for node in "bc":
                    rig.nodes[node].link.is_cut = False
            assert rig.cluster.truth.term.number > FAILED.number
            if what == "a resize":
                assert mirror.size_bytes == wanted
                await rig.whole()
                await mirror.write(wanted - BLOCK_BYTES, memoryview(DATA))
            else:
                assert rig.cluster.truth.primary is None and mirror.ended.is_set()

    run(main)


def test_a_flush_under_way_fails_where_it_begins_anew_with_a_leg_that_may_lack_what_was_acknowledged() -> None:
    async def main() -> None:
        rig = rig_by_majority(Proof())
        async with rig.running() as mirror, trio.open_nursery() as nursery:
            failures: list[OSError] = []
            flush, may_flush = rig.store("b").flush, trio.Event()

            async def slow() -> None:
                await may_flush.wait()
                await flush()

            @nursery.start_soon
            async def client() -> None:
                await mirror.write(0, memoryview(DATA))
                rig.store("b").flush = slow  # type: ignore[method-assign]
                try:
                    await mirror.flush()
                except OSError as error:
                    failures.append(error)

            await rig.until(lambda: mirror.flushes._flushing)
            await cut_off(rig)
            rig.intact = "bc"
            may_flush.set()
            await rig.whole()
            await rig.until(lambda: bool(failures))
            assert failures[0].errno == errno.EIO

    run(main)


def test_a_write_that_waits_fails_where_others_have_gone_on() -> None:
    async def main() -> None:
        proof = Proof(refusals=1)
        proof.number = errno.ESTALE
        rig = rig_by_majority(proof)
        async with rig.running() as mirror, trio.open_nursery() as nursery:

            @nursery.start_soon
            async def client() -> None:
                with pytest.raises(OSError, match="not the primary any more"):
                    await mirror.write(0, memoryview(DATA))

            await cut_off(rig)
            await mirror.ended.wait()

    run(main)
