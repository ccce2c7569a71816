"""Files over FUSE: `terrace mount` and the daemon's own mount point against nbdfuse over nbdkit's memory, in turn.

fio with direct asynchronous IO on one file, as a loop device does it. nbdfuse is C, and what it serves lies in memory;
behind ours there are the engine with its log and checksums, and with `terrace mount` a second process as with nbdfuse.
Each file is overwritten before every round, so that reads find it in the order in which it was written.
"""

from __future__ import annotations

import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench_fio import Measurement, fio_file
from bench_sections import Result

from tests.system.daemon import Daemon, environment, program

START_S = 15.0
WORKLOADS: tuple[tuple[str, tuple[str, ...], float | None], ...] = (
    ("1 MiB write QD4", ("--rw=write", "--bs=1M", "--iodepth=4"), 0.5),
    ("1 MiB read QD4", ("--rw=read", "--bs=1M", "--iodepth=4"), 0.5),
    ("4k random read QD32", ("--rw=randread", "--bs=4k", "--iodepth=32"), 1.0),
    ("4k random read QD1", ("--rw=randread", "--bs=4k", "--iodepth=1"), None),
    ("4k random write QD32", ("--rw=randwrite", "--bs=4k", "--iodepth=32"), 1.0),
)
PEER = "nbdfuse"
OURS = ("terrace mount", "daemon's mountpoint")


def fuse(directory: Path, seconds: float, rounds: int, size_bytes: int, say: Callable[[str], None]) -> list[Result]:
    """Ratios of both of ours to nbdfuse: medians of each round's."""
    measured: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as stack:
        files = {
            OURS[0]: stack.enter_context(_mounted_beside(directory / "beside", size_bytes)),
            OURS[1]: stack.enter_context(_mounted_inside(directory / "inside", size_bytes)),
            PEER: stack.enter_context(_nbdfuse(directory / "nbdfuse", size_bytes)),
        }
        labels = list(files)
        for path in files.values():
            for _ in range(3):
                fio_file(path, "--rw=write", "--bs=1M", "--iodepth=4", f"--size={size_bytes}")
        for number in range(rounds):
            turn = labels[number % len(labels) :] + labels[: number % len(labels)]
            for title, options, _ in WORKLOADS:
                say(f"round {number + 1} of {rounds}: {title}")
                for label in turn:
                    if title == WORKLOADS[0][0]:
                        fio_file(files[label], "--rw=write", "--bs=1M", "--iodepth=4", f"--size={size_bytes}")
                    found = fio_file(
                        *(files[label], *options, f"--size={size_bytes}", "--time_based"),
                        f"--runtime={seconds * 1000:.0f}ms",
                    )
                    measured.setdefault((label, title), []).append(_rate(found, title))
                    subprocess.run(["sync", "--file-system", str(directory)], check=False)
    results = []
    for title, _, least in WORKLOADS:
        for label in OURS:
            ours, theirs = measured[label, title], measured[PEER, title]
            unit = "MB/s" if title.startswith("1 MiB") else "IOPS"
            results.append(Result("fuse", f"{label}: {title}", statistics.median(ours), unit))
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            results.append(Result("fuse", f"{label}: {title}, to {PEER}", ratio, "x", least=least))
    return results


def _rate(found: Measurement, title: str) -> float:
    return found.bytes_per_s / 1e6 if title.startswith("1 MiB") else found.iops


@contextmanager
def _mounted_beside(directory: Path, size_bytes: int) -> Iterator[Path]:
    directory.mkdir()
    with Daemon(directory / "home") as daemon:
        _make_volume(daemon, directory, size_bytes)
        mountpoint = directory / "files"
        mountpoint.mkdir()
        command = [*program("terrace", "terrace.cli"), "--home", str(daemon.home), "mount", str(mountpoint)]
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
        try:
            yield _wait_for(mountpoint / "bench" / "volume", process)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


@contextmanager
def _mounted_inside(directory: Path, size_bytes: int) -> Iterator[Path]:
    mountpoint = directory / "files"
    mountpoint.mkdir(parents=True)
    daemon = Daemon(directory / "home", f'[fuse]\nmountpoint = "{mountpoint}"\n')
    with daemon:
        _make_volume(daemon, directory, size_bytes)
        assert daemon.process is not None
        yield _wait_for(mountpoint / "bench" / "volume", daemon.process)
        daemon.stop()


@contextmanager
def _nbdfuse(directory: Path, size_bytes: int) -> Iterator[Path]:
    mountpoint = directory / "files"
    mountpoint.mkdir(parents=True)
    socket = directory / "nbd.sock"
    server = subprocess.Popen(["nbdkit", "-f", "-U", str(socket), "memory", str(size_bytes)])
    try:
        deadline_s = time.monotonic() + START_S
        while not socket.exists() and time.monotonic() < deadline_s:
            time.sleep(0.02)
        client = subprocess.Popen(["nbdfuse", f"{mountpoint}/", f"nbd+unix:///?socket={socket}"])
        try:
            yield _wait_for(mountpoint / "nbd", client)
        finally:
            subprocess.run(["fusermount3", "-u", str(mountpoint)], check=False)
            client.wait()
    finally:
        server.terminate()
        server.wait()


def _make_volume(daemon: Daemon, directory: Path, size_bytes: int) -> None:
    daemon.cli("pool", "create", "bench", "--fast", f"{directory}/fast={2 * size_bytes + (256 << 20)}")
    daemon.cli("volume", "create", "bench/volume", str(size_bytes))


def _wait_for(path: Path, process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> Path:
    deadline_s = time.monotonic() + START_S
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(f"{path} does not appear")
        time.sleep(0.05)
    return path
