"""A leg that has promised a term to a candidate that came to nothing comes back by a later term of the same primary."""

from __future__ import annotations

import errno

import pytest
import trio

from replication.leg import BLOCK_BYTES
from replication.membership import Membership, Term
from tests.replication.rig import Rig, run

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


def rig_with(proof: Proof) -> Rig:
    proof.rig = Rig(3, prove=proof)
    return proof.rig


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
