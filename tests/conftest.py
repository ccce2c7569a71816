"""What every test may rely on: failures that can be repeated, no leftovers of the caller, a machine alone if need be.

`scripts/check` runs tests in several processes (pytest-xdist), to which they are given out one by one from the front
of one list. `long` ones stand first, so that the others go on beside them. `alone` ones stand last, and nothing runs
beside one: they assert how long something takes, or use what a machine has but one of.
"""

from __future__ import annotations

import fcntl
import gc
import os
import signal
from collections.abc import Generator

import hypothesis
import pytest

# A failure prints the line that reproduces it. The time of one example depends on the machine, so it is no property.
hypothesis.settings.register_profile("terrace", deadline=None, print_blob=True)
hypothesis.settings.load_profile("terrace")

# What a shell runs in the background ignores SIGINT, and so would all that tests start and then interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Where it takes itself to be on CI, pytest compares values that differ line by line, megabytes of bytes for minutes:
# 149 s for a test that expects such an assertion to fail, and otherwise takes 0.1 s.
for _name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(_name, None)


@pytest.fixture(autouse=True)
def _no_ambient_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TERRACE_* variable of whoever runs the tests must not point them at a real daemon."""
    for name in [name for name in os.environ if name.startswith("TERRACE_")]:
        monkeypatch.delenv(name)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (is_alone(item), item.get_closest_marker("long") is None))


def pytest_collection_finish() -> None:
    """The collector looks at everything once a quarter as much was added: with all tests in that, it seldom does.

    Few objects are behind gigabytes of devices of simulated machines. Measured as CPU time and resident memory of 114
    simulations: 6 % and 18 % less than with the tests in it.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Outside of everything else, so that no test's timeout counts the time it waited for its turn."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    # A file that all processes of the run have; the lock goes with them, so one that was killed leaves nothing behind.
    fd = os.open(item.config.rootpath / "pyproject.toml", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if is_alone(item) else fcntl.LOCK_SH)
        return (yield)
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # a child that a test forked may have the descriptor too
        os.close(fd)


def is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None
