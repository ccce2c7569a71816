"""A load that knows what it wrote: writers and readers of one volume, which go to whichever node serves it.

Each writer has its region (`oracle.Region`) and a connection; so have readers, who read anywhere. All run in a thread
of their own, which is on the client's host. What they see goes to the `Oracle`.

A request whose connection ends is not sent again: whether it happened is unknown. Where the server ended the
connection, it is over: a daemon closes one when all that it had begun has ended, or dies with it. Where *we* gave up a
silent one, the node may still carry it out, at any time; so its units are left alone, except for reading, until another
node serves that writer: by then the first one must have been fenced.
"""

from __future__ import annotations

import contextlib
import errno
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from nbd.client import Client, ClientLimits, connect
from tests.cluster.network import Host
from tests.cluster.oracle import Oracle, Region, Violation

UNIT = 4096
PATIENCE_S = 2.0
"""A connection on which a request takes longer is given up."""
TASKS = 4
"""Requests of one writer or reader at a time."""
PAUSE_S = 0.01
READ_UNITS = 32
_LIMITS = ClientLimits(handshake_timeout_s=1.0)


def regions_of(size_bytes: int) -> list[Region]:
    """Three writers of whole blocks, and two whose units are not: half a KiB, and blocks that begin in the middle."""
    part = size_bytes // 5 // UNIT * UNIT
    whole = [Region(i, i * part, UNIT, min(part // UNIT, 1024)) for i in range(3)]
    small = Region(3, 3 * part, 512, min(part // 512, 1024))
    shifted = Region(4, 4 * part + UNIT // 2, UNIT // 2, min(part // (UNIT // 2) - 2, 1024))
    return [*whole, small, shifted]


@dataclass
class Link:
    """One connection, from its handshake on."""

    node: str
    client: Client
    ended: trio.Event = field(default_factory=trio.Event)

    @property
    def over(self) -> bool:
        """The server has ended it: nothing that was under way on it happens any more."""
        return self.client.failure is not None and self.client.failure.errno in (errno.ECONNRESET, errno.EPIPE)


class Session:
    """A connection to whoever serves, for ever made anew."""

    def __init__(self, addresses: dict[str, tuple[str, int]], export: str, rng: random.Random) -> None:
        self._addresses = addresses
        self._export = export
        self._rng = rng
        self._link: Link | None = None
        self._changed = trio.Event()

    async def link(self) -> Link:
        """The present one; waits for it."""
        while self._link is None or self._link.ended.is_set():
            await self._changed.wait()
        return self._link

    async def run(self) -> None:
        """Connects, over and over, where it is let in."""
        nodes = list(self._addresses)
        while True:
            self._rng.shuffle(nodes)
            for node in nodes:
                with contextlib.suppress(OSError):
                    async with connect(self._addresses[node], self._export, limits=_LIMITS) as client:
                        link = Link(node, client)
                        self._set(link)
                        async with trio.open_nursery() as nursery:
                            nursery.start_soon(self._until_failed, link, nursery.cancel_scope.cancel)
                            await link.ended.wait()
                            nursery.cancel_scope.cancel()
                    self._set(None)
            await trio.sleep(0.05)

    async def _until_failed(self, link: Link, stop: Callable[[], None]) -> None:
        await link.client.failed()
        link.ended.set()
        stop()

    def _set(self, link: Link | None) -> None:
        self._link = link
        self._changed.set()
        self._changed = trio.Event()


@dataclass
class Summary:
    """What a load has done."""

    writes: int = 0
    reads: int = 0
    unanswered: int = 0
    longest_stall_s: float = 0.0
    stalled_at_s: float = 0.0
    """When the longest stall ended, in seconds since the load began."""

    def __str__(self) -> str:
        return (
            f"{self.writes} writes and {self.reads} reads answered, {self.unanswered} not; longest stall "
            f"{self.longest_stall_s:.2f} s, until {self.stalled_at_s:.1f} s after the start"
        )


class Load:
    """See the module. `start`, then `check` now and then, then `stop`."""

    def __init__(
        self, host: Host, addresses: dict[str, tuple[str, int]], export: str, oracle: Oracle, seed: int
    ) -> None:
        self._host = host
        self._addresses = addresses
        self._export = export
        self._oracle = oracle
        self._seed = seed
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._began_s = self._answered_s = time.monotonic()
        self.summary = Summary()

    def start(self) -> None:
        self._began_s = self._answered_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def longest_stall_s(self) -> float:
        """Since it was asked for last."""
        self.answered()
        longest_s, self.summary.longest_stall_s = self.summary.longest_stall_s, 0.0
        return longest_s

    def check(self) -> None:
        """Raises what went wrong until now."""
        if self._failure is not None:
            raise self._failure

    def stop(self) -> Summary:
        """Waits for what is under way, while the volume must be served; raises what went wrong."""
        self._stopping.set()
        assert self._thread is not None
        self._thread.join(60)
        self.check()
        assert not self._thread.is_alive(), "the load doesn't end"
        return self.summary

    def _run(self) -> None:
        try:
            self._host.run(lambda: trio.run(self._main))
        except BaseException as error:
            self._failure = _one_of(error)

    async def _main(self) -> None:
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as workers:
                for region in self._oracle.regions:
                    writer = _Writer(self, region)
                    nursery.start_soon(writer.session.run)
                    for _ in range(TASKS):
                        workers.start_soon(writer.work)
                for number in range(2):
                    session = self.session(f"reader {number}")
                    nursery.start_soon(session.run)
                    for task in range(TASKS):
                        workers.start_soon(self._read, session, random.Random(f"{self._seed} {number} {task}"))
            await self._read_all(nursery)
            nursery.cancel_scope.cancel()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def session(self, who: str) -> Session:
        return Session(self._addresses, self._export, random.Random(f"{self._seed} {who}"))

    def rng(self, who: str) -> random.Random:
        return random.Random(f"{self._seed} {who}")

    @property
    def oracle(self) -> Oracle:
        return self._oracle

    def answered(self) -> None:
        """A request was answered; what lay between it and the one before may be the longest stall."""
        now = time.monotonic()
        if now - self._answered_s > self.summary.longest_stall_s:
            self.summary.longest_stall_s = now - self._answered_s
            self.summary.stalled_at_s = now - self._began_s
        self._answered_s = now

    async def _read(self, session: Session, rng: random.Random) -> None:
        while not self.stopping:
            region = rng.choice(self._oracle.regions)
            start = rng.randrange(region.count)
            await self._read_units(session, region, start, min(rng.randint(1, READ_UNITS), region.count - start))
            await trio.sleep(PAUSE_S)

    async def _read_units(
        self, session: Session, region: Region, start: int, count: int, *, to_the_end: bool = False
    ) -> bool:
        async with using(session, lambda: self.stopping and not to_the_end) as link:
            if link is None:
                return False
            floors = self._oracle.floors(region, start, count)
            data = await link.client.read(region.offset + start * region.unit_bytes, count * region.unit_bytes)
            self._oracle.judge(region, start, floors, bytes(data), f"a read from {link.node}")
            self.summary.reads += 1
            self.answered()
            return True
        self.summary.unanswered += 1
        return False

    async def _read_all(self, nursery: trio.Nursery) -> None:
        """In the end everything is read once, from whoever serves then."""
        session = self.session("the last reader")
        nursery.start_soon(session.run)
        with trio.fail_after(40):
            for region in self._oracle.regions:
                for start in range(0, region.count, READ_UNITS):
                    count = min(READ_UNITS, region.count - start)
                    while not await self._read_units(session, region, start, count, to_the_end=True):
                        await trio.sleep(0.05)


@asynccontextmanager
async def using(session: Session, stopping: Callable[[], bool]) -> AsyncIterator[Link | None]:
    """A link, for one request; None when the load ends first. A request that fails leaves the block silently.

    A connection on which it takes too long is given up.
    """
    link: Link | None = None
    while link is None and not stopping():
        with trio.move_on_after(0.2):
            link = await session.link()
    if link is None:
        yield None
        return
    with trio.move_on_after(PATIENCE_S) as patience, contextlib.suppress(OSError):
        yield link
    if patience.cancelled_caught:
        link.ended.set()


class _Writer:
    """One writer of one region, in several tasks, which never have the same unit."""

    def __init__(self, load: Load, region: Region) -> None:
        self.session = load.session(f"writer {region.writer}")
        self._load = load
        self._region = region
        self._rng = load.rng(f"choices of {region.writer}")
        self._busy: set[int] = set()
        self._doubtful: dict[int, str] = {}
        """Unit: the node that may still carry out a write of it, for all that we know."""

    async def work(self) -> None:
        while not self._load.stopping:
            await self._write()
            await trio.sleep(PAUSE_S)

    async def _write(self) -> None:
        rng, region, oracle = self._rng, self._region, self._load.oracle
        async with using(self.session, lambda: self._load.stopping) as link:
            if link is None:
                return
            units = self._choose(link.node)
            if not units:
                return
            zero = rng.random() < 0.1
            numbers = [oracle.begin(region, i, zero=zero) for i in units]
            self._busy.update(units)
            done = False
            try:
                at, size = region.offset + units[0] * region.unit_bytes, len(units) * region.unit_bytes
                fua = rng.random() < 0.1
                if zero:
                    await link.client.write_zeroes(at, size, fua=fua)
                else:
                    data = [oracle.content(region, i, number) for i, number in zip(units, numbers, strict=True)]
                    await link.client.write(at, b"".join(data), fua=fua)
                done = True
                for i, number in zip(units, numbers, strict=True):
                    oracle.acknowledge(region, i, number)
                self._load.summary.writes += 1
                self._load.answered()
                if rng.random() < 0.01:
                    await link.client.flush()
            except OSError:
                self._load.summary.unanswered += 1
                done = done or link.client.failure is None or link.over  # in part, or not at all, and not later
                raise
            finally:
                self._busy.difference_update(units)
                if not done:
                    self._doubtful.update(dict.fromkeys(units, link.node))

    def _choose(self, node: str) -> list[int]:
        """Units in a row that nobody has; often one, sometimes as many as 64 KiB take."""
        most = 1 if self._rng.random() < 0.7 else max(1, (64 << 10) // self._region.unit_bytes)
        start = self._rng.randrange(self._region.count)
        chosen: list[int] = []
        for i in range(start, min(start + self._rng.randint(1, most), self._region.count)):
            if i in self._busy or self._doubtful.get(i, "") == node:
                break
            self._doubtful.pop(i, None)
            chosen.append(i)
        return chosen


def _one_of(error: BaseException) -> BaseException:
    """A violation, if there is one in a group."""
    if isinstance(error, BaseExceptionGroup):
        found = [_one_of(one) for one in error.exceptions]
        return next((one for one in found if isinstance(one, Violation)), found[0])
    return error
