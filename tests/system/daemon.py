"""A real `terraced` process for the system tests, the bench and the guest: start it, kill it, ask it.

Shares no code with the daemon, and fixes no port: it listens on a free one and says which on the line that it prints
when it is ready. Its stderr goes to `HOME.log`, which an error of this module quotes.

After an upgrade the daemon is another process, which `Daemon.follow` makes the one that is meant: `kill`, `stop` and
the rest are about that from then on.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import httpx
import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
UPGRADE_TIMEOUT_S = 60.0
_PR_SET_CHILD_SUBREAPER = 36


class DaemonError(AssertionError):
    """The daemon or its command line did not do what the caller relies on."""


class ApiError(DaemonError):
    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status
        self.errno = body.get("errno")
        self.message = str(body.get("error"))


def program(name: str, module: str) -> list[str]:
    """The command installed beside this interpreter, else its module."""
    script = Path(sys.executable).with_name(name)
    return [str(script)] if script.exists() else [sys.executable, "-m", module]


@contextmanager
def orphans_come_to_us() -> Iterator[None]:
    """Whose parent ends meanwhile becomes a child of this process, which so can wait for it: a successor.

    Not for longer than that takes, for others (keepers) are to go to init, as they do on a user's machine.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class Successor:
    """A process that we did not start and that is our child all the same. As a `subprocess.Popen`, as far as used."""

    def __init__(self, pid: int, stdout: IO[str] | None) -> None:
        self.pid = pid
        self.stdout = stdout
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline_s = time.monotonic() + (timeout if timeout is not None else 1e9)
        while (status := self.poll()) is None:
            if time.monotonic() > deadline_s:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            time.sleep(0.005)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Daemon:
    """One home directory and at most one `terraced` on it. `with Daemon(home) as daemon:` starts it and kills it.

    `config` is TOML put after the listening address; `wrap` is a command line to run the daemon under, `program`
    one to run in its place.
    """

    def __init__(
        self, home: Path, config: str = "", *, wrap: Sequence[str] = (), program: Sequence[str] | None = None
    ) -> None:
        self.home = home
        self.config = config
        self.log = home.with_name(home.name + ".log")
        self.port = 0
        self.ready_line = ""
        self.process: subprocess.Popen[str] | Successor | None = None
        self._wrap = list(wrap)
        self._program = program

    def __enter__(self) -> Daemon:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    @property
    def socket(self) -> Path:
        return self.home / "nbd.sock"

    def uri(self, export: str, *, tcp: bool = False) -> str:
        return f"nbd://127.0.0.1:{self.port}/{export}" if tcp else f"nbd+unix:///{export}?socket={self.socket}"

    def spawn(self) -> subprocess.Popen[str]:
        """Starts the process and does not wait for it to be ready."""
        assert self.process is None, "already started"
        self.home.mkdir(parents=True, exist_ok=True)
        options = ["--home", str(self.home), "--config", str(self.configure())]
        command = [*self._wrap, *(self._program or program("terraced", "terrace.daemon")), *options]
        with self.log.open("a") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment())
        self.process = process
        return process

    def configure(self) -> Path:
        """Writes the configuration file, as `config` says."""
        file = self.home.with_name(self.home.name + ".toml")
        file.write_text('[nbd]\nlisten = ["127.0.0.1:0"]\n' + self.config)
        return file

    def start(self, timeout_s: float = READY_TIMEOUT_S) -> float:
        """Starts it and waits for its ready line; returns the seconds that took."""
        start_s = time.monotonic()
        process = self.spawn()
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            ready = selector.select(timeout_s)
        self.ready_line = process.stdout.readline() if ready else ""
        match = re.search(r"nbds?://127\.0\.0\.1:(\d+)", self.ready_line)
        if match is None:
            self.kill()
            what = f"exit status {process.returncode}" if ready else f"nothing in {timeout_s:.0f} s"
            raise DaemonError(f"terraced is not ready: {what}, stdout {self.ready_line!r}, log:\n{self.tail()}")
        self.port = int(match[1])
        return time.monotonic() - start_s

    def upgrade(self, *, force: bool = False, timeout_s: float = UPGRADE_TIMEOUT_S) -> dict[str, Any]:
        """Another process takes over, which is the daemon from then on; returns what that says of it."""
        with orphans_come_to_us():
            asked = self.api("POST", "/v1/upgrade", {"force": force})
            deadline_s = time.monotonic() + timeout_s
            while True:
                try:
                    now: dict[str, Any] = self.api("GET", "/v1/upgrade")
                except httpx.TransportError as error:  # between the two
                    if not self.alive() and not self._held():
                        raise DaemonError(f"terraced ended in its upgrade ({error}); log:\n{self.tail()}") from None
                    now = asked
                if now["pid"] != asked["pid"]:
                    break
                if now["state"] == "idle":
                    raise DaemonError(f"no upgrade: {now['error']}; log:\n{self.tail()}")
                if time.monotonic() > deadline_s:
                    raise DaemonError(f"no upgrade in {timeout_s:.0f} s; log:\n{self.tail()}")
                time.sleep(0.005)
            self.follow(int(now["pid"]))
        return now

    def follow(self, pid: int, *, status: int = 0) -> None:
        """The daemon is that process now; the one before ended with `status`. Within `orphans_come_to_us`."""
        process = self.process
        assert process is not None
        found = process.wait(STOP_TIMEOUT_S)
        self.process = Successor(pid, process.stdout)
        if isinstance(process, subprocess.Popen):
            process.stdout = None  # not to be closed with it
        if found != status:
            raise DaemonError(f"terraced ended with {found} after its upgrade, not {status}; log:\n{self.tail()}")
        (self.port, *_) = [
            int(match[1])
            for uri in self.api("GET", "/v1/status")["nbd"]["uris"]
            if (match := re.match(r"nbds?://127\.0\.0\.1:(\d+)", uri))
        ] or [0]

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone, and a successor that it may have. Does nothing when it isn't running."""
        if self.process is not None:
            self.process.kill()
            self._reap()
        while strays := self.holders():
            for stray in strays:
                stray.kill()
                stray.wait(STOP_TIMEOUT_S)

    def holders(self) -> list[psutil.Process]:
        """The processes that have the home; usually that is told without looking for them."""
        if not self._held():
            return []
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if any(file.readlink() == self._lock for file in Path(f"/proc/{process.pid}/fd").iterdir()):
                    found.append(process)
        return found

    @property
    def _lock(self) -> Path:
        return self.home / "terraced.lock"

    def _held(self) -> bool:
        """Whether somebody has the home."""
        try:
            lock = os.open(self._lock, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self._reap()

    def _reap(self) -> int:
        process, self.process = self.process, None
        assert process is not None and process.stdout is not None
        try:
            return process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise DaemonError(f"terraced did not stop in {STOP_TIMEOUT_S:.0f} s; log:\n{self.tail()}") from None
        finally:
            process.stdout.close()

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def cli(self, *arguments: str, status: int | None = 0, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """`terrace ARGUMENTS` on this home. Anything but exit status `status` is a DaemonError (None: any will do)."""
        command = [*program("terrace", "terrace.cli"), *arguments]
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment() | {"TERRACE_HOME": str(self.home)},
            timeout=timeout_s,
            check=False,
        )
        if status is not None and result.returncode != status:
            raise DaemonError(
                f"terrace {' '.join(arguments)}: exit status {result.returncode}, expected {status}\n"
                f"{result.stdout}{result.stderr}daemon's log:\n{self.tail()}"
            )
        return result

    def cli_json(self, *arguments: str) -> Any:
        return json.loads(self.cli(*arguments, "-o", "json").stdout)

    def api(self, method: str, path: str, body: Any = None, *, timeout_s: float = 60.0) -> Any:
        """One request to the control API. An answer of 400 or above is an ApiError."""
        transport = httpx.HTTPTransport(uds=str(self.home / "api.sock"), verify=False)
        with httpx.Client(transport=transport, timeout=timeout_s) as client:
            response = client.request(method, f"http://terrace{path}", json=body)
        if response.status_code >= 400:
            raise ApiError(response.status_code, response.json())
        return response.json() if response.content else None

    def pool(self, name: str) -> Any:
        return self.api("GET", f"/v1/pools/{name}")


def environment() -> dict[str, str]:
    """This process's, without its TERRACE_* settings; this interpreter comes first, and finds the checkout."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TERRACE_")}
    first = {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(REPOSITORY)}
    kept |= {key: os.pathsep.join(filter(None, [value, kept.get(key, "")])) for key, value in first.items()}
    return kept | {"COLUMNS": "200"}


def run_script(*command: str) -> None:
    """One of the repository's scripts; a failure shows all that it said."""
    result = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
