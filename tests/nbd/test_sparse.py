"""Long READs over zeroes: what is told as a hole, and what is read."""

from __future__ import annotations

import errno

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from nbd import wire
from nbd.sparse import CHUNK_BYTES, HOLE_BYTES, Piece, next_pieces, teller_of
from tests.nbd.client import attached, run
from tests.nbd.memory import GRAIN, MemoryExport, SparseExport

SIZE = 4 << 20
both_speeds = pytest.mark.parametrize("slow", [False, True], ids=["at-once", "slow"])
chunked_forms = pytest.mark.parametrize("form", ["structured", "extended"])


def export_with(*data: tuple[int, int], slow: bool = False) -> SparseExport:
    """Zeroes, but for these (offset, length)."""
    export = SparseExport(size_bytes=SIZE, slow=slow)
    for offset, length in data:
        export.data[offset : offset + length] = b"x" * length
    return export


@given(
    st.lists(st.tuples(st.integers(0, SIZE - 1), st.sampled_from([1, 4096, 65_536, 300_000])), max_size=12),
    st.integers(0, SIZE - 1),
    st.integers(1, SIZE),
    st.sampled_from([CHUNK_BYTES, 1 << 20]),
)
def test_pieces_cover_the_range_once_tell_only_zeroes_and_hold_no_more_data_than_a_step(
    data: list[tuple[int, int]], offset: int, length: int, step: int
) -> None:
    export = export_with(*((at, min(size, SIZE - at)) for at, size in data))
    at, end = offset, min(SIZE, offset + length)
    while at < end:
        pieces = next_pieces(teller_of(export), at, end, step)
        assert sum(stop - start for start, stop, is_hole in pieces if not is_hole) <= step
        for start, stop, is_hole in pieces:
            assert start == at < stop <= end
            if is_hole:
                assert stop - start >= HOLE_BYTES and not any(export.data[start:stop])
            at = stop
        assert at == end or at % step == 0 or pieces[-1].is_hole


def test_a_hole_is_told_as_a_whole_however_long_and_short_ones_are_data() -> None:
    export = export_with((0, GRAIN), (SIZE - GRAIN, GRAIN))
    first = next_pieces(teller_of(export), 0, SIZE)
    assert first == [Piece(0, GRAIN, False), Piece(GRAIN, SIZE - GRAIN, True)]
    assert next_pieces(teller_of(export), SIZE - GRAIN, SIZE) == [Piece(SIZE - GRAIN, SIZE, False)]
    export = export_with((0, GRAIN), (HOLE_BYTES, GRAIN))
    assert next_pieces(teller_of(export), 0, 2 * HOLE_BYTES) == [Piece(0, 2 * HOLE_BYTES, False)]


def test_an_export_that_cannot_tell_is_read() -> None:
    unknown = export_with()
    unknown.unknown = True
    for export in (MemoryExport(size_bytes=SIZE), unknown):
        assert next_pieces(teller_of(export), 100, SIZE) == [Piece(100, CHUNK_BYTES, False)]


@chunked_forms
@both_speeds
def test_a_long_read_of_nothing_is_one_chunk_of_a_few_bytes(form: str, slow: bool) -> None:
    async def test() -> None:
        export = export_with(slow=slow)
        async with attached(export, form=form) as (client, served):
            for offset, length in [(0, SIZE), (1, SIZE - 2), (4096, CHUNK_BYTES + 1)]:
                reply = await client.ask(wire.CMD_READ, offset, length)
                assert reply.holes == ((offset, length),) and reply.data == bytes(length)
                assert [(flags, kind) for flags, kind, _ in reply.chunks] == [(1, wire.REPLY_TYPE_OFFSET_HOLE)]
            assert {name for name, _, _ in export.calls} == {"holes_now"}
            (connection,) = served.server.status().connections
            assert connection.counters.reads == 3 and connection.counters.read_bytes == SIZE * 2 - 2 + CHUNK_BYTES + 1

    run(test)


@both_speeds
def test_simple_replies_and_df_have_the_zeroes(slow: bool) -> None:
    async def test() -> None:
        async with attached(export_with(slow=slow)) as (client, _):
            assert (await client.ask(wire.CMD_READ, 0, SIZE)).data == bytes(SIZE)
        async with attached(export_with(slow=slow), form="structured") as (client, _):
            reply = await client.ask(wire.CMD_READ, 0, SIZE, flags=wire.CMD_FLAG_DF)
            assert reply.data == bytes(SIZE) and not reply.holes

    run(test)


@chunked_forms
def test_where_the_map_is_not_at_hand_the_read_brings_it_and_the_rest_is_told(form: str) -> None:
    async def test() -> None:
        export = export_with((0, GRAIN), slow=True)
        export.unknown = True
        plain = export.read

        async def read(offset: int, length: int, into: memoryview) -> None:
            await plain(offset, length, into)
            export.unknown = False

        export.read = read  # type: ignore[method-assign]
        async with attached(export, form=form) as (client, _):
            reply = await client.ask(wire.CMD_READ, 0, SIZE)
            assert reply.data == export.data and reply.holes == ((1 << 20, SIZE - (1 << 20)),)

    run(test)


@chunked_forms
def test_a_hole_that_is_written_while_the_read_waits_for_its_client_is_read(form: str) -> None:
    """What the map says is used at once: an answer is as new as its chunk, not as old as the READ."""

    async def test() -> None:
        export = export_with((0, 3 << 20))
        async with attached(export, form=form) as (client, _):
            await client.request(wire.CMD_READ, 0, SIZE)
            await trio.sleep(0.05)  # the socket is full, with hundreds of kilobytes
            export.data[3 << 20 :] = b"y" * (1 << 20)
            reply = await client.reply()
            assert reply.data == export.data and not reply.holes

    run(test)


@chunked_forms
@both_speeds
def test_a_failing_map_is_an_error_and_the_connection_goes_on(form: str, slow: bool) -> None:
    async def test() -> None:
        export = export_with(slow=slow)
        export.fail = lambda operation, offset, length: errno.EIO if offset >= 1 << 20 else 0
        export.data[: 1 << 20] = b"x" * (1 << 20)
        async with attached(export, form=form) as (client, _):
            reply = await client.ask(wire.CMD_READ, 0, SIZE)
            assert reply.error == wire.EIO and len(reply.data) <= 1 << 20
            assert (await client.ask(wire.CMD_READ, 0, 512)).data == b"x" * 512

    run(test)
