"""The oracle finds each kind of wrong, and takes nothing else for wrong."""

from __future__ import annotations

import pytest

from tests.cluster.oracle import Oracle, Region, Violation

REGION = Region(writer=1, offset=4096, unit_bytes=64, count=4)
ZEROS = bytes(64)


def oracle() -> Oracle:
    return Oracle([REGION], seed=7)


def read(oracle: Oracle, data: bytes, index: int = 0) -> None:
    oracle.judge(REGION, index, oracle.floors(REGION, index, 1), data)


def written(oracle: Oracle, *, acknowledged: bool = True, zero: bool = False) -> bytes:
    """What the next write of unit 0 puts there."""
    number = oracle.begin(REGION, 0, zero=zero)
    if acknowledged:
        oracle.acknowledge(REGION, 0, number)
    return ZEROS if zero else oracle.content(REGION, 0, number)


def test_what_is_acknowledged_is_there_and_nothing_older() -> None:
    judge = oracle()
    read(judge, ZEROS)
    first = written(judge)
    read(judge, first)
    second = written(judge)
    with pytest.raises(Violation, match=r"unit 0 of writer 1, at 4096\+64: write 1, from before .* acknowledged .* 2"):
        read(judge, first)
    with pytest.raises(Violation, match="zeros, from before"):
        read(judge, ZEROS)
    read(judge, second)


def test_what_was_not_answered_is_old_or_new_and_then_stays() -> None:
    judge = oracle()
    old, new = written(judge), written(judge, acknowledged=False)
    read(judge, old)
    read(judge, old)
    read(judge, new)
    with pytest.raises(Violation, match="write 1, from before what was read before: write 2"):
        read(judge, old)


def test_a_read_is_held_to_what_was_true_when_it_began() -> None:
    judge = oracle()
    old = written(judge)
    floors = judge.floors(REGION, 0, 1)
    new = written(judge)
    judge.judge(REGION, 0, floors, old)  # it began before the new one was acknowledged
    judge.judge(REGION, 0, floors, new)
    with pytest.raises(Violation):
        read(judge, old)


def test_a_late_failed_write_may_not_take_back_a_newer_one() -> None:
    judge = oracle()
    failed, newer = written(judge, acknowledged=False), written(judge)
    with pytest.raises(Violation, match="write 1"):
        read(judge, failed)
    read(judge, newer)


def test_zeroing_is_a_write_as_any() -> None:
    judge = oracle()
    first = written(judge)
    written(judge, zero=True)
    with pytest.raises(Violation):
        read(judge, first)
    read(judge, ZEROS)
    third = written(judge, acknowledged=False)
    written(judge, acknowledged=False, zero=True)
    read(judge, ZEROS)  # number 2 or 4
    read(judge, third)
    read(judge, ZEROS)  # number 4
    with pytest.raises(Violation):
        read(judge, third)


def test_what_nobody_wrote_there_is_found() -> None:
    judge = oracle()
    good = written(judge)
    other = Oracle([REGION], seed=8).content(REGION, 0, 1)
    for wrong, complaint in {
        good[:32] + ZEROS[:32]: "parts of several writes",
        good[:-1] + b"x": "parts of several writes",
        b"x" * 64: "never wrote",
        other: "never wrote",
        judge.content(REGION, 0, 9): "write 9, which never was",
        judge.content(REGION, 1, 1): "what was written to 4160",
    }.items():
        with pytest.raises(Violation, match=complaint):
            read(judge, wrong)


def test_copies_are_judged_and_have_to_be_the_same() -> None:
    judge = oracle()
    written(judge)
    maybe = written(judge, acknowledged=False)
    volume = bytes(4096) + judge.content(REGION, 0, 1) + bytes(192)
    newer = bytes(4096) + maybe + bytes(192)
    judge.judge_copies({"a": volume, "b": volume})
    with pytest.raises(Violation, match="the copies a and b differ, first at byte 4096"):
        judge.judge_copies({"a": volume, "b": newer})
    with pytest.raises(Violation, match=r"b: unit 0 .* was read before"):
        judge.judge_copies({"a": newer, "b": volume})
    lost = oracle()
    written(lost)
    with pytest.raises(Violation, match=r"b: unit 0 .* zeros"):
        lost.judge_copies({"a": volume, "b": bytes(len(volume))})
