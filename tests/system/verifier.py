"""A load that knows, for every byte of a volume, what a read may return: the oracle of the crash test.

`Image` is the truth about one volume: what each byte holds by the replies received so far, and the requests whose
reply has not come. `Worker` is one connection that keeps a window of requests in flight. Requests in flight never
overlap one another (over all connections of an image), so the order in which a server takes them doesn't matter, and
after a crash each 512-byte unit must be exactly as acknowledged, or, under a request that was in flight, either as
before it or as after it.

Reads under load are checked too. Everything random comes from one seed; only the server's timing doesn't.
"""

from __future__ import annotations

import os
import random
import select
import socket
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.system import nbdclient
from tests.system.nbdclient import FLUSH, FUA, NO_HOLE, READ, TRIM, WRITE, WRITE_ZEROES

UNIT = 512
BLOCK = 4096
HISTORY = 200_000
VERIFY_BYTES = 1 << 20
NAMES = {READ: "read", WRITE: "write", TRIM: "trim", WRITE_ZEROES: "zeroes", FLUSH: "flush"}

Bytes = npt.NDArray[np.uint8]
ZEROES: Bytes = np.zeros(4 << 20, dtype=np.uint8)


class Violation(AssertionError):
    """The server returned bytes that no legal history of the volume gives, or refused what it must do."""


@dataclass(eq=False)
class Request:
    """One request of the load. `data` is what its range holds afterwards; None where it changes nothing."""

    number: int
    command: int
    offset: int
    length: int
    flags: int = 0
    data: Bytes | None = None
    acknowledged: bool = False

    def overlaps(self, other: Request) -> bool:
        return self.offset < other.offset + other.length and other.offset < self.offset + self.length

    def __str__(self) -> str:
        fua = "+fua" if self.flags & FUA else ""
        state = "acknowledged" if self.acknowledged else "in flight"
        return f"#{self.number} {NAMES[self.command]}{fua} {self.offset}+{self.length} {state}"


class Image:
    """What one volume may hold. Shared by the workers on it; `lock` guards everything but `name` and `size_bytes`."""

    def __init__(self, name: str, size_bytes: int, payload: Bytes) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.lock = threading.Lock()
        self.expected: Bytes = np.zeros(size_bytes, dtype=np.uint8)
        self.in_flight: set[Request] = set()
        self.acknowledged = 0
        self._payload = payload
        self._history: deque[Request] = deque(maxlen=HISTORY)
        self._number = 0

    def draw(self, rng: random.Random) -> Request:
        """The next request of the mix, on a range that no request in flight touches, and now in flight itself."""
        with self.lock:
            while True:
                request = self._random_request(rng)
                if not any(request.overlaps(other) for other in self.in_flight):
                    break
            self._number += 1
            request.number = self._number
            self.in_flight.add(request)
            if request.command != READ:
                self._history.append(request)
            return request

    def _random_request(self, rng: random.Random) -> Request:
        dice = rng.random()
        if dice < 0.02:
            return Request(0, FLUSH, 0, 0)
        if dice < 0.10:
            return Request(0, READ, *self._any_range(rng, 64 << 10))
        flags = FUA if rng.random() < 0.04 else 0
        if dice < 0.17:
            # Whole blocks: a trim may round inwards, so at its ragged edges the bytes would be anybody's guess.
            offset, length = self._block_range(rng, 128 if rng.random() < 0.1 else 16)
            return Request(0, TRIM, offset, length, flags, ZEROES[:length])
        if dice < 0.24:
            offset, length = self._any_range(rng, 100_000)
            flags |= NO_HOLE if rng.random() < 0.3 else 0
            return Request(0, WRITE_ZEROES, offset, length, flags, ZEROES[:length])
        if dice < 0.42:
            offset, length = self._any_range(rng, 20_000)
        elif dice < 0.50:
            offset, length = self._block_range(rng, 256)
        else:
            offset, length = self._block_range(rng, 1)
        start = rng.randrange(len(self._payload) - length)
        data = self._payload[start : start + length]
        if dice > 0.99:
            data = ZEROES[:length]  # an ordinary write, which a thin server may unmap
        return Request(0, WRITE, offset, length, flags, data)

    def _any_range(self, rng: random.Random, most: int) -> tuple[int, int]:
        length = rng.randint(1, min(most, self.size_bytes))
        return rng.randint(0, self.size_bytes - length), length

    def _block_range(self, rng: random.Random, most_blocks: int) -> tuple[int, int]:
        blocks = self.size_bytes // BLOCK
        count = rng.randint(1, min(most_blocks, blocks))
        return rng.randint(0, blocks - count) * BLOCK, count * BLOCK

    def complete(self, request: Request, reply: nbdclient.Reply) -> None:
        """Takes the reply for `request`: from now on its effect must be there."""
        if reply.error:
            raise Violation(f"{self.name}: {request} failed: {os.strerror(reply.error)}")
        here = slice(request.offset, request.offset + request.length)
        with self.lock:
            if request.command == READ:
                got = np.frombuffer(reply.data, dtype=np.uint8)
                if not np.array_equal(got, self.expected[here]):
                    bad = request.offset + int(np.flatnonzero(got != self.expected[here])[0])
                    raise Violation(f"{self.name}: {request}: {self.explain(bad, got[bad - request.offset :])}")
            elif request.data is not None:
                self.expected[here] = request.data
            self.in_flight.discard(request)
            request.acknowledged = True
            self.acknowledged += 1

    def settle(self, found: Bytes) -> None:
        """Judges `found`, the whole volume as read after a crash, and takes it as the truth for the next round."""
        assert len(found) == self.size_bytes
        allowed = self.expected.copy()
        for request in self.in_flight:
            if request.data is None:
                continue
            here = slice(request.offset, request.offset + request.length)
            # Whole units around the request; the last one may be cut short by the end of the volume.
            for start in range(request.offset // UNIT * UNIT, request.offset + request.length, UNIT):
                unit = slice(start, min(start + UNIT, self.size_bytes))
                after = allowed[unit].copy()
                low, high = max(start, here.start), min(unit.stop, here.stop)
                after[low - start : high - start] = request.data[low - here.start : high - here.start]
                if np.array_equal(found[unit], after):
                    allowed[unit] = after
        if not np.array_equal(found, allowed):
            wrong = np.flatnonzero(found != allowed)
            units = len(np.unique(wrong // UNIT))
            first = int(wrong[0])
            raise Violation(f"{self.name}: {units} units of {UNIT} bytes wrong, {self.explain(first, found[first:])}")
        self.expected = allowed
        self.in_flight.clear()

    def explain(self, offset: int, found: Bytes) -> str:
        """Where the bytes at `offset` come from: they are zeroes, an earlier write's, or nobody's."""
        sample = found[: UNIT - offset % UNIT]
        touching = [r for r in self._history if r.offset <= offset < r.offset + r.length]
        source = "nothing that was ever written there"
        for request in reversed(touching):
            assert request.data is not None
            theirs = request.data[offset - request.offset :][: len(sample)]
            if np.array_equal(theirs, sample[: len(theirs)]):
                source = f"what {request} wrote"
                break
        else:
            if not sample.any():
                source = "zeroes"
        last = "; ".join(str(request) for request in touching[-6:]) or "nothing"
        return f"first at byte {offset} (block {offset // BLOCK}): found {source}; latest to touch it: {last}"


@dataclass
class Worker:
    """One connection to one image in a thread of its own, until the server dies."""

    image: Image
    address: Path | tuple[str, int]
    window: int
    rng: random.Random
    failure: BaseException | None = None
    _thread: threading.Thread = field(init=False)

    def start(self) -> None:
        connection = nbdclient.Connection(self.address, self.image.name)
        assert connection.size_bytes == self.image.size_bytes
        self._thread = threading.Thread(target=self._run, args=(connection,), daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Waits for the end of the connection and raises what went wrong, unless it was only that end."""
        self._thread.join(30)
        if self._thread.is_alive():
            raise Violation(f"{self.image.name}: a connection still waits 30 s after the server died")
        if self.failure is not None:
            raise self.failure

    def _run(self, connection: nbdclient.Connection) -> None:
        waiting: dict[int, Request] = {}
        with connection:
            try:
                while True:
                    batch = bytearray()
                    while len(waiting) < self.window:
                        request = self.image.draw(self.rng)
                        cookie, header = connection.encode(
                            request.command, request.offset, request.length, request.flags
                        )
                        waiting[cookie] = request
                        batch += header
                        if request.command == WRITE:
                            assert request.data is not None
                            batch += request.data.data
                    self._send(connection, batch, waiting)
                    self._take(connection, waiting)
            except ConnectionError:
                pass  # the server was killed
            except BaseException as error:
                self.failure = error

    def _send(self, connection: nbdclient.Connection, batch: bytearray, waiting: dict[int, Request]) -> None:
        """Sends all of it, and takes replies meanwhile: a server may well stop reading from who doesn't read."""
        unsent = memoryview(batch)
        try:
            while unsent:
                readable, writable, _ = select.select([connection.socket], [connection.socket], [], 20)
                if writable:
                    unsent = unsent[connection.socket.send(unsent, socket.MSG_DONTWAIT) :]
                elif readable:
                    self._take(connection, waiting)
                else:
                    raise Violation(f"{self.image.name}: the server neither reads nor replies for 20 s")
        except ConnectionError:
            while waiting:  # replies that were sent before the server died still count
                self._take(connection, waiting)
            raise

    def _take(self, connection: nbdclient.Connection, waiting: dict[int, Request]) -> None:
        reply = connection.reply()
        self.image.complete(waiting.pop(reply.cookie), reply)


def read_all(address: Path | tuple[str, int], name: str) -> Bytes:
    """The whole volume, over one connection with a few reads in flight."""
    with nbdclient.Connection(address, name) as connection:
        found: Bytes = np.empty(connection.size_bytes, dtype=np.uint8)
        starts = iter(range(0, connection.size_bytes, VERIFY_BYTES))
        waiting: dict[int, int] = {}
        while True:
            while len(waiting) < 4 and (start := next(starts, None)) is not None:
                length = min(VERIFY_BYTES, connection.size_bytes - start)
                waiting[connection.send(READ, start, length)] = start
            if not waiting:
                return found
            reply = connection.reply()
            start = waiting.pop(reply.cookie)
            if reply.error:
                raise Violation(f"{name}: read at {start} failed: {os.strerror(reply.error)}")
            found[start : start + len(reply.data)] = np.frombuffer(reply.data, dtype=np.uint8)


def payload(rng: random.Random, size_bytes: int = 8 << 20) -> Bytes:
    """Bytes that requests cut their data from, at any offset: no two cuts are alike."""
    return np.frombuffer(rng.randbytes(size_bytes), dtype=np.uint8)
