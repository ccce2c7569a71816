"""Each change of a mirror is one event."""

from __future__ import annotations

import dataclasses

from replication.leg import LegState, MirrorState
from replication.members import LegCounters, LegStatus, MirrorStatus
from terrace.mirrorevents import FAULTED_S, LOSS_S, REPEATED_S, RESYNC_S, MirrorEvents
from tests.replication.stores import first_record

AB = first_record("ab")
ALONE = AB.next_epoch(in_sync=frozenset("a"))
UP, OFFLINE, SYNCING, STALE = LegState.UP_TO_DATE, LegState.OFFLINE, LegState.SYNCING, LegState.STALE


def status(b: LegState = UP, *, counts: bool = True, error: str | None = None) -> MirrorStatus:
    """Of legs a and b; `counts`: the record has b in sync."""
    record = AB if counts else ALONE
    states = (UP, b)
    legs = tuple(
        LegStatus(info, state, 0.0, info.id == "a", 0, None, None if state is UP else error, None, LegCounters())
        for info, state in zip(record.legs, states, strict=True)
    )
    state = MirrorState.ONLINE if b is UP else MirrorState.DEGRADED
    return MirrorStatus(record, state, legs, None, None, 0, 0, 0, None, 0.0, 0.0, 0)


class Told:
    def __init__(self) -> None:
        self.events = MirrorEvents("a")
        self.now = 0.0

    def begun(self, seen: MirrorStatus) -> list[str]:
        return [text for _, text in self.events.begun("p/v", seen, self.now).events]

    def looked(self, seen: MirrorStatus, after_s: float = 0.01) -> list[str]:
        self.now += after_s
        return [text for _, text in self.events.looked("p/v", seen, self.now).events]


def test_the_loss_of_a_leg_is_one_event_that_says_that_writes_go_on_without_it() -> None:
    told = Told()
    assert told.begun(status()) == ["node a is primary of p/v, term 1", "mirror p/v is Online"]
    assert told.looked(status(OFFLINE, error="gone")) == []
    assert told.looked(status(OFFLINE, error="gone"), LOSS_S / 2) == []
    lost = ["the leg of p/v on node b is Stale: gone", "mirror p/v is Degraded"]
    assert told.looked(status(OFFLINE, counts=False, error="gone")) == lost
    assert told.looked(status(OFFLINE, counts=False, error="gone"), 60.0) == []
    assert told.looked(status(SYNCING, counts=False)) == []
    assert told.looked(status(SYNCING, counts=False), RESYNC_S) == ["the leg of p/v on node b is Syncing"]
    assert told.looked(status()) == ["the leg of p/v on node b is UpToDate", "mirror p/v is Online"]
    assert told.looked(status(OFFLINE, counts=False, error="gone")) == lost, "each loss is told"


def test_a_leg_that_no_record_can_leave_behind_is_told_once_as_out_of_reach() -> None:
    told = Told()
    told.begun(status())
    assert told.looked(status(OFFLINE, error="gone")) == []
    lost = ["the leg of p/v on node b is Offline: gone", "mirror p/v is Degraded"]
    assert told.looked(status(OFFLINE, error="gone"), LOSS_S + 0.1) == lost
    assert told.looked(status(OFFLINE, error="gone"), 60.0) == []
    assert told.looked(status(OFFLINE, counts=False, error="gone"), 60.0) == []
    assert told.looked(status(SYNCING, counts=False)) == []
    assert told.looked(status(SYNCING, counts=False), RESYNC_S) == ["the leg of p/v on node b is Syncing"]


def test_a_leg_that_is_not_there_when_a_primary_begins_is_one_event_too() -> None:
    told = Told()
    assert told.begun(status(OFFLINE, error="silent")) == ["node a is primary of p/v, term 1"]
    lost = ["the leg of p/v on node b is Stale: silent", "mirror p/v is Degraded"]
    assert told.looked(status(OFFLINE, counts=False, error="silent")) == lost
    told = Told()
    at_once = told.begun(status(OFFLINE, counts=False, error="silent"))
    assert at_once == ["node a is primary of p/v, term 1", *lost]


def test_a_leg_that_comes_back_before_its_loss_is_told_is_no_event() -> None:
    told = Told()
    told.begun(status())
    assert told.looked(status(OFFLINE)) == [] and told.looked(status()) == []


def test_a_new_leg_is_no_loss() -> None:
    told = Told()
    alone = dataclasses.replace(status(), legs=status().legs[:1])
    assert told.begun(alone)[-1] == "mirror p/v is Online"
    assert told.looked(status(SYNCING, counts=False)) == []
    assert told.looked(status()) == ["the leg of p/v on node b is UpToDate"]
    assert told.looked(status(OFFLINE, counts=False))[-1] == "mirror p/v is Degraded"


def test_a_split_brain_is_told_as_one_and_a_problem_once() -> None:
    told = Told()
    told.begun(status())
    split = status(OFFLINE, counts=False, error="split brain: two histories")
    first = "the leg of p/v on node b: split brain: two histories"
    assert told.looked(split) == [first, "mirror p/v is Degraded"] and told.looked(split) == []
    assert told.events.problem("p/v", "why") == [("mirror", "mirror p/v can't be served here: why")]
    assert told.events.problem("p/v", "why") == []


def test_a_leg_that_is_up_to_date_again_is_named_for_who_has_to_forget_what_it_missed() -> None:
    told = MirrorEvents("a")
    assert told.begun("p/v", status(), 0.0).in_sync == ["a", "b"]
    assert told.looked("p/v", status(SYNCING, counts=False), 1.0).in_sync == []
    assert told.looked("p/v", status(), 2.0).in_sync == ["b"]


def test_a_leg_that_is_tried_again_and_fails_again_is_one_event_until_the_reason_changes() -> None:
    told = Told()
    told.begun(status())
    full = "the pool sm is full"
    assert told.looked(status(OFFLINE, counts=False, error=full))[0] == f"the leg of p/v on node b is Stale: {full}"
    for _ in range(100):
        assert told.looked(status(SYNCING, counts=False), 5.0) == []
        assert told.looked(status(STALE, counts=False, error=full)) == []
    assert told.looked(status(SYNCING, counts=False), 5.0) == []
    read_only = ["the leg of p/v on node b is Stale: the pool sm is read-only"]
    assert told.looked(status(STALE, counts=False, error="the pool sm is read-only")) == read_only
    back = ["the leg of p/v on node b is UpToDate", "mirror p/v is Online"]
    assert told.looked(status(), 5.0) == back, "a loss for another reason isn't told as repeated"


def test_a_leg_that_was_lost_and_is_tried_again_before_anybody_looks_is_told_when_that_fails_or_has_lasted() -> None:
    told = Told()
    told.begun(status())
    assert told.looked(status(SYNCING, counts=False)) == []
    assert told.looked(status(STALE, counts=False, error="full")) == [
        "the leg of p/v on node b is Stale: full",
        "mirror p/v is Degraded",
    ]
    told = Told()
    told.begun(status())
    syncing = "the leg of p/v on node b is Syncing"
    for _ in range(3):
        assert told.looked(status(SYNCING, counts=False), RESYNC_S) == []
        back = told.looked(status(), RESYNC_S / 2)
        assert back == [syncing, "the leg of p/v on node b is UpToDate"], "each loss is told"
    assert told.looked(status(SYNCING, counts=False)) == []
    lasts = told.looked(status(SYNCING, counts=False), RESYNC_S + 0.1)
    assert lasts == [syncing, "mirror p/v is Degraded"]
    assert told.looked(status()) == ["the leg of p/v on node b is UpToDate", "mirror p/v is Online"]


def test_a_leg_that_is_tried_again_before_anybody_looks_holds_nothing_else_up() -> None:
    faulted = dataclasses.replace(status(SYNCING, counts=False), state=MirrorState.FAULTED)
    told = Told()
    told.begun(status())
    assert told.looked(faulted) == []
    assert told.looked(status(SYNCING, counts=False), RESYNC_S - 0.1) == []
    assert told.looked(faulted, 0.01) == [], "out of service for a moment, twice"
    told = Told()
    told.begun(status())
    assert told.looked(faulted) == []
    assert "mirror p/v is Faulted" in told.looked(faulted, FAULTED_S + 0.1)
    assert told.looked(status(SYNCING, counts=False)) == ["mirror p/v is Degraded"]


def test_a_leg_that_is_lost_each_time_that_it_is_in_sync_is_soon_told_no_more_until_it_has_come_to_stay() -> None:
    told = Told()
    told.begun(status())
    seen: list[str] = []
    for _ in range(100):
        seen += told.looked(status(OFFLINE, counts=False, error="full"), 5.0)
        seen += told.looked(status(SYNCING, counts=False), 5.0)
        seen += told.looked(status(), 0.1)
    stale = ["the leg of p/v on node b is Stale: full", "mirror p/v is Degraded"]
    back = ["the leg of p/v on node b is UpToDate", "mirror p/v is Online"]
    assert seen == [*stale, *back, *stale]
    assert told.looked(status(), REPEATED_S) == back


FAULTED = dataclasses.replace(status(), state=MirrorState.FAULTED, waiting="a majority has not answered lately")


def test_a_mirror_that_is_out_of_service_for_a_moment_as_with_new_voters_is_no_event() -> None:
    told = Told()
    assert told.begun(FAULTED) == ["node a is primary of p/v, term 1"]
    assert told.looked(status(), FAULTED_S / 2) == ["mirror p/v is Online"]
    for _ in range(3):
        assert (
            told.looked(FAULTED) == [] and told.looked(FAULTED, FAULTED_S * 0.9) == [] and told.looked(status()) == []
        )


def test_a_mirror_that_stays_out_of_service_is_told_once_and_so_is_that_it_is_back() -> None:
    told = Told()
    told.begun(status())
    assert told.looked(FAULTED) == []
    assert told.looked(FAULTED, FAULTED_S + 0.1) == ["mirror p/v is Faulted"]
    assert told.looked(FAULTED, 60.0) == []
    assert told.looked(status()) == ["mirror p/v is Online"]


def test_a_clean_demotion_is_told_as_one_at_once_and_without_its_legs() -> None:
    legs = tuple(dataclasses.replace(leg, state=LegState.UNPROVEN) for leg in status().legs)
    ended = dataclasses.replace(status(), state=MirrorState.FAULTED, legs=legs, deposed="p/v: it was demoted")
    for token, then in ((None, ""), ("b", ": node b holds the token")):
        told = Told()
        told.begun(status())
        demoted = dataclasses.replace(ended, membership=AB.next_epoch(primary=None, token=token))
        assert told.looked(demoted) == [f"mirror p/v was demoted, and no node serves it now{then}"]
        assert told.looked(demoted, 60.0) == []
        assert told.begun(status()) == ["node a is primary of p/v, term 1", "mirror p/v is Online"]
    told = Told()
    told.begun(status())
    assert told.looked(ended) == ["mirror p/v is Faulted: it was demoted"], "by no record that counts"


def test_that_the_daemon_stops_serving_a_mirror_is_no_event() -> None:
    told = Told()
    told.begun(status())
    assert told.looked(dataclasses.replace(FAULTED, deposed="p/v: the mirror was stopped", is_stopped=True)) == []


def test_nothing_is_kept_of_a_leg_that_was_removed() -> None:
    told = Told()
    told.begun(status())
    told.looked(status(OFFLINE, counts=False, error="gone"))
    told.looked(status(SYNCING, counts=False))
    both = status()
    told.looked(dataclasses.replace(both, legs=both.legs[:1]))
    events = told.events
    for known in (events._seen, events._told, events._lost_at, events._lost_by, events._back_at, events._repeats):
        assert "b" not in known  # type: ignore[operator]
    assert "b" not in events._new | events._split
