"""`terrace mount` as a process, for the system tests."""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.system.daemon import environment, program

TIMEOUT_S = 20.0


class Mount:
    """`with Mount(home, directory) as mount:` is there when the block begins, and taken away after it."""

    def __init__(self, home: Path, directory: Path, *options: str) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [*program("terrace", "terrace.cli"), "mount", *options, str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment() | {"TERRACE_HOME": str(home), "PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            ready = selector.select(TIMEOUT_S)
        self.line = self.process.stdout.readline() if ready else ""

    def __enter__(self) -> Mount:
        if "Ctrl-C unmounts" not in self.line:
            self.process.kill()
            raise AssertionError(f"terrace mount is not ready: {self.line!r} {self.process.communicate()[1]}")
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process.communicate()
        take_away(self.directory)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def ended(self) -> tuple[int, str]:
        """Its exit status, and what it said on stderr."""
        said = self.process.communicate(timeout=TIMEOUT_S)[1]
        return self.process.returncode, said


def take_away(directory: Path) -> None:
    """Whatever is mounted there, alive or dead."""
    while is_mounted(directory):
        subprocess.run(["fusermount3", "-u", "-z", str(directory)], check=True)


def is_mounted(directory: Path) -> bool:
    return any(line.split()[1] == str(directory) for line in Path("/proc/mounts").read_text().splitlines())


def until(what: str, condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.02)


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """A file descriptor. Closing it asks nobody for anything if its file system is gone by then."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        try:
            os.close(fd)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
