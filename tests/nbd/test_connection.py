"""The data path over a real socket, with a client that says exactly what a rule is about.

Tests run against an export that answers at once and one that always waits, as the two take
different ways through the connection.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trio

from nbd import wire
from nbd.connection import BATCH_WRITES
from nbd.listen import open_tcp, open_unix
from nbd.server import serve
from nbd.workshop import INBOX_BYTES, INLINE_READ_BYTES, Limits
from tests.nbd.client import Closed, RawClient, attached, info_bytes, request_bytes, run, serving
from tests.nbd.memory import ContextExport, MemoryExport, MemoryExports

SIZE = 1 << 20
both_speeds = pytest.mark.parametrize("slow", [False, True], ids=["at-once", "slow"])
all_forms = pytest.mark.parametrize("form", ["simple", "structured", "extended"])


def pattern(length: int, seed: int = 1) -> bytes:
    return bytes((seed + i * 7 + (i >> 8)) & 0xFF for i in range(min(length, 65_536))) * (-(-length // 65_536) or 1)


@both_speeds
@all_forms
def test_what_was_written_is_read(slow: bool, form: str) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow)
        async with attached(export, form=form) as (client, served):
            for offset, length in [(0, 4096), (1, 1), (4095, 3), (SIZE - 513, 513), (100_000, 300_000)]:
                data = pattern(length)[:length]
                assert (await client.ask(wire.CMD_WRITE, offset, data=data)).error == 0
                reply = await client.ask(wire.CMD_READ, offset, length)
                assert reply.data == data
                assert (reply.structured, reply.extended) == (form != "simple", form == "extended")
            (connection,) = served.server.status().connections
            assert connection.counters.requests == 10 and connection.counters.read_bytes == 304_613
            assert connection.counters.written_bytes == 304_613
            await client.disconnect()

    run(test)


@both_speeds
@all_forms
def test_a_batch_of_requests_gets_one_reply_each(slow: bool, form: str) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow)
        async with attached(export, form=form) as (client, _):
            batch = b""
            count = 300
            for i in range(count):
                if i % 3:
                    batch += client.encode(wire.CMD_WRITE, 1000 + i, i * 512, data=pattern(512, i)[:512])
                else:
                    batch += client.encode(wire.CMD_READ, 1000 + i, SIZE - 512, 512)
            await client.send(batch)
            replies = [await client.reply() for _ in range(count)]
            assert sorted(reply.cookie for reply in replies) == list(range(1000, 1000 + count))
            assert not any(reply.error for reply in replies)
            for i in range(count):
                if i % 3:
                    assert export.data[i * 512 : (i + 1) * 512] == pattern(512, i)[:512]
            assert export.peak_running <= Limits().inflight_requests

    run(test)


def test_writes_that_arrive_together_are_one_call() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        batches: list[int] = []
        plain = export.write_now
        export.write_now = lambda writes: batches.append(len(writes)) or plain(writes)  # type: ignore[method-assign,func-returns-value]
        async with attached(export) as (client, _):
            count = BATCH_WRITES + 500
            await client.send(b"".join(request_bytes(wire.CMD_WRITE, i, i, data=b"x") for i in range(1, count + 1)))
            for _ in range(count):
                assert (await client.reply()).error == 0
            assert sum(batches) == count and max(batches) > 100 and max(batches) <= BATCH_WRITES

    run(test)


@all_forms
@both_speeds
def test_reads_up_to_the_maximum_payload_are_served(slow: bool, form: str) -> None:
    async def test() -> None:
        size = wire.MAX_PAYLOAD_BYTES + 4096
        export = MemoryExport(size_bytes=size, slow=slow)
        export.data[:] = pattern(size)[:size]
        async with attached(export, form=form) as (client, _):
            for length in (INLINE_READ_BYTES, INLINE_READ_BYTES + 1, wire.MAX_PAYLOAD_BYTES):
                reply = await client.ask(wire.CMD_READ, 1, length)
                assert reply.error == 0 and reply.data == export.data[1 : length + 1]
            reply = await client.ask(wire.CMD_READ, 0, wire.MAX_PAYLOAD_BYTES + 1)
            assert reply.error == (wire.EINVAL if form == "simple" else wire.EOVERFLOW)

    run(test)


@both_speeds
@all_forms
def test_writes_up_to_the_maximum_payload_are_served(slow: bool, form: str) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=wire.MAX_PAYLOAD_BYTES + 4096, slow=slow)
        header = 32 if form == "extended" else 28
        async with attached(export, form=form) as (client, _):
            for length in (INBOX_BYTES - header, INBOX_BYTES - header + 1, wire.MAX_PAYLOAD_BYTES):
                data = pattern(length, length)[:length]
                reply = await client.ask(wire.CMD_WRITE, 3, data=data, flags=wire.CMD_FLAG_FUA)
                assert reply.error == 0 and export.data[3 : length + 3] == data
                assert export.calls[-1] == ("flush", 0, 0)

    run(test)


def test_a_write_beyond_the_maximum_payload_is_drained_and_refused_without_memory() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=80 << 20)
        async with attached(export) as (client, _):
            length = wire.MAX_PAYLOAD_BYTES + 1
            reply = await client.ask(wire.CMD_WRITE, 0, data=bytes(length))
            assert reply.error == wire.EINVAL and export.calls == []
            assert (await client.ask(wire.CMD_READ, 0, 4)).data == bytes(4)
            # Four gigabytes are announced; nobody waits for memory for them, and leaving is fine.
            await client.request(wire.CMD_WRITE, 0, 0xFFFFFFFF)
            await client.send(bytes(1 << 20))

    run(test)


@both_speeds
@all_forms
def test_a_writes_payload_is_drained_before_its_error(slow: bool, form: str) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow)
        async with attached(export, form=form) as (client, _):
            # The payload looks like requests: taken for one it would disconnect us.
            poison = client.encode(wire.CMD_DISC, 9) * 400
            for data in (poison, poison * 200):
                assert (await client.ask(wire.CMD_WRITE, SIZE - 1, data=data)).error == wire.ENOSPC
                assert (await client.ask(wire.CMD_WRITE, 0, data=data, flags=wire.CMD_FLAG_DF)).error == wire.EINVAL
            export.read_only = True
            assert (await client.ask(wire.CMD_WRITE, 0, data=poison)).error == wire.EPERM
            assert not [call for call in export.calls if "write" in call[0]]
            assert (await client.ask(wire.CMD_READ, 0, 1)).error == 0

    run(test)


@both_speeds
def test_length_zero_does_not_disconnect(slow: bool) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow)
        async with attached(export, status=True) as (client, _):
            for command in (wire.CMD_READ, wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_CACHE, wire.CMD_WRITE_ZEROES):
                for flags in (0, wire.CMD_FLAG_FUA):
                    assert (await client.ask(command, 0, 0, flags=flags)).error == 0
            assert (await client.ask(wire.CMD_BLOCK_STATUS, 0, 0)).error == wire.EINVAL
            assert (await client.ask(wire.CMD_READ, 0, 1)).data == b"\0"

    run(test)


@both_speeds
def test_after_structured_replies_every_read_reply_is_structured_even_einval(slow: bool) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow)
        async with attached(export, form="structured") as (client, _):
            for offset, length, flags in [
                (0, 512, wire.CMD_FLAG_NO_HOLE),
                (0, 512, 0x8000),
                (SIZE, 1, 0),
                (0, 0, wire.CMD_FLAG_REQ_ONE),
                (0, 0, 0),
                (0, 0xFFFFFFFF, 0),
            ]:
                reply = await client.ask(wire.CMD_READ, offset, length, flags=flags)
                assert reply.structured
                assert [chunk[0] for chunk in reply.chunks] == [wire.REPLY_FLAG_DONE]

    run(test)


@all_forms
@both_speeds
def test_an_error_while_reading_is_reported_once_and_claims_no_data_that_was_not_read(slow: bool, form: str) -> None:
    async def test() -> None:
        def fail(operation: str, offset: int, length: int) -> int:
            return errno.EIO if "read" in operation and offset <= 2 << 20 < offset + length else 0

        export = MemoryExport(size_bytes=4 << 20, slow=slow, fail=fail)
        async with attached(export, form=form) as (client, _):
            for offset, length in [(2 << 20, 512), (0, 4 << 20)]:  # the second fails after 2 MiB were read
                reply = await client.ask(wire.CMD_READ, offset, length)
                assert reply.error == wire.EIO
                if form == "simple":
                    assert reply.data == b""
                    continue
                assert reply.message
                kinds = [kind for _, kind, _ in reply.chunks]
                assert kinds[:-1] == [wire.REPLY_TYPE_OFFSET_DATA] * (len(kinds) - 1)
                flags = [flag for flag, _, _ in reply.chunks]
                assert flags == [0] * (len(flags) - 1) + [wire.REPLY_FLAG_DONE]
                end = 0
                for _, _, payload in reply.chunks[
                    :-1
                ]:  # good chunks stand before the bad byte, in order, without a gap
                    assert struct.unpack_from(">Q", payload)[0] == end
                    end += len(payload) - 8
                assert end <= 2 << 20
            assert (await client.ask(wire.CMD_READ, 0, 512)).error == 0

    run(test)


@both_speeds
def test_long_structured_reads_come_in_chunks_that_cover_the_range_once(slow: bool) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=4 << 20, slow=slow)
        export.data[:] = bytes(range(256)) * (export.size_bytes // 256)
        async with attached(export, form="structured") as (client, _):
            for offset, length in [(0, 4 << 20), (100, (1 << 20) + 1), (4096, 256 << 10), (4096, (256 << 10) + 1)]:
                reply = await client.ask(wire.CMD_READ, offset, length)
                assert not reply.error
                at = offset
                for flag, kind, payload in reply.chunks:
                    assert kind == wire.REPLY_TYPE_OFFSET_DATA
                    assert struct.unpack_from(">Q", payload)[0] == at
                    assert payload[8:] == export.data[at : at + len(payload) - 8]
                    at += len(payload) - 8
                    assert flag == (wire.REPLY_FLAG_DONE if at == offset + length else 0)
                assert at == offset + length

    run(test)


def test_df_reads_come_in_one_content_chunk() -> None:
    async def test() -> None:
        async with attached(MemoryExport(size_bytes=4 << 20), form="structured") as (client, _):
            for length in (1, 65_536, 4 << 20):
                reply = await client.ask(wire.CMD_READ, 0, length, flags=wire.CMD_FLAG_DF)
                assert [kind for _, kind, _ in reply.chunks] == [wire.REPLY_TYPE_OFFSET_DATA]
                assert len(reply.data) == length
                assert struct.unpack_from(">Q", reply.chunks[0][2])[0] == 0

    run(test)


@both_speeds
def test_one_bad_write_does_not_fail_its_neighbours(slow: bool) -> None:
    async def test() -> None:
        def fail(operation: str, offset: int, length: int) -> int:
            return errno.ENOSPC if "write" in operation and offset == 8192 else 0

        export = MemoryExport(size_bytes=SIZE, slow=slow, fail=fail)
        async with attached(export) as (client, _):
            await client.send(
                b"".join(request_bytes(wire.CMD_WRITE, i, i * 4096, data=b"x" * 4096) for i in range(1, 6))
            )
            errors = {reply.cookie: reply.error for reply in [await client.reply() for _ in range(5)]}
            assert errors == {1: 0, 2: wire.ENOSPC, 3: 0, 4: 0, 5: 0}
            assert export.data[4096:8192] == b"x" * 4096 and export.data[8192:12288] == bytes(4096)

    run(test)


@both_speeds
def test_fua_counts_on_write_trim_and_write_zeroes_and_is_accepted_on_all(slow: bool) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow)
        async with attached(export, status=True) as (client, _):
            for command in (wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES):
                data = bytes(4096) if command == wire.CMD_WRITE else b""
                export.calls.clear()
                reply = await client.ask(command, 0, 4096, flags=wire.CMD_FLAG_FUA, data=data)
                assert reply.error == 0
                assert [name for name, _, _ in export.calls][1:] == ["flush"], "the write, then the flush"
            for command in (wire.CMD_READ, wire.CMD_CACHE, wire.CMD_BLOCK_STATUS):
                assert (await client.ask(command, 0, 512, flags=wire.CMD_FLAG_FUA)).error == 0
            assert (await client.ask(wire.CMD_FLUSH, flags=wire.CMD_FLAG_FUA)).error == 0

    run(test)


def test_fua_is_not_answered_before_its_flush_and_a_failed_flush_fails_it() -> None:
    async def test() -> None:
        hold = trio.Event()
        export = MemoryExport(size_bytes=SIZE, hold=hold)
        export.fail = lambda operation, offset, length: errno.EIO if operation == "flush" else 0
        async with attached(export) as (client, _):
            await client.request(wire.CMD_WRITE, 0, data=b"x" * 512, flags=wire.CMD_FLAG_FUA)
            with trio.move_on_after(0.05) as scope:
                await client.reply()
            assert scope.cancelled_caught
            assert export.data[:512] == b"x" * 512
            hold.set()
            assert (await client.reply()).error == wire.EIO

    run(test)


def test_flushes_that_arrive_together_share_one_flush() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        async with attached(export) as (client, served):
            fua = request_bytes(wire.CMD_WRITE, 77, 0, flags=wire.CMD_FLAG_FUA, data=b"y" * 512)
            await client.send(b"".join(request_bytes(wire.CMD_FLUSH, i) for i in range(1, 6)) + fua)
            assert {(await client.reply()).cookie for _ in range(6)} == {1, 2, 3, 4, 5, 77}
            assert [name for name, _, _ in export.calls] == ["write_now", "flush"]
            assert served.server.status().total.flushes == 5

    run(test)


def test_fast_zero_gets_enotsup_and_plain_zeroing_never_does() -> None:
    async def test() -> None:
        export = MemoryExport(
            size_bytes=SIZE, fail=lambda operation, *_: errno.EOPNOTSUPP if "zero" in operation else 0
        )
        async with attached(export) as (client, _):
            reply = await client.ask(wire.CMD_WRITE_ZEROES, 0, 4096, flags=wire.CMD_FLAG_FAST_ZERO)
            assert reply.error == wire.ENOTSUP
            assert (await client.ask(wire.CMD_WRITE_ZEROES, 0, 4096)).error == wire.EINVAL

    run(test)


def test_write_zeroes_reads_back_as_zeroes_to_the_byte_and_no_hole_is_passed_on() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        export.data[:] = b"\xff" * SIZE
        async with attached(export) as (client, _):
            assert (await client.ask(wire.CMD_WRITE_ZEROES, 1, 4097)).error == 0
            assert (await client.ask(wire.CMD_READ, 0, 4100)).data == b"\xff" + bytes(4097) + b"\xff\xff"
            assert (await client.ask(wire.CMD_WRITE_ZEROES, 0, 1, flags=wire.CMD_FLAG_NO_HOLE)).error == 0
            assert [name for name, _, _ in export.calls if "zero" in name] == ["zero", "zero_no_hole"]

    run(test)


def test_lengths_beyond_the_maximum_payload_are_fine_without_a_payload() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=40 << 20)
        async with attached(export, status=True) as (client, _):
            for command in (wire.CMD_TRIM, wire.CMD_WRITE_ZEROES, wire.CMD_CACHE, wire.CMD_BLOCK_STATUS):
                assert (await client.ask(command, 0, 40 << 20)).error == 0
                assert (await client.ask(command, 0, 0xFFFFFFFF)).error in (wire.EINVAL, wire.ENOSPC)
            assert (await client.ask(wire.CMD_READ, 0, 1)).error == 0

    run(test)


def test_block_status_tells_holes_in_one_chunk_and_req_one_gives_one_extent() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        async with attached(export, status=True) as (client, _):
            await client.ask(wire.CMD_WRITE, 8192, data=b"x" * 4096)
            reply = await client.ask(wire.CMD_BLOCK_STATUS, 4096, 16384)
            assert reply.extents == [(4096, 3), (4096, 0), (8192, 3)]
            reply = await client.ask(wire.CMD_BLOCK_STATUS, 4097, 100, flags=wire.CMD_FLAG_REQ_ONE)
            assert reply.extents == [(100, 3)]
            reply = await client.ask(wire.CMD_BLOCK_STATUS, 0, SIZE, flags=wire.CMD_FLAG_REQ_ONE)
            assert reply.extents == [(8192, 3)]
            assert (await client.ask(wire.CMD_BLOCK_STATUS, SIZE, 1)).error == wire.EINVAL

    run(test)


def test_block_status_gives_one_chunk_a_selected_context() -> None:
    async def test() -> None:
        export = ContextExport(size_bytes=SIZE)
        export.flags = {"t:diff:a": [0] * 256, "t:diff:b": [0xFFFFFFFF] * 256, "t:diff:c": [0] * 256}
        export.flags["t:diff:a"][2:4] = [1, 1]
        async with attached(export, status=("t:diff:b", "base:allocation", "t:diff:a")) as (client, _):
            reply = await client.ask(wire.CMD_BLOCK_STATUS, 4096, 16384)
            assert reply.statuses == {
                1: [(16384, 3)],
                2: [(16384, 0xFFFFFFFF)],
                3: [(4096, 0), (8192, 1), (4096, 0)],
            }
            reply = await client.ask(wire.CMD_BLOCK_STATUS, 8193, SIZE - 8193, flags=wire.CMD_FLAG_REQ_ONE)
            assert reply.statuses == {1: [(SIZE - 8193, 3)], 2: [(SIZE - 8193, 0xFFFFFFFF)], 3: [(8191, 1)]}

    run(test)


def test_base_allocation_need_not_be_among_the_contexts() -> None:
    async def test() -> None:
        export = ContextExport(size_bytes=SIZE, flags={"t:diff:a": [1] * 256})
        async with attached(export, status=["t:diff:a"]) as (client, _):
            assert (await client.ask(wire.CMD_BLOCK_STATUS, 0, SIZE)).statuses == {2: [(SIZE, 1)]}
            assert "extents" not in [name for name, _, _ in export.calls]

    run(test)


def test_a_context_that_went_away_fails_the_request_and_nothing_else() -> None:
    async def test() -> None:
        export = ContextExport(size_bytes=SIZE, flags={"t:diff:a": [1] * 256})
        async with attached(export, status=["base:allocation", "t:diff:a"]) as (client, served):
            assert (await client.ask(wire.CMD_BLOCK_STATUS, 0, SIZE)).error == 0
            del export.flags["t:diff:a"]
            reply = await client.ask(wire.CMD_BLOCK_STATUS, 0, SIZE)
            assert reply.error == wire.EINVAL and reply.message == "t:diff:a is gone" and len(reply.chunks) == 1
            assert (await client.ask(wire.CMD_READ, 0, 512)).error == 0
            # Without it, base:allocation is still to be had.
            other = await served.connect()
            await other.go(status=["base:allocation", "t:diff:a"])
            assert (await other.ask(wire.CMD_BLOCK_STATUS, 0, SIZE)).statuses == {1: [(SIZE, 3)]}

    run(test)


def test_block_status_without_a_negotiated_context_is_einval() -> None:
    async def test() -> None:
        async with attached(MemoryExport(), form="structured") as (client, _):
            assert (await client.ask(wire.CMD_BLOCK_STATUS, 0, 512)).error == wire.EINVAL

    run(test)


def test_a_resize_counts_at_once() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        async with attached(export) as (client, _):
            assert (await client.ask(wire.CMD_READ, SIZE - 512, 512)).error == 0
            export.size_bytes = SIZE // 2
            assert (await client.ask(wire.CMD_READ, SIZE - 512, 512)).error == wire.EINVAL
            assert (await client.ask(wire.CMD_WRITE, SIZE - 512, data=bytes(512))).error == wire.ENOSPC

    run(test)


def test_a_minimum_block_size_is_enforced() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, minimum_block_size=512)
        async with attached(export) as (client, _):
            assert (await client.ask(wire.CMD_WRITE, 1, data=b"x" * 512)).error == wire.EINVAL
            assert (await client.ask(wire.CMD_WRITE, 512, data=b"x" * 512)).error == 0
            assert (await client.ask(wire.CMD_READ, 512, 512)).data == b"x" * 512
            assert (await client.ask(wire.CMD_READ, 512, 511)).error == wire.EINVAL

    run(test)


@both_speeds
def test_disc_finishes_what_is_in_flight_and_gets_no_reply(slow: bool) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow, delay_s=0.05)
        async with attached(export) as (client, _):
            await client.send(
                request_bytes(wire.CMD_WRITE, 1, 0, data=b"z" * 4096)
                + request_bytes(wire.CMD_FLUSH, 2)
                + request_bytes(wire.CMD_DISC, 3)
                + request_bytes(wire.CMD_WRITE, 4, 8192, data=b"never" * 100)
            )
            assert {(await client.reply()).cookie for _ in range(2)} == {1, 2}
            await client.expect_end()
            assert export.data[:4096] == b"z" * 4096 and not any(export.data[8192:8700])

    run(test)


@both_speeds
def test_a_client_that_vanishes_leaves_its_complete_writes_and_nothing_running(slow: bool) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow, delay_s=0.02)
        async with attached(export) as (client, served):
            half = request_bytes(wire.CMD_WRITE, 2, 8192, data=b"y" * 4096)[:2000]
            await client.send(request_bytes(wire.CMD_WRITE, 1, 0, data=b"z" * 4096) + half)
            await client.stream.aclose()
            while served.server.status().connections:
                await trio.sleep(0.01)
            assert served.exports.open == 0
            assert export.data[:4096] == b"z" * 4096 and not any(export.data[8192:12288])

    run(test)


def test_garbage_drops_that_client_with_one_log_line_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with attached(MemoryExport()) as (client, served):
            other = await served.connect()
            await other.go()
            caplog.clear()
            await client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await client.expect_end()
            assert (await other.ask(wire.CMD_READ, 0, 1)).error == 0

    with caplog.at_level(logging.WARNING, "nbd"):
        run(test)
    (record,) = caplog.records
    assert "not an NBD request" in record.message and "unix client 1" in record.message


def test_a_bug_ends_its_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        good, bad = MemoryExport("good"), MemoryExport("bad")
        async with serving(good, bad) as served:
            other = await served.connect()
            await other.go("good")
            for slow in (False, True):
                bad.slow = slow

                def bug(operation: str, offset: int, length: int) -> int:
                    raise ZeroDivisionError

                bad.fail = bug
                client = await served.connect()
                await client.go("bad")
                await client.request(wire.CMD_READ, 0, 512)
                await client.expect_end()
            assert (await other.ask(wire.CMD_READ, 0, 512)).error == 0

    with caplog.at_level(logging.ERROR, "nbd"):
        run(test)
    assert [record.message for record in caplog.records] == [
        f"unix client 2 (process {os.getpid()}): a bug ended this connection",
        f"unix client 3 (process {os.getpid()}): a bug ended this connection",
    ]


def test_what_waits_is_bounded_in_number_and_the_rest_follows() -> None:
    async def test() -> None:
        hold = trio.Event()
        export = MemoryExport(size_bytes=SIZE, slow=True, hold=hold)
        limits = Limits(inflight_requests=8)
        async with attached(export, limits=limits) as (client, _):
            requests = b"".join(request_bytes(wire.CMD_WRITE, i, i * 512, data=b"x" * 512) for i in range(1, 31))
            for i in range(31, 61):
                requests += client.encode(wire.CMD_READ, i, 0, 512) + request_bytes(wire.CMD_FLUSH, i + 100)
            await client.send(requests)
            await trio.sleep(0.05)
            # Flushes of one pass share a call, so fewer calls than requests wait.
            assert 1 < export.running <= 8
            hold.set()
            cookies = {(await client.reply()).cookie for _ in range(90)}
            assert cookies == {*range(1, 61), *range(131, 161)}
            assert export.peak_running <= 8

    run(test)


def test_what_waits_is_bounded_in_bytes() -> None:
    async def test() -> None:
        hold = trio.Event()
        export = MemoryExport(size_bytes=SIZE, slow=True, hold=hold)
        async with attached(export, limits=Limits(inflight_bytes=256 << 10)) as (client, _):
            for i in range(1, 9):
                await client.request(wire.CMD_READ, 0, 100 << 10, cookie=i)
            await trio.sleep(0.05)
            assert export.running == 2
            hold.set()
            assert {(await client.reply()).cookie for _ in range(8)} == set(range(1, 9))

    run(test)


@both_speeds
@pytest.mark.alone
def test_a_client_that_never_reads_its_replies_is_not_read_and_nobody_else_notices(slow: bool) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow)
        limits = Limits(inflight_bytes=1 << 20)
        async with attached(export, limits=limits) as (client, served):
            sent = 0
            with trio.move_on_after(0.3):
                while True:
                    await client.send(request_bytes(wire.CMD_READ, 1, 0, 64 << 10) * 100)
                    sent += 100
            (status,) = served.server.status().connections
            # The socket's buffers, the bound, and a batch: far from what was asked for.
            assert status.counters.read_bytes < 16 << 20 < sent * (64 << 10)
            other = await served.connect()
            await other.go()
            with trio.fail_after(1):
                assert (await other.ask(wire.CMD_READ, 0, 512)).error == 0

    run(test)


@pytest.mark.alone
def test_a_busy_connection_yields_to_the_others() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, recording=False)
        async with serving(export) as served, trio.open_nursery() as nursery:
            busy = await served.connect()
            await busy.go()

            async def hammer() -> None:
                requests = request_bytes(wire.CMD_READ, 1, 0, 4096) * 64
                while True:
                    await busy.send(requests)
                    await busy.receive(64 * (16 + 4096))

            nursery.start_soon(hammer)
            other = await served.connect()
            await other.go()
            for _ in range(50):
                with trio.fail_after(0.5):
                    assert (await other.ask(wire.CMD_READ, 0, 512)).error == 0
            nursery.cancel_scope.cancel()

    run(test)


def test_idle_connections_hold_no_buffers() -> None:
    async def test() -> None:
        async with serving() as served:
            clients = [await served.connect() for _ in range(20)]
            for client in clients:
                await client.go()
                assert (await client.ask(wire.CMD_READ, 0, 512)).error == 0
                await client.send(request_bytes(wire.CMD_READ, 1, 0, 512)[:20])  # half a header
            await trio.sleep(0.05)
            assert all(connection._bench is None for connection in served.server._connections)
            for client in clients:
                await client.send(client.encode(wire.CMD_READ, 1, 0, 512)[20:])
                assert len((await client.reply()).data) == 512

    run(test)


def test_silent_clients_are_dropped_in_the_handshake_but_not_after_it() -> None:
    async def test() -> None:
        async with serving(limits=Limits(handshake_timeout_s=0.4)) as served:
            attached = await served.connect()
            await attached.go()
            silent = await served.connect()
            await silent.receive(18)
            await silent.expect_end()
            slow = await served.connect()
            await slow.receive(18)
            with pytest.raises(Closed):
                while True:
                    await slow.send(b"\0")
                    await trio.sleep(0.03)
            assert (await attached.ask(wire.CMD_READ, 0, 1)).error == 0

    run(test)


def test_connections_beyond_the_cap_are_refused_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving(limits=Limits(connections=2)) as served:
            clients = [await served.connect() for _ in range(2)]
            for client in clients:
                await client.go()
            third = await served.connect()
            await third.expect_end()
            assert served.server.status().refused == 1
            await clients[0].disconnect()
            while len(served.server.status().connections) == 2:
                await trio.sleep(0.01)
            fourth = await served.connect()
            await fourth.go()

    with caplog.at_level(logging.WARNING, "nbd"):
        run(test)
    assert "refused: 2 clients are connected already" in caplog.text


def test_drain_answers_what_is_in_flight_and_nothing_after_that() -> None:
    async def test() -> None:
        hold = trio.Event()
        export = MemoryExport(size_bytes=SIZE, slow=True, hold=hold)
        async with serving(export, limits=Limits(drain_grace_s=0.7)) as served, trio.open_nursery() as nursery:
            client, idle = await served.connect(), await served.connect()
            await client.go()
            await idle.go()
            haggling = await served.connect()
            await haggling.hello()
            await client.request(wire.CMD_WRITE, 0, data=b"x" * 512, cookie=1)
            await trio.sleep(0.02)
            nursery.start_soon(served.server.drain)
            await trio.sleep(0.02)
            with pytest.raises(OSError, match=r"Connection refused|No such file"):
                await served.connect()
            for cookie, command in enumerate((wire.CMD_READ, wire.CMD_FLUSH, wire.CMD_WRITE), start=2):
                data = b"y" * 512 if command == wire.CMD_WRITE else b""
                await client.request(command, 0, 512 if command == wire.CMD_READ else 0, data=data, cookie=cookie)
            await idle.expect_end()
            await idle.stream.aclose()
            replies = await haggling.option(wire.OPT_GO, info_bytes("mem"))
            assert replies[0][0] == wire.REP_ERR_SHUTDOWN
            await trio.sleep(0.8)  # the grace is over, but what is in flight is waited for
            assert len(served.server.status().connections) == 1
            hold.set()
            reply = await client.reply()
            assert (reply.cookie, reply.error) == (1, 0)
            for one in (client, haggling):
                await one.expect_end()
            assert export.data[:512] == b"x" * 512
            assert [name for name, _, _ in export.calls] == ["write"]
            assert served.server.status().total.writes == 1

    run(test)


@pytest.mark.alone
def test_a_drain_waits_no_longer_than_its_grace_for_clients_that_stay() -> None:
    async def test() -> None:
        async with serving(limits=Limits(drain_grace_s=0.3)) as served:
            client = await served.connect()
            await client.go()
            assert (await client.ask(wire.CMD_READ, 0, 1)).error == 0
            start = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(served.server.drain)
                await client.expect_end()  # at once
                assert trio.current_time() - start < 0.2
            assert 0.25 < trio.current_time() - start < 2

    run(test)


@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_a_drain_in_the_middle_of_a_stream_answers_exactly_what_it_has_done(family: str) -> None:
    """And the client sees the end, not a reset that has overtaken replies; it has sent more than was read."""

    async def test() -> None:
        export = MemoryExport(size_bytes=64 << 20)
        with TemporaryDirectory(prefix="nbd-test-") as directory:
            if family == "tcp":
                (listener,) = await open_tcp("127.0.0.1", 0)
            else:
                listener = await open_unix(Path(directory) / "nbd.sock")
            async with trio.open_nursery() as nursery:
                server = await nursery.start(serve, MemoryExports(export), [listener])
                if family == "tcp":
                    client = RawClient(await trio.open_tcp_stream("127.0.0.1", listener.port))
                else:
                    client = RawClient(await trio.open_unix_socket(listener.address))
                await client.go()
                written: set[int] = set()

                async def stream() -> None:
                    with suppress(Closed):
                        for block in range((64 << 20) // 65536):
                            await client.request(wire.CMD_WRITE, block * 65536, data=b"d" * 65536, cookie=block + 1)

                async def collect() -> None:
                    while True:
                        try:
                            reply = await client.reply()
                        except Closed:
                            return
                        assert reply.error == 0
                        written.add(reply.cookie - 1)
                        if len(written) == 20:
                            server.start_drain(1.0)

                async with trio.open_nursery() as both:
                    both.start_soon(stream)
                    await collect()
                    assert client.error is None, client.error
                    both.cancel_scope.cancel()
                await client.stream.aclose()
            assert written == {offset // 65536 for name, offset, _ in export.calls}
            assert 20 <= len(written) < 1024

    run(test)


class OneStuck(MemoryExport):
    """What is written to its first block waits for ever; all else is done at once."""

    def write_now(self, writes: list[tuple[int, memoryview]]) -> bool:
        return all(offset >= 4096 for offset, _ in writes) and super().write_now(writes)

    async def write(self, offset: int, data: memoryview | bytes) -> None:
        if offset < 4096:
            self.calls.append(("stuck", offset, len(data)))
            try:
                await trio.sleep_forever()
            finally:
                self.calls.append(("given up", offset, len(data)))
        await super().write(offset, data)


NEWER = {
    "write": (wire.CMD_WRITE, b"n" * 4096),
    "long write": (wire.CMD_WRITE, b"n" * (2 << 20)),
    "trim": (wire.CMD_TRIM, b""),
    "zeroes": (wire.CMD_WRITE_ZEROES, b""),
}


@pytest.mark.parametrize("kind", NEWER)
def test_what_was_unread_when_a_client_shut_a_connection_down_cannot_undo_its_newer_writes(kind: str) -> None:
    async def test() -> None:
        export = OneStuck(size_bytes=4 << 20)
        async with serving(export, limits=Limits(inflight_requests=1)) as served:
            old, new = await served.connect(), await served.connect()
            await old.go()
            await new.go()
            await old.request(wire.CMD_WRITE, 0, data=b"s" * 4096)
            await trio.sleep(0.02)
            await old.request(wire.CMD_WRITE, 4096, data=b"o" * 4096)  # not done, for want of room
            await trio.sleep(0.02)
            old.stream.socket.shutdown(socket.SHUT_RDWR)
            command, data = NEWER[kind]
            reply = await new.ask(command, 4096, 0 if data else 4096, data=data)
            assert reply.error == 0
            assert ("given up", 0, 4096) in export.calls
            await trio.sleep(0.05)
            assert export.data[4096:8192] == (data[:4096] or bytes(4096))
            assert [connection.export for connection in served.server.status().connections] == ["mem"]

    run(test)


def test_what_waits_in_the_storage_when_its_connection_is_shut_down_is_given_up_before_newer_writes() -> None:
    async def test() -> None:
        hold = trio.Event()
        export = MemoryExport(size_bytes=SIZE, slow=True, hold=hold)
        async with serving(export) as served:
            old, new = await served.connect(), await served.connect()
            await old.go()
            await new.go()
            await old.request(wire.CMD_WRITE, 4096, data=b"o" * 4096)
            await trio.sleep(0.02)
            old.stream.socket.shutdown(socket.SHUT_RDWR)
            await new.request(wire.CMD_WRITE, 4096, data=b"n" * 4096)
            await trio.sleep(0.02)
            hold.set()
            assert (await new.reply()).error == 0
            assert export.calls == [("write", 4096, 4096)]
            assert export.data[4096:8192] == b"n" * 4096

    run(test)


class Stubborn(MemoryExport):
    """A write can't be given up once it has begun, as one that waits for a device can't."""

    first = True

    async def write(self, offset: int, data: memoryview | bytes) -> None:
        if self.first:
            self.first = False
            with trio.CancelScope(shield=True):
                await trio.sleep(0.1)
                await super().write(offset, data)
            await trio.lowlevel.checkpoint()
        else:
            await super().write(offset, data)


def test_newer_writes_wait_for_what_cannot_be_given_up_any_more() -> None:
    async def test() -> None:
        export = Stubborn(size_bytes=SIZE, slow=True)
        async with serving(export) as served:
            old, new = await served.connect(), await served.connect()
            await old.go()
            await new.go()
            await old.request(wire.CMD_WRITE, 4096, data=b"o" * 4096)
            await trio.sleep(0.02)
            old.stream.socket.shutdown(socket.SHUT_RDWR)
            assert (await new.ask(wire.CMD_WRITE, 4096, data=b"n" * 4096)).error == 0
            await trio.sleep(0.2)
            assert len(export.calls) == 2
            assert export.data[4096:8192] == b"n" * 4096

    run(test)


def test_a_connection_is_closed_only_when_nothing_of_it_is_under_way() -> None:
    """So whoever sees the end may send again what was not answered: the first copy can't come later."""

    async def test() -> None:
        for how in ("drain", "garbage", "disconnect", "drop"):
            hold = trio.Event()
            export = MemoryExport(size_bytes=SIZE, slow=True, hold=hold)
            async with serving(export) as served, trio.open_nursery() as nursery:
                client = await served.connect()
                await client.go()
                await client.request(wire.CMD_WRITE, 4096, data=b"o" * 4096)
                await trio.sleep(0.02)
                if how == "drain":
                    nursery.start_soon(served.server.drain, 0)
                elif how == "garbage":
                    await client.send(b"g" * 64)
                elif how == "disconnect":
                    await client.request(wire.CMD_DISC)
                else:
                    assert served.server.disconnect("mem") == 1
                if how == "drop":
                    await client.expect_end()
                    assert export.running == 0
                    continue
                with trio.move_on_after(0.1) as still_open:
                    await client.receive(1)
                assert still_open.cancelled_caught, how
                assert export.running == 1
                hold.set()
                assert (await client.reply()).error == 0
                await client.expect_end()
                assert export.running == 0

    run(test)


def test_a_hard_stop_releases_everything_at_once() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=True, hold=trio.Event())
        async with serving(export) as served:
            client = await served.connect()
            await client.go()
            await client.request(wire.CMD_WRITE, 0, data=b"x" * 512)
            await trio.sleep(0.02)
            served.scope.cancel()
            await client.expect_end()

    run(test)


def test_the_clients_of_one_export_can_be_dropped() -> None:
    async def test() -> None:
        async with serving(MemoryExport("a"), MemoryExport("b")) as served:
            first, second = await served.connect(), await served.connect()
            await first.go("a")
            await second.go("b")
            assert served.server.disconnect("a") == 1
            await first.expect_end()
            assert (await second.ask(wire.CMD_READ, 0, 1)).error == 0

    run(test)


def test_an_unknown_export_is_refused_and_a_failed_open_leaks_nothing() -> None:
    async def test() -> None:
        async with serving() as served:
            client = await served.connect()
            await client.hello()
            assert (await client.option(wire.OPT_GO, info_bytes("other")))[0][0] == wire.REP_ERR_UNKNOWN
            served.exports.error = errno.EIO
            assert (await client.option(wire.OPT_GO, info_bytes("mem")))[0][0] == wire.REP_ERR_UNKNOWN
            served.exports.error = 0
            for _ in range(3):
                assert (await client.option(wire.OPT_INFO, info_bytes("")))[-1][0] == wire.REP_ACK
                assert served.exports.open == 0
            assert (await client.option(wire.OPT_GO, info_bytes("")))[-1][0] == wire.REP_ACK
            assert served.exports.open == 1

    run(test)


def test_a_flush_on_one_connection_reaches_the_export_that_all_share() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        async with serving(export) as served:
            writer, flusher = await served.connect(), await served.connect()
            assert await writer.go() & wire.CAN_MULTI_CONN
            await flusher.go()
            assert (await writer.ask(wire.CMD_WRITE, 0, data=b"x")).error == 0
            assert (await flusher.ask(wire.CMD_FLUSH)).error == 0
            assert [name for name, _, _ in export.calls] == ["write_now", "flush"]

    run(test)


@both_speeds
def test_a_long_write_that_fails_in_the_middle_is_drained_and_answered_once(slow: bool) -> None:
    async def test() -> None:
        def fail(operation: str, offset: int, length: int) -> int:
            return errno.ENOSPC if "write" in operation and offset + length > 4 << 20 else 0

        export = MemoryExport(size_bytes=16 << 20, slow=slow, fail=fail)
        async with attached(export) as (client, _):
            poison = request_bytes(wire.CMD_DISC, 9) * 300_000
            assert (await client.ask(wire.CMD_WRITE, 1000, data=poison[: 8 << 20])).error == wire.ENOSPC
            assert not any(export.data[5 << 20 :])
            assert (await client.ask(wire.CMD_READ, 0, 1)).error == 0

    run(test)


def test_a_volume_that_shrinks_under_a_long_write_is_never_written_past_its_end() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=8 << 20)
        async with attached(export) as (client, _):
            request = request_bytes(wire.CMD_WRITE, 1, 0, data=b"x" * (8 << 20))
            await client.send(request[: 4 << 20])
            await trio.sleep(0.05)
            export.size_bytes = 1 << 20  # the export itself asserts that no call goes past it
            await client.send(request[4 << 20 :])
            assert (await client.reply()).error == wire.ENOSPC

    run(test)


def test_a_client_that_leaves_without_reading_its_replies_is_forgotten_in_time() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=8 << 20, slow=True, delay_s=0.05)
        async with attached(export, limits=Limits(linger_s=0.2)) as (client, served):
            await client.send(request_bytes(wire.CMD_READ, 1, 0, 8 << 20) + request_bytes(wire.CMD_DISC, 2))
            await trio.sleep(0.1)
            assert len(served.server.status().connections) == 1
            while served.server.status().connections:
                await trio.sleep(0.01)

    run(test)


class FullExport(MemoryExport):
    """Writes behind the first MiB wait until something is trimmed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.trimmed = trio.Event()
        self.waiting = 0

    def write_now(self, writes: list[tuple[int, memoryview]]) -> bool:
        if not self.trimmed.is_set() and any(offset + len(data) > 1 << 20 for offset, data in writes):
            return False
        return super().write_now(writes)

    async def write(self, offset: int, data: memoryview | bytes) -> None:
        self.waiting += 1
        await self.trimmed.wait()
        await super().write(offset, data)

    def trim_now(self, ranges: list[tuple[int, int]]) -> bool:
        self.trimmed.set()
        return super().trim_now(ranges)


@pytest.mark.parametrize("length", [INBOX_BYTES + 1, 5 << 20, 32 << 20])
@pytest.mark.parametrize("flags", [0, wire.CMD_FLAG_FUA])
def test_a_trim_behind_long_writes_that_wait_for_space_gets_through_and_they_end_well(length: int, flags: int) -> None:
    async def test() -> None:
        export = FullExport(size_bytes=33 << 20)
        async with attached(export) as (client, served):
            data = pattern(length)[:length]
            first = await client.request(wire.CMD_WRITE, 777, flags=flags, data=data)
            second = await client.request(wire.CMD_WRITE, 777, flags=flags, data=data)
            trim = await client.request(wire.CMD_TRIM, (33 << 20) - 4096, 4096)
            replies = [await client.reply() for _ in range(3)]
            assert export.waiting >= 2
            assert replies[0].cookie == trim
            assert sorted(reply.cookie for reply in replies) == sorted([first, second, trim])
            assert not any(reply.error for reply in replies)
            assert export.data[777 : 777 + length] == data
            assert export.calls[-1][0] == "flush" if flags else ("flush", 0, 0) not in export.calls
            (connection,) = served.server.status().connections
            assert connection.counters.written_bytes == 2 * length and connection.counters.writes == 2

    run(test)


def test_long_writes_that_wait_are_held_to_the_bound_of_what_is_in_flight() -> None:
    async def test() -> None:
        export = FullExport(size_bytes=16 << 20)
        async with attached(export, limits=Limits(inflight_bytes=5 << 20)) as (client, _):
            taken = 0
            payload = request_bytes(wire.CMD_WRITE, 1, 0, data=b"x" * (4 << 20)) * 4
            with trio.move_on_after(1.0) as patience:
                while taken < len(payload):
                    await client.send(payload[taken : taken + (64 << 10)])
                    taken += 64 << 10
            assert patience.cancelled_caught and taken < 9 << 20

    run(test)


def test_a_client_that_vanishes_within_a_long_write_that_waits_leaves_nothing_behind() -> None:
    async def test() -> None:
        export = FullExport(size_bytes=8 << 20)
        async with attached(export) as (client, served):
            await client.send(request_bytes(wire.CMD_WRITE, 1, 1 << 20, data=b"x" * (6 << 20))[: 4 << 20])
            await trio.sleep(0.3)
            await client.stream.aclose()
            while served.server.status().connections:
                await trio.sleep(0.01)
            assert not export.calls

    run(test)


@pytest.mark.parametrize("what", ["long-reads", "broken-writes"])
def test_refusals_wait_for_a_client_that_reads_nothing_and_do_not_pile_up(what: str) -> None:
    async def test() -> None:
        bad = 48 << 20
        export = MemoryExport(size_bytes=64 << 20, fail=lambda _, offset, length: errno.EIO if offset >= bad else 0)
        form = "structured" if what == "long-reads" else "simple"
        async with attached(export, form=form) as (client, served):
            flags = wire.CMD_FLAG_DF if client.structured else 0
            await client.request(wire.CMD_READ, 0, 32 << 20, flags=flags)  # a task of its own is busy sending this
            (connection,) = served.server._connections
            while not connection._outbox._sending:
                await trio.sleep(0.005)
            for number in range(100):
                if client.structured:
                    await client.request(wire.CMD_READ, bad, 1 << 20)
                    continue
                # Out of range, and the last byte late: such a payload is thrown away outside of a pass.
                await client.send(client.encode(wire.CMD_WRITE, 1000 + number, 64 << 20, 2, data=b"x"))
                await trio.sleep(0.001)
                await client.send(b"y")
            await trio.sleep(0.05)
            assert len(connection._outbox._replies) <= 1
            errors = [(await client.reply()).error for _ in range(101)]
            assert sorted(errors) == [0] + 100 * [wire.EIO if client.structured else wire.ENOSPC]

    run(test)
