"""The network between the nodes of a test: a process that hands IP packets from one namespace to another.

Each namespace has one TUN device; what its kernel sends there is read here, and written to the device of the namespace
that it is for. On its way a packet meets the faults of its directed link: cut (dropped), loss (some dropped), delay.
So a connection meets what it meets on a real network: retransmission, silence without an end, a half that still works.
Kernels without netem and netfilter do, and nothing is left behind however a run ends: devices and namespaces end with
the processes that have them.

    python -m tests.cluster.switch CONTROL NAME=ADDRESS=FD ...

CONTROL is the descriptor of a stream socket. A request is a line of JSON, and so is its answer, which comes when the
request holds for each packet that is taken up from then on; packets that wait for their time are dropped by a cut too.

    {"link": ["a", "b"], "cut": true, "delay_s": 0.1, "loss": 0.05}    of packets from a to b; what is absent is none
    {"count": true}                                     -> {"a>b": [packets, bytes, dropped packets], ...}

It ends when the control socket is closed.
"""

from __future__ import annotations

import json
import os
import random
import selectors
import socket
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

MAX_PACKET = 1 << 16
MAX_QUEUED = 4096
"""Packets that wait on a delayed link; what comes beyond is lost, as in a router."""
PASS_PACKETS = 64
"""So many of one device before the next one has its turn."""


@dataclass
class Link:
    """One direction between two namespaces."""

    cut: bool = False
    delay_s: float = 0.0
    loss: float = 0.0
    queue: deque[tuple[float, bytes]] = field(default_factory=deque)
    """(when it is due, packet), in the order in which they came: a delay never changes that."""
    packets: int = 0
    bytes: int = 0
    dropped: int = 0


@dataclass
class Port:
    """One namespace's device."""

    name: str
    fd: int


class Switch:
    """See the module. `control` is owned by it."""

    def __init__(self, control: socket.socket, ports: dict[bytes, Port]) -> None:
        self._control = control
        self._ports = ports
        names = [port.name for port in ports.values()]
        self._links = {(a, b): Link() for a in names for b in names if a != b}
        self._random = random.Random(0)
        self._received = b""

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ, None)
            for port in self._ports.values():
                os.set_blocking(port.fd, False)
                selector.register(port.fd, selectors.EVENT_READ, port)
            while True:
                for key, _ in selector.select(self._send_due()):
                    if key.data is not None:
                        self._take(key.data)
                    elif not self._obey():
                        return

    def _take(self, port: Port) -> None:
        for _ in range(PASS_PACKETS):
            try:
                packet = os.read(port.fd, MAX_PACKET)
            except BlockingIOError:
                return
            target = self._ports.get(packet[16:20]) if packet[0] >> 4 == 4 else None
            if target is None or target is port:
                continue  # IPv6's own affairs, broadcasts
            link = self._links[port.name, target.name]
            if link.cut or len(link.queue) >= MAX_QUEUED or (link.loss and self._random.random() < link.loss):
                link.dropped += 1
            elif link.delay_s or link.queue:
                link.queue.append((time.monotonic() + link.delay_s, packet))
            else:
                self._deliver(link, target, packet)

    def _deliver(self, link: Link, target: Port, packet: bytes) -> None:
        link.packets += 1
        link.bytes += len(packet)
        with suppress(OSError):  # a device that takes no more loses it, as a real one does
            os.write(target.fd, packet)

    def _send_due(self) -> float | None:
        """Hands on what is due; returns in how many seconds there is more."""
        now, next_due = time.monotonic(), None
        by_name = {port.name: port for port in self._ports.values()}
        for (_, target), link in self._links.items():
            while link.queue and link.queue[0][0] <= now:
                self._deliver(link, by_name[target], link.queue.popleft()[1])
            if link.queue:
                next_due = min(next_due or link.queue[0][0], link.queue[0][0])
        return None if next_due is None else max(0.0, next_due - now)

    def _obey(self) -> bool:
        """Requests that are there; false when there won't be any more."""
        try:
            data = self._control.recv(65536)
        except ConnectionError:
            return False
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            answer: dict[str, object] = {}
            if "link" in request:
                a, b = request["link"]
                link = self._links[a, b]
                link.cut, link.delay_s = bool(request.get("cut")), float(request.get("delay_s", 0.0))
                link.loss = float(request.get("loss", 0.0))
                if link.cut:
                    link.dropped += len(link.queue)
                    link.queue.clear()
            else:
                answer = {f"{a}>{b}": [one.packets, one.bytes, one.dropped] for (a, b), one in self._links.items()}
            self._control.sendall(json.dumps(answer).encode() + b"\n")
        return bool(data)


def main() -> None:
    ports = {}
    for argument in sys.argv[2:]:
        name, address, fd = argument.split("=")
        ports[socket.inet_aton(address)] = Port(name, int(fd))
    Switch(socket.socket(fileno=int(sys.argv[1])), ports).run()


if __name__ == "__main__":
    main()
