"""A real nbdkit with our plugin, and pools for it that are made without a daemon."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from tests.system.daemon import REPOSITORY
from tiers import DeviceSpec, Pool

MIB = 1 << 20
PLUGIN = REPOSITORY / "terrace" / "nbdkit_plugin.py"
START_TIMEOUT_S = 20.0


def make_pool(home: Path, name: str = "p", *, volumes: dict[str, int], fast_mib: int = 64) -> Path:
    """A pool of one sparse device below `home`, closed; returns its directory."""
    directory = home / "pools" / name
    directory.mkdir(parents=True)

    async def make() -> None:
        await Pool.create(directory, name, [DeviceSpec(home / f"{name}.img", "fast", fast_mib * MIB)])
        async with Pool.open(directory) as pool:
            for volume, size_bytes in volumes.items():
                await pool.create_volume(volume, size_bytes)

    trio.run(make)
    return directory


def environment() -> dict[str, str]:
    """Without what tells Python where to look: the plugin must find its packages by itself."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    kept = {key: value for key, value in os.environ.items() if key not in hidden and not key.startswith("TERRACE_")}
    ours = str(Path(sys.executable).parent)
    return kept | {"PATH": os.pathsep.join(part for part in kept["PATH"].split(os.pathsep) if part != ours)}


def command(*arguments: str | Path, options: Sequence[str | Path] = ()) -> list[str]:
    """`nbdkit OPTIONS python PLUGIN ARGUMENTS`."""
    return ["nbdkit", *map(str, options), "python", str(PLUGIN), *map(str, arguments)]


def once(
    *arguments: str | Path,
    options: Sequence[str | Path] = (),
    run: str = "true",
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`nbdkit ... --run COMMAND` on a private socket: a server that lives as long as the command."""
    with tempfile.TemporaryDirectory() as neutral:
        return subprocess.run(
            command(*arguments, options=["-U", "-", *options, "--run", run]),
            cwd=cwd or neutral,
            env=env or environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


class Nbdkit:
    """A server in the foreground, on a socket of its own."""

    def __init__(self, directory: Path, *arguments: str | Path, options: Sequence[str | Path] = ()) -> None:
        self.socket = directory / "nbdkit.sock"
        self.log = directory / "nbdkit.log"
        self._command = command(*arguments, options=["-f", "-U", self.socket, *options])
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Nbdkit:
        self.socket.unlink(missing_ok=True)
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stderr=log, cwd=self.socket.parent, env=environment()
            )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline_s, self.log.read_text()
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(str(self.socket))
                sock.settimeout(START_TIMEOUT_S)
                return len(sock.recv(16)) > 0
            except OSError:
                return False

    def uri(self, export: str = "") -> str:
        return f"nbd+unix:///{export}?socket={self.socket}"

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(30)

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def inspect(directory: Path) -> dict[str, Any]:
    """Open the pool as anybody would: what had to be replayed, whether all of it is sound, and who is there."""
    found: dict[str, Any] = {}

    async def look() -> None:
        async with Pool.open(directory) as pool:
            found["replayed"] = pool.replayed_batches
            found["problems"] = (await pool.check(True, lambda done, total: None)).problems
            found["volumes"] = [volume.name for volume in pool.volumes()]

    trio.run(look)
    return found
