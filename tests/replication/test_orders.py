"""What a node obeys of what cannot be undone: only its primary, by a record that is not older than what it knows."""

from __future__ import annotations

import dataclasses
import errno

import pytest

from replication.membership import Membership, Term
from replication.orders import Known, Order, judge_deletion, judge_discard, judge_order
from tests.replication.stores import first_record

TERM_2 = Term(2, "2" * 16)
ABC = first_record("abc")
WITHOUT_B = ABC.next_epoch(legs=tuple(leg for leg in ABC.legs if leg.id != "b"), in_sync=frozenset("ac"))
LATER = ABC.next_term(TERM_2, "c", frozenset("bc"))


def known(accepted: Membership | None = ABC, promised: Term | None = ABC.term) -> Known:
    return Known("the leg fast/vol on node b", promised, accepted, "b")


@pytest.mark.parametrize(
    ("order", "what_is_known", "said"),
    [
        (Order("c", WITHOUT_B), known(), "by the record that node c has sent node a is the primary"),
        (Order("a", WITHOUT_B.next_epoch(primary=None)), known(), "nobody is the primary"),
        (Order("a", dataclasses.replace(WITHOUT_B, mirror="cd" * 16)), known(), "and node a speaks of cdcd"),
        (Order("a", WITHOUT_B), known(ABC, TERM_2), "it has promised term 2, and node a is primary of 1"),
        (Order("a", WITHOUT_B), known(LATER, TERM_2), "promised term 2"),
        (Order("a", ABC), known(ABC.next_epoch()), "it knows the record 1.1, and node a has sent 1.0"),
        (Order("c", LATER), known(ABC.next_term(Term(2, "3" * 16), "b", frozenset("b")), None), "2.0, which doesn't"),
    ],
)
def test_who_is_not_primary_by_what_the_leg_knows_is_not_obeyed(order: Order, what_is_known: Known, said: str) -> None:
    for judge in (judge_order, judge_discard):
        with pytest.raises(OSError, match=said) as refused:
            judge(order, what_is_known)
        assert refused.value.errno == errno.EPERM and "the leg fast/vol on node b doesn't obey" in str(refused.value)
    with pytest.raises(OSError, match=said):
        judge_deletion(order, what_is_known, whole=True)


def test_a_primary_that_is_none_any_more_has_nothing_given_up() -> None:
    with pytest.raises(OSError, match="promised term 2"):
        judge_discard(Order("a", ABC.next_epoch(in_sync=frozenset("ac"))), known(LATER, TERM_2))


def test_a_leg_is_deleted_when_it_is_none_any_more_or_with_its_whole_mirror() -> None:
    for order in (Order("a", WITHOUT_B), Order("a", WITHOUT_B.next_epoch())):
        judge_deletion(order, known(), whole=False)
        judge_deletion(order, known(WITHOUT_B), whole=False)
    with pytest.raises(OSError, match="it is a leg of the mirror"):
        judge_deletion(Order("a", ABC), known(), whole=False)
    judge_deletion(Order("a", ABC), known(), whole=True)


def test_a_side_of_a_split_brain_is_not_deleted_and_is_given_up_when_an_operator_says_so() -> None:
    alone = ABC.next_epoch(in_sync=frozenset("b"), primary="b")
    forced = ABC.next_term(TERM_2, "a", frozenset("a"), "fenced")
    with pytest.raises(OSError, match="two sides of a split brain"):
        judge_deletion(Order("a", forced), known(alone), whole=True)
    judge_discard(Order("a", forced), known(alone))
    with pytest.raises(OSError, match="it is in sync, or no leg"):
        judge_discard(Order("c", LATER), known())
    with pytest.raises(OSError, match="it is in sync, or no leg"):
        judge_discard(Order("a", WITHOUT_B), known())
