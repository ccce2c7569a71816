"""Mirrored volumes: against the same volume without a mirror, and against QEMU's mirror in the same run.

- `load`: fio on a plain volume, on one that has a second leg on another node over loopback, and on a disk that
  qemu-storage-daemon mirrors with `copy-mode=write-blocking` to a qemu-nbd: every acknowledged write is at both there
  too. In turn, each first as often as the others, everything warm. Nodes talk in plain text, as QEMU does here; the
  same with TLS is shown beside it. All processes of all columns share the machine's cores, so each one's CPU time for
  a request is shown.
- `resync`: a leg that is filled anew, against nbdcopy of the same data between two daemons; both with what they begin
  with, and until all is durable, hence a larger volume and nbdcopy's `--flush`. Then, with the nodes in
  network namespaces where each byte between them is counted: a leg that missed writes to 1 % of its data, and a
  comparison of identical legs.
"""

from __future__ import annotations

import json
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
from bench_fio import Measurement, fio
from bench_sections import Result, timed
from bench_servers import START_TIMEOUT_S, Terrace

from tests.cluster.network import Network
from tests.cluster.nodes import CLIENT, VOLUME, Mirrored, Nodes
from tests.system import nbdclient
from tests.system.daemon import Daemon, run_script

MIB = 1 << 20
PARTS = ("load", "resync")
POOL_SIZES = 4
"""A pool is so many times as large as a volume: a copy has place beside the leg, while an older one is cleared away."""
RATE_SIZES = 2
WARM_PASSES = 3
SETTLE_S = 600.0
QEMU = "QEMU mirror"
# Sequential writes come first: they also put the volume back in order after the random ones of the round before.
LOADS = (
    ("1 MiB write QD4", ("--rw=write", "--bs=1M", "--iodepth=4"), 0.4, None),
    ("4k random read QD32", ("--rw=randread", "--bs=4k", "--iodepth=32"), 1.0, None),
    ("4k random write QD32", ("--rw=randwrite", "--bs=4k", "--iodepth=32"), 0.5, 1.0),
)
"""What is measured, and the least ratios of the mirrored volume: to the plain one, and to QEMU's."""
READ_TOLERANCE = 0.95
"""Of "as fast as": two medians of the same thing differ by so much."""


class Contestant(Protocol):
    """A column. `processes` are all that do the work of a request, by what they are."""

    label: str

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def uri(self) -> str: ...
    def processes(self) -> dict[str, psutil.Process]: ...


@dataclass
class Plain(Terrace):
    """A volume without a mirror."""

    label: str = "plain"

    def processes(self) -> dict[str, psutil.Process]:
        return {"terraced": self.process()}


@dataclass
class Pair:
    """Two daemons on loopback, and a volume with a leg on each; the first one is the primary."""

    directory: Path
    size_bytes: int
    tls: bool
    label: str = field(init=False)
    nodes: dict[str, Daemon] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.label = "mirrored, TLS" if self.tls else "mirrored"

    def start(self) -> None:
        self.directory.mkdir()
        ports = dict(zip("ab", free_ports(2), strict=True))
        for name, other in (("a", "b"), ("b", "a")):
            tls = '[nbd.tls]\nmode = "allowed"\n' if self.tls else ""
            config = f'{tls}[node]\nname = "{name}"\nlisten = ["127.0.0.1:{ports[name]}"]\n'
            config += f'[peers.{other}]\naddress = "127.0.0.1:{ports[other]}"\n'
            config += "" if self.tls else "plaintext = true\n"
            self.nodes[name] = Daemon(self.directory / name, config)
        if self.tls:
            self._make_certificates()
        for name, daemon in self.nodes.items():
            daemon.start()
            device = f"{self.directory}/{name}.fast={POOL_SIZES * self.size_bytes}"
            daemon.cli("pool", "create", "bench", "--fast", device)
        until(self._know_each_other, "the other node")
        self.nodes["a"].cli("volume", "create", "bench/volume", str(self.size_bytes), "--mirror", "b/bench")

    def _know_each_other(self) -> bool:
        told = json.loads(self.nodes["a"].cli("node", "list", "-o", "json").stdout)
        return all(node["state"] == "Online" for node in told)

    def _make_certificates(self) -> None:
        authority = self.directory / "authority"
        self.nodes["a"].cli("tls", "init", str(authority))
        for name, daemon in self.nodes.items():
            daemon.cli("tls", "node", name, "--name", "127.0.0.1", "--dir", str(authority))
            daemon.home.mkdir(exist_ok=True)
            (authority / "nodes" / name).rename(daemon.home / "tls")

    def stop(self) -> None:
        for daemon in self.nodes.values():
            daemon.kill()

    def uri(self) -> str:
        return self.nodes["a"].uri("bench/volume")

    def processes(self) -> dict[str, psutil.Process]:
        found = {}
        for title, name in (("primary", "a"), ("secondary", "b")):
            process = self.nodes[name].process
            assert process is not None
            found[title] = psutil.Process(process.pid)
        return found


@dataclass
class QemuMirror:
    """qemu-storage-daemon serves a raw file, and mirrors it to the raw file of a qemu-nbd over TCP on loopback."""

    directory: Path
    size_bytes: int
    label: str = QEMU
    _target_process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def socket(self) -> Path:
        return self.directory / "nbd.sock"

    def start(self) -> None:
        self.directory.mkdir()
        (port,) = free_ports(1)
        image = self.directory / "image"
        for path in (image, self.directory / "target"):
            subprocess.run(["qemu-img", "create", "-q", "-f", "raw", path, str(self.size_bytes)], check=True)
        self._target_process = subprocess.Popen(
            [
                *("qemu-nbd", "--persistent", "--discard=unmap", "--bind=127.0.0.1", f"--port={port}"),
                *("--format=raw", self.directory / "target"),
            ],
            stdin=subprocess.DEVNULL,
        )
        until(lambda: serves(("127.0.0.1", port)), "qemu-nbd")
        qmp = self.directory / "qmp.sock"
        self._process = subprocess.Popen(
            [
                "qemu-storage-daemon",
                *("--blockdev", f"driver=file,node-name=file,filename={image},discard=unmap"),
                *("--blockdev", "driver=raw,node-name=source,file=file,discard=unmap"),
                *(
                    "--blockdev",
                    f"driver=nbd,node-name=target,server.type=inet,server.host=127.0.0.1,server.port={port}",
                ),
                *("--nbd-server", f"addr.type=unix,addr.path={self.socket}"),
                *("--export", "type=nbd,id=export,node-name=source,name=,writable=on"),
                *("--chardev", f"socket,id=qmp,path={qmp},server=on,wait=off"),
                *("--monitor", "chardev=qmp"),
            ],
            stdin=subprocess.DEVNULL,
        )
        until(lambda: qmp.exists() and self.socket.exists(), "qemu-storage-daemon")
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(START_TIMEOUT_S)
            monitor.connect(str(qmp))
            lines = monitor.makefile("rw")
            answers = (json.loads(line) for line in lines)
            next(answers)
            mirror = {"job-id": "mirror", "device": "source", "target": "target", "sync": "full"}
            for command, arguments in (
                ("qmp_capabilities", {}),
                ("blockdev-mirror", mirror | {"copy-mode": "write-blocking"}),
            ):
                lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
                lines.flush()
                answer = next(answer for answer in answers if "return" in answer or "error" in answer)
                if "error" in answer:
                    raise RuntimeError(f"qemu-storage-daemon: {command}: {answer['error']}")
            lines.write(json.dumps({"execute": "query-jobs"}) + "\n")
            lines.flush()
            for answer in answers:
                if answer.get("event") == "BLOCK_JOB_READY":
                    return
                if isinstance(answer.get("return"), list) and answer["return"][0]["status"] == "ready":
                    return
        raise RuntimeError("qemu-storage-daemon's mirror has ended")

    def stop(self) -> None:
        for process in (self._process, self._target_process):
            if process is not None:
                process.kill()
                process.wait()
        self._process = None

    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def processes(self) -> dict[str, psutil.Process]:
        assert self._process is not None and self._target_process is not None
        return {
            "qemu-storage-daemon": psutil.Process(self._process.pid),
            "qemu-nbd": psutil.Process(self._target_process.pid),
        }


def free_ports(count: int) -> list[int]:
    """Free at this moment."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in found]


def serves(address: tuple[str, int]) -> bool:
    try:
        nbdclient.Connection(address, "").disconnect()
    except OSError:
        return False
    return True


def until(is_so: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not is_so():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{what} does not serve; its message is above")
        time.sleep(0.02)


def mirror(
    directory: Path, parts: tuple[str, ...], seconds: float, rounds: int, size_bytes: int, say: Callable[[str], None]
) -> Iterator[Result]:
    """The parts in turn; what is measured already is not lost when a later one fails."""
    if "load" in parts:
        yield from load(directory / "load", seconds, rounds, size_bytes, say)
    if "resync" in parts:
        yield from copy_rate(directory / "rate", RATE_SIZES * size_bytes, say)
        yield from traffic(directory / "traffic", size_bytes, say)


# Load


@dataclass
class Cell:
    """One load on one contestant: a value for each round."""

    measured: list[Measurement] = field(default_factory=list)
    cpu_us: dict[str, list[float]] = field(default_factory=dict)
    """For each operation, by process."""


def load(directory: Path, seconds: float, rounds: int, size_bytes: int, say: Callable[[str], None]) -> list[Result]:
    """Rates, ratios and CPU time of all contestants. Raises RuntimeError, DaemonError and FioError."""
    if shutil.which("qemu-storage-daemon") is None:
        raise RuntimeError("qemu-storage-daemon is not installed; run scripts/install-tools")
    directory.mkdir()
    contestants: list[Contestant] = [
        Plain(directory / "plain", size_bytes, 2 * size_bytes),
        Pair(directory / "pair", size_bytes, tls=False),
        Pair(directory / "tls", size_bytes, tls=True),
        QemuMirror(directory / "qemu", size_bytes),
    ]
    cells: dict[tuple[str, str], Cell] = {}
    try:
        for one in contestants:
            one.start()
            say(f"{one.label}: overwriting until warm")
            for _ in range(WARM_PASSES):
                fio(one.uri(), "--rw=write", "--bs=1M", "--iodepth=4")
        for number in range(rounds):
            turn = contestants[number % len(contestants) :] + contestants[: number % len(contestants)]
            for title, options, *_ in LOADS:
                say(f"round {number + 1} of {rounds}: {title}")
                for one in turn:
                    measure(cells.setdefault((title, one.label), Cell()), one, options, seconds, directory)
    finally:
        for one in contestants:
            one.stop()
    return [result for row in LOADS for result in report(row, contestants, cells)]


def measure(cell: Cell, one: Contestant, options: tuple[str, ...], seconds: float, directory: Path) -> None:
    processes = one.processes()
    before = {name: process.cpu_times() for name, process in processes.items()}
    measured = fio(one.uri(), *options, "--time_based", f"--runtime={seconds * 1000:.0f}ms")
    for name, process in processes.items():
        after = process.cpu_times()
        used_s = after.user + after.system - before[name].user - before[name].system
        cell.cpu_us.setdefault(name, []).append(used_s * 1e6 / max(1, measured.operations))
    cell.measured.append(measured)
    if "write" in options[0]:
        subprocess.run(["sync", "--file-system", directory], check=False)  # so that the next one doesn't pay for it


def report(
    row: tuple[str, tuple[str, ...], float, float | None],
    contestants: list[Contestant],
    cells: dict[tuple[str, str], Cell],
) -> list[Result]:
    title, _, least_of_plain, least_of_qemu = row
    results = []
    for one in contestants:
        cell = cells[title, one.label]
        in_bytes = title.startswith("1 MiB")
        values = [m.bytes_per_s / 1e6 if in_bytes else m.iops for m in cell.measured]
        unit = "MB/s" if in_bytes else "IOPS"
        results.append(Result("mirror", f"{title}, {one.label}", statistics.median(values), unit))
        for process, spent in cell.cpu_us.items():
            what = f"{title}, {one.label}: CPU of {process} for each"
            results.append(Result("mirror", what, statistics.median(spent), "us"))

    def ratio(ours: str, theirs: str) -> float:
        pairs = zip(cells[title, ours].measured, cells[title, theirs].measured, strict=True)
        return statistics.median(a.iops / b.iops for a, b in pairs)

    least = least_of_plain * (READ_TOLERANCE if least_of_plain == 1 else 1)
    for ours, target in (("mirrored", least), ("mirrored, TLS", None)):
        results.append(Result("mirror", f"{title}, {ours} to plain", ratio(ours, "plain"), "x", least=target))
        least_here = least_of_qemu if ours == "mirrored" else None
        results.append(Result("mirror", f"{title}, {ours} to {QEMU}", ratio(ours, QEMU), "x", least=least_here))
    return results


# Resync


LEAST_OF_COPY = 0.8
MOST_MOVED_PERCENT = 1.3
COMPARE_TARGET_MIB = 30.0
COMPARED_BYTES = 10 << 30
"""What that target is for; less is measured, and scaled."""
DIRTY_SHARE = 0.01


def copy_rate(directory: Path, size_bytes: int, say: Callable[[str], None]) -> list[Result]:
    """A fresh leg that is filled, and nbdcopy of the same data from one daemon to the other, over loopback too."""
    directory.mkdir(parents=True)
    pair = Pair(directory / "pair", size_bytes, tls=False)
    try:
        pair.start()
        a, b = pair.nodes["a"], pair.nodes["b"]
        say(f"filling {size_bytes / MIB:.0f} MiB")
        fio(pair.uri(), "--rw=write", "--bs=1M", "--iodepth=4", "--refill_buffers")
        copies, resyncs = [], []
        for number in range(3):
            say(f"copy and resync {number + 1} of 3")
            b.cli("volume", "create", "bench/copy", str(size_bytes))
            start_s = time.monotonic()
            run_script("nbdcopy", "--flush", a.uri("bench/volume", tcp=True), b.uri("bench/copy", tcp=True))
            copies.append(size_bytes / (time.monotonic() - start_s))
            b.cli("volume", "delete", "bench/copy", "--yes")
            a.cli("volume", "mirror", "remove", "bench/volume", "b", "--yes")
            start_s = time.monotonic()
            a.cli("volume", "mirror", "add", "--wait", "bench/volume", "b/bench", timeout_s=SETTLE_S)
            resyncs.append(size_bytes / (time.monotonic() - start_s))
    finally:
        pair.stop()
    ratio = statistics.median(x / y for x, y in zip(resyncs, copies, strict=True))
    return [
        Result("mirror", "nbdcopy from node to node", statistics.median(copies) / 1e6, "MB/s"),
        Result("mirror", "resync of a fresh leg", statistics.median(resyncs) / 1e6, "MB/s"),
        Result("mirror", "resync to nbdcopy", ratio, "x", least=LEAST_OF_COPY),
    ]


def traffic(directory: Path, size_bytes: int, say: Callable[[str], None]) -> list[Result]:
    """Bytes between two nodes, both ways and with all headers: of a resync of 1 %, and of a comparison."""
    (directory / "nodes").mkdir(parents=True)
    with Network(["a", "b", CLIENT]) as network, Nodes(network, directory / "nodes", Mirrored()) as nodes:
        nodes.deployment.create(nodes, size_bytes)
        a, b = nodes["a"], nodes["b"]
        say(f"filling {size_bytes / MIB:.0f} MiB")
        fio(a.uri(VOLUME), "--rw=write", "--bs=1M", "--iodepth=4", "--refill_buffers")

        def moved() -> int:
            counts = network.counts()
            return counts["a", "b"] + counts["b", "a"]

        before = moved()
        say("comparing")
        compare = ("volume", "mirror", "resync", VOLUME, "b", "--full")
        compared_s = timed(lambda: a.cli(*compare, timeout_s=SETTLE_S))
        compared = moved() - before
        b.kill()
        written = int(size_bytes * DIRTY_SHARE)
        say(f"{written / MIB:.0f} MiB written while a leg is away")
        fio(a.uri(VOLUME), "--rw=randwrite", "--bs=4k", "--iodepth=32", f"--io_size={written}", "--refill_buffers")
        before = moved()
        b.start()
        resynced_s = timed(lambda: wait_until_whole(a, VOLUME))
        moved_percent = 100 * (moved() - before) / size_bytes
    size = f"{size_bytes / MIB:.0f} MiB"
    scaled_mib = compared * COMPARED_BYTES / size_bytes / MIB
    return [
        Result("mirror", f"traffic of a comparison of {size}, for 10 GiB", scaled_mib, "MiB", COMPARE_TARGET_MIB),
        Result("mirror", f"a comparison of {size}", compared_s, "s"),
        Result("mirror", f"traffic of a resync of 1 % of {size}, of all data", moved_percent, "%", MOST_MOVED_PERCENT),
        Result("mirror", "from the start of its node until that leg is up to date", resynced_s, "s"),
    ]


def wait_until_whole(primary: Daemon, volume: str) -> None:
    deadline_s = time.monotonic() + SETTLE_S
    while (states := leg_states(primary, volume)) != {"UpToDate"}:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{volume} isn't whole in {SETTLE_S:g} s: {states}\n{primary.tail()}")
        time.sleep(0.05)


def leg_states(primary: Daemon, volume: str) -> set[str]:
    found: list[dict[str, Any]] = primary.cli_json("volume", "mirror", "list")
    return {leg["state"] for one in found if one["volume"] == volume for leg in one["legs"]}
