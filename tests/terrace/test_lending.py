"""The loop that lends itself: what the engine relies on holds in whatever thread its code runs."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from terrace import lending
from terrace.lending import LendingLoop, LoopEndedError, in_child


class State:
    """Something like the engine: a number that is only right if no step overlaps another."""

    def __init__(self) -> None:
        self.number = 0
        self.event = trio.Event()
        self.woken_s = 0.0
        self.ended = False

    def step(self) -> None:
        """Not atomic by itself: it gives the GIL away in the middle, as a system call does."""
        number = self.number
        time.sleep(0)
        os.getpid()
        time.sleep(0.000_01)
        self.number = number + 1


@asynccontextmanager
async def opened() -> AsyncIterator[State]:
    state = State()
    yield state
    state.ended = True


def borrow(loop: LendingLoop[State], action: Callable[[], Any]) -> Any:
    """As the plugin does it. Not from the thread of the tests: it would be taken for trio's from then on."""
    assert threading.current_thread() is not threading.main_thread()
    if not loop.mark.adopted:
        loop.adopt()
    if loop.waits:
        loop.let_pass()
    with loop.turn:
        return action()


def in_threads(count: int, action: Callable[[], object]) -> None:
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            action()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures, failures


def test_steps_of_tasks_and_of_borrowers_never_overlap() -> None:
    loop = LendingLoop(opened)
    state = loop.start()
    steps = 300

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(work_alone)

    async def work_alone() -> None:
        for _ in range(steps):
            state.step()
            await trio.lowlevel.checkpoint()

    def work_borrowed() -> None:
        for _ in range(steps):
            borrow(loop, state.step)

    tasks = threading.Thread(target=loop.run, args=(work,))
    tasks.start()
    in_threads(4, work_borrowed)
    tasks.join()
    loop.stop()
    assert state.number == 7 * steps
    assert state.ended


@pytest.mark.alone
def test_what_a_borrower_sets_wakes_the_task_that_waits_for_it_at_once() -> None:
    loop = LendingLoop(opened)
    state = loop.start()

    async def wait() -> float:
        await state.event.wait()
        return time.perf_counter()

    woken: list[float] = []
    waiter = threading.Thread(target=lambda: woken.append(loop.run(wait)))
    waiter.start()
    time.sleep(0.05)  # the loop is asleep in epoll, without any deadline
    began = time.perf_counter()
    in_threads(1, lambda: borrow(loop, state.event.set))
    waiter.join(10)
    loop.stop()
    assert woken[0] - began < 1


def test_a_borrower_knows_the_loops_time_and_moves_its_deadlines() -> None:
    loop = LendingLoop(opened)
    loop.start()
    scope = trio.CancelScope()

    async def sleep() -> bool:
        with scope:
            await trio.sleep_forever()
        return scope.cancelled_caught

    caught: list[bool] = []
    sleeper = threading.Thread(target=lambda: caught.append(loop.run(sleep)))
    sleeper.start()
    time.sleep(0.05)

    def end_soon() -> None:
        scope.deadline = trio.current_time() + 0.01

    in_threads(1, lambda: borrow(loop, end_soon))
    sleeper.join(10)
    loop.stop()
    assert caught == [True]


@pytest.mark.alone
def test_the_loop_gets_its_turn_while_many_threads_borrow_all_the_time() -> None:
    loop = LendingLoop(opened)
    state = loop.start()
    stop = threading.Event()

    def hammer() -> None:
        while not stop.is_set():
            borrow(loop, state.step)

    async def nothing() -> None:
        await trio.lowlevel.checkpoint()

    hammers = [threading.Thread(target=hammer) for _ in range(16)]
    for thread in hammers:
        thread.start()
    try:
        began = time.perf_counter()
        for _ in range(20):
            loop.run(nothing)
        took_s = time.perf_counter() - began
    finally:
        stop.set()
        for thread in hammers:
            thread.join(10)
    loop.stop()
    assert took_s < 10, "each hand-over takes two or three turns of the loop"


def test_what_the_loop_runs_for_a_thread_returns_and_raises_there() -> None:
    loop = LendingLoop(opened)
    loop.start()

    async def double(number: int) -> int:
        await trio.lowlevel.checkpoint()
        return 2 * number

    async def fail() -> None:
        raise OSError(28, "no room")

    assert loop.run(double, 21) == 42
    with pytest.raises(OSError, match="no room") as raised:
        loop.run(fail)
    assert raised.value.errno == 28
    loop.stop()


def test_what_keeps_the_pool_from_opening_is_raised_and_leaves_no_thread() -> None:
    @asynccontextmanager
    async def refused() -> AsyncIterator[State]:
        await trio.lowlevel.checkpoint()
        raise FileNotFoundError(2, "there is no pool")
        yield State()

    loop = LendingLoop(refused)
    with pytest.raises(FileNotFoundError, match="there is no pool"):
        loop.start()
    assert not any(thread.name == "terrace-engine" for thread in threading.enumerate())


def test_who_asks_a_loop_that_has_ended_gets_an_error_that_says_so() -> None:
    loop = LendingLoop(opened)
    loop.start()
    loop.stop()
    with pytest.raises(LoopEndedError, match="the pool is closed") as raised:
        loop.run(trio.sleep, 0)
    assert raised.value.errno == 5


def test_an_error_of_the_pools_own_tasks_is_told_to_who_asks_and_at_the_end() -> None:
    fail = trio.Event()

    async def break_down() -> None:
        await fail.wait()
        raise RuntimeError("a bug")

    @asynccontextmanager
    async def broken() -> AsyncIterator[State]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(break_down)
            yield State()

    loop = LendingLoop(broken)
    loop.start()
    in_threads(1, lambda: borrow(loop, fail.set))
    with pytest.raises(LoopEndedError):
        while True:
            loop.run(trio.sleep, 0.01)
    with pytest.raises(BaseExceptionGroup):
        loop.stop()


def test_a_loop_that_breaks_down_ends_the_process_so_that_nobody_waits_for_ever(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def run_out_of_threads() -> None:
        raise RuntimeError("can't start new thread")

    def wait_for_it() -> None:
        loop = LendingLoop(opened)
        loop.start()
        waiting = threading.Thread(target=loop.run, args=(trio.sleep_forever,), daemon=True)
        waiting.start()
        loop._jobs.put(run_out_of_threads)
        waiting.join(10)  # and the child would end well

    assert "status 1" in str(in_child(wait_for_it))
    assert "can't start new thread" in capfd.readouterr().err


def test_without_trios_context_nothing_is_lent_and_all_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "_run_context", lambda: None)
    loop = LendingLoop(opened)
    loop.start()
    assert not loop.lends
    in_threads(1, loop.adopt)

    async def answer() -> int:
        await trio.lowlevel.checkpoint()
        return 42

    assert loop.run(answer) == 42
    loop.stop()


def in_foreign_threads(count: int, action: Callable[[], object]) -> None:
    """As nbdkit calls a plugin: from threads that Python hasn't started; one after the other."""
    callback = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: action() and None)
    libc = ctypes.CDLL(None)
    for _ in range(count):
        thread = ctypes.c_ulong()
        assert libc.pthread_create(ctypes.byref(thread), None, callback, None) == 0
        assert libc.pthread_join(thread, None) == 0


def test_states_of_foreign_threads_are_kept_while_they_run_and_freed_afterwards() -> None:
    loop = LendingLoop(opened, keep_threads=True)
    state = loop.start()
    seen: list[int] = []

    def use() -> None:
        borrow(loop, state.step)
        loop.forget_dead()
        seen.append(len(loop._kept))

    in_foreign_threads(5, use)
    deadline_s = time.monotonic() + 10
    while loop._kept and time.monotonic() < deadline_s:
        loop.forget_dead()
    loop.stop()
    assert state.number == 5
    assert all(1 <= count <= 2 for count in seen), "its own, and that of one that has only just ended"
    assert not loop._kept


def test_connections_that_end_at_once_free_each_state_once() -> None:
    loop = LendingLoop(opened, keep_threads=True)
    state = loop.start()
    for _ in range(20):
        in_foreign_threads(16, lambda: borrow(loop, state.step))
        in_threads(4, loop.forget_dead)
    loop.stop()
    assert state.number == 320
    assert len(loop._kept) <= 1


def test_what_a_check_in_a_child_raises_is_told_in_words() -> None:
    def refuse() -> None:
        raise FileNotFoundError(2, "no such pool")

    assert in_child(lambda: None) is None
    assert "no such pool" in str(in_child(refuse))


def test_a_check_in_a_child_that_breaks_down_is_no_success(capfd: pytest.CaptureFixture[str]) -> None:
    def break_down() -> None:
        raise RuntimeError("a bug")

    assert "status 1" in str(in_child(break_down))
    assert "a bug" in capfd.readouterr().err


def test_a_check_in_a_child_starts_threads_and_leaves_none() -> None:
    async def work() -> None:
        await trio.to_thread.run_sync(time.sleep, 0)

    before = threading.active_count()
    assert in_child(lambda: trio.run(work)) is None
    assert threading.active_count() == before
