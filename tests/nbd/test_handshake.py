"""The handshake machine, fed by hand: every option, and everything a client can get wrong."""

from __future__ import annotations

import errno
import itertools
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd import wire
from nbd.handshake import (
    MAX_LISTED_CONTEXTS,
    MAX_OPTION_BYTES,
    MAX_OPTIONS,
    MAX_QUERIES,
    MAX_SELECTED_CONTEXTS,
    MAX_SKIPPED_BYTES,
    MAX_TAKEOVER_BYTES,
    NEED_DATA,
    Handshake,
    Hangup,
    Send,
    WantExport,
    WantList,
    WantTakeover,
)
from nbd.transmission import Session
from tests.nbd.client import info_bytes, meta_bytes, option_bytes
from tests.nbd.memory import ContextExport, MemoryExport

EXPORT = MemoryExport(name="mem", description="bytes in memory", size_bytes=1 << 20)


class Talk:
    """Drives a machine as the server does, with one export called ``mem``."""

    def __init__(self, flags: int = 3, export: MemoryExport = EXPORT) -> None:
        self.export = export
        self.machine = Handshake()
        self.sent = b""
        self.end: Hangup | None = None
        self.say(struct.pack(">I", flags))

    def say(self, data: bytes) -> bytes:
        """Feed bytes; returns what the server sends in answer."""
        self.machine.feed(data)
        before = len(self.sent)
        while self.end is None and not self.machine.begun:
            event = self.machine.next_event()
            if event is NEED_DATA:
                break
            if isinstance(event, Send):
                self.sent += event.data
            elif isinstance(event, WantList):
                self.sent += self.machine.listed([(EXPORT.name, EXPORT.description)])
            elif isinstance(event, WantExport):
                if event.name == EXPORT.name:
                    self.sent += self.machine.described(self.export)
                else:
                    self.sent += self.machine.refused(FileNotFoundError(errno.ENOENT, "no such export"))
            elif isinstance(event, Hangup):
                self.sent += event.farewell
                self.end = event
        return self.sent[before:]

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        return split(self.say(option_bytes(option, data)), option)


def split(raw: bytes, option: int) -> list[tuple[int, bytes]]:
    replies = []
    while raw:
        magic, echoed, kind, length = struct.unpack_from(">QIII", raw)
        assert magic == wire.REP_MAGIC and echoed == option
        replies.append((kind, raw[20 : 20 + length]))
        raw = raw[20 + length :]
    return replies


def final(replies: list[tuple[int, bytes]]) -> int:
    assert replies
    return replies[-1][0]


def test_the_greeting_offers_fixed_newstyle_and_no_zeroes() -> None:
    talk = Talk()
    assert talk.sent == b"NBDMAGICIHAVEOPT\x00\x03"


@pytest.mark.parametrize("flags", [4, 1 << 31, 0xFFFFFFFF])
def test_unknown_client_flags_drop_the_client(flags: int) -> None:
    assert Talk(flags).end is not None


def test_without_fixed_newstyle_only_export_name_is_taken() -> None:
    assert Talk(0).option(wire.OPT_LIST) == []
    talk = Talk(0)
    assert len(talk.say(option_bytes(wire.OPT_EXPORT_NAME, b"mem"))) == 134
    assert talk.machine.begun


@pytest.mark.parametrize(("flags", "size"), [(1, 134), (3, 10)])
def test_export_name_is_followed_by_zeroes_unless_they_were_negotiated_away(flags: int, size: int) -> None:
    talk = Talk(flags)
    answer = talk.say(option_bytes(wire.OPT_EXPORT_NAME, b"mem"))
    assert len(answer) == size
    size_bytes, transmission = struct.unpack_from(">QH", answer)
    assert size_bytes == 1 << 20
    assert transmission & wire.HAS_FLAGS and not transmission & wire.SEND_DF
    assert not any(answer[10:])
    assert talk.machine.begun


def test_export_name_of_an_unknown_export_gets_no_answer() -> None:
    talk = Talk()
    assert talk.say(option_bytes(wire.OPT_EXPORT_NAME, b"other")) == b""
    assert not talk.machine.begun


def test_go_has_no_zero_padding() -> None:
    talk = Talk(1)
    replies = talk.option(wire.OPT_GO, info_bytes("mem"))
    assert [kind for kind, _ in replies] == [wire.REP_INFO, wire.REP_ACK]
    assert talk.machine.begun


def test_abort_is_acknowledged_and_its_data_ignored() -> None:
    talk = Talk()
    assert talk.option(wire.OPT_ABORT, b"whatever") == [(wire.REP_ACK, b"")]
    assert talk.end is not None and not talk.end.rude


def test_list_names_and_describes_and_refuses_data() -> None:
    talk = Talk()
    assert talk.option(wire.OPT_LIST) == [(wire.REP_SERVER, b"\0\0\0\x03membytes in memory"), (wire.REP_ACK, b"")]
    assert final(talk.option(wire.OPT_LIST, b"x")) == wire.REP_ERR_INVALID


@pytest.mark.parametrize("option", [0, 4, 12, 99, 1 << 31, wire.OPT_STARTTLS])
def test_an_unsupported_option_is_drained_and_refused(option: int) -> None:
    talk = Talk()
    assert final(talk.option(option, bytes(100_000))) == wire.REP_ERR_UNSUP
    assert final(talk.option(wire.OPT_LIST)) == wire.REP_ACK


def test_an_option_with_too_much_data_is_drained_without_being_kept() -> None:
    talk = Talk()
    talk.say(struct.pack(">QII", wire.IHAVEOPT, wire.OPT_GO, MAX_SKIPPED_BYTES))
    for _ in range(MAX_SKIPPED_BYTES // 4096):
        assert talk.sent == talk.sent[:18]
        assert len(talk.machine._buffer) <= 4096
        answer = talk.say(bytes(4096))
    assert final(split(answer, wire.OPT_GO)) == wire.REP_ERR_TOO_BIG
    assert final(talk.option(wire.OPT_LIST)) == wire.REP_ACK


def test_an_option_that_announces_gigabytes_ends_the_connection() -> None:
    talk = Talk()
    talk.say(struct.pack(">QII", wire.IHAVEOPT, 77, 0xFFFFFFFF))
    assert talk.end is not None


def test_a_bad_option_magic_ends_the_connection_at_its_first_byte() -> None:
    talk = Talk()
    talk.say(b"G")
    assert talk.end is not None and talk.end.rude


@pytest.mark.parametrize(
    ("name", "reply"),
    [
        (b"x" * 4096, wire.REP_ERR_UNKNOWN),
        (b"x" * 4097, wire.REP_ERR_TOO_BIG),
        (b"\xff", wire.REP_ERR_INVALID),
        (b"a\0b", wire.REP_ERR_INVALID),
    ],
)
def test_bad_names_are_refused_and_the_talk_goes_on(name: bytes, reply: int) -> None:
    talk = Talk()
    data = struct.pack(">I", len(name)) + name + b"\0\0"
    for option in (wire.OPT_INFO, wire.OPT_GO):
        assert final(talk.option(option, data)) == reply
    assert final(talk.option(wire.OPT_LIST)) == wire.REP_ACK


@pytest.mark.parametrize("name", [b"x" * 4097, b"\xff", b"a\0b", bytes(MAX_OPTION_BYTES + 1)])
def test_a_bad_name_in_export_name_ends_the_connection(name: bytes) -> None:
    talk = Talk()
    talk.say(option_bytes(wire.OPT_EXPORT_NAME, name))
    assert talk.end is not None and talk.sent[18:] == b""


@pytest.mark.parametrize(
    "data",
    [b"", b"\0\0\0", b"\0\0\0\x09mem\0\0", info_bytes("mem") + b"x", b"\0\0\0\x03mem\0\x02\0\x01", b"\xff" * 10],
)
def test_info_and_go_with_data_that_does_not_fit_are_invalid(data: bytes) -> None:
    for option in (wire.OPT_INFO, wire.OPT_GO):
        assert final(Talk().option(option, data)) == wire.REP_ERR_INVALID


def test_info_and_go_give_the_same_answers() -> None:
    for wanted in ([], [wire.INFO_BLOCK_SIZE], [wire.INFO_NAME, wire.INFO_DESCRIPTION, wire.INFO_BLOCK_SIZE, 99]):
        talk = Talk()
        talk.option(wire.OPT_STRUCTURED_REPLY)
        info = talk.option(wire.OPT_INFO, info_bytes("mem", *wanted))
        assert not talk.machine.begun
        assert info == talk.option(wire.OPT_GO, info_bytes("mem", *wanted))
        assert talk.machine.begun
        assert len(info) == 2 + len([kind for kind in wanted if kind <= 3])


def test_go_tells_name_description_and_block_sizes_when_asked() -> None:
    wanted = (wire.INFO_NAME, wire.INFO_DESCRIPTION, wire.INFO_BLOCK_SIZE)
    payloads = [data for kind, data in Talk().option(wire.OPT_GO, info_bytes("mem", *wanted))]
    assert payloads[1] == b"\0\x01mem"
    assert payloads[2] == b"\0\x02bytes in memory"
    assert struct.unpack(">HIII", payloads[3]) == (3, 1, 4096, 32 << 20)


def test_go_for_an_unknown_export_is_an_error_and_another_go_may_follow() -> None:
    talk = Talk()
    ((kind, text),) = talk.option(wire.OPT_GO, info_bytes("other"))
    assert kind == wire.REP_ERR_UNKNOWN and text == b"no such export"
    assert final(talk.option(wire.OPT_GO, info_bytes("mem"))) == wire.REP_ACK


def test_df_is_advertised_only_with_structured_replies() -> None:
    for structured in (False, True):
        talk = Talk()
        if structured:
            assert talk.option(wire.OPT_STRUCTURED_REPLY) == [(wire.REP_ACK, b"")]
        flags = struct.unpack(">HQH", talk.option(wire.OPT_GO, info_bytes("mem"))[0][1])[2]
        assert bool(flags & wire.SEND_DF) is structured
        assert talk.machine.session.structured is structured


def test_structured_reply_with_data_is_invalid_and_changes_nothing() -> None:
    talk = Talk()
    assert final(talk.option(wire.OPT_STRUCTURED_REPLY, b"x")) == wire.REP_ERR_INVALID
    talk.option(wire.OPT_GO, info_bytes("mem"))
    assert not talk.machine.session.structured


def test_extended_headers_bring_structured_replies_with_them_and_take_precedence() -> None:
    talk = Talk()
    assert talk.option(wire.OPT_EXTENDED_HEADERS) == [(wire.REP_ACK, b"")]
    assert final(talk.option(wire.OPT_STRUCTURED_REPLY)) == wire.REP_ERR_EXT_HEADER_REQD
    assert talk.option(wire.OPT_EXTENDED_HEADERS) == [(wire.REP_ACK, b"")]
    flags = struct.unpack(">HQH", talk.option(wire.OPT_GO, info_bytes("mem"))[0][1])[2]
    assert flags & wire.SEND_DF
    assert talk.machine.session == Session(structured=True, extended=True)


def test_extended_headers_may_follow_structured_replies_and_keep_the_contexts() -> None:
    talk = structured_talk()
    assert contexts(talk.option(wire.OPT_SET_META_CONTEXT, meta_bytes("mem", "base:allocation")))
    assert talk.option(wire.OPT_EXTENDED_HEADERS) == [(wire.REP_ACK, b"")]
    talk.option(wire.OPT_GO, info_bytes("mem"))
    assert talk.machine.session == Session(True, ((1, "base:allocation"),), extended=True)


def test_extended_headers_with_data_are_invalid_and_change_nothing() -> None:
    talk = Talk()
    assert final(talk.option(wire.OPT_EXTENDED_HEADERS, b"x")) == wire.REP_ERR_INVALID
    assert final(talk.option(wire.OPT_STRUCTURED_REPLY)) == wire.REP_ACK
    talk.option(wire.OPT_GO, info_bytes("mem"))
    assert talk.machine.session == Session(structured=True)


def test_export_name_after_extended_headers_drops_the_client() -> None:
    talk = Talk()
    talk.option(wire.OPT_EXTENDED_HEADERS)
    assert talk.say(option_bytes(wire.OPT_EXPORT_NAME, b"mem")) == b""
    assert talk.end is not None and talk.end.rude and not talk.machine.begun


def test_filtered_block_status_is_advertised_where_contexts_are_selected_with_extended_headers() -> None:
    for extended, selected in itertools.product((False, True), ("mem", "other", "")):
        talk = Talk()
        talk.option(wire.OPT_EXTENDED_HEADERS if extended else wire.OPT_STRUCTURED_REPLY)
        if selected:
            talk.option(wire.OPT_SET_META_CONTEXT, meta_bytes(selected, "base:allocation"))
        infos = talk.option(wire.OPT_INFO, info_bytes("mem"))
        assert talk.option(wire.OPT_GO, info_bytes("mem")) == infos
        flags = struct.unpack(">HQH", infos[0][1])[2]
        assert bool(flags & wire.BLOCK_STATUS_PAYLOAD) is (extended and selected == "mem")


@pytest.mark.parametrize("option", [wire.OPT_INFO, wire.OPT_LIST, 99])
def test_a_handshake_has_a_bounded_number_of_options(option: int) -> None:
    talk = Talk()
    for _ in range(MAX_OPTIONS):
        assert talk.option(option, info_bytes("mem") if option == wire.OPT_INFO else b"")
    assert talk.end is None
    assert talk.say(option_bytes(wire.OPT_ABORT)) == b""
    assert talk.end is not None and talk.end.rude and f"{MAX_OPTIONS} options" in talk.end.reason


def contexts(replies: list[tuple[int, bytes]]) -> list[bytes]:
    assert final(replies) == wire.REP_ACK
    assert all(kind == wire.REP_META_CONTEXT for kind, _ in replies[:-1])
    return [data for _, data in replies[:-1]]


def structured_talk(export: MemoryExport = EXPORT) -> Talk:
    talk = Talk(export=export)
    talk.option(wire.OPT_STRUCTURED_REPLY)
    return talk


def test_meta_contexts_need_structured_replies_or_extended_headers() -> None:
    for option in (wire.OPT_LIST_META_CONTEXT, wire.OPT_SET_META_CONTEXT):
        assert final(Talk().option(option, meta_bytes("mem", "base:allocation"))) == wire.REP_ERR_INVALID
        for form in (wire.OPT_STRUCTURED_REPLY, wire.OPT_EXTENDED_HEADERS):
            talk = Talk()
            talk.option(form)
            assert contexts(talk.option(option, meta_bytes("mem", "base:allocation")))


@pytest.mark.parametrize(
    ("queries", "listed", "selected"),
    [
        ([], True, False),
        (["base:"], True, False),
        (["base:allocation"], True, True),
        (["base:other"], False, False),
        (["qemu:dirty-bitmap:x", "x-y:"], False, False),
        (["x-y:z", "base:allocation", "base:allocation"], True, True),
        (["nocolon", ""], False, False),
    ],
)
def test_base_is_a_wildcard_only_in_list_and_unknown_contexts_are_ignored(
    queries: list[str], listed: bool, selected: bool
) -> None:
    talk = structured_talk()
    found = contexts(talk.option(wire.OPT_LIST_META_CONTEXT, meta_bytes("mem", *queries)))
    assert found == ([b"\0\0\0\0base:allocation"] if listed else [])
    found = contexts(talk.option(wire.OPT_SET_META_CONTEXT, meta_bytes("mem", *queries)))
    assert found == ([b"\0\0\0\x01base:allocation"] if selected else [])
    talk.option(wire.OPT_GO, info_bytes("mem"))
    assert talk.machine.session.contexts == (((1, "base:allocation"),) if selected else ())


DIFF = ContextExport(
    flags={"terrace:diff:a": [], "terrace:diff:b": [], "terrace:heat": [], "qemu:x": [], "terrace:diff:hidden": []},
    unlisted={"terrace:diff:hidden"},
)


@pytest.mark.parametrize(
    ("queries", "listed", "selected"),
    [
        ([], "base:allocation terrace:diff:a terrace:diff:b terrace:heat qemu:x", ""),
        (["base:"], "base:allocation", ""),
        (["terrace:"], "terrace:diff:a terrace:diff:b terrace:heat", ""),
        (["terrace:diff:"], "terrace:diff:a terrace:diff:b", ""),
        (["terrace:diff:", "terrace:", "base:"], "terrace:diff:a terrace:diff:b terrace:heat base:allocation", ""),
        (["terrace", "terrace:diff", "terrace:d", "a:", ":"], "", ""),
        (["terrace:diff:b"], "terrace:diff:b", "2=terrace:diff:b"),
        (["terrace:diff:hidden"], "terrace:diff:hidden", "2=terrace:diff:hidden"),
        (["terrace:diff:gone", "other:x", "terrace:heat"], "terrace:heat", "2=terrace:heat"),
        (
            ["terrace:diff:b", "base:allocation", "terrace:diff:a", "terrace:diff:b"],
            "terrace:diff:b base:allocation terrace:diff:a",
            "1=base:allocation 2=terrace:diff:b 3=terrace:diff:a",
        ),
    ],
)
def test_an_exports_own_contexts_are_listed_by_prefix_and_selected_by_name(
    queries: list[str], listed: str, selected: str
) -> None:
    talk = structured_talk(DIFF)
    found = contexts(talk.option(wire.OPT_LIST_META_CONTEXT, meta_bytes("mem", *queries)))
    assert found == [b"\0\0\0\0" + name.encode() for name in listed.split()]
    found = contexts(talk.option(wire.OPT_SET_META_CONTEXT, meta_bytes("mem", *queries)))
    chosen = tuple((int(number), name) for number, name in (one.split("=") for one in selected.split()))
    assert found == [struct.pack(">I", number) + name.encode() for number, name in chosen]
    talk.option(wire.OPT_GO, info_bytes("mem"))
    assert talk.machine.session.contexts == chosen


def test_contexts_that_are_listed_or_selected_at_once_are_bounded() -> None:
    many = ContextExport(flags={f"terrace:diff:{number}": [] for number in range(MAX_LISTED_CONTEXTS + 10)})
    talk = structured_talk(many)
    for queries in ([], ["terrace:"], ["terrace:", "terrace:diff:"]):
        found = contexts(talk.option(wire.OPT_LIST_META_CONTEXT, meta_bytes("mem", *queries)))
        assert len(found) == len(set(found)) == MAX_LISTED_CONTEXTS
    names = [f"terrace:diff:{number}" for number in range(MAX_SELECTED_CONTEXTS + 1)]
    assert len(contexts(talk.option(wire.OPT_SET_META_CONTEXT, meta_bytes("mem", *names[1:])))) == MAX_SELECTED_CONTEXTS
    assert final(talk.option(wire.OPT_SET_META_CONTEXT, meta_bytes("mem", *names))) == wire.REP_ERR_TOO_BIG
    talk.option(wire.OPT_GO, info_bytes("mem"))
    assert talk.machine.begun and talk.machine.session.contexts == ()


def test_too_many_queries_are_refused() -> None:
    talk = structured_talk()
    assert contexts(talk.option(wire.OPT_LIST_META_CONTEXT, meta_bytes("mem", *["base:allocation"] * MAX_QUERIES)))
    for option in (wire.OPT_LIST_META_CONTEXT, wire.OPT_SET_META_CONTEXT):
        assert final(talk.option(option, meta_bytes("mem", *["x:y"] * (MAX_QUERIES + 1)))) == wire.REP_ERR_TOO_BIG


@pytest.mark.parametrize(
    "failing",
    [
        meta_bytes("other", "base:allocation"),
        meta_bytes("mem", "base:allocation") + b"x",
        meta_bytes("mem"),
        b"",
        meta_bytes("mem", "base:" + "x" * 5000),
        meta_bytes("mem", *["base:allocation"] * (MAX_QUERIES + 1)),
        bytes(MAX_OPTION_BYTES + 1),
    ],
)
def test_set_meta_context_replaces_the_contexts_even_when_it_fails(failing: bytes) -> None:
    talk = structured_talk()
    assert contexts(talk.option(wire.OPT_SET_META_CONTEXT, meta_bytes("mem", "base:allocation")))
    talk.option(wire.OPT_SET_META_CONTEXT, failing)
    talk.option(wire.OPT_GO, info_bytes("mem"))
    assert talk.machine.begun and talk.machine.session.contexts == ()


def test_list_meta_context_does_not_touch_the_selection() -> None:
    talk = structured_talk()
    talk.option(wire.OPT_SET_META_CONTEXT, meta_bytes("mem", "base:allocation"))
    talk.option(wire.OPT_LIST_META_CONTEXT, meta_bytes("mem"))
    talk.option(wire.OPT_GO, info_bytes("mem"))
    assert talk.machine.session.contexts == ((1, "base:allocation"),)


def test_contexts_selected_for_another_export_do_not_count() -> None:
    machine = Handshake()
    machine.feed(
        struct.pack(">I", 3)
        + option_bytes(wire.OPT_STRUCTURED_REPLY)
        + option_bytes(wire.OPT_SET_META_CONTEXT, meta_bytes("mem", "base:allocation"))
        + option_bytes(wire.OPT_GO, info_bytes("second"))
    )
    while not machine.begun:
        if isinstance(machine.next_event(), WantExport):
            machine.described(EXPORT)
    assert machine.session.structured and machine.session.contexts == ()


@pytest.mark.parametrize(
    ("number", "reply"),
    [
        (errno.ENOENT, wire.REP_ERR_UNKNOWN),
        (errno.EIO, wire.REP_ERR_UNKNOWN),
        (errno.EACCES, wire.REP_ERR_POLICY),
        (errno.ESHUTDOWN, wire.REP_ERR_SHUTDOWN),
    ],
)
def test_a_failed_open_says_why(number: int, reply: int) -> None:
    machine = Handshake()
    machine.feed(struct.pack(">I", 3) + option_bytes(wire.OPT_GO, info_bytes("mem")))
    while not isinstance(machine.next_event(), WantExport):
        pass
    assert split(machine.refused(OSError(number, os.strerror(number))), wire.OPT_GO) == [
        (reply, os.strerror(number).encode())
    ]


def test_a_server_that_shuts_down_refuses_all_but_abort() -> None:
    talk = Talk()
    talk.machine.shutting_down = True
    for option in (wire.OPT_LIST, wire.OPT_GO, wire.OPT_STRUCTURED_REPLY, 99):
        assert final(talk.option(option, b"abc")) == wire.REP_ERR_SHUTDOWN
    assert talk.option(wire.OPT_ABORT) == [(wire.REP_ACK, b"")]


def test_bytes_behind_go_are_kept_for_transmission() -> None:
    talk = Talk()
    talk.say(option_bytes(wire.OPT_GO, info_bytes("mem")) + b"requests")
    assert talk.machine.leftover() == b"requests"


SCRIPT = (
    option_bytes(wire.OPT_LIST)
    + option_bytes(wire.OPT_STRUCTURED_REPLY)
    + option_bytes(99, b"unknown")
    + option_bytes(wire.OPT_SET_META_CONTEXT, meta_bytes("mem", "base:allocation"))
    + option_bytes(wire.OPT_INFO, info_bytes("other"))
    + option_bytes(wire.OPT_GO, info_bytes("mem", 1, 2, 3))
)


@given(st.lists(st.integers(1, len(SCRIPT) - 1), max_size=20))
def test_any_split_of_the_bytes_gives_the_same_answers(cuts: list[int]) -> None:
    whole = Talk()
    whole.say(SCRIPT)
    parts = Talk()
    edges = [0, *sorted(cuts), len(SCRIPT)]
    for start, end in itertools.pairwise(edges):
        parts.say(SCRIPT[start:end])
    assert parts.sent == whole.sent and parts.machine.session == whole.machine.session
    assert parts.machine.begun


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=200),
            st.builds(option_bytes, st.integers(0, 14), st.binary(max_size=80)),
            st.builds(
                lambda option, data: option_bytes(option, data),
                st.integers(0, 14),
                st.builds(meta_bytes, st.sampled_from(["mem", "other"]), st.sampled_from(["base:", "a:b"])),
            ),
        ),
        max_size=20,
    )
)
def test_garbage_never_raises_and_never_grows_the_buffer(pieces: list[bytes]) -> None:
    talk = Talk()
    for piece in pieces:
        talk.say(piece)
        if talk.end or talk.machine.begun:
            break
        assert len(talk.machine._buffer) <= 16 + MAX_OPTION_BYTES


# --- a private option ---


def with_takeover(flags: int = 3, **terms: bool) -> Handshake:
    """A machine that takes the private option, as far as its options."""
    machine = Handshake(takeovers=(wire.OPT_TERRACE,), **terms)
    assert isinstance(machine.next_event(), Send)
    machine.feed(struct.pack(">I", flags))
    return machine


def test_a_private_option_is_asked_about_and_given_away_with_all_behind_it() -> None:
    machine = with_takeover()
    machine.feed(option_bytes(wire.OPT_TERRACE, b"data") + b"behind")
    assert machine.next_event() == WantTakeover(wire.OPT_TERRACE, b"data")
    assert split(machine.given_away(), wire.OPT_TERRACE) == [(wire.REP_ACK, b"")]
    assert machine.begun and machine.leftover() == b"behind"


def test_a_private_option_that_is_declined_changes_nothing() -> None:
    machine = with_takeover()
    machine.feed(option_bytes(wire.OPT_STRUCTURED_REPLY) + option_bytes(wire.OPT_TERRACE))
    assert isinstance(machine.next_event(), Send)
    assert machine.next_event() == WantTakeover(wire.OPT_TERRACE, b"")
    assert split(machine.declined("not you"), wire.OPT_TERRACE) == [(wire.REP_ERR_POLICY, b"not you")]
    machine.feed(option_bytes(wire.OPT_GO, info_bytes("mem")))
    assert isinstance(machine.next_event(), WantExport)
    machine.described(EXPORT)
    assert machine.session.structured


@pytest.mark.parametrize("length", [MAX_TAKEOVER_BYTES, MAX_TAKEOVER_BYTES + 1, MAX_OPTION_BYTES + 1])
def test_the_data_of_a_private_option_has_a_bound(length: int) -> None:
    machine = with_takeover()
    machine.feed(option_bytes(wire.OPT_TERRACE, bytes(length)))
    event = machine.next_event()
    if length > MAX_TAKEOVER_BYTES:
        assert isinstance(event, Send)
        ((kind, _),) = split(event.data, wire.OPT_TERRACE)
        assert kind == wire.REP_ERR_TOO_BIG
    else:
        assert event == WantTakeover(wire.OPT_TERRACE, bytes(length))


def test_a_private_option_is_refused_before_tls_where_that_is_required_and_at_the_end() -> None:
    machine = with_takeover(tls_offered=True, tls_required=True)
    machine.feed(option_bytes(wire.OPT_TERRACE, b"data"))
    event = machine.next_event()
    assert isinstance(event, Send) and split(event.data, wire.OPT_TERRACE)[0][0] == wire.REP_ERR_TLS_REQD
    machine = with_takeover()
    machine.shutting_down = True
    machine.feed(option_bytes(wire.OPT_TERRACE, b"data"))
    event = machine.next_event()
    assert isinstance(event, Send) and split(event.data, wire.OPT_TERRACE)[0][0] == wire.REP_ERR_SHUTDOWN


def test_a_private_option_without_fixed_newstyle_ends_the_connection() -> None:
    machine = with_takeover(flags=0)
    machine.feed(option_bytes(wire.OPT_TERRACE, b"data"))
    event = machine.next_event()
    assert isinstance(event, Hangup) and "TERRACE" in event.reason


def test_no_option_of_the_protocol_is_given_away() -> None:
    machine = Handshake(takeovers=(wire.OPT_GO,))
    assert isinstance(machine.next_event(), Send)
    machine.feed(struct.pack(">I", 3) + option_bytes(wire.OPT_GO, info_bytes("mem")))
    assert isinstance(machine.next_event(), WantExport)


def test_a_private_option_that_nobody_is_there_for_is_as_any_unknown_one() -> None:
    ((kind, text),) = Talk().option(wire.OPT_TERRACE, b"data")
    assert kind == wire.REP_ERR_UNSUP and b"not supported" in text
