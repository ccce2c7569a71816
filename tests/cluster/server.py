"""A mirror of two nodes with a leg on an NBD server that knows nothing of mirrors: nbdkit, on the clients' host.

What such a server can't do, fencing, order, records, is what faults find out: in the end it must have what the nodes
have.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.network import Host
from tests.cluster.nodes import CLIENT, Mirrored, Nodes

PORT = 10899


@dataclass
class WithServer(Mirrored):
    """See the module."""

    _process: subprocess.Popen[bytes] | None = None
    _image: Path = field(default_factory=Path)
    _address: str = ""

    @property
    def leg_count(self) -> int:
        return len(self.names) + 1

    def create(self, nodes: Nodes, size_bytes: int) -> None:
        host = nodes.network.host(CLIENT)
        self._address, self._image = host.address, nodes.directory / "server.img"
        with self._image.open("wb") as file:
            file.truncate(size_bytes)
        command = ["nbdkit", "-f", "-i", self._address, "-p", str(PORT), "--filter=delay", "file", str(self._image)]
        self._process = subprocess.Popen(host.command(*command, "wdelay=1ms"))
        nodes.wait_for("the NBD server", lambda: None if self._greets(host) else "it is silent", 10)
        super().create(nodes, size_bytes)

    def _greets(self, host: Host) -> bool:
        asked = host.command("nbdinfo", "--size", f"nbd://{self._address}:{PORT}")
        return subprocess.run(asked, capture_output=True, check=False).returncode == 0

    def whole(self, nodes: Nodes) -> str | None:
        assert self._process is not None
        ended = self._process.poll()
        assert ended is None, f"the NBD server ended by itself, with status {ended}"
        return super().whole(nodes)

    def disks(self) -> list[dict[str, str]]:
        return [{"node": f"nbd://{self._address}:{PORT}"}]

    def others(self) -> Mapping[str, bytes]:
        return {"the copy of the NBD server": self._image.read_bytes()}

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
