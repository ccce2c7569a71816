"""A load that knows, for every byte of a volume, what a read may return: the oracle of the crash test.

`Image` is the truth about one volume: what each byte holds by the replies received so far, and the requests whose
reply has not come. `Worker` is one connection that keeps a window of requests in flight. Requests in flight never
overlap one another (over all connections of an image), so the order in which a server takes them doesn't matter, and
after a crash each 512-byte unit must be exactly as acknowledged, or, under a request that was in flight, either as
before it or as after it. Where two that were in flight meet within a unit, each of them is there or isn't.

Reads under load are checked too. Everything random comes from one seed; only the server's timing doesn't.
"""

from __future__ import annotations

import os
import random
import select
import socket
import threading
from collections import Counter, deque
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
KINDS = ("read", "write", "write+fua", "trim", "zeroes", "flush")
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

    @property
    def end(self) -> int:
        return self.offset + self.length

    def overlaps(self, other: Request) -> bool:
        return self.offset < other.end and other.offset < self.end

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
        self.by_kind: Counter[str] = Counter()
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

    def first_bytes(self, start: int, length: int) -> Bytes:
        """What `fill` writes: other bytes at each place."""
        cut = start // BLOCK * 1031 % (len(self._payload) - length)
        return self._payload[cut : cut + length]

    def complete(self, request: Request, reply: nbdclient.Reply) -> None:
        """Takes the reply for `request`: from now on its effect must be there."""
        if reply.error:
            raise Violation(f"{self.name}: {request} failed: {os.strerror(reply.error)}")
        here = slice(request.offset, request.end)
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
            self.by_kind[NAMES[request.command] + ("+fua" if request.flags & FUA else "")] += 1

    def judge(self, start: int, found: Bytes) -> None:
        """Judges what a read of whole units from `start` gave after a crash, and takes it as the truth from now on."""
        expected = self.expected[start : start + len(found)]
        if np.array_equal(found, expected):
            return
        for request in self.in_flight:
            low = max(start, request.offset // UNIT * UNIT)
            high = min(start + len(found), -(-request.end // UNIT) * UNIT)
            if request.data is None or low >= high:
                continue
            # Bytes of its first and last unit may be another's, who decides on these; theirs are nobody else's.
            first, last = max(low, request.offset) - low, min(high, request.end) - low
            before = self.expected[low:high]
            after = before.copy()
            after[first:last] = request.data[low + first - request.offset : low + last - request.offset]
            differs = found[low - start : high - start] != after
            differs[:first] = differs[last:] = False
            is_new = ~differs.reshape(-1, UNIT).any(axis=1)
            before.reshape(-1, UNIT)[is_new] = after.reshape(-1, UNIT)[is_new]
        wrong = np.flatnonzero(found != expected)
        if len(wrong):
            units, first = len(np.unique(wrong // UNIT)), int(wrong[0])
            where = f"{units} units of {UNIT} bytes wrong from {start} to {start + len(found)}"
            raise Violation(f"{self.name}: {where}, {self.explain(start + first, found[first:])}")

    def settled(self) -> None:
        """All of the volume has been judged: nothing is in flight any more."""
        self.in_flight.clear()

    def explain(self, offset: int, found: Bytes) -> str:
        """Where the bytes at `offset` come from: they are zeroes, an earlier write's, or nobody's."""
        sample = found[: UNIT - offset % UNIT]
        touching = [r for r in self._history if r.offset <= offset < r.end]
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


def verify(address: Path | tuple[str, int], image: Image) -> None:
    """Reads the whole volume after a crash, over one connection with a few reads in flight, and judges every byte."""
    with nbdclient.Connection(address, image.name) as connection:
        assert connection.size_bytes == image.size_bytes
        starts = iter(range(0, image.size_bytes, VERIFY_BYTES))
        waiting: dict[int, int] = {}
        while True:
            while len(waiting) < 4 and (start := next(starts, None)) is not None:
                waiting[connection.send(READ, start, min(VERIFY_BYTES, image.size_bytes - start))] = start
            if not waiting:
                break
            reply = connection.reply()
            start = waiting.pop(reply.cookie)
            if reply.error:
                raise Violation(f"{image.name}: read at {start} failed: {os.strerror(reply.error)}")
            image.judge(start, np.frombuffer(reply.data, dtype=np.uint8))
    image.settled()


def fill(address: Path | tuple[str, int], image: Image) -> None:
    """Writes the whole volume once, so that all that follows overwrites."""
    with nbdclient.Connection(address, image.name) as connection:
        for start in range(0, image.size_bytes, VERIFY_BYTES):
            length = min(VERIFY_BYTES, image.size_bytes - start)
            request = Request(0, WRITE, start, length, data=image.first_bytes(start, length))
            cookie, header = connection.encode(WRITE, start, length)
            assert request.data is not None
            connection.socket.sendall(header + request.data.tobytes())
            reply = connection.reply()
            assert reply.cookie == cookie
            image.complete(request, reply)


def payload(rng: random.Random, size_bytes: int = 8 << 20) -> Bytes:
    """Bytes that requests cut their data from, at any offset: no two cuts are alike."""
    return np.frombuffer(rng.randbytes(size_bytes), dtype=np.uint8)
