"""No primary serves longer than its voters promise nobody else a term."""

import random

from replication.lease import PrimaryLease, VoterLease, boottime


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_primary_serves_only_from_the_start_of_what_a_majority_answered() -> None:
    clock = Clock()
    lease = PrimaryLease(2.0, ("a", "b", "c"), clock)
    assert not lease.may_serve
    begun = lease.begin()
    lease.answered("a", begun)
    lease.answered("stranger", begun)
    assert not lease.may_serve
    clock.now = 1.0
    lease.answered("b", begun)
    assert lease.may_serve and lease.left_s < 1.0  # from the start, not from the answer
    clock.now = 1.95
    assert not lease.may_serve
    lease.renewed(lease.begin())
    assert lease.may_serve


def test_a_suspended_machine_wakes_without_a_lease() -> None:
    assert boottime() <= boottime()
    clock = Clock()
    lease = PrimaryLease(2.0, ("a",), clock)
    lease.answered("a", lease.begin())
    clock.now += 3600
    assert not lease.may_serve


def test_no_majority_can_promise_while_a_primary_serves() -> None:
    for seed in range(300):
        rng, clock = random.Random(seed), Clock()
        names = [f"n{i}" for i in range(rng.choice([3, 4, 5]))]
        voters = {name: VoterLease(clock) for name in names}
        lease = PrimaryLease(1.0, tuple(names), clock)
        for _ in range(60):
            begun = lease.begin()
            clock.now += rng.random() * 0.3
            for name in names:
                if rng.random() < 0.5:
                    voters[name].heard("m")
                    clock.now += rng.random() * 0.1
                    lease.answered(name, begun)
            clock.now += rng.random()
            free = [name for name in names if voters[name].left_s("m", 1.0, since_start=True) <= 0]
            assert not (lease.may_serve and 2 * len(free) > len(names)), f"seed {seed}"


def test_a_lease_that_so_many_voters_refuse_that_no_majority_is_left_is_told_until_they_answer() -> None:
    lease = PrimaryLease(2.0, ("a", "b", "c"), Clock())
    lease.refused("b")
    lease.refused("stranger")
    assert not lease.is_refused
    lease.refused("c")
    assert lease.is_refused
    lease.answered("c", lease.begin())  # in a later term
    assert not lease.is_refused
