"""A real etcd for tests, in its own directory and on its own ports. It may be paused, killed and started again."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def free_port() -> int:
    """One that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _here(work: Callable[[], T]) -> T:
    return work()


class EtcdServer:
    """`tls`: a directory with ca-cert.pem, node-cert.pem and node-key.pem; then clients must show a certificate, too.

    `wrap` is a command line to run it under, and `reach` calls something from where it can be reached.
    """

    def __init__(
        self,
        directory: Path,
        *,
        tls: Path | None = None,
        address: str = "127.0.0.1",
        port: int | None = None,
        options: Sequence[str] = (),
        wrap: Sequence[str] = (),
        reach: Callable[[Callable[[], Any]], Any] = _here,
    ) -> None:
        tool = shutil.which("etcd")
        assert tool, "etcd is missing; scripts/install-tools etcd-server installs it"
        self.data = directory / "data"
        self.log = directory / "log"
        self.tls = tls
        self.url = f"{'https' if tls else 'http'}://{address}:{port or free_port()}"
        self._reach = reach
        peer = f"http://127.0.0.1:{free_port()}"
        # A kill costs nothing without fsync: the kernel has all that was written.
        self._command = [*wrap, tool, "--name", "one", "--data-dir", str(self.data), "--unsafe-no-fsync"]
        self._command += ["--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        self._command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        self._command += ["--initial-cluster", f"one={peer}", *options]
        if tls is not None:
            files = {"trusted-ca": "ca-cert", "cert": "node-cert", "key": "node-key"}
            self._command += [f"--{option}-file={tls / f'{name}.pem'}" for option, name in files.items()]
            self._command.append("--client-cert-auth")
        self.process: subprocess.Popen[bytes] | None = None
        self.paused = False
        self.start()

    def start(self, *, wait: bool = True) -> None:
        """And wait until it is well."""
        self.data.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline_s = time.monotonic() + 20
        while wait and not self._reach(self._is_well):
            assert self.process.poll() is None and time.monotonic() < deadline_s, self.log.read_text()[-2000:]
            time.sleep(0.05)

    def _context(self) -> ssl.SSLContext | None:
        if self.tls is None:
            return None
        context = ssl.create_default_context(cafile=str(self.tls / "ca-cert.pem"))
        context.load_cert_chain(self.tls / "node-cert.pem", self.tls / "node-key.pem")
        return context

    def _is_well(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2, context=self._context()) as answer:
                return b"true" in answer.read()
        except (urllib.error.URLError, OSError):
            return False

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of its JSON gateway."""
        request = urllib.request.Request(f"{self.url}/v3/{path}", json.dumps(body).encode())

        def ask() -> dict[str, Any]:
            with urllib.request.urlopen(request, timeout=10, context=self._context()) as answer:
                return dict(json.loads(answer.read()))

        return dict(self._reach(ask))

    def stored(self) -> list[dict[str, Any]]:
        """All of them, with their values."""
        return list(self.ask("kv/range", {"key": "AA==", "range_end": "AA=="}).get("kvs", []))

    def wipe(self) -> None:
        """No key is left."""
        self.ask("kv/deleterange", {"key": "AA==", "range_end": "AA=="})

    def pause(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        self.paused = True

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)
        self.paused = False

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process, self.paused = None, False

    def back_up(self, to: Path) -> None:
        """A copy of its data; it is stopped for that."""
        self.kill()
        shutil.copytree(self.data, to)
        self.start()

    def restore(self, backup: Path | None) -> None:
        """Its data are what they were, or none."""
        self.kill()
        shutil.rmtree(self.data)
        if backup is not None:
            shutil.copytree(backup, self.data)
        self.start()
