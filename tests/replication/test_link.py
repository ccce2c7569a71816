"""A leg on a peer: the contract, and what happens when the connection, the replica or its term goes."""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from nbd.tls import client_context, server_context
from replication.link import RemoteLeg
from replication.membership import Term
from tests.nbd.certificates import Authority
from tests.replication.leg_contract import Rig, TerraceLegContract
from tests.replication.linked import (
    INFO,
    MEMBERSHIP,
    Contexts,
    Told,
    data,
    decode_extents,
    linked,
    run,
    until,
)


class TestRemoteLeg(TerraceLegContract):
    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Rig]:
        async with linked() as link:
            yield Rig(link.leg, link.store)


class TestRemoteLegWhoseStoreWaits(TerraceLegContract):
    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Rig]:
        async with linked() as link:
            link.store.blocks = True
            yield Rig(link.leg, link.store)


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Contexts:
    authority = Authority(tmp_path_factory.mktemp("link"))
    pair = authority.issue("server", server=True)
    return server_context(pair.certificate, pair.key), client_context(Path(authority.path))


class TestRemoteLegOverTls(TerraceLegContract):
    @pytest.fixture(autouse=True)
    def _with_tls(self, contexts: Contexts) -> None:
        self.contexts = contexts

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Rig]:
        async with linked(tls=self.contexts) as link:
            yield Rig(link.leg, link.store)


def pattern(sequence: int) -> int:
    return sequence % 250 + 1


def test_after_a_lost_connection_exactly_what_is_missing_is_sent_again_in_its_order() -> None:
    async def body() -> None:
        async with linked() as link:
            told, sequence = Told(), 0
            for round_ in range(20):
                for _ in range(40):
                    sequence += 1
                    link.leg.submit(sequence, [data(0, pattern(sequence), 16 << 10)], told.of(sequence))
                    if sequence % 7 == round_ % 7:
                        await trio.lowlevel.checkpoint()
                link.network.cut()
            await link.leg.flush()
            await until(lambda: len(told.calls) == sequence)
            assert told.done == list(range(1, sequence + 1))
            written = [fill for _, fill, *_ in (entry for entry in link.store.log if entry[0] == 0)]
            assert written == [pattern(one) for one in range(1, sequence + 1)], "none twice, none left out"
            assert link.leg.resumptions >= 1 and link.leg.failure is None

    run(body)


def test_a_replica_that_ends_each_session_at_once_is_not_dialled_without_a_pause() -> None:
    async def body() -> None:
        async with linked() as link:
            with trio.move_on_after(1.5):
                seen = -1
                while True:
                    if link.leg.resumptions != seen:
                        seen = link.leg.resumptions
                        link.network.cut()
                    await trio.sleep(0.001)
            assert 3 <= link.leg.resumptions <= 9 and link.leg.failure is None
            await link.leg.flush()

    run(body)


def test_what_was_applied_while_the_connection_was_gone_is_done_and_not_sent_again() -> None:
    async def body() -> None:
        async with linked() as link:
            told = Told()
            link.store.blocks, link.store.gate = True, trio.Event()
            for sequence in (1, 2, 3):
                link.leg.submit(sequence, [data(0, sequence)], told.of(sequence))
            await until(lambda: link.store.waiting)
            link.network.is_down = True
            link.network.cut()
            link.store.gate.set()
            await until(lambda: link.network.replica.applied == 3)
            assert told.calls == []
            link.network.is_down = False
            await until(lambda: told.done == [1, 2, 3])
            link.leg.submit(4, [data(0, 4)], told.of(4))
            await until(lambda: told.done == [1, 2, 3, 4])
            assert [fill for _, fill, _ in link.store.log] == [1, 2, 3, 4]
            assert link.leg.failure is None and link.leg.resumptions == 1

    run(body)


def test_a_batch_that_was_cut_in_the_middle_is_applied_again_from_its_beginning() -> None:
    async def body() -> None:
        async with linked() as link:
            told = Told()
            long = data(0, 5, 4 << 20)
            link.leg.submit(1, [long], told.of(1))  # far more than a socket holds
            await until(lambda: link.store.log)
            assert told.calls == []
            link.network.cut()
            link.leg.submit(2, [data(0, 6)], told.of(2))
            await until(lambda: told.done == [1, 2])
            assert link.store.image[: 4 << 20] == bytes([6]) * 4096 + bytes([5]) * ((4 << 20) - 4096)

    run(body)


def test_requests_keep_their_place_between_batches_and_are_not_done_twice_over_a_lost_connection() -> None:
    async def body() -> None:
        async with linked() as link:
            told = Told()
            link.store.gate = trio.Event()
            link.leg.submit(1, [data(0, 1)], told.of(1))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(link.leg.snapshot, "s")
                await until(lambda: link.store.waiting)
                link.leg.submit(2, [data(0, 2)], told.of(2))
                nursery.start_soon(lambda: link.leg.accept(MEMBERSHIP.next_epoch(), inconsistent=True))
                await trio.testing.wait_all_tasks_blocked()
                link.leg.submit(3, [data(0, 3)], told.of(3))
                link.network.cut()
                await trio.testing.wait_all_tasks_blocked()
                link.store.gate.set()
            await link.leg.resize(16 << 20)
            await until(lambda: told.done == [1, 2, 3])
            assert link.leg.resumptions == 1
            assert link.store.log == [
                (0, 1, 4096), ("snapshot", "s"), (0, 2, 4096), ("accept", 1, True), (0, 3, 4096), ("resize", 16 << 20),
            ]  # fmt: skip

    run(body)


def test_a_replica_that_was_killed_does_not_know_what_it_has_and_that_is_the_end_of_the_leg() -> None:
    async def body() -> None:
        async with linked() as link:
            told = Told()
            link.leg.submit(1, [data(0, 1)], told.of(1))
            await until(lambda: told.done == [1])
            link.network.restart()
            link.leg.submit(2, [data(0, 2)], told.of(2))
            await until(lambda: link.leg.failure)
            assert link.leg.failure is not None and link.leg.failure.errno == errno.ENOTRECOVERABLE
            assert "was restarted" in str(link.leg.failure)
            await until(lambda: told.failed == [2])
            assert link.store.image[0] == 1

    run(body)


def test_a_replica_that_was_stopped_and_started_again_in_time_goes_on() -> None:
    async def body() -> None:
        async with linked() as link:
            told = Told()
            for sequence in range(1, 5):
                link.leg.submit(sequence, [data(0, sequence)], told.of(sequence))
            await until(lambda: told.done == [1, 2, 3, 4])
            assert not link.keeper.clean
            await link.network.replica.stop()
            assert link.keeper.clean and link.keeper.record.position is not None
            assert link.store.log[-1] == ("flush", 4)
            link.network.restart()
            link.leg.submit(5, [data(0, 5)], told.of(5))
            await until(lambda: told.done == [1, 2, 3, 4, 5])
            assert link.leg.failure is None and not link.keeper.clean

    run(body)


def test_a_leg_that_cannot_be_reached_fails_when_its_time_is_over_and_not_before() -> None:
    async def body() -> None:
        async with linked(timeout_s=0.4) as link:
            told = Told()
            link.network.is_down = True
            link.network.cut()
            began = trio.current_time()
            await until(lambda: link.leg.silent_since is not None)
            link.leg.submit(1, [data(0, 1)], told.of(1))
            await until(lambda: told.calls)
            assert 0.39 <= trio.current_time() - began < 3
            assert link.leg.failure is not None and link.leg.failure.errno == errno.ETIMEDOUT
            assert "pool/vol on b" in str(link.leg.failure)
            assert told.failed == [1] and link.leg.queued_bytes == 0

    run(body)


def test_a_replica_whose_storage_hangs_is_silent_and_one_that_is_idle_is_not() -> None:
    async def body() -> None:
        async with linked(timeout_s=0.4) as link:
            await trio.sleep(0.8)
            assert link.leg.failure is None, "pings are answered"
            told = Told()
            link.store.blocks = True
            link.store.gate = trio.Event()
            link.leg.submit(1, [data(0, 1)], told.of(1))
            await until(lambda: told.failed == [1])
            assert link.leg.failure is not None and link.leg.failure.errno == errno.ETIMEDOUT

    run(body)


def test_a_slow_flush_is_worked_on_and_no_silence() -> None:
    async def body() -> None:
        async with linked(timeout_s=1.5) as link:
            link.store.flush_gate = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(link.leg.flush)
                await trio.sleep(2.5)
                assert link.leg.failure is None
                told = Told()
                link.leg.submit(1, [data(0, 1)], told.of(1))
                await until(lambda: told.done == [1])
                link.store.flush_gate.set()
            assert link.store.log == [(0, 1, 4096), ("flush", 0)], "later writes don't wait for a flush"

    run(body)


def test_a_failing_disk_of_the_replica_ends_the_leg_with_its_error() -> None:
    async def body() -> None:
        async with linked() as link:
            told = Told()
            link.store.failing = OSError(errno.ENOSPC, "the pool is full")
            link.leg.submit(1, [data(0, 1)], told.of(1))
            await until(lambda: told.failed == [1])
            assert link.leg.failure is not None and link.leg.failure.errno == errno.ENOSPC
            assert "the pool is full" in str(link.leg.failure)

    run(body)


def test_a_failed_request_is_answered_and_the_leg_goes_on() -> None:
    async def body() -> None:
        async with linked() as link:
            link.store.flush_gate = trio.Event()
            link.store.failing = OSError(errno.EIO, "a disk says no")
            link.store.flush_gate.set()
            with pytest.raises(OSError, match="a disk says no"):
                await link.leg.flush()
            link.store.failing = None
            await link.leg.flush()
            for refused in (link.leg.read(1 << 40, 4096, memoryview(bytearray(4096))), link.leg.checks(0, 1 << 40)):
                with pytest.raises(OSError) as raised:
                    await refused
                assert raised.value.errno == errno.EINVAL
            assert link.leg.failure is None

    run(body)


@pytest.mark.parametrize(
    "ranges", [[], [(0, 0)], [(1 << 63, 4096)], [(0, 1 << 63)], [(8192, 4096), (0, 4096)], [(0, 8192), (4096, 8192)]]
)
def test_a_peer_that_cannot_be_right_of_what_is_mapped_loses_its_session(ranges: list[tuple[int, int]]) -> None:
    async def body() -> None:
        async with linked() as link:

            async def mapped(offset: int, length: int) -> list[tuple[int, int]]:
                await trio.lowlevel.checkpoint()
                return ranges

            link.store.mapped = mapped  # type: ignore[method-assign]
            with pytest.raises(OSError, match="MAPPED") as raised:
                await link.leg.mapped(0, 1 << 20)
            assert raised.value.errno == errno.EPROTO
            assert link.leg.failure is not None and "pool/vol on b" in str(link.leg.failure)

    run(body)


def test_a_higher_term_ends_the_leg_with_estale_and_an_idle_one_too() -> None:
    async def body() -> None:
        async with linked() as link:
            link.keeper.promise(Term(4, "b" * 16))
            await until(lambda: link.leg.failure)
            assert link.leg.failure is not None and link.leg.failure.errno == errno.ESTALE
            with pytest.raises(OSError) as raised:
                leg = RemoteLeg(link.network.connect, INFO, MEMBERSHIP, timeout_s=1, decode_extents=decode_extents)
                await leg.open(link.nursery)
            assert raised.value.errno == errno.ESTALE
            assert "has promised term 4" in str(raised.value)

    run(body)


def test_a_leg_that_is_closed_leaves_its_replica_clean() -> None:
    async def body() -> None:
        async with linked() as link:
            told = Told()
            link.leg.submit(9, [data(0, 1)], told.of(9))
            await until(lambda: told.done == [9])
            link.leg.close()
            await until(lambda: link.keeper.clean)
            assert link.keeper.record.position is not None and link.keeper.record.position.sequence == 9
            assert link.network.errors == []

    run(body)


def test_a_callback_may_close_the_leg_or_submit() -> None:
    async def body() -> None:
        async with linked() as link:
            told = Told()

            def close(error: OSError | None) -> None:
                told.of(1)(error)
                link.leg.submit(4, [data(0, 4)], told.of(4))
                link.leg.close()
                link.leg.submit(5, [data(0, 5)], told.of(5))

            link.leg.submit(1, [data(0, 1)], close)
            for sequence in (2, 3):
                link.leg.submit(sequence, [data(0, sequence)], told.of(sequence))
            await until(lambda: len(told.calls) == 5)
            assert told.done == [1] and sorted(told.failed) == [2, 3, 4, 5]

    run(body)


@pytest.mark.parametrize("when_s", [0.0, 0.0005, 0.002, 0.01])
def test_a_cancelled_nursery_leaves_no_callback_uncalled(when_s: float) -> None:
    async def body() -> None:
        told, submitted = Told(), 0
        with trio.move_on_after(when_s):
            async with linked() as link:
                for sequence in range(1, 100):
                    submitted = sequence
                    link.leg.submit(sequence, [data(0, sequence, 256 << 10)], told.of(sequence))
                    if sequence % 10 == 0:
                        await trio.sleep(0.0002)
                await trio.sleep_forever()
        await trio.sleep(0.01)
        assert [sequence for sequence, _ in told.calls] == list(range(1, submitted + 1))

    run(body)


def test_more_requests_than_the_replica_takes_at_a_time_wait_their_turn() -> None:
    async def body() -> None:
        async with linked() as link:
            link.store.flush_gate = trio.Event()
            ended = []

            async def flush() -> None:
                await link.leg.flush()
                ended.append(1)

            async with trio.open_nursery() as nursery:
                for _ in range(300):
                    nursery.start_soon(flush)
                await trio.testing.wait_all_tasks_blocked()
                link.store.flush_gate.set()
            assert len(ended) == 300

    run(body)


@pytest.mark.parametrize("seed", range(25))
def test_whatever_happens_each_callback_is_called_once_in_order_and_what_it_says_is_true(seed: int) -> None:
    """Cuts, slow storage, replicas that stop, start again, are killed or promise a higher term, and closing."""
    rng = random.Random(seed)

    async def body() -> None:
        async with linked(timeout_s=0.3) as link:
            told, sequence, asked = Told(), 0, 0
            submitted: list[int] = []
            store = link.store
            ended: list[str] = []

            async def ask(name: str) -> None:
                with suppress(OSError):
                    await (link.leg.snapshot(name) if rng.random() < 0.5 else link.leg.flush())
                ended.append(name)

            async with trio.open_nursery() as nursery:
                for _ in range(rng.randrange(20, 120)):
                    what = rng.random()
                    if what < 0.6:
                        sequence += rng.randrange(1, 3)
                        size = rng.choice([4096, 4096, 16384, 128 << 10, 700 << 10]) // 4096 * 4096
                        submitted.append(sequence)
                        link.leg.submit(sequence, [data(0, pattern(sequence), size)], told.of(sequence))
                    elif what < 0.7:
                        asked += 1
                        nursery.start_soon(ask, str(asked))
                    elif what < 0.75:
                        link.network.cut()
                    elif what < 0.8:
                        store.blocks = rng.random() < 0.5
                    elif what < 0.82:
                        await link.network.replica.stop()
                        link.network.restart()
                    elif what < 0.825:
                        link.network.restart()
                    elif what < 0.83:
                        link.keeper.promise(Term(4, "b" * 16))
                    elif what < 0.835:
                        link.leg.close()
                    else:
                        await trio.sleep(rng.choice([0, 0, 0.001]))
                if rng.random() < 0.5:
                    link.leg.close()
            await until(lambda: len(told.calls) >= len(submitted))
            assert len(ended) == asked and link.leg.queued_bytes == 0
            calls = [call for call, _ in told.calls]
            assert calls == submitted
            assert told.done == calls[: len(told.done)], "after a failure nothing is done"
            # What was done is applied, in order; what is applied twice is a resumed batch, and comes in order again.
            fills = [entry[1] for entry in store.log if entry[0] == 0]
            for one in told.done:
                assert pattern(one) in fills
            if told.done and told.done == calls:
                assert store.image[0] == pattern(calls[-1])

    run(body)
