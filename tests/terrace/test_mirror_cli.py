"""What people read of mirrors, from what the control API says of them."""

from __future__ import annotations

import errno
import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
from click.testing import CliRunner

from terrace.api import Api
from terrace.cli.context import Context
from terrace.cli.mirror import _leg, _show, _what_is_left, show_mirrors, show_votes
from terrace.cli.mirrorbrief import brief
from terrace.cli.pool import _lost_legs, _show_report, shown_mapped
from terrace.cli.root import root
from terrace.cli.status import show_status_of_mirrors
from terrace.cli.volume import warn_of_resync
from terrace.mirroradmin import _with_others

URI = "nbd+unix:///e?socket=/run/leg.sock"


def leg(node: str, state: str, *, uri: str | None = None, **more: Any) -> dict[str, Any]:
    """As in `GET /v1/mirrors`."""
    found: dict[str, Any] = {
        "id": f"{node}{uri or ''}",
        "node": node,
        "export": uri or "p/v",
        "pool": "-" if uri else "p",
        "kind": "nbd" if uri else "terrace",
        "state": state,
        "queued_bytes": 0,
        "healed_blocks": 0,
    }
    return dict.fromkeys(("for_s", "to_sync_bytes", "bytes_per_s", "eta_s", "error")) | found | more


def mirror(*legs: dict[str, Any], **more: Any) -> dict[str, Any]:
    """As in `GET /v1/mirrors`, of a node a that serves it."""
    found: dict[str, Any] = {
        "volume": "p/v",
        "node": "a",
        "size_bytes": 1 << 25,
        "diskless": False,
        "mirror": "0" * 32,
        "role": "primary",
        "primary": "a",
        "term": 1,
        "epoch": 3,
        "token": None,
        "voters": ["a"],
        "arbiter": {"kind": "legs", "answers": None, "problem": None},
        "state": "Online",
        "waiting": None,
        "writes_fail": False,
        "problem": None,
        "legs": list(legs),
    }
    return found | more


def test_the_status_names_a_leg_on_an_nbd_server_by_its_uri(capsys: pytest.CaptureFixture[str]) -> None:
    legs = (leg("a", "UpToDate"), leg("a", "Stale", uri=URI), leg("b", "UpToDate"))
    show_status_of_mirrors([mirror(*legs, state="Degraded")])
    first, second = (line.split() for line in capsys.readouterr().out.splitlines()[2:])
    assert first == ["p/v", "Degraded", "primary", "a", "a", "UpToDate,", "b", "UpToDate"]
    assert second == [URI, "Stale"]


def test_the_mirrors_of_a_tie_breaker_are_named_in_its_list(capsys: pytest.CaptureFixture[str]) -> None:
    legs = [{"node": "a", "export": "p/db"}, {"node": "b", "export": "q/db"}]
    show_votes([{"mirror": "0" * 32, "primary": "a", "legs": legs}])
    said = " ".join(capsys.readouterr().out.split())
    assert said == (
        "This node is a tie-breaker of the mirror of p/db on node a, q/db on node b: `terrace volume mirror show` on a "
        "tells more."
    )


@pytest.mark.parametrize("command", [["resync", "p/v", URI], ["add", "p/v", URI, "--wait"]])
def test_who_waits_for_a_leg_that_is_kept_out_of_sync_gets_the_reason_as_an_error(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "1 block(s), the first at byte 4096, can be read on no leg, and an NBD server can't be told so"
    rounds = iter([leg("a", "Stale", uri=URI), leg("a", "Syncing", uri=URI)])
    last = leg("a", "Syncing", uri=URI, error=why, kept_out=True)

    def get(*path: str) -> dict[str, Any]:
        return mirror(leg("a", "UpToDate"), next(rounds, last), state="Degraded")

    client = SimpleNamespace(get=get, request=lambda *args, **more: get())
    monkeypatch.setattr(Context, "connect", lambda self: nullcontext(client))
    result = CliRunner().invoke(root, ["volume", "mirror", *command])
    assert result.exit_code == 1 and result.output.splitlines()[-1] == f"Error: {why}"


def test_a_resize_says_before_that_a_resync_may_have_to_begin_again(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_resync(mirror(leg("a", "UpToDate"), leg("b", "Syncing")))
    assert capsys.readouterr().err == "The resync of the leg on b may have to begin again after this.\n"
    for quiet in (None, mirror(leg("a", "UpToDate"), leg("b", "Stale"))):
        warn_of_resync(quiet)
    assert capsys.readouterr().err == ""


def test_the_list_of_mirrors_says_of_a_leg_that_is_out_the_reason_that_it_gave(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_mirrors([mirror(leg("a", "UpToDate"), leg("b", "Stale", error="the pool sm is full"), state="Degraded")])
    assert capsys.readouterr().out.splitlines()[-1] == "p/v: b: the pool sm is full"


@pytest.mark.parametrize(("fails", "verb"), [(False, "wait"), (True, "fail")])
def test_what_waits_below_quorum_and_what_fails_is_called_so(
    capsys: pytest.CaptureFixture[str], fails: bool, verb: str
) -> None:
    found = mirror(leg("a", "UpToDate"), leg("b", "Offline"), waiting="no record counts", writes_fail=fails)
    show_mirrors([found])
    assert capsys.readouterr().out.splitlines()[-1] == f"p/v: writes {verb}: no record counts"
    _show(found, "table")
    assert [f"Writes {verb}", "no record counts"] in [
        [text.strip() for text in line.split("  ", 1)] for line in capsys.readouterr().out.splitlines()
    ]


def test_what_no_leg_can_read_is_in_every_command_that_shows_the_mirror_though_all_legs_are_up_to_date(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = mirror(leg("a", "UpToDate"), leg("b", "UpToDate"), unreadable_blocks=3)
    said = "no leg in sync can read 3 blocks: see `terrace volume mirror explain p/v`"
    for show in (show_mirrors, show_status_of_mirrors):
        show([found])
        assert capsys.readouterr().out.splitlines()[-1] == f"p/v: {said}"
        show([found | {"unreadable_blocks": 0}, mirror(volume="p/w")])
        assert "can read" not in capsys.readouterr().out
    _show(found, "table")
    assert any(line.split(None, 1) == ["Damage", said] for line in capsys.readouterr().out.splitlines())


def test_a_leg_on_an_nbd_server_is_found_by_any_uri_of_its_export() -> None:
    found = mirror(leg("a", "UpToDate"), leg("a", "Stale", uri="nbd://nas/db"))
    for uri in ("nbd://nas/db", "nbd://nas:10809/db"):
        assert _leg(found, uri)["state"] == "Stale"
    assert _leg(found, "a")["state"] == "UpToDate"


def test_how_much_of_a_volume_is_mapped_is_not_said_to_be_nothing_where_it_is_unknown() -> None:
    volume = {"size_bytes": 1 << 25, "referenced_bytes": 0}
    assert shown_mapped(volume | {"mirror": mirror(diskless=True)}) == ("-", "-")
    for here in (None, mirror()):
        assert shown_mapped(volume | {"mirror": here})[0] == "0 B"


def test_a_verify_that_found_nothing_but_what_can_not_be_read_does_not_say_that_the_legs_differ() -> None:
    report = {"differing_bytes": 0, "repaired_bytes": 0, "unreadable_bytes": 8192, "healed_bytes": 4096}
    left = _what_is_left("p/dm", report, full=False, repair=True)
    assert left.startswith("4096 bytes of p/dm can't be read, and nothing that can be differs")
    left = _what_is_left("p/dm", report | {"differing_bytes": 1}, full=False, repair=False)
    assert left.startswith("the legs of p/dm are not equal: `terrace volume mirror verify p/dm --repair`")


@pytest.mark.parametrize(("full", "repair"), [(False, False), (False, True), (True, False)])
def test_what_can_not_be_read_needs_a_full_verify_that_repairs(full: bool, repair: bool) -> None:
    report = {"differing_bytes": 0, "repaired_bytes": 0, "unreadable_bytes": 4096, "healed_bytes": 0}
    left = _what_is_left("p/dm", report, full=full, repair=repair)
    assert "`terrace volume mirror verify p/dm --full --repair` has them from another leg" in left


def test_what_a_full_verify_could_not_repair_is_to_be_written_anew_or_restored() -> None:
    report = {"differing_bytes": 0, "repaired_bytes": 0, "unreadable_bytes": 4096, "healed_bytes": 0}
    left = _what_is_left("p/dm", report, full=True, repair=True)
    assert "write them anew or restore them" in left and "--repair" not in left


@pytest.mark.parametrize("differing", [0, 1])
@pytest.mark.parametrize("full", [False, True])
def test_where_something_can_not_be_read_it_is_said_what_names_the_damaged_and_what_the_lost(
    differing: int, full: bool
) -> None:
    report = {"differing_bytes": differing, "repaired_bytes": 0, "unreadable_bytes": 4096, "healed_bytes": 0}
    left = _what_is_left("p/dm", report, full=full, repair=full)
    assert left.endswith(
        "; on each node `terrace pool scrub p` names what is damaged there, `terrace pool check p` what is lost"
    )
    if differing:
        assert "each node" not in _what_is_left("p/dm", report | {"unreadable_bytes": 0}, full=full, repair=full)


class _Verified:
    """A control API with what a verify found: 4 KiB each, in `runs` of 3 neighbours, on nodes b and c."""

    def __init__(self, runs: int) -> None:
        offsets = [(run * 4 + block) * 4096 for run in range(runs) for block in range(3)]
        self.report = {
            "differing": [],
            "unreadable": [{"node": node, "offset": at, "length": 4096} for at in offsets for node in ("b", "c")],
            "compared_bytes": 1 << 25,
            "compared": ["a", "b", "c"],
            "equal": False,
            "differing_bytes": 0,
            "repaired_bytes": 0,
            "unreadable_bytes": len(offsets) * 2 * 4096,
            "healed_bytes": 0,
            "left_bytes": len(offsets) * 2 * 4096,
        }

    def __enter__(self) -> _Verified:
        return self

    def __exit__(self, *error: object) -> None: ...

    def stream(self, method: str, *path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"report": self.report}]


def _verify(monkeypatch: pytest.MonkeyPatch, found: _Verified, *options: str) -> str:
    monkeypatch.setattr(Context, "connect", lambda self: found)
    result = CliRunner().invoke(root, ["volume", "mirror", "verify", "p/v", "--full", *options])
    assert result.exit_code == 1
    return result.stdout


def test_a_verify_shows_neighbouring_ranges_as_one_and_the_first_fifty(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _verify(monkeypatch, _Verified(2)).splitlines()
    assert [line.split() for line in lines[2:6]] == [
        [node, "unreadable", str(at), "12288"] for node in ("b", "c") for at in (0, 16384)
    ]
    assert "more" not in "".join(lines)
    lines = _verify(monkeypatch, _Verified(40)).splitlines()
    assert sum("12288" in line for line in lines) == 50
    assert "and 30 more; -o json has all." in lines


def test_for_programs_a_verify_has_all_ranges_as_they_were_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _Verified(40)
    assert json.loads(_verify(monkeypatch, found, "-o", "json")) == found.report


def test_a_check_shows_twenty_segments_that_are_miscounted_and_all_else(capsys: pytest.CaptureFixture[str]) -> None:
    counts = [f"segment {id}: 37 blocks are counted as live, 36 are mapped" for id in range(25)]
    report = {"volumes": 1, "blocks_mapped": 9, "bytes_checked": 0, "ok": False, "problems": [*counts, "p/v: damaged"]}
    _show_report("p", report, "table")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:22] == [
        *counts[:20],
        "p/v: damaged",
        "and 5 more segments whose blocks are miscounted; -o json has them.",
    ]
    assert "has 26 problem(s)" in lines[22]
    _show_report("p", report, "json")
    assert json.loads(capsys.readouterr().out)["problems"] == report["problems"]
    _show_report("p", report | {"problems": counts[:20]}, "table")
    assert "more" not in capsys.readouterr().out


def test_each_leg_that_is_lost_with_its_pool_is_named_those_that_cannot_be_used_too() -> None:
    asked: list[tuple[str, ...]] = []

    class Client:
        def get(self, *path: str) -> dict[str, Any]:
            asked.append(path)
            return mirror(leg("a", "Offline"), leg("b", "UpToDate"), state="Degraded")

    volumes: list[dict[str, Any]] = [
        {"name": "p/v", "mirror": {}, "mirror_problem": None},
        {"name": "p/plain", "mirror": None, "mirror_problem": None},
        {"name": "p/x", "mirror": None, "mirror_problem": "this node has no name any more"},
    ]
    assert _lost_legs(cast(Any, Client()), "p", volumes) == [
        "p/v: its leg here goes with the pool; another one is up to date on node b.",
        "p/x: it is a leg of a mirror that can't be used, and goes with the pool; WHETHER ANOTHER ONE IS UP TO DATE "
        "ISN'T KNOWN.",
    ]
    assert asked == [("pools", "p", "volumes", "v", "mirror")]


class _Added:
    """A control API that adds a leg on b, which is in `state`."""

    def __init__(self, state: str) -> None:
        self.found = mirror(leg("a", "UpToDate"), leg("b", state))

    def __enter__(self) -> _Added:
        return self

    def __exit__(self, *error: object) -> None: ...

    def request(self, method: str, *path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self.found


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("Stale", "being filled (Stale); `terrace volume mirror show p/v` tells how far it is"),
        ("Syncing", "being filled (Syncing); `terrace volume mirror show p/v` tells how far it is"),
        ("UpToDate", "UpToDate"),
        ("Offline", "Offline"),
    ],
)
def test_of_a_leg_that_was_added_it_is_said_that_it_is_being_filled(
    state: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "connect", lambda self: _Added(state))
    result = CliRunner().invoke(root, ["volume", "mirror", "add", "p/v", "b"])
    assert result.output == f"p/v has a leg on b, p/v, which is {said}.\n"


def test_ctrl_c_at_a_resync_that_is_watched_says_that_it_may_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(_Added):
        def get(self, *path: str) -> dict[str, Any]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Context, "connect", lambda self: Interrupted("Stale"))
    for command in (["resync", "p/v", "b"], ["add", "p/v", "b", "--wait"]):
        result = CliRunner().invoke(root, ["volume", "mirror", *command])
        assert result.exit_code == 1
        assert "may still be done; see `terrace volume mirror show p/v`" in result.output


def test_a_mirror_that_was_deleted_is_told_with_as_many_other_legs_as_it_had() -> None:
    assert [_with_others(legs) for legs in range(3)] == ["", " with its other leg", " with its 2 other legs"]


def test_a_volume_that_is_a_leg_whose_record_cannot_be_understood_says_so() -> None:
    def of(volume: str) -> None:
        if volume == "x":
            raise OSError(errno.EIO, "p/x is a leg of a mirror, and can't be used: garbage")

    api = cast(Any, SimpleNamespace(_mirrors=SimpleNamespace(of=of)))
    pool = cast(Any, SimpleNamespace(volume=lambda name: name))
    broken = Api._with_mirror(api, pool, {"name": "p/x"})
    assert broken["mirror"] is None and "can't be used: garbage" in broken["mirror_problem"]
    plain = Api._with_mirror(api, pool, {"name": "p/v"})
    assert plain["mirror"] is None and plain["mirror_problem"] is None


class _Refusing:
    """A control API whose node can't be drained."""

    def __enter__(self) -> _Refusing:
        return self

    def __exit__(self, *error: object) -> None: ...

    def request(self, method: str, *path: str, body: dict[str, Any]) -> dict[str, Any]:
        refused = ["p/w: its only leg that is up to date is here"]
        return {"node": "a", "demote": ["p/v"], "refused": refused, "dry_run": body["dry_run"]}


def test_a_drain_that_is_refused_says_that_nothing_has_changed_and_a_dry_run_what_would_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Context, "connect", lambda self: _Refusing())
    result = CliRunner().invoke(root, ["node", "drain", "a"])
    assert result.exit_code == 1
    assert "demoted" not in result.output
    assert "Error: a can't be taken down, and nothing has changed: p/w: its only leg" in result.output
    result = CliRunner().invoke(root, ["node", "drain", "a", "--dry-run"])
    assert result.exit_code == 1
    assert "p/v would be demoted." in result.output and "a can't be taken down: p/w: its only leg" in result.output


def test_a_leg_that_is_left_over_is_called_so_in_the_table_of_volumes() -> None:
    leg = {"role": "secondary", "diskless": False, "primary": "a", "state": "Unknown"}
    assert brief(leg) == brief(leg | {"left_over": False}) == "leg of a"
    assert brief(leg | {"left_over": True}) == "left-over leg"
