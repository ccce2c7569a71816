"""A replica and its primary in one process: a store in memory, a keeper that promises, connections that can be cut."""

from __future__ import annotations

import errno
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio

from nbd.tls import TlsSocket
from replication.leg import BLOCK_BYTES, EXTENT_BYTES, Change, Extents, Position
from replication.link import RemoteLeg, open_remote_leg
from replication.membership import LegInfo, Membership, Term
from replication.replica import Replica
from replication.wire import LegOption

SIZE = 8 << 20
TERM = Term(3, "a" * 16)
INFO = LegInfo("1" * 16, "b", "pool/vol")
OTHER = LegInfo("2" * 16, "a", "pool/vol")
MEMBERSHIP = Membership("m" * 32, SIZE, (OTHER, INFO), ("a", "b"), TERM, 0, "a", frozenset({OTHER.id, INFO.id}))

T = TypeVar("T")


def run(body: Callable[[], Awaitable[T]], *, seconds: float = 20) -> T:
    """A test that hangs fails with the place where it does."""

    async def bounded() -> T:
        with trio.fail_after(seconds):
            return await body()

    return trio.run(bounded)


async def until(true: Callable[[], Any]) -> None:
    """Wait for it; the test's own deadline bounds it."""
    while not true():
        await trio.sleep(0.001)


class ExtentSet:
    """`replication.leg.Extents`, as a set."""

    def __init__(self, extents: Iterable[int] = ()) -> None:
        self.extents = set(extents)

    def add(self, offset: int, length: int) -> None:
        self.extents.update(range(offset // EXTENT_BYTES, -(-(offset + length) // EXTENT_BYTES)))

    def discard(self, offset: int, length: int) -> None:
        self.extents.difference_update(range(-(-offset // EXTENT_BYTES), (offset + length) // EXTENT_BYTES))

    def runs(self, start: int = 0) -> Iterator[tuple[int, int]]:
        for extent in sorted(self.extents):
            if extent * EXTENT_BYTES >= start:
                yield extent * EXTENT_BYTES, EXTENT_BYTES

    def update(self, other: Extents) -> None:
        for offset, length in other.runs():
            self.add(offset, length)

    def clear(self) -> None:
        self.extents.clear()

    def encode(self) -> bytes:
        return json.dumps(sorted(self.extents)).encode()

    @property
    def count(self) -> int:
        return len(self.extents)

    def __bool__(self) -> bool:
        return bool(self.extents)


def decode_extents(data: bytes) -> Extents:
    return ExtentSet(json.loads(data))


class Store:
    """`replication.leg.LegStore` in memory. What is to wait, waits for `gate`."""

    export_name = "pool/vol"

    def __init__(self, size_bytes: int = SIZE) -> None:
        self.image = bytearray(size_bytes)
        self.record = b""
        self.trackers: dict[str, Extents] = {"recent": ExtentSet(), "recent-old": ExtentSet()}
        self.blocks = False
        """Nothing is done at once."""
        self.gate = trio.Event()
        self.gate.set()
        self.flush_gate = trio.Event()
        self.flush_gate.set()
        self.failing: OSError | None = None
        self.no_writes: str | None = None
        self.log: list[Any] = []
        """Everything that was done, in order."""
        self.lost: set[int] = set()
        """Offsets of blocks that can't be read until they are written."""
        self.waiting = 0
        self.passes = 0

    @property
    def size_bytes(self) -> int:
        return len(self.image)

    async def save(self, record: bytes, trackers: dict[str, Extents] | None = None) -> None:
        self.record = record
        if trackers is not None:
            self.trackers = trackers

    def empty_extents(self) -> Extents:
        return ExtentSet()

    def decode_extents(self, data: bytes) -> Extents:
        return decode_extents(data)

    def _change(self, offset: int, data: bytes) -> None:
        if self.failing is not None:
            raise self.failing
        assert offset % BLOCK_BYTES == 0 and len(data) % BLOCK_BYTES == 0 and offset + len(data) <= len(self.image)
        self.image[offset : offset + len(data)] = data
        self.log.append((offset, data[0], len(data)))
        self.lost.difference_update(range(offset, offset + len(data), BLOCK_BYTES))
        for one in self.trackers.values():
            one.add(offset, len(data))

    def write_now(self, writes: list[tuple[int, memoryview]]) -> bool:
        if self.blocks:
            return False
        assert 0 < len(writes) <= 1000
        self.passes += 1
        for offset, data in writes:
            self._change(offset, bytes(data))
        return True

    def trim_now(self, ranges: list[tuple[int, int]]) -> bool:
        if self.blocks:
            return False
        for offset, length in ranges:
            self._change(offset, bytes(length))
        return True

    def read_now(self, offset: int, length: int, into: memoryview) -> bool:
        if self.blocks:
            return False
        into[:] = self.image[offset : offset + length]
        return True

    async def _wait(self) -> None:
        self.waiting += 1
        try:
            await self.gate.wait()
            await trio.lowlevel.checkpoint()
        finally:
            self.waiting -= 1

    async def write(self, offset: int, data: memoryview | bytes) -> None:
        await self._wait()
        self._change(offset, bytes(data))

    async def trim(self, offset: int, length: int) -> None:
        await self._wait()
        self._change(offset, bytes(length))

    async def lose(self, offset: int, length: int) -> None:
        await self._wait()
        self._change(offset, b"!" * length)
        self.lost.update(range(offset, offset + length, BLOCK_BYTES))

    async def read(self, offset: int, length: int, into: memoryview) -> None:
        await self._wait()
        if self.failing is not None:
            raise self.failing
        into[:] = self.image[offset : offset + length]

    async def flush(self) -> None:
        covers = len(self.log)
        await self.flush_gate.wait()
        await trio.lowlevel.checkpoint()
        if self.failing is not None:
            raise self.failing
        self.log.append(("flush", covers))

    async def checks(self, offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return b"".join(bytes(7) + self.image[at : at + 1] for at in range(offset, offset + length, BLOCK_BYTES))

    async def mapped(self, offset: int, length: int) -> list[tuple[int, int]]:
        await trio.lowlevel.checkpoint()
        return [(offset, length // 2), (offset + length // 2, length - length // 2)]

    async def resize(self, size_bytes: int) -> None:
        await trio.lowlevel.checkpoint()
        self.image = bytearray(bytes(self.image[:size_bytes]).ljust(size_bytes, b"\0"))
        self.log.append(("resize", size_bytes))

    async def snapshot(self, name: str) -> None:
        await self._wait()
        if ("snapshot", name) in self.log:
            raise OSError(errno.EEXIST, f"{name} is there already")
        self.log.append(("snapshot", name))


@dataclass
class Record:
    me: str = INFO.id
    promised: Term | None = None
    accepted: Membership | None = None
    inconsistent: bool = False
    position: Position | None = None


@dataclass
class Keeper:
    """`replication.keeper.LegKeeper`, without its disk."""

    store: Store = field(default_factory=Store)
    record: Record = field(default_factory=Record)
    intact: bool = True
    on_fence: list[Callable[[Term], None]] = field(default_factory=list)
    clean: bool = True
    settlements: int = 0

    def allows(self, term: Term) -> bool:
        return self.record.promised is None or term >= self.record.promised

    def promise(self, term: Term) -> None:
        """What `prepare` does once it is durable."""
        self.record.promised = term
        for fenced in list(self.on_fence):
            fenced(term)

    async def accept(self, membership: Membership, *, inconsistent: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        accepted = self.record.accepted
        if accepted is not None and membership.place < accepted.place:
            raise OSError(errno.ESTALE, "a later record is stored")
        self.record.accepted, self.record.inconsistent = membership, inconsistent
        self.store.log.append(("accept", membership.epoch, inconsistent))

    async def take_part(self) -> None:
        await trio.lowlevel.checkpoint()
        self.clean, self.record.position = False, None

    async def leave(self, position: Position | None) -> None:
        await trio.lowlevel.checkpoint()
        self.clean, self.record.position = True, position

    def settled(self) -> None:
        self.settlements += 1


Contexts = tuple[ssl.SSLContext, ssl.SSLContext]


class Network:
    """Connections between a primary's legs and a replica, which serves each in `nursery`."""

    def __init__(self, nursery: trio.Nursery, keeper: Keeper, *, tls: Contexts | None = None) -> None:
        self.keeper = keeper
        self.replica = Replica(keeper)
        self.errors: list[OSError] = []
        """With which sessions ended at the replica."""
        self.is_down = False
        self.dials = 0
        self._nursery = nursery
        self._tls = tls
        self._raw: list[socket.socket] = []
        self._other_raw: list[socket.socket] = []

    async def connect(self, term: Term = TERM) -> tuple[socket.socket | TlsSocket, bytes]:
        """A `replication.link.Connect`."""
        self.dials += 1
        await trio.lowlevel.checkpoint()
        if self.is_down:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens")
        here, there = await self.pair()
        option = LegOption("a", MEMBERSHIP.mirror, INFO.id, term, str(self.dials))
        self._nursery.start_soon(self._serve, there, option)
        return here, b""

    async def pair(self) -> tuple[socket.socket | TlsSocket, socket.socket | TlsSocket]:
        """Two ends; the second is the replica's."""
        raw = socket.socketpair()
        for one in raw:
            one.setblocking(False)
        self._raw.append(raw[0])
        self._other_raw.append(raw[1])
        if self._tls is None:
            return raw
        here = TlsSocket(raw[0], self._tls[1], server_side=False, server_hostname="localhost")
        there = TlsSocket(raw[1], self._tls[0], server_side=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.handshake)
            nursery.start_soon(there.handshake)
        return here, there

    async def _serve(self, sock: socket.socket | TlsSocket, option: LegOption) -> None:
        try:
            await self.replica.serve(sock, b"", option)
        except OSError as error:
            self.errors.append(error)
        finally:
            trio.lowlevel.notify_closing(sock.fileno())
            sock.close()

    def cut(self) -> None:
        """All connections there are break."""
        for one in self._raw:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """When no task uses them any more."""
        for one in self._raw + self._other_raw:
            one.close()

    def restart(self) -> None:
        """Another process serves the same leg, after the earlier one was killed."""
        self.cut()
        self.keeper.on_fence.clear()
        self.replica = Replica(self.keeper)


@dataclass
class Link:
    leg: RemoteLeg
    network: Network
    nursery: trio.Nursery

    @property
    def keeper(self) -> Keeper:
        return self.network.keeper

    @property
    def store(self) -> Store:
        return self.network.keeper.store


@asynccontextmanager
async def linked(*, timeout_s: float = 5.0, tls: Contexts | None = None) -> AsyncIterator[Link]:
    """A leg with its replica."""
    network: Network | None = None
    try:
        async with trio.open_nursery() as nursery:
            network = Network(nursery, Keeper(), tls=tls)
            leg = await open_remote_leg(
                nursery, network.connect, INFO, MEMBERSHIP, timeout_s=timeout_s, decode_extents=decode_extents
            )
            yield Link(leg, network, nursery)
            leg.close()
            nursery.cancel_scope.cancel()
    finally:
        if network is not None:
            network.close()


class Told:
    """What was called, in order: (sequence, error)."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, OSError | None]] = []

    def of(self, sequence: int) -> Callable[[OSError | None], None]:
        return lambda error: self.calls.append((sequence, error))

    @property
    def done(self) -> list[int]:
        return [sequence for sequence, error in self.calls if error is None]

    @property
    def failed(self) -> list[int]:
        return [sequence for sequence, error in self.calls if error is not None]


def data(offset: int, fill: int, length: int = BLOCK_BYTES) -> Change:
    """A change of one value."""
    return Change(offset, length, memoryview(bytes([fill]) * length))


def zeros(offset: int, length: int = BLOCK_BYTES) -> Change:
    return Change(offset, length, None)
