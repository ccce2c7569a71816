"""A real systemd, process 1 of its own namespaces, with this checkout's programs. The work is in `boot-systemd`.

Its root directory is a copy-on-write view of this host's, so it has the same programs, and nothing that it writes
stays; its network is its own, so addresses are free; its cgroup is a new one below this process's. Needs root,
overlayfs, cgroup version 2 somewhere, and Debian's systemd package. It has udev, with its rules for block devices.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tests.system.daemon import REPOSITORY, environment

BOOT_S = 60.0
NAMESPACES = ("--mount", "--pid", "--cgroup", "--net", "--uts", "--ipc")
BIN = Path(sys.prefix) / "bin"


class Machine:
    """`with Machine(tmp_path) as machine:` boots it and ends it."""

    def __init__(self, directory: Path, devices: Sequence[Path] = ()) -> None:
        self._directory = directory
        self._devices = devices
        self._process: subprocess.Popen[bytes] | None = None
        self._cgroup: Path | None = None
        self._init = 0

    def __enter__(self) -> Machine:
        assert os.geteuid() == 0, "systemd is booted in namespaces, which needs root"
        self._directory.mkdir()
        self._cgroup = cgroup_root() / f"terrace-test-{os.getpid()}-{time.monotonic_ns()}"
        self._cgroup.mkdir()
        # The namespaces must be made from within the cgroup, for that is then their root.
        script = f'echo $$ >"$0/cgroup.procs" && exec unshare {" ".join(NAMESPACES)} --fork --kill-child "$@"'
        boot = [str(REPOSITORY / "tests" / "system" / "boot-systemd"), str(self._directory), *map(str, self._devices)]
        paths = " ".join({str(REPOSITORY), sys.prefix, sys.base_prefix})
        with (self._directory.parent / f"{self._directory.name}.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", script, str(self._cgroup), *boot],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "BOOT_PATHS": paths, "BOOT_UDEV": udev_package()},
                start_new_session=True,
            )
        try:
            self._await_boot()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process is not None and self._cgroup is not None
        self._process.kill()  # unshare, and with it process 1, and with that everything
        self._process.wait()
        deadline_s = time.monotonic() + 10
        while True:
            try:
                for directory, _, _ in os.walk(self._cgroup, topdown=False):
                    Path(directory).rmdir()
                return
            except OSError:
                assert time.monotonic() < deadline_s, f"{self._cgroup} is still in use"
                time.sleep(0.05)

    def _await_boot(self) -> None:
        def booted() -> bool:
            assert self._process is not None and self._process.poll() is None, self._log()
            self._init = self._init or self._find_init()
            if not self._init:
                return False
            state = self.run("systemctl", "is-system-running", status=None)
            return state.strip() in ("running", "degraded")

        self.wait(booted, BOOT_S)

    def _log(self) -> str:
        return (self._directory.parent / f"{self._directory.name}.log").read_text(errors="replace")

    def _find_init(self) -> int:
        assert self._process is not None
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in children:
            if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                return int(child)
        return 0

    def command(self, *words: str) -> list[str]:
        """What runs `words` inside."""
        return ["nsenter", "-t", str(self._init), *NAMESPACES, "--", *words]

    def run(self, *words: str, status: int | None = 0, timeout_s: float = 60.0) -> str:
        """What `words` print inside; `status`: the exit status that it must have, None for any."""
        result = subprocess.run(
            self.command(*words),
            capture_output=True,
            text=True,
            env=environment() | {"SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": "cat"},
            cwd="/",
            timeout=timeout_s,
            check=False,
        )
        assert status is None or result.returncode == status, (
            f"{' '.join(words)}: exit status {result.returncode}\n{result.stdout}{result.stderr}\n{self.journal()}"
        )
        return result.stdout + (result.stderr if status != 0 else "")

    def terrace(self, *words: str, status: int | None = 0) -> str:
        return self.run(str(BIN / "terrace"), *words, status=status)

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "-P", name, unit).strip()

    def main_pid(self, unit: str = "terraced.service") -> int:
        """The daemon's process, as it is called out here."""
        deadline_s = time.monotonic() + 2.0
        while True:
            inside = self.show(unit, "MainPID")
            for line in (cgroup_of(self, unit) / "cgroup.procs").read_text().split():
                with suppress(FileNotFoundError, ProcessLookupError):
                    status = Path(f"/proc/{line}/status").read_text()
                    (pids,) = [row.split() for row in status.splitlines() if row.startswith("NSpid:")]
                    if pids[-1] == inside:
                        return int(line)
            # The one that systemd named may have handed over to another one since.
            assert time.monotonic() < deadline_s, f"{unit} has no process {inside}"
            time.sleep(0.02)

    def journal(self, unit: str = "terraced.service") -> str:
        result = subprocess.run(
            self.command("journalctl", "--no-pager", "-o", "cat", "-n", "500", "-u", unit),
            capture_output=True,
            text=True,
            check=False,
        )
        return result.stdout + result.stderr

    def wait(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, self.journal() if self._init else self._log()
            time.sleep(0.05)

    def path(self, inside: str | Path) -> Path:
        """A path of the machine as it is called out here."""
        return Path(f"/proc/{self._init}/root") / Path(inside).relative_to("/")

    def power_off(self, timeout_s: float = 60.0) -> str:
        """Shut the machine down; what its journal says of that. Nothing can be run in it any more."""
        self.path("/var/log/journal").mkdir(exist_ok=True)
        self.run("journalctl", "--flush")
        before = self.run("date", "+%s.%N").strip()
        self.run("systemctl", "--no-block", "poweroff")
        assert self._process is not None
        self._process.wait(timeout_s)
        (journal,) = (self._directory / "upper" / "var" / "log" / "journal").iterdir()
        command = ["journalctl", "--no-pager", "-o", "cat", "--since", f"@{before}", "-D", str(journal)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def kill(self, number: signal.Signals, unit: str = "terraced.service") -> None:
        self.run("systemctl", "kill", f"--signal={number.name}", "--kill-whom=main", unit)


def require_in_order(said: str, steps: Sequence[str]) -> None:
    """All of these were said, in that order."""
    places = [said.index(step) for step in steps]
    assert places == sorted(places), said


def udev_package() -> str:
    """Debian's package, unpacked by the machine and installed nowhere; "" where this host has udev itself."""
    if Path("/lib/systemd/systemd-udevd").exists():
        return ""
    cache = REPOSITORY / ".cache" / "udev"
    cache.mkdir(parents=True, exist_ok=True)
    lock = os.open(cache, os.O_RDONLY)  # another process of the same run may want it just now
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not any(cache.glob("udev_*.deb")):
            done = subprocess.run(
                ["apt-get", "download", "-q", "udev"], cwd=cache, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"apt-get download udev failed; run apt-get update: {done.stderr}"
        return str(max(cache.glob("udev_*.deb")))
    finally:
        os.close(lock)


def cgroup_of(machine: Machine, unit: str) -> Path:
    """A unit's directory, out here."""
    assert machine._cgroup is not None
    return machine._cgroup / machine.show(unit, "ControlGroup").lstrip("/")


def cgroup_root() -> Path:
    """This process's directory in the tree of cgroup version 2, wherever that is mounted."""
    (own,) = [line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::"]
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place) / own.lstrip("/")
    raise AssertionError("cgroup version 2 is not mounted anywhere")
