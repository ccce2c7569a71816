"""The servers that the bench compares, each with one export of one size, on a Unix socket of its own.

All serve files on the same file system through the page cache with write-back, as their defaults have it: `qemu-nbd`
(cache=writeback, aio=threads), `nbdkit file`, and terraced on a pool of one sparse fast device, of twice the volume's
size.
"""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from tests.system import nbdclient
from tests.system.daemon import REPOSITORY, Daemon

START_TIMEOUT_S = 15.0


class Server(Protocol):
    """Something that exports a volume for fio. `label` is its column in the tables."""

    label: str

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def uri(self) -> str: ...
    def process(self) -> psutil.Process: ...


@dataclass
class Peer:
    """A server that is one foreground process: `command` with the socket and the file put in."""

    label: str
    directory: Path
    size_bytes: int
    command: list[str]
    image_format: str = "raw"
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def socket(self) -> Path:
        return self.directory / "nbd.sock"

    def start(self) -> None:
        self.directory.mkdir()
        image = self.directory / "image"
        create = ["qemu-img", "create", "-q", "-f", self.image_format, str(image), str(self.size_bytes)]
        subprocess.run(create, check=True)
        command = [part.format(socket=self.socket, image=image) for part in self.command]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._serves():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.stop()
                raise RuntimeError(f"{' '.join(command)} does not serve; its message is above")
            time.sleep(0.02)

    def _serves(self) -> bool:
        try:
            nbdclient.Connection(self.socket, "").disconnect()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def process(self) -> psutil.Process:
        assert self._process is not None
        return psutil.Process(self._process.pid)


@dataclass
class Terrace:
    """terraced with a pool `bench` of one fast device and a volume `bench/volume`."""

    directory: Path
    size_bytes: int
    pool_bytes: int
    config: str = ""
    label: str = "terrace"
    daemon: Daemon = field(init=False)

    def __post_init__(self) -> None:
        self.daemon = Daemon(self.directory / "home", self.config)

    def start(self) -> None:
        self.directory.mkdir()
        self.daemon.start()
        self.daemon.cli("pool", "create", "bench", "--fast", f"{self.directory}/fast={self.pool_bytes}")
        if self.size_bytes:
            self.daemon.cli("volume", "create", "bench/volume", str(self.size_bytes))

    def stop(self) -> None:
        self.daemon.kill()

    def uri(self) -> str:
        return self.daemon.uri("bench/volume")

    def process(self) -> psutil.Process:
        assert self.daemon.process is not None
        return psutil.Process(self.daemon.process.pid)

    def stall_ms(self) -> float:
        """The longest step of the daemon's loop since the last call, in milliseconds."""
        return float(self.daemon.api("GET", "/v1/status?reset=1")["loop_stall_max_ms"])


TEN_LINES = """\
import os, nbdkit
API_VERSION = 2
file = None
def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL
def config(key, value):
    global file
    file = os.open(value, os.O_RDWR)
def open(readonly): return file
def get_size(h): return os.fstat(h).st_size
def pread(h, buf, offset, flags): os.preadv(h, [buf], offset)
def pwrite(h, buf, offset, flags): os.pwrite(h, buf, offset)
"""
"""The least that an nbdkit plugin in Python can do: read and write a flat file, with nothing of what Terrace does."""


def nbdkit_servers(directory: Path, size_bytes: int) -> list[Peer]:
    """Our plugin on a pool of one fast device of twice the size; then the plugin of ten lines on a file."""
    plugin = directory / "ten_lines.py"
    plugin.write_text(TEN_LINES)
    home = directory / "home"
    with Daemon(home) as daemon:
        daemon.cli("pool", "create", "bench", "--fast", f"{directory}/fast={2 * size_bytes}")
        daemon.cli("volume", "create", "bench/volume", str(size_bytes))
        if daemon.stop() != 0:
            raise RuntimeError(f"terraced, which made the pool, did not stop in order:\n{daemon.tail()}")
    nbdkit = ["nbdkit", "-f", "-U", "{socket}", "python"]
    ours = [str(REPOSITORY / "terrace" / "nbdkit_plugin.py"), "pool=bench", f"home={home}", "volume=volume"]
    return [
        Peer("terrace in nbdkit", directory / "ours", size_bytes, [*nbdkit, *ours]),
        Peer("ten lines in nbdkit", directory / "ten", size_bytes, [*nbdkit, str(plugin), "file={image}"]),
    ]


def all_servers(directory: Path, size_bytes: int) -> list[Server]:
    """Terrace first; the one that targets are set against second."""
    qemu = ["qemu-nbd", "--persistent", "--shared=8", "--discard=unmap", "--socket={socket}"]
    return [
        Terrace(directory / "terrace", size_bytes, 2 * size_bytes),
        Peer("qemu-nbd raw", directory / "raw", size_bytes, [*qemu, "--format=raw", "{image}"]),
        Peer("qemu-nbd qcow2", directory / "qcow2", size_bytes, [*qemu, "--format=qcow2", "{image}"], "qcow2"),
        Peer("nbdkit file", directory / "nbdkit", size_bytes, ["nbdkit", "-f", "-U", "{socket}", "file", "{image}"]),
    ]
