"""What legs that are away owe: remembered durably, done only while names still mean what they meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from replication.membership import Membership, Term
from terrace.duedeletions import FILE_NAME, MAX_NAMES, Due, DueDeletions, holds
from tests.replication.stores import first_record

NEXT, LATER = Term(2, "2" * 16), Term(3, "3" * 16)


def silent(kind: str, subject: str, text: str) -> None:
    raise AssertionError(text)


def due(*names: str, at: Membership | None = None) -> Due:
    record = at or first_record("ab")
    return Due(record.mirror, "b", "b", record.term, record.epoch, names)


def test_what_is_due_is_there_after_a_restart_and_gone_when_it_is_done(tmp_path: Path) -> None:
    async def main() -> None:
        kept = DueDeletions(tmp_path, silent)
        assert not kept
        await kept.add(due("one", "two"))
        await kept.add(due("two", "three"))
        again = DueDeletions(tmp_path, silent)
        assert [one.names for one in again.of(due().mirror)] == [("one", "two", "three")]
        await again.drop(due().mirror, "b", ["one", "three"])
        assert [one.names for one in DueDeletions(tmp_path, silent).of(due().mirror)] == [("two",)]
        await again.drop(due().mirror, "b")
        assert not DueDeletions(tmp_path, silent)

    trio.run(main)


def test_a_leg_that_is_away_for_ever_costs_a_bounded_file(tmp_path: Path) -> None:
    async def main() -> None:
        kept = DueDeletions(tmp_path, silent)
        await kept.add(due(*map(str, range(MAX_NAMES))))
        await kept.add(due("newest"))
        (one,) = kept.of(due().mirror)
        assert (len(one.names), one.names[-1]) == (MAX_NAMES, "newest")

    trio.run(main)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b'{"version": 2, "due": []}', b'{"version": 1, "due": [{}]}', b"[" * 100_000, b"\xff", b"null",
     b'{"version": 1, "due": [{"mirror": 1, "leg": "b", "node": "b", "term": [1, "x"], "epoch": 0, "names": []}]}'],
)  # fmt: skip
def test_a_file_that_cant_be_understood_is_put_aside_and_told(tmp_path: Path, data: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(data)
    told: list[str] = []
    kept = DueDeletions(tmp_path, lambda kind, subject, text: told.append(text))
    assert not kept and len(told) == 1 and "snapshot list" in told[0]
    assert not (tmp_path / FILE_NAME).exists()
    trio.run(kept.add, due("one"))
    assert DueDeletions(tmp_path, silent)


def test_a_file_that_cant_be_read_is_put_aside_and_not_written_over(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()  # the read fails, whoever runs this
    told: list[str] = []
    kept = DueDeletions(tmp_path, lambda kind, subject, text: told.append(text))
    assert len(told) == 1 and "snapshot list" in told[0]
    trio.run(kept.add, due("one"))
    assert (tmp_path / FILE_NAME).with_suffix(".bad").is_dir() and DueDeletions(tmp_path, silent)


def test_a_name_means_the_deleted_snapshot_for_as_long_as_no_other_node_was_primary() -> None:
    record = first_record("ab")
    one = due("one", at=record)
    assert holds(one, record, "a")
    assert holds(one, record.next_epoch(), "a")
    restarted = record.next_epoch().next_term(NEXT, "a", frozenset("a"))
    assert holds(one, restarted, "a")
    demoted = record.next_epoch(primary=None, token="a")
    assert holds(one, demoted.next_term(NEXT, "a", frozenset("ab")), "a")
    failed_over = record.next_term(NEXT, "b", frozenset("b"))
    assert not holds(one, failed_over.next_term(LATER, "a", frozenset("ab")), "a")
    assert not holds(one, first_record("ab").next_term(LATER, "a", frozenset("a")), "b")


def test_what_no_record_in_the_history_knows_isnt_done() -> None:
    elsewhere = Due("f" * 32, "b", "b", Term(1, "0" * 15 + "9"), 0, ("one",))
    assert not holds(elsewhere, first_record("ab"), "a")
