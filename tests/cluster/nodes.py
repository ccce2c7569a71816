"""Real `terraced` processes, each a node with a home, a pool and a namespace of its own, and what may happen to them.

`Nodes` starts them over one `Network`, which has one more host, `CLIENT`, for who uses the volume. How the volume is
made and who serves it is a `Deployment`'s affair: `Alone` (one node, no mirror: what the harness itself is tested
with) or `Mirrored`.
"""

from __future__ import annotations

import signal
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import trio

from terrace.certificates import make_authority, make_node
from tests.cluster.network import Host, Network
from tests.etcdserver import EtcdServer
from tests.system.daemon import ApiError, Daemon, DaemonError
from tiers import Pool

CLIENT = "client"
PORT = 10809
ETCD_PORT = 2379
POOL = "p"
VOLUME = "p/v"
TIMEOUT_S = 0.3
"""So long a leg may be silent before writes go on without it."""
BOOT_ID = "/proc/sys/kernel/random/boot_id"
ANSWER_S = 30.0
"""What is asked of a node is answered in this time, whatever it can't reach."""
_MIRROR = f"/v1/pools/{POOL}/volumes/{VOLUME.partition('/')[2]}/mirror"
_MIB = 1 << 20


class Node(Daemon):
    """One node. Its home is DIRECTORY/NAME."""

    def __init__(self, host: Host, directory: Path, config: str) -> None:
        self._boot = directory / f"{host.name}.boot"
        # In the place of the machine's; a mount namespace is its process's own. All of these become the daemon.
        boot = ["unshare", "--mount", "sh", "-c", f'mount --bind "$0" {BOOT_ID} && exec "$@"', str(self._boot)]
        super().__init__(directory / host.name, config, wrap=host.command(*boot))
        self.new_boot()
        self.host = host
        self.name = host.name
        self.paused = False

    def configure(self) -> Path:
        """The loopback address is for `Daemon`, the other for everybody."""
        file = self.home.with_name(self.home.name + ".toml")
        file.write_text(f'[nbd]\nlisten = ["127.0.0.1:0", "{self.host.address}:{PORT}"]\n{self.config}')
        return file

    def new_boot(self) -> None:
        """From its next start on its machine has been booted anew, as far as it can tell: it may have lost something.

        It hasn't, for the page cache of the real machine lives on; what is really lost is the simulation's affair.
        """
        self._boot.write_text(f"{uuid.uuid4()}\n")

    def pause(self) -> None:
        """SIGSTOP: it stands still, and its host's kernel goes on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        self.paused = True

    def resume(self) -> None:
        if self.paused and self.process is not None:
            self.process.send_signal(signal.SIGCONT)
        self.paused = False

    def kill(self) -> None:
        self.paused = False
        super().kill()

    def stop(self) -> int:
        self.resume()
        return super().stop()

    @property
    def answers(self) -> bool:
        """Whether it can be asked."""
        return self.alive() and not self.paused


class Deployment(Protocol):
    """How the volume comes to be on the nodes, and who serves it."""

    names: Sequence[str]
    """Of all nodes."""
    arbiter: str | None
    """Another host, where etcd runs."""

    def create(self, nodes: Nodes, size_bytes: int) -> None: ...

    def promote(self, nodes: Nodes, name: str) -> str | None:
        """Make that node serve; None, or why it refuses."""

    def demote(self, nodes: Nodes, name: str, to: str | None = None) -> str | None:
        """Make that node serve no more, cleanly, and `to` in its place; None, or why it refuses."""

    def primary(self, nodes: Nodes) -> str | None:
        """Who serves, as far as somebody that can be asked knows."""

    def starting(self, nodes: Nodes) -> bool:
        """Whether a node is about to serve by itself, as it did before it was restarted."""

    def whole(self, nodes: Nodes) -> str | None:
        """None if every copy is up to date, else what is missing."""

    def copies(self) -> Sequence[str]:
        """The nodes that have one."""

    def others(self) -> Mapping[str, bytes]:
        """Copies that are on no node, by what they are called. The nodes have ended."""

    def close(self) -> None:
        """End what it has started itself."""

    def servers(self) -> Sequence[str]:
        """The nodes that may serve, the one first that should."""


class Nodes:
    """See the module. `with Nodes(network, directory, deployment) as nodes:` starts all, and kills them in the end."""

    def __init__(self, network: Network, directory: Path, deployment: Deployment) -> None:
        self.network = network
        self.directory = directory
        self.deployment = deployment
        self.by_name: dict[str, Node] = {}
        self.etcd: EtcdServer | None = None
        self.last_primary: str | None = None
        """Who served when somebody looked last."""
        for name in deployment.names:
            self.by_name[name] = Node(network.host(name), directory, self._configuration(name))

    def __enter__(self) -> Nodes:
        try:
            self._make_certificates()
            self._start_etcd()
            start_all(list(self.by_name.values()))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for node in self.by_name.values():
            node.kill()
        if self.etcd is not None:
            self.etcd.kill()

    def __getitem__(self, name: str) -> Node:
        return self.by_name[name]

    @property
    def names(self) -> list[str]:
        return list(self.by_name)

    @property
    def addresses(self) -> dict[str, tuple[str, int]]:
        """Where clients find each."""
        return {name: (node.host.address, PORT) for name, node in self.by_name.items()}

    def answering(self) -> list[Node]:
        return [node for node in self.by_name.values() if node.answers]

    def check(self) -> None:
        """That nobody has ended by itself."""
        for node in self.by_name.values():
            if node.process is not None and not node.alive():
                raise DaemonError(f"the node {node.name} has ended by itself; its log:\n{node.tail(100)}")

    def check_logs(self) -> None:
        """That no node has met what its authors didn't expect."""
        for node in self.by_name.values():
            if "Traceback" in node.log.read_text(errors="replace"):
                raise DaemonError(f"a stack trace in the log of the node {node.name}:\n{node.tail(100)}")

    def _configuration(self, name: str) -> str:
        others = [other for other in self.deployment.names if other != name]
        if not others:
            return "[nbd.tls]\nplaintext = true\n"
        peers = [f'[peers.{other}]\naddress = "{self.network.host(other).address}:{PORT}"\n' for other in others]
        # The load needs no secrets, and encrypts nothing; nodes do among themselves.
        text = f'[nbd.tls]\nmode = "allowed"\nplaintext = true\n[node]\nname = "{name}"\n' + "".join(peers)
        if self.deployment.arbiter is not None:
            files = 'ca = "tls/ca-cert.pem"\ncertificate = "tls/node-cert.pem"\nkey = "tls/node-key.pem"\n'
            address = self.network.host(self.deployment.arbiter).address
            text += f'[etcd]\nendpoints = ["https://{address}:{ETCD_PORT}"]\n{files}'
        return text

    def _start_etcd(self) -> None:
        if self.deployment.arbiter is not None:
            host = self.network.host(self.deployment.arbiter)
            files = make_node(self.directory / "authority", host.name, [host.address], 2, here=False)
            self.etcd = EtcdServer(
                self.directory / host.name,
                tls=files,
                address=host.address,
                port=ETCD_PORT,
                wrap=host.command(),
                reach=host.run,
            )

    def _make_certificates(self) -> None:
        """One authority, and a certificate for each node, as `terrace tls` makes them."""
        if len(self.by_name) < 2:
            return
        authority = self.directory / "authority"
        make_authority(authority, "cluster", 2)
        for node in self.by_name.values():
            made = make_node(authority, node.name, [node.host.address], 2, here=False)
            node.home.mkdir()
            made.rename(node.home / "tls")

    def contents(self, name: str) -> bytes:
        """The volume as that node's pool has it, read by the engine alone. The node must not run."""
        node = self.by_name[name]
        assert node.process is None, f"the node {name} still runs"

        async def read() -> bytes:
            async with Pool.open(node.home / "pools" / POOL) as pool:
                volume = pool.volume(VOLUME.partition("/")[2])
                data = bytearray(volume.size_bytes)
                for at in range(0, len(data), _MIB):
                    part = min(_MIB, len(data) - at)
                    await volume.read(at, part, memoryview(data)[at : at + part])
                return bytes(data)

        return trio.run(read)

    def make_pool(self, name: str, size_bytes: int) -> None:
        device = {"path": str(self.directory / f"{name}.fast"), "tier": "fast", "size": max(96 * _MIB, 4 * size_bytes)}
        self.by_name[name].api("POST", "/v1/pools", {"name": POOL, "devices": [device]})

    def wait_for(self, what: str, found: Callable[[], str | None], timeout_s: float) -> float:
        """Until `found` returns None; else a DaemonError with what it said last. Returns the seconds that took."""
        start_s = time.monotonic()
        while (missing := found()) is not None:
            if time.monotonic() - start_s > timeout_s:
                logs = "\n".join(f"--- log of {node.name}:\n{node.tail(60)}" for node in self.by_name.values())
                raise DaemonError(f"not {what} in {timeout_s:g} s: {missing}\n{logs}")
            time.sleep(0.05)
        return time.monotonic() - start_s


def start_all(nodes: Sequence[Node]) -> None:
    """At once. Raises what went wrong with the first of them."""
    with ThreadPoolExecutor(max(1, len(nodes))) as pool:
        for started in [pool.submit(node.start) for node in nodes]:
            started.result()


@dataclass
class Alone:
    """One node with a plain volume, which it always serves while it runs."""

    names: Sequence[str] = ("a",)
    arbiter: str | None = None

    def create(self, nodes: Nodes, size_bytes: int) -> None:
        nodes.make_pool("a", size_bytes)
        nodes["a"].cli("volume", "create", VOLUME, str(size_bytes))

    def promote(self, nodes: Nodes, name: str) -> str | None:
        return None

    def demote(self, nodes: Nodes, name: str, to: str | None = None) -> str | None:
        return "there is no other node"

    def primary(self, nodes: Nodes) -> str | None:
        return "a" if nodes["a"].answers else None

    def starting(self, nodes: Nodes) -> bool:
        return False

    def whole(self, nodes: Nodes) -> str | None:
        return None

    def copies(self) -> Sequence[str]:
        return ("a",)

    def others(self) -> Mapping[str, bytes]:
        return {}

    def close(self) -> None: ...

    def servers(self) -> Sequence[str]:
        return ("a",)


@dataclass
class Mirrored:
    """A mirror with a leg on each node."""

    names: Sequence[str] = ("a", "b")
    arbiter: str | None = None

    @property
    def leg_count(self) -> int:
        """Of all that have to be up to date."""
        return len(self.copies())

    def create(self, nodes: Nodes, size_bytes: int) -> None:
        for name in self.names:
            nodes.make_pool(name, size_bytes)
        first, *others = self.names
        mirror = [{"node": name, "pool": POOL} for name in others] + self.disks()
        body = {"name": VOLUME.partition("/")[2], "size": size_bytes, "mirror": mirror}
        body |= {"timeout_s": TIMEOUT_S, "lease_s": TIMEOUT_S}
        body |= {"arbiter": "etcd" if self.arbiter is not None else "legs"}
        nodes.wait_for("connected", lambda: self._connected(nodes), 10)
        nodes[first].api("POST", f"/v1/pools/{POOL}/volumes", body)

    def disks(self) -> list[dict[str, str]]:
        """Legs that are on no node."""
        return []

    @staticmethod
    def _connected(nodes: Nodes) -> str | None:
        for node in nodes.answering():
            for one in node.api("GET", "/v1/nodes"):
                if one["state"] != "Online":
                    return f"{one['name']} is {one['state']} for {node.name}"
        return None

    def promote(self, nodes: Nodes, name: str) -> str | None:
        return self._ask(nodes[name], "promote", {})

    def demote(self, nodes: Nodes, name: str, to: str | None = None) -> str | None:
        return self._ask(nodes[name], "demote", {"to": to, "force": True})

    def primary(self, nodes: Nodes) -> str | None:
        return self._with_role(nodes, "primary")

    def starting(self, nodes: Nodes) -> bool:
        return self._with_role(nodes, "starting") is not None

    def _with_role(self, nodes: Nodes, role: str) -> str | None:
        for node in nodes.answering():
            status = self.status(node)
            if status is not None and status["role"] == role:
                return node.name
        return None

    def whole(self, nodes: Nodes) -> str | None:
        primary = self.primary(nodes)
        if primary is None:
            return "there is no primary"
        status = self.status(nodes[primary])
        if status is None:
            return f"the primary {primary} doesn't answer"
        states = {leg["id"]: (leg["node"], leg["state"], leg["error"]) for leg in status["legs"]}
        is_whole = len(states) == self.leg_count and {state for _, state, _ in states.values()} == {"UpToDate"}
        return None if is_whole else f"legs as {primary} says: {list(states.values())}"

    def copies(self) -> Sequence[str]:
        return self.names

    def others(self) -> Mapping[str, bytes]:
        return {}

    def close(self) -> None: ...

    def servers(self) -> Sequence[str]:
        return self.names

    def status(self, node: Node) -> dict[str, Any] | None:
        """What that node says of the mirror; None if it can't be asked now."""
        try:
            found: dict[str, Any] = node.api("GET", _MIRROR, timeout_s=ANSWER_S)
        except (httpx.TransportError, ApiError):
            return None
        return found

    def _ask(self, node: Node, what: str, body: dict[str, Any]) -> str | None:
        if not node.answers:
            return f"{node.name} doesn't run"
        try:
            node.api("POST", f"{_MIRROR}/{what}", body, timeout_s=ANSWER_S)
        except ApiError as error:
            if error.status >= 500 and error.errno is None:
                raise
            return error.message
        return None


@dataclass
class Diskless(Mirrored):
    """A mirror with legs on a and b, and a node c without a pool, which serves it first."""

    names: Sequence[str] = ("a", "b", "c")

    def create(self, nodes: Nodes, size_bytes: int) -> None:
        Mirrored(("a", "b")).create(nodes, size_bytes)
        refused = self.demote(nodes, "a", "c")
        assert refused is None, refused

    def promote(self, nodes: Nodes, name: str) -> str | None:
        if name != "c":
            return super().promote(nodes, name)
        refused: str | None = "no node with a leg runs"
        for source in self.copies():
            if nodes[source].answers:
                refused = self._ask(nodes[name], "promote", {"from": source})
                if refused is None:
                    break
        return refused

    def copies(self) -> Sequence[str]:
        return ("a", "b")

    def servers(self) -> Sequence[str]:
        return ("c", "a", "b")
