"""What a primary says of its mirror in sentences, from what the mirror itself says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from replication.cluster import VoterState
from replication.leg import LegState, MirrorState
from replication.members import LegCounters, LegStatus, MirrorStatus
from terrace.mirrorwords import explained
from tests.replication.stores import first_record

ALONE = first_record("ab").next_epoch(in_sync=frozenset("a"))


def paragraph(error: str) -> str:
    """As node a serves the mirror without its leg on b, whose node answers."""
    states = {"a": LegState.UP_TO_DATE, "b": LegState.STALE}
    legs = tuple(
        LegStatus(info, states[info.id], 5.0, info.id == "a", 0, None, error if info.id == "b" else None, None,
                  LegCounters())
        for info in ALONE.legs
    )  # fmt: skip
    status = MirrorStatus(ALONE, MirrorState.DEGRADED, legs, None, None, 0, 0, 0, None, 0.0, 0.0, 0)
    part: Any = SimpleNamespace(
        name="p/v", me="a", mirror=SimpleNamespace(status=lambda: status), serves=True, problem=None, superseded=None,
        membership=ALONE, is_left_behind=False, is_named_primary=True,
    )  # fmt: skip
    voices = {node: VoterState(node, ALONE.term, ALONE) for node in "ab"}
    return explained(part, {"state": status.state.value, "waiting": None, "arbiter": None}, voices, {}).paragraph


def test_the_reason_that_a_leg_gave_is_in_the_explanation_as_it_is_in_every_other_command() -> None:
    assert "The leg on node b has been left out for 5 s: the pool sm is full; it" in paragraph("the pool sm is full")
