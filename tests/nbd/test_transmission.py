"""The pure half of transmission: which requests are right, and the bytes of the replies."""

from __future__ import annotations

import errno

import pytest

from nbd import wire
from nbd.transmission import (
    EXTENT_LIMIT,
    Session,
    block_status,
    clip_utf8,
    data_header,
    error_value,
    extent_limit,
    failure,
    form_of,
    hole,
    is_absurd,
    judge,
    may_filter,
    narrow,
    pack_successes,
    payload_bytes,
    read_header,
    success,
    transmission_flags,
)
from tests.nbd.client import extended_bytes, filter_bytes
from tests.nbd.memory import MemoryExport

SIZE = 1 << 20
SIMPLE = Session()
STRUCTURED = Session(structured=True, contexts=((1, wire.META_ALLOCATION),))
EXTENDED = Session(structured=True, contexts=((1, wire.META_ALLOCATION), (2, "x:y")), extended=True)
COMMANDS = [
    wire.CMD_READ,
    wire.CMD_WRITE,
    wire.CMD_FLUSH,
    wire.CMD_TRIM,
    wire.CMD_CACHE,
    wire.CMD_WRITE_ZEROES,
    wire.CMD_BLOCK_STATUS,
]
RANGED = [command for command in COMMANDS if command != wire.CMD_FLUSH]


def verdict(command: int, offset: int = 0, length: int = 0, flags: int = 0, **changes: object) -> int:
    export = MemoryExport(**{"size_bytes": SIZE, **changes})  # type: ignore[arg-type]
    return judge(STRUCTURED, export, command, flags, offset, length)


@pytest.mark.parametrize("command", [*range(8, 20), 255, 65535])
def test_an_unknown_command_is_einval(command: int) -> None:
    assert verdict(command) == wire.EINVAL


def test_past_the_end_writes_get_enospc_and_others_einval() -> None:
    for offset, length in [(SIZE, 1), (SIZE - 1, 2), (SIZE + 1, 0), (0, SIZE + 1), (2**64 - 1, 2**32 - 1)]:
        for command in RANGED:
            expected = wire.ENOSPC if command in (wire.CMD_WRITE, wire.CMD_WRITE_ZEROES) else wire.EINVAL
            assert verdict(command, offset, length) == expected, (command, offset, length)


def test_the_last_byte_is_inside_and_offset_plus_length_does_not_wrap() -> None:
    for command in RANGED:
        assert verdict(command, SIZE - 1, 1) == 0
        assert verdict(command, 2**64 - 4096, 8192) != 0


def test_a_read_only_export_gives_eperm_to_whatever_writes() -> None:
    for command in COMMANDS:
        modifies = command in (wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES)
        length = 0 if command == wire.CMD_FLUSH else 4096
        assert verdict(command, 0, length, read_only=True) == (wire.EPERM if modifies else 0)
    assert verdict(wire.CMD_WRITE, SIZE, 4096, read_only=True) == wire.EPERM


def test_fua_is_accepted_on_every_command() -> None:
    for command in COMMANDS:
        length = 0 if command == wire.CMD_FLUSH else 4096
        assert verdict(command, 0, length, wire.CMD_FLAG_FUA) == 0


def test_a_flag_that_does_not_belong_to_the_command_is_einval() -> None:
    home = {
        wire.CMD_FLAG_NO_HOLE: wire.CMD_WRITE_ZEROES,
        wire.CMD_FLAG_DF: wire.CMD_READ,
        wire.CMD_FLAG_REQ_ONE: wire.CMD_BLOCK_STATUS,
        wire.CMD_FLAG_FAST_ZERO: wire.CMD_WRITE_ZEROES,
    }
    for flag in [1 << bit for bit in range(1, 16)]:
        for command in COMMANDS:
            length = 0 if command == wire.CMD_FLUSH else 4096
            expected = 0 if home.get(flag) == command else wire.EINVAL
            assert verdict(command, 0, length, flag) == expected, (flag, command)


def test_df_without_structured_replies_is_einval() -> None:
    assert judge(SIMPLE, MemoryExport(), wire.CMD_READ, wire.CMD_FLAG_DF, 0, 512) == wire.EINVAL


def test_block_status_without_a_context_is_einval() -> None:
    assert judge(Session(True), MemoryExport(), wire.CMD_BLOCK_STATUS, 0, 0, 512) == wire.EINVAL


def test_length_zero_is_fine_but_has_no_block_status() -> None:
    for command in COMMANDS:
        assert verdict(command) == (wire.EINVAL if command == wire.CMD_BLOCK_STATUS else 0)
        assert verdict(command, SIZE) == (0 if command in RANGED[:-1] else wire.EINVAL)


def test_flush_with_an_offset_or_a_length_is_einval() -> None:
    assert verdict(wire.CMD_FLUSH, 1) == verdict(wire.CMD_FLUSH, 0, 1) == wire.EINVAL


def test_only_payloads_are_limited_to_the_maximum_payload() -> None:
    huge = MemoryExport(size_bytes=0)
    huge.size_bytes = 1 << 40
    for command in RANGED:
        assert judge(STRUCTURED, huge, command, 0, 0, wire.MAX_PAYLOAD_BYTES) == 0
        error = judge(STRUCTURED, huge, command, 0, 0, 0xFFFFFFFF)
        assert error == {wire.CMD_READ: wire.EOVERFLOW, wire.CMD_WRITE: wire.EINVAL}.get(command, 0)
    assert judge(SIMPLE, huge, wire.CMD_READ, 0, 0, 0xFFFFFFFF) == wire.EINVAL


def test_requests_must_be_aligned_to_the_minimum_block_size() -> None:
    for command in RANGED:
        assert verdict(command, 512, 512, minimum_block_size=512) == 0
        assert verdict(command, 1, 512, minimum_block_size=512) == wire.EINVAL
        assert verdict(command, 512, 1, minimum_block_size=512) == wire.EINVAL


def test_enotsup_is_only_for_fast_zero() -> None:
    error = OSError(errno.EOPNOTSUPP, "no")
    assert error_value(error, fast_zero=True) == wire.ENOTSUP
    assert error_value(error) == wire.EINVAL


def test_any_errno_becomes_a_value_of_the_protocol() -> None:
    expected = {"ENOSPC": 28, "EDQUOT": 28, "EFBIG": 28, "EROFS": 1, "EACCES": 1, "EPERM": 1, "EINVAL": 22, "EIO": 5}
    for name, value in expected.items():
        assert error_value(OSError(getattr(errno, name), "")) == value
    allowed = {1, 5, 12, 22, 28, 108}
    assert all(error_value(OSError(number, "")) in allowed for number in errno.errorcode)
    assert error_value(OSError("no number")) == wire.EIO


def test_the_flags_tell_the_truth() -> None:
    common = wire.HAS_FLAGS | wire.SEND_FLUSH | wire.SEND_FUA | wire.SEND_CACHE
    writing = wire.SEND_TRIM | wire.SEND_WRITE_ZEROES | wire.SEND_FAST_ZERO
    multi = wire.CAN_MULTI_CONN
    assert transmission_flags(MemoryExport(), structured=False) == common | writing | multi
    assert transmission_flags(MemoryExport(), structured=True) == common | writing | multi | wire.SEND_DF
    assert transmission_flags(MemoryExport(read_only=True), structured=False) == common | multi | wire.READ_ONLY
    plain = MemoryExport(rotational=True, can_multi_conn=False)
    assert transmission_flags(plain, structured=False) == common | writing | wire.ROTATIONAL
    filtering = transmission_flags(MemoryExport(), structured=True, filters_status=True)
    assert filtering == common | writing | multi | wire.SEND_DF | 1 << 12


def test_the_bytes_of_the_replies() -> None:
    cookie = 0x0102030405060708
    tag = bytes(range(1, 9))
    assert success(SIMPLE, cookie, 512) == b"\x67\x44\x66\x98\0\0\0\0" + tag
    assert failure(SIMPLE, cookie, 512, 28, "ignored") == b"\x67\x44\x66\x98\0\0\0\x1c" + tag
    assert failure(STRUCTURED, cookie, 512, 28, "full") == (
        b"\x66\x8e\x33\xef\0\x01\x80\x01" + tag + b"\0\0\0\x0a\0\0\0\x1c\0\x04full"
    )
    assert read_header(SIMPLE, cookie, 512, 4096) == success(SIMPLE, cookie, 512)
    data = b"\x66\x8e\x33\xef\0\x01\0\x01" + tag + b"\0\0\x10\x08\0\0\0\0\0\0\x02\0"
    assert read_header(STRUCTURED, cookie, 512, 4096) == data
    assert read_header(STRUCTURED, cookie, 512, 0) == b"\x66\x8e\x33\xef\0\x01\0\0" + tag + b"\0\0\0\0"
    assert block_status(STRUCTURED, cookie, 0, [(1, [(512, 0), (3584, 3)])], length=4096, only_one=False) == (
        b"\x66\x8e\x33\xef\0\x01\0\x05" + tag + b"\0\0\0\x14\0\0\0\x01\0\0\x02\0\0\0\0\0\0\0\x0e\0\0\0\0\x03"
    )


def test_block_status_is_cut_to_the_request_and_never_empty() -> None:
    reply = block_status(STRUCTURED, 1, 0, [(1, [(1 << 40, 3)])], length=4096, only_one=True)
    assert reply[24:] == b"\0\0\x10\0\0\0\0\x03"
    assert len(block_status(STRUCTURED, 1, 0, [(1, [(512, 0), (512, 3)])], length=1024, only_one=True)) == 32
    assert len(block_status(STRUCTURED, 1, 0, [(1, [(512, 0), (512, 3)])], length=512, only_one=False)) == 32
    with pytest.raises(ValueError, match="no extents"):
        block_status(STRUCTURED, 1, 0, [(1, [(512, 0)]), (2, [])], length=512, only_one=False)


def test_block_status_has_one_chunk_a_context_and_only_the_last_is_done() -> None:
    statuses = [(1, [(512, 0), (512, 3)]), (7, [(1 << 40, 0xFFFFFFFF)]), (2, [(256, 1)])]
    tag = b"\0" * 7 + b"\x09"
    head = b"\x66\x8e\x33\xef\0"
    assert block_status(STRUCTURED, 9, 0, statuses, length=1024, only_one=False) == (
        head + b"\0\0\x05" + tag + b"\0\0\0\x14\0\0\0\x01\0\0\x02\0\0\0\0\0\0\0\x02\0\0\0\0\x03"
        + head + b"\0\0\x05" + tag + b"\0\0\0\x0c\0\0\0\x07\0\0\x04\0\xff\xff\xff\xff"
        + head + b"\x01\0\x05" + tag + b"\0\0\0\x0c\0\0\0\x02\0\0\x01\0\0\0\0\x01"
    )  # fmt: skip
    assert len(block_status(STRUCTURED, 9, 0, statuses, length=1024, only_one=True)) == 3 * 32


def test_a_length_of_64_bits_is_clamped_to_the_32_of_the_reply() -> None:
    reply = block_status(STRUCTURED, 1, 0, [(1, [(1 << 40, 1)])], length=1 << 40, only_one=False)
    assert reply[24:] == b"\xff\xff\xff\xff\0\0\0\x01"


def test_all_contexts_together_stay_within_the_limit_of_extents() -> None:
    for count in range(1, 20):
        contexts = tuple((number, f"x:{number}") for number in range(count))
        assert 0 < extent_limit(contexts, only_one=False) * count <= EXTENT_LIMIT
        assert extent_limit(contexts, only_one=True) == 1


def test_messages_are_cut_between_characters() -> None:
    assert clip_utf8("aä" * 3, 5) == "aäa".encode()
    assert len(failure(STRUCTURED, 1, 0, 5, "ä" * 5000)) == 26 + 4096
    assert clip_utf8("a\0b", 9) == b"ab"


def test_the_bytes_of_hole_chunks() -> None:
    tag = bytes(range(1, 9))
    cookie = 0x0102030405060708
    assert hole(STRUCTURED, cookie, 512, 4096, 65536, done=False) == (
        b"\x66\x8e\x33\xef\0\0\0\x02" + tag + b"\0\0\0\x0c" + b"\0\0\0\0\0\0\x10\0" + b"\0\x01\0\0"
    )
    assert data_header(STRUCTURED, cookie, 512, 4096, 256, done=False) == (
        b"\x66\x8e\x33\xef\0\0\0\x01" + tag + b"\0\0\x01\x08" + b"\0\0\0\0\0\0\x10\0"
    )


def test_the_bytes_of_extended_requests() -> None:
    raw = b"\x21\xe4\x1c\x71\0\x20\0\x01" + bytes(range(1, 9)) + b"\0\0\0\0\0\0\x02\0" + b"\0\0\x01\0\0\0\0\0"
    assert raw == extended_bytes(wire.CMD_WRITE, 0x0102030405060708, 512, 1 << 40, wire.CMD_FLAG_PAYLOAD_LEN)
    form = form_of(EXTENDED)
    assert form.request_bytes == len(raw) == 32
    assert form.unpack(memoryview(raw), 0) == (form.write_head, 0x0102030405060708, 512, 1 << 40)
    assert form.read_head == int.from_bytes(b"\x21\xe4\x1c\x71\0\0\0\0") and form.magic == 0x21E41C71


def test_the_bytes_of_extended_replies() -> None:
    cookie = 0x0102030405060708
    magic, tag, asked = b"\x6e\x8a\x27\x8c", bytes(range(1, 9)), b"\0\0\0\0\0\0\x02\0"
    done = magic + b"\0\x01\0\0" + tag + asked + bytes(8)
    assert success(EXTENDED, cookie, 512) == read_header(EXTENDED, cookie, 512, 0) == done
    assert failure(EXTENDED, cookie, 512, 28, "full") == (
        magic + b"\0\x01\x80\x01" + tag + asked + b"\0\0\0\0\0\0\0\x0a" + b"\0\0\0\x1c\0\x04full"
    )
    data = magic + b"\0\x01\0\x01" + tag + asked + b"\0\0\0\0\0\0\x10\x08" + asked
    assert read_header(EXTENDED, cookie, 512, 4096) == data
    assert data_header(EXTENDED, cookie, 512, 1024, 256, done=False) == (
        magic + b"\0\0\0\x01" + tag + asked + b"\0\0\0\0\0\0\x01\x08" + b"\0\0\0\0\0\0\x04\0"
    )
    assert hole(EXTENDED, cookie, 512, 4096, 65536, done=True) == (
        magic + b"\0\x01\0\x02" + tag + asked + b"\0\0\0\0\0\0\0\x0c" + b"\0\0\0\0\0\0\x10\0" + b"\0\x01\0\0"
    )
    statuses = [(1, [(512, 0), (1 << 40, 3)]), (7, [(1 << 41, 0xFFFFFFFF)])]
    assert block_status(EXTENDED, cookie, 512, statuses, length=1 << 41, only_one=False) == (
        magic + b"\0\0\0\x06" + tag + asked + b"\0\0\0\0\0\0\0\x28" + b"\0\0\0\x01\0\0\0\x02"
        + b"\0\0\0\0\0\0\x02\0" + bytes(8) + b"\0\0\x01\0\0\0\0\0" + b"\0\0\0\0\0\0\0\x03"
        + magic + b"\0\x01\0\x06" + tag + asked + b"\0\0\0\0\0\0\0\x18" + b"\0\0\0\x07\0\0\0\x01"
        + b"\0\0\x02\0\0\0\0\0" + b"\0\0\0\0\xff\xff\xff\xff"
    )  # fmt: skip


@pytest.mark.parametrize("session", [SIMPLE, STRUCTURED, EXTENDED], ids=["simple", "structured", "extended"])
def test_successes_in_a_row_are_the_same_as_one_by_one(session: Session) -> None:
    into = memoryview(bytearray(1000))
    cookies, ranges = [7, 2**64 - 1, 9], [(0, b"x"), (2**63, b"y"), (512, b"z")]
    expected = b"".join(success(session, cookie, offset) for cookie, (offset, _) in zip(cookies, ranges, strict=True))
    assert pack_successes(session, into, 5, cookies, ranges) == 5 + len(expected)
    assert into[5 : 5 + len(expected)] == expected and not any(into[5 + len(expected) :])


def test_with_extended_headers_a_write_must_have_payload_len_and_only_it_may() -> None:
    export = MemoryExport(size_bytes=SIZE)
    for command in COMMANDS:
        length = 0 if command == wire.CMD_FLUSH else 4096
        for flags, expected in [(wire.CMD_FLAG_PAYLOAD_LEN, command == wire.CMD_WRITE), (0, command != wire.CMD_WRITE)]:
            assert judge(EXTENDED, export, command, flags, 0, length) == (0 if expected else wire.EINVAL)
            assert judge(STRUCTURED, export, command, flags, 0, length) == (wire.EINVAL if flags else 0)


def test_what_follows_a_request_is_told_by_the_flag_and_without_extended_headers_by_the_command() -> None:
    flag = wire.CMD_FLAG_PAYLOAD_LEN
    for command in [*COMMANDS, 99]:
        compact = 512 if command == wire.CMD_WRITE else 0
        assert payload_bytes(STRUCTURED, command, 0, 512) == payload_bytes(SIMPLE, command, flag, 512) == compact
        assert payload_bytes(EXTENDED, command, flag | wire.CMD_FLAG_FUA, 512) == 512
        assert payload_bytes(EXTENDED, command, 0, 512) == 0


def test_only_extended_payloads_over_32_mib_are_absurd() -> None:
    assert is_absurd(EXTENDED, (32 << 20) + 1) and is_absurd(EXTENDED, 2**64 - 1)
    assert not is_absurd(EXTENDED, 32 << 20)
    assert not is_absurd(STRUCTURED, 0xFFFFFFFF)


def test_lengths_of_64_bits_are_judged_by_the_end_of_the_export_and_never_wrap() -> None:
    export = MemoryExport(size_bytes=0)
    export.size_bytes = 1 << 62
    for command in (wire.CMD_TRIM, wire.CMD_WRITE_ZEROES, wire.CMD_CACHE, wire.CMD_BLOCK_STATUS):
        past = wire.ENOSPC if command == wire.CMD_WRITE_ZEROES else wire.EINVAL
        assert judge(EXTENDED, export, command, 0, 0, 1 << 62) == 0
        assert judge(EXTENDED, export, command, 0, 1, 1 << 62) == past
        for offset, length in [(2**64 - 1, 2**64 - 1), (1 << 62, 2**64 - (1 << 62)), (4096, 2**64 - 4096)]:
            assert judge(EXTENDED, export, command, 0, offset, length) == past


def test_a_filter_is_a_length_and_at_least_one_of_the_selected_contexts_each_once() -> None:
    status = wire.CMD_BLOCK_STATUS
    assert [size for size in range(40) if may_filter(EXTENDED, status, size)] == [12, 16]
    assert not may_filter(EXTENDED, wire.CMD_READ, 12) and not may_filter(Session(True, (), True), status, 12)
    assert narrow(EXTENDED, filter_bytes(1 << 40, 2)) == (1 << 40, ((2, "x:y"),))
    assert narrow(EXTENDED, filter_bytes(0, 2, 1)) == (0, ((2, "x:y"), (1, wire.META_ALLOCATION)))
    for wrong in [(3,), (1, 1), (1, 3), (0,)]:
        assert narrow(EXTENDED, filter_bytes(512, *wrong)) is None
