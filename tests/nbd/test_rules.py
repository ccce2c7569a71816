"""What servers get wrong, rule by rule: at least one test for each, named after it. The protocol's text is the judge.

====  ==========================================================  ==========================================
rule  what it says                                                besides the tests here
====  ==========================================================  ==========================================
1     STARTTLS discards what came before; TLS_REQD                test_tls.py
2     each form of reply, and nothing but it; extended headers    test_transmission.py, test_handshake.py
3     DONE exactly once; chunks cover the range once; DF          test_connection.py, test_sparse.py
4     contexts: SET replaces, `base:` in LIST only; BLOCK_STATUS  test_handshake.py, test_transmission.py
5     base:allocation: HOLE clear, and a write has space          tests/tiers/test_extents.py
6     FUA on every command; FLUSH, on all connections             test_connection.py
7     FAST_ZERO is fast or changes nothing; zeroes are zeroes     test_connection.py
8     lengths without payload are free; minimum block size 1      test_connection.py
9     the error of each mistake; drains; no overflow; length 0    test_transmission.py
10    DISC, shutting down, INFO and GO, TCP_NODELAY               test_connection.py, test_listen.py
11    options, names, time, connections; one line in the log      test_handshake.py, test_connection.py
====  ==========================================================  ==========================================
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import random
import socket
import struct
from pathlib import Path
from typing import cast

import pytest
import trio

from nbd import wire
from nbd.handshake import MAX_OPTIONS
from nbd.listen import open_tcp
from nbd.server import serve
from tests.nbd.client import (
    Closed,
    RawClient,
    attached,
    extended_bytes,
    filter_bytes,
    info_bytes,
    meta_bytes,
    option_bytes,
    request_bytes,
    run,
    serving,
)
from tests.nbd.memory import GRAIN, ContextExport, MemoryExport, MemoryExports, SparseExport
from tests.tiers.helpers import fresh_pool
from tiers.layout import MIB

SIZE = 1 << 20
HUGE = 10 << 40
both_speeds = pytest.mark.parametrize("slow", [False, True], ids=["at-once", "slow"])
all_forms = pytest.mark.parametrize("form", ["simple", "structured", "extended"])
chunked_forms = pytest.mark.parametrize("form", ["structured", "extended"])
WITHOUT_PAYLOAD = (wire.CMD_TRIM, wire.CMD_WRITE_ZEROES, wire.CMD_CACHE, wire.CMD_BLOCK_STATUS)


class Nowhere(ContextExport):
    """Ten terabytes of nothing."""

    def __init__(self) -> None:
        super().__init__(size_bytes=0)
        self.size_bytes = HUGE
        self.flags = {"x:y": []}

    def trim_now(self, ranges: list[tuple[int, int]]) -> bool:
        for offset, length in ranges:
            self._begin("trim", offset, length)
        return True

    async def write_zeroes(self, offset: int, length: int, *, no_hole: bool, fast: bool = False) -> None:
        self._begin("zero", offset, length)

    async def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        return [(length, 3)]

    async def context_extents(self, context: str, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        return [(1 << 20, 0), (length - (1 << 20), 1)][:limit]


def only_line(caplog: pytest.LogCaptureFixture, *words: str) -> None:
    """The log has one line at WARNING, which names the peer and has these words."""
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    text = record.getMessage()
    assert text.startswith("unix client ") or text.startswith("client of "), text
    for word in words:
        assert word in text, text


# -- 2: forms of replies -----------------------------------------------------------------------------------------------


@both_speeds
def test_rule_2_after_structured_replies_every_read_reply_is_structured_even_einval_for_bad_flags(slow: bool) -> None:
    async def test() -> None:
        async with attached(MemoryExport(size_bytes=SIZE, slow=slow), form="structured") as (client, _):
            for offset, length, flags in [(0, 0, 0), (0, 512, 0), (SIZE, 1, 0), (0, 512, 0x8000), (0, 0, 2)]:
                reply = await client.ask(wire.CMD_READ, offset, length, flags=flags)
                assert reply.structured and bool(reply.error) is (offset == SIZE or flags != 0)

    run(test)


@both_speeds
def test_rule_2_after_extended_headers_every_reply_is_extended_and_echoes_the_offset(slow: bool) -> None:
    async def test() -> None:
        export = SparseExport(size_bytes=SIZE, slow=slow)
        async with attached(export, form="extended", status=True) as (client, _):
            # The client asserts both of each reply. Good ones, and every kind of bad ones, one by one and together.
            cookies: set[int] = set()
            batch = b""
            for command, offset, length, flags in itertools.product(
                [0, 1, 3, 4, 5, 6, 7, 8, 99], [0, 4096, SIZE - 512, SIZE + 1], [0, 512, 300_000], [0, 1, 2, 4, 8, 16]
            ):
                data = bytes(length) if command == wire.CMD_WRITE else b""
                reply = await client.ask(command, offset, length, flags=flags, data=data)
                assert reply.extended
                cookies.add(100_000 + len(cookies))
                if length <= 512:
                    batch += client.encode(command, max(cookies), offset, length, flags, data)
                else:
                    cookies.discard(max(cookies))
            await client.send(batch)
            while cookies:
                cookies.remove((await client.reply()).cookie)
            export.fail = lambda operation, offset, length: errno.EIO
            for command in (0, 1, 3, 4, 5, 6, 7):
                length = 0 if command == 3 else 512
                offset = 0 if command == 3 else 4096
                data = bytes(length) if command == wire.CMD_WRITE else b""
                reply = await client.ask(command, offset, length, data=data, flags=command == 1)
                assert reply.extended and reply.error == wire.EIO and reply.message

    run(test, timeout_s=20)


def test_rule_2_export_name_is_forbidden_after_extended_headers(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving() as served:
            client = await served.connect()
            await client.hello()
            assert (await client.option(wire.OPT_EXTENDED_HEADERS))[-1][0] == wire.REP_ACK
            await client.send(option_bytes(wire.OPT_EXPORT_NAME, b"mem"))
            await client.expect_end()

    run(test)
    only_line(caplog, "EXPORT_NAME after EXTENDED_HEADERS")


def test_rule_2_structured_reply_after_extended_headers_gets_ext_header_reqd() -> None:
    async def test() -> None:
        async with serving() as served:
            client = await served.connect()
            await client.hello()
            assert (await client.option(wire.OPT_STRUCTURED_REPLY))[-1][0] == wire.REP_ACK
            assert (await client.option(wire.OPT_EXTENDED_HEADERS))[-1][0] == wire.REP_ACK
            assert (await client.option(wire.OPT_STRUCTURED_REPLY))[-1][0] == wire.REP_ERR_EXT_HEADER_REQD
            client.structured = client.extended = True
            assert (await client.option(wire.OPT_GO, info_bytes("mem")))[-1][0] == wire.REP_ACK
            assert (await client.ask(wire.CMD_READ, 0, 512)).extended

    run(test)


def test_rule_2_an_extended_write_needs_payload_len_and_without_it_has_no_payload() -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        async with attached(export, form="extended") as (client, _):
            client._asked[7] = (wire.CMD_WRITE, 0, 0, 512)
            # What follows is the next request, not 512 bytes of data.
            await client.send(extended_bytes(wire.CMD_WRITE, 7, 0, 512) + client.encode(wire.CMD_READ, 8, 0, 512))
            replies = [await client.reply() for _ in range(2)]
            assert [(reply.cookie, reply.error) for reply in replies] == [(7, wire.EINVAL), (8, 0)]
            assert [name for name, _, _ in export.calls] == ["read_now"]
            assert (await client.ask(wire.CMD_WRITE, 0, data=b"x" * 512)).error == 0  # with the flag

    run(test)


@both_speeds
@pytest.mark.parametrize("length", [1, 40, 4096, 3 << 20, 32 << 20])
def test_rule_2_an_unexpected_payload_is_drained_and_then_einval(slow: bool, length: int) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow)
        async with attached(export, form="extended", status=True) as (client, _):
            # Taken for requests the payload would end the connection.
            poison = (extended_bytes(wire.CMD_DISC, 9) * (length // 32 + 1))[:length]
            for command in (wire.CMD_READ, wire.CMD_FLUSH, wire.CMD_TRIM, 6, wire.CMD_CACHE, wire.CMD_BLOCK_STATUS, 99):
                assert (await client.ask(command, 512, data=poison)).error == wire.EINVAL
                if length > SIZE:
                    break
            assert export.calls == []
            assert (await client.ask(wire.CMD_READ, 0, 1)).data == b"\0"

    run(test, timeout_s=20)


@pytest.mark.parametrize("length", [(32 << 20) + 1, 1 << 32, 2**64 - 1])
@pytest.mark.parametrize("command", [wire.CMD_WRITE, wire.CMD_READ, wire.CMD_BLOCK_STATUS, 99])
def test_rule_2_an_absurd_payload_disconnects_with_one_line(
    command: int, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with attached(MemoryExport(size_bytes=SIZE), form="extended", status=True) as (client, _):
            await client.send(extended_bytes(command, 1, 0, length, wire.CMD_FLAG_PAYLOAD_LEN))
            await client.expect_end()

    run(test)
    only_line(caplog, f"payload of {length} bytes")


def test_rule_2_extended_block_status_has_64_bit_extents_and_only_them() -> None:
    async def test() -> None:
        async with attached(Nowhere(), form="extended", status=True) as (client, _):
            reply = await client.ask(wire.CMD_BLOCK_STATUS, 0, HUGE)
            assert reply.extents == [(HUGE, 3)]
            assert [kind for _, kind, _ in reply.chunks] == [wire.REPLY_TYPE_BLOCK_STATUS_EXT]
            assert (await client.ask(wire.CMD_BLOCK_STATUS, 0, 512)).extents == [(512, 3)]

    run(test)


# -- 3: chunks ---------------------------------------------------------------------------------------------------------


@both_speeds
@chunked_forms
def test_rule_3_done_comes_once_and_never_on_a_chunk_that_can_still_fail(form: str, slow: bool) -> None:
    async def test() -> None:
        bad = 0

        def fail(operation: str, offset: int, length: int) -> int:
            return errno.EIO if operation in ("read", "read_now") and offset <= bad < offset + length else 0

        export = SparseExport(size_bytes=4 << 20, slow=slow, fail=fail)
        for at in range(0, 4 << 20, 512 << 10):
            export.data[at : at + (256 << 10)] = b"x" * (256 << 10)  # and as much zeroes behind it
        async with attached(export, form=form) as (client, _):
            for bad in (0, 100_000, 3 << 20, (3 << 20) + (256 << 10) - 1):
                reply = await client.ask(wire.CMD_READ, 0, 4 << 20)
                assert reply.error == wire.EIO
                flags = [flags for flags, _, _ in reply.chunks]
                assert flags == [0] * (len(flags) - 1) + [wire.REPLY_FLAG_DONE]
                assert reply.chunks[-1][1] == wire.REPLY_TYPE_ERROR and len(reply.data) <= bad
            bad = -1
            reply = await client.ask(wire.CMD_READ, 0, 4 << 20)
            assert not reply.error and reply.data == export.data and len(reply.holes) == 8

    run(test)


@chunked_forms
@both_speeds
def test_rule_3_chunks_never_overlap_and_never_leave_the_range(form: str, slow: bool) -> None:
    async def test() -> None:
        rng = random.Random(7)
        export = SparseExport(size_bytes=2 << 20, slow=slow)
        async with attached(export, form=form) as (client, _):
            for _ in range(30):
                at, length = rng.randrange(2 << 20), rng.choice((1, 4096, 70_000, 300_000))
                fill = rng.choice((0, 0, 7))
                export.data[at : at + length] = bytes([fill]) * len(export.data[at : at + length])
                start = rng.randrange(1 << 20)
                size = rng.choice((1 << 20, (256 << 10) + 1, 600_001))
                reply = await client.ask(wire.CMD_READ, start, size)
                position = start
                for flags, kind, payload in reply.chunks:
                    (offset,) = struct.unpack_from(">Q", payload)
                    assert offset == position
                    position += struct.unpack(">QI", payload)[1] if kind == 2 else len(payload) - 8
                    assert flags == (position == start + size)
                assert position == start + size and reply.data == export.data[start : start + size]

    run(test)


@chunked_forms
@both_speeds
def test_rule_3_df_gives_one_content_chunk_whatever_is_there_and_64_kib_are_supported(form: str, slow: bool) -> None:
    async def test() -> None:
        export = SparseExport(size_bytes=4 << 20, slow=slow)
        export.data[512 << 10 : 600 << 10] = b"x" * (88 << 10)
        async with attached(export, form=form) as (client, _):
            for length in (1, 512, 65_536, 1 << 20, 4 << 20):
                reply = await client.ask(wire.CMD_READ, 0, length, flags=wire.CMD_FLAG_DF)
                assert [kind for _, kind, _ in reply.chunks] == [wire.REPLY_TYPE_OFFSET_DATA]
                assert reply.data == export.data[:length]

    run(test)


@both_speeds
def test_rule_3_a_simple_reply_that_says_success_has_all_of_its_data(slow: bool) -> None:
    async def test() -> None:
        bad = (1 << 20) + (700 << 10)  # far behind the beginning of a long READ

        def fail(operation: str, offset: int, length: int) -> int:
            return errno.EIO if "read" in operation and offset <= bad < offset + length else 0

        export = MemoryExport(size_bytes=4 << 20, slow=slow, fail=fail)
        async with attached(export) as (client, _):
            assert (await client.ask(wire.CMD_READ, 0, 4 << 20)).error == wire.EIO
            assert (await client.ask(wire.CMD_READ, 0, bad)).data == bytes(bad)

    run(test)


# -- 4: contexts -------------------------------------------------------------------------------------------------------


@chunked_forms
@pytest.mark.parametrize("bad", [meta_bytes("mem", "x" * 5000), meta_bytes("no"), b"\0", bytes(70_000)])
def test_rule_4_set_meta_context_replaces_the_contexts_even_when_it_fails(form: str, bad: bytes) -> None:
    async def test() -> None:
        async with serving() as served:
            client = await served.connect()
            await client.hello()
            await client.option(wire.OPT_EXTENDED_HEADERS if form == "extended" else wire.OPT_STRUCTURED_REPLY)
            client.structured, client.extended = True, form == "extended"
            replies = await client.option(wire.OPT_SET_META_CONTEXT, meta_bytes("mem", "base:allocation"))
            assert [kind for kind, _ in replies] == [wire.REP_META_CONTEXT, wire.REP_ACK]
            assert (await client.option(wire.OPT_SET_META_CONTEXT, bad))[-1][0] & 1 << 31
            assert (await client.option(wire.OPT_GO, info_bytes("mem")))[-1][0] == wire.REP_ACK
            assert (await client.ask(wire.CMD_BLOCK_STATUS, 0, 512)).error == wire.EINVAL

    run(test)


def test_rule_4_unknown_namespaces_are_ignored_and_base_is_a_wildcard_in_list_only() -> None:
    async def test() -> None:
        async with serving() as served:
            client = await served.connect()
            await client.hello()
            await client.option(wire.OPT_EXTENDED_HEADERS)
            for queries, listed, selected in [
                (("base:",), 1, 0),
                (("base:allocation",), 1, 1),
                (("base:nothing", "qemu:dirty-bitmap:x", "x-y:z"), 0, 0),
                (("x-y:z", "base:allocation"), 1, 1),
                ((), 1, 0),
            ]:
                for option, count in [(wire.OPT_LIST_META_CONTEXT, listed), (wire.OPT_SET_META_CONTEXT, selected)]:
                    replies = await client.option(option, meta_bytes("mem", *queries))
                    assert [kind for kind, _ in replies] == [wire.REP_META_CONTEXT] * count + [wire.REP_ACK]

    run(test)


def test_rule_4_block_status_only_for_the_export_of_go() -> None:
    async def test() -> None:
        async with serving(MemoryExport("one"), MemoryExport("two")) as served:
            for name in ("one", "two"):
                client = await served.connect()
                await client.hello()
                await client.option(wire.OPT_STRUCTURED_REPLY)
                client.structured = True
                await client.option(wire.OPT_SET_META_CONTEXT, meta_bytes("one", "base:allocation"))
                await client.option(wire.OPT_GO, info_bytes(name))
                reply = await client.ask(wire.CMD_BLOCK_STATUS, 0, 512)
                assert reply.error == (0 if name == "one" else wire.EINVAL)

    run(test)


@chunked_forms
@both_speeds
def test_rule_4_one_chunk_a_context_no_empty_extent_and_req_one_gives_one_that_is_not_longer_than_asked(
    form: str, slow: bool
) -> None:
    async def test() -> None:
        export = ContextExport(size_bytes=SIZE, slow=slow)
        export.flags = {"x:y": [0, 1] * (SIZE // GRAIN // 2)}
        export.allocated[3] = 1
        async with attached(export, form=form, status=("x:y", "base:allocation")) as (client, _):
            for offset, length, flags in itertools.product((0, 512, 3 * GRAIN - 1), (1, 512, 50_000), (0, 8)):
                reply = await client.ask(wire.CMD_BLOCK_STATUS, offset, length, flags=flags)
                assert set(reply.statuses) == {1, 2}
                for extents in reply.statuses.values():
                    sizes = [size for size, _ in extents]
                    assert sizes and sum(sizes[:-1]) < length
                    if flags:
                        assert len(sizes) == 1 and sizes[0] <= length

    run(test)


def test_rule_4_lengths_are_clamped_to_32_bits_where_the_reply_has_32_bits() -> None:
    async def test() -> None:
        class Longer(Nowhere):
            async def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
                return [(1 << 33, 3)]  # more than was asked for

        async with attached(Longer(), form="structured", status=True) as (client, _):
            for flags in (0, wire.CMD_FLAG_REQ_ONE):
                reply = await client.ask(wire.CMD_BLOCK_STATUS, 0, 0xFFFFFFFF, flags=flags)
                assert reply.extents == [(0xFFFFFFFF, 3)]

    run(test)


def test_rule_4_a_filter_answers_for_the_named_contexts_only() -> None:
    async def test() -> None:
        async with attached(Nowhere(), form="extended", status=("x:y", "base:allocation")) as (client, _):
            both = {1: [(HUGE, 3)], 2: [(1 << 20, 0), (HUGE - (1 << 20), 1)]}
            for wanted in ((1,), (2,), (1, 2), (2, 1)):
                reply = await client.ask(wire.CMD_BLOCK_STATUS, 0, data=filter_bytes(HUGE, *wanted))
                assert not reply.error and reply.statuses == {number: both[number] for number in wanted}
            one = filter_bytes(8192, 2)
            reply = await client.ask(wire.CMD_BLOCK_STATUS, 4096, data=one, flags=wire.CMD_FLAG_REQ_ONE)
            assert reply.statuses == {2: [(8192, 0)]}
            for wrong in [
                filter_bytes(HUGE),  # of nothing
                filter_bytes(HUGE, 3),
                filter_bytes(HUGE, 1, 1),
                filter_bytes(HUGE, 1, 3),
                filter_bytes(HUGE, 1, 2, 1),
                filter_bytes(HUGE, 1)[:-1],
                filter_bytes(HUGE, *range(1000)),
                b"1234567",
                filter_bytes(0, 1),
                filter_bytes(HUGE + 1, 1),
                filter_bytes(2**64 - 1, 1),
            ]:
                assert (await client.ask(wire.CMD_BLOCK_STATUS, 0, data=wrong)).error == wire.EINVAL
            assert (await client.ask(wire.CMD_BLOCK_STATUS, 512, data=filter_bytes(HUGE, 1))).error == wire.EINVAL
            # It may arrive in pieces.
            raw = client.encode(wire.CMD_BLOCK_STATUS, 77, 0, 0, 0, filter_bytes(512, 1))
            for at in range(0, len(raw), 5):
                await client.send(raw[at : at + 5])
                await trio.testing.wait_all_tasks_blocked()
            assert (await client.reply()).statuses == {1: [(512, 3)]}
        async with attached(Nowhere(), form="extended") as (client, _):
            assert (await client.ask(wire.CMD_BLOCK_STATUS, 0, data=filter_bytes(512, 1))).error == wire.EINVAL

    run(test)


# -- 5: what a hole promises -------------------------------------------------------------------------------------------


def test_rule_5_a_write_to_what_is_not_told_as_a_hole_does_not_run_out_of_space(tmp_path: Path) -> None:
    """Of a volume without snapshots.

    What a snapshot shares is told as data too, though a full pool refuses to overwrite it: HOLE without ZERO would be
    legal for it, but says that "the contents of such an area are undefined", and who copies the volume might leave it
    out.
    """

    async def test() -> None:
        async with fresh_pool(tmp_path, fast_mib=32) as pool:
            volume = await pool.create_volume("v", 64 * MIB)
            await volume.write_zeroes(60 * MIB, MIB, no_hole=True)
            noise = random.Random(5).randbytes(MIB // 4)
            export = cast(MemoryExport, volume)
            async with attached(export, form="structured", status=True) as (client, _):
                errors = [
                    (await client.ask(wire.CMD_WRITE, at, data=noise)).error for at in range(0, 32 * MIB, MIB // 4)
                ]
                assert errors[0] == 0 and errors[-1] == wire.ENOSPC
                at = 0
                taken = 0
                while at < 64 * MIB:
                    for length, flags in (await client.ask(wire.CMD_BLOCK_STATUS, at, 64 * MIB - at)).extents:
                        if not flags & wire.STATE_HOLE:
                            for piece in range(at, at + length, MIB // 4):
                                data = noise[: min(MIB // 4, at + length - piece)]
                                assert (await client.ask(wire.CMD_WRITE, piece, data=data)).error == 0
                                taken += len(data)
                        at += length
                assert taken > 16 * MIB, "the zeroes with NO_HOLE, and what was written"
                assert (await client.ask(wire.CMD_BLOCK_STATUS, 60 * MIB, MIB)).extents == [(MIB, 0)]

    run(test, timeout_s=30)


# -- 6: FUA and FLUSH --------------------------------------------------------------------------------------------------


@all_forms
@both_speeds
def test_rule_6_fua_is_accepted_on_every_command_and_counts_on_write_trim_and_write_zeroes(
    form: str, slow: bool
) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow)
        async with attached(export, form=form, status=form != "simple") as (client, _):
            for command in (0, 1, 3, 4, 5, 6, 7):
                if command == wire.CMD_BLOCK_STATUS and form == "simple":
                    continue
                export.calls.clear()
                length = 0 if command == wire.CMD_FLUSH else 4096
                data = bytes(length) if command == wire.CMD_WRITE else b""
                assert (await client.ask(command, 0, length, flags=wire.CMD_FLAG_FUA, data=data)).error == 0
                flushed = bool(export.calls) and export.calls[-1][0] == "flush"
                assert flushed is (command in (1, 3, 4, 6))

    run(test)


@all_forms
def test_rule_6_a_flush_covers_what_was_answered_on_all_connections(form: str) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE)
        async with attached(export, form=form) as (one, served):
            two = await served.connect()
            assert await two.go() & wire.CAN_MULTI_CONN
            assert (await one.ask(wire.CMD_WRITE, 0, data=b"x" * 512)).error == 0
            assert (await two.ask(wire.CMD_FLUSH)).error == 0
            assert [name for name, _, _ in export.calls] == ["write_now", "flush"]
            # The reply of FUA waits for the flush, too.
            export.hold = trio.Event()
            await one.request(wire.CMD_WRITE, 0, data=b"y" * 512, flags=wire.CMD_FLAG_FUA)
            with trio.move_on_after(0.03) as waited:
                await one.reply()
            assert waited.cancelled_caught
            export.hold.set()
            assert (await one.reply()).error == 0

    run(test)


# -- 7: zeroes ---------------------------------------------------------------------------------------------------------


@all_forms
def test_rule_7_fast_zero_fails_fast_with_enotsup_and_changes_nothing_and_nothing_else_gets_enotsup(
    form: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", MIB)
            async with attached(cast(MemoryExport, volume), form=form) as (client, _):
                data = random.Random(1).randbytes(MIB)
                assert (await client.ask(wire.CMD_WRITE, 0, data=data)).error == 0
                slow = wire.CMD_FLAG_FAST_ZERO | wire.CMD_FLAG_NO_HOLE
                assert (await client.ask(wire.CMD_WRITE_ZEROES, 100, 9000, flags=slow)).error == wire.ENOTSUP
                assert (await client.ask(wire.CMD_READ, 0, MIB)).data == data
                for flags in (0, wire.CMD_FLAG_NO_HOLE, wire.CMD_FLAG_FAST_ZERO):
                    assert (await client.ask(wire.CMD_WRITE_ZEROES, 100, 9000, flags=flags)).error == 0
                    data = data[:100] + bytes(9000) + data[9100:]
                    assert (await client.ask(wire.CMD_READ, 0, MIB)).data == data
        export = MemoryExport(size_bytes=SIZE, fail=lambda operation, *_: errno.EOPNOTSUPP)
        async with attached(export, form=form) as (client, _):
            for command in (wire.CMD_READ, wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES, wire.CMD_CACHE):
                data = b"x" * 512 if command == wire.CMD_WRITE else b""
                assert (await client.ask(command, 0, 512, data=data)).error == wire.EINVAL

    run(test)


@all_forms
def test_rule_7_write_zeroes_is_exact_where_trim_rounds_inwards(form: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", MIB)
            async with attached(cast(MemoryExport, volume), form=form) as (client, _):
                data = b"x" * MIB
                await client.ask(wire.CMD_WRITE, 0, data=data)
                assert (await client.ask(wire.CMD_TRIM, 1, 3 * GRAIN)).error == 0
                read = (await client.ask(wire.CMD_READ, 0, 4 * GRAIN)).data
                assert read == b"x" * GRAIN + bytes(2 * GRAIN) + b"x" * GRAIN
                assert (await client.ask(wire.CMD_WRITE_ZEROES, GRAIN - 1, 3 * GRAIN + 2)).error == 0
                read = (await client.ask(wire.CMD_READ, 0, 5 * GRAIN)).data
                assert read == b"x" * (GRAIN - 1) + bytes(3 * GRAIN + 2) + b"x" * (GRAIN - 1)

    run(test)


# -- 8: lengths and alignment ------------------------------------------------------------------------------------------


@all_forms
def test_rule_8_lengths_without_a_payload_may_exceed_the_maximum_payload(form: str) -> None:
    async def test() -> None:
        export = Nowhere()
        async with attached(export, form=form, status=form != "simple") as (client, _):
            for length in (wire.MAX_PAYLOAD_BYTES + 1, 0xFFFFFFFF, *((HUGE,) if form == "extended" else ())):
                for command in WITHOUT_PAYLOAD:
                    if command == wire.CMD_BLOCK_STATUS and form == "simple":
                        continue
                    export.calls.clear()
                    assert (await client.ask(command, 0, length)).error == 0
                    if command in (wire.CMD_TRIM, wire.CMD_WRITE_ZEROES):
                        assert [call[1:] for call in export.calls] == [(0, length)]

    run(test)


def test_rule_8_64_bit_lengths_reach_a_volume_of_terabytes(tmp_path: Path) -> None:
    async def test() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", HUGE)
            async with attached(cast(MemoryExport, volume), form="extended", status=True) as (client, _):
                assert (await client.ask(wire.CMD_WRITE, 5 << 40, data=b"x" * GRAIN)).error == 0
                status = await client.ask(wire.CMD_BLOCK_STATUS, 0, HUGE)
                assert status.extents == [(5 << 40, 3), (GRAIN, 0), (HUGE - (5 << 40) - GRAIN, 3)]
                assert (await client.ask(wire.CMD_WRITE_ZEROES, 1, HUGE - 2)).error == 0
                assert (await client.ask(wire.CMD_READ, 5 << 40, GRAIN)).data == bytes(GRAIN)
                assert (await client.ask(wire.CMD_WRITE, 5 << 40, data=b"x" * GRAIN)).error == 0
                assert (await client.ask(wire.CMD_TRIM, 0, HUGE)).error == 0
                assert (await client.ask(wire.CMD_CACHE, 0, HUGE)).error == 0
                assert (await client.ask(wire.CMD_BLOCK_STATUS, 0, HUGE)).extents == [(HUGE, 3)]

    run(test)


@all_forms
def test_rule_8_unaligned_writes_of_two_connections_into_one_block_lose_nothing(form: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", MIB)
            async with attached(cast(MemoryExport, volume), form=form) as (first, served):
                second = await served.connect()
                await second.go(volume.name)
                expected = bytearray(GRAIN * 2)
                async with trio.open_nursery() as nursery:
                    for number, client in enumerate((first, second)):

                        async def write(client: RawClient, number: int) -> None:
                            for at in range(number, GRAIN * 2 - 4, 97):
                                if at % 2 == number:
                                    data = bytes([1 + at % 250])
                                    expected[at : at + 1] = data
                                    assert (await client.ask(wire.CMD_WRITE, at, data=data)).error == 0

                        nursery.start_soon(write, client, number)
                assert (await first.ask(wire.CMD_READ, 0, GRAIN * 2)).data == expected

    run(test)


# -- 9: errors ---------------------------------------------------------------------------------------------------------


@all_forms
@both_speeds
def test_rule_9_past_the_end_writes_get_enospc_and_others_einval_and_nothing_overflows(form: str, slow: bool) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow)
        async with attached(export, form=form, status=form != "simple") as (client, _):
            lengths = [1, 512] if form != "extended" else [1, 512, 2**64 - 1, 2**64 - 512]
            for offset, length in itertools.product([SIZE, SIZE - 510, 2**63, 2**64 - 1, 2**64 - 512], lengths):
                if offset + length <= SIZE:
                    continue
                for command in (0, 1, 4, 5, 6, 7):
                    if command == wire.CMD_WRITE:
                        error = (await client.ask(command, offset, data=b"x" * 512)).error
                    else:
                        error = (await client.ask(command, offset, length)).error
                    assert error == (wire.ENOSPC if command in (1, 6) else wire.EINVAL), (command, offset, length)
            assert export.calls == []

    run(test)


@all_forms
@both_speeds
def test_rule_9_read_only_is_eperm_and_unknown_commands_and_flags_are_einval(form: str, slow: bool) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow, read_only=True)
        async with attached(export, form=form) as (client, _):
            for command in (wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES):
                data = b"x" * 512 if command == wire.CMD_WRITE else b""
                assert (await client.ask(command, 0, 512, data=data)).error == wire.EPERM
            for command in (8, 9, 255, 0xFFFF):
                assert (await client.ask(command, 0, 512)).error == wire.EINVAL
            for flags in (1 << 1, 1 << 3, 1 << 6, 1 << 15):
                assert (await client.ask(wire.CMD_READ, 0, 512, flags=flags)).error == wire.EINVAL
            assert export.calls == []
            assert (await client.ask(wire.CMD_READ, 0, 512)).data == bytes(512)

    run(test)


@all_forms
@both_speeds
@pytest.mark.parametrize("length", [512, 3 << 20], ids=["short", "long"])
def test_rule_9_a_writes_payload_is_drained_before_its_error(form: str, slow: bool, length: int) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow)
        async with attached(export, form=form) as (client, _):
            poison = client.encode(wire.CMD_DISC, 9)
            data = (poison * (length // len(poison) + 1))[:length]
            assert (await client.ask(wire.CMD_WRITE, SIZE, data=data)).error == wire.ENOSPC
            assert (await client.ask(wire.CMD_WRITE, 0, data=data, flags=1 << 9)).error == wire.EINVAL
            export.read_only = True
            assert (await client.ask(wire.CMD_WRITE, 0, data=data)).error == wire.EPERM
            assert (await client.ask(wire.CMD_READ, 0, 1)).data == b"\0"

    run(test)


@all_forms
@both_speeds
def test_rule_9_length_zero_does_not_disconnect(form: str, slow: bool) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow)
        async with attached(export, form=form, status=form != "simple") as (client, _):
            for command, offset, flags in itertools.product((0, 1, 4, 5, 6), (0, 512, SIZE), (0, 1)):
                assert (await client.ask(command, offset, 0, flags=flags)).error == 0
            assert (await client.ask(wire.CMD_BLOCK_STATUS, 0, 0)).error == wire.EINVAL
            assert (await client.ask(wire.CMD_READ, 0, 1)).data == b"\0"

    run(test)


@all_forms
def test_rule_9_a_minimum_block_size_is_enforced_with_einval(form: str) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, minimum_block_size=512)
        async with attached(export, form=form, status=form != "simple") as (client, _):
            for command, (offset, length) in itertools.product((0, 1, 4, 5, 6, 7), [(1, 512), (512, 1), (511, 1)]):
                data = b"x" * length if command == wire.CMD_WRITE else b""
                assert (await client.ask(command, offset, length, data=data)).error == wire.EINVAL
            assert export.calls == []
            assert (await client.ask(wire.CMD_WRITE, 512, data=b"x" * 1024)).error == 0
            assert (await client.ask(wire.CMD_READ, 512, 1024)).data == b"x" * 1024

    run(test)


@all_forms
def test_rule_9_eoverflow_is_only_for_reads_where_df_is_understood(form: str) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, maximum_payload=65_536)
        async with attached(export, form=form) as (client, _):
            too_long = wire.EINVAL if form == "simple" else wire.EOVERFLOW
            assert (await client.ask(wire.CMD_READ, 0, 65_537)).error == too_long
            assert (await client.ask(wire.CMD_WRITE, 0, data=bytes(65_537))).error == wire.EINVAL
            assert (await client.ask(wire.CMD_TRIM, 0, 65_537)).error == 0
            assert (await client.ask(wire.CMD_WRITE_ZEROES, 0, 65_537, flags=wire.CMD_FLAG_FAST_ZERO)).error == 0
            assert (await client.ask(wire.CMD_READ, 0, 65_536)).error == 0

    run(test)


# -- 10: leaving, and the rest of manners ------------------------------------------------------------------------------


@all_forms
@both_speeds
def test_rule_10_disc_finishes_what_is_in_flight_and_gets_no_reply(form: str, slow: bool) -> None:
    async def test() -> None:
        export = MemoryExport(size_bytes=SIZE, slow=slow, delay_s=0.02)
        async with attached(export, form=form) as (client, _):
            await client.send(
                client.encode(wire.CMD_WRITE, 1, 0, data=b"z" * 4096)
                + client.encode(wire.CMD_FLUSH, 2)
                + client.encode(wire.CMD_DISC, 3)
                + client.encode(wire.CMD_WRITE, 4, 8192, data=b"never" * 100)
            )
            assert {(await client.reply()).cookie for _ in range(2)} == {1, 2}
            await client.expect_end()
            assert export.data[:4096] == b"z" * 4096 and not any(export.data[8192:8700])

    run(test)


def test_rule_10_a_server_that_shuts_down_says_err_shutdown_to_options_and_finishes_requests() -> None:
    async def test() -> None:
        hold = trio.Event()
        export = MemoryExport(size_bytes=SIZE, slow=True, hold=hold)
        async with attached(export, form="extended") as (client, served), trio.open_nursery() as nursery:
            haggling = await served.connect()
            await haggling.hello()
            await client.request(wire.CMD_WRITE, 0, data=b"x" * 512)
            await trio.sleep(0.02)
            nursery.start_soon(served.server.drain)
            await trio.sleep(0.02)
            for option in (wire.OPT_EXTENDED_HEADERS, wire.OPT_LIST, wire.OPT_GO):
                assert (await haggling.option(option, info_bytes("mem")))[-1][0] == wire.REP_ERR_SHUTDOWN
            await haggling.send(option_bytes(wire.OPT_ABORT))
            hold.set()
            assert (await client.reply()).error == 0
            await client.expect_end()
            await client.stream.aclose()

    run(test)


def test_rule_10_info_and_go_give_the_same_answers() -> None:
    async def test() -> None:
        async with serving(MemoryExport(minimum_block_size=512)) as served:
            for extended, wanted in itertools.product((False, True), ((), (3,), (1, 2, 3))):
                client = await served.connect()
                await client.hello()
                await client.option(wire.OPT_EXTENDED_HEADERS if extended else wire.OPT_STRUCTURED_REPLY)
                await client.option(wire.OPT_SET_META_CONTEXT, meta_bytes("mem", "base:allocation"))
                infos = await client.option(wire.OPT_INFO, info_bytes("mem", *wanted))
                assert infos[-1][0] == wire.REP_ACK
                assert await client.option(wire.OPT_GO, info_bytes("mem", *wanted)) == infos

    run(test)


def test_rule_10_tcp_connections_have_no_delay() -> None:
    async def main() -> None:
        (listener,) = await open_tcp("127.0.0.1", 0)
        async with trio.open_nursery() as nursery:
            server = await nursery.start(serve, MemoryExports(MemoryExport()), [listener])
            host, port = listener.sock.getsockname()
            client = RawClient(await trio.open_tcp_stream(host, port))
            await client.go()
            (connection,) = server._connections
            assert connection._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            await client.disconnect()
            await client.stream.aclose()
            await server.drain(0.1)

    run(main)


# -- 11: bounds --------------------------------------------------------------------------------------------------------


def test_rule_11_ten_thousand_options_in_a_row_end_the_connection_with_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        async with serving() as served:
            client = await served.connect()
            await client.hello()
            answered = 0
            async with trio.open_nursery() as nursery:

                async def flood() -> None:
                    with contextlib.suppress(Closed):
                        await client.send(option_bytes(wire.OPT_INFO, info_bytes("mem")) * 10_000)

                nursery.start_soon(flood)
                with pytest.raises(Closed):
                    while True:
                        _, _, kind, length = struct.unpack(">QIII", await client.receive(20))
                        await client.receive(length)
                        answered += kind == wire.REP_ACK
            assert answered <= MAX_OPTIONS
            other = await served.connect()
            await other.go()

    run(test)
    only_line(caplog, f"more than {MAX_OPTIONS} options")


@pytest.mark.parametrize("option", [wire.OPT_INFO, wire.OPT_GO, wire.OPT_SET_META_CONTEXT, wire.OPT_EXPORT_NAME])
def test_rule_11_a_name_of_5000_bytes_is_too_big_and_ends_export_name(
    option: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with serving() as served:
            client = await served.connect()
            await client.hello()
            await client.option(wire.OPT_STRUCTURED_REPLY)
            name = "n" * 5000
            if option == wire.OPT_EXPORT_NAME:
                await client.send(option_bytes(option, name.encode()))
                await client.expect_end()
                return
            data = meta_bytes(name, "base:allocation") if option == wire.OPT_SET_META_CONTEXT else info_bytes(name)
            assert (await client.option(option, data))[-1][0] == wire.REP_ERR_TOO_BIG
            assert (await client.option(wire.OPT_GO, info_bytes("mem")))[-1][0] == wire.REP_ACK

    run(test)
    if option == wire.OPT_EXPORT_NAME:
        only_line(caplog, "a bad export name: the export name is longer than 4096 bytes")
    else:
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("garbage", "reason"),
    [
        (struct.pack(">I", 3) + b"GET / HTTP/1.1\r\n\r\n", "not an NBD option"),
        (struct.pack(">I", 4), "unknown client flags 0x4"),
        (struct.pack(">I", 0) + option_bytes(wire.OPT_LIST), "LIST without fixed newstyle"),
        (struct.pack(">IQII", 3, wire.IHAVEOPT, wire.OPT_GO, 1 << 31), "GO announces 2147483648 bytes"),
        (struct.pack(">I", 3) + option_bytes(wire.OPT_EXPORT_NAME, b"nobody"), "no export 'nobody'"),
        (struct.pack(">I", 3) + option_bytes(wire.OPT_GO, info_bytes("mem")) + b"x" * 28, "not an NBD request"),
        (
            struct.pack(">I", 3)
            + option_bytes(wire.OPT_EXTENDED_HEADERS)
            + option_bytes(wire.OPT_GO, info_bytes("mem"))
            + request_bytes(wire.CMD_READ, 1, 0, 512)
            + bytes(4),
            "not an NBD request (magic 0x25609513)",
        ),
    ],
)
def test_rule_11_a_disconnect_has_one_line_with_the_peer_and_the_reason(
    garbage: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with serving() as served:
            client = await served.connect()
            await client.receive(18)
            await client.send(garbage)
            with pytest.raises(Closed):
                while True:
                    await client.receive(1)

    run(test)
    only_line(caplog, "dropped", reason)
