"""Who may have which export: the decision, and what clients see of it."""

from __future__ import annotations

import errno
import inspect
import logging
import time

import pytest

from nbd import wire
from nbd.export import Client, OffersContexts
from nbd.listen import plain_address
from nbd.tls import Identity
from terrace.access import Decision, ReadOnlyView, Rule, RuledExports, SnapshotView, decide, facts_of, require_address
from tests.nbd.client import info_bytes, meta_bytes, option_bytes, run, serving
from tests.nbd.memory import ContextExport, MemoryExport, MemoryExports

NEAR = Client("near", "10.1.2.3")
FAR = Client("far", "192.0.2.7")
SIX = Client("six", "fd00::7")
UNIX = Client("process 1")
BACKUP = Client(
    "backup", "192.0.2.7", True, Identity(r"CN=backup\, nightly,OU=a+UID=7,O=Test", ("DNS:b.test", "IP:::1"))
)


def allowed(rule: Rule, client: Client) -> bool:
    return not decide([rule], "demo/vol", client).refusal


def test_what_no_rule_matches_is_for_everybody() -> None:
    assert decide([], "demo/vol", FAR) == Decision()
    assert decide([Rule("other/*", True, ())], "demo/vol", FAR) == Decision()


@pytest.mark.parametrize(
    ("pattern", "matched", "others"),
    [
        ("demo/vol", ["demo/vol", "demo/vol@one"], ["demo/vol2", "demo/vo", "xdemo/vol", "demo/voL"]),
        ("demo/*", ["demo/vol", "demo/x@one"], ["demo2/vol", "demo"]),
        ("*", ["demo/vol", "p/v@s"], []),
        ("*/db-*", ["demo/db-1", "p/db-@s"], ["demo/adb-1"]),
        ("demo/vol@*", ["demo/vol@one"], ["demo/vol"]),
        ("demo/v.l", ["demo/v.l"], ["demo/vol"]),
        ("demo/[v]ol", ["demo/[v]ol"], ["demo/vol"]),
    ],
)
def test_a_pattern_is_a_name_in_which_stars_stand_for_anything_and_a_volumes_snapshots_are_meant_too(
    pattern: str, matched: list[str], others: list[str]
) -> None:
    rules = [Rule(pattern, read_only=True)]
    assert all(decide(rules, name, FAR).read_only for name in matched)
    assert not any(decide(rules, name, FAR).read_only for name in others)


def test_the_first_rule_that_matches_decides() -> None:
    rules = [Rule("demo/open@*"), Rule("demo/open", addresses=("unix",)), Rule("demo/*", True, ())]
    assert decide(rules, "demo/open@s", FAR) == Decision()
    assert decide(rules, "demo/open", UNIX) == Decision()
    assert decide(rules, "demo/open", FAR).refusal
    assert decide(rules, "demo/other", UNIX).refusal and decide(rules, "demo/other", UNIX).read_only


def test_addresses_are_networks_of_either_family_or_the_unix_socket_or_any() -> None:
    assert allowed(Rule("*", addresses=("10.0.0.0/8",)), NEAR)
    assert not allowed(Rule("*", addresses=("10.0.0.0/8",)), FAR)
    assert not allowed(Rule("*", addresses=("10.0.0.0/8",)), SIX)
    assert not allowed(Rule("*", addresses=("0.0.0.0/0", "::/0")), UNIX)
    assert allowed(Rule("*", addresses=("fd00::/8", "10.1.2.3")), NEAR) and allowed(
        Rule("*", addresses=("fd00::/8",)), SIX
    )
    assert allowed(Rule("*", addresses=("unix",)), UNIX) and not allowed(Rule("*", addresses=("unix",)), NEAR)
    assert all(allowed(Rule("*", addresses=("any",)), client) for client in (NEAR, FAR, SIX, UNIX))
    assert not any(allowed(Rule("*", addresses=()), client) for client in (NEAR, FAR, SIX, UNIX))
    # As the server writes addresses.
    assert plain_address("::ffff:10.1.2.3") == "10.1.2.3" and plain_address("fe80::1%eth0") == "fe80::1"
    for text in ("10.0.0.1/8", "ten", "", "Unix", "10.0.0.0/33"):
        with pytest.raises(ValueError, match="is no address"):
            require_address(text)


def test_subjects_are_the_whole_one_or_a_part_or_an_alternative_name_and_need_a_certificate_over_tcp() -> None:
    assert BACKUP.identity is not None
    assert facts_of(BACKUP.identity)[1:] == [r"CN=backup\, nightly", "OU=a", "UID=7", "O=Test", "DNS:b.test", "IP:::1"]
    for pattern in (BACKUP.identity.subject, r"CN=backup\, nightly", "CN=backup*", "UID=7", "DNS:*.test", "O=Test"):
        assert allowed(Rule("*", subjects=("CN=else", pattern)), BACKUP), pattern
    for pattern in ("CN=backup", "O=Tes", "nightly", "cn=backup*", "DNS:b.test.evil", "*.test.*", ""):
        assert not allowed(Rule("*", subjects=(pattern,)), BACKUP), pattern
    assert not allowed(Rule("*", subjects=("*",)), FAR) and not allowed(Rule("*", subjects=()), BACKUP)
    # Whoever may open the Unix socket is our own user or root.
    assert allowed(Rule("*", subjects=()), UNIX)
    assert not allowed(Rule("*", addresses=("10.0.0.0/8",), subjects=("CN=backup*",)), BACKUP)


def test_no_star_ends_in_the_middle_of_an_escape_so_a_name_cannot_pass_for_two_parts() -> None:
    def holder(subject: str) -> Client:
        return Client("c", "192.0.2.7", True, Identity(subject))

    rule = Rule("*", subjects=("CN=*,O=Test",))
    assert allowed(rule, holder("CN=me,O=Test")) and allowed(rule, holder(r"CN=a\,b\\,O=Test"))
    assert not allowed(rule, holder(r"CN=me\,O=Test")) and not allowed(rule, holder(r"CN=me\\\,O=Test"))
    assert allowed(Rule("*", subjects=(r"CN=a\,*",)), holder(r"CN=a\,b"))


def test_a_long_name_is_matched_in_an_instant_however_many_stars_a_pattern_has() -> None:
    rules = [Rule("*-*-*-*-db", read_only=True)]
    began = time.perf_counter()
    assert decide(rules, "p/" + 4000 * "-", FAR) == Decision()
    assert time.perf_counter() - began < 0.5  # hours, where each place of each star is tried
    assert decide(rules, "p/" + 4000 * "-" + "db", FAR).read_only
    short = [("p/*a*a", "p/a", False), ("p/*a*a", "p/aa", True), ("p/a*", "p/a", True), ("*/*", "p", False)]
    for pattern, name, matched in short:
        assert decide([Rule(pattern, read_only=True)], name, FAR).read_only is matched, pattern


def test_what_a_client_calls_an_export_forges_no_line_of_the_log_and_does_not_fill_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        async with serving(MemoryExport("demo/a")) as served:
            served.server._exports = RuledExports(served.exports, [Rule("*", addresses=())])  # type: ignore[arg-type]
            client = await served.connect()
            await client.hello()
            for name in ("demo/x\n12:00:00 ERROR   terraced: forged", "demo/\x1b[2J", "demo/" + 3000 * "y"):
                await client.option(wire.OPT_INFO, info_bytes(name))
            for _ in range(500):
                await client.option(wire.OPT_INFO, info_bytes("demo/a"))

    with caplog.at_level(logging.WARNING, "terraced"):
        run(test)
    lines = [record.getMessage() for record in caplog.records if record.name == "terraced"]
    assert all(line.isprintable() and len(line) < 500 for line in lines) and r"\n12:00:00" in lines[0]
    assert len(lines) == 32


def test_a_snapshot_is_not_compared_with_one_that_the_client_may_not_have() -> None:
    async def test() -> None:
        contexts = {f"terrace:diff:{name}": [1] for name in ("open", "secret")} | {"terrace:tier": [0]}
        export = ContextExport("demo/vol@now", read_only=True, flags=contexts)
        async with serving(export) as served:
            served.server._exports = RuledExports(served.exports, [Rule("demo/vol@secret", addresses=())])  # type: ignore[arg-type]
            client = await served.connect()
            await client.hello()
            await client.option(wire.OPT_STRUCTURED_REPLY)
            for option, queries in (
                (wire.OPT_LIST_META_CONTEXT, ()),
                (wire.OPT_LIST_META_CONTEXT, ("terrace:diff:",)),
                (wire.OPT_SET_META_CONTEXT, tuple(contexts)),
            ):
                told = await client.option(option, meta_bytes("demo/vol@now", *queries))
                names = [payload[4:].decode() for kind, payload in told if kind == wire.REP_META_CONTEXT]
                assert "terrace:diff:open" in names and "terrace:diff:secret" not in names
            view = await served.server._exports.acquire("demo/vol@now", FAR)
            assert isinstance(view, SnapshotView) and view.read_now == export.read_now
            assert served.server._exports.identity(view) == served.exports.identity(export)
            assert await view.context_extents("terrace:diff:open", 0, 4096, 1)
            with pytest.raises(FileNotFoundError):  # selected under other rules
                await view.context_extents("terrace:diff:secret", 0, 4096, 1)
            served.server._exports.release(view)

    run(test)


def test_a_refused_export_is_missing_in_lists_and_answers_like_one_that_is_not_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        async with serving(
            MemoryExport("demo/a"), MemoryExport("demo/secret"), MemoryExport("demo/secret@s")
        ) as served:
            served.server._exports = RuledExports(served.exports, [Rule("demo/secret", addresses=("10.0.0.0/8",))])  # type: ignore[arg-type]
            client = await served.connect()
            await client.hello()
            listed = await client.option(wire.OPT_LIST)
            assert [payload[4:10] for kind, payload in listed if kind == wire.REP_SERVER] == [b"demo/a"]
            await client.option(wire.OPT_STRUCTURED_REPLY)
            for option in (wire.OPT_INFO, wire.OPT_GO):
                said = {}
                for name in ("demo/secret", "demo/secret@s", "demo/none", "none/none"):
                    ((kind, text),) = await client.option(option, info_bytes(name))
                    said[text.decode().replace(name, "NAME")] = kind
                assert said == {"there is no export 'NAME' that you may have": wire.REP_ERR_UNKNOWN}
            ((kind, _),) = await client.option(wire.OPT_LIST_META_CONTEXT, meta_bytes("demo/secret"))
            assert kind == wire.REP_ERR_UNKNOWN
            # The default is the only volume that this client may have.
            assert (await client.option(wire.OPT_INFO, info_bytes("")))[-1][0] == wire.REP_ACK
            await client.send(option_bytes(wire.OPT_EXPORT_NAME, b"demo/secret"))
            await client.expect_end()

    with caplog.at_level(logging.WARNING, "terraced"):
        run(test)
    lines = [record.getMessage() for record in caplog.records if record.name == "terraced"]
    assert len(lines) == 6 and all(": demo/secret" in line and "[nbd.exports." in line for line in lines)


def test_a_read_only_rule_says_so_refuses_writes_and_reads_the_same_bytes() -> None:
    async def test() -> None:
        export = MemoryExport("demo/vol", can_multi_conn=True)
        async with serving(export) as served:
            writer = await served.connect()
            await writer.go("demo/vol")
            served.server._exports = RuledExports(served.exports, [Rule("demo/*", read_only=True)])  # type: ignore[arg-type]
            reader = await served.connect()
            flags = await reader.go("demo/vol", structured=True, status=True)
            assert flags & wire.READ_ONLY
            for command, data in ((wire.CMD_WRITE, b"x"), (wire.CMD_TRIM, b""), (wire.CMD_WRITE_ZEROES, b"")):
                assert (await reader.ask(command, 0, 1, data=data)).error == wire.EPERM
            assert (await writer.ask(wire.CMD_WRITE, 5, data=b"hello")).error == 0
            assert (await reader.ask(wire.CMD_READ, 5, 5)).data == b"hello"
            assert (await reader.ask(wire.CMD_BLOCK_STATUS, 0, 100)).extents
            assert (await reader.ask(wire.CMD_FLUSH)).error == 0
            export.size_bytes //= 2
            assert (await reader.ask(wire.CMD_READ, export.size_bytes, 1)).error == wire.EINVAL
            await reader.disconnect()
            await writer.disconnect()

    run(test)


def test_the_view_of_an_export_is_the_export_but_for_writing() -> None:
    whole = ContextExport("demo/vol", flags={"x:y": [1]})
    view = ReadOnlyView(whole)
    assert view.read_only and view.read_now == whole.read_now and view.size_bytes == whole.size_bytes
    assert isinstance(view, OffersContexts) and view.has_context("x:y")
    for name in ("contexts", "context_extents", "read", "flush", "extents"):
        inspect.getattr_static(view, name)  # as isinstance looks for it since Python 3.12
    for refused in (lambda: view.write_now([]), lambda: view.trim_now([])):
        with pytest.raises(OSError) as caught:
            refused()
        assert caught.value.errno == errno.EPERM
    # What can't be written anyway needs no view, and what is released is the export.
    exports = MemoryExports(MemoryExport("a", read_only=True), MemoryExport("b"))
    ruled = RuledExports(exports, [Rule("*", read_only=True)])  # type: ignore[arg-type]

    async def test() -> None:
        found = [await ruled.acquire(name, UNIX) for name in ("a", "b")]
        assert found[0] is exports.exports["a"] and isinstance(found[1], ReadOnlyView)
        assert exports.open == 2
        assert ruled.identity(found[1]) == exports.identity(exports.exports["b"])
        for one in found:
            ruled.release(one)
        assert exports.open == 0

    run(test)
