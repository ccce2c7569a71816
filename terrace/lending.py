"""A trio loop in a thread of its own that lends itself to other threads: what nbdkit's threads run the engine with.

The engine's rule is that all of its state belongs to the trio thread, and that code between two checkpoints of trio is
atomic. nbdkit calls its plugin in threads of its own, sixteen for each connection. Handing each request over to a trio
thread and waiting for the answer takes two switches of threads, which cost more than the request: 4k requests went at
half the rate of a plugin of ten lines that reads a file. So for what never waits (`read_now`, `write_now`, `trim_now`)
the calling thread becomes the trio thread, for that call.

**Why the rule still holds.** There is one lock, `turn`. Whoever holds it is "the trio thread".

1. Trio runs in guest mode: its loop is cut into ticks, which the host calls. A tick is everything that the loop does
   between two waits for the kernel: it takes in what epoll found, expires deadlines, and runs each task that is ready
   up to its next checkpoint. The driver thread calls every tick with `turn` held. Between ticks no task runs. Trio
   waits for the kernel in a thread that uses nothing but the epoll descriptor (`GuestState.guest_tick`, `get_events`).
2. A borrower calls the engine only while it holds `turn`, and only functions that aren't `async`: these can't reach a
   checkpoint, so when it gives `turn` back it is between two checkpoints, as a task that awaits is.
3. So two steps of the engine never overlap, each sees all that those before it did (a lock orders memory, and so does
   the GIL), and none is interrupted by another: not where `os.preadv` and `os.pwritev` release the GIL either, for
   `turn` is not released with it. That is the rule. Worker threads touch no state of the engine, here as in the daemon.
4. What a borrower's call does to trio itself, such as waking the flusher by an event, is what guest mode is made for:
   the host may call trio's synchronous functions between ticks, and trio then sees to it that a tick comes soon
   (`Runner.reschedule`, `force_guest_tick_asap`).

Guest mode expects these calls from the thread that runs the ticks, for one reason: trio finds its runner in a
thread-local variable. `adopt` gives a borrowing thread that variable, once. It is not part of trio's public interface;
where it can't be found there is nothing to lend (`lends` is False) and everything is handed over, which is slower and
as correct.

What waits is handed over: `run` has the loop run an async function and blocks the calling thread, not the loop.

**The loop doesn't starve.** Python's locks aren't fair: sixteen threads that come back for `turn` at once could keep
the driver from it, and with it flushes and checkpoints. So the driver says that it waits (`waits`), and a borrower that
sees this stands aside (`let_pass`): before the driver only those go that had passed this point already.

**A loop that breaks down** (trio could start no thread to wait for the kernel in, or has a bug) can't be told from one
that takes long: who waits for it would wait for ever, and must not go on either, while a worker thread may still use
its buffer. So the process ends. That loses nothing that was acknowledged, as `kill -9` doesn't, and clients notice.

**Kept threads.** Python makes a thread state for each callback from a thread that it didn't start, with memory for the
stack, and throws it away behind it. With `keep_threads` `adopt` keeps that of the calling thread, which makes small
requests up to twice as fast, and `forget_dead` frees those whose threads have ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import queue
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Generic, TypeVar, TypeVarTuple

import trio

T = TypeVar("T")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")

CAN_KEEP_THREADS = sys.implementation.name == "cpython" and sys.version_info[:2] == (3, 11)
"""From 3.12 on, freeing another thread's state takes away the calling thread's own."""


class LoopEndedError(OSError):
    """EIO: what the loop served has ended, by itself or by an error."""

    def __str__(self) -> str:
        return str(self.args[1])


class _Mark(threading.local):
    """Whether a thread has borrowed before. It goes with the thread's state, as what `adopt` sets does."""

    adopted = False


class LendingLoop(Generic[T]):
    """Runs `opening()`, an async context manager, and lends what it yields.

    In a thread that called `adopt`, and for synchronous calls only:

        if loop.waits:
            loop.let_pass()
        with loop.turn:
            ...
    """

    def __init__(self, opening: Callable[[], AbstractAsyncContextManager[T]], *, keep_threads: bool = False) -> None:
        """`keep_threads`: those that call `adopt` were not started by Python."""
        self.turn = threading.Lock()
        self.mark = _Mark()
        self.waits = False
        """The driver wants the turn."""
        self._gate = threading.Lock()
        self._opening = opening
        self._keep_threads = keep_threads and CAN_KEEP_THREADS
        self._jobs: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._drive, name="terrace-engine")
        self._ended = False
        self._failure: BaseException | None = None
        self.thing: T
        """What is lent, once `start` has returned."""
        self._stop: trio.Event
        self._token: trio.lowlevel.TrioToken
        self._runner: Any = None
        self._kept: list[tuple[int, int]] = []  # native id of a thread, address of its state
        self._keeping = threading.Lock()

    # -- its life ----------------------------------------------------------------------------------------------------

    def start(self) -> T:
        """Return what the context manager yields, once it is entered. Raises what entering it raised.

        The thread is started here, so this belongs behind the last fork.
        """
        self._thread.start()
        self._ready.wait()
        if self._ended:
            self._thread.join()
            self._raise_failure()
        return self.thing

    def stop(self) -> None:
        """Leave the context manager, and return when that is done. Raises what it raised, now or earlier."""
        with contextlib.suppress(trio.RunFinishedError):  # it has ended by itself
            self._token.run_sync_soon(self._stop.set)
        self._thread.join()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    @property
    def lends(self) -> bool:
        """Whether threads may borrow; else all must be handed over."""
        return self._runner is not None

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._runner = getattr(_run_context(), "runner", None)
        self._stop = trio.Event()
        async with self._opening() as self.thing:
            self._ready.set()
            await self._stop.wait()

    def _drive(self) -> None:
        """The driver thread. All ticks are run here, each with `turn` held."""
        try:
            with self.turn:
                trio.lowlevel.start_guest_run(
                    self._main,
                    run_sync_soon_threadsafe=self._jobs.put,
                    done_callback=self._note_end,
                    host_uses_signal_set_wakeup_fd=True,  # signals are nbdkit's
                )
            while not self._ended:
                tick = self._jobs.get()
                with self._gate:
                    self.waits = True
                    with self.turn:
                        self.waits = False
                        tick()
        except BaseException as error:
            self._break_down(error)
        finally:
            self._ended = True
            self._ready.set()

    def _note_end(self, result: Any) -> None:
        """Take what the run ended with: an `outcome.Outcome`."""
        self._ended = True
        try:
            result.unwrap()
        except trio.TrioInternalError as error:
            self._break_down(error)
        except BaseException as error:
            self._failure = error

    def _break_down(self, error: BaseException) -> None:
        self._failure = self._failure or error
        if self._ready.is_set():  # else `start` raises it
            _end_process(error)

    # -- its use -----------------------------------------------------------------------------------------------------

    def adopt(self) -> None:
        """Let the calling thread borrow from now on. For `mark.adopted` threads that is done."""
        if self.lends:
            _run_context().runner = self._runner
        if self._keep_threads:
            with self._keeping:
                self._kept.append((threading.get_native_id(), _keep_thread_state()))
        self.mark.adopted = True

    def let_pass(self) -> None:
        """Stand aside until the driver has had the turn that it waits for."""
        with self._gate:
            pass

    def forget_dead(self) -> None:
        """Free what was kept of threads that have ended."""
        with self._keeping:  # several connections may end at once, and each state is freed once
            for item in list(self._kept):
                native_id, state = item
                # The number of a thread may have been given to another one: then this waits until that has ended, too.
                if not Path(f"/proc/self/task/{native_id}").exists():
                    self._kept.remove(item)
                    _free_thread_state(state)

    def run(self, function: Callable[[*Ts], Awaitable[R]], *args: *Ts) -> R:
        """Have the loop run an async function, and wait for what it returns or raises. Raises LoopEndedError."""
        try:
            return trio.from_thread.run(function, *args, trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled):
            raise LoopEndedError(errno.EIO, self._why_ended()) from None

    def _why_ended(self) -> str:
        if self._failure is not None:
            return f"the pool was closed by an error: {self._failure}"
        return "the pool is closed"


def _end_process(error: BaseException) -> None:
    sys.excepthook(type(error), error, error.__traceback__)
    sys.stderr.flush()
    os._exit(1)


def _run_context() -> Any:
    """Trio's thread-local variables; an empty object where this trio has them elsewhere."""
    return getattr(sys.modules.get("trio._core._run"), "GLOBAL_RUN_CONTEXT", None)


def _keep_thread_state() -> int:
    """Keep the calling thread's state when the callback that it is in returns to C; returns its address."""
    ctypes.pythonapi.PyGILState_Ensure()  # never released, so the state's counter doesn't come to zero
    this = ctypes.pythonapi.PyGILState_GetThisThreadState
    this.restype = ctypes.c_void_p
    state = this()
    assert isinstance(state, int)
    return state


def _free_thread_state(state: int) -> None:
    ctypes.pythonapi.PyThreadState_Clear(ctypes.c_void_p(state))
    ctypes.pythonapi.PyThreadState_Delete(ctypes.c_void_p(state))


def in_child(check: Callable[[], None]) -> str | None:
    """Run `check` in a forked child, which leaves nothing behind in this process; what it raised, in words, or None.

    For what starts threads in a process that is going to fork: threads don't survive that, and trio keeps some for
    later use. OSErrors tell their sentence; the traceback of anything else goes to stderr.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(reader)
            try:
                check()
            except OSError as error:
                os.write(writer, str(error).encode()[:4096])
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as told:  # noqa: PTH123 (a descriptor)
        words = told.read().decode()
    _, status = os.waitpid(child, 0)
    if status:
        return words or f"it ended with status {os.waitstatus_to_exitcode(status)}; its message is above"
    return words or None
