"""Hosts of a test, each in a network namespace of its own, and faults on each directed link between two of them.

    with Network(["a", "b", "client"]) as network:
        network.host("a").command("ip", "addr")     # a command line that runs it there
        network.cut("a", "b")                       # what a sends to b is lost; what b sends is not
        network.heal()

The namespaces have no names: parallel runs can't meet, and a killed run leaves none behind. `tests.cluster.switch` is
the network between them. Needs root and /dev/net/tun.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tests.system.daemon import REPOSITORY, environment

MTU = 60000
"""Few packets: the switch handles each of them."""
_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
T = TypeVar("T")


class NetworkError(AssertionError):
    """This machine can't do it; the message says what is missing."""


@dataclass(frozen=True)
class Host:
    """One namespace. Its descriptors belong to the `Network`."""

    name: str
    address: str
    namespace: int
    device: int

    def command(self, *arguments: str) -> list[str]:
        """A command line that runs `arguments` in there, as long as this process lives."""
        return ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self.namespace}", *arguments]

    def run(self, work: Callable[[], T]) -> T:
        """Calls `work` in a thread that is in there: sockets that it makes, and children, stay there."""

        def there() -> T:
            _set_namespace(self.namespace)
            return work()

        return _in_thread(there)


class Network:
    """See the module. Links are named by their ends, in the direction of the packets."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._hosts: dict[str, Host] = {}
        self._switch: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._faulty: set[tuple[str, str]] = set()

    def __enter__(self) -> Network:
        if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
            raise NetworkError("nodes in network namespaces need root and /dev/net/tun")
        try:
            for number, name in enumerate(self._names, 1):
                self._hosts[name] = _in_thread(partial(_new_host, name, f"10.99.0.{number}"))
            ours, theirs = socket.socketpair()
            self._control = ours
            ours.settimeout(20)
            devices = [host.device for host in self._hosts.values()]
            ports = [f"{host.name}={host.address}={host.device}" for host in self._hosts.values()]
            with theirs:
                command = [sys.executable, "-m", "tests.cluster.switch", str(theirs.fileno()), *ports]
                fds = [theirs.fileno(), *devices]
                self._switch = subprocess.Popen(command, pass_fds=fds, cwd=REPOSITORY, env=environment())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self._control is not None:
            self._control.close()
        if self._switch is not None:
            try:
                self._switch.wait(10)
            except subprocess.TimeoutExpired:
                self._switch.kill()
                self._switch.wait()
        for host in self._hosts.values():
            os.close(host.namespace)
            os.close(host.device)
        self._hosts.clear()

    def host(self, name: str) -> Host:
        return self._hosts[name]

    def cut(self, a: str, b: str, *, both: bool = False) -> None:
        """Nothing that `a` sends reaches `b`; with `both`, nor the other way. Connections stay open, and silent."""
        self._set(a, b, both, cut=True)

    def delay(self, a: str, b: str, delay_s: float, *, both: bool = False) -> None:
        """Packets arrive so much later, in their order."""
        self._set(a, b, both, delay_s=delay_s)

    def lose(self, a: str, b: str, share: float, *, both: bool = False) -> None:
        """This share of the packets (0 to 1) is lost, each by chance."""
        self._set(a, b, both, loss=share)

    def join(self, a: str, b: str, *, both: bool = False) -> None:
        """The link is as it was at first."""
        self._set(a, b, both)

    def heal(self) -> None:
        """All of them are."""
        for a, b in sorted(self._faulty):
            self.join(a, b)

    def counts(self) -> dict[tuple[str, str], int]:
        """Bytes that were delivered until now, with their IP and TCP headers, for each (from, to)."""
        answer = self._ask({"count": True})
        return {(a, b): answer[f"{a}>{b}"][1] for a in self._hosts for b in self._hosts if a != b}

    def _set(self, a: str, b: str, both: bool, **how: Any) -> None:
        for ends in [(a, b), (b, a)][: 2 if both else 1]:
            self._ask({"link": ends, **how})
            (self._faulty.add if how else self._faulty.discard)(ends)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._control is not None
        self._control.sendall(json.dumps(request).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            data = self._control.recv(65536)
            if not data:
                raise NetworkError("the switch has ended; its message is above")
            answer += data
        return json.loads(answer)


def _new_host(name: str, address: str) -> Host:
    """Makes a namespace for this thread, and its device. In a thread that ends then."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        raise NetworkError(f"no network namespace: {os.strerror(ctypes.get_errno())}")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"net0", _IFF_TUN | _IFF_NO_PI))
    for command in (
        "ip link set lo up",
        f"ip link set net0 mtu {MTU} txqueuelen 2000 up",
        f"ip addr add {address}/24 dev net0",
    ):
        subprocess.run(command.split(), check=True)
    namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    return Host(name, address, namespace, device)


def _set_namespace(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        raise NetworkError(f"can't enter a network namespace: {os.strerror(ctypes.get_errno())}")


def _in_thread(work: Callable[[], T]) -> T:
    """A namespace is a thread's own, so nobody else is moved there."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
