"""The bypass: long streams go straight to base, durable before they are answered, and true whatever crashes."""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from unittest import mock

import pytest
import trio

from tests.simulation.machine import Disk, Machine, PowerCutError
from tests.simulation.oracle import Model, Op, read_all, require_sound
from tests.tiers.helpers import refusal
from tiers import Pool, TierError, Volume
from tiers.bypass import LEAST_BYTES, Bypass
from tiers.layout import BLOCK_BYTES, SLOT_BITS
from tiers.policy import Policy
from tiers.record import Kind

PIECE = 128 << 10
SIZE = 3 << 20
STREAMS = Policy(placement="base", stream_cutoff_bytes=256 << 10)


def machine_of(*disks: Disk, seed: int = 1) -> Machine:
    return Machine(disks or (Disk("fast", 60), Disk("base", 60)), seed=seed)


@contextlib.asynccontextmanager
async def opened(machine: Machine, policy: Policy = STREAMS) -> AsyncIterator[tuple[Pool, Volume, Bypass]]:
    async with machine.open() as pool:
        volume = pool._engine.volume_named("v") or await pool.create_volume("v", SIZE)
        volume.policy = policy
        yield pool, volume, pool._engine.bypass


def piece(number: int, length: int = PIECE) -> bytes:
    """Every third can't be compressed."""
    if number % 3 == 2:
        return random.Random(number).randbytes(length)
    return (number + 1).to_bytes(8, "little") * (length // 8)


async def stream(volume: Volume, count: int, first: int = 0) -> None:
    """What a connection does with a stream."""
    for number in range(first, first + count):
        if not volume.write_now([(number * PIECE, piece(number))]):
            await volume.write(number * PIECE, piece(number))


def tier_at(volume: Volume, offset: int) -> str:
    entry = volume.entry_now(offset // BLOCK_BYTES)
    assert entry is not None
    return volume._segments[entry[0] >> SLOT_BITS].device.tier


def test_a_stream_goes_to_base_once_it_is_long_and_is_durable_when_it_is_answered() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume, bypass):
            await stream(volume, 20)
            assert [tier_at(volume, number * PIECE) for number in range(20)] == ["fast"] * 2 + ["base"] * 18
            assert bypass.written_bytes == 18 * PIECE
            assert pool._engine.client_written_bytes == 20 * PIECE
            await volume.flush()
            machine.stop()
        machine.power_cut()
        async with machine.open() as pool:
            assert (await read_all(pool.volume("v")))[: 20 * PIECE] == b"".join(map(piece, range(20)))
            await require_sound(pool)

    machine.run(main)


def kind_at(volume: Volume, offset: int) -> Kind:
    entry = volume.entry_now(offset // BLOCK_BYTES)
    assert entry is not None
    return volume._segments[entry[0] >> SLOT_BITS].kind


def test_what_can_be_compressed_is_packed_on_its_way() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume, bypass):
            await stream(volume, 20)
            assert bypass.written_bytes == 18 * PIECE
            kinds = [kind_at(volume, number * PIECE) for number in range(2, 20)]
            assert kinds == [Kind.MOVED if number % 3 == 2 else Kind.PACKED for number in range(2, 20)]
            # A large write is packed in pieces; what is compressed and what isn't take turns.
            data = piece(0, 40 * BLOCK_BYTES) + piece(2, 70 * BLOCK_BYTES) + piece(1, 18 * BLOCK_BYTES)
            assert not volume.write_now([(20 * PIECE, data)])
            await volume.write(20 * PIECE, data)
            assert tier_at(volume, 20 * PIECE) == "base"
            written = b"".join(map(piece, range(20))) + data
            assert (await read_all(volume))[: len(written)] == written
            await volume.flush()
            machine.stop()
        machine.power_cut()
        async with machine.open() as pool:
            assert (await read_all(pool.volume("v")))[: len(written)] == written
            await require_sound(pool)
            live = pool._engine.segments.live
            assert live == len(written) // BLOCK_BYTES
            assert pool._engine.segments.saved > live // 3

    machine.run(main)


def test_a_stream_whose_policy_says_so_is_not_packed() -> None:
    machine = machine_of()
    policy = Policy(placement="base", stream_cutoff_bytes=256 << 10, compression_level=0)

    async def main() -> None:
        async with opened(machine, policy) as (pool, volume, bypass):
            await stream(volume, 20)
            assert bypass.written_bytes == 18 * PIECE
            assert {kind_at(volume, number * PIECE) for number in range(2, 20)} == {Kind.MOVED}
            assert pool._engine.segments.saved == 0

    machine.run(main)


def test_a_base_with_tiny_segments_gets_what_no_frame_fits_into_raw() -> None:
    machine = machine_of(Disk("fast", 60), Disk("base", 200, 64 << 10))
    rng = random.Random(1)

    async def main() -> None:
        async with opened(machine) as (pool, volume, _):
            await stream(volume, 4)
            data = b"".join(rng.randbytes(2800) + bytes(BLOCK_BYTES - 2800) for _ in range(96))  # frames of 22 slots
            assert not volume.write_now([(4 * PIECE, data)])
            await volume.write(4 * PIECE, data)
            assert kind_at(volume, 4 * PIECE) is Kind.MOVED and tier_at(volume, 4 * PIECE) == "base"
            written = b"".join(map(piece, range(4))) + data
            assert (await read_all(volume))[: len(written)] == written
            await pool.checkpoint()
            await require_sound(pool)

    machine.run(main)


def test_what_was_answered_survives_a_kill_without_a_flush() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (_, volume, bypass):
            await stream(volume, 20)
            assert bypass.written_bytes
            machine.stop()
        machine.kill()
        async with machine.open() as pool:
            assert (await read_all(pool.volume("v")))[: 20 * PIECE] == b"".join(map(piece, range(20)))

    machine.run(main)


@pytest.mark.parametrize(
    "policy",
    [
        Policy(placement="fast", stream_cutoff_bytes=256 << 10),
        Policy(placement="auto", stream_cutoff_bytes=256 << 10),  # the fast tier is empty
        Policy(placement="base", stream_cutoff_bytes=0),
        Policy(placement="base", stream_cutoff_bytes=1 << 30),
    ],
    ids=["fast", "room on fast", "never", "too short"],
)
def test_other_streams_go_through_the_log(policy: Policy) -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine, policy) as (_, volume, bypass):
            await stream(volume, 20)
            assert bypass.written_bytes == 0
            assert {tier_at(volume, number * PIECE) for number in range(20)} == {"fast"}

    machine.run(main)


def test_scattered_small_unaligned_and_zero_writes_go_through_the_log() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (_, volume, bypass):
            for number in range(19, -1, -1):
                assert volume.write_now([(number * PIECE, piece(number))])
            await stream(volume, 8)
            before = bypass.written_bytes
            assert before
            small = LEAST_BYTES // 2
            await volume.write(8 * PIECE, piece(1, small))
            await volume.write(8 * PIECE + 512, piece(1, PIECE))
            assert not volume.write_now([(8 * PIECE, bytes(PIECE))])
            await volume.write(8 * PIECE, bytes(PIECE))
            assert bypass.written_bytes == before
            assert (await read_all(volume))[8 * PIECE : 9 * PIECE] == bytes(PIECE)

    machine.run(main)


def test_a_pool_of_one_tier_has_no_bypass() -> None:
    for disk in (Disk("fast", 60), Disk("base", 60)):
        machine = machine_of(disk)

        async def main(machine: Machine = machine) -> None:
            async with machine.open() as pool:
                volume = await pool.create_volume("v", SIZE)
                volume.policy = STREAMS
                await stream(volume, 20)
                assert not pool._engine.bypass.written_bytes

        machine.run(main)


def test_a_base_without_a_segment_to_spare_leaves_streams_to_the_log() -> None:
    machine = machine_of(Disk("fast", 60), Disk("base", 7))

    async def main() -> None:
        async with opened(machine) as (_, volume, bypass):
            await stream(volume, 20)
            assert bypass.written_bytes == 0
            assert (await read_all(volume))[: 20 * PIECE] == b"".join(map(piece, range(20)))

    machine.run(main)


def test_a_write_that_base_refuses_fails_and_changes_nothing_that_was_answered() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume, bypass):
            await stream(volume, 10)
            machine.media[1].on_write = lambda offset, length: (errno.EIO, 0)
            with pytest.raises(TierError) as caught:
                await stream(volume, 1, first=10)
            assert caught.value.errno == errno.EIO
            machine.media[1].on_write = lambda offset, length: None
            assert (await read_all(volume))[: 10 * PIECE] == b"".join(map(piece, range(10)))
            await stream(volume, 4, first=10)
            assert bypass.written_bytes > 8 * PIECE
            assert (await read_all(volume))[: 14 * PIECE] == b"".join(map(piece, range(14)))
            await pool.checkpoint()
            await require_sound(pool)

    machine.run(main)


def test_a_write_whose_record_an_unexpected_error_keeps_out_of_the_log_is_not_answered() -> None:
    machine = machine_of()
    answered: list[int] = []

    async def write(volume: Volume, number: int) -> None:
        with contextlib.suppress(TierError):
            await volume.write(number * PIECE, piece(number))
            answered.append(number)

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with trio.open_nursery() as clients, opened(machine) as (pool, volume, bypass):
                await stream(volume, 6)
                written = bypass.written_bytes

                volume._stream = (0, 8 * PIECE)
                with mock.patch.object(pool._engine, "append_record", side_effect=MemoryError):
                    for number in (6, 7):
                        clients.start_soon(write, volume, number)
                    await trio.sleep_forever()
        assert caught.group_contains(MemoryError)
        assert bypass.written_bytes == written
        assert not answered

    machine.run(main)


def test_a_write_that_is_on_its_way_while_a_checkpoint_freezes_stays_counted() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine, replace(STREAMS, compression_level=0)) as (pool, volume, bypass):
            await stream(volume, 6)
            await pool.checkpoint()
            space, segments = pool._engine.space, pool._engine.segments
            written = bypass.written_bytes
            gate = trio.Event()
            machine.media[1].before_sync = gate.wait
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream, volume, 1, 6)
                await trio.sleep(0.1)  # its copies wait for the flush
                before = space.charged
                nursery.start_soon(pool.checkpoint)
                await trio.sleep(0.1)  # frozen, and waiting for the same flush
                assert space.charged == before
                machine.media[1].before_sync = None
                gate.set()
            assert bypass.written_bytes == written + PIECE
            assert segments.pending == PIECE // BLOCK_BYTES, "of no checkpoint yet"
            assert space.charged >= segments.live + segments.pending

    machine.run(main)


def test_a_deleted_volume_gets_nothing() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume, _):
            await stream(volume, 6)
            gate = trio.Event()
            machine.media[1].before_sync = gate.wait

            async def write() -> None:
                with pytest.raises(TierError) as caught:
                    await stream(volume, 1, first=6)
                assert caught.value.errno == errno.ESTALE

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                await trio.sleep(0.1)
                async with trio.open_nursery() as inner:
                    inner.start_soon(pool.delete_volume, "v")
                    await trio.sleep(0.1)
                    gate.set()
            await pool.checkpoint()
            await require_sound(pool)

    machine.run(main)


def test_a_cancelled_write_returns_only_when_its_bytes_are_not_looked_at_any_more() -> None:
    machine = machine_of()

    async def main() -> None:
        async with opened(machine) as (pool, volume, _):
            await stream(volume, 6)
            gate = trio.Event()
            machine.media[1].before_sync = gate.wait
            buffers = [bytearray(piece(6)), bytearray(piece(7))]
            ended = []

            async def write(number: int, scope: trio.CancelScope) -> None:
                with scope:
                    await volume.write((6 + number) * PIECE, buffers[number])
                buffers[number][:] = bytes(PIECE)
                ended.append(number)

            scopes = [trio.CancelScope(), trio.CancelScope()]
            volume._stream = (0, 8 * PIECE)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write, 0, scopes[0])
                await trio.sleep(0.1)  # its round waits for the flush
                nursery.start_soon(write, 1, scopes[1])
                await trio.sleep(0.1)
                scopes[0].cancel()
                scopes[1].cancel()
                await trio.sleep(0.1)
                assert ended == [1]
                gate.set()
            assert ended == [1, 0]
            found = await read_all(volume)
            assert found[6 * PIECE : 7 * PIECE] in (piece(6), bytes(PIECE))
            assert found[7 * PIECE : 8 * PIECE] == bytes(PIECE)
            await require_sound(pool)

    machine.run(main)


def test_writes_that_wait_while_the_pool_closes_are_refused() -> None:
    machine = machine_of()
    refused = []

    async def main() -> None:
        async with trio.open_nursery() as nursery, opened(machine) as (_, volume, _bypass):
            await stream(volume, 6)
            gate = trio.Event()
            machine.media[1].before_sync = gate.wait

            async def write(number: int) -> None:
                with pytest.raises(TierError) as caught:
                    await volume.write(number * PIECE, piece(number))
                refused.append(caught.value.errno)

            volume._stream = (0, 8 * PIECE)
            nursery.start_soon(write, 6)
            await trio.sleep(0.1)  # its round waits for the flush
            nursery.start_soon(write, 7)
            await trio.sleep(0.1)
            gate.set()
            machine.media[1].before_sync = None
        assert refused and set(refused) <= {errno.EIO, errno.EROFS}
        async with machine.open() as pool:
            found = await read_all(pool.volume("v"))
            assert found[: 6 * PIECE] == b"".join(map(piece, range(6)))
            await require_sound(pool)

    machine.run(main)


@pytest.mark.parametrize("seed", range(24))
def test_a_power_cut_leaves_a_prefix_of_a_stream(seed: int) -> None:
    machine = crash_in_a_stream(seed)
    assert seed < 6 or machine.hits["bypass.copied"]


def crash_in_a_stream(seed: int) -> Machine:
    """Write a stream until the power goes, or the process dies, and judge what is left."""
    machine = machine_of(seed=seed)
    model = Model(SIZE)
    model.returned(Op("nothing"))

    async def main() -> None:
        with contextlib.suppress(PowerCutError):
            async with opened(machine) as (pool, volume, _):
                model.flushed(model.mark)
                machine.countdown = 3 + 7 * seed
                for number in range(24):
                    op = model.in_flight = Op(f"piece {number}", [(number * PIECE, piece(number))])
                    await stream(volume, 1, first=number)
                    model.in_flight = None
                    model.returned(op)
                    if number % 5 == 4:
                        mark = model.mark
                        await volume.flush()
                        model.flushed(mark)
        machine.disarm()
        everything = machine.rng.random() < 0.3
        if everything:
            machine.kill()
        else:
            machine.power_cut()
        async with machine.open() as pool:
            model.judge(await read_all(pool.volume("v")), everything=everything)
            await require_sound(pool)

    machine.run(main)
    return machine


def test_a_stream_that_comes_while_the_pool_is_being_closed_gets_an_error() -> None:
    machine = machine_of()
    told: list[int | None] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery, opened(machine) as (_, volume, bypass):
            await stream(volume, 5)

            async def go_on() -> None:
                with trio.fail_after(60):
                    told.append((await refusal(lambda: bypass.write(volume, 0, memoryview(piece(1))))).errno)

            machine.on_hit["close.sealed"] = lambda: nursery.start_soon(go_on)
        assert told == [errno.EIO]

    machine.run(main)
