"""What a primary says of its mirror in sentences, from what the mirror itself says."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from replication.cluster import VoterState
from replication.leg import LegState, MirrorState
from replication.members import LegCounters, LegStatus, MirrorStatus
from replication.membership import Membership, Options
from replication.resync import Progress as Resynced
from terrace.mirrors import _served_legs
from terrace.mirrorwords import explained, writes_fail
from tests.replication.stores import first_record

ALONE = first_record("ab").next_epoch(in_sync=frozenset("a"))


def paragraph(error: str | None, **more: Any) -> str:
    """As node a serves the mirror without its leg on b, whose node answers."""
    states = {"a": LegState.UP_TO_DATE, "b": LegState.STALE}
    legs = tuple(
        LegStatus(info, states[info.id], 5.0, info.id == "a", 0, None, error if info.id == "b" else None, None,
                  LegCounters())
        for info in ALONE.legs
    )  # fmt: skip
    status = MirrorStatus(ALONE, MirrorState.DEGRADED, legs, None, None, 0, 0, 0, None, 0.0, 0.0, 0, **more)
    part: Any = SimpleNamespace(
        name="p/v", me="a", serves=True, problem=None, superseded=None, membership=ALONE, is_left_behind=False,
        is_named_primary=True,
        mirror=SimpleNamespace(status=lambda: status, healing=SimpleNamespace(unmendable={})),
    )  # fmt: skip
    voices = {node: VoterState(node, ALONE.term, ALONE) for node in "ab"}
    return explained(
        part, {"state": status.state.value, "waiting": None, "arbiter": None, "node": "a"}, voices, {}
    ).paragraph


def test_the_reason_that_a_leg_gave_is_in_the_explanation_as_it_is_in_every_other_command() -> None:
    assert "The leg on node b has been left out for 5 s: the pool sm is full; it" in paragraph("the pool sm is full")


def test_a_leg_that_is_out_for_its_damaged_map_has_one_next_step_and_any_other_damaged_one_is_made_anew() -> None:
    out = "the pool p takes no writes; `terrace pool check p --give-up-map` gives up what lies below"
    said = paragraph(out, map_damaged=frozenset("b"))
    assert out in said and "mirror remove" not in said and "mirror demote" not in said and "mirror add" not in said
    for error in ("no route to host", None):
        assert "`terrace volume mirror remove p/v b`, then" in paragraph(error, map_damaged=frozenset("b"))


def test_writes_fail_where_the_option_says_so_and_a_leg_in_sync_is_there() -> None:
    failing = dataclasses.replace(ALONE, options=Options(below_quorum="fail"))

    def status(record: Membership, state: MirrorState, **more: Any) -> MirrorStatus:
        found = MirrorStatus(record, state, (), "no record counts", None, 0, 0, 0, None, 0.0, 0.0, 0)
        return dataclasses.replace(found, **more)

    assert writes_fail(status(failing, MirrorState.DEGRADED, is_failing=True))
    assert not writes_fail(status(failing, MirrorState.DEGRADED)), "not tried yet, or a snapshot is made"
    assert writes_fail(status(failing, MirrorState.FAULTED)), "its lease is over"
    assert not writes_fail(status(failing, MirrorState.FAULTED, is_lost=True))
    assert not writes_fail(status(ALONE, MirrorState.FAULTED))
    assert not writes_fail(status(failing, MirrorState.ONLINE, waiting=None))


def test_why_a_leg_is_kept_out_of_sync_is_in_its_status_in_each_round_of_its_resync() -> None:
    why = "1 block(s) can be read on no leg"
    seen = Resynced(total_bytes=8192, done_bytes=8192, unread_blocks=1, eta_s=0.0)
    for state, error, resync in ((LegState.SYNCING, None, seen), (LegState.STALE, why, None)):
        legs = (
            LegStatus(ALONE.legs[0], LegState.UP_TO_DATE, 5.0, True, 0, None, None, None, LegCounters()),
            LegStatus(ALONE.legs[1], state, 5.0, False, 0, None, error, resync, LegCounters(), kept_out=why),
        )
        status = MirrorStatus(ALONE, MirrorState.DEGRADED, legs, None, None, 0, 0, 0, None, 0.0, 0.0, 1)
        shown = _served_legs(status, "p/v", "a")
        assert (shown[1]["error"], shown[1]["kept_out"], shown[1]["eta_s"]) == (why, True, None)
        assert "kept_out" not in shown[0]
