"""How fast a volume may go: token buckets for operations and bytes, and a fair queue of those who wait for tokens.

A bucket fills at the limit's rate up to its depth, the burst. A request goes when every bucket has what it costs, or is
full where it costs more than a bucket holds; then it takes what it costs, if need be into debt, which those after it
wait for. So the rate holds on average whatever the sizes are, and only what a rest has saved up comes on top.

Requests that can't go wait in a queue, and while anybody waits nobody overtakes. Among *clients* (connections) tokens
are shared equally, however many requests each has waiting: the next to go is the first of the client that has had the
least so far, measured in the time that its requests took from the buckets (start-time fair queueing: Goyal, Vin, Cheng,
SIGCOMM 1996). A client is known by its task: see `begin_client`.

There is no task and no timer here while nobody waits. Of those who wait, one sleeps until the next may go, and lets all
go that may; the others wait for it.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

import trio

from tiers.policy import Policy

OPERATION_SHIFT = 18
"""A request counts as one operation for each 256 KiB begun: long ones arrive in pieces of that, or of multiples."""
REST_S = 0.1
"""Without a burst a bucket holds what comes in so long."""
TICK_S = 0.001
"""Shorter sleeps only cost: what has come in meanwhile isn't lost."""


def operations_of(length: int) -> int:
    """As how many operations a request of `length` bytes counts."""
    return max(1, -(-length >> OPERATION_SHIFT))


class Client:
    """Whose requests share one turn."""

    __slots__ = ("requests", "tag")

    def __init__(self) -> None:
        self.requests: deque[_Request] = deque()
        self.tag = 0.0
        """The virtual time at which its next request begins."""


_client: ContextVar[Client | None] = ContextVar("client", default=None)


def begin_client() -> None:
    """From here on this task, and each task that it starts, is a client of its own."""
    _client.set(Client())


@dataclass(slots=True, eq=False)
class _Request:
    operations: int
    length: int
    granted: bool = False
    gone: bool = False
    wake: trio.Event = field(default_factory=trio.Event)


class Bucket:
    """Tokens that come in at `rate` a second and are kept up to `depth`. Below zero: debt."""

    __slots__ = ("depth", "level", "rate")

    def __init__(self, rate: float, burst: float) -> None:
        self.level = math.inf
        self.adjust(rate, burst)

    def adjust(self, rate: float, burst: float) -> None:
        """What was saved up stays as far as it fits; a debt was made at another rate, and is forgiven."""
        self.rate = rate
        self.depth = burst or max(1.0, rate * REST_S)
        self.level = min(self.depth, max(0.0, self.level))

    def refill(self, seconds: float) -> None:
        """So much time has passed."""
        self.level = min(self.depth, self.level + self.rate * seconds)

    def wait_s(self, cost: float) -> float:
        """Seconds until a request of that cost may go; 0 or less: now."""
        return (min(cost, self.depth) - self.level) / self.rate


class Limits:
    """The limits of one volume. All of it belongs to the trio thread."""

    def __init__(self, policy: Policy, clock: Callable[[], float] = trio.current_time) -> None:
        self.waiting = 0
        """Requests that wait for tokens."""
        self._clock = clock
        self._filled_at = clock()
        self._operations: Bucket | None = None
        self._bytes: Bucket | None = None
        self._active: list[tuple[float, int, Client]] = []
        """A heap, by tag, of the clients that have requests waiting; each is in it once."""
        self._turn = 0
        self._virtual = 0.0
        """The tag of who went last."""
        self._anybody = Client()
        """Those who ask without being a client."""
        self._leader: _Request | None = None
        self._changed = trio.Event()
        self.change(policy)

    # -- without waiting -------------------------------------------------------------------------------------------

    def may_go(self, operations: int, length: int, *, requests: int = 1) -> bool:
        """Whether so much may be done now, by one request or by a batch of `requests`; then `spend` it."""
        if self.waiting:
            return False
        self._refill()
        if requests == 1:
            return self._wait_s(operations, length) <= 0
        # In a batch each could have waited by itself, so it may not make a debt.
        return (self._operations is None or operations <= self._operations.level) and (
            self._bytes is None or length <= self._bytes.level
        )

    def spend(self, operations: int, length: int) -> None:
        """So much is being done."""
        if self._operations is not None:
            self._operations.level -= operations
        if self._bytes is not None:
            self._bytes.level -= length

    # -- waiting ---------------------------------------------------------------------------------------------------

    async def take(self, operations: int, length: int) -> None:
        """Wait until a request of that cost may go, and spend what it costs. Cancelled, it costs nothing."""
        if self.may_go(operations, length):
            self.spend(operations, length)
            return
        request = _Request(operations, length)
        self._enqueue(request)
        try:
            while not request.granted:
                if self._leader is None:
                    await self._lead(request)
                else:
                    await request.wake.wait()
                    request.wake = trio.Event()
        finally:
            if not request.granted:
                request.gone = True
                self.waiting -= 1
            if self._leader is None:
                self._appoint_leader()

    async def _lead(self, request: _Request) -> None:
        """Sleep until the first in the queue may go, and let all go that may, until `request` is among them."""
        self._leader = request
        try:
            while True:
                wait_s = self._grant()
                if request.granted:
                    return
                self._changed = trio.Event()
                with trio.move_on_after(max(TICK_S, wait_s)):
                    await self._changed.wait()
        finally:
            self._leader = None

    def _appoint_leader(self) -> None:
        """Wake one of those who wait."""
        for _, _, client in self._active:
            for request in client.requests:
                if not request.gone:
                    request.wake.set()
                    return

    def _enqueue(self, request: _Request) -> None:
        client = _client.get() or self._anybody
        if not client.requests:
            client.tag = max(client.tag, self._virtual)
            self._activate(client)
        client.requests.append(request)
        self.waiting += 1

    def _activate(self, client: Client) -> None:
        self._turn += 1
        heapq.heappush(self._active, (client.tag, self._turn, client))

    def _grant(self) -> float:
        """Let all go that may go now; return the seconds until the next may (0 if nobody waits)."""
        self._refill()
        while self._active:
            tag, _, client = self._active[0]
            requests = client.requests
            while requests and requests[0].gone:
                requests.popleft()
            if requests:
                request = requests[0]
                wait_s = self._wait_s(request.operations, request.length)
                if wait_s > 0:
                    return wait_s
                requests.popleft()
                self.spend(request.operations, request.length)
                self._virtual = tag
                client.tag = tag + self._seconds_of(request)
                self.waiting -= 1
                request.granted = True
                request.wake.set()
            heapq.heappop(self._active)
            if requests:
                self._activate(client)
        return 0.0

    # -- other limits ----------------------------------------------------------------------------------------------

    def change(self, policy: Policy) -> None:
        """The limits of this policy hold from now on, also for those who wait. None at all lets everybody go."""
        self._refill()
        self._operations = _adjusted(self._operations, policy.iops_limit, policy.iops_burst)
        self._bytes = _adjusted(self._bytes, policy.bandwidth_limit_bytes, policy.bandwidth_burst_bytes)
        self._grant()
        self._changed.set()

    # -- arithmetic ------------------------------------------------------------------------------------------------

    def _refill(self) -> None:
        now = self._clock()
        seconds, self._filled_at = now - self._filled_at, now
        if self._operations is not None:
            self._operations.refill(seconds)
        if self._bytes is not None:
            self._bytes.refill(seconds)

    def _wait_s(self, operations: int, length: int) -> float:
        wait_s = 0.0
        if self._operations is not None:
            wait_s = self._operations.wait_s(operations)
        if self._bytes is not None:
            wait_s = max(wait_s, self._bytes.wait_s(length))
        return wait_s

    def _seconds_of(self, request: _Request) -> float:
        """How long the scarcer bucket fills for this request."""
        seconds = 0.0
        if self._operations is not None:
            seconds = request.operations / self._operations.rate
        if self._bytes is not None:
            seconds = max(seconds, request.length / self._bytes.rate)
        return seconds


def _adjusted(bucket: Bucket | None, rate: int, burst: int) -> Bucket | None:
    if not rate:
        return None
    if bucket is None:
        return Bucket(rate, burst)
    bucket.adjust(rate, burst)
    return bucket
